//! What the tracker remembers of flows that are over: to know a late answer, the rest of a flow whose entry was flushed, and
//! one-packet UDP that comes again. Bounded in time and in number.

use std::collections::VecDeque;
use std::net::IpAddr;

use jiff::SignedDuration;

use super::sight::FlowId;
use super::slot::Moment;
use crate::flow::{FlowOutcome, Tuple};
use crate::hash::{QuickMap, SerialMap};

/// How long after the end of its entry a UDP flow may be answered, or a flushed connection go on: the kernel's own time-out of
/// a UDP stream (120 s, nf_conntrack_udp_timeout_stream) and as much as people set statsd intervals to (60 s).
pub(super) const WINDOW: SignedDuration = SignedDuration::from_secs(180);

/// How long a silent UDP packet waits for its repetition: what reports by the hour is seen to repeat.
const REPETITION: SignedDuration = SignedDuration::from_secs(2 * 3600);

/// Flows remembered at most; beyond that the oldest go first. Some 7 MB.
const CAPACITY: usize = 65_536;

/// Whether one moment is at least so long before another.
fn since(earlier: Moment, now: Moment) -> SignedDuration {
    SignedDuration::from_nanos(now.0.saturating_sub(earlier.0))
}

/// A flow whose kernel entry is gone; the rest of it stands where it stood.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) flow: FlowId,
    pub(super) ended: Moment,
    pub(super) hash: u64,
    pub(super) slot: u32,
    /// Its answers are not its first packet turned round.
    pub(super) rewritten: bool,
}

/// A flow that goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resumed {
    pub(super) flow: FlowId,
    /// The new entry runs against it.
    pub(super) reversed: bool,
    /// What was said of it.
    pub(super) outcome: Option<FlowOutcome>,
}

/// The order in which they ended.
#[derive(Debug, Default)]
pub(super) struct Past {
    /// `None`: it went on, or is forgotten.
    line: VecDeque<Option<Ended>>,
    /// The number of the first in line; numbers go round.
    first: u32,
    living: usize,
    /// What answers look like where the connection was rewritten, by slot, and which slot it is by the hash of that.
    answers: QuickMap<u32, (u64, Tuple)>,
    by_answer: QuickMap<u64, Vec<u32>>,
    /// First packets of flows whose entry runs against them.
    turned: SerialMap<Tuple>,
}

impl Past {
    pub(super) fn is_empty(&self) -> bool {
        self.living == 0
    }

    pub(super) fn is_over_full(&self) -> bool {
        self.line.len() > CAPACITY
    }

    /// Remembers one; under which number.
    pub(super) fn push(&mut self, ended: Ended, answer: Option<(u64, Tuple)>) -> u32 {
        if let Some((hash, reply)) = answer {
            self.answers.insert(ended.slot, (hash, reply));
            self.by_answer.entry(hash).or_default().push(ended.slot);
        }
        self.line.push_back(Some(ended));
        self.living += 1;
        let place = u32::try_from(self.line.len() - 1).expect("there are never more than CAPACITY and one");
        self.first.wrapping_add(place)
    }

    fn let_go(&mut self, ended: &Ended) {
        self.living -= 1;
        if ended.rewritten
            && let Some((hash, _)) = self.answers.remove(&ended.slot)
            && let std::collections::hash_map::Entry::Occupied(mut slots) = self.by_answer.entry(hash)
        {
            slots.get_mut().retain(|slot| *slot != ended.slot);
            if slots.get().is_empty() {
                slots.remove();
            }
        }
    }

    /// Takes one out by its number.
    pub(super) fn take(&mut self, number: u32) -> Option<Ended> {
        let ended = self.line.get_mut(number.wrapping_sub(self.first) as usize)?.take()?;
        self.let_go(&ended);
        Some(ended)
    }

    /// Takes the oldest out, if it is still there.
    pub(super) fn pop(&mut self) -> Option<Ended> {
        let ended = self.line.pop_front()?;
        self.first = self.first.wrapping_add(1);
        self.let_go(ended.as_ref()?);
        ended
    }

    pub(super) fn has_one_too_old(&self, now: Moment) -> bool {
        self.line.front().is_some_and(|ended| ended.is_none_or(|ended| since(ended.ended, now) >= WINDOW))
    }

    /// The slot of one that was rewritten and whose answers have these two ends.
    pub(super) fn answered_by(&self, hash: u64, tuple: &Tuple) -> Option<u32> {
        if self.answers.is_empty() {
            return None;
        }
        let turned = tuple.reversed();
        let is_it = |slot: &&u32| self.answers.get(slot).is_some_and(|(_, reply)| reply == tuple || *reply == turned);
        self.by_answer.get(&hash)?.iter().find(is_it).copied()
    }

    /// What the answers of one look like, if it was rewritten.
    pub(super) fn answer(&self, slot: u32) -> Option<Tuple> {
        if self.answers.is_empty() { None } else { self.answers.get(&slot).map(|(_, reply)| *reply) }
    }

    /// The entry of a flow runs against it from now on; its first packet was this.
    pub(super) fn turn(&mut self, flow: FlowId, first: Tuple) {
        self.turned.entry(flow).or_insert(first);
    }

    pub(super) fn turned(&self, flow: FlowId) -> Option<Tuple> {
        if self.turned.is_empty() { None } else { self.turned.get(&flow).copied() }
    }

    pub(super) fn closed(&mut self, flow: FlowId) {
        if !self.turned.is_empty() {
            self.turned.remove(&flow);
        }
    }
}

/// UDP senders that nobody answered, by client, server and port; with when that was.
#[derive(Debug, Default)]
pub(super) struct Silent {
    /// Of IPv4: both addresses, and protocol and port.
    narrow: QuickMap<(u64, u32), Moment>,
    wide: QuickMap<Tuple, Moment>,
}

impl Silent {
    /// Remembers one more; true if it is not the first.
    pub(super) fn again(&mut self, tuple: &Tuple, now: Moment) -> bool {
        let Tuple { source, destination, protocol, destination_port, .. } = *tuple;
        let full = self.narrow.len() + self.wide.len() >= CAPACITY;
        // A scan fills it: what is lost is only that a repetition is known one packet later.
        if let (IpAddr::V4(source), IpAddr::V4(destination)) = (source, destination) {
            let addresses = u64::from(source.to_bits()) << 32 | u64::from(destination.to_bits());
            let key = (addresses, u32::from(protocol.number()) << 16 | u32::from(destination_port));
            if full && !self.narrow.contains_key(&key) {
                self.clear();
            }
            return self.narrow.insert(key, now).is_some();
        }
        let key = Tuple { source_port: 0, ..*tuple };
        if full && !self.wide.contains_key(&key) {
            self.clear();
        }
        self.wide.insert(key, now).is_some()
    }

    fn clear(&mut self) {
        self.narrow.clear();
        self.wide.clear();
    }

    pub(super) fn forget(&mut self, now: Moment) {
        self.narrow.retain(|_, last| since(*last, now) < REPETITION);
        self.wide.retain(|_, last| since(*last, now) < REPETITION);
    }
}
