//! nfnetlink by hand: a rule taken out and put back as the kernel says it, NFLOG records, an empty connection table. The numbers
//! are those of linux/netfilter/nf_tables.h, nfnetlink_log.h and nfnetlink_conntrack.h.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt};

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const ERROR: u16 = 2;
const DONE: u16 = 3;

const TABLE: &[u8] = b"bulkhead\0";
const FAMILIES: [(u8, &str); 3] = [(1, "inet"), (7, "bridge"), (3, "arp")];

/// A rule as the kernel has it.
#[derive(Clone, Debug)]
pub(crate) struct KernelRule {
    family: (u8, &'static str),
    pub(crate) chain: String,
    index: usize,
    pub(crate) comment: String,
    /// The sets and maps it looks into.
    sets: Vec<String>,
    handle: Vec<u8>,
    /// Its expressions and its comment, as attributes.
    body: Vec<u8>,
}

impl KernelRule {
    /// Whether it only counts, or leads to where that is done.
    pub(crate) fn counts(&self) -> bool {
        self.chain.starts_with("count_") || self.body.windows(6).any(|bytes| bytes == b"count_")
    }
}

impl fmt::Display for KernelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}: {} [{}]", self.family.1, self.chain, self.index, self.comment, self.sets.join(", "))
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap();
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Kind, value, and the whole attribute with its padding.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8], &[u8])> {
    let mut all = Vec::new();
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let (whole, rest) = bytes.split_at(length.next_multiple_of(4).min(bytes.len()));
        all.push((u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff, &bytes[4..length], whole));
        bytes = rest;
    }
    all
}

fn value(of: &[(u16, &[u8], &[u8])], kind: u16) -> Vec<u8> {
    of.iter().find(|one| one.0 == kind).map(|one| one.1.to_vec()).unwrap_or_default()
}

/// The sets that a rule's expressions look into.
fn looked_into(expressions: &[u8]) -> Vec<String> {
    let lookup = |expression: &[u8]| {
        let read = attributes(expression);
        (value(&read, 1) == b"lookup\0").then(|| text(&value(&attributes(&value(&read, 2)), 1)))
    };
    attributes(expressions).into_iter().filter_map(|(_, expression, _)| lookup(expression)).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

/// A netfilter netlink socket.
pub(crate) struct Nfnetlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Nfnetlink {
    /// A new one in the calling thread's namespace.
    pub(crate) fn open() -> Self {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
        Self::over(socket)
    }

    /// Over a copy of the socket that owns the tables.
    pub(crate) fn over(socket: OwnedFd) -> Self {
        Self { socket, sequence: 0x5000_0000 }
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
        self.sequence += 1;
        let length = u32::try_from(20 + body.len()).unwrap().to_ne_bytes();
        let header = [&length[..], &kind.to_ne_bytes(), &(flags | REQUEST).to_ne_bytes(), &self.sequence.to_ne_bytes(), &[0; 4]].concat();
        let [high, low] = resource.to_be_bytes();
        [&header[..], &[family, 0, high, low], body].concat()
    }

    /// Messages that wait: kind, sequence number, and what is behind the netlink header.
    fn read(&self, flags: MsgFlags) -> Vec<(u16, u32, Vec<u8>)> {
        let mut buffer = vec![0; 1 << 20];
        let Ok(n) = recv(self.socket.as_raw_fd(), &mut buffer, flags) else { return Vec::new() };
        let (mut rest, mut all) = (&buffer[..n], Vec::new());
        while rest.len() >= 16 {
            let number = |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().unwrap());
            let length = number(0) as usize;
            all.push((u16::from_ne_bytes([rest[4], rest[5]]), number(8), rest[16..length].to_vec()));
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        all
    }

    /// Sends, and waits for the acknowledgement of the message with this number.
    fn ask(&mut self, bytes: &[u8], sequence: u32, what: &str) -> Vec<Vec<u8>> {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
        let mut answers = Vec::new();
        loop {
            for (kind, of, body) in self.read(MsgFlags::empty()) {
                match kind {
                    ERROR if of == sequence => {
                        let code = i32::from_ne_bytes(body[..4].try_into().unwrap());
                        assert_eq!(code, 0, "{what}");
                        return answers;
                    }
                    DONE => return answers,
                    ERROR => panic!("{what}: an error of another message"),
                    _ => answers.push(body),
                }
            }
        }
    }

    /// All rules of our tables, in their order.
    pub(crate) fn rules(&mut self) -> Vec<KernelRule> {
        let mut all: Vec<KernelRule> = Vec::new();
        for family in FAMILIES {
            let request = self.message(10 << 8 | 7, DUMP, family.0, 0, &attribute(1, TABLE));
            for answer in self.ask(&request, self.sequence, "the rules") {
                let read = attributes(&answer[4..]);
                if value(&read, 1) != TABLE {
                    continue;
                }
                let chain = text(&value(&read, 2));
                let index = all.iter().filter(|rule| rule.family == family && rule.chain == chain).count();
                let comment = text(value(&read, 7).get(2..).unwrap_or_default());
                let body = read.iter().filter(|one| [4, 7].contains(&one.0)).flat_map(|one| one.2.to_vec()).collect();
                let sets = looked_into(&value(&read, 4));
                all.push(KernelRule { family, chain, index, comment, sets, handle: value(&read, 3), body });
            }
        }
        all
    }

    fn transaction(&mut self, kind: u16, flags: u16, family: u8, body: &[u8], what: &str) {
        let begin = self.message(0x10, 0, 0, 10, &[]);
        let middle = self.message(10 << 8 | kind, flags | ACK, family, 0, body);
        let sequence = self.sequence;
        let end = self.message(0x11, 0, 0, 10, &[]);
        self.ask(&[begin, middle, end].concat(), sequence, what);
    }

    /// Takes one rule out.
    pub(crate) fn take_out(&mut self, rule: &KernelRule) {
        let place = [attribute(1, TABLE), attribute(2, &[rule.chain.as_bytes(), &[0]].concat()), attribute(3, &rule.handle)].concat();
        self.transaction(8, 0, rule.family.0, &place, &rule.to_string());
    }

    /// Puts it back where it was: before `next`, or last.
    pub(crate) fn put_back(&mut self, rule: &KernelRule, next: Option<&KernelRule>) {
        let mut body = [attribute(1, TABLE), attribute(2, &[rule.chain.as_bytes(), &[0]].concat()), rule.body.clone()].concat();
        let next = next.filter(|next| next.family == rule.family && next.chain == rule.chain);
        let flags = match next {
            Some(next) => {
                body.extend(attribute(6, &next.handle));
                CREATE
            }
            None => CREATE | APPEND,
        };
        self.transaction(6, flags, rule.family.0, &body, &rule.to_string());
    }

    /// Empties what packets fill, which is bounded: who is logged and whose late answers pass. The rounds come faster than people deny
    /// and ask.
    pub(crate) fn forget_what_was_sent(&mut self) {
        for set in ["talkers", "udp_seen", "askers", "roads"].into_iter().flat_map(|set| [4, 6].map(|ip| format!("{set}{ip}\0"))) {
            // NFT_MSG_DELSETELEM without elements: all of them.
            let body = [attribute(1, TABLE), attribute(2, set.as_bytes())].concat();
            self.transaction(14, 0, FAMILIES[0].0, &body, &set);
        }
    }

    /// Forgets all connections.
    pub(crate) fn forget_connections(&mut self) {
        let request = self.message(1 << 8 | 2, ACK, 0, 0, &[]);
        self.ask(&request, self.sequence, "the connections");
    }

    /// Asks for the records of these NFLOG groups, each as soon as it is made.
    pub(crate) fn listen(&mut self, groups: [u16; 2]) {
        for group in groups {
            // NFULNL_CFG_CMD_BIND; then mode (packets, 256 bytes) and threshold.
            let mode = [0, 0, 1, 0, 2, 0];
            for body in [attribute(1, &[1]), [attribute(2, &mode), attribute(5, &1_u32.to_be_bytes())].concat()] {
                let request = self.message(4 << 8 | 1, ACK, 0, group, &body);
                self.ask(&request, self.sequence, "NFLOG");
            }
        }
    }

    /// What was logged meanwhile: prefix and packet.
    pub(crate) fn records(&self) -> Vec<(String, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let read = self.read(MsgFlags::MSG_DONTWAIT);
            if read.is_empty() {
                return all;
            }
            for (_, _, body) in read {
                let read = attributes(&body[4..]);
                all.push((text(&value(&read, 10)), value(&read, 9)));
            }
        }
    }
}
