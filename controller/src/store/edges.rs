//! What was seen: batches in, exactly once, and the graph out.
//!
//! # Why runs and not a row an edge
//! A row an edge was read, merged and written back for each report: of a million edges nearly each report is on a page of its own, 24 us
//! of a core and 4 KB of log, and a start read a million rows of 20 columns, 8 s. So a batch is one value, written as it came. Merging
//! is [`Evidence::merge`](policy::Evidence::merge)'s, which asks neither for order nor for an earlier state, and is done when the graph
//! is loaded. So that a start does not read all that ever came, `tidy` makes few runs of many.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use jiff::Timestamp;
use policy::{EdgeDelta, Endpoint, Health};
use sqlx::{Connection, Row as _, Sqlite, SqliteConnection, Transaction};

use super::run::{self, Row, Run};
use super::tidy::Kept;
use super::{Store, StoreError, from_db, to_db};
use crate::session::BatchIn;

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// It is committed now.
    Applied {
        /// What is recorded beside it where batches before it never arrived although the agent had been told to forget them (this store
        /// lost its tail): they count as lost, and the stretch as not observed.
        gap: Option<Health>,
    },
    /// It was committed before: nothing was changed.
    Already,
}

/// Numbers of names that are in the store, so that they need not be looked up for each batch. Only what is committed is in here.
#[derive(Debug, Default)]
pub(super) struct Names {
    nodes: HashMap<String, i64>,
    endpoints: HashMap<Endpoint, i64>,
}

/// Some 20 MB of names; beyond that they are looked up again.
const NAMES: usize = 200_000;

/// Names to a statement. Few sizes, so that the prepared statements are few; the largest stays far below SQLite's 32,766 parameters.
const CHUNKS: [usize; 3] = [100, 10, 1];

struct Statements {
    names: usize,
    find: &'static str,
    add: &'static str,
}

static STATEMENTS: LazyLock<[Statements; CHUNKS.len()]> = LazyLock::new(|| CHUNKS.map(Statements::of));

impl Statements {
    /// Made once for each size, hence leaked. The parameters have no numbers: to SQLite `$7` is a name, and it looks each one up by walking
    /// along all of them. (PostgreSQL wants numbers: this is the place to write them.)
    fn of(names: usize) -> Self {
        let find = format!("SELECT id, name FROM endpoints WHERE name IN ({})", vec!["?"; names].join(", "));
        let add = format!("INSERT INTO endpoints (name) VALUES {} RETURNING id, name", vec!["(?)"; names].join(", "));
        Self { names, find: find.leak(), add: add.leak() }
    }
}

/// Cuts a list into pieces for which there is a statement.
fn pieces<T>(mut rest: &[T]) -> impl Iterator<Item = (&'static Statements, &[T])> {
    std::iter::from_fn(move || {
        let statements = STATEMENTS.iter().find(|s| s.names <= rest.len())?;
        let (piece, after) = rest.split_at(statements.names);
        rest = after;
        Some((statements, piece))
    })
}

impl Store {
    /// Writes one batch, exactly once: a batch that is in the store already changes nothing. When this returns, it is committed.
    ///
    /// # Errors
    /// The database says no (disk full, file locked), or a batch before it is not in the store: nothing of the batch is in the store then.
    pub async fn apply_batch(&self, batch: &BatchIn) -> Result<BatchOutcome, StoreError> {
        let mut names = self.inner.names.lock().await;
        let mut connection = self.writer("take a batch").await?;
        let outcome = apply(&mut connection, &mut names, batch).await;
        let (outcome, kept) = self.settle(connection, outcome).await?;
        if let Some(kept) = kept {
            self.tidy(kept);
        }
        Ok(outcome)
    }

    /// Highest sequence number of a spool that is in the store; 0: none.
    ///
    /// # Errors
    /// The database says no.
    pub async fn acknowledged(&self, node: &str, spool: &str) -> Result<u64, StoreError> {
        let found: Option<i64> =
            sqlx::query_scalar("SELECT acknowledged FROM spools WHERE node = (SELECT id FROM nodes WHERE name = $1) AND spool = $2")
                .bind(node)
                .bind(spool)
                .fetch_optional(&self.inner.pool)
                .await
                .map_err(StoreError::database("read what is acknowledged"))?;
        from_db("spool", spool, found.unwrap_or(0))
    }

    /// What could not be read in the reports of each node, by reason.
    ///
    /// # Errors
    /// The database says no.
    pub async fn load_skipped(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, StoreError> {
        let fail = || StoreError::database("read what was skipped");
        let rows = sqlx::query("SELECT n.name, s.reason, s.count FROM skipped AS s JOIN nodes AS n ON n.id = s.node")
            .fetch_all(&self.inner.pool)
            .await
            .map_err(fail())?;
        let mut skipped: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for row in rows {
            let (node, reason): (String, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
            let count = from_db("count", &reason, row.try_get(2).map_err(fail())?)?;
            skipped.entry(node).or_default().insert(reason, count);
        }
        Ok(skipped)
    }
}

/// A run that cannot be read.
pub(super) fn unreadable(id: i64, why: impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable { kind: "run of edges", name: id.to_string(), why: why.to_string() }
}

async fn apply(connection: &mut SqliteConnection, names: &mut Names, batch: &BatchIn) -> Result<(BatchOutcome, Option<Kept>), StoreError> {
    let fail = || StoreError::database("take a batch");
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(fail())?;
    let known_node = names.nodes.get(&batch.node).copied();
    let node = match known_node {
        Some(id) => id,
        None => node_id(&mut tx, &batch.node).await.map_err(fail())?,
    };
    let acknowledged: i64 = sqlx::query_scalar("SELECT acknowledged FROM spools WHERE node = $1 AND spool = $2")
        .bind(node)
        .bind(&batch.spool)
        .fetch_optional(&mut *tx)
        .await
        .map_err(fail())?
        .unwrap_or(0);
    let acknowledged = from_db("spool", &batch.spool, acknowledged)?;
    if batch.seq <= acknowledged {
        return Ok((BatchOutcome::Already, None));
    }
    let expected = acknowledged + 1;
    // An acknowledgement means "and all before". So a gap is taken only where the agent said that it has nothing from before it.
    if batch.seq != expected && batch.seq != batch.first {
        return Err(StoreError::OutOfOrder { expected, found: batch.seq });
    }
    // A spool that this store never heard of may begin anywhere: what was before went to another store.
    let missing = if acknowledged == 0 { 0 } else { batch.seq - expected };

    let fresh = endpoint_ids(&mut tx, &names.endpoints, &batch.edges).await?;
    let kept = if batch.edges.is_empty() {
        None
    } else {
        let id = |endpoint: &Endpoint| {
            let id = names.endpoints.get(endpoint).or_else(|| fresh.get(endpoint)).copied();
            id.ok_or_else(|| StoreError::Unreadable { kind: "endpoint", name: endpoint.to_string(), why: "it has no number".to_owned() })
        };
        let mut rows = Vec::with_capacity(batch.edges.len());
        for EdgeDelta { key, seen } in &batch.edges {
            let (protocol, port) = (key.service.protocol.number(), key.service.port);
            rows.push((Row { client: id(&key.from)?, server: id(&key.to)?, protocol, port, direction_known: key.direction_known }, seen));
        }
        Some(write_run(&mut tx, &run::pack(node, rows)).await.map_err(fail())?)
    };
    let gap = not_observed(missing, batch);
    super::health::append(&mut tx, node, gap.iter().chain(&batch.health)).await?;
    for (reason, count) in &batch.skipped {
        sqlx::query(
            "INSERT INTO skipped (node, reason, count) VALUES ($1, $2, $3) \
                 ON CONFLICT (node, reason) DO UPDATE SET count = skipped.count + excluded.count",
        )
        .bind(node)
        .bind(reason)
        .bind(to_db("a count of skipped elements", *count)?)
        .execute(&mut *tx)
        .await
        .map_err(fail())?;
    }
    sqlx::query(
        "INSERT INTO spools (node, spool, acknowledged) VALUES ($1, $2, $3) \
             ON CONFLICT (node, spool) DO UPDATE SET acknowledged = excluded.acknowledged",
    )
    .bind(node)
    .bind(&batch.spool)
    .bind(to_db("sequence number", batch.seq)?)
    .execute(&mut *tx)
    .await
    .map_err(fail())?;
    tx.commit().await.map_err(fail())?;

    if names.endpoints.len() + fresh.len() > NAMES {
        names.endpoints.clear();
    }
    names.endpoints.extend(fresh);
    if known_node.is_none() {
        names.nodes.insert(batch.node.clone(), node);
    }
    Ok((BatchOutcome::Applied { gap }, kept))
}

async fn node_id(tx: &mut Transaction<'_, Sqlite>, name: &str) -> Result<i64, sqlx::Error> {
    match sqlx::query_scalar("SELECT id FROM nodes WHERE name = $1").bind(name).fetch_optional(&mut **tx).await? {
        Some(id) => Ok(id),
        None => sqlx::query_scalar("INSERT INTO nodes (name) VALUES ($1) RETURNING id").bind(name).fetch_one(&mut **tx).await,
    }
}

/// Writes one run into its table.
pub(super) async fn write_run(tx: &mut Transaction<'_, Sqlite>, run: &Run) -> Result<Kept, sqlx::Error> {
    let id = sqlx::query_scalar("INSERT INTO runs (node, edges, packed) VALUES ($1, $2, $3) RETURNING id")
        .bind(run.node)
        .bind(run.edges)
        .bind(run.packed.as_slice())
        .fetch_one(&mut **tx)
        .await?;
    Ok(Kept { id, node: run.node, bytes: run.packed.len() as u64 })
}

/// The numbers of those endpoints that are not known yet; new ones are given one.
async fn endpoint_ids(
    tx: &mut Transaction<'_, Sqlite>,
    known: &HashMap<Endpoint, i64>,
    edges: &[EdgeDelta],
) -> Result<HashMap<Endpoint, i64>, StoreError> {
    let fail = || StoreError::database("take a batch");
    let ends = edges.iter().flat_map(|delta| [&delta.key.from, &delta.key.to]);
    let mut wanted: BTreeMap<String, &Endpoint> = ends.filter(|end| !known.contains_key(*end)).map(|end| (end.to_string(), end)).collect();
    let mut found = HashMap::with_capacity(wanted.len());
    for adding in [false, true] {
        let names: Vec<String> = wanted.keys().cloned().collect();
        for (statements, piece) in pieces(&names) {
            let query = sqlx::query(if adding { statements.add } else { statements.find });
            let query = piece.iter().fold(query, |query, name| query.bind(name));
            for row in query.fetch_all(&mut **tx).await.map_err(fail())? {
                let (id, name): (i64, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
                if let Some(endpoint) = wanted.remove(&name) {
                    found.insert(endpoint.clone(), id);
                }
            }
        }
    }
    Ok(found)
}

/// What is to be recorded where this many batches before one are missing: the stretch that they covered is not known, so none of it may
/// count. Its time is that of what came next: of the batch's own account, or of its edges; of one that has neither, it is now.
fn not_observed(missing: u64, batch: &BatchIn) -> Option<Health> {
    let next = batch.health.first().map(|first| first.from).or_else(|| batch.edges.iter().filter_map(|edge| edge.seen.first).min());
    let at = next.unwrap_or_else(Timestamp::now);
    (missing > 0).then_some(Health { from: at, to: at, events: 0, lost: missing, unattributed: 0, healthy: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_cut_into_pieces_that_have_a_statement() {
        for length in [0, 1, 9, 10, 99, 100, 101, 299, 1234] {
            let list: Vec<usize> = (0..length).collect();
            let joined: Vec<usize> = pieces(&list).flat_map(|(_, piece)| piece.to_vec()).collect();
            assert_eq!(joined, list);
        }
    }
}
