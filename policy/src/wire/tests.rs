use std::collections::BTreeSet;
use std::net::IpAddr;

use jiff::Timestamp;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::evidence::Road;
use crate::flow::Tuple;
use crate::service::Protocol;
use crate::{EdgeKey, Endpoint, FlowOutcome, HourSet, Service, Workload};

fn some_time() -> impl Strategy<Value = Timestamp> {
    (-2_000_000_000_000_000_i64..4_000_000_000_000_000).prop_map(|us| Timestamp::from_microsecond(us).unwrap())
}

fn some_workload() -> impl Strategy<Value = Workload> {
    ("[a-zA-Z0-9_.-]{0,12}", "[a-zA-Z0-9_.-]{1,12}").prop_map(|(namespace, name)| Workload::new(namespace, name))
}

fn some_endpoint() -> impl Strategy<Value = Endpoint> {
    prop_oneof![
        some_workload().prop_map(Endpoint::Workload),
        some_workload().prop_map(Endpoint::Run),
        Just(Endpoint::Host),
        any::<IpAddr>().prop_map(Endpoint::Outside),
        any::<IpAddr>().prop_map(Endpoint::Unknown),
        ("[a-z@:/ -]{0,10}", any::<IpAddr>()).prop_map(|(name, address)| Endpoint::Unmanaged { name, address }),
    ]
}

fn some_service() -> impl Strategy<Value = Service> {
    prop_oneof![
        (prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)], any::<u16>())
            .prop_map(|(protocol, port)| Service { protocol, port }),
        (prop_oneof![Just(Protocol::Icmp), Just(Protocol::Icmpv6)], 0..=255_u16).prop_map(|(protocol, port)| Service { protocol, port }),
        Just(Service { protocol: Protocol::from_number(47), port: 0 }),
    ]
}

fn some_evidence() -> impl Strategy<Value = crate::Evidence> {
    (
        prop::array::uniform10(0..=i64::MAX as u64),
        prop::option::of((some_time(), some_time())),
        prop::collection::vec((0..500_000_u32, 0..50_u32), 0..6),
        prop::collection::btree_set(prop_oneof![Just(Road::Direct), Just(Road::Published), Just(Road::Proxy)], 0..3),
    )
        .prop_map(|(counts, times, runs, roads): (_, _, _, BTreeSet<Road>)| {
            let [
                established,
                connected_no_data,
                one_way,
                unanswered,
                refused,
                denied,
                would_deny,
                pre_existing,
                bytes_sent,
                bytes_received,
            ] = counts;
            crate::Evidence {
                established,
                connected_no_data,
                one_way,
                unanswered,
                refused,
                denied,
                would_deny,
                pre_existing,
                bytes_sent,
                bytes_received,
                first: times.map(|(a, b)| a.min(b)),
                last: times.map(|(a, b)| a.max(b)),
                hours: HourSet::from_runs(runs.into_iter().map(|(first, length)| (first, first + length))),
                roads: roads.into_iter().collect(),
            }
        })
}

fn some_delta() -> impl Strategy<Value = crate::EdgeDelta> {
    (some_endpoint(), some_endpoint(), some_service(), any::<bool>(), some_evidence()).prop_map(
        |(from, to, service, direction_known, seen)| crate::EdgeDelta { key: EdgeKey { from, to, service, direction_known }, seen },
    )
}

fn some_flow() -> impl Strategy<Value = crate::Flow> {
    let outcome = prop::sample::select(vec![
        FlowOutcome::Established,
        FlowOutcome::ConnectedNoData,
        FlowOutcome::OneWay,
        FlowOutcome::Unanswered,
        FlowOutcome::Refused,
        FlowOutcome::Denied,
        FlowOutcome::WouldDeny,
    ]);
    (some_time(), some_endpoint(), some_endpoint(), some_service(), outcome, any::<(IpAddr, IpAddr, u16, u16, bool, bool)>(), ".{0,40}")
        .prop_map(
            |(
                time,
                from,
                to,
                service,
                outcome,
                (source, destination, source_port, destination_port, direction_known, pre_existing),
                reason,
            )| {
                crate::Flow {
                    time,
                    from,
                    to,
                    service,
                    outcome,
                    road: Road::Proxy,
                    direction_known,
                    pre_existing,
                    bytes_sent: 1,
                    bytes_received: 2,
                    tuple: Tuple { source, destination, protocol: service.protocol, source_port, destination_port },
                    reason,
                }
            },
        )
}

proptest! {
    #[test]
    fn an_edge_reads_back_as_it_was_written(delta in some_delta()) {
        let bytes = EdgeDelta::from(&delta).encode_to_vec();
        let read: crate::EdgeDelta = EdgeDelta::decode(&*bytes).unwrap().try_into().unwrap();
        prop_assert_eq!(read, delta);
    }

    #[test]
    fn a_flow_reads_back_as_it_was_written(flow in some_flow()) {
        let bytes = Flow::from(&flow).encode_to_vec();
        let read: crate::Flow = Flow::decode(&*bytes).unwrap().try_into().unwrap();
        prop_assert_eq!(read, flow);
    }

    #[test]
    fn health_reads_back_as_it_was_written(a in some_time(), b in some_time(), counts in prop::array::uniform3(0..=i64::MAX as u64), healthy: bool) {
        let [events, lost, unattributed] = counts;
        let health = crate::Health { from: a.min(b), to: a.max(b), events, lost, unattributed, healthy };
        prop_assert_eq!(crate::Health::try_from(Health::from(&health)).unwrap(), health);
    }

    #[test]
    fn no_bytes_make_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = FromAgent::decode(&*bytes) && let Some(from_agent::Body::Batch(batch)) = message.body {
            for edge in batch.edges {
                let _ = crate::EdgeDelta::try_from(edge);
            }
        }
        let _ = EdgeDelta::decode(&*bytes).map(crate::EdgeDelta::try_from);
        let _ = Health::decode(&*bytes).map(crate::Health::try_from);
        let _ = Flow::decode(&*bytes).map(crate::Flow::try_from);
        let _ = (read_plan(&bytes), read_plan_change(&bytes), read_inventory(&bytes), read_status(&bytes), read_preview(&bytes));
    }

    #[test]
    fn a_flipped_bit_is_refused_or_read_as_something_that_can_be_written(delta in some_delta(), at: prop::sample::Index, bit in 0..8_u8) {
        let mut bytes = EdgeDelta::from(&delta).encode_to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(Ok(read)) = EdgeDelta::decode(&*bytes).map(crate::EdgeDelta::try_from) {
            prop_assert_eq!(crate::EdgeDelta::try_from(EdgeDelta::from(&read)), Ok(read));
        }
    }
}

fn good() -> EdgeDelta {
    let key = EdgeKey {
        from: Endpoint::Workload(Workload::new("shop", "web")),
        to: Endpoint::Workload(Workload::new("shop", "db")),
        service: Service::tcp(5432),
        direction_known: true,
    };
    EdgeDelta::of(&key, &crate::Evidence { established: 1, ..Default::default() })
}

#[test]
fn what_cannot_be_is_refused_and_the_error_names_the_field() {
    type Spoil = fn(&mut EdgeDelta);
    let cases: [(&str, Spoil, &str); 12] = [
        ("no evidence", |d| d.seen = None, "seen is missing"),
        ("an endpoint of no kind", |d| d.from = "planet:mars".into(), "from cannot be read: \"planet:mars\" is not an endpoint"),
        ("an empty endpoint", |d| d.to = String::new(), "to cannot be read"),
        ("a name as long as a book", |d| d.to = "x".repeat(100_000), "to cannot be read: 100000 bytes are no name"),
        ("a port beyond 65535", |d| d.port = 65_536, "port is 65536, it must be 0 to 65535"),
        ("a protocol beyond 255", |d| d.protocol = 256, "protocol is 256"),
        ("an ICMP type beyond 255", |d| (d.protocol, d.port) = (1, 256), "port is 256, it must be an ICMP type"),
        ("a port on a protocol that has none", |d| (d.protocol, d.port) = (47, 5), "port is 5"),
        ("a road nobody knows", |d| d.seen.as_mut().unwrap().roads = vec![4], "road is 4, it must be 1 to 3"),
        ("an odd list of hours", |d| d.seen.as_mut().unwrap().hour_runs = vec![1, 2, 3], "a run has no end"),
        ("hours until the end of days", |d| d.seen.as_mut().unwrap().hour_runs = vec![0, u32::MAX], "beyond the year 2200"),
        ("a count that would wrap", |d| d.seen.as_mut().unwrap().established = u64::MAX, "established is 18446744073709551615"),
    ];
    for (name, spoil, expected) in cases {
        let mut delta = good();
        spoil(&mut delta);
        let error = crate::EdgeDelta::try_from(delta).expect_err(name);
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert!(error.reason().len() < 60, "{name}: {}", error.reason());
    }
    assert!(crate::EdgeDelta::try_from(good()).is_ok());
}

#[test]
fn times_in_the_wrong_order_are_refused() {
    for (first, last) in [(Some(2), Some(1)), (None, Some(1)), (Some(1), None), (Some(i64::MIN), Some(1))] {
        let mut delta = good();
        let seen = delta.seen.as_mut().unwrap();
        (seen.first_us, seen.last_us) = (first, last);
        assert!(crate::EdgeDelta::try_from(delta).is_err(), "{first:?} {last:?}");
    }
}

#[test]
fn a_plan_with_anything_unknown_is_refused_whole() {
    let plan = r#"{"format":1,"store":"s","generation":3,"set":{"segments":{"shop":{"name":"shop","members":[{"project":"shop"}],"mode":"Enforce"}},
        "policies":{"shop/db":{"workload":"shop/db","ingress":[{"peer":"shop/web","ports":"tcp/5432"}],"egress":[]}},"quarantines":{}}}"#;
    assert_eq!(read_plan(plan.as_bytes()).unwrap().generation, 3);
    for (what, found, spoiled) in [
        ("a field of the plan", "\"format\":1,", "\"format\":1,\"unless\":true,"),
        ("a field of the set", "\"quarantines\":{}", "\"quarantines\":{},\"denials\":{}"),
        ("a field of a segment", "\"mode\":\"Enforce\"", "\"mode\":\"Enforce\",\"from\":\"monday\""),
        ("a mode", "\"Enforce\"", "\"Perhaps\""),
        ("a field of a policy", "\"egress\":[]", "\"egress\":[],\"except\":[]"),
        ("a field of a rule", "\"ports\":\"tcp/5432\"", "\"ports\":\"tcp/5432\",\"unless\":\"sunday\""),
        ("a peer", "\"peer\":\"shop/web\"", "\"peer\":\"everyone:\""),
        ("a network", "\"peer\":\"shop/web\"", "\"peer\":\"outside:10.0.0.0/33\""),
        ("a port", "tcp/5432", "tcp/65536"),
        ("a selector", "\"project\"", "\"planet\""),
        ("a policy under another's name", "\"shop/db\":{\"workload\":\"shop/db\"", "\"shop/db\":{\"workload\":\"shop/web\""),
    ] {
        assert!(plan.contains(found), "{what}");
        let error = read_plan(plan.replacen(found, spoiled, 1).as_bytes()).expect_err(what);
        assert!(error.to_string().starts_with("the plan cannot be read: "), "{what}: {error}");
    }
    for cut in 0..plan.len() {
        assert!(read_plan(&plan.as_bytes()[..cut]).is_err(), "cut to {cut}");
    }
}
