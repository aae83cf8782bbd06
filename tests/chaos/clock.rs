//! When containers joined, by the engine's events, and when their addresses were in the kernel, by `nft monitor`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lab::Engine;

/// A container is bound no longer than this before the engine says that it joined.
const AHEAD: Duration = Duration::from_millis(300);

/// When the engine said that containers joined, and when their addresses were in the kernel.
pub(crate) struct Clock {
    bound: Arc<Mutex<BTreeMap<String, Vec<SystemTime>>>>,
    programs: Vec<lab::Process>,
    log: std::path::PathBuf,
}

impl Clock {
    pub(crate) fn start(engine: &Engine, nft: bool) -> Self {
        let bound = Arc::default();
        let log = engine.dir.join("events");
        let mut events = engine.command("docker");
        events.args(["events", "--filter", "type=network", "--filter", "event=connect", "--format", "{{json .}}"]);
        let events = engine.netns.spawn(events.stdout(File::create(&log).unwrap()));
        let mut programs = vec![events];
        if nft {
            let pipe = engine.dir.join("bound");
            nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let (its, to) = (Arc::clone(&bound), pipe.clone());
            thread::spawn(move || {
                for line in BufReader::new(File::open(to).unwrap()).lines().map_while(Result::ok) {
                    note_bound(&its, &line);
                }
            });
            let mut monitor = Command::new("stdbuf");
            monitor.args(["-oL", "nft", "monitor", "new", "elements"]);
            let out = File::options().write(true).open(&pipe).unwrap();
            programs.push(engine.netns.spawn(monitor.stdout(out).stderr(Stdio::null())));
        }
        Self { bound, programs, log }
    }

    /// Who joined when, and when the address that it used was in the kernel before the server's answer.
    pub(crate) fn ends(mut self, addresses: &BTreeMap<String, Vec<(IpAddr, Option<SystemTime>)>>) -> Vec<Joined> {
        for program in &mut self.programs {
            program.stop(Duration::from_secs(2));
        }
        let mut joined: BTreeMap<String, Vec<SystemTime>> = BTreeMap::new();
        for line in std::fs::read_to_string(&self.log).unwrap().lines() {
            let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            let (Some(id), Some(nanos)) = (event["Actor"]["Attributes"]["container"].as_str(), event["timeNano"].as_u64()) else {
                continue;
            };
            joined.entry(id.to_owned()).or_default().push(UNIX_EPOCH + Duration::from_nanos(nanos));
        }
        let bound = self.bound.lock().unwrap();
        let mut found = Vec::new();
        for (id, addresses) in addresses {
            for (nth, (address, answered)) in addresses.iter().enumerate() {
                let Some(at) = joined.get(id).and_then(|all| all.get(nth)) else { continue };
                // An address that its workload got back at once was bound all the time: the change before is another one's.
                let meant = |time: &&SystemTime| **time + AHEAD >= *at && answered.is_some_and(|answered| **time <= answered);
                let bound = bound.get(&address.to_string()).into_iter().flatten().filter(meant).map(|time| after(*at, *time)).collect();
                found.push(Joined { id: id.clone(), nth, address: *address, at: *at, bound });
            }
        }
        found
    }
}

/// One time that a container joined.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) id: String,
    /// Of its runs.
    pub(crate) nth: usize,
    pub(crate) address: IpAddr,
    /// By the engine's event.
    pub(crate) at: SystemTime,
    /// When its address came to be in the kernel, milliseconds after that.
    pub(crate) bound: Vec<f64>,
}

/// Milliseconds, less than nothing if it was before.
pub(crate) fn after(from: SystemTime, to: SystemTime) -> f64 {
    1000.0 * to.duration_since(from).map_or_else(|early| -early.duration().as_secs_f64(), |late| late.as_secs_f64())
}

/// `add element inet bulkhead senders4 { "br-front" . 172.29.7.4 : jump egress_refuse }`
fn note_bound(bound: &Mutex<BTreeMap<String, Vec<SystemTime>>>, line: &str) {
    if !line.contains(" senders4 ") {
        return;
    }
    let now = SystemTime::now();
    for word in line.split_whitespace().filter(|word| word.parse::<IpAddr>().is_ok()) {
        bound.lock().unwrap().entry(word.to_owned()).or_default().push(now);
    }
}

/// The value below which so many of a hundred are.
pub(crate) fn part(sorted: &[f64], of_a_hundred: usize) -> f64 {
    sorted.get((sorted.len() * of_a_hundred / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}
