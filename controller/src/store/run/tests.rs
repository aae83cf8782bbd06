use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn some_edge() -> impl Strategy<Value = (Row, Evidence)> {
    let row = (0..5_i64, 0..5_i64, prop_oneof![Just(6), Just(17), any::<u8>()], prop_oneof![1..4_u16, any::<u16>()], any::<bool>());
    let row = row.prop_map(|(client, server, protocol, port, direction_known)| Row { client, server, protocol, port, direction_known });
    let road = prop::collection::btree_set(prop_oneof![Just(Road::Direct), Just(Road::Published), Just(Road::Proxy)], 0..3);
    let count = prop_oneof![Just(0), 1..1000_u64, any::<u64>()];
    let time = prop::option::of(prop_oneof![
        1_790_000_000_000_000..1_790_000_001_000_000_i64,
        -377_705_023_201_000_000_i64..253_402_207_200_000_000
    ]);
    let hours = prop::collection::vec((prop_oneof![490_000..490_200_u32, any::<u32>()], 0..9_u32), 0..4);
    let seen = (prop::array::uniform10(count), time.clone(), time, hours, road).prop_map(|(n, first, last, hours, roads)| {
        let mut seen = Evidence::default();
        counts(&mut seen).into_iter().zip(n).for_each(|(count, n)| *count = n);
        (seen.first, seen.last) = (first.map(at), last.map(at));
        seen.hours = HourSet::from_runs(hours.into_iter().map(|(first, length)| (first, first.saturating_add(length))));
        seen.roads = roads.into_iter().collect();
        seen
    });
    (row, seen)
}

fn at(us: i64) -> Timestamp {
    Timestamp::from_microsecond(us).unwrap()
}

fn packed(edges: &[(Row, Evidence)]) -> Run {
    pack(3, edges.iter().map(|(row, seen)| (*row, seen)).collect())
}

fn unpacked(run: &Run) -> Result<Vec<(Row, Evidence)>, Broken> {
    read(run.node, run.edges, &run.packed)?.collect()
}

fn summed<'a>(edges: impl IntoIterator<Item = &'a (Row, Evidence)>) -> Vec<(Row, Evidence)> {
    let mut sum: BTreeMap<Row, Evidence> = BTreeMap::new();
    edges.into_iter().for_each(|(row, seen)| sum.entry(*row).or_default().merge(seen));
    sum.into_iter().collect()
}

/// With a checksum that fits, whatever it is.
fn sealed(edges: i64, body: &[u8]) -> Run {
    Run { node: 3, edges, packed: [body, &checksum(3, edges, body)].concat() }
}

proptest! {
    #[test]
    fn what_is_packed_reads_back_in_order_and_merged(edges in prop::collection::vec(some_edge(), 0..60)) {
        prop_assert_eq!(unpacked(&packed(&edges)), Ok(summed(&edges)));
    }

    #[test]
    fn merged_runs_hold_what_they_held_in_whatever_order_they_come(
        mut parts in prop::collection::vec(prop::collection::vec(some_edge(), 0..30), 1..6),
    ) {
        let of = |parts: &[Vec<_>]| merge(3, &parts.iter().map(|part| packed(part)).collect::<Vec<_>>()).unwrap();
        let merged = of(&parts);
        prop_assert_eq!(unpacked(&merged), Ok(summed(parts.iter().flatten())));
        parts.reverse();
        prop_assert_eq!(of(&parts), merged);
    }

    #[test]
    fn whatever_is_not_a_run_is_an_error_and_no_panic(edges in 0..5_i64, body in prop::collection::vec(any::<u8>(), 0..60)) {
        if let Ok(read) = unpacked(&sealed(edges, &body)) {
            prop_assert_eq!(read.len() as i64, edges);
        }
    }
}

fn one() -> Run {
    let row = Row { client: 1, server: 2, protocol: 6, port: 5432, direction_known: true };
    let seen =
        Evidence { established: 3, first: Some(at(5)), last: Some(at(9)), hours: HourSet::from_runs([(4, 6)]), ..Evidence::default() };
    packed(&[(row, seen.clone()), (Row { server: 7, ..row }, seen)])
}

#[test]
fn a_changed_bit_anywhere_is_found() {
    let run = one();
    for bit in 0..run.packed.len() * 8 {
        let mut changed = Run { packed: run.packed.clone(), ..run };
        changed.packed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(unpacked(&changed), Err(Broken::Checksum), "bit {bit}");
    }
    assert_eq!(unpacked(&Run { node: 4, ..one() }), Err(Broken::Checksum));
    assert_eq!(unpacked(&Run { edges: 1, ..one() }), Err(Broken::Checksum));
}

#[test]
fn a_cut_run_is_not_read() {
    let run = one();
    for cut in 0..run.packed.len() {
        let found = unpacked(&Run { packed: run.packed[..cut].to_vec(), ..run });
        assert!(matches!(found, Err(Broken::Checksum | Broken::Cut)), "cut to {cut}: {found:?}");
    }
}

#[test]
fn what_a_later_version_may_write_is_refused_and_not_guessed() {
    let body = &one().packed[..one().packed.len() - 4];
    assert_eq!(unpacked(&sealed(2, body)).map(|edges| edges.len()), Ok(2));
    for (name, edges, body, why) in [
        ("an edge more than it says", 1, body.to_vec(), Broken::Count),
        ("an edge less than it says", 3, body.to_vec(), Broken::Cut),
        ("a flag above the roads", 1, vec![1, 2, 6, 80, 0x80, 0x80, 0x04, 0], Broken::Flags),
        ("a protocol of two bytes", 1, vec![1, 2, 0x80, 2, 80, 0, 0], Broken::TooLarge),
        ("hours beyond the last", 1, vec![1, 2, 6, 80, 0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, 1], Broken::Hours),
    ] {
        assert_eq!(unpacked(&sealed(edges, &body)), Err(why), "{name}");
    }
}
