//! The law that holds all of it together: the kernel says what `policy::evaluate` says, and beside an engine's rules what both say.
//!
//! Each case draws a node (which bridges are the engine's, who is a leg of which container, what is published and how), policies and
//! probes; the ruleset is applied, each probe's first packet is sent, and where it is seen is compared. A case that fails is made as small
//! as it can be. `BULKHEAD_SEED=N` draws the same cases again.

mod expected;
mod sketch;
mod town;

use std::cell::RefCell;
use std::process::Command;

use lab::{Netns, needs_root};
use node_agent::enforce::{Enforcer, Nftables};
use policy::Protocol;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use self::expected::{Engine, Judge, Packet};
use self::sketch::{Place, Probe, Road, Sketch, sketches};
use self::town::{MEMBERS, Town, chance};
use crate::mutation::packet::Tuple;
use crate::stage::{chain, enforcer};

/// Cases of a run, and probes of a case: thousands of pairs in some seconds.
const CASES: u32 = 96;
const PROBES: usize = 256;

/// Source ports of the probes begin here: no service's, so that no probe is another one's answer.
const SOURCES: u16 = 20_000;

struct Bench<'h> {
    town: Town<'h>,
    enforcer: Nftables,
    engine: Engine,
    allowed: u32,
    denied: u32,
}

/// The engine's rules for the ports that are published by translation, where no engine's own are loaded.
fn translation(sketch: &Sketch) -> String {
    let mut rules = "table inet theirs {}; delete table inet theirs;\n".to_owned();
    if sketch.road == Road::Proxy {
        return rules;
    }
    rules.push_str("table inet theirs { chain doors {\n");
    for member in 0..MEMBERS.len() {
        let Some((door, port)) = sketch.published(member) else { continue };
        for (version, family) in ["ip", "ip6"].iter().enumerate().filter(|(version, _)| *version == 0 || !door.exact) {
            let at = if door.exact { format!("ip daddr {}", lab::internet::HOST_V4) } else { "fib daddr type local".to_owned() };
            let to = std::net::SocketAddr::new(town::address(Place::Member(member), version), door.container_port);
            let nfproto = ["ipv4", "ipv6"][version];
            let (protocol, family) = (door.protocol, family);
            rules.push_str(&format!("meta nfproto {nfproto} {at} {protocol} dport {port} dnat {family} to {to}\n"));
        }
    }
    rules.push_str(
        "}; chain pre { type nat hook prerouting priority dstnat; jump doors; }; chain out { type nat hook output priority -100; jump doors; }; }\n",
    );
    rules
}

impl Bench<'_> {
    fn name(&self, place: Place) -> String {
        match place {
            Place::Member(member) => MEMBERS[member].0.to_owned(),
            Place::Node(_) => "the node".to_owned(),
            Place::Outside(_) => "outside".to_owned(),
        }
    }

    fn describe(&self, packet: &Packet) -> String {
        let translated =
            if packet.addressed == packet.to { String::new() } else { format!(" ({} {})", self.name(packet.to), packet.service) };
        let (from, to) = (self.name(packet.from), self.name(packet.addressed));
        format!("{from} {} -> {to} {} {}{translated}", packet.source, packet.destination, packet.asked)
    }

    /// Applies a sketch, sends its probes, and compares.
    fn run(&mut self, sketch: &Sketch) -> Result<(), TestCaseError> {
        let (inventory, set) = (sketch.inventory(), sketch.set());
        let networks = policy::bind::networks(&inventory);
        let bound = policy::bind(&set, &inventory, crate::stage::now());
        self.enforcer.apply(&bound).map_err(|error| TestCaseError::fail(chain(&error)))?;
        if self.engine == Engine::None {
            self.town.load(Command::new("nft").args(["-f", "-"]), &translation(sketch));
        }
        let judge = Judge::new(sketch, self.engine, &inventory, expected::scene(&set, &networks));
        self.town.quiet();
        let mut sent: Vec<(u16, Packet)> = Vec::new();
        for (number, probe) in sketch.probes.iter().enumerate() {
            let Some(packet) = self.sendable(sketch, probe, &sent) else { continue };
            let id = number as u16;
            let tuple = Tuple { from: packet.source, to: packet.destination, service: packet.asked, source_port: SOURCES + id };
            self.town.send(id, packet.from, packet.addressed, tuple);
            sent.push((id, packet));
        }
        let arrived = self.town.arrived();
        for (id, packet) in sent {
            let expected = judge.expect(&packet);
            let at: Vec<Place> = match packet.to {
                Place::Member(_) => vec![packet.to],
                Place::Node(_) => vec![Place::Node(0)],
                Place::Outside(_) => vec![Place::Outside(0)],
            };
            let own = match packet.from {
                Place::Member(_) => packet.from,
                Place::Node(_) => Place::Node(0),
                Place::Outside(_) => Place::Outside(0),
            };
            // A refusal quotes the packet to its sender.
            let mut seen: Vec<Place> = arrived.get(&id).into_iter().flatten().copied().filter(|place| *place != own).collect();
            seen.dedup();
            if seen != if expected.passes { at } else { Vec::new() } {
                let names: Vec<_> = seen.into_iter().map(|place| self.name(place)).collect();
                let seen = if names.is_empty() { "it did not arrive".to_owned() } else { format!("it arrived at {}", names.join(", ")) };
                return Err(TestCaseError::fail(format!("{}: {}, but {seen}", self.describe(&packet), expected.why)));
            }
            if expected.passes { self.allowed += 1 } else { self.denied += 1 }
        }
        Ok(())
    }

    /// The packet of a probe, unless it is none, or another one without ports: behind a translation two of these are one connection.
    fn sendable(&self, sketch: &Sketch, probe: &Probe, sent: &[(u16, Packet)]) -> Option<Packet> {
        let packet = expected::packet(sketch, self.engine, probe)?;
        let portless = matches!(packet.asked.protocol, Protocol::Other(_));
        let again = |other: &(u16, Packet)| other.1.asked.protocol == packet.asked.protocol;
        (!portless || !sent.iter().any(again)).then_some(packet)
    }
}

/// Draws cases until one fails, and then smaller ones of it.
fn holds(engine: Engine) {
    let host = Netns::new("host");
    let bench = Bench { town: Town::new(&host), enforcer: enforcer(&host), engine, allowed: 0, denied: 0 };
    match engine {
        Engine::None => {}
        Engine::Twenty => bench.town.load(&mut Command::new("iptables-restore"), include_str!("law/engine20.iptables")),
        Engine::TwentyNine => bench.town.load(Command::new("nft").args(["-f", "-"]), include_str!("law/engine29.nft")),
    }
    lab::fence::on_one_processor();
    let seed = std::env::var("BULKHEAD_SEED").map_or_else(|_| chance(), |text| text.parse().expect("BULKHEAD_SEED is a number"));
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: CASES, max_shrink_iters: 4096, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let bench = RefCell::new(bench);
    let drawn = sketches(PROBES).prop_map(move |sketch| match engine {
        Engine::None => sketch,
        Engine::Twenty => sketch.beside_the_engine(Road::Proxy),
        Engine::TwentyNine => sketch.beside_the_engine(Road::Translation),
    });
    // A frame may be lost where other tests fill a processor's queue: what did not arrive is sent once more.
    let again = |why: &TestCaseError| why.to_string().contains("did not arrive");
    let ran = runner.run(&drawn, |sketch| {
        let mut bench = bench.borrow_mut();
        bench.run(&sketch).or_else(|why| if again(&why) { bench.run(&sketch) } else { Err(why) })
    });
    let (allowed, denied) = (bench.borrow().allowed, bench.borrow().denied);
    println!("BULKHEAD_SEED={seed}: {allowed} probes passed, {denied} did not");
    match ran {
        Ok(()) => {}
        Err(TestError::Fail(why, sketch)) => {
            panic!("BULKHEAD_SEED={seed}, after {} probes, made as small as it gets:\n  {why}{sketch:?}", allowed + denied)
        }
        Err(TestError::Abort(why)) => panic!("BULKHEAD_SEED={seed}: {why}"),
    }
    assert_eq!(bench.borrow_mut().enforcer.verify().unwrap(), vec![]);
    let least = (allowed + denied) / 8;
    assert!(allowed > least && denied > least, "{allowed} passed, {denied} did not: the dice are loaded");
}

#[test]
fn the_kernel_and_evaluate_agree_on_random_nodes_policies_and_first_packets() {
    needs_root!();
    holds(Engine::None);
}

#[test]
fn beside_the_rules_of_engine_20_what_passes_is_what_evaluate_and_the_engine_allow() {
    needs_root!();
    if !lab::process::found("iptables-restore") {
        lab::skip!("needs iptables-restore (package iptables)");
    }
    holds(Engine::Twenty);
}

#[test]
fn beside_the_rules_of_engine_29_what_passes_is_what_evaluate_and_the_engine_allow() {
    needs_root!();
    holds(Engine::TwentyNine);
}
