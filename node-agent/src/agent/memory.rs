//! What the agent keeps of the memory that it no longer needs.
//!
//! # Why
//! The C library gives each thread an arena of its own, and a burst of connections, or a listing of a thousand containers, leaves free
//! pages in all of them: with one arena 70 MB after a burst were 43 to 51 (tests/bench/RESULTS.md). So there is one
//! arena, large buffers go back at once, and the rest now and then.

use std::time::Duration;

/// Between two times that free pages are given back: each takes some milliseconds at most.
pub(super) const GIVE_BACK_EVERY: Duration = Duration::from_secs(30);

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
