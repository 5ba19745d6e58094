//! Charts whose horizontal places are percents of the width they are given and whose heights are CSS pixels: one
//! drawing fits a page and a phone, and its text keeps its size. Text that may be long is HTML and wraps; colours are
//! the style sheet's.

use maud::{Markup, html};

use super::numbers::fixed;
use crate::comparison::Comparison;

/// Colours for models beside the baseline, as the style sheet defines them: `c1` to `c5`; `c0` is the baseline's.
pub(super) const COLOURS: usize = 5;

/// Of a plot with a vertical axis.
pub(super) const HEIGHT: f64 = 190.0;
/// Points of a line that still get a mark each.
const MARKED: usize = 40;

const CIRCLE: &str = "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z";

/// Outlines of the models' marks, so that no colour has to be seen: circles, square, triangle, diamond, triangle.
const MARKS: [&str; COLOURS + 1] = [
    CIRCLE,
    "M-.85 -.85H.85V.85H-.85Z",
    CIRCLE,
    "M0 -1.1L1.15 .88H-1.15Z",
    "M0 -1.25L1.25 0L0 1.25L-1.25 0Z",
    "M0 1.1L1.15 -.88H-1.15Z",
];

/// A drawing over a horizontal axis, in rows.
#[derive(Default)]
pub(super) struct Chart<'a> {
    /// What a screen reader says.
    pub(super) description: &'a str,
    /// Class: `names` move above their rows on a phone, in `stacked` they always are, and with none they never do.
    pub(super) layout: &'a str,
    /// CSS width of the names where they are beside the rows, or of a vertical axis' numbers.
    pub(super) gutter: &'a str,
    pub(super) legend: Markup,
    pub(super) rows: Markup,
    /// Where a vertical line goes, in percent, and what stands under it.
    pub(super) ticks: Vec<(f64, String)>,
    /// One more line, dashed, and what stands under its number.
    pub(super) reference: Option<(f64, String)>,
    /// What the horizontal axis shows.
    pub(super) axis: &'a str,
}

impl Chart<'_> {
    pub(super) fn draw(self) -> Markup {
        let gutter = (!self.gutter.is_empty()).then(|| format!("--gutter:{}", self.gutter));
        html! {
            div class={"chart " (self.layout)} style=[gutter] role="img" aria-label=(self.description) {
                (self.legend)
                div.field {
                    svg.back {
                        @for (x, _) in &self.ticks { (line((*x, 0.0), (*x, f64::INFINITY), "grid")) }
                        @if let Some((x, _)) = self.reference { (line((x, 0.0), (x, f64::INFINITY), "reference")) }
                    }
                    (self.rows)
                }
                svg.ticks height=(if self.reference.is_some() { "34" } else { "18" }) {
                    @for (i, (x, label)) in self.ticks.iter().enumerate() {
                        // Where there is little room the style sheet leaves every second one out.
                        text.tick.odd[i % 2 == 1] x=(percent(*x)) y="14" text-anchor="middle" { (label) }
                    }
                    @if let Some((x, label)) = &self.reference {
                        text.tick.strong x=(percent(*x)) y="29" text-anchor="middle" { (label) }
                    }
                }
                div.caption { (self.axis) }
            }
        }
    }
}

/// A row: what it is about and its drawing.
pub(super) fn row(name: Markup, height: f64, drawing: Markup) -> Markup {
    html! { div.row { div.name { (name) } svg height=(round(height)) { (drawing) } } }
}

/// Marks and names of models.
pub(super) fn legend<'a>(models: impl IntoIterator<Item = (usize, &'a str)>) -> Markup {
    html! {
        div.legend {
            @for (colour, name) in models { span { (key(colour)) b class={"c" (colour)} { (name) } } }
        }
    }
}

/// As `legend`, of models of a comparison.
pub(super) fn legend_of(c: &Comparison, models: impl IntoIterator<Item = usize>) -> Markup {
    legend(models.into_iter().map(|m| (c.colour(m), c.label(m))))
}

/// A model's mark among text.
pub(super) fn key(colour: usize) -> Markup {
    html! { svg.key aria-hidden="true" viewBox="-1.36 -1.36 3.18 2.72" { (outline(colour, true, None)) } }
}

/// A model's mark. Hollow ones say `not significant`.
pub(super) fn mark((x, y): (f64, f64), colour: usize, filled: bool, size: f64) -> Markup {
    html! { svg x=(percent(x)) y=(round(y)) { (outline(colour, filled, Some(format!("scale({size})")))) } }
}

fn outline(colour: usize, filled: bool, transform: Option<String>) -> Markup {
    let d = MARKS.get(colour).unwrap_or(&CIRCLE);
    html! { path.mark.{"c" (colour)}.hollow[!filled] d=(d) transform=[transform] {} }
}

/// A line; one that ends at infinity goes down to the end of the drawing.
pub(super) fn line(from: (f64, f64), to: (f64, f64), class: &str) -> Markup {
    let end = if to.1 == f64::INFINITY { "100%".to_owned() } else { round(to.1).to_string() };
    html! { line class=(class) x1=(percent(from.0)) y1=(round(from.1)) x2=(percent(to.0)) y2=(end) {} }
}

pub(super) fn rectangle((x, y): (f64, f64), width: f64, height: f64, class: &str) -> Markup {
    let (width, height) = (percent(width.max(0.0)), round(height.max(0.0)));
    html! { rect class=(class) x=(percent(x)) y=(round(y)) width=(width) height=(height) {} }
}

/// A curve in a drawing of this height.
pub(super) fn path(points: &[(f64, f64)], height: f64, class: &str) -> Markup {
    let steps = points.iter().enumerate();
    let d: String =
        steps.map(|(i, p)| format!("{}{} {}", if i == 0 { "M" } else { "L" }, round(p.0), round(p.1))).collect();
    let height = round(height);
    html! {
        svg viewBox={"0 0 100 " (height)} width="100%" height=(height) preserveAspectRatio="none" {
            path class=(class) d=(d) {}
        }
    }
}

/// A model's values: places in percent, values, and what each says.
pub(super) struct Curve<'a> {
    pub(super) label: &'a str,
    pub(super) colour: usize,
    pub(super) points: Vec<(f64, f64, String)>,
}

/// Lines over a horizontal axis, between these ends of the vertical one.
pub(super) fn curves(
    description: &str,
    curves: &[Curve],
    ends: (f64, f64),
    ticks: Vec<(f64, String)>,
    axis: &str,
) -> Markup {
    let y = Axis::upward(ends, HEIGHT);
    let (grid, gutter) = vertical(&y, "");
    let drawing = html! {
        (grid)
        @for curve in curves {
            @let places: Vec<(f64, f64)> = curve.points.iter().map(|(x, value, _)| (*x, y.at(*value))).collect();
            (path(&places, HEIGHT, &format!("curve c{}", curve.colour)))
            @for (place, (_, _, text)) in places.iter().zip(&curve.points).filter(|_| places.len() <= MARKED) {
                (tip(text, mark(*place, curve.colour, true, 3.4)))
            }
        }
    };
    let legend = legend(curves.iter().map(|curve| (curve.colour, curve.label)));
    let rows = row(html! {}, HEIGHT, drawing);
    Chart { description, gutter: &gutter, legend, rows, ticks, axis, ..Chart::default() }.draw()
}

/// What answers to the pointer with a text.
pub(super) fn tip(text: &str, drawing: Markup) -> Markup {
    html! { g.tip { title { (text) } (drawing) } }
}

/// Lines and numbers of a vertical axis, and the width of these in CSS.
pub(super) fn vertical(axis: &Axis, unit: &str) -> (Markup, String) {
    let labels = axis.labels(5, unit);
    let widest = labels.iter().map(|(_, label)| label.chars().count()).max().unwrap_or(0);
    let lines = html! {
        @for (y, label) in &labels {
            (line((0.0, *y), (100.0, *y), "grid"))
            text.tick x="-6" y=(round(y + 4.0)) text-anchor="end" { (label) }
        }
    };
    (lines, format!("{}px", 10 + 7 * widest))
}

/// From data to places in a drawing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Data from `low` to `high` onto `from` to `to`. An empty range is widened.
    pub(super) fn new((low, high): (f64, f64), from: f64, to: f64) -> Self {
        let (low, high) = if low.is_finite() && high.is_finite() { (low.min(high), low.max(high)) } else { (0.0, 1.0) };
        let high = if high > low { high } else { low + low.abs().max(1.0) * 0.1 };
        Self { low, high, from, to }
    }

    /// Upwards in a drawing of this height, from and to round numbers.
    pub(super) fn upward(ends: (f64, f64), height: f64) -> Self {
        Self::new(rounded(ends, 5), height, 0.0)
    }

    /// Place of a value; beyond the ends, the end.
    pub(super) fn at(&self, value: f64) -> f64 {
        let share = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        self.from + share * (self.to - self.from)
    }

    pub(super) fn holds(&self, value: f64) -> bool {
        value >= self.low && value <= self.high
    }

    /// Where ticks are and what they say, with as many digits as their neighbours need.
    pub(super) fn labels(&self, count: usize, unit: &str) -> Vec<(f64, String)> {
        let ticks = self.ticks(count);
        let step = if let [a, b, ..] = ticks[..] { b - a } else { 1.0 };
        let decimals = (-(step.log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize;
        ticks.into_iter().map(|t| (self.at(t), fixed(t, decimals) + unit)).collect()
    }

    /// About `count` round values inside: 1, 2 or 5 times a power of ten apart.
    fn ticks(&self, count: usize) -> Vec<f64> {
        let step = round_step((self.high - self.low) / count.max(1) as f64);
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last.min(first + 100)).map(|i| i as f64 * step).collect()
    }
}

/// `low` and `high` moved outwards to multiples of a round step.
pub(super) fn rounded((low, high): (f64, f64), count: usize) -> (f64, f64) {
    if !(low.is_finite() && high.is_finite() && high > low) {
        return (low, high);
    }
    let step = round_step((high - low) / count.max(1) as f64);
    ((low / step + 1e-9).floor() * step, (high / step - 1e-9).ceil() * step)
}

/// Smallest and largest of the finite values.
pub(super) fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.into_iter().filter(|v| v.is_finite());
    finite.map(|v| (v, v)).reduce(|(low, high), (v, _)| (v.min(low), v.max(high)))
}

fn round_step(raw: f64) -> f64 {
    if !(raw.is_finite() && raw > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|s| s * power >= raw * 0.999_999);
    step.unwrap_or(10.0) * power
}

fn percent(x: f64) -> String {
    format!("{}%", round(x))
}

/// To a hundredth; what is not finite is drawn at 0.
fn round(x: f64) -> f64 {
    let r = (x * 100.0).round() / 100.0;
    if r.is_finite() { r + 0.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let texts = |axis: Axis, unit| axis.labels(5, unit).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(Axis::new((83.0, 104.0), 0.0, 1.0), " %"), ["85 %", "90 %", "95 %", "100 %"]);
        assert_eq!(texts(Axis::new((0.0, 0.47), 0.0, 1.0), ""), ["0.0", "0.1", "0.2", "0.3", "0.4"]);
    }

    #[test]
    fn places_stay_on_the_axis_whatever_the_data() {
        let axis = Axis::new((0.0, 10.0), 100.0, 200.0);
        assert_eq!([axis.at(-5.0), axis.at(5.0), axis.at(50.0)], [100.0, 150.0, 200.0]);
        for degenerate in [(1.0, 1.0), (f64::NAN, 1.0), (0.0, 0.0), (f64::INFINITY, f64::NEG_INFINITY)] {
            assert!(Axis::new(degenerate, 0.0, 1.0).at(0.5).is_finite());
            assert!(Axis::new(degenerate, 0.0, 1.0).labels(5, "").len() < 50);
        }
    }
}
