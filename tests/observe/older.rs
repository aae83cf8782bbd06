//! Connections that are older than the agent, or that it meets in the middle.

use std::net::TcpStream;
use std::time::Duration;

use lab::probe::still_echoes;
use lab::{Bridge, Member, Netns, Process, Server, needs_root};
use node_agent::observe::Options;

use crate::node::Node;

/// A process that lives in the namespace, as a container's first process does: its /proc/PID/net is the container's.
fn init(netns: &Netns) -> Process {
    netns.spawn(std::process::Command::new("sleep").arg("60"))
}

const TRACKS: &str =
    "add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f ct state invalid counter";

/// A node with `web` and `db` on one bridge, each with a process that lives there.
struct Two<'h> {
    bridge: Bridge<'h>,
    web: Member,
    db: Member,
    inits: [Process; 2],
}

impl<'h> Two<'h> {
    fn on(host: &'h Netns) -> Self {
        let mut bridge = Bridge::new(host, "br0", "10.9.1.0/24", "fd09:1::/64");
        let (web, db) = (bridge.add("web"), bridge.add("db"));
        let inits = [init(&web.netns), init(&db.netns)];
        Self { bridge, web, db, inits }
    }

    /// Something else than us makes the namespace track: address translation, say.
    fn tracked(host: &'h Netns) -> Self {
        let two = Self::on(host);
        host.nft(TRACKS);
        two
    }

    /// What the engine says, with the process of each.
    fn named(&self) -> Node {
        let Self { bridge, web, db, inits } = self;
        let node = Node::with(&[bridge]).container("web", bridge, web, |c| c.pid = Some(inits[0].id()));
        node.container("db", bridge, db, |c| c.pid = Some(inits[1].id()))
    }

    /// The same without processes: nobody can be asked who listens.
    fn unasked(&self) -> Node {
        Node::with(&[&self.bridge]).runs("web", &self.bridge, &self.web).runs("db", &self.bridge, &self.db)
    }

    fn echo(&self) -> Server {
        Server::tcp_echo(&self.db.netns, (self.db.v4, 5432).into())
    }

    fn connect(&self) -> TcpStream {
        self.web.netns.connect((self.db.v4, 5432).into(), Duration::from_secs(1)).unwrap()
    }

    /// A connection that has carried something.
    fn used(&self) -> TcpStream {
        let mut stream = self.connect();
        assert!(still_echoes(&mut stream, b"before"));
        stream
    }
}

fn often() -> Options {
    Options { sweep: Duration::from_millis(500), ..Options::default() }
}

#[test]
fn a_connection_older_than_the_agent_is_imported_and_its_server_is_who_listens() {
    needs_root!();
    let host = Netns::new("host");
    let two = Two::tracked(&host);
    let _servers: Vec<_> = two.db.addresses().map(|address| Server::tcp_echo(&two.db.netns, (address, 5432).into())).into();
    let mut streams: Vec<_> =
        two.db.addresses().map(|address| two.web.netns.connect((address, 5432).into(), Duration::from_secs(1)).unwrap()).into();
    for stream in &mut streams {
        assert!(still_echoes(stream, b"before"));
    }
    let mut watching = two.named().observe_with(&host, often());
    let seen = watching.until("web -> db tcp/5432", |seen| seen.established == 2);
    assert_eq!(seen.pre_existing, 2);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn connections_wait_for_an_engine_that_answers_late() {
    needs_root!();
    let host = Netns::new("host");
    // Enough to track and to lead the bridge through, which nobody can do for a bridge that is not known yet.
    let two = Two::tracked(&host);
    let _server = two.echo();
    let _stream = two.used();
    let mut watching = two.named().observe_without_engine(&host);
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
    let two = Two::tracked(&host);
    let _server = two.echo();
    let _stream = two.used();
    let mut watching = two.unasked().observe_with(&host, often());
    // Longer than a flow is let settle, shorter than it is waited for.
    std::thread::sleep(Duration::from_millis(600));
    watching.now(|node| {
        let node = node.container("web", &two.bridge, &two.web, |c| c.pid = Some(two.inits[0].id()));
        node.container("db", &two.bridge, &two.db, |c| c.pid = Some(two.inits[1].id()))
    });
    watching.until("web -> db tcp/5432", |seen| seen.pre_existing == 1);
    assert_eq!(watching.used().len(), 1, "{}", watching.text());
}

#[test]
fn a_mid_flow_pick_up_is_turned_round_by_who_listens() {
    needs_root!();
    let host = Netns::new("host");
    let two = Two::on(&host);
    // Nothing tracks yet; the server is the first to speak after the agent has come.
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (ask, asked) = (ask, std::sync::Mutex::new(asked));
    let _server = Server::tcp(&two.db.netns, (two.db.v4, 5432).into(), move |mut stream, _| {
        let _ = asked.lock().unwrap().recv();
        let _ = std::io::Write::write_all(&mut stream, b"push");
        std::thread::sleep(Duration::from_secs(3));
    });
    let mut stream = two.connect();
    // A dump may show the connection before its event is read.
    let mut watching = two.named().observe_with(&host, Options { sweep: Duration::from_millis(20), ..Options::default() });
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
    let two = Two::tracked(&host);
    let server = two.echo();
    let _stream = two.used();
    // No process id is known: nobody can be asked.
    let mut watching = two.unasked().observe_with(&host, often());
    watching.until("web -- db tcp/5432", |seen| seen.pre_existing == 1);
    assert!(watching.evidence("web -> db tcp/5432").is_none());
    drop(server);
}

#[test]
fn a_connection_that_goes_on_after_the_table_was_flushed_is_the_same_flow() {
    needs_root!();
    let host = Netns::new("host");
    let two = Two::on(&host);
    let _server = two.echo();
    let mut watching = two.unasked().observe_with(&host, often());
    let mut stream = two.used();
    watching.until("web -> db tcp/5432", |seen| seen.established == 1);
    host.run(|| {
        let mut entries = Vec::new();
        node_agent::observe::conntrack::dump_shown(|_, shown| entries.push(shown.held()), |why| panic!("{why}")).unwrap();
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
