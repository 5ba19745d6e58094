//! What quality costs: recovery (or KL, where no tasks were scored) against size and against speed.

use maud::{Markup, html};

use super::Figure;
use crate::comparison::{Comparison, Interval};
use crate::report::chart::{Axis, Chart, HEIGHT, legend_of, line, mark, range, row, tip, vertical};
use crate::report::numbers::{bytes, in_percent, percent_interval, plain};
use crate::scores::ModelFacts;

/// Points that would cover each other are drawn this many pixels apart.
const BESIDE: f64 = 8.0;
/// Points nearer than this, in percent of the width, would.
const NEAR: f64 = 3.0;

pub(super) fn figures(c: &Comparison) -> Vec<Figure> {
    let small = c.models.iter().filter_map(|m| m.facts.stored_bytes).max().is_some_and(|b| b < 2_000_000_000);
    let (unit, scale) = if small { ("MB", 1e6) } else { ("GB", 1e9) };
    let size = |f: &ModelFacts| f.stored_bytes.map(|b| (b as f64 / scale, bytes(b)));
    let speed = |f: &ModelFacts| f.decode_speed.map(|s| (s, format!("{} tokens/s", plain(s))));
    let size = figure(c, "size", &format!("stored size, {unit} (smaller is better)"), size);
    let speed = figure(c, "speed", "tokens/s generating (faster is better)", speed);
    size.into_iter().chain(speed).collect()
}

struct Point {
    model: usize,
    x: f64,
    y: Interval,
    tip: String,
}

/// `x` answers where a model stands and how that is said.
fn figure(c: &Comparison, what: &str, axis: &str, x: impl Fn(&ModelFacts) -> Option<(f64, String)>) -> Option<Figure> {
    let by_tasks = c.others().any(|m| c.overall_of(m).is_some());
    let base = c.baseline();
    let point = |m: usize| {
        let (x, text) = x(&c.models.get(m)?.facts).filter(|(x, _)| x.is_finite())?;
        let (y, shown) = match m {
            0 => (exactly(if by_tasks { 100.0 } else { 0.0 }), "the baseline".to_owned()),
            _ if by_tasks => {
                let kept = c.overall_of(m)?.recovery;
                (in_percent(kept), format!("{} of {base}'s score", percent_interval(kept)))
            }
            _ => (exactly(divergence(c, m)?), format!("KL {}", plain(divergence(c, m)?))),
        };
        Some(Point { model: m, x, y, tip: format!("{}: {text}, {shown}", c.label(m)) })
    };
    let points: Vec<Point> = (0..c.models.len()).filter_map(point).collect();
    if points.len() < 2 || !by_tasks && c.divergences.is_empty() {
        return None;
    }
    let (kept, caption) = if by_tasks {
        let level = c.confidence_text();
        ("Recovery", format!("Mean share of {base}'s score that is kept, with {level} intervals. Better is up."))
    } else {
        ("KL", format!("KL to {base}, mean over texts. Better is down."))
    };
    let said: Vec<&str> = points.iter().map(|p| p.tip.as_str()).collect();
    let description = format!("{kept} against {what}. {}.", said.join("; "));
    Some(Figure {
        title: format!("{kept} against {what}"),
        caption: format!("{caption} Points that would cover each other are drawn side by side."),
        drawing: draw(c, &points, by_tasks, axis, &description),
        table: None,
        half: true,
    })
}

fn draw(c: &Comparison, points: &[Point], by_tasks: bool, axis: &str, description: &str) -> Markup {
    let (low, high) = range(points.iter().flat_map(|p| [p.y.low, p.y.estimate, p.y.high])).unwrap_or((0.0, 1.0));
    let margin = 0.04 * (high - low);
    let y = Axis::upward((if by_tasks { low - margin } else { 0.0 }, high + margin), HEIGHT);
    let (grid, gutter) = vertical(&y, if by_tasks { " %" } else { "" });
    // From zero, as sizes and speeds are ratios.
    let most = points.iter().map(|p| p.x).fold(0.0, f64::max);
    let x = Axis::new((0.0, most * 1.12), 0.0, 100.0);
    let reference = y.at(if by_tasks { 100.0 } else { 0.0 });
    let covers = |a: &Point, b: &Point| {
        let reach = |p: &Point| (y.at(p.y.high) - 6.0, y.at(p.y.low) + 6.0);
        let ((top, bottom), (other_top, other_bottom)) = (reach(a), reach(b));
        (x.at(a.x) - x.at(b.x)).abs() < NEAR && top < other_bottom && other_top < bottom
    };
    let mut aside: Vec<usize> = Vec::new();
    for (i, p) in points.iter().enumerate() {
        let taken: Vec<usize> = (0..i).filter(|&j| covers(p, &points[j])).map(|j| aside[j]).collect();
        aside.push((0..).find(|n| !taken.contains(n)).unwrap_or(0));
    }
    let drawing = html! {
        (grid)
        (line((0.0, reference), (100.0, reference), "reference"))
        @for (p, aside) in points.iter().zip(aside) {
            @let (colour, at) = (c.colour(p.model), |v| (0.0, y.at(v)));
            @let drawing = html! {
                @if p.model > 0 { (line(at(p.y.low), at(p.y.high), &format!("whisker c{colour}"))) }
                (mark(at(p.y.estimate), colour, true, 4.8))
            };
            @let shift = format!("translate({})", aside as f64 * BESIDE);
            svg x={(x.at(p.x)) "%"} { g transform=(shift) { (tip(&p.tip, drawing)) } }
        }
    };
    let chart = Chart {
        description,
        gutter: &gutter,
        legend: legend_of(c, points.iter().map(|p| p.model)),
        rows: row(html! {}, HEIGHT, drawing),
        ticks: x.labels(4, ""),
        axis,
        ..Chart::default()
    };
    chart.draw()
}

fn exactly(v: f64) -> Interval {
    Interval { estimate: v, low: v, high: v }
}

/// Mean KL over texts, where the model has them all.
fn divergence(c: &Comparison, model: usize) -> Option<f64> {
    let texts = c.texts();
    let kl = |text: &&str| Some(c.divergence(text, model)?.kl.value).filter(|v| v.is_finite());
    let each: Vec<f64> = texts.iter().filter_map(kl).collect();
    (each.len() == texts.len() && !each.is_empty()).then(|| each.iter().sum::<f64>() / each.len() as f64)
}
