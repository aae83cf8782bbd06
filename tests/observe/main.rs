//! The suite `observe`: real packets between namespaces, and what the observer makes of them. Needs root.

#![allow(clippy::unwrap_used, reason = "unwrap is for tests")]

mod denied;
mod judged;
mod looked;
mod loss;
mod named;
mod node;
mod older;
mod roads;
mod room;
mod switches;
