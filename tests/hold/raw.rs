//! What a container with NET_RAW puts on its cable beside TCP and UDP of its own: other protocols, headers before the header, fragments,
//! errors about others' connections, others' addresses. On a real engine none of it reaches who doesn't allow the sender.

use std::net::IpAddr;
use std::time::Duration;

use lab::frame::{self, Frames};

use crate::stage::stage;

/// Next header numbers of what may come before the transport header (RFC 8200, 4.1).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// An IPv4 packet as a fragment: offset in units of eight bytes, whether more follow.
fn fragment_v4(from: IpAddr, to: IpAddr, protocol: u8, (offset, more): (u16, bool), payload: &[u8]) -> Vec<u8> {
    let mut packet = frame::ip(from, to, protocol, payload);
    packet[6..8].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
    packet[10..12].fill(0);
    let sum = frame::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Each attack with its name and the bytes that tell it apart; the marker is `raw-` and four digits.
fn attacks(own: [IpAddr; 2], web: [IpAddr; 2], db: [IpAddr; 2]) -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, packet: &dyn Fn(&[u8]) -> Vec<u8>| {
        let marker = format!("raw-{:04}", all.len()).into_bytes();
        all.push((name.to_owned(), packet(&marker), marker));
    };
    for v in 0..2 {
        let (from, other, to) = (own[v], web[v], db[v]);
        let dgram = |from: IpAddr, marker: &[u8]| frame::udp((from, 4000), (to, 53), marker);
        add("udp to a port that is allowed to web", &|m| frame::ip(from, to, frame::PROTO_UDP, &dgram(from, m)));
        add("the same from web's address", &|m| frame::ip(other, to, frame::PROTO_UDP, &dgram(other, m)));
        add("the same from db's own address", &|m| frame::ip(to, to, frame::PROTO_UDP, &dgram(to, m)));
        add("tcp that claims to be an answer", &|m| {
            frame::ip(from, to, frame::PROTO_TCP, &frame::tcp_carrying((from, 80), (to, 40_000), (1, 1), 0x18, m))
        });
        add("tcp with no flags", &|m| frame::ip(from, to, frame::PROTO_TCP, &frame::tcp_carrying((from, 80), (to, 80), (1, 0), 0, m)));
        // Fast open asking for a cookie (RFC 7413), and multipath as the first connection and as one more of another (RFC 8684).
        for (name, options) in [
            ("fast open", &[34, 2, 1, 1][..]),
            ("fast open with a cookie", &[34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1]),
            ("multipath", &[30, 4, 1, 1]),
            ("multipath that joins", &[30, 12, 0x10, 1, 0, 0, 0, 1, 0, 0, 0, 2]),
        ] {
            add(&format!("a SYN with data: {name}"), &|m| {
                frame::ip(from, to, frame::PROTO_TCP, &frame::tcp_with_options((from, 4000), (to, 80), (1, 0), 2, options, m))
            });
        }
        for protocol in [2_u8, 4, 33, 41, 46, 47, 50, 89, 94, 103, 112, 115, 136, 137, 253, 254] {
            // 41 within IPv6 and 4 within IPv4 carry a packet that would be allowed to web.
            let inner = |m: &[u8]| frame::ip(other, to, frame::PROTO_UDP, &dgram(other, m));
            add(&format!("IP protocol {protocol}"), &|m| frame::ip(from, to, protocol, &inner(m)));
        }
    }
    let (from, to) = (own[0], db[0]);
    let whole = |m: &[u8]| frame::udp((from, 4000), (to, 53), &[&[0; 24], m].concat());
    add("the first fragment alone", &|m| fragment_v4(from, to, frame::PROTO_UDP, (0, true), &whole(m)));
    add("the last fragment alone", &|m| fragment_v4(from, to, frame::PROTO_UDP, (3, false), m));
    add("a fragment that begins within the header", &|m| fragment_v4(from, to, frame::PROTO_UDP, (1, false), &[&[0; 8], m].concat()));
    for kind in [3_u8, 4, 5, 11, 12] {
        // About a connection of web's that lives, or could.
        let quoted = frame::ip(db[0], web[0], frame::PROTO_TCP, &frame::tcp((db[0], 80), (web[0], 40_000), 1, 0x10));
        add(&format!("ICMP error {kind} about a connection of web's"), &|m| {
            let mut message = [&[kind, 1, 0, 0, 0, 0, 0, 0][..], &quoted, m].concat();
            let sum = frame::checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            frame::ip(from, to, frame::PROTO_ICMP, &message)
        });
    }
    let (from, to) = (own[1], db[1]);
    for (name, header) in [("hop-by-hop", HOP_BY_HOP), ("routing", ROUTING), ("destination", DESTINATION)] {
        add(&format!("udp behind a {name} header"), &|m| {
            // Eight bytes: what follows, its length, padding (PadN); a routing header has no segments left.
            let options = if header == ROUTING { [0; 6] } else { [1, 4, 0, 0, 0, 0] };
            let before = [&[frame::PROTO_UDP, 0][..], &options].concat();
            frame::ip(from, to, header, &[&before, &frame::udp((from, 4000), (to, 53), m)[..]].concat())
        });
    }
    for (name, offset) in [("a first fragment", 1_u16), ("a later fragment", 3 << 3), ("one fragment that is all", 0)] {
        add(&format!("{name} (IPv6)"), &|m| {
            let head = [&[frame::PROTO_UDP, 0][..], &offset.to_be_bytes(), &[0, 0, 0, 9]].concat();
            frame::ip(from, to, FRAGMENT, &[&head, &frame::udp((from, 4000), (to, 53), m)[..]].concat())
        });
    }
    all
}

#[test]
fn nothing_that_a_container_can_put_on_its_cable_reaches_who_does_not_allow_it() {
    stage!(stage);
    let engine = &stage.engine;
    let addresses = |name: &str| [engine.address(name, "back"), engine.address_v6(name, "back")];
    let (own, web, db) = (addresses("hostile"), addresses("web"), addresses("db"));
    let [own_mac, web_mac, db_mac] = ["hostile", "web", "db"].map(|name| engine.mac(name, "back"));
    let (wire, honest) = (Frames::open(&stage.inside("hostile"), "eth0"), Frames::open(&stage.inside("web"), "eth0"));
    let far = Frames::open(&stage.inside("db"), "eth0");
    let ether = |packet: &[u8]| if packet[0] >> 4 == 4 { frame::ETH_IPV4 } else { frame::ETH_IPV6 };

    let attacks = attacks(own, web, db);
    for (_, packet, _) in &attacks {
        for source in [own_mac, web_mac] {
            wire.send(&frame::ethernet(db_mac, source, ether(packet), packet));
        }
    }
    // What comes behind all of it, and is allowed: the cable and the wait are no excuse.
    for v in 0..2 {
        let packet = frame::ip(web[v], db[v], frame::PROTO_UDP, &frame::udp((web[v], 4001), (db[v], 53), b"raw-last"));
        honest.send(&frame::ethernet(db_mac, web_mac, ether(&packet), &packet));
    }
    let mut arrived = Vec::new();
    let mut last = 0;
    let holds = |frame: &[u8], text: &[u8]| frame.windows(text.len()).any(|window| window == text);
    while last < 2 {
        let Some(frame) = far.receive(Duration::from_secs(20), |frame| holds(frame, b"raw-")) else {
            panic!("what is allowed does not arrive")
        };
        // db sends answers, too: those are not for itself.
        if frame[..6] != db_mac {
            continue;
        }
        last += u32::from(holds(&frame, b"raw-last"));
        arrived.extend(attacks.iter().filter(|(_, _, marker)| holds(&frame, marker)).map(|(name, ..)| name.clone()));
    }
    let late = far.drain();
    let late = late.iter().filter(|frame| frame[..6] == db_mac);
    arrived.extend(late.flat_map(|frame| attacks.iter().filter(|(_, _, marker)| holds(frame, marker))).map(|(name, ..)| name.clone()));
    println!("{} kinds of packets, each from two MAC addresses", attacks.len());
    assert_eq!(arrived, Vec::<String>::new());
}
