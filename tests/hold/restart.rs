//! The engine stops and starts, its containers with it and with other addresses, while somebody keeps knocking.

use std::ffi::OsString;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use lab::{Engine, Host, Netns, eventually, limit};

use crate::stage::{PATIENCE, enforce, engine, known, network};

/// `db` serves tcp/80, `web` may reach it there, `other` may reach nothing. All of them come back with the engine.
fn three(engine: &Engine) {
    let host = Host::prepared(engine);
    network(engine, "back", 1);
    let start = |name: &str, more: &[&str]| {
        let words = ["run", "-d", "--restart", "always", "--name", name, "--network", "back", "hold:1"];
        engine.docker(words.iter().chain(more));
    };
    start("db", &["httpd", "-f", "-p", "80", "-h", "/www"]);
    start("web", &[]);
    start("other", &[]);
    known(&host, &["db", "web", "other"]);
    host.bulkhead(["allow", "web", "db", "tcp/80"]);
    enforce(&host, "back", &["db", "web", "other"]);
}

/// Waits until the allowed edge is open, wherever db is now, and the other one isn't.
fn held(engine: &Engine) {
    eventually(PATIENCE, || {
        let db = SocketAddr::new(engine.address("db", "back"), 80);
        let serves = |who: &str| engine.netns_of(who).http_get(db, "/").is_ok();
        let (web, other) = (serves("web"), serves("other"));
        if web && !other { Ok(()) } else { Err(format!("web reaches db: {web}; other does: {other}")) }
    });
}

/// A container that tries every address of its network, again and again, through its own restarts.
struct Knocker {
    docker: Vec<(OsString, OsString)>,
    stop: AtomicBool,
    opened: AtomicU64,
    knocked: AtomicU64,
}

impl Knocker {
    fn new(engine: &Engine) -> Self {
        let envs = engine.command("docker");
        let docker = envs.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
        Self { docker, stop: AtomicBool::new(false), opened: AtomicU64::new(0), knocked: AtomicU64::new(0) }
    }

    fn pid(&self, who: &str) -> Option<u32> {
        let mut ask = Command::new("docker");
        ask.envs(self.docker.iter().cloned()).args(["inspect", "--format", "{{.State.Pid}}", who]);
        String::from_utf8_lossy(&ask.output().ok()?.stdout).trim().parse().ok().filter(|pid| *pid != 0)
    }

    fn knock(&self, who: &str) {
        while !self.stop.load(Ordering::Relaxed) {
            let Some(pid) = self.pid(who) else { continue };
            let inside = Netns::of_process(pid);
            // A namespace that goes away between two looks is no matter.
            let there = || std::fs::metadata(inside.path()).is_ok() && !self.stop.load(Ordering::Relaxed);
            while there() {
                let round = || {
                    if inside.enter().is_err() {
                        return;
                    }
                    for last in 2..6 {
                        let to = SocketAddr::from(([10, 66, 1, last], 80));
                        let open = TcpStream::connect_timeout(&to, Duration::from_millis(40)).is_ok();
                        self.opened.fetch_add(u64::from(open), Ordering::Relaxed);
                        self.knocked.fetch_add(1, Ordering::Relaxed);
                    }
                };
                thread::scope(|scope| scope.spawn(round).join()).unwrap();
            }
        }
    }
}

#[test]
fn nothing_opens_while_the_engine_restarts_its_containers() {
    let _limit = limit(Duration::from_secs(120));
    let (engine, _internet) = match engine(&[]) {
        Ok(both) => both,
        Err(reason) => lab::skip!("{reason}"),
    };
    let _up = Host::on(&engine).up();
    three(&engine);
    held(&engine);

    let knocker = Knocker::new(&engine);
    thread::scope(|scope| {
        scope.spawn(|| knocker.knock("other"));
        eventually(PATIENCE, || if knocker.knocked.load(Ordering::Relaxed) > 8 { Ok(()) } else { Err("nobody knocks") });
        engine.restart();
        held(&engine);
        let later = knocker.knocked.load(Ordering::Relaxed) + 20;
        eventually(PATIENCE, || if knocker.knocked.load(Ordering::Relaxed) > later { Ok(()) } else { Err("nobody knocks any more") });
        knocker.stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(knocker.opened.load(Ordering::Relaxed), 0, "of {} attempts", knocker.knocked.load(Ordering::Relaxed));
}
