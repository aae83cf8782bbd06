//! Segments: workloads under one mode and one set of options. Which workload is in which segment is decided here, by the
//! controller and by the node alike, so that a new container needs no round trip.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::workload::Workload;

/// What happens to what the policy doesn't allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Observe, allow all.
    #[default]
    Learn,
    /// Evaluate the approved policy, log what it would deny, let it pass.
    Audit,
    /// Deny.
    Enforce,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Learn => "Learn",
            Self::Audit => "Audit",
            Self::Enforce => "Enforce",
        })
    }
}

/// Text that is not a mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a mode: write learn, audit or enforce")]
pub struct NotAMode {
    /// What was given.
    pub text: String,
}

impl FromStr for Mode {
    type Err = NotAMode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "learn" => Ok(Self::Learn),
            "audit" => Ok(Self::Audit),
            "enforce" => Ok(Self::Enforce),
            _ => Err(NotAMode { text: text.to_owned() }),
        }
    }
}

/// Which workloads a segment takes. The more particular selector wins: a workload by name, then its project, then a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Selector {
    /// One workload by name.
    Workload(Workload),
    /// Every workload of a Compose project (or Kubernetes namespace).
    Project(String),
    /// Every workload attached to a network of the engine, by the network's name.
    Network(String),
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(w) => write!(f, "workload {w}"),
            Self::Project(p) => write!(f, "project {p}"),
            Self::Network(n) => write!(f, "network {n}"),
        }
    }
}

/// What is done to a denied packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Refusal {
    /// TCP gets a reset, everything else an ICMP error, where that is safe: the application fails at once.
    #[default]
    Reject,
    /// Silence: the application waits for its time-out.
    Drop,
}

/// Workloads under one mode and one set of options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Segment {
    /// Its name, as in `bulkhead mode NAME enforce`.
    pub name: String,
    /// Whom it takes; empty takes nobody.
    pub members: BTreeSet<Selector>,
    /// What happens to what the policy doesn't allow.
    pub mode: Mode,
    /// What is done to a denied packet.
    #[serde(default)]
    pub refusal: Refusal,
    /// When the controller may raise the mode by itself; `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<Promotion>,
}

/// When a segment may be promoted without a person: Learn to Audit is never automatic (it needs an approval), Audit to
/// Enforce is under these conditions, all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Promotion {
    /// Healthy observed time in Audit, hours.
    pub healthy_hours: u32,
    /// Distinct hours in which traffic of the segment was seen.
    pub distinct_hours: u32,
    /// Would-be denials allowed during that time: none is the rule.
    #[serde(default)]
    pub would_be_denials: u64,
}

/// The segment of a workload, given the networks it is attached to: by name, then project, then network (the first by
/// segment name, where several match alike).
pub fn segment_of<'a, 'n>(
    segments: impl IntoIterator<Item = &'a Segment, IntoIter: Clone>,
    workload: &Workload,
    networks: impl IntoIterator<Item = &'n str>,
) -> Option<&'a Segment> {
    let segments = segments.into_iter();
    // Looked up, not compared one by one: a segment may name thousands.
    let taking = |selector: Selector| segments.clone().filter(|s| s.members.contains(&selector)).min_by_key(|s| &s.name);
    let by_project = || (!workload.namespace().is_empty()).then(|| Selector::Project(workload.namespace().to_owned()));
    taking(Selector::Workload(workload.clone()))
        .or_else(|| by_project().and_then(taking))
        .or_else(|| networks.into_iter().filter_map(|name| taking(Selector::Network(name.to_owned()))).min_by_key(|s| &s.name))
}
