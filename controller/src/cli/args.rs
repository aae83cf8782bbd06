//! What may be typed behind each command.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use policy::{Endpoint, Mode, Peer, Ports, Protocol, Service, Workload};

use super::when;
use crate::api::ask::{ExportFormat, VerdictName};

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
pub(super) enum GraphFormat {
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
pub(super) struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Format,
}

#[derive(Debug, Args)]
pub(super) struct GraphArgs {
    /// Only edges that touch this workload
    #[arg(long, short)]
    pub(super) workload: Option<Workload>,
    /// Only edges that touch a workload of this segment
    #[arg(long, short)]
    pub(super) segment: Option<String>,
    /// Only edges seen since then: 10m, 2h, 1d, or a time like 2026-11-20T09:00:00Z
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    pub(super) since: Option<jiff::Timestamp>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: GraphFormat,
}

#[derive(Debug, Args)]
pub(super) struct FlowsArgs {
    /// Go on as they come
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Only flows since then: 10m, 2h, 1d, or a time like 2026-11-20T09:00:00Z
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    pub(super) since: Option<jiff::Timestamp>,
    /// At most so many, the newest
    #[arg(long, value_name = "N")]
    pub(super) last: Option<usize>,
    /// Only from this end: shop/web, shop/ (a whole project), host:, outside:, outside:192.0.2.7
    #[arg(long, value_name = "END")]
    pub(super) from: Option<String>,
    /// Only to this end; written as --from
    #[arg(long, value_name = "END")]
    pub(super) to: Option<String>,
    /// Only on this port
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) port: Option<u16>,
    /// Only of this protocol: tcp, udp, sctp, icmp, icmpv6, ip47
    #[arg(long)]
    pub(super) protocol: Option<Protocol>,
    /// Only with this verdict
    #[arg(long, value_enum)]
    pub(super) verdict: Option<VerdictName>,
    /// Output format; json is one object a line
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Format,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
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
pub(super) enum Deletable {
    Guardrail,
}

#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    /// What it is
    #[arg(value_enum)]
    pub(super) kind: Deletable,
    /// Its name
    pub(super) name: String,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// What to list
    #[arg(value_enum)]
    pub(super) kind: Kind,
    /// Only these, by name
    pub(super) names: Vec<String>,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct DescribeArgs {
    /// What it is
    #[arg(value_enum)]
    pub(super) kind: Kind,
    /// Its name
    pub(super) name: String,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// Whose suggestion
    pub(super) workload: Workload,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReviewArgs {
    /// Whose suggestions; WORKLOAD@DIGEST names what was read
    #[arg(required = true, value_name = "WORKLOAD")]
    pub(super) workloads: Vec<String>,
    /// Only these rules, by the id that `describe suggestion` shows
    #[arg(long = "rule", value_name = "ID", num_args = 1..)]
    pub(super) rules: Vec<String>,
    /// The digest that was read (at least its first 8 characters)
    #[arg(long)]
    pub(super) digest: Option<String>,
    /// Take this blocking finding knowingly
    #[arg(long, value_name = "CODE")]
    pub(super) accept: Vec<String>,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct AllowArgs {
    /// Client: a workload, host: or outside:NETWORK
    pub(super) from: Peer,
    /// Server: a workload, host: or outside:NETWORK
    pub(super) to: Peer,
    /// The server's port: tcp/5432, udp/8000-8010, icmp/8
    pub(super) port: Ports,
    /// Only for so long: 30m, 1h, 2d
    #[arg(long = "for", value_parser = when::duration, value_name = "TIME")]
    pub(super) duration: Option<std::time::Duration>,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct EditArgs {
    /// Whose policy
    pub(super) workload: Workload,
    /// Do not ask before something is cut
    #[arg(short, long)]
    pub(super) yes: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct RevertArgs {
    /// Whose policy
    pub(super) workload: Workload,
    /// Which revision (the one before, if not given)
    #[arg(long, value_name = "REVISION")]
    pub(super) to: Option<u64>,
    /// Do not ask before something is cut
    #[arg(short, long)]
    pub(super) yes: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Subcommand)]
pub(super) enum SegmentCommand {
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
pub(super) struct MemberArgs {
    /// Which segment (named after the first member, if not given)
    #[arg(long, short)]
    pub(super) segment: Option<String>,
    /// Compose project, network or workload; project:, network: or workload: before a name that could be several
    #[arg(required = true, value_name = "PROJECT|NETWORK|WORKLOAD")]
    pub(super) members: Vec<String>,
    /// Workloads that may come under enforce without an approved policy: all of their traffic is denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    pub(super) deny_unlearned: Vec<Workload>,
    /// Don't ask
    #[arg(long, short)]
    pub(super) yes: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct ModeArgs {
    /// Segment or Compose project
    pub(super) segment: String,
    /// learn, audit or enforce
    pub(super) mode: Mode,
    /// Workloads without an approved policy, of which all traffic may be denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    pub(super) deny_unlearned: Vec<Workload>,
    /// Don't ask
    #[arg(long, short)]
    pub(super) yes: bool,
    /// Only say what it would do
    #[arg(long, conflicts_with = "yes")]
    pub(super) dry_run: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    /// Only edges that touch this workload
    #[arg(long, short)]
    pub(super) workload: Option<Workload>,
    /// Only edges that touch a workload of this segment
    #[arg(long, short)]
    pub(super) segment: Option<String>,
    /// Only edges seen since then: 10m, 2h, 1d, or a time
    #[arg(long, value_parser = when::since, value_name = "WHEN")]
    pub(super) since: Option<jiff::Timestamp>,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// Client: shop/web, host:, outside:192.0.2.7
    pub(super) from: Endpoint,
    /// Server; written as the client
    pub(super) to: Endpoint,
    /// The server's port: tcp/5432, udp/53, icmp/8
    pub(super) port: Service,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct OneArgs {
    /// Which workload
    pub(super) workload: Workload,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Format
    #[arg(long, value_enum, default_value = "kinds")]
    pub(super) format: ExportFormat,
    /// Networks of the cluster's pods, for networkpolicy (any private address may be a pod's, if not given)
    #[arg(long, value_name = "NETWORK,...")]
    pub(super) pods: Option<String>,
    /// Namespace of workloads that have none, for networkpolicy
    #[arg(long, value_name = "NAME")]
    pub(super) namespace: Option<String>,
    /// Write one file an object into this folder instead of all to the output
    #[arg(long, short, value_name = "DIR")]
    pub(super) directory: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ApplyArgs {
    /// File with the objects, or a folder of .yaml, .yml and .json files; - reads the input
    #[arg(long, short, value_name = "FILE|DIR")]
    pub(super) file: PathBuf,
    /// Workloads that may come under enforce without an approved policy: all of their traffic is denied
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    pub(super) deny_unlearned: Vec<Workload>,
    /// Don't ask where something that is in Enforce afterwards would be cut
    #[arg(long, short)]
    pub(super) yes: bool,
    /// Only say what would change
    #[arg(long, conflicts_with = "yes")]
    pub(super) dry_run: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
}

#[derive(Debug, Args)]
pub(super) struct AdoptArgs {
    /// Don't ask
    #[arg(long, short)]
    pub(super) yes: bool,
    /// Why
    #[arg(long, default_value = "")]
    pub(super) comment: String,
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
