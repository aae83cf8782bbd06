//! Guardrails: what must never be allowed, whatever was observed. They deny nothing themselves; they refuse an allow, when
//! it is reviewed. Which guardrails there are comes in as data.
//!
//! # Why
//! A connection passes if both ends allow it, and the two ends are reviewed at different times. So each allow is judged
//! alone: one that could take part in a forbidden connection is a breach, whatever the other end says today.
//!
//! What was in force before its guardrail stays in force and is listed: to cut it would be an outage that nobody decided. It may
//! be narrowed or taken out at any time, and nothing may be added to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::check::covers;
use crate::policy_set::{Direction, Peer, PolicySet, Rule, WorkloadPolicy};
use crate::service::Ports;
use crate::workload::Workload;

/// Ends of connections, as a guardrail names them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Party {
    /// One workload.
    Workload(Workload),
    /// Every workload of a Compose project or a Kubernetes namespace.
    Project(String),
    /// Every workload.
    Workloads,
    /// The nodes themselves.
    Host,
    /// Addresses outside.
    Outside(IpNet),
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(workload) => workload.fmt(f),
            Self::Project(project) => write!(f, "project:{project}"),
            Self::Workloads => f.write_str("workloads:"),
            Self::Host => Peer::Host.fmt(f),
            Self::Outside(net) => Peer::Outside(*net).fmt(f),
        }
    }
}

/// Text that is not a party.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{text}\" is not a party: write a workload (shop/db), project:NAME, workloads: (every one), host: or outside:NETWORK, \
     for example outside:0.0.0.0/0"
)]
pub struct NotAParty {
    /// What was given.
    pub text: String,
}

impl FromStr for Party {
    type Err = NotAParty;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAParty { text: text.to_owned() };
        if text == "workloads:" {
            return Ok(Self::Workloads);
        }
        if let Some(project) = text.strip_prefix("project:") {
            // What a project may be called is what the left half of a workload's name may be.
            let workload: Workload = format!("{project}/x").parse().map_err(|_| wrong())?;
            return Ok(Self::Project(workload.namespace().to_owned()));
        }
        match text.parse().map_err(|_| wrong())? {
            Peer::Workload(workload) => Ok(Self::Workload(workload)),
            Peer::Host => Ok(Self::Host),
            Peer::Outside(net) => Ok(Self::Outside(net)),
        }
    }
}

text_serde!(Party);

/// One side of what is forbidden: any of these, but none of those.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parties {
    /// Whom it is about; empty: nobody.
    pub any_of: BTreeSet<Party>,
    /// Who is let off.
    #[serde(default)]
    pub except: BTreeSet<Party>,
}

impl Parties {
    /// Whether a peer, or a part of it, is meant.
    pub fn touch(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Workload(workload) => self.any_of.iter().any(|p| p.is(workload)) && !self.except.iter().any(|p| p.is(workload)),
            Peer::Host => self.any_of.contains(&Party::Host) && !self.except.contains(&Party::Host),
            Peer::Outside(net) => {
                // Aggregated, so that several exceptions that cover a network between them are one that holds it.
                let except = IpNet::aggregate(&networks(&self.except).collect());
                networks(&self.any_of)
                    // Two networks are apart, or one holds the other.
                    .filter_map(
                        |forbidden| if forbidden.contains(net) { Some(*net) } else { net.contains(&forbidden).then_some(forbidden) },
                    )
                    .any(|common| !except.iter().any(|e| e.contains(&common)))
            }
        }
    }
}

fn networks(parties: &BTreeSet<Party>) -> impl Iterator<Item = IpNet> {
    parties.iter().filter_map(|party| match party {
        Party::Outside(net) => Some(*net),
        Party::Workload(_) | Party::Project(_) | Party::Workloads | Party::Host => None,
    })
}

impl Party {
    fn is(&self, workload: &Workload) -> bool {
        match self {
            Self::Workload(w) => w == workload,
            Self::Project(project) => *project == workload.namespace(),
            Self::Workloads => true,
            Self::Host | Self::Outside(_) => false,
        }
    }

    /// Every address outside, of both families.
    pub fn everyone_outside() -> [Self; 2] {
        [IpAddr::from([0_u8; 4]), IpAddr::from([0_u8; 16])]
            .map(|any| Self::Outside(IpNet::new(any, 0).expect("0 is a prefix length of both families")))
    }
}

/// What must never be allowed: connections from some parties to others, on some ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Guardrail {
    /// Its name.
    pub name: String,
    /// The clients.
    pub from: Parties,
    /// The servers.
    pub to: Parties,
    /// The servers' ports; empty: every protocol and port.
    #[serde(default)]
    pub ports: BTreeSet<Ports>,
    /// Why, for whoever runs into it.
    #[serde(default)]
    pub reason: String,
}

/// An allow that a guardrail forbids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Breach {
    /// The guardrail's name.
    pub guardrail: String,
    /// The guardrail's reason.
    pub reason: String,
    /// Whose policy.
    pub workload: Workload,
    /// Which side of it.
    pub direction: Direction,
    /// The rule.
    pub rule: Rule,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guardrail, reason, workload, direction, rule } = self;
        write!(f, "policy {workload}, {direction}: {rule}: guardrail {guardrail} forbids it")?;
        if reason.is_empty() { Ok(()) } else { write!(f, " ({reason})") }
    }
}

impl Guardrail {
    /// Whether this allow could let a forbidden connection pass.
    pub fn forbids(&self, workload: &Workload, direction: Direction, rule: &Rule) -> bool {
        let own = Peer::Workload(workload.clone());
        let (from, to) = match direction {
            Direction::Ingress => (&rule.peer, &own),
            Direction::Egress => (&own, &rule.peer),
        };
        self.from.touch(from) && self.to.touch(to) && (self.ports.is_empty() || self.ports.iter().any(|ports| overlap(*ports, rule.ports)))
    }

    /// Every rule of a policy that the guardrail forbids, ingress first, in the rules' order.
    pub fn breaches(&self, policy: &WorkloadPolicy) -> Vec<Breach> {
        [Direction::Ingress, Direction::Egress]
            .into_iter()
            .flat_map(|direction| policy.rules(direction).iter().map(move |rule| (direction, rule)))
            .filter(|(direction, rule)| self.forbids(&policy.workload, *direction, rule))
            .map(|(direction, rule)| Breach {
                guardrail: self.name.clone(),
                reason: self.reason.clone(),
                workload: policy.workload.clone(),
                direction,
                rule: rule.clone(),
            })
            .collect()
    }
}

/// The guardrails that forbid an allow, in order.
pub fn forbidding<'g>(
    guardrails: &'g BTreeMap<String, Guardrail>,
    workload: &Workload,
    direction: Direction,
    rule: &Rule,
) -> Vec<&'g Guardrail> {
    guardrails.values().filter(|guardrail| guardrail.forbids(workload, direction, rule)).collect()
}

/// What is in force although a guardrail forbids it: it was there before the guardrail.
pub fn in_force(set: &PolicySet, now: Timestamp) -> Vec<Breach> {
    let mut breaches = breaches(set);
    breaches.retain(|breach| breach.rule.in_force(now));
    breaches
}

/// What a change would newly allow against the guardrails that hold after it. A rule that only narrows one of before is no new
/// allow.
pub fn newly(before: &PolicySet, after: &PolicySet) -> Vec<Breach> {
    let mut breaches = breaches(after);
    breaches.retain(|Breach { workload, direction, rule, .. }| {
        let had = before.policies.get(workload);
        !had.is_some_and(|policy| policy.about(*direction, &rule.peer).any(|wide| covers(wide, rule)))
    });
    breaches
}

fn breaches(set: &PolicySet) -> Vec<Breach> {
    set.policies.values().flat_map(|policy| set.guardrails.values().flat_map(|guardrail| guardrail.breaches(policy))).collect()
}

fn overlap(a: Ports, b: Ports) -> bool {
    a.protocol() == b.protocol() && a.first() <= b.last() && b.first() <= a.last()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parties(any_of: &[&str], except: &[&str]) -> Parties {
        let set = |words: &[&str]| words.iter().map(|word| word.parse().unwrap()).collect();
        Parties { any_of: set(any_of), except: set(except) }
    }

    fn guardrail(from: Parties, to: Parties, ports: &[&str]) -> Guardrail {
        let ports = ports.iter().map(|p| p.parse().unwrap()).collect();
        Guardrail { name: "never".to_owned(), from, to, ports, reason: String::new() }
    }

    fn rule(text: &str) -> Rule {
        let (peer, ports) = text.split_once(' ').unwrap();
        Rule { peer: peer.parse().unwrap(), ports: ports.parse().unwrap(), until: None }
    }

    #[track_caller]
    fn forbids(guardrail: &Guardrail, workload: &str, direction: Direction, text: &str) -> bool {
        guardrail.forbids(&workload.parse().unwrap(), direction, &rule(text))
    }

    #[test]
    fn prod_never_reaches_dev_whichever_side_would_allow_it() {
        let never = guardrail(parties(&["project:prod"], &[]), parties(&["project:dev"], &[]), &[]);
        assert!(forbids(&never, "prod/web", Direction::Egress, "dev/db tcp/5432"));
        assert!(forbids(&never, "dev/db", Direction::Ingress, "prod/web tcp/5432"));
        assert!(!forbids(&never, "dev/web", Direction::Egress, "prod/db tcp/5432"), "the way back is not meant");
        assert!(!forbids(&never, "prod/web", Direction::Egress, "prod/db tcp/5432"));
        assert!(!forbids(&never, "web", Direction::Egress, "dev/db tcp/5432"));
    }

    #[test]
    fn only_the_gateway_is_reached_from_outside() {
        let outside = parties(&["outside:0.0.0.0/0", "outside:::/0"], &[]);
        let never = guardrail(outside, parties(&["workloads:"], &["shop/gateway"]), &[]);
        assert!(forbids(&never, "shop/db", Direction::Ingress, "outside:192.0.2.7 tcp/5432"));
        assert!(forbids(&never, "shop/db", Direction::Ingress, "outside:2001:db8::/32 tcp/5432"));
        assert!(!forbids(&never, "shop/gateway", Direction::Ingress, "outside:192.0.2.7 tcp/443"));
        assert!(!forbids(&never, "shop/db", Direction::Ingress, "shop/gateway tcp/5432"));
        assert!(!forbids(&never, "shop/db", Direction::Ingress, "host: tcp/5432"));
        assert!(!forbids(&never, "shop/db", Direction::Egress, "outside:192.0.2.7 tcp/443"));
    }

    #[test]
    fn a_wide_allow_that_holds_a_forbidden_network_is_a_breach() {
        let never = guardrail(parties(&["workloads:"], &[]), parties(&["outside:198.51.100.0/24"], &[]), &[]);
        assert!(forbids(&never, "shop/web", Direction::Egress, "outside:0.0.0.0/0 tcp/443"));
        assert!(forbids(&never, "shop/web", Direction::Egress, "outside:198.51.100.9 tcp/443"));
        assert!(!forbids(&never, "shop/web", Direction::Egress, "outside:192.0.2.0/24 tcp/443"));
        assert!(!forbids(&never, "shop/web", Direction::Egress, "outside:::/0 tcp/443"));
    }

    #[test]
    fn exceptions_let_off_only_what_they_cover_together() {
        let except = ["outside:10.0.0.0/9", "outside:10.128.0.0/9"];
        let never = guardrail(parties(&["outside:0.0.0.0/0"], &except), parties(&["workloads:"], &[]), &[]);
        assert!(!forbids(&never, "shop/web", Direction::Ingress, "outside:10.0.0.0/8 tcp/443"));
        assert!(!forbids(&never, "shop/web", Direction::Ingress, "outside:10.200.0.1 tcp/443"));
        assert!(forbids(&never, "shop/web", Direction::Ingress, "outside:0.0.0.0/0 tcp/443"), "wider than the exceptions");
        assert!(forbids(&never, "shop/web", Direction::Ingress, "outside:192.0.2.1 tcp/443"));
    }

    #[test]
    fn ports_are_breached_by_any_overlap() {
        let never = guardrail(parties(&["workloads:", "host:"], &[]), parties(&["workloads:"], &[]), &["tcp/22", "udp/8000-8010"]);
        for (ports, breach) in
            [("tcp/22", true), ("tcp/1-65535", true), ("tcp/23", false), ("udp/22", false), ("udp/8010-9000", true), ("icmp/8", false)]
        {
            assert_eq!(forbids(&never, "shop/web", Direction::Ingress, &format!("host: {ports}")), breach, "{ports}");
        }
    }

    #[test]
    fn a_breach_says_what_forbids_which_rule_and_why() {
        let mut never = guardrail(parties(&["project:prod"], &[]), parties(&["project:dev"], &[]), &[]);
        never.reason = "audit 7.2".to_owned();
        let mut policy = WorkloadPolicy::empty("prod/web".parse().unwrap());
        policy.egress = [rule("dev/db tcp/5432"), rule("prod/db tcp/5432")].into();
        let breaches: Vec<String> = never.breaches(&policy).iter().map(Breach::to_string).collect();
        assert_eq!(breaches, ["policy prod/web, egress: dev/db tcp/5432: guardrail never forbids it (audit 7.2)"]);
    }

    #[test]
    fn parties_print_what_they_are_read_from() {
        for text in ["shop/db", "web", "project:shop", "workloads:", "host:", "outside:0.0.0.0/0", "outside:::/0", "outside:192.0.2.7"] {
            assert_eq!(text.parse::<Party>().unwrap().to_string(), text);
        }
        for text in ["", "project:", "project:a/b", "workloads:x", "outside:10.0.0.5/8", "outside:", "everyone"] {
            assert_eq!(text.parse::<Party>().is_err(), text != "everyone", "{text}: a bare word is a workload's name");
        }
    }
}
