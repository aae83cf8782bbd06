//! Raw frames: what a container with NET_RAW can put on its cable.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::netns::Netns;

/// EtherType of IPv4.
pub const ETH_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETH_ARP: u16 = 0x0806;
/// EtherType of an 802.1Q tag.
pub const ETH_VLAN: u16 = 0x8100;
/// EtherType of IPv6.
pub const ETH_IPV6: u16 = 0x86dd;
/// IP protocol numbers.
pub const PROTO_ICMP: u8 = 1;
/// TCP.
pub const PROTO_TCP: u8 = 6;
/// UDP.
pub const PROTO_UDP: u8 = 17;
/// ICMPv6.
pub const PROTO_ICMPV6: u8 = 58;
/// SCTP.
pub const PROTO_SCTP: u8 = 132;

/// A packet socket on one interface: whole Ethernet frames, in and out.
#[derive(Debug)]
pub struct Frames {
    file: File,
}

impl Frames {
    /// Opens the interface inside the namespace.
    ///
    /// # Panics
    /// Where the interface is missing or the process may not.
    pub fn open(netns: &Netns, interface: &str) -> Self {
        let file = netns.run(|| packet_socket(interface)).unwrap_or_else(|e| panic!("packet socket on {interface}: {e}"));
        Self { file }
    }

    /// Sends a frame, from its first address byte on.
    ///
    /// # Panics
    /// Where the kernel refuses it (too short, too long, interface down).
    pub fn send(&self, frame: &[u8]) {
        (&self.file).write_all(frame).expect("the frame can be sent");
    }

    /// The first frame that `wanted` picks, within this time.
    pub fn receive(&self, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut buffer = vec![0; 65536];
        while Instant::now() < end {
            if let Ok(n) = (&self.file).read(&mut buffer)
                && wanted(&buffer[..n])
            {
                return Some(buffer[..n].to_vec());
            }
        }
        None
    }

    /// Everything that has arrived and was not taken yet, without waiting.
    ///
    /// # Panics
    /// Where the socket fails.
    pub fn drain(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 65536];
        loop {
            match recv(self.file.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(n) => frames.push(buffer[..n].to_vec()),
                Err(Errno::EAGAIN) => return frames,
                Err(error) => panic!("a packet socket: {error}"),
            }
        }
    }

    /// Whether a frame that contains `marker` arrives within this time: the marker is the payload that the sender chose.
    pub fn sees(&self, patience: Duration, marker: &[u8]) -> bool {
        self.receive(patience, |f| f.windows(marker.len()).any(|w| w == marker)).is_some()
    }
}

/// An Ethernet frame.
pub fn ethernet(to: [u8; 6], from: [u8; 6], ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ether_type.to_be_bytes(), payload].concat()
}

/// An 802.1Q tag around a payload of another EtherType: the payload of a frame of type [`ETH_VLAN`].
pub fn vlan(id: u16, ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&id.to_be_bytes()[..], &ether_type.to_be_bytes(), payload].concat()
}

/// An IP packet; both addresses must be of one family.
///
/// # Panics
/// Where they are not, or the payload is longer than a packet can be.
pub fn ip(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from, to, protocol, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from, to, protocol, payload),
        (from, to) => panic!("{from} and {to} are not of one family"),
    }
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("a packet has at most 65,535 bytes");
    let mut header = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&header[..], payload].concat()
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("a packet has at most 65,535 bytes");
    let mut header = vec![0x60, 0, 0, 0];
    header.extend_from_slice(&length.to_be_bytes());
    // Neighbour discovery is only believed with the highest hop limit (RFC 4861 section 6.1).
    header.extend_from_slice(&[protocol, 255]);
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    header.extend_from_slice(payload);
    header
}

/// A TCP segment without data that acknowledges nothing; `flags` as in the header (SYN is 2, RST 4, ACK 16).
pub fn tcp(from: (IpAddr, u16), to: (IpAddr, u16), sequence: u32, flags: u8) -> Vec<u8> {
    tcp_carrying(from, to, (sequence, 0), flags, &[])
}

/// A TCP segment with data, by its sequence and acknowledgement numbers.
pub fn tcp_carrying(from: (IpAddr, u16), to: (IpAddr, u16), numbers: (u32, u32), flags: u8, data: &[u8]) -> Vec<u8> {
    tcp_with_options(from, to, numbers, flags, &[], data)
}

/// The same with options.
///
/// # Panics
/// Where these are not whole words, or more than ten.
pub fn tcp_with_options(from: (IpAddr, u16), to: (IpAddr, u16), numbers: (u32, u32), flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
    assert!(options.len().is_multiple_of(4) && options.len() <= 40, "no header has these: {options:?}");
    let words = 5 + u8::try_from(options.len() / 4).expect("at most ten");
    let mut segment = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &numbers.0.to_be_bytes(), &numbers.1.to_be_bytes()].concat();
    segment.extend_from_slice(&[words << 4, flags, 0x40, 0, 0, 0, 0, 0]);
    segment.extend_from_slice(options);
    segment.extend_from_slice(data);
    let sum = pseudo_checksum(from.0, to.0, PROTO_TCP, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// A UDP datagram.
///
/// # Panics
/// Where the payload is longer than a datagram can be.
pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("a datagram has at most 65,535 bytes");
    let mut datagram = [&from.1.to_be_bytes()[..], &to.1.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload].concat();
    let sum = pseudo_checksum(from.0, to.0, PROTO_UDP, &datagram);
    datagram[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    datagram
}

/// An ICMP echo request (v4 or v6 by the addresses).
pub fn echo_request(from: IpAddr, to: IpAddr, identifier: u16, payload: &[u8]) -> Vec<u8> {
    let kind = if from.is_ipv4() { 8 } else { 128 };
    let mut message = [&[kind, 0, 0, 0][..], &identifier.to_be_bytes(), &[0, 1], payload].concat();
    let sum = if from.is_ipv4() { checksum(&message) } else { pseudo_checksum(from, to, PROTO_ICMPV6, &message) };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An SCTP packet with one INIT chunk (RFC 9260 section 3.3.2).
pub fn sctp_init(from_port: u16, to_port: u16, tag: u32) -> Vec<u8> {
    let mut chunk = vec![1, 0, 0, 20];
    chunk.extend_from_slice(&tag.to_be_bytes());
    chunk.extend_from_slice(&65_536_u32.to_be_bytes());
    chunk.extend_from_slice(&[0, 1, 0, 1]);
    chunk.extend_from_slice(&1_u32.to_be_bytes());
    sctp(from_port, to_port, 0, &chunk)
}

/// An SCTP packet with one INIT ACK chunk, answering an INIT that carried `peer_tag`; the cookie is eight bytes of ours.
pub fn sctp_init_ack(from_port: u16, to_port: u16, peer_tag: u32, tag: u32) -> Vec<u8> {
    let mut chunk = vec![2, 0, 0, 32];
    chunk.extend_from_slice(&tag.to_be_bytes());
    chunk.extend_from_slice(&65_536_u32.to_be_bytes());
    chunk.extend_from_slice(&[0, 1, 0, 1]);
    chunk.extend_from_slice(&1_u32.to_be_bytes());
    chunk.extend_from_slice(&[0, 7, 0, 12]);
    chunk.extend_from_slice(b"labcooki");
    sctp(from_port, to_port, peer_tag, &chunk)
}

/// An SCTP packet with the COOKIE ECHO chunk that answers [`sctp_init_ack`].
pub fn sctp_cookie_echo(from_port: u16, to_port: u16, peer_tag: u32) -> Vec<u8> {
    sctp(from_port, to_port, peer_tag, &[&[10, 0, 0, 12][..], b"labcooki"].concat())
}

/// An SCTP packet with a COOKIE ACK chunk: the association is established.
pub fn sctp_cookie_ack(from_port: u16, to_port: u16, peer_tag: u32) -> Vec<u8> {
    sctp(from_port, to_port, peer_tag, &[11, 0, 0, 4])
}

/// An SCTP packet around chunks, with its CRC32c (RFC 9260 appendix A).
pub fn sctp(from_port: u16, to_port: u16, verification_tag: u32, chunks: &[u8]) -> Vec<u8> {
    let mut packet = [&from_port.to_be_bytes()[..], &to_port.to_be_bytes(), &verification_tag.to_be_bytes(), &[0; 4], chunks].concat();
    let mut crc = u32::MAX;
    for byte in &packet {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    packet[8..12].copy_from_slice(&(!crc).to_le_bytes());
    packet
}

/// An ARP reply that claims `address` for `mac`: the payload of a frame of type [`ETH_ARP`].
pub fn arp_reply(mac: [u8; 6], address: Ipv4Addr, to_mac: [u8; 6], to: Ipv4Addr) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac, &address.octets(), &to_mac, &to.octets()].concat()
}

/// The Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // At most 0xffff after the folding.
    !(sum as u16)
}

fn pseudo_checksum(from: IpAddr, to: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let octets = |a: IpAddr| match a {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let length = u32::try_from(segment.len()).expect("a segment fits a packet").to_be_bytes();
    checksum(&[&octets(from)[..], &octets(to), &length, &[0, 0, 0, protocol], segment].concat())
}

/// An inet raw socket of the calling thread's namespace. The standard library's datagram socket serves it: addresses in, packets
/// out.
///
/// # Errors
/// Those of socket(2).
#[allow(unsafe_code)]
pub fn raw_socket(family: i32, protocol: i32) -> io::Result<UdpSocket> {
    // SAFETY: socket(2) takes no pointers; the descriptor is new and owned by nobody else. nix's list of protocols lacks ICMP.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// A packet socket bound to one interface, whose reads give up after 50 ms so that a deadline can be kept.
#[allow(unsafe_code)]
fn packet_socket(interface: &str) -> io::Result<File> {
    let every = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: socket(2) takes no pointers; the descriptor is new and owned by nobody else.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(every)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a sockaddr_ll of zeroes is a valid value of a plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every;
    address.sll_ifindex = i32::try_from(if_nametoindex(interface)?).map_err(io::Error::other)?;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer is to a sockaddr_ll that lives across the call, and the length is its size.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    let pause = nix::sys::time::TimeVal::new(0, 50_000);
    setsockopt(&socket, sockopt::ReceiveTimeout, &pause)?;
    // Hundreds of frames sent at once wait here until they are looked at.
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20))?;
    Ok(File::from(socket))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "unwrap is for tests")]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_the_rfc_example_is_right() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn a_header_with_its_own_checksum_sums_to_zero() {
        let packet = ip("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap(), PROTO_UDP, b"");
        assert_eq!(checksum(&packet), 0);
    }
}
