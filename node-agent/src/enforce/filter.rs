//! The table `inet bulkhead`: one meaning with `policy::evaluate`, in look-ups. See `policy::ruleset` for the reasons.
//!
//! The road of a packet, in this order:
//! 1. In prerouting, from a guarded bridge without the mark of the guard (table `bridge bulkhead`): dropped, whatever it says.
//!    In forward, what is established passes at once from there.
//! 2. Established, and begun here: passes. Connection tracking knows no bridges: where nobody is judged, anybody can make it believe
//!    in a connection between any two addresses. So what the filter let begin has a bit in its label, and nothing else counts. Where
//!    two watched bridges have the same addresses, the label also says whose connection it is, and on the other one each packet is judged.
//!    Related: ICMP errors from who may talk to the receiver; never redirects; what a helper expects is a connection like any other.
//! 3. The sender's side by (bridge, address): unknown on a guarded bridge is dropped, Open passes, cut is dropped, Audit and
//!    Enforce look up the pair. Then the receiver's side, likewise.
//! 4. Not allowed: an answer to what is allowed (TCP mid-flow after the connection table was lost, UDP after its entry
//!    expired) passes; else logged, and passed, refused or dropped by the side's standing.
//!
//! Each standing has a chain a direction, flat and with the same look-ups: the kernel validates chains once for each element of
//! a map that leads there, and nft 1.0.6 cannot list a map within a map.
//!
//! Behind that, for the bridges that are not watched: those made since the agent last looked ([`anew`]).
//!
//! In input `meta oif` is 0 and in output `meta iif` is 0, which is the node's own index: the same keys serve all hooks.

mod related;
mod sides;

use nix::libc;
use policy::evaluate::Standing;
use policy::policy_set::Direction;
use policy::ruleset::log;
use policy::segment::Refusal;

use super::anew;
use super::build::{Draft, Rate, rule};
use super::count::{self, Reason};
use super::elements::{Group, Kind, Shape};
use super::expression::{Field, Ip};
use super::model::{Chain, Dynamic, Family, Holds, Hook, Key, KeyType, Rule, Set, Table, Value, Verdict};
use super::{ACCEPTED, PINNED, UDP_ANSWER_WINDOW};
pub(super) use sides::side_verdict;
use sides::{audited, denied, lookups, refusal};

/// Before every filter of the engine (priority 0) and of iptables-nft: what is dropped here never gets there.
const PRIORITY: i32 = -10;

/// Before everything else in prerouting (NF_IP_PRI_RAW_BEFORE_DEFRAG in linux/netfilter_ipv4.h).
const BEFORE_TRACKING: i32 = -450;

/// UDP flows whose late answers are known, of each IP version; some 100 bytes each.
const FLOWS: u32 = 65_536;
/// An eighth of them in [`UDP_ANSWER_WINDOW`]: what a flood leaves is room for seven more.
const ASKED: Rate = Rate { a_second: 10, at_once: 2000 };

/// Bits of `ct state` (NF_CT_STATE_BIT in linux/netfilter/nf_conntrack_common.h).
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;
const NEW: u32 = 1 << 3;
/// With [`Draft::begun`]: what nobody has answered yet is new to connection tracking with each packet, and was judged with the first.
/// Not what is related: an ICMP error belongs to the connection that it quotes.
const GOING_ON: u32 = ESTABLISHED | NEW;

/// SYN and RST in the TCP flags.
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// What the map `doors` holds for a published port.
pub(super) fn door_verdict(standing: Standing) -> Option<Verdict> {
    Some(match standing {
        Standing::Open => return None,
        Standing::Audit => Verdict::Jump("door_audit"),
        Standing::Enforce(Refusal::Reject) => Verdict::Jump("door_refuse"),
        Standing::Enforce(Refusal::Drop) => Verdict::Jump("door_drop"),
        Standing::Quarantined => Verdict::Goto("cut"),
    })
}

/// Whether something is denied to a spot, so that it is asked who sends it ICMP errors.
pub(super) fn is_strict(standing: Standing) -> bool {
    match standing {
        Standing::Open | Standing::Audit => false,
        Standing::Enforce(_) | Standing::Quarantined => true,
    }
}

/// The name of a set of one IP version.
pub(super) fn named(base: &str, ip: Ip) -> String {
    match ip {
        Ip::V4 => format!("{base}4"),
        Ip::V6 => format!("{base}6"),
    }
}

fn address(ip: Ip) -> KeyType {
    match ip {
        Ip::V4 => KeyType::Ipv4,
        Ip::V6 => KeyType::Ipv6,
    }
}

const IPS: [Ip; 2] = [Ip::V4, Ip::V6];

fn source(ip: Ip) -> [Field; 2] {
    [Field::Iif, Field::Source(ip)]
}

fn destination(ip: Ip) -> [Field; 2] {
    [Field::Oif, Field::Destination(ip)]
}

fn ends(local: [Field; 2], remote: [Field; 2]) -> Vec<Field> {
    [local, remote].concat()
}

/// The table without elements of spots and pairs: these the caller fills in.
pub(super) fn table(shape: &Shape) -> Table {
    let mut table = Table { family: Family::Inet, sets: Default::default(), chains: Default::default() };
    constant_sets(&mut table);
    anew::sets(&mut table);
    for name in shape {
        table.sets.insert(name.to_string(), name.empty_set());
    }
    let first = Hook { number: libc::NF_INET_PRE_ROUTING as u32, priority: BEFORE_TRACKING };
    table.chains.insert("prerouting".to_owned(), Chain { hook: Some(first), rules: prerouting() });
    let mut chain = |name: &str, hook: Option<u32>, rules: Vec<Rule>| {
        let hook = hook.map(|number| Hook { number, priority: PRIORITY });
        table.chains.insert(name.to_owned(), Chain { hook, rules });
    };
    chain("forward", Some(libc::NF_INET_FORWARD as u32), forward());
    chain("input", Some(libc::NF_INET_LOCAL_IN as u32), input());
    chain("output", Some(libc::NF_INET_LOCAL_OUT as u32), output());
    chain("stranger", None, [strays(), decoys(), vec![impostors(), rule("").then(Verdict::Goto("judge"))]].concat());
    chain("stranger_arrival", None, [strays(), vec![rule("").then(Verdict::Goto("arrival"))]].concat());
    chain("judge", None, judge());
    chain("afresh", None, afresh());
    chain("arrival", None, arrival());
    chain("arrived", None, arrived());
    chain("related", None, related::related());
    chain("error", None, related::error());
    chain("error_stranger", None, related::error_stranger());
    chain("fresh", None, fresh());
    chain("sides", None, sides::sides());
    chain("anew", None, anew::bridges());
    chain("anew_node", None, anew::node());
    chain("homeless", None, anew::homeless());
    chain("pass", None, vec![rule("passes; the bridge table drops what lacks this mark").mark(0, ACCEPTED).then(Verdict::Accept)]);
    sides::chains(shape).into_iter().for_each(|(name, rules)| chain(name, None, rules));
    let cut = denied(Reason::Cut, log::DENY_CUT);
    chain("cut", None, [cut, vec![rule("cut off: a quarantined workload").drop()]].concat());
    let at_door = |end: Vec<Rule>| [door_allowed(shape), end].concat();
    chain("door", None, door());
    chain("door_audit", None, at_door(audited(Reason::AuditDoor, log::AUDIT_DOOR)));
    chain("door_refuse", None, at_door(refusal(Reason::Door, log::DENY_DOOR, Refusal::Reject)));
    chain("door_drop", None, at_door(refusal(Reason::Door, log::DENY_DOOR, Refusal::Drop)));
    count::add(&mut table, |table, name, rules| {
        table.chains.insert(name.to_owned(), Chain { hook: None, rules });
    });
    table
}

fn constant_sets(table: &mut Table) {
    let mut add = |name: String, set: Set| table.sets.insert(name, set);
    let names = [KeyType::InterfaceName];
    add("bridges".into(), Set::of(&names, "every bridge of the engine; what uses another interface is outside"));
    add("known".into(), Set::of(&names, "bridges that were there when the agent last looked"));
    add("watched".into(), Set::of(&names, "bridges whose packets are judged"));
    add("guarded".into(), Set::of(&names, "bridges where an unknown address is dropped"));
    // Most packets ask this, and a number is asked in half the time of a name.
    let index = KeyType::InterfaceIndex;
    add("guarded_index".into(), Set::of(&[index], "the same by number, where no two watched bridges have the same addresses"));
    add("twins".into(), Set::of(&[index], "watched bridges with addresses that another one has too"));
    add("homes".into(), Set::of(&[index, index], "the same twice: the home of a connection, and where it is at home"));
    for ip in IPS {
        let spot = [KeyType::InterfaceIndex, address(ip)];
        let verdicts = |key: &[KeyType], comment| Set { holds: Holds::Verdict, ..Set::of(key, comment) };
        for (name, unknown) in [("senders", "unknown_sender"), ("receivers", "unknown_receiver")] {
            let mut sides = verdicts(&spot, "how each address of a watched bridge is treated");
            sides.elements.insert(Key::Otherwise, Value::Verdict(Verdict::Jump(unknown)));
            add(named(name, ip), sides);
        }
        let port = [address(ip), KeyType::Protocol, KeyType::Port];
        add(named("doors", ip), verdicts(&port, "published ports"));
        add(named("inward", ip), verdicts(&port, "containers' published ports that the node itself may not reach"));
        add(named("ajar", ip), Set::of(&[KeyType::Protocol, KeyType::Port], "published ports that hear more than the node's addresses"));
        add(named("node", ip), Set::of(&[address(ip)], "the node's own addresses"));
        add(named("strict", ip), Set::of(&spot, "addresses in Enforce or cut off"));
        add(named("talk", ip), Set::of(&[spot, spot].concat(), "who may send ICMP errors to whom"));
        add(named("talk_outside", ip), Set::of(&spot, "who may send ICMP errors to the outside"));
        let filled = Dynamic { timeout: UDP_ANSWER_WINDOW, size: FLOWS };
        let mut fill = |name, key: &[KeyType], comment| add(named(name, ip), Set { dynamic: Some(filled), ..Set::of(key, comment) });
        let key = [KeyType::InterfaceIndex, address(ip), address(ip), KeyType::Port, KeyType::Port];
        fill("udp_seen", &key, "UDP flows whose late answers pass if their policy does");
        fill("askers", &spot, "who sends them, each at a bounded rate");
        fill("roads", &key[..1], "by which interface they come where an address may be anybody's");
    }
    // RFC 792: destination unreachable, time exceeded, parameter problem. Redirect (5) is not among them, and never will be.
    add("errors4".into(), types(KeyType::IcmpType, "ICMP errors", &[3, 11, 12]));
    // RFC 4443: destination unreachable, packet too big, time exceeded, parameter problem.
    add("errors6".into(), types(KeyType::Icmpv6Type, "ICMPv6 errors", &[1, 2, 3, 4]));
    add("neighbours".into(), neighbours());
    add("link_matters".into(), link_matters());
}

pub(super) fn types(key: KeyType, comment: &str, types: &[u8]) -> Set {
    let mut set = Set::of(&[key], comment);
    types.iter().for_each(|&number| set.insert(vec![number, 0, 0, 0], Value::Nothing));
    set
}

/// RFC 4861, 2710, 3810: router discovery and multicast listeners, a matter between a host and its router.
pub(super) fn link_matters() -> Set {
    let link = &[130, 131, 132, 133, 134, 135, 136, 143];
    types(KeyType::Icmpv6Type, "what a host and its router say to each other", link)
}

/// RFC 4861: solicitation and advertisement of neighbours.
pub(super) fn neighbours() -> Set {
    types(KeyType::Icmpv6Type, "neighbour discovery between any two ends of a bridge", &[135, 136])
}

/// The guard's mark is believed before anybody else has the packet: later it may be one that a tool keeps with a connection, and what
/// comes from a guarded bridge needs no mark, since the guard let it in.
fn prerouting() -> Vec<Rule> {
    vec![
        rule("let in by the guard of its port").mark_has(PINNED).then(Verdict::Accept),
        rule("not let in by it: spoofed, or from a port nobody bound yet").within(&[Field::Iifname], "guarded").drop(),
        // Here too, or connection tracking would take it for a piece of somebody's packet, or for part of somebody's connection.
        around_the_bridge().drop(),
    ]
}

/// What comes by a road that is not guarded has no address of a network that is. Connection tracking knows no roads: it would take such
/// a packet for one of a connection that was allowed.
fn strays() -> Vec<Rule> {
    let stray = |ip| {
        let draft =
            rule("an address of a guarded network, by another road").within(&[Field::Protocol, Field::Source(ip)], &named("subnets", ip));
        // Link-local addresses are everybody's, and a connection from one is a bridge's own: it is not routed.
        let draft = if ip == Ip::V6 { draft.not_link_local_source() } else { draft };
        draft.then(Verdict::Goto("homeless"))
    };
    IPS.map(stray).into()
}

/// Nor does it go by such a road to one: who is on a bridge that is not guarded would have a connection begin there, between
/// addresses of its choice, that the filter then lets go on where it is guarded.
fn decoys() -> Vec<Rule> {
    let decoy = |ip| {
        let draft = rule("to an address of a guarded network, by another road").not_within(&[Field::Oifname], "guarded");
        let draft = draft.within(&[Field::Protocol, Field::Destination(ip)], &named("subnets", ip));
        let draft = if ip == Ip::V6 { draft.not_link_local_destination() } else { draft };
        draft.then(Verdict::Goto("homeless"))
    };
    IPS.map(decoy).into()
}

/// Nor does a container where nobody is guarded take the part of one outside, or on another network, in a connection that lives: it has
/// such an address by itself, and is asked for it. Nothing is dropped for that alone, since of two bridges with one subnet one is such a road.
fn impostors() -> Rule {
    let from = rule("from a network where nobody is guarded, with an address that is elsewhere").within(&[Field::Iifname], "bridges");
    let into = from.within(&[Field::Oifname], "guarded").state(GOING_ON).begun();
    into.of_another_road().then(Verdict::Goto("afresh"))
}

fn forward() -> Vec<Rule> {
    vec![
        rule("what follows a connection that was allowed, from who it says: the road of most packets")
            .within(&[Field::Iif], "guarded_index")
            .state(GOING_ON)
            .begun()
            .mark(0, ACCEPTED)
            .then(Verdict::Accept),
        rule("from a guarded bridge, from who it says").within(&[Field::Iifname], "guarded").then(Verdict::Goto("judge")),
        rule("from a watched bridge").within(&[Field::Iifname], "watched").then(Verdict::Goto("stranger")),
        rule("to a watched bridge").within(&[Field::Oifname], "watched").then(Verdict::Goto("stranger")),
        anew::from("anew"),
        anew::to("anew"),
    ]
}

/// Neither a bridge's hooks nor the bridge's name in ours: such a frame goes past both, as if the port were no port (br_handle_frame
/// returns RX_HANDLER_PASS). The node would take the IP packet in it.
fn around_the_bridge() -> Draft {
    rule("IP to a MAC address of bridge protocols: it came in around the bridge").reserved_destination()
}

fn input() -> Vec<Rule> {
    vec![
        // Loopback is always allowed; what rides on it to a published port is listed by status.
        rule("the node's own loopback").equals(Field::Iifname, &super::model::interface_name("lo")).then(Verdict::Return),
        // Out of a tunnel on the node with the mark of who went in.
        around_the_bridge().drop(),
        rule("from a container to the node, from who it says").within(&[Field::Iifname], "guarded").then(Verdict::Goto("arrival")),
        rule("from a container to the node").within(&[Field::Iifname], "watched").then(Verdict::Goto("stranger_arrival")),
        anew::from("anew_node"),
        rule("to a port published by the engine's proxy").then(Verdict::Goto("door")),
    ]
}

fn output() -> Vec<Rule> {
    let watched = |comment| rule(comment).within(&[Field::Oifname], "watched");
    // The engine translates in this very hook (priority -100), and the interface stays what it was at its beginning: loopback.
    let inward = |&ip: &Ip| {
        let own = rule("the node's own to a published port, translated").equals(Field::Oifname, &super::model::interface_name("lo"));
        own.ip(ip).state(NEW).dispatch(&door_key(ip), &named("inward", ip))
    };
    let mut rules: Vec<Rule> = IPS.iter().map(inward).collect();
    let own =
        rule("what is translated to a container's is answered from its bridge").equals(Field::Oifname, &super::model::interface_name("lo"));
    rules.extend([
        own.state(NEW).begin().done(),
        watched("the node as router")
            .ip(Ip::V6)
            .l4(libc::IPPROTO_ICMPV6 as u8)
            .within(&[Field::Icmpv6Type], "link_matters")
            .then(Verdict::Accept),
        watched("the node as multicast querier").l4(libc::IPPROTO_IGMP as u8).then(Verdict::Accept),
        watched("from the node to a container").then(Verdict::Goto("judge")),
        anew::to("anew_node"),
    ]);
    rules
}

/// A connection of bridges with the same addresses is one to connection tracking, and was allowed on that bridge alone where it is at
/// home. An interface that is none of them is not asked.
fn of_another(interface: Field, chain: &'static str) -> Rule {
    let shared = rule("another bridge's connection, for all that connection tracking knows").within(&[interface], "twins");
    shared.not_at_home(interface, "homes").then(Verdict::Goto(chain))
}

/// The first bridge of them by which it is allowed is its home.
fn at_home(interface: Field) -> Rule {
    rule("whose connection it is").within(&[interface], "twins").settle(interface)
}

/// Link-local addresses are on every bridge, and where nobody is guarded anybody takes any of them. What begins between them there is
/// judged packet by packet, which drops nothing on that bridge, and lets it go on nowhere else.
fn everybodys(interface: Field) -> Draft {
    rule("between addresses that every bridge has, where nobody is guarded").not_within(&[interface], "guarded").link_local_source()
}

fn judge() -> Vec<Rule> {
    vec![
        of_another(Field::Iif, "afresh"),
        of_another(Field::Oif, "afresh"),
        rule("answers and what follows a connection that was allowed").state(GOING_ON).begun().then(Verdict::Goto("pass")),
        rule("").then(Verdict::Goto("afresh")),
    ]
}

fn afresh() -> Vec<Rule> {
    vec![
        rule("neighbour discovery; the guard has checked who claims what")
            .ip(Ip::V6)
            .l4(libc::IPPROTO_ICMPV6 as u8)
            .within(&[Field::Icmpv6Type], "neighbours")
            // Hop limit 255: it was not routed (RFC 4861, 7.1).
            .network_bytes(7, &[255])
            .then(Verdict::Goto("pass")),
        rule("what quotes a connection that was allowed").state(RELATED).then(Verdict::Goto("related")),
        rule("").then(Verdict::Goto("fresh")),
    ]
}

/// Input of a watched bridge.
fn arrival() -> Vec<Rule> {
    let mut rules = Vec::new();
    for ip in IPS {
        let answer = rule("to a published port, as if it were an answer").state(ESTABLISHED).answers(true).ip(ip);
        rules.push(answer.dispatch(&door_key(ip), &named("doors", ip)));
    }
    rules.extend([
        of_another(Field::Iif, "arrived"),
        rule("answers and what follows a connection that was allowed").state(GOING_ON).begun().then(Verdict::Goto("pass")),
        rule("").then(Verdict::Goto("arrived")),
    ]);
    rules
}

fn arrived() -> Vec<Rule> {
    vec![
        rule("what a host says to its router")
            .ip(Ip::V6)
            .l4(libc::IPPROTO_ICMPV6 as u8)
            .within(&[Field::Icmpv6Type], "link_matters")
            .then(Verdict::Accept),
        rule("multicast membership").l4(libc::IPPROTO_IGMP as u8).then(Verdict::Accept),
        rule("what quotes a connection that was allowed").state(RELATED).then(Verdict::Goto("related")),
        rule("").then(Verdict::Jump("sides")),
        rule("").then(Verdict::Jump("door")),
        answer_begins_nothing().then(Verdict::Accept),
        authenticated_begins_nothing().then(Verdict::Accept),
        everybodys(Field::Iifname).then(Verdict::Accept),
        at_home(Field::Iif),
        rule("every side allows it").begin().then(Verdict::Accept),
    ]
}

/// Connection tracking lets a request pass that comes where it takes a connection for open or just reset (TCP_CONNTRACK_IGNORE in
/// nf_conntrack_proto_tcp.c). So a connection begins with what its client may send, or who may answer would ask behind an answer.
fn answer_begins_nothing() -> Draft {
    rule("an answer begins no connection").tcp_flags(SYN, 0).mark_has(ACCEPTED)
}

/// Connection tracking takes an IPv6 packet with an authentication header for what is behind that (ipv6_skip_exthdr), and the filter
/// stops there (ipv6_find_hdr with IP6_FH_F_AUTH): who may send such packets would begin a connection of any protocol and port.
fn authenticated_begins_nothing() -> Draft {
    rule("nor does what is behind an authentication header").ip(Ip::V6).l4(libc::IPPROTO_AH as u8)
}

/// Whose flows these are, and no more of them than leave room for those of others. Where nobody is guarded, and outside, anybody
/// takes any address: there it is the interface.
fn remembered(ip: Ip) -> [Rule; 2] {
    let key = [Field::Iif, Field::Source(ip), Field::Destination(ip), Field::SourcePort, Field::DestinationPort];
    let flow = |comment| rule(comment).ip(ip).l4(libc::IPPROTO_UDP as u8);
    let own = flow("so that a late answer is known as one").within(&[Field::Iifname], "guarded");
    let other = flow("the same of who may be anybody").not_within(&[Field::Iifname], "guarded");
    let seen = named("udp_seen", ip);
    [
        own.bounded(ASKED, &[Field::Iif, Field::Source(ip)], &named("askers", ip)).remember(&key, &seen),
        other.bounded(ASKED, &[Field::Iif], &named("roads", ip)).remember(&key, &seen),
    ]
}

/// What begins a connection, or follows one that the kernel has lost.
fn fresh() -> Vec<Rule> {
    let mut rules = vec![rule("").then(Verdict::Jump("sides"))];
    rules.extend(IPS.iter().flat_map(|ip| remembered(*ip)));
    rules.push(answer_begins_nothing().then(Verdict::Goto("pass")));
    // It is what the client's kernel says to an answer that nobody asked for.
    rules.push(rule("nor does a reset").tcp_flags(RST, RST).then(Verdict::Goto("pass")));
    rules.push(authenticated_begins_nothing().then(Verdict::Goto("pass")));
    rules.extend([everybodys(Field::Oifname).then(Verdict::Goto("pass")), at_home(Field::Iif), at_home(Field::Oif)]);
    rules.push(rule("every side allows it").begin().then(Verdict::Goto("pass")));
    rules
}

fn door_key(ip: Ip) -> [Field; 3] {
    [Field::Destination(ip), Field::L4Protocol, Field::DestinationPort]
}

/// Everything that arrives at the node comes by here: one look-up, for all that is no door.
fn door() -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    for ip in IPS {
        let ajar = rule("the proxy hears broadcast, multicast and loopback from elsewhere too").ip(ip);
        let ajar = ajar.within(&[Field::L4Protocol, Field::DestinationPort], &named("ajar", ip));
        rules.push(ajar.not_within(&[Field::Destination(ip)], &named("node", ip)).drop());
    }
    let doors = |&ip: &Ip| rule("a port published by the engine's proxy").ip(ip).dispatch(&door_key(ip), &named("doors", ip));
    rules.extend(IPS.iter().map(doors));
    rules
}

fn door_allowed(shape: &Shape) -> Vec<Rule> {
    // A door is one port: what a spot may reach of it is never a range.
    let shape = shape.iter().filter(|name| name.kind != Kind::SpotRanges).copied().collect();
    lookups(&shape, Direction::Ingress, false, &[Group::Tcp, Group::Udp, Group::Sctp])
}
