//! Share of the baseline's score that each model keeps: dots with intervals, overall and task by task.

use super::{Figure, both, is_narrow, legend, spoken};
use crate::comparison::{Comparison, Counted, Interval, TaskComparison};
use crate::report::numbers::{difference, p_value, percent, percent_interval, value_and_error};
use crate::report::scale::{Scale, range, rounded, tick_text};
use crate::report::svg::{Anchor, SMALL, Svg, TEXT, shorten, shorten_name, width_of, width_of_name};
use crate::report::tables;
use crate::report::view::families;

/// Distance of the lines of one task.
const LINE: f64 = 11.0;
/// Between tasks.
const GAP: f64 = 13.0;
/// Between models in the overall part.
const OVERALL: f64 = 24.0;
/// How many times the range of all estimates an interval may reach beyond it before the axis cuts it.
const REACH: f64 = 0.75;
/// The least range of estimates that is drawn, as a share.
const LEAST: f64 = 0.04;

/// Tasks in the mean recovery.
fn recovered(counted: &Counted) -> usize {
    counted.recovery
}

pub(in crate::report) fn figure(c: &Comparison) -> Option<Figure> {
    let tasks = c.headline_tasks();
    let overall: Vec<usize> = c.others().filter(|&m| c.overall_of(m).is_some()).collect();
    if overall.is_empty() && !tasks.iter().any(|t| c.others().any(|m| recovery(t, m).is_some())) {
        return None;
    }
    let (alone, families) = families(&tasks);
    let base = c.baseline();
    let ends = domain(c, &tasks);
    let description = format!(
        "Share of {base}'s score that is kept, with {} intervals. Mean over {}: {}. The table below has every task.",
        c.confidence_text(),
        overall.first().and_then(|&m| c.overall_of(m)).map_or_else(|| c.tasks_text(), |o| c.counted_text(o, recovered)),
        spoken(
            overall
                .iter()
                .filter_map(|&m| { Some((c.label(m).to_owned(), percent_interval(c.overall_of(m)?.recovery))) })
        )
    );
    let drawing = both(&description, |svg, width| draw(svg, width, c, ends, &overall, &alone, &families));
    let folded = families
        .iter()
        .map(|(name, members)| {
            let title = format!("Every task of {name} ({})", members.len());
            (title.clone(), both(&title, |svg, width| draw(svg, width, c, domain(c, members), &[], members, &[])))
        })
        .collect();
    let mut caption = format!(
        "Dots are shares of {base}'s score, lines their {} intervals; the dashed line is {base} itself. A hollow dot \
         means: not significantly different from {base}.",
        c.confidence_text()
    );
    if !families.is_empty() {
        caption.push_str(" Of a family of tasks each task is a stroke, the tall one its median.");
    }
    Some(Figure {
        title: "How much of the score is kept".to_owned(),
        caption,
        drawing,
        table: tables::recovery(c, c),
        folded,
        half: false,
    })
}

/// The axis reaches as far down as the rows, which lie over it: they are drawn beside it first.
fn draw(
    svg: &mut Svg,
    width: f64,
    c: &Comparison,
    ends: (f64, f64),
    overall: &[usize],
    alone: &[&TaskComparison],
    families: &[(String, Vec<&TaskComparison>)],
) -> f64 {
    let narrow = is_narrow(width);
    let models: Vec<usize> = c.others().collect();
    let value = |m: usize| c.overall_of(m).map_or(String::new(), |o| percent_interval(o.recovery));
    let gutter = if narrow {
        0.0
    } else {
        let names = overall.iter().map(|&m| width_of_name(c.label(m)) + width_of(&value(m), TEXT) + 30.0);
        let names = names.chain(alone.iter().map(|t| width_of(&t.task, TEXT) + 14.0));
        names.fold(150.0, f64::max).min(330.0)
    };
    let scale = Scale::linear(ends, gutter + 8.0, width - 10.0);
    let mut rows = Svg::new(width);
    let mut y = 4.0;
    if overall.is_empty() && models.len() > 1 {
        y = legend(svg, c, &models, width, y);
    }
    let top = y;

    for &m in overall {
        let Some(o) = c.overall_of(m) else { continue };
        let (class, value) = (format!("name over c{}", c.colour(m)), value(m));
        let (right, baseline, at) = if narrow { (width, 14.0, 26.0) } else { (gutter - 12.0, 16.0, 11.5) };
        let name = shorten_name(c.label(m), right - width_of(&value, TEXT) - 14.0);
        rows.text((0.0, y + baseline), &name, Anchor::Start, &class);
        rows.text((right, y + baseline), &value, Anchor::End, "over");
        let tip = format!("{}, mean of {}: {value}", c.label(m), c.counted_text(o, recovered));
        let filled = o.recovery.high < 1.0 || o.recovery.low > 1.0;
        rows.tip(&tip, |svg| dot(svg, &scale, o.recovery, y + at, c.colour(m), filled, 5.0));
        y += if narrow { OVERALL + 14.0 } else { OVERALL };
    }
    if !(overall.is_empty() || alone.is_empty() && families.is_empty()) {
        y += 6.0;
        rows.line((0.0, y), (width, y), "rule");
        y += 4.0;
    }

    // A name stands left of its lines or above them; answers where the first line is.
    let heading = |rows: &mut Svg, title: &str, y: f64, lines: usize| {
        let middle = y + GAP + (lines.max(1) - 1) as f64 * LINE / 2.0;
        let (room, baseline, first) =
            if narrow { (width, y + 13.0, y + 26.0) } else { (gutter - 12.0, middle + 4.5, y + GAP) };
        rows.text((0.0, baseline), &shorten(title, room, TEXT), Anchor::Start, "over");
        first
    };
    for (name, members) in families {
        let first = heading(&mut rows, &format!("{name}: {} tasks", members.len()), y, models.len());
        for (i, &m) in models.iter().enumerate() {
            strip(&mut rows, c, &scale, members, m, first + i as f64 * LINE);
        }
        y = first + (models.len() as f64 - 1.0) * LINE + GAP;
    }
    for t in alone {
        let present: Vec<(usize, Interval)> = models.iter().filter_map(|&m| Some((m, recovery(t, m)?))).collect();
        if present.is_empty() {
            continue;
        }
        let first = heading(&mut rows, &t.task, y, present.len());
        for (i, &(m, interval)) in present.iter().enumerate() {
            let filled = t.against(m).is_some_and(|a| c.significant(a));
            let at = first + i as f64 * LINE;
            rows.tip(&tip(c, t, m), |svg| dot(svg, &scale, interval, at, c.colour(m), filled, 3.8));
        }
        y = first + (present.len() as f64 - 1.0) * LINE + GAP;
    }

    let ticks: Vec<f64> = scale.ticks(if narrow { 5 } else { 8 });
    let percents: Vec<f64> = ticks.iter().map(|t| 100.0 * t).collect();
    let texts: Vec<(f64, String)> =
        ticks.iter().zip(&percents).map(|(t, p)| (scale.at(*t), format!("{} %", tick_text(*p, &percents)))).collect();
    svg.x_axis(&texts, top, y);
    let one = scale.at(1.0);
    svg.line((one, top), (one, y), "reference");
    let base = format!("{} = 100 %", c.baseline());
    let half = width_of(&base, SMALL) / 2.0;
    svg.text((one.clamp(half, (width - half).max(half)), y + 29.0), &base, Anchor::Middle, "tick strong");
    svg.append(rows);
    y + 36.0
}

/// Every task of a family as a stroke, and their median.
fn strip(svg: &mut Svg, c: &Comparison, scale: &Scale, members: &[&TaskComparison], model: usize, y: f64) {
    let mut values: Vec<f64> = members.iter().filter_map(|t| Some(recovery(t, model)?.estimate)).collect();
    values.sort_by(f64::total_cmp);
    let (Some(&low), Some(&high)) = (values.first(), values.last()) else { return };
    let (below, above) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    let median = (below + above) / 2.0;
    let tip = format!(
        "{}: median {} of {} tasks, {} to {}",
        c.label(model),
        percent(median),
        values.len(),
        percent(low),
        percent(high)
    );
    let class = format!("strip c{}", c.colour(model));
    svg.tip(&tip, |svg| {
        for x in values.iter().map(|v| scale.at(*v)) {
            svg.line((x, y - 2.5), (x, y + 2.5), &class);
        }
        let x = scale.at(median);
        svg.line((x, y - 5.0), (x, y + 5.0), &format!("{class} median"));
    });
}

/// A dot with its interval; ends beyond the axis are arrows.
fn dot(svg: &mut Svg, scale: &Scale, i: Interval, y: f64, colour: usize, filled: bool, size: f64) {
    let (low, high) = (scale.at(i.low), scale.at(i.high));
    if i.low.is_finite() && i.high.is_finite() {
        svg.line((low, y), (high, y), &format!("whisker c{colour}"));
    }
    for (value, x, sign) in [(i.low, low, 1.0), (i.high, high, -1.0)] {
        if value.is_finite() && !scale.holds(value) {
            svg.path(
                &[(x + sign * 5.0, y - 3.5), (x, y), (x + sign * 5.0, y + 3.5)],
                false,
                &format!("whisker c{colour}"),
            );
        }
    }
    if scale.holds(i.estimate) {
        svg.mark((scale.at(i.estimate), y), colour, filled, size);
    }
}

fn tip(c: &Comparison, t: &TaskComparison, m: usize) -> String {
    let mut out = format!("{}, {} ({})", c.label(m), t.task, t.metric_text());
    let (Some(score), Some(a)) = (t.score_of(m), t.against(m)) else { return out };
    if let Some(recovery) = a.recovery {
        out.push_str(&format!(": {} kept", percent_interval(recovery)));
    }
    out.push_str(&format!("\nscore {}", value_and_error(score.score, score.standard_error)));
    if let Some(base) = t.score_of(0) {
        out.push_str(&format!(", {} {}", c.baseline(), value_and_error(base.score, base.standard_error)));
    }
    out.push_str(&format!("\ndifference {}, adjusted p {}", difference(a.difference), p_value(a.p_adjusted)));
    out
}

fn recovery(t: &TaskComparison, model: usize) -> Option<Interval> {
    t.against(model).and_then(|a| a.recovery).filter(|r| r.estimate.is_finite())
}

/// From the lowest to the highest interval, without the ends of the very wide ones.
fn domain(c: &Comparison, tasks: &[&TaskComparison]) -> (f64, f64) {
    let mut intervals: Vec<Interval> = c.others().filter_map(|m| Some(c.overall_of(m)?.recovery)).collect();
    intervals.extend(tasks.iter().flat_map(|t| c.others().filter_map(|m| recovery(t, m))));
    let (low, high) = range(intervals.iter().map(|i| i.estimate).chain([1.0])).unwrap_or((0.0, 1.0));
    let reach = REACH * (high - low).max(LEAST);
    let ends =
        range(intervals.iter().flat_map(|i| [i.low.max(low - reach), i.high.min(high + reach)]).chain([low, high]));
    let (low, high) = ends.unwrap_or((0.0, 1.0));
    let margin = 0.02 * (high - low).max(LEAST);
    rounded((low - margin, high + margin), 16)
}
