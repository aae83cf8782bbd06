//! What a third attacker tried: headers that the filter and connection tracking read differently, words where no side is asked, the part
//! of one who is outside.

use std::net::IpAddr;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Internet, Member, Netns, needs_root};
use policy::Mode;

use crate::anew::link_local;
use crate::around::fragments;
use crate::errors::quoting;
use crate::guard::icmpv6;
use crate::hostile::{kind, udp};
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);
const AUTHENTICATION: u8 = 51;

#[test]
fn who_may_send_authenticated_packets_begins_no_other_connection_behind_one() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "ip51").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        let within = frame::udp((from, 5000), (to, 99), b"lab-authenticated");
        // 24 bytes: four words more than two of them (RFC 4302, 2.2).
        let header = [&[frame::PROTO_UDP, 4, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1][..], &[0; 12], &within].concat();
        wire.send(&frame::ethernet(b.mac, a.mac, kind(from), &frame::ip(from, to, AUTHENTICATION, &header)));
        assert!(far.sees(PATIENTLY, b"lab-authenticated"), "{to}");
        wire.send(&udp(a.mac, b.mac, (from, 5000), (to, 99), b"lab-behind-one"));
        assert!(!far.sees(BRIEFLY, b"lab-behind-one"), "{to}");
    }
}

#[test]
fn nobody_else_sends_a_piece_of_a_packet_from_a_link_local_address() {
    needs_root!();
    node!(host, bridge: a, b; elsewhere: x, y);
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&elsewhere, &[("x", &x), ("y", &y)])]);
    inventory.containers.get_mut("a").unwrap().legs[0].addresses.insert(link_local(a.mac));
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let thief = Frames::open(&x.netns, "eth0");

    // Which bridge a piece came by counts where the receiver's address is link-local, and not where the sender's is.
    let (from, to) = (link_local(a.mac), b.v6.into());
    // The same sum, or connection tracking would not take it: two words change places.
    let (marker, forged) = ("lab-a-piece-of-01", "l-aab-piece-of-01");
    let [first, last] = fragments(from, to, 53, marker.as_bytes(), 8, 1);
    let [_, other] = fragments(from, to, 53, forged.as_bytes(), 8, 1);
    thief.send(&frame::ethernet(y.mac, x.mac, frame::ETH_IPV6, &other));
    // What it sent is through before the first piece leaves.
    std::thread::sleep(BRIEFLY);
    for part in [first, last] {
        wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV6, &part));
    }
    let seen = far.receive(PATIENTLY, |frame| [marker, forged].iter().any(|text| frame.ends_with(text.as_bytes()))).unwrap();
    assert!(seen.ends_with(marker.as_bytes()), "{}", String::from_utf8_lossy(&seen[seen.len() - marker.len()..]));
}

#[test]
fn who_asks_for_a_neighbour_says_no_more_than_it_has_to() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).quarantine("a").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let nobody: std::net::Ipv6Addr = "::".parse().unwrap();
    let asks =
        |kind: u8, of: std::net::Ipv6Addr, words: &[u8]| [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &of.octets(), &[253, 1], words].concat();
    let group = "ff02::1".parse().unwrap();
    for (name, kind, from, to, of) in [
        ("a solicitation", 135, a.v6, b.v6, b.v6),
        ("to a group", 135, a.v6, group, b.v6),
        ("an advertisement", 136, a.v6, b.v6, a.v6),
        ("duplicate address detection", 135, nobody, group, a.v6),
    ] {
        for (words, passes) in [(b"lab-40".to_vec(), true), ([&[0; 38][..], b"lab-72"].concat(), false)] {
            let packet = icmpv6(from, to, &asks(kind, of, &words));
            wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV6, &packet));
            assert_eq!(far.sees(BRIEFLY, &packet[8..]), passes, "{name}, {} bytes", packet.len() - 40);
        }
    }
    for (words, passes) in [(b"lab-words-behind-a".to_vec(), true), ([&[0; 18][..], b"lab-words-behind-b"].concat(), false)] {
        let packet = [frame::arp_reply(a.mac, a.v4, b.mac, b.v4), words].concat();
        wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_ARP, &packet));
        assert_eq!(far.sees(BRIEFLY, &packet), passes, "ARP of {} bytes", packet.len());
    }
}

/// Fragments in a fragment that is whole: what is left when the outer header is taken off.
#[test]
fn fragments_within_a_fragment_pass_nothing() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").allow("a", "b", "icmpv6/128");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let (from, to): (IpAddr, IpAddr) = (a.v6.into(), b.v6.into());
    let piece = |next: u8, offset: u16, more: bool, id: u8, body: &[u8]| {
        [&[next, 0][..], &(offset | u16::from(more)).to_be_bytes(), &[0, 0, 0x66, id], body].concat()
    };
    let advertisement = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &bridge.gateway_v6().octets(), &[2, 1], &a.mac, b"lab-tail"].concat();
    for (id, next, whole) in [
        (1, frame::PROTO_UDP, frame::udp((from, 5000), (to, 99), b"lab-denied-lab-tail")),
        (2, frame::PROTO_UDP, frame::udp((from, 5000), (to, 53), b"lab-allowed-lab-tail")),
        (3, frame::PROTO_ICMPV6, advertisement),
        (4, 59, frame::udp((from, 5000), (to, 53), b"lab-none-of-it-lab-tail")),
    ] {
        for part in [piece(next, 0, true, id, &whole[..16]), piece(next, 16, false, id, &whole[16..])] {
            let outer = piece(44, 0, false, id + 16, &part);
            wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV6, &frame::ip(from, to, 44, &outer)));
        }
        assert!(!far.sees(BRIEFLY, b"lab-tail"), "{id}");
    }
}

/// The way from outside to the members, and who is where.
fn routed(host: &Netns, internet: &Internet, members: &[&Member]) {
    internet.netns.ip("route add 10.1.0.0/24 via 203.0.113.2");
    internet.netns.ip("-6 route add 2001:db8:1::/64 via 2001:db8:ffff::2");
    for member in members {
        for at in member.addresses() {
            host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", lab::bridge::mac_text(member.mac)));
        }
    }
}

const OUTSIDE: [&str; 2] = ["203.0.113.1", "2001:db8:ffff::1"];

fn may_ask_outside(policy: Policy) -> Policy {
    ["203.0.113.0/24", "2001:db8:ffff::/64"].iter().fold(policy, |policy, net| policy.egress("a", &format!("outside:{net}"), "udp/53"))
}

#[test]
fn a_router_outside_has_nothing_to_say_of_a_connection_that_never_was_there() {
    needs_root!();
    node!(host, bridge: a, b);
    let internet = Internet::behind(&host);
    settled(&host);
    routed(&host, &internet, &[&a, &b]);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &may_ask_outside(policy).bind(&inventory));
    let (near, far, down) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"), Frames::open(&internet.netns, "down0"));
    let (gateway, up, its) = (mac_of(&host, "br0"), mac_of(&host, "up0"), mac_of(&internet.netns, "down0"));
    for (n, from) in a.addresses().into_iter().enumerate() {
        let outside: IpAddr = OUTSIDE[n].parse().unwrap();
        for (to, mac, there, passes) in [(b.addresses()[n], b.mac, &far, false), (outside, gateway, &down, true)] {
            let asked = udp(a.mac, mac, (from, 5000), (to, 53), b"lab-question");
            near.send(&asked);
            assert!(there.sees(PATIENTLY, b"lab-question"), "{to}");
            near.drain();
            // Fragmentation needed, packet too big; unreachable.
            for (kind_of, code) in [[(3, 4), (3, 1)], [(2, 0), (1, 1)]][n] {
                let error = quoting(outside, from, kind_of, code, &asked[14..]);
                down.send(&frame::ethernet(up, its, kind(from), &error));
                assert_eq!(near.sees(BRIEFLY, b"lab-question"), passes, "of {from} -> {to}, type {kind_of}");
            }
        }
    }
}

#[test]
fn who_is_where_nobody_is_guarded_takes_the_part_of_nobody_outside() {
    needs_root!();
    node!(host, bridge: a);
    let mut audited = lab::Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let mut open = lab::Bridge::new(&host, "br2", "10.3.0.0/24", "2001:db8:3::/64");
    let (x, y) = (audited.add("x"), open.add("y"));
    let internet = Internet::behind(&host);
    settled(&host);
    // Loose, as distributions have it: an address may come by any interface.
    for interface in ["all", "br0", "br1", "br2", "up0"] {
        host.set_sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "2");
    }
    routed(&host, &internet, &[&a]);
    let inventory = inventory(&[(&bridge, &[("a", &a)]), (&audited, &[("x", &x)]), (&open, &[("y", &y)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a"]).mode(Mode::Audit, &["x"]).mode(Mode::Learn, &["y"]);
    apply(&mut enforcer, &may_ask_outside(policy).ingress("a", "y", "udp/53").bind(&inventory));
    let (near, down) = (Frames::open(&a.netns, "eth0"), Frames::open(&internet.netns, "down0"));
    let wires = [&x, &y].map(|member| Frames::open(&member.netns, "eth0"));
    for (n, at) in a.addresses().into_iter().enumerate() {
        let outside: IpAddr = OUTSIDE[n].parse().unwrap();
        near.send(&udp(a.mac, mac_of(&host, "br0"), (at, 5000), (outside, 53), b"lab-question"));
        assert!(down.sees(PATIENTLY, b"lab-question"), "{outside}");
        for (wire, member, by) in [(&wires[0], &x, "br1"), (&wires[1], &y, "br2")] {
            wire.send(&udp(member.mac, mac_of(&host, by), (outside, 53), (at, 5000), b"lab-as-one-outside"));
            assert!(!near.sees(BRIEFLY, b"lab-as-one-outside"), "{outside} by {by}");
        }
        down.send(&udp(mac_of(&internet.netns, "down0"), mac_of(&host, "up0"), (outside, 53), (at, 5000), b"lab-the-answer"));
        assert!(near.sees(PATIENTLY, b"lab-the-answer"), "{outside}");
        // Who may, as itself.
        wires[1].send(&udp(y.mac, mac_of(&host, "br2"), (y.addresses()[n], 5000), (at, 53), b"lab-as-itself"));
        assert!(near.sees(PATIENTLY, b"lab-as-itself"), "{at}");
    }
}
