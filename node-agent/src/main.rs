//! The binary `bulkhead-agent`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use node_agent::agent::{self, AgentError, ControllerUser, Options};
use node_agent::enforce::Ownership;
use node_agent::netns;
use tracing_subscriber::EnvFilter;

/// The node agent of Bulkhead: observes the flows of this host's containers and enforces the plan the controller sends.
///
/// It is started by `bulkhead up` or by systemd; by hand only to look at something.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead-agent",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 usage, 3 refused, 4 not found, 5 the engine or controller cannot be reached."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Places {
    /// Where the agent keeps its plan, its spool and how the host was before.
    #[arg(long, env = "BULKHEAD_AGENT_STATE_DIR", default_value = "/var/lib/bulkhead/agent", value_name = "DIR")]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    places: Places,
    /// The controller's socket.
    #[arg(long, default_value = "/run/bulkhead/node.sock", value_name = "PATH")]
    controller: PathBuf,
    /// The user that the controller runs as, besides root: a name, or UID:GID. Nobody else is taken for it.
    #[arg(long, value_name = "USER")]
    controller_user: Option<ControllerUser>,
    /// The Docker Engine, as in DOCKER_HOST (default: DOCKER_HOST, then the current docker context, then the engine's own socket).
    #[arg(long, value_name = "URL")]
    docker_host: Option<String>,
    /// The network namespace that the engine runs in, if it is not this one.
    #[arg(long, value_parser = netns::place, value_name = "PATH|PID")]
    netns: Option<PathBuf>,
    /// This node's name (default: the host's name).
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    node: Option<String>,
    /// Serve metrics (Prometheus) here.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Ask for no more than this for the tables, as on older kernels.
    #[arg(long, env = "BULKHEAD_OWNERSHIP", hide = true, default_value = "persistent")]
    ownership: Owner,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Owner {
    Persistent,
    Owned,
    Shared,
}

impl From<Owner> for Ownership {
    fn from(owner: Owner) -> Self {
        match owner {
            Owner::Persistent => Self::OwnedPersistent,
            Owner::Owned => Self::Owned,
            Owner::Shared => Self::Shared,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Observe and enforce, until a signal. What is enforced stays in the kernel afterwards.
    Run(Run),
    /// Take everything out of the kernel and put the switches back as they were; works when everything else is dead.
    Down {
        #[command(flatten)]
        places: Places,
        /// The namespace to clean (default: the one the last run used).
        #[arg(long, value_parser = netns::place, value_name = "PATH|PID")]
        netns: Option<PathBuf>,
        /// Change nothing; fail if this is not the namespace that the last run worked in.
        #[arg(long)]
        only_look: bool,
    },
    /// What this host lacks, or what would conflict.
    Check {
        /// The Docker Engine, as in DOCKER_HOST.
        #[arg(long, value_name = "URL")]
        docker_host: Option<String>,
        /// The network namespace that the engine runs in.
        #[arg(long, value_parser = netns::place, value_name = "PATH|PID")]
        netns: Option<PathBuf>,
        /// The agent's state, to see whether another agent runs.
        #[command(flatten)]
        places: Places,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The plan this node has stored, as JSON.
    Plan {
        #[command(flatten)]
        places: Places,
    },
    /// Pass only GETs on events, networks and containers to the engine's socket; started by the agent.
    EngineFilter {
        /// The engine's socket.
        #[arg(long, value_name = "PATH")]
        engine: PathBuf,
        /// The socket to listen on.
        #[arg(long, value_name = "PATH")]
        listen: PathBuf,
    },
}

fn log() {
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}

fn main() -> ExitCode {
    agent::be_frugal();
    let cli = Cli::parse();
    log();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprint!("bulkhead-agent: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(next) = cause {
                eprint!(": {next}");
                cause = next.source();
            }
            eprintln!();
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command) -> Result<ExitCode, AgentError> {
    match command {
        Command::Run(run) => {
            let options = Options {
                state_dir: run.places.state_dir,
                controller: run.controller,
                controller_user: run.controller_user,
                docker_host: run.docker_host,
                netns: run.netns,
                node: run.node.unwrap_or_else(agent::host_name),
                metrics: run.metrics,
                ownership: run.ownership.into(),
            };
            agent::start(options)?;
        }
        Command::Down { places, netns, only_look } => agent::down(&places.state_dir, netns.as_deref(), only_look)?,
        Command::Check { docker_host, netns, places, json } => {
            if let Some(path) = &netns {
                netns::enter(path)?;
            }
            return Ok(ExitCode::from(agent::check(docker_host, &places.state_dir, json)?));
        }
        Command::Plan { places } => agent::print_plan(&places.state_dir)?,
        Command::EngineFilter { engine, listen } => {
            agent::die_with_the_supervisor();
            node_agent::proxy::main(&engine, &listen)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
