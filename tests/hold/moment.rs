//! The moment between being bound and being tied to a port, and the one between the kernel's word and the engine's: who is killed, cut
//! off or told of in it.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Engine, Host, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deaths::{agent, filter};
use crate::early::{Scene, held};
use crate::stage::{PATIENCE, enforce, engine, known, network, reaches, run};

/// Waits until a container with this address is bound; its port and MAC address.
fn bound(engine: &Engine, address: &str) -> (String, String) {
    let over = Instant::now() + PATIENCE;
    loop {
        if let Some((port, mac, _)) = held(engine).into_iter().find(|(_, _, its)| its == address) {
            return (port, mac);
        }
        assert!(Instant::now() < over, "{address} is not bound");
    }
}

fn tied(engine: &Engine, port: &str, mac: &str) -> bool {
    let all = engine.netns.check(Command::new("bridge").args(["fdb", "show", "dev", port]));
    all.lines().any(|line| line.starts_with(mac) && line.contains("sticky"))
}

const JOB: &str = "10.66.1.77";

/// A guarded network with db, web, a thief, and `job`, which comes later and may reach db and be reached by web.
fn set(engine: &Engine) -> (Host<'_>, lab::Process) {
    network(engine, "back", 1);
    for (name, address) in [("db", "10.66.1.50"), ("web", "10.66.1.51"), ("thief", "10.66.1.52"), ("job", JOB)] {
        run(engine, name, "back", &["--ip", address]);
    }
    let host = Host::on(engine);
    let up = host.up();
    known(&host, &["db", "web", "thief", "job"]);
    for (from, to) in [("web", "db"), ("job", "db"), ("web", "job")] {
        host.bulkhead(["allow", from, to, "udp/53"]);
    }
    enforce(&host, "back", &["db", "web", "thief", "job"]);
    (host, up)
}

/// What `db` serves, from now on.
fn db_answers(engine: &Engine) -> (SocketAddr, Server) {
    let db = SocketAddr::new("10.66.1.50".parse().unwrap(), 53);
    (db, Server::udp_echo(&engine.netns_of("db"), db))
}

/// How long a moment is looked for: short of the limit, so that one that was never met is said to be.
const TRIED_FOR: Duration = Duration::from_secs(300);

#[test]
fn what_an_agent_that_is_killed_between_binding_and_tying_left_undone_the_next_one_does() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let thief = Frames::open(&engine.netns_of("thief"), "eth0");
    let (mut inside_window, over, begun) = (0, AtomicBool::new(false), Instant::now());
    // The moment is short where the machine is quick: some tries are for that.
    for n in 0..30 {
        if n >= 6 && (inside_window > 0 || begun.elapsed() > TRIED_FOR) {
            break;
        }
        engine.docker(["stop", "-t", "0", "job"]);
        eventually(PATIENCE, || if held(&engine).iter().any(|(_, _, its)| its == JOB) { Err("still bound") } else { Ok(()) });
        let dead = agent(&up);
        let (port, mac, in_it) = thread::scope(|scope| {
            scope.spawn(|| engine.docker(["start", "job"]));
            let (port, mac) = bound(&engine, JOB);
            kill(dead, Signal::SIGKILL).unwrap();
            let in_it = !tied(&engine, &port, &mac);
            (port, mac, in_it)
        });
        inside_window += u32::from(in_it);
        let mac_of_job = engine.mac("job", "back");
        assert_eq!(mac_text(mac_of_job), mac);
        let server = Server::udp_echo(&engine.netns_of("job"), SocketAddr::new(JOB.parse().unwrap(), 53));
        let begun = Instant::now();
        over.store(false, Ordering::Relaxed);
        let heard = thread::scope(|scope| {
            let wire = &thief;
            scope.spawn(|| {
                let claim = frame::arp_reply(mac_of_job, JOB.parse().unwrap(), [0xff; 6], "10.66.1.1".parse().unwrap());
                while !over.load(Ordering::Relaxed) {
                    wire.send(&frame::ethernet([1, 0x80, 0xc2, 0, 0, 0xe], mac_of_job, frame::ETH_ARP, &claim));
                    wire.send(&frame::ethernet([0xff; 6], mac_of_job, frame::ETH_ARP, &claim));
                    thread::sleep(Duration::from_micros(300));
                }
            });
            let to = SocketAddr::new(JOB.parse().unwrap(), 53);
            reaches(&engine, "web", to, b"web-to-job", PATIENCE, &format!("{n}"));
            over.store(true, Ordering::Relaxed);
            begun.elapsed()
        });
        eventually(PATIENCE, || if tied(&engine, &port, &mac) { Ok(()) } else { Err(format!("{n}: {port} is not tied")) });
        eprintln!("{n}: killed in the moment: {in_it}; reached after {heard:?}");
        assert!(!thief.drain().iter().any(|frame| frame.windows(10).any(|part| part == b"web-to-job")), "{n}: the thief read it");
        eventually(PATIENCE, || if agent(&up) == dead { Err("the old agent") } else { Ok(()) });
        eventually(PATIENCE, || if host.try_bulkhead(["status"]).status.success() { Ok(()) } else { Err("no status") });
        drop(server);
    }
    assert!(inside_window > 0, "no kill was in the moment");
}

#[test]
fn who_is_quarantined_before_its_port_is_tied_is_cut_off_at_once() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let (db, server) = db_answers(&engine);
    let agent = agent(&up);
    // The moment is short where the machine is not: a try that misses it is one of no account.
    let (mut met, begun) = (0, Instant::now());
    for _ in 0..30 {
        if begun.elapsed() > TRIED_FOR {
            break;
        }
        let over = AtomicBool::new(false);
        engine.docker(["stop", "-t", "0", "job"]);
        eventually(PATIENCE, || if held(&engine).iter().any(|(_, _, its)| its == JOB) { Err("still bound") } else { Ok(()) });
        let in_it = thread::scope(|scope| {
            scope.spawn(|| engine.docker(["start", "job"]));
            let (port, mac) = bound(&engine, JOB);
            kill(agent, Signal::SIGSTOP).unwrap();
            if tied(&engine, &port, &mac) {
                kill(agent, Signal::SIGCONT).unwrap();
                return false;
            }
            let inside = eventually(PATIENCE, || {
                let running = engine.docker(["inspect", "--format", "{{.State.Pid}}", "job"]);
                if running == "0" { Err("not running") } else { Ok(engine.netns_of("job")) }
            });
            let over = &over;
            scope.spawn(move || {
                let socket = inside.udp_socket(db);
                while !over.load(Ordering::Relaxed) {
                    let _ = socket.send_to(b"job's own", db);
                    thread::sleep(Duration::from_micros(500));
                }
            });
            eventually(PATIENCE, || if server.heard() > 0 { Ok(()) } else { Err("nothing was allowed") });
            // The agent is told once it goes on.
            let said = host.bulkhead(["quarantine", "job"]);
            assert!(said.contains("has not answered yet") && !said.contains("in force on"), "the agent hangs: {said}");
            eventually(PATIENCE, || {
                let status = host.bulkhead(["status"]);
                assert!(!status.contains("plan in force"), "the agent hangs: {status}");
                // And the network is enforced by the one before.
                let both = status.contains("has not answered for") && status.contains("by the plan of generation");
                if both { Ok(()) } else { Err(status) }
            });
            kill(agent, Signal::SIGCONT).unwrap();
            eventually(PATIENCE, || {
                let status = host.bulkhead(["status"]);
                if status.contains("plan in force") { Ok(()) } else { Err(status) }
            });
            // What had arrived by then is read first.
            let quiet = eventually(Duration::from_secs(3), || {
                let before = server.heard();
                thread::sleep(Duration::from_millis(200));
                if server.heard() == before { Ok(before) } else { Err("it goes on though it is said to be cut off") }
            });
            thread::sleep(Duration::from_secs(1));
            over.store(true, Ordering::Relaxed);
            assert_eq!(server.heard(), quiet, "it goes on though it is said to be cut off");
            eventually(PATIENCE, || if tied(&engine, &port, &mac) { Ok(()) } else { Err("not tied") });
            true
        });
        if !in_it {
            continue;
        }
        met += 1;
        let said = host.bulkhead(["release", "job"]);
        assert!(said.contains("in force on") && !said.contains("has not answered"), "{said}");
        reaches(&engine, "job", db, b"again", PATIENCE, "released");
        if met == 2 {
            break;
        }
    }
    assert!(met > 0, "its port was tied already, each time");
}

#[test]
fn an_engine_that_dies_while_it_starts_one_takes_nothing_from_whoever_gets_that_ones_address() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    // It holds the lowest address until everybody else has another.
    network(&engine, "back", 1);
    run(&engine, "elder", "back", &[]);
    let lowest = engine.address("elder", "back").to_string();
    // Or the engine waits for those that its predecessor left.
    let always = ["--restart", "always", "--stop-signal", "KILL"];
    run(&engine, "heir", "back", &always);
    run(&engine, "db", "back", &[&["--ip", "10.66.1.50"], &always[..]].concat());
    run(&engine, "web", "back", &[&["--ip", "10.66.1.51"], &always[..]].concat());
    let host = Host::on(&engine);
    let _up = host.up();
    known(&host, &["db", "web", "heir", "elder"]);
    host.bulkhead(["allow", "web", "db", "udp/53"]);
    host.bulkhead(["allow", "heir", "db", "udp/53"]);
    enforce(&host, "back", &["db", "web", "heir", "elder"]);
    engine.docker(["rm", "-f", "elder"]);
    let young = engine.docker(["create", "--stop-signal", "KILL", "--name", "young", "--network", "back", "hold:1"]);
    eventually(PATIENCE, || if held(&engine).iter().any(|(_, _, its)| *its == lowest) { Err("still bound") } else { Ok(()) });
    let dockerd = Pid::from_raw(engine.daemon_pid().cast_signed());
    thread::scope(|scope| {
        scope.spawn(|| engine.try_docker(["start", "young"]));
        let over = Instant::now() + Duration::from_secs(20);
        while !held(&engine).iter().any(|(_, _, its)| *its == lowest) {
            assert!(Instant::now() < over, "{lowest} is not bound: {:?}", held(&engine));
        }
        kill(dockerd, Signal::SIGSTOP).unwrap();
        engine.kill_daemon();
        // Nor for its program, which waits to be let go.
        let id = young.as_str();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            if std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|groups| groups.contains(id)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    });
    engine.revive_daemon();
    assert_eq!(engine.address("heir", "back").to_string(), lowest, "it has what was young's");
    let db = SocketAddr::new("10.66.1.50".parse().unwrap(), 53);
    let _server = Server::udp_echo(&engine.netns_of("db"), db);
    Scene { engine: &engine, db }.agrees("the engine is back");
    reaches(&engine, "heir", db, b"heir's own", Duration::from_secs(4), "the engine is back");
}

/// What the agent has heard of the end of who starts again while the engine says nothing.
enum Heard {
    Nothing,
    /// And since the engine says nothing this time has passed.
    All(Duration),
}

/// `job` ends and starts again while the engine says nothing to the agent.
fn silent(heard: &Heard) {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let (db, _server) = db_answers(&engine);
    let filter = filter(&up);
    if matches!(heard, Heard::Nothing) {
        kill(filter, Signal::SIGSTOP).unwrap();
    }
    engine.docker(["stop", "-t", "0", "job"]);
    eventually(PATIENCE, || if held(&engine).iter().any(|(_, _, its)| its == JOB) { Err("still bound") } else { Ok(()) });
    if let Heard::All(before) = heard {
        // The port went by the kernel's word; the engine's of the rest comes after it.
        eventually(PATIENCE, || {
            let job = host.bulkhead(["describe", "workload", "job"]);
            if job.contains("10.66.1.77") { Err(job) } else { Ok(()) }
        });
        kill(filter, Signal::SIGSTOP).unwrap();
        thread::sleep(*before);
    }
    engine.docker(["start", "job"]);
    reaches(&engine, "job", db, b"hello", Duration::from_secs(2), "the engine is silent");
    kill(filter, Signal::SIGCONT).unwrap();
    eventually(PATIENCE, || {
        let job = host.bulkhead(["describe", "workload", "job"]);
        if job.contains("10.66.1.77") { Ok(()) } else { Err(job) }
    });
    reaches(&engine, "job", db, b"again", Duration::from_secs(2), "the engine speaks again");
}

#[test]
fn who_starts_while_the_engine_tells_nothing_is_bound_by_the_kernels_word() {
    silent(&Heard::All(Duration::ZERO));
}

#[test]
fn who_starts_again_while_the_engine_has_not_even_told_of_its_end_is_bound_by_the_kernels_word() {
    silent(&Heard::Nothing);
}

#[test]
#[ignore = "waits for the listing of each minute"]
fn who_starts_while_the_engine_takes_long_to_list_everything_is_bound_by_the_kernels_word() {
    silent(&Heard::All(Duration::from_secs(62)));
}

#[test]
fn who_gets_the_address_of_one_whose_end_the_engine_has_not_told_of_is_not_taken_for_it() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let (db, _server) = db_answers(&engine);
    let filter = filter(&up);
    for attempt in 0..2 {
        let heir = format!("heir{attempt}");
        engine.docker(["create", "--name", &heir, "--network", "back", "--ip", JOB, "hold:1"]);
        reaches(&engine, "job", db, b"its own", PATIENCE, "before its end");
        kill(filter, Signal::SIGSTOP).unwrap();
        engine.docker(["stop", "-t", "0", "job"]);
        engine.docker(["start", &heir]);
        let inside = engine.netns_of(&heir);
        for _ in 0..6 {
            let answer = inside.udp_echo(db, b"as job");
            assert!(!matches!(answer, lab::Echo::Answered), "attempt {attempt}: taken for job");
        }
        kill(filter, Signal::SIGCONT).unwrap();
        known(&host, &[&heir]);
        assert!(!matches!(inside.udp_echo(db, b"as job"), lab::Echo::Answered), "attempt {attempt}: the engine speaks again");
        engine.docker(["rm", "-f", &heir]);
        engine.docker(["start", "job"]);
    }
}

/// The engine goes on, and its client finds it; the agent's filter does not, until this is dropped.
struct Hidden<'e> {
    engine: &'e Engine,
    elsewhere: std::path::PathBuf,
}

impl<'e> Hidden<'e> {
    fn of(engine: &'e Engine) -> Self {
        let elsewhere = engine.socket().with_extension("away");
        std::fs::rename(engine.socket(), &elsewhere).unwrap();
        Self { engine, elsewhere }
    }

    fn docker(&self, words: &[&str]) -> String {
        let mut client = self.engine.command("docker");
        let said = lab::process::check(client.env("DOCKER_HOST", format!("unix://{}", self.elsewhere.display())).args(words));
        said.trim().to_owned()
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        let _ = std::fs::rename(&self.elsewhere, self.engine.socket());
    }
}

#[test]
fn who_comes_while_the_agent_has_no_engine_is_not_taken_for_who_had_the_address_before() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let (db, _server) = db_answers(&engine);
    engine.docker(["create", "--name", "heir", "--network", "back", "--ip", JOB, "hold:1"]);
    reaches(&engine, "job", db, b"its own", PATIENCE, "before its end");
    let hidden = Hidden::of(&engine);
    kill(filter(&up), Signal::SIGKILL).unwrap();
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("is not followed") { Ok(()) } else { Err(status) }
    });
    hidden.docker(&["stop", "-t", "0", "job"]);
    hidden.docker(&["start", "heir"]);
    let pid = hidden.docker(&["inspect", "--format", "{{.State.Pid}}", "heir"]).parse().unwrap();
    let inside = lab::Netns::of_process(pid);
    for attempt in 0..12 {
        assert!(!matches!(inside.udp_echo(db, b"as job"), lab::Echo::Answered), "attempt {attempt}: taken for job");
    }
    drop(hidden);
    known(&host, &["heir"]);
    assert!(!matches!(inside.udp_echo(db, b"as job"), lab::Echo::Answered), "the engine is back");
    engine.docker(["rm", "-f", "heir"]);
    engine.docker(["start", "job"]);
    reaches(&engine, "job", db, b"again", PATIENCE, "it is itself again");
}

#[test]
fn what_is_decided_while_nobody_knows_what_runs_is_not_called_in_force_until_it_is() {
    let _limit = limit(Duration::from_secs(400));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let (host, up) = set(&engine);
    let (db, _server) = db_answers(&engine);
    reaches(&engine, "web", db, b"hello", PATIENCE, "before");
    let (inside, before) = (engine.netns_of("web"), agent(&up));
    let hidden = Hidden::of(&engine);
    kill(before, Signal::SIGKILL).unwrap();
    kill(filter(&up), Signal::SIGKILL).unwrap();
    eventually(PATIENCE, || if agent(&up) == before { Err("the old agent") } else { Ok(()) });
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("not connected") { Err(status) } else { Ok(()) }
    });
    eventually(PATIENCE, || match inside.udp_echo(db, b"x") {
        lab::Echo::Answered => Ok(()),
        other => Err(format!("by the ruleset on disk, without an engine: {other:?}")),
    });
    let said = host.bulkhead(["quarantine", "web"]);
    assert!(said.contains("has not answered yet") && !said.contains("in force on"), "{said}");
    let status = host.bulkhead(["status"]);
    assert!(!status.contains("plan in force"), "{status}");
    drop(hidden);
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("plan in force") { Ok(()) } else { Err(status) }
    });
    assert!(!matches!(inside.udp_echo(db, b"x"), lab::Echo::Answered), "in force means that it is");
}
