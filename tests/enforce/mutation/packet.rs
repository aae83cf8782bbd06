//! Packets of the probes: whole IP packets of every protocol, each with its number.

use std::net::IpAddr;

use lab::frame;
use policy::{Protocol, Service};

use super::scene::{marker, sequence};

/// TCP flags.
pub(crate) const SYN: u8 = 2;
pub(super) const ACK: u8 = 16;

/// A packet's ends, and its transport ports or ICMP type.
#[derive(Clone, Copy)]
pub(crate) struct Tuple {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) service: Service,
    pub(crate) source_port: u16,
}

impl Tuple {
    pub(super) fn turned(self) -> Self {
        let service = Service { port: self.source_port, ..self.service };
        Self { from: self.to, to: self.from, service, source_port: self.service.port }
    }
}

pub(super) fn with_sum(mut message: Vec<u8>, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let sum = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (message.len() as u32).to_be_bytes();
            frame::checksum(&[&from.octets()[..], &to.octets(), &length, &[0, 0, 0, 58], &message].concat())
        }
        _ => frame::checksum(&message),
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An ICMP message of either version, in a packet.
pub(super) fn icmp(from: IpAddr, to: IpAddr, head: [u8; 8], body: &[u8]) -> Vec<u8> {
    let protocol = if from.is_ipv4() { frame::PROTO_ICMP } else { frame::PROTO_ICMPV6 };
    frame::ip(from, to, protocol, &with_sum([&head[..], body].concat(), from, to))
}

pub(crate) fn packet(id: u16, tuple: Tuple, flags: u8) -> Vec<u8> {
    following(id, tuple, flags, 0)
}

/// The same; of TCP, one that acknowledges this.
pub(super) fn following(id: u16, tuple: Tuple, flags: u8, acknowledged: u32) -> Vec<u8> {
    let Tuple { from, to, service, source_port } = tuple;
    let body = match service.protocol {
        Protocol::Tcp => {
            let numbers = (sequence(id), acknowledged);
            frame::tcp_carrying((from, source_port), (to, service.port), numbers, flags, &marker(id))
        }
        Protocol::Udp => frame::udp((from, source_port), (to, service.port), &marker(id)),
        Protocol::Sctp => {
            let chunk =
                [&[1, 0, 0, 32][..], &[9; 4], &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1], &[0xc0, 1, 0, 12], &marker(id), &[0; 2]].concat();
            frame::sctp(source_port, service.port, 0, &chunk)
        }
        Protocol::Icmp | Protocol::Icmpv6 => {
            let [high, low] = source_port.to_be_bytes();
            return icmp(from, to, [service.port as u8, 0, 0, 0, high, low, 0, 1], &marker(id));
        }
        Protocol::Other(_) => [vec![0; 8], marker(id)].concat(),
    };
    frame::ip(from, to, service.protocol.number(), &body)
}

/// An IPv4 packet with four bytes of options (RFC 791, 3.1).
pub(super) fn with_options(packet: Vec<u8>, options: [u8; 4]) -> Vec<u8> {
    let mut bytes = [&packet[..20], &options, &packet[20..]].concat();
    bytes[0] = 0x46;
    let length = bytes.len() as u16;
    bytes[2..4].copy_from_slice(&length.to_be_bytes());
    bytes[10..12].fill(0);
    let sum = frame::checksum(&bytes[..24]);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The packet with an empty record of its route (RFC 791), or a routing header that has nothing left to do (RFC 8200, 4.4).
pub(super) fn by_a_route(packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        return with_options(packet, [7, 3, 4, 0]);
    }
    let header = [packet[6], 0, 4, 0, 0, 0, 0, 0];
    let mut bytes = [&packet[..40], &header, &packet[40..]].concat();
    bytes[6] = 43;
    let length = (bytes.len() - 40) as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes
}

pub(super) fn service(text: &str) -> Service {
    text.parse().unwrap()
}

pub(crate) fn ethertype(packet: &[u8]) -> u16 {
    if packet[0] >> 4 == 4 { frame::ETH_IPV4 } else { frame::ETH_IPV6 }
}
