//! `bulkhead up`: starts the agent and the controller, keeps them running, stops them together. It decides nothing and holds no
//! policy; when it ends, the last plan stays in the kernel.

pub mod down;
mod identity;
mod notify;
mod service;
pub mod units;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use nix::unistd::{Gid, Pid, Uid};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tracing::{info, warn};

use notify::Notices;
use service::Service;

/// Above the options that every command takes, below its own.
pub(crate) const EVERYWHERE: &str = "Options of every command";

/// Where files are. Two hosts in one machine (labs) need two of each.
#[derive(Clone, Debug, Args)]
pub struct Places {
    /// What must survive a reboot: the store, the agent's plan and spool (BULKHEAD_STATE_DIR).
    #[arg(long, default_value_os_t = place("BULKHEAD_STATE_DIR", "/var/lib/bulkhead"), value_name = "DIR", global = true, help_heading = EVERYWHERE)]
    pub state_dir: PathBuf,
    /// Sockets (BULKHEAD_RUN_DIR).
    #[arg(long, default_value_os_t = place("BULKHEAD_RUN_DIR", "/run/bulkhead"), value_name = "DIR", global = true, help_heading = EVERYWHERE)]
    pub run_dir: PathBuf,
}

/// By clap's own `env` each usage line would show what the environment says as if it had to be typed.
fn place(variable: &str, usual: &str) -> PathBuf {
    std::env::var_os(variable).filter(|path| !path.is_empty()).map_or_else(|| usual.into(), PathBuf::from)
}

impl Places {
    /// The command line's socket.
    pub fn api(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }

    /// The agents' socket.
    pub fn node(&self) -> PathBuf {
        self.run_dir.join("node.sock")
    }

    /// The controller's own state.
    pub fn controller(&self) -> PathBuf {
        self.state_dir.join("controller")
    }

    /// The agent's own state.
    pub fn agent(&self) -> PathBuf {
        self.state_dir.join("agent")
    }

    /// In a folder that is root's alone: who could take it away would hide the supervisor from `down`.
    fn pid_file(&self) -> PathBuf {
        self.agent().join("up.pid")
    }
}

/// Flags of the agent that `up` and `install` hand through.
#[derive(Clone, Debug, Default, Args)]
pub struct AgentFlags {
    /// The Docker Engine, as in DOCKER_HOST (default: DOCKER_HOST, then the current docker context, then the engine's own socket).
    #[arg(long, value_name = "URL")]
    pub docker_host: Option<String>,
    /// The network namespace that the engine runs in, if it is not this one.
    #[arg(long, value_name = "PATH|PID")]
    pub netns: Option<PathBuf>,
    /// This node's name (default: the host's name).
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub node: Option<String>,
    /// Serve the agent's metrics (Prometheus) here.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub agent_metrics: Option<std::net::SocketAddr>,
}

impl AgentFlags {
    /// `user`: whom the agent takes for the controller, as the agent reads it.
    fn arguments(&self, places: &Places, user: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["run".into(), "--state-dir".into(), places.agent().into()];
        arguments.extend(["--controller".into(), places.node().into(), "--controller-user".into(), user.into()]);
        let mut flag = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                arguments.extend([name.into(), value]);
            }
        };
        flag("--docker-host", self.docker_host.clone().map(Into::into));
        flag("--netns", self.netns.clone().map(Into::into));
        flag("--node", self.node.clone().map(Into::into));
        flag("--metrics", self.agent_metrics.map(|a| a.to_string().into()));
        arguments
    }
}

/// `bulkhead up`
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Return once both are ready; logs go to STATE_DIR/bulkhead.log.
    #[arg(short, long)]
    pub detach: bool,
    /// The user the controller runs as: `bulkhead` if it exists, else a user id that is nobody's.
    #[arg(long, value_name = "USER")]
    pub controller_user: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub agent: AgentFlags,
}

/// `bulkhead check`
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The Docker Engine, as in DOCKER_HOST.
    #[arg(long, value_name = "URL")]
    pub docker_host: Option<String>,
    /// The network namespace that the engine runs in, if it is not this one.
    #[arg(long, value_name = "PATH|PID")]
    pub netns: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
}

/// Asks the agent's program what this host lacks.
///
/// # Errors
/// `Agent` if something fails that is needed.
pub fn check(places: &Places, args: &CheckArgs) -> Result<(), SuperviseError> {
    let mut arguments: Vec<OsString> = vec!["check".into(), "--state-dir".into(), places.agent().into()];
    if let Some(docker_host) = &args.docker_host {
        arguments.extend(["--docker-host".into(), docker_host.into()]);
    }
    if let Some(netns) = &args.netns {
        arguments.extend(["--netns".into(), netns.into()]);
    }
    if args.json {
        arguments.push("--json".into());
    }
    run_agent(&arguments)
}

/// Why `up`, `down` or `install` could not do it.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// Not root.
    #[error("this needs root: the agent changes the host's packet filter. Run it with sudo")]
    NotRoot,
    /// It runs already.
    #[error("Bulkhead is up already (pid {pid}): `bulkhead status` shows it, `bulkhead down` ends it")]
    AlreadyUp {
        /// The supervisor.
        pid: i32,
    },
    /// A user that is not there.
    #[error("there is no user {name} for the controller to run as: name one with --controller-user")]
    NoUser {
        /// Who was asked for.
        name: String,
    },
    /// The agent's program is missing.
    #[error("bulkhead-agent is neither beside {beside} nor on PATH: build it with `cargo build --release`, or install both")]
    NoAgent {
        /// Our own program.
        beside: PathBuf,
    },
    /// A file or process could not be made.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The controller's user may not start our program.
    #[error("the controller runs as {user}, who may not start {}: a folder above it is closed to others", program.display())]
    NotForAll {
        /// Our own program.
        program: PathBuf,
        /// Who may not.
        user: String,
    },
    /// It ended instead of getting ready.
    #[error("{name} ended before it was ready: {words}")]
    Ended {
        /// Which.
        name: &'static str,
        /// Its last words, or where they are.
        words: String,
    },
    /// A child did not get ready.
    #[error("the {name} did not get ready within {seconds} s: see {log}")]
    NotReady {
        /// Which.
        name: &'static str,
        /// How long we waited.
        seconds: u64,
        /// Where its words are.
        log: String,
    },
    /// The agent's own command failed; it has said why.
    #[error("bulkhead-agent {command} failed with {status}")]
    Agent {
        /// Which command.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The person said no.
    #[error("nothing was changed")]
    Declined,
    /// There is nobody to ask.
    #[error("this asks before it acts, and there is no terminal to ask on: add --yes")]
    NobodyToAsk,
}

pub(crate) fn io_at(what: impl Into<String>) -> impl FnOnce(io::Error) -> SuperviseError {
    let what = what.into();
    move |source| SuperviseError::Io { what, source }
}

/// The agent's program: beside ours, or on PATH.
///
/// # Errors
/// `NoAgent`.
pub fn agent_program() -> Result<PathBuf, SuperviseError> {
    let own = std::env::current_exe().map_err(io_at("find our own program"))?;
    let beside = own.with_file_name("bulkhead-agent");
    let on_path =
        || std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).map(|dir| dir.join("bulkhead-agent")).find(|p| p.is_file());
    if beside.is_file() { Ok(beside) } else { on_path().ok_or(SuperviseError::NoAgent { beside: own }) }
}

/// Runs one of the agent's commands in the foreground.
///
/// # Errors
/// `Agent` with its status if it failed.
pub fn run_agent(arguments: &[OsString]) -> Result<(), SuperviseError> {
    let status = std::process::Command::new(agent_program()?).args(arguments).status().map_err(io_at("start bulkhead-agent"))?;
    let command = arguments.first().map(|a| a.to_string_lossy().into_owned()).unwrap_or_default();
    if status.success() { Ok(()) } else { Err(SuperviseError::Agent { command, status }) }
}

/// What was complained about last in this log since `from`, bytes; else where to look.
fn last_words(log: &Path, from: u64) -> String {
    let text = fs::read(log).unwrap_or_default();
    let since = text.get(usize::try_from(from).unwrap_or(usize::MAX)..).unwrap_or_default();
    let since = String::from_utf8_lossy(since);
    let complaint = |line: &&str| line.starts_with("bulkhead-agent: ") || line.starts_with("bulkhead: ");
    since.lines().find(complaint).map_or_else(|| format!("see {}", log.display()), |line| format!("{line} (log: {})", log.display()))
}

fn make_places(places: &Places, uid: Uid, gid: Gid) -> Result<(), SuperviseError> {
    let make = |dir: &Path, mode: u32, owner: Option<(Uid, Gid)>| -> Result<(), SuperviseError> {
        let made = fs::create_dir_all(dir).and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)));
        made.and_then(|()| owner.map_or(Ok(()), |(uid, gid)| chown(dir, Some(uid.as_raw()), Some(gid.as_raw()))))
            .map_err(io_at(format!("make {}", dir.display())))
    };
    make(&places.state_dir, 0o755, None)?;
    make(&places.run_dir, 0o755, Some((uid, gid)))?;
    make(&places.controller(), 0o700, Some((uid, gid)))?;
    // Files of an earlier run under another user would lock the controller out of its own store.
    for entry in fs::read_dir(places.controller()).map_err(io_at("read the controller's state"))?.flatten() {
        // Not what a link points to: the controller can put one there.
        lchown(entry.path(), Some(uid.as_raw()), Some(gid.as_raw()))
            .map_err(io_at(format!("hand {} to the controller", entry.path().display())))?;
    }
    make(&places.agent(), 0o700, None)
}

/// The supervisor that runs here, if one does.
pub fn running(places: &Places) -> Option<Pid> {
    // A supervisor of an earlier version has it among the sockets.
    let text = fs::read_to_string(places.pid_file()).or_else(|_| fs::read_to_string(places.run_dir.join("up.pid"))).ok()?;
    let pid: i32 = text.trim().parse().ok()?;
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = cmdline.split(|&b| b == 0);
    let program = words.next().is_some_and(|word| word.ends_with(b"bulkhead"));
    // A pid is reused; ours was started as `bulkhead ... up`.
    (program && words.any(|word| word == b"up")).then(|| Pid::from_raw(pid))
}

/// Starts both and keeps them, until a signal; or detaches once both are ready.
///
/// # Errors
/// Each [`SuperviseError`].
pub fn up(places: &Places, args: &UpArgs) -> Result<(), SuperviseError> {
    if !Uid::effective().is_root() {
        return Err(SuperviseError::NotRoot);
    }
    if let Some(pid) = running(places) {
        return Err(SuperviseError::AlreadyUp { pid: pid.as_raw() });
    }
    let identity = identity::controller(args.controller_user.as_deref(), &places.controller())?;
    identity::must_be_startable(&std::env::current_exe().map_err(io_at("find our own program"))?, identity)?;
    make_places(places, identity.0, identity.1)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io_at("start the runtime"))?;
    let shared = identity::shared(identity.0);
    if args.detach {
        runtime.block_on(detached(places))?;
        shared.iter().for_each(|line| println!("{line}"));
        Ok(())
    } else {
        shared.iter().for_each(|line| warn!("{line}"));
        runtime.block_on(supervise(places, args, identity))
    }
}

/// While the agent is away nobody new is bound, and nothing is repaired.
const AGENT_BACK_WITHIN: Duration = Duration::from_secs(1);

/// How long both may take to be ready: the engine's list, a first dump, a store of a million edges.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// The same command again without -d, in a session of its own; returns when it says it is ready.
async fn detached(places: &Places) -> Result<(), SuperviseError> {
    let log_path = places.state_dir.join("bulkhead.log");
    let log = fs::OpenOptions::new().create(true).append(true).open(&log_path).map_err(io_at(format!("open {}", log_path.display())))?;
    let before = log.metadata().map_or(0, |known| known.len());
    let errors = log.try_clone().map_err(io_at("open the log twice"))?;
    let ready = Notices::listen(&places.agent().join("notify-up.sock"), None)?;
    let own = std::env::current_exe().map_err(io_at("find our own program"))?;
    let arguments = std::env::args_os().skip(1).filter(|a| a != "-d" && a != "--detach");
    let mut command = Command::new("setsid");
    command.arg(own).args(arguments).env("NOTIFY_SOCKET", &ready.path).stdin(Stdio::null()).stdout(log).stderr(errors);
    let mut child = command.spawn().map_err(io_at("start setsid (package util-linux)"))?;
    let is_ready = async { while !ready.next().await.ready {} };
    let not_ready =
        || SuperviseError::NotReady { name: "supervisor", seconds: READY_WITHIN.as_secs(), log: log_path.display().to_string() };
    tokio::select! {
        heard = timeout(READY_WITHIN + Duration::from_secs(5), is_ready) => heard.map_err(|_| not_ready())?,
        _ = child.wait() => return Err(SuperviseError::Ended { name: "it", words: last_words(&log_path, before) }),
    }
    println!("Up: agent and controller run; their log is {}.", log_path.display());
    Ok(())
}

/// Writes a file: never through a link that is in its place.
fn write_anew(path: &Path, text: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    fs::File::create_new(path)?.write_all(text.as_bytes())
}

async fn supervise(places: &Places, args: &UpArgs, identity: (Uid, Gid)) -> Result<(), SuperviseError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_at("listen for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_at("listen for signals"))?;
    write_anew(&places.pid_file(), &format!("{}\n", std::process::id())).map_err(io_at("write the pid file"))?;
    let own = std::env::current_exe().map_err(io_at("find our own program"))?;
    let controller =
        vec!["controller".into(), "--state-dir".into(), places.state_dir.clone().into(), "--run-dir".into(), places.run_dir.clone().into()];
    let heard = Notices::listen(&places.run_dir.join("notify-controller.sock"), Some(identity))?;
    let mut controller = Service::new("controller", own, controller, Some(identity), heard);
    // In a folder that is root's alone: whoever stood in its place would be given the socket that owns the tables.
    let heard = Notices::listen(&places.agent().join("notify.sock"), None)?;
    let arguments = args.agent.arguments(places, &format!("{}:{}", identity.0, identity.1));
    let mut agent = Service::new("agent", agent_program()?, arguments, None, heard).back_within(AGENT_BACK_WITHIN);
    let outcome = async {
        controller.start()?;
        controller.wait_ready().await?;
        agent.start()?;
        agent.wait_ready().await?;
        info!("up: agent and controller are ready");
        // Nobody listens when it was started by hand.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        loop {
            tokio::select! {
                () = controller.keep() => {}
                () = agent.keep() => {}
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            }
        }
    }
    .await;
    info!("stopping; what is enforced stays in the kernel (`bulkhead down` takes it away)");
    agent.stop().await;
    controller.stop().await;
    let _ = fs::remove_file(places.pid_file());
    outcome
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_link_that_the_controller_left_gives_it_nothing_of_roots() {
        if !Uid::effective().is_root() {
            println!("skipped: giving files away needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "root's").unwrap();
        let places = Places { state_dir: dir.path().join("state"), run_dir: dir.path().join("run") };
        fs::create_dir_all(places.controller()).unwrap();
        fs::create_dir_all(&places.run_dir).unwrap();
        symlink(&precious, places.controller().join("store.db")).unwrap();
        fs::create_dir_all(places.agent()).unwrap();
        symlink(&precious, places.pid_file()).unwrap();
        make_places(&places, Uid::from_raw(65_534), Gid::from_raw(65_534)).unwrap();
        write_anew(&places.pid_file(), "1\n").unwrap();
        assert_eq!(fs::metadata(&precious).unwrap().uid(), 0);
        assert_eq!(fs::read_to_string(&precious).unwrap(), "root's");
    }
}
