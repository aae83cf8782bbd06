//! A store that is put back from a copy, and decided by before anybody adopts.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use lab::{Host, Process, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};

use crate::deaths::agent;
use crate::stage::{PATIENCE, enforce, engine, known, network, run};

#[test]
fn a_store_that_was_put_back_and_decided_by_is_refused_though_it_has_the_number_and_followed_once_adopted() {
    let _limit = limit(Duration::from_secs(180));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    network(&engine, "back", 1);
    for name in ["web", "db"] {
        run(&engine, name, "back", &[]);
    }
    let host = Host::on(&engine);
    let (web, db) = (engine.netns_of("web"), engine.address("db", "back"));
    let inside = engine.netns_of("db");
    let _servers = [81, 82].map(|port| Server::tcp_echo(&inside, SocketAddr::new(db, port)));
    let open = |port| web.tcp_echo(SocketAddr::new(db, port), b"open");
    let ended = |mut up: Process| assert!(up.stop(PATIENCE).is_some(), "it ends when it is told to");
    let (store, copy) = (host.state_dir.join("controller"), engine.dir.join("copy"));
    let copied = |from: &std::path::Path, to: &std::path::Path| {
        lab::process::check(Command::new("rm").arg("-rf").arg(to));
        lab::process::check(Command::new("cp").arg("-a").arg(from).arg(to));
    };

    let up = host.up();
    enforce(&host, "back", &["web", "db"]);
    ended(up);
    copied(&store, &copy);
    let up = host.up();
    eventually(PATIENCE, || host.is_in_force());
    known(&host, &["web", "db"]);
    host.bulkhead(["allow", "web", "db", "tcp/81"]);
    eventually(PATIENCE, || if open(81) { Ok(()) } else { Err("81 is not open") });
    ended(up);

    copied(&copy, &store);
    let up = host.up();
    eventually(PATIENCE, || host.is_connected(|status| status.contains("is applied already")));
    known(&host, &["web", "db"]);
    host.bulkhead(["allow", "web", "db", "tcp/82"]);
    let refused = || eventually(PATIENCE, || host.is_connected(|status| status.contains("is applied already and says something else")));
    refused();
    eventually(PATIENCE, || if open(81) { Ok(()) } else { Err("what the node had stays whole") });
    assert!(!open(82), "and nothing more");
    // Whoever comes with that number is asked for more than the number.
    kill(agent(&up), Signal::SIGKILL).unwrap();
    eventually(PATIENCE, || if host.said().matches("agent connected").count() > 3 { Ok(()) } else { Err(host.said()) });
    refused();
    host.bulkhead(["adopt", "--yes"]);
    eventually(PATIENCE, || host.is_in_force());
    eventually(PATIENCE, || if open(82) { Ok(()) } else { Err("by the store, as it says") });
    assert!(!open(81), "and nothing more");
}
