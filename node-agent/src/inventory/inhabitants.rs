//! Which container's processes are in a network namespace: by their control groups, which the engine's runtime sets up before anything
//! of the container runs. Reads /proc/PID/cgroup, for which nobody needs a privilege; enters nothing.
//!
//! # Why
//! Processes have their ids in the order in which they are made, so the new ones are those up to the id that was given last
//! (proc_loadavg(5)). To list all of them, as every look did, lets a container with twenty thousand processes keep whoever joins waiting
//! for a third of a second. Who makes more than we ask about at once is looked past: then the engine's word counts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};
use std::{fs, io};

use super::namespace::Asker;

/// A process is in the namespace where it stays long before this.
const YOUNG: Duration = Duration::from_secs(10);
/// An id is given a little before its process can be asked about.
const BEGINNING: Duration = Duration::from_millis(100);
/// The latest that are asked about; fifty containers that start at once are a thousand processes and threads of the engine's that stay.
/// Each question is a few microseconds.
const MOST: u32 = 4_096;
/// Characters of a container's id.
const ID: usize = 64;

/// Processes that were made lately, and threads, which have their ids from the same row.
#[derive(Debug)]
pub(super) struct Inhabitants {
    /// The id that had been given last when we looked.
    last: u32,
    young: VecDeque<Young>,
}

#[derive(Debug)]
struct Young {
    id: u32,
    /// Since when we know of it.
    since: Instant,
    /// Once it is in one that has an id here.
    namespace: Option<i32>,
}

impl Inhabitants {
    /// Those that are there by now are of containers that the engine tells of.
    pub(super) fn new() -> Self {
        Self { last: last_given().unwrap_or_default(), young: VecDeque::new() }
    }

    /// The containers of processes in these namespaces, by what is so now: of new processes, and of these older ones, which were in such
    /// a namespace once. Where two containers have processes in one, both.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub(super) fn of(&mut self, namespaces: &BTreeSet<i32>, older: &[u32]) -> io::Result<BTreeMap<i32, BTreeSet<String>>> {
        let now = Instant::now();
        self.given(last_given()?, now);
        let mut asker = Asker::new()?;
        self.young.retain_mut(|Young { id, since, namespace }| {
            if namespace.is_none() {
                match asker.of_process(*id) {
                    Ok(found) => *namespace = found,
                    Err(_) => return now.duration_since(*since) < BEGINNING,
                }
            }
            true
        });
        let inside = self.young.iter().filter(|young| young.namespace.is_some_and(|id| namespaces.contains(&id)));
        let mut found: BTreeMap<i32, BTreeSet<String>> = BTreeMap::new();
        for pid in inside.map(|young| young.id).chain(older.iter().copied()) {
            let container = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok().and_then(|text| container(&text));
            // Asked behind it: its number may have gone to another process.
            let namespace = asker.of_process(pid).ok().flatten().filter(|id| namespaces.contains(id));
            if let Some((namespace, container)) = namespace.zip(container) {
                found.entry(namespace).or_default().insert(container);
            }
        }
        Ok(found)
    }

    /// Ids up to this one have been given by now. From the highest on they begin anew; those before it are let go then.
    fn given(&mut self, last: u32, now: Instant) {
        let new = last.checked_sub(self.last).unwrap_or(last).min(MOST);
        self.last = last;
        self.young.retain(|young| now.duration_since(young.since) < YOUNG);
        self.young.extend((last - new + 1..=last).map(|id| Young { id, since: now, namespace: None }));
        let most = usize::try_from(MOST).unwrap_or(usize::MAX);
        self.young.drain(..self.young.len().saturating_sub(most));
    }
}

/// The last word of /proc/loadavg.
fn last_given() -> io::Result<u32> {
    let text = fs::read_to_string("/proc/loadavg")?;
    text.split_whitespace().last().and_then(|word| word.parse().ok()).ok_or_else(|| io::Error::other(format!("/proc/loadavg: {text:?}")))
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
    fn however_many_processes_are_made_the_latest_are_asked_about_and_no_more() {
        let (mut inhabitants, now) = (Inhabitants { last: 100, young: VecDeque::new() }, Instant::now());
        let ids = |inhabitants: &Inhabitants| inhabitants.young.iter().map(|young| young.id).collect::<Vec<_>>();
        inhabitants.given(103, now);
        inhabitants.given(103, now);
        assert_eq!(ids(&inhabitants), [101, 102, 103]);
        inhabitants.given(100_000, now);
        assert_eq!(ids(&inhabitants), (100_000 - MOST + 1..=100_000).collect::<Vec<_>>());
        // The highest number is behind us.
        inhabitants.given(2, now);
        assert_eq!(ids(&inhabitants).last_chunk(), Some(&[100_000, 1, 2]));
        inhabitants.given(3, now + YOUNG);
        assert_eq!(ids(&inhabitants), [3]);
    }

    #[test]
    fn a_process_that_is_made_is_among_the_latest() {
        let mut inhabitants = Inhabitants::new();
        let mut child = std::process::Command::new("sleep").arg("10").spawn().unwrap();
        inhabitants.given(last_given().unwrap(), Instant::now());
        assert!(inhabitants.young.iter().any(|young| young.id == child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn any_text_is_a_container_or_none() {
        for text in [":", "::", "0::", "0::///", "\n\n", "0::/docker/\u{e9}", "-.-.-"] {
            assert_eq!(container(text), None, "{text:?}");
        }
    }
}
