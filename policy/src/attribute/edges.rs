//! The ends of flows by number: one copy for all flows of an edge, and four bytes in each flow.

use std::hash::BuildHasher;

use hashbrown::HashTable;

use super::ends::Ends;
use crate::hash::QuickState;

/// So few are not worth looking for those that no flow has any more.
const FEW: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Edges {
    index: HashTable<u32>,
    /// `None`: the number is free.
    ends: Vec<Option<Ends>>,
    free: Vec<u32>,
    /// How many were kept last.
    kept: usize,
    hasher: QuickState,
}

impl Edges {
    /// The ends with this number, which was given out and whose flow lives.
    pub(super) fn get(&self, number: u32) -> &Ends {
        self.ends[number as usize].as_ref().expect("`keep` is told of every flow that lives")
    }

    /// Their number, the same for the same ends.
    pub(super) fn number(&mut self, ends: Ends) -> u32 {
        let hash = self.hasher.hash_one(&ends);
        let Self { index, ends: all, free, hasher, .. } = self;
        if let Some(&known) = index.find(hash, |&number| all[number as usize].as_ref() == Some(&ends)) {
            return known;
        }
        let number = if let Some(number) = free.pop() {
            all[number as usize] = Some(ends);
            number
        } else {
            all.push(Some(ends));
            u32::try_from(all.len() - 1).expect("fewer edges at a time than 32 bits count")
        };
        index.insert_unique(hash, number, |&number| all[number as usize].as_ref().map_or(0, |ends| hasher.hash_one(ends)));
        number
    }

    /// Twice as many as were kept last: time to let go of those that no flow has.
    pub(super) fn is_crowded(&self) -> bool {
        self.index.len() >= FEW.max(2 * self.kept)
    }

    /// Keeps these alone.
    pub(super) fn keep(&mut self, used: impl Iterator<Item = u32>) {
        let mut is_used = vec![false; self.ends.len()];
        used.for_each(|number| is_used[number as usize] = true);
        let Self { index, ends, free, .. } = self;
        index.retain(|&mut number| {
            if !is_used[number as usize] {
                ends[number as usize] = None;
                free.push(number);
            }
            is_used[number as usize]
        });
        self.kept = self.index.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::Road;
    use crate::service::Service;
    use crate::workload::Endpoint;

    fn ends(port: u16) -> Ends {
        let (from, to) = (Endpoint::Host, Endpoint::Outside("192.0.2.1".parse().unwrap()));
        Ends { from, to, service: Service::tcp(port), road: Road::Direct, direction_known: true, reversed: false }
    }

    #[test]
    fn equal_ends_have_one_number_and_what_no_flow_has_is_let_go_of() {
        let mut edges = Edges::default();
        let numbers: Vec<u32> = (0..1500).map(|port| edges.number(ends(port))).collect();
        assert!((0..1500).all(|port| edges.number(ends(port)) == numbers[usize::from(port)]));
        assert!(edges.is_crowded());
        edges.keep(numbers.iter().copied().step_by(3));
        assert!(!edges.is_crowded());
        for port in (0..1500).step_by(3) {
            assert_eq!(edges.number(ends(port)), numbers[usize::from(port)]);
            assert_eq!(*edges.get(numbers[usize::from(port)]), ends(port));
        }
        for port in 2000..3000 {
            edges.number(ends(port));
        }
        assert_eq!(edges.ends.len(), 1500, "numbers are given out again");
    }
}
