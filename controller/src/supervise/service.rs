//! One of the two processes that `up` keeps: its start, its words, its end, and the socket that it leaves for its successor.

use std::collections::BTreeMap;
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
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{error, info, warn};

use super::notify::{Notice, Notices};
use super::{READY_WITHIN, SuperviseError, io_at};

/// The first pause before a restart; doubled each time, up to [`LONGEST_PAUSE`], and back after a quiet while.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// See [`FIRST_PAUSE`].
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The name of the socket that owns the tables.
const OWNER: &str = "nftables";
/// So many names are kept: a service has two.
const MOST_NAMES: usize = 4;

type Kept = BTreeMap<String, Vec<OwnedFd>>;

/// One of the two, and when to start it again.
pub(super) struct Service {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    identity: Option<(Uid, Gid)>,
    notices: Notices,
    child: Option<Child>,
    /// What it left to be kept, by name: the agent's socket, which owns the tables while this copy lives and is for the process after
    /// it; and what looks at packets while there is none.
    kept: Kept,
    /// Before it is started again; at most so long.
    pause: Duration,
    longest: Duration,
    started: Instant,
    /// When it is to be started again.
    due: Option<Instant>,
}

impl Service {
    pub(super) fn new(
        name: &'static str,
        program: PathBuf,
        arguments: Vec<OsString>,
        identity: Option<(Uid, Gid)>,
        notices: Notices,
    ) -> Self {
        let (child, kept, started) = (None, Kept::new(), Instant::now());
        let (pause, longest, due) = (FIRST_PAUSE, LONGEST_PAUSE, None);
        Self { name, program, arguments, identity, notices, child, kept, pause, longest, started, due }
    }

    /// Never to be away for longer than this, however often it ends.
    pub(super) fn back_within(self, longest: Duration) -> Self {
        Self { longest, ..self }
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
        let owner = self.kept.get(OWNER).and_then(|kept| kept.first());
        let inherits = |flags| owner.map_or(Ok(()), |socket| fcntl_setfd(socket, flags));
        if let Some(socket) = owner {
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

    /// Waits until it ends, or is to be started again, and sees to that. To be called again and again: as long as it is, the service is
    /// kept, whatever becomes of its program. Cancel safe.
    pub(super) async fn keep(&mut self) {
        let Some(due) = self.due else {
            let status = self.ended().await;
            if self.started.elapsed() > LONGEST_PAUSE * 3 {
                self.pause = FIRST_PAUSE;
            }
            self.child = None;
            error!(service = self.name, %status, pause_ms = milliseconds(self.pause), "ended by itself; starting it again");
            return self.put_off();
        };
        sleep_until(due).await;
        self.due = None;
        // What it left is kept here, and nobody would start it if this program gave up.
        if let Err(error) = self.start() {
            error!(
                service = self.name,
                error = &error as &dyn std::error::Error,
                pause_ms = milliseconds(self.pause),
                "cannot be started; trying again"
            );
            self.put_off();
        }
    }

    fn put_off(&mut self) {
        self.due = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(self.longest);
    }

    /// Its end; what it says meanwhile is taken note of. Cancel safe.
    async fn ended(&mut self) -> ExitStatus {
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

    pub(super) async fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw) else { return };
        if kill(pid, Signal::SIGTERM).is_ok() && timeout(Duration::from_secs(10), child.wait()).await.is_err() {
            warn!(service = self.name, "did not stop within 10 s; killed");
            let _ = child.kill().await;
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Keeps what is to be kept; whether the service is ready.
fn take(kept: &mut Kept, notice: Notice) -> bool {
    if notice.forget {
        kept.remove(&notice.name);
    }
    if !notice.keep.is_empty() && (kept.len() < MOST_NAMES || kept.contains_key(&notice.name)) {
        kept.insert(notice.name, notice.keep);
    }
    notice.ready
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_program_that_is_away_for_a_while_is_started_once_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let (program, aside) = (dir.path().join("program"), dir.path().join("aside"));
        fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let notices = Notices::listen(&dir.path().join("notify.sock"), None).unwrap();
        let mut service = Service::new("program", program.clone(), Vec::new(), None, notices).back_within(FIRST_PAUSE);
        service.start().unwrap();
        fs::rename(&program, &aside).unwrap();
        let pid = Pid::from_raw(service.child.as_ref().unwrap().id().unwrap().cast_signed());
        kill(pid, Signal::SIGKILL).unwrap();
        // Its end, and two starts that fail.
        for _ in 0..3 {
            service.keep().await;
            assert!(service.child.is_none() && service.due.is_some());
        }
        fs::rename(&aside, &program).unwrap();
        assert!(service.due.is_some_and(|due| due <= Instant::now() + FIRST_PAUSE), "tried again within a pause");
        service.keep().await;
        assert!(service.child.is_some() && service.due.is_none());
        service.stop().await;
    }
}
