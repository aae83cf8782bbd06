//! The lab of the tests: namespaces, bridges, engines and probes, each undone when it is dropped.
//!
//! Everything made here carries the name of the process that made it (`bhlab-PID-N-LABEL`), lives in network namespaces of
//! its own, and is removed on drop, by the watchdog when a test hangs, and by the next run when a process was killed. Nothing
//! here touches the machine's own netfilter, sysctls or engine. It stops at making and probing: what a result means is for
//! the suites to say.

pub mod bridge;
pub mod capture;
pub mod compose;
pub mod engine;
pub mod fence;
pub mod frame;
pub mod host;
pub mod internet;
pub mod kin;
pub mod machine;
pub mod netns;
pub mod probe;
pub mod process;
pub mod server;
pub mod unsummed;

pub use bridge::{Bridge, Member};
pub use capture::{Capture, Packet};
pub use compose::Compose;
pub use engine::Engine;
pub use fence::Fence;
pub use frame::Frames;
pub use host::Host;
pub use internet::Internet;
pub use netns::{Netns, Veth};
pub use probe::{Echo, Tcp};
pub use process::{Process, eventually, limit, load, sweep, unique};
pub use server::Server;

/// Ends the test aloud: prints `skipped: TEST: REASON` past the capture of the test harness, for `tests/run` to count, and
/// returns from the function.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::process::say_skipped(&format!($($reason)*));
        return;
    }};
}

/// What there is, or the test is skipped with the reason why there is none.
#[macro_export]
macro_rules! or_skip {
    ($result:expr) => {
        match $result {
            Ok(there_is) => there_is,
            Err(reason) => $crate::skip!("{reason}"),
        }
    };
}

/// Skips the test unless it runs as root with the programs that the lab needs.
#[macro_export]
macro_rules! needs_root {
    () => {
        if let Some(reason) = $crate::process::lacks_root() {
            $crate::skip!("{reason}");
        }
    };
}
