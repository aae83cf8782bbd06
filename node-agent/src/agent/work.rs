//! The task that owns the agent's state.

mod beat;
mod bound;
mod held;
mod orders;
mod settling;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use policy::attribute::Fact;
use policy::bind::Binding;
use policy::evaluate::{Connection, Scene};
use policy::graph::{EdgeDelta, FlowGraph, LeftOut};
use policy::plan::NodePlan;
use policy::status::NodeStatus;
use policy::{Endpoint, Flow, FlowOutcome, Workload, evaluate};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{error, info, warn};

use super::account::{self, Alarms};
use super::alone::alone;
use super::denied;
use super::forwarding::Forwarding;
use super::keep::{self, Keep, KeepError};
use super::memory;
use super::process::EngineFilter;
use super::start::Begun;
use super::{AgentError, Before, Options, chain, io_at, living, owner};
use crate::enforce::watch::Watcher;
use crate::enforce::{self, Nftables};
use crate::inventory::{self, Snapshot};
use crate::netns::Identity;
use crate::observe::{self, Observer, Originals};
use crate::uplink::{self, Order, Uplink, UplinkHandle};
use settling::Settling;

/// How often the kernel is compared whole with what was written, without a reason. With a reason it is compared at once.
const FULL_COMPARE_EVERY: Duration = Duration::from_secs(300);
/// How soon the controller hears of what moved. Of a burst it hears once: to give account takes longer than to bind, and the next
/// container waits for it.
const TELL_AFTER: Duration = Duration::from_millis(50);
/// How often the agent looks at itself.
const PULSE: Duration = Duration::from_secs(1);
/// The agent's unit is ordered before the engine's: it must be ready without an engine too, with what it has on disk.
const READY_WITHOUT_ENGINE_AFTER: Duration = Duration::from_secs(2);
/// How long until a port is tried again whose MAC address is also somebody else's.
const TIED_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// After a refusal of the kernel, how long until it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Runs the agent until a signal. What is enforced stays in the kernel.
///
/// # Errors
/// What keeps it from starting. Later troubles are logged, reported as alarms, and tried again.
pub(super) async fn run(options: Options, begun: Begun) -> Result<(), AgentError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_at("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_at("listen for signals"))?;
    let keep = Keep::open(&options.state_dir)?;
    let _alone = alone(begun.name)?;
    // None of this keeps an agent from enforcing: after a reboot containers start whether it does or not.
    let mut troubles = Vec::new();
    if let Some(address) = options.metrics {
        let builder = metrics_exporter_prometheus::PrometheusBuilder::new().with_http_listener(address);
        if let Err(error) = builder.install() {
            troubles.push(format!("metrics are not served at {address}: {}", chain(&error)));
        }
    }
    let kept = keep.load::<Before>(keep::BEFORE).unwrap_or_else(|error| {
        troubles.push(format!("how this host was before is not known: {}", chain(&error)));
        None
    });
    let before = kept.clone().unwrap_or_default().begun(options.netns.clone(), Identity::here());
    // What `down` needs to find the place, before anything is changed there.
    if kept.as_ref() != Some(&before)
        && let Err(error) = keep.save(keep::BEFORE, &before)
    {
        troubles.push(format!("where this agent works is not on disk: {}", chain(&error)));
    }
    let keep = Arc::new(keep);

    let Begun { owning, engine, unconfined, sums, .. } = begun;
    for limit in &unconfined {
        warn!(limit, "this kernel cannot confine the agent");
    }
    match &sums {
        Ok(sums) => owner::leave_sums(sums),
        Err(why) => warn!(why, "cannot look at checksums that are yet to be written: `status` names whose packets these may be"),
    }
    info!(engine = %engine, node = %options.node, "starting");
    let filter = EngineFilter::start(&engine.socket, &options.engine_folder().join("engine.sock"))
        .await
        .map_err(io_at("start the engine filter"))?;
    let sources = inventory::Options { socket: filter.socket.clone(), engine_sockets: vec![engine.socket.clone()] };
    let (mut snapshots, _inventory) = inventory::start(sources).await?;

    // Before anything is written: what somebody changes right behind the first write must be heard of.
    let mut foreign = Watcher::open().map_err(io_at("watch the packet filter"))?;
    let mut work = Work::start(&options, (owning, unconfined, sums.is_ok()), keep, snapshots.clone())?;
    troubles.into_iter().for_each(|trouble| work.alarm(trouble));
    // Before the engine answers: after a reboot its containers must not be faster than we are.
    work.load_ruleset();
    let kept = work.keep.clone();
    let begun = before.clone();
    let keep_originals = move |originals: &Originals| {
        let before = Before { originals: originals.clone(), ..begun.clone() };
        kept.save(keep::BEFORE, &before).map_err(std::io::Error::other)
    };
    let watching = observe::Options {
        originals: before.originals,
        keep: Box::new(keep_originals),
        filtered: work.filtered.subscribe(),
        ..observe::Options::default()
    };
    let (mut facts, observer) = Observer::start(watching, snapshots.clone())?;

    let mut orders = work.orders.take().expect("taken once, here");
    let mut pulse = interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let latest = Instant::now() + READY_WITHOUT_ENGINE_AFTER;
    let mut ready = false;
    let mut thrift = interval(memory::GIVE_BACK_EVERY);
    thrift.set_missed_tick_behavior(MissedTickBehavior::Skip);
    // When the controller is told of what moved.
    let mut told_at = None;
    // When the bridges are made to follow: see [`Work::settle`].
    let mut settling = Settling::default();
    loop {
        if !ready && (work.inventory_known() || Instant::now() >= latest) {
            ready = true;
            work.beat(&observer);
            // Nobody listens when it was started by hand.
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        }
        let (wake, tell) = (sleep_until(work.wake), sleep_until(told_at.unwrap_or(work.wake)));
        let settle = sleep_until(settling.due().unwrap_or(work.wake));
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            Ok(()) = snapshots.changed() => {
                let snapshot = snapshots.borrow_and_update().clone();
                work.moved(snapshot);
                told_at.get_or_insert_with(|| Instant::now() + TELL_AFTER);
            }
            Some(order) = orders.recv() => {
                work.order(order);
                // What is told of a network is not to stay what it was before the order.
                told_at = Some(Instant::now());
            }
            change = foreign.changed() => work.touched(change),
            () = wake => drop(work.bind_again()),
            () = settle, if settling.due().is_some() => {
                settling.done();
                work.settle();
            }
            () = tell, if told_at.is_some() => {
                told_at = None;
                work.beat(&observer);
            }
            Some(facts) = facts.recv() => facts.iter().for_each(|fact| work.saw(fact)),
            _ = pulse.tick() => work.beat(&observer),
            _ = thrift.tick() => memory::give_back(),
        }
        work.write_what_is_due();
        work.tell_what_came_into_force();
        if work.bound_since() {
            settling.bound(Instant::now());
        }
        // What comes first above may always be ready.
        if settling.is_overdue(Instant::now()) {
            settling.done();
            work.settle();
        }
    }
    info!("stopping; what is enforced stays in the kernel");
    work.settle();
    // The switches stay with what they serve; `down` puts them back.
    let ended = tokio::task::spawn_blocking(move || observer.leave());
    while let Some(facts) = facts.recv().await {
        facts.iter().for_each(|fact| work.saw(fact));
    }
    ended.await.map_err(|e| io_at("stop observing")(e.into()))?;
    if let Err(error) = work.enforcer.let_go() {
        error!(error = %chain(&error), "the tables could not be made to outlast their owner: they go when nobody keeps its socket any more");
    }
    work.uplink.stop().await;
    // Until here.
    drop(sums);
    Ok(())
}

/// What the controller was told last.
struct Reported {
    snapshot: Arc<Snapshot>,
    /// The status without counters.
    news: NodeStatus,
    /// Events, what the connection table held, and what the graph had no room for.
    counters: (u64, (u64, u64), Vec<LeftOut>),
    at: Instant,
}

struct Work {
    keep: Arc<Keep>,
    snapshot: Arc<Snapshot>,
    /// Names of the networks of each workload of `snapshot`.
    networks: BTreeMap<Workload, BTreeSet<String>>,
    plan: Option<NodePlan>,
    enforcer: Nftables,
    /// What the plan asks for here, now.
    binding: Binding,
    /// The bridges of that, for whoever looks after their switches.
    filtered: watch::Sender<BTreeSet<String>>,
    /// Whether tables of ours were written, by this process or found.
    written: bool,
    /// Who joined before this number was told of.
    joins_told: u64,
    /// Why the kernel does not hold what is wanted.
    failing: Option<String>,
    /// Ports whose MAC address the bridge does not keep there; tried again with every change.
    adrift: BTreeSet<String>,
    /// The plan or the ruleset that is in force could not be written to disk: tried again with every pulse.
    unsaved: bool,
    /// What is in the kernel and not yet on disk: see [`Work::write_what_is_due`].
    due: Vec<held::Due>,
    /// What was denied, and when it was last looked at.
    denied: denied::Account,
    /// The inventory of that look.
    denied_in: Option<Arc<Snapshot>>,
    /// Something was bound that the bridges do not follow yet.
    unsettled: bool,
    /// Containers that are routers.
    forwarding: Forwarding,
    graph: FlowGraph,
    /// Whose edges there is no room for, as far as that was told.
    crowded: BTreeSet<Option<Endpoint>>,
    alarms: Alarms,
    uplink: UplinkHandle,
    orders: Option<tokio::sync::mpsc::Receiver<Order>>,
    /// When to bind again without a reason from outside: a rule ends, or the kernel refused.
    wake: Instant,
    compare_at: Instant,
    /// Generation of the plan that is bound.
    bound: Option<u64>,
    /// The last whole plan was not taken: what has changed of it is none of ours.
    apart: bool,
    /// The plan was taken and what runs here is not known: the controller is answered once it is bound.
    answer_due: bool,
    /// The controller was told that the kernel refuses the plan that was taken.
    told_failing: bool,
    /// Since when living connections are to be judged again: something was taken away.
    owed: Option<Instant>,
    since: Timestamp,
    beat: Timestamp,
    /// When that was, by a clock that nobody sets.
    beaten: Instant,
    counted: (u64, u64, u64),
    reported: Option<Reported>,
    blind: Vec<String>,
    /// What the observer had to switch on again, how often.
    repaired: BTreeMap<String, u64>,
    /// What this kernel has no limits for.
    unconfined: Vec<String>,
    /// Packets with sums yet to be written are kept out.
    sums: bool,
}

impl Work {
    fn start(
        options: &Options,
        begun: (Option<OwnedFd>, Vec<String>, bool),
        keep: Arc<Keep>,
        snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Result<Self, AgentError> {
        let (owning, unconfined, sums) = begun;
        let mut alarms = Alarms::default();
        let now = Timestamp::now();
        let plan = keep::load_plan(keep.dir()).unwrap_or_else(|error| {
            error!(%error, "the stored plan cannot be read");
            alarms.raise(now, error.to_string());
            None
        });
        let mut up = uplink::Options::new(options.controller.clone(), keep.dir().to_owned(), options.node.clone());
        up.controller_uid = options.controller_user.map(|user| user.uid);
        let unsaved = plan.is_some() && !keep.takes_lines(keep::PLAN);
        // One that an agent was killed with before it was bound is sent again, and answered once it is.
        let was_bound = plan.as_ref().filter(|_| keep.copies_agree(keep::PLAN));
        up.applied = was_bound.map(|plan| (plan.store.clone(), plan.generation));
        let Uplink { handle, orders, recovery } = Uplink::start(up)?;
        info!(?recovery, "spool opened");
        if let Some(text) = account::spool(&recovery) {
            alarms.raise(now, text);
        }
        let snapshot = snapshots.borrow().clone();
        Ok(Self {
            keep,
            networks: policy::bind::networks(&snapshot.inventory),
            snapshot,
            plan,
            enforcer: owner::enforcer(owning, options.ownership)?,
            binding: Binding::default(),
            filtered: watch::channel(BTreeSet::new()).0,
            written: false,
            joins_told: 0,
            failing: None,
            adrift: BTreeSet::new(),
            unsaved,
            due: Vec::new(),
            denied: denied::Account::default(),
            denied_in: None,
            unsettled: false,
            forwarding: Forwarding::default(),
            graph: FlowGraph::new(),
            crowded: BTreeSet::new(),
            alarms,
            uplink: handle,
            orders: Some(orders),
            wake: Instant::now() + FULL_COMPARE_EVERY,
            compare_at: Instant::now() + FULL_COMPARE_EVERY,
            bound: None,
            apart: false,
            answer_due: false,
            told_failing: false,
            // What was taken away while nobody looked.
            owed: Some(Instant::now()),
            since: now,
            beat: now,
            beaten: Instant::now(),
            counted: (0, 0, 0),
            reported: None,
            blind: Vec::new(),
            repaired: BTreeMap::new(),
            unconfined,
            sums,
        })
    }

    fn alarm(&mut self, text: String) {
        if self.alarms.raise(Timestamp::now(), text.clone()) {
            error!(alarm = %text, "alarm");
        }
    }

    /// The engine was asked at least once: until then an empty inventory means nothing.
    fn inventory_known(&self) -> bool {
        !self.snapshot.engine.is_empty()
    }

    /// Adds up what the kernel counted, under the names of now.
    fn count_denied(&mut self, now: Timestamp) {
        if !self.written {
            return;
        }
        let counts = match self.enforcer.counts() {
            Ok(counts) => counts,
            Err(error) => return self.alarm(format!("denied packets cannot be counted: {}", chain(&error))),
        };
        // Mostly nothing was denied, and nobody came or went: with a thousand containers to list their ports and to say whose each is
        // takes longer than all else.
        let seen = self.denied_in.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &self.snapshot));
        if seen && !self.denied.is_news(&counts) {
            return;
        }
        let names = match enforce::Links::read() {
            Ok(links) => links.names(),
            Err(error) => {
                self.enforcer.count_again();
                return self.alarm(format!("denied packets cannot be counted: {error}"));
            }
        };
        self.denied_in = Some(Arc::clone(&self.snapshot));
        let (inventory, leases) = (&self.snapshot.inventory, &self.snapshot.leases);
        let name = |spot| denied::name(spot, inventory, leases, &names, now);
        let owners = denied::ports(inventory, &names);
        self.denied.add(&counts, std::time::Instant::now(), name, |spot| denied::behind(spot, inventory), owners);
    }

    fn touched(&mut self, change: std::io::Result<crate::enforce::watch::Change>) {
        match change {
            Ok(change) if change.by == Some(self.enforcer.owner()) => {}
            Ok(crate::enforce::watch::Change { by, process: (pid, program), generation_id }) => {
                info!(?by, pid, program, generation_id, "somebody else changed our tables, or notices were lost");
                self.compare("a change of somebody else's");
            }
            Err(error) => {
                warn!(%error, "a notice of the packet filter was lost");
                self.compare("a lost notice");
            }
        }
    }

    fn saw(&mut self, fact: &Fact) {
        let delta = EdgeDelta::from(fact);
        if self.graph.has_room(&delta) {
            self.graph.add(&delta);
            self.uplink.record(delta);
        } else {
            self.graph.leave_out(&delta);
        }
        if let Fact::Began(flow) = fact {
            let mut flow = flow.clone();
            self.give_reason(&mut flow);
            self.uplink.flow(flow);
        }
    }

    /// The kernel says which side denied; the policy says why.
    fn give_reason(&self, flow: &mut Flow) {
        if !matches!(flow.outcome, FlowOutcome::Denied | FlowOutcome::WouldDeny) || flow.reason == observe::nflog::SPOOFED {
            return;
        }
        let Some(plan) = &self.plan else { return };
        let scene = Scene { set: &plan.set, networks: &self.networks, now: Timestamp::now() };
        let connection = Connection { from: flow.from.clone(), to: flow.to.clone(), service: flow.service, guarded: true };
        let decision = evaluate(&scene, &connection);
        if decision.verdict != policy::Verdict::Allow {
            flow.reason = decision.reason();
        }
    }
}
