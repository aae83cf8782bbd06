//! Frames of which a sum is yet to be written, at a place of the sender's choice (PACKET_VNET_HDR, packet(7)).

use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

use crate::Netns;
use crate::frame;

/// A packet socket whose frames come with a header that says where a sum is to be written.
#[derive(Debug)]
pub struct Unsummed(OwnedFd);

#[allow(unsafe_code)]
impl Unsummed {
    /// Of `eth0`.
    ///
    /// # Panics
    /// Where none can be made.
    pub fn open(netns: &Netns) -> Self {
        netns.run(|| {
            // SAFETY: socket(2) takes no pointers; the descriptor is new and owned by nobody else.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            assert!(fd >= 0);
            // SAFETY: as above.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            let on: libc::c_int = 1;
            // SAFETY: a pointer to an integer that lives, and its size.
            let set = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, 15, (&raw const on).cast(), 4) };
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
            // SAFETY: zeroes are a valid value of a plain C struct.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = nix::net::if_::if_nametoindex("eth0").expect("the namespace has an eth0") as i32;
            // SAFETY: a pointer to a sockaddr_ll that lives, and its size.
            let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) };
            assert_eq!(bound, 0);
            Self(socket)
        })
    }

    /// The sum of all from `start` on is to be written `offset` bytes behind that. False: not even the sender's kernel takes that.
    ///
    /// # Panics
    /// Where it cannot be sent for another reason.
    pub fn send(&self, frame: &[u8], start: usize, offset: usize) -> bool {
        let words = [frame.len() as u16, 0, start as u16, offset as u16].map(u16::to_ne_bytes).concat();
        let whole = [&[1, 0][..], &words, frame].concat();
        match nix::unistd::write(&self.0, &whole) {
            Err(nix::errno::Errno::EINVAL) => false,
            sent => sent.expect("a frame can be sent") == whole.len(),
        }
    }
}

/// The sum in one's complement (RFC 1071).
pub fn sum(bytes: &[u8]) -> u16 {
    !frame::checksum(bytes)
}

/// What has to be added for one to become the other, in one's complement.
pub fn between(is: u16, wanted: u16) -> u16 {
    let sum = u32::from(wanted) + u32::from(!is);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Two pieces of a packet as they are on a wire.
///
/// # Panics
/// Where there is no such packet.
pub fn pieces(packet: &[u8], header: usize, cut: usize) -> [Vec<u8>; 2] {
    let part = |offset: usize, more: bool, bytes: &[u8]| {
        if packet[0] >> 4 == 4 {
            let mut part = [&packet[..20], bytes].concat();
            let length = part.len() as u16;
            part[2..4].copy_from_slice(&length.to_be_bytes());
            part[6..8].copy_from_slice(&((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
            part[10..12].fill(0);
            let sum = frame::checksum(&part[..20]);
            part[10..12].copy_from_slice(&sum.to_be_bytes());
            part
        } else {
            let fragment = [&[packet[6], 0][..], &(offset as u16 | u16::from(more)).to_be_bytes(), &[0, 0, 0x71, 7]].concat();
            let mut part = [&packet[..40], &fragment, bytes].concat();
            let length = (part.len() - 40) as u16;
            part[4..6].copy_from_slice(&length.to_be_bytes());
            part[6] = 44;
            part
        }
    };
    let body = &packet[header..];
    [part(0, true, &body[..cut]), part(cut, false, &body[cut..])]
}

/// A datagram in IPv4 to one port, which becomes one to `wanted` once the sum from its UDP header on is written over that port.
pub fn led_astray(from: (IpAddr, u16), to: (IpAddr, u16), wanted: u16, words: &[u8]) -> Vec<u8> {
    let build = |filler: u16| {
        let mut datagram = frame::udp(from, to, &[words, &filler.to_be_bytes()].concat());
        // None is needed in IPv4 (RFC 768).
        datagram[6..8].fill(0);
        datagram
    };
    frame::ip(from.0, to.0, frame::PROTO_UDP, &build(between(sum(&build(0)), !wanted)))
}
