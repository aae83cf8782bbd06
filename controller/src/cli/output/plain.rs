//! A table that needs no arranging: each cell is one line of ASCII, and all of them fit.
//!
//! # Why
//! A library that can break and align anything makes several texts of each cell: 10,000 edges took half of the time a person waited for
//! them. Most tables need none of that, and what they look like is the same to the byte, which a property test holds.

use super::{Text, Tone, trimmed};

/// Cells beyond this are the library's matter: it counts in 16 bits.
const WIDEST: usize = 4096;

/// The lines, or nothing if it takes more than this to draw them.
pub(super) fn drawn(header: &[&str], rows: &[Vec<Text>], width: Option<u16>, colour: bool) -> Option<Vec<String>> {
    let mut widths = Vec::with_capacity(header.len());
    for name in header {
        widths.push(plain_width(name)?);
    }
    for row in rows {
        if row.len() != widths.len() {
            return None;
        }
        for (cell, widest) in row.iter().zip(&mut widths) {
            *widest = plain_width(&cell.text)?.max(*widest);
        }
    }
    // A blank on either side of each.
    let whole: usize = widths.iter().map(|width| width + 2).sum();
    if width.is_some_and(|width| whole > usize::from(width)) {
        return None;
    }
    let mut lines = Vec::with_capacity(rows.len() + 1);
    let mut line = String::with_capacity(whole + 64);
    for (name, width) in header.iter().zip(&widths) {
        push(&mut line, name, *width, None);
    }
    lines.push(trimmed(&line).to_owned());
    for row in rows {
        line.clear();
        for (Text { text, tone }, width) in row.iter().zip(&widths) {
            push(&mut line, text, *width, tone.filter(|_| colour));
        }
        lines.push(trimmed(&line).to_owned());
    }
    Some(lines)
}

/// How wide a text is of which each byte is a character, and as wide as any other; at least 1.
fn plain_width(text: &str) -> Option<usize> {
    let plain = text.len() <= WIDEST && text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    plain.then_some(text.len().max(1))
}

fn push(line: &mut String, text: &str, width: usize, tone: Option<Tone>) {
    let (before, after) = tone.map_or(("", ""), codes);
    line.push_str(before);
    line.push(' ');
    line.push_str(text);
    line.extend(std::iter::repeat_n(' ', width - text.len() + 1));
    line.push_str(after);
}

/// What the library writes around a cell (ECMA-48, 8.3.117).
fn codes(tone: Tone) -> (&'static str, &'static str) {
    match tone {
        Tone::Good => ("\x1b[38;5;2m", "\x1b[39m"),
        Tone::Bad => ("\x1b[38;5;1m", "\x1b[39m"),
        Tone::Warn => ("\x1b[38;5;3m", "\x1b[39m"),
        Tone::Dim => ("\x1b[2m", "\x1b[0m"),
        Tone::Bold => ("\x1b[1m", "\x1b[0m"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::super::Terminal;
    use super::*;

    fn cells() -> impl Strategy<Value = (String, Option<usize>)> {
        let text = prop_oneof![
            6 => "[ -~]{0,12}",
            2 => "[a-z]{1,6}( [a-z]{1,6}){0,4}",
            1 => select(vec!["é".to_owned(), "two\nlines".to_owned(), String::new(), " ".to_owned(), "日本".to_owned()]),
        ];
        (text, prop::option::of(0..5usize))
    }

    proptest! {
        #[test]
        fn a_table_that_needs_no_arranging_is_what_the_library_would_draw(
            (header, rows) in (1..6usize).prop_flat_map(|columns| (vec("[A-Z]{1,8}", columns), vec(vec(cells(), columns), 0..8))),
            width in prop::option::of(20..120u16),
            colour in any::<bool>(),
        ) {
            let header: Vec<&str> = header.iter().map(String::as_str).collect();
            let tones = [Tone::Good, Tone::Bad, Tone::Warn, Tone::Dim, Tone::Bold];
            let text = |(text, tone): &(String, Option<usize>)| Text { text: text.clone(), tone: tone.map(|tone| tones[tone]) };
            let rows = || rows.iter().map(|row| row.iter().map(text).collect::<Vec<_>>()).collect::<Vec<_>>();
            if let Some(lines) = drawn(&header, &rows(), width, colour) {
                let terminal = Terminal { colour, width, interactive: false };
                prop_assert_eq!(lines, terminal.arranged(&header, rows(), width));
            }
        }
    }
}
