//! Guardrails in reviews: what is forbidden is said on the suggestion and refused by every decision, and what was in force before
//! is listed, not cut.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod common;

use std::collections::BTreeSet;

use common::*;
use policy::FlowOutcome::{Denied, Established};
use policy::guardrail::{Breach, Guardrail, Parties, in_force};
use policy::learn::Rejected;
use policy::policy_set::Direction;
use policy::review::{Choice, Edge, Reading, Refused, allow, approve, edit, reject, revert};
use policy::suggestion::{Severity, Suggestion};
use policy::{PolicySet, Rule, Service, WorkloadPolicy, diff};

fn never(from: &str, to: &str) -> Guardrail {
    let parties = |party: &str| Parties { any_of: [party.parse().unwrap()].into(), except: BTreeSet::new() };
    Guardrail { name: "never".to_owned(), from: parties(from), to: parties(to), ports: BTreeSet::new(), reason: "audit 7.2".to_owned() }
}

fn guarded(guardrail: Guardrail) -> PolicySet {
    PolicySet { guardrails: [(guardrail.name.clone(), guardrail)].into(), ..PolicySet::default() }
}

/// prod/web calls dev/db and prod/db, under a guardrail that keeps prod from dev.
fn town() -> (Town, PolicySet) {
    let mut town = Town::of(["prod/web", "prod/db", "dev/db"]);
    town.flow("prod/web", "dev/db", Service::tcp(5432), Established, 5);
    town.flow("prod/web", "prod/db", Service::tcp(5432), Established, 5);
    let set = guarded(never("project:prod", "project:dev"));
    town.context.guardrails = set.guardrails.clone();
    (town, set)
}

fn whole(suggestion: &Suggestion) -> Reading {
    Reading { digest: suggestion.digest.clone(), ..Reading::default() }
}

fn named(suggestion: &Suggestion, text: &str) -> Reading {
    let id = suggestion.rules.iter().find(|rule| printed(rule) == text).unwrap().id.clone();
    Reading { choice: Choice::Rules([id].into()), ..whole(suggestion) }
}

fn rule(peer: &str, ports: &str) -> Rule {
    Rule { peer: peer.parse().unwrap(), ports: ports.parse().unwrap(), until: None }
}

fn egress(owner: &str, rules: impl IntoIterator<Item = Rule>) -> WorkloadPolicy {
    WorkloadPolicy { egress: rules.into_iter().collect(), ..WorkloadPolicy::empty(workload(owner)) }
}

#[track_caller]
fn forbidden<T: std::fmt::Debug>(outcome: Result<T, Refused>) -> String {
    match outcome {
        Err(Refused::Forbidden { breaches }) => breaches.iter().map(Breach::to_string).collect::<Vec<_>>().join("\n"),
        other => panic!("not refused by a guardrail: {other:?}"),
    }
}

#[test]
fn a_rule_that_breaks_a_guardrail_is_a_blocking_finding_on_both_ends_and_part_of_the_digest() {
    let (mut town, set) = town();
    for (name, text) in [("prod/web", "egress dev/db tcp/5432"), ("dev/db", "ingress prod/web tcp/5432")] {
        let suggestion = town.suggestion(name);
        let found = suggestion.findings.iter().find(|finding| finding.code == "breaks-guardrail").unwrap();
        assert_eq!(found.severity, Severity::Blocking);
        assert!(found.text.starts_with(&format!("{text} is forbidden by guardrail never (audit 7.2)")), "{}", found.text);
        let lines = diff::suggestion(&suggestion, &set, at(0)).to_string();
        assert!(lines.contains(&format!("{text}  (a guardrail forbids it)")), "{lines}");
    }
    assert_eq!(town.finding("prod/db", "breaks-guardrail"), None);
    let read = town.suggestion("prod/web");
    town.context.guardrails.clear();
    assert_ne!(town.suggestion("prod/web").digest, read.digest, "what was read before the guardrail came cannot be approved");
}

#[test]
fn the_whole_is_refused_while_a_rule_of_it_is_forbidden_and_no_code_accepts_that() {
    let (town, set) = town();
    let web = town.suggestion("prod/web");
    let said = forbidden(approve(&set, &web, &whole(&web)));
    assert_eq!(said, "policy prod/web, egress: dev/db tcp/5432: guardrail never forbids it (audit 7.2)");
    forbidden(approve(&set, &web, &Reading { accept: ["breaks-guardrail".to_owned()].into(), ..whole(&web) }));
    forbidden(approve(&set, &web, &named(&web, "egress dev/db tcp/5432")));
}

#[test]
fn the_rest_is_approved_by_rule_or_as_the_whole_once_the_forbidden_rule_is_rejected() {
    let (mut town, set) = town();
    let web = town.suggestion("prod/web");
    let one = approve(&set, &web, &named(&web, "egress prod/db tcp/5432")).unwrap();
    assert_eq!(one.rules, ["egress prod/db tcp/5432"]);
    let no = reject(&set, &web, &named(&web, "egress dev/db tcp/5432")).unwrap();
    assert_eq!(no.remember, [Rejected::of(&workload("prod/web"), Direction::Egress, &rule("dev/db", "tcp/5432"))].into());
    town.context.rejected = no.remember;
    let again = town.suggestion("prod/web");
    assert_eq!(again.digest, web.digest, "a decision is no evidence");
    let rest = approve(&set, &again, &whole(&web)).unwrap();
    assert!(!rest.rules.iter().any(|rule| rule.contains("dev/db")) && rest.rules.contains(&"egress prod/db tcp/5432".to_owned()));
}

#[test]
fn allowing_editing_and_going_back_meet_the_guardrail_too() {
    let (_, set) = town();
    let known = ["prod/web", "dev/db"].map(workload).into();
    let edge =
        |from: &str, to: &str| Edge { from: from.parse().unwrap(), to: to.parse().unwrap(), ports: "tcp/22".parse().unwrap(), until: None };
    let said = forbidden(allow(&set, &edge("prod/web", "dev/db"), &known, at(0)));
    assert_eq!(said.lines().count(), 2, "both sides are named: {said}");
    allow(&set, &edge("dev/db", "prod/web"), &known, at(0)).unwrap();
    let bad = egress("prod/web", [rule("dev/db", "tcp/5432")]);
    forbidden(edit(&set, bad.clone(), &known));
    edit(&set, egress("prod/web", [rule("prod/db", "tcp/5432")]), &known).unwrap();
    forbidden(revert(&set, &workload("prod/web"), Some(&bad), &Default::default(), at(0)));
}

#[test]
fn what_was_in_force_before_its_guardrail_stays_is_listed_and_may_only_be_narrowed() {
    let everywhere = rule("outside:0.0.0.0/0", "tcp/443");
    let mut set = guarded(never("workloads:", "outside:198.51.100.0/24"));
    let (dev, other) = (rule("dev/db", "tcp/5432"), rule("dev/db", "tcp/80"));
    set.policies.insert(workload("prod/web"), egress("prod/web", [everywhere.clone(), dev.clone()]));
    let listed: Vec<_> = in_force(&set, at(0)).into_iter().map(|breach| breach.rule).collect();
    assert_eq!(listed.iter().collect::<Vec<_>>(), [&everywhere]);
    let known = BTreeSet::new();
    // Something else, with the old rule kept; and less of the old rule.
    edit(&set, egress("prod/web", [everywhere, other]), &known).unwrap();
    edit(&set, egress("prod/web", [rule("outside:198.51.0.0/16", "tcp/443")]), &known).unwrap();
    // More of it: another port.
    forbidden(edit(&set, egress("prod/web", [rule("outside:0.0.0.0/0", "tcp/443-444")]), &known));
}

#[test]
fn a_rule_in_force_from_before_is_a_warning_and_does_not_refuse_the_whole() {
    let (mut town, mut set) = town();
    let policy = egress("prod/web", [rule("dev/db", "tcp/5432")]);
    set.policies.insert(policy.workload.clone(), policy.clone());
    town.context.policies.insert(policy.workload.clone(), policy);
    let text = town.finding("prod/web", "in-force-breaks-guardrail").unwrap();
    assert!(text.contains("egress dev/db tcp/5432 is in force from before") && text.contains("bulkhead edit prod/web"), "{text}");
    let web = town.suggestion("prod/web");
    approve(&set, &web, &whole(&web)).unwrap();
}

#[test]
fn a_denied_attempt_that_breaks_a_guardrail_is_said_and_cannot_move_the_digest() {
    let (mut town, set) = town();
    let before = town.suggestion("dev/db").digest;
    town.flow("prod/db", "dev/db", Service::tcp(22), Denied, 1);
    let db = town.suggestion("dev/db");
    assert_eq!(db.digest, before);
    assert!(town.finding("dev/db", "breaks-guardrail").unwrap().contains("prod/db tcp/22"));
    forbidden(approve(&set, &db, &named(&db, "ingress prod/db tcp/22")));
}

#[test]
fn an_approval_that_was_good_before_stays_good_under_a_guardrail_about_others() {
    let (mut town, _) = town();
    let set = guarded(never("project:staging", "project:prod"));
    town.context.guardrails = set.guardrails.clone();
    let web = town.suggestion("prod/web");
    approve(&set, &web, &whole(&web)).unwrap();
}
