//! Dialling, and one session after the other.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::unistd::Uid;
use policy::wire::{self, from_agent, from_controller, question};
use policy::{Inventory, NodePlan};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tower::service_fn;
use tracing::{info, warn};

use super::keeper::{Command, Desk, Introduction};
use super::{FlowQueue, Link, Options, Order, Report, Said, SpoolError, chain};
use crate::wire::node_client::NodeClient;

/// Batches that are sent before the first of them is acknowledged: enough to keep the store busy, few enough to keep memory flat.
const IN_FLIGHT: usize = 4;

/// Flows to a message.
const FLOWS: usize = 256;

/// A plan names every rule of a host; 10,000 rules are some 2 MB.
const LARGEST: usize = 64 << 20;

/// The first pause after a session that failed, and the longest: a controller that comes back is found within two seconds.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How long the controller may take to say welcome: its store may be busy.
const WELCOME: Duration = Duration::from_secs(30);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("cannot reach the controller at {path}")]
    Unreachable { path: String, source: tonic::transport::Error },
    #[error("the controller ended the session: {}", .0.message())]
    Closed(Box<tonic::Status>),
    #[error("the controller ended the session")]
    Over,
    #[error("the controller refuses: {0}")]
    Refused(String),
    #[error("the controller sent {0}")]
    Nonsense(&'static str),
    #[error("the controller speaks protocol {found}, this agent {}: upgrade the older of the two", wire::PROTOCOL)]
    Protocol { found: u32 },
    #[error("the controller does not answer")]
    Silent,
    #[error("the spool took a new id")]
    Renamed,
    #[error("the spool cannot be written")]
    Spool(#[from] SpoolError),
    #[error("the agent stops")]
    Stopped,
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Self::Closed(Box::new(status))
    }
}

pub(super) struct Dialler {
    pub(super) options: Options,
    pub(super) desk: Desk,
    pub(super) news: Arc<Notify>,
    pub(super) flows: Arc<FlowQueue>,
    pub(super) reports: watch::Receiver<Option<Arc<Report>>>,
    pub(super) said: mpsc::Receiver<Said>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) applied: Arc<Mutex<Option<(String, u64)>>>,
    pub(super) link: watch::Sender<Link>,
    pub(super) stopped: watch::Receiver<bool>,
}

impl Dialler {
    pub(super) async fn run(mut self) {
        let mut pause = PAUSES.0;
        let mut stopped = self.stopped.clone();
        while !*stopped.borrow() {
            let mut useful = false;
            let begun = Instant::now();
            let ended = tokio::select! {
                ended = self.session(&mut useful) => ended,
                _ = stopped.changed() => Ended::Stopped,
            };
            let why = chain(&ended);
            match ended {
                Ended::Renamed => {
                    warn!("the controller has more of the spool than the spool itself, which lost its end: it goes on under a new id");
                    continue;
                }
                Ended::Stopped => {}
                _ => {
                    let before = self.link.send_replace(Link::Away(why.clone()));
                    // Said when it changes, not at each attempt.
                    if before != Link::Away(why.clone()) {
                        warn!(%why, "no session with the controller; what is seen waits in the spool");
                    }
                }
            }
            pause = if useful || begun.elapsed() > PAUSES.1 { PAUSES.0 } else { (pause * 2).min(PAUSES.1) };
            tokio::select! {
                () = sleep(pause) => {}
                _ = stopped.changed() => {}
            }
        }
        self.link.send_replace(Link::Away("the agent stops".to_owned()));
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Ended> {
        let (reply, answer) = oneshot::channel();
        self.desk.send(question(reply));
        // The thread of the spool ends only when the agent stops.
        answer.await.map_err(|_| Ended::Stopped)
    }

    async fn session(&mut self, useful: &mut bool) -> Ended {
        match self.talk(useful).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn talk(&mut self, useful: &mut bool) -> Result<std::convert::Infallible, Ended> {
        let path = self.options.socket.clone();
        let controller = self.options.controller_uid;
        let channel = Endpoint::from_static("http://controller.invalid")
            .connect_with_connector(service_fn(move |_| {
                let path = path.clone();
                async move { trusted(UnixStream::connect(path).await?, controller).map(TokioIo::new) }
            }))
            .await
            .map_err(|source| Ended::Unreachable { path: self.options.socket.display().to_string(), source })?;
        let (up, outgoing) = mpsc::channel::<wire::FromAgent>(IN_FLIGHT * 2);
        let Introduction { spool, first_unsent } = self.ask(Command::Introduce).await?;
        let (store, generation) = self.applied.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
        let hello = wire::Hello {
            protocol: wire::PROTOCOL,
            node: self.options.node.clone(),
            spool,
            version: self.options.version.clone(),
            first_unsent,
            store,
            generation,
            changes: true,
        };
        // What was said to an earlier session: the greeting says what is applied, and whoever asked has stopped waiting.
        while self.said.try_recv().is_ok() {}
        send(&up, from_agent::Body::Hello(hello)).await?;
        let mut client = NodeClient::new(channel).max_decoding_message_size(LARGEST);
        let mut incoming = timeout(WELCOME, client.session(ReceiverStream::new(outgoing))).await.map_err(|_| Ended::Silent)??.into_inner();
        let first = timeout(WELCOME, incoming.message()).await.map_err(|_| Ended::Silent)??.ok_or(Ended::Over)?;
        let welcome = match first.body {
            Some(from_controller::Body::Welcome(welcome)) => welcome,
            Some(from_controller::Body::Refused(refused)) => return Err(Ended::Refused(refused.why)),
            Some(_) | None => return Err(Ended::Nonsense("no welcome")),
        };
        if welcome.protocol != wire::PROTOCOL {
            return Err(Ended::Protocol { found: welcome.protocol });
        }
        let acknowledged = welcome.acknowledged;
        let again = self.ask(|reply| Command::Resume(acknowledged, reply)).await??.ok_or(Ended::Renamed)?;
        info!(store = %welcome.store, again = again.len(), "session with the controller");
        self.link.send_replace(Link::Up { store: welcome.store });
        self.reports.mark_changed();
        let mut in_flight: VecDeque<u64> = again.iter().map(|batch| batch.seq).collect();
        let mut unsent: VecDeque<wire::Batch> = again.into();

        // When what may wait is to go; the spool may hold some from before.
        let (tick, mut ticking) = (sleep(Duration::ZERO), true);
        tokio::pin!(tick);
        // When the edges that were just seen are to go; far away while there are none.
        let linger = sleep(Duration::ZERO);
        tokio::pin!(linger);
        let mut lingering = false;
        // More waits than one batch holds.
        let mut more = false;
        let (mut flows_wait, mut due) = (true, false);
        loop {
            if (due || more) && unsent.is_empty() && in_flight.len() < IN_FLIGHT {
                due = false;
                more = match self.ask(Command::Seal).await? {
                    Ok(Some(batch)) => {
                        let full = batch.edges.len() >= self.options.limits.batch;
                        in_flight.push_back(batch.seq);
                        unsent.push_back(batch);
                        full
                    }
                    Ok(None) => false,
                    Err(e) => {
                        // The session stays: plans still arrive. It is tried again.
                        warn!(why = %chain(&e), "a batch could not be numbered");
                        ticking = true;
                        tick.as_mut().reset(Instant::now() + self.options.every);
                        false
                    }
                };
            }
            let has_room = !unsent.is_empty() || flows_wait || !self.said.is_empty() || self.reports.has_changed().unwrap_or(false);
            tokio::select! {
                // Waiting for room here, and not in `send`, keeps the other direction moving while the controller is slow.
                room = up.reserve(), if has_room => {
                    let room = room.map_err(|_| Ended::Over)?;
                    let body = if let Ok(said) = self.said.try_recv() {
                        Some(said_body(said))
                    } else if let Some(batch) = unsent.pop_front() {
                        Some(from_agent::Body::Batch(batch))
                    } else if self.reports.has_changed().unwrap_or(false) {
                        let report = self.reports.borrow_and_update().clone();
                        report.and_then(|report| report_body(&report))
                    } else {
                        let (flows, dropped) = self.flows.pull(FLOWS);
                        flows_wait = flows.len() == FLOWS;
                        (!flows.is_empty() || dropped > 0)
                            .then(|| from_agent::Body::Flows(wire::Flows { flows: flows.iter().map(Into::into).collect(), dropped }))
                    };
                    if let Some(body) = body {
                        room.send(wire::FromAgent { body: Some(body) });
                    }
                }
                message = incoming.message() => {
                    let body = message?.ok_or(Ended::Over)?.body;
                    if let Some(from_controller::Body::Ack(wire::Ack { seq })) = body {
                        *useful = true;
                        in_flight.retain(|&sent| sent > seq);
                        self.desk.send(Command::Acknowledged(seq));
                    } else if let Some(order) = self.order(body, &up).await? {
                        self.orders.send(order).await.map_err(|_| Ended::Stopped)?;
                    }
                }
                () = &mut tick, if ticking => {
                    ticking = false;
                    due = true;
                }
                () = self.desk.begun.notified(), if !ticking => {
                    ticking = true;
                    tick.as_mut().reset(Instant::now() + self.options.every);
                }
                () = self.news.notified(), if !lingering => {
                    lingering = true;
                    linger.as_mut().reset(Instant::now() + self.options.linger);
                }
                () = &mut linger, if lingering => {
                    lingering = false;
                    due = true;
                }
                () = self.flows.news.notified(), if !flows_wait => flows_wait = true,
                said = self.said.recv(), if self.said.is_empty() => {
                    send(&up, said_body(said.ok_or(Ended::Stopped)?)).await?;
                }
                changed = self.reports.changed(), if !self.reports.has_changed().unwrap_or(true) => {
                    changed.map_err(|_| Ended::Stopped)?;
                    self.reports.mark_changed();
                }
            }
        }
    }

    /// Reads what the controller wants. A plan that cannot be read is refused whole, here: nobody may apply a part of it.
    async fn order(&self, body: Option<from_controller::Body>, up: &mpsc::Sender<wire::FromAgent>) -> Result<Option<Order>, Ended> {
        let read = |bytes: &[u8]| wire::read_plan(bytes).map(Box::<NodePlan>::new);
        match body {
            Some(from_controller::Body::Plan(wire::Plan { plan, adopt })) => match read(&plan) {
                Ok(plan) => Ok(Some(Order::Plan { plan, adopt })),
                Err(e) => {
                    warn!(why = %e, "a plan is refused; what is applied stays");
                    let applied = wire::Applied { refused: e.to_string(), ..wire::Applied::default() };
                    send(up, from_agent::Body::Applied(applied)).await?;
                    Ok(None)
                }
            },
            Some(from_controller::Body::PlanChange(wire::PlanChange { change })) => match wire::read_plan_change(&change) {
                Ok(change) => Ok(Some(Order::Change(Box::new(change)))),
                Err(e) => {
                    warn!(why = %e, "a change of the plan cannot be read; the whole is asked for");
                    send(up, said_body(Said::Whole)).await?;
                    Ok(None)
                }
            },
            Some(from_controller::Body::Question(wire::Question { id, what })) => match what {
                Some(question::What::Preview(plan)) => match read(&plan) {
                    Ok(plan) => Ok(Some(Order::Preview { id, plan })),
                    Err(e) => self.cannot_say(id, e.to_string(), up).await,
                },
                None => self.cannot_say(id, "this agent does not know the question: upgrade it".to_owned(), up).await,
            },
            Some(from_controller::Body::Refused(refused)) => Err(Ended::Refused(refused.why)),
            Some(from_controller::Body::Welcome(_)) => Err(Ended::Nonsense("a second welcome")),
            Some(from_controller::Body::Ack(_)) => Ok(None),
            // A message of a later minor version: nothing we are asked to do.
            None => Ok(None),
        }
    }

    async fn cannot_say(&self, id: u64, why: String, up: &mpsc::Sender<wire::FromAgent>) -> Result<Option<Order>, Ended> {
        send(up, from_agent::Body::Answer(wire::Answer { id, answer: Vec::new(), refused: why })).await?;
        Ok(None)
    }
}

/// Whoever may write to the socket's folder can serve in the controller's place: the kernel knows who it is (SO_PEERCRED, unix(7)).
fn trusted(stream: UnixStream, controller: Option<u32>) -> io::Result<UnixStream> {
    let server = stream.peer_cred()?.uid();
    if server == 0 || server == Uid::effective().as_raw() || Some(server) == controller {
        return Ok(stream);
    }
    let why = format!("user {server} serves it, and is neither root nor the controller's (--controller-user)");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

async fn send(up: &mpsc::Sender<wire::FromAgent>, body: from_agent::Body) -> Result<(), Ended> {
    up.send(wire::FromAgent { body: Some(body) }).await.map_err(|_| Ended::Over)
}

fn said_body(said: Said) -> from_agent::Body {
    match said {
        Said::Applied { store, generation, outcome } => {
            let (revoked, refused) = match outcome {
                Ok(revoked) => (revoked, String::new()),
                Err(why) => (0, why),
            };
            from_agent::Body::Applied(wire::Applied { generation, store, refused, revoked, whole: false })
        }
        Said::Whole => from_agent::Body::Applied(wire::Applied { whole: true, ..wire::Applied::default() }),
        Said::Answer { id, answer } => {
            let (answer, refused) = match answer.and_then(|preview| wire::write_json("preview", &preview).map_err(|e| e.to_string())) {
                Ok(bytes) => (bytes, String::new()),
                Err(why) => (Vec::new(), why),
            };
            from_agent::Body::Answer(wire::Answer { id, answer, refused })
        }
    }
}

fn report_body(Report { inventory, forwarders, status }: &Report) -> Option<from_agent::Body> {
    let inventory = match forwarders.is_empty() {
        true => Cow::Borrowed(&**inventory),
        false => Cow::Owned(Inventory { forwarders: forwarders.clone(), ..(**inventory).clone() }),
    };
    let written = wire::write_json("inventory", &*inventory).and_then(|inventory| Ok((inventory, wire::write_json("status", status)?)));
    match written {
        Ok((inventory, status)) => Some(from_agent::Body::Report(wire::Report { inventory, status })),
        Err(e) => {
            warn!(why = %e, "a report cannot be written");
            None
        }
    }
}
