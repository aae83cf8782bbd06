//! An engine in words: it answers what the agent asks from containers that are only said to be there. A real one needs an hour to start
//! and stop five thousand; what the agent does with what it is told is the same.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

const PROJECT: &str = "made";
const NETWORK: &str = "made_default";

/// So many services there are at most: a container beyond is of one that had containers before.
pub(crate) const SERVICES: usize = 5_050;

/// The engine's id of the nth container.
pub(crate) fn id(n: usize) -> String {
    format!("{n:064x}")
}

struct State {
    bridge: String,
    subnet: String,
    /// Containers that run, with their address.
    running: Mutex<BTreeMap<String, (usize, Ipv4Addr)>>,
    followers: Mutex<Vec<Sender<String>>>,
}

/// The engine; its socket goes with the folder it was made in.
pub(crate) struct Told {
    state: Arc<State>,
    pub(crate) socket: PathBuf,
}

impl Told {
    /// Answers at `engine.sock` in the folder, with one network on this bridge.
    pub(crate) fn start(dir: &Path, bridge: &str, subnet: &str) -> Self {
        let socket = dir.join("engine.sock");
        let listener = UnixListener::bind(&socket).expect("room for a socket");
        let (bridge, subnet) = (bridge.to_owned(), subnet.to_owned());
        let state = Arc::new(State { bridge, subnet, running: Mutex::default(), followers: Mutex::default() });
        let its = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = Arc::clone(&its);
                // Who asks may go away at any time.
                std::thread::spawn(move || drop(state.serve(stream)));
            }
        });
        Self { state, socket }
    }

    /// Containers that were there before anybody asked.
    pub(crate) fn fill(&self, containers: impl IntoIterator<Item = (usize, Ipv4Addr)>) {
        self.state.running.lock().unwrap().extend(containers.into_iter().map(|(n, address)| (id(n), (n, address))));
    }

    /// A container of the service of this number is made, attached and started.
    pub(crate) fn begin(&self, n: usize, address: Ipv4Addr) {
        self.state.tell("container", "create", n);
        self.state.running.lock().unwrap().insert(id(n), (n, address));
        self.state.tell("network", "connect", n);
        self.state.tell("container", "start", n);
    }

    /// It ends, gives its address back, and is removed.
    pub(crate) fn end(&self, n: usize) {
        self.state.tell("container", "die", n);
        self.state.running.lock().unwrap().remove(&id(n));
        self.state.tell("network", "disconnect", n);
        self.state.tell("container", "destroy", n);
    }
}

impl State {
    fn tell(&self, kind: &str, action: &str, n: usize) {
        let actor = match kind {
            "network" => json!({ "ID": PROJECT, "Attributes": { "container": id(n), "name": NETWORK, "type": "bridge" } }),
            _ => json!({ "ID": id(n), "Attributes": { "name": format!("made-{n}") } }),
        };
        let time = jiff::Timestamp::now();
        let nanoseconds = i64::try_from(time.as_nanosecond()).expect("before 2262");
        let event =
            json!({ "Type": kind, "Action": action, "Actor": actor, "scope": "local", "time": time.as_second(), "timeNano": nanoseconds });
        self.followers.lock().unwrap().retain(|follower| follower.send(event.to_string()).is_ok());
    }

    fn serve(&self, stream: UnixStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let mut header = String::new();
            while reader.read_line(&mut header)? > 2 {
                header.clear();
            }
            let target = request.split_whitespace().nth(1).unwrap_or("/");
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let segments: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            let segments = match segments.as_slice() {
                [version, rest @ ..] if version.starts_with("v1.") => rest,
                all => all,
            };
            if segments == ["events"] {
                let (follower, events) = channel();
                self.followers.lock().unwrap().push(follower);
                return follow(&mut writer, &events);
            }
            let (status, body) = self
                .answer(segments, query)
                .map_or_else(|| ("404 Not Found", json!({ "message": "no such thing" }).to_string()), |body| ("200 OK", body.to_string()));
            write!(writer, "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        }
    }

    fn answer(&self, path: &[&str], query: &str) -> Option<Value> {
        let running = self.running.lock().unwrap();
        Some(match path {
            ["_ping"] => json!("OK"),
            ["version"] => json!({ "Version": "29.0.0", "ApiVersion": "1.47", "MinAPIVersion": "1.24", "Os": "linux", "Arch": "amd64" }),
            ["info"] => json!({ "ID": "made-up", "SecurityOptions": [], "DockerRootDir": "/nonexistent" }),
            ["networks"] => json!([{ "Name": NETWORK, "Id": PROJECT, "Driver": "bridge" }]),
            ["networks", _] => {
                let attached = |(id, (n, address)): (&String, &(usize, Ipv4Addr))| {
                    let [a, b, c, d] = address.octets();
                    let mac = lab::bridge::mac_text([2, 0x42, a, b, c, d]);
                    (id.clone(), json!({ "Name": format!("made-{n}"), "MacAddress": mac, "IPv4Address": format!("{address}/16") }))
                };
                json!({
                    "Name": NETWORK, "Id": PROJECT, "Driver": "bridge", "Internal": false,
                    "Labels": { "com.docker.compose.project": PROJECT },
                    "IPAM": { "Config": [{ "Subnet": self.subnet }] },
                    "Options": { "com.docker.network.bridge.name": self.bridge },
                    "Containers": running.iter().map(attached).collect::<serde_json::Map<_, _>>(),
                })
            }
            ["containers", "json"] => {
                let asked = |id: &String| !query.contains("id") || query.contains(id.as_str());
                let summary = |(id, (n, _)): (&String, &(usize, Ipv4Addr))| {
                    let labels =
                        json!({ "com.docker.compose.project": PROJECT, "com.docker.compose.service": format!("s{}", n % SERVICES) });
                    json!({ "Id": id, "Names": [format!("/made-{n}")], "Image": "made-up", "State": "running", "Labels": labels,
                        "HostConfig": { "NetworkMode": NETWORK } })
                };
                running.iter().filter(|(id, _)| asked(id)).map(summary).collect()
            }
            ["containers", id, "json"] => {
                let (n, _) = running.get(*id)?;
                json!({ "Id": id, "Name": format!("/made-{n}"), "State": { "Running": true, "Pid": 0 },
                    "HostConfig": { "NetworkMode": NETWORK }, "NetworkSettings": { "Ports": {} } })
            }
            _ => return None,
        })
    }
}

fn follow(writer: &mut UnixStream, events: &Receiver<String>) -> std::io::Result<()> {
    write!(writer, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    for event in events {
        write!(writer, "{:x}\r\n{event}\n\r\n", event.len() + 1)?;
    }
    Ok(())
}
