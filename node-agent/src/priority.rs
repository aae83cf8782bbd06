//! Who is served first where processors are short, and who is ended last where memory is.
//!
//! # Why
//! A container that joins a guarded network gets nothing through before it is bound, and fifty that start at once keep a machine busy
//! for seconds: what binds waits for a processor behind all of them, though it needs one for a millisecond. So the agent goes before
//! them, and its filter with it, which carries the engine's answers. What learns does not: a flood of connections is work for as long as
//! it lasts, and whoever makes it must not take the processors from its neighbours by way of us. Its threads go back and wait as all do.

use std::{fs, io};

use nix::errno::Errno;
use nix::libc;
use tracing::{debug, info};

/// The `nice` of what others wait for (sched(7)): some 28 times an ordinary program's share, and before it when it wakes up. Not the
/// most there is: what keeps the machine itself going may go before us.
const FIRST: i32 = -15;
/// The engine's own (moby, contrib/init/systemd/docker.service): the kernel ends the agent when it is the agent that takes half of the
/// memory. What is enforced outlives it, but who joins meanwhile is kept waiting.
const SPARED: &str = "-500";
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Puts this thread, and all that it starts, before ordinary programs, and spares the process where memory is short. To be called
/// before there is a second thread, and before capabilities are given up. What whoever started it has chosen stays.
///
/// Where it is not permitted (CAP_SYS_NICE, CAP_SYS_RESOURCE) that is told in the log: all works, and may be late.
pub(crate) fn go_first() {
    match of_this_thread() {
        0 => {
            if let Err(error) = set(FIRST) {
                info!(%error, "runs at the ordinary priority: where processors are short, a container that joins is bound later");
            }
        }
        chosen => debug!(nice = chosen, "the priority that it was started with stays"),
    }
    let ordinary = fs::read_to_string(OOM_SCORE).is_ok_and(|score| score.trim() == "0");
    if ordinary && let Err(error) = fs::write(OOM_SCORE, SPARED) {
        info!(%error, "is not spared where memory is short: an agent that is ended binds nobody until it is back");
    }
}

/// Takes this thread back among ordinary programs, for which nobody needs a privilege.
pub(crate) fn wait_as_all_do() {
    if of_this_thread() < 0
        && let Err(error) = set(0)
    {
        debug!(%error, "a thread that learns goes before others");
    }
}

/// On Linux the priority is a thread's (setpriority(2), "C library/kernel differences"); 0 is the calling one.
#[expect(unsafe_code, reason = "nix has no getpriority(2); it takes two numbers")]
fn of_this_thread() -> i32 {
    // SAFETY: numbers by value. -1 is a priority too, and for the calling thread there is no error.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

#[expect(unsafe_code, reason = "nix has no setpriority(2); it takes three numbers")]
fn set(nice: i32) -> io::Result<()> {
    // SAFETY: numbers by value.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_was_put_back_on_purpose_is_not_brought_forward() {
        std::thread::spawn(|| {
            set(5).unwrap();
            wait_as_all_do();
            assert_eq!(of_this_thread(), 5);
        })
        .join()
        .unwrap();
    }
}
