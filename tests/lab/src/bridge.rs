//! A Linux bridge with namespaces that play containers: what Docker makes, without an engine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use crate::netns::{Netns, Veth};

/// A bridge in a host's namespace. Its first address in each subnet is the host's.
#[derive(Debug)]
pub struct Bridge<'h> {
    /// The namespace that plays the host.
    pub host: &'h Netns,
    /// The interface's name.
    pub name: String,
    /// The subnet; the host has the first address.
    pub v4: Ipv4Net,
    /// The same for IPv6.
    pub v6: Ipv6Net,
    members: u32,
}

/// A namespace on a bridge.
#[derive(Debug)]
pub struct Member {
    /// Its namespace; the interface inside is `eth0`.
    pub netns: Netns,
    /// The host's end of its cable, a port of the bridge.
    pub port: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl<'h> Bridge<'h> {
    /// Makes the bridge with its own netfilter switches on and the global ones off, forwarding enabled in the host.
    ///
    /// # Panics
    /// Where a subnet is too small for a host or `ip` fails.
    pub fn new(host: &'h Netns, name: &str, v4: &str, v6: &str) -> Self {
        let v4: Ipv4Net = v4.parse().expect("an IPv4 subnet");
        let v6: Ipv6Net = v6.parse().expect("an IPv6 subnet");
        let made = Self { host, name: name.to_owned(), v4, v6, members: 1 };
        host.ip(&format!("link add {name} type bridge"));
        host.ip(&format!("addr add {}/{} dev {name}", made.gateway_v4(), v4.prefix_len()));
        host.ip(&format!("-6 addr add {}/{} dev {name} nodad", made.gateway_v6(), v6.prefix_len()));
        host.ip(&format!("link set {name} up"));
        made.set_nf_call(true);
        // What counts is the global switch OR the bridge's own, and a new namespace may start with the global one on.
        for global in ["net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"] {
            if host.sysctl(global).is_some() {
                host.set_sysctl(global, "0");
            }
        }
        host.set_sysctl("net.ipv4.ip_forward", "1");
        host.set_sysctl("net.ipv6.conf.all.forwarding", "1");
        made
    }

    /// The switches nf_call_iptables and nf_call_ip6tables of this bridge.
    pub fn set_nf_call(&self, on: bool) {
        let bit = u8::from(on);
        self.host.ip(&format!("link set {} type bridge nf_call_iptables {bit} nf_call_ip6tables {bit}", self.name));
    }

    /// The host's address on the bridge.
    pub fn gateway_v4(&self) -> Ipv4Addr {
        self.v4_at(1)
    }

    /// The host's IPv6 address on the bridge.
    pub fn gateway_v6(&self) -> Ipv6Addr {
        self.v6_at(1)
    }

    fn v4_at(&self, nth: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.v4.network()) + nth)
    }

    fn v6_at(&self, nth: u32) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.v6.network()) + u128::from(nth))
    }

    /// Adds a namespace with the next free addresses, a hardware address made from them (as Docker does), the host as its
    /// way out.
    pub fn add(&mut self, label: &str) -> Member {
        self.members += 1;
        self.add_at(label, self.members)
    }

    /// Adds a namespace with the `nth` address of each subnet.
    pub fn add_at(&self, label: &str, nth: u32) -> Member {
        let netns = Netns::new(label);
        let (v4, v6) = (self.v4_at(nth), self.v6_at(nth));
        let [a, b, c, d] = v4.octets();
        let mac = [0x02, 0x42, a, b, c, d];
        let port = format!("v{}-{nth}", self.name);
        Veth::with_mac(self.host, &port, &netns, "eth0", &mac_text(mac));
        netns.ip(&format!("addr add {v4}/{} dev eth0", self.v4.prefix_len()));
        netns.ip(&format!("-6 addr add {v6}/{} dev eth0 nodad", self.v6.prefix_len()));
        netns.ip(&format!("route add default via {}", self.gateway_v4()));
        netns.ip(&format!("-6 route add default via {}", self.gateway_v6()));
        self.host.ip(&format!("link set {port} master {}", self.name));
        Member { netns, port, mac, v4, v6 }
    }
}

impl Member {
    /// Both addresses, IPv4 first: for tests that say the same of both.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// A hardware address as people write it.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}
