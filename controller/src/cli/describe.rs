//! Commands that tell everything about one thing: describe, diff, explain.

use jiff::Timestamp;
use policy::diff::{Line, Sign, SuggestionDiff};
use policy::review::Decision;
use policy::suggestion::Suggestion;
use policy::{Segment, Workload};

use super::args::{DescribeArgs, DiffArgs, ExplainArgs, Format, GetArgs, Kind};
use super::client::{Client, path};
use super::output::{Failed, Terminal, Tone, clean, count};
use super::{exit, read, shown, tables, when};
use crate::api::ask::Question;
use crate::api::view::{Explanation, GuardrailView, NetworkView, PolicyView, SegmentView, WorkloadView};

fn field(terminal: &Terminal, name: &str, value: impl std::fmt::Display) -> Result<(), Failed> {
    terminal.say(format_args!("{} {}", terminal.paint(Tone::Dim, format_args!("{name:<14}")), clean(&value.to_string())))
}

pub(super) fn title(terminal: &Terminal, text: &str) -> Result<(), Failed> {
    terminal.say(format_args!("\n{}", terminal.paint(Tone::Bold, text)))
}

fn workload(name: &str) -> Result<Workload, Failed> {
    name.parse().map_err(|e| Failed::new(exit::USAGE, e, ""))
}

pub(super) fn describe(client: &Client, terminal: &Terminal, args: DescribeArgs) -> Result<(), Failed> {
    let format = args.output.output;
    if matches!(format, Format::Json | Format::Yaml) && args.kind != Kind::Suggestions {
        return read::get(client, terminal, GetArgs { kind: args.kind, names: vec![args.name], output: args.output });
    }
    match args.kind {
        Kind::Suggestions => {
            let workload = workload(&args.name)?;
            let suggestion: Suggestion = client.get(&format!("/api/v1/suggestions/{}", path(&workload.to_string())))?;
            match format {
                Format::Json | Format::Yaml => terminal.data(&suggestion, format)?,
                Format::Table | Format::Wide => describe_suggestion(terminal, &suggestion, format)?,
            }
            remember(client, terminal, &suggestion.workload, &suggestion.digest);
            Ok(())
        }
        Kind::Policies => {
            let workload = workload(&args.name)?;
            let view: PolicyView = client.get(&format!("/api/v1/policies/{}", path(&workload.to_string())))?;
            describe_policy(terminal, &view)
        }
        Kind::Workloads => {
            let workload = workload(&args.name)?;
            let view: WorkloadView = client.get(&format!("/api/v1/workloads/{}", path(&workload.to_string())))?;
            describe_workload(terminal, &view)
        }
        Kind::Segments => {
            let all: Vec<SegmentView> = client.get("/api/v1/segments")?;
            let found = all.into_iter().find(|view| view.segment.name == args.name);
            let view = found.ok_or_else(|| unknown("segment", &args.name))?;
            describe_segment(terminal, &view)
        }
        Kind::Networks => {
            let all: Vec<NetworkView> = client.get("/api/v1/networks")?;
            let found: Vec<_> = all.into_iter().filter(|view| view.name == args.name).collect();
            if found.is_empty() {
                return Err(unknown("network", &args.name));
            }
            found.iter().try_for_each(|view| describe_network(terminal, view))
        }
        Kind::Decisions => {
            let all: Vec<Decision> = client.get("/api/v1/decisions")?;
            let found = all.into_iter().find(|decision| decision.number.to_string() == args.name);
            describe_decision(terminal, &found.ok_or_else(|| unknown("decision", &args.name))?)
        }
        Kind::Guardrails => {
            let all: Vec<GuardrailView> = client.get("/api/v1/guardrails")?;
            let found = all.into_iter().find(|view| view.guardrail.name == args.name);
            describe_guardrail(terminal, &found.ok_or_else(|| unknown("guardrail", &args.name))?)
        }
        Kind::Quarantines => read::get(client, terminal, GetArgs { kind: args.kind, names: vec![args.name], output: args.output }),
    }
}

fn unknown(kind: &str, name: &str) -> Failed {
    Failed::new(exit::NOT_FOUND, format!("no {kind} \"{name}\""), format!("`bulkhead get {kind}` lists them."))
}

fn remember(client: &Client, terminal: &Terminal, workload: &Workload, digest: &str) {
    if let Err(error) = shown::remember(client.socket(), workload, digest) {
        terminal.note(format_args!("Cannot remember what was shown ({error}): approve with --digest {}", tables::short(digest)));
    }
}

/// The rules of a suggestion with all that a reviewer should know.
pub(super) fn describe_suggestion(terminal: &Terminal, suggestion: &Suggestion, format: Format) -> Result<(), Failed> {
    let Suggestion { workload, revision, digest, phase, rules, findings, not_proposed, coverage, updated } = suggestion;
    let now = Timestamp::now();
    field(terminal, "Workload", workload)?;
    field(terminal, "Digest", digest)?;
    field(terminal, "Revision", revision)?;
    field(terminal, "Phase", phase)?;
    if let Some(updated) = updated {
        field(terminal, "Updated", format_args!("{} ({})", when::moment(*updated), when::ago(*updated, now)))?;
    }
    title(terminal, &format!("Rules ({})", rules.len()))?;
    if rules.is_empty() {
        terminal.say("  none")?;
    } else {
        let (header, rows) = tables::rules(rules, format == Format::Wide, now);
        terminal.table(header, rows, format)?;
    }
    if !findings.is_empty() {
        title(terminal, "Findings")?;
        for finding in findings {
            let (tone, weight) = tables::severity(finding.severity);
            terminal.say(format_args!("  {} {}: {}", terminal.paint(tone, weight), finding.code, clean(&finding.text)))?;
        }
    }
    if !not_proposed.is_empty() {
        title(terminal, "Seen and not proposed")?;
        for edge in not_proposed {
            let seen = tables::seen(&edge.evidence);
            terminal.say(format_args!("  {} ({seen}): {}", edge.edge, clean(&edge.why)))?;
        }
    }
    title(terminal, "What is known")?;
    let observed = when::span(coverage.healthy_seconds);
    let (hours, days) = (count(coverage.hours, "distinct hour"), count(coverage.days, "day"));
    terminal.say(format_args!("  {} in {observed} of healthy observation, traffic in {hours} on {days}", count(coverage.edges, "edge")))?;
    match coverage.unseen_connections_ppm {
        // Every edge was seen once: the estimator knows of nothing that repeats, and its 100 % says no more than that.
        Some(ppm) if ppm < 1_000_000 => {
            terminal.say(format_args!("  {} of new connections expected on an edge not seen yet", percent(ppm)))?;
        }
        Some(_) | None => terminal.say("  too little was seen to say how much is unseen")?,
    }
    if let Some(edges) = coverage.unseen_edges {
        terminal.say(format_args!("  {} expected that nobody has seen yet", count(edges, "edge")))?;
    }
    if coverage.lost > 0 {
        terminal.say(format_args!("  {} lost: rules may be missing", count(coverage.lost, "kernel event")))?;
    }
    for note in &coverage.notes {
        terminal.say(format_args!("  {}", clean(note)))?;
    }
    Ok(())
}

/// Parts of a million with one digit behind the point, as the estimate deserves. Rounded up: a small share is not none.
fn percent(ppm: u64) -> String {
    let tenths = ppm.div_ceil(1000);
    if tenths.is_multiple_of(10) { format!("{} %", tenths / 10) } else { format!("{}.{} %", tenths / 10, tenths % 10) }
}

fn describe_policy(terminal: &Terminal, view: &PolicyView) -> Result<(), Failed> {
    field(terminal, "Workload", &view.policy.workload)?;
    field(terminal, "Revision", view.revision)?;
    if let Some(decided) = &view.decided {
        field(terminal, "Decided", format_args!("{} by {}", when::moment(decided.time), tables::who(decided)))?;
        if !decided.comment.is_empty() {
            field(terminal, "Comment", &decided.comment)?;
        }
    }
    for (name, rules) in [("Ingress: who may reach it", &view.policy.ingress), ("Egress: whom it may reach", &view.policy.egress)] {
        title(terminal, name)?;
        if rules.is_empty() {
            terminal.say("  nobody")?;
        }
        for rule in rules {
            terminal.say(format_args!("  {rule}"))?;
        }
    }
    if !view.half_approved.is_empty() {
        title(terminal, "Approved on this side only")?;
        for edge in &view.half_approved {
            terminal.say(format_args!("  {}", clean(edge)))?;
        }
    }
    Ok(())
}

fn describe_workload(terminal: &Terminal, view: &WorkloadView) -> Result<(), Failed> {
    field(terminal, "Workload", &view.workload)?;
    match &view.segment {
        Some(segment) => field(terminal, "Segment", format_args!("{segment} ({})", view.mode))?,
        None => field(terminal, "Segment", "none: everything is allowed")?,
    }
    field(terminal, "Policy", if view.approved { "approved" } else { "none approved" })?;
    if view.quarantined {
        field(terminal, "Quarantine", "cut off: everything is denied")?;
    }
    for network in &view.networks {
        field(terminal, "Network", network)?;
    }
    for why in &view.unmanaged {
        field(terminal, "Not protected", why)?;
    }
    title(terminal, "Containers")?;
    for container in &view.containers {
        let run = if container.one_off { ", one-off run" } else { "" };
        let short = container.id.get(..12).unwrap_or(&container.id);
        let line =
            format!("  {} on {} ({short}, {}{run}) {}", container.name, container.node, container.image, container.addresses.join(", "));
        terminal.say(clean(&line))?;
        for member in &container.members {
            terminal.say(clean(&format!("    {member} shares its network")))?;
        }
    }
    Ok(())
}

fn describe_segment(terminal: &Terminal, view: &SegmentView) -> Result<(), Failed> {
    let Segment { name, members, mode, refusal, promotion } = &view.segment;
    field(terminal, "Segment", name)?;
    field(terminal, "Mode", mode)?;
    field(terminal, "Denied packets", format!("{refusal:?}").to_lowercase())?;
    for member in members {
        field(terminal, "Member", member)?;
    }
    if view.implicit {
        field(terminal, "Made by", "itself: the Compose project runs and nobody put it under a segment")?;
    }
    if let Some(p) = promotion {
        let hours = format!(
            "{} healthy hours, {} distinct hours, at most {} would-be denials",
            p.healthy_hours, p.distinct_hours, p.would_be_denials
        );
        field(terminal, "Promotion", hours)?;
    }
    title(terminal, "Workloads")?;
    for workload in &view.workloads {
        let policy = if view.unlearned.contains(workload) { " (no approved policy)" } else { "" };
        terminal.say(format_args!("  {workload}{policy}"))?;
    }
    Ok(())
}

fn describe_guardrail(terminal: &Terminal, view: &GuardrailView) -> Result<(), Failed> {
    let policy::guardrail::Guardrail { name, from, to, ports, reason } = &view.guardrail;
    field(terminal, "Guardrail", name)?;
    field(terminal, "Never from", tables::parties(from))?;
    field(terminal, "To", tables::parties(to))?;
    if ports.is_empty() {
        field(terminal, "Ports", "any")?;
    }
    for ports in ports {
        field(terminal, "Ports", ports)?;
    }
    if !reason.is_empty() {
        field(terminal, "Reason", reason)?;
    }
    if !view.breaches.is_empty() {
        title(terminal, "In force from before")?;
        for breach in &view.breaches {
            terminal.say(format_args!("  {}", clean(breach)))?;
        }
    }
    Ok(())
}

fn describe_network(terminal: &Terminal, view: &NetworkView) -> Result<(), Failed> {
    field(terminal, "Network", &view.name)?;
    field(terminal, "Node", &view.node)?;
    field(terminal, "State", &view.state)?;
    if !view.why.is_empty() {
        field(terminal, "Why", &view.why)?;
    }
    field(terminal, "Driver", &view.driver)?;
    if let Some(bridge) = &view.bridge {
        field(terminal, "Bridge", bridge)?;
    }
    for subnet in &view.subnets {
        field(terminal, "Subnet", subnet)?;
    }
    if view.internal {
        field(terminal, "Internal", "yes: the engine lets nothing out")?;
    }
    for workload in &view.workloads {
        field(terminal, "Workload", workload)?;
    }
    Ok(())
}

fn describe_decision(terminal: &Terminal, decision: &Decision) -> Result<(), Failed> {
    field(terminal, "Number", decision.number)?;
    field(terminal, "Time", when::moment(decision.time))?;
    field(terminal, "Who", format_args!("{} (uid {})", tables::who(decision), decision.who.uid))?;
    field(terminal, "Action", format!("{:?}", decision.action).to_lowercase())?;
    field(terminal, "Subject", &decision.subject)?;
    if let Some(digest) = &decision.digest {
        field(terminal, "Digest", digest)?;
    }
    field(terminal, "Generation", decision.generation)?;
    if !decision.comment.is_empty() {
        field(terminal, "Comment", &decision.comment)?;
    }
    for rule in &decision.rules {
        field(terminal, "Rule", rule)?;
    }
    Ok(())
}

pub(super) fn diff(client: &Client, terminal: &Terminal, args: DiffArgs) -> Result<(), Failed> {
    let view: SuggestionDiff = client.get(&format!("/api/v1/diff/{}", path(&args.workload.to_string())))?;
    match args.output.output {
        format @ (Format::Json | Format::Yaml) => terminal.data(&view, format)?,
        Format::Table | Format::Wide => {
            terminal.say(format_args!("{} (digest {})", view.workload, tables::short(&view.digest)))?;
            for Line { sign, rule, id } in &view.lines {
                let (tone, sign, note) = match sign {
                    Sign::Added => (Tone::Good, '+', ""),
                    Sign::InForce => (Tone::Dim, ' ', ""),
                    Sign::NotProposed => (Tone::Warn, ' ', " (in force, not seen in use: stays until `bulkhead edit` takes it out)"),
                    Sign::Rejected => (Tone::Dim, 'x', " (rejected)"),
                    Sign::DeniedAttempt => (Tone::Bad, '?', " (denied attempt: approved only by its id)"),
                    Sign::Forbidden => (Tone::Bad, '!', " (a guardrail forbids it: the whole is refused until it is rejected)"),
                };
                let id = if id.is_empty() { String::new() } else { format!(" [{id}]") };
                terminal.say(terminal.paint(tone, format_args!("{sign} {rule}{id}{note}")))?;
            }
            if !view.changes() {
                terminal.note("Approving it changes nothing.");
            }
        }
    }
    remember(client, terminal, &view.workload, &view.digest);
    Ok(())
}

pub(super) fn explain(client: &Client, terminal: &Terminal, args: ExplainArgs) -> Result<(), Failed> {
    let question = Question { from: args.from, to: args.to, service: args.port };
    let view: Explanation = client.query("/api/v1/explain", &question)?;
    if let format @ (Format::Json | Format::Yaml) = args.output.output {
        return terminal.data(&view, format);
    }
    let verdict = terminal.paint(view.verdict.into(), view.verdict);
    terminal.say(format_args!("{} -> {} {}: {verdict}", view.from, view.to, view.service))?;
    terminal.say(format_args!("  because {}", clean(&view.reason)))?;
    terminal.say(format_args!("  sender's side:   {}", clean(&view.egress.to_string())))?;
    terminal.say(format_args!("  receiver's side: {}", clean(&view.ingress.to_string())))?;
    match &view.evidence {
        Some(evidence) => {
            let last = evidence.last.map_or(String::new(), |last| format!(", last {}", when::ago(last, Timestamp::now())));
            terminal.say(format_args!("  seen: {}{last}", tables::seen(evidence)))?;
        }
        None => terminal.say("  seen: never")?,
    }
    for fact in &view.engine {
        terminal.say(format_args!("  {} {}", terminal.paint(Tone::Warn, "engine:"), clean(fact)))?;
    }
    for note in &view.notes {
        terminal.say(format_args!("  note: {}", clean(note)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_has_one_digit_and_a_small_one_is_not_none() {
        let said = [0, 1, 21_739, 20_000, 999_999].map(percent);
        assert_eq!(said, ["0 %", "0.1 %", "2.2 %", "2 %", "100 %"]);
    }
}
