//! What the engine and the kernel told us, as they told it, and how the two are joined into one inventory. Pure: no engine, no
//! netlink, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use policy::Inventory;
use policy::inventory::{Attachment, Container, Leg, Network, NodeBridge, Published, Unmanaged, name};

use super::ended::Ended;

/// A MAC address.
pub(crate) type Mac = [u8; 6];

/// One network, as network inspect tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkFact {
    pub(crate) name: String,
    pub(crate) project: Option<String>,
    pub(crate) driver: String,
    /// The bridge's interface name, for the driver `bridge`.
    pub(crate) bridge: Option<String>,
    pub(crate) subnets: Vec<IpNet>,
    pub(crate) internal: bool,
    /// By container id.
    pub(crate) attached: BTreeMap<String, Attached>,
}

/// One container's place on one network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) mac: Option<Mac>,
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// One container, as the container list tells it; the list answers while the container starts, inspect doesn't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerFact {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) running: bool,
    /// `default`, a network's name, `host`, `none`, `container:ID`.
    pub(crate) network_mode: String,
    pub(crate) details: Option<Details>,
}

/// What only container inspect tells, once the container runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Details {
    pub(crate) pid: Option<u32>,
    pub(crate) published: Vec<Published>,
    pub(crate) resolvers: Vec<IpAddr>,
    pub(crate) unmanaged: BTreeSet<Unmanaged>,
    /// It has CAP_NET_RAW.
    pub(crate) raw: bool,
    /// Sentences about what could not be understood or believed.
    pub(crate) notes: Vec<String>,
    /// The id that this network namespace has for its own, as the kernel tells it.
    pub(crate) namespace: Option<i32>,
}

/// What rtnetlink tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Links {
    /// Interface names of the bridges, and the node's addresses on each.
    pub(crate) bridges: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Ports of bridges, by interface name.
    pub(crate) ports: BTreeMap<String, Port>,
    /// Addresses of the node.
    pub(crate) host: BTreeSet<IpAddr>,
}

impl Links {
    /// Each bridge with its ports.
    fn node_bridges(&self) -> BTreeMap<String, NodeBridge> {
        let bridge = |(name, addresses): (&String, &BTreeSet<IpAddr>)| {
            (name.clone(), NodeBridge { addresses: addresses.clone(), ports: BTreeSet::new() })
        };
        let mut bridges: BTreeMap<_, _> = self.bridges.iter().map(bridge).collect();
        for (name, port) in &self.ports {
            bridges.entry(port.bridge.clone()).or_default().ports.insert(name.clone());
        }
        bridges
    }
}

/// Ports by bridge and by what is at their other end: with a thousand containers there are a thousand ports to look through for each.
pub(crate) struct Ends<'a> {
    ports: BTreeMap<(&'a str, Mac), Vec<(&'a String, &'a Peer)>>,
    /// Containers that are known to be in a namespace, by container and by namespace.
    inside: BTreeMap<String, i32>,
    taken: BTreeSet<i32>,
}

impl<'a> Ends<'a> {
    /// `inside`: see [`Facts::inside`].
    pub(crate) fn of(links: &'a Links, inside: BTreeMap<String, i32>) -> Self {
        let mut ends: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (name, port) in &links.ports {
            if let Some(peer) = &port.peer {
                ends.entry((port.bridge.as_str(), peer.mac)).or_default().push((name, peer));
            }
        }
        let taken = inside.values().copied().collect();
        Self { ports: ends, inside, taken }
    }

    /// The port behind which a container's MAC address is; `None` too if there are two, since neither can be told to be its. Who may
    /// change its own has a neighbour's before we look: so a port is its of whose namespace its other end is in, where that is known, and
    /// nobody else's.
    fn port(&self, container: &str, bridge: &str, mac: Mac) -> Option<(&'a String, &'a Peer)> {
        let own = self.inside.get(container);
        let may_be_its = |peer: &Peer| own.map_or(!self.taken.contains(&peer.namespace), |own| *own == peer.namespace);
        let mut ports = self.ports.get(&(bridge, mac))?.iter().filter(|(_, peer)| may_be_its(peer));
        ports.next().filter(|_| ports.next().is_none()).copied()
    }

    /// Whether the kernel would derive this address from a neighbour's MAC address.
    fn is_a_neighbours(&self, bridge: &str, mac: Mac, address: &Ipv6Addr) -> bool {
        mac_of(address).is_some_and(|its| its != mac && self.ports.contains_key(&(bridge, its)))
    }
}

/// A port of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// Interface name of the bridge.
    pub(crate) bridge: String,
    /// What is at the other end, if it is a veth whose other end is in another namespace.
    pub(crate) peer: Option<Peer>,
}

/// The other end of a veth, read through its namespace's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The id that this network namespace has for its.
    pub(crate) namespace: i32,
    pub(crate) mac: Mac,
    /// fe80::/10 addresses it has.
    pub(crate) link_local: BTreeSet<Ipv6Addr>,
    /// The others that it had when it was read.
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// Everything that was told, and what is to be said of all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) networks: BTreeMap<String, NetworkFact>,
    pub(crate) containers: BTreeMap<String, ContainerFact>,
    /// Namespaces of containers of which the engine has not told a process yet: see [`ahead`](super::ahead).
    pub(crate) seen_in: BTreeMap<String, i32>,
    /// What was said of places whose ports have gone since.
    pub(crate) ended: Ended,
    pub(crate) userland_proxy: bool,
    /// Why nothing of this engine can be held to a policy (rootless, Podman).
    pub(crate) engine_unmanaged: Option<String>,
}

impl Facts {
    /// A container is on a network with these addresses; whoever else was said to have one of them there has it no more, since the
    /// engine gives an address away only after it has taken it back.
    pub(crate) fn attach(&mut self, network: &str, container: &str, attached: Attached) {
        self.ended.forget(network, container);
        let Some(network) = self.networks.get_mut(network) else { return };
        for (_, other) in network.attached.iter_mut().filter(|(id, _)| *id != container) {
            other.addresses.retain(|address| !attached.addresses.contains(address));
        }
        network.attached.insert(container.to_owned(), attached);
    }

    /// A container left a network.
    pub(crate) fn detach(&mut self, network: &str, container: &str) {
        self.ended.forget(network, container);
        if let Some(network) = self.networks.get_mut(network) {
            network.attached.remove(container);
        }
        if !self.is_here(container) {
            self.seen_in.remove(container);
        }
    }

    /// By the kernel a container is in this namespace. If the engine's last word is of another one, that and its process are of a life
    /// before.
    pub(crate) fn found_in(&mut self, container: &str, namespace: i32) {
        self.seen_in.insert(container.to_owned(), namespace);
        let details = self.containers.get_mut(container).and_then(|fact| fact.details.as_mut());
        if let Some(details) = details.filter(|details| details.namespace.is_some_and(|told| told != namespace)) {
            (details.namespace, details.pid) = (None, None);
        }
    }

    /// Who is known to be in which network namespace, but for who shares another's.
    pub(crate) fn inside(&self) -> BTreeMap<String, i32> {
        let own = self.containers.iter().filter(|(_, fact)| fact.running && !fact.network_mode.starts_with("container:"));
        let told = own.filter_map(|(id, fact)| Some((id.clone(), fact.details.as_ref()?.namespace?)));
        self.seen_in.clone().into_iter().chain(told).collect()
    }

    /// First processes of containers that run, where the engine's last word is that they are in one of these namespaces.
    pub(crate) fn processes_in(&self, namespaces: &BTreeSet<i32>) -> Vec<u32> {
        let details = self.containers.values().filter(|fact| fact.running).filter_map(|fact| fact.details.as_ref());
        let inside = details.filter(|details| details.namespace.is_some_and(|id| namespaces.contains(&id)));
        inside.filter_map(|details| details.pid).collect()
    }

    /// What only inspect tells of a container; whether that is anything new.
    pub(crate) fn inspected(&mut self, container: &str, details: Details) -> bool {
        let Some(fact) = self.containers.get_mut(container).filter(|fact| fact.running) else { return false };
        if details.namespace.is_some() {
            self.seen_in.remove(container);
        }
        let news = fact.details.as_ref() != Some(&details);
        fact.details = Some(details);
        news
    }

    /// Of whoever is not here it is not known where it is: an id of a namespace is used again.
    pub(crate) fn forget_where_nobody_is(&mut self) {
        let seen = std::mem::take(&mut self.seen_in);
        self.seen_in = seen.into_iter().filter(|(container, _)| self.is_here(container)).collect();
    }

    /// A container is gone.
    pub(crate) fn forget(&mut self, container: &str) {
        self.containers.remove(container);
        self.seen_in.remove(container);
        for (id, network) in &mut self.networks {
            network.attached.remove(container);
            self.ended.forget(id, container);
        }
    }

    /// Whether a container has a place here: it runs, or it is on a network because it is about to.
    pub(crate) fn is_here(&self, id: &str) -> bool {
        self.containers.get(id).is_some_and(|container| container.running)
            || self.networks.values().any(|network| network.attached.contains_key(id))
    }

    /// One container as [`Facts::join`] has it, but for its members; `None`: it is not here, or shares another's namespace.
    pub(crate) fn container_here(&self, id: &str, ends: &Ends<'_>) -> Option<Container> {
        let fact = self.containers.get(id).filter(|_| self.is_here(id) && self.owner(id).is_none())?;
        let its = self.networks.iter().filter(|(_, network)| network.driver != "null" && network.attached.contains_key(id));
        let networks = its.map(|(id, fact)| (id.clone(), self.network(id, fact, &Links::default()))).collect();
        Some(self.container(id, fact, &networks, ends, &mut BTreeSet::new()))
    }

    /// Joins what the engine says with what the kernel says. The second part are sentences for a person.
    pub(crate) fn join(&self, links: &Links) -> (Inventory, BTreeSet<String>) {
        let mut notes = BTreeSet::new();
        let networks: BTreeMap<String, Network> = self
            .networks
            .iter()
            // The engine's `none`: no interface, no traffic.
            .filter(|(_, fact)| fact.driver != "null")
            .map(|(id, fact)| (id.clone(), self.network(id, fact, links)))
            .collect();
        let ends = Ends::of(links, self.inside());
        let mut containers: BTreeMap<String, Container> = BTreeMap::new();
        let mut shared: Vec<(&String, &ContainerFact, String)> = Vec::new();
        for (id, fact) in self.containers.iter().filter(|(id, _)| self.is_here(id)) {
            match self.owner(id) {
                Some(owner) => shared.push((id, fact, owner)),
                None => {
                    containers.insert(id.clone(), self.container(id, fact, &networks, &ends, &mut notes));
                }
            }
        }
        for (id, fact, owner) in shared {
            // Who shares a namespace acts from it: what withholds the claim from one withholds it from all.
            let member = self.container(id, fact, &networks, &ends, &mut notes);
            let owner = containers.get_mut(&owner).expect("owner() returns only containers that are here and share nobody's namespace");
            owner.members.push(member.name);
            owner.unmanaged.extend(member.unmanaged);
            owner.raw |= member.raw;
        }
        for container in containers.values_mut() {
            container.members.sort();
        }
        own_choice_is_nobody_elses(&mut containers);
        let inventory = Inventory {
            networks,
            containers,
            host: links.host.clone(),
            userland_proxy: self.userland_proxy,
            strangers: BTreeMap::new(),
            bridges: links.node_bridges(),
            forwarders: BTreeSet::new(),
        };
        (inventory, notes)
    }

    /// The container whose network namespace this one shares, however many steps away; `None`: it has one of its own, or the
    /// owner is not here.
    fn owner(&self, id: &str) -> Option<String> {
        let mut seen = BTreeSet::from([id.to_owned()]);
        let mut owner = None;
        let mut current = id.to_owned();
        while let Some(target) = self.containers.get(&current).and_then(|fact| fact.network_mode.strip_prefix("container:")) {
            // The engine writes the full id; a name is what an older client may have left there.
            let (next, _) = self.containers.iter().find(|(id, fact)| *id == target || fact.name == target)?;
            if !self.is_here(next) || !seen.insert(next.clone()) {
                return None;
            }
            current.clone_from(next);
            owner = Some(current.clone());
        }
        owner
    }

    fn network(&self, id: &str, fact: &NetworkFact, links: &Links) -> Network {
        let mut unmanaged: BTreeSet<Unmanaged> = self.engine_unmanaged.iter().cloned().map(Unmanaged::Node).collect();
        match (fact.driver.as_str(), &fact.bridge) {
            ("bridge", Some(bridge)) if links.bridges.contains_key(bridge) => {}
            ("bridge", Some(bridge)) => {
                unmanaged.insert(Unmanaged::NoBridge(bridge.clone()));
            }
            ("host", _) => {
                unmanaged.insert(Unmanaged::HostNetwork);
            }
            (driver, _) => {
                unmanaged.insert(Unmanaged::Driver(driver.to_owned()));
            }
        }
        Network {
            id: id.to_owned(),
            name: fact.name.clone(),
            project: fact.project.clone(),
            driver: fact.driver.clone(),
            bridge: fact.bridge.clone(),
            subnets: fact.subnets.clone(),
            internal: fact.internal,
            unmanaged,
        }
    }

    fn container(
        &self,
        id: &str,
        fact: &ContainerFact,
        networks: &BTreeMap<String, Network>,
        ends: &Ends<'_>,
        notes: &mut BTreeSet<String>,
    ) -> Container {
        let named = name::name(&fact.labels, &fact.name);
        notes.extend(named.notes);
        let details = fact.details.clone().unwrap_or_default();
        notes.extend(details.notes);
        let mut unmanaged = details.unmanaged;
        if fact.network_mode == "host" {
            unmanaged.insert(Unmanaged::HostNetwork);
        }
        let (mut legs, mut elsewhere) = (Vec::new(), Vec::new());
        for (network_id, network) in networks {
            let Some(attached) = self.networks[network_id].attached.get(id) else { continue };
            unmanaged.extend(network.unmanaged.iter().cloned());
            match (&network.bridge, attached.mac) {
                (Some(bridge), Some(mac)) => {
                    let mut addresses = attached.addresses.clone();
                    // What the kernel makes of a MAC address is its who has that now.
                    let port = if self.ended.has(network_id, id) {
                        None
                    } else {
                        addresses.insert(IpAddr::V6(link_local(mac)));
                        ends.port(id, bridge, mac)
                    };
                    legs.push(leg((network_id, bridge), port, mac, addresses, ends));
                }
                (_, _) => elsewhere.push(Attachment { network: network_id.clone(), addresses: attached.addresses.clone() }),
            }
        }
        Container {
            id: id.to_owned(),
            name: fact.name.clone(),
            workload: named.workload,
            one_off: named.one_off,
            engine_named: named.engine_named,
            image: fact.image.clone(),
            labels: fact.labels.clone(),
            pid: details.pid,
            legs,
            elsewhere,
            published: details.published,
            resolvers: details.resolvers,
            members: Vec::new(),
            unmanaged,
            raw: details.raw,
        }
    }
}

fn leg((network, bridge): (&str, &str), port: Option<(&String, &Peer)>, mac: Mac, mut addresses: BTreeSet<IpAddr>, ends: &Ends<'_>) -> Leg {
    if let Some((_, peer)) = port {
        // What the container chose itself (RFC 7217), unless it chose the address that belongs to a neighbour's MAC.
        let own = |address: &&Ipv6Addr| !ends.is_a_neighbours(bridge, mac, address);
        addresses.extend(peer.link_local.iter().filter(own).copied().map(IpAddr::V6));
    }
    Leg { network: network.to_owned(), bridge: bridge.to_owned(), port: port.map(|(name, _)| name.clone()), mac, addresses }
}

/// A link-local address that a container chose itself does not count where another one has it too: it would have the other's rules with
/// it. Whoever has it of its MAC address keeps it; of two who chose the same, nobody can say whose it is.
fn own_choice_is_nobody_elses(containers: &mut BTreeMap<String, Container>) {
    let chosen =
        |leg: &Leg, address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local() && *v6 != link_local(leg.mac));
    let mut holders: BTreeMap<(String, IpAddr), usize> = BTreeMap::new();
    for leg in containers.values().flat_map(|container| &container.legs) {
        holders.extend(leg.addresses.iter().filter(|address| chosen(leg, address)).map(|&address| ((leg.bridge.clone(), address), 0)));
    }
    // Mostly nobody chose any.
    if holders.is_empty() {
        return;
    }
    for leg in containers.values().flat_map(|container| &container.legs) {
        for &address in &leg.addresses {
            if let Some(count) = holders.get_mut(&(leg.bridge.clone(), address)) {
                *count += 1;
            }
        }
    }
    for leg in containers.values_mut().flat_map(|container| &mut container.legs) {
        let mut addresses = std::mem::take(&mut leg.addresses);
        addresses.retain(|address| !chosen(leg, address) || holders.get(&(leg.bridge.clone(), *address)) == Some(&1));
        leg.addresses = addresses;
    }
}

/// The link-local address that the kernel derives from a MAC address (RFC 4291, appendix A).
pub(crate) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The MAC address that the kernel derives this address from; `None`: from none.
fn mac_of(address: &Ipv6Addr) -> Option<Mac> {
    let [.., a, b, c, _, _, d, e, f] = address.octets();
    let mac = [a ^ 2, b, c, d, e, f];
    (link_local(mac) == *address).then_some(mac)
}

#[cfg(test)]
mod tests;
