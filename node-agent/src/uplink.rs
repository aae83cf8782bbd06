//! The session with the controller: batches up, plans down, a bounded spool while it is away. It carries; what a plan means and
//! whether it may be applied is the agent's business.
//!
//! What is recorded here reaches the controller's store exactly once: see [`Spool`] for why. It survives `kill -9` of either side
//! at any moment, up to a second of counters of edges that are known already.

mod journal;
mod keeper;
mod link;
mod spool;

use crate::chain::chain;
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use policy::plan::PlanChange;
use policy::status::{NodeStatus, Preview};
use policy::{EdgeDelta, Flow, Health, Inventory, NodePlan};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use keeper::{Command, Desk, Keeper};
pub use spool::{Limits, Recovery, Spool, SpoolError};

/// How the uplink works.
#[derive(Clone, Debug)]
pub struct Options {
    /// The controller's socket.
    pub socket: PathBuf,
    /// The user that may serve it, besides root and our own; another one is not spoken to.
    pub controller_uid: Option<u32>,
    /// Directory of the spool; it must exist.
    pub state: PathBuf,
    /// The node's name.
    pub node: String,
    /// Version of the agent, for people.
    pub version: String,
    /// Store and generation of the plan that is applied.
    pub applied: Option<(String, u64)>,
    /// How much may wait on disk.
    pub limits: Limits,
    /// How often counters are written to disk, and sent.
    pub every: Duration,
    /// How long an edge seen for the first time waits for others before it is sent.
    pub linger: Duration,
    /// How many flows wait for people who watch.
    pub flows: usize,
}

impl Options {
    /// The usual: counters each second, new edges within a tenth of one.
    pub fn new(socket: PathBuf, state: PathBuf, node: String) -> Self {
        Self {
            socket,
            controller_uid: None,
            state,
            node,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            applied: None,
            limits: Limits::default(),
            every: Duration::from_secs(1),
            linger: Duration::from_millis(100),
            flows: 4096,
        }
    }
}

/// Something the controller wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Apply this plan, if it may follow the one applied; answer with [`UplinkHandle::applied`].
    Plan {
        /// The plan, readable as a whole.
        plan: Box<NodePlan>,
        /// A person ran `bulkhead adopt`: take plans of this store from now on.
        adopt: bool,
    },
    /// Apply the plan that the one applied becomes by this; answer with [`UplinkHandle::applied`], or [`UplinkHandle::wants_whole`].
    Change(Box<PlanChange>),
    /// Say what this plan would end; answer with [`UplinkHandle::answer`].
    Preview {
        /// Number of the question.
        id: u64,
        /// The plan that would be sent.
        plan: Box<NodePlan>,
    },
}

/// Where the session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// No session: why. What is seen waits in the spool.
    Away(String),
    /// A session with the controller of this store.
    Up {
        /// Id of the store.
        store: String,
    },
}

/// The running uplink.
#[derive(Debug)]
pub struct Uplink {
    /// For everybody who has something to say.
    pub handle: UplinkHandle,
    /// What the controller wants, in order.
    pub orders: mpsc::Receiver<Order>,
    /// What was found in the spool.
    pub recovery: Recovery,
}

/// For everybody who has something to say; clones share it. No call waits for the controller or for the disk.
#[derive(Clone, Debug)]
pub struct UplinkHandle {
    desk: Desk,
    flows: Arc<FlowQueue>,
    report: watch::Sender<Option<Arc<Report>>>,
    said: mpsc::Sender<Said>,
    applied: Arc<Mutex<Option<(String, u64)>>>,
    link: watch::Receiver<Link>,
    trouble: Arc<Mutex<Option<String>>>,
    stop: watch::Sender<bool>,
}

/// What the node says of itself. Kept for the next session: of a thousand containers no copy is made for it.
#[derive(Debug)]
struct Report {
    inventory: Arc<Inventory>,
    /// [`Inventory::forwarders`], which are found out by another than who keeps the inventory.
    forwarders: BTreeSet<String>,
    status: NodeStatus,
}

/// Answers on their way up.
#[derive(Debug)]
enum Said {
    Applied {
        store: String,
        generation: u64,
        outcome: Result<u64, String>,
    },
    /// The plan is to be sent whole.
    Whole,
    Answer {
        id: u64,
        answer: Result<Preview, String>,
    },
}

/// Flows for people who watch: the latest ones.
#[derive(Debug)]
struct FlowQueue {
    waiting: Mutex<VecDeque<Flow>>,
    dropped: AtomicU64,
    room: usize,
    news: Notify,
}

impl FlowQueue {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Flow>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, flow: Flow) {
        let mut waiting = self.waiting();
        if self.room == 0 {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if waiting.len() >= self.room {
            waiting.pop_front();
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        let first = waiting.is_empty();
        waiting.push_back(flow);
        drop(waiting);
        if first {
            self.news.notify_one();
        }
    }

    /// The oldest ones, and how many are gone since the last call.
    fn pull(&self, most: usize) -> (Vec<Flow>, u64) {
        let mut waiting = self.waiting();
        let most = most.min(waiting.len());
        (waiting.drain(..most).collect(), self.dropped.swap(0, Ordering::Relaxed))
    }
}

impl Uplink {
    /// Opens the spool and begins to dial the controller, again and again until [`UplinkHandle::stop`]. Must be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// The spool cannot be opened.
    pub fn start(options: Options) -> Result<Self, SpoolError> {
        let (mut spool, recovery) = Spool::open(&options.state, options.limits)?;
        if recovery.unreadable > 0 {
            // Nobody can say what was in there: at least one record.
            spool.lose(1);
        }
        spool.lose(recovery.skipped.values().sum());
        let (commands, inbox) = std::sync::mpsc::channel();
        let desk = Desk::new(commands, options.limits.edges);
        let news = Arc::new(Notify::new());
        let trouble = Arc::default();
        let keeper =
            Keeper { spool, desk: desk.clone(), commands: inbox, every: options.every, news: news.clone(), trouble: Arc::clone(&trouble) };
        std::thread::Builder::new().name("spool".to_owned()).spawn(move || keeper.run()).map_err(|source| SpoolError::Io {
            what: "start the thread for",
            path: options.state.join("spool"),
            source,
        })?;
        let flows = Arc::new(FlowQueue { waiting: Mutex::default(), dropped: AtomicU64::new(0), room: options.flows, news: Notify::new() });
        let (report, reports) = watch::channel(None);
        let (said, hear) = mpsc::channel(64);
        let (orders_in, orders) = mpsc::channel(64);
        let (link_in, link) = watch::channel(Link::Away("not dialled yet".to_owned()));
        let (stop, stopped) = watch::channel(false);
        let applied = Arc::new(Mutex::new(options.applied.clone()));
        let task = link::Dialler {
            options,
            desk: desk.clone(),
            news,
            flows: Arc::clone(&flows),
            reports,
            said: hear,
            orders: orders_in,
            applied: Arc::clone(&applied),
            link: link_in,
            stopped,
        };
        tokio::spawn(task.run());
        Ok(Self { handle: UplinkHandle { desk, flows, report, said, applied, link, trouble, stop }, orders, recovery })
    }
}

impl UplinkHandle {
    /// What was seen of an edge. On disk within a moment if the edge is new, within [`Options::every`] otherwise.
    pub fn record(&self, delta: EdgeDelta) {
        self.desk.record(delta);
    }

    /// How well the node saw during a stretch of time. Stretches follow each other; a gap is time that was not observed.
    pub fn health(&self, stretch: Health) {
        self.desk.health(stretch);
    }

    /// A flow for people who watch; the oldest one that waits is dropped, and counted, where nobody keeps up.
    pub fn flow(&self, flow: Flow) {
        self.flows.push(flow);
    }

    /// The node as it is now, with those who were seen to forward; replaces the report before.
    pub fn report(&self, inventory: Arc<Inventory>, forwarders: BTreeSet<String>, status: NodeStatus) {
        self.report.send_replace(Some(Arc::new(Report { inventory, forwarders, status })));
    }

    /// What became of a plan: the number of established connections ended, or why it was not applied.
    pub fn applied(&self, store: &str, generation: u64, outcome: Result<u64, String>) {
        if outcome.is_ok() {
            *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = Some((store.to_owned(), generation));
        }
        // Full only while no session reads it; then the next greeting says what is applied, and the plan is sent again.
        let _ = self.said.try_send(Said::Applied { store: store.to_owned(), generation, outcome });
    }

    /// A change that doesn't fit the plan here: the plan is to be sent whole.
    pub fn wants_whole(&self) {
        let _ = self.said.try_send(Said::Whole);
    }

    /// Answers a question.
    pub fn answer(&self, id: u64, answer: Result<Preview, String>) {
        let _ = self.said.try_send(Said::Answer { id, answer });
    }

    /// Where the session stands, now and later.
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// Why the spool cannot be written right now; `None`: it can.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when everything recorded so far is in the spool: from then on `kill -9` does not lose it.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.desk.send(Command::Flush(done)) {
            let _ = wait.await;
        }
    }

    /// Ends the session, writes everything to the spool, and ends. What is recorded afterwards is gone.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let (done, wait) = oneshot::channel();
        if self.desk.send(Command::Stop(done)) {
            let _ = wait.await;
        }
    }
}

/// See [`crate::fuzzing`].
#[cfg(any(fuzzing, test))]
pub(crate) use spool::read_any;
