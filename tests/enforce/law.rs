//! The law that holds all of it together: the kernel says what `policy::evaluate` says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::{Bridge, Member, Netns, needs_root};
use node_agent::enforce::Enforcer;
use policy::{Connection, Endpoint, Mode, Protocol, Scene, Service, Verdict, Workload, evaluate};

use crate::stage::{Policy, apply, enforcer, inventory, mac_of, now, settled};

/// xorshift64: the same numbers each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.roll(from.len())]
    }
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const SERVICES: [&str; 9] = ["tcp/80", "tcp/79-82", "udp/53", "udp/50-60", "icmp/8", "icmpv6/128", "sctp/9", "ip47", "tcp/1-65535"];

fn random_policy(dice: &mut Dice) -> Policy {
    let mut policy = Policy::default();
    for name in NAMES {
        policy = match dice.roll(6) {
            0 => policy,
            1 => policy.mode(Mode::Audit, &[name]),
            2 => policy.silent(&[name]),
            3 if dice.roll(3) == 0 => policy.mode(Mode::Enforce, &[name]).quarantine(name),
            _ => policy.mode(Mode::Enforce, &[name]),
        };
    }
    for _ in 0..dice.roll(16) {
        let (one, other, service) = (*dice.pick(&NAMES), *dice.pick(&NAMES), *dice.pick(&SERVICES));
        policy = match dice.roll(4) {
            0 => policy.egress(one, other, service),
            1 => policy.ingress(one, other, service),
            _ => policy.allow(one, other, service),
        };
    }
    policy
}

/// A first packet of a service, with a marker that a capture finds.
fn packet(from: IpAddr, to: IpAddr, service: Service, marker: u32) -> Vec<u8> {
    let tag = marker.to_be_bytes();
    let body = match service.protocol {
        Protocol::Tcp => frame::tcp((from, 30000), (to, service.port), marker, 2),
        Protocol::Udp => frame::udp((from, 30000), (to, service.port), &tag),
        Protocol::Sctp => frame::sctp_init(30000, service.port, marker),
        Protocol::Icmp | Protocol::Icmpv6 => frame::echo_request(from, to, 7, &tag),
        Protocol::Other(_) => tag.to_vec(),
    };
    frame::ip(from, to, service.protocol.number(), &body)
}

#[test]
fn the_kernel_and_evaluate_agree_on_random_policies_and_first_packets() {
    needs_root!();
    let host = Netns::new("host");
    let mut one = Bridge::new(&host, "br0", "10.1.0.0/24", "2001:db8:1::/64");
    let (a, b, c) = (one.add("a"), one.add("b"), one.add("c"));
    let mut two = Bridge::new(&host, "br1", "10.2.0.0/24", "2001:db8:2::/64");
    let (d, e) = (two.add("d"), two.add("e"));
    settled(&host);
    let inventory = inventory(&[(&one, &[("a", &a), ("b", &b), ("c", &c)]), (&two, &[("d", &d), ("e", &e)])]);
    let networks = policy::bind::networks(&inventory);
    let members: BTreeMap<&str, &Member> = NAMES.into_iter().zip([&a, &b, &c, &d, &e]).collect();
    let wires: BTreeMap<&str, Frames> = members.iter().map(|(name, member)| (*name, Frames::open(&member.netns, "eth0"))).collect();
    // Who never spoke to the gateway is not known to it, and a first packet across bridges would wait for that.
    for member in members.values() {
        for at in member.addresses() {
            assert_eq!(host.ping(at), lab::Echo::Answered);
        }
    }
    let gateway_macs: BTreeMap<&str, [u8; 6]> = ["br0", "br1"].into_iter().map(|name| (name, mac_of(&host, name))).collect();
    let services: Vec<Service> =
        ["tcp/80", "tcp/81", "tcp/443", "udp/53", "udp/61", "icmp/8", "icmpv6/128", "sctp/9", "sctp/10", "ip47", "ip50"]
            .map(|text| text.parse().unwrap())
            .into();

    let mut dice = Dice(0x5eed_b01c_4ead_0001);
    let mut enforcer = enforcer(&host);
    let (mut allowed, mut denied) = (0, 0);
    for round in 0..40_u32 {
        let policy = random_policy(&mut dice);
        let bound = policy.bind(&inventory);
        apply(&mut enforcer, &bound);
        let scene = Scene { set: &policy.0, networks: &networks, now: now() };
        // All at once, then one wait: each packet has its own number.
        let mut sent = Vec::new();
        // What an earlier round's connections allow is no first packet.
        host.check(std::process::Command::new("conntrack").arg("-F"));
        for number in 0..32_u32 {
            let (from, to, service) = (*dice.pick(&NAMES), *dice.pick(&NAMES), *dice.pick(&services));
            if from == to {
                continue;
            }
            let v6 = match service.protocol {
                Protocol::Icmp => 0,
                Protocol::Icmpv6 => 1,
                _ => dice.roll(2),
            };
            let (sender, receiver) = (members[from], members[to]);
            let same = sender.port[..5] == receiver.port[..5];
            let mac = if same { receiver.mac } else { gateway_macs[if ["a", "b", "c"].contains(&from) { "br0" } else { "br1" }] };
            let ether = if v6 == 0 { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
            // Far enough apart that a number is not the next one's acknowledgement.
            let marker = 0xb000_0000 | round << 16 | number << 8;
            // Another packet with the same tuple may be an answer to the first: only one of each pair and protocol a round.
            if sent.iter().any(|(f, t, s, _, _): &(&str, &str, Service, _, _)| {
                s.protocol == service.protocol && ((*f == from && *t == to) || (*f == to && *t == from))
            }) {
                continue;
            }
            let bytes = packet(sender.addresses()[v6], receiver.addresses()[v6], service, marker);
            wires[from].send(&frame::ethernet(mac, sender.mac, ether, &bytes));
            let connection = Connection {
                from: Endpoint::Workload(Workload::new("", from)),
                to: Endpoint::Workload(Workload::new("", to)),
                service,
                guarded: bound.watched.values().any(|watch| watch.guarded),
            };
            sent.push((from, to, service, (marker, v6), evaluate(&scene, &connection)));
        }
        let mut arrived: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
        for (name, wire) in &wires {
            while let Some(frame) = wire.receive(Duration::from_millis(25), |_| true) {
                arrived.entry(name).or_default().push(frame);
            }
        }
        for (from, to, service, (marker, v6), decision) in sent {
            let tag = marker.to_be_bytes();
            let source = match members[from].addresses()[v6] {
                IpAddr::V4(v4) => (26, v4.octets().to_vec()),
                IpAddr::V6(v6) => (22, v6.octets().to_vec()),
            };
            let is_it = |frame: &Vec<u8>| frame[source.0..].starts_with(&source.1) && frame.windows(4).any(|bytes| bytes == tag);
            let seen = arrived.get(to).is_some_and(|frames| frames.iter().any(is_it));
            let passes = decision.verdict != Verdict::Deny;
            assert_eq!(seen, passes, "round {round}: {from} -> {to} {service}: evaluate says {} ({})", decision.verdict, decision.reason());
            if passes { allowed += 1 } else { denied += 1 }
        }
        if round % 8 == 7 {
            assert_eq!(enforcer.verify().unwrap(), vec![]);
        }
    }
    println!("{allowed} allowed, {denied} denied");
    assert!(allowed > 50 && denied > 50, "{allowed} allowed, {denied} denied: the dice are loaded");
}
