//! How much is kept of who goes to ever new places, or of ever new clients: the graph is what every agent and the controller have in
//! memory, and anybody who can send packets writes to it.
//!
//! # What has the room of nobody else
//! What comes from any address is counted apart from what a workload does itself, what it does among workloads apart from what it does
//! outside, what carried data apart from what came to nothing, and each port apart from the others where a client connected. So what a
//! workload uses is left out only where it uses more than anybody reviews rule by rule: a proxy or a crawler under one wide rule, two that
//! work together on all their ports, or one with somebody outside who has many addresses. What is left out is counted, and where a rule
//! might have been learned from it, the suggestion of the end that it is counted with is not called stable, and no promotion comes by itself.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{EdgeDelta, FlowGraph};
use crate::evidence::Evidence;
use crate::private::private_network;
use crate::service::Service;
use crate::workload::Endpoint;

/// Edges of one workload (or the host) that never carried data: to others of them; to addresses; and from addresses, tried and come to
/// nothing. Each of the three by itself. A scan is known for one after five edges; a whole network of 4,096 addresses can be listed.
pub const ATTEMPTS: usize = 4096;

/// Edges of one workload (or the host) that carried data, to others of them. Ports that a protocol chooses anew each time (the data connections of
/// FTP) are up to 28,232 between two ends (net.ipv4.ip_local_port_range).
pub const USES: usize = 131_072;

/// The same, to addresses.
pub const REACHED: usize = 65_536;

/// Clients outside of one end of which UDP was heard and never answered: of one address family, public or of one private network.
pub const SILENT: usize = 16_384;

/// Clients outside that connected to one port of one end: of one address family, public or of one private network. What is proposed for so
/// many is their network or anyone, unless a person rejected a part of it.
pub const CLIENTS: usize = 65_536;

/// The same to all its ports.
pub const CLIENTS_IN_ALL: usize = 262_144;

/// Of what an edge is one more. Each has a number of edges that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Crowd {
    /// With data, between workloads and the host.
    Uses,
    /// With data, to an address.
    Reached,
    /// Without data, between workloads and the host.
    Within,
    /// Without data, to an address.
    Outward,
    /// From an address, and came to nothing.
    Knocks,
    Silent(Kind),
    Clients(Service, Kind),
}

/// With which of its ends an edge is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    From,
    To,
    Nobody,
}

impl Holder {
    pub(super) fn end<T>(self, from: T, to: T) -> Option<T> {
        match self {
            Self::From => Some(from),
            Self::To => Some(to),
            Self::Nobody => None,
        }
    }
}

/// What tells one rule for the outside from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    is_ipv4: bool,
    private: Option<IpNet>,
}

impl Kind {
    fn of(address: IpAddr) -> Self {
        Self { is_ipv4: address.is_ipv4(), private: private_network(address) }
    }
}

impl Crowd {
    fn room(self) -> usize {
        match self {
            Self::Uses => USES,
            Self::Reached => REACHED,
            Self::Within | Self::Outward | Self::Knocks => ATTEMPTS,
            Self::Silent(_) => SILENT,
            Self::Clients(..) => CLIENTS,
        }
    }

    /// Which crowd an edge is of, and with which of its ends it is counted.
    pub(super) fn of(from: &Endpoint, to: &Endpoint, service: Service, seen: &Evidence) -> (Holder, Self) {
        let carried = seen.established > 0;
        // No rule is learned from what nobody's address said or was told.
        let unknown = [from, to].iter().any(|end| matches!(end, Endpoint::Unknown(_)));
        match (from_anywhere(from), from_anywhere(to)) {
            (None, None) if carried => (Holder::From, Self::Uses),
            (None, None) => (Holder::From, Self::Within),
            (None, Some(_)) if carried && !unknown => (Holder::From, Self::Reached),
            (None, Some(_)) => (Holder::From, Self::Outward),
            (Some(address), server) => {
                let holder = if server.is_none() { Holder::To } else { Holder::Nobody };
                let kind = Kind::of(address);
                let crowd = match () {
                    () if unknown => Self::Knocks,
                    // Both take a whole handshake, which nobody makes with an address that is not its own.
                    () if carried || seen.connected_no_data > 0 => Self::Clients(service, kind),
                    () if seen.one_way > 0 => Self::Silent(kind),
                    () => Self::Knocks,
                };
                (holder, crowd)
            }
        }
    }
}

/// The address of an end of which there can be any number: whoever sends chooses it.
fn from_anywhere(end: &Endpoint) -> Option<IpAddr> {
    match end {
        Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } | Endpoint::Unknown(address) => Some(*address),
        Endpoint::Workload(_) | Endpoint::Run(_) | Endpoint::Host => None,
    }
}

/// How many edges of each crowd there are with one end.
#[derive(Clone, Debug, Default)]
pub(super) struct Crowds {
    uses: usize,
    reached: usize,
    /// Of all [`Crowd::Clients`].
    clients: usize,
    /// Most have none of these.
    others: BTreeMap<Crowd, usize>,
}

impl Crowds {
    pub(super) fn add(&mut self, crowd: Crowd) {
        match crowd {
            Crowd::Uses => self.uses += 1,
            Crowd::Reached => self.reached += 1,
            Crowd::Within | Crowd::Outward | Crowd::Knocks | Crowd::Silent(_) | Crowd::Clients(..) => {
                self.clients += usize::from(matches!(crowd, Crowd::Clients(..)));
                *self.others.entry(crowd).or_default() += 1;
            }
        }
    }

    /// One that was added.
    pub(super) fn take(&mut self, crowd: Crowd) {
        match crowd {
            Crowd::Uses => self.uses -= 1,
            Crowd::Reached => self.reached -= 1,
            Crowd::Within | Crowd::Outward | Crowd::Knocks | Crowd::Silent(_) | Crowd::Clients(..) => {
                self.clients -= usize::from(matches!(crowd, Crowd::Clients(..)));
                if let Some(count) = self.others.get_mut(&crowd) {
                    *count -= 1;
                    if *count == 0 {
                        self.others.remove(&crowd);
                    }
                }
            }
        }
    }

    /// Whether as many are listed as have room by themselves.
    fn has_its_room(&self, crowd: Crowd) -> bool {
        self.others.get(&crowd).is_some_and(|&count| count >= crowd.room())
    }

    fn is_full(&self, crowd: Crowd) -> bool {
        let count = match crowd {
            Crowd::Uses => self.uses,
            Crowd::Reached => self.reached,
            Crowd::Within | Crowd::Outward | Crowd::Knocks | Crowd::Silent(_) | Crowd::Clients(..) => {
                self.others.get(&crowd).copied().unwrap_or_default()
            }
        };
        count >= crowd.room() || matches!(crowd, Crowd::Clients(..)) && self.clients >= CLIENTS_IN_ALL
    }
}

/// Reports that were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftOut {
    /// The end that has no room for more; `None`: between addresses of which none is a workload's or the host's.
    pub end: Option<Endpoint>,
    /// How many reports.
    pub reports: u64,
    /// How many flows of those a rule might have been learned from.
    pub uses: u64,
}

impl FlowGraph {
    /// Whether there is room for what a report says: its edge is there already, or one more of its kind is kept. Ask before
    /// [`FlowGraph::add`], which adds whatever it is given, and give it to [`FlowGraph::leave_out`] if there is none.
    pub fn has_room(&self, delta: &EdgeDelta) -> bool {
        let EdgeDelta { key, seen } = delta;
        let of = |seen: &Evidence| Crowd::of(&key.from, &key.to, key.service, seen);
        let is_full = |holder: Holder, crowd| {
            let crowds = match holder.end(&key.from, &key.to) {
                Some(end) => self.nodes.get(end).map(|&index| &self.graph[index].crowds),
                None => Some(&self.nobodys),
            };
            crowds.is_some_and(|crowds| crowds.is_full(crowd))
        };
        let Some(there) = self.get(key) else {
            let (holder, crowd) = of(seen);
            // More bytes of a flow travel alone. It may be one that was left out, of another crowd than they are.
            let begins = seen.used() > 0 || seen.attempts() > 0 || seen.denied > 0 || seen.would_deny > 0;
            let known = begins || !self.left_out.contains_key(&holder.end(&key.from, &key.to).cloned());
            return known && !is_full(holder, crowd);
        };
        // What is seen of it may make it one more of another crowd.
        let both = Evidence {
            established: there.established.saturating_add(seen.established),
            connected_no_data: there.connected_no_data.saturating_add(seen.connected_no_data),
            one_way: there.one_way.saturating_add(seen.one_way),
            ..Evidence::default()
        };
        let (holder, crowd) = of(&both);
        of(there) == (holder, crowd) || !is_full(holder, crowd)
    }

    /// Counts a report that there is no room for.
    pub fn leave_out(&mut self, delta: &EdgeDelta) {
        let EdgeDelta { key, seen } = delta;
        let (holder, crowd) = Crowd::of(&key.from, &key.to, key.service, seen);
        // One client more of so many on one port changes no rule, and no rule is learned from these.
        let is_no_evidence = |end: &Endpoint| matches!(end, Endpoint::Unknown(_) | Endpoint::Run(_));
        let of_many = matches!(crowd, Crowd::Clients(..))
            && holder
                .end(&key.from, &key.to)
                .and_then(|end| self.nodes.get(end))
                .is_some_and(|&at| self.graph[at].crowds.has_its_room(crowd));
        let teaches = key.direction_known && !of_many && ![&key.from, &key.to].into_iter().any(is_no_evidence);
        let uses = if teaches { seen.used() } else { 0 };
        let counted = self.left_out.entry(holder.end(&key.from, &key.to).cloned()).or_default();
        *counted = (counted.0.saturating_add(1), counted.1.saturating_add(uses));
    }

    /// What was left out since this graph began.
    pub fn left_out(&self) -> impl Iterator<Item = LeftOut> {
        self.left_out.iter().map(|(end, &(reports, uses))| LeftOut { end: end.clone(), reports, uses })
    }
}

/// What a person is told of an end that has no room for more; see [`LeftOut`].
pub fn no_room(end: Option<&Endpoint>) -> String {
    let advice = match end {
        Some(Endpoint::Workload(_) | Endpoint::Run(_)) => ". If it goes to ever new places and should not, quarantine it",
        Some(_) | None => "",
    };
    let who = end.map_or_else(|| "between addresses that are no workload's".to_owned(), |end| format!("of {end}"));
    format!(
        "{who} there are more peers than the graph lists. It lists {USES} with data among workloads and {REACHED} outside, {ATTEMPTS} without \
         data (among workloads, tried outside, and from outside: each by itself), {SILENT} outside whose UDP was not answered, {CLIENTS} \
         clients outside on one port ({CLIENTS_IN_ALL} on all); further ones are counted{advice}"
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::graph::EdgeKey;

    fn end(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    fn address(n: u32) -> Endpoint {
        Endpoint::Outside(Ipv4Addr::from(u32::from(Ipv4Addr::new(203, 0, 0, 0)) + n).into())
    }

    fn delta(from: Endpoint, to: Endpoint, service: &str, seen: Evidence) -> EdgeDelta {
        EdgeDelta { key: EdgeKey { from, to, service: service.parse().unwrap(), direction_known: true }, seen }
    }

    fn refused() -> Evidence {
        Evidence { refused: 1, ..Evidence::default() }
    }

    fn carried() -> Evidence {
        let mut hours = crate::HourSet::default();
        hours.insert(7);
        Evidence { established: 1, hours, ..Evidence::default() }
    }

    fn offer(graph: &mut FlowGraph, delta: &EdgeDelta) -> bool {
        let room = graph.has_room(delta);
        match room {
            true => drop(graph.add(delta)),
            false => graph.leave_out(delta),
        }
        room
    }

    /// Offers these until one is left out.
    fn fill(graph: &mut FlowGraph, deltas: impl Iterator<Item = EdgeDelta>) -> usize {
        deltas.take_while(|delta| offer(graph, delta)).count()
    }

    #[test]
    fn who_tries_ever_new_places_is_listed_with_so_many_and_what_it_uses_is_kept_all_the_same() {
        let mut graph = FlowGraph::new();
        let attempts = |from: &str| {
            let from = end(from);
            (0..).map(move |n| delta(from.clone(), address(n), "tcp/443", refused()))
        };
        assert_eq!(fill(&mut graph, attempts("p/a")), ATTEMPTS);
        assert_eq!(graph.left_out().collect::<Vec<_>>(), [LeftOut { end: Some(end("p/a")), reports: 1, uses: 0 }]);
        assert!(offer(&mut graph, &delta(end("p/a"), address(0), "tcp/443", refused())), "an edge that is there grows");
        assert!(offer(&mut graph, &delta(end("p/a"), address(1 << 20), "tcp/443", carried())));
        assert!(offer(&mut graph, &delta(end("p/b"), address(1 << 20), "tcp/443", refused())), "another has room of its own");
        // One of those that were tried answers: room for another.
        assert!(offer(&mut graph, &delta(end("p/a"), address(0), "tcp/443", carried())));
        assert!(offer(&mut graph, &delta(end("p/a"), address(1 << 21), "tcp/443", refused())));
        assert!(!offer(&mut graph, &delta(end("p/a"), address(1 << 22), "tcp/443", refused())));
        assert_eq!(graph.len(), ATTEMPTS + 3);
    }

    #[test]
    fn what_carries_data_is_bounded_too_and_what_is_left_out_is_told_as_use() {
        let mut graph = FlowGraph::new();
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(end("p/a"), address(n), "tcp/443", carried()))), REACHED);
        let on_every_port = (1..=3).flat_map(|peer| (1..=u16::MAX).map(move |port| (peer, port)));
        let uses = on_every_port.map(|(peer, port)| delta(end("p/a"), end(&format!("p/peer{peer}")), &format!("tcp/{port}"), carried()));
        assert_eq!(fill(&mut graph, uses), USES);
        assert!(offer(&mut graph, &delta(end("p/a"), address(0), "tcp/443", carried())), "what is there grows");
        assert!(offer(&mut graph, &delta(end("p/b"), end("p/a"), "tcp/1", carried())), "another has room of its own");
        assert!(offer(&mut graph, &delta(end("p/a"), address(1 << 22), "tcp/443", refused())), "what is tried has other room");
        assert!(!offer(&mut graph, &delta(end("p/a"), address(1 << 22), "tcp/443", carried())), "and is not used by it");
        assert_eq!(graph.left_out().collect::<Vec<_>>(), [LeftOut { end: Some(end("p/a")), reports: 3, uses: 3 }]);
        assert_eq!(graph.len(), REACHED + USES + 2);
    }

    #[test]
    fn who_comes_from_ever_new_addresses_is_counted_with_whom_it_tries() {
        let mut graph = FlowGraph::new();
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(address(n), end("p/a"), "tcp/22", refused()))), ATTEMPTS);
        assert!(!offer(&mut graph, &delta(address(1 << 20), end("p/a"), "tcp/23", refused())));
        let unknown = |n: u32| Endpoint::Unknown(Ipv4Addr::from(n).into());
        assert!(!offer(&mut graph, &delta(unknown(7), end("p/a"), "tcp/22", carried())), "nothing is learned from nobody");
        assert!(offer(&mut graph, &delta(address(1 << 20), end("p/a"), "tcp/80", carried())), "a client is a client");
        assert!(offer(&mut graph, &delta(end("p/b"), end("p/a"), "tcp/22", refused())), "a workload tries with its own room");
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(unknown(n), address(n), "tcp/22", carried()))), ATTEMPTS);
        assert_eq!(graph.left_out().find(|left| left.end.is_none()).map(|left| left.reports), Some(1));
    }

    #[test]
    fn clients_outside_are_kept_by_port_and_kind_since_each_is_another_rule() {
        let mut graph = FlowGraph::new();
        let clients = (0..).map(|n| delta(address(n), end("p/web"), "tcp/443", carried()));
        assert_eq!(fill(&mut graph, clients), CLIENTS);
        let first = ["outside:192.168.0.1", "outside:2001:db8::1"];
        assert!(first.iter().all(|client| offer(&mut graph, &delta(end(client), end("p/web"), "tcp/443", carried()))));
        assert!(offer(&mut graph, &delta(address(1 << 22), end("p/web"), "tcp/444", carried())));
        assert!(!offer(&mut graph, &delta(address(1 << 22), end("p/web"), "tcp/443", carried())));
        let silent = |n| delta(address(n), end("p/web"), "udp/514", Evidence { one_way: 1, ..Evidence::default() });
        assert_eq!(fill(&mut graph, (0..).map(silent)), SILENT);
        let check = Evidence { connected_no_data: 2, ..Evidence::default() };
        assert!(offer(&mut graph, &delta(address(1 << 22), end("p/web"), "tcp/8080", check)), "a health check of another port");
        let left: Vec<_> = graph.left_out().collect();
        assert_eq!(left, [LeftOut { end: Some(end("p/web")), reports: 3, uses: 1 }], "further clients are no further rule");
    }

    #[test]
    fn clients_outside_on_ever_new_ports_are_bounded_too_and_told_as_use() {
        let mut graph = FlowGraph::new();
        let ports = (1..=8).flat_map(|port| (0..40_000).map(move |n| (port, n)));
        let clients = ports.map(|(port, n)| delta(address(n), end("p/web"), &format!("tcp/{port}"), carried()));
        assert_eq!(fill(&mut graph, clients), CLIENTS_IN_ALL);
        assert!(!offer(&mut graph, &delta(address(0), end("p/web"), "tcp/9", carried())), "another port, and another rule");
        assert_eq!(graph.left_out().map(|left| left.uses).collect::<Vec<_>>(), [2]);
        assert!(offer(&mut graph, &delta(address(0), end("p/db"), "tcp/9", carried())), "another has room of its own");
    }

    #[test]
    fn nobody_takes_the_room_of_what_a_rule_is_learned_from() {
        let mut graph = FlowGraph::new();
        let denied = || Evidence { denied: 1, ..Evidence::default() };
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(address(n), end("p/a"), "tcp/22", refused()))), ATTEMPTS, "from outside");
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(end("p/a"), address(n), "tcp/443", denied()))), ATTEMPTS, "at a CDN");
        for seen in [
            Evidence { one_way: 3, ..Evidence::default() },
            Evidence { connected_no_data: 3, ..Evidence::default() },
            denied(),
            Evidence { would_deny: 1, ..Evidence::default() },
        ] {
            let port = 1 + graph.len() % 60_000;
            assert!(offer(&mut graph, &delta(end("p/a"), end("p/b"), &format!("tcp/{port}"), seen)));
        }
        assert!(offer(&mut graph, &delta(address(1 << 22), end("p/a"), "udp/514", Evidence { one_way: 3, ..Evidence::default() })));
    }

    #[test]
    fn what_was_left_out_comes_in_by_no_other_crowd() {
        let grew = || Evidence { established: 0, bytes_sent: 9, ..carried() };
        for (seen, most, service) in [(carried(), CLIENTS, "tcp/443"), (Evidence { one_way: 1, ..Evidence::default() }, SILENT, "udp/514")]
        {
            let mut graph = FlowGraph::new();
            let client = |n: u32, seen: &Evidence| delta(address(n), end("p/web"), service, seen.clone());
            assert_eq!(fill(&mut graph, (0..).map(|n| client(n, &seen))), most);
            assert!(!offer(&mut graph, &client(1 << 22, &grew())), "{service}: more bytes of it");
            assert!(offer(&mut graph, &client(0, &grew())), "{service}: of one that is there");
            assert!(offer(&mut graph, &client(1 << 22, &refused())), "{service}: an attempt is another thing");
            assert!(!offer(&mut graph, &client(1 << 22, &seen)), "{service}: from there it does not get in either");
            assert!(offer(&mut graph, &client(1, &refused())), "{service}: what is there stays what it is");
            assert_eq!(graph.len(), most + 1);
        }
    }

    #[test]
    fn more_bytes_of_a_flow_that_was_left_out_are_left_out_with_it() {
        let mut graph = FlowGraph::new();
        let one_way = || Evidence { established: 0, one_way: 1, ..carried() };
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(end("p/a"), address(n), "udp/443", one_way()))), ATTEMPTS);
        let grew = || Evidence { established: 0, bytes_sent: 9, ..carried() };
        assert!(!offer(&mut graph, &delta(end("p/a"), address(1 << 20), "udp/443", grew())));
        assert!(offer(&mut graph, &delta(end("p/a"), address(0), "udp/443", grew())));
        assert_eq!(graph.left_out().map(|left| (left.reports, left.uses)).collect::<Vec<_>>(), [(2, 1)]);
    }
}
