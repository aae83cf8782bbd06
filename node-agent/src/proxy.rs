//! A filter before the engine's socket, in a process of its own: only GETs on events, networks and containers pass.
//!
//! # Why
//! Who can write to the engine's socket is root on the node. The agent only has to read, so it is given a socket behind which
//! nothing but reading is possible. Of a request nothing is passed on but what was understood: method, path and query are parsed,
//! compared with a list, and written anew; headers and bodies of the client never reach the engine, so there is nothing to smuggle
//! a second request in. It stops there: what the engine answers is passed on whole, streams as they come.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Uid;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tracing::{debug, info, warn};

use crate::confine::{self, ConfineError};

mod permit;

pub use permit::{Refusal, permit};

/// More than the agent ever has open; beyond it connections wait.
const CONNECTIONS: usize = 64;
/// A client that doesn't finish its request's head.
const HEAD: Duration = Duration::from_secs(10);
/// A request's head of ours is below 1 KiB but for the list of ids.
const HEAD_BYTES: usize = 64 * 1024;
/// Until the engine begins to answer. Container inspect waits for a container that starts.
const ANSWER: Duration = Duration::from_secs(60);

/// Why the filter can't run.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// Another filter listens there.
    #[error("{} is in use: another filter is running", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket can't be made.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The filter could not give up what it doesn't need.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// No runtime or no signal handler.
    #[error("cannot set up the process")]
    Runtime(#[source] io::Error),
    /// No connection can be taken any more.
    #[error("cannot accept connections")]
    Accept(#[source] io::Error),
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// The whole process: gives up what it doesn't need, serves on one thread until SIGTERM or SIGINT, removes its socket.
///
/// # Errors
/// As [`serve`], and where the process can't be set up.
pub fn main(engine: &Path, listen: &Path) -> Result<(), ProxyError> {
    // Before any other thread is started. Whatever is found in a parser, all that can be gained is the engine's socket.
    confine::filter(listen.parent().unwrap_or(Path::new("/")))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ProxyError::Runtime)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(ProxyError::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ProxyError::Runtime)?;
        tokio::select! {
            ended = serve(engine, listen) => ended,
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })
}

/// Listens until it can't; only the user who runs this, and root, may connect. The socket is removed when the returned future is dropped.
///
/// # Errors
/// Each [`ProxyError`] with its facts. An engine that can't be reached is no error here: the client gets 502 with the reason.
pub async fn serve(engine: &Path, listen: &Path) -> Result<(), ProxyError> {
    let socket = Socket::bind(listen).await?;
    info!(engine = %engine.display(), listen = %listen.display(), "engine filter listens");
    let engine: Arc<Path> = engine.into();
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
        let (stream, _) = match socket.listener.accept().await {
            Ok(accepted) => accepted,
            // Out of file descriptors: some of ours will be closed.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE | nix::libc::ECONNABORTED)) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(error) => return Err(ProxyError::Accept(error)),
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == Uid::effective().as_raw() => {}
            peer => {
                warn!(?peer, "refused: only the agent may ask");
                continue;
            }
        }
        let engine = Arc::clone(&engine);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&engine, request));
            let mut server = hyper::server::conn::http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES).half_close(false);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                debug!(error = &error as &dyn std::error::Error, "connection ended");
            }
            drop(place);
        });
    }
}

/// A listening socket whose file goes away with it.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    async fn bind(path: &Path) -> Result<Self, ProxyError> {
        let failed = |cause| ProxyError::Listen { path: path.to_owned(), cause };
        if path.exists() {
            // One that nobody listens on was left by a filter that was killed.
            if UnixStream::connect(path).await.is_ok() {
                return Err(ProxyError::InUse { path: path.to_owned() });
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        // Nobody can connect between bind and listen: by then the mode is ours.
        let made = || -> io::Result<std::os::unix::net::UnixListener> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            listen(&socket, Backlog::MAXCONN)?;
            Ok(socket.into())
        };
        let listener = made().and_then(UnixListener::from_std).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn answer(engine: &Path, request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    let target = match permit(request.method(), request.uri(), request.headers()) {
        Ok(target) => target,
        Err(refusal) => {
            warn!(method = %request.method(), path = request.uri().path(), %refusal, "request refused");
            return Ok(say(StatusCode::FORBIDDEN, &format!("bulkhead engine-filter: {refusal}")));
        }
    };
    match tokio::time::timeout(ANSWER, ask(engine, &target)).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => {
            let causes = std::iter::successors(Some(&*error as &dyn std::error::Error), |error| error.source());
            let causes: Vec<String> = causes.map(ToString::to_string).collect();
            Ok(say(StatusCode::BAD_GATEWAY, &format!("bulkhead engine-filter: {}: {}", engine.display(), causes.join(": "))))
        }
        Err(_) => Ok(say(StatusCode::GATEWAY_TIMEOUT, "bulkhead engine-filter: the engine did not begin to answer")),
    }
}

/// One request to the engine on a connection of its own, which ends with the answer.
async fn ask(engine: &Path, target: &str) -> Result<Response<Body>, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(engine).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the body's last byte, or when the body is dropped: a client that goes away ends an event stream.
    tokio::spawn(connection);
    let request = Request::get(target).header(HOST, HeaderValue::from_static("engine")).body(Empty::<Bytes>::new())?;
    let (head, body) = sender.send_request(request).await?.into_parts();
    // A GET without an Upgrade header is never answered so; if it is, what follows is no longer HTTP.
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err("the engine wants to change the protocol".into());
    }
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = head.status;
    if let Some(kind) = head.headers.get(CONTENT_TYPE) {
        response.headers_mut().insert(CONTENT_TYPE, kind.clone());
    }
    Ok(response)
}

fn say(status: StatusCode, reason: &str) -> Response<Body> {
    // As the engine words its own errors, so that a client shows the reason.
    let text = serde_json::json!({ "message": reason }).to_string();
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
