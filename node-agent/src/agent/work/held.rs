//! What is wanted into the kernel and onto the disk; the kernel compared with it, and repaired.

use std::collections::BTreeSet;

use policy::bind::Binding;
use policy::plan::PlanChange;
use policy::ruleset::Change;
use policy::{NodePlan, Ruleset};
use tokio::time::Instant;
use tracing::info;

use super::{FULL_COMPARE_EVERY, KeepError, RETRY_AFTER, TIED_AGAIN_AFTER, Work, chain, keep};
use crate::enforce::{Applied, Drift, Enforcer};

/// What the kernel has and the disk has not.
pub(super) enum Due {
    Change(Box<Change>),
    Whole,
}

impl Work {
    /// The last ruleset, as it was bound: its bridges are closed by name before the engine has made them.
    pub(super) fn load_ruleset(&mut self) {
        if self.plan.is_none() {
            return;
        }
        let change = |ruleset: &mut Ruleset, change: Change| {
            ruleset.change(&change);
            true
        };
        match self.keep.load_grown(keep::RULESET, change) {
            Ok(Some(ruleset)) => {
                info!(bridges = ruleset.watched.len(), "the last ruleset is put back until the engine answers");
                self.bound = self.plan.as_ref().map(|plan| plan.generation);
                self.binding = Binding::of(ruleset);
                self.enforce(&Change::default());
                self.write_what_is_due();
            }
            Ok(None) => {}
            Err(error) => self.alarm(error.to_string()),
        }
    }

    /// Makes the kernel hold what is wanted, which `change` led to from what was wanted before.
    pub(super) fn enforce(&mut self, change: &Change) {
        let whole = !self.written || self.failing.is_some() || !self.adrift.is_empty();
        if whole || !change.watched.is_empty() {
            let bridges: BTreeSet<String> = self.binding.ruleset().watched.keys().cloned().collect();
            self.filtered.send_if_modified(|known| {
                let news = *known != bridges;
                *known = bridges;
                news
            });
        }
        let wanted = self.binding.ruleset();
        // After a refusal nobody knows what is there.
        if wanted.watched.is_empty() && !self.written && self.failing.is_none() {
            return;
        }
        let applied = if whole { self.enforcer.apply(wanted) } else { self.enforcer.begin(wanted, change) };
        match applied {
            Ok(applied) => {
                let first = !std::mem::replace(&mut self.written, true);
                self.enforced(applied);
                self.due.push(if first { Due::Whole } else { Due::Change(Box::new(change.clone())) });
            }
            Err(error) => {
                let text = chain(&error);
                self.failing = Some(text.clone());
                self.wake = Instant::now() + RETRY_AFTER;
                self.alarm(format!("what is enforced could not be changed, what was there stays: {text}"));
                // What the next attempt does is no longer this change.
                self.unsaved = true;
            }
        }
    }

    fn enforced(&mut self, applied: Applied) {
        if applied.changed > 0 || applied.rules_written {
            info!(changed = applied.changed, rules_written = applied.rules_written, kernel_generation = applied.generation_id, ownership = %applied.ownership, absent = ?applied.absent, adrift = ?applied.adrift, "enforced");
        }
        self.recovered();
        if self.enforcer.is_settled() {
            self.tied(applied.adrift);
        } else {
            self.unsettled = true;
        }
    }

    /// The kernel has taken what is wanted. What was ended while it had not may have begun again under what was there.
    fn recovered(&mut self) {
        if self.failing.take().is_some() {
            self.owed.get_or_insert_with(Instant::now);
        }
    }

    /// Whether anything was bound since this was asked last that the bridges are to follow.
    pub(super) fn bound_since(&mut self) -> bool {
        std::mem::take(&mut self.unsettled) && !self.enforcer.is_settled()
    }

    /// The bridges follow the tables. Each of their changes waits for the lock of all interfaces, which the engine holds again and again
    /// while containers start, and nobody is to wait with it to be bound.
    pub(super) fn settle(&mut self) {
        if self.enforcer.is_settled() || self.failing.is_some() {
            return;
        }
        match self.enforcer.settle(self.binding.ruleset()) {
            Ok(adrift) => self.tied(adrift),
            Err(error) => {
                let text = chain(&error);
                self.failing = Some(text.clone());
                self.wake = Instant::now() + RETRY_AFTER;
                self.alarm(format!("ports could not be tied to their MAC addresses, what was there stays: {text}"));
            }
        }
    }

    /// `adrift`: ports whose MAC addresses could not be tied to them.
    fn tied(&mut self, adrift: BTreeSet<String>) {
        if adrift != self.adrift {
            // A port may be seen a moment before it joins its bridge.
            self.wake = self.wake.min(Instant::now() + RETRY_AFTER);
        } else if let Some(port) = adrift.first() {
            self.alarm(format!(
                "a neighbour's frames can keep packets from port {port}: its MAC address is also somebody else's on the bridge"
            ));
            // Nobody says when the other one is gone.
            self.wake = self.wake.min(Instant::now() + TIED_AGAIN_AFTER);
        }
        self.adrift = adrift;
    }

    /// The disk follows, at the cost of the changes and not of the whole; once living connections are ended, which are not to wait
    /// for it. An agent that is killed before comes back with an older ruleset until it has bound its plan, which is written.
    pub(super) fn write_what_is_due(&mut self) {
        for due in std::mem::take(&mut self.due) {
            if self.unsaved {
                return;
            }
            let added = match &due {
                Due::Whole => Ok(false),
                Due::Change(change) if change.is_empty() => continue,
                Due::Change(change) => self.keep.append(keep::RULESET, &**change),
            };
            match added {
                Ok(true) => {}
                // With all that is due.
                Ok(false) => return self.save_ruleset(),
                Err(error) => return self.not_saved(&chain(&error)),
            }
        }
    }

    fn not_saved(&mut self, why: &str) {
        self.unsaved = true;
        self.alarm(format!("what is enforced is not on disk, a restart without the engine would put back what was before: {why}"));
    }

    fn save_ruleset(&mut self) {
        if let Err(error) = self.keep.save(keep::RULESET, self.binding.ruleset()) {
            self.not_saved(&chain(&error));
        }
    }

    /// The first copy; only what has changed, where the disk holds all else.
    pub(super) fn save_plan(&self, plan: &NodePlan, change: Option<&PlanChange>) -> Result<keep::Second, KeepError> {
        let change = change.filter(|_| !self.unsaved);
        match change.map(|change| self.keep.append_first(keep::PLAN, change)) {
            Some(Ok(Some(second))) => Ok(second),
            Some(Ok(None) | Err(_)) | None => self.keep.save_first(keep::PLAN, plan),
        }
    }

    pub(super) fn plan_saved(&mut self, outcome: Result<(), KeepError>) {
        if let Err(error) = outcome {
            self.unsaved = true;
            self.alarm(format!(
                "the plan is in force and not on disk, a killed agent would come back with the one before: {}",
                chain(&error)
            ));
        }
    }

    pub(super) fn save_again(&mut self) {
        if !std::mem::take(&mut self.unsaved) {
            return;
        }
        if let Some(plan) = &self.plan {
            let saved = self.keep.save(keep::PLAN, plan);
            self.plan_saved(saved);
        }
        if self.written {
            self.save_ruleset();
        }
        if !self.unsaved {
            info!("what is enforced is on disk again");
        }
    }

    pub(super) fn compare(&mut self, why: &str) {
        self.compare_at = Instant::now() + FULL_COMPARE_EVERY;
        if !self.written {
            return;
        }
        let drift = match self.enforcer.verify() {
            Ok(drift) => drift,
            Err(error) => {
                // What made it look may have changed something.
                self.compare_at = Instant::now() + RETRY_AFTER;
                self.wake = self.wake.min(self.compare_at);
                return self.alarm(format!("the kernel cannot be compared with the plan: {}", chain(&error)));
            }
        };
        if drift.is_empty() {
            return;
        }
        let found: Vec<_> = drift.iter().take(5).map(Drift::to_string).collect();
        match self.enforcer.repair(self.binding.ruleset()) {
            Ok(_) => {
                self.recovered();
                self.alarm(format!("drift found by {why} and repaired: {}", found.join("; ")));
            }
            Err(error) => {
                let text = chain(&error);
                self.failing = Some(text.clone());
                self.wake = Instant::now() + RETRY_AFTER;
                self.alarm(format!("drift found by {why} and not repaired ({text}): {}", found.join("; ")));
            }
        }
    }
}
