//! Netlink as the netfilter subsystems speak it: attributes read strictly, attributes written, one request and its answer.
//!
//! # Why
//! `netlink-packet-netfilter` leaves a connection's counters, id, times and labels unparsed, allocates for each attribute and
//! needs 1.7 times the processor time a connection event (measured); events are the hot path of the agent. So the few
//! attributes that count are read in place. Reading is pure: it takes bytes, never panics, and says what was wrong.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Bytes of a netlink header (RFC 3549, 2.3.2) and of the netfilter header behind it.
const HEADER: usize = 16;
const GENERIC: usize = 4;

/// `nlmsg_type` values below the subsystems' own (linux/netlink.h).
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

/// `nlmsg_flags` (linux/netlink.h).
pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
pub(crate) const NLM_F_DUMP: u16 = 0x300;

const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Large enough for every message the kernel builds for a reader (32 KiB a dump, nlbufsiz of NFLOG below it).
const RECEIVE: usize = 256 * 1024;

/// Why bytes could not be read, in few words, so that it can be counted by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub &'static str);

/// One attribute in place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    pub(crate) value: &'a [u8],
}

impl<'a> Attribute<'a> {
    pub(crate) fn nested(self) -> Attributes<'a> {
        Attributes(self.value)
    }

    fn array<const N: usize>(self) -> Result<[u8; N], Unreadable> {
        self.value.try_into().map_err(|_| Unreadable("an attribute has the wrong size"))
    }

    pub(crate) fn u8(self) -> Result<u8, Unreadable> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16(self) -> Result<u16, Unreadable> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(self) -> Result<u32, Unreadable> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(self) -> Result<u64, Unreadable> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(crate) fn bytes<const N: usize>(self) -> Result<[u8; N], Unreadable> {
        self.array()
    }
}

/// Attributes one after another; ends at the first that lies about its length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<Attribute<'a>, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        let whole = self.0;
        if whole.is_empty() {
            return None;
        }
        self.0 = &[];
        let [a, b, c, d, ..] = *whole else { return Some(Err(Unreadable("an attribute is cut off"))) };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = whole.get(4..length) else { return Some(Err(Unreadable("an attribute lies about its length"))) };
        // The last one may come without its padding.
        self.0 = whole.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(Attribute { kind: u16::from_ne_bytes([c, d]) & NLA_TYPE_MASK, value }))
    }
}

/// One message of a netfilter subsystem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// Subsystem in the high byte, message in the low one.
    pub(crate) kind: u16,
    /// `nlmsg_flags`.
    pub(crate) flags: u16,
    /// `nlmsg_seq`: which request it answers.
    pub(crate) sequence: u32,
    /// `nfgen_family`: 2 IPv4, 10 IPv6.
    pub(crate) family: u8,
    pub(crate) attributes: Attributes<'a>,
}

/// What one netlink message is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    Message(Message<'a>),
    /// The kernel's answer to a request: 0 or a negative errno.
    Answer {
        sequence: u32,
        errno: i32,
    },
    /// End of a dump.
    Done {
        sequence: u32,
        flags: u16,
    },
    /// Nothing to see.
    Nothing,
}

/// The netlink messages in one datagram; ends at the first that lies about its length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a>(pub(crate) &'a [u8]);

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl<'a> Iterator for Parts<'a> {
    type Item = Result<Part<'a>, Unreadable>;

    fn next(&mut self) -> Option<Self::Item> {
        let whole = self.0;
        if whole.is_empty() {
            return None;
        }
        self.0 = &[];
        let (Some(length), Some(kind), Some(flags), Some(sequence)) =
            (u32_at(whole, 0), u16_at(whole, 4), u16_at(whole, 6), u32_at(whole, 8))
        else {
            return Some(Err(Unreadable("a netlink header is cut off")));
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(body) = whole.get(HEADER..length) else { return Some(Err(Unreadable("a netlink message lies about its length"))) };
        self.0 = whole.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(match kind {
            NLMSG_NOOP | NLMSG_OVERRUN => Ok(Part::Nothing),
            NLMSG_DONE => Ok(Part::Done { sequence, flags }),
            NLMSG_ERROR => match body.get(..4).and_then(|b| b.try_into().ok()) {
                Some(errno) => Ok(Part::Answer { sequence, errno: i32::from_ne_bytes(errno) }),
                None => Err(Unreadable("a netlink answer is cut off")),
            },
            kind => match (body.get(..GENERIC), body.get(GENERIC..)) {
                (Some(&[family, ..]), Some(rest)) => {
                    Ok(Part::Message(Message { kind, flags, sequence, family, attributes: Attributes(rest) }))
                }
                _ => Err(Unreadable("a netfilter header is cut off")),
            },
        })
    }
}

/// Messages being written, one after another.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    begun: usize,
}

impl Writer {
    /// Begins a message. `kind` holds the subsystem in its high byte.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) {
        self.end();
        self.begun = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
    }

    fn end(&mut self) {
        let length = u32::try_from(self.bytes.len() - self.begun).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(self.begun..self.begun + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }

    /// One attribute of at most 64 KiB.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A number of 32 bits, in the order of the network.
    pub(crate) fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// One attribute of attributes that are written already.
    pub(crate) fn nested(&mut self, kind: u16, attributes: &[u8]) {
        self.attribute(kind | NLA_F_NESTED, attributes);
    }

    pub(crate) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        inside(self);
        let length = u16::try_from(self.bytes.len() - at).unwrap_or(u16::MAX);
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.end();
        self.bytes
    }
}

/// A netlink socket to netfilter, for requests with their answers. Multicast readers use [`Socket`] themselves.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) socket: Socket,
    sequence: u32,
}

impl Channel {
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Sends one request (several messages at most in one batch) and gives each message of the answer to `each`, until the
    /// kernel says that sequence number `last` is done or wrong.
    pub(crate) fn ask(&mut self, request: &[u8], last: u32, each: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.ask_but(&[], request, last, each)
    }

    /// The same, where these errors are answers as good as any.
    pub(crate) fn ask_but(&mut self, fine: &[i32], request: &[u8], last: u32, mut each: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.socket.send(request, 0)?;
        let mut buffer = Vec::with_capacity(RECEIVE);
        let mut failed = None;
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            for part in Parts(&buffer) {
                match part.map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))? {
                    Part::Message(message) => each(message),
                    Part::Nothing => {}
                    Part::Done { sequence, .. } if sequence == last => return failed.map_or(Ok(()), Err),
                    // The first mistake in a batch is the one that explains it; every message of it is answered.
                    Part::Answer { errno, sequence } => {
                        let code = errno.saturating_neg();
                        if errno != 0 && failed.is_none() && !fine.contains(&code) {
                            failed = Some(io::Error::from_raw_os_error(code));
                        }
                        if sequence == last || failed.as_ref().is_some_and(|_| errno != 0 && sequence == 0) {
                            return failed.map_or(Ok(()), Err);
                        }
                    }
                    Part::Done { .. } => {}
                }
            }
        }
    }
}
