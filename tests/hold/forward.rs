//! A container on two networks that passes packets on between them.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use lab::frame::{self, Frames};
use lab::{Server, eventually};

use crate::stage::{PATIENCE, stage};

#[test]
fn a_container_that_forwards_is_a_finding_and_what_it_forwards_is_counted_as_spoofed() {
    stage!(stage);
    let (engine, host) = (&stage.engine, stage.host());
    let (dual, passer) = (stage.inside("dual"), stage.inside("passer"));
    // Engines from 28 on drop what goes to another network's container before anybody forwards it; not what goes outside.
    let outside: SocketAddr = "203.0.113.1:9".parse().unwrap();
    let quiet = || {
        let status = host.bulkhead(["status"]);
        if status.contains("a router:") { Err(status) } else { Ok(()) }
    };
    eventually(PATIENCE, quiet);
    assert!(!host.bulkhead(["describe", "suggestion", "dual"]).contains("passes packets on"), "two legs alone are no finding");

    let heard = Server::udp_echo(&stage.internet.netns, outside);
    dual.set_sysctl("net.ipv4.ip_forward", "1");
    dual.set_sysctl("net.ipv4.conf.all.rp_filter", "0");
    let router = engine.address("dual", "free");
    let routes = |what: &str| {
        for (inside, via) in [(&passer, router), (&dual, "10.66.1.1".parse().unwrap())] {
            let words = format!("route {what} {}/32 via {via}", outside.ip());
            inside.check(Command::new("ip").args(words.split(' ')));
        }
    };
    routes("add");
    eventually(PATIENCE, || {
        passer.udp_send(outside, b"passed on");
        let status = host.bulkhead(["status"]);
        let router = status.contains("a router: dual (dual) passes packets on between its networks back, free");
        let spoofed = status.lines().any(|line| line.contains("of dual: sent from an address that is not the sender's own"));
        if router && spoofed { Ok(()) } else { Err(status) }
    });
    eventually(PATIENCE, || {
        let said = host.bulkhead(["describe", "suggestion", "dual"]);
        if said.contains("dual passes packets on between its networks (back, free)") { Ok(()) } else { Err(said) }
    });
    assert_eq!(heard.heard(), 0, "nothing of it arrives");
    routes("del");
}

#[test]
fn spoofed_packets_are_counted_to_the_packet_by_the_workload_that_sent_them() {
    stage!(stage);
    let (engine, host) = (&stage.engine, stage.host());
    let db = stage.db(53);
    let count = |status: &str| -> u64 {
        let line = status.lines().find(|line| line.contains("of hostile: sent from an address that is not the sender's own"));
        let packets = line.and_then(|line| line.trim().strip_prefix("denied ")?.split(' ').next()).map(|n| n.replace(',', ""));
        packets.map_or(0, |packets| packets.parse().unwrap())
    };
    let before = count(&host.bulkhead(["status"]));
    let wire = Frames::open(&stage.inside("hostile"), "eth0");
    let (own, theirs, web): (_, _, IpAddr) = (engine.mac("hostile", "back"), engine.mac("db", "back"), engine.address("web", "back"));
    let udp = frame::udp((web, 4000), (db.ip(), 53), b"as if it were web");
    for mac in [own, engine.mac("web", "back")] {
        let forged = frame::ethernet(theirs, mac, frame::ETH_IPV4, &frame::ip(web, db.ip(), frame::PROTO_UDP, &udp));
        (0..50).for_each(|_| wire.send(&forged));
    }
    let claim = frame::arp_reply(own, "10.66.1.1".parse().unwrap(), theirs, "10.66.1.2".parse().unwrap());
    (0..11).for_each(|_| wire.send(&frame::ethernet(theirs, own, frame::ETH_ARP, &claim)));
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if count(&status) == before + 111 { Ok(()) } else { Err(format!("{before} before: {status}")) }
    });
    eventually(PATIENCE, || {
        let flows = host.bulkhead(["flows", "--verdict", "deny"]);
        let told = flows.lines().any(|line| line.contains("hostile") && line.contains("sent from an address that is not the sender's own"));
        if told { Ok(()) } else { Err(flows) }
    });
}
