//! The engine's answers, made facts. Asks and translates; what the facts mean is decided in `facts`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error as EngineError;
use bollard::models::{ContainerInspectResponse, ContainerSummary, EndpointResource, EventMessage, NetworkInspect, PortMap};
use bollard::query_parameters::{EventsOptions, InspectNetworkOptions, ListContainersOptions, ListNetworksOptions};
use futures::{Stream, StreamExt, TryStreamExt};
use jiff::Timestamp;
use policy::Protocol;
use policy::inventory::{Published, Unmanaged, name::PROJECT_LABEL};

use super::facts::{Attached, ContainerFact, Details, Mac, NetworkFact};
use super::resolvers::{Configured, nameservers, resolvers};
use super::{daemon, namespace};

/// Everything we ask is answered in milliseconds, but container inspect, which waits for a container that starts.
const ANSWER: Duration = Duration::from_secs(20);
/// Inspects under way at the same time during a full listing.
const ABREAST: usize = 8;
/// Capabilities that reach around the filter: `ALL` stands for all of them.
const CAPABILITIES: [&str; 5] = ["ALL", "NET_ADMIN", "SYS_ADMIN", "SYS_MODULE", "BPF"];
/// The containerd behind the engine is as good as the engine's own socket.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// Event kinds that change what we know; all others (exec, health checks, images) stay in the engine.
const EVENTS: [&str; 11] =
    ["connect", "disconnect", "create", "destroy", "remove", "start", "die", "rename", "update", "reload", "restart"];
/// Where the host's resolvers stand; the engine takes the second where the first is systemd-resolved's stub (127.0.0.53).
const HOST_RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// What the engine says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EngineFact {
    pub(crate) version: String,
    /// Why nothing of it can be held to a policy.
    pub(crate) unmanaged: Option<String>,
    /// How the engine writes its own rules: `iptables`, `nftables`, `iptables+firewalld`.
    pub(crate) firewall: String,
    pub(crate) userland_proxy: bool,
    pub(crate) configured: Configured,
    /// Sentences about what could not be found out.
    pub(crate) notes: Vec<String>,
}

/// A connection to the engine.
#[derive(Clone)]
pub(crate) struct Engine {
    docker: Docker,
    /// Where containers find the engine: a mount of it is root on this node.
    sockets: Vec<PathBuf>,
}

impl Engine {
    /// Connects through `socket` and settles on a version that both speak. `sockets`: other paths of the same engine.
    ///
    /// # Errors
    /// The engine's, or that it can't be reached.
    pub(crate) async fn connect(socket: &Path, sockets: &[PathBuf]) -> Result<Self, EngineError> {
        let path = socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&path, ANSWER.as_secs(), bollard::API_DEFAULT_VERSION)?;
        let docker = docker.negotiate_version().await?;
        let mut sockets: Vec<PathBuf> = sockets.iter().map(|path| plain(path)).collect();
        sockets.extend([plain(Path::new(super::endpoint::DEFAULT_SOCKET)), PathBuf::from(CONTAINERD_SOCKET)]);
        Ok(Self { docker, sockets })
    }

    /// What changes, from `since` on.
    pub(crate) fn events(&self, since: Timestamp) -> impl Stream<Item = Result<EventMessage, EngineError>> + use<> {
        let kinds = |list: &[&str]| list.iter().map(|&kind| kind.to_owned()).collect::<Vec<_>>();
        let filters =
            HashMap::from([("type".to_owned(), kinds(&["container", "network", "daemon"])), ("event".to_owned(), kinds(&EVENTS))]);
        let since = format!("{}.{:09}", since.as_second(), since.subsec_nanosecond());
        self.docker.events(Some(EventsOptions { since: Some(since), until: None, filters: Some(filters) }))
    }

    /// What the engine says of itself, with what its process shows.
    pub(crate) async fn about(&self) -> Result<EngineFact, EngineError> {
        let (version, info) = tokio::try_join!(self.docker.version(), self.docker.info())?;
        let mut notes = Vec::new();
        let rootless = info.security_options.iter().flatten().any(|option| option.contains("name=rootless"));
        let podman = version.components.iter().flatten().any(|component| component.name.contains("Podman"));
        let unmanaged = match (rootless, podman) {
            (true, _) => Some("the engine is rootless: its bridges are in a namespace of its own".to_owned()),
            (false, true) => Some("the engine is Podman, which is not supported yet".to_owned()),
            (false, false) => None,
        };
        // Told since API 1.49; before it there was only one.
        let firewall = info.firewall_backend.and_then(|firewall| firewall.driver).unwrap_or_else(|| "iptables".to_owned());
        let root = info.docker_root_dir.map(PathBuf::from);
        let daemon = root.as_deref().and_then(daemon::find);
        if daemon.is_none() {
            notes.push("the engine's process is not visible here: its defaults are assumed (user-land proxy on, no --dns)".to_owned());
        }
        let unreadable = |root: &PathBuf| {
            std::fs::read_dir(root.join("containers")).is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
        };
        if let Some(root) = root.as_ref().filter(|root| unreadable(root)) {
            let root = root.display();
            notes.push(format!("the engine keeps its files in {root}, which the agent could not know when it confined itself: its containers' resolvers are unknown until the agent is restarted"));
        }
        let host = HOST_RESOLV_CONF.iter().filter_map(|path| std::fs::read_to_string(path).ok()).flat_map(|text| nameservers(&text));
        let configured = Configured { engine: daemon.as_ref().map(|d| d.dns.clone()).unwrap_or_default(), host: host.collect() };
        let userland_proxy = daemon.as_ref().is_none_or(|daemon| daemon.userland_proxy);
        Ok(EngineFact { version: version.version.unwrap_or_default(), unmanaged, firewall, userland_proxy, configured, notes })
    }

    /// Whether the engine answers: about one container and one network, which go by the locks that an engine hangs in.
    pub(crate) async fn answers(&self, container: Option<&String>, network: Option<&String>) -> Result<(), EngineError> {
        self.docker.version().await?;
        if let Some(id) = network {
            self.network(id).await?;
        }
        match container {
            Some(id) => gone_is_none(self.docker.inspect_container(id, None).await).map(drop),
            None => Ok(()),
        }
    }

    /// One network; `None`: it is gone.
    pub(crate) async fn network(&self, id: &str) -> Result<Option<(String, NetworkFact)>, EngineError> {
        gone_is_none(self.docker.inspect_network(id, None::<InspectNetworkOptions>).await).map(|found| found.and_then(network_fact))
    }

    /// Every network.
    pub(crate) async fn networks(&self) -> Result<BTreeMap<String, NetworkFact>, EngineError> {
        let list = self.docker.list_networks(None::<ListNetworksOptions>).await?;
        let ids: Vec<String> = list.into_iter().filter_map(|network| network.id).collect();
        let found: Vec<Option<(String, NetworkFact)>> =
            futures::stream::iter(ids).map(|id| async move { self.network(&id).await }).buffer_unordered(ABREAST).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Containers with these ids, whatever their state; all of them if none is given.
    pub(crate) async fn containers(&self, ids: &[String]) -> Result<BTreeMap<String, ContainerFact>, EngineError> {
        let filters = (!ids.is_empty()).then(|| HashMap::from([("id".to_owned(), ids.to_vec())]));
        let list = self.docker.list_containers(Some(ListContainersOptions { all: true, filters, ..Default::default() })).await?;
        Ok(list.into_iter().filter_map(container_fact).collect())
    }

    /// What only inspect tells. Waits while the container starts. `None`: it is gone.
    pub(crate) async fn details(&self, id: &str, configured: &Configured) -> Result<Option<Details>, EngineError> {
        let Some(response) = gone_is_none(self.docker.inspect_container(id, None).await)? else { return Ok(None) };
        let resolv_conf = match &response.resolv_conf_path {
            Some(path) if !path.is_empty() => tokio::fs::read_to_string(path).await.ok(),
            Some(_) | None => None,
        };
        let told = details(response, resolv_conf.as_deref(), configured, &self.sockets);
        // It may have ended meanwhile.
        let namespace = told.pid.and_then(|pid| namespace::of_process(pid).ok().flatten());
        Ok(Some(Details { namespace, ..told }))
    }
}

fn gone_is_none<T>(answer: Result<T, EngineError>) -> Result<Option<T>, EngineError> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(EngineError::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

fn network_fact(told: NetworkInspect) -> Option<(String, NetworkFact)> {
    let id = told.id?;
    let driver = told.driver.unwrap_or_default();
    let options = told.options.unwrap_or_default();
    // The engine's rule for bridges that nobody named (moby, `daemon/libnetwork/drivers/bridge`).
    let bridge = || options.get("com.docker.network.bridge.name").cloned().unwrap_or_else(|| format!("br-{}", id.get(..12).unwrap_or(&id)));
    let bridge = (driver == "bridge").then(bridge);
    let configs = told.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    let attached = told.containers.unwrap_or_default().into_iter().filter(|(id, _)| is_container_id(id));
    let fact = NetworkFact {
        name: told.name.unwrap_or_default(),
        project: told.labels.and_then(|mut labels| labels.remove(PROJECT_LABEL)).filter(|project| !project.is_empty()),
        bridge,
        driver,
        subnets: configs.into_iter().filter_map(|config| config.subnet?.parse().ok()).collect(),
        internal: told.internal.unwrap_or_default(),
        attached: attached.map(|(id, resource)| (id, attached_fact(&resource))).collect(),
    };
    Some((id, fact))
}

/// Network inspect lists endpoints without a container too (`ep-...`, a Swarm load balancer's `lb-...`).
fn is_container_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn attached_fact(told: &EndpointResource) -> Attached {
    // Written with the length of the prefix: 172.31.0.2/24.
    let address = |text: &Option<String>| text.as_deref()?.split('/').next()?.parse::<IpAddr>().ok();
    let addresses = [address(&told.ipv4_address), address(&told.ipv6_address)];
    Attached {
        mac: told.mac_address.as_deref().and_then(mac),
        addresses: addresses.into_iter().flatten().map(|address| address.to_canonical()).collect(),
    }
}

/// `02:42:ac:1f:00:02`.
pub(crate) fn mac(text: &str) -> Option<Mac> {
    let digits = |byte: &str| byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit());
    let mut bytes = text.split(':').map(|byte| if digits(byte) { u8::from_str_radix(byte, 16).ok() } else { None });
    let mut mac = [0; 6];
    for slot in &mut mac {
        *slot = bytes.next()??;
    }
    bytes.next().is_none().then_some(mac)
}

fn container_fact(told: ContainerSummary) -> Option<(String, ContainerFact)> {
    let id = told.id?;
    let names = told.names.unwrap_or_default();
    // A link adds names of the form /other/alias; the container's own has one slash.
    let own = names.iter().find(|name| name.matches('/').count() <= 1).or(names.first());
    let name = own.map(|name| name.trim_start_matches('/').to_owned()).filter(|name| !name.is_empty());
    let state = told.state.map(|state| state.to_string()).unwrap_or_default();
    let fact = ContainerFact {
        name: name.unwrap_or_else(|| id.get(..12).unwrap_or(&id).to_owned()),
        image: told.image.unwrap_or_default(),
        labels: told.labels.unwrap_or_default().into_iter().collect(),
        running: matches!(state.as_str(), "running" | "paused" | "restarting" | "stopping"),
        network_mode: told.host_config.and_then(|config| config.network_mode).unwrap_or_default(),
        details: None,
    };
    Some((id, fact))
}

/// A capability's name as the engine compares it.
fn capability(named: &str) -> String {
    let name = named.to_ascii_uppercase();
    name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
}

/// Whether a container gets CAP_NET_RAW: it is one of those that all get (moby, oci/caps, TweakCapabilities).
fn has_net_raw(privileged: bool, add: Option<&[String]>, drop: Option<&[String]>) -> bool {
    let names = |list: Option<&[String]>, wanted: &str| list.unwrap_or_default().iter().any(|name| capability(name) == wanted);
    let (added, dropped) = (names(add, "NET_RAW"), names(drop, "NET_RAW"));
    privileged
        || match (names(add, "ALL"), names(drop, "ALL")) {
            (true, _) => !dropped,
            (false, true) => added,
            (false, false) => added || !dropped,
        }
}

fn details(told: ContainerInspectResponse, resolv_conf: Option<&str>, configured: &Configured, sockets: &[PathBuf]) -> Details {
    let name = told.name.unwrap_or_default();
    let name = name.trim_start_matches('/');
    let config = told.host_config.unwrap_or_default();
    let mut notes = Vec::new();
    let mut unmanaged = BTreeSet::new();
    if config.privileged.unwrap_or_default() {
        unmanaged.insert(Unmanaged::Privileged);
    }
    let host_pid = config.pid_mode.as_deref() == Some("host");
    if host_pid {
        unmanaged.insert(Unmanaged::HostPid);
    }
    for added in config.cap_add.iter().flatten().map(|added| capability(added)) {
        if CAPABILITIES.contains(&added.as_str()) || (added == "SYS_PTRACE" && host_pid) {
            unmanaged.insert(Unmanaged::Capability(added));
        }
    }
    let raw = has_net_raw(config.privileged.unwrap_or_default(), config.cap_add.as_deref(), config.cap_drop.as_deref());
    let mut mounts = told.mounts.iter().flatten().filter_map(|mount| mount.source.as_deref());
    if mounts.any(|source| holds_socket(Path::new(source), sockets)) {
        unmanaged.insert(Unmanaged::EngineSocket);
    }
    let dns: Vec<IpAddr> = config.dns.iter().flatten().filter_map(|server| server.parse().ok()).collect();
    let found = resolvers(resolv_conf, &dns, configured);
    if !found.unbelieved.is_empty() {
        let list: Vec<String> = found.unbelieved.iter().map(ToString::to_string).collect();
        let list = list.join(", ");
        notes.push(format!(
            "container {name}: its resolv.conf names {list}, which neither the engine nor the host is configured with: not taken for a resolver"
        ));
    }
    let ports = told.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
    Details {
        pid: told.state.and_then(|state| state.pid).and_then(|pid| u32::try_from(pid).ok()).filter(|&pid| pid != 0),
        published: published(name, &ports, &mut notes),
        // Host networking has no resolver of its own; the host's questions are the host's.
        resolvers: if config.network_mode.as_deref() == Some("host") { Vec::new() } else { found.asked },
        unmanaged,
        raw,
        notes,
        namespace: None,
    }
}

fn published(container: &str, ports: &PortMap, notes: &mut Vec<String>) -> Vec<Published> {
    let mut found = BTreeSet::new();
    for (port, bindings) in ports {
        for binding in bindings.iter().flatten() {
            let text = binding.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or("0.0.0.0");
            let host_port = binding.host_port.as_deref().unwrap_or_default();
            let read = || {
                let (container_port, protocol) = port.split_once('/')?;
                let protocol: Protocol = protocol.parse().ok()?;
                Some(Published {
                    address: text.parse().ok()?,
                    port: host_port.parse().ok()?,
                    protocol,
                    container_port: container_port.parse().ok()?,
                })
            };
            match read() {
                Some(one) => drop(found.insert(one)),
                None => notes.push(format!("container {container}: published port {text}:{host_port} -> {port} is not understood")),
            }
        }
    }
    found.into_iter().collect()
}

/// Whether a mount of this path gives the container one of the sockets: the socket itself or a folder above it.
fn holds_socket(source: &Path, sockets: &[PathBuf]) -> bool {
    let source = plain(source);
    sockets.iter().any(|socket| socket.starts_with(&source))
}

/// Without `.` and `..`, and with /var/run as what it is on every current system: /run.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => plain.push(component),
        }
    }
    match plain.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => plain,
    }
}

/// See [`crate::fuzzing`].
#[cfg(any(fuzzing, test))]
pub(crate) fn read_any(json: &[u8]) {
    drop(serde_json::from_slice(json).map(network_fact));
    drop(serde_json::from_slice(json).map(container_fact));
    let text = std::str::from_utf8(json).ok();
    let sockets = [PathBuf::from("/run/docker.sock")];
    drop(serde_json::from_slice(json).map(|told| details(told, text, &Configured::default(), &sockets)));
}

#[cfg(test)]
mod tests;
