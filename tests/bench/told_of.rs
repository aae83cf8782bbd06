//! What the agent says of containers that it has bound, by its log as it grows.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

/// Between two looks at the end of the log.
const PAUSE: Duration = Duration::from_micros(500);

/// One container in the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    /// Since the agent knew all of it.
    pub(crate) own: Duration,
    /// When it said so.
    pub(crate) at: SystemTime,
}

/// Reads until it is told to end.
pub(crate) struct Follower {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<String, Bound>>,
}

impl Follower {
    /// Follows this log from its end; for each container that is bound it makes a file of its id in this folder.
    pub(crate) fn start(log: PathBuf, told: PathBuf) -> Self {
        let ended: Arc<AtomicBool> = Arc::default();
        let its = ended.clone();
        let thread = thread::spawn(move || {
            let mut reader = BufReader::new(File::open(log).expect("the host's log"));
            let (mut found, mut line) = (BTreeMap::new(), String::new());
            loop {
                // The last look is after the end.
                let last = its.load(Ordering::Relaxed);
                while reader.read_line(&mut line).is_ok_and(|read| read > 0) {
                    // Half a line is the beginning of the next.
                    if !line.ends_with('\n') {
                        break;
                    }
                    if let Some((id, bound)) = read(&line) {
                        found.entry(id.clone()).or_insert(bound);
                        fs::write(told.join(id), []).expect("a folder of ours");
                    }
                    line.clear();
                }
                if last {
                    return found;
                }
                thread::sleep(PAUSE);
            }
        });
        Self { ended, thread }
    }

    pub(crate) fn end(self) -> BTreeMap<String, Bound> {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().expect("it reads to the end")
    }
}

/// `2026-11-29T03:00:00.123456Z DEBUG ...: bound container="4f..." bridge="br-front" own_us=812 since_told_us=4100`
fn read(line: &str) -> Option<(String, Bound)> {
    let (head, fields) = line.split_once(": bound container=")?;
    let at: jiff::Timestamp = head.split_whitespace().find_map(|word| word.parse().ok())?;
    let mut words = fields.split_whitespace();
    let id = words.next()?.trim_matches('"').to_owned();
    let fields: BTreeMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
    let own = Duration::from_micros(fields.get("own_us")?.parse().ok()?);
    Some((id, Bound { own, at: at.into() }))
}
