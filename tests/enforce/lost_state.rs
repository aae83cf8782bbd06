//! DESIGN "Lost state": the kernel's table of connections is gone, what is allowed goes on.

use std::io::Read;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use lab::frame::{self, Frames};
use lab::probe::still_echoes;
use lab::{Server, needs_root};
use policy::Mode;

use crate::hostile::udp;
use crate::stage::{Policy, apply, enforcer, inventory};

#[test]
fn a_flushed_connection_table_cuts_nothing_that_is_allowed_even_if_the_server_speaks_first() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let talk = |stream: &mut std::net::TcpStream| {
        use std::io::Write;
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(100));
            if stream.write_all(b"tick\n").is_err() {
                return;
            }
        }
    };
    let servers: Vec<_> = b
        .addresses()
        .into_iter()
        .flat_map(|at| {
            [
                Server::tcp_echo(&b.netns, SocketAddr::new(at, 80)),
                Server::tcp(&b.netns, SocketAddr::new(at, 81), move |mut stream, _| talk(&mut stream)),
            ]
        })
        .collect();
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").allow("a", "b", "tcp/81");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        let mut asked = a.netns.connect(SocketAddr::new(at, 80), lab::probe::PATIENCE).unwrap();
        let mut told = a.netns.connect(SocketAddr::new(at, 81), lab::probe::PATIENCE).unwrap();
        assert!(still_echoes(&mut asked, b"before"));
        let mut tick = [0; 5];
        told.read_exact(&mut tick).unwrap();

        host.check(Command::new("conntrack").arg("-F"));

        assert!(still_echoes(&mut asked, b"after the flush"), "{at}");
        for _ in 0..3 {
            told.read_exact(&mut tick).unwrap();
        }
    }
    drop(servers);
}

#[test]
fn an_answer_passes_only_as_an_answer() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80");
    apply(&mut enforcer, &policy.bind(&inventory));
    let (wire, far) = (Frames::open(&b.netns, "eth0"), Frames::open(&a.netns, "eth0"));
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    const FIN: u8 = 1;
    const URG: u8 = 32;

    for n in 0..2 {
        let (server, client) = (b.addresses()[n], a.addresses()[n]);
        let kind = if n == 0 { frame::ETH_IPV4 } else { frame::ETH_IPV6 };
        for (name, from_port, flags, passes) in [
            ("an answer", 80, ACK, true),
            ("a request from the server's port", 80, SYN, false),
            ("an answer to a request nobody made", 80, SYN | ACK, false),
            ("a reset", 80, RST, false),
            ("the end of an answer", 80, FIN | ACK, true),
            ("an end without acknowledgment, which asks for open ports", 80, FIN, false),
            ("no flags, which asks the same", 80, 0, false),
            ("all but an acknowledgment, which asks the same", 80, FIN | URG, false),
            ("from another port", 81, ACK, false),
        ] {
            let sequence = 0x1ab0_0000 + u32::from(from_port) * 256 + u32::from(flags);
            let segment = frame::tcp((server, from_port), (client, 40000 + u16::from(flags)), sequence, flags);
            wire.send(&frame::ethernet(a.mac, b.mac, kind, &frame::ip(server, client, frame::PROTO_TCP, &segment)));
            let seen = far.sees(Duration::from_millis(300), &sequence.to_be_bytes());
            assert_eq!(seen, passes, "{name}, {server}");
        }
    }
}

#[test]
fn a_server_opens_no_connection_in_the_place_of_one_that_lives_or_has_ended() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "tcp/80").bind(&inventory));
    let (wire, far) = (Frames::open(&b.netns, "eth0"), Frames::open(&a.netns, "eth0"));
    let mut sequence = 0x2ab0_0000_u32;
    for (client, at) in a.addresses().into_iter().zip(b.addresses()) {
        let _server = Server::tcp_echo(&b.netns, SocketAddr::new(at, 80));
        let mut stream = a.netns.connect(SocketAddr::new(at, 80), lab::probe::PATIENCE).unwrap();
        assert!(still_echoes(&mut stream, b"lives"), "{at}");
        let port = stream.local_addr().unwrap().port();
        let mut request = |name: &str| {
            sequence += 0x1_0000;
            let segment = frame::tcp((at, 80), (client, port), sequence, 2);
            wire.send(&frame::ethernet(a.mac, b.mac, crate::hostile::kind(at), &frame::ip(at, client, frame::PROTO_TCP, &segment)));
            assert!(!far.sees(Duration::from_millis(300), &sequence.to_be_bytes()), "{name}: {at}");
        };
        request("while it lives");
        assert!(still_echoes(&mut stream, b"lives on"), "{at}");
        drop(stream);
        std::thread::sleep(Duration::from_millis(200));
        request("when it has ended");
        request("again");
    }
}

#[test]
fn a_udp_answer_passes_after_its_connection_expired_and_only_to_who_asked() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &policy.bind(&inventory));

    for at in b.addresses() {
        let server = b.netns.udp_socket(SocketAddr::new(at, 53));
        drop(server);
        let server = b.netns.run(|| std::net::UdpSocket::bind(SocketAddr::new(at, 53)).unwrap());
        server.set_read_timeout(Some(lab::probe::PATIENCE)).unwrap();
        let client = a.netns.udp_socket(SocketAddr::new(at, 53));
        client.send_to(b"question", SocketAddr::new(at, 53)).unwrap();
        let mut buffer = [0; 64];
        let (_, from) = server.recv_from(&mut buffer).unwrap();

        // What the kernel does by itself after 30 to 120 s.
        host.check(Command::new("conntrack").arg("-F"));
        server.send_to(b"late answer", from).unwrap();
        assert!(client.recv(&mut buffer).is_ok(), "{at}");

        host.check(Command::new("conntrack").arg("-F"));
        let other = SocketAddr::new(from.ip(), from.port().wrapping_add(1).max(1024));
        let uninvited = a.netns.run(|| std::net::UdpSocket::bind(other).unwrap());
        uninvited.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        server.send_to(b"uninvited", other).unwrap();
        assert!(uninvited.recv(&mut buffer).is_err(), "nobody asked from that port: {at}");
    }
}

#[test]
fn a_flood_of_udp_keeps_no_late_answer_of_others_from_passing() {
    needs_root!();
    node!(host, bridge: a, b, thief; audited: x, y);
    let all = [("a", &a), ("b", &b), ("thief", &thief)];
    let inventory = inventory(&[(&bridge, &all), (&audited, &[("x", &x), ("y", &y)])]);
    let mut enforcer = enforcer(&host);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "thief"]).mode(Mode::Audit, &["x", "y"]).allow("a", "b", "udp/53");
    apply(&mut enforcer, &policy.allow("thief", "b", "udp/53-54").bind(&inventory));
    let [wire, one] = [&thief, &x].map(|member| Frames::open(&member.netns, "eth0"));
    // More than are known at a time: from one's own address, and where nobody is guarded from any.
    for n in 0..70_000_u32 {
        let (own, [_, _, high, low]) = (1 + (n % 65_000) as u16, n.to_be_bytes());
        wire.send(&udp(thief.mac, b.mac, (thief.v4.into(), own), (b.v4.into(), 53 + (n / 65_000) as u16), b"flood"));
        let anybody = std::net::Ipv4Addr::new(192, 0, high, low);
        one.send(&udp(x.mac, y.mac, (anybody.into(), own), (y.v4.into(), 53 + (n / 65_000) as u16), b"flood"));
    }
    host.check(Command::new("conntrack").arg("-F"));
    let [near, far] = [&a, &b].map(|member| Frames::open(&member.netns, "eth0"));
    let (question, answer) = (b"lab-the-question", b"lab-a-late-answer");
    near.send(&udp(a.mac, b.mac, (a.v4.into(), 5000), (b.v4.into(), 53), question));
    assert!(far.sees(Duration::from_secs(5), question));
    host.check(Command::new("conntrack").arg("-F"));
    far.send(&udp(b.mac, a.mac, (b.v4.into(), 53), (a.v4.into(), 5000), answer));
    assert!(near.sees(Duration::from_secs(5), answer));
}

#[test]
fn what_is_denied_takes_no_room_in_the_connection_table() {
    needs_root!();
    node!(host, bridge: a, b);
    let inventory = inventory(&[(&bridge, &[("a", &a), ("b", &b)])]);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &Policy::default().mode(Mode::Enforce, &["a", "b"]).allow("a", "b", "udp/53").bind(&inventory));
    let (wire, far) = (Frames::open(&a.netns, "eth0"), Frames::open(&b.netns, "eth0"));
    for (from, to) in a.addresses().into_iter().zip(b.addresses()) {
        for port in 1000..2000 {
            wire.send(&udp(a.mac, b.mac, (from, port), (to, 54), b"denied"));
        }
        wire.send(&udp(a.mac, b.mac, (from, 5000), (to, 53), b"lab-allowed"));
        assert!(far.sees(Duration::from_secs(5), b"lab-allowed"), "{to}");
        let known = host.check(Command::new("conntrack").args(["-L", "-p", "udp", "-d", &to.to_string()]).args(if to.is_ipv4() {
            ["-f", "ipv4"]
        } else {
            ["-f", "ipv6"]
        }));
        assert_eq!(known.lines().count(), 1, "{known}");
    }
}
