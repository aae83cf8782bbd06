//! One engine with Bulkhead on it for all tests that leave it as they found it. Whoever kills or restarts something has an engine
//! of its own.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use lab::engine::{Kind, Options};
use lab::{Engine, Host, Internet, Netns, Process, Server, eventually};

/// How long the two processes and the engine may take for anything, on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An engine with an internet and Bulkhead.
pub(crate) struct Stage {
    // Dropped in this order: who uses the engine's namespace goes first.
    servers: Vec<Server>,
    /// Held for writing by who must be alone: each change of the plan ends connections that it doesn't allow, which would hide
    /// that something else failed to.
    pub(crate) quiet: RwLock<()>,
    _up: Process,
    pub(crate) internet: Internet,
    pub(crate) engine: Engine,
}

/// As `BULKHEAD_PROXY` says, else docker-proxy is on with 20.10 and with 29's nftables, off with 29's iptables: every engine and both ways
/// are tried without trying all pairs.
fn proxied() -> bool {
    lab::engine::proxy_chosen().unwrap_or_else(|| Kind::chosen() != Some(Kind::Current))
}

/// The container ports behind 8080 to 8082. One and the same, but where the engine starts no container of which one port is published
/// at several: 29 with nftables and without docker-proxy writes the rule for its hairpin twice and says "rule exists" (moby,
/// libnetwork/drivers/bridge/internal/nftabler/port.go, setPerPortHairpinMasq: seen with v2.0.0-beta.24).
fn inner_ports() -> [u16; 3] {
    if Kind::chosen() == Some(Kind::CurrentNftables) && !proxied() { [80, 81, 82] } else { [80; 3] }
}

/// An engine of this test's own, with an internet behind it.
///
/// # Errors
/// Why there is none.
pub(crate) fn engine(flags: &[&str]) -> Result<(Engine, Internet), String> {
    if let Some(reason) = lab::process::lacks_root() {
        return Err(reason);
    }
    let netns = Netns::new("engine");
    let internet = Internet::behind(&netns);
    let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    let engine = Engine::start_in(netns, Options { userland_proxy: proxied(), flags, ..Options::default() })?;
    engine.import_busybox("hold:1");
    Ok((engine, internet))
}

/// A network with both families, 10.66.N.0/24 and fd00:N::/64; the bridge is called `br-NAME`.
pub(crate) fn network(engine: &Engine, name: &str, n: u8) {
    let bridge = format!("com.docker.network.bridge.name=br-{name}");
    let (v4, v6) = (format!("10.66.{n}.0/24"), format!("fd00:{n}::/64"));
    engine.docker(["network", "create", "--ipv6", "--subnet", &v4, "--subnet", &v6, "-o", &bridge, name]);
}

/// Starts a container that sleeps; `more` are words for `docker run`.
pub(crate) fn run(engine: &Engine, name: &str, network: &str, more: &[&str]) {
    let words = ["run", "-d", "--name", name, "--network", network];
    engine.docker(words.iter().chain(more).chain(&["hold:1"]));
}

/// Waits until what a container says by UDP is answered.
pub(crate) fn reaches(engine: &Engine, who: &str, to: SocketAddr, said: &[u8], patience: Duration, when: &str) {
    let inside = engine.netns_of(who);
    eventually(patience, || match inside.udp_echo(to, said) {
        lab::Echo::Answered => Ok(()),
        other => Err(format!("{when}: {who} does not reach {to}: {other:?}")),
    });
}

/// Waits until Bulkhead knows these workloads.
pub(crate) fn known(host: &Host<'_>, names: &[&str]) {
    eventually(PATIENCE, || {
        let workloads = host.bulkhead(["get", "workloads"]);
        let has = |name: &&str| workloads.split_whitespace().any(|word| word == *name);
        if names.iter().all(has) { Ok(()) } else { Err(workloads) }
    });
}

/// Puts workloads under Enforce, each with what was allowed before.
pub(crate) fn enforce(host: &Host<'_>, segment: &str, workloads: &[&str]) {
    known(host, workloads);
    let members = workloads.iter().map(|name| format!("workload:{name}"));
    host.bulkhead(["segment", "add", "--segment", segment].into_iter().map(str::to_owned).chain(members));
    let unlearned = workloads.iter().flat_map(|name| ["--deny-unlearned".to_owned(), (*name).to_owned()]);
    let words: Vec<String> = ["mode", segment, "enforce", "--yes"].into_iter().map(str::to_owned).chain(unlearned).collect();
    eventually(PATIENCE, || {
        let out = host.try_bulkhead(&words);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // Another test changed something between the forecast and the switch: refused, as it should be.
        assert!(out.status.success() || said.contains("Ask for the forecast again"), "{said}");
        if out.status.success() { Ok(()) } else { Err(said) }
    });
}

impl Stage {
    /// Whether the engine publishes ports at IPv6 addresses. 20.10 translates none: docker-proxy carries them, and without it a socket of
    /// the engine's that nobody reads holds the port (moby, libnetwork/portmapper/proxy.go, dummyProxy).
    pub(crate) fn publishes_v6(&self) -> bool {
        proxied() || !matches!(self.engine.kind, Kind::Debian | Kind::OnPath)
    }

    fn new() -> Result<Self, String> {
        let (engine, internet) = engine(&[])?;
        network(&engine, "back", 1);
        network(&engine, "side", 2);
        network(&engine, "free", 3);
        let [every, loopback, v4] = inner_ports();
        let published =
            [format!("8080:{every}"), format!("127.0.0.1:8081:{loopback}"), format!("0.0.0.0:8082:{v4}"), "5353:53/udp".to_owned()];
        let words: Vec<&str> = published.iter().flat_map(|port| ["-p", port]).collect();
        run(&engine, "db", "back", &words);
        for name in ["web", "hostile", "guest", "dual"] {
            run(&engine, name, "back", &[]);
        }
        engine.docker(["network", "connect", "free", "dual"]);
        run(&engine, "stranger", "side", &[]);
        run(&engine, "passer", "free", &[]);

        let up = Host::on(&engine).up();
        let host = Host::prepared(&engine);
        known(&host, &["db", "web", "hostile", "guest", "dual", "stranger", "passer"]);
        for port in inner_ports() {
            host.bulkhead(["allow", "web", "db", &format!("tcp/{port}")]);
        }
        host.bulkhead(["allow", "web", "db", "udp/53"]);
        enforce(&host, "back", &["db", "web", "hostile"]);
        enforce(&host, "side", &["stranger"]);
        drop(host);

        let inside = engine.netns_of("db");
        let at = |port| SocketAddr::new("::".parse().unwrap(), port);
        let mut servers = vec![Server::tcp_echo(&inside, at(80)), Server::udp_echo(&inside, at(53))];
        servers.extend(inner_ports().into_iter().filter(|port| *port != 80).map(|port| Server::tcp_echo(&inside, at(port))));
        let stage = Self { servers, quiet: RwLock::new(()), _up: up, internet, engine };
        stage.settled();
        Ok(stage)
    }

    /// The one that others use too, or a new one.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn shared() -> Result<Arc<Self>, String> {
        static SHARED: Mutex<Weak<Stage>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stage) = shared.upgrade() {
            return Ok(stage);
        }
        let stage = Arc::new(Self::new()?);
        *shared = Arc::downgrade(&stage);
        Ok(stage)
    }

    /// What is allowed passes, what is not doesn't: the policy is in force, and everybody is bound.
    pub(crate) fn settled(&self) {
        let db = self.db(80);
        eventually(PATIENCE, || {
            let (web, hostile) = (self.inside("web").tcp_echo(db, b"allowed"), self.inside("hostile").tcp_echo(db, b"denied"));
            if web && !hostile { Ok(()) } else { Err(format!("web reaches db: {web}; hostile does: {hostile}")) }
        });
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::prepared(&self.engine)
    }

    /// The namespace of a container.
    pub(crate) fn inside(&self, container: &str) -> Netns {
        self.engine.netns_of(container)
    }

    /// A port of db at its own address.
    pub(crate) fn db(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.engine.address("db", "back"), port)
    }

    /// Connections and datagrams that db has heard, by tcp/80 and udp/53.
    pub(crate) fn heard(&self) -> [u64; 2] {
        [self.servers[0].heard(), self.servers[1].heard()]
    }

    /// The host's addresses on an interface.
    pub(crate) fn addresses_of_host(&self, interface: &str) -> Vec<IpAddr> {
        let text = self.engine.netns.ip(&format!("-o addr show dev {interface}"));
        let address = |line: &str| line.split_whitespace().nth(3)?.split('/').next()?.parse().ok();
        text.lines().filter_map(address).collect()
    }
}

/// The shared stage, beside others or `alone`; or the test is skipped aloud.
macro_rules! stage {
    ($stage:ident) => {
        $crate::stage::stage!($stage, read)
    };
    ($stage:ident, alone) => {
        $crate::stage::stage!($stage, write)
    };
    ($stage:ident, $how:ident) => {
        let $stage = lab::or_skip!($crate::stage::Stage::shared());
        // From the turn on: waiting for it is not hanging.
        let _turn = $stage.quiet.$how().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _limit = lab::limit(std::time::Duration::from_secs(90));
    };
}
pub(crate) use stage;
