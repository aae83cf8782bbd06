//! `-o yaml` is plain YAML: what any reader can read, not only one that knows our types.

use policy::FlowOutcome;
use policy::status::NetworkState;

use crate::desk::{Desk, Node, denied, flow, usual};

/// A tag stands where a value begins: behind a key, behind the dash of a list, at the beginning of a document.
fn is_tagged(line: &str) -> bool {
    let line = line.trim_start_matches([' ', '-']);
    line.starts_with('!') || line.contains(": !")
}

#[test]
fn no_output_as_yaml_holds_a_tag() {
    let desk = Desk::new();
    let mut node = Node::with_shop(&desk);
    node.status.networks[1].state = NetworkState::NotEnforceable("bridge filtering is missing".to_owned());
    node.report();
    node.saw(&desk, &usual());
    node.saw(&desk, &[denied("shop/worker", "shop/db", "tcp/5432", true, 3)]);
    node.handle.flow(flow("shop/web", "shop/db", "tcp/5432", FlowOutcome::Established));
    desk.run("segment add --segment mixed project:shop network:shop_front workload:shop/db").done();
    desk.approve("shop/db");
    desk.run("allow shop/worker outside:192.0.2.0/24 tcp/443 --for 2h").done();
    desk.run("quarantine shop/worker --comment because").done();
    let never = "apiVersion: bulkhead.dev/v1alpha1\nkind: Guardrail\nmetadata:\n  name: never\nspec:\n  from:\n    anyOf: [\"project:shop\"]\n  to:\n    anyOf: [\"project:dev\"]\n";
    desk.args(&["apply", "-f", &desk.file("never.yaml", never)]).done();
    desk.until("status -o json", |status| status["networks"].to_string().contains("not enforceable"));
    crate::desk::eventually(std::time::Duration::from_secs(10), || !desk.run("flows -o yaml").done().is_empty());
    for words in [
        "graph",
        "flows",
        "audit",
        "status",
        "version",
        "segment list",
        "diff shop/web",
        "explain shop/web shop/db tcp/5432",
        "describe suggestion shop/web",
        "describe workload shop/db",
        "get suggestions",
        "get policies",
        "get segments",
        "get workloads",
        "get networks",
        "get decisions",
        "get quarantines",
        "get guardrails",
    ] {
        let text = desk.run(&format!("{words} -o yaml")).done();
        assert!(!text.trim().is_empty(), "{words} says nothing");
        let tagged: Vec<&str> = text.lines().filter(|line| is_tagged(line)).collect();
        assert!(tagged.is_empty(), "{words}: {tagged:#?}");
    }
    // The same as JSON says: not only without tags.
    let yaml: serde_json::Value = serde_norway::from_str(&desk.run("get networks -o yaml").done()).unwrap();
    assert_eq!(yaml, desk.run("get networks -o json").json());
}
