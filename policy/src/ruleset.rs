//! What the kernel of one node has to hold, as data: spots, sides, pairs. The enforcer turns it into nftables sets; nothing
//! here knows netlink.
//!
//! # Why
//! Each side of a connection is looked up by itself, as `evaluate` does: the sender's egress by (its spot, the peer, protocol,
//! port), the receiver's ingress likewise. So the cost is four hash look-ups whatever the number of rules, a change of one rule
//! is a change of the elements of one side, and a denial knows which side said no.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::evaluate::Standing;
use crate::policy_set::Direction;
use crate::service::{Ports, Protocol, Service};

mod change;
mod query;

pub use change::{Change, Moves, Turn};

/// An address in its place: the same address on another bridge is another spot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Spot {
    /// Interface name of the bridge; `None`: the node itself.
    pub bridge: Option<String>,
    /// The address.
    pub address: IpAddr,
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.address, self.bridge.as_deref().unwrap_or_default())
    }
}

/// Text that is no spot and no door of a stored ruleset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a spot (ADDRESS@BRIDGE) or a door (PROTOCOL/PORT@ADDRESS)")]
pub struct NotAPlace {
    /// What was given.
    pub text: String,
}

impl FromStr for Spot {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAPlace { text: text.to_owned() };
        let (address, bridge) = text.split_once('@').ok_or_else(wrong)?;
        let bridge = (!bridge.is_empty()).then(|| bridge.to_owned());
        Ok(Self { bridge, address: address.parse().map_err(|_| wrong())? })
    }
}

text_serde!(Spot);

/// The other end of a pair.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Remote {
    /// A spot: a container, or one of the node's own addresses.
    Spot(Spot),
    /// Addresses beyond every bridge of the engine: the packet's other interface is not one of [`Ruleset::bridges`].
    Outside(IpNet),
}

/// One allow of one side, in addresses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pair {
    /// Whose side: `local` sends (egress) or receives (ingress).
    pub direction: Direction,
    /// The spot whose side it is.
    pub local: Spot,
    /// The other end.
    pub remote: Remote,
    /// The server's ports: the remote's for egress, the local's for ingress.
    pub ports: Ports,
}

/// A port of the node that the engine's user-land proxy listens on: whoever comes here reaches the container behind it, so the
/// container's ingress is decided here, before the proxy hides who asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Door {
    /// One of the node's addresses.
    pub address: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The published port.
    pub port: u16,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.protocol, self.port, self.address)
    }
}

impl FromStr for Door {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAPlace { text: text.to_owned() };
        let (service, address) = text.split_once('@').ok_or_else(wrong)?;
        let Service { protocol, port } = service.parse().map_err(|_| wrong())?;
        Ok(Self { address: address.parse().map_err(|_| wrong())?, protocol, port })
    }
}

text_serde!(Door);

/// What a port of a bridge may send from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pin {
    /// Interface name of the bridge.
    pub bridge: String,
    /// The only source MAC address.
    pub mac: [u8; 6],
    /// The only source addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// A bridge whose packets are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    /// A workload in Enforce (or quarantine) is attached: addresses that are not bound are dropped.
    pub guarded: bool,
    /// Whether connection tracking tells its connections from those of other watched bridges.
    #[serde(default)]
    pub tuples: Tuples,
}

/// Connection tracking knows addresses and ports, and no bridges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Tuples {
    /// No two watched bridges of the node carry the same addresses.
    #[default]
    Own,
    /// Two others do.
    Beside,
    /// Another one carries addresses of this one's subnets.
    Shared,
}

/// Everything the kernel of one node has to hold. Equal rulesets are the same ruleset: applying one twice writes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ruleset {
    /// Every bridge of the engine: what comes in by another interface is from outside.
    pub bridges: BTreeSet<String>,
    /// Bridges with a workload in Audit, Enforce or quarantine.
    pub watched: BTreeMap<String, Watch>,
    /// Ports of guarded bridges (veth names) and what they may send from.
    pub pins: BTreeMap<String, Pin>,
    /// How each bound spot of a watched bridge is treated.
    pub sides: BTreeMap<Spot, Standing>,
    /// Doors of containers in Audit, Enforce or quarantine, and how what is not allowed there is treated.
    pub doors: BTreeMap<Door, Standing>,
    /// The allows.
    pub pairs: BTreeSet<Pair>,
    /// Ports of doors in Enforce or quarantine where the proxy listens on more than the node's addresses (0.0.0.0, ::, loopback): it
    /// also takes what is sent there by broadcast, by multicast, or to loopback from elsewhere. Nobody is allowed that.
    #[serde(default)]
    pub ajar: BTreeSet<Door>,
    /// The node's own addresses, where there is such a port.
    #[serde(default)]
    pub node: BTreeSet<IpAddr>,
    /// Subnets of guarded networks. The engine makes a network anew with another bridge, and mostly with the same subnet: on a bridge
    /// that is not one of `known` nobody has such an address, until this is bound again.
    #[serde(default)]
    pub subnets: BTreeSet<IpNet>,
    /// Every bridge of the node, where there are such subnets.
    #[serde(default)]
    pub known: BTreeSet<String>,
    /// Ports of the bridges that are not guarded, where there are such subnets: what these say to each other is nobody's business.
    #[serde(default)]
    pub bystanders: BTreeSet<String>,
    /// Published ports of containers in Audit, Enforce or quarantine, by the container's own address and port, that the node itself may
    /// not reach. What a program of the node sends to the port it is published at is translated on its way out, when the kernel has
    /// taken it for loopback already: no bridge is known to look it up by.
    #[serde(default)]
    pub inward: BTreeMap<Door, Standing>,
}

impl Ruleset {
    /// The bridges where an address that is not bound is dropped.
    pub fn guarded(&self) -> BTreeSet<String> {
        self.watched.iter().filter(|(_, watch)| watch.guarded).map(|(bridge, _)| bridge.clone()).collect()
    }
}

/// How the kernel reports what the filter denies: NFLOG groups, and prefixes that name the side. The enforcer writes them into
/// rules, the observer reads them from records; nothing else on the host uses them.
pub mod log {
    /// NFLOG group of denied packets.
    pub const DENY_GROUP: u16 = 20;
    /// NFLOG group of packets that passed and would be denied under Enforce.
    pub const AUDIT_GROUP: u16 = 21;
    /// The sender's side doesn't allow it.
    pub const DENY_EGRESS: &str = "bulkhead:deny:egress";
    /// The receiver's side doesn't allow it.
    pub const DENY_INGRESS: &str = "bulkhead:deny:ingress";
    /// An address that belongs to nobody, on a guarded bridge.
    pub const DENY_UNKNOWN: &str = "bulkhead:deny:unknown";
    /// An end is quarantined.
    pub const DENY_CUT: &str = "bulkhead:deny:cut";
    /// Sent from what is not the sender's own.
    pub const DENY_SPOOF: &str = "bulkhead:deny:spoof";
    /// Not allowed to the container behind a published port.
    pub const DENY_DOOR: &str = "bulkhead:deny:door";
    /// The sender's side would deny it.
    pub const AUDIT_EGRESS: &str = "bulkhead:audit:egress";
    /// The receiver's side would deny it.
    pub const AUDIT_INGRESS: &str = "bulkhead:audit:ingress";
    /// Would be denied at a published port.
    pub const AUDIT_DOOR: &str = "bulkhead:audit:door";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_ruleset_is_read_as_it_was_written() {
        let spot = Spot { bridge: Some("br-1".to_owned()), address: "fd00::2".parse().unwrap() };
        let host = Spot { bridge: None, address: "192.0.2.1".parse().unwrap() };
        let door = Door { address: host.address, protocol: Protocol::Udp, port: 53 };
        let ports = Ports::new(Protocol::Tcp, 80, 81).unwrap();
        let pair = Pair { direction: Direction::Ingress, local: spot.clone(), remote: Remote::Spot(host), ports };
        let ruleset = Ruleset {
            bridges: ["br-1".to_owned()].into(),
            watched: [("br-1".to_owned(), Watch { guarded: true, tuples: Tuples::Shared })].into(),
            pins: [("veth1".to_owned(), Pin { bridge: "br-1".to_owned(), mac: [2; 6], addresses: [spot.address].into() })].into(),
            sides: [(spot, Standing::Audit)].into(),
            doors: [(door, Standing::Quarantined)].into(),
            pairs: [pair].into(),
            ajar: [Door { address: "0.0.0.0".parse().unwrap(), protocol: Protocol::Udp, port: 53 }].into(),
            node: ["192.0.2.1".parse().unwrap()].into(),
            subnets: ["10.0.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()].into(),
            known: ["br-1".to_owned(), "virbr0".to_owned()].into(),
            bystanders: ["vnet0".to_owned()].into(),
            inward: [(Door { address: "10.0.0.2".parse().unwrap(), protocol: Protocol::Tcp, port: 80 }, Standing::Quarantined)].into(),
        };
        let json = serde_json::to_string(&ruleset).unwrap();
        assert_eq!(serde_json::from_str::<Ruleset>(&json).unwrap(), ruleset, "{json}");
    }
}
