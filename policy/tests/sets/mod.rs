//! Random sets in force, of a few workloads on three bridges.
#![allow(dead_code, reason = "each of the suites that share it uses its part")]

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use policy::policy_set::Quarantine;
use policy::segment::Refusal;
use policy::{Mode, Peer, PolicySet, Ports, Rule, Segment, Selector, Workload, WorkloadPolicy};
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use proptest::sample::select;

pub(crate) const BRIDGES: usize = 3;
pub(crate) const NOW: i64 = 1_795_168_800;

pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

pub(crate) fn workloads() -> Vec<Workload> {
    ["p/a", "p/b", "q/a", "q/c", "d"].iter().map(|name| name.parse().unwrap()).collect()
}

pub(crate) fn rules() -> impl Strategy<Value = Rule> {
    let nets = ["0.0.0.0/0", "::/0", "198.51.100.0/24", "203.0.113.9", "172.18.0.0/16", "2001:db8::/32"];
    let outside = nets.map(|net| format!("outside:{net}").parse::<Peer>().unwrap());
    let peer = prop_oneof![
        4 => select(workloads()).prop_map(Peer::Workload),
        1 => Just(Peer::Host),
        2 => select(outside.to_vec()),
    ];
    let ports: Vec<Ports> =
        ["tcp/80", "tcp/443", "tcp/1-1024", "udp/53", "icmp/8", "icmpv6/0-255", "sctp/80", "ip47", "tcp/8000-8001", "tcp/1-65535"]
            .iter()
            .map(|p| p.parse().unwrap())
            .collect();
    let until = prop_oneof![6 => Just(None), 1 => Just(Some(-5i64)), 1 => Just(Some(60))];
    (peer, select(ports), until).prop_map(|(peer, ports, until)| Rule {
        peer,
        ports,
        until: until.map(|s| Timestamp::from_second(NOW + s).unwrap()),
    })
}

pub(crate) fn sets() -> impl Strategy<Value = PolicySet> {
    let selector = prop_oneof![
        select(workloads()).prop_map(Selector::Workload),
        select(vec!["p", "q"]).prop_map(|p| Selector::Project(p.to_owned())),
        (0..BRIDGES).prop_map(|bridge| Selector::Network(format!("net{bridge}"))),
    ];
    let mode = prop_oneof![1 => Just(Mode::Learn), 2 => Just(Mode::Audit), 4 => Just(Mode::Enforce)];
    let refusal = select(vec![Refusal::Reject, Refusal::Drop]);
    let segments = btree_map(select(vec!["s", "t", "u"]), (btree_set(selector, 0..4), mode, refusal), 0..4);
    let policies = btree_map(0..workloads().len(), (btree_set(rules(), 0..6), btree_set(rules(), 0..6)), 1..6);
    let quarantines = btree_set(0..workloads().len(), 0..2);
    (segments, policies, prop_oneof![3 => Just(BTreeSet::new()), 1 => quarantines]).prop_map(|(segments, policies, quarantines)| {
        PolicySet {
            segments: segments
                .into_iter()
                .map(|(name, (members, mode, refusal))| {
                    let name = name.to_owned();
                    (name.clone(), Segment { name, members, mode, refusal, promotion: None })
                })
                .collect(),
            policies: policies
                .into_iter()
                .map(|(n, (ingress, egress))| {
                    let workload = workloads()[n].clone();
                    (workload.clone(), WorkloadPolicy { workload, ingress: ingress.into(), egress: egress.into() })
                })
                .collect(),
            quarantines: quarantines
                .into_iter()
                .map(|n| (workloads()[n].clone(), Quarantine { workload: workloads()[n].clone(), comment: String::new() }))
                .collect(),
            guardrails: BTreeMap::new(),
        }
    })
}
