//! What the data plane's cost is made of, and what would be faster: each of the first five scenes has all of the one before; then other
//! ways to ask the same, then ours, then two ways that know no connections.

use std::time::Duration;

use lab::{Bridge, Member, Netns};
use node_agent::enforce::Nftables;
use policy::Mode;

use crate::figures::{Samples, Table, grouped, time};
use crate::plane::Effort;
use crate::shortcut::{self, Shortcut};
use crate::stage::{self, Policy};
use crate::traffic::{self, PORTS, Serving};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scenery {
    Conntrack,
    Hooks,
    Sender,
    Receiver,
    Label,
    Sized,
    Ingress,
    Ours,
    Plain,
    Stateless,
    Shortcut,
}

const ALL: [(Scenery, &str); 11] = [
    (Scenery::Conntrack, "conntrack only"),
    (Scenery::Hooks, "two hooks of the bridge, which ask nothing"),
    (Scenery::Sender, "the sender's port, MAC and IP address looked up"),
    (Scenery::Receiver, "the receiver's too"),
    (Scenery::Label, "state and label of the connection"),
    (Scenery::Sized, "the same, addresses in a set of a fixed size"),
    (Scenery::Ingress, "the same, the sender looked up at its port's ingress"),
    (Scenery::Ours, "Bulkhead, 10 rules, all guards on"),
    (Scenery::Plain, "plain bridge"),
    (Scenery::Stateless, "without connections: both looked up, and the pair and port, in the bridge's tables"),
    (Scenery::Shortcut, "without connections: eBPF from port to port"),
];

struct Held {
    _enforcer: Option<Nftables>,
    _shortcut: Option<Shortcut>,
}

/// Tables with what a scene asks, written as a person would.
fn text(scenery: Scenery, client: &Member, server: &Member) -> String {
    let own = |member: &Member| format!("\"{}\" . {} . {}", member.port, lab::bridge::mac_text(member.mac), member.v4);
    let asks = |least, rule: &str| if scenery >= least { rule.to_owned() } else { String::new() };
    let both = [own(client), own(server)].join(", ");
    let stateless = scenery == Scenery::Stateless;
    let mut inet = String::new();
    if !stateless {
        let label = asks(Scenery::Label, "ct state established,new ct label 96 meta mark set meta mark | 2 accept; ct label set 96;");
        inet = format!(
            "table inet asked {{ chain forward {{ type filter hook forward priority -10; ct state invalid accept; {label} }}; }}\n"
        );
    }
    if scenery == Scenery::Conntrack {
        return inet;
    }
    let size = if scenery == Scenery::Sized { "size 4096;" } else { "" };
    let at_ingress = |member: &Member| {
        let (port, mac, address) = (&member.port, lab::bridge::mac_text(member.mac), member.v4);
        format!(
            "set of_{port} {{ type ether_addr . ipv4_addr; elements = {{ {mac} . {address} }}; }};
             chain at_{port} {{ type filter hook ingress device \"{port}\" priority -300;
               ether type ip ether saddr . ip saddr @of_{port} meta mark set meta mark | 1 accept; }}; "
        )
    };
    let ingress = if scenery == Scenery::Ingress {
        format!("table netdev asked {{ {} {} }}\n", at_ingress(client), at_ingress(server))
    } else {
        String::new()
    };
    let sender = asks(Scenery::Sender, "ether type ip iif . ether saddr . ip saddr @own meta mark set meta mark | 1 accept;");
    let prerouting = if scenery == Scenery::Ingress {
        String::new()
    } else {
        format!("chain prerouting {{ type filter hook prerouting priority -300; {sender} }};")
    };
    let receiver = asks(Scenery::Receiver, "ether type ip oif . ether daddr . ip daddr @own accept;");
    let receiver = if stateless {
        let way = |from: &Member, to: &Member, port: &str| {
            let pairs: Vec<_> = PORTS.iter().map(|(protocol, number)| format!("{} . {} . {protocol} . {number}", from.v4, to.v4)).collect();
            let pairs = pairs.join(", ");
            format!("ether type ip oif . ether daddr . ip daddr @own ip saddr . ip daddr . meta l4proto . th {port} {{ {pairs} }} accept;")
        };
        format!("{} {} ether type ip drop;", way(client, server, "dport"), way(server, client, "sport"))
    } else {
        receiver
    };
    format!(
        "{inet}{ingress}table bridge asked {{ set own {{ type iface_index . ether_addr . ipv4_addr; {size} elements = {{ {both} }}; }};
           {prerouting}
           chain forward {{ type filter hook forward priority 200; {receiver} }}; }}"
    )
}

fn set_up(scenery: Scenery, host: &Netns, bridge: &Bridge<'_>, client: &Member, server: &Member) -> Held {
    let mut held = Held { _enforcer: None, _shortcut: None };
    bridge.set_nf_call(!matches!(scenery, Scenery::Plain | Scenery::Stateless | Scenery::Shortcut));
    match scenery {
        Scenery::Plain => {}
        Scenery::Shortcut => held._shortcut = Some(shortcut::between(host, client, server, &PORTS).expect("a kernel with tcx (6.6)")),
        Scenery::Ours => {
            let inventory = stage::inventory(&[(bridge, &[("client", client), ("server", server)])]);
            let policy = Policy::default().mode(Mode::Enforce, &["client", "server"]);
            let policy =
                PORTS.iter().fold(policy, |policy, (protocol, port)| policy.allow("client", "server", &format!("{protocol}/{port}")));
            let mut enforcer = stage::enforcer(host);
            stage::apply(&mut enforcer, &policy.bind(&inventory));
            held._enforcer = Some(enforcer);
        }
        Scenery::Conntrack
        | Scenery::Hooks
        | Scenery::Sender
        | Scenery::Receiver
        | Scenery::Label
        | Scenery::Sized
        | Scenery::Ingress
        | Scenery::Stateless => {
            host.nft(&text(scenery, client, server));
        }
    }
    held
}

/// What is measured, and how it is shown.
const MEASURED: [(&str, fn(f64) -> String); 4] = [
    ("UDP packets of 16 bytes a second, in a flow that was answered", grouped),
    ("processor time of such a packet, both ends", time),
    ("request and answer, p50", time),
    ("TCP throughput, one stream", |bytes| format!("{:.1} Gbit/s", bytes * 8.0 / 1e9)),
];

/// Runs it.
pub(crate) fn run(short: bool) {
    let effort = Effort { rounds: if short { 4 } else { 20 }, window: Duration::from_millis(if short { 100 } else { 200 }) };
    let hosts: Vec<Netns> = ALL.iter().map(|_| Netns::new("host")).collect();
    let mut scenes = Vec::new();
    for ((scenery, _), host) in ALL.into_iter().zip(&hosts) {
        let mut bridge = Bridge::new(host, "br0", "10.1.0.0/16", "2001:db8:1::/64");
        let (client, server) = (bridge.add("client"), bridge.add("server"));
        let held = set_up(scenery, host, &bridge, &client, &server);
        let serving = Serving::start(&server);
        scenes.push((client, server, serving, held));
    }
    let mut taken: [Vec<Samples>; MEASURED.len()] = std::array::from_fn(|_| vec![Samples::default(); ALL.len()]);
    let bar = crate::progress(effort.rounds as u64);
    for round in 0..effort.rounds {
        for offset in 0..ALL.len() {
            let at = (round + offset) % ALL.len();
            let (client, _, serving, _) = &scenes[at];
            let packets = traffic::datagrams(client, serving, true, effort.window);
            let took = traffic::requests(client, serving, effort.window).quantile(0.5);
            let values = [packets.rate, packets.cost, took, traffic::throughput(client, serving, effort.window)];
            taken.iter_mut().zip(values).for_each(|(samples, value)| samples[at].push(value));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    for ((what, show), samples) in MEASURED.into_iter().zip(&taken) {
        println!("{what}: median of {} rounds; the ratio to conntrack only, round by round, with its 95 % interval", effort.rounds);
        let mut table = Table::new(&["", "median", "to conntrack only"]);
        for ((_, name), of) in ALL.iter().zip(samples) {
            table.row([(*name).to_owned(), show(of.median().value), of.over(&samples[0]).ratio()]);
        }
        table.print();
    }
}
