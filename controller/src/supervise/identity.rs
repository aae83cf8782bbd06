//! Who the controller runs as: never root, and nobody else runs as that.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use nix::unistd::{Gid, Group, Uid, User};

use super::{SuperviseError, io_at};

/// User ids that neither distributions nor systemd give to anybody (systemd, "Users, Groups, UIDs and GIDs").
const FREE: RangeInclusive<u32> = 60_706..=61_183;

/// The user with this name, else `bulkhead`, else an id of no user's: that of the store in this folder, or one that no process has. Its
/// sockets carry the group `bulkhead`, if there is one, so that members can use the command line without root.
///
/// # Errors
/// There is no such user; the processes cannot be listed; each id is somebody's.
pub(super) fn controller(wanted: Option<&str>, store: &Path) -> Result<(Uid, Gid), SuperviseError> {
    let find = |name: &str| User::from_name(name).ok().flatten();
    let (uid, gid) = match wanted {
        Some(name) => find(name).map(|user| (user.uid, user.gid)).ok_or_else(|| SuperviseError::NoUser { name: name.to_owned() })?,
        None => match find("bulkhead") {
            Some(user) => (user.uid, user.gid),
            None => {
                let before = fs::metadata(store).ok().map(|folder| folder.uid());
                let taken = taken().map_err(io_at("list the processes"))?;
                let uid = own(before, &taken).ok_or_else(|| SuperviseError::NoUser { name: "bulkhead".to_owned() })?;
                (Uid::from_raw(uid), Gid::from_raw(uid))
            }
        },
    };
    let gid = Group::from_name("bulkhead").ok().flatten().map_or(gid, |group| group.gid);
    Ok((uid, gid))
}

/// Of ids that are in nobody's use the one of before, else the lowest.
fn own(before: Option<u32>, taken: &BTreeSet<u32>) -> Option<u32> {
    let is_free = |id: &u32| FREE.contains(id) && !taken.contains(id);
    before.filter(is_free).or_else(|| FREE.clone().find(is_free))
}

/// Ids of [`FREE`] that a process has, or a user or a group.
fn taken() -> io::Result<BTreeSet<u32>> {
    let named = |id: &u32| {
        let user = User::from_uid(Uid::from_raw(*id)).ok().flatten().is_some();
        user || Group::from_gid(Gid::from_raw(*id)).ok().flatten().is_some()
    };
    let mut taken: BTreeSet<u32> = FREE.filter(named).collect();
    for entry in fs::read_dir("/proc")? {
        // One that ended meanwhile has none.
        let Ok(status) = fs::read_to_string(entry?.path().join("status")) else { continue };
        let ids = status.lines().filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"));
        taken.extend(ids.flat_map(str::split_whitespace).filter_map(|word| word.parse::<u32>().ok()).filter(|id| FREE.contains(id)));
    }
    Ok(taken)
}

/// What whoever starts it must know of a user that is not the controller's alone.
pub(super) fn shared(uid: Uid) -> Option<&'static str> {
    let shares = User::from_uid(uid).ok().flatten().is_some_and(|user| user.name == "nobody");
    shares.then_some(
        "The controller runs as nobody: any other process of that user can read and change its store, or stand in for it. Without \
         --controller-user it runs as a user of its own.",
    )
}

/// Asks by trying: what closes a path to a user is more than its permission bits.
pub(super) fn must_be_startable(program: &Path, (uid, gid): (Uid, Gid)) -> Result<(), SuperviseError> {
    let mut probe = std::process::Command::new(program);
    probe.arg("--version").uid(uid.as_raw()).gid(gid.as_raw()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // From a place that nobody is shut out of.
    match probe.current_dir("/").status() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let user = User::from_uid(uid).ok().flatten().map_or_else(|| format!("the user id {uid}"), |user| user.name);
            Err(SuperviseError::NotForAll { program: program.to_owned(), user })
        }
        Err(error) => Err(io_at(format!("start {}", program.display()))(error)),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_before_stays_and_one_that_somebody_has_is_not_taken() {
        let taken = BTreeSet::from([60_706, 60_710]);
        assert_eq!(own(None, &taken), Some(60_707));
        assert_eq!(own(Some(60_800), &taken), Some(60_800));
        assert_eq!(own(Some(60_710), &taken), Some(60_707), "somebody runs as that by now");
        assert_eq!(own(Some(0), &taken), Some(60_707), "root made the folder");
        assert_eq!(own(Some(65_534), &taken), Some(60_707), "it was nobody's once");
        assert_eq!(own(None, &FREE.collect()), None);
    }

    #[test]
    fn who_runs_is_seen() {
        if !Uid::effective().is_root() {
            println!("skipped: to run as another user needs root");
            return;
        }
        let mut other = std::process::Command::new("sleep").arg("60").uid(61_183).gid(61_182).spawn().unwrap();
        let taken = taken().unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(taken.contains(&61_183) && taken.contains(&61_182), "{taken:?}");
    }
}
