//! Programs, deadlines and tidying up: what keeps a test from outliving its process.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// Names of namespaces and directories made by the lab begin so.
pub const PREFIX: &str = "bhlab";

/// Seconds; longer than the slowest test with two engines takes on two busy cores.
static LONGEST_TEST: AtomicU64 = AtomicU64::new(15 * 60);

/// What is alive now, by name, and when it is overdue.
static ALIVE: Mutex<BTreeMap<String, Instant>> = Mutex::new(BTreeMap::new());
static FIRST: Once = Once::new();
static COUNT: AtomicU64 = AtomicU64::new(0);

/// A name that nobody else has: `bhlab-PID-N-LABEL`. What bears it is removed by [`sweep`] when its process is gone.
pub fn unique(label: &str) -> String {
    FIRST.call_once(|| {
        sweep(|pid| pid != std::process::id() && !Path::new(&format!("/proc/{pid}")).exists());
        thread::spawn(watch);
    });
    let name = format!("{PREFIX}-{}-{}-{label}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    alive().insert(name.clone(), Instant::now() + Duration::from_secs(LONGEST_TEST.load(Ordering::Relaxed)));
    name
}

/// Lets what is made from now on live so long, in a run that somebody asked to be long.
pub fn allow(time: Duration) {
    LONGEST_TEST.fetch_max(time.as_secs(), Ordering::Relaxed);
}

fn alive() -> std::sync::MutexGuard<'static, BTreeMap<String, Instant>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a name off the watchdog's list.
pub(crate) fn forget(name: &str) {
    alive().remove(name);
}

/// Ends the whole test program, tidied up, if the guard is not dropped in time: a hung test must not hang the run.
pub fn limit(time: Duration) -> Limit {
    let name = unique(thread::current().name().unwrap_or("test"));
    alive().insert(name.clone(), Instant::now() + time);
    Limit { name }
}

/// See [`limit`].
#[derive(Debug)]
pub struct Limit {
    name: String,
}

impl Drop for Limit {
    fn drop(&mut self) {
        forget(&self.name);
    }
}

fn watch() {
    loop {
        thread::sleep(Duration::from_millis(500));
        let overdue: Vec<String> = alive().iter().filter(|(_, at)| Instant::now() > **at).map(|(name, _)| name.clone()).collect();
        if !overdue.is_empty() {
            aloud(&format!("hung: {} outlived its time limit; the test program ends here", overdue.join(", ")));
            sweep(|pid| pid == std::process::id());
            std::process::exit(124);
        }
    }
}

/// Removes what processes of the lab left behind: programs, mounts, directories, namespaces, cgroups. `whose` chooses by pid.
pub fn sweep(whose: impl Fn(u32) -> bool) {
    let ours = |name: &str| name.strip_prefix("bhlab-").and_then(|r| r.split('-').next()?.parse().ok()).is_some_and(&whose);
    let named = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| ours(n)).collect()
    };
    for name in named("/run/netns") {
        end_all_in(&Path::new("/run/netns").join(&name));
    }
    for name in named("/tmp") {
        end_cgroups(&name);
        remove_dir_with_mounts(&Path::new("/tmp").join(&name));
    }
    for name in named("/run/netns") {
        quietly(Command::new("ip").args(["netns", "del", &name]));
    }
}

/// Ends every process in the cgroups of this name, in every hierarchy, and removes them.
pub(crate) fn end_cgroups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|e| e.path());
    let tops: Vec<PathBuf> = hierarchies.chain([root.to_path_buf()]).map(|h| h.join(name)).filter(|t| t.is_dir()).collect();
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        for top in &tops {
            empty_cgroup(top);
        }
        // A cgroup can be removed once the last of its processes is reaped.
        if tops.iter().all(|t| !t.exists()) || Instant::now() > end {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn empty_cgroup(dir: &Path) {
    for child in fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        empty_cgroup(&child.path());
    }
    for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines().filter_map(|l| l.parse().ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = fs::remove_dir(dir);
}

/// Unmounts everything below a directory and removes it.
pub(crate) fn remove_dir_with_mounts(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let prefix = format!("{}/", dir.display());
    let mut below: Vec<&str> = mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| m.starts_with(&prefix)).collect();
    below.sort_unstable();
    for mount in below.into_iter().rev() {
        let _ = umount2(mount, MntFlags::MNT_DETACH);
    }
    let _ = fs::remove_dir_all(dir);
}

/// Ends every process whose network namespace is this one.
pub(crate) fn end_all_in(netns: &Path) {
    let Ok(namespace) = fs::metadata(netns) else { return };
    let key = (namespace.dev(), namespace.ino());
    // Twice: a process may have started another between the look and the kill.
    for _ in 0..2 {
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let Ok(its) = fs::metadata(entry.path().join("ns/net")) else { continue };
            if (its.dev(), its.ino()) == key && pid != std::process::id().cast_signed() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// A running program, killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts a program without standard input, in a process group of its own, so that a terminal's Ctrl-C does not reach it.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).process_group(0);
        Self { child: command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}")) }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal; a program that is gone already is no error.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Waits for the end until the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + deadline;
        loop {
            match self.ended() {
                Some(status) => return Some(status),
                None if Instant::now() > end => return None,
                None => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// SIGTERM, and SIGKILL when it is not gone by then.
    pub fn stop(&mut self, deadline: Duration) -> Option<ExitStatus> {
        self.signal(Signal::SIGTERM);
        self.wait(deadline).or_else(|| {
            let _ = self.child.kill();
            self.child.wait().ok()
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until it is so, every 20 ms; panics with the last answer when the deadline has passed.
///
/// # Panics
/// When `what` still answers `Err` after `deadline`.
pub fn eventually<T, E: std::fmt::Display>(deadline: Duration, mut what: impl FnMut() -> Result<T, E>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match what() {
            Ok(value) => return value,
            Err(last) if Instant::now() > end => panic!("not within {deadline:?}: {last}"),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Runs a program that must succeed; returns its standard output.
///
/// # Panics
/// Where it cannot be started or fails, with what it said.
pub fn check(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Copies a program that is started afterwards. Another process does it: what another test of this one is forking meanwhile would hold the
/// copy open for writing until it becomes its program, and nobody can start it then (ETXTBSY, execve(2)).
///
/// # Panics
/// Where it cannot be copied.
pub fn copy_program(from: &Path, to: &Path) {
    check(Command::new("cp").arg("--preserve=mode").arg("--").args([from, to]));
}

/// Runs a program whose failure doesn't matter, without its output.
pub fn quietly(command: &mut Command) {
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Whether a program can be found on PATH.
pub fn found(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Why tests that need root and namespaces cannot run here, if they cannot.
pub fn lacks_root() -> Option<String> {
    if !geteuid().is_root() {
        return Some("needs root for network namespaces".to_owned());
    }
    ["ip", "nft"].into_iter().find(|p| !found(p)).map(|p| format!("needs the program {p}"))
}

/// How many processes ran or waited to, on average over the last minute (proc(5), /proc/loadavg).
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

/// Prints `skipped: TEST: REASON`; see [`crate::skip!`].
pub fn say_skipped(reason: &str) {
    aloud(&format!("skipped: {}: {reason}", thread::current().name().unwrap_or("?")));
}

/// Past the harness, which keeps what passing tests print with `println!` to itself.
fn aloud(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
