//! The workload communication graph: endpoints, and edges with their evidence. Agents keep their node's, the controller
//! merges them. Only reports change it; what it means is learned elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::OnceLock;

use jiff::Timestamp;
use petgraph::Direction;
use petgraph::graph::{DiGraph, EdgeIndex, EdgeReference, NodeIndex};
use petgraph::visit::EdgeRef;
use serde::{Deserialize, Serialize};

use crate::evidence::Evidence;
use crate::flow::{Flow, FlowOutcome};
use crate::service::Service;
use crate::workload::Endpoint;

mod room;

pub use room::{ATTEMPTS, CLIENTS, CLIENTS_IN_ALL, LeftOut, REACHED, SILENT, USES, no_room};
use room::{Crowd, Crowds};

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

/// What a source touched without ever carrying data there: kept with it, since whether an edge is part of a scan depends on all edges of
/// its source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Touch {
    /// Tried: connected, sent one way, refused, unanswered.
    pub(crate) tried: usize,
    /// Denied under Enforce and nothing else, between workloads: what a new version needs looks like this too.
    pub(crate) denied: usize,
}

impl Touch {
    /// What one edge adds.
    fn of(from: &Endpoint, to: &Endpoint, direction_known: bool, seen: &Evidence) -> Self {
        let between_workloads = [from, to].iter().all(|end| matches!(end, Endpoint::Workload(_)));
        let tried = seen.used() > 0 || seen.attempts() > 0;
        let counts = direction_known && seen.established == 0;
        Self { tried: usize::from(counts && tried), denied: usize::from(counts && !tried && seen.denied > 0 && between_workloads) }
    }
}

#[derive(Clone, Debug)]
struct Node {
    endpoint: Endpoint,
    /// When the first flow from it or to it began.
    first: Option<Timestamp>,
    touch: Touch,
    /// Where its edges are, by server, service and whether the direction is known. By client, and in order: what a store gives is in
    /// the order of clients, so that each edge goes where the one before went.
    edges: BTreeMap<(NodeIndex, Service, bool), EdgeIndex>,
    /// Those of them that never carried data: few of most, and asked for with every report on one of its edges.
    touched: BTreeSet<EdgeIndex>,
    /// How many edges arrive.
    arriving: usize,
    /// How many there are of those that are bounded.
    crowds: Crowds,
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
    graph: DiGraph<Node, Edge>,
    nodes: BTreeMap<Endpoint, NodeIndex>,
    /// Edges that are counted with neither end.
    nobodys: Crowds,
    /// See [`FlowGraph::left_out`].
    left_out: BTreeMap<Option<Endpoint>, (u64, u64)>,
    /// Each endpoint's place in the order of all: numbers are compared where names would be. Made when asked for, since endpoints
    /// are few and come seldom.
    places: OnceLock<Vec<u32>>,
}

/// Where an endpoint is in one graph. In another graph it means another endpoint, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(NodeIndex);

/// Which edge of one graph. Edges are never taken out, so it means the same for as long as the graph is there.
pub(crate) type EdgeId = EdgeIndex;

/// One edge as it lies in the graph, without a copy of its names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'g> {
    pub(crate) id: EdgeId,
    pub(crate) from: &'g Endpoint,
    pub(crate) to: &'g Endpoint,
    pub(crate) service: Service,
    pub(crate) direction_known: bool,
    pub(crate) evidence: &'g Evidence,
    /// What its source touched.
    pub(crate) touch: Touch,
}

impl Seen<'_> {
    pub(crate) fn key(&self) -> EdgeKey {
        EdgeKey { from: self.from.clone(), to: self.to.clone(), service: self.service, direction_known: self.direction_known }
    }
}

impl FlowGraph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where an endpoint is in this graph; it is in it from now on.
    pub fn place(&mut self, endpoint: &Endpoint) -> Place {
        if let Some(&index) = self.nodes.get(endpoint) {
            return Place(index);
        }
        let node = Node {
            endpoint: endpoint.clone(),
            first: None,
            touch: Touch::default(),
            edges: BTreeMap::new(),
            touched: BTreeSet::new(),
            arriving: 0,
            crowds: Crowds::default(),
        };
        let index = self.graph.add_node(node);
        self.nodes.insert(endpoint.clone(), index);
        self.places = OnceLock::new();
        Place(index)
    }

    /// Makes room for so many edges more.
    pub fn reserve(&mut self, edges: usize) {
        self.graph.reserve_edges(edges);
    }

    /// Adds one report to its edge; true if the edge is new.
    pub fn add(&mut self, delta: &EdgeDelta) -> bool {
        let EdgeDelta { key: EdgeKey { from, to, service, direction_known }, seen } = delta;
        let ends = (self.place(from), self.place(to));
        self.add_between(ends, *service, *direction_known, seen.clone())
    }

    /// As [`FlowGraph::add`], where the places of both ends (client, server) in this graph are known: for many edges of few ends.
    pub fn add_between(
        &mut self,
        (Place(from), Place(to)): (Place, Place),
        service: Service,
        direction_known: bool,
        seen: Evidence,
    ) -> bool {
        for end in [from, to] {
            let node = &mut self.graph[end];
            node.first = node.first.into_iter().chain(seen.first).min();
        }
        let counts = |graph: &DiGraph<Node, Edge>, evidence: &Evidence| {
            Touch::of(&graph[from].endpoint, &graph[to].endpoint, direction_known, evidence)
        };
        let crowd =
            |graph: &DiGraph<Node, Edge>, evidence: &Evidence| Crowd::of(&graph[from].endpoint, &graph[to].endpoint, service, evidence);
        let known = self.graph[from].edges.get(&(to, service, direction_known)).copied();
        let was_of = known.map(|edge| crowd(&self.graph, &self.graph[edge].evidence));
        let (edge, before, after) = match known {
            Some(edge) => {
                let before = counts(&self.graph, &self.graph[edge].evidence);
                self.graph[edge].evidence.merge(&seen);
                if self.graph[edge].evidence.established > 0 {
                    self.graph[from].touched.remove(&edge);
                }
                (edge, before, counts(&self.graph, &self.graph[edge].evidence))
            }
            None => {
                let after = counts(&self.graph, &seen);
                let carried = seen.established > 0;
                let edge = self.graph.add_edge(from, to, Edge { service, direction_known, evidence: seen });
                self.graph[from].edges.insert((to, service, direction_known), edge);
                if !carried {
                    self.graph[from].touched.insert(edge);
                }
                self.graph[to].arriving += 1;
                (edge, Touch::default(), after)
            }
        };
        let touch = &mut self.graph[from].touch;
        touch.tried = touch.tried + after.tried - before.tried;
        touch.denied = touch.denied + after.denied - before.denied;
        let (holder, is) = crowd(&self.graph, &self.graph[edge].evidence);
        if was_of != Some((holder, is)) {
            was_of.into_iter().for_each(|(holder, crowd)| self.crowds(holder.end(from, to)).take(crowd));
            self.crowds(holder.end(from, to)).add(is);
        }
        known.is_none()
    }

    fn crowds(&mut self, holder: Option<NodeIndex>) -> &mut Crowds {
        match holder {
            Some(index) => &mut self.graph[index].crowds,
            None => &mut self.nobodys,
        }
    }

    /// Adds everything another graph saw.
    pub fn merge(&mut self, other: &Self) {
        for (key, evidence) in other.iter() {
            self.add(&EdgeDelta { key, seen: evidence.clone() });
        }
    }

    /// Every edge with its evidence, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (EdgeKey, &Evidence)> {
        self.nodes.values().flat_map(|&index| self.sorted(index, &[Direction::Outgoing])).map(|seen| (seen.key(), seen.evidence))
    }

    /// The evidence of one edge.
    pub fn get(&self, key: &EdgeKey) -> Option<&Evidence> {
        self.find(key).map(|index| &self.graph[index].evidence)
    }

    /// The endpoints, in order.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.nodes.keys()
    }

    /// When the first flow from an endpoint or to it began.
    pub fn first_seen(&self, endpoint: &Endpoint) -> Option<Timestamp> {
        self.nodes.get(endpoint).and_then(|&index| self.graph[index].first)
    }

    /// Edges that start at or arrive at an endpoint, in the order of the keys.
    pub fn touching(&self, endpoint: &Endpoint) -> Vec<(EdgeKey, &Evidence)> {
        self.around(endpoint).into_iter().map(|seen| (seen.key(), seen.evidence)).collect()
    }

    /// The same without copies.
    pub(crate) fn around(&self, endpoint: &Endpoint) -> Vec<Seen<'_>> {
        let Some(&index) = self.nodes.get(endpoint) else { return Vec::new() };
        self.sorted(index, &[Direction::Outgoing, Direction::Incoming])
    }

    /// Edges by which a source touched others without ever carrying data there.
    pub(crate) fn touched_by(&self, source: &Endpoint) -> impl Iterator<Item = EdgeId> {
        self.nodes.get(source).into_iter().flat_map(|&index| self.graph[index].touched.iter().copied())
    }

    /// How many edges start at or arrive at an endpoint; one to itself counts twice.
    pub(crate) fn count_around(&self, endpoint: &Endpoint) -> usize {
        self.nodes.get(endpoint).map_or(0, |&index| self.graph[index].edges.len() + self.graph[index].arriving)
    }

    /// Which edge this is.
    pub(crate) fn find(&self, key: &EdgeKey) -> Option<EdgeId> {
        let (from, to) = (*self.nodes.get(&key.from)?, *self.nodes.get(&key.to)?);
        self.graph[from].edges.get(&(to, key.service, key.direction_known)).copied()
    }

    /// Client and server of an edge.
    pub(crate) fn ends(&self, id: EdgeId) -> Option<(&Endpoint, &Endpoint)> {
        self.graph.edge_endpoints(id).map(|(from, to)| (&self.graph[from].endpoint, &self.graph[to].endpoint))
    }

    /// One edge as it is now.
    pub(crate) fn seen(&self, id: EdgeId) -> Option<Seen<'_>> {
        let (from, to) = self.graph.edge_endpoints(id)?;
        let Edge { service, direction_known, ref evidence } = *self.graph.edge_weight(id)?;
        let from = &self.graph[from];
        Some(Seen { id, from: &from.endpoint, to: &self.graph[to].endpoint, service, direction_known, evidence, touch: from.touch })
    }

    fn sorted<'g>(&'g self, index: NodeIndex, directions: &[Direction]) -> Vec<Seen<'g>> {
        let places = self.places.get_or_init(|| {
            let mut places = vec![0; self.nodes.len()];
            self.nodes.values().zip(0..).for_each(|(node, place)| places[node.index()] = place);
            places
        });
        let edges = directions.iter().flat_map(|&direction| self.graph.edges_directed(index, direction));
        let place = |edge: &EdgeReference<'_, Edge>| (places[edge.source().index()], places[edge.target().index()]);
        let mut found: Vec<_> = edges.map(|edge| (place(&edge), edge.weight().service, edge.weight().direction_known, edge)).collect();
        found.sort_unstable_by_key(|(ends, service, direction_known, _)| (*ends, *service, *direction_known));
        // An edge to oneself comes up in both directions.
        found.dedup_by_key(|(.., edge)| edge.id());
        let seen = |(.., edge): (_, _, _, EdgeReference<'g, Edge>)| {
            let from = &self.graph[edge.source()];
            Seen {
                id: edge.id(),
                from: &from.endpoint,
                to: &self.graph[edge.target()].endpoint,
                service: edge.weight().service,
                direction_known: edge.weight().direction_known,
                evidence: &edge.weight().evidence,
                touch: from.touch,
            }
        };
        found.into_iter().map(seen).collect()
    }

    /// How many edges.
    pub fn len(&self) -> usize {
        self.graph.edge_count()
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
