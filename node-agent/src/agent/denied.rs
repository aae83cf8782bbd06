//! The account of what was denied: the kernel's counts, added up under names. No I/O: counts and the inventory come in.
//!
//! # Why
//! A row of the kernel goes away when nothing happens in it, and begins at zero again. So each is added up by what it grew, and a
//! name is given to the growth of a second, when it is known who had the address.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use policy::inventory::Container;
use policy::lease::LeaseBook;
use policy::status::{Denied, DeniedBy, DeniedPair};
use policy::{Endpoint, Inventory, Protocol, Service};

use crate::enforce::count::{CountedSpot, Counts, ROW_STAYS, Reason};
use crate::observe::nflog::SPOOFED;

/// Pairs with rows of their own; the rest is in the row `other`.
const PAIRS: usize = 4096;
/// Workloads with rows of their own; a host with more containers has other worries.
const WORKLOADS: usize = 16_384;
/// Pairs that are told in a report: the largest.
const TOLD: usize = 200;
/// A row that goes away may do so between two looks.
const SLACK: Duration = Duration::from_secs(2);

fn words(reason: Reason) -> &'static str {
    match reason {
        Reason::Egress => "no egress rule of the sender allows it",
        Reason::Ingress => "no ingress rule of the receiver allows it",
        Reason::Unknown => "an address that belongs to no container, on a guarded network",
        Reason::Cut => "an end is quarantined",
        Reason::Door => "no ingress rule allows it through the published port",
        Reason::AuditEgress => "audit: no egress rule of the sender allows it",
        Reason::AuditIngress => "audit: no ingress rule of the receiver allows it",
        Reason::AuditDoor => "audit: no ingress rule allows it through the published port",
        Reason::Spoofed => SPOOFED,
    }
}

/// Who is at an address behind an interface.
pub(super) fn name(
    (interface, address): CountedSpot,
    inventory: &Inventory,
    leases: &LeaseBook,
    names: &BTreeMap<u32, String>,
    now: Timestamp,
) -> Endpoint {
    if interface == 0 || inventory.host.contains(&address) {
        return Endpoint::Host;
    }
    let bridge = names.get(&interface).filter(|name| inventory.networks.values().any(|network| network.bridge.as_ref() == Some(*name)));
    let Some(bridge) = bridge else { return Endpoint::Outside(address) };
    leases.find(Some(bridge), address, now).map_or(Endpoint::Unknown(address), |lease| lease.endpoint.clone())
}

/// Whose published port it is: what the kernel keeps in place of the interface is the port, in network order.
pub(super) fn behind((port, _): CountedSpot, inventory: &Inventory) -> Endpoint {
    let [a, b, ..] = port.to_ne_bytes();
    let port = u16::from_be_bytes([a, b]);
    let published = inventory.containers.values().find(|container| container.published.iter().any(|p| p.port == port));
    published.map_or(Endpoint::Host, |container| Endpoint::Workload(container.workload.clone()))
}

/// Whose the ports of bridges are, by their interface index.
pub(super) fn ports(inventory: &Inventory, names: &BTreeMap<u32, String>) -> BTreeMap<u32, Endpoint> {
    let legs = inventory.containers.values().flat_map(|container| container.legs.iter().map(move |leg| (container, leg)));
    let by_name: BTreeMap<&String, &Container> = legs.filter_map(|(container, leg)| Some((leg.port.as_ref()?, container))).collect();
    names.iter().filter_map(|(&index, name)| Some((index, by_name.get(name)?.endpoint()))).collect()
}

/// What rows have grown by since they were looked at last.
#[derive(Debug)]
struct Growth<K>(BTreeMap<K, (u64, Instant)>);

impl<K> Default for Growth<K> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord + Copy> Growth<K> {
    fn take(&mut self, rows: &BTreeMap<K, u64>, now: Instant) -> Vec<(K, u64)> {
        let mut grown = Vec::new();
        for (&key, &packets) in rows {
            let begun = match self.0.get(&key) {
                // Untouched for as long as a row stays, and yet it changed: it went away and began anew.
                Some((last, at)) if packets < *last || packets != *last && now.duration_since(*at) + SLACK >= ROW_STAYS => 0,
                Some((last, _)) => *last,
                None => 0,
            };
            if packets != begun {
                grown.push((key, packets - begun));
            }
            if self.0.get(&key).is_none_or(|(last, _)| *last != packets) {
                self.0.insert(key, (packets, now));
            }
        }
        self.0.retain(|_, (_, at)| now.duration_since(*at) < ROW_STAYS * 2);
        grown
    }
}

/// Added up since the agent began.
#[derive(Debug, Default)]
pub(super) struct Account {
    totals: Growth<(Reason, u8)>,
    spots: Growth<(Reason, CountedSpot)>,
    pairs: Growth<(Reason, crate::enforce::count::CountedPair)>,
    ports: Growth<(Reason, u32)>,
    /// Whose a port was when it was looked at last: a container may be gone before its packets are counted.
    owners: BTreeMap<u32, Endpoint>,
    /// What the kernel had at the last look, without its rows: each is a part of these.
    looked_at: Counts,
    total: BTreeMap<Reason, u64>,
    by: BTreeMap<(String, Reason), u64>,
    between: BTreeMap<(Endpoint, Endpoint, Service, Reason), u64>,
}

impl Account {
    /// Whether the kernel counted anything since the last look, or let go of a row.
    pub(super) fn is_news(&self, counts: &Counts) -> bool {
        (&counts.total, &counts.ports) != (&self.looked_at.total, &self.looked_at.ports)
    }

    /// Adds what the kernel counted since the last time. `name` says who is at a place, `behind` whose published port it is.
    pub(super) fn add(
        &mut self,
        counts: &Counts,
        now: Instant,
        name: impl Fn(CountedSpot) -> Endpoint,
        behind: impl Fn(CountedSpot) -> Endpoint,
        owners: BTreeMap<u32, Endpoint>,
    ) {
        self.looked_at = Counts { total: counts.total.clone(), ports: counts.ports.clone(), ..Counts::default() };
        for ((reason, port), packets) in self.ports.take(&counts.ports, now) {
            *self.total.entry(reason).or_default() += packets;
            let who = owners.get(&port).or_else(|| self.owners.get(&port)).map_or_else(|| "unknown:".to_owned(), ToString::to_string);
            self.by_workload(who, reason, packets);
        }
        self.owners = owners;
        for ((reason, _), packets) in self.totals.take(&counts.total, now) {
            *self.total.entry(reason).or_default() += packets;
        }
        for ((reason, spot), packets) in self.spots.take(&counts.spots, now) {
            let who = match reason {
                Reason::Door | Reason::AuditDoor => behind(spot),
                _ => name(spot),
            };
            let who = match who {
                // Senders outside are without number.
                Endpoint::Outside(_) => "outside:".to_owned(),
                Endpoint::Unknown(_) => "unknown:".to_owned(),
                known => known.to_string(),
            };
            self.by_workload(who, reason, packets);
        }
        for ((reason, pair), packets) in self.pairs.take(&counts.pairs, now) {
            let service = Service { protocol: Protocol::from_number(pair.protocol), port: pair.port };
            let key = (name(pair.from), name(pair.to), service, reason);
            if self.between.contains_key(&key) || self.between.len() < PAIRS {
                *self.between.entry(key).or_default() += packets;
            }
        }
    }

    fn by_workload(&mut self, who: String, reason: Reason, packets: u64) {
        let key = (who, reason);
        if self.by.contains_key(&key) || self.by.len() < WORKLOADS {
            *self.by.entry(key).or_default() += packets;
        }
    }

    /// As it is told: sums and workloads exact, pairs as far as they have rows, the rest in one sum a reason.
    pub(super) fn told(&self) -> Denied {
        let mut pairs: Vec<_> = self.between.iter().collect();
        pairs.sort_by_key(|(_, packets)| std::cmp::Reverse(**packets));
        pairs.truncate(TOLD);
        let mut other = self.total.clone();
        for ((.., reason), packets) in &pairs {
            let rest = other.entry(*reason).or_default();
            *rest = rest.saturating_sub(**packets);
        }
        let by = self.by.iter().map(|((workload, reason), &packets)| DeniedBy {
            side: workload.clone(),
            reason: words(*reason).to_owned(),
            packets,
        });
        let pair = |((from, to, service, reason), &packets): (&(Endpoint, Endpoint, Service, Reason), &u64)| DeniedPair {
            from: from.clone(),
            to: to.clone(),
            service: *service,
            reason: words(*reason).to_owned(),
            packets,
        };
        let named = |sums: BTreeMap<Reason, u64>| {
            sums.into_iter().filter(|(_, packets)| *packets > 0).map(|(reason, packets)| (words(reason).to_owned(), packets)).collect()
        };
        Denied { total: named(self.total.clone()), by: by.collect(), pairs: pairs.into_iter().map(pair).collect(), other: named(other) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enforce::count::CountedPair;

    fn spot(last: u8) -> CountedSpot {
        (7, [10, 0, 0, last].into())
    }

    fn name(spot: CountedSpot) -> Endpoint {
        Endpoint::Workload(policy::Workload::new("shop", format!("w{}", spot.1)))
    }

    fn counts(rows: &[(u8, u16, u64)]) -> Counts {
        let mut counts = Counts::default();
        for &(last, port, packets) in rows {
            let pair = CountedPair { from: spot(last), to: spot(99), protocol: 17, port };
            counts.pairs.insert((Reason::Egress, pair), packets);
            *counts.spots.entry((Reason::Egress, spot(last))).or_default() += packets;
            *counts.total.entry((Reason::Egress, 17)).or_default() += packets;
        }
        counts
    }

    #[test]
    fn growth_is_added_up_and_a_row_that_began_anew_is_not_subtracted() {
        let mut account = Account::default();
        let now = Instant::now();
        account.add(&counts(&[(1, 53, 100)]), now, name, name, BTreeMap::new());
        account.add(&counts(&[(1, 53, 100)]), now, name, name, BTreeMap::new());
        account.add(&counts(&[(1, 53, 130), (2, 53, 5)]), now, name, name, BTreeMap::new());
        // Ten quiet minutes later the row began anew, and has more than it had before.
        account.add(&counts(&[(1, 53, 200)]), now + ROW_STAYS, name, name, BTreeMap::new());
        let told = account.told();
        assert_eq!(
            told.by.iter().map(|row| (row.side.as_str(), row.packets)).collect::<Vec<_>>(),
            [("shop/w10.0.0.1", 330), ("shop/w10.0.0.2", 5)]
        );
        assert_eq!(told.total.values().sum::<u64>(), 335);
    }

    #[test]
    fn what_was_looked_at_is_no_news_and_a_packet_more_or_a_row_less_is() {
        let mut account = Account::default();
        assert!(!account.is_news(&Counts::default()), "nothing was ever denied");
        account.add(&counts(&[(1, 53, 100)]), Instant::now(), name, name, BTreeMap::new());
        assert!(!account.is_news(&counts(&[(1, 53, 100)])));
        assert!(account.is_news(&counts(&[(1, 53, 101)])));
        assert!(account.is_news(&Counts::default()));
        let spoofed = Counts { ports: [((Reason::Spoofed, 9), 1)].into(), ..counts(&[(1, 53, 100)]) };
        assert!(account.is_news(&spoofed));
    }

    #[test]
    fn pairs_beyond_the_bound_are_in_the_row_other_and_the_sums_stay_exact() {
        let mut account = Account::default();
        let rows: Vec<_> = (1..=1000).map(|port| (1, port, u64::from(port))).collect();
        let mut all = counts(&rows);
        // What found no row in the kernel is in the sum only.
        *all.total.get_mut(&(Reason::Egress, 17)).unwrap() += 7;
        account.add(&all, Instant::now(), name, name, BTreeMap::new());
        let told = account.told();
        let sum: u64 = (1..=1000).sum();
        assert_eq!(told.total.values().sum::<u64>(), sum + 7);
        assert_eq!(told.by[0].packets, sum);
        assert_eq!(told.pairs.len(), TOLD);
        assert_eq!(told.pairs.iter().map(|row| row.packets).sum::<u64>() + told.other.values().sum::<u64>(), sum + 7);
    }

    #[test]
    fn what_is_spoofed_is_the_ports_workloads_also_when_that_is_gone() {
        let mut account = Account::default();
        let now = Instant::now();
        let spoofed = |packets| Counts { ports: [((Reason::Spoofed, 9), packets)].into(), ..Counts::default() };
        let owner = || BTreeMap::from([(9, name(spot(1)))]);
        account.add(&spoofed(0), now, name, name, owner());
        account.add(&spoofed(5), now, name, name, owner());
        account.add(&spoofed(7), now, name, name, BTreeMap::new());
        account.add(&spoofed(8), now, name, name, BTreeMap::new());
        let told = account.told();
        let rows: Vec<_> = told.by.iter().map(|row| (row.side.as_str(), row.packets)).collect();
        assert_eq!(rows, [("shop/w10.0.0.1", 7), ("unknown:", 1)]);
        assert_eq!(told.total.values().sum::<u64>(), 8);
    }
}
