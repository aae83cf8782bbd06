//! Who is behind a new port before the engine has told: its container by the kernel, with the addresses that the engine has set there.
//!
//! # Why
//! Engine 29 says `network connect` some 27 ms after the other end of a cable is up with its addresses, and 13 ms before the container's
//! first program; in a burst of starts the agent hears of it later than of that program's first packet, which then is lost. The kernel
//! tells at once: a host's veth names the namespace of its other end, where nothing but the engine's runtime runs yet, in the
//! container's control group. What the engine says of it afterwards replaces it, and what the engine does not say goes.
//!
//! Who may change its addresses can have some of its choice by the time a slow agent looks. So an address counts that lies in the
//! network's subnets and is neither the node's nor anybody else's, and only as the container's own: it is under its own policy with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use tracing::debug;

use super::facts::{Attached, Facts, Links, NetworkFact, Peer, Port};

/// A listing that began so long after we looked holds whatever the engine has to say of it.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// What was taken from the kernel and the engine has not told yet.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// By network and container.
    places: BTreeMap<(String, String), Place>,
    /// Ports with their namespaces of which the engine had the time to tell, and didn't: no kernel's word counts there any more.
    untold: BTreeMap<String, i32>,
}

#[derive(Debug)]
struct Place {
    port: String,
    namespace: i32,
    attached: Attached,
    at: Timestamp,
}

/// A port of which it is to be found out whose it is.
#[derive(Debug)]
pub(super) struct Candidate<'a> {
    port: &'a String,
    peer: &'a Peer,
    network: String,
}

impl Candidate<'_> {
    /// Where its other end is.
    pub(super) fn namespace(&self) -> i32 {
        self.peer.namespace
    }
}

/// Of these ports those on the engine's networks, behind which is nobody that the engine has told of.
pub(super) fn candidates<'a>(facts: &Facts, ports: impl Iterator<Item = (&'a String, &'a Port)>) -> Vec<Candidate<'a>> {
    let candidate = |(name, port): (&'a String, &'a Port)| {
        let peer = port.peer.as_ref().filter(|peer| !peer.addresses.is_empty())?;
        let (id, network) = facts.networks.iter().find(|(_, network)| network.bridge.as_ref() == Some(&port.bridge))?;
        let told = network.attached.values().any(|attached| attached.mac == Some(peer.mac));
        (!told).then(|| Candidate { port: name, peer, network: id.clone() })
    };
    ports.filter_map(candidate).collect()
}

impl Ahead {
    /// Takes these ports in, as far as it was `found` which containers are in their namespaces. Returns the containers that have a place
    /// since.
    pub(super) fn place(
        &mut self,
        facts: &mut Facts,
        links: &Links,
        candidates: Vec<Candidate<'_>>,
        found: &BTreeMap<i32, BTreeSet<String>>,
        at: Timestamp,
    ) -> Vec<String> {
        let mut placed = Vec::new();
        for Candidate { port, peer, network } in candidates {
            let Some(container) = found.get(&peer.namespace).and_then(|inside| owner(facts, inside)) else { continue };
            let fact = &facts.networks[&network];
            let addresses = own(fact, links, &container, &peer.addresses);
            if fact.attached.contains_key(&container) || addresses.is_empty() || self.untold.contains_key(port) {
                continue;
            }
            debug!(container, port, network = fact.name, "known ahead of the engine's word");
            let attached = Attached { mac: Some(peer.mac), addresses };
            facts.attach(&network, &container, attached.clone());
            facts.seen_in.insert(container.clone(), peer.namespace);
            let place = Place { port: port.clone(), namespace: peer.namespace, attached, at };
            self.places.insert((network, container.clone()), place);
            placed.push(container);
        }
        placed
    }

    /// The engine has told that this container has left: what the kernel showed of it is no longer waited for.
    pub(super) fn left(&mut self, network: &str, container: &str) {
        self.places.remove(&(network.to_owned(), container.to_owned()));
    }

    /// The engine has told of this place. Returns who was taken for this container: the port with its MAC address is nobody else's.
    pub(super) fn told(&mut self, facts: &mut Facts, network: &str, container: &str) -> Vec<String> {
        self.left(network, container);
        let Some(mac) = facts.networks.get(network).and_then(|fact| fact.attached.get(container)?.mac) else { return Vec::new() };
        let wrong = self.places.extract_if(.., |(on, _), place| on == network && place.attached.mac == Some(mac));
        let wrong: Vec<String> = wrong.map(|((_, container), _)| container).collect();
        for container in &wrong {
            facts.detach(network, container);
        }
        wrong
    }

    /// Whether something of that time is about the container's life before, on this network or on any.
    pub(super) fn is_of_before(&self, network: Option<&str>, container: &str, at: Timestamp) -> bool {
        let is_meant = |(on, its): &(String, String)| its == container && network.is_none_or(|network| on == network);
        self.places.iter().any(|(key, place)| is_meant(key) && place.at > at)
    }

    /// Ports that went away before the engine told of them: their containers never came to be there. Returns these.
    pub(super) fn gone(&mut self, facts: &mut Facts, links: &Links) -> Vec<String> {
        self.untold.retain(|port, namespace| leads(links, port) == Some(*namespace));
        let gone = self.places.extract_if(.., |_, place| leads(links, &place.port) != Some(place.namespace));
        let gone: Vec<(String, String)> = gone.map(|(key, _)| key).collect();
        gone.into_iter()
            .map(|(network, container)| {
                facts.detach(&network, &container);
                container
            })
            .collect()
    }

    /// The engine was asked for everything at this time, and what it said has replaced what was known of networks. What it gave to
    /// somebody else by then it has taken back.
    pub(super) fn listed(&mut self, facts: &mut Facts, links: &Links, asked: Timestamp) {
        let places = std::mem::take(&mut self.places);
        for ((network, container), mut place) in places {
            let Some(fact) = facts.networks.get(&network).filter(|fact| !fact.attached.contains_key(&container)) else { continue };
            let waits = asked.duration_since(place.at).unsigned_abs() < TOLD_WITHIN;
            if !waits {
                self.untold.insert(place.port, place.namespace);
                continue;
            }
            place.attached.addresses = own(fact, links, &container, &place.attached.addresses);
            let is_anothers = fact.attached.values().any(|other| other.mac == place.attached.mac);
            if leads(links, &place.port) == Some(place.namespace) && !place.attached.addresses.is_empty() && !is_anothers {
                facts.attach(&network, &container, place.attached.clone());
                self.places.insert((network, container), place);
            }
        }
        facts.forget_where_nobody_is();
    }
}

/// The namespace of the other end of a port.
fn leads(links: &Links, port: &str) -> Option<i32> {
    links.ports.get(port)?.peer.as_ref().map(|peer| peer.namespace)
}

/// Of the containers that have processes in a namespace, the one that shares nobody's.
fn owner(facts: &Facts, containers: &BTreeSet<String>) -> Option<String> {
    let has_its_own = |id: &&String| facts.containers.get(*id).is_some_and(|fact| !fact.network_mode.starts_with("container:"));
    let mut owners = containers.iter().filter(has_its_own);
    owners.next().filter(|_| owners.next().is_none()).cloned()
}

/// Those that the engine can have given it.
fn own(network: &NetworkFact, links: &Links, container: &str, addresses: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let others = |address: &IpAddr| network.attached.iter().any(|(id, other)| id != container && other.addresses.contains(address));
    let may_be = |address: &&IpAddr| {
        network.subnets.iter().any(|subnet| subnet.contains(*address)) && !links.host.contains(address) && !others(address)
    };
    addresses.iter().filter(may_be).copied().collect()
}

#[cfg(test)]
mod tests;
