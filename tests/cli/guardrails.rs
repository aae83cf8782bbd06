//! Guardrails: written as documents, they keep a rule from every way into force, and say what was there before them.

use policy::Workload;

use crate::desk::{Desk, Node, edge, usual};

fn guardrail(name: &str, from: &str, to: &str) -> String {
    format!(
        "apiVersion: bulkhead.dev/v1alpha1\nkind: Guardrail\nmetadata:\n  name: {name}\nspec:\n  from:\n    anyOf: [\"{from}\"]\n  to:\n    anyOf: [\"{to}\"]\n  reason: audit 7.2\n"
    )
}

/// The shop with its traffic, and nobody from outside may reach it.
fn guarded() -> (Desk, Node) {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let file = desk.file("never.yaml", &guardrail("nobody-in", "outside:0.0.0.0/0", "project:shop"));
    let said = desk.args(&["apply", "-f", &file]).done();
    assert!(said.contains("guardrail nobody-in: new") && said.contains("Recorded as decision 1"), "{said}");
    (desk, node)
}

fn in_force(node: &Node, generation: u64, workload: &str) -> Vec<String> {
    let set = node.plan(generation).set;
    set.policies[&workload.parse::<Workload>().unwrap()].ingress.iter().map(ToString::to_string).collect()
}

#[test]
fn a_guardrail_is_kept_shown_exported_and_taken_out() {
    let (mut desk, node) = guarded();
    assert!(node.plan(1).set.guardrails.is_empty(), "a node has nothing to do with it");
    desk.end(nix::sys::signal::Signal::SIGKILL);
    desk.start();
    let list = desk.run("get guardrails").done();
    assert!(list.contains("nobody-in") && list.contains("outside:0.0.0.0/0") && list.contains("audit 7.2"), "{list}");
    let shown = desk.run("describe guardrail nobody-in").done();
    assert!(shown.contains("project:shop") && !shown.contains("In force from before"), "{shown}");
    desk.run("get guardrail other").failed(4);
    desk.run("describe guardrail other").failed(4);
    let exported = desk.run("export").done();
    assert!(exported.contains("kind: Guardrail"), "{exported}");
    let file = desk.file("all.yaml", &exported);
    assert!(desk.args(&["apply", "-f", &file]).done().contains("Nothing is different"));
    assert_eq!(desk.run("get guardrails -o yaml").done(), exported.trim_start_matches("---\n"));

    let said = desk.run("delete guardrail nobody-in --comment thought-better").done();
    assert!(said.contains("is gone") && said.contains("Recorded as decision 2"), "{said}");
    desk.run("delete guardrail nobody-in").failed(4);
    assert!(!desk.run("export").done().contains("Guardrail"));
    let decisions = desk.run("get decisions -o json").json();
    assert_eq!((&decisions[1]["action"], &decisions[1]["comment"]), (&"delete".into(), &"thought-better".into()));
    desk.approve("shop/web");
}

#[test]
fn no_road_into_force_leads_past_a_guardrail() {
    let (desk, node) = guarded();
    let shown = desk.run("describe suggestion shop/web").done();
    assert!(shown.contains("blocking breaks-guardrail") && shown.contains("guardrail nobody-in (audit 7.2)"), "{shown}");
    let list = desk.run("get suggestions").done();
    assert!(list.contains("1 blocking"), "{list}");

    let policy = "apiVersion: bulkhead.dev/v1alpha1\nkind: WorkloadPolicy\nmetadata:\n  name: web\n  namespace: shop\nspec:\n  ingress:\n    - peer: outside:192.0.2.7\n      ports: tcp/80\n";
    let by_hand = desk.file("web.yaml", policy);
    let suggestion = desk.run("describe suggestion shop/web -o json").json();
    let forbidden = suggestion["rules"].as_array().unwrap().iter().find(|rule| rule["rule"]["peer"] == "outside:192.0.2.7").unwrap();
    let forbidden = forbidden["id"].as_str().unwrap();
    for words in [
        "approve shop/web",
        "approve shop/web --accept breaks-guardrail",
        &format!("approve shop/web --rule {forbidden}"),
        "allow outside:192.0.2.7 shop/web tcp/80",
        "allow outside:192.0.2.7 shop/web tcp/80 --for 1h",
        &format!("apply -f {by_hand}"),
        &format!("apply --dry-run -f {by_hand}"),
    ] {
        let error = desk.run(words).failed(3);
        assert!(error.contains("guardrail nobody-in forbids it (audit 7.2)"), "{words}: {error}");
    }
    assert_eq!(node.generations(), [1], "nothing but the guardrail was decided");

    // Rejected, it is left out of the whole; what was read is still good.
    desk.run(&format!("reject shop/web --rule {forbidden}")).done();
    desk.run("approve shop/web").done();
    assert_eq!(in_force(&node, 2, "shop/web"), ["shop/worker tcp/80"]);
}

#[test]
fn an_editor_and_an_earlier_revision_do_not_lead_past_it_either() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/web");
    // The policy of before is taken out, then the guardrail comes: going back would bring the rule again.
    let script = desk.file("editor", "sed -i '/outside:192.0.2.7/,+1d' \"$1\"\n");
    let edit = |script: &str| crate::desk::ran(desk.command().env("EDITOR", format!("sh {script}")).args(["edit", "shop/web"]));
    edit(&script).done();
    let file = desk.file("never.yaml", &guardrail("nobody-in", "outside:0.0.0.0/0", "project:shop"));
    desk.args(&["apply", "-f", &file]).done();
    let error = desk.run("revert shop/web --to 1").failed(3);
    assert!(error.contains("guardrail nobody-in forbids it"), "{error}");
    let script = desk.file("editor", "sed -i 's/peer: shop\\/worker/peer: outside:192.0.2.7/' \"$1\"\n");
    let error = edit(&script).failed(3);
    assert!(error.contains("guardrail nobody-in forbids it") && error.contains("Your text is kept in"), "{error}");
    let kept = error.split("Your text is kept in ").nth(1).unwrap().trim().trim_end_matches('.');
    std::fs::remove_file(kept).unwrap();
}

#[test]
fn what_is_in_force_when_a_guardrail_comes_is_listed_and_not_cut() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    desk.approve("shop/web");
    let before = in_force(&node, 1, "shop/web");
    let file = desk.file("never.yaml", &guardrail("nobody-in", "outside:0.0.0.0/0", "project:shop"));
    let said = desk.args(&["apply", "-f", &file]).done();
    assert!(said.contains("In force from before") && said.contains("outside:192.0.2.7 tcp/80: guardrail nobody-in forbids it"), "{said}");
    assert_eq!(in_force(&node, 2, "shop/web"), before, "nothing is cut");
    for words in ["status", "describe guardrail nobody-in"] {
        let said = desk.run(words).done();
        assert!(said.contains("n force from before") && said.contains("outside:192.0.2.7 tcp/80"), "{words}: {said}");
    }
    assert!(desk.run("get guardrails").done().contains("1 rule in force"));
    assert!(desk.run("describe suggestion shop/web").done().contains("in-force-breaks-guardrail"));
    // New traffic of the same workload can still be approved.
    node.saw(&desk, &[edge("shop/web", "shop/worker", "tcp/9000", 5)]);
    desk.approve("shop/web");
}

#[test]
fn a_guardrail_that_is_not_understood_is_told_what_one_looks_like() {
    let desk = Desk::new();
    let file = desk.file("never.yaml", &guardrail("nobody-in", "outside:0.0.0.0/0", "project:shop").replace("anyOf", "anyof"));
    let error = desk.args(&["apply", "-f", &file]).failed(2);
    assert!(error.contains("crds/README.md shows what a Guardrail looks like") && !error.contains("get policies"), "{error}");
    let file = desk.file("other.yaml", "apiVersion: bulkhead.dev/v1alpha1\nkind: Wall\n");
    assert!(desk.args(&["apply", "-f", &file]).failed(2).contains("one of each kind"));
}
