//! Our types as messages. Times are cut to microseconds.

use jiff::Timestamp;

use super::generated as wire;
use crate::evidence::{Evidence, Road};
use crate::flow::{Flow, FlowOutcome};
use crate::graph::{EdgeDelta, EdgeKey};
use crate::health::Health;

/// The number of a road.
pub(super) fn road(road: Road) -> u32 {
    match road {
        Road::Direct => 1,
        Road::Published => 2,
        Road::Proxy => 3,
    }
}

/// The number of an outcome.
pub(super) fn outcome(outcome: FlowOutcome) -> u32 {
    match outcome {
        FlowOutcome::Established => 1,
        FlowOutcome::ConnectedNoData => 2,
        FlowOutcome::OneWay => 3,
        FlowOutcome::Unanswered => 4,
        FlowOutcome::Refused => 5,
        FlowOutcome::Denied => 6,
        FlowOutcome::WouldDeny => 7,
    }
}

impl From<&Evidence> for wire::Evidence {
    fn from(seen: &Evidence) -> Self {
        Self {
            established: seen.established,
            connected_no_data: seen.connected_no_data,
            one_way: seen.one_way,
            unanswered: seen.unanswered,
            refused: seen.refused,
            denied: seen.denied,
            would_deny: seen.would_deny,
            pre_existing: seen.pre_existing,
            bytes_sent: seen.bytes_sent,
            bytes_received: seen.bytes_received,
            first_us: seen.first.map(Timestamp::as_microsecond),
            last_us: seen.last.map(Timestamp::as_microsecond),
            hour_runs: seen.hours.runs().iter().flat_map(|&(first, last)| [first, last]).collect(),
            roads: seen.roads.iter().map(road).collect(),
        }
    }
}

impl wire::EdgeDelta {
    /// From its two parts, for whoever keeps them apart.
    pub fn of(key: &EdgeKey, seen: &Evidence) -> Self {
        Self {
            from: key.from.to_string(),
            to: key.to.to_string(),
            protocol: u32::from(key.service.protocol.number()),
            port: u32::from(key.service.port),
            direction_unknown: !key.direction_known,
            seen: Some(seen.into()),
        }
    }
}

impl From<&EdgeDelta> for wire::EdgeDelta {
    fn from(delta: &EdgeDelta) -> Self {
        Self::of(&delta.key, &delta.seen)
    }
}

impl From<&Health> for wire::Health {
    fn from(health: &Health) -> Self {
        Self {
            from_us: health.from.as_microsecond(),
            to_us: health.to.as_microsecond(),
            events: health.events,
            lost: health.lost,
            unattributed: health.unattributed,
            healthy: health.healthy,
        }
    }
}

impl From<&Flow> for wire::Flow {
    fn from(flow: &Flow) -> Self {
        Self {
            time_us: flow.time.as_microsecond(),
            from: flow.from.to_string(),
            to: flow.to.to_string(),
            protocol: u32::from(flow.service.protocol.number()),
            port: u32::from(flow.service.port),
            outcome: outcome(flow.outcome),
            road: road(flow.road),
            direction_unknown: !flow.direction_known,
            pre_existing: flow.pre_existing,
            bytes_sent: flow.bytes_sent,
            bytes_received: flow.bytes_received,
            source: flow.tuple.source.to_string(),
            destination: flow.tuple.destination.to_string(),
            source_port: u32::from(flow.tuple.source_port),
            destination_port: u32::from(flow.tuple.destination_port),
            reason: flow.reason.clone(),
        }
    }
}
