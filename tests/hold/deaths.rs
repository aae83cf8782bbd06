//! What happens while nobody looks: the agent is hung, killed or slow to come back, and addresses, names, networks and times move
//! on without it. Each story has an engine of its own.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use lab::{Host, Process, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::hands::{bound, connect_from, converse, pretend};
use crate::stage::{PATIENCE, enforce, engine, known, network, run};

/// The agent under this supervisor.
pub(crate) fn agent(up: &Process) -> Pid {
    child(up, "bulkhead-agent run")
}

/// The filter before the engine's socket.
pub(crate) fn filter(up: &Process) -> Pid {
    child(up, "engine-filter")
}

fn child(up: &Process, words: &str) -> Pid {
    eventually(PATIENCE, || lab::kin::child(up, words).map(Pid::from_raw).ok_or(format!("no {words} is below the supervisor")))
}

/// How the agent is out of the way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Absence {
    Hung,
    Dead,
}

/// While the agent is away: a container passes its address on, another its name, a rule comes to its end, and a project's network is
/// made. What lives of all that has to end when it is back, and not one packet may pass by it meanwhile, but on the new network.
fn nothing_is_inherited(absence: Absence) {
    let _limit = limit(Duration::from_secs(300));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    network(&engine, "back", 1);
    let ip = ["--ip", "10.66.1.100"];
    for name in ["vault", "butler", "timed"] {
        run(&engine, name, "back", &[]);
    }
    run(&engine, "elder", "back", &ip);
    let host = Host::on(&engine);
    let up = host.up();
    known(&host, &["vault", "elder", "butler", "timed"]);
    for (client, port) in [("elder", "udp/53"), ("elder", "tcp/80"), ("butler", "tcp/80")] {
        host.bulkhead(["allow", client, "vault", port]);
    }
    enforce(&host, "back", &["vault"]);
    let inside = engine.netns_of("vault");
    let address = engine.address("vault", "back");
    let (udp, tcp) = (SocketAddr::new(address, 53), SocketAddr::new(address, 80));
    let servers = [Server::udp_echo(&inside, udp), Server::tcp_echo(&inside, tcp)];
    let connect = |name: &str| -> TcpStream {
        let inside = engine.netns_of(name);
        let mut stream = eventually(PATIENCE, || inside.connect(tcp, Duration::from_secs(1)));
        assert!(lab::probe::still_echoes(&mut stream, b"mine"));
        stream
    };
    let mut of_butler = connect("butler");

    {
        let elder = engine.netns_of("elder");
        converse(&bound(&elder, 4000), udp);
        let mut stream = eventually(PATIENCE, || connect_from(&elder, 4001, tcp, Duration::from_secs(1)));
        assert!(lab::probe::still_echoes(&mut stream, b"mine"));
        host.bulkhead(["allow", "timed", "vault", "tcp/80", "--for", "12s"]);
        let over = Instant::now() + Duration::from_secs(13);
        let mut of_timed = connect("timed");

        let (supervisor, agent) = (Pid::from_raw(up.id().cast_signed()), agent(&up));
        match absence {
            Absence::Hung => kill(agent, Signal::SIGSTOP).unwrap(),
            Absence::Dead => {
                // Or it would start another at once.
                kill(supervisor, Signal::SIGSTOP).unwrap();
                kill(agent, Signal::SIGKILL).unwrap();
            }
        }
        engine.docker(["kill", "elder"]);
        let before = [servers[0].heard(), servers[1].heard()];
        run(&engine, "young", "back", &ip);
        engine.docker(["rename", "butler", "burglar"]);
        // The engine deletes them when a container stops in order. One that crashed doesn't.
        for (protocol, port, server, more) in [("udp", 4000, 53, ""), ("tcp", 4001, 80, "--state ESTABLISHED")] {
            let entry =
                format!("-I -p {protocol} -s 10.66.1.100 -d {address} --sport {port} --dport {server} -t 300 -u SEEN_REPLY,ASSURED {more}");
            engine.netns.check(std::process::Command::new("conntrack").args(entry.split_whitespace()));
        }
        let young = &engine.netns_of("young");
        std::thread::scope(|scope| {
            let away = over.saturating_duration_since(Instant::now());
            let lasting = scope.spawn(move || pretend(young, (4000, 4001), udp, tcp, away + Duration::from_secs(3)));
            std::thread::sleep(away);
            match absence {
                Absence::Hung => kill(agent, Signal::SIGCONT).unwrap(),
                Absence::Dead => kill(supervisor, Signal::SIGCONT).unwrap(),
            }
            lasting.join().unwrap();
        });
        assert_eq!([servers[0].heard(), servers[1].heard()], before, "what young sent to udp, tcp");
        let ended = |who: &str, stream: &mut TcpStream| {
            if lab::probe::still_echoes(stream, b"still") { Err(format!("the connection of {who} lives")) } else { Ok(()) }
        };
        eventually(PATIENCE, || ended("who has another name", &mut of_butler));
        eventually(PATIENCE, || ended("whose time is over", &mut of_timed));
    }
}

#[test]
fn nothing_is_inherited_while_the_agent_hangs() {
    nothing_is_inherited(Absence::Hung);
}

#[test]
fn nothing_is_inherited_while_the_agent_is_dead() {
    nothing_is_inherited(Absence::Dead);
}
