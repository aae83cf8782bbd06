//! Where nodes and lines go: layers from left to right, so that clients stand before their servers. After Sugiyama, Tagawa and Toda
//! (1981): break cycles, layer by longest path, order by barycentres; a line that passes a layer gets a place of its own in it.

use std::collections::{BTreeSet, HashMap};

use petgraph::algo::{greedy_feedback_arc_set, toposort};
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::stable_graph::StableDiGraph;
use petgraph::visit::EdgeRef;

/// Sweeps over the layers; more change nothing that an eye could see.
const SWEEPS: usize = 12;
/// Between two boxes of a layer, pixels.
const GAP_Y: f64 = 26.0;
/// Around everything, pixels.
const MARGIN: f64 = 24.0;

/// A box to place.
pub(super) struct Box {
    pub(super) width: f64,
    pub(super) height: f64,
}

/// A line to draw.
pub(super) struct Line {
    pub(super) from: usize,
    pub(super) to: usize,
    /// Room that its label needs between two layers.
    pub(super) label_width: f64,
    pub(super) label_height: f64,
}

/// The result: centres of the boxes, points of the lines from end to end.
pub(super) struct Placed {
    pub(super) boxes: Vec<(f64, f64)>,
    pub(super) lines: Vec<Vec<(f64, f64)>>,
    pub(super) width: f64,
    pub(super) height: f64,
}

/// What takes a place in a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Box(usize),
    /// A line on its way through.
    Passing(usize),
}

/// Layer of each node: clients first. Lines that close a cycle run backwards.
fn layers(count: usize, lines: &[Line]) -> Vec<usize> {
    let mut graph: StableDiGraph<(), ()> = StableDiGraph::new();
    let nodes: Vec<NodeIndex> = (0..count).map(|_| graph.add_node(())).collect();
    let pairs: BTreeSet<(usize, usize)> = lines.iter().filter(|line| line.from != line.to).map(|line| (line.from, line.to)).collect();
    for &(from, to) in &pairs {
        graph.add_edge(nodes[from], nodes[to], ());
    }
    let backwards: BTreeSet<(usize, usize)> =
        greedy_feedback_arc_set(&graph).map(|edge| (edge.source().index(), edge.target().index())).collect();
    let mut acyclic: DiGraph<(), ()> = DiGraph::new();
    let nodes: Vec<NodeIndex> = (0..count).map(|_| acyclic.add_node(())).collect();
    for &(from, to) in pairs.difference(&backwards) {
        acyclic.add_edge(nodes[from], nodes[to], ());
    }
    let mut layer = vec![0; count];
    // Without its feedback arcs the graph has no cycle; if it had one, all would stand in one layer, which is ugly and not wrong.
    for node in toposort(&acyclic, None).unwrap_or_default() {
        for edge in acyclic.edges(node) {
            layer[edge.target().index()] = layer[edge.target().index()].max(layer[node.index()] + 1);
        }
    }
    layer
}

/// Slots of each layer in order, from top to bottom.
fn order(count: usize, lines: &[Line], layer: &[usize]) -> Vec<Vec<Slot>> {
    let depth = layer.iter().max().map_or(0, |last| last + 1);
    let mut slots: Vec<Vec<Slot>> = vec![Vec::new(); depth];
    for (node, &at) in layer.iter().enumerate().take(count) {
        slots[at].push(Slot::Box(node));
    }
    for (number, line) in lines.iter().enumerate() {
        let (low, high) = (layer[line.from].min(layer[line.to]), layer[line.from].max(layer[line.to]));
        for passed in slots.iter_mut().take(high).skip(low + 1) {
            passed.push(Slot::Passing(number));
        }
    }
    for sweep in 0..SWEEPS {
        let forwards = sweep % 2 == 0;
        let all: Vec<usize> = if forwards { (1..depth).collect() } else { (0..depth.saturating_sub(1)).rev().collect() };
        for at in all {
            let neighbour = if forwards { at - 1 } else { at + 1 };
            let places = places(&slots[neighbour]);
            let mut keyed: Vec<(f64, usize, Slot)> = slots[at]
                .iter()
                .enumerate()
                .map(|(place, &slot)| (barycentre(slot, neighbour, &places, lines, layer).unwrap_or(place as f64), place, slot))
                .collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            slots[at] = keyed.into_iter().map(|(_, _, slot)| slot).collect();
        }
    }
    slots
}

type Places = (HashMap<usize, usize>, HashMap<usize, usize>);

/// Where boxes and passing lines stand in a layer.
fn places(slots: &[Slot]) -> Places {
    let (mut boxes, mut passing) = Places::default();
    for (place, slot) in slots.iter().enumerate() {
        match *slot {
            Slot::Box(node) => boxes.insert(node, place),
            Slot::Passing(line) => passing.insert(line, place),
        };
    }
    (boxes, passing)
}

/// The mean place of what a slot is joined to in a neighbouring layer.
fn barycentre(slot: Slot, neighbour: usize, (boxes, passing): &Places, lines: &[Line], layer: &[usize]) -> Option<f64> {
    let place = |number: usize, line: &Line| {
        let end = [line.from, line.to].into_iter().find(|&end| layer[end] == neighbour);
        end.and_then(|end| boxes.get(&end)).or_else(|| passing.get(&number)).copied()
    };
    let joined: Vec<usize> = match slot {
        Slot::Passing(number) => place(number, &lines[number]).into_iter().collect(),
        Slot::Box(node) => {
            let touching = lines.iter().enumerate().filter(|(_, line)| (line.from == node) != (line.to == node));
            touching.filter_map(|(number, line)| place(number, line)).collect()
        }
    };
    if joined.is_empty() { None } else { Some(joined.iter().sum::<usize>() as f64 / joined.len() as f64) }
}

/// Places everything.
pub(super) fn place(boxes: &[Box], lines: &[Line]) -> Placed {
    let layer = layers(boxes.len(), lines);
    let slots = order(boxes.len(), lines, &layer);
    let slot_height = |slot: &Slot| match *slot {
        Slot::Box(node) => boxes[node].height,
        Slot::Passing(line) => lines[line].label_height.max(12.0),
    };
    let heights: Vec<f64> =
        slots.iter().map(|slots| slots.iter().map(slot_height).sum::<f64>() + GAP_Y * slots.len().saturating_sub(1) as f64).collect();
    let height = heights.iter().copied().fold(0.0, f64::max);

    let mut centres = vec![(0.0, 0.0); boxes.len()];
    let mut passing: HashMap<(usize, usize), (f64, f64)> = HashMap::new();
    let mut x = MARGIN;
    for (at, slots) in slots.iter().enumerate() {
        let width = slots.iter().map(|slot| if let Slot::Box(node) = *slot { boxes[node].width } else { 0.0 }).fold(0.0, f64::max);
        let mut y = MARGIN + (height - heights[at]) / 2.0;
        for slot in slots {
            let centre = (x + width / 2.0, y + slot_height(slot) / 2.0);
            match *slot {
                Slot::Box(node) => centres[node] = centre,
                Slot::Passing(line) => drop(passing.insert((line, at), centre)),
            }
            y += slot_height(slot) + GAP_Y;
        }
        // Labels stand between a layer and the next, on the lines that begin or pass there.
        let crosses = |line: &&Line| layer[line.from].min(layer[line.to]) <= at && at < layer[line.from].max(layer[line.to]);
        let label = lines.iter().filter(crosses).map(|line| line.label_width).fold(0.0, f64::max);
        // More of them than stand above each other get more columns; three times as many, since lines cross.
        let stacked: f64 = lines.iter().filter(crosses).map(|line| line.label_height).sum();
        let columns = (if stacked > height { 3.0 * stacked / height.max(1.0) } else { 1.0 }).ceil().min(8.0);
        x += width + label * columns + 70.0;
    }
    let width = x - 70.0 + MARGIN;

    let points = |(number, line): (usize, &Line)| {
        let (from, to) = (layer[line.from], layer[line.to]);
        let right = |node: usize| (centres[node].0 + boxes[node].width / 2.0, centres[node].1);
        let left = |node: usize| (centres[node].0 - boxes[node].width / 2.0, centres[node].1);
        let mut points = Vec::new();
        if from < to {
            points.push(right(line.from));
            points.extend((from + 1..to).filter_map(|at| passing.get(&(number, at)).copied()));
            points.push(left(line.to));
        } else if from > to {
            points.push(left(line.from));
            points.extend((to + 1..from).rev().filter_map(|at| passing.get(&(number, at)).copied()));
            points.push(right(line.to));
        } else {
            // Within a layer, or to itself: out at the right, in at the right.
            points.extend([right(line.from), right(line.to)]);
        }
        points
    };
    let lines = lines.iter().enumerate().map(points).collect();
    Placed { boxes: centres, lines, width, height: height + 2.0 * MARGIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(count: usize, pairs: &[(usize, usize)]) -> Placed {
        let boxes: Vec<Box> = (0..count).map(|_| Box { width: 100.0, height: 30.0 }).collect();
        let lines: Vec<Line> = pairs.iter().map(|&(from, to)| Line { from, to, label_width: 50.0, label_height: 12.0 }).collect();
        place(&boxes, &lines)
    }

    #[test]
    fn clients_stand_left_of_their_servers() {
        let placed = placed(3, &[(2, 1), (1, 0)]);
        assert!(placed.boxes[2].0 < placed.boxes[1].0 && placed.boxes[1].0 < placed.boxes[0].0);
    }

    #[test]
    fn boxes_never_overlap_even_in_cycles() {
        let placed = placed(5, &[(0, 1), (1, 2), (2, 0), (3, 3), (0, 4), (4, 1), (0, 2)]);
        for (a, one) in placed.boxes.iter().enumerate() {
            for other in &placed.boxes[a + 1..] {
                assert!((one.0 - other.0).abs() >= 100.0 || (one.1 - other.1).abs() >= 30.0, "{one:?} {other:?}");
            }
        }
        assert_eq!(placed.lines.len(), 7);
    }

    #[test]
    fn nothing_to_place_is_placed() {
        let placed = placed(0, &[]);
        assert!(placed.boxes.is_empty() && placed.width.is_finite());
    }
}
