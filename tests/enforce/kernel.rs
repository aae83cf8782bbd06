//! One transaction, read back, owned, repaired, undone: what the kernel holds and who may change it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use lab::{Server, needs_root};
use node_agent::enforce::watch::Watcher;
use node_agent::enforce::{Drift, EnforceError, Enforcer, Nftables, Ownership};
use policy::Mode;

use crate::stage::{Policy, apply, chain, enforcer, inventory};

/// What every engine's host has: other people's tables.
const OTHERS: &str =
    "table ip filter { chain FORWARD { type filter hook forward priority filter; policy accept; counter comment \"theirs\"; }; };
    table inet theirs { set s { type ipv4_addr; elements = { 192.0.2.1 }; }; }";

#[test]
fn applying_twice_writes_nothing_and_a_change_writes_only_its_elements() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "tcp/80");

    let first = apply(&mut enforcer, &policy.bind(&inventory));
    assert!(first.rules_written);
    let again = apply(&mut enforcer, &policy.bind(&inventory));
    assert_eq!((again.changed, again.rules_written, again.generation_id), (0, false, first.generation_id));

    let more = policy.clone().allow("c", "b", "tcp/81");
    let second = apply(&mut enforcer, &more.bind(&inventory));
    // Two families, two sides, and who may send ICMP errors to whom.
    assert_eq!((second.changed, second.rules_written, second.generation_id), (8, false, first.generation_id + 1));
    let back = apply(&mut enforcer, &policy.bind(&inventory));
    assert_eq!((back.changed, back.rules_written), (8, false));
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn undo_leaves_no_trace_and_other_tables_are_never_touched() {
    needs_root!();
    node!(host, bridge: a, b);
    host.nft(OTHERS);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let before = host.ruleset();
    let mut enforcer = enforcer(&host);
    for policy in [
        Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80"),
        Policy::default().mode(Mode::Audit, &["a", "b"]).allow("a", "b", "udp/1-9").egress("a", "outside:192.0.2.0/24", "sctp/5"),
        Policy::default(),
    ] {
        apply(&mut enforcer, &policy.bind(&inventory));
        let listed = host.ruleset();
        for table in ["table ip filter", "table inet theirs"] {
            let of = |text: &str| text[text.find(table).unwrap()..].split("\n}\n").next().unwrap().to_owned();
            assert_eq!(of(&listed), of(&before));
        }
    }
    assert_eq!(enforcer.remove().unwrap().len(), 3);
    assert_eq!(host.ruleset(), before);
    assert_eq!(enforcer.remove().unwrap(), Vec::<String>::new(), "nothing is left to take away");
}

#[test]
fn nobody_else_can_change_the_tables_while_their_socket_lives() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);
    if apply(&mut enforcer, &bound).ownership == Ownership::Shared {
        lab::skip!("this kernel knows no owned tables");
    }
    let nft = |words: &str| host.output(Command::new("nft").args(words.split(' '))).status.success();

    assert!(!nft("delete table inet bulkhead"));
    assert!(!nft("flush chain inet bulkhead judge"));
    assert!(!nft("add element inet bulkhead watched { br7 }"));
    assert!(nft("flush ruleset"), "skips what is owned");
    assert_eq!(enforcer.verify().unwrap(), vec![]);

    let mut second = host.run(|| Nftables::open().unwrap());
    let refused = second.apply(&bound).unwrap_err();
    assert!(matches!(refused, EnforceError::OwnedByAnother { owner, .. } if owner == enforcer.owner()), "{}", chain(&refused));
    assert!(matches!(second.remove().unwrap_err(), EnforceError::OwnedByAnother { .. }));
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn what_a_killed_agent_enforced_stays_is_adopted_and_can_be_taken_away_by_a_fresh_one() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let before = host.ruleset();
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);
    let closed = || !a.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open();
    let mut first = enforcer(&host);
    apply(&mut first, &bound);
    // The kernel sees a killed process as a closed socket.
    drop(first);
    assert!(closed(), "fails static");

    let mut second = enforcer(&host);
    let adopted = apply(&mut second, &bound);
    assert!(adopted.rules_written && closed());
    drop(second);
    assert!(closed());

    assert_eq!(enforcer(&host).remove().unwrap().len(), 3);
    assert_eq!(host.ruleset(), before);
    assert!(!closed());
}

#[test]
fn a_copy_of_the_socket_keeps_the_tables_owned_and_hands_them_on() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);
    let mut first = enforcer(&host);
    if apply(&mut first, &bound).ownership == Ownership::Shared {
        lab::skip!("this kernel knows no owned tables");
    }
    let copy = first.socket().as_fd().try_clone_to_owned().unwrap();
    drop(first);
    assert!(!host.output(Command::new("nft").args(["delete", "table", "inet", "bulkhead"])).status.success(), "never an orphan");

    let mut next = host.run(|| Nftables::resume(copy).unwrap());
    apply(&mut next, &bound);
    assert_eq!(next.verify().unwrap(), vec![]);
    assert_eq!(next.remove().unwrap().len(), 3);
}

#[test]
fn drift_is_found_in_every_part_and_repaired() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").bind(&inventory);
    let mut enforcer = enforcer(&host).shared();
    assert_eq!(apply(&mut enforcer, &bound).ownership, Ownership::Shared);

    for (change, found) in [
        ("add element inet bulkhead bridges { eth7 }", "element eth7 is not ours"),
        ("flush set inet bulkhead egress_tcp4", "is gone"),
        ("flush chain inet bulkhead sides", "the rules of chain sides were changed"),
        ("insert rule inet bulkhead forward accept", "the rules of chain forward were changed"),
        ("add chain inet bulkhead extra", "chain extra is not ours"),
        ("flush set bridge bulkhead ports", "table bridge bulkhead: set ports: element"),
        ("delete element bridge bulkhead macs { vbr0-2 . 02:42:0a:01:00:02 }", "is gone"),
        ("flush set arp bulkhead guarded", "set guarded: element br0 is gone"),
        ("delete table arp bulkhead", "table arp bulkhead is gone"),
        ("delete table bridge bulkhead", "table bridge bulkhead is gone"),
        ("delete table inet bulkhead", "table inet bulkhead is gone"),
        ("flush ruleset", "is gone"),
    ] {
        host.nft(change);
        let drift: Vec<_> = enforcer.verify().unwrap().iter().map(Drift::to_string).collect();
        assert!(drift.iter().any(|one| one.contains(found)), "{change}: {drift:?}");
        enforcer.repair(&bound).unwrap_or_else(|error| panic!("{change}: {}", chain(&error)));
        assert_eq!(enforcer.verify().unwrap(), vec![], "{change}");
    }
}

#[test]
fn a_foreign_change_of_our_tables_is_told_with_who_made_it() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);
    let mut enforcer = enforcer(&host).shared();
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut watcher = Watcher::open().unwrap();
            apply(&mut enforcer, &bound);
            let own = tokio::time::timeout(Duration::from_secs(2), watcher.changed()).await.unwrap().unwrap();
            assert_eq!(own.by, Some(enforcer.owner()));
            host.nft(OTHERS);
            host.nft("flush chain inet bulkhead sides");
            let foreign = tokio::time::timeout(Duration::from_secs(2), watcher.changed()).await.unwrap().unwrap();
            assert_ne!(foreign.by, Some(enforcer.owner()), "other people's tables are not told: {foreign:?}");
            assert_eq!(foreign.process.1, "nft");
        });
    });
}

#[test]
fn a_bridge_that_is_not_there_is_named_and_the_rest_is_applied() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let leg = &mut inventory.containers.get_mut("a").unwrap().legs[0];
    leg.bridge = "br-gone".into();
    let mut enforcer = enforcer(&host);
    let applied = apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory));
    assert_eq!(applied.absent, BTreeSet::from(["br-gone".to_owned()]));
}

#[test]
fn not_one_packet_passes_while_everything_is_written_anew_again_and_again() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut other = lab::Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let c = other.add("c");
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)]), (&other, &[("c", &c)])]);
    let sinks = [&b, &c].map(|member| Server::udp_sink(&member.netns, SocketAddr::new(member.v4.into(), 9)));
    let bound = Policy::default().silent(&["a", "b", "c"]).bind(&inventory);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &bound);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let socket = a.netns.udp_socket("0.0.0.0:0".parse().unwrap());
            let mut sent = 0_u64;
            while !over.load(std::sync::atomic::Ordering::Relaxed) && sent < 400_000 {
                for member in [&b, &c] {
                    sent += u64::from(socket.send_to(b"now?", SocketAddr::new(member.v4.into(), 9)).is_ok());
                }
            }
            sent
        });
        for round in 0..60 {
            if round % 3 == 0 {
                // A new process finds what a killed one left.
                enforcer = crate::stage::enforcer(&host);
            }
            enforcer.repair(&bound).unwrap_or_else(|error| panic!("{}", chain(&error)));
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        println!("{} packets", flood.join().unwrap());
    });
    assert_eq!(sinks.map(|sink| sink.heard()), [0, 0]);
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn udp_flows_that_were_seen_outlive_a_restart_of_the_agent() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/9").bind(&inventory);
    let mut first = enforcer(&host);
    apply(&mut first, &bound);
    a.netns.udp_send(SocketAddr::new(b.v4.into(), 9), b"hello");
    let seen = || host.check(Command::new("nft").args(["list", "set", "inet", "bulkhead", "udp_seen4"])).contains("10.1.0.2");
    assert!(seen());
    drop(first);
    apply(&mut enforcer(&host), &bound);
    assert!(seen());
}

#[test]
fn a_hundred_thousand_pairs_go_in_at_once_and_one_more_is_one_element() {
    needs_root!();
    let host = lab::Netns::new("host");
    host.ip("link add br0 type bridge");
    let spot = |n: u32| policy::ruleset::Spot { bridge: Some("br0".into()), address: std::net::Ipv4Addr::from(0x0a00_0000 + n).into() };
    let pair = |n: u32| policy::ruleset::Pair {
        direction: policy::policy_set::Direction::Egress,
        local: spot(n / 1000),
        remote: policy::ruleset::Remote::Outside(std::net::IpAddr::from(std::net::Ipv4Addr::from(0xc000_0200 + n % 256)).into()),
        ports: policy::Service::tcp(1 + (n % 1000 / 4) as u16 * 4 + (n % 1000 / 256) as u16).into(),
    };
    let mut bound = policy::Ruleset { pairs: (0..100_000).map(pair).collect(), ..Default::default() };
    bound.watched.insert("br0".into(), policy::ruleset::Watch { guarded: true, ..Default::default() });
    let pairs = bound.pairs.len();
    let mut enforcer = enforcer(&host);
    let started = std::time::Instant::now();
    let first = apply(&mut enforcer, &bound);
    println!("{pairs} pairs: {:?}", started.elapsed());
    assert!(first.changed > pairs);
    bound.pairs.insert(pair(100_000));
    let started = std::time::Instant::now();
    let more = apply(&mut enforcer, &bound);
    println!("one more: {:?}", started.elapsed());
    // The pair, and that its container may send ICMP errors outside.
    assert_eq!(more.changed, 2);
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}
