//! What the authors of an application meant: its folder, and the list of its edges.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lab::{Host, eventually};

use policy::Peer;
use policy::policy_set::Direction;
use policy::suggestion::{Origin, Suggestion};

/// The folder of one application, if the applications are on this machine.
pub(crate) fn folder(app: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/oracles");
    let all = std::env::var_os("BULKHEAD_ORACLES").map_or_else(beside, PathBuf::from);
    let folder = all.join("apps").join(app);
    folder.join("edges.txt").is_file().then_some(folder)
}

/// client, server, and protocol/port of the server's container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    /// Service of the Compose file.
    pub(crate) client: String,
    /// Service of the Compose file.
    pub(crate) server: String,
    /// `tcp/5432`.
    pub(crate) port: String,
}

impl Edge {
    pub(crate) fn new(client: &str, server: &str, port: &str) -> Self {
        Self { client: client.to_owned(), server: server.to_owned(), port: port.to_owned() }
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {}", self.client, self.server, self.port)
    }
}

/// Reads `edges.txt`: three words a line, `#` begins a comment.
pub(crate) fn edges(folder: &Path) -> BTreeSet<Edge> {
    let text = fs::read_to_string(folder.join("edges.txt")).unwrap();
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|line| !line.is_empty());
    lines
        .map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [client, server, port, ..] => Edge::new(client, server, port),
            _ => panic!("edges.txt: {line:?} is not CLIENT SERVER PROTOCOL/PORT"),
        })
        .collect()
}

/// The edges between workloads of one project that these suggestions propose, from both sides. A rule that only a person may
/// add by name (a denied attempt) is not a proposal.
fn proposed(suggestions: &[Suggestion], project: &str) -> [BTreeSet<Edge>; 2] {
    let mut sides = [BTreeSet::new(), BTreeSet::new()];
    for suggestion in suggestions.iter().filter(|s| s.workload.namespace() == project) {
        for proposed in suggestion.rules.iter().filter(|r| r.origin != Origin::DeniedAttempt) {
            let Peer::Workload(peer) = &proposed.rule.peer else { continue };
            let port = proposed.rule.ports.to_string();
            // A workload of another project on one side would be a false proposal as well: it keeps its full name.
            let name = if peer.namespace() == project { peer.name().to_owned() } else { peer.to_string() };
            match proposed.direction {
                Direction::Egress => sides[0].insert(Edge::new(suggestion.workload.name(), &name, &port)),
                Direction::Ingress => sides[1].insert(Edge::new(&name, suggestion.workload.name(), &port)),
            };
        }
    }
    sides
}

/// Precision and recall of what is proposed, both 1.0 or a list of what is too much and what is missing.
fn compare_side(side: &str, proposed: &BTreeSet<Edge>, meant: &BTreeSet<Edge>) -> Result<(), String> {
    let list = |edges: Vec<&Edge>| edges.into_iter().map(|e| format!("\n  {e}")).collect::<String>();
    let (extra, missing) = (list(proposed.difference(meant).collect()), list(meant.difference(proposed).collect()));
    if extra.is_empty() && missing.is_empty() {
        return Ok(());
    }
    let both = proposed.intersection(meant).count() as f64;
    let (precision, recall) = (both / proposed.len().max(1) as f64, both / meant.len().max(1) as f64);
    Err(format!("{side}: precision {precision:.2}, recall {recall:.2}\nproposed and not meant:{extra}\nmeant and not proposed:{missing}"))
}

/// Both sides of what is proposed come to be exactly what was meant, and stay so.
pub(crate) fn exactly(bulkhead: &Host<'_>, project: &str, meant: &BTreeSet<Edge>) {
    let compare = || {
        let [egress, ingress] = proposed(&suggestions(bulkhead, project)?, project);
        compare_side("egress", &egress, meant)?;
        compare_side("ingress", &ingress, meant)
    };
    eventually(Duration::from_secs(30), compare);
    // Nothing wrong comes after the right.
    std::thread::sleep(Duration::from_secs(3));
    compare().unwrap_or_else(|e| panic!("it was right, and then: {e}"));
}

fn suggestions(bulkhead: &Host<'_>, project: &str) -> Result<Vec<Suggestion>, String> {
    let read = |words: &[&str]| {
        let out = bulkhead.try_bulkhead(words.iter().copied());
        if out.status.success() { Ok(out.stdout) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    };
    let listed = String::from_utf8_lossy(&read(&["get", "suggestions"])?).into_owned();
    let names = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with(&format!("{project}/"))));
    let one = |name| {
        let bytes = read(&["describe", "suggestion", name, "-o", "json"])?;
        serde_json::from_slice(&bytes).map_err(|e| format!("the suggestion of {name}: {e}\n{}", String::from_utf8_lossy(&bytes)))
    };
    names.map(one).collect()
}
