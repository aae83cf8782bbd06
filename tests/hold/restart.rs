//! The engine stops and starts while somebody keeps knocking.

use std::ffi::OsString;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::probe::still_echoes;
use lab::{Engine, Host, Netns, Server, eventually, limit};

use crate::stage::{PATIENCE, enforce, engine, known, network};

/// `db` serves tcp/80, `web` may reach it there and on tcp/81, `other` may reach nothing. All of them come back with the engine.
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
    host.bulkhead(["allow", "web", "db", "tcp/81"]);
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

/// A conversation that goes on all the time: how often it was answered, and how long an answer took at most.
struct Conversation {
    answered: AtomicU64,
    longest: Mutex<Duration>,
}

/// A busy machine, and one or two packets repeated by TCP; a connection that is cut never answers again.
const AN_ANSWER_TAKES: Duration = Duration::from_secs(20);

impl Conversation {
    fn go_on(&self, mut stream: TcpStream, stop: &AtomicBool) {
        stream.set_read_timeout(Some(AN_ANSWER_TAKES)).unwrap();
        for turn in 0_u64.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let asked = Instant::now();
            assert!(still_echoes(&mut stream, &turn.to_be_bytes()), "an allowed connection was cut after {turn} answers");
            self.answered.store(turn + 1, Ordering::Relaxed);
            let mut longest = self.longest.lock().unwrap();
            *longest = longest.max(asked.elapsed());
            drop(longest);
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn goes_on(&self) {
        let later = self.answered.load(Ordering::Relaxed) + 10;
        eventually(PATIENCE, || if self.answered.load(Ordering::Relaxed) > later { Ok(()) } else { Err("no answer comes any more") });
    }
}

fn goes_on(knocker: &Knocker) {
    let later = knocker.knocked.load(Ordering::Relaxed) + 20;
    eventually(PATIENCE, || if knocker.knocked.load(Ordering::Relaxed) > later { Ok(()) } else { Err("nobody knocks any more") });
}

/// Ends what runs on other threads, also when the test fails.
struct Stop<'a>(&'a [&'a AtomicBool]);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|stop| stop.store(true, Ordering::Relaxed));
    }
}

fn nothing_opened(knocker: &Knocker) {
    assert_eq!(knocker.opened.load(Ordering::Relaxed), 0, "of {} attempts", knocker.knocked.load(Ordering::Relaxed));
}

#[test]
fn nothing_opens_while_the_engine_restarts_its_containers() {
    let _limit = limit(Duration::from_secs(300));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let _up = Host::on(&engine).up();
    three(&engine);
    held(&engine);

    let knocker = Knocker::new(&engine);
    thread::scope(|scope| {
        let _stop = Stop(&[&knocker.stop]);
        scope.spawn(|| knocker.knock("other"));
        goes_on(&knocker);
        engine.restart();
        held(&engine);
        goes_on(&knocker);
    });
    nothing_opened(&knocker);
}

#[test]
fn nothing_opens_and_allowed_connections_live_on_while_the_engine_restarts_without_its_containers() {
    let _limit = limit(Duration::from_secs(180));
    let (engine, _internet) = lab::or_skip!(engine(&["--live-restore"]));
    let _up = Host::on(&engine).up();
    three(&engine);
    held(&engine);
    let at = SocketAddr::new(engine.address("db", "back"), 81);
    let server = Server::tcp_echo(&engine.netns_of("db"), at);
    let living = engine.netns_of("web").connect(at, Duration::from_secs(5)).unwrap();

    let knocker = Knocker::new(&engine);
    let conversation = Conversation { answered: AtomicU64::new(0), longest: Mutex::default() };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&[&knocker.stop, &stop]);
        scope.spawn(|| knocker.knock("other"));
        scope.spawn(|| conversation.go_on(living, &stop));
        goes_on(&knocker);
        conversation.goes_on();
        for _ in 0..2 {
            engine.restart();
            conversation.goes_on();
            held(&engine);
            goes_on(&knocker);
        }
        conversation.goes_on();
    });
    drop(server);
    nothing_opened(&knocker);
    let (answers, longest) = (conversation.answered.load(Ordering::Relaxed), *conversation.longest.lock().unwrap());
    println!("{answers} answers, the longest after {longest:?}; {} attempts denied", knocker.knocked.load(Ordering::Relaxed));
}
