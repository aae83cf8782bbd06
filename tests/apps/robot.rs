//! The robot shop, unchanged: eleven services on one network that call each other by HTTP and by their databases' ports, and one
//! address outside. Each image is a stand-in with the calls that the list of edges gives it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use lab::{Compose, Engine, Host, host};

use crate::oracle;

const PROJECT: &str = "robot";

/// What each service listens on; the others are called and don't call.
const PORTS: [(&str, u16); 11] = [
    ("web", 8080),
    ("catalogue", 8080),
    ("user", 8080),
    ("cart", 8080),
    ("shipping", 8080),
    ("payment", 8080),
    ("ratings", 80),
    ("dispatch", 8080),
    ("mongodb", 27017),
    ("mysql-db", 3306),
    ("rabbitmq", 5672),
];

/// Brings the shop up and compares what is proposed with what was meant.
pub(crate) fn story(engine: &Engine, folder: &Path) {
    let mut meant = oracle::edges(folder);
    // Names outside are enforced in a later release; the stand-in leaves that call out.
    meant.retain(|edge| !edge.server.starts_with("name:"));
    let mut calls: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for edge in &meant {
        let port = edge.port.strip_prefix("tcp/").unwrap();
        calls.entry(edge.client.clone()).or_default().push(format!("{}:{port}", edge.server));
    }
    engine.import_program("lab/standin:1", &host::binary("standin"), &[("curl", "#!/bin/sh\nexec standin curl \"$@\"\n")], &[]);
    let program = |service: &str, port: u16| {
        let port = port.to_string();
        let words = ["standin", "service", &port].map(str::to_owned).into_iter();
        serde_json::to_string(&words.chain(calls.get(service).cloned().unwrap_or_default()).collect::<Vec<_>>()).unwrap()
    };
    for (name, port) in PORTS {
        let cmd = format!("CMD {}", program(name, port));
        let image = if name == "rabbitmq" { "rabbitmq:3.8-management-alpine".to_owned() } else { format!("lab/rs-{name}:1") };
        engine.tag_with("lab/standin:1", &image, &[&cmd]);
    }
    engine.tag_with("lab/standin:1", "redis:6.2-alpine", &[&format!("CMD {}", program("redis", 6379))]);

    let bulkhead = Host::on(engine);
    let mut running = bulkhead.up();
    let file = folder.join("docker-compose.yaml");
    Compose::new(engine, PROJECT, &[&file]).unwrap().with("REPO", "lab").with("TAG", "1").with("INSTANA_AGENT_KEY", "").up();

    oracle::exactly(&bulkhead, PROJECT, &meant);
    assert!(running.ended().is_none(), "bulkhead ended meanwhile:\n{}", bulkhead.said());
    running.stop(Duration::from_secs(10));
}
