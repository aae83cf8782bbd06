//! Privilege, switches, room for connections, another agent.

use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::Check;

/// Capabilities the agent uses: number (linux/capability.h), name, what for.
const NEEDED: [(u8, &str, &str); 2] =
    [(12, "CAP_NET_ADMIN", "changing nftables and reading netfilter's events"), (21, "CAP_SYS_ADMIN", "entering the engine's namespace")];

/// Part of the table of connections at which `status` begins to warn.
const ALARM_PERCENT: u64 = 80;

pub(super) fn privilege() -> Check {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    judge_privilege(&status)
}

fn judge_privilege(status: &str) -> Check {
    let name = "privilege";
    let field = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = field.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or_default();
    let lacks: Vec<String> = NEEDED
        .iter()
        .filter(|(number, _, _)| effective & (1 << number) == 0)
        .map(|(_, capability, purpose)| format!("{capability} ({purpose})"))
        .collect();
    if lacks.is_empty() {
        Check::ok(name, "CAP_NET_ADMIN and CAP_SYS_ADMIN")
    } else {
        Check::fail(name, format!("lacks {}", lacks.join(" and ")), "run with sudo")
    }
}

/// Switches and room in the namespace of this thread.
pub(super) fn check() -> Vec<Check> {
    let key = |path: &str| std::fs::read_to_string(Path::new("/proc/sys").join(path)).ok().map(|text| text.trim().to_owned());
    let number = |path: &str| key(path).and_then(|text| text.parse::<u64>().ok());
    vec![
        judge_forwarding(key("net/ipv4/ip_forward").as_deref()),
        judge_global_switches(key("net/bridge/bridge-nf-call-iptables").as_deref(), key("net/bridge/bridge-nf-call-ip6tables").as_deref()),
        judge_room(number("net/netfilter/nf_conntrack_count"), number("net/netfilter/nf_conntrack_max")),
    ]
}

fn judge_forwarding(ip_forward: Option<&str>) -> Check {
    let name = "ip_forward";
    match ip_forward {
        Some("1") => Check::ok(name, "on"),
        Some(_) | None => Check::warn(
            name,
            "off: containers reach nothing outside of their own network",
            "the engine turns it on at its start, but for its nftables backend: sysctl net.ipv4.ip_forward=1",
        ),
    }
}

fn judge_global_switches(four: Option<&str>, six: Option<&str>) -> Check {
    let name = "global bridge switches";
    match (four, six) {
        // As engines leave them, and as new namespaces begin on some kernels.
        (Some("1"), _) | (_, Some("1")) => Check::ok(name, "on for every bridge, those of virtual machines too; left as they are"),
        (Some(_), _) | (_, Some(_)) => Check::ok(name, "off; each bridge of the engine gets its own"),
        (None, None) => Check::ok(name, "not there before br_netfilter is loaded"),
    }
}

fn judge_room(count: Option<u64>, limit: Option<u64>) -> Check {
    let name = "conntrack room";
    match (count, limit) {
        (Some(count), Some(limit)) if limit > 0 && count.saturating_mul(100) / limit >= ALARM_PERCENT => Check::warn(
            name,
            format!("{count} of {limit} connections in use: a full table is an outage for the whole host"),
            "raise net.netfilter.nf_conntrack_max before observing adds to it",
        ),
        (Some(count), Some(limit)) => Check::ok(name, format!("{count} of {limit} connections in use")),
        (_, _) => Check::ok(name, "nothing is tracked here yet"),
    }
}

/// Whether the lock of the agent's directory is held.
pub(super) fn second_agent(state_dir: &Path) -> Check {
    let name = "other agent";
    let path = state_dir.join("agent.lock");
    // Only opened where it is: looking must not make a directory.
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Check::ok(name, "none has run here"),
        Err(error) => return Check::warn(name, format!("cannot look at {}: {error}", path.display()), "run with sudo"),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Check::ok(name, "none runs"),
        Err(_) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            Check::warn(
                name,
                format!("an agent runs already with {} (process {})", state_dir.display(), pid.trim()),
                "`bulkhead status` shows it",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::CheckState;
    use super::*;

    #[test]
    fn what_the_privilege_lacks_is_named() {
        assert_eq!(judge_privilege("CapEff:\t000001ffffffffff\n").state, CheckState::Ok);
        let without = judge_privilege("Name: x\nCapEff:\t0000000000200000\n");
        assert_eq!(without.state, CheckState::Fail);
        assert!(without.what.contains("CAP_NET_ADMIN") && !without.what.contains("CAP_SYS_ADMIN"), "{}", without.what);
        assert_eq!(judge_privilege("").state, CheckState::Fail);
    }

    #[test]
    fn a_table_of_connections_that_is_nearly_full_is_a_warning() {
        assert_eq!(judge_room(Some(79), Some(100)).state, CheckState::Ok);
        assert_eq!(judge_room(Some(80), Some(100)).state, CheckState::Warn);
        assert_eq!(judge_room(None, None).state, CheckState::Ok);
        assert_eq!(judge_room(Some(1), Some(0)).state, CheckState::Ok);
    }

    #[test]
    fn switches_are_told_as_they_are() {
        assert!(judge_global_switches(Some("0"), Some("0")).what.contains("off"));
        assert!(judge_global_switches(Some("0"), Some("1")).what.contains("on for every bridge"));
        assert_eq!(judge_forwarding(Some("0")).state, CheckState::Warn);
        assert_eq!(judge_forwarding(Some("1")).state, CheckState::Ok);
    }

    #[test]
    fn a_lock_that_is_held_means_an_agent_runs_and_looking_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("agent");
        assert_eq!(second_agent(&state).state, CheckState::Ok);
        assert!(!state.exists());
        std::fs::create_dir(&state).unwrap();
        std::fs::write(state.join("agent.lock"), "4711\n").unwrap();
        assert_eq!(second_agent(&state).state, CheckState::Ok);
        let held = Flock::lock(std::fs::File::open(state.join("agent.lock")).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        let found = second_agent(&state);
        assert!(found.state == CheckState::Warn && found.what.contains("4711"), "{found}");
        drop(held);
    }
}
