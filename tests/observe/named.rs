//! Who it was, at the moment of the packet.

use std::net::UdpSocket;
use std::time::Duration;

use lab::probe::Echo;
use lab::{Bridge, Netns, Server, needs_root};

use crate::node::Node;

#[test]
fn a_job_that_lived_two_seconds_appears_under_its_own_name() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (db, job) = (bridge.add("db"), bridge.add("job"));
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut watching = Node::with(&[&bridge]).runs("db", &bridge, &db).observe(&host);
    // Its first packet is faster than the engine's word of it.
    assert!(job.netns.tcp_echo((db.v4, 5432).into(), b"x"));
    std::thread::sleep(Duration::from_millis(400));
    watching.now(|node| node.runs("nightly", &bridge, &job));
    std::thread::sleep(Duration::from_millis(1600));
    watching.now(|node| node.stops("nightly"));
    watching.until("nightly -> db tcp/5432", |seen| seen.established == 1);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn a_reused_address_is_not_blamed_on_the_old_container() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (db, old) = (bridge.add("db"), bridge.add("old"));
    let _servers = [5432, 6379].map(|port| Server::tcp_echo(&db.netns, (db.v4, port).into()));
    let mut watching = Node::with(&[&bridge]).runs("db", &bridge, &db).runs("old", &bridge, &old).observe(&host);
    assert!(old.netns.tcp_echo((db.v4, 5432).into(), b"x"));
    // At once another container has the address; what the old one did a moment ago isn't named yet.
    watching.now(|node| node.stops("old").runs("new", &bridge, &old));
    assert!(old.netns.tcp_echo((db.v4, 6379).into(), b"x"));
    watching.until("old -> db tcp/5432", |seen| seen.established == 1);
    watching.until("new -> db tcp/6379", |seen| seen.established == 1);
    assert_eq!(watching.used().len(), 2, "{}", watching.text());
}

#[test]
fn an_address_that_belongs_to_nobody_is_unknown_and_counted() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (db, ghost) = (bridge.add("db"), bridge.add("ghost"));
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut watching = Node::with(&[&bridge]).runs("db", &bridge, &db).observe(&host);
    assert!(ghost.netns.tcp_echo((db.v4, 5432).into(), b"x"));
    watching.until(&format!("unknown:{} -> db tcp/5432", ghost.v4), |seen| seen.established == 1);
    assert_eq!(watching.account().unattributed, 1);
}

#[test]
fn a_one_off_run_is_named_as_such() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (db, run) = (bridge.add("db"), bridge.add("run"));
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let node = Node::with(&[&bridge]).runs("shop/db", &bridge, &db);
    let mut watching = node.container("shop/web", &bridge, &run, |container| container.one_off = true).observe(&host);
    assert!(run.netns.tcp_echo((db.v4, 5432).into(), b"x"));
    watching.until("shop/web (run) -> shop/db tcp/5432", |seen| seen.established == 1);
}

#[test]
fn two_bridges_with_one_subnet_are_told_apart() {
    needs_root!();
    let host = Netns::new("host");
    // The same addresses twice: only the host's own can't be.
    let one = Bridge::new(&host, "one", "10.9.1.0/24", "fd09:1::/64");
    let two = Bridge::new(&host, "two", "10.9.1.0/24", "fd09:1::/64");
    let members = [&one, &two].map(|bridge| [bridge.add_at("client", 5), bridge.add_at("server", 6)]);
    let [[c1, s1], [c2, s2]] = &members;
    let node = Node::with(&[&one, &two]).runs("one/client", &one, c1).runs("one/server", &one, s1);
    let mut watching = node.runs("two/client", &two, c2).runs("two/server", &two, s2).observe(&host);
    for ([client, server], port) in members.iter().zip([1111, 2222]) {
        let _server = Server::tcp_echo(&server.netns, (server.v4, port).into());
        assert!(client.netns.tcp_echo((server.v4, port).into(), b"x"));
    }
    watching.until("one/client -> one/server tcp/1111", |seen| seen.established == 1);
    watching.until("two/client -> two/server tcp/2222", |seen| seen.established == 1);
    assert_eq!(watching.used().len(), 2, "{}", watching.text());
}

#[test]
fn link_local_addresses_belong_to_their_bridge() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    for (member, nth) in [(&a, 1), (&b, 2)] {
        member.netns.ip(&format!("-6 addr add fe80::{nth}/64 dev eth0 nodad"));
    }
    let local = |node: Node, workload, member, nth: u16| {
        node.container(workload, &bridge, member, |c| {
            c.legs[0].addresses.insert(format!("fe80::{nth}").parse().unwrap());
        })
    };
    let mut watching = local(local(Node::with(&[&bridge]), "a", &a, 1), "b", &b, 2).observe(&host);
    let bind = |member: &lab::Member, nth: u16, port: u16| {
        let scope = member.netns.run(|| nix::net::if_::if_nametoindex("eth0").unwrap());
        let at = std::net::SocketAddrV6::new(format!("fe80::{nth}").parse().unwrap(), port, 0, scope);
        (member.netns.run(|| UdpSocket::bind(at).unwrap()), at)
    };
    let ((client, _), (server, mut at)) = (bind(&a, 1, 5000), bind(&b, 2, 6000));
    at.set_scope_id(a.netns.run(|| nix::net::if_::if_nametoindex("eth0").unwrap()));
    client.send_to(b"x", at).unwrap();
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    server.send_to(b"y", from).unwrap();
    watching.until("a -> b udp/6000", |seen| seen.established == 1);
    assert_eq!(a.netns.ping(b.v6.into()), Echo::Answered);
}
