//! Any of the kinds, and what it asks for. Reading and writing the text is `yaml`'s; doing what is asked is the controller's.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::ResourceExt;
use kube::core::{CustomResourceExt, ObjectMeta};
use policy::Workload;
use policy::policy_set;
use serde::{Serialize, Serializer};

use crate::guardrail::Guardrail;
use crate::name;
use crate::policy_review::{PolicyReview, PolicyReviewSpec};
use crate::policy_suggestion::PolicySuggestion;
use crate::quarantine::Quarantine;
use crate::segment::Segment;
use crate::workload_policy::WorkloadPolicy;

/// One object of one of the kinds.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a list of them is short-lived")]
pub enum Object {
    /// Which workloads belong together.
    Segment(Segment),
    /// What is proposed for one workload.
    PolicySuggestion(PolicySuggestion),
    /// A person's decision.
    PolicyReview(PolicyReview),
    /// What one workload may do.
    WorkloadPolicy(WorkloadPolicy),
    /// What must never be allowed.
    Guardrail(Guardrail),
    /// A workload cut off.
    Quarantine(Quarantine),
}

/// What an object asks for when it is applied.
#[derive(Clone, Debug, PartialEq)]
pub enum Intent {
    /// Have this segment.
    Segment(policy::Segment),
    /// Have this policy in force.
    Policy(policy_set::WorkloadPolicy),
    /// Take this decision on a suggestion.
    Review(PolicyReviewSpec),
    /// Cut this workload off.
    Quarantine(policy_set::Quarantine),
    /// Never allow this.
    Guardrail(policy::guardrail::Guardrail),
}

/// Why an object that could be read can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The metadata has no name.
    #[error("{kind}: metadata.name is missing: an object needs a name")]
    NoName {
        /// The object's kind.
        kind: &'static str,
    },
    /// The metadata names one thing and the spec another.
    #[error("{kind} {object}: the spec names {named}: name the object {wanted}, or leave the name in the spec out")]
    OtherName {
        /// The object's kind.
        kind: &'static str,
        /// Name of the object.
        object: String,
        /// What the spec says.
        named: String,
        /// How the object has to be called then.
        wanted: String,
    },
    /// The object carries no status, and what is asked for is in there.
    #[error("{kind} {object} has no status: it was not written by a controller, or nobody took it yet")]
    NoStatus {
        /// The object's kind.
        kind: &'static str,
        /// Name of the object.
        object: String,
    },
    /// A line of the record that is not a decision on a suggestion.
    #[error("decision {number} is not a decision on a suggestion, so there is no PolicyReview of it")]
    NotAReview {
        /// The decision's number.
        number: u64,
    },
    /// A suggestion can't be applied.
    #[error(
        "PolicySuggestion {object}: suggestions are written by the controller. To decide on it, use `bulkhead approve`, or apply a PolicyReview"
    )]
    WrittenByController {
        /// Name of the object.
        object: String,
    },
    /// A review that is on the record already.
    #[error("PolicyReview {object} is decision {number} of a record: a decision is not taken twice. Leave the status out to decide again")]
    Taken {
        /// Name of the object.
        object: String,
        /// Number of the decision.
        number: u64,
    },
    /// The name in the metadata is no name of a workload.
    #[error("{kind} {object}: this is not the name of a workload: write NAME or NAMESPACE/NAME in spec.workload")]
    NotAWorkload {
        /// The object's kind.
        kind: &'static str,
        /// Name of the object.
        object: String,
    },
}

/// Namespace and name, as people write them.
fn spoken(namespace: Option<&str>, name: &str) -> String {
    match namespace {
        None | Some("") => name.to_owned(),
        Some(namespace) => format!("{namespace}/{name}"),
    }
}

/// The name that counts, of an object that is not a workload's: the spec's if it says one, and then the object is called
/// like that, or as [`name::label`] derives.
pub(crate) fn agreed_name(kind: &'static str, object: Option<&str>, spec: Option<&str>) -> Result<String, Refused> {
    let object = object.filter(|name| !name.is_empty()).ok_or(Refused::NoName { kind })?;
    match spec {
        None => Ok(object.to_owned()),
        Some(raw) if raw == object || name::label(raw) == object => Ok(raw.to_owned()),
        Some(raw) => Err(Refused::OtherName { kind, object: object.to_owned(), named: raw.to_owned(), wanted: name::label(raw) }),
    }
}

/// The workload that an object is about.
pub(crate) fn agreed_workload(kind: &'static str, metadata: &ObjectMeta, spec: Option<&Workload>) -> Result<Workload, Refused> {
    let object = metadata.name.as_deref().filter(|name| !name.is_empty()).ok_or(Refused::NoName { kind })?;
    let namespace = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
    let Some(workload) = spec else {
        let spoken = spoken(namespace, object);
        return spoken.parse().map_err(|_| Refused::NotAWorkload { kind, object: spoken });
    };
    let derived = name::of_workload(workload);
    let verbatim = (namespace.unwrap_or_default(), object) == (workload.namespace(), workload.name());
    if verbatim || (namespace, object) == (derived.0.as_deref(), derived.1.as_str()) {
        return Ok(workload.clone());
    }
    Err(Refused::OtherName {
        kind,
        object: spoken(namespace, object),
        named: workload.to_string(),
        wanted: spoken(derived.0.as_deref(), &derived.1),
    })
}

/// The object of a workload, under the name that belongs to it.
pub(crate) fn named<S, K: ResourceExt>(workload: &Workload, spec: S, new: impl FnOnce(&str, S) -> K) -> K {
    let (namespace, name) = name::of_workload(workload);
    let mut object = new(&name, spec);
    object.meta_mut().namespace = namespace;
    object
}

impl Object {
    /// What the object asks for.
    ///
    /// # Errors
    /// [`Refused`], in a sentence: the object can be read, and can't be done.
    pub fn intent(&self) -> Result<Intent, Refused> {
        let named = || spoken(self.metadata().namespace.as_deref(), self.metadata().name.as_deref().unwrap_or_default());
        match self {
            Self::Segment(object) => Ok(Intent::Segment(object.try_into()?)),
            Self::WorkloadPolicy(object) => Ok(Intent::Policy(object.try_into()?)),
            Self::Quarantine(object) => Ok(Intent::Quarantine(object.try_into()?)),
            Self::PolicyReview(object) => match &object.status {
                Some(status) => Err(Refused::Taken { object: named(), number: status.number }),
                None => Ok(Intent::Review(object.spec.clone())),
            },
            Self::PolicySuggestion(_) => Err(Refused::WrittenByController { object: named() }),
            Self::Guardrail(object) => Ok(Intent::Guardrail(object.try_into()?)),
        }
    }

    /// What the object is about, as people write it: a workload, or the name of a segment or a guardrail; a review is about
    /// itself. Two objects of one kind about one thing contradict each other.
    ///
    /// # Errors
    /// [`Refused`]: the object's name and its spec don't agree.
    pub fn subject(&self) -> Result<String, Refused> {
        let workload =
            |workload: &Option<Workload>| agreed_workload(self.kind(), self.metadata(), workload.as_ref()).map(|w| w.to_string());
        let name = |name: Option<&str>| agreed_name(self.kind(), self.metadata().name.as_deref(), name);
        match self {
            Self::Segment(object) => name(object.spec.name.as_deref()),
            Self::Guardrail(object) => name(object.spec.name.as_deref()),
            Self::WorkloadPolicy(object) => workload(&object.spec.workload),
            Self::Quarantine(object) => workload(&object.spec.workload),
            Self::PolicySuggestion(object) => workload(&object.spec.workload),
            Self::PolicyReview(object) => Ok(spoken(object.metadata.namespace.as_deref(), &name(None)?)),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let metadata = self.metadata();
        write!(f, "{} {}", self.kind(), spoken(metadata.namespace.as_deref(), metadata.name.as_deref().unwrap_or("(without a name)")))
    }
}

macro_rules! kinds {
    ($($kind:ident),+ $(,)?) => {
        impl Object {
            /// The names of the kinds.
            pub const KINDS: &[&str] = &[$(stringify!($kind)),+];

            /// The kind's name.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$kind(_) => stringify!($kind),)+
                }
            }

            /// The object's metadata.
            pub fn metadata(&self) -> &ObjectMeta {
                match self {
                    $(Self::$kind(object) => &object.metadata,)+
                }
            }
        }

        impl Serialize for Object {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$kind(object) => object.serialize(serializer),)+
                }
            }
        }

        $(impl From<$kind> for Object {
            fn from(object: $kind) -> Self {
                Self::$kind(object)
            }
        })+

        /// The definitions of the kinds, as Kubernetes wants them.
        pub fn definitions() -> Vec<CustomResourceDefinition> {
            let mut definitions = vec![$($kind::crd()),+];
            for schema in definitions.iter_mut().flat_map(|d| &mut d.spec.versions).filter_map(|v| v.schema.as_mut()) {
                if let Some(schema) = &mut schema.open_api_v3_schema {
                    unwrap_lines(schema);
                }
            }
            definitions
        }
    };
}

kinds!(Segment, PolicySuggestion, PolicyReview, WorkloadPolicy, Guardrail, Quarantine);

macro_rules! from_core {
    ($($kind:ident from $core:path),+ $(,)?) => {
        $(impl From<&$core> for Object {
            fn from(core: &$core) -> Self {
                Self::$kind(core.into())
            }
        })+
    };
}

from_core!(
    Segment from policy::Segment,
    PolicySuggestion from policy::suggestion::Suggestion,
    WorkloadPolicy from policy_set::WorkloadPolicy,
    Guardrail from policy::guardrail::Guardrail,
    Quarantine from policy_set::Quarantine,
);

/// Descriptions are wrapped in the source for whoever reads that; `kubectl explain` wraps for itself.
fn unwrap_lines(schema: &mut JSONSchemaProps) {
    if let Some(description) = &mut schema.description {
        *description = description.replace("\n\n", "\u{0}").replace('\n', " ").replace('\u{0}', "\n\n");
    }
    schema.properties.iter_mut().flat_map(BTreeMap::values_mut).for_each(unwrap_lines);
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => unwrap_lines(items),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(unwrap_lines),
        None => {}
    }
}
