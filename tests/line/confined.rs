//! What the running agent and its filter may do: nothing that they don't need. Needs root and an engine.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use lab::kin::family;
use lab::{Host, eventually, limit, needs_engine};

use crate::owner::agent;
use crate::{PATIENCE, server_of, status_line, supervisor};

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

/// The process before the engine's socket.
fn filter(host: &Host<'_>) -> i32 {
    family(supervisor(host)).into_iter().find(|(_, words)| words.contains("engine-filter")).unwrap().0
}

#[test]
fn the_agent_holds_one_capability_its_filter_none_and_a_second_agent_is_told_who_is_there() {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    host.bulkhead(["up", "-d"]);
    let agent = agent(&host).unwrap();
    let filter = filter(&host);
    let with = |set: u64| format!("CapEff {set:x}, CapPrm {set:x}, CapBnd {NET_ADMIN:x}, CapInh 0, CapAmb 0, NoNewPrivs 1, Seccomp 2");
    assert_eq!(holds(agent), [with(NET_ADMIN)]);
    // The bounding set is what a program that it starts could gain: it may start none.
    assert_eq!(holds(filter), [with(0)]);
    let (controller, _) = server_of(&host.run_dir.join("node.sock"));
    assert_eq!(status_line(agent, "Groups"), status_line(controller, "Gid").split_whitespace().next().unwrap());
    // It works all the same: it sees the engine, and nothing is missing of this kernel.
    eventually(PATIENCE, || host.is_connected(|status| !status.contains("blind")));
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

/// Threads of a process by name, each with its `nice` (proc_pid_stat(5), field 19).
fn priorities(pid: i32) -> BTreeSet<(String, i32)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    let read = |stat: String| {
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(')').unwrap();
        (name.to_owned(), rest.split_whitespace().nth(16).unwrap().parse().unwrap())
    };
    stats.map(read).collect()
}

#[test]
fn what_a_container_that_joins_waits_for_goes_first_and_what_learns_waits_as_all_do() {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    host.bulkhead(["up", "-d"]);
    let agent = agent(&host).unwrap();
    let filter = filter(&host);
    let learns = |name: &str| name.starts_with("observe-") || name == "spool";
    eventually(PATIENCE, || {
        let threads = priorities(agent);
        let as_meant = threads.iter().all(|(name, nice)| *nice == if learns(name) { 0 } else { -15 });
        let learn = threads.iter().filter(|(name, _)| learns(name)).count();
        if as_meant && learn == 3 { Ok(()) } else { Err(format!("{threads:?}")) }
    });
    assert!(priorities(filter).iter().all(|(_, nice)| *nice == -15), "the engine's answers come by the filter");
    let spared = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    // A root without CAP_SYS_RESOURCE, as in many a sandbox, may not.
    let mut tried = Command::new("sh");
    let may = tried.args(["-c", "echo -500 > /proc/self/oom_score_adj"]).stderr(Stdio::null()).status().unwrap().success();
    let expected = if may { "-500".to_owned() } else { std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim().to_owned() };
    assert_eq!([spared(agent), spared(filter)], [expected.clone(), expected]);
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn an_agent_that_may_not_go_first_says_so_and_works_all_the_same() {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-sys_nice,-sys_resource"]).arg(host.program("bulkhead"));
    let alike = host.command("bulkhead");
    command.envs(alike.get_envs().filter_map(|(name, value)| Some((name, value?)))).args(alike.get_args()).args(["up", "-d"]);
    engine.netns.check(&mut command);
    let threads = priorities(agent(&host).unwrap());
    assert!(threads.iter().all(|(_, nice)| *nice == 0), "{threads:?}");
    let log = std::fs::read_to_string(host.state_dir.join("bulkhead.log")).unwrap_or_default();
    assert!(log.contains("runs at the ordinary priority") && log.contains("is not spared"), "{log}");
    eventually(PATIENCE, || host.is_connected(|status| !status.contains("blind")));
    host.bulkhead(["down", "--yes", "--purge"]);
}
