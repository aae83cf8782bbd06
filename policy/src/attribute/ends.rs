//! Names for the two ends of one flow, from where its first packet came in and went out, and who held its addresses then.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;

use super::HOLD;
use super::door::Door;
use crate::evidence::Road;
use crate::graph::EdgeKey;
use crate::inventory::{Container, Inventory, Published};
use crate::lease::{Lease, LeaseBook};
use crate::service::{Protocol, Service};
use crate::track::Wire;
use crate::workload::Endpoint;

/// What is known of the node when flows are named.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    inventory: &'a Inventory,
    leases: &'a LeaseBook,
    links: &'a BTreeMap<u32, String>,
    bridges: BTreeSet<&'a str>,
    published: BTreeMap<(Protocol, u16), Vec<(&'a Published, &'a Container)>>,
}

impl<'a> Scene<'a> {
    /// What runs here, who held which address when, and the names of interfaces by index (lately removed ones included).
    pub fn new(inventory: &'a Inventory, leases: &'a LeaseBook, links: &'a BTreeMap<u32, String>) -> Self {
        let bridges = inventory.networks.values().filter_map(|network| network.bridge.as_deref()).collect();
        let mut published: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for container in inventory.containers.values() {
            for port in &container.published {
                published.entry((port.protocol, port.port)).or_default().push((port, container));
            }
        }
        Self { inventory, leases, links, bridges, published }
    }

    fn side(&self, index: Option<u32>) -> Side<'a> {
        let Some(index) = index else { return Side::Anywhere };
        if index == 0 {
            return Side::Host;
        }
        // Not an interface of this namespace: somebody else writes labels too.
        let Some(name) = self.links.get(&index) else { return Side::Anywhere };
        if self.bridges.contains(name.as_str()) { Side::Bridge(name) } else { Side::Elsewhere }
    }

    /// The lease of an address at a moment; or the one that began right after it, if nobody held the address then: the packet was
    /// faster than the engine's word of the container.
    fn lease(&self, bridge: Option<&str>, address: IpAddr, at: Timestamp) -> Option<&'a Lease> {
        let leases = self.leases;
        leases.find(bridge, address, at).or_else(|| {
            let soon = at.checked_add(HOLD).ok()?;
            leases.find(bridge, address, soon).filter(|lease| lease.from >= at)
        })
    }

    fn on_a_network(&self, address: IpAddr) -> bool {
        let mut networks = self.inventory.networks.values();
        networks.any(|network| network.bridge.is_some() && network.subnets.iter().any(|subnet| subnet.contains(&address)))
    }

    /// One end, with its lease if it has one.
    fn end(&self, side: &Side<'_>, address: IpAddr, at: Timestamp) -> (Endpoint, Option<&'a Lease>) {
        let leased = |lease: &'a Lease| (lease.endpoint.clone(), Some(lease));
        match side {
            Side::Host => (Endpoint::Host, None),
            Side::Bridge(bridge) => self.lease(Some(bridge), address, at).map_or((Endpoint::Unknown(address), None), leased),
            // A workload's address that didn't come by the workload's bridge is somebody else's.
            Side::Elsewhere => match self.lease(None, address, at).filter(|lease| lease.bridge.is_none()) {
                Some(lease) => leased(lease),
                None => (Endpoint::Outside(address), None),
            },
            Side::Anywhere if self.inventory.host.contains(&address) || address.is_loopback() => (Endpoint::Host, None),
            Side::Anywhere => match self.lease(None, address, at) {
                Some(lease) => leased(lease),
                None if self.on_a_network(address) => (Endpoint::Unknown(address), None),
                None => (Endpoint::Outside(address), None),
            },
        }
    }

    /// Who holds the port of the bridge that a packet came in by, whatever its source address says.
    fn sender(&self, wire: &Wire) -> Option<Endpoint> {
        let port = self.links.get(&wire.place.port?)?;
        let mut containers = self.inventory.containers.values();
        containers.find(|container| container.legs.iter().any(|leg| leg.port.as_ref() == Some(port))).map(Container::endpoint)
    }

    fn is_host(&self, index: Option<u32>, address: IpAddr) -> bool {
        index.map_or_else(|| self.inventory.host.contains(&address), |index| index == 0)
    }

    /// Whether any container has a port that is published, by whatever means.
    pub(super) fn has_doors(&self) -> bool {
        !self.published.is_empty()
    }

    /// The port of a container that a packet to the node reaches by the user-land proxy.
    pub(super) fn door(&self, wire: &Wire) -> Option<Door> {
        if wire.road != Road::Direct || wire.place.entered == Some(0) || !self.is_host(wire.place.left, wire.server) {
            return None;
        }
        let at = |address: IpAddr| match address {
            any if any.is_unspecified() => any.is_ipv4() == wire.server.is_ipv4(),
            exact => exact == wire.server,
        };
        let candidates = self.published.get(&(wire.service.protocol, wire.service.port))?;
        let (published, container) = candidates.iter().find(|(published, _)| at(published.address))?;
        let service = Service { protocol: published.protocol, port: published.container_port };
        Some(Door { container: container.id.clone(), service })
    }

    /// The door that a connection of the node to a container may have been opened for.
    pub(super) fn leg(&self, wire: &Wire) -> Option<Door> {
        if wire.road != Road::Direct || !self.is_host(wire.place.entered, wire.tuple.source) {
            return None;
        }
        let bridge = match self.side(wire.place.left) {
            Side::Bridge(bridge) => Some(bridge),
            Side::Anywhere => None,
            Side::Host | Side::Elsewhere => return None,
        };
        let lease = self.lease(bridge, wire.server, wire.time)?;
        let container = self.inventory.containers.get(&lease.container)?;
        let published = container.published.iter().any(|p| p.protocol == wire.service.protocol && p.container_port == wire.service.port);
        published.then(|| Door { container: lease.container.clone(), service: wire.service })
    }

    /// Both ends of a flow.
    pub(super) fn name(&self, listening: &mut Listening<'_>, wire: &Wire, forged: bool) -> Ends {
        let (mut from, client) = self.end(&self.side(wire.place.entered), wire.tuple.source, wire.time);
        if forged {
            from = self.sender(wire).unwrap_or(Endpoint::Unknown(wire.tuple.source));
        }
        let behind = self.door(wire).and_then(|door| Some((self.inventory.containers.get(&door.container)?.endpoint(), door.service)));
        if let Some((to, service)) = behind {
            return Ends { from, to, service, road: Road::Proxy, direction_known: true, reversed: false };
        }
        let (to, server) = self.end(&self.side(wire.place.left), wire.server, wire.time);
        let forward = Ends { from, to, service: wire.service, road: wire.road, direction_known: true, reversed: false };
        if wire.direction_sure {
            return forward;
        }
        // Older than the agent: whoever listens on its port is the server.
        let mut listens = |end: &Endpoint, lease: Option<&Lease>, port| {
            let listener = match (end, lease) {
                (Endpoint::Host, _) => Listener::Host,
                (_, Some(lease)) => Listener::Process(self.inventory.containers.get(&lease.container)?.pid?),
                (_, None) => return None,
            };
            listening(listener, Service { protocol: wire.service.protocol, port })
        };
        let by_server = listens(&forward.to, server, wire.service.port);
        let by_client = if wire.service.protocol.has_ports() { listens(&forward.from, client, wire.tuple.source_port) } else { None };
        match (by_client, by_server) {
            (None | Some(false), Some(true)) => forward,
            (Some(true), None | Some(false)) => Ends {
                from: forward.to,
                to: forward.from,
                service: Service { protocol: wire.service.protocol, port: wire.tuple.source_port },
                reversed: true,
                ..forward
            },
            (None | Some(false), None | Some(false)) | (Some(true), Some(true)) => Ends { direction_known: false, ..forward },
        }
    }
}

/// Whose listening sockets are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listener {
    /// The node's own network namespace.
    Host,
    /// The network namespace of a process of the node.
    Process(u32),
}

/// Answers whether somebody listens on a port in a network namespace; `None`: it can't be known.
pub type Listening<'a> = dyn FnMut(Listener, Service) -> Option<bool> + 'a;

/// The two ends and what joins them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ends {
    pub(super) from: Endpoint,
    pub(super) to: Endpoint,
    pub(super) service: Service,
    pub(super) road: Road,
    /// Whether it is known who the client is.
    pub(super) direction_known: bool,
    /// The client is the receiver of the first packet that was seen.
    pub(super) reversed: bool,
}

impl Ends {
    /// The edge it is part of.
    pub(super) fn key(&self) -> EdgeKey {
        EdgeKey { from: self.from.clone(), to: self.to.clone(), service: self.service, direction_known: self.direction_known }
    }

    /// The node with itself, or its kernel with the groups it has joined (IGMP, MLD): nobody's flow.
    pub(super) fn within_the_node(&self) -> bool {
        self.from == Endpoint::Host
            && match &self.to {
                Endpoint::Host => true,
                Endpoint::Unknown(address) | Endpoint::Outside(address) => is_group(*address),
                Endpoint::Workload(_) | Endpoint::Run(_) | Endpoint::Unmanaged { .. } => false,
            }
    }

    /// An end belongs to nobody we know, and should belong to somebody: a group never does.
    pub(super) fn unknown(&self) -> bool {
        [&self.from, &self.to].into_iter().any(|end| matches!(end, Endpoint::Unknown(address) if !is_group(*address)))
    }
}

fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST)
}

/// Where one end is.
enum Side<'a> {
    Host,
    /// On a bridge of the engine.
    Bridge(&'a str),
    /// Beyond another interface.
    Elsewhere,
    /// Only the address is known.
    Anywhere,
}
