//! Published ports: every road to them, every sender that the container behind them doesn't allow.

use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::Netns;
use nix::net::if_::if_nametoindex;

use crate::stage::{Stage, stage};

/// An address as somebody in this namespace has to write it: a link-local one with the interface.
fn scoped(inside: &Netns, interface: &str, address: IpAddr, port: u16) -> SocketAddr {
    match address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_multicast() => {
            let index = inside.run(|| if_nametoindex(interface)).unwrap();
            SocketAddrV6::new(v6, port, 0, index).into()
        }
        other => SocketAddr::new(other, port),
    }
}

/// Sends a datagram to an address that need not be anybody's; what the kernel of the sender says to it is no matter.
fn shout(inside: &Netns, to: SocketAddr) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = inside.run(|| UdpSocket::bind(any)).unwrap();
    socket.set_broadcast(true).unwrap();
    let _ = socket.send_to(b"shouted", to);
}

const STRANGERS: [(&str, &[(&str, &str)]); 5] = [
    ("hostile", &[("br-back", "eth0")]),
    ("guest", &[("br-back", "eth0")]),
    ("stranger", &[("br-side", "eth0")]),
    ("passer", &[("br-free", "eth0")]),
    ("dual", &[("br-back", "eth0"), ("br-free", "eth1")]),
];

fn doors(stage: &Stage) -> Vec<IpAddr> {
    ["br-back", "br-side", "br-free", "up0"].iter().flat_map(|interface| stage.addresses_of_host(interface)).collect()
}

/// The namespaces that may not, with the interface of each that leads to the address.
fn knock(stage: &Stage, at: impl Fn(&Netns, &str, IpAddr) + Sync) {
    let doors = doors(stage);
    thread::scope(|scope| {
        for (name, legs) in STRANGERS {
            for door in &doors {
                let at = &at;
                scope.spawn(move || {
                    let inside = stage.inside(name);
                    for (_, interface) in legs {
                        at(&inside, interface, *door);
                    }
                });
            }
        }
        for door in &doors {
            let at = &at;
            scope.spawn(move || at(&stage.internet.netns, "down0", *door));
        }
    });
}

#[test]
fn a_published_tcp_port_is_closed_to_whom_the_container_does_not_allow_by_every_road() {
    stage!(stage);
    let before = stage.heard()[0];
    let through = std::sync::Mutex::new(Vec::new());
    for port in [8080, 8081, 8082] {
        knock(&stage, |inside, interface, door| {
            let to = scoped(inside, interface, door, port);
            if inside.tcp(to).is_open() {
                // docker-proxy accepts before it asks the container: what counts is whether bytes come back.
                let heard = inside.tcp_echo(to, b"through");
                if heard || to.is_ipv4() || stage.publishes_v6() {
                    through.lock().unwrap().push(format!("{} by {to}: echoed {heard}", inside.name()));
                }
            }
        });
    }
    assert_eq!(*through.lock().unwrap(), Vec::<String>::new());
    assert_eq!(stage.heard()[0], before);
}

#[test]
fn a_published_udp_port_hears_nobody_else_neither_by_broadcast_nor_by_multicast() {
    stage!(stage);
    let before = stage.heard()[1];
    let everybody: Vec<IpAddr> =
        ["255.255.255.255", "224.0.0.1", "ff02::1", "127.0.0.1"].iter().map(|text| text.parse().unwrap()).collect();
    let mut through = Vec::new();
    let mut tried = |name: &str, inside: &Netns, interface: &str, door: IpAddr, count: u64| {
        shout(inside, scoped(inside, interface, door, 5353));
        thread::sleep(Duration::from_millis(30));
        let now = stage.heard()[1];
        if now != count {
            through.push(format!("{name} by {door}"));
        }
        now
    };
    let mut count = before;
    for (name, legs) in STRANGERS {
        let inside = stage.inside(name);
        for (_, interface) in legs {
            let net = inside.check(std::process::Command::new("ip").args(["-o", "-4", "addr", "show", "dev", interface]));
            let broadcast = net.split_whitespace().skip_while(|w| *w != "brd").nth(1).unwrap_or("255.255.255.255").parse().unwrap();
            for door in doors(&stage).into_iter().chain(everybody.clone()).chain([broadcast]) {
                count = tried(name, &inside, interface, door, count);
            }
        }
    }
    for door in doors(&stage).into_iter().chain(everybody).chain(["203.0.113.3".parse().unwrap()]) {
        count = tried("internet", &stage.internet.netns, "down0", door, count);
    }
    assert_eq!(through, Vec::<String>::new());
}
