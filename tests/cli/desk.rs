//! A controller, one node's uplink, and a person at the command line.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use node_agent::uplink::{Link, Options, Order, Uplink, UplinkHandle};
use policy::evidence::Road;
use policy::inventory::{Container, Inventory, Leg, Network, Published};
use policy::status::{NetworkState, NetworkStatus, NodeStatus, Preview};
use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, Flow, FlowOutcome, HourSet, NodePlan, Protocol, Service, Tuple, Workload};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// What a command did.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// The output, of a command that must succeed.
    #[track_caller]
    pub(crate) fn done(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self.out
    }

    /// The error text, of a command that must fail with this code.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.out, self.err);
        self.err
    }

    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.done()).unwrap()
    }
}

/// Everything, in a folder of its own.
pub(crate) struct Desk {
    pub(crate) dir: TempDir,
    controller: Option<Child>,
}

impl Desk {
    /// A controller that answers.
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("bulkhead-cli-{}-", std::process::id())).tempdir().unwrap();
        let mut desk = Self { dir, controller: None };
        desk.start();
        desk
    }

    /// A controller with flags of its own.
    pub(crate) fn started(flags: &[&str]) -> Self {
        let mut desk = Self::empty();
        desk.start_with(flags);
        desk
    }

    /// A folder and nobody in it.
    pub(crate) fn empty() -> Self {
        let dir = tempfile::Builder::new().prefix(&format!("bulkhead-cli-{}-", std::process::id())).tempdir().unwrap();
        Self { dir, controller: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(lab::host::binary("bulkhead"));
        command.env("BULKHEAD_STATE_DIR", self.path("state")).env("BULKHEAD_RUN_DIR", self.path("run"));
        command
            .env("XDG_STATE_HOME", self.path("xdg"))
            .env_remove("SUDO_USER")
            .env_remove("VISUAL")
            .env_remove("EDITOR")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn start(&mut self) {
        self.start_with(&[]);
    }

    fn start_with(&mut self, flags: &[&str]) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = self.command();
        command.args(["controller", "--agent-uid", &Uid::effective().to_string()]).stderr(log).stdout(Stdio::null());
        let mut child = command.args(flags).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(self.path("run/api.sock")).is_err() {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < end, "the controller ended: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.controller = Some(child);
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Ends the controller with a signal; its exit code, or `None` if the signal killed it.
    pub(crate) fn end(&mut self, signal: Signal) -> Option<i32> {
        let mut child = self.controller.take().unwrap();
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        child.wait().unwrap().code()
    }

    pub(crate) fn run(&self, words: &str) -> Ran {
        self.args(&words.split_whitespace().collect::<Vec<_>>())
    }

    pub(crate) fn args(&self, args: &[&str]) -> Ran {
        ran(self.command().args(args))
    }

    /// Waits until a command's output as JSON is as wanted.
    #[track_caller]
    pub(crate) fn until(&self, words: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let value = self.run(words).json();
            if wanted(&value) {
                return value;
            }
            assert!(Instant::now() < end, "{words} stays {value:#}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Reads and approves, as a person would.
    #[track_caller]
    pub(crate) fn approve(&self, workload: &str) -> String {
        self.args(&["describe", "suggestion", workload]).done();
        self.args(&["approve", workload]).done()
    }

    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

pub(crate) fn ran(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Some(mut child) = self.controller.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the controller said:\n{}", self.log());
        }
    }
}

/// One node's agent, as far as the controller can tell.
pub(crate) struct Node {
    runtime: Runtime,
    pub(crate) handle: UplinkHandle,
    /// Plans that came, in order, with whether a person adopted.
    pub(crate) plans: Arc<Mutex<Vec<(NodePlan, bool)>>>,
    /// How many of them came whole.
    pub(crate) whole: Arc<AtomicUsize>,
    /// What it answers to a preview.
    pub(crate) preview: Arc<Mutex<Preview>>,
    pub(crate) inventory: Inventory,
    pub(crate) status: NodeStatus,
}

impl Node {
    /// An agent with the shop on it, connected and reported.
    pub(crate) fn with_shop(desk: &Desk) -> Self {
        let mut node = Self::connect(desk, "node1", shop());
        node.status = status();
        node.report();
        desk.until("get workloads -o json", |found| found.as_array().unwrap().len() == node.inventory.containers.len());
        node
    }

    pub(crate) fn connect(desk: &Desk, name: &str, inventory: Inventory) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = desk.path(&format!("agent-{name}"));
        std::fs::create_dir_all(&state).unwrap();
        let mut options = Options::new(desk.path("run/node.sock"), state, name.to_owned());
        options.every = Duration::from_millis(50);
        options.linger = Duration::from_millis(5);
        let entered = runtime.enter();
        let uplink = Uplink::start(options).unwrap();
        drop(entered);
        let Uplink { handle, mut orders, .. } = uplink;
        let (plans, preview) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Preview::default())));
        let whole: Arc<AtomicUsize> = Arc::default();
        let counted = Arc::clone(&whole);
        let (answerer, told, says) = (handle.clone(), Arc::clone(&plans), Arc::clone(&preview));
        runtime.spawn(async move {
            while let Some(order) = orders.recv().await {
                match order {
                    Order::Plan { plan, adopt } => {
                        counted.fetch_add(1, Ordering::Relaxed);
                        let (store, generation) = (plan.store.clone(), plan.generation);
                        told.lock().unwrap().push((*plan, adopt));
                        answerer.applied(&store, generation, Ok(0));
                    }
                    Order::Change(change) => {
                        let changed = change.onto(told.lock().unwrap().last().map(|(plan, _)| plan)).expect("it has the plan before");
                        let (store, generation) = (changed.store.clone(), changed.generation);
                        told.lock().unwrap().push((changed, false));
                        answerer.applied(&store, generation, Ok(0));
                    }
                    Order::Preview { id, .. } => {
                        let answer = says.lock().unwrap().clone();
                        answerer.answer(id, Ok(answer));
                    }
                }
            }
        });
        let link = handle.link();
        eventually(Duration::from_secs(60), || matches!(*link.borrow(), Link::Up { .. }));
        Self { runtime, handle, plans, whole, preview, inventory, status: NodeStatus::default() }
    }

    pub(crate) fn report(&self) {
        self.handle.report(self.inventory.clone().into(), BTreeSet::new(), self.status.clone());
    }

    /// Records what was seen, and waits until the controller has it.
    #[track_caller]
    pub(crate) fn saw(&self, desk: &Desk, edges: &[EdgeDelta]) {
        let total = |view: &Value| -> u64 {
            let counts = ["established", "connectedNoData", "oneWay", "unanswered", "refused", "denied", "wouldDeny"];
            let edges = view["edges"].as_array().unwrap();
            edges.iter().flat_map(|edge| counts.map(|count| edge["evidence"][count].as_u64().unwrap_or(0))).sum()
        };
        let count = |edge: &EdgeDelta| edge.seen.used() + edge.seen.attempts() + edge.seen.denied + edge.seen.would_deny;
        let wanted = total(&desk.run("graph -o json").json()) + edges.iter().map(count).sum::<u64>();
        edges.iter().for_each(|edge| self.handle.record(edge.clone()));
        desk.until("graph -o json", |view| total(view) == wanted);
    }

    pub(crate) fn generations(&self) -> Vec<u64> {
        self.plans.lock().unwrap().iter().map(|(plan, _)| plan.generation).collect()
    }

    /// The last plan, once it is of this generation.
    #[track_caller]
    pub(crate) fn plan(&self, generation: u64) -> NodePlan {
        eventually(Duration::from_secs(60), || self.generations().last() == Some(&generation));
        self.plans.lock().unwrap().last().unwrap().0.clone()
    }

    pub(crate) fn stop(self) {
        self.runtime.block_on(self.handle.stop());
    }
}

pub(crate) fn end(text: &str) -> Endpoint {
    text.parse().unwrap()
}

/// So many established flows now.
pub(crate) fn edge(from: &str, to: &str, service: &str, flows: u64) -> EdgeDelta {
    edge_at(from, to, service, flows, Timestamp::now())
}

pub(crate) fn edge_at(from: &str, to: &str, service: &str, flows: u64, at: Timestamp) -> EdgeDelta {
    let key = EdgeKey { from: end(from), to: end(to), service: service.parse().unwrap(), direction_known: true };
    let mut hours = HourSet::default();
    hours.insert(HourSet::hour_of(at));
    let seen = Evidence {
        established: flows,
        bytes_sent: 100 * flows,
        bytes_received: 1000 * flows,
        first: Some(at),
        last: Some(at),
        hours,
        roads: [Road::Direct].into(),
        ..Evidence::default()
    };
    EdgeDelta { key, seen }
}

/// The id of a proposed rule by its peer and ports.
pub(crate) fn rule_id(desk: &Desk, workload: &str, peer: &str, port: &str) -> String {
    let suggestion = desk.run(&format!("describe suggestion {workload} -o json")).json();
    let rules = suggestion["rules"].as_array().unwrap();
    let rule = rules.iter().find(|rule| rule["rule"]["peer"] == peer && rule["rule"]["ports"] == port);
    rule.unwrap_or_else(|| panic!("no {peer} {port} in {suggestion:#}"))["id"].as_str().unwrap().to_owned()
}

/// Flows that were denied, or would have been.
pub(crate) fn denied(from: &str, to: &str, service: &str, would: bool, flows: u64) -> EdgeDelta {
    let mut delta = edge(from, to, service, flows);
    delta.seen = Evidence { first: delta.seen.first, last: delta.seen.last, ..Evidence::default() };
    if would {
        delta.seen.would_deny = flows
    } else {
        delta.seen.denied = flows
    }
    delta
}

pub(crate) fn flow(from: &str, to: &str, service: &str, outcome: FlowOutcome) -> Flow {
    let service: Service = service.parse().unwrap();
    Flow {
        time: Timestamp::now(),
        from: end(from),
        to: end(to),
        service,
        outcome,
        road: Road::Direct,
        direction_known: true,
        pre_existing: false,
        bytes_sent: 10,
        bytes_received: 20,
        tuple: Tuple {
            source: "10.9.0.2".parse().unwrap(),
            destination: "10.9.0.3".parse().unwrap(),
            protocol: service.protocol,
            source_port: 40000,
            destination_port: service.port,
        },
        reason: String::new(),
    }
}

fn network(name: &str, internal: bool) -> Network {
    Network {
        id: format!("id-{name}"),
        name: name.to_owned(),
        project: Some("shop".to_owned()),
        driver: "bridge".to_owned(),
        bridge: Some(format!("br-{name}")),
        subnets: vec!["10.9.0.0/24".parse().unwrap()],
        internal,
        unmanaged: BTreeSet::new(),
    }
}

pub(crate) fn container(workload: &str, number: u8, networks: &[&str]) -> Container {
    let workload: Workload = workload.parse().unwrap();
    let leg = |name: &&str| Leg {
        network: format!("id-{name}"),
        bridge: format!("br-{name}"),
        port: Some(format!("veth{number}")),
        mac: [2, 0, 0, 0, 0, number],
        addresses: [format!("10.9.0.{number}").parse().unwrap()].into(),
    };
    Container {
        id: format!("{number:064x}"),
        name: format!("{}-{}-1", workload.namespace(), workload.name()),
        workload,
        one_off: false,
        engine_named: false,
        image: "image:1".to_owned(),
        labels: BTreeMap::new(),
        pid: None,
        elsewhere: Vec::new(),
        legs: networks.iter().map(leg).collect(),
        published: Vec::new(),
        resolvers: Vec::new(),
        members: Vec::new(),
        unmanaged: BTreeSet::new(),
        raw: false,
    }
}

/// web (published 8080 -> 80) and worker in front, db behind, on two networks; `front` and `back` share web.
pub(crate) fn shop() -> Inventory {
    let mut web = container("shop/web", 2, &["shop_front", "shop_back"]);
    web.published.push(Published { address: "0.0.0.0".parse().unwrap(), port: 8080, protocol: Protocol::Tcp, container_port: 80 });
    let all = [web, container("shop/db", 3, &["shop_back"]), container("shop/worker", 4, &["shop_front"])];
    Inventory {
        networks: [network("shop_front", false), network("shop_back", true)].into_iter().map(|n| (n.id.clone(), n)).collect(),
        containers: all.into_iter().map(|c| (c.id.clone(), c)).collect(),
        host: ["10.9.0.1".parse().unwrap()].into(),
        userland_proxy: true,
        strangers: BTreeMap::new(),
        bridges: BTreeMap::new(),
        forwarders: BTreeSet::new(),
    }
}

pub(crate) fn status() -> NodeStatus {
    let network = |name: &str, state| NetworkStatus { name: name.to_owned(), bridge: Some(format!("br-{name}")), state };
    NodeStatus {
        version: "0.1.0".to_owned(),
        since: Some(Timestamp::now()),
        networks: vec![network("shop_front", NetworkState::Observed), network("shop_back", NetworkState::Observed)],
        ..NodeStatus::default()
    }
}

/// What the sample traffic is: every workload has some.
pub(crate) fn usual() -> Vec<EdgeDelta> {
    vec![
        edge("shop/web", "shop/db", "tcp/5432", 412),
        edge("outside:192.0.2.7", "shop/web", "tcp/80", 9),
        edge("shop/worker", "shop/web", "tcp/80", 30),
    ]
}

pub(crate) fn find<'a>(list: &'a Value, key: &str, value: &str) -> &'a Value {
    list.as_array().unwrap().iter().find(|item| item[key] == value).unwrap_or_else(|| panic!("no {key} {value} in {list:#}"))
}

/// Waits until something is so.
#[track_caller]
pub(crate) fn eventually(deadline: Duration, so: impl Fn() -> bool) {
    let end = Instant::now() + deadline;
    while !so() {
        assert!(Instant::now() < end, "not within {deadline:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn exists(path: &Path) -> bool {
    path.exists()
}
