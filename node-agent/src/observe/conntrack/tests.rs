use proptest::prelude::*;

use super::super::netfilter::NLM_F_CREATE;
use super::*;

fn tuple(protocol: Protocol) -> Tuple {
    Tuple {
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2".parse().unwrap(),
        protocol,
        source_port: 40_000,
        destination_port: 80,
    }
}

/// What the kernel sends for a connection of this protocol, with everything that we read.
fn event(number: u8, flags: u16, original: &Tuple, reply: &Tuple) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.message(request(number), flags, 0, FAMILY_IPV4, 0);
    write_tuple(&mut writer, cta::TUPLE_ORIG, original);
    write_tuple(&mut writer, cta::TUPLE_REPLY, reply);
    writer.number(cta::STATUS, 0xe);
    writer.number(cta::ID, 77);
    writer.attribute(cta::ZONE, &3_u16.to_be_bytes());
    writer.nest(cta::PROTOINFO, |w| w.nest(cta::PROTOINFO_TCP, |w| w.attribute(cta::PROTOINFO_STATE, &[3])));
    for (kind, packets, bytes) in [(cta::COUNTERS_ORIG, 5_u64, 500_u64), (cta::COUNTERS_REPLY, 4, 9000)] {
        writer.nest(kind, |w| {
            w.attribute(cta::COUNTERS_PACKETS, &packets.to_be_bytes());
            w.attribute(cta::COUNTERS_BYTES, &bytes.to_be_bytes());
        });
    }
    writer.nest(cta::TIMESTAMP, |w| {
        w.attribute(cta::TIMESTAMP_START, &1_000_000_000_u64.to_be_bytes());
        // `CTA_TIMESTAMP_STOP`, behind which nobody looks.
        w.attribute(2, &0_u64.to_be_bytes());
    });
    let mut label = [0; label::SIZE];
    label[label::ENTERED] = 5;
    label[label::LEFT] = 6;
    label[label::FLAGS] = label::PAYLOAD;
    writer.attribute(cta::LABELS, &label);
    // Of a kind that nobody knows yet: skipped.
    writer.attribute(500, &[1, 2, 3]);
    writer.finish()
}

fn read(bytes: &[u8]) -> Vec<Result<(Kind, Entry), Unreadable>> {
    read_events(bytes).collect()
}

#[test]
fn everything_of_a_connection_is_read() {
    let original = tuple(Protocol::Tcp);
    let reply = original.reversed();
    let found = read(&event(MESSAGE_NEW, NLM_F_CREATE, &original, &reply));
    let [Ok((Kind::New, entry))] = found.as_slice() else { panic!("{found:?}") };
    let wanted = Entry {
        original,
        reply,
        zone: 3,
        id: Some(77),
        status: Status(0xe),
        state: Some(3),
        sent: Some(Counted { packets: 5, bytes: 500 }),
        received: Some(Counted { packets: 4, bytes: 9000 }),
        started: Some(Timestamp::from_second(1).unwrap()),
        stamp: Some(Stamp { entered: 5, left: 6, payload: true, refused: false, begun: false }),
    };
    assert_eq!(*entry, wanted);
}

#[test]
fn the_kind_comes_from_the_message_and_its_flags() {
    let (original, reply) = (tuple(Protocol::Udp), tuple(Protocol::Udp).reversed());
    for (number, flags, kind) in
        [(MESSAGE_NEW, NLM_F_CREATE, Kind::New), (MESSAGE_NEW, 0, Kind::Update), (MESSAGE_DELETE, 0, Kind::Destroy)]
    {
        assert!(matches!(read(&event(number, flags, &original, &reply))[..], [Ok((found, _))] if found == kind), "{kind:?}");
    }
}

#[test]
fn icmp_has_its_type_as_port_and_its_id_as_source_port() {
    let request = Tuple { source_port: 7, destination_port: 8, ..tuple(Protocol::Icmp) };
    let found = read(&event(MESSAGE_NEW, 0, &request, &Tuple { destination_port: 0, ..request.reversed() }));
    assert!(matches!(found[..], [Ok((_, entry))] if entry.original == request), "{found:?}");
}

#[test]
fn v4_mapped_addresses_become_v4() {
    let mapped = |text: &str| -> IpAddr { text.parse().unwrap() };
    let mut writer = Writer::default();
    writer.message(request(MESSAGE_NEW), 0, 0, FAMILY_IPV6, 0);
    for (kind, source, destination) in
        [(cta::TUPLE_ORIG, "::ffff:10.0.0.1", "2001:db8::1"), (cta::TUPLE_REPLY, "2001:db8::1", "::ffff:10.0.0.1")]
    {
        let tuple = Tuple { source: mapped(source), destination: mapped(destination), ..tuple(Protocol::Udp) };
        write_tuple(&mut writer, kind, &tuple);
    }
    let found = read(&writer.finish());
    assert!(matches!(found[..], [Ok((_, entry))] if entry.original.source == mapped("10.0.0.1")), "{found:?}");
}

#[test]
fn one_unknown_message_does_not_hide_the_next() {
    let (original, reply) = (tuple(Protocol::Tcp), tuple(Protocol::Tcp).reversed());
    let bytes = [event(9, 0, &original, &reply), event(MESSAGE_DELETE, 0, &original, &reply)].concat();
    let found = read(&bytes);
    assert!(matches!(found[..], [Err(Unreadable("an unknown kind of conntrack message")), Ok((Kind::Destroy, _))]), "{found:?}");
}

#[test]
fn a_message_that_lies_about_its_length_is_refused() {
    let mut bytes = event(MESSAGE_NEW, 0, &tuple(Protocol::Tcp), &tuple(Protocol::Tcp).reversed());
    bytes[0] = bytes[0].wrapping_add(4);
    assert_eq!(read(&bytes), [Err(Unreadable("a netlink message lies about its length"))]);
    assert_eq!(read(&bytes[..10]), [Err(Unreadable("a netlink header is cut off"))]);
}

#[test]
fn a_connection_without_its_tuples_is_refused() {
    let mut writer = Writer::default();
    writer.message(request(MESSAGE_NEW), 0, 0, FAMILY_IPV4, 0);
    writer.number(cta::STATUS, 0);
    assert_eq!(read(&writer.finish()), [Err(Unreadable("a connection without both its tuples"))]);
}

/// What both readers make of it.
fn take(bytes: &[u8]) -> (Vec<(Kind, Entry)>, Vec<Unreadable>) {
    let (mut events, mut refused) = (Vec::new(), Vec::new());
    let count = take_events(bytes, &mut events, |why| refused.push(why));
    assert_eq!(count, events.len() + refused.len());
    (events, refused)
}

/// As [`take`], without the quick reader.
fn carefully(bytes: &[u8]) -> (Vec<(Kind, Entry)>, Vec<Unreadable>) {
    let (events, refused): (Vec<_>, Vec<_>) = read(bytes).into_iter().partition(Result::is_ok);
    (events.into_iter().flatten().collect(), refused.into_iter().filter_map(Result::err).collect())
}

#[test]
fn what_the_kernel_mostly_writes_is_read_quickly() {
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        let original = tuple(protocol);
        for (number, flags) in [(MESSAGE_NEW, NLM_F_CREATE), (MESSAGE_NEW, 0), (MESSAGE_DELETE, 0)] {
            let bytes = event(number, flags, &original, &original.reversed());
            let quick = quick::read(&bytes);
            assert!(quick.is_some(), "{protocol} {number} {flags}");
            assert_eq!(quick.into_iter().collect::<Vec<_>>(), carefully(&bytes).0);
        }
    }
}

proptest! {
    #[test]
    fn the_quick_reader_and_the_careful_one_read_the_same(
        lies in proptest::collection::vec((0..300_usize, any::<u8>()), 0..4),
        number in 0..4_u8,
        flags in prop_oneof![Just(0), Just(NLM_F_CREATE)],
        cut in 0..400_usize,
        protocol in prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp), Just(Protocol::Other(47))],
    ) {
        let original = tuple(protocol);
        let mut bytes = event(number, flags, &original, &original.reversed());
        for (at, byte) in lies {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(cut.max(200));
        prop_assert_eq!(take(&bytes), carefully(&bytes));
    }

    #[test]
    fn no_bytes_make_it_panic_or_run_for_ever(bytes: Vec<u8>) {
        prop_assert!(read_events(&bytes).count() <= bytes.len() + 1);
    }

    #[test]
    fn no_lie_in_a_true_message_makes_it_panic(lies in proptest::collection::vec((0..300_usize, any::<u8>()), 1..4), cut in 0..320_usize) {
        let mut bytes = event(MESSAGE_NEW, NLM_F_CREATE, &tuple(Protocol::Tcp), &tuple(Protocol::Tcp).reversed());
        for (at, byte) in lies {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        bytes.truncate(cut);
        read_events(&bytes).for_each(drop);
    }
}
