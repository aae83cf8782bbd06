//! The task that owns the facts: follows the engine's events and the kernel's links, and publishes what they come to.

use crate::chain::chain;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bollard::errors::Error as EngineError;
use bollard::models::EventMessage;
use futures::stream::{self, BoxStream, FuturesOrdered};
use futures::{FutureExt, Stream, StreamExt};
use jiff::Timestamp;
use policy::lease::LeaseBook;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::engine::{Engine, EngineFact};
use super::events::{Change, change};
use super::facts::{ContainerFact, Details, Ends, Facts, Links, NetworkFact};
use super::joins::Joins;
use super::links::Seen;
use super::told::{self, Changes, Told};
use super::{Options, Snapshot};

/// Repairs what a missed event left wrong. Long, since each costs one inspect a network.
const RESYNC: Duration = Duration::from_secs(60);
/// First and longest wait before the engine is tried again. Its containers are started before it answers, and nothing passes on a
/// guarded network until we know whose they are.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// How long the first listing waits for inspects: one that starts keeps its own waiting, and must not keep all others.
const DETAILS: Duration = Duration::from_secs(1);
/// A port is on its bridge before the engine tells whose it is; after this long it is nobody's that we know.
const UNCLAIMED: Duration = Duration::from_secs(5);
/// Inspects of a listing under way at the same time: each is a connection with buffers of its own, and a thousand of them are memory that
/// is kept. More than a machine that boots has starting containers, whose inspects wait.
const ABREAST: usize = 64;
/// Of the containers that a regular listing shows as they were, so many are inspected, or one in so many if that is more: what only
/// inspect tells changes without an event only where the engine itself does.
const AGAIN: (usize, usize) = (64, 8);
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

/// What inspect told of a container.
type Answer = (String, Result<Option<Details>, EngineError>);

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
    asked: JoinSet<Answer>,
    /// Inspects of a listing, which come after those of events.
    listed: BoxStream<'static, Answer>,
    /// The container that a regular listing inspected last.
    inspected: String,
    /// The engine was reloaded: what it told of all is to be told again.
    reloaded: bool,
    unclaimed: BTreeMap<String, Timestamp>,
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
            asked: JoinSet::new(),
            listed: stream::empty().boxed(),
            inspected: String::new(),
            reloaded: false,
            unclaimed: BTreeMap::new(),
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
        let before = std::mem::replace(&mut self.about, engine.about().await?);
        if let Err(error) = self.resync(&engine, Inspect::All).await {
            // Nothing was listed: to have an engine without containers must not be told.
            self.about = before;
            return Err(error);
        }
        self.all_details().await;
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
                            asked.push_back(told::about(engine, &self.facts.containers, changes));
                        }
                    }
                },
                // All that came before it is done with.
                () = std::future::ready(()), if ended.is_some() && asked.is_empty() => return ended.map_or(Ok(()), Err),
                Some(answer) = self.asked.join_next(), if !self.asked.is_empty() => {
                    let mut news = self.answered(answer);
                    while let Some(answer) = self.asked.try_join_next() {
                        news |= self.answered(answer);
                    }
                    if news {
                        self.publish();
                    }
                }
                Some(answer) = self.listed.next() => {
                    // What has come is taken at once, and mostly is what was known.
                    let mut news = self.answered(Ok(answer));
                    while let Some(Some(answer)) = self.listed.next().now_or_never() {
                        news |= self.answered(Ok(answer));
                    }
                    if news {
                        self.publish();
                    }
                }
                changed = self.links.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.links_moved();
                }
                _ = resync.tick() => {
                    let inspect = if std::mem::take(&mut self.reloaded) { Inspect::All } else { Inspect::Some };
                    if self.resync(engine, inspect).await? {
                        info!("a full listing found what no event had told");
                    }
                    self.publish();
                }
                // A port may have become nobody's.
                _ = unclaimed.tick(), if !self.unclaimed.is_empty() => self.publish(),
                () = self.sender.closed() => return Ok(()),
            }
        }
    }

    /// Lists everything anew; whether that is anything new.
    async fn resync(&mut self, engine: &Engine, inspect: Inspect) -> Result<bool, SessionError> {
        let started = Timestamp::now();
        let (networks, mut containers) = tokio::try_join!(engine.networks(), engine.containers(&[]))?;
        for (id, fact) in &mut containers {
            keep_details(fact, self.facts.containers.get(id));
        }
        // Ports, resolvers and process ids change without an event where the engine reloads or restarts.
        let running = containers.iter().filter(|(_, fact)| fact.running);
        let due = match inspect {
            Inspect::All => running.map(|(id, _)| id.clone()).collect(),
            Inspect::Some => {
                let as_it_was = |id: &String, fact| self.facts.containers.get(id) == Some(fact) && fact.details.is_some();
                let (known, news): (Vec<_>, Vec<_>) = running.partition(|(id, fact)| as_it_was(id, *fact));
                let known: Vec<&String> = known.into_iter().map(|(id, _)| id).collect();
                let again = next_of(&known, &self.inspected, AGAIN.0.max(known.len().div_ceil(AGAIN.1)));
                if let Some(last) = again.last() {
                    self.inspected.clone_from(last);
                }
                news.into_iter().map(|(id, _)| id.clone()).chain(again).collect()
            }
        };
        let news = self.facts.networks != networks || self.facts.containers != containers;
        self.facts.networks = networks;
        self.facts.containers = containers;
        self.synced = started;
        self.facts.userland_proxy = self.about.userland_proxy;
        self.facts.engine_unmanaged.clone_from(&self.about.unmanaged);
        self.inspect(engine, due);
        Ok(news)
    }

    /// Asks about these, some at a time. An earlier listing, which mostly is done by then, is given up: the rest comes in its turn.
    fn inspect(&mut self, engine: &Engine, due: Vec<String>) {
        let (engine, configured) = (engine.clone(), self.about.configured.clone());
        let one = move |id: String| {
            let (engine, configured) = (engine.clone(), configured.clone());
            async move {
                let answer = engine.details(&id, &configured).await;
                (id, answer)
            }
        };
        self.listed = stream::iter(due).map(one).buffer_unordered(ABREAST).boxed();
    }

    /// Waits for what only inspect tells, so that the first thing said of running containers is whole: without their published ports
    /// the doors that are open would close for a moment.
    async fn all_details(&mut self) {
        let _ = tokio::time::timeout(DETAILS, async {
            while let Some(answer) = self.listed.next().await {
                self.answered(Ok(answer));
            }
        })
        .await;
    }

    fn ask(&mut self, engine: &Engine, id: String) {
        let (engine, configured) = (engine.clone(), self.about.configured.clone());
        self.asked.spawn(async move {
            let answer = engine.details(&id, &configured).await;
            (id, answer)
        });
    }

    /// Whether it says anything new.
    fn answered(&mut self, answer: Result<Answer, tokio::task::JoinError>) -> bool {
        match answer {
            Ok((id, Ok(Some(details)))) => {
                let fact = self.facts.containers.get_mut(&id).filter(|fact| fact.running);
                return fact.is_some_and(|fact| {
                    let known = fact.details.as_ref() == Some(&details);
                    fact.details = Some(details);
                    !known
                });
            }
            // Gone meanwhile; its event says when.
            Ok((_, Ok(None))) => {}
            Ok((container, Err(error))) => {
                warn!(container, error = &error as &dyn std::error::Error, "container not inspected; tried again at the next listing");
            }
            Err(error) => warn!(error = &error as &dyn std::error::Error, "container not inspected"),
        }
        false
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
        // What was listed while the engine was asked holds what happened before it.
        changes.retain(|(at, _)| *at >= self.synced);
        debug!(events = changes.len(), networks = told.networks.len(), after = ?told.asked.elapsed(), "the engine answered");
        for (id, mut fact) in told.containers {
            keep_details(&mut fact, self.facts.containers.get(&id));
            self.facts.containers.insert(id, fact);
        }
        let links = self.links.borrow().links.clone();
        let ends = Ends::of(&links, self.facts.inside());
        let mut last = self.synced;
        for (at, change) in changes {
            last = at;
            self.apply(engine, (&told.networks, &ends), change, at).await?;
        }
        self.publish_at(last, told_at);
        Ok(())
    }

    async fn apply(
        &mut self,
        engine: &Engine,
        (networks, ends): (&BTreeMap<String, NetworkFact>, &Ends<'_>),
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
                    Some(attached) => self.facts.attach(&network, &container, attached.clone()),
                    None => info!(container, network = told.name, "a container left its network before its address was read"),
                }
                if self.facts.containers.get(&container).is_some_and(|fact| fact.running) {
                    self.ask(engine, container);
                }
            }
            Change::Disconnect { network, container } => self.facts.detach(&network, &container),
            Change::Read(_) => {}
            Change::Start(container) => {
                if let Some(fact) = self.facts.containers.get_mut(&container) {
                    fact.running = true;
                }
                self.ask(engine, container);
            }
            Change::Die(container) => {
                // Its addresses are its own until the engine takes them back: `network disconnect`.
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

    fn links_moved(&mut self) {
        let told = self.links.borrow().at;
        self.publish_at(Timestamp::now(), told);
    }

    /// Publishes what the facts come to, if that is anything new; `told` is when the last of them came.
    fn publish_at(&mut self, at: Timestamp, told: Instant) {
        let Seen { links, at: seen } = self.links.borrow_and_update().clone();
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

    /// Ports that have been nobody's for a while.
    fn strangers(&mut self, inventory: &policy::Inventory, links: &Links) -> BTreeMap<String, String> {
        let now = Timestamp::now();
        let claimed: BTreeSet<&String> = inventory.containers.values().flat_map(|c| &c.legs).filter_map(|leg| leg.port.as_ref()).collect();
        self.unclaimed.retain(|port, _| links.ports.contains_key(port) && !claimed.contains(port));
        for port in links.ports.keys().filter(|port| !claimed.contains(port)) {
            self.unclaimed.entry(port.clone()).or_insert(now);
        }
        let old = |since: &Timestamp| now.duration_since(*since).unsigned_abs() >= UNCLAIMED;
        let strangers = self.unclaimed.iter().filter(|(_, since)| old(since));
        strangers.map(|(port, _)| (port.clone(), links.ports[port].bridge.clone())).collect()
    }
}

/// Which of the containers that run a listing inspects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inspect {
    All,
    /// Those that are not as they were, and a share of the rest in turn.
    Some,
}

/// So many of these, which are in order, from the first behind `last` on and around.
fn next_of(ids: &[&String], last: &str, most: usize) -> Vec<String> {
    let begin = ids.partition_point(|id| id.as_str() <= last);
    ids.iter().cycle().skip(begin).take(most.min(ids.len())).map(|id| (*id).clone()).collect()
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
mod tests {
    use super::*;

    #[test]
    fn regular_listings_inspect_everybody_in_turn_and_nobody_twice_at_once() {
        let ids: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        let ids: Vec<&String> = ids.iter().collect();
        assert_eq!(next_of(&ids, "", 4), ["0", "1", "2", "3"]);
        assert_eq!(next_of(&ids, "3", 4), ["4", "5", "6", "7"]);
        assert_eq!(next_of(&ids, "7", 4), ["8", "9", "0", "1"], "around");
        assert_eq!(next_of(&ids, "55", 2), ["6", "7"], "the last one may be gone");
        assert_eq!(next_of(&ids, "9", 64).len(), 10);
        assert!(next_of(&[], "9", 64).is_empty());
    }

    #[test]
    fn a_clock_that_was_put_back_is_noticed_and_one_that_goes_on_is_not() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(went_back(at(3_600), at(10)));
        assert!(!went_back(at(3_600), at(3_600)));
        assert!(!went_back(Timestamp::MIN, at(0)), "never listed yet");
    }
}
