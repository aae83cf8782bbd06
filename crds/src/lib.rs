//! The Kubernetes face of the policy core: the kinds of `bulkhead.dev/v1alpha1`, one a file, their YAML, and what they
//! become elsewhere. What a policy means is decided in `policy`; here it is only read and written.

#![allow(clippy::duplicated_attributes, reason = "each printcolumn is a column of its own, and most are texts")]

pub mod guardrail;
pub mod name;
pub mod network_policy;
pub mod object;
pub mod policy_review;
pub mod policy_suggestion;
pub mod quarantine;
pub mod schema;
pub mod segment;
pub mod workload_policy;
pub mod yaml;

pub use object::{Intent, Object, Refused};

/// The API group of every kind.
pub const GROUP: &str = "bulkhead.dev";

/// The version of every kind.
pub const VERSION: &str = "v1alpha1";
