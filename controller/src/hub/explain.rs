//! `explain`: verdict, rule, evidence, and what the engine itself forbids whatever Bulkhead says.

use std::collections::BTreeSet;

use policy::graph::EdgeKey;
use policy::inventory::Container;
use policy::{Endpoint, Service, Workload};

use super::HubError;
use super::node::Node;
use super::state::State;
use super::view::runs;
use crate::api::ask::Question;
use crate::api::view::Explanation;

fn containers<'a>(node: &'a Node, workload: &'a Workload) -> impl Iterator<Item = &'a Container> {
    node.inventory.containers.values().filter(move |container| container.workload == *workload)
}

fn networks<'a>(node: &'a Node, workload: &'a Workload) -> BTreeSet<&'a str> {
    containers(node, workload).flat_map(|container| container.legs.iter().map(|leg| leg.network.as_str())).collect()
}

fn published(state: &State, workload: &Workload, service: Service) -> Vec<String> {
    let mut ports = Vec::new();
    for node in state.nodes.values() {
        for port in containers(node, workload).flat_map(|container| &container.published) {
            if port.protocol == service.protocol && port.container_port == service.port {
                ports.push(format!("{}/{} at {}", port.protocol, port.port, port.address));
            }
        }
    }
    ports
}

/// What the engine's own rules say. By its documented behaviour (docs.docker.com/engine/network/packet-filtering-firewalls): networks
/// are isolated from each other, an internal network has no way out, and from outside only published ports are reachable.
fn engine(state: &State, from: &Endpoint, to: &Endpoint, service: Service) -> Vec<String> {
    let mut facts = Vec::new();
    match (from.workload(), to.workload()) {
        (Some(a), Some(b)) if runs(state, from) && runs(state, to) && a != b => {
            let share = state.nodes.values().any(|node| !networks(node, a).is_disjoint(&networks(node, b)));
            if !share {
                let doors = published(state, b, service);
                let road = if doors.is_empty() {
                    "and the port is not published, so there is no road".to_owned()
                } else {
                    format!("the road is the published port {}", doors.join(", "))
                };
                facts.push(format!("{a} and {b} share no network: the engine isolates its networks, {road}"));
            }
        }
        (Some(a), None) if runs(state, from) && !matches!(to, Endpoint::Host) => {
            let internal = state.nodes.values().flat_map(|node| {
                networks(node, a).into_iter().filter_map(|id| node.inventory.networks.get(id)).map(|network| network.internal)
            });
            let internal: Vec<bool> = internal.collect();
            if !internal.is_empty() && internal.iter().all(|internal| *internal) {
                facts.push(format!("{a} is only on internal networks: the engine lets nothing out"));
            }
        }
        (None, Some(b)) if runs(state, to) && !matches!(from, Endpoint::Host) => {
            let doors = published(state, b, service);
            if doors.is_empty() {
                facts.push(format!("{service} of {b} is not published: the engine lets nobody in from outside"));
            } else {
                facts.push(format!("reached from outside by the published port {}", doors.join(", ")));
            }
        }
        (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) | (None, None) => {}
    }
    facts
}

fn notes(state: &State, from: &Endpoint, to: &Endpoint) -> Vec<String> {
    let mut notes = Vec::new();
    for workload in [from, to].into_iter().filter_map(Endpoint::workload).collect::<BTreeSet<_>>() {
        if !state.networks.contains_key(workload) {
            notes.push(format!("no node reports that {workload} runs now"));
        }
        for (name, node) in &state.nodes {
            for container in containers(node, workload).filter(|c| !c.unmanaged.is_empty()) {
                let why = container.unmanaged.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                notes.push(format!("no protection is claimed for {} on {name}: it {why}", container.name));
            }
            for id in networks(node, workload) {
                let Some(network) = node.inventory.networks.get(id).filter(|n| !n.unmanaged.is_empty()) else { continue };
                let why = network.unmanaged.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                notes.push(format!("traffic on network {} of {name} cannot be held to a policy: {why}", network.name));
            }
        }
    }
    if from == to {
        notes.push("replicas that talk to each other and a workload that reaches its own published port are edges too; what stays inside one container is not filtered".to_owned());
    }
    notes
}

/// The whole answer.
pub(crate) fn explain(state: &State, question: &Question) -> Result<Explanation, HubError> {
    let Question { from, to, service } = question;
    for workload in [from, to].into_iter().filter_map(Endpoint::workload) {
        state.must_know(workload)?;
    }
    let decision = state.judge(from, to, *service);
    let key = |direction_known| EdgeKey { from: from.clone(), to: to.clone(), service: *service, direction_known };
    let mut evidence = state.graph.get(&key(true)).cloned();
    if let Some(unknown) = state.graph.get(&key(false)) {
        evidence.get_or_insert_default().merge(unknown);
    }
    Ok(Explanation {
        from: from.clone(),
        to: to.clone(),
        service: *service,
        verdict: decision.verdict,
        reason: decision.reason(),
        egress: decision.egress,
        ingress: decision.ingress,
        evidence,
        engine: engine(state, from, to, *service),
        notes: notes(state, from, to),
    })
}
