//! `bulkhead install` under a real systemd: both units start, in the right order at boot, are started again when they are killed, and
//! are taken out without a trace.

use std::time::Duration;

use lab::machine::Machine;
use lab::{Netns, eventually, limit};
use node_agent::enforce::sums;

const PATIENCE: Duration = Duration::from_secs(60);

/// Whether one container reaches `db`, which is on a fixed address.
fn reaches(machine: &Machine, from: &str) -> bool {
    machine.output(&format!("docker exec {from} timeout 2 wget -q -O - http://172.31.77.10/")).status.success()
}

fn is_held(machine: &Machine) -> Result<(), String> {
    match (reaches(machine, "web"), reaches(machine, "other")) {
        (true, false) => Ok(()),
        (web, other) => Err(format!("web reaches db: {web}; other reaches db: {other}\n{}", units(machine))),
    }
}

fn units(machine: &Machine) -> String {
    let output = machine.output("systemctl status --no-pager bulkhead-agent bulkhead-controller docker; bulkhead status");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// When a unit was started or ready, microseconds since the boot of this machine.
fn moment(machine: &Machine, unit: &str, what: &str) -> u64 {
    machine.check(&format!("systemctl show {unit} --value -p {what}")).trim().parse().unwrap()
}

fn both_run(machine: &Machine) {
    eventually(PATIENCE, || {
        let output = machine.output("systemctl is-active bulkhead-agent bulkhead-controller && bulkhead status");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() && said.contains(" connected") && !said.contains("not connected") { Ok(()) } else { Err(units(machine)) }
    });
}

/// `db`, which `web` and `other` reach while nobody forbids it.
fn three(machine: &Machine) {
    machine.check(
        "mkdir -p /tmp/r/bin /tmp/r/www && cp /bin/busybox /tmp/r/bin && echo hello > /tmp/r/www/index.html && \
         for name in sh sleep wget httpd timeout; do ln -s busybox /tmp/r/bin/$name; done; \
         tar -C /tmp/r -c . | docker import --change 'ENV PATH=/bin' - line:1 && \
         docker network create --subnet 172.31.77.0/24 line && \
         docker run -d --restart always --name db --network line --ip 172.31.77.10 line:1 httpd -f -p 80 -h /www && \
         for name in web other; do docker run -d --restart always --name $name --network line line:1 sleep 1000000; done",
    );
    eventually(PATIENCE, || if reaches(machine, "other") { Ok(()) } else { Err("db does not serve yet") });
}

/// `web` reaches `db`, `other` does not.
fn enforce(machine: &Machine) {
    machine.check("bulkhead segment add network:line --segment line");
    eventually(PATIENCE, || {
        let workloads = machine.check("bulkhead get workloads");
        if ["web", "db", "other"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    machine.check("bulkhead allow web db tcp/80 && bulkhead mode line enforce --yes --deny-unlearned other");
    eventually(PATIENCE, || is_held(machine));
}

#[test]
fn installed_under_systemd_it_starts_before_the_engine_comes_back_when_killed_and_leaves_no_trace() {
    let _limit = limit(Duration::from_secs(600));
    let machine = lab::or_skip!(Machine::boot());
    let units_before = machine.check("ls -R /etc/systemd/system /etc/tmpfiles.d; cat /etc/passwd /etc/group");
    three(&machine);

    let said = machine.check("bulkhead install");
    assert!(said.contains("made the system user bulkhead") && said.contains("started bulkhead-agent.service"), "{said}");
    both_run(&machine);
    let pid = machine.check("systemctl show bulkhead-controller --value -p MainPID");
    assert_eq!(machine.check(&format!("stat -c %U /proc/{}", pid.trim())).trim(), "bulkhead", "the controller is not root");
    // A member of the group needs no root.
    machine.check("useradd --system --groups bulkhead ada && setpriv --reuid ada --regid ada --init-groups bulkhead status");

    enforce(&machine);

    for unit in ["bulkhead-agent", "bulkhead-controller"] {
        machine.check(&format!("systemctl kill -s KILL {unit}"));
        assert!(!reaches(&machine, "other"), "killed is not open: {unit}");
        eventually(PATIENCE, || {
            let restarts = machine.check(&format!("systemctl show {unit} --value -p NRestarts"));
            if restarts.trim() == "0" { Err(format!("{unit} is not started again")) } else { Ok(()) }
        });
        both_run(&machine);
        assert_eq!(is_held(&machine), Ok(()));
        machine.check("setpriv --reuid ada --regid ada --init-groups bulkhead status");
    }

    machine.reboot();
    eventually(PATIENCE, || {
        // From the first moment on that anything runs there.
        assert!(!reaches(&machine, "other"), "open after the reboot");
        if reaches(&machine, "web") { Ok(()) } else { Err(units(&machine)) }
    });
    both_run(&machine);
    let ready = moment(&machine, "bulkhead-agent", "ActiveEnterTimestampMonotonic");
    let engine = moment(&machine, "docker", "ExecMainStartTimestampMonotonic");
    assert!(ready > 0 && ready <= engine, "the agent was ready at {ready} us, the engine started at {engine} us");

    machine.check("bulkhead down --yes --purge && userdel ada");
    assert!(reaches(&machine, "other"), "after down everything passes");
    assert_eq!(machine.check("ls -R /etc/systemd/system /etc/tmpfiles.d; cat /etc/passwd /etc/group"), units_before);
    let tables = machine.check("nft list tables");
    assert!(!tables.contains("bulkhead"), "{tables}");
    let left = machine.check("ls -d /var/lib/bulkhead /run/bulkhead 2>/dev/null; systemctl list-units --all --no-legend 'bulkhead*'");
    assert_eq!(left, "");
}

#[test]
fn systemds_own_store_keeps_the_socket_of_a_killed_agent_for_the_next_one() {
    let _limit = limit(Duration::from_secs(600));
    let machine = lab::or_skip!(Machine::boot());
    three(&machine);
    machine.check("bulkhead install");
    both_run(&machine);
    enforce(&machine);
    let agent = || machine.check("systemctl show bulkhead-agent --value -p MainPID").trim().to_owned();
    let nft = |words: &str| {
        let output = machine.output(&format!("nft {words}"));
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    };
    // The socket; and what looks at sums that are yet to be written, in each family, where this kernel takes that.
    let wanted = if Netns::new("trial").run(|| sums::keep_out().is_ok()) { "3" } else { "1" };
    for kind in ["persistent", "owned"] {
        // Long enough between two agents to look.
        machine.check(&format!(
            "mkdir -p /etc/systemd/system/bulkhead-agent.service.d && \
             printf '[Service]\\nRestartSec=20s\\nEnvironment=BULKHEAD_OWNERSHIP={kind}\\n' > /etc/systemd/system/bulkhead-agent.service.d/kind.conf && \
             systemctl daemon-reload && systemctl restart bulkhead-agent"
        ));
        both_run(&machine);
        eventually(PATIENCE, || is_held(&machine));
        let keeps = || {
            let kept = machine.check("systemctl show bulkhead-agent --value -p NFileDescriptorStore");
            if kept.trim() == wanted { Ok(()) } else { Err(format!("{kind}: systemd keeps {kept}")) }
        };
        eventually(PATIENCE, keeps);
        // Twice: what was handed on is kept for the one after, too.
        for life in 1..=2 {
            let first = agent();
            machine.check("systemctl kill -s KILL bulkhead-agent");
            eventually(PATIENCE, || if agent() == "0" { Ok(()) } else { Err("the agent lives".to_owned()) });
            for words in ["delete table inet bulkhead", "delete table bridge bulkhead"] {
                let why = nft(words).expect_err(words);
                assert!(why.contains("Operation not permitted"), "{kind}, life {life}: nft {words}: {why}");
            }
            assert_eq!(nft("flush ruleset"), Ok(()), "{kind}: what is owned is skipped");
            assert!(!reaches(&machine, "other"), "{kind}, life {life}: open without an agent");
            assert_eq!(agent(), "0", "{kind}, life {life}: all of this was while nobody but systemd kept the socket");
            // Waits until it is started again: a start by hand does not come before that.
            machine.check("systemctl start bulkhead-agent");
            assert_ne!(agent(), first);
            both_run(&machine);
            eventually(PATIENCE, keeps);
            assert!(nft("delete table inet bulkhead").is_err(), "{kind}, life {life}");
            eventually(PATIENCE, || is_held(&machine));
        }
        // The next one goes on with that socket: what is decided becomes these tables.
        machine.check("bulkhead quarantine web");
        eventually(PATIENCE, || if reaches(&machine, "web") { Err(format!("{kind}: not cut off")) } else { Ok(()) });
        machine.check("bulkhead release web");
        eventually(PATIENCE, || is_held(&machine));
    }
}
