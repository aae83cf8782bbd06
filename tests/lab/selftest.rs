//! The lab tested: a probe that always says yes would make every other suite worthless. Needs root.

#![allow(clippy::unwrap_used, reason = "unwrap is for tests")]

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use lab::engine::{Kind, Options};
use lab::{Bridge, Echo, Frames, Internet, Netns, Server, Tcp, eventually, frame, limit, needs_engine, needs_root};

const A_WHILE: Duration = Duration::from_secs(60);

#[test]
fn neighbours_on_a_bridge_reach_each_other_over_both_families() {
    needs_root!();
    let _limit = limit(A_WHILE);
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.77.0.0/24", "fd77::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    for address in db.addresses() {
        let tcp = Server::tcp_echo(&db.netns, (address, 5432).into());
        let udp = Server::udp_echo(&db.netns, (address, 53).into());
        assert!(web.netns.tcp(tcp.address).is_open(), "{address}");
        assert!(web.netns.tcp_echo(tcp.address, b"hello"));
        assert_eq!(web.netns.udp_echo(udp.address, b"hello"), Echo::Answered);
        assert_eq!(web.netns.ping(address), Echo::Answered);
        assert_eq!((tcp.heard(), udp.heard()), (2, 1));
        assert!(web.netns.tcp((address, 1).into()).is_refused());
        assert_eq!(web.netns.udp_echo((address, 1).into(), b"hello"), Echo::Refused);
    }
}

#[test]
fn a_dropped_packet_is_silence_to_every_probe() {
    needs_root!();
    let _limit = limit(A_WHILE);
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.77.0.0/24", "fd77::/64");
    let (web, db) = (bridge.add("web"), bridge.add("db"));
    let servers: Vec<Server> = db.addresses().map(|a| Server::tcp_echo(&db.netns, (a, 5432).into())).into();
    host.nft(
        "table inet t {
            chain c {
                type filter hook forward priority 0; policy drop;
                icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
            }
        }",
    );
    for server in &servers {
        assert_eq!(web.netns.tcp(server.address), Tcp::TimedOut);
        assert_eq!(web.netns.udp_echo(server.address, b"hello"), Echo::Silent);
        assert_eq!(web.netns.ping(server.address.ip()), Echo::Silent);
        assert_eq!(server.heard(), 0);
    }
    // Same-bridge packets meet the rule only while the bridge's switch is on.
    bridge.set_nf_call(false);
    assert!(web.netns.tcp(servers[0].address).is_open());
}

#[test]
fn a_raw_frame_crosses_the_bridge_as_it_was_sent() {
    needs_root!();
    let _limit = limit(A_WHILE);
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.77.0.0/24", "fd77::/64");
    let (mallory, db) = (bridge.add("mallory"), bridge.add("db"));
    let (sender, receiver) = (Frames::open(&mallory.netns, "eth0"), Frames::open(&db.netns, "eth0"));
    let forged: IpAddr = "10.77.0.99".parse().unwrap();
    let datagram = frame::udp((forged, 1000), (db.v4.into(), 2000), b"spoofed marker");
    let packet = frame::ip(forged, db.v4.into(), frame::PROTO_UDP, &datagram);
    sender.send(&frame::ethernet(db.mac, mallory.mac, frame::ETH_IPV4, &packet));
    assert!(receiver.sees(Duration::from_secs(1), b"spoofed marker"));
    sender.send(&frame::ethernet(db.mac, mallory.mac, 0x88b5, b"an experimental ethertype, padded to be long enough"));
    assert!(receiver.sees(Duration::from_secs(1), b"experimental"));
    assert!(!receiver.sees(Duration::from_millis(200), b"never sent"));
}

#[test]
fn the_internet_answers_by_name_and_by_address_and_leads_nowhere() {
    needs_root!();
    if let Some(reason) = Internet::lacks() {
        lab::skip!("{reason}");
    }
    let _limit = limit(A_WHILE);
    let host = Netns::new("host");
    let mut internet = Internet::behind(&host);
    let api: IpAddr = "198.51.100.20".parse().unwrap();
    internet.serve_http(api, 80, "hello");
    internet.serve_names(&[("api.example.com", api)]);
    assert_eq!(host.http_get(SocketAddr::new(api, 80), "/").unwrap(), "hello");
    assert!(host.tcp((lab::internet::RESOLVER.parse::<IpAddr>().unwrap(), 53).into()).is_open());
    assert_eq!(internet.netns.tcp("192.0.2.1:80".parse().unwrap()), Tcp::Unreachable);
}

#[test]
fn what_a_test_made_is_gone_after_it_panicked() {
    needs_root!();
    let path = std::sync::Mutex::new(std::path::PathBuf::new());
    let panicked = std::panic::catch_unwind(|| {
        let host = Netns::new("host");
        path.lock().unwrap().clone_from(&host.path().to_path_buf());
        let _sleeper = host.spawn(std::process::Command::new("sleep").arg("600"));
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(panicked.is_err());
    assert!(!path.lock().unwrap_or_else(std::sync::PoisonError::into_inner).exists());
}

#[test]
fn an_engine_runs_containers_in_its_own_namespace_and_is_removed_whole() {
    let _limit = limit(Duration::from_secs(300));
    if Kind::present().is_empty() {
        lab::skip!("needs a Docker Engine: run tests/setup/engine");
    }
    for kind in Kind::present() {
        let begun = Instant::now();
        let engine = needs_engine!(Options { kind: Some(kind), ..Options::default() });
        let started = begun.elapsed();
        engine.import_busybox("lab/busybox:1");
        engine.docker(["network", "create", "back"]);
        engine.docker(["run", "-d", "--name", "web", "--network", "back", "lab/busybox:1", "httpd", "-f", "-h", "/www"]);
        engine.docker(["run", "-d", "--name", "cli", "--network", "back", "lab/busybox:1"]);
        // Without -T: Debian's static busybox 1.35 crashes on it.
        let answer = engine.exec("cli", ["wget", "-q", "-O", "-", "http://web/"]);
        assert_eq!(String::from_utf8_lossy(&answer.stdout), "hello\n", "{answer:?}");
        let web = engine.address("web", "back");
        assert_eq!(engine.netns.http_get((web, 80).into(), "/index.html").unwrap(), "hello\n");
        assert!(engine.netns.ip("-o link show").contains(&engine.bridge("back")));
        let (dir, pid) = (engine.dir.clone(), engine.pid("web"));
        drop(engine);
        let is_gone = |path: &Path| if path.exists() { Err(format!("{} is still there", path.display())) } else { Ok(()) };
        eventually(Duration::from_secs(20), || is_gone(&dir).and(is_gone(Path::new(&format!("/proc/{pid}")))));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&dir.display().to_string()), "{mounts}");
        eprintln!("{kind:?}: answering after {started:?}, gone after {:?}", begun.elapsed());
    }
}

#[test]
fn what_a_dead_process_left_is_removed_by_the_next() {
    needs_root!();
    // The first namespace of a process sweeps up what all dead ones left: `tests/run` runs this test at its end for that.
    drop(Netns::new("first"));
    let mut short = std::process::Command::new("true").spawn().unwrap();
    let dead = short.id();
    short.wait().unwrap();
    let name = format!("bhlab-{dead}-0-left");
    assert!(std::process::Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    std::fs::create_dir_all(format!("/tmp/{name}/data")).unwrap();
    lab::sweep(|pid| pid == dead);
    assert!(!Path::new("/run/netns").join(&name).exists() && !Path::new("/tmp").join(&name).exists());
}
