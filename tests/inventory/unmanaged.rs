//! What may not be claimed, with its reason; and what the engine's process shows.

use std::collections::BTreeSet;
use std::net::IpAddr;

use lab::Engine;
use lab::engine::Options;
use policy::inventory::Unmanaged;

use crate::on_every_engine;
use crate::watching::{Watching, engine, kinds, named};

#[test]
fn containers_that_reach_around_the_filter_are_listed_with_the_reason() {
    on_every_engine!(|engine: Engine| {
        engine.netns.ip("link add up0 type veth peer name up1");
        engine.netns.ip("link set up0 up");
        engine.docker(["network", "create", "-d", "macvlan", "-o", "parent=up0", "--subnet", "198.51.100.0/24", "flat"]);
        let socket = format!("{}:/engine.sock", engine.socket().display());
        let folder = format!("{}:/host", engine.dir.display());
        let rows: [(&str, &[&str], Unmanaged); 8] = [
            ("hosted", &["--network", "host"], Unmanaged::HostNetwork),
            ("flatly", &["--network", "flat"], Unmanaged::Driver("macvlan".to_owned())),
            ("privileged", &["--privileged"], Unmanaged::Privileged),
            ("admin", &["--cap-add", "NET_ADMIN"], Unmanaged::Capability("NET_ADMIN".to_owned())),
            ("all", &["--cap-add", "ALL"], Unmanaged::Capability("ALL".to_owned())),
            ("pids", &["--pid", "host"], Unmanaged::HostPid),
            ("socket", &["-v", &socket], Unmanaged::EngineSocket),
            ("folder", &["-v", &folder], Unmanaged::EngineSocket),
        ];
        let watching = Watching::start(&engine);
        let starts = |(name, flags, _): &(&str, &[&str], Unmanaged)| {
            let out = engine.try_docker([&["run", "-d", "--name", name], *flags, &["bb"]].concat());
            // In a sandbox that lacks a capability itself, nothing can be started with all of them.
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success() || said.contains("unable to apply caps"), "{name}: {said}");
            if !out.status.success() {
                engine.docker(["rm", "-f", name]);
            }
            out.status.success()
        };
        let rows: Vec<_> = rows.into_iter().filter(starts).collect();
        assert!(rows.len() >= 6);
        engine.docker(["run", "-d", "--name", "plain", "--cap-add", "SYS_PTRACE", "bb"]);
        for (name, _, reason) in rows {
            let found = watching.settled(name);
            assert_eq!(found.unmanaged, BTreeSet::from([reason]), "{name}");
        }
        let plain = watching.settled("plain");
        assert!(plain.unmanaged.is_empty() && plain.raw, "{plain:?}");
        engine.docker(["run", "-d", "--name", "tame", "--cap-drop", "NET_RAW", "bb"]);
        assert!(!watching.settled("tame").raw);
        // Named, though no bridge carries it.
        let address: IpAddr = engine.address("flatly", "flat");
        let now = watching.now();
        let lease = now.leases.find(None, address, jiff::Timestamp::now()).unwrap();
        assert_eq!(lease.endpoint.to_string(), format!("unmanaged:flatly@{address}"));
        let flat = now.inventory.networks.values().find(|network| network.name == "flat").unwrap();
        assert_eq!(flat.unmanaged, BTreeSet::from([Unmanaged::Driver("macvlan".to_owned())]));
    });
}

#[test]
fn a_port_that_is_no_containers_is_told_after_a_while() {
    on_every_engine!(|engine: Engine| {
        engine.docker(["run", "-d", "--name", "app", "bb"]);
        let watching = Watching::start(&engine);
        watching.settled("app");
        engine.netns.ip("link add stray0 type veth peer name stray1");
        engine.netns.ip("link set stray0 master docker0 up");
        let found = watching.until("the stranger", |now| (!now.inventory.strangers.is_empty()).then(|| now.inventory.strangers.clone()));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [("stray0".to_owned(), "docker0".to_owned())]);
    });
}

#[test]
fn the_user_land_proxy_and_the_engines_resolver_are_read_from_its_process() {
    lab::needs_root!();
    if kinds().is_empty() {
        lab::skip!("needs a Docker Engine: run tests/setup/engine");
    }
    for kind in kinds() {
        let dns: IpAddr = "203.0.113.53".parse().unwrap();
        let engine = engine(kind, Options { userland_proxy: false, dns: Some(dns), ..Options::default() });
        engine.docker(["network", "create", "front"]);
        let watching = Watching::start(&engine);
        assert!(!watching.now().inventory.userland_proxy, "{kind:?}");
        engine.docker(["run", "-d", "--name", "app", "--network", "front", "bb"]);
        engine.docker(["run", "-d", "--name", "own", "--network", "front", "--dns", "203.0.113.54", "bb"]);
        assert_eq!(watching.settled("app").resolvers, [dns], "{kind:?}");
        assert_eq!(watching.settled("own").resolvers, ["203.0.113.54".parse::<IpAddr>().unwrap()], "{kind:?}");
    }
}

#[test]
fn a_resolver_that_a_container_wrote_into_its_own_file_is_not_believed() {
    lab::needs_root!();
    if kinds().is_empty() {
        lab::skip!("needs a Docker Engine: run tests/setup/engine");
    }
    for kind in kinds() {
        let engine = engine(kind, Options { dns: Some("203.0.113.53".parse().unwrap()), ..Options::default() });
        engine.docker(["network", "create", "front"]);
        engine.docker(["run", "-d", "--name", "liar", "--network", "front", "bb"]);
        engine.exec(
            "liar",
            ["sh", "-c", "printf 'nameserver 127.0.0.11\\n# ExtServers: [203.0.113.53 198.51.100.66]\\n' > /etc/resolv.conf"],
        );
        let watching = Watching::start(&engine);
        assert_eq!(watching.settled("liar").resolvers, ["203.0.113.53".parse::<IpAddr>().unwrap()], "{kind:?}");
        assert!(watching.now().notes.iter().any(|note| note.contains("198.51.100.66")));
        assert!(named(&watching.now(), "liar").is_some());
    }
}
