//! An observer in a process of its own, so that what it uses of the machine is told apart from the traffic, and so that it can be
//! stopped. It answers each line on its input with one about what it saw, and ends with its input.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lab::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node_agent::inventory::Snapshot;
use node_agent::observe::{Observer, Options};
use policy::Inventory;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The first argument of such a process.
pub(crate) const ROLE: &str = "--observe";

/// What it saw so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Saw {
    pub(crate) events: u64,
    pub(crate) lost: u64,
    pub(crate) repairs: u64,
    /// Connections that it follows.
    pub(crate) followed: usize,
    /// Facts that came of it.
    pub(crate) facts: u64,
}

/// The process itself: reads the inventory from the first line.
pub(crate) fn be_one() {
    let mut lines = std::io::stdin().lock().lines();
    let inventory: Inventory = serde_json::from_str(&lines.next().expect("an inventory").expect("a line")).expect("an inventory");
    let mut snapshot = Snapshot { inventory: inventory.into(), engine: "told".to_owned(), ..Snapshot::default() };
    snapshot.leases.update(&snapshot.inventory, jiff::Timestamp::now());
    let (_keep, snapshots) = watch::channel(Arc::new(snapshot));
    // The dump of what lives is part of a repair; none is made by the clock meanwhile.
    let options = Options { sweep: Duration::from_secs(3600), ..Options::default() };
    let (mut facts, observer) = Observer::start(options, snapshots).expect("an observer");
    let counted = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&counted);
    std::thread::spawn(move || {
        while let Some(facts) = facts.blocking_recv() {
            count.fetch_add(facts.len() as u64, std::sync::atomic::Ordering::Relaxed);
        }
    });
    for _ in lines {
        let account = observer.account();
        let facts = counted.load(std::sync::atomic::Ordering::Relaxed);
        let saw = Saw { events: account.events, lost: account.lost, repairs: account.repairs, followed: account.followed.0, facts };
        println!("{}", serde_json::to_string(&saw).expect("numbers"));
    }
}

/// The same, seen from outside.
pub(crate) struct Watcher {
    child: Child,
    ask: ChildStdin,
    answer: BufReader<ChildStdout>,
}

impl Watcher {
    pub(crate) fn start(host: &Netns, inventory: &Inventory) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("a program knows itself"));
        command.arg(ROLE).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = host.run(|| command.spawn()).expect("a program");
        let (mut ask, answer) = (child.stdin.take().expect("piped"), BufReader::new(child.stdout.take().expect("piped")));
        writeln!(ask, "{}", serde_json::to_string(inventory).expect("an inventory")).expect("it reads");
        let mut watcher = Self { child, ask, answer };
        watcher.saw();
        watcher
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn saw(&mut self) -> Saw {
        writeln!(self.ask).expect("it reads");
        let mut line = String::new();
        self.answer.read_line(&mut line).expect("it answers");
        serde_json::from_str(&line).expect("what it saw")
    }

    /// Waits until it has seen or lost so many events, or no more of them for so long.
    pub(crate) fn until(&mut self, events: u64, quiet: Duration) -> Saw {
        let (mut last, mut since) = (self.saw(), Instant::now());
        loop {
            let now = self.saw();
            if now.events + now.lost >= events || since.elapsed() > quiet {
                return now;
            }
            if now.events + now.lost > last.events + last.lost {
                (last, since) = (now, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until nothing more comes.
    pub(crate) fn settled(&mut self) -> Saw {
        self.until(u64::MAX, Duration::from_secs(2))
    }

    /// Stops it for a while, as a machine does that has no time for it.
    pub(crate) fn stalled<T>(&self, work: impl FnOnce() -> T) -> T {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGSTOP).expect("our own child");
        let done = work();
        kill(pid, Signal::SIGCONT).expect("our own child");
        done
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
