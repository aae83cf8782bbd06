//! What the learner is told beside the graph: data only, gathered by the controller.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::guardrail::Guardrail;
use crate::inventory::{Container, Inventory, Unmanaged};
use crate::policy_set::{Direction, Peer, Rule, WorkloadPolicy};
use crate::service::{Ports, Service};
use crate::workload::Workload;

/// Docker's embedded resolver, inside the namespace of every container on a user-defined network
/// (docs.docker.com/engine/network, "DNS services").
pub const EMBEDDED_RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Everything the learner knows beside the graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Workloads that run or ran, each with what the inventory says of it.
    pub workloads: BTreeMap<Workload, Known>,
    /// Approved policies.
    pub policies: BTreeMap<Workload, WorkloadPolicy>,
    /// What must never be allowed, by name.
    pub guardrails: BTreeMap<String, Guardrail>,
    /// What people said no to.
    pub rejected: BTreeSet<Rejected>,
    /// For how long each workload was observed, and how well.
    pub windows: BTreeMap<Workload, Window>,
    /// The last suggestion made for each workload.
    pub previous: BTreeMap<Workload, Revision>,
    /// Options of every workload that has none of its own.
    pub options: Options,
    /// Options of particular workloads.
    pub particular: BTreeMap<Workload, Options>,
    /// The time of learning; it decides only which approved rules have run out.
    pub now: Timestamp,
}

impl Context {
    /// The options that count for a workload.
    pub fn options_of(&self, workload: &Workload) -> &Options {
        self.particular.get(workload).unwrap_or(&self.options)
    }
}

/// Revision and digest of a suggestion: the revision grows when the digest changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Revision {
    /// From 1.
    pub revision: u64,
    /// See [`crate::suggestion::Suggestion::digest`].
    pub digest: String,
}

/// A rule that a person said no to. It stays on the suggestion, marked, and is approved only by its own name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rejected {
    /// Whose rule.
    pub workload: Workload,
    /// Which side.
    pub direction: Direction,
    /// The other end.
    pub peer: Peer,
    /// The ports.
    pub ports: Ports,
}

impl Rejected {
    /// The rejection of one rule of a workload.
    pub fn of(workload: &Workload, direction: Direction, rule: &Rule) -> Self {
        Self { workload: workload.clone(), direction, peer: rule.peer.clone(), ports: rule.ports }
    }
}

/// Which addresses outside may reach a published port, where clients were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FromOutside {
    /// The narrowest that fits: a few exact hosts, else the private networks they are in, else anyone.
    #[default]
    Narrowest,
    /// Always the exact hosts, however many.
    ExactHosts,
}

/// What an operator may choose about learning. Part of the digest: an approval holds for the options it was read under.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Options {
    /// Ingress from outside.
    pub from_outside: FromOutside,
    /// Up to so many distinct clients (of one address family, on one port) are proposed one by one.
    pub exact_hosts: u32,
    /// A source that touched so many ports or peers without ever carrying data is taken for a scan.
    pub scan_targets: u32,
    /// Healthy observed time before a suggestion may be called stable, hours.
    pub stable_hours: u32,
    /// Healthy hours without a new edge before a suggestion may be called stable.
    pub quiet_hours: u32,
    /// At most this share of new connections may be expected to be unseen, for a suggestion to be stable: parts per million.
    pub stable_unseen_ppm: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            from_outside: FromOutside::default(),
            // What a person can still check one by one.
            exact_hosts: 8,
            // A health checker has a handful of targets; the smallest useful scan has more ports than that on one host.
            scan_targets: 5,
            // Long enough for a nightly job to be seen twice.
            stable_hours: 48,
            // A whole day: what happens once a day would have shown.
            quiet_hours: 24,
            // One in a hundred.
            stable_unseen_ppm: 10_000,
        }
    }
}

/// For how long a workload was observed. Only healthy time counts: an agent that is down, or that lost events, stops the clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Window {
    /// Healthy seconds by hour (since the Unix epoch, UTC), at most 3,600 each.
    pub seconds: BTreeMap<u32, u32>,
    /// Kernel events lost meanwhile.
    pub lost: u64,
    /// Flows that rules might have been learned from and that the graph had no room for ([`crate::graph::LeftOut`]).
    pub unlisted: u64,
}

impl Window {
    /// An hour counts as observed from this on: an agent's restart within it is forgiven, half an hour of blindness is not.
    const WHOLE_HOUR: u32 = 3000;

    /// Adds what an agent says of one stretch of time. A stretch that lost events or was not healthy adds no time.
    pub fn add(&mut self, from: Timestamp, to: Timestamp, healthy: bool, lost: u64) {
        self.lost += lost;
        if !healthy || lost > 0 {
            return;
        }
        let (mut at, end) = (from.as_second().max(0), to.as_second());
        while at < end {
            let hour = at / 3600;
            let until = end.min((hour + 1) * 3600);
            let Ok(hour) = u32::try_from(hour) else { return };
            let seconds = self.seconds.entry(hour).or_default();
            // Within one hour the difference fits, and two nodes that watch at once don't make an hour longer.
            *seconds = seconds.saturating_add(u32::try_from(until - at).unwrap_or(3600)).min(3600);
            at = until;
        }
    }

    /// Healthy observed time, seconds.
    pub fn healthy_seconds(&self) -> u64 {
        self.seconds.values().copied().map(u64::from).sum()
    }

    /// The hours that were observed as good as whole.
    pub fn whole_hours(&self) -> impl Iterator<Item = u32> + '_ {
        self.seconds.iter().filter(|&(_, &seconds)| seconds >= Self::WHOLE_HOUR).map(|(&hour, _)| hour)
    }

    /// Whether some night (00:00 to 06:00 UTC, when jobs run that nobody watches) was observed whole.
    pub fn saw_a_night(&self) -> bool {
        const NIGHT: usize = 6;
        let mut hours_of_night: BTreeMap<u32, usize> = BTreeMap::new();
        for hour in self.whole_hours().filter(|hour| hour % 24 < 6) {
            *hours_of_night.entry(hour / 24).or_default() += 1;
        }
        hours_of_night.values().any(|&hours| hours == NIGHT)
    }
}

/// What the inventory says of one workload, over all its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Known {
    /// The engine made its name up.
    pub engine_named: bool,
    /// Only one-off runs of it are known: they are no evidence.
    pub runs_only: bool,
    /// Containers that share its namespace.
    pub members: BTreeSet<String>,
    /// Its own ports that are published at the node.
    pub published: BTreeSet<Service>,
    /// Where its questions for names go: [`EMBEDDED_RESOLVER`] where the engine asks from the node's own namespace.
    pub resolvers: BTreeSet<Peer>,
    /// Names of its networks.
    pub networks: BTreeSet<String>,
    /// Why no protection may be claimed for it.
    pub unmanaged: BTreeSet<Unmanaged>,
    /// It was seen to pass packets on between its networks.
    pub forwards: bool,
}

impl Known {
    fn add(&mut self, inventory: &Inventory, container: &Container) {
        self.engine_named |= container.engine_named;
        self.forwards |= inventory.forwarders.contains(&container.id);
        self.members.extend(container.members.iter().cloned());
        self.published.extend(container.published.iter().map(|p| Service { protocol: p.protocol, port: p.container_port }));
        self.unmanaged.extend(container.unmanaged.iter().cloned());
        let attached = container.legs.iter().map(|leg| &leg.network).chain(container.elsewhere.iter().map(|there| &there.network));
        for network in attached.filter_map(|id| inventory.networks.get(id)) {
            self.networks.insert(network.name.clone());
            self.unmanaged.extend(network.unmanaged.iter().cloned());
        }
        if container.resolvers.is_empty() {
            self.resolvers.insert(Peer::address(IpAddr::V4(EMBEDDED_RESOLVER)));
        } else {
            self.resolvers.extend(container.resolvers.iter().map(|&address| resolver(inventory, container, address)));
        }
    }
}

/// Who answers at a configured resolver's address.
fn resolver(inventory: &Inventory, container: &Container, address: IpAddr) -> Peer {
    if inventory.host.contains(&address) {
        return Peer::Host;
    }
    let near = container.legs.iter().find_map(|leg| inventory.at(&leg.bridge, address));
    let far = || inventory.containers.values().find(|c| c.legs.iter().any(|leg| leg.addresses.contains(&address)));
    match near.map(|(server, _)| server).or_else(far) {
        Some(server) => Peer::Workload(server.workload.clone()),
        None => Peer::address(address),
    }
}

/// What the inventories of all nodes say of each workload.
pub fn known<'a>(inventories: impl IntoIterator<Item = &'a Inventory>) -> BTreeMap<Workload, Known> {
    let mut found: BTreeMap<Workload, Known> = BTreeMap::new();
    for inventory in inventories {
        for container in inventory.containers.values() {
            let fresh = || Known { runs_only: true, ..Known::default() };
            let known = found.entry(container.workload.clone()).or_insert_with(fresh);
            known.runs_only &= container.one_off;
            known.add(inventory, container);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).expect("a few hours around 1970 are a time")
    }

    #[test]
    fn a_stretch_of_time_is_split_by_the_hour_and_an_hour_is_never_longer_than_itself() {
        let mut window = Window::default();
        window.add(at(3500), at(7300), true, 0);
        assert_eq!(window.seconds, [(0, 100), (1, 3600), (2, 100)].into());
        // Another node watched at the same time.
        window.add(at(3600), at(7200), true, 0);
        assert_eq!((window.healthy_seconds(), window.whole_hours().collect::<Vec<_>>()), (3800, vec![1]));
    }

    #[test]
    fn a_stretch_that_lost_events_or_runs_backwards_adds_no_time() {
        let mut window = Window::default();
        window.add(at(0), at(3600), true, 7);
        window.add(at(3600), at(0), true, 0);
        window.add(at(-7200), at(-3600), true, 0);
        assert_eq!((window.healthy_seconds(), window.lost), (0, 7));
    }

    #[test]
    fn a_night_with_a_hole_is_no_night() {
        let mut window = Window::default();
        window.add(at(0), at(2 * 3600), true, 0);
        window.add(at(3 * 3600), at(6 * 3600), true, 0);
        assert!(!window.saw_a_night());
        window.add(at(24 * 3600), at(30 * 3600), true, 0);
        assert!(window.saw_a_night());
    }
}
