//! What NetworkPolicies mean, straight from the API's documentation (networking.k8s.io/v1). Slow and plain on purpose.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

pub(crate) type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug, Default)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) labels: Labels,
    pub(crate) addresses: Vec<IpAddr>,
    /// Name, protocol, number.
    pub(crate) ports: Vec<(String, String, u16)>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    pub(crate) namespaces: BTreeMap<String, Labels>,
    pub(crate) policies: Vec<NetworkPolicy>,
    /// Whether an ipBlock matches pods by their addresses: networks differ in this.
    pub(crate) blocks_match_pods: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum End<'a> {
    Pod(&'a Pod),
    Outside(IpAddr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Port<'a> {
    pub(crate) protocol: &'a str,
    pub(crate) number: u16,
}

pub(crate) fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let expressions = selector.match_expressions.iter().flatten().all(|expression| {
        let value = labels.get(&expression.key);
        let listed = value.is_some_and(|value| expression.values.iter().flatten().any(|v| v == value));
        match expression.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            other => panic!("operator {other}"),
        }
    });
    equal && expressions
}

impl Cluster {
    /// Namespaces have a label with their name (Kubernetes 1.22 and later).
    fn namespace_labels(&self, namespace: &str) -> Labels {
        let mut labels = self.namespaces.get(namespace).cloned().unwrap_or_default();
        labels.insert("kubernetes.io/metadata.name".to_owned(), namespace.to_owned());
        labels
    }

    pub(crate) fn allows(&self, from: End<'_>, to: End<'_>, port: Port<'_>) -> bool {
        let egress = match from {
            End::Pod(pod) => self.side(pod, to, to, port, "Egress"),
            End::Outside(_) => true,
        };
        let ingress = match to {
            End::Pod(pod) => self.side(pod, from, to, port, "Ingress"),
            End::Outside(_) => true,
        };
        egress && ingress
    }

    fn side(&self, own: &Pod, peer: End<'_>, server: End<'_>, port: Port<'_>, direction: &str) -> bool {
        let isolating: Vec<(&str, &NetworkPolicySpec)> = self
            .policies
            .iter()
            .filter_map(|policy| Some((policy.metadata.namespace.as_deref().unwrap_or("default"), policy.spec.as_ref()?)))
            .filter(|(namespace, spec)| {
                let selector = spec.pod_selector.clone().unwrap_or_default();
                *namespace == own.namespace && selects(&selector, &own.labels) && has_type(spec, direction)
            })
            .collect();
        let mut rules = isolating.iter().flat_map(|(namespace, spec)| match direction {
            "Ingress" => spec.ingress.iter().flatten().map(|rule| (*namespace, &rule.from, &rule.ports)).collect::<Vec<_>>(),
            _ => spec.egress.iter().flatten().map(|rule| (*namespace, &rule.to, &rule.ports)).collect(),
        });
        isolating.is_empty()
            || rules.any(|(namespace, peers, ports)| {
                // "If this field is empty or missing, this rule matches all": of peers and of ports alike.
                let peer_fits = match peers.as_deref() {
                    None | Some([]) => true,
                    Some(peers) => peers.iter().any(|p| self.peer(p, namespace, peer)),
                };
                let port_fits = match ports.as_deref() {
                    None | Some([]) => true,
                    Some(ports) => ports.iter().any(|p| port_fits(p, server, port)),
                };
                peer_fits && port_fits
            })
    }

    fn peer(&self, peer: &NetworkPolicyPeer, own_namespace: &str, end: End<'_>) -> bool {
        let NetworkPolicyPeer { ip_block, namespace_selector, pod_selector } = peer;
        match (end, ip_block) {
            (End::Outside(address), Some(block)) => block_holds(block, &[address]),
            (End::Pod(pod), Some(block)) => self.blocks_match_pods && block_holds(block, &pod.addresses),
            (End::Outside(_), None) => false,
            (End::Pod(pod), None) => {
                let namespace = match namespace_selector {
                    None => pod.namespace == own_namespace,
                    Some(selector) => selects(selector, &self.namespace_labels(&pod.namespace)),
                };
                namespace && pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.labels))
            }
        }
    }
}

/// "If this field is not specified, it will default based on the existence of ingress or egress rules; policies that contain an
/// egress section are assumed to affect egress, and all policies are assumed to affect ingress."
fn has_type(spec: &NetworkPolicySpec, direction: &str) -> bool {
    match spec.policy_types.as_deref() {
        None | Some([]) => direction == "Ingress" || spec.egress.is_some(),
        Some(types) => types.iter().any(|t| t == direction),
    }
}

fn block_holds(block: &k8s_openapi::api::networking::v1::IPBlock, addresses: &[IpAddr]) -> bool {
    let holds = |cidr: &str, address: &IpAddr| cidr.parse::<IpNet>().unwrap().contains(address);
    addresses.iter().any(|a| holds(&block.cidr, a) && !block.except.iter().flatten().any(|except| holds(except, a)))
}

fn port_fits(rule: &NetworkPolicyPort, server: End<'_>, port: Port<'_>) -> bool {
    let protocol = rule.protocol.as_deref().unwrap_or("TCP");
    if protocol != port.protocol {
        return false;
    }
    match (&rule.port, server) {
        (None, _) => true,
        (Some(IntOrString::Int(first)), _) => {
            let last = rule.end_port.unwrap_or(*first);
            (*first..=last).contains(&i32::from(port.number))
        }
        (Some(IntOrString::String(name)), End::Pod(pod)) => {
            pod.ports.iter().any(|(n, proto, number)| n == name && proto == protocol && *number == port.number)
        }
        (Some(IntOrString::String(_)), End::Outside(_)) => false,
    }
}
