//! Addresses of containers as the kernel has them, without the engine and without entering a namespace: a veth's host end names the
//! namespace of its peer (IFLA_LINK_NETNSID), and RTM_GETADDR answers for that (IFA_TARGET_NETNSID, linux/if_addr.h).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use lab::Netns;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::figures::Samples;

/// RTNLGRP_LINK as a bit (linux/rtnetlink.h).
const LINKS: u32 = 1;
/// Between two looks at a veth whose peer has no address yet.
const PAUSE: Duration = Duration::from_micros(500);

/// When the address behind each veth was there, and how long a question took.
type Found = (BTreeMap<u32, SystemTime>, Samples);

/// Reads until it is told to end.
pub(crate) struct Reader {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Found>,
}

impl Reader {
    pub(crate) fn start(netns: &Netns) -> Self {
        let ended: Arc<AtomicBool> = Arc::default();
        let its = ended.clone();
        let (events, asker) = netns.run(|| {
            let mut events = Socket::new(NETLINK_ROUTE).expect("a socket");
            events.bind(&SocketAddr::new(0, LINKS)).expect("a port");
            events.set_non_blocking(true).expect("an option");
            let mut asker = Socket::new(NETLINK_ROUTE).expect("a socket");
            asker.bind_auto().expect("a port");
            // Or the kernel answers for this namespace instead.
            asker.set_netlink_get_strict_chk(true).expect("Linux 4.20");
            (events, asker)
        });
        Self { ended, thread: thread::spawn(move || read(&events, &asker, &its)) }
    }

    pub(crate) fn end(self) -> Found {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().expect("it reads to the end")
    }
}

fn messages(datagram: &[u8]) -> Vec<NetlinkMessage<RouteNetlinkMessage>> {
    let mut out = Vec::new();
    let mut rest = datagram;
    while rest.len() >= 16 {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else { break };
        rest = &rest[(message.header.length as usize).next_multiple_of(4).clamp(16, rest.len())..];
        out.push(message);
    }
    out
}

fn read(events: &Socket, asker: &Socket, ended: &AtomicBool) -> Found {
    let (mut found, mut took) = (BTreeMap::new(), Samples::default());
    let mut open: BTreeMap<u32, (u32, i32)> = BTreeMap::new();
    while !ended.load(Ordering::Relaxed) {
        while let Ok((datagram, _)) = events.recv_from_full() {
            for message in messages(&datagram) {
                match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) if of_a_link(&link) => {
                        let peer = link.attributes.iter().find_map(|a| if let LinkAttribute::Link(peer) = a { Some(*peer) } else { None });
                        let netns =
                            link.attributes.iter().find_map(|a| if let LinkAttribute::LinkNetNsId(id) = a { Some(*id) } else { None });
                        if let Some(place) = peer.zip(netns).filter(|_| !found.contains_key(&link.header.index)) {
                            open.insert(link.header.index, place);
                        }
                    }
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) if of_a_link(&link) => {
                        _ = open.remove(&link.header.index)
                    }
                    _ => {}
                }
            }
        }
        open.retain(|veth, (peer, netns)| {
            let begun = Instant::now();
            let there = has_address(asker, *peer, *netns);
            took.push(begun.elapsed().as_secs_f64());
            if there {
                found.insert(*veth, SystemTime::now());
            }
            !there
        });
        thread::sleep(PAUSE);
    }
    (found, took)
}

/// A bridge tells of its ports by the same messages.
fn of_a_link(link: &LinkMessage) -> bool {
    link.header.interface_family == AddressFamily::Unspec
}

fn has_address(asker: &Socket, peer: u32, netns: i32) -> bool {
    let mut question = AddressMessage::default();
    question.header.family = AddressFamily::Inet;
    question.header.index = peer;
    question.attributes.push(AddressAttribute::TargetNetNsId(netns));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetAddress(question));
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    request.finalize();
    let mut buffer = vec![0; request.buffer_len()];
    request.serialize(&mut buffer);
    asker.send_to(&buffer, &SocketAddr::new(0, 0), 0).expect("the kernel hears");
    let mut there = false;
    loop {
        let (datagram, _) = asker.recv_from_full().expect("the kernel answers");
        for message in messages(&datagram) {
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(address)) => there |= address.header.index == peer,
                NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return there,
                _ => {}
            }
        }
    }
}
