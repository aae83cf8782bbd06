//! Tables as data: what the kernel should hold, before it is netlink. Two equal models are the same ruleset; the difference
//! of two models is a transaction.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use super::expression::Expression;
pub(super) use super::key::Key;
use super::key::Named;

/// Address family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    Inet,
    Bridge,
    Arp,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
            Self::Arp => "arp",
        })
    }
}

/// One table: sets, chains, rules, elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) family: Family,
    pub(super) sets: BTreeMap<String, Set>,
    pub(super) chains: BTreeMap<String, Chain>,
}

/// A chain with its rules in order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Chain {
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Rule>,
}

/// Where a base chain is called from. The policy is always accept: what is to be dropped is dropped by a rule, so that
/// other people's traffic never depends on ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) number: u32,
    pub(super) priority: i32,
}

/// One rule: the comment tells an administrator what it prevents or lets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) comment: String,
    pub(super) expressions: Vec<Expression>,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Return,
    /// Goes on with the next rule.
    Continue,
    Jump(&'static str),
    Goto(&'static str),
}

/// One part of a set's key: how long it is, and how nft shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum KeyType {
    InterfaceIndex,
    InterfaceName,
    Ipv4,
    Ipv6,
    Mac,
    Protocol,
    Port,
    EtherType,
    IcmpType,
    Icmpv6Type,
    /// A number of ours: why.
    Reason,
}

impl KeyType {
    /// Bytes on the wire; in a key each part is padded to four.
    pub(super) fn length(self) -> usize {
        match self {
            Self::Protocol | Self::IcmpType | Self::Icmpv6Type => 1,
            Self::Port | Self::EtherType => 2,
            Self::InterfaceIndex | Self::Ipv4 | Self::Reason => 4,
            Self::Mac => 6,
            Self::Ipv6 | Self::InterfaceName => 16,
        }
    }

    /// The number of the data type in nft (include/datatype.h), only for listing.
    pub(super) fn nft_type(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Mac => 9,
            Self::EtherType => 10,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::IcmpType => 14,
            // Shown as a mark is: a number of 32 bits.
            Self::Reason => 19,
            Self::InterfaceIndex => 20,
            Self::Icmpv6Type => 29,
            Self::InterfaceName => 41,
        }
    }

    /// Whether the kernel keeps it in the byte order of the machine.
    pub(super) fn host_order(self) -> bool {
        matches!(self, Self::InterfaceIndex | Self::InterfaceName | Self::Reason)
    }
}

/// What a set's elements carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Nothing: a set.
    Nothing,
    /// A verdict: a verdict map.
    Verdict,
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) key: Vec<KeyType>,
    pub(super) holds: Holds,
    /// Elements are ranges in every part of the key.
    pub(super) intervals: bool,
    /// Filled by packets, and how long an entry stays; its elements are not ours to compare.
    pub(super) dynamic: Option<Dynamic>,
    pub(super) comment: String,
    pub(super) elements: BTreeMap<Key, Value>,
}

/// Elements by their keys.
pub(super) type Elements<'a> = Vec<(&'a Key, &'a Value)>;

/// Each key of two maps in order, with what either has there: one walk along both.
pub(super) fn along<'a, K: Ord, A, B>(
    one: &'a BTreeMap<K, A>,
    other: &'a BTreeMap<K, B>,
) -> impl Iterator<Item = (&'a K, Option<&'a A>, Option<&'a B>)> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    std::iter::from_fn(move || {
        let order = match (one.peek(), other.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => Ordering::Less,
            (None, _) => Ordering::Greater,
        };
        let a = if order.is_le() { one.next() } else { None };
        let b = if order.is_ge() { other.next() } else { None };
        let key = a.map(|(key, _)| key).or(b.map(|(key, _)| key))?;
        Some((key, a.map(|(_, value)| value), b.map(|(_, value)| value)))
    })
}

/// Elements that one of two sets has and the other one hasn't, or not with this value: those to go, those to come.
pub(super) fn differing<'a>(old: &'a BTreeMap<Key, Value>, new: &'a BTreeMap<Key, Value>) -> (Elements<'a>, Elements<'a>) {
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    for (key, before, after) in along(old, new).filter(|(_, before, after)| before != after) {
        gone.extend(before.map(|value| (key, value)));
        come.extend(after.map(|value| (key, value)));
    }
    (gone, come)
}

/// A set that packets fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dynamic {
    pub(super) timeout: Duration,
    /// The most entries it may hold.
    pub(super) size: u32,
}

impl Set {
    /// A hash set.
    pub(super) fn of(key: &[KeyType], comment: &str) -> Self {
        Self {
            key: key.to_vec(),
            holds: Holds::Nothing,
            intervals: false,
            dynamic: None,
            comment: comment.to_owned(),
            elements: BTreeMap::new(),
        }
    }

    /// The same set without its elements.
    pub(super) fn bare(&self) -> Self {
        let Self { key, holds, intervals, dynamic, comment, elements: _ } = self;
        let (key, comment) = (key.clone(), comment.clone());
        Self { key, holds: *holds, intervals: *intervals, dynamic: *dynamic, comment, elements: BTreeMap::new() }
    }

    /// The same with everything but the elements equal.
    pub(super) fn same_definition(&self, other: &Self) -> bool {
        self.key == other.key && self.holds == other.holds && self.intervals == other.intervals && self.dynamic == other.dynamic
    }

    /// Adds an exact element.
    pub(super) fn insert(&mut self, key: Vec<u8>, value: Value) {
        debug_assert_eq!(key.len(), self.key_length());
        self.elements.insert(Key::exact(&key), value);
    }

    /// Bytes of a key, each part padded to four.
    pub(super) fn key_length(&self) -> usize {
        self.key.iter().map(|part| part.length().next_multiple_of(4)).sum()
    }
}

/// What an element carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    Nothing,
    Verdict(Verdict),
}

/// Appends one part to a key, padded.
pub(super) fn part(key: &mut (impl Extend<u8> + Deref<Target = [u8]>), bytes: &[u8]) {
    key.extend(bytes.iter().copied());
    let padding = key.len().next_multiple_of(4) - key.len();
    key.extend(std::iter::repeat_n(0, padding));
}

/// An interface's name as the kernel compares it: 16 bytes, padded with zeros.
pub(super) fn interface_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// A key in words, for a person who reads what differs.
pub(super) fn show(types: &[KeyType], key: &Key) -> String {
    let bytes = |bytes: &[u8]| {
        let mut rest = bytes;
        let mut words = Vec::new();
        for part in types {
            let (value, tail) = rest.split_at(part.length().min(rest.len()));
            words.push(show_part(*part, value));
            let padding = part.length().next_multiple_of(4) - part.length();
            rest = tail.get(padding..).unwrap_or_default();
        }
        words.join(" . ")
    };
    match key.named() {
        Named::Exact(exact) => bytes(exact),
        Named::Range(first, last) => format!("{} - {}", bytes(first), bytes(last)),
        Named::Otherwise => "*".to_owned(),
    }
}

/// A MAC address as people write it.
pub(super) fn show_mac(mac: &[u8]) -> String {
    mac.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
}

fn show_part(part: KeyType, value: &[u8]) -> String {
    let number = |value: &[u8]| value.iter().fold(0_u64, |sum, &b| sum << 8 | u64::from(b));
    match part {
        KeyType::InterfaceIndex | KeyType::Reason => value.try_into().map(|b| u32::from_ne_bytes(b).to_string()).unwrap_or_default(),
        KeyType::InterfaceName => super::attribute::as_text(value),
        KeyType::Ipv4 => <[u8; 4]>::try_from(value).map(|b| std::net::Ipv4Addr::from(b).to_string()).unwrap_or_default(),
        KeyType::Ipv6 => <[u8; 16]>::try_from(value).map(|b| std::net::Ipv6Addr::from(b).to_string()).unwrap_or_default(),
        KeyType::Mac => show_mac(value),
        KeyType::Protocol | KeyType::Port | KeyType::IcmpType | KeyType::Icmpv6Type => number(value).to_string(),
        KeyType::EtherType => format!("{:#x}", number(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_between_two_sets_is_what_asking_for_each_element_finds() {
        let set = |numbers: &[(u8, Value)]| numbers.iter().map(|(n, value)| (Key::exact(&[*n]), *value)).collect::<BTreeMap<_, _>>();
        let (nothing, drop) = (Value::Nothing, Value::Verdict(Verdict::Drop));
        let all = [set(&[]), set(&[(1, nothing), (3, nothing)]), set(&[(1, drop), (2, nothing), (3, nothing)]), set(&[(4, drop)])];
        for (old, new) in all.iter().flat_map(|old| all.iter().map(move |new| (old, new))) {
            let lacks = |a: &BTreeMap<Key, Value>, b: &BTreeMap<Key, Value>| -> Vec<(Key, Value)> {
                a.iter().filter(|(key, value)| b.get(*key) != Some(*value)).map(|(key, value)| (key.clone(), *value)).collect()
            };
            let owned = |found: Elements<'_>| found.into_iter().map(|(key, value)| (key.clone(), *value)).collect::<Vec<_>>();
            let (gone, come) = differing(old, new);
            assert_eq!((owned(gone), owned(come)), (lacks(old, new), lacks(new, old)), "{old:?} {new:?}");
        }
    }
}
