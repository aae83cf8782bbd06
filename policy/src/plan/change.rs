//! What a plan has otherwise than the one before it: a node that has that one is told no more. A quarantine among a hundred thousand
//! rules is a few hundred bytes then, and not the twenty megabytes that take longer to read than all else together.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{MOST_RULES, NodePlan, PLAN_FORMAT, PlanRefused};
use crate::policy_set::{PolicySet, Quarantine, Rule, WorkloadPolicy};
use crate::segment::Segment;
use crate::workload::Workload;

/// The way from one plan to the next of the same store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanChange {
    /// [`PLAN_FORMAT`] of the writer.
    pub format: u32,
    /// The store of both plans.
    pub store: String,
    /// Generation of the plan that it begins from.
    pub from: u64,
    /// Generation of the plan that it leads to.
    pub to: u64,
    /// Policies that are new, or have other rules.
    pub policies: Vec<PolicyChange>,
    /// Workloads that have no policy any more.
    pub without: BTreeSet<Workload>,
    /// All segments, if there is one that is new, gone or otherwise: there are few.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segments: Option<Vec<Segment>>,
    /// All quarantines, if there is one that is new or gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantines: Option<Vec<Quarantine>>,
}

/// What is otherwise in one policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyChange {
    /// Whose policy.
    pub workload: Workload,
    /// It had none before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub first: bool,
    /// Rules that go.
    pub less: Sides,
    /// Rules that come.
    pub more: Sides,
}

/// Rules of both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Sides {
    /// Who may reach it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ingress: BTreeSet<Rule>,
    /// Whom it may reach.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub egress: BTreeSet<Rule>,
}

impl PolicyChange {
    fn between(workload: &Workload, old: Option<&WorkloadPolicy>, new: &WorkloadPolicy) -> Self {
        let none = BTreeSet::new();
        let (ingress, egress) = old.map_or((&none, &none), |old| (&old.ingress, &old.egress));
        let without = |a: &BTreeSet<Rule>, b: &BTreeSet<Rule>| a.difference(b).cloned().collect();
        Self {
            workload: workload.clone(),
            first: old.is_none(),
            less: Sides { ingress: without(ingress, &new.ingress), egress: without(egress, &new.egress) },
            more: Sides { ingress: without(&new.ingress, ingress), egress: without(&new.egress, egress) },
        }
    }

    /// False: the policy is not the one that this was made from.
    fn change(self, policy: &mut WorkloadPolicy) -> bool {
        let Self { workload: _, first: _, less, more } = self;
        let sides = [(&mut policy.ingress, less.ingress, more.ingress), (&mut policy.egress, less.egress, more.egress)];
        // Not lazily: what is left half done is thrown away by the caller.
        sides
            .into_iter()
            .all(|(rules, less, more)| less.iter().all(|rule| rules.remove(rule)) && more.into_iter().all(|rule| rules.insert(rule)))
    }
}

impl PlanChange {
    /// From one set in force at this generation to another one at that.
    pub fn between(store: &str, (from, old): (u64, &PolicySet), (to, new): (u64, &PolicySet)) -> Self {
        // A node has nothing to do with guardrails.
        let PolicySet { segments, policies, quarantines, guardrails: _ } = new;
        let differs = |(workload, policy): &(&Workload, &WorkloadPolicy)| old.policies.get(*workload) != Some(*policy);
        let changed = policies.iter().filter(differs).map(|(w, new)| PolicyChange::between(w, old.policies.get(w), new));
        Self {
            format: PLAN_FORMAT,
            store: store.to_owned(),
            from,
            to,
            policies: changed.collect(),
            without: old.policies.keys().filter(|workload| !policies.contains_key(*workload)).cloned().collect(),
            segments: (old.segments != *segments).then(|| segments.values().cloned().collect()),
            quarantines: (old.quarantines != *quarantines).then(|| quarantines.values().cloned().collect()),
        }
    }

    /// The plan that this plan becomes.
    ///
    /// # Errors
    /// A format that is not known, more than [`MOST_RULES`], another store, another generation than the one it begins from, or rules that
    /// are not those it was made from: nothing is guessed then, the whole plan has to be asked for.
    pub fn onto(self, plan: Option<&NodePlan>) -> Result<NodePlan, PlanRefused> {
        let Self { format, store, from, to, policies, without, segments, quarantines } = self;
        if format != PLAN_FORMAT {
            return Err(PlanRefused::UnknownFormat { found: format });
        }
        let other = || PlanRefused::OtherBase { from };
        let plan = plan.filter(|plan| plan.store == store && plan.generation == from && to >= from).ok_or_else(other)?;
        let mut set = PolicySet::clone(&plan.set);
        for workload in without {
            set.policies.remove(&workload).ok_or_else(other)?;
        }
        for policy in policies {
            if policy.first && set.policies.insert(policy.workload.clone(), WorkloadPolicy::empty(policy.workload.clone())).is_some() {
                return Err(other());
            }
            let its = set.policies.get_mut(&policy.workload).ok_or_else(other)?;
            if !policy.change(its) {
                return Err(other());
            }
        }
        let rules = set.policies.values().map(|policy| policy.ingress.len() + policy.egress.len()).sum();
        if rules > MOST_RULES {
            return Err(PlanRefused::TooLarge { rules });
        }
        if let Some(segments) = segments {
            set.segments = keyed(segments, |segment| &segment.name).ok_or_else(other)?;
        }
        if let Some(quarantines) = quarantines {
            set.quarantines = keyed(quarantines, |quarantine| &quarantine.workload).ok_or_else(other)?;
        }
        Ok(NodePlan { format, store, generation: to, set: set.into() })
    }
}

/// By its name; `None`: one is there twice.
fn keyed<K: Ord + Clone, V>(values: Vec<V>, key: impl Fn(&V) -> &K) -> Option<BTreeMap<K, V>> {
    let count = values.len();
    let keyed: BTreeMap<K, V> = values.into_iter().map(|value| (key(&value).clone(), value)).collect();
    (keyed.len() == count).then_some(keyed)
}
