//! The pure core: what a flow means, what is learned from it, what a policy allows, what a node has to enforce.
//!
//! It decides everything and touches nothing: no I/O, no clock, no async, no logging. Time comes in as an argument,
//! verdicts go out with their reasons. The two binaries carry data in and carry decisions out.

#[macro_use]
mod text_serde;

pub mod attribute;
pub mod bind;
pub mod check;
pub mod diff;
pub mod estimate;
pub mod evaluate;
pub mod evidence;
pub mod flow;
pub mod graph;
pub mod guardrail;
mod hash;
pub mod health;
pub mod inventory;
pub mod learn;
pub mod lease;
pub mod plan;
pub mod policy_set;
mod private;
pub mod promote;
pub mod review;
pub mod revoke;
pub mod ruleset;
pub mod segment;
pub mod service;
pub mod status;
pub mod suggestion;
pub mod track;
pub mod wire;
pub mod workload;

pub use bind::bind;
pub use evaluate::{Connection, Decision, Index, Scene, Standing, Verdict, evaluate};
pub use evidence::{Evidence, HourSet};
pub use flow::{Flow, FlowOutcome, Tuple};
pub use graph::{EdgeDelta, EdgeKey, FlowGraph};
pub use health::Health;
pub use inventory::Inventory;
pub use plan::NodePlan;
pub use policy_set::{Peer, PolicySet, Rule, WorkloadPolicy};
pub use ruleset::Ruleset;
pub use segment::{Mode, Segment, Selector};
pub use service::{Ports, Protocol, Service};
pub use workload::{Endpoint, Workload};
