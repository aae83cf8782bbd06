//! The connections that live: read, judged by `policy::revoke`, ended.

use std::io;

use policy::revoke::{Living, Node, denied};
use policy::track::Entry;
use policy::{Inventory, Ruleset, Scene};

use super::Links;
use crate::observe::conntrack;

/// Every connection in the calling thread's network namespace with its ends named.
///
/// # Errors
/// The table or the interfaces cannot be read.
pub fn read(ruleset: &Ruleset, inventory: &Inventory) -> io::Result<Vec<(Entry, Living)>> {
    let links = Links::read()?.names();
    let node = Node { inventory, ruleset, links: &links };
    let mut found = Vec::new();
    conntrack::dump(|entry| found.push((entry, node.living(&entry))), |_| {})?;
    Ok(found)
}

/// Ends the connections that the scene doesn't allow: what NAT made of them is one entry, so both of its ends are cut. Call it
/// after the ruleset is in the kernel, or they are back with the next packet. Returns how many.
///
/// Those that it allows, and that nobody judged before, are marked as the filter marks what it lets begin: an answer of theirs may be
/// the next packet.
///
/// # Errors
/// The table cannot be read or changed.
pub fn revoke(scene: &Scene<'_>, ruleset: &Ruleset, inventory: &Inventory) -> io::Result<u64> {
    let mut ended = 0;
    for (entry, living) in read(ruleset, inventory)? {
        if denied(scene, &living).is_some() {
            ended += u64::from(conntrack::delete(&entry)?);
        } else if entry.stamp.is_some_and(|stamp| !stamp.begun) && living.is_begun(scene) {
            conntrack::let_live(&entry)?;
        }
    }
    Ok(ended)
}
