//! What is kept of a large workload between two learnings, so that one edge more asks for a part of its edges and not for all.
//!
//! # Why
//! A resolver, a database, a proxy of a large host has tens of thousands of edges. To read all of them for one that is new, and to
//! make and digest all its rules, is a wait for memory each: 34 ms for 35,000. So the edges are dealt by their other end, as the
//! digest deals the rules ([`super::digest`]), and of each part is kept what its edges come to.
//!
//! # How it stays the same
//! What comes of a part is a sum (of counts, of what the estimators ask), a digest, or a few *samples*: rules and edges of which the
//! findings say as many sentences as of all. The sentences themselves are not kept: who reads a suggestion has it made from
//! the graph. Where a part can't be judged by itself (clients outside on one port, few rules in all) the edges that speak for these
//! rules are read again. So an outline by parts is the outline from scratch, which a property test holds.
//!
//! What is in force is dealt likewise: a rule about one other end is compared with the edges of its part, one about a network with all
//! that go outside. A workload with a rule that ends by itself is read from scratch, since what is kept knows no time.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::{Discriminant, discriminant};

use jiff::Timestamp;

use super::digest::{self, PARTS, PartDigest, part_of, part_of_end};
use super::draft::{Clients, Read, by_key, edges_of};
use super::{Learner, SHOWN, SHOWN_PER_PAIR, SeenOf, Weights, Why, affected, outlined, weigh};
use crate::check::Proposal;
use crate::estimate::Sums;
use crate::graph::{EdgeId, EdgeKey, FlowGraph, Seen};
use crate::guardrail;
use crate::learn::FromOutside;
use crate::policy_set::{Direction, Peer, Rule, WorkloadPolicy};
use crate::private::private_network;
use crate::suggestion::{Finding, Origin, Outline, RuleState};
use crate::workload::{Endpoint, Workload};

/// Parts of every large workload. They hold for one graph that only grows, and for one context but for its time, its windows and what
/// was suggested before: when anything else changes, begin anew.
#[derive(Debug, Default)]
pub struct Kept(BTreeMap<Workload, Parts>);

impl Kept {
    /// Nothing is kept yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// More was seen of these edges, and the graph has it. Returns whose suggestions are behind now: each is [`affected`].
    pub fn note<'k>(&mut self, graph: &FlowGraph, edges: impl IntoIterator<Item = &'k EdgeKey>) -> BTreeSet<Workload> {
        let mut behind = BTreeSet::new();
        // A scan is one source with many edges: it is looked at once, not once an edge.
        let mut sources: BTreeSet<&Endpoint> = BTreeSet::new();
        for key in edges {
            behind.extend([&key.from, &key.to].into_iter().filter_map(|end| end.workload().cloned()));
            graph.find(key).into_iter().for_each(|id| self.mark(graph, id));
            if sources.insert(&key.from) {
                behind.extend(affected(graph, key));
                graph.touched_by(&key.from).for_each(|id| self.mark(graph, id));
            }
        }
        behind
    }

    fn mark(&mut self, graph: &FlowGraph, id: EdgeId) {
        let Some((from, to)) = graph.ends(id) else { return };
        for (own, other) in [(from, to), (to, from)] {
            if let Some(parts) = own.workload().and_then(|own| self.0.get_mut(own)) {
                parts.mark(id, part_of_end(other));
            }
        }
    }

    /// Takes out what is kept of a workload, for [`Learner::renew`].
    pub fn take(&mut self, workload: &Workload) -> Option<Parts> {
        self.0.remove(workload)
    }

    /// Keeps what came of it.
    pub fn put(&mut self, workload: Workload, parts: Parts) {
        self.0.insert(workload, parts);
    }
}

/// What is kept of one workload.
#[derive(Debug)]
pub struct Parts {
    parts: Vec<Part>,
    behind: BTreeSet<u8>,
    dealt: Dealt,
}

/// What is in the parts besides edges. It stays for as long as the context does.
#[derive(Debug)]
struct Dealt {
    /// Where the workload's side is missing, by number among its halves.
    halves: Vec<Vec<usize>>,
    /// Rules in force about one other end.
    rules: Vec<Vec<(Direction, Rule)>>,
    /// Rules in force about networks, which are in no part.
    wide: Vec<(Direction, Rule)>,
}

impl Dealt {
    fn of(learner: &Learner<'_>, workload: &Workload) -> Self {
        let mut dealt = Self { halves: vec![Vec::new(); PARTS], rules: vec![Vec::new(); PARTS], wide: Vec::new() };
        for (number, half) in learner.halves.of_workload(workload).iter().enumerate() {
            if half.missing_on() == workload {
                dealt.halves[usize::from(part_of(&Peer::Workload(half.peer().clone())))].push(number);
            }
        }
        for (direction, rule) in learner.in_force(workload) {
            match rule.peer {
                Peer::Outside(net) if net.prefix_len() < net.max_prefix_len() => dealt.wide.push((direction, rule.clone())),
                Peer::Workload(_) | Peer::Host | Peer::Outside(_) => {
                    dealt.rules[usize::from(part_of(&rule.peer))].push((direction, rule.clone()));
                }
            }
        }
        dealt
    }
}

fn borrowed(rules: &[(Direction, Rule)]) -> Vec<(Direction, &Rule)> {
    rules.iter().map(|(direction, rule)| (*direction, rule)).collect()
}

/// Edges of a workload whose other ends are in one part, and what they come to.
#[derive(Debug, Default)]
struct Part {
    /// By number.
    edges: Vec<EdgeId>,
    sum: Sum,
}

#[derive(Debug, Default)]
struct Sum {
    digest: Option<PartDigest>,
    /// Rules; how many of them nobody decided on, and how many are inside the digest.
    rules: usize,
    undecided: usize,
    inside: usize,
    /// Edges that speak for these rules.
    for_rules: Vec<EdgeId>,
    /// Rules that guardrails forbid, that the engine needs, and one of each other kind.
    sample_rules: Vec<Proposal>,
    used: Sums,
    /// One edge in use, older than the agent if any is.
    sample_used: Option<EdgeId>,
    /// Edges that are only shown, and how many of them a list with a few of each pair would have.
    shown: usize,
    listed: usize,
    /// One for each reason.
    sample_shown: Vec<(EdgeId, Why)>,
    /// Edges in use that came in from addresses outside, as many as it takes to choose as if it were all.
    from_outside: Vec<EdgeId>,
    /// What is to be said of rules in force, where the engine's needs are among the proposals and where they are not.
    in_force: Weights,
    in_force_alone: Weights,
    /// Edges in use whose other end is an address, where rules about networks are in force.
    outside: Vec<EdgeId>,
    updated: Option<Timestamp>,
}

impl Parts {
    fn of<'g>(learner: &Learner<'g>, workload: &Workload) -> Self {
        let mut dealt: Vec<Vec<Seen<'g>>> = vec![Vec::new(); PARTS];
        for seen in edges_of(learner.graph, workload) {
            // An edge between two of its own ends is in one part, whichever is taken for the other.
            let other = if seen.from.workload() == Some(workload) { seen.to } else { seen.from };
            dealt[usize::from(part_of_end(other))].push(seen);
        }
        let others = Dealt::of(learner, workload);
        let part = |(at, edges): (u8, Vec<Seen<'g>>)| {
            let mut ids: Vec<_> = edges.iter().map(|seen| seen.id).collect();
            ids.sort_unstable();
            Part { edges: ids, sum: Sum::of(learner, workload, at, edges, &others) }
        };
        Self { parts: (0..=u8::MAX).zip(dealt).map(part).collect(), behind: BTreeSet::new(), dealt: others }
    }

    fn mark(&mut self, id: EdgeId, at: u8) {
        let edges = &mut self.parts[usize::from(at)].edges;
        if let Err(place) = edges.binary_search(&id) {
            edges.insert(place, id);
        }
        self.behind.insert(at);
    }

    fn renew(&mut self, learner: &Learner<'_>, workload: &Workload) {
        for at in std::mem::take(&mut self.behind) {
            let part = &mut self.parts[usize::from(at)];
            let edges = seen(learner.graph, part.edges.iter().copied());
            part.sum = Sum::of(learner, workload, at, edges, &self.dealt);
        }
    }
}

/// These edges as they are now, in the order of their keys.
fn seen(graph: &FlowGraph, ids: impl IntoIterator<Item = EdgeId>) -> Vec<Seen<'_>> {
    let mut seen: Vec<_> = ids.into_iter().filter_map(|id| graph.seen(id)).collect();
    seen.sort_unstable_by(by_key);
    // An edge to oneself speaks for two rules.
    seen.dedup_by_key(|seen| seen.id);
    seen
}

impl Sum {
    /// Of the edges of one part, in the order of their keys.
    fn of(learner: &Learner<'_>, workload: &Workload, at: u8, edges: Vec<Seen<'_>>, dealt: &Dealt) -> Self {
        let options = learner.context.options_of(workload);
        let (mut read, clients) = Read::uses(edges, options, workload);
        let mut from_outside: Vec<_> = read.take_from_outside().map(|seen| seen.id).collect();
        from_outside.extend(sample_clients(learner, workload, &clients));
        let for_rules = read.used_for_rules().map(|seen| seen.id).collect();
        read.group();
        let halves = learner.halves.of_workload(workload);
        read.add_counterparts(dealt.halves[usize::from(at)].iter().filter_map(|&number| halves.get(number)), workload);
        learner.add_resolvers(&mut read, workload, |resolver| part_of(resolver) == at);
        let proposals = learner.proposals(&read, workload);
        let inside: Vec<&Proposal> = proposals.iter().filter(|rule| digest::is_inside(rule)).collect();
        let (shown, listed, sample_shown) = sample_shown(&read.shown);
        let rules = borrowed(&dealt.rules[usize::from(at)]);
        let in_force = |proposals: &[Proposal]| match learner.context.policies.get(workload) {
            Some(policy) => weigh(&learner.in_force_of(workload, policy, &rules, &read.used, proposals).findings()),
            None => Weights::default(),
        };
        let is_outside =
            |seen: &&Seen<'_>| [seen.from, seen.to].into_iter().any(|end| matches!(end, Endpoint::Outside(_) | Endpoint::Unmanaged { .. }));
        let outside = if dealt.wide.is_empty() { Vec::new() } else { read.used.iter().filter(is_outside).map(|seen| seen.id).collect() };
        Self {
            digest: digest::part(inside.iter().copied()),
            rules: proposals.len(),
            undecided: proposals.iter().filter(|rule| rule.state == RuleState::Undecided).count(),
            inside: inside.len(),
            for_rules,
            sample_rules: Samples::of(learner, workload, &proposals),
            used: Sums::of(read.used.iter().map(|seen| seen.evidence)),
            sample_used: read.used.iter().find(|seen| seen.evidence.pre_existing > 0).or(read.used.first()).map(|seen| seen.id),
            shown,
            listed,
            sample_shown,
            from_outside,
            in_force: in_force(&proposals),
            in_force_alone: in_force(&[]),
            outside,
            updated: read.updated,
        }
    }
}

/// Rules of which the findings say as much as of all.
#[derive(Default)]
struct Samples {
    kinds: BTreeSet<(Direction, Origin, bool)>,
    rules: Vec<Proposal>,
}

impl Samples {
    fn of(learner: &Learner<'_>, workload: &Workload, proposals: &[Proposal]) -> Vec<Proposal> {
        let mut samples = Self::default();
        samples.add(learner, workload, proposals);
        samples.rules
    }

    fn add(&mut self, learner: &Learner<'_>, workload: &Workload, proposals: &[Proposal]) {
        for proposal in proposals {
            let outside = matches!(proposal.rule.peer, Peer::Outside(_));
            let of_a_new_kind = self.kinds.insert((proposal.direction, proposal.origin, outside));
            // Each of these is a sentence of its own, or decides one.
            let forbidden = || !guardrail::forbidding(&learner.context.guardrails, workload, proposal.direction, &proposal.rule).is_empty();
            if of_a_new_kind || proposal.origin == Origin::NeededByEngine || forbidden() {
                self.rules.push(proposal.clone());
            }
        }
    }
}

/// Of clients outside on each port: enough to see that they are more than a few, and of each network that might be proposed one that
/// connected and one that did not. All, where each may become a rule whatever their number.
fn sample_clients(learner: &Learner<'_>, workload: &Workload, clients: &Clients<'_>) -> Vec<EdgeId> {
    let options = learner.context.options_of(workload);
    let rejected = || {
        let of_this = |no: &super::Rejected| no.workload == *workload && digest::is_apart(no.direction, &no.peer);
        learner.context.rejected.iter().any(of_this)
    };
    let few = usize::try_from(options.exact_hosts).unwrap_or(usize::MAX);
    let all = options.from_outside == FromOutside::ExactHosts || (!clients.is_empty() && rejected());
    let mut sample = Vec::new();
    for clients in clients.values() {
        let (mut families, mut networks) = ([0, 0], BTreeSet::new());
        for (address, seen) in clients {
            let of_family = &mut families[usize::from(address.is_ipv6())];
            *of_family += 1;
            let connected = seen.evidence.established > 0 || seen.evidence.connected_no_data > 0;
            let network = (address.is_ipv6(), private_network(*address), connected);
            if networks.insert(network) || *of_family <= few.saturating_add(1) || all {
                sample.push(seen.id);
            }
        }
    }
    sample
}

fn sample_shown(shown: &[(Seen<'_>, Why)]) -> (usize, usize, Vec<(EdgeId, Why)>) {
    let mut pairs: BTreeMap<(&Endpoint, &Endpoint), usize> = BTreeMap::new();
    let mut reasons: BTreeMap<usize, Discriminant<Why>> = BTreeMap::new();
    for (at, (seen, why)) in shown.iter().enumerate() {
        *pairs.entry((seen.from, seen.to)).or_default() += 1;
        if !reasons.values().any(|known| *known == discriminant(why)) {
            reasons.insert(at, discriminant(why));
        }
    }
    let listed = pairs.into_values().map(|edges| edges.min(SHOWN_PER_PAIR)).sum();
    (shown.len(), listed, reasons.into_keys().map(|at| (shown[at].0.id, shown[at].1.clone())).collect())
}

impl Learner<'_> {
    /// The same as [`Learner::outline`], by what was kept of the workload, and what to keep now: nothing of a small one.
    pub fn renew(&self, workload: &Workload, kept: Option<Parts>) -> (Outline, Option<Parts>) {
        let parts = match kept {
            Some(mut kept) => {
                kept.renew(self, workload);
                kept
            }
            None if self.is_small(workload) => return (self.outline(workload), None),
            None => Parts::of(self, workload),
        };
        (self.outline_of(workload, &parts), Some(parts))
    }

    /// Whether nothing is kept of a workload.
    fn is_small(&self, workload: &Workload) -> bool {
        let own = [Endpoint::Workload(workload.clone()), Endpoint::Run(workload.clone())];
        let edges: usize = own.iter().map(|end| self.graph.count_around(end)).sum();
        let ends = |policy: &WorkloadPolicy| policy.ingress.iter().chain(&policy.egress).any(|rule| rule.until.is_some());
        edges <= self.large || self.context.policies.get(workload).is_some_and(ends)
    }

    fn outline_of(&self, workload: &Workload, Parts { parts, dealt, .. }: &Parts) -> Outline {
        let options = self.context.options_of(workload);
        let sums = || parts.iter().map(|part| &part.sum);
        let (in_force, in_use) = (borrowed(&dealt.wide), seen(self.graph, sums().flat_map(|sum| sum.outside.iter().copied())));
        let in_force_too = |findings: &[Finding], of: fn(&Sum) -> Weights| {
            sums().map(of).fold(weigh(findings), |all, more| (all.0 + more.0, all.1 + more.1, all.2 + more.2))
        };
        let (mut used, mut sample_used) = (Sums::default(), Vec::new());
        let mut sample_shown: Vec<(EdgeId, Why)> = Vec::new();
        let (mut shown, mut listed, mut updated) = (0, 0, None);
        for sum in sums() {
            used.merge(&sum.used);
            sample_used.extend(sum.sample_used);
            shown += sum.shown;
            listed += sum.listed;
            updated = updated.max(sum.updated);
            for (id, why) in &sum.sample_shown {
                if !sample_shown.iter().any(|(_, known)| discriminant(known) == discriminant(why)) {
                    sample_shown.push((*id, why.clone()));
                }
            }
        }
        let sample_shown: Vec<_> = sample_shown.into_iter().filter_map(|(id, why)| Some((self.graph.seen(id)?, why))).collect();
        let sample_used = seen(self.graph, sample_used);
        let from_outside = seen(self.graph, sums().flat_map(|sum| sum.from_outside.iter().copied()));
        let from_outside = Read::of(from_outside, self.context, options, workload);
        let apart = self.proposals(&from_outside, workload);

        let needed = sums().flat_map(|sum| &sum.sample_rules).filter(|rule| rule.origin == Origin::NeededByEngine).count();
        let inside = apart.len() + sums().map(|sum| sum.inside).sum::<usize>();
        let seen_of = |choices| SeenOf {
            used: &sample_used,
            sums: used,
            shown: &sample_shown,
            unlisted: shown - listed.min(SHOWN),
            choices,
            in_force: &in_force,
            in_use: &in_use,
        };
        // Fewer are digested as one text, and where there might be no others the engine's needs are none: all rules are made anew.
        if inside <= self.large + needed {
            let for_rules = sums().flat_map(|sum| sum.for_rules.iter().chain(&sum.from_outside).copied());
            let mut read = Read::of(seen(self.graph, for_rules), self.context, options, workload);
            self.add_elsewhere(&mut read, workload);
            let proposals = self.proposals(&read, workload);
            let (findings, _, phase) = self.judge(workload, &proposals, seen_of(&read.choices));
            let digest = digest::digest(workload, &proposals, options, &findings, self.large);
            let undecided = proposals.iter().filter(|rule| rule.state == RuleState::Undecided).count();
            let revision = self.revision(workload, &digest);
            let needs = proposals.iter().any(|rule| rule.origin == Origin::NeededByEngine);
            let findings = in_force_too(&findings, if needs { |sum| sum.in_force } else { |sum| sum.in_force_alone });
            return outlined(workload, (revision, digest), phase, (proposals.len(), undecided), findings, updated);
        }
        let mut samples = Samples::default();
        sums().for_each(|sum| samples.add(self, workload, &sum.sample_rules));
        samples.add(self, workload, &apart);
        let (findings, _, phase) = self.judge(workload, &samples.rules, seen_of(&from_outside.choices));
        let digests = (0..=u8::MAX).zip(sums()).filter_map(|(at, sum)| Some((at, sum.digest?)));
        let digest = digest::digest_of_parts(workload, &apart, digests, options, &findings);
        let rules = apart.len() + sums().map(|sum| sum.rules).sum::<usize>();
        let undecided = apart.iter().filter(|rule| rule.state == RuleState::Undecided).count();
        let undecided = undecided + sums().map(|sum| sum.undecided).sum::<usize>();
        let findings = in_force_too(&findings, |sum| sum.in_force);
        outlined(workload, (self.revision(workload, &digest), digest), phase, (rules, undecided), findings, updated)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]
mod tests;
