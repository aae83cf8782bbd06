//! What the kernel could not hand over: counted exactly, repaired, reported.

use std::net::UdpSocket;
use std::time::Duration;

use lab::{Bridge, Netns, Server, eventually, needs_root};
use node_agent::observe::Options;

use crate::node::Node;

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn an_overrun_is_counted_exactly_and_repaired_by_a_fresh_dump() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    // Room for a few events only.
    let options = Options { buffer: 16 * 1024, sweep: Duration::from_secs(600), ..Options::default() };
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe_with(&host, options);
    let _server = Server::udp_sink(&b.netns, (b.v4, 9).into());
    let before = watching.account();
    // Each datagram from a port of its own is one NEW event: a burst that no reader keeps up with.
    let sent: u64 = 4000;
    let sockets: Vec<UdpSocket> = a.netns.run(|| (0..sent).map(|_| UdpSocket::bind((a.v4, 0)).unwrap()).collect());
    for socket in &sockets {
        socket.send_to(b"x", (b.v4, 9)).unwrap();
    }
    eventually(PATIENCE, || {
        let now = watching.account();
        if now.lost > before.lost && now.repairs > before.repairs { Ok(()) } else { Err(format!("lost and not repaired: {now:?}")) }
    });
    watching.settle();
    let after = watching.account();
    // Every connection that the table holds by now was announced once, or lost once.
    let began = (after.followed.0 - before.followed.0) as u64;
    assert_eq!(after.events + after.lost - before.events - before.lost, began, "{after:?}");
    // What the events did not tell, the dump did.
    assert!(began >= sent, "{after:?}");
}

#[test]
fn first_sight_of_an_edge_is_never_sampled_away() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    let ports = 20_000..20_300_u16;
    let _servers: Vec<_> = ports.clone().map(|port| Server::udp_echo(&b.netns, (b.v4, port).into())).collect();
    let socket = a.netns.run(|| UdpSocket::bind((a.v4, 0)).unwrap());
    for port in ports.clone() {
        socket.send_to(b"x", (b.v4, port)).unwrap();
    }
    for port in ports {
        watching.until(&format!("a -> b udp/{port}"), |seen| seen.established == 1);
    }
    assert_eq!(watching.account().lost, 0);
}

/// Not a test of anything: prints how many new flows a second are read without loss. Run it with `--release -- --ignored rate`.
#[test]
#[ignore = "a measurement, for a quiet machine"]
fn the_rate_at_which_nothing_is_lost() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let _sink = Server::udp_sink(&b.netns, (b.v4, 9).into());
    for flows in [10_000_u32, 50_000, 150_000] {
        let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
        let began = std::time::Instant::now();
        // One socket; a port of its own for each destination port: each datagram is a new flow.
        let socket = a.netns.run(|| UdpSocket::bind((a.v4, 0)).unwrap());
        let second = a.netns.run(|| UdpSocket::bind((a.v4, 0)).unwrap());
        let third = a.netns.run(|| UdpSocket::bind((a.v4, 0)).unwrap());
        for flow in 0..flows {
            let socket = [&socket, &second, &third][(flow / 60_000) as usize];
            let port = u16::try_from(flow % 60_000 + 1000).unwrap();
            let _ = socket.send_to(b"x", (b.v4, port));
        }
        let sent_in = began.elapsed();
        while watching.account().followed.0 < flows as usize && began.elapsed() < Duration::from_secs(30) {
            watching.read();
            std::thread::sleep(Duration::from_millis(5));
        }
        let account = watching.account();
        println!(
            "{flows} new flows sent in {sent_in:?} ({:.0}/s), followed after {:?}; events {}, lost {}",
            f64::from(flows) / sent_in.as_secs_f64(),
            began.elapsed(),
            account.events,
            account.lost
        );
        watching.stop();
        host.run(|| {
            let mut entries = Vec::new();
            node_agent::observe::conntrack::dump_shown(|_, shown| entries.push(shown.held()), |_| {}).unwrap();
            for entry in entries {
                node_agent::observe::conntrack::delete(&entry).unwrap();
            }
        });
    }
}
