//! Findings on a suggestion: what a person should know before approving, each with a severity and a sentence.
//!
//! It judges; it never changes what is proposed. Only two block: `no-evidence`, and [`BREAKS_GUARDRAIL`], which no person can accept.
//! Everything else may be right, and is said.

mod said;
#[cfg(test)]
mod tests;
mod uses;

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::graph::Seen;
use crate::guardrail::Guardrail;
use crate::learn::outside::Choice;
use crate::learn::{Known, Why, Window};
use crate::policy_set::{Direction, Peer, Rule, WorkloadPolicy};
use crate::service::Ports;
use crate::suggestion::{Coverage, Finding, Origin, RuleState};
use crate::workload::Workload;

pub(crate) use said::list;

/// A proposed rule that a guardrail forbids. It blocks the rule alone: rejected, or not chosen, the rest can be approved.
pub const BREAKS_GUARDRAIL: &str = "breaks-guardrail";

/// A rule that will be proposed: what is judged of it, without the evidence behind it.
#[derive(Clone, Debug)]
pub(crate) struct Proposal {
    pub(crate) direction: Direction,
    pub(crate) rule: Rule,
    pub(crate) origin: Origin,
    pub(crate) state: RuleState,
}

/// What a suggestion is made of, before its findings.
pub(crate) struct Material<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) known: Option<&'a Known>,
    pub(crate) policy: Option<&'a WorkloadPolicy>,
    pub(crate) guardrails: &'a BTreeMap<String, Guardrail>,
    pub(crate) rules: &'a [Proposal],
    /// Edges in use.
    pub(crate) used: &'a [Seen<'a>],
    /// Edges that are only shown.
    pub(crate) shown: &'a [(Seen<'a>, Why)],
    pub(crate) choices: &'a [Choice],
    /// Of this workload.
    pub(crate) halves: &'a [HalfApproved],
    pub(crate) window: Option<&'a Window>,
    pub(crate) coverage: &'a Coverage,
    /// How many edges of `shown` are not listed one by one.
    pub(crate) unlisted: usize,
    pub(crate) stable_hours: u32,
    /// Rules of its policy that are to be spoken of.
    pub(crate) in_force: Option<InForce<'a>>,
}

/// Some rules of a workload's policy, all of them in force.
#[derive(Clone, Copy)]
pub(crate) struct InForce<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) policy: &'a WorkloadPolicy,
    pub(crate) guardrails: &'a BTreeMap<String, Guardrail>,
    pub(crate) rules: &'a [(Direction, &'a Rule)],
    /// Every edge in use that one of them means, and others.
    pub(crate) used: &'a [Seen<'a>],
    /// What is proposed, as far as the engine needs it for what one of them covers, and more.
    pub(crate) proposals: &'a [Proposal],
    pub(crate) now: Timestamp,
}

impl InForce<'_> {
    /// What is to be said of them.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        said::in_force(self)
    }
}

/// The findings, the heaviest first.
pub(crate) fn findings(material: &Material<'_>) -> Vec<Finding> {
    let mut findings = said::all(material);
    findings.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.cmp(b)));
    findings.dedup();
    findings
}

/// Whether one rule allows all that another allows, for as long.
pub fn covers(wide: &Rule, narrow: &Rule) -> bool {
    let peer = match (&wide.peer, &narrow.peer) {
        (Peer::Workload(a), Peer::Workload(b)) => a == b,
        (Peer::Host, Peer::Host) => true,
        (Peer::Outside(a), Peer::Outside(b)) => a.contains(b),
        (Peer::Workload(_) | Peer::Host | Peer::Outside(_), _) => false,
    };
    let (a, b) = (wide.ports, narrow.ports);
    let ports = a.protocol() == b.protocol() && a.first() <= b.first() && b.last() <= a.last();
    let time = match (wide.until, narrow.until) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wide), Some(narrow)) => narrow <= wide,
    };
    peer && ports && time
}

/// Those of rules in order that a rule about this peer may cover: they stand side by side, since networks sort by their first address.
pub(crate) fn within<'r, 'a>(rules: &'r [&'a Rule], peer: &Peer) -> &'r [&'a Rule] {
    let last = match peer {
        Peer::Workload(_) | Peer::Host => peer.clone(),
        Peer::Outside(net) => Peer::address(net.broadcast()),
    };
    let begin = rules.partition_point(|rule| rule.peer < *peer);
    let end = rules.partition_point(|rule| rule.peer <= last);
    &rules[begin..end.max(begin)]
}

/// An edge between two workloads of which one side is approved and the other is not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HalfApproved {
    /// Client.
    pub from: Workload,
    /// Server.
    pub to: Workload,
    /// On the server's ports.
    pub ports: Ports,
    /// Until when the approved side holds.
    pub until: Option<Timestamp>,
    /// Which side is missing.
    pub missing: Direction,
}

impl HalfApproved {
    /// The workload whose side is missing.
    pub fn missing_on(&self) -> &Workload {
        match self.missing {
            Direction::Egress => &self.from,
            Direction::Ingress => &self.to,
        }
    }

    /// The other one, which the missing side would name.
    pub(crate) fn peer(&self) -> &Workload {
        match self.missing {
            Direction::Egress => &self.to,
            Direction::Ingress => &self.from,
        }
    }
}

impl std::fmt::Display for HalfApproved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, ports, until: _, missing } = self;
        let (there, not) = match missing {
            Direction::Egress => (format!("ingress of {to}"), format!("egress of {from}")),
            Direction::Ingress => (format!("egress of {from}"), format!("ingress of {to}")),
        };
        write!(f, "{from} -> {to} {ports}: {there} is approved, {not} is not")
    }
}

/// Every edge of which only one side is approved, in order. An edge whose other side allows some of its ports is approved as far as
/// that side wants it: to offer the rest would widen it.
pub fn half_approved(policies: &BTreeMap<Workload, WorkloadPolicy>, now: Timestamp) -> Vec<HalfApproved> {
    let mut halves = Vec::new();
    for (workload, policy) in policies {
        let this = Peer::Workload(workload.clone());
        for (direction, other) in [(Direction::Egress, Direction::Ingress), (Direction::Ingress, Direction::Egress)] {
            for rule in policy.rules(direction).iter().filter(|rule| rule.in_force(now)) {
                let Peer::Workload(peer) = &rule.peer else { continue };
                let answers = |answer: &Rule| answer.in_force(now) && overlap(answer.ports, rule.ports);
                if policies.get(peer).is_some_and(|policy| policy.about(other, &this).any(answers)) {
                    continue;
                }
                let (from, to) = match direction {
                    Direction::Egress => (workload.clone(), peer.clone()),
                    Direction::Ingress => (peer.clone(), workload.clone()),
                };
                halves.push(HalfApproved { from, to, ports: rule.ports, until: rule.until, missing: other });
            }
        }
    }
    halves.sort();
    halves.dedup();
    halves
}

fn overlap(a: Ports, b: Ports) -> bool {
    a.protocol() == b.protocol() && a.first() <= b.last() && b.first() <= a.last()
}
