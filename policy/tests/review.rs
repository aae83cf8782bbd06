//! Decisions and what they make of the policy set: an approval fits what was read, a rejection is remembered, nothing is taken
//! away in silence, and a switch to Enforce says beforehand what it would do.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use policy::FlowOutcome::{Denied, Established};
use policy::learn::Rejected;
use policy::policy_set::Direction;
use policy::promote::{Observed, Unmet, undecided, unmet};
use policy::review::{Choice, Edge, Reading, Refused, Reviewed, allow, approve, edit, foresee, reject, revert, to_enforce};
use policy::segment::Promotion;
use policy::suggestion::{RuleState, Suggestion};
use policy::{Connection, Mode, PolicySet, Scene, Segment, Selector, Service, Verdict, Workload, WorkloadPolicy, diff, evaluate};

/// web -> db established, evil -> db denied.
fn town() -> Town {
    let mut town = Town::of(["shop/web", "shop/db", "evil"]);
    town.flow("shop/web", "shop/db", Service::tcp(5432), Established, 5);
    town.flow("shop/web", "shop/db", Service::tcp(6379), Established, 5);
    town.flow("evil", "shop/db", Service::tcp(5432), Denied, 1);
    town
}

fn whole(suggestion: &Suggestion) -> Reading {
    Reading { digest: suggestion.digest.clone(), ..Reading::default() }
}

fn some<'t>(suggestion: &Suggestion, rules: impl IntoIterator<Item = &'t str>) -> Reading {
    let id = |text: &str| suggestion.rules.iter().find(|rule| printed(rule) == text).unwrap().id.clone();
    Reading { choice: Choice::Rules(rules.into_iter().map(id).collect()), ..whole(suggestion) }
}

fn rules(set: &PolicySet, name: &str, direction: Direction) -> Vec<String> {
    set.policies[&workload(name)].rules(direction).iter().sorted()
}

fn known(town: &Town) -> BTreeSet<Workload> {
    town.context.workloads.keys().cloned().collect()
}

fn networks(town: &Town) -> BTreeMap<Workload, BTreeSet<String>> {
    town.context.workloads.keys().map(|workload| (workload.clone(), ["front".to_owned()].into())).collect()
}

fn segment(name: &str, mode: Mode) -> Segment {
    let members = [Selector::Project("shop".to_owned())].into();
    Segment { name: name.to_owned(), members, mode, refusal: Default::default(), promotion: None }
}

fn with_segment(mode: Mode) -> PolicySet {
    PolicySet { segments: [("shop".to_owned(), segment("shop", mode))].into(), ..PolicySet::default() }
}

#[test]
fn proposing_changes_nothing_and_approving_the_whole_adds_what_was_read() {
    let town = town();
    let web = town.suggestion("shop/web");
    let set = PolicySet::default();
    let reviewed = approve(&set, &web, &whole(&web)).unwrap();
    assert_eq!(set, PolicySet::default());
    let egress = ["outside:127.0.0.11 tcp/53", "outside:127.0.0.11 udp/53", "shop/db tcp/5432", "shop/db tcp/6379"];
    assert_eq!(rules(&reviewed.set, "shop/web", Direction::Egress), egress);
    assert_eq!(reviewed.rules.len(), 4);
    assert!(
        reviewed.changed[0]
            .to_string()
            .starts_with("policy shop/web (first policy)\n+ egress shop/db tcp/5432\n+ egress shop/db tcp/6379\n+ egress outside:")
    );
}

#[test]
fn a_denied_attempt_is_approved_by_its_name_and_never_with_the_whole() {
    let town = town();
    let db = town.suggestion("shop/db");
    let reviewed = approve(&PolicySet::default(), &db, &whole(&db)).unwrap();
    assert_eq!(rules(&reviewed.set, "shop/db", Direction::Ingress), ["shop/web tcp/5432", "shop/web tcp/6379"]);
    let reviewed = approve(&reviewed.set, &db, &some(&db, ["ingress evil tcp/5432"])).unwrap();
    assert!(rules(&reviewed.set, "shop/db", Direction::Ingress).contains(&"evil tcp/5432".to_owned()));
}

#[test]
fn an_approval_of_a_digest_that_moved_is_refused() {
    let mut town = town();
    let read = town.suggestion("shop/web");
    town.flow("shop/web", "evil", Service::tcp(80), Established, 1);
    let now = town.suggestion("shop/web");
    let refused = approve(&PolicySet::default(), &now, &whole(&read)).unwrap_err();
    assert_eq!(refused, Refused::Moved { workload: workload("shop/web"), read: read.digest.clone(), now: now.digest.clone() });
    assert!(reject(&PolicySet::default(), &now, &whole(&read)).is_err());
}

#[test]
fn one_reading_can_be_approved_rule_by_rule() {
    let mut town = town();
    let web = town.suggestion("shop/web");
    let first = approve(&PolicySet::default(), &web, &some(&web, ["egress shop/db tcp/5432"])).unwrap();
    town.context.policies = first.set.policies.clone();
    let again = town.suggestion("shop/web");
    assert_eq!(again.digest, web.digest, "a decision is no evidence");
    let second = approve(&first.set, &again, &some(&web, ["egress shop/db tcp/6379"])).unwrap();
    assert_eq!(rules(&second.set, "shop/web", Direction::Egress), ["shop/db tcp/5432", "shop/db tcp/6379"]);
}

#[test]
fn a_blocking_finding_has_to_be_accepted_by_its_code() {
    let town = Town::of(["idle"]);
    let idle = town.suggestion("idle");
    let refused = approve(&PolicySet::default(), &idle, &whole(&idle)).unwrap_err();
    assert!(matches!(&refused, Refused::Blocked { code, .. } if code == "no-evidence"), "{refused}");
    let accepted = Reading { accept: ["no-evidence".to_owned()].into(), ..whole(&idle) };
    let reviewed = approve(&PolicySet::default(), &idle, &accepted).unwrap();
    assert_eq!(reviewed.set.policies[&workload("idle")], WorkloadPolicy::empty(workload("idle")));
}

#[test]
fn a_rejected_rule_does_not_come_back_with_the_next_round_of_learning() {
    let mut town = town();
    let web = town.suggestion("shop/web");
    let reviewed = reject(&PolicySet::default(), &web, &some(&web, ["egress shop/db tcp/6379"])).unwrap();
    assert!(reviewed.changed.is_empty());
    town.context.rejected.extend(reviewed.remember);
    town.flow("shop/web", "shop/db", Service::tcp(6379), Established, 50);
    let next = town.suggestion("shop/web");
    let rule = next.rules.iter().find(|rule| printed(rule) == "egress shop/db tcp/6379").unwrap();
    assert_eq!(rule.state, RuleState::Rejected, "shown, marked");
    let approved = approve(&PolicySet::default(), &next, &whole(&next)).unwrap();
    assert!(!rules(&approved.set, "shop/web", Direction::Egress).contains(&"shop/db tcp/6379".to_owned()));
    // A person may change their mind, by name.
    let named = approve(&approved.set, &next, &some(&next, ["egress shop/db tcp/6379"])).unwrap();
    assert_eq!(named.forget.len(), 1);
    assert!(rules(&named.set, "shop/web", Direction::Egress).contains(&"shop/db tcp/6379".to_owned()));
}

#[test]
fn rejecting_what_is_in_force_says_that_it_stays() {
    let mut town = town();
    let web = town.suggestion("shop/web");
    let approved = approve(&PolicySet::default(), &web, &whole(&web)).unwrap();
    town.context.policies = approved.set.policies.clone();
    let web = town.suggestion("shop/web");
    let reviewed = reject(&approved.set, &web, &some(&web, ["egress shop/db tcp/6379"])).unwrap();
    assert!(reviewed.remember.is_empty() && reviewed.set == approved.set);
    assert!(reviewed.notes[0].contains("bulkhead edit shop/web"));
}

#[test]
fn an_approved_policy_does_not_change_when_new_flows_arrive() {
    let mut town = town();
    let web = town.suggestion("shop/web");
    let approved = approve(&PolicySet::default(), &web, &whole(&web)).unwrap().set;
    town.context.policies = approved.policies.clone();
    town.flow("shop/web", "evil", Service::tcp(4444), Established, 9);
    let web = town.suggestion("shop/web");
    assert_eq!(town.context.policies, approved.policies);
    let new = web.rules.iter().find(|rule| printed(rule) == "egress evil tcp/4444").unwrap();
    assert_eq!(new.state, RuleState::Undecided);
    let text = diff::suggestion(&web, &approved, at(0)).to_string();
    assert!(text.contains(&format!("\n+ {}  egress evil tcp/4444", new.id)), "{text}");
    assert!(!text.contains("+ egress shop/db"));
}

#[test]
fn approving_what_is_approved_changes_nothing_and_says_so() {
    let mut town = town();
    let web = town.suggestion("shop/web");
    let approved = approve(&PolicySet::default(), &web, &whole(&web)).unwrap();
    town.context.policies = approved.set.policies.clone();
    let web = town.suggestion("shop/web");
    let again = approve(&approved.set, &web, &whole(&web)).unwrap();
    assert_eq!((again.set, again.changed.len()), (approved.set, 0));
}

#[test]
fn a_rule_that_is_not_on_the_suggestion_is_refused_and_so_is_no_rule_at_all() {
    let web = town().suggestion("shop/web");
    let ids = |ids: &[&str]| Reading { choice: Choice::Rules(ids.iter().map(|id| (*id).to_owned()).collect()), ..whole(&web) };
    assert!(matches!(approve(&PolicySet::default(), &web, &ids(&["beef"])), Err(Refused::NoSuchRule { .. })));
    assert!(matches!(approve(&PolicySet::default(), &web, &ids(&[])), Err(Refused::NothingChosen { .. })));
}

fn edge(from: &str, to: &str, ports: &str) -> Edge {
    Edge { from: from.parse().unwrap(), to: to.parse().unwrap(), ports: ports.parse().unwrap(), until: None }
}

#[test]
fn an_edge_allowed_by_hand_is_on_both_sides_before_any_traffic_and_for_as_long_as_was_said() {
    let town = Town::of(["shop/web", "shop/db"]);
    let set = with_segment(Mode::Enforce);
    let edge = Edge { until: Some(at(3600)), ..edge("shop/web", "shop/db", "tcp/5432") };
    let Reviewed { set, notes, .. } = allow(&set, &edge, &known(&town), at(0)).unwrap();
    assert_eq!(notes.len(), 2, "both count as approved from now on: {notes:?}");
    let verdict = |seconds| {
        let connection =
            Connection { from: "shop/web".parse().unwrap(), to: "shop/db".parse().unwrap(), service: Service::tcp(5432), guarded: true };
        evaluate(&Scene { set: &set, networks: &networks(&town), now: at(seconds) }, &connection).verdict
    };
    assert_eq!((verdict(3599), verdict(3600)), (Verdict::Allow, Verdict::Deny));
    assert_eq!(allow(&set, &edge, &known(&town), at(3600)), Err(Refused::Past { until: at(3600) }));
}

#[test]
fn an_edge_by_hand_names_workloads_that_are_known_and_one_at_least() {
    let town = Town::of(["shop/web"]);
    let allow = |edge| allow(&PolicySet::default(), &edge, &known(&town), at(0));
    assert!(matches!(allow(edge("shop/wbe", "shop/web", "tcp/1")), Err(Refused::UnknownWorkload { workload }) if workload.name() == "wbe"));
    assert!(matches!(allow(edge("host:", "outside:192.0.2.1", "tcp/1")), Err(Refused::NoWorkload { .. })));
    let reviewed = allow(edge("outside:192.0.2.0/24", "shop/web", "tcp/80")).unwrap();
    assert_eq!(rules(&reviewed.set, "shop/web", Direction::Ingress), ["outside:192.0.2.0/24 tcp/80"]);
}

#[test]
fn allowing_by_hand_what_was_rejected_forgets_the_rejection() {
    let town = town();
    let peer = workload("shop/db");
    let forgotten = Rejected {
        workload: workload("shop/web"),
        direction: Direction::Egress,
        peer: policy::Peer::Workload(peer),
        ports: Service::tcp(22).into(),
    };
    let reviewed = allow(&PolicySet::default(), &edge("shop/web", "shop/db", "tcp/22"), &known(&town), at(0)).unwrap();
    assert!(reviewed.forget.contains(&forgotten));
}

#[test]
fn edit_replaces_and_revert_goes_back() {
    let town = town();
    let set = PolicySet::default();
    let mut first = WorkloadPolicy::empty(workload("shop/db"));
    first.ingress.insert(rule("shop/web tcp/5432"));
    let one = edit(&set, first.clone(), &known(&town)).unwrap();
    let mut second = first.clone();
    second.ingress = [rule("shop/later tcp/5432")].into();
    let two = edit(&one.set, second, &known(&town)).unwrap();
    assert_eq!(two.changed[0].to_string(), "policy shop/db\n- ingress shop/web tcp/5432\n+ ingress shop/later tcp/5432");
    assert!(two.notes[0].contains("shop/later is not a workload that is known"));
    let back = revert(&two.set, &workload("shop/db"), Some(&first), &networks(&town), at(0)).unwrap();
    assert_eq!(back.set, one.set);
    assert_eq!(back.rules, ["- ingress shop/later tcp/5432", "+ ingress shop/web tcp/5432"]);
    let gone = revert(&back.set, &workload("shop/db"), None, &networks(&town), at(0)).unwrap();
    assert_eq!(gone.set, set);
}

#[test]
fn reverting_to_no_policy_is_refused_under_enforce() {
    let town = town();
    let set = edit(&with_segment(Mode::Enforce), WorkloadPolicy::empty(workload("shop/db")), &known(&town)).unwrap().set;
    let refused = revert(&set, &workload("shop/db"), None, &networks(&town), at(0)).unwrap_err();
    assert_eq!(refused, Refused::Enforced { workload: workload("shop/db"), segment: "shop".to_owned() });
}

#[test]
fn a_policy_of_a_name_that_nobody_runs_under_is_taken_away_under_enforce_too() {
    let town = town();
    let before = with_segment(Mode::Enforce);
    let set = edit(&before, WorkloadPolicy::empty(workload("shop/dbb")), &known(&town)).unwrap().set;
    assert_eq!(revert(&set, &workload("shop/dbb"), None, &networks(&town), at(0)).unwrap().set, before);
}

#[test]
fn to_enforce_is_refused_while_a_running_workload_has_no_approved_policy_unless_it_is_named() {
    let town = town();
    let set = edit(&with_segment(Mode::Audit), WorkloadPolicy::empty(workload("shop/web")), &known(&town)).unwrap().set;
    let refused = to_enforce(&set, "shop", &networks(&town), &BTreeSet::new(), at(0)).unwrap_err();
    assert_eq!(refused, Refused::Unlearned { segment: "shop".to_owned(), workloads: vec![workload("shop/db")] });
    assert!(refused.to_string().ends_with("--deny-unlearned shop/db"), "{refused}");
    assert_eq!(to_enforce(&set, "shop", &networks(&town), &[workload("shop/db")].into(), at(0)), Ok(()));
    assert!(matches!(to_enforce(&set, "shpo", &networks(&town), &BTreeSet::new(), at(0)), Err(Refused::NoSuchSegment { .. })));
    // Nothing of it could be enforced: it shares the host's network.
    let mut running = networks(&town);
    running.insert(workload("shop/db"), BTreeSet::new());
    assert_eq!(to_enforce(&set, "shop", &running, &BTreeSet::new(), at(0)), Ok(()));
}

#[test]
fn a_switch_to_enforce_says_beforehand_what_it_would_have_denied_and_who_has_no_evidence() {
    let mut town = town();
    town.context.workloads.insert(workload("shop/idle"), Default::default());
    let web = town.suggestion("shop/web");
    let set = approve(&with_segment(Mode::Learn), &web, &some(&web, ["egress shop/db tcp/5432"])).unwrap().set;
    let foreseen = foresee(&set, "shop", &town.graph, &networks(&town), at(0));
    let denied: Vec<_> = foreseen.denied.iter().map(|denial| format!("{}: {}", denial.edge, denial.reason)).collect();
    assert_eq!(
        denied,
        [
            "shop/web -> shop/db tcp/5432: shop/db has no approved policy",
            "shop/web -> shop/db tcp/6379: no egress rule of policy shop/web allows it; shop/db has no approved policy",
        ]
    );
    assert_eq!(foreseen.no_evidence, [workload("shop/idle")]);
    assert_eq!(foreseen.unlearned, [workload("shop/db"), workload("shop/idle")]);
}

#[test]
fn an_apply_that_is_semantically_wrong_does_not_say_success() {
    let town = town();
    // A policy for a misspelt peer is taken, and said; what it leaves denied is said by the preview.
    let mut policy = WorkloadPolicy::empty(workload("shop/web"));
    policy.egress.insert(rule("shop/bd tcp/5432"));
    let reviewed = edit(&with_segment(Mode::Learn), policy, &known(&town)).unwrap();
    assert!(reviewed.notes[0].contains("shop/bd"));
    let foreseen = foresee(&reviewed.set, "shop", &town.graph, &networks(&town), at(0));
    assert!(foreseen.denied.iter().any(|denial| denial.edge.service == Service::tcp(5432)));
}

#[test]
fn a_segment_is_promoted_only_by_its_own_rule_and_when_all_of_it_is_met() {
    let mut segment = segment("shop", Mode::Audit);
    let good = Observed { healthy_seconds: 48 * 3600, distinct_hours: 30, would_be_denials: 0, ..Observed::default() };
    assert_eq!(unmet(&segment, &good), [Unmet::NoRule], "off by default");
    segment.promotion = Some(Promotion { healthy_hours: 48, distinct_hours: 24, would_be_denials: 0 });
    assert!(unmet(&segment, &good).is_empty());
    let bad = Observed {
        healthy_seconds: 3600,
        distinct_hours: 2,
        would_be_denials: 1,
        unlearned: vec![workload("shop/db")],
        undecided: [(workload("shop/web"), 2)].into(),
        unlisted: [(workload("shop/web"), 7)].into(),
    };
    let texts: Vec<String> = unmet(&segment, &bad).iter().map(ToString::to_string).collect();
    let expected = [
        "healthily observed for 1 h of 48 h",
        "traffic in 2 of 24 distinct hours",
        "1 flows would have been denied, 0 are tolerated",
        "no approved policy for shop/db",
        "rules for what was in use that are neither approved nor rejected: 2 of shop/web",
        "flows in use that the graph has no room to list: 7 of shop/web",
    ];
    assert_eq!(texts, expected);
    segment.mode = Mode::Learn;
    assert_eq!(unmet(&segment, &good), [Unmet::NotInAudit(Mode::Learn)]);
}

#[test]
fn what_was_in_use_before_an_audit_keeps_a_promotion_waiting_until_somebody_decides() {
    let town = town();
    let suggestion = town.suggestion("shop/web");
    let (used, last) = (suggestion.rules.iter().filter(|rule| rule.evidence.used() > 0).count(), at(1 << 37));
    assert!(used > 0);
    assert_eq!(undecided(&suggestion, last).count(), used);
    for state in [RuleState::Approved, RuleState::Rejected] {
        let mut decided = suggestion.clone();
        decided.rules.iter_mut().for_each(|rule| rule.state = state);
        assert_eq!(undecided(&decided, last).count(), 0, "{state:?}");
    }
    // Those count as would-be denials, and are tolerated or not.
    let mut audited = suggestion;
    audited.rules.iter_mut().for_each(|rule| rule.evidence.would_deny = 1);
    assert_eq!((undecided(&audited, at(0)).count(), undecided(&audited, last).count()), (0, used));
}

#[test]
fn two_policy_sets_side_by_side() {
    let before = with_segment(Mode::Audit);
    let mut after = edit(&with_segment(Mode::Enforce), WorkloadPolicy::empty(workload("shop/db")), &BTreeSet::new()).unwrap().set;
    let quarantine = policy::policy_set::Quarantine { workload: workload("evil"), comment: String::new() };
    after.quarantines.insert(workload("evil"), quarantine);
    let text = diff::sets(&before, &after).to_string();
    let expected =
        "- segment shop: Audit [project shop]\n+ segment shop: Enforce [project shop]\n+ quarantine evil\npolicy shop/db (first policy)";
    assert_eq!(text, expected);
    assert!(diff::sets(&after, &after).is_empty());
}
