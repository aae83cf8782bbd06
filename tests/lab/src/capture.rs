//! What really crosses a cable: every IP packet and ARP question that an interface, or all of a namespace, sends or receives, judged by a counter of
//! the test's own while it runs.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::libc;
use nix::net::if_::if_nametoindex;

use crate::frame::{ETH_ARP, ETH_IPV4, ETH_IPV6, ETH_VLAN, PROTO_TCP, PROTO_UDP};
use crate::netns::Netns;

/// Bytes of the kernel's buffer: a burst of some ten thousand packets while the machine is busy.
const BUFFER: usize = 32 * 1024 * 1024;

/// What arrived before the end is looked at for so long, should more come all the time.
const LINGER: Duration = Duration::from_secs(1);

/// One IP packet, or one question by ARP, as it was on an interface.
#[derive(Clone, Debug)]
pub struct Packet {
    /// When the kernel had it, as close as the reader can tell.
    pub at: SystemTime,
    /// Index of the interface, in the namespace of the capture.
    pub interface: u32,
    /// Sent by this namespace; else received.
    pub outgoing: bool,
    /// Addresses.
    pub source: IpAddr,
    /// See `source`.
    pub destination: IpAddr,
    /// ARP's question for `destination`; else IP.
    pub arp: bool,
    /// IP protocol number.
    pub protocol: u8,
    /// 0 where the protocol has none; the type for ICMP in `destination_port`.
    pub source_port: u16,
    /// See `source_port`.
    pub destination_port: u16,
    /// TCP flags, 0 for others.
    pub flags: u8,
    /// Everything behind the IP header.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A SYN without ACK.
    pub fn opens(&self) -> bool {
        self.protocol == PROTO_TCP && self.flags & 0x12 == 0x02
    }

    /// A TCP reset.
    pub fn resets(&self) -> bool {
        self.protocol == PROTO_TCP && self.flags & 0x04 != 0
    }

    /// Whether the sender's text is in it.
    pub fn contains(&self, text: &[u8]) -> bool {
        self.payload.windows(text.len()).any(|w| w == text)
    }

    fn read(frame: &[u8]) -> Option<Self> {
        let number = |bytes: &[u8], at: usize| bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_be_bytes);
        let mut ether_type = number(frame, 12)?;
        let mut rest = frame.get(14..)?;
        while ether_type == ETH_VLAN {
            ether_type = number(rest, 2)?;
            rest = rest.get(4..)?;
        }
        let (source, destination, protocol, payload): (IpAddr, IpAddr, u8, &[u8]) = match ether_type {
            ETH_IPV4 => {
                let address = |at: usize| <[u8; 4]>::try_from(rest.get(at..at + 4)?).ok().map(IpAddr::from);
                (address(12)?, address(16)?, *rest.get(9)?, rest.get(usize::from(rest.first()? & 0xf) * 4..)?)
            }
            ETH_IPV6 => {
                let address = |at: usize| <[u8; 16]>::try_from(rest.get(at..at + 16)?).ok().map(IpAddr::from);
                // Hop-by-hop options come before listener reports (RFC 3810); nothing else here has extension headers.
                let (protocol, at) = if *rest.get(6)? == 0 { (*rest.get(40)?, 48) } else { (*rest.get(6)?, 40) };
                (address(8)?, address(24)?, protocol, rest.get(at..)?)
            }
            // A request (RFC 826): sender's protocol address, target's protocol address.
            ETH_ARP if number(rest, 6)? == 1 => {
                let address = |at: usize| <[u8; 4]>::try_from(rest.get(at..at + 4)?).ok().map(IpAddr::from);
                (address(14)?, address(24)?, 0, &[])
            }
            _ => return None,
        };
        let ports = matches!(protocol, PROTO_TCP | PROTO_UDP);
        let port = |at| if ports { number(payload, at).unwrap_or(0) } else { 0 };
        let kind = payload.first().copied().unwrap_or(0);
        Some(Self {
            at: SystemTime::now(),
            interface: 0,
            outgoing: false,
            source,
            destination,
            arp: ether_type == ETH_ARP,
            protocol,
            source_port: port(0),
            destination_port: if ports { port(2) } else { kind.into() },
            flags: if protocol == PROTO_TCP { payload.get(13).copied().unwrap_or(0) } else { 0 },
            payload: payload.to_vec(),
        })
    }
}

/// A capture that runs until it is dropped.
#[derive(Debug)]
pub struct Capture {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Capture {
    /// Hands every IP packet and ARP question of an interface (`None`: of all interfaces) to `see`, on a thread of its own.
    ///
    /// # Panics
    /// Where the interface is missing or the process may not.
    pub fn start(netns: &Netns, interface: Option<&str>, mut see: impl FnMut(Packet) + Send + 'static) -> Self {
        let socket = netns.run(|| open(interface)).unwrap_or_else(|e| panic!("capture on {interface:?}: {e}"));
        let ended = Arc::new(AtomicBool::new(false));
        let its = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            let mut told: Option<Instant> = None;
            loop {
                if its.load(Ordering::Relaxed) && told.get_or_insert_with(Instant::now).elapsed() > LINGER {
                    return dropped(&socket);
                }
                match receive(&socket, &mut buffer) {
                    Ok(Some((length, interface, outgoing))) => {
                        if let Some(packet) = Packet::read(&buffer[..length]) {
                            see(Packet { interface, outgoing, ..packet });
                        }
                    }
                    // What was there when it was told to end is still looked at.
                    Ok(None) if its.load(Ordering::Relaxed) => return dropped(&socket),
                    Ok(None) => {}
                    // The interface went with its container.
                    Err(_) if its.load(Ordering::Relaxed) => return dropped(&socket),
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Self { ended, thread: Some(thread) }
    }

    /// Ends it, after all that has arrived; how many packets the kernel could not hand over.
    ///
    /// # Panics
    /// Where `see` panicked.
    pub fn end(mut self) -> u64 {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |thread| thread.join().expect("the capture's reader"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[allow(unsafe_code)]
fn open(interface: Option<&str>) -> io::Result<OwnedFd> {
    let every = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket(2) takes no pointers; the descriptor is new and owned by nobody else.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(every)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &BUFFER)?;
    let pause = nix::sys::time::TimeVal::new(0, 50_000);
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::ReceiveTimeout, &pause)?;
    if let Some(interface) = interface {
        // SAFETY: a sockaddr_ll of zeroes is a valid value of a plain C struct.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = i32::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the pointer is to a sockaddr_ll that lives across the call, and the length is its size.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// One frame: its length, its interface, whether it was sent from here. `None`: nothing within the pause.
#[allow(unsafe_code)]
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<(usize, u32, bool)>> {
    // SAFETY: a sockaddr_ll of zeroes is a valid value of a plain C struct.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: both pointers are to live values of the lengths given.
    let read =
        unsafe { libc::recvfrom(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0, (&raw mut from).cast(), &raw mut length) };
    match usize::try_from(read) {
        Ok(read) => Ok(Some((read, from.sll_ifindex.cast_unsigned(), from.sll_pkttype == libc::PACKET_OUTGOING))),
        Err(_) => match io::Error::last_os_error() {
            e if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            e => Err(e),
        },
    }
}

/// Packets that did not fit the buffer (PACKET_STATISTICS, packet(7)).
#[allow(unsafe_code)]
fn dropped(socket: &OwnedFd) -> u64 {
    let mut statistics = [0_u32; 2];
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: both pointers are to live values of the lengths given.
    let read = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, statistics.as_mut_ptr().cast(), &raw mut length)
    };
    if read == 0 { statistics[1].into() } else { 0 }
}
