//! What a change of a ruleset is in the kernel: the elements that come and go, and no others.
//!
//! # Why
//! A ruleset of 100,000 pairs takes tenths of a second to compare and to read back, and mostly one rule or one container moves. The words are
//! those of the whole ([`entries`], [`elements::place`]): what a thing was is taken out, what it is goes in. Where several things are one
//! element (who talks to whom) the ruleset says whether one of them is left, and ranges are made anew for their own local end.

use std::collections::{BTreeMap, BTreeSet};

use policy::ruleset::{Change, Pair, Remote, Ruleset, Spot};

use super::elements::{self, Place, SetName};
use super::entries::{self, Entry};
use super::key::Key;
use super::links::Links;
use super::model::{Family, Set, Value, differing};
use super::socket::Message;
use super::{Tables, transaction};

/// What an element is to be; `None`: not there.
type Wanted = BTreeMap<Key, Option<Value>>;

/// What one set gains and loses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edit {
    /// Keys that go, with what they held; those that are to hold something else too.
    pub(super) removed: BTreeMap<Key, Value>,
    pub(super) added: BTreeMap<Key, Value>,
}

/// The edits of a change, by table and set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edits(pub(super) BTreeMap<(Family, String), Edit>);

#[derive(Default)]
struct Draft(BTreeMap<(Family, String), Wanted>);

impl Draft {
    /// What one thing was may be what another one is from now on (a port under another name): what is to be there stays, whatever goes.
    fn put(&mut self, family: Family, set: &str, key: Key, value: Option<Value>) {
        // Asked by every element: no name is made that is there already.
        let name = (family, set.to_owned());
        let wanted = if let Some(wanted) = self.0.get_mut(&name) { wanted } else { self.0.entry(name).or_default() };
        if value.is_some() {
            wanted.insert(key, value);
        } else {
            wanted.entry(key).or_insert(None);
        }
    }

    fn gone(&mut self, entries: impl IntoIterator<Item = Entry>) {
        entries.into_iter().for_each(|entry| self.put(entry.family, entry.set, entry.key, None));
    }

    fn there(&mut self, entries: impl IntoIterator<Item = Entry>) {
        entries.into_iter().for_each(|entry| self.put(entry.family, entry.set, entry.key, Some(entry.value)));
    }
}

/// What `change`, which led to `after`, is in tables that hold what was before. `None`: it needs a set that is not there, or a rule.
pub(super) fn edits(held: &Tables, change: &Change, after: &Ruleset, links: &Links) -> Option<Edits> {
    let mut draft = Draft::default();
    let Change { bridges, watched, pins, sides, doors, pairs, ajar, node, subnets, known, bystanders, inward } = change;
    draft.gone(bridges.gone.iter().map(|name| entries::bridge(name)));
    draft.there(bridges.new.iter().map(|name| entries::bridge(name)));
    draft.gone(node.gone.iter().map(|&address| entries::node(address)));
    draft.there(node.new.iter().map(|&address| entries::node(address)));
    for (name, turn) in watched {
        draft.gone(turn.before.into_iter().flat_map(|watch| entries::watch(name, watch, links)));
        draft.there(turn.after.into_iter().flat_map(|watch| entries::watch(name, watch, links)));
    }
    for (spot, turn) in sides {
        draft.gone(turn.before.into_iter().flat_map(|standing| entries::side(spot, standing, links)));
        draft.there(turn.after.into_iter().flat_map(|standing| entries::side(spot, standing, links)));
    }
    for (door, turn) in doors {
        draft.gone(turn.before.and_then(|standing| entries::door(door, standing)));
        draft.there(turn.after.and_then(|standing| entries::door(door, standing)));
    }
    for (door, turn) in inward {
        draft.gone(turn.before.map(|standing| entries::inward(door, standing)));
        draft.there(turn.after.map(|standing| entries::inward(door, standing)));
    }
    for (port, turn) in pins {
        draft.gone(turn.before.iter().flat_map(|pin| entries::pin(port, pin, links)));
        draft.there(turn.after.iter().flat_map(|pin| entries::pin(port, pin, links)));
    }
    draft.gone(known.gone.iter().map(|name| entries::known(name)));
    draft.there(known.new.iter().map(|name| entries::known(name)));
    draft.gone(bystanders.gone.iter().map(|port| entries::bystander(port)));
    draft.there(bystanders.new.iter().map(|port| entries::bystander(port)));
    if !subnets.is_empty() {
        let mut before = after.subnets.clone();
        subnets.undo(&mut before);
        draft.gone(entries::subnets(&before));
        draft.there(entries::subnets(&after.subnets));
    }
    // Several doors of one port are one element.
    draft.gone(ajar.gone.iter().map(entries::ajar));
    if !ajar.is_empty() {
        draft.there(after.ajar.iter().map(entries::ajar));
    }
    draft.pairs(held, (&pairs.gone, &pairs.new), after, links)?;
    draft.against(held)
}

impl Draft {
    fn pairs(&mut self, held: &Tables, (gone, new): (&BTreeSet<Pair>, &BTreeSet<Pair>), after: &Ruleset, links: &Links) -> Option<()> {
        let mut ranges: BTreeSet<(SetName, &Spot)> = BTreeSet::new();
        let all = gone.iter().map(|pair| (pair, None)).chain(new.iter().map(|pair| (pair, Some(Value::Nothing))));
        for (pair, value) in all {
            match elements::place(pair, links) {
                Some(Place::Exact(name, key)) => {
                    let name = name.to_string();
                    held.set(Family::Inet, &name)?;
                    self.put(Family::Inet, &name, key, value);
                }
                Some(Place::Range(name, _)) => drop(ranges.insert((name, &pair.local))),
                None => {}
            }
            let Some(talk) = entries::talk(&pair.local, &pair.remote, links) else { continue };
            let still = match &pair.remote {
                Remote::Spot(remote) => after.talks(&pair.local, remote),
                Remote::Outside(_) => after.talks_outside(&pair.local),
            };
            self.put(talk.family, talk.set, talk.key, still.then_some(talk.value));
        }
        for (name, local) in ranges {
            let set = held.set(Family::Inet, &name.to_string())?;
            let prefix = elements::spot_key(local, links)?;
            for key in of_local(set, &prefix) {
                self.put(Family::Inet, &name.to_string(), key.clone(), None);
            }
            for key in elements::ranges_of(after, name, local, links) {
                self.put(Family::Inet, &name.to_string(), key, Some(Value::Nothing));
            }
        }
        Some(())
    }

    /// What is not so yet.
    fn against(self, held: &Tables) -> Option<Edits> {
        let mut edits = Edits::default();
        for ((family, name), wanted) in self.0 {
            let set = held.set(family, &name)?;
            let mut edit = Edit::default();
            for (key, value) in wanted {
                let old = set.elements.get(&key).copied();
                if old == value {
                    continue;
                }
                if let Some(old) = old {
                    edit.removed.insert(key.clone(), old);
                }
                if let Some(value) = value {
                    edit.added.insert(key, value);
                }
            }
            if edit != Edit::default() {
                edits.0.insert((family, name), edit);
            }
        }
        Some(edits)
    }
}

/// The ranges of one local end, which is the first part of their keys.
fn of_local<'a>(set: &'a Set, local: &'a [u8]) -> impl Iterator<Item = &'a Key> {
    let from = Key::range(local, &[]);
    let keys = set.elements.range(from..).map(|(key, _)| key);
    keys.take_while(move |key| matches!(key, Key::Range(ends) if ends.0.starts_with(local)))
}

impl Edits {
    /// By looking at all of both.
    pub(super) fn between(old: &Tables, new: &Tables) -> Self {
        let mut edits = Self::default();
        for (name, table, set) in new.all().into_iter().flat_map(|table| table.sets.iter().map(move |(name, set)| (name, table, set))) {
            let empty = BTreeMap::new();
            let before = old.set(table.family, name).map_or(&empty, |set| &set.elements);
            let (gone, come) = differing(before, &set.elements);
            let owned = |elements: Vec<(&Key, &Value)>| elements.into_iter().map(|(key, value)| (key.clone(), *value)).collect();
            let edit = Edit { removed: owned(gone), added: owned(come) };
            if edit != Edit::default() {
                edits.0.insert((table.family, name.clone()), edit);
            }
        }
        edits
    }

    /// How many elements come and go.
    pub(super) fn len(&self) -> usize {
        self.0.values().map(|edit| edit.removed.len() + edit.added.len()).sum()
    }

    /// As one transaction.
    pub(super) fn messages(&self, held: &Tables) -> Vec<Message> {
        let mut out = Vec::new();
        for ((family, name), edit) in &self.0 {
            let table = held.of(*family);
            out.extend(transaction::elements(table, name, &edit.removed, &edit.added));
        }
        out
    }

    /// Makes it so in what is known to be held.
    pub(super) fn carry_out(self, held: &mut Tables) {
        for ((family, name), edit) in self.0 {
            let Some(set) = held.set_mut(family, &name) else { continue };
            for key in edit.removed.keys() {
                set.elements.remove(key);
            }
            set.elements.extend(edit.added);
        }
    }
}

/// Bridges that a change names.
pub(super) fn named_bridges(change: &Change) -> BTreeSet<&String> {
    let of_sides = change.sides.keys().filter_map(|spot| spot.bridge.as_ref());
    let of_pairs = change.pairs.new.iter().chain(&change.pairs.gone).flat_map(elements::bridges_of);
    of_sides.chain(change.watched.keys()).chain(of_pairs).collect()
}
