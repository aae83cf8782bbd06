//! A narrow table whose rows end with a sentence: each sentence stands on a line of its own below its row.
//!
//! # Why
//! Beside seven columns, 80 characters leave a reason ten: words were broken, and three flows took 38 lines.

use std::mem::take;

use super::{Terminal, Text, Tone, least};

/// The column that holds sentences.
const SENTENCE: &str = "REASON";

/// The column that goes before the sentence where words would have to be broken otherwise.
const PREFIX: &str = "OUTCOME";

/// From this width on, a sentence has room enough beside the other columns.
const ROOMY: u16 = 110;

/// How far below its row a sentence is moved in.
const INDENT: &str = "    ";

/// The lines, or nothing if this table has no sentences or enough room for them.
pub(super) fn drawn(terminal: &Terminal, header: &[&str], rows: &mut Vec<Vec<Text>>, width: Option<u16>) -> Option<Vec<String>> {
    let width = width.filter(|&width| width < ROOMY)?;
    let (last, header) = header.split_last()?;
    if *last != SENTENCE || rows.iter().any(|row| row.len() != header.len() + 1) {
        return None;
    }
    let mut rows = take(rows);
    let mut sentences: Vec<String> = rows.iter_mut().map(|row| row.pop().unwrap_or_default().text).collect();
    let mut header = header.to_vec();
    let needed = (0..header.len()).fold(0u16, |sum, column| sum.saturating_add(least(column, &header, &rows)));
    if needed > width
        && let Some(prefix) = header.iter().position(|name| *name == PREFIX)
    {
        header.remove(prefix);
        for (row, sentence) in rows.iter_mut().zip(&mut sentences) {
            *sentence = format!("{}: {sentence}", row.remove(prefix).text);
        }
    }
    let mut blocks = terminal.blocks(&header, rows, width).into_iter();
    let mut lines = blocks.next().unwrap_or_default();
    for (block, sentence) in blocks.zip(&sentences) {
        lines.extend(block);
        lines.extend(wrapped(sentence, width).into_iter().map(|line| terminal.paint(Tone::Dim, line)));
    }
    Some(lines)
}

/// Broken between words only: a name that is longer than a line stays whole.
fn wrapped(sentence: &str, width: u16) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in sentence.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= usize::from(width) => line.extend([" ", word]),
            Some(_) | None => lines.push(format!("{INDENT}{word}")),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::super::args::Format;
    use super::*;

    const REASON: &str = "no egress rule of voting/vote and no ingress rule of voting/db allow it, and both are in Enforce";

    fn table(width: u16) -> Vec<String> {
        let terminal = Terminal { colour: false, width: Some(width), interactive: false };
        let row = |from: &str| ["13:02:11Z", from, "voting/db", "tcp/5432", "denied", "deny", REASON].iter().map(Text::from).collect();
        let header = ["TIME", "FROM", "TO", "PORT", "OUTCOME", "VERDICT", SENTENCE];
        terminal.drawn(&header, vec![row("voting/vote"), row("outside:203.0.113.1"), row("shop/a b c")], Format::Table)
    }

    #[test]
    fn in_80_columns_each_reason_stands_whole_below_its_row() {
        let lines = table(80);
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
        assert_eq!(lines.len(), 1 + 3 * 3, "{lines:#?}");
        assert!(!lines[0].contains(SENTENCE) && lines[1].contains("voting/vote") && lines[4].contains("203.0.113.1"), "{lines:#?}");
        for below in [2, 5, 8] {
            assert!(lines[below].starts_with(INDENT), "{lines:#?}");
            assert_eq!(format!("{} {}", lines[below].trim(), lines[below + 1].trim()), REASON);
        }
    }

    #[test]
    fn no_address_is_broken_in_80_columns() {
        let terminal = Terminal { colour: false, width: Some(80), interactive: false };
        let row = ["13:02:11Z", "admiring_nobel", "outside:203.0.113.53", "tcp/5432", "established", "allow", "policy voting/worker"];
        let header = ["TIME", "FROM", "TO", "PORT", PREFIX, "VERDICT", SENTENCE];
        let lines = terminal.drawn(&header, vec![row.iter().map(Text::from).collect()], Format::Table);
        assert!(lines[1].contains("outside:203.0.113.53") && lines[1].contains("allow"), "{lines:#?}");
        assert_eq!(lines[2..], [format!("{INDENT}established: policy voting/worker")]);
    }

    #[test]
    fn a_row_of_several_lines_keeps_its_reason() {
        let lines = table(60);
        let at = |text: &str| (0..lines.len()).filter(|&n| lines[n].contains(text)).collect::<Vec<_>>();
        let (rows, reasons) = (at("13:02:11Z"), at("no egress rule"));
        assert_eq!((rows.len(), reasons.len()), (3, 3), "{lines:#?}");
        assert!(rows[1] + 1 < reasons[1], "the address takes a second line: {lines:#?}");
        assert!(rows[1] > reasons[0] && rows[2] > reasons[1], "{lines:#?}");
    }

    #[test]
    fn a_wide_terminal_has_the_reason_in_a_column() {
        assert!(table(120)[0].contains(SENTENCE));
        assert!(table(200)[0].contains(SENTENCE));
    }
}
