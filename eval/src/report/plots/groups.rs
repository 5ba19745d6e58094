//! Which tokens suffer: mean KL by class of the token and by its position in the window.

use maud::html;

use super::Figure;
use crate::comparison::{Comparison, Divergence, GroupKl};
use crate::report::chart::{Axis, Chart, Curve, curves, legend, line, mark, range, row, tip};
use crate::report::numbers::{count, estimate};
use crate::report::tables;

pub(super) fn by_class(c: &Comparison, text: &str) -> Option<Figure> {
    let (names, lines, most) = lines(c, text, |d| &d.by_class)?;
    let x = Axis::new((0.0, most * 1.04), 0.0, 100.0);
    let at = |value: f64| (x.at(value), 8.0);
    let rows = html! {
        @for (i, name) in names.iter().enumerate() {
            @let marks = || lines.iter().filter_map(|l| Some((l.colour, l.points.iter().find(|p| p.0 == i as f64)?)));
            @let drawing = html! {
                @if let Some((low, high)) = range(marks().map(|(_, p)| p.1)) { (line(at(low), at(high), "span")) }
                @for (colour, (_, value, text)) in marks() { (tip(text, mark(at(*value), colour, true, 4.8))) }
            };
            (row(html! { span { (name) } }, 18.0, drawing))
        }
    };
    let base = c.baseline();
    let chart = Chart {
        description: &format!("Mean KL to {base} by class of the token, {text}. The table below has the numbers."),
        layout: "stacked",
        legend: legend(lines.iter().map(|l| (l.colour, l.label))),
        rows,
        ticks: x.labels(4, ""),
        axis: "KL, nats per token (lower is nearer) →",
        ..Chart::default()
    };
    Some(Figure {
        title: format!("Which tokens suffer: {text}"),
        caption: format!("Mean KL to {base} by class of the token to be predicted."),
        drawing: chart.draw(),
        table: tables::groups(c, text, "KL by class of token", |d| &d.by_class),
        half: true,
    })
}

pub(super) fn by_position(c: &Comparison, text: &str) -> Option<Figure> {
    let (names, mut lines, most) = lines(c, text, |d| &d.by_position)?;
    let last = names.len().checked_sub(1).filter(|last| *last > 0)?;
    let x = Axis::new((0.0, last as f64), 6.0, 94.0);
    lines.iter_mut().flat_map(|l| &mut l.points).for_each(|p| p.0 = x.at(p.0));
    // There is room for every second name.
    let tick =
        |(i, name): (usize, &&str)| (x.at(i as f64), if i % 2 == 0 { (*name).to_owned() } else { String::new() });
    let ticks = names.iter().enumerate().map(tick).collect();
    let base = c.baseline();
    let description = format!("Mean KL to {base} by position in the window, {text}. The table below has the numbers.");
    Some(Figure {
        title: format!("Early and late in the window: {text}"),
        caption: format!("Mean KL to {base} by the token's position in the window, nats per token."),
        drawing: curves(&description, &lines, (0.0, most), ticks, "position in the window →"),
        table: tables::groups(c, text, "KL by position", |d| &d.by_position),
        half: true,
    })
}

/// Names of groups, each model's KL over their numbers, and the highest.
type Lines<'a> = (Vec<&'a str>, Vec<Curve<'a>>, f64);

fn lines<'a>(c: &'a Comparison, text: &str, of: fn(&Divergence) -> &Vec<GroupKl>) -> Option<Lines<'a>> {
    let found: Vec<&Divergence> = c.divergences_on(text).collect();
    let names = tables::group_names(&found, of);
    let line = |d: &&Divergence| {
        let label = c.label(d.model);
        let point = |(i, name): (usize, &&str)| {
            let g = of(d).iter().find(|g| g.group == *name && g.kl.value.is_finite())?;
            let said = format!("{label}, {name}: KL {} over {} tokens", estimate(g.kl), count(g.tokens));
            Some((i as f64, g.kl.value, said))
        };
        Curve { label, colour: c.colour(d.model), points: names.iter().enumerate().filter_map(point).collect() }
    };
    let mut lines: Vec<Curve> = found.iter().map(line).collect();
    lines.retain(|line| !line.points.is_empty());
    let (_, most) = range(lines.iter().flat_map(|l| &l.points).map(|p| p.1))?;
    Some((names, lines, most.max(f64::MIN_POSITIVE)))
}
