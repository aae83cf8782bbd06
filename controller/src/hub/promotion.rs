//! Promotion rules that an operator wrote on a segment: what was observed under them, and which segments may go to Enforce.

use std::collections::BTreeSet;

use jiff::Timestamp;
use policy::promote::{self, Observed, Unmet};
use policy::review::{self, Action};
use policy::{Endpoint, HourSet, Mode, Verdict, Workload};

use super::state::State;
use super::view::segment_name;

/// Segments in Audit that have a promotion rule.
#[derive(Debug, Default)]
pub(crate) struct Promotions {
    /// Those that may go to Enforce now, each with what was observed.
    pub(crate) due: Vec<(String, String)>,
    /// The others, each with what it waits for.
    pub(crate) waiting: Vec<(String, Vec<Unmet>)>,
}

/// Every one of them as it is now.
pub(crate) fn promotions(state: &State) -> Promotions {
    let mut all = Promotions::default();
    if state.outlines.is_empty() {
        // Nothing was learned since the start: what is undecided is not known.
        return all;
    }
    for segment in state.set.segments.values().filter(|segment| segment.mode == Mode::Audit && segment.promotion.is_some()) {
        let observed = observed(state, &segment.name);
        let unmet = promote::unmet(segment, &observed);
        if unmet.is_empty() {
            let why = format!(
                "{} s of healthy observation, traffic in {} distinct hours, {} would-be denials",
                observed.healthy_seconds, observed.distinct_hours, observed.would_be_denials
            );
            all.due.push((segment.name.clone(), why));
        } else {
            all.waiting.push((segment.name.clone(), unmet));
        }
    }
    all
}

/// The last decision that changed what the segment is held to: from there on it was audited as it is now.
fn since(state: &State, segment: &str, members: &BTreeSet<Workload>) -> Timestamp {
    let about = |subject: &str| subject == segment || subject.split([' ', ',']).any(|word| members.iter().any(|w| w.to_string() == word));
    // A rejection changes nothing of that.
    let mut decisions = state.decisions.iter().rev().filter(|decision| decision.action != Action::Reject);
    let last = decisions.find(|decision| about(&decision.subject) || decision.rules.iter().any(|rule| about(rule)));
    // Without any such decision in the record nothing was audited yet.
    last.map_or(state.now, |decision| decision.time)
}

fn observed(state: &State, segment: &str) -> Observed {
    let is_member = |workload: &Workload| segment_name(state, workload).as_deref() == Some(segment);
    // Those that do not run just now too: what starts once a night is cut by a promotion like the rest.
    let members: BTreeSet<Workload> = state.known().into_iter().filter(is_member).collect();
    let since = since(state, segment, &members);
    let first = HourSet::hour_of(since);
    let mut hours = HourSet::default();
    let mut would_be_denials = 0;
    for (key, evidence) in state.graph.iter() {
        if ![&key.from, &key.to].into_iter().filter_map(Endpoint::workload).any(|workload| members.contains(workload)) {
            continue;
        }
        hours.merge(&HourSet::from_runs(evidence.hours.runs().iter().filter(|run| run.1 >= first).map(|&(a, b)| (a.max(first), b))));
        let recent = evidence.last.is_some_and(|last| last >= since);
        // Counts are over all time, so an edge that was denied before and is still would be counts whole: too careful, never too bold.
        if recent && evidence.would_deny > 0 && state.judge(&key.from, &key.to, key.service).verdict != Verdict::Allow {
            would_be_denials += evidence.would_deny;
        }
    }
    let runs_here = |node: &&super::node::Node| node.inventory.containers.values().any(|c| members.contains(&c.workload));
    let healthy = state.nodes.values().filter(runs_here).map(|node| node.sight.healthy_since(since)).min();
    // A whole suggestion is work; mostly everything is decided.
    let open = members.iter().filter(|workload| state.outlines.get(*workload).is_some_and(|outline| outline.undecided > 0));
    let undecided = |workload: &Workload| {
        let suggestion = state.suggestion(workload).ok()?;
        Some((workload.clone(), promote::undecided(&suggestion, since).count())).filter(|(_, rules)| *rules > 0)
    };
    Observed {
        undecided: open.filter_map(undecided).collect(),
        unlisted: state.unlisted().into_iter().filter(|(workload, _)| members.contains(workload)).collect(),
        healthy_seconds: healthy.unwrap_or(0),
        distinct_hours: hours.hours(),
        would_be_denials,
        unlearned: review::unlearned(&state.set, segment, &state.networks, state.now),
    }
}
