//! Whether a segment may be promoted by its operator's own rule: from Audit to Enforce, when all of its conditions are met.
//!
//! Learn to Audit is never automatic, since it needs an approval; back is a person's break-glass and needs none.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;

use crate::check::list;
use crate::segment::{Mode, Promotion, Segment};
use crate::suggestion::{ProposedRule, RuleState, Suggestion};
use crate::workload::Workload;

/// What was seen of a segment since it is in Audit under the policies in force now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Healthy observed time, seconds.
    pub healthy_seconds: u64,
    /// Distinct hours with traffic of the segment.
    pub distinct_hours: u64,
    /// Flows that would have been denied.
    pub would_be_denials: u64,
    /// Running workloads of the segment without an approved policy.
    pub unlearned: Vec<Workload>,
    /// How many rules are proposed for what was in use and nobody decided on, by workload: see [`undecided`].
    pub undecided: BTreeMap<Workload, usize>,
    /// How many flows of use the graph has no room to list, by workload: a rule for them is proposed by nobody, and what an audit said of
    /// them is not counted.
    pub unlisted: BTreeMap<Workload, u64>,
}

/// One condition that is not met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmet {
    /// The operator wrote no rule: never automatic.
    NoRule,
    /// Only a segment in Audit is promoted.
    NotInAudit(Mode),
    /// Not observed for long enough.
    HealthyTime {
        /// So far, seconds.
        seconds: u64,
        /// Wanted, hours.
        hours: u32,
    },
    /// Too few distinct hours with traffic.
    DistinctHours {
        /// So far.
        hours: u64,
        /// Wanted.
        wanted: u32,
    },
    /// Enforcing would have denied something.
    WouldBeDenials {
        /// So far.
        flows: u64,
        /// Tolerated.
        tolerated: u64,
    },
    /// Workloads run that nobody approved a policy for.
    Unlearned(Vec<Workload>),
    /// Something was in use that is neither allowed nor rejected.
    Undecided(BTreeMap<Workload, usize>),
    /// Something was in use that is not listed.
    Unlisted(BTreeMap<Workload, u64>),
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRule => f.write_str("the segment has no promotion rule"),
            Self::NotInAudit(mode) => write!(f, "the segment is in {mode}, not in Audit"),
            Self::HealthyTime { seconds, hours } => {
                write!(f, "healthily observed for {} of {hours} h", crate::estimate::spoken(*seconds))
            }
            Self::DistinctHours { hours, wanted } => write!(f, "traffic in {hours} of {wanted} distinct hours"),
            Self::WouldBeDenials { flows, tolerated } => write!(f, "{flows} flows would have been denied, {tolerated} are tolerated"),
            Self::Unlearned(workloads) => {
                write!(f, "no approved policy for {}", list(workloads))
            }
            Self::Undecided(rules) => {
                let of = list(rules.iter().map(|(workload, rules)| format!("{rules} of {workload}")));
                write!(f, "rules for what was in use that are neither approved nor rejected: {of}")
            }
            Self::Unlisted(flows) => {
                let of = list(flows.iter().map(|(workload, flows)| format!("{flows} of {workload}")));
                write!(f, "flows in use that the graph has no room to list: {of}")
            }
        }
    }
}

/// Every condition that keeps a segment from being promoted; empty: it may be.
pub fn unmet(segment: &Segment, observed: &Observed) -> Vec<Unmet> {
    match segment.mode {
        Mode::Audit => {}
        mode @ (Mode::Learn | Mode::Enforce) => return vec![Unmet::NotInAudit(mode)],
    }
    let Some(Promotion { healthy_hours, distinct_hours, would_be_denials }) = segment.promotion.clone() else {
        return vec![Unmet::NoRule];
    };
    let mut unmet = Vec::new();
    if observed.healthy_seconds < u64::from(healthy_hours) * 3600 {
        unmet.push(Unmet::HealthyTime { seconds: observed.healthy_seconds, hours: healthy_hours });
    }
    if observed.distinct_hours < u64::from(distinct_hours) {
        unmet.push(Unmet::DistinctHours { hours: observed.distinct_hours, wanted: distinct_hours });
    }
    if observed.would_be_denials > would_be_denials {
        unmet.push(Unmet::WouldBeDenials { flows: observed.would_be_denials, tolerated: would_be_denials });
    }
    if !observed.unlearned.is_empty() {
        unmet.push(Unmet::Unlearned(observed.unlearned.clone()));
    }
    if !observed.undecided.is_empty() {
        unmet.push(Unmet::Undecided(observed.undecided.clone()));
    }
    if !observed.unlisted.is_empty() {
        unmet.push(Unmet::Unlisted(observed.unlisted.clone()));
    }
    unmet
}

/// The rules of a suggestion without which a promotion would cut what was in use, though nobody said no to them. What would have been
/// denied since `since` is left out: that is among the would-be denials, of which a promotion rule may tolerate some.
///
/// # Why
/// An audit tells of what happens in it. What a workload does once a month was seen while it was learned, perhaps, and not since.
pub fn undecided(suggestion: &Suggestion, since: Timestamp) -> impl Iterator<Item = &ProposedRule> {
    suggestion.rules.iter().filter(move |rule| {
        let counted = rule.evidence.would_deny > 0 && rule.evidence.last.is_some_and(|last| last >= since);
        rule.state == RuleState::Undecided && rule.evidence.used() > 0 && !counted
    })
}
