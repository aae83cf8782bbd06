//! Commands that list: graph, flows, get, audit, version.

use jiff::Timestamp;
use policy::review::Decision;
use policy::{Verdict, Workload};
use serde::Serialize;

use super::args::{AuditArgs, FlowsArgs, Format, GetArgs, GraphArgs, GraphFormat, Kind, OutputArgs};
use super::client::Client;
use super::output::{Failed, Terminal, count};
use super::{exit, tables};
use crate::api::ask::{FlowFilter, GraphFilter};
use crate::api::view::{
    AuditLine, FlowLine, FlowView, GraphView, GuardrailView, NetworkView, PolicyView, SegmentView, StatusView, SuggestionLine, VersionView,
    WorkloadView,
};
use crate::render;

fn now() -> Timestamp {
    Timestamp::now()
}

pub(super) fn graph(client: &Client, terminal: &Terminal, args: GraphArgs) -> Result<(), Failed> {
    let filter = GraphFilter { workload: args.workload, segment: args.segment, since: args.since };
    let view: GraphView = client.query("/api/v1/graph", &filter)?;
    let table = |format| {
        let (header, rows) = tables::edges(&view.edges, format == Format::Wide, now());
        terminal.table(header, rows, format)
    };
    match args.output {
        GraphFormat::Table => table(Format::Table)?,
        GraphFormat::Wide => table(Format::Wide)?,
        GraphFormat::Json => return terminal.data(&view, Format::Json),
        GraphFormat::Yaml => return terminal.data(&view, Format::Yaml),
        GraphFormat::Dot => return terminal.write(&render::dot(&view)),
        GraphFormat::Mermaid => return terminal.write(&render::mermaid(&view)),
        GraphFormat::Svg => return terminal.write(&render::svg(&view)),
    }
    if view.edges.is_empty() {
        terminal.note(match view.left_out {
            0 => "No traffic seen yet.".to_owned(),
            n => format!("No edge fits the filter; {} left out.", count(n, "edge")),
        });
    }
    if view.lost > 0 {
        terminal.note(format_args!("{} lost while observing: the graph may lack edges.", count(view.lost, "kernel event")));
    }
    for blind in &view.blind {
        terminal.note(format_args!("Not all is seen: {blind}"));
    }
    Ok(())
}

pub(super) fn flows(client: &Client, terminal: &Terminal, args: FlowsArgs) -> Result<(), Failed> {
    let filter = FlowFilter {
        since: args.since,
        last: args.last,
        from: args.from,
        to: args.to,
        port: args.port,
        protocol: args.protocol,
        verdict: args.verdict,
        follow: args.follow,
    };
    let mut flows: Vec<FlowView> = Vec::new();
    let gather = matches!(args.output, Format::Table | Format::Wide) && !args.follow;
    client.lines::<FlowLine>("/api/v1/flows", &filter, |line| match (line, args.output) {
        (FlowLine::Lost { lost }, _) => {
            terminal.note(format_args!("{} missed: this reader is too slow, or the filter too wide.", count(lost, "flow")));
            Ok(())
        }
        (FlowLine::Flow(flow), Format::Json) => {
            let line = serde_json::to_string(&flow).map_err(|e| Failed::new(exit::FAILED, format!("cannot write a flow: {e}"), ""))?;
            terminal.say(line)
        }
        (FlowLine::Flow(flow), Format::Yaml) => {
            terminal.say("---")?;
            terminal.data(&flow, Format::Yaml)
        }
        (FlowLine::Flow(flow), Format::Table | Format::Wide) if gather => {
            flows.push(*flow);
            Ok(())
        }
        (FlowLine::Flow(flow), Format::Table | Format::Wide) => terminal.say(live(terminal, &flow)),
    })?;
    if !gather {
        return Ok(());
    }
    if flows.is_empty() {
        terminal.note("No flow fits.");
        return Ok(());
    }
    let (header, rows) = tables::flows(&flows, args.output == Format::Wide, now());
    terminal.table(header, rows, args.output)
}

/// One line of a live view: no table, since its width would not be known.
fn live(terminal: &Terminal, view: &FlowView) -> String {
    let FlowView { flow, verdict, .. } = view;
    let verdict = match verdict {
        Verdict::Allow => terminal.paint(super::output::Tone::Good, "allow"),
        Verdict::WouldDeny => terminal.paint(super::output::Tone::Warn, "would deny"),
        Verdict::Deny => terminal.paint(super::output::Tone::Bad, "deny"),
    };
    let arrow = if flow.direction_known { "->" } else { "--" };
    let rest = format!("{} {arrow} {} {} {}", flow.from, flow.to, flow.service, flow.outcome);
    let reason = super::output::clean(&flow.reason);
    format!("{} {verdict} {rest} ({reason})", super::when::moment(flow.time))
}

/// How the first one of a kind comes to be.
fn first(kind: &str) -> &'static str {
    match kind {
        "policy" => "`bulkhead get suggestions` lists what is proposed, `bulkhead approve` makes a policy of it.",
        "segment" => "`bulkhead segment add` makes one.",
        "guardrail" => "`bulkhead apply -f` takes one.",
        "quarantine" => "`bulkhead quarantine WORKLOAD` cuts one off.",
        "decision" => "`bulkhead approve` makes one.",
        _ => "`bulkhead status` says what is known of the nodes.",
    }
}

/// Keeps what is named, all if nothing is; what is named and not there is an error.
fn named<T>(mut all: Vec<T>, names: &[String], kind: &str, name: impl Fn(&T) -> String) -> Result<Vec<T>, Failed> {
    if names.is_empty() {
        return Ok(all);
    }
    for wanted in names {
        if !all.iter().any(|item| name(item) == *wanted) {
            let known: Vec<String> = all.iter().map(&name).collect();
            let next =
                if known.is_empty() { format!("There is no {kind} yet. {}", first(kind)) } else { format!("Known: {}", known.join(", ")) };
            return Err(Failed::new(exit::NOT_FOUND, format!("no {kind} \"{wanted}\""), next));
        }
    }
    all.retain(|item| names.contains(&name(item)));
    Ok(all)
}

pub(super) fn get(client: &Client, terminal: &Terminal, args: GetArgs) -> Result<(), Failed> {
    let GetArgs { kind, names, output: OutputArgs { output: format } } = args;
    let wide = format == Format::Wide;
    let text = matches!(format, Format::Table | Format::Wide);
    // On the screen a table, to a script the same objects that `export` writes and `apply` reads.
    let show = |(header, rows): tables::Rows, none: &str| {
        if rows.is_empty() {
            terminal.note(none);
            return Ok(());
        }
        terminal.table(header, rows, format)
    };
    match kind {
        Kind::Suggestions if text => {
            let all: Vec<SuggestionLine> = client.get("/api/v1/suggestions")?;
            let lines = named(all, &names, "suggestion", |line| line.workload.to_string())?;
            show(tables::suggestions(&lines, wide, now()), "No suggestion yet: no traffic was seen.")
        }
        Kind::Policies if text => {
            let all: Vec<PolicyView> = client.get("/api/v1/policies")?;
            let views = named(all, &names, "policy", |view| view.policy.workload.to_string())?;
            show(tables::policies(&views, now()), "No policy is approved yet: `bulkhead get suggestions` lists what is proposed.")
        }
        Kind::Segments if text => {
            let all: Vec<SegmentView> = client.get("/api/v1/segments")?;
            let views = named(all, &names, "segment", |view| view.segment.name.clone())?;
            let usual = "No segment, and no Compose project runs: `bulkhead segment add` makes one.";
            show(tables::segments(&views, wide), none(client, &views, usual)?)
        }
        Kind::Quarantines if text => {
            let all: Vec<policy::policy_set::Quarantine> = client.get("/api/v1/quarantines")?;
            let views = named(all, &names, "quarantine", |q| q.workload.to_string())?;
            let rows = views.iter().map(|q| vec![(&q.workload).into(), q.comment.as_str().into()]).collect();
            show((&["WORKLOAD", "COMMENT"], rows), "Nobody is in quarantine.")
        }
        Kind::Guardrails if text => {
            let all: Vec<GuardrailView> = client.get("/api/v1/guardrails")?;
            let views = named(all, &names, "guardrail", |view| view.guardrail.name.clone())?;
            show(tables::guardrails(&views), "No guardrail: `bulkhead apply -f` takes one.")
        }
        Kind::Suggestions | Kind::Policies | Kind::Segments | Kind::Quarantines | Kind::Guardrails => {
            objects(client, terminal, kind, &names, format)
        }
        Kind::Workloads => {
            let all: Vec<WorkloadView> = client.get("/api/v1/workloads")?;
            let views = named(all, &names, "workload", |view| view.workload.to_string())?;
            if text {
                show(tables::workloads(&views, wide), none(client, &views, "No workload runs.")?)
            } else {
                terminal.data(&views, format)
            }
        }
        Kind::Networks => {
            let all: Vec<NetworkView> = client.get("/api/v1/networks")?;
            let views = named(all, &names, "network", |view| view.name.clone())?;
            if text {
                show(tables::networks(&views, wide), none(client, &views, "No network is known.")?)
            } else {
                terminal.data(&views, format)
            }
        }
        Kind::Decisions => {
            let all: Vec<Decision> = client.get("/api/v1/decisions")?;
            let views = named(all, &names, "decision", |decision| decision.number.to_string())?;
            if text { show(tables::decisions(&views, wide), "Nothing was decided yet.") } else { terminal.data(&views, format) }
        }
    }
}

/// What an empty list means: nothing is there, or nothing is known.
fn none<T>(client: &Client, listed: &[T], usual: &'static str) -> Result<&'static str, Failed> {
    if !listed.is_empty() {
        return Ok(usual);
    }
    let status: StatusView = client.get("/api/v1/status")?;
    if status.nodes.is_empty() {
        return Ok("No agent has reported yet: what runs is not known (`sudo bulkhead up` starts one, `bulkhead status` says more).");
    }
    // A node tells of its engine as soon as it knows; before that it has no version.
    if status.nodes.iter().any(|node| node.status.version.is_empty()) {
        return Ok("The engine has not answered yet: what runs is not known (`sudo bulkhead check` says why).");
    }
    Ok(usual)
}

/// Objects as documents of their kind.
fn objects(client: &Client, terminal: &Terminal, kind: Kind, names: &[String], format: Format) -> Result<(), Failed> {
    #[derive(Serialize)]
    struct Query<'a> {
        kind: &'a str,
        names: String,
        json: bool,
    }
    let kind = match kind {
        Kind::Suggestions => "suggestions",
        Kind::Policies => "policies",
        Kind::Segments => "segments",
        Kind::Quarantines => "quarantines",
        Kind::Guardrails => "guardrails",
        Kind::Workloads | Kind::Networks | Kind::Decisions => "",
    };
    let text: String = client.query("/api/v1/objects", &Query { kind, names: names.join(","), json: format == Format::Json })?;
    terminal.write(&text)
}

pub(super) fn audit(client: &Client, terminal: &Terminal, args: AuditArgs) -> Result<(), Failed> {
    let filter = GraphFilter { workload: args.workload, segment: args.segment, since: args.since };
    let lines: Vec<AuditLine> = client.query("/api/v1/audit", &filter)?;
    let format = args.output.output;
    match format {
        Format::Json | Format::Yaml => terminal.data(&lines, format),
        Format::Table | Format::Wide if lines.is_empty() => {
            terminal.note("Nothing was denied, and audit would have denied nothing.");
            Ok(())
        }
        Format::Table | Format::Wide => {
            let (header, rows) = tables::audit(&lines, now());
            terminal.table(header, rows, format)
        }
    }
}

/// This program's version, and the controller's where one answers.
pub(super) fn version(client: impl Fn() -> Result<Client, Failed>, terminal: &Terminal, args: OutputArgs) -> Result<(), Failed> {
    let own = env!("CARGO_PKG_VERSION");
    let controller = client()?.get::<VersionView>("/api/v1/version").ok();
    match args.output {
        format @ (Format::Json | Format::Yaml) => {
            let controller = controller.as_ref().map(|c| c.version.as_str());
            terminal.data(&serde_json::json!({ "client": own, "controller": controller }), format)
        }
        Format::Table | Format::Wide => {
            terminal.say(format_args!("bulkhead {own}"))?;
            match controller {
                Some(controller) => terminal.say(format_args!("controller {} (store {})", controller.version, controller.store)),
                None => terminal.say("controller: not reached"),
            }
        }
    }
}

/// Splits `shop/db@3f2a91c0`; a workload's name has no @ that a digest could follow.
pub(super) fn workload_at(text: &str) -> Result<(Workload, Option<String>), Failed> {
    let (name, digest) = match text.rsplit_once('@') {
        Some((name, digest)) if digest.len() >= 8 && digest.bytes().all(|b| b.is_ascii_hexdigit()) => (name, Some(digest.to_owned())),
        Some(_) | None => (text, None),
    };
    let workload = name.parse().map_err(|e| Failed::new(exit::USAGE, e, ""))?;
    Ok((workload, digest))
}
