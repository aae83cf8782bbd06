//! The thread that makes facts of what was read: tracks, names, sweeps the table, keeps the switches on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use policy::attribute::{Attribution, Denial, Fact, Listening, Scene};
use policy::flow::{FlowOutcome, Tuple};
use policy::track::{Entry, Kind, Sight, Tracker};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, warn};

use super::links::Links;
use super::listening::Sockets;
use super::reader::Batch;
use super::ring::Ring;
use super::switches::{Gauges, Keep, Originals};
use super::table::{Features, Table};
use super::{Account, Limits, conntrack};
use crate::chain::chain;
use crate::inventory::Snapshot;

mod keep;

/// How often flows are named while some wait for it, and how often the rest is looked after while something is under way; while
/// nothing is, with each round. What was read, another inventory and news of an interface wake it at once.
const TURN: Duration = Duration::from_millis(25);
const SOON: Duration = Duration::from_millis(100);
/// How often sysctls and the table are looked at: what somebody switched off is on again within the second.
const ROUND: Duration = Duration::from_millis(500);
/// Reading the table may take at most one part in this many of the time.
const SHARE: u32 = 50;
/// A repair after loss may come as soon as this after the sweep before it.
const REPAIR_AFTER: Duration = Duration::from_secs(1);
/// For a dump the kernel looks through all the room of its table: 262,144 places in 15 ms where there is much memory. Where no more
/// connections than this are followed, each is asked for by itself (some 4 µs), and a dump is taken so many times more seldom, for what no
/// event told of.
const FEW: usize = 512;
const SELDOM: u32 = 30;
/// Retransmissions of a denied packet are one flow: TCP doubles its time-out from 1 s (RFC 6298), so the fifth comes after 31 s.
const SAME_DENIAL: SignedDuration = SignedDuration::from_secs(35);
/// Denied tuples remembered for that at most (some 20 MB): beyond it a retransmission may count as another flow.
const DENIALS: usize = 262_144;
/// Flows that wait for the engine's first answer at most (some 20 MB): beyond it they are named without.
const WITHOUT_ENGINE: usize = 65_536;

/// Events that are followed before what they say is named: it is in the first cache still.
const AT_ONCE: usize = 128;

/// What the worker works with.
pub(super) struct Parts {
    /// Whether the switches stay on at the end.
    pub(super) stays: Arc<AtomicBool>,
    pub(super) batches: Receiver<Batch>,
    /// What wakes it besides them.
    pub(super) ring: Ring,
    /// Takes back what batches were held in.
    pub(super) emptied: SyncSender<Vec<(Kind, Entry)>>,
    pub(super) facts: mpsc::Sender<Vec<Fact>>,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) account: Arc<Mutex<Account>>,
    pub(super) links: Links,
    pub(super) table: Table,
    pub(super) originals: Originals,
    pub(super) keep: Box<Keep<'static>>,
    pub(super) kept: watch::Sender<Originals>,
    pub(super) sweep: Duration,
    pub(super) filtered: watch::Receiver<BTreeSet<String>>,
    pub(super) limits: Limits,
    pub(super) since: Timestamp,
    pub(super) blind: Vec<String>,
    /// Sysctls that were found off, and were on when an agent lived last.
    pub(super) switched_off: Vec<&'static str>,
}

pub(super) struct Worker {
    parts: Parts,
    tracker: Tracker,
    attribution: Attribution,
    sockets: Sockets,
    sights: Vec<Sight>,
    out: Vec<Fact>,
    /// Denied tuples lately reported, with when they were last seen.
    denied: HashMap<(Tuple, FlowOutcome), Timestamp>,
    events: u64,
    lost: u64,
    repairs: u64,
    skipped: BTreeMap<&'static str, u64>,
    repaired: BTreeMap<String, u64>,
    /// What is wrong with a bridge, or with reading, until it isn't.
    wrong: BTreeMap<String, String>,
    room: (u64, u64),
    /// Nothing is tracked for learning alone.
    restrained: bool,
    swept: Instant,
    swept_in: Duration,
    /// When the whole table was read.
    dumped: Instant,
    loss_to_repair: bool,
    turned: Instant,
    rounded: Instant,
    /// Something changed that no turn has looked at.
    news: bool,
    /// `None`: they could not be opened yet.
    gauges: Option<Gauges>,
}

/// What this kernel can't show, for a person.
pub(super) fn lacks(features: Features) -> Vec<String> {
    let mut lacks = Vec::new();
    if !features.labels {
        lacks.push(
            "the kernel has no connection labels (NF_CONNTRACK_LABELS): an address is believed wherever its packet came from".to_owned(),
        );
    }
    if !features.payload {
        lacks.push(
            "the kernel can't tell payload (before 5.16): use of a TCP edge is seen from byte counts, up to a sweep later".to_owned(),
        );
    }
    lacks
}

impl Worker {
    pub(super) fn new(parts: Parts) -> Self {
        let repaired = parts.switched_off.iter().map(|name| ((*name).to_owned(), 1)).collect();
        let tracker = Tracker::new(parts.since, parts.table.features().payload);
        let now = Instant::now();
        Self {
            parts,
            tracker,
            attribution: Attribution::default(),
            sockets: Sockets::default(),
            sights: Vec::new(),
            out: Vec::new(),
            denied: HashMap::new(),
            events: 0,
            lost: 0,
            repairs: 0,
            skipped: BTreeMap::new(),
            repaired,
            wrong: BTreeMap::new(),
            room: (0, 0),
            restrained: false,
            swept: now,
            swept_in: Duration::ZERO,
            dumped: now,
            loss_to_repair: false,
            turned: now,
            rounded: now,
            news: false,
            gauges: None,
        }
    }

    /// Works until the reader is gone and all it read is done with; then puts everything back.
    pub(super) fn run(mut self) {
        self.lead_bridges_through();
        self.sweep();
        self.round();
        loop {
            self.news |= self.parts.ring.rang();
            let patience = self.patience();
            match self.parts.batches.recv_timeout(patience) {
                Ok(batch) => self.take(batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.turned.elapsed() >= TURN {
                self.turned = Instant::now();
                self.turn();
            }
            if !self.hand_over() {
                break;
            }
        }
        // What waits for a name still gets the time it needs; nobody reads any more, so this is bounded by the hold.
        let deadline = Instant::now() + Duration::from_millis(300);
        while self.attribution.waiting() > 0 && Instant::now() < deadline && !self.parts.facts.is_closed() {
            std::thread::sleep(TURN);
            self.resolve();
            if !self.hand_over() {
                break;
            }
        }
        self.report();
        let Parts { table, mut originals, mut keep, stays, .. } = self.parts;
        if let Err(error) = table.remove() {
            error!(%error, "the observation table could not be removed");
        }
        if stays.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = originals.put_back(&mut keep) {
            error!(%error, "a switch could not be put back as it was");
        }
    }

    /// How long until the next turn at the latest.
    fn patience(&self) -> Duration {
        if self.news || self.attribution.waiting() > 0 {
            TURN
        } else if self.loss_to_repair || !self.attribution.rests() {
            SOON
        } else {
            // In time for the next round, whenever the last turn was.
            ROUND.saturating_sub(self.rounded.elapsed()).max(TURN).min(self.parts.sweep.max(SOON))
        }
    }

    fn take(&mut self, batch: Batch) {
        self.news |= batch.is_empty();
        let Batch { read_at, mut events, denials, skipped, lost_events, lost_records, failed } = batch;
        self.events += (events.len() + denials.len()) as u64;
        for (reason, count) in skipped {
            *self.skipped.entry(reason).or_default() += count;
        }
        if lost_events + lost_records > 0 {
            self.lost += lost_events + lost_records;
            self.loss_to_repair |= lost_events > 0;
            warn!(lost_events, lost_records, "the kernel could not hand over all it saw");
        }
        if let Some(error) = failed {
            self.wrong.insert("read".to_owned(), format!("the kernel's events can't be read any more: {error}"));
        }
        for some in events.chunks(AT_ONCE) {
            self.tracker.feed_all(some, read_at, &mut self.sights);
            self.name_sights();
        }
        events.clear();
        // Nobody waits for it: the reader then makes another.
        let _ = self.parts.emptied.try_send(events);
        for denial in denials {
            self.deny(denial);
        }
    }

    fn deny(&mut self, denial: Denial) {
        let now = denial.wire.time;
        if self.denied.len() >= DENIALS {
            self.denied.clear();
        }
        let before = self.denied.insert((denial.wire.tuple, denial.outcome), now);
        if before.is_none_or(|before| now.duration_since(before) >= SAME_DENIAL) {
            self.attribution.deny(denial);
        }
    }

    fn name_sights(&mut self) {
        self.attribution.feed_all(&mut self.sights, &mut self.out);
    }

    /// What is done some times a second.
    fn turn(&mut self) {
        self.news = false;
        match self.parts.links.catch_up() {
            Ok(_) => {
                self.wrong.remove("links");
            }
            Err(error) => {
                self.wrong.insert("links".to_owned(), format!("the node's interfaces can't be watched: {error}"));
            }
        }
        self.restrain();
        self.lead_bridges_through();
        self.tracker.settle(Timestamp::now(), &mut self.sights);
        self.name_sights();
        self.resolve();
        let due = if self.loss_to_repair { REPAIR_AFTER } else { self.parts.sweep };
        if self.swept.elapsed() >= due.max(self.swept_in * SHARE) {
            let all = self.loss_to_repair || self.tracker.open() > FEW || self.dumped.elapsed() >= self.parts.sweep * SELDOM;
            if all { self.sweep() } else { self.look() }
        }
        if self.rounded.elapsed() >= ROUND {
            self.round();
        }
        self.report();
    }

    fn resolve(&mut self) {
        if self.attribution.rests() {
            return;
        }
        let snapshot = Arc::clone(&self.parts.snapshots.borrow());
        // An inventory that was never filled would make outsiders of the node's own containers, for as long as the record lasts.
        if snapshot.engine.is_empty() && self.attribution.waiting() < WITHOUT_ENGINE {
            return;
        }
        let scene = Scene::new(&snapshot.inventory, &snapshot.leases, self.parts.links.names());
        let sockets = &mut self.sockets;
        let mut asked = |listener, service| sockets.listens(listener, service);
        let listening: &mut Listening<'_> = &mut asked;
        self.attribution.resolve(&scene, listening, Timestamp::now(), &mut self.out);
    }

    /// Reads the whole table: what goes on, what was there before us, what was lost.
    fn sweep(&mut self) {
        let began = Instant::now();
        let repair = std::mem::take(&mut self.loss_to_repair);
        let now = Timestamp::now();
        self.tracker.begin_dump();
        let (tracker, sights, skipped) = (&mut self.tracker, &mut self.sights, &mut self.skipped);
        let feed = |entry: Entry| tracker.feed(Kind::Dump, &entry, now, sights);
        // A table without an entry has room for many thousands all the same, and the kernel looks through all of it.
        let empty = self.gauges.as_ref().and_then(Gauges::room).is_some_and(|(entries, _)| entries == 0);
        let read = if empty { Ok(()) } else { conntrack::dump(feed, |why| *skipped.entry(why.0).or_default() += 1) };
        match read {
            Ok(()) => {
                self.wrong.remove("dump");
                self.repairs += u64::from(repair);
                self.tracker.end_dump(now, &mut self.sights);
            }
            Err(error) => {
                self.loss_to_repair |= repair;
                self.wrong.insert("dump".to_owned(), format!("the table of connections can't be read: {error}"));
            }
        }
        (self.swept, self.dumped, self.swept_in) = (Instant::now(), began, began.elapsed());
        self.name_sights();
    }

    /// Asks for each connection that is followed. One that is not there has ended: its event tells, or the next dump.
    fn look(&mut self) {
        let began = Instant::now();
        let now = Timestamp::now();
        let keys: Vec<_> = self.tracker.followed().collect();
        let (tracker, sights, skipped) = (&mut self.tracker, &mut self.sights, &mut self.skipped);
        let feed = |entry: Entry| tracker.feed(Kind::Dump, &entry, now, sights);
        let read = if keys.is_empty() { Ok(()) } else { conntrack::look_up(&keys, feed, |why| *skipped.entry(why.0).or_default() += 1) };
        if let Err(error) = read {
            // The dump of the same instant says what is wrong, or serves as well.
            debug!(%error, "connections can't be asked for one by one");
            return self.sweep();
        }
        self.tracker.forget(now, &mut self.sights);
        (self.swept, self.swept_in) = (Instant::now(), began.elapsed());
        self.name_sights();
    }

    /// What is done once a second.
    fn round(&mut self) {
        self.rounded = Instant::now();
        if self.gauges.is_none() {
            self.gauges = Gauges::open().ok();
        }
        self.sockets.forget();
        let now = Timestamp::now();
        self.denied.retain(|_, last| now.duration_since(*last) < SAME_DENIAL);
        let on = self.gauges.as_ref().is_some_and(Gauges::are_on) && !self.wrong.contains_key("sysctl");
        let Parts { originals, keep, kept, .. } = &mut self.parts;
        match if on { Ok(Vec::new()) } else { originals.switch_on(keep) } {
            Ok(changed) => {
                self.wrong.remove("sysctl");
                // What began while the kernel told nothing is in the table.
                self.loss_to_repair |= !changed.is_empty();
                for name in changed {
                    warn!(name, "somebody switched a sysctl back; switched on again");
                    *self.repaired.entry(name.to_owned()).or_default() += 1;
                    kept.send_replace(originals.clone());
                }
            }
            Err(error) => {
                self.wrong.insert("sysctl".to_owned(), chain(&error));
            }
        }
        if !self.restrained || !self.parts.filtered.borrow().is_empty() {
            self.keep_table(true);
        }
    }

    fn report(&self) {
        let mut skipped: BTreeMap<String, u64> = self.skipped.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect();
        if self.parts.links.skipped() > 0 {
            skipped.insert("a message about an interface could not be read".to_owned(), self.parts.links.skipped());
        }
        let account = Account {
            since: Some(self.parts.since),
            events: self.events,
            lost: self.lost,
            repairs: self.repairs,
            unattributed: self.attribution.unattributed(),
            skipped,
            followed: (self.tracker.open(), self.attribution.waiting()),
            room: self.room,
            restrained: self.restrained,
            repaired: self.repaired.clone(),
            blind: self.parts.blind.iter().chain(self.wrong.values()).cloned().collect(),
        };
        *self.parts.account.lock().unwrap_or_else(PoisonError::into_inner) = account;
    }

    /// Hands the facts over; false: nobody takes them any more.
    fn hand_over(&mut self) -> bool {
        if self.out.is_empty() {
            return true;
        }
        // As many will come again: growing by and by copies them all.
        let room = Vec::with_capacity(self.out.len());
        self.parts.facts.blocking_send(std::mem::replace(&mut self.out, room)).is_ok()
    }
}
