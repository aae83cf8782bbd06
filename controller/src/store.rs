//! The embedded store: edges, health, objects, decisions, generations. What was acknowledged is in it. It keeps; it decides
//! nothing: what a merge means is `policy`'s, who may change what is the hub's.
//!
//! # Why these settings
//! WAL with `synchronous = NORMAL`: a commit survives the death of the process at once and the loss of power up to the last
//! checkpoint, and costs no disk flush (sqlite.org/pragma.html#pragma_synchronous). A store that lost its tail that way has a lower
//! number for a spool than the agent, which [`Store::apply_batch`] sees and counts.
//!
//! # Why one connection
//! SQLite has one writer anyway; with one connection a transaction never meets another of ours, and the hub is the only one that
//! asks. PostgreSQL takes a larger pool without another line of code. The queries are plain SQL that both read.

mod edges;
mod health;
mod load;
mod objects;
mod open;
mod run;
mod schema1;
mod tidy;

use std::path::PathBuf;
use std::sync::Arc;

use nix::fcntl::Flock;
use sqlx::pool::PoolConnection;
use sqlx::{Sqlite, SqlitePool};
use tokio::sync::Mutex;
use tracing::debug;

pub use edges::BatchOutcome;
pub use objects::{Change, DecisionDraft, InForce, RejectedRule, Revision};
pub use open::SCHEMA;

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system said no.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("{path} is open in another process: only one controller may work on a store; stop it, or give this one its own --state-dir")]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// The file is something else.
    #[error("{path} is not a store of Bulkhead ({why}); it was not touched. Move it away to begin with an empty store")]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What is there instead.
        why: String,
    },
    /// The file is damaged.
    #[error(
        "the store {path} is damaged ({why}); it was not touched. Put a copy back, or move it away to begin with an empty store: \
         nodes then keep their last plan until `bulkhead adopt`"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite says about it.
        why: String,
    },
    /// Written by a later version.
    #[error(
        "the store {path} has schema {found}, this version understands up to {understood}; it was not touched. Run the newer version again"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest schema this program knows.
        understood: i64,
    },
    /// The schema could not be brought up to date.
    #[error("cannot bring the store {path} to schema {SCHEMA}; what it held is still there")]
    Migration {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// The database said no: the disk is full, the file is locked by another tool, ...
    #[error("the store cannot {what}")]
    Database {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: sqlx::Error,
    },
    /// Something in the store cannot be read. Unreadable never means wider: whoever loads it must keep what it had.
    #[error("the store holds a {kind} that cannot be read: {name}: {why}")]
    Unreadable {
        /// What it is.
        kind: &'static str,
        /// Its name or number.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The policies changed since the decision was prepared.
    #[error("the policies in force moved from generation {expected} to {found} meanwhile; look again and decide again")]
    Moved {
        /// The generation that the decision was made on.
        expected: u64,
        /// The generation in force.
        found: u64,
    },
    /// A batch came although the one before it is not in the store (it was refused, for want of room): taking it would acknowledge both.
    #[error("batch {found} came before batch {expected} was stored")]
    OutOfOrder {
        /// The number that has to come next.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A number that the database cannot hold.
    #[error("{what} {value} is larger than a store can hold")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// The number.
        value: u64,
    },
}

impl StoreError {
    fn database(what: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database { what, source }
    }
}

/// A handle to the store; clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: String,
    path: PathBuf,
    pool: SqlitePool,
    names: Mutex<edges::Names>,
    tidy: tidy::Tidy,
    _lock: Flock<std::fs::File>,
}

impl Store {
    /// Id of this store: a node takes plans of one store until it is told to adopt another.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// The file.
    pub fn path(&self) -> &std::path::Path {
        &self.inner.path
    }

    /// The connection, to write in one transaction; to be given to [`Store::settle`] afterwards.
    async fn writer(&self, what: &'static str) -> Result<PoolConnection<Sqlite>, StoreError> {
        self.inner.pool.acquire().await.map_err(StoreError::database(what))
    }

    /// Gives the connection back, or closes it after a failure: where SQLite itself ended the transaction (disk full, I/O error), sqlx still
    /// counts it as open and would refuse every later one.
    async fn settle<T>(&self, connection: PoolConnection<Sqlite>, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        if outcome.is_err()
            && let Err(error) = connection.close().await
        {
            debug!(%error, "a connection to the store could not be closed");
        }
        outcome
    }

    /// Writes what is left in the write-ahead log into the file and closes it. Without this nothing is lost; the next open reads the log.
    pub async fn close(&self) {
        self.tidied().await;
        self.inner.pool.close().await;
    }
}

/// A number as the database holds it.
fn to_db(what: &'static str, value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(|_| StoreError::TooLarge { what, value })
}

/// A number from the database; a negative one can only be damage.
fn from_db(kind: &'static str, name: &str, value: i64) -> Result<u64, StoreError> {
    u64::try_from(value).map_err(|_| StoreError::Unreadable { kind, name: name.to_owned(), why: format!("{value} is negative") })
}

#[cfg(test)]
mod tests;
