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
use crate::check::Proposal;
use crate::policy_set::{Direction, Peer, Rule};
use crate::service::{Ports, Protocol};
use crate::suggestion::{Finding, Origin, Severity};
use crate::workload::Workload;

/// Raised when the canonical form changes.
const FORM: u32 = 1;

/// Hex digits of a rule's id: 48 bits, so that nobody can make a rule that carries another one's id within one suggestion.
const ID_DIGITS: usize = 12;

fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)]).collect()
}

/// The id of a rule: the same rule has the same id on every suggestion, in every revision.
pub(crate) fn rule_id(direction: Direction, rule: &Rule) -> String {
    let mut id = hex(&Sha256::digest(format!("{direction} {} {}", rule.peer, rule.ports)));
    id.truncate(ID_DIGITS);
    id
}

/// The digest of a suggestion. The rules come in the order of direction, peer and ports, each once.
pub(super) fn digest(workload: &Workload, rules: &[Proposal], options: &Options, findings: &[Finding]) -> String {
    hex(&Sha256::digest(canonical(workload, rules, options, findings)))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("words, numbers and lists of them are always JSON")
}

/// The JSON of what is inside. A large graph has millions of rules, so the plain ones are put together without a serializer: to the
/// byte what it would write.
fn canonical(workload: &Workload, rules: &[Proposal], options: &Options, findings: &[Finding]) -> String {
    let mut text = format!("{{\"form\":{FORM},\"workload\":{},\"rules\":[", json(workload));
    text.reserve(rules.len() * 96);
    let mut separator = "";
    for Proposal { direction, rule, origin, .. } in rules.iter().filter(|rule| rule.origin != Origin::DeniedAttempt) {
        text.push_str(separator);
        separator = ",";
        match plain_peer(rule) {
            Some(peer) => {
                let direction = match direction {
                    Direction::Ingress => "[\"ingress\",{\"peer\":\"",
                    Direction::Egress => "[\"egress\",{\"peer\":\"",
                };
                let origin = match origin {
                    Origin::Observed => "\"},\"observed\"]",
                    Origin::OneWay => "\"},\"oneWay\"]",
                    Origin::NeededByEngine => "\"},\"neededByEngine\"]",
                    Origin::Counterpart => "\"},\"counterpart\"]",
                    Origin::DeniedAttempt => "\"},\"deniedAttempt\"]",
                };
                for part in [direction, peer, "\",\"ports\":\""] {
                    text.push_str(part);
                }
                push_ports(&mut text, rule.ports);
                text.push_str(origin);
            }
            None => text.push_str(&json(&(direction, rule, origin))),
        }
    }
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocking);
    let blocking: BTreeSet<&str> = blocking.map(|finding| finding.code.as_str()).collect();
    text + &format!("],\"options\":{},\"blocking\":{}}}", json(options), json(&blocking))
}

/// The peer of a rule that JSON writes as it is printed.
fn plain_peer(rule: &Rule) -> Option<&str> {
    let Peer::Workload(workload) = &rule.peer else { return None };
    let plain = rule.until.is_none() && workload.as_str().bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\');
    plain.then_some(workload.as_str())
}

fn push_ports(text: &mut String, ports: Ports) {
    let protocol = match ports.protocol() {
        Protocol::Tcp if ports.width() == 1 => "tcp/",
        Protocol::Udp if ports.width() == 1 => "udp/",
        Protocol::Tcp | Protocol::Udp | Protocol::Sctp | Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_) => {
            text.push_str(&ports.to_string());
            return;
        }
    };
    text.push_str(protocol);
    let port = ports.first();
    let mut power = 10_000;
    while power > port.max(1) {
        power /= 10;
    }
    while power > 0 {
        text.push(char::from(b'0' + (port / power % 10) as u8));
        power /= 10;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::suggestion::RuleState;

    /// What `canonical` stands for.
    #[derive(Serialize)]
    struct Canonical<'a> {
        form: u32,
        workload: &'a Workload,
        rules: BTreeSet<(Direction, &'a Rule, Origin)>,
        options: &'a Options,
        blocking: BTreeSet<&'a str>,
    }

    fn peers() -> impl Strategy<Value = Peer> {
        let names = ("[a-z\"\\\\\u{1}é]{0,3}", "[a-z\"\\\\\u{1f}\u{7f}ü]{1,3}");
        prop_oneof![
            4 => names.prop_map(|(namespace, name)| Peer::Workload(Workload::new(namespace, name))),
            1 => Just(Peer::Host),
            1 => any::<std::net::IpAddr>().prop_map(Peer::address),
        ]
    }

    fn ports() -> impl Strategy<Value = Ports> {
        let range = (prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]), 1..=u16::MAX, prop::option::of(0..9u16));
        prop_oneof![
            8 => range.prop_map(|(protocol, first, more)| Ports::new(protocol, first, first.saturating_add(more.unwrap_or(0))).unwrap()),
            1 => Just(Ports::new(Protocol::Icmp, 0, 0).unwrap()),
            1 => Just(Ports::new(Protocol::Other(47), 0, 0).unwrap()),
        ]
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_what_the_serializer_would_write(
            rules in prop::collection::btree_map((any::<bool>(), peers(), ports()), (0..5usize, prop::option::of(0..9i64)), 0..20),
        ) {
            use Origin::{Counterpart, DeniedAttempt, NeededByEngine, Observed, OneWay};
            let proposal = |((egress, peer, ports), (origin, until)): ((bool, Peer, Ports), (usize, Option<i64>))| Proposal {
                direction: if egress { Direction::Egress } else { Direction::Ingress },
                rule: Rule { peer, ports, until: until.map(|second| jiff::Timestamp::from_second(second).unwrap()) },
                origin: [Observed, OneWay, NeededByEngine, Counterpart, DeniedAttempt][origin],
                state: RuleState::Undecided,
            };
            let rules: Vec<Proposal> = rules.into_iter().map(proposal).collect();
            let workload = Workload::new("a\"b", "c");
            let finding = |severity, code: &str| Finding { severity, code: code.to_owned(), text: String::new() };
            let findings = [finding(Severity::Blocking, "b"), finding(Severity::Info, "i"), finding(Severity::Blocking, "a")];
            let inside = rules.iter().filter(|rule| rule.origin != DeniedAttempt);
            let reference = Canonical {
                form: FORM,
                workload: &workload,
                rules: inside.map(|rule| (rule.direction, &rule.rule, rule.origin)).collect(),
                options: &Options::default(),
                blocking: ["a", "b"].into(),
            };
            prop_assert_eq!(canonical(&workload, &rules, &Options::default(), &findings), serde_json::to_string(&reference).unwrap());
        }
    }
}
