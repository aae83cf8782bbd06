//! Which networks are private: a rule for who is outside tells them from the Internet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Networks that are not routed on the public Internet: RFC 1918, RFC 6598, RFC 3927; RFC 4193, RFC 4291 2.5.6.
const PRIVATE: [(IpAddr, u8); 7] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
];

/// The private network that an address is of; `None`: it is public.
pub(crate) fn private_network(address: IpAddr) -> Option<IpNet> {
    PRIVATE.iter().filter_map(|&(base, length)| IpNet::new(base, length).ok()).find(|net| net.contains(&address))
}
