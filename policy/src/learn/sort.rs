//! What one edge is: use that becomes a rule, or something that is only shown, and why.
//!
//! # Why
//! A SYN to a closed port, a scan, a one-off run look like traffic and are no need. They are shown all the same, so that a person
//! can see what was left out, and add it by hand.

use crate::evidence::Evidence;
use crate::graph::{Seen, Touch};
use crate::service::{Ports, Protocol};
use crate::suggestion::Origin;
use crate::workload::Endpoint;

/// What the learner makes of an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sorted {
    /// A rule, for the sides that are workloads.
    Proposed(Ports, Origin),
    /// Shown only.
    Shown(Why),
}

/// Why an edge is no rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    UnknownDirection,
    UnknownEndpoint,
    Run,
    NoSuchPort,
    Scan { targets: usize },
    ConnectedOnce,
    OneWayRefused { refused: u64 },
    OneWayOnce,
    DeniedOutside { denied: u64 },
    WouldDeny { flows: u64 },
    Attempts { unanswered: u64, refused: u64 },
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::UnknownDirection => {
                f.write_str("older than the agent, and neither end listens on the port: which end called is not known")
            }
            Self::UnknownEndpoint => f.write_str("one end is an address that belonged to no container known at that moment"),
            Self::Run => f.write_str("a one-off run (docker compose run): under the service's policy, never evidence for it"),
            Self::NoSuchPort => f.write_str("no rule can name this port"),
            Self::Scan { targets } => {
                write!(f, "its source touched {targets} ports or peers without carrying data, like a scan")
            }
            Self::ConnectedOnce => f.write_str("connected once and carried no data; a health check would repeat"),
            Self::OneWayRefused { refused } => write!(f, "one-way, and {refused} refused by an ICMP error: nobody listens there"),
            Self::OneWayOnce => f.write_str("one-way and not repeated"),
            Self::DeniedOutside { denied } => {
                write!(f, "{denied} denied under Enforce; one end is not a workload: `bulkhead allow` adds it by hand")
            }
            Self::WouldDeny { flows } => write!(f, "{flows} would have been denied under Audit, and came to nothing"),
            Self::Attempts { unanswered, refused } => {
                write!(f, "attempts only ({unanswered} unanswered, {refused} refused): nothing was ever established")
            }
        }
    }
}

/// Denied attempts of one source that are still taken one by one, as a multiple of what is a scan otherwise. Denials to the outside
/// don't count at all: addresses there change by themselves.
const DENIED_PER_SCAN: usize = 4;

impl Touch {
    fn is_scan(self, scan_targets: usize) -> bool {
        self.tried >= scan_targets
    }

    fn is_denied_scan(self, scan_targets: usize) -> bool {
        self.is_scan(scan_targets) || self.denied >= scan_targets.saturating_mul(DENIED_PER_SCAN)
    }
}

fn between_workloads(seen: &Seen<'_>) -> bool {
    [seen.from, seen.to].iter().all(|end| matches!(end, Endpoint::Workload(_)))
}

/// Seconds between the first and the last sight.
fn span(evidence: &Evidence) -> i64 {
    match (evidence.first, evidence.last) {
        (Some(first), Some(last)) => last.as_second() - first.as_second(),
        (None, _) | (_, None) => 0,
    }
}

/// Sorts one edge.
pub(super) fn sort(seen: &Seen<'_>, scan_targets: usize) -> Sorted {
    let Seen { service, evidence, touch, .. } = *seen;
    let ends = [seen.from, seen.to];
    if !seen.direction_known {
        return Sorted::Shown(Why::UnknownDirection);
    }
    if ends.iter().any(|end| matches!(end, Endpoint::Unknown(_))) {
        return Sorted::Shown(Why::UnknownEndpoint);
    }
    if ends.iter().any(|end| matches!(end, Endpoint::Run(_))) {
        return Sorted::Shown(Why::Run);
    }
    let Ok(ports) = Ports::new(service.protocol, service.port, service.port) else {
        return Sorted::Shown(Why::NoSuchPort);
    };
    if evidence.established > 0 {
        return Sorted::Proposed(ports, Origin::Observed);
    }
    let scan = Sorted::Shown(Why::Scan { targets: touch.tried + touch.denied });
    if touch.is_scan(scan_targets) {
        return scan;
    }
    if evidence.connected_no_data >= 2 && span(evidence) >= 1 {
        return Sorted::Proposed(ports, Origin::Observed);
    }
    let one_way = evidence.one_way > 0 && service.protocol == Protocol::Udp;
    // A socket that stays open is one flow for conntrack however often it sends; then its last sight moves on.
    if one_way && evidence.refused == 0 && (evidence.one_way >= 2 || span(evidence) >= 1) {
        return Sorted::Proposed(ports, Origin::OneWay);
    }
    if evidence.denied > 0 {
        return match between_workloads(seen) {
            true if touch.is_denied_scan(scan_targets) => scan,
            true => Sorted::Proposed(ports, Origin::DeniedAttempt),
            false => Sorted::Shown(Why::DeniedOutside { denied: evidence.denied }),
        };
    }
    Sorted::Shown(if evidence.connected_no_data > 0 {
        Why::ConnectedOnce
    } else if one_way && evidence.refused > 0 {
        Why::OneWayRefused { refused: evidence.refused }
    } else if evidence.one_way > 0 {
        Why::OneWayOnce
    } else if evidence.would_deny > 0 {
        Why::WouldDeny { flows: evidence.would_deny }
    } else {
        Why::Attempts { unanswered: evidence.unanswered, refused: evidence.refused }
    })
}
