//! What would change: two policies, two policy sets, or a suggestion and what is in force, side by side. Printed as people read
//! diffs: `+` is added, `-` is taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::check::{covers, within};
use crate::guardrail::{self, Guardrail};
use crate::policy_set::{Direction, PolicySet, Quarantine, Rule, WorkloadPolicy};
use crate::segment::Segment;
use crate::suggestion::{Origin, RuleState, Suggestion};
use crate::workload::Workload;

/// A rule of one side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sided {
    /// Which side.
    pub direction: Direction,
    /// The rule.
    pub rule: Rule,
}

impl fmt::Display for Sided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.direction, self.rule)
    }
}

/// What happened to one policy as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Existence {
    /// There before and after.
    Kept,
    /// The workload had no approved policy before.
    First,
    /// The workload has no approved policy afterwards.
    Gone,
}

/// The difference between two policies of one workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyDiff {
    /// Whose.
    pub workload: Workload,
    /// Whether there is a policy before and after.
    pub existence: Existence,
    /// Allowed afterwards.
    pub added: BTreeSet<Sided>,
    /// Not allowed afterwards.
    pub removed: BTreeSet<Sided>,
}

fn sided(policy: Option<&WorkloadPolicy>) -> BTreeSet<Sided> {
    let side = |policy: &WorkloadPolicy, direction| -> Vec<Sided> {
        policy.rules(direction).iter().map(|rule| Sided { direction, rule: rule.clone() }).collect()
    };
    let both = policy.map(|policy| [side(policy, Direction::Ingress), side(policy, Direction::Egress)].concat());
    both.into_iter().flatten().collect()
}

/// The difference between two policies of one workload; `None`: they are the same.
pub fn policy(workload: &Workload, before: Option<&WorkloadPolicy>, after: Option<&WorkloadPolicy>) -> Option<PolicyDiff> {
    if before == after {
        return None;
    }
    let existence = match (before, after) {
        (None, _) => Existence::First,
        (Some(_), None) => Existence::Gone,
        (Some(_), Some(_)) => Existence::Kept,
    };
    let (old, new) = (sided(before), sided(after));
    Some(PolicyDiff {
        workload: workload.clone(),
        existence,
        added: new.difference(&old).cloned().collect(),
        removed: old.difference(&new).cloned().collect(),
    })
}

impl fmt::Display for PolicyDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let note = match self.existence {
            Existence::Kept => "",
            Existence::First => " (first policy)",
            Existence::Gone => " (policy removed)",
        };
        write!(f, "policy {}{note}", self.workload)?;
        self.removed.iter().try_for_each(|rule| write!(f, "\n- {rule}"))?;
        self.added.iter().try_for_each(|rule| write!(f, "\n+ {rule}"))
    }
}

/// One thing before and after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Changed<T> {
    /// Its name.
    pub name: String,
    /// `None`: it is new.
    pub before: Option<T>,
    /// `None`: it is gone.
    pub after: Option<T>,
}

/// The difference between two policy sets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct SetDiff {
    /// Policies that differ.
    pub policies: Vec<PolicyDiff>,
    /// Segments that differ.
    pub segments: Vec<Changed<Segment>>,
    /// Quarantines that differ.
    pub quarantines: Vec<Changed<Quarantine>>,
    /// Guardrails that differ.
    pub guardrails: Vec<Changed<Guardrail>>,
}

impl SetDiff {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        let Self { policies, segments, quarantines, guardrails } = self;
        policies.is_empty() && segments.is_empty() && quarantines.is_empty() && guardrails.is_empty()
    }
}

fn changed<K: Ord + ToString, T: Clone + PartialEq>(before: &BTreeMap<K, T>, after: &BTreeMap<K, T>) -> Vec<Changed<T>> {
    let names: BTreeSet<&K> = before.keys().chain(after.keys()).collect();
    let differs = |name: &&K| before.get(name) != after.get(name);
    let change = |name: &K| Changed { name: name.to_string(), before: before.get(name).cloned(), after: after.get(name).cloned() };
    names.into_iter().filter(differs).map(change).collect()
}

/// The difference between two policy sets.
pub fn sets(before: &PolicySet, after: &PolicySet) -> SetDiff {
    let workloads: BTreeSet<&Workload> = before.policies.keys().chain(after.policies.keys()).collect();
    let differs = |workload: &Workload| policy(workload, before.policies.get(workload), after.policies.get(workload));
    SetDiff {
        policies: workloads.into_iter().filter_map(differs).collect(),
        segments: changed(&before.segments, &after.segments),
        quarantines: changed(&before.quarantines, &after.quarantines),
        guardrails: changed(&before.guardrails, &after.guardrails),
    }
}

impl fmt::Display for SetDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let segment = |segment: &Segment| {
            let members: Vec<String> = segment.members.iter().map(ToString::to_string).collect();
            format!("{}: {} [{}]", segment.name, segment.mode, members.join(", "))
        };
        let mut lines: Vec<String> = Vec::new();
        for Changed { name: _, before, after } in &self.segments {
            lines.extend(before.as_ref().map(|before| format!("- segment {}", segment(before))));
            lines.extend(after.as_ref().map(|after| format!("+ segment {}", segment(after))));
        }
        for Changed { name, before, after } in &self.quarantines {
            lines.extend(before.as_ref().map(|_| format!("- quarantine {name}")));
            lines.extend(after.as_ref().map(|_| format!("+ quarantine {name}")));
        }
        for Changed { name, before, after } in &self.guardrails {
            lines.extend(before.as_ref().map(|_| format!("- guardrail {name}")));
            lines.extend(after.as_ref().map(|_| format!("+ guardrail {name}")));
        }
        lines.extend(self.policies.iter().map(ToString::to_string));
        f.write_str(&lines.join("\n"))
    }
}

/// A proposed rule beside what is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// What approving the whole suggestion does with it.
    pub sign: Sign,
    /// The rule.
    pub rule: Sided,
    /// Its id on the suggestion; empty for a rule that is only in force.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
}

/// What approving a whole suggestion does with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sign {
    /// Adds it.
    Added,
    /// It is in force already.
    InForce,
    /// It is in force and was not proposed: it stays. `bulkhead edit` takes it out.
    NotProposed,
    /// Leaves it out: a person rejected it.
    Rejected,
    /// Leaves it out: a denied attempt is approved only by its id.
    DeniedAttempt,
    /// Is refused because of it: a guardrail forbids it. Rejected, it is left out.
    Forbidden,
}

/// A suggestion beside what is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SuggestionDiff {
    /// Whose.
    pub workload: Workload,
    /// The suggestion's digest.
    pub digest: String,
    /// The rules, in their order.
    pub lines: Vec<Line>,
}

impl SuggestionDiff {
    /// Whether approving the whole would change anything.
    pub fn changes(&self) -> bool {
        self.lines.iter().any(|line| line.sign == Sign::Added)
    }
}

/// A suggestion beside what is in force.
pub fn suggestion(suggestion: &Suggestion, set: &PolicySet, now: Timestamp) -> SuggestionDiff {
    let in_force = set.policies.get(&suggestion.workload);
    let forbidden = |direction, rule: &Rule| !guardrail::forbidding(&set.guardrails, &suggestion.workload, direction, rule).is_empty();
    let mut lines: Vec<Line> = Vec::new();
    for proposed in &suggestion.rules {
        let sign = match (proposed.state, proposed.origin) {
            (RuleState::Approved, _) => Sign::InForce,
            (RuleState::Rejected, _) => Sign::Rejected,
            (RuleState::Undecided, _) if forbidden(proposed.direction, &proposed.rule) => Sign::Forbidden,
            (RuleState::Undecided, Origin::DeniedAttempt) => Sign::DeniedAttempt,
            (RuleState::Undecided, _) => Sign::Added,
        };
        let rule = Sided { direction: proposed.direction, rule: proposed.rule.clone() };
        lines.push(Line { sign, rule, id: proposed.id.clone() });
    }
    let proposed = |direction| {
        let of_this = suggestion.rules.iter().filter(|proposed| proposed.direction == direction);
        let mut rules: Vec<&Rule> = of_this.map(|proposed| &proposed.rule).collect();
        rules.sort_unstable();
        rules
    };
    let [ingress, egress] = [Direction::Ingress, Direction::Egress].map(proposed);
    for rule in sided(in_force).into_iter().filter(|rule| rule.rule.in_force(now)) {
        let proposed = match rule.direction {
            Direction::Ingress => &ingress,
            Direction::Egress => &egress,
        };
        if !within(proposed, &rule.rule.peer).iter().any(|narrow| covers(&rule.rule, narrow)) {
            lines.push(Line { sign: Sign::NotProposed, rule, id: String::new() });
        }
    }
    lines.sort_by(|a, b| a.rule.cmp(&b.rule).then(a.sign.cmp(&b.sign)));
    SuggestionDiff { workload: suggestion.workload.clone(), digest: suggestion.digest.clone(), lines }
}

impl fmt::Display for SuggestionDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.workload, self.digest.get(..12).unwrap_or(&self.digest))?;
        for Line { sign, rule, id } in &self.lines {
            let (mark, note) = match sign {
                Sign::Added => ('+', ""),
                Sign::InForce => (' ', ""),
                Sign::NotProposed => (' ', "  (in force, not seen)"),
                Sign::Rejected => ('!', "  (rejected)"),
                Sign::DeniedAttempt => ('?', "  (denied attempt)"),
                Sign::Forbidden => ('!', "  (a guardrail forbids it)"),
            };
            let id = if id.is_empty() { "------------" } else { id };
            write!(f, "\n{mark} {id}  {rule}{note}")?;
        }
        Ok(())
    }
}
