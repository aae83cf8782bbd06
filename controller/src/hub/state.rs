//! What the hub knows, and how it learns from it. No I/O: what has to be written is handed back to the task.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};

use jiff::{SignedDuration, Timestamp};
use policy::evaluate::Scene;
use policy::learn::{self, Context, Halves, Learner, Rejected, Revision};
use policy::promote::Unmet;
use policy::review::Decision;
use policy::suggestion::{Outline, Suggestion};
use policy::{
    Connection, EdgeDelta, Endpoint, Flow, FlowGraph, FlowOutcome, Health, Index, NodePlan, PolicySet, Standing, Verdict, Workload,
};

use super::HubError;
use super::node::Node;
use crate::api::view::FlowView;

/// Everything.
pub struct State {
    /// Id of the store.
    pub(crate) store: String,
    /// Generation in force.
    pub(crate) generation: u64,
    /// What is in force; changed by [`State::put_in_force`].
    pub(crate) set: PolicySet,
    /// The same, to be asked of many connections; made when it is asked for.
    index: OnceLock<Index>,
    /// The record, oldest first.
    pub(crate) decisions: Vec<Decision>,
    /// How often each policy changed, and with which decision last (number).
    pub(crate) revisions: BTreeMap<Workload, (u64, u64)>,
    /// What people said no to.
    pub(crate) rejected: BTreeSet<Rejected>,
    /// Segments with a promotion rule that is not met, and why, as of the last look.
    pub(crate) waiting: Vec<(String, Vec<Unmet>)>,
    /// The merged graph.
    pub(crate) graph: FlowGraph,
    /// Nodes by name.
    pub(crate) nodes: BTreeMap<String, Node>,
    /// Names of the networks of each workload that runs, over all nodes.
    pub(crate) networks: BTreeMap<Workload, BTreeSet<String>>,
    /// Suggestions by workload, in outline: whole ones are written when somebody reads them.
    pub(crate) outlines: BTreeMap<Workload, Outline>,
    /// Recent flows in the order they came, bounded.
    pub(crate) flows: VecDeque<Arc<Kept>>,
    /// How many came so far.
    pub(crate) flows_seen: u64,
    /// How many of them are kept.
    pub(crate) keep_flows: usize,
    /// What suggestions depend on besides the graph, and what follows from the policies in it: as they were when last learned.
    pub(crate) context: Context,
    halves: Halves,
    /// Of large workloads, as long as the context holds.
    parts: learn::Kept,
    /// Workloads whose suggestion is behind the graph.
    stale: Stale,
    /// Those of them that are being made anew.
    relearning: BTreeSet<Workload>,
    /// Healthy time has passed since all were learned, and when that was.
    clock_moved: bool,
    learned: Timestamp,
    /// When the state was last told the time.
    pub(crate) now: Timestamp,
}

/// A flow with its number in the order they came: times don't tell, since a flow is reported when it ends.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) number: u64,
    pub(crate) view: FlowView,
}

/// Which suggestions have to be made anew.
#[derive(Debug, Default)]
enum Stale {
    #[default]
    All,
    Some(BTreeSet<Workload>),
}

/// The plan for every node. It says the same to all: each binds what concerns it.
pub(crate) fn node_plan(store: &str, mut set: PolicySet, generation: u64) -> NodePlan {
    // They refuse an allow when it is reviewed; a node has nothing to do with them.
    set.guardrails.clear();
    NodePlan { format: policy::plan::PLAN_FORMAT, store: store.to_owned(), generation, set: set.into() }
}

impl State {
    /// A state without nodes and traffic.
    pub(crate) fn new(store: String, now: Timestamp, keep_flows: usize) -> Self {
        Self {
            store,
            generation: 0,
            set: PolicySet::default(),
            index: OnceLock::new(),
            decisions: Vec::new(),
            revisions: BTreeMap::new(),
            rejected: BTreeSet::new(),
            waiting: Vec::new(),
            graph: FlowGraph::new(),
            nodes: BTreeMap::new(),
            networks: BTreeMap::new(),
            outlines: BTreeMap::new(),
            flows: VecDeque::new(),
            flows_seen: 0,
            keep_flows,
            context: Context::default(),
            halves: Halves::default(),
            parts: learn::Kept::new(),
            stale: Stale::All,
            relearning: BTreeSet::new(),
            clock_moved: false,
            learned: now,
            now,
        }
    }

    /// What is in force, with who runs where, now.
    pub(crate) fn scene(&self) -> Scene<'_> {
        Scene { set: &self.set, networks: &self.networks, now: self.now }
    }

    /// Another set is in force from now on.
    pub(crate) fn put_in_force(&mut self, set: PolicySet, generation: u64) {
        (self.set, self.generation) = (set, generation);
        self.index = OnceLock::new();
    }

    /// A plan that is not in force.
    pub(crate) fn plan_of(&self, set: PolicySet, generation: u64) -> NodePlan {
        node_plan(&self.store, set, generation)
    }

    /// Whether a network that carries a connection between these two is guarded: then what belongs to nobody is denied.
    pub(crate) fn guarded(&self, set: &PolicySet, ends: [&Endpoint; 2]) -> bool {
        let scene = Scene { set, ..self.scene() };
        let Some(networks) = ends.into_iter().find_map(|end| self.networks.get(end.workload()?)) else { return false };
        let guards = |workload: &Workload| matches!(scene.standing(workload), Standing::Enforce(_) | Standing::Quarantined);
        self.networks.iter().any(|(workload, attached)| !attached.is_disjoint(networks) && guards(workload))
    }

    /// What is in force says this of a connection now.
    pub(crate) fn judge(&self, from: &Endpoint, to: &Endpoint, service: policy::Service) -> policy::Decision {
        // Only an end that belongs to nobody makes the question of the guard matter.
        let unknown = [from, to].into_iter().any(|end| matches!(end, Endpoint::Unknown(_)));
        let guarded = unknown && self.guarded(&self.set, [from, to]);
        let index = self.index.get_or_init(|| Index::of(&self.set, &self.networks));
        index.evaluate(&Connection { from: from.clone(), to: to.clone(), service, guarded }, self.now)
    }

    /// Workloads that may be named: they run, were seen, or have a policy.
    pub(crate) fn known(&self) -> BTreeSet<Workload> {
        let seen = self.graph.endpoints().filter_map(Endpoint::workload);
        self.networks.keys().chain(self.set.policies.keys()).chain(seen).cloned().collect()
    }

    /// That this workload may be named, or what else could be meant.
    pub(crate) fn must_know(&self, workload: &Workload) -> Result<(), HubError> {
        let seen = || self.graph.endpoints().any(|endpoint| endpoint.workload() == Some(workload));
        if self.networks.contains_key(workload) || self.set.policies.contains_key(workload) || seen() {
            return Ok(());
        }
        let next = match self.alike(workload).as_slice() {
            [] => "`bulkhead get workloads` lists those that run.".to_owned(),
            alike => format!("Did you mean {}?", alike.join(" or ")),
        };
        Err(HubError::not_found(format_args!("no workload {workload} was ever seen here"), next))
    }

    /// Those that run, or that traffic was seen of.
    pub(crate) fn seen(&self) -> BTreeSet<&Workload> {
        self.networks.keys().chain(self.graph.endpoints().filter_map(Endpoint::workload)).collect()
    }

    /// Others of that name, in another project; where there are none, whose name is a slip away.
    pub(crate) fn alike(&self, workload: &Workload) -> Vec<String> {
        let known = self.known();
        let others = || known.iter().filter(|w| *w != workload);
        let mut alike: Vec<String> = others().filter(|w| w.name() == workload.name()).map(ToString::to_string).collect();
        if alike.is_empty() {
            alike.extend(nearest(&workload.to_string(), others().map(ToString::to_string)));
        }
        alike
    }

    /// A generation that is newer than the store's own and than all that nodes have of it. The store may have been put back from a copy,
    /// and a node may have another plan of the very number.
    pub(crate) fn beyond_all(&self) -> u64 {
        let of_nodes = self.nodes.values().filter(|node| node.status.store == self.store).map(|node| node.status.generation);
        of_nodes.fold(self.generation, u64::max).saturating_add(1)
    }

    /// That what runs is known: a switch to Enforce must not be judged by a list that is still to come.
    pub(crate) fn must_see_nodes(&self) -> Result<(), HubError> {
        let next = "Look at `bulkhead status`, and try again when the agent is there.";
        let waiting = self.nodes.iter().find(|(_, node)| node.session.is_some() && !node.reported);
        match waiting {
            Some((name, _)) => Err(HubError::refused(format_args!("node {name} has not told yet what runs there"), next)),
            None if self.nodes.values().any(|node| node.reported) => Ok(()),
            None => Err(HubError::refused("no agent has told what runs here: what a switch would cut cannot be foreseen", next)),
        }
    }

    /// One suggestion.
    pub(crate) fn suggestion(&self, workload: &Workload) -> Result<Suggestion, HubError> {
        self.must_know(workload)?;
        let next = "It has one as soon as it runs or traffic of it is seen.";
        let missing = || HubError::not_found(format_args!("there is no suggestion for {workload}"), next);
        self.outlines.get(workload).map(|_| self.learner().suggest(workload)).ok_or_else(missing)
    }

    /// Every suggestion, written when it is asked for.
    pub(crate) fn suggestions(&self) -> impl Iterator<Item = Suggestion> {
        let learner = self.learner();
        self.outlines.keys().map(move |workload| learner.suggest(workload))
    }

    fn learner(&self) -> Learner<'_> {
        Learner::new(&self.graph, &self.context, &self.halves)
    }

    /// Adds what a batch saw.
    pub(crate) fn add_edges(&mut self, edges: &[EdgeDelta]) {
        for delta in edges {
            self.graph.add(delta);
        }
        if let Stale::Some(stale) = &mut self.stale {
            stale.extend(self.parts.note(&self.graph, edges.iter().map(|delta| &delta.key)));
        }
    }

    /// Names are learned anew after an inventory.
    pub(crate) fn refresh_networks(&mut self) {
        let mut networks: BTreeMap<Workload, BTreeSet<String>> = BTreeMap::new();
        for node in self.nodes.values() {
            for (workload, names) in node.inventory.workloads() {
                networks.entry(workload.clone()).or_default().extend(names.into_iter().map(str::to_owned));
            }
        }
        self.networks = networks;
        self.index = OnceLock::new();
        self.all_stale();
    }

    /// Something else than the graph changed that suggestions depend on.
    pub(crate) fn all_stale(&mut self) {
        self.relearning.clear();
        self.stale = Stale::All;
    }

    /// Notes how well a node saw. What a suggestion says of its coverage is behind from now on.
    pub(crate) fn saw(&mut self, node: &str, health: &[Health]) {
        let node = self.nodes.entry(node.to_owned()).or_default();
        node.heard = Some(self.now);
        health.iter().for_each(|health| node.sight.add(health));
        self.clock_moved |= !health.is_empty();
    }

    /// Somebody looks: what the clock moved is told as well, at most once a second.
    pub(crate) fn looked_at(&mut self) {
        const AT_MOST: SignedDuration = SignedDuration::from_secs(1);
        if self.clock_moved && self.now.duration_since(self.learned) >= AT_MOST {
            self.all_stale();
        }
    }

    /// From now on everything that is behind is made anew, by [`State::relearn_some`].
    pub(crate) fn begin_relearning(&mut self) {
        match std::mem::replace(&mut self.stale, Stale::Some(BTreeSet::new())) {
            Stale::All => {
                (self.clock_moved, self.learned) = (false, self.now);
                self.look_around();
                self.parts = learn::Kept::new();
                self.relearning = self.learner().workloads().into_iter().cloned().collect();
            }
            Stale::Some(workloads) => self.relearning.extend(workloads),
        }
    }

    /// Whether [`State::relearn_some`] has anything left to do.
    pub(crate) fn is_relearning(&self) -> bool {
        !self.relearning.is_empty()
    }

    /// Makes the suggestions anew that are behind; returns those whose digest moved, to be noted in the store.
    pub(crate) fn relearn(&mut self) -> Vec<(Workload, Revision)> {
        self.begin_relearning();
        self.relearn_some(usize::MAX)
    }

    /// The same of at most so many workloads of those that are being made anew.
    pub(crate) fn relearn_some(&mut self, most: usize) -> Vec<(Workload, Revision)> {
        let others = self.relearning.iter().nth(most).cloned().map(|first| self.relearning.split_off(&first));
        let now = std::mem::replace(&mut self.relearning, others.unwrap_or_default());
        self.context.now = self.now;
        let windows = self.windows(now.iter());
        self.context.windows.extend(windows);
        let mut parts = std::mem::take(&mut self.parts);
        let outlines = outlines(self.learner(), &now.iter().collect::<Vec<_>>(), &mut parts);
        self.parts = parts;
        let mut moved = Vec::new();
        for outline in outlines {
            let before = self.context.previous.get(&outline.workload);
            if before.is_none_or(|before| before.digest != outline.digest) {
                let revision = Revision { revision: outline.revision, digest: outline.digest.clone() };
                self.context.previous.insert(outline.workload.clone(), revision.clone());
                moved.push((outline.workload.clone(), revision));
            }
            self.outlines.insert(outline.workload.clone(), outline);
        }
        moved
    }

    /// Everything that suggestions depend on besides the graph.
    fn look_around(&mut self) {
        let known = learn::known(self.nodes.values().map(|node| &node.inventory));
        let seen = self.graph.endpoints().filter_map(Endpoint::workload);
        let workloads: BTreeSet<&Workload> = known.keys().chain(seen).collect();
        let windows = self.windows(workloads.into_iter());
        self.context = Context {
            windows,
            workloads: known,
            policies: self.set.policies.clone(),
            guardrails: self.set.guardrails.clone(),
            rejected: self.rejected.clone(),
            previous: std::mem::take(&mut self.context.previous),
            now: self.now,
            ..Context::default()
        };
        self.halves = Halves::of(&self.context);
    }

    /// Keeps a flow for people who ask later; the oldest goes.
    pub(crate) fn keep(&mut self, node: &str, flow: Flow) -> Arc<Kept> {
        self.flows_seen += 1;
        let kept = Arc::new(Kept { number: self.flows_seen, view: self.view_flow(node, flow) });
        if self.keep_flows > 0 {
            if self.flows.len() >= self.keep_flows {
                self.flows.pop_front();
            }
            self.flows.push_back(Arc::clone(&kept));
        }
        kept
    }

    /// A flow with its verdict: what happened is what the agent saw; why it passed is what is in force now.
    fn view_flow(&self, node: &str, mut flow: Flow) -> FlowView {
        let verdict = match flow.outcome {
            FlowOutcome::Denied => Verdict::Deny,
            FlowOutcome::WouldDeny => Verdict::WouldDeny,
            FlowOutcome::Established
            | FlowOutcome::ConnectedNoData
            | FlowOutcome::OneWay
            | FlowOutcome::Unanswered
            | FlowOutcome::Refused => Verdict::Allow,
        };
        if flow.reason.is_empty() {
            let decision = self.judge(&flow.from, &flow.to, flow.service);
            flow.reason = if decision.verdict == verdict {
                decision.reason()
            } else {
                // It began before what is in force now, or its packets were counted on another road.
                format!("passed under what was in force then; now: {}", decision.reason())
            };
        }
        FlowView { node: node.to_owned(), flow, verdict }
    }
}

/// The name that was most likely meant: one or two slips away, and not so short that anything would be near.
fn nearest(typed: &str, names: impl Iterator<Item = String>) -> Option<String> {
    let slips = |name: &str| if typed.len().min(name.len()) < 6 { 1 } else { 2 };
    let near = names.map(|name| (strsim::osa_distance(typed, &name), name));
    near.filter(|(distance, name)| *distance <= slips(name)).min().map(|(_, name)| name)
}

/// Outlines of these workloads, by as many threads as there are cores: nothing is learned of one from another. What is kept of large
/// ones is used, and kept anew.
pub fn outlines(learner: Learner<'_>, workloads: &[&Workload], parts: &mut learn::Kept) -> Vec<Outline> {
    /// A thread costs as much as some of them.
    const WORTH_A_THREAD: usize = 64;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = workloads.len().div_ceil(threads).max(WORTH_A_THREAD);
    // Neighbours in the order of names are often alike in size; taken in turn, no thread has all the large ones.
    let shares = workloads.len().div_ceil(share).max(1);
    let mut dealt: Vec<Vec<_>> = (0..shares).map(|_| Vec::new()).collect();
    for (at, &workload) in workloads.iter().enumerate() {
        dealt[at % shares].push((workload, parts.take(workload)));
    }
    let learn = |share: Vec<(&Workload, Option<learn::Parts>)>| {
        share.into_iter().map(|(workload, parts)| learner.renew(workload, parts)).collect::<Vec<_>>()
    };
    let mut dealt = dealt.into_iter();
    let own = dealt.next().unwrap_or_default();
    let found = std::thread::scope(|scope| {
        let others: Vec<_> = dealt.map(|share| scope.spawn(move || learn(share))).collect();
        let mut found = learn(own);
        for other in others {
            match other.join() {
                Ok(outlines) => found.extend(outlines),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        found
    });
    let keep = |(outline, kept): (Outline, Option<learn::Parts>)| {
        kept.into_iter().for_each(|kept| parts.put(outline.workload.clone(), kept));
        outline
    };
    found.into_iter().map(keep).collect()
}

#[cfg(test)]
mod tests;
