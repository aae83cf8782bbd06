//! HTTP and JSON on a Unix socket, for the command line and later the page. Who asks is the peer's uid; only root, members of the
//! group `bulkhead` and, if nobody else started it, the controller's own user may speak, whatever the mode of the socket says.

pub mod ask;
mod peer;
mod routes;
mod stream;
pub mod view;

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use axum::Router;
use tokio::net::UnixListener;
use tokio::sync::watch;

pub use peer::Gate;

use crate::hub::Hub;

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Somebody serves there already.
    #[error("{path} is served by another controller already")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot {what} the socket {path}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Everything a route needs.
#[derive(Clone)]
struct Served {
    hub: Hub,
    stop: watch::Receiver<bool>,
}

/// A socket at a path, for its owner and its group. A socket that nobody serves is a leftover and is replaced.
///
/// # Errors
/// Somebody serves there; the file system says no.
pub fn listen(path: &Path, gate: &Gate) -> Result<UnixListener, ApiError> {
    let failed = |what| move |source| ApiError::Socket { what, path: path.to_owned(), source };
    if path.exists() {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(ApiError::InUse { path: path.to_owned() });
        }
        std::fs::remove_file(path).map_err(failed("remove the leftover of"))?;
    }
    let listener = UnixListener::bind(path).map_err(failed("make"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(failed("set the mode of"))?;
    if let Some(group) = gate.group() {
        match chown(path, None, Some(group)) {
            Ok(()) => {}
            // Not root and not a member: its own group has to do.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::warn!(path = %path.display(), "the socket cannot be given to the group bulkhead: its members cannot use it");
            }
            Err(error) => return Err(failed("give away")(error)),
        }
    }
    Ok(listener)
}

/// Serves until `stop` says so; answers that are under way are finished.
///
/// # Errors
/// The listener broke.
pub async fn serve(listener: UnixListener, hub: Hub, gate: Gate, stop: watch::Receiver<bool>) -> io::Result<()> {
    let mut ended = stop.clone();
    let routes: Router = routes::routes(Served { hub, stop }, gate);
    let service = routes.into_make_service_with_connect_info::<peer::Peer>();
    let until = async move {
        // The sender is gone: the controller ends as well.
        let _ = ended.wait_for(|stop| *stop).await;
    };
    axum::serve(listener, service).with_graceful_shutdown(until).await
}
