//! One table for each thing that can be listed. Pure: views in, rows out.

use jiff::Timestamp;
use policy::evidence::Evidence;
use policy::review::Decision;
use policy::suggestion::{Origin, ProposedRule, RuleState, Severity};

use super::output::{Text, Tone, bytes, count};
use super::when;
use crate::api::view::{AuditLine, EdgeView, FlowView, GuardrailView, NetworkView, PolicyView, SegmentView, SuggestionLine, WorkloadView};

/// Header and rows.
pub(super) type Rows = (&'static [&'static str], Vec<Vec<Text>>);

fn time(time: Option<Timestamp>, now: Timestamp) -> Text {
    time.map_or_else(|| Text::toned(Tone::Dim, "never"), |time| when::ago(time, now).into())
}

fn list<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn or_dash(text: String) -> Text {
    if text.is_empty() { Text::toned(Tone::Dim, "-") } else { text.into() }
}

/// `412 flows`, `12 connected, no data`, `3 refused`: what there was, the heaviest first.
pub(super) fn seen(evidence: &Evidence) -> String {
    let parts = [
        (evidence.established, "established"),
        (evidence.connected_no_data, "without data"),
        (evidence.one_way, "one-way"),
        (evidence.unanswered, "unanswered"),
        (evidence.refused, "refused"),
        (evidence.would_deny, "would be denied"),
        (evidence.denied, "denied"),
    ];
    list(parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")))
}

/// The rows of the graph.
pub(super) fn edges(edges: &[EdgeView], wide: bool, now: Timestamp) -> Rows {
    let narrow_header: &[&str] = &["FROM", "TO", "PORT", "FLOWS", "LAST", "VERDICT"];
    let wide_header: &[&str] =
        &["FROM", "TO", "PORT", "FLOWS", "SENT", "RECEIVED", "HOURS", "DAYS", "ROADS", "FIRST", "LAST", "VERDICT", "REASON"];
    let row = |edge: &EdgeView| {
        let EdgeView { from, to, service, direction_known, evidence, verdict, reason } = edge;
        let to = if *direction_known { to.to_string() } else { format!("{to} (direction unknown)") };
        let mut row: Vec<Text> = vec![from.into(), to.into(), service.into(), or_dash(seen(evidence))];
        if wide {
            row.extend([bytes(evidence.bytes_sent).into(), bytes(evidence.bytes_received).into()]);
            row.extend([evidence.hours.hours().into(), evidence.hours.days().into()]);
            row.push(or_dash(list(evidence.roads.iter().map(|road| format!("{road:?}").to_lowercase()))));
            row.push(time(evidence.first, now));
        }
        row.push(time(evidence.last, now));
        row.push(Text::toned((*verdict).into(), verdict));
        if wide {
            row.push(reason.into());
        }
        row
    };
    (if wide { wide_header } else { narrow_header }, edges.iter().map(row).collect())
}

/// The header of the flows; their rows are printed one by one as they come.
pub(super) const FLOWS: &[&str] = &["TIME", "FROM", "TO", "PORT", "OUTCOME", "VERDICT", "REASON"];

/// Rows of flows.
pub(super) fn flows(flows: &[FlowView], wide: bool, now: Timestamp) -> Rows {
    let today = |time: Timestamp| time.strftime("%F").to_string() == now.strftime("%F").to_string();
    let moment = |time: Timestamp| if wide || !today(time) { when::moment(time) } else { time.strftime("%H:%M:%SZ").to_string() };
    let row = |FlowView { flow, verdict, .. }: &FlowView| -> Vec<Text> {
        vec![
            moment(flow.time).into(),
            (&flow.from).into(),
            (&flow.to).into(),
            flow.service.into(),
            flow.outcome.into(),
            Text::toned((*verdict).into(), verdict),
            flow.reason.as_str().into(),
        ]
    };
    (FLOWS, flows.iter().map(row).collect())
}

/// `2 blocking, 1 warning`.
pub(super) fn weights((blocking, warnings, infos): (u64, u64, u64)) -> String {
    let parts = [(blocking, "blocking"), (warnings, "warning"), (infos, "info")];
    list(parts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")))
}

/// The rows of suggestions.
pub(super) fn suggestions(lines: &[SuggestionLine], wide: bool, now: Timestamp) -> Rows {
    let row = |line: &SuggestionLine| -> Vec<Text> {
        let digest = if wide { line.digest.clone() } else { short(&line.digest).to_owned() };
        let undecided = if line.undecided > 0 { Text::toned(Tone::Bold, line.undecided) } else { line.undecided.into() };
        let findings = weights(line.findings);
        let findings = if line.findings.0 > 0 { Text::toned(Tone::Bad, findings) } else { or_dash(findings) };
        vec![
            (&line.workload).into(),
            or_dash(line.segment.clone().unwrap_or_default()),
            line.phase.into(),
            line.rules.into(),
            undecided,
            findings,
            line.revision.into(),
            digest.into(),
            time(line.updated, now),
        ]
    };
    (&["WORKLOAD", "SEGMENT", "PHASE", "RULES", "UNDECIDED", "FINDINGS", "REVISION", "DIGEST", "UPDATED"], lines.iter().map(row).collect())
}

/// The first characters of a digest, enough to name it on a command line.
pub(crate) fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// The rows of segments.
pub(super) fn segments(segments: &[SegmentView], wide: bool) -> Rows {
    let narrow_header: &[&str] = &["SEGMENT", "MODE", "WORKLOADS", "WITHOUT POLICY", "MEMBERS"];
    let wide_header: &[&str] = &["SEGMENT", "MODE", "WORKLOADS", "WITHOUT POLICY", "MEMBERS", "REFUSAL", "PROMOTION"];
    let row = |view: &SegmentView| -> Vec<Text> {
        let segment = &view.segment;
        let tone = match segment.mode {
            policy::Mode::Learn => Tone::Dim,
            policy::Mode::Audit => Tone::Warn,
            policy::Mode::Enforce => Tone::Good,
        };
        let members = list(&segment.members);
        let workloads = if wide { list(&view.workloads) } else { view.workloads.len().to_string() };
        let unlearned = if wide || view.unlearned.len() <= 3 { list(&view.unlearned) } else { view.unlearned.len().to_string() };
        let mut row = vec![
            segment.name.as_str().into(),
            Text::toned(tone, segment.mode),
            or_dash(workloads),
            or_dash(unlearned),
            if view.implicit { Text::toned(Tone::Dim, format!("{members} (by itself)")) } else { members.into() },
        ];
        if wide {
            row.push(format!("{:?}", segment.refusal).to_lowercase().into());
            row.push(or_dash(segment.promotion.as_ref().map_or(String::new(), |p| {
                format!("after {} healthy hours, {} distinct, {} would-be denials", p.healthy_hours, p.distinct_hours, p.would_be_denials)
            })));
        }
        row
    };
    (if wide { wide_header } else { narrow_header }, segments.iter().map(row).collect())
}

/// The rows of workloads.
pub(super) fn workloads(workloads: &[WorkloadView], wide: bool) -> Rows {
    let narrow_header: &[&str] = &["WORKLOAD", "SEGMENT", "MODE", "POLICY", "CONTAINERS", "NETWORKS", "NOTE"];
    let wide_header: &[&str] = &["WORKLOAD", "SEGMENT", "MODE", "POLICY", "CONTAINERS", "NETWORKS", "ADDRESSES", "IMAGES", "NOTE"];
    let row = |view: &WorkloadView| -> Vec<Text> {
        let mut notes: Vec<String> = Vec::new();
        if view.quarantined {
            notes.push("quarantined".to_owned());
        }
        if !view.unmanaged.is_empty() {
            notes.push(format!("not protected: {}", list(&view.unmanaged)));
        }
        let note = notes.join("; ");
        let containers = if wide { list(view.containers.iter().map(|c| &c.name)) } else { view.containers.len().to_string() };
        let mut row: Vec<Text> = vec![
            (&view.workload).into(),
            or_dash(view.segment.clone().unwrap_or_default()),
            view.mode.into(),
            if view.approved { Text::toned(Tone::Good, "approved") } else { Text::toned(Tone::Dim, "none") },
            containers.into(),
            or_dash(list(&view.networks)),
        ];
        if wide {
            row.push(or_dash(list(view.containers.iter().flat_map(|c| &c.addresses))));
            row.push(or_dash(list(view.containers.iter().map(|c| &c.image).collect::<std::collections::BTreeSet<_>>())));
        }
        row.push(if note.is_empty() { or_dash(note) } else { Text::toned(Tone::Bad, note) });
        row
    };
    (if wide { wide_header } else { narrow_header }, workloads.iter().map(row).collect())
}

/// The rows of networks.
pub(super) fn networks(networks: &[NetworkView], wide: bool) -> Rows {
    let narrow_header: &[&str] = &["NODE", "NETWORK", "STATE", "WORKLOADS", "WHY"];
    let wide_header: &[&str] = &["NODE", "NETWORK", "STATE", "WORKLOADS", "DRIVER", "BRIDGE", "SUBNETS", "INTERNAL", "WHY"];
    let row = |view: &NetworkView| -> Vec<Text> {
        let mut row: Vec<Text> =
            vec![view.node.as_str().into(), view.name.as_str().into(), Text::toned(state_tone(&view.state), &view.state)];
        row.push(if wide { or_dash(list(&view.workloads)) } else { view.workloads.len().into() });
        if wide {
            row.push(view.driver.as_str().into());
            row.push(or_dash(view.bridge.clone().unwrap_or_default()));
            row.push(or_dash(view.subnets.join(", ")));
            row.push(if view.internal { "yes".into() } else { Text::toned(Tone::Dim, "no") });
        }
        row.push(or_dash(view.why.clone()));
        row
    };
    (if wide { wide_header } else { narrow_header }, networks.iter().map(row).collect())
}

fn state_tone(state: &str) -> Tone {
    match state {
        "enforced" => Tone::Good,
        "audited" => Tone::Warn,
        "not enforced" | "not enforceable" => Tone::Bad,
        _ => Tone::Dim,
    }
}

/// The rows of policies.
pub(super) fn policies(policies: &[PolicyView], now: Timestamp) -> Rows {
    let row = |view: &PolicyView| -> Vec<Text> {
        let by = view.decided.as_ref();
        vec![
            (&view.policy.workload).into(),
            view.policy.ingress.len().into(),
            view.policy.egress.len().into(),
            view.revision.into(),
            or_dash(by.map_or(String::new(), |d| d.who.name.clone())),
            time(by.map(|d| d.time), now),
            if view.half_approved.is_empty() {
                or_dash(String::new())
            } else {
                Text::toned(Tone::Warn, format!("{} approved on this side only", count(view.half_approved.len() as u64, "edge")))
            },
        ]
    };
    (&["WORKLOAD", "INGRESS", "EGRESS", "REVISION", "BY", "DECIDED", "NOTE"], policies.iter().map(row).collect())
}

/// One side of a guardrail, as people write it.
pub(super) fn parties(parties: &policy::guardrail::Parties) -> String {
    let named = list(&parties.any_of);
    if parties.except.is_empty() { named } else { format!("{named} except {}", list(&parties.except)) }
}

/// The rows of guardrails.
pub(super) fn guardrails(guardrails: &[GuardrailView]) -> Rows {
    let row = |view: &GuardrailView| -> Vec<Text> {
        let policy::guardrail::Guardrail { name, from, to, ports, reason } = &view.guardrail;
        let broken = view.breaches.len() as u64;
        vec![
            name.as_str().into(),
            parties(from).into(),
            parties(to).into(),
            if ports.is_empty() { "any".into() } else { list(ports).into() },
            if broken == 0 { or_dash(String::new()) } else { Text::toned(Tone::Bad, count(broken, "rule in force")) },
            or_dash(reason.clone()),
        ]
    };
    (&["GUARDRAIL", "NEVER FROM", "TO", "PORTS", "BROKEN BY", "REASON"], guardrails.iter().map(row).collect())
}

/// Who, as a person reads it.
pub(super) fn who(decision: &Decision) -> String {
    match &decision.who.claims {
        Some(claim) => format!("{} (says: {claim})", decision.who.name),
        None => decision.who.name.clone(),
    }
}

/// The rows of the record.
pub(super) fn decisions(decisions: &[Decision], wide: bool) -> Rows {
    let row = |decision: &Decision| -> Vec<Text> {
        let digest = decision.digest.as_deref().unwrap_or_default();
        vec![
            decision.number.into(),
            when::moment(decision.time).into(),
            who(decision).into(),
            format!("{:?}", decision.action).to_lowercase().into(),
            decision.subject.as_str().into(),
            or_dash(if wide { decision.rules.join("; ") } else { rules_in_short(&decision.rules) }),
            or_dash(if wide { digest.to_owned() } else { short(digest).to_owned() }),
            decision.generation.into(),
            or_dash(decision.comment.clone()),
        ]
    };
    (&["NUMBER", "TIME", "WHO", "ACTION", "SUBJECT", "RULES", "DIGEST", "GENERATION", "COMMENT"], decisions.iter().map(row).collect())
}

fn rules_in_short(rules: &[String]) -> String {
    match rules {
        [] => String::new(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

/// The rows of would-be denials.
pub(super) fn audit(lines: &[AuditLine], now: Timestamp) -> Rows {
    let row = |line: &AuditLine| -> Vec<Text> {
        vec![
            (&line.from).into(),
            (&line.to).into(),
            line.service.into(),
            line.would_deny.into(),
            line.denied.into(),
            time(line.last, now),
            Text::toned(line.verdict.into(), line.verdict),
            line.reason.as_str().into(),
        ]
    };
    (&["FROM", "TO", "PORT", "WOULD BE DENIED", "DENIED", "LAST", "NOW", "REASON"], lines.iter().map(row).collect())
}

/// The rows of proposed rules.
pub(super) fn rules(rules: &[ProposedRule], wide: bool, now: Timestamp) -> Rows {
    let narrow_header: &[&str] = &["ID", "WAY", "PEER", "PORT", "STATE", "SEEN", "LAST"];
    let wide_header: &[&str] = &["ID", "DIRECTION", "PEER", "PORT", "STATE", "SEEN", "WHY", "HOURS", "LAST"];
    let row = |rule: &ProposedRule| -> Vec<Text> {
        let state = match rule.state {
            RuleState::Undecided => Text::toned(Tone::Bold, "undecided"),
            RuleState::Approved => Text::toned(Tone::Good, "approved"),
            RuleState::Rejected => Text::toned(Tone::Dim, "rejected"),
        };
        let seen = seen(&rule.evidence);
        let mut row: Vec<Text> =
            vec![rule.id.as_str().into(), rule.direction.into(), (&rule.rule.peer).into(), rule.rule.ports.into(), state];
        if wide {
            row.extend([or_dash(seen), origin(rule.origin).into(), rule.evidence.hours.hours().into()]);
        } else if matches!(rule.origin, Origin::Observed) {
            row.push(or_dash(seen));
        } else {
            // Why it is proposed although nobody was seen, or seen answering.
            let why = origin(rule.origin);
            row.push(if seen.is_empty() { why.into() } else { format!("{seen} ({why})").into() });
        }
        row.push(time(rule.evidence.last, now));
        row
    };
    (if wide { wide_header } else { narrow_header }, rules.iter().map(row).collect())
}

/// Why a rule is proposed, in words.
pub(super) fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::Observed => "observed",
        Origin::OneWay => "one-way",
        Origin::NeededByEngine => "needed by the engine",
        Origin::Counterpart => "counterpart",
        Origin::DeniedAttempt => "denied attempt",
    }
}

/// A finding's weight, with its tone.
pub(super) fn severity(severity: Severity) -> (Tone, &'static str) {
    match severity {
        Severity::Blocking => (Tone::Bad, "blocking"),
        Severity::Warning => (Tone::Warn, "warning"),
        Severity::Info => (Tone::Dim, "info"),
    }
}
