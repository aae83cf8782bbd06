//! Connections that are asked for one by one: what a dump says of them, and an end for those whose time is over.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::probe::Echo;
use lab::{Bridge, Member, Netns, Server, eventually, frame, needs_root};
use node_agent::observe::conntrack;
use policy::Protocol;
use policy::track::Entry;

/// What this bridge carries has its place in the kernel's table.
fn tracked(bridge: &Bridge<'_>, host: &Netns) {
    bridge.set_nf_call(true);
    host.nft("add table inet t; add chain inet t d { type filter hook forward priority 0; }; add rule inet t d ct state new accept");
}

fn table(host: &Netns) -> Vec<Entry> {
    let mut all = Vec::new();
    host.run(|| conntrack::dump(|entry| all.push(entry), |why| panic!("{why}")).unwrap());
    all.sort_by_key(Entry::key);
    all
}

fn asked(host: &Netns, of: &[Entry]) -> Vec<Entry> {
    let (mut all, keys) = (Vec::new(), of.iter().map(Entry::key).collect::<Vec<_>>());
    host.run(|| conntrack::look_up(&keys, |entry| all.push(entry), |why| panic!("{why}")).unwrap());
    all.sort_by_key(Entry::key);
    all
}

/// So many flows of UDP, of one datagram each.
fn flows(from: &Member, to: IpAddr, count: usize) {
    from.netns.run(|| {
        let source: IpAddr = if to.is_ipv4() { from.v4.into() } else { from.v6.into() };
        let sockets: Vec<UdpSocket> = (0..count).map(|_| UdpSocket::bind((source, 0)).unwrap()).collect();
        sockets.iter().for_each(|socket| assert_eq!(socket.send_to(b"x", (to, 9)).unwrap(), 1));
    });
}

#[test]
fn what_is_asked_for_is_what_a_dump_shows_of_every_protocol_and_zone() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    tracked(&bridge, &host);
    host.nft("add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c udp dport 9 ct zone set 7");
    let (_sink, _echo) = (Server::udp_sink(&b.netns, (b.v4, 9).into()), Server::tcp_echo(&b.netns, (b.v4, 80).into()));
    for to in b.addresses() {
        flows(&a, to, 40);
        a.netns.run(|| std::net::TcpStream::connect((to, 81)).unwrap_err());
        assert_eq!(a.netns.ping(to), Echo::Answered);
    }
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    // SCTP, a protocol of which the kernel knows no ports, and one that it makes some of.
    let frames = frame::Frames::open(&a.netns, "eth0");
    for (protocol, payload) in [(frame::PROTO_SCTP, frame::sctp_init(3000, 3868, 7)), (50, vec![0; 16]), (47, vec![0; 16])] {
        for (kind, (from, to)) in [frame::ETH_IPV4, frame::ETH_IPV6].into_iter().zip(a.addresses().into_iter().zip(b.addresses())) {
            frames.send(&frame::ethernet(b.mac, a.mac, kind, &frame::ip(from, to, protocol, &payload)));
        }
    }
    thread::sleep(Duration::from_millis(100));
    let dumped = table(&host);
    let [esp, gre] = [50, 47].map(Protocol::from_number);
    for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Icmp, Protocol::Icmpv6, Protocol::Sctp, esp, gre] {
        assert!(dumped.iter().any(|entry| entry.original.protocol == protocol), "{protocol:?} in {dumped:?}");
    }
    assert!(dumped.iter().any(|entry| entry.zone == 7) && dumped.len() > 80, "{dumped:?}");
    assert_eq!(asked(&host, &dumped), dumped);
}

#[test]
fn whatever_a_dump_shows_can_be_ended() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    tracked(&bridge, &host);
    host.nft("add chain inet t c { type filter hook prerouting priority -300; }; add rule inet t c udp dport 7 ct original zone set 5");
    let frames = frame::Frames::open(&a.netns, "eth0");
    let send = |kind, from: IpAddr, to: IpAddr, protocol, payload: &[u8]| {
        frames.send(&frame::ethernet(b.mac, a.mac, kind, &frame::ip(from, to, protocol, payload)));
    };
    let ([from4, from6], [to4, to6]) = (a.addresses(), b.addresses());
    // A request with a code, which no program sends, is a connection of its own; an address of IPv4 within IPv6; a zone of one direction.
    let mut echo = vec![8, 1, 0, 0, 0, 7, 0, 1];
    let sum = frame::checksum(&echo);
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    send(frame::ETH_IPV4, from4, to4, 1, &echo);
    let mapped: IpAddr = "::ffff:192.0.2.7".parse().unwrap();
    send(frame::ETH_IPV6, mapped, to6, 17, &frame::udp((mapped, 40_000), (to6, 9), b"x"));
    send(frame::ETH_IPV6, from6, to6, 17, &frame::udp((from6, 40_000), (to6, 7), b"x"));
    send(frame::ETH_IPV4, from4, to4, 17, &frame::udp((from4, 40_000), (to4, 7), b"x"));
    send(frame::ETH_IPV4, from4, to4, 47, &[0; 16]);
    thread::sleep(Duration::from_millis(200));
    let mut shown = Vec::new();
    host.run(|| conntrack::dump_shown(|entry, shown_as| shown.push((entry, shown_as.held())), |why| panic!("{why}")).unwrap());
    assert!(shown.len() >= 5, "{shown:#?}");
    for (entry, held) in &shown {
        assert!(host.run(|| conntrack::let_live(held)).is_ok(), "{entry:?}");
        assert!(host.run(|| conntrack::delete(held)).unwrap(), "{entry:?} is not found");
    }
    let ours = |entry: &Entry| shown.iter().any(|(known, _)| known.key() == entry.key());
    assert!(!table(&host).iter().any(ours));
}

#[test]
fn what_has_expired_is_not_found_and_leaves_the_table() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    tracked(&bridge, &host);
    host.set_sysctl("net.netfilter.nf_conntrack_udp_timeout", "1");
    let _sink = Server::udp_sink(&b.netns, (b.v4, 9).into());
    flows(&a, b.v4.into(), 40);
    let dumped = table(&host);
    assert!(dumped.len() >= 40, "{dumped:?}");
    eventually(Duration::from_secs(10), || {
        let mut found = asked(&host, &dumped);
        found.retain(|entry| entry.original.protocol == Protocol::Udp);
        let left = host.sysctl("net.netfilter.nf_conntrack_count").unwrap();
        // The host's own reports of its groups stay for ten minutes.
        let others = table(&host).iter().filter(|entry| entry.original.protocol != Protocol::Udp).count();
        if found.is_empty() && left == others.to_string() { Ok(()) } else { Err(format!("{found:?}, {left} are left, {others} of others")) }
    });
}
