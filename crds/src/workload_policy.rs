//! `WorkloadPolicy`: what one workload may do; what gets compiled. Written by the controller from approved reviews, or by hand.

use std::fmt;

use jiff::Timestamp;
use kube::CustomResource;
use policy::{Peer, Ports, Workload, policy_set};
use schemars::JsonSchema;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::object::Refused;
use crate::{object, schema};

/// What one workload may do: an allowlist. What no rule allows is denied when the workload's segment is in `Enforce`.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "WorkloadPolicy",
    plural = "workloadpolicies",
    namespaced,
    derive = "PartialEq",
    category = "bulkhead",
    shortname = "wpol",
    doc = "What one workload may do: an allowlist. What no rule allows is denied when the workload's segment is in Enforce.",
    printcolumn(name = "Workload", type_ = "string", json_path = ".spec.workload"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadPolicySpec {
    /// Whose policy, for example `shop/db` (a Compose service, a Kubernetes owner) or `web` (a container started by hand).
    /// Left out: the object's own namespace and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Workload>")]
    pub workload: Option<Workload>,

    /// Who may reach it. An empty list: nobody.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub ingress: Vec<Rule>,

    /// Whom it may reach. An empty list: nobody, except its resolver and what is always allowed.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub egress: Vec<Rule>,
}

/// One allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// The other end: a workload (`shop/db`), the node itself (`host:`), or addresses outside of every network of the engine
    /// (`outside:192.0.2.0/24`, `outside:2001:db8::7`), which never include a workload.
    #[schemars(with = "schema::Peer")]
    pub peer: Peer,

    /// The server's ports, by protocol: the peer's own for egress, the workload's own for ingress, never a published one.
    /// `tcp/5432`, `udp/8000-8010`, `sctp/36412`, `icmp/8` (the type of the request), `ip47` (a protocol without ports).
    #[schemars(with = "schema::Ports")]
    pub ports: Ports,

    /// Until when the rule holds. Left out: until somebody takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "until")]
    #[schemars(with = "Option<schema::Time>")]
    pub until: Option<Timestamp>,
}

/// A time, or nothing; the error says how to write one.
fn until<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    struct Moment;

    impl<'de> Visitor<'de> for Moment {
        type Value = Option<Timestamp>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a time")
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_str(self)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
            let wrong =
                |_| E::custom(format_args!("\"{text}\" is not a time: write it as RFC 3339 has it, for example 2026-12-01T00:00:00Z"));
            text.parse().map(Some).map_err(wrong)
        }
    }

    deserializer.deserialize_option(Moment)
}

impl From<&policy_set::Rule> for Rule {
    fn from(from: &policy_set::Rule) -> Self {
        let policy_set::Rule { peer, ports, until } = from;
        Self { peer: peer.clone(), ports: *ports, until: *until }
    }
}

impl From<&Rule> for policy_set::Rule {
    fn from(from: &Rule) -> Self {
        let Rule { peer, ports, until } = from;
        Self { peer: peer.clone(), ports: *ports, until: *until }
    }
}

impl From<&policy_set::WorkloadPolicy> for WorkloadPolicy {
    fn from(from: &policy_set::WorkloadPolicy) -> Self {
        let policy_set::WorkloadPolicy { workload, ingress, egress } = from;
        let spec = WorkloadPolicySpec {
            workload: Some(workload.clone()),
            ingress: ingress.iter().map(Rule::from).collect(),
            egress: egress.iter().map(Rule::from).collect(),
        };
        object::named(workload, spec, Self::new)
    }
}

impl TryFrom<&WorkloadPolicy> for policy_set::WorkloadPolicy {
    type Error = Refused;

    fn try_from(from: &WorkloadPolicy) -> Result<Self, Refused> {
        let WorkloadPolicySpec { workload, ingress, egress } = &from.spec;
        Ok(Self {
            workload: object::agreed_workload("WorkloadPolicy", &from.metadata, workload.as_ref())?,
            // The order of rules has no meaning, and saying one twice adds nothing.
            ingress: ingress.iter().map(policy_set::Rule::from).collect(),
            egress: egress.iter().map(policy_set::Rule::from).collect(),
        })
    }
}
