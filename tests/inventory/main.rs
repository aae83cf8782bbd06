//! The inventory against real engines, 20.10 and the current one: who runs, where, under which name, and who held which address
//! when. Needs root and an engine; skips aloud without.

#![allow(clippy::unwrap_used, reason = "unwrap is for tests")]

mod watching;

mod between;
mod confined;
mod filter;
mod life;
mod names;
mod preflight;
mod unmanaged;
