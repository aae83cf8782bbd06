//! What each side says: where a spot is looked up, by which pairs it allows, and what becomes of a packet that none allows.

use nix::libc;
use policy::evaluate::Standing;
use policy::policy_set::Direction;
use policy::ruleset::log;
use policy::segment::Refusal;

use super::super::build::{Draft, rule};
use super::super::count::{self, Reason};
use super::super::elements::{Group, Kind, Shape};
use super::super::expression::{Field, Ip, Refuse};
use super::super::model::{Rule, Verdict};
use super::{ACCEPTED, ACK, IPS, RST, SYN, destination, ends, named, source};

/// What the maps `senders` and `receivers` hold for a spot. What is in no map is unknown.
pub(in super::super) fn side_verdict(direction: Direction, standing: Standing) -> Verdict {
    let names = Names::of(direction);
    match standing {
        Standing::Open => Verdict::Continue,
        Standing::Audit => Verdict::Jump(names.audit),
        Standing::Enforce(Refusal::Reject) => Verdict::Jump(names.refuse),
        Standing::Enforce(Refusal::Drop) => Verdict::Jump(names.drop),
        Standing::Quarantined => Verdict::Goto("cut"),
    }
}

struct Names {
    audit: &'static str,
    refuse: &'static str,
    drop: &'static str,
    deny_prefix: &'static str,
    audit_prefix: &'static str,
    deny_reason: Reason,
    audit_reason: Reason,
}

impl Names {
    const fn of(direction: Direction) -> Self {
        match direction {
            Direction::Egress => Self {
                audit: "egress_audit",
                refuse: "egress_refuse",
                drop: "egress_drop",
                deny_prefix: log::DENY_EGRESS,
                audit_prefix: log::AUDIT_EGRESS,
                deny_reason: Reason::Egress,
                audit_reason: Reason::AuditEgress,
            },
            Direction::Ingress => Self {
                audit: "ingress_audit",
                refuse: "ingress_refuse",
                drop: "ingress_drop",
                deny_prefix: log::DENY_INGRESS,
                audit_prefix: log::AUDIT_INGRESS,
                deny_reason: Reason::Ingress,
                audit_reason: Reason::AuditIngress,
            },
        }
    }
}

/// The chains of each standing a direction, and those of who is in no map.
pub(super) fn chains(shape: &Shape) -> Vec<(&'static str, Vec<Rule>)> {
    let mut chains = Vec::new();
    for direction in [Direction::Egress, Direction::Ingress] {
        let names = Names::of(direction);
        let ended = |end: Vec<Rule>| [allowed(shape, direction), end].concat();
        chains.push((names.audit, ended(audited(names.audit_reason, names.audit_prefix))));
        chains.push((names.refuse, ended(refusal(names.deny_reason, names.deny_prefix, Refusal::Reject))));
        chains.push((names.drop, ended(refusal(names.deny_reason, names.deny_prefix, Refusal::Drop))));
    }
    chains.push(("unknown_sender", unknown(Field::Iifname)));
    chains.push(("unknown_receiver", unknown(Field::Oifname)));
    chains
}

/// The spot whose side it is, the other spot, and the interface of the other by (index, name).
pub(super) fn oriented(direction: Direction, ip: Ip) -> ([Field; 2], [Field; 2], (Field, Field)) {
    match direction {
        Direction::Egress => (source(ip), destination(ip), (Field::Oif, Field::Oifname)),
        Direction::Ingress => (destination(ip), source(ip), (Field::Iif, Field::Iifname)),
    }
}

/// Only where the other end is outside: neither the node itself nor behind a bridge of the engine.
pub(super) fn outside(draft: Draft, (index, name): (Field, Field)) -> Draft {
    draft.differs(index, &0_u32.to_ne_bytes()).not_within(&[name], "bridges")
}

/// The chain `sides`.
pub(super) fn sides() -> Vec<Rule> {
    // The cheap questions first.
    let mut rules = vec![
        rule("router discovery and listeners are no business of other containers")
            .ip(Ip::V6)
            .l4(libc::IPPROTO_ICMPV6 as u8)
            .within(&[Field::Icmpv6Type], "link_matters")
            .within(&[Field::Iifname], "guarded")
            .drop(),
        rule("nor is multicast membership").l4(libc::IPPROTO_IGMP as u8).within(&[Field::Iifname], "guarded").drop(),
        unasked("DHCP", 67),
        unasked("DHCPv6", 547),
    ];
    for ip in IPS {
        rules.push(rule("the sender's side").ip(ip).dispatch(&source(ip), &named("senders", ip)));
    }
    for ip in IPS {
        rules.push(rule("the receiver's side").ip(ip).dispatch(&destination(ip), &named("receivers", ip)));
    }
    rules
}

/// A server that was asked, and may be, answers within the connection that its client began.
fn unasked(protocol: &str, port: u16) -> Rule {
    rule(&format!("{protocol} server answers from a container that nobody asked"))
        .l4(libc::IPPROTO_UDP as u8)
        .equals(Field::SourcePort, &port.to_be_bytes())
        .within(&[Field::Iifname], "guarded")
        .drop()
}

fn unknown(bridge: Field) -> Vec<Rule> {
    let counted = rule("").within(&[bridge], "guarded").then(Verdict::Jump(Reason::Unknown.chain()));
    let logged = count::logged(log::DENY_GROUP, log::DENY_UNKNOWN, |draft| draft.within(&[bridge], "guarded"));
    // Dropped, never refused: once the address is bound, the retransmission passes.
    let dropped = rule("an address that belongs to no container we know").within(&[bridge], "guarded").drop();
    [vec![counted], logged, vec![dropped]].concat()
}

/// Look-ups in one direction's sets, for packets of one direction. As an answer, the packet's source port is the service, and
/// the sets are those of the other direction.
pub(super) fn lookups(shape: &Shape, packet: Direction, answer: bool, groups: &[Group]) -> Vec<Rule> {
    let sets = match (packet, answer) {
        (Direction::Egress, false) | (Direction::Ingress, true) => Direction::Egress,
        (Direction::Ingress, false) | (Direction::Egress, true) => Direction::Ingress,
    };
    let mut rules = Vec::new();
    for name in shape.iter().filter(|name| name.direction == sets && groups.contains(&name.group)) {
        let ip = name.ip;
        let (local, remote, other) = oriented(packet, ip);
        let comment = if answer { "an answer to what is allowed" } else { "allowed" };
        let mut draft = rule(comment).ip(ip);
        if let Some(number) = name.group.protocol() {
            draft = draft.l4(number);
        }
        if answer {
            draft = match name.group {
                // After `conntrack -F` both ends go on talking: a reset or silence would cut what is allowed.
                // All that follows a beginning has an ACK (RFC 9293, 3.10.7.4); what has none asks which ports are open.
                Group::Tcp => draft.tcp_flags(SYN | RST | ACK, ACK),
                // The key of `fresh`, with the packet turned around.
                _ => draft.within(
                    &[Field::Oif, Field::Destination(ip), Field::Source(ip), Field::DestinationPort, Field::SourcePort],
                    &named("udp_seen", ip),
                ),
            };
        }
        let (draft, fields) = match name.kind {
            Kind::Spots | Kind::SpotRanges => (draft, ends(local, remote)),
            Kind::Outside | Kind::OutsideRanges => (outside(draft, other), [local.as_slice(), &remote[1..]].concat()),
        };
        let draft = draft.within(&[fields, vec![name.group.field(answer)]].concat(), &name.to_string());
        // So that `fresh` knows it for one.
        let draft = if answer { draft.mark(0, ACCEPTED) } else { draft };
        rules.push(draft.then(Verdict::Return));
    }
    rules
}

fn allowed(shape: &Shape, direction: Direction) -> Vec<Rule> {
    [lookups(shape, direction, false, &Group::ALL), lookups(shape, direction, true, &[Group::Tcp, Group::Udp])].concat()
}

/// Counted and logged.
pub(super) fn denied(reason: Reason, prefix: &str) -> Vec<Rule> {
    [vec![rule("").then(Verdict::Jump(reason.chain()))], count::logged(log::DENY_GROUP, prefix, |draft| draft)].concat()
}

pub(super) fn audited(reason: Reason, prefix: &str) -> Vec<Rule> {
    let counted = rule("would be denied: counted, logged, passes").count().then(Verdict::Jump(reason.chain()));
    [vec![counted], count::logged(log::AUDIT_GROUP, prefix, |draft| draft)].concat()
}

pub(super) fn refusal(reason: Reason, prefix: &str, refusal: Refusal) -> Vec<Rule> {
    let mut rules = denied(reason, prefix);
    match refusal {
        Refusal::Reject => {
            // Only what asks for a connection is reset: a reset of mid-flow packets would cut a connection we merely lost sight of.
            rules.push(rule("fails at once").tcp_flags(SYN | ACK | RST, SYN).refuse(Refuse::TcpReset));
            rules.push(rule("TCP that is no request").l4(libc::IPPROTO_TCP as u8).drop());
            rules.push(rule("fails at once").refuse(Refuse::AdminProhibited));
        }
        Refusal::Drop => rules.push(rule("in silence, as the segment asks").drop()),
    }
    rules
}
