//! The table `bridge bulkhead`: what a port of a guarded bridge may send from, and nothing passes a bridge that the filter did
//! not see.
//!
//! # Why
//! In the inet hooks the interface is the bridge, never the port, so a sender's address can only be believed if something
//! before them has tied it to the port. And the inet hooks see a bridge's packets only while its nf_call switches are on:
//! with them off, what lacks the filter's mark is dropped here. Off means closed.

use nix::libc;
use policy::ruleset::log;

use super::anew;
use super::build::rule;
use super::count;
use super::expression::{Field, Ip};
use super::model::{Chain, Family, Hook, KeyType, Rule, Set, Table, Value, Verdict, part};
use super::{ACCEPTED, PINNED};
use std::net::Ipv6Addr;

/// First of all in prerouting (NF_BR_PRI_NAT_DST_BRIDGED), before br_netfilter hands packets to the inet hooks (0).
const BEFORE_INET: i32 = -300;
/// After br_netfilter's own hook in forward (-1), so after the filter (NF_BR_PRI_FILTER_OTHER).
const BEHIND_INET: i32 = 200;

const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = Ip::V4.ethertype();
const IPV6: [u8; 2] = Ip::V6.ethertype();

/// The address that IPv6 makes from a MAC address by itself (RFC 4291, appendix A).
pub(super) fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The table without the elements of its ports: these the caller fills in.
pub(super) fn table() -> Table {
    let mut table = Table { family: Family::Bridge, sets: Default::default(), chains: Default::default() };
    let port = KeyType::InterfaceName;
    let ports = Set::of(&[KeyType::InterfaceIndex], "ports of guarded bridges");
    let macs = Set::of(&[port, KeyType::Mac], "the MAC address of a port");
    // Each packet asks these, and a number is asked in half the time of a name.
    let index = KeyType::InterfaceIndex;
    let own4 = Set::of(&[index, KeyType::Mac, KeyType::Ipv4], "the IPv4 addresses of a port, with its MAC address");
    let own6 = Set::of(&[index, KeyType::Mac, KeyType::Ipv6], "the IPv6 addresses of a port, with its MAC address");
    let mut ethertypes = Set::of(&[KeyType::EtherType], "what may cross: IPv4, IPv6, ARP");
    for ethertype in [ARP, IPV4, IPV6] {
        let mut key = Vec::new();
        part(&mut key, &ethertype);
        ethertypes.insert(key, Value::Nothing);
    }
    for (name, set) in [("ports", ports), (MACS, macs), ("own4", own4), ("own6", own6), ("ethertypes", ethertypes)] {
        table.sets.insert(name.to_owned(), set);
    }
    anew::sets(&mut table);
    let bystanders = Set::of(&[port], "ports of bridges that are not guarded");
    let tags = Set::of(&[KeyType::EtherType], "802.1Q and 802.1ad");
    // RFC 2710, 3 and RFC 4286, 5.
    let queriers = super::filter::types(KeyType::Icmpv6Type, "listener queries, multicast routers' advertisements", &[130, 151]);
    let (neighbours, link_matters) = (super::filter::neighbours(), super::filter::link_matters());
    let more =
        [("bystanders", bystanders), ("neighbours", neighbours), ("link_matters", link_matters), ("tags", tags), ("queriers", queriers)];
    for (name, set) in more {
        table.sets.insert(name.to_owned(), set);
    }
    let mut chain = |name: &str, hook: Option<Hook>, rules: Vec<Rule>| {
        table.chains.insert(name.to_owned(), Chain { hook, rules });
    };
    chain("prerouting", Some(Hook { number: libc::NF_BR_PRE_ROUTING as u32, priority: BEFORE_INET }), prerouting());
    chain("port", None, port_rules());
    chain("arp", None, arp());
    chain("ipv6", None, ipv6());
    chain("nameless", None, nameless());
    chain("fragment", None, fragment());
    let ((name, set), (count_spoofed, counting)) = count::spoofed();
    chain(count_spoofed, None, counting);
    let counted = rule("").then(Verdict::Jump(count_spoofed));
    chain("spoofed", None, vec![counted, rule("").log(log::DENY_GROUP, log::DENY_SPOOF), rule("sent from what is not its own").drop()]);
    chain("forward", Some(Hook { number: libc::NF_BR_FORWARD as u32, priority: BEHIND_INET }), forward());
    chain("output", Some(Hook { number: libc::NF_BR_LOCAL_OUT as u32, priority: BEHIND_INET }), output());
    chain("astray", None, astray());
    chain("seen", None, seen());
    chain("anew", None, anew::ports());
    chain("homeless", None, anew::homeless_ports());
    table.sets.insert(name, set);
    table
}

/// The set of ports and their MAC addresses.
pub(super) const MACS: &str = "macs";

const PORT: Field = Field::Iif;

/// Most packets are IP from who they say they are: they meet one look-up and no other rule of the port.
fn prerouting() -> Vec<Rule> {
    vec![
        rule("IPv4 without options from its own port, MAC and IPv4 address")
            .plain_ipv4()
            .within(&[PORT, Field::EtherSource, Field::Source(Ip::V4)], "own4")
            .mark(ACCEPTED, PINNED)
            .then(Verdict::Accept),
        is_type("IPv6 from its own port, MAC and IPv6 address", IPV6)
            .within(&[PORT, Field::EtherSource, Field::Source(Ip::V6)], "own6")
            .then(Verdict::Goto("ipv6")),
        rule("from a port of a guarded bridge").within(&[PORT], "ports").then(Verdict::Goto("port")),
        piece("a piece of a guarded workload's IPv4 packet, by another port", Ip::V4).then(Verdict::Goto("spoofed")),
        // Link-local addresses are everybody's, and their queues are a bridge's own (net/ipv6/netfilter/nf_conntrack_reasm.c, fq_find).
        piece("a piece of a guarded workload's IPv6 packet, by another port", Ip::V6)
            .not_link_local_source()
            .then(Verdict::Goto("spoofed")),
        // Not where the receiver's address is none of these (the same function goes by that one).
        piece("a piece of its IPv6 packet from a link-local address, by another port", Ip::V6)
            .not_link_local_destination()
            .within(&[Field::Protocol, Field::Destination(Ip::V6)], &super::filter::named("subnets", Ip::V6))
            .then(Verdict::Goto("spoofed")),
        // The bridge reads on within a tag, where the filter is not asked.
        querier(rule("listener query in a tag, from a port that nobody bound yet").equals(Field::Protocol, &IPV6))
            .within(&[Field::EtherType], "tags")
            .not_within(&[Field::Iifname], "bystanders")
            .drop(),
        rule("what a tunnel or a pair of ports on the node brings back was marked on another road").mark(PINNED | ACCEPTED, 0).done(),
    ]
}

/// Connection tracking puts fragments together by addresses and id, whatever bridge they came by, and what comes of it has the mark
/// of the first: so nobody else sends a piece of it. Where another bridge has the same subnet, nobody can tell.
fn piece(comment: &str, ip: Ip) -> super::build::Draft {
    rule(comment)
        // Within a tag too: so br_netfilter may have been told to look (bridge-nf-filter-vlan-tagged).
        .equals(Field::Protocol, &ip.ethertype())
        .piece(ip)
        .within(&[Field::Protocol, Field::Source(ip)], &super::filter::named("subnets", ip))
}

fn is_type(comment: &str, ethertype: [u8; 2]) -> super::build::Draft {
    rule(comment).equals(Field::EtherType, &ethertype)
}

/// What is a port's own and got here.
fn with_options(comment: &str) -> super::build::Draft {
    is_type(comment, IPV4).within(&[PORT, Field::EtherSource, Field::Source(Ip::V4)], "own4")
}

fn port_rules() -> Vec<Rule> {
    vec![
        rule("802.1Q, QinQ, PPPoE, unknown types: nothing filters them further on").not_within(&[Field::EtherType], "ethertypes").drop(),
        rule("another's MAC address").not_within(&[Field::Iifname, Field::EtherSource], MACS).then(Verdict::Goto("spoofed")),
        is_type("", ARP).then(Verdict::Goto("arp")),
        is_type("", IPV6).equals(Field::Source(Ip::V6), &[0; 16]).then(Verdict::Jump("nameless")),
        with_options("multicast membership has one: router alert (RFC 2236, 2)")
            .l4(libc::IPPROTO_IGMP as u8)
            .mark(ACCEPTED, PINNED)
            .then(Verdict::Accept),
        // Of no use for long (RFC 7126).
        with_options("IPv4 options: a source route leads elsewhere than the filter sees").drop(),
        rule("another's IP address").then(Verdict::Goto("spoofed")),
    ]
}

fn arp() -> Vec<Rule> {
    // Hardware type Ethernet, protocol IPv4, lengths 6 and 4 (RFC 826).
    const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    vec![
        rule("ARP for anything but IPv4 over Ethernet").network_bytes_not(0, &ETHERNET_IPV4).drop(),
        // 46 bytes with what fills the shortest frame (IEEE 802.3, 4A.2.3.2).
        rule("words behind an ARP packet: no side is asked about them").longer().drop(),
        rule("a probe for its own address (RFC 5227, 2.1.1): any other's would keep that one from using it")
            .equals(Field::ArpSenderAddress, &[0; 4])
            .within(&[PORT, Field::ArpSenderMac, Field::ArpTargetAddress], "own4")
            .mark(ACCEPTED, PINNED)
            .then(Verdict::Accept),
        rule("claims another's MAC or IPv4 address")
            .not_within(&[PORT, Field::ArpSenderMac, Field::ArpSenderAddress], "own4")
            .then(Verdict::Goto("spoofed")),
        pinned(),
    ]
}

fn pinned() -> Rule {
    rule("what it says of itself is so").mark(ACCEPTED, PINNED).then(Verdict::Accept)
}

fn icmpv6(comment: &str, number: u8) -> super::build::Draft {
    rule(comment).l4(libc::IPPROTO_ICMPV6 as u8).equals(Field::Icmpv6Type, &[number])
}

/// Who says that it keeps book of multicast listeners, or is a router of theirs.
fn querier(draft: super::build::Draft) -> super::build::Draft {
    draft.l4(libc::IPPROTO_ICMPV6 as u8).within(&[Field::Icmpv6Type], "queriers")
}

/// Neighbour discovery that says more than it has to.
fn wordy(comment: &str) -> super::build::Draft {
    rule(comment).l4(libc::IPPROTO_ICMPV6 as u8).within(&[Field::Icmpv6Type], "neighbours").longer_payload()
}

fn ipv6() -> Vec<Rule> {
    vec![
        // The next header of the first one (RFC 8200, 3).
        rule("TCP and nothing before it: none of the below")
            .network_bytes(6, &[libc::IPPROTO_TCP as u8])
            .mark(ACCEPTED, PINNED)
            .then(Verdict::Accept),
        rule("a routing header leads elsewhere than the filter sees").header(libc::IPPROTO_ROUTING as u8).drop(),
        icmpv6("router advertisement from a container", 134).drop(),
        icmpv6("redirect from a container", 137).drop(),
        // The bridge would believe that somebody keeps book of who listens, and send neighbours' solicitations to this port and to no one
        // whose report is older than that (br_multicast_query_received).
        querier(rule("listener query from a container")).drop(),
        // 40 bytes with a MAC address and a nonce (RFC 4861, 4.3; RFC 7527, 4.1), 56 with a registration (RFC 8505, 4.1).
        wordy("words in neighbour discovery: no side is asked about them").drop(),
        icmpv6("claims another's IPv6 address", 136)
            .not_within(&[PORT, Field::EtherSource, Field::NeighbourTarget], "own6")
            .then(Verdict::Goto("spoofed")),
        rule("a first fragment: its headers are to be seen").fragment(true).then(Verdict::Goto("fragment")),
        pinned(),
    ]
}

/// IPv6 from the unspecified address, before a container has one.
fn nameless() -> Vec<Rule> {
    vec![
        wordy("words in duplicate address detection").drop(),
        icmpv6("duplicate address detection (RFC 4862, 5.4.2) of its own address: any other's would keep that one from using it", 135)
            .within(&[PORT, Field::EtherSource, Field::NeighbourTarget], "own6")
            .mark(ACCEPTED, PINNED)
            .then(Verdict::Accept),
        icmpv6("listener reports before there is an address (RFC 3590)", 143).drop(),
    ]
}

/// Connection tracking puts fragments together before the filter, and the bridge sends them on as one packet. So neighbour
/// discovery, which must not come in fragments (RFC 6980), would pass the checks above with its target in the second one; and a
/// chain of headers that ends beyond the first (RFC 7112 forbids it) would hide what it is.
fn fragment() -> Vec<Rule> {
    let icmpv6 = libc::IPPROTO_ICMPV6 as u8;
    let mut rules = vec![rule("").differs(Field::L4Protocol, &[icmpv6]).mark(ACCEPTED, PINNED).then(Verdict::Accept)];
    for echo in [128, 129] {
        rules.push(rule("a large echo").l4(icmpv6).equals(Field::Icmpv6Type, &[echo]).mark(ACCEPTED, PINNED).then(Verdict::Accept));
    }
    rules.push(rule("neighbour discovery in fragments, or headers that hide beyond the first").then(Verdict::Goto("spoofed")));
    rules
}

/// To the port that has the packet's IP address, in a frame to its MAC address.
fn to_its_own(comment: &str, ethertype: [u8; 2], ip: Ip, own: &str) -> super::build::Draft {
    is_type(comment, ethertype).within(&[Field::Oif, Field::EtherDestination, Field::Destination(ip)], own)
}

/// A bridge learns from any frame where a MAC address is, also from a port that is not bound yet, and floods what it does not
/// know: so what goes to a port is pinned too. And the filter has judged the IP address, while the bridge goes by the MAC address:
/// who writes a third one's there, or that of all, or says by neighbour discovery that it has it, would send the third one what it
/// must not get.
fn elsewhere() -> [Rule; 2] {
    let to_port = |comment, ethertype| is_type(comment, ethertype).within(&[Field::Oif], "ports");
    let (own4, own6) = ([Field::Oif, Field::EtherDestination, Field::Destination(Ip::V4)], Field::Destination(Ip::V6));
    [
        to_port("to another's IPv4 address; multicast is the filter's to decide", IPV4)
            .network_bits_not(16, 0xf0, 0xe0)
            .not_within(&own4, "own4")
            .drop(),
        to_port("to another's IPv6 address; multicast is neighbour discovery", IPV6)
            .network_bytes_not(24, &[0xff])
            .not_within(&[Field::Oif, Field::EtherDestination, own6], "own6")
            .drop(),
    ]
}

/// What the node sends, its own and what it routes.
fn output() -> Vec<Rule> {
    let mut rules: Vec<Rule> = elsewhere().into();
    let led_astray = rule("to a port that nobody bound").not_within(&[Field::Oif], "ports").not_within(&[Field::Oifname], "bystanders");
    rules.push(led_astray.then(Verdict::Goto("astray")));
    rules
}

/// What goes to a port that nobody bound. The filter lets through to a guarded network only what is for who is bound there; and until
/// the port of that one is tied to its MAC address ([`stations`](super::stations)) the bridge sends it where a frame last came from with
/// that address, or to all ports: whoever is not bound would read it.
fn astray() -> Vec<Rule> {
    let spoken = is_type("between a host and its router", IPV6).l4(libc::IPPROTO_ICMPV6 as u8);
    let spoken = spoken.within(&[Field::Icmpv6Type], "link_matters").then(Verdict::Return);
    let meant = |ip| {
        let subnets = super::filter::named("subnets", ip);
        let draft = rule("for an address of a guarded network").within(&[Field::Protocol, Field::Destination(ip)], &subnets);
        // These are on every bridge, also on one that gets a port while the agent is away.
        let draft = if ip == Ip::V6 { draft.not_link_local_destination() } else { draft };
        draft.drop()
    };
    vec![spoken, meant(Ip::V4), meant(Ip::V6)]
}

fn forward() -> Vec<Rule> {
    let road = |draft: super::build::Draft| draft.mark_has(PINNED | ACCEPTED).within(&[PORT], "ports").then(Verdict::Accept);
    let [ipv4, ipv6] = elsewhere();
    vec![
        road(to_its_own(
            "IPv4, checked where it came in, passed by the filter, to its receiver: the road of most packets",
            IPV4,
            Ip::V4,
            "own4",
        )),
        road(to_its_own(
            "IPv6, checked where it came in, passed by the filter, to its receiver: the road of most packets",
            IPV6,
            Ip::V6,
            "own6",
        )),
        ipv4,
        ipv6,
        // Who took a neighbour's MAC address before being bound would get its packets.
        rule("to a port that nobody bound yet").within(&[PORT], "ports").not_within(&[Field::Oif], "ports").drop(),
        rule("between ports of guarded bridges").within(&[PORT], "ports").then(Verdict::Goto("seen")),
        rule("between ports that nobody bound").not_within(&[Field::Oif], "ports").then(Verdict::Goto("anew")),
        // Whatever its mark says: others restore marks with connections.
        rule("from a port that nobody bound yet").drop(),
    ]
}

fn seen() -> Vec<Rule> {
    vec![
        is_type("ARP, checked when it came in", ARP).then(Verdict::Accept),
        rule("the filter did not see it: nf_call_iptables or nf_call_ip6tables is off").mark_lacks(ACCEPTED).drop(),
    ]
}
