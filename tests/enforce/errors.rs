//! DESIGN "Related": ICMP errors from the gateway or from an end that the receiver may talk to; redirects never.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Echo, Member, Server, needs_root};
use policy::Mode;

use crate::stage::{Policy, apply, enforcer, inventory};

/// An ICMP message of this type and code that quotes a packet.
pub(crate) fn quoting(from: IpAddr, to: IpAddr, kind: u8, code: u8, quoted: &[u8]) -> Vec<u8> {
    let mut body = [&[kind, code, 0, 0, 0, 0, 0, 0][..], &quoted[..quoted.len().min(68)]].concat();
    let protocol = match (from, to) {
        (IpAddr::V4(_), _) => {
            let sum = frame::checksum(&body);
            body[2..4].copy_from_slice(&sum.to_be_bytes());
            frame::PROTO_ICMP
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let pseudo = [&from.octets()[..], &to.octets(), &(body.len() as u32).to_be_bytes(), &[0, 0, 0, 58], &body].concat();
            body[2..4].copy_from_slice(&frame::checksum(&pseudo).to_be_bytes());
            frame::PROTO_ICMPV6
        }
        (IpAddr::V6(_), IpAddr::V4(_)) => panic!("two families"),
    };
    frame::ip(from, to, protocol, &body)
}

/// Whether an error from `sender` that quotes the connection `a` -> `b` reaches `a`.
fn reaches(sender: &Member, a: &Member, b: &Member, n: usize, port: u16, kind: u8) -> bool {
    let (far, wire) = (Frames::open(&a.netns, "eth0"), Frames::open(&sender.netns, "eth0"));
    let (from, to) = (a.addresses()[n], b.addresses()[n]);
    let quoted = frame::ip(from, to, frame::PROTO_TCP, &frame::tcp((from, port), (to, 80), 1, 16));
    let packet = quoting(sender.addresses()[n], from, kind, 1, &quoted);
    let ether = if n == 0 { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
    wire.send(&frame::ethernet(a.mac, sender.mac, ether, &packet));
    // From the addresses on: a router would change what is before.
    far.sees(Duration::from_millis(300), &packet[if n == 0 { 12 } else { 8 }..])
}

#[test]
fn forged_icmp_errors_of_a_third_container_do_not_pass_and_the_servers_own_do() {
    needs_root!();
    node!(host, bridge: a, b, forger, friend);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("forger", &forger), ("friend", &friend)])]);
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "forger"]).allow("a", "b", "tcp/80").allow("forger", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    for n in 0..2 {
        let stream = a.netns.connect(SocketAddr::new(b.addresses()[n], 80), lab::probe::PATIENCE).unwrap();
        let port = stream.local_addr().unwrap().port();
        // Destination unreachable, time exceeded; in v6 also packet too big, parameter problem.
        let kinds: &[u8] = if n == 0 { &[3, 11, 12] } else { &[1, 2, 3, 4] };
        for &kind in kinds {
            assert!(!reaches(&forger, &a, &b, n, port, kind), "a third container's, type {kind}");
            assert!(!reaches(&friend, &a, &b, n, port, kind), "of one in Learn, which a may not talk to, type {kind}");
            assert!(reaches(&b, &a, &b, n, port, kind), "the server's own, type {kind}");
        }
        let redirect = if n == 0 { 5 } else { 137 };
        assert!(!reaches(&b, &a, &b, n, port, redirect), "a redirect never");
    }
}

#[test]
fn an_error_of_the_server_fails_the_client_at_once() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/9");
    apply(&mut enforcer, &policy.bind(&inventory));
    for at in b.addresses() {
        assert_eq!(a.netns.udp_echo(SocketAddr::new(at, 9), b"nobody listens"), Echo::Refused, "{at}");
    }
}
