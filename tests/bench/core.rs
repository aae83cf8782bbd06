//! The pure core: no packets, one thread.

use std::collections::BTreeMap;
use std::hint::black_box;

use policy::evaluate::{Connection, Index, Scene, evaluate};
use policy::policy_set::{Peer, Rule};
use policy::segment::Refusal;
use policy::{Endpoint, Mode, PolicySet, Segment, Selector, Service, WorkloadPolicy};

use crate::figures::{Samples, Table, grouped, time};
use crate::process::on_cpu;
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

fn evaluations(short: bool) {
    let mut table = Table::new(&["rules", "whose", "one evaluate (median)", "looked up (median)", "index made in"]);
    for rules in [100, 10_000] {
        let set = policies(rules);
        let networks = BTreeMap::new();
        let scene = Scene { set: &set, networks: &networks, now: crate::stage::now() };
        for (whose, owner) in [("a hundred a workload", 0), ("all of one workload", 1_000_000)] {
            let (mut took, mut looked_up) = (Samples::default(), Samples::default());
            let begun = on_cpu();
            let index = Index::of(&set, &networks);
            let made = on_cpu() - begun;
            for round in 0..if short { 5 } else { 50 } {
                let connections: Vec<Connection> = (0..2_000)
                    .map(|n| Connection {
                        from: Endpoint::Workload(workload(owner)),
                        to: Endpoint::Workload(workload((n * 7 + round) % 1000)),
                        service: Service::tcp(1 + (n % 12) as u16),
                        guarded: true,
                    })
                    .collect();
                let begun = on_cpu();
                for connection in &connections {
                    black_box(evaluate(&scene, connection));
                }
                took.push((on_cpu() - begun) / connections.len() as f64);
                let begun = on_cpu();
                for connection in &connections {
                    black_box(index.evaluate(connection, scene.now));
                }
                looked_up.push((on_cpu() - begun) / connections.len() as f64);
            }
            table.row([grouped(rules as f64), whose.to_owned(), time(took.median().value), time(looked_up.median().value), time(made)]);
        }
    }
    table.print();
}

pub(crate) fn run(short: bool) {
    evaluations(short);
}
