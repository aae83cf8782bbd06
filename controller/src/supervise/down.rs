//! `bulkhead down`: everything out of the kernel, everything as it was. It works with the controller, the agent and the engine dead:
//! the agent's program does the work from what it left on disk.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use policy::{Mode, NodePlan};

use super::{Places, SuperviseError, agent_program, io_at, run_agent, running, units};

/// `bulkhead down`
#[derive(Clone, Debug, Args)]
pub struct DownArgs {
    /// Do not ask.
    #[arg(short, long)]
    pub yes: bool,
    /// Remove the store, the agent's state, the units and the system user too: everything learned and decided is gone.
    #[arg(long)]
    pub purge: bool,
    /// Why, for the record.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub comment: String,
    /// The network namespace to clean, if the agent's state does not say.
    #[arg(long, value_name = "PATH|PID")]
    pub netns: Option<PathBuf>,
}

/// What `down` takes protection from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exposed {
    /// Segments in Enforce, by name.
    pub enforced: Vec<String>,
    /// Workloads in quarantine.
    pub quarantined: Vec<String>,
}

impl Exposed {
    fn of(plan: Option<&NodePlan>) -> Self {
        let Some(plan) = plan else { return Self::default() };
        Self {
            enforced: plan.set.segments.values().filter(|s| s.mode == Mode::Enforce).map(|s| s.name.clone()).collect(),
            quarantined: plan.set.quarantines.keys().map(ToString::to_string).collect(),
        }
    }

    fn tell(&self) {
        if self.enforced.is_empty() && self.quarantined.is_empty() {
            println!("No segment is in Enforce: nothing loses protection.");
            return;
        }
        if !self.enforced.is_empty() {
            println!("These segments lose protection: {}", self.enforced.join(", "));
        }
        if !self.quarantined.is_empty() {
            println!("These workloads leave quarantine: {}", self.quarantined.join(", "));
        }
    }
}

/// The plan that is stored on this node, read by the agent's program: it is the agent's file.
fn stored_plan(places: &Places) -> Option<NodePlan> {
    let output = std::process::Command::new(agent_program().ok()?).arg("plan").arg("--state-dir").arg(places.agent()).output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

/// A network namespace that stays while this is held, also if it was named by a process that `down` ends.
struct Namespace(fs::File);

impl Namespace {
    /// By a file, or the number of a process in it.
    fn open(named: &Path) -> Result<Self, SuperviseError> {
        let number = named.to_str().filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
        let path = number.map_or_else(|| named.to_owned(), |pid| format!("/proc/{pid}/ns/net").into());
        let what =
            format!("open the network namespace {}: give the number of a process in it, or a file such as /run/netns/NAME", path.display());
        Ok(Self(fs::File::open(&path).map_err(io_at(what))?))
    }

    /// For a process that this one waits for.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// Takes everything away. `record` writes the decision down before anything is touched; it gets the subject and the comment, and
/// says what could not be written.
///
/// # Errors
/// Each [`SuperviseError`]; `Declined` if the person said no.
pub fn down(places: &Places, args: &DownArgs, record: impl FnOnce(&str, &str) -> Result<(), String>) -> Result<(), SuperviseError> {
    if !Uid::effective().is_root() {
        return Err(SuperviseError::NotRoot);
    }
    let netns = args.netns.as_deref().map(Namespace::open).transpose()?;
    let mut arguments: Vec<OsString> = vec!["down".into(), "--state-dir".into(), places.agent().into()];
    if let Some(netns) = &netns {
        arguments.extend(["--netns".into(), netns.path().into()]);
    }
    // Where it is not the place to work in, nothing is to be stopped, and there is nothing to record.
    run_agent(&[&arguments[..], &["--only-look".into()]].concat())?;
    let exposed = Exposed::of(stored_plan(places).as_ref());
    exposed.tell();
    if args.purge {
        println!("The store in {} is removed: everything learned and decided is gone.", places.state_dir.display());
    }
    if !args.yes {
        ask("Take Bulkhead down?")?;
    }
    let subject = if exposed.enforced.is_empty() { "nothing was enforced".to_owned() } else { exposed.enforced.join(", ") };
    match record(&subject, &args.comment) {
        Ok(()) => {}
        // A damaged store must not keep a person from getting their host back.
        Err(why) => eprintln!("bulkhead: the decision could not be recorded ({why}); going on"),
    }
    let by_systemd = units::stop()?;
    if let Some(supervisor) = running(places) {
        stop_process(supervisor)?;
    } else if !by_systemd {
        println!("No supervisor runs: cleaning up what is left.");
    }
    run_agent(&arguments)?;
    if args.purge {
        units::uninstall()?;
        for dir in [&places.state_dir, &places.run_dir] {
            match fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io_at(format!("remove {}", dir.display()))(e)),
                Ok(()) | Err(_) => {}
            }
        }
        println!("Down; store and state are removed.");
    } else {
        println!("Down. The store stays in {}: `bulkhead up` continues, `bulkhead down --purge` removes it.", places.state_dir.display());
    }
    Ok(())
}

/// Long enough for the supervisor to stop both of its children, ten seconds each at most.
const STOPS_WITHIN: Duration = Duration::from_secs(25);

fn stop_process(pid: Pid) -> Result<(), SuperviseError> {
    let what = || format!("stop the supervisor (pid {pid})");
    let gone = || kill(pid, None).is_err() || is_zombie(pid);
    kill(pid, Signal::SIGTERM).map_err(|e| io_at(what())(e.into()))?;
    let deadline = Instant::now() + STOPS_WITHIN;
    while !gone() {
        if Instant::now() > deadline {
            kill(pid, Signal::SIGKILL).map_err(|e| io_at(what())(e.into()))?;
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A child that nobody waits for (an init that doesn't reap, as in a container) has ended all the same.
fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The command stands in parentheses and may hold anything; the state follows the last one (proc_pid_stat(5)).
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

/// Asks on the terminal.
///
/// # Errors
/// `Declined` on anything but yes; `NobodyToAsk` without a terminal.
pub fn ask(question: &str) -> Result<(), SuperviseError> {
    if !std::io::stdin().is_terminal() {
        return Err(SuperviseError::NobodyToAsk);
    }
    print!("{question} [y/N] ");
    std::io::stdout().flush().map_err(io_at("write to the terminal"))?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(io_at("read from the terminal"))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(SuperviseError::Declined) }
}
