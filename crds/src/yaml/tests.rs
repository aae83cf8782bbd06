//! Laws of reading and writing: what is written is read as the same, whatever names hold.

use std::collections::BTreeSet;

use policy::evidence::Road;
use policy::guardrail::{Guardrail, Parties, Party};
use policy::policy_set::Direction;
use policy::review::{Action, Decision, Who};
use policy::segment::{Promotion, Refusal, Selector};
use policy::suggestion::{Coverage, Finding, NotProposed, Origin, Phase, ProposedRule, RuleState, Severity, Suggestion};
use policy::{EdgeKey, Endpoint, Evidence, HourSet, Mode, Peer, Ports, Protocol, Service, Workload, policy_set};
use proptest::prelude::*;

use super::*;
use crate::policy_review::PolicyReview;
use crate::{Intent, Object};

/// Names as Compose, Docker and people make them, with what makes YAML readers stumble.
fn raw_name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z][a-z0-9-]{0,12}[a-z0-9]",
        2 => "[A-Za-z0-9_.-]{1,20}",
        1 => prop::sample::select(vec!["on", "NO", "null", "~", "0o7", "1e3", ".inf", "2026-11-21", "-", "#", "&a", "*a", "!x", "%", "@", "`", "\"", "'"])
            .prop_map(str::to_owned),
        1 => "[^\\s\\p{C}/:()]{1,8}",
    ]
}

fn workload() -> impl Strategy<Value = Workload> {
    (prop_oneof![Just(String::new()), raw_name()], raw_name()).prop_map(|(namespace, name)| Workload::new(namespace, name))
}

fn network() -> impl Strategy<Value = ipnet::IpNet> {
    prop_oneof![
        (any::<std::net::Ipv4Addr>(), 0..=32_u8).prop_map(|(a, n)| ipnet::Ipv4Net::new(a, n).unwrap().trunc().into()),
        (any::<std::net::Ipv6Addr>(), 0..=128_u8).prop_map(|(a, n)| ipnet::Ipv6Net::new(a, n).unwrap().trunc().into()),
    ]
}

fn ports() -> impl Strategy<Value = Ports> {
    let ported = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
    prop_oneof![
        4 => (ported, 1..=u16::MAX, 1..=u16::MAX).prop_map(|(p, a, b)| Ports::new(p, a.min(b), a.max(b)).unwrap()),
        1 => (prop::sample::select(vec![Protocol::Icmp, Protocol::Icmpv6]), 0..=255_u16, 0..=255_u16)
            .prop_map(|(p, a, b)| Ports::new(p, a.min(b), a.max(b)).unwrap()),
        1 => any::<u8>().prop_filter_map("has ports", |n| match Protocol::from_number(n) {
            p @ Protocol::Other(_) => Ports::new(p, 0, 0).ok(),
            _ => None,
        }),
    ]
}

fn moment() -> impl Strategy<Value = jiff::Timestamp> {
    (0..253_402_200_000_i64, 0..1_000_000_000_i32).prop_map(|(s, n)| jiff::Timestamp::new(s, n).unwrap())
}

fn rule() -> impl Strategy<Value = policy_set::Rule> {
    let peer = prop_oneof![workload().prop_map(Peer::Workload), Just(Peer::Host), network().prop_map(Peer::Outside)];
    (peer, ports(), prop::option::of(moment())).prop_map(|(peer, ports, until)| policy_set::Rule { peer, ports, until })
}

fn policy() -> impl Strategy<Value = policy_set::WorkloadPolicy> {
    let rules = || prop::collection::btree_set(rule(), 0..6);
    (workload(), rules(), rules()).prop_map(|(workload, ingress, egress)| policy_set::WorkloadPolicy {
        workload,
        ingress: ingress.into(),
        egress: egress.into(),
    })
}

fn segment() -> impl Strategy<Value = policy::Segment> {
    let selector = prop_oneof![
        workload().prop_map(Selector::Workload),
        raw_name().prop_map(Selector::Project),
        "\\PC{1,12}".prop_map(Selector::Network)
    ];
    let mode = prop::sample::select(vec![Mode::Learn, Mode::Audit, Mode::Enforce]);
    let promotion = (any::<u32>(), any::<u32>(), any::<u64>()).prop_map(|(healthy_hours, distinct_hours, would_be_denials)| Promotion {
        healthy_hours,
        distinct_hours,
        would_be_denials,
    });
    let refusal = prop::sample::select(vec![Refusal::Reject, Refusal::Drop]);
    (raw_name(), prop::collection::btree_set(selector, 0..5), mode, refusal, prop::option::of(promotion))
        .prop_map(|(name, members, mode, refusal, promotion)| policy::Segment { name, members, mode, refusal, promotion })
}

fn words() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[ -~]{0,40}", 1 => any::<String>()]
}

fn quarantine() -> impl Strategy<Value = policy_set::Quarantine> {
    (workload(), words()).prop_map(|(workload, comment)| policy_set::Quarantine { workload, comment })
}

fn guardrail() -> impl Strategy<Value = Guardrail> {
    let party = prop_oneof![
        workload().prop_map(Party::Workload),
        raw_name().prop_map(Party::Project),
        Just(Party::Workloads),
        Just(Party::Host),
        network().prop_map(Party::Outside),
    ];
    let party = party.boxed();
    let parties = move || {
        (prop::collection::btree_set(party.clone(), 1..4), prop::collection::btree_set(party.clone(), 0..3))
            .prop_map(|(any_of, except)| Parties { any_of, except })
    };
    (raw_name(), parties(), parties(), prop::collection::btree_set(ports(), 0..3), words())
        .prop_map(|(name, from, to, ports, reason)| Guardrail { name, from, to, ports, reason })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    prop_oneof![
        workload().prop_map(Endpoint::Workload),
        workload().prop_map(Endpoint::Run),
        Just(Endpoint::Host),
        any::<std::net::IpAddr>().prop_map(Endpoint::Outside),
        any::<std::net::IpAddr>().prop_map(Endpoint::Unknown),
        ("[a-zA-Z0-9_.-]{1,12}", any::<std::net::IpAddr>()).prop_map(|(name, address)| Endpoint::Unmanaged { name, address }),
    ]
}

fn edge() -> impl Strategy<Value = EdgeKey> {
    let service = ports().prop_map(|ports| Service { protocol: ports.protocol(), port: ports.first() });
    (endpoint(), endpoint(), service, any::<bool>()).prop_map(|(from, to, service, direction_known)| EdgeKey {
        from,
        to,
        service,
        direction_known,
    })
}

fn seen() -> impl Strategy<Value = Evidence> {
    let counts = prop::array::uniform10(any::<u64>());
    let hours = prop::collection::vec((0..1_000_000_u32, 0..100_u32), 0..4);
    let roads = prop::collection::btree_set(prop::sample::select(vec![Road::Direct, Road::Published, Road::Proxy]), 0..3);
    (counts, prop::option::of(moment()), prop::option::of(moment()), hours, roads).prop_map(|(n, first, last, hours, roads)| Evidence {
        established: n[0],
        connected_no_data: n[1],
        one_way: n[2],
        unanswered: n[3],
        refused: n[4],
        denied: n[5],
        would_deny: n[6],
        pre_existing: n[7],
        bytes_sent: n[8],
        bytes_received: n[9],
        first,
        last,
        hours: HourSet::from_runs(hours.into_iter().map(|(first, more)| (first, first + more))),
        roads: roads.into_iter().collect(),
    })
}

fn proposed() -> impl Strategy<Value = ProposedRule> {
    let origin =
        prop::sample::select(vec![Origin::Observed, Origin::OneWay, Origin::NeededByEngine, Origin::Counterpart, Origin::DeniedAttempt]);
    let state = prop::sample::select(vec![RuleState::Undecided, RuleState::Approved, RuleState::Rejected]);
    let direction = prop::sample::select(vec![Direction::Ingress, Direction::Egress]);
    ("[0-9a-f]{6}", direction, rule(), origin, state, seen(), prop::collection::vec(edge(), 0..3)).prop_map(
        |(id, direction, rule, origin, state, evidence, edges)| ProposedRule { id, direction, rule, origin, state, evidence, edges },
    )
}

fn suggestion() -> impl Strategy<Value = Suggestion> {
    let finding = (prop::sample::select(vec![Severity::Info, Severity::Warning, Severity::Blocking]), "[a-z-]{1,12}", words())
        .prop_map(|(severity, code, text)| Finding { severity, code, text });
    let passed_over = (edge(), seen(), words()).prop_map(|(edge, evidence, why)| NotProposed { edge, evidence, why });
    let unseen = || prop::option::of(any::<u64>());
    let coverage = (prop::array::uniform5(any::<u64>()), unseen(), unseen(), prop::collection::vec(words(), 0..3)).prop_map(
        |(n, ppm, edges, notes)| Coverage {
            healthy_seconds: n[0],
            hours: n[1],
            days: n[2],
            lost: n[3],
            edges: n[4],
            unseen_connections_ppm: ppm,
            unseen_edges: edges,
            notes,
        },
    );
    let phase = prop::sample::select(vec![Phase::Learning, Phase::Stabilizing, Phase::Stable]);
    let lists =
        (prop::collection::vec(proposed(), 0..3), prop::collection::vec(finding, 0..3), prop::collection::vec(passed_over, 0..2), coverage);
    (workload(), any::<u64>(), "[0-9a-f]{64}", phase, lists, prop::option::of(moment())).prop_map(
        |(workload, revision, digest, phase, (rules, findings, not_proposed, coverage), updated)| Suggestion {
            workload,
            revision,
            digest,
            phase,
            rules,
            findings,
            not_proposed,
            coverage,
            updated,
        },
    )
}

fn decision() -> impl Strategy<Value = Decision> {
    let who = (any::<u32>(), "[a-z]{1,8}", prop::option::of("[a-z]{1,8}")).prop_map(|(uid, name, claims)| Who { uid, name, claims });
    let action = prop::sample::select(vec![Action::Approve, Action::Reject]);
    let facts = (any::<u64>(), moment(), any::<u64>());
    (facts, who, action, workload(), "[0-9a-f]{64}", prop::collection::vec("[0-9a-f]{6}", 0..3), words()).prop_map(
        |((number, time, generation), who, action, workload, digest, rules, comment)| Decision {
            number,
            time,
            who,
            action,
            subject: workload.to_string(),
            digest: Some(digest),
            rules,
            comment,
            generation,
        },
    )
}

fn again(object: &Object) -> Object {
    let text = write([object]);
    let read = read(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(read.len(), 1, "{text}");
    read.into_iter().next().unwrap()
}

proptest! {
    #[test]
    fn a_policy_that_is_written_is_read_as_the_same_policy(policy in policy()) {
        let object = Object::from(&policy);
        let back = again(&object);
        prop_assert_eq!(&back, &object);
        prop_assert_eq!(back.intent().unwrap(), Intent::Policy(policy));
    }

    #[test]
    fn a_segment_that_is_written_is_read_as_the_same_segment(segment in segment()) {
        let object = Object::from(&segment);
        let back = again(&object);
        prop_assert_eq!(&back, &object);
        prop_assert_eq!(back.intent().unwrap(), Intent::Segment(segment));
    }

    #[test]
    fn a_quarantine_that_is_written_is_read_as_the_same_quarantine(quarantine in quarantine()) {
        prop_assert_eq!(again(&Object::from(&quarantine)).intent().unwrap(), Intent::Quarantine(quarantine));
    }

    #[test]
    fn a_guardrail_that_is_written_is_read_as_the_same_guardrail(guardrail in guardrail()) {
        let Object::Guardrail(back) = again(&Object::from(&guardrail)) else { panic!("another kind") };
        prop_assert_eq!(Guardrail::try_from(&back).unwrap(), guardrail);
    }

    #[test]
    fn a_suggestion_that_is_written_is_read_as_the_same_suggestion(suggestion in suggestion()) {
        let Object::PolicySuggestion(back) = again(&Object::from(&suggestion)) else { panic!("another kind") };
        prop_assert_eq!(Suggestion::try_from(&back).unwrap(), suggestion);
    }

    #[test]
    fn a_review_that_is_written_is_read_as_the_same_decision(decision in decision()) {
        let object = Object::from(PolicyReview::try_from(&decision).unwrap());
        prop_assert!(object.intent().is_err(), "a decision on the record is not taken again");
        let Object::PolicyReview(back) = again(&object) else { panic!("another kind") };
        prop_assert_eq!(Decision::try_from(&back).unwrap(), decision);
    }

    #[test]
    fn labels_and_annotations_hold_any_text(key in "\\PC{0,20}", value in any::<String>()) {
        let mut object = crate::segment::Segment::from(&policy::Segment {
            name: "shop".to_owned(), members: BTreeSet::new(), mode: Mode::Learn, refusal: Refusal::Reject, promotion: None,
        });
        object.metadata.annotations = Some([(key, value)].into());
        let object = Object::from(object);
        prop_assert_eq!(again(&object), object);
    }

    #[test]
    fn a_list_is_read_in_its_order(policies in prop::collection::btree_map(workload(), policy(), 0..5)) {
        let objects: Vec<Object> =
            policies.into_iter().map(|(workload, policy)| Object::from(&policy_set::WorkloadPolicy { workload, ..policy })).collect();
        prop_assert_eq!(read(&write(&objects)).unwrap(), objects);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "(apiVersion: bulkhead.dev/v1alpha1\nkind: (Segment|WorkloadPolicy)\n)?[ -~\n]{0,200}") {
        let _ = read(&text);
    }
}
