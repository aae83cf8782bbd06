//! What the API shows of the state. Pure: state in, views out.

use std::collections::{BTreeMap, BTreeSet};

use policy::check::{HalfApproved, half_approved};
use policy::diff::{self, SuggestionDiff};
use policy::graph::{EdgeKey, LeftOut, no_room};
use policy::guardrail;
use policy::inventory::Container;
use policy::review::{Decision, Foreseen};
use policy::segment::segment_of;
use policy::status::{NetworkState, NodeStatus};
use policy::suggestion::Outline;
use policy::{Endpoint, Evidence, Inventory, Mode, Segment, Standing, Verdict, Workload};

use super::HubError;
use super::decide::implicit;
use super::name::{end_is, must_know_end};
use super::state::State;
use crate::api::ask::{FlowFilter, GraphFilter};
use crate::api::view::{
    AuditLine, ContainerView, EdgeView, FlowView, GraphView, GuardrailView, InForce, NetworkView, NodeView, PolicyView, SegmentView,
    StatusView, SuggestionLine, WorkloadView,
};

/// The segment a workload is in, the project's own included.
pub(crate) fn segment_name(state: &State, workload: &Workload) -> Option<String> {
    match state.scene().segment(workload) {
        Some(segment) => Some(segment.name.clone()),
        None if !workload.namespace().is_empty() => Some(workload.namespace().to_owned()),
        None => None,
    }
}

fn edge(state: &State, key: &EdgeKey, evidence: &Evidence) -> EdgeView {
    let decision = state.judge(&key.from, &key.to, key.service);
    EdgeView {
        from: key.from.clone(),
        to: key.to.clone(),
        service: key.service,
        direction_known: key.direction_known,
        evidence: evidence.clone(),
        verdict: decision.verdict,
        reason: decision.reason(),
    }
}

/// Edges that fit a filter.
fn fitting<'a>(state: &'a State, filter: &GraphFilter) -> Result<Vec<(EdgeKey, &'a Evidence)>, HubError> {
    if let Some(workload) = &filter.workload {
        state.must_know(workload)?;
    }
    if let Some(segment) = &filter.segment
        && !segments(state).iter().any(|view| view.segment.name == *segment)
    {
        return Err(HubError::not_found(format_args!("no segment \"{segment}\""), "`bulkhead get segments` lists them."));
    }
    let mut members: BTreeMap<Workload, bool> = BTreeMap::new();
    let mut fits = |key: &EdgeKey, evidence: &Evidence| {
        let mut ends = [&key.from, &key.to].into_iter().filter_map(|end| end.workload());
        let by_workload = filter.workload.as_ref().is_none_or(|wanted| ends.clone().any(|workload| workload == wanted));
        let by_segment = filter.segment.as_ref().is_none_or(|wanted| {
            ends.any(|workload| *members.entry(workload.clone()).or_insert_with(|| segment_name(state, workload).as_ref() == Some(wanted)))
        });
        let by_time = filter.since.is_none_or(|since| evidence.last.is_some_and(|last| last >= since));
        by_workload && by_segment && by_time
    };
    Ok(state.graph.iter().filter(|(key, evidence)| fits(key, evidence)).collect())
}

/// The graph.
pub(crate) fn graph(state: &State, filter: &GraphFilter) -> Result<GraphView, HubError> {
    let edges: Vec<EdgeView> = fitting(state, filter)?.into_iter().map(|(key, evidence)| edge(state, &key, evidence)).collect();
    let left_out = (state.graph.len() - edges.len()) as u64;
    let lost = state.nodes.values().map(|node| node.sight.lost()).sum();
    let blind = state.nodes.iter().flat_map(|(name, node)| node.status.blind.iter().map(move |why| format!("{name}: {why}")));
    Ok(GraphView { edges, left_out, lost, blind: blind.collect() })
}

/// Would-be denials and denials by edge, the most frequent first.
pub(crate) fn audit(state: &State, filter: &GraphFilter) -> Result<Vec<AuditLine>, HubError> {
    let mut lines: Vec<AuditLine> = fitting(state, filter)?
        .into_iter()
        .filter(|(_, evidence)| evidence.would_deny + evidence.denied > 0)
        .map(|(key, evidence)| {
            let EdgeView { from, to, service, verdict, reason, .. } = edge(state, &key, evidence);
            AuditLine { from, to, service, would_deny: evidence.would_deny, denied: evidence.denied, last: evidence.last, verdict, reason }
        })
        .collect();
    lines.sort_by_key(|line| std::cmp::Reverse(line.would_deny + line.denied));
    Ok(lines)
}

/// Whether a flow fits.
pub(crate) fn flow_fits(filter: &FlowFilter, view: &FlowView) -> bool {
    let FlowFilter { since, last: _, from, to, port, protocol, verdict, follow: _ } = filter;
    let flow = &view.flow;
    since.is_none_or(|since| flow.time >= since)
        && from.as_ref().is_none_or(|text| end_is(text, &flow.from))
        && to.as_ref().is_none_or(|text| end_is(text, &flow.to))
        && port.is_none_or(|port| flow.service.port == port && flow.service.protocol.has_ports())
        && protocol.is_none_or(|protocol| flow.service.protocol == protocol)
        && verdict.is_none_or(|verdict| view.verdict == verdict.verdict())
}

/// Flows that are kept and fit, oldest first, and the number of the last one that came.
///
/// # Errors
/// An end of the filter is nothing that is known here.
pub(crate) fn flows(state: &State, filter: &FlowFilter) -> Result<(Vec<FlowView>, u64), HubError> {
    for end in [&filter.from, &filter.to].into_iter().flatten() {
        must_know_end(state, end)?;
    }
    let fitting = state.flows.iter().rev().filter(|kept| flow_fits(filter, &kept.view));
    let mut found: Vec<FlowView> = fitting.take(filter.last.unwrap_or(usize::MAX)).map(|kept| kept.view.clone()).collect();
    found.reverse();
    Ok((found, state.flows_seen))
}

/// One line a suggestion.
pub(crate) fn suggestions(state: &State) -> Vec<SuggestionLine> {
    let line = |outline: &Outline| {
        let Outline { workload, revision, digest, phase, rules, undecided, findings, updated } = outline.clone();
        let segment = segment_name(state, &workload);
        SuggestionLine { segment, workload, revision, digest, phase, rules, undecided, findings, updated }
    };
    state.outlines.values().map(line).collect()
}

/// A suggestion against what is in force.
pub(crate) fn diff(state: &State, workload: &Workload) -> Result<SuggestionDiff, HubError> {
    let suggestion = state.suggestion(workload)?;
    Ok(diff::suggestion(&suggestion, &state.set, state.now))
}

/// Segments that are written down, and the projects that are one by themselves.
pub(crate) fn segments(state: &State) -> Vec<SegmentView> {
    let segment_of_workload = |workload: &Workload| {
        let networks = state.networks.get(workload).into_iter().flatten().map(String::as_str);
        segment_of(state.set.segments.values(), workload, networks)
    };
    let mut views: BTreeMap<String, SegmentView> = BTreeMap::new();
    let fresh = |segment: Segment, implicit| SegmentView { segment, implicit, workloads: BTreeSet::new(), unlearned: BTreeSet::new() };
    for segment in state.set.segments.values() {
        views.insert(segment.name.clone(), fresh(segment.clone(), false));
    }
    for workload in state.networks.keys() {
        let view = match segment_of_workload(workload) {
            Some(segment) => views.get_mut(&segment.name),
            None if workload.namespace().is_empty() => None,
            None => Some(views.entry(workload.namespace().to_owned()).or_insert_with(|| fresh(implicit(workload.namespace()), true))),
        };
        if let Some(view) = view {
            view.workloads.insert(workload.clone());
            if !state.set.policies.contains_key(workload) {
                view.unlearned.insert(workload.clone());
            }
        }
    }
    views.into_values().collect()
}

fn container(inventory: &Inventory, node: &str, container: &Container) -> ContainerView {
    let network = |id: &str| inventory.networks.get(id).map_or_else(|| id.to_owned(), |network| network.name.clone());
    ContainerView {
        node: node.to_owned(),
        name: container.name.clone(),
        id: container.id.clone(),
        image: container.image.clone(),
        addresses: container
            .legs
            .iter()
            .flat_map(|leg| leg.addresses.iter().map(|address| format!("{address} ({})", network(&leg.network))))
            .collect(),
        one_off: container.one_off,
        members: container.members.clone(),
    }
}

/// One workload, running or not.
pub(crate) fn workload(state: &State, workload: &Workload) -> Result<WorkloadView, HubError> {
    state.must_know(workload)?;
    Ok(workload_of(state, workload, placed(state).filter(|(_, _, container)| container.workload == *workload)))
}

/// A container, what else runs on its node, and the node's name.
type Placed<'s> = (&'s str, &'s Inventory, &'s Container);

fn placed(state: &State) -> impl Iterator<Item = Placed<'_>> {
    state.nodes.iter().flat_map(|(name, node)| node.inventory.containers.values().map(move |c| (name.as_str(), &node.inventory, c)))
}

fn workload_of<'s>(state: &State, workload: &Workload, placed: impl IntoIterator<Item = Placed<'s>>) -> WorkloadView {
    let mut containers = Vec::new();
    let mut unmanaged = BTreeSet::new();
    for (node, inventory, found) in placed {
        containers.push(container(inventory, node, found));
        unmanaged.extend(found.unmanaged.iter().map(ToString::to_string));
        let networks = found.legs.iter().filter_map(|leg| inventory.networks.get(&leg.network));
        unmanaged.extend(networks.flat_map(|n| n.unmanaged.iter().map(|why| format!("network {}: {why}", n.name))));
    }
    let mode = state.scene().segment(workload).map_or(Mode::Learn, |segment| segment.mode);
    WorkloadView {
        workload: workload.clone(),
        segment: segment_name(state, workload),
        mode,
        approved: state.set.policies.contains_key(workload),
        quarantined: state.set.quarantines.contains_key(workload),
        containers,
        networks: state.networks.get(workload).cloned().unwrap_or_default(),
        unmanaged,
    }
}

/// Every workload that runs.
pub(crate) fn workloads(state: &State) -> Vec<WorkloadView> {
    let mut by_name: BTreeMap<&Workload, Vec<Placed<'_>>> = BTreeMap::new();
    for one in placed(state) {
        by_name.entry(&one.2.workload).or_default().push(one);
    }
    state.networks.keys().map(|name| workload_of(state, name, by_name.remove(name).unwrap_or_default())).collect()
}

fn network_state(status: &NodeStatus, name: &str) -> (String, String) {
    match status.networks.iter().find(|network| network.name == name).map(|network| &network.state) {
        Some(NetworkState::Observed) => ("observed".to_owned(), String::new()),
        Some(NetworkState::Audited) => ("audited".to_owned(), String::new()),
        Some(NetworkState::Enforced) => ("enforced".to_owned(), String::new()),
        Some(NetworkState::NotEnforced(why)) => ("not enforced".to_owned(), why.clone()),
        Some(NetworkState::NotEnforceable(why)) => ("not enforceable".to_owned(), why.clone()),
        None => ("unknown".to_owned(), "the agent has not said".to_owned()),
    }
}

/// Every network of every node. What the agent cannot vouch for now is never shown as enforced.
pub(crate) fn networks(state: &State) -> Vec<NetworkView> {
    let mut views = Vec::new();
    for (name, node) in &state.nodes {
        for network in node.inventory.networks.values() {
            let (mut says, mut why) = network_state(&node.status, &network.name);
            if !network.unmanaged.is_empty() {
                says = "not enforceable".to_owned();
                why = network.unmanaged.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            } else if says == "enforced" {
                match node.in_force(&state.store, state.generation, state.now) {
                    InForce::Away => why = "last heard before the agent's session ended; the last plan stays in the kernel".to_owned(),
                    InForce::Unanswered { .. } => why = format!("by the plan of generation {}", node.status.generation),
                    InForce::Refused(_) => why = format!("by the plan of generation {}: another one was refused", node.status.generation),
                    InForce::Yes => {}
                }
            }
            let attached = node.inventory.containers.values().filter(|c| c.legs.iter().any(|leg| leg.network == network.id));
            views.push(NetworkView {
                node: name.clone(),
                name: network.name.clone(),
                driver: network.driver.clone(),
                bridge: network.bridge.clone(),
                subnets: network.subnets.iter().map(ToString::to_string).collect(),
                internal: network.internal,
                state: says,
                why,
                workloads: attached.map(|c| c.workload.clone()).collect(),
            });
        }
    }
    views.sort_by(|a, b| (&a.node, &a.name).cmp(&(&b.node, &b.name)));
    views
}

/// One policy.
pub(crate) fn policy(state: &State, workload: &Workload) -> Result<PolicyView, HubError> {
    policy_among(state, workload, &half_approved(&state.set.policies, state.now))
}

/// `halves`: of all policies. To find them takes as long as all policies are large.
fn policy_among(state: &State, workload: &Workload, halves: &[HalfApproved]) -> Result<PolicyView, HubError> {
    state.must_know(workload)?;
    let next = format!("`bulkhead describe suggestion {workload}` shows what could be approved.");
    let policy =
        state.set.policies.get(workload).ok_or_else(|| HubError::not_found(format_args!("{workload} has no approved policy"), next))?;
    let (revision, decision) = state.revisions.get(workload).copied().unwrap_or_default();
    Ok(PolicyView {
        policy: policy.clone(),
        revision,
        decided: recorded(state, decision).cloned(),
        half_approved: halves.iter().filter(|half| half.from == *workload || half.to == *workload).map(ToString::to_string).collect(),
    })
}

fn recorded(state: &State, number: u64) -> Option<&Decision> {
    state.decisions.iter().rev().find(|decision| decision.number == number)
}

/// Every policy in force.
pub(crate) fn policies(state: &State) -> Result<Vec<PolicyView>, HubError> {
    let halves = half_approved(&state.set.policies, state.now);
    state.set.policies.keys().map(|workload| policy_among(state, workload, &halves)).collect()
}

/// What a switch to Enforce would deny of the graph, as edges.
pub(crate) fn foreseen_edges(foreseen: Foreseen) -> Vec<EdgeView> {
    let edge = |denial: policy::review::ForeseenDenial| EdgeView {
        from: denial.edge.from,
        to: denial.edge.to,
        service: denial.edge.service,
        direction_known: denial.edge.direction_known,
        evidence: denial.evidence,
        verdict: Verdict::Deny,
        reason: denial.reason,
    };
    foreseen.denied.into_iter().map(edge).collect()
}

/// Where a generation is in force.
pub(crate) fn in_force(state: &State, generation: u64) -> BTreeMap<String, InForce> {
    state.nodes.iter().map(|(name, node)| (name.clone(), node.in_force(&state.store, generation, state.now))).collect()
}

/// Everything at a glance.
pub(crate) fn status(state: &State) -> StatusView {
    let nodes = state.nodes.iter().map(|(name, node)| NodeView {
        name: name.clone(),
        connected: node.session.is_some(),
        heard: node.heard,
        status: node.status.clone(),
        refused: node.refused.clone(),
        in_force: node.in_force(&state.store, state.generation, state.now),
        healthy_seconds: node.sight.healthy_seconds(),
    });
    let unmanaged = state.nodes.iter().flat_map(|(name, node)| {
        let containers = node.inventory.containers.values().filter(|c| !c.unmanaged.is_empty());
        containers.map(move |c| {
            let why = c.unmanaged.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            format!("{} ({}) on {name}: {why}", c.name, c.workload)
        })
    });
    StatusView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store: state.store.clone(),
        generation: state.generation,
        nodes: nodes.collect(),
        networks: networks(state),
        segments: segments(state),
        unmanaged: unmanaged.collect(),
        quarantined: state.set.quarantines.keys().cloned().collect(),
        edges: state.graph.len() as u64,
        notes: notes(state),
    }
}

/// Every guardrail, with what is in force although it forbids it.
pub(crate) fn guardrails(state: &State) -> Vec<GuardrailView> {
    let breaches = guardrail::in_force(&state.set, state.now);
    let of = |name: &str| breaches.iter().filter(|breach| breach.guardrail == name).map(ToString::to_string).collect();
    state.set.guardrails.values().map(|guardrail| GuardrailView { guardrail: guardrail.clone(), breaches: of(&guardrail.name) }).collect()
}

/// What must not be forgotten now.
fn notes(state: &State) -> Vec<String> {
    let mut notes = Vec::new();
    let scene = state.scene();
    let enforced = state.networks.keys().filter(|workload| matches!(scene.standing(workload), Standing::Enforce(_)));
    let unlearned: Vec<String> = enforced.filter(|w| !state.set.policies.contains_key(*w)).map(ToString::to_string).collect();
    notes.extend(names_note(state));
    if !unlearned.is_empty() {
        notes.push(format!("Under Enforce without an approved policy, so that all their traffic is denied: {}.", unlearned.join(", ")));
    }
    for breach in guardrail::in_force(&state.set, state.now) {
        let next = format!("it stays until `bulkhead edit {}` takes it out", breach.workload);
        notes.push(format!("In force from before its guardrail: {breach}; {next}."));
    }
    for (segment, unmet) in &state.waiting {
        if state.set.segments.get(segment).is_some_and(|segment| segment.mode == Mode::Audit && segment.promotion.is_some()) {
            let unmet: Vec<_> = unmet.iter().map(ToString::to_string).collect();
            notes.push(format!("{segment} is promoted to Enforce by its rule, but not yet: {}.", unmet.join("; ")));
        }
    }
    for LeftOut { end, reports, .. } in state.left_out() {
        notes.push(format!("Not listed, {reports} reports so far: {}.", no_room(end.as_ref())));
    }
    for (name, node) in &state.nodes {
        if node.status.networks.iter().any(|network| network.state == NetworkState::Enforced) {
            notes.push(format!(
                "Should agent and supervisor of {name} both be dead, an enforced network that is made anew meanwhile (`compose down && up`) is \
                 closed by its subnet; with another subnet (engines before 27 give the next one, unless the network names its own) it is open \
                 until an agent is back."
            ));
        }
        if node.session.is_none() {
            notes.push(format!("No agent of {name} is connected: what is shown of it is old; its kernel keeps the last plan."));
        }
        let lost = node.sight.lost();
        if lost > 0 {
            notes.push(format!("{name} lost {lost} kernel events while observing: suggestions may lack rules."));
        }
    }
    notes
}

/// Who can resolve names outside: that goes by where the engine asks.
fn names_note(state: &State) -> Option<String> {
    let containers = || state.nodes.values().flat_map(|node| node.inventory.containers.values());
    let from_host = containers().any(|container| container.resolvers.is_empty());
    let by_rule = containers().any(|container| !container.resolvers.is_empty());
    let how = match (from_host, by_rule) {
        (false, false) => return None,
        (true, false) => "the engine asks for names outside from the host, where no policy applies, so every workload can resolve them",
        (false, true) => {
            "a workload in Enforce resolves names outside if the rule to its name server is in force (proposed as needed by the engine), \
             any other always"
        }
        (true, true) => {
            "a workload in Enforce resolves names outside if the rule to its name server is in force (proposed as needed by the engine) or \
             the engine asks from the host for it, any other always"
        }
    };
    Some(format!("Names are not enforced yet: {how}; data can leave that way."))
}

/// Whether an endpoint is a workload that runs.
pub(crate) fn runs(state: &State, end: &Endpoint) -> bool {
    end.workload().is_some_and(|workload| state.networks.contains_key(workload))
}

/// Who is cut off.
pub(crate) fn quarantines(state: &State) -> Vec<policy::policy_set::Quarantine> {
    state.set.quarantines.values().cloned().collect()
}
