//! The filter before a real engine's socket: what passes, what is refused, and that nothing else ever reaches the engine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use lab::engine::Options;
use lab::{Engine, eventually};
use node_agent::proxy;
use tokio::sync::oneshot;

use crate::watching::{Watching, engine, kinds};

/// A filter on a thread of its own.
struct Filter {
    socket: PathBuf,
    end: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Filter {
    fn before(engine: &Engine) -> Self {
        let socket = engine.dir.join("filter.sock");
        let (behind, listen) = (engine.socket(), socket.clone());
        let (end, ended) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    ended = proxy::serve(&behind, &listen) => panic!("{ended:?}"),
                    _ = ended => {}
                }
            });
        });
        eventually(Duration::from_secs(5), || UnixStream::connect(&socket).map(drop));
        Self { socket, end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How long nothing is said by who refuses, and by an engine that starts programs of its own before it answers.
const BRIEFLY: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes these bytes and reads until the other end is silent or closes.
fn raw(socket: &Path, bytes: &[u8], silence: Duration) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(silence)).unwrap();
    // The other end may refuse before it has read all.
    let _ = stream.write_all(bytes);
    let (mut answer, mut part) = (Vec::new(), [0; 65536]);
    while let Ok(read @ 1..) = stream.read(&mut part) {
        answer.extend_from_slice(&part[..read]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn get(socket: &Path, target: &str) -> String {
    raw(socket, format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes(), PATIENCE)
}

fn status(answer: &str) -> &str {
    answer.get(9..12).unwrap_or("none")
}

/// Every engine with its debug log on, in which it names each request it gets.
fn on_every_talkative_engine(story: impl Fn(Engine)) {
    for kind in kinds() {
        eprintln!("on {kind:?}");
        story(engine(kind, Options { flags: vec!["--debug".to_owned()], ..Options::default() }));
    }
}

/// What the engine logged since `from` bytes.
fn log(engine: &Engine, from: usize) -> String {
    let log = std::fs::read(engine.dir.join("dockerd.log")).unwrap();
    String::from_utf8_lossy(&log[from..]).to_lowercase()
}

fn log_length(engine: &Engine) -> usize {
    std::fs::metadata(engine.dir.join("dockerd.log")).unwrap().len().try_into().unwrap()
}

#[test]
fn reading_passes_and_everything_else_is_refused_before_the_engine() {
    lab::needs_root!();
    if kinds().is_empty() {
        lab::skip!("needs a Docker Engine: run tests/setup/engine");
    }
    on_every_talkative_engine(|engine| {
        engine.docker(["run", "-d", "--name", "app", "bb"]);
        let filter = Filter::before(&engine);
        let socket = &filter.socket;
        for target in [
            "/_ping",
            "/version",
            "/v1.40/info",
            "/v1.40/networks",
            "/networks/bridge",
            "/containers/json?all=true",
            "/v1.40/containers/app/json",
        ] {
            assert_eq!(status(&get(socket, target)), "200", "{target}");
        }
        assert_eq!(status(&get(socket, "/containers/nobody/json")), "404", "the engine's own answer");

        let from = log_length(&engine);
        let hidden = "POST /v1.40/containers/app/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
        let refused: Vec<(&str, String)> = vec![
            ("another method", "POST /v1.40/containers/app/kill HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".to_owned()),
            ("delete", "DELETE /v1.40/containers/app?force=1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
            ("another path", "GET /v1.40/containers/app/logs?stdout=1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
            ("upwards", "GET /v1.40/containers/../images/json HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
            ("upwards, encoded", "GET /v1.40/containers/%2e%2e/images/json HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
            ("absolute", "GET http://x/images/json HTTP/1.1\r\nHost: x\r\n\r\n".to_owned()),
            ("upgrade", "GET /version HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n".to_owned()),
            ("hijack", "POST /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".to_owned()),
            ("method override", "GET /containers/app/kill HTTP/1.1\r\nHost: x\r\nX-HTTP-Method-Override: POST\r\n\r\n".to_owned()),
            ("a request in the body", format!("GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{hidden}", hidden.len())),
            ("a chunked request", format!("GET /version HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}")),
            (
                "two lengths",
                format!("GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: {}\r\n\r\n{hidden}", hidden.len()),
            ),
            (
                "length and chunks",
                format!("GET /version HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"),
            ),
            ("odd chunks", format!("GET /version HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{hidden}")),
            (
                "a folded header",
                format!("GET /version HTTP/1.1\r\nHost: x\r\nX: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"),
            ),
            ("a space before the colon", format!("GET /version HTTP/1.1\r\nHost: x\r\nContent-Length : 9\r\n\r\n{hidden}")),
            ("a line feed in the path", format!("GET /version\n{hidden}")),
            ("bytes that are no request", "\u{16}\u{3}\u{1}\u{2}".repeat(50)),
            ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ];
        for (what, bytes) in refused {
            let answer = raw(socket, bytes.as_bytes(), BRIEFLY);
            assert!(matches!(status(&answer), "400" | "403" | "none"), "{what}: {answer}");
            assert!(!answer.contains(" 200 "), "{what}: {answer}");
        }
        // Two requests in one breath are two requests: the first passes, the second is refused.
        let answer = raw(socket, format!("GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n{hidden}").as_bytes(), Duration::from_secs(5));
        assert_eq!((status(&answer), answer.contains("HTTP/1.1 403")), ("200", true), "{answer}");

        let log = log(&engine, from);
        for word in ["post /", "delete /", "images/json", "kill", "session", "logs"] {
            assert!(!log.contains(word), "{word} reached the engine:\n{log}");
        }
        assert!(engine.docker(["ps", "--format", "{{.Names}}"]).contains("app"));
    });
}

#[test]
fn the_inventory_works_through_the_filter_and_the_client_of_a_stream_may_go_away() {
    lab::needs_root!();
    if kinds().is_empty() {
        lab::skip!("needs a Docker Engine: run tests/setup/engine");
    }
    on_every_talkative_engine(|engine| {
        engine.docker(["network", "create", "front"]);
        let filter = Filter::before(&engine);
        let watching = Watching::start_at(&engine, filter.socket.clone());
        watching.until("the first listing", |now| now.blind.is_empty().then_some(()));
        engine.docker(["run", "-d", "--name", "app", "--network", "front", "bb"]);
        watching.settled("app");
        let listeners = || engine.docker(["info", "--format", "{{.NEventsListener}}"]);
        eventually(Duration::from_secs(5), || if listeners() == "1" { Ok(()) } else { Err(listeners()) });
        drop(watching);
        eventually(Duration::from_secs(10), || if listeners() == "0" { Ok(()) } else { Err(listeners()) });
    });
}

#[test]
fn an_engine_that_is_not_there_is_told_and_a_second_filter_is_refused() {
    lab::needs_root!();
    let dir = tempfile::tempdir().unwrap();
    let listen = dir.path().join("filter.sock");
    let nobody = dir.path().join("nobody.sock");
    let (behind, at) = (nobody.clone(), listen.clone());
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _ = tokio::time::timeout(Duration::from_secs(10), proxy::serve(&behind, &at)).await;
        });
    });
    eventually(Duration::from_secs(5), || UnixStream::connect(&listen).map(drop));
    let answer = get(&listen, "/version");
    assert_eq!(status(&answer), "502");
    assert!(answer.contains("nobody.sock"), "{answer}");
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&listen).unwrap().permissions()) & 0o777, 0o600);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(proxy::serve(&nobody, &listen));
    assert!(matches!(refused, Err(proxy::ProxyError::InUse { .. })), "{refused:?}");
}
