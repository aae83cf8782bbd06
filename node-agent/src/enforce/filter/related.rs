//! What belongs to a connection without being of it: ICMP errors, from who may talk to the receiver; redirects never; what a
//! helper expects is a connection like any other.

use nix::libc;
use policy::policy_set::Direction;

use super::super::build::rule;
use super::super::expression::{Field, Ip};
use super::super::model::{Rule, Verdict};
use super::sides::{oriented, outside};
use super::{IPS, RST, ends, named};

/// The chain `related`.
pub(super) fn related() -> Vec<Rule> {
    let node = 0_u32.to_ne_bytes();
    vec![
        rule("our own reset of what was refused").tcp_flags(RST, RST).equals(Field::Iif, &node).then(Verdict::Goto("pass")),
        rule("ICMP errors").ip(Ip::V4).l4(libc::IPPROTO_ICMP as u8).within(&[Field::IcmpType], "errors4").then(Verdict::Goto("error")),
        rule("ICMPv6 errors")
            .ip(Ip::V6)
            .l4(libc::IPPROTO_ICMPV6 as u8)
            .within(&[Field::Icmpv6Type], "errors6")
            .then(Verdict::Goto("error")),
        rule("redirects and all other related ICMP: never").l4(libc::IPPROTO_ICMP as u8).drop(),
        rule("redirects and all other related ICMPv6: never").l4(libc::IPPROTO_ICMPV6 as u8).drop(),
        rule("what a helper (FTP, SIP) expects is a connection like any other").then(Verdict::Goto("fresh")),
    ]
}

/// The chain `error`: from whom an ICMP error is believed.
pub(super) fn error() -> Vec<Rule> {
    let not_there = |ip| {
        let draft = rule("from outside, about what never was there: between guarded networks").ip(ip);
        draft.not_within(&[Field::Iifname], "bridges").between(ip, &named("subnets", ip)).drop()
    };
    let [ipv4, ipv6] = IPS.map(not_there);
    let mut rules = vec![
        rule("from the node: the gateway, or our refusal").equals(Field::Iif, &0_u32.to_ne_bytes()).then(Verdict::Goto("pass")),
        ipv4,
        ipv6,
        rule("from a router outside").not_within(&[Field::Iifname], "bridges").then(Verdict::Goto("pass")),
    ];
    for (direction, comment) in
        [(Direction::Egress, "may not talk to the receiver"), (Direction::Ingress, "the receiver may not talk to it")]
    {
        for ip in IPS {
            let (local, remote, _) = oriented(direction, ip);
            let strict = rule(comment).ip(ip).within(&local, &named("strict", ip));
            rules.push(strict.not_within(&ends(local, remote), &named("talk", ip)).then(Verdict::Goto("error_stranger")));
        }
    }
    rules.push(rule("").then(Verdict::Goto("pass")));
    rules
}

/// The chain `error_stranger`: from who may not talk to the receiver.
pub(super) fn error_stranger() -> Vec<Rule> {
    let mut rules = Vec::new();
    for ip in IPS {
        let (local, _, other) = oriented(Direction::Egress, ip);
        let sender = outside(rule("to the outside, from who may talk there").ip(ip), other);
        rules.push(sender.within(&local, &named("talk_outside", ip)).then(Verdict::Goto("pass")));
    }
    rules.push(rule("an ICMP error from who may not talk to the receiver: forged, for all we know").drop());
    rules
}
