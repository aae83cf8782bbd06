//! The pure core: no packets, one thread.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use policy::evaluate::{Connection, Scene, evaluate};
use policy::learn::{Context, affected, learn, learn_one};
use policy::policy_set::{Peer, Rule};
use policy::segment::Refusal;
use policy::{
    EdgeDelta, EdgeKey, Endpoint, Evidence, FlowGraph, HourSet, Mode, PolicySet, Segment, Selector, Service, Workload, WorkloadPolicy,
};

use crate::figures::{Samples, Table, grouped, time};

fn workload(n: usize) -> Workload {
    Workload::new(format!("project-{}", n / 10), format!("service-{n}"))
}

/// So many rules, a hundred a workload, and one workload that has all of them.
fn policies(rules: usize) -> PolicySet {
    let mut set = PolicySet::default();
    let rule = |n: usize| Rule {
        peer: Peer::Workload(workload(n % 1000)),
        ports: Service::tcp(1 + (n / 1000 % 60_000) as u16).into(),
        until: None,
    };
    let mut add = |owner: usize, rules: &mut dyn Iterator<Item = usize>| {
        let owner = workload(owner);
        let mut policy = WorkloadPolicy::empty(owner.clone());
        policy.egress.extend(rules.map(rule));
        set.policies.insert(owner, policy);
    };
    for owner in 0..rules / 100 {
        add(owner, &mut (owner * 100..owner * 100 + 100));
    }
    add(1_000_000, &mut (0..rules));
    let segment = Segment {
        name: "all".to_owned(),
        members: set.policies.keys().cloned().map(Selector::Workload).collect(),
        mode: Mode::Enforce,
        refusal: Refusal::Reject,
        promotion: None,
    };
    set.segments.insert(segment.name.clone(), segment);
    set
}

fn evaluations(short: bool) {
    let mut table = Table::new(&["rules", "whose", "one evaluate (median)"]);
    for rules in [100, 10_000] {
        let set = policies(rules);
        let networks = BTreeMap::new();
        let scene = Scene { set: &set, networks: &networks, now: crate::stage::now() };
        for (whose, owner) in [("a hundred a workload", 0), ("all of one workload", 1_000_000)] {
            let mut took = Samples::default();
            for round in 0..if short { 5 } else { 50 } {
                let connections: Vec<Connection> = (0..200)
                    .map(|n| Connection {
                        from: Endpoint::Workload(workload(owner)),
                        to: Endpoint::Workload(workload((n * 7 + round) % 1000)),
                        service: Service::tcp(1 + (n % 12) as u16),
                        guarded: true,
                    })
                    .collect();
                let begun = Instant::now();
                for connection in &connections {
                    black_box(evaluate(&scene, connection));
                }
                took.push(begun.elapsed().as_secs_f64() / connections.len() as f64);
            }
            table.row([grouped(rules as f64), whose.to_owned(), time(took.median().value)]);
        }
    }
    table.print();
}

/// The nth edge of a Zipf-like world: a few services are everybody's.
fn edge(n: usize, workloads: usize) -> EdgeDelta {
    // A multiplicative hash spreads clients; servers are drawn with density 1/x.
    let random = |salt: u64| ((n as u64 + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 53) as f64;
    let server = ((workloads as f64).powf(random(1)) - 1.0) as usize % workloads;
    let client = (random(2) * workloads as f64) as usize % workloads;
    let key = EdgeKey {
        from: Endpoint::Workload(workload(client)),
        to: Endpoint::Workload(workload(server)),
        service: Service::tcp(1 + (random(3) * 2000.0) as u16),
        direction_known: true,
    };
    let when = crate::stage::now();
    let mut hours = HourSet::default();
    hours.insert(HourSet::hour_of(when));
    let seen = Evidence {
        established: 3,
        bytes_sent: 1000,
        bytes_received: 1000,
        first: Some(when),
        last: Some(when),
        hours,
        ..Evidence::default()
    };
    EdgeDelta { key, seen }
}

/// Resident memory of this process, bytes (proc(5), VmRSS).
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("a resident size");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") * 1024.0
}

fn learning(short: bool) {
    let mut table = Table::new(&["workloads", "edges", "memory of the graph", "learn all", "one edge more (median)", "p99"]);
    let sizes: &[(usize, usize)] = if short { &[(1_000, 10_000)] } else { &[(1_000, 100_000), (10_000, 1_000_000)] };
    for &(workloads, edges) in sizes {
        let before = resident();
        let mut graph = FlowGraph::new();
        let mut n = 0;
        while graph.len() < edges {
            graph.add(&edge(n, workloads));
            n += 1;
        }
        let memory = resident() - before;
        let context = Context { now: crate::stage::now(), ..Context::default() };
        let begun = Instant::now();
        let suggestions = learn(&graph, &context);
        let took = begun.elapsed().as_secs_f64();
        drop(black_box(suggestions));
        let mut again = Samples::default();
        for more in 0..if short { 10 } else { 100 } {
            let delta = edge(n + more, workloads);
            let begun = Instant::now();
            graph.add(&delta);
            for workload in affected(&graph, &delta.key) {
                black_box(learn_one(&graph, &context, &workload));
            }
            again.push(begun.elapsed().as_secs_f64());
        }
        table.row([
            grouped(workloads as f64),
            grouped(edges as f64),
            format!("{} MB", grouped(memory / 1e6)),
            time(took),
            time(again.median().value),
            time(again.quantile(0.99)),
        ]);
    }
    table.print();
}

pub(crate) fn run(short: bool) {
    evaluations(short);
    learning(short);
}
