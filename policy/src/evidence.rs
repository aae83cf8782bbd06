//! What was seen of an edge: counts, times, hours. Merging is associative and commutative, so the order in which nodes
//! report cannot change what is learned.

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

/// The road a flow took to reach its server, where there is more than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Road {
    /// Straight to the container's address.
    Direct,
    /// By a published port, rewritten by DNAT.
    Published,
    /// By a published port and the engine's user-land proxy.
    Proxy,
}

/// Roads that were taken: a set in one byte, since each of a million edges has one.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Roads(u8);

impl Roads {
    const ALL: [Road; 3] = [Road::Direct, Road::Published, Road::Proxy];

    /// Whether a flow came by this road.
    pub fn contains(self, road: Road) -> bool {
        self.0 & Self::bit(road) != 0
    }

    /// The roads, in order.
    pub fn iter(self) -> impl Iterator<Item = Road> {
        Self::ALL.into_iter().filter(move |&road| self.contains(road))
    }

    fn bit(road: Road) -> u8 {
        match road {
            Road::Direct => 1,
            Road::Published => 2,
            Road::Proxy => 4,
        }
    }
}

impl Extend<Road> for Roads {
    fn extend<I: IntoIterator<Item = Road>>(&mut self, roads: I) {
        roads.into_iter().for_each(|road| self.0 |= Self::bit(road));
    }
}

impl FromIterator<Road> for Roads {
    fn from_iter<I: IntoIterator<Item = Road>>(roads: I) -> Self {
        let mut set = Self::default();
        set.extend(roads);
        set
    }
}

impl<const N: usize> From<[Road; N]> for Roads {
    fn from(roads: [Road; N]) -> Self {
        roads.into_iter().collect()
    }
}

impl std::fmt::Debug for Roads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Serialize for Roads {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for Roads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Vec::<Road>::deserialize(deserializer)?.into_iter().collect())
    }
}

/// First and last hour of one run.
type Run = (u32, u32);

/// Hours (since the Unix epoch, UTC) in which something happened, as runs without gap: an edge that is always busy costs
/// one run, and no memory of its own. Kept sorted and merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HourSet(SmallVec<[Run; 1]>);

impl Serialize for HourSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.runs().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for HourSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(Vec::deserialize(deserializer)?.into()))
    }
}

impl HourSet {
    /// The hour a time falls into.
    pub fn hour_of(time: Timestamp) -> u32 {
        u32::try_from(time.as_second().div_euclid(3600)).unwrap_or(0)
    }

    /// Adds one hour.
    pub fn insert(&mut self, hour: u32) {
        let at = self.0.partition_point(|&(first, _)| first <= hour);
        if at > 0 && self.0[at - 1].1 >= hour {
            return;
        }
        let joins_before = at > 0 && self.0[at - 1].1.checked_add(1) == Some(hour);
        let joins_after = self.0.get(at).is_some_and(|&(first, _)| hour.checked_add(1) == Some(first));
        match (joins_before, joins_after) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = hour,
            (false, true) => self.0[at].0 = hour,
            (false, false) => self.0.insert(at, (hour, hour)),
        }
    }

    /// Builds from runs (first, last), in any order.
    pub fn from_runs(runs: impl IntoIterator<Item = Run>) -> Self {
        let mut runs: SmallVec<[Run; 2]> = runs.into_iter().filter(|(first, last)| first <= last).collect();
        runs.sort_unstable();
        let mut merged: SmallVec<[Run; 1]> = SmallVec::new();
        for (first, last) in runs {
            match merged.last_mut() {
                Some(run) if first <= run.1.saturating_add(1) => run.1 = run.1.max(last),
                Some(_) | None => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// Adds every hour of another set.
    pub fn merge(&mut self, other: &Self) {
        // Most edges of a busy workload were seen in the same hours.
        if !other.0.iter().all(|run| self.holds(*run)) {
            *self = Self::from_runs(self.0.iter().chain(&other.0).copied());
        }
    }

    fn holds(&self, (first, last): Run) -> bool {
        let at = self.0.partition_point(|run| run.1 < first);
        self.0.get(at).is_some_and(|run| run.0 <= first && last <= run.1)
    }

    /// The runs (first hour, last hour), sorted.
    pub fn runs(&self) -> &[Run] {
        &self.0
    }

    /// Every hour, sorted.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().flat_map(|&(first, last)| first..=last)
    }

    /// How many distinct hours.
    pub fn hours(&self) -> u64 {
        self.0.iter().map(|&(first, last)| u64::from(last - first) + 1).sum()
    }

    /// How many distinct UTC days.
    pub fn days(&self) -> u64 {
        HourSet::from_runs(self.0.iter().map(|&(first, last)| (first / 24, last / 24))).hours()
    }
}

/// Everything that was seen of one edge. Counts are of flows (connections), sizes in bytes as conntrack counts them (IP
/// header included, RFC 791/8200).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Evidence {
    /// Carried payload: TCP assured with data in some direction; UDP, SCTP and ICMP answered.
    pub established: u64,
    /// TCP connections completed without any payload (health checks and connect scans).
    pub connected_no_data: u64,
    /// UDP that nobody answered and nobody refused.
    pub one_way: u64,
    /// Tried and came to nothing: no answer.
    pub unanswered: u64,
    /// Tried and refused: reset, or an ICMP error.
    pub refused: u64,
    /// Denied by an enforced policy.
    pub denied: u64,
    /// Passed under Audit although the policy would have denied it.
    pub would_deny: u64,
    /// Of the flows above, those that were older than the agent.
    pub pre_existing: u64,
    /// From client to server.
    pub bytes_sent: u64,
    /// From server to client.
    pub bytes_received: u64,
    /// When the first and the last flow began (the last time activity was seen, for a flow that is still open).
    pub first: Option<Timestamp>,
    /// See `first`.
    pub last: Option<Timestamp>,
    /// Hours in which a flow that counts as use (established, connected, one-way) was seen.
    pub hours: HourSet,
    /// The roads taken.
    pub roads: Roads,
}

impl Evidence {
    /// Adds what another report saw. Associative and commutative; counts stop at their largest value, so that no report can make
    /// them small again.
    pub fn merge(&mut self, other: &Self) {
        self.established = self.established.saturating_add(other.established);
        self.connected_no_data = self.connected_no_data.saturating_add(other.connected_no_data);
        self.one_way = self.one_way.saturating_add(other.one_way);
        self.unanswered = self.unanswered.saturating_add(other.unanswered);
        self.refused = self.refused.saturating_add(other.refused);
        self.denied = self.denied.saturating_add(other.denied);
        self.would_deny = self.would_deny.saturating_add(other.would_deny);
        self.pre_existing = self.pre_existing.saturating_add(other.pre_existing);
        self.bytes_sent = self.bytes_sent.saturating_add(other.bytes_sent);
        self.bytes_received = self.bytes_received.saturating_add(other.bytes_received);
        self.first = self.first.into_iter().chain(other.first).min();
        self.last = self.last.max(other.last);
        self.hours.merge(&other.hours);
        self.roads.extend(other.roads.iter());
    }

    /// Flows that count as use of the edge.
    pub fn used(&self) -> u64 {
        self.established.saturating_add(self.connected_no_data).saturating_add(self.one_way)
    }

    /// Flows that came to nothing.
    pub fn attempts(&self) -> u64 {
        self.unanswered.saturating_add(self.refused)
    }
}
