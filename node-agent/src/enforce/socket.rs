//! nfnetlink: one batch, one transaction; questions and dumps. The numbers are those of linux/netfilter/nfnetlink.h and
//! nf_tables.h.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::NfTablesMessage;
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::{FileStat, fstat, stat};

use super::attribute::{self, Attribute, Attributes};
use super::model::Family;
use crate::observe::netfilter::{Part, Parts};

const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Room for one whole transaction, and for the answers to it. A set of 100,000 pairs takes some 10 MB; beyond this the
/// kernel answers EMSGSIZE and nothing is changed.
const BUFFER: usize = 64 * 1024 * 1024;

/// Room for one datagram: twice what the kernel puts into one.
const DATAGRAM: usize = 64 * 1024;

/// One message of a transaction, and what it does, for the error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) family: Family,
    pub(super) kind: u8,
    pub(super) flags: u16,
    pub(super) attributes: Vec<Attribute>,
    /// In words: `set egress_tcp4`, `rule 3 of chain judge`.
    pub(super) what: String,
}

/// A question about one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) family: Family,
    pub(super) kind: u8,
    pub(super) attributes: Vec<Attribute>,
    pub(super) what: String,
}

/// What an nf_tables socket can answer with.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The socket itself failed.
    #[error("nfnetlink does not answer")]
    Io(#[from] io::Error),
    /// The kernel refused a message; the transaction it was in changed nothing.
    #[error("the kernel refused {what}: {source}")]
    Refused {
        /// Which part.
        what: String,
        /// Its error.
        source: io::Error,
    },
    /// An answer that makes no sense.
    #[error("the kernel's answer about {what} cannot be read")]
    Unreadable {
        /// What was asked.
        what: String,
    },
    /// Things changed under a dump, time and again.
    #[error("{what} changes faster than it can be read")]
    Restless {
        /// What was asked.
        what: String,
    },
}

impl SocketError {
    /// The kernel's error number, where it gave one.
    pub(super) fn code(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Io(source) => source.raw_os_error(),
            Self::Unreadable { .. } | Self::Restless { .. } => None,
        }
    }
}

/// A nf_tables socket. It stays in the network namespace where it was opened, and owns the tables that it made: whoever
/// holds a copy of it may change them.
#[derive(Debug)]
pub(super) struct NftSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    /// Where datagrams come in.
    received: Vec<u8>,
}

impl NftSocket {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        Self::over(socket)
    }

    /// Goes on with a socket that another process opened and left.
    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let (its, ours) = (namespace_of(&fd)?, stat("/proc/thread-self/ns/net")?);
        if (its.st_dev, its.st_ino) != (ours.st_dev, ours.st_ino) {
            return Err(io::Error::other("the socket that was left is of another network namespace"));
        }
        // SAFETY: the descriptor is owned, so nobody else closes it.
        #[allow(unsafe_code)]
        let socket = unsafe { Socket::from_raw_fd(fd.into_raw_fd()) };
        let this = Self::over(socket)?;
        this.drain();
        Ok(this)
    }

    fn over(socket: Socket) -> io::Result<Self> {
        // Beyond the sysctl's limits, which are for those without CAP_NET_ADMIN.
        setsockopt(&socket.as_fd(), sockopt::SndBufForce, &BUFFER)?;
        setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &BUFFER)?;
        // Errors come back without a copy of the whole message.
        socket.set_cap_ack(true)?;
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address)?;
        // Not where an earlier process began: an answer to its questions must not be taken for one to ours.
        let sequence = RandomState::new().hash_one(std::process::id()) as u32;
        Ok(Self { socket, port: address.port_number(), sequence, received: Vec::with_capacity(DATAGRAM) })
    }

    /// The socket's own netlink address: the kernel names a table's owner by it.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// For handing on a copy.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Carries out all messages in one transaction, or none.
    pub(super) fn commit(&mut self, messages: Vec<Message>) -> Result<(), SocketError> {
        if messages.is_empty() {
            return Ok(());
        }
        let mut buffer = Vec::new();
        let control = |inner| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
            NetfilterMessage::new(header, NetfilterMessageInner::None(inner))
        };
        let begin = self.next();
        append(&mut buffer, control(ControlMessage::BatchBegin), NLM_F_REQUEST, begin);
        // By how far after the beginning.
        let mut what = vec!["the transaction as a whole".to_owned()];
        let mut last = begin;
        let count = messages.len();
        for message in messages {
            last = self.next();
            what.push(message.what);
            // Only the last is acknowledged: its answer says that the whole was committed.
            let ack = if what.len() > count { NLM_F_ACK } else { 0 };
            append(&mut buffer, nft(message.family, message.kind, message.attributes), NLM_F_REQUEST | message.flags | ack, last);
        }
        let end = self.next();
        append(&mut buffer, control(ControlMessage::BatchEnd), NLM_F_REQUEST, end);

        self.socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        loop {
            for answer in answers(self.receive()?, "the transaction")? {
                let sequence = answer.header.sequence_number;
                let Some(of) = what.get(sequence.wrapping_sub(begin) as usize) else { continue };
                if let NetlinkPayload::Error(error) = &answer.payload {
                    match error.code {
                        Some(_) => {
                            let source = error.to_io();
                            self.drain();
                            return Err(SocketError::Refused { what: of.clone(), source });
                        }
                        None if sequence == last => return Ok(()),
                        None => {}
                    }
                }
            }
        }
    }

    /// The next datagram.
    ///
    /// # Why
    /// The kernel fills as much of a dump into one as the reader had room for before, up to 32 KiB (netlink_recvmsg, af_netlink.c), and
    /// begins each by walking a hash set from its first element again (nft_rhash_walk). In pages, a set of 100,000 takes seconds.
    fn receive(&mut self) -> io::Result<&[u8]> {
        self.received.clear();
        let length = self.socket.recv(&mut self.received, libc::MSG_TRUNC)?;
        self.received.get(..length).ok_or_else(|| io::Error::other("an answer is longer than any of the kernel's is"))
    }

    /// Throws away what else the kernel has to say: of a refused transaction, or to an earlier process. A dump that nobody read is
    /// read to its end, since the kernel begins no other before (EBUSY).
    fn drain(&self) {
        let mut buffer: Vec<u8> = Vec::with_capacity(65536);
        loop {
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT | libc::MSG_TRUNC) {
                Ok(_) => buffer.clear(),
                // Answers were lost, others wait.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EINTR)) => {}
                Err(_) => return,
            }
        }
    }

    /// Everything that answers a question, or `None` if there is no such thing.
    pub(super) fn ask(
        &mut self,
        family: Family,
        kind: u8,
        attributes: &[Attribute],
        dump: bool,
        what: &str,
    ) -> Result<Option<Vec<Attributes>>, SocketError> {
        let Some(bodies) = self.ask_bodies(family, kind, attributes, dump, what)? else { return Ok(None) };
        let read = bodies.iter().map(attribute::read).collect::<Option<Vec<_>>>();
        read.map(Some).ok_or_else(|| SocketError::Unreadable { what: what.to_owned() })
    }

    /// The same, in the kernel's own words, to be read in place: a dump has a hundred thousand elements.
    pub(super) fn ask_bodies(
        &mut self,
        family: Family,
        kind: u8,
        attributes: &[Attribute],
        dump: bool,
        what: &str,
    ) -> Result<Option<Bodies>, SocketError> {
        // A dump that a commit interrupted is begun again.
        for _ in 0..16 {
            match self.ask_once(family, kind, attributes, dump, what)? {
                Answer::Is(bodies) => return Ok(Some(bodies)),
                Answer::Absent => return Ok(None),
                Answer::Interrupted => {}
            }
        }
        Err(SocketError::Restless { what: what.to_owned() })
    }

    /// Many questions about single things at once, each answered or `None` if there is no such thing, in their order. Each is answered
    /// by one message or one error, so that no acknowledgement is asked for, which would be a datagram more.
    pub(super) fn ask_each(&mut self, questions: Vec<Question>) -> Result<Vec<Option<Vec<u8>>>, SocketError> {
        let first = self.sequence.wrapping_add(1);
        let mut found = vec![None; questions.len()];
        let mut buffer = Vec::new();
        for question in &questions {
            let sequence = self.next();
            append(&mut buffer, nft(question.family, question.kind, question.attributes.clone()), NLM_F_REQUEST, sequence);
        }
        self.socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        let mut open = questions.len();
        while open > 0 {
            for part in Parts(self.receive()?) {
                let index = |sequence: u32| sequence.wrapping_sub(first) as usize;
                match part.map_err(|_| SocketError::Unreadable { what: "single elements".to_owned() })? {
                    Part::Message(message) => {
                        if let Some(found) = found.get_mut(index(message.sequence)) {
                            open -= usize::from(found.is_none());
                            *found = Some(message.attributes.0.to_vec());
                        }
                    }
                    Part::Answer { sequence, errno } => match (questions.get(index(sequence)), errno) {
                        (None, _) | (_, 0) => {}
                        (Some(_), errno) if errno == -libc::ENOENT => open -= 1,
                        (Some(question), errno) => {
                            self.drain();
                            let source = io::Error::from_raw_os_error(errno.saturating_neg());
                            return Err(SocketError::Refused { what: question.what.clone(), source });
                        }
                    },
                    Part::Done { .. } | Part::Nothing => {}
                }
            }
        }
        Ok(found)
    }

    fn ask_once(&mut self, family: Family, kind: u8, attributes: &[Attribute], dump: bool, what: &str) -> Result<Answer, SocketError> {
        let sequence = self.next();
        let flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { NLM_F_ACK };
        let mut buffer = Vec::new();
        append(&mut buffer, nft(family, kind, attributes.to_vec()), flags, sequence);
        self.socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
        let mut found = Bodies::default();
        let mut interrupted = false;
        loop {
            for part in Parts(self.receive()?) {
                match part.map_err(|_| SocketError::Unreadable { what: what.to_owned() })? {
                    Part::Message(message) if message.sequence == sequence => {
                        interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                        found.push(message.attributes.0);
                    }
                    Part::Answer { sequence: of, errno } if of == sequence => match errno {
                        0 => return Ok(Answer::Is(found)),
                        code if code == -libc::ENOENT => return Ok(Answer::Absent),
                        code if code == -libc::EINTR => return Ok(Answer::Interrupted),
                        code => {
                            let source = io::Error::from_raw_os_error(code.saturating_neg());
                            return Err(SocketError::Refused { what: what.to_owned(), source });
                        }
                    },
                    Part::Done { sequence: of, flags } if of == sequence => {
                        let interrupted = interrupted || flags & NLM_F_DUMP_INTR != 0;
                        return Ok(if interrupted { Answer::Interrupted } else { Answer::Is(found) });
                    }
                    Part::Message(_) | Part::Answer { .. } | Part::Done { .. } | Part::Nothing => {}
                }
            }
        }
    }
}

nix::ioctl_none_bad!(
    /// The network namespace of a socket, as a descriptor (SIOCGSKNS, linux/sockios.h; since kernel 4.10).
    network_namespace,
    0x894C
);

fn namespace_of(socket: &OwnedFd) -> io::Result<FileStat> {
    // SAFETY: the request takes no argument and returns a new descriptor, which is owned here and by nobody else.
    #[allow(unsafe_code)]
    let namespace = unsafe { OwnedFd::from_raw_fd(network_namespace(socket.as_raw_fd())?) };
    Ok(fstat(&namespace)?)
}

/// The attributes of many messages, one after the other in one piece of memory.
#[derive(Debug, Default)]
pub(super) struct Bodies {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Bodies {
    pub(super) fn push(&mut self, body: &[u8]) {
        self.bytes.extend_from_slice(body);
        self.ends.push(self.bytes.len());
    }

    /// Each message's.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.bytes[start..end])
    }
}

enum Answer {
    Is(Bodies),
    Absent,
    Interrupted,
}

/// A message whose payload is kept as it came: the kernel's own words are compared, not a crate's reading of them.
#[derive(Debug)]
pub(super) struct Raw(pub(super) Vec<u8>);

impl NetlinkDeserializable for Raw {
    type Error = io::Error;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, io::Error> {
        Ok(Self(payload.to_vec()))
    }
}

/// The messages of one datagram.
pub(super) fn answers(datagram: &[u8], what: &str) -> Result<Vec<NetlinkMessage<Raw>>, SocketError> {
    const HEADER: usize = 16;
    let mut out = Vec::new();
    let mut rest = datagram;
    while rest.len() >= HEADER {
        let message = NetlinkMessage::<Raw>::deserialize(rest).map_err(|_| SocketError::Unreadable { what: what.to_owned() })?;
        let length = (message.header.length as usize).next_multiple_of(4).clamp(HEADER, rest.len());
        rest = &rest[length..];
        out.push(message);
    }
    Ok(out)
}

fn nft(family: Family, kind: u8, attributes: Vec<Attribute>) -> NetfilterMessage {
    let family = match family {
        Family::Inet => NetfilterProtoFamily::Inet,
        Family::Bridge => NetfilterProtoFamily::Bridge,
        Family::Arp => NetfilterProtoFamily::ARP,
    };
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), NfTablesMessage::Other { message_type: kind, attributes })
}

fn append(buffer: &mut Vec<u8>, message: NetfilterMessage, flags: u16, sequence: u32) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut buffer[start..]);
}

impl AsRawFd for NftSocket {
    fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }
}
