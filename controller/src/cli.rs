//! The command line: what may be typed, and what is done with it. Parsing comes first and alone; a runtime is made only by the
//! commands that talk to somebody.

pub mod client;
mod completions;
mod controller;
mod decide;
mod describe;
mod host;
mod output;
mod read;
mod sessions;
mod shown;
mod tables;
mod when;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use policy::{Endpoint, Mode, Peer, Ports, Protocol, Service, Workload};

pub use output::Failed;

use crate::api::ask::{ExportFormat, VerdictName};
use crate::supervise::down::DownArgs;
use crate::supervise::units::InstallArgs;
use crate::supervise::{CheckArgs, EVERYWHERE, Places, UpArgs};

/// Exit codes of both binaries; the same table stands in `--help`.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed: environment, input and output.
    pub const FAILED: u8 = 1;
    /// The command line or a document is not understood.
    pub const USAGE: u8 = 2;
    /// A rule refuses it.
    pub const REFUSED: u8 = 3;
    /// No such workload, segment or suggestion.
    pub const NOT_FOUND: u8 = 4;
    /// The controller cannot be reached.
    pub const UNREACHABLE: u8 = 5;
}

const CODES: &str = "\
Exit codes:
  0  done
  1  failed (environment, input and output, no permission)
  2  the command line or a document is not understood
  3  refused by a rule (moved digest, unlearned workloads, blocking finding, guardrail, not confirmed)
  4  not found (unknown workload, segment, suggestion, revision)
  5  the controller cannot be reached

First steps:
  sudo bulkhead up -d               start agent and controller
  bulkhead graph                    who talks to whom
  bulkhead get suggestions          what could be allowed
  bulkhead describe suggestion W    the rules of workload W, with their evidence
  bulkhead approve W                put them in force
  bulkhead mode SEGMENT audit       log what they would deny
  bulkhead mode SEGMENT enforce     deny it";

/// Learns who talks to whom among containers, and enforces what a person approved of it.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, after_help = CODES, max_term_width = 120, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Args)]
struct Global {
    #[command(flatten)]
    places: Places,
    /// Colours: when the output is a terminal, always, or never
    #[arg(long, value_enum, default_value_t = Colour::Auto, global = true, value_name = "WHEN", help_heading = EVERYWHERE)]
    color: Colour,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Colour {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show who talks to whom
    #[command(after_help = "Examples:\n  bulkhead graph --segment shop --since 1h\n  bulkhead graph -o svg > graph.svg")]
    Graph(GraphArgs),
    /// List recent flows with verdict and reason, or follow them live
    #[command(
        after_help = "Examples:\n  bulkhead flows --last 20\n  bulkhead flows -f --verdict deny\n  bulkhead flows --from shop/web --port 5432 -o json"
    )]
    Flows(FlowsArgs),
    /// List suggestions, policies, segments, workloads, networks, decisions, quarantines or guardrails
    #[command(
        after_help = "Examples:\n  bulkhead get suggestions\n  bulkhead get policies shop/db -o yaml\n  bulkhead get workloads -o wide"
    )]
    Get(GetArgs),
    /// Show one suggestion, policy, workload, segment, network or guardrail with everything that is known about it
    #[command(after_help = "Example:\n  bulkhead describe suggestion shop/db")]
    Describe(DescribeArgs),
    /// Compare a suggestion with the policy in force
    #[command(after_help = "Example:\n  bulkhead diff shop/db")]
    Diff(DiffArgs),
    /// Approve the suggestion of a workload, whole or some rules: they are in force from then on
    #[command(
        after_help = "The approval names the digest that you read: the one that `describe suggestion` or `diff` showed you last, or --digest, or WORKLOAD@DIGEST. If the suggestion has moved since, it is refused (exit code 3).\n\nExamples:\n  bulkhead approve shop/db shop/web\n  bulkhead approve shop/db --rule 3f2a91c0 --comment 'nightly backup, see OPS-12'"
    )]
    Approve(ReviewArgs),
    /// Reject the suggestion of a workload, whole or some rules: they don't come back by themselves
    #[command(after_help = "Example:\n  bulkhead reject shop/db --rule 3f2a91c0 --comment 'a scan'")]
    Reject(ReviewArgs),
    /// Allow an edge by hand, also before any traffic, also for a limited time
    #[command(
        after_help = "Examples:\n  bulkhead allow shop/web shop/db tcp/5432\n  bulkhead allow shop/worker outside:192.0.2.0/24 tcp/443 --for 1h"
    )]
    Allow(AllowArgs),
    /// Change the policy of a workload in $EDITOR
    #[command(after_help = "Example:\n  EDITOR=nano bulkhead edit shop/db")]
    Edit(EditArgs),
    /// Put an earlier revision of a policy in force again
    #[command(after_help = "Example:\n  bulkhead revert shop/db --to 3")]
    Revert(RevertArgs),
    /// Put Compose projects, networks and workloads under a segment, or take them out
    #[command(subcommand, after_help = "Examples:\n  bulkhead segment add shop\n  bulkhead segment list")]
    Segment(SegmentCommand),
    /// Switch a segment to learn, audit or enforce
    #[command(
        after_help = "A switch to enforce says beforehand what it would have denied so far and which connections would end, and asks.\n\nExamples:\n  bulkhead mode shop audit\n  bulkhead mode shop enforce --yes\n  bulkhead mode shop enforce --deny-unlearned shop/cron"
    )]
    Mode(ModeArgs),
    /// Show what was denied, and what audit would have denied, by edge
    #[command(after_help = "Example:\n  bulkhead audit --segment shop")]
    Audit(AuditArgs),
    /// Say what happens to a connection, which rule decides, and what was seen of it
    #[command(after_help = "Examples:\n  bulkhead explain shop/web shop/db tcp/5432\n  bulkhead explain shop/db outside:192.0.2.7 tcp/443")]
    Explain(ExplainArgs),
    /// Say what is protected, what is not and why, and what was lost or repaired
    #[command(after_help = "Examples:\n  bulkhead status\n  bulkhead status -o json")]
    Status(OutputArgs),
    /// Cut a workload off, living connections too
    #[command(after_help = "Example:\n  bulkhead quarantine shop/web --comment 'odd egress since 02:10'")]
    Quarantine(OneArgs),
    /// Give a quarantined workload back
    #[command(after_help = "Example:\n  bulkhead release shop/web --comment 'image replaced'")]
    Release(OneArgs),
    /// Write the objects in force to files or to the output
    #[command(after_help = "Examples:\n  bulkhead export -d policies/\n  bulkhead export --format networkpolicy --pods 10.244.0.0/16")]
    Export(ExportArgs),
    /// Take a guardrail out
    #[command(after_help = "Example:\n  bulkhead delete guardrail prod-never-to-dev --comment 'prod and dev share a broker now'")]
    Delete(DeleteArgs),
    /// Put the objects of a file in force
    #[command(
        after_help = "Where something is in Enforce afterwards it says beforehand what would be denied and which connections would end, and asks\nif a segment goes to Enforce or anything would be cut.\n\nExamples:\n  bulkhead apply -f shop.yaml\n  bulkhead export | bulkhead apply -f - --dry-run"
    )]
    Apply(ApplyArgs),
    /// Take nodes over that belong to another store
    #[command(after_help = "Example:\n  bulkhead adopt --comment 'the store was restored from a backup'")]
    Adopt(AdoptArgs),
    /// Print the versions of this program and of the controller
    Version(OutputArgs),
    /// Print a script that completes commands in a shell
    #[command(after_help = "Example:\n  bulkhead completions bash | sudo tee /usr/share/bash-completion/completions/bulkhead >/dev/null")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Run the controller in the foreground (`up` and `install` do this for you)
    #[command(after_help = "Example:\n  bulkhead controller --run-dir /tmp/run --state-dir /tmp/state")]
    Controller(ControllerArgs),
    /// Start agent and controller and keep them running
    #[command(
        after_help = "Needs root. The controller runs as another user without privilege. Stopping it opens nothing: what is enforced stays in the kernel until `bulkhead down`.\n\nExamples:\n  sudo bulkhead up              in the foreground, until Ctrl-C\n  sudo bulkhead up -d           in the background"
    )]
    Up(UpArgs),
    /// Take everything out of the kernel and put the host back as it was
    #[command(
        after_help = "Works with controller, agent and engine dead. Says which segments lose protection, and asks.\n\nExamples:\n  sudo bulkhead down\n  sudo bulkhead down --yes --purge   also everything learned and decided"
    )]
    Down(DownArgs),
    /// Write systemd units for both, and make the controller's user
    #[command(after_help = "Example:\n  sudo bulkhead install")]
    Install(InstallArgs),
    /// Say what this host lacks, or what would conflict, before anything is changed
    #[command(after_help = "Example:\n  sudo bulkhead check")]
    Check(CheckArgs),
}

/// How lists are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns that fit the terminal.
    #[default]
    Table,
    /// All columns, nothing shortened.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// How the graph is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum GraphFormat {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
    /// Graphviz
    Dot,
    /// Mermaid flow chart
    Mermaid,
    /// A picture
    Svg,
}

#[derive(Clone, Debug, Args)]
struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

#[derive(Debug, Args)]
struct GraphArgs {
    /// Only edges that touch this workload
    #[arg(long, short)]
    workload: Option<Workload>,
    /// Only edges that touch a workload of this segment
    #[arg(long, short)]
    segment: Option<String>,
    /// Only edges seen since then: 10m, 2h, 1d, or a time like 2026-11-20T09:00:00Z
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    since: Option<jiff::Timestamp>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: GraphFormat,
}

#[derive(Debug, Args)]
struct FlowsArgs {
    /// Go on as they come
    #[arg(short, long)]
    follow: bool,
    /// Only flows since then: 10m, 2h, 1d, or a time like 2026-11-20T09:00:00Z
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    since: Option<jiff::Timestamp>,
    /// At most so many, the newest
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Only from this end: shop/web, shop/ (a whole project), host:, outside:, outside:192.0.2.7
    #[arg(long, value_name = "END")]
    from: Option<String>,
    /// Only to this end; written as --from
    #[arg(long, value_name = "END")]
    to: Option<String>,
    /// Only on this port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Only of this protocol: tcp, udp, sctp, icmp, icmpv6, ip47
    #[arg(long)]
    protocol: Option<Protocol>,
    /// Only with this verdict
    #[arg(long, value_enum)]
    verdict: Option<VerdictName>,
    /// Output format; json is one object a line
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(alias = "suggestion", alias = "policysuggestions", alias = "policysuggestion")]
    Suggestions,
    #[value(alias = "policy", alias = "workloadpolicies", alias = "workloadpolicy")]
    Policies,
    #[value(alias = "segment")]
    Segments,
    #[value(alias = "workload")]
    Workloads,
    #[value(alias = "network")]
    Networks,
    #[value(alias = "decision", alias = "reviews")]
    Decisions,
    #[value(alias = "quarantine")]
    Quarantines,
    #[value(alias = "guardrail")]
    Guardrails,
}

/// What can be deleted. Policies, segments and quarantines have commands of their own, which say what that opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Deletable {
    Guardrail,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// What it is
    #[arg(value_enum)]
    kind: Deletable,
    /// Its name
    name: String,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct GetArgs {
    /// What to list
    #[arg(value_enum)]
    kind: Kind,
    /// Only these, by name
    names: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct DescribeArgs {
    /// What it is
    #[arg(value_enum)]
    kind: Kind,
    /// Its name
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// Whose suggestion
    workload: Workload,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ReviewArgs {
    /// Whose suggestions; WORKLOAD@DIGEST names what was read
    #[arg(required = true, value_name = "WORKLOAD")]
    workloads: Vec<String>,
    /// Only these rules, by the id that `describe suggestion` shows
    #[arg(long = "rule", value_name = "ID", num_args = 1..)]
    rules: Vec<String>,
    /// The digest that was read (at least its first 8 characters)
    #[arg(long)]
    digest: Option<String>,
    /// Take this blocking finding knowingly
    #[arg(long, value_name = "CODE")]
    accept: Vec<String>,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct AllowArgs {
    /// Client: a workload, host: or outside:NETWORK
    from: Peer,
    /// Server: a workload, host: or outside:NETWORK
    to: Peer,
    /// The server's port: tcp/5432, udp/8000-8010, icmp/8
    port: Ports,
    /// Only for so long: 30m, 1h, 2d
    #[arg(long = "for", value_parser = when::duration, value_name = "TIME")]
    duration: Option<std::time::Duration>,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct EditArgs {
    /// Whose policy
    workload: Workload,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct RevertArgs {
    /// Whose policy
    workload: Workload,
    /// Which revision (the one before, if not given)
    #[arg(long, value_name = "REVISION")]
    to: Option<u64>,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Subcommand)]
enum SegmentCommand {
    /// Put projects, networks and workloads under a segment; a new segment is in mode learn
    #[command(after_help = "Examples:\n  bulkhead segment add shop\n  bulkhead segment add --segment backend shop/db network:shop_back")]
    Add(MemberArgs),
    /// Take projects, networks and workloads out; a segment without members is gone
    #[command(after_help = "Example:\n  bulkhead segment remove --segment backend shop/db")]
    Remove(MemberArgs),
    /// List segments
    List(OutputArgs),
}

#[derive(Debug, Args)]
struct MemberArgs {
    /// Which segment (named after the first member, if not given)
    #[arg(long, short)]
    segment: Option<String>,
    /// Compose project, network or workload; project:, network: or workload: before a name that could be several
    #[arg(required = true, value_name = "PROJECT|NETWORK|WORKLOAD")]
    members: Vec<String>,
    /// Workloads that may come under enforce without an approved policy: all of their traffic is denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    deny_unlearned: Vec<Workload>,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct ModeArgs {
    /// Segment or Compose project
    segment: String,
    /// learn, audit or enforce
    mode: Mode,
    /// Workloads without an approved policy, of which all traffic may be denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    deny_unlearned: Vec<Workload>,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Only say what it would do
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct AuditArgs {
    /// Only edges that touch this workload
    #[arg(long, short)]
    workload: Option<Workload>,
    /// Only edges that touch a workload of this segment
    #[arg(long, short)]
    segment: Option<String>,
    /// Only edges seen since then: 10m, 2h, 1d, or a time
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    since: Option<jiff::Timestamp>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    /// Client: shop/web, host:, outside:192.0.2.7
    from: Endpoint,
    /// Server; written as the client
    to: Endpoint,
    /// The server's port: tcp/5432, udp/53, icmp/8
    port: Service,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct OneArgs {
    /// Which workload
    workload: Workload,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct ExportArgs {
    /// Format
    #[arg(long, value_enum, default_value = "kinds")]
    format: ExportFormat,
    /// Networks of the cluster's pods, for networkpolicy (any private address may be a pod's, if not given)
    #[arg(long, value_name = "NETWORK,...")]
    pods: Option<String>,
    /// Namespace of workloads that have none, for networkpolicy
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Write one file an object into this folder instead of all to the output
    #[arg(long, short, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ApplyArgs {
    /// File with the objects; - reads the input
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Workloads that may come under enforce without an approved policy: all of their traffic is denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    deny_unlearned: Vec<Workload>,
    /// Don't ask where something that is in Enforce afterwards would be cut
    #[arg(long, short)]
    yes: bool,
    /// Only say what would change
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

#[derive(Debug, Args)]
struct AdoptArgs {
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Why
    #[arg(long, default_value = "")]
    comment: String,
}

/// `bulkhead controller`.
#[derive(Clone, Debug, Args)]
pub struct ControllerArgs {
    /// User that the agent runs as; besides root and the controller's own user
    #[arg(long, value_name = "UID")]
    pub agent_uid: Option<u32>,
    /// Serve Prometheus metrics here, for example 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
    /// Log lines as JSON
    #[arg(long)]
    pub log_json: bool,
    /// Flows kept in memory for `bulkhead flows`
    #[arg(long, default_value_t = 20_000, value_name = "N")]
    pub flows: usize,
}

/// Parses and runs; the exit code is for the shell.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are not errors, and a closed pipe is nobody's business here.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::DONE });
        }
    };
    let terminal = output::Terminal::new(cli.global.color);
    match execute(cli, &terminal) {
        Ok(()) => ExitCode::from(exit::DONE),
        Err(failed) => {
            terminal.complain(&failed);
            ExitCode::from(failed.exit)
        }
    }
}

fn execute(cli: Cli, terminal: &output::Terminal) -> Result<(), Failed> {
    let Cli { global, command } = cli;
    let client = || client::Client::new(global.places.api());
    match command {
        Command::Graph(args) => read::graph(&client()?, terminal, args),
        Command::Flows(args) => read::flows(&client()?, terminal, args),
        Command::Get(args) => read::get(&client()?, terminal, args),
        Command::Describe(args) => describe::describe(&client()?, terminal, args),
        Command::Diff(args) => describe::diff(&client()?, terminal, args),
        Command::Approve(args) => decide::review(&client()?, terminal, args, true),
        Command::Reject(args) => decide::review(&client()?, terminal, args, false),
        Command::Allow(args) => decide::allow(&client()?, terminal, args),
        Command::Edit(args) => decide::edit(&client()?, terminal, args),
        Command::Revert(args) => decide::revert(&client()?, terminal, args),
        Command::Segment(SegmentCommand::Add(args)) => decide::members(&client()?, terminal, args, false),
        Command::Segment(SegmentCommand::Remove(args)) => decide::members(&client()?, terminal, args, true),
        Command::Segment(SegmentCommand::List(output)) => {
            read::get(&client()?, terminal, GetArgs { kind: Kind::Segments, names: Vec::new(), output })
        }
        Command::Mode(args) => decide::mode(&client()?, terminal, args),
        Command::Audit(args) => read::audit(&client()?, terminal, args),
        Command::Explain(args) => describe::explain(&client()?, terminal, args),
        Command::Status(args) => describe::status(&client()?, terminal, args),
        Command::Quarantine(args) => decide::quarantine(&client()?, terminal, args),
        Command::Release(args) => decide::release(&client()?, terminal, args),
        Command::Export(args) => decide::export(&client()?, terminal, args),
        Command::Delete(args) => decide::delete(&client()?, terminal, args),
        Command::Apply(args) => decide::apply(&client()?, terminal, args),
        Command::Adopt(args) => decide::adopt(&client()?, terminal, args),
        Command::Version(args) => read::version(client, terminal, args),
        Command::Completions { shell } => completions::print(shell),
        Command::Controller(args) => controller::run(&global.places, &args),
        Command::Up(args) => host::up(&global.places, &args),
        Command::Down(args) => host::down(&global.places, &args),
        Command::Install(args) => host::install(&global.places, &args),
        Command::Check(args) => host::check(&global.places, &args),
    }
}
