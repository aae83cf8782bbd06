use proptest::prelude::*;

use super::super::netfilter::Writer;
use super::*;

fn tuple(bytes: &[u8]) -> Result<(String, bool), Unreadable> {
    packet(bytes).map(|(tuple, opens)| (tuple.to_string(), opens))
}

fn ipv4(protocol: u8, fragment: u16, behind: &[u8]) -> Vec<u8> {
    let [a, b] = fragment.to_be_bytes();
    [&[0x45, 0, 0, 0, 0, 0, a, b, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2][..], behind].concat()
}

fn ipv6(next: u8, behind: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
    packet.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(behind);
    packet
}

const SYN: [u8; 20] = [0x9c, 0x40, 0, 22, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0];

#[test]
fn ports_are_found_behind_every_header() {
    let syn_ack = {
        let mut bytes = SYN;
        bytes[13] = 0x12;
        bytes
    };
    let hop_by_hop = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &SYN].concat();
    let first_fragment = [&[6, 0, 0, 1, 0, 0, 0, 9][..], &SYN].concat();
    let authenticated = [&[6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1][..], &SYN].concat();
    for (name, bytes, wanted, opens) in [
        ("tcp", ipv4(6, 0, &SYN), "tcp 10.0.0.1:40000 -> 10.0.0.2:22", true),
        ("an answer opens nothing", ipv4(6, 0, &syn_ack), "tcp 10.0.0.1:40000 -> 10.0.0.2:22", false),
        ("udp", ipv4(17, 0, &SYN[..8]), "udp 10.0.0.1:40000 -> 10.0.0.2:22", true),
        ("sctp", ipv4(132, 0, &SYN[..12]), "sctp 10.0.0.1:40000 -> 10.0.0.2:22", true),
        ("icmp echo", ipv4(1, 0, &[8, 0, 0, 0, 0, 7, 0, 1]), "icmp 10.0.0.1:7 -> 10.0.0.2:8", true),
        ("icmp unreachable", ipv4(1, 0, &[3, 1, 0, 0, 0, 7, 0, 1]), "icmp 10.0.0.1:0 -> 10.0.0.2:3", true),
        ("gre", ipv4(47, 0, &[]), "ip47 10.0.0.1:0 -> 10.0.0.2:0", true),
        ("tcp over v6", ipv6(6, &SYN), "tcp 2001:db8::1:40000 -> 2001:db8::2:22", true),
        ("behind hop-by-hop options", ipv6(0, &hop_by_hop), "tcp 2001:db8::1:40000 -> 2001:db8::2:22", true),
        ("in a first fragment", ipv6(44, &first_fragment), "tcp 2001:db8::1:40000 -> 2001:db8::2:22", true),
        ("behind an authentication header", ipv6(51, &authenticated), "tcp 2001:db8::1:40000 -> 2001:db8::2:22", true),
    ] {
        assert_eq!(tuple(&bytes), Ok((wanted.to_owned(), opens)), "{name}");
    }
}

#[test]
fn what_has_no_ports_to_read_is_refused_with_its_reason() {
    let later = ipv6(44, &[6, 0, 0, 16, 0, 0, 0, 9]);
    for (name, bytes, reason) in [
        ("nothing", vec![], "a logged packet is cut off"),
        ("neither family", vec![0x15; 60], "a logged packet is neither IPv4 nor IPv6"),
        ("a header cut off", ipv4(6, 0, &SYN)[..19].to_vec(), "a logged packet is cut off"),
        ("ports cut off", ipv4(6, 0, &SYN[..3]), "a logged packet is cut off"),
        ("a later fragment", ipv4(6, 7, &SYN), "a logged packet is a later fragment"),
        ("a later fragment of v6", later, "a logged packet is a later fragment"),
        ("a header chain without end", ipv6(0, &[0, 255, 0, 0, 0, 0, 0, 0]), "a logged packet is cut off"),
    ] {
        assert_eq!(tuple(&bytes), Err(Unreadable(reason)), "{name}");
    }
}

fn record_of(prefix: &str, payload: &[u8]) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.message(SUBSYSTEM << 8 | PACKET, 0, 0, 2, 20);
    writer.attribute(nfula::PACKET_HEADER, &[8, 0, hook::FORWARD, 0]);
    writer.number(nfula::INDEX_IN, 5);
    writer.number(nfula::INDEX_OUT, 6);
    writer.text(nfula::PREFIX, prefix);
    writer.attribute(nfula::PAYLOAD, payload);
    writer.finish()
}

#[test]
fn a_record_says_where_it_went_and_why_it_did_not_arrive() {
    let read: Vec<_> = read_records(&record_of(log::DENY_INGRESS, &ipv4(6, 0, &SYN)), Timestamp::UNIX_EPOCH).collect();
    let [Ok(denial)] = read.as_slice() else { panic!("{read:?}") };
    assert_eq!(denial.outcome, FlowOutcome::Denied);
    assert_eq!(denial.wire.place, Place { entered: Some(5), left: Some(6), port: None });
    assert_eq!(denial.wire.service, Service::tcp(22));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>) {
        read_records(&bytes, Timestamp::UNIX_EPOCH).for_each(drop);
        let _ = packet(&bytes);
    }

    #[test]
    fn no_lie_in_a_true_record_makes_it_panic(at in 0..120_usize, byte: u8, cut in 0..160_usize) {
        let mut bytes = record_of(log::DENY_EGRESS, &ipv6(0, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &SYN].concat()));
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        bytes.truncate(cut);
        read_records(&bytes, Timestamp::UNIX_EPOCH).for_each(drop);
    }
}
