//! Waiting until what was sent has gone as far as it goes, without guessing how long that takes.

use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::frame::{self, Frames};
use crate::netns::{Netns, Veth};

/// A cable of the lab's own beside those that are probed.
///
/// # Why
/// Where all is sent by one thread on one processor ([`on_one_processor`]), a veth puts each frame at the end of that processor's
/// one queue. What comes out at the end of this cable was behind all of them; a few times over, behind what they caused.
#[derive(Debug)]
pub struct Fence {
    from: Frames,
    to: Frames,
}

impl Fence {
    /// Lays the cable in this namespace: `fence0`, `fence1`.
    pub fn new(netns: &Netns) -> Self {
        Veth::between(netns, "fence0", netns, "fence1");
        Self { from: Frames::open(netns, "fence0"), to: Frames::open(netns, "fence1") }
    }

    /// Waits for all that the calling thread has sent before.
    ///
    /// # Panics
    /// Where the cable carries nothing.
    pub fn wait(&self) {
        for turn in 0..6_u8 {
            self.from.send(&frame::ethernet([2; 6], [4; 6], 0x88b6, &[turn; 46]));
            let arrived = self.to.receive(Duration::from_secs(20), |frame| frame[12..15] == [0x88, 0xb6, turn]);
            assert!(arrived.is_some(), "the lab's own cable");
        }
    }
}

/// The calling thread, and all that it causes in the kernel, on one processor from now on.
///
/// # Panics
/// Where the kernel refuses that.
pub fn on_one_processor() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).expect("a thread may ask where it runs");
    let first = (0..CpuSet::count()).find(|&n| allowed.is_set(n).unwrap_or(false)).expect("it runs somewhere");
    let mut set = CpuSet::new();
    set.set(first).expect("a processor that exists");
    sched_setaffinity(this, &set).expect("one of those that it may run on");
}
