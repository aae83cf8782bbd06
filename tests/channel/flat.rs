//! Memory and disk stay flat: while the controller is away, and while it is slow.

use std::time::Duration;

use crate::pair::{Manner, Place, counted, one};

/// Resident memory of this process, bytes (proc_pid_status(5)).
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_away_for_long_costs_neither_memory_nor_disk() {
    let place = Place::new();
    let agent = place.agent();
    let burst = |flows: u64| {
        let handle = agent.handle.clone();
        async move {
            for n in 0..flows {
                handle.record(one(u16::try_from(n % 1000).unwrap() + 1));
            }
            handle.flush().await;
        }
    };
    burst(20_000).await;
    let before = resident();
    for _ in 0..20 {
        burst(20_000).await;
    }
    let (after, disk) = (resident(), std::fs::metadata(place.agent_dir().join("spool")).unwrap().len());
    // Other tests run in this process at the same time: this is far above their noise and far below 400,000 flows kept one by one.
    assert!(after < before + (64 << 20), "{before} -> {after}");
    assert!(disk <= 5 << 20, "{disk}");
    let controller = place.controller().await;
    assert_eq!(counted(&controller.store, 420_000).await, 420_000);
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_makes_the_agent_wait_and_loses_nothing() {
    let place = Place::new();
    let controller = place.controller_that(Manner { pause: Duration::from_millis(80), ..Manner::default() }).await;
    let agent = place.agent();
    let mut recorded = 0;
    let before = resident();
    for n in 0..100_000_u32 {
        agent.handle.record(one(u16::try_from(n % 3000).unwrap() + 1));
        recorded += 1;
        if n % 500 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let disk = std::fs::metadata(place.agent_dir().join("spool")).unwrap().len();
    assert!(disk <= 8 << 20, "{disk}");
    assert!(resident() < before + (64 << 20));
    assert_eq!(counted(&controller.store, recorded).await, recorded);
    agent.handle.stop().await;
    controller.stop().await;
}
