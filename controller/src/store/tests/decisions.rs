use std::collections::BTreeSet;

use policy::guardrail::{Guardrail, Parties};
use policy::policy_set::{Direction, Quarantine};
use policy::review::{Action, Who};
use policy::segment::{Mode, Segment, Selector};
use policy::{Peer, PolicySet, Rule, WorkloadPolicy};
use sqlx::{Connection, Executor};

use super::*;

fn db() -> Workload {
    Workload::new("shop", "db")
}

fn draft(action: Action) -> DecisionDraft {
    DecisionDraft {
        time: at(7),
        who: Who { uid: 0, name: "root".into(), claims: Some("ada".into()) },
        action,
        subject: "shop/db".into(),
        digest: Some("abc".into()),
        rules: vec![],
        comment: "because".into(),
    }
}

fn change(expected: u64, set: PolicySet, action: Action) -> Change {
    Change { expected, set, rejected: vec![], accepted: vec![], decision: draft(action) }
}

fn policy(ports: &[u16]) -> WorkloadPolicy {
    let mut policy = WorkloadPolicy::empty(db());
    for &port in ports {
        policy.ingress.insert(Rule { peer: Peer::Workload(Workload::new("shop", "web")), ports: Service::tcp(port).into(), until: None });
    }
    policy
}

fn guardrail() -> Guardrail {
    let parties = |party: &str| Parties { any_of: [party.parse().unwrap()].into(), except: BTreeSet::new() };
    Guardrail {
        name: "never".into(),
        from: parties("project:prod"),
        to: parties("project:dev"),
        ports: BTreeSet::new(),
        reason: "because".into(),
    }
}

fn set(ports: &[u16]) -> PolicySet {
    let segment = Segment {
        name: "shop".into(),
        members: BTreeSet::from([Selector::Project("shop".into())]),
        mode: Mode::Audit,
        refusal: Default::default(),
        promotion: None,
    };
    PolicySet {
        segments: [("shop".to_owned(), segment)].into(),
        policies: [(db(), policy(ports))].into(),
        quarantines: [(db(), Quarantine { workload: db(), comment: "odd".into() })].into(),
        guardrails: [("never".to_owned(), guardrail())].into(),
    }
}

#[tokio::test]
async fn a_decision_and_what_it_changes_are_there_after_a_restart() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let decision = store.commit_decision(&change(0, set(&[5432]), Action::Approve)).await.unwrap();
    assert_eq!((decision.number, decision.generation), (1, 1));
    store.close().await;
    drop(store);
    let store = place.open().await.unwrap();
    assert_eq!(store.load_policy_set().await.unwrap(), InForce { generation: 1, set: set(&[5432]) });
    assert_eq!(store.decisions().await.unwrap(), [decision]);
}

#[tokio::test]
async fn the_generation_grows_with_each_change_and_stays_without_one() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    for (number, (ports, generation)) in (1..).zip([(&[1][..], 1), (&[1, 2], 2), (&[1, 2], 2), (&[2], 3)]) {
        let in_force = store.load_policy_set().await.unwrap();
        let decision = store.commit_decision(&change(in_force.generation, set(ports), Action::Edit)).await.unwrap();
        assert_eq!((decision.number, decision.generation), (number, generation), "{ports:?}");
    }
    let revisions = store.revisions(&db()).await.unwrap();
    let told: Vec<_> = revisions.iter().map(|r| (r.revision, r.generation, r.decision)).collect();
    assert_eq!(told, [(1, 1, 1), (2, 2, 2), (3, 3, 4)]);
    assert_eq!(revisions[1].policy, Some(policy(&[1, 2])));

    store.commit_decision(&change(3, PolicySet::default(), Action::Revert)).await.unwrap();
    assert_eq!(store.load_policy_set().await.unwrap(), InForce { generation: 4, set: PolicySet::default() });
    assert_eq!(store.revisions(&db()).await.unwrap().last().unwrap().policy, None);
}

#[tokio::test]
async fn a_decision_on_what_is_no_longer_in_force_is_refused_and_changes_nothing() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.commit_decision(&change(0, set(&[1]), Action::Edit)).await.unwrap();
    let error = store.commit_decision(&change(0, set(&[1, 2]), Action::Edit)).await.unwrap_err();
    assert!(matches!(error, StoreError::Moved { expected: 0, found: 1 }), "{error}");
    assert_eq!(store.load_policy_set().await.unwrap().set, set(&[1]));
    assert_eq!(store.decisions().await.unwrap().len(), 1);
}

#[tokio::test]
async fn rejected_rules_are_remembered_until_somebody_takes_that_back() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let rule = |direction| RejectedRule {
        workload: db(),
        direction,
        peer: "outside:192.0.2.0/24".parse().unwrap(),
        ports: "udp/8000-8010".parse().unwrap(),
    };
    let both = [rule(Direction::Ingress), rule(Direction::Egress)];
    let reject = Change { rejected: both.to_vec(), ..change(0, PolicySet::default(), Action::Reject) };
    store.commit_decision(&reject).await.unwrap();
    store.commit_decision(&reject).await.unwrap();
    assert_eq!(store.rejected().await.unwrap(), BTreeSet::from(both));
    let accept = Change { accepted: vec![rule(Direction::Egress)], ..change(0, PolicySet::default(), Action::Approve) };
    store.commit_decision(&accept).await.unwrap();
    assert_eq!(store.rejected().await.unwrap(), BTreeSet::from([rule(Direction::Ingress)]));
}

#[tokio::test]
async fn the_record_cannot_be_changed_even_by_other_tools() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.commit_decision(&change(0, set(&[1]), Action::Edit)).await.unwrap();
    let before = store.decisions().await.unwrap();
    let mut connection = place.by_hand().await;
    for statement in [
        "UPDATE decisions SET json = '{}'",
        "DELETE FROM decisions",
        "INSERT INTO decisions (number, time_us, generation, json) VALUES (7, 0, 0, '{}')",
        "INSERT OR REPLACE INTO decisions (number, time_us, generation, json) VALUES (1, 0, 0, '{}')",
    ] {
        let error = connection.execute(statement).await.expect_err(statement).to_string();
        assert!(error.contains("append-only") || error.contains("follows the one before"), "{statement}: {error}");
    }
    connection.close().await.unwrap();
    assert_eq!(store.decisions().await.unwrap(), before);
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_makes_the_whole_set_unreadable() {
    let spoiled = [
        "UPDATE objects SET json = replace(json, 'tcp/1', 'tcp/99999') WHERE kind = 'policy'",
        "UPDATE objects SET json = replace(json, 'shop/web', 'everyone:') WHERE kind = 'policy'",
        "UPDATE objects SET json = substr(json, 1, length(json) / 2) WHERE kind = 'segment'",
        "UPDATE objects SET json = replace(json, '\"mode\"', '\"until\":1,\"mode\"') WHERE kind = 'segment'",
        "UPDATE objects SET name = 'shop/web' WHERE kind = 'quarantine'",
        "UPDATE objects SET kind = 'denial' WHERE kind = 'quarantine'",
    ];
    for statement in spoiled {
        let place = Place::new();
        let store = place.open().await.unwrap();
        store.commit_decision(&change(0, set(&[1]), Action::Edit)).await.unwrap();
        let mut connection = place.by_hand().await;
        assert_eq!(connection.execute(statement).await.unwrap().rows_affected(), 1, "{statement}");
        connection.close().await.unwrap();
        let error = store.load_policy_set().await.expect_err(statement);
        assert!(matches!(error, StoreError::Unreadable { .. }), "{statement}: {error}");
    }
}

#[tokio::test]
async fn revisions_of_suggestions_go_on_after_a_restart() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let web = Workload::new("shop", "web");
    store.save_suggestion_revisions([(&db(), 1, "a"), (&web, 4, "b")]).await.unwrap();
    store.save_suggestion_revisions([(&db(), 2, "c")]).await.unwrap();
    let expected = [(db(), (2, "c".to_owned())), (web, (4, "b".to_owned()))];
    assert_eq!(store.suggestion_revisions().await.unwrap(), expected.into());
}
