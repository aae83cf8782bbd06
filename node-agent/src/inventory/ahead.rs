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
//!
//! Who starts again may be there before the engine has told of its end: what it said of that life does not count any more (see
//! [`ended`](super::ended)).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use tracing::debug;

use super::facts::{Attached, Facts, Links, Peer, Port};

/// A listing that began so long after we looked holds whatever the engine has to say of it.
const TOLD_WITHIN: SignedDuration = SignedDuration::from_secs(5);

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
        let has_it = |(container, attached): (&String, &Attached)| attached.mac == Some(peer.mac) && !facts.ended.has(id, container);
        (!network.attached.iter().any(has_it)).then(|| Candidate { port: name, peer, network: id.clone() })
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
            let addresses = own(facts, &network, links, &container, &peer.addresses);
            let is_told = fact.attached.contains_key(&container) && !facts.ended.has(&network, &container);
            if is_told || addresses.is_empty() || self.untold.contains_key(port) {
                continue;
            }
            debug!(container, port, network = fact.name, "known ahead of the engine's word");
            let attached = Attached { mac: Some(peer.mac), addresses };
            facts.attach(&network, &container, attached.clone());
            facts.found_in(&container, peer.namespace);
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

    /// Whether what the engine said of this place when it was asked is of a life that is over: its port has gone since, or somebody else
    /// was seen behind a port with that MAC address, or with one of these addresses.
    pub(super) fn is_over(&self, facts: &Facts, (network, container): (&str, &str), told: &Attached, asked: Timestamp) -> bool {
        let has_it = |its: &Attached| (told.mac.is_some() && its.mac == told.mac) || !its.addresses.is_disjoint(&told.addresses);
        let is_anothers = |(on, its): &(String, String)| on == network && its != container;
        facts.ended.is_of(network, container, told.mac, asked)
            || self.places.iter().any(|(key, place)| is_anothers(key) && place.at > asked && has_it(&place.attached))
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

    /// Ports that went away before the engine told of them: their containers are not there any more, whatever it says of before. Returns
    /// these.
    pub(super) fn gone(&mut self, facts: &mut Facts, links: &Links, at: Timestamp) -> Vec<String> {
        self.untold.retain(|port, namespace| leads(links, port) == Some(*namespace));
        let gone = self.places.extract_if(.., |_, place| leads(links, &place.port) != Some(place.namespace));
        let gone: Vec<_> = gone.collect();
        gone.into_iter()
            .map(|((network, container), place)| {
                facts.detach(&network, &container);
                if let Some(mac) = place.attached.mac {
                    facts.ended.untold(&network, &container, place.port, mac, at);
                }
                container
            })
            .collect()
    }

    /// The engine was asked for everything at this time, and what it said has replaced what was known of networks. What it gave to
    /// somebody else by then it has taken back; what somebody was seen to have since is not another's any more.
    pub(super) fn listed(&mut self, facts: &mut Facts, links: &Links, asked: Timestamp) {
        facts.ended.listed(&facts.networks, asked);
        let places = std::mem::take(&mut self.places);
        for ((network, container), mut place) in places {
            let Some(fact) = facts.networks.get(&network) else { continue };
            // Another MAC address was its in a life that was over when we looked, and for the engine not yet when it was asked.
            let is_of_before = |told: &Attached| place.at >= asked && told.mac != place.attached.mac;
            if fact.attached.get(&container).is_some_and(|told| !is_of_before(told)) {
                continue;
            }
            if asked.duration_since(place.at) >= TOLD_WITHIN {
                self.untold.insert(place.port, place.namespace);
                continue;
            }
            let has_its_mac = |(id, other): &(&String, &Attached)| *id != &container && other.mac == place.attached.mac;
            let others: Vec<String> = fact.attached.iter().filter(has_its_mac).map(|(id, _)| id.clone()).collect();
            let is_newer = place.at >= asked;
            if is_newer {
                // An event tells the end of each of them, or their next place.
                others.iter().for_each(|other| facts.detach(&network, other));
                let taken = held_elsewhere(facts, &network, links, &place.port);
                place.attached.addresses.retain(|address| !taken.contains(address));
            } else {
                place.attached.addresses = own(facts, &network, links, &container, &place.attached.addresses);
            }
            let is_anothers = !is_newer && !others.is_empty();
            if leads(links, &place.port) == Some(place.namespace) && !place.attached.addresses.is_empty() && !is_anothers {
                facts.attach(&network, &container, place.attached.clone());
                self.places.insert((network, container), place);
            }
        }
        facts.forget_where_nobody_is();
    }
}

/// Addresses of those on a network that are behind another port than this one.
fn held_elsewhere(facts: &Facts, network: &str, links: &Links, port: &str) -> BTreeSet<IpAddr> {
    let fact = &facts.networks[network];
    let others = links.ports.iter().filter(|(name, other)| *name != port && Some(&other.bridge) == fact.bridge.as_ref());
    let macs: BTreeSet<_> = others.filter_map(|(_, other)| Some(other.peer.as_ref()?.mac)).collect();
    let living = fact.attached.iter().filter(|(id, its)| its.mac.is_some_and(|mac| macs.contains(&mac)) && !facts.ended.has(network, id));
    living.flat_map(|(_, its)| its.addresses.iter().copied()).collect()
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
fn own(facts: &Facts, network: &str, links: &Links, container: &str, addresses: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let fact = &facts.networks[network];
    let is_anothers = |address: &IpAddr| {
        let has_it = |(id, other): (&String, &Attached)| id != container && other.addresses.contains(address);
        fact.attached.iter().any(|other| has_it(other) && !facts.ended.has(network, other.0))
    };
    let may_be = |address: &&IpAddr| {
        fact.subnets.iter().any(|subnet| subnet.contains(*address)) && !links.host.contains(address) && !is_anothers(address)
    };
    addresses.iter().filter(may_be).copied().collect()
}

#[cfg(test)]
mod tests;
