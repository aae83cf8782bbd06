//! The objects in force as documents of their kinds, and back: export, apply, edit.

use std::collections::BTreeMap;

use crds::policy_review::{PolicyReviewSpec, Verdict};
use crds::{Intent, Object, network_policy, yaml};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use policy::{PolicySet, Workload, WorkloadPolicy, diff};
use serde_json::value::RawValue;

use super::HubError;
use super::state::State;
use crate::api::ask::{Export, ExportFormat, Review};
use crate::api::view::Document;

fn unreadable(file: &str, error: &dyn std::error::Error) -> HubError {
    let place = if file == "-" { "the input" } else { file };
    let what = super::chain(error);
    let next = format!("Nothing was changed. {}", example(&what));
    HubError::invalid(format_args!("{place}: {what}"), next)
}

/// Where a person finds a good document of the kind that an error is about.
fn example(error: &str) -> &'static str {
    let mut kinds = Object::KINDS.iter().filter(|kind| error.contains(**kind));
    match (kinds.next().copied(), kinds.next()) {
        (Some("WorkloadPolicy"), None) => {
            "`bulkhead get policies -o yaml` shows what is in force, crds/README.md what a WorkloadPolicy looks like."
        }
        (Some("Segment"), None) => "`bulkhead get segments -o yaml` shows what a Segment looks like.",
        (Some("Guardrail"), None) => "crds/README.md shows what a Guardrail looks like.",
        (Some("Quarantine"), None) => "`bulkhead quarantine WORKLOAD` does the same without a document.",
        // More than one: it says which there are. None: it does not know what it should be.
        (Some(_), _) | (None, _) => {
            "crds/README.md shows what documents look like; crds/tests/good-input/every-kind.yaml has one of each kind."
        }
    }
}

/// What documents ask for.
pub(crate) enum Wanted {
    /// What is in force with its objects put in, and what they are.
    Set(PolicySet, String),
    /// A decision on a suggestion.
    Review(Review),
}

/// The objects of all files, each with its file; which of two that are the same is meant, nobody could say.
fn objects_of(files: &[Document]) -> Result<Vec<(&str, Object)>, HubError> {
    let mut found = Vec::new();
    let mut seen: BTreeMap<(&'static str, String), &str> = BTreeMap::new();
    for Document { file, text } in files {
        for object in yaml::read(&as_documents(text)).map_err(|e| unreadable(file, &e))? {
            let subject = object.subject().map_err(|e| unreadable(file, &e))?;
            if let Some(first) = seen.insert((object.kind(), subject), file) {
                return Err(HubError::invalid(
                    format_args!("{file}: {object} is in {first} too: which one is meant?"),
                    "Nothing was changed. Take one of the two away.",
                ));
            }
            found.push((file.as_str(), object));
        }
    }
    Ok(found)
}

/// Reads files of objects.
pub(crate) fn read(state: &State, files: &[Document]) -> Result<Wanted, HubError> {
    let objects = objects_of(files)?;
    if objects.is_empty() {
        let names = files.iter().map(|document| document.file.as_str()).collect::<Vec<_>>().join(", ");
        let next = "Nothing was changed. crds/README.md shows what documents look like; `bulkhead export` writes those in force.";
        return Err(HubError::invalid(format_args!("{names}: there is no object in it"), next));
    }
    let mut set = state.set.clone();
    let mut about = Vec::new();
    for &(file, ref object) in &objects {
        about.push(object.to_string());
        match object.intent().map_err(|e| unreadable(file, &e))? {
            Intent::Segment(segment) => {
                super::name::check_segment(&segment.name)?;
                set.segments.insert(segment.name.clone(), segment);
            }
            Intent::Policy(policy) => {
                set.policies.insert(policy.workload.clone(), policy);
            }
            Intent::Quarantine(quarantine) => {
                set.quarantines.insert(quarantine.workload.clone(), quarantine);
            }
            Intent::Guardrail(guardrail) => {
                set.guardrails.insert(guardrail.name.clone(), guardrail);
            }
            Intent::Review(spec) if objects.len() == 1 => {
                let PolicyReviewSpec { workload, digest, decision, rules, accept, comment } = spec;
                let approve = decision == Verdict::Approved;
                return Ok(Wanted::Review(Review { workload, digest, rules, accept, comment, approve, later: Vec::new() }));
            }
            // One line of the record names one digest and one comment.
            Intent::Review(_) => {
                let what = format!("{file}: {object} stands among other objects");
                return Err(HubError::invalid(
                    what,
                    "A review is a decision of its own: apply it from a file of its own. Nothing was changed.",
                ));
            }
        }
    }
    Ok(Wanted::Set(set, about.join(", ")))
}

/// What is different, a sentence each.
pub(crate) fn changes(before: &PolicySet, after: &PolicySet) -> Vec<String> {
    let diff::SetDiff { policies, segments, quarantines, guardrails } = diff::sets(before, after);
    let mut changes = Vec::new();
    for policy in policies {
        match policy.existence {
            diff::Existence::First => changes.push(format!("policy {}: new", policy.workload)),
            diff::Existence::Gone => changes.push(format!("policy {}: gone", policy.workload)),
            diff::Existence::Kept => {}
        }
        changes.extend(policy.removed.iter().map(|rule| format!("policy {}: - {rule}", policy.workload)));
        changes.extend(policy.added.iter().map(|rule| format!("policy {}: + {rule}", policy.workload)));
    }
    for segment in segments {
        changes.push(match (&segment.before, &segment.after) {
            (Some(before), Some(after)) if before.mode != after.mode => {
                format!("segment {}: {} -> {}", segment.name, before.mode, after.mode)
            }
            (Some(_), Some(_)) => format!("segment {}: members or options changed", segment.name),
            (None, _) => format!("segment {}: new", segment.name),
            (_, None) => format!("segment {}: gone", segment.name),
        });
    }
    for quarantine in quarantines {
        let what = if quarantine.after.is_some() { "cut off" } else { "given back" };
        changes.push(format!("quarantine {}: {what}", quarantine.name));
    }
    for guardrail in guardrails {
        changes.push(match (&guardrail.before, &guardrail.after) {
            (None, _) => format!("guardrail {}: new", guardrail.name),
            (Some(_), Some(_)) => format!("guardrail {}: changed", guardrail.name),
            (Some(_), None) => format!("guardrail {}: gone", guardrail.name),
        });
    }
    changes
}

/// The objects in force.
fn objects(set: &PolicySet) -> Vec<Object> {
    let segments = set.segments.values().map(Object::from);
    let policies = set.policies.values().map(Object::from);
    let quarantines = set.quarantines.values().map(Object::from);
    let guardrails = set.guardrails.values().map(Object::from);
    segments.chain(policies).chain(quarantines).chain(guardrails).collect()
}

/// A file name that any file system takes, distinct for distinct objects of one kind.
fn file(object: &Object, extension: &str) -> String {
    let metadata = object.metadata();
    let name = metadata.name.as_deref().unwrap_or("unnamed");
    let kind = object.kind().to_lowercase();
    match metadata.namespace.as_deref() {
        Some(namespace) if !namespace.is_empty() => format!("{kind}-{namespace}.{name}.{extension}"),
        Some(_) | None => format!("{kind}-{name}.{extension}"),
    }
}

/// Everything in force, in a format.
pub(crate) fn export(state: &State, export: &Export) -> Result<Vec<Document>, HubError> {
    let objects = objects(&state.set);
    match export.format {
        ExportFormat::Networkpolicy => network_policies(state, export),
        ExportFormat::Kinds => {
            let document = |object: &Object| Document { file: file(object, "yaml"), text: format!("---\n{}", yaml::write([object])) };
            Ok(objects.iter().map(document).collect())
        }
        ExportFormat::Json => {
            objects.iter().map(|object| Ok(Document { file: file(object, "json"), text: printed(&value(object)?)? })).collect()
        }
    }
}

/// What is approved, for a cluster.
fn network_policies(state: &State, export: &Export) -> Result<Vec<Document>, HubError> {
    let mut options = network_policy::Options::usual(state.now);
    if let Some(namespace) = &export.namespace {
        options.namespace.clone_from(namespace);
    }
    if let Some(pods) = &export.pods {
        let nets: Result<Vec<IpNet>, _> = pods.split(',').map(|net| net.trim().parse()).collect();
        options.pods = Some(
            nets.map_err(|_| HubError::invalid(format_args!("\"{pods}\" is not a list of networks"), "Write 10.244.0.0/16,fd00::/48."))?,
        );
    }
    let exported = network_policy::export(&state.set, &options)
        .map_err(|e| HubError::refused(super::chain(&e), "Give one of them another name, then export again."))?;
    let document = |policy: &NetworkPolicy| {
        let workload = policy.metadata.annotations.as_ref().and_then(|all| all.get(network_policy::WORKLOAD));
        let left_out = exported.left_out.iter().filter(|left| workload.is_some_and(|workload| *workload == left.workload.to_string()));
        let comments: String = left_out.map(|left| format!("# {left}\n")).collect();
        let named = [policy.metadata.namespace.as_deref(), policy.metadata.name.as_deref()];
        let name = named.into_iter().flatten().collect::<Vec<_>>().join(".");
        Document { file: format!("networkpolicy-{name}.yaml"), text: format!("---\n{comments}{}", yaml::document(policy)) }
    };
    Ok(exported.policies.iter().map(document).collect())
}

/// One object as JSON: the same document in another notation.
fn value(object: &Object) -> Result<serde_json::Value, HubError> {
    serde_norway::from_str(&yaml::write([object]))
        .map_err(|e| HubError::invalid(format_args!("{object} cannot be written as JSON: {e}"), ""))
}

fn printed(value: &impl serde::Serialize) -> Result<String, HubError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| HubError::invalid(format_args!("cannot be written as JSON: {e}"), ""))?;
    Ok(text + "\n")
}

/// JSON values, one after the other or in lists, as the stream of documents that the reader of YAML takes (JSON is YAML, and it
/// refuses double keys). Anything else is returned as it is.
fn as_documents(text: &str) -> String {
    let text = text.trim_start_matches('\u{feff}');
    if !text.trim_start().starts_with(['{', '[']) {
        return text.to_owned();
    }
    let mut documents: Vec<&str> = Vec::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
        // Not JSON after all: the reader of YAML says where and what.
        let Ok(value) = value else { return text.to_owned() };
        match serde_json::from_str::<Vec<&RawValue>>(value.get()) {
            Ok(list) => documents.extend(list.into_iter().map(RawValue::get)),
            Err(_) => documents.push(value.get()),
        }
    }
    documents.join("\n---\n")
}

/// Objects of one kind by name, as text.
pub(crate) fn of_kind(state: &State, kind: &str, names: &[String], as_json: bool) -> Result<String, HubError> {
    let mut found: Vec<(String, Object)> = match kind {
        "segments" => {
            super::view::segments(state).into_iter().map(|view| (view.segment.name.clone(), Object::from(&view.segment))).collect()
        }
        "suggestions" => state.suggestions().map(|s| (s.workload.to_string(), Object::from(&s))).collect(),
        "quarantines" => state.set.quarantines.values().map(|q| (q.workload.to_string(), Object::from(q))).collect(),
        "guardrails" => state.set.guardrails.values().map(|g| (g.name.clone(), Object::from(g))).collect(),
        "policies" => state.set.policies.values().map(|policy| (policy.workload.to_string(), Object::from(policy))).collect(),
        other => return Err(HubError::invalid(format_args!("\"{other}\" is no kind of object"), "")),
    };
    if let Some(missing) = names.iter().find(|name| !found.iter().any(|(found, _)| found == *name)) {
        return Err(HubError::not_found(
            format_args!("\"{missing}\" is not among the {kind}"),
            format!("`bulkhead get {kind}` lists them."),
        ));
    }
    found.retain(|(name, _)| names.is_empty() || names.contains(name));
    if as_json {
        let all: Result<Vec<serde_json::Value>, HubError> = found.iter().map(|(_, object)| value(object)).collect();
        return printed(&all?);
    }
    Ok(yaml::write(found.iter().map(|(_, object)| object)))
}

/// A policy as the editor shows it.
pub(crate) fn to_edit(state: &State, workload: &Workload) -> Result<(String, u64), HubError> {
    state.must_know(workload)?;
    let revision = state.revisions.get(workload).map_or(0, |(revision, _)| *revision);
    let empty = WorkloadPolicy::empty(workload.clone());
    let policy = state.set.policies.get(workload).unwrap_or(&empty);
    let head = format!(
        "# The policy of {workload}, revision {revision}. It is put in force when you save and leave the editor; leave it\n\
         # unchanged to change nothing. Ports are written tcp/5432, udp/8000-8010, icmp/8; peers shop/web, host:, outside:192.0.2.0/24.\n"
    );
    Ok((head + &yaml::write([&Object::from(policy)]), revision))
}

/// The policy that a person wrote.
pub(crate) fn read_policy(workload: &Workload, text: &str) -> Result<WorkloadPolicy, HubError> {
    let objects = yaml::read(text).map_err(|e| unreadable("the edited policy", &e))?;
    let [object] = objects.as_slice() else {
        return Err(HubError::invalid(format_args!("the edited text holds {} objects instead of one policy", objects.len()), ""));
    };
    match object.intent().map_err(|e| unreadable("the edited policy", &e))? {
        Intent::Policy(policy) if policy.workload == *workload => Ok(policy),
        Intent::Policy(policy) => {
            let what = format!("the edited policy is of {}, not of {workload}", policy.workload);
            Err(HubError::invalid(what, "A policy stays with its workload; `bulkhead apply -f` takes policies of others."))
        }
        Intent::Segment(_) | Intent::Quarantine(_) | Intent::Review(_) | Intent::Guardrail(_) => {
            Err(HubError::invalid(format_args!("{object} is not a policy"), ""))
        }
    }
}
