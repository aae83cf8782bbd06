//! Whose the tables are while no agent lives, with each kind of ownership that kernels know; and the socket that is handed on.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use lab::{Netns, Server, needs_root};
use nix::sys::socket::{MsgFlags, sendto};
use node_agent::enforce::{EnforceError, Enforcer, Nftables, Ownership};
use policy::{Mode, Ruleset};

use crate::stage::{Policy, apply, chain, enforcer, inventory};

fn copy(of: &Nftables) -> OwnedFd {
    of.socket().as_fd().try_clone_to_owned().unwrap()
}

/// What `nft` said when it failed; `None`: it did it.
fn refused(host: &Netns, words: &str) -> Option<String> {
    let output = host.output(Command::new("nft").args(words.split(' ')));
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn while_somebody_keeps_the_socket_nobody_else_changes_the_tables_of_a_dead_agent() {
    needs_root!();
    for wanted in [Ownership::OwnedPersistent, Ownership::Owned] {
        node!(host, bridge: a, b);
        let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
        let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
        let is_open = || a.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open();
        let closed = Policy::default().mode(Mode::Enforce, &["a", "b"]);
        let mut first = enforcer(&host).at_most(wanted).kept();
        if apply(&mut first, &closed.bind(&inventory)).ownership != wanted {
            lab::skip!("this kernel does not know {wanted}");
        }
        let kept = copy(&first);
        // The kernel sees a killed process as closed descriptors.
        drop(first);
        for words in
            ["delete table inet bulkhead", "delete table bridge bulkhead", "delete table arp bulkhead", "flush chain inet bulkhead judge"]
        {
            let why = refused(&host, words).unwrap_or_else(|| panic!("{wanted}: nft {words} was done"));
            assert!(why.contains("Operation not permitted"), "{wanted}: nft {words}: {why}");
        }
        assert_eq!(refused(&host, "flush ruleset"), None, "skips what is owned");
        assert!(!is_open(), "{wanted}");

        let mut next = host.run(|| Nftables::resume(kept.try_clone().unwrap()).unwrap()).at_most(wanted).kept();
        let opened = apply(&mut next, &closed.clone().allow("a", "b", "tcp/80").bind(&inventory));
        assert_eq!(opened.ownership, wanted);
        assert!(is_open(), "{wanted}: the next agent changes the tables");
        drop(next);
        assert!(refused(&host, "delete table inet bulkhead").is_some(), "{wanted}: still kept");
        // The last copy: from here on the tables are as any other, or gone.
        drop(kept);
        let left = wanted == Ownership::OwnedPersistent;
        // Another test's child has a copy until it becomes its program.
        lab::eventually(std::time::Duration::from_secs(10), || {
            let ruleset = host.ruleset();
            if ruleset.contains("table inet bulkhead") == left { Ok(()) } else { Err(format!("{wanted}: {ruleset}")) }
        });
        assert_eq!(enforcer(&host).remove().unwrap().len(), if left { 3 } else { 0 });
    }
}

#[test]
fn where_nobody_keeps_the_socket_the_tables_never_go_with_the_agent() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let is_open = || a.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open();
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);

    let mut alone = enforcer(&host).at_most(Ownership::Owned);
    assert_eq!(apply(&mut alone, &bound).ownership, Ownership::Shared);
    drop(alone);
    assert!(!is_open(), "killed without a keeper");

    // With one, and then stopped in order: whoever keeps the copy may stop next.
    let mut kept = enforcer(&host).at_most(Ownership::Owned).kept();
    assert_eq!(apply(&mut kept, &bound).ownership, Ownership::Owned);
    kept.let_go().unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(kept.verify().unwrap(), vec![], "what was enforced is enforced");
    drop(kept);
    assert!(!is_open(), "stopped in order");
    assert_eq!(refused(&host, "delete table inet bulkhead"), None, "it is nobody's");
}

#[test]
fn each_kind_of_ownership_takes_over_from_each_other_and_stays_closed() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let _server = Server::tcp_echo(&b.netns, SocketAddr::new(b.v4.into(), 80));
    let bound = Policy::default().mode(Mode::Enforce, &["a", "b"]).bind(&inventory);
    let kinds = [Ownership::OwnedPersistent, Ownership::Owned, Ownership::Shared];
    for (before, after) in kinds.into_iter().flat_map(|before| kinds.map(|after| (before, after))) {
        let mut first = enforcer(&host).at_most(before).kept();
        assert_eq!(apply(&mut first, &bound).ownership, before);
        let socket = copy(&first);
        drop(first);
        let mut next = host.run(|| Nftables::resume(socket).unwrap()).at_most(after).kept();
        assert_eq!(apply(&mut next, &bound).ownership, after, "{before} -> {after}");
        assert_eq!(next.verify().unwrap(), vec![], "{before} -> {after}");
        assert!(!a.netns.tcp(SocketAddr::new(b.v4.into(), 80)).is_open(), "{before} -> {after}");
        assert_eq!(next.remove().unwrap().len(), 3);
    }
}

/// A question about table `inet NAME` by hand: nlmsghdr, nfgenmsg, NFTA_SET_ELEM_LIST_TABLE and _SET (or NFTA_TABLE_NAME alone).
fn question(kind: u16, flags: u16, sequence: u32, names: &[&str]) -> Vec<u8> {
    let mut body = vec![1, 0, 0, 0];
    for (number, name) in (1_u16..).zip(names) {
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        body.extend((text.len() as u16 + 4).to_ne_bytes());
        body.extend(number.to_ne_bytes());
        text.resize(text.len().next_multiple_of(4), 0);
        body.extend(text);
    }
    let mut out = (body.len() as u32 + 16).to_ne_bytes().to_vec();
    out.extend((10 << 8 | kind).to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend(body);
    out
}

#[test]
fn what_a_killed_agent_was_still_to_be_told_is_not_taken_for_an_answer() {
    needs_root!();
    let host = Netns::new("host");
    host.ip("link add br0 type bridge");
    let mut bound = Ruleset::default();
    bound.watched.insert("br0".into(), policy::ruleset::Watch { guarded: true, ..Default::default() });
    let spot = |n: u32| policy::ruleset::Spot { bridge: Some("br0".into()), address: std::net::Ipv4Addr::from(0x0a00_0000 + n).into() };
    bound.sides = (0..20_000).map(|n| (spot(n), policy::Standing::Quarantined)).collect();
    let mut first = enforcer(&host);
    apply(&mut first, &bound);
    let socket = copy(&first);
    drop(first);

    let send = |message: &[u8]| {
        let kernel = nix::sys::socket::NetlinkAddr::new(0, 0);
        sendto(socket.as_raw_fd(), message, &kernel, MsgFlags::empty()).unwrap();
    };
    // The numbers that a process begins with: a thousand refusals, and a dump that nobody reads to its end.
    const REQUEST_ACK: u16 = 0x1 | 0x4;
    const REQUEST_DUMP: u16 = 0x1 | 0x300;
    for sequence in 0..1000 {
        send(&question(1, REQUEST_ACK, sequence, &["nobody"]));
    }
    send(&question(13, REQUEST_DUMP, 1001, &["bulkhead", "senders4"]));

    let mut next = host.run(|| Nftables::resume(socket).unwrap());
    bound.sides.insert(spot(20_000), policy::Standing::Quarantined);
    apply(&mut next, &bound);
    assert_eq!(next.verify().unwrap(), vec![]);
}

#[test]
fn a_socket_of_another_namespace_is_not_gone_on_with() {
    needs_root!();
    let (here, there) = (Netns::new("here"), Netns::new("there"));
    let socket = copy(&enforcer(&there));
    let error = here.run(|| Nftables::resume(socket.try_clone().unwrap()).unwrap_err());
    assert!(matches!(error, EnforceError::Open(_)) && chain(&error).contains("another network namespace"), "{}", chain(&error));
    there.run(|| Nftables::resume(socket).unwrap());
}
