//! From where to where a flow may go: one edge each, between the right ends, on the server's own port.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use lab::probe::Echo;
use lab::{Bridge, Internet, Netns, Server, eventually, frame, needs_root};
use policy::evidence::Road;

use crate::node::{Node, published};

/// Waits for the links just made: until then the kernel's own checks of IPv6 addresses are on the way.
fn reachable(client: &Netns, addresses: &[IpAddr]) {
    for address in addresses {
        let ping = || if client.ping(*address) == Echo::Answered { Ok(()) } else { Err(format!("{address} does not answer")) };
        eventually(Duration::from_secs(10), ping);
    }
}

#[test]
fn a_tcp_connection_on_one_bridge_is_one_edge_with_both_names() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let mut watching = Node::with(&[&bridge]).runs("shop/web", &bridge, &web).runs("shop/db", &bridge, &db).observe(&host);
    assert_eq!(watching.account().blind, [""; 0]);
    for address in db.addresses() {
        let _server = Server::tcp_echo(&db.netns, (address, 5432).into());
        assert!(web.netns.tcp_echo((address, 5432).into(), b"select 1"));
    }
    let seen = watching.until("shop/web -> shop/db tcp/5432", |seen| seen.established == 2);
    assert_eq!((seen.used(), seen.attempts(), seen.pre_existing), (2, 0, 0));
    assert_eq!(watching.used(), ["shop/web -> shop/db tcp/5432"]);
}

#[test]
fn udp_is_recorded_in_both_directions_and_on_every_port() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    for (client, server, port) in [(&a, &b, 53), (&a, &b, 8125), (&b, &a, 60_000)] {
        for address in server.addresses() {
            let _server = Server::udp_echo(&server.netns, (address, port).into());
            assert_eq!(client.netns.udp_echo((address, port).into(), b"question"), Echo::Answered);
        }
    }
    for edge in ["a -> b udp/53", "a -> b udp/8125", "b -> a udp/60000"] {
        watching.until(edge, |seen| seen.established == 2);
    }
    assert_eq!(watching.used().len(), 3, "{}", watching.text());
}

#[test]
fn icmp_is_icmp_with_the_type_of_its_request() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    for address in b.addresses() {
        assert_eq!(a.netns.ping(address), Echo::Answered);
    }
    watching.until("a -> b icmp/8", |seen| seen.established == 1);
    watching.until("a -> b icmpv6/128", |seen| seen.established == 1);
    assert_eq!(watching.used().len(), 2, "{}", watching.text());
}

#[test]
fn sctp_is_sctp_and_an_abort_is_a_refusal() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    let (client, server) = (frame::Frames::open(&a.netns, "eth0"), frame::Frames::open(&b.netns, "eth0"));
    let say = |from: &lab::Member, to: &lab::Member, frames: &frame::Frames, index: usize, chunk: &[u8]| {
        let packet = frame::ip(from.addresses()[index], to.addresses()[index], frame::PROTO_SCTP, chunk);
        let kind = [frame::ETH_IPV4, frame::ETH_IPV6][index];
        frames.send(&frame::ethernet(to.mac, from.mac, kind, &packet));
        thread::sleep(Duration::from_millis(30));
    };
    for index in 0..2 {
        say(&a, &b, &client, index, &frame::sctp_init(3000, 3868, 7));
        say(&b, &a, &server, index, &frame::sctp_init_ack(3868, 3000, 7, 9));
        say(&a, &b, &client, index, &frame::sctp_cookie_echo(3000, 3868, 9));
        say(&b, &a, &server, index, &frame::sctp_cookie_ack(3868, 3000, 7));
        say(&a, &b, &client, index, &frame::sctp_init(3001, 3869, 7));
        // ABORT (RFC 9260, 3.3.7).
        say(&b, &a, &server, index, &frame::sctp(3869, 3001, 7, &[6, 0, 0, 4]));
    }
    watching.until("a -> b sctp/3868", |seen| seen.established == 2);
    watching.until("a -> b sctp/3869", |seen| seen.refused == 2);
    assert_eq!(watching.used(), ["a -> b sctp/3868"]);
}

#[test]
fn a_flow_from_bridge_to_bridge_has_both_names() {
    needs_root!();
    let host = Netns::new("host");
    let mut front = Bridge::new(&host, "front", "10.9.1.0/24", "fd09:1::/64");
    let mut back = Bridge::new(&host, "back", "10.9.2.0/24", "fd09:2::/64");
    let (web, db) = (front.add("web"), back.add("db"));
    reachable(&web.netns, &db.addresses());
    let mut watching = Node::with(&[&front, &back]).runs("web", &front, &web).runs("db", &back, &db).observe(&host);
    for address in db.addresses() {
        let _server = Server::tcp_echo(&db.netns, (address, 5432).into());
        assert!(web.netns.tcp_echo((address, 5432).into(), b"x"));
    }
    watching.until("web -> db tcp/5432", |seen| seen.established == 2);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn a_masqueraded_flow_to_outside_keeps_its_client_and_its_address() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let web = bridge.add("web");
    let mut internet = Internet::behind(&host);
    internet.serve_http("198.51.100.7".parse().unwrap(), 443, "ok");
    internet.serve_http("2001:db8:7::7".parse().unwrap(), 443, "ok");
    host.nft(
        "add table ip nat; add chain ip nat post { type nat hook postrouting priority 100; }; add rule ip nat post oifname up0 masquerade",
    );
    host.nft("add table ip6 nat; add chain ip6 nat post { type nat hook postrouting priority 100; }; add rule ip6 nat post oifname up0 masquerade");
    reachable(&web.netns, &["198.51.100.7".parse().unwrap(), "2001:db8:7::7".parse().unwrap()]);
    let mut watching = Node::with(&[&bridge]).runs("web", &bridge, &web).observe(&host);
    web.netns.http_get("198.51.100.7:443".parse().unwrap(), "/").unwrap();
    web.netns.http_get("[2001:db8:7::7]:443".parse().unwrap(), "/").unwrap();
    watching.until("web -> outside:198.51.100.7 tcp/443", |seen| seen.established == 1);
    watching.until("web -> outside:2001:db8:7::7 tcp/443", |seen| seen.established == 1);
    // The pings were answered before the observer came: imported, and from the right end.
    watching.until("web -> outside:198.51.100.7 icmp/8", |seen| seen.pre_existing == 1);
    assert!(watching.used().iter().all(|edge| edge.starts_with("web -> outside:")), "{}", watching.text());
}

fn publish(host: &Netns, address: &str, to: &str) {
    host.nft(&format!(
        "add table ip nat; add chain ip nat pre {{ type nat hook prerouting priority -100; }}; \
         add chain ip nat out {{ type nat hook output priority -100; }}; \
         add rule ip nat pre ip daddr {address} tcp dport 8080 dnat to {to}; \
         add rule ip nat out ip daddr {address} tcp dport 8080 dnat to {to}"
    ));
}

#[test]
fn a_published_port_is_the_containers_port_whoever_comes_by_it() {
    needs_root!();
    let host = Netns::new("host");
    let mut front = Bridge::new(&host, "front", "10.9.1.0/24", "fd09:1::/64");
    let mut back = Bridge::new(&host, "back", "10.9.2.0/24", "fd09:2::/64");
    let (web, other) = (front.add("web"), back.add("other"));
    let internet = Internet::behind(&host);
    publish(&host, lab::internet::HOST_V4, &format!("{}:80", web.v4));
    let node = Node::with(&[&front, &back]).host(&[lab::internet::HOST_V4]).runs("other", &back, &other);
    let mut watching = node.container("web", &front, &web, |c| c.published = published(8080, 80).into()).observe(&host);
    let _server = Server::http(&web.netns, (web.v4, 80).into(), "ok");
    let at: SocketAddr = format!("{}:8080", lab::internet::HOST_V4).parse().unwrap();
    for client in [&internet.netns, &other.netns, &host] {
        client.http_get(at, "/").unwrap();
    }
    for edge in ["outside:203.0.113.1 -> web tcp/80", "other -> web tcp/80", "host: -> web tcp/80"] {
        let seen = watching.until(edge, |seen| seen.established == 1);
        assert_eq!(seen.roads, [Road::Published].into(), "{edge}");
    }
    assert_eq!(watching.used().len(), 3, "{}", watching.text());
}

#[test]
fn a_workload_that_reaches_its_own_published_port_is_an_edge_to_itself() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let web = bridge.add("web");
    publish(&host, "10.9.1.1", &format!("{}:80", web.v4));
    host.nft("add chain ip nat post { type nat hook postrouting priority 100; }; add rule ip nat post oifname br0 ip saddr 10.9.1.0/24 masquerade");
    host.ip(&format!("link set {} type bridge_slave hairpin on", web.port));
    let mut watching = Node::with(&[&bridge]).container("web", &bridge, &web, |c| c.published = published(8080, 80).into()).observe(&host);
    let _server = Server::http(&web.netns, (web.v4, 80).into(), "ok");
    web.netns.http_get("10.9.1.1:8080".parse().unwrap(), "/").unwrap();
    watching.until("web -> web tcp/80", |seen| seen.established == 1 && seen.roads == [Road::Published].into());
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn host_and_container_meet_in_both_directions() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let web = bridge.add("web");
    let mut watching = Node::with(&[&bridge]).runs("web", &bridge, &web).observe(&host);
    let gateways: [IpAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()];
    for (mine, theirs) in gateways.into_iter().zip(web.addresses()) {
        let _there = Server::tcp_echo(&web.netns, (theirs, 80).into());
        assert!(host.tcp_echo((theirs, 80).into(), b"x"));
        // The host speaks first and the container only listens.
        let _here = Server::speaks_first(&host, (mine, 25).into(), "220 hello");
        let mut stream = web.netns.connect((mine, 25).into(), Duration::from_secs(2)).unwrap();
        assert!(stream.read(&mut [0; 64]).unwrap() > 0);
    }
    // The node with itself concerns nobody.
    let _own = Server::tcp_echo(&host, "127.0.0.1:9".parse().unwrap());
    assert!(host.tcp_echo("127.0.0.1:9".parse().unwrap(), b"x"));
    watching.until("host: -> web tcp/80", |seen| seen.established == 2);
    watching.until("web -> host: tcp/25", |seen| seen.established == 2);
    assert_eq!(watching.used().len(), 2, "{}", watching.text());
}

/// What the engine's user-land proxy does: accepts on the node, dials the container from the node.
fn proxy(host: &Netns, at: SocketAddr, to: SocketAddr) {
    host.run(|| {
        let listener = TcpListener::bind(at).unwrap();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // The thread inherits the namespace.
                thread::spawn(move || relay(client, to));
            }
        });
    });
}

fn relay(mut client: TcpStream, to: SocketAddr) {
    let Ok(mut server) = TcpStream::connect(to) else { return };
    let (mut from, mut back) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let up = thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut server);
        let _ = server.shutdown(std::net::Shutdown::Write);
    });
    let _ = std::io::copy(&mut back, &mut client);
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = up.join();
}

#[test]
fn the_user_land_proxy_is_one_edge_from_its_client_and_its_own_leg_is_none() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let internet = Internet::behind(&host);
    let node = Node::with(&[&bridge]).host(&[lab::internet::HOST_V4]).runs("web", &bridge, &web);
    let mut watching = node.container("db", &bridge, &db, |c| c.published = published(8080, 80).into()).observe(&host);
    let _server = Server::http(&db.netns, (db.v4, 80).into(), "ok");
    proxy(&host, "0.0.0.0:8080".parse().unwrap(), (db.v4, 80).into());
    // From the same bridge through the gateway's address, and from outside through the host's.
    web.netns.http_get("10.9.1.1:8080".parse().unwrap(), "/").unwrap();
    internet.netns.http_get(format!("{}:8080", lab::internet::HOST_V4).parse().unwrap(), "/").unwrap();
    for edge in ["web -> db tcp/80", "outside:203.0.113.1 -> db tcp/80"] {
        let seen = watching.until(edge, |seen| seen.established == 1);
        assert_eq!(seen.roads, [Road::Proxy].into(), "{edge}");
    }
    watching.settle();
    assert_eq!(watching.used().len(), 2, "{}", watching.text());
    // The host through its own loopback: the client is nobody else but the host.
    host.http_get("127.0.0.1:8080".parse().unwrap(), "/").unwrap();
    watching.until("host: -> db tcp/80", |seen| seen.established == 1);
}

#[test]
fn a_proxy_that_accepts_for_a_closed_port_is_a_refusal() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let node = Node::with(&[&bridge]).runs("web", &bridge, &web);
    let mut watching = node.container("db", &bridge, &db, |c| c.published = published(8080, 80).into()).observe(&host);
    proxy(&host, "0.0.0.0:8080".parse().unwrap(), (db.v4, 80).into());
    assert!(web.netns.http_get("10.9.1.1:8080".parse().unwrap(), "/").is_err());
    watching.until("web -> db tcp/80", |seen| seen.refused == 1);
    assert_eq!(watching.used(), [""; 0]);
}

#[test]
fn an_address_of_a_workload_that_enters_elsewhere_is_outside() {
    needs_root!();
    let host = Netns::new("host");
    let mut one = Bridge::new(&host, "one", "10.9.1.0/24", "fd09:1::/64");
    let mut two = Bridge::new(&host, "two", "10.9.2.0/24", "fd09:2::/64");
    let (web, db) = (one.add("web"), two.add("db"));
    let internet = Internet::behind(&host);
    let mut watching = Node::with(&[&one, &two]).runs("web", &one, &web).runs("db", &two, &db).observe(&host);
    for interface in ["all", "up0"] {
        host.set_sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0");
    }
    // The internet claims the address of web.
    internet.add_address(web.v4.into());
    internet.netns.ip(&format!("route add {} via 203.0.113.2 src {}", db.v4, web.v4));
    internet.netns.udp_send((db.v4, 9).into(), b"I am web");
    watching.within(Duration::from_secs(45), "outside:10.9.1.2 -> db udp/9", |seen| seen.attempts() == 1);
    assert!(watching.evidence("web -> db udp/9").is_none());
}
