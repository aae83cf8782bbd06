//! Small servers on threads, with their sockets inside a namespace, ended when dropped.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::netns::Netns;

/// How often a server looks whether it should end.
const PAUSE: Duration = Duration::from_millis(20);

/// A server, ended when dropped.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    ended: Arc<AtomicBool>,
    heard: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers every connection with what it says.
    pub fn tcp_echo(netns: &Netns, address: SocketAddr) -> Self {
        Self::tcp(netns, address, echo)
    }

    /// Speaks first, as SMTP and MySQL do, then echoes.
    pub fn speaks_first(netns: &Netns, address: SocketAddr, greeting: &str) -> Self {
        let greeting = greeting.to_owned();
        Self::tcp(netns, address, move |mut stream, ended| {
            if stream.write_all(greeting.as_bytes()).is_ok() {
                echo(stream, ended);
            }
        })
    }

    /// Answers every request with 200 and this body.
    pub fn http(netns: &Netns, address: SocketAddr, body: &str) -> Self {
        let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n{body}", body.len());
        Self::tcp(netns, address, move |mut stream, _| {
            let mut request = [0; 4096];
            if stream.read(&mut request).is_ok_and(|n| n > 0) {
                let _ = stream.write_all(answer.as_bytes());
            }
        })
    }

    /// Accepts, and gives each connection to `serve` on a thread of its own.
    ///
    /// # Panics
    /// Where the address cannot be bound.
    pub fn tcp(netns: &Netns, address: SocketAddr, serve: impl Fn(TcpStream, &AtomicBool) + Send + Sync + 'static) -> Self {
        let listener = netns.run(|| TcpListener::bind(address)).unwrap_or_else(|e| panic!("listen on {address}: {e}"));
        listener.set_nonblocking(true).expect("a socket can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let serve = Arc::new(serve);
        Self::on_a_thread(address, move |ended, heard| {
            while !ended.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(PAUSE);
                    continue;
                };
                heard.fetch_add(1, Ordering::Relaxed);
                let _ = (stream.set_nonblocking(false), stream.set_read_timeout(Some(PAUSE)), stream.set_nodelay(true));
                let (serve, ended) = (Arc::clone(&serve), Arc::clone(&ended));
                thread::spawn(move || serve(stream, &ended));
            }
        })
    }

    /// Sends every datagram back to where it came from.
    pub fn udp_echo(netns: &Netns, address: SocketAddr) -> Self {
        Self::udp(netns, address, true)
    }

    /// Takes datagrams and never answers, as a syslog or statsd server does.
    pub fn udp_sink(netns: &Netns, address: SocketAddr) -> Self {
        Self::udp(netns, address, false)
    }

    fn udp(netns: &Netns, address: SocketAddr, answers: bool) -> Self {
        let socket = netns.run(|| UdpSocket::bind(address)).unwrap_or_else(|e| panic!("bind {address}: {e}"));
        socket.set_read_timeout(Some(PAUSE)).expect("a timeout can be set");
        let address = socket.local_addr().expect("a socket has an address");
        Self::on_a_thread(address, move |ended, heard| {
            let mut datagram = [0; 65536];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((n, from)) = socket.recv_from(&mut datagram) {
                    heard.fetch_add(1, Ordering::Relaxed);
                    if answers {
                        let _ = socket.send_to(&datagram[..n], from);
                    }
                }
            }
        })
    }

    fn on_a_thread(address: SocketAddr, work: impl FnOnce(Arc<AtomicBool>, Arc<AtomicU64>) + Send + 'static) -> Self {
        let (ended, heard) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (its_ended, its_heard) = (Arc::clone(&ended), Arc::clone(&heard));
        let thread = Some(thread::spawn(move || work(its_ended, its_heard)));
        Self { address, ended, heard, thread }
    }

    /// How many connections or datagrams have arrived: proof that a denied packet never did.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }
}

fn echo(mut stream: TcpStream, ended: &AtomicBool) {
    let mut bytes = [0; 65536];
    while !ended.load(Ordering::Relaxed) {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(n) if stream.write_all(&bytes[..n]).is_ok() => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
