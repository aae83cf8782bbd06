//! Into a connection that was allowed and lives, by another road than its own: connection tracking knows addresses and ports, and no
//! roads.

use std::net::IpAddr;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Internet, Member, Netns, Server, needs_root};
use policy::Mode;

use crate::hostile::{kind, udp};
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);
/// The client's port.
const CLIENT: u16 = 5000;

/// A question from `a` to `b` at udp/53 and the answer: a connection that lives.
fn talk(near: &Frames, far: &Frames, macs: [[u8; 6]; 2], from: IpAddr, to: IpAddr) {
    near.send(&udp(macs[0], macs[1], (from, CLIENT), (to, 53), b"lab-a-question"));
    assert!(far.sees(PATIENTLY, b"lab-a-question"), "{from} -> {to}");
    far.send(&udp(macs[1], macs[0], (to, 53), (from, CLIENT), b"lab-an-answer"));
    assert!(near.sees(PATIENTLY, b"lab-an-answer"), "{to} -> {from}");
}

fn known(host: &Netns, members: &[&Member], bridge: &str) {
    for member in members {
        for at in member.addresses() {
            host.ip(&format!("neigh replace {at} lladdr {} dev {bridge} nud permanent", lab::bridge::mac_text(member.mac)));
        }
    }
}

#[test]
fn nobody_joins_a_living_connection_by_another_road() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut audited = lab::Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let mut foreign = lab::Bridge::new(&host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
    let (x, y) = (audited.add("x"), foreign.add("y"));
    let internet = Internet::behind(&host);
    settled(&host);
    known(&host, &[&a, &b], "br0");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&audited, &[("x", &x)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).mode(Mode::Audit, &["x"]);
    apply(&mut enforcer, &policy.allow("a", "b", "udp/53").ingress("b", "outside:203.0.113.0/24", "udp/53").bind(&inventory));
    let (near, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let roads = [
        ("the uplink", Frames::open(&internet.netns, "down0"), mac_of(&internet.netns, "down0"), mac_of(&host, "up0")),
        ("an audited bridge", Frames::open(&x.netns, "eth0"), x.mac, mac_of(&host, "br1")),
        ("somebody's bridge", Frames::open(&y.netns, "eth0"), y.mac, mac_of(&host, "br9")),
    ];
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        talk(&near, &far, [a.mac, b.mac], from, to);
        for (name, wire, mac, gateway) in &roads {
            wire.send(&udp(*mac, *gateway, (from, CLIENT), (to, 53), b"lab-by-another-road"));
            assert!(!far.sees(BRIEFLY, b"lab-by-another-road"), "{from} -> {to} by {name}");
            wire.send(&udp(*mac, *gateway, (to, 53), (from, CLIENT), b"lab-back-by-another-road"));
            assert!(!near.sees(BRIEFLY, b"lab-back-by-another-road"), "{to} -> {from} by {name}");
        }
        talk(&near, &far, [a.mac, b.mac], from, to);
    }
    // Who is outside comes in as before, and gets its answers.
    let (_, wire, mac, gateway) = &roads[0];
    let outside: IpAddr = "203.0.113.1".parse().unwrap();
    wire.send(&udp(*mac, *gateway, (outside, CLIENT), (b.v4.into(), 53), b"lab-from-outside"));
    assert!(far.sees(PATIENTLY, b"lab-from-outside"));
}

#[test]
fn what_comes_out_of_a_tunnel_on_the_node_joins_no_living_connection() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    settled(&host);
    known(&host, &[&a, &b], "br0");
    let gateway = mac_of(&host, "br0");
    let (local, remote) = (bridge.gateway_v4(), thief.v4);
    // Which of them this kernel has.
    let made = |kind: &str| {
        let words = format!("link add tun-{kind} type {kind} local {local} remote {remote}");
        let out = host.output(std::process::Command::new("ip").args(words.split(' ')));
        out.status.success().then(|| host.ip(&format!("link set tun-{kind} up"))).is_some()
    };
    let mut kinds: Vec<&str> = ["gre", "ipip", "sit"].into_iter().filter(|kind| made(kind)).collect();
    host.ip(&format!("link add tun-vxlan type vxlan id 5 dstport 4789 local {local} remote {remote}"));
    host.ip("link set tun-vxlan up");
    kinds.push("vxlan");
    println!("tunnels: {kinds:?}");
    for interface in kinds.iter().map(|kind| format!("tun-{kind}")) {
        host.set_sysctl("net.ipv4.conf.all.rp_filter", "0");
        host.set_sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0");
    }
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).allow("a", "b", "udp/53");
    let policy = ["ip47", "ip4", "ip41", "udp/4789"].into_iter().fold(policy, |policy, what| policy.egress("thief", "host:", what));
    apply(&mut enforcer, &policy.bind(&inventory));
    let wire = Frames::open(&thief.netns, "eth0");
    let (near, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let end = mac_of(&host, "tun-vxlan");
    let through = |inner: &[u8], v6: bool| {
        let framed = frame::ethernet(end, [2, 0, 0, 0, 0, 0x77], kind_of(v6), inner);
        let vxlan = [&[8, 0, 0, 0, 0, 0, 5, 0][..], &framed].concat();
        let mut through = vec![(frame::PROTO_UDP, frame::udp((thief.v4.into(), CLIENT), (local.into(), 4789), &vxlan))];
        if kinds.contains(&"gre") {
            through.push((47, [&[0, 0][..], &kind_of(v6).to_be_bytes(), inner].concat()));
        }
        match v6 {
            false if kinds.contains(&"ipip") => through.push((4, inner.to_vec())),
            true if kinds.contains(&"sit") => through.push((41, inner.to_vec())),
            _ => {}
        }
        for (protocol, payload) in &through {
            let outer = frame::ip(thief.v4.into(), local.into(), *protocol, payload);
            wire.send(&frame::ethernet(gateway, thief.mac, frame::ETH_IPV4, &outer));
        }
    };
    let inner =
        |from: (IpAddr, u16), to: (IpAddr, u16), text: &[u8]| frame::ip(from.0, to.0, frame::PROTO_UDP, &frame::udp(from, to, text));
    for (n, (from, to)) in a.addresses().into_iter().zip(b.addresses()).enumerate() {
        talk(&near, &far, [a.mac, b.mac], from, to);
        through(&inner((from, CLIENT), (to, 53), b"lab-out-of-a-tunnel"), n == 1);
        assert!(!far.sees(BRIEFLY, b"lab-out-of-a-tunnel"), "{from} -> {to}");
    }
}

fn kind_of(v6: bool) -> u16 {
    if v6 { frame::ETH_IPV6 } else { frame::ETH_IPV4 }
}

#[test]
fn a_route_in_the_packet_itself_leads_nowhere() {
    needs_root!();
    node!(host, bridge: a, b);
    settled(&host);
    known(&host, &[&a, &b], "br0");
    // What no distribution has, and an administrator may.
    for interface in ["all", "br0"] {
        host.set_sysctl(&format!("net.ipv4.conf.{interface}.accept_source_route"), "1");
        for key in ["accept_source_route", "seg6_enabled"].map(|key| format!("net.ipv6.conf.{interface}.{key}")) {
            if host.sysctl(&key).is_some() {
                host.set_sysctl(&key, "1");
            }
        }
    }
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).egress("a", "host:", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let gateway = mac_of(&host, "br0");
    let text = b"lab-by-the-packets-route";
    // Twice: the second one belongs to a connection that was allowed, with the node.
    for _ in 0..2 {
        for option in [131, 137] {
            let to: IpAddr = bridge.gateway_v4().into();
            let packet = routed(
                a.v4.octets(),
                bridge.gateway_v4().octets(),
                option,
                b.v4.octets(),
                &frame::udp((a.v4.into(), CLIENT), (to, 53), text),
            );
            wire.send(&frame::ethernet(gateway, a.mac, frame::ETH_IPV4, &packet));
            assert!(!far.sees(BRIEFLY, text), "IPv4 option {option}");
        }
        // A segment routing header (RFC 8754, 2): the last segment first, one left.
        let to: IpAddr = bridge.gateway_v6().into();
        let route = [&[frame::PROTO_UDP, 4, 4, 1, 1, 0, 0, 0][..], &b.v6.octets(), &bridge.gateway_v6().octets()].concat();
        // The sum is that of the last address.
        let datagram = frame::udp((a.v6.into(), CLIENT), (b.v6.into(), 53), text);
        wire.send(&frame::ethernet(gateway, a.mac, frame::ETH_IPV6, &frame::ip(a.v6.into(), to, 43, &[route, datagram].concat())));
        assert!(!far.sees(BRIEFLY, text), "IPv6 routing header");
        for (from, at) in a.addresses().into_iter().zip([IpAddr::from(bridge.gateway_v4()), to]) {
            let _node = Server::udp_echo(&host, (at, 53).into());
            wire.send(&udp(a.mac, gateway, (from, CLIENT), (at, 53), b"lab-allowed"));
            assert!(wire.sees(PATIENTLY, b"lab-allowed"), "{at} answers {from}");
        }
    }
}

/// An IPv4 packet that wants to go on to another address (RFC 791, 3.1: loose and strict source route).
fn routed(from: [u8; 4], to: [u8; 4], option: u8, next: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = (28 + payload.len()) as u16;
    let mut header = vec![0x47, 0, 0, 0, 0x77, 1, 0, 0, 64, frame::PROTO_UDP, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header.extend([from, to].concat());
    header.extend([option, 7, 4]);
    header.extend(next);
    header.push(0);
    let sum = frame::checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [header, payload.to_vec()].concat()
}

#[test]
fn overlapping_fragments_make_no_packet_that_is_not_allowed() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let mut id = 100;
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        let mut send = |ports: &[(u16, usize)]| {
            id += 1;
            let marker = format!("lab-overlaps-{id:04}");
            for &(port, part) in ports {
                let pieces = crate::around::fragments(from, to, port, marker.as_bytes(), 8, id);
                wire.send(&frame::ethernet(b.mac, a.mac, kind(from), &pieces[part]));
            }
            marker
        };
        // The first piece again with another port, before and behind the one that is allowed.
        for order in [[(53, 0), (54, 0), (53, 1)], [(54, 0), (53, 0), (54, 1)], [(53, 1), (54, 0), (53, 0)]] {
            send(&order);
            std::thread::sleep(BRIEFLY);
            // What passes is in pieces again: the first has the ports.
            let forbidden =
                |frame: &Vec<u8>| frame[12..14] == kind(from).to_be_bytes() && frame.windows(4).any(|four| four == [0x13, 0x88, 0, 54]);
            assert!(!far.drain().iter().any(forbidden), "{order:?}: {from} -> {to}");
        }
        let marker = send(&[(53, 0), (53, 1)]);
        assert!(far.sees(PATIENTLY, marker.as_bytes()), "{to}");
    }
}

#[test]
fn a_mark_that_another_tool_keeps_with_the_connection_carries_nobody_through_the_node() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    let mut foreign = lab::Bridge::new(&host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
    let y = foreign.add("y");
    let internet = Internet::behind(&host);
    settled(&host);
    known(&host, &[&a, &b], "br0");
    host.nft("table inet other { chain pre { type filter hook prerouting priority mangle; ct mark != 0 meta mark set ct mark; }; chain post { type filter hook postrouting priority mangle; ct mark set meta mark; }; }");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53");
    let policy = ["203.0.113.0/24", "2001:db8:ffff::/64"]
        .into_iter()
        .fold(policy, |policy, net| policy.egress("a", &format!("outside:{net}"), "udp/53"));
    apply(&mut enforcer, &policy.bind(&inventory));
    let (near, far, out) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"), Frames::open(&internet.netns, "down0"));
    let (thief, elsewhere) = (Frames::open(&unbound.netns, "eth0"), Frames::open(&y.netns, "eth0"));
    let (gateway, other) = (mac_of(&host, "br0"), mac_of(&host, "br9"));
    let outside = ["203.0.113.1", "2001:db8:ffff::1"].map(|at| at.parse::<IpAddr>().unwrap());
    for ((from, to), server) in a.addresses().into_iter().zip(b.addresses()).zip(outside) {
        talk(&near, &far, [a.mac, b.mac], from, to);
        near.send(&udp(a.mac, gateway, (from, CLIENT), (server, 53), b"lab-a-question-outside"));
        assert!(out.sees(PATIENTLY, b"lab-a-question-outside"), "{server}");
        out.send(&udp(mac_of(&internet.netns, "down0"), mac_of(&host, "up0"), (server, 53), (from, CLIENT), b"lab-an-answer-outside"));
        assert!(near.sees(PATIENTLY, b"lab-an-answer-outside"), "{server}");
        for (name, wire, mac, gateway) in [("unbound", &thief, unbound.mac, gateway), ("somebody's bridge", &elsewhere, y.mac, other)] {
            wire.send(&udp(mac, gateway, (from, CLIENT), (to, 53), b"lab-as-a-neighbour"));
            assert!(!far.sees(BRIEFLY, b"lab-as-a-neighbour"), "{name}: {from} -> {to}");
        }
        thief.send(&udp(unbound.mac, gateway, (from, CLIENT), (server, 53), b"lab-as-a-neighbour-out"));
        assert!(!out.sees(BRIEFLY, b"lab-as-a-neighbour-out"), "{from} -> {server}");
        thief.send(&udp(unbound.mac, gateway, (server, 53), (from, CLIENT), b"lab-as-the-outside"));
        assert!(!near.sees(BRIEFLY, b"lab-as-the-outside"), "{server} -> {from}");
    }
}

#[test]
fn a_tool_that_writes_whole_marks_cuts_nothing_and_opens_nothing() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    settled(&host);
    host.nft("table inet other { chain pre { type filter hook prerouting priority raw; meta mark set 0x7; }; }");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").egress("a", "host:", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let thief = Frames::open(&unbound.netns, "eth0");
    let gateway = mac_of(&host, "br0");
    let gateways: [IpAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()];
    for ((from, to), at) in a.addresses().into_iter().zip(b.addresses()).zip(gateways) {
        talk(&wire, &far, [a.mac, b.mac], from, to);
        let node = Server::udp_echo(&host, (at, 53).into());
        wire.send(&udp(a.mac, gateway, (from, CLIENT), (at, 53), b"lab-allowed"));
        assert!(wire.sees(PATIENTLY, b"lab-allowed"), "{at} answers {from}");
        wire.send(&udp(a.mac, b.mac, (from, CLIENT), (to, 54), b"lab-denied"));
        assert!(!far.sees(BRIEFLY, b"lab-denied"), "{from} -> {to}");
        let heard = node.heard();
        thief.send(&udp(unbound.mac, gateway, (from, CLIENT), (at, 53), b"lab-by-nobody"));
        thief.send(&udp(unbound.mac, b.mac, (from, CLIENT), (to, 53), b"lab-by-nobody"));
        assert!(!far.sees(BRIEFLY, b"lab-by-nobody"), "{from} -> {to}");
        assert_eq!(node.heard(), heard, "{from} -> {at}");
    }
}
