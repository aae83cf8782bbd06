//! What is wrong in a text is said, with the place; nothing is skipped, guessed or widened. `bad-input/NAME.yaml` is the text,
//! `NAME.error` what a person reads; UPDATE=1 rewrites the latter.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::time::{Duration, Instant};

use crds::yaml::{MAX_BYTES, MAX_DEPTH, MAX_DOCUMENTS, ReadError, read};

#[test]
fn every_bad_text_is_refused_with_its_place_and_reason() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad-input");
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    names.sort();
    assert!(names.len() > 20, "the cases are missing");
    let mut wrong = Vec::new();
    for path in names {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let said = match read(&text) {
            Ok(objects) => {
                // A text that can be read may still ask for what can't be done.
                objects.iter().find_map(|o| o.intent().err()).map_or_else(|| "accepted".to_owned(), |refused| refused.to_string())
            }
            Err(error) => error.to_string(),
        } + "\n";
        let golden = path.with_extension("error");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&golden, &said).unwrap();
        }
        let wanted = std::fs::read_to_string(&golden).unwrap_or_default();
        if said != wanted || said.starts_with("accepted") {
            wrong.push(format!("{name}\n  wanted {wanted}  said   {said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_good_text_is_accepted_and_comes_back_the_same() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/good-input");
    let mut cases = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let objects = read(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(!objects.is_empty());
        let written = crds::yaml::write(&objects);
        assert_eq!(read(&written).unwrap(), objects, "{written}");
        assert_eq!(crds::yaml::write(&read(&written).unwrap()), written, "writing is stable");
        cases += 1;
    }
    assert!(cases > 0);
}

/// In debug builds on a busy machine; what is guarded against takes minutes or all memory.
const AT_ONCE: Duration = Duration::from_secs(20);

#[track_caller]
fn refused_at_once(text: &str) -> ReadError {
    let begin = Instant::now();
    let error = read(text).unwrap_err();
    assert!(begin.elapsed() < AT_ONCE, "{:?}: {error}", begin.elapsed());
    error
}

const HEAD: &str = "apiVersion: bulkhead.dev/v1alpha1\nkind: Segment\nmetadata:\n  name: shop\n";

#[test]
fn a_text_that_is_too_long_is_not_looked_at() {
    let error = refused_at_once(&"#".repeat(MAX_BYTES + 1));
    assert!(matches!(error, ReadError::TooLong { bytes } if bytes == MAX_BYTES + 1));
}

#[test]
fn a_stream_of_too_many_documents_is_refused() {
    let error = refused_at_once(&"---\n".repeat(MAX_DOCUMENTS + 1));
    assert!(matches!(error, ReadError::TooMany), "{error}");
}

#[test]
fn brackets_without_end_are_refused_before_the_scanner_sees_them() {
    for bracket in ["[", "{a: ", "[{x: "] {
        let error = refused_at_once(&format!("{HEAD}spec:\n  members: {}", bracket.repeat(1_000_000)));
        assert!(matches!(error, ReadError::TooDeep { line: 6 }), "{error}");
    }
    let deep = format!("{HEAD}spec:\n  members: {}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
    assert!(matches!(refused_at_once(&deep), ReadError::Malformed { .. }));
}

#[test]
fn blocks_without_end_are_refused() {
    for text in ["- ".repeat(100_000), (0..3000).map(|n| format!("{}a:\n", " ".repeat(n))).collect::<String>(), "? ".repeat(100_000)] {
        let error = refused_at_once(&format!("{HEAD}spec:\n{text}"));
        assert!(matches!(error, ReadError::Malformed { .. }), "{error}");
    }
}

#[test]
fn an_alias_bomb_unfolds_into_nothing() {
    // Nine levels of nine: 9^9 texts, wherever the kinds would let it stand.
    let mut bomb = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n".to_owned();
    for (this, last) in ('b'..='i').zip('a'..) {
        bomb += &format!("{this}: &{this} [{}]\n", vec![format!("*{last}"); 9].join(", "));
    }
    let indented: String = bomb.lines().map(|line| format!("    {line}\n")).collect();
    for text in [
        format!("{bomb}{HEAD}spec: {{}}\n"),
        format!("{HEAD}  annotations:\n{indented}spec: {{}}\n"),
        format!("{HEAD}  managedFields:\n{indented}spec:\n  members: 5\n"),
        format!("{HEAD}spec:\n  members:\n{indented}"),
        format!("{HEAD}spec:\n  x:\n{indented}"),
    ] {
        let error = refused_at_once(&text);
        assert!(matches!(error, ReadError::Malformed { .. }), "{error}");
    }
    // An alias of itself.
    refused_at_once(&format!("{HEAD}spec: &a\n  members: [*a]\n"));
}

#[test]
fn many_aliases_of_a_long_list_are_no_way_to_fill_the_memory() {
    let list: String = (0..2000).map(|n| format!("{{project: p{n}}}, ")).collect();
    let mut text = format!("{HEAD}spec:\n  members: &m [{list}]\n");
    for n in 0..3000 {
        text += &format!("---\napiVersion: bulkhead.dev/v1alpha1\nkind: Segment\nmetadata:\n  name: s{n}\nspec:\n  members: *m\n");
    }
    // Anchors end with their document (YAML 1.2.2, 9.2).
    assert!(refused_at_once(&text).to_string().contains("unknown anchor"));
}

#[test]
fn bytes_that_are_no_text_are_an_error() {
    for text in ["\0", "\u{1}", "\u{feff}\u{0}", "apiVersion: \u{7}"] {
        assert!(read(text).is_err(), "{text:?}");
    }
}

#[test]
fn nothing_is_no_object_and_no_error() {
    for text in ["", "\n", "# a comment\n", "---\n", "---\n---\n# nothing\n---\n", "null\n"] {
        assert_eq!(read(text).unwrap(), [], "{text:?}");
    }
}

#[test]
fn a_cut_anywhere_makes_nothing_wider() {
    let whole = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/good-input/policies.yaml")).unwrap();
    let all = read(&whole).unwrap();
    for end in (0..whole.len()).filter(|&end| whole.is_char_boundary(end)) {
        // What is left of the last document may be valid, and then is another rule: nothing can tell. But no document before it changes,
        // and no peer is lost from a rule.
        let Ok(objects) = read(&whole[..end]) else { continue };
        for (cut, whole) in objects.iter().zip(&all).take(objects.len().saturating_sub(1)) {
            assert_eq!(cut, whole);
        }
    }
}
