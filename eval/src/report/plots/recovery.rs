//! Share of the baseline's score that each model keeps: dots with intervals, overall and task by task.

use maud::{Markup, html};

use super::Figure;
use crate::comparison::{Comparison, Interval, TaskComparison};
use crate::report::chart::{Axis, Chart, legend_of, line, mark, range, rounded, row, tip};
use crate::report::numbers::{difference, in_percent, p_value, percent, percent_interval, value_and_error};
use crate::report::tables;
use crate::report::view::families;

/// Distance of the lines of one task.
const LINE: f64 = 11.0;
/// Above the first line and under the last.
const GAP: f64 = 13.0;
/// Height of a model in the overall part.
const OVERALL: f64 = 24.0;
/// How many times the range of all estimates an interval may reach beyond it before the axis cuts it.
const REACH: f64 = 0.75;
/// The least range of estimates that is drawn, in percent.
const LEAST: f64 = 4.0;

pub(super) fn figure(c: &Comparison) -> Option<Figure> {
    let tasks = c.headline_tasks();
    let overall: Vec<usize> = c.others().filter(|&m| c.overall_of(m).is_some()).collect();
    if overall.is_empty() && !tasks.iter().any(|t| c.others().any(|m| recovery(t, m).is_some())) {
        return None;
    }
    let (alone, families) = families(&tasks);
    let (base, level) = (c.baseline(), c.confidence_text());
    let first = overall.first().and_then(|&m| c.overall_of(m));
    let over = first.map_or_else(|| c.tasks_text(), |o| c.counted_text(o, |n| n.recovery));
    let kept: Vec<String> = overall
        .iter()
        .filter_map(|&m| Some(format!("{}: {}", c.label(m), percent_interval(c.overall_of(m)?.recovery))))
        .collect();
    let description = format!(
        "Share of {base}'s score that is kept, with {level} intervals. Mean over {over}: {}. The table below has every \
         task.",
        kept.join("; ")
    );
    let mut caption = format!(
        "Dots are shares of {base}'s score, lines their {level} intervals; the dashed line is {base} itself. A hollow \
         dot means: not significantly different from {base}."
    );
    if !families.is_empty() {
        caption.push_str(" Of a family of tasks each task is a stroke, the tall one its median.");
    }
    let drawing = html! {
        (draw(c, &description, axis(c, &tasks), &overall, &alone, &families))
        @for (name, members) in &families {
            @let title = format!("Every task of {name} ({})", members.len());
            details { summary { (title) } (draw(c, &title, axis(c, members), &[], members, &[])) }
        }
    };
    Some(Figure {
        title: "How much of the score is kept".to_owned(),
        caption,
        drawing,
        table: tables::recovery(c, c),
        half: false,
    })
}

fn draw(
    c: &Comparison,
    description: &str,
    x: Axis,
    overall: &[usize],
    alone: &[&TaskComparison],
    families: &[(String, Vec<&TaskComparison>)],
) -> Markup {
    let models: Vec<usize> = c.others().collect();
    let first = |lines: usize| 2.0 * GAP + lines.saturating_sub(1) as f64 * LINE;
    let at = |i: usize| GAP + i as f64 * LINE;
    let rows = html! {
        @for (m, o) in overall.iter().filter_map(|&m| Some((m, c.overall_of(m)?))) {
            @let value = percent_interval(o.recovery);
            @let text = format!("{}, mean of {}: {value}", c.label(m), c.counted_text(o, |n| n.recovery));
            @let filled = o.recovery.high < 1.0 || o.recovery.low > 1.0;
            @let name = html! { b class={"c" (c.colour(m))} { (c.label(m)) } span { (value) } };
            (row(name, OVERALL, tip(&text, dot(&x, o.recovery, OVERALL / 2.0, c.colour(m), filled, 5.0))))
        }
        @if !(overall.is_empty() || alone.is_empty() && families.is_empty()) { hr; }
        @for (name, members) in families {
            @let strips = html! { @for (i, &m) in models.iter().enumerate() { (strip(c, &x, members, m, at(i))) } };
            (row(html! { span { (name) ": " (members.len()) " tasks" } }, first(models.len()), strips))
        }
        @for t in alone {
            @let present: Vec<(usize, Interval)> = models.iter().filter_map(|&m| Some((m, recovery(t, m)?))).collect();
            @let dots = html! {
                @for (i, &(m, interval)) in present.iter().enumerate() {
                    @let filled = t.against(m).is_some_and(|a| c.significant(a));
                    (tip(&about(c, t, m), dot(&x, interval, at(i), c.colour(m), filled, 3.8)))
                }
            };
            @if !present.is_empty() { (row(html! { span { (t.task) } }, first(present.len()), dots)) }
        }
    };
    let chart = Chart {
        description,
        layout: "names",
        gutter: if overall.is_empty() { "min(14rem, 38%)" } else { "min(17.5rem, 42%)" },
        legend: if overall.is_empty() && models.len() > 1 {
            legend_of(c, models)
        } else {
            html! {}
        },
        rows,
        ticks: x.labels(8, " %"),
        reference: Some((x.at(100.0), format!("{} = 100 %", c.baseline()))),
        ..Chart::default()
    };
    chart.draw()
}

/// Every task of a family as a stroke, and their median.
fn strip(c: &Comparison, x: &Axis, members: &[&TaskComparison], model: usize, y: f64) -> Markup {
    let mut values: Vec<f64> = members.iter().filter_map(|t| Some(recovery(t, model)?.estimate)).collect();
    values.sort_by(f64::total_cmp);
    let (Some(&low), Some(&high)) = (values.first(), values.last()) else { return html! {} };
    let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
    let (label, n) = (c.label(model), values.len());
    let text = format!("{label}: median {} of {n} tasks, {} to {}", percent(median), percent(low), percent(high));
    let class = format!("strip c{}", c.colour(model));
    let stroke = |value: f64, half: f64, class: &str| {
        let x = x.at(100.0 * value);
        line((x, y - half), (x, y + half), class)
    };
    let strokes = html! {
        @for value in values { (stroke(value, 2.5, &class)) }
        (stroke(median, 5.0, &format!("{class} median")))
    };
    tip(&text, strokes)
}

/// A dot with its interval; ends beyond the axis are arrows.
fn dot(axis: &Axis, share: Interval, y: f64, colour: usize, filled: bool, size: f64) -> Markup {
    let i = in_percent(share);
    let class = format!("whisker c{colour}");
    html! {
        @if i.low.is_finite() && i.high.is_finite() { (line((axis.at(i.low), y), (axis.at(i.high), y), &class)) }
        @for (value, arrow) in [(i.low, "M5 -3.5L0 0L5 3.5"), (i.high, "M-5 -3.5L0 0L-5 3.5")] {
            @if value.is_finite() && !axis.holds(value) {
                svg x={(axis.at(value)) "%"} y=(y) { path class=(class) d=(arrow) {} }
            }
        }
        @if axis.holds(i.estimate) { (mark((axis.at(i.estimate), y), colour, filled, size)) }
    }
}

fn about(c: &Comparison, t: &TaskComparison, m: usize) -> String {
    let mut out = format!("{}, {} ({})", c.label(m), t.task, t.metric_text());
    let Some(a) = t.against(m) else { return out };
    if let Some(recovery) = a.recovery {
        out.push_str(&format!(": {} kept", percent_interval(recovery)));
    }
    let [own, base] = [m, 0].map(|m| value_and_error(t.scores[m].score, t.scores[m].standard_error));
    out.push_str(&format!("\nscore {own}, {} {base}", c.baseline()));
    out.push_str(&format!("\ndifference {}, adjusted p {}", difference(a.difference), p_value(a.p_adjusted)));
    out
}

fn recovery(t: &TaskComparison, model: usize) -> Option<Interval> {
    t.against(model).and_then(|a| a.recovery).filter(|r| r.estimate.is_finite())
}

/// From the lowest to the highest interval, in percent, without the ends of the very wide ones.
fn axis(c: &Comparison, tasks: &[&TaskComparison]) -> Axis {
    let overall = c.others().filter_map(|m| Some(c.overall_of(m)?.recovery));
    let each = tasks.iter().flat_map(|t| c.others().filter_map(|m| recovery(t, m)));
    let intervals: Vec<Interval> = overall.chain(each).map(in_percent).collect();
    let (low, high) = range(intervals.iter().map(|i| i.estimate).chain([100.0])).unwrap_or((0.0, 100.0));
    let reach = REACH * (high - low).max(LEAST);
    let ends = intervals.iter().flat_map(|i| [i.low.max(low - reach), i.high.min(high + reach)]);
    let (low, high) = range(ends.chain([low, high])).unwrap_or((low, high));
    let margin = 0.02 * (high - low).max(LEAST);
    Axis::new(rounded((low - margin, high + margin), 16), 0.0, 100.0)
}
