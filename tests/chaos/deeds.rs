//! What a careless administrator, a hostile one and bad luck do to a host, each undone before the next begins.

use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use lab::kin::{child, family, lives};
use lab::{Engine, Host, Process, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::traffic::Score;

/// What the containers of a storm run.
pub(crate) const IMAGE: &str = "storm:1";

/// How long a host may take to be well again.
pub(crate) const HEALED_WITHIN: Duration = Duration::from_secs(60);

/// Random numbers that a seed brings back (splitmix64, Steele et al. 2014).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn milliseconds(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    KillAgent,
    KillController,
    KillSupervisor,
    KillEngineFilter,
    KillEngine,
    KillContainerd,
    StopAgentForAWhile,
    FlushNft,
    FlushIptables,
    FlushConntrack,
    SwitchBridgeOff,
    SwitchSysctlOff,
    RestartContainer,
    ConnectAndDisconnect,
    MakeAnew,
    ChangePlan,
    AuditAndBack,
    LearnAndBack,
    Revoke,
    Quarantine,
    KillAgentInAPlanChange,
    KillControllerInAPlanChange,
    KillEngineInARestart,
    KillAgentInARevocation,
}

impl Deed {
    pub(crate) const ALL: [Self; 24] = [
        Self::KillAgent,
        Self::FlushNft,
        Self::KillEngine,
        Self::Quarantine,
        Self::SwitchBridgeOff,
        Self::KillController,
        Self::AuditAndBack,
        Self::RestartContainer,
        Self::FlushConntrack,
        Self::KillAgentInAPlanChange,
        Self::Revoke,
        Self::KillSupervisor,
        Self::KillContainerd,
        Self::StopAgentForAWhile,
        Self::FlushIptables,
        Self::KillEngineFilter,
        Self::SwitchSysctlOff,
        Self::ConnectAndDisconnect,
        Self::MakeAnew,
        Self::ChangePlan,
        Self::LearnAndBack,
        Self::KillControllerInAPlanChange,
        Self::KillEngineInARestart,
        Self::KillAgentInARevocation,
    ];
}

/// The one that is restarted.
const STRAY: [&str; 9] = ["run", "-d", "--name", "stray", "--label", "bulkhead.dev/workload=stray", "--network", "storm", IMAGE];

pub(crate) fn run_stray(engine: &Engine) {
    engine.docker(STRAY);
}

/// Where deeds are done. `cache` may reach `db` but for revocations; `stray` may reach nobody and is the one that is restarted.
pub(crate) struct Scene<'s> {
    pub(crate) engine: &'s Engine,
    pub(crate) host: &'s Host<'s>,
    pub(crate) up: Mutex<Process>,
    pub(crate) score: &'s Score,
    /// What was measured: until a switch was back, until an alarm said so.
    pub(crate) repaired: Mutex<Vec<(Deed, Duration, Option<Duration>)>>,
}

impl Scene<'_> {
    fn signal(&self, words: &str, signal: Signal) {
        // It may be between two lives.
        if let Some(pid) = child(&self.up.lock().unwrap(), words) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for an agent that has lived for a while. One that is killed between a repair and its report has told nobody.
    fn agent_lives(&self) {
        let agent = || child(&self.up.lock().unwrap(), "bulkhead-agent run");
        eventually(HEALED_WITHIN, || {
            let before = agent();
            thread::sleep(Duration::from_secs(2));
            if before.is_some() && before == agent() { Ok(()) } else { Err("no agent lives") }
        });
    }

    fn kill_agent(&self) {
        self.signal("bulkhead-agent run", Signal::SIGKILL);
    }

    fn sh(&self, words: &str) {
        let quiet = format!("{{ {words}; }} >/dev/null 2>&1; true");
        self.engine.netns.check(Command::new("sh").args(["-c", &quiet]));
    }

    /// A command that must succeed in the end; while one of the processes is away it is told so, and asks again.
    fn bulkhead(&self, words: &[&str]) {
        eventually(HEALED_WITHIN, || {
            let out = self.host.try_bulkhead(words);
            if out.status.success() { Ok(()) } else { Err(format!("{words:?}: {}", String::from_utf8_lossy(&out.stderr))) }
        });
    }

    pub(crate) fn status(&self) -> Result<serde_json::Value, String> {
        let out = self.host.try_bulkhead(["status", "-o", "json"]);
        serde_json::from_slice(&out.stdout).map_err(|_| String::from_utf8_lossy(&out.stderr).into_owned())
    }

    /// Until all processes are back, the plan in force is the latest, and the network is called enforced.
    pub(crate) fn healed(&self) {
        eventually(HEALED_WITHIN, || self.host.is_in_force());
    }

    fn alarms(&self) -> Vec<String> {
        let status = self.status().unwrap_or_default();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        let all = nodes.iter().flat_map(|node| node["status"]["alarms"].as_array().cloned().unwrap_or_default());
        all.map(|alarm| alarm.to_string()).collect()
    }

    /// Does something that has to be found and undone, and measures both.
    fn repaired(&self, deed: Deed, what: &str, undone: impl Fn() -> bool, says: &str) {
        self.agent_lives();
        let before = self.alarms();
        self.sh(what);
        let begun = Instant::now();
        eventually(HEALED_WITHIN, || if undone() { Ok(()) } else { Err(format!("{deed:?} is not repaired")) });
        let repaired = begun.elapsed();
        // The same alarm within a minute is one alarm.
        let told = if before.iter().any(|alarm| alarm.contains(says)) {
            None
        } else {
            eventually(HEALED_WITHIN, || {
                let alarms = self.alarms();
                if alarms.iter().any(|alarm| alarm.contains(says)) { Ok(()) } else { Err(format!("no alarm says {says:?}: {alarms:?}")) }
            });
            Some(begun.elapsed())
        };
        self.repaired.lock().unwrap().push((deed, repaired, told));
    }

    fn ours(&self) -> bool {
        let tables = self.engine.netns.check(Command::new("nft").args(["list", "tables"]));
        ["inet bulkhead", "bridge bulkhead"].iter().all(|t| tables.lines().any(|line| line == format!("table {t}")))
    }

    fn bridge_is_on(&self) -> bool {
        self.engine.netns.ip("-d link show br-storm").contains("nf_call_iptables 1")
    }

    fn revive_engine(&self) {
        self.engine.revive_daemon();
    }

    fn open_and_back(&self, mode: &str) {
        self.score.open.store(true, std::sync::atomic::Ordering::Relaxed);
        self.bulkhead(&["mode", "storm", mode]);
        thread::sleep(Duration::from_millis(300));
        self.enforce();
    }

    /// To Enforce, and from the moment that it is in force nothing else may pass.
    pub(crate) fn enforce(&self) {
        let unlearned = ["stray", "evil"].iter().flat_map(|name| ["--deny-unlearned", name]);
        let words: Vec<&str> = ["mode", "storm", "enforce", "--yes"].into_iter().chain(unlearned).collect();
        self.bulkhead(&words);
        self.healed();
        thread::sleep(Duration::from_millis(300));
        self.score.open.store(false, std::sync::atomic::Ordering::Relaxed);
    }

    fn plan_changes(&self, dice: &mut Dice) {
        let port = format!("tcp/{}", 1_000 + dice.below(1_000));
        self.bulkhead(&["allow", "web", "db", &port, "--for", "1h"]);
    }

    fn cache_reaches_db(&self) -> bool {
        let db = self.engine.address("db", "storm");
        self.engine.netns_of("cache").tcp((db, 80).into()).is_open()
    }

    fn revoke(&self, how: &[&str], back: &[&str], at_its_height: impl FnOnce()) {
        let db = self.engine.address("db", "storm");
        let cache = self.engine.netns_of("cache");
        let mut old = cache.connect((db, 80).into(), Duration::from_secs(5)).unwrap();
        old.set_read_timeout(Some(HEALED_WITHIN)).unwrap();
        assert!(lab::probe::still_echoes(&mut old, b"before"));
        old.set_read_timeout(Some(Duration::from_millis(900))).unwrap();
        self.bulkhead(how);
        at_its_height();
        eventually(HEALED_WITHIN, || if self.cache_reaches_db() { Err(format!("cache still reaches db after {how:?}")) } else { Ok(()) });
        // New ones are denied first, then the table of connections is read for the old ones.
        eventually(HEALED_WITHIN, || {
            if lab::probe::still_echoes(&mut old, b"after") { Err(format!("a connection outlives {how:?}")) } else { Ok(()) }
        });
        self.bulkhead(back);
        eventually(HEALED_WITHIN, || if self.cache_reaches_db() { Ok(()) } else { Err(format!("cache cannot reach db after {back:?}")) });
    }

    fn allow_cache(&self) -> [&'static str; 4] {
        ["allow", "cache", "db", "tcp/80"]
    }

    pub(crate) fn happen(&self, deed: Deed, dice: &mut Dice) {
        match deed {
            Deed::KillAgent => self.kill_agent(),
            Deed::KillController => self.signal("bulkhead controller", Signal::SIGKILL),
            Deed::KillEngineFilter => self.signal("engine-filter", Signal::SIGKILL),
            Deed::KillSupervisor => {
                let mut up = self.up.lock().unwrap();
                let children = family(i32::try_from(up.id()).unwrap());
                up.signal(Signal::SIGKILL);
                up.wait(Duration::from_secs(5));
                // They end with it, in order; the next one would find their locks.
                eventually(HEALED_WITHIN, || {
                    let left = children.iter().find(|child| lives(child));
                    left.map_or(Ok(()), |(pid, words)| Err(format!("{words} ({pid}) outlives its supervisor")))
                });
                thread::sleep(dice.milliseconds(500));
                *up = self.host.up();
            }
            Deed::KillEngine => {
                self.engine.kill_daemon();
                thread::sleep(dice.milliseconds(1500));
                self.revive_engine();
            }
            Deed::KillContainerd => {
                let dockerd = i32::try_from(self.engine.daemon_pid()).unwrap();
                if let Some((pid, _)) = family(dockerd).into_iter().find(|(_, words)| words.starts_with("containerd ")) {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            Deed::StopAgentForAWhile => {
                self.signal("bulkhead-agent run", Signal::SIGSTOP);
                thread::sleep(Duration::from_millis(300 + dice.below(1500)));
                self.signal("bulkhead-agent run", Signal::SIGCONT);
            }
            Deed::FlushNft => {
                self.sh("nft flush ruleset");
                if !self.ours() {
                    self.score.problem("nft flush ruleset took tables of ours away".to_owned());
                }
                // The engine makes its own rules anew only when it starts.
                self.engine.restart();
            }
            Deed::FlushIptables => {
                self.sh("iptables -F; iptables -X; ip6tables -F");
                self.engine.restart();
            }
            Deed::FlushConntrack => self.sh("conntrack -F"),
            Deed::SwitchBridgeOff => {
                let off = "ip link set br-storm type bridge nf_call_iptables 0 nf_call_ip6tables 0";
                self.repaired(deed, off, || self.bridge_is_on(), "netfilter of bridge br-storm");
            }
            Deed::SwitchSysctlOff => {
                self.repaired(
                    deed,
                    "sysctl -w net.netfilter.nf_conntrack_acct=0",
                    || self.engine.netns.sysctl("net.netfilter.nf_conntrack_acct").as_deref() == Some("1"),
                    "nf_conntrack_acct",
                );
            }
            Deed::RestartContainer => self.restart_stray(),
            Deed::ConnectAndDisconnect => {
                self.engine.docker(["network", "connect", "yard", "cache"]);
                thread::sleep(dice.milliseconds(300));
                self.engine.docker(["network", "disconnect", "yard", "cache"]);
            }
            Deed::MakeAnew => {
                self.engine.docker(["rm", "-f", "stray"]);
                self.engine.docker(["network", "rm", "yard"]);
                self.engine.docker(["network", "create", "yard"]);
                run_stray(self.engine);
            }
            Deed::ChangePlan => self.plan_changes(dice),
            Deed::AuditAndBack => self.open_and_back("audit"),
            Deed::LearnAndBack => self.open_and_back("learn"),
            Deed::Revoke => self.revoke(&["revert", "cache", "--yes"], &self.allow_cache(), || ()),
            Deed::Quarantine => self.revoke(&["quarantine", "cache"], &["release", "cache"], || ()),
            Deed::KillAgentInARevocation => {
                let late = dice.milliseconds(30);
                self.revoke(&["quarantine", "cache"], &["release", "cache"], || {
                    thread::sleep(late);
                    self.kill_agent();
                });
            }
            Deed::KillAgentInAPlanChange => self.meanwhile(dice, Self::kill_agent, Self::plan_changes),
            Deed::KillControllerInAPlanChange => {
                self.meanwhile(dice, |scene| scene.signal("bulkhead controller", Signal::SIGKILL), Self::plan_changes);
            }
            Deed::KillEngineInARestart => {
                let late = dice.milliseconds(400);
                thread::scope(|scope| {
                    // It may fail: its engine is killed under it.
                    scope.spawn(|| self.engine.try_docker(["restart", "-t", "0", "stray"]));
                    thread::sleep(late);
                    self.engine.kill_daemon();
                });
                self.revive_engine();
                self.restart_stray();
            }
        }
    }

    /// An engine that was killed while it changed a container may refuse at first.
    fn remove_stray(&self) {
        eventually(HEALED_WITHIN, || {
            let out = self.engine.try_docker(["rm", "-f", "stray"]);
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            if out.status.success() || said.contains("No such container") { Ok(()) } else { Err(said) }
        });
    }

    /// An engine that was killed within a restart may never start that container again (20.10: "task already exists"), or none with its
    /// address until the engine itself is started again (29 with nftables: "rule exists").
    fn restart_stray(&self) {
        if self.engine.try_docker(["restart", "-t", "0", "stray"]).status.success() {
            return;
        }
        self.remove_stray();
        if !self.engine.try_docker(STRAY).status.success() {
            self.remove_stray();
            self.engine.kill_daemon();
            self.revive_engine();
            run_stray(self.engine);
        }
    }

    /// Kills at a random instant of something else.
    fn meanwhile(&self, dice: &mut Dice, kill: impl Fn(&Self) + Sync, what: impl Fn(&Self, &mut Dice)) {
        let late = dice.milliseconds(60);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(late);
                kill(self);
            });
            what(self, dice);
        });
    }
}
