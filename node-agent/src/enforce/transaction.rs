//! The difference of two tables as the messages of one transaction.

use std::collections::BTreeMap;

use nix::libc;

use netlink_packet_core::{Emitable, NLA_F_NESTED, NLM_F_APPEND, NLM_F_CREATE};

use super::TABLE;
use super::attribute::{Attribute, NEST_LIMIT, be32, be64, bytes, nest, put, put_nest, text};
use super::expression::verdict_data;
use super::key::Named;
use super::model::{Chain, Elements, Family, Holds, Hook, Key, Rule, Set, Table, Value, along, differing};
use super::socket::Message;

/// Flags of a table (linux/netfilter/nf_tables.h): only the socket that made it may change it, and it outlives that socket.
pub(super) const OWNER: u32 = 0x2;
pub(super) const PERSIST: u32 = 0x4;

/// A set whose key is several fields (NFT_SET_CONCAT), which an interval set must know.
const CONCAT: u32 = 0x80;

/// Types of what is kept for nft beside a set (libnftnl/udata.h): byte order of the key, and a comment.
const UDATA_SET_KEYBYTEORDER: u8 = 0;
const UDATA_SET_COMMENT: u8 = 7;
const UDATA_COMMENT: u8 = 0;
/// nft's numbers for byte orders (include/datatype.h).
const HOST_ORDER: u32 = 1;
const NETWORK_ORDER: u32 = 2;
/// The longest comment that nft takes (NFTNL_UDATA_COMMENT_MAXLEN).
const COMMENT: usize = 128;

/// nf_tables' data type of a verdict (NFT_DATA_VERDICT).
const TYPE_VERDICT: u32 = 0xffff_ff00;

struct Writer<'a> {
    table: &'a Table,
    out: Vec<Message>,
    next_set: u32,
}

/// Takes a table away, with everything in it.
pub(super) fn remove(family: Family) -> Message {
    message(family, libc::NFT_MSG_DELTABLE, 0, vec![text(1, TABLE)], format!("the removal of table {family} {TABLE}"))
}

/// The frame of a table that is there: what a new start may build upon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    /// Chains with hook number and priority, where they have one.
    pub(super) chains: BTreeMap<String, Option<Hook>>,
    /// Sets with the length of their keys and their flags.
    pub(super) sets: BTreeMap<String, Option<(u32, u32)>>,
    /// What the sets hold that are wanted in the same form.
    pub(super) elements: BTreeMap<String, Present>,
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Present {
    /// All that is wanted, and nothing else.
    AsWanted,
    /// This: an element that is wanted as it is has its value, any other one that nobody wants.
    Other(BTreeMap<Key, Value>),
}

impl Frame {
    /// Whether a set of this name and form is there.
    pub(super) fn has(&self, name: &str, set: &Set) -> bool {
        self.sets.get(name) == Some(&Some((set.key_length() as u32, flags(set))))
    }
}

/// The flags of a set (NFTA_SET_FLAGS).
fn flags(set: &Set) -> u32 {
    let holds = match set.holds {
        Holds::Nothing => 0,
        Holds::Verdict => libc::NFT_SET_MAP as u32,
    };
    let intervals = if set.intervals { libc::NFT_SET_INTERVAL as u32 | CONCAT } else { 0 };
    let dynamic = if set.dynamic.is_some() { libc::NFT_SET_TIMEOUT as u32 | libc::NFT_SET_EVAL as u32 } else { 0 };
    holds | intervals | dynamic
}

fn empty(family: Family) -> Table {
    Table { family, sets: Default::default(), chains: Default::default() }
}

fn table(wanted: &Table, flags: u32) -> Message {
    let comment = "made and kept by bulkhead-agent; bulkhead down removes it";
    // NFTA_TABLE_NAME, FLAGS, USERDATA
    let attributes = vec![text(1, TABLE), be32(2, flags), bytes(6, &note(UDATA_COMMENT, comment))];
    message(wanted.family, libc::NFT_MSG_NEWTABLE, NLM_F_CREATE, attributes, format!("table {TABLE}"))
}

/// Makes `wanted` out of nothing; `present`: a table of that name is there and goes away in the same transaction.
pub(super) fn create(wanted: &Table, present: bool, flags: u32) -> Vec<Message> {
    let mut out = Vec::new();
    if present {
        out.push(remove(wanted.family));
    }
    out.push(table(wanted, flags));
    out.extend(change(&empty(wanted.family), wanted));
    out
}

/// Makes `wanted` out of a table that is there, whatever it holds.
///
/// # Why
/// A table that is removed and made again in one transaction has two chains at each hook for a moment, and a packet that meets
/// the new one before the commit and the old one after it is judged by neither. Chains that stay are judged by all of the old
/// rules or all of the new. Sets stay too, and in them every element that is wanted as it is: a packet that is on its way through
/// the old rules would not find an element that was taken out and put in again. So does what packets have filled in (UDP flows).
pub(super) fn rewrite(wanted: &Table, frame: &Frame, flags: u32) -> Vec<Message> {
    let mut kept = empty(wanted.family);
    for (name, chain) in wanted.chains.iter().filter(|(name, chain)| frame.chains.get(*name) == Some(&chain.hook)) {
        kept.chains.insert(name.clone(), Chain { hook: chain.hook, rules: Vec::new() });
    }
    for (name, set) in wanted.sets.iter().filter(|(name, set)| frame.has(name, set)) {
        kept.sets.insert(name.clone(), set.bare());
    }
    let mut writer = Writer { table: wanted, out: vec![table(wanted, flags)], next_set: 1 };
    writer.push(libc::NFT_MSG_DELRULE, 0, vec![text(1, TABLE)], "the old rules".to_owned());
    // Sets first: their elements hold on to chains.
    for name in frame.sets.keys().filter(|name| !kept.sets.contains_key(*name)) {
        writer.old_set(name);
    }
    for name in frame.chains.keys().filter(|name| !kept.chains.contains_key(*name)) {
        writer.old_chain(name);
    }
    let mut out = writer.out;
    let none = BTreeMap::new();
    out.extend(between(&kept, wanted, |name, set| match frame.elements.get(name) {
        Some(Present::AsWanted) => Default::default(),
        Some(Present::Other(held)) => differing(held, &set.elements),
        None => differing(&none, &set.elements),
    }));
    out
}

/// Whether the difference can be made by elements, rules and additions alone: a set that changed its form cannot.
pub(super) fn can_change(current: &Table, wanted: &Table) -> bool {
    wanted.sets.iter().all(|(name, set)| current.sets.get(name).is_none_or(|old| old.same_definition(set)))
        && wanted.chains.iter().all(|(name, chain)| current.chains.get(name).is_none_or(|old| old.hook == chain.hook))
}

/// What makes `wanted` out of `current`. Empty if they are equal.
pub(super) fn change(current: &Table, wanted: &Table) -> Vec<Message> {
    let none = BTreeMap::new();
    between(current, wanted, |name, set| differing(current.sets.get(name).map_or(&none, |set| &set.elements), &set.elements))
}

/// The same, where the elements of a set that go and that come are known otherwise.
fn between<'t>(current: &Table, wanted: &'t Table, elements: impl Fn(&str, &'t Set) -> (Elements<'t>, Elements<'t>)) -> Vec<Message> {
    let mut writer = Writer { table: wanted, out: Vec::new(), next_set: 1 };
    for (name, set) in wanted.sets.iter().filter(|(name, _)| !current.sets.contains_key(*name)) {
        writer.new_set(name, set);
    }
    for (name, chain) in wanted.chains.iter().filter(|(name, _)| !current.chains.contains_key(*name)) {
        writer.new_chain(name, chain);
    }
    let none = Chain::default();
    let changed: Vec<_> =
        wanted.chains.iter().filter(|(name, chain)| current.chains.get(*name).unwrap_or(&none).rules != chain.rules).collect();
    let gone: Vec<_> = current.chains.keys().filter(|name| !wanted.chains.contains_key(*name)).collect();
    let stale = changed.iter().map(|(name, _)| *name).filter(|name| current.chains.contains_key(*name));
    for name in stale.chain(gone.iter().copied()) {
        writer.flush(name);
    }
    for (name, set) in &wanted.sets {
        if set.dynamic.is_none() {
            let (gone, come) = elements(name, set);
            writer.elements(name, false, gone.into_iter());
            writer.elements(name, true, come.into_iter());
        }
    }
    for (name, chain) in changed {
        for (index, rule) in chain.rules.iter().enumerate() {
            writer.new_rule(name, index, rule);
        }
    }
    for name in gone {
        writer.old_chain(name);
    }
    for name in current.sets.keys().filter(|name| !wanted.sets.contains_key(*name)) {
        writer.old_set(name);
    }
    writer.out
}

/// Elements of one set that go, and others that come.
pub(super) fn elements(table: &Table, set: &str, removed: &BTreeMap<Key, Value>, added: &BTreeMap<Key, Value>) -> Vec<Message> {
    let mut writer = Writer { table, out: Vec::new(), next_set: 1 };
    writer.elements(set, false, removed.iter());
    writer.elements(set, true, added.iter());
    writer.out
}

/// How many elements differ, over all sets.
pub(super) fn elements_changed(current: &Table, wanted: &Table) -> usize {
    let none = Default::default();
    let sets = wanted.sets.iter().map(|(name, set)| (current.sets.get(name).map_or(&none, |set| &set.elements), &set.elements));
    let moves = |(old, new)| {
        along(old, new)
            .filter(|(_, old, new)| old != new)
            .map(|(_, old, new)| usize::from(old.is_some()) + usize::from(new.is_some()))
            .sum::<usize>()
    };
    sets.map(moves).sum()
}

impl Writer<'_> {
    fn push(&mut self, kind: i32, flags: u16, attributes: Vec<Attribute>, what: String) {
        self.out.push(message(self.table.family, kind, flags, attributes, what));
    }

    fn old_chain(&mut self, name: &str) {
        // NFTA_CHAIN_TABLE, NAME
        self.push(libc::NFT_MSG_DELCHAIN, 0, vec![text(1, TABLE), text(3, name)], format!("the removal of chain {name}"));
    }

    fn old_set(&mut self, name: &str) {
        // NFTA_SET_TABLE, NAME
        self.push(libc::NFT_MSG_DELSET, 0, vec![text(1, TABLE), text(2, name)], format!("the removal of set {name}"));
    }

    fn new_set(&mut self, name: &str, set: &Set) {
        let types = set.key.iter().fold(0, |types, part| types << 6 | part.nft_type());
        let mut described = Vec::new();
        if set.intervals {
            // NFTA_SET_DESC_CONCAT: a list (NFTA_LIST_ELEM) of fields, each with its length (NFTA_SET_FIELD_LEN).
            let fields: Vec<_> = set.key.iter().map(|part| nest(1, &[be32(1, part.length() as u32)])).collect();
            described.push(nest(2, &fields));
        }
        let mut attributes = vec![text(1, TABLE), text(2, name), be32(4, types), be32(5, set.key_length() as u32)];
        match set.holds {
            Holds::Nothing => {}
            Holds::Verdict => {
                attributes.extend([be32(6, TYPE_VERDICT), be32(7, 0)]);
            }
        }
        if let Some(dynamic) = set.dynamic {
            let milliseconds = u64::try_from(dynamic.timeout.as_millis()).unwrap_or(u64::MAX);
            attributes.push(be64(11, milliseconds));
            // NFTA_SET_DESC_SIZE
            described.push(be32(1, dynamic.size));
        }
        if !described.is_empty() {
            attributes.push(nest(9, &described));
        }
        let number = |kind: u8, value: u32| [vec![kind, 4], value.to_ne_bytes().to_vec()].concat();
        let key_order = if set.key.len() == 1 && set.key[0].host_order() { HOST_ORDER } else { NETWORK_ORDER };
        let mut notes = number(UDATA_SET_KEYBYTEORDER, key_order);
        notes.extend(note(UDATA_SET_COMMENT, &set.comment));
        // NFTA_SET_FLAGS, ID, USERDATA
        attributes.extend([be32(3, flags(set)), be32(10, self.next_set), bytes(13, &notes)]);
        self.next_set += 1;
        self.push(libc::NFT_MSG_NEWSET, NLM_F_CREATE, attributes, format!("set {name}"));
    }

    fn new_chain(&mut self, name: &str, chain: &Chain) {
        // NFTA_CHAIN_TABLE, NAME
        let mut attributes = vec![text(1, TABLE), text(3, name)];
        if let Some(hook) = chain.hook {
            // NFTA_CHAIN_HOOK (NFTA_HOOK_HOOKNUM, PRIORITY), POLICY, TYPE
            let at = nest(4, &[be32(1, hook.number), be32(2, hook.priority as u32)]);
            attributes.extend([at, be32(5, libc::NF_ACCEPT as u32), text(7, "filter")]);
        }
        self.push(libc::NFT_MSG_NEWCHAIN, NLM_F_CREATE, attributes, format!("chain {name}"));
    }

    fn flush(&mut self, chain: &str) {
        // NFTA_RULE_TABLE, CHAIN
        self.push(libc::NFT_MSG_DELRULE, 0, vec![text(1, TABLE), text(2, chain)], format!("the old rules of chain {chain}"));
    }

    fn new_rule(&mut self, chain: &str, index: usize, rule: &Rule) {
        // NFTA_LIST_ELEM (NFTA_EXPR_NAME, DATA)
        let expressions: Vec<_> = rule.expressions.iter().map(|e| nest(1, &[text(1, e.name()), nest(2, &e.attributes())])).collect();
        // NFTA_RULE_TABLE, CHAIN, EXPRESSIONS, USERDATA
        let mut attributes = vec![text(1, TABLE), text(2, chain), nest(4, &expressions)];
        if !rule.comment.is_empty() {
            attributes.push(bytes(7, &note(UDATA_COMMENT, &rule.comment)));
        }
        self.push(libc::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes, format!("rule {index} of chain {chain}"));
    }

    fn elements<'e>(&mut self, name: &str, adding: bool, elements: impl Iterator<Item = (&'e Key, &'e Value)>) {
        let (mut list, mut count) = (Vec::new(), 0);
        for (key, value) in elements {
            element(&mut list, key, adding.then_some(*value));
            count += 1;
            if list.len() > NEST_LIMIT {
                self.element_list(name, adding, std::mem::take(&mut list), count);
                count = 0;
            }
        }
        if count > 0 {
            self.element_list(name, adding, list, count);
        }
    }

    fn element_list(&mut self, name: &str, adding: bool, list: Vec<u8>, count: usize) {
        let (kind, flags, what) = match adding {
            true => (libc::NFT_MSG_NEWSETELEM, NLM_F_CREATE, format!("{count} elements of set {name}")),
            false => (libc::NFT_MSG_DELSETELEM, 0, format!("the removal of {count} elements of set {name}")),
        };
        self.push(kind, flags, element_list(name, list), what);
    }
}

/// NFTA_SET_ELEM_LIST_TABLE, SET, ELEMENTS.
pub(super) fn element_list(set: &str, list: Vec<u8>) -> Vec<Attribute> {
    vec![text(1, TABLE), text(2, set), Attribute::new(3 | NLA_F_NESTED, list)]
}

/// Writes one element (NFTA_LIST_ELEM); without its value, as a question or a removal wants it.
pub(super) fn element(list: &mut Vec<u8>, key: &Key, value: Option<Value>) {
    // NFTA_DATA_VALUE
    let data = |out: &mut Vec<u8>, kind: u16, bytes: &[u8]| put_nest(out, kind | NLA_F_NESTED, |out| put(out, 1, bytes));
    put_nest(list, 1 | NLA_F_NESTED, |out| {
        // NFTA_SET_ELEM_KEY, KEY_END, FLAGS (catch-all)
        match key.named() {
            Named::Exact(exact) => data(out, 1, exact),
            Named::Range(first, last) => {
                data(out, 1, first);
                data(out, 10, last);
            }
            Named::Otherwise => put(out, 3, &2_u32.to_be_bytes()),
        }
        // NFTA_SET_ELEM_DATA
        match value {
            None | Some(Value::Nothing) => {}
            Some(Value::Verdict(verdict)) => {
                let data = [verdict_data(2, verdict)];
                let at = out.len();
                out.resize(at + data.as_slice().buffer_len(), 0);
                data.as_slice().emit(&mut out[at..]);
            }
        }
    });
}

fn message(family: Family, kind: i32, flags: u16, attributes: Vec<Attribute>, what: String) -> Message {
    // The numbers of nf_tables messages are below 64.
    Message { family, kind: kind as u8, flags, attributes, what: format!("{what} ({family})") }
}

/// A note for nft: type, length, text ended by a zero.
fn note(kind: u8, text: &str) -> Vec<u8> {
    let mut text: Vec<u8> = text.bytes().take(COMMENT - 1).collect();
    text.push(0);
    [vec![kind, text.len() as u8], text].concat()
}
