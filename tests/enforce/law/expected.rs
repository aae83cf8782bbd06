//! What has to become of a probe: by `policy::evaluate`, and by what the engine's own rules say in words.

use std::collections::BTreeSet;
use std::net::IpAddr;

use policy::evaluate::{Decision, Side};
use policy::{Connection, Endpoint, Inventory, PolicySet, Protocol, Scene, Selector, Service, Standing, Verdict, evaluate};

use super::sketch::{Place, Probe, Road, Sketch, Target};
use super::town::{BRIDGES, MEMBERS, address};
use crate::stage::now;

/// The engine whose rules are loaded beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// None: bridges, and where ports are published by translation, the translation alone.
    None,
    /// 20.10, by iptables, IPv4 only, with docker-proxy.
    Twenty,
    /// 29, by nftables, both families, without docker-proxy.
    TwentyNine,
}

/// A probe that can be sent: what its packet says, where it has to arrive if it passes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) from: Place,
    /// As the sender addresses it.
    pub(super) addressed: Place,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) asked: Service,
    /// Behind a translation.
    pub(super) to: Place,
    pub(super) service: Service,
    /// The member behind the engine's proxy, and its port there.
    behind: Option<(usize, Service)>,
}

/// The packet of a probe on this node; `None` where it would say nothing: to itself, to nobody, between node and outside's own.
pub(super) fn packet(sketch: &Sketch, engine: Engine, probe: &Probe) -> Option<Packet> {
    let (from, version) = (probe.from, probe.version);
    let (addressed, asked, door) = match probe.to {
        Target::Place(place, service) => (place, service, None),
        Target::Allowed(place, edge, which) => (place, sketch.at_an_edge(edge, which)?, None),
        Target::Door(member, node) => {
            let (door, port) = sketch.published(member)?;
            let service = Service { protocol: door.protocol, port };
            (Place::Node(if door.exact { 3 } else { node }), service, Some((member, door)))
        }
    };
    let version = match (asked.protocol, door) {
        (Protocol::Icmp, _) => 0,
        (Protocol::Icmpv6, _) => 1,
        (_, Some((_, door))) if door.exact => 0,
        _ => version,
    };
    let mut packet = Packet {
        from,
        addressed,
        source: address(from, version),
        destination: address(addressed, version),
        asked,
        to: addressed,
        service: asked,
        behind: None,
    };
    if let Some((member, door)) = door {
        let inside = Service { protocol: door.protocol, port: door.container_port };
        if translated(sketch, engine, from, version) {
            (packet.to, packet.service) = (Place::Member(member), inside);
        } else {
            packet.behind = Some((member, inside));
        }
    }
    let sensible = match (from, packet.to) {
        (Place::Node(_) | Place::Outside(_), Place::Node(_) | Place::Outside(_)) => {
            matches!(from, Place::Outside(_)) && packet.behind.is_some()
        }
        // No route of the node leads to who has the addresses of somebody else; and nothing answers to its own address.
        (from, Place::Member(to)) => {
            let near = matches!(from, Place::Member(from) if MEMBERS[from].1 == 1);
            from != Place::Member(to) && (MEMBERS[to].1 != 1 || near) && packet.source != address(packet.to, version)
        }
        (Place::Member(_), Place::Node(_) | Place::Outside(_)) => true,
    };
    sensible.then_some(packet)
}

/// Whether what this sender sends to a published port goes to the container itself, rather than to the proxy.
fn translated(sketch: &Sketch, engine: Engine, from: Place, version: usize) -> bool {
    let from_the_engines = matches!(from, Place::Member(member) if sketch.engine[MEMBERS[member].1]);
    match engine {
        Engine::None => sketch.road == Road::Translation,
        Engine::Twenty => version == 0 && !from_the_engines,
        Engine::TwentyNine => true,
    }
}

/// What is expected, with the words for it.
pub(super) struct Expected {
    pub(super) passes: bool,
    pub(super) why: String,
}

/// Everything that the meaning of a packet depends on.
pub(super) struct Judge<'s> {
    sketch: &'s Sketch,
    engine: Engine,
    inventory: &'s Inventory,
    scene: Scene<'s>,
    guarded: BTreeSet<usize>,
}

impl<'s> Judge<'s> {
    pub(super) fn new(sketch: &'s Sketch, engine: Engine, inventory: &'s Inventory, scene: Scene<'s>) -> Self {
        let guarded = (0..BRIDGES.len()).filter(|&bridge| sketch.engine[bridge] && is_guarded(sketch, inventory, &scene, bridge)).collect();
        Self { sketch, engine, inventory, scene, guarded }
    }

    fn endpoint(&self, place: Place, at: IpAddr) -> Endpoint {
        match place {
            Place::Node(_) => Endpoint::Host,
            Place::Outside(_) => Endpoint::Outside(at),
            Place::Member(member) => match self.inventory.at(BRIDGES[MEMBERS[member].1].0, at) {
                Some((container, _)) => container.endpoint(),
                None if self.sketch.engine[MEMBERS[member].1] => Endpoint::Unknown(at),
                None => Endpoint::Outside(at),
            },
        }
    }

    fn decide(&self, from: (Place, IpAddr), to: (Place, IpAddr), service: Service) -> Decision {
        let on_guarded = |place: Place| matches!(place, Place::Member(member) if self.guarded.contains(&MEMBERS[member].1));
        let [client, server] = [from, to].map(|(place, at)| (self.endpoint(place, at), on_guarded(place)));
        let guarded = [&client, &server].into_iter().any(|(end, on_guarded)| matches!(end, Endpoint::Unknown(_)) && *on_guarded);
        evaluate(&self.scene, &Connection { from: client.0, to: server.0, service, guarded })
    }

    pub(super) fn expect(&self, packet: &Packet) -> Expected {
        let version = usize::from(packet.source.is_ipv6());
        let decided = match packet.behind {
            // The proxy's connection is its client's.
            Some((member, inside)) => {
                self.decide((packet.from, packet.source), (Place::Member(member), address(Place::Member(member), version)), inside)
            }
            None => self.decide((packet.from, packet.source), (packet.to, address(packet.to, version)), packet.service),
        };
        let ours = decided.verdict != Verdict::Deny || self.is_the_proxys_own(packet, &decided);
        let theirs = self.engine_allows(packet, version);
        let engine = if self.engine == Engine::None { String::new() } else { format!("; the engine's rules allow it: {theirs}") };
        Expected { passes: ours && theirs, why: format!("evaluate says {}: {}{engine}", decided.verdict, decided.reason()) }
    }

    /// README, always allowed, 5: from the node to a published port's container, unless it is cut off.
    fn is_the_proxys_own(&self, packet: &Packet, decided: &Decision) -> bool {
        let (Place::Node(_), Place::Member(member)) = (packet.from, packet.to) else { return false };
        let Some((container, _)) = self.inventory.at(BRIDGES[MEMBERS[member].1].0, address(packet.to, 0)) else { return false };
        let behind = |p: &policy::inventory::Published| (p.protocol, p.container_port) == (packet.service.protocol, packet.service.port);
        self.inventory.userland_proxy
            && container.published.iter().any(behind)
            && !matches!(decided.ingress, Side::Quarantined { .. })
            && !decided.unknown_address
    }

    fn engine_allows(&self, packet: &Packet, version: usize) -> bool {
        let bridge = |place: Place| match place {
            Place::Member(member) => Some(MEMBERS[member].1),
            Place::Node(_) | Place::Outside(_) => None,
        };
        let engines = |place: Place| bridge(place).is_some_and(|bridge| self.sketch.engine[bridge]);
        let through_a_door = packet.addressed != packet.to;
        // INPUT and OUTPUT have no rules of the engine's.
        if matches!(packet.from, Place::Node(_)) || matches!(packet.to, Place::Node(_)) {
            return true;
        }
        let same = bridge(packet.from).is_some() && bridge(packet.from) == bridge(packet.to);
        match self.engine {
            Engine::None => true,
            Engine::Twenty if version == 1 => true,
            // FORWARD drops what no rule knows: that of other bridges too.
            Engine::Twenty => match (engines(packet.from), engines(packet.to)) {
                (true, true) => same,
                (true, false) => true,
                (false, true) => self.is_published(packet),
                (false, false) => false,
            },
            Engine::TwentyNine if self.has_a_published_address(packet, version) => false,
            Engine::TwentyNine => !engines(packet.to) || same || through_a_door,
        }
    }

    /// Addressed to a container with a published port, from elsewhere than its bridge: 29 drops that before any translation, also where
    /// somebody on another bridge has the same address.
    fn has_a_published_address(&self, packet: &Packet, version: usize) -> bool {
        let from = |bridge: usize| matches!(packet.from, Place::Member(from) if MEMBERS[from].1 == bridge);
        let its = |&member: &usize| address(Place::Member(member), version) == packet.destination;
        let mut published = (0..MEMBERS.len()).filter(|&member| self.sketch.published(member).is_some());
        published.any(|member| its(&member) && !from(MEMBERS[member].1))
    }

    /// Whether the port at the container is a published one.
    fn is_published(&self, packet: &Packet) -> bool {
        let Place::Member(member) = packet.to else { return false };
        let is_it =
            |(door, _): (super::sketch::Door, u16)| (door.protocol, door.container_port) == (packet.service.protocol, packet.service.port);
        // The rules as they were loaded publish one more.
        let one_more = MEMBERS[member].0 == "b" && packet.service == Service::tcp(443);
        self.sketch.published(member).is_some_and(is_it) || one_more
    }
}

/// A workload in Enforce or quarantine is attached, or the network is an enforced segment's by its name or project (property 7), by these
/// words and not by `bind`.
fn is_guarded(sketch: &Sketch, inventory: &Inventory, scene: &Scene<'_>, bridge: usize) -> bool {
    let held = |member: usize| {
        let carrier = sketch.carrier(member).and_then(|carrier| inventory.containers.get(&format!("c{carrier}")));
        carrier.is_some_and(|c| matches!(scene.standing(&c.workload), Standing::Enforce(_) | Standing::Quarantined))
    };
    let network = super::town::network(bridge);
    let belongs = |selector: &Selector| match selector {
        Selector::Network(name) => *name == network.name,
        Selector::Project(project) => network.project.as_ref() == Some(project),
        Selector::Workload(_) => false,
    };
    let enforced = scene.set.segments.values().filter(|segment| segment.mode == policy::Mode::Enforce);
    (0..MEMBERS.len()).any(|member| MEMBERS[member].1 == bridge && held(member)) || enforced.flat_map(|s| &s.members).any(belongs)
}

/// What is in force, borrowed for a judge.
pub(super) fn scene<'s>(set: &'s PolicySet, networks: &'s std::collections::BTreeMap<policy::Workload, BTreeSet<String>>) -> Scene<'s> {
    Scene { set, networks, now: now() }
}
