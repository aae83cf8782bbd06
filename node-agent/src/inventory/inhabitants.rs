//! Which container's processes are in a network namespace: by their control groups, which the engine's runtime sets up before anything
//! of the container runs. Reads /proc/PID/cgroup, for which nobody needs a privilege; enters nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use std::{fs, io};

use super::namespace::Asker;

/// A process is in the namespace where it stays long before this.
const YOUNG: Duration = Duration::from_secs(10);
/// Characters of a container's id.
const ID: usize = 64;

/// Processes that were made lately. On a host with thousands only those are asked about.
#[derive(Debug)]
pub(super) struct Inhabitants {
    old: BTreeSet<u32>,
    /// Since when we know of it, and its namespace once it has one that has an id here.
    young: BTreeMap<u32, (Instant, Option<i32>)>,
}

impl Inhabitants {
    /// Those that are there by now are of containers that the engine tells of.
    pub(super) fn new() -> Self {
        Self { old: processes().unwrap_or_default(), young: BTreeMap::new() }
    }

    /// The containers of processes in these namespaces, by what is so now: of new processes, and of these older ones, which were in such
    /// a namespace once. Where two containers have processes in one, both.
    ///
    /// # Errors
    /// The processes can't be listed, or the kernel can't be asked.
    pub(super) fn of(&mut self, namespaces: &BTreeSet<i32>, older: &[u32]) -> io::Result<BTreeMap<i32, BTreeSet<String>>> {
        let (there, now) = (processes()?, Instant::now());
        self.old.retain(|pid| there.contains(pid));
        self.young.retain(|pid, _| there.contains(pid));
        for pid in there.difference(&self.old) {
            self.young.entry(*pid).or_insert((now, None));
        }
        let mut asker = Asker::new()?;
        for (&pid, (_, namespace)) in self.young.iter_mut().filter(|(_, (_, namespace))| namespace.is_none()) {
            // It may have ended meanwhile.
            *namespace = asker.of_process(pid).ok().flatten();
        }
        let inside = self.young.iter().filter(|(_, (_, namespace))| namespace.is_some_and(|id| namespaces.contains(&id)));
        let mut found: BTreeMap<i32, BTreeSet<String>> = BTreeMap::new();
        for pid in inside.map(|(pid, _)| *pid).chain(older.iter().copied()) {
            let container = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok().and_then(|text| container(&text));
            // Asked behind it: its number may have gone to another process.
            let namespace = asker.of_process(pid).ok().flatten().filter(|id| namespaces.contains(id));
            if let Some((namespace, container)) = namespace.zip(container) {
                found.entry(namespace).or_default().insert(container);
            }
        }
        let grown = self.young.extract_if(.., |_, (since, _)| now.duration_since(*since) >= YOUNG);
        self.old.extend(grown.map(|(pid, _)| pid));
        Ok(found)
    }
}

fn processes() -> io::Result<BTreeSet<u32>> {
    let pid = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    Ok(fs::read_dir("/proc")?.filter_map(pid).collect())
}

/// The container of a process by its /proc/PID/cgroup (cgroups(7)): the outermost group that is named after one, since what lies below
/// may be the container's own doing. `None`: of none, or two hierarchies disagree.
pub(super) fn container(cgroup: &str) -> Option<String> {
    // 0::/system.slice/docker-4f….scope or 7:memory:/docker/4f…
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut named: BTreeSet<&str> = paths.filter_map(|path| path.split('/').find_map(id)).collect();
    let first = named.pop_first()?;
    named.is_empty().then(|| first.to_owned())
}

/// `4f…`, `docker-4f….scope`.
fn id(group: &str) -> Option<&str> {
    let hexadecimal = |part: &&str| part.len() == ID && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    group.split(['-', '.']).find(hexadecimal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_its_outermost_containers() {
        let (a, b) = ("a".repeat(ID), "b".repeat(ID));
        for (what, text, is) in [
            ("version 2, systemd", format!("0::/system.slice/docker-{a}.scope\n"), Some(&a)),
            ("version 2, cgroupfs", format!("0::/docker/{a}\n"), Some(&a)),
            ("version 1", format!("2:memory:/docker/{a}\n1:name=systemd:/docker/{a}\n0::/\n"), Some(&a)),
            ("a group below, named after another", format!("0::/docker/{a}/docker/{b}\n"), Some(&a)),
            ("a parent of one's choice", format!("0::/mine.slice/mine-db.slice/docker-{a}.scope\n"), Some(&a)),
            ("hierarchies disagree", format!("2:memory:/docker/{a}\n1:cpu:/docker/{b}\n"), None),
            ("no container", "0::/system.slice/ssh.service\n".to_owned(), None),
            ("shorter", format!("0::/docker/{}\n", &a[1..]), None),
            ("longer", format!("0::/docker/{a}a\n"), None),
            ("nothing", String::new(), None),
        ] {
            assert_eq!(container(&text).as_ref(), is, "{what}");
        }
    }

    #[test]
    fn any_text_is_a_container_or_none() {
        for text in [":", "::", "0::", "0::///", "\n\n", "0::/docker/\u{e9}", "-.-.-"] {
            assert_eq!(container(text), None, "{text:?}");
        }
    }
}
