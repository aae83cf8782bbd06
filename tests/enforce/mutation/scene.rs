//! A node that uses every kind of rule, and what is seen of a packet on it: at which ends it arrived, and what was logged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, UdpSocket};

use ipnet::IpNet;
use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Bridge, Fence, Internet, Member, Netns};
use nix::libc;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use policy::ruleset::{Door, log};
use policy::segment::Refusal;
use policy::{Mode, Protocol, Ruleset, Standing};

use super::netlink::Nfnetlink;
use crate::stage::{Policy, inventory, mac_of, node_bridge, published};

/// What each probe carries, with its number behind it.
const MAGIC: &[u8] = b"BHmp";
/// A TCP probe's sequence number begins here; its answer acknowledges it.
const SEQUENCES: u32 = 0xb71a_0000;
/// Sequence numbers between two probes.
const STRIDE: u32 = 64;
/// The number of "the node answers ARP" of the nth end.
pub(super) const ANSWERS: u16 = 0xff00;

/// The same, of what came in around the bridge: of an address that only such a question is about. Who answers would not tell, since a
/// bridge has the least of its ports' MAC addresses, and so that of one of them.
pub(super) const AROUND: u16 = 0xff80;
pub(super) const ASKED_AROUND: [u8; 4] = [10, 2, 0, 1];

/// Ports and addresses of the policies.
pub(super) const WITHIN: u16 = 8050;
pub(super) const OUTSIDE: [&str; 2] = ["192.0.2.10", "2001:db8:a::10"];
pub(super) const NETWORK: [&str; 2] = ["198.51.100.7", "2001:db8:b::7"];
/// Published ports of the workloads in Enforce and Audit.
pub(super) const DOORS: [(&str, u16); 3] = [("re", 1081), ("dr", 1082), ("au", 1083)];
/// Port that is translated for the node's own programs, to the same port of `le`, which they may not reach.
pub(super) const INWARD: u16 = 1090;
/// Somebody outside whom nobody allows.
pub(super) const STRANGER: [&str; 2] = ["192.0.2.99", "2001:db8:c::99"];
/// The node's addresses towards outside.
pub(super) const NODE: [&str; 2] = [lab::internet::HOST_V4, lab::internet::HOST_V6];

/// Bytes that identify a probe.
pub(crate) fn marker(id: u16) -> Vec<u8> {
    [MAGIC, &id.to_be_bytes()].concat()
}

pub(super) fn sequence(id: u16) -> u32 {
    SEQUENCES + u32::from(id) * STRIDE
}

/// One end: a container, or the outside.
pub(super) struct End {
    pub(super) wire: Frames,
    pub(super) mac: [u8; 6],
    pub(super) addresses: [IpAddr; 2],
    /// Its bridge, and the node's MAC address there.
    pub(super) bridge: &'static str,
    pub(super) gateway: [u8; 6],
}

/// Which probes were seen, and where: the name of an end, `node`, or the prefix of a log record.
pub(super) type Seen = BTreeSet<(u16, String)>;

pub(super) struct Scene<'h> {
    pub(super) ends: BTreeMap<&'static str, End>,
    pub(super) bound: Ruleset,
    pub(super) host: &'h Netns,
    pub(super) connections: std::cell::RefCell<Nfnetlink>,
    bridge_wire: Frames,
    node: Vec<UdpSocket>,
    records: Nfnetlink,
    pub(super) fence: Fence,
    _internet: Internet,
    _members: Vec<Member>,
}

/// No address, no answer: only what the node makes of the probes is to be seen.
pub(crate) fn mute(netns: &Netns, interface: &str) {
    netns.set_sysctl("net.ipv6.conf.all.disable_ipv6", "1");
    netns.ip(&format!("addr flush dev {interface}"));
}

fn policy() -> Policy {
    let mut policy =
        Policy::default().mode(Mode::Enforce, &["re", "fo", "se", "x"]).silent(&["dr"]).mode(Mode::Audit, &["au", "aw"]).quarantine("qu");
    for name in ["re", "dr", "au"] {
        for ports in
            ["tcp/80", "udp/80", "sctp/80", "icmp/8", "icmpv6/128", "ip50", "ip51", "tcp/8000-8100", "udp/8000-8100", "sctp/8000-8100"]
        {
            let exact = !ports.contains('-');
            for peer in ["le", "host:"].iter().filter(|peer| **peer == "le" || exact) {
                policy = policy.egress(name, peer, ports).ingress(name, peer, ports);
            }
            let mut networks = vec!["outside:198.51.100.0/24", "outside:2001:db8:b::/48"];
            if exact {
                networks.extend(["outside:192.0.2.10", "outside:2001:db8:a::10"]);
            }
            for peer in networks {
                policy = policy.egress(name, peer, ports).ingress(name, peer, ports);
            }
        }
    }
    for ports in ["udp/68", "udp/546", "icmpv6/137", "icmpv6/100", "icmp/5", "tcp/21", "tcp/51210"] {
        policy = policy.egress("re", "le", ports).ingress("re", "le", ports);
    }
    policy.egress("x", "y", "udp/80")
}

impl<'h> Scene<'h> {
    pub(super) fn new(host: &'h Netns) -> Self {
        let mut bridges: Vec<Bridge<'h>> = Vec::new();
        for (n, name) in [(1, "br0"), (2, "br1"), (3, "br2"), (9, "br9"), (6, "br6"), (7, "br7"), (4, "br3")] {
            bridges.push(Bridge::new(host, name, &format!("10.{n}.0.0/24"), &format!("2001:db8:{n}::/64")));
        }
        let mut members: Vec<(&'static str, usize, Member)> = Vec::new();
        for (bridge, names) in [
            (0, &["le", "re", "dr", "au", "fo", "qu", "ot", "gh", "un"][..]),
            (1, &["cl", "se"]),
            (2, &["x", "y", "un2"]),
            (3, &["v", "w"]),
            // Two networks made anew.
            (4, &["n6", "m6"]),
            (5, &["n7", "m7"]),
            // Nobody in Enforce: watched, and not guarded.
            (6, &["aw", "ax"]),
        ] {
            for name in names {
                members.push((name, bridge, bridges[bridge].add(name)));
            }
        }
        let others = node_bridge(&bridges[3]);
        // Another one's bridge gets a port since the agent looked last.
        members.push(("late", 3, bridges[3].add("late")));
        let internet = Internet::behind(host);
        crate::stage::settled(host);
        bridges[2].set_nf_call(false);
        bridges[5].set_nf_call(false);
        for key in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit", "net.ipv4.conf.all.rp_filter", "net.ipv6.icmp.ratemask"] {
            if host.sysctl(key).is_some() {
                host.set_sysctl(key, if key.ends_with("mask") { "" } else { "0" });
            }
        }
        let names = ["br0", "br1", "br2", "br9", "br6", "br7", "br3"];
        let mut ends = BTreeMap::new();
        for (name, bridge, member) in &members {
            mute(&member.netns, "eth0");
            // Somebody whose MAC address the node has wrong: the bridge will not know it.
            let mac = if *name == "gh" { super::probes::NOBODY } else { member.mac };
            for at in member.addresses() {
                host.ip(&format!("neigh replace {at} lladdr {} dev {} nud permanent", mac_text(mac), names[*bridge]));
            }
            let wire = Frames::open(&member.netns, "eth0");
            let gateway = mac_of(host, names[*bridge]);
            ends.insert(*name, End { wire, mac: member.mac, addresses: member.addresses(), bridge: names[*bridge], gateway });
        }
        let (net, up) = (mac_of(&internet.netns, "down0"), mac_of(host, "up0"));
        mute(&internet.netns, "down0");
        for at in ["203.0.113.1", "2001:db8:ffff::1"] {
            host.ip(&format!("neigh replace {at} lladdr {} dev up0 nud permanent", mac_text(net)));
        }
        let addresses = OUTSIDE.map(|at| at.parse().unwrap());
        let wire = Frames::open(&internet.netns, "down0");
        ends.insert("net", End { wire, mac: net, addresses, bridge: "up0", gateway: up });

        let on = |bridge: usize| -> Vec<(&str, &Member)> {
            members.iter().filter(|(name, b, _)| *b == bridge && !name.starts_with("un")).map(|(name, _, member)| (*name, member)).collect()
        };
        let (first, second, third, audited) = (on(0), on(1), on(2), on(6));
        let mut inventory = inventory(&[(&bridges[0], &first), (&bridges[1], &second), (&bridges[2], &third), (&bridges[6], &audited)]);
        inventory.userland_proxy = true;
        inventory.bridges.insert("br9".to_owned(), others);
        // The first network had these too: its bridge is gone, and there are others.
        let subnets = bridges[4..6].iter().flat_map(|bridge| [IpNet::from(bridge.v4), bridge.v6.into()]);
        inventory.networks.get_mut("net-br0").unwrap().subnets.extend(subnets);
        inventory.host.extend(NODE.map(|at| at.parse::<IpAddr>().unwrap()));
        for (name, door) in DOORS {
            let doors = ["0.0.0.0", "::"].into_iter().flat_map(|at| {
                [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                    .map(|protocol| policy::inventory::Published { protocol, ..published(at, door, 80) })
            });
            inventory.containers.get_mut(name).unwrap().published = doors.collect();
        }
        let mut bound = policy().bind(&inventory);
        for address in ends["le"].addresses {
            bound.inward.insert(Door { address, protocol: Protocol::Udp, port: INWARD }, Standing::Enforce(Refusal::Drop));
        }

        let raw = |family, protocol| {
            let socket = host.run(|| frame::raw_socket(family, protocol)).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            socket
        };
        let mut node = Vec::new();
        for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP, libc::IPPROTO_SCTP, libc::IPPROTO_ESP] {
            node.extend([raw(libc::AF_INET, protocol), raw(libc::AF_INET6, protocol)]);
        }
        node.extend([
            raw(libc::AF_INET, libc::IPPROTO_ICMP),
            raw(libc::AF_INET, libc::IPPROTO_IGMP),
            raw(libc::AF_INET6, libc::IPPROTO_ICMPV6),
        ]);
        // What a host may have set up: the expectations of FTP.
        host.nft(
            "table inet theirs { ct helper ftp { type \"ftp\" protocol tcp; }; chain c { type filter hook prerouting priority 0; tcp dport 21 ct helper set \"ftp\"; }; }",
        );
        let [v4, v6] = ends["le"].addresses;
        host.nft(&format!(
            "table inet engine {{ chain c {{ type nat hook output priority -100; \
             oif lo ip daddr {} udp dport {INWARD} dnat ip to {v4}; oif lo ip6 daddr {} udp dport {INWARD} dnat ip6 to {v6}; }}; }}",
            NODE[0], NODE[1]
        ));
        let mut records = host.run(Nfnetlink::open);
        records.listen([log::DENY_GROUP, log::AUDIT_GROUP]);
        Self {
            ends,
            bound,
            host,
            connections: host.run(Nfnetlink::open).into(),
            bridge_wire: Frames::open(host, "br0"),
            node,
            records,
            fence: Fence::new(host),
            _internet: internet,
            _members: members.into_iter().map(|(_, _, member)| member).collect(),
        }
    }

    /// Everything that has arrived and was logged since the last time.
    pub(super) fn look(&self) -> Seen {
        let mut seen = Seen::new();
        for (index, (name, end)) in self.ends.iter().enumerate() {
            for frame in end.wire.drain() {
                seen.extend(of_frame(&frame).map(|id| (id, (*name).to_owned())));
                if frame[12..14] == [8, 6] && frame[21] == 2 && frame[..6] == end.mac {
                    let answers = if frame[28..32] == ASKED_AROUND { AROUND } else { ANSWERS };
                    seen.insert((answers + index as u16, (*name).to_owned()));
                }
            }
        }
        for frame in self.bridge_wire.drain() {
            seen.extend(of_frame(&frame).map(|id| (id, "br0".to_owned())));
        }
        let mut buffer = vec![0; 65536];
        for socket in &self.node {
            while let Ok(n) = recv(std::os::fd::AsRawFd::as_raw_fd(socket), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                seen.extend(marked(&buffer[..n]).map(|id| (id, "node".to_owned())));
            }
        }
        for (prefix, packet) in self.records.records() {
            seen.extend(marked(&packet).or_else(|| of_tcp(&packet)).map(|id| (id, prefix)));
        }
        seen
    }
}

pub(crate) fn marked(bytes: &[u8]) -> Option<u16> {
    let at = bytes.windows(MAGIC.len()).position(|window| window == MAGIC)? + MAGIC.len();
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().unwrap()))
}

/// The number in a frame; of a reset, which carries no payload, by what it acknowledges.
fn of_frame(frame: &[u8]) -> Option<u16> {
    marked(frame).or_else(|| of_tcp(frame.get(14..)?))
}

fn of_tcp(packet: &[u8]) -> Option<u16> {
    let segment = match packet.first()? >> 4 {
        4 if packet[9] == frame::PROTO_TCP => packet.get(usize::from(packet[0] & 15) * 4..)?,
        6 if packet[6] == frame::PROTO_TCP => packet.get(40..)?,
        _ => return None,
    };
    let acknowledged = u32::from_be_bytes(segment.get(8..12)?.try_into().unwrap());
    let number = acknowledged.checked_sub(SEQUENCES)? / STRIDE;
    u16::try_from(number).ok().filter(|id| *id < 0x1000)
}
