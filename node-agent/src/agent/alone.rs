//! One agent a network namespace. Its lock file says so to an agent on the same state; this says so to any: a name among the
//! namespace's abstract Unix sockets, which the kernel takes back with the process.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Uid;
use tracing::warn;

use super::{AgentError, io_at};

const NAME: &str = "bulkhead-agent";

/// The name, as long as this lives.
pub(super) struct Alone {
    task: Option<tokio::task::JoinHandle<()>>,
}

/// Takes the name; must be called within a tokio runtime.
///
/// # Errors
/// `Another`: an agent works in this network namespace.
pub(super) fn alone() -> Result<Alone, AgentError> {
    let failed = || io_at("take the agent's name in this network namespace");
    let name = SocketAddr::from_abstract_name(NAME).map_err(failed())?;
    let listener = match UnixListener::bind_addr(&name) {
        Ok(listener) => listener,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let holder = UnixStream::connect_addr(&name).map_err(failed())?;
            let holder = getsockopt(&holder, PeerCredentials).map_err(|errno| failed()(errno.into()))?;
            if Uid::from_raw(holder.uid()).is_root() || holder.uid() == Uid::effective().as_raw() {
                return Err(AgentError::Another { pid: holder.pid() });
            }
            // Anybody may take the name; only an agent's keeps us from starting.
            warn!(uid = holder.uid(), pid = holder.pid(), "somebody who is no agent holds the agent's name in this network namespace");
            return Ok(Alone { task: None });
        }
        Err(error) => return Err(failed()(error)),
    };
    listener.set_nonblocking(true).map_err(failed())?;
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
