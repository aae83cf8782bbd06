//! Rules written in the words of what they do; expressions come out.

use nix::libc;

use super::expression::{Expression, FIRST_REGISTER, Field, Ip, Refuse};
use super::model::{Rule, Verdict};
use crate::observe::conntrack::label;

/// Packets a second that one log rule reports at most. A flood of denials is counted in full by the counter beside it; the
/// log is for people and for suggestions, and must not become the attack.
const LOG_RATE: u64 = 1000;
/// What may come at once.
const LOG_BURST: u32 = 2000;
/// The same of one sender: ten that flood leave no room for another.
const TALKER: Rate = Rate { a_second: 100, at_once: 200 };

/// How many packets at most, for each value of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) a_second: u64,
    pub(super) at_once: u32,
}

/// Bit of a connection's label; others are those of observation.
const BEGUN: [u8; label::SIZE] = {
    let mut bits = [0; label::SIZE];
    bits[label::FILTER] = label::BEGUN;
    bits
};

/// The register with the connection's home, where its label is in the first ones.
const HOME: u32 = FIRST_REGISTER + (label::HOME / 4) as u32;

/// Where an IPv6 header has its addresses (RFC 8200, 3).
const IPV6_SOURCE: u32 = 8;
const IPV6_DESTINATION: u32 = 24;

/// A rule in the making.
pub(super) struct Draft {
    comment: String,
    expressions: Vec<Expression>,
}

/// Starts a rule; the comment is what `nft list` shows beside it.
pub(super) fn rule(comment: &str) -> Draft {
    Draft { comment: comment.to_owned(), expressions: Vec::new() }
}

impl Draft {
    fn push(mut self, expression: Expression) -> Self {
        self.expressions.push(expression);
        self
    }

    fn load(mut self, fields: &[Field]) -> Self {
        self.expressions.extend(Field::load_all(fields));
        self
    }

    fn compare(self, equal: bool, value: &[u8]) -> Self {
        self.push(Expression::Compare { equal, register: FIRST_REGISTER, value: value.to_vec() })
    }

    /// Only this IP version.
    pub(super) fn ip(self, ip: Ip) -> Self {
        let number = match ip {
            Ip::V4 => libc::NFPROTO_IPV4,
            Ip::V6 => libc::NFPROTO_IPV6,
        };
        self.push(Expression::Meta { key: libc::NFT_META_NFPROTO as u32, register: FIRST_REGISTER }).compare(true, &[number as u8])
    }

    /// Only this transport protocol.
    pub(super) fn l4(self, protocol: u8) -> Self {
        self.load(&[Field::L4Protocol]).compare(true, &[protocol])
    }

    /// Only where a field has this value, as on the wire (interface indices: in the machine's order).
    pub(super) fn equals(self, field: Field, value: &[u8]) -> Self {
        self.load(&[field]).compare(true, value)
    }

    /// Only where a field has another value.
    pub(super) fn differs(self, field: Field, value: &[u8]) -> Self {
        self.load(&[field]).compare(false, value)
    }

    /// Only where the fields are in the set.
    pub(super) fn within(self, fields: &[Field], set: &str) -> Self {
        self.load(fields).push(Expression::Lookup { set: set.to_owned(), absent: false, register: FIRST_REGISTER })
    }

    /// Only where the fields are not in the set.
    pub(super) fn not_within(self, fields: &[Field], set: &str) -> Self {
        self.load(fields).push(Expression::Lookup { set: set.to_owned(), absent: true, register: FIRST_REGISTER })
    }

    /// Acts as the verdict map says for the fields.
    pub(super) fn dispatch(self, fields: &[Field], verdicts: &str) -> Rule {
        self.load(fields).push(Expression::Dispatch { map: verdicts.to_owned() }).done()
    }

    /// Only in this state of connection tracking (NF_CT_STATE bits).
    pub(super) fn state(self, bits: u32) -> Self {
        self.push(Expression::ConntrackState { register: FIRST_REGISTER }).masked(bits.to_ne_bytes().to_vec()).compare(false, &[0; 4])
    }

    /// Only what comes from who began the connection (IP_CT_DIR_ORIGINAL is 0), or answers it.
    pub(super) fn answers(self, answers: bool) -> Self {
        self.push(Expression::ConntrackDirection { register: FIRST_REGISTER }).compare(true, &[u8::from(answers)])
    }

    /// Only from an address that the node would not reach by the interface the packet came in by.
    pub(super) fn of_another_road(self) -> Self {
        self.push(Expression::ReversePath { register: FIRST_REGISTER }).compare(true, &[0])
    }

    /// Only of connections between two addresses that are in the set, which is one of (type of the packet, address).
    pub(super) fn between(self, ip: Ip, set: &str) -> Self {
        [false, true].into_iter().fold(self, |draft, server| {
            let draft = draft.load(&[Field::Protocol]);
            let draft = draft.push(Expression::ConntrackEnd { ip, server, register: FIRST_REGISTER + 1 });
            draft.push(Expression::Lookup { set: set.to_owned(), absent: false, register: FIRST_REGISTER })
        })
    }

    /// Only of connections that [`Draft::begin`] marked.
    pub(super) fn begun(self) -> Self {
        self.push(Expression::ConntrackLabel { register: FIRST_REGISTER }).masked(BEGUN.to_vec()).compare(false, &[0; 16])
    }

    /// Marks the connection as one that the filter let begin.
    pub(super) fn begin(self) -> Self {
        let register = FIRST_REGISTER;
        self.push(Expression::Constant { register, value: BEGUN.to_vec() }).push(Expression::ConntrackLabelSet { register })
    }

    /// Only where the connection's home is not the interface that a field names: another bridge's, or nobody's.
    pub(super) fn not_at_home(self, field: Field, homes: &str) -> Self {
        let mut draft = self.push(Expression::ConntrackLabel { register: FIRST_REGISTER });
        // Behind the whole label, so that its last word and the index are one key.
        draft.expressions.extend(Field::load_from(HOME + 1, &[field]));
        draft.push(Expression::Lookup { set: homes.to_owned(), absent: true, register: HOME })
    }

    /// Makes the interface that a field names the connection's home, unless it has one.
    pub(super) fn settle(self, field: Field) -> Rule {
        let register = FIRST_REGISTER;
        let mut draft = self.push(Expression::ConntrackLabel { register });
        draft = draft.push(Expression::Compare { equal: true, register: HOME, value: vec![0; 4] });
        draft = draft.push(Expression::Constant { register, value: vec![0; label::HOME] });
        draft.expressions.extend(Field::load_from(HOME, &[field]));
        draft.push(Expression::ConntrackLabelSet { register }).done()
    }

    fn masked(self, mask: Vec<u8>) -> Self {
        let xor = vec![0; mask.len()];
        self.push(Expression::Bitwise { register: FIRST_REGISTER, mask, xor })
    }

    /// Only where these bits of the packet's mark are all clear.
    pub(super) fn mark_lacks(self, bits: u32) -> Self {
        self.push(Expression::Meta { key: libc::NFT_META_MARK as u32, register: FIRST_REGISTER })
            .masked(bits.to_ne_bytes().to_vec())
            .compare(true, &[0; 4])
    }

    /// Only where these bits of the packet's mark are all set.
    pub(super) fn mark_has(self, bits: u32) -> Self {
        self.push(Expression::Meta { key: libc::NFT_META_MARK as u32, register: FIRST_REGISTER })
            .masked(bits.to_ne_bytes().to_vec())
            .compare(true, &bits.to_ne_bytes())
    }

    /// Clears some bits of the mark, then sets some; all others survive.
    pub(super) fn mark(self, clear: u32, set: u32) -> Self {
        let register = FIRST_REGISTER;
        self.push(Expression::Meta { key: libc::NFT_META_MARK as u32, register })
            .push(Expression::Bitwise { register, mask: (!(clear | set)).to_ne_bytes().to_vec(), xor: set.to_ne_bytes().to_vec() })
            .push(Expression::MetaSet { key: libc::NFT_META_MARK as u32, register })
    }

    /// TCP, with these flags (of the byte at offset 13) as given.
    pub(super) fn tcp_flags(self, mask: u8, value: u8) -> Self {
        self.l4(libc::IPPROTO_TCP as u8)
            .push(Expression::Payload { base: libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32, offset: 13, length: 1, register: FIRST_REGISTER })
            .masked(vec![mask])
            .compare(true, &[value])
    }

    /// Bytes at an offset of the network header.
    pub(super) fn network_bytes(self, offset: u32, value: &[u8]) -> Self {
        let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
        self.push(Expression::Payload { base, offset, length: value.len() as u32, register: FIRST_REGISTER }).compare(true, value)
    }

    /// The same, where they differ.
    pub(super) fn network_bytes_not(self, offset: u32, value: &[u8]) -> Self {
        let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
        self.push(Expression::Payload { base, offset, length: value.len() as u32, register: FIRST_REGISTER }).compare(false, value)
    }

    /// Only IPv6 from a link-local address.
    pub(super) fn link_local_source(self) -> Self {
        self.ip(Ip::V6).link_local(IPV6_SOURCE, true)
    }

    /// IPv6 that is known as such already, from no link-local address.
    pub(super) fn not_link_local_source(self) -> Self {
        self.link_local(IPV6_SOURCE, false)
    }

    /// The same, to none.
    pub(super) fn not_link_local_destination(self) -> Self {
        self.link_local(IPV6_DESTINATION, false)
    }

    /// fe80::/10 (RFC 4291, 2.4).
    fn link_local(self, offset: u32, is: bool) -> Self {
        let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
        self.push(Expression::Payload { base, offset, length: 2, register: FIRST_REGISTER })
            .masked(vec![0xff, 0xc0])
            .compare(is, &[0xfe, 0x80])
    }

    /// A frame with an IPv4 packet that has no options: its type, then version 4 and a header of five words (RFC 791, 3.1). One question,
    /// since every packet is asked.
    pub(super) fn plain_ipv4(self) -> Self {
        let base = libc::NFT_PAYLOAD_LL_HEADER as u32;
        self.push(Expression::Payload { base, offset: 12, length: 3, register: FIRST_REGISTER }).compare(true, &[0x08, 0x00, 0x45])
    }

    /// Where these bits of one byte of the network header differ.
    pub(super) fn network_bits_not(self, offset: u32, mask: u8, value: u8) -> Self {
        let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
        self.push(Expression::Payload { base, offset, length: 1, register: FIRST_REGISTER }).masked(vec![mask]).compare(false, &[value])
    }

    /// Of 64 bytes and more, without the frame's header in the hooks of bridges.
    pub(super) fn longer(self) -> Self {
        self.push(Expression::Meta { key: libc::NFT_META_LEN as u32, register: FIRST_REGISTER })
            .masked((!0x3f_u32).to_ne_bytes().to_vec())
            .compare(false, &[0; 4])
    }

    /// IPv6 with 64 bytes and more behind its header (RFC 8200, 3).
    pub(super) fn longer_payload(self) -> Self {
        let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
        self.push(Expression::Payload { base, offset: 4, length: 2, register: FIRST_REGISTER })
            .masked((!0x3f_u16).to_be_bytes().to_vec())
            .compare(false, &[0; 2])
    }

    /// To one of the MAC addresses that a bridge keeps to itself: 01:80:c2:00:00:00 to 0f (IEEE 802.1Q, 8.6.3).
    pub(super) fn reserved_destination(self) -> Self {
        self.load(&[Field::EtherDestination]).masked(vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xf0]).compare(true, &[0x01, 0x80, 0xc2, 0, 0, 0])
    }

    /// IPv6 with a fragment header, where the offset is zero (the first fragment) or isn't.
    pub(super) fn fragment(self, first: bool) -> Self {
        let number = libc::IPPROTO_FRAGMENT as u8;
        // Thirteen bits of offset, above two reserved ones and the flag for more (RFC 8200, 4.5).
        self.push(Expression::ExtensionHeader { number, offset: 2, length: 2, register: FIRST_REGISTER })
            .masked(0xfff8_u16.to_be_bytes().to_vec())
            .compare(first, &[0; 2])
    }

    /// Only a fragment of a packet. IPv6: whatever has a fragment header, since connection tracking queues one that is whole too.
    pub(super) fn piece(self, ip: Ip) -> Self {
        match ip {
            Ip::V4 => {
                let base = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
                // More fragments, and thirteen bits of offset (RFC 791, 3.1).
                self.push(Expression::Payload { base, offset: 6, length: 2, register: FIRST_REGISTER })
                    .masked(0x3fff_u16.to_be_bytes().to_vec())
                    .compare(false, &[0; 2])
            }
            Ip::V6 => self.header(libc::IPPROTO_FRAGMENT as u8),
        }
    }

    /// Only IPv6 with this extension header.
    pub(super) fn header(self, number: u8) -> Self {
        self.push(Expression::HasExtensionHeader { number, register: FIRST_REGISTER }).compare(true, &[1])
    }

    /// Puts the fields into a set that packets fill.
    pub(super) fn remember(self, fields: &[Field], set: &str) -> Rule {
        self.load(fields).push(Expression::Remember { set: set.to_owned() }).done()
    }

    /// Reports to NFLOG, at a bounded rate, and goes on to the next rule.
    pub(super) fn log(self, group: u16, prefix: &str) -> Rule {
        self.push(Expression::Limit { rate: LOG_RATE, burst: LOG_BURST }).push(Expression::Log { prefix: prefix.to_owned(), group }).done()
    }

    /// Counts in the row of a constant and these fields; a row more where there is room.
    pub(super) fn count_in(mut self, constant: &[u8; 4], fields: &[Field], set: &str) -> Rule {
        self = self.push(Expression::Constant { register: FIRST_REGISTER, value: constant.to_vec() });
        self.expressions.extend(Field::load_from(FIRST_REGISTER + 1, fields));
        self.push(Expression::CountIn { set: set.to_owned() }).done()
    }

    /// Only what is logged, at a bounded rate for each value of the fields.
    pub(super) fn throttled(self, fields: &[Field], set: &str) -> Self {
        self.bounded(TALKER, fields, set)
    }

    /// Only at this rate for each value of the fields; none where the set has no room for another value.
    pub(super) fn bounded(self, rate: Rate, fields: &[Field], set: &str) -> Self {
        self.load(fields).push(Expression::LimitIn { set: set.to_owned(), rate: rate.a_second, burst: rate.at_once })
    }

    /// Counts.
    pub(super) fn count(self) -> Self {
        self.push(Expression::Counter)
    }

    /// Answers instead of passing.
    pub(super) fn refuse(self, how: Refuse) -> Rule {
        self.count().push(Expression::Refuse(how)).done()
    }

    /// Drops, and counts.
    pub(super) fn drop(self) -> Rule {
        self.count().then(Verdict::Drop)
    }

    /// Ends with a verdict.
    pub(super) fn then(self, verdict: Verdict) -> Rule {
        self.push(Expression::Verdict(verdict)).done()
    }

    /// Ends without a verdict: the next rule is asked.
    pub(super) fn done(self) -> Rule {
        Rule { comment: self.comment, expressions: self.expressions }
    }
}
