//! `bulkhead install`: systemd units, and the system user the controller runs as. The agent's unit is ordered before the engine's,
//! so that the last plan is in the kernel before the first `restart: always` container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use nix::unistd::{Group, Uid, User};

use super::{AgentFlags, Places, SuperviseError, agent_program, io_at};

/// `bulkhead install`
#[derive(Clone, Debug, Args)]
pub struct InstallArgs {
    /// Write below this directory instead of /, and neither make the user nor talk to systemd (for packages).
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Do not enable and start the units.
    #[arg(long)]
    pub no_start: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub agent: AgentFlags,
}

const AGENT_UNIT: &str = "bulkhead-agent.service";
const CONTROLLER_UNIT: &str = "bulkhead-controller.service";
/// The system user that the controller runs as.
const USER: &str = "bulkhead";
const UNIT_DIR: &str = "etc/systemd/system";

/// A word of an ExecStart line: quoted, with systemd's own specifiers escaped (systemd.service(5), "Command lines").
fn quoted(word: &std::ffi::OsStr) -> String {
    let text = word.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    if text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=@%$".contains(c)) { text } else { format!("\"{text}\"") }
}

fn agent_unit(program: &Path, places: &Places, flags: &AgentFlags) -> String {
    let words: Vec<String> =
        std::iter::once(program.as_os_str().to_owned()).chain(flags.arguments(places, USER)).map(|w| quoted(&w)).collect();
    // To enter another namespace, and that alone.
    let more = if flags.netns.is_some() { " CAP_SYS_ADMIN" } else { "" };
    format!(
        "[Unit]\n\
         Description=Bulkhead node agent\n\
         # The last plan is in the kernel before the engine starts its containers.\n\
         Before=docker.service\n\
         After=local-fs.target systemd-modules-load.service\n\
         # However often it is killed, it is started again; and what it left in the store of descriptors stays.\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         Type=notify\n\
         ExecStart={}\n\
         Restart=always\n\
         RestartSec=200ms\n\
         # The socket that owns the tables, for the next agent.\n\
         FileDescriptorStoreMax=4\n\
         Environment=FDSTORE=4\n\
         # A container that joins a guarded network gets nothing through until it is bound. The first counts within a control group, the\n\
         # second among them; what the agent learns with goes back by itself.\n\
         Nice=-15\n\
         CPUWeight=1000\n\
         # As the engine.\n\
         OOMScoreAdjust=-500\n\
         # Further than this the agent confines itself: it keeps the first, needs the second for that, and the last two to hang up a program\n\
         # of netfilter at its start.\n\
         CapabilityBoundingSet=CAP_NET_ADMIN CAP_SETPCAP CAP_BPF CAP_PERFMON{more}\n\
         NoNewPrivileges=yes\n\
         # The controller's socket is open to its group.\n\
         SupplementaryGroups={USER}\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        words.join(" ")
    )
}

fn controller_unit(program: &Path, places: &Places) -> String {
    let word = |path: &Path| quoted(path.as_os_str());
    format!(
        "[Unit]\n\
         Description=Bulkhead controller\n\
         After={AGENT_UNIT}\n\
         # However often it is killed, it is started again.\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         Type=notify\n\
         User=bulkhead\n\
         Group=bulkhead\n\
         ExecStartPre=+/bin/mkdir -p {controller}\n\
         ExecStartPre=+/bin/chown -h bulkhead:bulkhead {controller}\n\
         ExecStart={program} controller --state-dir {state} --run-dir {run}\n\
         Restart=always\n\
         RestartSec=200ms\n\
         RuntimeDirectory=bulkhead\n\
         RuntimeDirectoryPreserve=yes\n\
         NoNewPrivileges=yes\n\
         CapabilityBoundingSet=\n\
         PrivateDevices=yes\n\
         PrivateTmp=yes\n\
         ProtectHome=yes\n\
         ProtectSystem=strict\n\
         ReadWritePaths={controller} {run}\n\
         RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        program = word(program),
        state = word(&places.state_dir),
        run = word(&places.run_dir),
        controller = word(&places.controller()),
    )
}

/// Writes the units, makes the user, starts both.
///
/// # Errors
/// Each [`SuperviseError`].
pub fn install(places: &Places, args: &InstallArgs) -> Result<(), SuperviseError> {
    let packaging = args.root.is_some();
    if !packaging && !Uid::effective().is_root() {
        return Err(SuperviseError::NotRoot);
    }
    let own = std::env::current_exe().map_err(io_at("find our own program"))?;
    let dir = args.root.as_deref().unwrap_or(Path::new("/")).join(UNIT_DIR);
    fs::create_dir_all(&dir).map_err(io_at(format!("make {}", dir.display())))?;
    for (name, text) in [(AGENT_UNIT, agent_unit(&agent_program()?, places, &args.agent)), (CONTROLLER_UNIT, controller_unit(&own, places))]
    {
        let path = dir.join(name);
        fs::write(&path, text).map_err(io_at(format!("write {}", path.display())))?;
        println!("wrote {}", path.display());
    }
    if packaging {
        return Ok(());
    }
    if User::from_name("bulkhead").ok().flatten().is_none() {
        // A group that somebody made for its members already is the one.
        let group: &[&str] = if has_group() { &["--gid", "bulkhead"] } else { &["--user-group"] };
        let rest = ["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "bulkhead"];
        tell("useradd", &[group, &rest[..]].concat())?;
        println!("made the system user bulkhead");
    }
    // The controller's unit may write there and nowhere else, and systemd refuses a place that is not there.
    let (uid, gid) = super::identity::controller(Some("bulkhead"), &places.controller())?;
    super::make_places(places, uid, gid)?;
    if !systemd_runs() {
        println!("systemd does not run here: the units are written and not started");
        return Ok(());
    }
    tell("systemctl", &["daemon-reload"])?;
    if !args.no_start {
        tell("systemctl", &["enable", "--now", AGENT_UNIT, CONTROLLER_UNIT])?;
        println!("started {AGENT_UNIT} and {CONTROLLER_UNIT}");
    }
    Ok(())
}

fn has_group() -> bool {
    Group::from_name("bulkhead").ok().flatten().is_some()
}

/// sd_booted(3): this directory exists exactly when systemd is the init.
fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn tell(program: &str, arguments: &[&str]) -> Result<(), SuperviseError> {
    let what = format!("run {program} {}", arguments.join(" "));
    let status = Command::new(program).args(arguments).status().map_err(io_at(what.clone()))?;
    if status.success() { Ok(()) } else { Err(io_at(what)(std::io::Error::other(status.to_string()))) }
}

/// Stops the units if they are there; `down` calls it before it takes the tables away, or systemd would start the agent again.
pub(super) fn stop() -> Result<bool, SuperviseError> {
    let there = Path::new("/").join(UNIT_DIR).join(AGENT_UNIT).exists() && systemd_runs();
    if there {
        tell("systemctl", &["stop", AGENT_UNIT, CONTROLLER_UNIT])?;
    }
    Ok(there)
}

/// Takes units and user away.
pub(super) fn uninstall() -> Result<(), SuperviseError> {
    let dir = Path::new("/").join(UNIT_DIR);
    let ours: Vec<_> = [AGENT_UNIT, CONTROLLER_UNIT].into_iter().filter(|name| dir.join(name).exists()).collect();
    if !ours.is_empty() {
        if systemd_runs() {
            tell("systemctl", &[&["disable"], &ours[..]].concat())?;
        }
        for name in ours {
            let path = dir.join(name);
            fs::remove_file(&path).map_err(io_at(format!("remove {}", path.display())))?;
        }
        if systemd_runs() {
            tell("systemctl", &["daemon-reload"])?;
        }
    }
    if User::from_name("bulkhead").ok().flatten().is_some() {
        tell("userdel", &["bulkhead"])?;
    }
    // It stays with userdel where people are members.
    if has_group() {
        tell("groupdel", &["bulkhead"])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places { state_dir: "/var/lib/bulk head".into(), run_dir: "/run/bulkhead".into() }
    }

    #[test]
    fn the_agents_unit_comes_before_the_engine_and_quotes_what_systemd_would_split() {
        let flags = AgentFlags { node: Some("100%".to_owned()), ..AgentFlags::default() };
        let unit = agent_unit(Path::new("/usr/local/bin/bulkhead-agent"), &places(), &flags);
        assert!(unit.contains("\nBefore=docker.service\n"), "{unit}");
        assert!(unit.contains("--state-dir \"/var/lib/bulk head/agent\""), "{unit}");
        assert!(unit.contains("--node 100%%"), "{unit}");
    }

    #[test]
    fn the_agents_unit_keeps_its_socket_and_grants_what_it_keeps_and_no_more() {
        let unit = |flags: &AgentFlags| agent_unit(Path::new("/usr/local/bin/bulkhead-agent"), &places(), flags);
        let plain = unit(&AgentFlags::default());
        for line in [
            "FileDescriptorStoreMax=4",
            "Environment=FDSTORE=4",
            "StartLimitIntervalSec=0",
            "CapabilityBoundingSet=CAP_NET_ADMIN CAP_SETPCAP CAP_BPF CAP_PERFMON",
            "NoNewPrivileges=yes",
            "SupplementaryGroups=bulkhead",
            "Nice=-15",
            "CPUWeight=1000",
            "OOMScoreAdjust=-500",
        ] {
            assert!(plain.lines().any(|found| found == line), "{line}: {plain}");
        }
        assert!(plain.contains("--controller-user bulkhead"), "{plain}");
        let elsewhere = unit(&AgentFlags { netns: Some("/run/netns/engine".into()), ..AgentFlags::default() });
        assert!(elsewhere.contains("\nCapabilityBoundingSet=CAP_NET_ADMIN CAP_SETPCAP CAP_BPF CAP_PERFMON CAP_SYS_ADMIN\n"), "{elsewhere}");
    }

    #[test]
    fn the_controllers_unit_has_no_capability() {
        let unit = controller_unit(Path::new("/usr/local/bin/bulkhead"), &places());
        assert!(
            unit.contains("\nUser=bulkhead\n") && unit.contains("\nCapabilityBoundingSet=\n") && unit.contains("\nNoNewPrivileges=yes\n"),
            "{unit}"
        );
    }
}
