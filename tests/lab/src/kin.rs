//! The processes below another, by their words.

use std::fs;

use crate::Process;

/// A process id and its command line.
pub type Kin = (i32, String);

fn words_of(pid: i32) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).replace('\0', " ")
}

/// Whether it still runs, and is the same.
pub fn lives((pid, words): &Kin) -> bool {
    words_of(*pid) == *words
}

/// Every process below another, with its words.
pub fn family(pid: i32) -> Vec<Kin> {
    // Threads start children too.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok()).collect::<String>();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.flat_map(|pid| std::iter::once((pid, words_of(pid))).chain(family(pid))).collect()
}

/// The process below this one whose command line has these words.
pub fn child(of: &Process, words: &str) -> Option<i32> {
    let pid = i32::try_from(of.id()).expect("ids of processes are positive");
    family(pid).into_iter().find(|(_, its)| its.contains(words)).map(|(pid, _)| pid)
}
