//! How many MAC addresses a guarded bridge learns.
//!
//! # Why
//! A port that is bound learns nothing ([`stations`](super::stations)), and what is bound needs nothing learned. A port that nobody bound
//! yet does learn, and frames to the addresses of bridge protocols meet no hook before that (br_handle_frame): it would fill the kernel's
//! memory with addresses for as long as it is not bound. Since Linux 6.7 a bridge may be told how many it learns; an older one learns them
//! all.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::links::LinkReader;

/// Eight for each port that a bridge may have (BR_MAX_PORTS), and a number that nobody else chooses: who has it has it of us, and gets
/// back what a bridge is made with.
const AT_MOST: u32 = 8_191;
const WITHOUT_BOUND: u32 = 0;

/// Bounds the bridges with these indices and no others. One that somebody gave a bound of his own keeps it.
pub(super) fn bound(links: &LinkReader, guarded: &BTreeSet<u32>) -> io::Result<()> {
    for answer in links.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)? {
        let RouteNetlinkMessage::NewLink(link) = answer else { continue };
        let index = link.header.index;
        match (at_most(&link), guarded.contains(&index)) {
            (Some(WITHOUT_BOUND), true) => set(links, index, AT_MOST)?,
            (Some(AT_MOST), false) => set(links, index, WITHOUT_BOUND)?,
            (Some(_) | None, _) => {}
        }
    }
    Ok(())
}

/// What a bridge learns at most; `None`: it is none, or the kernel knows no bound.
fn at_most(link: &LinkMessage) -> Option<u32> {
    let info = link.attributes.iter().find_map(|a| if let LinkAttribute::LinkInfo(info) = a { Some(info) } else { None })?;
    let data = info.iter().find_map(|i| if let LinkInfo::Data(InfoData::Bridge(data)) = i { Some(data) } else { None })?;
    data.iter().find_map(|attribute| if let InfoBridge::FdbMaxLearned(most) = attribute { Some(*most) } else { None })
}

fn set(links: &LinkReader, bridge: u32, most: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = bridge;
    let data = InfoData::Bridge(vec![InfoBridge::FdbMaxLearned(most)]);
    link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]));
    match links.ask(RouteNetlinkMessage::NewLink(link), NLM_F_ACK) {
        // Gone meanwhile.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
        other => other.map(|_| ()),
    }
}
