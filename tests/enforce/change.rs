//! A change carried out by its elements leaves what a whole apply would, whatever came before.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;

use lab::{Netns, needs_root};
use node_agent::enforce::{Enforcer, Nftables};
use policy::policy_set::Direction;
use policy::ruleset::{Change, Door, Pair, Pin, Remote, Spot, Tuples, Watch};
use policy::segment::Refusal;
use policy::{Protocol, Ruleset, Standing};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;

use crate::stage::{chain, enforcer};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    select(["10.0.0.1", "10.0.0.2", "0.0.0.0", "fd00::1", "fd00::2"].map(address).to_vec())
}

/// `br9` is not there.
fn spots() -> impl Strategy<Value = Spot> {
    let bridges = select(vec![None, Some("br0"), Some("br0"), Some("br1"), Some("br9")]);
    (bridges, addresses()).prop_map(|(bridge, address)| Spot { bridge: bridge.map(str::to_owned), address })
}

fn remotes() -> impl Strategy<Value = Remote> {
    let nets = ["192.0.2.0/24", "192.0.2.0/25", "192.0.2.7/32", "192.0.2.8/32", "0.0.0.0/0", "2001:db8::/32", "2001:db8::1/128"];
    prop_oneof![spots().prop_map(Remote::Spot), select(nets.to_vec()).prop_map(|net| Remote::Outside(net.parse().unwrap()))]
}

fn pairs() -> impl Strategy<Value = Pair> {
    let ports = [
        "tcp/80",
        "tcp/443",
        "tcp/80-90",
        "tcp/85-100",
        "tcp/91-443",
        "udp/53",
        "icmp/8",
        "icmp/0-8",
        "icmpv6/128",
        "sctp/5",
        "ip47",
        "ip50",
    ];
    let direction = select(vec![Direction::Egress, Direction::Ingress]);
    (direction, spots(), remotes(), select(ports.to_vec())).prop_map(|(direction, local, remote, ports)| Pair {
        direction,
        local,
        remote,
        ports: ports.parse().unwrap(),
    })
}

fn standings() -> impl Strategy<Value = Standing> {
    let refusals = [Refusal::Reject, Refusal::Drop].map(Standing::Enforce);
    select([&[Standing::Open, Standing::Audit, Standing::Quarantined], &refusals[..]].concat())
}

fn doors() -> impl Strategy<Value = Door> {
    let protocol = select(vec![Protocol::Tcp, Protocol::Udp]);
    (addresses(), protocol, 8000..8003_u16).prop_map(|(address, protocol, port)| Door { address, protocol, port })
}

fn names() -> impl Strategy<Value = String> {
    select(vec!["br0", "br1", "br9"]).prop_map(str::to_owned)
}

/// Everything but pairs.
fn frames() -> impl Strategy<Value = Ruleset> {
    let pin = (names(), 0..3_u8, btree_set(addresses(), 0..3));
    let pin = pin.prop_map(|(bridge, mac, addresses)| Pin { bridge, mac: [2, 0, 0, 0, 0, mac], addresses });
    let pins = btree_map(select(vec!["p0", "p1", "p2"]).prop_map(str::to_owned), pin, 0..3);
    let watched = btree_map(
        names(),
        (any::<bool>(), prop_oneof![Just(Tuples::Own), Just(Tuples::Beside), Just(Tuples::Shared)])
            .prop_map(|(guarded, tuples)| Watch { guarded, tuples }),
        0..3,
    );
    let subnets = ["10.0.0.0/24", "10.0.1.0/24", "10.0.4.0/24", "fd00::/64"].map(|net| net.parse().unwrap());
    let sets = (btree_set(doors(), 0..3), btree_set(addresses(), 0..3), btree_set(select(subnets.to_vec()), 0..3));
    let inward = btree_map(doors(), standings(), 0..3);
    let sets = (sets, btree_set(names(), 0..3), btree_set(select(vec!["p3", "p4"]).prop_map(str::to_owned), 0..2), inward);
    let frame =
        (btree_set(names(), 0..3), watched, pins, btree_map(spots(), standings(), 0..5), btree_map(doors(), standings(), 0..3), sets);
    frame.prop_map(|(bridges, watched, pins, sides, doors, ((ajar, node, subnets), known, bystanders, inward))| {
        let pairs = BTreeSet::new();
        Ruleset { bridges, watched, pins, sides, doors, pairs, ajar, node, subnets, known, bystanders, inward }
    })
}

/// What comes if it is not there and goes if it is, and perhaps another frame.
type Step = (BTreeSet<Pair>, Option<Ruleset>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    vec((btree_set(pairs(), 0..6), proptest::option::weighted(0.4, frames())), 1..8)
}

fn stepped(ruleset: &Ruleset, (toggled, frame): Step) -> Ruleset {
    let pairs = ruleset.pairs.symmetric_difference(&toggled).cloned().collect();
    Ruleset { pairs, ..frame.unwrap_or_else(|| ruleset.clone()) }
}

/// The kernel holds what was remembered of it, and that is what the whole would be.
fn is_whole(enforcer: &mut Nftables, ruleset: &Ruleset) -> Result<(), TestCaseError> {
    prop_assert_eq!(enforcer.verify().unwrap(), vec![]);
    let again = enforcer.apply(ruleset).unwrap();
    prop_assert_eq!((again.changed, again.rules_written), (0, false));
    Ok(())
}

fn host() -> Netns {
    let host = Netns::new("host");
    for bridge in ["br0", "br1"] {
        host.ip(&format!("link add {bridge} type bridge"));
    }
    host
}

#[test]
fn any_changes_by_their_elements_leave_what_a_whole_apply_leaves() {
    needs_root!();
    let host = host();
    // Goes on from case to case: its sets only grow in number, so that soon none is missing.
    let state = RefCell::new((enforcer(&host), Ruleset::default(), [0, 0]));
    state.borrow_mut().0.apply(&Ruleset::default()).unwrap();
    let config = ProptestConfig { cases: 48, failure_persistence: None, max_shrink_iters: 0, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&steps(), |steps| {
        let (enforcer, held, counted) = &mut *state.borrow_mut();
        for step in steps {
            let next = stepped(held, step);
            let change = Change::between(held, &next);
            let applied = enforcer.change(&next, &change).map_err(|error| TestCaseError::fail(chain(&error)))?;
            counted[usize::from(applied.rules_written)] += 1;
            is_whole(enforcer, &next)?;
            *held = next;
        }
        Ok(())
    });
    outcome.unwrap();
    let [by_elements, with_rules] = state.into_inner().2;
    assert!(by_elements > with_rules, "most of them by elements alone: {by_elements} and {with_rules}");
}

#[test]
fn a_change_writes_its_elements_and_asks_for_no_others() {
    needs_root!();
    let host = host();
    let spot = |last: u8| Spot { bridge: Some("br0".into()), address: [10, 0, 0, last].into() };
    let pair = |port: u16| Pair {
        direction: Direction::Egress,
        local: spot(1),
        remote: Remote::Spot(spot(2)),
        ports: policy::Service::tcp(port).into(),
    };
    let mut ruleset = Ruleset { pairs: [pair(1), pair(2)].into(), ..Ruleset::default() };
    let mut enforcer = enforcer(&host);
    let first = enforcer.apply(&ruleset).unwrap();
    let mut change = |ruleset: &mut Ruleset, next: Ruleset| {
        let change = Change::between(ruleset, &next);
        *ruleset = next;
        enforcer.change(ruleset, &change).unwrap()
    };
    let of = |ports: &[u16]| Ruleset { pairs: ports.iter().map(|&port| pair(port)).collect(), ..Ruleset::default() };
    let more = change(&mut ruleset, of(&[1, 2, 3]));
    assert_eq!((more.changed, more.rules_written, more.generation_id), (1, false, first.generation_id + 1));
    // Who talks to whom is one element of all three.
    assert_eq!(change(&mut ruleset, of(&[3])).changed, 2);
    assert_eq!(change(&mut ruleset, of(&[])).changed, 2);
    let nothing = change(&mut ruleset, of(&[]));
    assert_eq!((nothing.changed, nothing.generation_id), (0, first.generation_id + 3));
}

#[test]
fn a_change_finds_what_somebody_took_away_and_a_bridge_that_was_made_anew() {
    needs_root!();
    let host = host();
    let pair = |last: u8| Pair {
        direction: Direction::Ingress,
        local: Spot { bridge: Some("br0".into()), address: [10, 0, 0, last].into() },
        remote: Remote::Outside("192.0.2.1/32".parse().unwrap()),
        ports: policy::Service::tcp(80).into(),
    };
    let mut enforcer = enforcer(&host).shared();
    let mut ruleset = Ruleset { pairs: [pair(1)].into(), ..Ruleset::default() };
    enforcer.apply(&ruleset).unwrap();
    let mut last = 1;
    for trouble in ["flush set inet bulkhead ingress_tcp4_outside", "delete table inet bulkhead", "br0"] {
        match trouble {
            "br0" => {
                host.ip("link del br0");
                host.ip("link add br0 type bridge");
            }
            words => {
                host.nft(words);
            }
        }
        let mut next = ruleset.clone();
        next.pairs.remove(&pair(last));
        last += 1;
        next.pairs.insert(pair(last));
        let change = Change::between(&ruleset, &next);
        ruleset = next;
        enforcer.change(&ruleset, &change).unwrap_or_else(|error| panic!("{trouble}: {}", chain(&error)));
        is_whole(&mut enforcer, &ruleset).unwrap_or_else(|error| panic!("{trouble}: {error}"));
    }
}

#[test]
fn a_port_under_another_name_keeps_what_is_its() {
    needs_root!();
    let host = host();
    host.ip("link add p1 type veth peer name q1");
    host.ip("link set p1 master br0");
    let pin = Pin { bridge: "br0".into(), mac: [2, 0, 0, 0, 0, 1], addresses: [address("10.0.0.1"), address("fd00::1")].into() };
    let named =
        |name: &str| Ruleset { bridges: ["br0".into()].into(), pins: [(name.to_owned(), pin.clone())].into(), ..Ruleset::default() };
    let mut enforcer = enforcer(&host);
    let mut ruleset = named("p1");
    enforcer.apply(&ruleset).unwrap();
    // Before and behind the other one in the order of names.
    for (from, to) in [("p1", "a1"), ("a1", "z1"), ("z1", "p1")] {
        host.ip(&format!("link set {from} name {to}"));
        let next = named(to);
        enforcer.change(&next, &Change::between(&ruleset, &next)).unwrap_or_else(|error| panic!("{to}: {}", chain(&error)));
        ruleset = next;
        is_whole(&mut enforcer, &ruleset).unwrap_or_else(|error| panic!("{to}: {error}"));
    }
}
