//! How the engine's own process was started: what its API does not tell, namely whether published ports go through the user-land
//! proxy, and the engine's `--dns`. Read from /proc and from its configuration file; nothing is asked of the engine.
//!
//! # Why
//! `/info` names neither. The process is the one named `dockerd` whose data root is the one that `/info` does name: an engine in
//! another namespace, or a second one, has another. Both settings are readable without privilege (`/proc/PID/cmdline`).

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The engine's default (docs.docker.com/reference/cli/dockerd, `--data-root`).
const DEFAULT_ROOT: &str = "/var/lib/docker";
/// The engine's default (`--config-file`).
const DEFAULT_CONFIG: &str = "/etc/docker/daemon.json";

/// The settings we need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Daemon {
    /// Process id.
    pub(crate) pid: u32,
    /// On unless somebody turned it off (`--userland-proxy=false`).
    pub(crate) userland_proxy: bool,
    /// `--dns`.
    pub(crate) dns: Vec<IpAddr>,
}

#[derive(Default, Deserialize)]
struct ConfigFile {
    #[serde(rename = "data-root")]
    data_root: Option<PathBuf>,
    #[serde(rename = "userland-proxy")]
    userland_proxy: Option<bool>,
    #[serde(default)]
    dns: Vec<IpAddr>,
}

/// Every `dockerd` that runs, with its command line.
fn commands() -> impl Iterator<Item = (u32, Vec<String>)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).filter_map(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<String> = command.split(|&b| b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
        let program = Path::new(arguments.first()?).file_name()?;
        (program == "dockerd").then_some((pid, arguments))
    })
}

/// The engine's process, by the data root that its API names; `None`: it can't be seen from here.
pub(crate) fn find(data_root: &Path) -> Option<Daemon> {
    commands().find_map(|(pid, arguments)| {
        let (root, daemon) = settings(pid, &arguments, |path| std::fs::read(path).ok());
        (root == data_root).then_some(daemon)
    })
}

/// Data roots where an engine of this host may keep its containers' files: of those that run, and of one that is yet to be started.
pub(crate) fn roots() -> Vec<PathBuf> {
    let read = |path: &Path| std::fs::read(path).ok();
    let mut roots: Vec<PathBuf> = commands().map(|(pid, arguments)| settings(pid, &arguments, read).0).collect();
    roots.push(settings(0, &[], read).0);
    roots.sort();
    roots.dedup();
    roots
}

/// What a command line says, with its configuration file behind it.
fn settings(pid: u32, arguments: &[String], read: impl Fn(&Path) -> Option<Vec<u8>>) -> (PathBuf, Daemon) {
    let mut roots = Vec::new();
    let (mut config, mut proxy, mut dns) = (None, None, Vec::new());
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        // The engine's flags take one dash or two (pflag), and a value behind `=` or as the next word; booleans only behind `=`.
        let Some(flag) = argument.strip_prefix("--") else { continue };
        let (flag, inline) = match flag.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (flag, None),
        };
        match flag {
            "userland-proxy" => {
                proxy = Some(inline.is_none_or(|value| !matches!(value.as_str(), "false" | "0" | "f" | "F" | "FALSE" | "False")))
            }
            "data-root" => roots.extend(inline.or_else(|| rest.next().cloned())),
            "config-file" => config = inline.or_else(|| rest.next().cloned()),
            "dns" => dns.extend(inline.or_else(|| rest.next().cloned()).iter().filter_map(|value| value.parse::<IpAddr>().ok())),
            _ => {}
        }
    }
    let file: ConfigFile = read(Path::new(config.as_deref().unwrap_or(DEFAULT_CONFIG)))
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let root = roots.pop().map(PathBuf::from).or(file.data_root).unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT));
    // The engine refuses to start where flag and file both name a setting, so there is nothing to rank.
    let userland_proxy = proxy.or(file.userland_proxy).unwrap_or(true);
    let dns = if dns.is_empty() { file.dns } else { dns };
    (root, Daemon { pid, userland_proxy, dns })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str, file: Option<&str>) -> (PathBuf, Daemon) {
        let arguments: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        settings(7, &arguments, |_| file.map(|text| text.as_bytes().to_vec()))
    }

    #[test]
    fn a_plain_engine_has_the_proxy_and_the_default_root() {
        let (root, daemon) = of("/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock", None);
        assert_eq!((root.to_str(), daemon), (Some(DEFAULT_ROOT), Daemon { pid: 7, userland_proxy: true, dns: Vec::new() }));
    }

    #[test]
    fn flags_are_read_in_both_forms() {
        let (root, daemon) = of("dockerd --data-root /d --dns 203.0.113.53 --dns=203.0.113.54 --userland-proxy=false", None);
        assert_eq!(root, Path::new("/d"));
        assert!(!daemon.userland_proxy);
        assert_eq!(daemon.dns, ["203.0.113.53".parse::<IpAddr>().unwrap(), "203.0.113.54".parse().unwrap()]);
    }

    #[test]
    fn the_configuration_file_counts_where_no_flag_speaks() {
        let file = Some("{\"data-root\":\"/f\",\"userland-proxy\":false,\"dns\":[\"203.0.113.53\"],\"unknown\":{}}");
        let (root, daemon) = of("dockerd", file);
        assert_eq!((root.to_str(), daemon.userland_proxy, daemon.dns.len()), (Some("/f"), false, 1));
        assert_eq!(of("dockerd --data-root=/flag", file).0, Path::new("/flag"));
    }

    #[test]
    fn a_configuration_file_that_is_not_one_counts_as_none() {
        assert_eq!(of("dockerd", Some("{")).1, Daemon { pid: 7, userland_proxy: true, dns: Vec::new() });
    }
}
