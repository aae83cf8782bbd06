//! What is denied is counted packet by packet, by whose side it was, by pair and reason, whatever the log leaves out.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lab::{Member, Server};
use nix::sys::socket::{setsockopt, sockopt};
use node_agent::enforce::count::{CountedSpot, Counts, Reason};
use policy::Mode;

use crate::stage::{Policy, apply, enforcer, inventory};

fn sum(counts: &Counts, reason: Reason) -> u64 {
    counts.total.iter().filter(|((its, _), _)| *its == reason).map(|(_, packets)| packets).sum()
}

/// Packets that a member has put on its cable.
fn sent(member: &Member) -> u64 {
    let link = member.netns.ip("-s -j link show eth0");
    let link: serde_json::Value = serde_json::from_str(&link).unwrap();
    link[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}

/// Datagrams that one system call hands over (udp(7), UDP_SEGMENT); the kernel makes packets of them before the cable.
const AT_ONCE: usize = 32;

/// Sends datagrams without a pause; the kernel of the sender may leave some out.
fn flood(member: &Member, to: &[SocketAddr], packets: usize) {
    let socket = member.netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    setsockopt(&socket, sockopt::UdpGsoSegment, &5).unwrap();
    let mut left = packets;
    for &to in to.iter().cycle() {
        let some = left.min(AT_ONCE);
        let _ = socket.send_to(&b"flood".repeat(some), to);
        left -= some;
        if left == 0 {
            return;
        }
    }
}

/// How long allowed connections take, one after the other, for as long as this is so.
fn connect_while(web: &Member, to: SocketAddr, so: impl Fn(usize) -> bool) -> Vec<Duration> {
    let mut took = Vec::new();
    while so(took.len()) {
        let begun = Instant::now();
        assert!(web.netns.tcp_within(to, Duration::from_secs(10)).is_open(), "allowed, whatever others do");
        took.push(begun.elapsed());
    }
    took.sort();
    took
}

/// The median and the 99th percentile.
fn told(took: &[Duration]) -> String {
    format!("{} connections, p50 {:?}, p99 {:?}", took.len(), took[took.len() / 2], took[took.len() * 99 / 100])
}

fn spot(counts: &Counts, reason: Reason, address: std::net::Ipv4Addr) -> (CountedSpot, u64) {
    let found = counts.spots.iter().find(|((its, (_, who)), _)| *its == reason && *who == address);
    found.map(|((_, spot), packets)| (*spot, *packets)).unwrap_or_else(|| panic!("{reason:?} {address}: {counts:?}"))
}

#[test]
fn denied_packets_are_counted_by_reason_side_and_pair() {
    lab::needs_root!();
    node!(host, bridge: web, db, other);
    let inventory = inventory(&[(&bridge, &[("web", &web), ("db", &db), ("other", &other)])]);
    let mut enforcer = enforcer(&host);
    // The sender's side is asked first: `other` may send anywhere, and nobody lets it in.
    let policy = Policy::default().silent(&["web", "db"]).mode(Mode::Learn, &["other"]).allow("web", "db", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    let _echo = Server::udp_echo(&db.netns, (db.v4, 53).into());
    assert_eq!(web.netns.udp_echo((db.v4, 53).into(), b"allowed"), lab::Echo::Answered);
    assert_eq!(enforcer.counts().unwrap(), Counts::default(), "nothing was denied");

    for port in [1_000, 1_001, 1_001] {
        web.netns.udp_send((db.v4, port).into(), b"no egress rule");
    }
    other.netns.udp_send((db.v4, 53).into(), b"no ingress rule");
    other.netns.udp_send((db.v6, 53).into(), b"no ingress rule");
    lab::eventually(Duration::from_secs(5), || {
        let counts = enforcer.counts().unwrap();
        let sums = (sum(&counts, Reason::Egress), sum(&counts, Reason::Ingress));
        if sums == (3, 2) { Ok(()) } else { Err(format!("{sums:?}")) }
    });
    // Sums that did not change come without rows: one more, and all are told.
    web.netns.udp_send((db.v4, 1_000).into(), b"no egress rule");
    let counts = lab::eventually(Duration::from_secs(5), || {
        let counts = enforcer.counts().unwrap();
        if counts.spots.is_empty() { Err("no rows") } else { Ok(counts) }
    });
    assert_eq!(spot(&counts, Reason::Egress, web.v4).1, 4);
    assert_eq!(spot(&counts, Reason::Ingress, db.v4).1, 1, "it is the receiver's side that says no");
    let of_web = counts.pairs.iter().filter(|((reason, _), _)| *reason == Reason::Egress);
    let of_web: Vec<_> = of_web.map(|((_, pair), packets)| (pair.from.1, pair.to.1, pair.protocol, pair.port, *packets)).collect();
    let (from, to) = (web.v4.into(), db.v4.into());
    assert_eq!(of_web, [(from, to, 17, 1_000, 2), (from, to, 17, 1_001, 2)]);
    // What could not be taken up is told again.
    assert!(enforcer.counts().unwrap().pairs.is_empty());
    enforcer.count_again();
    assert_eq!(enforcer.counts().unwrap().pairs, counts.pairs);

    let policy = policy.quarantine("web");
    apply(&mut enforcer, &policy.bind(&inventory));
    web.netns.udp_send((db.v4, 53).into(), b"cut off");
    lab::eventually(Duration::from_secs(5), || {
        let cut = sum(&enforcer.counts().unwrap(), Reason::Cut);
        if cut == 1 { Ok(()) } else { Err(cut) }
    });
}

#[test]
fn a_flood_of_denials_is_counted_to_the_packet_and_costs_nobody_a_connection() {
    lab::needs_root!();
    const FLOOD: usize = 400_000;
    const FLOODERS: usize = 2;
    node!(host, bridge: web, db, other);
    // Or what is handed over at once would cross the cable, and be counted, as one.
    other.netns.ip("link set eth0 gso_max_segs 1");
    let inventory = inventory(&[(&bridge, &[("web", &web), ("db", &db), ("other", &other)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().silent(&["web", "db", "other"]).allow("web", "db", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    let _echo = Server::tcp_echo(&db.netns, (db.v4, 80).into());
    // More pairs than there are rows.
    let to: Vec<SocketAddr> = (1..=10_000).map(|port| (db.v4, port).into()).collect();
    flood(&other, &to[..1], 1);
    lab::eventually(Duration::from_secs(5), || {
        let counted = sum(&enforcer.counts().unwrap(), Reason::Egress);
        if counted == 1 { Ok(()) } else { Err(counted) }
    });
    let server = (db.v4, 80).into();
    let in_peace = connect_while(&web, server, |made| made < 200);
    let (before, begun) = (sent(&other), Instant::now());
    let flooding = AtomicBool::new(true);
    let meanwhile = std::thread::scope(|scope| {
        let allowed = scope.spawn(|| connect_while(&web, server, |_| flooding.load(Ordering::Relaxed)));
        let flooders: Vec<_> = to.chunks(to.len() / FLOODERS).map(|to| scope.spawn(|| flood(&other, to, FLOOD / FLOODERS))).collect();
        flooders.into_iter().for_each(|flooder| flooder.join().unwrap());
        flooding.store(false, Ordering::Relaxed);
        allowed.join().unwrap()
    });
    let took = begun.elapsed();
    let on_the_cable = sent(&other) - before;
    let counted = lab::eventually(Duration::from_secs(10), || {
        let counts = enforcer.counts().unwrap();
        let counted = sum(&counts, Reason::Egress) - 1;
        // Beside the flood there is ARP.
        if (on_the_cable.saturating_sub(20)..=on_the_cable).contains(&counted) {
            Ok(counted)
        } else {
            Err(format!("{counted} of {on_the_cable}"))
        }
    });
    println!(
        "{counted} denials in {took:?} ({:.0}/s); allowed meanwhile: {}; before: {}",
        counted as f64 / took.as_secs_f64(),
        told(&meanwhile),
        told(&in_peace)
    );
    assert!(counted >= FLOOD as u64 / 2, "most of the flood reached the filter: {counted}");
    // One more for the rows.
    flood(&other, &to[..1], 1);
    let counts = lab::eventually(Duration::from_secs(5), || {
        let counts = enforcer.counts().unwrap();
        if counts.spots.is_empty() { Err("no rows") } else { Ok(counts) }
    });
    assert_eq!(spot(&counts, Reason::Egress, other.v4).1, sum(&counts, Reason::Egress), "all of it was its own");
    assert!(counts.pairs.len() <= 4096, "rows are bounded: {}", counts.pairs.len());
    assert!(counts.pairs.values().sum::<u64>() < counted, "the rest is for the row `other`");
}
