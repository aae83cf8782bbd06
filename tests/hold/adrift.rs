//! A port that cannot be tied to its MAC address: said, tried again, and tied once it can be.

use std::process::Command;
use std::time::Duration;

use lab::{Host, eventually, limit};

use crate::stage::{PATIENCE, enforce, engine, network, run};

const MAC: &str = "02:42:0a:42:01:77";

#[test]
fn a_port_that_cannot_be_tied_to_its_mac_address_is_an_alarm_and_is_tied_once_it_can_be() {
    let _limit = limit(Duration::from_secs(300));
    let (engine, _internet) = lab::or_skip!(engine(&[]));
    let _up = Host::on(&engine).up();
    let host = Host::prepared(&engine);
    network(&engine, "back", 1);
    run(&engine, "one", "back", &["--mac-address", "02:42:0a:42:01:70"]);
    let fdb = |words: &str| engine.netns.check(Command::new("bridge").arg("fdb").args(words.split(' ')));
    // The bridge itself answers to it: somebody's static entry, of what the node would no longer be reached by.
    fdb(&format!("add {MAC} dev br-back self permanent"));
    run(&engine, "two", "back", &["--mac-address", MAC]);
    enforce(&host, "back", &["one", "two"]);

    let tied = || fdb("show br br-back").lines().any(|line| line.starts_with(MAC) && line.contains("sticky"));
    eventually(PATIENCE, || {
        let status = host.bulkhead(["status"]);
        if status.contains("its MAC address is also somebody else's") { Ok(()) } else { Err(status) }
    });
    assert!(!tied(), "{}", fdb("show br br-back"));
    fdb(&format!("del {MAC} dev br-back self"));
    eventually(PATIENCE, || if tied() { Ok(()) } else { Err(fdb("show br br-back")) });
}
