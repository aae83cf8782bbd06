//! The pure core: no packets, one thread.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use policy::evaluate::{Connection, Index, Scene, evaluate};
use policy::policy_set::{Peer, Rule};
use policy::segment::Refusal;
use policy::{Endpoint, Mode, PolicySet, Segment, Selector, Service, WorkloadPolicy};

use crate::figures::grouped;
use crate::world::workload;

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

pub(crate) fn run(short: bool) {
    let seconds = if short { 1 } else { 3 };
    let mut criterion = Criterion::default().sample_size(if short { 10 } else { 100 }).measurement_time(Duration::from_secs(seconds));
    let networks = BTreeMap::new();
    for rules in [100, 10_000] {
        let set = policies(rules);
        let scene = Scene { set: &set, networks: &networks, now: crate::stage::now() };
        let index = Index::of(&set, &networks);
        let mut group = criterion.benchmark_group(format!("{} rules", grouped(rules as f64)));
        for (whose, owner) in [("a hundred a workload", 0), ("all of one workload", 1_000_000)] {
            let connections: Vec<Connection> = (0..2_000)
                .map(|n| Connection {
                    from: Endpoint::Workload(workload(owner)),
                    to: Endpoint::Workload(workload(n * 7 % 1000)),
                    service: Service::tcp(1 + (n % 12) as u16),
                    guarded: true,
                })
                .collect();
            let mut each = connections.iter().cycle();
            let mut next = || each.next().expect("a cycle has no end");
            group.bench_function(BenchmarkId::new("evaluate", whose), |bench| bench.iter(|| evaluate(&scene, black_box(next()))));
            group.bench_function(BenchmarkId::new("looked up", whose), |bench| {
                bench.iter(|| index.evaluate(black_box(next()), scene.now));
            });
        }
        group.bench_function("the index made", |bench| bench.iter(|| Index::of(black_box(&set), &networks)));
        group.finish();
    }
}
