//! `bulkhead status`: how things stand, node by node, and what to look at.

use std::collections::BTreeSet;

use jiff::Timestamp;
use policy::Workload;

use super::args::{Format, OutputArgs};
use super::client::Client;
use super::describe::title;
use super::output::{Failed, Terminal, Tone, clean, count};
use super::{tables, when};
use crate::api::view::{InForce, StatusView};

/// The first of many, and how many more.
fn first_of(all: &BTreeSet<Workload>, most: usize) -> String {
    let first: Vec<String> = all.iter().take(most).map(|workload| clean(&workload.to_string())).collect();
    match all.len().saturating_sub(most) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

/// What a counted reason says became of the packets, and why: those of Audit passed.
fn denied(reason: &str) -> (&'static str, String) {
    match reason.strip_prefix("audit: ") {
        Some(reason) => ("would have denied", clean(reason)),
        None => ("denied", clean(reason)),
    }
}

pub(super) fn status(client: &Client, terminal: &Terminal, args: OutputArgs) -> Result<(), Failed> {
    let view: StatusView = client.get("/api/v1/status")?;
    if let format @ (Format::Json | Format::Yaml) = args.output {
        return terminal.data(&view, format);
    }
    let wide = args.output == Format::Wide;
    let now = Timestamp::now();
    terminal.say(format_args!(
        "controller {}, store {}, generation {}, {}",
        view.version,
        view.store,
        view.generation,
        count(view.edges, "edge")
    ))?;
    title(terminal, "Nodes")?;
    if view.nodes.is_empty() {
        terminal.say("  no agent has reported yet")?;
    }
    for node in &view.nodes {
        let state = if node.connected { terminal.paint(Tone::Good, "connected") } else { terminal.paint(Tone::Bad, "not connected") };
        let heard = node.heard.map_or_else(|| "never heard".to_owned(), |heard| format!("heard {}", when::ago(heard, now)));
        let status = &node.status;
        let plan = if status.generation == view.generation && status.store == view.store {
            "plan in force".to_owned()
        } else if status.generation == 0 {
            "no plan".to_owned()
        } else {
            format!("plan of generation {}", status.generation)
        };
        // A plan that was just sent is as good as there; one that stays unanswered is not.
        let plan = match &node.in_force {
            InForce::Unanswered { seconds: seconds @ 1.. } => {
                terminal.paint(Tone::Bad, format_args!("has not answered for {}: {plan} stays", when::span(*seconds)))
            }
            InForce::Refused(_) if status.generation == view.generation && status.store == view.store => {
                terminal.paint(Tone::Bad, "what was in force before stays")
            }
            InForce::Unanswered { seconds: 0 } | InForce::Yes | InForce::Away | InForce::Refused(_) => plan,
        };
        let observed = when::span(node.healthy_seconds);
        terminal.say(format_args!(
            "  {} {state}, {heard}, {plan}, {} events, {} lost, {observed} of healthy observation",
            clean(&node.name),
            status.events,
            status.lost
        ))?;
        if let Some(refused) = &node.refused {
            terminal.say(format_args!("    {} {}", terminal.paint(Tone::Bad, "plan refused:"), clean(refused)))?;
        }
        let (used, room) = status.conntrack;
        if room > 0 && used * 5 >= room * 4 {
            terminal.say(terminal.paint(Tone::Bad, format_args!("    connection tracking is nearly full: {used} of {room}")))?;
        }
        for blind in &status.blind {
            terminal.say(format_args!("    {} {}", terminal.paint(Tone::Bad, "blind:"), clean(blind)))?;
        }
        if node.connected && status.version.is_empty() {
            // It tells what runs on it as soon as it knows; an empty list would look like an empty host.
            let what = "the engine has not answered: what runs here is not known yet (`bulkhead check` says why)";
            terminal.say(format_args!("    {} {what}", terminal.paint(Tone::Bad, "blind:")))?;
        }
        for (why, n) in &status.skipped {
            terminal.say(format_args!("    skipped {n}: {}", clean(why)))?;
        }
        for lack in &status.unconfined {
            terminal.say(format_args!("    {} {}", terminal.paint(Tone::Bad, "not confined:"), clean(lack)))?;
        }
        for network in &status.contested {
            terminal.say(format_args!("    {} {}", terminal.paint(Tone::Warn, "open if made anew:"), clean(network)))?;
        }
        if !status.raw.is_empty() {
            let who = first_of(&status.raw, if wide { usize::MAX } else { 3 });
            let what = format_args!("{who}: two bytes of what they send can change behind the filter (cap_drop: [NET_RAW] ends that)");
            terminal.say(format_args!("    {} {what}", terminal.paint(Tone::Warn, "with NET_RAW:")))?;
        }
        for forwarder in &status.forwarders {
            terminal.say(format_args!("    {} {}", terminal.paint(Tone::Warn, "a router:"), clean(forwarder)))?;
        }
        for rider in &status.riders {
            terminal.say(format_args!("    rides along by the proxy: {}", clean(rider)))?;
        }
        for row in &status.denied.by {
            let (verdict, reason) = denied(&row.reason);
            terminal.say(format_args!("    {verdict} {} of {}: {reason}", count(row.packets, "packet"), clean(&row.side)))?;
        }
        if wide {
            for row in &status.denied.pairs {
                let packets = count(row.packets, "packet");
                terminal.say(format_args!("      {} -> {} {}: {packets}, {}", row.from, row.to, row.service, clean(&row.reason)))?;
            }
            for (reason, packets) in &status.denied.other {
                terminal.say(format_args!("      other: {}, {}", count(*packets, "packet"), clean(reason)))?;
            }
        }
        let alarms = if wide { 0 } else { status.alarms.len().saturating_sub(5) };
        for alarm in &status.alarms[alarms..] {
            terminal.say(format_args!("    {} {} {}", terminal.paint(Tone::Bad, "alarm"), when::moment(alarm.time), clean(&alarm.text)))?;
        }
    }
    if !view.networks.is_empty() {
        title(terminal, "Networks")?;
        let (header, rows) = tables::networks(&view.networks, wide);
        terminal.table(header, rows, args.output)?;
    }
    if !view.segments.is_empty() {
        title(terminal, "Segments")?;
        let (header, rows) = tables::segments(&view.segments, wide);
        terminal.table(header, rows, args.output)?;
    }
    if !view.quarantined.is_empty() {
        title(terminal, "In quarantine")?;
        for workload in &view.quarantined {
            terminal.say(format_args!("  {workload}"))?;
        }
    }
    if !view.unmanaged.is_empty() {
        title(terminal, "Not protected")?;
        for line in &view.unmanaged {
            terminal.say(format_args!("  {}", clean(line)))?;
        }
    }
    if !view.notes.is_empty() {
        title(terminal, "To know")?;
        for note in &view.notes {
            terminal.say(format_args!("  {}", clean(note)))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passed_in_audit_is_not_called_denied() {
        assert_eq!(denied("audit: no egress rule of the sender allows it").0, "would have denied");
        assert_eq!(denied("no egress rule of the sender allows it"), ("denied", "no egress rule of the sender allows it".to_owned()));
    }
}
