//! The whole: merged graph, inventories, what is in force, suggestions. One task owns it all; everybody else holds a [`Hub`],
//! a cloneable handle, and asks by channel. What is decided is decided by pure functions of `policy`; here it is written into the
//! store in one transaction, and only then sent to the nodes.

mod decide;
pub(crate) mod documents;
pub(crate) mod explain;
mod name;
mod node;
mod promotion;
mod state;
mod task;
pub(crate) mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use policy::NodePlan;
use policy::review::Who;
use policy::status::Preview;
use policy::suggestion::Suggestion;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

pub use decide::Request;
pub(crate) use decide::{Would, is_foretold, to_apply, to_be_enforced, to_enforce};
pub use state::{State, outlines};
pub use task::{Options, start};

use crate::api::view::{Failure, FailureCode, InForce, Outcome};
use crate::store::StoreError;

/// Why a question or a decision comes to nothing; said to a person with what to do next.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The request makes no sense.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
        /// What to do.
        next: String,
    },
    /// A rule refuses it.
    #[error("{what}")]
    Refused {
        /// Which, and why.
        what: String,
        /// What to do.
        next: String,
    },
    /// There is none.
    #[error("{what}")]
    NotFound {
        /// No what.
        what: String,
        /// Where to look.
        next: String,
    },
    /// The store did not take it: nothing changed.
    #[error("nothing was changed: the decision could not be recorded")]
    Store(#[source] StoreError),
    /// The controller ends.
    #[error("the controller is shutting down")]
    Ending,
}

impl HubError {
    pub(crate) fn invalid(what: impl ToString, next: impl Into<String>) -> Self {
        Self::Invalid { what: what.to_string(), next: next.into() }
    }

    pub(crate) fn refused(what: impl ToString, next: impl Into<String>) -> Self {
        Self::Refused { what: what.to_string(), next: next.into() }
    }

    pub(crate) fn not_found(what: impl ToString, next: impl Into<String>) -> Self {
        Self::NotFound { what: what.to_string(), next: next.into() }
    }
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        let text = chain(&error);
        let (code, next) = match error {
            HubError::Invalid { next, .. } => (FailureCode::Invalid, next),
            HubError::Refused { next, .. } => (FailureCode::Refused, next),
            HubError::NotFound { next, .. } => (FailureCode::NotFound, next),
            HubError::Store(StoreError::Moved { .. }) => (FailureCode::Refused, "Look again, then decide again.".to_owned()),
            HubError::Store(_) => (FailureCode::Failed, "The controller's log tells more.".to_owned()),
            HubError::Ending => (FailureCode::Failed, String::new()),
        };
        Self { error: text, code, next }
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

type Read = Box<dyn FnOnce(&State) + Send>;

/// What a node said of a preview, or will.
pub type PreviewAnswers = BTreeMap<String, oneshot::Receiver<Result<Preview, String>>>;

enum Ask {
    Read(Read),
    Refresh(Read),
    Decide { request: Box<Request>, who: Who, reply: oneshot::Sender<Result<Outcome, HubError>> },
    Would { request: Box<Request>, reply: oneshot::Sender<Result<Would, HubError>> },
    Preview { plan: Arc<NodePlan>, reply: oneshot::Sender<PreviewAnswers> },
}

/// A handle to the task that owns the state.
#[derive(Clone)]
pub struct Hub {
    asks: mpsc::Sender<Ask>,
    flows: broadcast::Sender<Arc<state::Kept>>,
    answered: watch::Receiver<u64>,
}

impl Hub {
    /// Looks at the state: the closure runs in the task that owns it, so it sees one moment and must be quick.
    ///
    /// # Errors
    /// The controller ends.
    pub async fn read<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T, HubError> {
        let (reply, answer) = oneshot::channel();
        // Whoever asked went away: nobody to tell.
        let look: Read = Box::new(move |state| drop(reply.send(look(state))));
        self.asks.send(Ask::Read(look)).await.map_err(|_| HubError::Ending)?;
        answer.await.map_err(|_| HubError::Ending)
    }

    /// As `read`, with suggestions that hold everything seen so far, not only what the last learning saw.
    ///
    /// # Errors
    /// The controller ends.
    pub async fn read_learned<T: Send + 'static>(&self, look: impl FnOnce(&State) -> T + Send + 'static) -> Result<T, HubError> {
        let (reply, answer) = oneshot::channel();
        let look: Read = Box::new(move |state| drop(reply.send(look(state))));
        self.asks.send(Ask::Refresh(look)).await.map_err(|_| HubError::Ending)?;
        answer.await.map_err(|_| HubError::Ending)
    }

    /// Decides: one transaction in the store, then plans to the nodes.
    ///
    /// # Errors
    /// What refuses it; nothing has changed then.
    pub async fn decide(&self, request: Request, who: Who) -> Result<Outcome, HubError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Decide { request: Box::new(request), who, reply }).await.map_err(|_| HubError::Ending)?;
        answer.await.map_err(|_| HubError::Ending)?
    }

    /// What a decision would put in force; nothing is changed.
    ///
    /// # Errors
    /// What would refuse it.
    pub(crate) async fn would(&self, request: Request) -> Result<Would, HubError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Would { request: Box::new(request), reply }).await.map_err(|_| HubError::Ending)?;
        answer.await.map_err(|_| HubError::Ending)?
    }

    /// Asks every connected node which connections a plan would end.
    ///
    /// # Errors
    /// The controller ends.
    pub async fn preview(&self, plan: Arc<NodePlan>) -> Result<PreviewAnswers, HubError> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(Ask::Preview { plan, reply }).await.map_err(|_| HubError::Ending)?;
        answer.await.map_err(|_| HubError::Ending)
    }

    /// Where a generation is in force, by node. Waits until every connected agent has answered, for at most so long.
    ///
    /// # Errors
    /// The controller ends.
    pub async fn in_force(&self, generation: u64, within: Duration) -> Result<BTreeMap<String, InForce>, HubError> {
        let mut answered = self.answered.clone();
        let deadline = Instant::now() + within;
        loop {
            answered.mark_unchanged();
            let nodes = self.read(move |state| view::in_force(state, generation)).await?;
            let waits = nodes.values().any(|node| matches!(node, InForce::Unanswered { .. }));
            if !waits || !matches!(timeout_at(deadline, answered.changed()).await, Ok(Ok(()))) {
                return Ok(nodes);
            }
        }
    }

    /// The suggestion of one workload, up to date.
    ///
    /// # Errors
    /// Unknown workload; the controller ends.
    pub async fn suggestion(&self, workload: policy::Workload) -> Result<Suggestion, HubError> {
        self.read_learned(move |state| state.suggestion(&workload)).await?
    }

    /// Flows as they come. A reader that is too slow is told how many it missed.
    pub(crate) fn follow(&self) -> broadcast::Receiver<Arc<state::Kept>> {
        self.flows.subscribe()
    }
}
