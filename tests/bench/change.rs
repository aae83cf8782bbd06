//! Changes of a large ruleset: one rule, one container, all of it. By us, and by what an administrator has otherwise.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use jiff::SignedDuration;
use lab::Netns;
use node_agent::agent::keep::{self, Keep};
use node_agent::enforce::{Enforcer, living};
use policy::bind::Binding;
use policy::inventory::{Container, Leg, Network};
use policy::policy_set::{Peer, Rule};
use policy::ruleset::Change;
use policy::segment::Refusal;
use policy::{Inventory, Mode, PolicySet, Segment, Selector, Service, Workload, WorkloadPolicy};

use crate::figures::{Samples, Table, grouped, time};
use crate::stage::{self, now};

const BRIDGE: &str = "br-0123456789ab";

fn workload(n: usize) -> Workload {
    Workload::new("bench", format!("service-{n}"))
}

fn outside(n: usize, port: u16) -> Rule {
    Rule { peer: Peer::address(Ipv4Addr::from(0xc633_6400 + n as u32).into()), ports: Service::tcp(port).into(), until: None }
}

fn container(n: usize) -> Container {
    let mut container = stage::container(&format!("{n:064x}"));
    container.workload = workload(n);
    container.legs.push(Leg {
        network: "net".into(),
        bridge: BRIDGE.into(),
        port: Some(format!("veth{n:07x}")),
        mac: [2, 0, 0, 0, (n >> 8) as u8, n as u8],
        addresses: [IpAddr::from(Ipv4Addr::from(0x0a00_0002 + n as u32))].into(),
    });
    container
}

/// So many containers, each a workload with 60 peers outside, 20 that it asks and 20 that ask it: a hundred pairs each. Some rules of
/// one of them end by themselves, a second apart.
fn scene(containers: usize, ending: usize) -> (PolicySet, Inventory) {
    let network = Network {
        id: "net".into(),
        name: "bench_default".into(),
        project: Some("bench".into()),
        driver: "bridge".into(),
        bridge: Some(BRIDGE.into()),
        subnets: vec!["10.0.0.0/16".parse().unwrap()],
        internal: false,
        unmanaged: BTreeSet::new(),
    };
    let mut inventory = Inventory { networks: [(network.id.clone(), network)].into(), userland_proxy: true, ..Inventory::default() };
    inventory.host.insert("10.0.0.1".parse().unwrap());
    inventory.containers = (0..containers).map(container).map(|container| (container.id.clone(), container)).collect();
    let mut set = PolicySet::default();
    for n in 0..containers {
        let mut policy = WorkloadPolicy::empty(workload(n));
        let peer = |k: usize| Rule { peer: Peer::Workload(workload(k % containers)), ports: Service::tcp(5432).into(), until: None };
        policy.egress.extend((0..20).map(|k| peer(n + 1 + k)));
        policy.ingress.extend((0..20).map(|k| peer(n + containers - 1 - k)));
        policy.egress.extend((0..60).map(|k| outside(n % 64 * 3 + k, 1000 + k as u16)));
        set.policies.insert(policy.workload.clone(), policy);
    }
    let ends = |n: usize| Rule { until: Some(now() + SignedDuration::from_secs(1 + n as i64)), ..outside(200, 2000 + n as u16) };
    set.policies.get_mut(&workload(0)).expect("there is one").egress.extend((0..ending).map(ends));
    let segment = Segment {
        name: "bench".into(),
        members: [Selector::Project("bench".into())].into(),
        mode: Mode::Enforce,
        refusal: Refusal::Reject,
        promotion: None,
    };
    set.segments.insert("bench".into(), segment);
    (set, inventory)
}

/// What was measured, by its name, in the order it was met first.
#[derive(Default)]
struct Parts(Vec<(&'static str, Samples)>);

impl Parts {
    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let out = work();
        let seconds = begun.elapsed().as_secs_f64();
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, samples)) => samples.push(seconds),
            None => self.0.push((name, Samples(vec![seconds]))),
        }
        out
    }

    fn print(&self, pairs: usize) {
        let mut table = Table::new(&[&format!("at {} pairs", grouped(pairs as f64)), "median", "95 % interval", "p99", "runs"]);
        for (name, samples) in &self.0 {
            let median = samples.median();
            let interval = format!("{} to {}", time(median.low), time(median.high));
            table.row([(*name).to_owned(), time(median.value), interval, time(samples.quantile(0.99)), samples.0.len().to_string()]);
        }
        table.print();
    }
}

/// A program with its input, as an administrator's script would start it.
fn fed(host: &Netns, program: &str, words: &[&str], input: &str) {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = host.run(|| command.spawn().expect("it is installed"));
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "{program} refused");
}

/// The same number of elements in a table of nft's own, and of rules in a chain of iptables.
fn others(host: &Netns, pairs: usize) {
    let element = |n: usize| format!("10.{}.{}.{} . {}", n >> 16 & 255, n >> 8 & 255, n & 255, 1 + n % 60_000);
    let elements: Vec<String> = (0..pairs).map(element).collect();
    let text = format!("table inet theirs {{ set pairs {{ type ipv4_addr . inet_service; elements = {{ {} }}; }}; }}", elements.join(", "));
    fed(host, "nft", &["-f", "-"], &text);
    let mut rules = String::from("*filter\n:THEIRS - [0:0]\n");
    for n in 0..pairs {
        let _ = writeln!(
            rules,
            "-A THEIRS -s 10.{}.{}.{}/32 -p tcp --dport {} -j ACCEPT",
            n >> 16 & 255,
            n >> 8 & 255,
            n & 255,
            1 + n % 60_000
        );
    }
    rules.push_str("COMMIT\n");
    fed(host, "iptables-restore", &["--noflush"], &rules);
}

/// Highest resident memory of this process since the last call, bytes (proc(5), VmHWM and clear_refs).
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("a peak");
    let kib: f64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    std::fs::write("/proc/self/clear_refs", "5").expect("our own");
    kib * 1024.0
}

fn one_size(containers: usize, rounds: usize) {
    let host = Netns::new("host");
    host.ip(&format!("link add {BRIDGE} type bridge"));
    let dir = tempfile::tempdir().unwrap();
    let keep = Keep::open(dir.path()).unwrap();
    let (set, inventory) = scene(containers, rounds);
    let (mut set, mut inventory) = (Arc::new(set), Arc::new(inventory));
    let none = BTreeSet::new();
    let mut enforcer = stage::enforcer(&host);
    let mut binding = Binding::default();
    let (mut whole, mut parts) = (Parts::default(), Parts::default());
    let mut time = now();

    peak();
    let idle = peak();
    let _ = whole.time("bind everything", || binding.bind(&set, &inventory, &none, time));
    let bound = peak();
    let pairs = binding.ruleset().pairs.len();
    let few = (rounds / 10).clamp(3, 20);
    for _ in 0..few {
        whole.time("full replace, read back", || enforcer.repair(binding.ruleset()).expect("a kernel that takes it"));
    }
    let replaced = peak();
    for _ in 0..few {
        whole.time("the whole ruleset bound anew", || policy::bind(&set, &inventory, time));
        whole.time("the whole ruleset applied again", || enforcer.apply(binding.ruleset()).expect("a kernel that takes it"));
        whole.time("the whole ruleset saved", || keep.save(keep::RULESET, binding.ruleset()).expect("a disk"));
        whole.time("the plan saved", || keep.save(keep::PLAN, &*set).expect("a disk"));
        whole.time("the plan read from JSON", || {
            let json = std::fs::read(dir.path().join("plan.1")).expect("saved");
            let at = json.iter().position(|&b| b == b'\n').expect("a checksum line");
            serde_json::from_slice::<PolicySet>(&json[at + 1..]).expect("a plan")
        });
        whole.time("the kernel verified", || assert!(enforcer.verify().expect("a kernel that answers").is_empty()));
    }
    others(&host, pairs);

    for round in 0..rounds {
        // A rule that ends by itself: known without looking.
        time += SignedDuration::from_secs(1);
        let change = parts.time("one rule less, known: bind", || binding.bind(&set, &inventory, &none, time));
        assert_eq!((change.pairs.gone.len(), change.pairs.new.len()), (1, 0));
        parts.time("one rule less, known: kernel, read back", || enforcer.change(binding.ruleset(), &change).expect("taken"));
        parts.time("one rule less, known: noted on disk", || keep.append(keep::RULESET, &change).expect("a disk"));

        // A rule of a new plan: found by comparing two plans.
        let mut plan = (*set).clone();
        plan.policies.get_mut(&workload(containers / 2)).expect("there").egress.insert(outside(220, 3000 + round as u16));
        set = Arc::new(plan);
        let change = parts.time("one rule more, two plans compared: bind", || binding.bind(&set, &inventory, &none, time));
        assert_eq!((change.pairs.gone.len(), change.pairs.new.len()), (0, 1));
        parts.time("one rule more: kernel, read back", || enforcer.change(binding.ruleset(), &change).expect("taken"));

        // A container comes and goes.
        let mut here = (*inventory).clone();
        let new = Container { workload: workload(1), ..container(containers) };
        let id = new.id.clone();
        match here.containers.remove(&id) {
            Some(_) => {}
            None => drop(here.containers.insert(id, new)),
        }
        inventory = Arc::new(here);
        let change = parts.time("a container comes or goes: bind", || binding.bind(&set, &inventory, &none, time));
        assert!(change.pairs.new.len() + change.pairs.gone.len() >= 100);
        parts.time("a container comes or goes: kernel, read back", || enforcer.change(binding.ruleset(), &change).expect("taken"));

        // Last, and then the first rule again: it walks through a table of 262,144 places, and nothing of ours is in the caches behind it.
        parts.time("is anything alive to be ended", || host.run(|| living::read(binding.ruleset(), &inventory).expect("conntrack")));
        let mut plan = (*set).clone();
        plan.policies.get_mut(&workload(containers / 2)).expect("there").egress.insert(outside(221, 3000 + round as u16));
        set = Arc::new(plan);
        let change = binding.bind(&set, &inventory, &none, time);
        parts.time("one rule more, behind that: kernel, read back", || enforcer.change(binding.ruleset(), &change).expect("taken"));

        if round < few {
            let port = 1 + round;
            let words = format!("add element inet theirs pairs {{ 192.0.2.1 . {port} }}\n");
            parts.time("nft -f with one element", || fed(&host, "nft", &["-f", "-"], &words));
            let words = format!("*filter\n-A THEIRS -s 192.0.2.1/32 -p tcp --dport {port} -j ACCEPT\nCOMMIT\n");
            parts.time("iptables-restore --noflush with one rule", || fed(&host, "iptables-restore", &["--noflush"], &words));
        }
    }
    assert!(enforcer.verify().expect("a kernel that answers").is_empty());
    assert_eq!(Change::between(binding.ruleset(), &policy::bind(&set, &inventory, time)), Change::default());
    whole.print(pairs);
    let memory = [idle, bound, replaced].map(|bytes| grouped(bytes / 1e6));
    println!("memory at its highest: {} MB with plan and inventory, {} MB bound, {} MB replaced\n", memory[0], memory[1], memory[2]);
    parts.print(pairs);
}

pub(crate) fn run(short: bool) {
    let sizes: &[usize] = if short { &[10] } else { &[100, 1_000] };
    for &containers in sizes {
        one_size(containers, if short { 10 } else { 200 });
    }
}
