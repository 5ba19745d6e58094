//! A small drawing: shapes and text as inline SVG whose colours come from the page's style sheet.
//!
//! A drawing is as wide as it says and never scaled down: each plot is drawn twice, for a wide page and for a phone, so
//! that its text keeps its size.

use std::fmt::Write;

/// Colours for models beside the baseline, as the style sheet defines them: `c1` to `c5`; `c0` is the baseline's.
pub(super) const COLOURS: usize = 5;

/// Width of the two variants, in CSS pixels.
pub(super) const WIDE: f64 = 760.0;
pub(super) const NARROW: f64 = 330.0;

/// Sizes of text, in CSS pixels.
pub(super) const TEXT: f64 = 13.0;
pub(super) const SMALL: f64 = 11.5;

/// Mean width of a character of the widest common sans serif (DejaVu Sans), in ems; of East Asian ones 1. Labels are
/// placed by it, so that in narrower fonts there is a little room left over.
const CHARACTER: f64 = 0.61;
/// How much wider bold is.
const BOLD: f64 = 1.12;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

pub(super) struct Svg {
    width: f64,
    body: String,
}

impl Svg {
    pub(super) fn new(width: f64) -> Self {
        Self { width, body: String::new() }
    }

    /// The finished drawing; `description` is what a screen reader says.
    pub(super) fn finish(self, height: f64, variant: &str, description: &str) -> String {
        let (w, h) = (round(self.width), round(height));
        format!(
            "<svg class=\"{variant}\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\">{}</svg>\n",
            escape(description),
            self.body
        )
    }

    /// The same, for one that says nothing.
    pub(super) fn ornament(self, height: f64, class: &str) -> String {
        let (w, h) = (round(self.width), round(height));
        format!(
            "<svg class=\"{class}\" aria-hidden=\"true\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\">{}</svg>",
            self.body
        )
    }

    pub(super) fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), class: &str) {
        let [x1, y1, x2, y2] = [x1, y1, x2, y2].map(round);
        self.push(format_args!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"));
    }

    pub(super) fn rectangle(&mut self, x: f64, y: f64, width: f64, height: f64, class: &str) {
        let [x, y, w, h] = [x, y, width.max(0.0), height.max(0.0)].map(round);
        self.push(format_args!("<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\"/>"));
    }

    pub(super) fn path(&mut self, points: &[(f64, f64)], closed: bool, class: &str) {
        let mut d = String::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            let _ = write!(d, "{}{} {}", if i == 0 { "M" } else { "L" }, round(x), round(y));
        }
        self.push(format_args!("<path class=\"{class}\" d=\"{d}{}\"/>", if closed { "Z" } else { "" }));
    }

    pub(super) fn text(&mut self, (x, y): (f64, f64), text: &str, anchor: Anchor, class: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let (x, y) = (round(x), round(y));
        self.push(format_args!("<text x=\"{x}\" y=\"{y}\"{anchor}{class}>{}</text>", escape(text)));
    }

    /// A model's name and, right after it, something about it.
    pub(super) fn named(&mut self, (x, y): (f64, f64), name: &str, colour: usize, rest: &str) {
        let (x, y) = (round(x), round(y));
        self.push(format_args!(
            "<text class=\"over\" x=\"{x}\" y=\"{y}\"><tspan class=\"name c{colour}\">{}</tspan><tspan dx=\"8\">{}</tspan></text>",
            escape(name),
            escape(rest)
        ));
    }

    /// A model's mark: its colour and its shape, so that neither has to be seen. Hollow ones say `not significant`.
    pub(super) fn mark(&mut self, (x, y): (f64, f64), colour: usize, filled: bool, size: f64) {
        let class = format!("mark c{colour}{}", if filled { "" } else { " hollow" });
        let r = size;
        match colour {
            1 => self.rectangle(x - 0.85 * r, y - 0.85 * r, 1.7 * r, 1.7 * r, &class),
            3 => {
                let (w, h) = (1.15 * r, 1.1 * r);
                self.path(&[(x, y - h), (x + w, y + 0.8 * h), (x - w, y + 0.8 * h)], true, &class);
            }
            4 => {
                let r = 1.25 * r;
                self.path(&[(x, y - r), (x + r, y), (x, y + r), (x - r, y)], true, &class);
            }
            5 => {
                let (w, h) = (1.15 * r, 1.1 * r);
                self.path(&[(x, y + h), (x + w, y - 0.8 * h), (x - w, y - 0.8 * h)], true, &class);
            }
            _ => {
                let [x, y, r] = [x, y, r].map(round);
                self.push(format_args!("<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"{r}\"/>"));
            }
        }
    }

    /// What `draw` draws answers to the pointer with `tip`.
    pub(super) fn tip(&mut self, tip: &str, draw: impl FnOnce(&mut Self)) {
        self.push(format_args!("<g class=\"tip\"><title>{}</title>", escape(tip)));
        draw(self);
        self.body.push_str("</g>");
    }

    /// `over` drawn over this.
    pub(super) fn append(&mut self, over: Self) {
        self.body.push_str(&over.body);
    }

    /// A horizontal axis under `y`, grid lines up to `top`, tick labels that do not touch.
    pub(super) fn x_axis(&mut self, ticks: &[(f64, String)], top: f64, y: f64) {
        let half = |text: &str| width_of(text, SMALL) / 2.0;
        let fits = |every: &usize| {
            let shown: Vec<&(f64, String)> = ticks.iter().step_by(*every).collect();
            shown.windows(2).all(|w| w[0].0 + half(&w[0].1) + 4.0 <= w[1].0 - half(&w[1].1))
        };
        let every = (1..=ticks.len()).find(fits).unwrap_or(1);
        for (i, (x, text)) in ticks.iter().enumerate() {
            self.line((*x, top), (*x, y), "grid");
            if i % every == 0 {
                // Labels at the ends stay inside the drawing.
                let room = half(text) + 2.0;
                let at = x.clamp(room, (self.width - room).max(room));
                self.text((at, y + 15.0), text, Anchor::Middle, "tick");
            }
        }
    }

    fn push(&mut self, what: std::fmt::Arguments) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(what);
    }
}

/// Text for HTML, in content and in attributes. Control characters, which no markup may hold, are dropped.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => {}
            c => out.push(c),
        }
    }
    out
}

/// About how wide a text is.
pub(super) fn width_of(text: &str, size: f64) -> f64 {
    text.chars()
        .map(|c| if c >= '\u{1100}' && !('\u{2000}'..'\u{2e80}').contains(&c) { size } else { CHARACTER * size })
        .sum()
}

/// About how wide a model's name is, which is bold.
pub(super) fn width_of_name(name: &str) -> f64 {
    BOLD * width_of(name, TEXT)
}

/// A model's name cut to a width.
pub(super) fn shorten_name(name: &str, width: f64) -> String {
    shorten(name, width / BOLD, TEXT)
}

/// The text cut to a width, with an ellipsis where something was cut.
pub(super) fn shorten(text: &str, width: f64, size: f64) -> String {
    if width_of(text, size) <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    for c in text.chars() {
        if width_of(&out, size) + 2.0 * CHARACTER * size > width {
            break;
        }
        out.push(c);
    }
    out.push('…');
    out
}

/// Positions at least `gap` apart and inside `low..high`, in the order given, each as near to where it wanted as that
/// allows: for labels beside marks.
pub(super) fn spread(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|&a, &b| wanted[a].total_cmp(&wanted[b]));
    let mut at: Vec<f64> = order.iter().map(|&i| wanted[i]).collect();
    // Neighbours too close form a block that is centred on what its members wanted.
    let mut blocks: Vec<(f64, usize)> = Vec::new();
    for &w in &at {
        blocks.push((w, 1));
        while let [.., (a, n), (b, m)] = blocks[..] {
            if b - a >= gap * (n + m) as f64 / 2.0 {
                break;
            }
            blocks.truncate(blocks.len() - 2);
            blocks.push(((a * n as f64 + b * m as f64) / (n + m) as f64, n + m));
        }
    }
    let placed =
        blocks.iter().flat_map(|&(centre, n)| (0..n).map(move |i| centre + (i as f64 - (n - 1) as f64 / 2.0) * gap));
    for (slot, value) in at.iter_mut().zip(placed) {
        *slot = value;
    }
    let last = at.len().saturating_sub(1);
    for (i, y) in at.iter_mut().enumerate() {
        *y = y.min(high - (last - i) as f64 * gap).max(low + i as f64 * gap);
    }
    let mut out = vec![0.0; wanted.len()];
    for (place, &i) in order.iter().enumerate() {
        out[i] = at[place];
    }
    out
}

/// To a tenth of a pixel; what is not finite is drawn at 0.
fn round(x: f64) -> f64 {
    let r = (x * 10.0).round() / 10.0;
    if r.is_finite() { r + 0.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_text_is_text() {
        assert_eq!(escape("<script>\"'&\u{1}"), "&lt;script&gt;&quot;&#39;&amp;");
    }

    #[test]
    fn labels_are_moved_apart_and_stay_inside() {
        let at = spread(&[50.0, 51.0, 52.0, 90.0], 10.0, 0.0, 95.0);
        assert_eq!(at, [41.0, 51.0, 61.0, 90.0]);
        let at = spread(&[94.0, 95.0], 10.0, 0.0, 95.0);
        assert_eq!(at, [85.0, 95.0]);
        assert_eq!(spread(&[52.0, 50.0], 10.0, 0.0, 95.0), [56.0, 46.0]);
        assert!(spread(&[], 10.0, 0.0, 1.0).is_empty());
    }

    #[test]
    fn long_labels_are_cut() {
        assert_eq!(shorten("abc", 100.0, 10.0), "abc");
        let cut = shorten(&"x".repeat(100), 100.0, 10.0);
        assert!(cut.ends_with('…') && width_of(&cut, 10.0) <= 100.0);
    }
}
