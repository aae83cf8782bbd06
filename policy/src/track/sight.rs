//! What the tracker has to say of a flow, before its ends have names.

use std::net::IpAddr;

use jiff::Timestamp;

use crate::evidence::Road;
use crate::flow::{FlowOutcome, Tuple};
use crate::service::Service;

/// A flow of this run of the agent; never used again.
pub type FlowId = u64;

/// Where a first packet came in and went out, by interface index; 0 is the node itself, `None` is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The interface it came in by (the bridge for a packet of a bridge port); 0: the node itself sent it.
    pub entered: Option<u32>,
    /// The interface it left by; 0: it was for the node itself.
    pub left: Option<u32>,
    /// The port of the bridge it came in by.
    pub port: Option<u32>,
}

/// What was on the wire when a flow began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wire {
    /// The first packet, before any rewriting.
    pub tuple: Tuple,
    /// Who answers, after rewriting.
    pub server: IpAddr,
    /// Protocol and the port of `server`.
    pub service: Service,
    /// Whether the destination was rewritten.
    pub road: Road,
    /// Interfaces; not known of what is older than our rules.
    pub place: Place,
    /// When it began, or was first seen if it is older than the agent.
    pub time: Timestamp,
    /// Older than the agent, or met in the middle.
    pub pre_existing: bool,
    /// Whether the first packet that was seen is the first that was sent. If not, who listens decides.
    pub direction_sure: bool,
}

/// One thing said of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// It began. Not a flow to be counted yet, but the time to find out whose it is.
    Opened {
        /// Which flow.
        flow: FlowId,
        /// What was on the wire.
        wire: Wire,
    },
    /// How it went: counts the flow.
    Went {
        /// Which flow.
        flow: FlowId,
        /// Its first packet, before any rewriting.
        tuple: Tuple,
        /// How.
        outcome: FlowOutcome,
        /// When it began.
        time: Timestamp,
        /// Bytes so far, from the client.
        sent: u64,
        /// Bytes so far, from the server.
        received: u64,
    },
    /// More bytes of a flow that was counted.
    Grew {
        /// Which flow.
        flow: FlowId,
        /// Its first packet, before any rewriting.
        tuple: Tuple,
        /// When that was seen.
        time: Timestamp,
        /// Additional bytes from the client.
        sent: u64,
        /// Additional bytes from the server.
        received: u64,
    },
    /// Nothing more will be said of it.
    Closed {
        /// Which flow.
        flow: FlowId,
    },
}

impl Sight {
    /// Of which flow it is said.
    pub(crate) fn flow(&self) -> FlowId {
        match self {
            Self::Opened { flow, .. } | Self::Went { flow, .. } | Self::Grew { flow, .. } | Self::Closed { flow } => *flow,
        }
    }
}
