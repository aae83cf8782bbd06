//! The traps of review: what is approved is what was read, what was rejected stays away, nothing changes by itself.

use std::process::Command;

use nix::sys::signal::Signal;
use policy::{Peer, Workload};

use crate::desk::{Desk, Node, denied, edge, eventually, find, ran, rule_id, usual};

fn state_of(desk: &Desk, workload: &str, id: &str) -> String {
    let suggestion = desk.run(&format!("describe suggestion {workload} -o json")).json();
    find(&suggestion["rules"], "id", id)["state"].as_str().unwrap().to_owned()
}

#[test]
fn an_approval_puts_the_rules_in_force_and_is_recorded() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let list = desk.run("get suggestions").done();
    assert!(list.contains("shop/web") && list.contains("Learning"), "{list}");
    let shown = desk.run("describe suggestion shop/db").done();
    assert!(shown.contains("ingress") && shown.contains("shop/web") && shown.contains("412 established"), "{shown}");
    let mut approve = desk.command();
    approve.env("SUDO_USER", "mallory").args(["approve", "shop/db", "--comment", "read on Monday"]);
    let said = ran(&mut approve).done();
    assert!(said.contains("Recorded as decision 1"), "{said}");
    let set = node.plan(1).set;
    let policy = &set.policies[&Workload::new("shop", "db")];
    assert!(policy.ingress.iter().any(|rule| rule.peer == Peer::Workload(Workload::new("shop", "web"))));
    let decisions = desk.run("get decisions -o json").json();
    let decision = &decisions[0];
    assert_eq!(
        (&decision["action"], &decision["subject"], &decision["comment"]),
        (&"approve".into(), &"shop/db".into(), &"read on Monday".into())
    );
    // Who is the uid at the other end of the socket; SUDO_USER is only a claim.
    assert_eq!(decision["who"]["uid"], nix::unistd::Uid::effective().as_raw());
    assert_eq!(decision["who"]["claims"], "mallory");
    assert_eq!(decision["digest"].as_str().unwrap().len(), 64);
}

#[test]
fn approving_something_else_than_what_was_read_is_refused() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.run("describe suggestion shop/db").done();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/5432", 1)]);
    let error = desk.run("approve shop/db").failed(3);
    assert!(error.contains("has changed") && error.contains("bulkhead describe suggestion shop/db"), "{error}");
    assert!(node.generations().is_empty(), "nothing is in force");
    assert_eq!(desk.run("get decisions -o json").json().as_array().unwrap().len(), 0);
    // Read again, it can be approved; counts that grow meanwhile are no other suggestion.
    desk.run("diff shop/db").done();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/5432", 500)]);
    desk.run("approve shop/db").done();
}

#[test]
fn a_script_that_read_nothing_has_to_name_the_digest() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let error = desk.run("approve shop/db").failed(3);
    assert!(error.contains("nobody has read the suggestion of shop/db here yet"), "{error}");
    desk.run("approve shop/db --digest 00000000").failed(3);
    desk.run("approve shop/db --digest xyz").failed(2);
    desk.run("approve shop/nobody --digest 00000000").failed(4);
    let list = desk.run("get suggestions -o json").done();
    assert!(list.contains("PolicySuggestion"), "{list}");
    let digest = desk.run("describe suggestion shop/db -o json").json()["digest"].as_str().unwrap().to_owned();
    std::fs::remove_dir_all(desk.path("xdg")).unwrap();
    desk.run(&format!("approve shop/db@{}", &digest[..12])).done();
}

#[test]
fn an_approved_policy_does_not_change_when_new_flows_arrive() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/db");
    let before = desk.run("get policies shop/db -o yaml").done();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/5432", 9000), edge("shop/web", "shop/db", "tcp/5432", 9000)]);
    desk.until("get suggestions -o json", |_| true);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(desk.run("get policies shop/db -o yaml").done(), before);
    assert_eq!(node.generations(), [1], "and nothing was sent to the node");
}

#[test]
fn a_rejected_rule_does_not_come_back() {
    let mut desk = Desk::new();
    let node = Node::with_shop(&desk);
    let mut edges = usual();
    edges.push(edge("shop/worker", "shop/db", "tcp/5432", 2));
    node.saw(&desk, &edges);
    let id = rule_id(&desk, "shop/db", "shop/worker", "tcp/5432");
    desk.args(&["reject", "shop/db", "--rule", &id, "--comment", "a scan"]).done();
    node.saw(&desk, &[edge("shop/worker", "shop/db", "tcp/5432", 5000)]);
    assert_eq!(state_of(&desk, "shop/db", &id), "rejected");
    assert_eq!(desk.end(Signal::SIGKILL), None);
    desk.start();
    eventually(std::time::Duration::from_secs(60), || desk.run("describe suggestion shop/db").code == 0);
    assert_eq!(state_of(&desk, "shop/db", &id), "rejected", "also after a restart");
    desk.run("approve shop/db").done();
    let policy = desk.run("describe policy shop/db").done();
    assert!(policy.contains("shop/web tcp/5432") && !policy.contains("shop/worker"), "{policy}");
    // Only by its own name.
    desk.run("describe suggestion shop/db").done();
    desk.args(&["approve", "shop/db", "--rule", &id]).done();
    assert!(desk.run("describe policy shop/db").done().contains("shop/worker tcp/5432"));
}

#[test]
fn one_rule_can_be_approved_and_an_unknown_one_is_refused() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let id = rule_id(&desk, "shop/web", "shop/db", "tcp/5432");
    desk.args(&["approve", "shop/web", "--rule", &id]).done();
    let policy = desk.run("describe policy shop/web").done();
    assert!(policy.contains("shop/db tcp/5432") && !policy.contains("tcp/80"), "{policy}");
    assert!(policy.contains("ingress of shop/db is not"), "half-approved edges are listed: {policy}");
    let error = desk.run("approve shop/web --rule ffffffffffff").failed(4);
    assert!(error.contains("no rule ffffffffffff"), "{error}");
    desk.run("approve shop/web shop/db --rule ffffffffffff").failed(2);
}

#[test]
fn a_denied_attempt_is_shown_and_never_approved_with_the_whole() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let mut edges = usual();
    edges.push(denied("shop/worker", "shop/db", "tcp/5432", false, 7));
    node.saw(&desk, &edges);
    let shown = desk.run("describe suggestion shop/db").done();
    assert!(shown.contains("denied attempt"), "{shown}");
    desk.run("approve shop/db").done();
    assert!(!desk.run("describe policy shop/db").done().contains("shop/worker"));
}

#[test]
fn an_edge_is_allowed_by_hand_before_any_traffic_and_for_a_time() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    desk.run("allow shop/worker shop/db tcp/5432 --comment soon").done();
    let set = node.plan(1).set;
    assert!(set.policies[&Workload::new("shop", "worker")].egress.iter().any(|rule| rule.to_string() == "shop/db tcp/5432"));
    assert!(set.policies[&Workload::new("shop", "db")].ingress.iter().any(|rule| rule.to_string() == "shop/worker tcp/5432"));
    let said = desk.run("allow shop/worker outside:192.0.2.0/24 tcp/443 --for 6s").done();
    assert!(said.contains("until"), "{said}");
    assert!(desk.run("describe policy shop/worker").done().contains("outside:192.0.2.0/24 tcp/443 until"));
    // Over: it goes out of what is in force by itself, the other stays, and the record says so.
    let plan = node.plan(3);
    assert_eq!(plan.set.policies[&Workload::new("shop", "worker")].egress.len(), 1);
    let decisions = desk.run("get decisions -o json").json();
    assert_eq!((&decisions[2]["action"], &decisions[2]["who"]["name"]), (&"expire".into(), &"bulkhead".into()));
    desk.run("allow shop/worker nobody tcp/1").failed(4);
    desk.run("allow host: outside:192.0.2.1 tcp/1").failed(2);
}

#[test]
fn a_policy_goes_back_to_an_earlier_revision() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/db");
    let first = desk.run("get policies shop/db -o yaml").done();
    desk.run("allow shop/worker shop/db tcp/6379").done();
    assert_ne!(desk.run("get policies shop/db -o yaml").done(), first);
    desk.run("revert shop/db").done();
    assert_eq!(desk.run("get policies shop/db -o yaml").done(), first);
    desk.run("revert shop/db --to 99").failed(4);
    let said = desk.run("revert shop/worker --to 0").done();
    assert!(said.contains("shop/worker has no policy any more.") && !said.contains("in force again"), "{said}");
    let said = desk.run("revert shop/worker --to 0").done();
    assert_eq!(said.trim(), "Nothing is different.");
    desk.run("get policies shop/worker").failed(4);
    desk.run("revert shop/nobody").failed(4);
}

#[test]
fn a_policy_is_edited_as_yaml_and_a_mistake_loses_nothing() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/db");
    let with = |script: &str| {
        let mut command = desk.command();
        command.env("EDITOR", script).env("TMPDIR", desk.dir.path()).args(["edit", "shop/db"]);
        ran(&mut command)
    };
    assert!(with("true").done().contains("Unchanged"));
    with("sed -i s,tcp/5432,tcp/5433,").done();
    assert!(desk.run("describe policy shop/db").done().contains("tcp/5433"));
    let before = desk.run("get policies shop/db -o yaml").done();
    let error = with("sed -i s,tcp/5433,tcp/99999,").failed(2);
    assert!(error.contains("tcp/99999") && error.contains("Your text is kept in"), "{error}");
    let error = with("sed -i s,ingress:,ingres:,").failed(2);
    assert!(error.contains("ingres"), "{error}");
    with("false").failed(1);
    assert_eq!(desk.run("get policies shop/db -o yaml").done(), before);
}

#[test]
fn deciding_twice_is_deciding_once() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    assert!(!desk.approve("shop/db").contains("Nothing is different"));
    assert!(desk.approve("shop/db").starts_with("Nothing is different.\n"), "and what is in force is told once more");
    desk.run("quarantine shop/db").done();
    desk.run("quarantine shop/db").done();
    node.plan(2);
    assert_eq!(node.generations(), [1, 2]);
    assert_eq!(desk.run("get decisions -o json").json().as_array().unwrap().len(), 2);
}

#[test]
fn a_blocking_finding_has_to_be_accepted_by_name() {
    let desk = Desk::new();
    let _node = Node::with_shop(&desk);
    desk.run("describe suggestion shop/worker").done();
    let error = desk.run("approve shop/worker").failed(3);
    assert!(error.contains("--accept no-evidence"), "{error}");
    desk.run("approve shop/worker --accept no-evidence").done();
}

#[test]
fn somebody_without_permission_is_told_so() {
    lab::needs_root!();
    let desk = Desk::new();
    let nobody = || {
        let mut command = Command::new("setpriv");
        let program = desk.path("bulkhead");
        if !crate::desk::exists(&program) {
            lab::process::copy_program(&lab::host::binary("bulkhead"), &program);
        }
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(program).arg("status");
        command.env("BULKHEAD_RUN_DIR", desk.path("run"));
        ran(&mut command)
    };
    let open = |path: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(desk.path(path), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open("", 0o755);
    let error = nobody().failed(1);
    assert!(error.contains("no permission") && error.contains("group bulkhead"), "{error}");
    // Also where the socket's mode lets everybody in: who may speak is asked by uid.
    open("run/api.sock", 0o666);
    let error = nobody().failed(1);
    assert!(error.contains("may not speak to the controller"), "{error}");
}
