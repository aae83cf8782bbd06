//! What the controller wants of this node: a plan, whole or as what has changed of the one before, or what a plan would end.

use policy::plan::{NodePlan, PlanChange};
use tracing::{info, warn};

use super::super::keep::Second;
use super::{Order, Work};

impl Work {
    pub(super) fn order(&mut self, order: Order) {
        match order {
            Order::Plan { plan, adopt } => self.answer_plan(*plan, adopt, None),
            Order::Change(change) => match change.clone().onto(self.plan.as_ref().filter(|_| !self.apart)) {
                Ok(plan) => self.answer_plan(plan, false, Some(&change)),
                Err(why) => {
                    warn!(%why, "the whole plan is asked for");
                    self.uplink.wants_whole();
                }
            },
            Order::Preview { id, plan } => {
                let answer = self.preview(&plan.set).map_err(|e| e.to_string());
                self.uplink.answer(id, answer);
            }
        }
    }

    fn answer_plan(&mut self, plan: NodePlan, adopt: bool, change: Option<&PlanChange>) {
        let (store, generation) = (plan.store.clone(), plan.generation);
        let outcome = self.take_plan(plan, adopt, change);
        // While one that was not taken is what the controller has, nothing is said of the one before.
        self.told_failing = outcome.is_err() && !self.apart;
        if let Err(why) = &outcome {
            warn!(store, generation, why, "plan refused");
        } else if !self.inventory_known() {
            info!(store, generation, "the plan is bound, and the controller answered, once the engine says what runs here");
            self.answer_due = true;
            return;
        }
        self.uplink.applied(&store, generation, outcome);
    }

    /// The kernel has taken since what it refused before, and nothing lives on that is no longer allowed.
    pub(super) fn tell_what_came_into_force(&mut self) {
        let is_in_force = self.failing.is_none() && self.owed.is_none() && self.inventory_known();
        let Some(plan) = self.plan.as_ref().filter(|_| self.told_failing && is_in_force) else { return };
        info!(store = plan.store, generation = plan.generation, "the plan that the kernel refused is in force");
        // Whose connections were ended meanwhile was logged then; nobody waits for their number.
        self.uplink.applied(&plan.store, plan.generation, Ok(0));
        self.told_failing = false;
    }

    /// The plan that was taken while it was not known what runs here is bound now, or refused by the kernel.
    pub(super) fn answer_what_is_due(&mut self, ended: Option<u64>) {
        let Some(plan) = self.plan.as_ref().filter(|_| self.answer_due) else { return };
        let outcome = self.failing.clone().map_or(Ok(ended.unwrap_or_default()), Err);
        self.told_failing = outcome.is_err();
        self.uplink.applied(&plan.store, plan.generation, outcome);
        self.answer_due = false;
    }

    /// `change`: how the plan that is applied leads to it, where that is known.
    fn take_plan(&mut self, plan: NodePlan, adopt: bool, change: Option<&PlanChange>) -> Result<u64, String> {
        let current = self.plan.as_ref().filter(|current| !(adopt && current.store != plan.store));
        let follows = plan.may_follow(current).map_err(|refused| refused.to_string());
        self.apart = follows.is_err();
        follows?;
        if self.plan.as_ref() == Some(&plan) && self.failing.is_none() {
            return Ok(0);
        }
        // One copy on disk first: an agent that is killed right after the kernel has it must not come back with the older one. All else
        // that the disk is to have waits until living connections are ended, and the controller's answer waits for it. A full disk must
        // not keep a quarantine from acting either.
        let saved = self.save_plan(&plan, change);
        info!(store = %plan.store, generation = plan.generation, segments = plan.set.segments.len(), policies = plan.set.policies.len(), "plan taken");
        self.plan = Some(plan);
        let ended = self.bind_again();
        let outcome = match &self.failing {
            Some(why) => Err(why.clone()),
            // Else they were judged with the rest, and are not looked for twice.
            None => Ok(ended.unwrap_or_else(|| self.revoke())),
        };
        self.plan_saved(saved.and_then(Second::write));
        self.write_what_is_due();
        outcome
    }
}
