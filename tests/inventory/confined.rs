//! The fences around agent and filter, tried from inside: each deed is one that root without them, or anybody, could do.

use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::libc;
use node_agent::confine;

const PLAY: &str = "BULKHEAD_TEST_CONFINED";

fn call(number: libc::c_long, arguments: [libc::c_long; 3]) -> io::Result<()> {
    // SAFETY: these calls are refused, or fail for their arguments, before they read memory.
    #[allow(unsafe_code)]
    let answer = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn starts(program: &str) -> io::Result<()> {
    Command::new(program).arg("--list").stdout(Stdio::null()).stderr(Stdio::null()).status().map(drop)
}

/// Only opened: what is written there counts for the whole machine.
fn opens_to_write(path: &str) -> io::Result<()> {
    File::options().write(true).truncate(true).open(path).map(drop)
}

fn tell(deed: &str, outcome: io::Result<()>) {
    let code = outcome.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
    println!("\nDEED {deed}: {code}");
}

fn deeds(dir: &Path) {
    tell("write its state", fs::write(dir.join("state/plan"), "x"));
    tell("write elsewhere", fs::write(dir.join("elsewhere"), "x"));
    tell("read elsewhere", fs::read("/usr/bin/env").map(drop));
    tell("read the host's resolvers", fs::read("/etc/hostname").map(drop));
    tell("read processes", fs::read("/proc/1/net/tcp").map(drop));
    tell("read a container's files", fs::read(dir.join("root/containers/id/resolv.conf")).map(drop));
    tell("read an image's files", fs::read(dir.join("root/image")).map(drop));
    tell("write a network's sysctl", opens_to_write("/proc/sys/net/ipv4/ip_forward"));
    tell("write the pattern of core dumps", opens_to_write("/proc/sys/kernel/core_pattern"));
    tell("start itself", starts("/proc/self/exe"));
    tell("start another program", starts("/bin/ls"));
    tell("execute", call(libc::SYS_execve, [0, 0, 0]));
    tell("dial out", TcpStream::connect("127.0.0.1:1").map(drop));
    tell("make a socket beside", UnixListener::bind(dir.join("state/socket")).map(drop));
    tell("speak to a socket", UnixDatagram::unbound().and_then(|socket| socket.send_to(b"x", dir.join("notify"))).map(drop));
    tell("open a TCP socket", call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]));
    tell("open a socket to the kernel's ciphers", call(libc::SYS_socket, [libc::AF_ALG.into(), libc::SOCK_SEQPACKET.into(), 0]));
    tell("make a user namespace", call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]));
    tell("clone into a user namespace", call(libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD).into(), 0, 0]));
    tell("clone3", call(libc::SYS_clone3, [0, 0, 0]));
    tell("io_uring", call(libc::SYS_io_uring_setup, [0, 0, 0]));
    tell("ptrace", call(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0]));
    tell("signal another", call(libc::SYS_kill, [nix::unistd::getppid().as_raw().into(), 0, 0]));
}

/// Not a test by itself: confines itself as it is told, and tries.
#[test]
fn confined_process() {
    let Some(part) = std::env::var_os(PLAY) else { return };
    let dir = PathBuf::from(std::env::var_os("BULKHEAD_TEST_DIR").unwrap());
    if part == "agent" {
        let needs = confine::Agent { state_dir: dir.join("state"), engine_roots: vec![dir.join("root")], metrics: None };
        assert_eq!(confine::agent(&needs).unwrap(), Vec::<String>::new(), "this kernel lacks nothing");
    } else {
        confine::filter(&dir.join("state")).unwrap();
    }
    deeds(&dir);
}

/// What became of each deed: the error's number, 0 if it was done.
fn play(part: &str) -> Vec<(String, i32)> {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["state", "root/containers/id"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    for file in ["root/image", "root/containers/id/resolv.conf"] {
        fs::write(dir.path().join(file), "x").unwrap();
    }
    let _heard = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "confined::confined_process", "--nocapture", "--test-threads=1"]);
    let output = command.env(PLAY, part).env("BULKHEAD_TEST_DIR", dir.path()).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let deed = |line: &str| line.strip_prefix("DEED ")?.rsplit_once(": ").map(|(deed, code)| (deed.to_owned(), code.parse().unwrap()));
    let deeds: Vec<_> = text.lines().filter_map(deed).collect();
    assert!(!deeds.is_empty(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    deeds
}

const REFUSED: i32 = libc::EACCES;
const FENCED: i32 = libc::EPERM;

#[test]
fn the_agent_reaches_its_state_the_hosts_resolvers_and_nothing_else() {
    lab::needs_root!();
    let expected = [
        ("write its state", 0),
        ("write elsewhere", REFUSED),
        ("read elsewhere", REFUSED),
        ("read the host's resolvers", 0),
        ("read processes", 0),
        ("read a container's files", 0),
        ("read an image's files", REFUSED),
        ("write a network's sysctl", 0),
        ("write the pattern of core dumps", REFUSED),
        ("start itself", 0),
        ("start another program", REFUSED),
        // Not refused: there is only no program at address 0.
        ("execute", libc::EFAULT),
        ("dial out", REFUSED),
        ("make a socket beside", 0),
        ("speak to a socket", 0),
        ("open a TCP socket", 0),
        ("open a socket to the kernel's ciphers", FENCED),
        ("make a user namespace", FENCED),
        ("clone into a user namespace", FENCED),
        ("clone3", libc::ENOSYS),
        ("io_uring", FENCED),
        ("ptrace", FENCED),
        ("signal another", FENCED),
    ];
    assert_eq!(play("agent"), expected.map(|(deed, code)| (deed.to_owned(), code)));
}

#[test]
fn the_filter_makes_its_socket_speaks_to_sockets_and_does_nothing_else() {
    lab::needs_root!();
    let expected = [
        ("write its state", REFUSED),
        ("write elsewhere", REFUSED),
        ("read elsewhere", REFUSED),
        ("read the host's resolvers", REFUSED),
        ("read processes", REFUSED),
        ("read a container's files", REFUSED),
        ("read an image's files", REFUSED),
        ("write a network's sysctl", REFUSED),
        ("write the pattern of core dumps", REFUSED),
        ("start itself", REFUSED),
        ("start another program", REFUSED),
        ("execute", FENCED),
        ("dial out", FENCED),
        ("make a socket beside", 0),
        ("speak to a socket", 0),
        ("open a TCP socket", FENCED),
        ("open a socket to the kernel's ciphers", FENCED),
        ("make a user namespace", FENCED),
        ("clone into a user namespace", FENCED),
        ("clone3", libc::ENOSYS),
        ("io_uring", FENCED),
        ("ptrace", FENCED),
        ("signal another", FENCED),
    ];
    assert_eq!(play("filter"), expected.map(|(deed, code)| (deed.to_owned(), code)));
}
