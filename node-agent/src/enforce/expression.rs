//! The expressions of rules (linux/netfilter/nf_tables.h), as far as this filter needs them, and what packets' fields they
//! read. netlink-packet-netfilter knows six of them by type; they go out like the others, by name and attributes, so that
//! what is written and what is read back have one form.

use nix::libc;

use super::attribute::{self, Attribute};
use super::model::{KeyType, Verdict};

/// Registers of four bytes: NFT_REG32_00 to NFT_REG32_15. A key may fill them all: 64 bytes.
pub(super) const FIRST_REGISTER: u32 = libc::NFT_REG32_00 as u32;
/// One beyond the last.
const END_OF_REGISTERS: u32 = libc::NFT_REG32_00 as u32 + 16;

/// Since Linux 5.1; libc has not heard of them.
const NFT_META_IIFKIND: i32 = 26;
const NFT_META_OIFKIND: i32 = 27;
/// Likewise, since 4.17.
const NFT_CT_SRC_IP: u32 = 19;
const NFT_CT_SRC_IP6: u32 = 21;
/// Nor of routing (NFTA_FIB_F_*), since 4.10.
const NFT_FIB_RESULT_OIF: u32 = 1;
const FIB_SADDR: u32 = 1;
const FIB_IIF: u32 = 1 << 3;
const FIB_PRESENT: u32 = 1 << 5;
/// Nor of this flag (since 4.11).
const NFT_EXTHDR_F_PRESENT: u32 = 1;

const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Ip {
    V4,
    V6,
}

impl Ip {
    /// Its type in a frame (ETH_P_IP, ETH_P_IPV6 in linux/if_ether.h).
    pub(super) const fn ethertype(self) -> [u8; 2] {
        match self {
            Self::V4 => [0x08, 0x00],
            Self::V6 => [0x86, 0xdd],
        }
    }
}

/// One thing that a rule reads from a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    Iif,
    Oif,
    Iifname,
    Oifname,
    /// What made the interface: `bridge`, `veth`. No match where it has no kind (a physical one).
    Iifkind,
    Oifkind,
    /// The type of what the frame carries, within a tag too.
    Protocol,
    Source(Ip),
    Destination(Ip),
    L4Protocol,
    SourcePort,
    DestinationPort,
    IcmpType,
    Icmpv6Type,
    EtherSource,
    EtherDestination,
    EtherType,
    ArpSenderMac,
    ArpSenderAddress,
    ArpTargetAddress,
    /// Target address of a neighbour advertisement or solicitation (RFC 4861, 4.3 and 4.4).
    NeighbourTarget,
}

impl Field {
    /// How it appears in a set's key.
    pub(super) fn key_type(self) -> KeyType {
        match self {
            Self::Iif | Self::Oif => KeyType::InterfaceIndex,
            Self::Iifname | Self::Oifname | Self::Iifkind | Self::Oifkind => KeyType::InterfaceName,
            Self::Source(Ip::V4) | Self::Destination(Ip::V4) | Self::ArpSenderAddress | Self::ArpTargetAddress => KeyType::Ipv4,
            Self::Source(Ip::V6) | Self::Destination(Ip::V6) | Self::NeighbourTarget => KeyType::Ipv6,
            Self::L4Protocol => KeyType::Protocol,
            Self::SourcePort | Self::DestinationPort => KeyType::Port,
            Self::IcmpType => KeyType::IcmpType,
            Self::Icmpv6Type => KeyType::Icmpv6Type,
            Self::EtherSource | Self::EtherDestination | Self::ArpSenderMac => KeyType::Mac,
            Self::EtherType | Self::Protocol => KeyType::EtherType,
        }
    }

    fn load(self, register: u32) -> Expression {
        use libc::{NFT_PAYLOAD_LL_HEADER as LINK, NFT_PAYLOAD_NETWORK_HEADER as NETWORK, NFT_PAYLOAD_TRANSPORT_HEADER as TRANSPORT};
        let meta = |key: i32| Expression::Meta { key: key as u32, register };
        let payload =
            |base: i32, offset: u32| Expression::Payload { base: base as u32, offset, length: self.key_type().length() as u32, register };
        match self {
            Self::Iif => meta(libc::NFT_META_IIF),
            Self::Oif => meta(libc::NFT_META_OIF),
            Self::Iifname => meta(libc::NFT_META_IIFNAME),
            Self::Oifname => meta(libc::NFT_META_OIFNAME),
            Self::Iifkind => meta(NFT_META_IIFKIND),
            Self::Oifkind => meta(NFT_META_OIFKIND),
            Self::Protocol => meta(libc::NFT_META_PROTOCOL),
            Self::L4Protocol => meta(libc::NFT_META_L4PROTO),
            Self::Source(Ip::V4) => payload(NETWORK, 12),
            Self::Destination(Ip::V4) => payload(NETWORK, 16),
            Self::Source(Ip::V6) => payload(NETWORK, 8),
            Self::Destination(Ip::V6) => payload(NETWORK, 24),
            Self::SourcePort => payload(TRANSPORT, 0),
            Self::DestinationPort => payload(TRANSPORT, 2),
            Self::IcmpType | Self::Icmpv6Type => payload(TRANSPORT, 0),
            Self::EtherSource => payload(LINK, 6),
            Self::EtherDestination => payload(LINK, 0),
            Self::EtherType => payload(LINK, 12),
            Self::ArpSenderMac => payload(NETWORK, 8),
            Self::ArpSenderAddress => payload(NETWORK, 14),
            Self::ArpTargetAddress => payload(NETWORK, 24),
            Self::NeighbourTarget => payload(TRANSPORT, 8),
        }
    }

    /// Loads several fields side by side, as the parts of one key.
    pub(super) fn load_all(fields: &[Self]) -> Vec<Expression> {
        Self::load_from(FIRST_REGISTER, fields)
    }

    /// The same from a register on.
    pub(super) fn load_from(mut register: u32, fields: &[Self]) -> Vec<Expression> {
        let mut loads = Vec::new();
        for field in fields {
            loads.push(field.load(register));
            register += field.key_type().length().div_ceil(4) as u32;
        }
        debug_assert!(register <= END_OF_REGISTERS, "the key is longer than the registers");
        loads
    }
}

/// How a denied packet is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refuse {
    TcpReset,
    AdminProhibited,
}

/// One expression of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    Meta {
        key: u32,
        register: u32,
    },
    MetaSet {
        key: u32,
        register: u32,
    },
    Payload {
        base: u32,
        offset: u32,
        length: u32,
        register: u32,
    },
    /// Bytes of an IPv6 extension header; goes on only where the packet has one.
    ExtensionHeader {
        number: u8,
        offset: u32,
        length: u32,
        register: u32,
    },
    /// One where the packet has such an IPv6 extension header, zero where it has none.
    HasExtensionHeader {
        number: u8,
        register: u32,
    },
    Compare {
        equal: bool,
        register: u32,
        value: Vec<u8>,
    },
    /// register = (register & mask) ^ xor
    Bitwise {
        register: u32,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    /// Goes on if the key is (or, inverted, is not) in the set.
    Lookup {
        set: String,
        absent: bool,
        register: u32,
    },
    /// Acts on what the verdict map holds for the key.
    Dispatch {
        map: String,
    },
    Verdict(Verdict),
    ConntrackState {
        register: u32,
    },
    ConntrackDirection {
        register: u32,
    },
    /// The address of a connection's client, or of its server, whatever was rewritten on the way.
    ConntrackEnd {
        ip: Ip,
        server: bool,
        register: u32,
    },
    /// One where the node would send to the packet's sender by the interface that it came in by, else zero.
    ReversePath {
        register: u32,
    },
    /// The 16 bytes of a connection's label.
    ConntrackLabel {
        register: u32,
    },
    /// Sets those bits of a connection's label that are set in the register; the others stay (nf_connlabels_replace).
    ConntrackLabelSet {
        register: u32,
    },
    Refuse(Refuse),
    Log {
        prefix: String,
        group: u16,
    },
    Counter,
    /// A constant as a part of a key.
    Constant {
        register: u32,
        value: Vec<u8>,
    },
    /// Counts in the row of the key, which is made if there is room.
    CountIn {
        set: String,
    },
    /// Goes on for at most so many packets a second of each key.
    LimitIn {
        set: String,
        rate: u64,
        burst: u32,
    },
    /// Goes on for at most so many packets a second.
    Limit {
        rate: u64,
        burst: u32,
    },
    /// Puts the key into a set that packets fill, or renews it there.
    Remember {
        set: String,
    },
}

impl Expression {
    /// Its name in the kernel.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Meta { .. } | Self::MetaSet { .. } => "meta",
            Self::Payload { .. } => "payload",
            Self::ExtensionHeader { .. } | Self::HasExtensionHeader { .. } => "exthdr",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } | Self::Dispatch { .. } => "lookup",
            Self::Verdict(_) | Self::Constant { .. } => "immediate",
            Self::ConntrackState { .. }
            | Self::ConntrackDirection { .. }
            | Self::ConntrackEnd { .. }
            | Self::ConntrackLabel { .. }
            | Self::ConntrackLabelSet { .. } => "ct",
            Self::ReversePath { .. } => "fib",
            Self::Refuse(_) => "reject",
            Self::Log { .. } => "log",
            Self::Counter => "counter",
            Self::Limit { .. } => "limit",
            Self::Remember { .. } | Self::CountIn { .. } | Self::LimitIn { .. } => "dynset",
        }
    }

    /// Its attributes, with the numbers of linux/netfilter/nf_tables.h.
    pub(super) fn attributes(&self) -> Vec<Attribute> {
        use attribute::{be16, be32, bytes, nest, text};
        let value = |kind, value: &[u8]| nest(kind, &[bytes(NFTA_DATA_VALUE, value)]);
        match self {
            // NFTA_META_DREG, KEY, SREG
            Self::Meta { key, register } => vec![be32(2, *key), be32(1, *register)],
            Self::MetaSet { key, register } => vec![be32(2, *key), be32(3, *register)],
            // NFTA_PAYLOAD_DREG, BASE, OFFSET, LEN
            Self::Payload { base, offset, length, register } => {
                vec![be32(1, *register), be32(2, *base), be32(3, *offset), be32(4, *length)]
            }
            // NFTA_EXTHDR_DREG, TYPE, OFFSET, LEN; without OP it is one of IPv6
            Self::ExtensionHeader { number, offset, length, register } => {
                vec![be32(1, *register), bytes(2, &[*number]), be32(3, *offset), be32(4, *length)]
            }
            // Likewise, and NFTA_EXTHDR_FLAGS
            Self::HasExtensionHeader { number, register } => {
                vec![be32(1, *register), bytes(2, &[*number]), be32(3, 0), be32(4, 1), be32(5, NFT_EXTHDR_F_PRESENT)]
            }
            // NFTA_CMP_SREG, OP, DATA
            Self::Compare { equal, register, value: data } => vec![be32(1, *register), be32(2, u32::from(!equal)), value(3, data)],
            // NFTA_BITWISE_SREG, DREG, LEN, MASK, XOR
            Self::Bitwise { register, mask, xor } => {
                vec![be32(1, *register), be32(2, *register), be32(3, mask.len() as u32), value(4, mask), value(5, xor)]
            }
            // NFTA_LOOKUP_SET, SREG, DREG, FLAGS
            Self::Lookup { set, absent: false, register } => vec![text(1, set), be32(2, *register)],
            Self::Lookup { set, absent: true, register } => vec![text(1, set), be32(2, *register), be32(5, libc::NFT_LOOKUP_F_INV as u32)],
            Self::Dispatch { map } => vec![text(1, map), be32(2, FIRST_REGISTER), be32(3, libc::NFT_REG_VERDICT as u32)],
            // NFTA_IMMEDIATE_DREG, DATA
            Self::Verdict(verdict) => vec![be32(1, libc::NFT_REG_VERDICT as u32), verdict_data(2, *verdict)],
            // NFTA_CT_DREG, KEY, SREG
            Self::ConntrackState { register } => vec![be32(1, *register), be32(2, libc::NFT_CT_STATE as u32)],
            Self::ConntrackDirection { register } => vec![be32(1, *register), be32(2, libc::NFT_CT_DIRECTION as u32)],
            // And NFTA_CT_DIRECTION: the server is who sends the answer.
            Self::ConntrackEnd { ip, server, register } => {
                let key = match ip {
                    Ip::V4 => NFT_CT_SRC_IP,
                    Ip::V6 => NFT_CT_SRC_IP6,
                };
                vec![be32(1, *register), be32(2, key), bytes(3, &[u8::from(*server)])]
            }
            // NFTA_FIB_DREG, RESULT (an interface), FLAGS (of the source, by the interface it came in by, whether there is one)
            Self::ReversePath { register } => {
                vec![be32(1, *register), be32(2, NFT_FIB_RESULT_OIF), be32(3, FIB_SADDR | FIB_IIF | FIB_PRESENT)]
            }
            Self::ConntrackLabel { register } => vec![be32(1, *register), be32(2, libc::NFT_CT_LABELS as u32)],
            Self::ConntrackLabelSet { register } => vec![be32(2, libc::NFT_CT_LABELS as u32), be32(4, *register)],
            // NFTA_REJECT_TYPE, ICMP_CODE
            Self::Refuse(Refuse::TcpReset) => vec![be32(1, libc::NFT_REJECT_TCP_RST as u32), bytes(2, &[0])],
            Self::Refuse(Refuse::AdminProhibited) => {
                vec![be32(1, libc::NFT_REJECT_ICMPX_UNREACH as u32), bytes(2, &[libc::NFT_REJECT_ICMPX_ADMIN_PROHIBITED as u8])]
            }
            // NFTA_LOG_GROUP, PREFIX
            Self::Log { prefix, group } => vec![be16(1, *group), text(2, prefix)],
            Self::Counter => Vec::new(),
            Self::Limit { rate, burst } => limit(*rate, *burst),
            Self::Constant { register, value: data } => vec![be32(1, *register), value(2, data)],
            Self::CountIn { set } => with_expression(set, "counter", &[]),
            Self::LimitIn { set, rate, burst } => with_expression(set, "limit", &limit(*rate, *burst)),
            // NFTA_DYNSET_SET_NAME, OP, SREG_KEY
            Self::Remember { set } => vec![text(1, set), be32(3, libc::NFT_DYNSET_OP_UPDATE as u32), be32(4, FIRST_REGISTER)],
        }
    }
}

/// NFTA_LIMIT_RATE, UNIT (seconds), BURST, TYPE (packets), FLAGS.
fn limit(rate: u64, burst: u32) -> Vec<Attribute> {
    use attribute::{be32, be64};
    vec![be64(1, rate), be64(2, 1), be32(3, burst), be32(4, 0), be32(5, 0)]
}

/// NFTA_DYNSET_SET_NAME, OP, SREG_KEY, EXPR (NFTA_EXPR_NAME, DATA).
fn with_expression(set: &str, name: &str, inner: &[Attribute]) -> Vec<Attribute> {
    use attribute::{be32, nest, text};
    let expression = nest(7, &[text(1, name), nest(2, inner)]);
    vec![text(1, set), be32(3, libc::NFT_DYNSET_OP_UPDATE as u32), be32(4, FIRST_REGISTER), expression]
}

/// A verdict as data, in an attribute of this kind.
pub(super) fn verdict_data(kind: u16, verdict: Verdict) -> Attribute {
    use attribute::{be32, nest, text};
    let code = |code: i32| be32(NFTA_VERDICT_CODE, code as u32);
    let inner = match verdict {
        Verdict::Accept => vec![code(libc::NF_ACCEPT)],
        Verdict::Drop => vec![code(libc::NF_DROP)],
        Verdict::Return => vec![code(libc::NFT_RETURN)],
        Verdict::Continue => vec![code(libc::NFT_CONTINUE)],
        Verdict::Jump(chain) => vec![code(libc::NFT_JUMP), text(NFTA_VERDICT_CHAIN, chain)],
        Verdict::Goto(chain) => vec![code(libc::NFT_GOTO), text(NFTA_VERDICT_CHAIN, chain)],
    };
    nest(kind, &[nest(NFTA_DATA_VERDICT, &inner)])
}
