//! A node on a stage: bridges with members that play containers, a policy in words, and the enforcer between them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use lab::{Bridge, Member, Netns};
use node_agent::enforce::{Applied, EnforceError, Enforcer, Nftables};
use policy::inventory::{Container, Leg, Network, NodeBridge, Published};
use policy::policy_set::{Peer, Quarantine, Rule};
use policy::segment::Refusal;
use policy::{Inventory, Mode, PolicySet, Ruleset, Segment, Selector, Workload, WorkloadPolicy};

/// A moment; the rules of these tests have no end.
pub(crate) fn now() -> jiff::Timestamp {
    "2026-11-20T12:00:00Z".parse().unwrap()
}

/// The inventory of members on bridges, each a container of a workload of its own name.
pub(crate) fn inventory(bridges: &[(&Bridge<'_>, &[(&str, &Member)])]) -> Inventory {
    let mut inventory = Inventory::default();
    for (bridge, members) in bridges {
        let network = Network {
            id: format!("net-{}", bridge.name),
            name: bridge.name.clone(),
            project: None,
            driver: "bridge".into(),
            bridge: Some(bridge.name.clone()),
            subnets: vec![bridge.v4.into(), bridge.v6.into()],
            internal: false,
            unmanaged: BTreeSet::new(),
        };
        inventory.bridges.insert(bridge.name.clone(), node_bridge(bridge));
        inventory.host.insert(bridge.gateway_v4().into());
        inventory.host.insert(bridge.gateway_v6().into());
        inventory.networks.insert(network.id.clone(), network.clone());
        for (name, member) in *members {
            let leg = Leg {
                network: network.id.clone(),
                bridge: bridge.name.clone(),
                port: Some(member.port.clone()),
                mac: member.mac,
                addresses: member.addresses().into(),
            };
            let container = inventory.containers.entry((*name).to_owned()).or_insert_with(|| container(name));
            container.legs.push(leg);
        }
    }
    inventory
}

/// A bridge as the node sees it: all of its ports, whoever is behind them.
pub(crate) fn node_bridge(bridge: &Bridge<'_>) -> NodeBridge {
    let listed = bridge.host.ip(&format!("-o link show master {}", bridge.name));
    let name = |line: &str| line.split(": ").nth(1).and_then(|name| name.split('@').next()).map(str::to_owned);
    NodeBridge {
        ports: listed.lines().filter_map(name).collect(),
        addresses: [bridge.gateway_v4().into(), bridge.gateway_v6().into()].into(),
    }
}

/// A container without a leg.
pub(crate) fn container(name: &str) -> Container {
    Container {
        id: name.to_owned(),
        name: name.to_owned(),
        workload: Workload::new("", name),
        one_off: false,
        engine_named: false,
        image: "lab".into(),
        labels: BTreeMap::new(),
        pid: None,
        legs: Vec::new(),
        published: Vec::new(),
        resolvers: Vec::new(),
        members: Vec::new(),
        raw: false,
        elsewhere: Default::default(),
        unmanaged: BTreeSet::new(),
    }
}

/// What is in force, in words.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy(pub(crate) PolicySet);

impl Policy {
    /// These workloads in this mode, refusing what is denied.
    pub(crate) fn mode(mut self, mode: Mode, members: &[&str]) -> Self {
        self.segment(mode, Refusal::Reject, members);
        self
    }

    /// These workloads in Enforce, dropping what is denied.
    pub(crate) fn silent(mut self, members: &[&str]) -> Self {
        self.segment(Mode::Enforce, Refusal::Drop, members);
        self
    }

    fn segment(&mut self, mode: Mode, refusal: Refusal, members: &[&str]) {
        for name in members {
            let workload = Workload::new("", *name);
            let segment = Segment {
                name: (*name).to_owned(),
                members: [Selector::Workload(workload.clone())].into(),
                mode,
                refusal,
                promotion: None,
            };
            self.0.segments.insert(segment.name.clone(), segment);
            self.0.policies.entry(workload.clone()).or_insert_with(|| WorkloadPolicy::empty(workload));
        }
    }

    /// An edge allowed on both of its sides.
    pub(crate) fn allow(self, from: &str, to: &str, ports: &str) -> Self {
        self.egress(from, to, ports).ingress(to, from, ports)
    }

    /// One egress rule.
    pub(crate) fn egress(mut self, of: &str, to: &str, ports: &str) -> Self {
        self.policy(of).egress.insert(rule(to, ports));
        self
    }

    /// One ingress rule.
    pub(crate) fn ingress(mut self, of: &str, from: &str, ports: &str) -> Self {
        self.policy(of).ingress.insert(rule(from, ports));
        self
    }

    /// Cuts a workload off.
    pub(crate) fn quarantine(mut self, name: &str) -> Self {
        let workload = Workload::new("", name);
        self.0.quarantines.insert(workload.clone(), Quarantine { workload, comment: String::new() });
        self
    }

    fn policy(&mut self, of: &str) -> &mut WorkloadPolicy {
        let workload = Workload::new("", of);
        // The outside and the host have no policy; the entry is harmless.
        self.0.policies.entry(workload.clone()).or_insert_with(|| WorkloadPolicy::empty(workload))
    }

    /// The ruleset of a node.
    pub(crate) fn bind(&self, inventory: &Inventory) -> Ruleset {
        policy::bind(&self.0, inventory, now())
    }
}

fn rule(peer: &str, ports: &str) -> Rule {
    let peer: Peer = peer.parse().unwrap();
    Rule { peer, ports: ports.parse().unwrap(), until: None }
}

/// An enforcer in a namespace.
pub(crate) fn enforcer(host: &Netns) -> Nftables {
    host.run(|| Nftables::open().unwrap())
}

/// A published port.
pub(crate) fn published(address: &str, port: u16, container_port: u16) -> Published {
    let address: IpAddr = address.parse().unwrap();
    Published { address, port, protocol: policy::Protocol::Tcp, container_port }
}

/// Applies and fails the test with the whole chain of causes.
pub(crate) fn apply(enforcer: &mut impl Enforcer, ruleset: &Ruleset) -> Applied {
    enforcer.apply(ruleset).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// An error with its causes.
pub(crate) fn chain(error: &EnforceError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// The hardware address of an interface.
pub(crate) fn mac_of(netns: &Netns, interface: &str) -> [u8; 6] {
    let text = netns.ip(&format!("-o link show {interface}"));
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// Waits until the host's own IPv6 addresses are usable: until then it cannot ask for its neighbours (RFC 4862, 5.4).
pub(crate) fn settled(host: &Netns) {
    lab::eventually(std::time::Duration::from_secs(30), || {
        let tentative = host.ip("-6 addr show tentative");
        if tentative.trim().is_empty() { Ok(()) } else { Err(tentative) }
    });
}
