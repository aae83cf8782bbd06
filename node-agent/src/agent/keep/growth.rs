//! What has changed of a value since it was saved: a file that grows by a line a change.
//!
//! # Why
//! A ruleset of 100,000 pairs is 20 MB of JSON, and mostly one rule or one container moves. The lines are handed to the kernel and not
//! awaited on the disk: they outlive the agent. Should the whole host lose power, its containers are gone as well, and the plan, which
//! is on disk, says what holds for those that come.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{KeepError, SUM, copies, hex};

/// Lines are added up to this size, or to that of the value.
const ENOUGH: u64 = 1 << 20;

pub(super) fn file(name: &str) -> String {
    format!("{name}.log")
}

fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeepError {
    let path = path.to_owned();
    move |source| KeepError::Io { what, path, source }
}

/// The value is saved whole: its lines are in it.
pub(super) fn forget(dir: &Path, name: &str) -> Result<(), KeepError> {
    let path = dir.join(file(name));
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_at("remove", &path)(source)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The checksum line of what was saved, and its length.
fn base(dir: &Path, name: &str) -> Result<(Vec<u8>, u64), KeepError> {
    let [first, _] = copies(name);
    let path = dir.join(first);
    let read = || {
        let mut file = fs::File::open(&path)?;
        let mut sum = vec![0; SUM];
        file.read_exact(&mut sum)?;
        Ok((sum, file.metadata()?.len()))
    };
    read().map_err(io_at("read", &path))
}

/// Adds a line. False: enough of them.
pub(super) fn append(dir: &Path, name: &str, json: &[u8]) -> Result<bool, KeepError> {
    let (sum, length) = base(dir, name)?;
    let path = dir.join(file(name));
    let write = || {
        let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
        let grown = file.metadata()?.len();
        if grown > length.max(ENOUGH) {
            return Ok(false);
        }
        let mut lines = Vec::new();
        if grown == 0 {
            // What the lines are about.
            lines.extend_from_slice(&sum);
            lines.push(b'\n');
        }
        lines.extend_from_slice(hex(&Sha256::digest(json)).as_bytes());
        lines.push(b' ');
        lines.extend_from_slice(json);
        lines.push(b'\n');
        file.write_all(&lines)?;
        Ok(true)
    };
    write().map_err(io_at("write", &path))
}

/// The changes since the value with this checksum was saved, up to the first that is not whole.
pub(super) fn read(dir: &Path, name: &str, sum: &[u8]) -> Vec<Vec<u8>> {
    let Ok(file) = fs::File::open(dir.join(file(name))) else { return Vec::new() };
    let mut lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
    if lines.next().is_none_or(|first| first != sum) {
        return Vec::new();
    }
    let whole = |line: Vec<u8>| {
        let json = line.get(SUM + 1..)?.to_vec();
        (hex(&Sha256::digest(&json)).as_bytes() == &line[..SUM]).then_some(json)
    };
    lines.map_while(whole).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Keep, load};
    use super::*;

    fn sums(keep: &Keep) -> Option<u64> {
        keep.load_grown::<u64, u64>("sum", |sum, more| *sum += more).unwrap()
    }

    #[test]
    fn a_value_comes_back_with_all_that_was_added_since_it_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        assert_eq!(sums(&keep), None);
        keep.save("sum", &1_u64).unwrap();
        assert!(keep.append("sum", &20_u64).unwrap() && keep.append("sum", &300_u64).unwrap());
        assert_eq!(sums(&keep), Some(321));
        fs::write(dir.path().join("sum.1"), b"torn").unwrap();
        assert_eq!(sums(&keep), Some(321), "by the other copy");
        keep.save("sum", &5_u64).unwrap();
        assert_eq!(sums(&keep), Some(5), "they are in it");
        assert!(keep.append("sum", &20_u64).unwrap());
        assert_eq!(sums(&keep), Some(25));
        keep.forget().unwrap();
    }

    #[test]
    fn a_torn_line_ends_what_was_added_and_lines_about_another_value_are_not_added() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        let log = dir.path().join("sum.log");
        keep.save("sum", &1_u64).unwrap();
        for more in [20_u64, 300, 4000] {
            keep.append("sum", &more).unwrap();
        }
        let whole = fs::read(&log).unwrap();
        fs::write(&log, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(sums(&keep), Some(321));
        let mut flipped = whole.clone();
        let second = whole.iter().enumerate().filter(|(_, b)| **b == b'\n').nth(1).unwrap().0;
        flipped[second + 5] ^= 1;
        fs::write(&log, &flipped).unwrap();
        assert_eq!(sums(&keep), Some(21));
        keep.save("sum", &2_u64).unwrap();
        fs::write(&log, &whole).unwrap();
        assert_eq!(sums(&keep), Some(2), "as if the agent was killed before the lines were removed");
    }

    #[test]
    fn a_value_that_grew_enough_is_to_be_saved_whole() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        keep.save("text", &"").unwrap();
        let long = "x".repeat(1 << 18);
        let lines = (0..).take_while(|_| keep.append("text", &long).unwrap()).count();
        assert_eq!(lines, 4);
        keep.save("text", &"").unwrap();
        assert!(keep.append("text", &long).unwrap());
        assert_eq!(load::<String>(dir.path(), "text").unwrap(), Some(String::new()));
    }
}
