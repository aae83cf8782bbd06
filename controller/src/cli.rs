//! The command line: what may be typed, and what is done with it. Parsing comes first and alone; a runtime is made only by the
//! commands that talk to somebody.

mod args;
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
mod sources;
mod status;
mod tables;
mod when;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use args::ControllerArgs;
pub use output::Failed;

use args::{
    AdoptArgs, AllowArgs, ApplyArgs, AuditArgs, DeleteArgs, DescribeArgs, DiffArgs, EditArgs, ExplainArgs, ExportArgs, FlowsArgs, GetArgs,
    GraphArgs, Kind, ModeArgs, OneArgs, OutputArgs, RevertArgs, ReviewArgs, SegmentCommand,
};

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
    /// Put the objects of a file or a folder in force
    #[command(
        after_help = "Where something is in Enforce afterwards it says beforehand what would be denied and which connections would end, and asks\nif a segment goes to Enforce or anything would be cut.\n\nExamples:\n  bulkhead apply -f shop.yaml\n  bulkhead apply -f policies/\n  bulkhead export | bulkhead apply -f - --dry-run"
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
        Command::Status(args) => status::status(&client()?, terminal, args),
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
