//! How well a node saw during a stretch of time: what it read, what it lost, whether the stretch counts as observed. The clock
//! of learning runs on these stretches, not on the wall clock.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One stretch of a node's sight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// When the stretch began.
    pub from: Timestamp,
    /// When it ended; never before it began.
    pub to: Timestamp,
    /// Kernel events read.
    pub events: u64,
    /// Kernel events and records lost.
    pub lost: u64,
    /// Flows of which an end could not be named.
    pub unattributed: u64,
    /// Counts as observed time: the agent ran, saw all it should and lost nothing.
    pub healthy: bool,
}

impl Health {
    /// Length of the stretch, seconds.
    pub fn seconds(&self) -> u64 {
        u64::try_from(self.to.as_second() - self.from.as_second()).unwrap_or(0)
    }

    /// Whether the other stretch follows without a gap and was seen alike, so that both can be told as one.
    pub fn continues_as(&self, next: &Self) -> bool {
        self.to == next.from && self.healthy == next.healthy
    }

    /// Both stretches as one. It counts as observed only if both did and nothing lies between them: where stretches have to be
    /// joined for want of room, the clock of learning loses time and never gains any.
    pub fn join(&mut self, next: &Self) {
        self.healthy = self.healthy && next.healthy && self.to == next.from;
        self.from = self.from.min(next.from);
        self.to = self.to.max(next.to);
        self.events = self.events.saturating_add(next.events);
        self.lost = self.lost.saturating_add(next.lost);
        self.unattributed = self.unattributed.saturating_add(next.unattributed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretch(from: i64, to: i64, healthy: bool) -> Health {
        let at = |second| Timestamp::from_second(second).unwrap();
        Health { from: at(from), to: at(to), events: 10, lost: u64::from(!healthy), unattributed: 1, healthy }
    }

    #[test]
    fn joining_over_a_gap_never_counts_as_observed() {
        let mut joined = stretch(0, 10, true);
        joined.join(&stretch(20, 30, true));
        assert_eq!((joined.seconds(), joined.healthy, joined.events), (30, false, 20));
    }

    #[test]
    fn joining_what_follows_at_once_stays_observed() {
        let mut joined = stretch(0, 10, true);
        assert!(joined.continues_as(&stretch(10, 20, true)));
        joined.join(&stretch(10, 20, true));
        assert_eq!((joined.seconds(), joined.healthy), (20, true));
        assert!(!joined.continues_as(&stretch(20, 30, false)));
        joined.join(&stretch(20, 30, false));
        assert!(!joined.healthy);
    }
}
