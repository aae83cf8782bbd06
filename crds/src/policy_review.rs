//! `PolicyReview`: a person's decision on one digest of a suggestion. Apart from the suggestion, so that who may learn and who
//! may decide can be different people.

use jiff::Timestamp;
use kube::CustomResource;
use policy::Workload;
use policy::review::{self, Action};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::Refused;
use crate::{name, schema};

/// A person's decision on one digest of a suggestion. It is taken only if the suggestion still has that digest: nobody
/// approves what they didn't read. A decision is never changed; a later one follows it.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "bulkhead.dev",
    version = "v1alpha1",
    kind = "PolicyReview",
    namespaced,
    status = "PolicyReviewStatus",
    derive = "PartialEq",
    category = "bulkhead",
    shortname = "prev",
    doc = "A person's decision on one digest of a suggestion. Taken only if the suggestion still has that digest.",
    printcolumn(name = "Workload", type_ = "string", json_path = ".spec.workload"),
    printcolumn(name = "Decision", type_ = "string", json_path = ".spec.decision"),
    printcolumn(name = "By", type_ = "string", json_path = ".status.who.name"),
    printcolumn(name = "Comment", type_ = "string", json_path = ".spec.comment"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("x-kubernetes-validations" = [
    { "rule": "self == oldSelf", "message": "a decision is never changed: write another review" },
]))]
pub struct PolicyReviewSpec {
    /// On whose suggestion, for example `shop/db`.
    #[schemars(with = "schema::Workload")]
    pub workload: Workload,

    /// The digest that was read, as the suggestion's `status.digest` or `bulkhead describe` shows it.
    #[schemars(length(min = 1, max = 128))]
    pub digest: String,

    /// What was decided.
    pub decision: Verdict,

    /// The rules it is about, by their ids. Left out: the whole suggestion (a denied attempt is never part of the whole).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<schema::Code>", length(max = 4096))]
    pub rules: Vec<String>,

    /// Codes of blocking findings that are accepted with this approval, for example `no-dns`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<schema::Code>", length(max = 100))]
    pub accept: Vec<String>,

    /// Why, in your own words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 4096))]
    pub comment: String,
}

/// What a reviewer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub enum Verdict {
    /// It goes into force.
    Approved,
    /// It doesn't, and the same rule does not come back by itself.
    Rejected,
}

/// What the record says of the decision. Written by the controller, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyReviewStatus {
    /// Its number in the record, from 1, without gaps.
    pub number: u64,
    /// When it was taken.
    #[schemars(with = "schema::Time")]
    pub time: Timestamp,
    /// Who took it.
    pub who: Who,
    /// Generation of the policies that it made.
    pub generation: u64,
}

/// Who decided, as far as the machine can know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Who {
    /// The user id at the other end of the socket: the truth.
    pub uid: u32,
    /// Its name at that time.
    pub name: String,
    /// What SUDO_USER said: a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claims: Option<String>,
}

impl TryFrom<&review::Decision> for PolicyReview {
    type Error = Refused;

    /// The review behind a line of the record, under the name `WORKLOAD-NUMBER`. Acceptance of findings is not in the record.
    fn try_from(from: &review::Decision) -> Result<Self, Refused> {
        let review::Decision { number, time, who, action, subject, digest, rules, comment, generation } = from;
        let not_a_review = || Refused::NotAReview { number: *number };
        let decision = match action {
            Action::Approve => Verdict::Approved,
            Action::Reject => Verdict::Rejected,
            _ => return Err(not_a_review()),
        };
        let workload: Workload = subject.parse().map_err(|_| not_a_review())?;
        let (namespace, object) = name::of_workload(&workload);
        let spec = PolicyReviewSpec {
            workload,
            digest: digest.clone().ok_or_else(not_a_review)?,
            decision,
            rules: rules.clone(),
            accept: Vec::new(),
            comment: comment.clone(),
        };
        let mut review = Self::new(&name::label(&format!("{object}-{number}")), spec);
        review.metadata.namespace = namespace;
        review.status = Some(PolicyReviewStatus {
            number: *number,
            time: *time,
            who: Who { uid: who.uid, name: who.name.clone(), claims: who.claims.clone() },
            generation: *generation,
        });
        Ok(review)
    }
}

impl TryFrom<&PolicyReview> for review::Decision {
    type Error = Refused;

    /// The line of the record. A review that nobody took yet has none.
    fn try_from(from: &PolicyReview) -> Result<Self, Refused> {
        let PolicyReviewSpec { workload, digest, decision, rules, accept: _, comment } = &from.spec;
        let Some(PolicyReviewStatus { number, time, who, generation }) = &from.status else {
            return Err(Refused::NoStatus { kind: "PolicyReview", object: from.metadata.name.clone().unwrap_or_default() });
        };
        Ok(Self {
            number: *number,
            time: *time,
            who: review::Who { uid: who.uid, name: who.name.clone(), claims: who.claims.clone() },
            action: match decision {
                Verdict::Approved => Action::Approve,
                Verdict::Rejected => Action::Reject,
            },
            subject: workload.to_string(),
            digest: Some(digest.clone()),
            rules: rules.clone(),
            comment: comment.clone(),
            generation: *generation,
        })
    }
}
