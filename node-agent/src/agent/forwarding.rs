//! Which containers on several networks pass packets on between them.
//!
//! # Why
//! A container's namespace mostly inherits the node's `ip_forward`, so whoever has a leg in two networks can be a router between them
//! without anybody having said so. The kernel counts what a namespace forwards, and shows it below /proc/PID/net without its being
//! entered (`ForwDatagrams` of RFC 4293, in net/snmp; `Ip6OutForwDatagrams` in net/snmp6).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use policy::Inventory;
use policy::inventory::Container;

/// Containers that are looked at each time at most: the kernel adds up a namespace's counters over all processors when it is asked.
const AT_ONCE: usize = 16;

/// Those that were seen to forward.
#[derive(Debug, Default)]
pub(super) struct Forwarding {
    /// By container id and process: a container that is started again begins anew.
    seen: BTreeMap<String, u32>,
    /// Who was looked at last.
    last: String,
    /// Who has legs in several networks, by container id and process, and the inventory that says so: of a thousand containers most
    /// have one, and on a machine that takes idle memory away each look at one waits for it.
    routers: Vec<(String, u32)>,
    inventory: Arc<Inventory>,
}

impl Forwarding {
    /// Looks again; returns the ids.
    pub(super) fn look(&mut self, inventory: &Arc<Inventory>) -> BTreeSet<String> {
        self.look_with(inventory, forwarded)
    }

    fn look_with(&mut self, inventory: &Arc<Inventory>, forwarded: impl Fn(u32) -> u64) -> BTreeSet<String> {
        if !Arc::ptr_eq(&self.inventory, inventory) {
            self.inventory = Arc::clone(inventory);
            self.routers = routers(inventory);
        }
        let (known, others): (Vec<_>, Vec<_>) = self.routers.iter().partition(|(id, pid)| self.seen.get(id) == Some(pid));
        // In turn: many at once would take longer than all else that is done each second.
        let begin = others.partition_point(|(id, _)| *id <= self.last);
        let turn: Vec<_> = others.iter().cycle().skip(begin).take(AT_ONCE.min(others.len())).copied().collect();
        if let Some((last, _)) = turn.last() {
            self.last.clone_from(last);
        }
        let found = turn.into_iter().filter(|(_, pid)| forwarded(*pid) > 0);
        self.seen = known.into_iter().chain(found).cloned().collect();
        self.seen.keys().cloned().collect()
    }
}

/// Containers with legs in several networks, in order.
fn routers(inventory: &Inventory) -> Vec<(String, u32)> {
    let router = |container: &Container| {
        let legs: BTreeSet<&str> = container.legs.iter().map(|leg| leg.bridge.as_str()).collect();
        let pid = container.pid.filter(|_| legs.len() + container.elsewhere.len() > 1)?;
        Some((container.id.clone(), pid))
    };
    inventory.containers.values().filter_map(router).collect()
}

/// Packets that the namespace of a process forwarded; none, if it is gone.
fn forwarded(pid: u32) -> u64 {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/net/{file}")).unwrap_or_default();
    of_ipv4(&read("snmp")).unwrap_or(0) + of_ipv6(&read("snmp6")).unwrap_or(0)
}

/// Two lines a protocol: names, then numbers.
fn of_ipv4(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let column = lines.next()?.split_ascii_whitespace().position(|name| name == "ForwDatagrams")?;
    lines.next()?.split_ascii_whitespace().nth(column)?.parse().ok()
}

/// One line a number.
fn of_ipv6(snmp6: &str) -> Option<u64> {
    let mut words = snmp6.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"))?.split_ascii_whitespace();
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use policy::Workload;
    use policy::inventory::Leg;

    use super::*;

    const SNMP: &str = "Ip: Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos\n\
                        Ip: 1 64 4711 0 1 42 0\nIcmp: InMsgs\nIcmp: 7\n";

    fn router(n: u32) -> Container {
        let leg = |bridge: &str| Leg {
            network: bridge.to_owned(),
            bridge: bridge.to_owned(),
            port: None,
            mac: [2, 0, 0, 0, 0, 1],
            addresses: BTreeSet::new(),
        };
        Container {
            id: format!("{n:04}"),
            name: String::new(),
            workload: Workload::new("shop", "web"),
            one_off: false,
            engine_named: false,
            image: String::new(),
            labels: BTreeMap::new(),
            pid: Some(n),
            legs: vec![leg("br-a"), leg("br-b")],
            elsewhere: Vec::new(),
            published: Vec::new(),
            resolvers: Vec::new(),
            members: Vec::new(),
            unmanaged: BTreeSet::new(),
            raw: false,
        }
    }

    #[test]
    fn of_many_containers_each_is_looked_at_in_its_turn_and_who_was_found_stays() {
        let containers = (1..=40).map(router).map(|container| (container.id.clone(), container)).collect();
        let inventory = Arc::new(Inventory { containers, ..Inventory::default() });
        let mut forwarding = Forwarding::default();
        let asked = std::cell::Cell::new(0);
        let mut look = || {
            asked.set(0);
            forwarding.look_with(&inventory, |pid| {
                asked.set(asked.get() + 1);
                u64::from(pid == 3 || pid == 40)
            })
        };
        let (third, last) = ("0003".to_owned(), "0040".to_owned());
        let looks: Vec<_> = (0..3).map(|_| look()).collect();
        assert_eq!(looks, [[third.clone()].into(), [third.clone()].into(), BTreeSet::from([third, last])]);
        assert_eq!(asked.get(), AT_ONCE);
        assert_eq!(look().len(), 2);
    }

    #[test]
    fn what_was_forwarded_is_read_by_its_name() {
        assert_eq!(of_ipv4(SNMP), Some(42));
        assert_eq!(of_ipv6("Ip6InReceives   \t3\nIp6OutForwDatagrams             \t17\n"), Some(17));
        assert_eq!((of_ipv4("Ip: Forwarding\nIp: 1\n"), of_ipv6("")), (None, None));
        assert_eq!(forwarded(u32::MAX), 0);
    }
}
