//! A controller's process with a store of our making, and a person's commands.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use controller::session::BatchIn;
use controller::store::Store;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use policy::EdgeDelta;
use tempfile::TempDir;

/// Edges to a batch: what an agent that was away sends at once.
pub(crate) const BATCH: usize = 5_000;

/// A batch as the session hands it on.
pub(crate) fn batch(seq: u64, edges: &[EdgeDelta]) -> BatchIn {
    let (node, spool) = ("node1".to_owned(), "spool".to_owned());
    BatchIn { node, spool, seq, first: 1, edges: edges.to_vec(), health: Vec::new(), skipped: Default::default() }
}

/// A folder for state and sockets.
pub(crate) struct Desk {
    dir: TempDir,
}

/// A controller; ends with this value.
pub(crate) struct Controller {
    child: Child,
}

impl Desk {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("bulkhead-bench-").tempdir().expect("room for a folder");
        std::fs::create_dir_all(dir.path().join("state/controller")).expect("room for a folder");
        Self { dir }
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("state/controller/store.db")
    }

    /// A store that holds these edges.
    pub(crate) fn fill(&self, edges: &[EdgeDelta]) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let store = Store::open(&self.store(), crate::stage::now()).await.expect("a store");
            for (at, piece) in edges.chunks(BATCH).enumerate() {
                store.apply_batch(&batch(at as u64 + 1, piece)).await.expect("room");
            }
            store.close().await;
        });
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(lab::host::binary("bulkhead"));
        command.env("BULKHEAD_STATE_DIR", self.dir.path().join("state")).env("BULKHEAD_RUN_DIR", self.dir.path().join("run"));
        command.env_remove("SUDO_USER").stdin(Stdio::null());
        command
    }

    /// Starts a controller; how long until it answered what its status is.
    pub(crate) fn start(&self) -> (Controller, Duration) {
        let mut command = self.command();
        command.args(["controller", "--agent-uid", &Uid::effective().to_string()]).stderr(Stdio::null()).stdout(Stdio::null());
        let begun = Instant::now();
        let mut child = command.spawn().expect("a program");
        while !self.answers("status") {
            assert!(child.try_wait().expect("a child").is_none(), "the controller ended");
            std::thread::sleep(Duration::from_millis(1));
        }
        (Controller { child }, begun.elapsed())
    }

    /// Whether the API answers a question; false: nobody listens.
    pub(crate) fn answers(&self, question: &str) -> bool {
        let Ok(mut socket) = UnixStream::connect(self.dir.path().join("run/api.sock")) else { return false };
        let asked = write!(socket, "GET /api/v1/{question} HTTP/1.1\r\nHost: bulkhead\r\nConnection: close\r\n\r\n");
        asked.expect("a controller that hears");
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).expect("an answer");
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{question}: {}", String::from_utf8_lossy(&answer[..answer.len().min(200)]));
        true
    }

    /// How long a command takes, and what it printed.
    pub(crate) fn time(&self, words: &str) -> (f64, usize) {
        let mut command = self.command();
        command.args(words.split_whitespace());
        let begun = Instant::now();
        let output = command.output().expect("a program");
        let took = begun.elapsed().as_secs_f64();
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
        (took, output.stdout.len())
    }
}

impl Controller {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
