//! A node under observation: a namespace that plays the host, an inventory that says who lives where, and the graph that comes of
//! it. The inventory is written by the test, since no engine runs here: it can be late, or lie.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lab::{Bridge, Member, Netns};
use node_agent::inventory::Snapshot;
use node_agent::observe::{Account, Observer, Options};
use policy::attribute::Fact;
use policy::inventory::{Container, Inventory, Leg, Network, Published};
use policy::{EdgeDelta, Evidence, FlowGraph, Workload};
use tokio::sync::{mpsc, watch};

/// What a test tells the observer of the node.
pub(crate) struct Node {
    pub(crate) snapshot: Snapshot,
}

impl Node {
    /// A host with these bridges and nobody on them.
    pub(crate) fn with(bridges: &[&Bridge<'_>]) -> Self {
        let network = |bridge: &&Bridge<'_>| {
            let network = Network {
                id: bridge.name.clone(),
                name: bridge.name.clone(),
                project: None,
                driver: "bridge".to_owned(),
                bridge: Some(bridge.name.clone()),
                subnets: vec![bridge.v4.into(), bridge.v6.into()],
                internal: false,
                unmanaged: BTreeSet::new(),
            };
            (bridge.name.clone(), network)
        };
        let host = bridges.iter().flat_map(|bridge| [bridge.gateway_v4().into(), bridge.gateway_v6().into()]).collect();
        let inventory = Inventory { networks: bridges.iter().map(network).collect(), host, ..Inventory::default() };
        Self { snapshot: Snapshot { inventory: inventory.into(), engine: "told by the test".to_owned(), ..Snapshot::default() } }
    }

    /// Some more addresses of the host.
    pub(crate) fn host(mut self, addresses: &[&str]) -> Self {
        std::sync::Arc::make_mut(&mut self.snapshot.inventory)
            .host
            .extend(addresses.iter().map(|address| address.parse::<IpAddr>().unwrap()));
        self
    }

    /// A container of this workload lives in this namespace, from now on.
    pub(crate) fn runs(self, workload: &str, bridge: &Bridge<'_>, member: &Member) -> Self {
        self.container(workload, bridge, member, |_| {})
    }

    /// The same, with something changed.
    pub(crate) fn container(mut self, workload: &str, bridge: &Bridge<'_>, member: &Member, change: impl FnOnce(&mut Container)) -> Self {
        let workload: Workload = workload.parse().unwrap();
        let id = format!("{workload}@{}", member.v4);
        let leg = Leg {
            network: bridge.name.clone(),
            bridge: bridge.name.clone(),
            port: Some(member.port.clone()),
            mac: member.mac,
            addresses: member.addresses().into(),
        };
        let mut container = Container {
            id: id.clone(),
            name: id.clone(),
            workload,
            one_off: false,
            engine_named: false,
            image: String::new(),
            labels: BTreeMap::new(),
            pid: None,
            legs: vec![leg],
            elsewhere: Vec::new(),
            published: Vec::new(),
            resolvers: Vec::new(),
            members: Vec::new(),
            unmanaged: BTreeSet::new(),
            raw: false,
        };
        change(&mut container);
        std::sync::Arc::make_mut(&mut self.snapshot.inventory).containers.insert(id, container);
        self.at(Timestamp::now())
    }

    /// No container of this workload runs any more.
    pub(crate) fn stops(mut self, workload: &str) -> Self {
        let workload: Workload = workload.parse().unwrap();
        std::sync::Arc::make_mut(&mut self.snapshot.inventory).containers.retain(|_, container| container.workload != workload);
        self.at(Timestamp::now())
    }

    fn at(mut self, when: Timestamp) -> Self {
        self.snapshot.leases.update(&self.snapshot.inventory, when);
        self
    }

    /// Starts to observe in this host.
    pub(crate) fn observe(self, host: &Netns) -> Watching {
        self.observe_with(host, Options::default())
    }

    /// Starts to observe with other options.
    pub(crate) fn observe_with(self, host: &Netns, options: Options) -> Watching {
        let known = self.snapshot.clone();
        self.observe_knowing(known, host, options)
    }

    /// Starts to observe before the engine has answered: nothing of this is known until [`Watching::now`].
    pub(crate) fn observe_without_engine(self, host: &Netns) -> Watching {
        self.observe_knowing(Snapshot::default(), host, Options::default())
    }

    fn observe_knowing(self, known: Snapshot, host: &Netns, options: Options) -> Watching {
        let (snapshots, receiver) = watch::channel(Arc::new(known));
        let (facts, observer) = host.run(|| Observer::start(options, receiver)).unwrap_or_else(|e| panic!("the observer starts: {e:?}"));
        Watching { node: Some(self), snapshots, facts, observer: Some(observer), graph: FlowGraph::default(), flows: Vec::new() }
    }
}

/// All addresses of the port, for a published port.
pub(crate) fn published(port: u16, container_port: u16) -> [Published; 2] {
    ["0.0.0.0", "::"].map(|any| Published { address: any.parse().unwrap(), port, protocol: policy::service::Protocol::Tcp, container_port })
}

/// A running observation and what came of it so far.
pub(crate) struct Watching {
    node: Option<Node>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    facts: mpsc::Receiver<Vec<Fact>>,
    observer: Option<Observer>,
    pub(crate) graph: FlowGraph,
    pub(crate) flows: Vec<policy::Flow>,
}

impl Watching {
    /// Tells the observer that the node has changed.
    pub(crate) fn now(&mut self, change: impl FnOnce(Node) -> Node) {
        let node = change(self.node.take().unwrap());
        self.snapshots.send_replace(Arc::new(node.snapshot.clone()));
        self.node = Some(node);
    }

    /// What the observer says of itself. What has come is taken in first: whoever waits for an account must not be what it waits for.
    pub(crate) fn account(&mut self) -> Account {
        self.read();
        self.observer.as_ref().unwrap().account()
    }

    /// Takes in what has come.
    pub(crate) fn read(&mut self) {
        for fact in std::iter::from_fn(|| self.facts.try_recv().ok()).flatten() {
            self.graph.add(&EdgeDelta::from(&fact));
            if let Fact::Began(flow) = fact {
                self.flows.push(flow);
            }
        }
    }

    /// Reads until the edge is there with evidence that satisfies; fails after 40 seconds with all that was seen.
    pub(crate) fn until(&mut self, edge: &str, satisfied: impl Fn(&Evidence) -> bool) -> Evidence {
        self.within(Duration::from_secs(40), edge, satisfied)
    }

    /// The same with another deadline.
    pub(crate) fn within(&mut self, deadline: Duration, edge: &str, satisfied: impl Fn(&Evidence) -> bool) -> Evidence {
        let end = Instant::now() + deadline;
        loop {
            self.read();
            if let Some(evidence) = self.evidence(edge).filter(|evidence| satisfied(evidence)) {
                return evidence;
            }
            assert!(Instant::now() < end, "not within {deadline:?}: {edge}\n{}\n{:#?}", self.text(), self.account());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn evidence(&self, edge: &str) -> Option<Evidence> {
        self.graph.iter().find(|(key, _)| key.to_string() == edge).map(|(_, evidence)| evidence.clone())
    }

    /// Waits until whatever has happened must have been reported, and reads it.
    pub(crate) fn settle(&mut self) {
        std::thread::sleep(Duration::from_millis(2500));
        self.read();
    }

    /// The edges in use, one a line: nothing else may have been learned.
    pub(crate) fn used(&self) -> Vec<String> {
        self.graph.iter().filter(|(_, evidence)| evidence.used() > 0).map(|(key, _)| key.to_string()).collect()
    }

    /// Everything seen, for a person who reads why a test failed.
    pub(crate) fn text(&self) -> String {
        let flow = |flow: &policy::Flow| format!("{} -> {} {} {} ({})\n", flow.from, flow.to, flow.service, flow.outcome, flow.tuple);
        let edges = self.graph.iter().map(|(key, evidence)| format!("{key}: {evidence:?}\n"));
        edges.chain(self.flows.iter().map(flow)).collect()
    }

    /// Ends as an agent does: the switches stay on.
    pub(crate) fn leave(&mut self) {
        if let Some(observer) = self.observer.take() {
            observer.leave();
        }
    }

    /// Stops, and reads what still came.
    pub(crate) fn stop(&mut self) {
        if let Some(observer) = self.observer.take() {
            observer.stop();
        }
        self.read();
    }
}
