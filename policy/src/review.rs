//! A person's decision on one digest of a suggestion, and what it makes of the policies in force.

mod apply;
mod enforce;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::apply::{Choice, Edge, Reading, Refused, Reviewed, allow, approve, edit, reject, revert, within_guardrails};
pub use self::enforce::{Foreseen, ForeseenDenial, foresee, foresee_change, to_enforce, unlearned};

/// Who decided, as far as the machine can know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Who {
    /// The peer's user id on the socket; the truth.
    pub uid: u32,
    /// Its name at that time.
    pub name: String,
    /// What SUDO_USER said; a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claims: Option<String>,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Approved a suggestion, whole or some rules.
    Approve,
    /// Rejected a suggestion, whole or some rules.
    Reject,
    /// Added an edge by hand.
    Allow,
    /// Changed a policy by hand.
    Edit,
    /// Went back to an earlier revision.
    Revert,
    /// Changed the members or options of a segment.
    Segment,
    /// Switched a segment's mode.
    Mode,
    /// A promotion rule written by the operator switched a mode.
    Promote,
    /// Took out rules whose time, written down when they were allowed, is over.
    Expire,
    /// Cut a workload off.
    Quarantine,
    /// Gave it back.
    Release,
    /// Took out a document that denies and allows nothing by itself (a guardrail).
    Delete,
    /// Took over a node for another store.
    Adopt,
    /// Took the protection down.
    Down,
}

/// One line of the append-only record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// Number in the record, from 1, without gaps.
    pub number: u64,
    /// When.
    pub time: Timestamp,
    /// Who.
    pub who: Who,
    /// What was done.
    pub action: Action,
    /// To what: a workload or a segment, printed.
    pub subject: String,
    /// The digest that was read, for decisions on a suggestion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The rules concerned, printed; empty: the whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<String>,
    /// Why, in the person's words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// Generation of the policy set that it made.
    pub generation: u64,
}
