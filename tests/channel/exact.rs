//! Counts are exact at the end.

use std::time::Duration;

use jiff::Timestamp;
use node_agent::uplink::Order;
use policy::Health;

use crate::pair::{Manner, PATIENCE, Place, counted, key, one, plan, up};

#[tokio::test(flavor = "multi_thread")]
async fn a_flow_travels_up_and_a_plan_down() {
    let place = Place::new();
    let mut controller = place.controller().await;
    let mut agent = place.agent();
    agent.handle.record(one(5432));
    assert_eq!(up(&agent).await, controller.store.id());
    assert_eq!(counted(&controller.store, 1).await, 1);
    let graph = controller.store.load_graph().await.unwrap();
    assert_eq!(graph.get(&key(5432)), Some(&one(5432).seen));

    let order = tokio::time::timeout(PATIENCE, agent.orders.recv()).await.unwrap().unwrap();
    assert_eq!(order, Order::Plan { plan: Box::new(plan(controller.store.id(), 1)), adopt: false });
    agent.handle.applied(controller.store.id(), 1, Ok(3));
    let applied = tokio::time::timeout(PATIENCE, controller.applied.recv()).await.unwrap().unwrap();
    assert_eq!((applied.generation, applied.refused, applied.revoked), (1, None, 3));
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_seen_while_the_controller_was_away_arrives_once() {
    let place = Place::new();
    let agent = place.agent();
    for round in 0..10 {
        for n in 1..=100 {
            agent.handle.record(one(n));
        }
        if round % 3 == 0 {
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
    let controller = place.controller().await;
    assert_eq!(counted(&controller.store, 1000).await, 1000);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(counted(&controller.store, 1000).await, 1000, "nothing is counted again later");
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_committed_but_never_acknowledged_is_not_counted_again() {
    let place = Place::new();
    let controller = place.controller_that(Manner { dies_after_commit: 5, ..Manner::default() }).await;
    let agent = place.agent();
    for n in 1..=200 {
        agent.handle.record(one(n % 20));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(counted(&controller.store, 200).await, 200);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(counted(&controller.store, 200).await, 200);
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_end_and_begin_again_at_any_time() {
    let place = Place::new();
    let mut agent = place.agent();
    let mut controller = place.controller().await;
    let mut recorded = 0;
    for round in 0..12 {
        for n in 1..=50 {
            agent.handle.record(one(n));
            recorded += 1;
        }
        match round % 4 {
            1 => {
                controller.stop().await;
                controller = place.controller().await;
            }
            2 => {
                agent.handle.stop().await;
                agent = place.agent();
            }
            _ => tokio::time::sleep(Duration::from_millis(40)).await,
        }
    }
    assert_eq!(counted(&controller.store, recorded).await, recorded);
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_put_back_from_a_copy_says_what_it_missed() {
    let place = Place::new();
    let agent = place.agent();
    let mut controller = place.controller().await;
    agent.handle.record(one(1));
    counted(&controller.store, 1).await;
    controller.stop().await;
    let copy = std::fs::read(place.db()).unwrap();
    controller = place.controller().await;
    for n in 2..=4 {
        agent.handle.record(one(n));
        counted(&controller.store, n.into()).await;
    }
    // The last one's acknowledgement is on its way: without it the batch comes again, and is of the store that was put back.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    controller.stop().await;
    std::fs::write(place.db(), copy).unwrap();
    controller = place.controller().await;
    agent.handle.health(stretch(100, true));
    agent.handle.record(one(5));
    assert_eq!(counted(&controller.store, 2).await, 2);
    let health = controller.store.load_health().await.unwrap().remove("node1").unwrap();
    assert!(health.iter().any(|h| !h.healthy && h.lost >= 1), "{health:?}");
    agent.handle.stop().await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spool_put_back_from_a_copy_loses_nothing_that_is_recorded_later() {
    let place = Place::new();
    let spool = place.agent_dir().join("spool");
    let mut agent = place.agent();
    agent.handle.flush().await;
    let copy = std::fs::read(&spool).unwrap();
    let controller = place.controller().await;
    for n in 1..=3 {
        agent.handle.record(one(n));
        counted(&controller.store, n.into()).await;
    }
    agent.handle.stop().await;
    std::fs::write(&spool, copy).unwrap();
    agent = place.agent();
    // Under the old numbers these would be taken for batches that are in the store already.
    for n in 4..=6 {
        agent.handle.record(one(n));
        assert_eq!(counted(&controller.store, n.into()).await, u64::from(n));
    }
    agent.handle.stop().await;
    controller.stop().await;
}

fn stretch(from: i64, healthy: bool) -> Health {
    let at = |second| Timestamp::from_second(1_790_000_000 + second).unwrap();
    Health { from: at(from), to: at(from + 1), events: 1, lost: 0, unattributed: 0, healthy }
}
