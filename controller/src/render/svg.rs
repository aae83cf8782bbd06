//! The graph as a picture that stands alone: no script, no style sheet, no font from elsewhere.

use std::fmt::Write;

use super::labels::{Area, spread};
use super::layout::{Box, Line, place};
use super::{ALLOWED, DENIED, Drawing, Shape, WOULD_BE};
use crate::api::view::GraphView;

/// Width of a character of the fixed-width font at 1 px; such fonts agree on it within a few percent.
const CHARACTER: f64 = 0.62;
const NAME: f64 = 13.0;
const LABEL: f64 = 11.0;

/// XML text (w3.org/TR/xml, 2.4): markup is escaped; characters that XML does not allow, or that change the direction of text, are replaced.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                escaped.push(char::REPLACEMENT_CHARACTER);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// A name that would make a box wider than a screen is shortened; the whole is in its title.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 40;
    if text.chars().count() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST - 1).chain(['…']).collect() }
}

fn width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * CHARACTER * size
}

/// A smooth path through the points, leaving and arriving level.
fn path(points: &[(f64, f64)]) -> String {
    let Some(&(x, y)) = points.first() else { return String::new() };
    let mut path = format!("M{x:.1},{y:.1}");
    for pair in points.windows(2) {
        let ((ax, ay), (bx, by)) = (pair[0], pair[1]);
        let bend = if (ax - bx).abs() < 1.0 {
            // Out at the right and back: as wide as it is high, and wide enough to be seen.
            let out = 30.0 + (ay - by).abs() / 4.0;
            format!(" C{:.1},{:.1} {:.1},{:.1} {bx:.1},{by:.1}", ax + out, ay - 12.0, bx + out, by + 12.0)
        } else {
            let middle = (ax + bx) / 2.0;
            format!(" C{middle:.1},{ay:.1} {middle:.1},{by:.1} {bx:.1},{by:.1}")
        };
        path.push_str(&bend);
    }
    path
}

/// The graph as SVG.
pub fn svg(view: &GraphView) -> String {
    let drawing = Drawing::of(view);
    let names: Vec<String> = drawing.ends.iter().map(|end| shortened(&end.to_string())).collect();
    let boxes: Vec<Box> = names.iter().map(|name| Box { width: width(name, NAME) + 24.0, height: 34.0 }).collect();
    let labels: Vec<Vec<String>> = drawing.bundles.iter().map(super::Bundle::labels).collect();
    let lines: Vec<Line> = drawing
        .bundles
        .iter()
        .zip(&labels)
        .map(|(bundle, labels)| Line {
            from: bundle.from,
            to: bundle.to,
            label_width: labels.iter().map(|label| width(label, LABEL)).fold(0.0, f64::max),
            label_height: labels.len() as f64 * (LABEL + 3.0),
        })
        .collect();
    let placed = place(&boxes, &lines);
    let (total_width, total_height) = (placed.width.max(420.0), placed.height + 28.0);

    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ = writeln!(
        text,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{total_width:.0}\" height=\"{total_height:.0}\" viewBox=\"0 0 {total_width:.0} {total_height:.0}\" font-family=\"ui-monospace, Menlo, Consolas, monospace\">"
    );
    text.push_str("  <title>Who talks to whom</title>\n  <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n  <defs>\n");
    for (name, colour) in [("allowed", ALLOWED), ("would", WOULD_BE), ("denied", DENIED)] {
        let _ = writeln!(
            text,
            "    <marker id=\"{name}\" viewBox=\"0 0 10 10\" refX=\"9\" refY=\"5\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto-start-reverse\"><path d=\"M0,0 L10,5 L0,10 z\" fill=\"{colour}\"/></marker>"
        );
    }
    text.push_str("  </defs>\n");
    for (bundle, points) in drawing.bundles.iter().zip(&placed.lines) {
        let colour = bundle.colour();
        let dash = if bundle.attempts_only { " stroke-dasharray=\"6 4\"" } else { "" };
        let marker = match colour {
            DENIED => "denied",
            WOULD_BE => "would",
            _ => "allowed",
        };
        let head = if bundle.direction_known { format!(" marker-end=\"url(#{marker})\"") } else { String::new() };
        let _ = writeln!(text, "  <path d=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"{dash}{head}/>", path(points));
    }
    for ((end, name), (size, (x, y))) in drawing.ends.iter().zip(&names).zip(boxes.iter().zip(&placed.boxes)) {
        let (fill, stroke, round) = match Shape::from(*end) {
            Shape::Workload => ("#e3f2fd", "#1565c0", 5),
            Shape::Host => ("#ede7f6", "#4527a0", 0),
            Shape::Elsewhere => ("#f5f5f5", "#757575", 17),
            Shape::Unknown => ("#fff3e0", "#e65100", 0),
        };
        let (left, top) = (x - size.width / 2.0, y - size.height / 2.0);
        let _ = writeln!(
            text,
            "  <g><title>{}</title><rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"{round}\" fill=\"{fill}\" stroke=\"{stroke}\"/><text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"{NAME}\" text-anchor=\"middle\" fill=\"#212121\">{}</text></g>",
            escaped(&end.to_string()),
            size.width,
            size.height,
            y + NAME / 3.0,
            escaped(name)
        );
    }
    let sizes: Vec<(f64, f64)> = lines.iter().map(|line| (line.label_width + 6.0, line.label_height)).collect();
    let around: Vec<Area> =
        placed.boxes.iter().zip(&boxes).map(|(&middle, size)| Area { middle, width: size.width, height: size.height }).collect();
    let middles = spread(&placed.lines, &sizes, &around);
    for ((bundle, labels), middle) in drawing.bundles.iter().zip(&labels).zip(middles) {
        let Some((x, y)) = middle else { continue };
        for (number, label) in labels.iter().enumerate() {
            let y = y + (number as f64 - (labels.len() as f64 - 1.0) / 2.0) * (LABEL + 3.0) + LABEL / 3.0;
            let _ = writeln!(
                text,
                "  <text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{LABEL}\" text-anchor=\"middle\" fill=\"{}\" stroke=\"#ffffff\" stroke-width=\"4\" paint-order=\"stroke\">{}</text>",
                bundle.colour(),
                escaped(label)
            );
        }
    }
    let _ = writeln!(
        text,
        "  <g font-size=\"{LABEL}\" transform=\"translate(24 {:.1})\"><text fill=\"{ALLOWED}\">allowed</text><text x=\"80\" fill=\"{WOULD_BE}\">would be denied</text><text x=\"210\" fill=\"{DENIED}\">denied</text><text x=\"280\" fill=\"#616161\">dashed: attempts only</text></g>",
        total_height - 12.0
    );
    text.push_str("</svg>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_become_markup() {
        assert_eq!(escaped("a<script>&\"'"), "a&lt;script&gt;&amp;&quot;&#39;");
        assert_eq!(escaped("a\u{202e}b\u{0}"), "a\u{fffd}b\u{fffd}");
    }

    /// Middles and widths of the labels, read from the picture.
    fn labels(svg: &str) -> Vec<(f64, f64, f64)> {
        let number = |line: &str, name: &str| -> f64 {
            let (_, rest) = line.split_once(&format!("{name}=\"")).unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let label = |line: &str| {
            let text = line.split_once('>').unwrap().1.trim_end_matches("</text>");
            (number(line, " x"), number(line, " y"), width(text, LABEL))
        };
        svg.lines().map(str::trim).filter(|line| line.starts_with("<text x=") && line.contains("paint-order")).map(label).collect()
    }

    #[test]
    fn in_a_dense_graph_every_label_can_be_read() {
        let edge = |(client, server): (usize, usize)| crate::api::view::EdgeView {
            from: format!("shop/client{client}").parse().unwrap(),
            to: format!("shop/server{server}").parse().unwrap(),
            service: policy::Service::tcp(8000),
            direction_known: true,
            evidence: policy::Evidence { established: 12, ..policy::Evidence::default() },
            verdict: policy::Verdict::Allow,
            reason: String::new(),
        };
        let edges = (0..36).map(|n| edge((n / 6, n % 6))).collect();
        let picture = svg(&GraphView { edges, left_out: 0, lost: 0, blind: Vec::new() });
        let labels = labels(&picture);
        assert_eq!(labels.len(), 36);
        for (number, (x, y, wide)) in labels.iter().enumerate() {
            for (other_x, other_y, other_wide) in &labels[number + 1..] {
                let apart = (x - other_x).abs() >= (wide + other_wide) / 2.0 || (y - other_y).abs() >= LABEL;
                assert!(apart, "({x}, {y}) and ({other_x}, {other_y})");
            }
        }
    }

    #[test]
    fn a_long_name_is_shortened_by_characters() {
        assert_eq!(shortened(&"ü".repeat(60)).chars().count(), 40);
        assert_eq!(shortened("shop/db"), "shop/db");
    }
}
