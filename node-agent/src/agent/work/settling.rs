//! When the bridges follow what is bound. A function of instants: whoever asks has the clock.

use std::time::Duration;

use tokio::time::Instant;

/// Nobody else came for so long.
const QUIET: Duration = Duration::from_millis(20);
/// So long after the first that came, as soon as nobody waits to be bound.
const PATIENT: Duration = Duration::from_millis(250);
/// So long after it whoever waits: on a node that is slow to bind somebody always does, and until the bridges follow, a neighbour's frames
/// draw away the packets of all that came.
const AT_LATEST: Duration = Duration::from_secs(1);

/// Who was bound that the bridges do not follow yet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Settling(Option<Bound>);

#[derive(Clone, Copy, Debug)]
struct Bound {
    first: Instant,
    last: Instant,
}

impl Settling {
    /// Somebody was bound.
    pub(super) fn bound(&mut self, now: Instant) {
        let first = self.0.map_or(now, |bound| bound.first);
        self.0 = Some(Bound { first, last: now });
    }

    /// From when on the bridges follow as soon as nobody waits to be bound; `None`: there is nothing to follow.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.map(|Bound { first, last }| (last + QUIET).min(first + PATIENT))
    }

    /// Whether they follow now, whoever waits.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.0.is_some_and(|bound| now >= bound.first + AT_LATEST)
    }

    /// They were made to follow.
    pub(super) fn done(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_comes_alone_is_followed_after_a_moment_and_a_burst_once_it_is_over() {
        let (mut settling, start) = (Settling::default(), Instant::now());
        assert_eq!(settling.due(), None);
        settling.bound(start);
        assert_eq!(settling.due(), Some(start + QUIET));
        settling.bound(start + QUIET / 2);
        assert_eq!(settling.due(), Some(start + QUIET / 2 + QUIET));
        settling.done();
        assert!(settling.due().is_none() && !settling.is_overdue(start + AT_LATEST * 2));
    }

    #[test]
    fn a_steady_stream_of_joins_does_not_put_off_the_bridges_beyond_a_second() {
        let (mut settling, start) = (Settling::default(), Instant::now());
        let (mut now, mut followed) = (start, vec![start]);
        // Somebody always waits, so nothing that is only due is done.
        while now < start + Duration::from_secs(10) {
            settling.bound(now);
            assert!(settling.due().is_some_and(|due| due <= followed[followed.len() - 1] + PATIENT + Duration::from_millis(1)));
            now += Duration::from_millis(1);
            if settling.is_overdue(now) {
                settling.done();
                followed.push(now);
            }
        }
        let longest = followed.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert!(longest.is_some_and(|longest| longest <= AT_LATEST), "{longest:?}");
    }
}
