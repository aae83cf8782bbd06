use jiff::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::evidence::{Evidence, HourSet};
use crate::graph::EdgeDelta;
use crate::guardrail::{Guardrail, Parties};
use crate::learn::{Context, Halves, Known, Options, Rejected, Window};
use crate::policy_set::{Rule, WorkloadPolicy};

const NAMES: [&str; 5] = ["shop/web", "shop/db", "mail/web", "lone", "shop/web (run)"];

fn workload(name: &str) -> Workload {
    name.parse().unwrap()
}

fn ends() -> impl Strategy<Value = Endpoint> {
    let others = [
        "host:",
        "outside:192.0.2.1",
        "outside:192.0.2.3",
        "outside:10.0.0.1",
        "outside:10.0.0.2",
        "outside:192.168.7.7",
        "outside:2001:db8::1",
        "outside:fd00::1",
        "unknown:172.18.0.9",
        "unmanaged:nas@192.0.2.3",
        "unmanaged:tape@192.0.2.3",
        "outside:127.0.0.11",
    ];
    let parsed = |texts: &[&str]| texts.iter().map(|text| text.parse::<Endpoint>().unwrap()).collect::<Vec<_>>();
    prop_oneof![3 => select(parsed(&NAMES)), 2 => select(parsed(&others))]
}

fn deltas(most: usize) -> impl Strategy<Value = Vec<EdgeDelta>> {
    let services = ["tcp/80", "tcp/443", "tcp/53", "udp/53", "udp/514", "icmp/8", "ip47"].map(|text| text.parse().unwrap());
    let time = (0..400_000i64, 0..2i64);
    let delta = (ends(), ends(), select(services.to_vec()), prop::bool::weighted(0.9), 0..12usize, time);
    let delta = delta.prop_map(|(from, to, service, direction_known, outcome, (begun, lasted))| {
        let time = |second| Some(Timestamp::from_second(second).unwrap());
        let mut seen = Evidence { first: time(begun), last: time(begun + lasted), ..Evidence::default() };
        seen.hours = HourSet::from_runs([(begun as u32 / 3600, begun as u32 / 3600)]);
        seen.pre_existing = u64::from(!direction_known);
        match outcome {
            0..6 => seen.established = 1,
            6 => seen.connected_no_data = 2,
            7 => seen.one_way = 2,
            8 => seen.unanswered = 1,
            9 => seen.refused = 1,
            10 => seen.denied = 1,
            _ => seen.would_deny = 1,
        }
        EdgeDelta { key: EdgeKey { from, to, service, direction_known }, seen }
    });
    vec(delta, 0..most)
}

fn rule(text: &str) -> Rule {
    let (peer, ports) = text.rsplit_once(' ').unwrap();
    Rule { peer: peer.parse().unwrap(), ports: ports.parse().unwrap(), until: None }
}

fn contexts() -> impl Strategy<Value = Context> {
    let resolver = select(vec![None, Some("outside:127.0.0.11"), Some("shop/db"), Some("host:")]);
    let rejected = vec((select(NAMES[..4].to_vec()), any::<bool>(), select(RULES.to_vec())), 0..4);
    let options = (0..4u32, 1..6u32, any::<bool>());
    let policies = vec((select(NAMES[..4].to_vec()), vec(approved(), 0..6), vec(approved(), 0..6)), 0..4);
    (resolver, rejected, options, any::<bool>(), policies, any::<bool>()).prop_map(
        |(resolver, rejected, (exact_hosts, scan_targets, exact), guarded, policies, lone)| {
            let from_outside = if exact { FromOutside::ExactHosts } else { FromOutside::Narrowest };
            let mut context = Context {
                options: Options { exact_hosts, scan_targets, from_outside, ..Options::default() },
                now: Timestamp::from_second(500_000).unwrap(),
                ..Context::default()
            };
            for (name, egress, text) in rejected {
                let direction = if egress { Direction::Egress } else { Direction::Ingress };
                context.rejected.insert(Rejected::of(&workload(name), direction, &rule(text)));
            }
            if let Some(resolver) = resolver {
                for name in &NAMES[..3] {
                    let known = Known { resolvers: [resolver.parse().unwrap()].into(), ..Known::default() };
                    context.workloads.insert(workload(name), known);
                }
            }
            if guarded {
                let parties = |party: &str| Parties { any_of: [party.parse().unwrap()].into(), except: BTreeSet::new() };
                let (from, to) = (parties("shop/web"), parties("shop/db"));
                let guardrail = Guardrail { name: "apart".to_owned(), from, to, ports: BTreeSet::new(), reason: String::new() };
                context.guardrails.insert("apart".to_owned(), guardrail);
            }
            for (name, ingress, egress) in policies {
                let [ingress, egress] = [ingress, egress].map(|rules| rules.into_iter().collect());
                context.policies.insert(workload(name), WorkloadPolicy { workload: workload(name), ingress, egress });
            }
            if lone {
                context.options.stable_hours = 0;
                context.windows.insert(workload("lone"), {
                    let mut window = Window::default();
                    window.add(Timestamp::UNIX_EPOCH, context.now, true, 3);
                    window
                });
            }
            context
        },
    )
}

/// Rules in force: about one end or a network, of one port or of many, and now and then for a time.
fn approved() -> impl Strategy<Value = Rule> {
    let wide = [
        "lone tcp/1-1024",
        "mail/web udp/514",
        "outside:10.0.0.0/24 tcp/80",
        "outside:192.0.2.0/30 tcp/1-1024",
        "outside:0.0.0.0/0 udp/53",
        "outside:192.0.2.1 tcp/80",
    ];
    let until = prop::option::weighted(0.05, (400_000..600_000i64).prop_map(|second| Timestamp::from_second(second).unwrap()));
    let texts: Vec<&str> = RULES.into_iter().chain(wide).collect();
    (select(texts), until).prop_map(|(text, until)| Rule { until, ..rule(text) })
}

const RULES: [&str; 6] = [
    "shop/web tcp/80",
    "shop/db tcp/443",
    "outside:10.0.0.1 tcp/80",
    "outside:192.0.2.3 tcp/443",
    "outside:127.0.0.11 udp/53",
    "host: tcp/80",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn what_is_learned_by_parts_after_any_changes_is_what_is_learned_from_scratch(
        before in deltas(60),
        changes in vec(deltas(6), 0..8),
        context in contexts(),
        large in 0..24usize,
    ) {
        let mut graph = FlowGraph::new();
        before.iter().for_each(|delta| _ = graph.add(delta));
        let halves = Halves::of(&context);
        let mut kept = Kept::new();
        let mut outlines = BTreeMap::new();
        let mut behind: BTreeSet<Workload> = NAMES[..4].iter().map(|name| workload(name)).collect();
        for changes in std::iter::once(Vec::new()).chain(changes) {
            changes.iter().for_each(|delta| _ = graph.add(delta));
            behind.extend(kept.note(&graph, changes.iter().map(|delta| &delta.key)));
            let learner = Learner { large, ..Learner::new(&graph, &context, &halves) };
            for workload in std::mem::take(&mut behind) {
                let (outline, parts) = learner.renew(&workload, kept.take(&workload));
                parts.into_iter().for_each(|parts| kept.put(workload.clone(), parts));
                outlines.insert(workload, outline);
            }
            for (workload, outline) in &outlines {
                prop_assert_eq!(outline, &learner.outline(workload), "{}, by parts of more than {}", workload, large);
            }
        }
    }
}
