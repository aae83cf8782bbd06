//! What is denied, counted by the kernel packet by packet: in all, by whose side it was, and by pair. And who is logged.
//!
//! # Why
//! The log is bounded, or a flood of denials would be the attack; so it cannot count. Sets with a counter an element can, at some
//! 0.1 us each, and they are bounded by their size: what finds no room is in the sum and not in the rows, and so in the row `other`.
//! The log is bounded by sender too, so that who floods it does not hide what another one does.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use nix::libc;

use super::TABLE;
use super::attribute::{find, read, text};
use super::build::{Draft, rule};
use super::expression::{Field, Ip};
use super::filter::named;
use super::model::{Dynamic, Family, KeyType, Rule, Set, Table};
use super::socket::{NftSocket, SocketError};

/// Pairs with rows of their own in the kernel, of each IP version; some 200 bytes each.
const PAIRS: u32 = 4096;
/// Addresses with rows of their own, of each IP version.
const SPOTS: u32 = 16_384;
/// Senders whose logging is bounded each for itself.
const TALKERS: u32 = 4096;
/// A row in which nothing happens goes away after this long.
pub const ROW_STAYS: Duration = Duration::from_secs(600);
/// See [`TALKERS`].
const TALKER_STAYS: Duration = Duration::from_secs(10);

/// Why, as the first part of each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// The sender's side doesn't allow it.
    Egress = 1,
    /// The receiver's side doesn't allow it.
    Ingress = 2,
    /// An address that belongs to nobody, on a guarded bridge.
    Unknown = 3,
    /// An end is quarantined.
    Cut = 4,
    /// Not allowed to the container behind a published port.
    Door = 5,
    /// As [`Reason::Egress`], in Audit.
    AuditEgress = 6,
    /// As [`Reason::Ingress`], in Audit.
    AuditIngress = 7,
    /// As [`Reason::Door`], in Audit.
    AuditDoor = 8,
    /// Sent from what is not the sender's own: counted by its port, in the bridge's table.
    Spoofed = 9,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Egress,
        Self::Ingress,
        Self::Unknown,
        Self::Cut,
        Self::Door,
        Self::AuditEgress,
        Self::AuditIngress,
        Self::AuditDoor,
        Self::Spoofed,
    ];

    /// The chain that counts it.
    pub(super) const fn chain(self) -> &'static str {
        match self {
            Self::Egress => "count_egress",
            Self::Ingress => "count_ingress",
            Self::Unknown => "count_unknown",
            Self::Cut => "count_cut",
            Self::Door => "count_door",
            Self::AuditEgress => "count_audit_egress",
            Self::AuditIngress => "count_audit_ingress",
            Self::AuditDoor => "count_audit_door",
            Self::Spoofed => "count_spoofed",
        }
    }

    fn key(self) -> [u8; 4] {
        (self as u32).to_ne_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let number = u32::from_ne_bytes(bytes.try_into().ok()?);
        Self::ALL.into_iter().find(|reason| *reason as u32 == number)
    }
}

/// Whose side said no: an interface's index (0: the node itself) and an address there. For doors it is the published port and the
/// address it is published at.
pub type CountedSpot = (u32, IpAddr);

/// Sender, receiver, IP protocol, and the port or ICMP type asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CountedPair {
    /// Who sent.
    pub from: CountedSpot,
    /// To whom.
    pub to: CountedSpot,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, or ICMP type.
    pub port: u16,
}

/// Packets, as the kernel counts them since each row began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All, by reason and IP protocol: exact.
    pub total: BTreeMap<(Reason, u8), u64>,
    /// By whose side it was.
    pub spots: BTreeMap<(Reason, CountedSpot), u64>,
    /// By pair.
    pub pairs: BTreeMap<(Reason, CountedPair), u64>,
    /// By the index of the bridge's port that it came in by: what is spoofed has no other sender.
    pub ports: BTreeMap<(Reason, u32), u64>,
}

const IPS: [Ip; 2] = [Ip::V4, Ip::V6];

fn address(ip: Ip) -> KeyType {
    Field::Source(ip).key_type()
}

/// The sets, empty, and the chains.
pub(super) fn add(table: &mut Table, mut chain: impl FnMut(&mut Table, &str, Vec<Rule>)) {
    use KeyType::{InterfaceIndex, Port, Protocol, Reason as Why};
    let mut set = |name: String, key: &[KeyType], size, timeout, comment: &str| {
        let dynamic = Some(Dynamic { timeout, size });
        table.sets.insert(name, Set { dynamic, ..Set::of(key, comment) });
    };
    // Not one can be missing: eight reasons, 256 protocols.
    set("denied".into(), &[Why, Protocol], 2048, ROW_STAYS, "packets denied (or in Audit: that would be), by reason");
    for ip in IPS {
        let spot = [InterfaceIndex, address(ip)];
        set(named("denied_by", ip), &[&[Why], &spot[..]].concat(), SPOTS, ROW_STAYS, "the same, by whose side it was");
        let pair = [&[Why], &spot[..], &spot[..], &[Protocol, Port]].concat();
        set(named("denied_pair", ip), &pair, PAIRS, ROW_STAYS, "the same, by pair");
        set(named("talkers", ip), &spot, TALKERS, TALKER_STAYS, "whose packets are logged, each at a bounded rate");
    }
    for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::Spoofed) {
        chain(table, reason.chain(), counting(reason));
    }
}

/// Ports with rows of their own; a bridge has at most 1,024 (BR_MAX_PORTS).
const PORTS: u32 = 65_536;
/// What came in by each port of a bridge and was spoofed.
const SPOOFED: &str = "spoofed";

/// The set of the bridge's table, and the chain that fills it.
pub(super) fn spoofed() -> ((String, Set), (&'static str, Vec<Rule>)) {
    let key = [KeyType::Reason, KeyType::InterfaceIndex];
    let dynamic = Some(Dynamic { timeout: ROW_STAYS, size: PORTS });
    let set = Set { dynamic, ..Set::of(&key, "packets sent from what is not the sender's own, by port") };
    let reason = Reason::Spoofed;
    ((SPOOFED.to_owned(), set), (reason.chain(), vec![rule("").count_in(&reason.key(), &[Field::Iif], SPOOFED)]))
}

fn counting(reason: Reason) -> Vec<Rule> {
    use Field::{Destination, DestinationPort, IcmpType, Icmpv6Type, Iif, L4Protocol, Oif, Source};
    let key = reason.key();
    let mut rules = vec![rule("").count_in(&key, &[L4Protocol], "denied")];
    for ip in IPS {
        let side = match reason {
            Reason::Ingress | Reason::AuditIngress => [Oif, Destination(ip)],
            Reason::Door | Reason::AuditDoor => [DestinationPort, Destination(ip)],
            Reason::Egress | Reason::AuditEgress | Reason::Unknown | Reason::Cut | Reason::Spoofed => [Iif, Source(ip)],
        };
        rules.push(rule("").ip(ip).count_in(&key, &side, &named("denied_by", ip)));
    }
    for ip in IPS {
        let icmp = match ip {
            Ip::V4 => (libc::IPPROTO_ICMP, IcmpType),
            Ip::V6 => (libc::IPPROTO_ICMPV6, Icmpv6Type),
        };
        let ports = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP].map(|number| (number, DestinationPort));
        for (number, service) in ports.into_iter().chain([icmp]) {
            let pair = [Iif, Source(ip), Oif, Destination(ip), L4Protocol, service];
            rules.push(rule("").ip(ip).l4(number as u8).count_in(&key, &pair, &named("denied_pair", ip)));
        }
    }
    rules
}

/// Logs, at a bounded rate a sender and a bounded rate in all. `only` narrows each rule.
pub(super) fn logged(group: u16, prefix: &str, only: impl Fn(Draft) -> Draft) -> Vec<Rule> {
    let said = |ip| match ip {
        Ip::V4 => "logged (IPv4)",
        Ip::V6 => "logged (IPv6)",
    };
    let draft = |ip| only(rule(said(ip)).ip(ip)).throttled(&[Field::Iif, Field::Source(ip)], &named("talkers", ip));
    IPS.into_iter().map(|ip| draft(ip).log(group, prefix)).collect()
}

/// Reads the sums, and what was spoofed.
pub(super) fn totals(socket: &mut NftSocket) -> Result<Counts, SocketError> {
    let mut counts = Counts::default();
    each(socket, Family::Inet, "denied", |key, packets| {
        counts.total.insert((Reason::read(key.get(..4)?)?, *key.get(4)?), packets);
        Some(())
    })?;
    each(socket, Family::Bridge, SPOOFED, |key, packets| {
        counts.ports.insert((Reason::read(key.get(..4)?)?, u32::from_ne_bytes(key.get(4..8)?.try_into().ok()?)), packets);
        Some(())
    })?;
    Ok(counts)
}

/// Reads all rows.
pub(super) fn rows(socket: &mut NftSocket, counts: &mut Counts) -> Result<(), SocketError> {
    for ip in IPS {
        each(socket, Family::Inet, &named("denied_by", ip), |key, packets| {
            counts.spots.insert(by(key, ip)?, packets);
            Some(())
        })?;
        each(socket, Family::Inet, &named("denied_pair", ip), |key, packets| {
            counts.pairs.insert(pair(key, ip)?, packets);
            Some(())
        })?;
    }
    Ok(())
}

fn by(key: &[u8], ip: Ip) -> Option<(Reason, CountedSpot)> {
    Some((Reason::read(key.get(..4)?)?, spot(key.get(4..)?, ip)?.0))
}

fn pair(key: &[u8], ip: Ip) -> Option<(Reason, CountedPair)> {
    let (from, rest) = spot(key.get(4..)?, ip)?;
    let (to, rest) = spot(rest, ip)?;
    let protocol = *rest.first()?;
    let icmp = i32::from(protocol) == libc::IPPROTO_ICMP || i32::from(protocol) == libc::IPPROTO_ICMPV6;
    let port = if icmp { u16::from(*rest.get(4)?) } else { u16::from_be_bytes(rest.get(4..6)?.try_into().ok()?) };
    Some((Reason::read(key.get(..4)?)?, CountedPair { from, to, protocol, port }))
}

fn spot(key: &[u8], ip: Ip) -> Option<(CountedSpot, &[u8])> {
    let interface = u32::from_ne_bytes(key.get(..4)?.try_into().ok()?);
    let (address, rest): (IpAddr, &[u8]) = match ip {
        Ip::V4 => (<[u8; 4]>::try_from(key.get(4..8)?).ok()?.into(), key.get(8..)?),
        Ip::V6 => (<[u8; 16]>::try_from(key.get(4..20)?).ok()?.into(), key.get(20..)?),
    };
    Some(((interface, address), rest))
}

/// Each element's key and packets; what cannot be read is an error, not a smaller number.
fn each(socket: &mut NftSocket, family: Family, set: &str, mut row: impl FnMut(&[u8], u64) -> Option<()>) -> Result<(), SocketError> {
    let unreadable = || SocketError::Unreadable { what: format!("set {set}") };
    let asked = [text(1, TABLE), text(2, set)];
    let found = socket.ask(family, libc::NFT_MSG_GETSETELEM as u8, &asked, true, set)?;
    for message in found.unwrap_or_default() {
        for (key, packets) in counted(&message).ok_or_else(unreadable)? {
            row(&key, packets).ok_or_else(unreadable)?;
        }
    }
    Ok(())
}

/// Keys and packets of the elements in one message.
fn counted(message: &[(u16, Vec<u8>)]) -> Option<Vec<(Vec<u8>, u64)>> {
    // NFTA_SET_ELEM_LIST_ELEMENTS
    let elements = read(find(message, 3).unwrap_or_default())?;
    let one = |element: &[u8]| {
        // NFTA_SET_ELEM_KEY (NFTA_DATA_VALUE), EXPR (NFTA_EXPR_DATA (NFTA_COUNTER_PACKETS))
        let element = read(element)?;
        let key = read(find(&element, 1)?)?;
        let counter = read(find(&read(find(&element, 7)?)?, 2)?)?;
        let packets = u64::from_be_bytes(find(&counter, 2)?.try_into().ok()?);
        Some((find(&key, 1)?.to_vec(), packets))
    };
    elements.iter().map(|(_, element)| one(element)).collect()
}

/// See [`crate::fuzzing`].
#[cfg(any(fuzzing, test))]
pub(super) fn read_any(message: &[(u16, Vec<u8>)]) {
    for (key, _) in counted(message).unwrap_or_default() {
        for ip in IPS {
            let _ = (by(&key, ip), pair(&key, ip));
        }
    }
}
