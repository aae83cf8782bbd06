//! A container joins an enforced network: when the kernel knows its addresses, what its first packet meets, and what would spare it
//! that. With a real engine and the two programs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lab::engine::{Kind, Options};
use lab::{Capture, Engine, Host, Server, eventually};
use serde_json::json;

use crate::api::Api;
use crate::figures::{Samples, Table, time};
use crate::nsid::Reader;
use crate::told_of::{Bound, Follower};

const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE: &str = "join:1";
const NETWORK: &str = "front";
/// The runtime that starts nobody before it is bound.
const WAITS: &str = "waits";
/// Source ports say who it is; each container has so many.
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 4;

/// What was seen on the cables, by the index of the host's end.
#[derive(Default)]
struct Seen {
    /// The first ARP question or SYN for the server, and how many of each.
    first: BTreeMap<u32, (SystemTime, usize, usize)>,
    /// Whose it was: the source port of the SYN.
    port: BTreeMap<u32, u16>,
}

/// A container that was made and not yet started.
struct Made {
    id: String,
    port: u16,
}

/// One start.
struct Start {
    made: Made,
    /// Until the engine answered, seconds.
    took: f64,
}

struct Effort {
    singles: usize,
    bursts: usize,
    many: usize,
}

/// An enforced network with a server that the workload `client` may reach; its address.
fn stage(engine: &Engine, host: &Host<'_>) -> (IpAddr, Server) {
    engine.import_busybox(IMAGE);
    engine.docker(["network", "create", "--subnet", "172.29.0.0/16", "-o", "com.docker.network.bridge.name=br-front", NETWORK]);
    engine.docker(["run", "-d", "--name", "server", "--network", NETWORK, IMAGE]);
    engine.docker(["run", "-d", "--name", "client", "--label", "bulkhead.dev/workload=client", "--network", NETWORK, IMAGE]);
    let listen: SocketAddr = "[::]:80".parse().unwrap();
    let server = Server::tcp(&engine.netns_of("server"), listen, |mut stream, _| {
        let _ = stream.write_all(b"hello\n");
    });
    host.bulkhead(["segment", "add", "network:front", "--segment", "front"]);
    eventually(PATIENCE, || {
        let workloads = host.bulkhead(["get", "workloads"]);
        if ["server", "client"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    host.bulkhead(["allow", "client", "server", "tcp/80"]);
    host.bulkhead(["mode", "front", "enforce", "--yes", "--deny-unlearned", "server"]);
    eventually(PATIENCE, || {
        let tables = engine.netns.ruleset();
        if tables.contains("table bridge bulkhead") { Ok(()) } else { Err(tables) }
    });
    let address = engine.address("server", NETWORK);
    engine.docker(["rm", "-f", "client"]);
    (address, server)
}

fn watch(engine: &Engine, server: IpAddr) -> (Arc<Mutex<Seen>>, Capture) {
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let its = seen.clone();
    let capture = Capture::start(&engine.netns, None, move |packet| {
        let opens = packet.opens() && packet.destination_port == 80;
        if packet.outgoing || packet.destination != server || !(packet.arp || opens) {
            return;
        }
        let mut seen = its.lock().unwrap();
        if opens {
            seen.port.insert(packet.interface, packet.source_port);
        }
        let (_, asked, opened) = seen.first.entry(packet.interface).or_insert((packet.at, 0, 0));
        *(if packet.arp { asked } else { opened }) += 1;
    });
    (seen, capture)
}

/// A runtime that goes on to runc's `start` when the agent has said that the container is bound, as a hook of the runtime would.
fn waiting_runtime(dir: &Path) -> std::path::PathBuf {
    let (path, dir) = (dir.join(WAITS), dir.display());
    let script = format!(
        "#!/bin/sh\nfor id; do :; done\ncase \" $* \" in *' start '*)\n  begun=$(date +%s%N); n=0\n  \
         while [ ! -e {dir}/bound/$id ] && [ $n -lt 5000 ]; do sleep 0.001; n=$((n + 1)); done\n  \
         echo \"$begun $(date +%s%N)\" >{dir}/waited/$id ;;\nesac\nexec runc \"$@\"\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["bound", "waited"] {
        fs::create_dir(path.with_file_name(name)).unwrap();
    }
    path
}

/// When the engine said that each container joined.
fn joined(log: &Path) -> BTreeMap<String, SystemTime> {
    let events = fs::read_to_string(log).unwrap();
    let events = events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let event = |event: serde_json::Value| {
        let at = UNIX_EPOCH + Duration::from_nanos(event["timeNano"].as_u64()?);
        Some((event["Actor"]["Attributes"]["container"].as_str()?.to_owned(), at))
    };
    events.filter_map(event).collect()
}

/// Seconds from one moment to another, which may lie before it.
fn since(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).map_or_else(|early| -early.duration().as_secs_f64(), |late| late.as_secs_f64())
}

/// Median and 99 %, signed; `-` where nothing was measured.
fn both(samples: &Samples) -> String {
    let signed = |value: f64| format!("{}{}", if value < 0.0 { "-" } else { "" }, time(value.abs()));
    match samples.0.is_empty() {
        true => "-".to_owned(),
        false => format!("{} / {}", signed(samples.quantile(0.5)), signed(samples.quantile(0.99))),
    }
}

/// Containers of the workload `client`, each connecting to the server once as soon as it runs.
struct Maker<'a> {
    api: &'a Api,
    script: String,
    next: u16,
}

impl Maker<'_> {
    fn make(&mut self, runtime: &str) -> Made {
        let port = self.next;
        self.next += PORTS;
        let body = json!({
            "Image": IMAGE,
            "Cmd": ["sh", "-c", self.script],
            "Labels": { "bulkhead.dev/workload": "client" },
            "HostConfig": {
                "NetworkMode": NETWORK,
                "Runtime": runtime,
                "Sysctls": { "net.ipv4.ip_local_port_range": format!("{port} {}", port + PORTS - 1) },
            },
        });
        let made = self.api.call("POST", &format!("/containers/create?name=c{port}"), &body.to_string()).unwrap();
        Made { id: made["Id"].as_str().unwrap().to_owned(), port }
    }

    fn run(api: &Api, made: Made) -> Start {
        let begun = Instant::now();
        api.start(&made.id).unwrap();
        let took = begun.elapsed().as_secs_f64();
        api.wait(&made.id).unwrap();
        Start { made, took }
    }

    fn remove(&self, starts: &[Start]) {
        starts.iter().for_each(|start| self.api.remove(&start.made.id).unwrap());
    }

    fn singles(&mut self, effort: &Effort, runtime: &str) -> Vec<Start> {
        let one = |_| {
            let start = Self::run(self.api, self.make(runtime));
            self.remove(std::slice::from_ref(&start));
            start
        };
        (0..effort.singles).map(one).collect()
    }

    fn bursts(&mut self, effort: &Effort, runtime: &str) -> Vec<Start> {
        let mut all = Vec::new();
        for _ in 0..effort.bursts {
            let made: Vec<Made> = (0..effort.many).map(|_| self.make(runtime)).collect();
            let (together, api) = (Barrier::new(effort.many), self.api);
            let ended: Vec<Start> = thread::scope(|scope| {
                let start = |made| {
                    let together = &together;
                    scope.spawn(move || {
                        together.wait();
                        Self::run(api, made)
                    })
                };
                let threads: Vec<_> = made.into_iter().map(start).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            self.remove(&ended);
            all.extend(ended);
        }
        all
    }
}

/// Everything that was written down, to be looked up by container.
struct Record<'a> {
    joined: BTreeMap<String, SystemTime>,
    bound: BTreeMap<String, Bound>,
    seen: &'a Seen,
    addressed: BTreeMap<u32, SystemTime>,
    waited: &'a Path,
}

impl Record<'_> {
    /// How long the runtime kept it waiting, seconds.
    fn waited(&self, id: &str) -> Option<f64> {
        let text = fs::read_to_string(self.waited.join(id)).ok()?;
        let mut times = text.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        let (begun, ended) = (times.next()?, times.next()?);
        Some(Duration::from_nanos(ended.saturating_sub(begun)).as_secs_f64())
    }

    fn row(&self, what: String, starts: &[Start]) -> Vec<String> {
        let [mut bound, mut own, mut addressed, mut first, mut took, mut waited]: [Samples; 6] = Default::default();
        let (mut questions, mut opened, mut hit) = (0, 0, 0);
        let mut early = Vec::new();
        for start in starts {
            let id = &start.made.id;
            took.push(start.took);
            waited.0.extend(self.waited(id));
            if let Some(its) = self.bound.get(id) {
                own.push(its.own.as_secs_f64());
                bound.0.extend(self.joined.get(id).map(|event| since(*event, its.at)));
            }
            let ports = start.made.port..start.made.port + PORTS;
            let veth = self.seen.port.iter().find(|(_, port)| ports.contains(port)).map(|(veth, _)| veth);
            let Some((veth, event)) = veth.zip(self.joined.get(id)) else { continue };
            let (at, asked, syns) = self.seen.first[veth];
            first.push(since(*event, at));
            // What came again had been dropped.
            questions += asked.saturating_sub(1);
            opened += syns.saturating_sub(1);
            hit += usize::from(asked > 1 || syns > 1);
            if let Some(address) = self.addressed.get(veth) {
                addressed.push(since(*event, *address));
                early.push(since(*address, at));
            }
        }
        // Bound as long after the address can be read as the agent takes now after the engine's answer.
        let ours = if own.0.is_empty() { 0.0 } else { own.quantile(0.99) };
        let still = early.iter().filter(|early| **early < ours).count();
        vec![
            what,
            both(&bound),
            both(&own),
            both(&first),
            format!("{hit} of {} ({questions} ARP, {opened} SYN)", first.0.len()),
            both(&addressed),
            format!("{still} of {}", early.len()),
            both(&waited),
            both(&took),
        ]
    }
}

pub(crate) fn run(short: bool) {
    let effort = if short { Effort { singles: 5, bursts: 1, many: 10 } } else { Effort { singles: 100, bursts: 6, many: 50 } };
    let kind = [Kind::Current, Kind::OnPath, Kind::Debian].into_iter().find(|kind| kind.programs().is_some());
    let dir = tempfile::Builder::new().prefix("bulkhead-bench-").tempdir().unwrap();
    let runtime = format!("--add-runtime={WAITS}={}", waiting_runtime(dir.path()).display());
    let options = Options { kind, flags: vec![runtime], ..Options::default() };
    let engine = match Engine::start(options) {
        Ok(engine) => engine,
        Err(why) => return println!("not measured: {why}\n"),
    };
    let mut host = Host::on(&engine);
    host.set("BULKHEAD_LOG", "info,node_agent::agent::work::bound=debug");
    let _up = host.up();
    let (server, _server) = stage(&engine, &host);
    let (seen, capture) = watch(&engine, server);
    let log = engine.dir.join("events");
    let mut events = engine.command("docker");
    events.args(["events", "--filter", "type=network", "--filter", "event=connect", "--format", "{{json .}}"]);
    let mut events = engine.netns.spawn(events.stdout(File::create(&log).unwrap()).stderr(Stdio::null()));
    let reader = Reader::start(&engine.netns);
    let follower = Follower::start(engine.dir.join("bulkhead/log"), dir.path().join("bound"));
    let api = Api::at(&engine.socket());
    let script = format!("nc -w 20 {server} 80 </dev/null; sleep 0.1");
    let mut maker = Maker { api: &api, script, next: FIRST_PORT };
    // One before the rest, so that the streams and all caches are there.
    let first = maker.make("runc");
    eventually(PATIENCE, || if log.exists() { Ok(()) } else { Err("no events") });
    let first = Maker::run(&api, first);
    maker.remove(&[first]);

    let rows = [
        ("alone".to_owned(), maker.singles(&effort, "runc")),
        (format!("{} at once", effort.many), maker.bursts(&effort, "runc")),
        ("alone, the runtime waits".to_owned(), maker.singles(&effort, WAITS)),
        (format!("{} at once, the runtime waits", effort.many), maker.bursts(&effort, WAITS)),
    ];
    let (addressed, question) = reader.end();
    let bound = follower.end();
    let dropped = capture.end();
    events.stop(Duration::from_secs(2));
    let seen = seen.lock().unwrap();
    let record = Record { joined: joined(&log), bound, seen: &seen, addressed, waited: &dir.path().join("waited") };
    println!(
        "{:?}; times after the engine's event `network connect`, median / p99; \"own\": from when the agent knew all to the",
        engine.kind
    );
    println!("kernel's answer. A question by nsid took {} (p99 {}).", time(question.quantile(0.5)), time(question.quantile(0.99)));
    if dropped > 0 {
        println!("The capture missed {dropped} packets.");
    }
    println!();
    let mut table = Table::new(&[
        "starts",
        "bound",
        "of it our own",
        "first packet",
        "first packets lost",
        "address by nsid",
        "lost if bound from there",
        "kept waiting",
        "start answered",
    ]);
    for (what, starts) in rows {
        table.row(record.row(what, &starts));
    }
    table.print();
}
