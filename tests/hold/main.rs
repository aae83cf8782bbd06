//! Attacks on what is enforced, with a real engine: by a container that may send what it likes, by the engine's own ways of
//! handing addresses on, by who kills things in the middle. Needs root and an engine; `BULKHEAD_ENGINE` chooses it, and with
//! it whether published ports also go through docker-proxy (see `stage`).

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod adrift;
mod anew;
mod crowd;
mod deaths;
mod doors;
mod early;
mod forward;
mod hands;
mod kin;
mod living;
mod moment;
mod namesake;
mod put_back;
mod raw;
mod refused;
mod restart;
mod stage;
