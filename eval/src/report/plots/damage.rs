//! Where in a model quantization hurts: KL by layer as columns, by kind of module as bars.

use super::{Figure, both, is_narrow};
use crate::comparison::{AttributedPart, Attribution, AttributionMode, Comparison};
use crate::report::numbers::{estimate, plain};
use crate::report::scale::{Scale, range, rounded, tick_text};
use crate::report::svg::{Anchor, Svg, TEXT, shorten, width_of};
use crate::report::tables;

const COLUMNS: f64 = 150.0;
const BAR: f64 = 24.0;

pub(in crate::report) fn figures(c: &Comparison) -> Vec<Figure> {
    c.attributions.iter().filter_map(|a| figure(c, a)).collect()
}

fn figure(c: &Comparison, a: &Attribution) -> Option<Figure> {
    let finite = || a.parts.iter().filter(|p| p.damage.is_finite());
    let mut layers: Vec<(usize, &AttributedPart)> = finite().filter_map(|p| Some((p.layer?, p))).collect();
    layers.sort_by_key(|(layer, _)| *layer);
    let mut kinds: Vec<&AttributedPart> = finite().filter(|p| p.layer.is_none()).collect();
    kinds.sort_by(|x, y| y.damage.total_cmp(&x.damage));
    if layers.is_empty() && kinds.is_empty() {
        return None;
    }
    let worst = finite().max_by(|x, y| x.damage.total_cmp(&y.damage))?;
    let description = format!(
        "Damage by part of {} on {}, in nats per token: most by {}, {}. The table below has every part.",
        c.label(a.model),
        a.text,
        worst.part,
        plain(worst.damage)
    );
    let drawing = both(&description, |svg, width| {
        let mut y = 0.0;
        if !layers.is_empty() {
            y = columns(svg, width, y, c, a, &layers);
        }
        if !kinds.is_empty() {
            y = bars(svg, width, y, c, a, &kinds);
        }
        y
    });
    let how = match a.mode {
        AttributionMode::QuantizeOne => "KL when only this part is quantized",
        AttributionMode::RestoreOne => "what KL falls by when only this part is restored",
    };
    Some(Figure {
        title: format!("Where the loss sits: {} on {}", c.label(a.model), a.text),
        caption: format!(
            "Damage: {how}, nats per token. The whole model: {}. Damages need not add up to it.",
            estimate(a.whole)
        ),
        drawing,
        table: tables::attribution(c, a),
        folded: Vec::new(),
        half: false,
    })
}

fn columns(
    svg: &mut Svg,
    width: f64,
    top: f64,
    c: &Comparison,
    a: &Attribution,
    layers: &[(usize, &AttributedPart)],
) -> f64 {
    svg.text((0.0, top + 14.0), "By layer", Anchor::Start, "head");
    let top = top + 30.0;
    let (low, high) = domain(a, layers.iter().map(|(_, p)| *p));
    let scale = Scale::linear(rounded((low, high), 4), top + COLUMNS, top);
    let ticks = scale.ticks(4);
    let gutter = ticks.iter().map(|t| width_of(&tick_text(*t, &ticks), 11.5)).fold(0.0, f64::max) + 8.0;
    for t in &ticks {
        svg.line((gutter, scale.at(*t)), (width, scale.at(*t)), "grid");
        svg.text((gutter - 6.0, scale.at(*t) + 4.0), &tick_text(*t, &ticks), Anchor::End, "tick");
    }
    let (first, last) = (layers[0].0, layers[layers.len() - 1].0);
    let step = (width - gutter) / (last - first + 1) as f64;
    let class = format!("bar c{}", c.colour(a.model));
    let every = [1, 2, 5, 10, 20, 50].into_iter().find(|e| *e as f64 * step >= 26.0).unwrap_or(100);
    for (layer, p) in layers {
        let x = gutter + (layer - first) as f64 * step;
        let (zero, value) = (scale.at(0.0), scale.at(p.damage));
        svg.tip(&tip(a, p), |svg| {
            svg.rectangle(x, top, step, COLUMNS, "hit");
            svg.rectangle(x + 0.12 * step, zero.min(value), 0.76 * step, (zero - value).abs(), &class);
            if let Some((low, high)) = error(a, p) {
                let middle = x + step / 2.0;
                svg.line((middle, scale.at(low)), (middle, scale.at(high)), "error");
            }
        });
        if layer % every == 0 {
            svg.text((x + step / 2.0, top + COLUMNS + 16.0), &layer.to_string(), Anchor::Middle, "tick");
        }
    }
    svg.line((gutter, scale.at(0.0)), (width, scale.at(0.0)), "axis");
    svg.text((width, top + COLUMNS + 31.0), "layer →", Anchor::End, "tick");
    top + COLUMNS + 42.0
}

fn bars(svg: &mut Svg, width: f64, top: f64, c: &Comparison, a: &Attribution, kinds: &[&AttributedPart]) -> f64 {
    svg.text((0.0, top + 14.0), "By kind of module", Anchor::Start, "head");
    let top = top + 24.0;
    let most = if is_narrow(width) { 0.36 * width } else { 220.0 };
    let gutter = (kinds.iter().map(|p| width_of(&p.part, TEXT)).fold(0.0, f64::max) + 10.0).min(most);
    let value_width = kinds.iter().map(|p| width_of(&plain(p.damage), TEXT)).fold(0.0, f64::max) + 12.0;
    let scale = Scale::linear(domain(a, kinds.iter().copied()), gutter, width - value_width);
    let class = format!("bar c{}", c.colour(a.model));
    let mut y = top;
    for p in kinds {
        let (zero, value) = (scale.at(0.0), scale.at(p.damage));
        svg.tip(&tip(a, p), |svg| {
            svg.rectangle(0.0, y, width, BAR, "hit");
            svg.text((0.0, y + 16.5), &shorten(&p.part, gutter - 8.0, TEXT), Anchor::Start, "");
            svg.rectangle(zero.min(value), y + 4.0, (zero - value).abs(), BAR - 8.0, &class);
            let mut end = zero.max(value);
            if let Some((low, high)) = error(a, p) {
                svg.line((scale.at(low), y + BAR / 2.0), (scale.at(high), y + BAR / 2.0), "error");
                end = end.max(scale.at(high));
            }
            svg.text((end + 6.0, y + 16.5), &plain(p.damage), Anchor::Start, "");
        });
        y += BAR;
    }
    svg.line((scale.at(0.0), top), (scale.at(0.0), y), "axis");
    y + 8.0
}

fn domain<'a>(a: &Attribution, parts: impl Iterator<Item = &'a AttributedPart>) -> (f64, f64) {
    let values = parts.flat_map(|p| {
        let (low, high) = error(a, p).unwrap_or((p.damage, p.damage));
        [p.damage, low, high]
    });
    range(values.chain([0.0])).unwrap_or((0.0, 1.0))
}

/// One standard error either way, where the damage is a KL itself; of a difference of two it is not known.
fn error(a: &Attribution, p: &AttributedPart) -> Option<(f64, f64)> {
    let e = p.kl.standard_error;
    (a.mode == AttributionMode::QuantizeOne && e.is_finite() && e > 0.0).then_some((p.damage - e, p.damage + e))
}

fn tip(a: &Attribution, p: &AttributedPart) -> String {
    match a.mode {
        AttributionMode::QuantizeOne => format!("{}: KL {} when only it is quantized", p.part, estimate(p.kl)),
        AttributionMode::RestoreOne => {
            format!("{}: KL falls by {} to {} when it is restored", p.part, plain(p.damage), estimate(p.kl))
        }
    }
}
