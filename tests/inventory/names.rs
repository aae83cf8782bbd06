//! Which workload a container is.

use lab::{Compose, Engine};
use policy::{Endpoint, Workload};

use crate::on_every_engine;
use crate::watching::{Watching, named};

#[test]
fn a_compose_service_its_one_off_run_and_its_sidecar_have_their_names() {
    on_every_engine!(|engine: Engine| {
        let file = engine.dir.join("compose.yaml");
        std::fs::write(
            &file,
            "services:\n  db: {image: bb}\n  web: {image: bb, ports: ['127.0.0.1:8081:80']}\n  sidecar: {image: bb, network_mode: 'service:web'}\n",
        )
        .unwrap();
        let compose = lab::or_skip!(Compose::new(&engine, "shop", &[&file]));
        let watching = Watching::start(&engine);
        compose.up();
        let of = |service: &str| {
            let wanted = Workload::new("shop", service);
            watching.until(service, |now| {
                now.inventory.containers.values().find(|c| c.workload == wanted && !c.one_off && c.pid.is_some()).cloned()
            })
        };
        let db = of("db");
        assert!(!db.engine_named);
        let network = &watching.now().inventory.networks[&db.legs[0].network];
        assert_eq!(network.project.as_deref(), Some("shop"));
        let sidecar = engine.docker(["ps", "--format", "{{.Names}}", "--filter", "label=com.docker.compose.service=sidecar"]);
        watching.until("the sidecar among the members", |now| {
            let web = now.inventory.containers.values().find(|c| c.workload.name() == "web")?;
            (web.members == [sidecar.clone()]).then_some(())
        });
        assert!(named(&watching.now(), &sidecar).is_none(), "it has no place of its own");
        compose.run(&["run", "-d", "--name", "once", "db", "sleep", "1000"]);
        let once = watching.settled("once");
        assert_eq!(once.endpoint(), Endpoint::Run(Workload::new("shop", "db")));
    });
}

#[test]
fn a_shared_namespace_is_one_endpoint_that_lists_who_is_in_it() {
    on_every_engine!(|engine: Engine| {
        engine.docker(["network", "create", "front"]);
        let watching = Watching::start(&engine);
        engine.docker(["run", "-d", "--name", "app", "--network", "front", "bb"]);
        engine.docker(["run", "-d", "--name", "debug", "--network", "container:app", "--cap-add", "NET_ADMIN", "bb"]);
        let app = watching.until("the member", |now| named(now, "app").filter(|c| !c.unmanaged.is_empty()).cloned());
        assert_eq!(app.members, ["debug"]);
        assert_eq!(app.unmanaged.iter().map(ToString::to_string).collect::<Vec<_>>(), ["has the capability NET_ADMIN"]);
        engine.docker(["rm", "-f", "debug"]);
        watching
            .until("the member to be gone", |now| named(now, "app").filter(|c| c.members.is_empty() && c.unmanaged.is_empty()).map(|_| ()));
    });
}

#[test]
fn a_rename_ends_the_old_name_and_begins_the_new() {
    on_every_engine!(|engine: Engine| {
        engine.docker(["network", "create", "front"]);
        let bridge = engine.bridge("front");
        let watching = Watching::start(&engine);
        engine.docker(["run", "-d", "--name", "before", "--network", "front", "bb"]);
        let address = crate::watching::v4(&watching.settled("before"), &bridge);
        let then = jiff::Timestamp::now();
        engine.docker(["rename", "before", "after"]);
        watching.settled("after");
        assert_eq!(watching.holder(&bridge, address, then).as_deref(), Some("before"));
        assert_eq!(watching.holder(&bridge, address, jiff::Timestamp::now()).as_deref(), Some("after"));
    });
}

#[test]
fn labels_arrive_as_they_are_whatever_they_hold() {
    on_every_engine!(|engine: Engine| {
        let watching = Watching::start(&engine);
        let odd =
            [("a", "b=c,d"), ("json", "{\"x\":[1,2]}"), ("empty", ""), ("name", "not-my-name"), ("container", "x"), ("spaces", " a b ")];
        let flags: Vec<String> = odd.iter().flat_map(|(key, value)| ["--label".to_owned(), format!("{key}={value}")]).collect();
        let run = ["run", "-d", "--name", "odd"].map(str::to_owned);
        engine.docker(run.into_iter().chain(flags).chain(["bb".to_owned()]));
        let found = watching.settled("odd");
        for (key, value) in odd {
            assert_eq!(found.labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert_eq!(found.workload.to_string(), "odd");
    });
}

#[test]
fn a_label_names_a_workload_and_a_nonsensical_one_is_told() {
    on_every_engine!(|engine: Engine| {
        let watching = Watching::start(&engine);
        engine.docker(["run", "-d", "--label", "bulkhead.dev/workload=billing/ledger", "--name", "one", "bb"]);
        engine.docker(["run", "-d", "--label", "bulkhead.dev/workload=a/b/c", "--name", "two", "bb"]);
        assert_eq!(watching.settled("one").workload, Workload::new("billing", "ledger"));
        assert_eq!(watching.settled("two").workload, Workload::new("", "two"));
        let now = watching.now();
        assert!(now.blind.is_empty());
        assert!(now.notes.iter().any(|note| note.contains("two") && note.contains("a/b/c")), "{:?}", now.notes);
    });
}

#[test]
fn a_container_that_nobody_named_is_known_for_it() {
    on_every_engine!(|engine: Engine| {
        let watching = Watching::start(&engine);
        let id = engine.docker(["run", "-d", "bb"]);
        let found = watching.until("the container", |now| now.inventory.containers.get(&id).cloned());
        assert!(found.engine_named, "{}", found.name);
    });
}
