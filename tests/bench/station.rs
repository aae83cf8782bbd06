//! The agent's own program on a host of ours, with an engine in words, and a controller's session and store in this process.

use std::collections::HashMap;
use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use controller::session::{Attachment, Event, Listener, NotStored, Options, Order};
use controller::store::Store;
use lab::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use policy::{EdgeKey, NodePlan, PolicySet};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use crate::told::Told;

const PATIENCE: Duration = Duration::from_secs(60);

/// What the controller's side has heard.
#[derive(Default)]
struct Heard {
    /// When each edge was in the store for the first time.
    stored: HashMap<EdgeKey, SystemTime>,
    containers: usize,
    /// Generation of the plan that is applied.
    applied: u64,
    orders: Option<mpsc::Sender<Order>>,
}

/// All of it; ends with this value.
pub(crate) struct Station {
    pub(crate) engine: Told,
    agent: Child,
    heard: Arc<Mutex<Heard>>,
    store: String,
    _stop: watch::Sender<bool>,
    runtime: Option<Runtime>,
    dir: TempDir,
}

impl Station {
    /// Starts all with the containers that the engine is filled with; ready when the agent has told of so many.
    pub(crate) fn start(host: &Netns, bridge: &str, subnet: &str, fill: impl FnOnce(&Told) -> usize) -> Self {
        let dir = tempfile::Builder::new().prefix("bulkhead-bench-").tempdir().expect("room for a folder");
        let engine = Told::start(dir.path(), bridge, subnet);
        let containers = fill(&engine);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (stop, stopped) = watch::channel(false);
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let its = Arc::clone(&heard);
        let store = runtime.block_on(async {
            let store = Store::open(&dir.path().join("store.db"), jiff::Timestamp::now()).await.expect("a store");
            let listener = Listener::bind(Options::new(dir.path().join("node.sock"))).await.expect("a socket");
            let (events, came) = mpsc::channel(16);
            tokio::spawn(async move { listener.serve(events, stopped).await });
            let id = store.id().to_owned();
            tokio::spawn(hear(store, came, its));
            id
        });
        let mut command = Command::new(lab::host::binary("bulkhead-agent"));
        let place = |name: &str| dir.path().join(name);
        command.arg("run").arg("--state-dir").arg(place("agent")).arg("--controller").arg(place("node.sock"));
        command.arg("--docker-host").arg(format!("unix://{}", engine.socket.display())).args(["--node", "bench"]);
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(place("log")).expect("room for a file"));
        let agent = host.run(|| command.spawn()).expect("a program");
        let mut station = Self { engine, agent, heard, store, _stop: stop, runtime: Some(runtime), dir };
        station.until("the agent knows its containers", |heard| heard.containers == containers);
        station
    }

    fn until(&mut self, what: &str, reached: impl Fn(&Heard) -> bool) {
        let begun = Instant::now();
        while !reached(&self.heard.lock().unwrap()) {
            let ended = self.agent.try_wait().expect("a child");
            let said = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(ended.is_none() && begun.elapsed() < PATIENCE, "not reached: {what}; the agent said:\n{}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The agent's process.
    pub(crate) fn pid(&self) -> u32 {
        self.agent.id()
    }

    /// Waits until the agent has told of so many containers.
    pub(crate) fn knows(&mut self, containers: usize) {
        self.until("the agent knows its containers", |heard| heard.containers == containers);
    }

    /// Sends the plan with this generation; how long until it was applied and read back.
    pub(crate) fn plan(&mut self, generation: u64, set: PolicySet) -> Duration {
        let plan = NodePlan { format: policy::plan::PLAN_FORMAT, store: self.store.clone(), generation, set: set.into() };
        let orders = self.heard.lock().unwrap().orders.clone().expect("a session");
        let begun = Instant::now();
        orders.blocking_send(Order::Plan { plan: Arc::new(plan), adopt: false }).expect("a session");
        self.until("the plan is applied", |heard| heard.applied == generation);
        begun.elapsed()
    }

    /// When each edge was in the store for the first time, as far as it is by now.
    pub(crate) fn stored(&self) -> HashMap<EdgeKey, SystemTime> {
        self.heard.lock().unwrap().stored.clone()
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.agent.id().cast_signed()), Signal::SIGTERM);
        let _ = self.agent.wait();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn hear(store: Store, mut events: mpsc::Receiver<Event>, heard: Arc<Mutex<Heard>>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Connected { greeting, reply, .. } => {
                let (orders, taken) = mpsc::channel(8);
                let acknowledged = store.acknowledged(&greeting.node, &greeting.spool).await.expect("a store");
                heard.lock().unwrap().orders = Some(orders);
                let _ = reply.send(Ok(Attachment { store: store.id().to_owned(), acknowledged, orders: taken }));
            }
            Event::Batch { batch, reply, .. } => {
                let stored = store.apply_batch(&batch).await;
                let now = SystemTime::now();
                let mut heard = heard.lock().unwrap();
                for edge in batch.edges {
                    heard.stored.entry(edge.key).or_insert(now);
                }
                let _ = reply.send(stored.map(|_| ()).map_err(|error| NotStored { why: format!("{error:?}") }));
            }
            Event::Report { report, .. } => heard.lock().unwrap().containers = report.inventory.containers.len(),
            Event::Applied { applied, .. } if applied.refused.is_none() => heard.lock().unwrap().applied = applied.generation,
            Event::Applied { applied, .. } => eprintln!("plan refused: {:?}", applied.refused),
            Event::Flows { .. } | Event::Whole { .. } | Event::Answer { .. } | Event::Gone { .. } => {}
        }
    }
}
