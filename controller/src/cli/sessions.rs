//! Opens the agents' socket for the controller.

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::args::ControllerArgs;
use crate::session::{Event, Listener, Options, SessionError};
use crate::supervise::Places;

/// Serves agents until `stop` says so.
pub(super) async fn start(
    places: &Places,
    args: &ControllerArgs,
    events: mpsc::Sender<Event>,
    stop: watch::Receiver<bool>,
) -> Result<JoinHandle<Result<(), SessionError>>, SessionError> {
    let options = Options { agent_uid: args.agent_uid, ..Options::new(places.node()) };
    let listener = Listener::bind(options).await?;
    Ok(tokio::spawn(listener.serve(events, stop)))
}
