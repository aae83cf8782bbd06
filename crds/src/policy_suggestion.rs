//! `PolicySuggestion`: what is proposed for one workload, with its evidence, its findings and what is not known. Written by
//! the controller, read by people; nothing in it is in force.
//!
//! # Why
//! Peers and ports are plain texts in this schema. The API server prices each rule of a schema by the longest list there could
//! be, and refuses the whole definition past a limit; a suggestion has no longest list, and nobody writes one by hand.

use jiff::Timestamp;
use kube::CustomResource;
use policy::suggestion::{self, Origin, Phase, RuleState, Severity};
use policy::{EdgeKey, Endpoint, HourSet, Peer, Ports, Service, Workload, evidence, policy_set};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::Refused;
use crate::{object, schema};

/// What is proposed for one workload, with its evidence, its findings and what is not known. The controller writes it;
/// changing it changes nothing. To decide, write a PolicyReview that names its digest.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "PolicySuggestion",
    namespaced,
    status = "PolicySuggestionStatus",
    derive = "PartialEq",
    category = "bulkhead",
    shortname = "psug",
    doc = "What is proposed for one workload, with its evidence, its findings and what is not known. Written by the controller; to decide, write a PolicyReview that names its digest.",
    printcolumn(name = "Workload", type_ = "string", json_path = ".spec.workload"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Revision", type_ = "integer", json_path = ".status.revision"),
    printcolumn(name = "Undecided", type_ = "integer", json_path = ".status.undecided"),
    printcolumn(name = "Blocking", type_ = "integer", json_path = ".status.blocking"),
    printcolumn(name = "Digest", type_ = "string", json_path = ".status.digest", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySuggestionSpec {
    /// For whom, for example `shop/db`. Left out: the object's own namespace and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Workload>")]
    pub workload: Option<Workload>,
}

/// What was learned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicySuggestionStatus {
    /// Grows by one whenever the digest changes.
    pub revision: u64,
    /// SHA-256, in hex, over what an approval is about: rules, peers, options and blocking findings. Counts, times and bytes
    /// are outside it, so that live traffic doesn't move it.
    pub digest: String,
    /// How far the learning is. `Learning`: edges still appear. `Stabilizing`: none for a while, but not seen for long enough.
    /// `Stable`: little is expected to be unseen, over enough healthy observed time.
    #[schemars(with = "PhaseName")]
    pub phase: Phase,
    /// How many rules nobody decided on.
    pub undecided: u32,
    /// How many findings have to be accepted by name before it can be approved.
    pub blocking: u32,
    /// When the evidence last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Time>")]
    pub updated: Option<Timestamp>,
    /// What is not known.
    pub coverage: Coverage,
    /// What to know before approving, the heaviest first.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// What is proposed.
    #[serde(default)]
    pub rules: Vec<ProposedRule>,
    /// What was seen and is not proposed, with the reason.
    #[serde(default)]
    pub not_proposed: Vec<NotProposed>,
}

/// The names of the phases, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline)]
pub enum PhaseName {
    /// Edges still appear.
    Learning,
    /// No new edge for a while.
    Stabilizing,
    /// Little is expected to be unseen.
    Stable,
}

/// One proposed allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProposedRule {
    /// Short and stable name of the rule, for `spec.rules` of a PolicyReview and `bulkhead approve --rule`.
    pub id: String,
    /// `ingress`: others to the workload. `egress`: the workload to others.
    #[schemars(with = "DirectionName")]
    pub direction: policy_set::Direction,
    /// The other end, written as in a WorkloadPolicy.
    #[schemars(with = "String")]
    pub peer: Peer,
    /// The server's ports, written as in a WorkloadPolicy.
    #[schemars(with = "String")]
    pub ports: Ports,
    /// Until when the rule would hold. Left out: until somebody takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Time>")]
    pub until: Option<Timestamp>,
    /// Why it is proposed. `observed`: seen in use. `oneWay`: UDP that is repeated, never answered and never refused.
    /// `neededByEngine`: the engine's own resolver road. `counterpart`: the other side of a rule that is approved.
    /// `deniedAttempt`: tried under Enforce and denied; approved only by its id, never as part of the whole.
    #[schemars(with = "OriginName")]
    pub origin: Origin,
    /// Where it stands: `undecided`, `approved` (in force) or `rejected`.
    #[schemars(with = "StateName")]
    pub state: RuleState,
    /// What was counted for it, over all its edges.
    pub evidence: Evidence,
    /// The edges behind it.
    #[serde(default)]
    pub edges: Vec<Edge>,
}

/// The names of the directions, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline, rename_all = "camelCase")]
pub enum DirectionName {
    /// Others to the workload.
    Ingress,
    /// The workload to others.
    Egress,
}

/// The names of the origins, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline, rename_all = "camelCase")]
pub enum OriginName {
    /// Seen in use.
    Observed,
    /// UDP without answer.
    OneWay,
    /// The resolver's road.
    NeededByEngine,
    /// The other side.
    Counterpart,
    /// Denied under Enforce.
    DeniedAttempt,
}

/// The names of the states, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline, rename_all = "camelCase")]
pub enum StateName {
    /// Nobody decided.
    Undecided,
    /// In force.
    Approved,
    /// A person said no.
    Rejected,
}

/// One edge of the graph: who called whom, on what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edge {
    /// The client: a workload, `host:`, `outside:ADDRESS`, `unmanaged:NAME@ADDRESS` or `unknown:ADDRESS`.
    #[schemars(with = "String")]
    pub from: Endpoint,
    /// The server.
    #[schemars(with = "String")]
    pub to: Endpoint,
    /// Protocol and the server's own port, or the type of the request for ICMP.
    #[schemars(with = "String")]
    pub service: Service,
    /// False: the two spoke, and who called whom is not known.
    pub direction_known: bool,
}

/// What was counted. Counts are of connections, sizes are bytes with IP headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Evidence {
    /// Carried payload (TCP) or were answered.
    pub established: u64,
    /// TCP connections that completed and carried nothing.
    pub connected_no_data: u64,
    /// UDP that nobody answered and nobody refused.
    pub one_way: u64,
    /// Tried, without an answer.
    pub unanswered: u64,
    /// Tried, and refused.
    pub refused: u64,
    /// Denied by an enforced policy.
    pub denied: u64,
    /// Passed under Audit although the policy would have denied it.
    pub would_deny: u64,
    /// Of these, older than the agent.
    pub pre_existing: u64,
    /// From client to server.
    pub bytes_sent: u64,
    /// From server to client.
    pub bytes_received: u64,
    /// When the first one began.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Time>")]
    pub first: Option<Timestamp>,
    /// When the last one began, or was last seen active.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Time>")]
    pub last: Option<Timestamp>,
    /// Hours with traffic, as runs without gap.
    pub hours: Vec<Hours>,
    /// How the connections got there: `direct`, `published` (by a published port) or `proxy` (by the engine's own proxy).
    #[schemars(with = "Vec<RoadName>")]
    pub roads: Vec<evidence::Road>,
}

/// The names of the roads, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline, rename_all = "kebab-case")]
pub enum RoadName {
    /// To the container's own address.
    Direct,
    /// By a published port.
    Published,
    /// By the engine's proxy.
    Proxy,
}

/// Hours without gap, counted from the beginning of 1970 in UTC (the Unix time divided by 3600).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hours {
    /// The first hour.
    pub first: u32,
    /// The last hour, included.
    pub last: u32,
}

/// Something to know before approving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Finding {
    /// `info`: good to know. `warning`: look before you approve. `blocking`: has to be accepted by its code.
    #[schemars(with = "SeverityName")]
    pub severity: Severity,
    /// Stable name, for `spec.accept` of a PolicyReview.
    pub code: String,
    /// What, about what, what it may mean, what to do.
    pub text: String,
}

/// The names of the severities, for the schema.
#[derive(Clone, Copy, Debug, JsonSchema)]
#[schemars(inline, rename_all = "camelCase")]
pub enum SeverityName {
    /// Good to know.
    Info,
    /// Look before you approve.
    Warning,
    /// Has to be accepted.
    Blocking,
}

/// An edge that is shown and not proposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NotProposed {
    /// Which edge.
    pub edge: Edge,
    /// What was counted.
    pub evidence: Evidence,
    /// Why it is no rule.
    pub why: String,
}

/// What is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Coverage {
    /// Healthy observed time of the nodes that saw the workload, seconds.
    pub healthy_seconds: u64,
    /// Distinct hours with traffic of the workload.
    pub hours: u64,
    /// Distinct days with traffic of the workload.
    pub days: u64,
    /// Kernel events lost while it was observed.
    pub lost: u64,
    /// Edges in use.
    pub edges: u64,
    /// Share of the next connections that is expected to be on an edge not seen yet (Good-Turing), parts per million. Left out:
    /// too little was seen to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unseen_connections_ppm: Option<u64>,
    /// Edges that are expected to exist and were not seen yet (Chao, over hours). Left out: too little was seen to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unseen_edges: Option<u64>,
    /// What else is not known, in sentences.
    pub notes: Vec<String>,
}

impl From<&EdgeKey> for Edge {
    fn from(from: &EdgeKey) -> Self {
        let EdgeKey { from, to, service, direction_known } = from.clone();
        Self { from, to, service, direction_known }
    }
}

impl From<&Edge> for EdgeKey {
    fn from(from: &Edge) -> Self {
        let Edge { from, to, service, direction_known } = from.clone();
        Self { from, to, service, direction_known }
    }
}

impl From<&evidence::Evidence> for Evidence {
    fn from(from: &evidence::Evidence) -> Self {
        let evidence::Evidence { hours, roads, .. } = from;
        Self {
            established: from.established,
            connected_no_data: from.connected_no_data,
            one_way: from.one_way,
            unanswered: from.unanswered,
            refused: from.refused,
            denied: from.denied,
            would_deny: from.would_deny,
            pre_existing: from.pre_existing,
            bytes_sent: from.bytes_sent,
            bytes_received: from.bytes_received,
            first: from.first,
            last: from.last,
            hours: hours.runs().iter().map(|&(first, last)| Hours { first, last }).collect(),
            roads: roads.iter().collect(),
        }
    }
}

impl From<&Evidence> for evidence::Evidence {
    fn from(from: &Evidence) -> Self {
        Self {
            established: from.established,
            connected_no_data: from.connected_no_data,
            one_way: from.one_way,
            unanswered: from.unanswered,
            refused: from.refused,
            denied: from.denied,
            would_deny: from.would_deny,
            pre_existing: from.pre_existing,
            bytes_sent: from.bytes_sent,
            bytes_received: from.bytes_received,
            first: from.first,
            last: from.last,
            hours: HourSet::from_runs(from.hours.iter().map(|run| (run.first, run.last))),
            roads: from.roads.iter().copied().collect(),
        }
    }
}

impl From<&suggestion::ProposedRule> for ProposedRule {
    fn from(from: &suggestion::ProposedRule) -> Self {
        let suggestion::ProposedRule { id, direction, rule, origin, state, evidence, edges } = from;
        Self {
            id: id.clone(),
            direction: *direction,
            peer: rule.peer.clone(),
            ports: rule.ports,
            until: rule.until,
            origin: *origin,
            state: *state,
            evidence: evidence.into(),
            edges: edges.iter().map(Edge::from).collect(),
        }
    }
}

impl From<&ProposedRule> for suggestion::ProposedRule {
    fn from(from: &ProposedRule) -> Self {
        let ProposedRule { id, direction, peer, ports, until, origin, state, evidence, edges } = from;
        Self {
            id: id.clone(),
            direction: *direction,
            rule: policy_set::Rule { peer: peer.clone(), ports: *ports, until: *until },
            origin: *origin,
            state: *state,
            evidence: evidence.into(),
            edges: edges.iter().map(EdgeKey::from).collect(),
        }
    }
}

impl From<&suggestion::Coverage> for Coverage {
    fn from(from: &suggestion::Coverage) -> Self {
        let suggestion::Coverage { healthy_seconds, hours, days, lost, edges, unseen_connections_ppm, unseen_edges, notes } = from.clone();
        Self { healthy_seconds, hours, days, lost, edges, unseen_connections_ppm, unseen_edges, notes }
    }
}

impl From<&Coverage> for suggestion::Coverage {
    fn from(from: &Coverage) -> Self {
        let Coverage { healthy_seconds, hours, days, lost, edges, unseen_connections_ppm, unseen_edges, notes } = from.clone();
        Self { healthy_seconds, hours, days, lost, edges, unseen_connections_ppm, unseen_edges, notes }
    }
}

fn count<T>(items: &[T], matches: impl Fn(&T) -> bool) -> u32 {
    u32::try_from(items.iter().filter(|item| matches(item)).count()).unwrap_or(u32::MAX)
}

impl From<&suggestion::Suggestion> for PolicySuggestion {
    fn from(from: &suggestion::Suggestion) -> Self {
        let suggestion::Suggestion { workload, revision, digest, phase, rules, findings, not_proposed, coverage, updated } = from;
        let mut object = object::named(workload, PolicySuggestionSpec { workload: Some(workload.clone()) }, Self::new);
        object.status = Some(PolicySuggestionStatus {
            revision: *revision,
            digest: digest.clone(),
            phase: *phase,
            undecided: count(rules, |rule| rule.state == RuleState::Undecided),
            blocking: count(findings, |finding| finding.severity == Severity::Blocking),
            updated: *updated,
            coverage: coverage.into(),
            findings: findings.iter().map(|f| Finding { severity: f.severity, code: f.code.clone(), text: f.text.clone() }).collect(),
            rules: rules.iter().map(ProposedRule::from).collect(),
            not_proposed: not_proposed
                .iter()
                .map(|n| NotProposed { edge: (&n.edge).into(), evidence: (&n.evidence).into(), why: n.why.clone() })
                .collect(),
        });
        object
    }
}

impl TryFrom<&PolicySuggestion> for suggestion::Suggestion {
    type Error = Refused;

    fn try_from(from: &PolicySuggestion) -> Result<Self, Refused> {
        let workload = object::agreed_workload("PolicySuggestion", &from.metadata, from.spec.workload.as_ref())?;
        let Some(status) = &from.status else {
            return Err(Refused::NoStatus { kind: "PolicySuggestion", object: workload.to_string() });
        };
        Ok(Self {
            workload,
            revision: status.revision,
            digest: status.digest.clone(),
            phase: status.phase,
            rules: status.rules.iter().map(suggestion::ProposedRule::from).collect(),
            findings: status
                .findings
                .iter()
                .map(|f| suggestion::Finding { severity: f.severity, code: f.code.clone(), text: f.text.clone() })
                .collect(),
            not_proposed: status
                .not_proposed
                .iter()
                .map(|n| suggestion::NotProposed { edge: (&n.edge).into(), evidence: (&n.evidence).into(), why: n.why.clone() })
                .collect(),
            coverage: (&status.coverage).into(),
            updated: status.updated,
        })
    }
}
