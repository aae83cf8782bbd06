//! The connections that live: read, judged by `policy::revoke`, ended.

use std::io;

use policy::revoke::{Living, Node, denied};
use policy::track::Entry;
use policy::{Inventory, Ruleset, Scene};

use super::Links;
use crate::observe::conntrack::{self, Held, Shown};

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
/// The table cannot be read, or something of it not changed: all else is.
pub fn revoke(scene: &Scene<'_>, ruleset: &Ruleset, inventory: &Inventory) -> io::Result<u64> {
    let links = Links::read()?.names();
    let node = Node { inventory, ruleset, links: &links };
    let (mut doomed, mut begun) = (Vec::new(), Vec::new());
    let judge = |entry: Entry, shown: Shown<'_>| {
        let living = node.living(&entry);
        if denied(scene, &living).is_some() {
            doomed.push(shown.held());
        } else if entry.stamp.is_some_and(|stamp| !stamp.begun) && living.is_begun(scene) {
            begun.push(shown.held());
        }
    };
    conntrack::dump_shown(judge, |_| {})?;
    let (ended, marked) = (end_all(&doomed), each(&begun, conntrack::let_live));
    marked.and(ended)
}

/// Ends all of these connections, whatever becomes of one. Returns how many.
///
/// # Errors
/// The first one's that could not be ended.
pub fn end_all(doomed: &[Held]) -> io::Result<u64> {
    each(doomed, conntrack::delete)
}

/// Does this to each of them, whatever becomes of one; how many it was done to.
fn each(all: &[Held], what: impl Fn(&Held) -> io::Result<bool>) -> io::Result<u64> {
    let (mut done, mut failed) = (0, Ok(()));
    for held in all {
        match what(held) {
            Ok(is_done) => done += u64::from(is_done),
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed.map(|()| done)
}
