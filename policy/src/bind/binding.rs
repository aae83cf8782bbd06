//! A ruleset that is kept current: what moved is bound again, the rest stays.
//!
//! # Why
//! [`bind_after`](super::bind_after) looks at every rule of every container, and a host with 100,000 pairs would do so for each container
//! that starts and each rule that ends. What it makes is a frame (bridges, sides, pins, doors: as many as there are containers) and
//! pairs. A pair comes from one rule of one container, so only what moved is asked for its pairs, as it was and as it is: containers,
//! rules that name a workload whose containers moved, rules that came, went or ended. Several rules may give the same pair, so they are
//! counted. What comes out is what `bind_after` says; tests/bind.rs holds that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use super::{
    Doorways, Ground, Members, Standings, carried_pairs, doorways, frame, guarded_by_policy, has_sides, inward, members, rule_pairs, rules,
    same_places, spots, standings,
};
use crate::inventory::{Container, Inventory, Published};
use crate::policy_set::{Direction, Peer, PolicySet, Rule};
use crate::ruleset::{Change, Door, Pair, Pin, Ruleset, Spot};
use crate::service::{Ports, Service};
use crate::workload::Workload;

/// What was bound, and what came of it.
#[derive(Clone, Debug, Default)]
pub struct Binding {
    ruleset: Ruleset,
    /// How often beyond the first a pair is given.
    again: HashMap<Pair, usize>,
    /// Guarded by the policy itself, and not because it was before.
    guarded: BTreeSet<String>,
    index: Index,
    /// `None`: the ruleset comes from elsewhere.
    made_from: Option<Bound>,
}

/// What a ruleset is made from.
#[derive(Clone, Debug)]
struct Bound {
    set: Arc<PolicySet>,
    inventory: Arc<Inventory>,
    now: Timestamp,
    members: Arc<Members>,
    doorways: Arc<Doorways>,
    standings: Arc<Standings>,
}

/// Where to look for what a movement reaches.
#[derive(Clone, Debug, Default)]
struct Index {
    /// Workloads whose policies name a workload.
    named_by: BTreeMap<Workload, BTreeSet<Workload>>,
    /// What the workloads may reach on the node itself.
    of_node: BTreeMap<Workload, Vec<Ports>>,
    /// Workloads with a rule that ends.
    timed: BTreeSet<Workload>,
}

impl Index {
    /// The policy of a workload is another one.
    fn update(&mut self, workload: &Workload, old: Option<&PolicySet>, new: &PolicySet) {
        let named = |set: &PolicySet| -> BTreeSet<Workload> { every_rule(set, workload).filter_map(|rule| peer(rule).cloned()).collect() };
        let before = old.map(named).unwrap_or_default();
        let after = named(new);
        for peer in before.difference(&after) {
            if let Some(owners) = self.named_by.get_mut(peer) {
                owners.remove(workload);
                if owners.is_empty() {
                    self.named_by.remove(peer);
                }
            }
        }
        for peer in after.difference(&before) {
            self.named_by.entry(peer.clone()).or_default().insert(workload.clone());
        }
        let of_node: Vec<Ports> = to_node(new, workload).map(|rule| rule.ports).collect();
        match of_node.is_empty() {
            true => self.of_node.remove(workload),
            false => self.of_node.insert(workload.clone(), of_node),
        };
        match every_rule(new, workload).any(|rule| rule.until.is_some()) {
            true => self.timed.insert(workload.clone()),
            false => self.timed.remove(workload),
        };
    }
}

/// Whether the same is published at the node: the rest of what its doors depend on is asked for elsewhere.
fn same_published(a: &Inventory, b: &Inventory) -> bool {
    fn published(inventory: &Inventory) -> impl Iterator<Item = (&String, &Vec<Published>)> {
        let all = inventory.containers.iter().map(|(id, container)| (id, &container.published));
        all.filter(|(_, published)| !published.is_empty())
    }
    published(a).eq(published(b))
}

fn every_rule<'a>(set: &'a PolicySet, workload: &Workload) -> impl Iterator<Item = &'a Rule> {
    set.policies.get(workload).into_iter().flat_map(|policy| policy.ingress.iter().chain(&policy.egress))
}

fn to_node<'a>(set: &'a PolicySet, workload: &Workload) -> impl Iterator<Item = &'a Rule> {
    set.policies.get(workload).into_iter().flat_map(|policy| &policy.egress).filter(|rule| rule.peer == Peer::Host)
}

fn peer(rule: &Rule) -> Option<&Workload> {
    match &rule.peer {
        Peer::Workload(workload) => Some(workload),
        Peer::Host | Peer::Outside(_) => None,
    }
}

/// A rule with the side it is of.
type SideRule<'a> = (Direction, &'a Rule);
type Rules<'a> = BTreeSet<SideRule<'a>>;

/// What is to be asked again.
#[derive(Default)]
struct Moved<'a> {
    /// Containers that may have other pairs altogether.
    containers: BTreeSet<&'a str>,
    /// Workloads whose containers are others, or elsewhere: the rules that name them lead elsewhere.
    peers: BTreeSet<&'a Workload>,
    /// Ports of the node that are a door now and were none, or the other way round.
    doors: BTreeSet<Service>,
    /// Workloads whose rules are others: those that went, those that came.
    rules: BTreeMap<&'a Workload, [Rules<'a>; 2]>,
}

/// Index into [`Moved::rules`].
#[derive(Clone, Copy)]
enum Time {
    Before = 0,
    After = 1,
}

impl Bound {
    fn ground(&self) -> Ground<'_> {
        Ground { inventory: &self.inventory, members: &self.members, doorways: &self.doorways }
    }

    /// The container, if its rules become pairs.
    fn with_sides(&self, id: &str) -> Option<&Container> {
        self.standings.get(id).filter(|standing| has_sides(**standing))?;
        self.inventory.containers.get(id)
    }

    /// Every pair that a container's moved rules give, as often as they give it.
    fn pairs(&self, id: &str, moved: &Moved<'_>, time: Time, named: bool, mut emit: impl FnMut(Pair)) {
        let Some(container) = self.with_sides(id) else { return };
        let locals: Vec<Spot> = spots(container).collect();
        let ground = self.ground();
        let all = moved.containers.contains(id);
        if all {
            carried_pairs(ground, container, &locals, &mut emit);
        }
        let others = moved.rules.get(&container.workload).map(|rules| &rules[time as usize]);
        if !all && !named {
            // Mostly one rule of a hundred.
            for &(direction, rule) in others.into_iter().flatten() {
                rule_pairs(ground, container, &locals, direction, rule, &mut emit);
            }
            return;
        }
        for (direction, rule) in rules(&self.set, &container.workload, self.now) {
            let leads_elsewhere = || peer(rule).is_some_and(|workload| moved.peers.contains(workload));
            let has_other_doors = || direction == Direction::Egress && rule.peer == Peer::Host && moved.moves_a_door_of(&rule.ports);
            if all || leads_elsewhere() || has_other_doors() || others.is_some_and(|others| others.contains(&(direction, rule))) {
                rule_pairs(ground, container, &locals, direction, rule, &mut emit);
            }
        }
    }
}

impl<'a> Moved<'a> {
    fn between(old: &'a Bound, new: &'a Bound, index: &mut Index) -> Self {
        let mut moved = Self::default();
        if !Arc::ptr_eq(&old.inventory, &new.inventory) || !Arc::ptr_eq(&old.standings, &new.standings) {
            moved.containers(old, new);
        }
        if !Arc::ptr_eq(&old.doorways, &new.doorways) {
            let service = |door: &Door| Service { protocol: door.protocol, port: door.port };
            moved.doors = old.doorways.symmetric_difference(&new.doorways).map(service).collect();
        }
        moved.policies(old, new, index);
        moved
    }

    fn moves_a_door_of(&self, ports: &Ports) -> bool {
        self.doors.iter().any(|door| ports.holds(*door))
    }

    fn containers(&mut self, old: &'a Bound, new: &'a Bound) {
        let ids: BTreeSet<&str> = old.inventory.containers.keys().chain(new.inventory.containers.keys()).map(String::as_str).collect();
        for id in ids {
            let (before, after) = (old.inventory.containers.get(id), new.inventory.containers.get(id));
            let same = before.zip(after).is_some_and(|(before, after)| same_places(before, after));
            let sides = |bound: &Bound| bound.with_sides(id).is_some();
            if !same || sides(old) != sides(new) {
                self.containers.insert(id);
            }
            if !same {
                self.peers.extend(before.into_iter().chain(after).map(|container| &container.workload));
            }
        }
    }

    fn policies(&mut self, old: &'a Bound, new: &'a Bound, index: &mut Index) {
        let (before, after) = (&old.set.policies, &new.set.policies);
        let mut changed = BTreeSet::new();
        if !Arc::ptr_eq(&old.set, &new.set) {
            changed.extend(after.iter().filter(|(workload, policy)| before.get(workload) != Some(*policy)).map(|(workload, _)| workload));
            changed.extend(before.keys().filter(|workload| !after.contains_key(workload)));
        }
        for workload in &changed {
            index.update(workload, Some(&old.set), &new.set);
        }
        // A rule may have ended, or begin again where the clock was put back.
        for workload in index.timed.iter().filter_map(|workload| Some(after.get_key_value(workload)?.0)) {
            let flips = |rule: &Rule| rule.in_force(old.now) != rule.in_force(new.now);
            if !changed.contains(workload) && every_rule(&new.set, workload).any(flips) {
                let [gone, come] = [(&old.set, old.now, new.now), (&new.set, new.now, old.now)]
                    .map(|(set, then, otherwise)| rules(set, workload, then).filter(|(_, rule)| !rule.in_force(otherwise)).collect());
                self.rules.insert(workload, [gone, come]);
            }
        }
        for workload in changed {
            let of = |bound: &'a Bound| -> Rules<'a> { rules(&bound.set, workload, bound.now).collect() };
            let (before, after) = (of(old), of(new));
            let (gone, come) = (before.difference(&after).copied().collect(), after.difference(&before).copied().collect());
            self.rules.insert(workload, [gone, come]);
        }
    }
}

impl Binding {
    /// Goes on from a ruleset that was bound elsewhere: the first change is found by comparing all of it.
    pub fn of(ruleset: Ruleset) -> Self {
        Self { ruleset, ..Self::default() }
    }

    /// What the kernel has to hold.
    pub fn ruleset(&self) -> &Ruleset {
        &self.ruleset
    }

    /// Takes out the ports that one of these addresses is tied to, until [`Binding::pin`] puts them back, which is before the next
    /// [`Binding::bind`].
    pub fn unpin(&mut self, addresses: &BTreeSet<IpAddr>) -> BTreeMap<String, Pin> {
        self.ruleset.unpin(addresses)
    }

    /// Puts back what [`Binding::unpin`] took out.
    pub fn pin(&mut self, pins: BTreeMap<String, Pin>) {
        self.ruleset.pins.extend(pins);
    }

    /// Makes it what `bind_after` makes of the same. Returns in what that differs from before.
    pub fn bind(&mut self, set: &Arc<PolicySet>, inventory: &Arc<Inventory>, guarded: &BTreeSet<String>, now: Timestamp) -> Change {
        let Some(old) = self.made_from.take() else { return self.whole(set, inventory, guarded, now) };
        let same_ground = Arc::ptr_eq(inventory, &old.inventory) || **inventory == *old.inventory;
        if !same_ground && (inventory.host != old.inventory.host || inventory.userland_proxy != old.inventory.userland_proxy) {
            // Each of these is in every rule's pairs.
            return self.whole(set, inventory, guarded, now);
        }
        let same_segments = Arc::ptr_eq(set, &old.set) || (set.segments == old.set.segments && set.quarantines == old.set.quarantines);
        let same_standings = same_ground && same_segments;
        let new = Bound {
            set: set.clone(),
            inventory: if same_ground { old.inventory.clone() } else { inventory.clone() },
            now,
            members: if same_ground { old.members.clone() } else { Arc::new(members(inventory)) },
            doorways: if same_ground || same_published(inventory, &old.inventory) {
                old.doorways.clone()
            } else {
                Arc::new(doorways(inventory))
            },
            standings: if same_standings { old.standings.clone() } else { Arc::new(standings(set, inventory, now)) },
        };
        if !same_standings {
            self.guarded = guarded_by_policy(set, inventory, &new.standings);
        }
        let mut change = self.frame(&new, guarded, same_standings);
        self.pairs(&old, &new, &mut change, same_standings);
        self.made_from = Some(new);
        change
    }

    fn whole(&mut self, set: &Arc<PolicySet>, inventory: &Arc<Inventory>, guarded: &BTreeSet<String>, now: Timestamp) -> Change {
        let before = std::mem::take(&mut self.ruleset);
        let standings = standings(set, inventory, now);
        let new = Bound {
            set: set.clone(),
            inventory: inventory.clone(),
            now,
            members: Arc::new(members(inventory)),
            doorways: Arc::new(doorways(inventory)),
            standings: Arc::new(standings),
        };
        self.guarded = guarded_by_policy(set, inventory, &new.standings);
        self.ruleset = frame(set, inventory, &new.standings, guarded);
        self.ruleset.inward = inward(set, inventory, &new.standings, now);
        self.again.clear();
        let all = Moved { containers: inventory.containers.keys().map(String::as_str).collect(), ..Moved::default() };
        for id in &all.containers {
            new.pairs(id, &all, Time::After, true, |pair| {
                if let Some(pair) = self.ruleset.pairs.replace(pair) {
                    *self.again.entry(pair).or_default() += 1;
                }
            });
        }
        self.index = Index::default();
        for workload in set.policies.keys() {
            self.index.update(workload, None, set);
        }
        self.made_from = Some(new);
        Change::between(&before, &self.ruleset)
    }

    /// Everything but the pairs.
    fn frame(&mut self, new: &Bound, guarded: &BTreeSet<String>, same_standings: bool) -> Change {
        if same_standings {
            let still = self.ruleset.bridges.intersection(guarded);
            if still.chain(&self.guarded).collect::<BTreeSet<_>>() == self.ruleset.guarded().iter().collect() {
                return Change::default();
            }
        }
        let fresh = frame(&new.set, &new.inventory, &new.standings, guarded);
        // Those come from rules.
        let (pairs, inward) = (std::mem::take(&mut self.ruleset.pairs), std::mem::take(&mut self.ruleset.inward));
        let change = Change::of_frames(&self.ruleset, &fresh);
        self.ruleset = Ruleset { pairs, inward, ..fresh };
        change
    }

    /// What depends on rules.
    fn pairs(&mut self, old: &Bound, new: &Bound, change: &mut Change, same_standings: bool) {
        let moved = Moved::between(old, new, &mut self.index);
        let of_host = |(direction, rule): &SideRule<'_>| *direction == Direction::Ingress && rule.peer == Peer::Host;
        if !same_standings || moved.rules.values().flatten().flatten().any(of_host) {
            let fresh = inward(&new.set, &new.inventory, &new.standings, new.now);
            change.inward = Change::inward(&self.ruleset, &fresh);
            self.ruleset.inward = fresh;
        }
        let mut naming: BTreeSet<&Workload> =
            moved.peers.iter().filter_map(|workload| self.index.named_by.get(*workload)).flatten().collect();
        let by_doors = self.index.of_node.iter().filter(|(_, ports)| ports.iter().any(|ports| moved.moves_a_door_of(ports)));
        naming.extend(by_doors.map(|(workload, _)| workload));
        let concerned: BTreeSet<&Workload> = moved.rules.keys().chain(&naming).copied().collect();
        let of = |bound: &'_ Bound| -> Vec<String> {
            let ids = concerned.iter().filter_map(|workload| bound.members.get(*workload)).flatten();
            ids.cloned().collect()
        };
        let (before, after) = (of(old), of(new));
        let mut ids: BTreeSet<&str> = before.iter().chain(&after).map(String::as_str).collect();
        ids.extend(&moved.containers);

        // By how much a pair is given more often than before.
        let mut net: HashMap<Pair, isize> = HashMap::new();
        for id in ids {
            for (bound, time, by) in [(old, Time::Before, -1), (new, Time::After, 1)] {
                let named = bound.inventory.containers.get(id).is_some_and(|container| naming.contains(&container.workload));
                bound.pairs(id, &moved, time, named, |pair| *net.entry(pair).or_default() += by);
            }
        }
        for (pair, by) in net.into_iter().filter(|(_, by)| *by != 0) {
            self.count(pair, by, change);
        }
    }

    fn count(&mut self, pair: Pair, by: isize, change: &mut Change) {
        let there = self.ruleset.pairs.contains(&pair);
        let times = if there { 1 + self.again.get(&pair).copied().unwrap_or(0) } else { 0 };
        let after = times.saturating_add_signed(by);
        match after {
            0 | 1 => drop(self.again.remove(&pair)),
            more => drop(self.again.insert(pair.clone(), more - 1)),
        }
        if there && after == 0 {
            self.ruleset.pairs.remove(&pair);
            change.pairs.gone.insert(pair);
        } else if !there && after > 0 {
            self.ruleset.pairs.insert(pair.clone());
            change.pairs.new.insert(pair);
        }
    }
}
