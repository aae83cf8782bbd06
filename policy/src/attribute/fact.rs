//! What is reported of flows with names, and what each report adds to the graph.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::evidence::{Evidence, HourSet, Road};
use crate::flow::Flow;
use crate::graph::{EdgeDelta, EdgeKey};

/// More bytes of a flow that was counted already. Adds no flow: so the reports of one flow add up to one flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Growth {
    /// Which edge.
    pub key: EdgeKey,
    /// By which road.
    pub road: Road,
    /// When it was seen.
    pub time: Timestamp,
    /// Additional bytes from the client.
    pub bytes_sent: u64,
    /// Additional bytes from the server.
    pub bytes_received: u64,
    /// Whether the flow was counted as use of its edge.
    pub is_use: bool,
}

/// One report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A flow, with its outcome and its bytes so far: counts one flow.
    Began(Flow),
    /// It goes on.
    Grew(Growth),
}

impl From<&Fact> for EdgeDelta {
    fn from(fact: &Fact) -> Self {
        match fact {
            Fact::Began(flow) => Self::from(flow),
            Fact::Grew(growth) => {
                let mut seen = Evidence {
                    bytes_sent: growth.bytes_sent,
                    bytes_received: growth.bytes_received,
                    // The report may travel alone: it says from when to when by itself. The edge began earlier, and stays so.
                    first: Some(growth.time),
                    last: Some(growth.time),
                    roads: [growth.road].into(),
                    ..Evidence::default()
                };
                if growth.is_use {
                    seen.hours.insert(HourSet::hour_of(growth.time));
                }
                Self { key: growth.key.clone(), seen }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Service;
    use crate::workload::Endpoint;

    #[test]
    fn more_bytes_of_a_long_flow_are_a_report_that_the_controller_can_read_by_itself() {
        let key = EdgeKey {
            from: Endpoint::Host,
            to: Endpoint::Outside("192.0.2.1".parse().unwrap()),
            service: Service::tcp(443),
            direction_known: true,
        };
        let time = "2026-11-20T12:00:00Z".parse().unwrap();
        let fact = Fact::Grew(Growth { key, road: Road::Direct, time, bytes_sent: 7, bytes_received: 9, is_use: true });
        let delta = EdgeDelta::from(&fact);
        let read = EdgeDelta::try_from(crate::wire::EdgeDelta::from(&delta));
        assert_eq!(read.as_ref(), Ok(&delta));
    }
}
