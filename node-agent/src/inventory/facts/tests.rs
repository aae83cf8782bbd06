use super::*;

const MAC: Mac = [2, 0x42, 0xac, 0x12, 0, 2];
const OTHER: Mac = [2, 0x42, 0xac, 0x12, 0, 3];

fn network(driver: &str, bridge: Option<&str>, attached: &[(&str, Mac, &str)]) -> NetworkFact {
    let attached = attached.iter().map(|&(id, mac, address)| (id.to_owned(), at(mac, address)));
    NetworkFact {
        name: format!("{driver}-net"),
        project: None,
        driver: driver.to_owned(),
        bridge: bridge.map(str::to_owned),
        subnets: Vec::new(),
        internal: false,
        attached: attached.collect(),
    }
}

fn at(mac: Mac, address: &str) -> Attached {
    Attached { mac: Some(mac), addresses: BTreeSet::from([address.parse().unwrap()]) }
}

fn container(name: &str, mode: &str) -> ContainerFact {
    ContainerFact {
        name: name.to_owned(),
        image: String::new(),
        labels: BTreeMap::new(),
        running: true,
        network_mode: mode.to_owned(),
        details: None,
    }
}

fn facts(networks: &[(&str, NetworkFact)], containers: &[(&str, ContainerFact)]) -> Facts {
    Facts {
        networks: networks.iter().map(|(id, fact)| ((*id).to_owned(), fact.clone())).collect(),
        containers: containers.iter().map(|(id, fact)| ((*id).to_owned(), fact.clone())).collect(),
        ..Facts::default()
    }
}

/// `veth7` leads to the namespace 7.
fn namespace_of(port: &str) -> i32 {
    port.trim_start_matches("veth").parse().unwrap()
}

fn links(ports: &[(&str, Mac, &[&str])]) -> Links {
    let port = |&(name, mac, link_local): &(&str, Mac, &[&str])| {
        let peer = Peer {
            namespace: namespace_of(name),
            mac,
            link_local: link_local.iter().map(|text| text.parse().unwrap()).collect(),
            addresses: BTreeSet::new(),
        };
        (name.to_owned(), Port { bridge: "br0".to_owned(), peer: Some(peer) })
    };
    Links { bridges: BTreeMap::from([("br0".to_owned(), BTreeSet::new())]), ports: ports.iter().map(port).collect(), host: BTreeSet::new() }
}

#[test]
fn a_leg_takes_the_port_behind_which_its_mac_is() {
    let facts = facts(&[("n", network("bridge", Some("br0"), &[("c", MAC, "172.18.0.2")]))], &[("c", container("web", "n"))]);
    let (inventory, notes) = facts.join(&links(&[("veth1", OTHER, &[]), ("veth2", MAC, &[])]));
    let leg = &inventory.containers["c"].legs[0];
    assert_eq!((leg.port.as_deref(), leg.mac), (Some("veth2"), MAC));
    assert!(leg.addresses.contains(&"fe80::42:acff:fe12:2".parse::<IpAddr>().unwrap()), "{leg:?}");
    assert!(inventory.containers["c"].unmanaged.is_empty() && notes.is_empty());
}

#[test]
fn two_ports_with_one_mac_are_nobodys() {
    let facts = facts(&[("n", network("bridge", Some("br0"), &[("c", MAC, "172.18.0.2")]))], &[("c", container("web", "n"))]);
    let (inventory, _) = facts.join(&links(&[("veth1", MAC, &[]), ("veth2", MAC, &[])]));
    assert_eq!(inventory.containers["c"].legs[0].port, None);
}

#[test]
fn who_has_a_neighbours_mac_address_is_not_taken_for_it_where_their_namespaces_are_known() {
    let thief = |known| ContainerFact { details: Some(Details { namespace: known, ..Details::default() }), ..container("thief", "n") };
    let web = |known| ContainerFact { details: Some(Details { namespace: known, ..Details::default() }), ..container("web", "n") };
    let (both, own, other) = (vec![("veth1", MAC, &[][..]), ("veth2", MAC, &[])], "veth1", "veth2");
    for (what, known, ports, is) in [
        ("both are known", (Some(1), Some(2)), &both[..], Some(own)),
        ("web alone is", (Some(1), None), &both, Some(own)),
        ("web is about to start", (None, Some(2)), &both, Some(own)),
        ("and has no port yet", (None, Some(2)), &both[1..], None),
        ("its own is not there any more", (Some(1), None), &both[1..], None),
        ("nobody is known", (None, None), &both, None),
    ] {
        let attached = network("bridge", Some("br0"), &[("web", MAC, "172.18.0.2"), ("thief", OTHER, "172.18.0.3")]);
        let facts = facts(&[("n", attached)], &[("web", web(known.0)), ("thief", thief(known.1))]);
        let (inventory, _) = facts.join(&links(ports));
        assert_eq!(inventory.containers["web"].legs[0].port.as_deref(), is, "{what}");
        assert_ne!(inventory.containers["thief"].legs[0].port.as_deref(), Some(other), "{what}: its MAC address is not the engine's");
    }
}

#[test]
fn a_link_local_address_of_its_own_choice_counts_a_neighbours_does_not() {
    let facts = facts(&[("n", network("bridge", Some("br0"), &[("c", MAC, "172.18.0.2")]))], &[("c", container("web", "n"))]);
    let stolen = link_local(OTHER).to_string();
    let (inventory, _) = facts.join(&links(&[("veth1", MAC, &["fe80::1234", &stolen]), ("veth2", OTHER, &[])]));
    let held: BTreeSet<String> = inventory.containers["c"].legs[0].addresses.iter().map(ToString::to_string).collect();
    assert!(held.contains("fe80::1234") && !held.contains(&stolen), "{held:?}");
}

#[test]
fn a_link_local_address_of_its_own_choice_does_not_count_where_another_one_has_it_too() {
    let attached = network("bridge", Some("br0"), &[("thief", OTHER, "172.18.0.3"), ("web", MAC, "172.18.0.2")]);
    let facts = facts(&[("n", attached)], &[("web", container("web", "n")), ("thief", container("thief", "n"))]);
    let derived = link_local(MAC).to_string();
    for (what, ports, address, holders) in [
        ("one has it", [("veth1", MAC, &["fe80::1234"][..]), ("veth2", OTHER, &[])], "fe80::1234", &["web"][..]),
        ("both chose it", [("veth1", MAC, &["fe80::1234"]), ("veth2", OTHER, &["fe80::1234"])], "fe80::1234", &[]),
        // Of one that is about to start and has no port yet.
        ("the other has it of its MAC address", [("veth2", OTHER, &[&derived]), ("veth3", [2; 6], &[])], &derived, &["web"]),
    ] {
        let (inventory, _) = facts.join(&links(&ports));
        let has = |container: &&Container| container.legs[0].addresses.contains(&address.parse().unwrap());
        let found: Vec<&str> = inventory.containers.values().filter(has).map(|container| container.name.as_str()).collect();
        assert_eq!(found, holders, "{what}");
    }
}

#[test]
fn members_however_many_steps_away_belong_to_the_owner_of_the_namespace() {
    let mut privileged = container("third", "container:two");
    privileged.details = Some(Details { unmanaged: BTreeSet::from([Unmanaged::Privileged]), ..Details::default() });
    let containers = [
        ("one", container("first", "n")),
        ("two", container("second", "container:one")),
        ("three", privileged),
        ("four", container("fourth", "container:second")),
    ];
    let facts = facts(&[("n", network("bridge", Some("br0"), &[("one", MAC, "172.18.0.2")]))], &containers);
    let (inventory, _) = facts.join(&links(&[]));
    assert_eq!(inventory.containers.keys().collect::<Vec<_>>(), ["one"]);
    assert_eq!(inventory.containers["one"].members, ["fourth", "second", "third"]);
    assert_eq!(inventory.containers["one"].unmanaged, BTreeSet::from([Unmanaged::Privileged]));
}

#[test]
fn a_member_whose_owner_is_gone_or_a_ring_of_members_stands_for_itself() {
    let orphan = facts(&[], &[("two", container("second", "container:one"))]);
    assert_eq!(orphan.join(&Links::default()).0.containers.keys().collect::<Vec<_>>(), ["two"]);
    let ring = facts(&[], &[("a", container("a", "container:b")), ("b", container("b", "container:a"))]);
    assert_eq!(ring.join(&Links::default()).0.containers.len(), 2);
}

#[test]
fn networks_that_no_bridge_here_carries_have_their_reason_and_so_has_who_is_on_them() {
    let rows = [
        (network("macvlan", None, &[("c", MAC, "192.0.2.2")]), Unmanaged::Driver("macvlan".to_owned())),
        (network("ipvlan", None, &[("c", MAC, "192.0.2.2")]), Unmanaged::Driver("ipvlan".to_owned())),
        (network("overlay", None, &[("c", MAC, "192.0.2.2")]), Unmanaged::Driver("overlay".to_owned())),
        (network("bridge", Some("br9"), &[("c", MAC, "192.0.2.2")]), Unmanaged::NoBridge("br9".to_owned())),
    ];
    for (network, reason) in rows {
        let elsewhere = network.bridge.is_none();
        let facts = facts(&[("n", network)], &[("c", container("web", "n"))]);
        let (inventory, _) = facts.join(&links(&[]));
        assert_eq!(inventory.networks["n"].unmanaged, BTreeSet::from([reason.clone()]));
        assert_eq!(inventory.containers["c"].unmanaged, BTreeSet::from([reason]));
        assert_eq!(inventory.containers["c"].elsewhere.len(), usize::from(elsewhere));
    }
}

#[test]
fn a_container_with_one_leg_on_a_bridge_and_one_elsewhere_keeps_the_leg_and_loses_the_claim() {
    let networks =
        [("b", network("bridge", Some("br0"), &[("c", MAC, "172.18.0.2")])), ("m", network("macvlan", None, &[("c", OTHER, "192.0.2.2")]))];
    let (inventory, _) = facts(&networks, &[("c", container("web", "b"))]).join(&links(&[]));
    let found = &inventory.containers["c"];
    assert_eq!((found.legs.len(), found.elsewhere.len()), (1, 1));
    assert_eq!(found.unmanaged, BTreeSet::from([Unmanaged::Driver("macvlan".to_owned())]));
}

#[test]
fn nothing_of_an_engine_that_is_not_supported_is_claimed() {
    let mut facts = facts(&[("n", network("bridge", Some("br0"), &[("c", MAC, "172.18.0.2")]))], &[("c", container("web", "n"))]);
    facts.engine_unmanaged = Some("the engine is rootless".to_owned());
    let (inventory, _) = facts.join(&links(&[]));
    let reason = BTreeSet::from([Unmanaged::Node("the engine is rootless".to_owned())]);
    assert_eq!((&inventory.networks["n"].unmanaged, &inventory.containers["c"].unmanaged), (&reason, &reason));
}

#[test]
fn an_address_that_is_given_on_leaves_its_old_holder_at_once() {
    let mut facts = facts(
        &[("n", network("bridge", Some("br0"), &[("old", MAC, "172.18.0.2")]))],
        &[("old", container("old", "n")), ("new", container("new", "n"))],
    );
    facts.attach("n", "new", at(OTHER, "172.18.0.2"));
    let (inventory, _) = facts.join(&links(&[]));
    let holds = |id: &str| inventory.containers[id].legs[0].addresses.contains(&"172.18.0.2".parse::<IpAddr>().unwrap());
    assert!(holds("new") && !holds("old"));
}

#[test]
fn who_is_about_to_start_is_here_and_who_only_was_made_is_not() {
    let made = ContainerFact { running: false, ..container("made", "n") };
    let starting = ContainerFact { running: false, ..container("starting", "n") };
    let facts = facts(&[("n", network("bridge", Some("br0"), &[("s", MAC, "172.18.0.2")]))], &[("m", made), ("s", starting)]);
    assert_eq!(facts.join(&links(&[])).0.containers.keys().collect::<Vec<_>>(), ["s"]);
}
