//! Network namespaces with a name of their own, and the veths between them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::process::{self, Process, eventually};

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    borrowed: bool,
}

impl Netns {
    /// A new namespace with loopback up; `label` only helps a person who looks at `ip netns`.
    ///
    /// # Panics
    /// Where `ip netns add` fails: the suites ask [`crate::needs_root!`] first.
    pub fn new(label: &str) -> Self {
        let name = process::unique(label);
        process::check(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new("/run/netns").join(&name);
        let made = Self { name, path, borrowed: false };
        made.ip("link set lo up");
        made
    }

    /// The namespace of a running process, for example a container's first program; dropping this leaves it alone. [`Netns::ip`]
    /// needs a name and doesn't work on it.
    pub fn of_process(pid: u32) -> Self {
        Self { name: format!("of process {pid}"), path: format!("/proc/{pid}/ns/net").into(), borrowed: true }
    }

    /// The namespace of a file that somebody else keeps; dropping this leaves it alone. [`Netns::ip`] doesn't work on it.
    pub fn at(path: PathBuf) -> Self {
        Self { name: path.display().to_string(), path, borrowed: true }
    }

    /// As [`Netns::run`] for a namespace that may be gone: then `None`.
    pub fn try_run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Option<T> {
        let inside = || self.enter().ok().map(|()| work());
        thread::scope(|scope| scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file to `setns` to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread inside the namespace: sockets opened and programs started there belong to it.
    ///
    /// A panic of `work` is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            self.enter().unwrap_or_else(|e| panic!("cannot enter the namespace {}: {e}", self.name));
            work()
        };
        // The name of the test goes with it, so that a `skip!` inside still names the test.
        let name = thread::current().name().unwrap_or("lab").to_owned();
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(name).spawn_scoped(scope, inside).expect("a thread can be started");
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Moves the calling thread into the namespace, for good: only for threads that do nothing else.
    ///
    /// # Errors
    /// Whatever open or setns say.
    pub fn enter(&self) -> io::Result<()> {
        setns(File::open(&self.path)?, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
    }

    /// Runs a program inside and waits for it; a non-zero exit is the caller's to judge.
    ///
    /// # Panics
    /// Where the program cannot be started.
    pub fn output(&self, command: &mut Command) -> Output {
        self.run(|| command.output().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}")))
    }

    /// Runs a program inside that must succeed; returns what it printed.
    ///
    /// # Panics
    /// Where it cannot be started or fails, with what it said.
    pub fn check(&self, command: &mut Command) -> String {
        self.run(|| process::check(command))
    }

    /// Starts a program inside, ended when the returned value is dropped.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Process {
        self.run(|| Process::start(command))
    }

    /// `ip` with these words, split at spaces, inside; it must succeed.
    pub fn ip(&self, words: &str) -> String {
        process::check(Command::new("ip").args(["-n", &self.name]).args(words.split_whitespace()))
    }

    /// `nft` with this text as one transaction, inside; it must succeed.
    pub fn nft(&self, text: &str) -> String {
        self.check(Command::new("nft").arg(text))
    }

    /// Everything nftables has inside, as text: for before and after.
    pub fn ruleset(&self) -> String {
        self.check(Command::new("nft").args(["-s", "list", "ruleset"]))
    }

    /// Writes a sysctl of the namespace, by its dotted name (dots in interface names are not possible here).
    ///
    /// # Panics
    /// Where the key is missing or the value refused.
    pub fn set_sysctl(&self, key: &str, value: &str) {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::write(&path, value).unwrap_or_else(|e| panic!("cannot write {value} to {}: {e}", path.display())));
    }

    /// Reads a sysctl of the namespace; `None` where there is no such key.
    pub fn sysctl(&self, key: &str) -> Option<String> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::read_to_string(path).ok().map(|s| s.trim().to_owned()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.borrowed {
            return;
        }
        // What still runs inside would keep the namespace alive without a name.
        process::end_all_in(&self.path);
        process::quietly(Command::new("ip").args(["netns", "del", &self.name]));
        process::forget(&self.name);
    }
}

/// A virtual cable between two namespaces; gone with either of them.
#[derive(Debug)]
pub struct Veth;

impl Veth {
    /// Lays a cable and sets both ends up. Interface names have at most 15 characters.
    ///
    /// # Panics
    /// Where `ip link add` fails.
    pub fn between(a: &Netns, a_name: &str, b: &Netns, b_name: &str) {
        Self::lay(a, a_name, b, b_name);
        Self::set_up(a, a_name, b, b_name);
    }

    /// The same, with a MAC address for the second end: it has it before it is up, as an engine's have, or the first that it says is
    /// about a link-local address of another one.
    ///
    /// # Panics
    /// Where `ip link` fails.
    pub fn with_mac(a: &Netns, a_name: &str, b: &Netns, b_name: &str, mac: &str) {
        Self::lay(a, a_name, b, b_name);
        b.ip(&format!("link set {b_name} address {mac}"));
        Self::set_up(a, a_name, b, b_name);
    }

    fn lay(a: &Netns, a_name: &str, b: &Netns, b_name: &str) {
        process::check(Command::new("ip").args([
            "link",
            "add",
            a_name,
            "netns",
            a.name(),
            "type",
            "veth",
            "peer",
            "name",
            b_name,
            "netns",
            b.name(),
        ]));
    }

    fn set_up(a: &Netns, a_name: &str, b: &Netns, b_name: &str) {
        a.ip(&format!("link set {a_name} up"));
        b.ip(&format!("link set {b_name} up"));
        // The end that was set up first has its carrier a moment later, and drops what is sent until then.
        for (netns, name) in [(a, a_name), (b, b_name)] {
            eventually(Duration::from_secs(10), || {
                let link = netns.ip(&format!("-o link show {name}"));
                if link.contains("state UP") { Ok(()) } else { Err(link) }
            });
        }
    }
}
