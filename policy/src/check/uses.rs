//! What was seen in use of one side of a workload, to be found by rule: a workload may have tens of thousands of both.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::graph::Seen;
use crate::policy_set::{Direction, Peer, Rule};
use crate::workload::{Endpoint, Workload};

/// By the other end.
#[derive(Default)]
pub(super) struct Uses<'a> {
    workloads: BTreeMap<&'a Workload, Vec<&'a Seen<'a>>>,
    host: Vec<&'a Seen<'a>>,
    /// By address, in order.
    outside: Vec<(IpAddr, &'a Seen<'a>)>,
}

impl<'a> Uses<'a> {
    pub(super) fn of(workload: &Workload, used: &'a [Seen<'a>], direction: Direction) -> Self {
        let mut uses = Self::default();
        for seen in used {
            let (own, other) = match direction {
                Direction::Egress => (seen.from, seen.to),
                Direction::Ingress => (seen.to, seen.from),
            };
            if own.workload() != Some(workload) {
                continue;
            }
            match other {
                Endpoint::Workload(peer) | Endpoint::Run(peer) => uses.workloads.entry(peer).or_default().push(seen),
                Endpoint::Host => uses.host.push(seen),
                Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } => uses.outside.push((*address, seen)),
                Endpoint::Unknown(_) => {}
            }
        }
        uses.outside.sort_by_key(|(address, _)| *address);
        uses
    }

    /// Those that a rule of this side means.
    pub(super) fn meant(&self, rule: &Rule) -> Vec<&'a Seen<'a>> {
        let holds = |seen: &&'a Seen<'a>| rule.ports.holds(seen.service);
        match &rule.peer {
            Peer::Workload(peer) => self.workloads.get(peer).into_iter().flatten().copied().filter(holds).collect(),
            Peer::Host => self.host.iter().copied().filter(holds).collect(),
            Peer::Outside(net) => {
                let begin = self.outside.partition_point(|(address, _)| *address < net.network());
                let inside = self.outside[begin..].iter().take_while(|(address, _)| *address <= net.broadcast());
                inside.map(|(_, seen)| *seen).filter(holds).collect()
            }
        }
    }
}
