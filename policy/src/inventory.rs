//! What runs on a node and where: networks, containers, their legs and leases. Data only; the agent fills it from the
//! engine and from rtnetlink.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::service::Protocol;
use crate::workload::{Endpoint, Workload};

pub mod name;

/// Why a network or a container cannot be held to a policy, in words for `bulkhead status`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Unmanaged {
    /// The network is not a bridge on this node.
    Driver(String),
    /// Shares the node's network namespace.
    HostNetwork,
    /// Runs privileged: it can change the node's own rules.
    Privileged,
    /// Has a capability that reaches around the filter (NET_ADMIN, SYS_ADMIN, SYS_MODULE, BPF, SYS_PTRACE with the host's PIDs).
    Capability(String),
    /// Shares the host's PID namespace.
    HostPid,
    /// Has the engine's socket mounted, which is root on the node.
    EngineSocket,
    /// The bridge is missing on the node.
    NoBridge(String),
    /// The node lacks something: which, and what to do.
    Node(String),
}

impl std::fmt::Display for Unmanaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(driver) => write!(f, "driver {driver} is not a bridge on this node"),
            Self::HostNetwork => f.write_str("shares the host's network"),
            Self::Privileged => f.write_str("runs privileged"),
            Self::Capability(name) => write!(f, "has the capability {name}"),
            Self::HostPid => f.write_str("shares the host's process namespace"),
            Self::EngineSocket => f.write_str("has the engine's socket, which is root on this host"),
            Self::NoBridge(bridge) => write!(f, "bridge {bridge} is not there"),
            Self::Node(what) => f.write_str(what),
        }
    }
}

/// One network of the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The engine's id.
    pub id: String,
    /// The engine's name, as in `docker network ls`.
    pub name: String,
    /// Compose project, if one made it.
    pub project: Option<String>,
    /// `bridge`, `macvlan`, ...
    pub driver: String,
    /// The bridge's interface name on the node.
    pub bridge: Option<String>,
    /// Subnets of either family.
    pub subnets: Vec<IpNet>,
    /// No way out (`--internal`).
    pub internal: bool,
    /// Why its traffic cannot be filtered; empty: it can.
    pub unmanaged: BTreeSet<Unmanaged>,
}

/// One attachment of a container to a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leg {
    /// [`Network::id`].
    pub network: String,
    /// Interface name of the bridge.
    pub bridge: String,
    /// The veth's end on the node, once it is known.
    pub port: Option<String>,
    /// The container's own MAC address.
    pub mac: [u8; 6],
    /// Addresses of either family, link-local IPv6 included.
    pub addresses: BTreeSet<IpAddr>,
}

/// One attachment of a container to a network that is not a bridge of this node (macvlan, ipvlan, overlay, a plug-in's).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// [`Network::id`].
    pub network: String,
    /// Addresses of either family, where the engine knows them.
    pub addresses: BTreeSet<IpAddr>,
}

/// A port of a container made reachable at the node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// The node's address it listens on; unspecified (0.0.0.0, ::) for all of that family.
    pub address: IpAddr,
    /// The node's port.
    pub port: u16,
    /// Protocol of both ports.
    pub protocol: Protocol,
    /// The container's port.
    pub container_port: u16,
}

/// One container that has a network namespace of its own, with whoever shares it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// The engine's id.
    pub id: String,
    /// The engine's name, without the slash.
    pub name: String,
    /// What runs in it.
    pub workload: Workload,
    /// Made by `docker compose run`.
    pub one_off: bool,
    /// The name was made up by the engine (`quirky_einstein`): it won't survive a re-creation.
    pub engine_named: bool,
    /// The image's name.
    pub image: String,
    /// Labels as they are, whatever they hold.
    pub labels: BTreeMap<String, String>,
    /// Process id of the container's first process on the node, where known.
    pub pid: Option<u32>,
    /// Attachments.
    pub legs: Vec<Leg>,
    /// Attachments that no bridge of this node carries: not filtered, only named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<Attachment>,
    /// Published ports.
    pub published: Vec<Published>,
    /// Resolvers its queries go to under its own address (empty: the engine asks from the host's namespace).
    pub resolvers: Vec<IpAddr>,
    /// Names of containers that share its network namespace.
    pub members: Vec<String>,
    /// Why no protection may be claimed for it; its packets are filtered all the same.
    pub unmanaged: BTreeSet<Unmanaged>,
    /// It may send frames of any content and form (CAP_NET_RAW, which an engine gives to all unless told otherwise; packet(7)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

impl Container {
    /// The endpoint that its flows belong to.
    pub fn endpoint(&self) -> Endpoint {
        if self.one_off { Endpoint::Run(self.workload.clone()) } else { Endpoint::Workload(self.workload.clone()) }
    }
}

/// One bridge of the node, whoever made it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeBridge {
    /// Interface names of its ports.
    pub ports: BTreeSet<String>,
    /// Addresses that the node has on it.
    pub addresses: BTreeSet<IpAddr>,
}

/// Everything on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    /// Networks by id.
    pub networks: BTreeMap<String, Network>,
    /// Running containers by id.
    pub containers: BTreeMap<String, Container>,
    /// Addresses of the node's interfaces, loopback left out.
    pub host: BTreeSet<IpAddr>,
    /// Whether published ports go through the engine's user-land proxy.
    pub userland_proxy: bool,
    /// Ports of bridges that no container of the engine accounts for (another engine's, a build's, made by hand), with their
    /// bridge: never counted as protected.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub strangers: BTreeMap<String, String>,
    /// Every bridge of the node by interface name: the engine's, another one's, made by hand.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bridges: BTreeMap<String, NodeBridge>,
    /// Ids of containers on several networks that were seen to pass packets on between them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub forwarders: BTreeSet<String>,
}

impl Inventory {
    /// Names of the networks that a container is attached to.
    pub fn networks_of<'a>(&'a self, container: &'a Container) -> impl Iterator<Item = &'a str> {
        container.legs.iter().filter_map(|leg| self.networks.get(&leg.network)).map(|network| network.name.as_str())
    }

    /// The container and the leg that hold an address on a bridge.
    pub fn at(&self, bridge: &str, address: IpAddr) -> Option<(&Container, &Leg)> {
        self.containers.values().find_map(|container| {
            let leg = container.legs.iter().find(|leg| leg.bridge == bridge && leg.addresses.contains(&address))?;
            Some((container, leg))
        })
    }

    /// All workloads that run, each with the names of the networks any of its containers is attached to.
    pub fn workloads(&self) -> BTreeMap<&Workload, BTreeSet<&str>> {
        let mut found: BTreeMap<&Workload, BTreeSet<&str>> = BTreeMap::new();
        for container in self.containers.values() {
            found.entry(&container.workload).or_default().extend(self.networks_of(container));
        }
        found
    }
}
