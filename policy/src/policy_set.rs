//! The allowlist in force: what people approved. Only allows; the single deny is a quarantine.

mod rules;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::rules::Rules;
use crate::guardrail::Guardrail;
use crate::segment::Segment;
use crate::service::{Ports, Service};
use crate::workload::{Endpoint, Workload};

/// The other end that a rule names. There is no empty peer and no "everyone": the widest is every address outside, and
/// that never includes a workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// A workload, its one-off runs included.
    Workload(Workload),
    /// The node the workload runs on, by any of its addresses.
    Host,
    /// Addresses outside (and of unmanaged containers). Never matches a workload, nor an unknown address on an engine's network.
    Outside(IpNet),
}

impl Peer {
    /// Whether this endpoint is meant.
    pub fn holds(&self, endpoint: &Endpoint) -> bool {
        match (self, endpoint) {
            (Self::Workload(w), Endpoint::Workload(e) | Endpoint::Run(e)) => w == e,
            (Self::Host, Endpoint::Host) => true,
            (Self::Outside(net), Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. }) => net.contains(address),
            (Self::Workload(_) | Self::Host | Self::Outside(_), _) => false,
        }
    }

    /// Exactly this address outside.
    pub fn address(address: IpAddr) -> Self {
        Self::Outside(IpNet::from(address))
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(w) => w.fmt(f),
            Self::Host => f.write_str("host:"),
            Self::Outside(net) if net.prefix_len() == net.max_prefix_len() => write!(f, "outside:{}", net.addr()),
            Self::Outside(net) => write!(f, "outside:{net}"),
        }
    }
}

/// Text that is not a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a peer: write a workload (shop/db), host: or outside:NETWORK, for example outside:192.0.2.0/24")]
pub struct NotAPeer {
    /// What was given.
    pub text: String,
}

impl FromStr for Peer {
    type Err = NotAPeer;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAPeer { text: text.to_owned() };
        if text == "host:" {
            return Ok(Self::Host);
        }
        match text.strip_prefix("outside:") {
            Some(net) => {
                let parsed: IpNet = net.parse().or_else(|_| net.parse::<IpAddr>().map(IpNet::from)).map_err(|_| wrong())?;
                // 10.0.0.5/8 is a typing mistake of one kind or another; guessing which would widen or narrow it.
                if parsed.trunc() == parsed { Ok(Self::Outside(parsed)) } else { Err(wrong()) }
            }
            // A network without its prefix would be a workload that nobody is; no project or namespace is called like an address.
            None if text.parse::<IpNet>().is_ok() => Err(wrong()),
            None => text.parse().map(Self::Workload).map_err(|_| wrong()),
        }
    }
}

text_serde!(Peer);

/// Which side of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// Others to the workload.
    Ingress,
    /// The workload to others.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// One allow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// The other end.
    pub peer: Peer,
    /// The server's ports: the peer's for egress, the workload's own for ingress.
    pub ports: Ports,
    /// Until when; `None`: until somebody takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

impl Rule {
    /// Whether the rule still holds.
    pub fn in_force(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| now < until)
    }

    /// Whether it allows this service of its peer now.
    pub(crate) fn allows(&self, service: Service, now: Timestamp) -> bool {
        self.in_force(now) && self.ports.holds(service)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.peer, self.ports)?;
        match self.until {
            Some(until) => write!(f, " until {until}"),
            None => Ok(()),
        }
    }
}

/// What one workload may do. Having one, even an empty one, is what "approved" means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadPolicy {
    /// Whose policy.
    pub workload: Workload,
    /// Who may reach it.
    #[serde(default)]
    pub ingress: Rules,
    /// Whom it may reach.
    #[serde(default)]
    pub egress: Rules,
}

impl WorkloadPolicy {
    /// An approved policy without a rule: nothing but what is always allowed.
    pub fn empty(workload: Workload) -> Self {
        Self { workload, ingress: Rules::default(), egress: Rules::default() }
    }

    /// The rules of one side.
    pub fn rules(&self, direction: Direction) -> &Rules {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// Those rules of one side that may cover another rule about this peer, in their order.
    pub(crate) fn about(&self, direction: Direction, peer: &Peer) -> Box<dyn Iterator<Item = &Rule> + '_> {
        match peer {
            Peer::Workload(_) | Peer::Host => Box::new(self.naming(direction, peer.clone())),
            Peer::Outside(net) => Box::new(self.holding(direction, net.network())),
        }
    }

    /// The first rule of one side, in their order, that allows a connection with this other end.
    pub fn allowing(&self, direction: Direction, end: &Endpoint, service: Service, now: Timestamp) -> Option<&Rule> {
        let allows = |rule: &&Rule| rule.allows(service, now);
        match end {
            Endpoint::Workload(peer) | Endpoint::Run(peer) => self.naming(direction, Peer::Workload(peer.clone())).find(allows),
            Endpoint::Host => self.naming(direction, Peer::Host).find(allows),
            Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } => self.holding(direction, *address).find(allows),
            Endpoint::Unknown(_) => None,
        }
    }

    /// Rules of one side that name exactly this peer.
    fn naming(&self, direction: Direction, peer: Peer) -> impl Iterator<Item = &Rule> {
        let first = Rule { peer, ports: Ports::LEAST, until: None };
        let peer = first.peer.clone();
        self.rules(direction).range(first..).take_while(move |rule| rule.peer == peer)
    }

    /// Rules of one side whose network holds an address. Networks sort by their first address, so those that hold it stand from the widest
    /// to the narrowest; from a rule that does not hold it, the next network that could is looked up.
    fn holding(&self, direction: Direction, address: IpAddr) -> impl Iterator<Item = &Rule> {
        let rules = self.rules(direction);
        let widest = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        let mut networks = (0..=widest).filter_map(move |length| IpNet::new(address, length).ok().map(|net| net.trunc()));
        let mut next = networks.next().map(Peer::Outside);
        std::iter::from_fn(move || {
            loop {
                let first = Rule { peer: next.take()?, ports: Ports::LEAST, until: None };
                let found = rules.range(first..).next()?;
                next = networks.find(|net| Peer::Outside(*net) > found.peer).map(Peer::Outside);
                if found.peer.holds(&Endpoint::Outside(address)) {
                    return Some(found.peer.clone());
                }
            }
        })
        .flat_map(move |peer| self.naming(direction, peer))
    }

    /// The rules of one side, to change.
    pub fn rules_mut(&mut self, direction: Direction) -> &mut Rules {
        match direction {
            Direction::Ingress => &mut self.ingress,
            Direction::Egress => &mut self.egress,
        }
    }
}

/// One workload cut off, living connections too; wins over every allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quarantine {
    /// Who is cut off.
    pub workload: Workload,
    /// Why, in a person's words.
    #[serde(default)]
    pub comment: String,
}

/// Everything that is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySet {
    /// Segments by name.
    pub segments: BTreeMap<String, Segment>,
    /// Approved policies by workload.
    pub policies: BTreeMap<Workload, WorkloadPolicy>,
    /// Who is cut off.
    pub quarantines: BTreeMap<Workload, Quarantine>,
    /// What must never be allowed, by name. Nodes are not told: a guardrail denies nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub guardrails: BTreeMap<String, Guardrail>,
}
