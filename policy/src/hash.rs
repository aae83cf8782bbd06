//! Maps for what is looked up with every event of the kernel.
//!
//! # Why not the standard hasher
//! SipHash took a third of the time an event. This one is keyed anew in each process too, so that nobody who chooses ports and
//! addresses can choose where they end up; and nobody outside sees how long a look-up takes.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

/// The quick hasher.
pub(crate) type QuickState = foldhash::fast::RandomState;
/// A map with it.
pub(crate) type QuickMap<K, V> = HashMap<K, V, QuickState>;

/// A map by numbers that are given out one after the other.
pub(crate) type SerialMap<V> = HashMap<u64, V, Serial>;

/// Keeps neighbours together: flows that begin together mostly end together, and are found in the same lines of the cache.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Serial;

#[derive(Clone, Copy, Debug)]
pub(crate) struct SerialHasher(u64);

/// Numbers that stay neighbours.
const RUN: u32 = 6;
/// The golden ratio's fraction (Knuth, The Art of Computer Programming, 6.4).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl BuildHasher for Serial {
    type Hasher = SerialHasher;

    fn build_hasher(&self) -> SerialHasher {
        SerialHasher(0)
    }
}

impl Hasher for SerialHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let (number, within) = (number ^ self.0, (1 << RUN) - 1);
        // A product is mixed best in its high half; a table goes by the low bits of a hash, and compares the seven highest.
        let run = (number >> RUN).wrapping_mul(SPREAD).rotate_left(32);
        self.0 = (run & !within | number & within) ^ (number << 57);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn numbers_of_flows_spread_over_a_table_whichever_of_them_are_left() {
        let buckets: u64 = 1 << 12;
        for stride in [1, 2, 64, 4096, 65_536, 1 << 20] {
            let mut groups: BTreeMap<u64, usize> = BTreeMap::new();
            for number in (0..buckets / 2).map(|n| n * stride) {
                *groups.entry((Serial.hash_one(number) & (buckets - 1)) / 16).or_default() += 1;
            }
            let fullest = groups.values().max().unwrap();
            assert!(*fullest <= 64, "stride {stride}: {fullest} of {} in one group of 16", buckets / 2);
        }
    }

    #[test]
    fn neighbours_lie_in_one_stretch_of_the_table_and_are_told_apart() {
        let hashes: Vec<u64> = (6400..6464).map(|number: u64| Serial.hash_one(number)).collect();
        assert!(hashes.iter().all(|hash| (hash & 0xfff) / 64 == (hashes[0] & 0xfff) / 64));
        assert!(hashes.iter().map(|hash| hash >> 57).collect::<std::collections::BTreeSet<_>>().len() >= 32);
    }
}
