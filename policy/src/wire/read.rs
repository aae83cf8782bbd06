//! Messages as our types, strictly.

use std::net::IpAddr;

use jiff::Timestamp;

use super::WireError;
use super::generated as wire;
use super::write;
use crate::evidence::{Evidence, HourSet, Road};
use crate::flow::{Flow, FlowOutcome, Tuple};
use crate::graph::{EdgeDelta, EdgeKey};
use crate::health::Health;
use crate::service::{Ports, Protocol, Service};
use crate::workload::Endpoint;

/// What a signed 64-bit column holds: no store has to ask what to do with more.
const LARGEST: u64 = i64::MAX as u64;

/// Names of containers and projects are far below this; longer is a lie.
const LONGEST_NAME: usize = 1024;

/// A reason names a policy and a rule.
const LONGEST_REASON: usize = 4096;

/// The hour in which the year 2200 begins: later ones are a broken clock, and a run up to u32::MAX would be half a million years to
/// walk through.
const LAST_HOUR: u32 = 2_016_168;

fn number<T>(field: &'static str, value: impl Into<i128> + Copy, allowed: &'static str) -> Result<T, WireError>
where
    T: TryFrom<i128>,
{
    T::try_from(value.into()).map_err(|_| WireError::Number { field, value: value.into(), allowed })
}

fn count(field: &'static str, value: u64) -> Result<u64, WireError> {
    if value <= LARGEST { Ok(value) } else { Err(WireError::Number { field, value: value.into(), allowed: "below 2^63" }) }
}

fn time(field: &'static str, microseconds: i64) -> Result<Timestamp, WireError> {
    Timestamp::from_microsecond(microseconds).map_err(|_| WireError::Number {
        field,
        value: microseconds.into(),
        allowed: "microseconds of a year from -9999 to 9999",
    })
}

fn endpoint(field: &'static str, text: &str) -> Result<Endpoint, WireError> {
    if text.len() > LONGEST_NAME {
        return Err(WireError::Text { field, why: format!("{} bytes are no name", text.len()) });
    }
    text.parse().map_err(|e: crate::workload::NotAnEndpoint| WireError::Text { field, why: e.to_string() })
}

fn address(field: &'static str, text: &str) -> Result<IpAddr, WireError> {
    text.parse().map_err(|_| WireError::Text { field, why: format!("{text:.64?} is not an address") })
}

fn service(protocol: u32, port: u32) -> Result<Service, WireError> {
    let protocol = Protocol::from_number(number("protocol", protocol, "a protocol number of IANA, 0 to 255")?);
    let port: u16 = number("port", port, "0 to 65535")?;
    // Port 0 of TCP cannot be named in a rule, but it can be seen on the wire: shown, never proposed.
    if !protocol.has_ports() && Ports::new(protocol, port, port).is_err() {
        return Err(WireError::Number { field: "port", value: port.into(), allowed: "an ICMP type, or 0 for a protocol without ports" });
    }
    Ok(Service { protocol, port })
}

fn road(value: u32) -> Result<Road, WireError> {
    [Road::Direct, Road::Published, Road::Proxy].into_iter().find(|&road| write::road(road) == value).ok_or(WireError::Number {
        field: "road",
        value: value.into(),
        allowed: "1 to 3",
    })
}

fn outcome(value: u32) -> Result<FlowOutcome, WireError> {
    [
        FlowOutcome::Established,
        FlowOutcome::ConnectedNoData,
        FlowOutcome::OneWay,
        FlowOutcome::Unanswered,
        FlowOutcome::Refused,
        FlowOutcome::Denied,
        FlowOutcome::WouldDeny,
    ]
    .into_iter()
    .find(|&outcome| write::outcome(outcome) == value)
    .ok_or(WireError::Number { field: "outcome", value: value.into(), allowed: "1 to 7" })
}

fn hours(runs: &[u32]) -> Result<HourSet, WireError> {
    let wrong = |why| Err(WireError::Hours { why });
    let (pairs, []) = runs.as_chunks::<2>() else { return wrong("a run has no end") };
    if pairs.iter().any(|[first, last]| first > last) {
        return wrong("a run ends before it begins");
    }
    if pairs.windows(2).any(|w| w[0][1] >= w[1][0]) {
        return wrong("the runs are not in order");
    }
    if pairs.last().is_some_and(|[_, last]| *last > LAST_HOUR) {
        return wrong("an hour lies beyond the year 2200");
    }
    Ok(HourSet::from_runs(pairs.iter().map(|&[first, last]| (first, last))))
}

impl TryFrom<wire::Evidence> for Evidence {
    type Error = WireError;

    fn try_from(seen: wire::Evidence) -> Result<Self, WireError> {
        let first = seen.first_us.map(|us| time("first_us", us)).transpose()?;
        let last = seen.last_us.map(|us| time("last_us", us)).transpose()?;
        if first.is_some() != last.is_some() || first > last {
            return Err(WireError::Number {
                field: "last_us",
                value: seen.last_us.unwrap_or(0).into(),
                allowed: "given with first_us, and not before it",
            });
        }
        Ok(Self {
            established: count("established", seen.established)?,
            connected_no_data: count("connected_no_data", seen.connected_no_data)?,
            one_way: count("one_way", seen.one_way)?,
            unanswered: count("unanswered", seen.unanswered)?,
            refused: count("refused", seen.refused)?,
            denied: count("denied", seen.denied)?,
            would_deny: count("would_deny", seen.would_deny)?,
            pre_existing: count("pre_existing", seen.pre_existing)?,
            bytes_sent: count("bytes_sent", seen.bytes_sent)?,
            bytes_received: count("bytes_received", seen.bytes_received)?,
            first,
            last,
            hours: hours(&seen.hour_runs)?,
            roads: seen.roads.iter().map(|&value| road(value)).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<wire::EdgeDelta> for EdgeDelta {
    type Error = WireError;

    fn try_from(delta: wire::EdgeDelta) -> Result<Self, WireError> {
        let key = EdgeKey {
            from: endpoint("from", &delta.from)?,
            to: endpoint("to", &delta.to)?,
            service: service(delta.protocol, delta.port)?,
            direction_known: !delta.direction_unknown,
        };
        Ok(Self { key, seen: delta.seen.ok_or(WireError::Missing { field: "seen" })?.try_into()? })
    }
}

impl TryFrom<wire::Health> for Health {
    type Error = WireError;

    fn try_from(health: wire::Health) -> Result<Self, WireError> {
        let (from, to) = (time("from_us", health.from_us)?, time("to_us", health.to_us)?);
        if to < from {
            return Err(WireError::Number { field: "to_us", value: health.to_us.into(), allowed: "not before from_us" });
        }
        Ok(Self {
            from,
            to,
            events: count("events", health.events)?,
            lost: count("lost", health.lost)?,
            unattributed: count("unattributed", health.unattributed)?,
            healthy: health.healthy,
        })
    }
}

impl TryFrom<wire::Flow> for Flow {
    type Error = WireError;

    fn try_from(flow: wire::Flow) -> Result<Self, WireError> {
        let service = service(flow.protocol, flow.port)?;
        if flow.reason.len() > LONGEST_REASON {
            return Err(WireError::Text { field: "reason", why: format!("{} bytes are no reason", flow.reason.len()) });
        }
        Ok(Self {
            time: time("time_us", flow.time_us)?,
            from: endpoint("from", &flow.from)?,
            to: endpoint("to", &flow.to)?,
            service,
            outcome: outcome(flow.outcome)?,
            road: road(flow.road)?,
            direction_known: !flow.direction_unknown,
            pre_existing: flow.pre_existing,
            bytes_sent: count("bytes_sent", flow.bytes_sent)?,
            bytes_received: count("bytes_received", flow.bytes_received)?,
            tuple: Tuple {
                source: address("source", &flow.source)?,
                destination: address("destination", &flow.destination)?,
                protocol: service.protocol,
                source_port: number("source_port", flow.source_port, "0 to 65535")?,
                destination_port: number("destination_port", flow.destination_port, "0 to 65535")?,
            },
            reason: flow.reason,
        })
    }
}
