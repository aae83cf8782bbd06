//! Policies as NetworkPolicies (networking.k8s.io/v1), for a cluster where the same services run as pods. What a NetworkPolicy
//! can't say is listed, rule by rule; nothing is ever widened to fit.
//!
//! # Names
//! | here | in the cluster |
//! |---|---|
//! | project `shop` | namespace `shop`; a name that is no DNS label as [`crate::name::label`] makes it |
//! | service `db` of `shop` | pods with the labels `app.kubernetes.io/name: db` and `app.kubernetes.io/instance: shop` |
//! | container `web`, started by hand | pods with `name` and `instance` both `web`, in the namespace that [`Options::namespace`] names |
//!
//! The pods have to carry these labels: a NetworkPolicy that selects nothing protects nothing. Label values may hold capitals, `_`
//! and `.`; what they can't hold is mapped like namespaces are.
//!
//! # Why
//! A peer in another namespace is one entry with both selectors, because two entries would mean "or". A rule always has peers and
//! ports: an absent list means everyone. An `ipBlock` also matches pods where the network lets it, and "outside" here never means a
//! workload: so the pods' networks are cut out of every block.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::ObjectMeta;
use policy::policy_set::{Direction, WorkloadPolicy};
use policy::{Peer, PolicySet, Ports, Protocol, Rule, Workload};

use crate::{name, yaml};

/// The label that names what a pod runs (Kubernetes' recommended labels).
pub const NAME: &str = "app.kubernetes.io/name";
/// The label that tells two installations of one application apart.
pub const INSTANCE: &str = "app.kubernetes.io/instance";
/// The label that every namespace has by itself (Kubernetes 1.22 and later).
pub const NAMESPACE: &str = "kubernetes.io/metadata.name";
/// The annotation that names the workload as Bulkhead knows it.
pub const WORKLOAD: &str = "bulkhead.dev/workload";
/// The annotation that lists what the NetworkPolicy does not say, a line a rule.
pub const LEFT_OUT: &str = "bulkhead.dev/left-out";

/// Addresses that pods of a cluster may have, where nobody said which: every private, shared and link-local range (RFC 1918, 6598,
/// 3927, 4193, 4291). A cluster whose pods have public addresses has to be told of.
const PRIVATE: [&str; 7] = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fe80::/10"];

/// How to find what the policies name, in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The namespace of workloads that have none.
    pub namespace: String,
    /// Networks of the cluster's pods and services. `None`: not known, so any private address may be a pod's.
    pub pods: Option<Vec<IpNet>>,
    /// The resolver that every pod may ask; `None`: none is added.
    pub dns: Option<Dns>,
    /// Rules that ended by then are left out.
    pub now: Timestamp,
}

impl Options {
    /// What fits most clusters: namespace `default`, CoreDNS or kube-dns in `kube-system`, any private address may be a pod's.
    pub fn usual(now: Timestamp) -> Self {
        let labels = [("k8s-app".to_owned(), "kube-dns".to_owned())].into();
        Self { namespace: "default".to_owned(), pods: None, dns: Some(Dns { namespace: "kube-system".to_owned(), labels }), now }
    }
}

/// The cluster's resolver: pods of a namespace, asked on udp/53 and tcp/53.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// Its namespace.
    pub namespace: String,
    /// Labels of its pods.
    pub labels: BTreeMap<String, String>,
}

/// NetworkPolicies, and what they don't say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Export {
    /// One for each workload that has an approved policy or is quarantined, in the order of the workloads.
    pub policies: Vec<NetworkPolicy>,
    /// Rules, or parts of rules, that no NetworkPolicy says.
    pub left_out: Vec<LeftOut>,
}

impl Export {
    /// As a stream of documents for `kubectl apply -f`; what is left out stands in front as comments.
    pub fn yaml(&self) -> String {
        let comments: String = self.left_out.iter().map(|left| format!("# {left}\n")).collect();
        comments + &self.policies.iter().map(yaml::document).collect::<Vec<_>>().join("---\n")
    }
}

/// A rule that a NetworkPolicy doesn't say, or not whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Whose policy.
    pub workload: Workload,
    /// Which side.
    pub direction: Direction,
    /// Which rule.
    pub rule: Rule,
    /// Why, and whether a part of it is there.
    pub why: Why,
}

/// Why a rule is not, or not whole, in a NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A NetworkPolicy has no peer for the node.
    Host,
    /// A NetworkPolicy knows TCP, UDP and SCTP.
    Protocol(Protocol),
    /// A NetworkPolicy doesn't end by itself.
    Until(Timestamp),
    /// The network lies within that of the pods.
    WithinPods(IpNet),
    /// These may be pods, and are not in it; the rest of the rule is.
    Except(Vec<IpNet>),
}

impl Why {
    /// Whether nothing of the rule is exported.
    pub fn whole(&self) -> bool {
        match self {
            Self::Host | Self::Protocol(_) | Self::Until(_) | Self::WithinPods(_) => true,
            Self::Except(_) => false,
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => {
                f.write_str("not expressible: a NetworkPolicy can't name the node. Allow the nodes' addresses by hand if it is needed")
            }
            Self::Protocol(protocol) => write!(f, "not expressible: a NetworkPolicy knows tcp, udp and sctp, not {protocol}"),
            Self::Until(until) => write!(f, "not expressible: a NetworkPolicy would not end at {until}"),
            Self::WithinPods(net) => {
                write!(f, "not exported: {net} may be pods, and would let them in. Name the pods' networks if it is not")
            }
            Self::Except(nets) => {
                let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
                write!(f, "exported without {}, which may be pods. Name the pods' networks to have the rest", nets.join(", "))
            }
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workload, direction, rule, why } = self;
        write!(f, "policy {workload}, {direction}: {rule}: {why}")
    }
}

/// Two workloads that would have one name in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{first} and {second} would both be {object} in namespace {namespace}: choose another namespace for workloads without one")]
pub struct Collision {
    /// One of them.
    pub first: Workload,
    /// The other.
    pub second: Workload,
    /// Where they would meet.
    pub namespace: String,
    /// As what.
    pub object: String,
}

/// Where the pods of a workload are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pods {
    /// Their namespace.
    pub namespace: String,
    /// [`NAME`].
    pub name: String,
    /// [`INSTANCE`].
    pub instance: String,
}

impl Pods {
    /// Of this workload.
    pub fn of(workload: &Workload, options: &Options) -> Self {
        let (namespace, name) = (workload.namespace(), workload.name());
        match namespace {
            "" => Self { namespace: options.namespace.clone(), name: value(name), instance: value(name) },
            project => Self { namespace: name::label(project), name: value(name), instance: value(project) },
        }
    }

    /// The labels the pods have to carry.
    pub fn labels(&self) -> BTreeMap<String, String> {
        [(NAME.to_owned(), self.name.clone()), (INSTANCE.to_owned(), self.instance.clone())].into()
    }
}

/// A label's value: the name itself where one can hold it (63 of letters, digits, `-`, `_`, `.`, with a letter or digit at both
/// ends), else as [`name::label`] makes it.
fn value(raw: &str) -> String {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = raw.as_bytes();
    let fits = bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte));
    if fits { raw.to_owned() } else { name::label(raw) }
}

/// The approved policies and the quarantines of a set as NetworkPolicies, whatever the mode of a segment: in a cluster they are
/// enforced as soon as they are applied. A workload without an approved policy gets none. The same input gives the same bytes.
///
/// # Errors
/// A [`Collision`]: two workloads that the cluster could not tell apart. Then nothing is exported, because one's rules would
/// become the other's.
pub fn export(set: &PolicySet, options: &Options) -> Result<Export, Collision> {
    no_collision(set, options)?;
    let pods = Cluster::new(options);
    let mut export = Export::default();
    let workloads: BTreeSet<&Workload> = set.policies.keys().chain(set.quarantines.keys()).collect();
    for workload in workloads {
        let from = export.left_out.len();
        let spec = match (set.quarantines.contains_key(workload), set.policies.get(workload)) {
            // Cut off: its resolver, too. Peers need no change, since a connection needs both ends.
            (true, _) | (false, None) => (None, None),
            (false, Some(policy)) => sides(policy, &pods, options, &mut export.left_out),
        };
        export.policies.push(object(workload, spec, &export.left_out[from..], options));
    }
    Ok(export)
}

type Sides = (Option<Vec<NetworkPolicyIngressRule>>, Option<Vec<NetworkPolicyEgressRule>>);

fn object(workload: &Workload, (ingress, egress): Sides, left_out: &[LeftOut], options: &Options) -> NetworkPolicy {
    let pods = Pods::of(workload, options);
    let mut annotations = BTreeMap::from([(WORKLOAD.to_owned(), workload.to_string())]);
    if !left_out.is_empty() {
        annotations.insert(LEFT_OUT.to_owned(), left_out.iter().map(LeftOut::to_string).collect::<Vec<_>>().join("\n"));
    }
    NetworkPolicy {
        metadata: ObjectMeta {
            name: Some(name::label(workload.name())),
            namespace: Some(pods.namespace.clone()),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(select(pods.labels())),
            // Both, always: without its type, a side without rules would be open.
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            ingress,
            egress,
        }),
    }
}

fn sides(policy: &WorkloadPolicy, pods: &Cluster, options: &Options, left_out: &mut Vec<LeftOut>) -> Sides {
    let own = Pods::of(&policy.workload, options);
    let ingress = allows(policy, Direction::Ingress, pods, options, left_out)
        .into_iter()
        .map(|(services, peers)| NetworkPolicyIngressRule {
            from: Some(peers.iter().map(|to| to.peer(&own.namespace)).collect()),
            ports: Some(services.into_iter().map(port).collect()),
        })
        .collect::<Vec<_>>();
    let resolver = options.dns.as_ref().map(|dns| NetworkPolicyEgressRule {
        to: Some(vec![NetworkPolicyPeer {
            namespace_selector: Some(select([(NAMESPACE.to_owned(), dns.namespace.clone())].into())),
            pod_selector: Some(select(dns.labels.clone())),
            ip_block: None,
        }]),
        ports: Some([policy::Service::udp(53), policy::Service::tcp(53)].map(|service| port(service.into())).into()),
    });
    let egress = allows(policy, Direction::Egress, pods, options, left_out)
        .into_iter()
        .map(|(services, peers)| NetworkPolicyEgressRule {
            to: Some(peers.iter().map(|to| to.peer(&own.namespace)).collect()),
            ports: Some(services.into_iter().map(port).collect()),
        })
        .chain(resolver)
        .collect::<Vec<_>>();
    ((!ingress.is_empty()).then_some(ingress), (!egress.is_empty()).then_some(egress))
}

/// Where a rule leads, in the cluster's words.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Pods(Pods),
    Block { net: IpNet, except: Vec<IpNet> },
}

impl Target {
    fn peer(&self, own_namespace: &str) -> NetworkPolicyPeer {
        match self {
            Self::Pods(pods) => NetworkPolicyPeer {
                pod_selector: Some(select(pods.labels())),
                namespace_selector: (pods.namespace != own_namespace)
                    .then(|| select([(NAMESPACE.to_owned(), pods.namespace.clone())].into())),
                ip_block: None,
            },
            Self::Block { net, except } => NetworkPolicyPeer {
                ip_block: Some(IPBlock {
                    cidr: net.to_string(),
                    except: (!except.is_empty()).then(|| except.iter().map(IpNet::to_string).collect()),
                }),
                ..NetworkPolicyPeer::default()
            },
        }
    }
}

/// The rules of one side: for each set of ports the peers that have exactly these. A NetworkPolicy's rule is every peer with every
/// port, so only peers with equal ports may share one.
fn allows(
    policy: &WorkloadPolicy,
    direction: Direction,
    pods: &Cluster,
    options: &Options,
    left_out: &mut Vec<LeftOut>,
) -> BTreeMap<BTreeSet<Ports>, BTreeSet<Target>> {
    let mut by_target: BTreeMap<Target, BTreeSet<Ports>> = BTreeMap::new();
    for rule in policy.rules(direction).iter().filter(|rule| rule.in_force(options.now)) {
        let (target, why) = match target(rule, pods, options) {
            Ok((target, why)) => (Some(target), why),
            Err(why) => (None, Some(why)),
        };
        if let Some(target) = target {
            by_target.entry(target).or_default().insert(rule.ports);
        }
        left_out.extend(why.map(|why| LeftOut { workload: policy.workload.clone(), direction, rule: rule.clone(), why }));
    }
    let mut by_ports: BTreeMap<BTreeSet<Ports>, BTreeSet<Target>> = BTreeMap::new();
    for (target, ports) in by_target {
        by_ports.entry(ports).or_default().insert(target);
    }
    by_ports
}

fn target(rule: &Rule, pods: &Cluster, options: &Options) -> Result<(Target, Option<Why>), Why> {
    if let Some(until) = rule.until {
        return Err(Why::Until(until));
    }
    match rule.ports.protocol() {
        Protocol::Tcp | Protocol::Udp | Protocol::Sctp => {}
        protocol @ (Protocol::Icmp | Protocol::Icmpv6 | Protocol::Other(_)) => return Err(Why::Protocol(protocol)),
    }
    match &rule.peer {
        Peer::Workload(workload) => Ok((Target::Pods(Pods::of(workload, options)), None)),
        Peer::Host => Err(Why::Host),
        Peer::Outside(net) => pods.outside(*net),
    }
}

/// Where the cluster's own addresses are.
struct Cluster {
    nets: Vec<IpNet>,
    known: bool,
}

impl Cluster {
    fn new(options: &Options) -> Self {
        let nets = match &options.pods {
            Some(nets) => nets.clone(),
            None => PRIVATE.iter().map(|net| net.parse().expect("written here as a network")).collect(),
        };
        // Aggregated, so that a network that several cover between them lies within one.
        Self { nets: IpNet::aggregate(&nets), known: options.pods.is_some() }
    }

    fn outside(&self, net: IpNet) -> Result<(Target, Option<Why>), Why> {
        if let Some(pods) = self.nets.iter().find(|pods| pods.contains(&net)) {
            return Err(Why::WithinPods(*pods));
        }
        let except: Vec<IpNet> = self.nets.iter().filter(|pods| net.contains(*pods)).copied().collect();
        // Where the pods' networks are known, nothing outside is lost: no address outside is within them.
        let why = (!self.known && !except.is_empty()).then(|| Why::Except(except.clone()));
        Ok((Target::Block { net, except }, why))
    }
}

fn select(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}

fn port(ports: Ports) -> NetworkPolicyPort {
    let (first, last) = (i32::from(ports.first()), i32::from(ports.last()));
    NetworkPolicyPort {
        protocol: Some(ports.protocol().to_string().to_ascii_uppercase()),
        port: Some(IntOrString::Int(first)),
        end_port: (first != last).then_some(last),
    }
}

/// Every workload that is named anywhere has a name of its own in its namespace, and so labels of its own.
fn no_collision(set: &PolicySet, options: &Options) -> Result<(), Collision> {
    let peers = set.policies.values().flat_map(|policy| policy.ingress.iter().chain(&policy.egress)).filter_map(|rule| match &rule.peer {
        Peer::Workload(workload) => Some(workload),
        Peer::Host | Peer::Outside(_) => None,
    });
    let mut taken: BTreeMap<(String, String), &Workload> = BTreeMap::new();
    for workload in set.policies.keys().chain(set.quarantines.keys()).chain(peers) {
        match taken.entry((Pods::of(workload, options).namespace, name::label(workload.name()))) {
            Entry::Vacant(free) => {
                free.insert(workload);
            }
            Entry::Occupied(other) if *other.get() == workload => {}
            Entry::Occupied(other) => {
                let (namespace, object) = other.key().clone();
                return Err(Collision { first: (*other.get()).clone(), second: workload.clone(), namespace, object });
            }
        }
    }
    Ok(())
}
