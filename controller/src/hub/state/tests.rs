use policy::evidence::Evidence;
use policy::graph::EdgeKey;
use policy::{Service, WorkloadPolicy};

use super::*;

fn workload(number: usize) -> Workload {
    Workload::new("shop", format!("w{number}"))
}

/// `from` to `to` on a port, often enough to be proposed.
fn edge(from: usize, to: usize, port: u16) -> EdgeDelta {
    let end = |number| Endpoint::Workload(workload(number));
    let at = Timestamp::from_second(1000).unwrap();
    let seen = Evidence { established: 9, bytes_sent: 9, bytes_received: 9, first: Some(at), last: Some(at), ..Evidence::default() };
    EdgeDelta { key: EdgeKey { from: end(from), to: end(to), service: Service::tcp(port), direction_known: true }, seen }
}

fn ring() -> State {
    let mut state = State::new("store".into(), Timestamp::from_second(2000).unwrap(), 0);
    state.add_edges(&(0..20).map(|n| edge(n, (n + 1) % 20, 80)).collect::<Vec<_>>());
    state
}

#[test]
fn a_slip_of_the_finger_is_asked_about_and_another_name_is_not() {
    let names = || ["voting/vote", "voting/worker", "shop/db", "web"].into_iter().map(str::to_owned);
    for (typed, meant) in [
        ("voting/wrker", Some("voting/worker")),
        ("voting/wokrer", Some("voting/worker")),
        ("votng/vte", Some("voting/vote")),
        ("shop/bd", Some("shop/db")),
        ("wev", Some("web")),
        ("voting/redis", None),
        ("db", None),
    ] {
        assert_eq!(nearest(typed, names()).as_deref(), meant, "{typed}");
    }
}

/// All of it, in so small pieces; how many they were.
fn by_and_by(state: &mut State, most: usize) -> usize {
    state.begin_relearning();
    let mut pieces = 0;
    while state.is_relearning() {
        state.relearn_some(most);
        pieces += 1;
    }
    pieces
}

#[test]
fn what_is_learned_by_and_by_is_what_is_learned_at_once() {
    let (mut once, mut pieces) = (ring(), ring());
    let moved = once.relearn();
    assert_eq!(moved.len(), 20);
    assert_eq!(by_and_by(&mut pieces, 3), 7);
    assert_eq!(once.outlines, pieces.outlines);

    // What is seen in between, of one that was learned and of one that was not yet, is behind and learned the next time.
    once.all_stale();
    pieces.all_stale();
    pieces.begin_relearning();
    pieces.relearn_some(10);
    let more = [edge(1, 9, 81), edge(19, 18, 82)];
    for state in [&mut once, &mut pieces] {
        state.add_edges(&more);
    }
    while pieces.is_relearning() {
        pieces.relearn_some(10);
    }
    once.relearn();
    by_and_by(&mut pieces, 10);
    assert_eq!(once.outlines, pieces.outlines);
}

#[test]
fn what_is_put_in_force_while_all_is_learned_begins_that_anew() {
    let mut state = ring();
    state.begin_relearning();
    state.relearn_some(10);
    let mut set = state.set.clone();
    set.policies.insert(workload(0), WorkloadPolicy::empty(workload(0)));
    state.put_in_force(set.clone(), 1);
    state.all_stale();
    assert!(!state.is_relearning());
    by_and_by(&mut state, 10);
    let mut other = ring();
    other.put_in_force(set, 1);
    other.relearn();
    assert_eq!(state.outlines, other.outlines);
}

#[test]
fn a_change_that_was_not_foreseen_is_refused_where_something_is_in_enforce_by_then() {
    use super::super::decide::{History, Request, decide, must_be_confirmed};
    use crate::api::ask::Edit;

    let mut state = ring();
    let document = "apiVersion: bulkhead.dev/v1alpha1\nkind: WorkloadPolicy\nmetadata: {name: w0, namespace: shop}\n\
                    spec:\n  workload: shop/w0\n  ingress: []\n  egress: []\n";
    let edit = |confirm| {
        let document = document.to_owned();
        Request::Edit(workload(0), Edit { document, revision: 0, comment: String::new(), confirm })
    };
    let may = |state: &State, request: &Request| {
        let decided = decide(state, request, &History::default()).unwrap();
        must_be_confirmed(state, request, &decided)
    };
    may(&state, &edit(None)).unwrap();
    assert!(may(&state, &edit(Some(7))).is_err(), "a forecast of another time");
    let mut set = state.set.clone();
    let mut segment = super::super::decide::implicit("shop");
    segment.mode = policy::Mode::Enforce;
    set.segments.insert("shop".into(), segment);
    state.put_in_force(set, 7);
    assert!(may(&state, &edit(None)).is_err(), "nobody saw what it cuts");
    may(&state, &edit(Some(7))).unwrap();
}
