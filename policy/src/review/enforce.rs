//! What a switch to Enforce would do, said beforehand, and when it is refused.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Refused;
use crate::evaluate::{Connection, Scene, Verdict, evaluate};
use crate::evidence::Evidence;
use crate::graph::{EdgeKey, FlowGraph};
use crate::policy_set::PolicySet;
use crate::segment::Mode;
use crate::workload::{Endpoint, Workload};

/// Running workloads of a segment that have no approved policy. One without any network here (it shares the host's, say) is left
/// out: there is nothing that could be enforced, and `status` says so.
pub fn unlearned(set: &PolicySet, segment: &str, running: &BTreeMap<Workload, BTreeSet<String>>, now: Timestamp) -> Vec<Workload> {
    let scene = Scene { set, networks: running, now };
    let of_segment = |workload: &&Workload| scene.segment(workload).is_some_and(|found| found.name == segment);
    let attached = running.iter().filter(|(_, networks)| !networks.is_empty()).map(|(workload, _)| workload);
    attached.filter(of_segment).filter(|workload| !set.policies.contains_key(*workload)).cloned().collect()
}

/// Whether a segment may go to Enforce. `running`: the workloads that run, each with the names of its networks. `deny_unlearned`:
/// those whose traffic may be denied wholly, named by the person who asks.
///
/// # Errors
/// [`Refused::NoSuchSegment`], [`Refused::Unlearned`] with everybody who has no approved policy and was not named.
pub fn to_enforce(
    set: &PolicySet,
    segment: &str,
    running: &BTreeMap<Workload, BTreeSet<String>>,
    deny_unlearned: &BTreeSet<Workload>,
    now: Timestamp,
) -> Result<(), Refused> {
    if !set.segments.contains_key(segment) {
        return Err(Refused::NoSuchSegment { segment: segment.to_owned() });
    }
    let workloads: Vec<Workload> =
        unlearned(set, segment, running, now).into_iter().filter(|workload| !deny_unlearned.contains(workload)).collect();
    match workloads.is_empty() {
        true => Ok(()),
        false => Err(Refused::Unlearned { segment: segment.to_owned(), workloads }),
    }
}

/// What Enforce would have done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Foreseen {
    /// Edges seen in use that would be denied, with their evidence and the reason.
    pub denied: Vec<ForeseenDenial>,
    /// Running workloads of the segment of which nothing was seen in use.
    pub no_evidence: Vec<Workload>,
    /// Running workloads of the segment without an approved policy.
    pub unlearned: Vec<Workload>,
}

/// One edge that Enforce would deny.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForeseenDenial {
    /// Which edge.
    pub edge: EdgeKey,
    /// What was counted.
    pub evidence: Evidence,
    /// Why it would be denied.
    pub reason: String,
}

/// What a change of the set would newly deny of what the graph holds: what [`foresee`] says of every segment that is in Enforce
/// after it, without what is denied before it already. Who is unlearned or without evidence is named of segments that were not in
/// Enforce before.
pub fn foresee_change(
    before: &PolicySet,
    after: &PolicySet,
    graph: &FlowGraph,
    running: &BTreeMap<Workload, BTreeSet<String>>,
    now: Timestamp,
) -> Foreseen {
    let in_enforce = |set: &PolicySet, name: &str| set.segments.get(name).is_some_and(|segment| segment.mode == Mode::Enforce);
    let mut all = Foreseen::default();
    for name in after.segments.keys().filter(|name| in_enforce(after, name)) {
        let mut foreseen = foresee(after, name, graph, running, now);
        if in_enforce(before, name) {
            let old: BTreeSet<EdgeKey> = foresee(before, name, graph, running, now).denied.into_iter().map(|denial| denial.edge).collect();
            foreseen.denied.retain(|denial| !old.contains(&denial.edge));
            (foreseen.no_evidence, foreseen.unlearned) = (Vec::new(), Vec::new());
        }
        all.denied.extend(foreseen.denied);
        all.no_evidence.extend(foreseen.no_evidence);
        all.unlearned.extend(foreseen.unlearned);
    }
    // An edge between two segments is foreseen for both.
    all.denied.sort_by(|a, b| a.edge.cmp(&b.edge));
    all.denied.dedup_by(|a, b| a.edge == b.edge);
    all
}

/// What a switch of a segment to Enforce would have denied of what the graph holds. Edges of unknown direction would pass if
/// either direction is allowed, since which one was meant is not known.
pub fn foresee(
    set: &PolicySet,
    segment: &str,
    graph: &FlowGraph,
    running: &BTreeMap<Workload, BTreeSet<String>>,
    now: Timestamp,
) -> Foreseen {
    let mut enforced = set.clone();
    if let Some(segment) = enforced.segments.get_mut(segment) {
        segment.mode = Mode::Enforce;
    }
    let scene = Scene { set: &enforced, networks: running, now };
    let member = |workload: &Workload| scene.segment(workload).is_some_and(|found| found.name == segment);
    let mut denied = Vec::new();
    for (key, evidence) in graph.iter().filter(|(_, evidence)| evidence.used() > 0) {
        if ![&key.from, &key.to].into_iter().filter_map(|end| end.workload()).any(member) {
            continue;
        }
        let judge = |from: &Endpoint, to: &Endpoint| {
            evaluate(&scene, &Connection { from: from.clone(), to: to.clone(), service: key.service, guarded: true })
        };
        let decision = judge(&key.from, &key.to);
        let passes_reversed = !key.direction_known && judge(&key.to, &key.from).verdict != Verdict::Deny;
        if decision.verdict == Verdict::Deny && !passes_reversed {
            denied.push(ForeseenDenial { edge: key, evidence: evidence.clone(), reason: decision.reason() });
        }
    }
    let in_use = |workload: &Workload| graph.touching(&Endpoint::Workload(workload.clone())).iter().any(|(_, seen)| seen.used() > 0);
    let no_evidence = running.keys().filter(|workload| member(workload) && !in_use(workload)).cloned().collect();
    Foreseen { denied, no_evidence, unlearned: unlearned(set, segment, running, now) }
}
