//! The one node that all sketches are drawn on: four bridges, two of them with one subnet, ten members, somebody outside. Nobody answers
//! anything: what is seen is what the node let pass.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Bridge, Fence, Internet, Member, Netns};
use nix::libc;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use policy::inventory::{Leg, Network, NodeBridge};

use super::sketch::Place;
use crate::mutation::netlink::Nfnetlink;
use crate::mutation::packet::{SYN, Tuple, ethertype, packet};
use crate::mutation::scene::{marked, mute};
use crate::stage::{mac_of, settled};

/// Name and subnets. The second has the subnet of the first.
pub(super) const BRIDGES: [(&str, &str, &str); 4] = [
    ("br0", "10.1.0.0/24", "2001:db8:1::/64"),
    ("br1", "10.1.0.0/24", "2001:db8:1::/64"),
    ("br2", "10.2.0.0/24", "2001:db8:2::/64"),
    ("br3", "10.3.0.0/24", "2001:db8:3::/64"),
];
/// Name, bridge, and which of the subnet's addresses.
pub(super) const MEMBERS: [(&str, usize, u32); 10] =
    [("a", 0, 2), ("b", 0, 3), ("c", 0, 4), ("f", 1, 2), ("e", 2, 2), ("g", 1, 3), ("h", 2, 3), ("i", 2, 4), ("k", 3, 2), ("l", 3, 3)];
/// Addresses of the node: by IPv4, by IPv6.
pub(super) const NODE: [[&str; 2]; 4] = [
    ["10.1.0.1", "2001:db8:1::1"],
    ["10.2.0.1", "2001:db8:2::1"],
    ["10.3.0.1", "2001:db8:3::1"],
    [lab::internet::HOST_V4, lab::internet::HOST_V6],
];
/// Addresses outside; one of a network that rules of the bridges' networks hold too.
pub(super) const OUTSIDE: [[&str; 2]; 4] = [
    ["192.0.2.10", "2001:db8:a::10"],
    ["198.51.100.7", "2001:db8:b::7"],
    ["192.0.2.99", "2001:db8:c::99"],
    ["10.200.0.9", "2001:db8:a::11"],
];

/// Protocols that the node listens to without a socket of their own for each port.
const HEARD: [i32; 5] = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_SCTP, libc::IPPROTO_GRE, libc::IPPROTO_ESP];

pub(super) fn member_named(name: &str) -> usize {
    MEMBERS.iter().position(|member| member.0 == name).unwrap()
}

pub(super) fn network(bridge: usize) -> Network {
    let (name, v4, v6) = BRIDGES[bridge];
    Network {
        id: format!("net-{name}"),
        name: format!("net-{name}"),
        project: (bridge == 2).then(|| "p".to_owned()),
        driver: "bridge".into(),
        bridge: Some(name.to_owned()),
        subnets: vec![v4.parse().unwrap(), v6.parse().unwrap()],
        internal: false,
        unmanaged: BTreeSet::new(),
    }
}

/// A bridge as the node has it.
pub(super) fn node_bridge(bridge: usize) -> NodeBridge {
    let gateways = NODE[[0, 0, 1, 2][bridge]].map(|at| at.parse().unwrap());
    let ports = (0..MEMBERS.len()).filter(|&member| MEMBERS[member].1 == bridge).map(port);
    NodeBridge { addresses: gateways.into(), ports: ports.collect() }
}

/// An address of a member, by IP version.
pub(super) fn address(place: Place, version: usize) -> IpAddr {
    match place {
        Place::Member(member) => {
            let (_, bridge, nth) = MEMBERS[member];
            let subnet = [1, 1, 2, 3][bridge];
            [format!("10.{subnet}.0.{nth}"), format!("2001:db8:{subnet}::{nth}")][version].parse().unwrap()
        }
        Place::Node(n) => NODE[n][version].parse().unwrap(),
        Place::Outside(n) => OUTSIDE[n][version].parse().unwrap(),
    }
}

fn mac(member: usize) -> [u8; 6] {
    let (_, bridge, nth) = MEMBERS[member];
    // As the members' addresses; the second bridge's members have the first's too, on their own bridge.
    let IpAddr::V4(v4) = address(Place::Member(member), 0) else { unreachable!("version 0 is IPv4") };
    let [a, b, c, _] = v4.octets();
    [2, 0x42 + u8::from(bridge == 1), a, b, c, nth as u8]
}

fn port(member: usize) -> String {
    let (_, bridge, nth) = MEMBERS[member];
    format!("v{}-{nth}", BRIDGES[bridge].0)
}

pub(super) fn leg(member: usize) -> Leg {
    let bridge = MEMBERS[member].1;
    let addresses = [0, 1].map(|version| address(Place::Member(member), version)).into();
    Leg { network: network(bridge).id, bridge: BRIDGES[bridge].0.into(), port: Some(port(member)), mac: mac(member), addresses }
}

pub(super) struct Town<'h> {
    pub(super) host: &'h Netns,
    members: Vec<Frames>,
    gateways: Vec<[u8; 6]>,
    outside: (Frames, [u8; 6], [u8; 6]),
    heard: Vec<UdpSocket>,
    sending: [UdpSocket; 2],
    connections: Nfnetlink,
    fence: Fence,
    _kept: (Internet, Vec<Member>),
}

impl<'h> Town<'h> {
    pub(super) fn new(host: &'h Netns) -> Self {
        let bridges: Vec<Bridge<'h>> = BRIDGES.iter().map(|(name, v4, v6)| Bridge::new(host, name, v4, v6)).collect();
        let members: Vec<Member> = MEMBERS.iter().map(|(name, bridge, nth)| bridges[*bridge].add_at(name, *nth)).collect();
        // The node's own way to that subnet is by the first bridge.
        host.ip("route del 10.1.0.0/24 dev br1");
        host.ip("-6 route del 2001:db8:1::/64 dev br1");
        let internet = Internet::behind(host);
        settled(host);
        for key in ["net.ipv4.conf.all.rp_filter", "net.ipv4.conf.all.send_redirects"] {
            host.set_sysctl(key, "0");
        }
        for (member, made) in members.iter().enumerate() {
            let bridge = BRIDGES[MEMBERS[member].1].0;
            let mac = mac_text(mac(member));
            made.netns.ip(&format!("link set eth0 address {mac}"));
            mute(&made.netns, "eth0");
            for version in [0, 1] {
                let at = address(Place::Member(member), version);
                host.ip(&format!("neigh replace {at} lladdr {mac} dev {bridge} nud permanent"));
            }
        }
        let (theirs, ours) = (mac_of(&internet.netns, "down0"), mac_of(host, "up0"));
        mute(&internet.netns, "down0");
        for at in ["203.0.113.1", "2001:db8:ffff::1"] {
            host.ip(&format!("neigh replace {at} lladdr {} dev up0 nud permanent", mac_text(theirs)));
        }
        let raw = |family, protocol| {
            let socket = host.run(|| frame::raw_socket(family, protocol)).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            socket
        };
        let both = |protocol| [raw(libc::AF_INET, protocol), raw(libc::AF_INET6, protocol)];
        let mut heard: Vec<UdpSocket> = HEARD.into_iter().flat_map(both).collect();
        heard.extend([raw(libc::AF_INET, libc::IPPROTO_ICMP), raw(libc::AF_INET6, libc::IPPROTO_ICMPV6)]);
        Self {
            host,
            members: members.iter().map(|member| Frames::open(&member.netns, "eth0")).collect(),
            gateways: BRIDGES.iter().map(|bridge| mac_of(host, bridge.0)).collect(),
            outside: (Frames::open(&internet.netns, "down0"), theirs, ours),
            heard,
            // Whole packets, header and all (raw(7)).
            sending: [raw(libc::AF_INET, libc::IPPROTO_RAW), raw(libc::AF_INET6, libc::IPPROTO_RAW)],
            connections: host.run(Nfnetlink::open),
            fence: Fence::new(host),
            _kept: (internet, members),
        }
    }

    /// Loads rules that others have, in the words of their program (`nft -f -`, `iptables-restore`).
    pub(super) fn load(&self, command: &mut Command, rules: &str) {
        let mut program = self.host.run(|| command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()).unwrap();
        std::io::Write::write_all(&mut program.stdin.take().unwrap(), rules.as_bytes()).unwrap();
        let said = program.wait_with_output().unwrap();
        assert!(said.status.success(), "{command:?}: {}\n{rules}", String::from_utf8_lossy(&said.stderr));
    }

    /// No connection is known, no frame is under way, and each bridge knows where its members are.
    pub(super) fn quiet(&mut self) {
        for (member, wire) in self.members.iter().enumerate() {
            let (bridge, mac) = (MEMBERS[member].1, mac(member));
            let IpAddr::V4(own) = address(Place::Member(member), 0) else { continue };
            let reply = frame::arp_reply(mac, own, self.gateways[bridge], "10.0.0.1".parse().unwrap());
            wire.send(&frame::ethernet(self.gateways[bridge], mac, frame::ETH_ARP, &reply));
        }
        self.fence.wait();
        let _ = self.seen();
        self.connections.forget_connections();
    }

    /// Sends the packet with this number; `to` is by whose cable it goes on, for a neighbour.
    pub(super) fn send(&self, id: u16, from: Place, to: Place, tuple: Tuple) {
        let bytes = packet(id, tuple, SYN);
        let ether = ethertype(&bytes);
        match from {
            Place::Member(sender) => {
                let bridge = MEMBERS[sender].1;
                let next = match to {
                    Place::Member(receiver) if MEMBERS[receiver].1 == bridge => mac(receiver),
                    Place::Member(_) | Place::Node(_) | Place::Outside(_) => self.gateways[bridge],
                };
                self.members[sender].send(&frame::ethernet(next, mac(sender), ether, &bytes));
            }
            Place::Outside(_) => {
                let (wire, theirs, ours) = &self.outside;
                wire.send(&frame::ethernet(*ours, *theirs, ether, &bytes));
            }
            Place::Node(_) => {
                let socket = &self.sending[usize::from(tuple.from.is_ipv6())];
                // What the filter refuses is told to the sender at once.
                let _ = socket.send_to(&bytes, SocketAddr::new(tuple.to, 0));
            }
        }
    }

    /// By number: at which ends each packet was seen (of the node and the outside the first address stands for all), once all have
    /// gone as far as they go.
    pub(super) fn arrived(&self) -> BTreeMap<u16, Vec<Place>> {
        self.fence.wait();
        self.seen()
    }

    fn seen(&self) -> BTreeMap<u16, Vec<Place>> {
        let mut seen: BTreeMap<u16, Vec<Place>> = BTreeMap::new();
        let ends = self.members.iter().enumerate().map(|(member, wire)| (Place::Member(member), wire));
        for (place, wire) in ends.chain([(Place::Outside(0), &self.outside.0)]) {
            for id in wire.drain().iter().filter(|frame| !is_an_answer(&frame[14..])).filter_map(|frame| marked(frame)) {
                seen.entry(id).or_default().push(place);
            }
        }
        let mut buffer = vec![0; 65536];
        for socket in &self.heard {
            while let Ok(n) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                if let Some(id) = marked(&buffer[..n]) {
                    seen.entry(id).or_default().push(Place::Node(0));
                }
            }
        }
        seen
    }
}

/// Whether an IP packet is an ICMP error, which quotes what it is about, or an answer of the node to a request: it goes by the node's own
/// routes, wherever they lead.
fn is_an_answer(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => packet[9] == frame::PROTO_ICMP && [0, 3, 11, 12, 14].contains(&packet[20]),
        Some(6) => packet[6] == frame::PROTO_ICMPV6 && [1, 2, 3, 4, 129].contains(&packet[40]),
        Some(_) | None => false,
    }
}

/// A seed that nobody chose.
pub(super) fn chance() -> u64 {
    let mut bytes = [0; 8];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).unwrap();
    u64::from_ne_bytes(bytes)
}
