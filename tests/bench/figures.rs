//! Samples, medians with their intervals, and tables.

use std::fmt::Write as _;

/// Measured values of one thing, in the order they were taken: the nth of two rows belong to one round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(pub(crate) Vec<f64>);

/// A median and where it lies with 95 % confidence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Median {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The median with the distribution-free 95 % interval from order statistics (the normal approximation to the binomial).
    pub(crate) fn median(&self) -> Median {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        assert!(n > 0, "nothing was measured");
        let half = 1.96 * (n as f64).sqrt() / 2.0;
        let at = |place: f64| sorted[(place.max(0.0) as usize).min(n - 1)];
        let middle = n as f64 / 2.0;
        let value = if n.is_multiple_of(2) { f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]) } else { sorted[n / 2] };
        Median { value, low: at((middle - half).floor()), high: at((middle + half).ceil()) }
    }

    /// The value below which this share (0 to 1) of them lies.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
    }

    /// Round by round, this over that: what both had in common in a round cancels out.
    pub(crate) fn over(&self, that: &Self) -> Median {
        assert_eq!(self.0.len(), that.0.len(), "they were not measured side by side");
        Self(self.0.iter().zip(&that.0).map(|(a, b)| a / b).collect()).median()
    }
}

impl Median {
    /// `0.953 (0.941 to 0.967)`
    pub(crate) fn ratio(&self) -> String {
        format!("{:.3} ({:.3} to {:.3})", self.value, self.low, self.high)
    }
}

/// A table as Markdown, so that it can go into RESULTS.md as it is.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(ToString::to_string).collect()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn print(&self) {
        let columns = self.rows[0].len();
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::from("|");
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, " {cell:<width$} |");
            }
            println!("{line}");
            if index == 0 {
                println!("|{}|", widths.iter().map(|width| "-".repeat(width + 2)).collect::<Vec<_>>().join("|"));
            }
        }
        println!();
    }
}

/// A number with thousands apart: `36,912`.
pub(crate) fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds in the unit that fits.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
