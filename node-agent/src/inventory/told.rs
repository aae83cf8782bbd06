//! What the engine is asked when events have come, and what it answers.

use std::collections::{BTreeMap, BTreeSet};

use bollard::errors::Error as EngineError;
use jiff::Timestamp;

use super::engine::Engine;
use super::events::Change;
use super::facts::{ContainerFact, NetworkFact};

/// What events said, in their order, each with its time.
pub(super) type Changes = Vec<(Timestamp, Change)>;

/// What the engine answered for a batch of them.
pub(super) struct Told {
    pub(super) networks: BTreeMap<String, NetworkFact>,
    pub(super) containers: BTreeMap<String, ContainerFact>,
    /// When it was asked.
    pub(super) asked: Timestamp,
}

/// Asks once for all that the changes need: networks somebody joined, containers that are not among the `known`. Both at the same time.
pub(super) fn about(
    engine: &Engine,
    known: &BTreeMap<String, ContainerFact>,
    changes: Changes,
) -> impl Future<Output = (Changes, Result<Told, EngineError>)> + use<> {
    let (mut networks, mut containers) = (BTreeSet::new(), BTreeSet::new());
    let unknown = |id: &String| !known.contains_key(id);
    for (_, change) in &changes {
        match change {
            Change::Connect { network, container } => {
                networks.insert(network.clone());
                containers.extend(Some(container).filter(|id| unknown(id)).cloned());
            }
            Change::NetworkMade(network) => drop(networks.insert(network.clone())),
            Change::Read(container) => drop(containers.insert(container.clone())),
            Change::Start(container) => containers.extend(Some(container).filter(|id| unknown(id)).cloned()),
            Change::Disconnect { .. } | Change::Die(_) | Change::Gone(_) | Change::NetworkGone(_) | Change::Reload => {}
        }
    }
    let (engine, asked) = (engine.clone(), Timestamp::now());
    async move {
        let networks = futures::future::try_join_all(networks.iter().map(|id| engine.network(id)));
        let containers = async {
            let ids: Vec<String> = containers.into_iter().collect();
            // No ids would mean all of them.
            if ids.is_empty() { Ok(BTreeMap::new()) } else { engine.containers(&ids).await }
        };
        let told = tokio::try_join!(networks, containers);
        let told = told.map(|(networks, containers)| Told { networks: networks.into_iter().flatten().collect(), containers, asked });
        (changes, told)
    }
}
