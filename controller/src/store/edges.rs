//! What was seen: batches in, exactly once, and the graph out.
//!
//! # Why read, merge and write back
//! Merging is [`Evidence::merge`]'s, here as everywhere. In SQL it would be a second meaning of it, and the hours could not be merged
//! there at all. Reading and writing go by the hundred, so a row costs little more than its look-up.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use futures::TryStreamExt;
use jiff::Timestamp;
use policy::evidence::Road;
use policy::service::Protocol;
use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, FlowGraph, Health, HourSet};
use prost::encoding::{decode_varint, encode_varint};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Connection, Row, Sqlite, SqliteConnection, Transaction};

use super::{Store, StoreError, from_db, to_db};
use crate::session::BatchIn;

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// It is committed now.
    Applied {
        /// How many batches before it never arrived although the agent had been told to forget them (this store lost its tail). The
        /// stretch is recorded as not observed.
        missing: u64,
    },
    /// It was committed before: nothing was changed.
    Already,
}

/// Numbers of names that are in the store, so that they need not be looked up for each batch. Only what is committed is in here.
#[derive(Debug, Default)]
pub(super) struct Names {
    nodes: HashMap<String, i64>,
    endpoints: HashMap<String, i64>,
}

/// Some 20 MB of names; beyond that they are looked up again.
const NAMES: usize = 200_000;

/// The columns of a row's key and of its evidence, in the order in which they are bound and read.
const KEY: [&str; 6] = ["node", "client", "server", "protocol", "port", "direction_known"];
const EVIDENCE: [&str; 14] = [
    "established",
    "connected_no_data",
    "one_way",
    "unanswered",
    "refused",
    "denied",
    "would_deny",
    "pre_existing",
    "bytes_sent",
    "bytes_received",
    "first_us",
    "last_us",
    "hours",
    "roads",
];

/// Rows to a statement. Few sizes, so that the prepared statements are few; the largest stays far below SQLite's 32,766 parameters.
const CHUNKS: [usize; 3] = [100, 10, 1];

struct Statements {
    rows: usize,
    read: &'static str,
    write: &'static str,
    find_names: &'static str,
    add_names: &'static str,
}

static STATEMENTS: LazyLock<[Statements; CHUNKS.len()]> = LazyLock::new(|| CHUNKS.map(Statements::of));

impl Statements {
    /// Made once for each size, hence leaked. The parameters have no numbers: to SQLite `$7` is a name, and it looks each one up by walking
    /// along all of them, which took two thirds of the time of a batch. (PostgreSQL wants numbers: this is the place to write them.)
    fn of(rows: usize) -> Self {
        let tuples = |width: usize| vec![format!("({})", vec!["?"; width].join(", ")); rows].join(", ");
        let evidence = EVIDENCE.map(|c| format!("e.{c}")).join(", ");
        let changed = EVIDENCE.map(|c| format!("{c} = excluded.{c}")).join(", ");
        let names = vec!["?"; rows].join(", ");
        let read = format!(
            "WITH wanted (client, server, protocol, port, direction_known) AS (VALUES {}) \
             SELECT e.client, e.server, e.protocol, e.port, e.direction_known, {evidence} FROM wanted AS w JOIN edges AS e \
             ON e.node = ? AND e.client = w.client AND e.server = w.server AND e.protocol = w.protocol AND e.port = w.port \
             AND e.direction_known = w.direction_known",
            tuples(KEY.len() - 1)
        );
        let write = format!(
            "INSERT INTO edges ({}, {}) VALUES {} ON CONFLICT ({}) DO UPDATE SET {changed}",
            KEY.join(", "),
            EVIDENCE.join(", "),
            tuples(KEY.len() + EVIDENCE.len()),
            KEY.join(", ")
        );
        let find_names = format!("SELECT id, name FROM endpoints WHERE name IN ({names})");
        let add_names = format!("INSERT INTO endpoints (name) VALUES {} RETURNING id, name", tuples(1));
        Self { rows, read: read.leak(), write: write.leak(), find_names: find_names.leak(), add_names: add_names.leak() }
    }
}

/// Cuts a list into pieces for which there is a statement.
fn pieces<T>(mut rest: &[T]) -> impl Iterator<Item = (&'static Statements, &[T])> {
    std::iter::from_fn(move || {
        let statements = STATEMENTS.iter().find(|s| s.rows <= rest.len())?;
        let (piece, after) = rest.split_at(statements.rows);
        rest = after;
        Some((statements, piece))
    })
}

/// A row's key within a node: client, server, protocol, port, direction known.
type RowKey = (i64, i64, i64, i64, bool);

impl Store {
    /// Writes one batch, exactly once: a batch that is in the store already changes nothing. When this returns, it is committed.
    ///
    /// # Errors
    /// The database says no (disk full, file locked), or a batch before it is not in the store: nothing of the batch is in the store then.
    pub async fn apply_batch(&self, batch: &BatchIn) -> Result<BatchOutcome, StoreError> {
        let mut names = self.inner.names.lock().await;
        let mut connection = self.writer("take a batch").await?;
        let outcome = apply(&mut connection, &mut names, batch).await;
        self.settle(connection, outcome).await
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

    /// The graph of all nodes, merged.
    ///
    /// # Errors
    /// The database says no, or an edge cannot be read.
    pub async fn load_graph(&self) -> Result<FlowGraph, StoreError> {
        let mut graph = FlowGraph::new();
        self.each_edge(|_, delta| {
            graph.add(&delta);
        })
        .await?;
        Ok(graph)
    }

    /// The graph of each node.
    ///
    /// # Errors
    /// The database says no, or an edge cannot be read.
    pub async fn load_graphs(&self) -> Result<BTreeMap<String, FlowGraph>, StoreError> {
        let mut graphs: BTreeMap<String, FlowGraph> = BTreeMap::new();
        self.each_edge(|node, delta| {
            graphs.entry(node.to_owned()).or_default().add(&delta);
        })
        .await?;
        Ok(graphs)
    }

    async fn each_edge(&self, mut see: impl FnMut(&str, EdgeDelta)) -> Result<(), StoreError> {
        let fail = || StoreError::database("read the graph");
        let mut connection = self.inner.pool.acquire().await.map_err(fail())?;
        let mut endpoints: HashMap<i64, Endpoint> = HashMap::new();
        let mut rows = sqlx::query("SELECT id, name FROM endpoints").fetch(&mut *connection);
        while let Some(row) = rows.try_next().await.map_err(fail())? {
            let (id, name): (i64, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
            let endpoint = name.parse().map_err(|e: policy::workload::NotAnEndpoint| StoreError::Unreadable {
                kind: "endpoint",
                why: e.to_string(),
                name,
            })?;
            endpoints.insert(id, endpoint);
        }
        drop(rows);
        static ALL: LazyLock<String> = LazyLock::new(|| {
            let evidence = EVIDENCE.map(|c| format!("e.{c}")).join(", ");
            format!(
                "SELECT e.client, e.server, e.protocol, e.port, e.direction_known, {evidence}, n.name \
                 FROM edges AS e JOIN nodes AS n ON n.id = e.node"
            )
        });
        let mut rows = sqlx::query(AssertSqlSafe(ALL.as_str())).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await.map_err(fail())? {
            let ((client, server, protocol, port, direction_known), seen) = read_row(&row)?;
            let unreadable =
                |why: &str| StoreError::Unreadable { kind: "edge", name: format!("{client} -> {server}"), why: why.to_owned() };
            let end = |id| endpoints.get(&id).cloned().ok_or_else(|| unreadable("an end has no name"));
            let service = policy::Service {
                protocol: Protocol::from_number(u8::try_from(protocol).map_err(|_| unreadable("its protocol is not a number of IANA's"))?),
                port: u16::try_from(port).map_err(|_| unreadable("its port is beyond 65535"))?,
            };
            let key = EdgeKey { from: end(client)?, to: end(server)?, service, direction_known };
            see(row.try_get(5 + EVIDENCE.len()).map_err(fail())?, EdgeDelta { key, seen });
        }
        Ok(())
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

async fn apply(connection: &mut SqliteConnection, names: &mut Names, batch: &BatchIn) -> Result<BatchOutcome, StoreError> {
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
        return Ok(BatchOutcome::Already);
    }
    let expected = acknowledged + 1;
    // An acknowledgement means "and all before". So a gap is taken only where the agent said that it has nothing from before it.
    if batch.seq != expected && batch.seq != batch.first {
        return Err(StoreError::OutOfOrder { expected, found: batch.seq });
    }
    // A spool that this store never heard of may begin anywhere: what was before went to another store.
    let missing = if acknowledged == 0 { 0 } else { batch.seq - expected };

    let mut sum: BTreeMap<&EdgeKey, Evidence> = BTreeMap::new();
    for delta in &batch.edges {
        sum.entry(&delta.key).or_default().merge(&delta.seen);
    }
    let fresh = endpoint_ids(&mut tx, &names.endpoints, sum.keys().flat_map(|key| [&key.from, &key.to])).await.map_err(fail())?;
    let id = |endpoint: &Endpoint| {
        let name = endpoint.to_string();
        let id = names.endpoints.get(&name).or_else(|| fresh.get(&name)).copied();
        id.ok_or_else(|| StoreError::Unreadable { kind: "endpoint", name, why: "it has no number".to_owned() })
    };
    let mut rows: Vec<(RowKey, Evidence)> = Vec::with_capacity(sum.len());
    for (key, seen) in sum {
        let protocol = i64::from(key.service.protocol.number());
        rows.push(((id(&key.from)?, id(&key.to)?, protocol, i64::from(key.service.port), key.direction_known), seen));
    }
    rows.sort_unstable_by_key(|(key, _)| *key);
    merge_into(&mut tx, node, rows).await?;
    super::health::append(&mut tx, node, &batch.health, missing).await?;
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
    Ok(BatchOutcome::Applied { missing })
}

async fn node_id(tx: &mut Transaction<'_, Sqlite>, name: &str) -> Result<i64, sqlx::Error> {
    match sqlx::query_scalar("SELECT id FROM nodes WHERE name = $1").bind(name).fetch_optional(&mut **tx).await? {
        Some(id) => Ok(id),
        None => sqlx::query_scalar("INSERT INTO nodes (name) VALUES ($1) RETURNING id").bind(name).fetch_one(&mut **tx).await,
    }
}

/// The numbers of those endpoints that are not known yet; new ones are given one.
async fn endpoint_ids(
    tx: &mut Transaction<'_, Sqlite>,
    known: &HashMap<String, i64>,
    endpoints: impl Iterator<Item = &Endpoint>,
) -> Result<HashMap<String, i64>, sqlx::Error> {
    let mut wanted: Vec<String> = endpoints.map(Endpoint::to_string).filter(|name| !known.contains_key(name)).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut found: HashMap<String, i64> = HashMap::with_capacity(wanted.len());
    for adding in [false, true] {
        for (statements, piece) in pieces(&wanted) {
            let mut query = sqlx::query(if adding { statements.add_names } else { statements.find_names });
            for name in piece {
                query = query.bind(name);
            }
            for row in query.fetch_all(&mut **tx).await? {
                found.insert(row.try_get(1)?, row.try_get(0)?);
            }
        }
        wanted.retain(|name| !found.contains_key(name));
    }
    Ok(found)
}

async fn merge_into(tx: &mut Transaction<'_, Sqlite>, node: i64, mut rows: Vec<(RowKey, Evidence)>) -> Result<(), StoreError> {
    let fail = || StoreError::database("take a batch");
    let mut at = 0;
    while at < rows.len() {
        let Some((statements, _)) = pieces(&rows[at..]).next() else { break };
        let piece = &mut rows[at..at + statements.rows];
        at += statements.rows;

        let mut query = sqlx::query(statements.read);
        for ((client, server, protocol, port, known), _) in &*piece {
            query = query.bind(client).bind(server).bind(protocol).bind(port).bind(known);
        }
        let query = query.bind(node);
        for row in query.fetch_all(&mut **tx).await.map_err(fail())? {
            let (key, before) = read_row(&row)?;
            if let Ok(index) = piece.binary_search_by_key(&key, |(key, _)| *key) {
                piece[index].1.merge(&before);
            }
        }
        let mut query = sqlx::query(statements.write);
        for ((client, server, protocol, port, known), seen) in &*piece {
            query = query.bind(node).bind(client).bind(server).bind(protocol).bind(port).bind(known);
            for count in counts(seen) {
                query = query.bind(i64::try_from(count).unwrap_or(i64::MAX));
            }
            query = query
                .bind(seen.first.map(Timestamp::as_microsecond))
                .bind(seen.last.map(Timestamp::as_microsecond))
                .bind(write_hours(&seen.hours))
                .bind(write_roads(seen));
        }
        query.execute(&mut **tx).await.map_err(fail())?;
    }
    Ok(())
}

/// The counters in the order of [`EVIDENCE`].
fn counts(e: &Evidence) -> [u64; 10] {
    [
        e.established,
        e.connected_no_data,
        e.one_way,
        e.unanswered,
        e.refused,
        e.denied,
        e.would_deny,
        e.pre_existing,
        e.bytes_sent,
        e.bytes_received,
    ]
}

fn read_row(row: &SqliteRow) -> Result<(RowKey, Evidence), StoreError> {
    let fail = || StoreError::database("read an edge");
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(fail());
    let key = (number(0)?, number(1)?, number(2)?, number(3)?, row.try_get(4).map_err(fail())?);
    let unreadable = |why: &str| StoreError::Unreadable { kind: "edge", name: format!("{key:?}"), why: why.to_owned() };
    let mut counts = [0_u64; 10];
    for (index, count) in counts.iter_mut().enumerate() {
        *count = u64::try_from(number(5 + index)?).map_err(|_| unreadable("a count is negative"))?;
    }
    let time = |column: usize| -> Result<Option<Timestamp>, StoreError> {
        let us: Option<i64> = row.try_get(column).map_err(fail())?;
        us.map(Timestamp::from_microsecond).transpose().map_err(|e| unreadable(&e.to_string()))
    };
    let [established, connected_no_data, one_way, unanswered, refused, denied, would_deny, pre_existing, bytes_sent, bytes_received] =
        counts;
    let seen = Evidence {
        established,
        connected_no_data,
        one_way,
        unanswered,
        refused,
        denied,
        would_deny,
        pre_existing,
        bytes_sent,
        bytes_received,
        first: time(15)?,
        last: time(16)?,
        hours: read_hours(row.try_get(17).map_err(fail())?).ok_or_else(|| unreadable("its hours are cut or mixed up"))?,
        roads: ROADS.iter().filter(|(_, bit)| number(18).is_ok_and(|bits| bits & bit != 0)).map(|(road, _)| *road).collect(),
    };
    Ok((key, seen))
}

const ROADS: [(Road, i64); 3] = [(Road::Direct, 1), (Road::Published, 2), (Road::Proxy, 4)];

fn write_roads(seen: &Evidence) -> i64 {
    ROADS.iter().filter(|(road, _)| seen.roads.contains(*road)).map(|(_, bit)| bit).sum()
}

/// Runs as varints: hours from the end of the run before to the first hour, then how many hours follow the first.
fn write_hours(hours: &HourSet) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut before = 0;
    for &(first, last) in hours.runs() {
        encode_varint(u64::from(first - before), &mut bytes);
        encode_varint(u64::from(last - first), &mut bytes);
        before = last;
    }
    bytes
}

fn read_hours(mut bytes: &[u8]) -> Option<HourSet> {
    let mut runs = Vec::new();
    let mut before = 0_u32;
    while !bytes.is_empty() {
        let mut next = || decode_varint(&mut bytes).ok().and_then(|n| u32::try_from(n).ok());
        let first = before.checked_add(next()?)?;
        let last = first.checked_add(next()?)?;
        runs.push((first, last));
        before = last;
    }
    Some(HourSet::from_runs(runs))
}

/// Health of a batch of which some before it are missing: the stretch they covered is not known, so none of it may count.
pub(super) fn not_observed(missing: u64, health: &[Health]) -> Option<Health> {
    let first = health.first()?;
    (missing > 0).then_some(Health { from: first.from, to: first.from, events: 0, lost: missing, unattributed: 0, healthy: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_read_back_as_they_were_written() {
        for runs in [vec![], vec![(0, 0)], vec![(0, 5), (7, 7), (490_000, 490_100)], vec![(u32::MAX, u32::MAX)]] {
            let hours = HourSet::from_runs(runs);
            assert_eq!(read_hours(&write_hours(&hours)), Some(hours));
        }
    }

    #[test]
    fn cut_hours_are_not_read() {
        let bytes = write_hours(&HourSet::from_runs([(490_000, 490_100)]));
        for cut in 1..bytes.len() {
            assert_eq!(read_hours(&bytes[..cut]), None, "cut to {cut}");
        }
    }

    #[test]
    fn every_length_is_cut_into_pieces_that_have_a_statement() {
        for length in [0, 1, 9, 10, 99, 100, 101, 299, 1234] {
            let list: Vec<usize> = (0..length).collect();
            let joined: Vec<usize> = pieces(&list).flat_map(|(_, piece)| piece.to_vec()).collect();
            assert_eq!(joined, list);
        }
    }
}
