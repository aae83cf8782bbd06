//! Entering the engine's network namespace. Must happen on the main thread before any other thread lives: a namespace belongs
//! to a thread (setns(2)), and threads inherit their parent's.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

/// The namespace cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// Not there, or not readable.
    #[error("cannot open the network namespace {path}: give a file such as /run/netns/NAME or /proc/PID/ns/net")]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot enter the network namespace {path}: it needs CAP_SYS_ADMIN, run as root")]
    Enter {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Enters the namespace for this thread and all that it starts from now on.
///
/// # Errors
/// Each [`NetnsError`] with the path.
pub fn enter(path: &Path) -> Result<(), NetnsError> {
    let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter { path: path.to_owned(), source: errno.into() })
}
