//! Decisions about segments: who is in one, in which mode it is, and what a switch to Enforce must have said beforehand.

use std::collections::{BTreeMap, BTreeSet};

use policy::evaluate::{Scene, Standing};
use policy::review::{self, Action};
use policy::segment::{Selector, segment_of};
use policy::{Mode, PolicySet, Segment, Workload};

use super::super::state::State;
use super::super::{HubError, name};
use super::Decided;
use crate::api::ask::{Members, Switch};

fn is_enforced(state: &State, set: &PolicySet, workload: &Workload) -> bool {
    matches!(Scene { set, ..state.scene() }.standing(workload), Standing::Enforce(_))
}

/// Running workloads that are in Enforce by one set and not by the other.
fn only_by<'a>(state: &'a State, one: &'a PolicySet, other: &'a PolicySet) -> impl Iterator<Item = &'a Workload> {
    state.networks.keys().filter(move |workload| is_enforced(state, one, workload) && !is_enforced(state, other, workload))
}

/// Whether running workloads come under Enforce that were not.
pub(super) fn brings_under_enforce(state: &State, set: &PolicySet) -> bool {
    only_by(state, set, &state.set).next().is_some()
}

/// Running workloads that would be denied everything by this set and were not so far: in Enforce without an approved policy.
fn newly_unlearned(state: &State, set: &PolicySet) -> BTreeSet<Workload> {
    let denied = |set: &PolicySet, workload: &Workload| is_enforced(state, set, workload) && !set.policies.contains_key(workload);
    state.networks.keys().filter(|workload| denied(set, workload) && !denied(&state.set, workload)).cloned().collect()
}

/// Said when a change of members takes workloads out of Enforce: it is allowed, and must not happen unseen.
pub(super) fn loosened(state: &State, set: &PolicySet) -> Vec<String> {
    only_by(state, &state.set, set).map(|workload| format!("{workload} is not enforced any more.")).collect()
}

pub(super) fn refuse_unlearned(state: &State, set: &PolicySet, named: &[Workload]) -> Result<Vec<String>, HubError> {
    let members = |set: &PolicySet| -> BTreeSet<Selector> {
        let enforcing = set.segments.values().filter(|segment| segment.mode == Mode::Enforce);
        enforcing.flat_map(|segment| segment.members.iter().cloned()).collect()
    };
    if !members(set).is_subset(&members(&state.set)) {
        state.must_see_nodes()?;
    }
    let unlearned = newly_unlearned(state, set);
    let left: Vec<String> = unlearned.iter().filter(|workload| !named.contains(workload)).map(ToString::to_string).collect();
    if left.is_empty() {
        return Ok(unlearned.iter().map(|w| format!("{w} has no approved policy: all of its traffic is denied now.")).collect());
    }
    let what = format!("this puts workloads without an approved policy under Enforce: {}", left.join(", "));
    let next = format!("Approve their suggestions, or accept that all their traffic is denied: --deny-unlearned {}", left.join(","));
    Err(HubError::refused(what, next))
}

pub(super) fn with_members(state: &State, request: &Members) -> Result<Decided, HubError> {
    let Members { segment, members, deny_unlearned, remove: _, comment, confirm: _ } = request;
    let selectors: Vec<Selector> = members.iter().map(|text| name::selector(state, text)).collect::<Result<_, _>>()?;
    let segment = match (segment, selectors.first()) {
        (Some(name), _) => name.clone(),
        (None, Some(first)) => name::of_segment(first),
        (None, None) => return Err(HubError::invalid("no member is named", "")),
    };
    name::check_segment(&segment)?;
    let mut set = state.set.clone();
    let mut notes = Vec::new();
    for selector in &selectors {
        // A selector is in one segment: put here means taken from there.
        for other in set.segments.values_mut().filter(|other| other.name != segment) {
            if other.members.remove(selector) {
                notes.push(format!("{selector} was taken from segment {}.", other.name));
            }
        }
    }
    let entry = set.segments.entry(segment.clone()).or_insert_with(|| name::new_segment(&segment));
    entry.members.extend(selectors.iter().cloned());
    let mode = entry.mode;
    set.segments.retain(|name, segment_of_name| *name == segment || !segment_of_name.members.is_empty());
    notes.extend(refuse_unlearned(state, &set, deny_unlearned)?);
    notes.extend(loosened(state, &set));
    let mut decided = Decided::new(set, Action::Segment, &segment, comment);
    decided.rules = selectors.iter().map(|selector| format!("+ {selector}")).collect();
    decided.notes = notes;
    Ok(decided.note(format!("Segment {segment} is in {mode}.")))
}

pub(super) fn without_members(state: &State, request: &Members) -> Result<Decided, HubError> {
    let Members { segment, members, deny_unlearned, remove: _, comment, confirm: _ } = request;
    let mut set = state.set.clone();
    let mut touched: BTreeMap<String, Vec<Selector>> = BTreeMap::new();
    for text in members {
        let mut found = false;
        for candidate in set.segments.values_mut().filter(|s| segment.as_ref().is_none_or(|name| *name == s.name)) {
            let gone: Vec<Selector> = candidate.members.iter().filter(|member| name::means(text, member)).cloned().collect();
            found |= !gone.is_empty();
            for member in gone {
                candidate.members.remove(&member);
                touched.entry(candidate.name.clone()).or_default().push(member);
            }
        }
        if !found {
            let of = segment.as_ref().map_or("any segment".to_owned(), |name| format!("segment {name}"));
            return Err(HubError::not_found(
                format_args!("\"{text}\" is not a member of {of}"),
                "`bulkhead get segments` lists the members.",
            ));
        }
    }
    set.segments.retain(|_, segment| !segment.members.is_empty());
    let mut notes = refuse_unlearned(state, &set, deny_unlearned)?;
    notes.extend(loosened(state, &set));
    for name in touched.keys().filter(|name| !set.segments.contains_key(*name)) {
        notes.push(format!("Segment {name} has no member left and is gone."));
    }
    let subject = touched.keys().cloned().collect::<Vec<_>>().join(", ");
    let mut decided = Decided::new(set, Action::Segment, subject, comment);
    decided.rules = touched.values().flatten().map(|selector| format!("- {selector}")).collect();
    decided.notes = notes;
    Ok(decided)
}

/// The set with the segment there: a Compose project that nobody put under a segment is one by itself.
fn with_segment(state: &State, segment: &str) -> Result<PolicySet, HubError> {
    let mut set = state.set.clone();
    if set.segments.contains_key(segment) {
        return Ok(set);
    }
    let of_project: Vec<&Workload> = state.networks.keys().filter(|w| !w.namespace().is_empty() && w.namespace() == segment).collect();
    let taken = |workload: &Workload| {
        let networks = state.networks.get(workload).into_iter().flatten().map(String::as_str);
        segment_of(set.segments.values(), workload, networks).is_some()
    };
    if of_project.is_empty() || of_project.iter().all(|workload| taken(workload)) {
        let known: BTreeSet<&str> =
            set.segments.keys().map(String::as_str).chain(state.networks.keys().map(|w| w.namespace())).filter(|n| !n.is_empty()).collect();
        let next = if known.is_empty() {
            "`bulkhead segment add` makes one.".to_owned()
        } else {
            format!("There are: {}.", known.into_iter().collect::<Vec<_>>().join(", "))
        };
        return Err(HubError::not_found(format_args!("there is no segment and no running Compose project \"{segment}\""), next));
    }
    let mut new = name::new_segment(segment);
    new.members.insert(Selector::Project(segment.to_owned()));
    set.segments.insert(segment.to_owned(), new);
    Ok(set)
}

fn set_mode(set: &mut PolicySet, segment: &str, mode: Mode) -> Option<Mode> {
    set.segments.get_mut(segment).map(|segment| std::mem::replace(&mut segment.mode, mode))
}

/// A switch to Enforce, before it is done: the set it would make, and what of it must be said.
pub(crate) fn to_enforce(state: &State, request: &Switch) -> Result<PolicySet, HubError> {
    state.must_see_nodes()?;
    let mut set = with_segment(state, &request.segment)?;
    for workload in &request.deny_unlearned {
        state.must_know(workload)?;
    }
    let named: BTreeSet<Workload> = request.deny_unlearned.iter().cloned().collect();
    review::to_enforce(&set, &request.segment, &state.networks, &named, state.now)?;
    set_mode(&mut set, &request.segment, Mode::Enforce);
    Ok(set)
}

pub(super) fn switched(state: &State, request: &Switch) -> Result<Decided, HubError> {
    let Switch { segment, mode, deny_unlearned, confirm, comment } = request;
    let before = with_segment(state, segment)?.segments.get(segment).map(|segment| segment.mode);
    if before == Some(*mode) {
        let decided = Decided::new(state.set.clone(), Action::Mode, segment, comment);
        return Ok(decided.note(format!("Segment {segment} is in {mode} already.")));
    }
    let before = before.unwrap_or_default();
    let set = match mode {
        Mode::Enforce => {
            must_be_foreseen(state, *confirm)?;
            to_enforce(state, request)?
        }
        Mode::Learn | Mode::Audit => {
            let mut set = with_segment(state, segment)?;
            set_mode(&mut set, segment, *mode);
            set
        }
    };
    let unlearned = review::unlearned(&set, segment, &state.networks, state.now);
    let mut decided = Decided::new(set, Action::Mode, segment, comment);
    decided.rules = vec![format!("{before} -> {mode}")];
    decided.rules.extend(deny_unlearned.iter().map(|workload| format!("deny unlearned {workload}")));
    decided.notes.push(format!("Segment {segment}: {before} -> {mode}."));
    match mode {
        Mode::Learn => {}
        Mode::Audit if unlearned.is_empty() => {}
        Mode::Audit => {
            let names = unlearned.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            decided.notes.push(format!("Without an approved policy, so that all their traffic would be denied: {names}."));
        }
        Mode::Enforce => {
            decided.notes.extend(unlearned.iter().map(|w| format!("{w} has no approved policy: all of its traffic is denied now.")));
            decided.notes.push(format!("Back at once, if something breaks: `bulkhead mode {segment} audit`."));
        }
    }
    Ok(decided)
}

pub(super) fn promoted(state: &State, segment: &str, why: &str) -> Result<Decided, HubError> {
    let mut set = state.set.clone();
    review::to_enforce(&set, segment, &state.networks, &BTreeSet::new(), state.now)?;
    let before = set_mode(&mut set, segment, Mode::Enforce).unwrap_or_default();
    let mut decided = Decided::new(set, Action::Promote, segment, why);
    decided.rules = vec![format!("{before} -> {}", Mode::Enforce)];
    Ok(decided)
}

/// Segments that are in Enforce afterwards and were not.
pub(crate) fn to_be_enforced(before: &PolicySet, after: &PolicySet) -> BTreeSet<String> {
    let in_enforce = |set: &PolicySet, name: &String| set.segments.get(name).is_some_and(|segment| segment.mode == Mode::Enforce);
    after.segments.keys().filter(|name| in_enforce(after, name) && !in_enforce(before, name)).cloned().collect()
}

/// That what is confirmed is what was foreseen.
pub(super) fn must_be_foreseen(state: &State, confirm: Option<u64>) -> Result<(), HubError> {
    match confirm {
        Some(generation) if generation == state.generation => Ok(()),
        Some(_) => {
            let what = "what is in force has changed since the forecast was made: nothing was changed";
            Err(HubError::refused(what, "Ask for the forecast again."))
        }
        None => {
            let what = "what is in Enforce with it is foreseen first, and the forecast must be confirmed: nothing was changed";
            Err(HubError::refused(what, "Ask for the forecast, and confirm its generation."))
        }
    }
}

/// A segment by itself, as the listing shows a project that nobody put under one.
pub(crate) fn implicit(project: &str) -> Segment {
    let mut segment = name::new_segment(project);
    segment.members.insert(Selector::Project(project.to_owned()));
    segment
}
