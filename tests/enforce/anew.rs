//! A guarded network that is made anew under another bridge while nobody looks; and who has the same addresses and was there before.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::{Bridge, Echo, Frames, Member, Netns, Server, needs_root};
use node_agent::enforce::Enforcer;
use policy::Mode;

use crate::guard::datagram;
use crate::stage::{Policy, apply, enforcer, inventory, node_bridge, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(20);
const SUBNETS: (&str, &str) = ("10.1.0.0/24", "2001:db8:1::/64");

/// What a container's kernel makes of its MAC address (RFC 4291, appendix A).
pub(crate) fn link_local([a, b, c, d, e, f]: [u8; 6]) -> IpAddr {
    IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The bridge and its members go, and another one takes the subnet over.
fn made_anew<'h>(host: &'h Netns, old: (Bridge<'_>, [Member; 2])) -> (Bridge<'h>, [Member; 2]) {
    for member in &old.1 {
        host.ip(&format!("link del {}", member.port));
    }
    host.ip(&format!("link del {}", old.0.name));
    drop(old);
    let mut bridge = Bridge::new(host, "br-anew", SUBNETS.0, SUBNETS.1);
    let members = ["a", "b"].map(|name| bridge.add(name));
    settled(host);
    (bridge, members)
}

#[test]
fn a_guarded_network_made_anew_under_another_name_is_closed_until_it_is_bound_again() {
    needs_root!();
    node!(host, bridge: a, b);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").allow("a", "b", "udp/53");
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &policy.bind(&inventory(&[(&bridge, &[("a", &a), ("b", &b)])])));
    let (bridge, [a, b]) = made_anew(&host, (bridge, [a, b]));
    let at = |port| b.addresses().map(|at| SocketAddr::new(at, port));
    let _servers: Vec<_> = at(80).into_iter().map(|at| Server::tcp_echo(&b.netns, at)).collect();
    let _echoes: Vec<_> = at(53).into_iter().map(|at| Server::udp_echo(&b.netns, at)).collect();
    let node = [bridge.gateway_v4().into(), bridge.gateway_v6().into()].map(|at| SocketAddr::new(at, 80));
    let _node: Vec<_> = node.into_iter().map(|at| Server::tcp_echo(&host, at)).collect();
    let passes = |from: &Netns, to: [SocketAddr; 2]| to.map(|to| from.tcp(to).is_open());

    for on in [true, false] {
        bridge.set_nf_call(on);
        assert_eq!(passes(&a.netns, at(80)), [false; 2], "netfilter on: {on}");
        assert_eq!(at(53).map(|to| a.netns.udp_echo(to, b"anew")), [Echo::Silent; 2], "netfilter on: {on}");
        assert_eq!(passes(&a.netns, node), [false; 2], "to the node; netfilter on: {on}");
        assert_eq!(passes(&host, at(80)), [false; 2], "from the node; netfilter on: {on}");
        // Nor from an address of nobody's, nor by what the kernel gives each container itself.
        let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
        for (from, to) in [("203.0.113.7".parse().unwrap(), b.v4.into()), (link_local(a.mac), link_local(b.mac))] {
            wire.send(&datagram(a.mac, from, (&b, to), b"lab-made-anew-addr"));
            assert!(!far.sees(BRIEFLY, b"lab-made-anew-addr"), "{from}; netfilter on: {on}");
        }
    }

    bridge.set_nf_call(true);
    apply(&mut enforcer, &policy.bind(&inventory(&[(&bridge, &[("a", &a), ("b", &b)])])));
    assert_eq!(passes(&a.netns, at(80)), [true; 2], "bound again");
    assert_eq!(passes(&host, at(80)), [false; 2], "bound again, and not allowed");
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn another_ones_bridge_with_the_same_subnet_that_was_there_before_goes_on() {
    needs_root!();
    node!(host, bridge: a, b);
    // A bridge for virtual machines, on which the node has no address.
    let mut theirs = Bridge::new(&host, "virbr7", SUBNETS.0, SUBNETS.1);
    host.ip("addr flush dev virbr7");
    let (x, y) = (theirs.add("x"), theirs.add("y"));
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut seen = node_bridge(&theirs);
    seen.addresses.clear();
    inventory.bridges.insert(theirs.name.clone(), seen);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &policy.bind(&inventory));

    let _servers: Vec<_> = y.addresses().map(|at| Server::tcp_echo(&y.netns, SocketAddr::new(at, 80))).into();
    for on in [true, false] {
        theirs.set_nf_call(on);
        let open = y.addresses().map(|at| x.netns.tcp(SocketAddr::new(at, 80)).is_open());
        assert_eq!(open, [true; 2], "netfilter on: {on}");
        // One that comes while nobody looks: with those that were there it talks all the same.
        let late = theirs.add_at("late", 40 + u32::from(on));
        for at in y.addresses() {
            let to = SocketAddr::new(at, 80);
            lab::eventually(PATIENTLY, || match late.netns.tcp(to).is_open() {
                true => Ok(()),
                false => Err(format!("a newcomer to {to}; netfilter on: {on}")),
            });
        }
    }
}

#[test]
fn two_containers_that_are_both_not_bound_do_not_talk_where_netfilter_is_off() {
    needs_root!();
    node!(host, bridge: a);
    let bound = inventory(&[(&bridge, &[("a", &a)])]);
    let (x, y) = (bridge.add("x"), bridge.add("y"));
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).bind(&bound));
    let _servers: Vec<_> = y.addresses().map(|at| Server::tcp_echo(&y.netns, SocketAddr::new(at, 80))).into();
    for on in [true, false] {
        bridge.set_nf_call(on);
        let open = y.addresses().map(|at| x.netns.tcp(SocketAddr::new(at, 80)).is_open());
        assert_eq!(open, [false; 2], "netfilter on: {on}");
    }
}
