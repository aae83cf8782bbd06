//! A small town of workloads to learn from, in words.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeSet;

use jiff::Timestamp;
use policy::evidence::Road;
use policy::learn::{Context, Known, Window, learn, learn_one};
use policy::suggestion::{NotProposed, ProposedRule, Suggestion};
use policy::{EdgeDelta, Endpoint, Flow, FlowGraph, FlowOutcome, Peer, Service, Tuple, Workload};

/// The moment everything here starts: 2026-11-20 10:00 UTC.
pub const START: i64 = 1_795_168_800;

pub fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(START + seconds).unwrap()
}

pub fn workload(name: &str) -> Workload {
    name.parse().unwrap()
}

/// A rule as it prints: `shop/db tcp/5432`.
pub fn rule(text: &str) -> policy::Rule {
    let (peer, ports) = text.rsplit_once(' ').unwrap();
    policy::Rule { peer: peer.parse().unwrap(), ports: ports.parse().unwrap(), until: None }
}

pub fn flow(from: &str, to: &str, service: Service, outcome: FlowOutcome, seconds: i64) -> Flow {
    Flow {
        time: at(seconds),
        from: from.parse::<Endpoint>().unwrap(),
        to: to.parse::<Endpoint>().unwrap(),
        service,
        outcome,
        road: Road::Direct,
        direction_known: true,
        pre_existing: false,
        bytes_sent: 100,
        bytes_received: 1000,
        tuple: Tuple {
            source: "192.0.2.1".parse().unwrap(),
            destination: "192.0.2.2".parse().unwrap(),
            protocol: service.protocol,
            source_port: 40000,
            destination_port: service.port,
        },
        reason: String::new(),
    }
}

pub struct Town {
    pub graph: FlowGraph,
    pub context: Context,
}

impl Town {
    pub fn of<'n>(names: impl IntoIterator<Item = &'n str>) -> Self {
        let known = |name: &str| {
            let resolvers = [Peer::address(policy::learn::EMBEDDED_RESOLVER.into())].into();
            (workload(name), Known { resolvers, ..Known::default() })
        };
        let workloads = names.into_iter().map(known).collect();
        Self { graph: FlowGraph::new(), context: Context { workloads, now: at(0), ..Context::default() } }
    }

    /// So many flows, ten seconds apart.
    pub fn flow(&mut self, from: &str, to: &str, service: Service, outcome: FlowOutcome, count: i64) {
        for n in 0..count {
            self.graph.add(&EdgeDelta::from(&flow(from, to, service, outcome, n * 10)));
        }
    }

    pub fn watched(&mut self, name: &str, hours: i64) {
        let mut window = Window::default();
        window.add(at(0), at(hours * 3600), true, 0);
        self.context.windows.insert(workload(name), window);
    }

    pub fn suggestion(&self, name: &str) -> Suggestion {
        let one = learn_one(&self.graph, &self.context, &workload(name));
        let all = learn(&self.graph, &self.context);
        assert_eq!(all.iter().find(|s| s.workload == workload(name)), Some(&one), "learn_one says what learn says");
        one
    }

    /// The rules of a suggestion, printed and sorted.
    pub fn rules(&self, name: &str) -> Vec<String> {
        self.suggestion(name).rules.iter().map(printed).collect::<Vec<_>>().sorted()
    }

    /// The same without what the engine needs.
    pub fn learned(&self, name: &str) -> Vec<String> {
        let needed = |rule: &&ProposedRule| rule.origin != policy::suggestion::Origin::NeededByEngine;
        self.suggestion(name).rules.iter().filter(needed).map(printed).collect::<Vec<_>>().sorted()
    }

    /// What is shown and not proposed, with the reasons.
    pub fn shown(&self, name: &str) -> Vec<String> {
        self.suggestion(name).not_proposed.iter().map(|NotProposed { edge, why, .. }| format!("{edge}: {why}")).collect()
    }

    /// The text of a finding, if it is there.
    pub fn finding(&self, name: &str, code: &str) -> Option<String> {
        let texts: Vec<String> =
            self.suggestion(name).findings.into_iter().filter(|finding| finding.code == code).map(|finding| finding.text).collect();
        (!texts.is_empty()).then(|| texts.join("\n"))
    }

    pub fn codes(&self, name: &str) -> BTreeSet<String> {
        self.suggestion(name).findings.into_iter().map(|finding| finding.code).collect()
    }
}

pub fn printed(rule: &ProposedRule) -> String {
    format!("{} {}", rule.direction, rule.rule)
}

pub trait Sorted {
    fn sorted(self) -> Vec<String>;
}

impl<S: ToString, I: IntoIterator<Item = S>> Sorted for I {
    fn sorted(self) -> Vec<String> {
        let mut all: Vec<String> = self.into_iter().map(|s| s.to_string()).collect();
        all.sort();
        all
    }
}
