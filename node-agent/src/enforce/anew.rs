//! A guarded network that is made anew while nobody looks: `compose down && up`, and the agent and its supervisor are dead.
//!
//! # Why
//! Every name we closed it by is gone: the new bridge, its index and its ports are in no set. What mostly stays is the subnet. So an
//! address of a guarded subnet passes no bridge, and no port of one, that was made since the agent last looked; in `inet` by the
//! bridge, for what is routed or meant for the node, in `bridge` by the ports, for what stays on it, whatever its netfilter switch
//! says. Only bridges count, and bridges and ports that were there before go on undisturbed, whatever addresses they carry: an
//! uplink, a VPN, another engine, virtual machines. Whoever is bound meets earlier rules, and none of these.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use ipnet::{IpNet, Ipv6Net};
use nix::libc;
use policy::ruleset::log;

use super::build::{Draft, rule};
use super::count::{self, Reason};
use super::elements::octets;
use super::expression::{Field, Ip};
use super::filter::named;
use super::model::{Key, KeyType, Rule, Set, Table, Verdict, interface_name, part};

const IPS: [Ip; 2] = [Ip::V4, Ip::V6];

/// Adds the sets of subnets. Their keys begin with the type of the packet: one look-up, and no IPv6 packet is read as IPv4.
pub(super) fn sets(table: &mut Table) {
    for ip in IPS {
        let key = [KeyType::EtherType, Field::Source(ip).key_type()];
        table.sets.insert(named("subnets", ip), Set { intervals: true, ..Set::of(&key, "subnets of guarded networks") });
    }
}

/// What is in these sets, from the first to the last address.
pub(super) fn ranges(subnets: &BTreeSet<IpNet>) -> Vec<(Ip, Key)> {
    // Whoever has an address of an IPv6 subnet has a link-local one too. Docker switches IPv6 off where a network has none.
    let link_local = subnets.iter().any(|net| matches!(net, IpNet::V6(_)));
    let link_local = link_local.then(|| IpNet::from(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)));
    let all: Vec<IpNet> = subnets.iter().copied().chain(link_local).collect();
    // Disjoint, or the kernel refuses (nft_set_pipapo.c).
    let range = |net: &IpNet| {
        let ip = if matches!(net, IpNet::V4(_)) { Ip::V4 } else { Ip::V6 };
        let end = |address| {
            let mut key = Vec::new();
            part(&mut key, &ip.ethertype());
            part(&mut key, &octets(address));
            key
        };
        (ip, Key::range(&end(net.network()), &end(net.broadcast())))
    };
    IpNet::aggregate(&all).iter().map(range).collect()
}

/// 802.1Q and 802.1ad.
pub(super) const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

fn addressed() -> impl Iterator<Item = Rule> {
    let ends = IPS.into_iter().flat_map(|ip| [(Field::Source(ip), ip), (Field::Destination(ip), ip)]);
    ends.map(|(end, ip)| {
        let address = rule("an address of a guarded network").within(&[Field::Protocol, end], &named("subnets", ip));
        address.then(Verdict::Goto("homeless"))
    })
}

fn icmpv6(comment: &str, types: &str) -> Draft {
    rule(comment).equals(Field::Protocol, &Ip::V6.ethertype()).l4(libc::IPPROTO_ICMPV6 as u8).within(&[Field::Icmpv6Type], types)
}

/// Neighbour discovery that was not routed (RFC 4861, 7.1: hop limit 255).
fn neighbours() -> Rule {
    icmpv6("neighbour discovery", "neighbours").network_bytes(7, &[255]).then(Verdict::Return)
}

/// What comes in by an interface goes to a chain of `inet`, if it is such a bridge.
pub(super) fn from(chain: &'static str) -> Rule {
    made("from a bridge made since anybody looked", Field::Iifkind, Field::Iifname, chain)
}

/// What goes out by one.
pub(super) fn to(chain: &'static str) -> Rule {
    made("to a bridge made since anybody looked", Field::Oifkind, Field::Oifname, chain)
}

fn made(comment: &str, kind: Field, name: Field, chain: &'static str) -> Rule {
    rule(comment).equals(kind, &interface_name("bridge")).not_within(&[name], "known").then(Verdict::Jump(chain))
}

/// The chain `anew` of `inet`.
pub(super) fn bridges() -> Vec<Rule> {
    [neighbours()].into_iter().chain(addressed()).collect()
}

/// The chain `anew_node` of `inet`: one end is the node itself.
pub(super) fn node() -> Vec<Rule> {
    vec![icmpv6("between a host and its router", "link_matters").then(Verdict::Return), rule("").then(Verdict::Goto("anew"))]
}

/// The chain `homeless` of `inet`.
pub(super) fn homeless() -> Vec<Rule> {
    let counted = rule("").then(Verdict::Jump(Reason::Unknown.chain()));
    let logged = count::logged(log::DENY_GROUP, log::DENY_UNKNOWN, |draft| draft);
    [vec![counted], logged, vec![rule("an address of a guarded network, where that network is not").drop()]].concat()
}

/// The chain `anew` of `bridge`: a network that is made anew has new ports alone, so both are.
pub(super) fn ports() -> Vec<Rule> {
    let known = |end| rule("a port that was there before").within(&[end], "bystanders").then(Verdict::Return);
    let mut rules = vec![known(Field::Iifname), known(Field::Oifname), neighbours()];
    rules.extend(addressed());
    // The kernel takes off tags of VLAN 0 one by one (net/core/dev.c); what is within the second is not to be seen here.
    rules.push(rule("a tag within a tag hides what it carries").within(&[Field::Protocol], "tags").drop());
    rules
}

/// The chain `homeless` of `bridge`.
pub(super) fn homeless_ports() -> Vec<Rule> {
    vec![rule("").log(log::DENY_GROUP, log::DENY_UNKNOWN), rule("until the network is bound again").drop()]
}
