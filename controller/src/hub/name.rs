//! What a name on a command line means: a project, a network, a workload, an end of a flow.

use std::collections::BTreeSet;

use policy::segment::{Refusal, Selector};
use policy::{Endpoint, Mode, Segment, Workload};

use super::HubError;
use super::state::State;

/// What a member is, by what is known here; a prefix says it outright, also of what doesn't run yet.
pub(crate) fn selector(state: &State, text: &str) -> Result<Selector, HubError> {
    let workload = |name: &str| name.parse::<Workload>().map(Selector::Workload).map_err(|e| HubError::invalid(e, ""));
    let plain = |name: &str| -> Result<String, HubError> {
        if name.is_empty() || name.contains('/') || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(HubError::invalid(format_args!("\"{name}\" is not a name of a project or a network"), ""));
        }
        Ok(name.to_owned())
    };
    match text.split_once(':') {
        Some(("project", name)) => return plain(name).map(Selector::Project),
        Some(("network", name)) => return plain(name).map(Selector::Network),
        Some(("workload", name)) => return workload(name),
        Some((kind, _)) => {
            let next = "Write project:NAME, network:NAME, workload:NAME or a plain name.";
            return Err(HubError::invalid(format_args!("\"{kind}:\" is no kind of member"), next));
        }
        None => {}
    }
    let mut found = BTreeSet::new();
    if state.networks.keys().any(|w| !w.namespace().is_empty() && w.namespace() == text) {
        found.insert(Selector::Project(text.to_owned()));
    }
    if state.nodes.values().flat_map(|node| node.inventory.networks.values()).any(|network| network.name == text) {
        found.insert(Selector::Network(text.to_owned()));
    }
    if let Ok(workload) = text.parse::<Workload>()
        && state.known().contains(&workload)
    {
        found.insert(Selector::Workload(workload));
    }
    let mut found = found.into_iter();
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (Some(_), Some(_)) => {
            let what = format!("\"{text}\" is the name of more than one thing");
            Err(HubError::invalid(what, format!("Write project:{text}, network:{text} or workload:{text}.")))
        }
        (None, _) => {
            let what = format!("\"{text}\" is no running project, no network and no workload that is known here");
            Err(HubError::not_found(what, format!("For one that comes later write project:{text}, network:{text} or workload:{text}.")))
        }
    }
}

/// Whether a typed name means this member.
pub(crate) fn means(text: &str, member: &Selector) -> bool {
    let (kind, name) = text.split_once(':').map_or((None, text), |(kind, name)| (Some(kind), name));
    match member {
        Selector::Project(project) => kind.is_none_or(|kind| kind == "project") && project == name,
        Selector::Network(network) => kind.is_none_or(|kind| kind == "network") && network == name,
        Selector::Workload(workload) => kind.is_none_or(|kind| kind == "workload") && workload.to_string() == name,
    }
}

/// How a segment is called when nobody says it: after its first member.
pub(crate) fn of_segment(first: &Selector) -> String {
    match first {
        Selector::Project(name) | Selector::Network(name) => name.clone(),
        Selector::Workload(workload) => workload.to_string().replace('/', "-"),
    }
}

/// A segment's name stands in commands, paths and documents.
pub(crate) fn check_segment(name: &str) -> Result<(), HubError> {
    let fits = !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if fits {
        Ok(())
    } else {
        Err(HubError::invalid(format_args!("\"{name}\" is not a name for a segment"), "Letters, digits, - _ and . make one."))
    }
}

/// A segment as it begins.
pub(crate) fn new_segment(name: &str) -> Segment {
    Segment { name: name.to_owned(), members: BTreeSet::new(), mode: Mode::Learn, refusal: Refusal::default(), promotion: None }
}

/// Whether an end of a flow is meant by what was typed: `shop/web`, `shop/` (a project), `web` (any workload of that name),
/// `host:`, `outside:` (any address outside), `outside:192.0.2.7`.
pub(crate) fn end_is(text: &str, end: &Endpoint) -> bool {
    let printed = end.to_string();
    if printed == text {
        return true;
    }
    match end {
        Endpoint::Workload(w) | Endpoint::Run(w) => {
            w.to_string() == text || w.name() == text || text.strip_suffix('/').is_some_and(|project| project == w.namespace())
        }
        Endpoint::Host => text == "host",
        Endpoint::Outside(address) => text == "outside" || text == "outside:" || within(text.strip_prefix("outside:"), *address),
        Endpoint::Unmanaged { name, address } => {
            matches!(text, "unmanaged" | "unmanaged:") || name == text || within(text.strip_prefix("outside:"), *address)
        }
        Endpoint::Unknown(_) => matches!(text, "unknown" | "unknown:"),
    }
}

/// That something here is called so, or is of a sort that may come any time.
pub(crate) fn must_know_end(state: &State, text: &str) -> Result<(), HubError> {
    let any_time = ["host", "outside", "unmanaged", "unknown"].iter().any(|sort| text.split(':').next() == Some(*sort));
    let seen = || state.graph.endpoints().chain(state.flows.iter().flat_map(|kept| [&kept.view.flow.from, &kept.view.flow.to]));
    let runs = || state.known().into_iter().any(|workload| end_is(text, &Endpoint::Workload(workload)));
    if any_time || seen().any(|end| end_is(text, end)) || runs() {
        return Ok(());
    }
    match text.parse::<Workload>() {
        Ok(workload) => state.must_know(&workload),
        Err(_) => {
            let next = "Write shop/web, shop/ (a whole project), web, host:, outside: or outside:192.0.2.0/24. `bulkhead get workloads` lists who runs.";
            Err(HubError::not_found(format_args!("\"{text}\" is no end of a flow that is known here"), next))
        }
    }
}

fn within(text: Option<&str>, address: std::net::IpAddr) -> bool {
    text.and_then(|text| text.parse::<ipnet::IpNet>().ok()).is_some_and(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_named_in_any_of_its_ways() {
        let web = Endpoint::Workload(Workload::new("shop", "web"));
        let outside = Endpoint::Outside("192.0.2.7".parse().unwrap());
        for (text, end, is) in [
            ("shop/web", &web, true),
            ("shop/", &web, true),
            ("web", &web, true),
            ("shop", &web, false),
            ("shop/db", &web, false),
            ("outside:", &outside, true),
            ("outside:192.0.2.7", &outside, true),
            ("outside:192.0.2.0/24", &outside, true),
            ("outside:198.51.100.0/24", &outside, false),
            ("host:", &Endpoint::Host, true),
        ] {
            assert_eq!(end_is(text, end), is, "{text} {end}");
        }
    }
}
