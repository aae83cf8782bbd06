//! Few runs of many: what has to be read at a start, and the room it takes, grow with the edges and not with the reports.
//!
//! # Why beside the batches
//! A run never changes, so several can be merged while new ones come. Only reading them and putting the new one in their place, in one
//! transaction, need the connection; a batch waits for no more than that. A process that dies in between leaves the runs as they were.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use sqlx::{Connection, Row as _, SqliteConnection};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::edges::{unreadable, write_run};
use super::run::{self, Run};
use super::{Store, StoreError};

/// Runs of one node that may wait: as many again are read with each start, a few KB each.
const FEW: usize = 16;

/// What is merged at once at most, bytes: memory is needed for twice as much, and SQLite holds values up to 1 GB (sqlite.org/limits.html).
/// Some ten million edges; what is beyond it stays in more than one run.
const MOST: u64 = 256 << 20;

/// A run that is in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) id: i64,
    pub(super) node: i64,
    pub(super) bytes: u64,
}

/// Which runs there are, and who merges some.
#[derive(Debug, Default)]
pub(super) struct Tidy(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    kept: Vec<Kept>,
    /// One at a time.
    at_work: Option<JoinHandle<()>>,
    /// After a failure: not before there are so many.
    wait_for: usize,
}

/// Which runs of a node are merged now: the longest row of the smallest of which the largest is no larger than the others together. An
/// edge that is written anew is so in a value of twice the size, so that it is rewritten a few times and not with each batch; what is
/// left is a few runs, each larger than all smaller ones together.
fn chosen(kept: &[Kept], node: i64) -> Vec<Kept> {
    let mut runs: Vec<Kept> = kept.iter().filter(|run| run.node == node).copied().collect();
    if runs.len() < FEW {
        return Vec::new();
    }
    runs.sort_unstable_by_key(|run| (run.bytes, run.id));
    let (mut sum, mut most) = (0, 0);
    for (at, run) in runs.iter().enumerate() {
        if sum + run.bytes > MOST {
            break;
        }
        if at > 0 && run.bytes <= sum {
            most = at + 1;
        }
        sum += run.bytes;
    }
    runs.truncate(most);
    runs
}

impl Tidy {
    /// What is in the store when it is opened.
    pub(super) fn of(kept: Vec<Kept>) -> Self {
        Self(Mutex::new(State { kept, ..State::default() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // What a panic left is a list of runs all the same.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Notes a run that was committed, and begins to merge its node's if they are many.
    pub(super) fn tidy(&self, new: Kept) {
        let mut state = self.inner.tidy.state();
        state.kept.push(new);
        if state.kept.len() < state.wait_for || state.at_work.as_ref().is_some_and(|work| !work.is_finished()) {
            return;
        }
        let runs = chosen(&state.kept, new.node);
        if !runs.is_empty() {
            let store = self.clone();
            state.at_work = Some(tokio::spawn(async move { store.merge(runs).await }));
        }
    }

    /// Waits until nothing is merged.
    pub(super) async fn tidied(&self) {
        let work = self.inner.tidy.state().at_work.take();
        if let Some(work) = work
            && let Err(error) = work.await
        {
            warn!(%error, "merging what was seen ended");
        }
    }

    /// Merges these, and then what became many meanwhile.
    async fn merge(&self, mut runs: Vec<Kept>) {
        while !runs.is_empty() {
            let outcome = self.merged(&runs).await;
            let mut state = self.inner.tidy.state();
            match outcome {
                Ok(new) => {
                    state.kept.retain(|kept| !runs.contains(kept));
                    state.kept.push(new);
                    state.wait_for = 0;
                    debug!(runs = runs.len(), bytes = new.bytes, "what was seen is in fewer runs");
                    let nodes: BTreeSet<i64> = state.kept.iter().map(|kept| kept.node).collect();
                    let due = nodes.into_iter().map(|node| chosen(&state.kept, node)).find(|runs| !runs.is_empty());
                    runs = due.unwrap_or_default();
                }
                Err(error) => {
                    state.wait_for = state.kept.len() + FEW;
                    warn!(error = crate::hub::chain(&error), "cannot merge what was seen; it is kept as it came, and tried again later");
                    return;
                }
            }
        }
    }

    async fn merged(&self, kept: &[Kept]) -> Result<Kept, StoreError> {
        let mut connection = self.writer("merge what was seen").await?;
        let outcome = read(&mut connection, kept).await;
        let runs = self.settle(connection, outcome).await?;
        let (first, node) = kept.first().map_or((0, 0), |first| (first.id, first.node));
        let merge = move || run::merge(node, &runs).map_err(|e| unreadable(first, e));
        let merged = match tokio::task::spawn_blocking(merge).await {
            Ok(merged) => merged?,
            Err(ended) => return Err(unreadable(first, ended)),
        };
        let mut connection = self.writer("merge what was seen").await?;
        let outcome = replace(&mut connection, kept, &merged).await.map_err(StoreError::database("merge what was seen"));
        self.settle(connection, outcome).await
    }
}

/// What is there, to begin with.
pub(super) async fn all(connection: &mut SqliteConnection) -> Result<Vec<Kept>, sqlx::Error> {
    let rows = sqlx::query("SELECT id, node, LENGTH(packed) FROM runs").fetch_all(connection).await?;
    let kept = |row: &sqlx::sqlite::SqliteRow| {
        Ok(Kept { id: row.try_get(0)?, node: row.try_get(1)?, bytes: row.try_get::<i64, _>(2)?.unsigned_abs() })
    };
    rows.iter().map(kept).collect()
}

async fn read(connection: &mut SqliteConnection, kept: &[Kept]) -> Result<Vec<Run>, StoreError> {
    let fail = || StoreError::database("merge what was seen");
    let mut runs = Vec::with_capacity(kept.len());
    for Kept { id, node, .. } in kept {
        let row = sqlx::query("SELECT edges, packed FROM runs WHERE id = $1").bind(id).fetch_one(&mut *connection).await.map_err(fail())?;
        runs.push(Run { node: *node, edges: row.try_get(0).map_err(fail())?, packed: row.try_get(1).map_err(fail())? });
    }
    Ok(runs)
}

async fn replace(connection: &mut SqliteConnection, kept: &[Kept], merged: &Run) -> Result<Kept, sqlx::Error> {
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    for Kept { id, .. } in kept {
        sqlx::query("DELETE FROM runs WHERE id = $1").bind(id).execute(&mut *tx).await?;
    }
    let new = write_run(&mut tx, merged).await?;
    tx.commit().await?;
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sizes: &[u64]) -> Vec<Kept> {
        sizes.iter().zip(1..).map(|(&bytes, id)| Kept { id, node: 1, bytes }).collect()
    }

    /// What is left of sizes that come one after the other, when merging makes nothing smaller; how many bytes were written for each.
    fn after(batches: usize, size: u64) -> (Vec<u64>, f64) {
        let (mut sizes, mut written) = (Vec::new(), 0);
        for _ in 0..batches {
            sizes.push(size);
            let merged = chosen(&kept(&sizes), 1);
            if !merged.is_empty() {
                sizes = kept(&sizes).into_iter().filter(|run| !merged.contains(run)).map(|run| run.bytes).collect();
                sizes.push(merged.iter().map(|run| run.bytes).sum());
                written += sizes.last().unwrap();
            }
        }
        (sizes, written as f64 / (batches as u64 * size) as f64)
    }

    #[test]
    fn few_runs_are_left_as_they_are() {
        assert_eq!(chosen(&kept(&[7; FEW - 1]), 1), []);
        assert_eq!(chosen(&kept(&[7; FEW]), 1).len(), FEW);
        assert_eq!(chosen(&kept(&[7; FEW]), 2), []);
    }

    #[test]
    fn a_large_run_waits_until_the_others_are_as_large_together() {
        let mut sizes = vec![10; FEW];
        sizes.push(1000);
        assert_eq!(chosen(&kept(&sizes), 1).len(), FEW);
        sizes.push(840);
        assert_eq!(chosen(&kept(&sizes), 1).len(), FEW + 2);
    }

    #[test]
    fn what_is_too_large_for_one_value_stays_where_it_is() {
        let mut sizes = vec![10; FEW];
        sizes.extend([MOST - 1000, MOST - 1000]);
        assert_eq!(chosen(&kept(&sizes), 1).len(), FEW);
    }

    #[test]
    fn however_many_batches_come_runs_are_few_and_each_edge_is_rewritten_a_few_times() {
        for batches in [100, 1000, 100_000] {
            let (sizes, rewritten) = after(batches, 100);
            assert!(sizes.len() <= FEW, "{batches}: {sizes:?}");
            assert!(rewritten < 1.5 * (batches as f64).log2(), "{batches}: {rewritten}");
        }
    }
}
