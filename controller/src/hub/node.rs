//! What the hub knows of one node, and for how long it was seen well.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use policy::graph::LeftOut;
use policy::learn::Window;
use policy::status::NodeStatus;
use policy::{Endpoint, Health, HourSet, Inventory, Workload};
use tokio::sync::mpsc;

use super::state::State;
use crate::api::view::InForce;
use crate::session::Order;

/// One node.
#[derive(Default)]
pub(crate) struct Node {
    /// The session that is open.
    pub(crate) session: Option<Session>,
    /// Whether this session's agent has told what runs there: until then the inventory is what was, or nothing.
    pub(crate) reported: bool,
    /// What runs there, by its last report.
    pub(crate) inventory: Inventory,
    /// What it said of itself last.
    pub(crate) status: NodeStatus,
    /// When something was last heard.
    pub(crate) heard: Option<Timestamp>,
    /// Why it refused a plan.
    pub(crate) refused: Option<String>,
    /// Store and generation of the plan that it took from this very process.
    pub(crate) took: Option<(String, u64)>,
    /// Healthy time and loss, by hour.
    pub(crate) sight: Sight,
}

/// An open session.
pub(crate) struct Session {
    /// Its number.
    pub(crate) id: u64,
    /// Id of the agent's spool: the same agent that comes again has the same.
    pub(crate) spool: String,
    /// What the agent is told.
    pub(crate) orders: mpsc::Sender<Order>,
    /// Whether it takes a change in place of the whole plan.
    pub(crate) changes: bool,
    /// Since when a plan that was sent waits for an answer. Whether the agent hangs or the plan is large, what it had before is in force.
    pub(crate) unanswered: Option<Timestamp>,
    /// Store and generation of the plan that was sent or is applied; never sent twice.
    pub(crate) sent: Option<(String, u64)>,
}

impl Node {
    /// Whether what this store decided up to a generation is in force here, by what the agent said itself.
    pub(crate) fn in_force(&self, store: &str, generation: u64, now: Timestamp) -> InForce {
        if let Some(why) = &self.refused {
            return InForce::Refused(why.clone());
        }
        match &self.session {
            None => InForce::Away,
            Some(_) if self.status.store == store && self.status.generation >= generation => InForce::Yes,
            Some(session) => InForce::Unanswered { seconds: session.unanswered.map_or(0, |since| elapsed(since, now)) },
        }
    }
}

fn elapsed(since: Timestamp, now: Timestamp) -> u64 {
    u64::try_from(now.duration_since(since).as_secs()).unwrap_or(0)
}

/// How well a node saw, so that the part since a workload appeared can be told exactly.
#[derive(Debug, Default)]
pub(crate) struct Sight {
    /// Healthy stretches, those without a gap joined: a new one only after a loss or a restart.
    healthy: Vec<(Timestamp, Timestamp)>,
    /// Events lost, by hour.
    lost: BTreeMap<u32, u64>,
}

impl Sight {
    pub(crate) fn add(&mut self, health: &Health) {
        if health.lost > 0 {
            *self.lost.entry(HourSet::hour_of(health.to)).or_default() += health.lost;
        } else if health.healthy && health.from < health.to {
            match self.healthy.last_mut() {
                Some(last) if last.1 == health.from => last.1 = health.to,
                Some(_) | None => self.healthy.push((health.from, health.to)),
            }
        }
    }

    pub(crate) fn healthy_seconds(&self) -> u64 {
        self.healthy_since(Timestamp::MIN)
    }

    /// Events lost over all.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.values().sum()
    }

    /// Healthy seconds since a moment.
    pub(crate) fn healthy_since(&self, since: Timestamp) -> u64 {
        let seconds = |&(from, to): &(Timestamp, Timestamp)| u64::try_from(to.duration_since(from.max(since)).as_secs()).unwrap_or(0);
        self.healthy.iter().map(seconds).sum()
    }

    /// Adds the part since a moment; the loss of the hour in which it lies counts whole.
    fn part(&self, since: Timestamp, into: &mut Window) {
        for &(from, to) in self.healthy.iter().filter(|(_, to)| *to > since) {
            into.add(from.max(since), to, true, 0);
        }
        into.lost += self.lost.range(HourSet::hour_of(since)..).map(|(_, lost)| lost).sum::<u64>();
    }
}

impl State {
    /// What there was no room for, in the graphs of the agents and in this one, by the end that has none.
    pub(crate) fn left_out(&self) -> Vec<LeftOut> {
        let mut all: BTreeMap<Option<Endpoint>, LeftOut> = BTreeMap::new();
        for left in self.nodes.values().flat_map(|node| node.status.left_out.iter().cloned()).chain(self.graph.left_out()) {
            let sum = all.entry(left.end.clone()).or_insert_with(|| LeftOut { end: left.end, ..LeftOut::default() });
            sum.reports = sum.reports.saturating_add(left.reports);
            sum.uses = sum.uses.saturating_add(left.uses);
        }
        all.into_values().collect()
    }

    /// How many flows of those a rule might have been learned from there was no room for, by workload.
    pub(crate) fn unlisted(&self) -> BTreeMap<Workload, u64> {
        let mut unlisted: BTreeMap<Workload, u64> = BTreeMap::new();
        for left in self.left_out().into_iter().filter(|left| left.uses > 0) {
            if let Some(workload) = left.end.as_ref().and_then(Endpoint::workload) {
                *unlisted.entry(workload.clone()).or_default() += left.uses;
            }
        }
        unlisted
    }

    /// For how long each of these workloads was observed, and how well: the sight of the nodes it runs on (of all nodes, if it runs on
    /// none now), since traffic of it was first seen.
    pub(crate) fn windows<'a>(&self, workloads: impl Iterator<Item = &'a Workload>) -> BTreeMap<Workload, Window> {
        let mut here: BTreeMap<&Workload, Vec<&Node>> = BTreeMap::new();
        for node in self.nodes.values() {
            let workloads: BTreeSet<&Workload> = node.inventory.containers.values().map(|c| &c.workload).collect();
            workloads.into_iter().for_each(|workload| here.entry(workload).or_default().push(node));
        }
        let all: Vec<&Node> = self.nodes.values().collect();
        let unlisted = self.unlisted();
        let window = |workload: &Workload| {
            let mut window = Window { unlisted: unlisted.get(workload).copied().unwrap_or(0), ..Window::default() };
            let ends = [Endpoint::Workload(workload.clone()), Endpoint::Run(workload.clone())];
            // Without traffic there is nothing that could be called learned, for however long.
            let Some(since) = ends.iter().filter_map(|end| self.graph.first_seen(end)).min() else { return window };
            here.get(workload).unwrap_or(&all).iter().for_each(|node| node.sight.part(since, &mut window));
            window
        };
        workloads.map(|workload| (workload.clone(), window(workload))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn stretch(from: i64, to: i64, lost: u64) -> Health {
        Health { from: at(from), to: at(to), events: 1, lost, unattributed: 0, healthy: lost == 0 }
    }

    #[test]
    fn time_before_a_workload_appeared_does_not_count_for_it() {
        let mut sight = Sight::default();
        sight.add(&stretch(0, 10_000, 0));
        assert_eq!(sight.healthy_seconds(), 10_000);
        assert_eq!(sight.healthy_since(at(9_000)), 1_000);
        assert_eq!(sight.healthy_since(at(20_000)), 0);
    }

    #[test]
    fn loss_stops_the_clock_and_is_counted() {
        let mut sight = Sight::default();
        sight.add(&stretch(0, 100, 0));
        sight.add(&stretch(100, 200, 7));
        assert_eq!((sight.healthy_seconds(), sight.lost()), (100, 7));
    }
}
