//! What is seen is shown: the graph in every format, flows, explain, status.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use policy::FlowOutcome;
use policy::status::{Alarm, NetworkState};
use serde_json::Value;

use crate::desk::{Desk, Node, denied, edge, edge_at, eventually, find, flow, usual};

#[test]
fn the_graph_is_a_table_of_who_talks_to_whom() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    assert!(desk.run("graph").err.contains("No traffic seen yet"));
    node.saw(&desk, &usual());
    let table = desk.run("graph").done();
    let line = table.lines().find(|line| line.contains("shop/db")).unwrap();
    assert_eq!(line.split_whitespace().take(5).collect::<Vec<_>>(), ["shop/web", "shop/db", "tcp/5432", "412", "established"]);
    assert!(line.contains("allow"), "{line}");
    assert_eq!(table.lines().count(), 4, "{table}");
}

#[test]
fn the_graph_is_filtered_by_workload_segment_and_time() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let long_ago = jiff::Timestamp::from_second(1_700_000_000).unwrap();
    let mut edges = usual();
    edges.push(edge_at("shop/worker", "shop/db", "tcp/6379", 3, long_ago));
    edges.push(edge("other/a", "other/b", "udp/53", 3));
    node.saw(&desk, &edges);
    let count = |words: &str| desk.run(words).json()["edges"].as_array().unwrap().len();
    assert_eq!(count("graph -o json"), 5);
    assert_eq!(count("graph --workload shop/db -o json"), 2);
    assert_eq!(count("graph --since 1h -o json"), 4);
    assert_eq!(count("graph --segment shop -o json"), 4);
    assert_eq!(desk.run("graph --since 1h -o json").json()["leftOut"], 1);
    desk.run("graph --workload shop/nobody").failed(4);
    desk.run("graph --segment nothing").failed(4);
}

#[test]
fn the_graph_is_drawn_as_dot_mermaid_and_svg() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let mut edges = usual();
    edges.push(denied("shop/worker", "shop/db", "tcp/5432", false, 3));
    edges.push(denied("shop/db", "outside:198.51.100.9", "tcp/443", true, 2));
    node.saw(&desk, &edges);
    let dot = desk.run("graph -o dot").done();
    assert!(dot.starts_with("digraph") && dot.contains("tcp/5432 (412)") && dot.contains("#c62828"), "{dot}");
    let mermaid = desk.run("graph -o mermaid").done();
    assert!(mermaid.starts_with("flowchart LR") && mermaid.contains("tcp/5432 (412)"), "{mermaid}");
    let svg = desk.run("graph -o svg").done();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("tcp/5432 (412)"), "{svg}");
    // Denied is red and would be denied is orange, both dashed since nothing of them passed in use.
    assert!(svg.contains("stroke=\"#c62828\" stroke-width=\"1.6\" stroke-dasharray") && svg.contains("stroke=\"#ef6c00\""), "{svg}");
}

#[test]
fn a_hostile_name_cannot_become_markup() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &[edge("a\"];evil[label=\"<script>alert&", "shop/db", "tcp/1", 1)]);
    let svg = desk.run("graph -o svg").done();
    assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;"), "{svg}");
    let dot = desk.run("graph -o dot").done();
    assert!(dot.contains(r#"a\"];evil[label=\"<script>"#), "{dot}");
    let mermaid = desk.run("graph -o mermaid").done();
    assert!(!mermaid.contains("<script>") && !mermaid.contains("];evil"), "{mermaid}");
}

#[test]
fn flows_have_a_verdict_and_a_reason_and_are_filtered() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let mut refused = flow("shop/worker", "shop/db", "tcp/5432", FlowOutcome::Denied);
    refused.reason = "no ingress rule of policy shop/db allows it".to_owned();
    node.handle.flow(flow("shop/web", "shop/db", "tcp/5432", FlowOutcome::Established));
    node.handle.flow(refused);
    node.handle.flow(flow("shop/web", "outside:192.0.2.7", "udp/53", FlowOutcome::WouldDeny));
    let lines = |words: &str| -> Vec<Value> { desk.run(words).done().lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    eventually(Duration::from_secs(60), || lines("flows -o json").len() == 3);
    let all = lines("flows -o json");
    assert_eq!((&all[0]["verdict"], &all[1]["verdict"], &all[2]["verdict"]), (&"allow".into(), &"deny".into(), &"wouldDeny".into()));
    assert_eq!(all[0]["reason"], "shop/web is not enforced; shop/db is not enforced");
    assert_eq!(all[1]["reason"], "no ingress rule of policy shop/db allows it");
    for (words, count) in [
        ("--verdict deny", 1),
        ("--verdict would-deny", 1),
        ("--from shop/web", 2),
        ("--from shop/", 3),
        ("--to outside:", 1),
        ("--to outside:192.0.2.0/24", 1),
        ("--port 5432", 2),
        ("--protocol udp", 1),
        ("--last 1", 1),
        ("--since 1h", 3),
        ("--from shop/db", 0),
    ] {
        assert_eq!(lines(&format!("flows -o json {words}")).len(), count, "{words}");
    }
    let table = desk.run("flows --verdict deny").done();
    assert!(table.contains("no ingress rule of policy shop/db allows it"), "{table}");
}

#[test]
fn flows_are_followed_live_and_a_closed_pipe_is_no_error() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let mut child = desk.command().args(["flows", "-f", "-o", "json", "--to", "shop/db"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // One that doesn't fit, then those that do.
    let mut sent = 0;
    let line = loop {
        sent += 1;
        assert!(sent < 100);
        node.handle.flow(flow("shop/db", "shop/web", "tcp/1", FlowOutcome::Established));
        node.handle.flow(flow("shop/web", "shop/db", "tcp/5432", FlowOutcome::Established));
        std::thread::sleep(Duration::from_millis(100));
        if sent == 3 {
            break lines.next().unwrap().unwrap();
        }
    };
    let seen: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&seen["to"], &seen["service"]), (&"shop/db".into(), &"tcp/5432".into()));
    drop(lines);
    node.handle.flow(flow("shop/web", "shop/db", "tcp/5432", FlowOutcome::Established));
    std::thread::sleep(Duration::from_millis(200));
    node.handle.flow(flow("shop/web", "shop/db", "tcp/5432", FlowOutcome::Established));
    assert!(child.wait().unwrap().success());
}

#[test]
fn explain_names_rule_evidence_and_what_the_engine_forbids() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/web");
    desk.approve("shop/db");
    desk.approve("shop/worker");
    desk.run("mode shop enforce --yes").done();
    let allowed = desk.run("explain shop/web shop/db tcp/5432").done();
    assert!(allowed.contains("shop/web -> shop/db tcp/5432: allow"), "{allowed}");
    assert!(allowed.contains("policy shop/db, ingress: shop/web tcp/5432") && allowed.contains("412 established"), "{allowed}");
    let denied = desk.run("explain shop/worker shop/db tcp/5432").done();
    assert!(denied.contains(": deny") && denied.contains("seen: never"), "{denied}");
    assert!(denied.contains("no ingress rule of policy shop/db allows it"), "{denied}");
    assert!(denied.contains("share no network: the engine isolates its networks"), "{denied}");
    let out = desk.run("explain shop/db outside:192.0.2.7 tcp/443").done();
    assert!(out.contains("only on internal networks: the engine lets nothing out"), "{out}");
    let from_outside = desk.run("explain outside:192.0.2.9 shop/db tcp/5432").done();
    assert!(from_outside.contains("tcp/5432 of shop/db is not published"), "{from_outside}");
    let published = desk.run("explain outside:192.0.2.7 shop/web tcp/80 -o json").json();
    assert_eq!(published["verdict"], "allow");
    assert_eq!(published["engine"][0], "reached from outside by the published port tcp/8080 at 0.0.0.0");
    assert!(desk.run("explain shop/web shop/nobody tcp/1").failed(4).contains("no workload shop/nobody"));
    assert!(desk.run("explain shop/web db tcp/1").failed(4).contains("Did you mean shop/db?"));
}

#[test]
fn status_never_claims_what_is_not_so() {
    let desk = Desk::new();
    let mut node = Node::with_shop(&desk);
    node.status.networks[0].state = NetworkState::NotEnforceable("br_netfilter is not loaded".to_owned());
    node.status.networks[1].state = NetworkState::Audited;
    node.status.alarms.push(Alarm { time: jiff::Timestamp::now(), text: "somebody flushed the ruleset; it is back".to_owned() });
    node.status.riders.push("curl (pid 7)".to_owned());
    node.status.unconfined.push("this kernel has no landlock".to_owned());
    node.status.blind.push("the event socket is closed".to_owned());
    let privileged = node.inventory.containers.values_mut().find(|c| c.workload.name() == "worker").unwrap();
    privileged.unmanaged.insert(policy::inventory::Unmanaged::Privileged);
    node.report();
    let view = desk.until("status -o json", |view| !view["unmanaged"].as_array().unwrap().is_empty());
    assert_eq!(find(&view["networks"], "name", "shop_front")["state"], "not enforceable");
    // Audit is never shown as enforced.
    assert_eq!(find(&view["networks"], "name", "shop_back")["state"], "audited");
    let text = desk.run("status").done();
    for said in [
        "br_netfilter is not loaded",
        "shop-worker-1 (shop/worker) on node1: runs privileged",
        "somebody flushed the ruleset",
        "curl (pid 7)",
        "not confined: this kernel has no landlock",
        "the event socket is closed",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    node.stop();
    desk.until("status -o json", |view| view["nodes"][0]["connected"] == false);
    assert!(desk.run("status").done().contains("No agent of node1 is connected"));
}

#[test]
fn metrics_are_served_where_they_are_asked_for() {
    use std::io::{Read, Write};
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let desk = Desk::started(&["--metrics", &free.to_string()]);
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let scrape = || {
        let mut stream = std::net::TcpStream::connect(free).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    };
    eventually(Duration::from_secs(60), || scrape().contains("bulkhead_edges 3"));
    assert!(scrape().contains("bulkhead_node_connected{node=\"node1\"} 1"), "{}", scrape());
}
