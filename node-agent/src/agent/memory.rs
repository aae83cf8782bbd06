//! What the agent keeps of the memory that it no longer needs.
//!
//! # Why
//! The C library gives each thread an arena of its own, and a burst of connections leaves free pages in all of them: of 70 MB after
//! one, 25 were free. So there are few arenas, large buffers go back at once, and the rest goes back when a burst is over.

use std::time::{Duration, Instant};

/// Events since it was last given back, from which on a burst was one.
const BURST: u64 = 10_000;
/// Between two times at least: each looks at every page.
const AT_MOST_EVERY: Duration = Duration::from_secs(10);
/// Between two times at most: containers that came and went leave pages too, once their leases are forgotten.
const AT_LEAST_EVERY: Duration = Duration::from_secs(300);

/// When to give memory back: when many events came, and few come now.
#[derive(Debug, Default)]
pub(super) struct Thrift {
    /// Events that were counted when it was looked last.
    counted: u64,
    since: u64,
    /// The most within one pulse since then.
    most: u64,
    given: Option<Instant>,
}

impl Thrift {
    /// To be called with every pulse, with how many events there were so far. Whether now is the time.
    pub(super) fn is_due(&mut self, events: u64, now: Instant) -> bool {
        let grown = events.saturating_sub(std::mem::replace(&mut self.counted, events));
        self.since += grown;
        self.most = self.most.max(grown);
        let passed = now.duration_since(*self.given.get_or_insert(now));
        let over = self.since >= BURST && grown <= self.most / 10;
        let due = passed >= if over { AT_MOST_EVERY } else { AT_LEAST_EVERY };
        if due {
            *self = Self { counted: events, given: Some(now), ..Self::default() };
        }
        due
    }
}

/// To be called before there is a second thread.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "mallopt(3) has no safe face; it takes two numbers and keeps no pointers")]
pub fn be_frugal() {
    use nix::libc;
    // Fixed, they don't grow with the first large buffer that is freed.
    let settings = [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 256 * 1024), (libc::M_TRIM_THRESHOLD, 1024 * 1024)];
    for (which, value) in settings {
        // SAFETY: numbers by value. What is refused (it answers 0) stays as it was.
        unsafe { libc::mallopt(which, value) };
    }
}

/// Free pages go back to the kernel.
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "malloc_trim(3) has no safe face; it takes a number")]
pub(super) fn give_back() {
    // SAFETY: it touches only what is free, and locks the arenas itself.
    unsafe { nix::libc::malloc_trim(0) };
}

/// Another C library has its own ways.
#[cfg(not(target_env = "gnu"))]
pub fn be_frugal() {}

/// See above.
#[cfg(not(target_env = "gnu"))]
pub(super) fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_when_a_burst_is_over_and_not_while_it_lasts() {
        let (mut thrift, began) = (Thrift::default(), Instant::now());
        let mut pulse = |second, events| thrift.is_due(events, began + Duration::from_secs(second));
        assert!(!pulse(1, 50), "nothing happened");
        assert!(!pulse(22, 20_050), "it lasts");
        assert!(!pulse(23, 40_050));
        assert!(pulse(24, 40_060), "it is over");
        assert!(!pulse(25, 40_070), "nothing since");
        assert!(!pulse(26, 60_070));
        assert!(!pulse(27, 60_080), "given back a moment ago");
        assert!(pulse(34, 60_090));
        assert!(!pulse(333, 60_091));
        assert!(pulse(334, 60_092), "now and then without a burst too");
    }
}
