//! The fence: who may depend on whom, and what the core may not touch. Needs cargo and the sources, nothing else.

#![allow(clippy::unwrap_used, reason = "a test")]

mod crates;
mod sources;
