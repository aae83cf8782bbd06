//! The kernel's table of connections: reading one message, dumping the table, deleting one connection.
//!
//! Reading is pure and strict (see [`netfilter`](super::netfilter)); what a connection means is [`policy::track`]'s business.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use jiff::Timestamp;
use policy::Tuple;
use policy::service::Protocol;
use policy::track::{Counted, Entry, EntryKey, Kind, Stamp, Status};

use super::netfilter::{Attributes, Channel, Message, NLM_F_ACK, NLM_F_DUMP, Part, Parts, Unreadable, Writer};

mod quick;

/// `NFNL_SUBSYS_CTNETLINK` (linux/netfilter/nfnetlink.h).
const SUBSYSTEM: u8 = 1;
/// `enum cntl_msg_types` (linux/netfilter/nfnetlink_conntrack.h).
const MESSAGE_NEW: u8 = 0;
const MESSAGE_GET: u8 = 1;
const MESSAGE_DELETE: u8 = 2;

/// Multicast groups (`enum nfnetlink_groups`).
pub(crate) const GROUP_NEW: u32 = 1;
pub(crate) const GROUP_UPDATE: u32 = 2;
pub(crate) const GROUP_DESTROY: u32 = 3;

const FAMILY_IPV4: u8 = 2;
const FAMILY_IPV6: u8 = 10;

/// `enum ctattr_type` and the nested ones, as far as they are read.
mod cta {
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOINFO: u16 = 4;
    pub(super) const COUNTERS_ORIG: u16 = 9;
    pub(super) const COUNTERS_REPLY: u16 = 10;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    pub(super) const TIMESTAMP: u16 = 20;
    /// Since Linux 6.14, on events.
    pub(super) const TIMESTAMP_EVENT: u16 = 27;
    pub(super) const LABELS: u16 = 22;
    pub(super) const LABELS_MASK: u16 = 23;

    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    pub(super) const IP_V4_SRC: u16 = 1;
    pub(super) const IP_V4_DST: u16 = 2;
    pub(super) const IP_V6_SRC: u16 = 3;
    pub(super) const IP_V6_DST: u16 = 4;
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;
    pub(super) const PROTO_ICMP_ID: u16 = 4;
    pub(super) const PROTO_ICMP_TYPE: u16 = 5;
    pub(super) const PROTO_ICMP_CODE: u16 = 6;
    pub(super) const PROTO_ICMPV6_ID: u16 = 7;
    pub(super) const PROTO_ICMPV6_TYPE: u16 = 8;
    pub(super) const PROTO_ICMPV6_CODE: u16 = 9;

    pub(super) const PROTOINFO_TCP: u16 = 1;
    pub(super) const PROTOINFO_SCTP: u16 = 3;
    /// Both protocols put their state first.
    pub(super) const PROTOINFO_STATE: u16 = 1;
    pub(super) const COUNTERS_PACKETS: u16 = 1;
    pub(super) const COUNTERS_BYTES: u16 = 2;
    pub(super) const TIMESTAMP_START: u16 = 1;
}

/// The 128 bits of a connection's label as our rules use them; see [`table`](super::table).
pub(crate) mod label {
    /// Bytes of the whole.
    pub(crate) const SIZE: usize = 16;
    /// Where the index of the interface stands that the first packet came in by, in the host's order.
    pub(crate) const ENTERED: usize = 0;
    /// Where the index of the interface stands that the first packet left by.
    pub(crate) const LEFT: usize = 4;
    /// The flags' byte.
    pub(crate) const FLAGS: usize = 8;
    /// A TCP segment with payload passed.
    pub(crate) const PAYLOAD: u8 = 1;
    /// An ICMP error that quotes the connection passed.
    pub(crate) const REFUSED: u8 = 2;
    /// The byte of the filter, and its bit: it let the connection begin.
    pub(crate) const FILTER: usize = 9;
    /// See [`FILTER`].
    pub(crate) const BEGUN: u8 = 1;
    /// Where the filter writes the index of the bridge whose connection it is, if another bridge has the same addresses.
    pub(crate) const HOME: usize = 12;
}

fn tuple(attributes: Attributes<'_>) -> Result<Tuple, Unreadable> {
    let (mut source, mut destination, mut protocol) = (None, None, None);
    let (mut source_port, mut destination_port) = (0, 0);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            cta::TUPLE_IP => {
                for part in attribute.nested() {
                    let part = part?;
                    match part.kind {
                        cta::IP_V4_SRC => source = Some(IpAddr::from(Ipv4Addr::from(part.bytes::<4>()?))),
                        cta::IP_V4_DST => destination = Some(IpAddr::from(Ipv4Addr::from(part.bytes::<4>()?))),
                        cta::IP_V6_SRC => source = Some(IpAddr::from(Ipv6Addr::from(part.bytes::<16>()?))),
                        cta::IP_V6_DST => destination = Some(IpAddr::from(Ipv6Addr::from(part.bytes::<16>()?))),
                        _ => {}
                    }
                }
            }
            cta::TUPLE_PROTO => {
                for part in attribute.nested() {
                    let part = part?;
                    match part.kind {
                        cta::PROTO_NUM => protocol = Some(Protocol::from_number(part.u8()?)),
                        cta::PROTO_SRC_PORT | cta::PROTO_ICMP_ID | cta::PROTO_ICMPV6_ID => source_port = part.u16()?,
                        cta::PROTO_DST_PORT => destination_port = part.u16()?,
                        cta::PROTO_ICMP_TYPE | cta::PROTO_ICMPV6_TYPE => destination_port = u16::from(part.u8()?),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let missing = Unreadable("a connection without addresses or protocol");
    let (Some(source), Some(destination), Some(protocol)) = (source, destination, protocol) else { return Err(missing) };
    Ok(Tuple { source, destination, protocol, source_port, destination_port }.canonical())
}

fn counted(attributes: Attributes<'_>) -> Result<Counted, Unreadable> {
    let mut counted = Counted::default();
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            cta::COUNTERS_PACKETS => counted.packets = attribute.u64()?,
            cta::COUNTERS_BYTES => counted.bytes = attribute.u64()?,
            _ => {}
        }
    }
    Ok(counted)
}

fn state(attributes: Attributes<'_>) -> Result<Option<u8>, Unreadable> {
    for attribute in attributes {
        let attribute = attribute?;
        if matches!(attribute.kind, cta::PROTOINFO_TCP | cta::PROTOINFO_SCTP) {
            for part in attribute.nested() {
                let part = part?;
                if part.kind == cta::PROTOINFO_STATE {
                    return part.u8().map(Some);
                }
            }
        }
    }
    Ok(None)
}

fn time(nanoseconds: u64) -> Option<Timestamp> {
    const SECOND: u64 = 1_000_000_000;
    let (seconds, within) = (i64::try_from(nanoseconds / SECOND).ok()?, i32::try_from(nanoseconds % SECOND).ok()?);
    // 0 stands for "not yet" on a living connection.
    (nanoseconds > 0).then(|| Timestamp::new(seconds, within).ok()).flatten()
}

fn stamp(bytes: &[u8]) -> Result<Option<Stamp>, Unreadable> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
    let short = Unreadable("a connection's label is too short");
    let (Some(entered), Some(left), Some(&flags)) = (word(label::ENTERED), word(label::LEFT), bytes.get(label::FLAGS)) else {
        return Err(short);
    };
    // Every packet comes in by an interface or leaves by one: without either, our rules never met the first packet.
    let known = entered != 0 || left != 0;
    let begun = bytes.get(label::FILTER).is_some_and(|bits| bits & label::BEGUN != 0);
    Ok(known.then_some(Stamp { entered, left, payload: flags & label::PAYLOAD != 0, refused: flags & label::REFUSED != 0, begun }))
}

/// One connection out of the attributes of one message; of the first event, its time is that of the beginning.
fn entry(attributes: Attributes<'_>, kind: Kind) -> Result<Entry, Unreadable> {
    let (mut original, mut reply) = (None, None);
    let (mut zone, mut id, mut status, mut protocol_state) = (0, None, Status::default(), None);
    let (mut sent, mut received, mut started, mut stamped) = (None, None, None, None);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            cta::TUPLE_ORIG => original = Some(tuple(attribute.nested())?),
            cta::TUPLE_REPLY => reply = Some(tuple(attribute.nested())?),
            cta::STATUS => status = Status(attribute.u32()?),
            cta::PROTOINFO => protocol_state = state(attribute.nested())?,
            cta::COUNTERS_ORIG => sent = Some(counted(attribute.nested())?),
            cta::COUNTERS_REPLY => received = Some(counted(attribute.nested())?),
            cta::ID => id = Some(attribute.u32()?),
            cta::ZONE => zone = attribute.u16()?,
            cta::LABELS => stamped = stamp(attribute.value)?,
            cta::TIMESTAMP_EVENT if kind == Kind::New => started = started.or(time(attribute.u64()?)),
            cta::TIMESTAMP => {
                for part in attribute.nested() {
                    let part = part?;
                    if part.kind == cta::TIMESTAMP_START {
                        started = time(part.u64()?);
                    }
                }
            }
            _ => {}
        }
    }
    let (Some(original), Some(reply)) = (original, reply) else { return Err(Unreadable("a connection without both its tuples")) };
    if original.protocol != reply.protocol {
        return Err(Unreadable("a connection whose two tuples differ in protocol"));
    }
    let state = protocol_state;
    Ok(Entry { original, reply, zone, id, status, state, sent, received, started, stamp: stamped })
}

/// What a message is, by its own kind (`nlmsg_type`) and its flags.
fn kind(message: u16, flags: u16, dump: bool) -> Result<Kind, Unreadable> {
    let [subsystem, number] = message.to_be_bytes();
    if subsystem != SUBSYSTEM {
        return Err(Unreadable("a message of another subsystem"));
    }
    match number {
        MESSAGE_NEW if dump => Ok(Kind::Dump),
        // `ctnetlink_conntrack_event`: a NEW event is the message with NLM_F_CREATE, an UPDATE the one without.
        MESSAGE_NEW if flags & super::netfilter::NLM_F_CREATE != 0 => Ok(Kind::New),
        MESSAGE_NEW => Ok(Kind::Update),
        MESSAGE_DELETE => Ok(Kind::Destroy),
        _ => Err(Unreadable("an unknown kind of conntrack message")),
    }
}

fn read_message(message: &Message<'_>, dump: bool) -> Result<(Kind, Entry), Unreadable> {
    let kind = kind(message.kind, message.flags, dump)?;
    if !matches!(message.family, FAMILY_IPV4 | FAMILY_IPV6) {
        return Err(Unreadable("a connection of an unknown address family"));
    }
    Ok((kind, entry(message.attributes, kind)?))
}

/// The conntrack events in one datagram, each read or unreadable for a reason. Pure; never panics, whatever the bytes.
pub fn read_events(datagram: &[u8]) -> impl Iterator<Item = Result<(Kind, Entry), Unreadable>> + '_ {
    Parts(datagram).filter_map(|part| match part {
        Ok(Part::Message(message)) => Some(read_message(&message, false)),
        Ok(Part::Answer { .. } | Part::Done { .. } | Part::Nothing) => None,
        Err(why) => Some(Err(why)),
    })
}

/// Puts the events of one datagram behind the others, and says of each that can't be read why; how many there were of both.
pub fn take_events(datagram: &[u8], events: &mut Vec<(Kind, Entry)>, mut unreadable: impl FnMut(Unreadable)) -> usize {
    if let Some(event) = quick::read(datagram) {
        events.push(event);
        return 1;
    }
    let read = |event| match event {
        Ok(event) => events.push(event),
        Err(why) => unreadable(why),
    };
    read_events(datagram).map(read).count()
}

fn request(number: u8) -> u16 {
    u16::from_be_bytes([SUBSYSTEM, number])
}

/// Every connection in the table of this network namespace; what could not be read is counted by `skipped`.
///
/// # Errors
/// The socket's, and the kernel's refusal (EPERM without CAP_NET_ADMIN).
pub fn dump(mut each: impl FnMut(Entry), skipped: impl FnMut(Unreadable)) -> io::Result<()> {
    dump_shown(|entry, _| each(entry), skipped)
}

/// The same, each with where it is in the table.
///
/// # Errors
/// As [`dump`].
pub fn dump_shown(mut each: impl FnMut(Entry, Shown<'_>), mut skipped: impl FnMut(Unreadable)) -> io::Result<()> {
    let mut channel = Channel::open()?;
    let sequence = channel.next_sequence();
    let mut writer = Writer::default();
    writer.message(request(MESSAGE_GET), NLM_F_DUMP, sequence, 0, 0);
    channel.ask(&writer.finish(), sequence, |message| match read_message(&message, true) {
        Ok((_, entry)) => each(entry, Shown(message)),
        Err(why) => skipped(why),
    })
}

/// A connection as the kernel has just shown it.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(Message<'a>);

/// Where a connection is in the table, in the kernel's own words. An [`Entry`] does not say all of them: the code of an ICMP request, an
/// address of IPv4 within IPv6, a zone of one direction.
#[derive(Clone, Debug)]
pub struct Held {
    family: u8,
    original: Box<[u8]>,
    zone: Option<[u8; 2]>,
    id: Option<[u8; 4]>,
}

impl Shown<'_> {
    /// To come back to it later.
    pub fn held(self) -> Held {
        let mut held = Held { family: self.0.family, original: Box::default(), zone: None, id: None };
        for attribute in self.0.attributes.flatten() {
            match attribute.kind {
                cta::TUPLE_ORIG => held.original = attribute.value.into(),
                cta::ZONE => held.zone = attribute.value.try_into().ok(),
                cta::ID => held.id = attribute.value.try_into().ok(),
                _ => {}
            }
        }
        held
    }
}

/// Questions in one message to the kernel: all their answers have room in a receive buffer of the usual size.
const AT_ONCE: usize = 32;

/// Those connections of these places in the table that are there: what a dump says of them, without a look at all the rest. As a dump does, the
/// kernel takes out what has expired. What could not be read is counted by `skipped`.
///
/// # Errors
/// The socket's, and the kernel's refusal (EPERM without CAP_NET_ADMIN).
pub fn look_up(keys: &[EntryKey], mut each: impl FnMut(Entry), mut skipped: impl FnMut(Unreadable)) -> io::Result<()> {
    let mut channel = Channel::open()?;
    // An address of IPv4 within IPv6 is read as the former: beside one of IPv6 it is in no message that the kernel takes.
    let alike = |key: &&EntryKey| key.original.source.is_ipv4() == key.original.destination.is_ipv4();
    let keys: Vec<&EntryKey> = keys.iter().filter(alike).collect();
    for some in keys.chunks(AT_ONCE) {
        let (mut writer, mut last) = (Writer::default(), 0);
        for (n, key) in some.iter().enumerate() {
            last = channel.next_sequence();
            // An entry is an answer in itself; what follows the last one's is the end of all.
            let flags = if n + 1 == some.len() { NLM_F_ACK } else { 0 };
            let family = if key.original.source.is_ipv4() { FAMILY_IPV4 } else { FAMILY_IPV6 };
            writer.message(request(MESSAGE_GET), flags, last, family, 0);
            write_tuple(&mut writer, cta::TUPLE_ORIG, &key.original);
            if key.zone != 0 {
                writer.attribute(cta::ZONE, &key.zone.to_be_bytes());
            }
        }
        channel.ask_but(&[nix::libc::ENOENT], &writer.finish(), last, |message| match read_message(&message, true) {
            Ok((_, entry)) => each(entry),
            Err(why) => skipped(why),
        })?;
    }
    Ok(())
}

fn write_tuple(writer: &mut Writer, kind: u16, tuple: &Tuple) {
    writer.nest(kind, |writer| {
        writer.nest(cta::TUPLE_IP, |writer| match (tuple.source, tuple.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                writer.attribute(cta::IP_V4_SRC, &source.octets());
                writer.attribute(cta::IP_V4_DST, &destination.octets());
            }
            (source, destination) => {
                let v6 = |address: IpAddr| match address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                    IpAddr::V6(v6) => v6.octets(),
                };
                writer.attribute(cta::IP_V6_SRC, &v6(source));
                writer.attribute(cta::IP_V6_DST, &v6(destination));
            }
        });
        writer.nest(cta::TUPLE_PROTO, |writer| {
            writer.attribute(cta::PROTO_NUM, &[tuple.protocol.number()]);
            let (source, destination) = (tuple.source_port.to_be_bytes(), tuple.destination_port.to_be_bytes());
            let (id, code) = match tuple.protocol {
                Protocol::Icmp => (cta::PROTO_ICMP_ID, cta::PROTO_ICMP_CODE),
                Protocol::Icmpv6 => (cta::PROTO_ICMPV6_ID, cta::PROTO_ICMPV6_CODE),
                Protocol::Tcp | Protocol::Udp | Protocol::Sctp | Protocol::Other(_) => {
                    writer.attribute(cta::PROTO_SRC_PORT, &source);
                    writer.attribute(cta::PROTO_DST_PORT, &destination);
                    return;
                }
            };
            // A request has code 0 (RFC 792, RFC 4443). One with another is a connection too, and is not found by this.
            writer.attribute(id, &source);
            writer.attribute(id + 1, &[destination[1]]);
            writer.attribute(code, &[0]);
        });
    });
}

/// Asks the kernel to do something to one connection, with the attributes that `more` adds. False: for one of these errors.
fn to_one(held: &Held, message: u8, more: impl FnOnce(&mut Writer), missed: &[i32]) -> io::Result<bool> {
    let mut channel = Channel::open()?;
    let sequence = channel.next_sequence();
    let mut writer = Writer::default();
    writer.message(request(message), NLM_F_ACK, sequence, held.family, 0);
    writer.nested(cta::TUPLE_ORIG, &held.original);
    if let Some(zone) = held.zone {
        writer.attribute(cta::ZONE, &zone);
    }
    more(&mut writer);
    match channel.ask(&writer.finish(), sequence, |_| {}) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error().is_some_and(|code| missed.contains(&code)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Ends one connection: its next packet is looked at as the first of a new one. False: it had ended already, or another
/// connection has its place (the id differs).
///
/// # Errors
/// The socket's, and the kernel's refusal (EPERM without CAP_NET_ADMIN).
pub fn delete(held: &Held) -> io::Result<bool> {
    let id = |writer: &mut Writer| {
        if let Some(id) = held.id {
            writer.attribute(cta::ID, &id);
        }
    };
    to_one(held, MESSAGE_DELETE, id, &[nix::libc::ENOENT])
}

/// Marks a connection that lives as one that the filter let begin. False: it has ended, or has no room for labels. The kernel compares
/// no id here: one that took its place since it was read is marked instead.
///
/// # Errors
/// The socket's, and the kernel's refusal (EPERM without CAP_NET_ADMIN).
pub fn let_live(held: &Held) -> io::Result<bool> {
    let mut bits = [0; label::SIZE];
    bits[label::FILTER] = label::BEGUN;
    let labels = |writer: &mut Writer| {
        writer.attribute(cta::LABELS, &bits);
        // The other bits stay.
        writer.attribute(cta::LABELS_MASK, &bits);
    };
    // Without NLM_F_CREATE: changed if it is there.
    to_one(held, MESSAGE_NEW, labels, &[nix::libc::ENOENT, nix::libc::ENOSPC])
}

#[cfg(test)]
mod tests;
