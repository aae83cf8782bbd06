//! What was seen: the graph out of the store, at a start.
//!
//! # Why three at work
//! A start waits for it: a million edges are 25 MB of packed runs. The database hands out values, one thread unpacks them, and one puts
//! edges into the graph, which is most of the work and a wait for memory; side by side the first two cost no time of their own.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use futures::TryStreamExt;
use policy::graph::Place;
use policy::service::Protocol;
use policy::{Endpoint, Evidence, FlowGraph, Service};
use sqlx::{Row as _, SqliteConnection};

use super::edges::unreadable;
use super::run::{self, Row, Run};
use super::{Store, StoreError};

/// Edges that are handed on together: they stay in a core's cache from one thread to the other.
const HANDED_ON: usize = 512;
/// How many of those may wait, and how many runs.
const WAITING: usize = 8;
const RUNS_WAITING: usize = 2;

/// Numbers of endpoints are given one after the other, so their places are looked up in a list. One beyond this would be of a store of
/// more names than memory holds.
const MOST_ENDPOINTS: i64 = 1 << 28;

/// A run with its number in the store.
type Numbered = (i64, Run);
/// Unpacked edges of the run with this number.
type Unpacked = Result<(i64, Vec<(Row, Evidence)>), StoreError>;

/// Endpoints by their numbers.
#[derive(Default)]
struct Ends(Vec<End>);

#[derive(Clone, Default)]
enum End {
    #[default]
    Nobody,
    Named(Endpoint),
    Placed(Place),
}

impl Ends {
    fn insert(&mut self, id: i64, endpoint: Endpoint) -> Result<(), StoreError> {
        let at = usize::try_from(id).ok().filter(|_| id < MOST_ENDPOINTS);
        let at =
            at.ok_or_else(|| StoreError::Unreadable { kind: "endpoint", name: endpoint.to_string(), why: format!("its number is {id}") })?;
        if at >= self.0.len() {
            self.0.resize(at + 1, End::Nobody);
        }
        self.0[at] = End::Named(endpoint);
        Ok(())
    }

    /// Where an endpoint is in the graph; it is in it from now on.
    fn place(&mut self, graph: &mut FlowGraph, id: i64) -> Option<Place> {
        let end = self.0.get_mut(usize::try_from(id).ok()?)?;
        let place = match end {
            End::Placed(place) => return Some(*place),
            End::Named(endpoint) => graph.place(endpoint),
            End::Nobody => return None,
        };
        *end = End::Placed(place);
        Some(place)
    }
}

impl Store {
    /// The graph of all nodes, merged.
    ///
    /// # Errors
    /// The database says no, or an edge cannot be read.
    pub async fn load_graph(&self) -> Result<FlowGraph, StoreError> {
        let mut connection = self.inner.pool.acquire().await.map_err(StoreError::database("read the graph"))?;
        let ends = ends(&mut connection).await?;
        let edges: Option<i64> = sqlx::query_scalar("SELECT max(edges) FROM runs")
            .fetch_one(&mut *connection)
            .await
            .map_err(StoreError::database("read the graph"))?;
        let (runs, packed) = tokio::sync::mpsc::channel(RUNS_WAITING);
        let (unpacked, edges_of_runs) = sync_channel(WAITING);
        let unpacker = tokio::task::spawn_blocking(move || unpack(packed, &unpacked));
        // What the largest holds is most of what there is. A number that says too much is found out when the run is unpacked.
        let room = usize::try_from(edges.unwrap_or(0)).unwrap_or(0).min(1 << 24);
        let builder = tokio::task::spawn_blocking(move || build(ends, room, &edges_of_runs));
        let read = read_runs(&mut connection, runs).await;
        let ended = |error: tokio::task::JoinError| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that ends takes tasks away.
            Err(error) => StoreError::Unreadable { kind: "run of edges", name: "all".to_owned(), why: error.to_string() },
        };
        unpacker.await.map_err(ended)?;
        let graph = builder.await.map_err(ended)?;
        read?;
        graph
    }
}

async fn ends(connection: &mut SqliteConnection) -> Result<Ends, StoreError> {
    let fail = || StoreError::database("read the graph");
    let mut ends = Ends::default();
    let mut rows = sqlx::query("SELECT id, name FROM endpoints").fetch(connection);
    while let Some(row) = rows.try_next().await.map_err(fail())? {
        let (id, name): (i64, String) = (row.try_get(0).map_err(fail())?, row.try_get(1).map_err(fail())?);
        let endpoint = name.parse().map_err(|e: policy::workload::NotAnEndpoint| StoreError::Unreadable {
            kind: "endpoint",
            why: e.to_string(),
            name,
        })?;
        ends.insert(id, endpoint)?;
    }
    Ok(ends)
}

/// Hands on every run, the largest first: most of what the others hold is in it.
async fn read_runs(connection: &mut SqliteConnection, to: tokio::sync::mpsc::Sender<Numbered>) -> Result<(), StoreError> {
    let fail = || StoreError::database("read the graph");
    let mut rows = sqlx::query("SELECT id, node, edges, packed FROM runs ORDER BY edges DESC").fetch(connection);
    while let Some(row) = rows.try_next().await.map_err(fail())? {
        let number = |column: usize| row.try_get::<i64, _>(column).map_err(fail());
        let packed: &[u8] = row.try_get(3).map_err(fail())?;
        let run = (number(0)?, Run { node: number(1)?, edges: number(2)?, packed: packed.to_vec() });
        // Nobody takes it: what was before cannot be read, and that is what will be said.
        if to.send(run).await.is_err() {
            break;
        }
    }
    Ok(())
}

fn unpack(mut from: tokio::sync::mpsc::Receiver<Numbered>, to: &SyncSender<Unpacked>) {
    while let Some((id, Run { node, edges, packed })) = from.blocking_recv() {
        let unpacked = run::read(node, edges, &packed).map_err(|broken| unreadable(id, broken)).and_then(|mut reader| {
            loop {
                let some = reader.by_ref().take(HANDED_ON).collect::<Result<Vec<_>, _>>().map_err(|broken| unreadable(id, broken))?;
                if some.is_empty() {
                    return Ok(true);
                }
                if to.send(Ok((id, some))).is_err() {
                    return Ok(false);
                }
            }
        });
        match unpacked {
            Ok(true) => {}
            // The other side has found something it cannot read.
            Ok(false) => return,
            Err(error) => {
                let _ = to.send(Err(error));
                return;
            }
        }
    }
}

fn build(mut ends: Ends, room: usize, from: &Receiver<Unpacked>) -> Result<FlowGraph, StoreError> {
    let mut graph = FlowGraph::new();
    graph.reserve(room);
    for unpacked in from {
        let (id, edges) = unpacked?;
        for (Row { client, server, protocol, port, direction_known }, seen) in edges {
            let nameless = || unreadable(id, "an end has no name");
            let client = ends.place(&mut graph, client).ok_or_else(nameless)?;
            let server = ends.place(&mut graph, server).ok_or_else(nameless)?;
            graph.add_between((client, server), Service { protocol: Protocol::from_number(protocol), port }, direction_known, seen);
        }
    }
    Ok(graph)
}
