//! What is allowed passes, what is not does not: TCP, UDP, ICMP, SCTP, ranges, networks outside, both IP versions.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Bridge, Echo, Internet, Member, Netns, Server, Tcp, needs_root};
use policy::Mode;

use crate::stage::{Policy, apply, enforcer, inventory, settled};

fn echo(member: &Member, ports: &[u16]) -> Vec<Server> {
    let each = |at: IpAddr| ports.iter().map(move |&port| SocketAddr::new(at, port));
    member.addresses().into_iter().flat_map(each).map(|at| Server::tcp_echo(&member.netns, at)).collect()
}

#[test]
fn an_allowed_tcp_edge_passes_and_a_second_one_is_denied() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let _servers = echo(&b, &[80, 81]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert!(a.netns.tcp_echo(SocketAddr::new(at, 80), b"hello"), "{at}");
        let Tcp::Refused(after) = a.netns.tcp(SocketAddr::new(at, 81)) else { panic!("{at}: not refused") };
        assert!(after < Duration::from_millis(500), "an application fails at once");
        assert!(c.netns.tcp(SocketAddr::new(at, 80)).is_refused(), "{at}");
    }
    for at in a.addresses() {
        assert!(b.netns.tcp(SocketAddr::new(at, 80)).is_refused(), "the other way round: {at}");
    }
}

#[test]
fn one_side_alone_is_not_enough_if_both_ends_are_in_enforce() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let servers = echo(&b, &[80, 81, 82]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a", "b"])
        .egress("a", "b", "tcp/80")
        .ingress("b", "a", "tcp/81")
        .ingress("b", "c", "tcp/82");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert!(a.netns.tcp(SocketAddr::new(at, 80)).is_refused(), "no ingress rule: {at}");
        assert!(a.netns.tcp(SocketAddr::new(at, 81)).is_refused(), "no egress rule: {at}");
        // c is in no segment: only the server's side counts.
        assert!(c.netns.tcp_echo(SocketAddr::new(at, 82), b"hi"), "{at}");
        assert!(c.netns.tcp(SocketAddr::new(at, 80)).is_refused(), "{at}");
    }
    let heard: u64 = servers.iter().map(Server::heard).sum();
    assert_eq!(heard, 2, "what is denied never arrives");
}

#[test]
fn udp_passes_where_allowed_and_else_gets_an_icmp_error() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _servers: Vec<_> =
        b.addresses().into_iter().flat_map(|at| [53, 54].map(|port| Server::udp_echo(&b.netns, SocketAddr::new(at, port)))).collect();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert_eq!(a.netns.udp_echo(SocketAddr::new(at, 53), b"question"), Echo::Answered, "{at}");
        assert_eq!(a.netns.udp_echo(SocketAddr::new(at, 54), b"question"), Echo::Refused, "{at}");
    }
}

#[test]
fn icmp_passes_by_its_type() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a", "b", "c"])
        .allow("a", "b", "icmp/8")
        .allow("a", "b", "icmpv6/128")
        .allow("c", "b", "icmp/13")
        .allow("c", "b", "icmpv6/129");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert_eq!(a.netns.ping(at), Echo::Answered, "{at}");
        assert_ne!(c.netns.ping(at), Echo::Answered, "another type is not an echo request: {at}");
    }
    for at in a.addresses() {
        assert_ne!(b.netns.ping(at), Echo::Answered, "{at}");
    }
}

#[test]
fn sctp_passes_where_allowed_and_only_there() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "sctp/2905");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));

    for (from, to, kind) in [(a.addresses()[0], b.addresses()[0], frame::ETH_IPV4), (a.addresses()[1], b.addresses()[1], frame::ETH_IPV6)] {
        for (port, tag, passes) in [(2905, 0xb0a7_0001_u32, true), (2906, 0xb0a7_0002, false)] {
            let packet = frame::ip(from, to, frame::PROTO_SCTP, &frame::sctp_init(5000, port, tag));
            wire.send(&frame::ethernet(b.mac, a.mac, kind, &packet));
            assert_eq!(far.sees(Duration::from_millis(400), &tag.to_be_bytes()), passes, "{to} port {port}");
        }
    }
}

#[test]
fn a_protocol_without_ports_passes_by_its_number() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "ip47");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));

    for (protocol, passes) in [(47, true), (50, false)] {
        let marker = [b"lab-ip-proto", &[protocol][..]].concat();
        let packet = frame::ip(a.v4.into(), b.v4.into(), protocol, &marker);
        wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV4, &packet));
        assert_eq!(far.sees(Duration::from_millis(400), &marker), passes, "protocol {protocol}");
    }
}

#[test]
fn a_range_allows_its_ports_and_no_others() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _servers = echo(&b, &[7999, 8000, 8005, 8010, 8011]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a", "b"])
        .allow("a", "b", "tcp/8000-8006")
        // Overlaps: the kernel's interval sets refuse that, a policy may say it.
        .allow("a", "b", "tcp/8004-8010")
        .allow("a", "b", "tcp/8005");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        for (port, passes) in [(7999, false), (8000, true), (8005, true), (8010, true), (8011, false)] {
            assert_eq!(a.netns.tcp(SocketAddr::new(at, port)).is_open(), passes, "{at} {port}");
        }
    }
}

#[test]
fn outside_means_beyond_every_bridge_by_address_and_by_network() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut other = Bridge::new(&host, "br1", "198.51.100.0/25", "2001:db8:2::/64");
    let c = other.add("c");
    let internet = Internet::behind(&host);
    internet.netns.ip("route add default via 203.0.113.2");
    internet.netns.ip("-6 route add default via 2001:db8:ffff::2");
    let places: Vec<IpAddr> =
        ["192.0.2.10", "192.0.2.11", "198.51.100.200", "2001:db8:a::1", "2001:db8:b::1"].map(|a| a.parse().unwrap()).into();
    places.iter().for_each(|&at| internet.add_address(at));
    settled(&internet.netns);
    let _outside: Vec<_> =
        places.iter().flat_map(|&at| [443, 444].map(|port| Server::tcp_echo(&internet.netns, SocketAddr::new(at, port)))).collect();
    let _inside: Vec<_> = c.addresses().map(|at| Server::tcp_echo(&c.netns, SocketAddr::new(at, 443))).into();
    let host_server = Server::tcp_echo(&host, "0.0.0.0:443".parse().unwrap());
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&other, &[("c", &c)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a"])
        .egress("a", "outside:192.0.2.10", "tcp/443")
        .egress("a", "outside:198.51.100.0/24", "tcp/443")
        .egress("a", "outside:2001:db8:a::/48", "tcp/443-444")
        // Covers everything, the bridges' and the node's addresses too: they are not outside all the same.
        .egress("a", "outside:0.0.0.0/0", "tcp/445")
        .egress("b", "outside:0.0.0.0/0", "tcp/1-65535")
        .mode(Mode::Enforce, &["b"]);
    apply(&mut enforcer, &policy.bind(&inventory));

    let reaches = |at: &str| a.netns.tcp(at.parse().unwrap()).is_open();
    assert!(reaches("192.0.2.10:443"));
    assert!(!reaches("192.0.2.10:444"));
    assert!(!reaches("192.0.2.11:443"));
    assert!(reaches("198.51.100.200:443"));
    assert!(reaches("[2001:db8:a::1]:444"));
    assert!(!reaches("[2001:db8:b::1]:443"));
    assert!(!reaches(&format!("{}:443", c.v4)), "a container on another bridge is not outside, whatever its address");
    assert!(b.netns.tcp("192.0.2.11:444".parse().unwrap()).is_open());
    assert!(!b.netns.tcp(SocketAddr::new(c.v4.into(), 443)).is_open());
    assert!(!b.netns.tcp(SocketAddr::new(bridge.gateway_v4().into(), 443)).is_open(), "the node is not outside");
    assert!(!b.netns.tcp("203.0.113.2:443".parse().unwrap()).is_open(), "by none of its addresses");
    assert_eq!(host_server.heard(), 0);
}

#[test]
fn ingress_from_outside_is_held_to_its_networks() {
    needs_root!();
    node!(host, bridge: a, b);
    let internet = Internet::behind(&host);
    internet.netns.ip("route add default via 203.0.113.2");
    internet.add_address("192.0.2.10".parse().unwrap());
    let _servers = echo(&a, &[80]);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a"]).ingress("a", "outside:203.0.113.0/30", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    let at = SocketAddr::new(a.v4.into(), 80);

    assert!(internet.netns.tcp(at).is_open());
    assert!(!b.netns.tcp(at).is_open(), "a container is never outside");
    internet.netns.ip("addr add 203.0.113.5/32 dev lo");
    internet.netns.ip(&format!("route add {} via 203.0.113.2 src 203.0.113.5", a.v4));
    assert!(!internet.netns.tcp(at).is_open(), "another address outside");
}

#[test]
fn two_bridges_with_one_subnet_are_told_apart() {
    needs_root!();
    let host = Netns::new("host");
    let mut one = Bridge::new(&host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
    let (a, b) = (one.add("a"), one.add("b"));
    let mut two = Bridge::new(&host, "br1", "10.1.0.0/24", "2001:db8:1::/64");
    let (c, d) = (two.add("c"), two.add("d"));
    let _servers: Vec<_> = [&b, &d].into_iter().flat_map(|member| echo(member, &[80])).collect();
    settled(&host);
    let inventory = inventory(&[(&one, &[("a", &a), ("b", &b)]), (&two, &[("c", &c), ("d", &d)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c", "d"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert!(a.netns.tcp(SocketAddr::new(at, 80)).is_open(), "{at}");
        // c and d have the very addresses of a and b, on the other bridge.
        assert!(!c.netns.tcp(SocketAddr::new(at, 80)).is_open(), "{at}");
    }
}

#[test]
fn a_container_on_two_networks_is_held_on_both() {
    needs_root!();
    let host = Netns::new("host");
    let mut one = Bridge::new(&host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
    let (a, b) = (one.add("a"), one.add("b"));
    let mut two = Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let (c, second) = (two.add("c"), two.add("second"));
    let _servers = [echo(&b, &[80]), echo(&second, &[80])];
    // b and `second` are two legs of one container.
    settled(&host);
    let inventory = inventory(&[(&one, &[("a", &a), ("b", &b)]), (&two, &[("c", &c), ("b", &second)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["b"]).ingress("b", "a", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    for (one, two) in b.addresses().into_iter().zip(second.addresses()) {
        assert!(a.netns.tcp(SocketAddr::new(one, 80)).is_open(), "{one}");
        assert!(a.netns.tcp(SocketAddr::new(two, 80)).is_open(), "its other leg, across bridges: {two}");
        assert!(!c.netns.tcp(SocketAddr::new(two, 80)).is_open(), "{two}");
    }
}

#[test]
fn what_is_denied_is_dropped_in_silence_where_the_segment_asks_for_it() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().silent(&["a", "b"]).bind(&inventory));
    for at in b.addresses() {
        assert_eq!(a.netns.tcp(SocketAddr::new(at, 80)), Tcp::TimedOut, "{at}");
        assert_eq!(a.netns.udp_echo(SocketAddr::new(at, 80), b"?"), Echo::Silent, "{at}");
    }
}
