//! The traps of modes: they belong to a segment, survive everything, and Enforce is never an accident.

use nix::sys::signal::Signal;
use policy::evaluate::Verdict;
use policy::status::{Ended, Preview};
use policy::{Connection, EdgeKey, Health, Mode, Scene, Workload, evaluate};

use crate::desk::{Desk, Node, container, denied, edge, edge_at, end, eventually, find, ran, rule_id, usual};

/// A shop with everything approved.
fn approved() -> (Desk, Node) {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    for workload in ["shop/web", "shop/db", "shop/worker"] {
        desk.approve(workload);
    }
    node.plan(3);
    (desk, node)
}

fn mode_of(desk: &Desk, segment: &str) -> String {
    let segments = desk.run("get segments -o json").json();
    let found = segments.as_array().unwrap().iter().find(|object| object["metadata"]["name"] == segment);
    let found = found.unwrap_or_else(|| panic!("no {segment} in {segments:#}"));
    found["spec"]["mode"].as_str().unwrap().to_owned()
}

#[test]
fn a_compose_project_is_a_segment_by_itself() {
    let (desk, node) = approved();
    let list = desk.run("segment list").done();
    assert!(list.contains("shop") && list.contains("Learn") && list.contains("(by itself)"), "{list}");
    desk.run("mode shop audit").done();
    let plan = node.plan(4);
    assert_eq!(plan.set.segments["shop"].mode, Mode::Audit);
    assert_eq!(mode_of(&desk, "shop"), "Audit");
}

#[test]
fn enforce_is_refused_while_a_running_workload_has_no_policy() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/web");
    let error = desk.run("mode shop enforce --yes").failed(3);
    assert!(error.contains("shop/db,shop/worker") && error.contains("--deny-unlearned"), "{error}");
    let error = desk.run("mode shop enforce --yes --deny-unlearned shop/db").failed(3);
    assert!(error.contains("shop/worker"), "{error}");
    assert_eq!(mode_of(&desk, "shop"), "Learn");
    desk.run("mode shop enforce --yes --deny-unlearned shop/nobody,shop/db,shop/worker").failed(4);
    let said = desk.run("mode shop enforce --yes --deny-unlearned shop/db,shop/worker").done();
    assert!(said.contains("shop/worker has no approved policy: all of its traffic is denied now"), "{said}");
    assert_eq!(node.plan(2).set.segments["shop"].mode, Mode::Enforce);
    assert!(desk.run("status").done().contains("Under Enforce without an approved policy"));
}

#[test]
fn enforce_says_beforehand_what_it_would_deny_and_end() {
    let (desk, node) = approved();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    let key = EdgeKey { from: end("shop/worker"), to: end("shop/db"), service: "tcp/6379".parse().unwrap(), direction_known: true };
    let ended = Ended { edge: key, connections: 2, examples: Vec::new(), reason: "no rule".to_owned() };
    *node.preview.lock().unwrap() = Preview { ended: vec![ended], unlearned: Vec::new() };
    let asked = desk.run("mode shop enforce");
    assert!(asked.out.contains("1 edge would be denied") && asked.out.contains("shop/worker -> shop/db tcp/6379"), "{}", asked.out);
    assert!(asked.out.contains("2 established connections would end"), "{}", asked.out);
    let error = asked.failed(3);
    assert!(error.contains("not confirmed") && error.contains("--yes"), "{error}");
    desk.run("mode shop enforce --dry-run").done();
    assert_eq!(mode_of(&desk, "shop"), "Learn");
    assert_eq!(node.generations().last(), Some(&3), "nothing was sent");
    desk.run("mode shop enforce --yes").done();
    assert_eq!(mode_of(&desk, "shop"), "Enforce");
    assert!(desk.run("mode shop enforce --yes").done().contains("in Enforce already"));
}

#[test]
fn an_apply_that_cuts_says_beforehand_what_it_would_deny_and_end_as_a_switch_does() {
    let (desk, node) = approved();
    let ends = |from: &str, to: &str, service: &str| {
        let edge = EdgeKey { from: end(from), to: end(to), service: service.parse().unwrap(), direction_known: true };
        let ended = Ended { edge, connections: 2, examples: Vec::new(), reason: "no rule".to_owned() };
        *node.preview.lock().unwrap() = Preview { ended: vec![ended], unlearned: Vec::new() };
    };
    // To Enforce: asked, as `mode` asks.
    desk.run("segment add shop").done();
    let segment = desk.run("get segments shop -o yaml").done();
    let file = desk.file("segment.yaml", &segment.replace("mode: Learn", "mode: Enforce"));
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    ends("shop/worker", "shop/db", "tcp/6379");
    let asked = desk.args(&["apply", "-f", &file]);
    assert!(asked.out.contains("1 edge would be denied") && asked.out.contains("shop/worker -> shop/db tcp/6379"), "{}", asked.out);
    assert!(asked.out.contains("2 established connections would end"), "{}", asked.out);
    let error = asked.failed(3);
    assert!(error.contains("not confirmed") && error.contains("--yes"), "{error}");
    let dry = desk.args(&["apply", "--dry-run", "-f", &file]).done();
    assert!(dry.contains("2 established connections would end") && dry.contains("Dry run: nothing was changed"), "{dry}");
    assert_eq!(mode_of(&desk, "shop"), "Learn");
    node.plan(4);
    assert_eq!(node.generations(), [1, 2, 3, 4], "only the segment was made");
    desk.args(&["apply", "--yes", "-f", &file]).done();
    assert_eq!(mode_of(&desk, "shop"), "Enforce");

    // In Enforce: what a narrower policy newly cuts, and not what was denied before.
    let policy = desk.run("get policies shop/db -o yaml").done();
    let narrower = desk.file("db.yaml", &policy.replace("tcp/5432", "tcp/5433"));
    ends("shop/web", "shop/db", "tcp/5432");
    let asked = desk.args(&["apply", "-f", &narrower]);
    assert!(
        asked.out.contains("shop/web -> shop/db tcp/5432") && asked.out.contains("2 established connections would end"),
        "{}",
        asked.out
    );
    assert!(!asked.out.contains("tcp/6379"), "denied before already: {}", asked.out);
    asked.failed(3);
    // What cuts nothing is not asked about.
    *node.preview.lock().unwrap() = Preview::default();
    let wider = desk.file("wider.yaml", &policy.replace("tcp/5432", "tcp/5432-5433"));
    let said = desk.args(&["apply", "-f", &wider]).done();
    assert!(said.contains("+ ingress shop/web tcp/5432-5433"), "{said}");
}

#[test]
fn an_edit_or_a_revert_that_cuts_under_enforce_says_so_and_asks() {
    let (desk, node) = approved();
    let edit = |flags: &[&str], script: &str| {
        let mut command = desk.command();
        ran(command.env("EDITOR", script).env("TMPDIR", desk.dir.path()).args(["edit", "shop/db"]).args(flags))
    };
    // Nothing is enforced: what is different is told, and nobody is asked.
    let said = edit(&[], "sed -i s,tcp/5432,tcp/5432-5433,").done();
    assert!(said.contains("policy shop/db: + ingress shop/web tcp/5432-5433") && said.contains("Recorded as decision 4"), "{said}");
    desk.run("mode shop enforce --yes").done();
    node.plan(5);

    let ends = |edge: &EdgeKey| {
        let ended = Ended { edge: edge.clone(), connections: 2, examples: Vec::new(), reason: "no rule".to_owned() };
        *node.preview.lock().unwrap() = Preview { ended: vec![ended], unlearned: Vec::new() };
    };
    ends(&EdgeKey { from: end("shop/web"), to: end("shop/db"), service: "tcp/5432".parse().unwrap(), direction_known: true });
    let cuts = "sed -i s,tcp/5432-5433,tcp/6000,";
    let asked = edit(&[], cuts);
    for part in [
        "policy shop/db: - ingress shop/web tcp/5432-5433",
        "policy shop/db: + ingress shop/web tcp/6000",
        "shop/web -> shop/db tcp/5432",
        "2 established connections would end",
    ] {
        assert!(asked.out.contains(part), "{part}: {}", asked.out);
    }
    let error = asked.failed(3);
    assert!(error.contains("not confirmed") && error.contains("--yes") && error.contains("Your text is kept in"), "{error}");
    assert_eq!(node.generations().last(), Some(&5), "nothing was changed");
    let said = edit(&["--yes"], cuts).done();
    assert_eq!(said.matches("+ ingress shop/web tcp/6000").count(), 1, "told once: {said}");
    assert!(said.contains("Recorded as decision 6"), "{said}");

    // Back to what is wider cuts nothing, and back from there does.
    *node.preview.lock().unwrap() = Preview::default();
    let said = desk.run("revert shop/db").done();
    assert!(said.contains("+ ingress shop/web tcp/5432-5433") && said.contains("revision 2 is in force again"), "{said}");
    let asked = desk.run("revert shop/db --to 3");
    assert!(asked.out.contains("- ingress shop/web tcp/5432-5433") && asked.out.contains("1 edge would be denied"), "{}", asked.out);
    assert!(!asked.out.contains("in force again"), "{}", asked.out);
    asked.failed(3);
    assert_eq!(node.generations().last(), Some(&7), "nothing was changed");
    assert!(desk.run("revert shop/db --to 3 --yes").done().contains("revision 3 is in force again"));
    assert!(desk.run("revert shop/db --to 3").done().contains("Nothing is different"));
}

#[test]
fn a_node_that_cannot_say_what_would_end_is_named() {
    let (desk, node) = approved();
    node.stop();
    desk.until("status -o json", |view| view["nodes"][0]["connected"] == false);
    let said = desk.run("mode shop enforce --dry-run").done();
    assert!(said.contains("node1 did not say which connections would end: no agent is connected"), "{said}");
}

#[test]
fn back_needs_no_approval_and_is_recorded() {
    let (desk, node) = approved();
    desk.run("mode shop enforce --yes").done();
    let began = std::time::Instant::now();
    desk.args(&["mode", "shop", "learn", "--comment", "checkout is down"]).done();
    assert_eq!(node.plan(5).set.segments["shop"].mode, Mode::Learn);
    assert!(began.elapsed() < std::time::Duration::from_secs(1), "{:?}", began.elapsed());
    let decisions = desk.run("get decisions -o json").json();
    let last = decisions.as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["action"], &last["rules"][0], &last["comment"]),
        (&"mode".into(), &"Enforce -> Learn".into(), &"checkout is down".into())
    );
}

#[test]
fn a_mode_survives_a_killed_controller() {
    let (mut desk, node) = approved();
    desk.run("mode shop enforce --yes").done();
    node.plan(4);
    assert_eq!(desk.end(Signal::SIGKILL), None);
    desk.start();
    assert_eq!(mode_of(&desk, "shop"), "Enforce");
    desk.until("status -o json", |view| view["nodes"][0]["connected"] == true);
    desk.until("get workloads -o json", |found| found.as_array().unwrap().len() == 3);
    // The node has that plan already, or so it says: it gets it once more, to compare.
    eventually(std::time::Duration::from_secs(60), || node.generations() == [1, 2, 3, 4, 4]);
    let view = desk.run("explain shop/worker shop/db tcp/5432 -o json").json();
    assert_eq!(view["verdict"], "deny");
}

#[test]
fn audit_in_one_segment_leaves_enforcement_in_another_alone() {
    let (desk, mut node) = approved();
    for (number, name) in [(7, "blog/app"), (8, "blog/db")] {
        let container = container(name, number, &["shop_front"]);
        node.inventory.containers.insert(container.id.clone(), container);
    }
    node.report();
    desk.until("get workloads -o json", |found| found.as_array().unwrap().len() == 5);
    desk.run("mode shop enforce --yes").done();
    desk.run("mode blog audit").done();
    let set = node.plan(5).set;
    assert_eq!((set.segments["shop"].mode, set.segments["blog"].mode), (Mode::Enforce, Mode::Audit));
    desk.run("mode blog learn").done();
    assert_eq!(node.plan(6).set.segments["shop"].mode, Mode::Enforce);
}

#[test]
fn an_audit_verdict_is_never_told_as_enforced() {
    let (desk, node) = approved();
    desk.run("mode shop audit").done();
    node.saw(&desk, &[denied("shop/worker", "shop/db", "tcp/5432", true, 41)]);
    let view = desk.run("explain shop/worker shop/db tcp/5432 -o json").json();
    assert_eq!(view["verdict"], "wouldDeny");
    let audit = desk.run("audit").done();
    let line = audit.lines().nth(1).unwrap();
    assert!(
        line.contains("41") && line.contains("would deny") && line.contains("no egress rule of policy shop/worker allows it"),
        "{line}"
    );
    let lines = desk.run("audit -o json").json();
    assert_eq!((&lines[0]["wouldDeny"], &lines[0]["denied"]), (&41.into(), &0.into()));
    let status = desk.run("status -o json").json();
    assert!(status["networks"].as_array().unwrap().iter().all(|network| network["state"] != "enforced"));
    // Approved since: it is listed as allowed now.
    desk.run("allow shop/worker shop/db tcp/5432").done();
    assert_eq!(desk.run("audit -o json").json()[0]["verdict"], "allow");
}

#[test]
fn stable_takes_healthy_time_with_traffic_not_the_wall_clock() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let now = jiff::Timestamp::now().as_second() / 3600 * 3600;
    let at = |hours_ago: i64| jiff::Timestamp::from_second(now - hours_ago * 3600).unwrap();
    let phase = |workload: &str| desk.run(&format!("describe suggestion {workload} -o json")).json()["phase"].as_str().unwrap().to_owned();
    // Traffic for a hundred hours, by the flows' own clocks, but nobody vouches for having watched.
    let steady: Vec<_> = (0..100).map(|hour| edge_at("shop/web", "shop/db", "tcp/5432", 50, at(100 - hour))).collect();
    node.saw(&desk, &steady);
    assert_eq!(phase("shop/db"), "Learning");
    // An agent that lost events, or was not healthy, adds nothing.
    node.handle.health(Health { from: at(100), to: at(99), events: 1, lost: 9, unattributed: 0, healthy: false });
    node.handle.health(Health { from: at(99), to: at(98), events: 1, lost: 0, unattributed: 0, healthy: false });
    desk.until("status -o json", |view| view["notes"].to_string().contains("lost 9 kernel events"));
    assert_ne!(phase("shop/db"), "Stable");
    for hour in (0..98).rev() {
        node.handle.health(Health { from: at(hour + 1), to: at(hour), events: 50, lost: 0, unattributed: 0, healthy: true });
    }
    desk.until("status -o json", |view| view["nodes"][0]["healthySeconds"].as_u64().unwrap() >= 98 * 3600);
    desk.until("describe suggestion shop/db -o json", |view| view["phase"] == "Stable");
    let shown = desk.run("describe suggestion shop/db").done();
    assert!(shown.contains("9 kernel events were lost while shop/db was observed"), "the loss is shown on the suggestion: {shown}");
    // Without traffic nothing is stable, however long somebody watched.
    assert_ne!(phase("shop/worker"), "Stable");
}

#[test]
fn promotion_is_off_by_default_and_goes_by_healthy_time_and_denials() {
    let (desk, node) = approved();
    // Seen while it was learned, and never again.
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    desk.run("mode shop audit").done();
    let yaml = desk.run("get segments shop -o yaml").done();
    assert!(!yaml.contains("promotion"), "{yaml}");
    let promoted = format!(
        "{}  promotion:\n    healthyHours: 0\n    distinctHours: 1\n    wouldBeDenials: 0\n",
        yaml.trim_end_matches('\n').to_owned() + "\n"
    );
    let file = desk.file("segment.yaml", &promoted);
    desk.args(&["apply", "-f", &file]).done();
    node.saw(&desk, &[edge("shop/web", "shop/db", "tcp/5432", 1), denied("shop/worker", "shop/db", "tcp/5432", true, 1)]);
    let waits = "shop is promoted to Enforce by its rule, but not yet: 1 flows would have been denied, 0 are tolerated; \
                 rules for what was in use that are neither approved nor rejected: 1 of shop/db, 1 of shop/worker.";
    let words = || desk.run("status").done().split_whitespace().collect::<Vec<_>>().join(" ");
    eventually(std::time::Duration::from_secs(120), || words().contains(waits));
    assert_eq!(mode_of(&desk, "shop"), "Audit", "a would-be denial holds it back");
    for (workload, peer) in [("shop/db", "shop/worker"), ("shop/worker", "shop/db")] {
        let id = rule_id(&desk, workload, peer, "tcp/6379");
        desk.args(&["reject", workload, "--rule", &id]).done();
    }
    desk.run("allow shop/worker shop/db tcp/5432").done();
    node.saw(&desk, &[edge("shop/web", "shop/db", "tcp/5432", 1)]);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while mode_of(&desk, "shop") != "Enforce" {
        assert!(std::time::Instant::now() < end, "not promoted");
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    let decisions = desk.run("get decisions -o json").json();
    let last = decisions.as_array().unwrap().last().unwrap();
    assert_eq!((&last["action"], &last["who"]["name"]), (&"promote".into(), &"bulkhead".into()));
}

#[test]
fn members_are_resolved_by_what_runs_and_never_slip_under_enforce() {
    let (desk, mut node) = approved();
    desk.run("segment add --segment back shop/db network:shop_front").done();
    let set = node.plan(4).set;
    assert_eq!(set.segments["back"].members.len(), 2);
    assert!(desk.run("segment add nothing").failed(4).contains("project:nothing"));
    desk.run("segment add cow:shop").failed(2);
    desk.run("segment add --segment a/b shop").failed(2);
    desk.run("mode back enforce --yes").done();
    let plain = container("batch/job", 9, &["shop_back"]);
    node.inventory.containers.insert(plain.id.clone(), plain);
    node.report();
    desk.until("get workloads -o json", |found| found.as_array().unwrap().len() == 4);
    let error = desk.run("segment add --segment back batch").failed(3);
    assert!(error.contains("batch/job") && error.contains("--deny-unlearned"), "{error}");
    desk.run("segment remove --segment back shop/db").done();
    desk.run("segment remove shop/db").failed(4);
    desk.run("segment remove network:shop_front").done();
    assert!(!desk.run("segment list").done().contains("back"));
}

#[test]
fn who_comes_under_enforce_as_a_member_is_foreseen_and_asked_for_as_with_a_switch() {
    let (desk, node) = approved();
    // In use, and not approved.
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    desk.run("segment add --segment back shop/web").done();
    desk.run("mode back enforce --yes").done();
    let before = desk.run("get segments -o json").json();
    let asked = desk.run("segment add --segment back shop/db");
    assert!(asked.out.contains("shop/worker -> shop/db tcp/6379"), "{}", asked.out);
    let error = asked.failed(3);
    assert!(error.contains("not confirmed") && error.contains("--yes"), "{error}");
    assert_eq!(desk.run("get segments -o json").json(), before);
    desk.run("segment add --segment back shop/db --yes").done();
    assert_ne!(desk.run("get segments -o json").json(), before);
    // Out of it again: nothing is cut, and nobody is asked.
    desk.run("segment remove --segment back shop/db").done();
}

#[test]
fn what_was_asked_for_is_done_though_nobody_reads_the_output_to_its_end() {
    let (desk, node) = approved();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = desk.command();
    let status = command.args(["mode", "shop", "enforce", "--yes"]).stdout(writer).status().unwrap();
    assert!(status.success());
    assert_eq!(mode_of(&desk, "shop"), "Enforce");
}

#[test]
fn what_is_seen_while_somebody_reads_the_forecast_is_asked_for_before_it_is_cut() {
    use std::io::{Read, Write};
    let (desk, node) = approved();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/6379", 3)]);
    // A terminal of its own: `script` makes one.
    let words = format!("{} mode shop enforce", desk.command().get_program().display());
    let mut command = std::process::Command::new("script");
    let envs = desk.command().get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect::<Vec<_>>();
    command.args(["-qec", &words, "/dev/null"]).envs(envs);
    let mut child = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let (mut typed, mut shown) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (mut said, mut read) = (String::new(), 0);
    let mut until = |text: &str| {
        let mut some = [0; 4096];
        while !said[read..].contains(text) {
            let n = shown.read(&mut some).unwrap();
            assert!(n > 0, "no \"{text}\" in {said}");
            said.push_str(&String::from_utf8_lossy(&some[..n]));
        }
        read += said[read..].find(text).unwrap() + text.len();
    };
    until("Switch shop to Enforce?");
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/9090", 1)]);
    typed.write_all(b"y\n").unwrap();
    until("Seen meanwhile, 1 edge more would be cut:");
    until("shop/worker -> shop/db tcp/9090");
    assert_eq!(mode_of(&desk, "shop"), "Learn");
    typed.write_all(b"y\n").unwrap();
    until("Recorded as decision");
    assert!(child.wait().unwrap().success());
    assert_eq!(mode_of(&desk, "shop"), "Enforce");
}

#[test]
fn a_store_that_was_put_back_from_a_copy_is_newer_than_all_nodes_once_it_adopts() {
    let (desk, mut node) = approved();
    // It has a newer plan than the store says.
    (node.status.store, node.status.generation) = (node.plan(3).store, 20);
    node.report();
    desk.until("status -o json", |status| status.to_string().contains("\"generation\":20"));
    desk.run("adopt --yes").done();
    let decisions = desk.run("get decisions -o json").json();
    assert_eq!(find(&decisions, "action", "adopt")["generation"], 21);
    assert_eq!(node.plan(21).generation, 21);
}

#[test]
fn a_quarantined_workload_is_cut_off_and_given_back() {
    let (desk, node) = approved();
    desk.args(&["quarantine", "shop/web", "--comment", "odd egress"]).done();
    let set = node.plan(4).set;
    assert_eq!(set.quarantines[&Workload::new("shop", "web")].comment, "odd egress");
    let networks = [(Workload::new("shop", "web"), ["shop_back".to_owned()].into())].into();
    let scene = Scene { set: &set, networks: &networks, now: jiff::Timestamp::now() };
    let connection = Connection { from: end("shop/web"), to: end("shop/db"), service: "tcp/5432".parse().unwrap(), guarded: true };
    assert_eq!(evaluate(&scene, &connection).verdict, Verdict::Deny);
    assert!(desk.run("get quarantines").done().contains("odd egress"));
    assert!(desk.run("explain shop/web shop/db tcp/5432").done().contains("is quarantined"));
    desk.run("release shop/web").done();
    assert!(node.plan(5).set.quarantines.is_empty());
    desk.run("release shop/web").failed(4);
    desk.run("quarantine shop/nobody").failed(4);
}

#[test]
fn a_node_is_told_what_has_changed_and_gets_the_whole_plan_where_that_does_not_fit() {
    lab::needs_root!();
    let (desk, node) = approved();
    let whole = || node.whole.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(whole(), 1, "the first one");
    let said = desk.run("quarantine shop/web").done();
    assert!(said.contains("in force on"), "{said}");
    node.plan(4);
    assert!(desk.run("release shop/web").done().contains("in force on"));
    let before = node.plan(5);
    assert_eq!(whole(), 1, "the others were told as changes");
    node.handle.wants_whole();
    eventually(std::time::Duration::from_secs(60), || whole() == 2);
    assert_eq!(node.plan(5), before);
    assert!(desk.run("quarantine shop/web").done().contains("in force on"));
    node.plan(6);
    assert_eq!(whole(), 2);
}

#[test]
fn adopt_tells_the_nodes_and_is_recorded() {
    lab::needs_root!();
    let (desk, node) = approved();
    desk.run("adopt").failed(3);
    desk.run("adopt --yes").done();
    eventually(std::time::Duration::from_secs(60), || node.plans.lock().unwrap().last().is_some_and(|(_, adopt)| *adopt));
    let decisions = desk.run("get decisions -o json").json();
    // Newer than all, also than another plan of the same number that a node may have.
    assert_eq!(find(&decisions, "action", "adopt")["generation"], 4);
    assert_eq!(node.plan(4).generation, 4);
}
