//! The tables while the agent is dead, stopped, or another one: nobody else's to change, and never open. With each kind of ownership
//! that kernels know, since all of them are in use.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lab::kin::family;
use lab::probe::still_echoes;
use lab::{Engine, Host, Server, eventually, limit, needs_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, enforce_by_hand, get, is_held, kill_9, stage, status_line, supervisor};

pub(crate) fn agent(host: &Host<'_>) -> Result<i32, String> {
    let family = family(supervisor(host));
    let found = family.iter().find(|(_, words)| words.contains("bulkhead-agent run")).map(|(pid, _)| *pid);
    found.ok_or_else(|| format!("no agent runs: {family:?}"))
}

fn signal(pid: i32, which: Signal) {
    kill(Pid::from_raw(pid), which).unwrap();
}

fn gone(pid: i32) -> Result<(), String> {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) if !stat.contains(") Z") => Err(format!("{pid} lives")),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn nft(engine: &Engine, words: &str) -> Result<(), String> {
    let output = engine.netns.output(Command::new("nft").args(words.split(' ')));
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[test]
fn whatever_the_kernel_knows_of_owners_a_killed_agent_opens_nothing_and_the_next_goes_on() {
    let _limit = limit(Duration::from_secs(400));
    let engine = needs_engine!();
    let db = stage(&engine);
    let mut host = Host::on(&engine);
    for kind in ["persistent", "owned", "shared"] {
        let owned = kind != "shared";
        host.set("BULKHEAD_OWNERSHIP", kind);
        host.bulkhead(["up", "-d"]);
        enforce_by_hand(&host);
        eventually(PATIENCE, || is_held(&engine, db));

        // Twice: what is handed on is kept for the one after, too.
        for life in 1..=2 {
            let top = supervisor(&host);
            let first = agent(&host).unwrap();
            // As long as the supervisor sleeps, no agent lives.
            signal(top, Signal::SIGSTOP);
            kill_9(first);
            eventually(PATIENCE, || gone(first));
            if owned {
                for words in ["delete table inet bulkhead", "delete table bridge bulkhead"] {
                    let why = nft(&engine, words).expect_err(words);
                    assert!(why.contains("Operation not permitted"), "{kind}, life {life}: nft {words}: {why}");
                }
                assert_eq!(nft(&engine, "flush ruleset"), Ok(()), "{kind}: what is owned is skipped");
            }
            assert_eq!(is_held(&engine, db), Ok(()), "{kind}, life {life}");
            signal(top, Signal::SIGCONT);
            eventually(PATIENCE, || if agent(&host)? == first { Err("the dead one".to_owned()) } else { host.is_in_force() });
        }
        if !owned {
            assert_eq!(nft(&engine, "flush ruleset"), Ok(()));
        }
        eventually(PATIENCE, || is_held(&engine, db).map_err(|held| format!("{kind}: {held}")));
        // Through the same socket, what was allowed changes.
        host.bulkhead(["allow", "other", "db", "tcp/80"]);
        eventually(PATIENCE, || if get(&engine, "other", db) { Ok(()) } else { Err(format!("{kind}: still as before")) });
        assert_eq!(nft(&engine, "delete table inet bulkhead").is_err(), owned, "{kind}");

        // Everybody stops in order: no rule allows the host.
        let closed = || if engine.netns.tcp(db).is_open() { Err(format!("{kind}: the host reaches db")) } else { Ok(()) };
        eventually(PATIENCE, closed);
        let top = supervisor(&host);
        signal(top, Signal::SIGTERM);
        eventually(PATIENCE, || gone(top));
        assert_eq!(closed(), Ok(()));
        host.bulkhead(["down", "--yes", "--purge"]);
        assert!(engine.netns.tcp_within(db, Duration::from_secs(5)).is_open(), "{kind}: after down everything passes");
    }
}

#[test]
fn a_flush_right_behind_the_first_write_of_an_agent_is_repaired_within_seconds() {
    let _limit = limit(Duration::from_secs(200));
    let engine = needs_engine!();
    let db = stage(&engine);
    let mut host = Host::on(&engine);
    host.set("BULKHEAD_OWNERSHIP", "shared");
    host.bulkhead(["up", "-d"]);
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    for _ in 0..3 {
        let log = host.state_dir.join("bulkhead.log");
        let written = || fs::read_to_string(&log).unwrap_or_default().matches("the last ruleset is put back").count();
        let (first, before) = (agent(&host).unwrap(), written());
        kill_9(first);
        eventually(PATIENCE, || if written() > before { Ok(()) } else { Err("nothing is written") });
        assert_eq!(nft(&engine, "flush ruleset"), Ok(()));
        eventually(PATIENCE, || host.is_in_force());
        eventually(Duration::from_secs(3), || is_held(&engine, db));
    }
}

/// Puts a copy in the place of the agent's program, as a package does; its inode.
fn upgrade(host: &Host<'_>) -> u64 {
    let (program, fresh) = (host.program("bulkhead-agent"), host.program("bulkhead-agent.new"));
    fs::copy(&program, &fresh).unwrap();
    fs::rename(&fresh, &program).unwrap();
    fs::metadata(program).unwrap().ino()
}

fn upgraded_without_a_gap(kind: &str, signals: &[Signal]) {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    let db = stage(&engine);
    let mut host = Host::on(&engine);
    host.set("BULKHEAD_OWNERSHIP", kind);
    host.bulkhead(["up", "-d"]);
    enforce_by_hand(&host);
    host.bulkhead(["allow", "web", "db", "tcp/81"]);
    eventually(PATIENCE, || is_held(&engine, db));

    let [web, other, server] = ["web", "other", "db"].map(|name| engine.netns_of(name));
    let (echo, forbidden) = (SocketAddr::new(db.ip(), 81), SocketAddr::new(db.ip(), 9));
    let _echo = Server::tcp_echo(&server, echo);
    let sink = Server::udp_sink(&server, forbidden);
    let mut living = eventually(PATIENCE, || web.connect(echo, Duration::from_secs(2)));
    let over = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let socket = other.udp_socket("0.0.0.0:0".parse().unwrap());
            let mut sent = 0_u64;
            while !over.load(Ordering::Relaxed) && sent < 400_000 {
                sent += u64::from(socket.send_to(b"now?", forbidden).is_ok());
                std::thread::sleep(Duration::from_micros(200));
            }
            sent
        });
        for which in signals {
            let inode = upgrade(&host);
            signal(agent(&host).unwrap(), *which);
            eventually(PATIENCE, || {
                let pid = agent(&host)?;
                let runs = fs::metadata(format!("/proc/{pid}/exe")).map_err(|e| e.to_string())?.ino();
                if runs == inode { host.is_in_force() } else { Err(format!("{pid} is of the old program")) }
            });
            assert!(still_echoes(&mut living, b"here"), "an allowed connection lives on ({which})");
            assert!(web.tcp_within(db, Duration::from_secs(5)).is_open(), "an allowed connection is made ({which})");
        }
        // The supervisor as well, and with it everything of ours.
        let top = supervisor(&host);
        signal(top, Signal::SIGTERM);
        eventually(PATIENCE, || gone(top));
        assert!(still_echoes(&mut living, b"here"), "an allowed connection lives on without any of us");
        host.bulkhead(["up", "-d"]);
        eventually(PATIENCE, || host.is_in_force());
        assert!(still_echoes(&mut living, b"here"), "an allowed connection lives on");
        over.store(true, Ordering::Relaxed);
        flood.join().unwrap()
    });
    println!("{sent} packets tried");
    assert!(sent > 1000);
    assert_eq!(sink.heard(), 0, "of {sent} forbidden packets");
    assert_eq!(status_line(agent(&host).unwrap(), "NoNewPrivs"), "1");
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn an_upgrade_of_the_agent_under_enforce_has_no_gap() {
    upgraded_without_a_gap("persistent", &[Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM]);
}
