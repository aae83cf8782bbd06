//! What is switched on to see, watched, and put back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lab::{Bridge, Netns, Server, eventually, needs_root};
use node_agent::observe::table::TABLE;
use node_agent::observe::{Observer, Options, Originals};

use crate::node::{Node, Watching};

const SYSCTLS: [&str; 3] = ["nf_conntrack_acct", "nf_conntrack_timestamp", "nf_conntrack_events"];

fn state(host: &Netns, bridges: &[&str]) -> String {
    let sysctls = SYSCTLS.map(|name| host.sysctl(&format!("net.netfilter.{name}")));
    let links: Vec<_> = bridges.iter().map(|bridge| nf_call(host, bridge)).collect();
    format!("{sysctls:?}\n{links:?}\n{}", host.ruleset())
}

fn nf_call(host: &Netns, bridge: &str) -> Vec<String> {
    let shown = host.ip(&format!("-d link show {bridge}"));
    let words: Vec<_> = shown.split_whitespace().collect();
    words.windows(2).filter(|pair| pair[0].starts_with("nf_call_ip")).map(|pair| pair.join(" ")).collect()
}

fn leads_through(host: &Netns, bridge: &str) {
    eventually(Duration::from_secs(20), || {
        let calls = nf_call(host, bridge);
        if calls == ["nf_call_iptables 1", "nf_call_ip6tables 1"] { Ok(()) } else { Err(format!("{calls:?}")) }
    });
}

#[test]
fn everything_is_put_back_as_it_was() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    bridge.set_nf_call(false);
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let before = state(&host, &["br0"]);
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    leads_through(&host, "br0");
    let during = state(&host, &["br0"]);
    assert_ne!(before, during);
    assert!(during.contains(TABLE));
    watching.stop();
    assert_eq!(state(&host, &["br0"]), before);
}

#[test]
fn same_bridge_traffic_is_seen_though_the_bridges_switch_was_off_and_is_turned_off_again() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    bridge.set_nf_call(false);
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    leads_through(&host, "br0");
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    watching.until("a -> b tcp/80", |seen| seen.established == 1);
    bridge.set_nf_call(false);
    leads_through(&host, "br0");
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    watching.until("a -> b tcp/80", |seen| seen.established == 2);
    assert_eq!(watching.account().repaired.values().sum::<u64>(), 1, "{:?}", watching.account());
}

#[test]
fn a_bridge_that_comes_later_is_switched_on_too() {
    needs_root!();
    let host = Netns::new("host");
    let first = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let mut watching = Node::with(&[&first]).observe(&host);
    let mut later = Bridge::new(&host, "br1", "10.9.2.0/24", "fd09:2::/64");
    later.set_nf_call(false);
    let (a, b) = (later.add("a"), later.add("b"));
    watching.now(|_| Node::with(&[&first, &later]).runs("a", &later, &a).runs("b", &later, &b));
    leads_through(&host, "br1");
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    watching.until("a -> b tcp/80", |seen| seen.established == 1);
}

#[test]
fn a_second_observer_is_refused_and_leaves_the_first_alone() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    let (_sender, receiver) = tokio::sync::watch::channel(std::sync::Arc::default());
    let second = host.run(|| Observer::start(node_agent::observe::Options::default(), receiver).map(|_| ()));
    assert!(second.unwrap_err().to_string().contains("another process"));
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    watching.until("a -> b tcp/80", |seen| seen.established == 1);
}

#[test]
fn nobody_can_flush_the_observation_away() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    host.output(std::process::Command::new("nft").args(["flush", "ruleset"]));
    let _server = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
    watching.until("a -> b tcp/80", |seen| seen.established == 1);
}

/// What an agent keeps on its disk.
type Disk = Arc<Mutex<Originals>>;

/// The next agent on a node, with what the one before kept.
fn agent(host: &Netns, disk: &Disk, bridges: &[&Bridge<'_>]) -> Watching {
    let (originals, kept) = (disk.lock().unwrap().clone(), Arc::clone(disk));
    let keep = Box::new(move |originals: &Originals| {
        *kept.lock().unwrap() = originals.clone();
        Ok(())
    });
    let mut watching = Node::with(bridges).observe_with(host, Options { originals, keep, ..Options::default() });
    eventually(Duration::from_secs(10), || {
        let on = bridges.iter().all(|bridge| disk.lock().unwrap().on.bridges.contains_key(&bridge.name));
        let round = watching.account().room.1 > 0;
        if on && round { Ok(()) } else { Err(format!("{:?}", disk.lock().unwrap())) }
    });
    watching
}

#[test]
fn what_was_switched_off_while_no_agent_lived_is_told_by_the_next_one_and_not_after_a_boot() {
    needs_root!();
    let host = Netns::new("host");
    // One was on before us.
    let (first, second) =
        (Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64"), Bridge::new(&host, "br1", "10.9.2.0/24", "fd09:2::/64"));
    second.set_nf_call(false);
    let disk = Disk::default();
    let off = || {
        first.set_nf_call(false);
        second.set_nf_call(false);
        host.set_sysctl("net.netfilter.nf_conntrack_acct", "0");
    };
    let on = || {
        [nf_call(&host, "br0"), nf_call(&host, "br1")].iter().all(|calls| calls == &["nf_call_iptables 1", "nf_call_ip6tables 1"])
            && host.sysctl("net.netfilter.nf_conntrack_acct").as_deref() == Some("1")
    };
    let told = |watching: &mut Watching, names: &[&str]| {
        let expected: BTreeMap<String, u64> = names.iter().map(|name| ((*name).to_owned(), 1)).collect();
        eventually(Duration::from_secs(10), || {
            let account = watching.account();
            if on() && account.repaired == expected { Ok(()) } else { Err(format!("{account:?}")) }
        });
    };
    let all = ["netfilter of bridge br0", "netfilter of bridge br1", "nf_conntrack_acct"];

    let mut watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &[]);
    watching.leave();
    let before = disk.lock().unwrap().clone();
    off();
    watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &all);
    watching.leave();
    let after = disk.lock().unwrap().clone();
    assert_eq!(after, before, "how the host was before is not what somebody made of it meanwhile");

    // Nothing was switched off: nothing is said.
    watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &[]);
    watching.leave();
    // Nor where the machine started anew.
    off();
    disk.lock().unwrap().on.boot = "another".to_owned();
    watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &[]);
    // Nor where we put it back ourselves.
    watching.stop();
    watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &[]);
    watching.leave();
    // Nor of a bridge that was made anew.
    host.ip("link del br1");
    let second = Bridge::new(&host, "br1", "10.9.2.0/24", "fd09:2::/64");
    second.set_nf_call(false);
    watching = agent(&host, &disk, &[&first, &second]);
    told(&mut watching, &[]);
}
