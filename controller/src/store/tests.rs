//! The store on real files.

mod batches;
mod decisions;
mod files;
mod runs;

use std::path::PathBuf;

use jiff::Timestamp;
use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, Health, Service, Workload};
use tempfile::TempDir;

use super::*;
use crate::session::BatchIn;

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + second).unwrap()
}

pub(super) struct Place {
    dir: TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("store.db")
    }

    pub(super) async fn open(&self) -> Result<Store, StoreError> {
        Store::open(&self.path(), at(0)).await
    }

    /// The file by other means than ours.
    pub(super) async fn by_hand(&self) -> sqlx::SqliteConnection {
        use sqlx::ConnectOptions;
        sqlx::sqlite::SqliteConnectOptions::new().filename(self.path()).connect().await.unwrap()
    }
}

pub(super) fn edge(port: u16, established: u64) -> EdgeDelta {
    EdgeDelta {
        key: EdgeKey {
            from: Endpoint::Workload(Workload::new("shop", "web")),
            to: Endpoint::Workload(Workload::new("shop", "db")),
            service: Service::tcp(port),
            direction_known: true,
        },
        seen: Evidence { established, first: Some(at(i64::from(port))), last: Some(at(i64::from(port))), ..Evidence::default() },
    }
}

pub(super) fn stretch(from: i64, to: i64, healthy: bool) -> Health {
    Health { from: at(from), to: at(to), events: 10, lost: u64::from(!healthy), unattributed: 0, healthy }
}

pub(super) fn batch(seq: u64, edges: Vec<EdgeDelta>, health: Vec<Health>) -> BatchIn {
    BatchIn { node: "node1".into(), spool: "spool1".into(), seq, first: 1, edges, health, skipped: Default::default() }
}
