//! Conntrack's events: bursts of new flows, what each costs, what the workloads feel of it, and a reader that is away.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Bridge, Member, Netns};

use crate::figures::{Samples, Table, grouped, time};
use crate::process::{megabytes, used};
use crate::stage;
use crate::traffic::{self, Serving};
use crate::watcher::Watcher;

/// Ports that one socket of the sender sends to.
const PORTS: u32 = 50_000;

/// An observer that sees nothing of what it should for so long will not see it.
const PATIENCE: Duration = Duration::from_secs(20);

/// So many new UDP flows, each of one datagram; how long it took.
fn burst(client: &Member, server: &Member, flows: u32) -> Duration {
    client.netns.run(|| {
        let sockets: Vec<UdpSocket> = (0..flows.div_ceil(PORTS)).map(|_| UdpSocket::bind((client.v4, 0)).expect("a free port")).collect();
        let begun = Instant::now();
        for flow in 0..flows {
            let port = u16::try_from(10_000 + flow % PORTS).expect("below 65,536");
            let _ = sockets[(flow / PORTS) as usize].send_to(b"x", (server.v4, port));
        }
        begun.elapsed()
    })
}

/// Nobody answers, not even with an error: each flow is one event when it begins and one when it is taken out.
fn silent(server: &Member) {
    server.netns.nft("add table inet silent; add chain inet silent input { type filter hook input priority -400; policy drop; }; add rule inet silent input meta l4proto != udp accept; add rule inet silent input udp dport < 10000 accept");
}

fn empty_the_table(host: &Netns) {
    host.check(Command::new("conntrack").arg("-F"));
}

fn bursts(short: bool) {
    let (rounds, flows) = if short { (2, 20_000) } else { (10, 200_000) };
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
    let (client, server) = (bridge.add("client"), bridge.add("server"));
    silent(&server);
    let mut watcher = Watcher::start(&host, &stage::inventory(&[(&bridge, &[("client", &client), ("server", &server)])]));
    empty_the_table(&host);
    let mut table = Table::new(&["burst", "new flows", "in", "events", "lost", "CPU of the observer", "an event", "its memory (RSS)"]);
    let before = (watcher.settled(), used(watcher.pid()).cpu);
    let mut last = before;
    for round in 1..=rounds {
        let took = burst(&client, &server, flows);
        watcher.until(last.0.events + last.0.lost + u64::from(flows), PATIENCE);
        empty_the_table(&host);
        let now = (watcher.until(last.0.events + last.0.lost + 2 * u64::from(flows), PATIENCE), used(watcher.pid()).cpu);
        let (events, cpu) = (now.0.events - last.0.events, now.1 - last.1);
        table.row([
            round.to_string(),
            grouped(f64::from(flows)),
            time(took.as_secs_f64()),
            grouped(events as f64),
            grouped((now.0.lost - last.0.lost) as f64),
            time(cpu.as_secs_f64()),
            time(cpu.as_secs_f64() / events.max(1) as f64),
            megabytes(used(watcher.pid()).resident),
        ]);
        last = now;
    }
    let (events, cpu) = (last.0.events - before.0.events, (last.1 - before.1).as_secs_f64());
    table.row([
        "all".to_owned(),
        grouped(f64::from(flows * rounds)),
        String::new(),
        grouped(events as f64),
        grouped((last.0.lost - before.0.lost) as f64),
        time(cpu),
        time(cpu / events.max(1) as f64),
        String::new(),
    ]);
    println!("Bursts of new flows, read, followed and named; the table is emptied after each (its events count too):\n");
    table.print();
}

/// Two hosts alike, one of them watched.
fn felt(short: bool) {
    let (rounds, window) = if short { (3, Duration::from_millis(100)) } else { (24, Duration::from_millis(500)) };
    let hosts = [Netns::new("host"), Netns::new("host")];
    let mut scenes = Vec::new();
    for (host, watched) in hosts.iter().zip([false, true]) {
        let mut bridge = Bridge::new(host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
        let (client, server) = (bridge.add("client"), bridge.add("server"));
        bridge.set_nf_call(true);
        let inventory = stage::inventory(&[(&bridge, &[("client", &client), ("server", &server)])]);
        let watcher = watched.then(|| Watcher::start(host, &inventory));
        if !watched {
            host.nft("add table inet tracked; add chain inet tracked forward { type filter hook forward priority 0; }; add rule inet tracked forward ct state invalid accept");
        }
        host.set_sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1");
        let serving = Serving::start(&server);
        scenes.push((client, server, serving, watcher));
    }
    let mut rates = [Samples::default(), Samples::default()];
    for round in 0..rounds {
        for offset in 0..2 {
            let at = (round + offset) % 2;
            let (client, _, serving, _) = &scenes[at];
            rates[at].push(traffic::connects(client, serving, window).rate);
        }
    }
    let mut table = Table::new(&["connections a second, one after the other", "median", "to tracked alone"]);
    for (name, at) in [("tracked, nobody listens", 0), ("tracked, the observer listens", 1)] {
        table.row([name.to_owned(), grouped(rates[at].median().value), rates[at].over(&rates[0]).ratio()]);
    }
    table.print();
}

/// The reader gets no time for five seconds while more happens than its buffer holds.
fn stalled(short: bool) {
    let flows: u32 = if short { 60_000 } else { 200_000 };
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
    let (client, server) = (bridge.add("client"), bridge.add("server"));
    silent(&server);
    let mut watcher = Watcher::start(&host, &stage::inventory(&[(&bridge, &[("client", &client), ("server", &server)])]));
    empty_the_table(&host);
    let before = watcher.settled();
    let took = watcher.stalled(|| {
        let begun = Instant::now();
        let took = burst(&client, &server, flows);
        std::thread::sleep(Duration::from_secs(5).saturating_sub(begun.elapsed()));
        took
    });
    watcher.until(before.events + before.lost + u64::from(flows), PATIENCE);
    // The dump that repairs comes after.
    let after = watcher.settled();
    let held = host.check(Command::new("conntrack").arg("-C")).trim().parse::<f64>().expect("a count");
    let (events, lost) = (after.events - before.events, after.lost - before.lost);
    let mut table =
        Table::new(&["new flows", "in", "in the table", "read", "lost", "read and lost", "dumps for repair", "followed after it"]);
    table.row([
        grouped(f64::from(flows)),
        time(took.as_secs_f64()),
        grouped(held),
        grouped(events as f64),
        grouped(lost as f64),
        grouped((events + lost) as f64),
        grouped((after.repairs - before.repairs) as f64),
        grouped(after.followed as f64),
    ]);
    println!("A reader that is stopped for five seconds:\n");
    table.print();
}

pub(crate) fn run(short: bool) {
    bursts(short);
    felt(short);
    stalled(short);
}
