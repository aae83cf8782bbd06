//! When the connection table runs full: whether to go on tracking for the sake of learning. A table that is full fails every new
//! connection of the host, which is worse than not to learn for a while.
//!
//! # Why these means
//! `notrack` would break address translation for the packets it meets (a reply on a bridge may belong to a connection that the
//! engine translated). So what is stopped is only what tracks because of us: the switches of bridges that were off before us, and,
//! where nothing is filtered, the observation table. What the engine's own translation tracks goes on, as it did before us.

/// Parts per million of the connection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From here on nothing is tracked for learning alone.
    pub stop: u64,
    /// Below this it is again.
    pub resume: u64,
}

impl Default for Limits {
    /// Stops at 90 %; resumes at 80 %, where the alarm ends.
    fn default() -> Self {
        Self { stop: 900_000, resume: 800_000 }
    }
}

impl Limits {
    /// Whether to be restrained now, with so many entries of so many in the table.
    pub(super) fn restrain(self, restrained: bool, (used, room): (u64, u64)) -> bool {
        let share = |ppm: u64| u128::from(room) * u128::from(ppm) <= u128::from(used) * 1_000_000;
        room > 0 && share(if restrained { self.resume } else { self.stop })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stops_at_ninety_per_cent_and_resumes_below_eighty() {
        let limits = Limits::default();
        let states = [(899, false), (900, true), (850, true), (800, true), (799, false), (850, false), (1000, true)];
        let mut restrained = false;
        for (used, wanted) in states {
            restrained = limits.restrain(restrained, (used, 1000));
            assert_eq!(restrained, wanted, "{used} of 1000");
        }
        assert!(!limits.restrain(false, (5, 0)), "a table of unknown size restrains nobody");
    }
}
