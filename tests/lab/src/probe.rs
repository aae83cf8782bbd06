//! Probes: one question to the network, asked from inside a namespace, and its plain answer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use nix::libc;

use crate::netns::Netns;

/// How long a probe waits. A denied SYN without an answer is repeated after 1 s: long enough to see that no answer comes,
/// short enough for many probes.
pub const PATIENCE: Duration = Duration::from_millis(900);

/// What became of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tcp {
    /// Established, after this time.
    Open(Duration),
    /// Reset, after this time.
    Refused(Duration),
    /// No answer at all.
    TimedOut,
    /// An ICMP error or no route.
    Unreachable,
}

impl Tcp {
    /// Whether a connection was established.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Open(_))
    }

    /// Whether it was reset.
    pub fn is_refused(self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// What became of a datagram or an echo request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// The same bytes came back.
    Answered,
    /// An ICMP error came back.
    Refused,
    /// Nothing came back.
    Silent,
}

impl Netns {
    /// Connects and hangs up.
    pub fn tcp(&self, to: SocketAddr) -> Tcp {
        self.tcp_within(to, PATIENCE)
    }

    /// Connects within this time, and hangs up.
    ///
    /// # Panics
    /// On an error that is about the lab, not the network.
    pub fn tcp_within(&self, to: SocketAddr, patience: Duration) -> Tcp {
        let from = Instant::now();
        match self.connect(to, patience) {
            Ok(_) => Tcp::Open(from.elapsed()),
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => Tcp::Refused(from.elapsed()),
            Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => Tcp::TimedOut,
            Err(e) if is_unreachable(&e) => Tcp::Unreachable,
            Err(e) => panic!("connect to {to} from {}: {e}", self.name()),
        }
    }

    /// A connection that lives as long as the caller keeps it; reads and writes give up after [`PATIENCE`].
    ///
    /// # Errors
    /// Those of connect.
    pub fn connect(&self, to: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
        let stream = self.run(|| TcpStream::connect_timeout(&to, patience))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Connects, sends `text`, and returns whether the same came back: the connection carried payload both ways.
    pub fn tcp_echo(&self, to: SocketAddr, text: &[u8]) -> bool {
        // As long as a SYN that was lost is repeated.
        self.connect(to, Duration::from_secs(4)).is_ok_and(|mut stream| still_echoes(&mut stream, text))
    }

    /// A request over HTTP/1.0; the body of the answer.
    ///
    /// # Errors
    /// Those of connect and read.
    pub fn http_get(&self, to: SocketAddr, path: &str) -> io::Result<String> {
        let mut stream = self.connect(to, PATIENCE)?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).ok_or_else(|| io::Error::other("no HTTP answer"))
    }

    /// A datagram that is sent and forgotten, from a port that the kernel chooses.
    ///
    /// # Panics
    /// Where it cannot be sent.
    pub fn udp_send(&self, to: SocketAddr, text: &[u8]) {
        // An ICMP error to the last datagram is reported on the next send: it is the network's answer, not the lab's.
        let sent = self.udp_socket(to).send_to(text, to);
        assert!(
            sent.as_ref().is_ok_and(|n| *n == text.len()) || sent.as_ref().is_err_and(|e| !matches!(e.kind(), ErrorKind::InvalidInput))
        );
    }

    /// A datagram, and whether it came back.
    pub fn udp_echo(&self, to: SocketAddr, text: &[u8]) -> Echo {
        let socket = self.udp_socket(to);
        let asked = socket.connect(to).and_then(|()| socket.send(text));
        let mut answer = [0; 2048];
        match asked.and_then(|_| socket.recv(&mut answer)) {
            Ok(n) if answer[..n] == *text => Echo::Answered,
            Err(e) if e.kind() == ErrorKind::ConnectionRefused || is_unreachable(&e) => Echo::Refused,
            Ok(_) | Err(_) => Echo::Silent,
        }
    }

    /// A UDP socket of the namespace, of the family of `to`, with the probe's patience.
    ///
    /// # Panics
    /// Where none can be made.
    pub fn udp_socket(&self, to: SocketAddr) -> UdpSocket {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
        let socket = self.run(|| UdpSocket::bind(any)).expect("a UDP socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        socket
    }

    /// An ICMP or ICMPv6 echo request, and whether the answer came.
    ///
    /// # Panics
    /// Where no raw socket can be opened.
    pub fn ping(&self, to: IpAddr) -> Echo {
        let identifier = std::process::id().to_be_bytes();
        let (family, kind, answer_kind, protocol) = match to {
            IpAddr::V4(_) => (libc::AF_INET, 8, 0, libc::IPPROTO_ICMP),
            IpAddr::V6(_) => (libc::AF_INET6, 128, 129, libc::IPPROTO_ICMPV6),
        };
        let mut request = vec![kind, 0, 0, 0, identifier[2], identifier[3], 0, 1];
        request.extend_from_slice(b"bulkhead lab");
        let sum = crate::frame::checksum(&request);
        // The kernel fills in the checksum of ICMPv6.
        request[2..4].copy_from_slice(&sum.to_be_bytes());
        let socket = self.run(|| crate::frame::raw_socket(family, protocol)).expect("a raw socket needs root");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        if let Err(e) = socket.send_to(&request, (to, 0)) {
            assert!(is_unreachable(&e) || e.kind() == ErrorKind::PermissionDenied, "ping {to}: {e}");
            return Echo::Refused;
        }
        let end = Instant::now() + PATIENCE;
        let mut packet = [0; 2048];
        while Instant::now() < end {
            let Ok((n, _)) = socket.recv_from(&mut packet) else { continue };
            // A raw IPv4 socket hands out the IP header too.
            let skip = if to.is_ipv4() { usize::from(packet[0] & 0x0f) * 4 } else { 0 };
            let message = packet.get(skip..n).unwrap_or_default();
            let errors: &[u8] = if to.is_ipv4() { &[3, 11, 12] } else { &[1, 3, 4] };
            match message.first() {
                Some(k) if *k == answer_kind && message.get(4..6) == Some(&identifier[2..4]) => return Echo::Answered,
                Some(k) if errors.contains(k) => return Echo::Refused,
                Some(_) | None => {}
            }
        }
        Echo::Silent
    }
}

/// Whether a living connection to an echo server still carries bytes both ways.
pub fn still_echoes(stream: &mut TcpStream, text: &[u8]) -> bool {
    let mut answer = vec![0; text.len()];
    stream.write_all(text).and_then(|()| stream.read_exact(&mut answer)).is_ok() && answer == text
}

fn is_unreachable(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable)
        || matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPROTO | libc::ENOPROTOOPT))
}
