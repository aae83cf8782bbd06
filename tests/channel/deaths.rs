//! Agent and controller as processes of their own, killed with SIGKILL at any moment. A process is this test program again, told by
//! its environment which side to play.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use policy::{EdgeDelta, EdgeKey, Endpoint, Evidence, Service, Workload};

use crate::pair::{PATIENCE, Place, counted, key, one};

const FOLDER: &str = "BULKHEAD_TEST_CHANNEL";

struct Process(Child);

impl Process {
    fn start(side: &str, place: &Place) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", side, "--nocapture", "--test-threads=1"])
            .env(FOLDER, place.dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// SIGKILL, and nothing of it is left when this returns.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn folder() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

/// Not a test by itself: the controller of the tests below.
#[tokio::test(flavor = "multi_thread")]
async fn controller_process() {
    let Some(folder) = folder() else { return };
    let _controller = crate::pair::Controller::start(&folder.join("node.sock"), &folder.join("store.db"), Default::default()).await;
    std::future::pending::<()>().await;
}

fn unique(incarnation: usize, round: usize) -> EdgeKey {
    EdgeKey {
        from: Endpoint::Workload(Workload::new("shop", format!("w{incarnation}-{round}"))),
        to: Endpoint::Host,
        service: Service::tcp(1),
        direction_known: true,
    }
}

/// Not a test by itself: an agent that sees a new edge each round, and one that it knows. It writes down when a round begins and when
/// it is in the spool.
#[tokio::test(flavor = "multi_thread")]
async fn agent_process() {
    let Some(folder) = folder() else { return };
    let log = folder.join("rounds");
    let incarnation = std::fs::read_to_string(&log).unwrap_or_default().lines().filter(|line| line.starts_with("born")).count();
    let mut log = OpenOptions::new().create(true).append(true).open(log).unwrap();
    // One write each: a line that is torn by who kills this would be joined with the next one's.
    let mut say = |word: &str, round: usize| log.write_all(format!("{word} {incarnation} {round}\n").as_bytes()).unwrap();
    say("born", 0);
    let place = Place::at(&folder);
    let agent = place.agent();
    for round in 0.. {
        say("begun", round);
        agent.handle.record(one(5432));
        agent.handle.record(EdgeDelta { key: unique(incarnation, round), seen: Evidence { established: 1, ..Evidence::default() } });
        agent.handle.flush().await;
        say("done", round);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Rounds by word, as (incarnation, round).
fn rounds(log: &Path) -> BTreeMap<String, BTreeSet<(usize, usize)>> {
    let mut found: BTreeMap<String, BTreeSet<(usize, usize)>> = BTreeMap::new();
    let text = std::fs::read_to_string(log).unwrap_or_default();
    // The last line may be half written, by whom we killed.
    for line in text.lines().take(text.matches('\n').count()) {
        let mut words = line.split(' ');
        let (word, a, b) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        found.entry(word.to_owned()).or_default().insert((a.parse().unwrap(), b.parse().unwrap()));
    }
    found
}

/// Pauses of 30 to 300 ms, other ones each time the tests run.
fn pause(until: Instant) {
    use std::hash::{BuildHasher, RandomState};
    let pause = Duration::from_millis(30 + RandomState::new().hash_one(until) % 270);
    std::thread::sleep(pause.min(until.saturating_duration_since(Instant::now())));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_edge_is_counted_once_whoever_is_killed() {
    let place = Place::new();
    let log = place.dir.path().join("rounds");
    let until = Instant::now() + 2 * PATIENCE;
    let mut controller = Process::start("deaths::controller_process", &place);
    let mut agent = Process::start("deaths::agent_process", &place);
    let mut killed = 0;
    // Enough of both, however slow the machine is.
    while killed < 30 || (rounds(&log).get("done").map_or(0, BTreeSet::len) < 200 && Instant::now() < until) {
        pause(until);
        killed += 1;
        if killed % 3 == 0 {
            agent.kill();
            agent = Process::start("deaths::agent_process", &place);
        } else {
            controller.kill();
            controller = Process::start("deaths::controller_process", &place);
        }
    }
    agent.kill();
    controller.kill();

    let controller = place.controller().await;
    let agent = place.agent();
    let rounds = rounds(&log);
    let (begun, done) = (&rounds["begun"], &rounds["done"]);
    // The first session of the new pair brings what was left.
    agent.handle.record(one(1));
    while controller.store.load_graph().await.unwrap().get(&key(1)).is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let graph = controller.store.load_graph().await.unwrap();
    for &(incarnation, round) in done {
        let seen = graph.get(&unique(incarnation, round)).unwrap_or_else(|| panic!("round {round} of agent {incarnation} is lost"));
        assert_eq!(seen.established, 1, "round {round} of agent {incarnation}");
    }
    let names: BTreeSet<EdgeKey> = begun.iter().map(|&(incarnation, round)| unique(incarnation, round)).collect();
    for (key, seen) in graph.iter() {
        if key.to == Endpoint::Host {
            assert!(names.contains(&key) && seen.established == 1, "{key}: {}", seen.established);
        }
    }
    let known = graph.get(&key(5432)).unwrap().established;
    assert!((done.len()..=begun.len()).contains(&usize::try_from(known).unwrap()), "{} <= {known} <= {}", done.len(), begun.len());
    println!("{killed} deaths, {} rounds done of {} begun, all counted once", done.len(), begun.len());
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_controller_costs_no_count() {
    let place = Place::new();
    let agent = place.agent();
    let until = Instant::now() + Duration::from_secs(5);
    let (mut recorded, mut killed) = (0, 0);
    while Instant::now() < until {
        let controller = Process::start("deaths::controller_process", &place);
        let next = Instant::now() + Duration::from_millis(150 + 50 * (killed % 5));
        while Instant::now() < next {
            for n in 1..=40 {
                agent.handle.record(one(n));
                recorded += 1;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        controller.kill();
        killed += 1;
    }
    let controller = place.controller().await;
    assert_eq!(counted(&controller.store, recorded).await, recorded);
    println!("{killed} deaths, {recorded} flows");
    agent.handle.stop().await;
    controller.stop().await;
}
