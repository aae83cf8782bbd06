//! A quarantine and one rule more, from the command to where it holds, beside how much else is in force. With a real engine and the
//! two programs; the rest of what is in force is of workloads that don't run here, so that what is told is the plan's own weight.

use std::fmt::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use lab::engine::{Kind, Options};
use lab::frame::PROTO_UDP;
use lab::{Capture, Engine, Host, eventually};

use crate::figures::{Samples, Table, grouped, time};

const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE: &str = "cut:1";
/// The rest of what is in force is of so many workloads.
const WORKLOADS: usize = 1_000;
/// So many are applied at once.
const PART: usize = 200;
/// Nothing that passed for so long: it is cut off. The command waits for a second at most.
const OVER: Duration = Duration::from_millis(300);

/// Policies of these others, who have so many rules in all.
fn others(workloads: Range<usize>, rules: usize) -> String {
    let mut text = String::new();
    for n in workloads {
        let _ = write!(
            text,
            "---\napiVersion: bulkhead.dev/v1alpha1\nkind: WorkloadPolicy\nmetadata:\n  name: s{n}\n  namespace: made\nspec:\n"
        );
        text.push_str("  ingress: []\n  egress:\n");
        for rule in 0..rules / WORKLOADS {
            let _ = writeln!(text, "    - peer: made/s{}\n      ports: tcp/{}", (n + rule + 1) % WORKLOADS, 1_000 + rule);
        }
    }
    text
}

/// A server and a client that sends to it each millisecond, enforced.
fn stage(engine: &Engine, host: &Host<'_>) -> SocketAddr {
    engine.import_busybox(IMAGE);
    engine.docker(["network", "create", "--subnet", "172.29.0.0/16", "-o", "com.docker.network.bridge.name=br-front", "front"]);
    for name in ["server", "client"] {
        engine.docker(["run", "-d", "--name", name, "--network", "front", IMAGE]);
    }
    host.bulkhead(["segment", "add", "network:front", "--segment", "front"]);
    eventually(PATIENCE, || {
        let workloads = host.bulkhead(["get", "workloads"]);
        if ["server", "client"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    host.bulkhead(["allow", "client", "server", "udp/53"]);
    host.bulkhead(["mode", "front", "enforce", "--yes"]);
    SocketAddr::new(engine.address("server", "front"), 53)
}

/// Ends who sends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Seconds that a command took.
fn took(host: &Host<'_>, words: &[&str]) -> f64 {
    let begun = Instant::now();
    let said = host.bulkhead(words);
    let seconds = begun.elapsed().as_secs_f64();
    if !said.contains("in force on") {
        println!("{}: {said}", words.join(" "));
    }
    seconds
}

pub(crate) fn run(short: bool) {
    let (times, sizes): (usize, &[usize]) = if short { (5, &[0, 10_000]) } else { (30, &[0, 10_000, 100_000]) };
    let kind = [Kind::Current, Kind::OnPath, Kind::Debian].into_iter().find(|kind| kind.programs().is_some());
    let engine = match Engine::start(Options { kind, ..Options::default() }) {
        Ok(engine) => engine,
        Err(why) => return println!("not measured: {why}\n"),
    };
    let host = Host::on(&engine);
    let _up = host.up();
    let server = stage(&engine, &host);
    let last: Arc<Mutex<SystemTime>> = Arc::new(Mutex::new(SystemTime::now()));
    let its = Arc::clone(&last);
    let capture = Capture::start(&engine.netns_of("server"), Some("eth0"), move |packet| {
        if !packet.outgoing && packet.protocol == PROTO_UDP {
            *its.lock().unwrap() = packet.at;
        }
    });
    let over = AtomicBool::new(false);
    let socket = engine.netns_of("client").run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let mut table = Table::new(&[
        "rules of others",
        "quarantine: last packet, p50 / p99",
        "its command answered",
        "one rule more, in force and answered",
    ]);
    thread::scope(|scope| {
        // Also where something goes wrong.
        let _over = Over(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // A refusal is told at the next send; that is what is waited for.
                let _ = socket.send_to(b"beat", server);
                thread::sleep(Duration::from_millis(1));
            }
        });
        for &rules in sizes {
            if rules > 0 {
                let file = engine.dir.join("others.yaml");
                for first in (0..WORKLOADS).step_by(PART) {
                    std::fs::write(&file, others(first..first + PART, rules)).unwrap();
                    host.bulkhead(["apply", "-f", file.to_str().unwrap(), "--yes"]);
                }
                eventually(PATIENCE, || {
                    let status = host.bulkhead(["status"]);
                    if status.contains("plan in force") { Ok(()) } else { Err(status) }
                });
            }
            let [mut cut, mut answered, mut allowed]: [Samples; 3] = Default::default();
            for n in 0..times {
                let since_last = || last.lock().unwrap().elapsed().unwrap_or_default();
                eventually(PATIENCE, || if since_last() < Duration::from_millis(20) { Ok(()) } else { Err("nothing flows") });
                let begun = SystemTime::now();
                answered.push(took(&host, &["quarantine", "client"]));
                eventually(PATIENCE, || if since_last() > OVER { Ok(()) } else { Err("it flows on") });
                cut.push(last.lock().unwrap().duration_since(begun).unwrap_or_default().as_secs_f64());
                host.bulkhead(["release", "client"]);
                allowed.push(took(&host, &["allow", "client", "server", &format!("tcp/{}", 10_000 + rules / 100 + n)]));
            }
            let both = |samples: &Samples| format!("{} / {}", time(samples.quantile(0.5)), time(samples.quantile(0.99)));
            table.row([grouped(rules as f64), both(&cut), both(&answered), both(&allowed)]);
        }
    });
    capture.end();
    table.print();
}
