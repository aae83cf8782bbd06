//! The socket that agents dial.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use futures::Stream;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tonic::transport::Server;
use tracing::{info, warn};

use super::{Event, Options, Sessions};
use crate::wire::node_server::NodeServer;

/// Owner and group may dial; who they are is asked again by uid.
const MODE: u32 = 0o660;

/// A report of a host with a thousand containers is some megabytes.
const LARGEST: usize = 64 << 20;

/// What can go wrong with the socket.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Somebody listens there already.
    #[error("another controller listens on {path}: stop it, or give this one its own --run-dir")]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// There is something else under that name.
    #[error("{path} is not a socket; it was not touched. Move it away, or name another --run-dir")]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The system said no.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Serving failed.
    #[error("cannot serve agents on {path}")]
    Serve {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: tonic::transport::Error,
    },
}

/// The open socket. Agents that dial from now on are answered once [`Listener::serve`] runs.
#[derive(Debug)]
pub struct Listener {
    options: Options,
    listener: UnixListener,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SessionError {
    let path = path.to_owned();
    move |source| SessionError::Io { what, path, source }
}

impl Listener {
    /// Opens the socket. It appears under its name with its final mode and group; a dead one in its place is replaced. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// Somebody listens there already, something else is there, or the file system says no.
    pub async fn bind(options: Options) -> Result<Self, SessionError> {
        let path = &options.socket;
        match tokio::fs::symlink_metadata(path).await {
            Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
                return Err(SessionError::NotASocket { path: path.clone() });
            }
            // A socket that nobody listens on refuses: what is left of a controller that was killed.
            Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(SessionError::Taken { path: path.clone() }),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("look for", path)(e)),
        }
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        match std::fs::remove_file(&new) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("remove", &new)(e)),
        }
        let listener = UnixListener::bind(&new).map_err(failed("listen on", &new))?;
        if let Some(group) = options.group {
            std::os::unix::fs::chown(&new, None, Some(group)).map_err(failed("give to its group", &new))?;
        }
        std::fs::set_permissions(&new, PermissionsExt::from_mode(MODE)).map_err(failed("set the mode of", &new))?;
        std::fs::rename(&new, path).map_err(failed("rename to its place", &new))?;
        Ok(Self { options, listener })
    }

    /// Serves agents until `stop` becomes true (or its sender is gone); sessions end then, and the socket is removed.
    ///
    /// # Errors
    /// Serving failed.
    pub async fn serve(self, events: mpsc::Sender<Event>, stop: watch::Receiver<bool>) -> Result<(), SessionError> {
        let path = self.options.socket.clone();
        let sessions = Sessions { options: self.options, events, stopped: stop.clone(), numbers: AtomicU64::new(0) };
        info!(socket = %path.display(), "agents may dial");
        let mut stopped = stop;
        let done = {
            let path = path.clone();
            async move {
                let _ = stopped.wait_for(|stopped| *stopped).await;
                // While we still listen: a successor that looked before this found us, one that looks after it finds nothing.
                let _ = std::fs::remove_file(&path);
            }
        };
        let node = NodeServer::from_arc(Arc::new(sessions)).max_decoding_message_size(LARGEST);
        let served = Server::builder().add_service(node).serve_with_incoming_shutdown(accepted(self.listener), done).await;
        served.map_err(|source| SessionError::Serve { path, source })
    }
}

/// Connections as they come. An error of accept (out of descriptors, for example) is no reason to end: it passes.
fn accepted(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> {
    futures::stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok(stream), listener)),
                Err(e) => {
                    warn!(error = %e, "an agent could not be let in");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}
