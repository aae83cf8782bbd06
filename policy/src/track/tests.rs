use proptest::prelude::*;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn entry(protocol: Protocol, port: u16) -> Entry {
    let original = Tuple {
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2".parse().unwrap(),
        protocol,
        source_port: port,
        destination_port: 80,
    };
    Entry {
        original,
        reply: original.reversed(),
        zone: 0,
        id: Some(u32::from(port)),
        status: Status(0),
        state: (protocol == Protocol::Tcp).then_some(tcp::SYN_SENT),
        sent: None,
        received: None,
        started: None,
        stamp: Some(Stamp { entered: 5, left: 6, payload: false, refused: false, begun: false }),
    }
}

const ANSWERED: Status = Status(0x2);
const ASSURED: Status = Status(0x6);

fn count(packets: u64, bytes: u64) -> Option<Counted> {
    Some(Counted { packets, bytes })
}

/// Feeds events and returns how each flow went, in order.
fn went(events: &[(Kind, Entry, i64)]) -> Vec<(FlowId, FlowOutcome)> {
    let mut tracker = Tracker::new(at(0), true);
    let mut out = Vec::new();
    for (kind, entry, second) in events {
        tracker.feed(*kind, entry, at(*second), &mut out);
    }
    out.iter().filter_map(|sight| if let Sight::Went { flow, outcome, .. } = sight { Some((*flow, *outcome)) } else { None }).collect()
}

#[test]
fn tcp_is_judged_by_what_came_of_it() {
    let e = entry(Protocol::Tcp, 1000);
    let (ack, payload) = (Entry { status: ASSURED, state: Some(3), ..e }, Stamp { payload: true, ..e.stamp.unwrap() });
    let none = |e: Entry| Entry { stamp: None, ..e };
    for (name, events, wanted) in [
        ("NEW alone is nothing", vec![(Kind::New, e, 1)], None),
        ("a handshake alone is nothing yet", vec![(Kind::New, e, 1), (Kind::Update, ack, 2)], None),
        (
            "payload is use at once",
            vec![(Kind::New, e, 1), (Kind::Update, Entry { stamp: Some(payload), ..ack }, 2)],
            Some(FlowOutcome::Established),
        ),
        (
            "closed without payload",
            vec![(Kind::New, e, 1), (Kind::Destroy, none(Entry { sent: count(4, 216), received: count(3, 164), ..ack }), 9)],
            Some(FlowOutcome::ConnectedNoData),
        ),
        (
            "a reset that answers the SYN",
            vec![(Kind::New, e, 1), (Kind::Destroy, none(Entry { sent: count(1, 60), received: count(1, 40), ..e }), 1)],
            Some(FlowOutcome::Refused),
        ),
        (
            "nobody answers",
            vec![(Kind::New, e, 1), (Kind::Destroy, none(Entry { sent: count(5, 300), received: count(0, 0), ..e }), 99)],
            Some(FlowOutcome::Unanswered),
        ),
        (
            "left half open",
            vec![(Kind::New, e, 1), (Kind::Destroy, none(Entry { status: ANSWERED, state: Some(2), received: count(1, 60), ..e }), 99)],
            Some(FlowOutcome::Unanswered),
        ),
        (
            "silent for long",
            vec![(Kind::New, e, 1), (Kind::Update, ack, 2), (Kind::Dump, Entry { started: Some(at(1)), ..ack }, 40)],
            Some(FlowOutcome::ConnectedNoData),
        ),
        (
            "its NEW was lost, its end was not",
            vec![(Kind::Destroy, none(Entry { started: Some(at(1)), sent: count(5, 999), received: count(5, 999), ..ack }), 9)],
            Some(FlowOutcome::Established),
        ),
    ] {
        assert_eq!(went(&events).first().map(|(_, outcome)| *outcome), wanted, "{name}");
        assert!(went(&events).len() <= 1, "{name}");
    }
}

#[test]
fn byte_counts_tell_payload_where_the_kernel_cannot_mark_it() {
    let e = entry(Protocol::Tcp, 1000);
    for (name, sent, received, payload) in [
        ("handshake and close with timestamps", (4, 60 + 3 * 52), (3, 60 + 2 * 52), false),
        ("handshake and close without options", (4, 40 * 4), (3, 44 + 40 * 2), false),
        ("one byte", (5, 60 + 4 * 52 + 1), (4, 60 + 3 * 52), true),
        ("an answer alone", (4, 60 + 3 * 52), (5, 60 + 4 * 52 + 1000), true),
    ] {
        let counted = Entry { sent: count(sent.0, sent.1), received: count(received.0, received.1), ..e };
        assert_eq!(payload_by_count(&counted), Some(payload), "{name}");
    }
}

#[test]
fn a_connection_older_than_the_agent_is_pre_existing_and_not_sure_of_its_direction() {
    let old = Entry { status: ASSURED, state: Some(3), stamp: None, ..entry(Protocol::Tcp, 1000) };
    let mut tracker = Tracker::new(at(0), true);
    let mut out = Vec::new();
    tracker.begin_dump();
    tracker.feed(Kind::Dump, &old, at(1), &mut out);
    let [Sight::Opened { wire, .. }, Sight::Went { outcome: FlowOutcome::Established, .. }] = out[..] else { panic!("{out:?}") };
    assert!(wire.pre_existing && !wire.direction_sure);
    // Rewriting is decided by the first packet: such an entry knows its direction.
    let masqueraded = Entry { status: Status(ASSURED.0 | 1 << 4), ..Entry { id: Some(2), ..entry(Protocol::Tcp, 1001) } };
    out.clear();
    tracker.feed(Kind::Dump, &masqueraded, at(1), &mut out);
    assert!(matches!(out[0], Sight::Opened { wire, .. } if wire.pre_existing && wire.direction_sure));
}

#[test]
fn what_a_dump_shows_before_its_event_waits_for_it() {
    let early = Entry { started: Some(at(1)), state: Some(3), status: ASSURED, stamp: None, ..entry(Protocol::Tcp, 1000) };
    let opened = |events: &[(Kind, Option<u8>)]| {
        let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
        tracker.feed(Kind::Dump, &early, at(2), &mut out);
        assert!(out.is_empty(), "{out:?}");
        for (kind, state) in events {
            tracker.feed(*kind, &Entry { started: None, state: *state, ..early }, at(2), &mut out);
        }
        tracker.settle(at(4), &mut out);
        let wires: Vec<_> =
            out.iter().filter_map(|sight| if let Sight::Opened { wire, .. } = sight { Some(*wire) } else { None }).collect();
        assert_eq!(wires.len(), 1, "{out:?}");
        (wires[0].time, wires[0].pre_existing, wires[0].direction_sure)
    };
    assert_eq!(opened(&[(Kind::New, Some(1)), (Kind::Update, Some(3))]), (at(1), false, true), "begins with a SYN");
    assert!(opened(&[(Kind::New, Some(3))]).1, "met in the middle");
    assert!(!opened(&[(Kind::New, Some(3))]).2, "met in the middle");
    assert_eq!(opened(&[]), (at(1), false, false), "its event was lost");
    assert_eq!(opened(&[(Kind::Update, Some(3))]), (at(1), false, false), "its first event was lost");
}

#[test]
fn a_lost_end_is_noticed_by_two_dumps_and_another_connection_in_its_place_at_once() {
    let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
    let e = entry(Protocol::Tcp, 1000);
    tracker.feed(Kind::New, &e, at(1), &mut out);
    tracker.feed(Kind::New, &Entry { id: Some(99), ..e }, at(2), &mut out);
    assert_eq!((tracker.open(), out.len()), (1, 3), "{out:?}");
    for second in [10, 20] {
        assert_eq!(tracker.open(), 1);
        tracker.begin_dump();
        tracker.end_dump(at(second), &mut out);
    }
    assert_eq!(tracker.open(), 0);
    assert!(matches!(out.last(), Some(Sight::Closed { .. })));
}

#[test]
fn an_event_that_was_overtaken_by_a_dump_changes_nothing() {
    let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
    let e = entry(Protocol::Tcp, 1000);
    tracker.feed(Kind::Dump, &Entry { started: Some(at(1)), ..e }, at(2), &mut out);
    tracker.feed(Kind::New, &e, at(2), &mut out);
    assert_eq!(out.iter().filter(|sight| matches!(sight, Sight::Opened { .. })).count(), 1);
    assert!(matches!(out[0], Sight::Opened { wire, .. } if !wire.pre_existing));
}

#[test]
fn reversed_udp_within_the_window_is_an_answer_and_after_it_a_flow_of_its_own() {
    let question = Entry { sent: count(1, 29), received: count(0, 0), ..entry(Protocol::Udp, 5000) };
    let answer = Entry { original: question.reply, reply: question.original, id: Some(2), ..question };
    let end = |entry: Entry| Entry { stamp: None, ..entry };
    let asked = [(Kind::New, question, 1), (Kind::Destroy, end(question), 31)];
    let soon = [asked.as_slice(), &[(Kind::New, answer, 40), (Kind::Destroy, end(answer), 70)]].concat();
    assert_eq!(went(&soon), [(1, FlowOutcome::Unanswered), (1, FlowOutcome::Established)]);

    let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
    for (kind, entry, second) in asked {
        tracker.feed(kind, &entry, at(second), &mut out);
    }
    tracker.begin_dump();
    tracker.end_dump(at(400), &mut out);
    assert!(matches!(out.last(), Some(Sight::Closed { flow: 1 })));
    tracker.feed(Kind::New, &answer, at(401), &mut out);
    assert!(matches!(out.last(), Some(Sight::Opened { flow: 2, .. })));
}

#[test]
fn a_late_answer_to_a_rewritten_flow_is_known_by_what_its_answers_look_like() {
    let asked = Entry { sent: count(1, 29), received: count(0, 0), ..entry(Protocol::Udp, 5000) };
    // Published: the server answers from its own address and port.
    let server = Tuple { source: "10.0.0.9".parse().unwrap(), source_port: 8080, ..asked.reply };
    let asked = Entry { reply: server, ..asked };
    let answer = Entry { original: server, reply: server.reversed(), id: Some(2), ..asked };
    let end = |entry: Entry| Entry { stamp: None, ..entry };
    let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
    for (kind, entry, second) in [
        (Kind::New, asked, 1),
        (Kind::Destroy, end(asked), 31),
        (Kind::New, answer, 40),
        (Kind::Destroy, end(answer), 70),
        // And once more, the entry of the answer being over too.
        (Kind::New, Entry { id: Some(3), ..answer }, 80),
    ] {
        tracker.feed(kind, &entry, at(second), &mut out);
    }
    let went = |sight: &Sight| if let Sight::Went { flow, tuple, outcome, .. } = sight { Some((*flow, *tuple, *outcome)) } else { None };
    let went: Vec<_> = out.iter().filter_map(went).collect();
    assert_eq!(went, [(1, asked.original, FlowOutcome::Unanswered), (1, asked.original, FlowOutcome::Established)]);
    assert_eq!(out.iter().filter(|sight| matches!(sight, Sight::Opened { .. })).count(), 1, "{out:?}");
    assert_eq!(tracker.open(), 1);
}

#[test]
fn no_more_flows_are_remembered_than_there_is_room_for_and_the_oldest_go_first() {
    let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
    let nth = |n: u32, last: u8| {
        let e = entry(Protocol::Udp, u16::try_from(n % 50_000).unwrap());
        let mut e = Entry { id: Some(n), sent: count(1, 29), ..e };
        // Of both families: addresses of IPv6 are kept elsewhere.
        let address = if last == 2 { format!("10.0.1.{}", n / 50_000) } else { format!("2001:db8::{:x}", n / 50_000) };
        e.original.source = address.parse().unwrap();
        e.reply = e.original.reversed();
        e
    };
    for n in 0..100_000 {
        let e = nth(n, if n % 3 == 0 { 6 } else { 2 });
        tracker.feed(Kind::New, &e, at(1), &mut out);
        tracker.feed(Kind::Destroy, &Entry { stamp: None, ..e }, at(1), &mut out);
    }
    let closed: Vec<FlowId> = out.iter().filter_map(|sight| if let Sight::Closed { flow } = sight { Some(*flow) } else { None }).collect();
    assert_eq!(closed, (1..=100_000 - 65_536).collect::<Vec<_>>());
    out.clear();
    tracker.end_dump(at(1 + memory::WINDOW.as_secs()), &mut out);
    assert_eq!(out.len(), 65_536);
    assert_eq!(tracker.open(), 0);
}

proptest! {
    /// Whatever mixture of dumps, events and repetitions arrives: one flow is counted once as use, and its bytes add up to what
    /// the kernel counted at the end.
    #[test]
    fn the_reports_of_one_flow_add_up(steps in proptest::collection::vec((0..3_u8, 1..5_u64, 1..2000_u64), 0..20)) {
        let e = Entry { started: Some(at(1)), ..entry(Protocol::Tcp, 1000) };
        let (mut tracker, mut out) = (Tracker::new(at(0), true), Vec::new());
        tracker.feed(Kind::New, &e, at(1), &mut out);
        let mut living = Entry {
            status: ASSURED,
            state: Some(3),
            stamp: Some(Stamp { payload: true, ..e.stamp.unwrap() }),
            sent: count(2, 112),
            received: count(1, 60),
            ..e
        };
        for (step, packets, bytes) in steps {
            match step {
                0 => tracker.feed(Kind::Update, &Entry { sent: None, received: None, ..living }, at(2), &mut out),
                1 => tracker.feed(Kind::Dump, &living, at(3), &mut out),
                _ => {
                    let more = |c: Option<Counted>| c.map(|c| Counted { packets: c.packets + packets, bytes: c.bytes + bytes });
                    (living.sent, living.received) = (more(living.sent), more(living.received));
                }
            }
        }
        tracker.feed(Kind::Destroy, &Entry { stamp: None, ..living }, at(9), &mut out);
        let (mut flows, mut sums) = (0, (0, 0));
        for sight in &out {
            match sight {
                Sight::Went { sent, received, .. } => { flows += 1; sums = (sums.0 + sent, sums.1 + received); }
                Sight::Grew { sent, received, .. } => sums = (sums.0 + sent, sums.1 + received),
                Sight::Opened { .. } | Sight::Closed { .. } => {}
            }
        }
        prop_assert_eq!(flows, 1);
        prop_assert_eq!(sums, (living.sent.unwrap().bytes, living.received.unwrap().bytes));
        prop_assert_eq!(tracker.open(), 0);
    }
}

#[test]
fn a_new_connection_on_the_ports_of_a_flushed_one_leaves_nothing_of_that_behind() {
    let e = entry(Protocol::Tcp, 1000);
    let alive = Entry { status: ASSURED, state: Some(tcp::ESTABLISHED), ..e };
    let mut tracker = Tracker::new(at(0), true);
    let mut out = Vec::new();
    for (kind, entry) in [(Kind::New, e), (Kind::Update, alive), (Kind::Destroy, alive), (Kind::New, Entry { id: Some(7), ..e })] {
        tracker.feed(kind, &entry, at(1), &mut out);
    }
    tracker.end_dump(at(1 + memory::WINDOW.as_secs()), &mut out);
    let of = |wanted: FlowId| out.iter().filter(move |sight| sight.flow() == wanted);
    assert!(of(1).any(|sight| matches!(sight, Sight::Closed { .. })), "{out:?}");
    assert!(of(2).all(|sight| matches!(sight, Sight::Opened { .. })), "{out:?}");
}
