//! Which containers on several networks pass packets on between them.
//!
//! # Why
//! A container's namespace mostly inherits the node's `ip_forward`, so whoever has a leg in two networks can be a router between them
//! without anybody having said so. The kernel counts what a namespace forwards, and shows it below /proc/PID/net without its being
//! entered (`ForwDatagrams` of RFC 4293, in net/snmp; `Ip6OutForwDatagrams` in net/snmp6).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use policy::Inventory;

/// Those that were seen to forward, by container id and process: a container that is started again begins anew.
#[derive(Debug, Default)]
pub(super) struct Forwarding(BTreeMap<String, u32>);

impl Forwarding {
    /// Looks again; returns the ids.
    pub(super) fn look(&mut self, inventory: &Inventory) -> BTreeSet<String> {
        self.look_with(inventory, forwarded)
    }

    fn look_with(&mut self, inventory: &Inventory, forwarded: impl Fn(u32) -> u64) -> BTreeSet<String> {
        let routers = inventory.containers.values().filter_map(|container| {
            let legs: BTreeSet<&str> = container.legs.iter().map(|leg| leg.bridge.as_str()).collect();
            let pid = container.pid.filter(|_| legs.len() + container.elsewhere.len() > 1)?;
            let again = self.0.get(&container.id) == Some(&pid);
            (again || forwarded(pid) > 0).then(|| (container.id.clone(), pid))
        });
        self.0 = routers.collect();
        self.0.keys().cloned().collect()
    }
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
    use super::*;

    const SNMP: &str = "Ip: Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos\n\
                        Ip: 1 64 4711 0 1 42 0\nIcmp: InMsgs\nIcmp: 7\n";

    #[test]
    fn what_was_forwarded_is_read_by_its_name() {
        assert_eq!(of_ipv4(SNMP), Some(42));
        assert_eq!(of_ipv6("Ip6InReceives   \t3\nIp6OutForwDatagrams             \t17\n"), Some(17));
        assert_eq!((of_ipv4("Ip: Forwarding\nIp: 1\n"), of_ipv6("")), (None, None));
        assert_eq!(forwarded(u32::MAX), 0);
    }
}
