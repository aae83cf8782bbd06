//! Containers that come under one workload's policy, or near it: one-off runs, replicas, who shares a namespace, a MAC address of one's choice.

use std::net::SocketAddr;
use std::time::Duration;

use lab::compose::Compose;
use lab::{Host, Netns, Server, eventually, limit};

use crate::stage::{PATIENCE, enforce, engine, known};

const STACK: &str = "services:
  db: {image: 'hold:1'}
  web: {image: 'hold:1'}
  other: {image: 'hold:1'}
";

#[test]
fn whoever_comes_as_a_workload_is_held_to_its_policy_and_nobody_else_gets_it() {
    let _limit = limit(Duration::from_secs(240));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let file = engine.dir.join("compose.yaml");
    std::fs::write(&file, STACK).unwrap();
    let compose = lab::or_skip!(Compose::new(&engine, "shop", &[&file]));
    compose.up();
    let _up = Host::on(&engine).up();
    let host = Host::prepared(&engine);
    known(&host, &["shop/db", "shop/web", "shop/other"]);
    host.bulkhead(["allow", "shop/web", "shop/db", "tcp/80"]);
    enforce(&host, "shop", &["shop/db", "shop/web", "shop/other"]);

    let of = |service: &str| -> Vec<String> { compose.run(&["ps", "-q", service]).split_whitespace().map(str::to_owned).collect() };
    let network = "shop_default";
    let any = |port| SocketAddr::new("::".parse().unwrap(), port);
    let at = |container: &str| SocketAddr::new(engine.address(container, network), 80);
    let (db, other) = (of("db").remove(0), of("other").remove(0));
    let _db = Server::tcp_echo(&engine.netns_of(&db), any(80));
    let closed = Server::tcp_echo(&engine.netns_of(&other), any(80));
    let reaches = |who: &str, inside: &Netns| {
        eventually(PATIENCE, || if inside.tcp(at(&db)).is_open() { Ok(()) } else { Err(format!("{who} does not reach db")) });
        assert!(!inside.tcp(at(&other)).is_open(), "{who} reaches other");
    };
    reaches("web", &engine.netns_of(&of("web")[0]));

    compose.run(&["run", "-d", "--name", "once", "web"]);
    reaches("a one-off run", &engine.netns_of("once"));

    compose.run(&["up", "-d", "--no-build", "--no-recreate", "--scale", "web=3"]);
    let replicas = of("web");
    assert!(replicas.len() >= 3, "{replicas:?}");
    let first = Server::tcp_echo(&engine.netns_of(&replicas[0]), any(80));
    for replica in &replicas {
        reaches("a replica", &engine.netns_of(replica));
    }
    assert!(!engine.netns_of(&replicas[1]).tcp(at(&replicas[0])).is_open(), "a replica reaches its sibling");

    engine.docker(["run", "-d", "--name", "guest", "--network", &format!("container:{}", replicas[2]), "hold:1"]);
    reaches("who shares web's namespace", &engine.netns_of("guest"));
    engine.docker(["run", "-d", "--name", "lodger", "--network", &format!("container:{other}"), "hold:1"]);
    assert!(!engine.netns_of("lodger").tcp(at(&db)).is_open(), "who shares other's namespace reaches db");

    // An address that nobody made from another one, and who is on the network by himself.
    engine.docker(["run", "-d", "--name", "chosen", "--network", network, "--mac-address", "02:42:de:ad:00:01", "hold:1"]);
    known(&host, &["chosen"]);
    host.bulkhead(["allow", "chosen", "shop/db", "tcp/80"]);
    reaches("who chose its MAC address", &engine.netns_of("chosen"));
    engine.docker(["run", "-d", "--name", "nobody", "--network", network, "--mac-address", "02:42:de:ad:00:02", "hold:1"]);
    known(&host, &["nobody"]);
    assert!(!engine.netns_of("nobody").tcp(at(&db)).is_open(), "who is allowed nothing reaches db");
    assert_eq!((closed.heard(), first.heard()), (0, 0));
}
