//! Which digest of a suggestion this person was shown last, so that an approval names what was read.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use policy::Workload;

/// Digests by controller socket and workload.
type Shown = BTreeMap<PathBuf, BTreeMap<Workload, String>>;

/// XDG base directories: $XDG_STATE_HOME, else ~/.local/state.
fn file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    Some(state.or_else(home)?.join("bulkhead/shown.json"))
}

fn load(file: &Path) -> Shown {
    // Missing or unreadable means that nothing was shown: the approval then asks.
    fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// Remembers what was shown.
///
/// # Errors
/// There is no place to remember it.
pub(super) fn remember(socket: &Path, workload: &Workload, digest: &str) -> io::Result<()> {
    let file = file().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "neither HOME nor XDG_STATE_HOME is set"))?;
    let mut shown = load(&file);
    let known = shown.entry(socket.to_owned()).or_default();
    if known.get(workload).is_some_and(|known| known == digest) {
        return Ok(());
    }
    known.insert(workload.clone(), digest.to_owned());
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = file.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, serde_json::to_vec(&shown)?)?;
    fs::rename(&new, &file)
}

/// What was shown last, if anything.
pub(super) fn last(socket: &Path, workload: &Workload) -> Option<String> {
    load(&file()?).remove(socket)?.remove(workload)
}
