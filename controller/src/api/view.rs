//! What the API answers, as data: read by the command line, by scripts (`-o json`), later by the page. Fields are only added.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use policy::evaluate::Side;
use policy::flow::Flow;
use policy::review::Decision as Recorded;
use policy::status::{Ended, NodeStatus};
use policy::suggestion::Phase;
use policy::{EdgeKey, Endpoint, Evidence, Mode, Segment, Service, Verdict, Workload};
use serde::{Deserialize, Serialize};

/// One edge of the graph with what the policies in force say of it now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EdgeView {
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and port.
    pub service: Service,
    /// False: who called whom is not known.
    pub direction_known: bool,
    /// What was counted.
    pub evidence: Evidence,
    /// What would happen to the next connection.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

/// The graph, filtered as asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GraphView {
    /// The edges in order.
    pub edges: Vec<EdgeView>,
    /// Edges that the filter left out.
    pub left_out: u64,
    /// Kernel events lost by all nodes so far: the graph may lack that much.
    pub lost: u64,
    /// Nodes whose agent sees nothing or not all right now, with the reason.
    pub blind: Vec<String>,
}

/// One flow with its verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// Which node saw it.
    pub node: String,
    /// What was seen. Its `reason` is filled for every verdict: the rule that allows, or what denies.
    #[serde(flatten)]
    pub flow: Flow,
    /// What happened to it.
    pub verdict: Verdict,
}

/// One line of `get suggestions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SuggestionLine {
    /// For whom.
    pub workload: Workload,
    /// Its segment, if it is in one.
    pub segment: Option<String>,
    /// See [`policy::suggestion::Suggestion`].
    pub revision: u64,
    /// See there.
    pub digest: String,
    /// See there.
    pub phase: Phase,
    /// Proposed rules in all.
    pub rules: u64,
    /// Of these, undecided.
    pub undecided: u64,
    /// Findings by weight: blocking, warning, info.
    pub findings: (u64, u64, u64),
    /// When evidence last changed.
    pub updated: Option<Timestamp>,
}

/// Which segment, and how it came to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SegmentView {
    /// The segment.
    #[serde(flatten)]
    pub segment: Segment,
    /// True: nobody wrote it down; it is the Compose project's own, in Learn.
    pub implicit: bool,
    /// Running workloads that are in it.
    pub workloads: BTreeSet<Workload>,
    /// Of these, without an approved policy.
    pub unlearned: BTreeSet<Workload>,
}

/// How a workload is treated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadView {
    /// Which.
    pub workload: Workload,
    /// Its segment and that segment's mode.
    pub segment: Option<String>,
    /// See `segment`; Learn where there is none.
    pub mode: Mode,
    /// Has an approved policy.
    pub approved: bool,
    /// Is cut off.
    pub quarantined: bool,
    /// Containers that run, by node.
    pub containers: Vec<ContainerView>,
    /// Names of the networks it is attached to.
    pub networks: BTreeSet<String>,
    /// Why no protection may be claimed for it; empty: it may.
    pub unmanaged: BTreeSet<String>,
}

/// One running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerView {
    /// Where.
    pub node: String,
    /// The engine's name.
    pub name: String,
    /// The engine's id.
    pub id: String,
    /// Image.
    pub image: String,
    /// Addresses, printed.
    pub addresses: Vec<String>,
    /// A one-off run.
    pub one_off: bool,
    /// Containers that share its network namespace.
    pub members: Vec<String>,
}

/// One network of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkView {
    /// Where.
    pub node: String,
    /// The engine's name.
    pub name: String,
    /// `bridge`, `macvlan`, ...
    pub driver: String,
    /// The bridge's interface.
    pub bridge: Option<String>,
    /// Subnets, printed.
    pub subnets: Vec<String>,
    /// No way out.
    pub internal: bool,
    /// `observed`, `audited`, `enforced`, `not enforced`, `not enforceable`, `unknown`.
    pub state: String,
    /// Why, where the state asks for it.
    pub why: String,
    /// Workloads attached.
    pub workloads: BTreeSet<Workload>,
}

/// A workload's policy with its place in the record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyView {
    /// The policy.
    #[serde(flatten)]
    pub policy: policy::WorkloadPolicy,
    /// Grows by one with each change of this policy.
    pub revision: u64,
    /// Who decided last, and when.
    pub decided: Option<Recorded>,
    /// Edges whose other end is under a segment and has no rule for them yet: approved on one side only.
    pub half_approved: Vec<String>,
}

/// A guardrail with what breaks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GuardrailView {
    /// The guardrail.
    #[serde(flatten)]
    pub guardrail: policy::guardrail::Guardrail,
    /// Rules that were in force before it and still are, printed.
    pub breaches: Vec<String>,
}

/// Would-be denials, aggregated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditLine {
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and port.
    pub service: Service,
    /// Flows that passed and would have been denied.
    pub would_deny: u64,
    /// Flows that were denied.
    pub denied: u64,
    /// When the edge was last seen.
    pub last: Option<Timestamp>,
    /// What the policies in force say now; a rule approved since shows as allow.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

/// Answer to `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Client.
    pub from: Endpoint,
    /// Server.
    pub to: Endpoint,
    /// Protocol and port.
    pub service: Service,
    /// What happens.
    pub verdict: Verdict,
    /// Why, in one line.
    pub reason: String,
    /// What the client's side says.
    pub egress: Side,
    /// What the server's side says.
    pub ingress: Side,
    /// What was seen of it, if anything.
    pub evidence: Option<Evidence>,
    /// What the engine itself forbids, whatever Bulkhead says.
    pub engine: Vec<String>,
    /// What else a person should know: not enforceable networks, one-off runs, what is always allowed.
    pub notes: Vec<String>,
}

/// What a switch to Enforce (or another change) would do, before it is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forecast {
    /// Edges seen in use so far that would be denied.
    pub denied: Vec<EdgeView>,
    /// Established connections that would end, by node.
    pub ended: BTreeMap<String, Vec<Ended>>,
    /// Workloads without an approved policy that would be denied everything.
    pub unlearned: BTreeSet<Workload>,
    /// Workloads with a policy of which nothing was ever seen.
    pub no_evidence: BTreeSet<Workload>,
    /// Workloads that go to Enforce, with how many flows of theirs were in use that the graph has no room to list: what of them would be
    /// denied is not known.
    #[serde(default)]
    pub unlisted: BTreeMap<Workload, u64>,
    /// Nodes that gave no answer, with the reason: their connections are not counted.
    pub silent: BTreeMap<String, String>,
    /// Generation it was made from; to be named when confirming.
    pub generation: u64,
    /// Segments that go to Enforce.
    pub switched: BTreeSet<String>,
}

impl Forecast {
    /// Whether a person has to be asked: a segment goes to Enforce, or something that works would be cut, or may be.
    pub fn asks(&self) -> bool {
        let cuts = !self.denied.is_empty() || self.ended.values().any(|ended| !ended.is_empty()) || !self.unlearned.is_empty();
        // Of who did not say what would be cut, nothing is known.
        cuts || !self.switched.is_empty() || !self.silent.is_empty()
    }

    /// The edges that would be cut, seen so far or alive.
    pub fn cuts(&self) -> impl Iterator<Item = EdgeKey> {
        let denied = self.denied.iter().map(|edge| EdgeKey {
            from: edge.from.clone(),
            to: edge.to.clone(),
            service: edge.service,
            direction_known: true,
        });
        denied.chain(self.ended.values().flatten().map(|ended| EdgeKey { direction_known: true, ..ended.edge.clone() }))
    }
}

/// Whether a decision is in force on a node, by what its agent said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InForce {
    /// In its kernel.
    Yes,
    /// The agent has a session and has not said: what was in force before stays until it does.
    Unanswered {
        /// For how many seconds it has been asked.
        seconds: u64,
    },
    /// No agent is connected: it gets the plan when it comes; its kernel keeps what it had.
    Away,
    /// It refused the plan, with the reason; its kernel keeps what it had.
    Refused(String),
}

/// What became of a decision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// What was recorded; `None`: nothing changed, or it was only a preview.
    pub recorded: Option<Recorded>,
    /// Generation in force now.
    pub generation: u64,
    /// Sentences for a person: what happened, what to do next.
    pub notes: Vec<String>,
    /// What it would do, where that was asked.
    pub forecast: Option<Forecast>,
    /// Where it is in force, by node. Empty: nothing was recorded, or nobody waited for it.
    #[serde(default)]
    pub nodes: BTreeMap<String, InForce>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// An agent has a session open.
    pub connected: bool,
    /// When something was last heard.
    pub heard: Option<Timestamp>,
    /// What it says of itself.
    pub status: NodeStatus,
    /// Why it refused the last plan; `None`: it didn't.
    pub refused: Option<String>,
    /// Whether the last generation is in force there.
    pub in_force: InForce,
    /// Healthy observed time, seconds.
    pub healthy_seconds: u64,
}

/// Answer to `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    /// Version of the controller.
    pub version: String,
    /// Id of the store.
    pub store: String,
    /// Generation in force.
    pub generation: u64,
    /// Nodes by name.
    pub nodes: Vec<NodeView>,
    /// Networks of all nodes.
    pub networks: Vec<NetworkView>,
    /// Segments.
    pub segments: Vec<SegmentView>,
    /// Containers that are not protected, with the reason, whatever their segment.
    pub unmanaged: Vec<String>,
    /// Who is cut off.
    pub quarantined: BTreeSet<Workload>,
    /// Edges in the graph.
    pub edges: u64,
    /// Sentences that hold now and must not be forgotten (names and resolvers, loss, what is not enforced).
    pub notes: Vec<String>,
}

/// One document of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    /// File name to save it under, unique within the export.
    pub file: String,
    /// The text.
    pub text: String,
}

/// What went wrong, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// What happened, to what.
    pub error: String,
    /// What kind of thing went wrong; decides the exit code.
    pub code: FailureCode,
    /// What to do next.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub next: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// The request makes no sense: malformed document, impossible port.
    Invalid,
    /// A rule refuses it: the digest moved, a workload has no policy.
    Refused,
    /// No such workload, segment, suggestion.
    NotFound,
    /// The caller may not speak here.
    Forbidden,
    /// Something of ours failed.
    Failed,
}

/// Answer to `version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionView {
    /// Version of the controller.
    pub version: String,
    /// Id of its store.
    pub store: String,
}

/// One line of a stream of flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FlowLine {
    /// A flow.
    Flow(Box<FlowView>),
    /// The reader was too slow.
    Lost {
        /// How many flows it missed.
        lost: u64,
    },
}
