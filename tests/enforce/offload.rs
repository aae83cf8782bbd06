//! What a sender leaves to the hardware: a checksum that is yet to be written, at a place of the sender's choice (PACKET_VNET_HDR). Each
//! attack is shown to be one first.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lab::frame;
use lab::probe::{Echo, still_echoes};
use lab::unsummed::{Unsummed, between, pieces, sum};
use lab::{Capture, Internet, Netns, Server, eventually, needs_root};
use nix::libc;
use node_agent::enforce::sums;
use policy::Mode;

use crate::hostile::kind;
use crate::stage::{Policy, apply, enforcer, inventory, mac_of, settled};

/// Keeps such packets out of a namespace, or ends the test aloud where the kernel cannot.
macro_rules! kept_out {
    ($host:expr) => {
        lab::or_skip!($host.run(|| sums::keep_out().map_err(|error| format!("{error:?}"))))
    };
}

const BRIEFLY: Duration = Duration::from_millis(600);
const ETHERNET: usize = 14;
const SYN: u8 = 2;

const WORDS: &[u8; 36] = b"lab-rewritten-packet-of-some-words..";

/// A datagram to port 53 that nobody has to check, with a word of the sender's choice.
fn without_sum(from: IpAddr, to: IpAddr, length: usize, filler: u16) -> Vec<u8> {
    let mut data = vec![7; length];
    data[..36].copy_from_slice(WORDS);
    data[34..36].copy_from_slice(&filler.to_be_bytes());
    let mut datagram = frame::udp((from, 5000), (to, 53), &data);
    datagram[6..8].fill(0);
    frame::ip(from, to, frame::PROTO_UDP, &datagram)
}

fn listener(netns: &Netns, at: (IpAddr, u16)) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(at).unwrap());
    socket.set_read_timeout(Some(BRIEFLY)).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 4096];
    socket.recv_from(&mut buffer).ok().map(|(length, _)| buffer[..length].to_vec())
}

#[test]
fn a_checksum_that_is_yet_to_be_written_changes_no_port_behind_the_filter() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let wire = Unsummed::open(&a.netns);
    let attack = || {
        let mut heard_at_99 = Vec::new();
        for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
            let denied = listener(&b.netns, (to, 99));
            // A word of the payload makes the sum what the port is to be.
            let build = |source: u16, filler: u16, checksum: u16| {
                let mut data = WORDS.to_vec();
                data[34..36].copy_from_slice(&filler.to_be_bytes());
                let mut datagram = frame::udp((from, source), (to, 53), &data);
                datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
                datagram
            };
            let (header, datagram, start) = match (from, to) {
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    // Valid with the other port: the sum leaves the source port out, which makes up for it.
                    let length = build(0, 0, 0).len() as u16;
                    let pseudo = [&source.octets()[..], &destination.octets(), &length.to_be_bytes(), &[0, 17]].concat();
                    let port = between(sum(&pseudo), 53);
                    let filler = between(sum(&build(port, 0, 0x1234)[2..]), !99);
                    (40, build(port, filler, 0x1234), ETHERNET + 40 + 8 + 2)
                }
                _ => (20, build(5000, between(sum(&build(5000, 0, 0)), !99), 0), ETHERNET + 20 + 2),
            };
            // IPv4: from the source port on, two bytes behind it; IPv6: the port itself.
            let (start, offset) = if header == 20 { (start - 2, 2) } else { (start, 0) };
            let packet = frame::ip(from, to, frame::PROTO_UDP, &datagram);
            for piece in pieces(&packet, header, 24) {
                wire.send(&frame::ethernet(b.mac, a.mac, kind(from), &piece), start, offset);
            }
            heard_at_99.extend(heard(&denied).map(|_| to));
        }
        heard_at_99
    };
    assert_eq!(attack(), b.addresses(), "without the program");
    let _kept = kept_out!(host);
    assert_eq!(attack(), Vec::<IpAddr>::new());
}

#[test]
fn a_checksum_that_is_yet_to_be_written_changes_no_sender_behind_the_filter() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, socket) = (Unsummed::open(&a.netns), listener(&b.netns, (b.v4.into(), 53)));
    let low = u16::from_be_bytes([c.v4.octets()[2], c.v4.octets()[3]]);
    let packet = |filler| without_sum(a.v4.into(), b.v4.into(), 36, filler);
    let attack = || {
        for piece in pieces(&packet(between(sum(&packet(0)[12..]), !low)), 20, 24) {
            wire.send(&frame::ethernet(b.mac, a.mac, frame::ETH_IPV4, &piece), ETHERNET + 12, 2);
        }
        socket.recv_from(&mut [0; 100]).ok().map(|(_, from)| from.ip())
    };
    assert_eq!(attack(), Some(c.v4.into()), "without the program; {} sent it", a.v4);
    let _kept = kept_out!(host);
    assert_eq!(attack(), None, "{} sent it", a.v4);
}

#[test]
fn a_checksum_that_is_yet_to_be_written_changes_no_receiver_outside_behind_the_filter() {
    needs_root!();
    node!(host, bridge: a);
    let internet = Internet::behind(&host);
    settled(&host);
    let (allowed, other): (IpAddr, IpAddr) = ("198.51.100.7".parse().unwrap(), "198.51.9.9".parse().unwrap());
    [allowed, other].into_iter().for_each(|at| internet.add_address(at));
    let inventory = inventory(&[(&bridge, &[("a", &a)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).egress("a", "outside:198.51.100.7/32", "udp/53").bind(&inventory));
    let (wire, socket) = (Unsummed::open(&a.netns), listener(&internet.netns, (other, 53)));
    // More than the uplink takes at once, so that it is cut anew there.
    let packet = |filler| without_sum(a.v4.into(), allowed, 1600, filler);
    let attack = || {
        for piece in pieces(&packet(between(sum(&packet(0)[12..]), !0x0909)), 20, 1400) {
            wire.send(&frame::ethernet(mac_of(&host, "br0"), a.mac, frame::ETH_IPV4, &piece), ETHERNET + 12, 6);
        }
        heard(&socket).map(|data| data.len())
    };
    assert_eq!(attack(), Some(1600), "without the program");
    let _kept = kept_out!(host);
    assert_eq!(attack(), None, "{other} heard what is for {allowed} alone");
}

/// Allowed from a to b: what the tests of honest traffic send.
fn honest() -> Policy {
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    ["tcp/80", "udp/53", "udp/4789", "sctp/36412", "icmp/8", "icmpv6/128"]
        .into_iter()
        .fold(policy, |policy, ports| policy.allow("a", "b", ports))
}

#[test]
fn a_sum_at_any_other_place_drops_the_packet_and_at_its_own_place_it_passes() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &honest().bind(&inventory));
    let _kept = kept_out!(host);
    let wire = Unsummed::open(&a.netns);
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        let header = if from.is_ipv4() { 20 } else { 40 };
        let socket = listener(&b.netns, (to, 53));
        let send = |start: usize, offset: usize| {
            let mut datagram = frame::udp((from, 5000), (to, 53), WORDS);
            // The receiver believes a sum that its own node was to write.
            datagram[6..8].fill(0x12);
            wire.send(
                &frame::ethernet(b.mac, a.mac, kind(from), &frame::ip(from, to, frame::PROTO_UDP, &datagram)),
                ETHERNET + start,
                offset,
            );
            heard(&socket).is_some()
        };
        assert!(send(header, 6), "{to}: the sum of UDP where it belongs");
        for (what, start, offset) in [
            ("the receiver's port", header, 2),
            ("the sender's port", header, 0),
            ("the receiver's port, from the header on", 0, header + 2),
            ("the sender's address", 0, header - 8),
            ("the receiver's address", 8, header - 10),
            ("the length", header, 4),
            ("where the sum of UDP belongs, of something else", 0, header + 6),
            ("where that of TCP belongs", header, 16),
            ("the words", header + 2, 20),
        ] {
            assert!(!send(start, offset), "{to}: {what}");
        }
        assert!(send(header + 8, 6), "{to}: in what a tunnel over UDP carries");
        // Nor are a segment's flags for anybody to write later.
        let segments = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&segments);
        let capture = Capture::start(&b.netns, Some("eth0"), move |packet| {
            seen.fetch_add(u64::from(!packet.outgoing && packet.protocol == frame::PROTO_TCP), Ordering::Relaxed);
        });
        for (what, start, offset, passes) in [
            ("the sum of TCP where it belongs", header, 16, true),
            ("the flags", header, 12, false),
            ("the flags, from further on", header + 10, 2, false),
            ("what follows", header + 12, 6, false),
        ] {
            let before = segments.load(Ordering::Relaxed);
            let segment = frame::ip(from, to, frame::PROTO_TCP, &frame::tcp((from, 5001), (to, 80), 7, SYN));
            wire.send(&frame::ethernet(b.mac, a.mac, kind(from), &segment), ETHERNET + start, offset);
            let seen = || if segments.load(Ordering::Relaxed) > before { Ok(()) } else { Err(format!("{to}: {what}")) };
            if passes {
                lab::eventually(Duration::from_secs(5), seen);
            } else {
                std::thread::sleep(Duration::from_millis(150));
                assert!(seen().is_err(), "{to}: {what}");
            }
        }
        capture.end();
    }
}

#[test]
fn what_a_containers_own_kernel_leaves_to_the_hardware_passes() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &honest().bind(&inventory));
    let _kept = kept_out!(host);
    for to in b.addresses() {
        let _tcp = Server::tcp_echo(&b.netns, (to, 80).into());
        let mut stream = a.netns.connect((to, 80).into(), Duration::from_secs(2)).unwrap();
        assert!(still_echoes(&mut stream, &[7; 60_000]), "{to}: TCP in large pieces");
        let _udp = Server::udp_echo(&b.netns, (to, 53).into());
        for length in [1, 1200, 1900] {
            assert_eq!(
                a.netns.udp_echo((to, 53).into(), &vec![7; length]),
                Echo::Answered,
                "{to}: UDP of {length} bytes, the last in fragments"
            );
        }
        assert_eq!(a.netns.ping(to), Echo::Answered, "{to}: ping");
    }
    // IPv6 with destination options, by the socket's own wish (RFC 3542, 9.1).
    let to: SocketAddr = (b.addresses()[1], 80).into();
    let _tcp = Server::tcp_echo(&b.netns, to);
    let options: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let stream = a.netns.connect(to, Duration::from_secs(2)).unwrap();
    // SAFETY: a pointer to eight bytes that live, and their number.
    #[allow(unsafe_code)]
    let set = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, options.as_ptr().cast(), options.len() as u32)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let mut stream = stream;
    assert!(still_echoes(&mut stream, b"behind an extension header"));

    // A tunnel between the two, with sums of its own within.
    for (end, own, other, inner) in [(&a.netns, a.v4, b.v4, "10.99.0.1/24"), (&b.netns, b.v4, a.v4, "10.99.0.2/24")] {
        end.ip(&format!("link add vx0 type vxlan id 5 dstport 4789 local {own} remote {other}"));
        end.ip(&format!("address add {inner} dev vx0"));
        end.ip("link set vx0 up");
    }
    apply(&mut enforcer, &honest().allow("b", "a", "udp/4789").bind(&inventory));
    let inside: SocketAddr = "10.99.0.2:80".parse().unwrap();
    let _tcp = Server::tcp_echo(&b.netns, inside);
    let mut stream = eventually(Duration::from_secs(5), || a.netns.connect(inside, Duration::from_secs(2)));
    assert!(still_echoes(&mut stream, &[7; 60_000]), "through a tunnel");
}
