//! A connection table that runs full is not brought down by learning.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use lab::{Bridge, Member, Netns, Server, eventually, needs_root};
use node_agent::observe::{Limits, Options};
use tokio::sync::watch;

use crate::node::Node;

const PATIENCE: Duration = Duration::from_secs(30);

fn entries(host: &Netns) -> u64 {
    host.sysctl("net.netfilter.nf_conntrack_count").unwrap().parse().unwrap()
}

/// So many new UDP flows, each from a port of its own.
fn flows(from: &Member, to: &Member, count: usize) {
    let sockets: Vec<UdpSocket> = from.netns.run(|| (0..count).map(|_| UdpSocket::bind((from.v4, 0)).unwrap()).collect());
    for socket in &sockets {
        socket.send_to(b"x", (to.v4, 9)).unwrap();
    }
}

#[test]
fn a_table_that_runs_full_is_not_filled_by_learning_and_what_is_filtered_stays_tracked() {
    needs_root!();
    let host = Netns::new("host");
    let mut learning = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let mut enforced = Bridge::new(&host, "br1", "10.9.2.0/24", "fd09:2::/64");
    learning.set_nf_call(false);
    enforced.set_nf_call(false);
    let (a, b) = (learning.add("a"), learning.add("b"));
    let (c, d) = (enforced.add("c"), enforced.add("d"));
    let sink = Server::udp_sink(&b.netns, (b.v4, 9).into());
    let _echo = Server::tcp_echo(&d.netns, (d.v4, 80).into());
    // The machine's limit can't be set for one namespace: a small part of it is full here.
    let max: u64 = host.sysctl("net.netfilter.nf_conntrack_max").unwrap().parse().unwrap();
    let limits = Limits { stop: 2000 * 1_000_000 / max, resume: 1000 * 1_000_000 / max };
    let (filtering, filtered) = watch::channel(BTreeSet::from(["br1".to_owned()]));
    let node = Node::with(&[&learning, &enforced]).runs("a", &learning, &a).runs("b", &learning, &b);
    let node = node.runs("c", &enforced, &c).runs("d", &enforced, &d);
    let mut watching = node.observe_with(&host, Options { limits, filtered, ..Options::default() });
    eventually(PATIENCE, || {
        flows(&a, &b, 10);
        let seen = entries(&host);
        if seen > 0 { Ok(()) } else { Err("nothing is tracked yet") }
    });
    host.set_sysctl("net.netfilter.nf_conntrack_udp_timeout", "600");
    assert!(watching.account().blind.is_empty(), "{:?}", watching.account());

    flows(&a, &b, 2500);
    eventually(PATIENCE, || if watching.account().restrained { Ok(()) } else { Err(format!("{:?}", watching.account())) });
    let blind = watching.account().blind.join("\n");
    assert!(blind.contains("runs full") && blind.contains("nf_conntrack_max"), "{blind}");
    let full = entries(&host);
    let heard = sink.heard();
    flows(&a, &b, 500);
    eventually(PATIENCE, || if sink.heard() > heard { Ok(()) } else { Err("what is not tracked still arrives") });
    assert!(entries(&host) <= full, "Learn fills it on: {full}, then {}", entries(&host));
    // What is filtered needs its connections, and is still seen.
    assert!(c.netns.tcp_echo((d.v4, 80).into(), b"x"));
    watching.within(PATIENCE, "c -> d tcp/80", |seen| seen.established == 1);

    // One more network is enforced meanwhile: it is led through again at once.
    filtering.send_replace(["br0", "br1"].map(str::to_owned).into());
    eventually(PATIENCE, || {
        let before = entries(&host);
        flows(&a, &b, 10);
        if entries(&host) >= before + 10 { Ok(()) } else { Err("not tracked though it is enforced") }
    });
    filtering.send_replace(["br1".to_owned()].into());

    // Old connections end, there is room, and learning goes on.
    host.check(std::process::Command::new("conntrack").args(["-F"]));
    eventually(PATIENCE, || if watching.account().restrained { Err(format!("{:?}", watching.account())) } else { Ok(()) });
    let echo = Server::tcp_echo(&b.netns, (b.v4, 80).into());
    eventually(PATIENCE, || {
        assert!(a.netns.tcp_echo((b.v4, 80).into(), b"x"));
        watching.read();
        if watching.evidence("a -> b tcp/80").is_some() { Ok(()) } else { Err(watching.text()) }
    });
    drop(echo);
    let account = watching.account();
    assert!(account.blind.is_empty() && account.repaired.is_empty(), "nobody else switched anything: {account:?}");
    assert_eq!(account.lost, 0);
}

#[test]
fn without_anything_filtered_nothing_of_ours_causes_tracking() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let _sink = Server::udp_sink(&b.netns, (b.v4, 9).into());
    let before = host.ruleset();
    let max: u64 = host.sysctl("net.netfilter.nf_conntrack_max").unwrap().parse().unwrap();
    let limits = Limits { stop: 500 * 1_000_000 / max, resume: 250 * 1_000_000 / max };
    let options = Options { limits, ..Options::default() };
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe_with(&host, options);
    flows(&a, &b, 700);
    eventually(PATIENCE, || if watching.account().restrained { Ok(()) } else { Err(format!("{:?}", watching.account())) });
    eventually(PATIENCE, || if host.ruleset() == before { Ok(()) } else { Err(host.ruleset()) });
    let full = entries(&host);
    flows(&a, &b, 300);
    assert!(entries(&host) <= full, "{full}, then {}", entries(&host));
    // It ends while it is restrained: as it was before.
    watching.stop();
    assert_eq!(host.ruleset(), before);
}
