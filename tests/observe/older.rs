//! Connections that are older than the agent, or that it meets in the middle.

use std::time::Duration;

use lab::probe::still_echoes;
use lab::{Bridge, Netns, Process, Server, needs_root};
use node_agent::observe::Options;

use crate::node::Node;

/// A process that lives in the namespace, as a container's first process does: its /proc/PID/net is the container's.
fn init(netns: &Netns) -> Process {
    netns.spawn(std::process::Command::new("sleep").arg("60"))
}

fn often() -> Options {
    Options { sweep: Duration::from_millis(500), ..Options::default() }
}

#[test]
fn a_connection_older_than_the_agent_is_imported_and_its_server_is_who_listens() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let inits = [init(&web.netns), init(&db.netns)];
    // Something else made the namespace track: address translation, say.
    host.nft("add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state invalid counter");
    let _servers: Vec<_> = db.addresses().map(|address| Server::tcp_echo(&db.netns, (address, 5432).into())).into();
    let mut streams: Vec<_> =
        db.addresses().map(|address| web.netns.connect((address, 5432).into(), Duration::from_secs(1)).unwrap()).into();
    for stream in &mut streams {
        assert!(still_echoes(stream, b"before"));
    }
    let node = Node::with(&[&bridge]).container("web", &bridge, &web, |c| c.pid = Some(inits[0].id()));
    let mut watching = node.container("db", &bridge, &db, |c| c.pid = Some(inits[1].id())).observe_with(&host, often());
    let seen = watching.until("web -> db tcp/5432", |seen| seen.established == 2);
    assert_eq!(seen.pre_existing, 2);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn connections_wait_for_an_engine_that_answers_late() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let inits = [init(&web.netns), init(&db.netns)];
    // Enough to track and to lead the bridge through, which nobody can do for a bridge that is not known yet.
    host.nft("add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state invalid counter");
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut stream = web.netns.connect((db.v4, 5432).into(), Duration::from_secs(1)).unwrap();
    assert!(still_echoes(&mut stream, b"before"));
    let node = Node::with(&[&bridge]).container("web", &bridge, &web, |c| c.pid = Some(inits[0].id()));
    let node = node.container("db", &bridge, &db, |c| c.pid = Some(inits[1].id()));
    let mut watching = node.observe_without_engine(&host);
    // Longer than an address that belongs to nobody is waited for.
    watching.settle();
    assert_eq!(watching.used(), [""; 0], "named before it is known who lives here: {}", watching.text());
    watching.now(|node| node);
    let seen = watching.until("web -> db tcp/5432", |seen| seen.established == 1);
    assert_eq!(seen.pre_existing, 1);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn who_listens_may_be_known_a_little_later_than_who_lives_there() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let inits = [init(&web.netns), init(&db.netns)];
    host.nft("add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state invalid counter");
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut stream = web.netns.connect((db.v4, 5432).into(), Duration::from_secs(1)).unwrap();
    assert!(still_echoes(&mut stream, b"before"));
    let mut watching = Node::with(&[&bridge]).runs("web", &bridge, &web).runs("db", &bridge, &db).observe_with(&host, often());
    // Longer than a flow is let settle, shorter than it is waited for.
    std::thread::sleep(Duration::from_millis(600));
    watching.now(|node| {
        let node = node.container("web", &bridge, &web, |c| c.pid = Some(inits[0].id()));
        node.container("db", &bridge, &db, |c| c.pid = Some(inits[1].id()))
    });
    watching.until("web -> db tcp/5432", |seen| seen.pre_existing == 1);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn a_mid_flow_pick_up_is_turned_round_by_who_listens() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let inits = [init(&web.netns), init(&db.netns)];
    // Nothing tracks yet; the server is the first to speak after the agent has come.
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (ask, asked) = (ask, std::sync::Mutex::new(asked));
    let _server = Server::tcp(&db.netns, (db.v4, 5432).into(), move |mut stream, _| {
        let _ = asked.lock().unwrap().recv();
        let _ = std::io::Write::write_all(&mut stream, b"push");
        std::thread::sleep(Duration::from_secs(3));
    });
    let mut stream = web.netns.connect((db.v4, 5432).into(), Duration::from_secs(1)).unwrap();
    let seldom = Options { sweep: Duration::from_secs(2), ..Options::default() };
    let node = Node::with(&[&bridge]).container("web", &bridge, &web, |c| c.pid = Some(inits[0].id()));
    let mut watching = node.container("db", &bridge, &db, |c| c.pid = Some(inits[1].id())).observe_with(&host, seldom);
    // The event has to come before a dump shows the connection.
    watching.settle();
    ask.send(()).unwrap();
    assert!(std::io::Read::read(&mut stream, &mut [0; 16]).unwrap() > 0);
    std::io::Write::write_all(&mut stream, b"thanks").unwrap();
    let seen = watching.until("web -> db tcp/5432", |seen| seen.established == 1);
    assert_eq!(seen.pre_existing, 1);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn without_anybody_who_listens_the_direction_is_unknown() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    host.nft("add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state invalid counter");
    let server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut stream = web.netns.connect((db.v4, 5432).into(), Duration::from_secs(1)).unwrap();
    assert!(still_echoes(&mut stream, b"before"));
    // No process id is known: nobody can be asked.
    let mut watching = Node::with(&[&bridge]).runs("web", &bridge, &web).runs("db", &bridge, &db).observe_with(&host, often());
    watching.until("web -- db tcp/5432", |seen| seen.pre_existing == 1);
    assert!(watching.evidence("web -> db tcp/5432").is_none());
    drop(server);
}

#[test]
fn a_connection_that_goes_on_after_the_table_was_flushed_is_the_same_flow() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let _server = Server::tcp_echo(&db.netns, (db.v4, 5432).into());
    let mut watching = Node::with(&[&bridge]).runs("web", &bridge, &web).runs("db", &bridge, &db).observe_with(&host, often());
    let mut stream = web.netns.connect((db.v4, 5432).into(), Duration::from_secs(1)).unwrap();
    assert!(still_echoes(&mut stream, b"before"));
    watching.until("web -> db tcp/5432", |seen| seen.established == 1);
    host.run(|| {
        let mut entries = Vec::new();
        node_agent::observe::conntrack::dump(|entry| entries.push(entry), |why| panic!("{why}")).unwrap();
        let deleted = entries.iter().filter(|entry| node_agent::observe::conntrack::delete(entry).unwrap()).count();
        assert!(deleted > 0);
        // Nothing is deleted twice, and nobody else's in its place.
        assert!(entries.iter().all(|entry| !node_agent::observe::conntrack::delete(entry).unwrap()));
    });
    assert!(still_echoes(&mut stream, b"after"));
    watching.settle();
    let seen = watching.evidence("web -> db tcp/5432").unwrap();
    assert_eq!((seen.used(), seen.pre_existing), (1, 0));
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}
