//! Both ends of the channel in one process, each of which can be stopped and started again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::session::{Applied, Attachment, Event, Listener, NotStored, Options, Order};
use controller::store::Store;
use jiff::Timestamp;
use node_agent::uplink::{Link, Uplink};
use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, HourSet, NodePlan, PolicySet, Service, Workload};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How long to wait for what comes within a second: the machine may be busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn key(n: u16) -> EdgeKey {
    EdgeKey {
        from: Endpoint::Workload(Workload::new("shop", "web")),
        to: Endpoint::Workload(Workload::new("shop", format!("db{}", n % 7))),
        service: Service::tcp(n),
        direction_known: true,
    }
}

/// One flow on an edge.
pub(crate) fn one(n: u16) -> EdgeDelta {
    let at = Timestamp::from_second(1_790_000_000 + i64::from(n)).unwrap();
    let mut hours = HourSet::default();
    hours.insert(HourSet::hour_of(at));
    EdgeDelta {
        key: key(n),
        seen: Evidence { established: 1, bytes_sent: 10, first: Some(at), last: Some(at), hours, ..Evidence::default() },
    }
}

pub(crate) fn plan(store: &str, generation: u64) -> NodePlan {
    NodePlan { format: policy::plan::PLAN_FORMAT, store: store.to_owned(), generation, set: PolicySet::default().into() }
}

/// A folder that both share.
pub(crate) struct Place {
    pub(crate) dir: Folder,
}

/// Ours, removed at the end; or another process's.
pub(crate) enum Folder {
    Own(tempfile::TempDir),
    Shared(PathBuf),
}

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Shared(path) => path,
        }
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bulkhead-channel-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("agent")).unwrap();
        Self { dir: Folder::Own(dir) }
    }

    /// The folder of another process.
    pub(crate) fn at(path: &Path) -> Self {
        Self { dir: Folder::Shared(path.to_owned()) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("node.sock")
    }

    pub(crate) fn db(&self) -> PathBuf {
        self.dir.path().join("store.db")
    }

    pub(crate) fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub(crate) fn agent(&self) -> Uplink {
        let mut options = node_agent::uplink::Options::new(self.socket(), self.agent_dir(), "node1".to_owned());
        options.every = Duration::from_millis(50);
        options.linger = Duration::from_millis(5);
        Uplink::start(options).unwrap()
    }

    pub(crate) async fn controller(&self) -> Controller {
        self.controller_that(Manner::default()).await
    }

    pub(crate) async fn controller_that(&self, manner: Manner) -> Controller {
        Controller::start(&self.socket(), &self.db(), manner).await
    }
}

/// What the controller does to a batch besides storing it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Manner {
    /// Takes its time for each.
    pub(crate) pause: Duration,
    /// Of the first ones it commits, and then dies before anybody hears of it.
    pub(crate) dies_after_commit: u32,
}

/// Session and store, joined as the hub joins them.
pub(crate) struct Controller {
    pub(crate) store: Store,
    pub(crate) applied: mpsc::UnboundedReceiver<Applied>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Controller {
    pub(crate) async fn start(socket: &Path, db: &Path, manner: Manner) -> Self {
        let store = Store::open(db, Timestamp::now()).await.unwrap();
        let listener = Listener::bind(Options::new(socket.to_owned())).await.unwrap();
        let (events, heard) = mpsc::channel(16);
        let (stop, stopped) = watch::channel(false);
        let (applied_in, applied) = mpsc::unbounded_channel();
        let served = tokio::spawn(async move { listener.serve(events, stopped).await.unwrap() });
        let joined = tokio::spawn(join(store.clone(), heard, applied_in, manner));
        Self { store, applied, stop, tasks: vec![served, joined] }
    }

    /// Ends in order.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.store.close().await;
    }
}

async fn join(store: Store, mut heard: mpsc::Receiver<Event>, applied_in: mpsc::UnboundedSender<Applied>, mut manner: Manner) {
    let mut orders = BTreeMap::new();
    while let Some(event) = heard.recv().await {
        match event {
            Event::Connected { session, greeting, reply } => {
                let (orders_in, orders_out) = mpsc::channel(8);
                orders_in.send(Order::Plan { plan: Arc::new(plan(store.id(), 1)), adopt: false }).await.unwrap();
                orders.insert(session, orders_in);
                let acknowledged = store.acknowledged(&greeting.node, &greeting.spool).await.unwrap();
                let _ = reply.send(Ok(Attachment { store: store.id().to_owned(), acknowledged, orders: orders_out }));
            }
            Event::Batch { batch, reply, .. } => {
                tokio::time::sleep(manner.pause).await;
                let stored = store.apply_batch(&batch).await.map(|_| ()).map_err(|e| NotStored { why: format!("{e:?}") });
                if let Err(e) = &stored {
                    eprintln!("batch {}: {e}", batch.seq);
                }
                if manner.dies_after_commit > 0 {
                    manner.dies_after_commit -= 1;
                    continue;
                }
                let _ = reply.send(stored);
            }
            Event::Applied { applied, .. } => {
                let _ = applied_in.send(applied);
            }
            Event::Gone { session, .. } => {
                orders.remove(&session);
            }
            Event::Flows { .. } | Event::Report { .. } | Event::Whole { .. } | Event::Answer { .. } => {}
        }
    }
}

pub(crate) async fn up(uplink: &Uplink) -> String {
    let mut link = uplink.handle.link();
    let found = tokio::time::timeout(PATIENCE, link.wait_for(|link| matches!(link, Link::Up { .. }))).await;
    match &*found.expect("a session").unwrap() {
        Link::Up { store } => store.clone(),
        Link::Away(why) => panic!("{why}"),
    }
}

/// Waits until the store counts this many flows.
pub(crate) async fn counted(store: &Store, flows: u64) -> u64 {
    let mut found = 0;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        found = store.load_graph().await.unwrap().iter().map(|(_, seen)| seen.established).sum();
        if found >= flows {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    found
}
