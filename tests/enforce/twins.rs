//! Two guarded bridges with one subnet: to connection tracking their connections are the same, to their policies they are not.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::frame::Frames;
use lab::{Bridge, Echo, Internet, Member, Netns, Server, needs_root};
use policy::Mode;

use crate::hostile::udp;
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);
/// The client's port.
const CLIENT: u16 = 5000;

const V4: &str = "10.1.0.0/24";
const V6: &str = "2001:db8:1::/64";

/// The same addresses on both: `a` has those of `c`, `b` those of `d`. The node's routes lead to the first one.
struct Twins<'h> {
    one: Bridge<'h>,
    two: Bridge<'h>,
    a: Member,
    b: Member,
    c: Member,
    d: Member,
}

impl<'h> Twins<'h> {
    fn on(host: &'h Netns) -> Self {
        let (mut one, mut two) = (Bridge::new(host, "br0", V4, V6), Bridge::new(host, "br1", V4, V6));
        let (a, b, c, d) = (one.add("a"), one.add("b"), two.add("c"), two.add("d"));
        settled(host);
        Self { one, two, a, b, c, d }
    }

    fn inventory(&self) -> policy::Inventory {
        inventory(&[(&self.one, &[("a", &self.a), ("b", &self.b)]), (&self.two, &[("c", &self.c), ("d", &self.d)])])
    }
}

fn all() -> Policy {
    Policy::default().mode(Mode::Enforce, &["a", "b", "c", "d"])
}

#[test]
fn what_one_of_two_bridges_with_one_subnet_allows_passes_on_that_one_alone() {
    needs_root!();
    let host = Netns::new("host");
    let twins = Twins::on(&host);
    let Twins { a, b, c, d, .. } = &twins;
    let mut enforcer = enforcer(&host);
    let policy = all().allow("c", "d", "udp/53").egress("c", "host:", "udp/54");
    apply(&mut enforcer, &policy.bind(&twins.inventory()));
    let [wa, wb, wc, wd] = [a, b, c, d].map(|member| Frames::open(&member.netns, "eth0"));
    let gateways: [IpAddr; 2] = [twins.one.gateway_v4().into(), twins.one.gateway_v6().into()];

    for ((from, to), at) in a.addresses().into_iter().zip(b.addresses()).zip(gateways) {
        let (ask, answer) = ((from, CLIENT), (to, 53));
        wc.send(&udp(c.mac, d.mac, ask, answer, b"lab-a-question"));
        assert!(wd.sees(PATIENTLY, b"lab-a-question"), "{to}");
        wa.send(&udp(a.mac, b.mac, ask, answer, b"lab-on-the-other-one"));
        assert!(!wb.sees(BRIEFLY, b"lab-on-the-other-one"), "{to}, unanswered");
        wd.send(&udp(d.mac, c.mac, answer, ask, b"lab-an-answer"));
        assert!(wc.sees(PATIENTLY, b"lab-an-answer"), "{to}");
        wa.send(&udp(a.mac, b.mac, ask, answer, b"lab-on-the-other-one"));
        assert!(!wb.sees(BRIEFLY, b"lab-on-the-other-one"), "{to}, answered");
        wb.send(&udp(b.mac, a.mac, answer, ask, b"lab-an-answer-to-nobody"));
        assert!(!wa.sees(BRIEFLY, b"lab-an-answer-to-nobody"), "{to}");

        let node = Server::udp_sink(&host, (at, 54).into());
        let own = |bridge| mac_of(&host, bridge);
        wc.send(&udp(c.mac, own("br1"), ask, (at, 54), b"lab-to-the-node"));
        lab::eventually(PATIENTLY, || if node.heard() == 1 { Ok(()) } else { Err(format!("{at} hears {}", node.heard())) });
        wa.send(&udp(a.mac, own("br0"), ask, (at, 54), b"lab-to-the-node"));
        std::thread::sleep(BRIEFLY);
        assert_eq!(node.heard(), 1, "{from} on the other bridge -> {at}");
    }
}

#[test]
fn on_both_of_two_bridges_with_one_subnet_what_is_allowed_is_answered() {
    needs_root!();
    let host = Netns::new("host");
    let twins = Twins::on(&host);
    let Twins { a, b, c, d, .. } = &twins;
    let internet = Internet::behind(&host);
    internet.netns.ip("route add default via 203.0.113.2");
    internet.netns.ip("-6 route add default via 2001:db8:ffff::2");
    settled(&host);
    settled(&internet.netns);
    let mut enforcer = enforcer(&host);
    let mut policy = all().egress("a", "host:", "tcp/80").egress("c", "outside:203.0.113.0/24", "udp/53");
    policy = policy.egress("c", "outside:2001:db8:ffff::/64", "udp/53");
    for ports in ["tcp/80", "udp/53", "icmp/8", "icmpv6/128"] {
        policy = policy.allow("a", "b", ports).allow("c", "d", ports);
        for net in ["203.0.113.0/24", "2001:db8:ffff::/64"] {
            if ports.starts_with("icmp") {
                policy = policy.egress("a", &format!("outside:{net}"), ports);
            }
            policy = policy.ingress("b", &format!("outside:{net}"), ports);
        }
    }
    apply(&mut enforcer, &policy.bind(&twins.inventory()));
    let [wa, wb, wc, wd] = [a, b, c, d].map(|member| Frames::open(&member.netns, "eth0"));
    let gateways: [IpAddr; 2] = [twins.one.gateway_v4().into(), twins.one.gateway_v6().into()];
    let outside = ["203.0.113.1", "2001:db8:ffff::1"].map(|at| at.parse::<IpAddr>().unwrap());
    let out = Frames::open(&internet.netns, "down0");

    for (((from, to), at), server) in a.addresses().into_iter().zip(b.addresses()).zip(gateways).zip(outside) {
        for (client, far) in [(a, b), (c, d)] {
            let _server = Server::tcp_echo(&far.netns, SocketAddr::new(to, 80));
            assert!(client.netns.tcp_echo(SocketAddr::new(to, 80), b"hello"), "{}: {to}", far.port);
        }
        assert_eq!(c.netns.ping(to), Echo::Answered, "{to}");
        // The very same flow at once.
        for (near, far, macs) in [(&wc, &wd, [c.mac, d.mac]), (&wa, &wb, [a.mac, b.mac])] {
            near.send(&udp(macs[0], macs[1], (from, CLIENT), (to, 53), b"lab-a-question"));
            assert!(far.sees(PATIENTLY, b"lab-a-question"), "{to}");
            far.send(&udp(macs[1], macs[0], (to, 53), (from, CLIENT), b"lab-an-answer"));
            assert!(near.sees(PATIENTLY, b"lab-an-answer"), "{to}");
        }
        let _node = Server::tcp_echo(&host, SocketAddr::new(at, 80));
        assert!(a.netns.tcp_echo(SocketAddr::new(at, 80), b"hello"), "{at}");
        assert_eq!(internet.netns.ping(to), Echo::Answered, "{to} from outside");
        assert_eq!(a.netns.ping(server), Echo::Answered, "{server}");
        // What the one began outside is not answered to the other, to which the node's route leads, nor goes on from there.
        wc.send(&udp(c.mac, mac_of(&host, "br1"), (from, CLIENT), (server, 53), b"lab-a-question-outside"));
        assert!(out.sees(PATIENTLY, b"lab-a-question-outside"), "{server}");
        let (mac, gateway) = (mac_of(&internet.netns, "down0"), mac_of(&host, "up0"));
        out.send(&udp(mac, gateway, (server, 53), (from, CLIENT), b"lab-an-answer-outside"));
        assert!(!wa.sees(BRIEFLY, b"lab-an-answer-outside"), "{server} -> {from}");
        wa.send(&udp(a.mac, mac_of(&host, "br0"), (from, CLIENT), (server, 53), b"lab-goes-on-outside"));
        assert!(!out.sees(BRIEFLY, b"lab-goes-on-outside"), "{from} -> {server}");
    }
}
