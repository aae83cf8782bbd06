//! What a node says of itself: which network is enforced, which is not and why, what was lost, what was found and repaired.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::flow::Tuple;
use crate::graph::{EdgeKey, LeftOut};
use crate::service::Service;
use crate::workload::{Endpoint, Workload};

/// Whether the kernel holds what was planned for a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NetworkState {
    /// Seen, nothing denied there.
    Observed,
    /// What would be denied is logged.
    Audited,
    /// Guarded: read back from the kernel and found as planned.
    Enforced,
    /// Should be guarded, and is not: why.
    NotEnforced(String),
    /// Cannot be filtered at all: why.
    NotEnforceable(String),
}

/// One network as the node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkStatus {
    /// The engine's name for it.
    pub name: String,
    /// The bridge's interface name.
    pub bridge: Option<String>,
    /// State with its reason.
    pub state: NetworkState,
}

/// Something that a person should know, with the time it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Alarm {
    /// When.
    pub time: Timestamp,
    /// What happened, to what, what it may mean, what was done.
    pub text: String,
}

/// Packets of one side that were denied, or would be, for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeniedBy {
    /// Whose side said no: a workload, `host:`, or `outside:` and `unknown:` for all of these together.
    pub side: String,
    /// Why, in words.
    pub reason: String,
    /// Exact since the agent started.
    pub packets: u64,
}

/// Packets from one end to another that were denied, or would be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeniedPair {
    /// Sender.
    pub from: Endpoint,
    /// Receiver.
    pub to: Endpoint,
    /// What was asked for.
    pub service: Service,
    /// Why, in words.
    pub reason: String,
    /// Since the agent started.
    pub packets: u64,
}

/// What was denied since the agent started, counted packet by packet, whatever the log left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Denied {
    /// All of it, by reason: exact.
    pub total: BTreeMap<String, u64>,
    /// By whose side it was: exact.
    pub by: Vec<DeniedBy>,
    /// The pairs with most packets.
    pub pairs: Vec<DeniedPair>,
    /// What is in the total and in none of the pairs, by reason.
    pub other: BTreeMap<String, u64>,
}

/// A node's own account, sent when it changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeStatus {
    /// Version of the agent.
    pub version: String,
    /// When the agent started to observe.
    pub since: Option<Timestamp>,
    /// Networks of the engine.
    pub networks: Vec<NetworkStatus>,
    /// Store and generation of the plan that the kernel holds.
    pub store: String,
    /// See `store`.
    pub generation: u64,
    /// Kernel events read and lost since the start.
    pub events: u64,
    /// See `events`.
    pub lost: u64,
    /// Why the agent sees nothing or not all, right now; empty: it sees all it should.
    pub blind: Vec<String>,
    /// Events or records skipped, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Connection tracking entries in use and their limit.
    pub conntrack: (u64, u64),
    /// The most recent alarms, oldest first.
    pub alarms: Vec<Alarm>,
    /// What was denied, in packets.
    pub denied: Denied,
    /// Processes of the host that reach a workload through the user-land proxy's road.
    pub riders: Vec<String>,
    /// What the agent's graph has no room for.
    pub left_out: Vec<LeftOut>,
    /// Containers that pass packets on between their networks: one sentence each.
    pub forwarders: Vec<String>,
    /// Enforced networks that would be open while the agent is dead, were they made anew just then: which, and why.
    pub contested: Vec<String>,
    /// Workloads in Enforce that may send frames of any content and form ([`crate::inventory::Container::raw`]), where the kernel cannot
    /// look at checksums that are yet to be written: two bytes of a packet of theirs can change behind the filter.
    pub raw: BTreeSet<Workload>,
    /// What the node's kernel lacks to confine the agent.
    pub unconfined: Vec<String>,
}

/// What a plan would end if it were applied now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// Established connections that the plan doesn't allow, by edge, with a few of their tuples.
    pub ended: Vec<Ended>,
    /// Workloads that run here under Enforce without an approved policy.
    pub unlearned: Vec<Workload>,
}

/// Connections of one edge that would end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// Which edge.
    pub edge: EdgeKey,
    /// How many connections.
    pub connections: u64,
    /// At most five of them.
    pub examples: Vec<Tuple>,
    /// Why the plan denies it.
    pub reason: String,
}

/// How one thing that was looked at on a host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    /// As it should be.
    Ok,
    /// Works, with something to know.
    Warn,
    /// Does not work.
    Fail,
}

impl fmt::Display for CheckState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing that was looked at on a host before anything is changed there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was looked at, in a word or two; stable.
    pub name: String,
    /// How it stands.
    pub state: CheckState,
    /// What was found.
    pub what: String,
    /// What to do about it; empty where there is nothing to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Check {
    /// As it should be.
    pub fn ok(name: &str, what: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: CheckState::Ok, what: what.into(), remedy: String::new() }
    }

    /// Works, with something to know.
    pub fn warn(name: &str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: CheckState::Warn, what: what.into(), remedy: remedy.into() }
    }

    /// Does not work.
    pub fn fail(name: &str, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: CheckState::Fail, what: what.into(), remedy: remedy.into() }
    }

    /// Whether it does not work.
    pub fn fails(&self) -> bool {
        self.state == CheckState::Fail
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<4} {}: {}", self.state, self.name, self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n     {}", self.remedy) }
    }
}
