//! A container that goes to ever new places: what watches it must not grow without end, nor lose what it really uses.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use lab::{Host, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};
use policy::graph::ATTEMPTS;

use crate::deaths::agent;
use crate::stage::{PATIENCE, engine, known, network, run};

/// Edges of `noisy` that came to nothing, and what it carried data by.
fn listed(host: &Host<'_>) -> (usize, Vec<String>) {
    let graph: serde_json::Value = serde_json::from_str(&host.bulkhead(["graph", "-o", "json"])).unwrap();
    let edges = graph["edges"].as_array().unwrap().iter().filter(|edge| edge["from"] == "noisy");
    let (used, tried): (Vec<_>, Vec<_>) = edges.partition(|edge| edge["evidence"]["established"] != 0);
    (tried.len(), used.iter().map(|edge| edge["service"].as_str().unwrap().to_owned()).collect())
}

#[test]
fn who_tries_ever_new_ports_is_told_and_takes_a_bounded_place_also_when_the_agent_begins_anew() {
    let _limit = limit(Duration::from_secs(180));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    network(&engine, "back", 1);
    for name in ["noisy", "quiet"] {
        run(&engine, name, "back", &[]);
    }
    let host = Host::on(&engine);
    let up = host.up();
    known(&host, &["noisy", "quiet"]);
    let (noisy, quiet) = (engine.netns_of("noisy"), engine.address("quiet", "back"));
    let refused = |ports: std::ops::Range<u16>| {
        noisy.run(|| {
            for port in ports {
                assert!(TcpStream::connect(SocketAddr::new(quiet, port)).is_err());
            }
        });
    };
    let full = |what: &str| {
        eventually(PATIENCE, || {
            let status = host.bulkhead(["status"]);
            let (tried, _) = listed(&host);
            let told = status.contains("of noisy there are more peers than the graph lists");
            if tried >= ATTEMPTS && told { Ok(()) } else { Err(format!("{what}: {tried} listed\n{status}")) }
        });
    };

    refused(10_000..15_000);
    full("after 5,000 ports");
    let dead = agent(&up);
    kill(dead, Signal::SIGKILL).unwrap();
    eventually(PATIENCE, || if agent(&up) == dead { Err("the old agent") } else { Ok(()) });
    eventually(PATIENCE, || host.is_connected(|_| true));
    // It is connected before it observes.
    eventually(PATIENCE, || {
        refused(20_000..26_000);
        let status = host.bulkhead(["status"]);
        if status.contains("of noisy there are more peers than the graph lists") { Ok(()) } else { Err(status) }
    });
    full("with another agent");

    let _server = Server::tcp_echo(&engine.netns_of("quiet"), SocketAddr::new(quiet, 80));
    let mut stream = noisy.connect(SocketAddr::new(quiet, 80), Duration::from_secs(5)).unwrap();
    assert!(lab::probe::still_echoes(&mut stream, b"used"));
    eventually(PATIENCE, || match listed(&host) {
        (_, used) if used == ["tcp/80"] => Ok(()),
        other => Err(format!("{other:?}")),
    });
    // A batch is looked at as it comes, not edge by edge.
    let (tried, _) = listed(&host);
    assert!(tried < ATTEMPTS + 1000, "{tried}");
}
