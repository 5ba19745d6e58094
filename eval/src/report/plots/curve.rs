//! How training went: lines over optimiser steps.

use super::{Figure, both, is_narrow};
use crate::comparison::Comparison;
use crate::report::TrainingCurve;
use crate::report::numbers::plain;
use crate::report::scale::{Scale, range, rounded, tick_text};
use crate::report::svg::{Anchor, COLOURS, shorten_name, spread, width_of, width_of_name};

const HEIGHT: f64 = 200.0;
/// Points that still get a mark of their own.
const MARKED: usize = 40;

pub(in crate::report) fn figures(c: &Comparison, curves: &[TrainingCurve]) -> Vec<Figure> {
    curves.iter().filter_map(|curve| figure(c, curve)).collect()
}

fn figure(c: &Comparison, curve: &TrainingCurve) -> Option<Figure> {
    let finite = |points: &[(u64, f64)]| -> Vec<(u64, f64)> {
        points.iter().copied().filter(|(_, value)| value.is_finite()).collect()
    };
    let lines: Vec<Line> = curve
        .lines
        .iter()
        .enumerate()
        .map(|(i, line)| {
            let model = c.models.iter().position(|m| m.label == line.label);
            (line.label.as_str(), model.map_or(1 + i % COLOURS, |m| c.colour(m)), finite(&line.points))
        })
        .filter(|(_, _, points)| !points.is_empty())
        .collect();
    let values = || lines.iter().flat_map(|(_, _, points)| points.iter());
    let (low, high) = range(values().map(|p| p.1))?;
    let (_, last) = range(values().map(|p| p.0 as f64))?;
    let ends: Vec<String> = lines
        .iter()
        .filter_map(|(label, _, points)| {
            let (first, last) = (points.first()?, points.last()?);
            Some(format!("{label} from {} at step {} to {} at step {}", plain(first.1), first.0, plain(last.1), last.0))
        })
        .collect();
    let description = format!("{}, {} over training steps: {}.", curve.title, curve.quantity, ends.join("; "));
    let drawing = both(&description, |svg, width| {
        let (top, bottom) = (8.0, 8.0 + HEIGHT);
        let labels = lines.iter().map(|(label, _, _)| width_of_name(label)).fold(0.0, f64::max) + 12.0;
        let right = width - labels.min(0.3 * width);
        // From zero where that costs little; a loss far from zero is drawn over its own range.
        let floor = if low > 0.0 && low < 0.6 * high { 0.0 } else { low };
        let vertical = Scale::linear(rounded((floor, high), 4), bottom, top);
        let ticks = vertical.ticks(4);
        let gutter = ticks.iter().map(|t| width_of(&tick_text(*t, &ticks), 11.5)).fold(0.0, f64::max) + 8.0;
        for t in &ticks {
            svg.line((gutter, vertical.at(*t)), (right, vertical.at(*t)), "grid");
            svg.text((gutter - 6.0, vertical.at(*t) + 4.0), &tick_text(*t, &ticks), Anchor::End, "tick");
        }
        let horizontal = Scale::linear((0.0, last), gutter, right);
        let steps = horizontal.ticks(if is_narrow(width) { 4 } else { 8 });
        let texts: Vec<(f64, String)> = steps.iter().map(|t| (horizontal.at(*t), tick_text(*t, &steps))).collect();
        svg.x_axis(&texts, bottom, bottom);
        svg.text((right, bottom + 31.0), "optimiser step →", Anchor::End, "tick");
        let mut wanted = Vec::new();
        for (label, colour, points) in &lines {
            let at: Vec<(f64, f64)> =
                points.iter().map(|(step, value)| (horizontal.at(*step as f64), vertical.at(*value))).collect();
            svg.path(&at, false, &format!("curve c{colour}"));
            if points.len() <= MARKED {
                for ((step, value), position) in points.iter().zip(&at) {
                    let tip = format!("{label}, step {step}: {}", plain(*value));
                    svg.tip(&tip, |svg| svg.mark(*position, *colour, true, 3.2));
                }
            }
            wanted.extend(at.last().map(|p| p.1));
        }
        for ((label, colour, _), y) in lines.iter().zip(spread(&wanted, 16.0, top + 2.0, bottom - 2.0)) {
            let label = shorten_name(label, width - right - 6.0);
            svg.text((right + 6.0, y + 4.5), &label, Anchor::Start, &format!("name c{colour}"));
        }
        bottom + 38.0
    });
    Some(Figure {
        title: curve.title.clone(),
        caption: format!("{}. {}.", curve.quantity, ends.join("; ")),
        drawing,
        table: None,
        folded: Vec::new(),
        half: false,
    })
}

/// Label, colour, points.
type Line<'a> = (&'a str, usize, Vec<(u64, f64)>);
