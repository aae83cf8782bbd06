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
mod slot;

pub use entry::{Counted, Entry, EntryKey, Kind, Stamp, Status};
pub use sight::{FlowId, Place, Sight, Wire};

use followed::Followed;
use memory::{Resumed, Silent};
use slot::{Marks, Moment, Open};

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
}

/// Tells a new flow from the rest of an older one.
#[derive(Debug)]
struct Flows {
    /// Since when the kernel's events are listened to: what began earlier is older than the agent.
    since: Timestamp,
    last: FlowId,
    /// Which dump of the table this is, or the last one was.
    dump: u32,
}

impl Tracker {
    /// Nothing seen yet. `marks_payload`: whether [`Stamp::payload`] can be believed to be set where there was payload.
    pub fn new(since: Timestamp, marks_payload: bool) -> Self {
        let (open, early, silent) = (Followed::default(), BTreeMap::new(), Silent::default());
        let flows = Flows { since, last: 0, dump: 0 };
        Self { marks_payload, open, early, flows, silent }
    }

    /// How many connections are followed.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Which ones, by their places in the kernel's table, in no order.
    pub fn followed(&self) -> impl Iterator<Item = EntryKey> + '_ {
        self.open.keys()
    }

    /// Folds in messages of the kernel, read at `now`.
    ///
    /// # Why not one by one
    /// The processor waits for memory most of the time: among hundreds of thousands of connections none is in its cache. Asked for
    /// one right after the other, several are fetched at once.
    pub fn feed_all(&mut self, messages: &[(Kind, Entry)], now: Timestamp, out: &mut Vec<Sight>) {
        let mut hashes = [0; RUN];
        for run in messages.chunks(RUN) {
            let mut known = 0;
            for ((_, entry), hash) in run.iter().zip(&mut hashes) {
                let key = entry.key();
                *hash = self.open.hash(&key.original);
                known ^= self.open.fetch(*hash, &key);
            }
            // Only asked for what is in the cache then.
            std::hint::black_box(known);
            for ((kind, entry), hash) in run.iter().zip(hashes) {
                self.take(*kind, entry, hash, now, out);
            }
        }
    }

    /// Folds in one message of the kernel, read at `now`.
    pub fn feed(&mut self, kind: Kind, entry: &Entry, now: Timestamp, out: &mut Vec<Sight>) {
        self.take(kind, entry, self.open.hash(&entry.original), now, out);
    }

    fn take(&mut self, kind: Kind, entry: &Entry, hash: u64, now: Timestamp, out: &mut Vec<Sight>) {
        // Mostly nothing waits for its event.
        let early = if self.early.is_empty() { None } else { self.early.remove(&entry.key()) };
        let early = early.filter(|(early, _)| early.id == entry.id || entry.id.is_none());
        match (kind, early) {
            (Kind::New, Some((early, _))) => return self.fold(kind, &Entry { started: early.started, ..*entry }, hash, now, out),
            (Kind::Update | Kind::Destroy, Some((early, _))) => self.fold(Kind::Dump, &early, hash, now, out),
            (Kind::Dump, early) if self.comes_before_its_event(entry, hash) => {
                let shown = early.map_or(now, |(_, shown)| shown);
                self.early.insert(entry.key(), (*entry, shown));
                return;
            }
            (Kind::New | Kind::Update | Kind::Destroy | Kind::Dump, _) => {}
        }
        self.fold(kind, entry, hash, now, out);
    }

    /// Whether a dump shows a connection of which the NEW event may still be on its way. That event tells whether it was met in the
    /// middle: then the tuple may be the wrong way round.
    fn comes_before_its_event(&mut self, entry: &Entry, hash: u64) -> bool {
        entry.original.protocol == Protocol::Tcp
            && met_in_the_middle(entry.state)
            && entry.started.is_some_and(|started| started >= self.flows.since)
            && self.open.find(hash, &entry.key()).is_none_or(|at| self.open.at(at).kernel_id() != entry.id && entry.id.is_some())
    }

    /// Takes up what a dump has shown and no event has followed: it was lost. Call it some times a second.
    pub fn settle(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        let late: Vec<_> = self.early.extract_if(.., |_, (_, shown)| now.duration_since(*shown) >= EVENT_WITHIN).collect();
        for (_, (entry, _)) in late {
            self.fold(Kind::Dump, &entry, self.open.hash(&entry.original), now, out);
        }
    }

    fn fold(&mut self, kind: Kind, entry: &Entry, hash: u64, now: Timestamp, out: &mut Vec<Sight>) {
        let key = entry.key();
        let at = match (kind, self.open.find(hash, &key)) {
            (_, Some(at)) if entry.id.is_none() || self.open.at(at).kernel_id() == entry.id => at,
            // Its DESTROY was lost: another connection has its place.
            (Kind::New | Kind::Update | Kind::Dump, Some(at)) => {
                let flow = self.open.at(at).flow;
                self.open.closed(flow, out);
                *self.open.at(at) = self.flows.begin(&mut self.open, kind, entry, hash, now, out);
                at
            }
            // The end of a connection whose place another one has already.
            (Kind::Destroy, Some(_)) => return,
            // It began before we listened and wasn't in a dump yet: the next dump tells what an UPDATE leaves out.
            (Kind::Update, None) => return,
            (Kind::New | Kind::Dump | Kind::Destroy, None) => {
                let open = self.flows.begin(&mut self.open, kind, entry, hash, now, out);
                self.open.insert(hash, &key, open)
            }
        };
        let open = self.open.at(at);
        open.seen = self.flows.dump;
        if kind == Kind::Dump {
            open.missing = 0;
        }
        open.mark(Marks::ANSWERED, entry.status.seen_reply());
        open.mark(Marks::ASSURED, entry.status.assured());
        open.set_state(entry.state);
        if let Some(stamp) = entry.stamp {
            open.mark(Marks::PAYLOAD, stamp.payload);
            open.mark(Marks::REFUSED, stamp.refused);
        }
        if !self.marks_payload || entry.stamp.is_none() {
            open.mark(Marks::PAYLOAD, payload_by_count(entry).unwrap_or(false));
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
            let reversed = open.is(Marks::REVERSED);
            if reversed {
                (sent, received) = (received, sent);
            }
            let flow = open.flow;
            open.outcome = better.or(open.outcome);
            let time = if open.is(Marks::PRE_EXISTING) || reversed { now } else { open.began.into() };
            let tuple = if reversed { self.open.first_of(flow, &entry.original) } else { entry.original };
            if let Some(outcome) = better {
                out.push(Sight::Went { flow, tuple, outcome, time, sent, received });
            } else if sent + received > 0 {
                out.push(Sight::Grew { flow, tuple, time: now, sent, received });
            }
        }
        if ended {
            if resumable(self.open.at(at), entry) {
                self.open.end(at, &entry.reply, now.into(), out);
            } else {
                let open = self.open.remove(at);
                self.open.closed(open.flow, out);
            }
        }
    }

    /// The table is about to be read.
    pub fn begin_dump(&mut self) {
        self.flows.dump = self.flows.dump.wrapping_add(1);
    }

    /// The table was read: forgets what two dumps in a row don't have, since its end was lost. One is not enough: the event may
    /// still be on its way. Also forgets what is too long past.
    pub fn end_dump(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        let dump = self.flows.dump;
        let stays = |open: &mut Open| {
            open.missing += u8::from(open.seen != dump);
            open.missing < 2
        };
        self.open.retain(stays, out);
        self.forget(now, out);
    }

    /// Forgets what is too long past.
    pub fn forget(&mut self, now: Timestamp, out: &mut Vec<Sight>) {
        self.open.forget(now.into(), out);
        self.silent.forget(now.into());
    }
}

impl Flows {
    fn begin(&mut self, open: &mut Followed, kind: Kind, entry: &Entry, hash: u64, now: Timestamp, out: &mut Vec<Sight>) -> Open {
        let tcp = entry.original.protocol == Protocol::Tcp;
        let picked_up = kind == Kind::New && tcp && met_in_the_middle(entry.state);
        let old = match (kind, entry.started) {
            (Kind::New | Kind::Update, _) => false,
            (Kind::Dump | Kind::Destroy, Some(started)) => started < self.since,
            // Only connections older than the switch that we turn on have no time.
            (Kind::Dump, None) => true,
            (Kind::Destroy, None) => false,
        };
        let mut begun = Open::begun(entry.id, entry.started.filter(|_| !old).unwrap_or(now));
        begun.mark(Marks::PRE_EXISTING, old || picked_up);
        begun.mark(Marks::UNSURE, kind == Kind::Dump && tcp && met_in_the_middle(entry.state));
        begun.set_state(entry.state);
        // Only what can't be a beginning is taken for a continuation: a SYN on the same ports is another connection.
        let may_resume = picked_up || entry.original.protocol == Protocol::Udp;
        let resumed = if may_resume { open.resume(hash, &entry.original) } else { None };
        if let Some(Resumed { flow, reversed, outcome }) = resumed {
            begun.flow = flow;
            // A late answer makes the flow answered, whatever it was taken for.
            begun.outcome = outcome;
            begun.mark(Marks::REVERSED, reversed);
            begun.mark(Marks::ANSWERED, reversed && entry.original.protocol == Protocol::Udp);
        } else {
            self.last += 1;
            begun.flow = self.last;
            out.push(Sight::Opened { flow: begun.flow, wire: wire(entry, &begun) });
        }
        begun
    }
}

/// Whether it may go on though its entry is gone.
fn resumable(open: &Open, entry: &Entry) -> bool {
    match entry.original.protocol {
        // Taken out of the table while it was alive: a flush, a revocation.
        Protocol::Tcp => open.is(Marks::ASSURED) && open.state() == Some(tcp::ESTABLISHED),
        Protocol::Udp => true,
        Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => false,
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
    let sure = !open.is(Marks::PRE_EXISTING | Marks::UNSURE) || rewritten || entry.status.source_nat() || protocol.has_types();
    Wire {
        tuple: entry.original,
        server,
        service: Service { protocol, port },
        road: if rewritten { Road::Published } else { Road::Direct },
        place: entry.stamp.map_or_else(Place::default, |s| Place { entered: Some(s.entered), left: Some(s.left), port: None }),
        time: open.began.into(),
        pre_existing: open.is(Marks::PRE_EXISTING),
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
    let age = SignedDuration::from_nanos(Moment::from(now).0.saturating_sub(open.began.0));
    match entry.original.protocol {
        Protocol::Tcp => judge_tcp(open, entry, ended, age),
        Protocol::Udp => {
            let packets = entry.sent.map_or(0, |sent| sent.packets);
            match (open.is(Marks::ANSWERED), open.is(Marks::REFUSED)) {
                (true, _) => Some(FlowOutcome::Established),
                (false, true) => ended.then_some(FlowOutcome::Refused),
                (false, false) if packets > 1 && (ended || age >= ONE_WAY_AFTER) => Some(FlowOutcome::OneWay),
                // A second socket that sends one packet is a repetition too.
                (false, false) if ended => {
                    let again = silent.again(&entry.original, now.into());
                    Some(if again { FlowOutcome::OneWay } else { FlowOutcome::Unanswered })
                }
                (false, false) => None,
            }
        }
        Protocol::Sctp if open.is(Marks::ANSWERED) && open.state() == Some(SCTP_CLOSED) && open.outcome.is_none() => {
            Some(FlowOutcome::Refused)
        }
        Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => {
            match (open.is(Marks::ANSWERED), open.is(Marks::REFUSED)) {
                (true, _) => Some(FlowOutcome::Established),
                (false, true) => ended.then_some(FlowOutcome::Refused),
                (false, false) => ended.then_some(FlowOutcome::Unanswered),
            }
        }
    }
}

fn judge_tcp(open: &Open, entry: &Entry, ended: bool, age: SignedDuration) -> Option<FlowOutcome> {
    // The label says payload only of connections that both ends agreed to; a count may be of SYNs with data.
    if open.is(Marks::PAYLOAD) && open.is(Marks::ASSURED | Marks::ANSWERED) {
        return Some(FlowOutcome::Established);
    }
    let closing = open.state().is_some_and(|state| (tcp::FIN_WAIT..=tcp::CLOSE).contains(&state));
    if open.is(Marks::PRE_EXISTING) {
        // What it carried before we came is not known; that it lives is. A stray packet of a dead one is never assured.
        let alive = open.is(Marks::ASSURED) && open.state() == Some(tcp::ESTABLISHED);
        return alive.then_some(FlowOutcome::Established);
    }
    if open.is(Marks::ASSURED) {
        return (ended || closing || age >= QUIET).then_some(FlowOutcome::ConnectedNoData);
    }
    if !ended {
        return None;
    }
    // A reset that answers the SYN ends the entry at once: counted, and not taken for a reply. A handshake that the client leaves
    // half open came to nothing.
    let reset =
        open.state() == Some(tcp::CLOSE) || (!open.is(Marks::ANSWERED) && entry.received.is_some_and(|received| received.packets > 0));
    Some(if open.is(Marks::REFUSED) || reset { FlowOutcome::Refused } else { FlowOutcome::Unanswered })
}

#[cfg(test)]
mod tests;
