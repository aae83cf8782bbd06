//! Our reading of NetworkPolicy against cases made by others: folders with manifests and the connectivity they leave, given by
//! BULKHEAD_ORACLES. Cases with cluster-wide policies are of another kind and passed over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Deserialize;
use serde_norway::Value;

use crate::semantics::{Cluster, End, Labels, Pod, Port};

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];

/// Allowed ports by protocol, as ranges that don't touch.
type Allowed = BTreeMap<String, Vec<(u16, u16)>>;

#[derive(Debug, Default)]
struct Case {
    cluster: Cluster,
    /// Workloads with the pods of each: replicas that differ in labels are connected as any of them is.
    workloads: BTreeMap<String, Vec<Pod>>,
    other_policies: bool,
}

#[test]
fn network_policies_mean_here_what_they_mean_to_others() {
    let Some(folder) = std::env::var_os("BULKHEAD_ORACLES") else {
        println!("skipped: no oracle data (BULKHEAD_ORACLES is not set)");
        return;
    };
    let folder = Path::new(&folder).join("np-guard");
    if !folder.is_dir() {
        println!("skipped: no oracle data ({} is no folder)", folder.display());
        return;
    }
    let mut cases: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    let (mut judged, mut wrong) = (0, Vec::new());
    for path in cases {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut case = Case::default();
        read(&path.join("manifests"), &mut case);
        if case.other_policies {
            println!("{name}: passed over, it has cluster-wide policies");
            continue;
        }
        let expected = std::fs::read_to_string(path.join("expected.txt")).unwrap();
        let differences = judge(&case, &expected);
        println!("{name}: {} workloads, {} policies, {} differences", case.workloads.len(), case.cluster.policies.len(), differences.len());
        judged += 1;
        wrong.extend(differences.into_iter().take(10).map(|d| format!("{name}: {d}")));
    }
    println!("{judged} cases");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(judged > 0, "no case in {}", folder.display());
}

fn read(folder: &Path, case: &mut Case) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            read(&path, case);
        } else if path.extension().is_some_and(|e| ["yaml", "yml", "json"].iter().any(|known| e == *known)) {
            let text = std::fs::read_to_string(&path).unwrap();
            for document in serde_norway::Deserializer::from_str(&text) {
                let value = Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                object(&value, "", case);
            }
        }
    }
}

fn text<'a>(value: &'a Value, path: &[&str]) -> Option<&'a str> {
    path.iter().try_fold(value, |value, key| value.get(key))?.as_str()
}

fn labels(value: Option<&Value>) -> Labels {
    let pair = |(key, value): (&Value, &Value)| Some((key.as_str()?.to_owned(), value.as_str()?.to_owned()));
    value.and_then(Value::as_mapping).into_iter().flatten().filter_map(pair).collect()
}

fn object(value: &Value, item_kind: &str, case: &mut Case) {
    let kind = text(value, &["kind"]).unwrap_or(item_kind);
    if let Some(item) = kind.strip_suffix("List") {
        for value in value.get("items").and_then(Value::as_sequence).into_iter().flatten() {
            object(value, item, case);
        }
        return;
    }
    let name = text(value, &["metadata", "name"]).unwrap_or_default();
    let namespace = text(value, &["metadata", "namespace"]).unwrap_or("default");
    let spec = value.get("spec");
    let template = || spec.and_then(|s| s.get("template"));
    match kind {
        "Namespace" => {
            let labels = labels(value.get("metadata").and_then(|m| m.get("labels")));
            case.cluster.namespaces.insert(name.to_owned(), labels);
        }
        "NetworkPolicy" => case.cluster.policies.push(serde_norway::from_value::<NetworkPolicy>(value.clone()).unwrap()),
        "AdminNetworkPolicy" | "BaselineAdminNetworkPolicy" => case.other_policies = true,
        "Pod" => {
            let owner = value.get("metadata").and_then(|m| m.get("ownerReferences")).and_then(|o| o.get(0));
            let workload = match owner.and_then(|owner| text(owner, &["name"])) {
                Some(owner_name) => (owner_name, owner.and_then(|o| text(o, &["kind"])).unwrap_or("Pod")),
                None => (name, "Pod"),
            };
            pod(value.get("metadata"), spec, namespace, workload, case);
        }
        "Deployment" | "DaemonSet" | "StatefulSet" | "ReplicaSet" | "ReplicationController" | "Job" => {
            let metadata = template().and_then(|t| t.get("metadata"));
            pod(metadata, template().and_then(|t| t.get("spec")), namespace, (name, kind), case);
        }
        "CronJob" => {
            let template = spec.and_then(|s| s.get("jobTemplate")).and_then(|j| j.get("spec")).and_then(|s| s.get("template"));
            pod(template.and_then(|t| t.get("metadata")), template.and_then(|t| t.get("spec")), namespace, (name, kind), case);
        }
        _ => {}
    }
}

fn pod(metadata: Option<&Value>, spec: Option<&Value>, namespace: &str, (name, kind): (&str, &str), case: &mut Case) {
    let containers = spec.and_then(|s| s.get("containers")).and_then(Value::as_sequence);
    let ports = containers
        .into_iter()
        .flatten()
        .filter_map(|c| c.get("ports").and_then(Value::as_sequence))
        .flatten()
        .filter_map(|port| {
            let number = u16::try_from(port.get("containerPort")?.as_u64()?).ok()?;
            Some((text(port, &["name"])?.to_owned(), text(port, &["protocol"]).unwrap_or("TCP").to_owned(), number))
        })
        .collect();
    let pod = Pod { namespace: namespace.to_owned(), labels: labels(metadata.and_then(|m| m.get("labels"))), addresses: Vec::new(), ports };
    case.workloads.entry(format!("{namespace}/{name}[{kind}]")).or_default().push(pod);
}

/// The first address of every stretch of the IPv4 space within which no policy makes a difference.
fn stretches(case: &Case) -> BTreeSet<Ipv4Addr> {
    let specs = case.cluster.policies.iter().filter_map(|p| p.spec.as_ref());
    let peers = specs.flat_map(|spec| {
        let from = spec.ingress.iter().flatten().flat_map(|rule| rule.from.iter().flatten());
        from.chain(spec.egress.iter().flatten().flat_map(|rule| rule.to.iter().flatten()))
    });
    let blocks = peers.filter_map(|peer| peer.ip_block.as_ref());
    let nets = blocks.flat_map(|block| std::iter::once(&block.cidr).chain(block.except.iter().flatten()));
    let edges = nets.filter_map(|cidr| cidr.parse::<Ipv4Net>().ok()).flat_map(|net| {
        let after = u32::from(net.broadcast()).checked_add(1).map(Ipv4Addr::from);
        std::iter::once(net.network()).chain(after)
    });
    std::iter::once(Ipv4Addr::UNSPECIFIED).chain(edges).collect()
}

/// The first port of every range within which no policy makes a difference.
fn steps(case: &Case) -> BTreeSet<u16> {
    let specs = case.cluster.policies.iter().filter_map(|p| p.spec.as_ref());
    let ports = specs.flat_map(|spec| {
        let ingress = spec.ingress.iter().flatten().flat_map(|rule| rule.ports.iter().flatten());
        ingress.chain(spec.egress.iter().flatten().flat_map(|rule| rule.ports.iter().flatten()))
    });
    let numbered = ports.filter_map(|port| match port.port {
        Some(IntOrString::Int(first)) => Some((first, port.end_port.unwrap_or(first))),
        Some(IntOrString::String(_)) | None => None,
    });
    let named = case.workloads.values().flatten().flat_map(|pod| pod.ports.iter().map(|(_, _, n)| (i32::from(*n), i32::from(*n))));
    let edges = numbered.chain(named).flat_map(|(first, last)| [first, last + 1]);
    std::iter::once(1).chain(edges.filter_map(|edge| u16::try_from(edge).ok()).filter(|edge| *edge >= 1)).collect()
}

fn allowed(case: &Case, from: &[End<'_>], to: &[End<'_>], steps: &BTreeSet<u16>) -> Allowed {
    let mut allowed = Allowed::new();
    for protocol in PROTOCOLS {
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        let starts: Vec<u16> = steps.iter().copied().collect();
        for (at, &first) in starts.iter().enumerate() {
            let last = starts.get(at + 1).map_or(u16::MAX, |next| next - 1);
            let passes = from.iter().any(|f| to.iter().any(|t| case.cluster.allows(*f, *t, Port { protocol, number: first })));
            match ranges.last_mut() {
                _ if !passes => {}
                Some(range) if range.1.checked_add(1) == Some(first) => range.1 = last,
                Some(_) | None => ranges.push((first, last)),
            }
        }
        if !ranges.is_empty() {
            allowed.insert(protocol.to_owned(), ranges);
        }
    }
    allowed
}

/// `All Connections`, or `TCP 80,443,8000-9000,UDP 53`.
fn parse(connections: &str) -> Allowed {
    if connections == "All Connections" {
        return PROTOCOLS.iter().map(|p| ((*p).to_owned(), vec![(1, u16::MAX)])).collect();
    }
    let mut allowed = Allowed::new();
    let mut protocol = "";
    for part in connections.split(',') {
        let range = match part.split_once(' ') {
            Some((named, range)) => {
                protocol = named;
                range
            }
            None => part,
        };
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        allowed.entry(protocol.to_owned()).or_default().push((first.parse().unwrap(), last.parse().unwrap()));
    }
    allowed
}

enum Name {
    Workload(String),
    Range(Ipv4Addr, Ipv4Addr),
}

fn end_name(text: &str) -> Name {
    match text.strip_suffix("[External]").and_then(|range| range.split_once('-')) {
        Some((first, last)) => Name::Range(first.parse().unwrap(), last.parse().unwrap()),
        None => Name::Workload(text.to_owned()),
    }
}

/// Both sides stretch by stretch, so that how ranges are joined for reading makes no difference.
fn judge(case: &Case, expected: &str) -> Vec<String> {
    let (stretches, steps) = (stretches(case), steps(case));
    let spread = |name: Name| -> Vec<String> {
        match name {
            Name::Workload(name) => vec![name],
            Name::Range(first, last) => stretches.range(first..=last).map(ToString::to_string).collect(),
        }
    };
    let mut wanted: BTreeMap<(String, String), Allowed> = BTreeMap::new();
    for line in expected.lines().filter(|line| !line.trim().is_empty()) {
        let (pair, connections) = line.split_once(" : ").unwrap();
        let (from, to) = pair.split_once(" => ").unwrap();
        for from in spread(end_name(from)) {
            for to in spread(end_name(to)) {
                assert!(wanted.insert((from.clone(), to), parse(connections)).is_none(), "{line}");
            }
        }
    }
    let mut ends: Vec<(String, Vec<End<'_>>)> =
        case.workloads.iter().map(|(name, pods)| (name.clone(), pods.iter().map(End::Pod).collect())).collect();
    let workloads = ends.len();
    ends.extend(stretches.iter().map(|address| (address.to_string(), vec![End::Outside((*address).into())])));
    let mut found: BTreeMap<(String, String), Allowed> = BTreeMap::new();
    for (at, (from_name, from)) in ends.iter().enumerate() {
        for (to_at, (to_name, to)) in ends.iter().enumerate() {
            if at == to_at || (at >= workloads && to_at >= workloads) {
                continue;
            }
            let allowed = allowed(case, from, to, &steps);
            if !allowed.is_empty() {
                found.insert((from_name.clone(), to_name.clone()), allowed);
            }
        }
    }
    let pairs: BTreeSet<&(String, String)> = wanted.keys().chain(found.keys()).collect();
    pairs
        .into_iter()
        .filter(|pair| wanted.get(*pair) != found.get(*pair))
        .map(|pair| format!("{} => {}: wanted {:?}, found {:?}", pair.0, pair.1, wanted.get(pair), found.get(pair)))
        .collect()
}
