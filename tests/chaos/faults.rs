//! Faults that need no dice: a full disk, a store that was damaged, processes that hang or are killed with their supervisor; and how
//! fast a quarantine acts.

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use lab::frame::PROTO_UDP;
use lab::kin::{child, family, lives};
use lab::{Capture, Engine, Host, Process, eventually, limit, needs_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(30);
const IMAGE: &str = "faults:1";

/// `web` may reach `db` on tcp/80 and udp/53; `other` may nothing.
struct Stage<'e> {
    engine: &'e Engine,
    host: &'e Host<'e>,
    db: SocketAddr,
    _server: lab::Server,
}

impl<'e> Stage<'e> {
    fn set(engine: &'e Engine, host: &'e Host<'e>) -> Self {
        engine.import_busybox(IMAGE);
        engine.docker(["network", "create", "-o", "com.docker.network.bridge.name=br-fault", "fault"]);
        for name in ["web", "db", "other"] {
            engine.docker(["run", "-d", "--name", name, "--network", "fault", IMAGE]);
        }
        host.bulkhead(["segment", "add", "network:fault", "--segment", "fault"]);
        eventually(PATIENCE, || {
            let workloads = host.bulkhead(["get", "workloads"]);
            if ["web", "db", "other"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
        });
        host.bulkhead(["allow", "web", "db", "tcp/80"]);
        host.bulkhead(["allow", "web", "db", "udp/53"]);
        host.bulkhead(["mode", "fault", "enforce", "--yes", "--deny-unlearned", "other"]);
        let db = SocketAddr::new(engine.address("db", "fault"), 80);
        let _server = lab::Server::tcp_echo(&engine.netns_of("db"), "0.0.0.0:80".parse().unwrap());
        let stage = Self { engine, host, db, _server };
        eventually(PATIENCE, || stage.holds());
        stage
    }

    fn reaches(&self, name: &str, patience: Duration) -> bool {
        self.engine.netns_of(name).tcp_within(self.db, patience).is_open()
    }

    /// What is allowed passes, and nothing else.
    fn holds(&self) -> Result<(), String> {
        let (web, other) = (self.reaches("web", Duration::from_secs(3)), self.reaches("other", Duration::from_millis(300)));
        if web && !other { Ok(()) } else { Err(format!("web reaches db: {web}, other reaches db: {other}")) }
    }

    fn in_force(&self) {
        eventually(PATIENCE, || self.host.is_in_force());
    }
}

fn signal(up: &Process, words: &str, signal: Signal) {
    let pid = child(up, words).unwrap_or_else(|| panic!("no {words}"));
    kill(Pid::from_raw(pid), signal).unwrap();
}

const AGENT: &str = "bulkhead-agent run";

/// A file system of one megabyte that can be filled, below the engine's folder and so removed with it.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn at(path: &Path, owner: Option<u32>) -> Self {
        fs::create_dir_all(path).unwrap();
        lab::process::check(Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(path));
        chown(path, owner, owner).unwrap();
        Self(path.to_owned())
    }

    fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        // Until it is full, to the last byte.
        for size in [65_536, 512, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }

    fn clear(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

#[test]
fn a_killed_supervisor_leaves_nobody_behind_and_up_works_again() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let mut up = host.up();
    let stage = Stage::set(&engine, &host);
    let children = family(i32::try_from(up.id()).unwrap());
    up.signal(Signal::SIGKILL);
    assert!(up.wait(PATIENCE).is_some());
    eventually(PATIENCE, || {
        let left: Vec<_> = children.iter().filter(|child| lives(child)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?} outlive their supervisor")) }
    });
    assert_eq!(stage.holds(), Ok(()), "with nobody there");
    let _up = host.up();
    stage.in_force();
    assert_eq!(stage.holds(), Ok(()));
}

#[test]
fn a_full_disk_keeps_the_plan_in_force_lets_a_quarantine_act_and_loses_no_decision() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let agents = SmallDisk::at(&host.state_dir.join("agent"), None);
    let up = host.up();
    let stage = Stage::set(&engine, &host);
    agents.fill();
    // A new container, and a change: both act, and the status says what is not on disk.
    engine.docker(["restart", "-t", "0", "other"]);
    host.bulkhead(["quarantine", "web"]);
    eventually(PATIENCE, || if stage.reaches("web", Duration::from_millis(300)) { Err("web is not cut off") } else { Ok(()) });
    assert!(!stage.reaches("other", Duration::from_millis(300)));
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("not on disk") { Ok(()) } else { Err(status) }
    });
    // Killed with that disk it comes back all the same, gets what it could not keep, and binds who comes.
    let killed = child(&up, AGENT);
    signal(&up, AGENT, Signal::SIGKILL);
    eventually(PATIENCE, || match child(&up, AGENT) {
        Some(pid) if Some(pid) != killed => Ok(()),
        found => Err(format!("the agent is {found:?}")),
    });
    stage.in_force();
    engine.docker(["restart", "-t", "0", "web"]);
    assert!(!stage.reaches("web", Duration::from_millis(300)), "its quarantine");
    host.bulkhead(["release", "web"]);
    eventually(PATIENCE, || stage.holds());
    agents.clear();
    eventually(PATIENCE, || if host.said().contains("on disk again") { Ok(()) } else { Err(host.said()) });
    stage.in_force();
    assert_eq!(stage.holds(), Ok(()));
}

#[test]
fn a_controller_whose_disk_is_full_acknowledges_nothing_that_it_cannot_keep() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    let disk = SmallDisk::at(&host.state_dir.join("controller"), Some(nobody));
    let up = host.up();
    let stage = Stage::set(&engine, &host);
    host.bulkhead(["allow", "other", "db", "tcp/81"]);
    disk.fill();
    let decided = |port: &str| host.try_bulkhead(["allow", "other", "db", port]);
    // A few pages are left in the store's own files: sooner or later it is full, and says so.
    let (mut kept, mut refused) = (Vec::new(), None);
    for port in 1_000..1_200 {
        let port = format!("tcp/{port}");
        let out = decided(&port);
        if !out.status.success() {
            refused = Some((port, String::from_utf8_lossy(&out.stderr).into_owned()));
            break;
        }
        kept.push(port);
    }
    let (refused, words) = refused.expect("the disk is full");
    assert!(words.contains("full") || words.contains("store"), "it says why: {words}");
    assert_eq!(stage.holds(), Ok(()), "what is in force stays");
    // What was acknowledged survives a kill; what was refused is not there.
    disk.clear();
    signal(&up, "bulkhead controller", Signal::SIGKILL);
    let policy = eventually(PATIENCE, || {
        let out = host.try_bulkhead(["describe", "policy", "db", "-o", "json"]);
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into_owned())
        }
    });
    for port in kept.iter().chain([&"tcp/81".to_owned()]) {
        assert!(policy.contains(port.as_str()), "{port} was acknowledged: {policy}");
    }
    assert!(!policy.contains(&refused), "{refused} was refused: {policy}");
    stage.in_force();
    eventually(PATIENCE, || {
        let out = decided(&refused);
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    });
    assert_eq!(stage.holds(), Ok(()));
}

#[test]
fn a_damaged_store_and_processes_that_hang_open_nothing() {
    let _limit = limit(Duration::from_secs(240));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let mut up = host.up();
    let stage = Stage::set(&engine, &host);

    // The controller is away for long: a container that comes meanwhile is bound all the same.
    signal(&up, "bulkhead controller", Signal::SIGSTOP);
    for name in ["web", "other"] {
        engine.docker(["restart", "-t", "0", name]);
    }
    eventually(PATIENCE, || stage.holds());
    signal(&up, "bulkhead controller", Signal::SIGCONT);
    stage.in_force();

    // The engine's events come late: until they do, whoever comes is closed in; then he is bound.
    signal(&up, "engine-filter", Signal::SIGSTOP);
    for name in ["web", "other"] {
        engine.docker(["restart", "-t", "0", name]);
    }
    for name in ["web", "other"] {
        let same = engine.address(name, "fault");
        assert!(!stage.reaches("other", Duration::from_millis(300)), "{name} at {same}");
    }
    signal(&up, "engine-filter", Signal::SIGCONT);
    eventually(PATIENCE, || stage.holds());

    // A store that cannot be read: what is in force stays, and `up` says so instead of beginning a new one.
    up.stop(PATIENCE);
    let store = host.state_dir.join("controller/store.db");
    let whole = fs::read(&store).unwrap();
    fs::write(&store, &whole[..whole.len() / 2]).unwrap();
    let out = host.try_bulkhead(["up"]);
    assert!(!out.status.success());
    let words = format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout));
    assert!(words.contains("store"), "{words}");
    assert_eq!(stage.holds(), Ok(()), "without a store");
    assert_eq!(fs::read(&store).unwrap().len(), whole.len() / 2, "it is left as it is");
}

#[test]
fn half_of_fifty_quarantines_act_within_a_tenth_of_a_second() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let _up = host.up();
    let stage = Stage::set(&engine, &host);
    let (web, db) = (engine.netns_of("web"), engine.netns_of("db"));
    let last: Arc<Mutex<SystemTime>> = Arc::new(Mutex::new(SystemTime::now()));
    let its = Arc::clone(&last);
    let capture = Capture::start(&db, Some("eth0"), move |packet| {
        if !packet.outgoing && packet.protocol == PROTO_UDP {
            *its.lock().unwrap() = packet.at;
        }
    });
    let ended = Arc::new(AtomicBool::new(false));
    let (its, to) = (Arc::clone(&ended), SocketAddr::new(stage.db.ip(), 53));
    let socket = web.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let sender = thread::spawn(move || {
        while !its.load(Ordering::Relaxed) {
            // A refusal is told at the next send; that is what is waited for.
            let _ = socket.send_to(b"beat", to);
            thread::sleep(Duration::from_millis(1));
        }
    });
    let mut took = Vec::new();
    for _ in 0..crate::asked("BULKHEAD_CHAOS_QUARANTINES", 50) {
        let flows = || last.lock().unwrap().elapsed().is_ok_and(|since| since < Duration::from_millis(50));
        eventually(PATIENCE, || if flows() { Ok(()) } else { Err("nothing flows") });
        let begun = SystemTime::now();
        host.bulkhead(["quarantine", "web"]);
        eventually(PATIENCE, || {
            if last.lock().unwrap().elapsed().is_ok_and(|s| s > Duration::from_millis(300)) { Ok(()) } else { Err("it flows on") }
        });
        took.push(last.lock().unwrap().duration_since(begun).unwrap_or_default().as_secs_f64() * 1000.0);
        host.bulkhead(["release", "web"]);
    }
    ended.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    drop(capture);
    took.sort_by(f64::total_cmp);
    let text = format!(
        "engine {:?}: from the start of `bulkhead quarantine` to the last packet that passed: p50 {:.0} ms, p99 {:.0} ms, of {}",
        engine.kind,
        took[took.len() / 2],
        took[took.len() * 99 / 100],
        took.len()
    );
    println!("{text}");
    crate::report(&text);
    // The median says what it costs, the longest what else the machine does; with builds beside it, the median does too.
    let (waiting, cores) = (lab::load(), thread::available_parallelism().unwrap().get() as f64);
    if waiting > 4.0 * cores {
        lab::skip!("{waiting} processes for {cores} cores; {text}");
    }
    assert!(took[took.len() / 2] < 100.0, "{text}");
}

#[test]
fn a_denied_packet_is_in_the_flows_within_a_second_while_another_workload_floods() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let _up = host.up();
    let stage = Stage::set(&engine, &host);
    let (web, other) = (engine.netns_of("web"), engine.netns_of("other"));
    // What is put on the cable, by the namespace's own count (proc(5)).
    let on_the_cable = |netns: &lab::Netns| {
        let devices = netns.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let eth0 = devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
        eth0.split_whitespace().nth(9).unwrap().parse::<u64>().unwrap()
    };
    let before = on_the_cable(&other);
    let flooding = Arc::new(AtomicBool::new(true));
    let (its, to) = (Arc::clone(&flooding), stage.db.ip());
    let socket = other.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let flood = thread::spawn(move || {
        let mut sent = 0_u64;
        while its.load(Ordering::Relaxed) {
            // An ICMP error to an earlier one is told instead of sending.
            sent += u64::from(socket.send_to(b"flood", (to, 1_000 + u16::try_from(sent % 10_000).unwrap())).is_ok());
        }
        sent
    });
    thread::sleep(Duration::from_millis(500));
    let begun = std::time::Instant::now();
    web.udp_send(SocketAddr::new(stage.db.ip(), 7_777), b"denied");
    let seen = eventually(PATIENCE, || {
        let flows = host.bulkhead(["flows", "--verdict", "deny", "--port", "7777", "-o", "json"]);
        if flows.contains("7777") { Ok(begun.elapsed()) } else { Err("not in the flows") }
    });
    thread::sleep(Duration::from_secs(1));
    let allowed = stage.reaches("web", Duration::from_secs(3));
    flooding.store(false, Ordering::Relaxed);
    let tried = flood.join().unwrap();
    let took = begun.elapsed();
    let sent = on_the_cable(&other) - before;
    assert!(allowed, "what is allowed passes meanwhile");

    // Counted by workload and reason; the pairs and the row `other` make the same sum.
    let told = eventually(PATIENCE, || {
        let status: serde_json::Value = serde_json::from_str(&host.bulkhead(["status", "-o", "json"])).unwrap();
        let denied = status["nodes"][0]["status"]["denied"].clone();
        let by = |side: &str| denied["by"].as_array()?.iter().find(|row| row["side"] == side)?["packets"].as_u64();
        let (web, other) = (by("web").unwrap_or(0), by("other").unwrap_or(0));
        let sums = |key: &str| denied[key].as_object().map_or(0, |rows| rows.values().filter_map(serde_json::Value::as_u64).sum::<u64>());
        let pairs: u64 = denied["pairs"].as_array().map_or(0, |rows| rows.iter().filter_map(|row| row["packets"].as_u64()).sum());
        let whole = sums("total") == web + other && pairs + sums("other") == sums("total");
        // Beside the flood there is ARP.
        if web == 1 && (sent.saturating_sub(20)..=sent).contains(&other) && whole {
            Ok(other)
        } else {
            Err(format!("{sent} sent: {denied}"))
        }
    });
    let text = format!(
        "engine {:?}: {told} denials of {sent} sent ({tried} tried) in {took:?} ({:.0}/s); another workload's denied packet in the flows after {seen:?}",
        engine.kind,
        sent as f64 / took.as_secs_f64()
    );
    println!("{text}");
    crate::report(&text);
    assert!(seen < Duration::from_secs(3), "within a second, give or take a busy machine: {seen:?}");
}
