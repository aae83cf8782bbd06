//! How much is kept of who goes to ever new places, or of ever new clients: the graph is what every agent and the controller have in
//! memory, and anybody who can send packets writes to it.
//!
//! # What is never left out
//! What a rule is learned from: an edge between workloads, the host and where a workload goes outside, as soon as it carried data.
//! That takes an answer from the other end. What is left out is counted.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{EdgeDelta, FlowGraph, Holder};
use crate::evidence::Evidence;
use crate::private::private_network;
use crate::service::Service;
use crate::workload::Endpoint;

/// Edges that never carried data, of one workload or of the host: those that it tried, and those by which it was tried from outside. A
/// scan is known for one after five; a whole network of 4,096 addresses can be listed.
pub const ATTEMPTS: usize = 4096;

/// Clients outside of one end that carried no data: connections without payload, and UDP that it never answered. Of one address family,
/// public or of one private network.
pub const SILENT: usize = 16_384;

/// Clients outside on one port of one end: of one address family, public or of one private network. What is proposed for so many is their network or
/// anyone, unless one asks for exact hosts.
pub const CLIENTS: usize = 65_536;

/// Of what an edge is one more. Each has a number of edges that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Crowd {
    Attempts,
    Silent(Kind),
    Clients(Service, Kind),
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
            Self::Attempts => ATTEMPTS,
            Self::Silent(_) => SILENT,
            Self::Clients(..) => CLIENTS,
        }
    }

    /// Which crowd an edge is of, and with which of its ends it is counted; `None`: it is kept whatever there is.
    pub(super) fn of(from: &Endpoint, to: &Endpoint, service: Service, seen: &Evidence) -> Option<(Holder, Self)> {
        let holder = match (from_anywhere(from), from_anywhere(to)) {
            (None, _) => Holder::From,
            (Some(_), None) => Holder::To,
            (Some(_), Some(_)) => Holder::Nobody,
        };
        let is_used = seen.used() > 0 || seen.hours.hours() > 0;
        // More bytes of a flow that was told before travel alone.
        let carried = seen.established > 0 || (seen.used() == 0 && is_used);
        let unknown = [from, to].iter().any(|end| matches!(end, Endpoint::Unknown(_)));
        match (from_anywhere(from), holder) {
            // No rule is learned from it.
            _ if unknown => Some((holder, Self::Attempts)),
            (Some(address), Holder::To | Holder::Nobody) if carried => Some((holder, Self::Clients(service, Kind::of(address)))),
            (Some(address), Holder::To | Holder::Nobody) if is_used => Some((holder, Self::Silent(Kind::of(address)))),
            _ if carried => None,
            _ => Some((holder, Self::Attempts)),
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

/// How many edges of each crowd there are with one end. Most have none.
#[derive(Clone, Debug, Default)]
pub(super) struct Crowds(BTreeMap<Crowd, usize>);

impl Crowds {
    pub(super) fn add(&mut self, crowd: Crowd) {
        *self.0.entry(crowd).or_default() += 1;
    }

    pub(super) fn take(&mut self, crowd: Crowd) {
        if let Some(count) = self.0.get_mut(&crowd) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&crowd);
            }
        }
    }

    fn is_full(&self, crowd: Crowd) -> bool {
        self.0.get(&crowd).is_some_and(|&count| count >= crowd.room())
    }
}

impl FlowGraph {
    /// Whether a report is to be left out, since there is no room for one edge more of its kind with its workload; it is counted then. Ask
    /// before [`FlowGraph::add`], which adds whatever it is given.
    pub fn leaves_out(&mut self, delta: &EdgeDelta) -> bool {
        let key = &delta.key;
        let Some((holder, crowd)) = Crowd::of(&key.from, &key.to, key.service, &delta.seen) else { return false };
        let end = holder.end(&key.from, &key.to);
        let crowds = match end {
            Some(end) => self.nodes.get(end).map(|&index| &self.graph[index].crowds),
            None => Some(&self.nobodys),
        };
        if !crowds.is_some_and(|crowds| crowds.is_full(crowd)) || self.find(key).is_some() {
            return false;
        }
        *self.left_out.entry(end.cloned()).or_default() += 1;
        true
    }

    /// How many reports were left out, by the end that has no room for more; `None`: between ends of which none is a workload or the
    /// host. Since this graph began.
    pub fn left_out(&self) -> impl Iterator<Item = (Option<&Endpoint>, u64)> {
        self.left_out.iter().map(|(end, &reports)| (end.as_ref(), reports))
    }
}

/// What a person is told of an end that has no room for more; see [`FlowGraph::left_out`].
pub fn no_room(end: Option<&Endpoint>) -> String {
    let who = end.map_or_else(|| "between addresses that are no workload's".to_owned(), |end| format!("of {end}"));
    format!(
        "{who} there are more peers than the graph lists: from {ATTEMPTS} that it tried, or that tried it, without any data, or {CLIENTS} clients \
         outside on one port on, further ones are counted and not listed. See `bulkhead graph`; a workload that should not do so can be quarantined"
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
        let room = !graph.leaves_out(delta);
        if room {
            graph.add(delta);
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
        assert_eq!(graph.left_out().collect::<Vec<_>>(), [(Some(&end("p/a")), 1)]);
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
    fn who_comes_from_ever_new_addresses_is_counted_with_whom_it_tries() {
        let mut graph = FlowGraph::new();
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(address(n), end("p/a"), "tcp/22", refused()))), ATTEMPTS);
        assert!(!offer(&mut graph, &delta(address(1 << 20), end("p/a"), "tcp/23", refused())));
        let unknown = |n: u32| Endpoint::Unknown(Ipv4Addr::from(n).into());
        assert!(!offer(&mut graph, &delta(unknown(7), end("p/a"), "tcp/22", carried())), "nothing is learned from nobody");
        assert!(offer(&mut graph, &delta(address(1 << 20), end("p/a"), "tcp/80", carried())), "a client is a client");
        assert!(offer(&mut graph, &delta(end("p/b"), end("p/a"), "tcp/22", refused())), "a workload tries with its own room");
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(unknown(n), address(n), "tcp/22", carried()))), ATTEMPTS);
        assert_eq!(graph.left_out().find(|(end, _)| end.is_none()), Some((None, 1)));
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
        let one_way = || Evidence { one_way: 1, ..carried() };
        let silent = |n| delta(address(n), end("p/web"), "udp/514", Evidence { established: 0, ..one_way() });
        assert_eq!(fill(&mut graph, (0..).map(silent)), SILENT);
    }

    #[test]
    fn more_bytes_of_a_flow_are_no_attempt() {
        let mut graph = FlowGraph::new();
        assert_eq!(fill(&mut graph, (0..).map(|n| delta(end("p/a"), address(n), "tcp/443", refused()))), ATTEMPTS);
        let grew = Evidence { established: 0, bytes_sent: 9, ..carried() };
        assert!(offer(&mut graph, &delta(end("p/a"), address(1 << 20), "tcp/5432", grew)));
    }
}
