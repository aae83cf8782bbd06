//! Bulkhead where the engine is not: from another network namespace, with `--netns` and `--docker-host`.

use std::ffi::OsStr;
use std::process::{Output, Stdio};
use std::time::Duration;

use lab::{Host, Netns, eventually, limit, needs_engine};

use crate::{PATIENCE, get, is_held, stage, traces};

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
