//! The data plane: what packets between two containers of one bridge pay, side by side with what a user would have otherwise.

use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use lab::{Bridge, Member, Netns};
use node_agent::enforce::{Enforcer, Nftables, sums};
use node_agent::inventory::Snapshot;
use node_agent::observe::{Observer, Options};
use policy::Mode;
use policy::policy_set::Direction;
use policy::ruleset::{Pair, Remote, Spot};
use tokio::sync::watch;

use crate::figures::{Samples, Table, grouped, time};
use crate::stage::{self, Policy};
use crate::traffic::{self, PORTS, Serving};

/// How packets are filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    /// None at all: br_netfilter is off.
    Plain,
    /// br_netfilter on and connections tracked: what a host with any stateful rule has.
    Conntrack,
    /// Ours with so many pairs, all guards on.
    Ours(usize),
    /// The same without the program that looks at sums: what that costs.
    Unsummed(usize),
    /// The same with the agent's observer listening.
    Observed(usize),
    /// iptables: established first, then so many rules one after the other, the right ones last.
    Linear(usize),
}

impl Filter {
    fn name(self) -> String {
        match self {
            Self::Plain => "plain bridge".to_owned(),
            Self::Conntrack => "conntrack only".to_owned(),
            Self::Ours(pairs) => format!("ours, {} rules", grouped(pairs as f64)),
            Self::Unsummed(pairs) => format!("ours, {} rules, no look at sums", grouped(pairs as f64)),
            Self::Observed(pairs) => format!("ours, {} rules, observed", grouped(pairs as f64)),
            Self::Linear(rules) => format!("iptables, {} rules in a line", grouped(rules as f64)),
        }
    }
}

const ALL: [Filter; 7] = [
    Filter::Conntrack,
    Filter::Plain,
    Filter::Ours(10),
    Filter::Ours(10_000),
    Filter::Unsummed(10),
    Filter::Observed(10),
    Filter::Linear(1_000),
];

/// Rounds and the time of each measurement in one.
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
}

struct Held {
    /// Kept for what their drop takes away.
    _enforcer: Option<Nftables>,
    /// What looks at sums that are yet to be written, where the kernel takes it.
    _sums: Option<Vec<OwnedFd>>,
    _observer: Option<(Observer, watch::Sender<Arc<Snapshot>>, std::thread::JoinHandle<()>)>,
}

/// Pairs that nobody uses, in the sets where the used ones are.
fn filler(count: usize) -> impl Iterator<Item = Pair> {
    let spot = |n: u32| Spot { bridge: Some("br0".into()), address: std::net::Ipv4Addr::from(0x0a01_0100 + n).into() };
    (0..count as u32).map(move |n| {
        let direction = if n.is_multiple_of(2) { Direction::Egress } else { Direction::Ingress };
        let service = policy::Service::tcp(1 + (n % 60_000) as u16);
        Pair { direction, local: spot(n / 100), remote: Remote::Spot(spot(n % 200)), ports: service.into() }
    })
}

fn set_up(filter: Filter, host: &Netns, bridge: &Bridge<'_>, client: &Member, server: &Member) -> Held {
    let mut held = Held { _enforcer: None, _sums: None, _observer: None };
    bridge.set_nf_call(filter != Filter::Plain);
    match filter {
        Filter::Plain => {}
        Filter::Conntrack => {
            host.nft("add table inet tracked; add chain inet tracked forward { type filter hook forward priority 0; }; add rule inet tracked forward ct state invalid accept");
        }
        Filter::Ours(pairs) | Filter::Unsummed(pairs) | Filter::Observed(pairs) => {
            let inventory = stage::inventory(&[(bridge, &[("client", client), ("server", server)])]);
            let mut policy = Policy::default().mode(Mode::Enforce, &["client", "server"]);
            for (protocol, port) in PORTS {
                policy = policy.allow("client", "server", &format!("{protocol}/{port}"));
            }
            let mut ruleset = policy.bind(&inventory);
            let used = ruleset.pairs.len();
            ruleset.pairs.extend(filler(pairs.saturating_sub(used)));
            let mut enforcer = stage::enforcer(host);
            stage::apply(&mut enforcer, &ruleset);
            assert_eq!(enforcer.verify().expect("a kernel that answers"), vec![]);
            held._enforcer = Some(enforcer);
            if !matches!(filter, Filter::Unsummed(_)) {
                held._sums = host.run(|| sums::keep_out().ok());
            }
            if matches!(filter, Filter::Observed(_)) {
                let snapshot = Arc::new(Snapshot { inventory: inventory.into(), ..Snapshot::default() });
                let (keep, snapshots) = watch::channel(snapshot);
                let (mut facts, observer) = host.run(|| Observer::start(Options::default(), snapshots)).expect("an observer");
                // The agent's part of the work is in another process; here the facts are only taken.
                let reader = std::thread::spawn(move || while facts.blocking_recv().is_some() {});
                held._observer = Some((observer, keep, reader));
            }
        }
        Filter::Linear(rules) => {
            let mut text = String::from("*filter\n:FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n");
            for n in 0..rules.saturating_sub(PORTS.len()) {
                let _ = writeln!(text, "-A FORWARD -s 10.1.{}.{} -d {} -p tcp --dport {} -j ACCEPT", n / 250, n % 250, server.v4, 1 + n);
            }
            for (protocol, port) in PORTS {
                let _ = writeln!(text, "-A FORWARD -s {} -d {} -p {protocol} --dport {port} -j ACCEPT", client.v4, server.v4);
            }
            text.push_str("COMMIT\n");
            let file = tempfile::NamedTempFile::new().expect("a temporary file");
            std::fs::write(file.path(), text).expect("room for a file");
            host.check(Command::new("iptables-restore").arg(file.path()));
        }
    }
    held
}

/// What is measured, and how it is shown.
const MEASURED: [(&str, fn(f64) -> String); 9] = [
    ("TCP throughput, one stream", |bytes| format!("{:.1} Gbit/s", bytes * 8.0 / 1e9)),
    ("connections a second, one after the other", grouped),
    ("processor time of a connection, both ends", time),
    ("request and answer, p50", time),
    ("request and answer, p99", time),
    ("UDP packets of 16 bytes a second, in a flow that was answered", grouped),
    ("processor time of such a packet, both ends", time),
    ("UDP packets of 16 bytes a second, never answered", grouped),
    ("processor time of such a packet, both ends", time),
];

/// Runs it.
pub(crate) fn run(effort: &Effort) {
    let hosts: Vec<Netns> = ALL.iter().map(|_| Netns::new("host")).collect();
    let mut scenes = Vec::new();
    for (filter, host) in ALL.into_iter().zip(&hosts) {
        let mut bridge = Bridge::new(host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
        let (client, server) = (bridge.add("client"), bridge.add("server"));
        let held = set_up(filter, host, &bridge, &client, &server);
        // What is reset is forgotten soon: the table never fills.
        if filter != Filter::Plain {
            host.set_sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1");
        }
        let serving = Serving::start(&server);
        scenes.push((filter, client, server, serving, held));
    }
    let mut taken: [Vec<Samples>; MEASURED.len()] = std::array::from_fn(|_| vec![Samples::default(); ALL.len()]);
    let bar = crate::progress(effort.rounds as u64);
    for round in 0..effort.rounds {
        // Each round begins with another one, so that none is always first.
        for offset in 0..ALL.len() {
            let at = (round + offset) % ALL.len();
            let (_, client, _, serving, _) = &scenes[at];
            let connects = traffic::connects(client, serving, effort.window);
            let took = traffic::requests(client, serving, effort.window);
            let [answered, one_way] = [true, false].map(|answered| traffic::datagrams(client, serving, answered, effort.window));
            let values = [
                traffic::throughput(client, serving, effort.window),
                connects.rate,
                connects.cost,
                took.quantile(0.5),
                took.quantile(0.99),
                answered.rate,
                answered.cost,
                one_way.rate,
                one_way.cost,
            ];
            taken.iter_mut().zip(values).for_each(|(samples, value)| samples[at].push(value));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    for ((what, show), samples) in MEASURED.into_iter().zip(&taken) {
        println!("{what}: median of {} rounds; the ratio to conntrack only, round by round, with its 95 % interval", effort.rounds);
        let mut table = Table::new(&["", "median", "to conntrack only", "to ours, 10 rules"]);
        for (at, filter) in ALL.iter().enumerate() {
            let base = samples[at].over(&samples[0]);
            let ours = samples[at].over(&samples[2]);
            table.row([filter.name(), show(samples[at].median().value), base.ratio(), ours.ratio()]);
        }
        table.print();
    }
}
