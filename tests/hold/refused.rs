//! A plan that the kernel refuses and takes later.

use std::time::Duration;

use lab::{Host, eventually, limit};
use node_agent::enforce::{Enforcer, Nftables, Ownership};
use policy::Ruleset;

use crate::stage::{PATIENCE, enforce, engine, network, run};

#[test]
fn what_the_kernel_refused_is_told_to_be_in_force_once_it_was_taken() {
    let _limit = limit(Duration::from_secs(300));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    network(&engine, "back", 1);
    for name in ["web", "db"] {
        run(&engine, name, "back", &[]);
    }
    let host = Host::on(&engine);
    let _up = host.up();
    let mut another = engine.netns.run(|| Nftables::open().expect("root"));
    if another.apply(&Ruleset::default()).expect("nobody has these tables").ownership == Ownership::Shared {
        lab::skip!("this kernel knows no owned tables");
    }
    enforce(&host, "back", &["web", "db"]);
    eventually(PATIENCE, || host.is_connected(|status| status.contains("belongs to another process") && !status.contains("plan in force")));
    another.remove().expect("our own");
    eventually(PATIENCE, || host.is_in_force());
    let status = host.bulkhead(["status"]);
    assert!(!status.contains("plan refused"), "nothing of the refusal is left but the alarm: {status}");
}
