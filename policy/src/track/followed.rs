//! The connections that are followed, by their place in the kernel's table, and those whose entry is gone and that may go on.
//!
//! # Why an index beside them
//! Of hundreds of thousands of connections none is in the processor's cache when its event comes. An index of four bytes each
//! mostly is, so that an event waits for memory once, and that of a new connection hardly at all.
//!
//! # Why both in one place
//! A connection that ends stays where it is: nothing is copied, and its end touches what its event has fetched already. The index
//! goes by both ends of the first packet in no order, so that a late answer finds what it answers.

use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr};

use hashbrown::HashTable;

use super::entry::EntryKey;
use super::memory::{Ended, Past, Resumed};
use super::sight::{FlowId, Sight};
use super::slot::{Marks, Moment, Open, Slot, Standing, Wide};
use crate::flow::Tuple;
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
    slots: Vec<Slot>,
    wide: Wide,
    free: Vec<u32>,
    past: Past,
    /// How many are open.
    open: usize,
    hasher: QuickState,
}

impl Followed {
    pub(super) fn len(&self) -> usize {
        self.open
    }

    /// The places of those that are open.
    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> + '_ {
        let kept = self.index.iter().map(|&slot| &self.slots[slot as usize]);
        let open = kept.filter(|kept| kept.standing() == Standing::Open);
        open.map(|kept| EntryKey { original: kept.original(&self.wide), zone: kept.zone() })
    }

    /// The same for both directions.
    pub(super) fn hash(&self, tuple: &Tuple) -> u64 {
        hash(&self.hasher, tuple)
    }

    /// Asks for what is kept of an entry, so that it comes while something else is done.
    pub(super) fn fetch(&self, hash: u64, key: &EntryKey) -> FlowId {
        self.find(hash, key).map_or(0, |at| self.slots[at.slot as usize].open.flow)
    }

    pub(super) fn find(&self, hash: u64, key: &EntryKey) -> Option<At> {
        let is_it = |&slot: &u32| {
            let kept = &self.slots[slot as usize];
            kept.is(&key.original, &self.wide) && kept.zone() == key.zone && kept.standing() == Standing::Open
        };
        self.index.find(hash, is_it).map(|&slot| At { hash, slot })
    }

    /// One that was found, or put there, and not removed since.
    pub(super) fn at(&mut self, at: At) -> &mut Open {
        &mut self.slots[at.slot as usize].open
    }

    /// Puts in one whose key is not there.
    pub(super) fn insert(&mut self, hash: u64, key: &EntryKey, open: Open) -> At {
        let kept = Slot::new(key, open, &mut self.wide);
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = kept;
            slot
        } else {
            self.slots.push(kept);
            u32::try_from(self.slots.len() - 1).expect("the kernel's table has fewer entries than 32 bits count")
        };
        let Self { index, slots, wide, hasher, .. } = self;
        index.insert_unique(hash, slot, |&slot| self::hash(hasher, &slots[slot as usize].original(wide)));
        self.open += 1;
        At { hash, slot }
    }

    fn take_out(&mut self, hash: u64, slot: u32) {
        if let Ok(found) = self.index.find_entry(hash, |&found| found == slot) {
            found.remove();
        }
        self.free.push(slot);
    }

    /// Its entry is gone, and the flow with it.
    pub(super) fn remove(&mut self, at: At) -> Open {
        let Slot { open, .. } = self.slots[at.slot as usize];
        self.slots[at.slot as usize].clear(&mut self.wide);
        self.take_out(at.hash, at.slot);
        self.open -= 1;
        open
    }

    /// Its entry is gone, and the flow may go on. `reply` is what its answers look like to the kernel.
    pub(super) fn end(&mut self, at: At, reply: &Tuple, now: Moment, out: &mut Vec<Sight>) {
        let kept = &mut self.slots[at.slot as usize];
        kept.end();
        self.open -= 1;
        let original = kept.original(&self.wide);
        let (flow, reversed) = (kept.open.flow, kept.open.is(Marks::REVERSED));
        // Where nothing is rewritten the answer says nothing that the first packet does not.
        let rewritten = (*reply != original.reversed()).then_some(*reply);
        let first = [(at.hash, original)];
        let both = rewritten.map(|reply| {
            let answer = (self.hash(&reply), reply);
            if reversed { [answer, first[0]] } else { [first[0], answer] }
        });
        for (hash, tuple) in both.as_ref().map_or(&first[..], |both| &both[..]) {
            if let Some(before) = self.find_past(*hash, tuple, Some(at.slot)) {
                self.drop_past(before, out);
            }
        }
        let answer = rewritten.map(|reply| (self.hash(&reply), reply));
        let number = self.past.push(Ended { flow, ended: now, hash: at.hash, slot: at.slot, rewritten: answer.is_some() }, answer);
        self.slots[at.slot as usize].open.seen = number;
        while self.past.is_over_full() {
            self.drop_oldest(out);
        }
    }

    /// One that is over and has these two ends, on either side of what was rewritten.
    fn find_past(&self, hash: u64, tuple: &Tuple, but: Option<u32>) -> Option<u32> {
        let turned = tuple.reversed();
        let is_it = |&slot: &u32| {
            let kept = &self.slots[slot as usize];
            kept.standing() == Standing::Past && Some(slot) != but && (kept.is(tuple, &self.wide) || kept.is(&turned, &self.wide))
        };
        self.index.find(hash, is_it).copied().or_else(|| self.past.answered_by(hash, tuple))
    }

    /// Lets go of one that is over.
    fn forget_past(&mut self, slot: u32) {
        let ended = self.past.take(self.slots[slot as usize].open.seen);
        self.slots[slot as usize].clear(&mut self.wide);
        if let Some(ended) = ended {
            self.take_out(ended.hash, slot);
        }
    }

    fn drop_past(&mut self, slot: u32, out: &mut Vec<Sight>) {
        let flow = self.slots[slot as usize].open.flow;
        self.forget_past(slot);
        self.closed(flow, out);
    }

    fn drop_oldest(&mut self, out: &mut Vec<Sight>) {
        // What is needed of it stands in line: the slot itself is fetched only for the sake of wide addresses.
        if let Some(ended) = self.past.pop() {
            if !self.wide.is_empty() {
                self.slots[ended.slot as usize].clear(&mut self.wide);
            }
            self.take_out(ended.hash, ended.slot);
            self.closed(ended.flow, out);
        }
    }

    /// Nothing more will be said of a flow.
    pub(super) fn closed(&mut self, flow: FlowId, out: &mut Vec<Sight>) {
        self.past.closed(flow);
        out.push(Sight::Closed { flow });
    }

    /// The flow that a new entry with this first packet goes on with.
    pub(super) fn resume(&mut self, hash: u64, first: &Tuple) -> Option<Resumed> {
        if self.past.is_empty() {
            return None;
        }
        let slot = self.find_past(hash, first, None)?;
        let kept = self.slots[slot as usize];
        let original = kept.original(&self.wide);
        let other = self.past.answer(slot).unwrap_or_else(|| original.reversed());
        let (forward, backward) = if kept.open.is(Marks::REVERSED) { (other, original) } else { (original, other) };
        let reversed = backward == *first;
        // The same way again is another flow of UDP: the same socket after a pause.
        let goes_on = reversed || (forward == *first && first.protocol != crate::Protocol::Udp);
        if !goes_on {
            return None;
        }
        self.forget_past(slot);
        let flow = kept.open.flow;
        if reversed {
            self.past.turn(flow, forward);
        }
        Some(Resumed { flow, reversed, outcome: kept.open.outcome })
    }

    /// The first packet of a flow, by that of the entry it has now.
    pub(super) fn first_of(&self, flow: FlowId, original: &Tuple) -> Tuple {
        self.past.turned(flow).unwrap_or(*original)
    }

    /// Forgets what ended too long ago.
    pub(super) fn forget(&mut self, now: Moment, out: &mut Vec<Sight>) {
        while self.past.has_one_too_old(now) {
            self.drop_oldest(out);
        }
    }

    /// Keeps those that are open and of which `keep` says so; the others are closed.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&mut Open) -> bool, out: &mut Vec<Sight>) {
        let Self { index, slots, wide, free, past, open, .. } = self;
        index.retain(|&mut slot| {
            let kept = &mut slots[slot as usize];
            let stays = kept.standing() == Standing::Past || keep(&mut kept.open);
            if !stays {
                kept.clear(wide);
                free.push(slot);
                *open -= 1;
                past.closed(kept.open.flow);
                out.push(Sight::Closed { flow: kept.open.flow });
            }
            stays
        });
    }
}

/// Of both ends and the protocol, in no order of the ends.
fn hash(hasher: &QuickState, tuple: &Tuple) -> u64 {
    let Tuple { source, destination, protocol, source_port, destination_port } = *tuple;
    let mut state = hasher.build_hasher();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let end = |address: Ipv4Addr, port: u16| u64::from(address.to_bits()) << 16 | u64::from(port);
            let (one, other) = (end(source, source_port), end(destination, destination_port));
            state.write_u64(one.min(other) | u64::from(protocol.number()) << 48);
            state.write_u64(one.max(other));
        }
        (source, destination) => {
            let number = |address| match address {
                IpAddr::V4(v4) => u128::from(v4.to_bits()),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            let (one, other) = ((number(source), source_port), (number(destination), destination_port));
            for (address, port) in [one.min(other), one.max(other)] {
                state.write_u128(address);
                state.write_u64(u64::from(port) << 8 | u64::from(protocol.number()));
            }
        }
    }
    state.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Protocol;

    fn key(port: u16, address: &str) -> EntryKey {
        let address = address.parse().unwrap();
        let original = Tuple { source: address, destination: address, protocol: Protocol::Tcp, source_port: port, destination_port: 80 };
        EntryKey { original, zone: 0 }
    }

    fn open(flow: u64) -> Open {
        let mut open = Open::begun(None, jiff::Timestamp::UNIX_EPOCH);
        open.flow = flow;
        open
    }

    #[test]
    fn what_is_put_in_is_found_until_it_is_removed_and_its_slot_is_used_again() {
        for address in ["10.0.0.1", "2001:db8::1"] {
            let mut followed = Followed::default();
            let find = |followed: &Followed, port| followed.find(followed.hash(&key(port, address).original), &key(port, address));
            let put = |followed: &mut Followed, port: u16| {
                let key = key(port, address);
                followed.insert(followed.hash(&key.original), &key, open(u64::from(port)))
            };
            for port in 1000..2000 {
                put(&mut followed, port);
            }
            for port in (1000..2000).step_by(2) {
                let at = find(&followed, port).unwrap();
                assert_eq!(followed.remove(at).flow, u64::from(port));
            }
            followed.retain(|open| open.flow % 3 != 0, &mut Vec::new());
            for port in 1000..2000 {
                let kept = port % 2 != 0 && port % 3 != 0;
                let found = find(&followed, port).map(|at| followed.at(at).flow);
                assert_eq!(found, kept.then_some(u64::from(port)), "{port}");
            }
            let kept = followed.len();
            for port in 2000..3000 {
                put(&mut followed, port);
            }
            assert_eq!(followed.len(), kept + 1000);
            // One that is over, and may go on, is none of those that are in the kernel's table.
            let over = find(&followed, 2000).unwrap();
            followed.end(over, &key(2000, address).original.reversed(), jiff::Timestamp::UNIX_EPOCH.into(), &mut Vec::new());
            let ports: std::collections::BTreeSet<u16> = followed.keys().map(|key| key.original.source_port).collect();
            let expected = (1000..2000).filter(|port| port % 2 != 0 && port % 3 != 0).chain(2001..3000).collect();
            assert_eq!(ports, expected);
            assert!(followed.slots.len() <= kept + 1000, "{} slots for {}", followed.slots.len(), kept + 1000);
        }
    }

    #[test]
    fn both_directions_have_one_hash_and_other_ports_another() {
        let followed = Followed::default();
        for address in ["10.0.0.1", "2001:db8::1"] {
            let one = Tuple { destination: "10.0.0.9".parse().unwrap(), ..key(7, address).original };
            assert_eq!(followed.hash(&one), followed.hash(&one.reversed()));
            assert_ne!(followed.hash(&one), followed.hash(&Tuple { source_port: 80, destination_port: 7, ..one }));
            assert_ne!(followed.hash(&one), followed.hash(&Tuple { protocol: Protocol::Udp, ..one }));
        }
    }
}
