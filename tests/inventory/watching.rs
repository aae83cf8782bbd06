//! An inventory that runs in an engine's namespace, and questions to it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use lab::engine::{Kind, Options};
use lab::{Engine, eventually};
use node_agent::inventory::{self, Snapshot};
use policy::inventory::Container;
use tokio::sync::{oneshot, watch};

/// Long enough for a container to start while two cores do nine other things.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// The engines that every test of this suite runs on.
pub(crate) fn kinds() -> Vec<Kind> {
    Kind::present().into_iter().filter(|kind| matches!(kind, Kind::Debian | Kind::Current)).collect()
}

/// Starts one engine with an image `bb` (busybox).
pub(crate) fn engine(kind: Kind, options: Options) -> Engine {
    let engine = Engine::start(Options { kind: Some(kind), ..options }).unwrap_or_else(|reason| panic!("{reason}"));
    engine.import_busybox("bb");
    engine
}

/// Runs a story on every engine that is here, or skips aloud.
#[macro_export]
macro_rules! on_every_engine {
    ($story:expr) => {{
        lab::needs_root!();
        let kinds = $crate::watching::kinds();
        if kinds.is_empty() {
            lab::skip!("needs a Docker Engine: run tests/setup/engine");
        }
        for kind in kinds {
            eprintln!("on {kind:?}");
            let engine = $crate::watching::engine(kind, lab::engine::Options::default());
            $story(engine);
        }
    }};
}

/// An inventory that is kept current on a thread of its own, inside the engine's namespace.
pub(crate) struct Watching {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watching {
    /// Starts one and waits until it has seen everything.
    pub(crate) fn start(engine: &Engine) -> Self {
        let this = Self::start_at(engine, engine.socket());
        this.until("the first listing", |now| now.blind.is_empty().then_some(()));
        this
    }

    /// Starts one that asks at this socket.
    pub(crate) fn start_at(engine: &Engine, socket: std::path::PathBuf) -> Self {
        let (give, take) = mpsc::channel();
        let (end, ended) = oneshot::channel();
        let namespace = engine.netns.path().to_owned();
        let options = inventory::Options { socket, engine_sockets: vec![engine.socket()] };
        let thread = thread::spawn(move || {
            let file = std::fs::File::open(&namespace).expect("the engine's namespace");
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).expect("entering it");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let (snapshots, task) = inventory::start(options).await.expect("the inventory starts");
                give.send(snapshots).expect("the test waits");
                let _ = ended.await;
                task.abort();
            });
        });
        let snapshots = take.recv().expect("the inventory starts");
        Self { snapshots, end: Some(end), thread: Some(thread) }
    }

    pub(crate) fn now(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Waits until the snapshot gives an answer.
    pub(crate) fn until<T>(&self, what: &str, mut answer: impl FnMut(&Snapshot) -> Option<T>) -> T {
        eventually(SOON, || {
            let now = self.now();
            answer(&now).ok_or_else(|| {
                let containers: Vec<&Container> = now.inventory.containers.values().collect();
                format!("{what}: blind {:?}, notes {:?}, {containers:#?}", now.blind, now.notes)
            })
        })
    }

    /// The container of this name, once it runs with a port on each of its bridges.
    pub(crate) fn settled(&self, name: &str) -> Container {
        self.until(name, |now| {
            let container = named(now, name)?;
            (container.pid.is_some() && container.legs.iter().all(|leg| leg.port.is_some())).then(|| container.clone())
        })
    }

    /// Waits until no container has this name.
    pub(crate) fn gone(&self, name: &str) {
        self.until(&format!("{name} to be gone"), |now| named(now, name).is_none().then_some(()));
    }

    /// The name of whoever held an address at a moment, by the containers' names at that time.
    pub(crate) fn holder(&self, bridge: &str, address: IpAddr, at: Timestamp) -> Option<String> {
        self.now().leases.find(Some(bridge), address, at).map(|lease| lease.endpoint.to_string())
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn named<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a Container> {
    snapshot.inventory.containers.values().find(|container| container.name == name)
}

/// The IPv4 address of a container on a bridge.
pub(crate) fn v4(container: &Container, bridge: &str) -> IpAddr {
    let leg = container.legs.iter().find(|leg| leg.bridge == bridge).unwrap_or_else(|| panic!("no leg on {bridge}: {container:#?}"));
    *leg.addresses.iter().find(|address| address.is_ipv4()).expect("an IPv4 address")
}

/// Interfaces of the engine's namespace that are ports of a bridge, with the peer's MAC, read the long way: by entering the
/// container's namespace.
pub(crate) fn mac_inside(engine: &Engine, container: &str, interface: &str) -> String {
    let out = engine.exec(container, ["cat", &format!("/sys/class/net/{interface}/address")]);
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// Peer index of each port, as the container sees its own (`iflink`): the other end's index on the host.
pub(crate) fn host_end(engine: &Engine, container: &str, interface: &str) -> String {
    let out = engine.exec(container, ["cat", &format!("/sys/class/net/{interface}/iflink")]);
    let index = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    let links: BTreeMap<String, String> = engine
        .netns
        .ip("-o link show")
        .lines()
        .filter_map(|line| {
            let (index, rest) = line.split_once(": ")?;
            Some((index.to_owned(), rest.split(['@', ':']).next()?.to_owned()))
        })
        .collect();
    links[&index].clone()
}
