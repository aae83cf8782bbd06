//! Ways around the filter that are no matter of one port alone: fragments, the uplink, other bridges, a container that forwards,
//! the gateway's address, answers that only a router or a DHCP server may give.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Internet, Member, Netns, Server, needs_root};
use policy::Mode;

use crate::guard::datagram;
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);

/// A UDP datagram of 48 bytes in two fragments, cut after so many bytes.
pub(crate) fn fragments(from: IpAddr, to: IpAddr, port: u16, marker: &[u8], cut: usize, id: u8) -> [Vec<u8>; 2] {
    let whole = frame::udp((from, 5000), (to, port), &[&[0; 40 - 17][..], marker].concat());
    let part = |offset: usize, more: bool, bytes: &[u8]| {
        if from.is_ipv4() {
            let mut packet = frame::ip(from, to, frame::PROTO_UDP, bytes);
            packet[4..6].copy_from_slice(&[0x70, id]);
            packet[6..8].copy_from_slice(&((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
            packet[10..12].fill(0);
            let sum = frame::checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        } else {
            let header = [&[frame::PROTO_UDP, 0][..], &(offset as u16 | u16::from(more)).to_be_bytes(), &[0, 0, 0x70, id]].concat();
            frame::ip(from, to, 44, &[&header, bytes].concat())
        }
    };
    [part(0, true, &whole[..cut]), part(cut, false, &whole[cut..])]
}

#[test]
fn fragments_are_judged_as_the_packet_they_make() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let mut id = 0;
    for n in 0..2 {
        let kind = [frame::ETH_IPV4, frame::ETH_IPV6][n];
        let (from, to) = (a.addresses()[n], b.addresses()[n]);
        // Cut behind the ports, or behind the first byte that there can be: the rest hides in the second fragment.
        for (port, backwards, only_last, passes) in [
            (53, false, false, true),
            (53, true, false, true),
            (54, false, false, false),
            (54, true, false, false),
            (53, false, true, false),
        ] {
            id += 1;
            let marker = format!("lab-fragment-v{n}-{id:02}");
            let mut parts = fragments(from, to, port, marker.as_bytes(), 8, id);
            if backwards {
                parts.reverse();
            }
            for part in parts.iter().skip(usize::from(only_last)) {
                wire.send(&frame::ethernet(b.mac, a.mac, kind, part));
            }
            let patience = if passes { PATIENTLY } else { BRIEFLY };
            assert_eq!(
                far.sees(patience, marker.as_bytes()),
                passes,
                "port {port}, backwards {backwards}, only the last {only_last}, {to}"
            );
        }
    }
}

#[test]
fn a_container_answers_dhcp_only_to_who_asked_it_and_may() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    // What a client hears on is allowed by policy, all the same; and what a server hears on.
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let policy = ["udp/68", "udp/546"].into_iter().fold(policy, |policy, port| policy.allow("a", "b", port));
    let policy = ["udp/67", "udp/547"].into_iter().fold(policy, |policy, port| policy.allow("b", "a", port));
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    for (n, server, client) in [(0, 67, 68), (1, 547, 546)] {
        let (from, to) = (a.addresses()[n], b.addresses()[n]);
        for (port, passes) in [(server, false), (1024, true)] {
            let marker = format!("lab-offer-{n}-{port:04}");
            let packet = frame::ip(from, to, frame::PROTO_UDP, &frame::udp((from, port), (to, client), marker.as_bytes()));
            wire.send(&frame::ethernet(b.mac, a.mac, [frame::ETH_IPV4, frame::ETH_IPV6][n], &packet));
            assert_eq!(far.sees(if passes { PATIENTLY } else { BRIEFLY }, marker.as_bytes()), passes, "from port {port}");
        }
        let family = [frame::ETH_IPV4, frame::ETH_IPV6][n];
        let ask = frame::ip(to, from, frame::PROTO_UDP, &frame::udp((to, client), (from, server), b"lab-renewal"));
        far.send(&frame::ethernet(a.mac, b.mac, family, &ask));
        assert!(wire.sees(PATIENTLY, b"lab-renewal"));
        let answer = frame::ip(from, to, frame::PROTO_UDP, &frame::udp((from, server), (to, client), b"lab-renewed"));
        wire.send(&frame::ethernet(b.mac, a.mac, family, &answer));
        assert!(far.sees(PATIENTLY, b"lab-renewed"), "asked: from port {server}");
    }
}

#[test]
fn tags_and_unknown_types_do_not_leave_a_port_that_is_not_bound() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).bind(&inventory));
    let wire = Frames::open(&unbound.netns, "eth0");
    let far = [&a, &b].map(|member| Frames::open(&member.netns, "eth0"));
    let udp = frame::udp((unbound.v4.into(), 5000), (b.v4.into(), 53), b"lab-hidden-packet");
    let inner = frame::ip(unbound.v4.into(), b.v4.into(), frame::PROTO_UDP, &udp);
    for (name, kind, payload) in [
        ("802.1Q", frame::ETH_VLAN, frame::vlan(0, frame::ETH_IPV4, &inner)),
        ("802.1Q with an id", frame::ETH_VLAN, frame::vlan(7, frame::ETH_IPV4, &inner)),
        ("QinQ", 0x88a8, frame::vlan(7, frame::ETH_VLAN, &frame::vlan(8, frame::ETH_IPV4, &inner))),
        ("PPPoE", 0x8864, [&[0x11, 0, 0, 1, 0, 60, 0, 0x21][..], &inner].concat()),
        ("an unknown type", 0x88b5, inner.clone()),
        ("plain", frame::ETH_IPV4, inner.clone()),
    ] {
        for to in [b.mac, [0xff; 6], [1, 0x80, 0xc2, 0, 0, 0]] {
            wire.send(&frame::ethernet(to, unbound.mac, kind, &payload));
        }
        for wire in &far {
            assert!(!wire.sees(BRIEFLY, b"lab-hidden-packet"), "{name}");
        }
    }
}

#[test]
fn a_workloads_address_is_not_believed_from_the_uplink_nor_from_another_bridge() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut other = lab::Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let (bound, unbound) = (other.add("bound"), other.add("unbound"));
    let mut foreign = lab::Bridge::new(&host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
    let stranger = foreign.add("stranger");
    let internet = Internet::behind(&host);
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&other, &[("bound", &bound)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["b"]).ingress("b", "a", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    for at in b.addresses() {
        host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", lab::bridge::mac_text(b.mac)));
    }
    let far = Frames::open(&b.netns, "eth0");
    let from = |netns: &Netns, interface: &str, mac: [u8; 6], gateway: [u8; 6], marker: &str| {
        let wire = Frames::open(netns, interface);
        for n in 0..2 {
            let (source, to) = (a.addresses()[n], b.addresses()[n]);
            let packet = frame::ip(source, to, frame::PROTO_UDP, &frame::udp((source, 5000), (to, 53), marker.as_bytes()));
            wire.send(&frame::ethernet(gateway, mac, [frame::ETH_IPV4, frame::ETH_IPV6][n], &packet));
            assert!(!far.sees(BRIEFLY, marker.as_bytes()), "{source} from {}", netns.name());
        }
    };
    from(&internet.netns, "down0", mac_of(&internet.netns, "down0"), mac_of(&host, "up0"), "lab-from-the-uplink");
    for member in [&bound, &unbound] {
        from(&member.netns, "eth0", member.mac, mac_of(&host, "br1"), "lab-from-another-bridge");
    }
    from(&stranger.netns, "eth0", stranger.mac, mac_of(&host, "br9"), "lab-from-a-foreign-bridge");
    // And from where it belongs it is.
    Frames::open(&a.netns, "eth0").send(&datagram(a.mac, a.v4.into(), (&b, b.v4.into()), b"lab-from-its-own-port"));
    assert!(far.sees(PATIENTLY, b"lab-from-its-own-port"));
}

#[test]
fn a_container_that_forwards_between_two_networks_bypasses_neither() {
    needs_root!();
    let host = Netns::new("host");
    let mut one = lab::Bridge::new(&host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
    let (a, inner) = (one.add("a"), one.add("inner"));
    let mut two = lab::Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let (c, outer) = (two.add("c"), two.add("outer"));
    settled(&host);
    // `inner` and `outer` are the legs of one container, which may put on either what came by the other.
    let inventory = inventory(&[(&one, &[("a", &a), ("router", &inner)]), (&two, &[("c", &c), ("router", &outer)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a", "c"])
        .allow("a", "router", "udp/53")
        .allow("router", "c", "udp/53")
        .allow("c", "router", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let wires = [&a, &inner, &outer, &c].map(|member| Frames::open(&member.netns, "eth0"));
    for n in 0..2 {
        let kind = [frame::ETH_IPV4, frame::ETH_IPV6][n];
        let (from, to) = (a.addresses()[n], c.addresses()[n]);
        let packet = frame::ip(from, to, frame::PROTO_UDP, &frame::udp((from, 5000), (to, 53), b"lab-carried-across"));
        let step = |wire: &Frames, mac: [u8; 6], to: &Member| wire.send(&frame::ethernet(to.mac, mac, kind, &packet));
        step(&wires[0], a.mac, &inner);
        assert!(!wires[1].sees(BRIEFLY, b"lab-carried-across"), "the first leg: to an address that is not on this network");
        // Were it carried all the same, in a tunnel, it would have to leave the second leg as itself.
        step(&wires[2], outer.mac, &c);
        assert!(!wires[3].sees(BRIEFLY, b"lab-carried-across"), "the second leg: from an address that is not its own");
    }
}

#[test]
fn who_has_the_address_that_a_gateway_mostly_has_is_a_container_like_any_other() {
    needs_root!();
    node!(host, bridge: a, b);
    // As with the engine's gateway_mode=isolated: the node has no address there, and a container has the first one.
    for (address, length) in [(IpAddr::from(bridge.gateway_v4()), 24), (bridge.gateway_v6().into(), 64)] {
        host.ip(&format!("addr del {address}/{length} dev br0"));
    }
    let (v4, v6) = (bridge.gateway_v4(), bridge.gateway_v6());
    let first = Member { v4, v6, ..bridge.add("first") };
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("first", &first)])]);
    inventory.host.clear();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).ingress("a", "host:", "udp/53").allow("a", "b", "udp/9");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&first.netns, "eth0"), Frames::open(&a.netns, "eth0"));
    for n in 0..2 {
        let (from, to) = (first.addresses()[n], a.addresses()[n]);
        wire.send(&datagram(first.mac, from, (&a, to), b"lab-as-the-gateway"));
        assert!(!far.sees(BRIEFLY, b"lab-as-the-gateway"), "what is allowed to the node is not allowed to {from}");
    }
    // Nor is it believed as a router: its errors are those of a container that a may not talk to.
    a.netns.udp_send(SocketAddr::new(b.v4.into(), 9), b"lab-quoted-by-error");
    let socket = a.netns.udp_socket(SocketAddr::new(b.v4.into(), 9));
    socket.send_to(b"lab-quoted-by-error", SocketAddr::new(b.v4.into(), 9)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let quoted =
        frame::ip(a.v4.into(), b.v4.into(), frame::PROTO_UDP, &frame::udp((a.v4.into(), port), (b.v4.into(), 9), b"lab-quoted-by-error"));
    let mut error = [&[3, 1, 0, 0, 0, 0, 0, 0][..], &quoted].concat();
    let sum = frame::checksum(&error);
    error[2..4].copy_from_slice(&sum.to_be_bytes());
    let packet = frame::ip(first.v4.into(), a.v4.into(), frame::PROTO_ICMP, &error);
    wire.send(&frame::ethernet(a.mac, first.mac, frame::ETH_IPV4, &packet));
    assert!(far.receive(BRIEFLY, |frame| frame.get(26..30) == Some(&first.v4.octets()[..]) && frame[23] == 1).is_none());
}

#[test]
fn after_an_undo_everything_is_as_open_as_it_was() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let unbound = bridge.add("unbound");
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let fdb = || {
        let all = host.check(Command::new("bridge").args(["fdb", "show", "br", "br0"]));
        all.lines().filter(|line| line.contains("static")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = (host.ruleset(), fdb());
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory));
    assert_ne!((host.ruleset(), fdb()), before);
    node_agent::enforce::Enforcer::remove(&mut enforcer).unwrap();
    assert_eq!((host.ruleset(), fdb()), before);
    for member in [&a, &unbound] {
        assert!(member.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open());
    }
}
