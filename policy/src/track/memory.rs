//! What the tracker remembers of flows that are over: to know a late answer, the rest of a flow whose entry was flushed, and
//! one-packet UDP that comes again. Bounded in time and in number.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};

use super::sight::{FlowId, Sight};
use crate::flow::{FlowOutcome, Tuple};

/// How long after the end of its entry a UDP flow may be answered, or a flushed connection go on: the kernel's own time-out of
/// a UDP stream (120 s, nf_conntrack_udp_timeout_stream) and as much as people set statsd intervals to (60 s).
const WINDOW: SignedDuration = SignedDuration::from_secs(180);

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
    pub(super) resumable: bool,
}

#[derive(Debug, Default)]
pub(super) struct Past {
    /// By either tuple; true: it runs against the flow.
    by_tuple: HashMap<Tuple, (FlowId, bool)>,
    flows: HashMap<FlowId, (Timestamp, Ending)>,
    ended: VecDeque<(Timestamp, FlowId)>,
}

impl Past {
    /// A flow is over: says so, or remembers it if it may go on.
    pub(super) fn close(&mut self, ending: &Ending, now: Timestamp, out: &mut Vec<Sight>) {
        if !ending.resumable {
            out.push(Sight::Closed { flow: ending.flow });
            return;
        }
        for (tuple, reversed) in [(ending.forward, false), (ending.backward, true)] {
            if let Some((before, _)) = self.by_tuple.insert(tuple, (ending.flow, reversed)).filter(|(before, _)| *before != ending.flow) {
                self.drop_flow(before, out);
                self.by_tuple.insert(tuple, (ending.flow, reversed));
            }
        }
        self.flows.insert(ending.flow, (now, *ending));
        self.ended.push_back((now, ending.flow));
        while self.flows.len() > CAPACITY
            && let Some((_, oldest)) = self.ended.pop_front()
        {
            self.drop_flow(oldest, out);
        }
    }

    fn drop_flow(&mut self, flow: FlowId, out: &mut Vec<Sight>) {
        if let Some((_, ending)) = self.flows.remove(&flow) {
            for tuple in [ending.forward, ending.backward] {
                if self.by_tuple.get(&tuple).is_some_and(|(found, _)| *found == flow) {
                    self.by_tuple.remove(&tuple);
                }
            }
            out.push(Sight::Closed { flow });
        }
    }

    /// The flow that a new entry with this first packet goes on with; whether it runs against it; what was said of it.
    pub(super) fn resume(&mut self, first: &Tuple) -> Option<(FlowId, bool, Option<FlowOutcome>)> {
        let (flow, reversed) = *self.by_tuple.get(first)?;
        // The same way again is another flow of UDP: the same socket after a pause.
        if !reversed && first.protocol == crate::service::Protocol::Udp {
            return None;
        }
        let (_, ending) = self.flows.remove(&flow)?;
        for tuple in [ending.forward, ending.backward] {
            self.by_tuple.remove(&tuple);
        }
        Some((flow, reversed, ending.outcome))
    }

    pub(super) fn forget(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        while let Some(&(ended, flow)) = self.ended.front()
            && now.duration_since(ended) >= WINDOW
        {
            self.ended.pop_front();
            // Unless it went on and ended again since.
            if self.flows.get(&flow).is_some_and(|(last, _)| *last == ended) {
                self.drop_flow(flow, out);
            }
        }
    }
}

/// UDP senders that nobody answered, by client, server and port.
#[derive(Debug, Default)]
pub(super) struct Silent(HashMap<(IpAddr, IpAddr, u16), Timestamp>);

impl Silent {
    /// Remembers one more; true if it is not the first.
    pub(super) fn again(&mut self, tuple: &Tuple, now: Timestamp) -> bool {
        let key = (tuple.source, tuple.destination, tuple.destination_port);
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
