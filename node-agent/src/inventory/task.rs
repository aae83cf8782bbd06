//! The task that owns the facts: follows the engine's events and the kernel's links, and publishes what they come to.

mod listing;
mod ports;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::errors::Error as EngineError;
use bollard::models::EventMessage;
use futures::stream::FuturesOrdered;
use futures::{Stream, StreamExt};
use jiff::Timestamp;
use policy::lease::LeaseBook;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::ahead::Ahead;
use super::engine::{Engine, EngineFact};
use super::events::{Change, change};
use super::facts::{ContainerFact, Ends, Facts, NetworkFact};
use super::inhabitants::Inhabitants;
use super::inspects::{Answer, Inspect, Inspects};
use super::joins::Joins;
use super::links::Seen;
use super::told::{self, Changes, Told};
use super::{Options, Snapshot};
use crate::chain::chain;

/// Repairs what a missed event left wrong. Long, since each costs one inspect a network.
const RESYNC: Duration = Duration::from_secs(60);
/// Where nothing has happened since the last listing, neither by the engine's word nor among the ports, all is listed only at each so
/// manieth of these times: it is most of what a quiet host with a thousand containers costs.
const QUIET: u32 = 5;
/// First and longest wait before the engine is tried again. Its containers are started before it answers, and nothing passes on a
/// guarded network until we know whose they are.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// How long an engine of which nothing was heard may take for an answer, before it is asked for everything.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// A port is on its bridge before the engine tells whose it is; after this long it is nobody's that we know.
const UNCLAIMED: Duration = Duration::from_secs(5);
/// How long the first listing waits for inspects: one that starts keeps its own waiting, and must not keep all others.
const DETAILS: Duration = Duration::from_secs(1);
/// Events taken at once: a `compose up` of fifty containers is some four hundred.
const BATCH: usize = 64;
/// Batches that the engine is asked about at the same time, so that who joins while it is slow to answer is asked about meanwhile. The
/// answers are taken in the order of the events.
const ASKED_AT_ONCE: usize = 4;

/// Why a session with the engine ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the engine does not answer")]
    Engine(#[from] EngineError),
    #[error("the engine ended its stream of events")]
    Ended,
    #[error("the engine's stream of events broke")]
    Broke(#[source] EngineError),
}

/// Owner of everything that was told.
pub(crate) struct Task {
    options: Options,
    links: watch::Receiver<Seen>,
    facts: Facts,
    about: EngineFact,
    leases: LeaseBook,
    /// Why the engine is not followed right now.
    blind: Option<String>,
    /// What was listed before this moment holds all that happened before it.
    synced: Timestamp,
    inspects: Inspects,
    /// Something has happened since the last regular listing.
    stirred: bool,
    /// Regular listings left out since then.
    left_out: u32,
    /// The engine was reloaded: what it told of all is to be told again.
    reloaded: bool,
    unclaimed: BTreeMap<String, Timestamp>,
    ahead: Ahead,
    inhabitants: Inhabitants,
    joins: Joins,
    sender: watch::Sender<Arc<Snapshot>>,
}

impl Task {
    pub(crate) fn new(options: Options, links: watch::Receiver<Seen>) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let blind = Some(format!("the engine at {} was not asked yet", options.socket.display()));
        let (sender, receiver) = watch::channel(Arc::new(Snapshot::default()));
        let mut task = Self {
            options,
            links,
            facts: Facts::default(),
            about: EngineFact::default(),
            leases: LeaseBook::default(),
            blind,
            synced: Timestamp::MIN,
            inspects: Inspects::default(),
            stirred: false,
            left_out: 0,
            reloaded: false,
            unclaimed: BTreeMap::new(),
            ahead: Ahead::default(),
            inhabitants: Inhabitants::new(),
            joins: Joins::default(),
            sender,
        };
        task.publish();
        (task, receiver)
    }

    /// Until nobody listens any more.
    pub(crate) async fn run(mut self) {
        let (first, longest) = BACKOFF;
        let mut wait = first;
        while !self.sender.is_closed() {
            let Err(error) = self.session().await else { return };
            if self.blind.is_none() {
                wait = first;
            }
            let reason = format!("the engine at {} is not followed: {}", self.options.socket.display(), chain(&error));
            if self.blind.as_ref() != Some(&reason) {
                warn!(error = &error as &dyn std::error::Error, socket = %self.options.socket.display(), "engine not followed");
            }
            self.blind = Some(reason);
            self.publish();
            let awake = tokio::time::sleep(wait);
            tokio::pin!(awake);
            loop {
                tokio::select! {
                    () = &mut awake => break,
                    () = self.sender.closed() => return,
                    changed = self.links.changed() => match changed {
                        Ok(()) => self.links_moved(),
                        Err(_) => return,
                    },
                }
            }
            wait = (wait * 2).min(longest);
        }
    }

    /// One connection to the engine, from a full listing until it breaks. `Ok`: nobody listens any more.
    async fn session(&mut self) -> Result<(), SessionError> {
        let engine = Engine::connect(&self.options.socket, &self.options.engine_sockets).await?;
        let since = Timestamp::now();
        // The stream begins to be asked for when it is first read; `since` is what makes it whole.
        let events = std::pin::pin!(engine.events(since).ready_chunks(BATCH));
        let about = engine.about().await?;
        let listed = self.list(&engine).await?;
        // Not before: an engine without containers must not be told of where nothing was listed yet.
        self.about = about;
        let before = Arc::clone(&listed.started.1);
        self.take_listing(&engine, listed, Inspect::All);
        self.all_details().await;
        // That takes a while, and nothing of this has been published yet.
        self.look_since(&before);
        self.blind = None;
        self.publish();
        info!(engine = self.about.version, socket = %self.options.socket.display(), "engine followed");
        self.follow(&engine, events).await
    }

    async fn follow(
        &mut self,
        engine: &Engine,
        mut events: impl Stream<Item = Vec<Result<EventMessage, EngineError>>> + Unpin,
    ) -> Result<(), SessionError> {
        let mut resync = tokio::time::interval(RESYNC);
        resync.reset();
        let mut unclaimed = tokio::time::interval(UNCLAIMED);
        // What the engine is asked about, in the order of the events.
        let mut asked = FuturesOrdered::new();
        let mut ended = None;
        loop {
            tokio::select! {
                biased;
                Some((changes, told)) = asked.next(), if !asked.is_empty() => self.take(engine, changes, told?).await?,
                batch = events.next(), if asked.len() < ASKED_AT_ONCE && ended.is_none() => match batch {
                    None => ended = Some(SessionError::Ended),
                    Some(batch) => {
                        let (changes, broken) = self.read(engine, batch).await?;
                        ended = broken.map(SessionError::Broke);
                        if !changes.is_empty() {
                            self.stirred = true;
                            asked.push_back(told::about(engine, &self.facts.containers, changes));
                        }
                    }
                },
                // All that came before it is done with.
                () = std::future::ready(()), if ended.is_some() && asked.is_empty() => return ended.map_or(Ok(()), Err),
                changed = self.links.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.links_moved();
                }
                answers = self.inspects.answers() => {
                    self.catch_up();
                    let mut news = false;
                    for answer in answers {
                        news |= self.answered(answer);
                    }
                    if news {
                        self.publish();
                    }
                }
                _ = resync.tick() => {
                    if !self.stirred && !self.reloaded && self.left_out + 1 < QUIET {
                        // A stream that says nothing may be one of an engine that hangs.
                        let running = self.facts.containers.iter().find(|(_, fact)| fact.running).map(|(id, _)| id.clone());
                        let network = self.facts.networks.keys().next().cloned();
                        let answers = tokio::time::timeout(ANSWERS_WITHIN, engine.answers(running.as_ref(), network.as_ref()));
                        if matches!(self.following_links(answers).await, Ok(Ok(()))) {
                            self.left_out += 1;
                            continue;
                        }
                        // It may be that one container alone, held by a copy out of it: the listing says.
                    }
                    (self.stirred, self.left_out) = (false, 0);
                    let inspect = if std::mem::take(&mut self.reloaded) { Inspect::All } else { Inspect::Some };
                    if self.resync(engine, inspect).await? {
                        info!("a full listing found what no event had told");
                        self.stirred = true;
                    }
                    self.publish();
                }
                // A port may have become nobody's.
                _ = unclaimed.tick(), if !self.unclaimed.is_empty() => {
                    if self.may_be_mistaken() {
                        self.resync(engine, Inspect::Some).await?;
                    }
                    self.publish();
                }
                () = self.sender.closed() => return Ok(()),
            }
        }
    }

    /// Waits for what only inspect tells, so that the first thing said of running containers is whole: without their published ports
    /// the doors that are open would close for a moment.
    async fn all_details(&mut self) {
        for answer in self.inspects.listed_within(DETAILS).await {
            self.answered(answer);
        }
    }

    /// Whether it says anything new.
    fn answered(&mut self, (container, answer): Answer) -> bool {
        match answer {
            Ok(Some(details)) => self.facts.inspected(&container, details),
            // Gone meanwhile; its event says when.
            Ok(None) => false,
            Err(error) => {
                warn!(container, error = &error as &dyn std::error::Error, "container not inspected; tried again at the next listing");
                self.stirred = true;
                false
            }
        }
    }

    /// What a batch of events says that is not in the last listing. With what ended the stream, if something did.
    async fn read(
        &mut self,
        engine: &Engine,
        batch: Vec<Result<EventMessage, EngineError>>,
    ) -> Result<(Changes, Option<EngineError>), SessionError> {
        if went_back(self.synced, Timestamp::now()) {
            // By the clock of now everything that happens lies before the listing, and would be left out until the next one.
            warn!("the clock was put back; everything is listed anew");
            self.resync(engine, Inspect::All).await?;
            self.publish();
        }
        let mut changes = Changes::new();
        for event in batch {
            match event {
                Ok(event) => changes.extend(change(event)),
                Err(error) => return Ok((changes, Some(error))),
            }
        }
        changes.retain(|(at, _)| *at >= self.synced);
        if let Some((at, _)) = changes.first() {
            debug!(events = changes.len(), late = %Timestamp::now().duration_since(*at), "events came");
        }
        Ok((changes, None))
    }

    /// Takes changes in, in their order, each at its own time.
    async fn take(&mut self, engine: &Engine, mut changes: Changes, told: Told) -> Result<(), SessionError> {
        let told_at = Instant::now();
        self.catch_up();
        // What was listed while the engine was asked holds what happened before it.
        changes.retain(|(at, _)| *at >= self.synced);
        debug!(events = changes.len(), networks = told.networks.len(), after = %Timestamp::now().duration_since(told.asked), "the engine answered");
        // A listing since then is newer, also where it has somebody no more.
        let containers = if told.asked >= self.synced { told.containers } else { BTreeMap::new() };
        for (id, mut fact) in containers {
            keep_details(&mut fact, self.facts.containers.get(&id));
            self.facts.containers.insert(id, fact);
        }
        let links = self.links.borrow().links.clone();
        let ends = Ends::of(&links, self.facts.inside());
        let mut last = self.synced;
        for (at, change) in changes {
            last = at;
            self.apply(engine, (&told.networks, told.asked, &ends), change, at).await?;
        }
        self.publish_at(last, told_at);
        Ok(())
    }

    async fn apply(
        &mut self,
        engine: &Engine,
        (networks, asked, ends): (&BTreeMap<String, NetworkFact>, Timestamp, &Ends<'_>),
        change: Change,
        at: Timestamp,
    ) -> Result<(), SessionError> {
        let moved = change.moves_addresses_of().map(ToOwned::to_owned);
        let all = matches!(change, Change::NetworkGone(_));
        match change {
            Change::Connect { network, container } => {
                let Some(told) = networks.get(&network) else { return Ok(()) };
                // Whoever else the answer lists has an event of its own, with its own time.
                let known = self.facts.networks.entry(network.clone());
                known.or_insert_with(|| NetworkFact { attached: BTreeMap::new(), ..told.clone() });
                match told.attached.get(&container) {
                    Some(attached) if self.ahead.is_over(&self.facts, (&network, &container), attached, asked) => {
                        debug!(container, network = told.name, "its place was left, or another's, before the engine's answer was taken");
                    }
                    Some(attached) => {
                        self.facts.attach(&network, &container, attached.clone());
                        for wrong in self.ahead.told(&mut self.facts, &network, &container) {
                            self.leases.move_one(&wrong, self.facts.container_here(&wrong, ends).as_ref(), at);
                        }
                    }
                    None => info!(container, network = told.name, "a container left its network before its address was read"),
                }
                if self.facts.containers.get(&container).is_some_and(|fact| fact.running) {
                    self.inspects.ask(engine, &self.about.configured, container);
                }
            }
            // Heard of late, and it has come again since.
            Change::Disconnect { network, container } if self.ahead.is_of_before(Some(&network), &container, at) => {}
            Change::Disconnect { network, container } => {
                self.facts.detach(&network, &container);
                self.ahead.left(&network, &container);
            }
            Change::Read(_) => {}
            Change::Start(container) => {
                if let Some(fact) = self.facts.containers.get_mut(&container) {
                    fact.running = true;
                }
                self.inspects.ask(engine, &self.about.configured, container);
            }
            Change::Die(container) => {
                // Its addresses are its own until the engine takes them back: `network disconnect`.
                if !self.ahead.is_of_before(None, &container, at) {
                    self.facts.seen_in.remove(&container);
                }
                if let Some(fact) = self.facts.containers.get_mut(&container) {
                    fact.running = false;
                    fact.details = None;
                }
            }
            Change::Gone(container) => self.facts.forget(&container),
            Change::NetworkMade(network) => {
                if let Some(told) = networks.get(&network) {
                    let empty = NetworkFact { attached: BTreeMap::new(), ..told.clone() };
                    self.facts.networks.entry(network).or_insert(empty);
                }
            }
            Change::NetworkGone(network) => drop(self.facts.networks.remove(&network)),
            Change::Reload => {
                self.about = engine.about().await?;
                self.reloaded = true;
                self.facts.userland_proxy = self.about.userland_proxy;
            }
        }
        // The rest is told at the end of the batch, and of this event its container alone: with many containers to join everything for
        // each event takes longer than all else.
        if let Some(id) = moved {
            self.leases.move_one(&id, self.facts.container_here(&id, ends).as_ref(), at);
        } else if all {
            let (inventory, _) = self.facts.join(&self.links.borrow().links.clone());
            self.leases.update(&inventory, at);
        }
        Ok(())
    }

    fn publish(&mut self) {
        self.publish_at(Timestamp::now(), Instant::now());
    }

    /// Before the engine's word is taken: which ports have gone is looked at by what was known before it.
    fn catch_up(&mut self) {
        if self.links.has_changed().unwrap_or(false) {
            self.links_moved();
        }
    }

    fn links_moved(&mut self) {
        self.stirred = true;
        let told = self.links.borrow().at;
        self.publish_at(Timestamp::now(), told);
    }

    /// Publishes what the facts come to, if that is anything new; `told` is when the last of them came.
    fn publish_at(&mut self, at: Timestamp, told: Instant) {
        let Seen { links, at: seen } = self.links.borrow_and_update().clone();
        // While the engine is away too: who comes then is nobody that it told of before.
        let before = Arc::clone(&self.sender.borrow().inventory);
        self.facts.ended.look(&before, &links, Timestamp::now());
        // What was known before the engine was lost is not to be told as if it were of now.
        if self.blind.is_none() {
            self.look_ahead(&links);
        }
        let (mut inventory, mut notes) = self.facts.join(&links);
        self.leases.update(&inventory, at);
        notes.extend(self.about.notes.iter().cloned());
        inventory.strangers = self.strangers(&inventory, &links);
        let blind: Vec<String> = self.blind.iter().cloned().collect();
        let (leases, engine, joins) = (&self.leases, &self.about.version, &mut self.joins);
        self.sender.send_if_modified(|current| {
            let same = *current.inventory == inventory
                && current.leases == *leases
                && current.blind == blind
                && current.notes.iter().eq(&notes)
                && current.engine == *engine;
            if !same {
                joins.note(&current.inventory, &inventory, told.max(seen));
                *current = Arc::new(Snapshot {
                    inventory: Arc::new(inventory),
                    leases: leases.clone(),
                    blind,
                    notes: notes.into_iter().collect(),
                    engine: engine.clone(),
                    joins: joins.recent(),
                });
            }
            !same
        });
    }
}

/// Whether the wall clock, by which the engine tells the time of events, was put back since the last listing.
fn went_back(synced: Timestamp, now: Timestamp) -> bool {
    now < synced
}

/// The list doesn't have what inspect told; it stays until the container dies.
fn keep_details(fact: &mut ContainerFact, known: Option<&ContainerFact>) {
    if fact.running {
        fact.details = known.filter(|known| known.running).and_then(|known| known.details.clone());
    }
}

/// Any bytes as whatever the engine answers and tells, for the fuzz targets.
#[cfg(any(fuzzing, test))]
pub(crate) fn read_any(json: &[u8]) {
    drop(serde_json::from_slice(json).map(change));
    super::engine::read_any(json);
}

#[cfg(test)]
mod tests;
