//! The agent's uplink, the controller's session and the store, over a real Unix socket and real files: what is seen is counted
//! exactly once, whichever side dies. The tests of full disks and of other users need root and say so where they are skipped.

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod deaths;
mod exact;
mod flat;
mod full;
mod lies;
mod pair;
mod socket;
