//! What is proposed for one workload: rules with their evidence, findings, and what is not known.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::evidence::Evidence;
use crate::graph::EdgeKey;
use crate::policy_set::{Direction, Rule};
use crate::workload::Workload;

/// How far the learning of a workload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Edges still appear.
    Learning,
    /// No new edge for a while, but not seen for long enough.
    Stabilizing,
    /// Little is expected to be unseen, over enough healthy observed time.
    Stable,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Learning => "Learning",
            Self::Stabilizing => "Stabilizing",
            Self::Stable => "Stable",
        })
    }
}

/// Why a rule is proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// Seen in use.
    Observed,
    /// UDP that is repeated, unanswered and not refused.
    OneWay,
    /// The engine's own resolver road: needed by every workload.
    NeededByEngine,
    /// The other side of a rule that is approved already.
    Counterpart,
    /// Tried under Enforce by a known workload and denied. Never approved as part of the whole; only by name.
    DeniedAttempt,
}

/// Where a proposed rule stands with the reviewers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RuleState {
    /// Nobody decided.
    Undecided,
    /// In force already.
    Approved,
    /// A person said no; it does not come back by itself.
    Rejected,
}

/// One proposed allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProposedRule {
    /// Short and stable name of the rule within the suggestion, for `approve --rule`: a digest of direction, peer and ports.
    pub id: String,
    /// Which side of the workload.
    pub direction: Direction,
    /// Peer and ports.
    pub rule: Rule,
    /// Why.
    pub origin: Origin,
    /// Where it stands.
    pub state: RuleState,
    /// What was counted for it, over all its edges.
    pub evidence: Evidence,
    /// The edges behind it.
    pub edges: Vec<EdgeKey>,
}

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Look before you approve.
    Warning,
    /// Must be acknowledged by name (`--accept CODE`) to approve.
    Blocking,
}

/// Something a person should know before approving.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// How much it weighs.
    pub severity: Severity,
    /// Stable name: `engine-named`, `address-may-change`, `no-evidence`, ...
    pub code: String,
    /// What, about what, what it may mean, what to do.
    pub text: String,
}

/// An edge that is shown and not proposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NotProposed {
    /// Which edge.
    pub edge: EdgeKey,
    /// What was counted.
    pub evidence: Evidence,
    /// Why it is no rule.
    pub why: String,
}

/// What is not known, said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Coverage {
    /// Healthy observed time of the nodes that saw the workload, seconds.
    pub healthy_seconds: u64,
    /// Distinct hours and days with traffic of the workload.
    pub hours: u64,
    /// See `hours`.
    pub days: u64,
    /// Kernel events lost while it was observed.
    pub lost: u64,
    /// Edges in use.
    pub edges: u64,
    /// Share of the next connections expected to be on an edge not seen yet (Good-Turing), parts per million; `None`: too
    /// little was seen to say.
    pub unseen_connections_ppm: Option<u64>,
    /// Edges expected to exist and not seen yet (Chao), over hours; `None`: too little was seen to say.
    pub unseen_edges: Option<u64>,
    /// Sentences: "no nightly window observed yet".
    pub notes: Vec<String>,
}

/// What is proposed for one workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Suggestion {
    /// For whom.
    pub workload: Workload,
    /// Grows by one whenever the digest changes.
    pub revision: u64,
    /// SHA-256 over rules, peers, options and blocking findings, in hex; counts, times and bytes are outside it.
    pub digest: String,
    /// How far the learning is.
    pub phase: Phase,
    /// The rules, ordered.
    pub rules: Vec<ProposedRule>,
    /// The findings, the heaviest first.
    pub findings: Vec<Finding>,
    /// Edges shown and not proposed.
    pub not_proposed: Vec<NotProposed>,
    /// What is not known.
    pub coverage: Coverage,
    /// When evidence last changed.
    pub updated: Option<Timestamp>,
}

/// What is known of every suggestion all the time: enough for a line in a list, and to see that it moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// For whom.
    pub workload: Workload,
    /// See [`Suggestion::revision`].
    pub revision: u64,
    /// See [`Suggestion::digest`].
    pub digest: String,
    /// How far the learning is.
    pub phase: Phase,
    /// How many rules.
    pub rules: u64,
    /// How many of them nobody decided on.
    pub undecided: u64,
    /// Blocking findings, warnings, the rest.
    pub findings: (u64, u64, u64),
    /// See [`Suggestion::updated`].
    pub updated: Option<Timestamp>,
}
