//! What a session and the hub say to each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use policy::plan::PlanChange;
use policy::status::{NodeStatus, Preview};
use policy::{EdgeDelta, Flow, Health, Inventory, NodePlan};
use tokio::sync::{mpsc, oneshot};

/// Who an agent says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The node's name.
    pub node: String,
    /// Id of the agent's spool.
    pub spool: String,
    /// Version of the agent, for people.
    pub version: String,
    /// Store and generation of the plan that is applied there; `None`: none.
    pub applied: Option<(String, u64)>,
    /// It takes the change to a plan in place of the whole.
    pub changes: bool,
}

/// What the hub gives a session that begins.
#[derive(Debug)]
pub struct Attachment {
    /// Id of the store.
    pub store: String,
    /// Highest sequence number of the greeting's spool that is in the store; 0: none.
    pub acknowledged: u64,
    /// What the agent is to be told, in order. When the hub drops its end, the session ends.
    pub orders: mpsc::Receiver<Order>,
}

/// Something for the agent.
#[derive(Clone, Debug)]
pub enum Order {
    /// Apply this plan; an agent that has it already does nothing.
    Plan {
        /// The plan.
        plan: Arc<NodePlan>,
        /// A person ran `bulkhead adopt`: take plans of this store from now on.
        adopt: bool,
    },
    /// Apply what the plan that was sent before becomes by this; an agent that has another one asks for the whole.
    Change(Arc<PlanChange>),
    /// Say what this plan would end, and answer with the number.
    Preview {
        /// Number of the question.
        id: u64,
        /// The plan that would be sent.
        plan: Arc<NodePlan>,
    },
}

/// One numbered batch of an agent's spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchIn {
    /// The node's name.
    pub node: String,
    /// Id of the agent's spool.
    pub spool: String,
    /// From 1, without gaps.
    pub seq: u64,
    /// The lowest number that the agent still had when the session began: what is before it will never come again.
    pub first: u64,
    /// What was seen.
    pub edges: Vec<EdgeDelta>,
    /// How well it was seen, oldest stretch first.
    pub health: Vec<Health>,
    /// Elements that could not be read and were left out, by reason.
    pub skipped: BTreeMap<String, u64>,
}

/// The node as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What runs there.
    pub inventory: Inventory,
    /// What it says of itself.
    pub status: NodeStatus,
}

/// An agent's answer to a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Store of the plan.
    pub store: String,
    /// Its generation.
    pub generation: u64,
    /// Why it was not applied; `None`: applied and read back.
    pub refused: Option<String>,
    /// Established connections ended.
    pub revoked: u64,
}

/// Why a batch is not in the store; the agent keeps it and sends it again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store did not take it: {why}")]
pub struct NotStored {
    /// The store's error with its causes, printed.
    pub why: String,
}

/// What a session tells the hub. Events of one session arrive in order, `Connected` first and `Gone` last.
#[derive(Debug)]
pub enum Event {
    /// An agent wants a session. Dropping `reply` or answering with a sentence refuses it.
    Connected {
        /// Distinguishes this session from an earlier one of the same node.
        session: u64,
        /// Who it is.
        greeting: Greeting,
        /// What the session needs, or why there is none.
        reply: oneshot::Sender<Result<Attachment, String>>,
    },
    /// A batch. `Ok` means that it is committed; only then the agent hears of it and forgets it.
    Batch {
        /// Which session.
        session: u64,
        /// The batch.
        batch: BatchIn,
        /// Committed, or not.
        reply: oneshot::Sender<Result<(), NotStored>>,
    },
    /// Flows for people who watch; never the source of an edge.
    Flows {
        /// The node's name.
        node: String,
        /// The flows.
        flows: Vec<Flow>,
        /// Not sent since the last message, because nobody could keep up (or could not be read).
        dropped: u64,
    },
    /// The node as it is now; replaces the report before.
    Report {
        /// The node's name.
        node: String,
        /// The report.
        report: Box<Report>,
    },
    /// Answer to a plan.
    Applied {
        /// The node's name.
        node: String,
        /// The answer.
        applied: Applied,
    },
    /// The agent has another plan than the one that a change begins from: it asks for the whole.
    Whole {
        /// Which session.
        session: u64,
        /// The node's name.
        node: String,
    },
    /// Answer to a preview.
    Answer {
        /// The node's name.
        node: String,
        /// Number of the question.
        id: u64,
        /// What the plan would end, or why the agent could not say.
        answer: Result<Preview, String>,
    },
    /// The session ended.
    Gone {
        /// Which session.
        session: u64,
        /// The node's name.
        node: String,
    },
}
