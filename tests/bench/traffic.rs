//! What a workload does, as fast as it can for a while: one thread a side, each on a core of its own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::Member;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;

use crate::figures::Samples;

const STREAM: u16 = 7001;
const CONNECT: u16 = 7002;
const ECHO: u16 = 7003;
const DATAGRAMS: u16 = 7004;

/// The calling thread stays on this core, if there is one of that number.
fn stay_on(core: usize) {
    let mut set = CpuSet::new();
    if set.set(core).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Ports that a workload of these benchmarks serves.
pub(crate) const PORTS: [(&str, u16); 4] = [("tcp", STREAM), ("tcp", CONNECT), ("tcp", ECHO), ("udp", DATAGRAMS)];

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
        let listen = |port| member.netns.run(|| TcpListener::bind((member.v4, port)).expect("a free port"));
        let mut threads = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        threads.push(accepting(listen(STREAM), &stop, move |mut stream| while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}));
        threads.push(accepting(listen(CONNECT), &stop, drop));
        threads.push(accepting(listen(ECHO), &stop, |mut stream| {
            let _ = stream.set_nodelay(true);
            let mut request = [0; 64];
            while stream.read_exact(&mut request).is_ok() && stream.write_all(&request).is_ok() {}
        }));
        let socket = member.netns.run(|| UdpSocket::bind((member.v4, DATAGRAMS)).expect("a free port"));
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
        let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
        let (until, counted) = (Arc::clone(&stop), Arc::clone(&heard));
        threads.push(thread::spawn(move || {
            stay_on(1);
            let mut buffer = [0; 64];
            while !until.load(Ordering::Relaxed) {
                if socket.recv(&mut buffer).is_ok() {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
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

fn accepting(listener: TcpListener, stop: &Arc<AtomicBool>, mut serve: impl FnMut(TcpStream) + Send + 'static) -> JoinHandle<()> {
    let stop = Arc::clone(stop);
    // Blocking accepts that wake now and then to see whether it is over.
    let _ = setsockopt(&listener, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(0, 50_000));
    thread::spawn(move || {
        stay_on(1);
        while !stop.load(Ordering::Relaxed) {
            if let Ok((stream, _)) = listener.accept() {
                serve(stream);
            }
        }
    })
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
pub(crate) fn connects(client: &Member, server: &Serving, window: Duration) -> f64 {
    as_client(client, || {
        let begun = Instant::now();
        let mut made = 0_u64;
        while begun.elapsed() < window {
            let stream = connect((server.at, CONNECT).into());
            let _ = setsockopt(&stream, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 });
            made += 1;
        }
        made as f64 / begun.elapsed().as_secs_f64()
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

/// Datagrams of 16 bytes that arrive a second, of one flow.
pub(crate) fn datagrams(client: &Member, server: &Serving, window: Duration) -> f64 {
    as_client(client, || {
        let socket = UdpSocket::bind((client.v4, 0)).expect("a free port");
        socket.connect((server.at, DATAGRAMS)).expect("an address");
        let before = server.heard.load(Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < window {
            for _ in 0..64 {
                let _ = socket.send(&[0; 16]);
            }
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
        (last - before) as f64 / sent_for.as_secs_f64()
    })
}
