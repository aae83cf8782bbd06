//! Which endpoints a flow joins, at the moment it was captured. Leases come in as data; nothing is looked up here.
//!
//! [`Attribution`] takes the [`Sight`]s of the tracker and the kernel's records of denied packets, waits until the inventory has
//! caught up with the packet, names both ends once, and turns everything that is said of the flow into [`Fact`]s.
//!
//! # Why
//! The engine tells of a container some milliseconds around its first packet: a flow is named only after it has aged a little,
//! and with the time of its packet, so that the address of a stopped container is not blamed on it. An address that belongs to
//! nobody yet is waited for, then said to be unknown. The name is kept with the flow: a connection that ends an hour later is
//! not looked up again.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};
use smallvec::SmallVec;

use crate::evidence::Road;
use crate::flow::{Flow, FlowOutcome, Tuple};
use crate::hash::SerialMap;
use crate::track::{FlowId, Sight, Wire};

mod door;
mod edges;
mod ends;
mod fact;
mod waiting;

pub use ends::{Listener, Listening, Scene};
pub use fact::{Fact, Growth};

use door::Doors;
use edges::Edges;
use ends::Ends;
use waiting::{Queue, Waiting};

/// How long after its packet a flow is named: what the engine said before the packet has arrived by then (measured: address known
/// 2 ms after the event; 50 containers at once, 60-280 ms at the 99th percentile).
pub const SETTLE: SignedDuration = SignedDuration::from_millis(150);

/// How long an address that belongs to nobody is waited for.
pub const HOLD: SignedDuration = SignedDuration::from_secs(2);

/// Flows that are fetched from memory at once.
const RUN: usize = 32;

/// A record of a packet that the filter denied, or would have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// What was on the wire.
    pub wire: Wire,
    /// [`FlowOutcome::Denied`] or [`FlowOutcome::WouldDeny`].
    pub outcome: FlowOutcome,
    /// Which rule said so, in words.
    pub reason: String,
    /// The source address is a lie: whoever holds the port of the bridge sent it.
    pub forged: bool,
}

/// What is waiting to be said once the ends have names.
#[derive(Clone, Debug)]
enum Said {
    Went { outcome: FlowOutcome, time: Timestamp, sent: u64, received: u64, reason: String },
    Grew { time: Timestamp, sent: u64, received: u64 },
}

/// A flow with names. As small as it can be: there is one for each connection of the node, and each event asks for its own.
#[derive(Clone, Copy, Debug)]
struct Named {
    /// Its ends, by number.
    ends: u32,
    pre_existing: bool,
    is_use: bool,
}

/// A flow that is one of two with the user-land proxy between them.
#[derive(Clone, Debug)]
enum Proxied {
    /// The client's, with what is to be said once it is known what became of the leg behind it.
    Client(Vec<(Tuple, Said)>),
    /// It only carries on this flow of a client.
    Leg(FlowId),
}

/// Names flows.
#[derive(Debug, Default)]
pub struct Attribution {
    waiting: Queue,
    named: SerialMap<Named>,
    edges: Edges,
    /// What the user-land proxy has to do with some of them.
    proxied: SerialMap<Proxied>,
    doors: Doors,
    /// Clients of the proxy whose leg must show up, in order.
    expected: VecDeque<(Timestamp, FlowId)>,
    /// Denials have ids of their own, from the top down.
    denials: u64,
    unattributed: u64,
}

impl Attribution {
    /// Flows of which an end could not be named.
    pub fn unattributed(&self) -> u64 {
        self.unattributed
    }

    /// Flows that wait for names.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing waits: neither for a name nor for the proxy's own leg.
    pub fn rests(&self) -> bool {
        self.waiting.len() == 0 && self.expected.is_empty()
    }

    /// Takes what the tracker says, one by one as [`Attribution::feed`].
    pub fn feed_all(&mut self, sights: &mut Vec<Sight>, out: &mut Vec<Fact>) {
        for run in sights.chunks(RUN) {
            // Several are fetched from memory at once; see the tracker.
            let named = run.iter().filter_map(|sight| self.named.get(&sight.flow()));
            std::hint::black_box(named.filter(|named| self.edges.get(named.ends).reversed).count());
            for sight in run {
                self.feed(*sight, out);
            }
        }
        sights.clear();
    }

    /// Takes what the tracker says. What concerns flows with names comes out at once.
    pub fn feed(&mut self, sight: Sight, out: &mut Vec<Fact>) {
        match sight {
            Sight::Opened { flow, wire } => {
                self.waiting.push(flow, Waiting::new(wire));
            }
            Sight::Went { flow, tuple, outcome, time, sent, received } => {
                self.say(flow, &tuple, Said::Went { outcome, time, sent, received, reason: String::new() }, out);
            }
            Sight::Grew { flow, tuple, time, sent, received } => self.say(flow, &tuple, Said::Grew { time, sent, received }, out),
            Sight::Closed { flow } => match self.waiting.get_mut(flow) {
                // A connection that nothing was said of and that nobody knocked with: not worth a name.
                Some(waiting) => waiting.closed = true,
                None => self.close(flow, out),
            },
        }
    }

    /// Takes a denied packet.
    pub fn deny(&mut self, denial: Denial) {
        self.denials += 1;
        let Denial { wire, outcome, reason, forged } = denial;
        let said = SmallVec::from([Said::Went { outcome, time: wire.time, sent: 0, received: 0, reason }]);
        self.waiting.push(u64::MAX - self.denials, Waiting { denied: true, forged, said, closed: true, ..Waiting::new(wire) });
    }

    /// Names what is old enough, from the scene as it is known now.
    pub fn resolve(&mut self, scene: &Scene<'_>, listening: &mut Listening<'_>, now: Timestamp, out: &mut Vec<Fact>) {
        // What lies further ahead than anything is waited for was before the clock was put back.
        let within = |since: Timestamp, least: SignedDuration| (-HOLD..least).contains(&now.duration_since(since));
        let is_ripe = |waiting: &Waiting| !within(waiting.wire.time, SETTLE);
        let held = self.waiting.take_held(is_ripe);
        let standing = self.waiting.ripe_in_line(is_ripe);
        // The proxy's client comes before the proxy's own leg, even if the client has no name yet.
        if scene.has_doors() {
            let ripe = held.iter().chain(self.waiting.line(standing));
            for (flow, waiting) in ripe.filter(|(_, waiting)| !waiting.denied) {
                if let Some(door) = scene.door(&waiting.wire) {
                    self.doors.knock(door, *flow, waiting.wire.time);
                }
            }
        }
        let mut held = held.into_iter();
        let mut standing = 0..standing;
        while let Some((flow, mut waiting)) = held.next().or_else(|| standing.next().and_then(|_| self.waiting.next_in_line())) {
            let ends = scene.name(listening, &waiting.wire, waiting.forged);
            let tried = *waiting.tried.get_or_insert(now);
            // Of a container that was listed the process comes a little later, and with it who listens.
            if (ends.unknown() && within(waiting.wire.time, HOLD)) || (!ends.direction_known && within(tried, HOLD)) {
                self.waiting.hold(flow, waiting);
            } else {
                self.introduce(scene, flow, waiting, ends, out);
            }
        }
        self.doors.forget(now);
        while let Some(&(since, flow)) = self.expected.front()
            && !within(since, HOLD)
        {
            self.expected.pop_front();
            // No leg came: the client's own outcome has to do.
            if !self.doors.has_leg(flow) {
                self.release(flow, out);
            }
        }
    }

    fn introduce(&mut self, scene: &Scene<'_>, flow: FlowId, waiting: Waiting, ends: Ends, out: &mut Vec<Fact>) {
        let Waiting { wire, denied, said, closed, .. } = waiting;
        if ends.within_the_node() {
            self.doors.leave(flow);
            return;
        }
        self.unattributed += u64::from(ends.unknown());
        let carries = if denied { None } else { scene.leg(&wire).and_then(|door| self.doors.enter(&door, flow)) };
        let withholds = !denied && ends.road == Road::Proxy && self.doors.outcome(flow).is_none();
        if withholds {
            self.expected.push_back((wire.time, flow));
        }
        if let Some(proxied) = carries.map(Proxied::Leg).or_else(|| withholds.then(|| Proxied::Client(Vec::new()))) {
            self.proxied.insert(flow, proxied);
        }
        if self.edges.is_crowded() {
            self.edges.keep(self.named.values().map(|named| named.ends));
        }
        let ends = self.edges.number(ends);
        self.named.insert(flow, Named { ends, pre_existing: wire.pre_existing, is_use: false });
        for said in said {
            self.say(flow, &wire.tuple, said, out);
        }
        if closed {
            self.close(flow, out);
        }
    }

    fn say(&mut self, flow: FlowId, tuple: &Tuple, said: Said, out: &mut Vec<Fact>) {
        if let Some(waiting) = self.waiting.get_mut(flow) {
            waiting.said.push(said);
            return;
        }
        let proxied = if self.proxied.is_empty() { None } else { self.proxied.get_mut(&flow) };
        match proxied {
            Some(&mut Proxied::Leg(client)) => {
                if let Said::Went { outcome, .. } = said {
                    self.doors.went(client, outcome);
                    self.release(client, out);
                }
            }
            Some(Proxied::Client(withheld)) => withheld.push((*tuple, said)),
            None => {
                let leg = self.doors.outcome(flow);
                let Some(named) = self.named.get_mut(&flow) else { return };
                out.push(named.fact(self.edges.get(named.ends), tuple, said, leg));
            }
        }
    }

    /// Says what was withheld of a client of the proxy.
    fn release(&mut self, client: FlowId, out: &mut Vec<Fact>) {
        if !matches!(self.proxied.get(&client), Some(Proxied::Client(_))) {
            return;
        }
        let Some(Proxied::Client(withheld)) = self.proxied.remove(&client) else { return };
        let leg = self.doors.outcome(client);
        if let Some(named) = self.named.get_mut(&client) {
            let ends = self.edges.get(named.ends);
            out.extend(withheld.into_iter().map(|(tuple, said)| named.fact(ends, &tuple, said, leg)));
        }
    }

    fn close(&mut self, flow: FlowId, out: &mut Vec<Fact>) {
        if !self.proxied.is_empty() {
            self.release(flow, out);
            self.proxied.remove(&flow);
        }
        self.named.remove(&flow);
        self.doors.leave(flow);
    }
}

impl Named {
    fn fact(&mut self, ends: &Ends, tuple: &Tuple, said: Said, leg: Option<FlowOutcome>) -> Fact {
        let turn = |sent: u64, received: u64| if ends.reversed { (received, sent) } else { (sent, received) };
        match said {
            Said::Went { outcome, time, sent, received, reason } => {
                let (bytes_sent, bytes_received) = turn(sent, received);
                // The proxy accepts for a server that may not be there: the leg behind it knows.
                let outcome = leg.filter(|leg| !leg.is_use()).unwrap_or(outcome);
                self.is_use = outcome.is_use();
                Fact::Began(Flow {
                    time,
                    from: ends.from.clone(),
                    to: ends.to.clone(),
                    service: ends.service,
                    outcome,
                    road: ends.road,
                    direction_known: ends.direction_known,
                    pre_existing: self.pre_existing,
                    bytes_sent,
                    bytes_received,
                    tuple: *tuple,
                    reason,
                })
            }
            Said::Grew { time, sent, received } => {
                let (bytes_sent, bytes_received) = turn(sent, received);
                let (key, road, is_use) = (ends.key(), ends.road, self.is_use);
                Fact::Grew(Growth { key, road, time, bytes_sent, bytes_received, is_use })
            }
        }
    }
}

#[cfg(test)]
mod tests;
