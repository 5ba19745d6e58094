//! How far tokens' distributions are from the baseline's: one histogram of KL per model over a common logarithmic axis.

use maud::html;

use super::Figure;
use crate::comparison::{Comparison, Divergence};
use crate::report::chart::{Axis, Chart, line, mark, path, range, rectangle, row, tip};
use crate::report::numbers::{count, percent, plain, significant};
use crate::report::tables;

/// Share of tokens that may lie left of the axis: KL of near-certain tokens trails off to rounding.
const LEFT_OUT: f64 = 0.005;
const HEIGHT: f64 = 54.0;

pub(super) fn figure(c: &Comparison, text: &str) -> Option<Figure> {
    let found: Vec<&Divergence> = c.divergences_on(text).filter(|d| total(d) > 0.0).collect();
    let ends = ends(&found)?;
    let drawn: Vec<(&Divergence, Vec<Bin>)> = found.iter().map(|d| (*d, inside(bins(d), ends))).collect();
    let tallest = drawn.iter().flat_map(|(_, bins)| bins).map(Bin::density).fold(0.0, f64::max);
    let axis = Axis::new((ends.0.log10(), ends.1.log10()), 0.0, 100.0);
    let x = |kl: f64| axis.at(kl.log10());
    let holds = |kl: &f64| axis.holds(kl.log10());
    let powers = (ends.0.log10().ceil() as i32..=ends.1.log10().floor() as i32).map(|power| 10f64.powi(power));
    let y = Axis::new((0.0, tallest), HEIGHT, 8.0);
    let mut said = Vec::new();
    let mut rows = Vec::new();
    for (d, bins) in &drawn {
        let (label, colour) = (c.label(d.model), c.colour(d.model));
        let median = d.kl_percentiles.iter().find(|(share, _)| *share == 0.5).map(|(_, kl)| *kl);
        let summary = median.map(|m| format!("median {}, ", plain(m))).unwrap_or_default();
        let summary = format!("{summary}mean {}", plain(d.kl.value));
        said.push(format!("{label}: {summary}"));
        let mut outline: Vec<(f64, f64)> =
            bins.iter().flat_map(|b| [b.from, b.to].map(|end| (x(end), y.at(b.density())))).collect();
        outline.insert(0, (0.0, HEIGHT));
        outline.push((outline.last().map_or(0.0, |p| p.0), HEIGHT));
        let drawing = html! {
            (path(&outline, HEIGHT, &format!("area c{colour}")))
            (line((0.0, HEIGHT), (100.0, HEIGHT), "rule"))
            @if let Some(median) = median.filter(holds) {
                (line((x(median), 3.0), (x(median), HEIGHT), &format!("median c{colour}")))
            }
            @if holds(&d.kl.value) { (mark((x(d.kl.value), HEIGHT), colour, true, 4.0)) }
            // Over everything, so that the pointer finds each bin.
            @for b in bins {
                @let (from, to) = (x(b.from), x(b.to));
                (tip(&about(label, b, total(d)), rectangle((from, 0.0), to - from, HEIGHT, "hit")))
            }
        };
        rows.push(row(html! { span { b class={"c" (colour)} { (label) } " " (summary) } }, HEIGHT, drawing));
    }
    let base = c.baseline();
    let chart = Chart {
        description: &format!("Histograms of KL to {base} per token on {text}, logarithmic axis. {}.", said.join("; ")),
        layout: "stacked",
        rows: html! { @for row in rows { (row) } },
        ticks: powers.map(|kl| (x(kl), significant(kl, 1))).collect(),
        axis: "KL per token, nats (lower is nearer) →",
        ..Chart::default()
    };
    Some(Figure {
        title: format!("How far from {base}, token by token: {text}"),
        caption: format!(
            "Shares of tokens by KL to {base}. The vertical line is the median token, the mark on the base line the \
             mean, which few but large errors pull up. Further left is nearer to {base}."
        ),
        drawing: chart.draw(),
        table: tables::divergence(c, text),
        half: false,
    })
}

/// Tokens with KL in a range.
struct Bin {
    from: f64,
    to: f64,
    tokens: u64,
}

impl Bin {
    /// Tokens per power of ten of KL, so that bins of any width compare.
    fn density(&self) -> f64 {
        self.tokens as f64 / (self.to / self.from).log10()
    }
}

fn about(label: &str, b: &Bin, total: f64) -> String {
    let tokens = count(usize::try_from(b.tokens).unwrap_or(usize::MAX));
    let share = percent(b.tokens as f64 / total);
    format!("{label}: {share} of tokens ({tokens}) have KL from {} to {}", plain(b.from), plain(b.to))
}

fn total(d: &Divergence) -> f64 {
    d.kl_histogram.counts.iter().sum::<u64>() as f64
}

/// The first bin, which begins at 0, is drawn as wide as its neighbour.
fn bins(d: &Divergence) -> Vec<Bin> {
    let edges = &d.kl_histogram.edges;
    let ratio = edges.windows(2).find(|w| w[0] > 0.0).map_or(10.0, |w| w[1] / w[0]);
    let from = |w: &[f64]| if w[0] > 0.0 { w[0] } else { w[1] / ratio };
    let bins = edges.windows(2).zip(&d.kl_histogram.counts);
    bins.map(|(w, tokens)| Bin { from: from(w), to: w[1], tokens: *tokens }).collect()
}

/// The range that is drawn: all but the lowest few tokens.
fn ends(found: &[&Divergence]) -> Option<(f64, f64)> {
    let low = found.iter().filter_map(|d| {
        let mut below = 0.0;
        let mut bins = bins(d).into_iter();
        let first = bins.find(|b| {
            below += b.tokens as f64;
            below > LEFT_OUT * total(d)
        });
        first.map(|b| b.from)
    });
    let (low, _) = range(low)?;
    let (_, high) = range(found.iter().flat_map(|d| bins(d)).filter(|b| b.tokens > 0).map(|b| b.to))?;
    (high > low).then_some((low, high))
}

fn inside(bins: Vec<Bin>, (low, high): (f64, f64)) -> Vec<Bin> {
    bins.into_iter().filter(|b| b.from >= low && b.to <= high).collect()
}
