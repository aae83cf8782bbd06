//! FlowGraph -> Suggestion: the least privilege that allows what was seen. Deterministic, to the byte: the same graph and context
//! give the same suggestions, in whatever order the reports came in.
//!
//! It proposes; it never decides. What an edge is worth is sorted in `sort`, how wide a port is opened to the outside in
//! `outside`, what an approval names in `digest`; what a person should know is said by [`crate::check`], how much is unseen by
//! [`crate::estimate`].
//!
//! # Why
//! Exact by default: exact ports, workloads by name, addresses outside as /32 and /128. The one widening there is (clients of a
//! published port) says what was seen and how to narrow it. Nothing is dropped in silence: an edge is a rule, or it is shown with
//! the reason why it is none.

mod context;
pub(crate) mod digest;
pub(crate) mod outside;
mod sort;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

pub use self::context::{Context, EMBEDDED_RESOLVER, FromOutside, Known, Options, Rejected, Revision, Window, known};
use self::outside::{Choice, choose};
pub(crate) use self::sort::Why;
use self::sort::{Sorted, Touched, sort};
use crate::check::{self, HalfApproved, Material, half_approved};
use crate::estimate;
use crate::evidence::Evidence;
use crate::graph::{EdgeKey, FlowGraph};
use crate::policy_set::{Direction, Peer, Rule};
use crate::service::{Ports, Service};
use crate::suggestion::{NotProposed, Origin, ProposedRule, RuleState, Suggestion};
use crate::workload::{Endpoint, Workload};

/// Edges listed behind one rule; its evidence counts all of them.
pub const EDGES_LISTED: usize = 64;
/// Edges listed as not proposed between one pair of endpoints: a port scan has thousands.
const SHOWN_PER_PAIR: usize = 16;
/// Edges listed as not proposed, over all.
const SHOWN: usize = 256;

/// The port of DNS (RFC 1035, 4.2), over UDP and TCP.
const DNS: [Service; 2] = [Service { protocol: crate::Protocol::Udp, port: 53 }, Service { protocol: crate::Protocol::Tcp, port: 53 }];

/// One suggestion for every workload that is known or was seen, in the order of their names.
pub fn learn(graph: &FlowGraph, context: &Context) -> Vec<Suggestion> {
    let touched = Touched::all(graph);
    let halves = half_approved(&context.policies, context.now);
    let seen = graph.endpoints().filter_map(Endpoint::workload);
    let workloads: BTreeSet<&Workload> = context.workloads.keys().chain(context.policies.keys()).chain(seen).collect();
    workloads.into_iter().map(|workload| suggest(graph, context, &touched, &halves, workload)).collect()
}

/// The suggestion for one workload: what [`learn`] would say of it, without looking at the rest.
pub fn learn_one(graph: &FlowGraph, context: &Context, workload: &Workload) -> Suggestion {
    let touched = Touched::around(graph, &Endpoint::Workload(workload.clone()));
    let halves = half_approved(&context.policies, context.now);
    suggest(graph, context, &touched, &halves, workload)
}

/// Whose suggestions one more report on an edge may change: its ends, and every workload that the same source touched without
/// carrying data, since whether that is a scan depends on all of them.
pub fn affected(graph: &FlowGraph, edge: &EdgeKey) -> BTreeSet<Workload> {
    let of_source = graph.touching(&edge.from).into_iter().filter(|(key, seen)| key.from == edge.from && seen.established == 0);
    let touched = of_source.filter_map(|(key, _)| key.to.workload().cloned());
    let ends = [&edge.from, &edge.to].into_iter().filter_map(|end| end.workload().cloned());
    ends.chain(touched).collect()
}

/// A rule in the making: why, and the edges behind it.
struct Draft<'g> {
    origin: Origin,
    until: Option<jiff::Timestamp>,
    edges: BTreeMap<EdgeKey, &'g Evidence>,
}

type Drafts<'g> = BTreeMap<(Direction, Peer, Ports), Draft<'g>>;

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

fn draft<'d, 'g>(drafts: &'d mut Drafts<'g>, direction: Direction, peer: Peer, ports: Ports, origin: Origin) -> &'d mut Draft<'g> {
    let fresh = || Draft { origin, until: None, edges: BTreeMap::new() };
    let draft = drafts.entry((direction, peer, ports)).or_insert_with(fresh);
    if rank(origin) < rank(draft.origin) {
        draft.origin = origin;
    }
    draft
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

/// Everything that was read off the graph for one workload.
#[derive(Default)]
struct Read<'g> {
    drafts: Drafts<'g>,
    /// Clients outside by port, with their edges.
    clients: BTreeMap<Ports, BTreeMap<IpAddr, (EdgeKey, &'g Evidence)>>,
    shown: Vec<(EdgeKey, &'g Evidence, Why)>,
    /// Edges in use, each once.
    used: BTreeMap<EdgeKey, &'g Evidence>,
    all: Vec<&'g Evidence>,
}

fn read<'g>(graph: &'g FlowGraph, touched: &Touched, options: &Options, workload: &Workload) -> Read<'g> {
    let own = Endpoint::Workload(workload.clone());
    let mut read = Read::default();
    let mut edges = graph.touching(&own);
    edges.extend(graph.touching(&Endpoint::Run(workload.clone())));
    edges.sort_by(|a, b| a.0.cmp(&b.0));
    edges.dedup_by(|a, b| a.0 == b.0);
    for (key, evidence) in edges {
        read.all.push(evidence);
        let scan_targets = usize::try_from(options.scan_targets).unwrap_or(usize::MAX);
        let (ports, origin) = match sort(&key, evidence, touched.by(&key.from), scan_targets) {
            Sorted::Shown(why) => {
                read.shown.push((key, evidence, why));
                continue;
            }
            Sorted::Proposed(ports, origin) => (ports, origin),
        };
        if origin != Origin::DeniedAttempt {
            read.used.insert(key.clone(), evidence);
        }
        if key.from == own
            && let Some(peer) = peer_of(&key.to)
        {
            draft(&mut read.drafts, Direction::Egress, peer, ports, origin).edges.insert(key.clone(), evidence);
        }
        if key.to == own {
            if let Endpoint::Outside(address) = key.from {
                read.clients.entry(ports).or_default().insert(address, (key.clone(), evidence));
            } else if let Some(peer) = peer_of(&key.from) {
                draft(&mut read.drafts, Direction::Ingress, peer, ports, origin).edges.insert(key.clone(), evidence);
            }
        }
    }
    read
}

/// Turns clients outside into rules, as wide as the options say.
fn from_outside(read: &mut Read<'_>, context: &Context, options: &Options, workload: &Workload) -> Vec<Choice> {
    let mut choices = Vec::new();
    for (ports, clients) in std::mem::take(&mut read.clients) {
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
                let edges = held.iter().filter_map(|address| clients.get(address));
                for (key, evidence) in edges {
                    let origin = if evidence.established + evidence.connected_no_data > 0 { Origin::Observed } else { Origin::OneWay };
                    let draft = draft(&mut read.drafts, Direction::Ingress, Peer::Outside(*net), ports, origin);
                    draft.edges.insert(key.clone(), evidence);
                }
            }
            choices.push(choice);
        }
    }
    choices
}

/// Offers the other side of what is approved elsewhere.
fn counterparts(drafts: &mut Drafts<'_>, halves: &[HalfApproved], workload: &Workload) {
    for half in halves.iter().filter(|half| half.missing_on() == workload) {
        let (direction, peer) = match half.missing {
            Direction::Egress => (Direction::Egress, &half.to),
            Direction::Ingress => (Direction::Ingress, &half.from),
        };
        let key = (direction, Peer::Workload(peer.clone()), half.ports);
        match drafts.get_mut(&key) {
            None => draft(drafts, direction, key.1, half.ports, Origin::Counterpart).until = half.until,
            // Approved on one side by a person: no longer an attempt that nobody asked for.
            Some(draft) if draft.origin == Origin::DeniedAttempt => {
                draft.origin = Origin::Counterpart;
                draft.until = half.until;
            }
            Some(_) => {}
        }
    }
}

fn suggest(graph: &FlowGraph, context: &Context, touched: &Touched, halves: &[HalfApproved], workload: &Workload) -> Suggestion {
    let options = context.options_of(workload);
    let known = context.workloads.get(workload);
    let policy = context.policies.get(workload);
    let mut read = read(graph, touched, options, workload);
    let choices = from_outside(&mut read, context, options, workload);
    counterparts(&mut read.drafts, halves, workload);
    // Without any evidence there is nothing to add DNS to: a policy of DNS alone would look learned and isolate.
    if read.drafts.values().any(|draft| draft.origin != Origin::DeniedAttempt) {
        // A workload that is away for a moment keeps its rules, or every restart would move the digest.
        let assumed = [Peer::address(IpAddr::V4(EMBEDDED_RESOLVER))].into();
        for resolver in known.map_or(&assumed, |known| &known.resolvers) {
            for service in DNS {
                draft(&mut read.drafts, Direction::Egress, resolver.clone(), Ports::from(service), Origin::NeededByEngine);
            }
        }
    }

    let state = |direction: Direction, rule: &Rule| {
        let in_force = |policy: &&crate::WorkloadPolicy| {
            policy.rules(direction).iter().any(|approved| approved.in_force(context.now) && check::covers(approved, rule))
        };
        if policy.as_ref().is_some_and(in_force) {
            RuleState::Approved
        } else if context.rejected.contains(&Rejected::of(workload, direction, rule)) {
            RuleState::Rejected
        } else {
            RuleState::Undecided
        }
    };
    let rules: Vec<ProposedRule> = read
        .drafts
        .into_iter()
        .map(|((direction, peer, ports), draft)| {
            let rule = Rule { peer, ports, until: draft.until };
            let mut evidence = Evidence::default();
            draft.edges.values().for_each(|seen| evidence.merge(seen));
            ProposedRule {
                id: digest::rule_id(direction, &rule),
                direction,
                origin: draft.origin,
                state: state(direction, &rule),
                evidence,
                edges: draft.edges.into_keys().take(EDGES_LISTED).collect(),
                rule,
            }
        })
        .collect();

    let window = context.windows.get(workload);
    let (mut coverage, phase) = estimate::coverage(read.used.values().copied(), window, options);
    coverage.notes.extend(known.is_none().then(|| "not known to the engine now: its resolver is taken to be the engine's own".to_owned()));
    let not_proposed = listed(&read.shown);
    let material = Material {
        workload,
        known,
        policy,
        guardrails: &context.guardrails,
        rules: &rules,
        used: &read.used,
        shown: &read.shown.iter().map(|(key, evidence, why)| (key, *evidence, why)).collect::<Vec<_>>(),
        choices: &choices,
        halves,
        window,
        coverage: &coverage,
        unlisted: read.shown.len() - not_proposed.len(),
        stable_hours: options.stable_hours,
        now: context.now,
    };
    let findings = check::findings(&material);

    let digest = digest::digest(workload, &rules, options, &findings);
    let revision = match context.previous.get(workload) {
        None => 1,
        Some(previous) if previous.digest == digest => previous.revision,
        Some(previous) => previous.revision + 1,
    };
    Suggestion {
        workload: workload.clone(),
        revision,
        digest,
        phase,
        rules,
        findings,
        not_proposed,
        coverage,
        updated: read.all.iter().filter_map(|evidence| evidence.last).max(),
    }
}

/// What is listed as not proposed: a few of each pair, so that a port scan does not bury the rest. The count of what is left out
/// is a finding.
fn listed(shown: &[(EdgeKey, &Evidence, Why)]) -> Vec<NotProposed> {
    let mut by_pair: BTreeMap<(Endpoint, Endpoint), usize> = BTreeMap::new();
    let few = |key: &EdgeKey, by_pair: &mut BTreeMap<(Endpoint, Endpoint), usize>| {
        let count = by_pair.entry((key.from.clone(), key.to.clone())).or_default();
        *count += 1;
        *count <= SHOWN_PER_PAIR
    };
    shown
        .iter()
        .filter(|(key, _, _)| few(key, &mut by_pair))
        .take(SHOWN)
        .map(|(edge, evidence, why)| NotProposed { edge: edge.clone(), evidence: (*evidence).clone(), why: why.to_string() })
        .collect()
}
