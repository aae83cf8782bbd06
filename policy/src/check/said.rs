//! The findings one by one: what, about what, what it may mean, what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::uses::Uses;
use super::{BREAKS_GUARDRAIL, InForce, Material, Proposal, covers};
use crate::estimate::spoken;
use crate::guardrail::{self, Guardrail};
use crate::learn::Why;
use crate::learn::digest::rule_id;
use crate::learn::outside::{Choice, Width};
use crate::policy_set::{Direction, Peer, Rule};
use crate::suggestion::{Finding, Origin, RuleState, Severity};
use crate::workload::Endpoint;

/// Names listed in one sentence before it says how many more there are.
const NAMED: usize = 5;

fn finding(severity: Severity, code: &str, text: String) -> Finding {
    Finding { severity, code: code.to_owned(), text }
}

/// `a, b, c and 4 more`
pub(crate) fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let mut items = items.into_iter();
    let named = items.by_ref().take(NAMED).map(|item| item.to_string()).collect::<Vec<_>>().join(", ");
    match items.count() {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// `65536` as `65,536`.
fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn addresses(net: &IpNet) -> String {
    match u32::from(net.max_prefix_len() - net.prefix_len()) {
        bits @ 0..=64 => grouped(1u128 << bits),
        bits => format!("2^{bits}"),
    }
}

fn plural<'t>(count: usize, one: &'t str, many: &'t str) -> &'t str {
    if count == 1 { one } else { many }
}

pub(super) fn all(m: &Material<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    evidence(m, &mut found);
    guardrails(m, &mut found);
    identity(m, &mut found);
    names(m, &mut found);
    outside(m, &mut found);
    marked(m, &mut found);
    found.extend(m.in_force.iter().flat_map(in_force));
    shown(m, &mut found);
    window(m, &mut found);
    found
}

fn evidence(m: &Material<'_>, found: &mut Vec<Finding>) {
    let w = m.workload;
    if !m.used.is_empty() {
        return;
    }
    // Approved already, and quiet since: approving again isolates nobody.
    let severity = if m.policy.is_some() { Severity::Warning } else { Severity::Blocking };
    let rest = m.rules.iter().filter(|rule| rule.origin != Origin::DeniedAttempt).count();
    let text = if rest == 0 {
        format!(
            "nothing was seen of {w} that would be a rule. Approving this would isolate it under Enforce. Let it work first, or add edges by `bulkhead allow`."
        )
    } else {
        format!(
            "nothing was seen of {w} itself; the {rest} {} here come from elsewhere. Under Enforce it could do nothing else.",
            plural(rest, "rule", "rules")
        )
    };
    found.push(finding(severity, "no-evidence", text));
}

/// `guardrail a (why) and guardrail b`
fn named(guardrails: &[&Guardrail]) -> String {
    let name = |Guardrail { name, reason, .. }: &&Guardrail| match reason.as_str() {
        "" => format!("guardrail {name}"),
        reason => format!("guardrail {name} ({reason})"),
    };
    guardrails.iter().map(name).collect::<Vec<_>>().join(" and ")
}

fn guardrails(m: &Material<'_>, found: &mut Vec<Finding>) {
    let w = m.workload;
    for proposed in m.rules {
        let forbidding = guardrail::forbidding(m.guardrails, w, proposed.direction, &proposed.rule);
        if forbidding.is_empty() {
            continue;
        }
        // A denied attempt is outside the digest, or whoever is denied could move it.
        let severity = if proposed.origin == Origin::DeniedAttempt { Severity::Warning } else { Severity::Blocking };
        let (direction, rule) = (proposed.direction, &proposed.rule);
        let id = rule_id(direction, rule);
        let text = format!(
            "{direction} {rule} is forbidden by {} and cannot be approved. `bulkhead reject {w} --rule {id}` leaves it out of the whole.",
            named(&forbidding)
        );
        found.push(finding(severity, BREAKS_GUARDRAIL, text));
    }
}

fn identity(m: &Material<'_>, found: &mut Vec<Finding>) {
    let w = m.workload;
    let Some(known) = m.known else { return };
    if known.engine_named {
        let text = format!(
            "{w} is a name made up by the engine: the next container will have another one, and no policy. Give it a name, or the label bulkhead.dev/workload."
        );
        found.push(finding(Severity::Warning, "engine-named", text));
    }
    if known.runs_only {
        found.push(finding(
            Severity::Info,
            "runs-only",
            format!("only one-off runs of {w} are known (docker compose run): they are no evidence for it."),
        ));
    }
    if !known.members.is_empty() {
        let text = format!("{w} shares its network namespace with {}: their traffic is in this policy.", list(&known.members));
        found.push(finding(Severity::Info, "members", text));
    }
    if known.forwards {
        let text = format!(
            "{w} passes packets on between its networks ({}). What it sends on under its sender's address is dropped on an enforced network; what it sends on under its own counts as {w}'s, and goes by this policy. If it is no router, start it with the sysctl net.ipv4.ip_forward=0 (and net.ipv6.conf.all.forwarding=0).",
            list(&known.networks)
        );
        found.push(finding(Severity::Warning, "forwards", text));
    }
    if !known.unmanaged.is_empty() {
        let text = format!(
            "no protection is claimed for {w}: it {}. Its packets are filtered where they cross an enforced bridge.",
            list(&known.unmanaged)
        );
        found.push(finding(Severity::Warning, "unmanaged", text));
    }
}

fn names(m: &Material<'_>, found: &mut Vec<Finding>) {
    let w = m.workload;
    let needed: Vec<_> = m.rules.iter().filter(|rule| rule.origin == Origin::NeededByEngine).collect();
    if needed.is_empty() {
        if m.rules.iter().any(|rule| rule.direction == Direction::Egress && rule.origin != Origin::DeniedAttempt) {
            let text = format!(
                "the resolver of {w} is not known, so no rule allows its questions. If it asks for names: `bulkhead allow {w} RESOLVER udp/53`."
            );
            found.push(finding(Severity::Warning, "needs-dns", text));
        }
        return;
    }
    let rejected: Vec<_> = needed.iter().filter(|rule| rule.state == RuleState::Rejected).map(|rule| &rule.rule).collect();
    if !rejected.is_empty() {
        let text = format!("{w} cannot reach its resolver by {}: rejected. Names will not resolve there under Enforce.", list(rejected));
        found.push(finding(Severity::Warning, "no-dns", text));
    }
    let peers: BTreeSet<&Peer> = needed.iter().map(|rule| &rule.rule.peer).collect();
    let text =
        format!("{w} may ask for names ({}, needed by the engine). Names are not enforced yet: data can leave that way.", list(peers));
    found.push(finding(Severity::Info, "dns-open", text));
}

fn outside(m: &Material<'_>, found: &mut Vec<Finding>) {
    let is_egress = |rule: &&Proposal| rule.direction == Direction::Egress && rule.origin != Origin::NeededByEngine;
    let peers: BTreeSet<&Peer> =
        m.rules.iter().filter(is_egress).map(|rule| &rule.rule.peer).filter(|peer| matches!(peer, Peer::Outside(_))).collect();
    if !peers.is_empty() {
        let text = format!(
            "{} calls {} {} by address: {}. An address outside may change, and the call would be denied then; rules by name are not there yet.",
            m.workload,
            peers.len(),
            plural(peers.len(), "peer outside", "peers outside"),
            list(peers.iter().map(|peer| peer.to_string().replace("outside:", "")))
        );
        found.push(finding(Severity::Warning, "address-may-change", text));
    }
    m.choices.iter().for_each(|choice| opened(m, choice, found));
}

fn opened(m: &Material<'_>, choice: &Choice, found: &mut Vec<Finding>) {
    let Choice { ports, width, clients, networks, held_back } = choice;
    let w = m.workload;
    let who = format!("{clients} distinct {} outside", plural(*clients, "client", "clients"));
    let published = m.known.is_some_and(|known| known.published.iter().any(|service| ports.holds(*service)));
    let port = if published { format!("published port {ports}") } else { format!("{ports} (not published: reached by its own address)") };
    let nets = list(networks.keys());
    match width {
        Width::ExactHosts => {
            let held = if *held_back { " It stays exact because a client was rejected that a wider rule would let in again." } else { "" };
            let text = format!(
                "{who} reached {w} on {port}; exactly these are proposed ({nets}). A new client would be denied: `bulkhead allow outside:NETWORK {w} {ports}` adds one.{held}"
            );
            found.push(finding(Severity::Info, "ingress-exact-hosts", text));
        }
        Width::Private | Width::Anyone => {
            let (code, what) = match width {
                Width::Anyone => ("ingress-anyone", "anyone outside"),
                Width::Private | Width::ExactHosts => ("ingress-private-networks", "private networks"),
            };
            let text = format!(
                "{who} reached {w} on {port}; {what} ({nets}) is proposed. To narrow it: reject this rule and `bulkhead allow outside:NETWORK {w} {ports}`, or set fromOutside: exactHosts."
            );
            found.push(finding(Severity::Warning, code, text));
            for (net, held) in networks {
                let text = format!(
                    "ingress from outside:{net} {ports}: {} of {} addresses were seen.",
                    grouped(held.len() as u128),
                    addresses(net)
                );
                found.push(finding(Severity::Warning, "wider-than-observed", text));
            }
        }
    }
}

fn marked(m: &Material<'_>, found: &mut Vec<Finding>) {
    let of_origin = |origin| m.rules.iter().filter(move |rule| rule.origin == origin).peekable();
    let words = |rule: &Proposal| format!("{} {}", rule.direction, rule.rule);
    let mut one_way = of_origin(Origin::OneWay);
    if one_way.peek().is_some() {
        let text = format!(
            "one-way UDP, sent repeatedly, never answered and never refused: {}. Statistics and logs look like this; so does sending into the void.",
            list(one_way.map(words))
        );
        found.push(finding(Severity::Warning, "one-way", text));
    }
    let mut denied = of_origin(Origin::DeniedAttempt);
    if denied.peek().is_some() {
        let denied = list(denied.map(words));
        let text = format!("denied under Enforce and never seen to work: {denied}. Approved only by name (--rule), never with the whole.");
        found.push(finding(Severity::Warning, "denied-attempt", text));
    }
    if !m.halves.is_empty() {
        let text = format!("{}. It passes only once both ends in Enforce allow it.", list(m.halves));
        found.push(finding(Severity::Warning, "half-approved", text));
    }
}

/// Of each of these rules, what a person should know.
pub(super) fn in_force(these: &InForce<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let InForce { workload, policy, guardrails, rules, used, proposals, now } = *these;
    let [ingress, egress] = [Direction::Ingress, Direction::Egress].map(|direction| Uses::of(workload, used, direction));
    let needed: Vec<&Proposal> = proposals.iter().filter(|rule| rule.origin == Origin::NeededByEngine).collect();
    for &(direction, rule) in rules {
        let forbidding = guardrail::forbidding(guardrails, workload, direction, rule);
        if !forbidding.is_empty() {
            let text = format!(
                "{direction} {rule} is in force from before, and forbidden by {}: it stays until `bulkhead edit {workload}` takes it out.",
                named(&forbidding)
            );
            found.push(finding(Severity::Warning, "in-force-breaks-guardrail", text));
        }
        let wider = |wide: &&Rule| *wide != rule && wide.in_force(now) && covers(wide, rule);
        if let Some(wide) = policy.about(direction, &rule.peer).find(wider) {
            let text = format!("{direction} {rule} is in force and says nothing that {direction} {wide} does not say already.");
            found.push(finding(Severity::Info, "shadowed", text));
        }
        let uses = match direction {
            Direction::Ingress => ingress.meant(rule),
            Direction::Egress => egress.meant(rule),
        };
        let is_needed = || needed.iter().any(|needed| needed.direction == direction && covers(rule, &needed.rule));
        if uses.is_empty() && !is_needed() {
            let text = format!("{direction} {rule} is in force and was not seen in use.");
            found.push(finding(Severity::Info, "not-seen", text));
            continue;
        }
        let ports: BTreeSet<u16> = uses.iter().map(|seen| seen.service.port).collect();
        if rule.ports.width() > 1 {
            let text = format!(
                "{direction} {rule} is in force: {} of {} ports were seen in use.",
                ports.len(),
                grouped(rule.ports.width().into())
            );
            found.push(finding(Severity::Warning, "wider-than-observed", text));
        }
        if let Peer::Outside(net) = rule.peer
            && net.prefix_len() < net.max_prefix_len()
        {
            let address = |end: &Endpoint| match end {
                Endpoint::Outside(address) | Endpoint::Unmanaged { address, .. } => Some(*address),
                Endpoint::Workload(_) | Endpoint::Run(_) | Endpoint::Host | Endpoint::Unknown(_) => None,
            };
            let seen: BTreeSet<IpAddr> = uses.iter().flat_map(|seen| [seen.from, seen.to]).filter_map(address).collect();
            let text =
                format!("{direction} {rule} is in force: {} of {} addresses were seen.", grouped(seen.len() as u128), addresses(&net));
            found.push(finding(Severity::Warning, "wider-than-observed", text));
        }
        if rule.until.is_some() {
            found.push(finding(Severity::Info, "limited-time", format!("{direction} {rule} is in force for a limited time.")));
        }
    }
    found
}

fn shown(m: &Material<'_>, found: &mut Vec<Finding>) {
    let (mut scans, mut runs, mut unknown_direction, mut unknown_endpoint) = (BTreeMap::new(), 0, 0, 0);
    for (seen, why) in m.shown {
        match why {
            Why::Scan { targets } => _ = scans.insert(seen.from, *targets),
            Why::Run => runs += 1,
            Why::UnknownDirection => unknown_direction += 1,
            Why::UnknownEndpoint => unknown_endpoint += 1,
            Why::NoSuchPort | Why::ConnectedOnce | Why::OneWayRefused { .. } | Why::OneWayOnce => {}
            Why::DeniedOutside { .. } | Why::WouldDeny { .. } | Why::Attempts { .. } => {}
        }
    }
    let edges = |count| plural(count, "edge", "edges");
    if !scans.is_empty() {
        let sources = list(scans.iter().map(|(source, targets)| format!("{source} ({targets} ports or peers)")));
        let text = format!("looks like a scan: {sources}. What was only touched and never carried data is shown, not proposed.");
        found.push(finding(Severity::Warning, "scan-suspected", text));
    }
    if runs > 0 {
        let text = format!(
            "{runs} {} of one-off runs: under the service's policy when enforced, no evidence for it. What a run needs: `bulkhead allow`.",
            edges(runs)
        );
        found.push(finding(Severity::Info, "runs-shown", text));
    }
    if unknown_direction > 0 {
        let text = format!(
            "{unknown_direction} {} older than the agent, and neither end listens: no rule. Under Enforce a new connection there would be denied.",
            edges(unknown_direction)
        );
        found.push(finding(Severity::Warning, "unknown-direction", text));
    }
    if unknown_endpoint > 0 {
        let text = format!(
            "{unknown_endpoint} {} with an address that belonged to nobody known: no rule. On a guarded network such an address is denied.",
            edges(unknown_endpoint)
        );
        found.push(finding(Severity::Warning, "unknown-endpoint", text));
    }
    if m.unlisted > 0 {
        let text = format!("{} more {} not proposed, of the same kinds as those listed.", m.unlisted, edges(m.unlisted));
        found.push(finding(Severity::Info, "not-listed", text));
    }
    let pre_existing: u64 = m.used.iter().map(|seen| seen.evidence.pre_existing).sum();
    if pre_existing > 0 {
        let (connections, their) = if pre_existing == 1 { ("connection is", "its") } else { ("connections are", "their") };
        let text = format!("{pre_existing} {connections} older than the agent; {their} direction comes from which end listens.");
        found.push(finding(Severity::Info, "pre-existing", text));
    }
}

fn window(m: &Material<'_>, found: &mut Vec<Finding>) {
    let lost = m.coverage.lost;
    if lost > 0 {
        let text = format!(
            "{lost} kernel events were lost while {} was observed: edges may be missing. The clock of healthy time stood still meanwhile.",
            m.workload
        );
        found.push(finding(Severity::Warning, "loss-in-window", text));
    }
    let healthy = m.coverage.healthy_seconds;
    if healthy < u64::from(m.stable_hours) * 3600 {
        let text = format!(
            "{} was healthily observed for {} of {} h: what happens more rarely is not in here.",
            m.workload,
            spoken(healthy),
            m.stable_hours
        );
        found.push(finding(Severity::Warning, "short-window", text));
    }
    if !m.window.is_some_and(crate::learn::Window::saw_a_night) {
        let text = format!("no nightly window (00:00 to 06:00 UTC) of {} was observed yet: a nightly job would be denied.", m.workload);
        found.push(finding(Severity::Info, "no-nightly-window", text));
    }
}
