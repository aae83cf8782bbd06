//! What the crates depend on, as cargo resolves it for this platform.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use crate::sources::root;

/// The crates of the workspace, in the order of the layers, with those of the workspace that each may use.
const LAYERS: [(&str, &[&str]); 4] = [
    ("bulkhead-policy", &[]),
    ("bulkhead-crds", &["bulkhead-policy"]),
    ("bulkhead-controller", &["bulkhead-policy", "bulkhead-crds"]),
    ("bulkhead-node-agent", &["bulkhead-policy"]),
];

/// What the core may name: values, graphs, digests, hashes and encodings. Each is pure as the core uses it.
const CORE: [&str; 11] =
    ["foldhash", "hashbrown", "ipnet", "jiff", "petgraph", "prost", "serde", "serde_json", "sha2", "smallvec", "thiserror"];

/// What does I/O, waits or logs; the core reaches none of them by any way.
const TOUCHING: [&str; 22] = [
    "async-std",
    "bollard",
    "futures",
    "hickory-resolver",
    "hyper",
    "kube",
    "libc",
    "log",
    "mio",
    "netlink-sys",
    "nix",
    "rand",
    "reqwest",
    "rtnetlink",
    "rustix",
    "smol",
    "socket2",
    "sqlx",
    "tokio",
    "tonic",
    "tower",
    "tracing",
];

/// What only a privileged process needs.
const PRIVILEGED: [&str; 8] = [
    "bollard",
    "caps",
    "netlink-packet-core",
    "netlink-packet-netfilter",
    "netlink-packet-route",
    "netlink-proto",
    "netlink-sys",
    "rtnetlink",
];

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(arguments).args(["--locked", "--offline"]).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Names of all crates that are built into one for its users; with the features that it asks for, not those that others do.
fn reach(name: &str) -> BTreeSet<String> {
    let tree = cargo(&["tree", "-p", name, "-e", "normal", "--prefix", "none", "--format", "{p}"]);
    let names = tree.lines().filter_map(|line| line.split_whitespace().next()).filter(|found| *found != name);
    names.map(str::to_owned).collect()
}

/// What the manifests of our own crates name, by kind of dependency: "" for the ordinary.
fn manifests() -> BTreeMap<String, BTreeSet<(String, String)>> {
    let metadata: Value = serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--no-deps"])).unwrap();
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata, "packages").into_iter().map(|package| {
        let named = list(&package, "dependencies").into_iter().map(|d| (text(&d["kind"]), text(&d["name"]))).collect();
        (text(&package["name"]), named)
    });
    packages.collect()
}

fn among(reached: &BTreeSet<String>, names: &[&str]) -> Vec<String> {
    reached.iter().filter(|name| names.contains(&name.as_str())).cloned().collect()
}

const NONE: [String; 0] = [];

#[test]
fn the_workspace_is_these_crates_and_the_tests() {
    let mut wanted: BTreeSet<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    wanted.insert("bulkhead-tests");
    assert_eq!(manifests().keys().map(String::as_str).collect::<BTreeSet<_>>(), wanted);
}

#[test]
fn the_crates_keep_their_layers_and_the_two_binaries_are_strangers() {
    let manifests = manifests();
    for (name, may) in LAYERS {
        let ours: Vec<&str> = LAYERS.iter().map(|(other, _)| *other).filter(|other| !may.contains(other)).collect();
        assert_eq!(among(&reach(name), &ours), NONE, "{name} reaches these");
        // Not for its tests either, nor for its build: those would be a way around.
        let said: BTreeSet<String> = manifests[name].iter().map(|(_, dependency)| dependency.clone()).collect();
        assert_eq!(among(&said, &ours), NONE, "{name} names these");
    }
}

#[test]
fn the_core_names_only_what_is_pure() {
    let manifests = manifests();
    let named: BTreeSet<&str> =
        manifests["bulkhead-policy"].iter().filter(|(kind, _)| kind.is_empty()).map(|(_, name)| name.as_str()).collect();
    let more: Vec<_> = named.iter().filter(|name| !CORE.contains(name)).collect();
    assert!(more.is_empty(), "the core depends on {more:?}: if that is pure, add it to CORE with a reason in its Cargo.toml");
}

#[test]
fn the_core_reaches_nothing_that_touches_the_world() {
    assert_eq!(among(&reach("bulkhead-policy"), &TOUCHING), NONE);
}

#[test]
fn the_controller_reaches_nothing_that_only_a_privileged_process_needs() {
    assert_eq!(among(&reach("bulkhead-controller"), &PRIVILEGED), NONE);
}

#[test]
fn the_agent_knows_neither_the_kinds_nor_the_store() {
    assert_eq!(among(&reach("bulkhead-node-agent"), &["kube", "k8s-openapi", "schemars", "sqlx", "serde_norway"]), NONE);
}

#[test]
fn the_fence_would_see_a_dependency() {
    // Against a test that finds nothing because it looks at nothing.
    assert!(reach("bulkhead-node-agent").contains("tokio"));
    assert!(reach("bulkhead-controller").contains("bulkhead-policy"));
    assert!(reach("bulkhead-policy").contains("serde_core"));
    assert!(!among(&reach("bulkhead-node-agent"), &TOUCHING).is_empty());
}
