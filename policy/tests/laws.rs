//! Laws that hold for every input: learning, merging, printing.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use common::*;
use ipnet::IpNet;
use policy::evidence::Road;
use policy::learn::{FromOutside, Halves, Learner, Options, affected, learn, learn_one};
use policy::policy_set::{Direction, Rule};
use policy::review::{Choice, Reading, approve};
use policy::suggestion::{Origin, Outline, RuleState, Severity, Suggestion};
use policy::{
    Connection, EdgeDelta, EdgeKey, Endpoint, Evidence, FlowGraph, FlowOutcome, HourSet, Mode, Peer, PolicySet, Ports, Protocol, Scene,
    Segment, Selector, Service, Verdict, Workload, WorkloadPolicy, check, diff, evaluate,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

const NAMES: [&str; 4] = ["shop/web", "shop/db", "mail/web", "lone"];

/// Every end that a flow here may have.
fn ends() -> Vec<Endpoint> {
    let others =
        ["host:", "outside:192.0.2.1", "outside:192.0.2.2", "outside:2001:db8::1", "unknown:172.18.0.9", "unmanaged:nas@192.0.2.3"];
    NAMES.iter().chain(&others).map(|end| end.parse().unwrap()).collect()
}

fn services() -> Vec<Service> {
    ["tcp/80", "tcp/443", "udp/53", "udp/514", "icmp/8", "sctp/80", "ip47"].iter().map(|s| s.parse().unwrap()).collect()
}

fn outcomes() -> impl Strategy<Value = FlowOutcome> {
    use FlowOutcome::{ConnectedNoData, Denied, Established, OneWay, Refused, Unanswered, WouldDeny};
    prop_oneof![4 => Just(Established), 1 => select(vec![ConnectedNoData, OneWay, Unanswered, Refused, Denied, WouldDeny])]
}

fn deltas() -> impl Strategy<Value = Vec<EdgeDelta>> {
    let runs = ["shop/web (run)"].map(|end| end.parse::<Endpoint>().unwrap());
    let ends: Vec<Endpoint> = ends().into_iter().chain(runs).collect();
    let flow = (select(ends.clone()), select(ends), select(services()), outcomes(), prop::bool::weighted(0.9), 0..400_000i64);
    let delta = flow.prop_map(|(from, to, service, outcome, direction_known, seconds)| {
        let mut flow = flow_between(from, to, service, outcome, seconds);
        flow.direction_known = direction_known;
        flow.pre_existing = !direction_known;
        EdgeDelta::from(&flow)
    });
    vec(delta, 0..60)
}

fn flow_between(from: Endpoint, to: Endpoint, service: Service, outcome: FlowOutcome, seconds: i64) -> policy::Flow {
    policy::Flow { from, to, ..flow("host:", "host:", service, outcome, seconds) }
}

fn town(deltas: &[EdgeDelta]) -> Town {
    let mut town = Town::of(NAMES);
    town.context.options = Options { from_outside: FromOutside::ExactHosts, ..Options::default() };
    deltas.iter().for_each(|delta| _ = town.graph.add(delta));
    town
}

/// Everything approved, everything enforced.
fn approved(town: &Town) -> PolicySet {
    let members = NAMES.iter().map(|name| Selector::Workload(workload(name))).collect();
    let segment = Segment { name: "all".to_owned(), members, mode: Mode::Enforce, refusal: Default::default(), promotion: None };
    let empty = PolicySet { segments: [("all".to_owned(), segment)].into(), ..PolicySet::default() };
    learn(&town.graph, &town.context).iter().fold(empty, |set, suggestion| {
        let accept = ["no-evidence".to_owned()].into();
        approve(&set, suggestion, &Reading { digest: suggestion.digest.clone(), choice: Choice::Whole, accept }).unwrap().set
    })
}

fn json(town: &Town) -> String {
    serde_json::to_string(&learn(&town.graph, &town.context)).unwrap()
}

proptest! {
    #[test]
    fn learning_from_a_graph_allows_all_of_what_it_proposes_from_and_nothing_else(deltas in deltas()) {
        let town = town(&deltas);
        let set = approved(&town);
        let networks = BTreeMap::new();
        let scene = Scene { set: &set, networks: &networks, now: at(0) };
        let suggestions = learn(&town.graph, &town.context);
        let proposed: BTreeSet<&EdgeKey> =
            suggestions.iter().flat_map(|s| &s.rules).filter(|rule| rule.origin != Origin::DeniedAttempt).flat_map(|rule| &rule.edges).collect();
        let shown = suggestions.iter().flat_map(|s| &s.not_proposed).map(|shown| &shown.edge);
        // Proposed, a denied attempt, or shown with the reason why not.
        let listed: BTreeSet<&EdgeKey> = suggestions.iter().flat_map(|s| &s.rules).flat_map(|rule| &rule.edges).chain(shown).collect();
        for (ref key, evidence) in town.graph.iter() {
            let rightful = key.direction_known && ![&key.from, &key.to].iter().any(|end| matches!(end, Endpoint::Unknown(_) | Endpoint::Run(_)));
            let has_side = key.from.workload().is_some() || key.to.workload().is_some();
            prop_assert!(!has_side || !rightful || evidence.established == 0 || proposed.contains(key), "{} was established and is not proposed", key);
            prop_assert!(rightful || !proposed.contains(key), "{} can be no rule", key);
            prop_assert!(!has_side || listed.contains(key), "{} is lost", key);
        }
        for from in ends() {
            for to in ends() {
                for service in services() {
                    let connection = Connection { from: from.clone(), to: to.clone(), service, guarded: true };
                    let decision = evaluate(&scene, &connection);
                    let key = EdgeKey { from: from.clone(), to: to.clone(), service, direction_known: true };
                    let unknown = matches!(from, Endpoint::Unknown(_)) || matches!(to, Endpoint::Unknown(_));
                    let no_side = from.workload().is_none() && to.workload().is_none();
                    let expected = !unknown && (no_side || proposed.contains(&key));
                    prop_assert_eq!(decision.verdict == Verdict::Allow, expected, "{}: {}", key, decision.reason());
                }
            }
        }
    }

    #[test]
    fn what_is_learned_does_not_depend_on_the_order_of_reports_nor_on_how_nodes_share_them(
        (deltas, mixed) in deltas().prop_flat_map(|deltas| (Just(deltas.clone()), Just(deltas).prop_shuffle())),
        cut in any::<prop::sample::Index>(),
    ) {
        let one = town(&deltas);
        let mut merged = town(&[]);
        let at = cut.index(mixed.len() + 1);
        merged.graph.merge(&town(&mixed[at..]).graph);
        merged.graph.merge(&town(&mixed[..at]).graph);
        prop_assert_eq!(json(&one), json(&merged), "byte for byte");
        for suggestion in learn(&one.graph, &one.context) {
            prop_assert_eq!(&learn_one(&merged.graph, &merged.context, &suggestion.workload), &suggestion);
            let halves = Halves::of(&merged.context);
            let outline = Learner::new(&merged.graph, &merged.context, &halves).outline(&suggestion.workload);
            let Suggestion { workload, revision, digest, phase, rules, updated, .. } = &suggestion;
            let weigh = |weight| suggestion.findings.iter().filter(|finding| finding.severity == weight).count() as u64;
            prop_assert_eq!(outline, Outline {
                workload: workload.clone(),
                revision: *revision,
                digest: digest.clone(),
                phase: *phase,
                rules: rules.len() as u64,
                undecided: rules.iter().filter(|rule| rule.state == RuleState::Undecided).count() as u64,
                findings: (weigh(Severity::Blocking), weigh(Severity::Warning), weigh(Severity::Info)),
                updated: *updated,
            });
        }
    }

    #[test]
    fn the_rule_that_is_looked_up_is_the_first_of_all_that_allow(rules in vec((nested(), 1..4u16, prop::option::of(0..3i64)), 0..40), now in 0..3i64) {
        let mut policy = WorkloadPolicy::empty(workload("shop/web"));
        policy.egress.extend(rules.into_iter().map(|(peer, port, until)| {
            Rule { peer, ports: Ports::new(Protocol::Tcp, port, port + 1).unwrap(), until: until.map(at) }
        }));
        let addresses = ["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.0.2.1", "0.0.0.0", "255.255.255.255", "2001:db8::1", "2001:db8:1::1"];
        let outside = addresses.iter().map(|address| Endpoint::Outside(address.parse().unwrap()));
        for end in ends().into_iter().chain(outside) {
            for port in 0..6 {
                let service = Service::tcp(port);
                let first = policy.egress.iter().find(|rule| rule.in_force(at(now)) && rule.ports.holds(service) && rule.peer.holds(&end));
                prop_assert_eq!(policy.allowing(Direction::Egress, &end, service, at(now)), first, "{} {}", end, service);
            }
        }
    }

    #[test]
    fn one_more_report_changes_the_suggestions_of_whom_it_affects_and_of_nobody_else(deltas in deltas(), scan in any::<bool>(), one in deltas()) {
        let Some(one) = one.first() else { return Ok(()) };
        let mut town = town(&deltas);
        if scan {
            for name in NAMES {
                let flow = flow_between(one.key.from.clone(), name.parse().unwrap(), Service::tcp(9), FlowOutcome::ConnectedNoData, 0);
                (0..2).for_each(|n| _ = town.graph.add(&EdgeDelta::from(&policy::Flow { time: at(n * 5), ..flow.clone() })));
            }
        }
        let before = learn(&town.graph, &town.context);
        town.graph.add(one);
        let affected = affected(&town.graph, &one.key);
        for (old, new) in before.iter().zip(learn(&town.graph, &town.context)) {
            prop_assert!(*old == new || affected.contains(&new.workload), "{} changed by {}", new.workload, one.key);
        }
    }

    #[test]
    fn once_approved_nothing_is_left_to_add_no_edge_is_half_approved_and_the_digest_stays(deltas in deltas()) {
        let mut town = town(&deltas);
        let before = learn(&town.graph, &town.context);
        let set = approved(&town);
        town.context.policies = set.policies.clone();
        prop_assert_eq!(check::half_approved(&set.policies, at(0)), Vec::new());
        for (old, new) in before.iter().zip(learn(&town.graph, &town.context)) {
            prop_assert!(!diff::suggestion(&new, &set, at(0)).changes());
            // Only the finding that an unlearned workload would be isolated goes away with the approval.
            if !old.findings.iter().any(|finding| finding.code == "no-evidence") {
                prop_assert_eq!(&old.digest, &new.digest);
            }
        }
    }

    #[test]
    fn evidence_merges_in_any_order_and_grouping(a in evidence(), b in evidence(), c in evidence()) {
        let merged = |parts: &[&Evidence]| parts.iter().fold(Evidence::default(), |mut sum, part| { sum.merge(part); sum });
        prop_assert_eq!(merged(&[&a, &b]), merged(&[&b, &a]));
        prop_assert_eq!(merged(&[&merged(&[&a, &b]), &c]), merged(&[&a, &merged(&[&b, &c])]));
        prop_assert_eq!(merged(&[&a, &Evidence::default()]), a);
    }

    #[test]
    fn sets_of_hours_are_sets(a in btree_set(0..200u32, 0..60), b in btree_set(0..200u32, 0..60)) {
        let set = |hours: &BTreeSet<u32>| { let mut set = HourSet::default(); hours.iter().rev().for_each(|&hour| set.insert(hour)); set };
        let mut merged = set(&a);
        merged.merge(&set(&b));
        let union: BTreeSet<u32> = a.union(&b).copied().collect();
        prop_assert_eq!(&merged, &set(&union));
        prop_assert_eq!(merged.iter().collect::<Vec<_>>(), union.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(merged.hours(), union.len() as u64);
        prop_assert_eq!(merged.days(), union.iter().map(|hour| hour / 24).collect::<BTreeSet<_>>().len() as u64);
        prop_assert_eq!(&HourSet::from_runs(merged.runs().iter().copied()), &merged);
        prop_assert!(merged.runs().windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "runs are apart");
    }

    #[test]
    fn a_printed_workload_or_endpoint_reads_back(endpoint in endpoints()) {
        prop_assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint.clone());
        let text = serde_json::to_string(&endpoint).unwrap();
        prop_assert_eq!(serde_json::from_str::<Endpoint>(&text).unwrap(), endpoint.clone());
        if let Some(workload) = endpoint.workload() {
            prop_assert_eq!(&workload.to_string().parse::<Workload>().unwrap(), workload);
        }
    }

    #[test]
    fn a_printed_peer_reads_back(peer in peers()) {
        prop_assert_eq!(peer.to_string().parse::<Peer>().unwrap(), peer);
    }

    #[test]
    fn printed_ports_and_services_read_back(protocol in any::<u8>(), a in any::<u16>(), b in any::<u16>()) {
        let protocol = Protocol::from_number(protocol);
        prop_assert_eq!(protocol.to_string().parse::<Protocol>().unwrap(), protocol);
        let (first, last) = match protocol {
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => (a.min(b).max(1), a.max(b).max(1)),
            Protocol::Icmp | Protocol::Icmpv6 => ((a % 256).min(b % 256), (a % 256).max(b % 256)),
            Protocol::Other(_) => (0, 0),
        };
        let ports = Ports::new(protocol, first, last).unwrap();
        prop_assert_eq!(ports.to_string().parse::<Ports>().unwrap(), ports);
        let service = Service { protocol, port: first };
        prop_assert_eq!(service.to_string().parse::<Service>().unwrap(), service);
        let beyond = Service { port: last.wrapping_add(1), ..service };
        prop_assert!(ports.holds(service) && !ports.holds(beyond));
    }

    #[test]
    fn no_text_makes_the_readers_panic_and_what_they_read_prints_as_something_equal(text in "\\PC{0,24}") {
        macro_rules! reads { ($($type:ty),*) => { $(if let Ok(read) = text.parse::<$type>() {
            prop_assert_eq!(read.to_string().parse::<$type>().unwrap(), read);
        })* } }
        reads!(Workload, Endpoint, Peer, Ports, Service, Protocol, Mode);
    }
}

fn evidence() -> impl Strategy<Value = Evidence> {
    let counts = prop::array::uniform10(0..1_000_000u64);
    let times = proptest::option::of((0..1_000_000i64, 0..1_000_000i64));
    let roads = btree_set(select(vec![Road::Direct, Road::Published, Road::Proxy]), 0..3);
    (counts, times, vec(0..500u32, 0..20), roads).prop_map(|(n, times, hours, roads)| Evidence {
        established: n[0],
        connected_no_data: n[1],
        one_way: n[2],
        unanswered: n[3],
        refused: n[4],
        denied: n[5],
        would_deny: n[6],
        pre_existing: n[7],
        bytes_sent: n[8],
        bytes_received: n[9],
        first: times.map(|(a, b)| at(a.min(b))),
        last: times.map(|(a, b)| at(a.max(b))),
        hours: HourSet::from_runs(hours.into_iter().map(|hour| (hour, hour))),
        roads: roads.into_iter().collect(),
    })
}

/// Peers of which many hold one another.
fn nested() -> impl Strategy<Value = Peer> {
    let network = (select(vec!["10.0.0.1", "10.0.0.2", "10.1.0.1", "192.0.2.1", "2001:db8::1", "2001:db8:1::1"]), 0..=128u8);
    let network = network.prop_map(|(address, length)| {
        let address: IpAddr = address.parse().unwrap();
        let length = if address.is_ipv4() { length % 33 } else { length };
        Peer::Outside(IpNet::new(address, length).unwrap().trunc())
    });
    prop_oneof![3 => network, 1 => Just(Peer::Host), 2 => select(NAMES.to_vec()).prop_map(|name| Peer::Workload(workload(name)))]
}

fn names() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_.=,@#é-]{1,12}"
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    let v4 = any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits)));
    let v6 = any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits)));
    prop_oneof![v4, v6]
}

fn any_workload() -> impl Strategy<Value = Workload> {
    (prop_oneof![Just(String::new()), names()], names()).prop_map(|(namespace, name)| Workload::new(namespace, name))
}

fn endpoints() -> impl Strategy<Value = Endpoint> {
    prop_oneof![
        any_workload().prop_map(Endpoint::Workload),
        any_workload().prop_map(Endpoint::Run),
        Just(Endpoint::Host),
        addresses().prop_map(Endpoint::Outside),
        addresses().prop_map(Endpoint::Unknown),
        (names(), addresses()).prop_map(|(name, address)| Endpoint::Unmanaged { name, address }),
    ]
}

fn peers() -> impl Strategy<Value = Peer> {
    let net = (addresses(), any::<u8>()).prop_map(|(address, length)| {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        IpNet::new(address, length % (longest + 1)).unwrap().trunc()
    });
    prop_oneof![any_workload().prop_map(Peer::Workload), Just(Peer::Host), net.prop_map(Peer::Outside)]
}

#[test]
fn an_empty_town_learns_nothing_of_anybody() {
    let town = town(&[]);
    assert!(learn(&FlowGraph::new(), &town.context).iter().all(|suggestion| suggestion.rules.is_empty()));
}

#[test]
fn a_number_with_a_sign_is_no_protocol_and_no_port() {
    assert!("ip+47".parse::<Protocol>().is_err());
    assert!("tcp/+80".parse::<Ports>().is_err());
    assert!("tcp/80-".parse::<Ports>().is_err());
}
