//! Plan (written in identities) + what runs here = ruleset (written in addresses).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;

use crate::evaluate::{Scene, Standing};
use crate::inventory::{Container, Inventory, Network, Published};
use crate::policy_set::{Direction, Peer, PolicySet, Rule};
use crate::ruleset::{Door, Pair, Pin, Remote, Ruleset, Spot};
use crate::segment::{Mode, Selector};
use crate::service::Ports;
use crate::workload::Workload;

/// Names of the networks of each workload that runs here, as [`Scene`] wants them.
pub fn networks(inventory: &Inventory) -> BTreeMap<Workload, BTreeSet<String>> {
    let owned = |names: BTreeSet<&str>| names.into_iter().map(str::to_owned).collect();
    inventory.workloads().into_iter().map(|(workload, names)| (workload.clone(), owned(names))).collect()
}

/// The ruleset of this node, at this moment. Deterministic.
pub fn bind(set: &PolicySet, inventory: &Inventory, now: Timestamp) -> Ruleset {
    bind_after(set, inventory, &BTreeSet::new(), now)
}

/// The same, where these bridges were guarded before under the same policies: they stay so, though nobody in Enforce is on them just
/// now. Whoever comes back after all were gone (a restart of the engine) would else send before it is bound.
pub fn bind_after(set: &PolicySet, inventory: &Inventory, guarded: &BTreeSet<String>, now: Timestamp) -> Ruleset {
    let networks = networks(inventory);
    let scene = Scene { set, networks: &networks, now };
    let mut ruleset = Ruleset { bridges: inventory.networks.values().filter_map(|n| n.bridge.clone()).collect(), ..Ruleset::default() };

    let standings: BTreeMap<&str, Standing> = inventory.containers.values().map(|c| (c.id.as_str(), scene.standing(&c.workload))).collect();
    for container in inventory.containers.values() {
        let guarded = match standings[container.id.as_str()] {
            Standing::Open => continue,
            Standing::Audit => false,
            Standing::Enforce(_) | Standing::Quarantined => true,
        };
        for leg in &container.legs {
            let watch = ruleset.watched.entry(leg.bridge.clone()).or_default();
            watch.guarded |= guarded;
        }
    }
    let still = ruleset.bridges.iter().filter(|bridge| guarded.contains(*bridge)).cloned().collect::<Vec<_>>();
    for bridge in guarded_beforehand(set, inventory).chain(&still) {
        ruleset.watched.entry(bridge.clone()).or_default().guarded = true;
    }
    for container in inventory.containers.values() {
        let standing = standings[container.id.as_str()];
        for leg in &container.legs {
            let Some(watch) = ruleset.watched.get(&leg.bridge) else { continue };
            if let (true, Some(port)) = (watch.guarded, &leg.port) {
                let pin = Pin { bridge: leg.bridge.clone(), mac: leg.mac, addresses: leg.addresses.clone() };
                ruleset.pins.insert(port.clone(), pin);
            }
        }
        for spot in spots(container) {
            if spot.bridge.as_ref().is_some_and(|bridge| ruleset.watched.contains_key(bridge)) {
                ruleset.sides.insert(spot, standing);
            }
        }
        if matches!(standing, Standing::Audit | Standing::Enforce(_)) {
            allow_sides(&scene, inventory, container, &mut ruleset.pairs);
        }
        if inventory.userland_proxy && standing != Standing::Open {
            open_doors(&scene, inventory, container, standing, &mut ruleset);
        }
        if standing != Standing::Open {
            let closed = closed_to_the_node(&scene, inventory, container, standing);
            for door in closed {
                let strictest = ruleset.inward.entry(door).or_insert(standing);
                *strictest = standing.max(*strictest);
            }
        }
    }
    if !ruleset.ajar.is_empty() {
        ruleset.node.clone_from(&inventory.host);
    }
    close_beforehand(inventory, &mut ruleset);
    ruleset
}

/// Who else has addresses of a network's subnets on a bridge: should the network be made anew while nobody looks, it can't be told
/// from them. `None`: nobody.
pub fn contested<'a>(network: &Network, inventory: &'a Inventory) -> Option<&'a String> {
    let others = inventory.bridges.iter().filter(|(name, _)| network.bridge.as_ref() != Some(name));
    let shares = |address: &IpAddr| network.subnets.iter().any(|subnet| subnet.contains(address));
    others.into_iter().find(|(_, bridge)| bridge.addresses.iter().any(shares)).map(|(name, _)| name)
}

/// What closes a guarded network that is made anew (`compose down && up`) under another bridge while the agent is dead: its subnets,
/// and all that was there beside it and has to go on undisturbed.
fn close_beforehand(inventory: &Inventory, ruleset: &mut Ruleset) {
    let guarded = ruleset.guarded();
    let ours = inventory.networks.values().filter(|network| network.bridge.as_ref().is_some_and(|bridge| guarded.contains(bridge)));
    ruleset.subnets = ours.filter(|network| contested(network, inventory).is_none()).flat_map(|network| network.subnets.clone()).collect();
    if ruleset.subnets.is_empty() {
        return;
    }
    ruleset.known = inventory.bridges.keys().chain(&ruleset.bridges).cloned().collect();
    let free = inventory.bridges.iter().filter(|(name, _)| !guarded.contains(*name));
    ruleset.bystanders = free.flat_map(|(_, bridge)| bridge.ports.clone()).collect();
}

/// Bridges of networks that belong to an enforced segment by their project or name, whoever runs there. Before the first
/// container of the segment runs, and between two of them, they are closed already: the engine tells of a container after the
/// container's first packet.
fn guarded_beforehand<'a>(set: &'a PolicySet, inventory: &'a Inventory) -> impl Iterator<Item = &'a String> {
    let takes = |selector: &Selector, network: &Network| match selector {
        Selector::Project(project) => network.project.as_ref() == Some(project),
        Selector::Network(name) => *name == network.name,
        Selector::Workload(_) => false,
    };
    let enforced = || set.segments.values().filter(|segment| segment.mode == Mode::Enforce);
    let bridges = inventory.networks.values().filter_map(|network| Some((network.bridge.as_ref()?, network)));
    bridges
        .filter(move |(_, network)| enforced().flat_map(|segment| &segment.members).any(|selector| takes(selector, network)))
        .map(|(bridge, _)| bridge)
}

fn spots(container: &Container) -> impl Iterator<Item = Spot> + '_ {
    container.legs.iter().flat_map(|leg| leg.addresses.iter().map(|&address| Spot { bridge: Some(leg.bridge.clone()), address }))
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

fn rules<'a>(scene: &'a Scene<'_>, workload: &Workload, direction: Direction) -> impl Iterator<Item = &'a Rule> {
    let rules = scene.set.policies.get(workload).map(|policy| policy.rules(direction));
    rules.into_iter().flatten().filter(|rule| rule.in_force(scene.now))
}

/// Where a peer is found on this node.
fn remotes(inventory: &Inventory, peer: &Peer) -> Vec<Remote> {
    match peer {
        Peer::Workload(workload) => {
            inventory.containers.values().filter(|c| c.workload == *workload).flat_map(spots).map(Remote::Spot).collect()
        }
        Peer::Host => inventory.host.iter().map(|&address| Remote::Spot(Spot { bridge: None, address })).collect(),
        // Loopback never crosses a bridge (RFC 1122, 3.2.1.3 (g); RFC 4291, 2.5.3): the rule for the resolver in the container's
        // own namespace needs no element in the kernel.
        Peer::Outside(net) if net.addr().is_loopback() => Vec::new(),
        Peer::Outside(net) => vec![Remote::Outside(*net)],
    }
}

fn fits(local: &Spot, remote: &Remote) -> bool {
    match remote {
        Remote::Spot(spot) => same_family(local.address, spot.address),
        Remote::Outside(net) => same_family(local.address, net.addr()),
    }
}

/// The pairs of one container's own two sides.
fn allow_sides(scene: &Scene<'_>, inventory: &Inventory, container: &Container, pairs: &mut BTreeSet<Pair>) {
    let locals: Vec<Spot> = spots(container).collect();
    let mut add = |direction, remote: &Remote, ports| {
        for local in locals.iter().filter(|local| fits(local, remote)) {
            pairs.insert(Pair { direction, local: local.clone(), remote: remote.clone(), ports });
        }
    };
    for direction in [Direction::Egress, Direction::Ingress] {
        for rule in rules(scene, &container.workload, direction) {
            for remote in remotes(inventory, &rule.peer) {
                add(direction, &remote, rule.ports);
            }
        }
    }
    if !inventory.userland_proxy {
        return;
    }
    // A server of ours reached by the proxy's port: the packet goes to the node, the rule names the workload behind.
    for rule in rules(scene, &container.workload, Direction::Egress) {
        let Peer::Workload(peer) = &rule.peer else { continue };
        for server in inventory.containers.values().filter(|c| c.workload == *peer) {
            for published in server.published.iter().filter(|p| behind(&rule.ports, p)) {
                for door in doors(inventory, published) {
                    let remote = Remote::Spot(Spot { bridge: None, address: door.address });
                    add(Direction::Egress, &remote, door_ports(&door));
                }
            }
        }
    }
    // The proxy's own leg: who may come was decided at the door.
    for published in &container.published {
        let Ok(ports) = Ports::new(published.protocol, published.container_port, published.container_port) else { continue };
        for &address in &inventory.host {
            add(Direction::Ingress, &Remote::Spot(Spot { bridge: None, address }), ports);
        }
    }
}

fn behind(ports: &Ports, published: &Published) -> bool {
    ports.holds(crate::Service { protocol: published.protocol, port: published.container_port })
}

fn door_ports(door: &Door) -> Ports {
    Ports::from(crate::Service { protocol: door.protocol, port: door.port })
}

/// The node's addresses that a published port is reachable at.
fn doors<'a>(inventory: &'a Inventory, published: &'a Published) -> impl Iterator<Item = Door> + 'a {
    let at = move |address: IpAddr| match published.address {
        any if any.is_unspecified() => same_family(any, address),
        exact => exact == address,
    };
    let door = move |address: IpAddr| Door { address, protocol: published.protocol, port: published.port };
    inventory.host.iter().copied().filter(move |&address| at(address)).map(door)
}

/// Published ports of one container that the node's own programs may not reach. The proxy's leg comes from the node too, so that with a
/// proxy only a quarantine closes them.
fn closed_to_the_node<'a>(
    scene: &'a Scene<'_>,
    inventory: &'a Inventory,
    container: &'a Container,
    standing: Standing,
) -> impl Iterator<Item = Door> + 'a {
    let allows = move |published: &Published| {
        let host = |rule: &Rule| rule.peer == Peer::Host && behind(&rule.ports, published);
        standing != Standing::Quarantined && (inventory.userland_proxy || rules(scene, &container.workload, Direction::Ingress).any(host))
    };
    let closed = container.published.iter().filter(move |published| !allows(published));
    closed.flat_map(|published| {
        let addresses = spots(container).map(|spot| spot.address).filter(|&address| same_family(address, published.address));
        addresses.map(|address| Door { address, protocol: published.protocol, port: published.container_port })
    })
}

/// The doors of one container, and who may come in by them: whoever its ingress allows on the port behind.
fn open_doors(scene: &Scene<'_>, inventory: &Inventory, container: &Container, standing: Standing, ruleset: &mut Ruleset) {
    for published in &container.published {
        let everywhere = published.address.is_unspecified() || published.address.is_loopback();
        if everywhere && standing != Standing::Audit {
            ruleset.ajar.insert(Door { address: published.address, protocol: published.protocol, port: published.port });
        }
        for door in doors(inventory, published) {
            let local = Spot { bridge: None, address: door.address };
            let ports = door_ports(&door);
            ruleset.doors.insert(door, standing);
            if standing == Standing::Quarantined {
                continue;
            }
            for rule in rules(scene, &container.workload, Direction::Ingress).filter(|rule| behind(&rule.ports, published)) {
                for remote in remotes(inventory, &rule.peer).into_iter().filter(|remote| fits(&local, remote)) {
                    ruleset.pairs.insert(Pair { direction: Direction::Ingress, local: local.clone(), remote, ports });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::NodeBridge;
    use crate::segment::{Refusal, Segment};

    #[test]
    fn a_network_of_an_enforced_project_is_guarded_while_nothing_runs_on_it() {
        let network = |name: &str, project: Option<&str>| Network {
            id: name.into(),
            name: name.into(),
            project: project.map(str::to_owned),
            driver: "bridge".into(),
            bridge: Some(format!("br-{name}")),
            subnets: Vec::new(),
            internal: false,
            unmanaged: BTreeSet::new(),
        };
        let networks = [network("shop_back", Some("shop")), network("named", None), network("other", Some("blog"))];
        let inventory = Inventory { networks: networks.map(|network| (network.id.clone(), network)).into(), ..Inventory::default() };
        let segment = |mode| Segment {
            name: "shop".into(),
            members: [Selector::Project("shop".into()), Selector::Network("named".into())].into(),
            mode,
            refusal: Refusal::Reject,
            promotion: None,
        };
        let guarded = |mode| {
            let set = PolicySet { segments: [("shop".to_owned(), segment(mode))].into(), ..PolicySet::default() };
            let ruleset = bind(&set, &inventory, Timestamp::UNIX_EPOCH);
            ruleset.watched.into_iter().filter(|(_, watch)| watch.guarded).map(|(bridge, _)| bridge).collect::<Vec<_>>()
        };

        assert_eq!(guarded(Mode::Enforce), ["br-named", "br-shop_back"]);
        assert_eq!(guarded(Mode::Audit), Vec::<String>::new());
    }

    #[test]
    fn a_guarded_network_is_closed_by_its_subnet_beforehand_unless_another_bridge_carries_it() {
        let network = |name: &str, subnet: &str| Network {
            id: name.into(),
            name: name.into(),
            project: None,
            driver: "bridge".into(),
            bridge: Some(format!("br-{name}")),
            subnets: vec![subnet.parse().unwrap()],
            internal: false,
            unmanaged: BTreeSet::new(),
        };
        let bridge =
            |port: &str, address: &str| NodeBridge { ports: [port.to_owned()].into(), addresses: [address.parse().unwrap()].into() };
        let networks = [network("shop", "10.1.0.0/16"), network("shared", "192.168.122.0/24"), network("open", "10.2.0.0/16")];
        let inventory = Inventory {
            networks: networks.map(|network| (network.id.clone(), network)).into(),
            bridges: [
                ("br-shop".to_owned(), bridge("veth1", "10.1.0.1")),
                ("br-shared".to_owned(), bridge("veth2", "192.168.122.1")),
                ("br-open".to_owned(), bridge("veth3", "10.2.0.1")),
                ("virbr0".to_owned(), bridge("vnet0", "192.168.122.254")),
            ]
            .into(),
            ..Inventory::default()
        };
        let bound = |names: &[&str]| {
            let segment = Segment {
                name: "shop".into(),
                members: names.iter().map(|name| Selector::Network((*name).into())).collect(),
                mode: Mode::Enforce,
                refusal: Refusal::Reject,
                promotion: None,
            };
            bind(&PolicySet { segments: [("shop".to_owned(), segment)].into(), ..PolicySet::default() }, &inventory, Timestamp::UNIX_EPOCH)
        };
        let strings = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();

        let ruleset = bound(&["shop", "shared"]);
        assert_eq!(ruleset.subnets, ["10.1.0.0/16".parse().unwrap()].into());
        assert_eq!(strings(&ruleset.known), ["br-open", "br-shared", "br-shop", "virbr0"]);
        assert_eq!(strings(&ruleset.bystanders), ["veth3", "vnet0"], "ports of guarded bridges are no bystanders");
        assert_eq!(contested(&inventory.networks["shared"], &inventory).map(String::as_str), Some("virbr0"));
        let none = bound(&["shared"]);
        assert!(none.subnets.is_empty() && none.known.is_empty() && none.bystanders.is_empty(), "nothing to close, nothing to say");
    }
}
