//! The engine's user-land proxy: a client speaks to the node's published port, the node speaks to the container. Two connections,
//! one edge. Here the second finds its first.

use std::collections::{HashMap, VecDeque};

use jiff::{SignedDuration, Timestamp};

use crate::flow::FlowOutcome;
use crate::service::Service;
use crate::track::FlowId;

/// How long after a client knocked the proxy may still come through: it dials as soon as it has accepted.
const KNOCK: SignedDuration = SignedDuration::from_secs(10);

/// A container's port behind the proxy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Door {
    /// The engine's id of the container.
    pub(super) container: String,
    /// Its port.
    pub(super) service: Service,
}

/// A client of a door.
#[derive(Clone, Copy, Debug, Default)]
struct Client {
    leg: Option<FlowId>,
    /// What became of the leg.
    outcome: Option<FlowOutcome>,
}

#[derive(Debug, Default)]
pub(super) struct Doors {
    /// Clients that knocked and whose leg hasn't come yet, in order.
    knocked: HashMap<Door, VecDeque<(Timestamp, FlowId)>>,
    clients: HashMap<FlowId, Client>,
}

impl Doors {
    /// A client speaks to the published port of this door; once is enough.
    pub(super) fn knock(&mut self, door: Door, client: FlowId, at: Timestamp) {
        if let std::collections::hash_map::Entry::Vacant(new) = self.clients.entry(client) {
            new.insert(Client::default());
            self.knocked.entry(door).or_default().push_back((at, client));
        }
    }

    /// The node speaks to the container: for the client that has waited longest, if there is one.
    pub(super) fn enter(&mut self, door: &Door, leg: FlowId) -> Option<FlowId> {
        let (_, client) = self.knocked.get_mut(door)?.pop_front()?;
        self.clients.insert(client, Client { leg: Some(leg), outcome: None });
        Some(client)
    }

    /// Whether the leg of a client has come.
    pub(super) fn has_leg(&self, client: FlowId) -> bool {
        self.clients.get(&client).is_some_and(|client| client.leg.is_some())
    }

    /// What became of the leg of a client.
    pub(super) fn outcome(&self, client: FlowId) -> Option<FlowOutcome> {
        self.clients.get(&client)?.outcome
    }

    /// The leg of a client was judged.
    pub(super) fn went(&mut self, client: FlowId, outcome: FlowOutcome) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.outcome = Some(outcome);
        }
    }

    /// The client is gone.
    pub(super) fn leave(&mut self, client: FlowId) {
        // Mostly there is none, and a hash is not made for nothing.
        if !self.clients.is_empty() {
            self.clients.remove(&client);
        }
    }

    /// Forgets who knocked in vain.
    pub(super) fn forget(&mut self, now: Timestamp) {
        self.knocked.retain(|_, waiting| {
            while waiting.front().is_some_and(|(at, _)| now.duration_since(*at) >= KNOCK) {
                waiting.pop_front();
            }
            !waiting.is_empty()
        });
    }
}
