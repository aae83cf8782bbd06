//! Where the engine is: `--docker-host`, `DOCKER_HOST`, the docker client's context, the default socket; in that order, as the
//! docker client does (docs.docker.com/engine/manage-resources/contexts). Reads the client's files; connects to nothing.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// The socket that the engine listens on when nobody says otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// Who named the engine's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--docker-host`.
    Flag,
    /// The variable `DOCKER_HOST`.
    Environment,
    /// The variable `DOCKER_CONTEXT`, or `currentContext` of the client's `config.json`.
    Context(String),
    /// Nobody.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("--docker-host"),
            Self::Environment => f.write_str("DOCKER_HOST"),
            Self::Context(name) => write!(f, "docker context {name}"),
            Self::Default => f.write_str("the default"),
        }
    }
}

/// The engine's socket, and who named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineAddress {
    /// Path of the Unix socket.
    pub socket: PathBuf,
    /// Who named it.
    pub source: Source,
}

impl fmt::Display for EngineAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix://{} (from {})", self.socket.display(), self.source)
    }
}

/// Why there is no engine to speak to.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not a Unix socket of this host.
    #[error(
        "{source_name} names the engine at {address}: only an engine on this host, by its Unix socket (unix:///path), can be observed. Run the agent on that host, or pass --docker-host unix:///var/run/docker.sock"
    )]
    NotLocal {
        /// Who named it.
        source_name: String,
        /// What was named.
        address: String,
    },
    /// A file of the docker client that can't be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A file of the docker client that is not what it should be.
    #[error("{} is not what the docker client writes", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Where.
        #[source]
        cause: serde_json::Error,
    },
    /// A context without an engine.
    #[error("docker context {name} names no engine (looked in {})", path.display())]
    NoEngine {
        /// Which context.
        name: String,
        /// Its file.
        path: PathBuf,
    },
}

/// What the environment says, gathered by the caller so that a test can say it too.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `DOCKER_HOST`.
    pub host: Option<String>,
    /// `DOCKER_CONTEXT`.
    pub context: Option<String>,
    /// `DOCKER_CONFIG`, else `.docker` in the home directory.
    pub config: Option<PathBuf>,
}

impl Environment {
    /// Of this process.
    pub fn of_process() -> Self {
        let text = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let home = || text("HOME").map(|home| Path::new(&home).join(".docker"));
        Self { host: text("DOCKER_HOST"), context: text("DOCKER_CONTEXT"), config: text("DOCKER_CONFIG").map(PathBuf::from).or_else(home) }
    }
}

#[derive(Deserialize)]
struct ClientConfig {
    #[serde(default, rename = "currentContext")]
    current_context: String,
}

#[derive(Deserialize)]
struct ContextMeta {
    #[serde(default, rename = "Endpoints")]
    endpoints: std::collections::BTreeMap<String, ContextEndpoint>,
}

#[derive(Deserialize)]
struct ContextEndpoint {
    #[serde(default, rename = "Host")]
    host: String,
}

/// The engine's socket: the flag's, else the environment's, else the docker context's, else the default.
///
/// # Errors
/// An engine that is not on this host, or files of the docker client that can't be understood.
pub fn locate(flag: Option<&str>, environment: &Environment) -> Result<EngineAddress, AddressError> {
    if let Some(host) = flag {
        return unix(host, Source::Flag);
    }
    if let Some(host) = &environment.host {
        return unix(host, Source::Environment);
    }
    let current = match (&environment.context, &environment.config) {
        (Some(context), _) => context.clone(),
        (None, Some(config)) => match read::<ClientConfig>(&config.join("config.json"))? {
            Some(config) => config.current_context,
            None => String::new(),
        },
        (None, None) => String::new(),
    };
    // "default" is the client's own name for no context at all.
    if current.is_empty() || current == "default" {
        return Ok(EngineAddress { socket: PathBuf::from(DEFAULT_SOCKET), source: Source::Default });
    }
    // The folder of a context is the SHA-256 of its name (docker/cli, cli/context/store).
    let folder: String = Sha256::digest(current.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    let path = environment.config.clone().unwrap_or_default().join("contexts/meta").join(folder).join("meta.json");
    let meta = read::<ContextMeta>(&path)?;
    let host = meta.and_then(|mut meta| meta.endpoints.remove("docker")).map(|endpoint| endpoint.host).filter(|host| !host.is_empty());
    match host {
        Some(host) => unix(&host, Source::Context(current)),
        None => Err(AddressError::NoEngine { name: current, path }),
    }
}

fn unix(host: &str, source: Source) -> Result<EngineAddress, AddressError> {
    let path = host.strip_prefix("unix://").or_else(|| host.starts_with('/').then_some(host));
    match path {
        Some(path) if path.starts_with('/') => Ok(EngineAddress { socket: PathBuf::from(path), source }),
        Some(_) | None => Err(AddressError::NotLocal { source_name: source.to_string(), address: host.to_owned() }),
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, AddressError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(AddressError::Unreadable { path: path.to_owned(), cause }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|cause| AddressError::Malformed { path: path.to_owned(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_context(name: &str, host: &str) -> (tempfile::TempDir, Environment) {
        let config = tempfile::tempdir().unwrap();
        std::fs::write(config.path().join("config.json"), format!("{{\"currentContext\":\"{name}\",\"auths\":{{}}}}")).unwrap();
        let folder: String = Sha256::digest(name.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        let folder = config.path().join("contexts/meta").join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let meta = format!(
            "{{\"Name\":\"{name}\",\"Metadata\":{{}},\"Endpoints\":{{\"docker\":{{\"Host\":\"{host}\",\"SkipTLSVerify\":false}}}}}}"
        );
        std::fs::write(folder.join("meta.json"), meta).unwrap();
        let environment = Environment { config: Some(config.path().to_owned()), ..Environment::default() };
        (config, environment)
    }

    #[test]
    fn the_flag_goes_before_the_environment_before_the_context_before_the_default() {
        let (_config, mut environment) = with_context("lab", "unix:///run/lab.sock");
        let at = |environment: &Environment, flag| locate(flag, environment).unwrap().to_string();
        assert_eq!(at(&environment, None), "unix:///run/lab.sock (from docker context lab)");
        environment.host = Some("unix:///run/env.sock".to_owned());
        assert_eq!(at(&environment, None), "unix:///run/env.sock (from DOCKER_HOST)");
        assert_eq!(at(&environment, Some("/run/flag.sock")), "unix:///run/flag.sock (from --docker-host)");
        assert_eq!(at(&Environment::default(), None), "unix:///var/run/docker.sock (from the default)");
    }

    #[test]
    fn the_context_named_default_is_the_default_socket() {
        let (_config, mut environment) = with_context("lab", "unix:///run/lab.sock");
        environment.context = Some("default".to_owned());
        assert_eq!(locate(None, &environment).unwrap().source, Source::Default);
    }

    #[test]
    fn an_engine_elsewhere_is_refused_with_what_to_do() {
        for host in ["tcp://192.0.2.1:2376", "ssh://user@host.example", "unix://relative", "npipe:////./pipe/docker_engine", ""] {
            let text = locate(Some(host), &Environment::default()).unwrap_err().to_string();
            assert!(text.contains("--docker-host unix://"), "{host}: {text}");
        }
    }

    #[test]
    fn a_context_that_does_not_exist_and_a_broken_file_are_errors_that_name_the_file() {
        let (config, mut environment) = with_context("lab", "unix:///run/lab.sock");
        environment.context = Some("gone".to_owned());
        assert!(matches!(locate(None, &environment), Err(AddressError::NoEngine { .. })));
        environment.context = None;
        std::fs::write(config.path().join("config.json"), "{\"currentContext\":").unwrap();
        let text = locate(None, &environment).unwrap_err().to_string();
        assert!(text.contains("config.json"), "{text}");
    }
}
