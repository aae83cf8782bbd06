//! The table `arp bulkhead`: which ARP the node itself believes.
//!
//! # Why
//! ARP meets no inet hook, and in the bridge hooks the interface is the port: whether a port that nobody bound yet belongs to a
//! guarded bridge cannot be asked there. Here the interface is the bridge. Without this a new container could say, before it is
//! bound, that a neighbour's address is its own, and the node would send it what is meant for the neighbour.

use super::PINNED;
use super::build::rule;
use super::expression::Field;
use super::model::{Chain, Family, Hook, KeyType, Set, Table};

/// NF_ARP_IN (linux/netfilter_arp.h).
const INPUT: u32 = 0;
/// NF_IP_PRI_FILTER; ARP has no names of its own.
const PRIORITY: i32 = 0;

/// The table without its elements: these the caller fills in.
pub(super) fn table() -> Table {
    let guarded = Set::of(&[KeyType::InterfaceName], "bridges where an unknown address is dropped");
    let believed = rule("not let in by the guard of its port: from a port nobody bound yet")
        .within(&[Field::Iifname], "guarded")
        .mark_lacks(PINNED)
        .drop();
    // Such a frame goes past the bridge, so its interface is the port: each address in it would take the node's memory of its
    // neighbours a place, and that has a thousand.
    let around = rule("ARP to a MAC address of bridge protocols: it came in around the bridge").reserved_destination().drop();
    let input = Chain { hook: Some(Hook { number: INPUT, priority: PRIORITY }), rules: vec![believed, around] };
    Table { family: Family::Arp, sets: [("guarded".to_owned(), guarded)].into(), chains: [("input".to_owned(), input)].into() }
}
