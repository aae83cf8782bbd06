//! What an approval names: a digest of what is proposed, and short names of its rules.
//!
//! # Why
//! Inside: the workload, every rule with its origin and end, the options, the codes of blocking findings. Outside: counts, times,
//! bytes and the edges behind a rule, or no approval would ever fit live traffic. Outside also:
//!
//! * where a rule stands (undecided, approved, rejected): a decision is no evidence. So one reading can be approved rule by rule,
//!   and a rule that was rejected after the reading is left out by the approval, which can only make it narrower than what was read.
//! * denied attempts: whoever is denied could otherwise move the digest at will and no approval would ever succeed. They are never
//!   approved with the whole, only by their id, and the id is a digest of the rule itself.

use std::collections::BTreeSet;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::context::Options;
use crate::policy_set::{Direction, Rule};
use crate::suggestion::{Finding, Origin, ProposedRule, Severity};
use crate::workload::Workload;

/// Raised when the canonical form changes.
const FORM: u32 = 1;

/// Hex digits of a rule's id: 48 bits, so that nobody can make a rule that carries another one's id within one suggestion.
const ID_DIGITS: usize = 12;

#[derive(Serialize)]
struct Canonical<'a> {
    form: u32,
    workload: &'a Workload,
    rules: BTreeSet<(Direction, &'a Rule, Origin)>,
    options: &'a Options,
    blocking: BTreeSet<&'a str>,
}

fn hex(text: &str) -> String {
    use std::fmt::Write;
    Sha256::digest(text.as_bytes()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The id of a rule: the same rule has the same id on every suggestion, in every revision.
pub(crate) fn rule_id(direction: Direction, rule: &Rule) -> String {
    let mut id = hex(&format!("{direction} {} {}", rule.peer, rule.ports));
    id.truncate(ID_DIGITS);
    id
}

/// The digest of a suggestion.
pub(super) fn digest(workload: &Workload, rules: &[ProposedRule], options: &Options, findings: &[Finding]) -> String {
    let rules = rules.iter().filter(|rule| rule.origin != Origin::DeniedAttempt);
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocking);
    let canonical = Canonical {
        form: FORM,
        workload,
        rules: rules.map(|rule| (rule.direction, &rule.rule, rule.origin)).collect(),
        options,
        blocking: blocking.map(|finding| finding.code.as_str()).collect(),
    };
    let text = serde_json::to_string(&canonical).expect("words, numbers and lists of them are always JSON");
    hex(&text)
}
