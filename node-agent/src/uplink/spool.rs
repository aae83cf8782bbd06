//! What was seen and is not acknowledged yet, on disk. One file, appended to and now and then written anew.
//!
//! # Why it stays small
//! Deltas of one edge are merged until they are given a number, and numbers are given only while the controller listens. So what
//! waits is bounded by the number of distinct edges, however long the controller is away; numbered batches are a handful.
//!
//! # Why nothing is counted twice
//! A numbered batch never changes again, and is on disk (flushed) before it is sent. The controller remembers the highest number that
//! it committed for the spool's id and says it when a session begins: everything up to it is forgotten here, the rest is sent again.
//! If the controller remembers a higher number than this spool ever gave, the spool lost its end (a damaged file): it takes a new id, so that
//! no new batch is mistaken for one that the controller has. Only in that case something may be counted twice: what waited before the
//! damage and was numbered behind it. It is kept, because an edge counted twice is better than an edge forgotten, and the damage is told.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use policy::{EdgeDelta, EdgeKey, Evidence, Health, wire};
use prost::Message;
use tracing::warn;

use super::journal::{Records, append};
use crate::chain::chain;

/// The version of the file's format.
const FORMAT: u32 = 1;

/// Kinds of records.
const HEAD: u8 = 1;
const DELTA: u8 = 2;
const STRETCH: u8 = 3;
const BATCH: u8 = 4;
const ACKNOWLEDGED: u8 = 5;

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Distinct edges that wait for a number; what is seen of further ones is lost, and counted.
    pub edges: usize,
    /// Edges to a batch.
    pub batch: usize,
    /// Stretches of health that wait; beyond it the oldest are joined.
    pub stretches: usize,
    /// The file is written anew when it is larger than this and larger than four times what is live, bytes.
    pub rewrite: u64,
}

impl Default for Limits {
    fn default() -> Self {
        // 200,000 edges are some 60 MB in memory and 30 MB on disk, and more than a node of a thousand containers has.
        Self { edges: 200_000, batch: 1000, stretches: 1024, rewrite: 4 << 20 }
    }
}

/// What can go wrong with the spool's file.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system said no.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Written by a later version.
    #[error(
        "the spool {path} has format {found}, this agent understands {FORMAT}; it was not touched. Run the newer agent again, or move the file away: what waits in it is then not counted"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

/// What was found when the spool was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Edges and batches that were waiting.
    pub edges: usize,
    /// See `edges`.
    pub batches: usize,
    /// Bytes at the end that could not be read (a write that was cut off, or damage), put aside under the name given.
    pub unreadable: u64,
    /// Where the unreadable file was kept, for whoever wants to look.
    pub kept: Option<PathBuf>,
    /// Whole records that make no sense, by reason.
    pub skipped: BTreeMap<String, u64>,
}

/// The spool.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    limits: Limits,
    file: File,
    /// Length of the file as far as it is good.
    length: u64,
    /// Its length when it was last written anew.
    written_anew: u64,
    /// Something is in memory that the file has not: the disk said no. Nothing is numbered until it is written.
    behind: bool,
    id: String,
    next: u64,
    batches: VecDeque<wire::Batch>,
    waiting: BTreeMap<EdgeKey, Evidence>,
    health: VecDeque<Health>,
    lost: u64,
}

impl Spool {
    /// Opens the spool of this directory, or begins one.
    ///
    /// # Errors
    /// The file can't be opened or read, or is of a newer version.
    pub fn open(dir: &Path, limits: Limits) -> Result<(Self, Recovery), SpoolError> {
        let path = dir.join("spool");
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(mut file) => {
                file.read_to_end(&mut bytes).map_err(io("read", &path))?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("open", &path)(e)),
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(io("open", &path))?;
        let mut spool = Self {
            path,
            limits,
            file,
            length: 0,
            written_anew: 0,
            behind: false,
            id: new_id()?,
            next: 1,
            batches: VecDeque::new(),
            waiting: BTreeMap::new(),
            health: VecDeque::new(),
            lost: 0,
        };
        let recovery = spool.replay(&bytes)?;
        // A whole file to begin with: a cut end is gone, a new id is on disk before it is told to anybody. Without room it is behind, which
        // keeps nobody from enforcing.
        if let Err(error) = spool.rewrite() {
            warn!(error = chain(&error), "the spool could not be written anew; tried again with the next write");
        }
        Ok((spool, recovery))
    }

    fn replay(&mut self, bytes: &[u8]) -> Result<Recovery, SpoolError> {
        let mut recovery = Recovery::default();
        let mut records = Records::of(bytes);
        for (kind, payload) in records.by_ref() {
            if let Err(reason) = self.replay_one(kind, payload)? {
                *recovery.skipped.entry(reason).or_default() += 1;
            }
        }
        let unreadable = bytes.len() - records.read();
        if unreadable > 0 {
            let kept = self.path.with_extension("damaged");
            // The last one is enough to see what happened; more would fill the disk of a machine that is failing.
            recovery.kept = std::fs::write(&kept, bytes).is_ok().then_some(kept);
            recovery.unreadable = u64::try_from(unreadable).unwrap_or(u64::MAX);
        }
        recovery.edges = self.waiting.len();
        recovery.batches = self.batches.len();
        Ok(recovery)
    }

    /// Takes one record; the inner error is the reason why it was left out.
    fn replay_one(&mut self, kind: u8, payload: &[u8]) -> Result<Result<(), String>, SpoolError> {
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).map_err(|_| "a number of a wrong length".to_owned());
        Ok(match kind {
            HEAD => {
                let Some((format, rest)) = payload.split_first_chunk::<4>() else { return Ok(Err("a short head".to_owned())) };
                let found = u32::from_le_bytes(*format);
                if found > FORMAT {
                    return Err(SpoolError::Newer { path: self.path.clone(), found });
                }
                match rest.split_first_chunk::<8>() {
                    Some((next, id)) if !id.is_empty() => {
                        self.next = u64::from_le_bytes(*next);
                        self.id = String::from_utf8_lossy(id).into_owned();
                        Ok(())
                    }
                    Some(_) | None => Err("a short head".to_owned()),
                }
            }
            DELTA => match read::<wire::EdgeDelta, EdgeDelta>(payload) {
                Ok(delta) => {
                    self.waiting.entry(delta.key).or_default().merge(&delta.seen);
                    Ok(())
                }
                Err(reason) => Err(reason),
            },
            STRETCH => match read::<wire::Health, Health>(payload) {
                Ok(stretch) => {
                    push_stretch(&mut self.health, self.limits.stretches, stretch);
                    Ok(())
                }
                Err(reason) => Err(reason),
            },
            BATCH => match wire::Batch::decode(payload) {
                Ok(batch) => {
                    for edge in &batch.edges {
                        // Sealing took all that waited for this edge.
                        if let Ok(delta) = EdgeDelta::try_from(edge.clone()) {
                            self.waiting.remove(&delta.key);
                        }
                    }
                    self.health.clear();
                    self.next = self.next.max(batch.seq.saturating_add(1));
                    self.batches.push_back(batch);
                    Ok(())
                }
                Err(e) => Err(e.to_string()),
            },
            ACKNOWLEDGED => number(payload).map(|seq| self.batches.retain(|batch| batch.seq > seq)),
            _ => Err("a record of an unknown kind".to_owned()),
        })
    }

    /// Id of the spool; sequence numbers count within it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Lowest sequence number that is not acknowledged.
    pub fn first_unsent(&self) -> u64 {
        self.batches.front().map_or(self.next, |batch| batch.seq)
    }

    /// Numbered batches that are not acknowledged, oldest first.
    pub fn batches(&self) -> impl ExactSizeIterator<Item = &wire::Batch> {
        self.batches.iter()
    }

    /// Whether something waits for a number.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty() || !self.health.is_empty()
    }

    /// How many distinct edges wait for a number.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Length of the file, bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Takes what was seen, and writes it down. Of an edge for which there is no room the flows are counted as lost, and told with
    /// the next stretch of health.
    ///
    /// # Errors
    /// The file system says no: everything is taken all the same and kept in memory; the next call writes it.
    pub fn take(
        &mut self,
        deltas: impl IntoIterator<Item = (EdgeKey, Evidence)>,
        stretches: impl IntoIterator<Item = Health>,
    ) -> Result<(), SpoolError> {
        let mut bytes = Vec::new();
        for (key, seen) in deltas {
            if self.waiting.len() >= self.limits.edges && !self.waiting.contains_key(&key) {
                self.lose(flows(&seen));
                continue;
            }
            append(&mut bytes, DELTA, &wire::EdgeDelta::of(&key, &seen).encode_to_vec());
            self.waiting.entry(key).or_default().merge(&seen);
        }
        for mut stretch in stretches {
            if self.lost > 0 {
                stretch.lost = stretch.lost.saturating_add(std::mem::take(&mut self.lost));
                stretch.healthy = false;
            }
            append(&mut bytes, STRETCH, &wire::Health::from(&stretch).encode_to_vec());
            push_stretch(&mut self.health, self.limits.stretches, stretch);
        }
        self.write(&bytes)
    }

    /// Counts flows (or records) of which nothing else is known any more.
    pub fn lose(&mut self, flows: u64) {
        self.lost = self.lost.saturating_add(flows);
    }

    /// What was lost and not told yet.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Gives a number to what waits, as much as a batch holds; it is on disk, flushed, when this returns. `None`: nothing waits.
    ///
    /// # Errors
    /// The file system says no: nothing was numbered.
    pub fn seal(&mut self) -> Result<Option<wire::Batch>, SpoolError> {
        if self.behind {
            self.rewrite()?;
        }
        if !self.has_waiting() {
            return Ok(None);
        }
        let edges = self.waiting.iter().take(self.limits.batch).map(|(key, seen)| wire::EdgeDelta::of(key, seen)).collect();
        let batch = wire::Batch { seq: self.next, edges, health: self.health.iter().map(wire::Health::from).collect() };
        let mut bytes = Vec::new();
        append(&mut bytes, BATCH, &batch.encode_to_vec());
        // Not `write`: a batch of which it is not certain that it is on disk must not get a number.
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            self.behind = true;
            return Err(io("write", &self.path)(e));
        }
        self.length += length(&bytes);
        let taken: Vec<EdgeKey> = self.waiting.keys().take(self.limits.batch).cloned().collect();
        for key in taken {
            self.waiting.remove(&key);
        }
        self.health.clear();
        self.next += 1;
        self.batches.push_back(batch.clone());
        Ok(Some(batch))
    }

    /// The controller has everything up to this number.
    ///
    /// # Errors
    /// The file system says no: it is forgotten all the same; should the agent die now, the batches are sent again and not counted
    /// again.
    pub fn acknowledged(&mut self, seq: u64) -> Result<(), SpoolError> {
        if self.batches.front().is_none_or(|batch| batch.seq > seq) {
            return Ok(());
        }
        self.batches.retain(|batch| batch.seq > seq);
        let mut bytes = Vec::new();
        append(&mut bytes, ACKNOWLEDGED, &seq.to_le_bytes());
        self.write(&bytes)
    }

    /// A session begins and the controller says what it has of this spool. True if the spool had to take a new id, because the
    /// controller has more than was ever numbered here: the session has to begin again under the new one.
    ///
    /// # Errors
    /// The file system says no.
    pub fn resume(&mut self, acknowledged: u64) -> Result<bool, SpoolError> {
        if acknowledged < self.next {
            self.acknowledged(acknowledged)?;
            return Ok(false);
        }
        self.id = new_id()?;
        self.next = 1;
        // All that was numbered here the controller has.
        self.batches.clear();
        self.behind = true;
        self.rewrite()?;
        Ok(true)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let live = self.written_anew.max(self.limits.rewrite / 4);
        if self.behind || self.length + length(bytes) > live.saturating_mul(4) {
            return self.rewrite();
        }
        if bytes.is_empty() {
            return Ok(());
        }
        if let Err(e) = self.file.write_all(bytes) {
            // A part may be in the file: reading ends there, so nothing may follow it.
            self.behind = true;
            return Err(io("write", &self.path)(e));
        }
        self.length += length(bytes);
        Ok(())
    }

    /// Writes all that is live into a new file and puts it into the place of the old one.
    fn rewrite(&mut self) -> Result<(), SpoolError> {
        self.behind = true;
        let mut bytes = Vec::new();
        let mut head = FORMAT.to_le_bytes().to_vec();
        head.extend_from_slice(&self.next.to_le_bytes());
        head.extend_from_slice(self.id.as_bytes());
        append(&mut bytes, HEAD, &head);
        // Batches first: when they are read, they take away what waits.
        for batch in &self.batches {
            append(&mut bytes, BATCH, &batch.encode_to_vec());
        }
        for (key, seen) in &self.waiting {
            append(&mut bytes, DELTA, &wire::EdgeDelta::of(key, seen).encode_to_vec());
        }
        for stretch in &self.health {
            append(&mut bytes, STRETCH, &wire::Health::from(stretch).encode_to_vec());
        }
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new).map_err(io("make", &new))?;
        file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(io("write", &new))?;
        std::fs::rename(&new, &self.path).map_err(io("rename to its place", &new))?;
        // Else the loss of power could bring the old file back, which doesn't know what was numbered since.
        if let Some(folder) = self.path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("write down", folder))?;
        }
        self.file = file;
        self.length = length(&bytes);
        self.written_anew = self.length;
        self.behind = false;
        Ok(())
    }
}

/// Joins what can be joined, and, when there is no room, the two oldest.
fn push_stretch(health: &mut VecDeque<Health>, room: usize, stretch: Health) {
    match health.back_mut() {
        Some(last) if last.continues_as(&stretch) => last.join(&stretch),
        Some(_) | None => health.push_back(stretch),
    }
    if health.len() > room.max(1)
        && let (Some(mut first), Some(second)) = (health.pop_front(), health.pop_front())
    {
        first.join(&second);
        health.push_front(first);
    }
}

/// How many flows an evidence stands for.
pub(super) fn flows(seen: &Evidence) -> u64 {
    [seen.used(), seen.attempts(), seen.denied, seen.would_deny].into_iter().fold(0, u64::saturating_add).max(1)
}

fn read<M: Message + Default, T: TryFrom<M, Error = wire::WireError>>(payload: &[u8]) -> Result<T, String> {
    let message = M::decode(payload).map_err(|e| e.to_string())?;
    T::try_from(message).map_err(|e| e.reason())
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Io { what, path, source }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// 128 random bits in hex.
fn new_id() -> Result<String, SpoolError> {
    let source = Path::new("/dev/urandom");
    let mut bits = [0; 16];
    File::open(source).and_then(|mut f| f.read_exact(&mut bits)).map_err(io("read", source))?;
    Ok(bits.iter().map(|b| format!("{b:02x}")).collect())
}

/// Any bytes as records of a spool, for the fuzz targets: the first byte of each stretch of bytes is its kind, the second its length. The
/// checksums are put right, or nothing would get past them; and the bytes as they are.
#[cfg(any(fuzzing, test))]
pub(crate) fn read_any(bytes: &[u8]) {
    let mut file = Vec::new();
    let mut rest = bytes;
    while let [kind, length, after @ ..] = rest {
        let (payload, next) = after.split_at(usize::from(*length).min(after.len()));
        super::journal::append(&mut file, *kind % 8, payload);
        rest = next;
    }
    for (kind, payload) in Records::of(&file).chain(Records::of(bytes)) {
        match kind {
            DELTA => drop(read::<wire::EdgeDelta, EdgeDelta>(payload)),
            STRETCH => drop(read::<wire::Health, Health>(payload)),
            _ => drop(wire::Batch::decode(payload)),
        }
    }
}

#[cfg(test)]
mod tests;
