//! The same meaning, looked up: for whoever judges many connections under one set. What a workload's standing is, and which rule allows,
//! is still said by [`Scene`] and [`WorkloadPolicy`]; here it is only found faster.
//!
//! # Why
//! An ordered set of 10,000 rules is some thirty comparisons of names deep, each on another line of memory. Here the two ends of a
//! connection are hashed once each, and everything else goes by their numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use jiff::Timestamp;

use super::{Connection, Decision, Scene, Side, Standing, judged, side};
use crate::hash::QuickMap;
use crate::policy_set::{Direction, Peer, PolicySet, Rule, WorkloadPolicy};
use crate::segment::Selector;
use crate::service::Service;
use crate::workload::{Endpoint, Workload};

/// A policy set and the networks of the known workloads, as they were when it was made.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// Everybody who is named anywhere: in a policy or by a rule, by a segment, in quarantine, or known to run.
    numbers: QuickMap<Workload, u32>,
    /// By number.
    members: Vec<Member>,
    /// Those who are named nowhere go by their project alone.
    projects: QuickMap<String, Standing>,
    /// Which of `rules` are about whom: see `pair`.
    between: QuickMap<u64, Range<u32>>,
    /// In the order of each policy.
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Member {
    standing: Standing,
    /// Its rules about others than workloads.
    policy: Option<WorkloadPolicy>,
}

impl Index {
    /// Of this set, among these workloads with the networks they are attached to.
    pub fn of(set: &PolicySet, networks: &BTreeMap<Workload, BTreeSet<String>>) -> Self {
        // A standing does not go by the time.
        let scene = Scene { set, networks, now: Timestamp::UNIX_EPOCH };
        let mut index = Self::default();
        let selected = set.segments.values().flat_map(|segment| &segment.members).filter_map(|selector| match selector {
            Selector::Workload(workload) => Some(workload),
            Selector::Project(_) | Selector::Network(_) => None,
        });
        let rules = |policy: &'_ WorkloadPolicy| -> Vec<Workload> {
            policy.ingress.iter().chain(&policy.egress).filter_map(|rule| peer(rule).cloned()).collect()
        };
        let named = set.policies.keys().chain(set.quarantines.keys()).chain(networks.keys()).chain(selected).cloned();
        for workload in named.chain(set.policies.values().flat_map(rules)) {
            index.add(&scene, workload);
        }
        for (workload, policy) in &set.policies {
            index.add_policy(workload, policy);
        }
        // In the order of their names: the first that takes a project has it.
        for segment in set.segments.values() {
            for selector in &segment.members {
                if let Selector::Project(project) = selector {
                    index.projects.entry(project.clone()).or_insert_with(|| Standing::of(segment));
                }
            }
        }
        index
    }

    fn add(&mut self, scene: &Scene<'_>, workload: Workload) {
        let number = u32::try_from(self.members.len()).expect("names of two billion workloads fit into no memory");
        if let std::collections::hash_map::Entry::Vacant(room) = self.numbers.entry(workload) {
            self.members.push(Member { standing: scene.standing(room.key()), policy: None });
            room.insert(number);
        }
    }

    fn add_policy(&mut self, workload: &Workload, policy: &WorkloadPolicy) {
        let Some(&own) = self.numbers.get(workload) else { return };
        let mut rest = WorkloadPolicy::empty(workload.clone());
        for direction in [Direction::Ingress, Direction::Egress] {
            for rule in policy.rules(direction) {
                let Some(other) = peer(rule).and_then(|peer| self.numbers.get(peer)) else {
                    rest.rules_mut(direction).insert(rule.clone());
                    continue;
                };
                // Rules are in the order of their peers, so those about one of them follow each other.
                let at = u32::try_from(self.rules.len()).expect("four billion rules fit into no memory");
                self.between.entry(pair(own, direction, *other)).or_insert(at..at).end = at + 1;
                self.rules.push(rule.clone());
            }
        }
        self.members[own as usize].policy = Some(rest);
    }

    /// What [`super::evaluate`] says of a connection at this time.
    pub fn evaluate(&self, connection: &Connection, now: Timestamp) -> Decision {
        let ends = [&connection.from, &connection.to].map(|end| (end, end.workload().and_then(|workload| self.numbers.get(workload))));
        let [from, to] = ends;
        let egress = self.side(from, to, Direction::Egress, connection.service, now);
        let ingress = self.side(to, from, Direction::Ingress, connection.service, now);
        judged(connection, egress, ingress)
    }

    fn side(
        &self,
        own: (&Endpoint, Option<&u32>),
        peer: (&Endpoint, Option<&u32>),
        direction: Direction,
        service: Service,
        now: Timestamp,
    ) -> Side {
        let Some(workload) = own.0.workload() else { return Side::None };
        let member = own.1.map(|&number| (number, &self.members[number as usize]));
        let standing = match member {
            Some((_, member)) => member.standing,
            // Without a namespace there is no project to go by.
            None if workload.namespace().is_empty() => Standing::Open,
            None => self.projects.get(workload.namespace()).copied().unwrap_or(Standing::Open),
        };
        side(workload, standing, direction, || {
            let (number, policy) = member.and_then(|(number, member)| Some((number, member.policy.as_ref()?)))?;
            Some(match (peer.0.workload(), peer.1) {
                (None, _) => policy.allowing(direction, peer.0, service, now),
                // No rule names it.
                (Some(_), None) => None,
                (Some(_), Some(&peer)) => {
                    let range =
                        self.between.get(&pair(number, direction, peer)).map_or(0..0, |range| range.start as usize..range.end as usize);
                    self.rules[range].iter().find(|rule| rule.allows(service, now))
                }
            })
        })
    }
}

/// Whose rules of which side about whom, in one number: numbers of workloads are below 2^31.
fn pair(own: u32, direction: Direction, peer: u32) -> u64 {
    let side = match direction {
        Direction::Ingress => 0,
        Direction::Egress => 1,
    };
    u64::from(own) << 32 | u64::from(peer) << 1 | side
}

fn peer(rule: &Rule) -> Option<&Workload> {
    match &rule.peer {
        Peer::Workload(workload) => Some(workload),
        Peer::Host | Peer::Outside(_) => None,
    }
}
