//! Which tokens suffer: mean KL by class of the token and by its position in the window.

use maud::{Markup, html};

use super::Figure;
use crate::comparison::{Comparison, Divergence, GroupKl};
use crate::report::chart::{Axis, Chart, legend_of, line, mark, path, range, row, tip, vertical};
use crate::report::numbers::{count, estimate};
use crate::report::tables::{self, group_names};

const HEIGHT: f64 = 170.0;

pub(super) fn by_class(c: &Comparison, text: &str) -> Option<Figure> {
    let groups = Groups::of(c, text, |d| &d.by_class)?;
    let x = Axis::linear((0.0, groups.most * 1.04), 0.0, 100.0);
    let rows = html! {
        @for name in &groups.names {
            @let marks: Vec<(&Divergence, &GroupKl)> =
                groups.found.iter().filter_map(|d| Some((*d, group(&d.by_class, name)?))).collect();
            @let drawing = html! {
                @if let Some((low, high)) = range(marks.iter().map(|(_, g)| g.kl.value)) {
                    (line((x.at(low), 8.0), (x.at(high), 8.0), "span"))
                }
                @for (d, g) in marks { (point(c, d, g, (x.at(g.kl.value), 8.0), 4.8)) }
            };
            (row(html! { span { (name) } }, 18.0, drawing))
        }
    };
    let description =
        format!("Mean KL to {} by class of the token, {text}. The table below has the numbers.", c.baseline());
    let chart = Chart {
        description: &description,
        layout: "stacked",
        legend: legend_of(c, groups.models()),
        rows,
        ticks: x.labels(4, ""),
        axis: "KL, nats per token (lower is nearer) →",
        ..Chart::default()
    };
    Some(Figure {
        title: format!("Which tokens suffer: {text}"),
        caption: format!("Mean KL to {} by class of the token to be predicted.", c.baseline()),
        drawing: chart.draw(),
        table: tables::groups(c, text, "KL by class of token", |d| &d.by_class),
        half: true,
    })
}

pub(super) fn by_position(c: &Comparison, text: &str) -> Option<Figure> {
    let groups = Groups::of(c, text, |d| &d.by_position)?;
    let last = groups.names.len().checked_sub(1).filter(|last| *last > 0)?;
    let y = Axis::upward((0.0, groups.most), HEIGHT);
    let (grid, gutter) = vertical(&y, "");
    let x = |i: usize| 6.0 + 88.0 * i as f64 / last as f64;
    let curve = |d: &Divergence| {
        let names = groups.names.iter().enumerate();
        let points: Vec<_> = names.filter_map(|(i, name)| Some((x(i), group(&d.by_position, name)?))).collect();
        let places: Vec<(f64, f64)> = points.iter().map(|(x, g)| (*x, y.at(g.kl.value))).collect();
        html! {
            (path(&places, HEIGHT, &format!("curve c{}", c.colour(d.model))))
            @for ((_, g), place) in points.iter().zip(places) { (point(c, d, g, place, 3.6)) }
        }
    };
    let drawing = html! { (grid) @for d in &groups.found { (curve(d)) } };
    let description =
        format!("Mean KL to {} by position in the window, {text}. The table below has the numbers.", c.baseline());
    let chart = Chart {
        description: &description,
        gutter: &gutter,
        legend: legend_of(c, groups.models()),
        rows: row(html! {}, HEIGHT, drawing),
        // There is room for every second name.
        ticks: (0..=last)
            .map(|i| (x(i), if i % 2 == 0 { groups.names[i].to_owned() } else { String::new() }))
            .collect(),
        axis: "position in the window →",
        ..Chart::default()
    };
    Some(Figure {
        title: format!("Early and late in the window: {text}"),
        caption: format!("Mean KL to {} by the token's position in the window, nats per token.", c.baseline()),
        drawing: chart.draw(),
        table: tables::groups(c, text, "KL by position", |d| &d.by_position),
        half: true,
    })
}

/// What is drawn: models' divergences, names of groups, the highest KL.
struct Groups<'a> {
    found: Vec<&'a Divergence>,
    names: Vec<&'a str>,
    most: f64,
}

impl<'a> Groups<'a> {
    fn of(c: &'a Comparison, text: &str, of: fn(&Divergence) -> &Vec<GroupKl>) -> Option<Self> {
        let finite = |d: &&Divergence| of(d).iter().any(|g| g.kl.value.is_finite());
        let found: Vec<&Divergence> = c.divergences_on(text).filter(finite).collect();
        let (_, most) = range(found.iter().flat_map(|d| of(d)).map(|g| g.kl.value))?;
        Some(Self { names: group_names(&found, of), most: most.max(f64::MIN_POSITIVE), found })
    }

    fn models(&self) -> impl Iterator<Item = usize> {
        self.found.iter().map(|d| d.model)
    }
}

fn point(c: &Comparison, d: &Divergence, g: &GroupKl, place: (f64, f64), size: f64) -> Markup {
    let text = format!("{}, {}: KL {} over {} tokens", c.label(d.model), g.group, estimate(g.kl), count(g.tokens));
    tip(&text, mark(place, c.colour(d.model), true, size))
}

fn group<'a>(groups: &'a [GroupKl], name: &str) -> Option<&'a GroupKl> {
    groups.iter().find(|g| g.group == name && g.kl.value.is_finite())
}
