//! What came of a flow: use, or an attempt, or nothing at all.

use std::net::UdpSocket;
use std::time::Duration;

use lab::probe::{Echo, Tcp};
use lab::{Bridge, Member, Netns, Server, frame, needs_root};
use node_agent::observe::Options;

use crate::node::{Node, Watching};

fn pair(host: &Netns) -> (Bridge<'_>, Member, Member) {
    let mut bridge = Bridge::new(host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    (bridge, a, b)
}

/// Time-outs of the kernel short enough for a test, and frequent sweeps.
fn watch(host: &Netns, node: Node) -> Watching {
    for (key, seconds) in [("udp_timeout", 2), ("udp_timeout_stream", 2), ("icmp_timeout", 2), ("tcp_timeout_syn_sent", 2)] {
        host.set_sysctl(&format!("net.netfilter.nf_conntrack_{key}"), &seconds.to_string());
    }
    node.observe_with(host, Options { sweep: Duration::from_millis(500), ..Options::default() })
}

#[test]
fn a_syn_to_a_closed_port_is_an_attempt_and_no_service() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    for address in b.addresses() {
        assert!(a.netns.tcp((address, 81).into()).is_refused());
    }
    let seen = watching.until("a -> b tcp/81", |seen| seen.refused == 2);
    assert_eq!(seen.used(), 0);
}

#[test]
fn a_syn_that_nobody_answers_is_an_attempt() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    b.netns.nft("add table inet t; add chain inet t in { type filter hook input priority 0; }; add rule inet t in tcp dport 82 drop");
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    assert_eq!(a.netns.tcp_within((b.v4, 82).into(), Duration::from_millis(500)), Tcp::TimedOut);
    let seen = watching.until("a -> b tcp/82", |seen| seen.unanswered == 1);
    assert_eq!(seen.used(), 0);
}

#[test]
fn a_connect_scan_is_connected_without_data_or_refused() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _servers: Vec<_> = (8000..8003).map(|port| Server::tcp_echo(&b.netns, (b.v4, port).into())).collect();
    for port in 8000..8010 {
        a.netns.tcp((b.v4, port).into());
    }
    for port in 8000..8010 {
        let seen = watching.until(&format!("a -> b tcp/{port}"), |seen| seen.used() + seen.attempts() == 1);
        assert_eq!((seen.connected_no_data, seen.refused, seen.established), if port < 8003 { (1, 0, 0) } else { (0, 1, 0) }, "{port}");
    }
}

#[test]
fn a_syn_scan_is_never_use() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _server = Server::tcp_echo(&b.netns, (b.v4, 8000).into());
    let frames = frame::Frames::open(&a.netns, "eth0");
    for port in [8000, 8001] {
        // The scanner's own kernel answers the SYN-ACK with a reset, as it does for nmap -sS.
        let syn = frame::tcp((a.v4.into(), 40_000 + port), (b.v4.into(), port), 1, 2);
        frames.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV4, &frame::ip(a.v4.into(), b.v4.into(), frame::PROTO_TCP, &syn)));
    }
    for port in [8000, 8001] {
        watching.within(Duration::from_secs(25), &format!("a -> b tcp/{port}"), |seen| seen.attempts() == 1);
    }
    assert_eq!(watching.used(), [""; 0]);
}

#[test]
fn a_connection_that_carries_nothing_but_stays_is_reported_once_it_is_closed_and_counts_its_bytes() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    let stream = a.netns.connect((b.v4, 80).into(), Duration::from_secs(1)).unwrap();
    watching.settle();
    assert!(watching.evidence("a -> b tcp/80").is_none(), "NEW alone is nothing:\n{}", watching.text());
    drop(stream);
    let seen = watching.until("a -> b tcp/80", |seen| seen.connected_no_data == 1);
    assert!(seen.bytes_sent > 100 && seen.bytes_sent < 400, "{seen:?}");
}

#[test]
fn a_long_flow_grows_by_what_it_carries_and_is_counted_once() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    let mut stream = a.netns.connect((b.v4, 80).into(), Duration::from_secs(1)).unwrap();
    assert!(lab::probe::still_echoes(&mut stream, &[b'x'; 500]));
    let first = watching.until("a -> b tcp/80", |seen| seen.bytes_sent > 500);
    assert!(lab::probe::still_echoes(&mut stream, &[b'x'; 500]));
    let second = watching.until("a -> b tcp/80", |seen| seen.bytes_sent > first.bytes_sent + 500);
    assert_eq!((first.established, second.established), (1, 1));
    assert!(second.last > first.last);
    drop(stream);
    watching.settle();
    let last = watching.evidence("a -> b tcp/80").unwrap();
    assert_eq!(last.used(), 1);
    assert!(last.bytes_sent < 1000 + 52 * 20 && last.bytes_received < 1000 + 52 * 20, "counted twice: {last:?}");
}

#[test]
fn udp_that_repeats_unanswered_and_unrefused_is_one_way() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    for address in b.addresses() {
        let _sink = Server::udp_sink(&b.netns, (address, 8125).into());
        let socket = a.netns.udp_socket((address, 8125).into());
        for _ in 0..3 {
            socket.send_to(b"hits:1|c", (address, 8125)).unwrap();
        }
    }
    let seen = watching.until("a -> b udp/8125", |seen| seen.one_way == 2);
    assert_eq!((seen.established, seen.attempts()), (0, 0));
}

#[test]
fn udp_that_is_sent_once_from_each_of_many_ports_is_one_way_from_the_second_on() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _sink = Server::udp_sink(&b.netns, (b.v4, 514).into());
    for _ in 0..3 {
        a.netns.udp_send((b.v4, 514).into(), b"<13>hello");
    }
    watching.until("a -> b udp/514", |seen| seen.one_way == 2 && seen.unanswered == 1);
}

#[test]
fn udp_that_is_refused_by_an_icmp_error_is_refused_however_often_it_is_sent() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    for address in b.addresses() {
        let socket = a.netns.udp_socket((address, 99).into());
        for _ in 0..3 {
            let _ = socket.send_to(b"x", (address, 99));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // Refused by the host itself, too.
    assert_eq!(a.netns.udp_echo((bridge.gateway_v4(), 99).into(), b"x"), Echo::Refused);
    let seen = watching.until("a -> b udp/99", |seen| seen.refused == 2);
    assert_eq!((seen.used(), seen.unanswered), (0, 0));
    watching.until("a -> host: udp/99", |seen| seen.refused == 1);
}

#[test]
fn udp_in_exactly_the_reverse_direction_is_the_answer_and_no_edge() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let bind = |member: &Member, port: u16| member.netns.run(|| UdpSocket::bind((member.v4, port)).unwrap());
    let (client, server) = (bind(&a, 5000), bind(&b, 6000));
    client.send_to(b"question", (b.v4, 6000)).unwrap();
    // Conntrack has forgotten the question by then.
    watching.until("a -> b udp/6000", |seen| seen.unanswered == 1);
    server.send_to(b"answer", (a.v4, 5000)).unwrap();
    watching.until("a -> b udp/6000", |seen| seen.established == 1);
    watching.settle();
    assert_eq!(watching.used(), ["a -> b udp/6000"]);
    assert!(watching.evidence("b -> a udp/5000").is_none());
}

#[test]
fn tcp_and_udp_on_one_port_are_two_edges() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    let _servers = (Server::tcp_echo(&b.netns, (b.v4, 53).into()), Server::udp_echo(&b.netns, (b.v4, 53).into()));
    assert!(a.netns.tcp_echo((b.v4, 53).into(), b"x"));
    assert_eq!(a.netns.udp_echo((b.v4, 53).into(), b"x"), Echo::Answered);
    watching.until("a -> b tcp/53", |seen| seen.established == 1);
    watching.until("a -> b udp/53", |seen| seen.established == 1);
}

#[test]
fn the_direction_comes_from_the_first_packet_and_not_from_port_numbers() {
    needs_root!();
    let host = Netns::new("host");
    let (bridge, a, b) = pair(&host);
    let mut watching = watch(&host, Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b));
    // A client on a port below 1024 (rsh, NFS), a server on a high one.
    let _server = Server::udp_echo(&b.netns, (b.v4, 50_051).into());
    let client = a.netns.run(|| UdpSocket::bind((a.v4, 1023)).unwrap());
    client.send_to(b"x", (b.v4, 50_051)).unwrap();
    watching.until("a -> b udp/50051", |seen| seen.established == 1);
    assert_eq!(watching.used().len(), 1);
}
