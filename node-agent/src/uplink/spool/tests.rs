use jiff::Timestamp;
use policy::{Endpoint, FlowGraph, Service, Workload};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn key(port: u16) -> EdgeKey {
    EdgeKey {
        from: Endpoint::Workload(Workload::new("shop", "web")),
        to: Endpoint::Workload(Workload::new("shop", "db")),
        service: Service::tcp(port),
        direction_known: true,
    }
}

fn seen(established: u64) -> Evidence {
    Evidence { established, ..Evidence::default() }
}

fn stretch(from: i64, to: i64, healthy: bool) -> Health {
    let at = |second| Timestamp::from_second(second).unwrap();
    Health { from: at(from), to: at(to), events: 1, lost: 0, unattributed: 0, healthy }
}

fn open(dir: &TempDir) -> Spool {
    Spool::open(dir.path(), Limits::default()).unwrap().0
}

fn limits(edges: usize, batch: usize) -> Limits {
    Limits { edges, batch, ..Limits::default() }
}

/// All that is in the spool, numbered or not.
fn content(spool: &Spool) -> Vec<(EdgeKey, u64)> {
    let mut graph = FlowGraph::new();
    for edge in spool.batches().flat_map(|batch| &batch.edges) {
        graph.add(&EdgeDelta::try_from(edge.clone()).unwrap());
    }
    for (key, seen) in &spool.waiting {
        graph.add(&EdgeDelta { key: key.clone(), seen: seen.clone() });
    }
    graph.iter().map(|(key, seen)| (key.clone(), seen.established)).collect()
}

#[test]
fn what_was_taken_is_there_after_a_sudden_death() {
    let dir = TempDir::new().unwrap();
    let mut spool = open(&dir);
    let id = spool.id().to_owned();
    spool.take([(key(1), seen(2)), (key(2), seen(1))], [stretch(0, 1, true)]).unwrap();
    spool.take([(key(1), seen(3))], [stretch(1, 2, true)]).unwrap();
    // Never closed: dropping a file writes nothing.
    drop(spool);
    let (spool, recovery) = Spool::open(dir.path(), Limits::default()).unwrap();
    assert_eq!((recovery.edges, recovery.unreadable), (2, 0));
    assert_eq!(spool.id(), id);
    assert_eq!(content(&spool), [(key(1), 5), (key(2), 1)]);
    assert_eq!(spool.health, [Health { events: 2, ..stretch(0, 2, true) }]);
}

#[test]
fn a_numbered_batch_comes_back_the_same_until_it_is_acknowledged() {
    let dir = TempDir::new().unwrap();
    let mut spool = open(&dir);
    spool.take([(key(1), seen(2))], [stretch(0, 1, true)]).unwrap();
    let first = spool.seal().unwrap().unwrap();
    assert_eq!((first.seq, first.edges.len(), first.health.len()), (1, 1, 1));
    spool.take([(key(1), seen(5))], []).unwrap();
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!(spool.batches().collect::<Vec<_>>(), [&first]);
    assert_eq!(spool.first_unsent(), 1);
    let second = spool.seal().unwrap().unwrap();
    assert_eq!((second.seq, second.edges[0].seen.as_ref().unwrap().established, second.health.len()), (2, 5, 0));
    spool.acknowledged(1).unwrap();
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!(spool.batches().collect::<Vec<_>>(), [&second]);
    spool.acknowledged(2).unwrap();
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!((spool.batches().len(), spool.first_unsent()), (0, 3));
    assert_eq!(spool.seal().unwrap(), None);
}

#[test]
fn a_session_goes_on_where_the_controller_is() {
    let dir = TempDir::new().unwrap();
    let mut spool = open(&dir);
    for port in 1..=3 {
        spool.take([(key(port), seen(1))], []).unwrap();
        spool.seal().unwrap().unwrap();
    }
    let id = spool.id().to_owned();
    assert!(!spool.resume(2).unwrap());
    assert_eq!((spool.id(), spool.first_unsent()), (&*id, 3));
    // A new store knows nothing: all that is left is sent, under its own numbers.
    assert!(!spool.resume(0).unwrap());
    assert_eq!(spool.batches().map(|b| b.seq).collect::<Vec<_>>(), [3]);
}

#[test]
fn a_spool_that_lost_its_end_takes_a_new_id() {
    let dir = TempDir::new().unwrap();
    let mut spool = open(&dir);
    let id = spool.id().to_owned();
    spool.take([(key(1), seen(1))], []).unwrap();
    assert!(spool.resume(7).unwrap());
    assert_ne!(spool.id(), id);
    let renamed = spool.id().to_owned();
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!((spool.id(), spool.first_unsent()), (&*renamed, 1));
    assert_eq!(spool.seal().unwrap().unwrap().seq, 1);
}

#[test]
fn the_file_stays_small_however_long_the_controller_is_away() {
    let dir = TempDir::new().unwrap();
    let limits = Limits { rewrite: 64 << 10, ..Limits::default() };
    let (mut spool, _) = Spool::open(dir.path(), limits).unwrap();
    let mut longest = 0;
    // Three hours of a second each, with fifty busy edges.
    for second in 0..10_000 {
        spool.take((1..=50).map(|port| (key(port), seen(1))), [stretch(second, second + 1, true)]).unwrap();
        longest = longest.max(std::fs::metadata(dir.path().join("spool")).unwrap().len());
    }
    assert!(longest <= 64 << 10, "{longest}");
    assert_eq!((spool.waiting(), spool.health.len()), (50, 1));
    drop(spool);
    let (spool, _) = Spool::open(dir.path(), limits).unwrap();
    assert_eq!(content(&spool), (1..=50).map(|port| (key(port), 10_000)).collect::<Vec<_>>());
    assert_eq!(spool.health[0].seconds(), 10_000);
}

#[test]
fn what_has_no_room_is_counted_and_told_with_the_next_stretch() {
    let dir = TempDir::new().unwrap();
    let (mut spool, _) = Spool::open(dir.path(), limits(3, 1000)).unwrap();
    spool.take((1..=10).map(|port| (key(port), seen(2))), []).unwrap();
    assert_eq!((spool.waiting(), spool.lost()), (3, 14));
    // An edge that is there already always has room.
    spool.take([(key(2), seen(1))], [stretch(0, 1, true)]).unwrap();
    assert_eq!(spool.lost(), 0);
    assert_eq!(spool.health[0], Health { lost: 14, healthy: false, ..stretch(0, 1, true) });
    spool.seal().unwrap().unwrap();
    spool.take([(key(10), seen(1))], [stretch(1, 2, true)]).unwrap();
    assert_eq!((spool.waiting(), spool.health[0].healthy), (1, true));
}

#[test]
fn stretches_without_room_are_joined_and_never_gain_observed_time() {
    let dir = TempDir::new().unwrap();
    let (mut spool, _) = Spool::open(dir.path(), Limits { stretches: 4, ..Limits::default() }).unwrap();
    for second in 0..100 {
        spool.take([], [stretch(second, second + 1, second % 2 == 0)]).unwrap();
    }
    assert_eq!(spool.health.len(), 4);
    assert_eq!(spool.health.iter().map(|h| h.events).sum::<u64>(), 100);
    assert!(spool.health.iter().filter(|h| h.healthy).map(Health::seconds).sum::<u64>() <= 50);
}

#[test]
fn a_batch_holds_no_more_than_it_may_and_the_rest_follows() {
    let dir = TempDir::new().unwrap();
    let (mut spool, _) = Spool::open(dir.path(), limits(1000, 10)).unwrap();
    spool.take((1..=25).map(|port| (key(port), seen(1))), []).unwrap();
    let sizes: Vec<_> = std::iter::from_fn(|| spool.seal().unwrap()).map(|batch| (batch.seq, batch.edges.len())).collect();
    assert_eq!(sizes, [(1, 10), (2, 10), (3, 5)]);
}

#[test]
fn a_spool_of_a_newer_version_is_refused_and_left_as_it_is() {
    let dir = TempDir::new().unwrap();
    let mut bytes = Vec::new();
    append(&mut bytes, HEAD, &[9, 0, 0, 0, 1]);
    let path = dir.path().join("spool");
    std::fs::write(&path, &bytes).unwrap();
    let error = Spool::open(dir.path(), Limits::default()).unwrap_err();
    assert!(matches!(error, SpoolError::Newer { found: 9, .. }), "{error}");
    assert!(error.to_string().contains("has format 9, this agent understands 1"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_record_nobody_knows_is_left_out_and_counted() {
    let dir = TempDir::new().unwrap();
    drop(open(&dir));
    let path = dir.path().join("spool");
    let mut bytes = std::fs::read(&path).unwrap();
    append(&mut bytes, 77, b"from the future");
    append(&mut bytes, DELTA, &wire::EdgeDelta { port: 70_000, ..wire::EdgeDelta::of(&key(1), &seen(1)) }.encode_to_vec());
    append(&mut bytes, DELTA, &wire::EdgeDelta::of(&key(2), &seen(1)).encode_to_vec());
    std::fs::write(&path, &bytes).unwrap();
    let (spool, recovery) = Spool::open(dir.path(), Limits::default()).unwrap();
    assert_eq!(content(&spool), [(key(2), 1)]);
    let reasons: Vec<_> = recovery.skipped.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
    assert_eq!(reasons, [("a record of an unknown kind", 1), ("port is out of range", 1)]);
}

#[derive(Clone, Debug)]
enum Step {
    Take(Vec<(u16, u64)>),
    Seal,
    Acknowledge(u64),
    Die,
}

fn some_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec((1..12_u16, 1..5_u64), 1..6).prop_map(Step::Take),
        2 => Just(Step::Seal),
        2 => (0..4_u64).prop_map(Step::Acknowledge),
        1 => Just(Step::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order, what the controller has and what is in the spool are together what was taken.
    #[test]
    fn nothing_is_lost_and_nothing_is_there_twice(steps in prop::collection::vec(some_step(), 1..40)) {
        let dir = TempDir::new().unwrap();
        let small = Limits { edges: 1000, batch: 3, stretches: 4, rewrite: 600 };
        let mut spool = Spool::open(dir.path(), small).unwrap().0;
        let (mut taken, mut delivered) = (FlowGraph::new(), FlowGraph::new());
        for step in steps {
            match step {
                Step::Take(deltas) => {
                    deltas.iter().for_each(|&(port, n)| { taken.add(&EdgeDelta { key: key(port), seen: seen(n) }); });
                    spool.take(deltas.into_iter().map(|(port, n)| (key(port), seen(n))), []).unwrap();
                }
                Step::Seal => { spool.seal().unwrap(); }
                Step::Acknowledge(more) => {
                    let to = spool.first_unsent() + more;
                    let got: Vec<_> = spool.batches().filter(|b| b.seq < to).flat_map(|b| b.edges.clone()).collect();
                    got.into_iter().for_each(|edge| { delivered.add(&edge.try_into().unwrap()); });
                    spool.acknowledged(to - 1).unwrap();
                }
                Step::Die => {
                    drop(spool);
                    spool = Spool::open(dir.path(), small).unwrap().0;
                }
            }
            let mut all = delivered.clone();
            content(&spool).into_iter().for_each(|(key, n)| { all.add(&EdgeDelta { key, seen: seen(n) }); });
            prop_assert_eq!(all.iter().collect::<Vec<_>>(), taken.iter().collect::<Vec<_>>());
        }
    }

    /// A cut or changed file: what is before the damage is kept, the rest is said and put aside, and the agent goes on.
    #[test]
    fn damage_costs_what_is_behind_it_and_is_said(records in 1..40_u16, at: prop::sample::Index, with in 0..=255_u8) {
        let dir = TempDir::new().unwrap();
        let mut spool = open(&dir);
        for port in 1..=records {
            spool.take([(key(port), seen(1))], []).unwrap();
        }
        let path = dir.path().join("spool");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        // 0: cut, else: changed.
        if with == 0 { bytes.truncate(at) } else { bytes[at] ^= with }
        std::fs::write(&path, &bytes).unwrap();
        let (mut spool, recovery) = Spool::open(dir.path(), Limits::default()).unwrap();
        let kept = u16::try_from(spool.waiting()).unwrap();
        prop_assert_eq!(content(&spool), (1..=kept).map(|port| (key(port), 1)).collect::<Vec<_>>());
        if with != 0 {
            prop_assert!(kept < records && recovery.unreadable > 0);
        }
        if recovery.unreadable > 0 {
            prop_assert_eq!(std::fs::read(recovery.kept.unwrap()).unwrap(), bytes);
        }
        spool.take([(key(999), seen(1))], []).unwrap();
        drop(spool);
        let (spool, recovery) = Spool::open(dir.path(), Limits::default()).unwrap();
        prop_assert_eq!(recovery.unreadable, 0);
        prop_assert_eq!(spool.waiting(), usize::from(kept) + 1);
    }
}
