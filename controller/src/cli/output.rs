//! What people and scripts get to see: the terminal, colours, tables, failures.

mod below;
mod plain;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use comfy_table::{Attribute, Cell, Color, ColumnConstraint, ContentArrangement, LineStyle, Table, TableStyle, Width, presets};
use policy::Verdict;
use serde::Serialize;

use super::args::Format;
use super::{Colour, exit};
use crate::api::view::{Failure, FailureCode};
pub(crate) use crate::hub::chain;

/// Why a command did not do what was asked, with what to do next.
#[derive(Debug)]
pub struct Failed {
    /// Exit code.
    pub exit: u8,
    /// What happened, to what.
    pub error: String,
    /// What to do next; may be empty.
    pub next: String,
}

impl Failed {
    pub(super) fn new(exit: u8, error: impl Display, next: impl Into<String>) -> Self {
        Self { exit, error: error.to_string(), next: next.into() }
    }

    /// Standard output is gone or full. A reader that closed the pipe (`| head`) had enough: not worth a word.
    pub(super) fn output(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self { exit: exit::DONE, error: String::new(), next: String::new() },
            _ => Self::new(exit::FAILED, format!("cannot write the output: {error}"), ""),
        }
    }

    /// Nobody reads the output any more.
    pub(super) fn is_a_closed_pipe(&self) -> bool {
        self.exit == exit::DONE && self.error.is_empty()
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        let exit = match failure.code {
            FailureCode::Invalid => exit::USAGE,
            FailureCode::Refused => exit::REFUSED,
            FailureCode::NotFound => exit::NOT_FOUND,
            FailureCode::Forbidden | FailureCode::Failed => exit::FAILED,
        };
        Self { exit, error: failure.error, next: failure.next }
    }
}

/// Below this many columns a terminal's word for its own width is not believed.
const NARROWEST: u16 = 40;

/// Where output goes, and what it can show.
pub(super) struct Terminal {
    colour: bool,
    width: Option<u16>,
    interactive: bool,
}

/// What a colour says.
#[derive(Clone, Copy)]
pub(super) enum Tone {
    Good,
    Bad,
    Warn,
    Dim,
    Bold,
}

impl From<Verdict> for Tone {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => Self::Good,
            Verdict::WouldDeny => Self::Warn,
            Verdict::Deny => Self::Bad,
        }
    }
}

/// What stands in a cell.
#[derive(Default)]
pub(super) struct Text {
    text: String,
    tone: Option<Tone>,
}

impl Text {
    pub(super) fn toned(tone: Tone, text: impl Display) -> Self {
        Self { text: clean(&text.to_string()), tone: Some(tone) }
    }
}

impl<T: Display> From<T> for Text {
    fn from(text: T) -> Self {
        Self { text: clean(&text.to_string()), tone: None }
    }
}

impl From<Text> for Cell {
    fn from(Text { text, tone }: Text) -> Self {
        let cell = Cell::new(text);
        match tone {
            None => cell,
            Some(Tone::Good) => cell.fg(Color::DarkGreen),
            Some(Tone::Bad) => cell.fg(Color::DarkRed),
            Some(Tone::Warn) => cell.fg(Color::DarkYellow),
            Some(Tone::Dim) => cell.add_attribute(Attribute::Dim),
            Some(Tone::Bold) => cell.add_attribute(Attribute::Bold),
        }
    }
}

/// Names and comments are written by others: a control character among them must not speak to the terminal.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

impl Terminal {
    pub(super) fn new(colour: Colour) -> Self {
        let tty = io::stdout().is_terminal();
        // https://no-color.org: set and not empty means no colour by default.
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        let colour = match colour {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto => tty && !unwanted,
        };
        // A terminal without a window (`script`, some CI) says that it has no columns, or one.
        let believed = |width: &u16| *width >= NARROWEST;
        let width = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).filter(believed);
        let width = if tty { width.or_else(|| Table::new().width().filter(believed)) } else { None };
        Self { colour, width, interactive: tty && io::stdin().is_terminal() }
    }

    /// A person can be asked.
    pub(super) fn interactive(&self) -> bool {
        self.interactive
    }

    /// Text in a tone, if colours are wanted.
    pub(super) fn paint(&self, tone: Tone, text: impl Display) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Warn => "33",
            Tone::Dim => "2",
            Tone::Bold => "1",
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Writes a line (or several) to the output.
    pub(super) fn say(&self, text: impl Display) -> Result<(), Failed> {
        writeln!(io::stdout(), "{text}").map_err(Failed::output)
    }

    /// Writes text as it is.
    pub(super) fn write(&self, text: &str) -> Result<(), Failed> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failed::output)
    }

    /// Something to know that is not the answer: goes to the error output, so that pipes stay clean.
    pub(super) fn note(&self, text: impl Display) {
        // Nobody reads it: nothing to be done about it.
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// The failure that ends the program.
    pub(super) fn complain(&self, failed: &Failed) {
        if failed.error.is_empty() {
            return;
        }
        self.note(format_args!("bulkhead: {}", failed.error));
        if !failed.next.is_empty() {
            self.note(format_args!("  {}", failed.next));
        }
    }

    /// A table that fits the terminal; unshortened where the output is a file or a pipe.
    pub(super) fn table(&self, header: &[&str], rows: Vec<Vec<Text>>, format: Format) -> Result<(), Failed> {
        // Line by line, a table of ten thousand lines is as many calls of the kernel.
        let lines = self.drawn(header, rows, format);
        let mut text = String::with_capacity(lines.iter().map(|line| line.len() + 1).sum());
        lines.iter().for_each(|line| text.extend([line.as_str(), "\n"]));
        self.write(&text)
    }

    fn drawn(&self, header: &[&str], mut rows: Vec<Vec<Text>>, format: Format) -> Vec<String> {
        let width = self.width.filter(|_| format == Format::Table);
        plain::drawn(header, &rows, width, self.colour)
            .or_else(|| below::drawn(self, header, &mut rows, width))
            .unwrap_or_else(|| self.arranged(header, rows, width))
    }

    /// A table in which cells may have to be broken, or columns left out.
    fn arranged(&self, header: &[&str], rows: Vec<Vec<Text>>, width: Option<u16>) -> Vec<String> {
        self.styled(header, rows, width, presets::NOTHING)
    }

    /// The same as one block of lines for the header and one for each row.
    fn blocks(&self, header: &[&str], rows: Vec<Vec<Text>>, width: u16) -> Vec<Vec<String>> {
        // No text holds one: it is a control character, which `clean` replaces.
        const BETWEEN: char = '\u{1}';
        let style = presets::NOTHING.header_separator(LineStyle::none().fill(BETWEEN)).row_separator(LineStyle::none().fill(BETWEEN));
        let lines = self.styled(header, rows, Some(width), style);
        lines.split(|line| line.starts_with(BETWEEN)).map(<[String]>::to_vec).collect()
    }

    fn styled(&self, header: &[&str], rows: Vec<Vec<Text>>, width: Option<u16>, style: TableStyle) -> Vec<String> {
        let kept = width.map_or_else(|| (0..header.len()).collect(), |width| fitting(header, &rows, width));
        let mut table = Table::new();
        table.load_style(style).set_header(kept.iter().map(|&column| header[column]));
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        let least: Vec<u16> = width.map_or_else(Vec::new, |_| kept.iter().map(|&column| least(column, header, &rows)).collect());
        for mut row in rows {
            table.add_row(kept.iter().filter_map(|&column| row.get_mut(column).map(|text| Cell::from(std::mem::take(text)))));
        }
        // A blank on either side of each.
        let whole: usize = table.column_max_content_widths().into_iter().map(|width| usize::from(width) + 2).sum();
        match width.filter(|width| whole > usize::from(*width)) {
            Some(width) => {
                table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
                if least.iter().map(|least| usize::from(*least)).sum::<usize>() <= usize::from(width) {
                    table.set_constraints(least.into_iter().map(|least| ColumnConstraint::LowerBoundary(Width::Fixed(least))));
                }
            }
            // The library would break a cell at its longest word before it looks whether all of it fits.
            None => {
                table.set_content_arrangement(ContentArrangement::Disabled);
            }
        }
        table.lines().map(|line| trimmed(&line).to_owned()).collect()
    }

    /// JSON or YAML.
    pub(super) fn data(&self, value: &impl Serialize, format: Format) -> Result<(), Failed> {
        match format {
            Format::Yaml => {
                let text = yaml(value).map_err(|e| Failed::new(exit::FAILED, format!("cannot write the answer as YAML: {e}"), ""))?;
                self.write(&text)
            }
            Format::Json | Format::Table | Format::Wide => {
                let text = serde_json::to_string_pretty(value)
                    .map_err(|e| Failed::new(exit::FAILED, format!("cannot write the answer as JSON: {e}"), ""))?;
                self.say(text)
            }
        }
    }

    /// Asks a person; anything but y or yes is no.
    pub(super) fn confirm(&self, question: &str) -> Result<bool, Failed> {
        let mut err = io::stderr();
        write!(err, "{question} [y/N] ").and_then(|()| err.flush()).map_err(Failed::output)?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).map_err(|e| Failed::new(exit::FAILED, format!("cannot read the answer: {e}"), ""))?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }
}

/// The same value that JSON says. Straight from the type, a variant with a content would become a tag (`!notEnforceable`), which only
/// readers that know the type can read.
fn yaml(value: &impl Serialize) -> Result<String, Box<dyn std::error::Error>> {
    let value: serde_norway::Value = serde_json::from_str(&serde_json::to_string(value)?)?;
    Ok(serde_norway::to_string(&value)?)
}

/// Columns are padded to their width; the blanks at the end of a line are in nobody's interest.
fn trimmed(line: &str) -> &str {
    let line = line.trim_end();
    line.strip_prefix(' ').unwrap_or(line)
}

/// Columns that a narrow terminal can do without, the least first; `-o wide` shows them all.
const LESSER: [&str; 9] = ["REVISION", "GENERATION", "HOURS", "SEGMENT", "LAST", "UPDATED", "DIGEST", "RULES", "TIME"];

/// The width a column needs to break no word: its longest one, and a blank on either side.
fn least(column: usize, header: &[&str], rows: &[Vec<Text>]) -> u16 {
    let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.text.as_str());
    let longest = cells.chain(header.get(column).copied()).flat_map(str::split_whitespace).map(|word| word.chars().count()).max();
    u16::try_from(longest.unwrap_or(0)).unwrap_or(u16::MAX / 64).saturating_add(2)
}

/// The columns that are shown in this width. The first says what a row is about and always stays.
fn fitting(header: &[&str], rows: &[Vec<Text>], width: u16) -> Vec<usize> {
    let mut kept: Vec<usize> = (0..header.len()).collect();
    for lesser in LESSER {
        let needed = kept.iter().fold(0u16, |sum, &column| sum.saturating_add(least(column, header, rows)));
        if needed <= width {
            break;
        }
        kept.retain(|&column| column == 0 || header[column] != lesser);
    }
    kept
}

/// `1.2 MB`; bytes in powers of ten.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut unit = 0;
    let mut scaled = count;
    let mut tenth = 0;
    while scaled >= 1000 && unit + 1 < UNITS.len() {
        tenth = scaled % 1000 / 100;
        scaled /= 1000;
        unit += 1;
    }
    if unit == 0 || scaled >= 100 { format!("{scaled} {}", UNITS[unit]) } else { format!("{scaled}.{tenth} {}", UNITS[unit]) }
}

/// `1 rule`, `2 rules`.
pub(crate) fn count(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(width: u16, header: &[&str], row: &[&str]) -> Vec<String> {
        let terminal = Terminal { colour: false, width: Some(width), interactive: false };
        terminal.drawn(header, vec![row.iter().map(Text::from).collect()], Format::Table)
    }

    #[test]
    fn a_table_in_80_columns_breaks_no_word_and_leaves_out_what_matters_least() {
        let header = ["WORKLOAD", "SEGMENT", "PHASE", "RULES", "UNDECIDED", "FINDINGS", "REVISION", "DIGEST", "UPDATED"];
        let row = ["voting/result", "voting", "Learning", "4", "4", "1 blocking, 1 warning, 4 info", "2", "77f6242b2377", "31s ago"];
        let lines = drawn(80, &header, &row);
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
        let words: Vec<&str> = lines.iter().flat_map(|line| line.split_whitespace()).collect();
        for word in header.iter().copied().chain(row.iter().flat_map(|cell| cell.split_whitespace())) {
            let left_out = ["SEGMENT", "REVISION", "voting", "2"].contains(&word);
            assert_eq!(words.contains(&word), !left_out, "{word} in {lines:#?}");
        }
    }

    #[test]
    fn a_table_with_room_for_all_leaves_nothing_out() {
        let lines = drawn(120, &["SEGMENT", "REVISION", "LAST"], &["shop", "2", "now"]);
        assert_eq!(lines, ["SEGMENT  REVISION  LAST", "shop     2         now"]);
    }

    #[test]
    fn what_a_row_is_about_stays_in_the_narrowest_table() {
        let lines = drawn(40, &["SEGMENT", "MODE", "LAST"], &["a-segment-with-a-name-longer-than-a-terminal", "Learn", "now"]);
        assert!(lines[0].starts_with("SEGMENT") && lines[0].contains("MODE") && !lines[0].contains("LAST"), "{lines:#?}");
    }
}
