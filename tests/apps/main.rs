//! Whole applications, as their authors wrote their Compose files, with small programs that make the same calls on the same
//! ports: what is proposed between their workloads must be exactly what their authors meant, whatever else goes on around.
//!
//! Needs root, an engine, Compose, and the applications (`BULKHEAD_ORACLES`, else `../shared/oracles` beside the sources).

#![allow(clippy::unwrap_used, reason = "unwrap is for tests")]

mod oracle;
mod robot;
mod voting;

use std::path::Path;
use std::time::Duration;

use lab::{Compose, Engine, limit, needs_engine};

fn tell(app: &str, story: fn(&Engine, &Path)) {
    let Some(folder) = oracle::folder(app) else {
        lab::skip!("needs the applications: set BULKHEAD_ORACLES to their folder");
    };
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    if let Err(reason) = Compose::new(&engine, app, &[]) {
        lab::skip!("{reason}");
    }
    story(&engine, &folder);
}

#[test]
fn the_voting_app_is_proposed_exactly_as_its_authors_meant_it() {
    tell("voting-app", voting::story);
}

#[test]
fn the_robot_shop_is_proposed_exactly_as_its_authors_meant_it() {
    tell("robot-shop", robot::story);
}
