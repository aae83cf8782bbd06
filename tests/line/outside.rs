//! Bulkhead where the engine is not: from another network namespace, with `--netns` and `--docker-host`.

use std::ffi::OsStr;
use std::process::{Output, Stdio};
use std::time::Duration;

use lab::kin::family;
use lab::{Host, Netns, eventually, limit, needs_engine};

use node_agent::agent::keep::{BEFORE, Keep};

use crate::{PATIENCE, enforce_by_hand, get, is_held, stage, supervisor, traces};

/// The machine's side, as far as `up` could touch it by mistake.
fn untouched(outside: &Netns) -> String {
    let switches = ["nf_conntrack_acct", "nf_conntrack_timestamp", "nf_conntrack_events"];
    let switches = switches.map(|name| outside.sysctl(&format!("net.netfilter.{name}")));
    format!("{}{switches:?}", outside.ruleset())
}

#[test]
fn from_outside_of_the_engines_namespace_one_edge_is_learned_and_enforced_and_undone() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let before = traces(&engine);
    let host = Host::on(&engine);
    let outside = Netns::new("outside");
    let machine = untouched(&outside);
    let docker = format!("unix://{}", engine.socket().display());
    let run = |words: &[&OsStr]| -> Output {
        outside.output(host.command("bulkhead").env_remove("DOCKER_HOST").args(words).stdin(Stdio::null()))
    };
    let bulkhead = |words: &str| -> String {
        let output = run(&words.split(' ').map(OsStr::new).collect::<Vec<_>>());
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "bulkhead {words}: {out}{err}");
        out.into_owned()
    };
    let at = |command: &str, netns: &str| bulkhead(&format!("{command} --docker-host {docker} --netns {netns}"));

    let path = engine.netns.path().display().to_string();
    let nowhere = run(&["up", "-d", "--netns", "/run/netns/nowhere"].map(OsStr::new));
    assert_eq!(nowhere.status.code(), Some(1), "{}", String::from_utf8_lossy(&nowhere.stderr));
    let checked = at("check", &path);
    assert!(!checked.contains("FAIL"), "{checked}");

    at("up -d", &path);
    bulkhead("segment add network:line --segment line");
    assert!(get(&engine, "web", db), "under Learn everything passes");
    eventually(PATIENCE, || {
        // Again: it may have begun before the observer looked.
        get(&engine, "web", db);
        let graph = bulkhead("graph -o json");
        if graph.contains("\"web\"") && graph.contains("tcp/80") { Ok(()) } else { Err(graph) }
    });
    for workload in ["web", "db"] {
        eventually(PATIENCE, || {
            let suggestion = bulkhead(&format!("describe suggestion {workload}"));
            if suggestion.contains("tcp/80") { Ok(()) } else { Err(suggestion) }
        });
        bulkhead(&format!("approve {workload}"));
    }
    bulkhead("mode line enforce --yes --deny-unlearned other");
    eventually(PATIENCE, || is_held(&engine, db));
    eventually(PATIENCE, || {
        let status = bulkhead("status");
        if status.contains("enforced") { Ok(()) } else { Err(status) }
    });
    assert_eq!(untouched(&outside), machine, "nothing is changed where it was called");

    // `down` finds the place by itself.
    bulkhead("down --yes");
    assert!(get(&engine, "other", db), "after down everything passes");
    assert_eq!(traces(&engine), before, "the engine's host is as it was");

    // The namespace named by a process in it: the plan of before is in force there again.
    at("up -d", &engine.daemon_pid().to_string());
    eventually(PATIENCE, || is_held(&engine, db));
    bulkhead("down --yes --purge");
    assert_eq!(traces(&engine), before, "the engine's host is as it was, again");
    assert_eq!(untouched(&outside), machine);
}

fn kill_all(host: &Host<'_>) {
    let top = supervisor(host);
    for (pid, _) in std::iter::once((top, String::new())).chain(family(top)) {
        // Its own supervisor's death may have ended it already.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

#[test]
fn down_in_another_namespace_than_up_changes_nothing_and_names_a_process_in_the_right_one() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let before = traces(&engine);
    let host = Host::on(&engine);
    let outside = Netns::new("outside");
    let machine = untouched(&outside);
    let down = |words: &[&str]| {
        let output = outside.output(host.command("bulkhead").args(["down", "--yes"]).args(words).stdin(Stdio::null()));
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let refused = |when: &str| {
        let (code, error) = down(&[]);
        assert_eq!(code, Some(3), "{when}: {error}");
        assert!(error.contains("not the network namespace that Bulkhead was started in") && error.contains("--netns "), "{when}: {error}");
        assert_eq!(is_held(&engine, db), Ok(()), "{when}");
        assert_eq!(untouched(&outside), machine, "{when}");
    };

    // Inside, and so without --netns.
    host.bulkhead(["up", "-d"]);
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    let (agent, top) = (crate::owner::agent(&host).unwrap(), supervisor(&host));
    refused("both live");
    assert_eq!((crate::owner::agent(&host), supervisor(&host)), (Ok(agent), top), "nobody was ended");
    assert!(!host.bulkhead(["get", "decisions"]).contains("down"), "and nothing is on the record");

    // By the agent's own number, which goes with it.
    assert_eq!(down(&["--netns", &agent.to_string()]), (Some(0), String::new()));
    assert_eq!(traces(&engine), before, "the engine's host is as it was");

    host.bulkhead(["up", "-d"]);
    eventually(PATIENCE, || is_held(&engine, db));
    kill_all(&host);
    refused("all are dead");
    assert_eq!(down(&["--netns", &engine.daemon_pid().to_string()]), (Some(0), String::new()));
    assert!(get(&engine, "other", db), "after down everything passes");
    assert_eq!(traces(&engine), before, "the engine's host is as it was, again");
    assert_eq!(untouched(&outside), machine);
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn a_plan_whose_tables_are_not_here_is_forgotten_only_where_they_should_be() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let host = Host::on(&engine);
    let outside = Netns::new("outside");
    host.bulkhead(["up", "-d"]);
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    kill_all(&host);

    // An agent of before wrote down the switches, and not where it worked.
    let agent = host.state_dir.join("agent");
    let keep = eventually(PATIENCE, || Keep::open(&agent).map_err(|e| e.to_string()));
    let mut kept: serde_json::Value = keep.load(BEFORE).unwrap().unwrap();
    assert!(kept.as_object_mut().unwrap().remove("place").is_some(), "{kept}");
    keep.save(BEFORE, &kept).unwrap();
    drop(keep);
    let output = outside.output(host.command("bulkhead").args(["down", "--yes"]).stdin(Stdio::null()));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("none of its tables is in this network namespace") && error.contains("--netns PATH|PID"), "{error}");
    assert!(agent.join("plan.1").exists() && agent.join("before.1").exists(), "nothing is forgotten");
    assert_eq!(is_held(&engine, db), Ok(()));

    // An agent of now says where; then it is known that there is nothing left.
    host.bulkhead(["up", "-d"]);
    eventually(PATIENCE, || host.is_in_force());
    kill_all(&host);
    eventually(PATIENCE, || Keep::open(&agent).map(drop).map_err(|e| e.to_string()));
    // The supervisor's copy of the socket that owns them may go a moment later.
    eventually(PATIENCE, || {
        engine.netns.check(std::process::Command::new("nft").args(["flush", "ruleset"]));
        let left = engine.netns.check(std::process::Command::new("nft").args(["list", "ruleset"]));
        if left.contains("bulkhead") { Err(left) } else { Ok(()) }
    });
    let said = host.bulkhead(["down", "--yes"]);
    assert!(said.contains("no table of the stored plan was here"), "{said}");
    assert!(!agent.join("plan.1").exists());
}
