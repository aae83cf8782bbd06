//! Graphviz (graphviz.org/doc/info/lang.html).

use std::fmt::Write;

use super::{Drawing, Shape};
use crate::api::view::GraphView;

/// Text for within double quotes: backslashes and quotes are escaped, so that neither an escape sequence (`\n`, `\N`) nor the end of the
/// string can be written by a name. Control characters have no place in a label.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '"' => escaped.push_str("\\\""),
            '\\' => escaped.push_str("\\\\"),
            c if c.is_control() => escaped.push(char::REPLACEMENT_CHARACTER),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The graph for `dot`.
pub fn dot(view: &GraphView) -> String {
    let drawing = Drawing::of(view);
    let mut text = String::from(
        "digraph bulkhead {\n  rankdir=LR;\n  node [fontname=\"sans-serif\"];\n  edge [fontname=\"sans-serif\", fontsize=10];\n",
    );
    for (number, end) in drawing.ends.iter().enumerate() {
        let shape = match Shape::from(*end) {
            Shape::Workload => "box",
            Shape::Host => "house",
            Shape::Elsewhere => "ellipse",
            Shape::Unknown => "diamond",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  n{number} [label=\"{}\", shape={shape}];", escaped(&end.to_string()));
    }
    for bundle in &drawing.bundles {
        // The parts are escaped by themselves: the line break between them is ours.
        let label = bundle.labels().iter().map(|line| escaped(line)).collect::<Vec<_>>().join("\\n");
        let colour = bundle.colour();
        let style = if bundle.attempts_only { "dashed" } else { "solid" };
        let head = if bundle.direction_known { "normal" } else { "none" };
        let _ = writeln!(
            text,
            "  n{} -> n{} [label=\"{label}\", color=\"{colour}\", fontcolor=\"{colour}\", style={style}, arrowhead={head}];",
            bundle.from, bundle.to
        );
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_quotes() {
        assert_eq!(escaped(r#"a" ]; evil [label=""#), r#"a\" ]; evil [label=\""#);
        assert_eq!(escaped("a\\"), r"a\\");
        assert_eq!(escaped("a\u{1b}[31m"), "a\u{fffd}[31m");
    }
}
