//! The graph for people: DOT, Mermaid, SVG. Names are written by whoever runs containers, so every label is escaped for the format
//! it stands in; nothing of a name can become markup.

mod dot;
mod labels;
mod layout;
mod mermaid;
mod svg;

use std::collections::BTreeMap;

use policy::{Endpoint, Verdict};

pub use dot::dot;
pub use mermaid::mermaid;
pub use svg::svg;

use crate::api::view::{EdgeView, GraphView};

/// Red, as `deny` is shown everywhere.
const DENIED: &str = "#c62828";
/// Orange, as `would deny`.
const WOULD_BE: &str = "#ef6c00";
/// Grey-blue: allowed.
const ALLOWED: &str = "#37474f";

/// What can be drawn as one line: all edges between two ends that have the same verdict.
struct Bundle<'a> {
    from: usize,
    to: usize,
    /// What happens to the next connection; the worst of what was counted where nothing passed.
    verdict: Verdict,
    /// Nothing of it was ever in use: drawn dashed.
    attempts_only: bool,
    direction_known: bool,
    edges: Vec<&'a EdgeView>,
}

impl Bundle<'_> {
    fn colour(&self) -> &'static str {
        match self.verdict {
            Verdict::Deny => DENIED,
            Verdict::WouldDeny => WOULD_BE,
            Verdict::Allow => ALLOWED,
        }
    }

    /// One line a port: `tcp/5432 (412)`.
    fn labels(&self) -> Vec<String> {
        /// A port scan has thousands of edges; a picture has room for some.
        const LINES: usize = 8;
        let count = |edge: &EdgeView| {
            let seen = &edge.evidence;
            if seen.used() > 0 { seen.used() } else { seen.attempts() + seen.denied + seen.would_deny }
        };
        let mut lines: Vec<String> = self.edges.iter().take(LINES).map(|edge| format!("{} ({})", edge.service, count(edge))).collect();
        if self.edges.len() > LINES {
            lines.push(format!("and {} more", self.edges.len() - LINES));
        }
        lines
    }
}

/// The picture's content: ends in order, and the lines between them.
struct Drawing<'a> {
    ends: Vec<&'a Endpoint>,
    bundles: Vec<Bundle<'a>>,
}

impl<'a> Drawing<'a> {
    fn of(view: &'a GraphView) -> Self {
        let mut numbers: BTreeMap<&Endpoint, usize> = BTreeMap::new();
        for edge in &view.edges {
            numbers.insert(&edge.from, 0);
            numbers.insert(&edge.to, 0);
        }
        for (number, slot) in numbers.values_mut().enumerate() {
            *slot = number;
        }
        let mut bundles: BTreeMap<(usize, usize, Verdict, bool, bool), Vec<&EdgeView>> = BTreeMap::new();
        for edge in &view.edges {
            let attempts_only = edge.evidence.used() == 0;
            // What is allowed now and was denied when it was tried is shown as what happened to it.
            let verdict = match edge.verdict {
                Verdict::Allow if attempts_only && edge.evidence.denied > 0 => Verdict::Deny,
                Verdict::Allow if attempts_only && edge.evidence.would_deny > 0 => Verdict::WouldDeny,
                verdict => verdict,
            };
            let key = (numbers[&edge.from], numbers[&edge.to], verdict, attempts_only, edge.direction_known);
            bundles.entry(key).or_default().push(edge);
        }
        let bundle = |((from, to, verdict, attempts_only, direction_known), edges)| Bundle {
            from,
            to,
            verdict,
            attempts_only,
            direction_known,
            edges,
        };
        Self { ends: numbers.into_keys().collect(), bundles: bundles.into_iter().map(bundle).collect() }
    }
}

/// What an end is, for its shape.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Workload,
    Host,
    Elsewhere,
    Unknown,
}

impl From<&Endpoint> for Shape {
    fn from(end: &Endpoint) -> Self {
        match end {
            Endpoint::Workload(_) | Endpoint::Run(_) => Self::Workload,
            Endpoint::Host => Self::Host,
            Endpoint::Outside(_) | Endpoint::Unmanaged { .. } => Self::Elsewhere,
            Endpoint::Unknown(_) => Self::Unknown,
        }
    }
}
