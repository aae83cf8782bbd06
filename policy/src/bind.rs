//! Plan (written in identities) + what runs here = ruleset (written in addresses).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;

use crate::evaluate::{Scene, Standing};
use crate::inventory::{Container, Inventory, Network, Published};
use crate::policy_set::{Direction, Peer, PolicySet, Rule};
use crate::ruleset::{Door, Pair, Pin, Remote, Ruleset, Spot, Tuples};
use crate::segment::{Mode, Selector};
use crate::service::Ports;
use crate::workload::Workload;

mod binding;

pub use binding::Binding;

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
    let (members, standings) = (members(inventory), standings(set, inventory, now));
    let mut ruleset = frame(set, inventory, &standings, guarded);
    ruleset.inward = inward(set, inventory, &standings, now);
    let doorways = doorways(inventory);
    let ground = Ground { inventory, members: &members, doorways: &doorways };
    for container in inventory.containers.values().filter(|container| has_sides(standings[&container.id])) {
        let locals: Vec<Spot> = spots(container).collect();
        let mut take = |pair| {
            ruleset.pairs.insert(pair);
        };
        carried_pairs(ground, container, &locals, &mut take);
        for (direction, rule) in rules(set, &container.workload, now) {
            rule_pairs(ground, container, &locals, direction, rule, &mut take);
        }
    }
    ruleset
}

/// Ids of the containers of each workload.
type Members = BTreeMap<Workload, Vec<String>>;

fn members(inventory: &Inventory) -> Members {
    let mut members = Members::new();
    for container in inventory.containers.values() {
        members.entry(container.workload.clone()).or_default().push(container.id.clone());
    }
    members
}

/// Every door of the node that the proxy listens at: who comes there reaches a container, and none of the node's own programs.
type Doorways = BTreeSet<Door>;

fn doorways(inventory: &Inventory) -> Doorways {
    let published = inventory.containers.values().filter(|_| inventory.userland_proxy).flat_map(|container| &container.published);
    published.flat_map(|published| doors(inventory, published)).collect()
}

/// The node's own of these ports at one of its addresses: all but the doors, which are somebody else's.
fn beside_the_doors(doorways: &Doorways, address: IpAddr, ports: Ports) -> Vec<Ports> {
    let door = |port| Door { address, protocol: ports.protocol(), port };
    let mut own = Vec::new();
    let mut first = Some(ports.first());
    for closed in doorways.range(door(ports.first())..=door(ports.last())).map(|door| door.port) {
        let before = first.zip(closed.checked_sub(1));
        own.extend(before.and_then(|(first, last)| Ports::new(ports.protocol(), first, last).ok()));
        first = closed.checked_add(1);
    }
    own.extend(first.and_then(|first| Ports::new(ports.protocol(), first, ports.last()).ok()));
    own
}

/// How each container stands, by id.
type Standings = BTreeMap<String, Standing>;

fn standings(set: &PolicySet, inventory: &Inventory, now: Timestamp) -> Standings {
    let networks = networks(inventory);
    let scene = Scene { set, networks: &networks, now };
    inventory.containers.values().map(|container| (container.id.clone(), scene.standing(&container.workload))).collect()
}

/// Whether the rules of a container with this standing become pairs.
fn has_sides(standing: Standing) -> bool {
    match standing {
        Standing::Audit | Standing::Enforce(_) => true,
        Standing::Open | Standing::Quarantined => false,
    }
}

/// What runs here, and by workload.
#[derive(Clone, Copy)]
struct Ground<'a> {
    inventory: &'a Inventory,
    members: &'a Members,
    doorways: &'a Doorways,
}

impl<'a> Ground<'a> {
    fn of(self, workload: &Workload) -> impl Iterator<Item = &'a Container> {
        let ids = self.members.get(workload).into_iter().flatten();
        ids.filter_map(move |id| self.inventory.containers.get(id))
    }
}

/// The bridges that somebody in Enforce is on, or that belong to an enforced segment.
fn guarded_by_policy(set: &PolicySet, inventory: &Inventory, standings: &Standings) -> BTreeSet<String> {
    let held = |container: &&Container| matches!(standings[&container.id], Standing::Enforce(_) | Standing::Quarantined);
    let of_legs = inventory.containers.values().filter(held).flat_map(|container| container.legs.iter().map(|leg| &leg.bridge));
    of_legs.chain(guarded_beforehand(set, inventory)).cloned().collect()
}

/// The ruleset without its pairs and without [`inward`]: what depends on who runs here and how they stand, and on no rule.
fn frame(set: &PolicySet, inventory: &Inventory, standings: &Standings, guarded: &BTreeSet<String>) -> Ruleset {
    let mut ruleset = Ruleset { bridges: inventory.networks.values().filter_map(|n| n.bridge.clone()).collect(), ..Ruleset::default() };
    for container in inventory.containers.values().filter(|container| standings[&container.id] != Standing::Open) {
        for leg in &container.legs {
            ruleset.watched.entry(leg.bridge.clone()).or_default();
        }
    }
    let still = ruleset.bridges.intersection(guarded).cloned().collect::<Vec<_>>();
    for bridge in guarded_by_policy(set, inventory, standings).into_iter().chain(still) {
        ruleset.watched.entry(bridge).or_default().guarded = true;
    }
    tell_tuples_apart(inventory, &mut ruleset);
    for container in inventory.containers.values() {
        let standing = standings[&container.id];
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
        if inventory.userland_proxy && standing != Standing::Open {
            hang_doors(inventory, container, standing, &mut ruleset);
        }
    }
    if !ruleset.ajar.is_empty() {
        ruleset.node.clone_from(&inventory.host);
    }
    close_beforehand(inventory, &mut ruleset);
    ruleset
}

/// Which watched bridges carry addresses that another one carries too. One engine makes no two networks with one subnet.
fn tell_tuples_apart(inventory: &Inventory, ruleset: &mut Ruleset) {
    let networks: Vec<(&String, &Network)> = inventory
        .networks
        .values()
        .filter_map(|network| Some((network.bridge.as_ref()?, network)))
        .filter(|(bridge, _)| ruleset.watched.contains_key(*bridge))
        .collect();
    let overlap = |a: &Network, b: &Network| {
        let nets = a.subnets.iter().flat_map(|a| b.subnets.iter().map(move |b| (a, b)));
        nets.into_iter().any(|(a, b)| a.contains(b) || b.contains(a))
    };
    let shares =
        |(bridge, network): &(&String, &Network)| networks.iter().any(|(other, theirs)| other != bridge && overlap(network, theirs));
    let shared: BTreeSet<&String> = networks.iter().filter(|network| shares(network)).map(|(bridge, _)| *bridge).collect();
    if shared.is_empty() {
        return;
    }
    for (bridge, watch) in &mut ruleset.watched {
        watch.tuples = if shared.contains(bridge) { Tuples::Shared } else { Tuples::Beside };
    }
}

/// Published ports that the node's own programs may not reach. The proxy's leg comes from the node too, so that with a proxy only a
/// quarantine closes them.
fn inward(set: &PolicySet, inventory: &Inventory, standings: &Standings, now: Timestamp) -> BTreeMap<Door, Standing> {
    let mut closed = BTreeMap::new();
    for container in inventory.containers.values().filter(|container| !container.published.is_empty()) {
        let standing = standings[&container.id];
        let host = |published: &Published| {
            let mut own = rules(set, &container.workload, now);
            own.any(|(direction, rule)| direction == Direction::Ingress && rule.peer == Peer::Host && behind(&rule.ports, published))
        };
        let allows = |published: &Published| match standing {
            Standing::Open => true,
            Standing::Audit | Standing::Enforce(_) => inventory.userland_proxy || host(published),
            Standing::Quarantined => false,
        };
        for published in container.published.iter().filter(|published| !allows(published)) {
            let addresses = spots(container).map(|spot| spot.address).filter(|&address| same_family(address, published.address));
            for address in addresses {
                let door = Door { address, protocol: published.protocol, port: published.container_port };
                let strictest = closed.entry(door).or_insert(standing);
                *strictest = standing.max(*strictest);
            }
        }
    }
    closed
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

/// Whether two states of a container are the same to every rule.
fn same_places(a: &Container, b: &Container) -> bool {
    fn legs(container: &Container) -> impl Iterator<Item = (&String, &BTreeSet<IpAddr>)> {
        container.legs.iter().map(|leg| (&leg.bridge, &leg.addresses))
    }
    a.workload == b.workload && a.published == b.published && legs(a).eq(legs(b))
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

/// The rules of a workload that hold now, with the side they are of.
fn rules<'a>(set: &'a PolicySet, workload: &Workload, now: Timestamp) -> impl Iterator<Item = (Direction, &'a Rule)> {
    let policy = set.policies.get(workload);
    let of = move |direction| policy.into_iter().flat_map(move |policy| policy.rules(direction)).map(move |rule| (direction, rule));
    of(Direction::Egress).chain(of(Direction::Ingress)).filter(move |(_, rule)| rule.in_force(now))
}

/// Where a peer is found on this node.
fn remotes(ground: Ground<'_>, peer: &Peer) -> Vec<Remote> {
    match peer {
        Peer::Workload(workload) => ground.of(workload).flat_map(spots).map(Remote::Spot).collect(),
        Peer::Host => ground.inventory.host.iter().map(|&address| Remote::Spot(Spot { bridge: None, address })).collect(),
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

/// The pairs that one rule of a container's workload gives the container: on its own side, and at the doors of the proxy. Who may reach
/// the node reaches nobody's door by that: a rule for who is behind it leads there.
fn rule_pairs(ground: Ground<'_>, container: &Container, locals: &[Spot], direction: Direction, rule: &Rule, mut emit: impl FnMut(Pair)) {
    let remotes = remotes(ground, &rule.peer);
    let mut add = |local: &Spot, remote: &Remote, ports| {
        if fits(local, remote) {
            emit(Pair { direction, local: local.clone(), remote: remote.clone(), ports });
        }
    };
    for remote in &remotes {
        match remote {
            Remote::Spot(Spot { bridge: None, address }) if direction == Direction::Egress => {
                for ports in beside_the_doors(ground.doorways, *address, rule.ports) {
                    locals.iter().for_each(|local| add(local, remote, ports));
                }
            }
            _ => locals.iter().for_each(|local| add(local, remote, rule.ports)),
        }
    }
    let inventory = ground.inventory;
    if !inventory.userland_proxy {
        return;
    }
    match (direction, &rule.peer) {
        // A server of ours reached by the proxy's port: the packet goes to the node, the rule names the workload behind.
        (Direction::Egress, Peer::Workload(peer)) => {
            for published in ground.of(peer).flat_map(|server| &server.published).filter(|p| behind(&rule.ports, p)) {
                for door in doors(inventory, published) {
                    let remote = Remote::Spot(Spot { bridge: None, address: door.address });
                    locals.iter().for_each(|local| add(local, &remote, door_ports(&door)));
                }
            }
        }
        (Direction::Egress, Peer::Host | Peer::Outside(_)) => {}
        // Who may come in by a door of the container: whoever its ingress allows on the port behind.
        (Direction::Ingress, _) => {
            for published in container.published.iter().filter(|p| behind(&rule.ports, p)) {
                for door in doors(inventory, published) {
                    let local = Spot { bridge: None, address: door.address };
                    remotes.iter().for_each(|remote| add(&local, remote, door_ports(&door)));
                }
            }
        }
    }
}

/// The proxy's own leg to a container: who may come was decided at the door.
fn carried_pairs(ground: Ground<'_>, container: &Container, locals: &[Spot], mut emit: impl FnMut(Pair)) {
    if !ground.inventory.userland_proxy {
        return;
    }
    for published in &container.published {
        let Ok(ports) = Ports::new(published.protocol, published.container_port, published.container_port) else { continue };
        for &address in &ground.inventory.host {
            let remote = Remote::Spot(Spot { bridge: None, address });
            for local in locals.iter().filter(|local| fits(local, &remote)) {
                emit(Pair { direction: Direction::Ingress, local: local.clone(), remote: remote.clone(), ports });
            }
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

/// The doors of one container.
fn hang_doors(inventory: &Inventory, container: &Container, standing: Standing, ruleset: &mut Ruleset) {
    for published in &container.published {
        let everywhere = published.address.is_unspecified() || published.address.is_loopback();
        if everywhere && standing != Standing::Audit {
            ruleset.ajar.insert(Door { address: published.address, protocol: published.protocol, port: published.port });
        }
        ruleset.doors.extend(doors(inventory, published).map(|door| (door, standing)));
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

    #[test]
    fn watched_bridges_with_the_same_addresses_are_named_and_so_is_who_is_beside_them() {
        let network = |name: &str, subnets: &[&str]| Network {
            id: name.into(),
            name: name.into(),
            project: None,
            driver: "bridge".into(),
            bridge: Some(format!("br-{name}")),
            subnets: subnets.iter().map(|subnet| subnet.parse().unwrap()).collect(),
            internal: false,
            unmanaged: BTreeSet::new(),
        };
        let networks = [
            network("one", &["10.1.0.0/16", "fd01::/64"]),
            network("two", &["10.1.2.0/24", "fd02::/64"]),
            network("other", &["10.2.0.0/16"]),
        ];
        let inventory = Inventory { networks: networks.map(|network| (network.id.clone(), network)).into(), ..Inventory::default() };
        let bound = |names: &[&str]| -> Vec<(String, Tuples)> {
            let segment = Segment {
                name: "all".into(),
                members: names.iter().map(|name| Selector::Network((*name).into())).collect(),
                mode: Mode::Enforce,
                refusal: Refusal::Reject,
                promotion: None,
            };
            let set = PolicySet { segments: [("all".to_owned(), segment)].into(), ..PolicySet::default() };
            let watched = bind(&set, &inventory, Timestamp::UNIX_EPOCH).watched;
            watched.into_iter().map(|(bridge, watch)| (bridge, watch.tuples)).collect()
        };
        let of = |bridge: &str, tuples| (bridge.to_owned(), tuples);
        assert_eq!(bound(&["one", "other"]), [of("br-one", Tuples::Own), of("br-other", Tuples::Own)], "nobody watches the second");
        let all = [of("br-one", Tuples::Shared), of("br-other", Tuples::Beside), of("br-two", Tuples::Shared)];
        assert_eq!(bound(&["one", "two", "other"]), all);
    }
}
