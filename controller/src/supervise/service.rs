//! One of the two processes that `up` keeps: its start, its words, its end, and the socket that it leaves for its successor.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid};
use rustix::io::{FdFlags, fcntl_setfd};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::notify::{Notice, Notices};
use super::{READY_WITHIN, SuperviseError, io_at};

/// The first pause before a restart; doubled each time, up to [`LONGEST_PAUSE`], and back after a quiet while.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// See [`FIRST_PAUSE`].
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// One of the two, and when to start it again.
pub(super) struct Service {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    identity: Option<(Uid, Gid)>,
    notices: Notices,
    child: Option<Child>,
    /// What it left for the process after it: the agent's socket, which owns the tables while this copy lives.
    kept: Option<OwnedFd>,
    pause: Duration,
    started: Instant,
}

impl Service {
    pub(super) fn new(
        name: &'static str,
        program: PathBuf,
        arguments: Vec<OsString>,
        identity: Option<(Uid, Gid)>,
        notices: Notices,
    ) -> Self {
        let (child, kept, started) = (None, None, Instant::now());
        Self { name, program, arguments, identity, notices, child, kept, pause: FIRST_PAUSE, started }
    }

    pub(super) fn start(&mut self) -> Result<(), SuperviseError> {
        // What the one before said with its last breath.
        while let Some(notice) = self.notices.waiting() {
            take(&mut self.kept, notice);
        }
        let mut command = std::process::Command::new(&self.program);
        command
            .args(&self.arguments)
            .env("BULKHEAD_SUPERVISED", "1")
            .env("NOTIFY_SOCKET", &self.notices.path)
            .env("FDSTORE", "1")
            .env_remove("BULKHEAD_OWNER_FD")
            .stdin(Stdio::null())
            .process_group(0);
        if let Some((uid, gid)) = self.identity {
            // Without a call to groups(), std drops the supplementary groups when it leaves root.
            command.uid(uid.as_raw()).gid(gid.as_raw());
        }
        let inherits = |flags| self.kept.as_ref().map_or(Ok(()), |socket| fcntl_setfd(socket, flags));
        if let Some(socket) = &self.kept {
            command.env("BULKHEAD_OWNER_FD", socket.as_raw_fd().to_string());
        }
        let mut command = Command::from(command);
        // This program has one thread: no other process is started while the socket may be inherited.
        let spawned = inherits(FdFlags::empty()).map_err(Into::into).and_then(|()| command.kill_on_drop(false).spawn());
        let hidden = inherits(FdFlags::CLOEXEC);
        let child = spawned.map_err(io_at(format!("start {}", self.program.display())))?;
        info!(service = self.name, pid = child.id(), "started");
        self.child = Some(child);
        self.started = Instant::now();
        hidden.map_err(|errno| io_at("keep the socket that owns the tables to the agent")(errno.into()))
    }

    /// Its end; what it says meanwhile is taken note of. Cancel safe.
    pub(super) async fn ended(&mut self) -> ExitStatus {
        let Self { notices, child, kept, .. } = self;
        let ended = async {
            match child {
                Some(child) => match child.wait().await {
                    Ok(status) => status,
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::pin!(ended);
        loop {
            tokio::select! {
                status = &mut ended => return status,
                notice = notices.next() => {
                    take(kept, notice);
                }
            }
        }
    }

    pub(super) async fn wait_ready(&mut self) -> Result<(), SuperviseError> {
        let not_ready = SuperviseError::NotReady { name: self.name, seconds: READY_WITHIN.as_secs(), log: "its messages above".to_owned() };
        let Self { notices, child, kept, .. } = self;
        let Some(running) = child else { return Err(not_ready) };
        let ready = async { while !take(kept, notices.next().await) {} };
        tokio::select! {
            heard = timeout(READY_WITHIN, ready) => heard.map_err(|_| not_ready),
            status = running.wait() => {
                *child = None;
                let words = status.map_or_else(|error| error.to_string(), |status| format!("{status}; it has said why above"));
                Err(SuperviseError::Ended { name: self.name, words })
            }
        }
    }

    pub(super) async fn again(&mut self, status: ExitStatus) -> Result<(), SuperviseError> {
        if self.started.elapsed() > LONGEST_PAUSE * 3 {
            self.pause = FIRST_PAUSE;
        }
        error!(service = self.name, %status, pause_ms = u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX), "ended by itself; starting it again");
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.start()
    }

    pub(super) async fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw) else { return };
        if kill(pid, Signal::SIGTERM).is_ok() && timeout(Duration::from_secs(10), child.wait()).await.is_err() {
            warn!(service = self.name, "did not stop within 10 s; killed");
            let _ = child.kill().await;
        }
    }
}

/// Keeps what is to be kept; whether the service is ready.
fn take(kept: &mut Option<OwnedFd>, notice: Notice) -> bool {
    if notice.forget {
        *kept = None;
    }
    if let Some(socket) = notice.keep {
        *kept = Some(socket);
    }
    notice.ready
}
