//! One session, from the greeting to its end.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use policy::wire::{self, FromAgent, FromController, WireError, from_agent, from_controller, question};
use policy::{EdgeDelta, Flow, Health};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::{Status, Streaming};
use tracing::{info, warn};

use super::{Applied, Attachment, BatchIn, Event, Greeting, NotStored, Order, Report};

/// Batches of one session that are with the hub at a time.
pub(super) const IN_FLIGHT: usize = 4;

/// How long an agent may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);

/// Longer than any host name (253, RFC 1035) or spool id (32).
const LONGEST_NAME: usize = 253;

/// How a session ends, if it isn't by its agent.
#[derive(Debug)]
enum End {
    /// The agent is gone.
    Gone,
    /// The agent is told why, and told not to expect better without a change.
    Refuse(String),
    /// The agent is told to come again.
    Fail(Status),
}

impl From<Status> for End {
    fn from(_: Status) -> Self {
        // The stream broke: there is nobody to tell.
        Self::Gone
    }
}

pub(super) struct Talk {
    pub(super) session: u64,
    pub(super) version: String,
    pub(super) incoming: Streaming<FromAgent>,
    pub(super) down: mpsc::Sender<Result<FromController, Status>>,
    pub(super) events: mpsc::Sender<Event>,
}

impl Talk {
    pub(super) async fn run(mut self) {
        let end = self.talk().await;
        match end {
            End::Gone => {}
            End::Refuse(why) => {
                warn!(session = self.session, %why, "session refused");
                let _ = self.send(from_controller::Body::Refused(wire::Refused { why })).await;
            }
            End::Fail(status) => {
                warn!(session = self.session, why = status.message(), "session ended");
                let _ = self.down.send(Err(status)).await;
            }
        }
    }

    async fn talk(&mut self) -> End {
        let (greeting, first) = match self.greeting().await {
            Ok(greeted) => greeted,
            Err(end) => return end,
        };
        let node = greeting.node.clone();
        let end = match self.attend(greeting, first).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        let _ = self.events.send(Event::Gone { session: self.session, node: node.clone() }).await;
        info!(%node, session = self.session, "session ended");
        end
    }

    /// Who the agent is, and the lowest number that its spool still holds.
    async fn greeting(&mut self) -> Result<(Greeting, u64), End> {
        let refuse = |why: &str| End::Refuse(why.to_owned());
        let first = timeout(GREETING, self.incoming.message()).await.map_err(|_| refuse("the agent did not say who it is"))??;
        let Some(from_agent::Body::Hello(hello)) = first.ok_or(End::Gone)?.body else {
            return Err(refuse("the agent did not say who it is"));
        };
        if hello.protocol != wire::PROTOCOL {
            return Err(End::Refuse(format!(
                "this controller ({}) speaks protocol {}, the agent ({}) speaks {}: upgrade the older of the two",
                self.version,
                wire::PROTOCOL,
                short(&hello.version),
                hello.protocol
            )));
        }
        let clean =
            |name: &str| !name.is_empty() && name.len() <= LONGEST_NAME && !name.contains(|c: char| c.is_control() || c.is_whitespace());
        if !clean(&hello.node) {
            return Err(End::Refuse(format!("{:?} is not a node's name", short(&hello.node))));
        }
        if !clean(&hello.spool) {
            return Err(refuse("the agent's spool has no id"));
        }
        let applied = (!hello.store.is_empty()).then_some((hello.store, hello.generation));
        Ok((
            Greeting { node: hello.node, spool: hello.spool, version: short(&hello.version), applied, changes: hello.changes },
            hello.first_unsent,
        ))
    }

    async fn attend(&mut self, greeting: Greeting, first: u64) -> Result<std::convert::Infallible, End> {
        let (node, spool) = (greeting.node.clone(), greeting.spool.clone());
        let (reply, answer) = oneshot::channel();
        self.tell(Event::Connected { session: self.session, greeting, reply }).await?;
        let Attachment { store, acknowledged, mut orders } = match answer.await {
            Ok(Ok(attachment)) => attachment,
            Ok(Err(why)) => return Err(End::Refuse(why)),
            Err(_) => return Err(End::Fail(Status::unavailable("the controller stops"))),
        };
        info!(%node, session = self.session, acknowledged, "session with an agent");
        let welcome = wire::Welcome { protocol: wire::PROTOCOL, store, acknowledged, version: self.version.clone() };
        self.send(from_controller::Body::Welcome(welcome)).await?;

        let mut pending = FuturesOrdered::new();
        loop {
            tokio::select! {
                () = self.down.closed() => return Err(End::Gone),
                Some((seq, stored)) = pending.next(), if !pending.is_empty() => {
                    let stored: Result<Result<(), NotStored>, oneshot::error::RecvError> = stored;
                    match stored {
                        Ok(Ok(())) => self.send(from_controller::Body::Ack(wire::Ack { seq })).await?,
                        // No acknowledgement: the agent keeps the batch and sends it again.
                        Ok(Err(e)) => return Err(End::Fail(Status::unavailable(format!("batch {seq}: {e}")))),
                        Err(_) => return Err(End::Fail(Status::unavailable("the controller stops"))),
                    }
                }
                order = orders.recv() => match order {
                    Some(order) => match order_body(order) {
                        Ok(body) => self.send(body).await?,
                        Err(e) => warn!(%node, why = %e, "an order cannot be written"),
                    },
                    None => return Err(End::Fail(Status::unavailable("the controller ended the session"))),
                },
                message = self.incoming.message(), if pending.len() < IN_FLIGHT => {
                    let Some(message) = message? else { return Err(End::Gone) };
                    match message.body {
                        Some(from_agent::Body::Batch(batch)) => {
                            let batch = read_batch(&node, &spool, first, batch);
                            let seq = batch.seq;
                            let (reply, stored) = oneshot::channel();
                            self.tell(Event::Batch { session: self.session, batch, reply }).await?;
                            pending.push_back(async move { (seq, stored.await) });
                        }
                        Some(body) => self.other(&node, body).await?,
                        // A message of a later minor version.
                        None => {}
                    }
                }
            }
        }
    }

    async fn other(&mut self, node: &str, body: from_agent::Body) -> Result<(), End> {
        let node = node.to_owned();
        let event = match body {
            from_agent::Body::Flows(wire::Flows { flows, dropped }) => {
                let sent = flows.len();
                let flows: Vec<Flow> = flows.into_iter().filter_map(|flow| flow.try_into().ok()).collect();
                let unreadable = u64::try_from(sent - flows.len()).unwrap_or(u64::MAX);
                Event::Flows { node, flows, dropped: dropped.saturating_add(unreadable) }
            }
            from_agent::Body::Report(report) => match read_report(&report) {
                Ok(report) => Event::Report { node, report: Box::new(report) },
                Err(e) => {
                    // The report before stays; guessing at a part of an inventory would name the wrong workloads.
                    warn!(%node, why = %e, "a report is left out");
                    return Ok(());
                }
            },
            from_agent::Body::Applied(wire::Applied { whole: true, .. }) => Event::Whole { session: self.session, node },
            from_agent::Body::Applied(wire::Applied { generation, store, refused, revoked, whole: _ }) => {
                let refused = (!refused.is_empty()).then_some(refused);
                Event::Applied { node, applied: Applied { store, generation, refused, revoked } }
            }
            from_agent::Body::Answer(wire::Answer { id, answer, refused }) => {
                let answer = if refused.is_empty() { wire::read_preview(&answer).map_err(|e| e.to_string()) } else { Err(refused) };
                Event::Answer { node, id, answer }
            }
            from_agent::Body::Hello(_) => return Err(End::Refuse("the agent said hello twice".to_owned())),
            from_agent::Body::Batch(_) => return Ok(()),
        };
        self.tell(event).await
    }

    async fn tell(&self, event: Event) -> Result<(), End> {
        self.events.send(event).await.map_err(|_| End::Fail(Status::unavailable("the controller stops")))
    }

    async fn send(&self, body: from_controller::Body) -> Result<(), End> {
        self.down.send(Ok(FromController { body: Some(body) })).await.map_err(|_| End::Gone)
    }
}

/// Reads a batch; what cannot be read in it is left out, counted by reason, and counted as lost in the time it belongs to, so that
/// nobody takes what is left for the whole.
fn read_batch(node: &str, spool: &str, first: u64, batch: wire::Batch) -> BatchIn {
    let mut skipped: BTreeMap<String, u64> = BTreeMap::new();
    let mut skip = |e: WireError| {
        warn!(%node, seq = batch.seq, why = %e, "an element of a batch is left out");
        *skipped.entry(e.reason()).or_default() += 1;
    };
    let edges = batch.edges.into_iter().filter_map(|edge| EdgeDelta::try_from(edge).map_err(&mut skip).ok()).collect();
    let mut health: Vec<Health> = batch.health.into_iter().filter_map(|h| Health::try_from(h).map_err(&mut skip).ok()).collect();
    let lost = skipped.values().sum::<u64>();
    if lost > 0 {
        for stretch in &mut health {
            stretch.healthy = false;
        }
        if let Some(last) = health.last_mut() {
            last.lost = last.lost.saturating_add(lost);
        }
    }
    BatchIn { node: node.to_owned(), spool: spool.to_owned(), seq: batch.seq, first, edges, health, skipped }
}

fn read_report(report: &wire::Report) -> Result<Report, WireError> {
    Ok(Report { inventory: wire::read_inventory(&report.inventory)?, status: wire::read_status(&report.status)? })
}

fn order_body(order: Order) -> Result<from_controller::Body, WireError> {
    Ok(match order {
        Order::Plan { plan, adopt } => from_controller::Body::Plan(wire::Plan { plan: wire::write_json("plan", &*plan)?, adopt }),
        Order::Change(change) => {
            from_controller::Body::PlanChange(wire::PlanChange { change: wire::write_json("change of the plan", &*change)? })
        }
        Order::Preview { id, plan } => {
            let what = question::What::Preview(wire::write_json("plan", &*plan)?);
            from_controller::Body::Question(wire::Question { id, what: Some(what) })
        }
    })
}

/// What an agent says of itself, cut to what fits a line.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}
