//! The reference meaning: is this connection allowed, and why. nftables, NetworkPolicies and every export must agree with it.
//!
//! # Why
//! As in NetworkPolicy (networking.k8s.io/v1): a connection passes if every end in Enforce allows it, the sender by its
//! egress and the receiver by its ingress. The outside and the host have no side of their own.

mod index;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::index::Index;
use crate::policy_set::{Direction, PolicySet, Rule};
use crate::segment::{Mode, Refusal, Segment, segment_of};
use crate::service::Service;
use crate::workload::{Endpoint, Workload};

/// A connection to be judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and the server's port.
    pub service: Service,
    /// Whether a network that carries it is guarded: then an address that is not bound to anybody is denied.
    pub guarded: bool,
}

/// What is in force, at a moment, among the workloads that are known.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// Policies, segments, quarantines.
    pub set: &'a PolicySet,
    /// Names of the networks that each known workload is attached to.
    pub networks: &'a BTreeMap<Workload, BTreeSet<String>>,
    /// Rules with an end are over after it.
    pub now: Timestamp,
}

impl<'a> Scene<'a> {
    /// The segment that a workload is in.
    pub fn segment(&self, workload: &Workload) -> Option<&'a Segment> {
        let none = BTreeSet::new();
        let networks = self.networks.get(workload).unwrap_or(&none);
        segment_of(self.set.segments.values(), workload, networks.iter().map(String::as_str))
    }

    /// How a workload stands, whatever the connection.
    pub fn standing(&self, workload: &Workload) -> Standing {
        if self.set.quarantines.contains_key(workload) {
            return Standing::Quarantined;
        }
        self.segment(workload).map_or(Standing::Open, Standing::of)
    }
}

/// How the packets of a workload are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Standing {
    /// Learn, or in no segment: all allowed.
    Open,
    /// What the policy doesn't allow is logged and passes.
    Audit,
    /// What the policy doesn't allow is denied, in this manner.
    Enforce(Refusal),
    /// Everything is denied.
    Quarantined,
}

impl Standing {
    /// Of those in this segment, unless they are in quarantine.
    fn of(segment: &Segment) -> Self {
        match segment.mode {
            Mode::Learn => Self::Open,
            Mode::Audit => Self::Audit,
            Mode::Enforce => Self::Enforce(segment.refusal),
        }
    }
}

/// What one side says, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Side {
    /// The outside, the host: no side of its own.
    None,
    /// The workload is in Learn or in no segment.
    Open {
        /// Whose side.
        workload: Workload,
    },
    /// A rule allows it.
    Allowed {
        /// Whose side.
        workload: Workload,
        /// Which side.
        direction: Direction,
        /// The rule.
        rule: Rule,
    },
    /// No rule allows it.
    NoRuleAllows {
        /// Whose side.
        workload: Workload,
        /// Which side.
        direction: Direction,
        /// False: the workload has no approved policy at all.
        approved: bool,
        /// True in Audit: it passes and is logged.
        audit: bool,
    },
    /// The workload is cut off.
    Quarantined {
        /// Whose side.
        workload: Workload,
    },
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no side of its own"),
            Self::Open { workload } => write!(f, "{workload} is not enforced"),
            Self::Allowed { workload, direction, rule } => write!(f, "policy {workload}, {direction}: {rule}"),
            Self::NoRuleAllows { workload, direction, approved: true, .. } => {
                write!(f, "no {direction} rule of policy {workload} allows it")
            }
            Self::NoRuleAllows { workload, approved: false, .. } => write!(f, "{workload} has no approved policy"),
            Self::Quarantined { workload } => write!(f, "{workload} is quarantined"),
        }
    }
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// Passes.
    Allow,
    /// Passes and is logged: an end in Audit doesn't allow it.
    WouldDeny,
    /// Denied.
    Deny,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::WouldDeny => "would deny",
            Self::Deny => "deny",
        })
    }
}

/// A verdict with what each side said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The client's side.
    pub egress: Side,
    /// The server's side.
    pub ingress: Side,
    /// An end is an address that belongs to nobody, on a guarded network: denied whatever the sides say.
    pub unknown_address: bool,
}

impl Decision {
    /// The reason in one line: what denies it, else what allows it.
    pub fn reason(&self) -> String {
        if self.unknown_address {
            return "an address that belongs to no container, on a guarded network".to_owned();
        }
        let weight = |side: &Side| match side {
            Side::Quarantined { .. } => 0,
            Side::NoRuleAllows { audit: false, .. } => 1,
            Side::NoRuleAllows { audit: true, .. } => 2,
            Side::Allowed { .. } => 3,
            Side::Open { .. } => 4,
            Side::None => 5,
        };
        let (egress, ingress) = (weight(&self.egress), weight(&self.ingress));
        match (&self.egress, &self.ingress) {
            (Side::None, Side::None) => "neither end is a workload".to_owned(),
            // Both said the same kind of thing: both are named.
            (a, b) if egress == ingress => format!("{a}; {b}"),
            (a, _) if egress < ingress => a.to_string(),
            (_, b) => b.to_string(),
        }
    }
}

/// What a workload's side says, by its standing; which rule of its policy allows the connection is asked only where that matters. No
/// policy: `None`.
fn side<'r>(workload: &Workload, standing: Standing, direction: Direction, allowing: impl FnOnce() -> Option<Option<&'r Rule>>) -> Side {
    let workload = workload.clone();
    let audit = match standing {
        Standing::Quarantined => return Side::Quarantined { workload },
        Standing::Open => return Side::Open { workload },
        Standing::Audit => true,
        Standing::Enforce(_) => false,
    };
    match allowing() {
        Some(Some(rule)) => Side::Allowed { workload, direction, rule: rule.clone() },
        none => Side::NoRuleAllows { workload, direction, approved: none.is_some(), audit },
    }
}

/// The verdict on a connection, with its reason.
pub fn evaluate(scene: &Scene<'_>, connection: &Connection) -> Decision {
    let of = |own: &Endpoint, peer: &Endpoint, direction| {
        let Some(workload) = own.workload() else { return Side::None };
        side(workload, scene.standing(workload), direction, || {
            let policy = scene.set.policies.get(workload)?;
            Some(policy.allowing(direction, peer, connection.service, scene.now))
        })
    };
    let (from, to) = (&connection.from, &connection.to);
    judged(connection, of(from, to, Direction::Egress), of(to, from, Direction::Ingress))
}

/// What follows from what both sides say.
fn judged(connection: &Connection, egress: Side, ingress: Side) -> Decision {
    let Connection { from, to, guarded, .. } = connection;
    let unknown_address = *guarded && [from, to].into_iter().any(|end| matches!(end, Endpoint::Unknown(_)));
    let denies = |side: &Side| matches!(side, Side::Quarantined { .. } | Side::NoRuleAllows { audit: false, .. });
    let would = |side: &Side| matches!(side, Side::NoRuleAllows { audit: true, .. });
    let verdict = if unknown_address || denies(&egress) || denies(&ingress) {
        Verdict::Deny
    } else if would(&egress) || would(&ingress) {
        Verdict::WouldDeny
    } else {
        Verdict::Allow
    };
    Decision { verdict, egress, ingress, unknown_address }
}
