//! One observed connection: who, to whom, what, and how it ended.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::evidence::Road;
use crate::service::{Protocol, Service};
use crate::workload::Endpoint;

/// Addresses and ports of one direction. IPv4-mapped IPv6 addresses are written as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tuple {
    /// Sender.
    pub source: IpAddr,
    /// Receiver.
    pub destination: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// 0 where the protocol has none; the ICMP id for ICMP.
    pub source_port: u16,
    /// 0 where the protocol has none; the ICMP type for ICMP.
    pub destination_port: u16,
}

impl Tuple {
    /// With IPv4-mapped IPv6 addresses made IPv4 (RFC 4291, 2.5.5.2).
    pub fn canonical(self) -> Self {
        Self { source: self.source.to_canonical(), destination: self.destination.to_canonical(), ..self }
    }

    /// The same, seen from the other end.
    pub fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}

/// In two words where a field at a time takes nine: some tables are asked by tuple for every event of the kernel.
impl Hash for Tuple {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { source, destination, protocol, source_port, destination_port } = *self;
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                state.write_u64(u64::from(source.to_bits()) << 32 | u64::from(destination.to_bits()));
            }
            (source, destination) => {
                for address in [source, destination] {
                    match address {
                        IpAddr::V4(v4) => state.write_u128(u128::from(v4.to_bits())),
                        IpAddr::V6(v6) => state.write_u128(v6.to_bits()),
                    }
                }
            }
        }
        let ports = u64::from(source_port) << 16 | u64::from(destination_port);
        state.write_u64(u64::from(protocol.number()) << 32 | ports);
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, protocol, source_port, destination_port } = self;
        write!(f, "{protocol} {source}:{source_port} -> {destination}:{destination_port}")
    }
}

/// How a flow went, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowOutcome {
    /// Payload was carried (TCP), or the other end answered (UDP, SCTP, ICMP).
    Established,
    /// A TCP connection that completed and carried nothing.
    ConnectedNoData,
    /// UDP without an answer and without a refusal.
    OneWay,
    /// No answer.
    Unanswered,
    /// Reset, or refused by an ICMP error.
    Refused,
    /// Denied by an enforced policy.
    Denied,
    /// Passed under Audit; the policy would have denied it.
    WouldDeny,
}

impl FlowOutcome {
    /// Whether such a flow is use of its edge, as opposed to an attempt.
    pub fn is_use(self) -> bool {
        match self {
            Self::Established | Self::ConnectedNoData | Self::OneWay => true,
            Self::Unanswered | Self::Refused | Self::Denied | Self::WouldDeny => false,
        }
    }
}

impl fmt::Display for FlowOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Established => "established",
            Self::ConnectedNoData => "connected, no data",
            Self::OneWay => "one-way",
            Self::Unanswered => "unanswered",
            Self::Refused => "refused",
            Self::Denied => "denied",
            Self::WouldDeny => "would be denied",
        })
    }
}

/// One flow with its ends named, as they were when it was captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// When it began, or when it was captured if it is older than the agent.
    pub time: Timestamp,
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and the server's own port (the container's port, not the published one).
    pub service: Service,
    /// How it went.
    pub outcome: FlowOutcome,
    /// How it got there.
    pub road: Road,
    /// Whether the client's end is known, or only that the two ends spoke (a flow older than the agent of which neither
    /// end listens): such a flow makes no rule.
    pub direction_known: bool,
    /// True if the flow is older than the agent.
    pub pre_existing: bool,
    /// Client to server.
    pub bytes_sent: u64,
    /// Server to client.
    pub bytes_received: u64,
    /// What was on the wire, before names.
    pub tuple: Tuple,
    /// Why it was denied or would have been; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}
