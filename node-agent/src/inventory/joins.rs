//! Who came to be whole on which bridge, and since when the agent knows: what is bound from there on is the agent's own time.

use std::time::{Duration, Instant};

use policy::Inventory;
use policy::inventory::{Container, Leg};

/// A snapshot may be overtaken by the next one before anybody took it: what joined in it is told again for so long.
const TOLD_FOR: Duration = Duration::from_secs(10);

/// A container's place on a bridge of which all was known for the first time: its addresses by the engine, its port by the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// Counts up, so that whoever binds knows which it has bound.
    pub number: u64,
    /// The engine's id of the container.
    pub container: String,
    /// Interface name of the bridge.
    pub bridge: String,
    /// When the last part of it was told to the agent.
    pub known: Instant,
}

/// The latest of them.
#[derive(Debug, Default)]
pub(super) struct Joins {
    recent: Vec<Join>,
    next: u64,
}

impl Joins {
    /// Compares two inventories; what is new became known at `known`.
    pub(super) fn note(&mut self, before: &Inventory, after: &Inventory, known: Instant) {
        self.recent.retain(|join| known.saturating_duration_since(join.known) < TOLD_FOR);
        for container in after.containers.values() {
            let old = before.containers.get(&container.id);
            for leg in container.legs.iter().filter(|leg| leg.port.is_some() && !old.is_some_and(|old| has(old, leg))) {
                let (container, bridge) = (container.id.clone(), leg.bridge.clone());
                self.recent.push(Join { number: self.next, container, bridge, known });
                self.next += 1;
            }
        }
    }

    pub(super) fn recent(&self) -> Vec<Join> {
        self.recent.clone()
    }
}

fn has(container: &Container, leg: &Leg) -> bool {
    container.legs.iter().any(|its| (&its.network, &its.port) == (&leg.network, &leg.port))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use policy::Workload;

    use super::*;

    fn inventory(id: &str, port: Option<&str>) -> Inventory {
        let leg = Leg {
            network: "n".to_owned(),
            bridge: "br-n".to_owned(),
            port: port.map(str::to_owned),
            mac: [2, 0, 0, 0, 0, 1],
            addresses: BTreeSet::new(),
        };
        let container = Container {
            id: id.to_owned(),
            name: id.to_owned(),
            workload: Workload::new("shop", id),
            one_off: false,
            engine_named: false,
            image: String::new(),
            labels: BTreeMap::new(),
            pid: None,
            legs: vec![leg],
            elsewhere: Vec::new(),
            published: Vec::new(),
            resolvers: Vec::new(),
            members: Vec::new(),
            unmanaged: BTreeSet::new(),
            raw: false,
        };
        Inventory { containers: [(id.to_owned(), container)].into(), ..Inventory::default() }
    }

    #[test]
    fn who_joins_is_told_once_it_has_a_port_and_again_to_whoever_comes_a_little_late() {
        let (mut joins, now) = (Joins::default(), Instant::now());
        let told = |joins: &Joins| joins.recent().iter().map(|join| (join.number, join.container.clone())).collect::<Vec<_>>();
        joins.note(&Inventory::default(), &inventory("a", None), now);
        assert!(told(&joins).is_empty(), "nobody sends by a port that is not there");
        joins.note(&inventory("a", None), &inventory("a", Some("veth1")), now);
        joins.note(&inventory("a", Some("veth1")), &inventory("a", Some("veth1")), now);
        assert_eq!(told(&joins), [(0, "a".to_owned())]);
        joins.note(&inventory("a", Some("veth1")), &inventory("b", Some("veth2")), now + Duration::from_secs(1));
        assert_eq!(told(&joins), [(0, "a".to_owned()), (1, "b".to_owned())], "the first may not have been taken yet");
        joins.note(&Inventory::default(), &Inventory::default(), now + TOLD_FOR);
        assert_eq!(told(&joins), [(1, "b".to_owned())]);
    }
}
