//! What has to be switched on for the kernel to tell: three sysctls of the network namespace, and the two per-bridge switches
//! that lead a bridge's packets through the inet hooks. How they were before is data, so that it can be put back after a crash.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::links::{Calls, Links};

/// Under /proc/sys/net, which shows the network namespace of the thread that looks.
const ROOT: &str = "/proc/sys/net/netfilter";

/// What is switched on, and why.
const WANTED: [(&str, &str); 3] = [
    // Bytes and packets in dumps and at the end.
    ("nf_conntrack_acct", "1"),
    // When a connection began, so that what is older than the agent is known as such.
    ("nf_conntrack_timestamp", "1"),
    // 2, the default, never reports the end of what was born before we listened (measured).
    ("nf_conntrack_events", "1"),
];

/// How the host was before us. Kept on disk by the agent, put back at the end or by `down`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Originals {
    /// Values of sysctls, by the name of the file.
    pub sysctls: BTreeMap<String, String>,
    /// The switches of each bridge that we changed, by its name.
    pub bridges: BTreeMap<String, Calls>,
}

/// What could not be switched.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// A sysctl.
    #[error("cannot set {name} to {value}")]
    Sysctl {
        /// The file's name.
        name: String,
        /// What it should be.
        value: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A bridge's switches.
    #[error("cannot switch netfilter on for bridge {bridge}")]
    Bridge {
        /// The interface's name.
        bridge: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// How it was before can't be kept, so nothing is changed.
    #[error("cannot keep how the host was before")]
    Keep(#[source] io::Error),
    /// No route netlink.
    #[error("cannot speak route netlink")]
    Netlink(#[source] io::Error),
}

fn read(name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(Path::new(ROOT).join(name))?.trim().to_owned())
}

fn write(name: &str, value: &str) -> Result<(), SwitchError> {
    let wrong = |source| SwitchError::Sysctl { name: name.to_owned(), value: value.to_owned(), source };
    fs::write(Path::new(ROOT).join(name), value).map_err(wrong)
}

/// Writes the originals where they survive a crash; called before anything is changed.
pub type Keep<'a> = dyn FnMut(&Originals) -> io::Result<()> + Send + 'a;

impl Originals {
    /// Switches the namespace's sysctls on; what was there before is remembered unless it already is. Returns what had to be
    /// changed.
    ///
    /// # Errors
    /// The first that can't be read, kept or written.
    pub fn switch_on(&mut self, keep: &mut Keep<'_>) -> Result<Vec<&'static str>, SwitchError> {
        let mut changes = Vec::new();
        for (name, value) in WANTED {
            let before = read(name).map_err(|source| SwitchError::Sysctl { name: name.to_owned(), value: value.to_owned(), source })?;
            if before != value {
                self.sysctls.entry(name.to_owned()).or_insert(before);
                changes.push((name, value));
            }
        }
        if !changes.is_empty() {
            keep(self).map_err(SwitchError::Keep)?;
        }
        for (name, value) in &changes {
            write(name, value)?;
        }
        Ok(changes.into_iter().map(|(name, _)| name).collect())
    }

    /// Switches netfilter on for one bridge, if it is there and isn't on. True if it had to be changed.
    pub(super) fn lead_through(&mut self, links: &mut Links, bridge: &str, keep: &mut Keep<'_>) -> Result<bool, SwitchError> {
        let Some(before) = links.calls(bridge).filter(|before| *before != Calls::ON) else { return Ok(false) };
        if !self.bridges.contains_key(bridge) {
            self.bridges.insert(bridge.to_owned(), before);
            keep(self).map_err(SwitchError::Keep)?;
        }
        links.set_calls(bridge, Calls::ON).map_err(|source| SwitchError::Bridge { bridge: bridge.to_owned(), source })?;
        Ok(true)
    }

    /// Puts the switches of one bridge back as they were, while the rest stays on.
    pub(super) fn let_go(&self, links: &mut Links, bridge: &str) -> Result<(), SwitchError> {
        let Some(before) = self.bridges.get(bridge) else { return Ok(()) };
        if links.calls(bridge).is_none_or(|now| now == *before) {
            return Ok(());
        }
        links.set_calls(bridge, *before).map_err(|source| SwitchError::Bridge { bridge: bridge.to_owned(), source })
    }

    /// Puts everything back, in this thread's network namespace. A bridge that is gone needs nothing. Goes on after a failure.
    ///
    /// # Errors
    /// The first failure.
    pub fn restore(&self) -> Result<(), SwitchError> {
        let mut first = Ok(());
        let mut note = |result: Result<(), SwitchError>| {
            if first.is_ok() {
                first = result;
            }
        };
        for (name, value) in &self.sysctls {
            note(write(name, value));
        }
        if !self.bridges.is_empty() {
            let mut links = Links::open().map_err(SwitchError::Netlink)?;
            for (bridge, before) in &self.bridges {
                if links.calls(bridge).is_some_and(|now| now != *before) {
                    let wrong = |source| SwitchError::Bridge { bridge: bridge.clone(), source };
                    note(links.set_calls(bridge, *before).map_err(wrong));
                }
            }
        }
        first
    }
}

/// Connections in the kernel's table, and how many there may be.
pub fn room() -> Option<(u64, u64)> {
    Some((read("nf_conntrack_count").ok()?.parse().ok()?, read("nf_conntrack_max").ok()?.parse().ok()?))
}
