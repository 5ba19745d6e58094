//! The plots of the page, each with its numbers in a table.

use maud::Markup;

use super::ReportContext;
use super::tables::Table;
use crate::comparison::Comparison;

mod curve;
mod damage;
mod distribution;
mod groups;
mod recovery;
mod tradeoff;

/// A drawing and what is said about it.
pub(super) struct Figure {
    pub(super) title: String,
    /// How to read it.
    pub(super) caption: String,
    pub(super) drawing: Markup,
    /// The same numbers.
    pub(super) table: Option<Table>,
    /// Stands beside another one where there is room.
    pub(super) half: bool,
}

/// All plots that the comparison has data for.
pub(super) fn figures(c: &Comparison, context: &ReportContext) -> Vec<Figure> {
    let texts = c.texts();
    let mut all: Vec<Figure> = recovery::figure(c).into_iter().collect();
    all.extend(texts.iter().filter_map(|text| distribution::figure(c, text)));
    all.extend(c.attributions.iter().filter_map(|a| damage::figure(c, a)));
    all.extend(tradeoff::figures(c));
    all.extend(texts.iter().filter_map(|text| groups::by_class(c, text)));
    all.extend(texts.iter().filter_map(|text| groups::by_position(c, text)));
    all.extend(context.training_curves.iter().filter_map(|curve| curve::figure(c, curve)));
    all
}
