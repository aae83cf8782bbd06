//! Packets with a sum yet to be written, from a container of a real engine: with the agent there, killed, and back.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use lab::unsummed::{Unsummed, led_astray, pieces};
use lab::{Engine, Host, eventually, frame, limit, needs_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::owner::agent;
use crate::{PATIENCE, enforce_by_hand, is_held, kill_9, stage, supervisor};

const ETHERNET: usize = 14;
const HEADER: usize = 20;

/// Of web's pieces of a packet that it may send to udp/53, whether they arrive there, and whether elsewhere once the sum is written.
fn arrive(engine: &Engine, db: IpAddr) -> (bool, bool) {
    let (web, server) = (engine.netns_of("web"), engine.netns_of("db"));
    let sockets = [53, 99].map(|port| {
        let socket = server.run(|| UdpSocket::bind((db, port)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    });
    let (from, macs) = (engine.address("web", "line"), ["db", "web"].map(|name| engine.mac(name, "line")));
    let packet = led_astray((from, 5000), (db, 53), 99, b"words of an even number.");
    let wire = Unsummed::open(&web);
    let plain = frame::Frames::open(&web, "eth0");
    // Each several times: a piece may be lost.
    let astray = || {
        for (n, piece) in pieces(&packet, HEADER, 24).into_iter().enumerate() {
            let frame = frame::ethernet(macs[0], macs[1], frame::ETH_IPV4, &piece);
            assert!(wire.send(&frame, ETHERNET + HEADER, 2), "piece {n}");
        }
        sockets[1].recv(&mut [0; 100]).is_ok()
    };
    let astray = (0..2).any(|_| astray());
    let straight = || {
        for piece in pieces(&packet, HEADER, 24) {
            plain.send(&frame::ethernet(macs[0], macs[1], frame::ETH_IPV4, &piece));
        }
        sockets[0].recv(&mut [0; 100]).is_ok()
    };
    ((0..6).any(|_| straight()), astray)
}

#[test]
fn no_sum_that_is_yet_to_be_written_leads_a_packet_elsewhere_also_while_no_agent_lives() {
    let _limit = limit(Duration::from_secs(200));
    let engine = needs_engine!();
    let db: SocketAddr = stage(&engine);
    let host = Host::on(&engine);
    host.bulkhead(["up", "-d"]);
    enforce_by_hand(&host);
    host.bulkhead(["allow", "web", "db", "udp/53"]);
    eventually(PATIENCE, || is_held(&engine, db));
    if host.bulkhead(["status"]).contains("with NET_RAW:") {
        host.bulkhead(["down", "--yes", "--purge"]);
        lab::skip!("this kernel cannot look at sums that are yet to be written");
    }
    assert_eq!(arrive(&engine, db.ip()), (true, false));

    let (top, first) = (Pid::from_raw(supervisor(&host)), agent(&host).unwrap());
    for _ in 0..2 {
        // As long as the supervisor sleeps, no agent lives; it keeps what the last one left.
        kill(top, Signal::SIGSTOP).unwrap();
        kill_9(agent(&host).unwrap());
        assert_eq!(arrive(&engine, db.ip()), (true, false), "without an agent");
        kill(top, Signal::SIGCONT).unwrap();
        eventually(PATIENCE, || if agent(&host)? == first { Err("the dead one".to_owned()) } else { host.is_in_force() });
        assert_eq!(arrive(&engine, db.ip()), (true, false), "with the next agent");
    }
    host.bulkhead(["down", "--yes", "--purge"]);
    assert_eq!(arrive(&engine, db.ip()), (true, true), "after down nothing looks at it, and it is an attack");
}
