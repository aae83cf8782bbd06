//! Where the labels of lines stand: on their own line, beside every other label and beside the boxes, as far as there is room.

/// A rectangle by its middle and its size, pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Area {
    pub(super) middle: (f64, f64),
    pub(super) width: f64,
    pub(super) height: f64,
}

impl Area {
    /// How many square pixels two have in common.
    fn common(&self, other: &Self) -> f64 {
        let along = |a: f64, b: f64, sizes: f64| (sizes / 2.0 - (a - b).abs()).max(0.0);
        let wide = along(self.middle.0, other.middle.0, self.width + other.width).min(self.width.min(other.width));
        let high = along(self.middle.1, other.middle.1, self.height + other.height).min(self.height.min(other.height));
        wide * high
    }
}

/// How many places are tried on either side of a stretch's middle, and how far apart they are, as a share of the stretch.
const TRIED: i32 = 20;
const STEP: f64 = 0.02;

/// A point of the curve that `svg` draws between two points: level at both ends.
fn on_curve((ax, ay): (f64, f64), (bx, by): (f64, f64), share: f64) -> (f64, f64) {
    let (t, u) = (share, 1.0 - share);
    let middle = (ax + bx) / 2.0;
    let bend = |a: f64, b: f64, c: f64, d: f64| u * u * u * a + 3.0 * u * u * t * b + 3.0 * u * t * t * c + t * t * t * d;
    (bend(ax, middle, middle, bx), bend(ay, ay, by, by))
}

/// Where the label of a line may stand, the best first. A loop's stands beside it.
fn places(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut places = Vec::new();
    for pair in points.windows(2) {
        let ((ax, ay), (bx, by)) = (pair[0], pair[1]);
        if (ax - bx).abs() < 1.0 {
            let x = ax + 36.0 + (ay - by).abs() / 5.0;
            places.extend([0.0, 14.0, -14.0, 28.0, -28.0].map(|aside| (x, (ay + by) / 2.0 + aside)));
        } else {
            let shares = (0..=TRIED).flat_map(|nth| [1.0, -1.0].map(|side| 0.5 + side * STEP * f64::from(nth)));
            places.extend(shares.map(|share| on_curve(pair[0], pair[1], share)));
        }
    }
    places
}

/// The middle of each label; `None` for a line without points. `sizes`: width and height of each label, with what it keeps free.
pub(super) fn spread(lines: &[Vec<(f64, f64)>], sizes: &[(f64, f64)], boxes: &[Area]) -> Vec<Option<(f64, f64)>> {
    let mut taken: Vec<Area> = boxes.to_vec();
    let mut middles = Vec::new();
    for (points, &(width, height)) in lines.iter().zip(sizes) {
        let covered = |middle| {
            let label = Area { middle, width, height };
            taken.iter().map(|other| label.common(other)).sum::<f64>()
        };
        let best = places(points).into_iter().map(|middle| (covered(middle), middle)).reduce(|a, b| if b.0 < a.0 { b } else { a });
        let middle = best.map(|(_, middle)| middle);
        taken.extend(middle.map(|middle| Area { middle, width, height }));
        middles.push(middle);
    }
    middles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_beside_has_nothing_in_common_and_what_lies_within_has_all() {
        let area = |x: f64, y: f64, width: f64, height: f64| Area { middle: (x, y), width, height };
        let one = area(0.0, 0.0, 10.0, 10.0);
        assert_eq!(one.common(&area(10.0, 0.0, 10.0, 10.0)), 0.0);
        assert_eq!(one.common(&area(5.0, 5.0, 10.0, 10.0)), 25.0);
        assert_eq!(one.common(&area(1.0, 1.0, 2.0, 2.0)), 4.0);
    }

    #[test]
    fn lines_that_cross_have_their_labels_apart() {
        let lines = [vec![(0.0, 0.0), (300.0, 100.0)], vec![(0.0, 100.0), (300.0, 0.0)], vec![(0.0, 50.0), (300.0, 50.0)]];
        let middles = spread(&lines, &[(60.0, 14.0); 3], &[]);
        let labels: Vec<Area> = middles.iter().map(|middle| Area { middle: middle.unwrap(), width: 60.0, height: 14.0 }).collect();
        for (number, one) in labels.iter().enumerate() {
            assert!(labels[number + 1..].iter().all(|other| one.common(other) == 0.0), "{labels:?}");
        }
    }
}
