//! The voting app, unchanged, with stand-ins under its images' names: `vote` pushes to redis, `worker` pops and inserts,
//! `result` asks the database every second and is healthy by nobody's word, redis and db have their health-check scripts.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lab::{Compose, Engine, Frames, Host, Netns, eventually, frame, host};

use crate::oracle::{self, Edge};

const PROJECT: &str = "voting";
const BACK: &str = "voting_back-tier";

/// Brings the app up, makes noise around it, seeds it, and compares what is proposed with what was meant.
pub(crate) fn story(engine: &Engine, folder: &Path) {
    let project = prepare(engine, folder);
    let file = project.join("docker-compose.yml");
    let app = Compose::new(engine, PROJECT, &[&file]).unwrap();
    app.up();
    let bulkhead = Host::on(engine);
    let mut running = bulkhead.up();

    votes(engine, 10);
    noise(engine, &app);
    swap_addresses(engine, &app);
    votes(engine, 10);

    let meant = oracle::edges(folder);
    oracle::exactly(&bulkhead, PROJECT, &meant);

    // The profile `seed` adds one service and one edge.
    app.run(&["--profile", "seed", "up", "-d", "--no-build", "seed"]);
    let with_seed: BTreeSet<Edge> = meant.into_iter().chain([Edge::new("seed", "vote", "tcp/80")]).collect();
    oracle::exactly(&bulkhead, PROJECT, &with_seed);

    assert!(running.ended().is_none(), "bulkhead ended meanwhile:\n{}", bulkhead.said());
    running.stop(Duration::from_secs(10));
}

/// The Compose file, unchanged, in a folder with what it mounts; and images under the names that it and Compose give them.
fn prepare(engine: &Engine, folder: &Path) -> PathBuf {
    let project = engine.dir.join("voting-app");
    let script = |path: &str, text: &str| {
        let path = project.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    fs::create_dir_all(project.join("vote")).unwrap();
    fs::create_dir_all(project.join("result")).unwrap();
    fs::copy(folder.join("docker-compose.yml"), project.join("docker-compose.yml")).unwrap();
    script("healthchecks/redis.sh", "#!/bin/sh\nstandin ask localhost:6379 PING\n");
    script("healthchecks/postgres.sh", "#!/bin/sh\nstandin ask localhost:5432 PING\n");

    // nodemon is the entry point of `result` (it opens the inspector's port too); the seeder posts votes one after the other.
    let scripts: &[(&str, &str)] = &[
        ("curl", "#!/bin/sh\nexec standin curl \"$@\"\n"),
        ("nodemon", "#!/bin/sh\nstandin listen 9229 &\nexec standin result db 80\n"),
        ("seed", "#!/bin/sh\nfor n in 1 2 3 4 5 6 7 8 9 10; do standin post http://vote/ cats; standin post http://vote/ dogs; done\n"),
    ];
    engine.import_program("lab/standin:1", &host::binary("standin"), scripts, &[]);
    let programs = [
        ("vote", r#"["standin","vote","redis"]"#),
        ("result", r#"["nodemon"]"#),
        ("worker", r#"["standin","worker","redis","db"]"#),
        ("seed", r#"["seed"]"#),
    ];
    // Compose 1 joins project and service with an underscore, its successors with a dash.
    let built =
        programs.into_iter().flat_map(|(service, cmd)| [(format!("{PROJECT}-{service}"), cmd), (format!("{PROJECT}_{service}"), cmd)]);
    let pulled = [("redis:alpine", r#"["standin","queue"]"#), ("postgres:15-alpine", r#"["standin","db"]"#)];
    for (image, program) in built.chain(pulled.map(|(image, program)| (image.to_owned(), program))) {
        engine.tag_with("lab/standin:1", &image, &[&format!("CMD {program}")]);
    }
    project
}

fn votes(engine: &Engine, count: usize) {
    let url = "http://127.0.0.1:8080/";
    for _ in 0..count {
        eventually(Duration::from_secs(30), || {
            let out = engine.netns.output(Command::new(host::binary("standin")).args(["post", url, "cats"]));
            if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
        });
    }
}

/// What goes on around an application without being part of it; none of it may become a rule of the app.
fn noise(engine: &Engine, app: &Compose<'_>) {
    engine.docker(["run", "-d", "--name", "stranger", "--network", BACK, "lab/standin:1"]);
    // A connect scan by a stranger, over open and closed ports, and one by a workload of the app itself.
    for server in ["db", "redis", "worker"] {
        engine.exec("stranger", ["standin", "scan", server, "5425", "5440"]);
        engine.exec("stranger", ["standin", "scan", server, "6375", "6385"]);
    }
    app.run(&["exec", "-T", "vote", "standin", "scan", "db", "5425", "5440"]);
    app.run(&["exec", "-T", "vote", "standin", "scan", "redis", "6370", "6378"]);
    // A SYN scan: half-open connections by raw packets, which the kernel of the sender resets.
    for server in ["db", "redis"] {
        syn_scan(engine, "stranger", &app.container(server), 5420..=5440);
        syn_scan(engine, &app.container("worker"), &app.container("vote"), 70..=90);
    }
    // A client that keeps trying a port where nobody listens.
    for _ in 0..10 {
        app.output(&["exec", "-T", "result", "standin", "dial", "redis:6380"]);
    }
}

fn syn_scan(engine: &Engine, from: &str, to: &str, ports: std::ops::RangeInclusive<u16>) {
    let inside: Netns = engine.netns_of(from);
    let frames = Frames::open(&inside, "eth0");
    let (source, target) = (engine.address(from, BACK), engine.address(to, BACK));
    let (from_mac, to_mac) = (engine.mac(from, BACK), engine.mac(to, BACK));
    for port in ports {
        let syn = frame::tcp((source, 40_000 + port), (target, port), 1, 2);
        frames.send(&frame::ethernet(to_mac, from_mac, frame::ETH_IPV4, &frame::ip(source, target, frame::PROTO_TCP, &syn)));
    }
}

/// Stops both servers and starts them in the other order: each gets the other's address.
fn swap_addresses(engine: &Engine, app: &Compose<'_>) {
    let (redis, db) = (app.container("redis"), app.container("db"));
    let addresses = |engine: &Engine| -> [IpAddr; 2] { [engine.address(&redis, BACK), engine.address(&db, BACK)] };
    let before = addresses(engine);
    engine.docker(["stop", "-t", "0", &redis, &db]);
    engine.docker(["start", if before[0] < before[1] { &db } else { &redis }]);
    engine.docker(["start", &redis, &db]);
    let after = addresses(engine);
    assert_eq!([after[1], after[0]], before, "the engine gives the lowest free address first");
}
