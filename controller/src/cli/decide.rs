//! Commands that decide: approve, reject, allow, edit, revert, segment, mode, quarantine, release, apply, delete, adopt; and export.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use policy::suggestion::Suggestion;
use policy::{EdgeKey, Mode, Workload};
use serde::Serialize;

use super::args::{
    AdoptArgs, AllowArgs, ApplyArgs, Deletable, DeleteArgs, EditArgs, ExportArgs, Format, MemberArgs, ModeArgs, OneArgs, RevertArgs,
    ReviewArgs,
};
use super::client::{Client, path};
use super::output::{Failed, Terminal, Tone, clean, count};
use super::{describe, exit, read, shown, sources, tables};
use crate::api::ask::{Allow, Apply, Comment, Delete, Edit, Export, Members, OfWorkload, Revert, Review, Switch};
use crate::api::view::{Document, Forecast, InForce, Outcome};

fn tell(terminal: &Terminal, outcome: &Outcome) -> Result<(), Failed> {
    for note in &outcome.notes {
        terminal.say(clean(note))?;
    }
    if let Some(decision) = &outcome.recorded {
        let as_who = tables::who(decision);
        let there: Vec<&str> = outcome.nodes.iter().filter(|(_, is)| **is == InForce::Yes).map(|(node, _)| node.as_str()).collect();
        let there = match there[..] {
            [] => String::new(),
            [node] => format!(", in force on {}", clean(node)),
            _ => format!(", in force on {}", count(there.len() as u64, "node")),
        };
        terminal.say(terminal.paint(
            Tone::Dim,
            format_args!("Recorded as decision {} by {as_who}, generation {}{there}.", decision.number, decision.generation),
        ))?;
    }
    for (node, is) in &outcome.nodes {
        let what = match is {
            InForce::Yes => continue,
            InForce::Unanswered { .. } => {
                "has not answered yet: what was in force there stays until it does. `bulkhead status` says when.".to_owned()
            }
            InForce::Away => "has no agent connected: its kernel keeps what was in force; it gets this when its agent comes.".to_owned(),
            InForce::Refused(why) => format!("refused it, and keeps what was in force: {}", clean(why)),
        };
        terminal.say(terminal.paint(Tone::Warn, format_args!("{} {what}", clean(node))))?;
    }
    Ok(())
}

/// What was asked for is done to its end, though the reader of the output has gone (`| grep -q`).
fn heard_or_not(said: Result<(), Failed>) -> Result<(), Failed> {
    said.or_else(|failed| if failed.is_a_closed_pipe() { Ok(()) } else { Err(failed) })
}

/// Decisions by one person on several workloads are one request each: each is recorded, or refused, by itself. The first refusal
/// ends it; what was decided before stays and is told.
pub(super) fn review(client: &Client, terminal: &Terminal, args: ReviewArgs, approve: bool) -> Result<(), Failed> {
    if args.workloads.len() > 1 && (args.digest.is_some() || !args.rules.is_empty()) {
        let next = "Name one workload, or write WORKLOAD@DIGEST for each.";
        return Err(Failed::new(exit::USAGE, "--digest and --rule belong to one workload, several are named", next));
    }
    let named = args.workloads.iter().map(|text| read::workload_at(text)).collect::<Result<Vec<_>, _>>()?;
    for (at, (workload, digest)) in named.iter().enumerate() {
        let digest = match digest.clone().or_else(|| args.digest.clone()).or_else(|| shown::last(client.socket(), workload)) {
            Some(digest) => digest,
            None => show_and_ask(client, terminal, workload, approve)?,
        };
        let request = Review {
            workload: workload.clone(),
            digest,
            rules: args.rules.clone(),
            accept: args.accept.clone(),
            comment: args.comment.clone(),
            approve,
            later: named[at + 1..].iter().map(|(workload, _)| workload.clone()).collect(),
        };
        let outcome: Outcome = client.post("/api/v1/reviews", &request)?;
        heard_or_not(tell(terminal, &outcome))?;
    }
    Ok(())
}

/// Nothing was shown yet: a person reads it now, a script has to name what it means.
fn show_and_ask(client: &Client, terminal: &Terminal, workload: &Workload, approve: bool) -> Result<String, Failed> {
    let suggestion: Suggestion = client.get(&format!("/api/v1/suggestions/{}", path(&workload.to_string())))?;
    let verb = if approve { "approve" } else { "reject" };
    if !terminal.interactive() {
        return Err(Failed::new(
            exit::REFUSED,
            format!("nobody has read the suggestion of {workload} here yet, and no digest is named"),
            format!(
                "`bulkhead describe suggestion {workload}` shows it; then {verb}, or name --digest {}.",
                tables::short(&suggestion.digest)
            ),
        ));
    }
    describe::describe_suggestion(terminal, &suggestion, Format::Table)?;
    terminal.say("")?;
    if terminal.confirm(&format!("{} this?", if approve { "Approve" } else { "Reject" }))? {
        Ok(suggestion.digest)
    } else {
        Err(not_confirmed())
    }
}

fn not_confirmed() -> Failed {
    Failed::new(exit::REFUSED, "not confirmed: nothing was changed", "")
}

/// That somebody said yes, beforehand or now. `instead`: what a script has to do.
fn confirmed(terminal: &Terminal, yes: bool, instead: &str, question: &str) -> Result<(), Failed> {
    match yes {
        true => Ok(()),
        false if !terminal.interactive() => Err(Failed { next: instead.to_owned(), ..not_confirmed() }),
        false if terminal.confirm(question)? => Ok(()),
        false => Err(not_confirmed()),
    }
}

pub(super) fn allow(client: &Client, terminal: &Terminal, args: AllowArgs) -> Result<(), Failed> {
    let AllowArgs { from, to, port, duration, comment } = args;
    let request = Allow { from, to, ports: port, seconds: duration.map(|d| d.as_secs()), comment };
    tell(terminal, &client.post("/api/v1/allow", &request)?)
}

pub(super) fn revert(client: &Client, terminal: &Terminal, args: RevertArgs) -> Result<(), Failed> {
    let RevertArgs { workload, to, yes, comment } = args;
    let mut request = Revert { workload, to, comment, confirm: None };
    change(terminal, yes, "Add --yes to revert without being asked.", |confirm| {
        request.confirm = confirm;
        client.post("/api/v1/revert", &request)
    })
}

pub(super) fn members(client: &Client, terminal: &Terminal, args: MemberArgs, remove: bool) -> Result<(), Failed> {
    let MemberArgs { segment, members, deny_unlearned, yes, comment } = args;
    let mut request = Members { segment, members, deny_unlearned, remove, comment, confirm: None };
    change(terminal, yes, "Add --yes to change its members without being asked.", |confirm| {
        request.confirm = confirm;
        client.post("/api/v1/segments", &request)
    })
}

/// Makes a change that may cut: at once where it doesn't, else when somebody said yes to what it would cut. `post` asks for a forecast
/// without a generation, and makes the change with one.
fn change(
    terminal: &Terminal,
    yes: bool,
    instead: &str,
    mut post: impl FnMut(Option<u64>) -> Result<Outcome, Failed>,
) -> Result<(), Failed> {
    let before = post(None)?;
    let Some(forecast) = &before.forecast else { return tell(terminal, &before) };
    for change in &before.notes {
        heard_or_not(terminal.say(clean(change)))?;
    }
    if forecast.asks() {
        heard_or_not(tell_forecast(terminal, forecast))?;
        if let Some(made) = agreed(terminal, yes, instead, "Put this in force?", forecast, || post(None))? {
            return tell(terminal, &made);
        }
    }
    let mut outcome = post(Some(forecast.generation))?;
    // Without what was foretold already.
    outcome.notes.retain(|note| !before.notes.contains(note));
    tell(terminal, &outcome)
}

/// That somebody said yes to a forecast that was shown. Whoever reads it takes a while, in which more may be seen that would be cut: that
/// is asked for too. What comes back was made meanwhile, since there was nothing left to be foreseen; of another generation than the one
/// shown the controller says itself that it is not what was confirmed.
fn agreed(
    terminal: &Terminal,
    yes: bool,
    instead: &str,
    question: &str,
    shown: &Forecast,
    again: impl FnOnce() -> Result<Outcome, Failed>,
) -> Result<Option<Outcome>, Failed> {
    confirmed(terminal, yes, instead, question)?;
    if yes {
        return Ok(None);
    }
    let later = again()?;
    let Some(forecast) = &later.forecast else { return Ok(Some(later)) };
    let known: BTreeSet<_> = shown.cuts().collect();
    let fresh: Vec<_> = forecast.cuts().filter(|cut| !known.contains(cut)).collect();
    let silent: Vec<_> = forecast.silent.keys().filter(|node| !shown.silent.contains_key(*node)).collect();
    if forecast.generation != shown.generation || (fresh.is_empty() && silent.is_empty()) {
        return Ok(None);
    }
    if !fresh.is_empty() {
        terminal.say(format_args!("Seen meanwhile, {} more would be cut:", count(fresh.len() as u64, "edge")))?;
    }
    for EdgeKey { from, to, service, .. } in &fresh {
        terminal.say(terminal.paint(Tone::Warn, format_args!("  {from} -> {to} {service}")))?;
    }
    for node in silent {
        terminal.say(terminal.paint(Tone::Warn, format_args!("{} does not say any more which connections would end.", clean(node))))?;
    }
    confirmed(terminal, yes, instead, question)?;
    Ok(None)
}

pub(super) fn quarantine(client: &Client, terminal: &Terminal, args: OneArgs) -> Result<(), Failed> {
    let OneArgs { workload, comment } = args;
    tell(terminal, &client.post("/api/v1/quarantine", &OfWorkload { workload, comment })?)
}

pub(super) fn release(client: &Client, terminal: &Terminal, args: OneArgs) -> Result<(), Failed> {
    let OneArgs { workload, comment } = args;
    tell(terminal, &client.post("/api/v1/release", &OfWorkload { workload, comment })?)
}

/// Loosening is done at once. Enforce is forecast first, and done when somebody said yes to that forecast.
pub(super) fn mode(client: &Client, terminal: &Terminal, args: ModeArgs) -> Result<(), Failed> {
    let ModeArgs { segment, mode, deny_unlearned, yes, dry_run, comment } = args;
    let mut request = Switch { segment, mode, deny_unlearned, confirm: None, comment };
    if mode != Mode::Enforce {
        if dry_run {
            return terminal.say(format_args!("A switch to {mode} denies nothing and ends no connection."));
        }
        return tell(terminal, &client.post("/api/v1/mode", &request)?);
    }
    let outcome: Outcome = client.post("/api/v1/mode", &request)?;
    let Some(forecast) = outcome.forecast else { return tell(terminal, &outcome) };
    heard_or_not(tell_forecast(terminal, &forecast))?;
    if dry_run {
        return Ok(());
    }
    let question = format!("Switch {} to Enforce?", request.segment);
    let again = || client.post("/api/v1/mode", &request);
    if let Some(made) = agreed(terminal, yes, "Add --yes to switch without being asked.", &question, &forecast, again)? {
        return tell(terminal, &made);
    }
    request.confirm = Some(forecast.generation);
    tell(terminal, &client.post("/api/v1/mode", &request)?)
}

fn tell_forecast(terminal: &Terminal, forecast: &Forecast) -> Result<(), Failed> {
    if forecast.denied.is_empty() {
        terminal.say("Of what was in use so far, nothing would be denied.")?;
    } else {
        let n = forecast.denied.len() as u64;
        terminal.say(format_args!("Of what was seen so far, {} would be denied:", count(n, "edge")))?;
        for edge in &forecast.denied {
            let line =
                format!("  {} -> {} {} ({}): {}", edge.from, edge.to, edge.service, tables::seen(&edge.evidence), clean(&edge.reason));
            terminal.say(terminal.paint(Tone::Warn, line))?;
        }
    }
    let ended: u64 = forecast.ended.values().flatten().map(|ended| ended.connections).sum();
    terminal.say(format_args!("{} would end.", count(ended, "established connection")))?;
    for (node, ended) in &forecast.ended {
        for edge in ended {
            terminal.say(format_args!(
                "  on {node}: {} of {} ({})",
                count(edge.connections, "connection"),
                edge.edge,
                clean(&edge.reason)
            ))?;
        }
    }
    for workload in &forecast.unlearned {
        terminal.say(terminal.paint(Tone::Warn, format_args!("{workload} has no approved policy: all of its traffic would be denied.")))?;
    }
    for workload in &forecast.no_evidence {
        terminal.say(format_args!("{workload} has a policy, and nothing was ever seen of it."))?;
    }
    for (workload, flows) in &forecast.unlisted {
        let text = format_args!(
            "{} of {workload} in use are not listed, there were too many peers: what of them would be denied is not known.",
            count(*flows, "flow")
        );
        terminal.say(terminal.paint(Tone::Warn, text))?;
    }
    for (node, why) in &forecast.silent {
        terminal.say(terminal.paint(Tone::Warn, format_args!("{node} did not say which connections would end: {}", clean(why))))?;
    }
    Ok(())
}

pub(super) fn adopt(client: &Client, terminal: &Terminal, args: AdoptArgs) -> Result<(), Failed> {
    let question = "Nodes that belong to another store take their policy from this one from now on. Adopt them?";
    confirmed(terminal, args.yes, "Add --yes to adopt without being asked.", question)?;
    tell(terminal, &client.post("/api/v1/adopt", &Comment { comment: args.comment, subject: String::new() })?)
}

pub(super) fn apply(client: &Client, terminal: &Terminal, args: ApplyArgs) -> Result<(), Failed> {
    let ApplyArgs { file, deny_unlearned, yes, dry_run, comment } = args;
    let mut request = Apply { documents: sources::read(&file)?, deny_unlearned, comment, dry_run, confirm: None };
    let outcome: Outcome = client.post("/api/v1/apply", &request)?;
    let Some(forecast) = &outcome.forecast else { return tell(terminal, &outcome) };
    if dry_run {
        tell_forecast(terminal, forecast)?;
        return tell(terminal, &outcome);
    }
    if forecast.asks() {
        heard_or_not(tell_forecast(terminal, forecast))?;
        let again = || client.post("/api/v1/apply", &request);
        if let Some(made) = agreed(terminal, yes, "Add --yes to apply without being asked.", "Put this in force?", forecast, again)? {
            return tell(terminal, &made);
        }
    }
    request.confirm = Some(forecast.generation);
    tell(terminal, &client.post("/api/v1/apply", &request)?)
}

pub(super) fn delete(client: &Client, terminal: &Terminal, args: DeleteArgs) -> Result<(), Failed> {
    let DeleteArgs { kind: Deletable::Guardrail, name, comment } = args;
    tell(terminal, &client.post("/api/v1/delete", &Delete { guardrail: name, comment })?)
}

pub(super) fn export(client: &Client, terminal: &Terminal, args: ExportArgs) -> Result<(), Failed> {
    let documents: Vec<Document> =
        client.query("/api/v1/export", &Export { format: args.format, pods: args.pods, namespace: args.namespace })?;
    let Some(directory) = args.directory else {
        for document in &documents {
            terminal.write(&document.text)?;
        }
        if documents.is_empty() {
            terminal.note("Nothing is in force: nothing to export.");
        }
        return Ok(());
    };
    let cannot = |file: &Path, error: &io::Error| {
        let next = "Name a folder that you may write to; one that is not there is made.";
        Failed::new(exit::FAILED, format!("cannot write {}: {error}", file.display()), next)
    };
    fs::create_dir_all(&directory).map_err(|e| cannot(&directory, &e))?;
    for document in &documents {
        // The controller is trusted to name files, not to name places.
        let name = Path::new(&document.file).file_name().unwrap_or_else(|| "export".as_ref());
        let file = directory.join(name);
        fs::write(&file, &document.text).map_err(|e| cannot(&file, &e))?;
    }
    terminal.say(format_args!("{} written to {}", count(documents.len() as u64, "file"), directory.display()))
}

/// A scratch file that goes away with its owner.
struct Scratch(std::path::PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.0);
    }
}

pub(super) fn edit(client: &Client, terminal: &Terminal, args: EditArgs) -> Result<(), Failed> {
    #[derive(Serialize)]
    struct Query {}
    let EditArgs { workload, yes, comment } = args;
    let before: Edit = client.query(&format!("/api/v1/edit/{}", path(&workload.to_string())), &Query {})?;
    let editor = std::env::var("VISUAL").or_else(|_| std::env::var("EDITOR")).unwrap_or_else(|_| "vi".to_owned());
    let name = format!("bulkhead-{}-{}.yaml", std::process::id(), workload.to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
    let scratch = Scratch(std::env::temp_dir().join(name));
    let at = |what: &str, e: io::Error| Failed::new(exit::FAILED, format!("cannot {what} {}: {e}", scratch.0.display()), "");
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Not through a link that somebody else left in the shared folder.
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&scratch.0).map_err(|e| at("make", e))?;
        file.write_all(before.document.as_bytes()).map_err(|e| at("write", e))?;
    }
    // By a shell, as git and kubectl do: EDITOR may hold arguments.
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(&scratch.0)
        .status()
        .map_err(|e| Failed::new(exit::FAILED, format!("cannot start the editor {editor}: {e}"), "Set EDITOR."))?;
    if !status.success() {
        let next = "Save and leave it as usual to put the policy in force; EDITOR (or VISUAL) names another editor.";
        return Err(Failed::new(exit::FAILED, format!("the editor ended with {status}: nothing was changed"), next));
    }
    let document = fs::read_to_string(&scratch.0).map_err(|e| at("read", e))?;
    if document == before.document {
        return terminal.say("Unchanged.");
    }
    let mut edited = Edit { document, revision: before.revision, comment, confirm: None };
    let uri = format!("/api/v1/edit/{}", path(&workload.to_string()));
    let put_in_force = change(terminal, yes, "Add --yes to edit without being asked.", |confirm| {
        edited.confirm = confirm;
        client.post(&uri, &edited)
    });
    put_in_force.map_err(|mut failed| {
        // What was typed is not lost with the refusal.
        let kept = scratch.0.with_extension("rejected.yaml");
        if fs::write(&kept, &edited.document).is_ok() {
            failed.next = format!("{} Your text is kept in {}.", failed.next, kept.display()).trim_start().to_owned();
        }
        failed
    })
}
