//! Which addresses outside may reach a port: the narrowest of a few exact hosts, private networks, anyone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::context::{FromOutside, Options};
use crate::private::private_network;
use crate::service::Ports;

/// How wide a port was opened to the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Width {
    ExactHosts,
    Private,
    Anyone,
}

/// The choice for one port and one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) ports: Ports,
    pub(crate) width: Width,
    /// Distinct clients seen.
    pub(crate) clients: usize,
    /// What is proposed, and which of the clients each network holds.
    pub(crate) networks: BTreeMap<IpNet, BTreeSet<IpAddr>>,
    /// True if it stays exact only because a person rejected a client that a wider rule would let in again.
    pub(crate) held_back: bool,
}

fn anyone(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

/// Chooses for the clients seen on one port, for each address family by itself. `rejected`: networks that a person said no to
/// on this port; what holds one of them is not proposed in its stead.
pub(crate) fn choose(ports: Ports, clients: &BTreeSet<IpAddr>, options: &Options, rejected: &BTreeSet<IpNet>) -> Vec<Choice> {
    let (v4, v6): (BTreeSet<IpAddr>, BTreeSet<IpAddr>) = clients.iter().partition(|address| address.is_ipv4());
    [v4, v6].into_iter().filter(|family| !family.is_empty()).map(|family| choose_family(ports, &family, options, rejected)).collect()
}

fn choose_family(ports: Ports, clients: &BTreeSet<IpAddr>, options: &Options, rejected: &BTreeSet<IpNet>) -> Choice {
    let few = u32::try_from(clients.len()).is_ok_and(|clients| clients <= options.exact_hosts);
    let by = |network: fn(IpAddr) -> IpNet| {
        let mut networks: BTreeMap<IpNet, BTreeSet<IpAddr>> = BTreeMap::new();
        for &client in clients {
            networks.entry(network(client)).or_default().insert(client);
        }
        networks
    };
    let exact = |held_back| Choice { ports, width: Width::ExactHosts, clients: clients.len(), networks: by(IpNet::from), held_back };
    if few || options.from_outside == FromOutside::ExactHosts {
        return exact(false);
    }
    let all_private = clients.iter().all(|&client| private_network(client).is_some());
    let (width, networks) = if all_private {
        (Width::Private, by(|client| private_network(client).unwrap_or(IpNet::from(client))))
    } else {
        (Width::Anyone, by(anyone))
    };
    // The wide network itself may have been rejected: that is shown as it is. A rejected part must not come back inside it.
    if networks.keys().any(|wide| rejected.iter().any(|no| wide.contains(no) && wide != no)) {
        return exact(true);
    }
    Choice { ports, width, clients: clients.len(), networks, held_back: false }
}
