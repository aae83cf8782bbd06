//! The probes: each a packet with a number, where it is looked for, and whether it gets there while every rule stands.

mod anew;
mod guard;

use std::net::{IpAddr, SocketAddr, UdpSocket};

use lab::frame;
use policy::{Protocol, Service};

use super::packet::{ACK, SYN, Tuple, ethertype, following, icmp, packet, service, with_options, with_sum};
use super::scene::{ANSWERS, AROUND, ASKED_AROUND, DOORS, INWARD, NETWORK, NODE, STRANGER, Scene, Seen, WITHIN, marker, sequence};

/// A MAC address that is at no port.
pub(super) const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 0x77];

/// One probe as it was sent.
pub(super) struct Probe {
    pub(super) id: u16,
    pub(super) name: String,
    pub(super) at: &'static str,
    pub(super) passes: bool,
}

/// Sends the probes and writes down which.
pub(super) struct Script<'s, 'h> {
    pub(super) scene: &'s Scene<'h>,
    /// Rounds have UDP ports of their own: a set that packets fill remembers the last round's.
    pub(super) round: u16,
    pub(super) sent: Vec<Probe>,
}

impl Script<'_, '_> {
    fn next(&mut self, name: String, at: &'static str, passes: bool) -> u16 {
        let id = u16::try_from(self.sent.len()).unwrap();
        self.sent.push(Probe { id, name, at, passes });
        id
    }

    /// Counts the last probe that the node itself answers by ARP.
    fn answered(&mut self, name: &'static str, passes: bool) {
        let nth = self.nth(name);
        self.sent.push(Probe { id: ANSWERS + nth, name: format!("the node answers {name}'s ARP"), at: name, passes });
    }

    /// The same, of one that goes around the bridge.
    fn asks_around(&mut self, name: &'static str) {
        let end = &self.scene.ends[name];
        let (IpAddr::V4(own), router) = (end.addresses[0], ASKED_AROUND.into()) else { panic!("IPv4 comes first") };
        let mut request = frame::arp_reply(end.mac, own, [0; 6], router);
        request[7] = 1;
        self.put(name, [[1, 0x80, 0xc2, 0, 0, 14], end.mac], frame::ETH_ARP, &request);
        let nth = self.nth(name);
        self.sent.push(Probe {
            id: AROUND + nth,
            name: format!("the node answers {name}'s ARP around the bridge"),
            at: name,
            passes: false,
        });
    }

    fn nth(&self, name: &str) -> u16 {
        self.scene.ends.keys().position(|end| *end == name).unwrap() as u16
    }

    fn address(&self, name: &str, v: usize) -> IpAddr {
        match name {
            "node" => NODE[v].parse().unwrap(),
            "network" => NETWORK[v].parse().unwrap(),
            "stranger" => STRANGER[v].parse().unwrap(),
            name => self.scene.ends[name].addresses[v],
        }
    }

    /// The MAC addresses that a packet between two ends has when it is sent.
    fn macs(&self, from: &str, to: &str) -> [[u8; 6]; 2] {
        let sender = &self.scene.ends[from];
        let target = self.scene.ends.get(to).filter(|target| target.bridge == sender.bridge).map_or(sender.gateway, |target| target.mac);
        [target, sender.mac]
    }

    fn put(&self, from: &str, macs: [[u8; 6]; 2], ether: u16, payload: &[u8]) {
        self.scene.ends[from].wire.send(&frame::ethernet(macs[0], macs[1], ether, payload));
    }

    /// A packet in a frame as it should be.
    fn plain(&mut self, name: &str, from: &'static str, to: &'static str, passes: bool, bytes: impl FnOnce(u16) -> Vec<u8>) {
        let id = self.next(format!("{name}: {from} -> {to}"), to, passes);
        let bytes = bytes(id);
        let to = if to == "network" { "net" } else { to };
        self.put(from, self.macs(from, to), ethertype(&bytes), &bytes);
    }

    /// The tuple of a probe with the next number.
    fn tuple(&self, from: &str, to: &str, v: usize, what: &str) -> Tuple {
        let source_port = 20_000 + self.sent.len() as u16;
        Tuple { from: self.address(from, v), to: self.address(to, v), service: service(what), source_port }
    }

    fn ask(&mut self, name: &str, from: &'static str, to: &'static str, v: usize, what: &str, passes: bool) -> Tuple {
        let tuple = self.tuple(from, to, v, what);
        self.plain(&format!("{name} {what} v{}", [4, 6][v]), from, to, passes, |id| packet(id, tuple, SYN));
        tuple
    }

    /// An ICMP error, or what passes for one, from one end that quotes a connection of another.
    fn quote(&mut self, name: &str, kind: u8, from: &'static str, to: &'static str, quoted: Tuple, passes: bool) {
        let v = usize::from(quoted.from.is_ipv6());
        let (sender, receiver) = (self.address(from, v), self.address(to, v));
        self.plain(&format!("{name} (ICMP {kind}, v{})", [4, 6][v]), from, to, passes, |id| {
            icmp(sender, receiver, [kind, 1, 0, 0, 0, 0, 0, 0], &packet(id, quoted, SYN))
        });
    }

    /// Everything a policy can allow, in each standing, on each side.
    fn look_ups(&mut self) {
        let mut late = Vec::new();
        let range = WITHIN.to_string();
        for (name, door) in DOORS {
            for v in 0..2 {
                let echo = ["icmp/8", "icmpv6/128"][v];
                let exact = ["tcp/80", "udp/80", "sctp/80", echo, "ip50"];
                let ports = |protocols: &[&str]| -> Vec<String> { protocols.iter().map(|p| format!("{p}/{range}")).collect() };
                let ranges = ports(&["tcp", "udp", "sctp"]);
                for (peer, services) in [
                    ("le", [&exact.map(str::to_owned)[..], &ranges].concat()),
                    ("net", exact.map(str::to_owned).to_vec()),
                    ("network", [&exact.map(str::to_owned)[..], &ranges].concat()),
                ] {
                    for what in services {
                        for egress in [true, false] {
                            // Without ports, one direction would be the answer to the other.
                            let what = if egress { what.clone() } else { what.replace("ip50", "ip51") };
                            let tuple = self.one_way(name, peer, egress, v, &what);
                            if what.starts_with("udp") {
                                late.push((name, peer, egress, tuple));
                            } else if what.starts_with("tcp") {
                                let back = Tuple { source_port: tuple.source_port + 20_000, ..tuple }.turned();
                                self.directed("mid-flow answer", name, peer, !egress, back, ACK);
                            }
                        }
                    }
                }
                for protocol in ["tcp", "udp", "sctp"] {
                    let what = format!("{protocol}/{door}");
                    for peer in ["le", "net", "network"] {
                        let from = if peer == "network" { "net" } else { peer };
                        let tuple = Tuple { from: self.address(peer, v), ..self.tuple(from, "node", v, &what) };
                        let id = self.next(format!("{name}'s door, {what} v{} from {peer}", [4, 6][v]), "node", true);
                        let bytes = packet(id, tuple, SYN);
                        self.put(from, self.macs(from, "node"), ethertype(&bytes), &bytes);
                    }
                }
            }
        }
        self.scene.fence.wait();
        self.scene.connections.borrow_mut().forget_connections();
        for (name, peer, egress, tuple) in late {
            self.directed("late answer", name, peer, !egress, tuple.turned(), 0);
        }
    }

    fn one_way(&mut self, name: &'static str, peer: &'static str, egress: bool, v: usize, what: &str) -> Tuple {
        let (from, to) = if egress { (name, peer) } else { (peer, name) };
        let mut tuple = self.tuple(from, to, v, what);
        if what.starts_with("udp") {
            // Above every port that is a service, or the late answer would be allowed as a question.
            tuple.source_port = 10_000 + ((u32::from(self.round) * 613 + self.sent.len() as u32 * 7) % 50_000) as u16;
        }
        self.directed(what, name, peer, egress, tuple, SYN);
        tuple
    }

    fn directed(&mut self, what: &str, name: &'static str, peer: &'static str, egress: bool, tuple: Tuple, flags: u8) {
        let end = if peer == "network" { "net" } else { peer };
        let (from, to) = if egress { (name, end) } else { (end, name) };
        let id = self.next(format!("{what} {from} -> {to} ({peer}) v{}", if tuple.from.is_ipv4() { 4 } else { 6 }), to, true);
        let bytes = packet(id, tuple, flags);
        self.put(from, self.macs(from, to), ethertype(&bytes), &bytes);
    }

    /// States, errors, what is denied and how, the node's own roads.
    fn filter(&mut self) {
        let gateway = self.scene.ends["re"].gateway;
        for v in 0..2 {
            let fourth = v == 0;
            self.ask("denied to the outside", "re", "net", v, "tcp/81", false);
            self.ask("denied from the outside", "net", "re", v, "tcp/81", false);
            self.ask("from the outside to another's door", "net", "node", v, "tcp/22", true);
            self.ask("denied to the node", "re", "node", v, "udp/9", false);
            self.ask("denied at a door", "ot", "node", v, "tcp/1081", false);
            let tuple = Tuple { from: self.address("stranger", v), ..self.tuple("net", "node", v, "tcp/1081") };
            self.plain("denied at a door to a stranger", "net", "node", false, |id| packet(id, tuple, SYN));
            self.ask("denied at a silent door", "ot", "node", v, "tcp/1082", false);
            self.ask("denied by the receiver", "ot", "re", v, "udp/81", false);
            self.ask("denied by a silent receiver", "ot", "dr", v, "udp/81", false);
            self.ask("denied by a silent sender", "dr", "ot", v, "udp/81", false);
            self.ask("would be denied by the sender", "au", "ot", v, "udp/81", true);
            self.ask("would be denied by the receiver", "ot", "au", v, "udp/81", true);
            self.ask("would be denied at a door", "ot", "node", v, "tcp/1083", true);
            self.ask("would be denied to the outside", "aw", "net", v, "udp/81", true);
            self.ask("would be denied to the node", "aw", "node", v, "udp/81", true);
            self.ask("from a quarantined one", "qu", "le", v, "udp/81", false);
            self.ask("to a quarantined one", "le", "qu", v, "udp/81", false);
            let mid = |script: &mut Self, name: &str, from, to, what: &str| {
                let tuple = script.tuple(from, to, v, what);
                script.plain(name, from, to, false, |id| packet(id, tuple, ACK));
            };
            mid(self, "TCP that is no request", "re", "ot", "tcp/81");
            mid(self, "TCP that is no request", "ot", "re", "tcp/81");
            mid(self, "TCP that is no request, at a door", "ot", "node", "tcp/1081");
            for (name, from, to) in [("refused", "re", "ot"), ("refused by the receiver", "ot", "re"), ("refused at a door", "ot", "node")]
            {
                let what = if to == "node" { "tcp/1081" } else { "tcp/82" };
                let id = self.next(format!("{name} with a reset v{}", [4, 6][v]), from, true);
                let tuple = self.tuple(from, to, v, what);
                let bytes = packet(id, tuple, SYN);
                self.put(from, self.macs(from, to), ethertype(&bytes), &bytes);
                let id = self.next(format!("{name} with an ICMP error v{}", [4, 6][v]), from, true);
                let tuple = self.tuple(from, to, v, &what.replace("tcp", "udp"));
                let bytes = packet(id, tuple, 0);
                self.put(from, self.macs(from, to), ethertype(&bytes), &bytes);
            }
            // Where netfilter is off for the bridge the reset goes out as any packet of the node's does.
            let id = self.next(format!("refused on the way out, where netfilter is off v{}", [4, 6][v]), "x", true);
            let bytes = packet(id, self.tuple("x", "net", v, "tcp/81"), SYN);
            self.put("x", self.macs("x", "net"), ethertype(&bytes), &bytes);
            // The filter judges the address, the bridge goes by the frame.
            let id = self.next(format!("to another's port v{}", [4, 6][v]), "ot", false);
            let bytes = packet(id, self.tuple("re", "le", v, "udp/80"), 0);
            self.put("re", [self.scene.ends["ot"].mac, self.scene.ends["re"].mac], ethertype(&bytes), &bytes);
            let id = self.next(format!("to the outside from another's address, from a port nobody bound v{}", [4, 6][v]), "net", false);
            let bytes = packet(id, self.tuple("re", "net", v, "udp/80"), 0);
            self.put("un", [gateway, self.scene.ends["un"].mac], ethertype(&bytes), &bytes);
            let unknown: IpAddr = ["10.1.0.200", "2001:db8:1::200"][v].parse().unwrap();
            let tuple = Tuple { to: unknown, ..self.tuple("le", "ot", v, "udp/9") };
            self.plain("to an unknown address", "le", "ot", false, |id| packet(id, tuple, 0));
            let own_link: IpAddr = "fe80::42:aff:fe01:3".parse().unwrap();
            if !fourth {
                let tuple = Tuple { from: own_link, ..self.tuple("re", "le", v, "udp/80") };
                self.plain("from an address the filter does not know", "re", "le", false, |id| packet(id, tuple, 0));
            }

            let opened = self.ask("opens", "le", "re", v, "tcp/80", true);
            let first = sequence(self.sent.len() as u16 - 1) + 1;
            self.plain("the second step", "re", "le", true, |id| following(id, opened.turned(), SYN | ACK, first));
            let opened = self.ask("opens", "re", "le", v, "tcp/80", true);
            let error = [3, 1][v];
            self.quote("the server's own error", error, "le", "re", opened, true);
            self.quote("an error of one in Learn", error, "ot", "re", opened, false);
            let between = self.ask("opens", "le", "ot", v, "tcp/80", true);
            self.quote("an error of one in Enforce", error, "fo", "le", between, false);
            self.quote("a redirect, or what no version knows", [5, 100][v], "le", "re", opened, false);
            let far = self.ask("opens", "cl", "le", v, "tcp/80", true);
            self.quote("an error of one in Enforce on another bridge", error, "fo", "cl", far, false);
            let out = self.ask("opens", "re", "net", v, "tcp/80", true);
            let router: IpAddr = ["203.0.113.1", "2001:db8:ffff::1"][v].parse().unwrap();
            let to = self.address("re", v);
            self.plain("an error of a router outside", "net", "re", true, |id| {
                icmp(router, to, [error, 1, 0, 0, 0, 0, 0, 0], &packet(id, out, SYN))
            });
            let asked = self.ask("asks", "re", "net", v, ["icmp/8", "icmpv6/128"][v], true);
            let [high, low] = asked.source_port.to_be_bytes();
            self.plain("an answer from outside", "net", "re", true, |id| {
                icmp(asked.to, asked.from, [[0, 129][v], 0, 0, 0, high, low, 0, 1], &marker(id))
            });
            let come = self.ask("opens", "net", "re", v, "tcp/80", true);
            self.quote("an error to the outside", error, "re", "net", come, true);

            // The node's own.
            if !fourth {
                const DISCOVERY: [u8; 8] = [133, 0, 0, 0, 0, 0, 0, 0];
                let (from, node) = (self.address("re", 1), "ff02::2".parse().unwrap());
                let id = self.next("a router's discovery to the node".to_owned(), "node", true);
                let bytes = icmp(from, node, DISCOVERY, &marker(id));
                self.put("re", [[0x33, 0x33, 0, 0, 0, 2], self.scene.ends["re"].mac], frame::ETH_IPV6, &bytes);
                let (from, to) = (self.address("ot", 1), self.address("le", 1));
                self.plain("a router's discovery to a neighbour", "ot", "le", false, |id| icmp(from, to, DISCOVERY, &marker(id)));
            } else {
                for (name, from, to, mac, at, passes) in [
                    ("a membership report", "re", "224.0.0.1", [1, 0, 0x5e, 0, 0, 1], "node", true),
                    ("the same to a neighbour", "ot", "10.1.0.2", self.scene.ends["le"].mac, "le", false),
                ] {
                    let id = self.next(name.to_owned(), at, passes);
                    let mut report = [&[0x16, 0, 0, 0, 224, 0, 0, 251][..], &marker(id)].concat();
                    let sum = frame::checksum(&report);
                    report[2..4].copy_from_slice(&sum.to_be_bytes());
                    let mut bytes = frame::ip(self.address(from, 0), to.parse().unwrap(), 2, &report);
                    if passes {
                        bytes = with_options(bytes, [148, 4, 0, 0]);
                    }
                    self.put(from, [mac, self.scene.ends[from].mac], frame::ETH_IPV4, &bytes);
                }
            }
            let request = self.node_sends("a ping of the node", v, ["icmp/8", "icmpv6/128"][v], "re", true);
            let (from, to) = (self.address("re", v), request);
            let id = self.next(format!("the answer to it v{}", [4, 6][v]), "node", true);
            let bytes = icmp(from, to, [[0, 129][v], 0, 0, 0, 0x77, 0x77, 0, 1], &marker(id));
            self.put("re", [gateway, self.scene.ends["re"].mac], ethertype(&bytes), &bytes);
            let echo = Tuple { from: to, to: from, service: service(["icmp/8", "icmpv6/128"][v]), source_port: 0x7777 };
            let id = self.next(format!("an error to the node v{}", [4, 6][v]), "node", true);
            let bytes = icmp(from, to, [error, 1, 0, 0, 0, 0, 0, 0], &packet(id, echo, 0));
            self.put("re", [gateway, self.scene.ends["re"].mac], ethertype(&bytes), &bytes);
            self.node_sends("denied from the node", v, "udp/81", "re", false);
            self.node_sends("the node to a MAC address that is nowhere", v, "udp/81", "gh", false);
            if fourth {
                self.node_sends("a querier's query", v, "ip2", "re", true);
            } else {
                self.node_sends("a router's word", v, "icmpv6/134", "re", true);
            }
            for (_, door) in DOORS {
                self.established_at_a_door(v, door);
            }
            self.over_loopback(v);
        }
    }

    /// A helper's expectations: FTP's client names a port to which the server is to connect.
    fn expected(&mut self) {
        let control = Tuple { from: self.address("le", 0), to: self.address("re", 0), service: service("tcp/21"), source_port: 2121 };
        let mut told = 1001;
        let say = |from: &str, to: &str, tuple: Tuple, numbers: (u32, u32), flags: u8, text: &[u8]| {
            let segment = frame::tcp_carrying((tuple.from, tuple.source_port), (tuple.to, tuple.service.port), numbers, flags, text);
            self.put(from, self.macs(from, to), frame::ETH_IPV4, &frame::ip(tuple.from, tuple.to, frame::PROTO_TCP, &segment));
        };
        say("le", "re", control, (1000, 0), SYN, b"");
        say("re", "le", control.turned(), (5000, 1001), SYN | ACK, b"");
        let mut lines = Vec::new();
        for (line, port) in [("USER lab\r\n", 0), ("PORT 10,1,0,2,200,11\r\n", 51211), ("PORT 10,1,0,2,200,10\r\n", 51210)] {
            lines.push((line, told, port));
            told += line.len() as u32;
        }
        for (line, number, port) in lines {
            let segment = frame::tcp_carrying((control.from, 2121), (control.to, 21), (number, 5001), ACK | 8, line.as_bytes());
            self.put("le", self.macs("le", "re"), frame::ETH_IPV4, &frame::ip(control.from, control.to, frame::PROTO_TCP, &segment));
            if port > 0 {
                self.ask("what FTP expects, and the policy", "re", "le", 0, &format!("tcp/{port}"), port == 51210);
            }
        }
    }

    /// Sends as the node's own programs do; returns the node's address. What floods is looked for at a neighbour.
    fn node_sends(&mut self, name: &str, v: usize, what: &str, to: &'static str, passes: bool) -> IpAddr {
        let at = if to == "gh" { "le" } else { to };
        let id = self.next(format!("{name} v{}", [4, 6][v]), at, passes);
        let target = self.scene.ends[to].addresses[v];
        let gateway: IpAddr = ["10.1.0.1", "2001:db8:1::1"][v].parse().unwrap();
        let Service { protocol, port } = service(what);
        let socket = match protocol {
            Protocol::Udp => self.scene.host.run(|| UdpSocket::bind(SocketAddr::new(gateway, 0))).unwrap(),
            other => {
                let family = [nix::libc::AF_INET, nix::libc::AF_INET6][v];
                self.scene.host.run(|| frame::raw_socket(family, i32::from(other.number()))).unwrap()
            }
        };
        let message = match protocol {
            Protocol::Icmp | Protocol::Icmpv6 => {
                with_sum([&[port as u8, 0, 0, 0, 0x77, 0x77, 0, 1], &marker(id)[..]].concat(), gateway, target)
            }
            Protocol::Udp => marker(id),
            _ => [vec![0x11, 0, 0, 0, 0, 0, 0, 0], marker(id)].concat(),
        };
        let port = if protocol == Protocol::Udp { port } else { 0 };
        // The answer may be an error of an earlier datagram.
        let _ = socket.send_to(&message, SocketAddr::new(target, port));
        gateway
    }

    /// An answer at a published port is judged as if it had come by itself: the proxy may go on in a connection that was ended,
    /// and conntrack then takes the proxy for who began it. In Audit it passes.
    fn established_at_a_door(&mut self, v: usize, door: u16) {
        let at = SocketAddr::new(self.address("node", v), door);
        let socket = self.scene.host.run(|| UdpSocket::bind(at)).unwrap();
        let id = self.next(format!("the node from its port {door} v{}", [4, 6][v]), "net", true);
        socket.send_to(&marker(id), SocketAddr::new(self.address("stranger", v), 5353)).unwrap();
        let tuple = Tuple {
            from: self.address("stranger", v),
            to: self.address("node", v),
            service: Service { port: door, ..service("udp/1") },
            source_port: 5353,
        };
        self.plain(&format!("the answer at port {door} v{}", [4, 6][v]), "net", "node", door == DOORS[2].1, |id| packet(id, tuple, 0));
    }

    fn over_loopback(&mut self, v: usize) {
        let at = SocketAddr::new(self.address("node", v), 0);
        let socket = self.scene.host.run(|| UdpSocket::bind(at)).unwrap();
        let id = self.next(format!("the node to its own door v{}", [4, 6][v]), "node", true);
        let _ = socket.send_to(&marker(id), SocketAddr::new(self.address("node", v), DOORS[1].1));
        let id = self.next(format!("the node to a port translated on its way out v{}", [4, 6][v]), "le", false);
        let _ = socket.send_to(&marker(id), SocketAddr::new(self.address("node", v), INWARD));
    }
}

/// Sends everything once, and looks.
pub(super) fn round(scene: &Scene<'_>, round: u16) -> (Vec<Probe>, Seen) {
    scene.connections.borrow_mut().forget_connections();
    let mut script = Script { scene, round, sent: Vec::new() };
    script.guard();
    script.made_anew();
    script.filter();
    script.expected();
    script.look_ups();
    scene.fence.wait();
    (script.sent, scene.look())
}
