//! Values to YAML in which no reader finds anything else than what was meant.
//!
//! # Why
//! Readers disagree on what a bare word is: `on`, `y`, `0o7`, `1:30`, `2026-11-21` are texts here, and something else to
//! readers of YAML 1.1 (kubectl). So a word stays bare only where all agree; everything else stands in double quotes.

use std::fmt::Write;

use serde::Serialize;
use serde_norway::Value;

use crate::object::Object;

/// Objects as a stream of documents.
pub fn write<'a>(objects: impl IntoIterator<Item = &'a Object>) -> String {
    objects.into_iter().map(document).collect::<Vec<_>>().join("---\n")
}

/// One document, without a separator.
///
/// # Panics
/// Never for the kinds and for Kubernetes' own types: their serialization doesn't fail.
pub fn document<T: Serialize + ?Sized>(object: &T) -> String {
    let value = serde_norway::to_value(object).expect("the types written here hold no map with keys other than texts");
    let mut text = String::new();
    block(&mut text, &value, 0);
    text
}

/// One value as a block, each line with its indent and its end.
fn block(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Mapping(map) if !map.is_empty() => {
            for (key, value) in map {
                out.extend(std::iter::repeat_n(' ', indent));
                entry(out, key, value, indent);
            }
        }
        Value::Sequence(items) if !items.is_empty() => {
            for item in items {
                out.extend(std::iter::repeat_n(' ', indent));
                out.push_str("- ");
                match item {
                    // The first entry on the line of the dash, the others under it.
                    Value::Mapping(map) if !map.is_empty() => {
                        for (at, (key, value)) in map.iter().enumerate() {
                            out.extend(std::iter::repeat_n(' ', if at == 0 { 0 } else { indent + 2 }));
                            entry(out, key, value, indent + 2);
                        }
                    }
                    Value::Sequence(items) if !items.is_empty() => {
                        out.push('\n');
                        block(out, item, indent + 2);
                    }
                    _ => {
                        scalar(out, item);
                        out.push('\n');
                    }
                }
            }
        }
        _ => {
            out.extend(std::iter::repeat_n(' ', indent));
            scalar(out, value);
            out.push('\n');
        }
    }
}

fn entry(out: &mut String, key: &Value, value: &Value, indent: usize) {
    scalar(out, key);
    out.push(':');
    match value {
        Value::Mapping(map) if !map.is_empty() => {
            out.push('\n');
            block(out, value, indent + 2);
        }
        Value::Sequence(items) if !items.is_empty() => {
            out.push('\n');
            block(out, value, indent + 2);
        }
        _ => {
            out.push(' ');
            scalar(out, value);
            out.push('\n');
        }
    }
}

fn scalar(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(bool) => out.push_str(if *bool { "true" } else { "false" }),
        Value::Number(number) => {
            // Writing to a String doesn't fail.
            let _ = write!(out, "{number}");
        }
        Value::String(text) if bare(text) => out.push_str(text),
        Value::String(text) => quoted(out, text),
        Value::Sequence(_) => out.push_str("[]"),
        Value::Mapping(_) => out.push_str("{}"),
        Value::Tagged(tagged) => scalar(out, &tagged.value),
    }
}

/// Whether every reader takes this, without quotes, for the same text.
fn bare(text: &str) -> bool {
    // YAML 1.1's words (https://yaml.org/type/bool.html, null.html, float.html), in small letters.
    const WORDS: [&str; 14] = ["y", "n", "yes", "no", "true", "false", "on", "off", "null", "nan", "inf", "infinity", "void", "none"];
    let bytes = text.as_bytes();
    // A letter first: no number, no time, no indicator starts with one.
    bytes.first().is_some_and(u8::is_ascii_alphabetic)
        && bytes.last().is_some_and(|b| !matches!(b, b' ' | b':'))
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b" _./:()=+,;@%'-".contains(b))
        && !text.contains(": ")
        && text.len() <= 4096
        && !WORDS.contains(&text.to_ascii_lowercase().as_str())
}

/// YAML 1.2.2, 5.7 and 7.3.1: within double quotes everything that is not printable is escaped.
fn quoted(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            ' '..='~' | '\u{a0}'..='\u{2027}' | '\u{202a}'..='\u{d7ff}' | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}' => out.push(c),
            '\u{10000}'.. => out.push(c),
            _ => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
        }
    }
    out.push('"');
}
