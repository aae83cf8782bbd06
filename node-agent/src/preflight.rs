//! What this host lacks, or what would conflict: `bulkhead check`.
//!
//! Looks and tells; nothing is changed. What the kernel can do is tried with our own rules in a network namespace that nobody
//! else sees and that is gone with the thread that made it; all that may stay of it are kernel modules that were loaded for it.

use crate::chain::chain;
use std::path::PathBuf;

pub use policy::status::{Check, CheckState};

mod engine;
mod host;
mod kernel;
mod rules;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Options {
    /// The engine, as in DOCKER_HOST; `None`: as the docker client would find it.
    pub docker_host: Option<String>,
    /// The agent's directory, whose lock a running agent holds.
    pub state_dir: PathBuf,
}

/// Looks at the host, in the network namespace of the calling thread. In the order in which a person would put things right.
pub async fn check(options: Options) -> Vec<Check> {
    let mut checks = vec![host::privilege()];
    checks.extend(kernel::check());
    checks.extend(host::check());
    checks.extend(rules::check());
    checks.push(host::second_agent(&options.state_dir));
    checks.extend(engine::check(options.docker_host.as_deref()).await);
    checks
}
