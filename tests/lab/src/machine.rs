//! A machine that boots: systemd as the first process of namespaces of its own, over a copy of this machine's files, with an
//! engine as `docker.service`. For what only an init can show: units, their order, users, a reboot.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::engine::Kind;
use crate::host::binary;
use crate::process::{self, Process, eventually};

const BOOTS_WITHIN: Duration = Duration::from_secs(90);

/// A running machine; off and gone when dropped.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    name: String,
    path: OsString,
    /// Boots it, again and again.
    power: Option<Process>,
}

impl Machine {
    /// Boots one with our programs in /usr/local/bin, or says why it cannot be tried here.
    ///
    /// # Errors
    /// The reason, for [`crate::skip!`].
    ///
    /// # Panics
    /// Where it is possible and doesn't boot.
    pub fn boot() -> Result<Self, String> {
        if let Some(reason) = process::lacks_root() {
            return Err(reason);
        }
        if !Path::new("/lib/systemd/systemd").is_file() {
            return Err("needs systemd's files on this machine (package systemd); it need not run".to_owned());
        }
        if !Path::new("/sys/fs/cgroup/systemd/cgroup.procs").is_file() {
            return Err("needs the cgroup hierarchy of systemd's own (/sys/fs/cgroup/systemd): this machine has cgroup v2 alone".to_owned());
        }
        let kind = Kind::chosen().ok_or("needs a Docker Engine: run tests/setup/engine")?;
        let folders = kind.programs().ok_or_else(|| format!("needs the engine {kind:?}: run tests/setup/engine"))?;
        let name = process::unique("machine");
        let dir = Path::new("/tmp").join(&name);
        fs::create_dir_all(&dir).map_err(|e| format!("cannot write to /tmp: {e}"))?;
        let engine = std::env::join_paths(&folders).expect("no folder on PATH has a colon in its name");
        let path = std::env::join_paths(
            folders.into_iter().chain(["/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from)),
        );
        let mut machine = Self { dir, name, path: path.expect("as before"), power: None };
        let script = machine.dir.join("machine.sh");
        fs::write(&script, include_str!("machine.sh")).expect("/tmp can be written");
        let log = File::create(machine.log()).expect("/tmp can be written");
        let mut power = Command::new("unshare");
        power.args(["--mount", "--propagation", "private", "/bin/bash"]).arg(script).arg(&machine.dir).arg(&machine.name).arg(engine);
        power.stdout(log.try_clone().expect("a file can be opened twice")).stderr(log);
        machine.power = Some(Process::start(&mut power));
        machine.is_up();
        for program in ["bulkhead", "bulkhead-agent"] {
            machine.put(&binary(program), &format!("/usr/local/bin/{program}"));
        }
        Ok(machine)
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The first process, as this machine counts: systemd, once it is that.
    fn init(&self) -> Option<u32> {
        let child = |pid: u32| -> Option<u32> {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            children.split_whitespace().next()?.parse().ok()
        };
        let init = child(child(self.power.as_ref()?.id())?)?;
        (fs::read_to_string(format!("/proc/{init}/comm")).ok()?.trim() == "systemd").then_some(init)
    }

    fn is_up(&self) {
        eventually(BOOTS_WITHIN, || {
            let said = || fs::read_to_string(self.log()).unwrap_or_default();
            if self.init().is_none() {
                return Err(format!("it does not boot:\n{}", said()));
            }
            let state = self.output("systemctl is-system-running; systemctl is-active docker");
            let state = String::from_utf8_lossy(&state.stdout).into_owned();
            if state == "running\nactive\n" { Ok(()) } else { Err(format!("{state}\n{}", said())) }
        });
    }

    /// Runs shell words on it; their exit is the caller's to judge.
    ///
    /// # Panics
    /// Where no program can be started there.
    pub fn output(&self, words: &str) -> Output {
        let init = self.init().map_or_else(|| "0".to_owned(), |pid| pid.to_string());
        let mut command = Command::new("nsenter");
        command.args(["-t", &init, "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "env", "-i", "HOME=/root", "NO_COLOR=1"]);
        let mut path = OsString::from("PATH=");
        path.push(&self.path);
        command.arg(path).args(["sh", "-c", words]).stdin(Stdio::null()).output().expect("nsenter can be started")
    }

    /// Runs shell words that must succeed; what they printed.
    ///
    /// # Panics
    /// Where they fail.
    pub fn check(&self, words: &str) -> String {
        let output = self.output(words);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{words}: {}\n{out}{err}", output.status);
        out.into_owned()
    }

    /// Copies a file of this machine there.
    fn put(&self, file: &Path, to: &str) {
        let root = format!("/proc/{}/root", self.init().expect("it is up"));
        fs::copy(file, format!("{root}{to}")).unwrap_or_else(|e| panic!("cannot copy {} to {to}: {e}", file.display()));
    }

    /// Shuts it down in order, and boots it again.
    ///
    /// # Panics
    /// Where it doesn't end or doesn't come back.
    pub fn reboot(&self) {
        let before = self.init();
        self.check("systemctl reboot --no-block");
        eventually(BOOTS_WITHIN, || if self.init().is_some_and(|now| Some(now) != before) { Ok(()) } else { Err("it does not go down") });
        self.is_up();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing to tell if it can't: what is killed does not boot again either.
        let _ = fs::write(self.dir.join("off"), "");
        drop(self.power.take());
        process::end_cgroups(&self.name);
        process::remove_dir_with_mounts(&self.dir);
        process::forget(&self.name);
    }
}
