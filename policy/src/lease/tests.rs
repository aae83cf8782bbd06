use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::inventory::{Attachment, Container, Leg};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn container(id: &str, legs: &[(&str, &str)]) -> Container {
    let leg = |&(bridge, held): &(&str, &str)| Leg {
        network: format!("net-{bridge}"),
        bridge: bridge.to_owned(),
        port: None,
        mac: [2, 0, 0, 0, 0, 1],
        addresses: BTreeSet::from([address(held)]),
    };
    Container {
        id: id.to_owned(),
        name: id.to_owned(),
        workload: Workload::new("shop", id),
        one_off: false,
        engine_named: false,
        image: String::new(),
        labels: BTreeMap::new(),
        pid: None,
        legs: legs.iter().map(leg).collect(),
        elsewhere: Vec::new(),
        published: Vec::new(),
        resolvers: Vec::new(),
        members: Vec::new(),
        unmanaged: BTreeSet::new(),
        raw: false,
    }
}

fn inventory(containers: &[Container]) -> Inventory {
    Inventory { containers: containers.iter().map(|c| (c.id.clone(), c.clone())).collect(), ..Inventory::default() }
}

fn holder(book: &LeaseBook, bridge: Option<&str>, held: &str, second: i64) -> Option<String> {
    book.find(bridge, address(held), at(second)).map(|lease| lease.container.clone())
}

#[test]
fn a_reused_address_is_not_blamed_on_the_old_container() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("old", &[("br0", "172.18.0.2")])]), at(0));
    book.update(&inventory(&[]), at(10));
    book.update(&inventory(&[container("new", &[("br0", "172.18.0.2")])]), at(12));

    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 9).as_deref(), Some("old"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 10), None, "the end is excluded");
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 11), None, "nobody held it");
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 12).as_deref(), Some("new"));
}

#[test]
fn two_containers_that_swap_addresses_keep_their_names_on_either_side_of_the_swap() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("a", &[("br0", "172.18.0.2")]), container("b", &[("br0", "172.18.0.3")])]), at(0));
    book.update(&inventory(&[container("a", &[("br0", "172.18.0.3")]), container("b", &[("br0", "172.18.0.2")])]), at(5));

    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 4).as_deref(), Some("a"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 5).as_deref(), Some("b"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.3", 4).as_deref(), Some("b"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.3", 5).as_deref(), Some("a"));
}

#[test]
fn a_newcomer_takes_the_address_though_the_old_holder_was_not_seen_to_go() {
    let mut book = LeaseBook::default();
    let (old, new) = (container("old", &[("br0", "172.18.0.2")]), container("new", &[("br0", "172.18.0.2")]));
    book.update(&inventory(std::slice::from_ref(&old)), at(0));
    book.update(&inventory(&[old.clone(), new.clone()]), at(10));
    book.update(&inventory(&[old, new]), at(11));

    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 9).as_deref(), Some("old"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 20).as_deref(), Some("new"));
}

#[test]
fn an_ended_lease_is_found_for_some_minutes_and_then_forgotten() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("job", &[("br0", "172.18.0.2")])]), at(0));
    book.update(&inventory(&[]), at(2));
    book.update(&inventory(&[]), at(2 + KEPT.as_secs() - 1));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 1).as_deref(), Some("job"));
    book.update(&inventory(&[]), at(2 + KEPT.as_secs()));
    assert_eq!(book, LeaseBook::default());
}

#[test]
fn one_address_on_two_bridges_is_two_leases_and_ambiguous_without_the_bridge() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("a", &[("br0", "10.0.0.2")]), container("b", &[("br1", "10.0.0.2")])]), at(0));

    assert_eq!(holder(&book, Some("br0"), "10.0.0.2", 1).as_deref(), Some("a"));
    assert_eq!(holder(&book, Some("br1"), "10.0.0.2", 1).as_deref(), Some("b"));
    assert_eq!(holder(&book, Some("br2"), "10.0.0.2", 1), None, "an address counts only on its own bridge");
    assert_eq!(holder(&book, None, "10.0.0.2", 1), None);
    assert_eq!(book.holders(address("10.0.0.2"), at(1)).count(), 2);
}

#[test]
fn a_renamed_container_has_its_old_name_before_and_its_new_one_after() {
    let mut book = LeaseBook::default();
    let before = container("c1", &[("br0", "172.18.0.2")]);
    let after = Container { workload: Workload::new("", "renamed"), ..before.clone() };
    book.update(&inventory(&[before]), at(0));
    book.update(&inventory(&[after]), at(5));

    let named = |second| book.find(Some("br0"), address("172.18.0.2"), at(second)).unwrap().workload.to_string();
    assert_eq!((named(4), named(5)), ("shop/c1".to_owned(), "renamed".to_owned()));
}

#[test]
fn a_one_off_run_leases_as_a_run() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[Container { one_off: true, ..container("web", &[("br0", "172.18.0.2")]) }]), at(0));
    let lease = book.find(None, address("172.18.0.2"), at(0)).unwrap();
    assert_eq!(lease.endpoint, Endpoint::Run(Workload::new("shop", "web")));
}

#[test]
fn an_address_off_our_bridges_is_named_as_unmanaged_and_never_on_a_bridge() {
    let mut book = LeaseBook::default();
    let mut job = container("job", &[]);
    job.elsewhere = vec![Attachment { network: "mv".to_owned(), addresses: BTreeSet::from([address("192.0.2.9")]) }];
    book.update(&inventory(&[job]), at(0));

    let lease = book.find(None, address("192.0.2.9"), at(1)).unwrap();
    assert_eq!(lease.endpoint, Endpoint::Unmanaged { name: "job".to_owned(), address: address("192.0.2.9") });
    assert_eq!(holder(&book, Some("br0"), "192.0.2.9", 1), None);
}

#[test]
fn the_same_inventory_again_changes_nothing() {
    let here = inventory(&[container("a", &[("br0", "172.18.0.2")])]);
    let mut book = LeaseBook::default();
    book.update(&here, at(0));
    let before = book.clone();
    book.update(&here, at(5));
    assert_eq!(book, before);
}

#[test]
fn an_end_told_out_of_order_never_precedes_the_beginning() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("a", &[("br0", "172.18.0.2")])]), at(10));
    book.update(&inventory(&[]), at(9));
    book.update(&inventory(&[container("b", &[("br0", "172.18.0.2")])]), at(8));

    assert!(book.leases().all(|lease| lease.until.is_none_or(|until| lease.from <= until)));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 10).as_deref(), Some("b"));
}

#[test]
fn one_container_that_moves_leaves_the_book_as_an_update_of_all_would() {
    let (web, db) = (container("web", &[("br0", "172.18.0.2")]), container("db", &[("br0", "172.18.0.3")]));
    let moved = container("web", &[("br0", "172.18.0.4")]);
    let mut book = LeaseBook::default();
    book.update(&inventory(&[web.clone(), db.clone()]), at(0));
    let (mut whole, mut one) = (book.clone(), book.clone());
    for (second, now) in [(10, Some(&moved)), (20, None), (30, Some(&web)), (40, Some(&moved))] {
        let all: Vec<Container> = now.cloned().into_iter().chain([db.clone()]).collect();
        whole.update(&inventory(&all), at(second));
        one.move_one("web", now, at(second));
        assert_eq!(one, whole, "at {second}");
    }
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 50).as_deref(), Some("web"), "a copy made before stays what it was");
}

#[test]
fn who_takes_an_address_over_ends_the_lease_of_the_one_before_though_only_he_is_told_of() {
    let mut book = LeaseBook::default();
    book.update(&inventory(&[container("old", &[("br0", "172.18.0.2")])]), at(0));
    book.move_one("new", Some(&container("new", &[("br0", "172.18.0.2")])), at(5));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 4).as_deref(), Some("old"));
    assert_eq!(holder(&book, Some("br0"), "172.18.0.2", 5).as_deref(), Some("new"));
}
