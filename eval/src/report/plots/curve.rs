//! How training went: lines over optimiser steps.

use super::Figure;
use crate::comparison::Comparison;
use crate::report::chart::{Axis, COLOURS, Curve, curves, range};
use crate::report::numbers::plain;
use crate::report::{CurveLine, TrainingCurve};

pub(super) fn figure(c: &Comparison, curve: &TrainingCurve) -> Option<Figure> {
    let finite = |line: &CurveLine| -> Vec<(u64, f64)> {
        line.points.iter().copied().filter(|(_, value)| value.is_finite()).collect()
    };
    let all = || curve.lines.iter().flat_map(finite);
    let (low, high) = range(all().map(|p| p.1))?;
    let (_, last) = range(all().map(|p| p.0 as f64))?;
    let x = Axis::new((0.0, last), 0.0, 100.0);
    let mut lines = Vec::new();
    let mut ends = Vec::new();
    for (i, line) in curve.lines.iter().enumerate() {
        let (label, points) = (line.label.as_str(), finite(line));
        let (Some(first), Some(last)) = (points.first(), points.last()) else { continue };
        let (from, to) = (plain(first.1), plain(last.1));
        ends.push(format!("{label} from {from} at step {} to {to} at step {}", first.0, last.0));
        let model = c.models.iter().position(|m| m.label == line.label);
        let point =
            |&(step, value): &(u64, f64)| (x.at(step as f64), value, format!("{label}, step {step}: {}", plain(value)));
        lines.push(Curve {
            label,
            colour: model.map_or(1 + i % COLOURS, |m| c.colour(m)),
            points: points.iter().map(point).collect(),
        });
    }
    let ends = ends.join("; ");
    let description = format!("{}, {} over training steps: {ends}.", curve.title, curve.quantity);
    // From zero where that costs little; a loss far from zero is drawn over its own range.
    let floor = if low > 0.0 && low < 0.6 * high { 0.0 } else { low };
    Some(Figure {
        title: curve.title.clone(),
        caption: format!("{}. {ends}.", curve.quantity),
        drawing: curves(&description, &lines, (floor, high), x.labels(8, ""), "optimiser step →"),
        table: None,
        half: false,
    })
}
