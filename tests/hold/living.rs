//! Enforce switched on while connections live.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use lab::{Netns, Server, eventually};

use crate::hands::{bound, converse};
use crate::stage::{PATIENCE, enforce, known, network, run, stage};

/// Talks without being asked, as a stream of quotes does; hangs up when it is stopped.
fn talker(inside: &Netns, at: SocketAddr) -> Server {
    Server::tcp(inside, at, |mut stream, ended| {
        while !ended.load(std::sync::atomic::Ordering::Relaxed) && stream.write_all(b"tick\n").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    })
}

/// How many bytes arrive within this time.
fn arriving(stream: &mut TcpStream, time: Duration) -> usize {
    let (end, mut bytes, mut count) = (Instant::now() + time, [0; 4096], 0);
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while Instant::now() < end {
        match stream.read(&mut bytes) {
            Ok(0) => std::thread::sleep(Duration::from_millis(50)),
            Ok(n) => count += n,
            Err(_) => {}
        }
    }
    count
}

#[test]
fn enforce_ends_the_living_connections_that_are_not_allowed_on_every_road_and_no_others() {
    stage!(stage);
    let (engine, host) = (&stage.engine, stage.host());
    network(engine, "move", 50);
    run(engine, "store", "move", &["-p", "9090:90", "-p", "9080:80", "-p", "9053:53/udp"]);
    for name in ["caller", "lurker"] {
        run(engine, name, "move", &[]);
    }
    known(&host, &["store", "caller", "lurker"]);
    host.bulkhead(["allow", "caller", "store", "tcp/90"]);
    host.bulkhead(["allow", "caller", "store", "tcp/80"]);
    host.bulkhead(["allow", "caller", "store", "udp/53"]);
    host.bulkhead(["allow", "caller", "store", "udp/54"]);
    let inside = stage.inside("store");
    let any = |port: u16| SocketAddr::new("::".parse().unwrap(), port);
    let _servers = [talker(&inside, any(90)), Server::tcp_echo(&inside, any(80)), Server::udp_echo(&inside, any(53))];

    let own = [engine.address("store", "move"), engine.address_v6("store", "move")];
    let gateways = stage.addresses_of_host("br-move");
    let [v4, v6] = [gateways[0], *gateways.iter().find(|a| a.to_string().starts_with("fd00")).unwrap()];
    let up: Vec<_> = stage.addresses_of_host("up0").into_iter().filter(|a| !a.to_string().starts_with("fe80")).collect();
    let direct = |port| own.map(|address| SocketAddr::new(address, port)).to_vec();
    let at = |port: u16, addresses: &[IpAddr]| -> Vec<SocketAddr> {
        let carried = addresses.iter().filter(|address| address.is_ipv4() || stage.publishes_v6());
        carried.map(|address| SocketAddr::new(*address, port)).collect()
    };
    let from_outside = |port| at(port, &up);
    let by_host = |port| [at(port, &[v4, v6]), from_outside(port)].concat();
    let roads = |inner: u16, outer: u16| [direct(inner), by_host(outer)].concat();
    let connect = |inside: &Netns, to: &SocketAddr| (*to, eventually(PATIENCE, || inside.connect(*to, Duration::from_secs(1))));

    let [caller, lurker] = ["caller", "lurker"].map(|name| stage.inside(name));
    let mut allowed: Vec<_> = roads(90, 9090).iter().map(|to| connect(&caller, to)).collect();
    let mut idle: Vec<_> = roads(80, 9080).iter().map(|to| connect(&caller, to)).collect();
    let mut denied: Vec<_> = roads(90, 9090).iter().map(|to| connect(&lurker, to)).collect();
    denied.extend(from_outside(9090).iter().map(|to| connect(&stage.internet.netns, to)));
    let mut quiet: Vec<_> = roads(80, 9080).iter().map(|to| connect(&lurker, to)).collect();
    quiet.extend(from_outside(9080).iter().map(|to| connect(&stage.internet.netns, to)));
    for (to, stream) in allowed.iter_mut().chain(&mut denied) {
        assert!(arriving(stream, Duration::from_millis(300)) > 0, "under Learn, by {to}");
    }
    for (to, stream) in idle.iter_mut().chain(&mut quiet) {
        assert!(lab::probe::still_echoes(stream, b"under Learn"), "by {to}");
    }
    let (mine, theirs) = (bound(&caller, 4000), bound(&lurker, 4000));
    let asked = SocketAddr::new(own[0], 53);
    converse(&mine, asked);
    converse(&theirs, asked);
    // Asked once, a server that goes on telling without being asked again.
    let subscriber = bound(&caller, 4001);
    let telling = inside.run(|| UdpSocket::bind((own[0], 54))).unwrap();
    telling.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let asks = || subscriber.send_to(b"tell me", (own[0], 54)).and_then(|_| telling.recv_from(&mut [0; 64]));
    let reader = eventually(PATIENCE, asks).1;
    eventually(PATIENCE, || telling.send_to(b"under Learn", reader).and_then(|_| subscriber.recv(&mut [0; 64])));
    // Whatever else was told under Learn.
    while subscriber.recv(&mut [0; 64]).is_ok() {}

    enforce(&host, "move", &["store", "caller", "lurker"]);
    std::thread::sleep(Duration::from_millis(500));
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        let listening: Vec<_> = denied
            .iter_mut()
            .map(|(to, stream)| {
                scope.spawn(move || {
                    // What the server may send without hearing from the client, a window, still comes.
                    let end = Instant::now() + PATIENCE / 2;
                    let mut bytes = 1;
                    while bytes > 0 && Instant::now() < end {
                        bytes = arriving(stream, Duration::from_secs(2));
                    }
                    (*to, bytes)
                })
            })
            .collect();
        for one in listening {
            let (to, bytes) = one.join().unwrap();
            if bytes > 0 {
                wrong.push(format!("{bytes} bytes came after Enforce by {to}"));
            }
        }
    });
    std::thread::scope(|scope| {
        let asked: Vec<_> =
            quiet.iter_mut().map(|(to, stream)| (*to, scope.spawn(|| lab::probe::still_echoes(stream, b"under Enforce")))).collect();
        for (to, echoes) in asked {
            if echoes.join().unwrap() {
                wrong.push(format!("a quiet connection by {to} still echoes"));
            }
        }
    });
    for (to, stream) in &mut allowed {
        if arriving(stream, Duration::from_millis(500)) == 0 {
            wrong.push(format!("the allowed one by {to} was cut"));
        }
    }
    for (to, stream) in &mut idle {
        if !lab::probe::still_echoes(stream, b"still mine") {
            wrong.push(format!("the allowed idle one by {to} was cut"));
        }
    }
    let told = || telling.send_to(b"under Enforce", reader).and_then(|_| subscriber.recv(&mut [0; 64])).is_ok();
    if !(0..10).any(|_| told()) {
        wrong.push("the allowed one was not told more before it asked again".to_owned());
    }
    converse(&mine, asked);
    theirs.send_to(b"more", asked).unwrap();
    let mut answer = [0; 64];
    while let Ok(length) = theirs.recv(&mut answer) {
        if answer[..length] == *b"more" {
            wrong.push("the conversation goes on".to_owned());
            break;
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
    engine.docker(["rm", "-f", "store", "caller", "lurker"]);
    engine.docker(["network", "rm", "move"]);
}
