//! Sides, doors and pairs as elements of sets. A pair with one port is one element of a hash set; ranges and networks go to
//! interval sets, made disjoint first, since the kernel refuses overlaps (nft_set_pipapo.c).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use policy::policy_set::Direction;
use policy::ruleset::{Pair, Remote, Ruleset, Spot};
use policy::service::{Ports, Protocol};

use super::entries::{self, Entry};
use super::expression::{Field, Ip};
use super::key::{Draft, Key};
use super::links::Links;
use super::model::{Family, KeyType, Set, Value, part};

/// Protocols that share sets: their service is the same field of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Group {
    Tcp,
    Udp,
    Sctp,
    Icmp,
    Icmpv6,
    /// Protocols without ports: the service is the protocol itself.
    Other,
}

impl Group {
    pub(super) const ALL: [Self; 6] = [Self::Tcp, Self::Udp, Self::Sctp, Self::Icmp, Self::Icmpv6, Self::Other];

    fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Sctp => Self::Sctp,
            Protocol::Icmp => Self::Icmp,
            Protocol::Icmpv6 => Self::Icmpv6,
            Protocol::Other(_) => Self::Other,
        }
    }

    /// The only protocol of the group.
    pub(super) fn protocol(self) -> Option<u8> {
        Some(match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Icmp => 1,
            Self::Icmpv6 => 58,
            Self::Other => return None,
        })
    }

    /// Where the service stands in a packet to the server, or (swapped) in one from it.
    pub(super) fn field(self, swapped: bool) -> Field {
        match self {
            Self::Tcp | Self::Udp | Self::Sctp if swapped => Field::SourcePort,
            Self::Tcp | Self::Udp | Self::Sctp => Field::DestinationPort,
            Self::Icmp => Field::IcmpType,
            Self::Icmpv6 => Field::Icmpv6Type,
            Self::Other => Field::L4Protocol,
        }
    }

    fn service(self, protocol: Protocol, port: u16) -> Draft {
        match self {
            Self::Tcp | Self::Udp | Self::Sctp => port.to_be_bytes().as_slice().into(),
            Self::Icmp | Self::Icmpv6 => [port.to_be_bytes()[1]].as_slice().into(),
            Self::Other => [protocol.number()].as_slice().into(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "icmpv6_",
            Self::Other => "ip",
        }
    }

    /// ICMP is of one IP version only.
    fn fits(self, ip: Ip) -> bool {
        match self {
            Self::Icmp => ip == Ip::V4,
            Self::Icmpv6 => ip == Ip::V6,
            Self::Tcp | Self::Udp | Self::Sctp | Self::Other => true,
        }
    }
}

/// What the remote end of a set's pairs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Spots,
    SpotRanges,
    Outside,
    OutsideRanges,
}

/// Which set a pair belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SetName {
    pub(super) direction: Direction,
    pub(super) ip: Ip,
    pub(super) kind: Kind,
    pub(super) group: Group,
}

/// The sets of pairs that are in use: a host without SCTP has no set and no look-up for it.
pub(super) type Shape = BTreeSet<SetName>;

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = match self.ip {
            Ip::V4 => 4,
            Ip::V6 => 6,
        };
        let kind = match self.kind {
            Kind::Spots => "",
            Kind::SpotRanges => "_ranges",
            Kind::Outside => "_outside",
            Kind::OutsideRanges => "_outside_ranges",
        };
        write!(f, "{}_{}{ip}{kind}", self.direction, self.group.name())
    }
}

impl SetName {
    pub(super) fn empty_set(&self) -> Set {
        let address = Field::Source(self.ip).key_type();
        let service = self.group.field(false).key_type();
        let (remote, comment): (&[KeyType], &str) = match self.kind {
            Kind::Spots | Kind::SpotRanges => (&[KeyType::InterfaceIndex, address], "whose side (bridge . address), the other end, port"),
            Kind::Outside | Kind::OutsideRanges => (&[address], "whose side (bridge . address), an address outside, port"),
        };
        let key = [&[KeyType::InterfaceIndex, address], remote, &[service]].concat();
        let intervals = matches!(self.kind, Kind::SpotRanges | Kind::OutsideRanges);
        Set { intervals, ..Set::of(&key, comment) }
    }
}

/// Keys of the pairs, by set.
pub(super) type Elements = BTreeMap<SetName, Vec<Key>>;

pub(super) fn ip_of(address: IpAddr) -> Ip {
    if address.is_ipv4() { Ip::V4 } else { Ip::V6 }
}

/// An address as on the wire.
pub(super) fn octets(address: IpAddr) -> Draft {
    match address {
        IpAddr::V4(v4) => v4.octets().as_slice().into(),
        IpAddr::V6(v6) => v6.octets().as_slice().into(),
    }
}

/// (interface index, address) as a key; `None`: the bridge is not there.
pub(super) fn spot_key(spot: &Spot, links: &Links) -> Option<Draft> {
    let index = match &spot.bridge {
        None => 0,
        Some(bridge) => links.index(bridge)?,
    };
    let mut key = Draft::new();
    part(&mut key, &index.to_ne_bytes());
    part(&mut key, &octets(spot.address));
    Some(key)
}

/// Where a pair is in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// An element of its own.
    Exact(SetName, Key),
    /// A box among others of its local end, from the first to the last address and service.
    Range(SetName, Within),
}

/// A box in the making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Within {
    local: Draft,
    first: Draft,
    last: Draft,
    ports: Ports,
}

/// Where a pair belongs; `None`: its bridges are not there, or no packet is like that.
pub(super) fn place(pair: &Pair, links: &Links) -> Option<Place> {
    let ip = ip_of(pair.local.address);
    let ports = pair.ports;
    let group = Group::of(ports.protocol());
    let local = spot_key(&pair.local, links)?;
    if !group.fits(ip) || ip_of(remote_address(&pair.remote)) != ip {
        return None;
    }
    let one_port = ports.first() == ports.last();
    let (kind, first, last) = match &pair.remote {
        Remote::Spot(spot) => {
            let remote = spot_key(spot, links)?;
            (if one_port { Kind::Spots } else { Kind::SpotRanges }, remote.clone(), remote)
        }
        Remote::Outside(net) => {
            let exact = one_port && net.prefix_len() == net.max_prefix_len();
            (if exact { Kind::Outside } else { Kind::OutsideRanges }, octets(net.network()), octets(net.broadcast()))
        }
    };
    let name = SetName { direction: pair.direction, ip, kind, group };
    Some(match kind {
        Kind::Spots | Kind::Outside => {
            Place::Exact(name, Key::exact(&joined(&local, &first, &group.service(ports.protocol(), ports.first()))))
        }
        Kind::SpotRanges | Kind::OutsideRanges => Place::Range(name, Within { local, first, last, ports }),
    })
}

/// The elements of every pair whose bridges are there.
pub(super) fn pairs(ruleset: &Ruleset, links: &Links) -> Elements {
    let mut elements = Elements::new();
    let mut ranges: BTreeMap<(SetName, Draft), Vec<Within>> = BTreeMap::new();
    for pair in &ruleset.pairs {
        match place(pair, links) {
            Some(Place::Exact(name, key)) => elements.entry(name).or_default().push(key),
            Some(Place::Range(name, within)) => ranges.entry((name, within.local.clone())).or_default().push(within),
            None => {}
        }
    }
    for ((name, local), of_local) in ranges {
        elements.entry(name).or_default().extend(disjoint(name.group, &local, &of_local));
    }
    elements
}

/// The elements of one set of ranges that belong to one local end.
pub(super) fn ranges_of(ruleset: &Ruleset, name: SetName, local: &Spot, links: &Links) -> Vec<Key> {
    let of_set = |pair: &Pair| match place(pair, links) {
        Some(Place::Range(of, within)) if of == name => Some(within),
        Some(_) | None => None,
    };
    let boxes: Vec<Within> = ruleset.pairs_of(name.direction, local).filter_map(of_set).collect();
    boxes.first().map(|one| disjoint(name.group, &one.local, &boxes)).unwrap_or_default()
}

fn remote_address(remote: &Remote) -> IpAddr {
    match remote {
        Remote::Spot(spot) => spot.address,
        Remote::Outside(net) => net.addr(),
    }
}

fn joined(local: &[u8], remote: &[u8], service: &[u8]) -> Draft {
    let mut key = Draft::from_slice(local);
    part(&mut key, remote);
    part(&mut key, service);
    key
}

/// First and last of a range of ports, types or protocols.
type Span = (u16, u16);

/// Boxes (remote range x service range) of one local end, without overlaps. Networks are nested or apart, so a wider one goes
/// first and its ports are taken away from those within.
fn disjoint(group: Group, local: &[u8], boxes: &[Within]) -> Vec<Key> {
    let mut by_remote: BTreeMap<(Draft, Draft), Vec<Span>> = BTreeMap::new();
    for Within { first, last, ports, .. } in boxes {
        let span = match ports.protocol() {
            Protocol::Other(number) => (u16::from(number), u16::from(number)),
            _ => (ports.first(), ports.last()),
        };
        by_remote.entry((first.clone(), last.clone())).or_default().push(span);
    }
    let mut keys = Vec::new();
    for ((first, last), spans) in &by_remote {
        let wider = by_remote.iter().filter(|((f, l), _)| (f, l) != (first, last) && f <= first && last <= l);
        let covered = merged(wider.flat_map(|(_, spans)| spans.iter().copied()));
        for (low, high) in merged(spans.iter().copied()).into_iter().flat_map(|span| without(span, &covered)) {
            let service = |value: u16| group.service(Protocol::from_number(value.to_be_bytes()[1]), value);
            keys.push(Key::range(&joined(local, first, &service(low)), &joined(local, last, &service(high))));
        }
    }
    keys
}

/// The union of spans, sorted, without overlaps or neighbours.
fn merged(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut sorted: Vec<_> = spans.collect();
    sorted.sort_unstable();
    let mut out: Vec<Span> = Vec::new();
    for (low, high) in sorted {
        match out.last_mut() {
            Some((_, end)) if u32::from(low) <= u32::from(*end) + 1 => *end = (*end).max(high),
            Some(_) | None => out.push((low, high)),
        }
    }
    out
}

/// What of a span lies in none of the (sorted, disjoint) others.
fn without((low, high): Span, others: &[Span]) -> Vec<Span> {
    let mut out = Vec::new();
    let mut next = u32::from(low);
    for &(from, to) in others {
        let (from, to) = (u32::from(from), u32::from(to));
        if from > next && next <= u32::from(high) {
            out.push((next as u16, (from - 1).min(u32::from(high)) as u16));
        }
        next = next.max(to + 1);
    }
    if next <= u32::from(high) {
        out.push((next as u16, high));
    }
    out
}

/// Everything but the pairs: bridges, sides, doors, ports, who may talk to whom.
fn entries_of<'a>(ruleset: &'a Ruleset, links: &'a Links) -> impl Iterator<Item = Entry> + 'a {
    let bridges = ruleset.bridges.iter().map(|name| entries::bridge(name));
    let watched = ruleset.watched.iter().flat_map(move |(name, watch)| entries::watch(name, *watch, links));
    let sides = ruleset.sides.iter().flat_map(move |(spot, standing)| entries::side(spot, *standing, links));
    let doors = ruleset.doors.iter().filter_map(|(door, standing)| entries::door(door, *standing));
    let inward = ruleset.inward.iter().map(|(door, standing)| entries::inward(door, *standing));
    let ajar = ruleset.ajar.iter().map(entries::ajar);
    let node = ruleset.node.iter().map(|&address| entries::node(address));
    let pins = ruleset.pins.iter().flat_map(move |(port, pin)| entries::pin(port, pin, links));
    let known = ruleset.known.iter().map(|name| entries::known(name));
    let bystanders = ruleset.bystanders.iter().map(|port| entries::bystander(port));
    let subnets = entries::subnets(&ruleset.subnets);
    let talk = ruleset.pairs.iter().filter_map(move |pair| entries::talk(&pair.local, &pair.remote, links));
    bridges
        .chain(watched)
        .chain(sides)
        .chain(doors)
        .chain(inward)
        .chain(ajar)
        .chain(node)
        .chain(pins)
        .chain(known)
        .chain(bystanders)
        .chain(subnets)
        .chain(talk)
}

/// The same by table and set.
pub(super) fn others(ruleset: &Ruleset, links: &Links) -> BTreeMap<(Family, &'static str), Vec<(Key, Value)>> {
    let mut by_set = BTreeMap::<_, Vec<_>>::new();
    for Entry { family, set, key, value } in entries_of(ruleset, links) {
        by_set.entry((family, set)).or_default().push((key, value));
    }
    by_set
}

/// Bridges of the spots of a pair.
pub(super) fn bridges_of(pair: &Pair) -> impl Iterator<Item = &String> {
    let remote = match &pair.remote {
        Remote::Spot(spot) => spot.bridge.as_ref(),
        Remote::Outside(_) => None,
    };
    [pair.local.bridge.as_ref(), remote].into_iter().flatten()
}

/// Bridges that the elements of a ruleset name.
pub(super) fn named_bridges(ruleset: &Ruleset) -> BTreeSet<&String> {
    let of_sides = ruleset.sides.keys().filter_map(|spot| spot.bridge.as_ref());
    let of_pairs = ruleset.pairs.iter().flat_map(bridges_of);
    // What follows another of the same bridge, as nearly all do, need not be looked for.
    let mut last = None;
    let all = of_sides.chain(ruleset.watched.keys()).chain(of_pairs);
    all.filter(|&bridge| last.replace(bridge) != Some(bridge)).collect()
}

/// Those of them that the node lacks.
pub(super) fn absent(ruleset: &Ruleset, links: &Links) -> BTreeSet<String> {
    named_bridges(ruleset).into_iter().filter(|bridge| links.index(bridge).is_none()).cloned().collect()
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    #[test]
    fn a_span_loses_what_a_wider_network_allows_already() {
        assert_eq!(without((80, 90), &[]), vec![(80, 90)]);
        assert_eq!(without((80, 90), &[(85, 100)]), vec![(80, 84)]);
        assert_eq!(without((80, 90), &[(1, 82), (85, 85), (89, 65535)]), vec![(83, 84), (86, 88)]);
        assert_eq!(without((80, 90), &[(1, 65535)]), vec![]);
        assert_eq!(without((65535, 65535), &[(1, 2)]), vec![(65535, 65535)]);
        assert_eq!(without((1, 5), &[(10, 20)]), vec![(1, 5)]);
    }

    #[test]
    fn overlapping_and_neighbouring_spans_become_one() {
        assert_eq!(merged([(5, 9), (1, 4), (20, 30), (25, 65535)].into_iter()), vec![(1, 9), (20, 65535)]);
    }

    #[test]
    fn boxes_of_one_end_never_overlap() {
        let pair = |net: &str, ports: &str| Pair {
            direction: Direction::Egress,
            local: Spot { bridge: Some("br".into()), address: "10.0.0.2".parse().unwrap() },
            remote: Remote::Outside(net.parse::<IpNet>().unwrap()),
            ports: ports.parse().unwrap(),
        };
        let ruleset = Ruleset {
            pairs: [pair("0.0.0.0/0", "tcp/443"), pair("192.0.2.0/24", "tcp/400-500"), pair("192.0.2.0/25", "tcp/450-600")].into(),
            ..Ruleset::default()
        };
        let elements = pairs(&ruleset, &Links::of([("br", 7)]));
        let keys: Vec<&Key> = elements.values().flatten().collect();
        assert_eq!(keys.len(), 4, "{keys:?}");
    }
}
