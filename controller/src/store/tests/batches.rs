use std::collections::BTreeMap;

use policy::{FlowGraph, HourSet};
use proptest::prelude::*;
use sqlx::{Connection, Executor};

use super::*;

#[tokio::test]
async fn a_batch_that_comes_again_changes_nothing() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let first = batch(1, vec![edge(5432, 3), edge(80, 1)], vec![stretch(0, 10, true)]);
    assert_eq!(store.apply_batch(&first).await.unwrap(), BatchOutcome::Applied { gap: None });
    for _ in 0..3 {
        assert_eq!(store.apply_batch(&first).await.unwrap(), BatchOutcome::Already);
    }
    assert_eq!(store.load_graph().await.unwrap().get(&edge(5432, 0).key).unwrap().established, 3);
    assert_eq!(store.load_health().await.unwrap()["node1"], [stretch(0, 10, true)]);
    assert_eq!(store.acknowledged("node1", "spool1").await.unwrap(), 1);
}

#[tokio::test]
async fn numbers_count_within_one_spool_of_one_node() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let first = batch(1, vec![edge(80, 1)], vec![]);
    store.apply_batch(&first).await.unwrap();
    store.apply_batch(&BatchIn { spool: "spool2".into(), ..first.clone() }).await.unwrap();
    store.apply_batch(&BatchIn { node: "node2".into(), ..first }).await.unwrap();
    assert_eq!(store.load_graph().await.unwrap().get(&edge(80, 0).key).unwrap().established, 3);
    let by_node = "SELECT n.name, COUNT(*) FROM runs AS r JOIN nodes AS n ON n.id = r.node GROUP BY n.name ORDER BY n.name";
    let counts: Vec<(String, i64)> = sqlx::query_as(by_node).fetch_all(&store.inner.pool).await.unwrap();
    assert_eq!(counts, [("node1".to_owned(), 2), ("node2".to_owned(), 1)]);
    assert_eq!(store.acknowledged("node3", "spool1").await.unwrap(), 0);
}

#[tokio::test]
async fn batches_that_never_arrived_are_counted_as_lost_and_not_observed() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.apply_batch(&batch(1, vec![], vec![stretch(0, 10, true)])).await.unwrap();
    let late = BatchIn { first: 5, ..batch(5, vec![edge(80, 1)], vec![stretch(40, 50, true)]) };
    let BatchOutcome::Applied { gap } = store.apply_batch(&late).await.unwrap() else { panic!("it is new") };
    assert_eq!(gap.unwrap().lost, 3);
    let told = |health: &[policy::Health]| health.iter().map(|h| (h.healthy, h.lost, h.seconds())).collect::<Vec<_>>();
    let mut health = store.load_health().await.unwrap().remove("node1").unwrap();
    assert_eq!(told(&health), [(true, 0, 10), (false, 3, 0), (true, 0, 10)]);
    // One without an account of its own, and one without anything.
    for (seq, edges) in [(10, vec![edge(80, 1)]), (13, vec![])] {
        store.apply_batch(&BatchIn { first: seq, ..batch(seq, edges, vec![]) }).await.unwrap();
    }
    health = store.load_health().await.unwrap().remove("node1").unwrap();
    assert_eq!(health.iter().map(|h| h.lost).sum::<u64>(), 3 + 4 + 2);
}

#[tokio::test]
async fn a_spool_this_store_never_heard_of_may_begin_anywhere() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let first = BatchIn { first: 57, ..batch(57, vec![edge(80, 1)], vec![]) };
    assert_eq!(store.apply_batch(&first).await.unwrap(), BatchOutcome::Applied { gap: None });
}

/// Several batches are on their way at once. When one of them finds the disk full, those behind it may find room again: taking them
/// would acknowledge the one that was refused.
#[tokio::test]
async fn a_batch_behind_one_that_was_refused_is_refused_too() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    for acknowledged in 0..3 {
        let behind = batch(acknowledged + 2, vec![edge(80, 1)], vec![]);
        let error = store.apply_batch(&behind).await.unwrap_err();
        assert!(
            matches!(error, StoreError::OutOfOrder { expected, found } if (expected, found) == (acknowledged + 1, acknowledged + 2)),
            "{error}"
        );
        store.apply_batch(&batch(acknowledged + 1, vec![edge(80, 1)], vec![])).await.unwrap();
    }
    assert_eq!(store.load_graph().await.unwrap().get(&edge(80, 0).key).unwrap().established, 3);
}

#[tokio::test]
async fn stretches_that_follow_each_other_are_one_up_to_an_hour() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let mut seq = 0;
    for second in (0..7300).step_by(10) {
        seq += 1;
        store.apply_batch(&batch(seq, vec![], vec![stretch(second, second + 10, second != 5000)])).await.unwrap();
    }
    let health = store.load_health().await.unwrap().remove("node1").unwrap();
    assert!(health.len() <= 5, "{health:#?}");
    assert_eq!(health.iter().map(Health::seconds).sum::<u64>(), 7300);
    assert_eq!(health.iter().filter(|h| !h.healthy).map(Health::seconds).sum::<u64>(), 10);
    assert_eq!(health.iter().map(|h| h.events).sum::<u64>(), 7300);
    assert!(health.iter().all(|h| h.seconds() <= 3600));
}

#[tokio::test]
async fn what_was_skipped_adds_up_by_reason() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    for seq in 1..=3 {
        let skipped = BTreeMap::from([("port is out of range".to_owned(), 2)]);
        store.apply_batch(&BatchIn { skipped, ..batch(seq, vec![], vec![]) }).await.unwrap();
    }
    assert_eq!(store.load_skipped().await.unwrap()["node1"], BTreeMap::from([("port is out of range".to_owned(), 6)]));
}

#[tokio::test]
async fn counts_stop_at_their_largest_and_never_become_small_again() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let most = i64::MAX as u64;
    for seq in 1..=3 {
        let health = Health { events: most, lost: most, ..stretch(0, 0, false) };
        store.apply_batch(&batch(seq, vec![edge(80, most)], vec![health])).await.unwrap();
    }
    assert_eq!(store.load_graph().await.unwrap().get(&edge(80, 0).key).unwrap().established, u64::MAX);
    assert_eq!(store.load_health().await.unwrap()["node1"][0].lost, most);
}

#[tokio::test]
async fn a_store_that_another_tool_holds_takes_nothing_and_acknowledges_nothing() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.apply_batch(&batch(1, vec![edge(80, 1)], vec![])).await.unwrap();
    let mut connection = place.by_hand().await;
    connection.execute("BEGIN EXCLUSIVE").await.unwrap();
    let error = store.apply_batch(&batch(2, vec![edge(80, 1)], vec![])).await.unwrap_err();
    assert!(matches!(error, StoreError::Database { what: "take a batch", .. }), "{error:?}");
    connection.execute("ROLLBACK").await.unwrap();
    connection.close().await.unwrap();
    assert_eq!(store.acknowledged("node1", "spool1").await.unwrap(), 1);
    store.apply_batch(&batch(2, vec![edge(80, 1)], vec![])).await.unwrap();
    assert_eq!(store.load_graph().await.unwrap().get(&edge(80, 0).key).unwrap().established, 2);
}

#[tokio::test]
async fn a_full_store_takes_nothing_of_the_batch_and_goes_on_when_there_is_room() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.apply_batch(&batch(1, vec![edge(1, 1)], vec![])).await.unwrap();
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(&store.inner.pool).await.unwrap();
    let limit = |pages: i64| sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
    sqlx::query(limit(pages + 2)).execute(&store.inner.pool).await.unwrap();
    let large = batch(2, (1..=5000).map(|port| edge(port, 1)).collect(), vec![stretch(0, 10, true)]);
    let error = store.apply_batch(&large).await.unwrap_err();
    let StoreError::Database { source, .. } = &error else { panic!("{error:?}") };
    assert!(source.to_string().contains("full"), "{source}");
    assert_eq!(store.acknowledged("node1", "spool1").await.unwrap(), 1);
    assert_eq!(store.load_graph().await.unwrap().len(), 1);
    assert!(store.load_health().await.unwrap().is_empty());

    sqlx::query(limit(1_000_000)).execute(&store.inner.pool).await.unwrap();
    assert_eq!(store.apply_batch(&large).await.unwrap(), BatchOutcome::Applied { gap: None });
    assert_eq!(store.load_graph().await.unwrap().len(), 5000);
}

fn some_delta() -> impl Strategy<Value = EdgeDelta> {
    let road = prop::collection::btree_set(prop_oneof![Just(Road::Direct), Just(Road::Published), Just(Road::Proxy)], 0..3);
    let runs = prop::collection::vec((490_000..490_200_u32, 0..9_u32), 0..4);
    let end = prop_oneof![Just(Endpoint::Host), "[a-c]".prop_map(|name| Endpoint::Workload(Workload::new("", name)))];
    (
        end.clone(),
        end,
        1..5_u16,
        any::<bool>(),
        prop::array::uniform10(0..1000_u64),
        prop::option::of((0..1000_i64, 0..1000_i64)),
        runs,
        road,
    )
        .prop_map(|(from, to, port, direction_known, n, times, runs, roads)| EdgeDelta {
            key: EdgeKey { from, to, service: Service::udp(port), direction_known },
            seen: Evidence {
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
                hours: HourSet::from_runs(runs.into_iter().map(|(first, length)| (first, first + length))),
                roads: roads.into_iter().collect(),
            },
        })
}

use policy::evidence::Road;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// What is loaded after a restart is what a graph in memory would be, in whatever batches it came.
    #[test]
    fn the_graph_is_the_merge_of_all_batches(batches in prop::collection::vec(prop::collection::vec(some_delta(), 0..130), 1..5)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let place = Place::new();
            let mut expected = FlowGraph::new();
            for (seq, edges) in (1..).zip(batches) {
                // Opened anew each time: nothing may live in memory alone.
                let store = place.open().await.unwrap();
                edges.iter().for_each(|delta| { expected.add(delta); });
                store.apply_batch(&batch(seq, edges, vec![])).await.unwrap();
                store.close().await;
            }
            let found = place.open().await.unwrap().load_graph().await.unwrap();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
        });
    }
}
