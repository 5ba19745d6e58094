//! How training went: lines over optimiser steps.

use maud::html;

use super::Figure;
use crate::comparison::Comparison;
use crate::report::TrainingCurve;
use crate::report::chart::{Axis, COLOURS, Chart, legend, mark, path, range, row, tip, vertical};
use crate::report::numbers::plain;

const HEIGHT: f64 = 200.0;
/// Points that still get a mark of their own.
const MARKED: usize = 40;

pub(super) fn figure(c: &Comparison, curve: &TrainingCurve) -> Option<Figure> {
    // Label, colour, (step, value).
    let mut lines = Vec::new();
    for (i, line) in curve.lines.iter().enumerate() {
        let model = c.models.iter().position(|m| m.label == line.label);
        let finite = line.points.iter().filter(|(_, value)| value.is_finite());
        let points: Vec<(f64, f64)> = finite.map(|(step, value)| (*step as f64, *value)).collect();
        if !points.is_empty() {
            lines.push((line.label.as_str(), model.map_or(1 + i % COLOURS, |m| c.colour(m)), points));
        }
    }
    let points = || lines.iter().flat_map(|(_, _, points)| points);
    let (low, high) = range(points().map(|p| p.1))?;
    let (_, last) = range(points().map(|p| p.0))?;
    let ends: Vec<String> = lines
        .iter()
        .filter_map(|(label, _, points)| {
            let (first, last) = (points.first()?, points.last()?);
            Some(format!("{label} from {} at step {} to {} at step {}", plain(first.1), first.0, plain(last.1), last.0))
        })
        .collect();
    // From zero where that costs little; a loss far from zero is drawn over its own range.
    let floor = if low > 0.0 && low < 0.6 * high { 0.0 } else { low };
    let y = Axis::upward((floor, high), HEIGHT);
    let x = Axis::linear((0.0, last), 0.0, 100.0);
    let (grid, gutter) = vertical(&y, "");
    let drawing = html! {
        (grid)
        @for (label, colour, points) in &lines {
            @let at: Vec<(f64, f64)> = points.iter().map(|(step, value)| (x.at(*step), y.at(*value))).collect();
            (path(&at, HEIGHT, &format!("curve c{colour}")))
            @if points.len() <= MARKED {
                @for ((step, value), place) in points.iter().zip(at) {
                    (tip(&format!("{label}, step {step}: {}", plain(*value)), mark(place, *colour, true, 3.2)))
                }
            }
        }
    };
    let chart = Chart {
        description: &format!("{}, {} over training steps: {}.", curve.title, curve.quantity, ends.join("; ")),
        gutter: &gutter,
        legend: legend(lines.iter().map(|(label, colour, _)| (*colour, *label))),
        rows: row(html! {}, HEIGHT, drawing),
        ticks: x.labels(8, ""),
        axis: "optimiser step →",
        ..Chart::default()
    };
    Some(Figure {
        title: curve.title.clone(),
        caption: format!("{}. {}.", curve.quantity, ends.join("; ")),
        drawing: chart.draw(),
        table: None,
        half: false,
    })
}
