//! What the agent keeps on disk: its lock, the last plan (two copies, checksummed), the last ruleset with what has changed since, and
//! how the host was before. Only files; what they mean is decided elsewhere.
//!
//! # Why two copies
//! The plan is what protects the host after a reboot while the controller may be away. A torn write or a bad block may take one
//! copy; the other is written only after the first is on disk.

mod growth;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use policy::NodePlan;
use policy::plan::PlanChange;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tracing::warn;

/// What can go wrong with the agent's own files.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// Another agent works on this state.
    #[error("another agent holds {path}: only one agent may enforce on a host; stop it, or give this one its own --state-dir")]
    Taken {
        /// The lock file.
        path: PathBuf,
    },
    /// The file system said no.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried: "read", "write", "lock".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The one that holds the lock does not end.
    #[error("the agent (pid {pid}) that holds {path} does not end: end it yourself, then try again")]
    Stays {
        /// The lock file.
        path: PathBuf,
        /// The other process.
        pid: i32,
    },
    /// Every copy is damaged.
    #[error("both copies of {path} are damaged ({why}): what the kernel holds stays; the controller sends the plan again")]
    Damaged {
        /// The first copy's path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The agent's own directory, locked.
#[derive(Debug)]
pub struct Keep {
    dir: PathBuf,
    _lock: Flock<File>,
}

/// Under this name: how the host was before Bulkhead, for `down`.
pub const BEFORE: &str = "before";
/// Under this name: the last plan.
pub const PLAN: &str = "plan";
/// Under this name: the last ruleset, for a start without the engine.
pub const RULESET: &str = "ruleset";

impl Keep {
    /// Makes the directory (mode 0700) if it isn't there, and locks it for this process.
    ///
    /// # Errors
    /// `Taken` if another agent lives, `Io` with the path otherwise.
    pub fn open(dir: &Path) -> Result<Self, KeepError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| KeepError::Io { what, path, source }
        };
        fs::create_dir_all(dir).map_err(io("make", dir))?;
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(io("protect", dir))?;
        let path = dir.join("agent.lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(io("open", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => KeepError::Taken { path: path.clone() },
            other => KeepError::Io { what: "lock", path: path.clone(), source: other.into() },
        })?;
        // For `down`, which ends whoever holds the lock. In the place of the one before: a full disk has no other.
        if let Err(error) = lock.write_all_at(format!("{:<20}\n", std::process::id()).as_bytes(), 0) {
            warn!(%error, path = %path.display(), "`bulkhead down` will not find this agent by its lock");
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    /// Ends the agent that holds the lock of this directory, if one does.
    ///
    /// # Errors
    /// `Stays` if it doesn't end within ten seconds.
    pub fn end_holder(dir: &Path) -> Result<(), KeepError> {
        let path = dir.join("agent.lock");
        let holder = || fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let held = || matches!(Self::open(dir), Err(KeepError::Taken { .. }));
        let (Some(pid), true) = (holder(), held()) else { return Ok(()) };
        let stays = || KeepError::Stays { path: path.clone(), pid };
        kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|_| stays())?;
        for _ in 0..1000 {
            if !held() {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Err(stays())
    }

    /// Removes plan, ruleset and what was remembered of before: the host is as it was. The spool stays, it was learned.
    ///
    /// # Errors
    /// `Io` with the file that can't be removed.
    pub fn forget(&self) -> Result<(), KeepError> {
        for path in [BEFORE, PLAN, RULESET].iter().flat_map(|name| files(name)).map(|copy| self.dir.join(copy)) {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(KeepError::Io { what: "remove", path, source }),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a value in two copies, one after the other.
    ///
    /// # Errors
    /// `Io`; then at least one older copy is still whole.
    pub fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), KeepError> {
        self.save_first(name, value)?.write()
    }

    /// Writes the first copy, which is the one that is read while it is whole. What must not wait for the disk twice goes on now, and
    /// has the second one written afterwards.
    ///
    /// # Errors
    /// `Io`; then at least one older copy is still whole.
    pub fn save_first<T: Serialize>(&self, name: &str, value: &T) -> Result<Second, KeepError> {
        let bytes = sealed(&encoded(&self.dir.join(name), value)?);
        let [first, second] = copies(name);
        write_whole(&self.dir.join(first), &bytes)?;
        growth::forget(&self.dir, name)?;
        Ok(Second::Whole { path: self.dir.join(second), bytes })
    }

    /// Adds what has changed of a value since it was saved. False: it has grown enough to be saved whole.
    ///
    /// # Errors
    /// `Io`; what was added before is whole, and the value is to be saved.
    pub fn append<T: Serialize>(&self, name: &str, change: &T) -> Result<bool, KeepError> {
        growth::append(&self.dir, name, &encoded(&self.dir.join(name), change)?)
    }

    /// As [`Keep::append`], for what must be there after a loss of power too: on disk when this returns, and what comes back writes the
    /// second copy. `None`: it has grown enough to be saved whole.
    ///
    /// # Errors
    /// As [`Keep::append`].
    pub fn append_first<T: Serialize>(&self, name: &str, change: &T) -> Result<Option<Second>, KeepError> {
        let json = encoded(&self.dir.join(name), change)?;
        let appended = growth::append_to(&self.dir, name, growth::Copy::First, &json, true)?;
        Ok(appended.then(|| Second::Line { dir: self.dir.clone(), name: name.to_owned(), json }))
    }

    /// Whether both copies say the same: what was done between the first and the second was done.
    pub fn copies_agree(&self, name: &str) -> bool {
        let read = |copy: &String| fs::read(self.dir.join(copy)).ok();
        [copies(name), growth::files(name)].iter().all(|[first, second]| read(first) == read(second))
    }

    /// Whether lines may be added to a value: both copies are whole, and nothing was added, of which the end may be torn.
    pub fn takes_lines(&self, name: &str) -> bool {
        let is_whole = |copy: &String| fs::read(self.dir.join(copy)).is_ok_and(|text| opened(&text).is_ok());
        copies(name).iter().all(is_whole) && growth::files(name).iter().all(|file| !self.dir.join(file).exists())
    }

    /// Reads a value with all that was added to it. `add` says whether it fits; what doesn't ends it.
    ///
    /// # Errors
    /// As [`Keep::load`].
    pub fn load_grown<T: DeserializeOwned, C: DeserializeOwned>(
        &self,
        name: &str,
        add: impl Fn(&mut T, C) -> bool,
    ) -> Result<Option<T>, KeepError> {
        load_grown(&self.dir, name, add)
    }

    /// Reads a value: the first copy that is whole. `None` if there never was one.
    ///
    /// # Errors
    /// `Damaged` if there are copies and none can be believed.
    pub fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, KeepError> {
        load(&self.dir, name)
    }
}

/// The second copy of a value, still to be written.
#[derive(Debug)]
#[must_use = "one copy alone does not survive its own damage"]
pub enum Second {
    /// Of the whole value.
    Whole {
        /// Where.
        path: PathBuf,
        /// What.
        bytes: Vec<u8>,
    },
    /// Of what was added to it.
    Line {
        /// Where.
        dir: PathBuf,
        /// To which value.
        name: String,
        /// What.
        json: Vec<u8>,
    },
}

impl Second {
    /// Writes it.
    ///
    /// # Errors
    /// `Io`; then the first copy is whole.
    pub fn write(self) -> Result<(), KeepError> {
        match self {
            Self::Whole { path, bytes } => write_whole(&path, &bytes),
            Self::Line { dir, name, json } => growth::append_to(&dir, &name, growth::Copy::Second, &json, true).map(drop),
        }
    }
}

/// Every file of a value.
fn files(name: &str) -> Vec<String> {
    let [first, second] = copies(name);
    let [log, its_copy] = growth::files(name);
    vec![first, second, log, its_copy]
}

fn copies(name: &str) -> [String; 2] {
    [format!("{name}.1"), format!("{name}.2")]
}

/// Reads a value of a directory that is not locked: for `down`, which must work when the agent is dead.
///
/// # Errors
/// As [`Keep::load`].
pub fn load<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, KeepError> {
    Ok(load_with_sum(dir, name)?.map(|(value, _)| value))
}

/// Reads a value of a directory that is not locked, with all that was added to it.
///
/// # Errors
/// As [`Keep::load`].
pub fn load_grown<T: DeserializeOwned, C: DeserializeOwned>(
    dir: &Path,
    name: &str,
    add: impl Fn(&mut T, C) -> bool,
) -> Result<Option<T>, KeepError> {
    let Some((mut value, sum)) = load_with_sum(dir, name)? else { return Ok(None) };
    for change in growth::read(dir, name, &sum) {
        // What is not understood ends it, as a torn record does.
        let Ok(change) = serde_json::from_slice(&change) else { break };
        if !add(&mut value, change) {
            break;
        }
    }
    Ok(Some(value))
}

/// The last plan of a directory that is not locked, with what has changed of it since it was saved whole.
///
/// # Errors
/// As [`Keep::load`].
pub fn load_plan(dir: &Path) -> Result<Option<NodePlan>, KeepError> {
    let change = |plan: &mut NodePlan, change: PlanChange| match change.onto(Some(plan)) {
        Ok(changed) => {
            *plan = changed;
            true
        }
        Err(_) => false,
    };
    load_grown(dir, PLAN, change)
}

/// The same, with the checksum of what was saved.
fn load_with_sum<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<(T, Vec<u8>)>, KeepError> {
    let mut damage = None;
    for copy in copies(name) {
        let path = dir.join(copy);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(KeepError::Io { what: "read", path, source }),
        };
        let read = opened(&text).and_then(|json| serde_json::from_slice(json).map_err(|e| e.to_string()));
        match read {
            Ok(value) => return Ok(Some((value, text[..SUM].to_vec()))),
            Err(why) => {
                damage.get_or_insert((path, why));
            }
        }
    }
    match damage {
        None => Ok(None),
        Some((path, why)) => Err(KeepError::Damaged { path, why }),
    }
}

fn encoded<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, KeepError> {
    serde_json::to_vec(value).map_err(|e| KeepError::Io { what: "encode", path: path.to_owned(), source: e.into() })
}

/// Letters of a checksum.
const SUM: usize = 64;

/// A checksum line, then the bytes.
fn sealed(json: &[u8]) -> Vec<u8> {
    let mut text = format!("{}\n", hex(&Sha256::digest(json))).into_bytes();
    text.extend_from_slice(json);
    text
}

fn opened(text: &[u8]) -> Result<&[u8], String> {
    let at = text.iter().position(|&b| b == b'\n').ok_or("no checksum line")?;
    let (sum, json) = (&text[..at], &text[at + 1..]);
    if hex(&Sha256::digest(json)).as_bytes() == sum { Ok(json) } else { Err("the checksum does not fit".to_owned()) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Either the old file or the new one, never half of one (rename(2) is atomic; the data is on disk before it).
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), KeepError> {
    let fresh = path.with_added_extension("new");
    let written = (|| {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    })();
    written.map_err(|source| KeepError::Io { what: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_the_same_state_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Keep::open(dir.path()).unwrap();
        assert!(matches!(Keep::open(dir.path()), Err(KeepError::Taken { .. })));
    }

    #[test]
    fn a_plan_survives_the_loss_of_either_copy() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        for lost in ["plan.1", "plan.2"] {
            keep.save("plan", &vec![1, 2, 3]).unwrap();
            fs::write(dir.path().join(lost), b"torn").unwrap();
            assert_eq!(keep.load::<Vec<u8>>("plan").unwrap(), Some(vec![1, 2, 3]), "without {lost}");
        }
    }

    #[test]
    fn between_its_two_copies_a_plan_is_the_newer_one_and_survives_the_loss_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        keep.save("plan", &1).unwrap();
        let second = keep.save_first("plan", &2).unwrap();
        assert_eq!(keep.load("plan").unwrap(), Some(2));
        fs::write(dir.path().join("plan.1"), b"torn").unwrap();
        assert_eq!(keep.load("plan").unwrap(), Some(1));
        second.write().unwrap();
        assert_eq!(keep.load("plan").unwrap(), Some(2));
    }

    #[test]
    fn a_plan_of_which_both_copies_are_damaged_is_an_error_and_not_an_empty_plan() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        keep.save("plan", &"whole").unwrap();
        for copy in copies("plan") {
            let mut bytes = fs::read(dir.path().join(&copy)).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(dir.path().join(copy), bytes).unwrap();
        }
        assert!(matches!(keep.load::<String>("plan"), Err(KeepError::Damaged { .. })));
        assert_eq!(keep.load::<String>("never-written").unwrap(), None);
    }
}
