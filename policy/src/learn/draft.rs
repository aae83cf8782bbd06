//! From the edges of one workload to rules in the making: which edges speak for which rule, and what is only shown.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;
use jiff::Timestamp;

use super::context::{Context, Options, Rejected};
use super::outside::{Choice, choose};
use super::sort::{Sorted, Why, sort};
use crate::check::HalfApproved;
use crate::graph::{FlowGraph, Seen};
use crate::policy_set::{Direction, Peer, Rule};
use crate::service::Ports;
use crate::suggestion::Origin;
use crate::workload::{Endpoint, Workload};

/// One edge that speaks for one rule.
struct Use<'g> {
    direction: Direction,
    peer: Peer,
    ports: Ports,
    origin: Origin,
    seen: Seen<'g>,
}

/// A rule in the making: why, and which of the uses are behind it.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) direction: Direction,
    pub(super) rule: Rule,
    pub(super) origin: Origin,
    uses: Range<usize>,
}

/// Everything that was read off the graph for one workload.
#[derive(Default)]
pub(super) struct Read<'g> {
    /// By direction, peer, ports; the edges of one rule in the order of their keys.
    uses: Vec<Use<'g>>,
    /// By direction, peer, ports: each once.
    pub(super) drafts: Vec<Draft>,
    pub(super) choices: Vec<Choice>,
    pub(super) shown: Vec<(Seen<'g>, Why)>,
    /// Edges in use, each once.
    pub(super) used: Vec<Seen<'g>>,
    /// The last that was seen of any edge.
    pub(super) updated: Option<Timestamp>,
}

/// Which reason is named where there are several: what needs it most.
fn rank(origin: Origin) -> u8 {
    match origin {
        Origin::NeededByEngine => 0,
        Origin::Observed => 1,
        Origin::OneWay => 2,
        Origin::Counterpart => 3,
        Origin::DeniedAttempt => 4,
    }
}

/// The peer that a rule names for the other end of an edge.
fn peer_of(endpoint: &Endpoint) -> Option<Peer> {
    match endpoint {
        Endpoint::Workload(workload) => Some(Peer::Workload(workload.clone())),
        Endpoint::Host => Some(Peer::Host),
        Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } => Some(Peer::address(*address)),
        Endpoint::Run(_) | Endpoint::Unknown(_) => None,
    }
}

/// Clients outside by port, with their edges.
pub(super) type Clients<'g> = BTreeMap<Ports, BTreeMap<IpAddr, Seen<'g>>>;

/// Every edge of a workload and of its one-off runs, in the order of their keys.
pub(super) fn edges_of<'g>(graph: &'g FlowGraph, workload: &Workload) -> Vec<Seen<'g>> {
    let mut edges = graph.around(&Endpoint::Workload(workload.clone()));
    let runs = graph.around(&Endpoint::Run(workload.clone()));
    if !runs.is_empty() {
        edges.extend(runs);
        edges.sort_by(by_key);
        // An edge between a service and its own one-off run.
        edges.dedup_by_key(|seen| seen.id);
    }
    edges
}

/// The order of the keys, without making one.
pub(super) fn by_key(a: &Seen<'_>, b: &Seen<'_>) -> Ordering {
    let ends = a.from.cmp(b.from).then_with(|| a.to.cmp(b.to));
    ends.then_with(|| (a.service, a.direction_known).cmp(&(b.service, b.direction_known)))
}

impl<'g> Read<'g> {
    /// Reads and drafts these edges, all in the order of their keys; what comes from other sources than the graph is added afterwards.
    pub(super) fn of(edges: Vec<Seen<'g>>, context: &Context, options: &Options, workload: &Workload) -> Self {
        let (mut read, clients) = Self::uses(edges, options, workload);
        read.add_clients(clients, context, options, workload);
        read.group();
        read
    }

    /// Tells use from what is only shown, and apart from both the clients outside: what is proposed for one of them depends on all.
    pub(super) fn uses(edges: Vec<Seen<'g>>, options: &Options, workload: &Workload) -> (Self, Clients<'g>) {
        let own = Endpoint::Workload(workload.clone());
        let scan_targets = usize::try_from(options.scan_targets).unwrap_or(usize::MAX);
        let mut read = Self::default();
        let (mut egress, mut clients) = (Vec::new(), Clients::new());
        for seen in edges {
            read.updated = read.updated.max(seen.evidence.last);
            let (ports, origin) = match sort(&seen, scan_targets) {
                Sorted::Shown(why) => {
                    read.shown.push((seen, why));
                    continue;
                }
                Sorted::Proposed(ports, origin) => (ports, origin),
            };
            if origin != Origin::DeniedAttempt {
                read.used.push(seen);
            }
            if *seen.from == own
                && let Some(peer) = peer_of(seen.to)
            {
                egress.push(Use { direction: Direction::Egress, peer, ports, origin, seen });
            }
            if *seen.to == own {
                if let Endpoint::Outside(address) = *seen.from {
                    clients.entry(ports).or_default().insert(address, seen);
                } else if let Some(peer) = peer_of(seen.from) {
                    read.uses.push(Use { direction: Direction::Ingress, peer, ports, origin, seen });
                }
            }
        }
        read.uses.append(&mut egress);
        (read, clients)
    }

    /// Takes out what came in from addresses outside.
    pub(super) fn take_from_outside(&mut self) -> impl Iterator<Item = Seen<'g>> {
        let from_outside = |used: &mut Use<'g>| used.direction == Direction::Ingress && matches!(used.peer, Peer::Outside(_));
        let taken: Vec<_> = self.uses.extract_if(.., from_outside).collect();
        taken.into_iter().map(|used| used.seen)
    }

    /// The edges that speak for a rule so far.
    pub(super) fn used_for_rules(&self) -> impl Iterator<Item = &Seen<'g>> {
        self.uses.iter().map(|used| &used.seen)
    }

    /// Turns clients outside into uses of rules as wide as the options say.
    fn add_clients(&mut self, clients: Clients<'g>, context: &Context, options: &Options, workload: &Workload) {
        for (ports, clients) in clients {
            let no = |rejected: &Rejected| match &rejected.peer {
                Peer::Outside(net) if rejected.workload == *workload && rejected.direction == Direction::Ingress => {
                    (rejected.ports == ports).then_some(*net)
                }
                Peer::Outside(_) | Peer::Workload(_) | Peer::Host => None,
            };
            let rejected: BTreeSet<IpNet> = context.rejected.iter().filter_map(no).collect();
            for choice in choose(ports, &clients.keys().copied().collect(), options, &rejected) {
                for (net, held) in &choice.networks {
                    // Every edge here is in use (a denied attempt from outside is only shown); one-way ones are marked as such if all are.
                    let uses = held.iter().filter_map(|address| clients.get(address)).map(|&seen| {
                        let connected = seen.evidence.established > 0 || seen.evidence.connected_no_data > 0;
                        let origin = if connected { Origin::Observed } else { Origin::OneWay };
                        Use { direction: Direction::Ingress, peer: Peer::Outside(*net), ports, origin, seen }
                    });
                    self.uses.extend(uses);
                }
                self.choices.push(choice);
            }
        }
    }

    /// Drafts a rule for each direction, peer and ports.
    pub(super) fn group(&mut self) {
        // Stable: the edges of one rule stay in the order of their keys. What the graph gives is in order already but for addresses.
        self.uses.sort_by(|a, b| compare((a.direction, &a.peer, a.ports), (b.direction, &b.peer, b.ports)));
        for (at, Use { direction, peer, ports, origin, .. }) in self.uses.iter().enumerate() {
            match self.drafts.last_mut() {
                Some(last) if (last.direction, &last.rule.peer, last.rule.ports) == (*direction, peer, *ports) => {
                    last.uses.end = at + 1;
                    last.needed_as(*origin);
                }
                Some(_) | None => {
                    let rule = Rule { peer: peer.clone(), ports: *ports, until: None };
                    self.drafts.push(Draft { direction: *direction, rule, origin: *origin, uses: at..at + 1 });
                }
            }
        }
    }

    fn find(&self, direction: Direction, peer: &Peer, ports: Ports) -> Result<usize, usize> {
        self.drafts.binary_search_by(|draft| compare((draft.direction, &draft.rule.peer, draft.rule.ports), (direction, peer, ports)))
    }

    fn insert(&mut self, at: usize, direction: Direction, rule: Rule, origin: Origin) {
        self.drafts.insert(at, Draft { direction, rule, origin, uses: 0..0 });
    }

    /// Offers the other side of what is approved elsewhere.
    pub(super) fn add_counterparts<'h>(&mut self, halves: impl IntoIterator<Item = &'h HalfApproved>, workload: &Workload) {
        for half in halves.into_iter().filter(|half| half.missing_on() == workload) {
            let (direction, peer) = (half.missing, Peer::Workload(half.peer().clone()));
            match self.find(direction, &peer, half.ports) {
                Err(at) => self.insert(at, direction, Rule { peer, ports: half.ports, until: half.until }, Origin::Counterpart),
                // Approved on one side by a person: no longer an attempt that nobody asked for.
                Ok(at) if self.drafts[at].origin == Origin::DeniedAttempt => {
                    self.drafts[at].origin = Origin::Counterpart;
                    self.drafts[at].rule.until = half.until;
                }
                Ok(_) => {}
            }
        }
    }

    /// Adds what the engine itself needs.
    pub(super) fn add_needed(&mut self, direction: Direction, peer: Peer, ports: Ports) {
        match self.find(direction, &peer, ports) {
            Ok(at) => self.drafts[at].needed_as(Origin::NeededByEngine),
            Err(at) => self.insert(at, direction, Rule { peer, ports, until: None }, Origin::NeededByEngine),
        }
    }

    /// The edges behind a draft, in the order of their keys.
    pub(super) fn behind(&self, draft: &Draft) -> impl Iterator<Item = &Seen<'g>> {
        self.uses[draft.uses.clone()].iter().map(|used| &used.seen)
    }
}

impl Draft {
    fn needed_as(&mut self, origin: Origin) {
        if rank(origin) < rank(self.origin) {
            self.origin = origin;
        }
    }
}

fn compare(a: (Direction, &Peer, Ports), b: (Direction, &Peer, Ports)) -> Ordering {
    a.cmp(&b)
}
