//! What a container makes the bridge and the node remember: who is where, who routes multicast, who is a neighbour.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Member, Netns, needs_root};
use node_agent::enforce::Enforcer;
use policy::Mode;

use crate::anew::link_local;
use crate::guard::icmpv6;
use crate::stage::{Policy, apply, enforcer, inventory};

const BRIEFLY: Duration = Duration::from_millis(400);
/// One of the addresses that a bridge keeps to itself: what is sent there meets no hook of the bridge's.
const NEAREST: [u8; 6] = [1, 0x80, 0xc2, 0, 0, 14];

fn bridge(host: &Netns, words: &str) -> String {
    host.check(Command::new("bridge").args(words.split(' ')))
}

/// So many frames around the bridge, each from another MAC address; how many of these the bridge then knows.
fn flood(host: &Netns, member: &Member, first: u8, frames: u16) -> usize {
    let wire = Frames::open(&member.netns, "eth0");
    for n in 0..frames {
        let [high, low] = n.to_be_bytes();
        wire.send(&frame::ethernet(NEAREST, [2, 0x99, 0, first, high, low], 0x88cc, &[0; 46]));
    }
    std::thread::sleep(BRIEFLY);
    let start = format!("02:99:00:{first:02x}:");
    // A dump of several parts tells an entry twice if another one came meanwhile.
    let known = bridge(host, "fdb show");
    known.lines().filter_map(|line| line.split(' ').next().filter(|mac| mac.starts_with(&start))).collect::<BTreeSet<_>>().len()
}

#[test]
fn nobody_fills_the_bridges_table_of_mac_addresses() {
    needs_root!();
    node!(host, br: a, b);
    let unbound = br.add("unbound");
    let inventory = inventory(&[(&br, &[("a", &a), ("b", &b)])]);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let learns = |member: &Member| bridge(&host, &format!("-d link show dev {}", member.port)).contains("learning on");
    let mut enforcer = enforcer(&host);
    assert!(learns(&a));
    apply(&mut enforcer, &policy.bind(&inventory));
    assert!(!learns(&a) && learns(&unbound));
    assert_eq!(flood(&host, &a, 1, 1000), 0, "a bound port learns nothing");
    let bounded = flood(&host, &unbound, 2, 10_000);
    // Since 6.7.
    assert!(bounded < 8192 || bounded == 10_000, "{bounded}");

    // Somebody takes an entry, and the agent is killed before it sees that.
    bridge(&host, &format!("fdb del {} dev {} master", lab::bridge::mac_text(a.mac), a.port));
    drop(enforcer);
    let mut enforcer = self::enforcer(&host);
    enforcer.remove().unwrap();
    assert!(learns(&a) && learns(&b), "down: as it was");
    assert_eq!(flood(&host, &unbound, 3, 10_000), 10_000, "down: as it was");
}

#[test]
fn no_container_is_a_router_of_its_neighbours_multicast() {
    needs_root!();
    node!(host, br: a, b, bound);
    let unbound = br.add("unbound");
    let inventory = inventory(&[(&br, &[("a", &a), ("b", &b), ("bound", &bound)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "bound"]).bind(&inventory));
    let routers = || bridge(&host, "-d mdb show").lines().filter(|line| line.starts_with("router ports")).collect::<String>();
    for (member, is_bound) in [(&bound, true), (&unbound, false)] {
        let wire = Frames::open(&member.netns, "eth0");
        let v4 = |to: &str, protocol, body: &[u8]| frame::ip(member.v4.into(), to.parse().unwrap(), protocol, body);
        let summed = |mut body: [u8; 8]| {
            let sum = frame::checksum(&body);
            body[2..4].copy_from_slice(&sum.to_be_bytes());
            body
        };
        let (IpAddr::V6(from), snoopers) = (link_local(member.mac), "ff02::6a".parse::<Ipv6Addr>().unwrap()) else { unreachable!() };
        // RFC 7761, 4.9.2; RFC 4286, 5: over IGMP, and over MLD.
        let hello = v4("224.0.0.13", 103, &summed([0x20, 0, 0, 0, 0, 1, 0, 2]));
        let router4 = v4("224.0.0.106", 2, &summed([0x30, 20, 0, 0, 0, 125, 0, 2]));
        let mut router6 = icmpv6(from, snoopers, &[151, 20, 0, 0, 0, 125, 0, 2]);
        router6[7] = 1;
        for (name, mac, kind, packet) in [
            ("PIM", [1, 0, 0x5e, 0, 0, 13], frame::ETH_IPV4, hello),
            ("MRD, IPv4", [1, 0, 0x5e, 0, 0, 0x6a], frame::ETH_IPV4, router4),
            ("MRD, IPv6", [0x33, 0x33, 0, 0, 0, 0x6a], frame::ETH_IPV6, router6),
        ] {
            wire.send(&frame::ethernet(mac, member.mac, kind, &packet));
            // What a port that is not bound says of IPv4 within a tag is believed: no IPv4 multicast comes to it all the same.
            if is_bound || kind == frame::ETH_IPV6 {
                wire.send(&frame::ethernet(mac, member.mac, frame::ETH_VLAN, &frame::vlan(0, kind, &packet)));
            }
            std::thread::sleep(BRIEFLY);
            assert!(!routers().contains(&member.port), "{name}, {}: {}", member.port, routers());
        }
    }
}

#[test]
fn arp_around_the_bridge_takes_no_place_among_the_nodes_neighbours() {
    needs_root!();
    node!(host, br: a, b);
    let unbound = br.add("unbound");
    let inventory = inventory(&[(&br, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory));
    for member in [&a, &unbound] {
        let wire = Frames::open(&member.netns, "eth0");
        for n in 0..20 {
            let mut request = frame::arp_reply(member.mac, [10, 1, 0, 100 + n].into(), [0; 6], br.gateway_v4());
            request[7] = 1;
            wire.send(&frame::ethernet(NEAREST, member.mac, frame::ETH_ARP, &request));
            wire.send(&frame::ethernet(NEAREST, member.mac, frame::ETH_VLAN, &frame::vlan(0, frame::ETH_ARP, &request)));
        }
        std::thread::sleep(BRIEFLY);
        let known = host.ip(&format!("neigh show dev {}", member.port));
        assert_eq!(known.lines().count(), 0, "{known}");
    }
}
