//! From the command line to the running agent: what needs more privilege than the agent keeps is done here, in order, on the only
//! thread there is; then it is given up.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use crate::chain::chain;
use crate::confine;
use crate::enforce::sums;
use crate::inventory::endpoint::{self, EngineAddress, Environment};
use crate::netns;
use crate::priority;

use super::{AgentError, Options, alone, block_on, die_with_the_supervisor, io_at, owner, work};

/// What was found before the agent was confined.
pub(super) struct Begun {
    /// The socket that an earlier agent left.
    pub(super) owning: Option<OwnedFd>,
    pub(super) engine: EngineAddress,
    /// What this kernel has no limits for.
    pub(super) unconfined: Vec<String>,
    /// The agent's name in this network namespace.
    pub(super) name: alone::Name,
    /// What keeps out packets of which a sum is yet to be written, or why there is nothing.
    pub(super) sums: Result<Vec<OwnedFd>, String>,
}

/// Runs the agent until a signal. To be called before any other thread is started: namespaces, capabilities and limits are a
/// thread's own, and inherited.
///
/// # Errors
/// What keeps it from starting.
pub fn start(options: Options) -> Result<(), AgentError> {
    die_with_the_supervisor();
    let owning = owner::inherited();
    if let Some(path) = &options.netns {
        netns::enter(path)?;
    }
    let engine = endpoint::locate(options.docker_host.as_deref(), &Environment::of_process())?;
    let name = alone::take()?;
    let dir = &options.state_dir;
    fs::create_dir_all(dir).map_err(io_at(format!("make {}", dir.display())))?;
    let folder = options.engine_folder();
    let made = fs::create_dir_all(&folder).and_then(|()| fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)));
    made.map_err(io_at(format!("make {}", folder.display())))?;
    if let Some(user) = options.controller_user {
        confine::join_group(user.gid)?;
    }
    let needs = confine::Agent {
        state_dir: dir.clone(),
        engine_roots: crate::inventory::data_roots(),
        metrics: options.metrics.map(|address| address.port()),
    };
    priority::go_first();
    // Takes capabilities and a system call that are given up with the next line.
    let sums = sums::keep_out().map_err(|error| chain(&error));
    let unconfined = confine::agent(&needs)?;
    block_on(work::run(options, Begun { owning, engine, unconfined, sums, name }))?
}
