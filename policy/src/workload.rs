//! Names of what runs, and the ends of a flow. Which container carries a name is the inventory's business.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

/// What runs, by a name that survives restarts: `shop/db` (a Compose service, a Kubernetes owner) or `web` (a container
/// started by hand, which has no namespace).
///
/// # Why one shared text
/// A graph of a million edges names its few thousand workloads some ten million times. A clone is a count, not a copy.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Workload {
    /// As it is printed.
    text: Arc<str>,
    /// Where in it the name begins; 0: it has no namespace.
    name_at: usize,
}

/// Text that is not a workload's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a workload: write NAME or NAMESPACE/NAME, for example shop/db")]
pub struct NotAWorkload {
    /// What was given.
    pub text: String,
}

impl Workload {
    /// A workload by namespace (may be empty) and name.
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        let (namespace, name) = (namespace.as_ref(), name.as_ref());
        if namespace.is_empty() {
            return Self { text: name.into(), name_at: 0 };
        }
        Self { text: format!("{namespace}/{name}").into(), name_at: namespace.len() + 1 }
    }

    /// Compose project or Kubernetes namespace; empty for a container started by hand.
    pub fn namespace(&self) -> &str {
        &self.text[..self.name_at.saturating_sub(1)]
    }

    /// Compose service, container name or Kubernetes owner; never empty.
    pub fn name(&self) -> &str {
        &self.text[self.name_at..]
    }

    /// As it is printed: `namespace/name`, or the name alone.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// By namespace, then by name.
impl Ord for Workload {
    fn cmp(&self, other: &Self) -> Ordering {
        if self.name_at == other.name_at && Arc::ptr_eq(&self.text, &other.text) {
            return Ordering::Equal;
        }
        self.namespace().cmp(other.namespace()).then_with(|| self.name().cmp(other.name()))
    }
}

impl PartialOrd for Workload {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workload({:?})", &*self.text)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Workload {
    type Err = NotAWorkload;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAWorkload { text: text.to_owned() };
        // Characters that the printed forms of edges and peers use as separators, or that break a terminal.
        let clean =
            |s: &str| !s.is_empty() && !s.contains(['/', ':', '(', ')']) && !s.contains(|c: char| c.is_whitespace() || c.is_control());
        // By itself it stands for a peer, and there it would be read as a network.
        let is_a_network = || text.parse::<ipnet::IpNet>().is_ok();
        match text.split_once('/') {
            Some(_) if is_a_network() => Err(wrong()),
            None if clean(text) => Ok(Self::new("", text)),
            Some((namespace, name)) if clean(namespace) && clean(name) => Ok(Self::new(namespace, name)),
            Some(_) | None => Err(wrong()),
        }
    }
}

text_serde!(Workload);

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// A workload, recognised by an address that was leased to it on the bridge the packet came in by.
    Workload(Workload),
    /// A one-off run of a Compose service (`docker compose run`): under the service's policy, never evidence for it.
    Run(Workload),
    /// The node itself: any of its addresses, and containers that share its network namespace.
    Host,
    /// An address outside of every network of the engine.
    Outside(IpAddr),
    /// A container that Bulkhead does not manage (macvlan, ipvlan, overlay, another engine), by name and address.
    Unmanaged {
        /// The name the engine has for it.
        name: String,
        /// The address seen.
        address: IpAddr,
    },
    /// An address on one of the engine's networks that belonged to nobody we know at that moment.
    Unknown(IpAddr),
}

impl Endpoint {
    /// The workload whose policy covers this end, if any: a one-off run is under its service's policy.
    pub fn workload(&self) -> Option<&Workload> {
        match self {
            Self::Workload(w) | Self::Run(w) => Some(w),
            Self::Host | Self::Outside(_) | Self::Unmanaged { .. } | Self::Unknown(_) => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(w) => w.fmt(f),
            Self::Run(w) => write!(f, "{w} (run)"),
            Self::Host => f.write_str("host:"),
            Self::Outside(a) => write!(f, "outside:{a}"),
            Self::Unmanaged { name, address } => write!(f, "unmanaged:{name}@{address}"),
            Self::Unknown(a) => write!(f, "unknown:{a}"),
        }
    }
}

/// Text that is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an endpoint: write a workload (shop/db), host:, outside:ADDRESS, unknown:ADDRESS or unmanaged:NAME@ADDRESS")]
pub struct NotAnEndpoint {
    /// What was given.
    pub text: String,
}

impl FromStr for Endpoint {
    type Err = NotAnEndpoint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAnEndpoint { text: text.to_owned() };
        let address = |s: &str| s.parse::<IpAddr>().map_err(|_| wrong());
        if text == "host:" {
            return Ok(Self::Host);
        }
        if let Some((kind, rest)) = text.split_once(':') {
            return match kind {
                "outside" => Ok(Self::Outside(address(rest)?)),
                "unknown" => Ok(Self::Unknown(address(rest)?)),
                "unmanaged" => {
                    let (name, at) = rest.rsplit_once('@').ok_or_else(wrong)?;
                    Ok(Self::Unmanaged { name: name.to_owned(), address: address(at)? })
                }
                _ => Err(wrong()),
            };
        }
        match text.strip_suffix(" (run)") {
            Some(service) => service.parse().map(Self::Run).map_err(|_| wrong()),
            None => text.parse().map(Self::Workload).map_err(|_| wrong()),
        }
    }
}

text_serde!(Endpoint);
