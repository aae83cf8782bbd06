//! evaluate == bind: over random inventories and policy sets, a small interpreter of the ruleset (what the kernel does with it)
//! says of every pair what the reference meaning says.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod kernel;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kernel::{Place, judge};
use policy::inventory::{Container, Leg, Network, Published};
use policy::policy_set::Direction;
use policy::{
    Connection, Endpoint, Index, Inventory, Mode, Peer, PolicySet, Protocol, Rule, Ruleset, Scene, Selector, Service, Verdict, Workload,
    WorkloadPolicy, bind, evaluate,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;
use sets::{BRIDGES, now, rules, sets, workloads};

/// Bridge 0 and 1 have the same subnet: the same address on another bridge is another spot.
fn subnet(bridge: usize) -> u8 {
    if bridge == 1 { 0 } else { bridge as u8 }
}

fn v4(bridge: usize, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(172, 18, subnet(bridge), host))
}

fn v6(bridge: usize, host: u8) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd18, 0, 0, subnet(bridge).into(), 0, 0, 0, host.into()))
}

fn host_addresses() -> BTreeSet<IpAddr> {
    let gateways = (0..BRIDGES).flat_map(|bridge| [v4(bridge, 1), v6(bridge, 1)]);
    gateways.chain(["192.0.2.10".parse().unwrap(), "2001:db8::10".parse().unwrap()]).collect()
}

fn outside_addresses() -> Vec<IpAddr> {
    ["198.51.100.7", "203.0.113.9", "10.1.2.3", "2001:db8:1::7"].iter().map(|a| a.parse().unwrap()).collect()
}

fn services() -> Vec<Service> {
    let mut all: Vec<Service> =
        ["tcp/80", "tcp/443", "udp/53", "icmp/8", "icmpv6/128", "sctp/80", "ip47"].iter().map(|s| s.parse().unwrap()).collect();
    all.extend((0..4).map(|n| Service::tcp(8000 + n)));
    all
}

fn network(bridge: usize) -> Network {
    Network {
        id: format!("id{bridge}"),
        name: format!("net{bridge}"),
        project: None,
        driver: "bridge".to_owned(),
        bridge: Some(format!("br{bridge}")),
        subnets: Vec::new(),
        internal: false,
        unmanaged: BTreeSet::new(),
    }
}

/// Workload, one-off, bridges it is attached to, published container port and the kind of address it is published at.
type Sketch = (usize, bool, BTreeSet<usize>, Option<(u16, usize)>);

fn container(number: usize, (workload, one_off, bridges, published): &Sketch) -> Container {
    let leg = |&bridge: &usize| Leg {
        network: format!("id{bridge}"),
        bridge: format!("br{bridge}"),
        port: Some(format!("veth{number}x{bridge}")),
        mac: [2, 0, 0, 0, number as u8, bridge as u8],
        addresses: [v4(bridge, 10 + number as u8), v6(bridge, 10 + number as u8)].into(),
    };
    let at = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED), "192.0.2.10".parse().unwrap()];
    let publish = |&(container_port, kind): &(u16, usize)| Published {
        address: at[kind],
        port: 8000 + number as u16,
        protocol: Protocol::Tcp,
        container_port,
    };
    Container {
        id: format!("c{number}"),
        name: format!("c{number}"),
        workload: workloads()[*workload].clone(),
        one_off: *one_off,
        engine_named: false,
        image: String::new(),
        labels: BTreeMap::new(),
        pid: None,
        legs: bridges.iter().map(leg).collect(),
        published: published.iter().map(publish).collect(),
        resolvers: Vec::new(),
        members: Vec::new(),
        raw: false,
        elsewhere: Default::default(),
        unmanaged: BTreeSet::new(),
    }
}

fn inventories() -> impl Strategy<Value = Inventory> {
    let published = proptest::option::weighted(0.8, (select(vec![80u16, 443]), 0..3usize));
    let sketch = (0..workloads().len(), prop::bool::weighted(0.2), btree_set(0..BRIDGES, 1..3), published);
    (vec(sketch, 2..5), prop::bool::weighted(0.7)).prop_map(|(sketches, userland_proxy)| Inventory {
        networks: (0..BRIDGES).map(|bridge| (format!("id{bridge}"), network(bridge))).collect(),
        containers: sketches.iter().enumerate().map(|(n, sketch)| (format!("c{n}"), container(n, sketch))).collect(),
        host: host_addresses(),
        userland_proxy,
        ..Inventory::default()
    })
}

/// Everything that can be an end of a connection here: its name, and where its packets come from.
fn ends(inventory: &Inventory) -> Vec<(Endpoint, Place)> {
    let mut ends = Vec::new();
    for container in inventory.containers.values() {
        for leg in &container.legs {
            ends.extend(leg.addresses.iter().map(|&address| (container.endpoint(), Place::Bridge(leg.bridge.clone(), address))));
        }
    }
    for bridge in 0..BRIDGES {
        // Nobody has this address.
        ends.extend([v4(bridge, 200), v6(bridge, 200)].map(|a| (Endpoint::Unknown(a), Place::Bridge(format!("br{bridge}"), a))));
    }
    ends.extend(inventory.host.iter().map(|&address| (Endpoint::Host, Place::Node(address))));
    ends.extend(outside_addresses().into_iter().map(|a| (Endpoint::Outside(a), Place::Beyond(a))));
    let unmanaged: IpAddr = "192.0.2.77".parse().unwrap();
    ends.push((Endpoint::Unmanaged { name: "vm".to_owned(), address: unmanaged }, Place::Beyond(unmanaged)));
    ends
}

/// Bridges that a workload in Enforce or quarantine is attached to, or whose network is an enforced segment's by its project or
/// name (property 7: no container ever sends one packet before it is under policy), by these words and not by `bind`.
fn guarded_bridges(scene: &Scene<'_>, inventory: &Inventory) -> BTreeSet<String> {
    let guards = |c: &&Container| matches!(scene.standing(&c.workload), policy::Standing::Enforce(_) | policy::Standing::Quarantined);
    let attached = inventory.containers.values().filter(guards).flat_map(|c| c.legs.iter().map(|leg| leg.bridge.clone()));
    let enforced = scene.set.segments.values().filter(|segment| segment.mode == Mode::Enforce);
    let members: BTreeSet<&Selector> = enforced.flat_map(|segment| &segment.members).collect();
    let belongs = |network: &&Network| {
        let by_project = network.project.clone().is_some_and(|project| members.contains(&Selector::Project(project)));
        by_project || members.contains(&Selector::Network(network.name.clone()))
    };
    attached.chain(inventory.networks.values().filter(belongs).filter_map(|network| network.bridge.clone())).collect()
}

/// Whether the reference meaning sees these ends on a guarded network: an address that belongs to nobody counts where it is.
fn guarded(bridges: &BTreeSet<String>, ends: [&(Endpoint, Place); 2]) -> bool {
    let on_guarded = |place: &Place| matches!(place, Place::Bridge(bridge, _) if bridges.contains(bridge));
    ends.into_iter().any(|(endpoint, place)| matches!(endpoint, Endpoint::Unknown(_)) && on_guarded(place))
}

struct Doorway<'i> {
    server: &'i Container,
    address: IpAddr,
    published: &'i Published,
}

fn doorways(inventory: &Inventory) -> Vec<Doorway<'_>> {
    let mut found = Vec::new();
    for server in inventory.containers.values().filter(|_| inventory.userland_proxy) {
        for published in &server.published {
            let at = |address: &&IpAddr| match published.address {
                any if any.is_unspecified() => any.is_ipv4() == address.is_ipv4(),
                exact => exact == **address,
            };
            found.extend(inventory.host.iter().filter(at).map(|&address| Doorway { server, address, published }));
        }
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_bound_ruleset_says_what_evaluate_says(inventory in inventories(), set in sets()) {
        let networks = policy::bind::networks(&inventory);
        let scene = Scene { set: &set, networks: &networks, now: now() };
        let ruleset = bind(&set, &inventory, now());
        let bridges = guarded_bridges(&scene, &inventory);
        let ends = ends(&inventory);
        let doors = doorways(&inventory);
        for client in &ends {
            for server in &ends {
                let same_family = client.1.address().is_ipv4() == server.1.address().is_ipv4();
                let crosses = matches!(client.1, Place::Bridge(..)) || matches!(server.1, Place::Bridge(..));
                if !same_family || !crosses || client.1 == server.1 {
                    continue;
                }
                for service in services() {
                    // A door is another road, judged below.
                    let is_door = |door: &Doorway<'_>| {
                        server.1 == Place::Node(door.address) && service == Service::tcp(door.published.port)
                    };
                    // The proxy's own leg is open: who may come was decided at the door.
                    let is_proxy_leg = inventory.userland_proxy && client.0 == Endpoint::Host && doors.iter().any(|door| {
                        door.server.endpoint() == server.0 && service == Service::tcp(door.published.container_port)
                    });
                    if doors.iter().any(is_door) || is_proxy_leg {
                        continue;
                    }
                    let connection = Connection { from: client.0.clone(), to: server.0.clone(), service, guarded: guarded(&bridges, [client, server]) };
                    let reference = evaluate(&scene, &connection);
                    let kernel = judge(&ruleset, &client.1, &server.1, service);
                    prop_assert_eq!(kernel, reference.verdict, "{} -> {} {}: {}", client.1, server.1, service, reference.reason());
                }
            }
        }
    }

    #[test]
    fn the_index_says_what_evaluate_says(inventory in inventories(), set in sets()) {
        let networks = policy::bind::networks(&inventory);
        let index = Index::of(&set, &networks);
        let scene = Scene { set: &set, networks: &networks, now: now() };
        let mut ends: BTreeSet<Endpoint> = ends(&inventory).into_iter().map(|(end, _)| end).collect();
        ends.extend(workloads().into_iter().flat_map(|workload| [Endpoint::Workload(workload.clone()), Endpoint::Run(workload)]));
        // Known by its project alone, and by nothing.
        ends.extend(["p/stranger", "q/stranger", "stranger"].map(|name| name.parse::<Endpoint>().unwrap()));
        for from in &ends {
            for to in &ends {
                for service in services() {
                    for guarded in [true, false] {
                        let connection = Connection { from: from.clone(), to: to.clone(), service, guarded };
                        prop_assert_eq!(index.evaluate(&connection, now()), evaluate(&scene, &connection), "{} -> {} {}", from, to, service);
                    }
                }
            }
        }
    }

    #[test]
    fn the_door_of_the_proxy_says_of_its_server_what_evaluate_says(inventory in inventories(), set in sets()) {
        let networks = policy::bind::networks(&inventory);
        let scene = Scene { set: &set, networks: &networks, now: now() };
        let ruleset = bind(&set, &inventory, now());
        let bridges = guarded_bridges(&scene, &inventory);
        for door in doorways(&inventory) {
            for client in ends(&inventory) {
                if matches!(client.1, Place::Node(_)) || client.1.address().is_ipv4() != door.address.is_ipv4() {
                    continue;
                }
                let port = Service::tcp(door.published.port);
                let to = (door.server.endpoint(), Place::Node(door.address));
                let service = Service::tcp(door.published.container_port);
                let guarded = guarded(&bridges, [&client, &to]);
                let reference = evaluate(&scene, &Connection { from: client.0.clone(), to: to.0.clone(), service, guarded });
                let kernel = judge(&ruleset, &client.1, &to.1, port);
                prop_assert_eq!(kernel, reference.verdict, "{} -> {} {}: {}", client.1, to.1, port, reference.reason());
            }
        }
    }

    #[test]
    fn binding_twice_is_binding_once_whatever_the_order(inventory in inventories(), set in sets()) {
        let once = bind(&set, &inventory, now());
        prop_assert_eq!(&once, &bind(&set, &inventory, now()));
        let copy: PolicySet = serde_json::from_str(&serde_json::to_string(&set).unwrap()).unwrap();
        prop_assert_eq!(&once, &bind(&copy, &inventory, now()));
    }

    #[test]
    fn an_added_allow_removes_none(inventory in inventories(), set in sets(), rule in rules(), own in select(workloads()), egress in any::<bool>()) {
        let networks = policy::bind::networks(&inventory);
        let mut wider = set.clone();
        let direction = if egress { Direction::Egress } else { Direction::Ingress };
        wider.policies.entry(own.clone()).or_insert_with(|| WorkloadPolicy::empty(own)).rules_mut(direction).insert(rule);
        let verdict = |set: &PolicySet, c: &Connection| evaluate(&Scene { set, networks: &networks, now: now() }, c).verdict;
        for (from, _) in ends(&inventory) {
            for (to, _) in ends(&inventory) {
                for service in services() {
                    let connection = Connection { from: from.clone(), to: to.clone(), service, guarded: true };
                    prop_assert!(verdict(&wider, &connection) <= verdict(&set, &connection));
                }
            }
        }
        let (before, after) = (bind(&set, &inventory, now()), bind(&wider, &inventory, now()));
        prop_assert!(before.pairs.is_subset(&after.pairs));
        prop_assert_eq!((before.sides, before.doors, before.watched), (after.sides, after.doors, after.watched));
    }

    #[test]
    fn a_public_peer_never_opens_the_port_to_a_workload(inventory in inventories(), set in sets()) {
        // Only rules for the outside: no workload may be reached, whatever its address.
        let mut set = set;
        for policy in set.policies.values_mut() {
            policy.ingress.retain(|rule| matches!(rule.peer, Peer::Outside(_)));
        }
        let ruleset = bind(&set, &inventory, now());
        let ends = ends(&inventory);
        let enforced = |end: &(Endpoint, Place)| {
            let Place::Bridge(bridge, address) = &end.1 else { return false };
            let spot = policy::ruleset::Spot { bridge: Some(bridge.clone()), address: *address };
            matches!(ruleset.sides.get(&spot), Some(policy::Standing::Enforce(_)))
        };
        for server in ends.iter().filter(|end| enforced(end)) {
            for client in ends.iter().filter(|end| matches!(end.1, Place::Bridge(..)) && end.1 != server.1) {
                if client.1.address().is_ipv4() == server.1.address().is_ipv4() {
                    for service in services() {
                        prop_assert_eq!(judge(&ruleset, &client.1, &server.1, service), Verdict::Deny);
                    }
                }
            }
        }
    }
}

/// What happens on a node between two bindings.
#[derive(Clone, Debug)]
enum Step {
    /// Somebody else's plan altogether.
    Set(PolicySet),
    /// Another listing altogether.
    Inventory(Inventory),
    Rule(Workload, Direction, Rule, bool),
    /// The container of this place comes, goes or is somebody else.
    Container(u8, Option<Sketch>),
    /// The clock goes on, or is put back.
    Seconds(i64),
    /// Nothing is remembered of what was guarded, as after a new plan.
    Forget,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let direction = select(vec![Direction::Egress, Direction::Ingress]);
    let sketch =
        (0..workloads().len(), any::<bool>(), btree_set(0..BRIDGES, 0..3), proptest::option::of((select(vec![80u16, 443]), 0..3usize)));
    let step = prop_oneof![
        1 => sets().prop_map(Step::Set),
        1 => inventories().prop_map(Step::Inventory),
        6 => (select(workloads()), direction, rules(), any::<bool>()).prop_map(|(w, d, rule, comes)| Step::Rule(w, d, rule, comes)),
        6 => (0..6u8, proptest::option::weighted(0.7, sketch)).prop_map(|(place, sketch)| Step::Container(place, sketch)),
        2 => select(vec![-70, -6, 1, 6, 61]).prop_map(Step::Seconds),
        1 => Just(Step::Forget),
    ];
    vec(step, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_current_is_what_binding_anew_makes(inventory in inventories(), set in sets(), steps in steps()) {
        let (mut inventory, mut set, mut time) = (std::sync::Arc::new(inventory), std::sync::Arc::new(set), now());
        let mut binding = policy::bind::Binding::default();
        let mut known = Ruleset::default();
        for step in std::iter::once(Step::Forget).chain(steps) {
            let mut guarded = binding.ruleset().guarded();
            match step {
                Step::Set(other) => set = other.into(),
                Step::Inventory(other) => inventory = other.into(),
                Step::Rule(own, direction, rule, comes) => {
                    let set = std::sync::Arc::make_mut(&mut set);
                    let policy = set.policies.entry(own.clone()).or_insert_with(|| WorkloadPolicy::empty(own));
                    let rules = policy.rules_mut(direction);
                    let gone = if comes { None } else { rules.first().cloned() };
                    rules.insert(rule);
                    gone.map(|gone| rules.remove(&gone));
                }
                Step::Container(place, Some(sketch)) => {
                    let container = container(place.into(), &sketch);
                    std::sync::Arc::make_mut(&mut inventory).containers.insert(container.id.clone(), container);
                }
                Step::Container(place, None) => drop(std::sync::Arc::make_mut(&mut inventory).containers.remove(&format!("c{place}"))),
                Step::Seconds(seconds) => time += jiff::SignedDuration::from_secs(seconds),
                Step::Forget => guarded.clear(),
            }
            let anew = policy::bind::bind_after(&set, &inventory, &guarded, time);
            let change = binding.bind(&set, &inventory, &guarded, time);
            prop_assert_eq!(binding.ruleset(), &anew);
            prop_assert_eq!(&change, &policy::ruleset::Change::between(&known, &anew));
            let mut changed = known.clone();
            changed.change(&change);
            prop_assert_eq!(&changed, &anew);
            let stored: policy::ruleset::Change = serde_json::from_str(&serde_json::to_string(&change).unwrap()).unwrap();
            prop_assert_eq!(stored, change);
            known = anew;
        }
    }
}

#[test]
fn a_bridge_stays_guarded_while_nobody_is_on_it_and_only_while_it_is_there() {
    let inventory = Inventory { networks: [network(0)].map(|network| (network.id.clone(), network)).into(), ..Inventory::default() };
    let name = inventory.networks.values().find_map(|network| network.bridge.clone()).unwrap();
    let before = [name.clone(), "gone".to_owned()].into();
    let ruleset = policy::bind::bind_after(&PolicySet::default(), &inventory, &before, now());
    assert_eq!(ruleset.guarded(), [name].into());
    assert!(bind(&PolicySet::default(), &inventory, now()).guarded().is_empty());
}
