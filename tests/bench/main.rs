//! What Bulkhead costs, as figures:  `tests/bench/run [NAME...] [--short]`
//!
//! Each measures side by side, in one run, what Bulkhead costs and what a user would have otherwise. Programs, not tests: they print
//! tables and judge nothing. Everything runs in network namespaces made here.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::type_complexity,
    reason = "a benchmark: it prints, its tables are literal, and what it cannot do ends it"
)]

use std::io::IsTerminal;
use std::time::Duration;

mod agent;
#[path = "../chaos/api.rs"]
#[allow(dead_code, reason = "made for the suite, which uses all of it")]
mod api;
mod change;
mod churn;
mod core;
mod cut;
mod desk;
mod events;
mod figures;
mod follow;
mod join;
mod learn;
mod nsid;
mod parts;
mod plane;
mod process;
mod shortcut;
mod shown;
#[path = "../enforce/stage.rs"]
#[allow(dead_code, reason = "made for the suite, which uses all of it")]
mod stage;
mod station;
mod store;
mod told;
mod told_of;
mod traffic;
mod watcher;
mod world;

/// A bar on a terminal, nothing elsewhere.
pub(crate) fn progress(steps: u64) -> indicatif::ProgressBar {
    if std::io::stderr().is_terminal() { indicatif::ProgressBar::new(steps) } else { indicatif::ProgressBar::hidden() }
}

/// Name, what it measures, how.
const FIGURES: [(&str, &str, fn(bool)); 14] = [
    ("plane", "throughput, connect rate, latency and packets between two containers", |short| {
        plane::run(&plane::Effort { rounds: if short { 6 } else { 24 }, window: Duration::from_millis(if short { 100 } else { 300 }) });
    }),
    ("parts", "what the data plane's cost is made of, and what would be faster", parts::run),
    ("change", "a ruleset of 100,000 pairs in the kernel: full replace, one rule more and less", change::run),
    ("join", "a container joins an enforced network: until it is bound, first packets lost, what would avoid that", join::run),
    ("cut", "a quarantine and one rule more, from the command to where it holds, beside how much else is in force", cut::run),
    ("core", "one evaluate against many rules", core::run),
    ("learn", "suggestions from a large graph: all of them, and after one edge more", learn::run),
    ("store", "the controller's store: size, rate of updates, start-up", store::run),
    ("events", "conntrack's events: bursts, what the workloads feel, a reader that is away", events::run),
    ("follow", "what an event costs of ours, part by part, without the kernel", follow::run),
    ("agent", "the agent's program: memory, from an answer on the wire into the controller's store", agent::run),
    ("idle", "the agent's program while nothing happens", agent::run_idle),
    ("churn", "thousands of containers come and go under Enforce: what stays behind", churn::run),
    ("shown", "the command line: start-up, the graph", shown::run),
];

fn main() {
    if std::env::args().nth(1).as_deref() == Some(watcher::ROLE) {
        return watcher::be_one();
    }
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let short = words.iter().any(|word| word == "--short");
    let wanted: Vec<&String> = words.iter().filter(|word| !word.starts_with("--")).collect();
    if let Some(unknown) = wanted.iter().find(|name| FIGURES.iter().all(|(known, ..)| *known != name.as_str())) {
        eprintln!("no figure is called {unknown}; there are:");
        for (name, what, _) in FIGURES {
            eprintln!("  {name:<8} {what}");
        }
        std::process::exit(2);
    }
    if let Some(reason) = lab::process::lacks_root() {
        eprintln!("{reason}");
        std::process::exit(1);
    }
    for (name, what, run) in FIGURES {
        if wanted.is_empty() || wanted.iter().any(|wanted| *wanted == name) {
            println!("## {name}: {what}\n");
            run(short);
        }
    }
}
