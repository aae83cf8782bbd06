//! The export to NetworkPolicies says what the policies say. Judged by a reading of NetworkPolicy that is kept here, apart from the
//! export, and that is itself judged by other people's cases where they are given.

#![allow(clippy::unwrap_used, reason = "a test")]

mod export;
mod oracle;
mod semantics;
