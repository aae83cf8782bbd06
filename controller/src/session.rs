//! The gRPC side: agents, their batches, reports and plans. A session carries; what a batch means and which plan a node gets is
//! the hub's business, which hears [`Event`]s and sends [`Order`]s. It is also the hub that refuses a second agent for a node.
//!
//! # Why a session stops reading
//! A session has a few batches with the hub at a time. Until one of them is answered it takes nothing more from the socket, and
//! HTTP/2's flow control makes the agent wait, whose spool merges what waits: memory stays flat on both sides.

mod event;
mod listener;
mod talk;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use policy::wire::{FromAgent, FromController};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use crate::wire::node_server::Node;
pub use event::{Applied, Attachment, BatchIn, Event, Greeting, NotStored, Order, Report};
pub use listener::{Listener, SessionError};

/// How agents are served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket; its directory must exist.
    pub socket: PathBuf,
    /// The user that agents run as, besides root.
    pub agent_uid: Option<u32>,
    /// The group that may open the socket; `None`: the controller's own.
    pub group: Option<u32>,
    /// Version of the controller, for people.
    pub version: String,
}

impl Options {
    /// Root's agents only.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, agent_uid: None, group: None, version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

/// The `Node` service: one task a session.
#[derive(Debug)]
struct Sessions {
    options: Options,
    events: mpsc::Sender<Event>,
    stopped: watch::Receiver<bool>,
    numbers: AtomicU64,
}

impl Sessions {
    /// Who may be an agent. On a Unix socket the peer's uid is the proof; other transports bring their own.
    fn admit(&self, request: &Request<Streaming<FromAgent>>) -> Result<(), Status> {
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let Some(peer) = peer else {
            return Err(Status::permission_denied("the kernel does not say who dials"));
        };
        if peer.uid() == 0 || self.options.agent_uid == Some(peer.uid()) {
            return Ok(());
        }
        warn!(uid = peer.uid(), pid = peer.pid(), "refused: only root's agent and the configured user's may open a session");
        Err(Status::permission_denied(format!("user {} is not an agent's: run the agent as root", peer.uid())))
    }
}

#[tonic::async_trait]
impl Node for Sessions {
    type SessionStream = ReceiverStream<Result<FromController, Status>>;

    async fn session(&self, request: Request<Streaming<FromAgent>>) -> Result<Response<Self::SessionStream>, Status> {
        self.admit(&request)?;
        let (down, answers) = mpsc::channel(talk::IN_FLIGHT * 2);
        let talk = talk::Talk {
            session: self.numbers.fetch_add(1, Ordering::Relaxed) + 1,
            version: self.options.version.clone(),
            incoming: request.into_inner(),
            down,
            events: self.events.clone(),
        };
        let mut stopped = self.stopped.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = talk.run() => {}
                // Also when the listener is gone.
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}
