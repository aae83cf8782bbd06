//! The agent's program: its memory with many containers and edges, what it uses while nothing happens, and how long a new edge takes
//! from the answer on the wire into the controller's store. The containers are an engine's in words; the packets are real.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use lab::{Bridge, Member, Netns};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use policy::{EdgeKey, Endpoint, Service, Workload};

use crate::figures::{Samples, Table, grouped, time};
use crate::process::{megabytes, shared, touched_within, used};
use crate::station::Station;

const PORT: u16 = 7000;

/// Who asks and who answers; the rest of the containers is silent.
struct Crowd {
    clients: usize,
    servers: usize,
    all: usize,
}

fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a01_0400 + n as u32)
}

/// One end of a cable holds the addresses of all clients, another one of all servers.
fn hold(member: &Member, addresses: impl Iterator<Item = Ipv4Addr>) {
    let lines: String = addresses.map(|address| format!("addr add {address}/16 dev eth0\n")).collect();
    let mut command = std::process::Command::new("ip");
    command.args(["-batch", "-"]).stdin(std::process::Stdio::piped());
    let mut child = member.netns.run(|| command.spawn()).expect("ip");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), lines.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "ip refused");
}

/// Answers each datagram from the address it was sent to, until told to stop.
fn answer(server: &Member, addresses: &[Ipv4Addr], stop: &AtomicBool) {
    let sockets: Vec<UdpSocket> = server.netns.run(|| {
        addresses
            .iter()
            .map(|&at| UdpSocket::bind((at, PORT)).expect("a free port"))
            .inspect(|s| s.set_nonblocking(true).unwrap())
            .collect()
    });
    let mut waited: Vec<PollFd<'_>> = sockets.iter().map(|s| PollFd::new(std::os::fd::AsFd::as_fd(s), PollFlags::POLLIN)).collect();
    let mut buffer = [0; 16];
    while !stop.load(Ordering::Relaxed) {
        let _ = poll(&mut waited, PollTimeout::from(50_u8));
        for (socket, polled) in sockets.iter().zip(&waited) {
            while polled.any() == Some(true)
                && let Ok((_, from)) = socket.recv_from(&mut buffer)
            {
                let _ = socket.send_to(b"y", from);
            }
        }
    }
}

/// New flows at this rate for so long, each of one question and one answer, evenly over all pairs. When each pair was answered first.
fn ask(client: &Member, crowd: &Crowd, rate: usize, window: Duration) -> (HashMap<(usize, usize), SystemTime>, usize) {
    client.netns.run(|| {
        let mut first = HashMap::new();
        let (mut asked, mut answered, mut round) = (0, 0, 0);
        let mut buffer = [0; 16];
        let begun = Instant::now();
        while begun.elapsed() < window {
            // A fresh port and so a fresh flow to each server.
            let who = round % crowd.clients;
            round += 1;
            let socket = UdpSocket::bind((address(who), 0)).expect("a free port");
            socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket");
            for server in 0..crowd.servers {
                let _ = socket.send_to(b"x", (address(crowd.clients + server), PORT));
            }
            asked += crowd.servers;
            for _ in 0..crowd.servers {
                let Ok((_, std::net::SocketAddr::V4(from))) = socket.recv_from(&mut buffer) else { break };
                let server = number(from) - crowd.clients;
                first.entry((who, server)).or_insert_with(SystemTime::now);
                answered += 1;
            }
            let due = Duration::from_secs_f64(asked as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        (first, answered)
    })
}

fn number(address: SocketAddrV4) -> usize {
    (u32::from(*address.ip()) - 0x0a01_0400) as usize
}

fn key((client, server): (usize, usize), crowd: &Crowd) -> EdgeKey {
    let workload = |n: usize| Endpoint::Workload(Workload::new("made", format!("s{n}")));
    EdgeKey {
        from: workload(client),
        to: workload(crowd.clients + server),
        service: Service { protocol: policy::Protocol::Udp, port: PORT },
        direction_known: true,
    }
}

/// Starts an agent that is told of all of them, and asks.
fn one(crowd: &Crowd, rate: usize, window: Duration, idle: Duration) -> [String; 9] {
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
    let (client, server) = (bridge.add("client"), bridge.add("server"));
    hold(&client, (0..crowd.clients).map(address));
    let servers: Vec<Ipv4Addr> = (crowd.clients..crowd.clients + crowd.servers).map(address).collect();
    hold(&server, servers.iter().copied());
    let station = Station::start(&host, "br0", "10.1.0.0/16", |engine| {
        engine.fill((0..crowd.all).map(|n| (n, address(n))));
        crowd.all
    });
    let stop = Arc::new(AtomicBool::new(false));
    let (first, answered, cpu) = std::thread::scope(|scope| {
        let stop = &stop;
        let servers = &servers;
        let server = &server;
        let answering = scope.spawn(move || answer(server, servers, stop));
        let before = used(station.pid()).cpu;
        let (first, answered) = ask(&client, crowd, rate, window);
        stop.store(true, Ordering::Relaxed);
        answering.join().expect("it answers");
        (first, answered, used(station.pid()).cpu - before)
    });
    let begun = Instant::now();
    let wanted: Vec<_> = first.iter().map(|(pair, at)| (key(*pair, crowd), *at)).collect();
    while begun.elapsed() < Duration::from_secs(20) && {
        let stored = station.stored();
        wanted.iter().any(|(key, _)| !stored.contains_key(key))
    } {
        std::thread::sleep(Duration::from_millis(50));
    }
    let stored = station.stored();
    let mut late = Samples::default();
    let missing = wanted.iter().filter(|(key, at)| match stored.get(key).map(|then| then.duration_since(*at).unwrap_or_default()) {
        Some(took) => {
            late.push(took.as_secs_f64());
            false
        }
        None => true,
    });
    let missing = missing.count();
    // What the burst left to do is done by then.
    std::thread::sleep(Duration::from_secs(3));
    let before = used(station.pid()).cpu;
    std::thread::sleep(idle);
    let rests = (used(station.pid()).cpu - before).as_secs_f64() / idle.as_secs_f64();
    let memory = used(station.pid());
    [
        grouped(crowd.all as f64),
        grouped(wanted.len() as f64),
        format!("{}/s", grouped(answered as f64 / window.as_secs_f64())),
        format!("{} / {}", time(late.quantile(0.5)), time(late.quantile(0.99))),
        grouped(missing as f64),
        time(cpu.as_secs_f64() / answered.max(1) as f64),
        megabytes(shared(station.pid())),
        megabytes(memory.peak),
        format!("{:.2} %", rests * 100.0),
    ]
}

/// What the agent of a host with so many containers uses while nothing happens and nothing did.
fn quiet(containers: usize, idle: Duration) -> [String; 5] {
    let host = Netns::new("host");
    let _bridge = Bridge::new(&host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
    let station = Station::start(&host, "br0", "10.1.0.0/16", |engine| {
        engine.fill((0..containers).map(|n| (n, address(n))));
        containers
    });
    // The first minute tells the controller more often, and what starting left to do is done by then.
    std::thread::sleep(if idle > Duration::from_secs(30) { Duration::from_secs(65) } else { Duration::from_secs(5) });
    let before = used(station.pid()).cpu;
    std::thread::sleep(idle);
    let rests = (used(station.pid()).cpu - before).as_secs_f64() / idle.as_secs_f64();
    let memory = shared(station.pid());
    let mut touched = Samples::default();
    for _ in 0..10 {
        touched.push(touched_within(station.pid(), Duration::from_secs(1)));
    }
    [
        grouped(containers as f64),
        time(idle.as_secs_f64()),
        format!("{:.2} %", rests * 100.0),
        megabytes(memory),
        megabytes(touched.median().value),
    ]
}

pub(crate) fn run(short: bool) {
    let mut table = Table::new(&[
        "containers",
        "edges",
        "answered flows",
        "answer to store, p50 / p99",
        "not in the store after 20 s",
        "CPU a flow",
        "memory afterwards (PSS)",
        "its peak (RSS)",
        "CPU afterwards",
    ]);
    let (window, idle) =
        if short { (Duration::from_secs(2), Duration::from_secs(5)) } else { (Duration::from_secs(3), Duration::from_secs(60)) };
    table.row(one(&Crowd { clients: 50, servers: 100, all: 150 }, 50_000, window, idle));
    table.row(one(&Crowd { clients: 100, servers: 100, all: 1_000 }, 5_000, window, idle));
    table.print();
}

/// A host on which nothing happens and nothing did.
pub(crate) fn run_idle(short: bool) {
    let mut table = Table::new(&["containers", "for", "CPU", "memory (PSS)", "touched in a second (median of 10)"]);
    for containers in [10, 1_000] {
        table.row(quiet(containers, Duration::from_secs(if short { 10 } else { 120 })));
    }
    table.print();
}
