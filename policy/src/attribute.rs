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

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use crate::evidence::Road;
use crate::flow::{Flow, FlowOutcome};
use crate::track::{FlowId, Sight, Wire};

mod door;
mod ends;
mod fact;

pub use ends::{Listener, Listening, Scene};
pub use fact::{Fact, Growth};

use door::Doors;
use ends::Ends;

/// How long after its packet a flow is named: what the engine said before the packet has arrived by then (measured: address known
/// 2 ms after the event; 50 containers at once, 60-280 ms at the 99th percentile).
pub const SETTLE: SignedDuration = SignedDuration::from_millis(150);

/// How long an address that belongs to nobody is waited for.
pub const HOLD: SignedDuration = SignedDuration::from_secs(2);

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

#[derive(Debug)]
struct Waiting {
    wire: Wire,
    /// When it was first tried to name it.
    tried: Option<Timestamp>,
    denied: bool,
    forged: bool,
    said: Vec<Said>,
    closed: bool,
}

#[derive(Clone, Debug)]
struct Named {
    wire: Wire,
    ends: Arc<Ends>,
    /// The client flow that this one only carries on, behind the user-land proxy.
    carries: Option<FlowId>,
    /// Through the user-land proxy: what is to be said once it is known what became of the leg behind it; `None`: say it.
    withheld: Option<Vec<Said>>,
    is_use: bool,
}

/// Names flows.
#[derive(Debug, Default)]
pub struct Attribution {
    waiting: BTreeMap<FlowId, Waiting>,
    named: HashMap<FlowId, Named>,
    /// One copy of equal ends.
    ends: HashSet<Arc<Ends>>,
    doors: Doors,
    /// Clients of the proxy whose leg must show up, in order.
    proxied: VecDeque<(Timestamp, FlowId)>,
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

    /// Takes what the tracker says. What concerns flows with names comes out at once.
    pub fn feed(&mut self, sight: Sight, out: &mut Vec<Fact>) {
        match sight {
            Sight::Opened { flow, wire } => {
                self.waiting.insert(flow, Waiting { wire, tried: None, denied: false, forged: false, said: Vec::new(), closed: false });
            }
            Sight::Went { flow, outcome, time, sent, received } => {
                self.say(flow, Said::Went { outcome, time, sent, received, reason: String::new() }, out);
            }
            Sight::Grew { flow, time, sent, received } => self.say(flow, Said::Grew { time, sent, received }, out),
            Sight::Closed { flow } => match self.waiting.get_mut(&flow) {
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
        let said = vec![Said::Went { outcome, time: wire.time, sent: 0, received: 0, reason }];
        self.waiting.insert(u64::MAX - self.denials, Waiting { wire, tried: None, denied: true, forged, said, closed: true });
    }

    /// Names what is old enough, from the scene as it is known now.
    pub fn resolve(&mut self, scene: &Scene<'_>, listening: &mut Listening<'_>, now: Timestamp, out: &mut Vec<Fact>) {
        let age = |wire: &Wire| now.duration_since(wire.time);
        let ripe: Vec<FlowId> = self.waiting.iter().filter(|(_, w)| age(&w.wire) >= SETTLE).map(|(&flow, _)| flow).collect();
        // The proxy's client comes before the proxy's own leg, even if the client has no name yet.
        for flow in &ripe {
            if let Some(waiting) = self.waiting.get(flow).filter(|waiting| !waiting.denied)
                && let Some(door) = scene.door(&waiting.wire)
            {
                self.doors.knock(door, *flow, waiting.wire.time);
            }
        }
        for flow in ripe {
            let Some(waiting) = self.waiting.get_mut(&flow) else { continue };
            let ends = scene.name(listening, &waiting.wire, waiting.forged);
            let tried = *waiting.tried.get_or_insert(now);
            // Of a container that was listed the process comes a little later, and with it who listens.
            if (ends.unknown() && age(&waiting.wire) < HOLD) || (!ends.direction_known && now.duration_since(tried) < HOLD) {
                continue;
            }
            if let Some(waiting) = self.waiting.remove(&flow) {
                self.introduce(scene, flow, waiting, ends, out);
            }
        }
        self.doors.forget(now);
        while let Some(&(since, flow)) = self.proxied.front()
            && now.duration_since(since) >= HOLD
        {
            self.proxied.pop_front();
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
        let withheld = (!denied && ends.road == Road::Proxy && self.doors.outcome(flow).is_none()).then(|| {
            self.proxied.push_back((wire.time, flow));
            Vec::new()
        });
        let ends = self.shared(ends);
        self.named.insert(flow, Named { wire, ends, carries, withheld, is_use: false });
        for said in said {
            self.say(flow, said, out);
        }
        if closed {
            self.close(flow, out);
        }
    }

    /// One copy for all flows of an edge.
    fn shared(&mut self, ends: Ends) -> Arc<Ends> {
        if let Some(known) = self.ends.get(&ends) {
            return Arc::clone(known);
        }
        // Now and then those that no flow has any more are let go.
        if self.ends.len() >= 1024 && self.ends.len() == self.ends.capacity() {
            self.ends.retain(|ends| Arc::strong_count(ends) > 1);
        }
        let ends = Arc::new(ends);
        self.ends.insert(Arc::clone(&ends));
        ends
    }

    fn say(&mut self, flow: FlowId, said: Said, out: &mut Vec<Fact>) {
        if let Some(waiting) = self.waiting.get_mut(&flow) {
            waiting.said.push(said);
            return;
        }
        let Some(named) = self.named.get_mut(&flow) else { return };
        if let Some(client) = named.carries {
            if let Said::Went { outcome, .. } = said {
                self.doors.went(client, outcome);
                self.release(client, out);
            }
            return;
        }
        match &mut named.withheld {
            Some(withheld) => withheld.push(said),
            None => {
                let leg = self.doors.outcome(flow);
                out.push(named.fact(said, leg));
            }
        }
    }

    /// Says what was withheld of a client of the proxy.
    fn release(&mut self, client: FlowId, out: &mut Vec<Fact>) {
        let leg = self.doors.outcome(client);
        let Some(named) = self.named.get_mut(&client) else { return };
        for said in named.withheld.take().into_iter().flatten() {
            out.push(named.fact(said, leg));
        }
    }

    fn close(&mut self, flow: FlowId, out: &mut Vec<Fact>) {
        self.release(flow, out);
        self.doors.leave(flow);
        self.named.remove(&flow);
    }
}

impl Named {
    fn fact(&mut self, said: Said, leg: Option<FlowOutcome>) -> Fact {
        let ends = &self.ends;
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
                    pre_existing: self.wire.pre_existing,
                    bytes_sent,
                    bytes_received,
                    tuple: self.wire.tuple,
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
