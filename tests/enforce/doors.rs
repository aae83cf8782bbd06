//! Roads that never meet forward: container to node, node to container, published ports behind a user-land proxy.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use lab::{Echo, Internet, Netns, Server, needs_root};
use policy::Mode;

use crate::stage::{Policy, apply, enforcer, inventory, published};

#[test]
fn container_to_node_and_node_to_container_are_held_to_the_containers_sides() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let gateways: [IpAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()];
    let _on_host: Vec<_> =
        gateways.iter().flat_map(|&at| [53, 54].map(|port| Server::tcp_echo(&host, SocketAddr::new(at, port)))).collect();
    let _in_a: Vec<_> =
        a.addresses().into_iter().flat_map(|at| [80, 81].map(|port| Server::tcp_echo(&a.netns, SocketAddr::new(at, port)))).collect();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default()
        .mode(Mode::Enforce, &["a"])
        .egress("a", "host:", "tcp/53")
        .ingress("a", "host:", "tcp/80")
        .egress("a", "host:", "icmp/8");
    apply(&mut enforcer, &policy.bind(&inventory));

    for (gateway, own) in gateways.into_iter().zip(a.addresses()) {
        assert!(a.netns.tcp_echo(SocketAddr::new(gateway, 53), b"to the node"), "{gateway}");
        assert!(a.netns.tcp(SocketAddr::new(gateway, 54)).is_refused(), "{gateway}");
        assert!(host.tcp_echo(SocketAddr::new(own, 80), b"from the node"), "{own}");
        assert!(host.tcp(SocketAddr::new(own, 81)).is_refused(), "{own}");
        assert!(b.netns.tcp_echo(SocketAddr::new(gateway, 54), b"in Learn"), "{gateway}");
    }
    assert_eq!(a.netns.ping(gateways[0]), Echo::Answered);
    assert_ne!(host.ping(a.v4.into()), Echo::Answered);
    let own = SocketAddr::new(gateways[0], 53);
    assert!(host.tcp_echo(own, b"the node with itself"));
}

/// What docker-proxy does: accepts on the node, connects to the container from the node.
fn proxy(host: &Netns, at: SocketAddr, to: SocketAddr) -> Server {
    let path = host.path().to_owned();
    Server::tcp(host, at, move |mut client, _| {
        let file = std::fs::File::open(&path).unwrap();
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let Ok(mut server) = TcpStream::connect(to) else { return };
        let mut bytes = [0; 1024];
        while let Ok(n) = client.read(&mut bytes) {
            if n == 0 || server.write_all(&bytes[..n]).is_err() {
                return;
            }
            let Ok(m) = server.read(&mut bytes) else { return };
            if client.write_all(&bytes[..m]).is_err() {
                return;
            }
        }
    })
}

#[test]
fn a_published_port_behind_the_proxy_is_open_to_whom_the_container_allows() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let internet = Internet::behind(&host);
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    inventory.userland_proxy = true;
    inventory.host.insert("203.0.113.2".parse().unwrap());
    inventory.host.insert("2001:db8:ffff::2".parse().unwrap());
    let web = inventory.containers.get_mut("b").unwrap();
    web.published = vec![published("0.0.0.0", 8080, 80), published("::", 8080, 80)];
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    let _proxies = [
        proxy(&host, "0.0.0.0:8080".parse().unwrap(), SocketAddr::new(b.v4.into(), 80)),
        proxy(&host, "[2001:db8:1::1]:8080".parse().unwrap(), SocketAddr::new(b.v6.into(), 80)),
    ];
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));

    let doors: [SocketAddr; 3] = [
        SocketAddr::new(bridge.gateway_v4().into(), 8080),
        "203.0.113.2:8080".parse().unwrap(),
        SocketAddr::new(bridge.gateway_v6().into(), 8080),
    ];
    for door in doors {
        assert!(a.netns.tcp_echo(door, b"allowed"), "{door}");
        assert!(!c.netns.tcp_echo(door, b"not allowed"), "{door}");
    }
    let outside = "203.0.113.2:8080".parse().unwrap();
    assert!(internet.netns.tcp(outside).is_refused(), "nobody outside is allowed");

    let policy = policy.ingress("b", "outside:203.0.113.0/30", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    assert!(internet.netns.tcp_echo(outside, b"allowed now"));

    apply(&mut enforcer, &policy.quarantine("b").bind(&inventory));
    assert!(!internet.netns.tcp_echo(outside, b"cut off"));
    assert!(!a.netns.tcp_echo(doors[0], b"cut off"));
}

#[test]
fn the_nodes_other_traffic_is_not_touched() {
    needs_root!();
    node!(host, bridge: a);
    let mut other = lab::Bridge::new(&host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
    let (x, y) = (other.add("x"), other.add("y"));
    let internet = Internet::behind(&host);
    internet.netns.ip("route add default via 203.0.113.2");
    let inventory = inventory(&[(&bridge, &[("a", &a)])]);
    let _servers = [
        Server::tcp_echo(&host, "0.0.0.0:22".parse().unwrap()),
        Server::tcp_echo(&y.netns, "10.9.0.3:80".parse().unwrap()),
        Server::tcp_echo(&internet.netns, "203.0.113.1:80".parse().unwrap()),
    ];
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a"]).bind(&inventory));

    assert!(internet.netns.tcp_echo("203.0.113.2:22".parse().unwrap(), b"to the node"));
    assert!(host.tcp_echo("203.0.113.1:80".parse().unwrap(), b"from the node"));
    assert!(x.netns.tcp_echo("10.9.0.3:80".parse().unwrap(), b"on a bridge of somebody else"));
    assert!(x.netns.tcp_echo("203.0.113.1:80".parse().unwrap(), b"from there to the outside"));
    assert!(x.netns.tcp_echo("10.9.0.1:22".parse().unwrap(), b"from there to the node"));
}

#[test]
fn a_port_published_by_translation_is_closed_to_the_nodes_own_programs_as_its_container_says() {
    needs_root!();
    node!(host, bridge: a, b);
    let mut inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    inventory.containers.get_mut("b").unwrap().published = vec![published("0.0.0.0", 8080, 80), published("::", 8080, 80)];
    let _servers: Vec<_> = b.addresses().map(|at| Server::tcp_echo(&b.netns, SocketAddr::new(at, 80))).into();
    host.nft(&format!(
        "table inet theirs {{ chain out {{ type nat hook output priority -100; \
         ip daddr {} tcp dport 8080 dnat ip to {}:80; ip6 daddr {} tcp dport 8080 dnat ip6 to [{}]:80; }}; }}",
        bridge.gateway_v4(),
        b.v4,
        bridge.gateway_v6(),
        b.v6
    ));
    let doors: [SocketAddr; 2] = [bridge.gateway_v4().into(), bridge.gateway_v6().into()].map(|at: IpAddr| (at, 8080).into());
    let mut enforcer = enforcer(&host);
    let mut reaches = |policy: &Policy, inventory: &policy::Inventory| {
        apply(&mut enforcer, &policy.bind(inventory));
        doors.map(|door| host.tcp_echo(door, b"of the node's own"))
    };

    let policy = Policy::default().mode(Mode::Enforce, &["b"]);
    assert_eq!(reaches(&Policy::default(), &inventory), [true; 2], "nobody in Enforce");
    assert_eq!(reaches(&policy, &inventory), [false; 2], "nobody is allowed");
    assert_eq!(reaches(&policy.clone().ingress("b", "host:", "tcp/81"), &inventory), [false; 2], "another port is");
    let allowed = policy.clone().ingress("b", "host:", "tcp/80");
    assert_eq!(reaches(&allowed, &inventory), [true; 2]);
    assert_eq!(reaches(&allowed.quarantine("b"), &inventory), [false; 2], "cut off");

    // Beside a proxy, whose leg comes from the node too.
    inventory.userland_proxy = true;
    assert_eq!(reaches(&policy, &inventory), [true; 2]);
    assert_eq!(reaches(&policy.quarantine("b"), &inventory), [false; 2], "cut off");
}
