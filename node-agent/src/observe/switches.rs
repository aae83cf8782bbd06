//! What has to be switched on for the kernel to tell: three sysctls of the network namespace, and the two per-bridge switches
//! that lead a bridge's packets through the inet hooks. How they were before is data, so that it can be put back after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

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

/// How the host was before us, and what was on since. Kept on disk by the agent, put back at the end or by `down`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Originals {
    /// Values of sysctls, by the name of the file.
    pub sysctls: BTreeMap<String, String>,
    /// The switches of each bridge that we changed, by its name.
    pub bridges: BTreeMap<String, Calls>,
    /// What is to be on.
    pub on: On,
}

/// What was on when it was looked at last. Found off in the same boot, somebody switched it off, though nobody may have looked at that
/// time; after another boot it is off because nothing switched it on yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct On {
    /// The kernel's id of the boot.
    pub boot: String,
    /// Names of sysctls.
    pub sysctls: BTreeSet<String>,
    /// Names and indices of bridges: one that was made anew begins as the kernel makes it.
    pub bridges: BTreeMap<String, u32>,
}

impl On {
    /// Nothing was on yet in this boot, if it is another one.
    fn begin(&mut self, boot: String) {
        if self.boot != boot {
            *self = Self { boot, ..Self::default() };
        }
    }
}

/// How a bridge's switches were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// On, or there is no such bridge.
    On,
    /// Off, and nobody of us had seen them on: they are on now.
    Off,
    /// Off, and they had been on: they are on again.
    SwitchedOff,
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
    /// Switches the namespace's sysctls on; what was there before is remembered unless it already is. Returns those that somebody
    /// switched off since they were on.
    ///
    /// # Errors
    /// The first that can't be read, kept or written.
    pub fn switch_on(&mut self, keep: &mut Keep<'_>) -> Result<Vec<&'static str>, SwitchError> {
        let mut changes = Vec::new();
        for (name, value) in WANTED {
            let before = read(name).map_err(|source| SwitchError::Sysctl { name: name.to_owned(), value: value.to_owned(), source })?;
            if before != value {
                changes.push((name, value, before));
            }
        }
        let was_on = self.on.clone();
        self.on.begin(crate::netns::boot());
        let (foul, first): (Vec<_>, Vec<_>) = changes.into_iter().partition(|(name, ..)| self.on.sysctls.contains(*name));
        for (name, _, before) in &first {
            self.sysctls.entry((*name).to_owned()).or_insert_with(|| before.clone());
        }
        if !first.is_empty() {
            keep(self).map_err(SwitchError::Keep)?;
        }
        for (name, value, _) in foul.iter().chain(&first) {
            write(name, value)?;
        }
        self.on.sysctls = WANTED.iter().map(|(name, _)| (*name).to_owned()).collect();
        if self.on != was_on {
            keep(self).map_err(SwitchError::Keep)?;
        }
        Ok(foul.into_iter().map(|(name, ..)| name).collect())
    }

    /// Switches netfilter on for one bridge, if it is there and isn't on.
    pub(super) fn lead_through(&mut self, links: &mut Links, bridge: &str, keep: &mut Keep<'_>) -> Result<Found, SwitchError> {
        let Some((index, before)) = links.bridge(bridge).filter(|(_, before)| *before != Calls::ON) else { return Ok(Found::On) };
        let foul = self.on.bridges.get(bridge) == Some(&index);
        if !foul && !self.bridges.contains_key(bridge) {
            self.bridges.insert(bridge.to_owned(), before);
            keep(self).map_err(SwitchError::Keep)?;
        }
        links.set_calls(bridge, Calls::ON).map_err(|source| SwitchError::Bridge { bridge: bridge.to_owned(), source })?;
        Ok(if foul { Found::SwitchedOff } else { Found::Off })
    }

    /// Writes down which of these bridges are on, and which that were are no more.
    pub(super) fn note_on(&mut self, links: &Links, bridges: &BTreeSet<&str>, keep: &mut Keep<'_>) -> Result<(), SwitchError> {
        let is_on = |name: &str| links.bridge(name).filter(|(_, calls)| *calls == Calls::ON).map(|(index, _)| index);
        let new: Vec<_> = bridges.iter().filter_map(|name| Some((*name, is_on(name)?))).collect();
        let new = new.into_iter().filter(|(name, index)| self.on.bridges.get(*name) != Some(index));
        let new: Vec<_> = new.map(|(name, index)| (name.to_owned(), index)).collect();
        let known = self.on.bridges.len();
        self.on.bridges.retain(|name, index| links.bridge(name).is_some_and(|(now, _)| now == *index));
        if new.is_empty() && known == self.on.bridges.len() {
            return Ok(());
        }
        self.on.bridges.extend(new);
        keep(self).map_err(SwitchError::Keep)
    }

    /// Puts the switches of one bridge back as they were, while the rest stays on.
    pub(super) fn let_go(&mut self, links: &mut Links, bridge: &str, keep: &mut Keep<'_>) -> Result<(), SwitchError> {
        let Some(before) = self.bridges.get(bridge).copied() else { return Ok(()) };
        if links.bridge(bridge).is_none_or(|(_, now)| now == before) {
            return Ok(());
        }
        if self.on.bridges.remove(bridge).is_some() {
            keep(self).map_err(SwitchError::Keep)?;
        }
        links.set_calls(bridge, before).map_err(|source| SwitchError::Bridge { bridge: bridge.to_owned(), source })
    }

    /// Puts everything back as [`restore`](Self::restore) does, and remembers nothing as on.
    ///
    /// # Errors
    /// The first failure.
    pub(super) fn put_back(&mut self, keep: &mut Keep<'_>) -> Result<(), SwitchError> {
        self.on = On::default();
        keep(self).map_err(SwitchError::Keep)?;
        self.restore()
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
                if links.bridge(bridge).is_some_and(|(_, now)| now != *before) {
                    let wrong = |source| SwitchError::Bridge { bridge: bridge.clone(), source };
                    note(links.set_calls(bridge, *before).map_err(wrong));
                }
            }
        }
        first
    }
}

/// What is looked at some times a second: files that stay open, in the network namespace of the thread that opened them. To open one
/// costs more than to read it.
#[derive(Debug)]
pub(super) struct Gauges {
    sysctls: Vec<(File, &'static str)>,
    count: File,
    most: File,
}

impl Gauges {
    pub(super) fn open() -> io::Result<Self> {
        let open = |name: &str| File::open(Path::new(ROOT).join(name));
        let sysctls = WANTED.into_iter().map(|(name, value)| Ok((open(name)?, value))).collect::<io::Result<_>>()?;
        Ok(Self { sysctls, count: open("nf_conntrack_count")?, most: open("nf_conntrack_max")? })
    }

    /// Whether every sysctl is as it should be. One that can't be read is not: whoever asks finds out why.
    pub(super) fn are_on(&self) -> bool {
        self.sysctls.iter().all(|(file, wanted)| value(file).is_some_and(|found| found.to_string() == *wanted))
    }

    /// Connections in the kernel's table, and how many there may be.
    pub(super) fn room(&self) -> Option<(u64, u64)> {
        Some((value(&self.count)?, value(&self.most)?))
    }
}

fn value(file: &File) -> Option<u64> {
    let mut text = [0; 24];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}
