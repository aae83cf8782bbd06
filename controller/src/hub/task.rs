//! The task that owns the state: events of the sessions and requests of people come in, one at a time; plans go out.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use policy::NodePlan;
use policy::learn::{Rejected, Revision};
use policy::plan::PlanChange;
use policy::review::Who;
use policy::status::Preview;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tracing::{debug, error, info, warn};

use super::decide::{Decided, History, Request, Would, decide, must_be_confirmed, next_expiry};
use super::node::Session;
use super::state::{Kept, State, node_plan};
use super::{Ask, Hub, HubError, PreviewAnswers, chain, promotion};
use crate::api::view::Outcome;
use crate::session::{Applied, Attachment, BatchIn, Event, Greeting, NotStored, Order, Report};
use crate::store::{Change, DecisionDraft, InForce, RejectedRule, Store, StoreError};

/// How often what is new is learned, and what has run out is looked for. Faster than a person reads; a graph of 10,000 edges is
/// learned in well under this.
const TICK: Duration = Duration::from_secs(1);
/// Workloads that are learned in one go: some hundredths of a second where they have many rules and edges.
const LEARNED_AT_ONCE: usize = 256;
/// How often the clock alone moves suggestions (phase, coverage) and promotion rules are looked at.
const SLOW_TICK: Duration = Duration::from_secs(30);
/// Orders that may wait for one session. An agent that doesn't take them for so long has a broken session.
const ORDERS: usize = 32;
/// Flows that a slow follower may be behind.
const FOLLOW: usize = 8192;

/// What an operator may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Flows kept for people who ask later.
    pub keep_flows: usize,
    /// Who decides where no person does (expiry, promotion): the controller's own user.
    pub own: Who,
}

struct Task {
    state: State,
    store: Store,
    options: Options,
    flows: broadcast::Sender<Arc<Kept>>,
    previews: HashMap<u64, Pending>,
    /// Counts what nodes say of plans, and sessions that end: whoever waits for a plan to be in force looks again.
    answered: watch::Sender<u64>,
    questions: u64,
    /// Suggestions whose digest moved since it was noted in the store.
    unnoted: BTreeMap<policy::Workload, Revision>,
}

struct Pending {
    node: String,
    reply: oneshot::Sender<Result<Preview, String>>,
}

/// Loads the state from the store and starts the task. It ends when `stop` says so.
///
/// # Errors
/// Something in the store cannot be read: nothing is started then, and no node hears of a smaller policy.
pub async fn start(
    store: Store,
    options: Options,
    events: mpsc::Receiver<Event>,
    stop: watch::Receiver<bool>,
) -> Result<(Hub, JoinHandle<()>), StoreError> {
    let mut state = State::new(store.id().to_owned(), Timestamp::now(), options.keep_flows);
    load(&mut state, &store).await?;
    info!(store = %store.id(), generation = state.generation, edges = state.graph.len(), policies = state.set.policies.len(), "state loaded");
    let (flows, _) = broadcast::channel(FOLLOW);
    let (asks, inbox) = mpsc::channel(256);
    let answered = watch::Sender::new(0);
    let hub = Hub { asks, flows: flows.clone(), answered: answered.subscribe() };
    let task = Task { state, store, options, flows, previews: HashMap::new(), answered, questions: 0, unnoted: BTreeMap::new() };
    Ok((hub, tokio::spawn(task.run(events, inbox, stop))))
}

async fn load(state: &mut State, store: &Store) -> Result<(), StoreError> {
    state.graph = store.load_graph().await?;
    let in_force = store.load_policy_set().await?;
    state.put_in_force(in_force.set, in_force.generation);
    state.decisions = store.decisions().await?;
    for workload in state.set.policies.keys() {
        if let Some(last) = store.revisions(workload).await?.last() {
            state.revisions.insert(workload.clone(), (last.revision, last.decision));
        }
    }
    state.rejected = store.rejected().await?.into_iter().map(from_store).collect();
    for (workload, (revision, digest)) in store.suggestion_revisions().await? {
        state.context.previous.insert(workload, Revision { revision, digest });
    }
    for (node, stretches) in store.load_health().await? {
        let node = state.nodes.entry(node).or_default();
        stretches.iter().for_each(|health| node.sight.add(health));
        node.heard = stretches.last().map(|health| health.to);
    }
    Ok(())
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn from_store(RejectedRule { workload, direction, peer, ports }: RejectedRule) -> Rejected {
    Rejected { workload, direction, peer, ports }
}

fn to_store(Rejected { workload, direction, peer, ports }: Rejected) -> RejectedRule {
    RejectedRule { workload, direction, peer, ports }
}

impl Task {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, mut asks: mpsc::Receiver<Ask>, mut stop: watch::Receiver<bool>) {
        // Suggestions are made when somebody asks for one, or after a moment: agents wait for their plan first.
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut slow = tokio::time::interval(SLOW_TICK);
        slow.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(event) = events.recv() => { self.now(); self.event(event).await }
                Some(ask) = asks.recv() => { self.now(); self.ask(ask).await }
                _ = tick.tick() => { self.now(); self.tick().await }
                _ = slow.tick() => { self.now(); self.slow_tick().await }
                // Between the others: who decides does not wait until all is learned.
                () = std::future::ready(()), if self.state.is_relearning() => { self.now(); self.relearn_some() }
                // True, or the sender is gone with the process around it.
                () = stopped(&mut stop) => break,
            }
        }
        self.note_suggestions().await;
        self.store.close().await;
        info!(generation = self.state.generation, "state closed");
    }

    fn now(&mut self) {
        self.state.now = Timestamp::now();
    }

    async fn tick(&mut self) {
        self.state.begin_relearning();
        self.measure();
        self.note_suggestions().await;
        if next_expiry(&self.state.set).is_some_and(|at| at <= self.state.now) {
            let own = self.options.own.clone();
            if let Err(error) = self.decide(Request::Expire, own).await {
                // The nodes judge the end of a rule by themselves; only the record and the listing are behind.
                error!(error = chain(&error), "cannot take out rules whose time is over; trying again");
            }
        }
    }

    async fn slow_tick(&mut self) {
        self.state.all_stale();
        let promotions = promotion::promotions(&self.state);
        self.state.waiting = promotions.waiting;
        for (segment, why) in promotions.due {
            let own = self.options.own.clone();
            match self.decide(Request::Promote { segment: segment.clone(), why }, own).await {
                Ok(_) => info!(%segment, "promoted to Enforce by its own rule"),
                Err(error) => warn!(%segment, error = chain(&error), "promotion refused"),
            }
        }
    }

    fn relearn_some(&mut self) {
        self.unnoted.extend(self.state.relearn_some(LEARNED_AT_ONCE));
    }

    fn relearn(&mut self) {
        self.unnoted.extend(self.state.relearn());
    }

    /// What an operator's Prometheus may want to alarm on. Without `--metrics` nobody gathers them.
    fn measure(&self) {
        let state = &self.state;
        metrics::gauge!("bulkhead_generation").set(state.generation as f64);
        metrics::gauge!("bulkhead_edges").set(state.graph.len() as f64);
        metrics::gauge!("bulkhead_policies").set(state.set.policies.len() as f64);
        metrics::gauge!("bulkhead_quarantines").set(state.set.quarantines.len() as f64);
        for (name, node) in &state.nodes {
            let applied = if node.status.store == state.store { node.status.generation } else { 0 };
            metrics::gauge!("bulkhead_node_connected", "node" => name.clone()).set(f64::from(u8::from(node.session.is_some())));
            metrics::gauge!("bulkhead_node_generation", "node" => name.clone()).set(applied as f64);
            metrics::gauge!("bulkhead_node_plan_refused", "node" => name.clone()).set(f64::from(u8::from(node.refused.is_some())));
            metrics::counter!("bulkhead_node_events_lost", "node" => name.clone()).absolute(node.sight.lost());
            metrics::counter!("bulkhead_node_healthy_seconds", "node" => name.clone()).absolute(node.sight.healthy_seconds());
        }
    }

    /// Revisions survive a restart. If the store doesn't take them now they are noted later; until then nothing is lost.
    async fn note_suggestions(&mut self) {
        if self.unnoted.is_empty() {
            return;
        }
        let revisions: Vec<_> =
            self.unnoted.iter().map(|(workload, revision)| (workload, revision.revision, revision.digest.as_str())).collect();
        match self.store.save_suggestion_revisions(revisions).await {
            Ok(()) => self.unnoted.clear(),
            Err(error) => warn!(error = chain(&error), "cannot note the revisions of suggestions; trying again"),
        }
    }

    async fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Read(look) => look(&self.state),
            Ask::Refresh(look) => {
                self.state.looked_at();
                self.relearn();
                look(&self.state);
            }
            Ask::Decide { request, who, reply } => {
                let outcome = self.decide(*request, who).await;
                // Whoever asked went away; it is decided and recorded all the same.
                drop(reply.send(outcome));
            }
            Ask::Would { request, reply } => {
                let would = self.would(&request).await;
                drop(reply.send(would.map(|decided| Would::of(&self.state, decided))));
            }
            Ask::Preview { plan, reply } => drop(reply.send(self.preview(&plan))),
        }
    }

    async fn event(&mut self, event: Event) {
        match event {
            Event::Connected { session, greeting, reply } => self.connected(session, greeting, reply).await,
            Event::Batch { session, batch, reply } => self.batch(session, batch, reply).await,
            Event::Flows { node, flows, dropped } => {
                if dropped > 0 {
                    debug!(%node, dropped, "flows for people were dropped");
                }
                metrics::counter!("bulkhead_flows_received", "node" => node.clone()).increment(flows.len() as u64);
                metrics::counter!("bulkhead_flows_dropped", "node" => node.clone()).increment(dropped);
                for flow in flows {
                    let kept = self.state.keep(&node, flow);
                    // Nobody follows: that is an error to the channel, not to us.
                    let _ = self.flows.send(kept);
                }
            }
            Event::Report { node, report } => self.report(node, *report),
            Event::Applied { node, applied } => self.applied(node, applied),
            Event::Whole { session, node } => {
                let open = self.state.nodes.get_mut(&node).and_then(|known| known.session.as_mut());
                if let Some(open) = open.filter(|open| open.id == session) {
                    warn!(%node, "the agent has another plan than was thought; it gets the whole");
                    open.sent = None;
                    self.send_plan(Some(&node), false, None);
                }
            }
            Event::Answer { node, id, answer } => match self.previews.remove(&id) {
                // Only the node that was asked may answer.
                Some(pending) if pending.node == node => drop(pending.reply.send(answer)),
                Some(pending) => drop(self.previews.insert(id, pending)),
                None => debug!(%node, id, "an answer came too late"),
            },
            Event::Gone { session, node } => {
                let known = self.state.nodes.entry(node.clone()).or_default();
                if known.session.as_ref().is_some_and(|open| open.id == session) {
                    known.session = None;
                    self.answered.send_modify(|times| *times += 1);
                    self.previews.retain(|_, pending| pending.node != node);
                    info!(%node, session, "agent gone");
                }
            }
        }
    }

    async fn connected(&mut self, session: u64, greeting: Greeting, reply: oneshot::Sender<Result<Attachment, String>>) {
        let Greeting { node, spool, version, applied, changes } = greeting;
        let acknowledged = match self.store.acknowledged(&node, &spool).await {
            Ok(acknowledged) => acknowledged,
            Err(error) => {
                error!(%node, error = chain(&error), "cannot look up what is in the store");
                drop(reply.send(Err(chain(&error))));
                return;
            }
        };
        let known = self.state.nodes.entry(node.clone()).or_default();
        if known.session.as_ref().is_some_and(|open| open.spool != spool && !open.orders.is_closed()) {
            warn!(%node, "a second agent was refused");
            let why = format!("node {node} has an agent already: stop one of them, or give this one another name with --node");
            drop(reply.send(Err(why)));
            return;
        }
        let (orders, inbox) = mpsc::channel(ORDERS);
        // The same agent came again before its old session was seen to end: the old one ends now, by losing its orders.
        (known.status.store, known.status.generation) = applied.clone().unwrap_or_default();
        // After a store was put back the number that it names may be that of another plan: unless it had that from this process it gets
        // the plan whole, and compares.
        let sent = applied.filter(|applied| known.took.as_ref() == Some(applied));
        known.session = Some(Session { id: session, spool, orders, sent, changes, unanswered: None });
        known.heard = Some(self.state.now);
        known.reported = false;
        known.refused = None;
        info!(%node, session, %version, acknowledged, "agent connected");
        if reply.send(Ok(Attachment { store: self.state.store.clone(), acknowledged, orders: inbox })).is_err() {
            known.session = None;
            return;
        }
        self.send_plan(Some(&node), false, None);
    }

    async fn batch(&mut self, session: u64, mut batch: BatchIn, reply: oneshot::Sender<Result<(), NotStored>>) {
        use crate::store::BatchOutcome;
        let (edges, left_out): (Vec<_>, Vec<_>) = std::mem::take(&mut batch.edges).into_iter().partition(|d| self.state.graph.has_room(d));
        batch.edges = edges;
        let outcome = self.store.apply_batch(&batch).await;
        let answer = match outcome {
            Ok(BatchOutcome::Already) => Ok(()),
            Ok(BatchOutcome::Applied { gap }) => {
                if let Some(gap) = &gap {
                    warn!(node = %batch.node, missing = gap.lost, "batches never arrived: that stretch counts as not observed");
                    self.state.saw(&batch.node, std::slice::from_ref(gap));
                }
                metrics::counter!("bulkhead_batches_stored", "node" => batch.node.clone()).increment(1);
                self.state.saw(&batch.node, &batch.health);
                self.state.add_edges(&batch.edges);
                left_out.iter().for_each(|delta| self.state.graph.leave_out(delta));
                debug!(node = %batch.node, session, seq = batch.seq, edges = batch.edges.len(), "batch stored");
                Ok(())
            }
            Err(error) => {
                error!(node = %batch.node, seq = batch.seq, error = chain(&error), "batch not stored; the agent keeps it");
                Err(NotStored { why: chain(&error) })
            }
        };
        drop(reply.send(answer));
    }

    fn report(&mut self, name: String, report: Report) {
        let Report { inventory, status } = report;
        let node = self.state.nodes.entry(name).or_default();
        node.heard = Some(self.state.now);
        let known = std::mem::replace(&mut node.status, status);
        // It was written before what the agent has said since: a node never goes back (unless to another store, by `adopt`).
        if node.status.store == known.store {
            node.status.generation = node.status.generation.max(known.generation);
        }
        node.reported = true;
        if node.inventory != inventory {
            node.inventory = inventory;
            self.state.refresh_networks();
        }
    }

    fn applied(&mut self, name: String, applied: Applied) {
        let Applied { store, generation, refused, revoked } = applied;
        match &refused {
            Some(why) => warn!(node = %name, generation, %why, "plan refused"),
            None => info!(node = %name, generation, revoked, "plan applied"),
        }
        let node = self.state.nodes.entry(name).or_default();
        node.heard = Some(self.state.now);
        if refused.is_none() {
            node.took = Some((store.clone(), generation));
            node.status.store = store;
            node.status.generation = generation;
        }
        if let Some(session) = &mut node.session
            // A plan that could not be read has no generation.
            && (refused.is_some() || session.sent.as_ref().is_none_or(|(_, sent)| *sent <= generation))
        {
            session.unanswered = None;
        }
        // That an older one is in force now takes nothing back that was said of the one that was sent since.
        let is_of_now = node.session.as_ref().is_none_or(|session| session.sent == Some((node.status.store.clone(), generation)));
        if refused.is_some() || is_of_now {
            node.refused = refused;
        }
        self.answered.send_modify(|times| *times += 1);
    }

    /// Sends the plan to one node, or to all that don't have it; to those that have the one before, only the `change`. Nothing was ever
    /// decided: nothing is sent.
    fn send_plan(&mut self, only: Option<&str>, adopt: bool, change: Option<PlanChange>) {
        let State { nodes, store, set, generation, now, .. } = &mut self.state;
        let generation = *generation;
        if generation == 0 && !adopt {
            return;
        }
        // Made if somebody needs it: it is all that is in force.
        let whole: OnceCell<Arc<NodePlan>> = OnceCell::new();
        let made = || Arc::new(node_plan(store, set.clone(), generation));
        let before = change.as_ref().map(|change| (change.store.clone(), change.from));
        let change = change.map(Arc::new);
        let current = Some((store.clone(), generation));
        for (name, node) in nodes.iter_mut().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            let Some(session) = &mut node.session else { continue };
            if session.sent == current && !adopt {
                continue;
            }
            let order = match &change {
                Some(change) if !adopt && session.changes && session.sent == before => Order::Change(Arc::clone(change)),
                Some(_) | None => Order::Plan { plan: Arc::clone(whole.get_or_init(made)), adopt },
            };
            let is_whole = matches!(order, Order::Plan { .. });
            match session.orders.try_send(order) {
                Ok(()) => {
                    session.sent.clone_from(&current);
                    if node.status.store != *store || node.status.generation != generation {
                        session.unanswered.get_or_insert(*now);
                    }
                    // What it says next is of this plan.
                    node.refused = None;
                    info!(node = %name, generation, whole = is_whole, adopt, "plan sent");
                }
                Err(error) => {
                    // The agent gets it when it comes again: a session begins with the plan.
                    warn!(node = %name, %error, "the session takes no orders; it is ended");
                    node.session = None;
                }
            }
        }
    }

    fn preview(&mut self, plan: &Arc<NodePlan>) -> PreviewAnswers {
        let mut answers = PreviewAnswers::new();
        self.previews.retain(|_, pending| !pending.reply.is_closed());
        for (name, node) in &self.state.nodes {
            let (reply, answer) = oneshot::channel();
            answers.insert(name.clone(), answer);
            let Some(session) = &node.session else {
                drop(reply.send(Err("no agent is connected".to_owned())));
                continue;
            };
            self.questions += 1;
            match session.orders.try_send(Order::Preview { id: self.questions, plan: Arc::clone(plan) }) {
                Ok(()) => drop(self.previews.insert(self.questions, Pending { node: name.clone(), reply })),
                Err(error) => drop(reply.send(Err(format!("its session takes no orders: {error}")))),
            }
        }
        answers
    }

    async fn would(&mut self, request: &Request) -> Result<Decided, HubError> {
        if matches!(request, Request::Review(_)) {
            // Of a suggestion as it is now. Nothing else reads one, and a quarantine does not wait for all of them.
            self.relearn();
        }
        let mut history = History::default();
        if let Request::Revert(revert) = request {
            history.revisions = self.store.revisions(&revert.workload).await.map_err(HubError::Store)?;
        }
        decide(&self.state, request, &history)
    }

    async fn decide(&mut self, request: Request, who: Who) -> Result<Outcome, HubError> {
        let decided = self.would(&request).await?;
        if decided.dry_run || (decided.changes_nothing(&self.state) && !decided.always) {
            return Ok(Outcome { recorded: None, generation: self.state.generation, notes: decided.notes, ..Outcome::default() });
        }
        must_be_confirmed(&self.state, &request, &decided)?;
        let Decided { set, remember, forget, action, subject, digest, rules, comment, notes, adopt, .. } = decided;
        let at_least = if adopt { self.state.beyond_all() } else { 0 };
        let change = Change {
            at_least,
            before: InForce { generation: self.state.generation, set: self.state.set.clone() },
            set: set.clone(),
            rejected: remember.iter().cloned().map(to_store).collect(),
            accepted: forget.iter().cloned().map(to_store).collect(),
            decision: DecisionDraft { time: self.state.now, who, action, subject, digest, rules, comment },
        };
        let decision = self.store.commit_decision(&change).await.map_err(HubError::Store)?;
        info!(
            number = decision.number, generation = decision.generation, uid = decision.who.uid, who = %decision.who.name,
            action = ?decision.action, subject = %decision.subject, "decided"
        );
        let state = &mut self.state;
        let touched: BTreeSet<_> = set.policies.keys().chain(state.set.policies.keys()).cloned().collect();
        for workload in touched {
            if set.policies.get(&workload) != state.set.policies.get(&workload) {
                // As the store counts: one more with each change of this policy.
                let (revision, last) = state.revisions.entry(workload).or_default();
                (*revision, *last) = (*revision + 1, decision.number);
            }
        }
        let change = PlanChange::between(&state.store, (state.generation, &state.set), (decision.generation, &set));
        // Segments and quarantines are nothing that suggestions depend on.
        if set.policies != state.set.policies || set.guardrails != state.set.guardrails || !(remember.is_empty() && forget.is_empty()) {
            state.all_stale();
        }
        state.put_in_force(set, decision.generation);
        state.rejected.extend(remember);
        state.rejected.retain(|rule| !forget.contains(rule));
        state.decisions.push(decision.clone());
        self.send_plan(None, adopt, Some(change));
        Ok(Outcome { recorded: Some(decision), generation: self.state.generation, notes, ..Outcome::default() })
    }
}
