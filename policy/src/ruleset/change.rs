//! What makes one ruleset out of another: what came and what went, for whoever has to carry it out; whether it takes something away,
//! so that living connections have to be judged again; and which addresses have passed to other hands.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Door, Pair, Pin, Remote, Ruleset, Spot, Watch};
use crate::evaluate::Standing;

/// What is said of one thing, before and after; never the same on both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Turn<V> {
    /// `None`: it is new.
    pub before: Option<V>,
    /// `None`: it is gone.
    pub after: Option<V>,
}

/// What came to a set and what left it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", bound(deserialize = "T: Ord + Deserialize<'de>"))]
pub struct Moves<T> {
    /// Not there before.
    pub new: BTreeSet<T>,
    /// Not there after.
    pub gone: BTreeSet<T>,
}

impl<T> Default for Moves<T> {
    fn default() -> Self {
        Self { new: BTreeSet::new(), gone: BTreeSet::new() }
    }
}

impl<T: Ord + Clone> Moves<T> {
    fn between(old: &BTreeSet<T>, new: &BTreeSet<T>) -> Self {
        Self { new: new.difference(old).cloned().collect(), gone: old.difference(new).cloned().collect() }
    }

    fn apply(&self, to: &mut BTreeSet<T>) {
        for one in &self.gone {
            to.remove(one);
        }
        to.extend(self.new.iter().cloned());
    }

    /// Makes what was before out of what is after.
    pub fn undo(&self, from: &mut BTreeSet<T>) {
        for one in &self.new {
            from.remove(one);
        }
        from.extend(self.gone.iter().cloned());
    }

    /// Nothing moved.
    pub fn is_empty(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty()
    }
}

type Turns<K, V> = BTreeMap<K, Turn<V>>;

fn turns<K: Ord + Clone, V: PartialEq + Clone>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Turns<K, V> {
    let turned = new.iter().filter(|(key, value)| old.get(*key) != Some(*value));
    let turned = turned.map(|(key, value)| (key.clone(), Turn { before: old.get(key).cloned(), after: Some(value.clone()) }));
    let gone = old.iter().filter(|(key, _)| !new.contains_key(*key));
    turned.chain(gone.map(|(key, value)| (key.clone(), Turn { before: Some(value.clone()), after: None }))).collect()
}

fn turn<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>, turns: &Turns<K, V>) {
    for (key, turn) in turns {
        match &turn.after {
            Some(value) => drop(map.insert(key.clone(), value.clone())),
            None => drop(map.remove(key)),
        }
    }
}

/// The difference of two rulesets, field by field.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// Of [`Ruleset::bridges`].
    pub bridges: Moves<String>,
    /// Of [`Ruleset::watched`].
    pub watched: BTreeMap<String, Turn<Watch>>,
    /// Of [`Ruleset::pins`].
    pub pins: BTreeMap<String, Turn<Pin>>,
    /// Of [`Ruleset::sides`].
    pub sides: BTreeMap<Spot, Turn<Standing>>,
    /// Of [`Ruleset::doors`].
    pub doors: BTreeMap<Door, Turn<Standing>>,
    /// Of [`Ruleset::pairs`].
    pub pairs: Moves<Pair>,
    /// Of [`Ruleset::ajar`].
    pub ajar: Moves<Door>,
    /// Of [`Ruleset::node`].
    pub node: Moves<IpAddr>,
    /// Of [`Ruleset::subnets`].
    pub subnets: Moves<IpNet>,
    /// Of [`Ruleset::known`].
    pub known: Moves<String>,
    /// Of [`Ruleset::bystanders`].
    pub bystanders: Moves<String>,
    /// Of [`Ruleset::inward`].
    pub inward: BTreeMap<Door, Turn<Standing>>,
}

impl Change {
    /// By looking at all of both.
    pub fn between(old: &Ruleset, new: &Ruleset) -> Self {
        Self { pairs: Moves::between(&old.pairs, &new.pairs), ..Self::of_frames(old, new) }
    }

    /// Of everything but the pairs.
    pub(crate) fn of_frames(old: &Ruleset, new: &Ruleset) -> Self {
        Self {
            bridges: Moves::between(&old.bridges, &new.bridges),
            watched: turns(&old.watched, &new.watched),
            pins: turns(&old.pins, &new.pins),
            sides: turns(&old.sides, &new.sides),
            doors: turns(&old.doors, &new.doors),
            pairs: Moves::default(),
            ajar: Moves::between(&old.ajar, &new.ajar),
            node: Moves::between(&old.node, &new.node),
            subnets: Moves::between(&old.subnets, &new.subnets),
            known: Moves::between(&old.known, &new.known),
            bystanders: Moves::between(&old.bystanders, &new.bystanders),
            inward: turns(&old.inward, &new.inward),
        }
    }

    /// Of [`Ruleset::inward`] alone.
    pub(crate) fn inward(old: &Ruleset, new: &BTreeMap<Door, Standing>) -> BTreeMap<Door, Turn<Standing>> {
        turns(&old.inward, new)
    }

    /// Nothing is different.
    pub fn is_empty(&self) -> bool {
        let Self { bridges, watched, pins, sides, doors, pairs, ajar, node, subnets, known, bystanders, inward } = self;
        bridges.is_empty()
            && watched.is_empty()
            && pins.is_empty()
            && sides.is_empty()
            && doors.is_empty()
            && pairs.is_empty()
            && ajar.is_empty()
            && node.is_empty()
            && subnets.is_empty()
            && known.is_empty()
            && bystanders.is_empty()
            && inward.is_empty()
    }

    /// Leaves these ports out, which are to be tied later: what was tied there goes. Returns the change that ties them.
    pub fn hold_back(&mut self, pins: &BTreeMap<String, Pin>) -> Self {
        let mut later = Self::default();
        for (port, pin) in pins {
            let before = match self.pins.remove(port) {
                Some(turn) => turn.before,
                None => Some(pin.clone()),
            };
            if before.is_some() {
                self.pins.insert(port.clone(), Turn { before, after: None });
            }
            later.pins.insert(port.clone(), Turn { before: None, after: Some(pin.clone()) });
        }
        later
    }

    /// Whether something that was let begin before is denied after it, between ends that are both there still: a bridge is guarded
    /// that wasn't (a container in Enforce joined it, and was on it a moment before it was bound), a side is stricter, an allow is
    /// gone (its time is over, or its container goes by another name now). `after` is the ruleset it leads to.
    pub fn narrows(&self, after: &Ruleset) -> bool {
        let guarded = |watch: &Option<Watch>| watch.is_some_and(|watch| watch.guarded);
        let newly_guarded = self.watched.values().any(|turn| guarded(&turn.after) && !guarded(&turn.before));
        let stricter =
            || self.sides.values().any(|turn| turn.before.zip(turn.after).is_some_and(|(old, new)| severity(new) > severity(old)));
        let stays = |spot: &Spot| spot.bridge.is_none() || after.sides.contains_key(spot);
        let gone = || {
            self.pairs.gone.iter().any(|pair| {
                stays(&pair.local)
                    && match &pair.remote {
                        Remote::Spot(spot) => stays(spot),
                        Remote::Outside(_) => true,
                    }
            })
        };
        newly_guarded || stricter() || gone()
    }

    /// Addresses that were tied to a port which doesn't have them any more, on bridges that are still guarded. The engine makes a port
    /// for each start of a container, so the same port is the same container.
    pub fn given_back(&self, after: &Ruleset) -> BTreeSet<IpAddr> {
        let guarded = |pin: &&Pin| after.watched.get(&pin.bridge).is_some_and(|watch| watch.guarded);
        let held = |side: fn(&Turn<Pin>) -> Option<&Pin>| -> BTreeSet<(IpAddr, &String)> {
            let pins = self.pins.iter().filter_map(|(port, turn)| Some((port, side(turn).filter(guarded)?)));
            pins.flat_map(|(port, pin)| pin.addresses.iter().map(move |&address| (address, port))).collect()
        };
        let (before, after) = (held(|turn| turn.before.as_ref()), held(|turn| turn.after.as_ref()));
        before.difference(&after).map(|(address, _)| *address).collect()
    }
}

/// The stricter, the higher.
fn severity(standing: Standing) -> u8 {
    match standing {
        Standing::Open => 0,
        Standing::Audit => 1,
        Standing::Enforce(_) => 2,
        Standing::Quarantined => 3,
    }
}

impl Ruleset {
    /// Makes it so.
    pub fn change(&mut self, change: &Change) {
        let Change { bridges, watched, pins, sides, doors, pairs, ajar, node, subnets, known, bystanders, inward } = change;
        bridges.apply(&mut self.bridges);
        turn(&mut self.watched, watched);
        turn(&mut self.pins, pins);
        turn(&mut self.sides, sides);
        turn(&mut self.doors, doors);
        pairs.apply(&mut self.pairs);
        ajar.apply(&mut self.ajar);
        node.apply(&mut self.node);
        subnets.apply(&mut self.subnets);
        known.apply(&mut self.known);
        bystanders.apply(&mut self.bystanders);
        turn(&mut self.inward, inward);
    }

    /// Takes out the ports that one of these addresses is tied to, so that nothing passes there, and gives them back.
    pub fn unpin(&mut self, addresses: &BTreeSet<IpAddr>) -> BTreeMap<String, Pin> {
        if addresses.is_empty() {
            return BTreeMap::new();
        }
        self.pins.extract_if(.., |_, pin| !pin.addresses.is_disjoint(addresses)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_set::Direction;
    use crate::ruleset::Pair;
    use crate::segment::Refusal;
    use crate::service::Service;

    fn spot(last: u8) -> Spot {
        Spot { bridge: Some("br".into()), address: [10, 0, 0, last].into() }
    }

    fn pair(local: u8, remote: u8) -> Pair {
        Pair { direction: Direction::Egress, local: spot(local), remote: Remote::Spot(spot(remote)), ports: Service::tcp(80).into() }
    }

    /// 10.0.0.2 in Enforce may reach 10.0.0.3, which is in Learn.
    fn two() -> Ruleset {
        let pin = |last: u8| Pin { bridge: "br".into(), mac: [last; 6], addresses: [spot(last).address].into() };
        Ruleset {
            watched: [("br".to_owned(), Watch { guarded: true, ..Watch::default() })].into(),
            sides: [(spot(2), Standing::Enforce(Refusal::Drop)), (spot(3), Standing::Open)].into(),
            pairs: [pair(2, 3)].into(),
            pins: [("v2".to_owned(), pin(2)), ("v3".to_owned(), pin(3))].into(),
            ..Ruleset::default()
        }
    }

    fn narrows(earlier: &Ruleset, later: &Ruleset) -> bool {
        Change::between(earlier, later).narrows(later)
    }

    #[test]
    fn what_only_comes_or_goes_narrows_nothing() {
        let mut more = two();
        more.sides.insert(spot(4), Standing::Enforce(Refusal::Drop));
        more.pairs.insert(pair(4, 3));
        assert!(!narrows(&two(), &two()));
        assert!(!narrows(&two(), &more), "a newcomer");
        assert!(!narrows(&more, &two()), "somebody who left, with what was allowed to them");
    }

    #[test]
    fn a_guarded_bridge_a_stricter_side_and_a_lost_allow_narrow() {
        let mut open = two();
        open.watched.insert("br".into(), Watch::default());
        assert!(narrows(&open, &two()));
        assert!(narrows(&Ruleset::default(), &two()));
        assert!(!narrows(&two(), &open));
        let mut strict = two();
        strict.sides.insert(spot(3), Standing::Quarantined);
        assert!(narrows(&two(), &strict) && !narrows(&strict, &two()));
        let mut lost = two();
        lost.pairs.clear();
        assert!(narrows(&two(), &lost) && !narrows(&lost, &two()));
    }

    #[test]
    fn an_address_at_another_port_was_given_back_and_is_held_back_there() {
        let mut later = two();
        let pin = later.pins.remove("v3").unwrap();
        later.pins.insert("v9".into(), pin);
        let given_back = |later: &Ruleset| Change::between(&two(), later).given_back(later);
        let given = given_back(&later);
        assert_eq!(given, [spot(3).address].into());
        let mut without = later.clone();
        let held_back = without.unpin(&given);
        assert_eq!(held_back.keys().collect::<Vec<_>>(), ["v9"]);
        assert_eq!(without.pins.keys().collect::<Vec<_>>(), ["v2"]);
        // One that stays is held back just the same.
        for earlier in [two(), later.clone()] {
            let mut at_first = Change::between(&earlier, &later);
            let then = at_first.hold_back(&held_back);
            assert_eq!(at_first, Change::between(&earlier, &without));
            assert_eq!(then, Change::between(&without, &later));
        }
        assert!(given_back(&two()).is_empty());
        later.watched.clear();
        assert!(given_back(&later).is_empty(), "no longer guarded: nothing is to be ended");
    }
}
