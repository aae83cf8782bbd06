//! What connection tracking, or the bridge, is made to believe by who is no party to it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Internet, Server, needs_root};
use policy::Mode;

use crate::guard::icmpv6;
use crate::hostile::{kind, udp};
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);

const SYN: u8 = 2;
const ACK: u8 = 16;

/// An IPv6 packet with an option that its receiver does not know and so drops in silence (RFC 8200, 4.2: 01), and connection tracking
/// does not mind.
fn unwelcome(from: IpAddr, to: IpAddr, segment: &[u8]) -> Vec<u8> {
    frame::ip(from, to, 60, &[&[frame::PROTO_TCP, 0, 0x5e, 4, 0, 0, 0, 0][..], segment].concat())
}

#[test]
fn who_may_answer_asks_nothing_behind_an_answer() {
    needs_root!();
    node!(host, bridge: a, b; elsewhere: x, y);
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&elsewhere, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").ingress("b", "host:", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    let [wire, far, one, other] = [&b, &a, &x, &y].map(|member| Frames::open(&member.netns, "eth0"));
    let gateway = mac_of(&host, "br0");
    let segment = |from, to, sequence, flags| frame::tcp_carrying(from, to, (sequence, 0x2000), flags, &[]);
    let tcp = |from: (IpAddr, u16), to: (IpAddr, u16), sequence, flags| {
        frame::ip(from.0, to.0, frame::PROTO_TCP, &segment(from, to, sequence, flags))
    };

    let mut sequence = 0x1ab0_0000;
    let mut dropped = |name: &str, server: IpAddr, client: IpAddr, port: u16, first: &dyn Fn(u32)| {
        sequence += 0x1_0000;
        first(sequence);
        let request = tcp((server, 80), (client, port), sequence + 1, SYN);
        wire.send(&frame::ethernet(a.mac, b.mac, kind(server), &request));
        assert!(!far.sees(BRIEFLY, &(sequence + 1).to_be_bytes()), "{name}: {server} -> {client} port {port}");
    };
    for (client, server) in a.addresses().into_iter().zip(b.addresses()) {
        let _listens = Server::tcp_echo(&a.netns, SocketAddr::new(client, 22));
        let send = |packet: &[u8]| wire.send(&frame::ethernet(a.mac, b.mac, kind(server), packet));
        let (service, answer) = ((server, 80), |sequence, port| tcp((server, 80), (client, port), sequence, ACK));
        dropped("behind an answer", server, client, 22, &|sequence| send(&answer(sequence, 22)));
        if server.is_ipv6() {
            dropped("behind one that the client drops", server, client, 23, &|sequence| {
                send(&unwelcome(server, client, &segment(service, (client, 23), sequence, ACK)));
            });
        }
        // Somebody who is not judged makes connection tracking believe that the client has said something, before or after.
        let forge = |port, flags| {
            one.send(&frame::ethernet(y.mac, x.mac, kind(server), &tcp((client, port), service, 0x2000, flags)));
            assert!(other.sees(PATIENTLY, &[&octets(client)[..], &octets(server)].concat()));
        };
        for (port, flags) in [(24, SYN), (25, ACK)] {
            dropped("forged before", server, client, port, &|sequence| {
                forge(port, flags);
                send(&answer(sequence, port));
            });
        }
        // The client's reset would end it before anybody could help.
        if server.is_ipv6() {
            dropped("forged after", server, client, 26, &|sequence| {
                send(&unwelcome(server, client, &segment(service, (client, 26), sequence, ACK)));
                forge(26, ACK);
                send(&answer(sequence, 26));
            });
        }
    }
    // The node is a client like any other.
    let (client, server) = (IpAddr::from(bridge.gateway_v6()), b.addresses()[1]);
    let node = Server::tcp_echo(&host, SocketAddr::new(client, 22));
    let send = |packet: &[u8]| wire.send(&frame::ethernet(gateway, b.mac, frame::ETH_IPV6, packet));
    send(&unwelcome(server, client, &segment((server, 80), (client, 22), 0x3ab0_0000, ACK)));
    send(&tcp((server, 80), (client, 22), 0x3ab0_0001, SYN));
    let answered = |frame: &[u8]| frame.get(54..58) == Some(&[0, 22, 0, 80][..]) && frame.get(67) == Some(&(SYN | ACK));
    assert!(wire.receive(BRIEFLY, answered).is_none(), "the node takes the connection");
    drop(node);
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[test]
fn a_connection_that_was_forged_on_an_audited_bridge_opens_nothing_on_a_guarded_one() {
    needs_root!();
    node!(host, bridge: a, b; audited: x, y);
    let internet = Internet::behind(&host);
    settled(&host);
    for member in [&a, &b] {
        for at in member.addresses() {
            host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", lab::bridge::mac_text(member.mac)));
        }
    }
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&audited, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).mode(Mode::Audit, &["x", "y"]);
    apply(&mut enforcer, &policy.bind(&inventory));
    let [near, one, other] = [&a, &x, &y].map(|member| Frames::open(&member.netns, "eth0"));
    let out = Frames::open(&internet.netns, "down0");
    let outside = ["203.0.113.1", "2001:db8:ffff::1"].map(|at| at.parse::<IpAddr>().unwrap());
    let (gateway, uplink, mac) = (mac_of(&host, "br0"), mac_of(&host, "up0"), mac_of(&internet.netns, "down0"));
    for (n, (at, server)) in a.addresses().into_iter().zip(outside).enumerate() {
        for (m, peer) in [server, y.addresses()[n]].into_iter().enumerate() {
            let port = 5000 + m as u16;
            one.send(&udp(x.mac, y.mac, (peer, 53), (at, port), b"lab-forged"));
            other.sees(BRIEFLY, b"lab-forged");
            let (wire, to) = if m == 0 { (&out, gateway) } else { (&other, gateway) };
            near.send(&udp(a.mac, to, (at, port), (peer, 53), b"lab-out-on-a-forged-one"));
            assert!(!wire.sees(BRIEFLY, b"lab-out-on-a-forged-one"), "{at} -> {peer}");
            one.send(&udp(x.mac, y.mac, (peer, 54), (at, port), b"lab-forged"));
            let (from, to) = if m == 0 { (mac, uplink) } else { (y.mac, mac_of(&host, "br9")) };
            wire.send(&udp(from, to, (peer, 54), (at, port), b"lab-in-on-a-forged-one"));
            assert!(!near.sees(BRIEFLY, b"lab-in-on-a-forged-one"), "{peer} -> {at}");
        }
    }
}

#[test]
fn link_local_addresses_of_any_choice_are_those_of_a_bridge_where_nobody_is_guarded() {
    needs_root!();
    node!(host, bridge: a, b; audited: x, y);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&audited, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).mode(Mode::Audit, &["x", "y"]).bind(&inventory));
    let [one, other] = [&x, &y].map(|member| Frames::open(&member.netns, "eth0"));
    for (n, (from, to)) in [("fe80::1", "fe80::2"), ("fe90::1", "fe90::2"), ("febf::1", "fea0::2")].into_iter().enumerate() {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let marker = format!("lab-link-local-{n}");
        one.send(&udp(x.mac, y.mac, (from, 5000), (to, 53), marker.as_bytes()));
        assert!(other.sees(PATIENTLY, marker.as_bytes()), "{from} -> {to}");
    }
}

#[test]
fn no_container_keeps_book_of_multicast_listeners() {
    needs_root!();
    for (is_bound, tagged) in [(true, false), (false, false), (true, true), (false, true)] {
        node!(host, bridge: a, b, thief);
        let all = [("a", &a), ("b", &b), ("thief", &thief)];
        let inventory = inventory(&[(&bridge, &all[..if is_bound { 3 } else { 2 }])]);
        let mut enforcer = enforcer(&host);
        apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).bind(&inventory));
        let [wire, far, stolen] = [&a, &b, &thief].map(|member| Frames::open(&member.netns, "eth0"));
        let [m0, m1, m2, m3, m4, m5] = thief.mac;
        let local = Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, m0 ^ 2, m1, m2, 0xff, 0xfe, m3, m4, m5]);
        let everybody = "ff02::1".parse().unwrap();
        // A router alert (RFC 2711), then a general query (RFC 2710, 3) that gives a millisecond to answer.
        let query = icmpv6(local, everybody, &[&[130, 0, 0, 0, 0, 1, 0, 0][..], &[0; 16]].concat());
        let mut packet = frame::ip(local.into(), everybody.into(), 0, &[&[58, 0, 5, 2, 0, 0, 1, 0][..], &query[40..]].concat());
        packet[7] = 1;
        let (kind, payload) = if tagged { (frame::ETH_VLAN, frame::vlan(0, frame::ETH_IPV6, &packet)) } else { (frame::ETH_IPV6, packet) };
        stolen.send(&frame::ethernet([0x33, 0x33, 0, 0, 0, 1], thief.mac, kind, &payload));
        std::thread::sleep(BRIEFLY);
        // Who asks for an address whose group nobody has reported, or not of late.
        let target: Ipv6Addr = "2001:db8:1::abcd:1234".parse().unwrap();
        let body = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets(), &[1, 1], &a.mac].concat();
        let ask = icmpv6(a.v6, "ff02::1:ffcd:1234".parse().unwrap(), &body);
        wire.send(&frame::ethernet([0x33, 0x33, 0xff, 0xcd, 0x12, 0x34], a.mac, frame::ETH_IPV6, &ask));
        assert!(far.sees(PATIENTLY, &ask[40..]), "a solicitation reaches everybody; bound: {is_bound}, in a tag: {tagged}");
    }
}
