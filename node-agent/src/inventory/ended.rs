//! Whose port has gone while the engine still says that they are there: what it says is of a life that is over.
//!
//! # Why
//! The engine tells of the end of a container after the kernel, and a container that starts in its place (or the same one again) can be
//! there before: with its address, on Docker 20.10 with its MAC address too, which is made of that, and with the number that its
//! namespace had here, which the kernel gives again. So a port is nobody's by what was said of such a life, and the kernel's word of a
//! new port counts (see [`ahead`](super::ahead)) until the engine's comes.
//!
//! The engine takes the container's end back to the host before it removes both, so a port has gone with what was behind it. It does not
//! go by what a container does to its own end, but by taking that away; none can be had for it from within. One that comes back, since it
//! was taken off its bridge for a moment, is the same life's.

use std::collections::BTreeMap;

use jiff::Timestamp;
use policy::Inventory;

use super::facts::{Links, Mac, NetworkFact};

/// Lives that are over, by network and container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended(BTreeMap<(String, String), End>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct End {
    /// That was its.
    port: String,
    mac: Mac,
    at: Timestamp,
}

impl Ended {
    /// Looks at whose ports have gone since the inventory was joined, and which of those are back.
    pub(super) fn look(&mut self, inventory: &Inventory, links: &Links, at: Timestamp) {
        let leads = |port: &String| links.ports.get(port).is_some_and(|port| port.peer.is_some());
        self.0.retain(|_, end| !leads(&end.port));
        for container in inventory.containers.values() {
            for leg in &container.legs {
                let Some(port) = leg.port.as_ref().filter(|port| !leads(port)) else { continue };
                let end = End { port: port.clone(), mac: leg.mac, at };
                self.0.entry((leg.network.clone(), container.id.clone())).or_insert(end);
            }
        }
    }

    /// This port has gone before the engine told of whose it is: what it says of that may be older.
    pub(super) fn untold(&mut self, network: &str, container: &str, port: String, mac: Mac, at: Timestamp) {
        self.0.insert((network.to_owned(), container.to_owned()), End { port, mac, at });
    }

    /// Whether the engine, asked at this time, said this of a life that has ended since.
    pub(super) fn is_of(&self, network: &str, container: &str, mac: Option<Mac>, asked: Timestamp) -> bool {
        let end = self.0.get(&(network.to_owned(), container.to_owned()));
        end.is_some_and(|end| end.at > asked && mac == Some(end.mac))
    }

    /// Whether somebody whose life here is over had this MAC address.
    pub(super) fn had(&self, mac: Mac) -> bool {
        self.0.values().any(|end| end.mac == mac)
    }

    /// Whether the last that was said of this place is of a life that is over.
    pub(crate) fn has(&self, network: &str, container: &str) -> bool {
        // Mostly there is none, and this is asked for each place.
        !self.0.is_empty() && self.0.contains_key(&(network.to_owned(), container.to_owned()))
    }

    /// Something newer was said of this place.
    pub(crate) fn forget(&mut self, network: &str, container: &str) {
        self.0.remove(&(network.to_owned(), container.to_owned()));
    }

    /// The engine was asked for everything at this time. That is newer than what ended before; of what ended since only what it says
    /// just as before may be of the life that is over, and then an event says what came of it.
    pub(super) fn listed(&mut self, networks: &BTreeMap<String, NetworkFact>, asked: Timestamp) {
        let mac = |network: &str, container: &str| networks.get(network)?.attached.get(container)?.mac;
        self.0.retain(|(network, container), end| end.at >= asked && mac(network, container) == Some(end.mac));
    }
}

#[cfg(test)]
mod tests;
