//! What the agent says of itself with every pulse: health, alarms, metrics, and what runs here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use policy::Health;
use policy::status::NodeStatus;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::account;
use super::{Reported, Work};
use crate::observe::Observer;

/// Seconds between two accounts of health while nothing changes: each is a write to disk here and a commit at the controller.
const HEALTH_EVERY: i64 = 10;
/// The wall clock may run ahead of the other one by so much between two accounts of health.
const OFF_BY: Duration = Duration::from_secs(2);
/// Seconds after the start during which health is told with every pulse, for whoever is watching.
const EAGER_FOR: i64 = 60;
/// A report is sent when something changed. For the sake of counters that moved it goes again after this time, and after so much for
/// each container: it names them all.
const REPORT_ANYWAY_AFTER: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(50));

impl Work {
    /// One pulse.
    pub(super) fn beat(&mut self, observer: &Observer) {
        self.judge_the_living();
        let now = Timestamp::now();
        let account = observer.account();
        let (events, lost, unattributed) = (account.events, account.lost, account.unattributed);
        let mut blind = self.snapshot.blind.clone();
        blind.extend(account.blind.iter().cloned());
        blind.extend(self.uplink.trouble());
        let grown = (events - self.counted.0, lost - self.counted.1, unattributed - self.counted.2);
        let news = blind != self.blind || grown.1 > 0;
        let seconds = |since: Timestamp| now.duration_since(since).as_secs();
        if news || seconds(self.since) < EAGER_FOR || seconds(self.beat) >= HEALTH_EVERY {
            // The whole stretch counts as what was worst in it.
            // Time in which this process did not run (a machine that slept), or that a clock was put forward by, was not observed.
            let lived = std::mem::replace(&mut self.beaten, Instant::now()).elapsed();
            let told = Duration::try_from(now.duration_since(self.beat)).unwrap_or_default();
            let healthy = blind.is_empty() && self.blind.is_empty() && grown.1 == 0 && told <= lived + OFF_BY;
            self.uplink.health(Health { from: self.beat, to: now, events: grown.0, lost: grown.1, unattributed: grown.2, healthy });
            (self.counted, self.beat) = ((events, lost, unattributed), now);
        }
        if blind != self.blind {
            if blind.is_empty() {
                info!("sees all it should");
            } else {
                warn!(?blind, "does not see all it should");
            }
            self.blind.clone_from(&blind);
        }
        if Instant::now() >= self.compare_at {
            self.compare("the regular compare");
        }
        self.save_again();
        self.count_denied(now);
        for (what, &times) in &account.repaired {
            if self.repaired.insert(what.clone(), times) != Some(times) {
                self.alarm(format!("somebody switched off {what}; it is on again"));
            }
        }
        let conntrack = account.room;
        if conntrack.1 > 0 && conntrack.0 * 100 / conntrack.1 >= 80 {
            self.alarm(format!("the connection table holds more than 80 % of its {} entries: when it is full, every new connection of this host fails. Raise net.netfilter.nf_conntrack_max", conntrack.1));
        }
        if account.restrained {
            self.alarm("the connection table runs full: nothing is tracked for learning alone until a fifth of it is free. Raise net.netfilter.nf_conntrack_max".to_owned());
        }
        for text in account::crowded(&self.graph, &mut self.crowded) {
            self.alarm(text);
        }
        let forwarders = self.forwarding.look(&self.snapshot.inventory);
        let mut status = NodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: Some(self.since),
            networks: account::networks(&self.snapshot.inventory, self.binding.ruleset(), self.failing.as_deref()),
            store: self.plan.as_ref().map(|p| p.store.clone()).unwrap_or_default(),
            generation: self.plan.as_ref().map_or(0, |p| p.generation),
            events,
            lost,
            blind,
            skipped: account.skipped,
            conntrack,
            alarms: self.alarms.list(),
            unconfined: self.unconfined.clone(),
            forwarders: account::forwarders(&self.snapshot.inventory, &forwarders),
            contested: account::contested(&self.snapshot.inventory, self.binding.ruleset()),
            raw: if self.sums { BTreeSet::new() } else { account::raw(&self.snapshot.inventory, self.binding.ruleset()) },
            denied: self.denied.told(),
            left_out: self.graph.left_out().collect(),
            riders: account::riders(&self.graph, &self.snapshot.inventory, self.binding.ruleset()),
        };
        metrics::gauge!("bulkhead_agent_events_total").set(events as f64);
        metrics::gauge!("bulkhead_agent_events_lost_total").set(lost as f64);
        for row in &status.denied.by {
            metrics::counter!("bulkhead_agent_denied_packets", "side" => row.side.clone(), "reason" => row.reason.clone())
                .absolute(row.packets);
        }
        metrics::gauge!("bulkhead_agent_edges").set(self.graph.len() as f64);
        let left_out = status.left_out.iter().map(|left| left.reports).sum();
        metrics::counter!("bulkhead_agent_reports_left_out_total").absolute(left_out);
        metrics::gauge!("bulkhead_agent_plan_generation").set(status.generation as f64);
        metrics::gauge!("bulkhead_agent_failing").set(f64::from(u8::from(self.failing.is_some())));
        if !self.inventory_known() {
            // Who asks for Enforce must not take an empty list for an empty host.
            return;
        }
        // Counters alone are no news; they go along now and then.
        let counters = (std::mem::take(&mut status.events), std::mem::take(&mut status.conntrack), std::mem::take(&mut status.left_out));
        let containers = u32::try_from(self.snapshot.inventory.containers.len()).unwrap_or(u32::MAX);
        let anyway = REPORT_ANYWAY_AFTER.0.max(REPORT_ANYWAY_AFTER.1.saturating_mul(containers));
        let same = self.reported.as_ref().is_some_and(|reported| {
            Arc::ptr_eq(&reported.snapshot, &self.snapshot)
                && reported.news == status
                && (reported.counters == counters || reported.at.elapsed() < anyway)
        });
        if !same {
            let (events, conntrack, left_out) = counters.clone();
            let told = NodeStatus { events, conntrack, left_out, ..status.clone() };
            self.uplink.report(Arc::clone(&self.snapshot.inventory), forwarders, told);
            self.reported = Some(Reported { snapshot: self.snapshot.clone(), news: status, counters, at: Instant::now() });
        }
    }
}
