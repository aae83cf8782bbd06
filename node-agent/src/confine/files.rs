//! Which files a process may use (landlock, since kernel 5.13), and where it may connect to over TCP: the agent nowhere.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

use super::{Agent, ConfineError};

/// What is known of; an older kernel limits less. Connecting to a Unix socket by its path is not among it: what a socket lets in is
/// decided by its mode and by who listens.
const KNOWN: ABI = ABI::V6;

/// Folders of which the agent reads files that others replace, so that only the folder can be named: the host's resolvers and the
/// engine's configuration.
const READ: [&str; 4] = ["/proc", "/etc", "/run/systemd/resolve", "/run/resolvconf"];

fn ruleset() -> Result<RulesetCreated, ConfineError> {
    let handled = Ruleset::default().handle_access(AccessFs::from_all(KNOWN))?.handle_access(AccessNet::from_all(KNOWN))?;
    Ok(handled.scope(Scope::Signal)?.create()?)
}

fn read() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

/// Allows this below a path; one that isn't there needs no rule.
fn allow(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, ConfineError> {
    let Ok(fd) = PathFd::new(path) else { return Ok(ruleset) };
    // Rights of a folder mean nothing for a file.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
    Ok(ruleset.add_rule(PathBeneath::new(fd, access))?)
}

/// What this program is loaded from: itself, the loader, and the folders of its libraries. The filter is started from it again.
struct Loaded {
    run: Vec<PathBuf>,
    libraries: Vec<PathBuf>,
}

fn loaded() -> io::Result<Loaded> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut loaded = Loaded { run: vec!["/proc/self/exe".into()], libraries: Vec::new() };
    // Address, rights, offset, device, inode, path (proc_pid_maps(5)).
    for path in maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5)).map(Path::new).filter(|path| path.is_absolute()) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // ld-linux-x86-64.so.2, ld-musl-aarch64.so.1
        if name.starts_with("ld-") || name.starts_with("ld.so") {
            loaded.run.push(path.to_owned());
        }
        if name.contains(".so") {
            loaded.libraries.extend(path.parent().map(Path::to_owned));
        }
    }
    for list in [&mut loaded.run, &mut loaded.libraries] {
        list.sort();
        list.dedup();
    }
    Ok(loaded)
}

pub(super) fn agent(needs: &Agent) -> Result<Option<String>, ConfineError> {
    let mut ruleset = ruleset()?;
    for folder in READ {
        ruleset = allow(ruleset, Path::new(folder), read())?;
    }
    for root in &needs.engine_roots {
        ruleset = allow(ruleset, &root.join("containers"), read())?;
    }
    ruleset = allow(ruleset, &needs.state_dir, AccessFs::from_all(KNOWN) & !AccessFs::Execute)?;
    // No other sysctl: some of them, as the pattern of core dumps, are the host's root for whoever may write them.
    let sysctls = Path::new("/proc/sys/net");
    ruleset = allow(ruleset, sysctls, read() | AccessFs::WriteFile | AccessFs::Truncate)?;
    // The kernel makes the folder's inode anew when nobody uses it, and the rule is the inode's: it stays in use.
    std::mem::forget(File::open(sysctls));
    for device in ["/dev/null", "/dev/urandom"] {
        ruleset = allow(ruleset, Path::new(device), AccessFs::ReadFile | AccessFs::WriteFile)?;
    }
    let loaded = loaded().map_err(|source| ConfineError::Missing { what: "/proc/self/maps", source })?;
    for program in &loaded.run {
        ruleset = allow(ruleset, program, AccessFs::Execute | AccessFs::ReadFile)?;
    }
    for folder in &loaded.libraries {
        ruleset = allow(ruleset, folder, read())?;
    }
    if let Some(port) = needs.metrics {
        ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::BindTcp))?;
    }
    restrict(ruleset)
}

pub(super) fn filter(folder: &Path) -> Result<Option<String>, ConfineError> {
    let own = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
    restrict(allow(ruleset()?, folder, own)?)
}

fn restrict(ruleset: RulesetCreated) -> Result<Option<String>, ConfineError> {
    Ok(said(ruleset.restrict_self()?.ruleset))
}

/// What a person should know of how far the kernel went.
fn said(status: RulesetStatus) -> Option<String> {
    match status {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => {
            Some("this kernel's landlock is older than the agent: TCP connections or signals of the agent are not limited".to_owned())
        }
        RulesetStatus::NotEnforced => {
            Some("this kernel has no landlock, or it is off (lsm=): the agent's files are limited by its user alone".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_limits_less_is_told() {
        assert_eq!(said(RulesetStatus::FullyEnforced), None);
        assert!(said(RulesetStatus::PartiallyEnforced).unwrap().contains("older"));
        assert!(said(RulesetStatus::NotEnforced).unwrap().contains("no landlock"));
    }

    #[test]
    fn the_program_and_its_loader_are_found() {
        let loaded = loaded().unwrap();
        assert!(loaded.run.len() >= 2, "{:?}", loaded.run);
        assert!(loaded.run.iter().chain(&loaded.libraries).all(|path| path.exists()));
    }
}
