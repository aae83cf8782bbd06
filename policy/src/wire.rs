//! What an agent and the controller say to each other, as messages and back. Reading refuses; it never guesses. What becomes of an
//! element that was refused (left out and counted, or the whole message refused) is decided by whoever reads.

mod error;
mod json;
mod read;
mod write;

#[allow(missing_docs, clippy::all, unreachable_pub)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/bulkhead.v1.rs"));
}

pub use error::WireError;
pub use generated::*;
pub use json::{read_inventory, read_plan, read_plan_change, read_preview, read_status, write_json};

/// Version of the protocol. Raised when an old reader would misread; fields that are only added don't raise it.
pub const PROTOCOL: u32 = 1;

#[cfg(test)]
mod tests;
