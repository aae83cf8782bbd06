//! What the kernel holds, read back and compared with what was written.
//!
//! Names, hooks, order, kinds of expressions and every element are compared with the model. The inner form of a rule is the
//! kernel's own (it renames registers and adds defaults), so it is remembered as read right after our transaction, at the same
//! generation, and compared with that from then on.

use std::collections::BTreeMap;
use std::fmt;

use nix::libc;

use super::attribute::{self, Attributes, as_be32, as_text, find, read, text};
use super::change::Edits;
use super::held::{self, Data, FOREIGN, GONE, OTHER, differences};
use super::model::{Chain, Family, Hook, Key, Set, Table, Value, show, show_mac};
use super::socket::{NftSocket, Question, SocketError};
use super::transaction::{Frame, Present, element, element_list};
use super::{TABLE, Tables};

/// One way in which the kernel differs from what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drift {
    /// A table of ours is gone: nothing is enforced.
    TableGone {
        /// `inet bulkhead` or `bridge bulkhead`.
        table: String,
    },
    /// A chain is gone, foreign, or is called from elsewhere.
    Chain {
        /// Which table.
        table: String,
        /// Which chain.
        chain: String,
        /// How it differs.
        what: &'static str,
    },
    /// The rules of a chain are not those that were written.
    Rules {
        /// Which table.
        table: String,
        /// Which chain.
        chain: String,
    },
    /// A set is gone, foreign, or of another form.
    Set {
        /// Which table.
        table: String,
        /// Which set.
        set: String,
        /// How it differs.
        what: &'static str,
    },
    /// An element is missing, foreign, or says something else.
    Element {
        /// Which table.
        table: String,
        /// Which set.
        set: String,
        /// The element, in words.
        element: String,
        /// How it differs.
        what: &'static str,
    },
    /// A bound port is another interface than it was.
    Port {
        /// Its name.
        port: String,
    },
    /// A MAC address is no longer tied to its port in the bridge.
    Station {
        /// The port's name.
        port: String,
        /// The address.
        mac: [u8; 6],
    },
    /// A bound port learns MAC addresses again, or may be a multicast router's.
    Learns {
        /// Its name.
        port: String,
    },
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TableGone { table } => write!(f, "table {table} is gone"),
            Self::Chain { table, chain, what } => write!(f, "table {table}: chain {chain} {what}"),
            Self::Rules { table, chain } => write!(f, "table {table}: the rules of chain {chain} were changed"),
            Self::Set { table, set, what } => write!(f, "table {table}: set {set} {what}"),
            Self::Port { port } => write!(f, "port {port} is another interface than the one that was bound"),
            Self::Learns { port } => write!(f, "port {port} learns again who is behind it, or may be a multicast router's"),
            Self::Station { port, mac } => write!(f, "the bridge no longer keeps {} at port {port}", show_mac(mac)),
            Self::Element { table, set, element, what } => write!(f, "table {table}: set {set}: element {element} {what}"),
        }
    }
}

/// A rule in the kernel's own words: expressions by name with their attributes, and its comment. Counters are left out.
pub(super) type RuleForm = (Vec<(String, Vec<u8>)>, Vec<u8>);

/// The rules of a table's chains as the kernel says them.
pub(super) type Forms = BTreeMap<String, Vec<RuleForm>>;

/// A table's flags and the netlink address of its owner; `None`: there is no such table.
pub(super) fn table_state(socket: &mut NftSocket, family: Family) -> Result<Option<(u32, Option<u32>)>, SocketError> {
    let what = format!("table {family} {TABLE}");
    let found = socket.ask(family, libc::NFT_MSG_GETTABLE as u8, &[text(1, TABLE)], false, &what)?;
    let Some(attributes) = found.and_then(|found| found.into_iter().next()) else { return Ok(None) };
    // NFTA_TABLE_FLAGS, OWNER
    let flags = find(&attributes, 2).and_then(as_be32).ok_or(SocketError::Unreadable { what })?;
    Ok(Some((flags, find(&attributes, 7).and_then(as_be32))))
}

/// The ruleset's generation: it grows by one with every transaction of anybody in this namespace.
pub(super) fn generation(socket: &mut NftSocket) -> Result<u32, SocketError> {
    generation_of(socket.ask_each(vec![which_generation()])?.pop().flatten())
}

fn which_generation() -> Question {
    Question { family: Family::Inet, kind: libc::NFT_MSG_GETGEN as u8, attributes: Vec::new(), what: "the generation".to_owned() }
}

/// NFTA_GEN_ID
fn generation_of(answer: Option<Vec<u8>>) -> Result<u32, SocketError> {
    let attributes = answer.as_deref().and_then(read);
    let id = attributes.and_then(|attributes| find(&attributes, 1).and_then(as_be32));
    id.ok_or_else(|| SocketError::Unreadable { what: "the generation".to_owned() })
}

/// Reads one table whole and says how it differs from the model. The forms of its rules are returned to be remembered, or are
/// compared with the remembered ones.
pub(super) fn compare(socket: &mut NftSocket, table: &Table, known: Option<&Forms>) -> Result<(Forms, Vec<Drift>), SocketError> {
    let name = format!("{} {TABLE}", table.family);
    if table_state(socket, table.family)?.is_none() {
        return Ok((Forms::new(), vec![Drift::TableGone { table: name }]));
    }
    let mut drift = Vec::new();
    compare_chains(socket, table, &name, &mut drift)?;
    let forms = compare_rules(socket, table, &name, known, &mut drift)?;
    compare_sets(socket, table, &name, &mut drift)?;
    Ok((forms, drift))
}

fn dump(
    socket: &mut NftSocket,
    family: Family,
    kind: i32,
    attributes: &[attribute::Attribute],
    what: &str,
) -> Result<Vec<Attributes>, SocketError> {
    Ok(socket.ask(family, kind as u8, attributes, true, what)?.unwrap_or_default())
}

/// Chains of a table with their hooks and policies.
type HeldChains = BTreeMap<String, (Option<Hook>, Option<u32>)>;

fn chains(socket: &mut NftSocket, family: Family) -> Result<HeldChains, SocketError> {
    let mut found = BTreeMap::new();
    for attributes in dump(socket, family, libc::NFT_MSG_GETCHAIN, &[], "chains")? {
        // NFTA_CHAIN_TABLE, NAME, HOOK, POLICY: the dump is of all tables of the family.
        if find(&attributes, 1).map(as_text).as_deref() != Some(TABLE) {
            continue;
        }
        let hook = find(&attributes, 4).and_then(read).map(|hook| {
            let number = |kind| find(&hook, kind).and_then(as_be32).unwrap_or(u32::MAX);
            Hook { number: number(1), priority: number(2) as i32 }
        });
        let policy = find(&attributes, 5).and_then(as_be32);
        found.insert(find(&attributes, 3).map(as_text).unwrap_or_default(), (hook, policy));
    }
    Ok(found)
}

/// Sets of a table with the lengths of their keys and their flags.
fn sets(socket: &mut NftSocket, family: Family) -> Result<BTreeMap<String, Option<(u32, u32)>>, SocketError> {
    let mut found = BTreeMap::new();
    // NFTA_SET_TABLE, NAME, FLAGS, KEY_LEN
    for attributes in dump(socket, family, libc::NFT_MSG_GETSET, &[text(1, TABLE)], "sets")? {
        if find(&attributes, 1).map(as_text).as_deref() == Some(TABLE) {
            let form = find(&attributes, 5).and_then(as_be32).map(|length| (length, find(&attributes, 3).and_then(as_be32).unwrap_or(0)));
            found.insert(find(&attributes, 2).map(as_text).unwrap_or_default(), form);
        }
    }
    Ok(found)
}

/// What there is of a table that is to become `wanted`.
pub(super) fn frame(socket: &mut NftSocket, wanted: &Table) -> Result<Frame, SocketError> {
    let chains = chains(socket, wanted.family)?.into_iter().map(|(name, (hook, _))| (name, hook)).collect();
    let mut frame = Frame { chains, sets: sets(socket, wanted.family)?, elements: BTreeMap::new() };
    for (name, set) in wanted.sets.iter().filter(|(_, set)| set.dynamic.is_none()) {
        if frame.has(name, set) {
            let value = |key: &Key, data: &Data<String>| match set.elements.get(key) {
                Some(value) if data.is(*value) => *value,
                // No set of ours wants this of a verdict, and a key that is not wanted is wanted with no value.
                Some(_) | None => Value::Nothing,
            };
            let present = match held::others(socket, wanted.family, name, set)? {
                None => Present::AsWanted,
                Some(held) => Present::Other(held.into_iter().map(|(key, data)| (key.clone(), value(&key, &data))).collect()),
            };
            frame.elements.insert(name.clone(), present);
        }
    }
    Ok(frame)
}

/// Ports and their MAC addresses, as the guard's table has them.
pub(super) fn pinned(socket: &mut NftSocket) -> Result<Vec<(String, [u8; 6])>, SocketError> {
    if !sets(socket, Family::Bridge)?.contains_key(super::guard::MACS) {
        return Ok(Vec::new());
    }
    let port_and_mac = |key: Key| match key {
        Key::Exact(key) => Some((as_text(key.get(..16)?), key.get(16..22)?.try_into().ok()?)),
        Key::Range(_) | Key::Otherwise => None,
    };
    Ok(held::elements(socket, Family::Bridge, super::guard::MACS)?.into_keys().filter_map(port_and_mac).collect())
}

fn compare_chains(socket: &mut NftSocket, table: &Table, name: &str, drift: &mut Vec<Drift>) -> Result<(), SocketError> {
    let found = chains(socket, table.family)?;
    let mut add = |chain: &str, what| drift.push(Drift::Chain { table: name.to_owned(), chain: chain.to_owned(), what });
    for (chain, wanted) in &table.chains {
        let hook = wanted.hook;
        let policy = hook.map(|_| libc::NF_ACCEPT as u32);
        match found.get(chain) {
            None => add(chain, GONE),
            Some(held) if *held != (hook, policy) => add(chain, OTHER),
            Some(_) => {}
        }
    }
    for chain in found.keys().filter(|chain| !table.chains.contains_key(*chain)) {
        add(chain, FOREIGN);
    }
    Ok(())
}

fn compare_rules(
    socket: &mut NftSocket,
    table: &Table,
    name: &str,
    known: Option<&Forms>,
    drift: &mut Vec<Drift>,
) -> Result<Forms, SocketError> {
    let mut forms = Forms::new();
    // NFTA_RULE_TABLE
    for attributes in dump(socket, table.family, libc::NFT_MSG_GETRULE, &[text(1, TABLE)], "rules")? {
        if find(&attributes, 1).map(as_text).as_deref() != Some(TABLE) {
            continue;
        }
        let unreadable = || SocketError::Unreadable { what: "a rule".to_owned() };
        let chain = find(&attributes, 2).map(as_text).ok_or_else(unreadable)?;
        let mut form = Vec::new();
        for (_, expression) in read(find(&attributes, 4).unwrap_or_default()).ok_or_else(unreadable)? {
            let expression = read(&expression).ok_or_else(unreadable)?;
            let kind = find(&expression, 1).map(as_text).ok_or_else(unreadable)?;
            let data = if kind == "counter" { Vec::new() } else { find(&expression, 2).unwrap_or_default().to_vec() };
            form.push((kind, data));
        }
        let comment = find(&attributes, 7).unwrap_or_default().to_vec();
        forms.entry(chain).or_default().push((form, comment));
    }
    let none = Vec::new();
    for (chain, wanted) in &table.chains {
        let held = forms.get(chain).unwrap_or(&none);
        let same = match known {
            Some(known) => known.get(chain).unwrap_or(&none) == held,
            None => same_kinds(wanted, held),
        };
        if !same {
            drift.push(Drift::Rules { table: name.to_owned(), chain: chain.clone() });
        }
    }
    Ok(forms)
}

fn same_kinds(wanted: &Chain, held: &[RuleForm]) -> bool {
    wanted.rules.len() == held.len()
        && wanted.rules.iter().zip(held).all(|(rule, (form, _))| {
            rule.expressions.iter().map(|expression| expression.name()).eq(form.iter().map(|(kind, _)| kind.as_str()))
        })
}

fn compare_sets(socket: &mut NftSocket, table: &Table, name: &str, drift: &mut Vec<Drift>) -> Result<(), SocketError> {
    let found = sets(socket, table.family)?;
    for (set_name, set) in &table.sets {
        let mut add = |what| drift.push(Drift::Set { table: name.to_owned(), set: set_name.clone(), what });
        match found.get(set_name) {
            None => add(GONE),
            Some(form) if form.map(|(length, _)| length) != Some(set.key_length() as u32) => add(OTHER),
            Some(_) if set.dynamic.is_none() => compare_elements(socket, table.family, set_name, set, name, drift)?,
            Some(_) => {}
        }
    }
    for set in found.keys().filter(|set| !table.sets.contains_key(*set)) {
        drift.push(Drift::Set { table: name.to_owned(), set: set.clone(), what: FOREIGN });
    }
    Ok(())
}

fn compare_elements(
    socket: &mut NftSocket,
    family: Family,
    set_name: &str,
    set: &Set,
    table: &str,
    drift: &mut Vec<Drift>,
) -> Result<(), SocketError> {
    let Some(held) = held::others_in_the_end(socket, family, set_name, set)? else { return Ok(()) };
    drift.extend(differences(set, &held).map(|(key, what)| Drift::Element {
        table: table.to_owned(),
        set: set_name.to_owned(),
        element: show(&set.key, key),
        what,
    }));
    Ok(())
}

/// Elements asked for at once: the answers to so many wait in the socket's buffer.
const ASKED_AT_ONCE: usize = 1024;

/// Asks for the elements that edits added or removed, and for nothing else. Also says the generation after them.
pub(super) fn compare_edits(socket: &mut NftSocket, held: &Tables, edits: &Edits) -> Result<(u32, Vec<Drift>), SocketError> {
    let mut asked = Vec::new();
    for ((family, name), edit) in &edits.0 {
        let Some(set) = held.set(*family, name) else { continue };
        asked.extend(edit.added.iter().map(|(key, value)| (*family, name, set, key, Some(*value))));
        // In an interval set another range may answer for the one that is gone.
        let gone = edit.removed.keys().filter(|key| !set.intervals && !edit.added.contains_key(*key));
        asked.extend(gone.map(|key| (*family, name, set, key, None)));
    }
    let (mut drift, mut after) = (Vec::new(), None);
    for asked in asked.chunks(ASKED_AT_ONCE) {
        let question = |(family, name, _, key, _): &(Family, &String, &Set, &Key, Option<Value>)| {
            let mut one = Vec::new();
            element(&mut one, key, None);
            Question {
                family: *family,
                kind: libc::NFT_MSG_GETSETELEM as u8,
                attributes: element_list(name, one),
                what: format!("set {name}"),
            }
        };
        // In one go: each call of the kernel is a part of what one rule more takes.
        let mut answers = socket.ask_each(asked.iter().map(question).chain([which_generation()]).collect())?;
        after = Some(generation_of(answers.pop().flatten())?);
        for ((family, name, set, key, wanted), answer) in asked.iter().zip(answers) {
            let found = match answer {
                Some(body) => held::carried(&body).map_err(|_| SocketError::Unreadable { what: format!("set {name}") })?,
                None => None,
            };
            let what = match (found, wanted) {
                (None, Some(_)) => GONE,
                (Some(data), Some(value)) if !data.is(*value) => OTHER,
                (Some(_), None) => "is still there",
                (Some(_), Some(_)) | (None, None) => continue,
            };
            let table = format!("{family} {TABLE}");
            drift.push(Drift::Element { table, set: (*name).clone(), element: show(&set.key, key), what });
        }
    }
    let after = after.map_or_else(|| generation(socket), Ok)?;
    Ok((after, drift))
}

/// Any bytes as an answer of the kernel, for the fuzz targets: as each dump reads its own.
#[cfg(any(fuzzing, test))]
pub(crate) fn read_any(datagram: &[u8]) {
    let Ok(messages) = super::socket::answers(datagram, "anything") else { return };
    for message in messages {
        let netlink_packet_core::NetlinkPayload::InnerMessage(super::socket::Raw(payload)) = message.payload else { continue };
        let body = payload.get(4..).unwrap_or_default();
        let _ = held::carried(body);
        let Some(attributes) = read(body) else { continue };
        super::count::read_any(&attributes);
        for nested in attributes.iter().filter_map(|(_, value)| read(value)) {
            let _ = (find(&nested, 1).map(as_text), find(&nested, 2).and_then(as_be32));
        }
    }
}
