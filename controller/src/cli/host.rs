//! The commands that change this host: up, down, install, check.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::unistd::{Uid, User};
use policy::Mode;
use policy::review::{Action, Who};
use tracing_subscriber::EnvFilter;

use super::client::Client;
use super::exit;
use super::output::{Failed, chain, clean};
use crate::api::ask::Comment;
use crate::api::view::StatusView;
use crate::store::{Change, DecisionDraft, Store};
use crate::supervise::down::{self, DownArgs};
use crate::supervise::units::{self, InstallArgs};
use crate::supervise::{self, CheckArgs, Places, SuperviseError, UpArgs};

impl From<SuperviseError> for Failed {
    fn from(error: SuperviseError) -> Self {
        let code = match &error {
            SuperviseError::Declined | SuperviseError::NobodyToAsk | SuperviseError::AlreadyUp { .. } => exit::REFUSED,
            SuperviseError::NoUser { .. } => exit::USAGE,
            SuperviseError::NotRoot
            | SuperviseError::NoAgent { .. }
            | SuperviseError::NotForAll { .. }
            | SuperviseError::Io { .. }
            | SuperviseError::Ended { .. }
            | SuperviseError::NotReady { .. } => exit::FAILED,
            // It has said itself what is wrong; its exit codes are ours.
            SuperviseError::Agent { status, .. } => status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(exit::FAILED),
        };
        let next = match &error {
            SuperviseError::NotReady { .. } | SuperviseError::Ended { .. } => "`bulkhead check` says what this host lacks.",
            SuperviseError::NotForAll { .. } => {
                "Put both where every user can start them: sudo install target/release/bulkhead target/release/bulkhead-agent /usr/local/bin/"
            }
            _ => "",
        };
        Self::new(code, chain(&error), next)
    }
}

pub(super) fn up(places: &Places, args: &UpArgs) -> Result<(), Failed> {
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    supervise::up(places, args)?;
    if args.detach {
        println!("{} `bulkhead status` says how things stand, `bulkhead graph` who talks to whom.", what_is_denied(places));
        what_is_not_seen(places).iter().for_each(|blind| println!("Not all is seen yet: {}", clean(blind)));
    }
    Ok(())
}

/// What is denied from now on: what the store says, which may be of an earlier run. Nothing is promised that nobody confirms.
fn what_is_denied(places: &Places) -> String {
    let view = Client::new(places.api()).and_then(|client| client.get::<StatusView>("/api/v1/status"));
    match view {
        Ok(view) => in_force_again(&view),
        Err(failed) => format!("What is in force the controller does not say ({}).", failed.error),
    }
}

fn in_force_again(view: &StatusView) -> String {
    let enforced = view.segments.iter().map(|view| &view.segment).filter(|segment| segment.mode == Mode::Enforce);
    let enforced = enforced.map(|segment| format!("{} ({})", segment.name, segment.mode));
    let quarantined = view.quarantined.iter().map(|workload| format!("{workload} (quarantine)"));
    let again: Vec<String> = enforced.chain(quarantined).collect();
    match again.is_empty() {
        true => "Nothing is denied that was not denied before.".to_owned(),
        false => format!("In force again from the store: {}.", clean(&again.join(", "))),
    }
}

/// Why the agent that was just started does not see all it should. Empty too if the controller does not say.
fn what_is_not_seen(places: &Places) -> Vec<String> {
    const REPORTS_WITHIN: Duration = Duration::from_secs(2);
    let Ok(client) = Client::new(places.api()) else { return Vec::new() };
    let begun = Instant::now();
    while begun.elapsed() < REPORTS_WITHIN {
        let view: StatusView = match client.get("/api/v1/status") {
            Ok(view) => view,
            Err(_) => return Vec::new(),
        };
        let here: Vec<_> = view.nodes.into_iter().filter(|node| node.connected && node.status.since.is_some()).collect();
        if !here.is_empty() {
            return here.into_iter().flat_map(|node| node.status.blind).collect();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Vec::new()
}

pub(super) fn down(places: &Places, args: &DownArgs) -> Result<(), Failed> {
    Ok(down::down(places, args, |subject, comment| record(places, subject, comment))?)
}

pub(super) fn install(places: &Places, args: &InstallArgs) -> Result<(), Failed> {
    Ok(units::install(places, args)?)
}

pub(super) fn check(places: &Places, args: &CheckArgs) -> Result<(), Failed> {
    match supervise::check(places, args) {
        Ok(()) => Ok(()),
        // It has told each of them, with what to do.
        Err(error @ SuperviseError::Agent { .. }) => {
            Err(Failed { error: "not ready: something above says FAIL".to_owned(), ..error.into() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Through the controller if it lives, else into its store: `down` is a decision like every other.
fn record(places: &Places, subject: &str, comment: &str) -> Result<(), String> {
    let words = Comment { comment: comment.to_owned(), subject: subject.to_owned() };
    let asked = Client::new(places.api()).and_then(|client| client.post::<serde_json::Value>("/api/v1/down", &words));
    match asked {
        Ok(_) => Ok(()),
        Err(failed) if failed.exit == exit::UNREACHABLE => record_in_store(places, subject, comment),
        Err(failed) => Err(failed.error),
    }
}

fn record_in_store(places: &Places, subject: &str, comment: &str) -> Result<(), String> {
    let path = places.controller().join("store.db");
    if !path.exists() {
        // Nothing was ever learned or decided here.
        return Ok(());
    }
    let uid = Uid::current();
    let name = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
    let who = Who { uid: uid.as_raw(), name, claims: std::env::var("SUDO_USER").ok() };
    let work = async {
        let now = Timestamp::now();
        let store = Store::open(&path, now).await.map_err(|e| chain(&e))?;
        let in_force = store.load_policy_set().await.map_err(|e| chain(&e))?;
        let decision = DecisionDraft {
            time: now,
            who,
            action: Action::Down,
            subject: subject.to_owned(),
            digest: None,
            rules: Vec::new(),
            comment: comment.to_owned(),
        };
        let change =
            Change { set: in_force.set.clone(), at_least: 0, before: in_force, rejected: Vec::new(), accepted: Vec::new(), decision };
        let written = store.commit_decision(&change).await.map(drop).map_err(|e| chain(&e));
        store.close().await;
        written
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(work)
}
