//! A random node in few words: who is on which bridge, what is in force, who sends what to whom. As small as it can be made, and printed
//! for a person to read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use policy::inventory::Published;
use policy::policy_set::{Direction, Quarantine, Rule};
use policy::segment::Refusal;
use policy::{Inventory, Mode, Peer, PolicySet, Ports, Protocol, Segment, Selector, Service, Workload, WorkloadPolicy};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

use super::town::{BRIDGES, MEMBERS, NODE, OUTSIDE, leg, member_named, network, node_bridge};
use crate::stage::container;

/// Containers that the members of bridges may be legs of.
const CONTAINERS: usize = 9;
/// Ports of the node that containers are published at: the first one's, the next one's, and so on.
pub(super) const DOORS: u16 = 8000;

pub(super) const WORKLOADS: [&str; 5] = ["p/a", "p/b", "q/c", "d", "e"];

/// How a published port is reached from outside of its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Road {
    /// The engine's proxy listens at the node.
    Proxy,
    /// The kernel translates the node's address into the container's.
    Translation,
}

/// A published port: its protocol, the container's port, and whether it is at one address of the node alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Door {
    pub(super) protocol: Protocol,
    pub(super) container_port: u16,
    pub(super) exact: bool,
}

/// One end of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A member of a bridge.
    Member(usize),
    /// The node, by the nth of its addresses.
    Node(usize),
    /// Outside, by the nth address there.
    Outside(usize),
}

/// Where a probe goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Place(Place, Service),
    /// There, by a service at an edge of the ports of an allow.
    Allowed(Place, usize, usize),
    /// The port that this member's container is published at, at the nth address of the node.
    Door(usize, usize),
}

/// The first packet of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) from: Place,
    pub(super) to: Target,
    /// 0: IPv4, 1: IPv6, where the service leaves the choice.
    pub(super) version: usize,
}

/// An allow: by the sender's side, the receiver's, or both.
#[derive(Clone, Debug)]
struct Edge {
    from: Peer,
    to: Peer,
    ports: Ports,
    sides: BTreeSet<Direction>,
}

/// See above.
#[derive(Clone)]
pub(super) struct Sketch {
    /// Which bridges are the engine's; the others are somebody else's.
    pub(super) engine: Vec<bool>,
    /// Workload of each container, and whether it is a one-off run.
    carriers: Vec<(usize, bool)>,
    /// The container that a member is a leg of; `None`: nobody that is known.
    members: Vec<Option<usize>>,
    /// Published port of each member's container.
    pub(super) doors: Vec<Option<Door>>,
    pub(super) road: Road,
    segments: BTreeMap<&'static str, (BTreeSet<Selector>, Mode, Refusal)>,
    edges: Vec<Edge>,
    quarantined: BTreeSet<usize>,
    pub(super) probes: Vec<Probe>,
}

fn workload(n: usize) -> Workload {
    WORKLOADS[n].parse().unwrap()
}

impl Sketch {
    /// What a member is a leg of: a container of the engine, with its number. Two members of one bridge are never one container.
    pub(super) fn carrier(&self, member: usize) -> Option<usize> {
        let number = self.members[member]?;
        let same = |&other: &usize| self.members[other] == Some(number) && MEMBERS[other].1 == MEMBERS[member].1;
        let twin = (0..member).any(|other| same(&other));
        (self.engine[MEMBERS[member].1]).then_some(if twin { CONTAINERS + member } else { number })
    }

    /// The member through which a container is published: its first leg.
    pub(super) fn published(&self, member: usize) -> Option<(Door, u16)> {
        let carrier = self.carrier(member)?;
        let first = (0..member).all(|other| self.carrier(other) != Some(carrier));
        // Who has the address of somebody on another bridge is not reached by the node's routes.
        let routed = MEMBERS[member].1 != 1;
        Some((self.doors[member].filter(|_| first && routed)?, DOORS + member as u16))
    }

    pub(super) fn inventory(&self) -> Inventory {
        let mut inventory = Inventory { userland_proxy: self.road == Road::Proxy, ..Inventory::default() };
        for (bridge, _) in self.engine.iter().enumerate().filter(|(_, engine)| **engine) {
            let network = network(bridge);
            inventory.networks.insert(network.id.clone(), network);
        }
        inventory.bridges = (0..BRIDGES.len()).map(|bridge| (BRIDGES[bridge].0.to_owned(), node_bridge(bridge))).collect();
        inventory.host = NODE.iter().flatten().map(|at| at.parse::<IpAddr>().unwrap()).collect();
        for (member, name) in MEMBERS.iter().enumerate() {
            let Some(carrier) = self.carrier(member) else { continue };
            let (of, one_off) = self.carriers[carrier % CONTAINERS];
            let found = inventory.containers.entry(format!("c{carrier}")).or_insert_with(|| {
                let id = format!("c{carrier}");
                policy::inventory::Container { workload: workload(of), one_off, id: id.clone(), name: id, ..container(name.0) }
            });
            found.legs.push(leg(member));
            if let Some((door, port)) = self.published(member) {
                let at: &[&str] = if door.exact { &[lab::internet::HOST_V4] } else { &["0.0.0.0", "::"] };
                found.published.extend(at.iter().map(|at| Published {
                    address: at.parse().unwrap(),
                    port,
                    protocol: door.protocol,
                    container_port: door.container_port,
                }));
            }
        }
        inventory
    }

    pub(super) fn set(&self) -> PolicySet {
        let mut set = PolicySet::default();
        for (name, (members, mode, refusal)) in &self.segments {
            let name = (*name).to_owned();
            let segment = Segment { name: name.clone(), members: members.clone(), mode: *mode, refusal: *refusal, promotion: None };
            set.segments.insert(name, segment);
        }
        for edge in &self.edges {
            for (own, peer, direction) in [(&edge.from, &edge.to, Direction::Egress), (&edge.to, &edge.from, Direction::Ingress)] {
                let (Peer::Workload(own), true) = (own, edge.sides.contains(&direction)) else { continue };
                let policy = set.policies.entry(own.clone()).or_insert_with(|| WorkloadPolicy::empty(own.clone()));
                policy.rules_mut(direction).insert(Rule { peer: peer.clone(), ports: edge.ports, until: None });
            }
        }
        for workload in self.quarantined.iter().map(|&n| workload(n)) {
            set.quarantines.insert(workload.clone(), Quarantine { workload, comment: String::new() });
        }
        set
    }

    /// A service at an edge of what the nth allow holds: its first, its last, and those beside.
    pub(super) fn at_an_edge(&self, nth: usize, which: usize) -> Option<Service> {
        let ports = self.edges.get(nth % self.edges.len().max(1))?.ports;
        let protocol = ports.protocol();
        let port = match protocol {
            // Errors and neighbour discovery are no services.
            Protocol::Icmp => [8, 13][which % 2],
            Protocol::Icmpv6 => [128, 100][which % 2],
            Protocol::Other(_) => 0,
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => {
                [ports.first(), ports.last(), ports.first().saturating_sub(1).max(1), ports.last().saturating_add(1)][which]
            }
        };
        // Beyond, the probes' own ports begin, and below the highest the doors are.
        let clear = port < super::SOURCES && !(DOORS..DOORS + MEMBERS.len() as u16).contains(&port) || !protocol.has_ports();
        clear.then_some(Service { protocol, port })
    }

    /// The node of the engine's own rules: its bridges, and the containers whose published ports are in these rules.
    pub(super) fn beside_the_engine(mut self, road: Road) -> Self {
        self.road = road;
        self.engine = (0..BRIDGES.len()).map(|bridge| bridge != 1).collect();
        self.doors = vec![None; MEMBERS.len()];
        for (number, (name, protocol, container_port)) in
            [("a", Protocol::Tcp, 80), ("b", Protocol::Udp, 53), ("e", Protocol::Tcp, 80)].into_iter().enumerate()
        {
            let member = member_named(name);
            self.doors[member] = Some(Door { protocol, container_port, exact: false });
            // Each a container of its own.
            self.members.iter_mut().filter(|other| **other == Some(number)).for_each(|other| *other = None);
            self.members[member] = Some(number);
        }
        self
    }
}

impl fmt::Debug for Sketch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for (bridge, engine) in self.engine.iter().enumerate() {
            let names = (0..MEMBERS.len()).filter(|&member| MEMBERS[member].1 == bridge);
            let whose = |member: usize| match self.carrier(member) {
                None => "nobody".to_owned(),
                Some(carrier) => {
                    let (of, one_off) = self.carriers[carrier % CONTAINERS];
                    let run = if one_off { " (run)" } else { "" };
                    let door = self.published(member).map(|(door, port)| {
                        let at = if door.exact { "one address" } else { "every address" };
                        format!(", published {}/{} at {port} of {at}", door.protocol, door.container_port)
                    });
                    format!("c{carrier} of {}{run}{}", WORKLOADS[of], door.unwrap_or_default())
                }
            };
            let members: Vec<_> = names.map(|member| format!("{}: {}", MEMBERS[member].0, whose(member))).collect();
            let owner = if *engine { "" } else { " (not the engine's)" };
            writeln!(f, "  {}{owner}  {}", BRIDGES[bridge].0, members.join("; "))?;
        }
        writeln!(f, "  published ports by {:?}", self.road)?;
        for (name, (members, mode, refusal)) in &self.segments {
            let members: Vec<_> = members.iter().map(ToString::to_string).collect();
            writeln!(f, "  segment {name} in {mode:?} ({refusal:?}): {}", members.join(", "))?;
        }
        let said = |edge: &Edge| format!("  allow {} -> {} {} by {:?}", edge.from, edge.to, edge.ports, edge.sides);
        for line in self.edges.iter().map(said).collect::<BTreeSet<_>>() {
            writeln!(f, "{line}")?;
        }
        for &n in &self.quarantined {
            writeln!(f, "  quarantine {}", WORKLOADS[n])?;
        }
        write!(f, "  {} probes", self.probes.len())
    }
}

fn ports() -> impl Strategy<Value = Ports> {
    let all = [
        "tcp/80",
        "tcp/443",
        "tcp/1-1024",
        "tcp/80-7000",
        "udp/53",
        "udp/50-60",
        "icmp/8",
        "icmp/0-255",
        "icmpv6/128",
        "icmpv6/0-255",
        "sctp/9",
        "sctp/1-100",
        "ip47",
        "tcp/1-65535",
        "udp/1-65535",
    ];
    select(all.map(|text| text.parse::<Ports>().unwrap()).to_vec())
}

fn services() -> impl Strategy<Value = Service> {
    let all = [
        "tcp/80",
        "tcp/80",
        "tcp/443",
        "tcp/1024",
        "udp/53",
        "udp/61",
        "icmp/8",
        "icmp/13",
        "icmpv6/128",
        "icmpv6/100",
        "sctp/9",
        "sctp/101",
        "ip47",
        "ip50",
    ];
    select(all.map(|text| text.parse::<Service>().unwrap()).to_vec())
}

fn edge() -> impl Strategy<Value = Edge> {
    let outside = ["0.0.0.0/0", "::/0", "198.51.100.0/24", "192.0.2.10", "2001:db8:a::/48", "2001:db8:b::7", "10.0.0.0/8", "10.1.0.0/24"];
    let outside = outside.map(|net| format!("outside:{net}").parse::<Peer>().unwrap());
    let workloads = WORKLOADS.map(|name| Peer::Workload(name.parse().unwrap())).to_vec();
    let other = prop_oneof![6 => select(workloads.clone()), 1 => Just(Peer::Host), 2 => select(outside.to_vec())];
    let sides = prop_oneof![
        3 => Just([Direction::Egress, Direction::Ingress].into()),
        1 => Just([Direction::Egress].into()),
        1 => Just([Direction::Ingress].into()),
    ];
    (select(workloads), other, any::<bool>(), ports(), sides).prop_map(|(one, other, turned, ports, sides)| {
        let (from, to) = if turned { (other, one) } else { (one, other) };
        Edge { from, to, ports, sides }
    })
}

fn probe() -> impl Strategy<Value = Probe> {
    let place = || {
        prop_oneof![
            6 => (0..MEMBERS.len()).prop_map(Place::Member),
            1 => (0..NODE.len()).prop_map(Place::Node),
            1 => (0..OUTSIDE.len()).prop_map(Place::Outside),
        ]
    };
    let to = prop_oneof![
        3 => (place(), services()).prop_map(|(place, service)| Target::Place(place, service)),
        6 => (place(), 0..20_usize, 0..4_usize).prop_map(|(place, edge, which)| Target::Allowed(place, edge, which)),
        1 => (0..MEMBERS.len(), 0..NODE.len()).prop_map(|(member, node)| Target::Door(member, node)),
    ];
    (place(), to, 0..2_usize).prop_map(|(from, to, version)| Probe { from, to, version })
}

fn doors() -> impl Strategy<Value = Vec<Option<Door>>> {
    let published = select(vec![(Protocol::Tcp, 80), (Protocol::Tcp, 443), (Protocol::Udp, 53), (Protocol::Sctp, 9)])
        .prop_flat_map(|(protocol, port)| prop::bool::weighted(0.2).prop_map(move |exact| Door { protocol, container_port: port, exact }));
    vec(proptest::option::weighted(0.4, published), MEMBERS.len())
}

/// Any node, with so many probes.
pub(super) fn sketches(probes: usize) -> impl Strategy<Value = Sketch> {
    let carrier = (0..WORKLOADS.len(), prop::bool::weighted(0.15));
    let town = (
        vec(prop::bool::weighted(0.85), BRIDGES.len()),
        vec(carrier, CONTAINERS),
        vec(proptest::option::weighted(0.85, 0..CONTAINERS), MEMBERS.len()),
        doors(),
        select(vec![Road::Proxy, Road::Translation]),
    );
    let selector = prop_oneof![
        4 => select(WORKLOADS.to_vec()).prop_map(|name| Selector::Workload(name.parse().unwrap())),
        1 => select(vec!["p", "q"]).prop_map(|project| Selector::Project(project.to_owned())),
        1 => (0..BRIDGES.len()).prop_map(|bridge| Selector::Network(network(bridge).name)),
    ];
    let mode = prop_oneof![1 => Just(Mode::Learn), 2 => Just(Mode::Audit), 5 => Just(Mode::Enforce)];
    let refusal = select(vec![Refusal::Reject, Refusal::Drop]);
    let force = (
        btree_map(select(vec!["s", "t", "u"]), (btree_set(selector, 1..5), mode, refusal), 1..4),
        vec(edge(), 0..20),
        prop_oneof![3 => Just(BTreeSet::new()), 1 => btree_set(0..WORKLOADS.len(), 0..2)],
    );
    (town, force, vec(probe(), 1..=probes)).prop_map(
        |((engine, carriers, members, doors, road), (segments, edges, quarantined), probes)| Sketch {
            engine,
            carriers,
            members,
            doors,
            road,
            segments,
            edges,
            quarantined,
            probes,
        },
    )
}
