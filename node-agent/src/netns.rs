//! Entering the engine's network namespace. Must happen on the main thread before any other thread lives: a namespace belongs
//! to a thread (setns(2)), and threads inherit their parent's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

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

/// The kernel's id of this boot: the same for all namespaces of the machine, and another one after each (random(4)). Where the kernel
/// has no such id, all of its life is one boot.
pub fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Which network namespace (namespaces(7): by device and inode). Inodes are used again after a boot, so they say nothing across one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// In which boot.
    pub boot: String,
    /// The file's device.
    pub device: u64,
    /// The file's inode.
    pub inode: u64,
}

impl Identity {
    /// Of the namespace that this thread is in; `None`: /proc does not say.
    pub fn here() -> Option<Self> {
        let (device, inode) = numbers("/proc/thread-self/ns/net")?;
        Some(Self { boot: boot(), device, inode })
    }

    /// The lowest number of a process that is in it now.
    pub fn process(&self) -> Option<u32> {
        let processes = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let in_it = |pid: &u32| self.boot == boot() && numbers(&format!("/proc/{pid}/ns/net")) == Some((self.device, self.inode));
        processes.filter(in_it).min()
    }
}

fn numbers(path: &str) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_known_again_in_the_same_boot_and_by_a_process_in_it() {
        let here = Identity::here().unwrap();
        assert!(here.process().is_some_and(|pid| pid <= std::process::id()));
        assert_eq!(Identity { inode: 1, ..here.clone() }.process(), None);
        assert_eq!(Identity { boot: "another".to_owned(), ..here }.process(), None, "numbers of another boot name nothing");
    }

    #[test]
    fn a_namespace_is_named_by_its_file_or_by_a_process_in_it() {
        for (text, path) in [("/run/netns/a", "/run/netns/a"), ("412", "/proc/412/ns/net"), ("./412", "./412")] {
            assert_eq!(place(text), Ok(PathBuf::from(path)));
        }
    }
}
