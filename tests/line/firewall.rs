//! A real firewalld beside what is enforced: it starts, reloads, trusts the bridge and stops, with each of its backends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use lab::{Engine, Host, Process, eventually, limit, needs_engine};

use crate::{PATIENCE, enforce_by_hand, is_held, stage};

/// Of any of our own users, for the namespace of one test.
const BUS: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=SOCKET</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>"#;

/// firewalld in the engine's namespace, on a bus of its own.
struct Firewalld<'e> {
    engine: &'e Engine,
    root: PathBuf,
    dir: PathBuf,
    daemon: Option<Process>,
    _bus: Process,
}

impl<'e> Firewalld<'e> {
    /// Where tests/setup/firewalld unpacked it.
    fn unpacked() -> Option<PathBuf> {
        Some(lab::engine::cache_dir().join("firewalld")).filter(|root| root.join("usr/sbin/firewalld").is_file())
    }

    fn new(engine: &'e Engine, root: PathBuf) -> Self {
        let dir = engine.dir.join("firewalld");
        fs::create_dir_all(dir.join("etc")).unwrap();
        let config = dir.join("bus.conf");
        fs::write(&config, BUS.replace("SOCKET", &dir.join("bus").to_string_lossy())).unwrap();
        let mut command = Command::new(root.join("usr/bin/dbus-daemon"));
        command.arg("--nofork").arg("--config-file").arg(config).stderr(fs::File::create(dir.join("bus.log")).unwrap());
        let bus = engine.netns.spawn(inside(&root, &mut command));
        eventually(PATIENCE, || if dir.join("bus").exists() { Ok(()) } else { Err("no bus") });
        Self { engine, root, dir, daemon: None, _bus: bus }
    }

    /// A program of its package, on the bus.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("/usr/bin/python3");
        inside(&self.root, command.arg(self.root.join(program)));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", self.dir.join("bus").display()));
        command
    }

    fn start(&mut self, backend: &str) {
        // Reverse path filters need an expression that not every kernel has.
        let text = format!("FirewallBackend={backend}\nIPv6_rpfilter=no\nDefaultZone=public\n");
        fs::write(self.dir.join("etc/firewalld.conf"), text).unwrap();
        let log = fs::File::create(self.dir.join("log")).unwrap();
        let mut daemon = self.command("usr/sbin/firewalld");
        daemon.args(["--nofork", "--nopid", "--system-config"]).arg(self.dir.join("etc"));
        daemon.arg("--default-config").arg(self.root.join("usr/lib/firewalld")).arg("--log-file").arg(self.dir.join("own.log"));
        self.daemon = Some(self.engine.netns.spawn(daemon.stdout(log.try_clone().unwrap()).stderr(log)));
        eventually(PATIENCE, || {
            let state = self.engine.netns.output(self.command("usr/bin/firewall-cmd").arg("--state"));
            let said = || format!("firewalld does not run: {}", fs::read_to_string(self.dir.join("log")).unwrap_or_default());
            if state.status.success() { Ok(()) } else { Err(said()) }
        });
    }

    fn tell(&self, words: &str) {
        self.engine.netns.check(self.command("usr/bin/firewall-cmd").args(words.split(' ')));
    }

    fn stop(&mut self) {
        assert!(self.daemon.as_mut().unwrap().stop(PATIENCE).is_some(), "firewalld does not end");
        self.daemon = None;
    }
}

/// A program that finds its libraries and modules where they are unpacked.
fn inside<'c>(root: &Path, command: &'c mut Command) -> &'c mut Command {
    let places =
        |folders: &[&str]| folders.iter().map(|folder| root.join(folder).to_string_lossy().into_owned()).collect::<Vec<_>>().join(":");
    let libraries = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    command.env("LD_LIBRARY_PATH", places(&[&libraries, &libraries["usr/".len()..]]));
    command.env("GI_TYPELIB_PATH", places(&[&format!("{libraries}/girepository-1.0")]));
    command.env("PYTHONPATH", places(&["usr/lib/python3/dist-packages"]))
}

#[test]
fn a_firewalld_that_starts_reloads_trusts_the_bridge_and_stops_opens_nothing() {
    let _limit = limit(Duration::from_secs(400));
    let engine = needs_engine!();
    let Some(root) = Firewalld::unpacked() else { lab::skip!("needs firewalld: run tests/setup/firewalld") };
    let db = stage(&engine);
    let host = Host::on(&engine);
    let mut up = host.up();
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    let mut firewalld = Firewalld::new(&engine, root);
    let other = engine.netns_of("other");
    let (over, tried, opened) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    let mut ours = String::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let open = [&other, &engine.netns].map(|from| from.tcp_within(db, Duration::from_millis(100)).is_open());
                opened.fetch_add(open.iter().map(|&open| u32::from(open)).sum(), Ordering::Relaxed);
                tried.fetch_add(2, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let _over = Over(&over);
        for backend in ["nftables", "iptables"] {
            firewalld.start(backend);
            // A reload forgets what was not said to be permanent. What it trusts passes it; the rest is its own affair.
            let trust = "--zone=trusted --add-interface=br-line";
            for words in [trust, "--reload", "--complete-reload", trust] {
                firewalld.tell(words);
            }
            if backend == "nftables" {
                eventually(PATIENCE, || is_held(&engine, db).map_err(|held| format!("beside firewalld: {held}")));
            }
            firewalld.stop();
            eventually(PATIENCE, || is_held(&engine, db).map_err(|held| format!("after firewalld with {backend}: {held}")));
        }
        ours = engine.netns.check(Command::new("nft").args(["list", "tables"]));
    });
    println!("{} attempts that nobody allowed, beside firewalld", tried.load(Ordering::Relaxed));
    assert_eq!(opened.load(Ordering::Relaxed), 0, "of {tried:?}");
    assert!(tried.load(Ordering::Relaxed) > 20, "{tried:?}");
    assert!(ours.contains("inet bulkhead\n") && ours.contains("bridge bulkhead\n"), "{ours}");
    let status = host.bulkhead(["status", "-o", "json"]);
    assert!(!status.contains("drift found"), "nothing of ours was touched: {status}");
    host.bulkhead(["down", "--yes"]);
    assert!(up.wait(PATIENCE).is_some());
}

/// Ends the attempts, also where a deed panics.
struct Over<'o>(&'o AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
