//! `Guardrail`: what must never be allowed, whatever was observed. Written by the security team.

use kube::CustomResource;
use policy::Ports;
use policy::guardrail::{self, Party};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::Refused;
use crate::{name, object, schema};

/// What must never be allowed: connections from some parties to others. A guardrail denies nothing by itself; it keeps a rule
/// that could let such a connection pass from being approved or applied, on either side.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "Guardrail",
    derive = "PartialEq",
    category = "bulkhead",
    doc = "What must never be allowed: connections from some parties to others. It keeps a rule that could let such a connection pass from being approved.",
    printcolumn(name = "Reason", type_ = "string", json_path = ".spec.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GuardrailSpec {
    /// The guardrail's name, where the object's own can't hold it (capitals, underscores); else left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub name: Option<String>,

    /// The clients.
    pub from: Parties,

    /// The servers.
    pub to: Parties,

    /// The servers' ports, written as in a WorkloadPolicy. Left out: every protocol and port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<schema::Ports>", length(max = 1000))]
    pub ports: Vec<Ports>,

    /// Why, for whoever runs into it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 4096))]
    pub reason: String,
}

/// One side of what is forbidden. Each party is a workload (`shop/db`), `project:NAME` (every workload of a Compose project or a
/// Kubernetes namespace), `workloads:` (every workload), `host:` or `outside:NETWORK` (`outside:0.0.0.0/0` and `outside:::/0`
/// are everyone outside).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parties {
    /// Whom it is about; at least one.
    #[schemars(with = "Vec<schema::Party>", length(min = 1, max = 1000))]
    #[serde(deserialize_with = "at_least_one")]
    pub any_of: Vec<Party>,

    /// Who of them is let off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<schema::Party>", length(max = 1000))]
    pub except: Vec<Party>,
}

/// A guardrail about nobody is a mistake, and one that looks like protection.
fn at_least_one<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Party>, D::Error> {
    let parties = Vec::deserialize(deserializer)?;
    if parties.is_empty() {
        return Err(serde::de::Error::custom("anyOf is empty: such a guardrail forbids nothing. Name whom it is about"));
    }
    Ok(parties)
}

impl From<&guardrail::Parties> for Parties {
    fn from(from: &guardrail::Parties) -> Self {
        let guardrail::Parties { any_of, except } = from;
        Self { any_of: any_of.iter().cloned().collect(), except: except.iter().cloned().collect() }
    }
}

impl From<&Parties> for guardrail::Parties {
    fn from(from: &Parties) -> Self {
        let Parties { any_of, except } = from;
        Self { any_of: any_of.iter().cloned().collect(), except: except.iter().cloned().collect() }
    }
}

impl From<&guardrail::Guardrail> for Guardrail {
    fn from(from: &guardrail::Guardrail) -> Self {
        let guardrail::Guardrail { name: raw, from, to, ports, reason } = from;
        let object = name::label(raw);
        let spec = GuardrailSpec {
            name: (object != *raw).then(|| raw.clone()),
            from: from.into(),
            to: to.into(),
            ports: ports.iter().copied().collect(),
            reason: reason.clone(),
        };
        Self::new(&object, spec)
    }
}

impl TryFrom<&Guardrail> for guardrail::Guardrail {
    type Error = Refused;

    fn try_from(from: &Guardrail) -> Result<Self, Refused> {
        let GuardrailSpec { name: raw, from: clients, to, ports, reason } = &from.spec;
        Ok(Self {
            name: object::agreed_name("Guardrail", from.metadata.name.as_deref(), raw.as_deref())?,
            from: clients.into(),
            to: to.into(),
            ports: ports.iter().copied().collect(),
            reason: reason.clone(),
        })
    }
}
