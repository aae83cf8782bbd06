//! A tightened policy ends exactly the living connections that it no longer allows.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::probe::still_echoes;
use lab::{Internet, Server, needs_root};
use node_agent::enforce::living;
use policy::{Mode, Scene};

use crate::stage::{Policy, apply, enforcer, inventory, now, settled};

/// Ends it for its client too: what that goes on repeating would be taken up where it is allowed for a moment again.
fn forgotten(stream: &TcpStream) {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &at_once).unwrap();
}

#[test]
fn taking_an_allow_back_ends_its_connections_and_no_others() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let _servers: Vec<_> =
        b.addresses().into_iter().flat_map(|at| [80, 81].map(|port| Server::tcp_echo(&b.netns, SocketAddr::new(at, port)))).collect();
    let networks = policy::bind::networks(&inventory);
    let mut enforcer = enforcer(&host);
    let both = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "tcp/80").allow("c", "b", "tcp/80");
    let wide = both.clone().allow("a", "b", "tcp/81");

    for at in b.addresses() {
        apply(&mut enforcer, &wide.bind(&inventory));
        let connect = |from: &lab::Member, port| from.netns.connect(SocketAddr::new(at, port), lab::probe::PATIENCE).unwrap();
        let (mut stays, mut ends, mut others) = (connect(&a, 80), connect(&a, 81), connect(&c, 80));
        for stream in [&mut stays, &mut ends, &mut others] {
            assert!(still_echoes(stream, b"alive"));
        }

        let bound = both.bind(&inventory);
        apply(&mut enforcer, &bound);
        assert!(still_echoes(&mut ends, b"established"), "an established connection is not judged again by itself: {at}");
        let scene = Scene { set: &both.0, networks: &networks, now: now() };
        let ended = host.run(|| living::revoke(&scene, &bound, &inventory).unwrap());

        assert_eq!(ended, 1, "{at}");
        assert!(!still_echoes(&mut ends, b"revoked"), "{at}");
        forgotten(&ends);
        assert!(still_echoes(&mut stays, b"allowed"), "{at}");
        assert!(still_echoes(&mut others, b"allowed"), "{at}");
        assert_eq!(host.run(|| living::revoke(&scene, &bound, &inventory).unwrap()), 0, "and not again: {at}");
    }
}

#[test]
fn a_flow_that_nobody_answers_is_judged_once_and_ended_as_others_are() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let networks = policy::bind::networks(&inventory);
    let mut enforcer = enforcer(&host);
    let without = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    for at in b.addresses() {
        apply(&mut enforcer, &without.clone().allow("a", "b", "udp/514").bind(&inventory));
        let log = b.netns.run(|| std::net::UdpSocket::bind(SocketAddr::new(at, 514)).unwrap());
        let client = a.netns.udp_socket(SocketAddr::new(at, 514));
        let arrives = |words: &[u8]| {
            client.send_to(words, SocketAddr::new(at, 514)).unwrap();
            log.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            log.recv(&mut [0; 64]).is_ok()
        };
        assert!(arrives(b"one") && arrives(b"two"), "{at}");

        let bound = without.bind(&inventory);
        apply(&mut enforcer, &bound);
        assert!(arrives(b"three"), "it goes on until the revocation: {at}");
        let scene = Scene { set: &without.0, networks: &networks, now: now() };
        assert_eq!(host.run(|| living::revoke(&scene, &bound, &inventory).unwrap()), 1, "{at}");
        assert!(!arrives(b"four"), "{at}");
    }
}

#[test]
fn a_connection_behind_nat_is_revoked_by_its_true_ends() {
    needs_root!();
    node!(host, bridge: a, b);
    let internet = Internet::behind(&host);
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _servers = [80, 81].map(|port| Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), port)));
    // As an engine publishes ports, and as it masquerades a container that reaches its own bridge's published port.
    host.nft(&format!(
        "table ip nat {{ chain pre {{ type nat hook prerouting priority dstnat; tcp dport 8080 dnat to {b}:80; tcp dport 8081 dnat to {b}:81; }};
         chain post {{ type nat hook postrouting priority srcnat; ip saddr 10.1.0.0/24 oifname br0 ct status dnat masquerade; }}; }}",
        b = b.v4
    ));
    let networks = policy::bind::networks(&inventory);
    let mut enforcer = enforcer(&host);
    let narrow = Policy::default().mode(Mode::Enforce, &["a", "b"]).ingress("b", "outside:0.0.0.0/0", "tcp/80").allow("a", "b", "tcp/80");
    let wide = narrow.clone().ingress("b", "outside:0.0.0.0/0", "tcp/81").allow("a", "b", "tcp/81");
    apply(&mut enforcer, &wide.bind(&inventory));
    let connect =
        |from: &lab::Netns, port| from.connect(SocketAddr::new("203.0.113.2".parse().unwrap(), port), lab::probe::PATIENCE).unwrap();
    let (mut stays, mut ends) = (connect(&internet.netns, 8080), connect(&internet.netns, 8081));
    let (mut hairpin_stays, mut hairpin_ends) = (connect(&a.netns, 8080), connect(&a.netns, 8081));

    let bound = narrow.bind(&inventory);
    apply(&mut enforcer, &bound);
    let scene = Scene { set: &narrow.0, networks: &networks, now: now() };
    assert_eq!(host.run(|| living::revoke(&scene, &bound, &inventory).unwrap()), 2);

    assert!(still_echoes(&mut stays, b"from outside") && still_echoes(&mut hairpin_stays, b"hairpin"));
    assert!(!still_echoes(&mut ends, b"from outside") && !still_echoes(&mut hairpin_ends, b"hairpin"));
}

#[test]
fn a_connection_in_a_zone_that_another_tool_gives_it_is_judged_and_ended_as_others_are() {
    needs_root!();
    node!(host, bridge: a, b);
    host.nft("table inet other { chain pre { type filter hook prerouting priority raw; iifname br0 ct zone set 7; }; }");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let networks = policy::bind::networks(&inventory);
    let _servers: Vec<_> =
        b.addresses().into_iter().flat_map(|at| [80, 81].map(|port| Server::tcp_echo(&b.netns, SocketAddr::new(at, port)))).collect();
    let mut enforcer = enforcer(&host);
    let without = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    for at in b.addresses() {
        apply(&mut enforcer, &without.clone().allow("a", "b", "tcp/80").bind(&inventory));
        assert!(a.netns.connect(SocketAddr::new(at, 81), Duration::from_millis(700)).is_err(), "{at}");
        let mut stream = a.netns.connect(SocketAddr::new(at, 80), lab::probe::PATIENCE).unwrap();
        assert!(still_echoes(&mut stream, b"allowed"), "{at}");
        let bound = without.bind(&inventory);
        apply(&mut enforcer, &bound);
        let scene = Scene { set: &without.0, networks: &networks, now: now() };
        assert_eq!(host.run(|| living::revoke(&scene, &bound, &inventory).unwrap()), 1, "{at}");
        assert!(!still_echoes(&mut stream, b"revoked"), "{at}");
        forgotten(&stream);
    }
}
