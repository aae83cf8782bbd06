//! What is learned from a graph: each sentence of the design on edges, workloads and what is always needed, and each trap of
//! learning that shows in pure code.
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failed test")]

mod common;

use std::net::IpAddr;

use common::*;
use policy::FlowOutcome::{ConnectedNoData, Denied, Established, OneWay, Refused, Unanswered, WouldDeny};
use policy::learn::{FromOutside, Known, Options, Rejected, Revision, Window, known, learn};
use policy::policy_set::Direction;
use policy::suggestion::{Origin, Phase, RuleState, Severity};
use policy::{EdgeDelta, FlowGraph, Inventory, Peer, Protocol, Service, WorkloadPolicy};

fn service(text: &str) -> Service {
    text.parse().unwrap()
}

#[test]
fn one_edge_is_one_rule_on_each_of_its_ends() {
    let mut town = Town::of(["shop/web", "shop/db"]);
    town.flow("shop/web", "shop/db", Service::tcp(5432), Established, 3);
    let dns = ["egress outside:127.0.0.11 udp/53", "egress outside:127.0.0.11 tcp/53"];
    assert_eq!(town.rules("shop/web"), dns.into_iter().chain(["egress shop/db tcp/5432"]).sorted());
    assert_eq!(town.rules("shop/db"), dns.into_iter().chain(["ingress shop/web tcp/5432"]).sorted());
    let web = town.suggestion("shop/web");
    let rule = web.rules.iter().find(|rule| rule.origin == Origin::Observed).unwrap();
    assert_eq!((rule.evidence.established, rule.edges.len(), rule.state), (3, 1, RuleState::Undecided));
    assert_eq!(web.revision, 1);
}

#[test]
fn a_health_check_that_repeats_is_a_rule_and_a_single_empty_connection_is_shown() {
    let mut town = Town::of(["lb", "web"]);
    town.flow("lb", "web", Service::tcp(80), ConnectedNoData, 3);
    town.flow("lb", "web", Service::tcp(81), ConnectedNoData, 1);
    assert_eq!(town.learned("lb"), ["egress web tcp/80"]);
    assert!(town.shown("lb")[0].starts_with("lb -> web tcp/81: connected once"), "{:?}", town.shown("lb"));
}

#[test]
fn two_empty_connections_within_a_second_are_not_yet_a_health_check() {
    let mut town = Town::of(["lb", "web"]);
    for _ in 0..2 {
        town.flow("lb", "web", Service::tcp(80), ConnectedNoData, 1);
    }
    assert!(town.learned("lb").is_empty());
}

#[test]
fn a_connect_scan_of_many_ports_is_shown_and_not_proposed_however_often_it_repeats() {
    let mut town = Town::of(["evil", "web"]);
    for port in 1..=5 {
        town.flow("evil", "web", Service::tcp(port), ConnectedNoData, 4);
    }
    // What carried data is a rule even for a scanner: nothing tells it apart.
    town.flow("evil", "web", Service::tcp(80), Established, 1);
    assert_eq!(town.learned("evil"), ["egress web tcp/80"]);
    assert_eq!(town.learned("web"), ["ingress evil tcp/80"]);
    assert_eq!(town.shown("web").len(), 5);
    assert!(town.finding("web", "scan-suspected").unwrap().contains("evil (5 ports or peers)"));
}

#[test]
fn a_connect_scan_of_many_workloads_is_shown_and_not_proposed() {
    let names = ["evil", "a", "b", "c", "d", "e"];
    let mut town = Town::of(names);
    for name in &names[1..] {
        town.flow("evil", name, Service::tcp(6379), ConnectedNoData, 2);
    }
    assert!(town.learned("evil").is_empty());
    assert!(town.learned("c").is_empty());
    assert!(town.codes("c").contains("scan-suspected"));
}

#[test]
fn a_syn_to_a_closed_or_silent_port_is_no_service() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(9999), Refused, 40);
    town.flow("web", "db", Service::tcp(9998), Unanswered, 40);
    assert!(town.rules("web").is_empty());
    assert_eq!(town.shown("web")[1], "web -> db tcp/9999: attempts only (0 unanswered, 40 refused): nothing was ever established");
}

#[test]
fn answered_udp_sctp_and_icmp_are_rules_as_themselves() {
    let mut town = Town::of(["a", "b"]);
    for text in ["udp/53", "tcp/53", "sctp/3868", "icmp/8", "icmpv6/128", "ip47"] {
        town.flow("a", "b", service(text), Established, 1);
    }
    let expected = ["egress b udp/53", "egress b tcp/53", "egress b sctp/3868", "egress b icmp/8", "egress b icmpv6/128", "egress b ip47"];
    assert_eq!(town.learned("a"), expected.sorted());
}

#[test]
fn repeated_unanswered_udp_is_proposed_and_marked_one_way() {
    let mut town = Town::of(["app", "statsd"]);
    town.flow("app", "statsd", Service::udp(8125), OneWay, 4);
    let rule = &town.suggestion("statsd").rules.into_iter().find(|rule| rule.direction == Direction::Ingress).unwrap();
    assert_eq!((rule.origin, rule.evidence.one_way), (Origin::OneWay, 4));
    assert!(town.finding("app", "one-way").unwrap().contains("egress statsd udp/8125"));
}

#[test]
fn one_way_udp_that_is_refused_or_not_repeated_is_only_shown() {
    let mut town = Town::of(["app", "statsd"]);
    town.flow("app", "statsd", Service::udp(8125), OneWay, 1);
    town.flow("app", "statsd", Service::udp(8126), OneWay, 9);
    town.flow("app", "statsd", Service::udp(8126), Refused, 1);
    assert!(town.rules("app").is_empty());
    let shown = town.shown("app");
    assert!(shown[0].ends_with("one-way and not repeated"), "{shown:?}");
    assert!(shown[1].contains("1 refused by an ICMP error"), "{shown:?}");
}

#[test]
fn a_socket_that_keeps_sending_one_way_is_one_flow_and_still_repeated() {
    let mut town = Town::of(["app", "syslog"]);
    let mut delta = EdgeDelta::from(&flow("app", "syslog", Service::udp(514), OneWay, 0));
    delta.seen.last = Some(at(600));
    town.graph.add(&delta);
    assert_eq!(town.learned("app"), ["egress syslog udp/514"]);
}

#[test]
fn an_edge_of_unknown_direction_is_shown_and_makes_no_rule() {
    let mut town = Town::of(["web", "db"]);
    let mut old = flow("web", "db", Service::tcp(40001), Established, 0);
    old.direction_known = false;
    old.pre_existing = true;
    town.graph.add(&EdgeDelta::from(&old));
    assert!(town.rules("web").is_empty() && town.rules("db").is_empty());
    assert!(town.shown("db")[0].starts_with("web -- db tcp/40001: older than the agent"));
    assert!(town.codes("web").contains("unknown-direction"));
}

#[test]
fn one_off_runs_are_shown_on_both_ends_and_are_never_evidence() {
    let mut town = Town::of(["shop/web", "shop/db"]);
    town.flow("shop/web (run)", "shop/db", Service::tcp(5432), Established, 7);
    town.flow("shop/db", "shop/web (run)", Service::tcp(80), Established, 7);
    assert!(town.rules("shop/web").is_empty() && town.rules("shop/db").is_empty());
    assert_eq!((town.shown("shop/web").len(), town.shown("shop/db").len()), (2, 2));
    assert!(town.codes("shop/web").contains("runs-shown"));
}

#[test]
fn an_unknown_address_never_becomes_a_rule() {
    let mut town = Town::of(["web"]);
    town.flow("web", "unknown:172.18.0.9", Service::tcp(80), Established, 50);
    town.flow("unknown:172.18.0.9", "web", Service::tcp(80), Established, 50);
    assert!(town.rules("web").is_empty());
    assert!(town.codes("web").contains("unknown-endpoint"));
}

#[test]
fn a_denied_attempt_between_workloads_appears_and_the_outside_is_only_shown() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(22), Denied, 2);
    town.flow("web", "outside:192.0.2.9", Service::tcp(22), Denied, 2);
    let web = town.suggestion("web");
    assert_eq!(web.rules.len(), 1, "no DNS either: nothing was seen to work");
    assert_eq!((web.rules[0].origin, web.rules[0].rule.to_string().as_str()), (Origin::DeniedAttempt, "db tcp/22"));
    assert!(town.finding("db", "denied-attempt").unwrap().contains("ingress web tcp/22"));
    assert!(town.shown("web")[0].contains("2 denied under Enforce; one end is not a workload"));
}

#[test]
fn denied_attempts_do_not_move_the_digest() {
    let mut town = Town::of(["web", "db", "evil"]);
    town.flow("web", "db", Service::tcp(5432), Established, 2);
    let before = town.suggestion("db").digest;
    town.flow("evil", "db", Service::tcp(5432), Denied, 2);
    assert_eq!(town.suggestion("db").digest, before);
}

#[test]
fn a_scan_under_enforce_is_not_a_list_of_denied_attempts() {
    let mut town = Town::of(["evil", "db"]);
    for port in 1..=100 {
        town.flow("evil", "db", Service::tcp(port), Denied, 1);
    }
    let db = town.suggestion("db");
    assert!(db.rules.is_empty());
    assert_eq!(db.not_proposed.len(), 16, "a few are listed");
    assert!(town.finding("db", "not-listed").unwrap().starts_with("84 more"), "and the rest is counted");
}

#[test]
fn the_denied_attempts_of_a_new_version_are_no_scan_and_addresses_outside_that_moved_are_none_either() {
    let names = ["web", "a", "b", "c", "d", "e", "f"];
    let mut town = Town::of(names);
    for name in &names[1..] {
        town.flow("web", name, Service::tcp(80), Denied, 1);
    }
    for n in 1..=200 {
        town.flow("web", &format!("outside:192.0.2.{n}"), Service::tcp(443), Denied, 1);
    }
    town.flow("web", "a", Service::tcp(81), ConnectedNoData, 3);
    let learned = town.learned("web");
    assert_eq!(learned.len(), 7, "{learned:?}");
    assert!(!town.codes("web").contains("scan-suspected"));
}

#[test]
fn a_workload_that_is_away_for_a_moment_keeps_its_digest() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(5432), Established, 2);
    let before = town.suggestion("web");
    town.context.workloads.remove(&workload("web"));
    let away = town.suggestion("web");
    assert_eq!(away.digest, before.digest);
    assert!(away.coverage.to_string().contains("not known to the engine now"));
}

#[test]
fn what_would_have_been_denied_under_audit_and_came_to_nothing_is_shown() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(22), WouldDeny, 3);
    assert!(town.rules("web").is_empty());
    assert!(town.shown("web")[0].contains("3 would have been denied under Audit"));
    town.flow("web", "db", Service::tcp(22), Established, 1);
    assert_eq!(town.learned("web"), ["egress db tcp/22"]);
}

#[test]
fn a_replica_that_talks_to_its_sibling_is_a_rule_on_both_sides_of_one_policy() {
    let mut town = Town::of(["redis"]);
    town.flow("redis", "redis", Service::tcp(16379), Established, 2);
    assert_eq!(town.learned("redis"), ["egress redis tcp/16379", "ingress redis tcp/16379"]);
}

#[test]
fn the_host_is_a_peer_of_its_own() {
    let mut town = Town::of(["web"]);
    town.flow("host:", "web", Service::tcp(80), Established, 2);
    town.flow("web", "host:", Service::tcp(9100), Established, 2);
    assert_eq!(town.learned("web"), ["egress host: tcp/9100", "ingress host: tcp/80"]);
}

#[test]
fn a_container_that_is_not_managed_is_named_by_its_exact_address() {
    let mut town = Town::of(["web"]);
    town.flow("web", "unmanaged:nas@192.0.2.44", Service::tcp(445), Established, 2);
    assert_eq!(town.learned("web"), ["egress outside:192.0.2.44 tcp/445"]);
}

#[test]
fn egress_to_outside_is_exact_addresses_of_either_family_and_says_that_they_may_change() {
    let mut town = Town::of(["web"]);
    for n in 1..=30 {
        town.flow("web", &format!("outside:192.0.2.{n}"), Service::tcp(443), Established, 1);
    }
    town.flow("web", "outside:2001:db8::1", Service::tcp(443), Established, 1);
    let rules = town.suggestion("web").rules;
    let nets: Vec<_> = rules.iter().filter(|rule| rule.origin == Origin::Observed).map(|rule| rule.rule.peer.clone()).collect();
    assert_eq!(nets.len(), 31, "thirty addresses do not become a /16");
    let exact = |peer: &Peer| matches!(peer, Peer::Outside(net) if net.prefix_len() == net.max_prefix_len());
    assert!(nets.iter().all(exact));
    assert!(nets.contains(&Peer::address("2001:db8::1".parse::<IpAddr>().unwrap())));
    assert!(town.finding("web", "address-may-change").unwrap().contains("31 peers outside"));
}

#[test]
fn more_than_twenty_ports_stay_exact_ports() {
    let mut town = Town::of(["a", "b"]);
    for port in 1000..1050 {
        town.flow("a", "b", Service::tcp(port), Established, 1);
    }
    let rules = town.suggestion("b").rules;
    assert_eq!(rules.iter().filter(|rule| rule.direction == Direction::Ingress).count(), 50);
    assert!(rules.iter().all(|rule| rule.rule.ports.width() == 1));
}

fn clients(town: &mut Town, prefix: &str, count: u32) {
    for n in 1..=count {
        town.flow(&format!("outside:{prefix}{n}"), "web", Service::tcp(80), Established, 1);
    }
}

#[test]
fn a_few_clients_outside_are_exact_hosts() {
    let mut town = Town::of(["web"]);
    town.context.workloads.insert(workload("web"), Known { published: [Service::tcp(80)].into(), ..Known::default() });
    clients(&mut town, "192.0.2.", 8);
    assert_eq!(town.learned("web").len(), 8);
    let text = town.finding("web", "ingress-exact-hosts").unwrap();
    assert!(text.starts_with("8 distinct clients outside reached web on published port tcp/80"), "{text}");
    assert!(text.contains("bulkhead allow"));
}

#[test]
fn more_clients_all_of_private_networks_are_these_networks() {
    let mut town = Town::of(["web"]);
    clients(&mut town, "10.1.2.", 9);
    clients(&mut town, "192.168.7.", 1);
    assert_eq!(town.learned("web"), ["ingress outside:10.0.0.0/8 tcp/80", "ingress outside:192.168.0.0/16 tcp/80"]);
    let text = town.finding("web", "ingress-private-networks").unwrap();
    assert!(text.starts_with("10 distinct clients") && text.contains("To narrow it"), "{text}");
    assert!(town.finding("web", "wider-than-observed").unwrap().contains("9 of 16,777,216 addresses"));
}

#[test]
fn more_clients_from_anywhere_are_anyone_of_that_family_and_no_workload() {
    let mut town = Town::of(["web", "db"]);
    clients(&mut town, "192.0.2.", 9);
    clients(&mut town, "2001:db8::", 2);
    assert_eq!(
        town.learned("web"),
        ["ingress outside:0.0.0.0/0 tcp/80", "ingress outside:2001:db8::1 tcp/80", "ingress outside:2001:db8::2 tcp/80"]
    );
    assert!(town.finding("web", "ingress-anyone").unwrap().starts_with("9 distinct clients"));
    let rule = town.suggestion("web").rules.into_iter().find(|rule| rule.evidence.established == 9).unwrap();
    assert!(!rule.rule.peer.holds(&"db".parse().unwrap()));
}

#[test]
fn an_operator_may_ask_for_exact_hosts_however_many_and_the_digest_knows() {
    let mut town = Town::of(["web"]);
    clients(&mut town, "192.0.2.", 30);
    let before = town.suggestion("web").digest;
    let options = Options { from_outside: FromOutside::ExactHosts, ..Options::default() };
    town.context.particular.insert(workload("web"), options);
    assert_eq!(town.learned("web").len(), 30);
    let exact = town.suggestion("web").digest;
    assert_ne!(exact, before);
    // An option counts even where it changes no rule: it is what the approval was read under.
    let options = Options { from_outside: FromOutside::ExactHosts, quiet_hours: 1, ..Options::default() };
    town.context.particular.insert(workload("web"), options);
    assert_ne!(town.suggestion("web").digest, exact);
}

#[test]
fn a_rejected_client_does_not_come_back_inside_a_wider_rule() {
    let mut town = Town::of(["web"]);
    let peer: Peer = "outside:192.0.2.3".parse().unwrap();
    let (workload, ports) = (workload("web"), Service::tcp(80).into());
    town.context.rejected.insert(Rejected { workload, direction: Direction::Ingress, peer: peer.clone(), ports });
    clients(&mut town, "192.0.2.", 20);
    let web = town.suggestion("web");
    assert_eq!(web.rules.iter().filter(|rule| rule.direction == Direction::Ingress).count(), 20);
    let state = |p: &Peer| web.rules.iter().find(|rule| rule.rule.peer == *p).unwrap().state;
    assert_eq!(state(&peer), RuleState::Rejected);
    assert!(town.finding("web", "ingress-exact-hosts").unwrap().contains("a client was rejected"));
}

#[test]
fn dns_to_the_configured_resolver_is_part_of_every_egress_marked_needed_by_the_engine() {
    let mut town = Town::of(["db", "web"]);
    let resolvers = ["outside:192.0.2.53".parse().unwrap()].into();
    town.context.workloads.insert(workload("db"), Known { resolvers, ..Known::default() });
    town.flow("web", "db", Service::tcp(5432), Established, 2);
    town.flow("db", "outside:192.0.2.53", Service::udp(53), Established, 5);
    let needed: Vec<_> = town.suggestion("db").rules.into_iter().filter(|rule| rule.origin == Origin::NeededByEngine).collect();
    let texts = needed.iter().map(printed).sorted();
    assert_eq!(texts, ["egress outside:192.0.2.53 tcp/53", "egress outside:192.0.2.53 udp/53"], "both, though only one was seen");
    assert_eq!(needed.iter().map(|rule| rule.evidence.established).sum::<u64>(), 5, "with its evidence where it was seen");
    assert!(town.finding("db", "dns-open").unwrap().contains("data can leave that way"));
    assert!(town.finding("db", "address-may-change").is_none(), "a configured resolver is not a peer that moves");
}

#[test]
fn without_evidence_there_is_a_suggestion_without_rules_that_says_it_would_isolate() {
    let town = Town::of(["web"]);
    let web = town.suggestion("web");
    assert!(web.rules.is_empty());
    assert_eq!((web.phase, web.updated), (Phase::Learning, None));
    let finding = &web.findings[0];
    assert_eq!((finding.severity, finding.code.as_str()), (Severity::Blocking, "no-evidence"));
    assert!(finding.text.contains("isolate"));
}

#[test]
fn a_workload_that_forwards_is_a_finding_with_its_networks() {
    let mut town = Town::of(["router"]);
    let networks = ["back".to_owned(), "front".to_owned()].into();
    town.context.workloads.insert(workload("router"), Known { forwards: true, networks, ..Known::default() });
    assert!(town.finding("router", "forwards").unwrap().starts_with("router passes packets on between its networks (back, front)."));
}

#[test]
fn a_name_made_up_by_the_engine_and_shared_namespaces_are_said() {
    let mut town = Town::of(["quirky_einstein"]);
    let members = ["debug".to_owned()].into();
    town.context.workloads.insert(workload("quirky_einstein"), Known { engine_named: true, members, ..Known::default() });
    assert!(town.finding("quirky_einstein", "engine-named").unwrap().contains("bulkhead.dev/workload"));
    assert!(town.finding("quirky_einstein", "members").unwrap().contains("debug"));
}

#[test]
fn approving_one_side_offers_the_counterpart_and_lists_the_half_approved_edge() {
    let mut town = Town::of(["web", "db"]);
    let mut policy = WorkloadPolicy::empty(workload("web"));
    policy.egress.insert(rule("db tcp/5432"));
    town.context.policies.insert(workload("web"), policy);
    let db = town.suggestion("db");
    let counterpart = db.rules.iter().find(|rule| rule.origin == Origin::Counterpart).unwrap();
    assert_eq!(printed(counterpart), "ingress web tcp/5432");
    for name in ["web", "db"] {
        let text = town.finding(name, "half-approved").unwrap();
        assert!(text.contains("web -> db tcp/5432: egress of web is approved, ingress of db is not"), "{text}");
    }
    let mut policy = WorkloadPolicy::empty(workload("db"));
    policy.ingress.insert(rule("web tcp/1-9999"));
    town.context.policies.insert(workload("db"), policy);
    assert!(town.finding("web", "half-approved").is_none());
}

#[test]
fn what_is_in_force_is_marked_and_wider_shadowed_or_unseen_rules_are_said() {
    let mut town = Town::of(["web", "db"]);
    for port in 8001..=8008 {
        town.flow("web", "db", Service::tcp(port), Established, 1);
    }
    let mut policy = WorkloadPolicy::empty(workload("db"));
    policy.ingress.extend([rule("web tcp/1-65535"), rule("web tcp/8001"), rule("host: tcp/22")]);
    town.context.policies.insert(workload("db"), policy);
    let db = town.suggestion("db");
    let ingress = db.rules.iter().filter(|rule| rule.direction == Direction::Ingress);
    assert!(ingress.map(|rule| rule.state).all(|state| state == RuleState::Approved));
    assert!(town.finding("db", "wider-than-observed").unwrap().contains("8 of 65,535 ports"));
    assert!(town.finding("db", "shadowed").unwrap().contains("ingress web tcp/8001 is in force and says nothing"));
    assert!(town.finding("db", "not-seen").unwrap().contains("ingress host: tcp/22"));
}

#[test]
fn a_rule_for_a_limited_time_does_not_make_the_lasting_one_approved() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(5432), Established, 1);
    let mut policy = WorkloadPolicy::empty(workload("db"));
    policy.ingress.insert(policy::Rule { until: Some(at(60)), ..rule("web tcp/5432") });
    town.context.policies.insert(workload("db"), policy);
    let state = |town: &Town| town.suggestion("db").rules.iter().find(|r| r.direction == Direction::Ingress).unwrap().state;
    assert_eq!(state(&town), RuleState::Undecided);
    assert!(town.codes("db").contains("limited-time"));
    town.context.now = at(61);
    assert!(!town.codes("db").contains("limited-time"), "it has run out");
}

#[test]
fn counts_times_and_bytes_leave_digest_and_revision_alone_and_a_new_edge_moves_both() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(5432), Established, 1);
    let first = town.suggestion("web");
    let revision = Revision { revision: first.revision, digest: first.digest.clone() };
    town.context.previous.insert(workload("web"), revision);
    town.flow("web", "db", Service::tcp(5432), Established, 500);
    town.watched("web", 100);
    let same = town.suggestion("web");
    assert_eq!((same.revision, &same.digest), (1, &first.digest));
    assert_ne!(same.rules, first.rules, "the evidence did move");
    town.flow("web", "db", Service::tcp(6379), Established, 1);
    let moved = town.suggestion("web");
    assert_eq!(moved.revision, 2);
    assert_ne!(moved.digest, first.digest);
    let id = |s: &policy::suggestion::Suggestion| s.rules.iter().find(|r| printed(r) == "egress db tcp/5432").unwrap().id.clone();
    assert_eq!(id(&first), id(&moved), "a rule keeps its id");
}

#[test]
fn stable_needs_traffic_healthy_time_and_quiet_and_loss_stops_the_clock() {
    let phase = |town: &Town| town.suggestion("web").phase;
    let mut town = Town::of(["web", "db"]);
    town.watched("web", 100);
    assert_eq!(phase(&town), Phase::Learning, "no traffic is not stability");
    town.flow("web", "db", Service::tcp(5432), Established, 500);
    assert_eq!(phase(&town), Phase::Stable);
    town.watched("web", 30);
    assert_eq!(phase(&town), Phase::Stabilizing, "quiet, and not for long enough");
    let mut blind = Window::default();
    blind.add(at(0), at(360_000), true, 1);
    blind.add(at(360_000), at(720_000), false, 0);
    town.context.windows.insert(workload("web"), blind);
    assert_eq!(phase(&town), Phase::Learning, "an agent that is down or lost events stops the clock");
    assert!(town.finding("web", "loss-in-window").unwrap().starts_with("1 kernel events were lost"));
}

#[test]
fn the_coverage_says_what_is_not_known() {
    let mut town = Town::of(["web", "db"]);
    town.flow("web", "db", Service::tcp(1), Established, 1);
    town.flow("web", "db", Service::tcp(2), Established, 499);
    let text = town.suggestion("web").coverage.to_string();
    assert_eq!(
        text,
        "2 edges, 0.2 % of new connections expected to be unseen; healthily observed for 0 s of 48 h; no nightly window observed yet"
    );
    assert!(town.codes("web").contains("no-nightly-window") && town.codes("web").contains("short-window"));
    // From 10:00, a night is whole at 06:00 the next day.
    town.watched("web", 20);
    assert!(!town.codes("web").contains("no-nightly-window"));
    town.watched("web", 19);
    assert!(town.codes("web").contains("no-nightly-window"));
}

#[test]
fn the_inventory_says_who_answers_for_names() {
    let json = serde_json::json!({
        "networks": {"n": {"id": "n", "name": "front", "project": null, "driver": "bridge", "bridge": "br0", "subnets": [], "internal": false, "unmanaged": []}},
        "containers": {
            "1": container("web", &["172.18.0.2"], &[]),
            "2": container("own", &["172.18.0.3"], &["172.18.0.2", "172.18.0.1", "192.0.2.53"]),
        },
        "host": ["172.18.0.1"], "userlandProxy": true,
    });
    let inventory: Inventory = serde_json::from_value(json).unwrap();
    let known = known([&inventory]);
    let resolvers = |name: &str| known[&workload(name)].resolvers.iter().sorted();
    assert_eq!(resolvers("web"), ["outside:127.0.0.11"]);
    assert_eq!(resolvers("own"), ["host:", "outside:192.0.2.53", "web"]);
    assert_eq!(known[&workload("web")].networks.iter().sorted(), ["front"]);
}

fn container(name: &str, addresses: &[&str], resolvers: &[&str]) -> serde_json::Value {
    serde_json::json!({
        "id": name, "name": name, "workload": name, "oneOff": false, "engineNamed": false, "image": "", "labels": {}, "pid": null,
        "legs": [{"network": "n", "bridge": "br0", "port": null, "mac": [2, 0, 0, 0, 0, 1], "addresses": addresses}],
        "published": [], "resolvers": resolvers, "members": [], "unmanaged": [],
    })
}

#[test]
fn tcp_and_udp_on_one_port_are_two_rules() {
    let mut town = Town::of(["a", "b"]);
    town.flow("a", "b", Service::tcp(53), Established, 1);
    town.flow("a", "b", Service { protocol: Protocol::Udp, port: 53 }, Established, 1);
    assert_eq!(town.learned("a").len(), 2);
}

#[test]
fn an_empty_graph_and_no_workloads_suggest_nothing() {
    assert!(learn(&FlowGraph::new(), &Town::of([]).context).is_empty());
}
