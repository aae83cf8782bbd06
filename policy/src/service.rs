//! Protocols and ports: what an edge carries and what a rule names.

use std::fmt;
use std::str::FromStr;

/// A transport protocol (IANA protocol numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// 6.
    Tcp,
    /// 17.
    Udp,
    /// 132.
    Sctp,
    /// 1.
    Icmp,
    /// 58.
    Icmpv6,
    /// Any other, by number.
    Other(u8),
}

impl Protocol {
    /// By IANA number.
    pub fn from_number(number: u8) -> Self {
        match number {
            6 => Self::Tcp,
            17 => Self::Udp,
            132 => Self::Sctp,
            1 => Self::Icmp,
            58 => Self::Icmpv6,
            other => Self::Other(other),
        }
    }

    /// The IANA number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Icmp => 1,
            Self::Icmpv6 => 58,
            Self::Other(number) => number,
        }
    }

    /// Whether the protocol has ports (RFC 793, 768, 9260).
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }

    /// Whether a service of this protocol is an ICMP or ICMPv6 type.
    pub fn has_types(self) -> bool {
        matches!(self, Self::Icmp | Self::Icmpv6)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Udp => f.write_str("udp"),
            Self::Sctp => f.write_str("sctp"),
            Self::Icmp => f.write_str("icmp"),
            Self::Icmpv6 => f.write_str("icmpv6"),
            Self::Other(number) => write!(f, "ip{number}"),
        }
    }
}

impl FromStr for Protocol {
    type Err = NotAService;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "tcp" => Self::Tcp,
            "udp" => Self::Udp,
            "sctp" => Self::Sctp,
            "icmp" => Self::Icmp,
            "icmpv6" => Self::Icmpv6,
            other => {
                // `parse` alone would take "+47".
                let digits = other.strip_prefix("ip").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                let number = digits.and_then(|n| n.parse().ok()).ok_or_else(|| NotAService { text: text.to_owned() })?;
                Self::from_number(number)
            }
        })
    }
}

text_serde!(Protocol);

/// What one edge carries: `tcp/5432`, `icmp/8` (the ICMP type), `ip47` (a protocol without ports).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service {
    /// The protocol.
    pub protocol: Protocol,
    /// The server's port; the type of the request for ICMP; 0 for a protocol that has neither.
    pub port: u16,
}

/// Text that is not a protocol with its ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a port: write PROTOCOL/PORT, for example tcp/5432, udp/8000-8010, icmp/8 or ip47")]
pub struct NotAService {
    /// What was given.
    pub text: String,
}

impl Service {
    /// TCP on this port.
    pub fn tcp(port: u16) -> Self {
        Self { protocol: Protocol::Tcp, port }
    }

    /// UDP on this port.
    pub fn udp(port: u16) -> Self {
        Self { protocol: Protocol::Udp, port }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ports::from(*self).fmt(f)
    }
}

impl FromStr for Service {
    type Err = NotAService;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ports: Ports = text.parse()?;
        if ports.first == ports.last {
            Ok(Self { protocol: ports.protocol, port: ports.first })
        } else {
            Err(NotAService { text: text.to_owned() })
        }
    }
}

text_serde!(Service);

/// Ports a rule names: one, or a range without gap, of one protocol. Never empty, never reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    protocol: Protocol,
    first: u16,
    last: u16,
}

impl Ports {
    /// Before every other in order; no rule names it.
    pub(crate) const LEAST: Self = Self { protocol: Protocol::Tcp, first: 0, last: 0 };

    /// A range, both ends included. For TCP, UDP and SCTP within 1..=65535; for ICMP types within 0..=255.
    ///
    /// # Errors
    /// A reversed range, port 0, a type above 255, or ports on a protocol that has none.
    pub fn new(protocol: Protocol, first: u16, last: u16) -> Result<Self, NotAService> {
        let possible = match protocol {
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => first >= 1 && first <= last,
            Protocol::Icmp | Protocol::Icmpv6 => first <= last && last <= 255,
            Protocol::Other(_) => first == 0 && last == 0,
        };
        let range = if first == last { first.to_string() } else { format!("{first}-{last}") };
        if possible { Ok(Self { protocol, first, last }) } else { Err(NotAService { text: format!("{protocol}/{range}") }) }
    }

    /// The protocol.
    pub fn protocol(self) -> Protocol {
        self.protocol
    }

    /// The first port (or ICMP type) of the range.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port (or ICMP type) of the range, included.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether the range holds this service.
    pub fn holds(self, service: Service) -> bool {
        self.protocol == service.protocol && (self.first..=self.last).contains(&service.port)
    }

    /// How many ports the range allows.
    pub fn width(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

impl From<Service> for Ports {
    fn from(service: Service) -> Self {
        Self { protocol: service.protocol, first: service.port, last: service.port }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, first, last } = self;
        match protocol {
            Protocol::Other(_) => protocol.fmt(f),
            _ if first == last => write!(f, "{protocol}/{first}"),
            _ => write!(f, "{protocol}/{first}-{last}"),
        }
    }
}

impl FromStr for Ports {
    type Err = NotAService;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAService { text: text.to_owned() };
        let number = |s: &str| if s.bytes().all(|b| b.is_ascii_digit()) { s.parse::<u16>().map_err(|_| wrong()) } else { Err(wrong()) };
        let Some((protocol, range)) = text.split_once('/') else {
            return match text.parse()? {
                protocol @ Protocol::Other(_) => Ok(Self { protocol, first: 0, last: 0 }),
                _ => Err(wrong()),
            };
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(range)?, number(range)?),
        };
        Self::new(protocol.parse()?, first, last).map_err(|_| wrong())
    }
}

text_serde!(Ports);
