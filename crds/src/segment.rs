//! `Segment`: which workloads belong together, and what happens to what their policies don't allow. Written by the operator.

use kube::CustomResource;
use policy::segment::{self, Refusal, Selector};
use policy::{Mode, Workload};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::Refused;
use crate::{name, schema};

/// Which workloads belong together, and what happens to what their policies don't allow.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "Segment",
    derive = "PartialEq",
    category = "bulkhead",
    doc = "Which workloads belong together, and what happens to what their policies don't allow.",
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Refusal", type_ = "string", json_path = ".spec.refusal", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SegmentSpec {
    /// The segment's name, where the object's own can't hold it (capitals, underscores); else left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub name: Option<String>,

    /// Whom the segment takes. An empty list takes nobody. Where several segments match, the more particular selector wins: a
    /// workload by name, then its project, then a network.
    #[serde(default)]
    #[schemars(length(max = 1000))]
    pub members: Vec<Member>,

    /// What happens to what the policies don't allow. `Learn`: all is allowed, and observed. `Audit`: it passes and is
    /// logged. `Enforce`: it is denied.
    #[serde(default)]
    #[schemars(with = "ModeName")]
    pub mode: Mode,

    /// What is done to a denied packet. `Reject`: TCP gets a reset, everything else an ICMP error, where that is safe, so that
    /// the application fails at once. `Drop`: silence.
    #[serde(default)]
    #[schemars(with = "RefusalName")]
    pub refusal: Refusal,

    /// When the controller may raise the mode from `Audit` to `Enforce` by itself: when all of these hold. Left out: never.
    /// `Learn` is never left without a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<Promotion>,
}

/// The names of the modes, for the schema.
#[derive(Clone, Copy, Debug, Default, JsonSchema, Serialize)]
#[schemars(inline)]
pub enum ModeName {
    /// Observe, allow all.
    #[default]
    Learn,
    /// Log what would be denied.
    Audit,
    /// Deny.
    Enforce,
}

/// The names of the refusals, for the schema.
#[derive(Clone, Copy, Debug, Default, JsonSchema, Serialize)]
#[schemars(inline)]
pub enum RefusalName {
    /// Answer with an error.
    #[default]
    Reject,
    /// Say nothing.
    Drop,
}

/// One selector: exactly one of the fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", try_from = "MemberFields", into = "MemberFields")]
#[schemars(with = "MemberFields")]
pub struct Member(pub Selector);

/// One selector: exactly one of the fields.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a map with one of workload, project and network")]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
struct MemberFields {
    /// One workload by name, for example `shop/db`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Workload>")]
    workload: Option<Workload>,

    /// Every workload of a Compose project or a Kubernetes namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    project: Option<String>,

    /// Every workload attached to a network of the container engine, by the network's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    network: Option<String>,
}

/// Fields that are not one selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a member is exactly one of workload, project and network (and not empty), here {given}")]
struct NotOneSelector {
    given: String,
}

impl TryFrom<MemberFields> for Member {
    type Error = NotOneSelector;

    fn try_from(fields: MemberFields) -> Result<Self, Self::Error> {
        let given = [fields.workload.map(Selector::Workload), fields.project.map(Selector::Project), fields.network.map(Selector::Network)];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(Selector::Project(name) | Selector::Network(name)), None) if name.is_empty() => {
                Err(NotOneSelector { given: "an empty name".to_owned() })
            }
            (Some(selector), None) => Ok(Self(selector)),
            (None, _) => Err(NotOneSelector { given: "none".to_owned() }),
            (Some(first), Some(second)) => Err(NotOneSelector { given: format!("{first} and {second}") }),
        }
    }
}

impl From<Member> for MemberFields {
    fn from(Member(selector): Member) -> Self {
        match selector {
            Selector::Workload(workload) => Self { workload: Some(workload), ..Self::default() },
            Selector::Project(project) => Self { project: Some(project), ..Self::default() },
            Selector::Network(network) => Self { network: Some(network), ..Self::default() },
        }
    }
}

/// Conditions of a promotion from `Audit` to `Enforce` without a person; all of them have to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Promotion {
    /// Healthy observed time in `Audit`, hours. An agent that is down, or that lost events, stops this clock.
    pub healthy_hours: u32,
    /// Distinct hours in which traffic of the segment was seen.
    pub distinct_hours: u32,
    /// Would-be denials that are accepted during that time. None unless said.
    #[serde(default)]
    pub would_be_denials: u64,
}

impl From<&segment::Segment> for Segment {
    fn from(from: &segment::Segment) -> Self {
        let segment::Segment { name: raw, members, mode, refusal, promotion } = from;
        let object = name::label(raw);
        let spec = SegmentSpec {
            name: (object != *raw).then(|| raw.clone()),
            members: members.iter().cloned().map(Member).collect(),
            mode: *mode,
            refusal: *refusal,
            promotion: promotion.as_ref().map(|p| Promotion {
                healthy_hours: p.healthy_hours,
                distinct_hours: p.distinct_hours,
                would_be_denials: p.would_be_denials,
            }),
        };
        Self::new(&object, spec)
    }
}

impl TryFrom<&Segment> for segment::Segment {
    type Error = Refused;

    fn try_from(from: &Segment) -> Result<Self, Refused> {
        let SegmentSpec { name: raw, members, mode, refusal, promotion } = &from.spec;
        let name = crate::object::agreed_name("Segment", from.metadata.name.as_deref(), raw.as_deref())?;
        Ok(Self {
            name,
            members: members.iter().map(|Member(selector)| selector.clone()).collect(),
            mode: *mode,
            refusal: *refusal,
            promotion: promotion.as_ref().map(|p| segment::Promotion {
                healthy_hours: p.healthy_hours,
                distinct_hours: p.distinct_hours,
                would_be_denials: p.would_be_denials,
            }),
        })
    }
}
