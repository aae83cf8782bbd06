//! Many containers start under Enforce, one by one and fifty at once, each as hostile as busybox lets it be before it makes its one
//! allowed connection. Counted on the cables: what arrived that nobody allowed, and how often a first packet came too early.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::IpAddr;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use lab::frame::{PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP};
use lab::{Capture, Engine, Host, Netns, Packet, Server, eventually, limit, needs_engine};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::api::Api;
use crate::clock::{self, Clock};

const PATIENCE: Duration = Duration::from_secs(30);
const IMAGE: &str = "starts:1";
const NETWORK: &str = "front";
const GATEWAYS: [&str; 2] = ["172.29.7.1", "fd00:7::1"];
/// At once.
const BURST: u64 = 50;

/// Source ports say who it is, whatever address it has: those of `client`, who may reach the server.
const CLIENTS: std::ops::Range<u16> = 20_000..30_000;
/// Those of `stray`, who may reach nobody.
const STRAYS: std::ops::Range<u16> = 40_000..50_000;
/// Each container has so many, so that two connections at once find one.
const PORTS: u16 = 4;

/// How a container was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Alone,
    InABurst,
    /// While the agent hung: its first packets come before anybody could bind its address.
    BehindTheAgentsBack,
}

/// How one run of a container went, by its own account.
struct Run {
    name: String,
    client: bool,
    how: How,
    restart: bool,
    /// The first of its source ports.
    port: u16,
    ok: bool,
}

/// What was seen on the cables.
#[derive(Default)]
struct Seen {
    /// SYNs to the server by (veth, source port).
    opened: BTreeMap<(u32, u16), Syns>,
    /// Questions by ARP for the server by veth: the first packet waits for the answer. Whom the server asked before, as it does to find
    /// out whether an address is still there, knows it and does not ask.
    asked: BTreeMap<u32, (u32, SystemTime)>,
    /// The first ARP packet of the server's, by veth.
    told: BTreeMap<u32, SystemTime>,
    /// When the server's first packet came, by veth.
    heard: BTreeMap<u32, SystemTime>,
    /// Port of `client` or `stray` to whom the server's packets were sent, by veth.
    answered: BTreeSet<(u32, u16)>,
    leaks: Vec<String>,
}

#[derive(Clone, Copy)]
struct Syns {
    count: u32,
    source: IpAddr,
    /// When the first one came.
    at: SystemTime,
}

struct Stage {
    server: IpAddr,
    bystanders: [IpAddr; 2],
    seen: Arc<Mutex<Seen>>,
    captures: Vec<Capture>,
    _servers: Vec<Server>,
}

fn is_of_the_link(packet: &Packet) -> bool {
    // Neighbour discovery and listeners: a matter of layer 2 (README, "Always allowed").
    packet.protocol == PROTO_ICMPV6 && matches!(packet.destination_port, 130..=136 | 143) || packet.protocol == 2
}

/// Our own refusals: a reset in the name of who was asked, an ICMP error of the gateway.
fn is_refusal(packet: &Packet) -> bool {
    let error = matches!((packet.protocol, packet.destination_port), (PROTO_ICMP, 3) | (PROTO_ICMPV6, 1));
    packet.resets() || error && GATEWAYS.iter().any(|g| g.parse() == Ok(packet.source))
}

impl Stage {
    fn set(engine: &Engine, host: &Host<'_>) -> Self {
        engine.import_busybox(IMAGE);
        let subnets = ["--subnet", "172.29.7.0/26", "--ipv6", "--subnet", "fd00:7::/64", "-o", "com.docker.network.bridge.name=br-front"];
        engine.docker([&["network", "create"], &subnets[..], &[NETWORK]].concat());
        for name in ["server", "bystander"] {
            engine.docker(["run", "-d", "--name", name, "--network", NETWORK, IMAGE]);
        }
        let (server, bystander) = (engine.netns_of("server"), engine.netns_of("bystander"));
        let listen = |netns: &Netns| {
            Server::tcp(netns, "[::]:80".parse().unwrap(), |mut stream, _| {
                let _ = stream.write_all(b"hello\n");
            })
        };
        let servers = vec![listen(&server), listen(&bystander)];
        host.bulkhead(["segment", "add", "network:front", "--segment", "front"]);
        eventually(PATIENCE, || {
            let workloads = host.bulkhead(["get", "workloads"]);
            if ["server", "bystander"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
        });
        // Known by name only once one has run.
        for name in ["client", "stray"] {
            let label = format!("bulkhead.dev/workload={name}");
            engine.docker(["run", "-d", "--name", name, "--label", &label, "--network", NETWORK, IMAGE]);
        }
        eventually(PATIENCE, || {
            let workloads = host.bulkhead(["get", "workloads"]);
            if ["client", "stray"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
        });
        host.bulkhead(["allow", "client", "server", "tcp/80"]);
        host.bulkhead(["mode", "front", "enforce", "--yes", "--deny-unlearned", "stray", "--deny-unlearned", "bystander"]);
        eventually(PATIENCE, || {
            let status = host.bulkhead(["status"]);
            if status.contains("plan in force") { Ok(()) } else { Err(status) }
        });
        engine.docker(["rm", "-f", "client", "stray"]);
        let address = |name| engine.address(name, NETWORK);
        let mut stage = Self {
            server: address("server"),
            bystanders: [address("bystander"), engine.address_v6("bystander", NETWORK)],
            seen: Arc::default(),
            captures: Vec::new(),
            _servers: servers,
        };
        stage.watch(engine, &server, &bystander);
        stage
    }

    fn watch(&mut self, engine: &Engine, server: &Netns, bystander: &Netns) {
        let inside = |name: &'static str, may: fn(&Packet) -> bool| {
            let seen = Arc::clone(&self.seen);
            move |packet: Packet| {
                if !packet.outgoing && !packet.arp && !is_of_the_link(&packet) && !may(&packet) {
                    seen.lock().unwrap().leaks.push(format!("{name} received {packet:?}"));
                }
            }
        };
        let from_clients = |p: &Packet| p.protocol == PROTO_TCP && p.destination_port == 80 && CLIENTS.contains(&p.source_port);
        let at_server = Capture::start(server, Some("eth0"), inside("server", from_clients));
        let at_bystander = Capture::start(bystander, Some("eth0"), inside("bystander", |_| false));
        let (seen, server) = (Arc::clone(&self.seen), self.server);
        // What the host sends down a container's cable is what the container receives.
        let own: Vec<u32> = ["server", "bystander"].map(|name| cable(engine, name)).to_vec();
        let bridge = index(engine, "br-front");
        let everywhere = Capture::start(&engine.netns, None, move |packet| {
            if packet.interface == bridge || own.contains(&packet.interface) || packet.interface == 1 {
                return;
            }
            let mut seen = seen.lock().unwrap();
            if packet.arp {
                if !packet.outgoing && packet.destination == server {
                    seen.asked.entry(packet.interface).or_insert((0, packet.at)).0 += 1;
                } else if packet.outgoing && packet.source == server {
                    seen.told.entry(packet.interface).or_insert(packet.at);
                }
            } else if !packet.outgoing {
                if packet.opens() && packet.destination == server && packet.destination_port == 80 {
                    let first = Syns { count: 0, source: packet.source, at: packet.at };
                    seen.opened.entry((packet.interface, packet.source_port)).or_insert(first).count += 1;
                }
            } else if packet.source == server && packet.source_port == 80 && !packet.resets() {
                seen.heard.entry(packet.interface).or_insert(packet.at);
                seen.answered.insert((packet.interface, packet.destination_port));
            } else if !is_of_the_link(&packet) && !is_refusal(&packet) {
                seen.leaks.push(format!("a new container received {packet:?}"));
            }
        });
        self.captures = vec![at_server, at_bystander, everywhere];
    }

    /// First what is forbidden, all of it at once; then the allowed connection (a stray has none and tries all the same). Exit code 0
    /// if it went as it should.
    fn script(&self, client: bool) -> String {
        let [by4, by6] = self.bystanders;
        let server = self.server;
        let wanted = if client { "hello" } else { "" };
        let patience = if client { 20 } else { 1 };
        format!(
            "nc -w 1 {by4} 80 </dev/null & nc -w 1 {by6} 80 </dev/null & ping -c 1 -W 1 {by4} & nslookup x {by4} & nc -w 1 {server} 81 </dev/null &
            got=$(nc -w {patience} {server} 80 </dev/null); sleep 0.2; [ \"$got\" = \"{wanted}\" ]"
        )
    }
}

fn index(engine: &Engine, interface: &str) -> u32 {
    let text = engine.netns.ip(&format!("-o link show {interface}"));
    text.split(':').next().and_then(|n| n.trim().parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

/// The index of the host's end of a container's cable.
fn cable(engine: &Engine, container: &str) -> u32 {
    let out = engine.exec(container, ["cat", "/sys/class/net/eth0/iflink"]);
    String::from_utf8_lossy(&out.stdout).trim().parse().unwrap()
}

struct Starter<'s> {
    api: Api,
    stage: &'s Stage,
    up: &'s lab::Process,
    runs: Vec<Run>,
    ids: BTreeMap<String, String>,
    made: u64,
}

impl Starter<'_> {
    fn next(&mut self) -> (String, bool, u16) {
        self.made += 1;
        // One in ten is a stray: addresses go from those who may to those who may not, and back.
        let client = !self.made.is_multiple_of(10);
        let base = if client { CLIENTS.start } else { STRAYS.start };
        let port = base + PORTS * u16::try_from(self.made % 2_500).unwrap();
        (format!("c{}", self.made), client, port)
    }

    fn create(&mut self) -> (String, bool, u16) {
        let (name, client, port) = self.next();
        let workload = if client { "client" } else { "stray" };
        let id = self.api.create(&name, workload, (NETWORK, IMAGE), (port, port + PORTS - 1), &self.stage.script(client)).unwrap();
        self.ids.insert(name.clone(), id);
        (name, client, port)
    }

    fn alone(&mut self) {
        let (name, client, port) = self.create();
        let how = if self.made.is_multiple_of(7) { How::BehindTheAgentsBack } else { How::Alone };
        let signal = |signal| {
            let agent = lab::kin::child(self.up, "bulkhead-agent run").expect("the agent runs");
            kill(Pid::from_raw(agent), signal).unwrap();
        };
        if how == How::BehindTheAgentsBack {
            signal(Signal::SIGSTOP);
        }
        self.api.start(&name).unwrap();
        if how == How::BehindTheAgentsBack {
            // Long enough for everything it does first, shorter than it waits for an answer.
            thread::sleep(Duration::from_millis(400));
            signal(Signal::SIGCONT);
        }
        let ok = self.api.wait(&name).unwrap() == 0;
        self.runs.push(Run { name: name.clone(), client, how, restart: false, port, ok });
        if self.made.is_multiple_of(4) {
            self.api.restart(&name).unwrap();
            let ok = self.api.wait(&name).unwrap() == 0;
            self.runs.push(Run { name: name.clone(), client, how: How::Alone, restart: true, port, ok });
        }
        self.api.remove(&name).unwrap();
    }

    fn burst(&mut self, many: u64) {
        let made: Vec<_> = (0..many).map(|_| self.create()).collect();
        let together = Arc::new(Barrier::new(made.len()));
        let threads: Vec<_> = made
            .into_iter()
            .map(|(name, client, port)| {
                let (api, together) = (self.api.clone(), Arc::clone(&together));
                thread::spawn(move || {
                    together.wait();
                    let ok = api.start(&name).and_then(|()| api.wait(&name)).unwrap() == 0;
                    let _ = api.remove(&name);
                    Run { name, client, how: How::InABurst, restart: false, port, ok }
                })
            })
            .collect();
        self.runs.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
    }
}

/// Half of them alone, half in bursts.
fn starts(engine: &Engine, total: u64) {
    let mut host = Host::on(engine);
    host.set("BULKHEAD_LOG", "info,node_agent::agent::work::bound=debug,node_agent::inventory=debug");
    let up = host.up();
    let mut stage = Stage::set(engine, &host);
    let clock = Clock::start(engine, true);
    let mut starter = Starter { api: Api::at(&engine.socket()), stage: &stage, up: &up, runs: Vec::new(), ids: BTreeMap::new(), made: 0 };
    // The streams have to be there before what they tell.
    thread::sleep(Duration::from_secs(1));
    let burst = BURST.min(total / 2);
    while (starter.runs.len() as u64) < total {
        for _ in 0..burst.min(total / 2) {
            if starter.runs.len() as u64 >= total {
                break;
            }
            starter.alone();
        }
        if (starter.runs.len() as u64) < total {
            starter.burst(burst.min(total - starter.runs.len() as u64));
        }
    }
    let Starter { runs, ids, .. } = starter;
    let unseen: u64 = stage.captures.drain(..).map(Capture::end).sum();
    let seen = std::mem::take(&mut *stage.seen.lock().unwrap());
    report(engine, &host, &runs, &ids, seen, unseen, clock);
}

/// The first connections of one kind of start.
#[derive(Debug, Default)]
struct Firsts {
    /// Of each: first packets that were lost (a SYN, or ARP's question before it).
    lost: Vec<u32>,
    /// From the first question to the server's answer, in ms, sorted.
    took: Vec<f64>,
}

impl Firsts {
    fn of(runs: &[Run], how: How, seen: &Seen) -> Self {
        let mut firsts = Self::default();
        for run in runs.iter().filter(|run| run.client && run.how == how) {
            let Some((veth, syns)) = opened(run, seen) else { continue };
            let (questions, at) = seen.asked.get(&veth).copied().unwrap_or((0, syns.at));
            firsts.lost.push(syns.count.saturating_sub(1) + questions.saturating_sub(1));
            let heard = seen.heard.get(&veth).and_then(|heard| heard.duration_since(at).ok());
            firsts.took.extend(heard.map(|time| time.as_secs_f64() * 1000.0));
        }
        firsts.took.sort_by(f64::total_cmp);
        firsts
    }

    fn lost(&self) -> usize {
        self.lost.iter().filter(|n| **n > 0).count()
    }

    fn most(&self) -> u32 {
        self.lost.iter().copied().max().unwrap_or(0)
    }
}

impl std::fmt::Display for Firsts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (lost, all, most) = (self.lost(), self.lost.len(), self.most());
        write!(
            f,
            "{lost} of {all} (at most {most} each; answered after p50 {:.1}, p99 {:.1} ms)",
            clock::part(&self.took, 50),
            clock::part(&self.took, 99)
        )
    }
}

/// The veth of a run, and its SYNs to the server with their source.
fn opened(run: &Run, seen: &Seen) -> Option<(u32, Syns)> {
    let ports = run.port..run.port + PORTS;
    let mut veths = seen.opened.iter().filter(|((_, port), _)| ports.contains(port)).map(|((veth, _), first)| (*veth, *first));
    // A veth's index is never used again, and the second run of a container has another.
    veths.nth(usize::from(run.restart))
}

fn report(engine: &Engine, host: &Host<'_>, runs: &[Run], ids: &BTreeMap<String, String>, mut seen: Seen, unseen: u64, clock: Clock) {
    // By the ports it came from, a veth is a client's or a stray's; what the server sent to another one is a leak.
    let uninvited = |(veth, port): &&(u32, u16)| !seen.opened.contains_key(&(*veth, *port)) || STRAYS.contains(port);
    let uninvited = seen.answered.iter().filter(uninvited);
    let uninvited: Vec<_> =
        uninvited.map(|(veth, port)| format!("interface {veth} received what the server sent to port {port}")).collect();
    seen.leaks.extend(uninvited);
    let mut addresses: BTreeMap<String, Vec<(IpAddr, Option<SystemTime>)>> = BTreeMap::new();
    for run in runs {
        let Some((veth, Syns { source, .. })) = opened(run, &seen) else { continue };
        let answered = seen.heard.get(&veth).filter(|_| run.how != How::BehindTheAgentsBack).copied();
        addresses.entry(ids[&run.name].clone()).or_default().push((source, answered));
    }
    let firsts = |how| Firsts::of(runs, how, &seen);
    let (alone, together, behind) = (firsts(How::Alone), firsts(How::InABurst), firsts(How::BehindTheAgentsBack));
    let named = |run: &Run| format!("{} ({:?}, client {})", run.name, run.how, run.client);
    let clients = runs.iter().filter(|run| run.client);
    let knew = |(veth, syns): &(u32, Syns)| !seen.asked.contains_key(veth) && seen.told.get(veth).is_some_and(|told| *told < syns.at);
    let told = clients.clone().filter_map(|run| opened(run, &seen)).filter(knew).count();
    let heard = |run: &&Run| opened(run, &seen).is_some_and(|first| seen.asked.contains_key(&first.0) || knew(&first));
    let unheard: Vec<_> = clients.clone().filter(|run| !heard(run)).map(named).collect();
    let clients = clients.count();
    let failed: Vec<_> = runs.iter().filter(|run| !run.ok).map(named).collect();
    let joins = clock.ends(&addresses);
    let mut late: Vec<f64> = joins.iter().filter_map(|joined| joined.bound.last().copied()).collect();
    late.sort_by(f64::total_cmp);
    let text = format!(
        "engine {:?}: {} starts under Enforce ({clients} of a client, {} restarts): leaked packets {}, failed first connections {}; \
         first packets lost: alone {alone}, in bursts of {BURST} {together}, while the agent hung {behind}; \
         {told} were asked by the server before they asked for it; joined -> bound of {}: p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms; packets that the captures missed {unseen}",
        engine.kind,
        runs.len(),
        runs.iter().filter(|run| run.restart).count(),
        seen.leaks.len(),
        failed.len(),
        late.len(),
        clock::part(&late, 50),
        clock::part(&late, 99),
        clock::part(&late, 100),
    );
    println!("{text}");
    crate::report(&text);
    for run in runs.iter().filter(|run| run.client && run.how == How::InABurst) {
        let Some((veth, syns)) = opened(run, &seen) else { continue };
        let (questions, first) = seen.asked.get(&veth).copied().unwrap_or((0, syns.at));
        let Some(joined) = joins.iter().find(|joined| joined.id == ids[&run.name] && joined.nth == usize::from(run.restart)) else {
            continue;
        };
        if syns.count > 1 || questions > 1 {
            let first = clock::after(joined.at, first);
            let (syns, address, bound) = (syns.count, joined.address, &joined.bound);
            crate::report(&format!(
                "  late: {} ({}) from {address}: {questions} ARP, {syns} SYN, the first {first:.1} ms after it joined; bound {bound:.1?} ms after that",
                run.name, joined.id,
            ));
        }
    }
    assert_eq!(seen.leaks, Vec::<String>::new(), "packets that nobody allowed arrived");
    assert_eq!(failed, Vec::<String>::new(), "every first connection goes as it should; {}", host.said());
    assert_eq!(unseen, 0, "the captures saw everything");
    assert_eq!(unheard, Vec::<String>::new(), "every client's first packet was seen");
    assert!(together.most() <= 1, "a burst costs at most one repetition: {together:?}");
    assert!(behind.lost() > 0, "of those whom nobody could bind in time, some were too early: {behind:?}");
}

#[test]
fn no_container_sends_or_receives_a_packet_that_is_not_allowed_from_its_first_on() {
    let total = crate::asked("BULKHEAD_CHAOS_STARTS", 30);
    lab::process::allow(Duration::from_secs(600 + 4 * total));
    let _limit = limit(Duration::from_secs(180 + 4 * total));
    let engine = needs_engine!();
    starts(&engine, total);
}
