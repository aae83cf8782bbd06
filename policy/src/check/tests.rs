//! What is looked up says what going through everything would.

use std::collections::BTreeSet;

use jiff::Timestamp;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

use super::uses::Uses;
use super::*;
use crate::evidence::Evidence;
use crate::graph::{EdgeDelta, EdgeKey, FlowGraph};
use crate::service::Service;
use crate::workload::Endpoint;

const PEERS: [&str; 14] = [
    "a",
    "b",
    "host:",
    "outside:0.0.0.0/0",
    "outside:10.0.0.0/8",
    "outside:10.1.0.0/16",
    "outside:10.1.2.0/24",
    "outside:10.1.2.3/32",
    "outside:10.1.2.255/32",
    "outside:192.0.2.0/24",
    "outside:::/0",
    "outside:2001:db8::/32",
    "outside:2001:db8::1/128",
    "outside:255.255.255.255/32",
];

fn rules() -> impl Strategy<Value = BTreeSet<Rule>> {
    let ports = select(vec!["tcp/80", "tcp/80-90", "tcp/85", "udp/53"]);
    let until = select(vec![None, Some(5), Some(9)]);
    let rule = (select(PEERS.to_vec()), ports, until).prop_map(|(peer, ports, until)| Rule {
        peer: peer.parse().unwrap(),
        ports: ports.parse().unwrap(),
        until: until.map(|second| Timestamp::from_second(second).unwrap()),
    });
    btree_set(rule, 0..24)
}

fn ends() -> impl Strategy<Value = Endpoint> {
    let outside = ["10.1.2.3", "10.1.2.4", "10.1.2.255", "10.1.3.0", "11.0.0.0", "255.255.255.255", "2001:db8::1", "2001:db9::"];
    let address = |text: &str| text.parse().unwrap();
    let mut ends: Vec<Endpoint> = outside.iter().map(|text| Endpoint::Outside(address(text))).collect();
    ends.extend([Endpoint::Unknown(address("10.1.2.3")), Endpoint::Host]);
    ends.extend(["a", "b", "own"].map(|name| Endpoint::Workload(name.parse().unwrap())));
    ends.push(Endpoint::Run("a".parse().unwrap()));
    select(ends)
}

proptest! {
    #[test]
    fn the_rules_that_may_cover_one_are_found_in_their_order(rules in rules(), narrow in rules()) {
        let policy = WorkloadPolicy { egress: rules.clone().into(), ..WorkloadPolicy::empty("own".parse().unwrap()) };
        for rule in &narrow {
            let about: Vec<_> = policy.about(Direction::Egress, &rule.peer).filter(|wide| covers(wide, rule)).collect();
            let all: Vec<_> = rules.iter().filter(|wide| covers(wide, rule)).collect();
            prop_assert_eq!(about, all);
        }
    }

    #[test]
    fn the_rules_that_one_may_cover_stand_side_by_side(rules in rules(), wide in rules()) {
        let sorted: Vec<&Rule> = rules.iter().collect();
        for rule in &wide {
            let within: Vec<_> = within(&sorted, &rule.peer).iter().copied().filter(|narrow| covers(rule, narrow)).collect();
            let all: Vec<_> = rules.iter().filter(|narrow| covers(rule, narrow)).collect();
            prop_assert_eq!(within, all);
        }
    }

    #[test]
    fn the_uses_that_a_rule_means_are_found(rules in rules(), edges in vec((ends(), ends(), select(vec![53_u16, 80, 85, 99])), 0..40)) {
        let own: Workload = "own".parse().unwrap();
        let mut graph = FlowGraph::new();
        for (from, to, port) in edges {
            let key = EdgeKey { from, to, service: Service::tcp(port), direction_known: true };
            graph.add(&EdgeDelta { key, seen: Evidence { established: 1, ..Evidence::default() } });
        }
        let used: Vec<Seen<'_>> = graph.around(&Endpoint::Workload(own.clone()));
        for direction in [Direction::Ingress, Direction::Egress] {
            let uses = Uses::of(&own, &used, direction);
            for rule in &rules {
                let means = |seen: &&Seen<'_>| {
                    let (this, other) = if direction == Direction::Egress { (seen.from, seen.to) } else { (seen.to, seen.from) };
                    this.workload() == Some(&own) && rule.ports.holds(seen.service) && rule.peer.holds(other)
                };
                let mut all: Vec<_> = used.iter().filter(means).map(|seen| seen.id).collect();
                let mut found: Vec<_> = uses.meant(rule).iter().map(|seen| seen.id).collect();
                all.sort_unstable();
                found.sort_unstable();
                prop_assert_eq!(found, all);
            }
        }
    }
}
