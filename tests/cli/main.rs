//! The real `bulkhead controller` as a process, fed by the agent's real uplink, driven by the real command line: what is printed, the
//! exit codes, what is recorded, what the node is told. Needs nothing; a few tests need root and say so.

#![allow(clippy::unwrap_used, reason = "all of it is test code")]

mod bad_input;
mod desk;
mod first_steps;
mod graph;
mod guardrails;
mod modes;
mod objects;
mod review;
mod yaml;
