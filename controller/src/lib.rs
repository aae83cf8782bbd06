//! The controller: knows the whole. It merges graphs, learns, asks for review and publishes plans; it needs no privilege.

pub mod api;
pub mod cli;
pub mod hub;
pub mod render;
pub mod session;
pub mod store;
pub mod supervise;

/// The generated `Node` service.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/bulkhead.v1.rs"));
}
