//! Random kills and administrators against a stack whose allowed and forbidden traffic never rests. The verdict: nothing forbidden
//! arrives, no established connection that is allowed dies, a new one needs at most one repeated SYN.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lab::engine::Options;
use lab::frame::{PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP};
use lab::{Capture, Engine, Host, Netns, Packet, Server, Veth, eventually, limit, needs_engine};

use crate::deeds::{Deed, Dice, IMAGE, Scene, run_stray};
use crate::traffic::{self, Place, Score};

const PATIENCE: Duration = Duration::from_secs(30);
const GATEWAY: &str = "172.29.8.1";

fn set(engine: &Engine) {
    engine.import_busybox(IMAGE);
    let named = ["--subnet", "172.29.8.0/24", "-o", "com.docker.network.bridge.name=br-storm", "storm"];
    engine.docker([&["network", "create"], &named[..]].concat());
    engine.docker(["network", "create", "yard"]);
    for (name, address) in [("db", "172.29.8.10"), ("web", "172.29.8.11"), ("cache", "172.29.8.12"), ("evil", "172.29.8.13")] {
        engine.docker(["run", "-d", "--name", name, "--network", "storm", "--ip", address, IMAGE]);
    }
    run_stray(engine);
}

fn allow(host: &Host<'_>) {
    host.bulkhead(["segment", "add", "network:storm", "--segment", "storm"]);
    eventually(PATIENCE, || {
        let workloads = host.bulkhead(["get", "workloads"]);
        if ["db", "web", "cache", "evil", "stray"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    // The first of `cache` is what a revocation goes back to.
    for (from, port) in [("cache", "tcp/99"), ("cache", "tcp/80"), ("web", "tcp/80"), ("web", "tcp/82"), ("web", "udp/53")] {
        host.bulkhead(["allow", from, "db", port]);
    }
}

/// What may arrive at `db`, beside refusals and matters of the link.
fn may_reach_db(packet: &Packet) -> bool {
    let web = packet.source == at(11);
    match packet.protocol {
        PROTO_TCP => packet.destination_port == 80 && (web || packet.source == at(12)) || packet.destination_port == 82 && web,
        PROTO_UDP => packet.destination_port == 53 && web && packet.contains(b"good"),
        _ => false,
    }
}

/// What may arrive at `web`.
fn may_reach_web(packet: &Packet) -> bool {
    let answers = matches!((packet.protocol, packet.source_port), (PROTO_TCP, 80 | 82) | (PROTO_UDP, 53));
    packet.source == at(10) && answers
}

fn at(host: u8) -> IpAddr {
    [172, 29, 8, host].into()
}

fn is_ours(packet: &Packet) -> bool {
    let link = packet.protocol == PROTO_ICMPV6 && matches!(packet.destination_port, 130..=136 | 143) || packet.protocol == 2;
    // A reset in the name of who was asked; an error of the gateway.
    link || packet.resets() || packet.protocol == PROTO_ICMP && packet.destination_port == 3 && GATEWAY.parse() == Ok(packet.source)
}

fn capture(netns: &Netns, score: &Arc<Score>, who: &'static str, may: fn(&Packet) -> bool) -> Capture {
    let score = Arc::clone(score);
    Capture::start(netns, Some("eth0"), move |packet| {
        if !packet.outgoing && !packet.arp && !score.open.load(Ordering::Relaxed) && !is_ours(&packet) && !may(&packet) {
            score.problem(format!("a packet leaked to {who}: {packet:?}"));
        }
    })
}

/// On the bridge without the engine's knowledge: an address that nobody bound.
fn intruder(engine: &Engine) -> Netns {
    let netns = Netns::new("intruder");
    Veth::between(&engine.netns, "vintruder", &netns, "eth0");
    engine.netns.ip("link set vintruder master br-storm");
    netns.ip("addr add 172.29.8.200/24 dev eth0");
    netns
}

fn seconds_of(name: &str, otherwise: u64) -> Duration {
    Duration::from_secs(crate::asked(name, otherwise))
}

/// Ends the traffic, also where a test fails midway.
struct Ends<'s>(&'s Score);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
    }
}

fn storm(engine: &Engine, seed: u64, time: Duration) {
    set(engine);
    let host = Host::on(engine);
    let up = host.up();
    allow(&host);
    let score = Score::new();
    let scene = Scene { engine, host: &host, up: Mutex::new(up), score: &score, repaired: Mutex::default() };
    scene.enforce();
    score.open.store(true, Ordering::Relaxed);

    let place = |name: &str| traffic::fixed(engine.netns_of(name).path().to_owned());
    let (db, web, evil) = (engine.netns_of("db"), engine.netns_of("web"), engine.netns_of("evil"));
    let on = |netns: &Netns, port: u16| Server::tcp_echo(netns, SocketAddr::from(([0, 0, 0, 0], port)));
    let mut servers = vec![on(&db, 80), on(&db, 81), on(&web, 80), Server::udp_echo(&db, "0.0.0.0:53".parse().unwrap())];
    servers.push(Server::tcp(&db, "0.0.0.0:82".parse().unwrap(), traffic::speak));
    let captures = vec![capture(&db, &score, "db", may_reach_db), capture(&web, &score, "web", may_reach_web)];
    let intruder = intruder(engine);
    let to = |host: u8, port: u16| SocketAddr::from((at(host), port));

    let ends = Ends(&score);
    let mut threads = vec![
        traffic::heartbeat(&score, &place("web"), to(10, 80)),
        traffic::listener(&score, &place("web"), to(10, 82)),
        traffic::new_connections(&score, place("web"), to(10, 80)),
        traffic::datagrams(&score, &place("web"), to(10, 53)),
    ];
    score.open.store(false, Ordering::Relaxed);
    // Restarted now and then: the way to it is asked for at each attempt.
    let api = crate::api::Api::at(&engine.socket());
    let stray: Place = Arc::new(move || {
        let told = api.call("GET", "/containers/stray/json", "").ok()?;
        told["State"]["Pid"].as_u64().filter(|pid| *pid > 0).map(|pid| Netns::of_process(u32::try_from(pid).unwrap()))
    });
    let uninvited = traffic::fixed(intruder.path().to_owned());
    threads.extend([
        traffic::forbidden(&score, "stray", stray.clone(), vec![to(10, 80), to(11, 80), to(10, 81)]),
        traffic::forbidden(&score, "web, on another port,", place("web"), vec![to(10, 81)]),
        traffic::forbidden(&score, "db, the other way round,", place("db"), vec![to(11, 80)]),
        traffic::forbidden(&score, "somebody without a name", uninvited.clone(), vec![to(10, 80), to(11, 80)]),
        traffic::evil_datagrams(&score, stray, to(10, 53)),
        traffic::evil_datagrams(&score, uninvited, to(10, 53)),
        traffic::spoofed(&score, &evil, (engine.mac("evil", "storm"), engine.mac("db", "storm")), at(11), to(10, 53)),
    ]);

    let did = act(&scene, seed, time);
    drop(ends);
    for thread in threads {
        thread.join().unwrap();
    }
    let unseen: u64 = captures.into_iter().map(Capture::end).sum();
    drop(servers);
    report(&scene, seed, did, unseen);
}

/// Random deeds at random instants; how often each was done.
fn act(scene: &Scene<'_>, seed: u64, time: Duration) -> Vec<Deed> {
    let mut dice = Dice(seed);
    let begun = Instant::now();
    let mut did = Vec::new();
    while begun.elapsed() < time {
        thread::sleep(Duration::from_millis(dice.below(1_200)));
        let deed = Deed::ALL[usize::try_from(dice.below(Deed::ALL.len() as u64)).unwrap()];
        println!("[{:7.3}] {deed:?}", scene.score.clock());
        scene.happen(deed, &mut dice);
        scene.healed();
        did.push(deed);
    }
    did
}

fn report(scene: &Scene<'_>, seed: u64, did: Vec<Deed>, unseen: u64) {
    let score = scene.score;
    let problems = score.problems();
    let repaired = scene.repaired.lock().unwrap();
    let said = |time: &Duration| format!("{} ms", time.as_millis());
    let repairs: Vec<_> = repaired
        .iter()
        .map(|(deed, repaired, told)| {
            format!("{deed:?} repaired in {}, told in {}", said(repaired), told.as_ref().map_or("-".into(), said))
        })
        .collect();
    let text = format!(
        "engine {:?}, seed {seed}: {} deeds in {:.0} s, {} problems; {}; {}; packets that the captures missed {unseen}",
        scene.engine.kind,
        did.len(),
        score.clock(),
        problems.len(),
        score.summary(),
        repairs.join(", "),
    );
    println!("{text}");
    crate::report(&text);
    assert!(problems.is_empty(), "seed {seed}:\n{}\nafter {did:?}", problems.join("\n"));
    for what in ["new connections", "beats", "words of the server", "datagrams answered", "forbidden attempts", "spoofed packets"] {
        assert!(score.counted(what) > 0, "{what}: none");
    }
    assert_eq!(unseen, 0, "the captures saw everything");
    let alarmed = repaired.iter().all(|(_, repaired, _)| *repaired < Duration::from_secs(2));
    assert!(alarmed, "repaired within a second, give or take a busy machine: {repairs:?}");
}

#[test]
fn a_storm_of_kills_and_administrators_opens_nothing_and_cuts_nothing() {
    let time = seconds_of("BULKHEAD_CHAOS_SECONDS", 30);
    lab::process::allow(time * 2 + Duration::from_secs(900));
    let _limit = limit(time * 2 + Duration::from_secs(300));
    let seed = crate::asked(
        "BULKHEAD_CHAOS_SEED",
        u64::from(std::process::id()) << 16 | u64::from(jiff::Timestamp::now().subsec_nanosecond().unsigned_abs() >> 14),
    );
    println!("seed {seed}: BULKHEAD_CHAOS_SEED={seed}, or tests/chaos/run --seed {seed}, makes the same choices again");
    let engine = needs_engine!(Options { flags: vec!["--live-restore".to_owned()], ..Options::default() });
    storm(&engine, seed, time);
}
