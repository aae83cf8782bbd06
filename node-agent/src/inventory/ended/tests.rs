use std::collections::BTreeSet;

use super::super::facts::{Attached, ContainerFact, Details, Facts, Peer, Port};
use super::*;

const MAC: Mac = [2, 0x42, 0xac, 0x12, 0, 2];
const OTHER: Mac = [2, 0x42, 0xac, 0x12, 0, 3];

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

/// One port of `br0` and what it leads to.
fn links(port: &str, namespace: i32, mac: Mac) -> Links {
    let peer = Peer { namespace, mac, link_local: BTreeSet::new(), addresses: BTreeSet::new() };
    Links {
        bridges: [("br0".to_owned(), BTreeSet::new())].into(),
        ports: [(port.to_owned(), Port { bridge: "br0".to_owned(), peer: Some(peer) })].into(),
        ..Links::default()
    }
}

fn attached(mac: Mac) -> Attached {
    Attached { mac: Some(mac), addresses: ["172.18.0.2".parse().unwrap()].into() }
}

fn networks(container: &str, mac: Mac) -> BTreeMap<String, NetworkFact> {
    let fact = NetworkFact {
        name: "front".to_owned(),
        project: None,
        driver: "bridge".to_owned(),
        bridge: Some("br0".to_owned()),
        subnets: Vec::new(),
        internal: false,
        attached: [(container.to_owned(), attached(mac))].into(),
    };
    [("n".to_owned(), fact)].into()
}

/// `web` runs in the namespace 7, behind veth7, by the engine's word.
fn facts() -> Facts {
    let details = Details { namespace: Some(7), pid: Some(70), ..Details::default() };
    let container = |name: &str, details| {
        let fact = ContainerFact {
            name: name.to_owned(),
            image: String::new(),
            labels: BTreeMap::new(),
            running: true,
            network_mode: "front".to_owned(),
            details,
        };
        (name.to_owned(), fact)
    };
    let containers = [container("web", Some(details)), container("db", None)].into();
    Facts { networks: networks("web", MAC), containers, ..Facts::default() }
}

fn port(facts: &Facts, links: &Links, container: &str) -> Option<String> {
    facts.join(links).0.containers[container].legs.first()?.port.clone()
}

/// Its port has gone.
fn over() -> Facts {
    let mut facts = facts();
    let (inventory, _) = facts.join(&links("veth7", 7, MAC));
    facts.ended.look(&inventory, &links("veth7", 7, MAC), at(0));
    assert!(!facts.ended.has("n", "web"), "its port is there");
    facts.ended.look(&inventory, &Links::default(), at(0));
    assert!(facts.ended.has("n", "web") && !facts.ended.has("n", "db") && !facts.ended.has("m", "web"));
    facts
}

#[test]
fn nobody_is_taken_for_one_whose_port_has_gone_though_everything_is_the_same() {
    let facts = over();
    assert_eq!(port(&facts, &links("veth9", 7, MAC), "web"), None);
    let mut unseen = self::facts();
    unseen.ended = Ended::default();
    assert_eq!(port(&unseen, &links("veth9", 7, MAC), "web").as_deref(), Some("veth9"), "as it would be");
}

#[test]
fn the_port_has_gone_with_what_was_behind_it() {
    let mut facts = facts();
    let (inventory, _) = facts.join(&links("veth7", 7, MAC));
    let mut back = links("veth7", 7, MAC);
    back.ports.values_mut().for_each(|port| port.peer = None);
    facts.ended.look(&inventory, &back, at(0));
    assert!(facts.ended.has("n", "web"));
}

#[test]
fn its_own_port_that_comes_back_is_its() {
    let mut facts = over();
    let (inventory, _) = facts.join(&Links::default());
    facts.ended.look(&inventory, &links("veth7", 7, MAC), at(1));
    assert_eq!(port(&facts, &links("veth7", 7, MAC), "web").as_deref(), Some("veth7"));
}

#[test]
fn what_the_engine_tells_next_counts() {
    let mut facts = over();
    facts.attach("n", "web", attached(MAC));
    assert_eq!(port(&facts, &links("veth9", 7, MAC), "web").as_deref(), Some("veth9"));
    let mut facts = over();
    facts.detach("n", "web");
    assert_eq!(facts.ended, Ended::default());
    let mut facts = over();
    facts.forget("web");
    assert_eq!(facts.ended, Ended::default());
}

#[test]
fn where_it_is_found_by_the_kernel_the_process_of_its_life_before_is_forgotten() {
    let mut facts = over();
    facts.attach("n", "web", attached(OTHER));
    facts.found_in("web", 9);
    assert_eq!(port(&facts, &links("veth9", 9, OTHER), "web").as_deref(), Some("veth9"));
    assert_eq!(facts.containers["web"].details.as_ref().unwrap().pid, None);
    // On another network of the same life.
    facts.inspected("web", Details { namespace: Some(9), pid: Some(90), ..Details::default() });
    facts.found_in("web", 9);
    assert_eq!(facts.containers["web"].details.as_ref().unwrap().pid, Some(90));
}

#[test]
fn a_listing_is_newer_than_what_ended_before_it() {
    for (what, networks, asked, stays) in [
        ("asked before, and it says the same", networks("web", MAC), at(-1), true),
        ("asked before, and it says something new", networks("web", OTHER), at(-1), false),
        ("asked before, and it is on no network by then", networks("db", MAC), at(-1), false),
        ("asked after", networks("web", MAC), at(1), false),
    ] {
        let mut facts = over();
        facts.ended.listed(&networks, asked);
        assert_eq!(facts.ended.has("n", "web"), stays, "{what}");
    }
}

#[test]
fn the_address_that_the_kernel_makes_of_a_mac_address_is_nobodys_whose_life_is_over() {
    let addresses = |facts: &Facts| facts.join(&links("veth9", 7, MAC)).0.containers["web"].legs[0].addresses.clone();
    let made = std::net::IpAddr::V6("fe80::42:acff:fe12:2".parse().unwrap());
    assert!(addresses(&facts()).contains(&made));
    assert_eq!(addresses(&over()), attached(MAC).addresses);
}
