//! The workload communication graph: endpoints, and edges with their evidence. Agents keep their node's, the controller
//! merges them. Only reports change it; what it means is learned elsewhere.

use std::collections::BTreeMap;
use std::fmt;

use petgraph::Direction;
use petgraph::stable_graph::{EdgeIndex, NodeIndex, StableDiGraph};
use petgraph::visit::{EdgeRef, IntoEdgeReferences};
use serde::{Deserialize, Serialize};

use crate::evidence::Evidence;
use crate::flow::{Flow, FlowOutcome};
use crate::service::Service;
use crate::workload::Endpoint;

/// What makes two flows the same edge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EdgeKey {
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and port.
    pub service: Service,
    /// False: the two spoke, who called whom is not known. Shown, never proposed.
    pub direction_known: bool,
}

impl fmt::Display for EdgeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = if self.direction_known { "->" } else { "--" };
        write!(f, "{} {arrow} {} {}", self.from, self.to, self.service)
    }
}

/// What one report adds to one edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeDelta {
    /// Which edge.
    pub key: EdgeKey,
    /// What to add to its evidence.
    pub seen: Evidence,
}

impl From<&Flow> for EdgeDelta {
    fn from(flow: &Flow) -> Self {
        let key = EdgeKey { from: flow.from.clone(), to: flow.to.clone(), service: flow.service, direction_known: flow.direction_known };
        let mut seen = Evidence {
            pre_existing: u64::from(flow.pre_existing),
            bytes_sent: flow.bytes_sent,
            bytes_received: flow.bytes_received,
            first: Some(flow.time),
            last: Some(flow.time),
            roads: [flow.road].into(),
            ..Evidence::default()
        };
        match flow.outcome {
            FlowOutcome::Established => seen.established = 1,
            FlowOutcome::ConnectedNoData => seen.connected_no_data = 1,
            FlowOutcome::OneWay => seen.one_way = 1,
            FlowOutcome::Unanswered => seen.unanswered = 1,
            FlowOutcome::Refused => seen.refused = 1,
            FlowOutcome::Denied => seen.denied = 1,
            FlowOutcome::WouldDeny => seen.would_deny = 1,
        }
        if flow.outcome.is_use() {
            seen.hours.insert(crate::HourSet::hour_of(flow.time));
        }
        Self { key, seen }
    }
}

#[derive(Clone, Debug)]
struct Edge {
    service: Service,
    direction_known: bool,
    evidence: Evidence,
}

/// Endpoints and edges of one node or of all.
#[derive(Clone, Debug, Default)]
pub struct FlowGraph {
    graph: StableDiGraph<Endpoint, Edge>,
    nodes: BTreeMap<Endpoint, NodeIndex>,
    edges: BTreeMap<EdgeKey, EdgeIndex>,
}

impl FlowGraph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    fn node(&mut self, endpoint: &Endpoint) -> NodeIndex {
        match self.nodes.get(endpoint) {
            Some(&index) => index,
            None => {
                let index = self.graph.add_node(endpoint.clone());
                self.nodes.insert(endpoint.clone(), index);
                index
            }
        }
    }

    /// Adds one report to its edge; true if the edge is new.
    pub fn add(&mut self, delta: &EdgeDelta) -> bool {
        if let Some(&index) = self.edges.get(&delta.key) {
            self.graph[index].evidence.merge(&delta.seen);
            return false;
        }
        let (from, to) = (self.node(&delta.key.from), self.node(&delta.key.to));
        let edge = Edge { service: delta.key.service, direction_known: delta.key.direction_known, evidence: delta.seen.clone() };
        let index = self.graph.add_edge(from, to, edge);
        self.edges.insert(delta.key.clone(), index);
        true
    }

    /// Adds everything another graph saw.
    pub fn merge(&mut self, other: &Self) {
        for (key, evidence) in other.iter() {
            self.add(&EdgeDelta { key: key.clone(), seen: evidence.clone() });
        }
    }

    /// Forgets one edge, and its ends if nothing else touches them.
    pub fn remove(&mut self, key: &EdgeKey) -> Option<Evidence> {
        let edge = self.graph.remove_edge(self.edges.remove(key)?)?;
        for endpoint in [&key.from, &key.to] {
            if let Some(&index) = self.nodes.get(endpoint)
                && self.graph.neighbors_undirected(index).next().is_none()
            {
                self.graph.remove_node(index);
                self.nodes.remove(endpoint);
            }
        }
        Some(edge.evidence)
    }

    /// Every edge with its evidence, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&EdgeKey, &Evidence)> {
        self.edges.iter().map(|(key, &index)| (key, &self.graph[index].evidence))
    }

    /// The evidence of one edge.
    pub fn get(&self, key: &EdgeKey) -> Option<&Evidence> {
        self.edges.get(key).map(|&index| &self.graph[index].evidence)
    }

    /// The endpoints, in order.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.nodes.keys()
    }

    /// Edges that start at or arrive at an endpoint, in the order of the keys.
    pub fn touching(&self, endpoint: &Endpoint) -> Vec<(EdgeKey, &Evidence)> {
        let Some(&index) = self.nodes.get(endpoint) else { return Vec::new() };
        let mut found: Vec<_> = [Direction::Outgoing, Direction::Incoming]
            .into_iter()
            .flat_map(|direction| self.graph.edges_directed(index, direction))
            // An edge to oneself comes up in both directions.
            .map(|edge| {
                let key = EdgeKey {
                    from: self.graph[edge.source()].clone(),
                    to: self.graph[edge.target()].clone(),
                    service: edge.weight().service,
                    direction_known: edge.weight().direction_known,
                };
                (key, &edge.weight().evidence)
            })
            .collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found.dedup_by(|a, b| a.0 == b.0);
        found
    }

    /// How many edges.
    pub fn len(&self) -> usize {
        debug_assert_eq!(self.graph.edge_references().count(), self.edges.len());
        self.edges.len()
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.edges.is_empty()
    }
}
