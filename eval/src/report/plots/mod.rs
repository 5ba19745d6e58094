//! The plots of the page. Each is drawn for a wide page and for a phone, and has its numbers in a table.

use super::numbers::MISSING;
use super::svg::{Anchor, NARROW, Svg, WIDE, shorten_name, width_of_name};
use super::tables::Table;
use crate::comparison::Comparison;

pub(super) mod curve;
pub(super) mod damage;
pub(super) mod distribution;
pub(super) mod groups;
pub(super) mod recovery;
pub(super) mod tradeoff;

/// A drawing and what is said about it.
pub(super) struct Figure {
    pub(super) title: String,
    /// How to read it.
    pub(super) caption: String,
    /// Markup.
    pub(super) drawing: String,
    /// The same numbers.
    pub(super) table: Option<Table>,
    /// (summary, drawing) of parts that are folded.
    pub(super) folded: Vec<(String, String)>,
    /// Drawn at half the page's width.
    pub(super) half: bool,
}

/// For figures that stand two beside each other on a wide page, each as wide as a phone.
fn half(description: &str, draw: impl Fn(&mut Svg, f64) -> f64) -> String {
    one(NARROW, "half", description, draw)
}

/// Both variants; the style sheet shows one of them.
fn both(description: &str, draw: impl Fn(&mut Svg, f64) -> f64) -> String {
    [(WIDE, "wide"), (NARROW, "narrow")].into_iter().map(|(width, name)| one(width, name, description, &draw)).collect()
}

/// One drawing; `draw` answers its height.
fn one(width: f64, variant: &str, description: &str, draw: impl Fn(&mut Svg, f64) -> f64) -> String {
    let mut svg = Svg::new(width);
    let height = draw(&mut svg, width);
    svg.finish(height, variant, description)
}

fn is_narrow(width: f64) -> bool {
    width < 500.0
}

/// Marks and names of models, in lines from `y` down; answers where the next thing may begin.
fn legend(svg: &mut Svg, c: &Comparison, models: &[usize], width: f64, y: f64) -> f64 {
    let (mut x, mut line) = (6.0, y + 12.0);
    for &m in models {
        let label = shorten_name(c.label(m), width - 24.0);
        let needed = 10.0 + width_of_name(&label) + 14.0;
        if x > 6.0 && x + needed > width {
            (x, line) = (6.0, line + 20.0);
        }
        svg.mark((x, line - 4.5), c.colour(m), true, 4.5);
        svg.text((x + 10.0, line), &label, Anchor::Start, &format!("name c{}", c.colour(m)));
        x += needed;
    }
    line + 12.0
}

/// `Model: a, b; model: c` for a text alternative.
fn spoken(parts: impl IntoIterator<Item = (String, String)>) -> String {
    parts
        .into_iter()
        .filter(|(_, what)| what != MISSING)
        .map(|(who, what)| format!("{who}: {what}"))
        .collect::<Vec<_>>()
        .join("; ")
}
