//! Peers that send what ours never would.

use std::collections::BTreeMap;
use std::time::Duration;

use controller::wire::node_server::{Node, NodeServer};
use hyper_util::rt::TokioIo;
use node_agent::uplink::Link;
use node_agent::wire::node_client::NodeClient;
use policy::wire::{self, FromAgent, FromController, from_agent, from_controller};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tower::service_fn;

use crate::pair::{PATIENCE, Place, counted, key, one, plan, up};

/// An agent by hand.
struct Liar {
    up: mpsc::Sender<FromAgent>,
    down: Streaming<FromController>,
}

impl Liar {
    async fn dial(place: &Place) -> Self {
        let path = place.socket();
        let channel = Endpoint::from_static("http://controller.invalid")
            .connect_with_connector(service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .unwrap();
        let (up, outgoing) = mpsc::channel(8);
        let down = NodeClient::new(channel).session(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        Self { up, down }
    }

    async fn say(&self, body: from_agent::Body) {
        self.up.send(FromAgent { body: Some(body) }).await.unwrap();
    }

    async fn hear(&mut self) -> Result<Option<from_controller::Body>, Status> {
        let heard = tokio::time::timeout(PATIENCE, self.down.message()).await.expect("an answer")?;
        Ok(heard.and_then(|message| message.body))
    }

    async fn refused(&mut self) -> String {
        loop {
            match self.hear().await {
                Ok(Some(from_controller::Body::Refused(refused))) => return refused.why,
                Ok(Some(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn welcome(&mut self) {
        self.say(from_agent::Body::Hello(hello())).await;
        assert!(matches!(self.hear().await, Ok(Some(from_controller::Body::Welcome(_)))));
    }

    async fn acknowledged(&mut self) -> u64 {
        loop {
            match self.hear().await {
                Ok(Some(from_controller::Body::Ack(ack))) => return ack.seq,
                Ok(Some(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn hello() -> wire::Hello {
    wire::Hello { protocol: wire::PROTOCOL, node: "node1".into(), spool: "s".into(), version: "1".into(), ..wire::Hello::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_in_a_batch_is_left_out_and_counted_and_the_rest_is_kept() {
    let place = Place::new();
    let controller = place.controller().await;
    let mut liar = Liar::dial(&place).await;
    liar.welcome().await;
    let good = || wire::EdgeDelta::from(&one(80));
    let edges = vec![
        good(),
        wire::EdgeDelta { port: 65_536, ..good() },
        wire::EdgeDelta { port: 99_999, ..good() },
        wire::EdgeDelta { from: "planet:mars".into(), ..good() },
        wire::EdgeDelta { seen: None, ..good() },
        wire::EdgeDelta::from(&one(81)),
    ];
    let health = vec![wire::Health { from_us: 0, to_us: 1_000_000, healthy: true, ..wire::Health::default() }];
    liar.say(from_agent::Body::Batch(wire::Batch { seq: 1, edges, health })).await;
    assert_eq!(liar.acknowledged().await, 1);
    let graph = controller.store.load_graph().await.unwrap();
    assert_eq!(graph.iter().map(|(key, _)| key.clone()).collect::<std::collections::BTreeSet<_>>(), [key(80), key(81)].into());
    let skipped = controller.store.load_skipped().await.unwrap();
    let expected = [("from cannot be read", 1), ("port is out of range", 2), ("seen is missing", 1)];
    assert_eq!(skipped["node1"], BTreeMap::from(expected.map(|(reason, n)| (reason.to_owned(), n))));
    let health = &controller.store.load_health().await.unwrap()["node1"];
    assert_eq!((health[0].healthy, health[0].lost), (false, 4), "time in which something was left out is not observed time");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_that_makes_no_sense_is_refused_with_a_sentence() {
    let place = Place::new();
    let controller = place.controller().await;
    let cases: [(from_agent::Body, &str); 5] = [
        (
            from_agent::Body::Hello(wire::Hello { protocol: 7, ..hello() }),
            "speaks protocol 1, the agent (1) speaks 7: upgrade the older of the two",
        ),
        (from_agent::Body::Hello(wire::Hello { node: String::new(), ..hello() }), "is not a node's name"),
        (from_agent::Body::Hello(wire::Hello { node: "a\nb".into(), ..hello() }), "is not a node's name"),
        (from_agent::Body::Hello(wire::Hello { spool: "x".repeat(1000), ..hello() }), "spool has no id"),
        (from_agent::Body::Batch(wire::Batch::default()), "did not say who it is"),
    ];
    for (body, expected) in cases {
        let mut liar = Liar::dial(&place).await;
        liar.say(body).await;
        let why = liar.refused().await;
        assert!(why.contains(expected), "{why}");
    }
    let mut liar = Liar::dial(&place).await;
    liar.welcome().await;
    liar.say(from_agent::Body::Hello(hello())).await;
    assert!(liar.refused().await.contains("hello twice"));
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_socket_ends_with_its_connection() {
    let place = Place::new();
    let controller = place.controller().await;
    for noise in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff", b""]
    {
        let mut stream = UnixStream::connect(place.socket()).await.unwrap();
        let _ = stream.write_all(noise).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection ends");
    }
    // A frame of gRPC that holds no message of ours.
    let mut liar = Liar::dial(&place).await;
    liar.welcome().await;
    let report = wire::Report { inventory: b"{\"networks\": 7".to_vec(), status: vec![0xff; 100] };
    liar.say(from_agent::Body::Report(report)).await;
    liar.say(from_agent::Body::Answer(wire::Answer { id: 1, answer: vec![1, 2, 3], refused: String::new() })).await;
    liar.say(from_agent::Body::Batch(wire::Batch { seq: 1, ..wire::Batch::default() })).await;
    assert_eq!(liar.acknowledged().await, 1, "the session goes on");
    drop(liar);

    let agent = place.agent();
    agent.handle.record(one(1));
    assert_eq!(counted(&controller.store, 1).await, 1);
    agent.handle.stop().await;
    controller.stop().await;
}

/// A controller by hand: it sends what it was made with after a welcome.
struct LyingController(Vec<from_controller::Body>, mpsc::UnboundedSender<from_agent::Body>);

#[tonic::async_trait]
impl Node for LyingController {
    type SessionStream = ReceiverStream<Result<FromController, Status>>;

    async fn session(&self, request: Request<Streaming<FromAgent>>) -> Result<Response<Self::SessionStream>, Status> {
        let (down, answers) = mpsc::channel(8);
        let (bodies, heard) = (self.0.clone(), self.1.clone());
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            for body in bodies {
                let _ = down.send(Ok(FromController { body: Some(body) })).await;
            }
            while let Ok(Some(message)) = incoming.message().await {
                let _ = heard.send(message.body.unwrap());
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

fn lying_controller(place: &Place, bodies: Vec<from_controller::Body>) -> mpsc::UnboundedReceiver<from_agent::Body> {
    let (heard, hear) = mpsc::unbounded_channel();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let node = NodeServer::new(LyingController(bodies, heard));
    tokio::spawn(Server::builder().add_service(node).serve_with_incoming(UnixListenerStream::new(listener)));
    hear
}

fn welcome() -> from_controller::Body {
    from_controller::Body::Welcome(wire::Welcome { protocol: wire::PROTOCOL, store: "s".into(), acknowledged: 0, version: "1".into() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_cannot_be_read_is_refused_whole_and_the_session_goes_on() {
    let place = Place::new();
    let mut unreadable = serde_json::to_value(plan("s", 4)).unwrap();
    unreadable["set"]["except"] = "sundays".into();
    let plan_of = |bytes: Vec<u8>| from_controller::Body::Plan(wire::Plan { plan: bytes, adopt: false });
    let good = serde_json::to_vec(&plan("s", 5)).unwrap();
    let bodies = vec![
        welcome(),
        plan_of(unreadable.to_string().into_bytes()),
        plan_of(good[..good.len() / 2].to_vec()),
        plan_of(vec![]),
        plan_of(good),
    ];
    let mut heard = lying_controller(&place, bodies);
    let mut agent = place.agent();
    up(&agent).await;
    let mut refused = Vec::new();
    while refused.len() < 3 {
        if let from_agent::Body::Applied(applied) = heard.recv().await.unwrap() {
            refused.push(applied.refused);
        }
    }
    assert!(refused[0].contains("the plan cannot be read: unknown field `except`"), "{refused:?}");
    assert!(refused.iter().all(|why| why.starts_with("the plan cannot be read")), "{refused:?}");
    // Only the one that is whole arrives.
    let order = tokio::time::timeout(PATIENCE, agent.orders.recv()).await.unwrap().unwrap();
    let node_agent::uplink::Order::Plan { plan, .. } = order else { panic!("{order:?}") };
    assert_eq!(plan.generation, 5);
    agent.handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_of_another_protocol_is_left_and_said() {
    for (body, expected) in [
        (from_controller::Body::Welcome(wire::Welcome { protocol: 9, ..wire::Welcome::default() }), "speaks protocol 9, this agent 1"),
        (from_controller::Body::Refused(wire::Refused { why: "we are closed".into() }), "the controller refuses: we are closed"),
        (from_controller::Body::Ack(wire::Ack { seq: 1 }), "the controller sent no welcome"),
    ] {
        let place = Place::new();
        let _heard = lying_controller(&place, vec![body]);
        let agent = place.agent();
        let mut link = agent.handle.link();
        let found = link.wait_for(|link| matches!(link, Link::Away(why) if why.contains(expected)));
        tokio::time::timeout(PATIENCE, found).await.expect(expected).unwrap();
        agent.handle.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_of_what_was_never_sent_loses_nothing() {
    let place = Place::new();
    let agent = place.agent();
    agent.handle.record(one(1));
    agent.handle.flush().await;
    {
        // Says that it has the whole future; the spool goes on under a new id, and nothing that waits is dropped.
        let greedy = wire::Welcome { protocol: wire::PROTOCOL, store: "s".into(), acknowledged: 1_000_000, version: "1".into() };
        let _heard = lying_controller(&place, vec![from_controller::Body::Welcome(greedy)]);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    agent.handle.stop().await;
    std::fs::remove_file(place.socket()).unwrap();
    let agent = place.agent();
    let controller = place.controller().await;
    assert_eq!(counted(&controller.store, 1).await, 1);
    agent.handle.stop().await;
    controller.stop().await;
}
