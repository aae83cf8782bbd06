//! Our own table that makes the network namespace track connections and writes on each where its first packet came in and went
//! out: `inet bulkhead-observe`. Installed through netlink, removed at the end.
//!
//! # Why
//! A namespace tracks nothing until a rule asks for `ct` (measured). An address says little about who sent a packet; the bridge
//! it came in by does, and conntrack's own events leave that out. So the rules write the two interface indices into the
//! connection's label (128 bits that the kernel keeps for rules; they come with NEW and in dumps), and two flags later: the first
//! TCP segment with payload (so that use is told from a bare handshake at once, without polling byte counts), and an ICMP error
//! that quotes the connection (UDP that is served and UDP that is refused look alike otherwise). The kernel sends one more event
//! for each flag, and none for the stations in between, since the event mask leaves them out.
//!
//! The table has the flag `owner` where the kernel knows it: nobody else can change it, and it goes when the agent goes.
//! What it costs others: programs that listen to conntrack events get only the kinds in the mask, and a label that another
//! program writes is mixed with ours.

use std::io;

use super::conntrack::label;
use super::netfilter::{Channel, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Writer};

/// The table's name, in family inet.
pub const TABLE: &str = "bulkhead-observe";

const FAMILY_INET: u8 = 1;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `enum nf_tables_msg_types`.
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;

/// `NFT_TABLE_F_OWNER`, since kernel 5.12.
const OWNER: u32 = 0x2;

/// Hooks (`enum nf_inet_hooks`) with the priorities of our chains: after conntrack itself (-200) and, going out, after
/// everybody's address translation (100).
const PREROUTING: (u32, i32) = (0, -150);
const OUTPUT: (u32, i32) = (3, -150);
const POSTROUTING: (u32, i32) = (4, 300);

/// Bits of `ct state` as the expression loads it (`NF_CT_STATE_BIT`).
const ESTABLISHED: u32 = 0x2;
const RELATED: u32 = 0x4;
const NEW: u32 = 0x8;

/// Bits of `ct event` (`enum ip_conntrack_events`).
const EVENT_NEW: u32 = 1 << 0;
const EVENT_DESTROY: u32 = 1 << 2;
const EVENT_REPLY: u32 = 1 << 3;
const EVENT_ASSURED: u32 = 1 << 4;
const EVENT_LABEL: u32 = 1 << 10;

/// Keys of the expressions `ct` and `meta`.
const CT_STATE: u32 = 0;
const CT_LABELS: u32 = 13;
const CT_EVENTS: u32 = 18;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_OUT_TYPE: u32 = 9;
const META_PROTOCOL: u32 = 16;

const LOOPBACK: u16 = nix::libc::ARPHRD_LOOPBACK;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Destination unreachable (RFC 792, RFC 4443): what refuses UDP. Others only slow or warn.
const UNREACHABLE: u8 = 3;
const UNREACHABLE_V6: u8 = 1;

/// The first 16-byte register, and the 4-byte registers it consists of.
const REGISTER: u32 = 1;
const WORD: u32 = 8;
/// The register of verdicts, and the verdict of going on behind this chain.
const VERDICT: u32 = nix::libc::NFT_REG_VERDICT as u32;
const ACCEPT: u32 = nix::libc::NF_ACCEPT as u32;

/// What the kernel lets us do; without the rest we see less, and say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Nobody else can change the table.
    pub owner: bool,
    /// Interfaces and refusals are written into labels (NF_CONNTRACK_LABELS).
    pub labels: bool,
    /// So is payload (inner header, since kernel 5.16).
    pub payload: bool,
}

/// What is tried in turn.
const ATTEMPTS: [Features; 6] = {
    const fn features(owner: bool, labels: bool, payload: bool) -> Features {
        Features { owner, labels, payload }
    }
    [
        features(true, true, true),
        features(false, true, true),
        features(true, true, false),
        features(false, true, false),
        features(true, false, false),
        features(false, false, false),
    ]
};

/// Why the table can't be installed.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The socket itself.
    #[error("cannot speak netfilter's netlink")]
    Netlink(#[source] io::Error),
    /// Without the capability nothing works.
    #[error("not permitted to install table inet {TABLE}: run as root or with CAP_NET_ADMIN")]
    NotPermitted,
    /// An agent that lives owns it.
    #[error("table inet {TABLE} belongs to another process: only one agent may observe a network namespace")]
    Taken,
    /// The kernel refuses even the plainest form.
    #[error("the kernel refuses table inet {TABLE}")]
    Refused(#[source] io::Error),
}

/// The installed table; removed by [`Table::remove`], or by the kernel when the process ends (with `owner`).
#[derive(Debug)]
pub struct Table {
    channel: Channel,
    features: Features,
    /// We took it out ourselves.
    lifted: bool,
}

fn kind(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}

impl Table {
    /// Installs the table in this thread's network namespace, with as much as the kernel can.
    ///
    /// # Errors
    /// Not permitted, taken, or refused; see [`TableError`].
    pub fn install() -> Result<Self, TableError> {
        let mut channel = Channel::open().map_err(TableError::Netlink)?;
        // What an agent without `owner` left behind; an owned one refuses.
        let _ = remove(&mut channel);
        if present(&mut channel).map_err(TableError::Netlink)? {
            return Err(TableError::Taken);
        }
        let mut refused = io::Error::from(io::ErrorKind::Unsupported);
        for features in ATTEMPTS {
            match batch(&mut channel, |writer, sequence| write(writer, sequence, features)) {
                Ok(()) => return Ok(Self { channel, features, lifted: false }),
                Err(error) if error.raw_os_error() == Some(nix::libc::EPERM) => return Err(TableError::NotPermitted),
                Err(error) => refused = error,
            }
        }
        Err(TableError::Refused(refused))
    }

    /// What this kernel can.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Puts the table back if somebody took it away; true if that was so. With `owner` nobody can.
    ///
    /// # Errors
    /// The kernel's.
    pub fn repair(&mut self) -> io::Result<bool> {
        // Its owner is a socket of this process: it is there as long as we are.
        if (self.features.owner && !self.lifted) || present(&mut self.channel)? {
            return Ok(false);
        }
        let features = self.features;
        batch(&mut self.channel, |writer, sequence| write(writer, sequence, features))?;
        self.lifted = false;
        Ok(true)
    }

    /// Takes the table out until [`Table::repair`]; gone already is fine.
    ///
    /// # Errors
    /// The kernel's.
    pub fn lift(&mut self) -> io::Result<()> {
        if !self.lifted && present(&mut self.channel)? {
            remove(&mut self.channel)?;
        }
        self.lifted = true;
        Ok(())
    }

    /// Removes the table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(mut self) -> io::Result<()> {
        self.lift()
    }
}

/// Removes what an agent left behind that had no `owner` flag; nothing there is fine.
///
/// # Errors
/// The kernel's: EPERM without CAP_NET_ADMIN, or while a living agent owns it.
pub fn remove_left_over() -> io::Result<()> {
    let mut channel = Channel::open()?;
    if present(&mut channel)? { remove(&mut channel) } else { Ok(()) }
}

fn present(channel: &mut Channel) -> io::Result<bool> {
    let sequence = channel.next_sequence();
    let mut writer = Writer::default();
    writer.message(kind(GET_TABLE), NLM_F_ACK, sequence, FAMILY_INET, 0);
    writer.text(nfta::TABLE_NAME, TABLE);
    match channel.ask(&writer.finish(), sequence, |_| {}) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn remove(channel: &mut Channel) -> io::Result<()> {
    batch(channel, |writer, sequence| {
        writer.message(kind(DELETE_TABLE), NLM_F_ACK, sequence, FAMILY_INET, 0);
        writer.text(nfta::TABLE_NAME, TABLE);
    })
}

/// One transaction; its last message is answered, or the first that is wrong.
fn batch(channel: &mut Channel, body: impl FnOnce(&mut Writer, u32)) -> io::Result<()> {
    let sequence = channel.next_sequence();
    let mut writer = Writer::default();
    writer.message(BATCH_BEGIN, 0, sequence, 0, SUBSYSTEM);
    body(&mut writer, sequence);
    writer.message(BATCH_END, 0, sequence, 0, SUBSYSTEM);
    channel.ask(&writer.finish(), sequence, |_| {})
}

/// Attributes of nf_tables (linux/netfilter/nf_tables.h).
mod nfta {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const TABLE_FLAGS: u16 = 2;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const EXPRESSION_NAME: u16 = 1;
    pub(super) const EXPRESSION_DATA: u16 = 2;
    pub(super) const DATA_VALUE: u16 = 1;
    pub(super) const DATA_VERDICT: u16 = 2;
}

fn write(writer: &mut Writer, sequence: u32, features: Features) {
    writer.message(kind(NEW_TABLE), NLM_F_CREATE, sequence, FAMILY_INET, 0);
    writer.text(nfta::TABLE_NAME, TABLE);
    writer.number(nfta::TABLE_FLAGS, if features.owner { OWNER } else { 0 });
    let chains = chains(features);
    let last = chains.len() - 1;
    for (index, (name, (hook, priority), rules)) in chains.into_iter().enumerate() {
        writer.message(kind(NEW_CHAIN), NLM_F_CREATE, sequence, FAMILY_INET, 0);
        writer.text(nfta::CHAIN_TABLE, TABLE);
        writer.text(nfta::CHAIN_NAME, name);
        writer.nest(nfta::CHAIN_HOOK, |writer| {
            writer.number(nfta::HOOK_NUMBER, hook);
            writer.attribute(nfta::HOOK_PRIORITY, &priority.to_be_bytes());
        });
        writer.text(nfta::CHAIN_TYPE, "filter");
        let final_rule = rules.len() - 1;
        for (number, rule) in rules.into_iter().enumerate() {
            // Only the last message of the batch is answered when all is well.
            let answered = if index == last && number == final_rule { NLM_F_ACK } else { 0 };
            writer.message(kind(NEW_RULE), NLM_F_CREATE | NLM_F_APPEND | answered, sequence, FAMILY_INET, 0);
            writer.text(nfta::RULE_TABLE, TABLE);
            writer.text(nfta::RULE_CHAIN, name);
            writer.nest(nfta::RULE_EXPRESSIONS, |writer| {
                for expression in rule {
                    expression.write(writer);
                }
            });
        }
    }
}

type Chain = (&'static str, (u32, i32), Vec<Vec<Expression>>);

fn chains(features: Features) -> Vec<Chain> {
    use Expression as E;
    let masks = |extra: u32| [(true, EVENT_NEW | EVENT_DESTROY | extra), (false, EVENT_NEW | EVENT_DESTROY | EVENT_REPLY | extra)];
    let masks = match features {
        Features { labels: false, .. } => masks(EVENT_ASSURED),
        Features { payload: false, .. } => masks(EVENT_ASSURED | EVENT_LABEL),
        Features { labels: true, payload: true, .. } => masks(EVENT_LABEL),
    };
    let first = |place: Option<usize>, interface: u32| -> Vec<Vec<E>> {
        masks
            .iter()
            .map(|&(tcp, mask)| {
                let mut rule = vec![E::State(NEW), E::Protocol(TCP, tcp)];
                if let Some(place) = place {
                    // Only once: labels are written bit over bit.
                    rule.extend([E::LabelIsClear { at: place, bits: [0xff; 4] }, E::Mark { at: place, what: Mark::Interface(interface) }]);
                }
                rule.push(E::Events(mask));
                rule
            })
            .collect()
    };
    let flag = |bit: u8| [bit, 0, 0, 0];
    let payload = vec![
        E::State(ESTABLISHED),
        E::Protocol(TCP, true),
        E::LabelIsClear { at: label::FLAGS, bits: flag(label::PAYLOAD) },
        E::HasPayload,
        E::Mark { at: label::FLAGS, what: Mark::Bits(flag(label::PAYLOAD)) },
    ];
    let refused = |protocol: u8, kind: u8| {
        let what = Mark::Bits(flag(label::REFUSED));
        vec![E::State(RELATED), E::Protocol(protocol, true), E::FirstByte(kind), E::Mark { at: label::FLAGS, what }]
    };
    // Most packets are neither first ones nor errors: they are done after the fewest questions that can be asked.
    let most = || vec![E::State(ESTABLISHED), E::Done];
    let mut came = Vec::new();
    let mut sent = Vec::new();
    if features.payload {
        came.push(payload.clone());
        sent.push(payload);
    }
    came.push(most());
    sent.push(most());
    came.extend(first(features.labels.then_some(label::ENTERED), META_IIF));
    let mut left = vec![most()];
    left.extend(first(features.labels.then_some(label::LEFT), META_OIF));
    // The node with itself: nobody's edge, and it may be a busy database on loopback.
    left.push(vec![E::State(NEW), E::LeavesByLoopback, E::Events(0)]);
    if features.labels {
        for rules in [&mut came, &mut sent] {
            rules.push(refused(ICMP, UNREACHABLE));
            rules.push(refused(ICMPV6, UNREACHABLE_V6));
        }
    }
    vec![("came", PREROUTING, came), ("sent", OUTPUT, sent), ("left", POSTROUTING, left)]
}

#[derive(Clone, Debug)]
enum Mark {
    /// The index of the interface, by the key of `meta`.
    Interface(u32),
    Bits([u8; 4]),
}

/// What our rules are made of: each a few of the kernel's expressions.
#[derive(Clone, Debug)]
enum Expression {
    /// The packet's state has one of these bits.
    State(u32),
    /// It is, or isn't, of this protocol.
    Protocol(u8, bool),
    /// None of these bits is set in the label's word at this byte.
    LabelIsClear { at: usize, bits: [u8; 4] },
    /// Sets bits of the label's word at this byte.
    Mark { at: usize, what: Mark },
    /// There is something behind the TCP header.
    HasPayload,
    /// The first byte of the transport header: ICMP's type.
    FirstByte(u8),
    /// It leaves by a loopback interface.
    LeavesByLoopback,
    /// Which events the kernel sends for this connection.
    Events(u32),
    /// Nothing more is asked of this packet.
    Done,
}

impl Expression {
    fn write(self, writer: &mut Writer) {
        match self {
            Self::State(bits) => {
                ct_load(writer, CT_STATE, WORD);
                masked(writer, WORD, &bits.to_ne_bytes());
                compare(writer, WORD, false, &[0; 4]);
            }
            Self::Protocol(protocol, is) => {
                meta(writer, META_PROTOCOL, WORD);
                compare(writer, WORD, is, &[protocol]);
            }
            Self::LabelIsClear { at, bits } => {
                ct_load(writer, CT_LABELS, REGISTER);
                let mut mask = [0; label::SIZE];
                mask[at..at + 4].copy_from_slice(&bits);
                masked(writer, REGISTER, &mask);
                compare(writer, REGISTER, true, &[0; label::SIZE]);
            }
            Self::Mark { at, what } => {
                let mut value = [0; label::SIZE];
                if let Mark::Bits(bits) = what {
                    value[at..at + 4].copy_from_slice(&bits);
                }
                immediate(writer, REGISTER, &value);
                if let Mark::Interface(key) = what {
                    meta(writer, key, WORD + u32::try_from(at / 4).unwrap_or(0));
                }
                ct_store(writer, CT_LABELS, REGISTER);
            }
            Self::HasPayload => payload(writer, 3, 0, 1),
            Self::FirstByte(value) => {
                payload(writer, 2, 0, 1);
                compare(writer, WORD, true, &[value]);
            }
            Self::LeavesByLoopback => {
                meta(writer, META_OUT_TYPE, WORD);
                compare(writer, WORD, true, &LOOPBACK.to_ne_bytes());
            }
            Self::Done => expression(writer, "immediate", |writer| {
                writer.number(1, VERDICT);
                writer.nest(2, |writer| writer.nest(nfta::DATA_VERDICT, |writer| writer.number(1, ACCEPT)));
            }),
            Self::Events(mask) => {
                immediate(writer, WORD, &mask.to_ne_bytes());
                ct_store(writer, CT_EVENTS, WORD);
            }
        }
    }
}

fn expression(writer: &mut Writer, name: &str, inside: impl FnOnce(&mut Writer)) {
    writer.nest(nfta::LIST_ELEMENT, |writer| {
        writer.text(nfta::EXPRESSION_NAME, name);
        writer.nest(nfta::EXPRESSION_DATA, inside);
    });
}

fn data(writer: &mut Writer, kind: u16, value: &[u8]) {
    writer.nest(kind, |writer| writer.attribute(nfta::DATA_VALUE, value));
}

/// NFTA_CT_DREG 1, NFTA_CT_KEY 2, NFTA_CT_SREG 4.
fn ct_load(writer: &mut Writer, key: u32, register: u32) {
    expression(writer, "ct", |writer| {
        writer.number(1, register);
        writer.number(2, key);
    });
}

fn ct_store(writer: &mut Writer, key: u32, register: u32) {
    expression(writer, "ct", |writer| {
        writer.number(2, key);
        writer.number(4, register);
    });
}

/// NFTA_META_DREG 1, NFTA_META_KEY 2.
fn meta(writer: &mut Writer, key: u32, register: u32) {
    expression(writer, "meta", |writer| {
        writer.number(1, register);
        writer.number(2, key);
    });
}

/// NFTA_BITWISE_SREG 1, DREG 2, LEN 3, MASK 4, XOR 5.
fn masked(writer: &mut Writer, register: u32, mask: &[u8]) {
    expression(writer, "bitwise", |writer| {
        writer.number(1, register);
        writer.number(2, register);
        writer.number(3, u32::try_from(mask.len()).unwrap_or(0));
        data(writer, 4, mask);
        data(writer, 5, &[0; label::SIZE][..mask.len()]);
    });
}

/// NFTA_CMP_SREG 1, OP 2 (0 equal, 1 not equal), DATA 3.
fn compare(writer: &mut Writer, register: u32, equal: bool, value: &[u8]) {
    expression(writer, "cmp", |writer| {
        writer.number(1, register);
        writer.number(2, u32::from(!equal));
        data(writer, 3, value);
    });
}

/// NFTA_IMMEDIATE_DREG 1, DATA 2.
fn immediate(writer: &mut Writer, register: u32, value: &[u8]) {
    expression(writer, "immediate", |writer| {
        writer.number(1, register);
        data(writer, 2, value);
    });
}

/// NFTA_PAYLOAD_DREG 1, BASE 2 (2 transport header, 3 what is behind it), OFFSET 3, LEN 4. No such byte: the rule doesn't match.
fn payload(writer: &mut Writer, base: u32, offset: u32, length: u32) {
    expression(writer, "payload", |writer| {
        writer.number(1, WORD);
        writer.number(2, base);
        writer.number(3, offset);
        writer.number(4, length);
    });
}
