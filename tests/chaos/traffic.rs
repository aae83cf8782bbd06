//! Traffic that never rests: new connections, old ones, datagrams, and whatever may never arrive; each kept account of.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::Netns;
use nix::libc;

/// Between two beats of each kind of traffic.
const BEAT: Duration = Duration::from_millis(100);
/// What is denied in silence is tried for so long.
const FORBIDDEN_PATIENCE: Duration = Duration::from_millis(300);
/// TCP repeats what was lost; after this long without an answer a connection counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(20);

/// What all threads share.
#[derive(Debug)]
pub(crate) struct Score {
    pub(crate) ended: AtomicBool,
    /// Everything passes right now, by order: the segment is in Learn or Audit.
    pub(crate) open: AtomicBool,
    begun: Instant,
    problems: Mutex<Vec<String>>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// The longest time without an answer, in ms, by kind of traffic.
    silences: Mutex<BTreeMap<&'static str, u64>>,
}

impl Score {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            ended: AtomicBool::new(false),
            open: AtomicBool::new(true),
            begun: Instant::now(),
            problems: Mutex::default(),
            counts: Mutex::default(),
            silences: Mutex::default(),
        })
    }

    /// Seconds since the beginning, to find a problem's deed by.
    pub(crate) fn clock(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    pub(crate) fn problem(&self, text: String) {
        let text = format!("[{:7.3}] {text}", self.clock());
        println!("{text}");
        self.problems.lock().unwrap().push(text);
    }

    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.lock().unwrap().clone()
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }

    pub(crate) fn counted(&self, what: &str) -> u64 {
        self.counts.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    fn silence(&self, what: &'static str, time: Duration) {
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut silences = self.silences.lock().unwrap();
        let longest = silences.entry(what).or_default();
        *longest = time.max(*longest);
    }

    pub(crate) fn summary(&self) -> String {
        let counts = self.counts.lock().unwrap().iter().map(|(what, n)| format!("{what} {n}")).collect::<Vec<_>>();
        let silences = self.silences.lock().unwrap().iter().map(|(what, ms)| format!("{what} {ms} ms")).collect::<Vec<_>>();
        format!("{}; longest without an answer: {}", counts.join(", "), silences.join(", "))
    }

    fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

/// The network namespace of a container that may be restarted: its process is asked for each time.
pub(crate) type Place = Arc<dyn Fn() -> Option<Netns> + Send + Sync>;

/// A namespace that stays.
pub(crate) fn fixed(path: PathBuf) -> Place {
    // The file of a process goes with it; the descriptor keeps the namespace.
    let held = Arc::new(std::fs::File::open(path).unwrap());
    Arc::new(move || Some(Netns::at(format!("/proc/self/fd/{}", held.as_raw_fd()).into())))
}

/// How often the first packet was repeated before the connection stood (TCP_INFO, tcp(7)).
#[allow(unsafe_code)]
fn repeated(stream: &TcpStream) -> u32 {
    // SAFETY: a tcp_info of zeroes is a valid value of a plain C struct.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: both pointers are to live values of the lengths given.
    let read = unsafe { libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length) };
    assert_eq!(read, 0, "TCP_INFO");
    info.tcpi_total_retrans
}

fn spawn(score: &Arc<Score>, mut beat: impl FnMut(&Score) + Send + 'static) -> JoinHandle<()> {
    let score = Arc::clone(score);
    thread::spawn(move || {
        while !score.ended() {
            let next = Instant::now() + BEAT;
            beat(&score);
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    })
}

/// New connections, each with one exchange; all must succeed, with at most one repeated SYN.
pub(crate) fn new_connections(score: &Arc<Score>, from: Place, to: SocketAddr) -> JoinHandle<()> {
    spawn(score, move |score| {
        let Some(from) = from() else { return };
        let begun = Instant::now();
        match from.connect(to, Duration::from_secs(15)) {
            Ok(mut stream) => {
                let again = repeated(&stream);
                score.count("new connections");
                if again > 0 {
                    score.count("new connections with a repeated SYN");
                }
                if again > 1 {
                    score.problem(format!("a new connection needed {again} repeated SYNs"));
                }
                stream.set_read_timeout(Some(DEAD_AFTER)).unwrap();
                if !lab::probe::still_echoes(&mut stream, b"new") {
                    score.problem(format!("a new connection died after {:?}", begun.elapsed()));
                }
                score.silence("new connection", begun.elapsed());
            }
            Err(error) => score.problem(format!("a new connection failed after {:?}: {error}", begun.elapsed())),
        }
    })
}

/// One connection for the whole time, with a beat of the client's.
pub(crate) fn heartbeat(score: &Arc<Score>, from: &Place, to: SocketAddr) -> JoinHandle<()> {
    let mut stream = from().unwrap().connect(to, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(DEAD_AFTER)).unwrap();
    let mut alive = true;
    spawn(score, move |score| {
        if !alive {
            return;
        }
        let begun = Instant::now();
        alive = lab::probe::still_echoes(&mut stream, b"beat");
        if alive {
            score.count("beats");
            score.silence("beat", begun.elapsed());
        } else {
            score.problem(format!("the established connection died within {:?}", begun.elapsed()));
        }
    })
}

/// One connection for the whole time, on which only the server speaks, about every 50 ms.
pub(crate) fn listener(score: &Arc<Score>, from: &Place, to: SocketAddr) -> JoinHandle<()> {
    let mut stream = from().unwrap().connect(to, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(DEAD_AFTER)).unwrap();
    let mut alive = true;
    spawn(score, move |score| {
        if !alive {
            return;
        }
        let begun = Instant::now();
        let mut text = [0; 256];
        alive = stream.read(&mut text).is_ok_and(|n| n > 0);
        if alive {
            score.count("words of the server");
            score.silence("word of the server", begun.elapsed());
        } else {
            score.problem(format!("the connection on which the server speaks died within {:?}", begun.elapsed()));
        }
    })
}

/// What the server of [`listener`] does.
pub(crate) fn speak(mut stream: TcpStream, ended: &AtomicBool) {
    while !ended.load(Ordering::Relaxed) && stream.write_all(b"tick").is_ok() {
        thread::sleep(Duration::from_millis(50));
    }
}

/// Requests and answers by UDP from one socket; one in a row may be lost.
pub(crate) fn datagrams(score: &Arc<Score>, from: &Place, to: SocketAddr) -> JoinHandle<()> {
    let socket = from().unwrap().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut answered = Instant::now();
    let mut number = 0_u64;
    spawn(score, move |score| {
        number += 1;
        let text = format!("good {number}");
        let mut answer = [0; 64];
        let asked = Instant::now();
        let _ = socket.send(text.as_bytes());
        let back = loop {
            match socket.recv(&mut answer) {
                // The answer to an earlier one is late.
                Ok(n) if &answer[..n] != text.as_bytes() => {}
                Ok(_) => break true,
                Err(_) if asked.elapsed() < Duration::from_millis(400) => {}
                Err(_) => break false,
            }
        };
        if back {
            score.count("datagrams answered");
            score.silence("datagram", answered.elapsed());
            answered = Instant::now();
        } else {
            score.count("datagrams lost");
            if answered.elapsed() > Duration::from_secs(2) {
                score.problem(format!("no datagram was answered for {:?}", answered.elapsed()));
                answered = Instant::now();
            }
        }
    })
}

/// Tries to connect, which must never succeed.
pub(crate) fn forbidden(score: &Arc<Score>, who: &'static str, from: Place, to: Vec<SocketAddr>) -> JoinHandle<()> {
    let mut nth = 0;
    spawn(score, move |score| {
        let Some(from) = from() else { return };
        nth += 1;
        let to = to[nth % to.len()];
        let was_open = score.open.load(Ordering::Relaxed);
        // Its namespace may be on its way out.
        let opened = from.try_run(|| TcpStream::connect_timeout(&to, FORBIDDEN_PATIENCE).is_ok());
        score.count("forbidden attempts");
        if opened == Some(true) && !was_open && !score.open.load(Ordering::Relaxed) {
            score.problem(format!("{who} reached {to}"));
        }
    })
}

/// Datagrams that must never arrive: the captures look for their text.
pub(crate) fn evil_datagrams(score: &Arc<Score>, from: Place, to: SocketAddr) -> JoinHandle<()> {
    spawn(score, move |_| {
        if let Some(from) = from() {
            let _ = from.try_run(|| UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"evil", to)));
        }
    })
}

/// The same with the source of somebody who may.
pub(crate) fn spoofed(score: &Arc<Score>, from: &Netns, macs: ([u8; 6], [u8; 6]), as_if: IpAddr, to: SocketAddr) -> JoinHandle<()> {
    let frames = lab::Frames::open(from, "eth0");
    let sent = AtomicU64::new(0);
    spawn(score, move |score| {
        let port = 10_000 + u16::try_from(sent.fetch_add(1, Ordering::Relaxed) % 10_000).unwrap();
        let datagram = lab::frame::udp((as_if, port), (to.ip(), to.port()), b"evil");
        let packet = lab::frame::ip(as_if, to.ip(), lab::frame::PROTO_UDP, &datagram);
        frames.send(&lab::frame::ethernet(macs.1, macs.0, lab::frame::ETH_IPV4, &packet));
        score.count("spoofed packets");
    })
}
