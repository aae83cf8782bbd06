//! What a workload does, as fast as it can for a while: one thread a side, each on a core of its own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::Member;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

use crate::figures::Samples;

const STREAM: u16 = 7001;
const CONNECT: u16 = 7002;
const ECHO: u16 = 7003;
const ANSWERED: u16 = 7004;
const ONE_WAY: u16 = 7005;

/// The calling thread stays on this core, if there is one of that number.
fn stay_on(core: usize) {
    let mut set = CpuSet::new();
    if set.set(core).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Ports that a workload of these benchmarks serves.
pub(crate) const PORTS: [(&str, u16); 5] = [("tcp", STREAM), ("tcp", CONNECT), ("tcp", ECHO), ("udp", ANSWERED), ("udp", ONE_WAY)];

/// The serving end: it sinks streams, closes what connects, echoes requests, counts datagrams.
pub(crate) struct Serving {
    at: Ipv4Addr,
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Serving {
    pub(crate) fn start(member: &Member) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicU64::new(0));
        let listening = |port| {
            let socket = member.netns.run(|| TcpListener::bind((member.v4, port)).expect("a free port"));
            // The standard library's 128 connections are those of 5 ms: a server that waits that long for a processor would have a SYN
            // dropped, and a whole second would be the client's to wait and not the filter's.
            listen(&socket, Backlog::MAXCONN).expect("it listens already");
            socket
        };
        let mut threads = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        threads.push(accepting(listening(STREAM), &stop, move |mut stream| while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}));
        threads.push(accepting(listening(CONNECT), &stop, drop));
        threads.push(accepting(listening(ECHO), &stop, |mut stream| {
            let _ = stream.set_nodelay(true);
            let mut request = [0; 64];
            while stream.read_exact(&mut request).is_ok() && stream.write_all(&request).is_ok() {}
        }));
        for port in [ANSWERED, ONE_WAY] {
            let socket = member.netns.run(|| UdpSocket::bind((member.v4, port)).expect("a free port"));
            threads.push(counting(socket, port == ANSWERED, &stop, &heard));
        }
        Self { at: member.v4, stop, heard, threads }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Counts datagrams; the first of each sender is answered, or none.
fn counting(socket: UdpSocket, answers: bool, stop: &Arc<AtomicBool>, heard: &Arc<AtomicU64>) -> JoinHandle<()> {
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
    let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
    let (until, counted) = (Arc::clone(stop), Arc::clone(heard));
    thread::spawn(move || {
        stay_on(1);
        let mut buffer = [0; 64];
        let mut known = None;
        while !until.load(Ordering::Relaxed) {
            let Ok((_, sender)) = socket.recv_from(&mut buffer) else { continue };
            counted.fetch_add(1, Ordering::Relaxed);
            if answers && known.replace(sender) != Some(sender) {
                let _ = socket.send_to(&[1], sender);
            }
        }
    })
}

fn accepting(listener: TcpListener, stop: &Arc<AtomicBool>, mut serve: impl FnMut(TcpStream) + Send + 'static) -> JoinHandle<()> {
    let stop = Arc::clone(stop);
    // Blocking accepts that wake now and then to see whether it is over.
    let _ = setsockopt(&listener, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(0, 50_000));
    thread::spawn(move || {
        stay_on(1);
        while !stop.load(Ordering::Relaxed) {
            if let Ok((stream, _)) = listener.accept() {
                // It has the listener's, and its client may be kept waiting by others for longer.
                let _ = stream.set_read_timeout(None);
                serve(stream);
            }
        }
    })
}

/// What was done in a while, and the processor time of this process, both ends and the kernel's part, that one of it took.
///
/// On a machine that does other things too the time is steadier than the rate.
#[derive(Clone, Copy)]
pub(crate) struct Done {
    /// A second.
    pub(crate) rate: f64,
    /// Seconds.
    pub(crate) cost: f64,
}

fn processor_time() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process knows its own use");
    [usage.user_time(), usage.system_time()].iter().map(|time| time.num_microseconds() as f64 / 1e6).sum()
}

/// One client thread in a member's namespace.
fn as_client<T: Send>(client: &Member, work: impl FnOnce() -> T + Send) -> T {
    client.netns.run(|| {
        stay_on(0);
        work()
    })
}

fn connect(to: SocketAddr) -> TcpStream {
    TcpStream::connect_timeout(&to, Duration::from_secs(2)).expect("an allowed connection")
}

/// Bytes a second of one TCP stream.
pub(crate) fn throughput(client: &Member, server: &Serving, window: Duration) -> f64 {
    as_client(client, || {
        let mut stream = connect((server.at, STREAM).into());
        let block = vec![0; 256 * 1024];
        let begun = Instant::now();
        let mut sent = 0_u64;
        while begun.elapsed() < window {
            stream.write_all(&block).expect("the stream goes on");
            sent += block.len() as u64;
        }
        sent as f64 / begun.elapsed().as_secs_f64()
    })
}

/// Connections opened and closed a second, one after the other. They are reset, so that neither ports nor the connection table run out.
pub(crate) fn connects(client: &Member, server: &Serving, window: Duration) -> Done {
    as_client(client, || {
        let spent = processor_time();
        let begun = Instant::now();
        let mut made = 0_u64;
        while begun.elapsed() < window {
            let stream = connect((server.at, CONNECT).into());
            let _ = setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 });
            made += 1;
        }
        Done { rate: made as f64 / begun.elapsed().as_secs_f64(), cost: (processor_time() - spent) / made as f64 }
    })
}

/// Seconds of each request and its answer, 64 bytes each, on one connection.
pub(crate) fn requests(client: &Member, server: &Serving, window: Duration) -> Samples {
    as_client(client, || {
        let mut stream = connect((server.at, ECHO).into());
        stream.set_nodelay(true).expect("a TCP socket");
        let mut buffer = [0; 64];
        let mut took = Samples::default();
        let begun = Instant::now();
        while begun.elapsed() < window {
            let asked = Instant::now();
            stream.write_all(&buffer).expect("the connection goes on");
            stream.read_exact(&mut buffer).expect("an answer");
            took.push(asked.elapsed().as_secs_f64());
        }
        took
    })
}

/// Datagrams of 16 bytes that arrive a second, of one flow: one that was answered, so that connection tracking takes it for
/// established, or one that never is (statsd, syslog).
pub(crate) fn datagrams(client: &Member, server: &Serving, answered: bool, window: Duration) -> Done {
    as_client(client, || {
        let socket = UdpSocket::bind((client.v4, 0)).expect("a free port");
        socket.connect((server.at, if answered { ANSWERED } else { ONE_WAY })).expect("an address");
        if answered {
            socket.send(&[0; 16]).expect("a datagram leaves");
            socket.recv(&mut [0; 16]).expect("the first one is answered");
        }
        let before = server.heard.load(Ordering::Relaxed);
        let spent = processor_time();
        let mut sent = 0_u64;
        let begun = Instant::now();
        while begun.elapsed() < window {
            for _ in 0..64 {
                let _ = socket.send(&[0; 16]);
            }
            sent += 64;
        }
        let sent_for = begun.elapsed();
        // What is still in the receiver's buffer counts; it was sent within the window.
        let mut last = server.heard.load(Ordering::Relaxed);
        loop {
            thread::sleep(Duration::from_millis(20));
            let now = server.heard.load(Ordering::Relaxed);
            if now == last {
                break;
            }
            last = now;
        }
        Done { rate: (last - before) as f64 / sent_for.as_secs_f64(), cost: (processor_time() - spent) / sent as f64 }
    })
}
