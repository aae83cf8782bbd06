use std::collections::BTreeSet;

use policy::guardrail::{Guardrail, Parties};
use policy::policy_set::{Direction, Quarantine};
use policy::review::{Action, Decision, Who};
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

async fn change(store: &Store, set: PolicySet, action: Action) -> Change {
    let before = store.load_policy_set().await.unwrap();
    Change { before, set, at_least: 0, rejected: vec![], accepted: vec![], decision: draft(action) }
}

async fn commit(store: &Store, set: PolicySet, action: Action) -> Decision {
    store.commit_decision(&change(store, set, action).await).await.unwrap()
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
    let decision = commit(&store, set(&[5432]), Action::Approve).await;
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
        let decision = commit(&store, set(ports), Action::Edit).await;
        assert_eq!((decision.number, decision.generation), (number, generation), "{ports:?}");
    }
    let revisions = store.revisions(&db()).await.unwrap();
    let told: Vec<_> = revisions.iter().map(|r| (r.revision, r.generation, r.decision)).collect();
    assert_eq!(told, [(1, 1, 1), (2, 2, 2), (3, 3, 4)]);
    assert_eq!(revisions[1].policy, Some(policy(&[1, 2])));

    commit(&store, PolicySet::default(), Action::Revert).await;
    assert_eq!(store.load_policy_set().await.unwrap(), InForce { generation: 4, set: PolicySet::default() });
    assert_eq!(store.revisions(&db()).await.unwrap().last().unwrap().policy, None);
}

#[tokio::test]
async fn only_what_a_decision_changes_is_written_and_what_is_there_is_what_was_decided() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let (all, other) = (set(&[1]), Workload::new("shop", "other"));
    let mut second = all.clone();
    second.policies.insert(other.clone(), WorkloadPolicy::empty(other));
    let without = |drop: fn(&mut PolicySet)| {
        let mut set = second.clone();
        drop(&mut set);
        set
    };
    let mut louder = second.clone();
    louder.segments.get_mut("shop").unwrap().mode = Mode::Enforce;
    let sets = [
        all.clone(),
        second.clone(),
        louder,
        without(|set| set.quarantines.clear()),
        without(|set| set.guardrails.clear()),
        without(|set| drop(set.policies.remove(&db()))),
        without(|set| set.segments.clear()),
        set(&[1, 2]),
        PolicySet::default(),
    ];
    for (generation, set) in (1..).zip(sets) {
        commit(&store, set.clone(), Action::Edit).await;
        assert_eq!(store.load_policy_set().await.unwrap(), InForce { generation, set });
        if generation == 3 {
            let mut connection = place.by_hand().await;
            let rows = sqlx::query_as::<_, (String, String, i64)>("SELECT kind, name, generation FROM objects ORDER BY kind, name");
            let rows = rows.fetch_all(&mut connection).await.unwrap();
            let rows: Vec<_> = rows.iter().map(|(kind, name, generation)| (kind.as_str(), name.as_str(), *generation)).collect();
            let whole = [
                ("guardrail", "never", 1),
                ("policy", "shop/db", 1),
                ("policy", "shop/other", 2),
                ("quarantine", "shop/db", 1),
                ("segment", "shop", 3),
            ];
            assert_eq!(rows, whole);
            connection.close().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_decision_on_what_is_no_longer_in_force_is_refused_and_changes_nothing() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let late = change(&store, set(&[1, 2]), Action::Edit).await;
    commit(&store, set(&[1]), Action::Edit).await;
    let error = store.commit_decision(&late).await.unwrap_err();
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
    let reject = Change { rejected: both.to_vec(), ..change(&store, PolicySet::default(), Action::Reject).await };
    store.commit_decision(&reject).await.unwrap();
    store.commit_decision(&reject).await.unwrap();
    assert_eq!(store.rejected().await.unwrap(), BTreeSet::from(both));
    let accept = Change { accepted: vec![rule(Direction::Egress)], ..change(&store, PolicySet::default(), Action::Approve).await };
    store.commit_decision(&accept).await.unwrap();
    assert_eq!(store.rejected().await.unwrap(), BTreeSet::from([rule(Direction::Ingress)]));
}

#[tokio::test]
async fn the_record_cannot_be_changed_even_by_other_tools() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    commit(&store, set(&[1]), Action::Edit).await;
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
        commit(&store, set(&[1]), Action::Edit).await;
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
