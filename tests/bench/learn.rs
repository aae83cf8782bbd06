//! Learning from a large graph: all of it, and what one more edge asks for. Time of one thread on a processor, but where all cores
//! are used.

use std::hint::black_box;
use std::time::Instant;

use policy::learn::{Context, Halves, Kept, Learner};
use policy::review::{self, Choice, Reading};
use policy::suggestion::Severity;
use policy::{FlowGraph, PolicySet, Workload};

use crate::figures::{Samples, Table, grouped, time};
use crate::process::{forget_peak, megabytes, on_cpu, used};
use crate::world;

/// The largest workload's suggestion approved whole, and what comes after it.
fn approved(graph: &FlowGraph, context: &Context, largest: &Workload) -> [String; 7] {
    let timed = |work: &mut dyn FnMut()| {
        let begun = on_cpu();
        work();
        time(on_cpu() - begun)
    };
    let suggestion = Learner::new(graph, context, &Halves::of(context)).suggest(largest);
    let blocking = suggestion.findings.iter().filter(|finding| finding.severity == Severity::Blocking);
    let accept = blocking.map(|finding| finding.code.clone()).collect();
    let reading = Reading { digest: suggestion.digest.clone(), choice: Choice::Whole, accept };
    let mut set = PolicySet::default();
    let approve = timed(&mut || set = review::approve(&set, &suggestion, &reading).expect("read as it is").set);
    let context = Context { policies: set.policies.clone(), ..context.clone() };
    let mut halves = Halves::default();
    let half = timed(&mut || halves = Halves::of(&context));
    let mut parts = None;
    let learned = timed(&mut || parts = Learner::new(graph, &context, &halves).renew(largest, None).1);
    let mut kept = Kept::new();
    let mut more = Samples::default();
    for key in suggestion.rules.iter().flat_map(|rule| rule.edges.first()).step_by(97) {
        parts.take().into_iter().for_each(|parts| kept.put(largest.clone(), parts));
        let begun = on_cpu();
        kept.note(graph, [key]);
        let (outline, renewed) = Learner::new(graph, &context, &halves).renew(largest, kept.take(largest));
        more.push(on_cpu() - begun);
        black_box(outline);
        parts = renewed;
    }
    let beside = timed(&mut || drop(black_box(policy::diff::suggestion(&suggestion, &set, context.now))));
    let (median, slow) = (time(more.median().value), time(more.quantile(0.99)));
    [grouped(suggestion.rules.len() as f64), approve, half, learned, median, slow, beside]
}

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
    let mut with_policy = Table::new(&[
        "rules",
        "approve all",
        "which are half approved",
        "learned again, one thread",
        "one edge more (median)",
        "p99",
        "beside what is in force",
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
        drop(by_all_cores);
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
        let rules = outlines.iter().max_by_key(|outline| outline.rules).map(|outline| outline.workload.clone());
        with_policy.row(approved(&graph, &context, &rules.expect("somebody talks")));
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
    println!("\nThe workload with the most rules, all of them approved:\n");
    with_policy.print();
}
