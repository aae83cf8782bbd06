//! Who sends, sends as itself; and nothing passes a bridge that the filter didn't see.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Echo, Member, Server, Tcp, needs_root};
use policy::Mode;

use crate::stage::{Policy, apply, enforcer, inventory};

const BRIEFLY: Duration = Duration::from_millis(400);

/// A UDP packet of `from`'s addresses with this payload, in a frame with this source MAC.
pub(crate) fn datagram(mac: [u8; 6], from: IpAddr, to: (&Member, IpAddr), marker: &[u8]) -> Vec<u8> {
    let kind = if from.is_ipv4() { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
    let udp = frame::udp((from, 5000), (to.1, 53), marker);
    frame::ethernet(to.0.mac, mac, kind, &frame::ip(from, to.1, frame::PROTO_UDP, &udp))
}

#[test]
fn a_container_cannot_send_from_its_neighbours_address_or_mac() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).allow("a", "b", "udp/53").allow("thief", "b", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&thief.netns, "eth0"), Frames::open(&b.netns, "eth0"));

    for n in 0..2 {
        let at = b.addresses()[n];
        let (own, others) = (thief.addresses()[n], a.addresses()[n]);
        for (mac, from, marker, passes) in [
            (thief.mac, own, b"lab-honest-packet", true),
            (thief.mac, others, b"lab-stolen-addres", false),
            (a.mac, own, b"lab-stolen-mac-ad", false),
            (a.mac, others, b"lab-stolen-both-a", false),
        ] {
            wire.send(&datagram(mac, from, (&b, at), marker));
            assert_eq!(far.sees(BRIEFLY, marker), passes, "{from} {}", String::from_utf8_lossy(marker));
        }
    }
}

#[test]
fn a_container_cannot_claim_its_neighbours_address_by_arp() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).bind(&inventory));
    let (wire, far) = (Frames::open(&thief.netns, "eth0"), Frames::open(&b.netns, "eth0"));

    for (claimed_mac, claimed, frame_mac, passes) in [
        (thief.mac, thief.v4, thief.mac, true),
        (thief.mac, a.v4, thief.mac, false),
        (a.mac, thief.v4, thief.mac, false),
        (thief.mac, bridge.gateway_v4(), thief.mac, false),
        (a.mac, a.v4, a.mac, false),
    ] {
        let reply = frame::arp_reply(claimed_mac, claimed, b.mac, b.v4);
        wire.send(&frame::ethernet(b.mac, frame_mac, frame::ETH_ARP, &reply));
        assert_eq!(far.sees(BRIEFLY, &reply), passes, "{claimed} at {claimed_mac:x?}");
    }
}

/// An ICMPv6 message with its checksum, in a packet with hop limit 255.
pub(crate) fn icmpv6(from: std::net::Ipv6Addr, to: std::net::Ipv6Addr, body: &[u8]) -> Vec<u8> {
    let mut pseudo = [&from.octets()[..], &to.octets(), &(body.len() as u32).to_be_bytes(), &[0, 0, 0, 58]].concat();
    pseudo.extend_from_slice(body);
    let mut body = body.to_vec();
    body[2..4].copy_from_slice(&frame::checksum(&pseudo).to_be_bytes());
    let mut packet = frame::ip(from.into(), to.into(), frame::PROTO_ICMPV6, &body);
    packet[7] = 255;
    packet
}

#[test]
fn a_container_cannot_claim_its_neighbours_ipv6_address_nor_be_a_router() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).bind(&inventory));
    let (wire, far) = (Frames::open(&thief.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let advertisement = |target: std::net::Ipv6Addr| [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &thief.mac].concat();

    for (name, body, passes) in [
        ("its own address", advertisement(thief.v6), true),
        ("a neighbour's", advertisement(a.v6), false),
        ("the gateway's", advertisement(bridge.gateway_v6()), false),
        ("a router advertisement", [&[134, 0, 0, 0, 64, 0, 7, 8][..], &[0; 8], b"lab-advert"].concat(), false),
        ("a redirect", [&[137, 0, 0, 0, 0, 0, 0, 0][..], &a.v6.octets(), &b.v6.octets()].concat(), false),
    ] {
        let packet = icmpv6(thief.v6, b.v6, &body);
        wire.send(&frame::ethernet(b.mac, thief.mac, frame::ETH_IPV6, &packet));
        assert_eq!(far.sees(BRIEFLY, &packet[4..]), passes, "{name}");
    }
}

/// An IPv6 packet in two fragments, cut after so many bytes; what comes before the payload's own protocol is in it already.
fn in_two(from: std::net::Ipv6Addr, to: std::net::Ipv6Addr, protocol: u8, payload: &[u8], cut: usize, id: u8) -> [Vec<u8>; 2] {
    let part = |offset: u16, bytes: &[u8]| {
        let header = [&[protocol, 0][..], &offset.to_be_bytes(), &[0, 0, 0, id]].concat();
        let mut packet = frame::ip(from.into(), to.into(), 44, &[&header, bytes].concat());
        packet[7] = 255;
        packet
    };
    [part(1, &payload[..cut]), part(u16::try_from(cut).unwrap(), &payload[cut..])]
}

#[test]
fn neighbour_discovery_in_fragments_is_dropped_and_a_large_ping_is_not() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).allow("thief", "b", "icmpv6/128");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&thief.netns, "eth0"), Frames::open(&b.netns, "eth0"));

    let message = |body: &[u8]| icmpv6(thief.v6, b.v6, body)[40..].to_vec();
    let claim = message(&[&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &a.v6.octets(), &[2, 1], &thief.mac, b"lab-stolen-neighb"].concat());
    let echo = message(&[&[128, 0, 0, 0, 0, 7, 0, 1][..], &[7; 64], b"lab-large-echo-re"].concat());
    // Destination options of eight bytes (RFC 8200, 4.6): one such header fills the first fragment.
    let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
    let behind_one = [&options(58)[..], &claim].concat();
    let behind_two = [&options(60)[..], &options(58), &claim].concat();
    for (id, (name, protocol, payload, marker, passes)) in [
        ("the target in the second fragment", 58, &claim, b"lab-stolen-neighb", false),
        ("all of ICMPv6 in the second fragment", 60, &behind_one, b"lab-stolen-neighb", false),
        ("a chain of headers that ends in the second fragment", 60, &behind_two, b"lab-stolen-neighb", false),
        ("an echo request", 58, &echo, b"lab-large-echo-re", true),
    ]
    .into_iter()
    .enumerate()
    {
        for packet in in_two(thief.v6, b.v6, protocol, payload, 8, id as u8) {
            wire.send(&frame::ethernet(b.mac, thief.mac, frame::ETH_IPV6, &packet));
        }
        assert_eq!(far.sees(BRIEFLY, marker), passes, "{name}");
    }
}

#[test]
fn who_takes_a_neighbours_mac_before_being_bound_gets_none_of_its_packets() {
    needs_root!();
    node!(host, bridge: a, b, thief);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, stolen) = (Frames::open(&a.netns, "eth0"), Frames::open(&thief.netns, "eth0"));
    let packet = datagram(a.mac, a.v4.into(), (&b, b.v4.into()), b"lab-for-b-and-none");

    // The bridge learns where a MAC address is from any frame.
    let claim = frame::ethernet(a.mac, b.mac, frame::ETH_ARP, &frame::arp_reply(b.mac, b.v4, a.mac, a.v4));
    stolen.send(&claim);
    wire.send(&packet);
    assert!(!stolen.sees(BRIEFLY, b"lab-for-b-and-none"));

    // Bound in the meantime: what the bridge learned stays.
    let inventory = self::inventory(&[(&bridge, &[("a", &a), ("b", &b), ("thief", &thief)])]);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).allow("a", "b", "udp/53");
    stolen.send(&claim);
    apply(&mut enforcer, &policy.bind(&inventory));
    wire.send(&packet);
    assert!(!stolen.sees(BRIEFLY, b"lab-for-b-and-none"));
}

#[test]
fn tags_and_unknown_types_do_not_cross_a_guarded_bridge() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    let udp = frame::udp((a.v4.into(), 5000), (b.v4.into(), 53), b"lab-hidden-packet");
    let inner = frame::ip(a.v4.into(), b.v4.into(), frame::PROTO_UDP, &udp);

    for (name, kind, payload) in [
        ("802.1Q", frame::ETH_VLAN, frame::vlan(0, frame::ETH_IPV4, &inner)),
        ("802.1Q with an id", frame::ETH_VLAN, frame::vlan(7, frame::ETH_IPV4, &inner)),
        ("QinQ", 0x88a8, frame::vlan(7, frame::ETH_VLAN, &frame::vlan(8, frame::ETH_IPV4, &inner))),
        ("PPPoE", 0x8864, [&[0x11, 0, 0, 1, 0, 60, 0, 0x21][..], &inner].concat()),
        ("an unknown type", 0x88b5, inner.clone()),
    ] {
        wire.send(&frame::ethernet(b.mac, a.mac, kind, &payload));
        assert!(!far.sees(BRIEFLY, b"lab-hidden-packet"), "{name}");
    }
    wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV4, &inner));
    assert!(far.sees(BRIEFLY, b"lab-hidden-packet"), "the same, untagged and allowed");
}

#[test]
fn same_bridge_traffic_is_closed_when_the_bridges_netfilter_switch_is_off() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    let open = || b.addresses().map(|at| a.netns.tcp(SocketAddr::new(at, 80)).is_open());
    assert_eq!(open(), [true, true]);

    bridge.set_nf_call(false);
    assert_eq!(open(), [false, false], "off means closed, for what is allowed too");
    assert_eq!(b.netns.ping(a.v4.into()), Echo::Silent);

    bridge.set_nf_call(true);
    assert_eq!(open(), [true, true]);
}

#[test]
fn the_first_packet_of_an_unknown_container_is_dropped_in_silence_and_its_repetition_passes() {
    needs_root!();
    node!(host, bridge: a, b);
    let late = bridge.add("late");
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "late"]).allow("late", "b", "tcp/80");
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &policy.bind(&inventory(&[(&bridge, &[("a", &a), ("b", &b)])])));

    for at in b.addresses() {
        assert_eq!(late.netns.tcp(SocketAddr::new(at, 80)), Tcp::TimedOut, "dropped, never reset: {at}");
    }
    let bound = policy.bind(&inventory(&[(&bridge, &[("a", &a), ("b", &b), ("late", &late)])]));
    // Or the neighbours it asked for above count as dead, and no SYN leaves at all.
    late.netns.ip("-4 neigh flush all");
    late.netns.ip("-6 neigh flush all");
    std::thread::scope(|scope| {
        // The SYN is sent now and again after a second; by then the address is bound.
        let patience = Duration::from_secs(4);
        let tries = b.addresses().map(|at| {
            scope.spawn({
                let late = &late.netns;
                move || late.tcp_within(SocketAddr::new(at, 80), patience)
            })
        });
        std::thread::sleep(Duration::from_millis(300));
        apply(&mut enforcer, &bound);
        for one in tries {
            assert!(one.join().unwrap().is_open());
        }
    });
}

#[test]
fn an_unknown_address_is_dropped_for_neighbours_in_learn_too_and_only_on_guarded_bridges() {
    needs_root!();
    node!(host, bridge: a, learner);
    let stranger = bridge.add("stranger");
    let _servers: Vec<_> = learner.addresses().map(|at| Server::tcp_echo(&learner.netns, SocketAddr::new(at, 80))).into();
    let inventory = inventory(&[(&bridge, &[("a", &a), ("learner", &learner)])]);
    let mut enforcer = enforcer(&host);
    let open = || learner.addresses().map(|at| stranger.netns.tcp(SocketAddr::new(at, 80)).is_open());

    apply(&mut enforcer, &Policy::default().mode(Mode::Audit, &["a"]).bind(&inventory));
    assert_eq!(open(), [true, true], "watched, not guarded");
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).bind(&inventory));
    assert_eq!(open(), [false, false]);
    apply(&mut enforcer, &Policy::default().mode(Mode::Learn, &["a"]).bind(&inventory));
    assert_eq!(open(), [true, true], "back in Learn");
}

#[test]
fn a_bridge_made_anew_under_the_same_name_is_closed_until_it_is_bound_again() {
    needs_root!();
    node!(host, bridge: a, b);
    let bound = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80");
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &policy.bind(&bound));
    // A namespace that is removed takes its interfaces along a little later: their names are needed at once.
    for port in [&a.port, &b.port] {
        host.ip(&format!("link del {port}"));
    }
    host.ip("link del br0");
    drop((a, b));
    let bridge = lab::Bridge::new(&host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
    let (a, b) = (bridge.add_at("a", 2), bridge.add_at("b", 3));
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let open = || b.addresses().map(|at| a.netns.tcp(SocketAddr::new(at, 80)).is_open());

    assert_eq!(open(), [false, false]);
    let applied = apply(&mut enforcer, &policy.bind(&bound));
    assert!(applied.changed > 0 && !applied.rules_written, "{applied:?}");
    assert_eq!(open(), [true, true]);
}

#[test]
fn the_address_of_a_stopped_container_inherits_nothing() {
    needs_root!();
    node!(host, bridge: a, b);
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "next"]).allow("a", "b", "tcp/80");
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &policy.bind(&inventory(&[(&bridge, &[("a", &a), ("b", &b)])])));
    assert!(a.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open());
    host.ip(&format!("link del {}", a.port));
    drop(a);

    // The next container gets the same addresses, and so the same MAC address, before anybody knows of it. Engines name each
    // port anew.
    let next = bridge.add_at("next", 2);
    host.ip(&format!("link set {} down", next.port));
    host.ip(&format!("link set {} name vnext", next.port));
    host.ip("link set vnext up");
    let open = || b.addresses().map(|at| next.netns.tcp(SocketAddr::new(at, 80)));
    assert_eq!(open(), [Tcp::TimedOut; 2], "not for one packet");
    let next = lab::Member { port: "vnext".into(), ..next };
    apply(&mut enforcer, &policy.bind(&inventory(&[(&bridge, &[("next", &next), ("b", &b)])])));
    // Or it asks again when its pause is over, and not at once.
    for family in ["-4", "-6"] {
        next.netns.ip(&format!("{family} neigh flush all"));
    }
    for at in b.addresses() {
        assert!(next.netns.tcp(SocketAddr::new(at, 80)).is_refused(), "known, and not allowed: {at}");
    }
}

#[test]
fn multicast_and_broadcast_do_not_cross_a_guarded_bridge() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a"]).egress("a", "b", "udp/5353");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&b.netns, "eth0"), Frames::open(&a.netns, "eth0"));
    for (mac, from, to) in [
        ([1, 0, 0x5e, 0, 0, 251], IpAddr::from(b.v4), "224.0.0.251"),
        ([255; 6], b.v4.into(), "255.255.255.255"),
        ([255; 6], b.v4.into(), "10.1.0.255"),
        ([0x33, 0x33, 0, 0, 0, 0xfb], b.v6.into(), "ff02::fb"),
        ([0x33, 0x33, 0, 0, 0, 1], b.v6.into(), "ff02::1"),
        ([0x33, 0x33, 0, 0, 0, 1], b.v6.into(), "ff05::1:3"),
    ] {
        let to: IpAddr = to.parse().unwrap();
        let udp = frame::udp((from, 5353), (to, 5353), b"lab-to-everybody");
        let kind = if from.is_ipv4() { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
        wire.send(&frame::ethernet(mac, b.mac, kind, &frame::ip(from, to, frame::PROTO_UDP, &udp)));
        assert!(!far.sees(BRIEFLY, b"lab-to-everybody"), "{to}");
    }
}
