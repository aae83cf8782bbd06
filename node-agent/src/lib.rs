//! The node agent: knows one node. It observes, builds the node's graph, enforces its plan and verifies it; it decides nothing.

pub mod agent;
mod chain;
pub mod confine;
pub mod enforce;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod inventory;
pub mod netns;
pub mod observe;
pub mod preflight;
mod priority;
pub mod proxy;
pub mod uplink;

/// The generated client of the controller's `Node` service.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/bulkhead.v1.rs"));
}
