//! Disks that are full: a file system of a few hundred kilobytes in a mount namespace of the test's own. Needs root.

use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::pair::{Place, counted, key, one};

/// Runs a test on a thread (and in a runtime) that has its own mounts: they are gone with it, whatever happens.
fn with_small_disk(size: &str, at: &Path, test: impl Future<Output = ()> + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(format!("size={size}").as_str())).unwrap();
            // Threads that this runtime and ours start from here inherit the mounts.
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(test);
        });
    });
}

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: a full disk needs a mount of its own, which needs root");
    }
    root
}

/// Fills what is left, and gives it back when dropped.
struct Ballast(std::path::PathBuf);

impl Ballast {
    fn fill(dir: &Path) -> Self {
        use std::io::Write;
        let path = dir.join("ballast");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_spool_without_room_keeps_everything_in_memory_says_so_and_writes_it_later() {
    if !root() {
        return;
    }
    let place = Place::new();
    with_small_disk("600k", &place.agent_dir(), async {
        let controller = place.controller().await;
        let agent = place.agent();
        agent.handle.record(one(1));
        assert_eq!(counted(&controller.store, 1).await, 1);
        let ballast = Ballast::fill(&place.agent_dir());
        for n in 1..=500 {
            agent.handle.record(one(n));
        }
        agent.handle.flush().await;
        let trouble = agent.handle.trouble().expect("the disk is full");
        assert!(trouble.contains("spool") && trouble.contains("No space left"), "{trouble}");
        tokio::time::sleep(Duration::from_millis(300)).await;
        let graph = controller.store.load_graph().await.unwrap();
        assert!(graph.get(&key(499)).is_none(), "what is not on disk gets no number: a death here would count it twice");
        drop(ballast);
        assert_eq!(counted(&controller.store, 501).await, 501);
        assert_eq!(agent.handle.trouble(), None);
        agent.handle.stop().await;
        controller.stop().await;
    });
}

#[test]
fn a_store_without_room_acknowledges_nothing_and_takes_it_later() {
    if !root() {
        return;
    }
    let place = Place::new();
    let small = place.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    // Room for the file and for a write-ahead log of a thousand pages, after which SQLite empties it.
    with_small_disk("8m", &small, async {
        let db = small.join("store.db");
        let controller = crate::pair::Controller::start(&place.socket(), &db, Default::default()).await;
        let agent = place.agent();
        agent.handle.record(one(1));
        assert_eq!(counted(&controller.store, 1).await, 1);
        let ballast = Ballast::fill(&small);
        for n in 1..=3000 {
            agent.handle.record(one(n));
        }
        agent.handle.flush().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let graph = controller.store.load_graph().await.unwrap();
        assert!(graph.len() < 3000, "{}", graph.len());
        drop(ballast);
        assert_eq!(counted(&controller.store, 3001).await, 3001);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(counted(&controller.store, 3001).await, 3001);
        agent.handle.stop().await;
        controller.stop().await;
    });
}
