//! Probes on networks that were made anew since the agent looked last, and on another one's bridge that carries their addresses.

use std::net::{IpAddr, Ipv6Addr};

use lab::frame;

use super::super::packet::{Tuple, ethertype, icmp, packet};
use super::super::scene::marker;
use super::Script;
use crate::around::fragments;

/// Two containers of each: netfilter is on for the first's bridge, and off for the second's.
const NETWORKS: [(&str, &str); 2] = [("n6", "m6"), ("n7", "m7")];

impl Script<'_, '_> {
    pub(super) fn made_anew(&mut self) {
        for (one, other) in NETWORKS {
            for v in 0..2 {
                self.ask("on a network made anew", one, other, v, "udp/80", false);
                let whole = self.tuple(one, other, v, "udp/80");
                let stranger = self.address("stranger", v);
                self.plain("the same from nowhere", one, other, false, |id| packet(id, Tuple { from: stranger, ..whole }, 0));
                self.plain("the same to nowhere", one, other, false, |id| packet(id, Tuple { to: stranger, ..whole }, 0));
                self.ask("out of it", one, "net", v, "udp/80", false);
                self.ask("into it", "net", one, v, "udp/80", false);
                self.ask("to the node", one, "node", v, "udp/9", false);
                self.node_sends("the node into it", v, "udp/81", one, false);
            }
            self.around(one, other);
        }
        let whole = |script: &Self, v| script.tuple("n7", "m7", v, "udp/80");
        for v in 0..2 {
            for (from, to) in [("v", "late"), ("late", "w")] {
                let tuple = whole(self, v);
                self.plain("the same addresses on a bridge that was there before", from, to, true, |id| packet(id, tuple, 0));
            }
            let (from, to) = (self.address("re", v), self.address("net", v));
            let id = self.next(format!("pieces of another's v{}: v -> w", [4, 6][v]), "w", false);
            for part in fragments(from, to, 80, &[&[0; 11][..], &marker(id)].concat(), 8, id as u8) {
                self.put("v", self.macs("v", "w"), ethertype(&part), &part);
            }
        }
        let id = self.next("pieces from a link-local address to a guarded network's: v -> w".to_owned(), "w", false);
        let from = "fe80::42:aff:fe01:3".parse().expect("an address");
        for part in fragments(from, self.address("le", 1), 80, &[&[0; 11][..], &marker(id)].concat(), 8, id as u8) {
            self.put("v", self.macs("v", "w"), ethertype(&part), &part);
        }
    }

    /// What carries, or may carry, something else than it looks.
    fn around(&mut self, one: &'static str, other: &'static str) {
        let (own, to) = (self.address(one, 1), self.address(other, 1));
        let target = |at: IpAddr, id: u16| {
            let IpAddr::V6(at) = at else { panic!("{at} is v4") };
            [&at.octets()[..], &[14, 1], &marker(id)].concat()
        };
        const SOLICITATION: [u8; 8] = [135, 0, 0, 0, 0, 0, 0, 0];
        self.plain("neighbour discovery", one, other, true, |id| icmp(own, to, SOLICITATION, &target(to, id)));
        self.plain("neighbour discovery that was routed", one, other, false, |id| {
            let mut bytes = icmp(own, to, SOLICITATION, &target(to, id));
            bytes[7] = 254;
            bytes
        });
        let tuple = self.tuple(one, other, 0, "udp/80");
        for (name, within) in [("in a tag", 1), ("in two tags", 2)] {
            let id = self.next(format!("{name}: {one} -> {other}"), other, false);
            let bytes = packet(id, tuple, 0);
            let inner = frame::vlan(0, ethertype(&bytes), &bytes);
            let payload = if within == 1 { inner } else { frame::vlan(0, frame::ETH_VLAN, &inner) };
            self.put(one, self.macs(one, other), frame::ETH_VLAN, &payload);
        }
        let id = self.next(format!("a router's discovery by {one}"), "node", true);
        let all: IpAddr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2).into();
        let bytes = icmp(own, all, [133, 0, 0, 0, 0, 0, 0, 0], &marker(id));
        self.put(one, [[0x33, 0x33, 0, 0, 0, 2], self.scene.ends[one].mac], frame::ETH_IPV6, &bytes);
        self.node_sends("a router's word into it", 1, "icmpv6/134", one, true);
    }
}
