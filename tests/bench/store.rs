//! The controller's store, and the controller that starts with it.

use std::time::{Duration, Instant};

use controller::store::Store;
use policy::HourSet;

use crate::desk::{BATCH, Desk, batch};
use crate::figures::{Samples, Table, grouped, time};
use crate::process::{megabytes, used};
use crate::world;

/// How often the rate of updates is measured, and how many batches each time.
const ROUNDS: usize = 5;
const BATCHES: usize = 40;

pub(crate) fn run(short: bool) {
    let sizes: &[usize] = if short { &[10_000] } else { &[100_000, 1_000_000] };
    let mut table = Table::new(&[
        "edges",
        "first written",
        "updates a second, worst of 5",
        "CPU an update",
        "file with its log",
        "opened and read",
        "controller answers",
        "its CPU until then",
        "lists all suggestions",
        "its memory then",
        "its peak",
    ]);
    for &size in sizes {
        let mut edges = world::edges(size, (size / 100).max(100));
        let desk = Desk::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (mut written, mut rates, mut each, mut bytes, mut read) = (0.0, Samples::default(), 0.0, 0.0, 0.0);
        runtime.block_on(async {
            let store = Store::open(&desk.store(), crate::stage::now()).await.expect("a store");
            let mut seq = 0;
            let begun = Instant::now();
            for piece in edges.chunks(BATCH) {
                seq += 1;
                store.apply_batch(&batch(seq, piece)).await.expect("room");
            }
            written = size as f64 / begun.elapsed().as_secs_f64();
            // Later: another hour, edges from all over.
            for edge in &mut edges {
                edge.seen.hours = HourSet::from_runs(edge.seen.hours.runs().iter().map(|&(first, last)| (first + 3, last + 3)));
            }
            let mut busy = Duration::ZERO;
            for round in 0..ROUNDS {
                let draw = |n| edges[(world::random(n, 5 + round as u64) * edges.len() as f64) as usize].clone();
                let drawn: Vec<Vec<_>> = (0..BATCHES).map(|b| (0..BATCH).map(|n| draw(b * BATCH + n)).collect()).collect();
                let (begun, used_before) = (Instant::now(), used(std::process::id()).cpu);
                for piece in &drawn {
                    seq += 1;
                    store.apply_batch(&batch(seq, piece)).await.expect("room");
                }
                rates.push((BATCHES * BATCH) as f64 / begun.elapsed().as_secs_f64());
                busy += used(std::process::id()).cpu - used_before;
            }
            each = busy.as_secs_f64() / (ROUNDS * BATCHES * BATCH) as f64;
            for suffix in ["", "-wal"] {
                let file = format!("{}{suffix}", desk.store().display());
                bytes += std::fs::metadata(file).map_or(0.0, |data| data.len() as f64);
            }
            store.close().await;
            // The file is one process's, and one value's.
            drop(store);
            let begun = Instant::now();
            let store = Store::open(&desk.store(), crate::stage::now()).await.expect("a store");
            let graph = store.load_graph().await.expect("a graph");
            read = begun.elapsed().as_secs_f64();
            assert_eq!(graph.len(), size);
            store.close().await;
        });
        let (controller, answered) = desk.start();
        let now = used(controller.pid());
        let begun = Instant::now();
        assert!(desk.answers("suggestions"), "the controller ended");
        let listed = answered + begun.elapsed();
        table.row([
            grouped(size as f64),
            format!("{} edges/s", grouped(written)),
            grouped(rates.quantile(0.0)),
            time(each),
            megabytes(bytes),
            time(read),
            time(answered.as_secs_f64()),
            time(now.cpu.as_secs_f64()),
            time(listed.as_secs_f64()),
            megabytes(now.resident),
            megabytes(used(controller.pid()).peak),
        ]);
    }
    table.print();
}
