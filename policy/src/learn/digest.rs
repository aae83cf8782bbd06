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
//!
//! # Two forms
//! Up to [`LARGE`] rules it is the digest of one text that has them all. Beyond that the rules are dealt into 256 parts by their
//! peers, and the text names the digest of each part: one edge more moves one part, and the others need not be read again. Which
//! form it is, and what is in which part, follows from the rules alone. A client's rule for addresses outside is in no part, since
//! it depends on all clients; such rules are few, and stand in the text itself.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::context::Options;
use crate::check::Proposal;
use crate::policy_set::{Direction, Peer, Rule};
use crate::service::{Ports, Protocol};
use crate::suggestion::{Finding, Origin, Severity};
use crate::workload::{Endpoint, Workload};

/// The canonical form of one text, and the one of parts. Raised when they change.
const FORM: u32 = 1;
const FORM_OF_PARTS: u32 = 2;

/// The most rules that are digested as one text: made anew and read in a millisecond. What has no more keeps the digest that it had
/// before there were parts.
pub(super) const LARGE: usize = 1024;

/// Parts of a digest of parts.
pub(super) const PARTS: usize = 256;

/// The digest of one part.
pub(super) type PartDigest = [u8; 32];

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
pub(super) fn digest(workload: &Workload, rules: &[Proposal], options: &Options, findings: &[Finding], large: usize) -> String {
    let inside: Vec<&Proposal> = rules.iter().filter(|rule| is_inside(rule)).collect();
    if inside.len() <= large {
        return hex(&Sha256::digest(canonical(workload, inside, options, findings)));
    }
    let mut parts: Vec<Vec<&Proposal>> = vec![Vec::new(); PARTS];
    let mut apart = Vec::new();
    for rule in inside {
        if is_apart(rule.direction, &rule.rule.peer) {
            apart.push(rule);
        } else {
            parts[usize::from(part_of(&rule.rule.peer))].push(rule);
        }
    }
    let parts = (0..=u8::MAX).zip(parts).filter_map(|(at, rules)| Some((at, part(rules)?)));
    digest_of_parts(workload, apart, parts, options, findings)
}

/// The digest of a suggestion with so many rules that it is made of parts. `apart`: rules that are in no part, in order.
pub(super) fn digest_of_parts<'a>(
    workload: &Workload,
    apart: impl IntoIterator<Item = &'a Proposal>,
    parts: impl IntoIterator<Item = (u8, PartDigest)>,
    options: &Options,
    findings: &[Finding],
) -> String {
    let mut text = format!("{{\"form\":{FORM_OF_PARTS},\"workload\":{},\"parts\":[", json(workload));
    let mut separator = "";
    for (at, digest) in parts {
        text.push_str(&format!("{separator}[{at},\"{}\"]", hex(&digest)));
        separator = ",";
    }
    text.push_str("],\"rules\":[");
    push_rules(&mut text, apart);
    push_end(&mut text, options, findings);
    hex(&Sha256::digest(text))
}

/// The digest of the rules of one part; none of no rules.
pub(super) fn part<'a>(rules: impl IntoIterator<Item = &'a Proposal>) -> Option<PartDigest> {
    let mut text = String::from("[");
    push_rules(&mut text, rules);
    text.push(']');
    (text.len() > 2).then(|| Sha256::digest(text).into())
}

/// Whether a rule is inside at all.
pub(super) fn is_inside(rule: &Proposal) -> bool {
    rule.origin != Origin::DeniedAttempt
}

/// Whether a rule is in no part.
pub(super) fn is_apart(direction: Direction, peer: &Peer) -> bool {
    direction == Direction::Ingress && matches!(peer, Peer::Outside(_))
}

/// Which part has the rules about a peer.
pub(super) fn part_of(peer: &Peer) -> u8 {
    match peer {
        Peer::Workload(workload) => part_by(workload.as_str().as_bytes()),
        Peer::Host => 0,
        Peer::Outside(net) => part_by_address(net.addr()),
    }
}

/// Which part has the rules that the edges with this other end speak for.
pub(super) fn part_of_end(end: &Endpoint) -> u8 {
    match end {
        Endpoint::Workload(workload) | Endpoint::Run(workload) => part_by(workload.as_str().as_bytes()),
        Endpoint::Host => 0,
        Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } | Endpoint::Unknown(address) => part_by_address(*address),
    }
}

fn part_by_address(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => part_by(&address.octets()),
        IpAddr::V6(address) => part_by(&address.octets()),
    }
}

/// FNV-1a (Fowler, Noll, Vo), folded. Whoever chooses names so that all are in one part makes it slow, and nothing else: what is in a part
/// is bound by its own digest.
fn part_by(bytes: &[u8]) -> u8 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    hash.to_le_bytes().into_iter().fold(0, |folded, byte| folded ^ byte)
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("words, numbers and lists of them are always JSON")
}

/// The JSON of what is inside, as one text.
fn canonical<'a>(workload: &Workload, inside: impl IntoIterator<Item = &'a Proposal>, options: &Options, findings: &[Finding]) -> String {
    let mut text = format!("{{\"form\":{FORM},\"workload\":{},\"rules\":[", json(workload));
    push_rules(&mut text, inside);
    push_end(&mut text, options, findings);
    text
}

fn push_end(text: &mut String, options: &Options, findings: &[Finding]) {
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocking);
    let blocking: BTreeSet<&str> = blocking.map(|finding| finding.code.as_str()).collect();
    text.push_str(&format!("],\"options\":{},\"blocking\":{}}}", json(options), json(&blocking)));
}

/// A large graph has millions of rules, so the plain ones are put together without a serializer: to the byte what it would write.
fn push_rules<'a>(text: &mut String, rules: impl IntoIterator<Item = &'a Proposal>) {
    let mut separator = "";
    for Proposal { direction, rule, origin, .. } in rules {
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
                push_ports(text, rule.ports);
                text.push_str(origin);
            }
            None => text.push_str(&json(&(direction, rule, origin))),
        }
    }
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

    /// In order, each once.
    fn proposals(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Proposal>> {
        use Origin::{Counterpart, DeniedAttempt, NeededByEngine, Observed, OneWay};
        let proposal = |((direction, peer, ports), (origin, until)): ((Direction, Peer, Ports), (usize, Option<i64>))| Proposal {
            direction,
            rule: Rule { peer, ports, until: until.map(|second| jiff::Timestamp::from_second(second).unwrap()) },
            origin: [Observed, OneWay, NeededByEngine, Counterpart, DeniedAttempt][origin],
            state: RuleState::Undecided,
        };
        let direction = prop::sample::select(vec![Direction::Ingress, Direction::Egress]);
        prop::collection::btree_map((direction, peers(), ports()), (0..5usize, prop::option::of(0..9i64)), count)
            .prop_map(move |rules| rules.into_iter().map(proposal).collect())
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_what_the_serializer_would_write(
            rules in proposals(0..20),
        ) {
            let workload = Workload::new("a\"b", "c");
            let finding = |severity, code: &str| Finding { severity, code: code.to_owned(), text: String::new() };
            let findings = [finding(Severity::Blocking, "b"), finding(Severity::Info, "i"), finding(Severity::Blocking, "a")];
            let inside = rules.iter().filter(|rule| rule.origin != Origin::DeniedAttempt);
            let reference = Canonical {
                form: FORM,
                workload: &workload,
                rules: inside.map(|rule| (rule.direction, &rule.rule, rule.origin)).collect(),
                options: &Options::default(),
                blocking: ["a", "b"].into(),
            };
            prop_assert_eq!(canonical(&workload, rules.iter().filter(|rule| is_inside(rule)), &Options::default(), &findings), serde_json::to_string(&reference).unwrap());
        }

        #[test]
        fn every_rule_moves_the_digest_in_either_form_and_a_denied_attempt_does_not(
            rules in proposals(1..40),
            which in any::<prop::sample::Index>(),
            large in prop::sample::select(vec![0, 8, LARGE]),
        ) {
            let workload = Workload::new("a", "b");
            let of = |rules: &[Proposal]| digest(&workload, rules, &Options::default(), &[], large);
            let whole = of(&rules);
            prop_assert_eq!(&whole, &of(&rules), "the same rules, another digest");
            let at = which.index(rules.len());
            let denied = rules[at].origin == Origin::DeniedAttempt;
            let mut without = rules.clone();
            without.remove(at);
            prop_assert_eq!(whole == of(&without), denied, "{:?} taken out", rules[at]);
            let mut other = rules.clone();
            other[at].origin = if other[at].origin == Origin::Observed { Origin::OneWay } else { Origin::Observed };
            prop_assert_ne!(&whole, &of(&other), "{:?} for another reason", rules[at]);
            let mut later = rules.clone();
            later[at].rule.until = Some(jiff::Timestamp::from_second(1_000_000).unwrap());
            prop_assert_eq!(whole == of(&later), denied, "{:?} for another time", rules[at]);
            let mut findings = vec![Finding { severity: Severity::Blocking, code: "b".to_owned(), text: String::new() }];
            prop_assert_ne!(&whole, &digest(&workload, &rules, &Options::default(), &findings, large));
            findings[0].severity = Severity::Warning;
            prop_assert_eq!(&whole, &digest(&workload, &rules, &Options::default(), &findings, large));
        }
    }
}
