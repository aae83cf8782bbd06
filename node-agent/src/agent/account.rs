//! The node's own account of itself: which network is in which state, from what runs, what was planned and what the kernel said.
//! No I/O: everything comes in.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use jiff::Timestamp;
use policy::evidence::Road;
use policy::inventory::{Container, Inventory, Network};
use policy::ruleset::Ruleset;
use policy::status::{Alarm, NetworkState, NetworkStatus};
use policy::{EdgeKey, Endpoint, Evidence, FlowGraph, Service, Workload};

use crate::uplink::Recovery;

/// Alarms kept for a person; older ones are in the log.
const ALARMS_KEPT: usize = 50;

/// The most recent alarms. The same text again within a minute is one alarm.
#[derive(Debug, Default)]
pub struct Alarms(VecDeque<Alarm>);

impl Alarms {
    /// Adds one; false if it was said within the last minute.
    pub fn raise(&mut self, time: Timestamp, text: String) -> bool {
        let again = self.0.iter().rev().any(|a| a.text == text && time.as_second() - a.time.as_second() < 60);
        if !again {
            self.0.push_back(Alarm { time, text });
            if self.0.len() > ALARMS_KEPT {
                self.0.pop_front();
            }
        }
        !again
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Alarm> {
        self.0.iter().cloned().collect()
    }
}

/// What a spool that was not whole means; `None`: it was.
pub fn spool(recovery: &Recovery) -> Option<String> {
    let Recovery { edges: _, batches: _, unreadable, kept, skipped } = recovery;
    if *unreadable == 0 && skipped.is_empty() {
        return None;
    }
    let records: u64 = skipped.values().sum();
    let kept = kept.as_ref().map_or(String::new(), |path| format!(", kept in {}", path.display()));
    Some(format!(
        "what was seen and not yet sent could not be read whole from disk ({unreadable} bytes unreadable{kept}; {records} records \
         make no sense): the graph may lack it. A write that a crash cut off does this; damage to the disk does too"
    ))
}

fn state(network: &Network, ruleset: &Ruleset, failing: Option<&str>) -> NetworkState {
    if !network.unmanaged.is_empty() {
        let reasons: Vec<_> = network.unmanaged.iter().map(ToString::to_string).collect();
        return NetworkState::NotEnforceable(reasons.join("; "));
    }
    let watch = network.bridge.as_ref().and_then(|bridge| ruleset.watched.get(bridge));
    match (watch, failing) {
        (None, _) => NetworkState::Observed,
        (Some(_), Some(why)) => NetworkState::NotEnforced(why.to_owned()),
        (Some(watch), None) if watch.guarded => NetworkState::Enforced,
        (Some(_), None) => NetworkState::Audited,
    }
}

/// Every network with its state, by name. `wanted` is what the plan asks for here; `failing` says why the kernel does not hold it.
pub fn networks(inventory: &Inventory, wanted: &Ruleset, failing: Option<&str>) -> Vec<NetworkStatus> {
    let mut listed: BTreeMap<(&str, &str), NetworkStatus> = BTreeMap::new();
    for network in inventory.networks.values() {
        let status = NetworkStatus { name: network.name.clone(), bridge: network.bridge.clone(), state: state(network, wanted, failing) };
        listed.insert((&network.name, &network.id), status);
    }
    listed.into_values().collect()
}

/// Guarded networks that can't be closed by their subnet, should they be made anew while the agent is dead.
pub fn contested(inventory: &Inventory, wanted: &Ruleset) -> Vec<String> {
    let guarded = wanted.guarded();
    let ours = inventory.networks.values().filter(|network| network.bridge.as_ref().is_some_and(|bridge| guarded.contains(bridge)));
    let other = |network: &Network| Some((network.name.clone(), policy::bind::contested(network, inventory)?.clone()));
    let why = |(network, bridge)| {
        format!(
            "{network} shares its subnet with the bridge {bridge}: made anew while the agent is dead, it is open until the agent is back"
        )
    };
    ours.filter_map(other).map(why).collect()
}

/// Who may send frames of any content from a network that is enforced.
pub fn raw(inventory: &Inventory, wanted: &Ruleset) -> BTreeSet<Workload> {
    let guarded = wanted.guarded();
    let is_held = |container: &&Container| container.raw && container.legs.iter().any(|leg| guarded.contains(&leg.bridge));
    inventory.containers.values().filter(is_held).map(|container| container.workload.clone()).collect()
}

/// Who passes packets on between its networks.
pub fn forwarders(inventory: &Inventory, ids: &BTreeSet<String>) -> Vec<String> {
    let containers = ids.iter().filter_map(|id| inventory.containers.get(id));
    let said = |container: &policy::inventory::Container| {
        let mut networks: Vec<_> = inventory.networks_of(container).collect();
        networks.sort_unstable();
        format!("{} ({}) passes packets on between its networks {}", container.workload, container.name, networks.join(", "))
    };
    containers.map(said).collect()
}

/// Who reaches a filtered workload from the node itself past its published port, by the way that has to stay open for the user-land
/// proxy: one sentence an edge.
pub fn riders(graph: &FlowGraph, inventory: &Inventory, wanted: &Ruleset) -> Vec<String> {
    if !inventory.userland_proxy || wanted.doors.is_empty() {
        return Vec::new();
    }
    let doors: BTreeSet<(&Workload, Service)> = inventory
        .containers
        .values()
        .flat_map(|c| c.published.iter().map(|p| (&c.workload, Service { protocol: p.protocol, port: p.container_port })))
        .collect();
    let host = Endpoint::Host;
    let rides = |(key, seen): &(EdgeKey, &Evidence)| {
        key.from == host
            && seen.used() > 0
            && seen.roads.contains(Road::Direct)
            && key.to.workload().is_some_and(|w| doors.contains(&(w, key.service)))
    };
    let rides = graph.touching(&host).into_iter().filter(rides);
    rides.map(|(key, _)| format!("processes of this host reached {} {} past its published port", key.to, key.service)).collect()
}

/// What is told of whom the graph has no room for any more: once, `told` keeps of whom.
pub fn crowded(graph: &FlowGraph, told: &mut BTreeSet<Option<Endpoint>>) -> Vec<String> {
    let fresh: Vec<_> = graph.left_out().map(|left| left.end).filter(|end| !told.contains(end)).collect();
    told.extend(fresh.iter().cloned());
    fresh.iter().map(|end| policy::graph::no_room(end.as_ref())).collect()
}

#[cfg(test)]
mod tests {

    use policy::inventory::{Container, Published, Unmanaged};
    use policy::ruleset::{Door, Watch};
    use policy::service::Protocol;
    use policy::{EdgeDelta, Standing};

    use super::*;

    fn network(name: &str, bridge: Option<&str>, unmanaged: BTreeSet<Unmanaged>) -> (String, Network) {
        let network = Network {
            id: name.to_owned(),
            name: name.to_owned(),
            project: None,
            driver: "bridge".to_owned(),
            bridge: bridge.map(str::to_owned),
            subnets: Vec::new(),
            internal: false,
            unmanaged,
        };
        (name.to_owned(), network)
    }

    #[test]
    fn a_network_is_called_enforced_only_if_the_kernel_holds_what_was_planned() {
        let inventory = Inventory {
            networks: [
                network("front", Some("br-f"), BTreeSet::new()),
                network("back", Some("br-b"), BTreeSet::new()),
                network("lan", None, [Unmanaged::Driver("macvlan".to_owned())].into()),
            ]
            .into(),
            ..Inventory::default()
        };
        let wanted = Ruleset { watched: [("br-f".to_owned(), Watch { guarded: true, ..Watch::default() })].into(), ..Ruleset::default() };
        let states = |failing| networks(&inventory, &wanted, failing).into_iter().map(|n| (n.name, n.state)).collect::<BTreeMap<_, _>>();
        let held = states(None);
        assert_eq!(held["front"], NetworkState::Enforced);
        assert_eq!(held["back"], NetworkState::Observed);
        assert!(matches!(held["lan"], NetworkState::NotEnforceable(_)));
        assert_eq!(states(Some("EPERM"))["front"], NetworkState::NotEnforced("EPERM".to_owned()));
    }

    #[test]
    fn a_spool_that_was_not_whole_is_told_and_a_whole_one_is_not() {
        assert_eq!(spool(&Recovery { edges: 3, batches: 1, ..Recovery::default() }), None);
        let cut =
            Recovery { unreadable: 40, kept: Some("/s/spool.bad".into()), skipped: [("x".to_owned(), 2)].into(), ..Recovery::default() };
        let said = spool(&cut).unwrap();
        assert!(said.contains("40 bytes unreadable, kept in /s/spool.bad; 2 records"), "{said}");
    }

    #[test]
    fn an_alarm_repeated_within_a_minute_is_one_alarm() {
        let mut alarms = Alarms::default();
        let at = |second| Timestamp::from_second(second).unwrap();
        assert!(alarms.raise(at(0), "a".into()));
        assert!(!alarms.raise(at(30), "a".into()));
        assert!(alarms.raise(at(61), "a".into()));
        assert_eq!(alarms.list().len(), 2);
    }

    #[test]
    fn a_process_of_the_host_that_goes_around_the_published_port_is_named() {
        let shop = Workload::new("shop", "web");
        let published = Published { address: "0.0.0.0".parse().unwrap(), port: 8080, protocol: Protocol::Tcp, container_port: 80 };
        let container = Container {
            id: "1".to_owned(),
            name: "shop_web_1".to_owned(),
            workload: shop.clone(),
            one_off: false,
            engine_named: false,
            image: String::new(),
            labels: BTreeMap::new(),
            pid: None,
            legs: Vec::new(),
            elsewhere: Vec::new(),
            published: vec![published],
            resolvers: Vec::new(),
            members: Vec::new(),
            unmanaged: BTreeSet::new(),
            raw: false,
        };
        let inventory = Inventory { containers: [("1".to_owned(), container)].into(), userland_proxy: true, ..Inventory::default() };
        let door = Door { address: "192.0.2.1".parse().unwrap(), protocol: Protocol::Tcp, port: 8080 };
        let wanted = Ruleset { doors: [(door, Standing::Audit)].into(), ..Ruleset::default() };
        let mut graph = FlowGraph::new();
        let mut flow = |road, port| {
            let key =
                EdgeKey { from: Endpoint::Host, to: Endpoint::Workload(shop.clone()), service: Service::tcp(port), direction_known: true };
            graph.add(&EdgeDelta { key, seen: Evidence { established: 2, roads: [road].into(), ..Evidence::default() } });
        };
        flow(Road::Direct, 80);
        flow(Road::Proxy, 80);
        flow(Road::Direct, 22);
        assert_eq!(riders(&graph, &inventory, &wanted), ["processes of this host reached shop/web tcp/80 past its published port"]);
        assert!(riders(&graph, &inventory, &Ruleset::default()).is_empty(), "nothing is claimed of what is not filtered");
    }
}
