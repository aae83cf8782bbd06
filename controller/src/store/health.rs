//! How well each node saw, as stretches of time. Stretches that follow each other and were seen alike are one row, up to an hour.

use std::collections::BTreeMap;

use jiff::Timestamp;
use policy::Health;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};

use super::{Store, StoreError, from_db};

/// A row is not stretched beyond this, so that the time of a loss stays known to the hour, microseconds.
const LONGEST_US: i64 = 3_600_000_000;

pub(super) async fn append(tx: &mut Transaction<'_, Sqlite>, node: i64, health: impl Iterator<Item = &Health>) -> Result<(), StoreError> {
    let fail = || StoreError::database("take a batch");
    for stretch in health {
        let (from, to) = (stretch.from.as_microsecond(), stretch.to.as_microsecond());
        let before = sqlx::query(
            "SELECT from_us, to_us, events, lost, unattributed, healthy, id FROM health \
             WHERE node = $1 AND to_us = $2 AND healthy = $3 AND from_us > $4 ORDER BY id DESC LIMIT 1",
        )
        .bind(node)
        .bind(from)
        .bind(stretch.healthy)
        .bind(to.saturating_sub(LONGEST_US))
        .fetch_optional(&mut **tx)
        .await
        .map_err(fail())?;
        let (row, stretch) = match before {
            Some(row) => {
                let mut joined = read(&row, 0)?;
                joined.join(stretch);
                (Some(row.try_get::<i64, _>(6).map_err(fail())?), joined)
            }
            None => (None, stretch.clone()),
        };
        let query = match row {
            Some(row) => {
                sqlx::query("UPDATE health SET to_us = $2, events = $3, lost = $4, unattributed = $5 WHERE id = $1").bind(row).bind(to)
            }
            None => sqlx::query(
                "INSERT INTO health (node, from_us, to_us, events, lost, unattributed, healthy) VALUES ($1, $6, $2, $3, $4, $5, $7)",
            )
            .bind(node)
            .bind(to),
        };
        let counts = [stretch.events, stretch.lost, stretch.unattributed].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
        let query = counts.into_iter().fold(query, |query, count| query.bind(count));
        let query = if row.is_none() { query.bind(from).bind(stretch.healthy) } else { query };
        query.execute(&mut **tx).await.map_err(fail())?;
    }
    Ok(())
}

impl Store {
    /// How well each node saw, oldest stretch first.
    ///
    /// # Errors
    /// The database says no, or a stretch cannot be read.
    pub async fn load_health(&self) -> Result<BTreeMap<String, Vec<Health>>, StoreError> {
        let fail = || StoreError::database("read the health of the nodes");
        let rows = sqlx::query(
            "SELECT n.name, h.from_us, h.to_us, h.events, h.lost, h.unattributed, h.healthy \
             FROM health AS h JOIN nodes AS n ON n.id = h.node ORDER BY h.node, h.from_us, h.to_us",
        )
        .fetch_all(&self.inner.pool)
        .await
        .map_err(fail())?;
        let mut health: BTreeMap<String, Vec<Health>> = BTreeMap::new();
        for row in rows {
            let node: String = row.try_get(0).map_err(fail())?;
            let stretch = read(&row, 1)?;
            health.entry(node).or_default().push(stretch);
        }
        Ok(health)
    }
}

/// Reads from, to, events, lost, unattributed and healthy, from this column on.
fn read(row: &SqliteRow, column: usize) -> Result<Health, StoreError> {
    let number = |offset: usize| row.try_get::<i64, _>(column + offset).map_err(StoreError::database("read the health of the nodes"));
    let kind = "stretch of health";
    let name = number(0)?.to_string();
    let time = |us| Timestamp::from_microsecond(us).map_err(|e| StoreError::Unreadable { kind, name: name.clone(), why: e.to_string() });
    Ok(Health {
        from: time(number(0)?)?,
        to: time(number(1)?)?,
        events: from_db(kind, &name, number(2)?)?,
        lost: from_db(kind, &name, number(3)?)?,
        unattributed: from_db(kind, &name, number(4)?)?,
        healthy: number(5)? != 0,
    })
}
