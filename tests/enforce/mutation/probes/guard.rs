//! Probes of the guard: what a port may say of itself, and what may cross.

use std::net::{IpAddr, Ipv6Addr};

use lab::frame;

use super::super::packet::{Tuple, by_a_route, ethertype, icmp, packet, with_sum};
use super::super::scene::marker;
use super::{NOBODY, Script};

impl Script<'_, '_> {
    /// What a port may say of itself, and what may cross.
    pub(super) fn guard(&mut self) {
        let end = |name: &str| (self.scene.ends[name].mac, self.scene.ends[name].addresses);
        let ((re, _), (le, _), (ot, others), (un, _)) = (end("re"), end("le"), end("ot"), end("un"));
        let gateway = self.scene.ends["re"].gateway;
        let v6 = |at: IpAddr| if let IpAddr::V6(at) = at { at.octets() } else { panic!("{at} is v4") };
        let v4 = |at: IpAddr| if let IpAddr::V4(at) = at { at } else { panic!("{at} is v6") };
        for v in 0..2 {
            for (name, mac, from) in [("another's address", re, "ot"), ("another's MAC", ot, "re")] {
                let tuple = self.tuple(from, "le", v, "udp/80");
                let id = self.next(format!("{name} v{}", [4, 6][v]), "le", false);
                let bytes = packet(id, tuple, 0);
                self.put("re", [le, mac], ethertype(&bytes), &bytes);
            }
            let tuple = Tuple { source_port: [67, 547][v], ..self.tuple("re", "le", v, ["udp/68", "udp/546"][v]) };
            self.plain("a DHCP server's answer", "re", "le", false, |id| packet(id, tuple, 0));
            let tuple = self.tuple("le", "ot", v, "udp/9");
            self.plain("from a port nobody bound, with a neighbour's address", "un", "ot", false, |id| packet(id, tuple, 0));
            let id = self.next(format!("the same to the node v{}", [4, 6][v]), "node", false);
            let tuple = self.tuple("le", "node", v, "udp/9");
            let bytes = packet(id, tuple, 0);
            self.put("un", [gateway, un], ethertype(&bytes), &bytes);
            for at in ["le", "un"] {
                let tuple = self.tuple("re", "ot", v, "udp/9");
                let id = self.next(format!("to a MAC address that is nowhere, seen by {at} v{}", [4, 6][v]), at, false);
                let bytes = packet(id, Tuple { from: self.address("le", v), ..tuple }, 0);
                self.put("le", [NOBODY, le], ethertype(&bytes), &bytes);
            }
            let id = self.next(format!("IP to the address of a bridge protocol v{}", [4, 6][v]), "node", false);
            let bytes = packet(id, self.tuple("le", "node", v, "udp/9"), 0);
            self.put("le", [[1, 0x80, 0xc2, 0, 0, 14], le], ethertype(&bytes), &bytes);
            let tuple = Tuple { from: self.address("re", v), ..self.tuple("net", "le", v, "udp/80") };
            self.plain("another's address, from the outside", "net", "le", false, |id| packet(id, tuple, 0));
            let tuple = Tuple { from: self.address("re", v), ..self.tuple("aw", "node", v, "udp/9") };
            self.plain("another's address, from an audited bridge to the node", "aw", "node", false, |id| packet(id, tuple, 0));
            // To a neighbour's MAC address, so that no side of the receiver's is asked.
            let id = self.next(format!("to another network's address, on an audited bridge v{}", [4, 6][v]), "ax", false);
            let bytes = packet(id, Tuple { to: self.address("re", v), ..self.tuple("aw", "ax", v, "udp/9") }, 0);
            self.put("aw", self.macs("aw", "ax"), ethertype(&bytes), &bytes);
            let tuple = self.tuple("re", "le", v, "udp/80");
            self.plain("a route in the packet itself", "re", "le", false, |id| by_a_route(packet(id, tuple, 0)));
            let tuple = self.tuple("x", "y", v, "udp/80");
            self.plain("allowed, where netfilter is off", "x", "y", false, |id| packet(id, tuple, 0));
            let tuple = self.tuple("un2", "y", v, "udp/80");
            self.plain("not bound, where netfilter is off", "un2", "y", false, |id| packet(id, tuple, 0));
        }
        for (name, from, to, dst, at, passes) in [
            ("an unknown type to the node", "re", "node", gateway, "br0", false),
            ("an unknown type from a port nobody bound", "un", "le", [255; 6], "le", false),
            ("an unknown type on somebody else's bridge", "v", "w", [255; 6], "w", true),
        ] {
            let id = self.next(format!("{name}: {from} -> {to}"), at, passes);
            self.put(from, [dst, self.scene.ends[from].mac], 0x88b5, &[marker(id), vec![0; 40]].concat());
        }
        let (own, theirs) = (v4(self.address("re", 0)), v4(others[0]));
        let router = std::net::Ipv4Addr::new(10, 1, 0, 1);
        for (name, from, mac, hardware, address, passes) in [
            ("ARP as it should be", "re", re, 1, own, true),
            ("ARP of a token ring", "re", re, 6, own, false),
            ("ARP with another's MAC address", "re", ot, 1, own, false),
            ("ARP with another's address", "re", re, 1, theirs, false),
            ("an ARP probe", "re", re, 1, std::net::Ipv4Addr::UNSPECIFIED, true),
            ("ARP from a port nobody bound", "un", un, 1, theirs, false),
        ] {
            let id = self.next(name.to_owned(), "le", passes);
            // Who probes asks for the address that it wants to have.
            let asked = if address.is_unspecified() { own } else { router };
            let mut request = frame::arp_reply(mac, address, [0; 6], asked);
            (request[1], request[7]) = (hardware, 1);
            self.put(from, [[255; 6], self.scene.ends[from].mac], frame::ETH_ARP, &[request, marker(id)].concat());
        }
        let id = self.next("ARP in a frame of another's MAC address".to_owned(), "le", false);
        let mut request = frame::arp_reply(re, own, [0; 6], router);
        request[7] = 1;
        self.put("re", [[255; 6], ot], frame::ETH_ARP, &[request, marker(id)].concat());
        let id = self.next("words behind ARP".to_owned(), "le", false);
        let mut request = frame::arp_reply(re, own, [0; 6], router);
        request[7] = 1;
        self.put("re", [[255; 6], re], frame::ETH_ARP, &[request, marker(id), vec![0; 40]].concat());
        self.answered("re", true);
        self.answered("un", false);
        self.asks_around("re");

        let own = self.address("re", 1);
        let none: IpAddr = Ipv6Addr::UNSPECIFIED.into();
        let all: IpAddr = "ff02::1".parse().unwrap();
        let link: IpAddr = "fe80::42:aff:fe01:3".parse().unwrap();
        let target = |at: IpAddr, id: u16| [&v6(at)[..], &[14, 1], &marker(id)].concat();
        let to = self.address("le", 1);
        for (name, from, to, kind, of, at, passes) in [
            ("duplicate address detection", none, all, 135, own, "le", true),
            ("a listener's report before there is an address", none, all, 143, own, "bulkhead:deny:spoof", false),
            ("a router advertisement", link, all, 134, own, "node", false),
            ("a redirect", own, to, 137, own, "le", false),
            ("a neighbour's advertisement", own, to, 136, self.address("re", 1), "le", true),
            ("an advertisement of another's", own, to, 136, others[1], "le", false),
            ("a solicitation", own, to, 135, to, "le", true),
        ] {
            let id = self.next(name.to_owned(), at, passes);
            let bytes = icmp(from, to, [kind, 0, 0, 0, 0, 0, 0, 0], &target(of, id));
            let dst = if to == all { [0x33, 0x33, 0, 0, 0, 1] } else { le };
            self.put("re", [dst, re], frame::ETH_IPV6, &bytes);
        }
        let everybody = [0x33, 0x33, 0, 0, 0, 1];
        for (name, from, to, dst, of) in
            [("words behind a solicitation", own, to, le, to), ("words in duplicate address detection", none, all, everybody, own)]
        {
            let id = self.next(name.to_owned(), "le", false);
            let bytes = icmp(from, to, [135, 0, 0, 0, 0, 0, 0, 0], &[target(of, id), vec![0; 48]].concat());
            self.put("re", [dst, re], frame::ETH_IPV6, &bytes);
        }
        let snoopers: IpAddr = "ff02::6a".parse().unwrap();
        for (name, from, mac, tagged) in [("a multicast router", "re", re, false), ("the same in a tag", "un", un, true)] {
            let id = self.next(format!("{name}: {from}"), "br0", false);
            let bytes = icmp(self.address(from, 1), snoopers, [151, 20, 0, 0, 0, 125, 0, 2], &marker(id));
            let (kind, payload) =
                if tagged { (frame::ETH_VLAN, frame::vlan(0, frame::ETH_IPV6, &bytes)) } else { (frame::ETH_IPV6, bytes) };
            self.put(from, [[0x33, 0x33, 0, 0, 0, 0x6a], mac], kind, &payload);
        }
        let request = self.tuple("le", "re", 1, "icmpv6/128");
        self.plain("an echo request", "le", "re", true, |id| packet(id, request, 0));
        let reply = [&[129, 0, 0, 0][..], &request.source_port.to_be_bytes(), &[0, 1]].concat();
        for (name, protocol, head, cut, passes) in [
            ("UDP in fragments", frame::PROTO_UDP, Vec::new(), 8, true),
            ("a large echo request", frame::PROTO_ICMPV6, vec![128, 0, 0, 0, 7, 7, 0, 1], 8, true),
            ("a large echo reply", frame::PROTO_ICMPV6, reply, 8, true),
            ("an advertisement in fragments", frame::PROTO_ICMPV6, vec![136, 0, 0, 0, 0x20, 0, 0, 0], 8, false),
            // With its number in the first one, which is the one that is logged.
            ("a solicitation in fragments", frame::PROTO_ICMPV6, vec![135, 0, 0, 0, 0, 0, 0, 0], 32, false),
        ] {
            let id = self.next(name.to_owned(), "le", passes);
            let whole = if protocol == frame::PROTO_UDP {
                frame::udp((own, 999), (to, 80), &[vec![0; 16], marker(id)].concat())
            } else {
                with_sum([&head[..], &target(others[1], id), &[14, 1, 0, 0, 0, 0, 0, 0]].concat(), own, to)
            };
            for (offset, more, part) in [(0_u16, 1_u16, &whole[..usize::from(cut)]), (cut, 0, &whole[usize::from(cut)..])] {
                let header = [
                    &[protocol, 0][..],
                    &(offset | more).to_be_bytes(),
                    &[0, 0],
                    &id.wrapping_add(self.round.wrapping_mul(512)).to_be_bytes(),
                ]
                .concat();
                self.put("re", [le, re], frame::ETH_IPV6, &frame::ip(own, to, 44, &[&header, part].concat()));
            }
        }
    }
}
