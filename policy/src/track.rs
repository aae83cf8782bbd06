//! From what the kernel says of a connection, event by event, to flows with an outcome.
//!
//! [`Entry`] is one connection as the kernel's connection tracking describes it; [`Tracker`] folds entries into [`Sight`]s: what
//! began, how it went, how many bytes more. Which workloads the two ends are is decided by [`attribute`](crate::attribute). No
//! clock and no sockets here: times come in with the entries.
//!
//! # Why
//! A SYN to a closed port is NEW to conntrack and so is a port scan: a flow is judged by what came of it. TCP is use once a
//! segment with payload passed (our own rule marks that in the connection's label), else `connected, no data` once it is over or
//! has been silent for a while; UDP, SCTP and ICMP are use once they are answered. A flow is reported once, at first sight of use;
//! what follows is only more bytes. The one exception says more than it counts: a flow that was reported as one-way, unanswered
//! or without data and then is used after all is counted a second time, as established.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use crate::evidence::Road;
use crate::flow::{FlowOutcome, Tuple};
use crate::service::{Protocol, Service};

mod entry;
mod followed;
mod memory;
mod sight;

pub use entry::{Counted, Entry, EntryKey, Kind, Stamp, Status};
pub use sight::{FlowId, Place, Sight, Wire};

use followed::Followed;
use memory::{Past, Silent};

/// How long an open TCP connection may carry nothing before it is reported as such (and not as nothing at all): longer than any
/// handshake with retransmissions that ends well, shorter than a person waits for the edge.
const QUIET: SignedDuration = SignedDuration::from_secs(30);

/// How long UDP that repeats waits for an answer before it is reported as one-way. Answers that come later are counted too.
const ONE_WAY_AFTER: SignedDuration = SignedDuration::from_secs(10);

/// Connections that are fetched from memory at once; their lines fit the first cache.
const RUN: usize = 32;

/// How long the event of a connection that a dump has shown is waited for: it is on its way, or was lost.
const EVENT_WITHIN: SignedDuration = SignedDuration::from_secs(1);

/// `enum tcp_conntrack` (linux/netfilter/nf_conntrack_tcp.h).
mod tcp {
    pub(super) const SYN_SENT: u8 = 1;
    pub(super) const ESTABLISHED: u8 = 3;
    pub(super) const FIN_WAIT: u8 = 4;
    pub(super) const CLOSE: u8 = 8;
    pub(super) const SYN_SENT2: u8 = 9;
}

/// `enum sctp_conntrack` (linux/netfilter/nf_conntrack_sctp.h): CLOSED right after the answer means that it was an ABORT.
const SCTP_CLOSED: u8 = 1;

/// One connection that is being followed.
#[derive(Clone, Debug)]
struct Open {
    flow: FlowId,
    kernel_id: Option<u32>,
    began: Timestamp,
    touched: Timestamp,
    /// The last dump that had it.
    dump: u64,
    /// Dumps in a row that did not have it.
    missing: u8,
    pre_existing: bool,
    /// It may have been met in the middle: only a dump shows it, and only its NEW event, which was lost, could tell.
    unsure: bool,
    /// The entry runs against the flow: it is the late answer to it, or its other half after the table was flushed.
    reversed: bool,
    /// What was said of the flow so far.
    outcome: Option<FlowOutcome>,
    payload: bool,
    refused: bool,
    answered: bool,
    assured: bool,
    state: Option<u8>,
    /// Bytes already reported, in the entry's own directions.
    sent: u64,
    received: u64,
}

/// Follows every connection of one node's network namespace.
#[derive(Debug)]
pub struct Tracker {
    /// Payload is marked in the label. False: the kernel can't, and byte counts decide.
    marks_payload: bool,
    open: Followed,
    /// What a dump has shown before its event was read, and when.
    early: BTreeMap<EntryKey, (Entry, Timestamp)>,
    flows: Flows,
    silent: Silent,
    dump_began: Timestamp,
}

/// Tells a new flow from the rest of an older one.
#[derive(Debug)]
struct Flows {
    /// Since when the kernel's events are listened to: what began earlier is older than the agent.
    since: Timestamp,
    past: Past,
    last: FlowId,
    /// Which dump of the table this is, or the last one was.
    dump: u64,
}

impl Tracker {
    /// Nothing seen yet. `marks_payload`: whether [`Stamp::payload`] can be believed to be set where there was payload.
    pub fn new(since: Timestamp, marks_payload: bool) -> Self {
        let (open, early, silent) = (Followed::default(), BTreeMap::new(), Silent::default());
        let flows = Flows { since, past: Past::default(), last: 0, dump: 0 };
        Self { marks_payload, open, early, flows, silent, dump_began: since }
    }

    /// How many connections are followed.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Folds in messages of the kernel, read at `now`.
    ///
    /// # Why not one by one
    /// The processor waits for memory most of the time: among hundreds of thousands of connections none is in its cache. Asked for
    /// one right after the other, several are fetched at once.
    pub fn feed_all(&mut self, messages: &[(Kind, Entry)], now: Timestamp, out: &mut Vec<Sight>) {
        for run in messages.chunks(RUN) {
            let known = run.iter().filter_map(|(_, entry)| self.open.get(&entry.key())).fold(0, |all, open| all ^ open.flow);
            // Only asked for what is in the cache then.
            std::hint::black_box(known);
            for (kind, entry) in run {
                self.feed(*kind, entry, now, out);
            }
        }
    }

    /// Folds in one message of the kernel, read at `now`.
    pub fn feed(&mut self, kind: Kind, entry: &Entry, now: Timestamp, out: &mut Vec<Sight>) {
        let key = entry.key();
        let early = self.early.remove(&key).filter(|(early, _)| early.id == entry.id || entry.id.is_none());
        match (kind, early) {
            (Kind::New, Some((early, _))) => return self.fold(kind, &Entry { started: early.started, ..*entry }, now, out),
            (Kind::Update | Kind::Destroy, Some((early, _))) => self.fold(Kind::Dump, &early, now, out),
            (Kind::Dump, early) if self.comes_before_its_event(entry) => {
                let shown = early.map_or(now, |(_, shown)| shown);
                self.early.insert(key, (*entry, shown));
                return;
            }
            (Kind::New | Kind::Update | Kind::Destroy | Kind::Dump, _) => {}
        }
        self.fold(kind, entry, now, out);
    }

    /// Whether a dump shows a connection of which the NEW event may still be on its way. That event tells whether it was met in the
    /// middle: then the tuple may be the wrong way round.
    fn comes_before_its_event(&self, entry: &Entry) -> bool {
        entry.original.protocol == Protocol::Tcp
            && met_in_the_middle(entry.state)
            && entry.started.is_some_and(|started| started >= self.flows.since)
            && self.open.get(&entry.key()).is_none_or(|open| open.kernel_id != entry.id && entry.id.is_some())
    }

    /// Takes up what a dump has shown and no event has followed: it was lost. Call it some times a second.
    pub fn settle(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        let late: Vec<_> = self.early.extract_if(.., |_, (_, shown)| now.duration_since(*shown) >= EVENT_WITHIN).collect();
        for (_, (entry, _)) in late {
            self.fold(Kind::Dump, &entry, now, out);
        }
    }

    fn fold(&mut self, kind: Kind, entry: &Entry, now: Timestamp, out: &mut Vec<Sight>) {
        let key = entry.key();
        let at = match (kind, self.open.find(&key)) {
            (_, Some(at)) if entry.id.is_none() || self.open.at(at).kernel_id == entry.id => at,
            // Its DESTROY was lost: another connection has its place.
            (Kind::New | Kind::Update | Kind::Dump, Some(at)) => {
                let open = self.open.at(at);
                out.push(Sight::Closed { flow: open.flow });
                *open = self.flows.begin(kind, entry, now, out);
                at
            }
            // The end of a connection whose place another one has already.
            (Kind::Destroy, Some(_)) => return,
            // It began before we listened and wasn't in a dump yet: the next dump tells what an UPDATE leaves out.
            (Kind::Update, None) => return,
            (Kind::New | Kind::Dump | Kind::Destroy, None) => self.open.insert(key, self.flows.begin(kind, entry, now, out)),
        };
        let open = self.open.at(at);
        open.touched = now;
        if kind == Kind::Dump {
            open.dump = self.flows.dump;
            open.missing = 0;
        }
        open.answered |= entry.status.seen_reply();
        open.assured |= entry.status.assured();
        open.state = entry.state.or(open.state);
        if let Some(stamp) = entry.stamp {
            open.payload |= stamp.payload;
            open.refused |= stamp.refused;
        }
        if !self.marks_payload || entry.stamp.is_none() {
            open.payload |= payload_by_count(entry).unwrap_or(false);
        }
        let (sent, received) = (entry.sent.unwrap_or_default(), entry.received.unwrap_or_default());
        let ended = kind == Kind::Destroy;
        let outcome = judge(open, entry, ended, now, &mut self.silent);
        // The counters of a dump and of the end are totals; an event without them adds nothing.
        let more = |total: u64, before: &mut u64| {
            let grown = total.saturating_sub(*before);
            *before = (*before).max(total);
            grown
        };
        let better = outcome.filter(|new| match open.outcome {
            None => true,
            Some(FlowOutcome::Established) => false,
            Some(_) => *new == FlowOutcome::Established,
        });
        if better.is_some() || open.outcome.is_some() {
            let (mut sent, mut received) = (more(sent.bytes, &mut open.sent), more(received.bytes, &mut open.received));
            if open.reversed {
                (sent, received) = (received, sent);
            }
            let flow = open.flow;
            if let Some(outcome) = better {
                open.outcome = Some(outcome);
                let time = if open.pre_existing || open.reversed { now } else { open.began };
                out.push(Sight::Went { flow, outcome, time, sent, received });
            } else if sent + received > 0 {
                out.push(Sight::Grew { flow, time: now, sent, received });
            }
        }
        if ended {
            let open = self.open.remove(at);
            if open.resumable(entry) {
                self.flows.past.close(&open.ending(entry), now, out);
            } else {
                out.push(Sight::Closed { flow: open.flow });
            }
        }
    }

    /// The table is about to be read.
    pub fn begin_dump(&mut self, now: Timestamp) {
        self.flows.dump += 1;
        self.dump_began = now;
    }

    /// The table was read: forgets what two dumps in a row don't have, since its end was lost. One is not enough: the event may
    /// still be on its way. Also forgets what is too long past.
    pub fn end_dump(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        let (dump, began) = (self.flows.dump, self.dump_began);
        self.open.retain(|open| {
            if open.dump < dump && open.touched < began {
                open.missing += 1;
            }
            let gone = open.missing >= 2;
            if gone {
                out.push(Sight::Closed { flow: open.flow });
            }
            !gone
        });
        self.flows.past.forget(now, out);
        self.silent.forget(now);
    }
}

impl Flows {
    fn begin(&mut self, kind: Kind, entry: &Entry, now: Timestamp, out: &mut Vec<Sight>) -> Open {
        let picked_up = kind == Kind::New && entry.original.protocol == Protocol::Tcp && met_in_the_middle(entry.state);
        let old = match (kind, entry.started) {
            (Kind::New | Kind::Update, _) => false,
            (Kind::Dump | Kind::Destroy, Some(started)) => started < self.since,
            // Only connections older than the switch that we turn on have no time.
            (Kind::Dump, None) => true,
            (Kind::Destroy, None) => false,
        };
        let mut open = Open {
            dump: self.dump,
            pre_existing: old || picked_up,
            unsure: kind == Kind::Dump && entry.original.protocol == Protocol::Tcp && met_in_the_middle(entry.state),
            state: entry.state,
            ..Open::begun(entry.id, entry.started.filter(|_| !old).unwrap_or(now), now)
        };
        // Only what can't be a beginning is taken for a continuation: a SYN on the same ports is another connection.
        let may_resume = picked_up || entry.original.protocol == Protocol::Udp;
        let resumed = if may_resume { self.past.resume(&entry.original) } else { None };
        if let Some((flow, reversed, outcome)) = resumed {
            open.flow = flow;
            open.reversed = reversed;
            // A late answer makes the flow answered, whatever it was taken for.
            open.outcome = outcome;
            if reversed && entry.original.protocol == Protocol::Udp {
                open.answered = true;
            }
        } else {
            self.last += 1;
            open.flow = self.last;
            out.push(Sight::Opened { flow: open.flow, wire: wire(entry, &open) });
        }
        open
    }
}

impl Open {
    fn begun(kernel_id: Option<u32>, began: Timestamp, now: Timestamp) -> Self {
        Self {
            flow: 0,
            kernel_id,
            began,
            touched: now,
            dump: 0,
            missing: 0,
            pre_existing: false,
            unsure: false,
            reversed: false,
            outcome: None,
            payload: false,
            refused: false,
            answered: false,
            assured: false,
            state: None,
            sent: 0,
            received: 0,
        }
    }

    /// Whether it may go on though its entry is gone.
    fn resumable(&self, entry: &Entry) -> bool {
        match entry.original.protocol {
            // Taken out of the table while it was alive: a flush, a revocation.
            Protocol::Tcp => self.assured && self.state == Some(tcp::ESTABLISHED),
            Protocol::Udp => true,
            Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => false,
        }
    }

    fn ending(&self, entry: &Entry) -> memory::Ending {
        let (forward, backward) = if self.reversed { (entry.reply, entry.original) } else { (entry.original, entry.reply) };
        memory::Ending { flow: self.flow, forward, backward, outcome: self.outcome }
    }
}

/// A connection that conntrack met in the middle has no SYN behind it (nf_conntrack_tcp_loose).
fn met_in_the_middle(state: Option<u8>) -> bool {
    !matches!(state, None | Some(tcp::SYN_SENT | tcp::SYN_SENT2))
}

fn wire(entry: &Entry, open: &Open) -> Wire {
    let Tuple { protocol, destination_port, .. } = entry.original;
    let (server, port) =
        if protocol.has_ports() { (entry.reply.source, entry.reply.source_port) } else { (entry.reply.source, destination_port) };
    let rewritten = entry.status.destination_nat() || server != entry.original.destination;
    // A rewritten connection has its direction from the rule that rewrote its first packet; ICMP has it from the type.
    let sure = !(open.pre_existing || open.unsure) || rewritten || entry.status.source_nat() || protocol.has_types();
    Wire {
        tuple: entry.original,
        server,
        service: Service { protocol, port },
        road: if rewritten { Road::Published } else { Road::Direct },
        place: entry.stamp.map_or_else(Place::default, |s| Place { entered: Some(s.entered), left: Some(s.left), port: None }),
        time: open.began,
        pre_existing: open.pre_existing,
        direction_sure: sure,
    }
}

/// Whether the counters show TCP payload, as far as header sizes let one tell; `None` without counters.
///
/// A segment without payload has 20 bytes of TCP header, or 32 with timestamps (RFC 7323), the same all along; a SYN up to 40
/// of options, in steps of 4. Whatever is left over is payload. A few bytes without timestamps may hide in the SYN's options.
fn payload_by_count(entry: &Entry) -> Option<bool> {
    if entry.original.protocol != Protocol::Tcp {
        return None;
    }
    let ip = if entry.original.source.is_ipv4() { 20 } else { 40 };
    let carried = |counted: Counted| {
        let Some(rest) = counted.packets.checked_sub(1) else { return false };
        let empty = [20, 32].into_iter().any(|tcp: u64| {
            let left = counted.bytes.checked_sub((ip + tcp) * rest);
            left.is_some_and(|syn| (ip + 20..=ip + 40).contains(&syn) && syn % 4 == 0)
        });
        !empty && counted.bytes > counted.packets * (ip + 20)
    };
    Some(carried(entry.sent?) || carried(entry.received?))
}

/// What is to be said of a connection now; `None`: nothing yet.
fn judge(open: &Open, entry: &Entry, ended: bool, now: Timestamp, silent: &mut Silent) -> Option<FlowOutcome> {
    let age = now.duration_since(open.began);
    match entry.original.protocol {
        Protocol::Tcp => judge_tcp(open, entry, ended, age),
        Protocol::Udp => {
            let packets = entry.sent.map_or(0, |sent| sent.packets);
            match (open.answered, open.refused) {
                (true, _) => Some(FlowOutcome::Established),
                (false, true) => ended.then_some(FlowOutcome::Refused),
                (false, false) if packets > 1 && (ended || age >= ONE_WAY_AFTER) => Some(FlowOutcome::OneWay),
                // A second socket that sends one packet is a repetition too.
                (false, false) if ended => {
                    let again = silent.again(&entry.original, now);
                    Some(if again { FlowOutcome::OneWay } else { FlowOutcome::Unanswered })
                }
                (false, false) => None,
            }
        }
        Protocol::Sctp if open.answered && open.state == Some(SCTP_CLOSED) && open.outcome.is_none() => Some(FlowOutcome::Refused),
        Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => match (open.answered, open.refused) {
            (true, _) => Some(FlowOutcome::Established),
            (false, true) => ended.then_some(FlowOutcome::Refused),
            (false, false) => ended.then_some(FlowOutcome::Unanswered),
        },
    }
}

fn judge_tcp(open: &Open, entry: &Entry, ended: bool, age: SignedDuration) -> Option<FlowOutcome> {
    // The label says payload only of connections that both ends agreed to; a count may be of SYNs with data.
    if open.payload && (open.assured || open.answered) {
        return Some(FlowOutcome::Established);
    }
    let closing = open.state.is_some_and(|state| (tcp::FIN_WAIT..=tcp::CLOSE).contains(&state));
    if open.pre_existing {
        // What it carried before we came is not known; that it lives is. A stray packet of a dead one is never assured.
        let alive = open.assured && open.state == Some(tcp::ESTABLISHED);
        return alive.then_some(FlowOutcome::Established);
    }
    if open.assured {
        return (ended || closing || age >= QUIET).then_some(FlowOutcome::ConnectedNoData);
    }
    if !ended {
        return None;
    }
    // A reset that answers the SYN ends the entry at once: counted, and not taken for a reply. A handshake that the client leaves
    // half open came to nothing.
    let reset = open.state == Some(tcp::CLOSE) || (!open.answered && entry.received.is_some_and(|received| received.packets > 0));
    Some(if open.refused || reset { FlowOutcome::Refused } else { FlowOutcome::Unanswered })
}

#[cfg(test)]
mod tests;
