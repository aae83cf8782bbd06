//! What each part of a ruleset is in the kernel: elements of named sets. The same for a ruleset that is written whole and for one thing
//! that came or went.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use policy::evaluate::Standing;
use policy::policy_set::Direction;
use policy::ruleset::{Door, Pin, Remote, Spot, Tuples, Watch};

use super::anew;
use super::elements::{ip_of, octets, spot_key};
use super::expression::Ip;
use super::filter::{door_verdict, is_strict, side_verdict};
use super::guard::{self, MACS};
use super::key::{Draft, Key};
use super::links::Links;
use super::model::{Family, Value, interface_name, part};

/// An element in its set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) family: Family,
    pub(super) set: &'static str,
    pub(super) key: Key,
    pub(super) value: Value,
}

fn entry(family: Family, set: &'static str, key: impl AsRef<[u8]>) -> Entry {
    Entry { family, set, key: Key::exact(key.as_ref()), value: Value::Nothing }
}

fn inet(set: &'static str, key: impl AsRef<[u8]>) -> Entry {
    entry(Family::Inet, set, key)
}

/// The set of an address's IP version.
fn of(address: IpAddr, four: &'static str, six: &'static str) -> &'static str {
    match ip_of(address) {
        Ip::V4 => four,
        Ip::V6 => six,
    }
}

fn key<const N: usize>(parts: [&[u8]; N]) -> Draft {
    let mut key = Draft::new();
    parts.into_iter().for_each(|bytes| part(&mut key, bytes));
    key
}

/// A bridge of the engine.
pub(super) fn bridge(name: &str) -> Entry {
    inet("bridges", interface_name(name))
}

/// A bridge whose packets are looked at.
pub(super) fn watch(name: &str, watch: Watch, links: &Links) -> Vec<Entry> {
    let text = interface_name(name);
    let mut entries = vec![inet("watched", text.clone())];
    if watch.guarded {
        entries.extend([inet("guarded", text.clone()), entry(Family::Arp, "guarded", text)]);
    }
    let Some(index) = links.index(name).map(u32::to_ne_bytes) else { return entries };
    match watch.tuples {
        Tuples::Own if watch.guarded => entries.push(inet("guarded_index", key([&index]))),
        Tuples::Own | Tuples::Beside => {}
        Tuples::Shared => entries.extend([inet("twins", key([&index])), inet("homes", key([&index, &index]))]),
    }
    entries
}

/// How a spot is treated; nothing where its bridge is not there.
pub(super) fn side(spot: &Spot, standing: Standing, links: &Links) -> Vec<Entry> {
    let Some(key) = spot_key(spot, links) else { return Vec::new() };
    let in_set = |four, six| inet(of(spot.address, four, six), &key);
    let sender = Entry { value: Value::Verdict(side_verdict(Direction::Egress, standing)), ..in_set("senders4", "senders6") };
    let receiver = Entry { value: Value::Verdict(side_verdict(Direction::Ingress, standing)), ..in_set("receivers4", "receivers6") };
    let mut entries = vec![sender, receiver];
    if is_strict(standing) {
        entries.push(in_set("strict4", "strict6"));
    }
    entries
}

fn door_key(door: &Door) -> Draft {
    key([&octets(door.address), &[door.protocol.number()], &door.port.to_be_bytes()])
}

/// How what is not allowed at a door is treated.
pub(super) fn door(door: &Door, standing: Standing) -> Option<Entry> {
    Some(Entry { value: Value::Verdict(door_verdict(standing)?), ..inet(of(door.address, "doors4", "doors6"), door_key(door)) })
}

/// How the node's own programs are treated at a container's published port.
pub(super) fn inward(door: &Door, standing: Standing) -> Entry {
    // No pair is found for loopback: what these chains end with is what happens.
    let verdict = Value::Verdict(side_verdict(Direction::Ingress, standing));
    Entry { value: verdict, ..inet(of(door.address, "inward4", "inward6"), door_key(door)) }
}

/// A port that hears more than the node's addresses. Several doors may be one element.
pub(super) fn ajar(door: &Door) -> Entry {
    inet(of(door.address, "ajar4", "ajar6"), key([&[door.protocol.number()], &door.port.to_be_bytes()]))
}

/// An address of the node.
pub(super) fn node(address: IpAddr) -> Entry {
    inet(of(address, "node4", "node6"), key([&octets(address)]))
}

/// Who may send ICMP errors to whom. Several pairs are one element.
pub(super) fn talk(local: &Spot, remote: &Remote, links: &Links) -> Option<Entry> {
    let mut key = spot_key(local, links)?;
    match remote {
        Remote::Spot(spot) if ip_of(spot.address) == ip_of(local.address) => {
            key.extend_from_slice(&spot_key(spot, links)?);
            Some(inet(of(local.address, "talk4", "talk6"), key))
        }
        Remote::Spot(_) => None,
        Remote::Outside(_) => Some(inet(of(local.address, "talk_outside4", "talk_outside6"), key)),
    }
}

/// A bridge that is there.
pub(super) fn known(name: &str) -> Entry {
    inet("known", interface_name(name))
}

/// A port of a bridge that is not guarded.
pub(super) fn bystander(port: &str) -> Entry {
    entry(Family::Bridge, "bystanders", interface_name(port))
}

/// Subnets of guarded networks, all of them: what is side by side is one range.
pub(super) fn subnets(subnets: &BTreeSet<IpNet>) -> Vec<Entry> {
    let mut entries = Vec::new();
    for (ip, key) in anew::ranges(subnets) {
        let set = match ip {
            Ip::V4 => "subnets4",
            Ip::V6 => "subnets6",
        };
        let both = [Family::Inet, Family::Bridge];
        entries.extend(both.map(|family| Entry { family, set, key: key.clone(), value: Value::Nothing }));
    }
    if !subnets.is_empty() {
        entries.extend(anew::TAGS.map(|tag| entry(Family::Bridge, "tags", key([&tag]))));
    }
    entries
}

/// What a port may send from; nothing where it is not there.
pub(super) fn pin(port: &str, pin: &Pin, links: &Links) -> Vec<Entry> {
    let Some(index) = links.index(port).map(u32::to_ne_bytes) else { return Vec::new() };
    let own = |set, address: &[u8]| entry(Family::Bridge, set, key([&index, &pin.mac, address]));
    let mut entries = vec![
        entry(Family::Bridge, "ports", key([&index])),
        entry(Family::Bridge, MACS, key([&interface_name(port), &pin.mac])),
        // The kernel in the container makes this one itself; the filter knows it only if it is bound, so it carries
        // neighbour discovery and no more.
        own("own6", &guard::link_local(pin.mac).octets()),
    ];
    entries.extend(pin.addresses.iter().map(|&address| own(of(address, "own4", "own6"), &octets(address))));
    entries
}
