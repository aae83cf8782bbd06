//! Who held an address, and when. Kept from one inventory to the next by their difference; nothing is looked up, no clock is read.
//!
//! # Why
//! The engine gives the address of a stopped container to the next one at once (measured: a stop and a start in another order
//! swaps two addresses). A flow that is named a moment after it was captured must get the name of whoever held the address when
//! the packet was sent, so ended leases are kept for a while, and an address that passes on ends one lease as it begins the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::inventory::{Container, Inventory};
use crate::workload::{Endpoint, Workload};

/// How long an ended lease is kept: longer than the kernel keeps a finished connection (120 s in TIME_WAIT, and for UDP), so that
/// its last event still finds the name.
pub const KEPT: SignedDuration = SignedDuration::from_mins(10);

/// One address in the hands of one container, for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// The engine's id of the container.
    pub container: String,
    /// The end that its flows belong to.
    pub endpoint: Endpoint,
    /// What runs in it.
    pub workload: Workload,
    /// Interface name of the bridge; `None`: the address is on a network that is not a bridge of this node (macvlan, overlay).
    pub bridge: Option<String>,
    /// The address.
    pub address: IpAddr,
    /// When it began, included.
    pub from: Timestamp,
    /// When it ended, excluded; `None`: it goes on.
    pub until: Option<Timestamp>,
}

impl Lease {
    fn held_at(&self, at: Timestamp) -> bool {
        self.from <= at && self.until.is_none_or(|until| at < until)
    }
}

/// Where an address is: the same address on another bridge is another one.
type Place = (IpAddr, Option<Arc<str>>);

/// Between two looks for what is to be forgotten: each passes over every lease of the last minutes, with thousands of containers that
/// come and go more than are held.
const LOOK_EVERY: SignedDuration = SignedDuration::from_secs(10);

/// Who holds a place, as an inventory has it.
struct Claim<'a> {
    container: &'a str,
    endpoint: Endpoint,
    workload: &'a Workload,
}

impl Claim<'_> {
    fn is(&self, lease: &Lease) -> bool {
        self.container == lease.container && self.endpoint == lease.endpoint && *self.workload == lease.workload
    }
}

/// The leases of one node, running and lately ended.
#[derive(Clone, Debug, Default)]
pub struct LeaseBook {
    /// By place, in the order in which they began; only the last of a place may be running. Shared with the copies of the book that
    /// are about: one is made whenever a container comes or goes, and most places have not moved.
    leases: BTreeMap<Place, Arc<Vec<Lease>>>,
    /// Places where one is running.
    running: BTreeSet<Place>,
    /// When the first of those that ended did.
    first_end: Option<Timestamp>,
    looked: Option<Timestamp>,
}

/// What it says of who held what; the rest is only about finding it.
impl PartialEq for LeaseBook {
    fn eq(&self, other: &Self) -> bool {
        self.leases == other.leases
    }
}

impl Eq for LeaseBook {}

impl LeaseBook {
    /// Begins the leases that `inventory` has and the book doesn't, ends those it has no more, forgets those that ended [`KEPT`]
    /// before `at`, or a little longer where many do. `at` is when it happened: the time of the engine's event, not of its arrival.
    pub fn update(&mut self, inventory: &Inventory, at: Timestamp) {
        let mut claims = claims(inventory);
        let free: Vec<Place> = self.running.iter().filter(|place| !claims.contains_key(*place)).cloned().collect();
        claims.extend(free.into_iter().map(|place| (place, Vec::new())));
        self.pass_on(claims, at);
        self.forget(at);
    }

    /// As [`LeaseBook::update`], for the places of one container alone: `container` as it is now, `None`: it is gone. Where two
    /// containers claim one place, the next update of all decides.
    pub fn move_one(&mut self, id: &str, container: Option<&Container>, at: Timestamp) {
        let mut claims = BTreeMap::new();
        if let Some(container) = container {
            claim(&mut claims, container);
        }
        let runs = |place: &&Place| self.leases[*place].last().is_some_and(|lease| lease.container == id);
        let left: Vec<Place> = self.running.iter().filter(|place| !claims.contains_key(*place)).filter(runs).cloned().collect();
        claims.extend(left.into_iter().map(|place| (place, Vec::new())));
        self.pass_on(claims, at);
    }

    fn pass_on(&mut self, claims: BTreeMap<Place, Vec<Claim<'_>>>, at: Timestamp) {
        for (place, claims) in claims {
            let leases = self.leases.entry(place.clone()).or_default();
            if let Some(ended) = pass_on(&place, leases, claims, at) {
                self.first_end = Some(self.first_end.map_or(ended, |first| first.min(ended)));
            }
            if leases.last().is_some_and(|lease| lease.until.is_none()) {
                self.running.insert(place);
            } else {
                self.running.remove(&place);
            }
        }
    }

    fn forget(&mut self, at: Timestamp) {
        let over = |until: Timestamp| at.duration_since(until) >= KEPT;
        let lately = self.looked.is_some_and(|looked| at.duration_since(looked).abs() < LOOK_EVERY);
        if lately || !self.first_end.is_some_and(over) {
            return;
        }
        (self.looked, self.first_end) = (Some(at), None);
        self.leases.retain(|_, leases| {
            if leases.iter().any(|lease| lease.until.is_some_and(over)) {
                Arc::make_mut(leases).retain(|lease| !lease.until.is_some_and(over));
            }
            self.first_end = leases.iter().filter_map(|lease| lease.until).chain(self.first_end).min();
            !leases.is_empty()
        });
    }

    /// Who held `address` at that moment on that bridge; without a bridge: who held it anywhere, unless several did.
    pub fn find(&self, bridge: Option<&str>, address: IpAddr, at: Timestamp) -> Option<&Lease> {
        match bridge {
            Some(bridge) => held(self.places(address).find(|((_, on), _)| on.as_deref() == Some(bridge))?.1, at),
            None => {
                let mut holders = self.holders(address, at);
                let first = holders.next()?;
                holders.next().is_none().then_some(first)
            }
        }
    }

    /// Everybody who held `address` at that moment, one a bridge: several only where subnets overlap.
    pub fn holders(&self, address: IpAddr, at: Timestamp) -> impl Iterator<Item = &Lease> {
        self.places(address).filter_map(move |(_, leases)| held(leases, at))
    }

    /// Where the address is or was held: one place mostly.
    fn places(&self, address: IpAddr) -> impl Iterator<Item = (&Place, &Arc<Vec<Lease>>)> {
        self.leases.range((address, None)..).take_while(move |((found, _), _)| *found == address)
    }

    /// Every lease in the book, by place, in the order in which they began.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values().flat_map(|leases| leases.iter())
    }
}

fn held(leases: &[Lease], at: Timestamp) -> Option<&Lease> {
    // The latest first: where two touch, the moment belongs to the newer one.
    leases.iter().rev().find(|lease| lease.held_at(at))
}

fn claims(inventory: &Inventory) -> BTreeMap<Place, Vec<Claim<'_>>> {
    let mut claims = BTreeMap::new();
    for container in inventory.containers.values() {
        claim(&mut claims, container);
    }
    claims
}

fn claim<'a>(claims: &mut BTreeMap<Place, Vec<Claim<'a>>>, container: &'a Container) {
    let mut claim = |place, endpoint| {
        claims.entry(place).or_default().push(Claim { container: &container.id, endpoint, workload: &container.workload });
    };
    for leg in &container.legs {
        for &address in &leg.addresses {
            claim((address, Some(Arc::from(leg.bridge.as_str()))), container.endpoint());
        }
    }
    for &address in container.elsewhere.iter().flat_map(|attachment| &attachment.addresses) {
        claim((address, None), Endpoint::Unmanaged { name: container.name.clone(), address });
    }
}

/// Ends and begins the leases of one place; when one ended, if one did. A container that never held it wins over the one that does:
/// the engine gives an address away only after it has taken it back, so the old holder is one whose end we have not been told yet.
fn pass_on(place: &Place, leases: &mut Arc<Vec<Lease>>, claims: Vec<Claim<'_>>, at: Timestamp) -> Option<Timestamp> {
    let newcomer = claims.iter().position(|claim| leases.iter().all(|lease| lease.container != claim.container));
    let running = leases.last().filter(|lease| lease.until.is_none());
    let next = match (newcomer, running) {
        (Some(newcomer), _) => Some(newcomer),
        (None, Some(running)) if claims.iter().any(|claim| claim.is(running)) => return None,
        // The same container under another name, before anybody else who once was here.
        (None, Some(running)) => claims.iter().position(|claim| claim.container == running.container).or((!claims.is_empty()).then_some(0)),
        (None, None) => (!claims.is_empty()).then_some(0),
    };
    if running.is_none() && next.is_none() {
        return None;
    }
    let leases = Arc::make_mut(leases);
    let mut ended = None;
    if let Some(running) = leases.last_mut().filter(|lease| lease.until.is_none()) {
        // An event that comes out of order can't end a lease before it began.
        ended = Some(at.max(running.from));
        running.until = ended;
    }
    if let Some(Claim { container, endpoint, workload }) = next.and_then(|next| claims.into_iter().nth(next)) {
        let (address, bridge) = (place.0, place.1.as_deref().map(str::to_owned));
        let from = leases.last().and_then(|lease| lease.until).map_or(at, |until| at.max(until));
        leases.push(Lease { container: container.to_owned(), endpoint, workload: workload.clone(), bridge, address, from, until: None });
    }
    ended
}

#[cfg(test)]
mod tests;
