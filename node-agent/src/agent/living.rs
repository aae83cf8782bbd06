//! Connections that live: those of addresses that were given back, and how full the table is.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use policy::Inventory;
use policy::track::Entry;

use crate::enforce;
use crate::observe::conntrack;

/// Addresses, each with the container that held it, that the newer inventory has no longer or has in other hands.
pub(super) fn given_back(old: &Inventory, new: &Inventory) -> BTreeSet<IpAddr> {
    let held = |inventory: &Inventory| -> BTreeSet<(IpAddr, String, String)> {
        let containers = inventory.containers.values();
        let legs = containers.flat_map(|c| c.legs.iter().map(move |leg| (c, leg)));
        legs.flat_map(|(c, leg)| leg.addresses.iter().map(move |&address| (address, leg.bridge.clone(), c.id.clone()))).collect()
    };
    held(old).difference(&held(new)).map(|(address, _, _)| *address).collect()
}

/// Ends every connection that one of these addresses is an end of; how many.
///
/// # Errors
/// The table cannot be read, or one of them not ended: the others are.
pub(super) fn forget(addresses: &BTreeSet<IpAddr>) -> io::Result<u64> {
    let touches = |entry: &Entry| {
        let ends = [entry.original.source, entry.original.destination, entry.reply.source, entry.reply.destination];
        ends.iter().any(|end| addresses.contains(end))
    };
    let mut doomed = Vec::new();
    conntrack::dump_shown(
        |entry, shown| {
            if touches(&entry) {
                doomed.push(shown.held());
            }
        },
        |_| {},
    )?;
    enforce::living::end_all(&doomed)
}
