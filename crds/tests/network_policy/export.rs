//! Laws of the export.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crds::network_policy::{Dns, Export, LEFT_OUT, Options, Pods, Why, export};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use policy::policy_set::{Direction, Quarantine, Rule, WorkloadPolicy};
use policy::segment::{Mode, Refusal, Segment, Selector};
use policy::{Connection, Endpoint, PolicySet, Protocol, Scene, Service, Verdict, Workload, evaluate};
use proptest::prelude::*;

use crate::semantics::{Cluster, End, Pod, Port};

const WORKLOADS: [&str; 6] = ["shop/web", "shop/db", "My_Shop/Web", "other/db", "by-hand", "shop/worker_2"];
const PEERS: [&str; 13] = [
    "shop/web",
    "shop/db",
    "My_Shop/Web",
    "other/db",
    "by-hand",
    "shop/worker_2",
    "host:",
    "outside:192.0.2.0/24",
    "outside:192.0.2.7",
    "outside:0.0.0.0/0",
    "outside:10.0.0.0/7",
    "outside:10.1.0.0/16",
    "outside:2001:db8::/32",
];
const PORTS: [&str; 9] = ["tcp/80", "tcp/80-90", "tcp/1-65535", "udp/53", "udp/1-79", "sctp/80", "icmp/8", "ip47", "tcp/85"];
const OUTSIDE: [&str; 6] = ["192.0.2.0", "192.0.2.7", "198.51.100.1", "11.0.0.1", "2001:db8::5", "2001:db9::1"];
const NUMBERS: [u16; 9] = [1, 53, 79, 80, 81, 85, 90, 91, 65535];

fn now() -> jiff::Timestamp {
    "2026-11-21T03:00:00Z".parse().unwrap()
}

fn rule() -> impl Strategy<Value = Rule> {
    let until = prop::sample::select(vec![None, None, None, Some("2026-11-21T02:00:00Z"), Some("2026-11-21T04:00:00Z")]);
    (prop::sample::select(PEERS.to_vec()), prop::sample::select(PORTS.to_vec()), until).prop_map(|(peer, ports, until)| Rule {
        peer: peer.parse().unwrap(),
        ports: ports.parse().unwrap(),
        until: until.map(|until| until.parse().unwrap()),
    })
}

/// Policies for some of the workloads, all of them in Enforce; a workload without a policy is in no segment, as it has no
/// NetworkPolicy.
fn policy_set() -> impl Strategy<Value = PolicySet> {
    let rules = || prop::collection::btree_set(rule(), 0..5);
    let policies = prop::collection::btree_map(prop::sample::select(WORKLOADS.to_vec()), (rules(), rules()), 0..=WORKLOADS.len());
    let quarantined = prop::collection::btree_set(prop::sample::select(WORKLOADS.to_vec()), 0..2);
    (policies, quarantined).prop_map(|(policies, quarantined)| {
        let workload = |name: &str| name.parse::<Workload>().unwrap();
        let members = policies.keys().map(|name| Selector::Workload(workload(name))).collect();
        let segment = Segment { name: "all".to_owned(), members, mode: Mode::Enforce, refusal: Refusal::Reject, promotion: None };
        PolicySet {
            segments: [("all".to_owned(), segment)].into(),
            policies: policies
                .into_iter()
                .map(|(name, (ingress, egress))| {
                    (workload(name), WorkloadPolicy { workload: workload(name), ingress: ingress.into(), egress: egress.into() })
                })
                .collect(),
            quarantines: quarantined
                .into_iter()
                .map(|name| (workload(name), Quarantine { workload: workload(name), comment: String::new() }))
                .collect(),
            guardrails: BTreeMap::new(),
        }
    })
}

fn known_pods(dns: Option<Dns>) -> Options {
    Options { pods: Some(vec!["10.0.0.0/8".parse().unwrap()]), dns, ..Options::usual(now()) }
}

fn pod(workload: &str, options: &Options) -> Pod {
    let pods = Pods::of(&workload.parse().unwrap(), options);
    let number = WORKLOADS.iter().position(|w| *w == workload).unwrap() as u8;
    Pod { labels: pods.labels(), namespace: pods.namespace, addresses: vec![IpAddr::from([10, 1, 0, number])], ports: Vec::new() }
}

fn cluster(policies: &[NetworkPolicy]) -> Cluster {
    // The worst of networks: where an ipBlock matches pods, too.
    Cluster { policies: policies.to_vec(), namespaces: BTreeMap::new(), blocks_match_pods: true }
}

fn allowed_here(set: &PolicySet, from: &Endpoint, to: &Endpoint, service: Service) -> bool {
    let networks = BTreeMap::new();
    let scene = Scene { set, networks: &networks, now: now() };
    let connection = Connection { from: from.clone(), to: to.clone(), service, guarded: true };
    evaluate(&scene, &connection).verdict == Verdict::Allow
}

/// Calls `probe` with every pair of ends (at least one of them a workload) and every service, and what both meanings say.
fn compare(set: &PolicySet, export: &Export, options: &Options, mut probe: impl FnMut(&str, bool, bool)) {
    let cluster = cluster(&export.policies);
    let pods: Vec<Pod> = WORKLOADS.iter().map(|w| pod(w, options)).collect();
    let ends: Vec<(Endpoint, End<'_>)> = WORKLOADS
        .iter()
        .zip(&pods)
        .map(|(w, pod)| (Endpoint::Workload(w.parse().unwrap()), End::Pod(pod)))
        .chain(OUTSIDE.iter().map(|a| (Endpoint::Outside(a.parse().unwrap()), End::Outside(a.parse().unwrap()))))
        .collect();
    for (from, from_end) in &ends {
        for (to, to_end) in &ends {
            if matches!((from_end, to_end), (End::Outside(_), End::Outside(_))) {
                continue;
            }
            for (protocol, spoken) in [(Protocol::Tcp, "TCP"), (Protocol::Udp, "UDP"), (Protocol::Sctp, "SCTP")] {
                for number in NUMBERS {
                    let service = Service { protocol, port: number };
                    let here = allowed_here(set, from, to, service);
                    let there = cluster.allows(*from_end, *to_end, Port { protocol: spoken, number });
                    probe(&format!("{from} -> {to} {service}"), here, there);
                }
            }
        }
    }
}

/// The set without what the export says it left out whole.
fn without(set: &PolicySet, export: &Export) -> PolicySet {
    let mut set = set.clone();
    for left in export.left_out.iter().filter(|left| left.why.whole()) {
        assert!(set.policies.get_mut(&left.workload).unwrap().rules_mut(left.direction).remove(&left.rule), "{left}");
    }
    set
}

fn expressible(port: &NetworkPolicyPort) -> bool {
    let known = port.protocol.as_deref().is_some_and(|protocol| ["TCP", "UDP", "SCTP"].contains(&protocol));
    known && port.port.is_some()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_export_allows_what_the_policies_allow_but_for_what_it_lists(set in policy_set()) {
        let options = known_pods(None);
        let export = export(&set, &options).unwrap();
        let expressible = without(&set, &export);
        compare(&expressible, &export, &options, |what, here, there| assert_eq!(here, there, "{what}\n{}", export.yaml()));
    }

    #[test]
    fn the_export_is_never_wider_whatever_is_known_of_the_cluster(set in policy_set()) {
        let options = Options { dns: None, ..Options::usual(now()) };
        let export = export(&set, &options).unwrap();
        compare(&set, &export, &options, |what, here, there| assert!(here || !there, "{what}\n{}", export.yaml()));
    }

    #[test]
    fn the_resolver_is_added_and_nothing_else(set in policy_set()) {
        let without_dns = export(&set, &known_pods(None)).unwrap();
        let options = known_pods(Options::usual(now()).dns);
        let with_dns = export(&set, &options).unwrap();
        let (before, after) = (cluster(&without_dns.policies), cluster(&with_dns.policies));
        let labels = [("k8s-app".to_owned(), "kube-dns".to_owned())].into();
        let resolver = Pod { namespace: "kube-system".to_owned(), labels, addresses: vec!["10.1.9.9".parse().unwrap()], ports: Vec::new() };
        for workload in WORKLOADS {
            let pod = pod(workload, &options);
            let key: Workload = workload.parse().unwrap();
            for (protocol, number) in [("UDP", 53), ("TCP", 53), ("TCP", 80), ("UDP", 54)] {
                let port = Port { protocol, number };
                let there = after.allows(End::Pod(&pod), End::Pod(&resolver), port);
                let quarantined = set.quarantines.contains_key(&key);
                let wanted = before.allows(End::Pod(&pod), End::Pod(&resolver), port) || (number == 53 && !quarantined);
                prop_assert_eq!(there, wanted, "{} {:?}", workload, port);
            }
        }
        compare(&without(&set, &with_dns), &with_dns, &options, |what, here, there| assert_eq!(here, there, "{what}"));
    }

    #[test]
    fn no_rule_is_without_peers_or_ports(set in policy_set()) {
        for policy in export(&set, &Options::usual(now())).unwrap().policies {
            let spec = policy.spec.unwrap();
            prop_assert_eq!(spec.policy_types.unwrap(), ["Ingress", "Egress"]);
            prop_assert!(spec.pod_selector.unwrap().match_labels.unwrap().len() == 2);
            let rules = spec.ingress.iter().flatten().map(|r| (&r.from, &r.ports)).chain(spec.egress.iter().flatten().map(|r| (&r.to, &r.ports)));
            for (peers, ports) in rules {
                prop_assert!(ports.as_ref().is_some_and(|ports| !ports.is_empty() && ports.iter().all(expressible)));
                prop_assert!(!peers.as_ref().unwrap().is_empty());
                for peer in peers.iter().flatten() {
                    // Either a block, or pods by labels; and never a namespace without its pods.
                    prop_assert!(peer.ip_block.is_some() != peer.pod_selector.is_some());
                    let labels = peer.pod_selector.as_ref().and_then(|s| s.match_labels.as_ref());
                    prop_assert!(peer.ip_block.is_some() || labels.is_some_and(|labels| !labels.is_empty()));
                }
            }
        }
    }

    #[test]
    fn the_same_policies_give_the_same_bytes_and_what_is_left_out_is_on_the_object(set in policy_set()) {
        let options = Options::usual(now());
        let first = export(&set, &options).unwrap();
        prop_assert_eq!(first.yaml(), export(&set.clone(), &options).unwrap().yaml());
        let on_objects: BTreeSet<String> = first.policies.iter()
            .filter_map(|p| p.metadata.annotations.as_ref()?.get(LEFT_OUT)).flat_map(|text| text.lines()).map(str::to_owned).collect();
        prop_assert_eq!(on_objects, first.left_out.iter().map(ToString::to_string).collect::<BTreeSet<_>>());
    }
}

fn set(policies: &[(&str, Direction, &str)]) -> PolicySet {
    let mut set = PolicySet::default();
    for (workload, direction, rule) in policies {
        let workload: Workload = workload.parse().unwrap();
        let policy = set.policies.entry(workload.clone()).or_insert_with(|| WorkloadPolicy::empty(workload));
        if let Some((peer, ports)) = rule.split_once(' ') {
            let rule = Rule { peer: peer.parse().unwrap(), ports: ports.parse().unwrap(), until: None };
            policy.rules_mut(*direction).insert(rule);
        }
    }
    set
}

#[test]
fn an_export_reads_like_this() {
    let set = set(&[
        ("shop/db", Direction::Ingress, "shop/web tcp/5432"),
        ("shop/db", Direction::Ingress, "backup/dump tcp/5432"),
        ("shop/db", Direction::Ingress, "host: tcp/5432"),
        ("shop/web", Direction::Egress, "shop/db tcp/5432"),
        ("shop/web", Direction::Egress, "outside:192.0.2.0/24 tcp/8000-8010"),
        ("shop/web", Direction::Ingress, "outside:0.0.0.0/0 tcp/8080"),
        ("shop/web", Direction::Ingress, "outside:::/0 tcp/8080"),
        ("shop/web", Direction::Egress, "outside:192.168.7.0/24 tcp/443"),
        ("shop/web", Direction::Egress, "shop/db icmp/8"),
        ("shop/idle", Direction::Ingress, ""),
    ]);
    let said = export(&set, &Options::usual(now())).unwrap().yaml();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/network_policy/export.yaml");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&golden, &said).unwrap();
    }
    let wanted = std::fs::read_to_string(&golden).unwrap();
    assert!(said == wanted, "UPDATE=1 rewrites it\n--- wanted\n{wanted}\n--- said\n{said}");
}

#[test]
fn a_network_within_the_pods_is_not_exported_and_says_so() {
    let set = set(&[("shop/web", Direction::Egress, "outside:10.1.0.0/16 tcp/443")]);
    let export = export(&set, &known_pods(None)).unwrap();
    let pods: IpNet = "10.0.0.0/8".parse().unwrap();
    assert_eq!(export.left_out[0].why, Why::WithinPods(pods));
    assert_eq!(export.policies[0].spec.as_ref().unwrap().egress, None, "no rule is left, so the side is closed");
}

#[test]
fn pods_networks_that_cover_a_network_between_them_leave_nothing_of_it() {
    let options = Options { pods: Some(["10.0.0.0/9", "10.128.0.0/9"].map(|n| n.parse().unwrap()).into()), ..known_pods(None) };
    let set = set(&[("shop/web", Direction::Egress, "outside:10.0.0.0/8 tcp/443")]);
    assert!(export(&set, &options).unwrap().left_out[0].why.whole());
}

#[test]
fn two_workloads_under_one_name_are_refused() {
    let set = set(&[("default/web", Direction::Ingress, ""), ("web", Direction::Ingress, "")]);
    let collision = export(&set, &Options::usual(now())).unwrap_err();
    assert_eq!(
        collision.to_string(),
        "web and default/web would both be web in namespace default: choose another namespace for workloads without one"
    );
    let options = Options { namespace: "by-hand".to_owned(), ..Options::usual(now()) };
    assert_eq!(export(&set, &options).unwrap().policies.len(), 2);
}

#[test]
fn a_rule_that_has_ended_is_neither_exported_nor_listed() {
    let mut set = set(&[("shop/web", Direction::Egress, "shop/db tcp/5432")]);
    let policy = set.policies.values_mut().next().unwrap();
    policy.egress = policy.egress.iter().cloned().map(|rule| Rule { until: Some(now()), ..rule }).collect();
    let ended = export(&set, &known_pods(None)).unwrap();
    assert_eq!((ended.policies[0].spec.as_ref().unwrap().egress.clone(), ended.left_out), (None, Vec::new()));
    let before = Options { now: "2026-11-21T02:59:59Z".parse().unwrap(), ..known_pods(None) };
    assert_eq!(export(&set, &before).unwrap().left_out[0].why, Why::Until(now()), "while it holds, it is listed");
}
