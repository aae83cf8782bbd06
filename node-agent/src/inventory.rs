//! What runs on this node and where: the engine joined with rtnetlink, kept current.
//!
//! One task owns the facts and publishes a [`Snapshot`] whenever it differs from the last. It asks the engine through whatever
//! socket it is given (our filter, in production), decides nothing, and names nobody by an address: that is for `policy::attribute`.
//!
//! # Why
//! The engine tells of a container's start after the container's first packet, but of `network connect` 13 ms (0.2 s on 20.10)
//! before it. At that moment container inspect blocks, network inspect has the address and the container list the labels: these two
//! are joined, the rest follows when the container runs. Where the kernel tells earlier whose a port is ([`ahead`]), that counts until then.

use std::path::PathBuf;
use std::sync::Arc;

use policy::Inventory;
use policy::lease::LeaseBook;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub mod endpoint;

mod ahead;
mod daemon;
mod ended;
pub(crate) mod engine;
mod events;
pub(crate) mod facts;
mod inhabitants;
mod inspects;
mod joins;
mod links;
mod namespace;
mod resolvers;
mod task;
mod told;

pub(crate) use daemon::roots as data_roots;
pub use joins::Join;
pub use links::LinksError;

/// The node at one moment. Published as `watch::Receiver<Arc<Snapshot>>`, only when something changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// What runs, and where.
    pub inventory: Arc<Inventory>,
    /// Who held which address when.
    pub leases: LeaseBook,
    /// Why this may be out of date or incomplete; empty: it is not.
    pub blind: Vec<String>,
    /// What a person should know and what stops nothing: a label that can't be read, a resolver that is not believed.
    pub notes: Vec<String>,
    /// The engine's version; empty until it was reached.
    pub engine: String,
    /// Who joined a bridge within the last seconds, in the order of their numbers.
    pub joins: Vec<Join>,
}

/// Where to look.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket to ask: the engine's, or our filter's before it.
    pub socket: PathBuf,
    /// The engine's own socket, which a container must not have mounted; the default path is always among them.
    pub engine_sockets: Vec<PathBuf>,
}

/// Why the inventory can't start. An engine that can't be reached is no reason: the snapshot says so, and it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The kernel's side is needed from the first moment.
    #[error("cannot watch the node's links")]
    Links(#[from] LinksError),
}

/// Starts the task; it ends when it is aborted or when the last receiver is gone. The first snapshot has the kernel's side and says
/// that the engine was not asked yet; wait for an empty `blind` to have both.
///
/// # Errors
/// The kernel's links can't be watched.
pub async fn start(options: Options) -> Result<(watch::Receiver<Arc<Snapshot>>, JoinHandle<()>), InventoryError> {
    let (links, watcher) = links::watch().await?;
    let (task, receiver) = task::Task::new(options, links);
    let handle = tokio::spawn(async move {
        task.run().await;
        watcher.abort();
    });
    Ok((receiver, handle))
}

/// See [`crate::fuzzing`].
#[cfg(any(fuzzing, test))]
pub(crate) use task::read_any;
