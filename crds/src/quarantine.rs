//! `Quarantine`: cut a workload off, now; wins over every allow. Written by the security team, or by `bulkhead quarantine`.

use kube::CustomResource;
use policy::{Workload, policy_set};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::Refused;
use crate::{object, schema};

/// Cut a workload off: nothing reaches it and it reaches nothing, living connections included, whatever its policy allows and
/// whatever mode its segment is in. Delete the object to give the workload back.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "Quarantine",
    namespaced,
    derive = "PartialEq",
    category = "bulkhead",
    doc = "Cut a workload off: nothing reaches it and it reaches nothing, living connections included. Delete the object to give it back.",
    printcolumn(name = "Workload", type_ = "string", json_path = ".spec.workload"),
    printcolumn(name = "Comment", type_ = "string", json_path = ".spec.comment"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QuarantineSpec {
    /// Who is cut off, for example `shop/db`. Left out: the object's own namespace and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<schema::Workload>")]
    pub workload: Option<Workload>,

    /// Why, in your own words: it is shown wherever the quarantine is.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub comment: String,
}

impl From<&policy_set::Quarantine> for Quarantine {
    fn from(from: &policy_set::Quarantine) -> Self {
        let policy_set::Quarantine { workload, comment } = from;
        object::named(workload, QuarantineSpec { workload: Some(workload.clone()), comment: comment.clone() }, Self::new)
    }
}

impl TryFrom<&Quarantine> for policy_set::Quarantine {
    type Error = Refused;

    fn try_from(from: &Quarantine) -> Result<Self, Refused> {
        let QuarantineSpec { workload, comment } = &from.spec;
        Ok(Self { workload: object::agreed_workload("Quarantine", &from.metadata, workload.as_ref())?, comment: comment.clone() })
    }
}
