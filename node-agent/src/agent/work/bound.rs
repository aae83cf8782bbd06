//! What runs here and what is allowed, made a ruleset again whenever either moves; and what that means for connections that live.
//!
//! # Why
//! The filter judges beginnings. So whatever takes something away has to look at what lives too: a plan, a rule whose time is over,
//! a container by another name, a container in Enforce that was on an open network a moment before it was bound there, and all of
//! these while the agent was dead.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use policy::evaluate::Scene;
use policy::status::Preview;
use policy::{PolicySet, Rule, bind};
use tokio::time::Instant;
use tracing::{debug, info};

use super::{FULL_COMPARE_EVERY, Work, living};
use crate::enforce;
use crate::inventory::Snapshot;

/// Published ports are known a moment after the rest, and without them the proxy's connections look like the host's own. One
/// container whose start hangs must not put this off for long.
const JUDGED_WITHIN: Duration = Duration::from_secs(5);

impl Work {
    pub(super) fn moved(&mut self, snapshot: Arc<Snapshot>) {
        self.networks = policy::bind::networks(&snapshot.inventory);
        let old = std::mem::replace(&mut self.snapshot, snapshot);
        if !self.inventory_known() {
            return;
        }
        let first = old.engine.is_empty();
        let left = if first { BTreeSet::new() } else { living::given_back(&old.inventory, &self.snapshot.inventory) };
        let ended = self.bind(left, first);
        self.tell_joined();
        self.answer_what_is_due(ended);
    }

    /// How long it took since somebody joined an enforced network: since it was told where (the time of the engine's event, or before it
    /// when the kernel's side was seen), and since the agent knew all of it.
    fn tell_joined(&mut self) {
        let (guarded, now) = (self.binding.ruleset().guarded(), Timestamp::now());
        let told = self.joins_told;
        for join in self.snapshot.joins.iter().filter(|join| join.number >= told) {
            self.joins_told = join.number + 1;
            let container = self.snapshot.inventory.containers.get(&join.container);
            let leg = container.and_then(|container| container.legs.iter().find(|leg| leg.bridge == join.bridge));
            let Some(leg) = leg.filter(|_| self.failing.is_none() && guarded.contains(&join.bridge)) else { continue };
            let own = join.known.elapsed();
            let first = leg.addresses.first().and_then(|&address| self.snapshot.leases.find(Some(&join.bridge), address, now));
            let since_told = first.and_then(|lease| Duration::try_from(now.duration_since(lease.from)).ok());
            metrics::histogram!("bulkhead_agent_join_seconds", "since" => "known").record(own);
            if let Some(since_told) = since_told {
                metrics::histogram!("bulkhead_agent_join_seconds", "since" => "told").record(since_told);
            }
            let (own_us, since_told_us) = (micros(own), since_told.map(micros));
            debug!(container = join.container, bridge = join.bridge, own_us, since_told_us, "bound");
        }
    }

    /// What a plan would end here, and who has no policy in it.
    pub(super) fn preview(&self, set: &PolicySet) -> std::io::Result<Preview> {
        let now = Timestamp::now();
        let inventory = &self.snapshot.inventory;
        let scene = Scene { set, networks: &self.networks, now };
        let living = enforce::living::read(&bind(set, inventory, now), inventory)?;
        let ended = policy::revoke::preview(&scene, living.iter().map(|(_, one)| one));
        let unapproved =
            |w: &&policy::Workload| matches!(scene.standing(w), policy::Standing::Enforce(_)) && !set.policies.contains_key(*w);
        let unlearned: BTreeSet<_> = self.networks.keys().filter(unapproved).cloned().collect();
        Ok(Preview { ended, unlearned: unlearned.into_iter().collect() })
    }

    /// Returns how many connections were ended, if the living were judged.
    pub(super) fn bind_again(&mut self) -> Option<u64> {
        self.bind(BTreeSet::new(), false)
    }

    /// `left`: addresses in other hands now, or in none. `first`: what is wanted so far comes from the disk, so what was given back
    /// since is found by it.
    fn bind(&mut self, mut left: BTreeSet<IpAddr>, first: bool) -> Option<u64> {
        let now = Instant::now();
        self.wake = now + FULL_COMPARE_EVERY;
        if let Some(plan) = &self.plan
            && self.inventory_known()
        {
            let time = Timestamp::now();
            let still = if self.bound == Some(plan.generation) { self.binding.ruleset().guarded() } else { BTreeSet::new() };
            let (set, inventory) = (plan.set.clone(), self.snapshot.inventory.clone());
            self.bound = Some(plan.generation);
            if let Some(until) = next_end(&set, time) {
                self.wake = self.wake.min(now + until);
            }
            let mut change = self.binding.bind(&set, &inventory, &still, time);
            if first {
                left.extend(change.given_back(self.binding.ruleset()));
            }
            if change.narrows(self.binding.ruleset()) {
                self.owed.get_or_insert(now);
            }
            // Whoever has such an address now gets nothing through before the connections of the one before are ended.
            let held_back = self.binding.unpin(&left);
            let pinned = change.hold_back(&held_back);
            if !change.is_empty() || self.failing.is_some() || !self.adrift.is_empty() {
                self.enforce(&change);
            }
            self.forget(&left);
            if !held_back.is_empty() {
                self.binding.pin(held_back);
                self.enforce(&pinned);
            }
        }
        let ended = self.judge_the_living();
        if now >= self.compare_at {
            self.compare("the regular compare");
        }
        ended
    }

    /// Ends every connection of addresses that were given back.
    fn forget(&mut self, left: &BTreeSet<IpAddr>) {
        if left.is_empty() || self.binding.ruleset().watched.is_empty() {
            return;
        }
        match living::forget(left) {
            Ok(0) => {}
            Ok(ended) => info!(ended, "connections of addresses that were given back are ended"),
            Err(error) => self.alarm(format!("connections of addresses that were given back cannot be ended: {error}")),
        }
    }

    /// Ends what is no longer allowed, if something was taken away since it was looked at last and enough is known to judge it.
    pub(super) fn judge_the_living(&mut self) -> Option<u64> {
        let since = self.owed?;
        let complete = self.inventory_known() && self.snapshot.inventory.containers.values().all(|container| container.pid.is_some());
        (complete || (self.inventory_known() && since.elapsed() >= JUDGED_WITHIN)).then(|| self.revoke())
    }

    /// Ends the living connections that the plan doesn't allow.
    pub(super) fn revoke(&mut self) -> u64 {
        self.owed = None;
        let Some(plan) = &self.plan else { return 0 };
        if !self.binding.ruleset().watched.values().any(|watch| watch.guarded) {
            return 0;
        }
        let scene = Scene { set: &plan.set, networks: &self.networks, now: Timestamp::now() };
        match enforce::living::revoke(&scene, self.binding.ruleset(), &self.snapshot.inventory) {
            Ok(0) => 0,
            Ok(ended) => {
                info!(ended, generation = plan.generation, "connections that are no longer allowed are ended");
                ended
            }
            Err(error) => {
                // Again with the next pulse.
                self.owed = Some(Instant::now());
                self.alarm(format!(
                    "connections that are no longer allowed may live on, the connection table does not answer as it should: {error}"
                ));
                0
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn rules(set: &PolicySet) -> impl Iterator<Item = &Rule> {
    set.policies.values().flat_map(|policy| policy.ingress.iter().chain(&policy.egress))
}

/// How long until the first rule ends by itself; `None`: none does.
fn next_end(set: &PolicySet, now: Timestamp) -> Option<Duration> {
    let next = rules(set).filter_map(|rule| rule.until).filter(|until| *until > now).min()?;
    // A little after, so that the rule is over when it is looked at.
    Duration::try_from(next.duration_since(now)).ok().map(|left| left + Duration::from_millis(5))
}
