//! One connection as the kernel's connection tracking describes it.

use jiff::Timestamp;

use crate::flow::Tuple;

/// Status bits of a connection (`enum ip_conntrack_status`, linux/netfilter/nf_conntrack_common.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    const SEEN_REPLY: u32 = 1 << 1;
    const ASSURED: u32 = 1 << 2;
    const SOURCE_NAT: u32 = 1 << 4;
    const DESTINATION_NAT: u32 = 1 << 5;

    /// The other end answered.
    pub fn seen_reply(self) -> bool {
        self.0 & Self::SEEN_REPLY != 0
    }

    /// Both ends spoke as the protocol wants it: for TCP the handshake is complete.
    pub fn assured(self) -> bool {
        self.0 & Self::ASSURED != 0
    }

    /// The sender's address was rewritten (masquerade).
    pub fn source_nat(self) -> bool {
        self.0 & Self::SOURCE_NAT != 0
    }

    /// The receiver's address was rewritten (a published port).
    pub fn destination_nat(self) -> bool {
        self.0 & Self::DESTINATION_NAT != 0
    }
}

/// Packets and bytes of one direction, IP headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What our own rules wrote onto the connection (its label) when its packets passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Index of the interface the first packet came in by (the bridge for a packet of a bridge port); 0: sent by the node itself.
    pub entered: u32,
    /// Index of the interface the first packet left by; 0: it was for the node itself, or it never left.
    pub left: u32,
    /// A TCP segment with payload passed, in either direction.
    pub payload: bool,
    /// An ICMP destination-unreachable that quotes this connection passed.
    pub refused: bool,
    /// The filter let it begin, or let it live when the policies were first enforced.
    pub begun: bool,
}

/// What the message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The connection began.
    New,
    /// Something about it changed.
    Update,
    /// It ended.
    Destroy,
    /// It was there when the table was read.
    Dump,
}

/// A connection's place in the kernel's table: no two living entries share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryKey {
    /// The first packet, before any rewriting.
    pub original: Tuple,
    /// Conntrack zone; 0 is the usual one.
    pub zone: u16,
}

/// One connection at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first packet, before any rewriting.
    pub original: Tuple,
    /// What an answer looks like on the far side: its source is the true server, whatever was rewritten on the way.
    pub reply: Tuple,
    /// Conntrack zone; 0 is the usual one.
    pub zone: u16,
    /// The kernel's id of this entry: another connection with the same addresses and ports has another.
    pub id: Option<u32>,
    /// Status bits.
    pub status: Status,
    /// State of the protocol's own machine (TCP: `enum tcp_conntrack`, SCTP: `enum sctp_conntrack`).
    pub state: Option<u8>,
    /// From the first sender, where the kernel counts (nf_conntrack_acct).
    pub sent: Option<Counted>,
    /// From the other end.
    pub received: Option<Counted>,
    /// When it began, where the kernel keeps that (nf_conntrack_timestamp).
    pub started: Option<Timestamp>,
    /// Our own rules' marks; `None`: this message doesn't carry them, or the connection is older than the rules.
    pub stamp: Option<Stamp>,
}

impl Entry {
    /// Its place in the kernel's table.
    pub fn key(&self) -> EntryKey {
        EntryKey { original: self.original, zone: self.zone }
    }
}
