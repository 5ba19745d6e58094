//! Which tokens suffer: mean KL by class of the token and by its position in the window.

use super::{Figure, half, legend};
use crate::comparison::{Comparison, Divergence, GroupKl};
use crate::report::numbers::{count, estimate};
use crate::report::scale::{Scale, range, rounded, tick_text};
use crate::report::svg::{Anchor, Svg, TEXT, shorten, shorten_name, spread, width_of, width_of_name};
use crate::report::tables::{self, group_names};

/// A class's name and under it the line of its marks.
const ROW: f64 = 40.0;
const HEIGHT: f64 = 170.0;

pub(in crate::report) fn by_class(c: &Comparison, text: &str) -> Option<Figure> {
    let (found, names) = groups(c, text, |d| &d.by_class)?;
    let models: Vec<usize> = found.iter().map(|d| d.model).collect();
    let description =
        format!("Mean KL to {} by class of the token, {text}. The table below has the numbers.", c.baseline());
    let most = highest(&found, |d| &d.by_class);
    let drawing = half(&description, |svg, width| {
        let top = legend(svg, c, &models, width, 0.0);
        let scale = Scale::linear((0.0, most * 1.04), 4.0, width - 8.0);
        let bottom = top + names.len() as f64 * ROW;
        axis(svg, &scale, top, bottom, width);
        for (i, name) in names.iter().enumerate() {
            let y = top + i as f64 * ROW;
            let at = y + ROW - 13.0;
            svg.text((0.0, y + 13.0), &shorten(name, width, TEXT), Anchor::Start, "over");
            let values: Vec<(&Divergence, &GroupKl)> =
                found.iter().filter_map(|d| Some((*d, group(&d.by_class, name)?))).collect();
            if let Some((low, high)) = range(values.iter().map(|(_, g)| g.kl.value)) {
                svg.line((scale.at(low), at), (scale.at(high), at), "span");
            }
            for (d, g) in values {
                svg.tip(&tip(c, d, g), |svg| svg.mark((scale.at(g.kl.value), at), c.colour(d.model), true, 4.8));
            }
        }
        bottom + 38.0
    });
    Some(Figure {
        title: format!("Which tokens suffer: {text}"),
        caption: format!("Mean KL to {} by class of the token to be predicted.", c.baseline()),
        drawing,
        table: tables::groups(c, text, "KL by class of token", |d| &d.by_class),
        folded: Vec::new(),
        half: true,
    })
}

pub(in crate::report) fn by_position(c: &Comparison, text: &str) -> Option<Figure> {
    let (found, names) = groups(c, text, |d| &d.by_position)?;
    if names.len() < 2 {
        return None;
    }
    let description =
        format!("Mean KL to {} by position in the window, {text}. The table below has the numbers.", c.baseline());
    let most = highest(&found, |d| &d.by_position);
    let drawing = half(&description, |svg, width| {
        let (top, bottom) = (8.0, 8.0 + HEIGHT);
        let labels = found.iter().map(|d| width_of_name(c.label(d.model))).fold(0.0, f64::max) + 10.0;
        let right = width - labels.min(0.3 * width);
        let scale = Scale::linear(rounded((0.0, most), 4), bottom, top);
        let ticks = scale.ticks(4);
        let gutter = ticks.iter().map(|t| width_of(&tick_text(*t, &ticks), 11.5)).fold(0.0, f64::max) + 8.0;
        for t in &ticks {
            svg.line((gutter, scale.at(*t)), (right, scale.at(*t)), "grid");
            svg.text((gutter - 6.0, scale.at(*t) + 4.0), &tick_text(*t, &ticks), Anchor::End, "tick");
        }
        let step = (right - gutter - 16.0) / (names.len() - 1) as f64;
        let x = |i: usize| gutter + 8.0 + i as f64 * step;
        let texts: Vec<(f64, String)> = names.iter().enumerate().map(|(i, n)| (x(i), (*n).to_owned())).collect();
        svg.x_axis(&texts, bottom, bottom);
        svg.text((right, bottom + 31.0), "position in the window →", Anchor::End, "tick");
        let mut ends = Vec::new();
        for d in &found {
            let points: Vec<(f64, f64, &GroupKl)> = names
                .iter()
                .enumerate()
                .filter_map(|(i, n)| Some((x(i), group(&d.by_position, n)?)))
                .map(|(x, g)| (x, scale.at(g.kl.value), g))
                .collect();
            let colour = c.colour(d.model);
            svg.path(&points.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>(), false, &format!("curve c{colour}"));
            for (x, y, g) in &points {
                svg.tip(&tip(c, d, g), |svg| svg.mark((*x, *y), colour, true, 3.6));
            }
            ends.extend(points.last().map(|p| (d.model, p.1)));
        }
        let at = spread(&ends.iter().map(|e| e.1).collect::<Vec<_>>(), 16.0, top + 2.0, bottom - 2.0);
        for ((m, _), y) in ends.iter().zip(at) {
            let label = shorten_name(c.label(*m), width - right - 4.0);
            svg.text((right + 4.0, y + 4.5), &label, Anchor::Start, &format!("name c{}", c.colour(*m)));
        }
        bottom + 38.0
    });
    Some(Figure {
        title: format!("Early and late in the window: {text}"),
        caption: format!("Mean KL to {} by the token's position in the window, nats per token.", c.baseline()),
        drawing,
        table: tables::groups(c, text, "KL by position", |d| &d.by_position),
        folded: Vec::new(),
        half: true,
    })
}

type Found<'a> = (Vec<&'a Divergence>, Vec<&'a str>);

fn groups<'a>(c: &'a Comparison, text: &str, of: fn(&Divergence) -> &Vec<GroupKl>) -> Option<Found<'a>> {
    let found: Vec<&Divergence> = c
        .others()
        .filter_map(|m| c.divergence(text, m))
        .filter(|d| of(d).iter().any(|g| g.kl.value.is_finite()))
        .collect();
    let names = group_names(&found, of);
    (!names.is_empty()).then_some((found, names))
}

fn group<'a>(groups: &'a [GroupKl], name: &str) -> Option<&'a GroupKl> {
    groups.iter().find(|g| g.group == name && g.kl.value.is_finite())
}

fn highest(found: &[&Divergence], of: fn(&Divergence) -> &Vec<GroupKl>) -> f64 {
    range(found.iter().flat_map(|d| of(d)).map(|g| g.kl.value)).map_or(1.0, |(_, high)| high.max(f64::MIN_POSITIVE))
}

fn axis(svg: &mut Svg, scale: &Scale, top: f64, bottom: f64, width: f64) {
    let ticks = scale.ticks(4);
    let texts: Vec<(f64, String)> = ticks.iter().map(|t| (scale.at(*t), tick_text(*t, &ticks))).collect();
    svg.x_axis(&texts, top, bottom);
    svg.text((width, bottom + 30.0), "KL, nats per token (lower is nearer) →", Anchor::End, "tick");
}

fn tip(c: &Comparison, d: &Divergence, g: &GroupKl) -> String {
    format!("{}, {}: KL {} over {} tokens", c.label(d.model), g.group, estimate(g.kl), count(g.tokens))
}
