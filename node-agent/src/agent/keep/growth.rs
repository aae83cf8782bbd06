//! What has changed of a value since it was saved: a file that grows by a line a change.
//!
//! # Why
//! A ruleset of 100,000 pairs is 20 MB of JSON, and mostly one rule or one container moves. The lines are handed to the kernel and not
//! awaited on the disk: they outlive the agent. Should the whole host lose power, its containers are gone as well, and the plan, which
//! is on disk, says what holds for those that come: its own lines are awaited, and there are two copies of them.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{KeepError, SUM, copies, hex};

/// Lines are added up to this size, or to that of the value.
const ENOUGH: u64 = 1 << 20;

/// Which of the two.
#[derive(Clone, Copy, Debug)]
pub(super) enum Copy {
    First,
    Second,
}

pub(super) fn files(name: &str) -> [String; 2] {
    [format!("{name}.log"), format!("{name}.log.2")]
}

fn file(name: &str, copy: Copy) -> String {
    let [first, second] = files(name);
    match copy {
        Copy::First => first,
        Copy::Second => second,
    }
}

fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeepError {
    let path = path.to_owned();
    move |source| KeepError::Io { what, path, source }
}

/// The value is saved whole: its lines are in it.
pub(super) fn forget(dir: &Path, name: &str) -> Result<(), KeepError> {
    for path in files(name).map(|file| dir.join(file)) {
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(io_at("remove", &path)(source)),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
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
    append_to(dir, name, Copy::First, json, false)
}

/// As `append`, to one of the copies, and `awaited` on the disk or not.
pub(super) fn append_to(dir: &Path, name: &str, copy: Copy, json: &[u8], awaited: bool) -> Result<bool, KeepError> {
    let (sum, length) = base(dir, name)?;
    let path = dir.join(file(name, copy));
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
        if awaited {
            file.sync_all()?;
            if grown == 0 {
                // Its name too.
                fs::File::open(dir)?.sync_all()?;
            }
        }
        Ok(true)
    };
    write().map_err(io_at("write", &path))
}

/// The changes since the value with this checksum was saved, up to the first that is not whole; of the copy that has more.
pub(super) fn read(dir: &Path, name: &str, sum: &[u8]) -> Vec<Vec<u8>> {
    let [first, second] = [Copy::First, Copy::Second].map(|copy| read_copy(&dir.join(file(name, copy)), sum));
    if second.len() > first.len() { second } else { first }
}

fn read_copy(path: &Path, sum: &[u8]) -> Vec<Vec<u8>> {
    let Ok(file) = fs::File::open(path) else { return Vec::new() };
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
        let add = |sum: &mut u64, more: u64| {
            *sum += more;
            true
        };
        keep.load_grown("sum", add).unwrap()
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
    fn what_must_be_there_comes_back_by_either_copy_and_ends_before_what_does_not_fit() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::open(dir.path()).unwrap();
        keep.save("sum", &1_u64).unwrap();
        for more in [20_u64, 300] {
            keep.append_first("sum", &more).unwrap().expect("there is room").write().unwrap();
        }
        assert_eq!(sums(&keep), Some(321));
        let [log, its_copy] = files("sum").map(|file| dir.path().join(file));
        let whole = fs::read(&log).unwrap();
        for (what, damaged) in [("cut", whole[..whole.len() - 3].to_vec()), ("empty", Vec::new()), ("spoiled", vec![b'x'; whole.len()])] {
            fs::write(&log, damaged).unwrap();
            assert_eq!(sums(&keep), Some(321), "{what}");
        }
        fs::remove_file(&log).unwrap();
        assert_eq!(sums(&keep), Some(321), "by the other copy");
        fs::write(&log, whole).unwrap();
        fs::remove_file(its_copy).unwrap();
        assert_eq!(sums(&keep), Some(321), "killed before the second copy");
        let below_100 = |sum: &mut u64, more: u64| {
            let fits = more < 100;
            *sum += if fits { more } else { 0 };
            fits
        };
        assert_eq!(keep.load_grown("sum", below_100).unwrap(), Some(21));
        assert!(!keep.takes_lines("sum"), "the end may be torn");
        keep.save("sum", &5_u64).unwrap();
        assert_eq!(sums(&keep), Some(5), "they are in it");
        assert!(keep.takes_lines("sum"));
        fs::write(dir.path().join("sum.1"), "torn").unwrap();
        assert!(!keep.takes_lines("sum"), "they would be about another value");
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
