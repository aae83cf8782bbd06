//! What an event of connection tracking costs of ours, part by part: read, followed, named. One thread, no kernel, no packets: the
//! messages are made here as the kernel makes them, of many flows at a time, which end in another order than they began.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use jiff::{SignedDuration, Timestamp};
use node_agent::observe::conntrack::take_events;
use policy::attribute::{Attribution, Fact, Scene};
use policy::inventory::{Inventory, Leg, Network};
use policy::lease::LeaseBook;
use policy::track::{Entry, Kind, Tracker};

use crate::figures::{Table, grouped, time};
use crate::process::{megabytes, on_cpu, used};
use crate::stage;
use crate::world::workload;

/// As the observer's own batches.
const BATCH: usize = 1024;
const AT_ONCE: usize = 128;
/// Events a second that come, for what is done by time.
const RATE: i64 = 100_000;
const TURN: i64 = 25;
const PORTS: u32 = 50_000;
const CONTAINERS: u32 = 100;
const UDP: u8 = 17;
const TCP: u8 = 6;

#[derive(Clone, Copy)]
struct Flow {
    number: u32,
    protocol: u8,
}

impl Flow {
    fn ends(self) -> ((Ipv4Addr, u16), (Ipv4Addr, u16)) {
        let client = (address(self.number / PORTS % CONTAINERS), 40_000 + (self.number / PORTS) as u16);
        let server = (address(CONTAINERS - 1), 10_000 + (self.number % PORTS) as u16);
        // Few services of TCP, each from many ports; one socket of UDP that asks many ports.
        if self.protocol == TCP { ((client.0, server.1), (server.0, client.1)) } else { (client, server) }
    }
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a01_0010 + n)
}

/// A message of the kernel, written as `ctnetlink_conntrack_event` does.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        inside(&mut inner);
        self.put(kind | 0x8000, &inner.0);
    }

    fn tuple(&mut self, kind: u16, protocol: u8, from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) {
        self.nest(kind, |tuple| {
            tuple.nest(1, |ip| {
                ip.put(1, &from.0.octets());
                ip.put(2, &to.0.octets());
            });
            tuple.nest(2, |proto| {
                proto.put(1, &[protocol]);
                proto.put(2, &from.1.to_be_bytes());
                proto.put(3, &to.1.to_be_bytes());
            });
        });
    }

    fn tcp(&mut self, state: u8) {
        self.nest(4, |info| {
            info.nest(1, |tcp| {
                tcp.put(1, &[state]);
                tcp.put(2, &[7]);
                tcp.put(3, &[7]);
                tcp.put(4, &[0x23, 0]);
                tcp.put(5, &[0x23, 0]);
            });
        });
    }

    fn counters(&mut self, kind: u16, packets: u64, bytes: u64) {
        self.nest(kind, |counters| {
            counters.put(1, &packets.to_be_bytes());
            counters.put(2, &bytes.to_be_bytes());
        });
    }
}

fn message(flow: Flow, kind: Kind, at: Timestamp) -> Vec<u8> {
    let (client, server) = flow.ends();
    let udp = flow.protocol == UDP;
    let nanoseconds = u64::try_from(at.as_nanosecond()).expect("after 1970").to_be_bytes();
    let mut m = Message::default();
    m.tuple(1, flow.protocol, client, server);
    m.tuple(2, flow.protocol, server, client);
    m.put(12, &(flow.number.wrapping_mul(0x9e37_79b1)).to_be_bytes());
    m.put(3, &(if udp || kind == Kind::New { 8_u32 } else { 0xe }).to_be_bytes());
    if kind == Kind::Destroy {
        let (sent, received) = if udp { ((1, 29), (0, 0)) } else { ((6, 600), (5, 900)) };
        m.counters(9, sent.0, sent.1);
        m.counters(10, received.0, received.1);
        m.nest(20, |times| {
            times.put(1, &nanoseconds);
            times.put(2, &nanoseconds);
        });
    } else {
        m.put(7, &30_u32.to_be_bytes());
    }
    if !udp {
        m.tcp(if kind == Kind::New { 1 } else { 3 });
    }
    if kind != Kind::Destroy {
        let mut label = [0; 16];
        (label[0], label[4], label[8]) = (5, 5, u8::from(kind == Kind::Update));
        m.put(22, &label);
    }
    m.put(27, &nanoseconds);
    let (number, flags) = match kind {
        Kind::New => (0x100_u16, 0x600_u16),
        Kind::Update | Kind::Dump => (0x100, 0),
        Kind::Destroy => (0x102, 0),
    };
    let mut bytes = Vec::with_capacity(m.0.len() + 20);
    bytes.extend_from_slice(&(m.0.len() as u32 + 20).to_ne_bytes());
    bytes.extend_from_slice(&number.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&[2, 0, 0, 0]);
    bytes.extend_from_slice(&m.0);
    bytes
}

fn scenery() -> (Inventory, LeaseBook, BTreeMap<u32, String>) {
    let mut inventory = Inventory::default();
    let network = Network {
        id: "made".to_owned(),
        name: "made".to_owned(),
        project: None,
        driver: "bridge".to_owned(),
        bridge: Some("br0".to_owned()),
        subnets: vec!["10.1.0.0/16".parse().expect("a network")],
        internal: false,
        unmanaged: BTreeSet::new(),
    };
    inventory.networks.insert(network.id.clone(), network);
    for n in 0..CONTAINERS {
        let addresses = [address(n).into()].into();
        let leg = Leg { network: "made".to_owned(), bridge: "br0".to_owned(), port: None, mac: [0; 6], addresses };
        let mut container = stage::container(&format!("container-{n}"));
        container.workload = workload(n as usize);
        container.legs.push(leg);
        inventory.containers.insert(container.id.clone(), container);
    }
    let mut leases = LeaseBook::default();
    leases.update(&inventory, start());
    (inventory, leases, [(5, "br0".to_owned())].into())
}

fn start() -> Timestamp {
    "2026-11-20T12:00:00Z".parse().expect("a time")
}

/// Processor time of each part.
#[derive(Default)]
struct Spent {
    read: f64,
    followed: f64,
    told: f64,
    named: f64,
    dropped: f64,
    events: u64,
    facts: u64,
}

fn timed<T>(sum: &mut f64, work: impl FnOnce() -> T) -> T {
    let before = on_cpu();
    let done = work();
    *sum += on_cpu() - before;
    done
}

struct Line<'a> {
    scene: Scene<'a>,
    tracker: Tracker,
    attribution: Attribution,
    now: Timestamp,
    turned: Timestamp,
    spent: Spent,
}

impl Line<'_> {
    /// One round of the observer: what was received is read, followed, told on and, where it is time, named.
    fn take(&mut self, datagrams: &[Vec<u8>]) {
        let Self { scene, tracker, attribution, now, turned, spent } = self;
        let mut events: Vec<(Kind, Entry)> = Vec::with_capacity(BATCH);
        let (mut sights, mut facts): (Vec<_>, Vec<Fact>) = Default::default();
        for batch in datagrams.chunks(BATCH) {
            let nanoseconds = batch.len() as i64 * 1_000_000_000 / RATE;
            *now = now.saturating_add(SignedDuration::from_nanos(nanoseconds)).expect("not for ever");
            timed(&mut spent.read, || {
                for datagram in batch {
                    take_events(datagram, &mut events, |why| panic!("{why}"));
                }
            });
            for some in events.chunks(AT_ONCE) {
                timed(&mut spent.followed, || tracker.feed_all(some, *now, &mut sights));
                timed(&mut spent.told, || attribution.feed_all(&mut sights, &mut facts));
            }
            events.clear();
            if now.duration_since(*turned) >= SignedDuration::from_millis(TURN) {
                *turned = *now;
                let listening = &mut |_, _| None;
                timed(&mut spent.named, || attribution.resolve(scene, listening, *now, &mut facts));
            }
            spent.events += batch.len() as u64;
            spent.facts += facts.len() as u64;
            timed(&mut spent.dropped, || drop(std::mem::take(&mut facts)));
        }
    }

    /// Nothing happens for so long.
    fn rest(&mut self, seconds: i64) {
        self.now = self.now.saturating_add(SignedDuration::from_secs(seconds)).expect("not for ever");
        let listening = &mut |_, _| None;
        timed(&mut self.spent.named, || self.attribution.resolve(&self.scene, listening, self.now, &mut Vec::new()));
    }
}

fn one(protocol: u8, flows: u32, rounds: u32) -> (Spent, f64) {
    let (inventory, leases, links) = scenery();
    let mut line = Line {
        scene: Scene::new(&inventory, &leases, &links),
        tracker: Tracker::new(start(), true),
        attribution: Attribution::default(),
        now: start(),
        turned: start(),
        spent: Spent::default(),
    };
    // They end as the kernel's table is emptied: by buckets, which is no order at all.
    let mut ends: Vec<u32> = (0..flows).collect();
    ends.sort_unstable_by_key(|number| number.wrapping_mul(0x9e37_79b1) ^ 0x5bd1_e995);
    let resident = || used(std::process::id()).resident;
    let mut grown = 0.0_f64;
    for _ in 0..rounds {
        let mut datagrams = Vec::new();
        let phases: &[Kind] = if protocol == TCP { &[Kind::New, Kind::Update, Kind::Destroy] } else { &[Kind::New, Kind::Destroy] };
        for &kind in phases {
            datagrams.clear();
            let number = |at: u32| if kind == Kind::Destroy { ends[at as usize] } else { at };
            datagrams.extend((0..flows).map(|at| message(Flow { number: number(at), protocol }, kind, line.now)));
            let before = resident();
            line.take(&datagrams);
            grown += (resident() - before).max(0.0);
            line.rest(1);
        }
    }
    (line.spent, grown)
}

pub(crate) fn run(short: bool) {
    let (flows, rounds) = if short { (200_000, 2) } else { (200_000, 10) };
    let mut table = Table::new(&["", "events", "read", "followed", "told on", "named", "facts dropped", "all", "facts", "memory"]);
    for (name, protocol) in [("UDP, unanswered", UDP), ("TCP, with data", TCP)] {
        let (spent, grown) = one(protocol, flows, rounds);
        let each = |sum: f64| time(sum / spent.events as f64);
        let Spent { read, followed, told, named, dropped, .. } = spent;
        table.row([
            name.to_owned(),
            grouped(spent.events as f64),
            each(read),
            each(followed),
            each(told),
            each(named),
            each(dropped),
            each(read + followed + told + named + dropped),
            grouped(spent.facts as f64),
            megabytes(grown),
        ]);
    }
    println!("Of ours, an event, on one thread with {} flows at a time:\n", grouped(f64::from(flows)));
    table.print();
}
