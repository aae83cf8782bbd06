//! What processes use of the machine: proc(5).

use std::fs;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A process's own accounts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// User and system time of all its threads, with the resolution of the clock tick.
    pub(crate) cpu: Duration,
    /// Resident memory, bytes.
    pub(crate) resident: f64,
    /// The most it ever was, bytes.
    pub(crate) peak: f64,
}

/// Reads them.
///
/// # Panics
/// Where there is no such process.
pub(crate) fn used(pid: u32) -> Used {
    let folder = format!("/proc/{pid}");
    let status = fs::read_to_string(format!("{folder}/status")).expect("the process lives");
    let size = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("a size");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") * 1024.0
    };
    let stat = fs::read_to_string(format!("{folder}/stat")).expect("the process lives");
    // The name may hold spaces; utime and stime are the 12th and 13th after it, in clock ticks.
    let rest = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("ticks")).sum();
    Used { cpu: Duration::from_millis(ticks * 1000 / TICKS), resident: size("VmRSS"), peak: size("VmHWM") }
}

/// Resident memory with shared pages by their share (proc(5), smaps_rollup), bytes.
pub(crate) fn shared(pid: u32) -> f64 {
    rolled_up(pid, "Pss:")
}

/// Memory that it reads or writes within this time (proc(5), clear_refs and Referenced), bytes in whole pages: what has to be fetched
/// again where memory at rest is taken away.
pub(crate) fn touched_within(pid: u32, time: Duration) -> f64 {
    fs::write(format!("/proc/{pid}/clear_refs"), "1").expect("a kernel that forgets references");
    std::thread::sleep(time);
    rolled_up(pid, "Referenced:")
}

fn rolled_up(pid: u32, name: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process lives");
    let line = text.lines().find(|line| line.starts_with(name)).expect("a size");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") * 1024.0
}

/// Time that this thread was on a processor so far, seconds: what other programs of the machine took is not in it.
pub(crate) fn on_cpu() -> f64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock");
    Duration::from(time).as_secs_f64()
}

/// Clock ticks a second: 100 on every architecture Linux has today (USER_HZ).
const TICKS: u64 = 100;

/// Forgets the peak of this process so far (proc(5), clear_refs).
pub(crate) fn forget_peak() {
    fs::write("/proc/self/clear_refs", "5").expect("a kernel that forgets peaks");
}

/// Bytes as `12.3 MB`.
pub(crate) fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}
