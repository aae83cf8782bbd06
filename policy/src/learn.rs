//! FlowGraph -> Suggestion: the least privilege that allows what was seen. Deterministic, to the byte: the same graph and context
//! give the same suggestions, in whatever order the reports came in.
//!
//! It proposes; it never decides. What an edge is worth is sorted in `sort`, how wide a port is opened to the outside in
//! `outside`, what an approval names in `digest`, what is kept of a large workload so that one edge more is not all its edges in
//! `parts`; what a person should know is said by [`crate::check`], how much is unseen by
//! [`crate::estimate`].
//!
//! # Why
//! Exact by default: exact ports, workloads by name, addresses outside as /32 and /128. The one widening there is (clients of a
//! published port) says what was seen and how to narrow it. Nothing is dropped in silence: an edge is a rule, or it is shown with
//! the reason why it is none.

mod context;
pub(crate) mod digest;
mod draft;
pub(crate) mod outside;
mod parts;
mod sort;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;

pub use self::context::{Context, EMBEDDED_RESOLVER, FromOutside, Known, Options, Rejected, Revision, Window, known};
use self::draft::{Draft, Read, edges_of};
use self::outside::Choice;
pub use self::parts::{Kept, Parts};
pub(crate) use self::sort::Why;
use crate::check::{self, HalfApproved, InForce, Material, Proposal, half_approved};
use crate::estimate::{self, Sums};
use crate::evidence::Evidence;
use crate::graph::{EdgeKey, FlowGraph, Seen};
use crate::policy_set::{Direction, Peer, Rule, WorkloadPolicy};
use crate::service::{Ports, Service};
use crate::suggestion::{Coverage, Finding, NotProposed, Origin, Outline, Phase, ProposedRule, RuleState, Severity, Suggestion};
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
    let halves = Halves::of(context);
    let learner = Learner::new(graph, context, &halves);
    learner.workloads().into_iter().map(|workload| learner.suggest(workload)).collect()
}

/// The suggestion for one workload: what [`learn`] would say of it, without looking at the rest.
pub fn learn_one(graph: &FlowGraph, context: &Context, workload: &Workload) -> Suggestion {
    Learner::new(graph, context, &Halves::of(context)).suggest(workload)
}

/// Whose suggestions one more report on an edge may change: its ends, and every workload that the same source touched without
/// carrying data, since whether that is a scan depends on all of them.
pub fn affected(graph: &FlowGraph, edge: &EdgeKey) -> BTreeSet<Workload> {
    let touched = graph.touched_by(&edge.from).filter_map(|id| graph.ends(id)).filter_map(|(_, to)| to.workload());
    let ends = [&edge.from, &edge.to].into_iter().filter_map(|end| end.workload());
    ends.chain(touched).cloned().collect()
}

/// Edges of which one side is approved, by each of their ends. Made of the policies alone, so that it may be kept until one changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Halves(BTreeMap<Workload, Vec<HalfApproved>>);

impl Halves {
    /// Those of a context's policies, at its time.
    pub fn of(context: &Context) -> Self {
        let mut halves = Self::default();
        for half in half_approved(&context.policies, context.now) {
            let ends: BTreeSet<Workload> = [&half.from, &half.to].into_iter().cloned().collect();
            ends.into_iter().for_each(|end| halves.0.entry(end).or_default().push(half.clone()));
        }
        halves
    }

    fn of_workload(&self, workload: &Workload) -> &[HalfApproved] {
        self.0.get(workload).map_or(&[], Vec::as_slice)
    }
}

/// Learns workload by workload.
///
/// # Why outlines
/// Each edge between two workloads is a rule of both, with names, evidence and the edges behind it: of a million edges that is a
/// gigabyte and seconds, of which a person reads a page. What has to be known of all of them, all the time, is their [`Outline`].
#[derive(Clone, Copy, Debug)]
pub struct Learner<'a> {
    graph: &'a FlowGraph,
    context: &'a Context,
    halves: &'a Halves,
    /// The most edges of a workload that are read all at each learning, and rules that are digested as one text.
    large: usize,
}

/// What is learned of one workload, not written out yet.
struct Learned<'a> {
    read: Read<'a>,
    /// One for each draft.
    proposals: Vec<Proposal>,
    /// Which of those that are no rule are listed.
    shown: Listed,
    findings: Vec<Finding>,
    coverage: Coverage,
    phase: Phase,
    revision: u64,
    digest: String,
}

impl<'a> Learner<'a> {
    /// A learner over this graph; the halves are [`Halves::of`] the same context.
    pub fn new(graph: &'a FlowGraph, context: &'a Context, halves: &'a Halves) -> Self {
        Self { graph, context, halves, large: digest::LARGE }
    }

    /// Every workload that is known or was seen, in order.
    pub fn workloads(&self) -> BTreeSet<&'a Workload> {
        let seen = self.graph.endpoints().filter_map(Endpoint::workload);
        self.context.workloads.keys().chain(self.context.policies.keys()).chain(seen).collect()
    }

    /// The whole suggestion for a workload.
    pub fn suggest(&self, workload: &Workload) -> Suggestion {
        let Learned { read, proposals, shown, findings, coverage, phase, revision, digest } = self.learn(workload);
        let not_proposed = shown.listed(&read.shown);
        let rules = proposals.into_iter().zip(&read.drafts).map(|(proposal, draft)| {
            let Proposal { direction, rule, origin, state } = proposal;
            let mut evidence = Evidence::default();
            read.behind(draft).for_each(|seen| evidence.merge(seen.evidence));
            let edges = read.behind(draft).take(EDGES_LISTED).map(Seen::key).collect();
            ProposedRule { id: digest::rule_id(direction, &rule), direction, origin, state, evidence, edges, rule }
        });
        let rules = rules.collect();
        let updated = read.updated;
        Suggestion { workload: workload.clone(), revision, digest, phase, rules, findings, not_proposed, coverage, updated }
    }

    /// What [`Learner::suggest`] would say, without saying it.
    pub fn outline(&self, workload: &Workload) -> Outline {
        let Learned { read, proposals, findings, phase, revision, digest, .. } = self.learn(workload);
        let undecided = proposals.iter().filter(|proposal| proposal.state == RuleState::Undecided).count();
        outlined(workload, (revision, digest), phase, (proposals.len(), undecided), weigh(&findings), read.updated)
    }

    fn learn(&self, workload: &Workload) -> Learned<'a> {
        let options = self.context.options_of(workload);
        let mut read = Read::of(edges_of(self.graph, workload), self.context, options, workload);
        self.add_elsewhere(&mut read, workload);
        let proposals = self.proposals(&read, workload);
        let shown = Listed::of(&read.shown);
        let seen = SeenOf {
            used: &read.used,
            sums: Sums::of(read.used.iter().map(|seen| seen.evidence)),
            shown: &read.shown,
            unlisted: read.shown.len() - shown.0.len(),
            choices: &read.choices,
            in_force: &self.in_force(workload),
            in_use: &read.used,
        };
        let (findings, coverage, phase) = self.judge(workload, &proposals, seen);
        let digest = digest::digest(workload, &proposals, options, &findings, self.large);
        Learned { revision: self.revision(workload, &digest), read, proposals, shown, findings, coverage, phase, digest }
    }

    /// Rules that come from elsewhere than the graph.
    fn add_elsewhere(&self, read: &mut Read<'_>, workload: &Workload) {
        read.add_counterparts(self.halves.of_workload(workload), workload);
        // Without any evidence there is nothing to add DNS to: a policy of DNS alone would look learned and isolate.
        if read.drafts.iter().any(|draft| draft.origin != Origin::DeniedAttempt) {
            self.add_resolvers(read, workload, |_| true);
        }
    }

    fn add_resolvers(&self, read: &mut Read<'_>, workload: &Workload, wanted: impl Fn(&Peer) -> bool) {
        // A workload that is away for a moment keeps its rules, or every restart would move the digest.
        let assumed = [Peer::address(IpAddr::V4(EMBEDDED_RESOLVER))].into();
        let resolvers = self.context.workloads.get(workload).map_or(&assumed, |known| &known.resolvers);
        for resolver in resolvers.iter().filter(|resolver| wanted(resolver)) {
            DNS.into_iter().for_each(|service| read.add_needed(Direction::Egress, resolver.clone(), Ports::from(service)));
        }
    }

    /// What is proposed by these drafts, one for each.
    fn proposals(&self, read: &Read<'_>, workload: &Workload) -> Vec<Proposal> {
        let policy = self.context.policies.get(workload);
        let proposal = |draft: &Draft| {
            let (direction, rule) = (draft.direction, draft.rule.clone());
            Proposal { direction, origin: draft.origin, state: self.state(workload, policy, direction, &rule), rule }
        };
        read.drafts.iter().map(proposal).collect()
    }

    /// What a person should know, and how far the learning is.
    fn judge(&self, workload: &Workload, rules: &[Proposal], seen: SeenOf<'_>) -> (Vec<Finding>, Coverage, Phase) {
        let SeenOf { used, sums, shown, unlisted, choices, in_force, in_use } = seen;
        let context = self.context;
        let policy = context.policies.get(workload);
        let (options, window) = (context.options_of(workload), context.windows.get(workload));
        let known = context.workloads.get(workload);
        let (mut coverage, phase) = estimate::coverage(sums, window, options);
        coverage
            .notes
            .extend(known.is_none().then(|| "not known to the engine now: its resolver is taken to be the engine's own".to_owned()));
        let material = Material {
            workload,
            known,
            policy,
            guardrails: &context.guardrails,
            rules,
            used,
            shown,
            choices,
            halves: self.halves.of_workload(workload),
            window,
            coverage: &coverage,
            unlisted,
            stable_hours: options.stable_hours,
            in_force: policy.map(|policy| self.in_force_of(workload, policy, in_force, in_use, rules)),
        };
        (check::findings(&material), coverage, phase)
    }

    /// All rules of a workload's policy that are in force.
    fn in_force(&self, workload: &Workload) -> Vec<(Direction, &'a Rule)> {
        let Some(policy) = self.context.policies.get(workload) else { return Vec::new() };
        let sides = [Direction::Ingress, Direction::Egress].into_iter();
        let rules = sides.flat_map(|direction| policy.rules(direction).iter().map(move |rule| (direction, rule)));
        rules.filter(|(_, rule)| rule.in_force(self.context.now)).collect()
    }

    fn in_force_of<'b>(
        &'b self,
        workload: &'b Workload,
        policy: &'b WorkloadPolicy,
        rules: &'b [(Direction, &'b Rule)],
        used: &'b [Seen<'b>],
        proposals: &'b [Proposal],
    ) -> InForce<'b> {
        InForce { workload, policy, guardrails: &self.context.guardrails, rules, used, proposals, now: self.context.now }
    }

    fn revision(&self, workload: &Workload, digest: &str) -> u64 {
        match self.context.previous.get(workload) {
            None => 1,
            Some(previous) if previous.digest == digest => previous.revision,
            Some(previous) => previous.revision + 1,
        }
    }

    /// Where a rule stands with the reviewers.
    fn state(&self, workload: &Workload, policy: Option<&WorkloadPolicy>, direction: Direction, rule: &Rule) -> RuleState {
        let approved = policy.is_some_and(|policy| {
            policy.about(direction, &rule.peer).any(|approved| approved.in_force(self.context.now) && check::covers(approved, rule))
        });
        if approved {
            RuleState::Approved
        } else if !self.context.rejected.is_empty() && self.context.rejected.contains(&Rejected::of(workload, direction, rule)) {
            RuleState::Rejected
        } else {
            RuleState::Undecided
        }
    }
}

/// What was seen of a workload, as far as it is judged.
struct SeenOf<'a> {
    used: &'a [Seen<'a>],
    sums: Sums,
    shown: &'a [(Seen<'a>, Why)],
    unlisted: usize,
    choices: &'a [Choice],
    /// Rules in force that are to be spoken of, and the edges in use that they mean, with others.
    in_force: &'a [(Direction, &'a Rule)],
    in_use: &'a [Seen<'a>],
}

/// How many findings there are: blocking, warnings, the rest.
type Weights = (u64, u64, u64);

fn weigh(findings: &[Finding]) -> Weights {
    let of = |severity| findings.iter().filter(|finding| finding.severity == severity).count() as u64;
    (of(Severity::Blocking), of(Severity::Warning), of(Severity::Info))
}

fn outlined(
    workload: &Workload,
    (revision, digest): (u64, String),
    phase: Phase,
    (rules, undecided): (usize, usize),
    findings: Weights,
    updated: Option<Timestamp>,
) -> Outline {
    Outline { workload: workload.clone(), revision, digest, phase, rules: rules as u64, undecided: undecided as u64, findings, updated }
}

/// Which of the edges that are no rule are listed: a few of each pair, so that a port scan does not bury the rest. The count of what is
/// left out is a finding.
struct Listed(Vec<usize>);

impl Listed {
    fn of(shown: &[(Seen<'_>, Why)]) -> Self {
        let mut by_pair: BTreeMap<(&Endpoint, &Endpoint), usize> = BTreeMap::new();
        let few = shown.iter().enumerate().filter(|(_, (seen, _))| {
            let count = by_pair.entry((seen.from, seen.to)).or_default();
            *count += 1;
            *count <= SHOWN_PER_PAIR
        });
        Self(few.map(|(at, _)| at).take(SHOWN).collect())
    }

    fn listed(&self, shown: &[(Seen<'_>, Why)]) -> Vec<NotProposed> {
        let line = |&at: &usize| {
            let (seen, why) = &shown[at];
            NotProposed { edge: seen.key(), evidence: seen.evidence.clone(), why: why.to_string() }
        };
        self.0.iter().map(line).collect()
    }
}
