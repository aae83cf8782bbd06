//! How much is unseen: Good-Turing and Chao estimators over flows and hours.
//!
//! # Why
//! Three minutes of observation and seven days look alike on a list of edges. How many edges were seen only once or twice tells how
//! much more there is to expect, as it does for species in a sample:
//!
//! * Good-Turing: the share of the next observations that will be of an unseen kind is about f1 / n, f1 kinds seen exactly once
//!   in n observations (I. J. Good, "The population frequencies of species and the estimation of population parameters",
//!   Biometrika 40, 1953).
//! * Chao1: at least f1 (f1 - 1) / (2 (f2 + 1)) kinds are unseen, f2 seen exactly twice (A. Chao, "Nonparametric estimation of the
//!   number of classes in a population", Scand. J. Statist. 11, 1984; this is the bias-corrected form, which needs no f2).
//! * Chao2: the same over sampling units, here hours: (T - 1) / T * q1 (q1 - 1) / (2 (q2 + 1)), q1 kinds seen in exactly one of T
//!   hours, q2 in exactly two (A. Chao, "Estimating the population size for capture-recapture data with unequal catchability",
//!   Biometrics 43, 1987).
//!
//! Flows come in bursts, so flows alone make the sample look larger than it is; hours are the more honest unit, and both are lower
//! bounds. Neither knows of what happens only at month's end: so the window is said too.
//!
//! All in whole numbers, so that two machines say the same.

use jiff::Timestamp;

use crate::evidence::Evidence;
use crate::learn::{Options, Window};
use crate::suggestion::{Coverage, Phase};

/// Kinds seen once, kinds seen twice, and how often anything was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frequencies {
    /// Kinds seen exactly once.
    pub once: u64,
    /// Kinds seen exactly twice.
    pub twice: u64,
    /// All observations.
    pub total: u64,
}

impl Frequencies {
    /// One kind more, seen so often.
    fn add(&mut self, count: u64) {
        self.once += u64::from(count == 1);
        self.twice += u64::from(count == 2);
        self.total = self.total.saturating_add(count);
    }

    /// The kinds of both; none is in both.
    fn merge(&mut self, other: Self) {
        let Self { once, twice, total } = other;
        self.once += once;
        self.twice += twice;
        self.total = self.total.saturating_add(total);
    }
}

impl FromIterator<u64> for Frequencies {
    fn from_iter<I: IntoIterator<Item = u64>>(counts: I) -> Self {
        let mut seen = Self::default();
        counts.into_iter().for_each(|count| seen.add(count));
        seen
    }
}

/// Share of the next observations expected to be of a kind not seen yet (Good-Turing), parts per million; `None` without any
/// observation.
pub fn good_turing_ppm(seen: Frequencies) -> Option<u64> {
    let share = u128::from(seen.once) * 1_000_000 / u128::from(seen.total).max(1);
    (seen.total > 0).then(|| u64::try_from(share).unwrap_or(1_000_000))
}

/// Kinds expected to exist and not seen yet (Chao1, bias-corrected), rounded up.
pub fn chao1(seen: Frequencies) -> u64 {
    chao(seen, 1, 1)
}

/// The same over `units` sampling units (Chao2, bias-corrected), rounded up; `None` with fewer than two units.
pub fn chao2(seen: Frequencies, units: u64) -> Option<u64> {
    (units >= 2).then(|| chao(seen, units - 1, units))
}

fn chao(seen: Frequencies, numerator: u64, denominator: u64) -> u64 {
    let above = u128::from(seen.once) * u128::from(seen.once.saturating_sub(1)) * u128::from(numerator);
    let below = 2 * (u128::from(seen.twice) + 1) * u128::from(denominator);
    u64::try_from(above.div_ceil(below)).unwrap_or(u64::MAX)
}

/// What the estimators ask of edges in use. Sums of parts are the sum of the whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) edges: u64,
    flows: Frequencies,
    by_hour: Frequencies,
    hours: crate::HourSet,
    newest: Option<Timestamp>,
}

impl Sums {
    /// Of these. In one go: the evidence of a workload that everybody uses is larger than what a processor has at hand.
    pub(crate) fn of<'e>(used: impl IntoIterator<Item = &'e Evidence>) -> Self {
        let mut sums = Self::default();
        for evidence in used {
            sums.edges += 1;
            sums.flows.add(evidence.used());
            sums.by_hour.add(evidence.hours.hours());
            sums.hours.merge(&evidence.hours);
            sums.newest = sums.newest.max(evidence.first);
        }
        sums
    }

    /// Adds those of other edges.
    pub(crate) fn merge(&mut self, other: &Self) {
        let Self { edges, flows, by_hour, hours, newest } = other;
        self.edges += edges;
        self.flows.merge(*flows);
        self.by_hour.merge(*by_hour);
        self.hours.merge(hours);
        self.newest = self.newest.max(*newest);
    }
}

/// What is known and unknown of a workload whose edges in use sum up to this, and how far its learning is.
pub(crate) fn coverage(used: Sums, window: Option<&Window>, options: &Options) -> (Coverage, Phase) {
    let empty = Window::default();
    let window = window.unwrap_or(&empty);
    let Sums { edges, flows, by_hour, hours, newest } = used;
    // An hour without traffic is a sample too, if somebody watched.
    let units = hours.hours().max(window.seconds.len() as u64);
    let coverage = Coverage {
        healthy_seconds: window.healthy_seconds(),
        hours: hours.hours(),
        days: hours.days(),
        lost: window.lost,
        edges,
        unseen_connections_ppm: good_turing_ppm(flows),
        unseen_edges: chao2(by_hour, units).filter(|_| edges > 0),
        notes: notes(window, options),
    };

    // The newest edge ends the quiet: only whole healthy hours after it count.
    let newest = newest.map(crate::HourSet::hour_of);
    let quiet = newest.map_or(0, |newest| window.whole_hours().filter(|&hour| hour > newest).count() as u64);
    let long_enough = coverage.healthy_seconds >= u64::from(options.stable_hours) * 3600;
    let little_unseen = coverage.unseen_connections_ppm.is_some_and(|ppm| ppm <= options.stable_unseen_ppm);
    let phase = if edges == 0 || quiet == 0 {
        Phase::Learning
    } else if window.unlisted == 0 && long_enough && little_unseen && quiet >= u64::from(options.quiet_hours) {
        Phase::Stable
    } else {
        Phase::Stabilizing
    };
    (coverage, phase)
}

fn notes(window: &Window, options: &Options) -> Vec<String> {
    let mut notes = Vec::new();
    if window.healthy_seconds() < u64::from(options.stable_hours) * 3600 {
        notes.push(format!("healthily observed for {} of {} h", spoken(window.healthy_seconds()), options.stable_hours));
    }
    if !window.saw_a_night() {
        notes.push("no nightly window observed yet".to_owned());
    }
    if window.lost > 0 {
        notes.push(format!("{} kernel events lost meanwhile", window.lost));
    }
    if window.unlisted > 0 {
        notes.push(format!("{} flows with further peers, for which the graph has no room, are in no rule", window.unlisted));
    }
    notes
}

/// A length of time as people say it.
pub fn spoken(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        _ if seconds % 3600 < 60 => format!("{} h", seconds / 3600),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

impl std::fmt::Display for Coverage {
    /// `19 edges, 0.2 % of new connections expected to be unseen; no nightly window observed yet`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        write!(f, "{} edge{}", self.edges, plural(self.edges))?;
        match self.unseen_connections_ppm {
            // Rounded up: a small share is not none.
            Some(ppm) => {
                let tenths = ppm.div_ceil(1000);
                write!(f, ", {}.{} % of new connections expected to be unseen", tenths / 10, tenths % 10)?;
            }
            None => f.write_str(", too little seen to say what is unseen")?,
        }
        match self.unseen_edges {
            Some(0) | None => {}
            Some(edges) => write!(f, ", {edges} more edge{} expected", plural(edges))?,
        }
        self.notes.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::HourSet;

    fn at(hour: i64) -> Timestamp {
        Timestamp::from_second(hour * 3600).expect("a few hours after 1970 are a time")
    }

    fn edge(flows: u64, hours: std::ops::Range<u32>) -> Evidence {
        Evidence {
            established: flows,
            first: Some(at(hours.start.into())),
            last: Some(at(hours.end.into())),
            hours: HourSet::from_runs([(hours.start, hours.end - 1)]),
            ..Evidence::default()
        }
    }

    fn watched(hours: i64) -> Window {
        let mut window = Window::default();
        window.add(at(0), at(hours), true, 0);
        window
    }

    #[test]
    fn the_estimators_say_what_their_authors_formulas_say() {
        let seen: Frequencies = [1, 1, 1, 2, 5].into_iter().collect();
        assert_eq!(seen, Frequencies { once: 3, twice: 1, total: 10 });
        assert_eq!(good_turing_ppm(seen), Some(300_000));
        // 3 * 2 / (2 * 2) = 1.5, rounded up.
        assert_eq!(chao1(seen), 2);
        // 3 / 4 of that.
        assert_eq!(chao2(seen, 4), Some(2));
        assert_eq!(chao2(Frequencies { once: 4, twice: 0, total: 9 }, 3), Some(4));
    }

    #[test]
    fn nothing_seen_says_nothing_and_everything_seen_often_expects_nothing() {
        assert_eq!(good_turing_ppm(Frequencies::default()), None);
        assert_eq!(chao2(Frequencies::default(), 1), None);
        let often: Frequencies = [9, 8, 7].into_iter().collect();
        assert_eq!((good_turing_ppm(often), chao1(often), chao2(often, 24)), (Some(0), 0, Some(0)));
    }

    #[test]
    fn hours_tell_what_a_burst_hides() {
        // Two thousand flows each, all in one hour of the ten that were watched.
        let burst = [edge(2000, 3..4), edge(2000, 3..4), edge(2000, 4..5)];
        let (coverage, _) = coverage(Sums::of(&burst), Some(&watched(10)), &Options::default());
        assert_eq!(coverage.unseen_connections_ppm, Some(0));
        assert_eq!(coverage.unseen_edges, Some(3));
        assert!(coverage.to_string().starts_with("3 edges, 0.0 % of new connections expected to be unseen, 3 more edges expected"));
    }

    #[test]
    fn a_new_edge_ends_the_quiet_and_the_wall_clock_does_not_bring_it_back() {
        let edges = [edge(9000, 0..60), edge(50, 59..60)];
        let phase = |window: &Window| coverage(Sums::of(&edges), Some(window), &Options::default()).1;
        assert_eq!(phase(&watched(60)), Phase::Learning);
        assert_eq!(phase(&watched(62)), Phase::Stabilizing);
        assert_eq!(phase(&watched(84)), Phase::Stable);
        // What there was no room for may be what a rule is missing for.
        assert_eq!(phase(&Window { unlisted: 1, ..watched(84) }), Phase::Stabilizing);
        let mut lossy = watched(60);
        lossy.add(at(60), at(200), true, 3);
        lossy.add(at(200), at(300), false, 0);
        assert_eq!(phase(&lossy), Phase::Learning);
    }

    #[test]
    fn lengths_of_time_are_said_as_people_say_them() {
        assert_eq!([59, 60, 3599, 3600, 5400, 172_800].map(spoken), ["59 s", "1 min", "59 min", "1 h", "1 h 30 min", "48 h"]);
    }
}
