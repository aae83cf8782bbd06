//! Who may open the socket, and what may be in its place.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use controller::session::{Listener, Options, SessionError};
use node_agent::uplink::{Link, Uplink};
use tokio::sync::{mpsc, watch};

use crate::pair::{PATIENCE, Place, up};

#[tokio::test]
async fn only_one_controller_listens_and_a_dead_ones_socket_is_replaced() {
    let place = Place::new();
    let first = Listener::bind(Options::new(place.socket())).await.unwrap();
    let found = std::fs::symlink_metadata(place.socket()).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o660);
    let error = Listener::bind(Options::new(place.socket())).await.unwrap_err();
    assert!(matches!(error, SessionError::Taken { .. }), "{error}");
    // Dropped without an end, as a killed process leaves it: the file stays and nobody listens.
    drop(first);
    assert!(place.socket().exists());
    // What another test is forking just now holds the socket until it becomes its program.
    let until = std::time::Instant::now() + PATIENCE;
    while let Err(error) = Listener::bind(Options::new(place.socket())).await {
        assert!(matches!(error, SessionError::Taken { .. }) && std::time::Instant::now() < until, "{error}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_file_in_the_place_of_the_socket_is_not_touched() {
    let place = Place::new();
    std::fs::write(place.socket(), "precious").unwrap();
    let error = Listener::bind(Options::new(place.socket())).await.unwrap_err();
    assert!(matches!(error, SessionError::NotASocket { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(place.socket()).unwrap(), "precious");
}

#[tokio::test]
async fn an_end_in_order_takes_the_socket_along() {
    let place = Place::new();
    let listener = Listener::bind(Options::new(place.socket())).await.unwrap();
    let (events, _heard) = mpsc::channel(1);
    let (stop, stopped) = watch::channel(false);
    let served = tokio::spawn(listener.serve(events, stopped));
    stop.send_replace(true);
    tokio::time::timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
    assert!(!place.socket().exists());
}

/// Any user but root and those that a test allows.
const NOBODY: u32 = 65_534;

const SOCKET: &str = "BULKHEAD_TEST_CHANNEL_SOCKET";

/// Not a test by itself: dials as the user it was started as, and says what became of it.
#[tokio::test(flavor = "multi_thread")]
async fn dialling_process() {
    let Some(socket) = std::env::var_os(SOCKET) else { return };
    let dir = tempfile::tempdir().unwrap();
    let agent = Uplink::start(node_agent::uplink::Options::new(socket.into(), dir.path().to_owned(), "other".to_owned())).unwrap();
    let mut link = agent.handle.link();
    let settled = link.wait_for(|link| *link != Link::Away("not dialled yet".to_owned()));
    let said = format!("{:?}", &*tokio::time::timeout(PATIENCE, settled).await.unwrap().unwrap());
    println!("\nLINK {said}");
    agent.handle.stop().await;
}

fn dial_as(uid: u32, place: &Place) -> String {
    // The test program may lie in folders that only root may enter: a copy beside the socket.
    let program = std::env::current_exe().unwrap();
    let copy = place.dir.path().join("program");
    if !copy.exists() {
        lab::process::copy_program(&program, &copy);
    }
    let mut program = Command::new(&copy);
    program
        .args(["--exact", "socket::dialling_process", "--nocapture", "--test-threads=1"])
        .env(SOCKET, place.socket())
        .env("TMPDIR", "/tmp")
        .current_dir("/tmp")
        .uid(uid)
        .gid(uid)
        .stderr(Stdio::inherit());
    let output = program.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().find_map(|line| line.strip_prefix("LINK ")).unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn only_root_and_the_agents_user_may_open_a_session() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: playing another user needs root");
        return;
    }
    let place = Place::new();
    let controller = place.controller().await;
    std::fs::set_permissions(place.dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    // The mode alone keeps others out.
    let said = tokio::task::block_in_place(|| dial_as(NOBODY, &place));
    assert!(said.contains("Permission denied"), "{said}");
    // Who comes in all the same (a wrong mode, a wrong group) is asked for the uid that the kernel knows.
    std::fs::set_permissions(place.socket(), PermissionsExt::from_mode(0o666)).unwrap();
    let said = tokio::task::block_in_place(|| dial_as(NOBODY, &place));
    assert!(said.contains("user 65534 is not an agent's"), "{said}");
    assert!(controller.store.load_health().await.unwrap().is_empty());
    let agent = place.agent();
    up(&agent).await;
    agent.handle.stop().await;
    controller.stop().await;

    let (events, mut heard) = mpsc::channel(1);
    let (_stop, stopped) = watch::channel(false);
    let options = Options { agent_uid: Some(NOBODY), group: Some(NOBODY), ..Options::new(place.socket()) };
    tokio::spawn(Listener::bind(options).await.unwrap().serve(events, stopped));
    let refuse = tokio::spawn(async move {
        let controller::session::Event::Connected { reply, greeting, .. } = heard.recv().await.unwrap() else { panic!() };
        reply.send(Err("seen".to_owned())).unwrap();
        greeting.node
    });
    let said = tokio::task::block_in_place(|| dial_as(NOBODY, &place));
    assert!(said.contains("the controller refuses: seen"), "{said}");
    assert_eq!(refuse.await.unwrap(), "other");
}

/// Not a test by itself: serves as the user it was started as, until it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn serving_process() {
    let Some(socket) = std::env::var_os(SERVED) else { return };
    let (events, mut heard) = mpsc::channel(1);
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(Listener::bind(Options::new(socket.into())).await.unwrap().serve(events, stopped));
    println!("\nSERVES");
    while let Some(event) = heard.recv().await {
        if let controller::session::Event::Connected { reply, .. } = event {
            reply.send(Err("seen".to_owned())).unwrap();
        }
    }
}

const SERVED: &str = "BULKHEAD_TEST_CHANNEL_SERVED";

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_speaks_to_no_controller_of_another_user() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: playing another user needs root");
        return;
    }
    let place = Place::new();
    std::fs::set_permissions(place.dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let copy = place.dir.path().join("program");
    lab::process::copy_program(&std::env::current_exe().unwrap(), &copy);
    let mut command = Command::new(&copy);
    command.args(["--exact", "socket::serving_process", "--nocapture", "--test-threads=1"]).env(SERVED, place.socket());
    command.current_dir("/tmp").uid(NOBODY).gid(NOBODY).stdout(Stdio::null());
    let _server = lab::Process::start(&mut command);
    lab::eventually(PATIENCE, || std::os::unix::net::UnixStream::connect(place.socket()).map(drop));

    for (known, expected) in [(None, "user 65534 serves it, and is neither root nor the controller's"), (Some(NOBODY), "refuses: seen")] {
        let mut options = node_agent::uplink::Options::new(place.socket(), place.agent_dir(), "node1".to_owned());
        options.controller_uid = known;
        let agent = Uplink::start(options).unwrap();
        let mut link = agent.handle.link();
        let found = link.wait_for(|link| matches!(link, Link::Away(why) if why.contains(expected)));
        tokio::time::timeout(PATIENCE, found).await.expect(expected).unwrap();
        agent.handle.stop().await;
    }
}
