//! Where in a model quantization hurts: KL by layer as columns, by kind of module as bars.

use maud::{Markup, html};

use super::Figure;
use crate::comparison::{AttributedPart, Attribution, AttributionMode, Comparison};
use crate::report::chart::{Axis, Chart, line, range, rectangle, row, tip, vertical};
use crate::report::numbers::{estimate, plain};
use crate::report::tables;

const COLUMNS: f64 = 150.0;
const BAR: f64 = 24.0;

pub(super) fn figure(c: &Comparison, a: &Attribution) -> Option<Figure> {
    let finite = a.parts.iter().filter(|p| p.damage.is_finite());
    let (mut layers, mut kinds): (Vec<&AttributedPart>, Vec<_>) = finite.partition(|p| p.layer.is_some());
    layers.sort_by_key(|p| p.layer);
    kinds.sort_by(|x, y| y.damage.total_cmp(&x.damage));
    if layers.is_empty() && kinds.is_empty() {
        return None;
    }
    let how = match a.mode {
        AttributionMode::QuantizeOne => "KL when only this part is quantized",
        AttributionMode::RestoreOne => "what KL falls by when only this part is restored",
        AttributionMode::RestoreInputs => "what KL falls by when only inputs of this part are not quantized",
    };
    Some(Figure {
        title: format!("Where the loss sits: {} on {}", c.label(a.model), a.text),
        caption: format!(
            "Damage: {how}, nats per token. The whole model: {}. Damages need not add up to it.",
            estimate(a.whole)
        ),
        drawing: html! { (columns(c, a, &layers)) (bars(c, a, &kinds)) },
        table: tables::attribution(c, a),
        half: false,
    })
}

fn description(c: &Comparison, a: &Attribution, what: &str, parts: &[&AttributedPart]) -> String {
    let worst = parts.iter().max_by(|x, y| x.damage.total_cmp(&y.damage));
    let worst = worst.map(|p| format!(": most by {}, {}", p.part, plain(p.damage))).unwrap_or_default();
    let (model, text) = (c.label(a.model), &a.text);
    format!("Damage by {what} of {model} on {text}, in nats per token{worst}. The table below has every part.")
}

fn columns(c: &Comparison, a: &Attribution, layers: &[&AttributedPart]) -> Markup {
    let layer = |p: Option<&&AttributedPart>| p.and_then(|p| p.layer);
    let (Some(first), Some(last)) = (layer(layers.first()), layer(layers.last())) else { return html! {} };
    let y = Axis::upward(domain(a, layers), COLUMNS);
    let (grid, gutter) = vertical(&y, "");
    let step = 100.0 / (last - first + 1) as f64;
    let middle = |layer: usize| ((layer - first) as f64 + 0.5) * step;
    let every = [1, 2, 5, 10, 20, 50].into_iter().find(|e| (last - first) / e < 18).unwrap_or(100);
    let drawing = html! {
        (grid)
        @for (p, layer) in layers.iter().filter_map(|p| Some((p, p.layer?))) {
            @let (x, zero, value) = (middle(layer), y.at(0.0), y.at(p.damage));
            @let class = format!("bar c{}", c.colour(a.model));
            @let column = html! {
                (rectangle((x - 0.5 * step, 0.0), step, COLUMNS, "hit"))
                (rectangle((x - 0.38 * step, zero.min(value)), 0.76 * step, (zero - value).abs(), &class))
                @if let Some((low, high)) = error(a, p) { (line((x, y.at(low)), (x, y.at(high)), "error")) }
            };
            (tip(&about(a, p), column))
        }
        (line((0.0, y.at(0.0)), (100.0, y.at(0.0)), "axis"))
    };
    let chart = Chart {
        description: &description(c, a, "layer", layers),
        gutter: &gutter,
        rows: row(html! {}, COLUMNS, drawing),
        ticks: (first..=last).filter(|l| l % every == 0).map(|l| (middle(l), l.to_string())).collect(),
        axis: "layer →",
        ..Chart::default()
    };
    html! { h4 { "By layer" } (chart.draw()) }
}

fn bars(c: &Comparison, a: &Attribution, kinds: &[&AttributedPart]) -> Markup {
    if kinds.is_empty() {
        return html! {};
    }
    // The rest of the width is for the numbers.
    let x = Axis::new(domain(a, kinds), 0.0, 84.0);
    let rows = html! {
        @for p in kinds {
            @let (zero, value, y) = (x.at(0.0), x.at(p.damage), BAR / 2.0);
            @let ends = error(a, p).map(|(low, high)| (x.at(low), x.at(high)));
            @let class = format!("bar c{}", c.colour(a.model));
            @let bar = html! {
                (rectangle((0.0, 0.0), 100.0, BAR, "hit"))
                (rectangle((zero.min(value), 4.0), (zero - value).abs(), BAR - 8.0, &class))
                @if let Some((low, high)) = ends { (line((low, y), (high, y), "error")) }
                text x={(ends.map_or(value, |e| e.1).max(zero)) "%"} dx="6" y="16.5" { (plain(p.damage)) }
            };
            @let drawing = html! { (tip(&about(a, p), bar)) (line((zero, 0.0), (zero, BAR), "axis")) };
            (row(html! { span { (p.part) } }, BAR, drawing))
        }
    };
    let chart = Chart {
        description: &description(c, a, "kind of module", kinds),
        gutter: "min(9rem, 36%)",
        rows,
        ..Chart::default()
    };
    html! { h4 { "By kind of module" } (chart.draw()) }
}

fn domain(a: &Attribution, parts: &[&AttributedPart]) -> (f64, f64) {
    let values = parts.iter().flat_map(|p| {
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

fn about(a: &Attribution, p: &AttributedPart) -> String {
    match a.mode {
        AttributionMode::QuantizeOne => format!("{}: KL {} when only it is quantized", p.part, estimate(p.kl)),
        AttributionMode::RestoreOne => {
            format!("{}: KL falls by {} to {} when it is restored", p.part, plain(p.damage), estimate(p.kl))
        }
        AttributionMode::RestoreInputs => {
            format!("{}: KL falls by {} to {} without quantized inputs", p.part, plain(p.damage), estimate(p.kl))
        }
    }
}
