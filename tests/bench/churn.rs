//! Thousands of containers come and go under Enforce: what stays behind in the kernel and in the agent. The containers are an engine's in
//! words, the agent and its kernel are real.

use std::collections::VecDeque;
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use lab::{Bridge, Netns};
use policy::policy_set::{Peer, Rule};
use policy::segment::Refusal;
use policy::{Mode, PolicySet, Segment, Selector, Service, Workload, WorkloadPolicy};

use crate::figures::{Table, grouped, time};
use crate::process::{megabytes, shared, used};
use crate::station::Station;
use crate::told::{SERVICES, Told};

/// Containers that run at the same time.
const TOGETHER: usize = 50;
/// Between two starts after the burst: as many in the ten minutes for which who held an address is remembered as the burst had.
const STEADY: Duration = Duration::from_millis(120);

fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a01_0400 + (n % 4096) as u32)
}

/// Everybody of the project under Enforce, each allowed to reach one address outside and the next.
fn set(services: usize) -> PolicySet {
    let workload = |n: usize| Workload::new("made", format!("s{n}"));
    let mut set = PolicySet::default();
    let members = [Selector::Project("made".into())].into();
    let segment = Segment { name: "made".into(), members, mode: Mode::Enforce, refusal: Refusal::Drop, promotion: None };
    set.segments.insert("made".into(), segment);
    for n in 0..services {
        let mut policy = WorkloadPolicy::empty(workload(n));
        let rule = |peer| Rule { peer, ports: Service::tcp(443).into(), until: None };
        policy.egress.insert(rule(Peer::address(Ipv4Addr::new(198, 51, 100, 1).into())));
        policy.egress.insert(rule(Peer::Workload(workload((n + 1) % services))));
        set.policies.insert(policy.workload.clone(), policy);
    }
    set
}

/// Elements that the kernel holds for the filter.
fn elements(host: &Netns) -> usize {
    ["inet", "bridge"]
        .map(|family| {
            let mut nft = std::process::Command::new("nft");
            let text = host.check(nft.args(["-j", "list", "table", family, "bulkhead"]));
            let read: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let of = |item: &serde_json::Value| {
                ["set", "map"].iter().filter_map(|kind| item[kind]["elem"].as_array()).map(Vec::len).sum::<usize>()
            };
            read["nftables"].as_array().expect("a list").iter().map(of).sum::<usize>()
        })
        .iter()
        .sum()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("the agent lives").count()
}

pub(crate) fn run(short: bool) {
    let starts = if short { 500 } else { 5_000 };
    lab::process::allow(Duration::from_secs(3600));
    let host = Netns::new("host");
    let _bridge = Bridge::new(&host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
    let mut station = Station::start(&host, "br0", "10.1.0.0/16", |engine| {
        engine.fill((0..TOGETHER).map(|n| (n, address(n))));
        TOGETHER
    });
    station.plan(1, set(SERVICES));
    let state = |station: &Station| {
        let (pid, now) = (station.pid(), used(station.pid()));
        (elements(&host), descriptors(pid), shared(pid), now.cpu)
    };
    let mut table = Table::new(&["started and stopped", "in", "elements in the kernel", "descriptors", "memory (PSS)", "CPU, each"]);
    let first = state(&station);
    table.row(["0".to_owned(), String::new(), first.0.to_string(), first.1.to_string(), megabytes(first.2), String::new()]);
    let mut running: VecDeque<usize> = (0..TOGETHER).collect();
    let mut next = TOGETHER;
    let mut one_more = |engine: &Told| {
        engine.end(running.pop_front().expect("some run"));
        engine.begin(next, address(next));
        running.push_back(next);
        next += 1;
    };
    let (mut begun, mut last) = (Instant::now(), first);
    for part in 1..=5 {
        for _ in 0..starts / 5 {
            one_more(&station.engine);
            // As fast as an engine can, and a little faster.
            std::thread::sleep(Duration::from_millis(10));
        }
        // What was said last is bound by then; the account of it comes with the pulse.
        station.knows(TOGETHER);
        std::thread::sleep(Duration::from_secs(3));
        let now = state(&station);
        table.row([
            grouped((starts / 5 * part) as f64),
            time(begun.elapsed().as_secs_f64()),
            now.0.to_string(),
            now.1.to_string(),
            megabytes(now.2),
            time((now.3 - last.3).as_secs_f64() / (starts / 5) as f64),
        ]);
        (begun, last) = (Instant::now(), now);
    }
    table.print();
    if short {
        return;
    }
    // Who held an address is remembered for ten minutes: from then on as many come as are forgotten, and memory must not grow.
    let mut table =
        Table::new(&["minutes after", "started and stopped", "elements in the kernel", "descriptors", "memory (PSS)", "CPU, each"]);
    let mut more = 0;
    last = state(&station);
    for minutes in (3..=36).step_by(3) {
        let (begun, before) = (Instant::now(), more);
        while begun.elapsed() < Duration::from_secs(180) {
            one_more(&station.engine);
            more += 1;
            std::thread::sleep(STEADY);
        }
        let now = state(&station);
        table.row([
            minutes.to_string(),
            grouped((starts + more) as f64),
            now.0.to_string(),
            now.1.to_string(),
            megabytes(now.2),
            time((now.3 - last.3).as_secs_f64() / (more - before) as f64),
        ]);
        last = now;
    }
    println!();
    table.print();
}
