//! A container that has its neighbour's MAC address or addresses of its choice before the agent looks who is behind which port.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Engine, Host, Process, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deaths::agent;
use crate::stage::{PATIENCE, enforce, engine, known, network, reaches, run};

const MAC: [u8; 6] = [2, 0x42, 0xde, 0xad, 0, 1];
const WEB: &str = "10.66.1.101";

/// Kills the agent and lets its supervisor start another once `meanwhile` is done.
fn dead_while(up: &Process, host: &Host<'_>, meanwhile: impl FnOnce()) {
    let (supervisor, dead) = (Pid::from_raw(up.id().cast_signed()), agent(up));
    kill(supervisor, Signal::SIGSTOP).unwrap();
    kill(dead, Signal::SIGKILL).unwrap();
    meanwhile();
    kill(supervisor, Signal::SIGCONT).unwrap();
    eventually(PATIENCE, || if agent(up) == dead { Err("the old agent".to_owned()) } else { Ok(()) });
    eventually(PATIENCE, || if host.try_bulkhead(["status"]).status.success() { Ok(()) } else { Err("no status".to_owned()) });
}

fn takes(engine: &Engine, who: &str, mac: [u8; 6]) {
    let inside = engine.netns_of(who);
    for words in ["link set eth0 down".to_owned(), format!("link set eth0 address {}", mac_text(mac)), "link set eth0 up".to_owned()] {
        inside.check(Command::new("ip").args(words.split(' ')));
    }
}

/// A guarded network with db, thief and web, of which web alone may reach db; `web` are words for its `docker run`.
fn guarded<'e>(engine: &'e Engine, web: &[&str]) -> (Host<'e>, Process, SocketAddr, Server) {
    network(engine, "back", 1);
    run(engine, "db", "back", &[]);
    run(engine, "thief", "back", &[]);
    run(engine, "web", "back", web);
    let host = Host::on(engine);
    let up = host.up();
    known(&host, &["db", "web", "thief"]);
    host.bulkhead(["allow", "web", "db", "udp/53"]);
    enforce(&host, "back", &["db", "web", "thief"]);
    let db = SocketAddr::new(engine.address("db", "back"), 53);
    let server = Server::udp_echo(&engine.netns_of("db"), db);
    (host, up, db, server)
}

#[test]
fn who_has_a_neighbours_mac_address_when_the_agent_comes_back_neither_cuts_it_off_nor_is_taken_for_it() {
    let _limit = limit(Duration::from_secs(240));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up, db, server) = guarded(&engine, &["--ip", WEB, "--mac-address", &mac_text(MAC)]);
    let reaches = |when: &str| reaches(&engine, "web", db, b"web's own", PATIENCE, when);
    reaches("before");

    dead_while(&up, &host, || takes(&engine, "thief", MAC));
    std::thread::sleep(Duration::from_secs(2));
    reaches("once the agent is back");

    // Nor is it the neighbour while that one starts.
    engine.docker(["stop", "-t", "0", "web"]);
    dead_while(&up, &host, || {});
    let before = server.heard();
    let (from, to): (IpAddr, IpAddr) = (WEB.parse().unwrap(), db.ip());
    let packet = frame::ip(from, to, frame::PROTO_UDP, &frame::udp((from, 5000), (to, 53), b"as if it were web"));
    let forged = frame::ethernet(engine.mac("db", "back"), MAC, frame::ETH_IPV4, &packet);
    let wire = Frames::open(&engine.netns_of("thief"), "eth0");
    let (wire, forged) = (&wire, &forged);
    std::thread::scope(|scope| {
        let over = Instant::now() + Duration::from_secs(6);
        let flood = scope.spawn(move || {
            while Instant::now() < over {
                wire.send(forged);
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        std::thread::sleep(Duration::from_secs(1));
        engine.docker(["start", "web"]);
        flood.join().unwrap();
    });
    assert_eq!(server.heard(), before, "what the thief sent as web reached db");
    reaches("after its start");
}

#[test]
fn addresses_that_a_container_gives_itself_before_a_slow_agent_looks_are_not_its_for_long_and_nobodys_rules_come_with_them() {
    let _limit = limit(Duration::from_secs(240));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (_host, up, db, server) = guarded(&engine, &["--ip", WEB]);
    let reaches = |when: &str| reaches(&engine, "web", db, b"web's own", PATIENCE, when);
    reaches("before");

    // Its address is free, and db's is not.
    engine.docker(["stop", "-t", "0", "web"]);
    engine.docker(["rm", "-f", "thief"]);
    let before = server.heard();
    kill(agent(&up), Signal::SIGSTOP).unwrap();
    run(&engine, "thief", "back", &["--cap-add", "NET_ADMIN"]);
    let inside = engine.netns_of("thief");
    let its = engine.address("thief", "back");
    for address in [WEB.parse().unwrap(), db.ip(), "10.66.1.200".parse::<IpAddr>().unwrap()] {
        inside.check(Command::new("ip").args(["addr", "add", &format!("{address}/24"), "dev", "eth0"]));
    }
    kill(agent(&up), Signal::SIGCONT).unwrap();
    let wire = Frames::open(&inside, "eth0");
    let (to_mac, its_mac) = (engine.mac("db", "back"), engine.mac("thief", "back"));
    let over = Instant::now() + Duration::from_secs(4);
    while Instant::now() < over {
        for from in [WEB.parse().unwrap(), its, "10.66.1.200".parse::<IpAddr>().unwrap()] {
            let packet = frame::ip(from, db.ip(), frame::PROTO_UDP, &frame::udp((from, 5000), (db.ip(), 53), b"as if it were web"));
            wire.send(&frame::ethernet(to_mac, its_mac, frame::ETH_IPV4, &packet));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(server.heard(), before, "what the thief sent reached db");
    engine.docker(["start", "web"]);
    reaches("while the thief has its address too");
    // What the kernel showed counts no longer than until the engine has told.
    let tables = engine.netns.ruleset();
    assert!(!tables.contains("10.66.1.200"), "{tables}");
}
