//! The thread that owns the spool: it writes what was recorded, at once where an edge is new and each second otherwise, and hands out
//! numbered batches. A thread and not a task, because the disk may stall and nothing else should.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use policy::{EdgeDelta, EdgeKey, Evidence, Health, wire};
use tokio::sync::{Notify, oneshot};
use tracing::{error, info};

use super::spool::{Spool, SpoolError, flows};

/// What the thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    /// An edge that was never seen is in the inbox.
    Wake,
    /// Something that may wait is in the inbox, which was empty.
    Begun,
    /// Who are we for the controller?
    Introduce(oneshot::Sender<Introduction>),
    /// The controller has this; what is to be sent again? `None`: the spool has a new id, begin the session again.
    Resume(u64, oneshot::Sender<Result<Option<Vec<wire::Batch>>, SpoolError>>),
    /// Number what waits.
    Seal(oneshot::Sender<Result<Option<wire::Batch>, SpoolError>>),
    /// The controller has everything up to this.
    Acknowledged(u64),
    /// Write everything, then answer.
    Flush(oneshot::Sender<()>),
    /// Write everything, then answer and end.
    Stop(oneshot::Sender<()>),
}

/// The spool in the words of a greeting.
#[derive(Debug)]
pub(super) struct Introduction {
    pub(super) spool: String,
    pub(super) first_unsent: u64,
}

/// Recorded and not yet with the spool.
#[derive(Debug, Default)]
struct Inbox {
    /// Edges that were not seen before, to be written at once.
    fresh: HashMap<EdgeKey, Evidence>,
    /// More of edges seen before, to be written each second.
    more: HashMap<EdgeKey, Evidence>,
    /// Hashes of edges written already. Two edges with one hash (once in 10^7 runs with a million edges): the second is written a
    /// second later.
    known: HashSet<u64>,
    hasher: RandomState,
    stretches: Vec<Health>,
    lost: u64,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.more.is_empty() && self.stretches.is_empty() && self.lost == 0
    }
}

/// The side of the inbox that everybody may hold.
#[derive(Clone, Debug)]
pub(super) struct Desk {
    inbox: Arc<Mutex<Inbox>>,
    commands: Sender<Command>,
    room: usize,
    /// Rings when something comes into the inbox that was empty.
    pub(super) begun: Arc<Notify>,
}

impl Desk {
    pub(super) fn new(commands: Sender<Command>, room: usize) -> Self {
        Self { inbox: Arc::default(), commands, room, begun: Arc::default() }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // The inbox is whole after every statement; a panic elsewhere doesn't spoil it.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command; false if the thread has ended.
    pub(super) fn send(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }

    /// Nobody looks into an inbox in which nothing is: on a quiet host that would be most of what there is to do.
    fn begin(&self, inbox: &Inbox) {
        if inbox.is_empty() {
            self.send(Command::Begun);
            self.begun.notify_one();
        }
    }

    pub(super) fn record(&self, delta: EdgeDelta) {
        let mut inbox = self.inbox();
        let inbox = &mut *inbox;
        self.begin(inbox);
        if let Some(seen) = inbox.more.get_mut(&delta.key).or_else(|| inbox.fresh.get_mut(&delta.key)) {
            seen.merge(&delta.seen);
            return;
        }
        if inbox.fresh.len() + inbox.more.len() >= self.room {
            inbox.lost = inbox.lost.saturating_add(flows(&delta.seen));
            return;
        }
        let hash = inbox.hasher.hash_one(&delta.key);
        if inbox.known.contains(&hash) {
            inbox.more.insert(delta.key, delta.seen);
            return;
        }
        if inbox.known.len() >= self.room {
            inbox.known.clear();
        }
        inbox.known.insert(hash);
        let first = inbox.fresh.is_empty();
        inbox.fresh.insert(delta.key, delta.seen);
        if first {
            self.send(Command::Wake);
        }
    }

    pub(super) fn health(&self, stretch: Health) {
        let mut inbox = self.inbox();
        self.begin(&inbox);
        match inbox.stretches.last_mut() {
            Some(last) if last.continues_as(&stretch) => last.join(&stretch),
            Some(_) | None => inbox.stretches.push(stretch),
        }
    }
}

/// How the thread works, and whom it tells.
pub(super) struct Keeper {
    pub(super) spool: Spool,
    pub(super) desk: Desk,
    pub(super) commands: Receiver<Command>,
    /// How often counters are written.
    pub(super) every: Duration,
    /// Rings when an edge was written that was not known.
    pub(super) news: Arc<Notify>,
    /// Why the spool cannot be written right now.
    pub(super) trouble: Arc<Mutex<Option<String>>>,
}

impl Keeper {
    /// Works until it is told to stop, or until nobody can ask any more.
    pub(super) fn run(mut self) {
        crate::priority::wait_as_all_do();
        // When to write what may wait; `None`: nothing does.
        let mut next: Option<Instant> = None;
        loop {
            let command = match next {
                Some(next) => self.commands.recv_timeout(next.saturating_duration_since(Instant::now())),
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(Command::Begun) => drop(next.get_or_insert_with(|| Instant::now() + self.every)),
                Ok(Command::Wake) => {
                    let fresh = std::mem::take(&mut self.desk.inbox().fresh);
                    self.note(|spool| spool.take(fresh, []));
                    self.news.notify_one();
                }
                Ok(Command::Introduce(reply)) => {
                    let _ = reply.send(Introduction { spool: self.spool.id().to_owned(), first_unsent: self.spool.first_unsent() });
                }
                Ok(Command::Resume(acknowledged, reply)) => {
                    let outcome = self.spool.resume(acknowledged);
                    let _ = reply.send(outcome.map(|renamed| (!renamed).then(|| self.spool.batches().cloned().collect())));
                }
                Ok(Command::Seal(reply)) => {
                    self.write_all();
                    let _ = reply.send(self.spool.seal());
                }
                Ok(Command::Acknowledged(seq)) => self.note(|spool| spool.acknowledged(seq)),
                Ok(Command::Flush(reply)) => {
                    self.write_all();
                    let _ = reply.send(());
                }
                Ok(Command::Stop(reply)) => {
                    self.write_all();
                    let _ = reply.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.write_all();
                    next = None;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.write_all();
                    return;
                }
            }
            // What the disk did not take is tried again.
            if next.is_none() && self.trouble.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                next = Some(Instant::now() + self.every);
            }
        }
    }

    fn write_all(&mut self) {
        let (fresh, more, stretches, lost) = {
            let mut inbox = self.desk.inbox();
            let inbox = &mut *inbox;
            (
                std::mem::take(&mut inbox.fresh),
                std::mem::take(&mut inbox.more),
                std::mem::take(&mut inbox.stretches),
                std::mem::take(&mut inbox.lost),
            )
        };
        self.spool.lose(lost);
        self.note(|spool| spool.take(fresh.into_iter().chain(more), stretches));
    }

    /// Tries to write, and keeps for others to read why it failed. Said once in the log, not each second.
    fn note(&mut self, write: impl FnOnce(&mut Spool) -> Result<(), SpoolError>) {
        let found = write(&mut self.spool).err().map(|e| super::chain(&e));
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match (&found, &*trouble) {
            (Some(why), None) => error!(%why, "the spool cannot be written; what is seen is kept in memory"),
            (None, Some(_)) => info!("the spool is written again"),
            (Some(_), Some(_)) | (None, None) => {}
        }
        *trouble = found;
    }
}
