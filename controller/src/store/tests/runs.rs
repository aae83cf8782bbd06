//! Runs in a real file: merged, damaged, of an earlier version.

use policy::service::Protocol;
use policy::{FlowGraph, HourSet};
use sqlx::migrate::Migrator;
use sqlx::{Connection, Executor, SqliteConnection};

use super::*;

async fn runs(store: &Store) -> i64 {
    sqlx::query_scalar("SELECT COUNT(*) FROM runs").fetch_one(&store.inner.pool).await.unwrap()
}

#[tokio::test]
async fn many_batches_are_few_runs_and_nothing_of_them_is_lost() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let mut expected = FlowGraph::new();
    for seq in 1..=300_u16 {
        let edges = vec![edge(1, 1), edge(1 + seq % 40, 1), edge(1000 + seq, 1)];
        for delta in &edges {
            expected.add(delta);
        }
        let node = if seq % 3 == 0 { "node2" } else { "node1" };
        let first = u64::from(seq);
        store.apply_batch(&BatchIn { node: node.into(), first, ..batch(first, edges, vec![]) }).await.unwrap();
    }
    store.tidied().await;
    assert!(runs(&store).await < 40, "{}", runs(&store).await);
    let same = |graph: FlowGraph| assert_eq!(graph.iter().collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
    same(store.load_graph().await.unwrap());
    store.close().await;
    drop(store);
    let store = place.open().await.unwrap();
    same(store.load_graph().await.unwrap());
    // What was there before counts with what comes.
    let before = runs(&store).await;
    for seq in 301..=330 {
        store.apply_batch(&BatchIn { first: seq, ..batch(seq, vec![edge(1, 1)], vec![]) }).await.unwrap();
        store.tidied().await;
    }
    assert!(runs(&store).await <= before + 16, "{before} runs before, {} after", runs(&store).await);
}

#[tokio::test]
async fn a_run_that_was_changed_is_told_and_neither_read_nor_merged() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.apply_batch(&batch(1, vec![edge(80, 1), edge(81, 1)], vec![])).await.unwrap();
    let damage = "UPDATE runs SET packed = SUBSTR(packed, 1, 3) || x'7f' || SUBSTR(packed, 5)";
    store.inner.pool.execute(damage).await.unwrap();
    let error = store.load_graph().await.unwrap_err();
    assert_eq!(error.to_string(), "the store holds a run of edges that cannot be read: 1: its checksum does not fit");
    for seq in 2..=40 {
        store.apply_batch(&batch(seq, vec![edge(80, 1)], vec![])).await.unwrap();
    }
    store.tidied().await;
    assert_eq!(runs(&store).await, 40, "what cannot be read must stay as evidence, with all that would have been merged with it");
    assert!(matches!(store.load_graph().await.unwrap_err(), StoreError::Unreadable { .. }));
}

/// A closed store as schema 1 left it, with these rows in its table of edges.
async fn of_schema_1(place: &Place, rows: &str) {
    std::fs::File::create(place.path()).unwrap();
    let mut connection: SqliteConnection = place.by_hand().await;
    let all = sqlx::migrate!("migrations/sqlite");
    let first = Migrator::with_migrations(all.iter().take(1).cloned().collect());
    first.run_direct(None, &mut connection, false).await.unwrap();
    let rest = "INSERT INTO meta (name, value) VALUES ('store', 'the-store'), ('schema', '1'), ('created', 'then'), ('generation', '0'); \
                INSERT INTO nodes (id, name) VALUES (1, 'node1'), (2, 'node2'); \
                INSERT INTO endpoints (id, name) VALUES (1, 'shop/web'), (2, 'shop/db'), (9, 'outside:192.0.2.7'); \
                INSERT INTO spools (node, spool, acknowledged) VALUES (1, 'spool1', 4);";
    connection.execute(rest).await.unwrap();
    connection.execute(sqlx::AssertSqlSafe(format!("INSERT INTO edges VALUES {rows}"))).await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn a_store_of_schema_1_holds_what_it_held() {
    let place = Place::new();
    of_schema_1(
        &place,
        "(1, 1, 2, 6, 5432, 1, 3, 0, 0, 0, 0, 0, 0, 1, 700, 900, 1790000000000000, 1790000005000000, x'90f41d02', 1), \
         (2, 1, 2, 6, 5432, 1, 4, 0, 0, 0, 0, 0, 0, 0, 1, 1, NULL, NULL, x'', 6), \
         (2, 9, 1, 17, 53, 0, 0, 0, 2, 0, 0, 0, 0, 0, 5, 0, NULL, NULL, x'', 0)",
    )
    .await;
    for opened in 1..=2 {
        let store = place.open().await.unwrap();
        assert_eq!(store.id(), "the-store");
        let graph = store.load_graph().await.unwrap();
        assert_eq!(graph.len(), 2);
        let tcp = graph.get(&edge(5432, 0).key).unwrap();
        let expected = Evidence {
            established: 7,
            pre_existing: 1,
            bytes_sent: 701,
            bytes_received: 901,
            first: Some(at(0)),
            last: Some(at(5)),
            hours: HourSet::from_runs([(490_000, 490_002)]),
            roads: policy::evidence::Roads::from_iter([
                policy::evidence::Road::Direct,
                policy::evidence::Road::Published,
                policy::evidence::Road::Proxy,
            ]),
            ..Evidence::default()
        };
        assert_eq!(*tcp, expected);
        let key = EdgeKey {
            from: Endpoint::Outside("192.0.2.7".parse().unwrap()),
            to: edge(1, 1).key.from,
            service: Service { protocol: Protocol::Udp, port: 53 },
            direction_known: false,
        };
        assert_eq!(graph.get(&key).unwrap().one_way, 2);
        let gone: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM sqlite_schema WHERE name = 'edges'").fetch_optional(&store.inner.pool).await.unwrap();
        assert_eq!(gone, None);
        assert_eq!(store.acknowledged("node1", "spool1").await.unwrap(), 3 + opened);
        store.apply_batch(&batch(4 + opened, vec![], vec![])).await.unwrap();
        store.close().await;
    }
}

#[tokio::test]
async fn a_store_of_schema_1_with_an_edge_that_cannot_be_read_keeps_all_of_them() {
    let place = Place::new();
    of_schema_1(
        &place,
        "(1, 1, 2, 6, 5432, 1, 3, 0, 0, 0, 0, 0, 0, 1, 700, 900, NULL, NULL, x'', 1), \
         (2, 1, 2, 999, 5432, 1, 4, 0, 0, 0, 0, 0, 0, 0, 1, 1, NULL, NULL, x'', 6)",
    )
    .await;
    let error = place.open().await.unwrap_err();
    assert!(matches!(error, StoreError::Unreadable { kind: "edge", .. }), "{error:?}");
    let mut connection = place.by_hand().await;
    let rows: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM edges").fetch_one(&mut connection).await.unwrap();
    let packed: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM runs").fetch_one(&mut connection).await.unwrap();
    assert_eq!((rows, packed), (2, 0));
}
