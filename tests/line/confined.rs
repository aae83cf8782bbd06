//! What the running agent and its filter may do: nothing that they don't need. Needs root and an engine.

use std::process::Stdio;
use std::time::Duration;

use lab::{Host, eventually, limit, needs_engine};

use crate::owner::agent;
use crate::{PATIENCE, descendants, server_of, status_line, supervisor};

/// CAP_NET_ADMIN (linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;

/// Capabilities and limits of every thread of a process.
fn holds(pid: i32) -> Vec<String> {
    let names = ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp"];
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let threads = tasks.filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok());
    let mut found: Vec<String> = threads
        .map(|thread| {
            let line = |name| {
                let value = status_line(thread, name);
                format!("{name} {:x}", u64::from_str_radix(&value, 16).unwrap())
            };
            names.map(line).join(", ")
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

#[test]
fn the_agent_holds_one_capability_its_filter_none_and_a_second_agent_is_told_who_is_there() {
    let _limit = limit(Duration::from_secs(120));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    host.bulkhead(["up", "-d"]);
    let agent = agent(&host).unwrap();
    let filter = descendants(supervisor(&host)).into_iter().find(|(_, words)| words.contains("engine-filter")).unwrap().0;
    let with = |set: u64| format!("CapEff {set:x}, CapPrm {set:x}, CapBnd {NET_ADMIN:x}, CapInh 0, CapAmb 0, NoNewPrivs 1, Seccomp 2");
    assert_eq!(holds(agent), [with(NET_ADMIN)]);
    // The bounding set is what a program that it starts could gain: it may start none.
    assert_eq!(holds(filter), [with(0)]);
    let (controller, _) = server_of(&host.run_dir.join("node.sock"));
    assert_eq!(status_line(agent, "Groups"), status_line(controller, "Gid").split_whitespace().next().unwrap());
    // It works all the same: it sees the engine, and nothing is missing of this kernel.
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains(" connected") && !status.contains("blind") { Ok(()) } else { Err(status) }
    });
    assert!(!host.bulkhead(["status"]).contains("not confined"));

    let other = engine.dir.join("other-agent");
    let mut second = host.command("bulkhead-agent");
    second.args(["run", "--state-dir", other.to_str().unwrap(), "--controller", host.run_dir.join("node.sock").to_str().unwrap()]);
    let told = engine.netns.output(second.stdin(Stdio::null()));
    let said = String::from_utf8_lossy(&told.stderr);
    assert_eq!(told.status.code(), Some(3), "{said}");
    assert!(said.contains(&format!("another agent (pid {agent})")), "{said}");
    host.bulkhead(["down", "--yes", "--purge"]);
}
