//! Addresses, names and networks that pass from hand to hand while connections live.

use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use lab::{Netns, Server, eventually};

use crate::stage::{PATIENCE, enforce, known, run, stage};

/// A UDP socket on a port of this namespace.
pub(crate) fn bound(inside: &Netns, port: u16) -> UdpSocket {
    let socket = inside.run(|| UdpSocket::bind(("0.0.0.0", port))).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

/// A datagram and its echo, several times: the connection is a conversation (ASSURED).
pub(crate) fn converse(socket: &UdpSocket, to: SocketAddr) {
    eventually(PATIENCE, || {
        let mut answer = [0; 64];
        let mut once = || socket.send_to(b"hello", to).and_then(|_| socket.recv(&mut answer));
        once().map(|_| ())
    });
    // Each turn by its own word: one that is repeated has two answers.
    for turn in 0..3_u8 {
        eventually(PATIENCE, || {
            socket.send_to(&[turn; 5], to)?;
            let mut answer = [0; 64];
            loop {
                let length = socket.recv(&mut answer)?;
                if answer[..length] == [turn; 5] {
                    return Ok::<_, std::io::Error>(());
                }
            }
        });
    }
}

/// A TCP connection from a port of this namespace.
pub(crate) fn connect_from(inside: &Netns, port: u16, to: SocketAddr, patience: Duration) -> std::io::Result<TcpStream> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse().unwrap() } else { "[::]:0".parse().unwrap() };
    inside.run(|| {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt};
        use std::os::fd::AsRawFd;
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        let pause = nix::sys::time::TimeVal::new(patience.as_secs().cast_signed(), i64::from(patience.subsec_micros()));
        setsockopt(&fd, sockopt::SendTimeout, &pause)?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any.ip(), port)))?;
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(Duration::from_millis(900)))?;
        Ok(stream)
    })
}

/// Sends from the predecessor's ports as fast as it may, for a while.
pub(crate) fn pretend(inside: &Netns, ports: (u16, u16), udp: SocketAddr, tcp: SocketAddr, time: Duration) {
    let socket = bound(inside, ports.0);
    let end = Instant::now() + time;
    let connecting = inside.run(|| {
        std::thread::scope(|scope| {
            let tcp = scope.spawn(|| {
                while Instant::now() < end {
                    let _ = connect_from(inside, ports.1, tcp, Duration::from_millis(50));
                }
            });
            while Instant::now() < end {
                let _ = socket.send_to(b"inherited", udp);
                std::thread::sleep(Duration::from_micros(300));
            }
            tcp.join()
        })
    });
    connecting.unwrap();
}

#[test]
fn who_gets_the_address_of_a_stopped_container_gets_none_of_its_connections() {
    stage!(stage);
    let (engine, host) = (&stage.engine, stage.host());
    let ip = ["--ip", "10.66.1.100"];
    run(engine, "vault", "back", &[]);
    run(engine, "elder", "back", &ip);
    known(&host, &["vault", "elder"]);
    host.bulkhead(["allow", "elder", "vault", "udp/53"]);
    host.bulkhead(["allow", "elder", "vault", "tcp/80"]);
    enforce(&host, "vault", &["vault"]);
    let inside = stage.inside("vault");
    let address: IpAddr = engine.address("vault", "back");
    let (udp, tcp) = (SocketAddr::new(address, 53), SocketAddr::new(address, 80));
    let servers = [Server::udp_echo(&inside, udp), Server::tcp_echo(&inside, tcp)];
    {
        let elder = stage.inside("elder");
        converse(&bound(&elder, 4000), udp);
        let mut stream = eventually(PATIENCE, || connect_from(&elder, 4001, tcp, Duration::from_secs(1)));
        assert!(lab::probe::still_echoes(&mut stream, b"mine"));
        engine.docker(["kill", "elder"]);
    }
    let before = [servers[0].heard(), servers[1].heard()];
    run(engine, "young", "back", &ip);
    pretend(&stage.inside("young"), (4000, 4001), udp, tcp, Duration::from_secs(2));
    assert_eq!([servers[0].heard(), servers[1].heard()], before, "udp, tcp");
    engine.docker(["rm", "-f", "young", "elder", "vault"]);
}

#[test]
fn who_is_renamed_keeps_none_of_the_connections_that_the_old_name_allowed() {
    stage!(stage, alone);
    let (engine, host) = (&stage.engine, stage.host());
    run(engine, "chest", "back", &[]);
    run(engine, "butler", "back", &[]);
    known(&host, &["chest", "butler"]);
    host.bulkhead(["allow", "butler", "chest", "tcp/80"]);
    enforce(&host, "chest", &["chest"]);
    let inside = stage.inside("chest");
    let tcp = SocketAddr::new(engine.address("chest", "back"), 80);
    let _server = Server::tcp_echo(&inside, tcp);
    let butler = stage.inside("butler");
    let mut stream = eventually(PATIENCE, || butler.connect(tcp, Duration::from_secs(1)));
    assert!(lab::probe::still_echoes(&mut stream, b"mine"));
    engine.docker(["rename", "butler", "burglar"]);
    known(&host, &["burglar"]);
    eventually(
        Duration::from_secs(5),
        || if lab::probe::still_echoes(&mut stream, b"still") { Err("the connection lives") } else { Ok(()) },
    );
    assert!(!butler.tcp(tcp).is_open());
    engine.docker(["rm", "-f", "burglar", "chest"]);
}

#[test]
fn a_container_in_enforce_that_joins_an_open_network_keeps_no_connection_from_before_it_was_bound() {
    stage!(stage, alone);
    let (engine, host) = (&stage.engine, stage.host());
    crate::stage::network(engine, "plaza", 40);
    run(engine, "visitor", "plaza", &[]);
    run(engine, "convict", "back", &[]);
    enforce(&host, "convict", &["convict"]);
    let tcp = SocketAddr::new(engine.address("visitor", "plaza"), 80);
    let _server = Server::tcp_echo(&stage.inside("visitor"), tcp);
    let convict = stage.inside("convict");
    eventually(PATIENCE, || if convict.tcp(tcp).is_open() { Err("not in force yet") } else { Ok(()) });
    let mut kept: Vec<TcpStream> = Vec::new();
    std::thread::scope(|scope| {
        let joining = scope.spawn(|| engine.docker(["network", "connect", "plaza", "convict"]));
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            if kept.len() < 20 {
                kept.extend(convict.connect(tcp, Duration::from_millis(30)));
            }
        }
        joining.join().unwrap();
    });
    eventually(PATIENCE, || if convict.tcp(tcp).is_open() { Err("not bound yet") } else { Ok(()) });
    let made = kept.len();
    let asked: Vec<_> =
        kept.into_iter().map(|mut stream| std::thread::spawn(move || lab::probe::still_echoes(&mut stream, b"still"))).collect();
    let living = asked.into_iter().map(|one| one.join().unwrap()).filter(|alive| *alive).count();
    assert_eq!(living, 0, "of {made} that were made before it was bound");
    engine.docker(["rm", "-f", "convict", "visitor"]);
    engine.docker(["network", "rm", "plaza"]);
}
