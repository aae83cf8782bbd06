//! Which port a bridge sends a bound MAC address to: entries of the bridge's forwarding table that no frame can move.
//!
//! # Why
//! A bridge learns where a MAC address is from any frame, also from a port that is not bound yet, and from frames to the
//! addresses of bridge protocols, which meet no hook before that (br_handle_frame). Who sends with a neighbour's address would
//! draw the neighbour's packets to its own port. They are dropped there, so nobody reads them, and the neighbour doesn't either.
//! A static entry that is sticky (since Linux 4.20) stays; it goes with its port, and by `remove`.
//!
//! A port that has its entry needs nothing learned: who sends from a million addresses to those of bridge protocols would fill the
//! kernel's memory, some 100 bytes each for five minutes. Nor is a container a router of multicast for its neighbours, whatever it says
//! (br_multicast_mark_router). So the port learns nothing and is no router's, and does and may be again when its entry goes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::link::{
    BridgeMulticastRouterType, InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc;
use policy::Ruleset;

use super::links::{LinkReader, Links};

/// A MAC address at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Station {
    /// The port's interface index.
    pub(super) port: u32,
    pub(super) mac: [u8; 6],
}

/// The stations of a ruleset whose ports are there. Two ports of one bridge with one address have none: whoever is told apart by
/// nothing is not kept apart by us.
pub(super) fn wanted(ruleset: &Ruleset, links: &Links) -> BTreeSet<Station> {
    let mut owners: BTreeMap<_, usize> = BTreeMap::new();
    for pin in ruleset.pins.values() {
        *owners.entry((&pin.bridge, pin.mac)).or_default() += 1;
    }
    let alone = ruleset.pins.iter().filter(|(_, pin)| owners[&(&pin.bridge, pin.mac)] == 1);
    alone.filter_map(|(name, pin)| Some(Station { port: links.index(name)?, mac: pin.mac })).collect()
}

/// What the bridges of the namespace hold for good.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Static and sticky, as ours are.
    pub(super) sticky: BTreeSet<Station>,
    /// Addresses of the bridges and ports themselves.
    own: BTreeSet<[u8; 6]>,
}

/// Reads the forwarding tables of all bridges.
pub(super) fn read(links: &LinkReader) -> io::Result<Held> {
    let mut question = NeighbourMessage::default();
    question.header.family = AddressFamily::Bridge;
    let mut held = Held::default();
    for answer in links.ask(RouteNetlinkMessage::GetNeighbour(question), NLM_F_DUMP)? {
        let RouteNetlinkMessage::NewNeighbour(entry) = answer else { continue };
        let mac = entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
            _ => None,
        });
        let Some(mac) = mac else { continue };
        if entry.header.state == NeighbourState::Permanent && !entry.header.flags.contains(NeighbourFlags::Own) {
            held.own.insert(mac);
        }
        if entry.header.state == NeighbourState::Noarp && entry.header.flags.contains(NeighbourFlags::Sticky) {
            held.sticky.insert(Station { port: entry.header.ifindex, mac });
        }
    }
    Ok(held)
}

fn entry(station: Station) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = station.port;
    entry.header.state = NeighbourState::Noarp;
    entry.header.flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(station.mac.to_vec()));
    entry
}

/// Ties an address to its port, wherever the bridge thought it was. `held` is what the bridges hold now.
pub(super) fn hold(links: &LinkReader, held: &Held, station: Station) -> io::Result<()> {
    if held.own.contains(&station.mac) {
        // The node would no longer be reached by it.
        return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
    }
    learns(links, station.port, false)?;
    let tied = links.ask(RouteNetlinkMessage::NewNeighbour(entry(station)), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE);
    if tied.is_err() {
        learns(links, station.port, true)?;
    }
    tied.map(|_| ())
}

/// Whether a port learns who is behind it, and may be one of a multicast router: as a new port is, or neither. What it learned before is
/// forgotten: whoever took others' addresses before its port was tied would have them for five minutes more.
pub(super) fn learns(links: &LinkReader, port: u32, does: bool) -> io::Result<()> {
    let router = if does { BridgeMulticastRouterType::TempQuery } else { BridgeMulticastRouterType::Disabled };
    let data = vec![InfoBridgePort::Learning(does), InfoBridgePort::MulticastRouter(router), InfoBridgePort::Flush];
    let mut link = LinkMessage::default();
    link.header.index = port;
    let info = vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(InfoPortData::BridgePort(data))];
    link.attributes.push(LinkAttribute::LinkInfo(info));
    gone(links.ask(RouteNetlinkMessage::NewLink(link), NLM_F_ACK))
}

/// Ports that learn, or may be a multicast router's, by their index: all others are as [`hold`] makes them, and nobody else that we know of.
pub(super) fn learning(links: &LinkReader) -> io::Result<BTreeSet<u32>> {
    let learns = |of_port: &InfoBridgePort| match of_port {
        InfoBridgePort::Learning(does) => *does,
        InfoBridgePort::MulticastRouter(router) => *router != BridgeMulticastRouterType::Disabled,
        _ => false,
    };
    let info = |info: &LinkInfo| matches!(info, LinkInfo::PortData(InfoPortData::BridgePort(data)) if data.iter().any(learns));
    let port = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.iter().any(info));
    Ok(links.all()?.filter(|link| link.attributes.iter().any(port)).map(|link| link.header.index).collect())
}

/// EINVAL and EOPNOTSUPP: the interface is no port any more, and what was of the port went when it ceased to be one.
fn gone(answer: io::Result<Vec<RouteNetlinkMessage>>) -> io::Result<()> {
    match answer {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL | libc::EOPNOTSUPP)) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Unties it: the bridge learns again. What is gone already is fine.
pub(super) fn release(links: &LinkReader, station: Station) -> io::Result<()> {
    learns(links, station.port, true)?;
    gone(links.ask(RouteNetlinkMessage::DelNeighbour(entry(station)), NLM_F_ACK))
}
