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
    #[error("cannot open the network namespace {path}: give the number of a process in it, or a file such as /run/netns/NAME")]
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

/// The file of the namespace that a person named: the file itself, or the number of a process in it.
///
/// # Errors
/// Never; the form is what the command line asks for.
pub fn place(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    Ok(if is_number { PathBuf::from(format!("/proc/{text}/ns/net")) } else { PathBuf::from(text) })
}

/// Enters the namespace for this thread and all that it starts from now on.
///
/// # Errors
/// Each [`NetnsError`] with the path.
pub fn enter(path: &Path) -> Result<(), NetnsError> {
    let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| NetnsError::Enter { path: path.to_owned(), source: errno.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_named_by_its_file_or_by_a_process_in_it() {
        for (text, path) in [("/run/netns/a", "/run/netns/a"), ("412", "/proc/412/ns/net"), ("./412", "./412")] {
            assert_eq!(place(text), Ok(PathBuf::from(path)));
        }
    }
}
