//! What the tracker remembers of flows that are over: to know a late answer, the rest of a flow whose entry was flushed, and
//! one-packet UDP that comes again. Bounded in time and in number.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use hashbrown::HashTable;
use jiff::{SignedDuration, Timestamp};

use super::sight::{FlowId, Sight};
use crate::flow::{FlowOutcome, Tuple};
use crate::hash::{QuickMap, QuickState};
use crate::service::Protocol;

/// How long after the end of its entry a UDP flow may be answered, or a flushed connection go on: the kernel's own time-out of
/// a UDP stream (120 s, nf_conntrack_udp_timeout_stream) and as much as people set statsd intervals to (60 s).
pub(super) const WINDOW: SignedDuration = SignedDuration::from_secs(180);

/// How long a silent UDP packet waits for its repetition: what reports by the hour is seen to repeat.
const REPETITION: SignedDuration = SignedDuration::from_secs(2 * 3600);

/// Flows remembered at most; beyond that the oldest go first. Some 20 MB.
const CAPACITY: usize = 65_536;

/// A flow whose kernel entry is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ending {
    pub(super) flow: FlowId,
    /// What its packets look like from the client, and from the server.
    pub(super) forward: Tuple,
    pub(super) backward: Tuple,
    pub(super) outcome: Option<FlowOutcome>,
}

impl Ending {
    /// What it is found by.
    fn keys(&self) -> impl Iterator<Item = Tuple> {
        let (forward, backward) = (unordered(self.forward), unordered(self.backward));
        std::iter::once(forward).chain((backward != forward).then_some(backward))
    }
}

/// The same for both directions: where nothing is rewritten, one key finds the flow either way.
fn unordered(tuple: Tuple) -> Tuple {
    let turned = (tuple.destination, tuple.destination_port) < (tuple.source, tuple.source_port);
    if turned { tuple.reversed() } else { tuple }
}

#[derive(Debug, Default)]
pub(super) struct Past {
    /// By the hash of the two ends of either side: which of `flows`, counted from the first there ever was. Without the keys it is
    /// small enough to stay in the processor's cache; they stand with the flows.
    by_ends: HashTable<(u64, u64)>,
    /// In the order in which they ended; `None`: it went on, or is forgotten.
    flows: VecDeque<Option<(Timestamp, Ending)>>,
    /// How many were let go at the front.
    gone: u64,
    hasher: QuickState,
}

impl Past {
    /// Remembers a flow that is over and may go on.
    pub(super) fn close(&mut self, ending: &Ending, now: Timestamp, out: &mut Vec<Sight>) {
        for key in ending.keys() {
            if let Some(before) = self.find(&key) {
                self.drop_flow(before, out);
            }
        }
        let place = self.gone + self.flows.len() as u64;
        for key in ending.keys() {
            let hash = self.hasher.hash_one(key);
            self.by_ends.insert_unique(hash, (hash, place), |(hash, _)| *hash);
        }
        self.flows.push_back(Some((now, *ending)));
        while self.flows.len() > CAPACITY {
            self.drop_oldest(out);
        }
    }

    fn at(&self, place: u64) -> Option<&Ending> {
        let at = usize::try_from(place.checked_sub(self.gone)?).ok()?;
        self.flows.get(at)?.as_ref().map(|(_, ending)| ending)
    }

    fn find(&self, key: &Tuple) -> Option<u64> {
        let wanted = self.hasher.hash_one(key);
        let is_it =
            |&(hash, place): &(u64, u64)| hash == wanted && self.at(place).is_some_and(|ending| ending.keys().any(|one| one == *key));
        self.by_ends.find(wanted, is_it).map(|(_, place)| *place)
    }

    fn take(&mut self, place: u64) -> Option<Ending> {
        let at = usize::try_from(place.checked_sub(self.gone)?).ok()?;
        let (_, ending) = self.flows.get_mut(at)?.take()?;
        for key in ending.keys() {
            if let Ok(found) = self.by_ends.find_entry(self.hasher.hash_one(key), |(_, found)| *found == place) {
                found.remove();
            }
        }
        Some(ending)
    }

    fn drop_flow(&mut self, place: u64, out: &mut Vec<Sight>) {
        if let Some(ending) = self.take(place) {
            out.push(Sight::Closed { flow: ending.flow });
        }
    }

    fn drop_oldest(&mut self, out: &mut Vec<Sight>) {
        self.drop_flow(self.gone, out);
        self.flows.pop_front();
        self.gone += 1;
    }

    /// The flow that a new entry with this first packet goes on with; whether it runs against it; what was said of it.
    pub(super) fn resume(&mut self, first: &Tuple) -> Option<(FlowId, bool, Option<FlowOutcome>)> {
        let place = self.find(&unordered(*first))?;
        let ending = self.at(place)?;
        let reversed = ending.backward == *first;
        // The same way again is another flow of UDP: the same socket after a pause.
        let goes_on = reversed || (ending.forward == *first && first.protocol != Protocol::Udp);
        if !goes_on {
            return None;
        }
        self.take(place).map(|ending| (ending.flow, reversed, ending.outcome))
    }

    pub(super) fn forget(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        let over = |ended: &Option<(Timestamp, Ending)>| ended.as_ref().is_none_or(|(ended, _)| now.duration_since(*ended) >= WINDOW);
        while self.flows.front().is_some_and(over) {
            self.drop_oldest(out);
        }
    }
}

/// UDP senders that nobody answered, by client, server and port.
#[derive(Debug, Default)]
pub(super) struct Silent(QuickMap<Tuple, Timestamp>);

impl Silent {
    /// Remembers one more; true if it is not the first.
    pub(super) fn again(&mut self, tuple: &Tuple, now: Timestamp) -> bool {
        let key = Tuple { source_port: 0, ..*tuple };
        if self.0.len() >= CAPACITY && !self.0.contains_key(&key) {
            // A scan fills it: what is lost is only that a repetition is known one packet later.
            self.0.clear();
        }
        self.0.insert(key, now).is_some()
    }

    pub(super) fn forget(&mut self, now: Timestamp) {
        self.0.retain(|_, last| now.duration_since(*last) < REPETITION);
    }
}
