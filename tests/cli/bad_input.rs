//! Bad input of every kind: a clear error that says where and what to do, the documented exit code, nothing lost, nothing wider.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;

use crate::desk::{Desk, Node, usual};

#[test]
fn the_command_line_says_what_it_does_not_understand() {
    let desk = Desk::empty();
    for (words, said) in [
        ("", "Usage"),
        ("nonsense", "unrecognized subcommand"),
        ("graph -o pdf", "possible values"),
        ("graph --since yesterday", "neither a time span"),
        ("flows --port 0", "0 is not in 1..=65535"),
        ("flows --port 70000", "70000 is not in"),
        ("flows --protocol quic", "is not a port"),
        ("allow shop/a shop/b 5432", "write PROTOCOL/PORT"),
        ("allow shop/a shop/b tcp/70000", "write PROTOCOL/PORT"),
        ("allow shop/a shop/b tcp/10-5", "write PROTOCOL/PORT"),
        ("allow shop/a outside:10.0.0.5/8 tcp/1", "is not a peer"),
        ("allow shop/a shop/b tcp/1 --for never", "is not a time span"),
        ("mode shop on", "write learn, audit or enforce"),
        ("explain a/b/c shop/db tcp/1", "is not an endpoint"),
        ("quarantine a:b", "is not a workload"),
        ("export --format cilium", "possible values"),
        ("approve", "required"),
        ("up --node=", "a value is required"),
    ] {
        let ran = desk.run(words);
        assert!(ran.err.contains(said), "{words}: {}", ran.err);
        assert_eq!(ran.code, 2, "{words}");
    }
}

#[test]
fn help_has_examples_and_the_exit_codes() {
    let desk = Desk::empty();
    let help = desk.run("--help").done();
    assert!(help.contains("Exit codes:") && help.contains("5  the controller cannot be reached"), "{help}");
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<&str> = listed.filter(|line| !line.starts_with("    ")).filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 20, "{commands:?}");
    for command in commands.into_iter().filter(|command| !["help", "version"].contains(command)) {
        let help = desk.run(&format!("{command} --help")).done();
        assert!(help.contains("Example"), "{command}");
        // What this command alone takes stands above what every command takes.
        assert!(help.find("--help").unwrap() < help.find("--state-dir").unwrap(), "{help}");
    }
    assert!(desk.run("completions bash").done().contains("bulkhead"));
}

#[test]
fn no_controller_is_exit_code_5_with_the_next_step() {
    let mut desk = Desk::new();
    assert_eq!(desk.end(Signal::SIGTERM), Some(0));
    for words in ["graph", "get suggestions", "mode shop audit", "approve shop/db --digest 00000000", "flows -f"] {
        let error = desk.run(words).failed(5);
        assert!(error.contains("cannot reach the controller") && error.contains("sudo bulkhead up"), "{error}");
    }
    assert!(desk.run("version").done().contains("not reached"));
    assert!(!crate::desk::exists(&desk.path("run/api.sock")), "sockets are removed at a graceful end");
    assert!(!crate::desk::exists(&desk.path("run/node.sock")));
    // Killed, it leaves them: nobody answers there, and the next one takes their place.
    desk.start();
    desk.end(Signal::SIGKILL);
    desk.run("graph").failed(5);
    desk.start();
    desk.run("graph").done();
}

#[test]
fn a_second_controller_is_refused_and_the_first_stays() {
    let desk = Desk::new();
    let error = desk.run("controller").failed(1);
    assert!(error.contains("only one controller may work on a store"), "{error}");
    desk.run("status").done();
}

#[test]
fn a_store_that_is_cut_in_half_is_refused_and_left_alone() {
    let mut desk = Desk::new();
    desk.run("segment add project:shop").done();
    desk.end(Signal::SIGTERM);
    let path = desk.path("state/controller/store.db");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = desk.run("controller").failed(1);
    assert!(error.contains("store.db") && error.contains("damaged"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap().len(), whole.len() / 2);
    std::fs::write(&path, &whole).unwrap();
    desk.start();
    assert!(desk.run("segment list").done().contains("project shop"));
}

#[test]
fn a_bad_document_says_where_and_changes_nothing() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/db");
    let good = desk.run("get policies shop/db -o yaml").done();
    let rows: &[(&str, String, &str)] = &[
        ("malformed", format!("{good}  : : {{\n"), "line"),
        ("unknown field", good.replace("  ingress:", "  ingres:"), "ingres"),
        ("unknown kind", good.replace("WorkloadPolicy", "WorkloadPolice"), "WorkloadPolice"),
        ("other group", good.replace("bulkhead.dev/v1alpha1", "bulkhead.dev/v9"), "v9"),
        ("impossible port", good.replace("tcp/5432", "tcp/99999"), "tcp/99999"),
        ("host bits", good.replace("peer: shop/web", "peer: outside:10.0.0.5/8"), "10.0.0.5/8"),
        ("twice", format!("{good}---\n{good}"), "shop/db"),
        ("other name", good.replace("name: db", "name: web"), "db"),
        ("empty", String::new(), "no object"),
        ("binary", "\u{0}\u{1}".to_owned(), ""),
    ];
    for (name, text, said) in rows {
        let file = desk.file("bad.yaml", text);
        let error = desk.args(&["apply", "-f", &file]).failed(2);
        assert!(error.contains("bad.yaml") && error.contains(said), "{name}: {error}");
    }
    desk.args(&["apply", "-f", "/nowhere/file.yaml"]).failed(1);
    assert_eq!(desk.run("get policies shop/db -o yaml").done(), good);
    assert_eq!(node.generations(), [1]);
}

#[test]
fn an_apply_that_would_deny_everything_does_not_say_success() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.run("segment add shop").done();
    let yaml = desk.run("get segments shop -o yaml").done().replace("mode: Learn", "mode: Enforce");
    let file = desk.file("segment.yaml", &yaml);
    let error = desk.args(&["apply", "-f", &file]).failed(3);
    assert!(error.contains("without an approved policy") && error.contains("shop/db"), "{error}");
    // With policies for all, it says which of the seen edges it denies.
    for workload in ["shop/web", "shop/db", "shop/worker"] {
        desk.args(&["allow", workload, "outside:192.0.2.1", "tcp/1"]).done();
    }
    let said = desk.args(&["apply", "-f", &file, "--dry-run"]).done();
    assert!(said.contains("would be denied") && said.contains("shop/web -> shop/db tcp/5432"), "{said}");
}

#[test]
fn unknown_names_are_exit_code_4_with_what_is_known() {
    let desk = Desk::new();
    let _node = Node::with_shop(&desk);
    for words in [
        "describe suggestion shop/nobody",
        "describe workload shop/nobody",
        "describe segment nothing",
        "describe network nothing",
        "describe decision 99",
        "describe policy shop/db",
        "get suggestions shop/nobody",
        "get policies shop/nobody -o yaml",
        "get workloads shop/nobody",
        "flows --from shop/nobody",
        "flows -f --to nobody/",
        "diff shop/nobody",
        "mode nothing audit",
        "audit --segment nothing",
        "edit shop/nobody",
    ] {
        let ran = desk.run(words);
        assert_eq!(ran.code, 4, "{words}: {}{}", ran.out, ran.err);
        assert!(ran.err.lines().count() >= 2, "{words} tells the next step: {}", ran.err);
    }
}

#[test]
fn a_usage_line_asks_for_no_more_than_is_needed() {
    // The desk names both folders by the environment.
    let error = Desk::empty().run("approve").failed(2);
    assert!(error.contains("Usage: bulkhead approve <WORKLOAD>") && !error.contains("--state-dir <DIR>"), "{error}");
}

#[test]
fn a_slip_in_a_name_is_asked_about() {
    let desk = Desk::new();
    let _node = Node::with_shop(&desk);
    for words in ["describe suggestion shop/wroker", "flows --from shop/wroker", "graph --workload shop/wrker"] {
        let error = desk.run(words).failed(4);
        assert!(error.contains("Did you mean shop/worker?"), "{words}: {error}");
    }
    for end in ["shop/web", "shop/", "web", "host:", "outside:", "outside:192.0.2.0/24", "unknown:"] {
        desk.args(&["flows", "--from", end]).done();
    }
}

/// What a client that is not ours may send.
fn raw(desk: &Desk, request: &str) -> String {
    let mut stream = UnixStream::connect(desk.path("run/api.sock")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn the_api_refuses_what_it_does_not_know() {
    let desk = Desk::new();
    let post = |path: &str, body: &str| {
        let length = body.len();
        raw(
            &desk,
            &format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            ),
        )
    };
    let get = |path: &str| raw(&desk, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"));
    let unknown = post("/api/v1/mode", r#"{"segment":"shop","mode":"Audit","sneaky":true}"#);
    assert!(unknown.starts_with("HTTP/1.1 400") && unknown.contains("sneaky"), "{unknown}");
    let malformed = post("/api/v1/mode", "{");
    assert!(malformed.starts_with("HTTP/1.1 400") && malformed.contains("\"code\":\"invalid\""), "{malformed}");
    // Enforce without the forecast it confirms is a forecast; a confirmation of another generation is refused.
    let stale = post("/api/v1/mode", r#"{"segment":"shop","mode":"Enforce","confirm":7}"#);
    assert!(stale.starts_with("HTTP/1.1 4"), "{stale}");
    let nowhere = get("/api/v1/nowhere");
    assert!(nowhere.starts_with("HTTP/1.1 404") && nowhere.contains("\"code\":\"not-found\""), "{nowhere}");
    let field = get("/api/v1/graph?color=red");
    assert!(field.starts_with("HTTP/1.1 400") && field.contains("color"), "{field}");
    assert!(raw(&desk, "garbage\r\n\r\n").starts_with("HTTP/1.1 400"));
    desk.run("status").done();
}

#[test]
fn the_command_line_starts_within_ten_milliseconds() {
    let desk = Desk::empty();
    let fastest = (0..10)
        .map(|_| {
            let began = std::time::Instant::now();
            desk.run("--version").done();
            began.elapsed()
        })
        .min();
    // Unoptimized and on a busy machine; the budget of the release build is 10 ms.
    assert!(fastest.is_some_and(|fastest| fastest < std::time::Duration::from_millis(30)), "{fastest:?}");
}

#[test]
fn a_document_of_megabytes_is_applied_and_one_beyond_the_bound_is_told_so() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    let rules: String = (0..40_000_u32)
        .map(|n| format!("    - peer: outside:{}\n      ports: tcp/443\n", std::net::Ipv4Addr::from(0x0a00_0000 + n)))
        .collect();
    let text = format!("{API}kind: WorkloadPolicy\nmetadata:\n  name: db\n  namespace: shop\nspec:\n  ingress: []\n  egress:\n{rules}");
    assert!(text.len() > 2 << 20);
    let file = desk.file("large.yaml", &text);
    desk.args(&["apply", "-f", &file]).done();
    assert_eq!(node.plan(1).set.policies.values().next().unwrap().egress.len(), 40_000);
    let file = desk.file("larger.yaml", &"# nothing\n".repeat(7_000_000));
    let error = desk.args(&["apply", "-f", &file]).failed(2);
    assert!(error.contains("takes 64 MB at once") && error.contains("parts"), "{error}");
}

const API: &str = "apiVersion: bulkhead.dev/v1alpha1\n";
