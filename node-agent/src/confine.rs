//! What the agent and the engine filter give up once they have started: capabilities ([`rights`]), files ([`files`], landlock),
//! system calls ([`calls`], seccomp). What a kernel has none of is named, for the log and for `status`; nothing is given back.
//!
//! # Why
//! The agent reads what strangers wrote: packets, netlink, the engine's JSON, the controller's plans. A mistake in a reader must not
//! be worth the whole host. To be called before the first thread is started: each of these belongs to a thread and is inherited.

mod calls;
mod files;
mod rights;

use std::io;
use std::path::PathBuf;

use tracing::info;

pub use rights::join_group;

/// Why a process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Capabilities or groups.
    #[error("cannot give up capabilities")]
    Rights(#[from] caps::errors::CapsError),
    /// The flag no_new_privs.
    #[error("cannot give up the right to gain privileges")]
    NoNewPrivileges(#[source] nix::Error),
    /// The group of the controller's socket.
    #[error("cannot join group {gid}, whose members may open the controller's socket")]
    Group {
        /// Which.
        gid: u32,
        /// The cause.
        #[source]
        source: nix::Error,
    },
    /// Files.
    #[error("cannot limit which files this process may use")]
    Files(#[from] landlock::RulesetError),
    /// What is to be limited to cannot be found.
    #[error("cannot find {what}, which this process goes on to need")]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// System calls.
    #[error("cannot refuse system calls")]
    Calls(#[from] seccompiler::Error),
}

/// What the agent goes on to need.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// Its own state: read and written.
    pub state_dir: PathBuf,
    /// Data roots of engines: of their containers' files it reads `resolv.conf`.
    pub engine_roots: Vec<PathBuf>,
    /// The port it serves metrics at.
    pub metrics: Option<u16>,
}

/// Confines the agent. Returns what this kernel has no limits for, each in a sentence.
///
/// # Errors
/// The kernel refuses what it knows.
pub fn agent(needs: &Agent) -> Result<Vec<String>, ConfineError> {
    rights::keep(&rights::AGENT)?;
    nix::sys::prctl::set_no_new_privs().map_err(ConfineError::NoNewPrivileges)?;
    let absent = [files::agent(needs)?, calls::agent()?].into_iter().flatten().collect();
    info!(?absent, "confined to what it needs");
    Ok(absent)
}

/// Confines the engine filter to one folder, in which its socket is, and to Unix sockets.
///
/// # Errors
/// As [`agent`].
pub fn filter(folder: &std::path::Path) -> Result<(), ConfineError> {
    rights::keep(&[])?;
    nix::sys::prctl::set_no_new_privs().map_err(ConfineError::NoNewPrivileges)?;
    // What is absent is absent for the agent too, which tells it.
    files::filter(folder)?;
    calls::filter()?;
    Ok(())
}
