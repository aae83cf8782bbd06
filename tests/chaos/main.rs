//! What has to hold at any instant, tried on a real engine: the first packets of many containers, and random kills and
//! administrators while allowed and forbidden traffic goes on.
//!
//! `tests/chaos/run` runs them long: `--starts N`, `--minutes N`, `--seed S`. In the suite they are short. Needs root and an engine.

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod api;
mod clock;
mod deeds;
mod faults;
mod starts;
mod storm;
mod traffic;

/// A number from the environment, as `tests/chaos/run` passes its flags.
fn asked(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: a number")))
}

/// Adds a line to the file that somebody asked for.
fn report(text: &str) {
    if let Ok(path) = std::env::var("BULKHEAD_CHAOS_REPORT") {
        let mut file = std::fs::File::options().create(true).append(true).open(path).expect("the report can be written");
        std::io::Write::write_all(&mut file, format!("{text}\n").as_bytes()).expect("the report can be written");
    }
}
