//! An engine that tells what it is, and not yet what runs: nobody must take that for an empty host.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::Engine;

use crate::on_every_engine;
use crate::watching::{Watching, named};

/// A road to the engine on which requests for networks wait.
struct Road {
    socket: PathBuf,
    open: Arc<AtomicBool>,
    /// One waits.
    asked: Arc<AtomicBool>,
}

fn carry(mut from: UnixStream, mut to: UnixStream, hold: impl Fn(&[u8])) {
    let mut bytes = [0; 16_384];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        hold(&bytes[..n]);
        if to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

impl Road {
    fn to(engine: &Engine) -> Self {
        let socket = engine.dir.join("road.sock");
        let (open, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let listener = UnixListener::bind(&socket).unwrap();
        let road = Self { socket, open: open.clone(), asked: asked.clone() };
        let engine = engine.socket();
        // Ends with the test's process, as each thread that carries does with its connection.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = UnixStream::connect(&engine).unwrap();
                let (back, forth) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || carry(back, forth, |_| {}));
                let (open, asked) = (open.clone(), asked.clone());
                thread::spawn(move || {
                    carry(client, server, |request| {
                        let is_of_networks = request
                            .split(|&byte| byte == b'\n')
                            .next()
                            .is_some_and(|line| String::from_utf8_lossy(line).contains("/networks"));
                        while is_of_networks && !open.load(Ordering::Relaxed) {
                            asked.store(true, Ordering::Relaxed);
                            thread::sleep(Duration::from_millis(5));
                        }
                    });
                });
            }
        });
        road
    }
}

#[test]
fn an_engine_that_answers_and_has_not_listed_yet_is_no_empty_host() {
    on_every_engine!(|engine: Engine| {
        engine.docker(["network", "create", "front"]);
        engine.docker(["run", "-d", "--name", "before", "--network", "front", "bb"]);
        let road = Road::to(&engine);
        let watching = Watching::start_at(&engine, road.socket.clone());
        lab::eventually(crate::watching::SOON, || if road.asked.load(Ordering::Relaxed) { Ok(()) } else { Err("not asked yet") });
        // Ports move, and each time what is known is told again.
        engine.docker(["run", "-d", "--name", "meanwhile", "--network", "front", "bb"]);
        engine.docker(["rm", "-f", "meanwhile"]);
        let now = watching.now();
        assert!(now.engine.is_empty() && !now.blind.is_empty(), "{:?} {:?}", now.engine, now.blind);
        road.open.store(true, Ordering::Relaxed);
        let engine = watching.until("the listing", |now| (!now.engine.is_empty()).then(|| now.clone()));
        assert!(named(&engine, "before").is_some() && engine.blind.is_empty(), "it comes with who runs: {engine:?}");
    });
}
