//! The event as the kernel mostly writes it, of IPv4 with ports: its tuples stand where they always do, and are compared and read as
//! they lie. Whatever looks otherwise in any way is left to the careful reader, which says what is wrong, if anything is.
//!
//! # Why
//! Walking nested attributes one by one took half of the time that the reading thread spends on its own. Both readers give the same;
//! a property test holds them to it.

use std::net::{IpAddr, Ipv4Addr};

use policy::Tuple;
use policy::service::Protocol;
use policy::track::{Counted, Entry, Kind, Stamp, Status};

use super::{FAMILY_IPV4, cta, kind, stamp, time};

/// Where the attributes begin, behind both headers.
const ATTRIBUTES: usize = 20;
/// Bytes of a tuple of IPv4 with ports.
const TUPLE: usize = 52;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
const KIND: u16 = 0x3fff;

/// An attribute's header as one word.
const fn head(length: u16, kind: u16) -> u32 {
    let ([a, b], [c, d]) = (length.to_ne_bytes(), kind.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

fn is(from: &[u8], at: usize, wanted: u32) -> Option<()> {
    (u32::from_ne_bytes(bytes(from, at)?) == wanted).then_some(())
}

fn tuple(tuple: &[u8; TUPLE], kind: u16) -> Option<Tuple> {
    let word = |at: usize| u32::from_ne_bytes([tuple[at], tuple[at + 1], tuple[at + 2], tuple[at + 3]]);
    let as_always = word(0) == head(52, NESTED | kind)
        && word(4) == head(20, NESTED | cta::TUPLE_IP)
        && word(8) == head(8, cta::IP_V4_SRC)
        && word(16) == head(8, cta::IP_V4_DST)
        && word(24) == head(28, NESTED | cta::TUPLE_PROTO)
        && word(28) == head(5, cta::PROTO_NUM)
        && word(36) == head(6, cta::PROTO_SRC_PORT)
        && word(44) == head(6, cta::PROTO_DST_PORT);
    let address = |at: usize| IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(word(at))));
    let port = |at: usize| u16::from_be_bytes([tuple[at], tuple[at + 1]]);
    as_always.then(|| Tuple {
        source: address(12),
        destination: address(20),
        protocol: Protocol::from_number(tuple[32]),
        source_port: port(40),
        destination_port: port(48),
    })
}

/// Two numbers of 64 bits as the first two kinds.
fn pair(value: &[u8]) -> Option<(u64, u64)> {
    is(value, 0, head(12, 1))?;
    is(value, 12, head(12, 2))?;
    Some((u64::from_be_bytes(bytes(value, 4)?), u64::from_be_bytes(bytes(value, 16)?))).filter(|_| value.len() == 24)
}

fn counted(value: &[u8]) -> Option<Counted> {
    let (packets, bytes) = pair(value)?;
    Some(Counted { packets, bytes })
}

fn state(value: &[u8]) -> Option<u8> {
    let protocol = u16::from_ne_bytes(bytes(value, 2)?) & KIND;
    let all = usize::from(u16::from_ne_bytes(bytes(value, 0)?)) == value.len();
    is(value, 4, head(5, cta::PROTOINFO_STATE))?;
    value.get(8).copied().filter(|_| all && matches!(protocol, cta::PROTOINFO_TCP | cta::PROTOINFO_SCTP))
}

/// The one event in a datagram; `None`: not as the kernel mostly writes it.
pub(super) fn read(datagram: &[u8]) -> Option<(Kind, Entry)> {
    let length = u32::from_ne_bytes(bytes(datagram, 0)?);
    if usize::try_from(length) != Ok(datagram.len()) || *datagram.get(16)? != FAMILY_IPV4 {
        return None;
    }
    let kind = kind(u16::from_ne_bytes(bytes(datagram, 4)?), u16::from_ne_bytes(bytes(datagram, 6)?), false).ok()?;
    let original = tuple(datagram.get(ATTRIBUTES..)?.first_chunk()?, cta::TUPLE_ORIG)?;
    let reply = tuple(datagram.get(ATTRIBUTES + TUPLE..)?.first_chunk()?, cta::TUPLE_REPLY)?;
    if !original.protocol.has_ports() || original.protocol != reply.protocol {
        return None;
    }
    let (mut zone, mut id, mut status, mut protocol_state) = (0, None, Status::default(), None);
    let (mut sent, mut received, mut started, mut stamped): (_, _, _, Option<Stamp>) = (None, None, None, None);
    let mut rest = datagram.get(ATTRIBUTES + 2 * TUPLE..)?;
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        match u16::from_ne_bytes([c, d]) & KIND {
            cta::TUPLE_ORIG | cta::TUPLE_REPLY => return None,
            cta::STATUS => status = Status(u32::from_be_bytes(value.try_into().ok()?)),
            cta::ID => id = Some(u32::from_be_bytes(value.try_into().ok()?)),
            cta::ZONE => zone = u16::from_be_bytes(value.try_into().ok()?),
            cta::PROTOINFO => protocol_state = Some(state(value)?),
            cta::COUNTERS_ORIG => sent = Some(counted(value)?),
            cta::COUNTERS_REPLY => received = Some(counted(value)?),
            cta::LABELS => stamped = stamp(value).ok()?,
            cta::TIMESTAMP => started = time(pair(value)?.0),
            cta::TIMESTAMP_EVENT if kind == Kind::New => started = started.or(time(u64::from_be_bytes(value.try_into().ok()?))),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    let state = protocol_state;
    rest.is_empty().then_some((kind, Entry { original, reply, zone, id, status, state, sent, received, started, stamp: stamped }))
}
