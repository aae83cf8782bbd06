//! What a second attacker tried: frames that lie about their receiver, connections that were begun elsewhere, marks that outlive their
//! road, headers within headers.

use std::net::IpAddr;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Internet, Server, needs_root};
use node_agent::enforce::living;
use policy::{Mode, Scene};

use crate::anew::link_local;
use crate::around::fragments;
use crate::guard::icmpv6;
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, now, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);

pub(crate) fn kind(of: IpAddr) -> u16 {
    if of.is_ipv4() { frame::ETH_IPV4 } else { frame::ETH_IPV6 }
}

pub(crate) fn udp(mac: [u8; 6], to_mac: [u8; 6], from: (IpAddr, u16), to: (IpAddr, u16), marker: &[u8]) -> Vec<u8> {
    let packet = frame::ip(from.0, to.0, frame::PROTO_UDP, &frame::udp(from, to, marker));
    frame::ethernet(to_mac, mac, kind(from.0), &packet)
}

#[test]
fn a_packet_reaches_the_port_of_its_ip_address_and_no_other_whatever_the_frame_says() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, near, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"), Frames::open(&c.netns, "eth0"));

    for (n, (from, to)) in a.addresses().into_iter().zip(b.addresses()).enumerate() {
        for (m, mac) in [c.mac, [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]].into_iter().enumerate() {
            let marker = format!("lab-for-b-not-c-{n}{m}");
            wire.send(&udp(a.mac, mac, (from, 5000), (to, 53), marker.as_bytes()));
            assert!(!far.sees(BRIEFLY, marker.as_bytes()), "{to} in a frame to {mac:02x?}");
        }
        let marker = format!("lab-honest-{n}");
        wire.send(&udp(a.mac, b.mac, (from, 5000), (to, 53), marker.as_bytes()));
        assert!(near.sees(PATIENTLY, marker.as_bytes()), "{to}");
    }
}

#[test]
fn who_says_that_its_address_is_at_a_neighbours_mac_address_sends_the_neighbour_nothing() {
    needs_root!();
    node!(host, bridge: a, b, c);
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).ingress("a", "host:", "udp/53").ingress("c", "host:", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&c.netns, "eth0"));
    let gateway = mac_of(&host, "br0");
    // An advertisement says it of its target; what asks says it of its sender (RFC 4861, 4.1 to 4.4).
    let routers = ("ff02::2".parse().unwrap(), [0x33, 0x33, 0, 0, 0, 2]);
    for (name, (to, mac), body) in [
        ("an advertisement", (bridge.gateway_v6(), gateway), [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &a.v6.octets(), &[2, 1]].concat()),
        (
            "a solicitation",
            (bridge.gateway_v6(), gateway),
            [&[135, 0, 0, 0, 0, 0, 0, 0][..], &bridge.gateway_v6().octets(), &[1, 1]].concat(),
        ),
        ("a router's solicitation", routers, vec![133, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
    ] {
        host.ip("-6 neigh flush dev br0");
        host.udp_send((a.v6, 53).into(), b"lab-first");
        wire.send(&frame::ethernet(mac, a.mac, frame::ETH_IPV6, &icmpv6(a.v6, to, &[&body[..], &c.mac].concat())));
        lab::eventually(PATIENTLY, || {
            let known = host.ip(&format!("-6 neigh show {} dev br0", a.v6));
            if known.contains(&lab::bridge::mac_text(c.mac)) { Ok(()) } else { Err(format!("{name}: {known}")) }
        });
        host.udp_send((a.v6, 53).into(), b"lab-for-a-not-c");
        assert!(!far.sees(BRIEFLY, b"lab-for-a-not-c"), "{name}");
    }
}

/// A connection that both of its ends seem to use, on a bridge that nobody guards: forged by one who is there.
fn forge(wires: [&Frames; 2], macs: [[u8; 6]; 2], from: (IpAddr, u16), to: (IpAddr, u16)) {
    wires[0].send(&udp(macs[0], macs[1], from, to, b"lab-forged-request"));
    assert!(wires[1].sees(PATIENTLY, b"lab-forged-request"));
    wires[1].send(&udp(macs[1], macs[0], to, from, b"lab-forged-answer"));
    assert!(wires[0].sees(PATIENTLY, b"lab-forged-answer"));
}

#[test]
fn a_connection_that_was_forged_on_another_bridge_opens_nothing_on_a_guarded_one() {
    needs_root!();
    node!(host, bridge: a, b; elsewhere: x, y);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&elsewhere, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let (one, other) = (Frames::open(&x.netns, "eth0"), Frames::open(&y.netns, "eth0"));

    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        wire.send(&udp(a.mac, b.mac, (from, 5000), (to, 99), b"lab-denied"));
        assert!(!far.sees(BRIEFLY, b"lab-denied"), "{to}");
        forge([&one, &other], [x.mac, y.mac], (from, 5001), (to, 99));
        wire.send(&udp(a.mac, b.mac, (from, 5001), (to, 99), b"lab-on-a-forged-one"));
        assert!(!far.sees(BRIEFLY, b"lab-on-a-forged-one"), "{to}");
    }
}

#[test]
fn a_connection_between_link_local_addresses_that_began_where_nobody_is_guarded_goes_on_nowhere_else() {
    needs_root!();
    node!(host, bridge: a, b; elsewhere: x, y);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&elsewhere, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).mode(Mode::Audit, &["x", "y"]).egress("a", "host:", "udp/53");
    let bound = policy.bind(&inventory);
    apply(&mut enforcer, &bound);
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let (one, other) = (Frames::open(&x.netns, "eth0"), Frames::open(&y.netns, "eth0"));

    let (from, to) = (link_local(a.mac), link_local(b.mac));
    forge([&one, &other], [x.mac, y.mac], (from, 5001), (to, 99));
    wire.send(&udp(a.mac, b.mac, (from, 5001), (to, 99), b"lab-begun-elsewhere"));
    assert!(!far.sees(BRIEFLY, b"lab-begun-elsewhere"));
    let networks = policy::bind::networks(&inventory);
    let scene = Scene { set: &policy.0, networks: &networks, now: now() };
    assert_eq!(host.run(|| living::revoke(&scene, &bound, &inventory).unwrap()), 0);
    wire.send(&udp(a.mac, b.mac, (from, 5001), (to, 99), b"lab-looked-through"));
    assert!(!far.sees(BRIEFLY, b"lab-looked-through"), "after a look at what lives");
    // Engines give the node one link-local address on all of its bridges.
    for bridge in ["br0", "br9"] {
        host.ip(&format!("addr add fe80::1/64 dev {bridge} nodad"));
    }
    let (at, node) = ("fe80::1".parse().unwrap(), Server::udp_sink(&host, "[::]:99".parse().unwrap()));
    one.send(&udp(x.mac, mac_of(&host, "br9"), (from, 5002), (at, 99), b"lab-to-the-node"));
    lab::eventually(PATIENTLY, || if node.heard() == 1 { Ok(()) } else { Err("the node does not hear it") });
    wire.send(&udp(a.mac, mac_of(&host, "br0"), (from, 5002), (at, 99), b"lab-begun-elsewhere"));
    std::thread::sleep(BRIEFLY);
    assert_eq!(node.heard(), 1);
}

#[test]
fn nobody_else_sends_a_piece_of_a_guarded_workloads_packet() {
    needs_root!();
    node!(host, bridge: a, b; elsewhere: x, y);
    let unbound = bridge.add("unbound");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&elsewhere, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let wires = [&x, &y, &unbound].map(|member| Frames::open(&member.netns, "eth0"));
    let [near, peer, stranger] = &wires;

    let (mut id, mut marker) = (0, String::new());
    let mut next = || {
        id += 1;
        marker = format!("lab-a-piece-of-{id:02}");
        (id, marker.clone())
    };
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        for (thief, mac, near_mac) in [(near, x.mac, y.mac), (stranger, unbound.mac, b.mac)] {
            let (id, marker) = next();
            // The same sum, or connection tracking would not take it: two words change places.
            let forged = [&marker[..1], &marker[3..5], &marker[1..3], &marker[5..]].concat();
            let [first, last] = fragments(from, to, 53, marker.as_bytes(), 8, id);
            let [_, other] = fragments(from, to, 53, forged.as_bytes(), 8, id);
            thief.send(&frame::ethernet(near_mac, mac, kind(from), &other));
            // What it sent is through before the first piece leaves.
            std::thread::sleep(BRIEFLY);
            for part in [first, last] {
                wire.send(&frame::ethernet(b.mac, a.mac, kind(from), &part));
            }
            let seen = far.receive(PATIENTLY, |frame| [&marker, &forged].iter().any(|text| frame.ends_with(text.as_bytes())));
            let seen = seen.map(|frame| String::from_utf8_lossy(&frame[frame.len() - 17..]).into_owned());
            assert_eq!(seen.as_ref(), Some(&marker), "{from} -> {to}, with a piece from {mac:02x?}");
        }
    }
    // Pieces of one's own go on, link-local ones too.
    let of_ones_choice = ["fe90::1", "febf::2"].map(|at| at.parse().unwrap());
    let own = x.addresses().into_iter().zip(y.addresses()).chain([(link_local(x.mac), link_local(y.mac)), of_ones_choice.into()]);
    for (from, to) in own {
        let (id, marker) = next();
        for part in fragments(from, to, 53, marker.as_bytes(), 8, id) {
            near.send(&frame::ethernet(y.mac, x.mac, kind(from), &part));
        }
        assert!(peer.sees(PATIENTLY, marker.as_bytes()), "{from} -> {to}");
    }
}

#[test]
fn nobody_disputes_an_address_that_a_neighbour_is_about_to_take() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    for (target, passes) in [(a.v6, true), (b.v6, false), (bridge.gateway_v6(), false)] {
        let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat();
        let packet = icmpv6(std::net::Ipv6Addr::UNSPECIFIED, "ff02::1".parse().unwrap(), &body);
        wire.send(&frame::ethernet([0x33, 0x33, 0, 0, 0, 1], a.mac, frame::ETH_IPV6, &packet));
        assert_eq!(far.sees(BRIEFLY, &packet[40..]), passes, "{target}");
    }
    // A probe: whose MAC address is said, and no address.
    for (target, passes) in [(a.v4, true), (b.v4, false), (bridge.gateway_v4(), false)] {
        let mut probe = frame::arp_reply(a.mac, std::net::Ipv4Addr::UNSPECIFIED, [0; 6], target);
        probe[7] = 1;
        wire.send(&frame::ethernet([0xff; 6], a.mac, frame::ETH_ARP, &probe));
        assert_eq!(far.sees(BRIEFLY, &probe), passes, "{target}");
    }
}

#[test]
fn nobody_sends_a_piece_of_a_packet_from_outside_around_the_bridge() {
    needs_root!();
    node!(host, bridge: a, thief);
    let internet = Internet::behind(&host);
    settled(&host);
    for at in a.addresses() {
        host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", lab::bridge::mac_text(a.mac)));
    }
    let inventory = inventory(&[(&bridge, &[("a", &a), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "thief"]);
    let policy = policy.ingress("a", "outside:203.0.113.0/24", "udp/53").ingress("a", "outside:2001:db8:ffff::/48", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (far, stolen) = (Frames::open(&a.netns, "eth0"), Frames::open(&thief.netns, "eth0"));
    let out = Frames::open(&internet.netns, "down0");
    let (uplink, mac) = (mac_of(&host, "up0"), mac_of(&internet.netns, "down0"));
    let outside = ["203.0.113.1", "2001:db8:ffff::1"].map(|at| at.parse::<IpAddr>().unwrap());
    for (id, (from, to)) in (1..).zip(outside.into_iter().zip(a.addresses())) {
        // The same sum: two words change places.
        let marker = b"lab-a-piece-of-01";
        let forged = [&marker[..1], &marker[3..5], &marker[1..3], &marker[5..]].concat();
        let [first, last] = fragments(from, to, 53, marker, 8, id);
        let [_, other] = fragments(from, to, 53, &forged, 8, id);
        stolen.send(&frame::ethernet([1, 0x80, 0xc2, 0, 0, 14], thief.mac, kind(from), &other));
        std::thread::sleep(BRIEFLY);
        for part in [first, last] {
            out.send(&frame::ethernet(uplink, mac, kind(from), &part));
        }
        let seen = far.receive(PATIENTLY, |frame| [&marker[..], &forged].iter().any(|text| frame.ends_with(text)));
        let seen = seen.map(|frame| String::from_utf8_lossy(&frame[frame.len() - 17..]).into_owned());
        assert_eq!(seen.as_deref(), Some("lab-a-piece-of-01"), "{from} -> {to}");
    }
}

#[test]
fn what_comes_out_of_a_tunnel_on_the_node_is_not_who_went_in() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    host.ip("link add vx0 type vxlan id 5 dstport 4789 local 10.1.0.1 remote 10.1.0.4");
    host.ip("link set vx0 master br0");
    host.ip("link set vx0 up");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &policy.egress("thief", "host:", "udp/4789").egress("a", "host:", "udp/53-54").bind(&inventory));
    let (wire, far) = (Frames::open(&thief.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let gateway = mac_of(&host, "br0");
    let gateways: [IpAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()];
    let sinks = gateways.map(|at| Server::udp_sink(&host, (at, 53).into()));
    let allowed = Server::udp_sink(&host, (gateways[0], 54).into());
    let tunnel = |inner: &[u8]| {
        let vxlan = [&[8, 0, 0, 0, 0, 0, 5, 0][..], inner].concat();
        wire.send(&udp(thief.mac, gateway, (thief.v4.into(), 5000), (gateways[0], 4789), &vxlan));
    };
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        let inner = udp([2, 0, 0, 0, 0, 0x77], b.mac, (from, 5000), (to, 53), b"lab-out-of-a-tunnel");
        tunnel(&inner);
        assert!(!far.sees(BRIEFLY, b"lab-out-of-a-tunnel"), "{to}");
    }
    // Nor to the node, which a may ask.
    for (from, at) in a.addresses().into_iter().zip(gateways) {
        let inner = udp([2, 0, 0, 0, 0, 0x77], gateway, (from, 5000), (at, 53), b"lab-out-of-a-tunnel");
        tunnel(&inner);
    }
    lab::eventually(PATIENTLY, || {
        a.netns.udp_send((bridge.gateway_v4(), 54).into(), b"allowed");
        if allowed.heard() > 0 { Ok(()) } else { Err("the node hears nothing".to_owned()) }
    });
    std::thread::sleep(BRIEFLY);
    assert_eq!(sinks.map(|sink| sink.heard()), [0, 0]);
}

#[test]
fn a_mark_that_another_tool_keeps_with_the_connection_lets_nobody_else_in() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    host.nft("table inet other { chain pre { type filter hook prerouting priority mangle; ct mark != 0 meta mark set ct mark; }; chain post { type filter hook postrouting priority mangle; ct mark set meta mark; }; }");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let (back, thief) = (Frames::open(&b.netns, "eth0"), Frames::open(&unbound.netns, "eth0"));
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        wire.send(&udp(a.mac, b.mac, (from, 5000), (to, 53), b"lab-request"));
        assert!(far.sees(PATIENTLY, b"lab-request"));
        back.send(&udp(b.mac, a.mac, (to, 53), (from, 5000), b"lab-answer"));
        assert!(wire.sees(PATIENTLY, b"lab-answer"));
        for mac in [unbound.mac, a.mac] {
            thief.send(&udp(mac, b.mac, (from, 5000), (to, 53), b"lab-by-somebody-else"));
            assert!(!far.sees(BRIEFLY, b"lab-by-somebody-else"), "{to}");
        }
    }
}
