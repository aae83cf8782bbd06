//! The way from one plan to the next: it leads there, from that plan alone, and is small.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod sets;

use policy::plan::{MOST_RULES, PLAN_FORMAT, PlanChange, PlanRefused};
use policy::{NodePlan, Peer, PolicySet, Rule, WorkloadPolicy};
use proptest::prelude::*;
use sets::sets;

fn plan(generation: u64, set: &PolicySet) -> NodePlan {
    NodePlan { format: PLAN_FORMAT, store: "one".to_owned(), generation, set: set.clone().into() }
}

proptest! {
    #[test]
    fn the_way_between_two_plans_leads_from_the_one_to_the_other_and_from_no_other(old in sets(), new in sets(), third in sets()) {
        let change = PlanChange::between("one", (7, &old), (8, &new));
        let told: PlanChange = serde_json::from_slice(&serde_json::to_vec(&change).unwrap()).unwrap();
        prop_assert_eq!(&told, &change);
        prop_assert_eq!(told.clone().onto(Some(&plan(7, &old))).unwrap(), plan(8, &new));
        // Of another generation, of another store, of none.
        let other = PlanRefused::OtherBase { from: 7 };
        prop_assert_eq!(told.clone().onto(Some(&plan(6, &old))), Err(other.clone()));
        prop_assert_eq!(told.clone().onto(Some(&NodePlan { store: "two".to_owned(), ..plan(7, &old) })), Err(other.clone()));
        prop_assert_eq!(told.clone().onto(None), Err(other));
        // A plan that says it is that one and isn't: refused, or what differs was neither read nor written.
        if let Ok(reached) = told.onto(Some(&plan(7, &third))) {
            let kept = PlanChange::between("one", (7, &third), (8, &reached.set));
            prop_assert_eq!(kept.policies, change.policies);
            prop_assert_eq!(kept.without, change.without);
        }
    }
}

#[test]
fn a_quarantine_and_a_rule_among_a_hundred_thousand_are_told_in_a_few_hundred_bytes() {
    let mut old = PolicySet::default();
    for n in 0..100 {
        let mut policy = WorkloadPolicy::empty(format!("made/s{n}").parse().unwrap());
        let rule =
            |port: u32| Rule { peer: "made/db".parse::<Peer>().unwrap(), ports: format!("tcp/{port}").parse().unwrap(), until: None };
        policy.egress = (1..=1_000).map(rule).collect();
        old.policies.insert(policy.workload.clone(), policy);
    }
    let mut new = old.clone();
    let workload: policy::Workload = "made/s7".parse().unwrap();
    new.quarantines.insert(workload.clone(), policy::policy_set::Quarantine { workload: workload.clone(), comment: String::new() });
    let rule = Rule { peer: "host:".parse().unwrap(), ports: "tcp/22".parse().unwrap(), until: None };
    new.policies.get_mut(&workload).unwrap().ingress.insert(rule);
    let change = PlanChange::between("one", (7, &old), (8, &new));
    assert!(serde_json::to_vec(&change).unwrap().len() < 500, "{change:?}");
    assert_eq!(*change.onto(Some(&plan(7, &old))).unwrap().set, new);
}

#[test]
fn no_row_of_changes_makes_a_plan_larger_than_a_node_is_to_hold() {
    let mut set = PolicySet::default();
    let rule = |n: u32| {
        let peer = format!("outside:{}", std::net::Ipv4Addr::from(0x0a00_0000 + n));
        Rule { peer: peer.parse().unwrap(), ports: "tcp/80".parse().unwrap(), until: None }
    };
    let mut policy = WorkloadPolicy::empty("made/s".parse().unwrap());
    policy.egress = (0..u32::try_from(MOST_RULES).unwrap()).map(rule).collect();
    set.policies.insert(policy.workload.clone(), policy);
    let mut more = set.clone();
    more.policies.values_mut().next().unwrap().ingress.insert(rule(0));
    let change = PlanChange::between("one", (7, &set), (8, &more));
    assert_eq!(change.onto(Some(&plan(7, &set))), Err(PlanRefused::TooLarge { rules: MOST_RULES + 1 }));
}

#[test]
fn what_is_there_twice_or_written_by_a_later_version_is_refused() {
    let set = PolicySet::default();
    let empty = PlanChange::between("one", (7, &set), (8, &set));
    let twice = policy::policy_set::Quarantine { workload: "shop/db".parse().unwrap(), comment: String::new() };
    let change = PlanChange { quarantines: Some(vec![twice.clone(), twice]), ..empty.clone() };
    assert_eq!(change.onto(Some(&plan(7, &set))), Err(PlanRefused::OtherBase { from: 7 }));
    let change = PlanChange { format: PLAN_FORMAT + 1, ..empty.clone() };
    assert_eq!(change.onto(Some(&plan(7, &set))), Err(PlanRefused::UnknownFormat { found: PLAN_FORMAT + 1 }));
    let backwards = PlanChange { to: 6, ..empty };
    assert_eq!(backwards.onto(Some(&plan(7, &set))), Err(PlanRefused::OtherBase { from: 7 }));
    let unknown = r#"{"format":1,"store":"one","from":7,"to":8,"policies":[],"without":[],"deny":[]}"#;
    let error = policy::wire::read_plan_change(unknown.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("deny"), "{error}");
}
