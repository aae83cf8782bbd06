use super::super::facts::{Attached, Details, Links, Peer, Port};
use super::*;

const MAC: [u8; 6] = [2, 0x42, 0xac, 0x12, 0, 2];

#[test]
fn a_clock_that_was_put_back_is_noticed_and_one_that_goes_on_is_not() {
    let at = |second| Timestamp::from_second(second).unwrap();
    assert!(went_back(at(3_600), at(10)));
    assert!(!went_back(at(3_600), at(3_600)));
    assert!(!went_back(Timestamp::MIN, at(0)), "never listed yet");
}
/// One port of `br0`, with the namespace 7 behind it.
fn links(port: &str) -> Seen {
    let peer = Peer { namespace: 7, mac: MAC, link_local: [].into(), addresses: [].into() };
    let ports = [(port.to_owned(), Port { bridge: "br0".to_owned(), peer: Some(peer) })].into();
    Seen { links: Links { bridges: [("br0".to_owned(), [].into())].into(), ports, ..Links::default() }.into(), at: Instant::now() }
}

/// `web` is on the network, in the namespace 7, by the engine's word.
fn web() -> Facts {
    let network = NetworkFact {
        name: "front".to_owned(),
        project: None,
        driver: "bridge".to_owned(),
        bridge: Some("br0".to_owned()),
        subnets: vec!["172.18.0.0/16".parse().unwrap()],
        internal: false,
        attached: [("web".to_owned(), Attached { mac: Some(MAC), addresses: ["172.18.0.2".parse().unwrap()].into() })].into(),
    };
    let web = ContainerFact {
        name: "web".to_owned(),
        image: String::new(),
        labels: BTreeMap::new(),
        running: true,
        network_mode: "front".to_owned(),
        details: Some(Details { namespace: Some(7), pid: Some(1), ..Details::default() }),
    };
    Facts { networks: [("n".to_owned(), network)].into(), containers: [("web".to_owned(), web)].into(), ..Facts::default() }
}

#[test]
fn while_the_engine_is_away_nobody_is_taken_for_who_was_there_before() {
    let (moves, seen) = watch::channel(links("veth7"));
    let (mut task, published) = Task::new(Options { socket: "/nowhere".into(), engine_sockets: Vec::new() }, seen);
    task.facts = web();
    task.blind = None;
    task.publish();
    let port = || published.borrow().inventory.containers["web"].legs[0].port.clone();
    assert_eq!(port().as_deref(), Some("veth7"));
    task.blind = Some("the engine is away".to_owned());
    // Its end and the next one's beginning are heard of in one.
    moves.send_replace(links("veth9"));
    task.catch_up();
    assert_eq!(port(), None, "everything is as it was but the port");
    moves.send_replace(links("veth7"));
    task.catch_up();
    assert_eq!(port().as_deref(), Some("veth7"), "its own is back");
}

#[test]
fn whose_port_went_while_everything_was_listed_is_not_found_behind_another() {
    for (what, port, expected) in [("another's by now", "veth9", None), ("as it was", "veth7", Some("veth7"))] {
        let (moves, seen) = watch::channel(links("veth7"));
        let (mut task, published) = Task::new(Options { socket: "/nowhere".into(), engine_sockets: Vec::new() }, seen);
        // Nothing of it was published before: an agent that has just started.
        let before = Arc::clone(&task.links.borrow().links);
        task.facts = web();
        moves.send_replace(links(port));
        task.look_since(&before);
        task.blind = None;
        task.publish();
        let leg = &published.borrow().inventory.containers["web"].legs[0];
        assert_eq!(leg.port.as_deref(), expected, "{what}");
    }
}
