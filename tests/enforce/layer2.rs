//! Below IP: whose MAC address is where, whom the node believes, and what comes in around the bridge.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Echo, Member, Netns, Server, needs_root};
use node_agent::enforce::{Drift, Enforcer};
use policy::Mode;
use policy::ruleset::Change;

use crate::guard::{datagram, icmpv6};
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);

/// The entries of the bridges' forwarding tables that no frame moves.
fn sticky(host: &Netns) -> Vec<String> {
    let all = host.check(Command::new("bridge").args(["fdb", "show"]));
    all.lines().filter(|line| line.contains("sticky")).map(|line| line.trim().to_owned()).collect()
}

fn fdb(host: &Netns, words: &str) {
    host.check(Command::new("bridge").arg("fdb").args(words.split(' ')));
}

/// The addresses that bridges keep to themselves, and those that any frame may go to.
fn destinations(neighbour: &Member) -> Vec<[u8; 6]> {
    let reserved = (0..16).map(|last| [1, 0x80, 0xc2, 0, 0, last]);
    reserved.chain([neighbour.mac, [0xff; 6], [1, 0, 0x5e, 0, 0, 1]]).collect()
}

#[test]
fn no_frame_moves_a_neighbours_mac_address_to_another_port() {
    needs_root!();
    node!(host, bridge: a, b, bound);
    let unbound = bridge.add("unbound");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("bound", &bound)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "bound"]).allow("b", "a", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&b.netns, "eth0"), Frames::open(&a.netns, "eth0"));

    for thief in [&unbound, &bound] {
        let stolen = Frames::open(&thief.netns, "eth0");
        for (n, to) in destinations(&b).into_iter().enumerate() {
            for (kind, payload) in [(frame::ETH_ARP, frame::arp_reply(a.mac, a.v4, b.mac, b.v4)), (0x88cc, vec![0; 46])] {
                stolen.send(&frame::ethernet(to, a.mac, kind, &payload));
            }
            stolen.send(&frame::ethernet(
                to,
                a.mac,
                frame::ETH_VLAN,
                &frame::vlan(0, frame::ETH_ARP, &frame::arp_reply(a.mac, a.v4, b.mac, b.v4)),
            ));
            let marker = format!("lab-for-a-{}-{n:02}", thief.port);
            wire.send(&datagram(b.mac, b.v4.into(), (&a, a.v4.into()), marker.as_bytes()));
            assert!(far.sees(PATIENTLY, marker.as_bytes()), "{} took it by a frame to {}", thief.port, mac_text(to));
        }
    }
}

#[test]
fn a_mac_address_is_tied_to_its_port_while_it_is_bound_and_others_entries_stay() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    fdb(&host, &format!("replace 02:00:00:00:00:99 dev {} master static sticky", b.port));
    let before = sticky(&host);
    assert_eq!(before.len(), 1);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let mut first = enforcer(&host);
    assert_eq!(apply(&mut first, &policy.bind(&inventory)).adrift, Default::default());
    let tied = sticky(&host);
    for member in [&a, &b] {
        let entry = format!("{} dev {} ", mac_text(member.mac), member.port);
        assert!(tied.iter().any(|line| line.starts_with(&entry)), "{tied:?}");
    }
    assert_eq!(apply(&mut first, &policy.bind(&inventory)).adrift, Default::default());

    fdb(&host, &format!("del {} dev {} master", mac_text(a.mac), a.port));
    let drift = first.verify().unwrap();
    assert_eq!(drift, vec![Drift::Station { port: a.port.clone(), mac: a.mac }]);
    first.repair(&policy.bind(&inventory)).unwrap();
    assert_eq!((sticky(&host).len(), first.verify().unwrap()), (3, vec![]));

    let learns_again = |how: &str| drop(host.check(Command::new("bridge").args(["link", "set", "dev", &a.port]).args(how.split(' '))));
    for how in ["learning on", "mcast_router 1"] {
        learns_again(how);
        assert_eq!(first.verify().unwrap(), vec![Drift::Learns { port: a.port.clone() }], "{how}");
        first.repair(&policy.bind(&inventory)).unwrap();
        assert_eq!(first.verify().unwrap(), vec![], "{how}");
    }
    // The same while no agent lives.
    learns_again("learning on");
    drop(first);
    let mut first = enforcer(&host);
    apply(&mut first, &policy.bind(&inventory));
    assert_eq!((sticky(&host).len(), first.verify().unwrap()), (3, vec![]));

    // A killed agent, and a next one with a plan that guards nothing any more.
    drop(first);
    let mut second = enforcer(&host);
    apply(&mut second, &Policy::default().mode(Mode::Audit, &["a", "b"]).bind(&inventory));
    assert_eq!(sticky(&host), before, "not guarded: as it was");
    apply(&mut second, &policy.bind(&inventory));
    assert_eq!(sticky(&host).len(), 3);
    drop(second);
    enforcer(&host).remove().unwrap();
    assert_eq!(sticky(&host), before, "down: as it was");
}

#[test]
fn who_is_bound_is_reached_at_once_and_its_port_is_tied_when_the_bridges_follow() {
    needs_root!();
    node!(host, bridge: a, b);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80");
    let [alone, both] = [vec![("a", &a)], vec![("a", &a), ("b", &b)]].map(|members| policy.bind(&inventory(&[(&bridge, &members)])));
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let opens = || a.netns.connect(SocketAddr::new(b.v4.into(), 80), Duration::from_millis(700)).is_ok();
    let reached = || a.netns.connect(SocketAddr::new(b.v4.into(), 80), Duration::from_secs(5)).is_ok();
    let tied = |member: &Member| sticky(&host).iter().any(|line| line.starts_with(&mac_text(member.mac)));
    let learns = |member: &Member| host.ip(&format!("-d link show {}", member.port)).contains("learning on");
    let mut enforcer = enforcer(&host);
    // Once before, so that every set is there and elements are all that comes.
    apply(&mut enforcer, &both);
    apply(&mut enforcer, &alone);
    assert!(!opens() && !tied(&b) && learns(&b));

    let comes = Change::between(&alone, &both);
    enforcer.begin(&both, &comes).unwrap();
    assert!(reached() && !tied(&b) && learns(&b) && !enforcer.is_settled());
    assert_eq!(enforcer.verify().unwrap(), vec![], "what is still to be done is no drift");
    assert_eq!(enforcer.settle(&both).unwrap(), Default::default());
    assert!(reached() && tied(&b) && !learns(&b) && enforcer.is_settled());

    let goes = Change::between(&both, &alone);
    enforcer.begin(&alone, &goes).unwrap();
    assert!(!opens() && tied(&b));
    // Came and went before anybody looked.
    enforcer.begin(&both, &comes).unwrap();
    enforcer.begin(&alone, &goes).unwrap();
    enforcer.settle(&alone).unwrap();
    assert!(tied(&a) && !tied(&b) && learns(&b));
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn a_port_that_takes_anothers_name_is_not_taken_for_it() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").bind(&inventory);
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &bound);
    let opens = || a.netns.connect(SocketAddr::new(b.v4.into(), 80), Duration::from_millis(700)).is_ok();
    let reached = || a.netns.connect(SocketAddr::new(b.v4.into(), 80), Duration::from_secs(5)).is_ok();
    let rename = |from: &str, to: &str| {
        host.ip(&format!("link set {from} down"));
        host.ip(&format!("link set {from} name {to}"));
        host.ip(&format!("link set {to} up"));
    };
    assert!(reached());

    for (one, two, works) in [(&a.port, &b.port, false), (&b.port, &a.port, true)] {
        rename(one, "aside");
        rename(two, one);
        rename("aside", two);
        let drift = enforcer.verify().unwrap();
        for port in [&a.port, &b.port] {
            assert!(drift.contains(&Drift::Port { port: port.clone() }), "{drift:?}");
        }
        enforcer.repair(&bound).unwrap();
        assert_eq!(enforcer.verify().unwrap(), vec![]);
        assert_eq!(if works { reached() } else { opens() }, works, "bound is who has the name now");
    }
}

#[test]
fn who_has_the_bridges_own_mac_address_does_not_take_it_from_the_node() {
    needs_root!();
    node!(host, bridge: a, b);
    host.ip(&format!("link set br0 address {}", mac_text(b.mac)));
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).egress("a", "host:", "icmp/8");
    let applied = apply(&mut enforcer, &policy.bind(&inventory));
    assert_eq!(applied.adrift, [b.port.clone()].into());
    assert_eq!(a.netns.ping(bridge.gateway_v4().into()), Echo::Answered);
}

#[test]
fn the_node_does_not_believe_a_port_that_is_not_bound_and_believes_one_that_is() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    settled(&host);
    host.set_sysctl("net.ipv4.neigh.br0.locktime", "0");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).ingress("b", "host:", "icmp/8").ingress("b", "host:", "udp/53");
    apply(&mut enforcer, &policy.ingress("b", "host:", "icmpv6/128").egress("a", "host:", "icmp/8").bind(&inventory));
    let gateway = mac_of(&host, "br0");
    let (wire, far) = (Frames::open(&unbound.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    for at in b.addresses() {
        assert_eq!(host.ping(at), Echo::Answered, "the node knows {at}");
    }

    let arp = frame::arp_reply(unbound.mac, b.v4, gateway, bridge.gateway_v4());
    let body = [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &b.v6.octets(), &[2, 1], &unbound.mac].concat();
    let claim = icmpv6(b.v6, bridge.gateway_v6(), &body);
    for to in [gateway, [0xff; 6]] {
        wire.send(&frame::ethernet(to, unbound.mac, frame::ETH_ARP, &arp));
        wire.send(&frame::ethernet(to, unbound.mac, frame::ETH_VLAN, &frame::vlan(0, frame::ETH_ARP, &arp)));
        wire.send(&frame::ethernet(to, unbound.mac, frame::ETH_IPV6, &claim));
        wire.send(&frame::ethernet(to, unbound.mac, frame::ETH_VLAN, &frame::vlan(0, frame::ETH_IPV6, &claim)));
        for (n, at) in b.addresses().into_iter().enumerate() {
            let marker = format!("lab-node-to-b-{n}{:02x}", to[0]);
            host.udp_send(SocketAddr::new(at, 53), marker.as_bytes());
            let believed = host.ip(&format!("neigh show {at} dev br0"));
            assert!(!believed.contains(&mac_text(unbound.mac)), "{believed}");
            assert!(far.sees(PATIENTLY, marker.as_bytes()), "{at}");
        }
    }
    // And who is bound is believed, from the first question on.
    host.ip("neigh flush dev br0");
    a.netns.ip("neigh flush dev eth0");
    assert_eq!(a.netns.ping(bridge.gateway_v4().into()), Echo::Answered);
}

#[test]
fn what_the_node_sends_reaches_the_port_it_is_for_and_no_other_bound_one() {
    needs_root!();
    node!(host, bridge: a, b);
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).ingress("b", "host:", "udp/53").ingress("a", "host:", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));
    for (at, mac) in b.addresses().into_iter().map(|at| (at, b.mac)) {
        host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", mac_text(mac)));
    }
    let (own, others) = (Frames::open(&b.netns, "eth0"), Frames::open(&a.netns, "eth0"));
    // Where a MAC address is unknown to the bridge it sends to all ports; so it does after an administrator's flush.
    fdb(&host, &format!("del {} dev {} master", mac_text(b.mac), b.port));
    for (n, at) in b.addresses().into_iter().enumerate() {
        let marker = format!("lab-flooded-{n}");
        host.udp_send(SocketAddr::new(at, 53), marker.as_bytes());
        assert!(own.sees(PATIENTLY, marker.as_bytes()), "{at}");
        assert!(!others.sees(BRIEFLY, marker.as_bytes()), "{at}");
    }
    // Or somebody made the bridge believe that it is at another port.
    fdb(&host, &format!("replace {} dev {} master static", mac_text(b.mac), a.port));
    for at in b.addresses() {
        host.udp_send(SocketAddr::new(at, 53), b"lab-led-astray");
        assert!(!others.sees(BRIEFLY, b"lab-led-astray"), "{at}");
    }
}

#[test]
fn ip_to_the_addresses_of_bridge_protocols_does_not_reach_the_node() {
    needs_root!();
    node!(host, bridge: a, b);
    let unbound = bridge.add("unbound");
    settled(&host);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let gateways: [IpAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()];
    let [sinks, allowed] = [54, 53].map(|port| gateways.map(|at| Server::udp_sink(&host, SocketAddr::new(at, port))));
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).egress("b", "host:", "udp/53").bind(&inventory));

    for member in [&a, &unbound] {
        let wire = Frames::open(&member.netns, "eth0");
        for last in 0..16 {
            for (from, to) in member.addresses().into_iter().zip(gateways) {
                let packet = frame::ip(from, to, frame::PROTO_UDP, &frame::udp((from, 5000), (to, 54), b"around the bridge"));
                let kind = if to.is_ipv4() { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
                wire.send(&frame::ethernet([1, 0x80, 0xc2, 0, 0, last], member.mac, kind, &packet));
            }
        }
    }
    // What came before has arrived when this has.
    for (server, at) in allowed.iter().zip(gateways) {
        lab::eventually(PATIENTLY, || {
            b.netns.udp_send(SocketAddr::new(at, 53), b"allowed");
            if server.heard() > 0 { Ok(()) } else { Err(format!("{at} hears nothing")) }
        });
    }
    std::thread::sleep(BRIEFLY);
    assert_eq!(sinks.map(|sink| sink.heard()), [0, 0]);
}
