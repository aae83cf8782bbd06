//! Which living connections a plan no longer allows. The connection table and the inventory come in as data.
//!
//! # Why
//! The filter judges beginnings: what is established passes. So taking an allow back, switching to Enforce or cutting a workload
//! off also ends the connections that live, and only those: a connection that is allowed in either direction of its tuple stays,
//! since connection tracking may have met it in the middle and taken the server for the client.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::evaluate::{Connection, Decision, Scene, Side, Verdict, evaluate};
use crate::flow::Tuple;
use crate::graph::EdgeKey;
use crate::inventory::{Container, Inventory, Published};
use crate::ruleset::Ruleset;
use crate::service::{Protocol, Service};
use crate::status::Ended;
use crate::track::Entry;
use crate::workload::Endpoint;

/// A connection that lives, as connection tracking has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Living {
    /// Who sent the first packet that was seen.
    pub from: Endpoint,
    /// The other end, behind whatever was rewritten on the way.
    pub to: Endpoint,
    /// From `from` to `to`, with the server's own port as destination (behind a published port: the container's).
    pub tuple: Tuple,
    /// Whether a network that carries it is guarded.
    pub guarded: bool,
    /// The user-land proxy's own leg to a published port: who may come was decided at the node's door, so only a quarantine
    /// ends it here.
    pub carried: bool,
}

/// What names the ends of a connection.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    /// What runs here.
    pub inventory: &'a Inventory,
    /// What is bound here.
    pub ruleset: &'a Ruleset,
    /// Names of interfaces by index.
    pub links: &'a BTreeMap<u32, String>,
}

impl Node<'_> {
    /// One entry of the connection table with its ends named.
    pub fn living(&self, entry: &Entry) -> Living {
        let (original, reply) = (entry.original, entry.reply);
        let server_port = if original.protocol.has_ports() { reply.source_port } else { original.destination_port };
        let tuple = Tuple { destination: reply.source, destination_port: server_port, ..original };
        let (from, from_bridge) = self.end(entry.stamp.map(|stamp| stamp.entered), tuple.source);
        let (to, to_bridge) = self.end(entry.stamp.map(|stamp| stamp.left), tuple.destination);
        let guarded = [from_bridge, to_bridge]
            .into_iter()
            .flatten()
            .any(|bridge| self.ruleset.watched.get(bridge).is_some_and(|watch| watch.guarded));
        let service = Service { protocol: tuple.protocol, port: tuple.destination_port };
        let plain = Living { from, to, tuple, guarded, carried: false };
        if !self.inventory.userland_proxy {
            return plain;
        }
        let behind = |published: &Published| Service { protocol: published.protocol, port: published.container_port };
        match (&plain.from, &plain.to) {
            (_, Endpoint::Host) => match self.door(tuple.destination, service) {
                Some((container, published)) => {
                    let tuple = Tuple { destination_port: published.container_port, ..tuple };
                    Living { to: container.endpoint(), tuple, ..plain }
                }
                None => plain,
            },
            (Endpoint::Host, _) => {
                let server = to_bridge.and_then(|bridge| self.inventory.at(bridge, tuple.destination));
                let carried = server.is_some_and(|(container, _)| container.published.iter().any(|p| behind(p) == service));
                Living { carried, ..plain }
            }
            _ => plain,
        }
    }

    /// The container behind a published port of the node.
    fn door(&self, address: IpAddr, service: Service) -> Option<(&Container, &Published)> {
        let at = |published: &Published| {
            let any = published.address.is_unspecified() && published.address.is_ipv4() == address.is_ipv4();
            (any || published.address == address) && published.protocol == service.protocol && published.port == service.port
        };
        self.inventory.containers.values().find_map(|container| Some((container, container.published.iter().find(|p| at(p))?)))
    }

    /// One end: by the interface its packets used where that is known, else by its address alone.
    fn end(&self, interface: Option<u32>, address: IpAddr) -> (Endpoint, Option<&str>) {
        let holder = |bridge: &str| self.inventory.at(bridge, address).map(|(container, _)| container.endpoint());
        let bridges = || self.inventory.networks.values().filter_map(|network| Some((network.bridge.as_deref()?, network)));
        match interface {
            Some(0) => (Endpoint::Host, None),
            Some(index) if let Some(name) = self.links.get(&index) => match bridges().find(|(bridge, _)| bridge == name) {
                Some((bridge, _)) => (holder(bridge).unwrap_or(Endpoint::Unknown(address)), Some(bridge)),
                None => (Endpoint::Outside(address), None),
            },
            _ if self.inventory.host.contains(&address) || address.is_loopback() => (Endpoint::Host, None),
            _ => {
                let held = bridges().find_map(|(bridge, _)| Some((holder(bridge)?, Some(bridge))));
                let within = || bridges().find(|(_, network)| network.subnets.iter().any(|subnet| subnet.contains(&address)));
                held.or_else(|| within().map(|(bridge, _)| (Endpoint::Unknown(address), Some(bridge))))
                    .unwrap_or((Endpoint::Outside(address), None))
            }
        }
    }
}

impl Living {
    /// Both ends are somebody's, and a network that carries it is guarded: it was judged, and its packets came by the roads that they
    /// claim. Of any other nobody knows who began it.
    fn is_of_known_ends(&self) -> bool {
        self.guarded && ![&self.from, &self.to].iter().any(|end| matches!(end, Endpoint::Unknown(_)))
    }

    /// Whether it may go on unjudged: of known ends, and begun by who may. A TCP connection that is allowed the other way round alone may
    /// be no more than an answer that nobody asked for: connection tracking has it all the same. Its client's next packet begins it.
    pub fn is_begun(&self, scene: &Scene<'_>) -> bool {
        let by_who_may = || self.carried || evaluate(scene, &self.toward()).verdict != Verdict::Deny;
        self.is_of_known_ends() && (self.tuple.protocol != Protocol::Tcp || by_who_may())
    }

    fn toward(&self) -> Connection {
        let service = Service { protocol: self.tuple.protocol, port: self.tuple.destination_port };
        Connection { from: self.from.clone(), to: self.to.clone(), service, guarded: self.guarded }
    }

    /// The same the other way round, for protocols where a port tells the server.
    fn back(&self) -> Option<Connection> {
        let service = Service { protocol: self.tuple.protocol, port: self.tuple.source_port };
        let turned = Connection { from: self.to.clone(), to: self.from.clone(), service, guarded: self.guarded };
        self.tuple.protocol.has_ports().then_some(turned)
    }
}

/// Why a connection ends, or `None` if it stays.
pub fn denied(scene: &Scene<'_>, living: &Living) -> Option<Decision> {
    let decision = evaluate(scene, &living.toward());
    let cut = [&decision.egress, &decision.ingress].into_iter().any(|side| matches!(side, Side::Quarantined { .. }));
    if decision.verdict != Verdict::Deny || (living.carried && !cut) {
        return None;
    }
    let allowed_back = living.back().is_some_and(|back| evaluate(scene, &back).verdict != Verdict::Deny);
    (!allowed_back).then_some(decision)
}

/// The connections that end, by their place in `living`, each with the reason.
pub fn revoke<'a>(scene: &Scene<'_>, living: impl IntoIterator<Item = &'a Living>) -> Vec<(usize, Decision)> {
    living.into_iter().enumerate().filter_map(|(index, one)| Some((index, denied(scene, one)?))).collect()
}

/// How many tuples are shown for one edge.
const EXAMPLES: usize = 5;

/// The same, counted by edge for a person who decides, in the order of the edges.
pub fn preview<'a>(scene: &Scene<'_>, living: impl IntoIterator<Item = &'a Living>) -> Vec<Ended> {
    let mut edges: BTreeMap<EdgeKey, Ended> = BTreeMap::new();
    for one in living {
        let Some(decision) = denied(scene, one) else { continue };
        let Connection { from, to, service, .. } = one.toward();
        let edge = EdgeKey { from, to, service, direction_known: true };
        let none = || Ended { edge: edge.clone(), connections: 0, examples: Vec::new(), reason: decision.reason() };
        let ended = edges.entry(edge.clone()).or_insert_with(none);
        ended.connections += 1;
        if ended.examples.len() < EXAMPLES {
            ended.examples.push(one.tuple);
        }
    }
    edges.into_values().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::policy_set::{Peer, PolicySet, Quarantine, Rule, WorkloadPolicy};
    use crate::segment::{Mode, Refusal, Segment, Selector};
    use crate::workload::Workload;

    fn workload(name: &str) -> Workload {
        Workload::new("shop", name)
    }

    /// `web -> db tcp/5432` approved on both sides, the project in this mode.
    fn policies(mode: Mode) -> PolicySet {
        let mut set = PolicySet::default();
        let segment = Segment {
            name: "shop".into(),
            members: [Selector::Project("shop".into())].into(),
            mode,
            refusal: Refusal::Reject,
            promotion: None,
        };
        set.segments.insert("shop".into(), segment);
        let rule = |peer: &str| Rule { peer: Peer::Workload(workload(peer)), ports: Service::tcp(5432).into(), until: None };
        let mut add = |name: &str, ingress: BTreeSet<Rule>, egress: BTreeSet<Rule>| {
            set.policies
                .insert(workload(name), WorkloadPolicy { workload: workload(name), ingress: ingress.into(), egress: egress.into() });
        };
        add("web", BTreeSet::new(), [rule("db")].into());
        add("db", [rule("web")].into(), BTreeSet::new());
        add("admin", BTreeSet::new(), BTreeSet::new());
        set
    }

    fn living(from: &str, to: &str, source_port: u16, port: u16) -> Living {
        let tuple = Tuple {
            source: "10.0.0.2".parse().unwrap(),
            destination: "10.0.0.3".parse().unwrap(),
            protocol: Protocol::Tcp,
            source_port,
            destination_port: port,
        };
        let end = |name: &str| Endpoint::Workload(workload(name));
        Living { from: end(from), to: end(to), tuple, guarded: true, carried: false }
    }

    fn ends(set: &PolicySet, one: &Living) -> bool {
        let networks = BTreeMap::new();
        let scene = Scene { set, networks: &networks, now: "2026-11-20T12:00:00Z".parse().unwrap() };
        denied(&scene, one).is_some()
    }

    #[test]
    fn a_connection_that_no_rule_allows_ends_and_an_allowed_one_stays() {
        let set = policies(Mode::Enforce);
        assert!(!ends(&set, &living("web", "db", 40000, 5432)));
        assert!(ends(&set, &living("admin", "db", 40000, 5432)));
        assert!(ends(&set, &living("web", "db", 40000, 6379)));
    }

    #[test]
    fn a_connection_met_in_the_middle_stays_if_its_other_direction_is_allowed() {
        assert!(!ends(&policies(Mode::Enforce), &living("db", "web", 5432, 40000)));
    }

    #[test]
    fn who_may_answer_has_begun_nothing() {
        let (set, networks) = (policies(Mode::Enforce), BTreeMap::new());
        let scene = Scene { set: &set, networks: &networks, now: "2026-11-20T12:00:00Z".parse().unwrap() };
        let answer = living("db", "web", 5432, 40000);
        assert!(living("web", "db", 40000, 5432).is_begun(&scene) && !answer.is_begun(&scene));
        assert!(Living { carried: true, ..answer.clone() }.is_begun(&scene), "the proxy's leg was judged at its door");
        assert!(!Living { from: Endpoint::Unknown(answer.tuple.source), ..living("web", "db", 40000, 5432) }.is_begun(&scene));
    }

    #[test]
    fn nothing_ends_in_learn_or_audit() {
        for mode in [Mode::Learn, Mode::Audit] {
            assert!(!ends(&policies(mode), &living("admin", "db", 40000, 5432)), "{mode}");
        }
    }

    #[test]
    fn a_quarantine_ends_what_was_allowed() {
        let mut set = policies(Mode::Enforce);
        set.quarantines.insert(workload("db"), Quarantine { workload: workload("db"), comment: String::new() });
        assert!(ends(&set, &living("web", "db", 40000, 5432)));
        assert!(ends(&set, &living("db", "web", 5432, 40000)));
    }

    #[test]
    fn a_preview_counts_by_edge_and_names_the_reason() {
        let set = policies(Mode::Enforce);
        let networks = BTreeMap::new();
        let scene = Scene { set: &set, networks: &networks, now: "2026-11-20T12:00:00Z".parse().unwrap() };
        let many: Vec<_> = (0..7).map(|n| living("admin", "db", 40000 + n, 5432)).chain([living("web", "db", 1, 5432)]).collect();

        let preview = preview(&scene, &many);

        assert_eq!(preview.len(), 1);
        assert_eq!((preview[0].connections, preview[0].examples.len()), (7, 5));
        assert!(preview[0].reason.contains("shop/admin"), "{}", preview[0].reason);
    }
}
