//! What stands in the files: what the core must not call, what every file begins with, what no file may name.

use std::fs;
use std::path::{Path, PathBuf};

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file of the project, without what is built and what is hidden from git.
fn files() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let passed_over = matches!(name.as_str(), "target" | ".git" | ".lab" | "corpus" | "artifacts" | "proptest-regressions");
            if passed_over {
                continue;
            }
            if path.symlink_metadata().unwrap().is_dir() {
                walk(&path, found);
            } else {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    files().into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// The lines of code that are built for users: without comments, and without what stands behind `#[cfg(test)]` to the end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let tests = text.find("#[cfg(test)]").unwrap_or(text.len());
    text[..tests].lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or_default()))
}

/// What the core must not call or name, with what to do instead.
const FORBIDDEN_IN_CORE: [(&str, &str); 20] = [
    ("std::fs", "take the text as an argument"),
    ("std::env::", "take the setting as an argument"),
    ("std::process", "return what is to be done"),
    ("std::thread", "a decision is a function"),
    ("std::sync::Mutex", "a decision has no state of its own"),
    ("std::os::", "the core runs anywhere"),
    ("TcpStream", "the core opens no sockets"),
    ("TcpListener", "the core opens no sockets"),
    ("UdpSocket", "the core opens no sockets"),
    ("UnixStream", "the core opens no sockets"),
    ("UnixListener", "the core opens no sockets"),
    ("SystemTime", "take the time as an argument"),
    ("Instant::now", "take the time as an argument"),
    ("Timestamp::now", "take the time as an argument"),
    ("Zoned::now", "take the time as an argument"),
    ("tokio", "async is at the edges"),
    ("async ", "async is at the edges"),
    ("tracing::", "return the reason; the caller logs it"),
    ("println!", "return the reason; the caller prints it"),
    ("unsafe ", "the core needs none"),
];

#[test]
fn the_core_calls_nothing_that_touches_the_world() {
    let mut found = Vec::new();
    let core = root().join("policy/src");
    let of_core: Vec<PathBuf> = sources().into_iter().filter(|path| path.starts_with(&core) && !is_test(path)).collect();
    assert!(of_core.len() > 20, "the core's sources are missing");
    for path in of_core {
        let text = fs::read_to_string(&path).unwrap();
        for (line, code) in code(&text) {
            for (word, instead) in FORBIDDEN_IN_CORE.iter().filter(|(word, _)| code.contains(word)) {
                found.push(format!("{}:{line}: {word}: {instead}", shown(&path)));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Modules that are only built for tests, by the name this project gives them.
fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "tests") || path.file_stem().is_some_and(|stem| stem == "tests")
}

#[test]
fn every_source_file_begins_by_saying_what_it_is_for() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|path| !is_test(path) || path.file_name().is_some_and(|name| name == "main.rs" || name == "lib.rs"))
        .filter(|path| !fs::read_to_string(path).unwrap().starts_with("//!"))
        .map(|path| shown(&path))
        .collect();
    assert!(silent.is_empty(), "without module docs: {silent:?}");
}

#[test]
fn no_file_names_a_place_of_one_machine() {
    // Put together here, so that this file is not the first to be found.
    let places = ["home", "Users", "work"].map(|place| format!("/{place}/"));
    let mut found = Vec::new();
    for path in files() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (line, said) in text.lines().enumerate() {
            for place in places.iter().filter(|place| names_place(said, place)) {
                found.push(format!("{}:{}: {place}", shown(&path), line + 1));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// At the beginning of a path, not within one or within an address.
fn names_place(line: &str, place: &str) -> bool {
    line.match_indices(place).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && !"/._-}$".contains(c))
    })
}

#[test]
fn words_that_are_kept_out_are_out() {
    let words = [["white", "list"], ["black", "list"]].map(|halves| halves.concat());
    let mut found = Vec::new();
    for path in files() {
        let name = shown(&path);
        if ["manager", "helper", "util", "utils"].iter().any(|word| path.file_stem().is_some_and(|stem| stem == *word)) {
            found.push(format!("{name}: a file is named for what it is about"));
        }
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let text = text.to_ascii_lowercase();
        found.extend(words.iter().filter(|word| text.contains(*word)).map(|word| format!("{name}: {word}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn what_belongs_to_every_project_is_there() {
    let files = [
        "Cargo.lock",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "deny.toml",
        "clippy.toml",
        "rustfmt.toml",
        "rust-toolchain.toml",
        "crds/README.md",
    ];
    let missing: Vec<&str> = files.into_iter().filter(|file| !fs::metadata(root().join(file)).is_ok_and(|m| m.len() > 0)).collect();
    assert!(missing.is_empty(), "missing or empty: {missing:?}");
}

#[test]
fn the_toolchain_is_pinned_to_what_the_manifest_asks_for() {
    let pinned = fs::read_to_string(root().join("rust-toolchain.toml")).unwrap();
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("no {key}")).to_owned();
        line.split('"').nth(1).unwrap().to_owned()
    };
    let (channel, asked) = (value(&pinned, "channel"), value(&manifest, "rust-version"));
    assert!(channel.starts_with(&asked), "the toolchain is {channel}, the manifest asks for {asked}");
    assert!(channel.split('.').count() == 3, "{channel} moves: pin a patch release");
}
