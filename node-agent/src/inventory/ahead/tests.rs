use super::super::facts::{ContainerFact, Details, Mac, NetworkFact};
use super::*;

const MAC: Mac = [2, 0x42, 0xac, 0x12, 0, 2];
const OTHER: Mac = [2, 0x42, 0xac, 0x12, 0, 3];

fn network(attached: &[(&str, Mac, &str)]) -> NetworkFact {
    let attached = attached.iter().map(|&(id, mac, address)| {
        let addresses = BTreeSet::from([address.parse().unwrap()]);
        (id.to_owned(), Attached { mac: Some(mac), addresses })
    });
    NetworkFact {
        name: "front".to_owned(),
        project: None,
        driver: "bridge".to_owned(),
        bridge: Some("br0".to_owned()),
        subnets: vec!["172.18.0.0/16".parse().unwrap(), "2001:db8:18::/64".parse().unwrap()],
        internal: false,
        attached: attached.collect(),
    }
}

fn container(name: &str, mode: &str) -> (String, ContainerFact) {
    let fact = ContainerFact {
        name: name.to_owned(),
        image: String::new(),
        labels: BTreeMap::new(),
        running: false,
        network_mode: mode.to_owned(),
        details: None,
    };
    (name.to_owned(), fact)
}

fn facts(attached: &[(&str, Mac, &str)]) -> Facts {
    let containers = [container("web", "front"), container("db", "front"), container("sidecar", "container:web")];
    Facts { networks: [("n".to_owned(), network(attached))].into(), containers: containers.into(), ..Facts::default() }
}

/// One port, which leads to the namespace 7 and the host has 172.18.0.1.
fn links(mac: Mac, addresses: &[&str]) -> Links {
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    let peer = Peer { namespace: 7, mac, link_local: BTreeSet::new(), addresses };
    Links {
        bridges: [("br0".to_owned(), BTreeSet::new())].into(),
        ports: [("veth7".to_owned(), Port { bridge: "br0".to_owned(), peer: Some(peer) })].into(),
        host: ["172.18.0.1".parse().unwrap()].into(),
    }
}

fn inside(containers: &[&str]) -> BTreeMap<i32, BTreeSet<String>> {
    [(7, containers.iter().map(|&name| name.to_owned()).collect())].into()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

/// What the namespace 7 has been taken for, and with which addresses.
fn look(facts: &mut Facts, ahead: &mut Ahead, links: &Links, found: &[&str]) -> Vec<String> {
    let candidates = candidates(facts, links.ports.iter());
    ahead.place(facts, links, candidates, &inside(found), at(0))
}

fn held(facts: &Facts, container: &str) -> Vec<String> {
    let attached = facts.networks["n"].attached.get(container);
    attached.map(|attached| attached.addresses.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

#[test]
fn a_new_port_is_its_whose_processes_are_behind_it_with_the_addresses_that_may_be_its() {
    let neighbour = ("db", OTHER, "172.18.0.3");
    for (what, attached, addresses, found, is) in [
        (
            "as the engine sets it up",
            &[neighbour][..],
            &["172.18.0.2", "2001:db8:18::2"][..],
            &["web"][..],
            &["172.18.0.2", "2001:db8:18::2"][..],
        ),
        ("with who shares its namespace", &[neighbour], &["172.18.0.2"], &["sidecar", "web"], &["172.18.0.2"]),
        ("a neighbour's address", &[neighbour], &["172.18.0.2", "172.18.0.3"], &["web"], &["172.18.0.2"]),
        ("nothing but a neighbour's", &[neighbour], &["172.18.0.3"], &["web"], &[]),
        ("the node's", &[neighbour], &["172.18.0.1"], &["web"], &[]),
        ("of no subnet of the network", &[neighbour], &["192.0.2.7", "2001:db8:19::2"], &["web"], &[]),
        ("two that share nothing", &[], &["172.18.0.2"], &["db", "web"], &[]),
        ("nobody that the engine knows", &[], &["172.18.0.2"], &["stranger"], &[]),
        ("nobody", &[], &["172.18.0.2"], &[], &[]),
        ("no addresses", &[], &[], &["web"], &[]),
        ("the engine has told of it", &[("web", MAC, "172.18.0.9")], &["172.18.0.2"], &["web"], &["172.18.0.9"]),
        ("the engine has told of it with another MAC address", &[("web", OTHER, "172.18.0.9")], &["172.18.0.2"], &["web"], &["172.18.0.9"]),
        ("its MAC address is of one that the engine has told of", &[("db", MAC, "172.18.0.3")], &["172.18.0.2"], &["web"], &[]),
    ] {
        let (mut facts, mut ahead) = (facts(attached), Ahead::default());
        let placed = look(&mut facts, &mut ahead, &links(MAC, addresses), found);
        assert_eq!(held(&facts, "web"), is, "{what}");
        let fresh = !is.is_empty() && !attached.iter().any(|(id, ..)| *id == "web");
        assert_eq!(placed, if fresh { vec!["web"] } else { vec![] }, "{what}");
        assert!(held(&facts, "sidecar").is_empty(), "{what}");
        assert!(attached.iter().all(|(id, _, address)| held(&facts, id) == [*address]), "{what}: nobody loses anything");
    }
}

#[test]
fn its_port_is_known_by_its_namespace() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    let (inventory, _) = facts.join(&links);
    assert_eq!(inventory.containers["web"].legs[0].port.as_deref(), Some("veth7"));
    assert_eq!(facts.inside(), [("web".to_owned(), 7)].into());
    // What inspect tells takes its place.
    let fact = facts.containers.get_mut("web").unwrap();
    fact.running = true;
    facts.inspected("web", Details { namespace: Some(8), ..Details::default() });
    assert_eq!(facts.inside(), [("web".to_owned(), 8)].into());
    assert!(facts.seen_in.is_empty());
}

#[test]
fn who_never_came_to_be_there_goes_with_its_port() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    assert!(ahead.gone(&mut facts, &links, at(1)).is_empty());
    assert_eq!(ahead.gone(&mut facts, &Links::default(), at(1)), ["web"]);
    assert!(held(&facts, "web").is_empty() && facts.seen_in.is_empty() && facts.inside().is_empty());
    assert!(ahead.gone(&mut facts, &Links::default(), at(1)).is_empty(), "once");
}

#[test]
fn who_the_engine_has_told_of_goes_by_the_engines_word() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    ahead.told(&mut facts, "n", "web");
    assert!(ahead.gone(&mut facts, &Links::default(), at(1)).is_empty());
    assert_eq!(held(&facts, "web"), ["172.18.0.2"]);
    facts.detach("n", "web");
    assert!(facts.seen_in.is_empty(), "an id of a namespace is used again");
}

#[test]
fn what_is_heard_late_of_its_life_before_changes_nothing() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    look(&mut facts, &mut ahead, &links(MAC, &["172.18.0.2"]), &["web"]);
    assert!(ahead.is_of_before(Some("n"), "web", at(-1)) && ahead.is_of_before(None, "web", at(-1)));
    assert!(!ahead.is_of_before(Some("n"), "web", at(1)), "it has left again");
    assert!(!ahead.is_of_before(Some("another"), "web", at(-1)) && !ahead.is_of_before(None, "db", at(-1)));
}

#[test]
fn a_listing_that_was_asked_for_before_does_not_undo_it_and_a_later_one_does() {
    for (what, attached, asked, stays) in [
        ("asked just before", &[][..], at(-1), &["172.18.0.2"][..]),
        ("asked long before, and it took as long", &[], at(-60), &["172.18.0.2"]),
        ("asked just after", &[], at(1), &["172.18.0.2"]),
        ("the engine has had the time to tell", &[], at(60), &[]),
        ("the engine tells", &[("web", MAC, "172.18.0.4")], at(1), &["172.18.0.4"]),
        ("the engine tells, asked just before", &[("web", MAC, "172.18.0.4")], at(-1), &["172.18.0.4"]),
        ("the engine tells of another port, asked just after", &[("web", OTHER, "172.18.0.4")], at(1), &["172.18.0.4"]),
        ("its address is another's by now", &[("db", OTHER, "172.18.0.2")], at(1), &[]),
    ] {
        let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
        let links = links(MAC, &["172.18.0.2"]);
        look(&mut facts, &mut ahead, &links, &["web"]);
        facts.networks = [("n".to_owned(), network(attached))].into();
        ahead.listed(&mut facts, &links, asked);
        assert_eq!(held(&facts, "web"), stays, "{what}");
        assert_eq!(facts.seen_in.is_empty(), stays.is_empty(), "{what}");
        assert!(attached.iter().all(|(id, _, address)| held(&facts, id) == [*address]), "{what}: nobody loses anything");
    }
}

#[test]
fn a_listing_that_still_tells_of_its_life_before_does_not_undo_it() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    facts.networks = [("n".to_owned(), network(&[("web", OTHER, "172.18.0.4")]))].into();
    ahead.listed(&mut facts, &links, at(-1));
    assert_eq!(held(&facts, "web"), ["172.18.0.2"]);
    assert_eq!(facts.join(&links).0.containers["web"].legs[0].port.as_deref(), Some("veth7"));
}

#[test]
fn a_listing_does_not_bring_back_who_is_gone_with_its_port() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    look(&mut facts, &mut ahead, &links(MAC, &["172.18.0.2"]), &["web"]);
    facts.networks = [("n".to_owned(), network(&[("db", OTHER, "172.18.0.3")]))].into();
    ahead.listed(&mut facts, &Links::default(), at(1));
    assert!(held(&facts, "web").is_empty() && facts.seen_in.is_empty());
}

#[test]
fn what_the_engine_had_the_time_to_tell_and_does_not_is_not_taken_from_the_kernel_again() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    facts.networks = [("n".to_owned(), network(&[]))].into();
    ahead.listed(&mut facts, &links, at(60));
    assert!(look(&mut facts, &mut ahead, &links, &["web"]).is_empty(), "the same port");
    ahead.gone(&mut facts, &Links::default(), at(1));
    assert_eq!(look(&mut facts, &mut ahead, &links, &["web"]), ["web"], "another one");
}

#[test]
fn where_a_container_was_seen_is_forgotten_with_it_though_no_event_told() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    ahead.told(&mut facts, "n", "web");
    // The engine was away, and web with it.
    facts.networks = [("n".to_owned(), network(&[]))].into();
    ahead.listed(&mut facts, &links, at(60));
    assert!(facts.inside().is_empty());
}

#[test]
fn who_was_taken_for_another_is_not_once_the_engine_says_whose_the_mac_address_is() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let links = links(MAC, &["172.18.0.2"]);
    look(&mut facts, &mut ahead, &links, &["web"]);
    let attached = Attached { mac: Some(MAC), addresses: ["172.18.0.2".parse().unwrap()].into() };
    facts.attach("n", "db", attached.clone());
    assert_eq!(ahead.told(&mut facts, "n", "db"), ["web"]);
    let legs = |facts: &Facts| {
        facts.join(&links).0.containers.into_values().map(|container| (container.id, container.legs.len())).collect::<Vec<_>>()
    };
    assert_eq!(legs(&facts), [("db".to_owned(), 1)]);
    assert!(facts.seen_in.is_empty(), "db's port is nobody else's");

    // The same by a listing.
    let (mut facts, mut ahead) = (self::facts(&[]), Ahead::default());
    look(&mut facts, &mut ahead, &links, &["web"]);
    facts.networks = [("n".to_owned(), network(&[("db", MAC, "172.18.0.3")]))].into();
    ahead.listed(&mut facts, &links, at(1));
    assert_eq!(legs(&facts), [("db".to_owned(), 1)]);
}

#[test]
fn who_starts_again_is_there_by_the_kernels_word_before_the_engine_has_told_of_its_end() {
    for (what, mac, address) in
        [("as before", MAC, "172.18.0.2"), ("with another MAC address", OTHER, "172.18.0.2"), ("with another address", OTHER, "172.18.0.4")]
    {
        let (mut facts, mut ahead) = (facts(&[("web", MAC, "172.18.0.2")]), Ahead::default());
        let links = links(mac, &[address]);
        let mut before = links.clone();
        before.ports.values_mut().for_each(|port| port.peer.as_mut().unwrap().mac = MAC);
        let (inventory, _) = facts.join(&before);
        let gone = Links { ports: BTreeMap::new(), ..links.clone() };
        facts.ended.look(&inventory, &gone, at(-1));
        let anew = Links { ports: [("veth9".to_owned(), links.ports["veth7"].clone())].into(), ..links };
        facts.ended.look(&facts.join(&gone).0, &anew, at(0));
        assert_eq!(look(&mut facts, &mut ahead, &anew, &["web"]), ["web"], "{what}");
        assert_eq!(held(&facts, "web"), [address], "{what}");
        assert_eq!(facts.join(&anew).0.containers["web"].legs[0].port.as_deref(), Some("veth9"), "{what}");
        // Its end, told now, is not the end of this life.
        assert!(ahead.is_of_before(Some("n"), "web", at(-1)), "{what}");
    }
}

#[test]
fn who_comes_in_the_place_of_one_whose_end_the_engine_has_not_told_of_has_its_address_for_itself() {
    let (mut facts, mut ahead) = (facts(&[("db", MAC, "172.18.0.2")]), Ahead::default());
    let (inventory, _) = facts.join(&links(MAC, &[]));
    let gone = Links { ports: BTreeMap::new(), ..links(MAC, &[]) };
    facts.ended.look(&inventory, &gone, at(-1));
    let anew = Links { ports: [("veth9".to_owned(), links(MAC, &["172.18.0.2"]).ports["veth7"].clone())].into(), ..gone };
    let ports = |facts: &Facts| {
        let (inventory, _) = facts.join(&anew);
        let legs = inventory
            .containers
            .into_values()
            .flat_map(|container| container.legs.into_iter().map(move |leg| (container.id.clone(), leg.port)));
        legs.collect::<Vec<_>>()
    };
    assert_eq!(ports(&facts), [("db".to_owned(), None)], "it is not taken for db before it is known who it is");
    assert_eq!(look(&mut facts, &mut ahead, &anew, &["web"]), ["web"]);
    assert_eq!(held(&facts, "web"), ["172.18.0.2"]);
    assert!(held(&facts, "db").is_empty());
    assert_eq!(ports(&facts), [("db".to_owned(), None), ("web".to_owned(), Some("veth9".to_owned()))]);
}

#[test]
fn what_the_engine_said_of_another_before_the_kernel_showed_it_does_not_undo_it() {
    let links = links(MAC, &["172.18.0.2"]);
    let placed = || {
        let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
        assert_eq!(look(&mut facts, &mut ahead, &links, &["web"]), ["web"]);
        (facts, ahead)
    };
    for (what, mac, address) in
        [("all of it", MAC, "172.18.0.2"), ("its MAC address", MAC, "172.18.0.9"), ("its address", OTHER, "172.18.0.2")]
    {
        // By an event that was asked about before.
        let (facts, ahead) = placed();
        let told = Attached { mac: Some(mac), addresses: [address.parse().unwrap()].into() };
        assert!(ahead.is_over(&facts, ("n", "db"), &told, at(-1)), "{what}");
        assert!(!ahead.is_over(&facts, ("n", "db"), &told, at(1)), "{what}: the engine's word is newer");
        assert!(!ahead.is_over(&facts, ("n", "web"), &told, at(-1)) && !ahead.is_over(&facts, ("another", "db"), &told, at(-1)), "{what}");
        // By a listing that was asked for before.
        let (mut facts, mut ahead) = placed();
        facts.networks = [("n".to_owned(), network(&[("db", mac, address)]))].into();
        ahead.listed(&mut facts, &links, at(-1));
        assert_eq!(held(&facts, "web"), ["172.18.0.2"], "{what}");
        assert!(!held(&facts, "db").contains(&"172.18.0.2".to_owned()), "{what}");
        let (inventory, _) = facts.join(&links);
        let ports =
            |id: &str| inventory.containers.get(id).map(|its| its.legs.iter().filter_map(|leg| leg.port.clone()).collect::<Vec<_>>());
        assert_eq!(ports("web").unwrap(), ["veth7"], "{what}");
        assert!(ports("db").is_none_or(|ports| ports.is_empty()), "{what}");
    }
    let (facts, ahead) = placed();
    let beside = Attached { mac: Some(OTHER), addresses: ["172.18.0.3".parse().unwrap()].into() };
    assert!(!ahead.is_over(&facts, ("n", "db"), &beside, at(-1)), "a neighbour");
}

#[test]
fn what_the_engine_said_before_its_port_went_does_not_bring_it_back() {
    let links = links(MAC, &["172.18.0.2"]);
    let gone = || {
        let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
        look(&mut facts, &mut ahead, &links, &["web"]);
        assert_eq!(ahead.gone(&mut facts, &Links::default(), at(1)), ["web"]);
        (facts, ahead)
    };
    let (facts, ahead) = gone();
    let told = |mac| Attached { mac: Some(mac), addresses: ["172.18.0.2".parse().unwrap()].into() };
    assert!(ahead.is_over(&facts, ("n", "web"), &told(MAC), at(0)), "asked before");
    assert!(!ahead.is_over(&facts, ("n", "web"), &told(MAC), at(2)), "asked after: it is there again");
    assert!(!ahead.is_over(&facts, ("n", "web"), &told(OTHER), at(0)), "another port");
    // The same by a listing, behind whose port somebody else is by then.
    for (asked, port) in [(0, None), (2, Some("veth7".to_owned()))] {
        let (mut facts, mut ahead) = gone();
        facts.networks = [("n".to_owned(), network(&[("web", MAC, "172.18.0.2")]))].into();
        ahead.listed(&mut facts, &links, at(asked));
        assert_eq!(facts.join(&links).0.containers["web"].legs[0].port, port, "asked at {asked}");
    }
}

#[test]
fn an_address_that_is_a_living_ones_by_the_listing_is_not_taken_from_it() {
    let (mut facts, mut ahead) = (facts(&[]), Ahead::default());
    let mut links = links(MAC, &["172.18.0.2", "172.18.0.3"]);
    assert_eq!(look(&mut facts, &mut ahead, &links, &["web"]), ["web"]);
    // db has joined meanwhile, and web had set db's address itself.
    let peer = Peer { namespace: 8, mac: OTHER, link_local: BTreeSet::new(), addresses: BTreeSet::new() };
    links.ports.insert("veth8".to_owned(), Port { bridge: "br0".to_owned(), peer: Some(peer) });
    facts.networks = [("n".to_owned(), network(&[("db", OTHER, "172.18.0.3")]))].into();
    ahead.listed(&mut facts, &links, at(-1));
    assert_eq!((held(&facts, "web"), held(&facts, "db")), (vec!["172.18.0.2".to_owned()], vec!["172.18.0.3".to_owned()]));
}
