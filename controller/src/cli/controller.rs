//! `bulkhead controller`: store, sessions, hub and API in one process without privilege, until SIGTERM or SIGINT.

use std::fs;
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use nix::unistd::Uid;
use policy::review::Who;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use super::args::ControllerArgs;
use super::exit;
use super::output::{Failed, chain};
use crate::api::{self, Gate};
use crate::hub;
use crate::store::Store;
use crate::supervise::Places;

/// Events that may wait for the hub; beyond that the sessions wait, and behind them the agents' spools.
const EVENTS: usize = 256;

/// How long answers that are under way may take when the controller ends.
const GRACE: Duration = Duration::from_secs(3);

fn failed(what: &str, error: &dyn std::error::Error) -> Failed {
    Failed::new(exit::FAILED, format!("{what}: {}", chain(error)), "")
}

fn log(json: bool) {
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber in one process is refused; the first one logs.
    let _ = if json { log.json().try_init() } else { log.with_ansi(std::io::stderr().is_terminal()).try_init() };
}

pub(super) fn run(places: &Places, args: &ControllerArgs) -> Result<(), Failed> {
    log(args.log_json);
    // A controller that outlives a killed `up` would hold the store against the one that the next `up` starts.
    let supervised = std::env::var_os("BULKHEAD_SUPERVISED").is_some();
    if supervised && let Err(errno) = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM) {
        warn!(%errno, "cannot end with the supervisor");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|e| failed("cannot start", &e))?;
    runtime.block_on(control(places, args, supervised))
}

async fn control(places: &Places, args: &ControllerArgs, supervised: bool) -> Result<(), Failed> {
    // First: whoever finds our sockets may already end us.
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed("cannot listen to signals", &e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed("cannot listen to signals", &e))?;
    let (state_dir, run_dir) = (places.controller(), places.run_dir.clone());
    for (folder, mode) in [(&state_dir, 0o700), (&run_dir, 0o755)] {
        let made = fs::DirBuilder::new().recursive(true).mode(mode).create(folder);
        made.map_err(|e| failed(&format!("cannot make the folder {}", folder.display()), &e))?;
    }
    if let Some(address) = args.metrics {
        let exporter = metrics_exporter_prometheus::PrometheusBuilder::new().with_http_listener(address);
        exporter.install().map_err(|e| failed(&format!("cannot serve metrics at {address}"), &e))?;
    }
    let store = Store::open(&state_dir.join("store.db"), Timestamp::now()).await.map_err(|e| failed("cannot open the store", &e))?;
    let (stopping, stop) = watch::channel(false);
    let (events, inbox) = mpsc::channel(EVENTS);
    let uid = Uid::effective().as_raw();
    let own = Who { uid, name: "bulkhead".to_owned(), claims: None };
    let options = hub::Options { keep_flows: args.flows, own };
    let (hub, mut task) = hub::start(store, options, inbox, stop.clone()).await.map_err(|e| failed("cannot load the state", &e))?;

    let gate = Gate::new(!supervised);
    let listener = api::listen(&places.api(), &gate).map_err(|e| failed("cannot serve the API", &e))?;
    let mut served = tokio::spawn(api::serve(listener, hub.clone(), gate, stop.clone()));
    let mut sessions = super::sessions::start(places, args, events, stop).await.map_err(|e| failed("cannot serve agents", &e))?;

    // Nobody waits for the word: fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    info!(run_dir = %run_dir.display(), state_dir = %state_dir.display(), version = env!("CARGO_PKG_VERSION"), "controller ready");

    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        _ = &mut task => Err("the hub ended"),
        _ = &mut served => Err("the API ended"),
        _ = &mut sessions => Err("the sessions ended"),
    };
    info!("ending");
    // Everybody has a receiver, or is gone already.
    let _ = stopping.send(true);
    if !task.is_finished() {
        let _ = task.await;
    }
    // The sessions remove their own socket; a leftover of either is replaced by the next start.
    let _ = fs::remove_file(places.api());
    // Sessions end by themselves; what they hold is in the agents' spools.
    let _ = tokio::time::timeout(GRACE, async {
        if !served.is_finished() {
            let _ = (&mut served).await;
        }
        if !sessions.is_finished() {
            let _ = (&mut sessions).await;
        }
    })
    .await;
    ended.map_err(|what| Failed::new(exit::FAILED, what, "The log above tells why."))
}
