use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::*;
use crate::inventory::{Attachment, Container, Inventory, Leg, Network, Published};
use crate::lease::LeaseBook;
use crate::service::{Protocol, Service};
use crate::track::Place;
use crate::workload::{Endpoint, Workload};
use crate::{EdgeDelta, FlowGraph, Tuple};

const BRIDGE: u32 = 5;
const OTHER: u32 = 6;
const UPLINK: u32 = 7;

fn at(millisecond: i64) -> Timestamp {
    Timestamp::from_millisecond(1_000_000_000 + millisecond).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn container(name: &str, bridge: &str, address: &str) -> Container {
    let leg = Leg { network: bridge.to_owned(), bridge: bridge.to_owned(), port: None, mac: [2; 6], addresses: [ip(address)].into() };
    Container {
        id: name.to_owned(),
        name: name.to_owned(),
        workload: Workload::new("", name),
        one_off: false,
        engine_named: false,
        image: String::new(),
        labels: BTreeMap::new(),
        pid: Some(1),
        legs: vec![leg],
        elsewhere: Vec::new(),
        published: Vec::new(),
        resolvers: Vec::new(),
        members: Vec::new(),
        unmanaged: BTreeSet::new(),
        raw: false,
    }
}

/// A node with two bridges, its leases begun at 0.
struct World {
    inventory: Inventory,
    leases: LeaseBook,
    links: BTreeMap<u32, String>,
    attribution: Attribution,
    listens: Vec<(Listener, Service)>,
}

impl World {
    fn with(containers: Vec<Container>) -> Self {
        let network = |bridge: &str, subnet: &str| {
            let network = Network {
                id: bridge.to_owned(),
                name: bridge.to_owned(),
                project: None,
                driver: "bridge".to_owned(),
                bridge: Some(bridge.to_owned()),
                subnets: vec![subnet.parse().unwrap()],
                internal: false,
                unmanaged: BTreeSet::new(),
            };
            (bridge.to_owned(), network)
        };
        let inventory = Inventory {
            networks: [network("br0", "10.0.0.0/24"), network("br1", "10.0.1.0/24")].into(),
            host: [ip("10.0.0.1"), ip("203.0.113.2")].into(),
            containers: containers.into_iter().map(|c| (c.id.clone(), c)).collect(),
            ..Inventory::default()
        };
        let links = [(BRIDGE, "br0"), (OTHER, "br1"), (UPLINK, "eth0")].map(|(index, name)| (index, name.to_owned())).into();
        let mut leases = LeaseBook::default();
        leases.update(&inventory, at(0));
        Self { inventory, leases, links, attribution: Attribution::default(), listens: Vec::new() }
    }

    fn resolve(&mut self, now: Timestamp) -> Vec<Fact> {
        let mut out = Vec::new();
        let scene = Scene::new(&self.inventory, &self.leases, &self.links);
        let listens = &self.listens;
        self.attribution.resolve(&scene, &mut |who, what| Some(listens.contains(&(who, what))), now, &mut out);
        out
    }

    fn says(&mut self, sights: impl IntoIterator<Item = Sight>) -> Vec<Fact> {
        let mut out = Vec::new();
        for sight in sights {
            self.attribution.feed(sight, &mut out);
        }
        out
    }
}

fn wire(from: &str, to: &str, port: u16, entered: u32, left: u32) -> Wire {
    let tuple = Tuple { source: ip(from), destination: ip(to), protocol: Protocol::Tcp, source_port: 40_000, destination_port: port };
    Wire {
        tuple,
        server: tuple.destination,
        service: Service::tcp(port),
        road: Road::Direct,
        place: Place { entered: Some(entered), left: Some(left), port: None },
        time: at(1000),
        pre_existing: false,
        direction_sure: true,
    }
}

fn flow(id: FlowId, wire: Wire) -> [Sight; 2] {
    let used = Sight::Went { flow: id, tuple: wire.tuple, outcome: FlowOutcome::Established, time: wire.time, sent: 1, received: 2 };
    [Sight::Opened { flow: id, wire }, used]
}

fn edges(facts: &[Fact]) -> Vec<String> {
    let mut graph = FlowGraph::default();
    for fact in facts {
        graph.add(&EdgeDelta::from(fact));
    }
    graph.iter().map(|(key, _)| key.to_string()).collect()
}

#[test]
fn an_end_is_named_by_where_the_packet_went_and_not_by_its_address_alone() {
    let containers = || vec![container("a", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3"), container("c", "br1", "10.0.1.2")];
    let cases = [
        ("on one bridge", wire("10.0.0.2", "10.0.0.3", 80, BRIDGE, BRIDGE), "a -> b tcp/80"),
        ("across bridges", wire("10.0.0.2", "10.0.1.2", 80, BRIDGE, OTHER), "a -> c tcp/80"),
        ("out", wire("10.0.0.2", "198.51.100.1", 443, BRIDGE, UPLINK), "a -> outside:198.51.100.1 tcp/443"),
        ("in", wire("198.51.100.1", "10.0.0.3", 80, UPLINK, BRIDGE), "outside:198.51.100.1 -> b tcp/80"),
        ("from the host", wire("10.0.0.1", "10.0.0.3", 80, 0, BRIDGE), "host: -> b tcp/80"),
        ("to the host", wire("10.0.0.2", "10.0.0.1", 22, BRIDGE, 0), "a -> host: tcp/22"),
        ("a's address from outside", wire("10.0.0.2", "10.0.0.3", 80, UPLINK, BRIDGE), "outside:10.0.0.2 -> b tcp/80"),
        ("a's address from another bridge", wire("10.0.0.2", "10.0.0.3", 80, OTHER, BRIDGE), "unknown:10.0.0.2 -> b tcp/80"),
        ("the host's address from a bridge", wire("10.0.0.1", "10.0.0.3", 80, BRIDGE, BRIDGE), "unknown:10.0.0.1 -> b tcp/80"),
        ("nobody's address", wire("10.0.0.9", "10.0.0.3", 80, BRIDGE, BRIDGE), "unknown:10.0.0.9 -> b tcp/80"),
    ];
    for (name, wire, wanted) in cases {
        let mut world = World::with(containers());
        world.says(flow(1, wire));
        let facts = world.resolve(at(4000));
        assert_eq!(edges(&facts), [wanted], "{name}");
    }
}

#[test]
fn without_a_stamp_an_address_counts_if_it_is_somebodys_alone() {
    let unstamped = |from: &str, to: &str| Wire { place: Place::default(), ..wire(from, to, 80, 0, 0) };
    let mut world =
        World::with(vec![container("a", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3"), container("x", "br1", "10.0.0.3")]);
    world.says(flow(1, unstamped("10.0.0.2", "198.51.100.1")));
    // On both bridges: nobody can say whose it is.
    world.says(flow(2, unstamped("10.0.0.2", "10.0.0.3")));
    assert_eq!(edges(&world.resolve(at(4000))), ["a -> outside:198.51.100.1 tcp/80", "a -> unknown:10.0.0.3 tcp/80"]);
}

#[test]
fn an_unmanaged_container_is_named_as_such() {
    let mut lan = container("printer", "br0", "10.0.0.9");
    lan.elsewhere = vec![Attachment { network: "lan".to_owned(), addresses: [ip("192.0.2.9")].into() }];
    lan.legs.clear();
    let mut world = World::with(vec![container("a", "br0", "10.0.0.2"), lan]);
    world.says(flow(1, wire("10.0.0.2", "192.0.2.9", 631, BRIDGE, UPLINK)));
    assert_eq!(edges(&world.resolve(at(4000))), ["a -> unmanaged:printer@192.0.2.9 tcp/631"]);
}

#[test]
fn a_flow_waits_for_the_inventory_and_is_named_with_the_time_of_its_packet() {
    let mut world = World::with(vec![container("b", "br0", "10.0.0.3")]);
    world.says(flow(1, wire("10.0.0.2", "10.0.0.3", 80, BRIDGE, BRIDGE)));
    assert_eq!(world.resolve(at(1100)), [], "too young");
    assert_eq!(world.resolve(at(1500)), [], "nobody has the address yet");
    world.inventory.containers.insert("late".to_owned(), container("late", "br0", "10.0.0.2"));
    world.leases.update(&world.inventory.clone(), at(1020));
    assert_eq!(edges(&world.resolve(at(1600))), ["late -> b tcp/80"]);
    assert_eq!(world.attribution.unattributed(), 0);
}

#[test]
fn a_clock_that_is_put_back_keeps_nobody_waiting() {
    let mut world = World::with(vec![container("web", "br0", "10.0.0.2"), container("db", "br0", "10.0.0.3")]);
    let before = Wire { time: at(3_600_000), ..wire("10.0.0.2", "10.0.0.3", 5432, BRIDGE, BRIDGE) };
    let after = wire("10.0.0.2", "10.0.0.3", 5433, BRIDGE, BRIDGE);
    assert!(world.says(flow(1, before).into_iter().chain(flow(2, after))).is_empty());
    assert_eq!(edges(&world.resolve(at(1200))), ["web -> db tcp/5432", "web -> db tcp/5433"]);
}

#[test]
fn an_address_that_passed_on_belongs_to_whoever_had_it_at_the_time_of_the_packet() {
    let mut world = World::with(vec![container("old", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3")]);
    let late = Wire { time: at(1100), ..wire("10.0.0.2", "10.0.0.3", 443, BRIDGE, BRIDGE) };
    world.says(flow(1, wire("10.0.0.2", "10.0.0.3", 80, BRIDGE, BRIDGE)));
    world.says(flow(2, late));
    world.inventory.containers.remove("old");
    world.inventory.containers.insert("new".to_owned(), container("new", "br0", "10.0.0.2"));
    world.leases.update(&world.inventory.clone(), at(1050));
    assert_eq!(edges(&world.resolve(at(2000))), ["new -> b tcp/443", "old -> b tcp/80"]);
}

#[test]
fn who_listens_is_the_server_of_a_flow_whose_first_packet_nobody_saw() {
    let old = Wire { direction_sure: false, pre_existing: true, ..wire("10.0.0.2", "10.0.0.3", 5432, BRIDGE, BRIDGE) };
    let mut there = (container("a", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3"));
    (there.0.pid, there.1.pid) = (Some(2), Some(3));
    let server = (Listener::Process(3), Service::tcp(5432));
    let client = (Listener::Process(2), Service::tcp(40_000));
    for (listens, wanted) in [
        (vec![server], "a -> b tcp/5432"),
        (vec![client], "b -> a tcp/40000"),
        (vec![], "a -- b tcp/5432"),
        (vec![server, client], "a -- b tcp/5432"),
    ] {
        let mut world = World::with(vec![there.0.clone(), there.1.clone()]);
        world.listens = listens;
        world.says(flow(1, old));
        let mut facts = world.resolve(at(4000));
        if wanted.contains("--") {
            assert_eq!(facts, [], "who listens may be known a little later");
            facts = world.resolve(at(6000));
        }
        assert_eq!(edges(&facts), [wanted]);
        let Fact::Began(flow) = &facts[0] else { panic!() };
        assert!(flow.pre_existing);
        assert_eq!((flow.bytes_sent, flow.bytes_received), if wanted.starts_with("b ->") { (2, 1) } else { (1, 2) });
    }
}

/// `b` published at 8080, by the user-land proxy.
fn published() -> World {
    let mut b = container("b", "br0", "10.0.0.3");
    b.published = vec![Published { address: ip("0.0.0.0"), port: 8080, protocol: Protocol::Tcp, container_port: 80 }];
    World::with(vec![container("a", "br0", "10.0.0.2"), b])
}

fn knock() -> Wire {
    wire("10.0.0.2", "10.0.0.1", 8080, BRIDGE, 0)
}

fn leg() -> Wire {
    wire("10.0.0.1", "10.0.0.3", 80, 0, BRIDGE)
}

#[test]
fn each_client_of_the_proxy_takes_one_leg_and_the_next_leg_is_the_hosts_own() {
    let mut world = published();
    world.says(flow(1, knock()).into_iter().chain(flow(2, leg())).chain(flow(3, leg())));
    let facts = world.resolve(at(2000));
    assert_eq!(edges(&facts), ["a -> b tcp/80", "host: -> b tcp/80"]);
    assert_eq!(facts.len(), 2);
}

#[test]
fn a_client_of_the_proxy_fares_as_its_leg_does() {
    for (outcome, wanted) in [(FlowOutcome::Refused, FlowOutcome::Refused), (FlowOutcome::ConnectedNoData, FlowOutcome::Established)] {
        let mut world = published();
        world.says(flow(1, knock()));
        world.says([Sight::Opened { flow: 2, wire: leg() }]);
        assert_eq!(world.resolve(at(1500)), [], "the leg is not judged yet");
        let facts = world.says([Sight::Went { flow: 2, tuple: leg().tuple, outcome, time: at(1000), sent: 0, received: 0 }]);
        assert!(matches!(&facts[..], [Fact::Began(flow)] if flow.outcome == wanted && flow.road == Road::Proxy), "{facts:?}");
        // The leg's bytes are the client's, which are counted already.
        assert_eq!(
            world.says([Sight::Grew { flow: 2, tuple: leg().tuple, time: at(2000), sent: 9, received: 9 }, Sight::Closed { flow: 2 }]),
            []
        );
        let more = world.says([Sight::Grew { flow: 1, tuple: knock().tuple, time: at(2000), sent: 9, received: 9 }]);
        assert!(matches!(&more[..], [Fact::Grew(growth)] if growth.bytes_sent == 9 && growth.is_use == wanted.is_use()));
    }
}

#[test]
fn a_client_whose_leg_never_shows_up_has_its_own_outcome() {
    let mut world = published();
    world.says(flow(1, knock()));
    assert_eq!(world.resolve(at(1500)), []);
    assert_eq!(edges(&world.resolve(at(3100))), ["a -> b tcp/80"]);
}

#[test]
fn a_name_is_kept_with_the_flow_however_late_it_ends() {
    let mut world = World::with(vec![container("a", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3")]);
    let wire = wire("10.0.0.2", "10.0.0.3", 80, BRIDGE, BRIDGE);
    world.says([Sight::Opened { flow: 1, wire }]);
    assert_eq!(world.resolve(at(2000)), []);
    // Both are gone, and their leases forgotten.
    world.inventory.containers.clear();
    world.leases = LeaseBook::default();
    let (tuple, outcome) = (wire.tuple, FlowOutcome::ConnectedNoData);
    let facts = world.says([Sight::Went { flow: 1, tuple, outcome, time: at(1000), sent: 1, received: 1 }]);
    assert_eq!(edges(&facts), ["a -> b tcp/80"]);
    assert!(matches!(&facts[..], [Fact::Began(flow)] if flow.tuple == tuple), "{facts:?}");
}

#[test]
fn the_node_with_itself_and_its_groups_is_nobodys_flow() {
    let mut world = World::with(vec![container("a", "br0", "10.0.0.2")]);
    world.says(flow(1, wire("10.0.0.1", "203.0.113.2", 80, 0, 0)));
    world.says(flow(2, wire("10.0.0.1", "224.0.0.22", 0, 0, BRIDGE)));
    assert_eq!(world.resolve(at(4000)), []);
    // A container's own announcements are shown, and nobody is missed behind them.
    world.says(flow(3, wire("10.0.0.2", "224.0.0.251", 5353, BRIDGE, BRIDGE)));
    assert_eq!(edges(&world.resolve(at(4000))), ["a -> unknown:224.0.0.251 tcp/5353"]);
    assert_eq!(world.attribution.unattributed(), 0);
}

#[test]
fn a_forged_source_is_blamed_on_the_holder_of_the_port() {
    let mut c = container("c", "br0", "10.0.0.4");
    c.legs[0].port = Some("veth9".to_owned());
    let mut world = World::with(vec![container("a", "br0", "10.0.0.2"), container("b", "br0", "10.0.0.3"), c]);
    world.links.insert(9, "veth9".to_owned());
    let place = Place { entered: Some(BRIDGE), left: None, port: Some(9) };
    let wire = Wire { place, ..wire("10.0.0.2", "10.0.0.3", 80, 0, 0) };
    let denial = |wire, forged| Denial { wire, outcome: FlowOutcome::Denied, reason: "no".to_owned(), forged };
    world.attribution.deny(denial(wire, true));
    world.attribution.deny(denial(Wire { place: Place { port: None, ..place }, ..wire }, true));
    assert_eq!(edges(&world.resolve(at(4000))), ["c -> b tcp/80", "unknown:10.0.0.2 -> b tcp/80"]);
}

#[test]
fn a_one_off_run_is_an_end_of_its_own() {
    let mut run = container("web", "br0", "10.0.0.2");
    run.one_off = true;
    let mut world = World::with(vec![run, container("b", "br0", "10.0.0.3")]);
    world.says(flow(1, wire("10.0.0.2", "10.0.0.3", 80, BRIDGE, BRIDGE)));
    let facts = world.resolve(at(2000));
    let [Fact::Began(flow)] = &facts[..] else { panic!("{facts:?}") };
    assert_eq!(flow.from, Endpoint::Run(Workload::new("", "web")));
}
