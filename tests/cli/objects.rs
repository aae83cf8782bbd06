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
fn a_mistyped_policy_is_remarked_and_can_be_taken_out_while_its_segment_enforces() {
    let desk = Desk::new();
    let node = Node::with_shop(&desk);
    node.saw(&desk, &usual());
    for workload in ["shop/web", "shop/db", "shop/worker"] {
        desk.approve(workload);
    }
    desk.run("mode shop enforce --yes").done();
    let right = desk.run("get policies shop/db -o yaml").done();
    let file = desk.file("mistyped.yaml", &right.replace("db\n", "dbb\n"));
    for words in [&["apply", "--dry-run", "-f", &file][..], &["apply", "-f", &file]] {
        let said = desk.args(words).done();
        for words in ["no workload shop/dbb was ever seen here", "bulkhead revert shop/dbb --to 0", "Did you mean shop/db?"] {
            assert!(said.contains(words), "{words}: {said}");
        }
    }
    let said = desk.run("revert shop/dbb --to 0").done();
    assert!(said.contains("should one of that name come, all of its traffic is denied"), "{said}");
    desk.run("get policies shop/dbb").failed(4);
    // One that runs would lose all of its traffic.
    let error = desk.run("revert shop/db --to 0 --yes").failed(3);
    assert!(error.contains("shop/db is in Enforce"), "{error}");
    let again = desk.file("right.yaml", &right.replace("tcp/5432", "tcp/5432-5433"));
    assert!(!desk.args(&["apply", "-f", &again]).done().contains("was ever seen"), "it runs");
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
fn a_folder_of_an_export_is_applied_as_one_decision() {
    let (desk, _node) = furnished();
    let folder = desk.path("out");
    let folder = folder.to_str().unwrap();
    desk.args(&["export", "-d", folder]).done();
    let other = Desk::new();
    other.args(&["apply", "-f", folder]).done();
    assert_eq!(other.run("export").done(), desk.run("export").done());
    assert_eq!(other.run("get decisions -o json").json().as_array().unwrap().len(), 1);
    // JSON too; what is neither is not looked at, nor are folders in it.
    desk.file("out/notes.txt", "not a document");
    desk.file("out/none.yml", "# nothing\n");
    std::fs::create_dir(desk.path("out/more.yaml")).unwrap();
    desk.file("out/zz.json", &desk.run("get guardrails -o json").done());
    assert!(desk.args(&["apply", "-f", folder]).done().contains("Nothing is different"));
}

#[test]
fn an_error_in_a_folder_names_the_file_and_nothing_is_changed() {
    let (desk, node) = furnished();
    let before = node.generations();
    std::fs::create_dir(desk.path("in")).unwrap();
    let folder = desk.path("in");
    let folder = folder.to_str().unwrap();
    let apply = || desk.args(&["apply", "-f", folder]).failed(2);
    let error = apply();
    assert!(error.contains("no .yaml, .yml or .json file") && error.contains("export -d"), "{error}");
    let policy = desk.run("get policies shop/db -o yaml").done();
    desk.file("in/1.yaml", &policy.replace("tcp/5432", "tcp/5433"));
    desk.file("in/2.yaml", &policy.replace("tcp/5432", "tcp/99999"));
    let error = apply();
    assert!(error.contains("in/2.yaml: line") && error.contains("tcp/99999"), "{error}");
    desk.file("in/2.yaml", &policy);
    let error = apply();
    assert!(error.contains("in/2.yaml: WorkloadPolicy shop/db is in") && error.contains("in/1.yaml too"), "{error}");
    assert_eq!(node.generations(), before);
    let error = desk.args(&["apply", "-f", "/nowhere"]).failed(1);
    assert!(error.contains("/nowhere") && error.contains("Name a file or a folder"), "{error}");
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
