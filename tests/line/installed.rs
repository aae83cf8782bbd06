//! `bulkhead install` under a real systemd: both units start, in the right order at boot, are started again when they are killed, and
//! are taken out without a trace.

use std::time::Duration;

use lab::machine::Machine;
use lab::{eventually, limit};

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
        if output.status.success() && said.contains(" connected") { Ok(()) } else { Err(units(machine)) }
    });
}

#[test]
fn installed_under_systemd_it_starts_before_the_engine_comes_back_when_killed_and_leaves_no_trace() {
    let _limit = limit(Duration::from_secs(600));
    let machine = match Machine::boot() {
        Ok(machine) => machine,
        Err(reason) => lab::skip!("{reason}"),
    };
    let units_before = machine.check("ls -R /etc/systemd/system /etc/tmpfiles.d; cat /etc/passwd /etc/group");
    machine.check(
        "mkdir -p /tmp/r/bin /tmp/r/www && cp /bin/busybox /tmp/r/bin && echo hello > /tmp/r/www/index.html && \
         for name in sh sleep wget httpd timeout; do ln -s busybox /tmp/r/bin/$name; done; \
         tar -C /tmp/r -c . | docker import --change 'ENV PATH=/bin' - line:1 && \
         docker network create --subnet 172.31.77.0/24 line && \
         docker run -d --restart always --name db --network line --ip 172.31.77.10 line:1 httpd -f -p 80 -h /www && \
         for name in web other; do docker run -d --restart always --name $name --network line line:1 sleep 1000000; done",
    );
    eventually(PATIENCE, || if reaches(&machine, "other") { Ok(()) } else { Err("db does not serve yet") });

    let said = machine.check("bulkhead install");
    assert!(said.contains("made the system user bulkhead") && said.contains("started bulkhead-agent.service"), "{said}");
    both_run(&machine);
    let pid = machine.check("systemctl show bulkhead-controller --value -p MainPID");
    assert_eq!(machine.check(&format!("stat -c %U /proc/{}", pid.trim())).trim(), "bulkhead", "the controller is not root");
    // A member of the group needs no root.
    machine.check("useradd --system --groups bulkhead ada && setpriv --reuid ada --regid ada --init-groups bulkhead status");

    machine.check("bulkhead segment add network:line --segment line");
    eventually(PATIENCE, || {
        let workloads = machine.check("bulkhead get workloads");
        if ["web", "db", "other"].iter().all(|name| workloads.contains(name)) { Ok(()) } else { Err(workloads) }
    });
    machine.check("bulkhead allow web db tcp/80 && bulkhead mode line enforce --yes --deny-unlearned other");
    eventually(PATIENCE, || is_held(&machine));

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
