//! One connection as it is kept: all that an event of it needs in one line of the processor's cache.
//!
//! # Why so narrow
//! Of hundreds of thousands of connections none is in the cache when its event comes, so an event costs what it waits for memory:
//! once a line. Times are nanoseconds, yes and no are bits, addresses of IPv4 stand where they are; those of IPv6 stand beside.

use std::net::IpAddr;

use jiff::Timestamp;

use super::entry::EntryKey;
use super::sight::FlowId;
use crate::flow::{FlowOutcome, Tuple};

/// Nanoseconds since 1970: enough until 2262 (and from 1677), as the kernel counts them too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(pub(super) i64);

const SECOND: i64 = 1_000_000_000;

impl From<Timestamp> for Moment {
    fn from(time: Timestamp) -> Self {
        Self(time.as_second().saturating_mul(SECOND).saturating_add(i64::from(time.subsec_nanosecond())))
    }
}

impl From<Moment> for Timestamp {
    fn from(Moment(nanoseconds): Moment) -> Self {
        let within = i32::try_from(nanoseconds % SECOND).expect("less than a second");
        Self::new(nanoseconds / SECOND, within).expect("64 bits of nanoseconds are fewer years than a timestamp holds")
    }
}

/// What is known of a connection by yes and no.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks(u8);

impl Marks {
    pub(super) const PRE_EXISTING: u8 = 1;
    /// It may have been met in the middle: only a dump shows it, and only its NEW event, which was lost, could tell.
    pub(super) const UNSURE: u8 = 1 << 1;
    /// The entry runs against the flow: it is the late answer to it, or its other half after the table was flushed.
    pub(super) const REVERSED: u8 = 1 << 2;
    pub(super) const PAYLOAD: u8 = 1 << 3;
    pub(super) const REFUSED: u8 = 1 << 4;
    pub(super) const ANSWERED: u8 = 1 << 5;
    pub(super) const ASSURED: u8 = 1 << 6;
    /// The kernel told its id.
    const NUMBERED: u8 = 1 << 7;
}

/// One connection that is being followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub(super) flow: FlowId,
    pub(super) began: Moment,
    /// Bytes already reported, in the entry's own directions.
    pub(super) sent: u64,
    pub(super) received: u64,
    /// The last dump that had it, or that was the last one when an event of it came.
    pub(super) seen: u32,
    kernel_id: u32,
    state: u8,
    /// What was said of the flow so far.
    pub(super) outcome: Option<FlowOutcome>,
    /// Dumps in a row that did not have it.
    pub(super) missing: u8,
    marks: Marks,
}

/// No protocol has so many states.
const NO_STATE: u8 = u8::MAX;

impl Open {
    pub(super) fn begun(kernel_id: Option<u32>, began: Timestamp) -> Self {
        Self {
            flow: 0,
            began: began.into(),
            sent: 0,
            received: 0,
            seen: 0,
            kernel_id: kernel_id.unwrap_or(0),
            state: NO_STATE,
            outcome: None,
            missing: 0,
            marks: Marks(if kernel_id.is_some() { Marks::NUMBERED } else { 0 }),
        }
    }

    pub(super) fn is(&self, mark: u8) -> bool {
        self.marks.0 & mark != 0
    }

    /// Puts a mark there if `so`; what is there stays.
    pub(super) fn mark(&mut self, mark: u8, so: bool) {
        self.marks.0 |= if so { mark } else { 0 };
    }

    pub(super) fn kernel_id(&self) -> Option<u32> {
        self.is(Marks::NUMBERED).then_some(self.kernel_id)
    }

    pub(super) fn state(&self) -> Option<u8> {
        (self.state != NO_STATE).then_some(self.state)
    }

    pub(super) fn set_state(&mut self, state: Option<u8>) {
        self.state = state.unwrap_or(self.state);
    }
}

/// Whether something is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Its entry is in the kernel's table, as far as is known.
    Open,
    /// Its entry is gone; the flow may go on.
    Past,
}

/// Where a connection is kept, and its place in the kernel's table.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Slot {
    pub(super) open: Open,
    /// Of IPv4; else where both addresses stand among the wide ones.
    source: u32,
    destination: u32,
    source_port: u16,
    destination_port: u16,
    zone: u16,
    protocol: u8,
    form: Form,
}

/// [`Standing`] and whether the addresses stand elsewhere, in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Open,
    OpenWide,
    Past,
    PastWide,
}

const _: () = assert!(size_of::<Slot>() == 64, "one line of the processor's cache");

/// Addresses that don't fit a slot, each pair of one.
#[derive(Debug, Default)]
pub(super) struct Wide {
    pairs: Vec<(IpAddr, IpAddr)>,
    free: Vec<u32>,
}

impl Wide {
    /// There never was one.
    pub(super) fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    fn put(&mut self, pair: (IpAddr, IpAddr)) -> u32 {
        if let Some(at) = self.free.pop() {
            self.pairs[at as usize] = pair;
            return at;
        }
        self.pairs.push(pair);
        u32::try_from(self.pairs.len() - 1).expect("one for each slot at most")
    }
}

impl Slot {
    pub(super) fn new(key: &EntryKey, open: Open, wide: &mut Wide) -> Self {
        let Tuple { source, destination, protocol, source_port, destination_port } = key.original;
        let (form, source, destination) = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => (Form::Open, source.to_bits(), destination.to_bits()),
            pair => (Form::OpenWide, wide.put(pair), 0),
        };
        let (protocol, zone) = (protocol.number(), key.zone);
        Self { open, source, destination, source_port, destination_port, zone, protocol, form }
    }

    /// Gives back what it has among the wide ones; it is empty then.
    pub(super) fn clear(&self, wide: &mut Wide) {
        if matches!(self.form, Form::OpenWide | Form::PastWide) {
            wide.free.push(self.source);
        }
    }

    pub(super) fn standing(&self) -> Standing {
        match self.form {
            Form::Open | Form::OpenWide => Standing::Open,
            Form::Past | Form::PastWide => Standing::Past,
        }
    }

    /// Its entry is gone.
    pub(super) fn end(&mut self) {
        self.form = match self.form {
            Form::Open | Form::Past => Form::Past,
            Form::OpenWide | Form::PastWide => Form::PastWide,
        };
    }

    pub(super) fn zone(&self) -> u16 {
        self.zone
    }

    /// Its first packet, before any rewriting.
    pub(super) fn original(&self, wide: &Wide) -> Tuple {
        let (source, destination) = match self.form {
            Form::Open | Form::Past => (IpAddr::V4(self.source.into()), IpAddr::V4(self.destination.into())),
            Form::OpenWide | Form::PastWide => wide.pairs[self.source as usize],
        };
        let Self { source_port, destination_port, protocol, .. } = *self;
        Tuple { source, destination, protocol: crate::Protocol::from_number(protocol), source_port, destination_port }
    }

    /// Whether its first packet is this one.
    pub(super) fn is(&self, tuple: &Tuple, wide: &Wide) -> bool {
        let same = self.source_port == tuple.source_port
            && self.destination_port == tuple.destination_port
            && self.protocol == tuple.protocol.number();
        let narrow = matches!(self.form, Form::Open | Form::Past);
        same && match (tuple.source, tuple.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                narrow && self.source == source.to_bits() && self.destination == destination.to_bits()
            }
            pair => !narrow && wide.pairs[self.source as usize] == pair,
        }
    }
}
