//! What quality costs: recovery (or KL, where no tasks were scored) against size and against speed.

use super::{Figure, half};
use crate::comparison::{Comparison, Interval};
use crate::report::numbers::{bytes, percent_interval, plain};
use crate::report::scale::{Scale, range, rounded, tick_text};
use crate::report::svg::{Anchor, Svg, shorten_name, spread, width_of};
use crate::scores::ModelFacts;

const HEIGHT: f64 = 230.0;
/// Points that would cover each other are drawn this far apart.
const BESIDE: f64 = 8.0;

pub(in crate::report) fn figures(c: &Comparison) -> Vec<Figure> {
    let gigabytes = |f: &ModelFacts| f.stored_bytes.map(|b| b as f64 / 1e9);
    let megabytes = |f: &ModelFacts| f.stored_bytes.map(|b| b as f64 / 1e6);
    let small = c.models.iter().filter_map(|m| m.facts.stored_bytes).max().is_some_and(|b| b < 2_000_000_000);
    let size_text = |f: &ModelFacts| f.stored_bytes.map(bytes);
    let speed_text = |f: &ModelFacts| f.decode_speed.map(|s| format!("{} tokens/s", plain(s)));
    let size = if small {
        figure(c, "size", "stored size, MB (smaller is better)", megabytes, size_text)
    } else {
        figure(c, "size", "stored size, GB (smaller is better)", gigabytes, size_text)
    };
    let speed = figure(c, "speed", "tokens/s generating (faster is better)", |f| f.decode_speed, speed_text);
    size.into_iter().chain(speed).collect()
}

struct Point {
    model: usize,
    x: f64,
    y: Interval,
    tip: String,
}

fn figure(
    c: &Comparison,
    what: &str,
    axis: &str,
    x: impl Fn(&ModelFacts) -> Option<f64>,
    text: impl Fn(&ModelFacts) -> Option<String>,
) -> Option<Figure> {
    let by_tasks = c.others().any(|m| c.overall_of(m).is_some());
    let points: Vec<Point> = c
        .models
        .iter()
        .enumerate()
        .filter_map(|(m, model)| {
            let x = x(&model.facts).filter(|x| x.is_finite())?;
            let y = quality(c, m, by_tasks)?;
            let shown = match (m, by_tasks) {
                (0, _) => "the baseline".to_owned(),
                (_, true) => format!("{} of {}'s score", percent_interval(y), c.baseline()),
                (_, false) => format!("KL {}", plain(y.estimate)),
            };
            Some(Point { model: m, x, y, tip: format!("{}: {}, {shown}", model.label, text(&model.facts)?) })
        })
        .collect();
    if points.iter().filter(|p| p.model > 0).count() == 0 || points.len() < 2 {
        return None;
    }
    let kept = if by_tasks { "Recovery" } else { "KL" };
    let description =
        format!("{kept} against {what}. {}.", points.iter().map(|p| p.tip.clone()).collect::<Vec<_>>().join("; "));
    let drawing = half(&description, |svg, width| draw(svg, width, c, &points, by_tasks, axis));
    let caption = if by_tasks {
        format!(
            "Mean share of {}'s score that is kept, with {} intervals. Better is up.",
            c.baseline(),
            c.confidence_text()
        )
    } else {
        format!("KL to {}, mean over texts. Better is down.", c.baseline())
    };
    Some(Figure {
        title: format!("{kept} against {what}"),
        caption: format!("{caption} Points that would cover each other are drawn side by side."),
        drawing,
        table: None,
        folded: Vec::new(),
        half: true,
    })
}

fn draw(svg: &mut Svg, width: f64, c: &Comparison, points: &[Point], by_tasks: bool, axis: &str) -> f64 {
    let (top, bottom) = (10.0, HEIGHT);
    let ys = range(points.iter().flat_map(|p| [p.y.low, p.y.estimate, p.y.high])).unwrap_or((0.0, 1.0));
    let factor = if by_tasks { 100.0 } else { 1.0 };
    let margin = 0.04 * (ys.1 - ys.0).max(0.01);
    let floor = if by_tasks { ys.0 - margin } else { 0.0 };
    let vertical = Scale::linear(rounded((floor * factor, (ys.1 + margin) * factor), 5), bottom, top);
    let ticks = vertical.ticks(5);
    let unit = if by_tasks { " %" } else { "" };
    let text = |t: f64| format!("{}{unit}", tick_text(t, &ticks));
    let gutter = ticks.iter().map(|t| width_of(&text(*t), 11.5)).fold(0.0, f64::max) + 8.0;
    for t in &ticks {
        svg.line((gutter, vertical.at(*t)), (width, vertical.at(*t)), "grid");
        svg.text((gutter - 6.0, vertical.at(*t) + 4.0), &text(*t), Anchor::End, "tick");
    }
    let reference = if by_tasks { 100.0 } else { 0.0 };
    svg.line((gutter, vertical.at(reference)), (width, vertical.at(reference)), "reference");

    // From zero: sizes and speeds are ratios, and bars of the eye start there.
    let most = points.iter().map(|p| p.x).fold(0.0, f64::max);
    let horizontal = Scale::linear((0.0, most * 1.12), gutter, width);
    let xticks = horizontal.ticks(5);
    let texts: Vec<(f64, String)> = xticks.iter().map(|t| (horizontal.at(*t), tick_text(*t, &xticks))).collect();
    svg.x_axis(&texts, top, bottom);
    svg.text((width, bottom + 31.0), axis, Anchor::End, "tick");

    // Points that would cover each other step aside in the order of the models.
    let reach = |p: &Point| (vertical.at(p.y.high * factor) - 6.0, vertical.at(p.y.low * factor) + 6.0);
    let mut xs: Vec<f64> = Vec::new();
    for p in points {
        let (mut x, (a, b)) = (horizontal.at(p.x), reach(p));
        while points.iter().zip(&xs).any(|(q, at)| {
            let (c, d) = reach(q);
            (at - x).abs() < BESIDE - 0.01 && a < d && c < b
        }) {
            x += BESIDE;
        }
        xs.push(x);
    }
    // Labels stand at the side with more room, apart from each other, and a thin line leads to the point.
    for right in [true, false] {
        let side: Vec<usize> = (0..points.len())
            .filter(|&i| (horizontal.at(points[i].x) < gutter + 0.55 * (width - gutter)) == right)
            .collect();
        let wanted: Vec<f64> = side.iter().map(|&i| vertical.at(points[i].y.estimate * factor)).collect();
        let column = |x: f64| {
            let cluster = side.iter().map(|&i| xs[i]).filter(|other| (other - x).abs() < 45.0);
            if right { cluster.fold(x, f64::max) + 14.0 } else { cluster.fold(x, f64::min) - 14.0 }
        };
        for (&i, y) in side.iter().zip(spread(&wanted, 16.0, top + 4.0, bottom - 6.0)) {
            let p = &points[i];
            let at = (xs[i], vertical.at(p.y.estimate * factor));
            let (x, colour) = (column(xs[i]), c.colour(p.model));
            let room = if right { width - x } else { x - gutter };
            let label = shorten_name(c.label(p.model), room);
            svg.line(at, (if right { x - 3.0 } else { x + 3.0 }, y), "leader");
            let anchor = if right { Anchor::Start } else { Anchor::End };
            svg.text((x, y + 4.5), &label, anchor, &format!("name over c{colour}"));
        }
    }
    for (p, x) in points.iter().zip(&xs) {
        let colour = c.colour(p.model);
        let y = |v: f64| vertical.at(v * factor);
        svg.tip(&p.tip, |svg| {
            if p.model > 0 && p.y.low.is_finite() && p.y.high.is_finite() {
                svg.line((*x, y(p.y.low)), (*x, y(p.y.high)), &format!("whisker c{colour}"));
            }
            svg.mark((*x, y(p.y.estimate)), colour, true, 4.8);
        });
    }
    bottom + 38.0
}

fn quality(c: &Comparison, model: usize, by_tasks: bool) -> Option<Interval> {
    let exactly = |v: f64| Interval { estimate: v, low: v, high: v };
    if by_tasks {
        return if model == 0 { Some(exactly(1.0)) } else { Some(c.overall_of(model)?.recovery) };
    }
    if model == 0 {
        return (!c.divergences.is_empty()).then(|| exactly(0.0));
    }
    let texts = c.texts();
    let each: Vec<f64> =
        texts.iter().filter_map(|t| Some(c.divergence(t, model)?.kl.value)).filter(|v| v.is_finite()).collect();
    (each.len() == texts.len() && !each.is_empty()).then(|| exactly(each.iter().sum::<f64>() / each.len() as f64))
}
