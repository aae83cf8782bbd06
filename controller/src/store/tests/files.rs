use proptest::prelude::*;
use sqlx::{Connection, Executor};
use tokio::sync::OnceCell;

use super::*;

/// A store with something in it, closed.
async fn full() -> (Place, Vec<u8>) {
    let place = Place::new();
    let store = place.open().await.unwrap();
    store.apply_batch(&batch(1, (1..=2000).map(|port| edge(port, 1)).collect(), vec![stretch(0, 10, true)])).await.unwrap();
    store.close().await;
    drop(store);
    let bytes = std::fs::read(place.path()).unwrap();
    (place, bytes)
}

#[tokio::test]
async fn a_new_store_is_empty_and_keeps_its_id() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    let id = store.id().to_owned();
    assert_eq!(id.len(), 32);
    assert!(store.load_graph().await.unwrap().is_empty());
    assert_eq!(store.load_policy_set().await.unwrap(), InForce::default());
    store.close().await;
    drop(store);
    assert_eq!(place.open().await.unwrap().id(), id);
}

#[tokio::test]
async fn two_processes_never_work_on_one_store() {
    let place = Place::new();
    let _first = place.open().await.unwrap();
    let error = place.open().await.unwrap_err();
    assert!(matches!(&error, StoreError::InUse { path } if *path == place.path()), "{error}");
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_refused_and_left_as_it_is() {
    let (place, _) = full().await;
    let mut connection = place.by_hand().await;
    connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'").await.unwrap();
    connection.close().await.unwrap();
    let before = std::fs::read(place.path()).unwrap();
    let error = place.open().await.unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 99, understood: SCHEMA, .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("has schema 99") && text.contains("understands up to 2") && text.contains("Run the newer version"), "{text}");
    assert!(std::fs::read(place.path()).unwrap() == before);
}

#[tokio::test]
async fn a_store_cut_in_half_is_refused_and_left_as_it_is() {
    let (place, bytes) = full().await;
    for cut in [bytes.len() / 2, bytes.len() / 2 + 1, bytes.len() - 1, 4096, 8192, 1000, 100, 50, 17] {
        std::fs::write(place.path(), &bytes[..cut]).unwrap();
        let error = place.open().await.expect_err(&format!("cut to {cut} of {}", bytes.len()));
        assert!(matches!(error, StoreError::Damaged { .. }), "cut to {cut}: {error:?}");
        assert!(error.to_string().contains("Put a copy back"), "{error}");
        assert!(std::fs::read(place.path()).unwrap() == bytes[..cut], "cut to {cut}: it was written to");
    }
    std::fs::write(place.path(), &bytes).unwrap();
    assert_eq!(place.open().await.unwrap().load_graph().await.unwrap().len(), 2000);
}

#[tokio::test]
async fn an_empty_file_is_damage_and_no_beginning() {
    let place = Place::new();
    std::fs::write(place.path(), b"").unwrap();
    let error = place.open().await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(std::fs::metadata(place.path()).unwrap().len(), 0);
}

#[tokio::test]
async fn a_file_of_something_else_is_refused_and_left_as_it_is() {
    let place = Place::new();
    std::fs::write(place.path(), b"apiVersion: v1\nkind: List\nitems: []\n").unwrap();
    assert!(matches!(place.open().await.unwrap_err(), StoreError::NotAStore { .. }));
    assert!(std::fs::read(place.path()).unwrap().starts_with(b"apiVersion"));

    std::fs::remove_file(place.path()).unwrap();
    std::fs::create_dir(place.path()).unwrap();
    assert!(matches!(place.open().await.unwrap_err(), StoreError::NotAStore { .. }));
    std::fs::remove_dir(place.path()).unwrap();

    std::fs::File::create(place.path()).unwrap();
    let mut connection = place.by_hand().await;
    connection.execute("CREATE TABLE songs (title TEXT)").await.unwrap();
    connection.close().await.unwrap();
    let error = place.open().await.unwrap_err();
    assert!(error.to_string().contains("another program"), "{error}");

    let mut connection = place.by_hand().await;
    connection.execute("CREATE TABLE meta (tune TEXT)").await.unwrap();
    connection.close().await.unwrap();
    assert!(matches!(place.open().await.unwrap_err(), StoreError::NotAStore { .. }));
}

#[tokio::test]
async fn what_is_left_of_a_store_that_was_never_finished_is_no_obstacle() {
    let place = Place::new();
    for leftover in ["store.db.new", "store.db.new-journal"] {
        std::fs::write(place.dir.path().join(leftover), b"half").unwrap();
    }
    place.open().await.unwrap();
    assert!(!place.dir.path().join("store.db.new").exists());
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_said() {
    let place = Place::new();
    let path = place.dir.path().join("no/such/store.db");
    let error = Store::open(&path, at(0)).await.unwrap_err();
    assert!(error.to_string().contains("no/such/store.db"), "{error}");
}

/// Copies the files of a store that is still open: what is on disk at that moment is what `kill -9` leaves.
#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_sudden_death() {
    let place = Place::new();
    let store = place.open().await.unwrap();
    for seq in 1..=50 {
        store.apply_batch(&batch(seq, vec![edge(1, 1), edge(u16::try_from(seq).unwrap() + 100, 1)], vec![])).await.unwrap();
        let after = Place::new();
        for file in ["store.db", "store.db-wal"] {
            std::fs::copy(place.dir.path().join(file), after.dir.path().join(file)).unwrap();
        }
        let found = after.open().await.unwrap();
        assert_eq!(found.acknowledged("node1", "spool1").await.unwrap(), seq);
        assert_eq!(found.load_graph().await.unwrap().get(&edge(1, 1).key).unwrap().established, seq);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever a flipped byte hits: the store is refused, or it reads; it never panics and never grows.
    #[test]
    fn a_flipped_byte_is_refused_or_harmless(at_byte: prop::sample::Index, with in 1..=255_u8) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            static WHOLE: OnceCell<Vec<u8>> = OnceCell::const_new();
            let mut bytes = WHOLE.get_or_init(|| async { full().await.1 }).await.clone();
            let place = Place::new();
            let at_byte = at_byte.index(bytes.len());
            bytes[at_byte] ^= with;
            std::fs::write(place.path(), &bytes).unwrap();
            match place.open().await {
                Ok(store) => match store.load_graph().await {
                    Ok(graph) => assert!(graph.len() <= 2000),
                    Err(StoreError::Unreadable { .. } | StoreError::Database { .. }) => {}
                    Err(e) => panic!("{e:?}"),
                },
                Err(StoreError::Damaged { .. } | StoreError::NotAStore { .. } | StoreError::Newer { .. } | StoreError::Migration { .. }) => {}
                Err(StoreError::Database { source, .. }) => assert!(!source.to_string().is_empty()),
                Err(e) => panic!("byte {at_byte}: {e:?}"),
            }
        });
    }
}
