//! What somebody meets who starts it for the first time: an answer to each mistake that says what to do next.

use std::fs::{Permissions, create_dir, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use lab::{Netns, needs_root};

use crate::desk::{Desk, Node, Ran, ran, usual};

/// `bulkhead up -d` of programs in a folder with this mode, below one that everybody may enter, on a host of its own.
fn up(desk: &Desk, mode: u32, flags: &[&str]) -> Ran {
    let open = |path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let folder = desk.path("programs");
    create_dir(&folder).unwrap();
    for program in ["bulkhead", "bulkhead-agent"] {
        lab::process::copy_program(&lab::host::binary(program), &folder.join(program));
    }
    open(desk.path(""), 0o755);
    open(folder.clone(), mode);
    let host = Netns::new("host");
    let mut command = Command::new(folder.join("bulkhead"));
    command.env("BULKHEAD_STATE_DIR", desk.path("state")).env("BULKHEAD_RUN_DIR", desk.path("run"));
    command.args(["up", "-d"]).args(flags);
    host.run(|| ran(&mut command))
}

#[test]
fn programs_that_the_controller_may_not_start_are_told_where_to_go() {
    needs_root!();
    let error = up(&Desk::empty(), 0o700, &[]).failed(1);
    assert!(error.contains("may not start") && error.contains("/usr/local/bin"), "{error}");
}

#[test]
fn up_says_why_it_ended_instead_of_how_long_it_waited() {
    needs_root!();
    let desk = Desk::empty();
    let error = up(&desk, 0o755, &["--docker-host", "tcp://127.0.0.1:2375"]).failed(1);
    assert!(error.contains("ended before it was ready: bulkhead-agent:") && error.contains("tcp://127.0.0.1:2375"), "{error}");
    assert!(error.contains("bulkhead.log") && !error.contains("within"), "{error}");
}

#[test]
fn a_check_that_fails_ends_with_a_sentence() {
    let ran = Desk::empty().run("check --docker-host unix:///nobody/listens.sock");
    assert!(ran.out.contains("FAIL engine"), "{}", ran.out);
    assert_eq!(ran.failed(1).trim_end(), "bulkhead: not ready: something above says FAIL");
}

#[test]
fn status_says_so_while_the_engine_has_not_answered() {
    let desk = Desk::new();
    let node = Node::connect(&desk, "node1", crate::desk::shop());
    desk.until("status -o json", |status| status["nodes"].as_array().unwrap().len() == 1);
    let status = desk.run("status").done();
    assert!(status.contains("the engine has not answered") && status.contains("bulkhead check"), "{status}");
    for words in ["get workloads", "get networks", "segment list"] {
        let said = desk.run(words).err;
        assert!(said.contains("The engine has not answered yet") && said.contains("bulkhead check"), "{words}: {said}");
    }
    node.stop();
    let desk = Desk::new();
    let _node = Node::with_shop(&desk);
    let status = desk.run("status").done();
    assert!(!status.contains("has not answered"), "{status}");
}

#[test]
fn an_empty_list_says_whether_anything_is_known() {
    let desk = Desk::new();
    assert!(desk.run("get workloads").err.contains("No agent has reported yet"));
    let mut node = Node::connect(&desk, "node1", policy::Inventory::default());
    node.status = crate::desk::status();
    node.report();
    desk.until("status -o json", |status| status["nodes"][0]["status"]["version"] == "0.1.0");
    assert_eq!(desk.run("get workloads").err.trim_end(), "No workload runs.");
    let error = desk.run("get policies shop/db").failed(4);
    assert!(error.contains("There is no policy yet. `bulkhead get suggestions`"), "{error}");
}

#[test]
fn approving_several_at_once_does_not_complain_of_what_comes_next() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    for workload in ["shop/db", "shop/web", "shop/worker"] {
        desk.args(&["describe", "suggestion", workload]).done();
    }
    let said = desk.run("approve shop/db shop/web shop/worker").done();
    assert!(!said.contains("one side only"), "{said}");
    assert_eq!(said.matches("bulkhead mode shop audit").count(), 1, "{said}");
    assert_eq!(said.matches("Recorded as decision").count(), 3, "{said}");
}

#[test]
fn approving_one_says_what_waits_for_the_other_side() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let said = desk.approve("shop/db");
    assert!(said.contains("one side only") && said.contains("egress of shop/web is not"), "{said}");
}

#[test]
fn status_says_who_can_resolve_names_outside() {
    let under = |change: fn(&mut policy::inventory::Container)| {
        let desk = Desk::new();
        let mut inventory = crate::desk::shop();
        inventory.containers.values_mut().for_each(change);
        let node = Node::connect(&desk, "node1", inventory);
        node.report();
        desk.until("get workloads -o json", |found| found.as_array().unwrap().len() == 3);
        desk.run("status").done()
    };
    let from_host = under(|_| {});
    assert!(from_host.contains("from the host, where no policy applies, so every workload can resolve them"), "{from_host}");
    let by_rule = under(|container| container.resolvers = vec!["203.0.113.53".parse().unwrap()]);
    assert!(by_rule.contains("if the rule to its name server is in force") && !by_rule.contains("the host"), "{by_rule}");
    let both = under(|container| {
        if container.workload.name() == "db" {
            container.resolvers = vec!["203.0.113.53".parse().unwrap()];
        }
    });
    assert!(both.contains("is in force") && both.contains("asks from the host for it"), "{both}");
}
