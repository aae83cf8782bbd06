//! What the API is asked, as data. Unknown fields are refused: a typing mistake in a script must not approve more than meant.

use jiff::Timestamp;
use policy::{Mode, Workload};
use serde::{Deserialize, Serialize};

use super::view::Document;

/// Bytes of a request: as much as a plan may have on its way to a node, some million rules.
pub const LARGEST_REQUEST: usize = 64 << 20;

/// Which edges. Empty: all.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct GraphFilter {
    /// Edges that touch this workload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// Edges that touch a workload of this segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment: Option<String>,
    /// Edges seen at or after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
}

/// Which flows. Empty: all that are kept.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowFilter {
    /// Seen at or after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// At most so many, the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<usize>,
    /// From this endpoint: as printed, or a project (`shop/`), or any workload of that name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// To this endpoint; as `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// On this port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of this protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<policy::Protocol>,
    /// With this verdict: `allow`, `would-deny`, `deny`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<VerdictName>,
    /// Go on as they come.
    pub follow: bool,
}

/// A verdict as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum VerdictName {
    /// Passed.
    Allow,
    /// Passed, and would be denied under Enforce.
    WouldDeny,
    /// Denied.
    Deny,
}

impl VerdictName {
    /// The verdict meant.
    pub fn verdict(self) -> policy::Verdict {
        match self {
            Self::Allow => policy::Verdict::Allow,
            Self::WouldDeny => policy::Verdict::WouldDeny,
            Self::Deny => policy::Verdict::Deny,
        }
    }
}

/// A decision on a suggestion.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Review {
    /// On whose suggestion.
    pub workload: Workload,
    /// The digest that was read; refused when it moved.
    pub digest: String,
    /// Only these rules, by id; empty: the whole.
    #[serde(default)]
    pub rules: Vec<String>,
    /// Codes of blocking findings that are taken knowingly.
    #[serde(default)]
    pub accept: Vec<String>,
    /// Why.
    #[serde(default)]
    pub comment: String,
    /// False: reject.
    pub approve: bool,
    /// Workloads that the same person decides on next: what is missing on their side is not worth a word yet.
    #[serde(default)]
    pub later: Vec<Workload>,
}

/// An edge allowed by hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Allow {
    /// Client: a workload, `host:` or `outside:NETWORK`.
    pub from: policy::Peer,
    /// Server; as `from`.
    pub to: policy::Peer,
    /// The server's ports.
    pub ports: policy::Ports,
    /// For so many seconds; `None`: until somebody takes it back.
    #[serde(default)]
    pub seconds: Option<u64>,
    /// Why.
    #[serde(default)]
    pub comment: String,
}

/// A policy written by hand.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edit {
    /// The document, as `get policy -o yaml` printed it and a person changed it.
    pub document: String,
    /// Revision of the policy that was changed; refused when it moved. 0: there was none.
    pub revision: u64,
    /// Why.
    #[serde(default)]
    pub comment: String,
    /// Generation of the forecast that was read; `None`: where something is in Enforce afterwards, only forecast.
    #[serde(default)]
    pub confirm: Option<u64>,
}

/// Back to an earlier revision of a policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Revert {
    /// Whose policy.
    pub workload: Workload,
    /// Which revision; `None`: the one before.
    #[serde(default)]
    pub to: Option<u64>,
    /// Why.
    #[serde(default)]
    pub comment: String,
    /// Generation of the forecast that was read; `None`: where something is in Enforce afterwards, only forecast.
    #[serde(default)]
    pub confirm: Option<u64>,
}

/// Members of a segment, added or taken out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Members {
    /// Of which segment; `None`: named after the first member.
    #[serde(default)]
    pub segment: Option<String>,
    /// Compose projects, networks, workloads, as typed: `shop`, `shop/db`, or `project:`, `network:`, `workload:` before it.
    pub members: Vec<String>,
    /// Workloads that may come under Enforce without an approved policy.
    #[serde(default)]
    pub deny_unlearned: Vec<Workload>,
    /// Take them out.
    #[serde(default)]
    pub remove: bool,
    /// Why.
    #[serde(default)]
    pub comment: String,
    /// Generation of the forecast that is confirmed, where one was given.
    #[serde(default)]
    pub confirm: Option<u64>,
}

/// Another mode for a segment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Switch {
    /// Which segment, or Compose project.
    pub segment: String,
    /// To which mode.
    pub mode: Mode,
    /// Workloads that are denied everything knowingly.
    #[serde(default)]
    pub deny_unlearned: Vec<Workload>,
    /// Generation of the forecast that was read; `None`: only forecast. Not needed for a switch back.
    #[serde(default)]
    pub confirm: Option<u64>,
    /// Why.
    #[serde(default)]
    pub comment: String,
}

/// One workload and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OfWorkload {
    /// Which.
    pub workload: Workload,
    /// Why.
    #[serde(default)]
    pub comment: String,
}

/// Documents to apply.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Apply {
    /// Files with one document or several each, YAML or JSON; their names are for messages. All of it is one decision.
    pub documents: Vec<Document>,
    /// Workloads that may come under Enforce without an approved policy.
    #[serde(default)]
    pub deny_unlearned: Vec<Workload>,
    /// Why.
    #[serde(default)]
    pub comment: String,
    /// Say what would change and change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Generation of the forecast that was read; `None`: where something is in Enforce afterwards, only forecast.
    #[serde(default)]
    pub confirm: Option<u64>,
}

/// A guardrail to take out.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Delete {
    /// Its name.
    pub guardrail: String,
    /// Why.
    #[serde(default)]
    pub comment: String,
}

/// A comment alone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Comment {
    /// Why.
    pub comment: String,
    /// What it is about, where the record should say so (segments that lose protection).
    pub subject: String,
}

/// A question to `explain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Question {
    /// Client.
    pub from: policy::Endpoint,
    /// Server.
    pub to: policy::Endpoint,
    /// Protocol and port.
    pub service: policy::Service,
}

/// Which format an export has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// Bulkhead's own kinds, YAML; `apply -f` reads them back without loss.
    Kinds,
    /// Kubernetes NetworkPolicy, YAML; what it cannot say stands in front as comments.
    Networkpolicy,
    /// Bulkhead's own kinds, JSON.
    Json,
}

/// What to export.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Export {
    /// Format.
    pub format: ExportFormat,
    /// Networks of the cluster's pods, separated by commas, for NetworkPolicies; `None`: any private address may be a pod's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<String>,
    /// Namespace of workloads that have none, for NetworkPolicies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}
