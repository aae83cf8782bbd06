//! The connections that are followed, by their place in the kernel's table.
//!
//! # Why an index beside them
//! Of hundreds of thousands of connections none is in the processor's cache when its event comes. An index of four bytes each
//! mostly is, so that an event waits for memory once, and that of a new connection hardly at all.

use std::hash::BuildHasher;

use hashbrown::HashTable;

use super::Open;
use super::entry::EntryKey;
use crate::hash::QuickState;

/// Where a connection is kept, until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    hash: u64,
    slot: u32,
}

#[derive(Debug, Default)]
pub(super) struct Followed {
    index: HashTable<u32>,
    slots: Vec<Option<(EntryKey, Open)>>,
    free: Vec<u32>,
    hasher: QuickState,
}

impl Followed {
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    fn key(&self, slot: u32) -> Option<&EntryKey> {
        self.slots.get(slot as usize)?.as_ref().map(|(key, _)| key)
    }

    pub(super) fn find(&self, key: &EntryKey) -> Option<At> {
        let hash = self.hasher.hash_one(key);
        let slot = *self.index.find(hash, |&slot| self.key(slot) == Some(key))?;
        Some(At { hash, slot })
    }

    pub(super) fn get(&self, key: &EntryKey) -> Option<&Open> {
        let At { slot, .. } = self.find(key)?;
        self.slots[slot as usize].as_ref().map(|(_, open)| open)
    }

    /// One that was found, or put there, and not removed since.
    pub(super) fn at(&mut self, at: At) -> &mut Open {
        let found = self.slots[at.slot as usize].as_mut();
        found.map(|(_, open)| open).expect("only `remove` empties a slot, and its index goes with it")
    }

    /// Puts in one whose key is not there.
    pub(super) fn insert(&mut self, key: EntryKey, open: Open) -> At {
        let hash = self.hasher.hash_one(key);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("the kernel's table has fewer entries than 32 bits count")
        });
        self.slots[slot as usize] = Some((key, open));
        let Self { index, slots, hasher, .. } = self;
        let rehash = |&slot: &u32| slots[slot as usize].as_ref().map_or(0, |(key, _)| hasher.hash_one(key));
        index.insert_unique(hash, slot, rehash);
        At { hash, slot }
    }

    pub(super) fn remove(&mut self, at: At) -> Open {
        if let Ok(found) = self.index.find_entry(at.hash, |&slot| slot == at.slot) {
            found.remove();
        }
        self.free.push(at.slot);
        self.slots[at.slot as usize].take().map(|(_, open)| open).expect("one that was found")
    }

    /// Keeps those of which `keep` says so.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&mut Open) -> bool) {
        let Self { index, slots, free, .. } = self;
        index.retain(|&mut slot| {
            let kept = slots[slot as usize].as_mut().is_some_and(|(_, open)| keep(open));
            if !kept {
                slots[slot as usize] = None;
                free.push(slot);
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Tuple;
    use crate::service::Protocol;

    fn key(port: u16) -> EntryKey {
        let address = "10.0.0.1".parse().unwrap();
        let original = Tuple { source: address, destination: address, protocol: Protocol::Tcp, source_port: port, destination_port: 80 };
        EntryKey { original, zone: 0 }
    }

    fn open(flow: u64) -> Open {
        Open { flow, ..Open::begun(None, jiff::Timestamp::UNIX_EPOCH, jiff::Timestamp::UNIX_EPOCH) }
    }

    #[test]
    fn what_is_put_in_is_found_until_it_is_removed_and_its_slot_is_used_again() {
        let mut followed = Followed::default();
        for port in 0..1000 {
            followed.insert(key(port), open(u64::from(port)));
        }
        for port in (0..1000).step_by(2) {
            let at = followed.find(&key(port)).unwrap();
            assert_eq!(followed.remove(at).flow, u64::from(port));
        }
        followed.retain(|open| open.flow % 3 != 0);
        for port in 0..1000 {
            let kept = port % 2 != 0 && port % 3 != 0;
            assert_eq!(followed.get(&key(port)).map(|open| open.flow), kept.then_some(u64::from(port)), "{port}");
        }
        let kept = followed.len();
        for port in 1000..2000 {
            followed.insert(key(port), open(u64::from(port)));
        }
        assert_eq!(followed.len(), kept + 1000);
        assert!(followed.slots.len() <= kept + 1000, "{} slots for {}", followed.slots.len(), kept + 1000);
    }
}
