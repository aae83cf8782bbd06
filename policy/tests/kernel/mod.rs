//! What the kernel does with a ruleset, packet by packet: the first packet of a connection, before any state. Written from the
//! words of `policy::ruleset`, not from `bind`.
#![allow(unreachable_pub)]

use std::fmt;
use std::net::IpAddr;

use policy::policy_set::Direction;
use policy::ruleset::{Door, Pair, Remote, Spot};
use policy::{Ruleset, Service, Standing, Verdict};

/// Where a packet comes from or goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By a bridge of the engine.
    Bridge(String, IpAddr),
    /// The node itself.
    Node(IpAddr),
    /// By any other interface.
    Beyond(IpAddr),
}

impl Place {
    pub fn address(&self) -> IpAddr {
        match self {
            Self::Bridge(_, address) | Self::Node(address) | Self::Beyond(address) => *address,
        }
    }

    fn spot(&self) -> Option<Spot> {
        match self {
            Self::Bridge(bridge, address) => Some(Spot { bridge: Some(bridge.clone()), address: *address }),
            Self::Node(address) => Some(Spot { bridge: None, address: *address }),
            Self::Beyond(_) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(bridge, address) => write!(f, "{address}@{bridge}"),
            Self::Node(address) => write!(f, "{address}@node"),
            Self::Beyond(address) => write!(f, "{address}@beyond"),
        }
    }
}

fn allowed(ruleset: &Ruleset, direction: Direction, local: &Spot, remote: &Place, service: Service) -> bool {
    let same = |pair: &&Pair| pair.direction == direction && pair.local == *local && pair.ports.holds(service);
    ruleset.pairs.iter().filter(same).any(|pair| match (&pair.remote, remote) {
        (Remote::Spot(spot), place) => place.spot().as_ref() == Some(spot),
        (Remote::Outside(net), Place::Beyond(address)) => net.contains(address),
        (Remote::Outside(_), Place::Bridge(..) | Place::Node(_)) => false,
    })
}

fn verdict(standing: Standing, allowed: impl Fn() -> bool) -> Verdict {
    match standing {
        Standing::Open => Verdict::Allow,
        Standing::Quarantined => Verdict::Deny,
        Standing::Audit if allowed() => Verdict::Allow,
        Standing::Audit => Verdict::WouldDeny,
        Standing::Enforce(_) if allowed() => Verdict::Allow,
        Standing::Enforce(_) => Verdict::Deny,
    }
}

/// What one end says: nothing where its bridge is not watched, no where its address is not bound on a guarded bridge.
fn side(ruleset: &Ruleset, direction: Direction, own: &Place, remote: &Place, service: Service) -> Verdict {
    let Place::Bridge(bridge, _) = own else { return Verdict::Allow };
    let Some(watch) = ruleset.watched.get(bridge) else { return Verdict::Allow };
    let Some(spot) = own.spot() else { return Verdict::Allow };
    match ruleset.sides.get(&spot) {
        Some(&standing) => verdict(standing, || allowed(ruleset, direction, &spot, remote, service)),
        None if watch.guarded => Verdict::Deny,
        None => Verdict::Allow,
    }
}

/// The verdict on the first packet of a connection. FORWARD asks both sides, INPUT the sender's and the door, OUTPUT the receiver's.
pub fn judge(ruleset: &Ruleset, from: &Place, to: &Place, service: Service) -> Verdict {
    let egress = side(ruleset, Direction::Egress, from, to, service);
    let ingress = side(ruleset, Direction::Ingress, to, from, service);
    let door = match to {
        Place::Node(address) => {
            let door = Door { address: *address, protocol: service.protocol, port: service.port };
            let local = Spot { bridge: None, address: *address };
            ruleset.doors.get(&door).map(|&standing| verdict(standing, || allowed(ruleset, Direction::Ingress, &local, from, service)))
        }
        Place::Bridge(..) | Place::Beyond(_) => None,
    };
    // Deny outweighs WouldDeny outweighs Allow.
    egress.max(ingress).max(door.unwrap_or(Verdict::Allow))
}
