//! Ports of the bridges of which it is not known whose they are: looked at before the engine tells, and named when nobody comes for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use tracing::warn;

use super::super::ahead::{self, Candidate};
use super::super::facts::{Ends, Links};
use super::{Task, UNCLAIMED};

impl Task {
    /// What the kernel tells of new ports before the engine does.
    pub(super) fn look_ahead(&mut self, links: &Links) {
        let now = Timestamp::now();
        let inventory = Arc::clone(&self.sender.borrow().inventory);
        let mut moved = self.ahead.gone(&mut self.facts, links, now);
        let claimed = claimed(&inventory);
        let long = |port: &String| self.unclaimed.get(port).is_some_and(|since| now.duration_since(*since).unsigned_abs() >= UNCLAIMED);
        let new = links.ports.iter().filter(|(port, _)| !claimed.contains(port) && !long(port));
        let candidates = ahead::candidates(&self.facts, new);
        if !candidates.is_empty() {
            let namespaces = candidates.iter().map(Candidate::namespace).collect();
            match self.inhabitants.of(&namespaces, &self.facts.processes_in(&namespaces)) {
                Ok(found) => {
                    let placed = moved.len();
                    moved.extend(self.ahead.place(&mut self.facts, links, candidates, &found, now));
                    // The engine has a minute to say so too.
                    self.stirred |= moved.len() > placed;
                }
                Err(error) => warn!(error = &error as &dyn std::error::Error, "whose a new port is must wait for the engine's word"),
            }
        }
        if moved.is_empty() {
            return;
        }
        let ends = Ends::of(links, self.facts.inside());
        for id in moved {
            self.leases.move_one(&id, self.facts.container_here(&id, &ends).as_ref(), now);
        }
    }

    /// Looks at which ports have gone since the engine was asked for everything: what it told is as old as that. `before`: the links then.
    pub(super) fn look_since(&mut self, before: &Arc<Links>) {
        let now = Arc::clone(&self.links.borrow().links);
        if Arc::ptr_eq(before, &now) {
            return;
        }
        let (inventory, _) = self.facts.join(before);
        self.facts.ended.look(&inventory, &now, Timestamp::now());
    }

    /// Whether a port has been nobody's for a while that may be of somebody whose end was seen: the engine's word of a life after that may
    /// have been taken for one of before.
    pub(super) fn may_be_mistaken(&self) -> bool {
        let links = Arc::clone(&self.links.borrow().links);
        let now = Timestamp::now();
        let old = self.unclaimed.iter().filter(|(_, since)| now.duration_since(**since).unsigned_abs() >= UNCLAIMED);
        old.filter_map(|(port, _)| links.ports.get(port)?.peer.as_ref()).any(|peer| self.facts.ended.had(peer.mac))
    }

    /// Ports that have been nobody's for a while.
    pub(super) fn strangers(&mut self, inventory: &policy::Inventory, links: &Links) -> BTreeMap<String, String> {
        let now = Timestamp::now();
        let claimed = claimed(inventory);
        self.unclaimed.retain(|port, _| links.ports.contains_key(port) && !claimed.contains(port));
        for port in links.ports.keys().filter(|port| !claimed.contains(port)) {
            self.unclaimed.entry(port.clone()).or_insert(now);
        }
        let old = |since: &Timestamp| now.duration_since(*since).unsigned_abs() >= UNCLAIMED;
        let strangers = self.unclaimed.iter().filter(|(_, since)| old(since));
        strangers.map(|(port, _)| (port.clone(), links.ports[port].bridge.clone())).collect()
    }
}

/// Ports of which it is known whose they are.
fn claimed(inventory: &policy::Inventory) -> BTreeSet<&String> {
    inventory.containers.values().flat_map(|container| &container.legs).filter_map(|leg| leg.port.as_ref()).collect()
}
