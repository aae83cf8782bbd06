//! Interfaces of the network namespace: names by index, and the two switches of each bridge (`nf_call_iptables`,
//! `nf_call_ip6tables`), read, watched and set by rtnetlink: /sys shows another namespace than the one that was entered.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use serde::{Deserialize, Serialize};

/// `RTNLGRP_LINK`.
pub(super) const GROUP: u32 = 1;
/// The kernel's messages about one link have some 2 KiB, a dump 32 KiB each.
const RECEIVE: usize = 64 * 1024;
/// Removed interfaces whose names are still known: a connection may outlive its bridge.
const REMEMBERED: usize = 1024;

/// Whether a bridge's packets are led through the inet hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Calls {
    /// `nf_call_iptables`.
    pub v4: bool,
    /// `nf_call_ip6tables`.
    pub v6: bool,
}

impl Calls {
    /// Both families.
    pub const ON: Self = Self { v4: true, v6: true };
}

/// The table of interfaces, as far as it was read.
#[derive(Debug)]
pub(super) struct Links {
    events: Socket,
    names: BTreeMap<u32, String>,
    bridges: BTreeMap<String, (u32, Calls)>,
    removed: VecDeque<u32>,
    /// Unreadable messages since the last question.
    skipped: u64,
}

impl Links {
    /// Begins to watch, and reads what is there.
    pub(super) fn open() -> io::Result<Self> {
        let mut events = Socket::new(NETLINK_ROUTE)?;
        events.bind_auto()?;
        events.add_membership(GROUP)?;
        events.set_non_blocking(true)?;
        let mut links = Self { events, names: BTreeMap::new(), bridges: BTreeMap::new(), removed: VecDeque::new(), skipped: 0 };
        links.dump()?;
        Ok(links)
    }

    /// Names of all interfaces by index, those lately removed included.
    pub(super) fn names(&self) -> &BTreeMap<u32, String> {
        &self.names
    }

    /// The index and the switches of a bridge; `None`: there is no such bridge.
    pub(super) fn bridge(&self, name: &str) -> Option<(u32, Calls)> {
        self.bridges.get(name).copied()
    }

    /// Messages that could not be read.
    pub(super) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes in what has happened since; true if there was anything. Lost messages are made good by a fresh dump.
    pub(super) fn catch_up(&mut self) -> io::Result<bool> {
        let mut any = false;
        let mut buffer = Vec::with_capacity(RECEIVE);
        loop {
            buffer.clear();
            match self.events.recv(&mut buffer, 0) {
                Ok(_) => {
                    any = true;
                    self.read(&buffer);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    any = true;
                    self.dump()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn dump(&mut self) -> io::Result<()> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(LinkMessage::default()));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        for message in ask(request)? {
            self.take(&message);
        }
        Ok(())
    }

    fn read(&mut self, datagram: &[u8]) {
        for message in parts(datagram) {
            match message.as_ref().map(|message| &message.payload) {
                Some(NetlinkPayload::InnerMessage(inner)) => self.take(inner),
                Some(_) => {}
                None => self.skipped += 1,
            }
        }
    }

    fn take(&mut self, message: &RouteNetlinkMessage) {
        let (link, there) = match message {
            RouteNetlinkMessage::NewLink(link) => (link, true),
            RouteNetlinkMessage::DelLink(link) => (link, false),
            _ => return,
        };
        // A bridge port's own message (family bridge) says nothing of the interface.
        if link.header.interface_family != netlink_packet_route::AddressFamily::Unspec {
            return;
        }
        let index = link.header.index;
        let name = link.attributes.iter().find_map(|a| if let LinkAttribute::IfName(name) = a { Some(name.as_str()) } else { None });
        let Some(name) = name else { return };
        self.bridges.retain(|_, (known, _)| *known != index);
        if !there {
            self.removed.push_back(index);
            while self.removed.len() > REMEMBERED {
                if let Some(index) = self.removed.pop_front() {
                    self.names.remove(&index);
                }
            }
            return;
        }
        // A namespace may get an interface back that had left.
        self.removed.retain(|removed| *removed != index);
        self.names.insert(index, name.to_owned());
        if let Some(calls) = bridge_calls(link) {
            self.bridges.insert(name.to_owned(), (index, calls));
        }
    }

    /// Sets the switches of a bridge; nothing if it is gone.
    pub(super) fn set_calls(&mut self, bridge: &str, calls: Calls) -> io::Result<()> {
        let Some((index, _)) = self.bridges.get(bridge) else { return Ok(()) };
        let mut link = LinkMessage::default();
        link.header.index = *index;
        let data = vec![InfoBridge::NfCallIpTables(calls.v4), InfoBridge::NfCallIp6Tables(calls.v6)];
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(data))]));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewLink(link));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        ask(request)?;
        if let Some((_, known)) = self.bridges.get_mut(bridge) {
            *known = calls;
        }
        Ok(())
    }
}

impl AsRawFd for Links {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.events.as_raw_fd()
    }
}

fn bridge_calls(link: &LinkMessage) -> Option<Calls> {
    let info = link.attributes.iter().find_map(|a| if let LinkAttribute::LinkInfo(info) = a { Some(info) } else { None })?;
    let data = info.iter().find_map(|i| if let LinkInfo::Data(InfoData::Bridge(data)) = i { Some(data) } else { None })?;
    let mut calls = Calls { v4: false, v6: false };
    for attribute in data {
        match attribute {
            InfoBridge::NfCallIpTables(on) => calls.v4 = *on,
            InfoBridge::NfCallIp6Tables(on) => calls.v6 = *on,
            _ => {}
        }
    }
    Some(calls)
}

/// The messages in one datagram; `None`: one that could not be read.
fn parts(datagram: &[u8]) -> Vec<Option<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut found = Vec::new();
    let mut rest = datagram;
    while let Some(length) = rest.get(..4).and_then(|l| l.try_into().ok()).map(u32::from_ne_bytes) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(one) = rest.get(..length).filter(|one| one.len() >= 16) else {
            found.push(None);
            break;
        };
        found.push(NetlinkMessage::<RouteNetlinkMessage>::deserialize(one).ok());
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    found
}

/// One request on a socket of its own, and its whole answer.
fn ask(mut request: NetlinkMessage<RouteNetlinkMessage>) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    request.header.sequence_number = 1;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answer = Vec::new();
    let mut buffer = Vec::with_capacity(RECEIVE);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, 0) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        for message in parts(&buffer).into_iter().flatten() {
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => answer.push(inner),
                NetlinkPayload::Done(_) => return Ok(answer),
                NetlinkPayload::Error(error) => match error.code {
                    None => return Ok(answer),
                    Some(code) => return Err(io::Error::from_raw_os_error(code.get().saturating_neg())),
                },
                _ => {}
            }
        }
    }
}
