//! A real Docker Engine in a network namespace of its own, removed whole when dropped.
//!
//! Where the programs come from is the business of `tests/setup/engine`; here they are only looked for. The engine's data,
//! its socket and its containers' cgroups all carry the lab's unique name, so that nothing of another engine is ever touched.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::netns::Netns;
use crate::process::{self, Process, eventually, found};

/// Which engine, and with which way of writing its own rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whatever `dockerd` is on PATH.
    OnPath,
    /// Debian 12's 20.10, rules by iptables.
    Debian,
    /// 29, rules by iptables.
    Current,
    /// 29, rules by its own nftables backend.
    CurrentNftables,
}

impl Kind {
    /// Every kind whose programs are on this machine: for tests that must hold on all of them.
    pub fn present() -> Vec<Self> {
        [Self::OnPath, Self::Debian, Self::Current, Self::CurrentNftables].into_iter().filter(|k| k.programs().is_some()).collect()
    }

    /// The one to test with: named by `BULKHEAD_ENGINE` (`path`, `20`, `29` or `29-nftables`), else the first that is there.
    pub fn chosen() -> Option<Self> {
        match std::env::var("BULKHEAD_ENGINE").as_deref() {
            Ok("path") => Some(Self::OnPath),
            Ok("20") => Some(Self::Debian),
            Ok("29") => Some(Self::Current),
            Ok("29-nftables") => Some(Self::CurrentNftables),
            Ok(other) => panic!("BULKHEAD_ENGINE={other}: path, 20, 29 or 29-nftables"),
            Err(_) => Self::present().into_iter().next(),
        }
    }

    /// The folders with its programs, to be put before PATH; `None` where it is missing.
    pub fn programs(self) -> Option<Vec<PathBuf>> {
        let cache = cache_dir();
        let folders = match self {
            Self::OnPath => return found("dockerd").then(Vec::new),
            Self::Debian => vec![cache.join("engine20/usr/sbin"), cache.join("engine20/usr/bin")],
            // The client is no part of it; Debian's is the one that there always is.
            Self::Current | Self::CurrentNftables => {
                let client = Some(cache.join("engine20/usr/bin")).filter(|_| !found("docker"));
                [cache.join("engine29/bin")].into_iter().chain(client).collect()
            }
        };
        folders[0].join("dockerd").is_file().then_some(folders)
    }
}

/// Where `tests/setup` keeps what it downloaded and built: `BULKHEAD_LAB`, else `~/.cache/bulkhead-lab`.
pub fn cache_dir() -> PathBuf {
    std::env::var_os("BULKHEAD_LAB").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/bulkhead-lab"),
        PathBuf::from,
    )
}

/// How an engine is to be started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which one; `None`: [`Kind::chosen`].
    pub kind: Option<Kind>,
    /// Whether published ports also go through docker-proxy.
    pub userland_proxy: bool,
    /// The resolver given to every container with `--dns`; without, the machine's resolv.conf counts.
    pub dns: Option<IpAddr>,
    /// More words for dockerd.
    pub flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { kind: None, userland_proxy: proxy_chosen().unwrap_or(true), dns: None, flags: Vec::new() }
    }
}

/// Whether published ports are to go through docker-proxy: named by `BULKHEAD_PROXY` (`on` or `off`), where it is set.
///
/// # Panics
/// Where it is something else.
pub fn proxy_chosen() -> Option<bool> {
    match std::env::var("BULKHEAD_PROXY").as_deref() {
        Ok("on") => Some(true),
        Ok("off") => Some(false),
        Ok(other) => panic!("BULKHEAD_PROXY={other}: on or off"),
        Err(_) => None,
    }
}

/// A running engine.
#[derive(Debug)]
pub struct Engine {
    /// The namespace that plays the host: bridges, published ports and rules are here.
    pub netns: Netns,
    /// Everything it writes is below; free for the test's own files too.
    pub dir: PathBuf,
    /// Which one it is.
    pub kind: Kind,
    name: String,
    path: std::ffi::OsString,
    options: Options,
    dockerd: Mutex<Option<Process>>,
}

impl Engine {
    /// Starts one, or says why it cannot be tried here.
    ///
    /// # Errors
    /// The reason, for [`crate::skip!`]: not root, no engine on this machine.
    ///
    /// # Panics
    /// Where it is there and doesn't start.
    pub fn start(options: Options) -> Result<Self, String> {
        Self::start_in(Netns::new("engine"), options)
    }

    /// The same in a namespace that was prepared, for example one with an [`crate::Internet`] behind it.
    ///
    /// # Errors
    /// As [`Engine::start`].
    ///
    /// # Panics
    /// As [`Engine::start`].
    pub fn start_in(netns: Netns, options: Options) -> Result<Self, String> {
        let kind = match options.kind {
            Some(kind) => kind,
            None => Kind::chosen().ok_or("needs a Docker Engine: run tests/setup/engine")?,
        };
        let folders = kind.programs().ok_or_else(|| format!("needs the engine {kind:?}: run tests/setup/engine"))?;
        let inherited = std::env::var_os("PATH").unwrap_or_default();
        let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        let path = std::env::join_paths(folders.into_iter().chain(std::env::split_paths(&inherited)).chain(system))
            .expect("no folder on PATH has a colon in its name");
        // The socket's path must stay below 108 bytes (unix(7)): the folder is directly in /tmp.
        let name = process::unique("engine");
        let dir = Path::new("/tmp").join(&name);
        fs::create_dir_all(&dir).expect("/tmp can be written");
        // 29's nftables backend refuses to start where forwarding is off.
        netns.set_sysctl("net.ipv4.ip_forward", "1");
        netns.set_sysctl("net.ipv6.conf.all.forwarding", "1");
        let engine = Self { netns, dir, kind, name, path, options, dockerd: Mutex::default() };
        engine.start_daemon();
        Ok(engine)
    }

    fn start_daemon(&self) {
        let log = File::options().create(true).append(true).open(self.log()).expect("the engine's folder can be written");
        let mut command = Command::new("dockerd");
        command.env("PATH", &self.path).stdout(log.try_clone().expect("a file can be opened twice")).stderr(log);
        command.arg("--data-root").arg(self.dir.join("data")).arg("--exec-root").arg(self.dir.join("exec"));
        command.arg("--pidfile").arg(self.dir.join("dockerd.pid")).arg("--host").arg(self.docker_host());
        // One of its own: the machine's /etc/docker/daemon.json is for the machine's engine. Before 25 an engine also leaves a key.
        let config = self.dir.join("daemon.json");
        let key =
            if self.kind == Kind::Debian { format!("\"deprecated-key-path\": {:?}", self.dir.join("key.json")) } else { String::new() };
        fs::write(&config, format!("{{{key}}}")).expect("the engine's folder can be written");
        command.arg("--config-file").arg(config);
        command.args(["--bip", "172.30.0.1/24", "--default-address-pool", "base=172.31.0.0/16,size=24"]);
        // cgroupfs works with and without systemd, and makes the cgroups' names ours.
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", &format!("--cgroup-parent=/{}", self.name)]);
        command.arg(format!("--userland-proxy={}", self.options.userland_proxy));
        command.args(self.options.dns.map(|dns| format!("--dns={dns}")));
        if self.kind == Kind::CurrentNftables {
            command.arg("--firewall-backend=nftables");
        }
        command.args(&self.options.flags);
        let mut dockerd = self.netns.spawn(&mut command);
        // Where a killed containerd takes long to come back dockerd gives up; systemd would start it again (Restart=always).
        let mut again = 2;
        eventually(Duration::from_secs(90), || {
            if let Some(status) = dockerd.ended() {
                assert!(again > 0, "dockerd ended with {status}:\n{}", self.log_tail());
                again -= 1;
                dockerd = self.netns.spawn(&mut command);
            }
            let answer = self.try_docker(["version", "--format", "{{.Server.Version}}"]);
            if answer.status.success() { Ok(()) } else { Err(format!("dockerd doesn't answer:\n{}", self.log_tail())) }
        });
        *self.dockerd() = Some(dockerd);
    }

    fn dockerd(&self) -> MutexGuard<'_, Option<Process>> {
        self.dockerd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> PathBuf {
        self.dir.join("dockerd.log")
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// What to give as DOCKER_HOST.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("docker.sock")
    }

    /// A program with the engine's PATH and DOCKER_HOST, in the engine's namespace once it is started by [`Netns::output`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        // A configuration of its own: the caller's contexts and credentials are none of the lab's business.
        command.env("PATH", &self.path).env("DOCKER_HOST", self.docker_host()).env("DOCKER_CONFIG", self.dir.join("client"));
        command
    }

    /// The docker client, which must succeed; what it printed, trimmed.
    pub fn docker<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        process::check(self.command("docker").args(args)).trim().to_owned()
    }

    /// The docker client, whose exit is the caller's to judge.
    ///
    /// # Panics
    /// Where there is no client.
    pub fn try_docker<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.command("docker").args(args).stdin(Stdio::null()).output().expect("the docker client can be started")
    }

    /// Runs a program in a container and waits for it.
    pub fn exec<S: AsRef<OsStr>>(&self, container: &str, args: impl IntoIterator<Item = S>) -> Output {
        let words = args.into_iter().map(|a| a.as_ref().to_owned());
        self.try_docker(["exec".into(), container.into()].into_iter().chain(words))
    }

    /// The IPv4 address of a container on a network.
    ///
    /// # Panics
    /// Where it has none.
    pub fn address(&self, container: &str, network: &str) -> IpAddr {
        let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
        let text = self.docker(["inspect", "--format", &format, container]);
        text.parse().unwrap_or_else(|_| panic!("{container} has no address on {network}: {text:?}"))
    }

    /// The IPv6 address of a container on a network.
    ///
    /// # Panics
    /// Where it has none.
    pub fn address_v6(&self, container: &str, network: &str) -> IpAddr {
        let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).GlobalIPv6Address}}}}");
        let text = self.docker(["inspect", "--format", &format, container]);
        text.parse().unwrap_or_else(|_| panic!("{container} has no IPv6 address on {network}: {text:?}"))
    }

    /// The hardware address of a container on a network.
    ///
    /// # Panics
    /// Where it has none.
    pub fn mac(&self, container: &str, network: &str) -> [u8; 6] {
        let format = format!("{{{{(index .NetworkSettings.Networks {network:?}).MacAddress}}}}");
        let text = self.docker(["inspect", "--format", &format, container]);
        let bytes: Vec<u8> = text.split(':').map(|b| u8::from_str_radix(b, 16).expect("a hardware address")).collect();
        bytes.try_into().unwrap_or_else(|_| panic!("{container} has no hardware address on {network}: {text:?}"))
    }

    /// The process id of a container's first program.
    ///
    /// # Panics
    /// Where the container is not there.
    pub fn pid(&self, container: &str) -> u32 {
        self.docker(["inspect", "--format", "{{.State.Pid}}", container]).parse().expect("a process id")
    }

    /// The network namespace of a container, to probe from.
    ///
    /// # Panics
    /// Where the container is not there.
    pub fn netns_of(&self, container: &str) -> Netns {
        Netns::of_process(self.pid(container))
    }

    /// The process id of dockerd.
    ///
    /// # Panics
    /// Where it was killed.
    pub fn daemon_pid(&self) -> u32 {
        self.dockerd().as_ref().expect("dockerd runs").id()
    }

    /// The interface of a network: `br-` and the first twelve digits of its id, unless it was given a name.
    pub fn bridge(&self, network: &str) -> String {
        if network == "bridge" {
            return "docker0".to_owned();
        }
        let given = self.docker(["network", "inspect", "--format", r#"{{index .Options "com.docker.network.bridge.name"}}"#, network]);
        if !given.is_empty() && given != "<no value>" {
            return given;
        }
        let id = self.docker(["network", "inspect", "--format", "{{.Id}}", network]);
        format!("br-{}", &id[..12])
    }

    /// Makes an image from a folder, with Dockerfile instructions (`CMD [...]`, `EXPOSE 80`).
    ///
    /// # Panics
    /// Where tar or the import fails.
    pub fn import(&self, image: &str, root: &Path, changes: &[&str]) {
        let mut tar = Command::new("tar").arg("-C").arg(root).args(["-c", "."]).stdout(Stdio::piped()).spawn().expect("tar");
        let mut import = self.command("docker");
        import.arg("import").args(changes.iter().flat_map(|c| ["--change", c])).args(["-", image]);
        let out = import.stdin(tar.stdout.take().expect("piped")).output().expect("the docker client can be started");
        let packed = tar.wait().expect("tar can be waited for");
        assert!(packed.success() && out.status.success(), "import {image}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// An image with nothing but busybox, all its names linked, and `sleep` as its program.
    ///
    /// # Panics
    /// Where no static busybox is on PATH (package busybox-static).
    pub fn import_busybox(&self, image: &str) {
        let root = self.dir.join("busybox");
        let bin = root.join("bin");
        for folder in ["bin", "tmp", "etc", "www"] {
            fs::create_dir_all(root.join(folder)).expect("the engine's folder can be written");
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).is_file());
        fs::copy(busybox.expect("busybox-static"), bin.join("busybox")).expect("busybox can be copied");
        for name in process::check(Command::new("busybox").arg("--list")).lines().filter(|n| *n != "busybox") {
            let _ = std::os::unix::fs::symlink("busybox", bin.join(name));
        }
        fs::write(root.join("www/index.html"), "hello\n").expect("the engine's folder can be written");
        self.import(image, &root, &["CMD [\"sleep\",\"1000000\"]", "ENV PATH=/bin"]);
    }

    /// Makes an image from one dynamically linked program with the libraries it names, busybox, and scripts (name, text), all
    /// in /bin; it sleeps unless told otherwise.
    ///
    /// # Panics
    /// Where ldd or the import fails.
    pub fn import_program(&self, image: &str, program: &Path, scripts: &[(&str, &str)], changes: &[&str]) {
        self.import_busybox(&format!("{image}-base"));
        let root = self.dir.join("busybox");
        let copied = root.join("bin").join(program.file_name().expect("a program has a name"));
        fs::copy(program, &copied).expect("the program can be copied");
        for library in libraries(program) {
            let to = root.join(library.strip_prefix("/").unwrap_or(&library));
            fs::create_dir_all(to.parent().expect("a library is in a folder")).expect("the engine's folder can be written");
            fs::copy(&library, &to).expect("a library can be copied");
        }
        for (name, text) in scripts {
            let path = root.join("bin").join(name);
            // A name that busybox has too is a link to busybox itself.
            let _ = fs::remove_file(&path);
            fs::write(&path, text).expect("the engine's folder can be written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our own file");
        }
        self.import(image, &root, &[&["ENV PATH=/bin", "CMD [\"sleep\",\"1000000\"]"], changes].concat());
    }

    /// Makes an image from another with other Dockerfile instructions, without a build.
    pub fn tag_with(&self, from: &str, image: &str, changes: &[&str]) {
        let container = self.docker(["create", from]);
        let changes = changes.iter().flat_map(|c| ["--change", c]);
        self.docker(["commit"].into_iter().chain(changes).chain([container.as_str(), image]));
        self.docker(["rm", &container]);
    }

    /// Stops dockerd in order and starts it again, as `systemctl restart docker` does.
    pub fn restart(&self) {
        let dockerd = self.dockerd().take();
        if let Some(mut dockerd) = dockerd {
            dockerd.stop(Duration::from_secs(30));
        }
        self.start_daemon();
    }

    /// Kills dockerd with SIGKILL: its containers and containerd go on.
    pub fn kill_daemon(&self) {
        let dockerd = self.dockerd().take();
        if let Some(mut dockerd) = dockerd {
            dockerd.signal(Signal::SIGKILL);
            dockerd.wait(Duration::from_secs(5));
        }
    }

    /// Starts dockerd after [`Engine::kill_daemon`].
    pub fn revive_daemon(&self) {
        let _ = fs::remove_file(self.dir.join("dockerd.pid"));
        self.start_daemon();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the last words of dockerd ({}):\n{}", self.name, self.log_tail());
        }
        drop(self.dockerd().take());
        // containerd and its shims are in the namespace too; the containers' programs are in ours of cgroups.
        process::end_all_in(self.netns.path());
        process::end_cgroups(&self.name);
        process::remove_dir_with_mounts(&self.dir);
        process::forget(&self.name);
    }
}

/// The shared libraries that a program names, by ldd.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let listed = process::check(Command::new("ldd").arg(program));
    let absolute = |word: &str| word.starts_with('/').then(|| PathBuf::from(word));
    listed.lines().filter_map(|line| line.split_whitespace().find_map(absolute)).collect()
}

/// A started [`Engine`], or the test is skipped aloud: `let engine = needs_engine!(Options::default());`
#[macro_export]
macro_rules! needs_engine {
    ($options:expr) => {{
        $crate::needs_root!();
        $crate::or_skip!($crate::Engine::start($options))
    }};
    () => {
        $crate::needs_engine!($crate::engine::Options::default())
    };
}
