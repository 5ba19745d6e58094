//! How far tokens' distributions are from the baseline's: one histogram of KL per model over a common logarithmic axis.

use super::{Figure, both, is_narrow, spoken};
use crate::comparison::{Comparison, Divergence};
use crate::report::numbers::{count, percent, plain};
use crate::report::scale::{Scale, power_text, range};
use crate::report::svg::{Anchor, TEXT, shorten_name, width_of};
use crate::report::tables;

/// Share of tokens that may lie left of the axis: KL of near-certain tokens trails off to rounding.
const LEFT_OUT: f64 = 0.005;
const HEIGHT: f64 = 46.0;
const ROW: f64 = 74.0;

pub(in crate::report) fn figure(c: &Comparison, text: &str) -> Option<Figure> {
    let found: Vec<&Divergence> = c.others().filter_map(|m| c.divergence(text, m)).filter(|d| total(d) > 0.0).collect();
    let (low, high) = ends(&found)?;
    let description = format!(
        "Histograms of KL to {} per token on {text}, logarithmic axis. {}.",
        c.baseline(),
        spoken(found.iter().map(|d| (c.label(d.model).to_owned(), summary(d))))
    );
    let tallest = found.iter().flat_map(|d| densities(d, low, high)).map(|(_, _, h)| h).fold(0.0, f64::max);
    let drawing = both(&description, |svg, width| {
        let scale = Scale::logarithmic((low, high), 4.0, width - 8.0);
        let mut y = 0.0;
        let bottom = found.len() as f64 * ROW + 2.0;
        let ticks: Vec<(f64, String)> =
            scale.ticks(if is_narrow(width) { 5 } else { 10 }).iter().map(|&t| (scale.at(t), power_text(t))).collect();
        svg.x_axis(&ticks, 0.0, bottom);
        for d in &found {
            let colour = c.colour(d.model);
            let base = y + ROW - 4.0;
            let top = |density: f64| base - HEIGHT * density / tallest;
            let bins = densities(d, low, high);
            let mut outline = Vec::new();
            for &(from, to, density) in &bins {
                outline.push((scale.at(from), top(density)));
                outline.push((scale.at(to), top(density)));
            }
            if let (Some(&(first, _)), Some(&(last, _))) = (outline.first(), outline.last()) {
                outline.insert(0, (first, base));
                outline.push((last, base));
            }
            svg.line((0.0, base), (width, base), "rule");
            svg.path(&outline, true, &format!("area c{colour}"));
            if let Some(median) = median(d).filter(|v| scale.holds(*v)) {
                let x = scale.at(median);
                svg.line((x, base), (x, base - HEIGHT - 4.0), &format!("median c{colour}"));
            }
            if scale.holds(d.kl.value) {
                svg.mark((scale.at(d.kl.value), base), colour, true, 4.0);
            }
            let values = summary(d);
            let name = shorten_name(c.label(d.model), width - width_of(&values, TEXT) - 12.0);
            svg.named((0.0, y + 15.0), &name, colour, &values);
            // Over everything, so that the pointer finds each bin.
            for ((from, to, _), (lower, upper, n)) in bins.iter().zip(counts(d, low, high)) {
                let (x, to) = (scale.at(*from), scale.at(*to));
                let tip = format!(
                    "{}: {} of tokens ({}) have KL from {} to {}",
                    c.label(d.model),
                    percent(n as f64 / total(d)),
                    count(usize::try_from(n).unwrap_or(usize::MAX)),
                    plain(lower),
                    plain(upper)
                );
                svg.tip(&tip, |svg| svg.rectangle(x, base - HEIGHT, to - x, HEIGHT, "hit"));
            }
            y += ROW;
        }
        svg.text((width, bottom + 30.0), "KL per token, nats (lower is nearer) →", Anchor::End, "tick");
        bottom + 38.0
    });
    Some(Figure {
        title: format!("How far from {}, token by token: {text}", c.baseline()),
        caption: format!(
            "Shares of tokens by KL to {}. The vertical line is the median token, the mark on the base line the mean, which \
             few but large errors pull up. Further left is nearer to {}.",
            c.baseline(),
            c.baseline()
        ),
        drawing,
        table: tables::divergence(c, text),
        folded: Vec::new(),
        half: false,
    })
}

fn summary(d: &Divergence) -> String {
    match median(d) {
        Some(m) => format!("median {}, mean {}", plain(m), plain(d.kl.value)),
        None => format!("mean {}", plain(d.kl.value)),
    }
}

fn median(d: &Divergence) -> Option<f64> {
    d.kl_percentiles.iter().find(|(share, _)| *share == 0.5).map(|(_, kl)| *kl)
}

fn total(d: &Divergence) -> f64 {
    d.kl_histogram.counts.iter().sum::<u64>() as f64
}

/// Bins with positive finite edges: (from, to, tokens). A bin that begins at 0 or ends at infinity is as wide as its
/// neighbour.
fn bins(d: &Divergence) -> Vec<(f64, f64, u64)> {
    let edges = &d.kl_histogram.edges;
    let ratio = edges.windows(2).find(|w| w[0] > 0.0 && w[1].is_finite()).map_or(10.0, |w| w[1] / w[0]);
    edges
        .windows(2)
        .zip(&d.kl_histogram.counts)
        .map(|(w, n)| {
            let from = if w[0] > 0.0 { w[0] } else { w[1] / ratio };
            let to = if w[1].is_finite() { w[1] } else { from * ratio };
            (from, to, *n)
        })
        .filter(|(from, to, _)| *from > 0.0 && to > from && to.is_finite())
        .collect()
}

/// The range that is drawn: all but the lowest few tokens.
fn ends(found: &[&Divergence]) -> Option<(f64, f64)> {
    let low = found.iter().filter_map(|d| {
        let mut below = 0.0;
        bins(d)
            .into_iter()
            .find(|(_, _, n)| {
                below += *n as f64;
                below > LEFT_OUT * total(d)
            })
            .map(|(from, _, _)| from)
    });
    let (low, _) = range(low)?;
    let high = found.iter().flat_map(|d| bins(d)).filter(|(_, _, n)| *n > 0).map(|(_, to, _)| to);
    let (_, high) = range(high)?;
    (high > low).then_some((low, high))
}

fn counts(d: &Divergence, low: f64, high: f64) -> Vec<(f64, f64, u64)> {
    bins(d).into_iter().filter(|(from, to, _)| *from >= low && *to <= high).collect()
}

/// Share of tokens per power of ten of KL, so that bins of any width compare.
fn densities(d: &Divergence, low: f64, high: f64) -> Vec<(f64, f64, f64)> {
    let n = total(d);
    counts(d, low, high).into_iter().map(|(from, to, k)| (from, to, k as f64 / n / (to / from).log10())).collect()
}
