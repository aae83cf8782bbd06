//! Learning from a large graph: all of it, and what one more edge asks for. Time of one thread on a processor, but where all cores
//! are used.

use std::hint::black_box;
use std::time::Instant;

use policy::FlowGraph;
use policy::learn::{Context, Halves, Kept, Learner};

use crate::figures::{Samples, Table, grouped, time};
use crate::process::{forget_peak, megabytes, on_cpu, used};
use crate::world;

pub(crate) fn run(short: bool) {
    let mut table = Table::new(&[
        "workloads",
        "edges",
        "memory of the graph",
        "learn all, one thread",
        "as the controller does",
        "peak of both",
        "every suggestion in full",
        "one edge more (median)",
        "p99",
        "the largest",
    ]);
    let sizes: &[(usize, usize)] = if short { &[(1_000, 10_000)] } else { &[(1_000, 100_000), (10_000, 1_000_000)] };
    let memory = || used(std::process::id());
    for &(workloads, edges) in sizes {
        let before = memory().resident;
        let mut graph = FlowGraph::new();
        let mut n = 0;
        while graph.len() < edges {
            graph.add(&world::edge(n, workloads));
            n += 1;
        }
        let held = memory().resident - before;
        let context = Context { now: crate::stage::now(), ..Context::default() };
        let halves = Halves::of(&context);
        forget_peak();
        let begun = on_cpu();
        let learner = Learner::new(&graph, &context, &halves);
        let mut kept = Kept::new();
        let mut outline = |workload| {
            let (outline, parts) = learner.renew(workload, None);
            parts.into_iter().for_each(|parts| kept.put(workload.clone(), parts));
            outline
        };
        let outlines: Vec<_> = learner.workloads().into_iter().map(&mut outline).collect();
        let took = on_cpu() - begun;
        let peak = memory().peak - before;
        let all: Vec<_> = learner.workloads().into_iter().collect();
        let begun = Instant::now();
        let by_all_cores = controller::hub::outlines(learner, &all, &mut Kept::new());
        let together = begun.elapsed().as_secs_f64();
        assert_eq!(by_all_cores.len(), outlines.len());
        drop((black_box(outlines), by_all_cores));
        let begun = on_cpu();
        learner.workloads().into_iter().for_each(|workload| drop(black_box(learner.suggest(workload))));
        let full = on_cpu() - begun;
        let mut again = Samples::default();
        for more in 0..if short { 10 } else { 500 } {
            let delta = world::edge(n + more, workloads);
            let begun = on_cpu();
            graph.add(&delta);
            for workload in kept.note(&graph, [&delta.key]) {
                let (outline, parts) = Learner::new(&graph, &context, &halves).renew(&workload, kept.take(&workload));
                parts.into_iter().for_each(|parts| kept.put(workload.clone(), parts));
                black_box(outline);
            }
            again.push(on_cpu() - begun);
        }
        table.row([
            grouped(workloads as f64),
            grouped(edges as f64),
            megabytes(held),
            time(took),
            time(together),
            megabytes(peak),
            time(full),
            time(again.median().value),
            time(again.quantile(0.99)),
            time(again.quantile(1.0)),
        ]);
    }
    table.print();
}
