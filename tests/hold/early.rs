//! Lives that are short, broken or heard of late: whatever becomes of a start, what is bound is what the engine says.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Engine, Host, Server, eventually, limit};
use nix::sys::signal::{Signal, kill};

use crate::deaths::agent;
use crate::stage::{PATIENCE, enforce, engine, known, network, reaches, run};

/// What is bound at a port of the guarded network: `veth`, MAC address, IPv4 address.
type Held = BTreeSet<(String, String, String)>;

/// What is done, and its name.
type Deed<'a> = (&'static str, Box<dyn Fn() + 'a>);

/// In the kernel.
pub(crate) fn held(engine: &Engine) -> Held {
    // Refused where the tables are changed meanwhile.
    let whole: serde_json::Value = eventually(PATIENCE, || {
        let out = engine.netns.output(Command::new("nft").args(["-j", "list", "set", "bridge", "bulkhead", "own4"]));
        serde_json::from_slice(&out.stdout).map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&out.stderr)))
    });
    let sets = whole["nftables"].as_array().unwrap().iter().filter_map(|object| object["set"]["elem"].as_array());
    let triple = |element: &serde_json::Value| {
        let key = if element["elem"].is_object() { &element["elem"]["val"]["concat"] } else { &element["concat"] };
        let part = |n: usize| key[n].as_str().unwrap().to_owned();
        (part(0), part(1), part(2))
    };
    // Who is on a guarded network is bound on its others too.
    sets.flatten().map(triple).filter(|(_, _, address)| address.starts_with("10.66.1.")).collect()
}

/// By the engine's word, and the ports by the namespace of each container.
fn told(engine: &Engine, network: &str) -> Option<Held> {
    let ids = engine.docker(["ps", "-q", "--no-trunc"]);
    let ports = engine.netns.ip("-o link show type veth");
    let mut all = Held::new();
    for id in ids.split_whitespace() {
        let format = format!(
            "{{{{.State.Pid}}}} {{{{with index .NetworkSettings.Networks {network:?}}}}}{{{{.MacAddress}}}} {{{{.IPAddress}}}}{{{{end}}}}"
        );
        let out = engine.try_docker(["inspect", "--format", &format, id]);
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let words: Vec<&str> = text.split_whitespace().collect();
        let [pid, mac, address] = words[..] else { continue };
        let inside = Command::new("nsenter").args([&format!("--net=/proc/{pid}/ns/net"), "ip", "-o", "link"]).output().ok()?;
        let links = String::from_utf8_lossy(&inside.stdout).into_owned();
        let line = links.lines().find(|line| line.contains(mac))?;
        let peer = line.split("@if").nth(1)?.split(':').next()?;
        let port = ports.lines().find(|line| line.starts_with(&format!("{peer}: ")))?;
        let port = port.split_whitespace().nth(1)?.split('@').next()?;
        all.insert((port.to_owned(), mac.to_owned(), address.to_owned()));
    }
    Some(all)
}

pub(crate) struct Scene<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) db: SocketAddr,
}

impl Scene<'_> {
    /// As the engine says within a few seconds, and web reaches db, and the hostile one does not.
    pub(crate) fn agrees(&self, when: &str) {
        let begun = Instant::now();
        eventually(Duration::from_secs(8), || {
            let (held, told) = (held(self.engine), told(self.engine, "back"));
            if Some(&held) == told.as_ref() { Ok(()) } else { Err(format!("{when}: bound {held:#?}\nand by the engine {told:#?}")) }
        });
        let agreed = begun.elapsed();
        reaches(self.engine, "web", self.db, b"web's own", Duration::from_secs(4), when);
        eprintln!("{when}: agreed after {agreed:?}, reached after {:?}", begun.elapsed());
    }

    fn may_fail(&self, words: &str) {
        let _ = self.engine.try_docker(words.split(' '));
    }

    /// Everything that is tried, each by its name.
    fn deeds(&self) -> Vec<Deed<'_>> {
        let run_job = |name: &str, more: &str| self.may_fail(&format!("run -d --name {name} --network back {more}"));
        vec![
            ("a start", Box::new(move || run_job("job", "hold:1"))),
            ("a restart", Box::new(|| self.may_fail("restart -t 0 web job"))),
            (
                "left and joined again",
                Box::new(|| {
                    self.may_fail("network disconnect back web");
                    self.may_fail("network connect back web");
                }),
            ),
            (
                "twice",
                Box::new(|| {
                    for _ in 0..2 {
                        self.may_fail("network disconnect -f back web");
                        self.may_fail("network connect back web");
                    }
                }),
            ),
            ("who shares a namespace", Box::new(|| self.may_fail("run -d --name sidecar --network container:job hold:1"))),
            ("its owner restarts", Box::new(|| self.may_fail("restart -t 0 job"))),
            ("and it", Box::new(|| self.may_fail("restart -t 0 sidecar"))),
            (
                "starts that fail",
                Box::new(move || {
                    for n in 0..3 {
                        run_job(&format!("bad{n}"), "hold:1 /no/such/program");
                    }
                }),
            ),
            (
                "one that fails again and again, and one that gets its address",
                Box::new(move || {
                    for _ in 0..3 {
                        self.may_fail("start bad0");
                    }
                    run_job("heir", "hold:1");
                }),
            ),
            (
                "a pause",
                Box::new(|| {
                    self.may_fail("pause heir");
                    self.may_fail("unpause heir");
                }),
            ),
            (
                "one-offs at once",
                Box::new(move || {
                    thread::scope(|scope| {
                        for n in 0..6 {
                            scope.spawn(move || self.may_fail(&format!("run --rm --name once{n} --network back hold:1 true")));
                        }
                    });
                }),
            ),
            (
                "another name in between",
                Box::new(|| {
                    self.may_fail("create --name early --network back hold:1");
                    thread::scope(|scope| {
                        scope.spawn(|| self.may_fail("start early"));
                        scope.spawn(|| self.may_fail("rename early late"));
                    });
                }),
            ),
            (
                "killed and another one at once",
                Box::new(move || {
                    self.may_fail("rm -f heir late");
                    thread::scope(|scope| {
                        for n in 0..3 {
                            scope.spawn(move || run_job(&format!("next{n}"), "hold:1"));
                        }
                        scope.spawn(|| self.may_fail("restart -t 0 job"));
                    });
                }),
            ),
            (
                "a storm",
                Box::new(move || {
                    thread::scope(|scope| {
                        for n in 0..3 {
                            scope.spawn(move || {
                                for _ in 0..3 {
                                    self.may_fail(&format!("rm -f next{n}"));
                                    run_job(&format!("next{n}"), "hold:1");
                                }
                            });
                        }
                        scope.spawn(|| {
                            for _ in 0..3 {
                                self.may_fail("network disconnect -f back job");
                                self.may_fail("start bad1");
                                self.may_fail("network connect back job");
                            }
                        });
                    });
                }),
            ),
            ("all gone", Box::new(|| self.may_fail("rm -f sidecar job next0 next1 next2 bad0 bad1 bad2 heir late early"))),
        ]
    }
}

fn set() -> Result<(Engine, lab::Internet), String> {
    let (engine, internet) = engine(&[])?;
    network(&engine, "back", 1);
    network(&engine, "side", 2);
    run(&engine, "db", "back", &[]);
    run(&engine, "web", "back", &[]);
    engine.docker(["network", "connect", "side", "web"]);
    Ok((engine, internet))
}

#[test]
fn whatever_becomes_of_a_start_what_is_bound_is_what_the_engine_says() {
    let _limit = limit(Duration::from_secs(500));
    let (engine, _internet) = lab::or_skip!(set());
    let host = Host::on(&engine);
    let up = host.up();
    known(&host, &["db", "web"]);
    host.bulkhead(["allow", "web", "db", "udp/53"]);
    enforce(&host, "back", &["db", "web"]);
    let db = SocketAddr::new(engine.address("db", "back"), 53);
    let _server = Server::udp_echo(&engine.netns_of("db"), db);
    let scene = Scene { engine: &engine, db };
    scene.agrees("before");
    for hung in [false, true] {
        for (what, deed) in scene.deeds() {
            let agent = agent(&up);
            if hung {
                kill(agent, Signal::SIGSTOP).unwrap();
            }
            deed();
            if hung {
                kill(agent, Signal::SIGCONT).unwrap();
            }
            scene.agrees(&format!("{what}, {}", if hung { "the agent hung" } else { "the agent awake" }));
        }
    }
    for (what, deed) in scene.deeds() {
        let dead = agent(&up);
        kill(dead, Signal::SIGKILL).unwrap();
        deed();
        eventually(PATIENCE, || if agent(&up) == dead { Err("the old agent") } else { Ok(()) });
        scene.agrees(&format!("{what}, the agent killed"));
    }
}
