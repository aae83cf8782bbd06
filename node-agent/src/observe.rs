//! What the kernel saw: conntrack events and dumps, NFLOG records, as [`Fact`]s with names. What was lost is counted.
//!
//! [`Observer::start`] switches on what the kernel needs to tell (a table of our own, three sysctls, the switches of the engine's
//! bridges), reads in one thread, and in another folds events into flows ([`policy::track`]) and names them from the inventory
//! ([`policy::attribute`]). [`Observer::stop`] puts everything back. It decides nothing and keeps no graph.
//!
//! Everything is opened in the network namespace of the thread that calls `start`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::eventfd::{EfdFlags, EventFd};
use policy::attribute::Fact;
use tokio::sync::{mpsc, watch};

use crate::inventory::Snapshot;

pub mod conntrack;
mod links;
mod listening;
pub mod netfilter;
pub mod nflog;
mod reader;
mod ring;
mod room;
pub mod switches;
pub mod table;
mod worker;

pub use links::Calls;
pub use room::Limits;
pub use switches::Originals;

use links::Links;
use reader::{Outlet, Reader};
use ring::Ring;
use switches::{Keep, SwitchError};
use table::{Table, TableError};
use worker::Worker;

/// Batches between the two threads; beyond that the kernel's buffer fills, and what it can't hold is counted as lost.
const BATCHES: usize = 256;
/// Emptied ones that are kept: more lie about only after a burst, some 200 kB each when full.
const SPARE: usize = 16;
/// Batches of facts on their way to the agent, each of what one batch of events came to; beyond that the observer waits for it.
const FACTS: usize = 64;

/// How to observe.
#[expect(missing_debug_implementations, reason = "holds a closure")]
pub struct Options {
    /// How the host was before an agent that did not get to put it back.
    pub originals: Originals,
    /// Keeps the originals where they survive a crash, before anything is changed.
    pub keep: Box<Keep<'static>>,
    /// Bytes of the kernel's buffer for events: 1,280 an event; with 32 MB no loss at 200,000 new flows a second, at 8 MB some
    /// (measured).
    pub buffer: usize,
    /// How often the table is read for flows that go on. Stretched if reading it takes long.
    pub sweep: Duration,
    /// Bridges that are filtered: their connections are tracked whatever there is room for.
    pub filtered: watch::Receiver<BTreeSet<String>>,
    /// When to stop tracking for the sake of learning.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        let keep: Box<Keep<'static>> = Box::new(|_| Ok(()));
        Self {
            originals: Originals::default(),
            keep,
            buffer: 32 * 1024 * 1024,
            sweep: Duration::from_secs(10),
            // The sender is gone: nothing is filtered, and stays so.
            filtered: watch::channel(BTreeSet::new()).1,
            limits: Limits::default(),
        }
    }
}

/// What the observer can say of its own sight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// When it began to listen.
    pub since: Option<Timestamp>,
    /// Kernel events and records read.
    pub events: u64,
    /// Kernel events and records lost, exactly.
    pub lost: u64,
    /// Dumps made because something was lost.
    pub repairs: u64,
    /// Flows of which an end could not be named.
    pub unattributed: u64,
    /// What was not understood, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Connections that are followed now, and flows that wait for a name.
    pub followed: (usize, usize),
    /// Connections in the kernel's table, and how many there may be.
    pub room: (u64, u64),
    /// Tracking for the sake of learning is stopped for want of room.
    pub restrained: bool,
    /// What others switched off and was switched on again, or took away and was put back.
    pub repaired: BTreeMap<String, u64>,
    /// Why it sees nothing, or not all, right now.
    pub blind: Vec<String>,
}

/// Why observation can't start.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The tracking table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The switches.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// A socket or a thread.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> ObserveError {
    move |source| ObserveError::Io { what, source }
}

/// A running observation. Dropped, it stops as [`Observer::stop`] does.
#[derive(Debug)]
pub struct Observer {
    account: Arc<Mutex<Account>>,
    originals: watch::Receiver<Originals>,
    stop: Arc<EventFd>,
    /// Whether the switches stay on at the end.
    stays: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Observer {
    /// Starts to observe in this thread's network namespace. Facts come as long as the receiver is read: an agent that doesn't
    /// read them makes the kernel's buffer overrun, and that is counted.
    ///
    /// # Errors
    /// No permission, another agent, or a kernel that can't; see [`ObserveError`].
    pub fn start(options: Options, snapshots: watch::Receiver<Arc<Snapshot>>) -> Result<(mpsc::Receiver<Vec<Fact>>, Self), ObserveError> {
        let Options { mut originals, mut keep, buffer, sweep, filtered, limits } = options;
        let links = Links::open().map_err(failed("watch the node's interfaces"))?;
        let switched_off = originals.switch_on(&mut keep)?;
        let prepared = Table::install().map_err(ObserveError::from).and_then(|table| {
            let reader = Reader::open(buffer).map_err(failed("listen to conntrack's events"))?;
            Ok((table, reader))
        });
        let (table, mut reader) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                // Nothing was begun: nothing stays.
                originals.put_back(&mut keep)?;
                return Err(error);
            }
        };
        let since = Timestamp::now();
        let mut blind = worker::lacks(table.features());
        if let Err(error) = reader.records(buffer) {
            blind.push(format!("denied packets are not seen: cannot read NFLOG: {error}"));
        }
        let stop = Arc::new(
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(io::Error::from)
                .map_err(failed("make an event"))?,
        );
        let (batches, taken) = sync_channel(BATCHES);
        let batches = Arc::new(batches);
        let (emptied, spare) = sync_channel(SPARE);
        let (facts, receiver) = mpsc::channel(FACTS);
        let (kept, originals_seen) = watch::channel(originals.clone());
        let account = Arc::new(Mutex::new(Account { since: Some(since), blind: blind.clone(), ..Account::default() }));
        let stays = Arc::new(AtomicBool::new(false));
        let worker = Worker::new(worker::Parts {
            stays: Arc::clone(&stays),
            ring: Ring::of(&batches, &snapshots, &filtered),
            batches: taken,
            emptied,
            facts,
            snapshots,
            account: Arc::clone(&account),
            links,
            table,
            originals,
            keep,
            kept,
            sweep,
            filtered,
            limits,
            since,
            blind,
            switched_off,
        });
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let body = || {
                crate::priority::wait_as_all_do();
                body();
            };
            thread::Builder::new().name(name.to_owned()).spawn(body).map_err(failed("start a thread"))
        };
        let told = Arc::clone(&stop);
        let threads = vec![
            spawn("observe-read", Box::new(move || reader.run(&told, &Outlet { batches, spare })))?,
            spawn("observe-work", Box::new(move || worker.run()))?,
        ];
        Ok((receiver, Self { account, originals: originals_seen, stop, stays, threads }))
    }

    /// What it can say of its own sight, now.
    pub fn account(&self) -> Account {
        self.account.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How the host was before, as far as it was changed.
    pub fn originals(&self) -> watch::Receiver<Originals> {
        self.originals.clone()
    }

    /// Stops and removes the table, and leaves the switches on: what is enforced depends on them. Blocks as [`Observer::stop`].
    pub fn leave(mut self) {
        self.stays.store(true, Ordering::Relaxed);
        self.finish();
    }

    /// Stops, removes the table, puts the switches back. Facts that were read before still come. Blocks until it is done: some
    /// milliseconds, unless facts wait to be taken.
    pub fn stop(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        // The reader ends, with it the batches, with them the worker, which puts everything back.
        let _ = self.stop.write(1);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the observer panicked");
            }
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.finish();
    }
}
