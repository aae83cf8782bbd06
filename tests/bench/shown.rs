//! What a person waits for at the command line.

use crate::desk::Desk;
use crate::figures::{Samples, Table, grouped, time};
use crate::world;

pub(crate) fn run(short: bool) {
    let (edges, rounds) = if short { (1_000, 5) } else { (10_000, 50) };
    let desk = Desk::new();
    desk.fill(&world::edges(edges, edges / 100));
    let (controller, _) = desk.start();
    let mut table = Table::new(&["command", "edges", "output", "median", "p99"]);
    for words in ["--version", "--help", "status", "graph", "graph -o json", "get suggestions", "describe suggestion project-0/service-0"] {
        let mut took = Samples::default();
        let mut printed = 0;
        for _ in 0..rounds {
            let (seconds, bytes) = desk.time(words);
            took.push(seconds);
            printed = bytes;
        }
        let cells =
            [grouped(edges as f64), format!("{} bytes", grouped(printed as f64)), time(took.median().value), time(took.quantile(0.99))];
        table.row(std::iter::once(format!("bulkhead {words}")).chain(cells));
    }
    drop(controller);
    table.print();
}
