//! The agent as a process: its end with the supervisor, its runtime, its child that stands before the engine's socket.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{error, info};

/// Ends this process when the one that started it ends (PR_SET_PDEATHSIG, prctl(2)), if `up` asked for it: a killed supervisor
/// must not leave an agent behind that a new one would find in its way. What is in the kernel stays.
pub fn die_with_the_supervisor() {
    if std::env::var_os("BULKHEAD_SUPERVISED").is_some()
        && let Err(errno) = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)
    {
        error!(%errno, "cannot end with the supervisor; `bulkhead down` will still find this process by its lock");
    }
}

/// The host's own name, as `hostname` prints it.
pub fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "localhost".to_owned())
}

/// How long the filter may take to open its socket.
const FILTER_OPENS_WITHIN: Duration = Duration::from_secs(5);

/// Keeps the filter before the engine's socket running, as a process of its own: the agent itself never opens the engine's socket,
/// which is root on the host.
pub(super) struct EngineFilter {
    /// The socket to speak to.
    pub(super) socket: PathBuf,
    task: JoinHandle<()>,
}

fn start(engine: &Path, listen: &Path) -> io::Result<Child> {
    let arguments: [OsString; 5] = ["engine-filter".into(), "--engine".into(), engine.into(), "--listen".into(), listen.into()];
    // The program that runs here, also after an upgrade put another in its place; the name is for whoever lists processes.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("bulkhead-agent").args(arguments).env_clear().env("BULKHEAD_SUPERVISED", "1");
    if let Some(filter) = std::env::var_os("BULKHEAD_LOG") {
        command.env("BULKHEAD_LOG", filter);
    }
    command.stdin(Stdio::null()).kill_on_drop(true).spawn()
}

impl EngineFilter {
    /// Starts it and waits for its socket.
    ///
    /// # Errors
    /// The process can't be started, or its socket doesn't appear.
    pub(super) async fn start(engine: &Path, listen: &Path) -> io::Result<Self> {
        match std::fs::remove_file(listen) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        let mut child = start(engine, listen)?;
        let deadline = Instant::now() + FILTER_OPENS_WITHIN;
        while !listen.exists() {
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("the engine filter ended with {status}")));
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the engine filter did not open its socket"));
            }
            sleep(Duration::from_millis(2)).await;
        }
        let (engine, listen) = (engine.to_owned(), listen.to_owned());
        let socket = listen.clone();
        info!(engine = %engine.display(), socket = %socket.display(), "the engine is reached through the filter");
        let task = tokio::spawn(async move {
            loop {
                let status = child.wait().await;
                error!(?status, "the engine filter ended by itself; starting it again");
                loop {
                    sleep(Duration::from_millis(200)).await;
                    match start(&engine, &listen) {
                        Ok(again) => {
                            child = again;
                            break;
                        }
                        Err(error) => error!(%error, "cannot start the engine filter"),
                    }
                }
            }
        });
        Ok(Self { socket, task })
    }
}

impl Drop for EngineFilter {
    fn drop(&mut self) {
        // The child goes with the task (kill_on_drop).
        self.task.abort();
    }
}
