//! Objects out and in again: export, apply, lossless.

use crate::desk::{Desk, Node, usual};

fn furnished() -> (Desk, Node) {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    for workload in ["shop/web", "shop/db", "shop/worker"] {
        desk.approve(workload);
    }
    desk.run("mode shop audit").done();
    desk.run("allow shop/worker outside:2001:db8::/32 udp/8000-8010 --for 2d").done();
    desk.run("quarantine shop/worker --comment because").done();
    node.plan(6);
    (desk, node)
}

#[test]
fn an_export_is_read_back_without_loss() {
    let (desk, node) = furnished();
    let exported = desk.run("export").done();
    assert_eq!(exported.matches("kind: WorkloadPolicy").count(), 3, "{exported}");
    let file = desk.file("all.yaml", &exported);
    // Onto itself: nothing is different, nothing is written.
    let generation = desk.run("status -o json").json()["generation"].clone();
    assert!(desk.args(&["apply", "-f", &file]).done().contains("Nothing is different"));
    assert_eq!(desk.run("status -o json").json()["generation"], generation);
    assert_eq!(node.generations().len(), 6);
    // Into an empty store: the same objects come out.
    let other = Desk::new();
    other.args(&["apply", "-f", &file]).done();
    assert_eq!(other.run("export").done(), exported);
    // As JSON the same documents.
    let json = desk.run("export --format json").done();
    let file = desk.file("all.json", &json);
    assert!(desk.args(&["apply", "-f", &file]).done().contains("Nothing is different"));
    let list = desk.file("list.json", &desk.run("get policies -o json").done());
    assert!(desk.args(&["apply", "-f", &list]).done().contains("Nothing is different"));
    // A key that stands twice means neither.
    let twice = desk.file("twice.json", &json.replacen("\"mode\": \"Audit\"", "\"mode\": \"Learn\", \"mode\": \"Audit\"", 1));
    let error = desk.args(&["apply", "-f", &twice]).failed(2);
    assert!(error.contains("mode"), "{error}");
}

#[test]
fn an_export_goes_into_one_file_an_object() {
    let (desk, _node) = furnished();
    let folder = desk.path("out");
    let said = desk.args(&["export", "-d", folder.to_str().unwrap()]).done();
    assert!(said.contains("5 files written"), "{said}");
    for file in std::fs::read_dir(&folder).unwrap() {
        let file = file.unwrap().path();
        assert!(desk.args(&["apply", "--dry-run", "-f", file.to_str().unwrap()]).done().contains("Nothing is different"));
    }
}

#[test]
fn network_policies_say_what_they_cannot_say() {
    let (desk, _node) = furnished();
    desk.run("release shop/worker").done();
    let text = desk.run("export --format networkpolicy").done();
    assert_eq!(text.matches("kind: NetworkPolicy").count(), 3, "{text}");
    assert!(text.contains("# policy shop/worker, egress: outside:2001:db8::/32 udp/8000-8010"), "{text}");
    desk.run("export --format networkpolicy --pods nonsense").failed(2);
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let (desk, node) = furnished();
    let before = node.generations();
    let yaml = desk.run("get policies shop/db -o yaml").done().replace("tcp/5432", "tcp/5433");
    let file = desk.file("db.yaml", &yaml);
    let said = desk.args(&["apply", "--dry-run", "-f", &file]).done();
    assert!(
        said.contains("policy shop/db: - ingress shop/web tcp/5432") && said.contains("policy shop/db: + ingress shop/web tcp/5433"),
        "{said}"
    );
    assert_eq!(node.generations(), before);
    desk.args(&["apply", "-f", &file, "--comment", "moved"]).done();
    assert!(desk.run("describe policy shop/db").done().contains("tcp/5433"));
}

#[test]
fn a_review_as_an_object_is_the_same_decision() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    let digest = desk.run("describe suggestion shop/db -o json").json()["digest"].as_str().unwrap().to_owned();
    let review = |digest: &str| {
        format!(
            "apiVersion: bulkhead.dev/v1alpha1\nkind: PolicyReview\nmetadata:\n  name: db-1\n  namespace: shop\nspec:\n  workload: shop/db\n  digest: {digest}\n  decision: Approved\n  comment: by file\n"
        )
    };
    let moved = desk.file("moved.yaml", &review(&"0".repeat(64)));
    desk.args(&["apply", "-f", &moved]).failed(3);
    let good = desk.file("good.yaml", &review(&digest));
    desk.args(&["apply", "-f", &good]).done();
    let decisions = desk.run("get decisions -o json").json();
    assert_eq!(
        (&decisions[0]["action"], &decisions[0]["comment"], &decisions[0]["digest"]),
        (&"approve".into(), &"by file".into(), &digest.into())
    );
}
