//! One agent a network namespace. Its lock file says so to an agent on the same state; this says so to any: a name among the
//! namespace's abstract Unix sockets, which the kernel takes back with the process.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use tracing::warn;

use super::{AgentError, io_at};

const NAME: &str = "bulkhead-agent";

/// The name, as long as this lives; without it where somebody who is no agent has it.
pub(super) struct Name(Option<UnixListener>);

/// Who asks learns who we are, as long as this lives.
pub(super) struct Alone {
    task: Option<tokio::task::JoinHandle<()>>,
}

/// Takes the name. Before the agent is confined: then it may not look at who has it.
///
/// # Errors
/// `Another`: an agent works in this network namespace.
pub(super) fn take() -> Result<Name, AgentError> {
    let failed = || io_at("take the agent's name in this network namespace");
    let name = SocketAddr::from_abstract_name(NAME).map_err(failed())?;
    let listener = match UnixListener::bind_addr(&name) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let holder = UnixStream::connect_addr(&name).map_err(failed())?;
            let holder = getsockopt(&holder, PeerCredentials).map_err(|errno| failed()(errno.into()))?;
            let is_ours = Uid::from_raw(holder.uid()).is_root() || holder.uid() == Uid::effective().as_raw();
            if is_ours && is_of_the_host(holder.pid()) {
                return Err(AgentError::Another { pid: holder.pid() });
            }
            // Anybody may take the name; only an agent's keeps us from starting.
            warn!(uid = holder.uid(), pid = holder.pid(), "somebody who is no agent holds the agent's name in this network namespace");
            return Ok(Name(None));
        }
        Err(error) => return Err(failed()(error)),
    };
    listener.set_nonblocking(true).map_err(failed())?;
    Ok(Name(Some(listener)))
}

/// Whether a process runs our program, or has the host's files. Root in a container on the host's network has neither, and is not to
/// keep the agent from coming back.
fn is_of_the_host(pid: i32) -> bool {
    let same = |what: &str| {
        let which = |pid: &str| std::fs::metadata(format!("/proc/{pid}/{what}")).map(|found| (found.dev(), found.ino()));
        which("self").is_ok_and(|own| which(&pid.to_string()).is_ok_and(|its| its == own))
    };
    same("exe") || same("ns/mnt")
}

/// Answers who asks under the name; must be called within a tokio runtime.
///
/// # Errors
/// The runtime's.
pub(super) fn alone(Name(listener): Name) -> Result<Alone, AgentError> {
    let failed = || io_at("take the agent's name in this network namespace");
    let Some(listener) = listener else { return Ok(Alone { task: None }) };
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed())?;
    // Whoever asks learns who we are by connecting; a queue that nobody empties would fill.
    let task = tokio::spawn(async move {
        loop {
            if listener.accept().await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    });
    Ok(Alone { task: Some(task) })
}

impl Drop for Alone {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_the_hosts_files_may_be_an_agent_and_who_has_others_may_not() {
        assert!(is_of_the_host(std::process::id().cast_signed()));
        assert!(!is_of_the_host(i32::MAX), "nobody");
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: files of its own need root");
            return;
        }
        let mut child = std::process::Command::new("unshare").args(["-m", "sleep", "60"]).spawn().unwrap();
        let pid = child.id().cast_signed();
        let others = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            !is_of_the_host(pid)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(others);
    }
}
