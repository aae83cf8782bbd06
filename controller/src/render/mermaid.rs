//! Mermaid flow charts (mermaid.js.org/syntax/flowchart.html).

use std::fmt::Write;

use super::{Drawing, Shape};
use crate::api::view::GraphView;

/// Text for within double quotes. Mermaid has no escape for a quote; it knows entity codes written `#NN;`. Everything that is not a letter, a digit
/// or plain punctuation becomes one, so that neither its own syntax nor the HTML it renders into can be reached by a name.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            c if c.is_control() => escaped.push(char::REPLACEMENT_CHARACTER),
            c if c.is_alphanumeric() || " /:.-_,()@".contains(c) => escaped.push(c),
            // Writing to a String cannot fail.
            c => drop(write!(escaped, "#{};", u32::from(c))),
        }
    }
    escaped
}

/// The graph as a flow chart.
pub fn mermaid(view: &GraphView) -> String {
    let drawing = Drawing::of(view);
    let mut text = String::from("flowchart LR\n");
    for (number, end) in drawing.ends.iter().enumerate() {
        let label = format!("\"{}\"", escaped(&end.to_string()));
        let (open, close) = match Shape::from(*end) {
            Shape::Workload => ("[", "]"),
            Shape::Host => ("[[", "]]"),
            Shape::Elsewhere => ("([", "])"),
            Shape::Unknown => ("{", "}"),
        };
        let _ = writeln!(text, "  n{number}{open}{label}{close}");
    }
    for bundle in &drawing.bundles {
        let arrow = match (bundle.attempts_only, bundle.direction_known) {
            (false, true) => "-->",
            (true, true) => "-.->",
            (false, false) => "---",
            (true, false) => "-.-",
        };
        let label = bundle.labels().iter().map(|line| escaped(line)).collect::<Vec<_>>().join("<br/>");
        let _ = writeln!(text, "  n{} {arrow}|\"{label}\"| n{}", bundle.from, bundle.to);
    }
    for (number, bundle) in drawing.bundles.iter().enumerate() {
        let _ = writeln!(text, "  linkStyle {number} stroke:{colour},color:{colour}", colour = bundle.colour());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_become_markup() {
        assert_eq!(escaped("shop/db"), "shop/db");
        assert_eq!(escaped("a\"]<script>"), "a#34;#93;#60;script#62;");
        assert_eq!(escaped("a#quot;"), "a#35;quot#59;");
    }
}
