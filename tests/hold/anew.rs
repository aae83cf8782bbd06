//! A network is taken down and made anew (`compose down && up`) while neither agent nor supervisor lives.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lab::capture::Capture;
use lab::engine::Kind;
use lab::{Engine, Host, Server, eventually, limit};
use nix::sys::signal::Signal;

use crate::deaths::agent;
use crate::stage::{PATIENCE, enforce, engine, known, reaches, run};

const WHO: [&str; 3] = ["db", "web", "other"];

/// The network and its three containers, as Compose makes them. From 27 on the engine gives the first subnet that is free, and so the
/// same one again; before, the next in turn, unless it is named.
fn up(engine: &Engine) {
    let first_free = matches!(Kind::chosen(), Some(Kind::Current | Kind::CurrentNftables));
    let named: &[&str] = if first_free { &[] } else { &["--subnet", "10.66.77.0/24"] };
    let words = ["network", "create", "--ipv6", "--subnet", "fd00:77::/64", "back"];
    engine.docker(words.iter().chain(named));
    for name in WHO {
        let published: &[&str] = if name == "db" { &["-p", "8080:80"] } else { &[] };
        run(engine, name, "back", published);
    }
}

/// Addresses of db, IPv4 first.
fn db(engine: &Engine, port: u16) -> [SocketAddr; 2] {
    [engine.address("db", "back"), engine.address_v6("db", "back")].map(|at| SocketAddr::new(at, port))
}

fn servers(engine: &Engine) -> [Server; 2] {
    let (inside, any) = (engine.netns_of("db"), IpAddr::from([0_u16; 8]));
    [Server::tcp_echo(&inside, SocketAddr::new(any, 80)), Server::udp_echo(&inside, SocketAddr::new(any, 53))]
}

/// web reaches db, other doesn't.
fn held(engine: &Engine) -> Result<(), String> {
    let opens = |who: &str| db(engine, 80).map(|to| engine.netns_of(who).tcp(to).is_open());
    let (web, other) = (opens("web"), opens("other"));
    if (web, other) == ([true; 2], [false; 2]) { Ok(()) } else { Err(format!("web reaches db: {web:?}; other does: {other:?}")) }
}

#[test]
fn a_network_made_anew_while_agent_and_supervisor_are_dead_is_closed_until_they_are_back() {
    let _limit = limit(Duration::from_secs(180));
    let (engine, internet) = lab::or_skip!(engine(&[]));
    up(&engine);
    let before = servers(&engine);
    let host = Host::on(&engine);
    let mut supervisor = host.up();
    known(&host, &WHO);
    for service in ["tcp/80", "udp/53"] {
        host.bulkhead(["allow", "web", "db", service]);
    }
    enforce(&host, "back", &WHO);
    eventually(PATIENCE, || held(&engine));
    eventually(PATIENCE, || {
        let said = host.bulkhead(["status"]);
        if said.contains("made anew") { Ok(()) } else { Err(format!("what may open is not told: {said}")) }
    });
    let (bridge, address) = (engine.bridge("back"), engine.address("db", "back"));

    let agent = agent(&supervisor);
    supervisor.signal(Signal::SIGKILL);
    supervisor.wait(PATIENCE).unwrap();
    eventually(PATIENCE, || {
        let there = std::path::Path::new(&format!("/proc/{agent}/exe")).exists();
        if there { Err("the agent goes with its supervisor") } else { Ok(()) }
    });
    drop(before);
    engine.docker(["rm", "-f", "db", "web", "other"]);
    engine.docker(["network", "rm", "back"]);
    up(&engine);
    assert_ne!(engine.bridge("back"), bridge);
    assert_eq!(engine.address("db", "back"), address, "the engine gives the subnet that has come free");

    let servers = servers(&engine);
    let gateway: IpAddr = engine
        .netns
        .ip(&format!("-o -4 addr show dev {}", engine.bridge("back")))
        .split_whitespace()
        .nth(3)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let of_node = Server::tcp_echo(&engine.netns, SocketAddr::new(gateway, 7000));
    let outside = Server::tcp_echo(&internet.netns, "203.0.113.1:7000".parse().unwrap());
    // Not one IP packet arrives, but neighbour discovery and listeners' reports, which never leave the link.
    let arrived = Arc::new(AtomicU64::new(0));
    let captures: Vec<Capture> = WHO
        .iter()
        .map(|who| {
            let arrived = arrived.clone();
            Capture::start(&engine.netns_of(who), Some("eth0"), move |packet| {
                let link = packet.protocol == 58 && (130..=143).contains(&packet.destination_port);
                if !packet.arp && !packet.outgoing && !link {
                    eprintln!("{packet:?}");
                    arrived.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for who in ["web", "other"] {
        let inside = engine.netns_of(who);
        for n in 0..2 {
            assert!(!inside.tcp(db(&engine, 80)[n]).is_open(), "{who}");
            inside.udp_send(db(&engine, 53)[n], b"anew");
        }
        assert!(!inside.tcp(SocketAddr::new(gateway, 7000)).is_open(), "{who} to the node");
        assert!(!inside.tcp("203.0.113.1:7000".parse().unwrap()).is_open(), "{who} to the outside");
    }
    for to in db(&engine, 80) {
        assert!(!engine.netns.tcp(to).is_open(), "from the node");
    }
    let door = SocketAddr::new(lab::internet::HOST_V4.parse().unwrap(), 8080);
    assert!(!internet.netns.tcp_echo(door, b"by the published port"));
    let heard = [&servers[0], &servers[1], &of_node, &outside].map(Server::heard);
    assert_eq!((heard, arrived.load(Ordering::Relaxed)), ([0; 4], 0), "what db's two ports, the node and the outside heard; IP packets");
    drop(captures);

    let begun = Instant::now();
    let supervisor = host.up();
    eventually(PATIENCE, || held(&engine));
    println!("a network made anew while nobody lived: closed; what is allowed passed {:?} after `bulkhead up`", begun.elapsed());
    reaches(&engine, "web", db(&engine, 53)[0], b"allowed", Duration::from_secs(5), "an agent lives");

    // How long one has to wait for an agent that was killed alone: until a container is bound that joined meanwhile.
    let joiner = "joiner";
    engine.docker(["network", "create", "aside"]);
    run(&engine, joiner, "aside", &[]);
    known(&host, &[joiner]);
    host.bulkhead(["allow", joiner, "db", "tcp/80"]);
    let first = crate::deaths::agent(&supervisor);
    let begun = Instant::now();
    nix::sys::signal::kill(first, Signal::SIGKILL).unwrap();
    let again = eventually(PATIENCE, || {
        let now = crate::deaths::agent(&supervisor);
        if now == first { Err("the killed one") } else { Ok(begun.elapsed()) }
    });
    engine.docker(["network", "connect", "back", joiner]);
    let to = db(&engine, 80)[0];
    eventually(PATIENCE, || if engine.netns_of(joiner).tcp(to).is_open() { Ok(()) } else { Err("joiner does not reach db") });
    println!("agent killed: another one runs after {again:?}, a container that joined meanwhile was bound within {:?}", begun.elapsed());
}
