//! Stores of schema 1 had a row for each edge. They are read into runs when they are opened, once.

use jiff::Timestamp;
use policy::evidence::Road;
use policy::{Evidence, HourSet};
use prost::encoding::decode_varint;
use sqlx::sqlite::SqliteRow;
use sqlx::{Connection, Row as _, SqliteConnection};

use super::StoreError;
use super::edges::write_run;
use super::run::{self, Row};

/// Rows read at once: some 20 MB.
const AT_ONCE: i64 = 100_000;

const ROADS: [(Road, i64); 3] = [(Road::Direct, 1), (Road::Published, 2), (Road::Proxy, 4)];

/// Packs the rows and drops their table, whole or not at all.
///
/// # Errors
/// The database says no, or a row cannot be read: the table stays then.
pub(super) async fn convert(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let fail = || StoreError::database("pack the edges of an earlier version");
    let found: Option<i64> = sqlx::query_scalar("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'edges'")
        .fetch_optional(&mut *connection)
        .await
        .map_err(fail())?;
    if found.is_none() {
        return Ok(());
    }
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(fail())?;
    let nodes: Vec<i64> = sqlx::query_scalar("SELECT id FROM nodes ORDER BY id").fetch_all(&mut *tx).await.map_err(fail())?;
    for node in nodes {
        let mut after = Row { client: i64::MIN, server: 0, protocol: 0, port: 0, direction_known: false };
        loop {
            let rows = sqlx::query(
                "SELECT client, server, protocol, port, direction_known, established, connected_no_data, one_way, unanswered, refused, \
                 denied, would_deny, pre_existing, bytes_sent, bytes_received, first_us, last_us, hours, roads FROM edges \
                 WHERE node = $1 AND (client, server, protocol, port, direction_known) > ($2, $3, $4, $5, $6) \
                 ORDER BY client, server, protocol, port, direction_known LIMIT $7",
            )
            .bind(node)
            .bind(after.client)
            .bind(after.server)
            .bind(after.protocol)
            .bind(after.port)
            .bind(after.direction_known)
            .bind(AT_ONCE)
            .fetch_all(&mut *tx)
            .await
            .map_err(fail())?;
            let edges = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            let Some((last, _)) = edges.last() else { break };
            after = *last;
            let run = run::pack(node, edges.iter().map(|(row, seen)| (*row, seen)).collect());
            write_run(&mut tx, &run).await.map_err(fail())?;
        }
    }
    sqlx::query("DROP TABLE edges").execute(&mut *tx).await.map_err(fail())?;
    tx.commit().await.map_err(fail())
}

fn read(row: &SqliteRow) -> Result<(Row, Evidence), StoreError> {
    let fail = || StoreError::database("read an edge of an earlier version");
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(fail());
    let (client, server) = (number(0)?, number(1)?);
    let unreadable = |why: &str| StoreError::Unreadable { kind: "edge", name: format!("{client} -> {server}"), why: why.to_owned() };
    let key = Row {
        client,
        server,
        protocol: u8::try_from(number(2)?).map_err(|_| unreadable("its protocol is not a number of IANA's"))?,
        port: u16::try_from(number(3)?).map_err(|_| unreadable("its port is beyond 65535"))?,
        direction_known: row.try_get(4).map_err(fail())?,
    };
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
        hours: hours(row.try_get(17).map_err(fail())?).ok_or_else(|| unreadable("its hours are cut or mixed up"))?,
        roads: ROADS.iter().filter(|(_, bit)| number(18).is_ok_and(|bits| bits & bit != 0)).map(|(road, _)| *road).collect(),
    };
    Ok((key, seen))
}

/// Runs as varints: hours from the end of the run before to the first hour, then how many hours follow the first.
fn hours(mut bytes: &[u8]) -> Option<HourSet> {
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
