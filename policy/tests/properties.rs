//! The properties that hold always, as far as they show without a kernel. The others are proven with packets: see README.md.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use policy::FlowOutcome::{Denied, Established};
use policy::learn::{Window, learn};
use policy::plan::{PLAN_FORMAT, PlanRefused};
use policy::review::{Choice, Reading, approve};
use policy::{
    Connection, Endpoint, Inventory, Mode, NodePlan, PolicySet, Scene, Segment, Selector, Service, Verdict, Workload, WorkloadPolicy, bind,
    evaluate,
};

const NAMES: [&str; 3] = ["shop/web", "shop/db", "shop/worker"];

fn town() -> Town {
    let mut town = Town::of(NAMES);
    town.flow("shop/web", "shop/db", Service::tcp(5432), Established, 9);
    town.flow("shop/worker", "shop/db", Service::tcp(5432), Established, 9);
    town.flow("outside:192.0.2.7", "shop/web", Service::tcp(80), Established, 9);
    town.flow("shop/web", "shop/worker", Service::tcp(22), Denied, 9);
    town
}

fn enforced(town: &Town) -> PolicySet {
    let members = [Selector::Project("shop".to_owned())].into();
    let segment = Segment { name: "shop".to_owned(), members, mode: Mode::Enforce, refusal: Default::default(), promotion: None };
    let set = PolicySet { segments: [("shop".to_owned(), segment)].into(), ..PolicySet::default() };
    learn(&town.graph, &town.context).iter().fold(set, |set, suggestion| {
        let reading = Reading { digest: suggestion.digest.clone(), choice: Choice::Whole, accept: BTreeSet::new() };
        approve(&set, suggestion, &reading).unwrap().set
    })
}

fn connection(from: &str, to: &str, service: Service) -> Connection {
    Connection { from: from.parse().unwrap(), to: to.parse().unwrap(), service, guarded: true }
}

fn plan(store: &str, generation: u64) -> NodePlan {
    NodePlan { format: PLAN_FORMAT, store: store.to_owned(), generation, set: PolicySet::default().into() }
}

#[test]
fn property_01_proposing_changes_nothing_only_a_recorded_decision_changes_what_is_enforced() {
    let mut town = town();
    let set = enforced(&town);
    let before = (set.clone(), town.context.policies.clone());
    town.context.policies = set.policies.clone();
    town.flow("shop/web", "shop/worker", Service::tcp(8080), Established, 100);
    let web = town.suggestion("shop/web");
    assert!(web.rules.iter().any(|rule| printed(rule) == "egress shop/worker tcp/8080"), "it is proposed");
    let networks = BTreeMap::new();
    let scene = Scene { set: &set, networks: &networks, now: at(0) };
    assert_eq!(evaluate(&scene, &connection("shop/web", "shop/worker", Service::tcp(8080))).verdict, Verdict::Deny);
    assert_eq!(set, before.0);
}

#[test]
fn property_02_never_backwards_a_node_refuses_a_plan_of_an_older_generation_or_another_store() {
    let applied = plan("one", 7);
    assert_eq!(plan("one", 6).may_follow(Some(&applied)), Err(PlanRefused::Older { found: 6, applied: 7 }));
    assert_eq!(plan("one", 7).may_follow(Some(&applied)), Ok(()));
    let mut set = PolicySet::default();
    set.policies.insert(workload("shop/db"), policy::WorkloadPolicy::empty(workload("shop/db")));
    let another = NodePlan { set: set.into(), ..plan("one", 7) };
    assert_eq!(another.may_follow(Some(&applied)), Err(PlanRefused::Another { generation: 7 }), "of a store that was put back");
    let other = PlanRefused::OtherStore { found: "two".to_owned(), known: "one".to_owned() };
    assert_eq!(plan("two", 8).may_follow(Some(&applied)), Err(other));
    let newer = NodePlan { format: PLAN_FORMAT + 1, ..plan("one", 8) };
    assert_eq!(newer.may_follow(None), Err(PlanRefused::UnknownFormat { found: PLAN_FORMAT + 1 }));
}

#[test]
fn property_03_planning_twice_is_planning_once() {
    let town = town();
    let set = enforced(&town);
    assert_eq!(bind(&set, &Inventory::default(), at(0)), bind(&set, &Inventory::default(), at(0)));
    let mut again = town;
    again.context.policies = set.policies.clone();
    let unchanged = learn(&again.graph, &again.context).iter().fold(set.clone(), |set, suggestion| {
        let reading = Reading { digest: suggestion.digest.clone(), ..Reading::default() };
        let reviewed = approve(&set, suggestion, &reading).unwrap();
        assert!(reviewed.changed.is_empty());
        reviewed.set
    });
    assert_eq!(unchanged, set);
}

#[test]
fn property_05_unreadable_never_means_wider_a_rule_that_cannot_be_read_makes_the_policy_invalid() {
    let policy = |peer: &str, ports: &str| {
        let text = format!("workload: shop/db\ningress:\n- peer: \"{peer}\"\n  ports: \"{ports}\"\n");
        serde_norway::from_str::<WorkloadPolicy>(&text)
    };
    assert!(policy("shop/web", "tcp/5432").is_ok());
    let unreadable = [
        ("", "tcp/5432"),
        ("outside:10.0.0.0/33", "tcp/5432"),
        ("outside:10.0.0.5/8", "tcp/5432"),
        ("outside:", "tcp/5432"),
        ("*", "tcp/0"),
        ("shop/web", "tcp/0"),
        ("shop/web", "tcp/70000"),
        ("shop/web", "tcp/9-1"),
        ("shop/web", "tcp"),
        ("shop/web", ""),
        ("shop/web", "any"),
    ];
    for (peer, ports) in unreadable {
        assert!(policy(peer, ports).is_err(), "\"{peer}\" \"{ports}\" is no rule");
    }
    let unknown_field = "workload: shop/db\ningress: []\negres: []\n";
    assert!(serde_norway::from_str::<WorkloadPolicy>(unknown_field).is_err());
    let no_ports = "workload: shop/db\ningress:\n- peer: shop/web\n";
    assert!(serde_norway::from_str::<WorkloadPolicy>(no_ports).is_err(), "no ports is not all ports");
}

#[test]
fn property_06_never_claim_what_is_not_so_loss_in_the_learning_window_is_shown_on_the_suggestion() {
    let mut town = town();
    let mut window = Window::default();
    window.add(at(0), at(3600), true, 12);
    town.context.windows.insert(workload("shop/web"), window);
    let web = town.suggestion("shop/web");
    assert_eq!((web.coverage.lost, web.coverage.healthy_seconds), (12, 0));
    assert!(town.finding("shop/web", "loss-in-window").unwrap().starts_with("12 kernel events were lost"));
    let unmanaged = [policy::inventory::Unmanaged::Privileged].into();
    town.context.workloads.get_mut(&workload("shop/web")).unwrap().unmanaged = unmanaged;
    assert!(town.finding("shop/web", "unmanaged").unwrap().contains("no protection is claimed for shop/web: it runs privileged"));
}

#[test]
fn property_07_an_unknown_address_on_an_enforced_network_is_denied_for_neighbours_in_learn_too() {
    let set = enforced(&town());
    let networks = BTreeMap::new();
    let scene = Scene { set: &set, networks: &networks, now: at(0) };
    for to in ["shop/db", "lone", "outside:192.0.2.9"] {
        let decision = evaluate(&scene, &connection("unknown:172.18.0.9", to, Service::tcp(5432)));
        assert_eq!((decision.verdict, decision.unknown_address), (Verdict::Deny, true), "to {to}");
    }
}

#[test]
fn property_09_every_verdict_has_a_reason_that_names_the_policy_and_the_rule_or_says_that_none_allows_it() {
    let set = enforced(&town());
    let networks = BTreeMap::new();
    let scene = Scene { set: &set, networks: &networks, now: at(0) };
    let reason = |from, to, port| evaluate(&scene, &connection(from, to, Service::tcp(port))).reason();
    assert_eq!(
        reason("shop/web", "shop/db", 5432),
        "policy shop/web, egress: shop/db tcp/5432; policy shop/db, ingress: shop/web tcp/5432"
    );
    assert_eq!(
        reason("shop/worker", "shop/web", 80),
        "no egress rule of policy shop/worker allows it; no ingress rule of policy shop/web allows it"
    );
    assert_eq!(reason("outside:192.0.2.7", "shop/web", 80), "policy shop/web, ingress: outside:192.0.2.7 tcp/80");
    assert_eq!(reason("lone", "other", 80), "lone is not enforced; other is not enforced");
    assert_eq!(reason("host:", "outside:192.0.2.7", 80), "neither end is a workload");
    assert_eq!(reason("unknown:172.18.0.9", "shop/web", 80), "an address that belongs to no container, on a guarded network");
}

#[test]
fn property_11_learn_then_enforce_then_replay_what_was_accepted_no_denials_and_any_other_flow_denied() {
    let town = town();
    let set = enforced(&town);
    let networks = BTreeMap::new();
    let scene = Scene { set: &set, networks: &networks, now: at(0) };
    let workloads = NAMES.map(|name| Endpoint::Workload(name.parse::<Workload>().unwrap()));
    for from in &workloads {
        for to in &workloads {
            for port in [22, 80, 5432] {
                let connection = Connection { from: from.clone(), to: to.clone(), service: Service::tcp(port), guarded: true };
                let accepted =
                    town.graph.iter().any(|(key, seen)| (&key.from, &key.to, key.service.port) == (from, to, port) && seen.established > 0);
                assert_eq!(evaluate(&scene, &connection).verdict == Verdict::Allow, accepted, "{from} -> {to} tcp/{port}");
            }
        }
    }
}

proptest::proptest! {
    #[test]
    fn every_name_of_a_workload_is_read_back_as_the_peer_that_it_is(
        text in proptest::prop_oneof![
            "[!-~]{1,12}",
            "[a-z0-9.:]{1,9}/[a-z0-9.]{1,4}",
            "[0-9]{1,3}[.][0-9]{1,3}[.][0-9]{1,3}[.][0-9]{1,3}/[0-9]{1,2}",
            "(host|outside|10[.]0[.]0[.]0)(:|/)?[0-9]{0,2}",
        ]
    ) {
        if let Ok(workload) = text.parse::<Workload>() {
            let peer = policy::policy_set::Peer::Workload(workload);
            proptest::prop_assert_eq!(peer.to_string().parse(), Ok(peer));
        }
    }
}
