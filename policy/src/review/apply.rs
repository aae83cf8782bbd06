//! What a decision makes of the policy set. Pure: the set goes in, the next one comes out with what changed; recording it, and
//! who decided, is the controller's.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::check::{BREAKS_GUARDRAIL, covers};
use crate::diff::{self, PolicyDiff};
use crate::evaluate::Scene;
use crate::guardrail::{self, Breach};
use crate::learn::Rejected;
use crate::policy_set::{Direction, Peer, PolicySet, Rule, WorkloadPolicy};
use crate::segment::Mode;
use crate::service::Ports;
use crate::suggestion::{Origin, ProposedRule, RuleState, Severity, Suggestion};
use crate::workload::Workload;

/// What a decision made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reviewed {
    /// The policy set to publish; equal to the one before if nothing changed.
    pub set: PolicySet,
    /// What is different in it.
    pub changed: Vec<PolicyDiff>,
    /// Rejections to remember from now on.
    pub remember: BTreeSet<Rejected>,
    /// Rejections to forget: a person approved what was rejected.
    pub forget: BTreeSet<Rejected>,
    /// The rules the decision was about, printed, for the record.
    pub rules: Vec<String>,
    /// What the person should be told beside.
    pub notes: Vec<String>,
}

impl Reviewed {
    fn of(before: &PolicySet, set: PolicySet) -> Result<Self, Refused> {
        within_guardrails(before, &set)?;
        let changed = diff::sets(before, &set).policies;
        Ok(Self { set, changed, remember: BTreeSet::new(), forget: BTreeSet::new(), rules: Vec::new(), notes: Vec::new() })
    }
}

/// The whole suggestion or some of its rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Choice {
    /// Every rule that is undecided; denied attempts and rejected rules are left out.
    #[default]
    Whole,
    /// Exactly these, by id.
    Rules(BTreeSet<String>),
}

/// A decision on one digest of a suggestion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reading {
    /// The digest that was read, in hex.
    pub digest: String,
    /// What was chosen.
    #[serde(default)]
    pub choice: Choice,
    /// Codes of blocking findings that are accepted.
    #[serde(default)]
    pub accept: BTreeSet<String>,
}

/// Why a decision is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The suggestion is not the one that was read.
    #[error(
        "the suggestion for {workload} has changed: {read} was read, {now} is there now. Read it again (`bulkhead describe suggestion {workload}`), then decide"
    )]
    Moved {
        /// Whose.
        workload: Workload,
        /// The digest that was read.
        read: String,
        /// The digest now.
        now: String,
    },
    /// A blocking finding was not accepted.
    #[error("the suggestion for {workload} has a blocking finding, {code}: {text} To approve all the same: --accept {code}")]
    Blocked {
        /// Whose.
        workload: Workload,
        /// The finding's code.
        code: String,
        /// The finding's text.
        text: String,
    },
    /// No such rule on the suggestion.
    #[error("the suggestion for {workload} has no rule {id}")]
    NoSuchRule {
        /// Whose.
        workload: Workload,
        /// What was asked for.
        id: String,
    },
    /// A choice of rules that names none.
    #[error("no rule was named for {workload}: name some, or decide on the whole")]
    NothingChosen {
        /// Whose.
        workload: Workload,
    },
    /// Not a workload that is known.
    #[error("{workload} is not a workload that is known here")]
    UnknownWorkload {
        /// What was named.
        workload: Workload,
    },
    /// Neither end has a policy.
    #[error("neither {from} nor {to} is a workload: only workloads have policies")]
    NoWorkload {
        /// The client as it was given.
        from: Peer,
        /// The server as it was given.
        to: Peer,
    },
    /// A limit that has passed already.
    #[error("{until} has passed already")]
    Past {
        /// The limit.
        until: Timestamp,
    },
    /// Without any policy the workload could do nothing.
    #[error(
        "{workload} is in Enforce: without an approved policy all of its traffic would be denied. Switch its segment back first (`bulkhead mode {segment} audit`)"
    )]
    Enforced {
        /// Whose.
        workload: Workload,
        /// Its segment.
        segment: String,
    },
    /// Workloads run that nobody approved a policy for.
    #[error(
        "segment {segment} cannot go to Enforce: no approved policy for {}. Approve one, or accept that all their traffic is denied: --deny-unlearned {}",
        names(workloads),
        names(workloads)
    )]
    Unlearned {
        /// Which segment.
        segment: String,
        /// Who has none.
        workloads: Vec<Workload>,
    },
    /// A guardrail forbids what would be allowed.
    #[error("{}", breaches.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Forbidden {
        /// At least one.
        breaches: Vec<Breach>,
    },
    /// No segment of that name.
    #[error("there is no segment {segment}")]
    NoSuchSegment {
        /// What was named.
        segment: String,
    },
}

fn names(workloads: &[Workload]) -> String {
    workloads.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// That a change allows nothing new that a guardrail forbids.
///
/// # Errors
/// [`Refused::Forbidden`] with all of it.
pub fn within_guardrails(before: &PolicySet, after: &PolicySet) -> Result<(), Refused> {
    match guardrail::newly(before, after) {
        breaches if breaches.is_empty() => Ok(()),
        breaches => Err(Refused::Forbidden { breaches }),
    }
}

fn printed(direction: Direction, rule: &Rule) -> String {
    format!("{direction} {rule}")
}

fn chosen<'s>(suggestion: &'s Suggestion, reading: &Reading) -> Result<Vec<&'s ProposedRule>, Refused> {
    let workload = || suggestion.workload.clone();
    if reading.digest != suggestion.digest {
        return Err(Refused::Moved { workload: workload(), read: reading.digest.clone(), now: suggestion.digest.clone() });
    }
    let Choice::Rules(ids) = &reading.choice else {
        return Ok(suggestion.rules.iter().collect());
    };
    if ids.is_empty() {
        return Err(Refused::NothingChosen { workload: workload() });
    }
    let named = |id: &String| {
        let rule = suggestion.rules.iter().find(|rule| rule.id == *id);
        rule.ok_or_else(|| Refused::NoSuchRule { workload: workload(), id: id.clone() })
    };
    ids.iter().map(named).collect()
}

/// Adds what was chosen of a suggestion to the policy in force. Takes nothing away.
///
/// # Errors
/// [`Refused::Moved`], [`Refused::Blocked`], [`Refused::NoSuchRule`], [`Refused::NothingChosen`].
pub fn approve(set: &PolicySet, suggestion: &Suggestion, reading: &Reading) -> Result<Reviewed, Refused> {
    let workload = &suggestion.workload;
    let whole = reading.choice == Choice::Whole;
    let wanted = |rule: &&ProposedRule| !whole || (rule.state != RuleState::Rejected && rule.origin != Origin::DeniedAttempt);
    let rules: Vec<&ProposedRule> = chosen(suggestion, reading)?.into_iter().filter(wanted).collect();
    // What a guardrail forbids is refused rule by rule, below, and never accepted.
    let blocking = suggestion.findings.iter().filter(|f| f.severity == Severity::Blocking && f.code != BREAKS_GUARDRAIL);
    if let Some(finding) = blocking.into_iter().find(|finding| !reading.accept.contains(&finding.code)) {
        return Err(Refused::Blocked { workload: workload.clone(), code: finding.code.clone(), text: finding.text.clone() });
    }

    let mut next = set.clone();
    let policy = next.policies.entry(workload.clone()).or_insert_with(|| WorkloadPolicy::empty(workload.clone()));
    for proposed in &rules {
        // What a wider rule allows already is not written a second time.
        if !policy.about(proposed.direction, &proposed.rule.peer).any(|rule| covers(rule, &proposed.rule)) {
            policy.rules_mut(proposed.direction).insert(proposed.rule.clone());
        }
    }
    let mut reviewed = Reviewed::of(set, next)?;
    reviewed.rules = rules.iter().map(|proposed| printed(proposed.direction, &proposed.rule)).collect();
    let again = rules.iter().filter(|proposed| proposed.state == RuleState::Rejected);
    reviewed.forget = again.map(|proposed| Rejected::of(workload, proposed.direction, &proposed.rule)).collect();
    Ok(reviewed)
}

/// Remembers that rules of a suggestion are not wanted. What is in force stays in force: taking it away is [`edit`].
///
/// # Errors
/// [`Refused::Moved`], [`Refused::NoSuchRule`], [`Refused::NothingChosen`].
pub fn reject(set: &PolicySet, suggestion: &Suggestion, reading: &Reading) -> Result<Reviewed, Refused> {
    let rules = chosen(suggestion, reading)?;
    let mut reviewed = Reviewed::of(set, set.clone())?;
    let (in_force, open): (Vec<&ProposedRule>, Vec<_>) = rules.into_iter().partition(|rule| rule.state == RuleState::Approved);
    let in_force = in_force.iter().map(|rule| {
        let rule = printed(rule.direction, &rule.rule);
        format!("{rule} is in force and stays so: `bulkhead edit {}` takes it out", suggestion.workload)
    });
    reviewed.notes = in_force.collect();
    reviewed.rules = open.iter().map(|rule| printed(rule.direction, &rule.rule)).collect();
    reviewed.remember = open.iter().map(|rule| Rejected::of(&suggestion.workload, rule.direction, &rule.rule)).collect();
    Ok(reviewed)
}

/// An edge added by hand, on both of its sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Edge {
    /// Client.
    pub from: Peer,
    /// Server.
    pub to: Peer,
    /// On the server's ports.
    pub ports: Ports,
    /// Until when; `None`: until somebody takes it back.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

/// Allows an edge by hand, also before any traffic: egress of the client and ingress of the server, as far as they are workloads.
/// `known`: the workloads that may be named.
///
/// # Errors
/// [`Refused::NoWorkload`], [`Refused::UnknownWorkload`], [`Refused::Past`], [`Refused::Forbidden`].
pub fn allow(set: &PolicySet, edge: &Edge, known: &BTreeSet<Workload>, now: Timestamp) -> Result<Reviewed, Refused> {
    let Edge { from, to, ports, until } = edge;
    if let Some(until) = until.filter(|until| *until <= now) {
        return Err(Refused::Past { until });
    }
    let mut sides = Vec::new();
    for (own, direction, peer) in [(from, Direction::Egress, to), (to, Direction::Ingress, from)] {
        let Peer::Workload(workload) = own else { continue };
        if !known.contains(workload) && !set.policies.contains_key(workload) {
            return Err(Refused::UnknownWorkload { workload: workload.clone() });
        }
        sides.push((workload, direction, Rule { peer: peer.clone(), ports: *ports, until: *until }));
    }
    if sides.is_empty() {
        return Err(Refused::NoWorkload { from: from.clone(), to: to.clone() });
    }
    let mut next = set.clone();
    let mut notes = BTreeSet::new();
    for (workload, direction, rule) in &sides {
        if !set.policies.contains_key(*workload) {
            notes.insert(format!(
                "{workload} had no approved policy: with this one rule it counts as approved. Approve what was learned of it before Enforce"
            ));
        }
        let policy = next.policies.entry((*workload).clone()).or_insert_with(|| WorkloadPolicy::empty((*workload).clone()));
        policy.rules_mut(*direction).insert(rule.clone());
    }
    let mut reviewed = Reviewed::of(set, next)?;
    reviewed.rules = sides.iter().map(|(workload, direction, rule)| format!("{workload} {}", printed(*direction, rule))).collect();
    reviewed.forget = sides.iter().map(|(workload, direction, rule)| Rejected::of(workload, *direction, rule)).collect();
    reviewed.notes = notes.into_iter().collect();
    Ok(reviewed)
}

/// Replaces a policy by one written by hand. Peers that are not in `known` are allowed (they may come later) and noted.
///
/// # Errors
/// [`Refused::Forbidden`].
pub fn edit(set: &PolicySet, policy: WorkloadPolicy, known: &BTreeSet<Workload>) -> Result<Reviewed, Refused> {
    let mut next = set.clone();
    let workload = policy.workload.clone();
    let mut reviewed_rules = Vec::new();
    let mut notes = BTreeSet::new();
    let mut forget = BTreeSet::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for rule in policy.rules(direction) {
            reviewed_rules.push(printed(direction, rule));
            forget.insert(Rejected::of(&workload, direction, rule));
            if let Peer::Workload(peer) = &rule.peer
                && !known.contains(peer)
            {
                notes.insert(format!("{peer} is not a workload that is known here: the rule holds once one of that name runs"));
            }
        }
    }
    next.policies.insert(workload, policy);
    let mut reviewed = Reviewed::of(set, next)?;
    reviewed.rules = reviewed_rules;
    reviewed.notes = notes.into_iter().collect();
    reviewed.forget = forget;
    Ok(reviewed)
}

/// Goes back to an earlier policy of a workload; `None`: to the time before it had one. `networks`: the workloads that run, each with
/// the names of its networks, to find its segment.
///
/// # Errors
/// [`Refused::Enforced`] if that would leave a running workload in Enforce without any policy; [`Refused::Forbidden`].
pub fn revert(
    set: &PolicySet,
    workload: &Workload,
    earlier: Option<&WorkloadPolicy>,
    networks: &BTreeMap<Workload, BTreeSet<String>>,
    now: Timestamp,
) -> Result<Reviewed, Refused> {
    let mut next = set.clone();
    match earlier {
        Some(policy) => {
            let policy = WorkloadPolicy { workload: workload.clone(), ..policy.clone() };
            next.policies.insert(workload.clone(), policy);
        }
        None => {
            // A policy of a name that nobody has protects nobody, and may be a mistyped one.
            if networks.contains_key(workload)
                && let Some(segment) = (Scene { set, networks, now }).segment(workload)
                && segment.mode == Mode::Enforce
            {
                return Err(Refused::Enforced { workload: workload.clone(), segment: segment.name.clone() });
            }
            next.policies.remove(workload);
        }
    }
    let mut reviewed = Reviewed::of(set, next)?;
    reviewed.rules = reviewed
        .changed
        .iter()
        .flat_map(|diff| {
            let removed = diff.removed.iter().map(|rule| format!("- {rule}"));
            removed.chain(diff.added.iter().map(|rule| format!("+ {rule}"))).collect::<Vec<_>>()
        })
        .collect();
    Ok(reviewed)
}
