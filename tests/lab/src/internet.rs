//! A namespace that plays the internet: TEST-NET addresses, and no way out of it.

use std::net::IpAddr;
use std::process::Command;

use crate::netns::{Netns, Veth};
use crate::process::{self, Process, eventually};
use crate::server::Server;

/// The host's own address towards the internet.
pub const HOST_V4: &str = "203.0.113.2";
/// The host's own IPv6 address towards the internet.
pub const HOST_V6: &str = "2001:db8:ffff::2";
/// The resolver's address.
pub const RESOLVER: &str = "203.0.113.53";

/// The internet, joined to one host by a cable (`up0` in the host, with the default route).
#[derive(Debug)]
pub struct Internet {
    /// Its namespace.
    pub netns: Netns,
    servers: Vec<Server>,
    resolver: Option<Process>,
}

impl Internet {
    /// Joins a new internet to this host.
    pub fn behind(host: &Netns) -> Self {
        let netns = Netns::new("internet");
        Veth::between(host, "up0", &netns, "down0");
        host.ip(&format!("addr add {HOST_V4}/30 dev up0"));
        host.ip(&format!("-6 addr add {HOST_V6}/64 dev up0 nodad"));
        netns.ip("addr add 203.0.113.1/30 dev down0");
        netns.ip("-6 addr add 2001:db8:ffff::1/64 dev down0 nodad");
        host.ip("route add default via 203.0.113.1");
        host.ip("-6 route add default via 2001:db8:ffff::1");
        Self { netns, servers: Vec::new(), resolver: None }
    }

    /// Gives it one more address (TEST-NET or 2001:db8::/32).
    pub fn add_address(&self, address: IpAddr) {
        let (family, length) = if address.is_ipv4() { ("-4", 32) } else { ("-6", 128) };
        let nodad = if address.is_ipv4() { "" } else { "nodad" };
        self.netns.ip(&format!("{family} addr replace {address}/{length} dev lo {nodad}"));
    }

    /// A web server on an address of its own that answers every request with `body`.
    pub fn serve_http(&mut self, address: IpAddr, port: u16, body: &str) {
        self.add_address(address);
        self.servers.push(Server::http(&self.netns, (address, port).into(), body));
    }

    /// dnsmasq on [`RESOLVER`] with these names, and no upstream.
    ///
    /// # Panics
    /// Where dnsmasq is missing or doesn't start: ask [`process::found`] first.
    pub fn serve_names(&mut self, names: &[(&str, IpAddr)]) {
        let listen: IpAddr = RESOLVER.parse().expect("an address");
        self.add_address(listen);
        let mut command = Command::new("dnsmasq");
        command.args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--keep-in-foreground"]);
        command.args(["--pid-file=", "--local=/#/", &format!("--listen-address={RESOLVER}")]);
        command.args(names.iter().map(|(name, address)| format!("--host-record={name},{address}")));
        self.resolver = Some(self.netns.spawn(command.stderr(std::process::Stdio::null())));
        eventually(std::time::Duration::from_secs(5), || match self.netns.tcp((listen, 53).into()) {
            crate::Tcp::Open(_) => Ok(()),
            other => Err(format!("the resolver on {RESOLVER}: {other:?}")),
        });
    }

    /// Whether the programs it needs are there.
    pub fn lacks() -> Option<String> {
        (!process::found("dnsmasq")).then(|| "needs dnsmasq (package dnsmasq-base)".to_owned())
    }
}
