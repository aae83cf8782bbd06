//! Flows that wait for names, in the order in which they began.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use smallvec::SmallVec;

use super::Said;
use crate::track::{FlowId, Wire};

/// A flow without names so far.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) wire: Wire,
    /// When it was first tried to name it.
    pub(super) tried: Option<Timestamp>,
    pub(super) denied: bool,
    pub(super) forged: bool,
    pub(super) said: SmallVec<[Said; 1]>,
    pub(super) closed: bool,
}

impl Waiting {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire, tried: None, denied: false, forged: false, said: SmallVec::new(), closed: false }
    }
}

/// All that wait. Most wait once and for the same time, so they stand in line; few are held back.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Not tried yet, by number.
    line: VecDeque<(FlowId, Waiting)>,
    /// Tried in vain, or out of the order of numbers (denials).
    held: BTreeMap<FlowId, Waiting>,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.line.len() + self.held.len()
    }

    pub(super) fn push(&mut self, flow: FlowId, waiting: Waiting) {
        if waiting.denied || self.line.back().is_some_and(|(last, _)| *last >= flow) {
            self.held.insert(flow, waiting);
        } else {
            self.line.push_back((flow, waiting));
        }
    }

    /// Puts one back that was ripe and still has no names.
    pub(super) fn hold(&mut self, flow: FlowId, waiting: Waiting) {
        self.held.insert(flow, waiting);
    }

    pub(super) fn get_mut(&mut self, flow: FlowId) -> Option<&mut Waiting> {
        let first = self.line.front().map_or(FlowId::MAX, |(first, _)| *first);
        if flow >= first {
            // Numbers are given out one after the other: mostly it stands where its number says.
            let guess = usize::try_from(flow - first).unwrap_or(usize::MAX);
            let stands = |at: &usize| self.line.get(*at).is_some_and(|(found, _)| *found == flow);
            let at = Some(guess).filter(stands).or_else(|| self.line.binary_search_by_key(&flow, |(found, _)| *found).ok());
            if let Some(at) = at {
                return self.line.get_mut(at).map(|(_, waiting)| waiting);
            }
        }
        self.held.get_mut(&flow)
    }

    /// Takes out who was held back and has waited long enough, the oldest first.
    pub(super) fn take_held(&mut self, ripe: impl Fn(&Waiting) -> bool) -> Vec<(FlowId, Waiting)> {
        self.held.extract_if(.., |_, waiting| ripe(waiting)).collect()
    }

    /// How many at the head of the line have waited long enough. Whoever stands behind one that isn't ripe came later; one that is
    /// older than the agent may lose a turn by that.
    pub(super) fn ripe_in_line(&self, ripe: impl Fn(&Waiting) -> bool) -> usize {
        self.line.iter().position(|(_, waiting)| !ripe(waiting)).unwrap_or(self.line.len())
    }

    /// So many at the head of the line.
    pub(super) fn line(&self, many: usize) -> impl Iterator<Item = &(FlowId, Waiting)> {
        self.line.iter().take(many)
    }

    /// Takes out the first in line.
    pub(super) fn next_in_line(&mut self) -> Option<(FlowId, Waiting)> {
        self.line.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::Road;
    use crate::flow::Tuple;
    use crate::service::{Protocol, Service};
    use crate::track::Place;

    fn waiting(second: i64) -> Waiting {
        let address = "10.0.0.1".parse().unwrap();
        let tuple = Tuple { source: address, destination: address, protocol: Protocol::Tcp, source_port: 1, destination_port: 80 };
        Waiting::new(Wire {
            tuple,
            server: address,
            service: Service::tcp(80),
            road: Road::Direct,
            place: Place::default(),
            time: Timestamp::from_second(second).unwrap(),
            pre_existing: false,
            direction_sure: true,
        })
    }

    #[test]
    fn who_waits_is_found_by_number_wherever_it_stands() {
        let mut queue = Queue::default();
        for flow in [3, 4, 9, 11] {
            queue.push(flow, waiting(1));
        }
        queue.push(7, waiting(1));
        queue.push(FlowId::MAX - 1, Waiting { denied: true, ..waiting(1) });
        queue.push(12, waiting(1));
        for flow in [3, 4, 7, 9, 11, 12, FlowId::MAX - 1] {
            assert!(queue.get_mut(flow).is_some(), "{flow}");
        }
        for flow in [0, 2, 5, 10, 13, FlowId::MAX] {
            assert!(queue.get_mut(flow).is_none(), "{flow}");
        }
        assert_eq!(queue.len(), 7);
    }

    fn take(queue: &mut Queue, ripe: &dyn Fn(&Waiting) -> bool) -> Vec<FlowId> {
        let mut taken = queue.take_held(ripe);
        taken.extend((0..queue.ripe_in_line(ripe)).filter_map(|_| queue.next_in_line()));
        taken.into_iter().map(|(flow, _)| flow).collect()
    }

    #[test]
    fn who_is_ripe_is_taken_and_who_is_not_goes_on_waiting() {
        let mut queue = Queue::default();
        for (flow, second) in [(1, 10), (2, 10), (3, 20), (4, 10)] {
            queue.push(flow, waiting(second));
        }
        let ripe = |waiting: &Waiting| waiting.wire.time.as_second() <= 10;
        assert_eq!(take(&mut queue, &ripe), [1, 2]);
        queue.hold(2, waiting(10));
        assert_eq!(take(&mut queue, &ripe), [2], "held back, it is taken before its turn in line");
        assert_eq!(take(&mut queue, &|_| true), [3, 4]);
        assert_eq!(queue.len(), 0);
    }
}
