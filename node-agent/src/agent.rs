//! The running agent: observe -> attribute -> graph -> uplink, and plan -> bind -> enforce -> verify. One task owns the state;
//! everything else is spoken to by channel.

pub mod account;
mod alone;
mod denied;
mod down;
mod forwarding;
pub mod keep;
mod living;
mod memory;
mod owner;
mod process;
mod start;
mod work;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::unistd::User;

use crate::chain::chain;
use crate::confine::ConfineError;
use crate::enforce::{EnforceError, Ownership};
use crate::inventory::InventoryError;
use crate::inventory::endpoint::AddressError;
use crate::netns::NetnsError;
use crate::observe::ObserveError;
use crate::preflight;
use crate::proxy::ProxyError;
use crate::uplink::SpoolError;

pub use down::down;
pub use memory::be_frugal;
pub use process::{die_with_the_supervisor, host_name};
pub use start::start;

use down::Before;
use keep::KeepError;

/// How the agent is to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The agent's own state.
    pub state_dir: PathBuf,
    /// The controller's socket.
    pub controller: PathBuf,
    /// The user that the controller runs as, besides root.
    pub controller_user: Option<ControllerUser>,
    /// The engine, as given on the command line.
    pub docker_host: Option<String>,
    /// The engine's network namespace.
    pub netns: Option<PathBuf>,
    /// The node's name.
    pub node: String,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
    /// The best ownership of the tables to ask for.
    pub ownership: Ownership,
}

impl Options {
    /// Where the filter before the engine makes its socket. The controller's user can't write there: whoever stood in the filter's
    /// place would say which address is whose.
    fn engine_folder(&self) -> PathBuf {
        self.state_dir.join("engine")
    }
}

/// Who the controller is on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerUser {
    /// Its user.
    pub uid: u32,
    /// The group of its socket.
    pub gid: u32,
}

impl FromStr for ControllerUser {
    type Err = String;

    /// A name, or UID:GID.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((uid, gid)) = text.split_once(':') {
            let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is not a number: give a name, or UID:GID"));
            return Ok(Self { uid: number(uid)?, gid: number(gid)? });
        }
        match User::from_name(text) {
            Ok(Some(user)) => Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw() }),
            Ok(None) => Err(format!("there is no user {text}")),
            Err(errno) => Err(format!("the users cannot be read: {errno}")),
        }
    }
}

/// Why the agent, or one of its commands, could not do it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its files.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Which engine.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The kernel's links.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// Observing.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// Enforcing.
    #[error(transparent)]
    Enforce(#[from] EnforceError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The filter before the engine's socket.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// What it was to give up.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// One is enough.
    #[error("another agent (pid {pid}) works in this network namespace: only one may enforce on a host; `bulkhead down` ends it")]
    Another {
        /// Its process.
        pid: i32,
    },
    /// Something of the operating system.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `down` where nothing was started.
    #[error(
        "this is not the network namespace that Bulkhead was started in, and nothing was changed: add --netns PATH|PID{}",
        process.map_or_else(
            || ". If that one is gone, so is all that was in it: `bulkhead up` here begins anew, and `bulkhead down` ends that".to_owned(),
            |pid| format!(", as --netns {pid}, a process in it")
        )
    )]
    Elsewhere {
        /// A process in the namespace that it was started in.
        process: Option<u32>,
    },
    /// `down` where there should be tables and are none, by an agent that did not say yet where it works.
    #[error(
        "the stored plan enforces or audits, and none of its tables is in this network namespace. Nothing was changed: it may be another one \
         than Bulkhead was started in, then add --netns PATH|PID. If it is this one, somebody took the tables away: `bulkhead up` puts \
         them back, and `bulkhead down` after that takes out all"
    )]
    NoTable,
    /// There is no plan on this node.
    #[error("no plan is stored in {dir}: nothing was ever enforced here")]
    NoPlan {
        /// The agent's state.
        dir: PathBuf,
    },
}

impl AgentError {
    /// The exit code of the program, as documented in its help.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoPlan { .. } => 4,
            Self::Address(_) => 2,
            Self::Another { .. }
            | Self::Elsewhere { .. }
            | Self::NoTable
            | Self::Keep(KeepError::Taken { .. })
            | Self::Enforce(EnforceError::OwnedByAnother { .. }) => 3,
            Self::Keep(_)
            | Self::Netns(_)
            | Self::Inventory(_)
            | Self::Observe(_)
            | Self::Enforce(_)
            | Self::Spool(_)
            | Self::Proxy(_)
            | Self::Confine(_)
            | Self::Io { .. } => 1,
        }
    }
}

fn io_at(what: impl Into<String>) -> impl FnOnce(io::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Io { what, source }
}

/// Runs to the end on two threads: one for the kernel's events, one for everything else.
///
/// # Errors
/// The runtime can't be started.
pub fn block_on<F: Future>(future: F) -> Result<F::Output, AgentError> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().map_err(io_at("start the runtime"))?;
    Ok(runtime.block_on(future))
}

/// Prints what this host lacks; the exit code: 0 all well or only warnings, 1 something fails.
///
/// # Errors
/// The engine's address is not understood.
pub fn check(docker_host: Option<String>, state_dir: &Path, json: bool) -> Result<u8, AgentError> {
    let checks = block_on(preflight::check(preflight::Options { docker_host, state_dir: state_dir.to_owned() }))?;
    if json {
        let text = serde_json::to_string_pretty(&checks).map_err(|e| io_at("print the checks")(e.into()))?;
        println!("{text}");
    } else {
        for check in &checks {
            println!("{check}");
        }
    }
    Ok(u8::from(checks.iter().any(preflight::Check::fails)))
}

/// Prints the plan that is stored here.
///
/// # Errors
/// `NoPlan`, or the copies are damaged.
pub fn print_plan(state_dir: &Path) -> Result<(), AgentError> {
    let plan = keep::load_plan(state_dir)?.ok_or_else(|| AgentError::NoPlan { dir: state_dir.to_owned() })?;
    let text = serde_json::to_string_pretty(&plan).map_err(|e| io_at("print the plan")(e.into()))?;
    println!("{text}");
    Ok(())
}
