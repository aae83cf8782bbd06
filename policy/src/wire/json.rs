//! Documents inside of messages: plans, reports, previews. JSON, because they are large, seldom sent and read by people in logs.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::WireError;
use crate::plan::PlanChange;
use crate::policy_set::PolicySet;
use crate::status::{NodeStatus, Preview};
use crate::{Inventory, NodePlan};

fn read<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(bytes).map_err(|e| WireError::Json { what, why: e.to_string() })
}

/// Reads a plan, whole or not at all: a field, a kind or a rule that this version doesn't know refuses the plan, so that it can never
/// be read as something wider. (Whether it may follow the plan applied is [`NodePlan::may_follow`]'s question.)
///
/// # Errors
/// Says where and what.
pub fn read_plan(bytes: &[u8]) -> Result<NodePlan, WireError> {
    let what = "plan";
    let plan: NodePlan = read(what, bytes)?;
    let misnamed = |key: &dyn std::fmt::Display, found: &dyn std::fmt::Display| WireError::Json {
        what,
        why: format!("what it calls {key} calls itself {found}"),
    };
    let PolicySet { segments, policies, quarantines, guardrails } = &*plan.set;
    if let Some((key, value)) = segments.iter().find(|(key, value)| **key != value.name) {
        return Err(misnamed(key, &value.name));
    }
    if let Some((key, value)) = policies.iter().find(|(key, value)| **key != value.workload) {
        return Err(misnamed(key, &value.workload));
    }
    if let Some((key, value)) = quarantines.iter().find(|(key, value)| **key != value.workload) {
        return Err(misnamed(key, &value.workload));
    }
    if let Some((key, value)) = guardrails.iter().find(|(key, value)| **key != value.name) {
        return Err(misnamed(key, &value.name));
    }
    Ok(plan)
}

/// Reads the way from one plan to the next, whole or not at all, as a plan.
///
/// # Errors
/// Says where and what.
pub fn read_plan_change(bytes: &[u8]) -> Result<PlanChange, WireError> {
    read("change of the plan", bytes)
}

/// Reads the inventory of a report.
///
/// # Errors
/// Says where and what.
pub fn read_inventory(bytes: &[u8]) -> Result<Inventory, WireError> {
    read("inventory", bytes)
}

/// Reads the status of a report.
///
/// # Errors
/// Says where and what.
pub fn read_status(bytes: &[u8]) -> Result<NodeStatus, WireError> {
    read("status", bytes)
}

/// Reads the answer to a preview.
///
/// # Errors
/// Says where and what.
pub fn read_preview(bytes: &[u8]) -> Result<Preview, WireError> {
    read("preview", bytes)
}

/// Writes a document for a message.
///
/// # Errors
/// A value that JSON cannot hold (none of ours).
pub fn write_json<T: Serialize>(what: &'static str, document: &T) -> Result<Vec<u8>, WireError> {
    serde_json::to_vec(document).map_err(|e| WireError::Json { what, why: e.to_string() })
}
