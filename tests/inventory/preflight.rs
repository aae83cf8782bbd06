//! What `bulkhead check` says of real hosts, and that looking leaves no trace.

use std::path::Path;

use lab::{Engine, Netns};
use node_agent::preflight::{self, Check, CheckState, Options};

use crate::on_every_engine;

fn checked(netns: &Netns, docker_host: &str, state_dir: &Path) -> Vec<Check> {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(preflight::check(Options { docker_host: Some(docker_host.to_owned()), state_dir: state_dir.to_owned() }))
    })
}

fn found<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("{name} in {checks:#?}"))
}

#[test]
fn a_host_that_lacks_nothing_passes_and_is_left_as_it_was() {
    on_every_engine!(|engine: Engine| {
        let state = engine.dir.join("agent");
        let picture = || {
            let links = engine.netns.ip("-br link show");
            (engine.netns.ruleset(), links, engine.netns.sysctl("net.bridge.bridge-nf-call-iptables"))
        };
        let before = picture();
        let checks = checked(&engine.netns, &engine.docker_host(), &state);
        for check in &checks {
            println!("{check}");
        }
        assert!(checks.iter().all(|check| !check.fails()), "{checks:#?}");
        for name in [
            "privilege",
            "bridge",
            "nftables",
            "br_netfilter",
            "conntrack",
            "ip_forward",
            "engine",
            "user-land proxy",
            "subnets",
            "other agent",
        ] {
            assert_eq!(found(&checks, name).state, CheckState::Ok, "{name}");
        }
        assert_eq!(picture(), before);
        assert!(!state.exists());
    });
}

#[test]
fn an_engine_that_is_not_there_fails_with_what_to_do() {
    lab::needs_root!();
    let netns = Netns::new("bare");
    let dir = tempfile::tempdir().unwrap();
    let checks = checked(&netns, &format!("unix://{}/nobody.sock", dir.path().display()), dir.path());
    let engine = found(&checks, "engine");
    assert!(engine.fails() && engine.what.contains("nobody.sock") && !engine.remedy.is_empty(), "{engine}");
    let elsewhere = checked(&netns, "tcp://192.0.2.1:2375", dir.path());
    assert!(found(&elsewhere, "engine").what.contains("tcp://192.0.2.1:2375"));
}

#[test]
fn somebody_elses_rules_in_our_place_are_told() {
    lab::needs_root!();
    let netns = Netns::new("crowded");
    netns.nft("table inet mine {\nchain ahead {\ntype filter hook forward priority -10;\n}\n}");
    netns.nft("table bridge theirs {\nchain ahead {\ntype filter hook forward priority 0;\n}\n}");
    netns.nft("table inet bulkhead { }");
    netns.nft("table inet firewalld { }");
    let dir = tempfile::tempdir().unwrap();
    let checks = checked(&netns, "unix:///nowhere.sock", dir.path());
    let told: Vec<&str> = checks.iter().filter(|c| c.name == "other rules").map(|c| c.what.as_str()).collect();
    for words in
        ["chain inet mine ahead (hook forward, priority -10)", "chain bridge theirs ahead", "table inet bulkhead was left", "firewalld"]
    {
        assert!(told.iter().any(|what| what.contains(words)), "{words}: {told:#?}");
    }
}

#[test]
fn without_privilege_it_says_so_and_still_ends() {
    lab::needs_root!();
    // On a thread of its own, whose capabilities are given up for good.
    let checks = std::thread::spawn(|| {
        let nobody = nix::unistd::Uid::from_raw(65534);
        // The system call itself changes one thread; the C library's wrapper would change them all.
        let changed = unprivileged(nobody);
        assert!(changed, "setresuid");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(preflight::check(Options { docker_host: Some("unix:///nowhere.sock".to_owned()), state_dir: "/nowhere".into() }))
    })
    .join()
    .unwrap();
    for name in ["kernel", "engine"] {
        assert!(found(&checks, name).fails(), "{checks:#?}");
    }
}

/// Makes this thread, and no other, somebody without rights.
#[allow(unsafe_code)]
fn unprivileged(uid: nix::unistd::Uid) -> bool {
    // SAFETY: setresuid takes three numbers and touches no memory.
    unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, uid.as_raw(), uid.as_raw(), uid.as_raw()) == 0 }
}
