//! Bulkhead itself on a host of the lab: the two programs as cargo built them, with state and run folders of their own.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use crate::engine::Engine;
use crate::process::{self, Process};

/// An engine's host with Bulkhead on it.
#[derive(Debug)]
pub struct Host<'e> {
    /// The engine it guards.
    pub engine: &'e Engine,
    /// BULKHEAD_STATE_DIR.
    pub state_dir: PathBuf,
    /// BULKHEAD_RUN_DIR.
    pub run_dir: PathBuf,
    programs: PathBuf,
    log: PathBuf,
    environment: Vec<(String, String)>,
}

impl<'e> Host<'e> {
    /// Prepares the folders; nothing is started.
    ///
    /// # Panics
    /// Where the engine's folder cannot be written.
    pub fn on(engine: &'e Engine) -> Self {
        let made = Self::prepared(engine);
        let base = engine.dir.join("bulkhead");
        for dir in [&made.state_dir, &made.run_dir, &made.programs] {
            fs::create_dir_all(dir).expect("the engine's folder can be written");
        }
        // The controller runs as a user who may not enter the folder of the sources: it is started from a copy.
        for program in ["bulkhead", "bulkhead-agent"] {
            let (from, to) = (binary(program), made.programs.join(program));
            // An earlier one may be the same file: a copy onto itself would empty it.
            let _ = fs::remove_file(&to);
            let linked = fs::hard_link(&from, &to).is_ok() || fs::copy(&from, &to).is_ok();
            assert!(linked, "{} cannot be copied to {}", from.display(), to.display());
        }
        let open = [&engine.dir, &base, &made.state_dir, &made.run_dir, &made.programs];
        process::check(Command::new("chmod").arg("0755").args(open));
        made
    }

    /// Sets a variable for every program of ours that is started from here on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Where our programs are.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The same host again, for whoever owns the engine and cannot keep a reference to it.
    pub fn prepared(engine: &'e Engine) -> Self {
        let inside = |name: &str| engine.dir.join("bulkhead").join(name);
        let environment = Vec::new();
        Self { engine, state_dir: inside("state"), run_dir: inside("run"), programs: inside("bin"), log: inside("log"), environment }
    }

    /// A program of ours with its folders and the engine in its environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.engine.command(self.programs.join(program));
        command.env("BULKHEAD_STATE_DIR", &self.state_dir).env("BULKHEAD_RUN_DIR", &self.run_dir).env("NO_COLOR", "1");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        // Where the command line remembers what it showed: not in the home of whoever runs the tests.
        command.env("XDG_STATE_HOME", self.engine.dir.join("bulkhead/shown"));
        command
    }

    /// `bulkhead` with these words, inside the namespace; its exit is the caller's to judge.
    pub fn try_bulkhead<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.engine.netns.output(self.command("bulkhead").args(args).stdin(Stdio::null()))
    }

    /// `bulkhead` with these words, inside the namespace, which must succeed; what it printed.
    pub fn bulkhead<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        self.engine.netns.check(self.command("bulkhead").args(args))
    }

    /// Whether an agent is connected now, and `also` so by the text of `bulkhead status`.
    ///
    /// # Errors
    /// That text, which says otherwise.
    pub fn is_connected(&self, also: impl Fn(&str) -> bool) -> Result<(), String> {
        let out = self.try_bulkhead(["status"]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        // A session that ended is "not connected", and the last that was heard in it may well be "plan in force".
        let is = text.contains(" connected") && !text.contains("not connected");
        if is && also(&text) { Ok(()) } else { Err(format!("{text}{}", String::from_utf8_lossy(&out.stderr))) }
    }

    /// Whether the agent that runs now has the latest plan in force.
    ///
    /// # Errors
    /// The text of `bulkhead status`, which says otherwise.
    pub fn is_in_force(&self) -> Result<(), String> {
        self.is_connected(|status| status.contains("plan in force") && !status.contains("is not followed"))
    }

    /// Starts one of the two programs inside the namespace; what it says goes to [`Host::said`].
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start<S: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = S>) -> Process {
        let log = File::options().create(true).append(true).open(&self.log).expect("the engine's folder can be written");
        let again = log.try_clone().expect("a file can be opened twice");
        self.engine.netns.spawn(self.command(program).args(args).stdout(again).stderr(log))
    }

    /// `bulkhead up` in the foreground, ready when `bulkhead status` succeeds.
    ///
    /// # Panics
    /// Where it ends or is not ready within 30 s, with what it said.
    pub fn up(&self) -> Process {
        let mut process = self.start("bulkhead", ["up"]);
        let end = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            let status = self.try_bulkhead(["status"]);
            if status.status.success() {
                return process;
            }
            let late = std::time::Instant::now() > end;
            if let Some(code) = process.ended() {
                panic!("bulkhead up ended with {code}:\n{}", self.said());
            }
            assert!(!late, "bulkhead up is not ready: {}\n{}", String::from_utf8_lossy(&status.stderr), self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the started programs have printed so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let detached = fs::read_to_string(self.state_dir.join("bulkhead.log")).unwrap_or_default();
            eprintln!("what Bulkhead said:\n{}{detached}", self.said());
        }
    }
}

/// A program of the workspace, built by the same cargo and profile as the running test. It is brought up to date once a
/// process, since cargo does not build other packages' programs for a test; `BULKHEAD_BUILT=1` says that somebody did, and
/// `BULKHEAD_PROGRAMS=FOLDER` that they are there.
///
/// # Panics
/// Where it cannot be built.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os("BULKHEAD_PROGRAMS") {
            return folder.into();
        }
        let test = std::env::current_exe().expect("a test knows its own path");
        let folder = test.ancestors().nth(2).expect("a test is in target/PROFILE/deps").to_path_buf();
        if std::env::var_os("BULKHEAD_BUILT").is_none()
            && let Some(cargo) = std::env::var_os("CARGO")
        {
            let mut build = Command::new(cargo);
            build.current_dir(Path::new(env!("CARGO_MANIFEST_DIR"))).args(["build", "--quiet", "--workspace", "--bins"]);
            if folder.ends_with("release") {
                build.arg("--release");
            }
            process::check(&mut build);
        }
        folder
    });
    let program = folder.join(name);
    assert!(program.is_file(), "{} is not built: run cargo build --workspace", program.display());
    program
}
