//! The thin line, end to end with a real engine and both of our processes: one edge observed, learned, approved, enforced; a second
//! one denied; all of it undone. Needs root and an engine.

#![allow(clippy::unwrap_used, reason = "everything here is a test")]

mod confined;
mod firewall;
mod installed;
mod offload;
mod outside;
mod owner;

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use lab::kin::family;
use lab::{Engine, Host, eventually, limit, needs_engine};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

/// What `down` has to leave as it was.
fn traces(engine: &Engine) -> String {
    let switches = "cd /proc/sys/net && for f in netfilter/nf_conntrack_acct netfilter/nf_conntrack_timestamp netfilter/nf_conntrack_events bridge/bridge-nf-call-*; \
                    do [ -e $f ] && echo $f $(cat $f); done; ip -d -o link | grep -o 'br-line.*nf_call_iptables [01] nf_call_ip6tables [01]' | sed 's/ether.*nf_call_ip/nf_call_ip/'";
    let switches = engine.netns.check(Command::new("sh").args(["-c", switches]));
    let counters = |line: &str| line.split(" counter packets").next().unwrap_or_default().to_owned();
    let rules: Vec<_> = engine.netns.ruleset().lines().map(counters).collect();
    format!("{}\n{switches}\n{}", rules.join("\n"), engine.netns.ip("-o link"))
}

fn json(host: &Host<'_>, words: &[&str]) -> Value {
    let out = host.bulkhead(words.iter().chain(&["-o", "json"]));
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("bulkhead {words:?} printed no JSON ({e}): {out}"))
}

/// `wget` from one container to a port of another, waiting at most two seconds.
fn get(engine: &Engine, from: &str, to: SocketAddr) -> bool {
    engine.exec(from, ["timeout", "2", "wget", "-q", "-O", "-", &format!("http://{to}/")]).status.success()
}

/// Three containers on one network; `db` serves tcp/80 and is reached by `web`.
fn stage(engine: &Engine) -> SocketAddr {
    engine.import_busybox("line:1");
    engine.docker(["network", "create", "-o", "com.docker.network.bridge.name=br-line", "line"]);
    for name in ["web", "other"] {
        engine.docker(["run", "-d", "--name", name, "--network", "line", "line:1"]);
    }
    engine.docker(["run", "-d", "--name", "db", "--network", "line", "line:1", "httpd", "-f", "-p", "80", "-h", "/www"]);
    let db = SocketAddr::new(engine.address("db", "line"), 80);
    eventually(PATIENCE, || if get(engine, "web", db) { Ok(()) } else { Err("db does not serve yet") });
    db
}

/// Web may reach db on tcp/80 and that is all; done by hand, so that nothing has to be learned first.
fn enforce_by_hand(host: &Host<'_>) {
    host.bulkhead(["segment", "add", "network:line", "--segment", "line"]);
    eventually(PATIENCE, || {
        let workloads = host.bulkhead(["get", "workloads"]);
        if ["web", "db", "other"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    host.bulkhead(["allow", "web", "db", "tcp/80"]);
    host.bulkhead(["mode", "line", "enforce", "--yes", "--deny-unlearned", "other"]);
}

fn is_held(engine: &Engine, db: SocketAddr) -> Result<(), String> {
    match (get(engine, "web", db), get(engine, "other", db)) {
        (true, false) => Ok(()),
        (web, other) => Err(format!("web reaches db: {web}; other reaches db: {other}")),
    }
}

/// The process that serves a socket: (pid, uid), as the kernel says.
fn server_of(socket: &std::path::Path) -> (i32, u32) {
    let stream = UnixStream::connect(socket).unwrap();
    let peer = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials).unwrap();
    (peer.pid(), peer.uid())
}

fn status_line(pid: i32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn kill_9(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn supervisor(host: &Host<'_>) -> i32 {
    std::fs::read_to_string(host.state_dir.join("agent/up.pid")).unwrap().trim().parse().unwrap()
}

#[test]
fn detached_the_controller_has_no_privilege_and_a_killed_agent_opens_nothing() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let host = Host::on(&engine);
    host.bulkhead(["up", "-d"]);
    let again = host.try_bulkhead(["up", "-d"]);
    assert_eq!(again.status.code(), Some(3), "a second up is told that one runs: {}", String::from_utf8_lossy(&again.stderr));

    let (controller, uid) = server_of(&host.run_dir.join("api.sock"));
    assert_ne!(uid, 0, "the controller is not root");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status_line(controller, set), 16), Ok(0), "{set}");
    }
    assert_eq!(status_line(controller, "Groups"), "", "no group of root's is left");

    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    // Whoever is killed: never open, and what is allowed stays allowed.
    for victim in ["bulkhead-agent run", "bulkhead controller"] {
        let before = family(supervisor(&host));
        let (pid, _) = before.iter().find(|(_, words)| words.contains(victim)).unwrap_or_else(|| panic!("no {victim}: {before:?}"));
        kill_9(*pid);
        for _ in 0..10 {
            assert_eq!(is_held(&engine, db), Ok(()), "after the end of {victim}");
        }
        eventually(PATIENCE, || {
            let back = family(supervisor(&host)).iter().any(|(new, words)| new != pid && words.contains(victim));
            if back { Ok(()) } else { Err(format!("{victim} is not started again")) }
        });
    }
    // The agent that came back binds a container that comes now, and takes orders.
    eventually(PATIENCE, || host.is_in_force());
    engine.docker(["restart", "-t", "0", "web"]);
    eventually(PATIENCE, || is_held(&engine, db));
    // Nor does anybody call enforced for long what is so no more: the agent tells at once, not with its next pulse. Of several times, since
    // a busy machine may look late.
    let at_once = (0..5).filter(|_| {
        host.bulkhead(["mode", "line", "enforce", "--yes", "--deny-unlearned", "other"]);
        eventually(PATIENCE, || {
            let networks = host.bulkhead(["get", "networks"]);
            if networks.contains("enforced") { Ok(()) } else { Err(networks) }
        });
        host.bulkhead(["mode", "line", "learn"]);
        let end = Instant::now() + Duration::from_millis(300);
        loop {
            let gone = !host.bulkhead(["get", "networks"]).contains("enforced");
            if gone || Instant::now() > end {
                break gone;
            }
        }
    });
    let at_once = at_once.count();
    assert!(at_once >= 3, "told at once {at_once} times of 5");
    eventually(PATIENCE, || {
        let networks = host.bulkhead(["get", "networks"]);
        if networks.contains("enforced") { Err(networks) } else { Ok(()) }
    });
    eventually(PATIENCE, || if get(&engine, "other", db) { Ok(()) } else { Err("under Learn everything passes") });
    host.bulkhead(["down", "--yes", "--purge"]);
    assert!(!host.state_dir.exists() && !host.run_dir.exists(), "purged");
}

#[test]
fn who_runs_as_the_user_that_up_gave_the_controller_decides_nothing_and_up_names_what_they_can() {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let said = host.bulkhead(["up", "-d", "--controller-user", "nobody"]);
    assert!(said.contains("The controller runs as nobody") && said.contains("--controller-user"), "{said}");
    host.bulkhead(["segment", "add", "network:line", "--segment", "line"]);
    let before = json(&host, &["get", "segments"]);
    let api = host.run_dir.join("api.sock");
    let (_, uid) = server_of(&api);
    let neighbour = |words: &[&str]| {
        let bulkhead = host.command("bulkhead");
        let mut command = Command::new("setpriv");
        // With the group of the socket: it lets in whoever may open it, and the controller looks again.
        let group = std::fs::metadata(&api).unwrap().gid();
        command.args(["--reuid", &uid.to_string(), "--regid", "65534", "--groups", &group.to_string()]);
        command.arg(bulkhead.get_program()).args(words);
        command.envs(bulkhead.get_envs().filter_map(|(name, value)| Some((name, value?))));
        engine.netns.output(&mut command)
    };
    for words in [&["mode", "line", "audit"][..], &["segment", "remove", "network:line", "--segment", "line"], &["status"]] {
        let output = neighbour(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains("nobody (uid 65534) may not speak to the controller"), "{words:?}: {error}");
    }
    assert_eq!(json(&host, &["get", "segments"]), before);
    host.bulkhead(["mode", "line", "audit"]);
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn without_a_user_of_its_name_the_controller_runs_as_one_that_nobody_is_and_keeps_it() {
    let _limit = limit(Duration::from_secs(300));
    if nix::unistd::User::from_name("bulkhead").unwrap().is_some() {
        println!("skipped: this machine has a user bulkhead");
        return;
    }
    let engine = needs_engine!();
    let host = Host::on(&engine);
    let said = host.bulkhead(["up", "-d"]);
    assert!(!said.contains("The controller runs as nobody"), "{said}");
    let (_, uid) = server_of(&host.run_dir.join("api.sock"));
    assert!((60_706..=61_183).contains(&uid), "{uid}");
    let store = host.state_dir.join("controller/store.db");
    assert_eq!(std::fs::metadata(&store).unwrap().uid(), uid);
    // As whatever else runs on a host without a user of its own.
    let mut stranger = Command::new("setpriv");
    stranger.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c"]);
    stranger.arg(format!("cat {store:?} || ls {:?} || rm {:?}", store.parent().unwrap(), host.run_dir.join("node.sock")));
    assert!(!engine.netns.output(&mut stranger).status.success());
    // Another test's controller may get the id in the moment when this one has none.
    let mut last = uid;
    let kept = (0..4).any(|_| {
        host.bulkhead(["down", "--yes"]);
        host.bulkhead(["up", "-d"]);
        let before = std::mem::replace(&mut last, server_of(&host.run_dir.join("api.sock")).1);
        before == last
    });
    assert!(kept, "another one each time");
    assert_eq!(std::fs::metadata(&store).unwrap().uid(), last);
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn up_says_what_the_store_puts_in_force_again() {
    let _limit = limit(Duration::from_secs(300));
    let engine = needs_engine!();
    stage(&engine);
    let host = Host::on(&engine);
    let said = host.bulkhead(["up", "-d"]);
    assert!(said.contains("Nothing is denied that was not denied before."), "{said}");
    enforce_by_hand(&host);
    host.bulkhead(["quarantine", "other"]);
    host.bulkhead(["down", "--yes"]);
    let said = host.bulkhead(["up", "-d"]);
    assert!(said.contains("In force again from the store: line (Enforce), other (quarantine)."), "{said}");
    assert!(!said.contains("Nothing is denied"), "{said}");
    host.bulkhead(["down", "--yes", "--purge"]);
}

#[test]
fn what_an_administrator_flushes_or_switches_off_opens_nothing() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let host = Host::on(&engine);
    let mut up = host.up();
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));
    let closed_to_the_host = |what: &str| assert!(!engine.netns.tcp(db).is_open(), "host -> db has no rule, {what}");
    closed_to_the_host("at first");
    let deeds = [
        "nft flush ruleset",
        "iptables -F; iptables -t nat -F",
        "conntrack -F",
        "ip link set br-line type bridge nf_call_iptables 0",
        "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables; ip link set br-line type bridge nf_call_iptables 0",
    ];
    for deed in deeds {
        engine.netns.check(Command::new("sh").args(["-c", &format!("{deed} 2>/dev/null; true")]));
        assert!(!get(&engine, "other", db), "right after: {deed}");
        closed_to_the_host(deed);
        eventually(PATIENCE, || is_held(&engine, db).map_err(|held| format!("after {deed}: {held}")));
    }
    host.bulkhead(["down", "--yes"]);
    assert!(up.wait(PATIENCE).is_some());
}

#[test]
fn down_works_with_everything_dead_and_is_recorded() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let before = traces(&engine);
    let host = Host::on(&engine);
    let nobody = host.try_bulkhead(["down"]);
    assert_eq!(nobody.status.code(), Some(3), "without a terminal there is nobody to ask: {}", String::from_utf8_lossy(&nobody.stderr));
    let mut up = host.up();
    enforce_by_hand(&host);
    eventually(PATIENCE, || is_held(&engine, db));

    let top = supervisor(&host);
    let below = family(top);
    kill_9(top);
    for (pid, _) in below {
        // Its own supervisor's death may have ended it already.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    assert!(up.wait(PATIENCE).is_some());
    assert_eq!(is_held(&engine, db), Ok(()), "nobody lives, everything holds");

    let said = host.bulkhead(["down", "--yes", "--comment", "handover"]);
    assert!(said.contains("line"), "the segment that loses protection is named: {said}");
    assert!(get(&engine, "other", db), "after down everything passes");
    assert_eq!(traces(&engine), before, "the host is as it was");

    let mut up = host.up();
    let record = host.bulkhead(["get", "decisions", "-o", "json"]);
    assert!(record.contains("handover"), "the decision is in the record: {record}");
    eventually(PATIENCE, || is_held(&engine, db));
    host.bulkhead(["down", "--yes"]);
    assert!(up.wait(PATIENCE).is_some());
    assert_eq!(traces(&engine), before, "the host is as it was, again");
}

#[test]
fn one_edge_is_learned_approved_and_enforced_a_second_is_denied_and_all_of_it_is_undone() {
    let _limit = limit(Duration::from_secs(180));
    let engine = needs_engine!();
    let db = stage(&engine);
    let before = traces(&engine);

    let host = Host::on(&engine);
    let mut up = host.up();

    // Learn: one call, one edge, one rule on each side.
    host.bulkhead(["segment", "add", "network:line", "--segment", "line"]);
    assert!(get(&engine, "web", db), "under Learn everything passes");
    eventually(PATIENCE, || {
        // Again, since the first may have come before anybody looked.
        get(&engine, "web", db);
        let graph = host.bulkhead(["graph", "-o", "json"]);
        if graph.contains("\"web\"") && graph.contains("tcp/80") { Ok(()) } else { Err(graph) }
    });
    eventually(PATIENCE, || {
        let suggestion = host.bulkhead(["describe", "suggestion", "db"]);
        if suggestion.contains("tcp/80") { Ok(()) } else { Err(suggestion) }
    });
    host.bulkhead(["describe", "suggestion", "web"]);

    // Nothing is enforced that nobody approved.
    let refused = host.try_bulkhead(["mode", "line", "enforce", "--yes"]);
    assert_eq!(refused.status.code(), Some(3), "{}", String::from_utf8_lossy(&refused.stderr));
    assert!(get(&engine, "other", db), "still under Learn");
    // That made a second edge of what only we did. What was read is what is approved, so it is to be there first.
    eventually(PATIENCE, || {
        let suggestion = host.bulkhead(["describe", "suggestion", "db"]);
        if suggestion.contains("other") { Ok(()) } else { Err(suggestion) }
    });
    let approve = |name: &str| {
        let suggestion = json(&host, &["describe", "suggestion", name]);
        let rules = suggestion["rules"].as_array().or(suggestion["suggestion"]["rules"].as_array()).cloned().unwrap_or_default();
        let about_web = |rule: &&Value| name == "web" || rule["rule"]["peer"] == "web";
        let ids: Vec<String> = rules.iter().filter(about_web).filter_map(|rule| rule["id"].as_str().map(str::to_owned)).collect();
        assert!(!ids.is_empty(), "{suggestion}");
        let mut words = vec!["approve".to_owned(), name.to_owned()];
        words.extend(ids.into_iter().flat_map(|id| ["--rule".to_owned(), id]));
        host.bulkhead(&words)
    };
    approve("web");
    approve("db");

    // Enforce: the one edge passes, the other doesn't, at once and with a reason.
    host.bulkhead(["mode", "line", "enforce", "--yes", "--deny-unlearned", "other"]);
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("Enforced") || status.contains("enforced") { Ok(()) } else { Err(status) }
    });
    assert!(get(&engine, "web", db), "what was approved passes");
    assert!(!get(&engine, "other", db), "what was not approved is denied");
    assert!(get(&engine, "web", db), "what was approved still passes");
    let flows = eventually(PATIENCE, || {
        let flows = host.bulkhead(["flows", "--verdict", "deny", "-o", "json"]);
        if flows.contains("other") { Ok(flows) } else { Err(flows) }
    });
    assert!(flows.contains("reason"), "{flows}");
    let explained = host.bulkhead(["explain", "other", "db", "tcp/80"]);
    assert!(explained.to_lowercase().contains("deny") || explained.to_lowercase().contains("denied"), "{explained}");

    // Undone: as it was.
    host.bulkhead(["down", "--yes"]);
    assert!(up.wait(PATIENCE).is_some(), "down ends up");
    assert!(get(&engine, "other", db), "after down everything passes");
    assert_eq!(traces(&engine), before, "the host is as it was");
}
