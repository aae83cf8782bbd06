//! Bridges, their ports, who is at the other end of each, and the node's own addresses: by rtnetlink, live. No namespace is entered.
//!
//! # Why
//! A host's veth names its peer by index (IFLA_LINK) and by the id that this namespace has for the peer's (IFLA_LINK_NETNSID);
//! RTM_GETLINK and RTM_GETADDR answer for that namespace when asked with IFLA_TARGET_NETNSID and IFA_TARGET_NETNSID
//! (linux/if_link.h, linux/if_addr.h; CAP_NET_ADMIN suffices). The engine makes the veth, moves one end, gives that its MAC address
//! and sets it up, all before the container's first program runs; only the last of these is told here, as the host's end having a
//! carrier. Then its MAC address and what addresses it has are read, once: one who may change it later must not take a neighbour's place by doing so. An
//! agent that comes later, or is slow, reads what it is by then: see [`namespace`](super::namespace).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt, TryStreamExt};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::facts::{Links, Mac, Peer, Port};

/// A dump repairs what a lost message left wrong; losses that the kernel tells of are repaired at once.
const REPAIR: Duration = Duration::from_secs(60);

/// What went wrong with rtnetlink.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No socket.
    #[error("cannot open a route netlink socket")]
    Open(#[source] io::Error),
    /// A question was not answered.
    #[error("the kernel did not list links and addresses")]
    Dump(#[source] rtnetlink::Error),
}

/// The kernel's side, and when the news of it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) links: Arc<Links>,
    pub(crate) at: Instant,
}

/// Starts to watch. The first value is complete. Ends when the last receiver is gone or the task is aborted.
///
/// # Errors
/// No netlink socket, or no answer to the first dump.
pub(crate) async fn watch() -> Result<(watch::Receiver<Seen>, AbortHandle), LinksError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups).map_err(LinksError::Open)?;
    let listener = tokio::spawn(connection);
    // Strict: or the kernel ignores IFA_TARGET_NETNSID and answers for this namespace instead.
    let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(LinksError::Open)?;
    let asker = tokio::spawn(connection);
    let mut table = Table::default();
    table.dump(&handle).await?;
    table.ask_for_peers(&handle).await;
    let (sender, receiver) = watch::channel(Seen { links: Arc::new(table.links()), at: Instant::now() });
    let task = tokio::spawn(async move {
        follow(table, handle, messages, sender).await;
        listener.abort();
        asker.abort();
    });
    Ok((receiver, task.abort_handle()))
}

type Messages = futures::channel::mpsc::UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, netlink_sys::SocketAddr)>;

async fn follow(mut table: Table, handle: Handle, mut messages: Messages, sender: watch::Sender<Seen>) {
    let mut repair = tokio::time::interval(REPAIR);
    repair.reset();
    loop {
        let mut stale = false;
        tokio::select! {
            message = messages.next() => {
                let Some((message, _)) = message else { return };
                stale |= !table.apply(message);
                // Whatever else is there already: a container's start is some twenty messages.
                while let Some(Some((message, _))) = messages.next().now_or_never() {
                    stale |= !table.apply(message);
                }
            }
            _ = repair.tick() => stale = true,
            () = sender.closed() => return,
        }
        let at = Instant::now();
        if stale && let Err(error) = table.dump(&handle).await {
            warn!(error = &error as &dyn std::error::Error, "links not read");
        }
        table.ask_for_peers(&handle).await;
        let links = table.links();
        sender.send_if_modified(|current| {
            let changed = *current.links != links;
            if changed {
                *current = Seen { links: Arc::new(links), at };
            }
            changed
        });
    }
}

/// The kernel's tables, by interface index.
#[derive(Default)]
struct Table {
    bridges: BTreeMap<u32, String>,
    ports: BTreeMap<u32, Row>,
    addresses: BTreeMap<u32, BTreeSet<IpAddr>>,
}

/// A port of a bridge.
struct Row {
    name: String,
    bridge: u32,
    /// The other end of a veth: its index, in the namespace with this id as we see it.
    place: Option<(u32, i32)>,
    /// The other end is set up.
    carrier: bool,
    peer: Option<Peer>,
}

impl Table {
    /// Takes one message in. False: something was lost, read it all again.
    fn apply(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> bool {
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => self.link(link),
            // The bridge's own messages (AF_BRIDGE) tell of a port that left it, not of a link that is gone; the same change comes
            // as a NewLink without a master too.
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) if link.header.interface_family == AddressFamily::Unspec => {
                let index = link.header.index;
                self.bridges.remove(&index);
                self.ports.remove(&index);
                self.addresses.remove(&index);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                if let Some(address) = address(&message) {
                    self.addresses.entry(message.header.index).or_default().insert(address);
                }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(message)) => {
                if let (Some(address), Some(held)) = (address(&message), self.addresses.get_mut(&message.header.index)) {
                    held.remove(&address);
                }
            }
            NetlinkPayload::Overrun(_) => return false,
            _ => {}
        }
        true
    }

    fn link(&mut self, link: LinkMessage) {
        if link.header.interface_family != AddressFamily::Unspec {
            return;
        }
        let index = link.header.index;
        let (mut name, mut bridge, mut peer_index, mut namespace, mut is_bridge, mut carrier) = (None, None, None, None, false, false);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(found) => name = Some(found),
                LinkAttribute::Controller(found) => bridge = Some(found),
                LinkAttribute::Link(found) => peer_index = Some(found),
                LinkAttribute::LinkNetNsId(found) => namespace = Some(found),
                LinkAttribute::Carrier(found) => carrier = found != 0,
                LinkAttribute::LinkInfo(infos) => is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
                _ => {}
            }
        }
        let Some(name) = name else { return };
        if is_bridge {
            self.bridges.insert(index, name.clone());
        }
        let Some(bridge) = bridge.filter(|&bridge| bridge != 0) else {
            self.ports.remove(&index);
            return;
        };
        let place = peer_index.zip(namespace);
        let known = self.ports.remove(&index).filter(|row| row.place == place).and_then(|row| row.peer);
        self.ports.insert(index, Row { name, bridge, place, carrier, peer: known });
    }

    async fn dump(&mut self, handle: &Handle) -> Result<(), LinksError> {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.map_err(LinksError::Dump)?;
        let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await.map_err(LinksError::Dump)?;
        let there: BTreeSet<u32> = links.iter().map(|link| link.header.index).collect();
        self.bridges.retain(|index, _| there.contains(index));
        self.ports.retain(|index, _| there.contains(index));
        self.addresses.clear();
        for link in links {
            self.link(link);
        }
        for message in addresses {
            if let Some(address) = address(&message) {
                self.addresses.entry(message.header.index).or_default().insert(address);
            }
        }
        Ok(())
    }

    async fn ask_for_peers(&mut self, handle: &Handle) {
        for row in self.ports.values_mut().filter(|row| row.carrier && row.peer.is_none()) {
            let Some((index, namespace)) = row.place else { continue };
            match peer(handle, index, namespace).await {
                Ok(peer) => row.peer = peer,
                // The namespace may be gone before the veth's own end is.
                Err(error) => debug!(port = row.name, namespace, error = &error as &dyn std::error::Error, "peer not read"),
            }
        }
    }

    fn links(&self) -> Links {
        let port = |row: &Row| {
            let bridge = self.bridges.get(&row.bridge)?.clone();
            Some((row.name.clone(), Port { bridge, peer: row.peer.clone() }))
        };
        let addresses = |index: &u32| self.addresses.get(index).cloned().unwrap_or_default();
        Links {
            bridges: self.bridges.iter().map(|(index, name)| (name.clone(), addresses(index))).collect(),
            ports: self.ports.values().filter_map(port).collect(),
            // A bridge's port has a link-local address of its own that nothing is received at: its frames go to the bridge.
            host: self.addresses.iter().filter(|(index, _)| !self.ports.contains_key(index)).flat_map(|(_, held)| held).copied().collect(),
        }
    }
}

async fn peer(handle: &Handle, index: u32, namespace: i32) -> Result<Option<Peer>, rtnetlink::Error> {
    let mut ask = handle.link().get().match_index(index);
    ask.message_mut().attributes.push(LinkAttribute::IfNetnsId(namespace));
    let Some(link) = ask.execute().try_next().await? else { return Ok(None) };
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Mac::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    let Some(mac) = mac else { return Ok(None) };
    let mut ask = handle.address().get();
    let message = ask.message_mut();
    message.header.index = index;
    message.attributes.push(AddressAttribute::TargetNetNsId(namespace));
    let (mut link_local, mut addresses) = (BTreeSet::<Ipv6Addr>::new(), BTreeSet::new());
    let mut answers = ask.execute();
    while let Some(message) = answers.try_next().await? {
        match address(&message).filter(|_| message.header.index == index) {
            Some(IpAddr::V6(found)) if found.is_unicast_link_local() => drop(link_local.insert(found)),
            Some(found) => drop(addresses.insert(found)),
            None => {}
        }
    }
    Ok(Some(Peer { namespace, mac, link_local, addresses }))
}

/// The address of a message, unless it is loopback's. On a point-to-point link IFA_ADDRESS is the other end's, IFA_LOCAL ours.
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|a| if let AddressAttribute::Local(found) = a { Some(*found) } else { None });
    let plain = || message.attributes.iter().find_map(|a| if let AddressAttribute::Address(found) = a { Some(*found) } else { None });
    local.or_else(plain).filter(|address| !address.is_loopback())
}
