//! Learn, Audit, Enforce, quarantine: what passes, and what the kernel counts and logs of it.

use std::net::SocketAddr;
use std::process::Command;

use lab::probe::still_echoes;
use lab::{Echo, Netns, Server, Tcp, needs_root};
use node_agent::enforce::living;
use policy::{Mode, Scene};

use crate::stage::{Policy, apply, enforcer, inventory, now};

/// Packets that the rules of a chain have counted.
fn counted(host: &Netns, chain: &str) -> u64 {
    let listed = host.check(Command::new("nft").args(["list", "chain", "inet", "bulkhead", chain]));
    let numbers = listed.split("counter packets ").skip(1);
    numbers.map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
fn audit_passes_and_logs_what_enforce_would_deny() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _servers: Vec<_> =
        b.addresses().into_iter().flat_map(|at| [80, 81].map(|port| Server::tcp_echo(&b.netns, SocketAddr::new(at, port)))).collect();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Audit, &["a", "b"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        assert!(a.netns.tcp_echo(SocketAddr::new(at, 80), b"allowed"), "{at}");
    }
    assert_eq!((counted(&host, "egress_audit"), counted(&host, "ingress_audit")), (0, 0), "what is allowed is not logged");
    for at in b.addresses() {
        assert!(a.netns.tcp_echo(SocketAddr::new(at, 81), b"would be denied"), "{at}");
    }
    assert_eq!((counted(&host, "egress_audit"), counted(&host, "ingress_audit")), (2, 2), "one record a connection and side");
}

#[test]
fn a_mixed_pair_is_denied_by_the_end_in_enforce_alone() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let _servers: Vec<_> = [&b, &c]
        .into_iter()
        .flat_map(|member| member.addresses().map(|at| Server::tcp_echo(&member.netns, SocketAddr::new(at, 80))))
        .collect();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["b"]).mode(Mode::Audit, &["c"]);
    apply(&mut enforcer, &policy.bind(&inventory));
    for n in 0..2 {
        assert!(a.netns.tcp(SocketAddr::new(c.addresses()[n], 80)).is_open(), "Learn to Audit");
        assert!(a.netns.tcp(SocketAddr::new(b.addresses()[n], 80)).is_refused(), "Learn to Enforce");
        assert!(c.netns.tcp(SocketAddr::new(b.addresses()[n], 80)).is_refused(), "Audit to Enforce");
        assert!(b.netns.tcp(SocketAddr::new(c.addresses()[n], 80)).is_refused(), "Enforce to Audit");
    }
}

#[test]
fn a_quarantine_cuts_everything_off_and_a_release_gives_it_back() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").egress("b", "host:", "icmp/8");
    let networks = policy::bind::networks(&inventory);

    for at in b.addresses() {
        let bound = policy.bind(&inventory);
        apply(&mut enforcer, &bound);
        let mut stream = a.netns.connect(SocketAddr::new(at, 80), lab::probe::PATIENCE).unwrap();
        assert!(still_echoes(&mut stream, b"alive"));

        let cut = policy.clone().quarantine("b");
        let bound = cut.bind(&inventory);
        apply(&mut enforcer, &bound);
        let scene = Scene { set: &cut.0, networks: &networks, now: now() };
        let ended = host.run(|| living::revoke(&scene, &bound, &inventory).unwrap());
        assert!(ended >= 1, "{at}");
        assert!(!still_echoes(&mut stream, b"still?"), "living connections too: {at}");
        assert_eq!(a.netns.tcp(SocketAddr::new(at, 80)), Tcp::TimedOut, "{at}");
        assert!(!c.netns.tcp(SocketAddr::new(at, 80)).is_open(), "{at}");
        assert_eq!(b.netns.ping(bridge.gateway_v4().into()), Echo::Silent);

        apply(&mut enforcer, &policy.bind(&inventory));
        assert!(a.netns.tcp(SocketAddr::new(at, 80)).is_open(), "released: {at}");
        assert_eq!(b.netns.ping(bridge.gateway_v4().into()), Echo::Answered);
    }
}
