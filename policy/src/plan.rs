//! What the controller gives a node: immutable, numbered, written in identities. The node binds it to its own addresses.

mod change;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use change::{PlanChange, PolicyChange, Sides};

use crate::policy_set::PolicySet;

/// The version of the plan's format. A node refuses a plan whose format it doesn't know.
pub const PLAN_FORMAT: u32 = 1;

/// Rules that changes may bring a plan to. About what a whole plan can have, which a message bounds (64 MiB): else a controller that is
/// somebody else's could fill a node's memory by and by.
pub const MOST_RULES: usize = 1_000_000;

/// A compiled policy for one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodePlan {
    /// [`PLAN_FORMAT`] of the writer.
    pub format: u32,
    /// Which store it comes from: a node takes plans of one store until it is told to adopt another.
    pub store: String,
    /// Only grows. A node refuses a plan older than the one it has.
    pub generation: u64,
    /// What is in force. Shared, since what is bound is kept with what it was made from.
    pub set: Arc<PolicySet>,
}

/// Why a node does not take a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanRefused {
    /// Written by a version this node does not understand.
    #[error("the plan has format {found}, this agent understands {PLAN_FORMAT}: upgrade the agent")]
    UnknownFormat {
        /// The plan's format.
        found: u32,
    },
    /// From another store than the one the node belongs to.
    #[error("the plan comes from store {found}, this node belongs to {known}: if that is meant, run `bulkhead adopt`")]
    OtherStore {
        /// The plan's store.
        found: String,
        /// The node's store.
        known: String,
    },
    /// Older than what is applied.
    #[error(
        "the plan has generation {found}, generation {applied} is applied already; if the controller's store was put back from a copy: \
         `bulkhead adopt`"
    )]
    Older {
        /// The plan's generation.
        found: u64,
        /// The node's generation.
        applied: u64,
    },
    /// Not what is applied, though it has its number.
    #[error(
        "the plan has generation {generation}, which is applied already and says something else; if the controller's store was put back \
         from a copy: `bulkhead adopt`"
    )]
    Another {
        /// The generation of both.
        generation: u64,
    },
    /// More than a node is to hold.
    #[error("the plan would have {rules} rules; a node takes {MOST_RULES} at most")]
    TooLarge {
        /// So many.
        rules: usize,
    },
    /// It is the way from another plan than the one this node has.
    #[error("the change begins from generation {from}, which is not what is applied here")]
    OtherBase {
        /// The generation it begins from.
        from: u64,
    },
}

impl NodePlan {
    /// Whether a node that has applied `current` may apply this plan. The same plan again is fine: it changes nothing.
    ///
    /// # Errors
    /// Each [`PlanRefused`] with its facts.
    pub fn may_follow(&self, current: Option<&NodePlan>) -> Result<(), PlanRefused> {
        if self.format != PLAN_FORMAT {
            return Err(PlanRefused::UnknownFormat { found: self.format });
        }
        let Some(current) = current else { return Ok(()) };
        if self.store != current.store {
            return Err(PlanRefused::OtherStore { found: self.store.clone(), known: current.store.clone() });
        }
        if self.generation < current.generation {
            return Err(PlanRefused::Older { found: self.generation, applied: current.generation });
        }
        if self.generation == current.generation && self.set != current.set {
            return Err(PlanRefused::Another { generation: self.generation });
        }
        Ok(())
    }
}
