//! How much disk a recipe needs, before anything is done.

use std::collections::BTreeSet;

use super::{Recipe, Scheme};
use crate::checkpoint::Checkpoint;
use crate::model::modules::Module;

/// Bytes on disk, at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    /// Beside the output while it works, and then the output.
    pub out: u64,
    /// The plain model that is kept.
    pub unrounded: u64,
}

/// What `recipe` writes for the `modules` that it gives a format: a model for each transformation and for each format that
/// is measured (unless it is known, `measured`), then the result.
pub(super) fn needed(
    checkpoint: &Checkpoint,
    modules: &[Module],
    recipe: &Recipe,
    measured: bool,
    scheme: &impl Fn(&Module) -> Scheme,
) -> Space {
    let stored = |name: &str| checkpoint.tensors.peek(name).map_or(0, |view| view.bytes.len() as u64);
    let plain: u64 = checkpoint.tensors.names().map(stored).sum();
    let weights: BTreeSet<String> = modules.iter().map(|m| checkpoint.weight_name(&m.name)).collect();
    let others: u64 = checkpoint.tensors.names().filter(|n| !weights.contains(*n)).map(stored).sum();
    let model = |scheme: &dyn Fn(&Module) -> Scheme| {
        let linear = |m: &Module| match scheme(m) {
            Scheme::None if checkpoint.is_fused(&m.name) => 2 * (m.role.n * m.role.k) as u64,
            Scheme::None => stored(&checkpoint.weight_name(&m.name)),
            s => ((m.role.n * m.role.k) as f64 * s.bits_per_weight() / 8.0) as u64,
        };
        others + modules.iter().map(linear).sum::<u64>()
    };
    let between = u64::from(recipe.rotate.is_some()) + u64::from(recipe.smooth.is_some());
    let donors: u64 = match &recipe.auto {
        Some(auto) if !measured => {
            let candidates = auto.schemes.iter().filter(|s| **s != Scheme::None);
            candidates.map(|c| model(&|m| if scheme(m) == Scheme::None { Scheme::None } else { *c })).sum()
        }
        _ => 0,
    };
    Space { out: between * plain + donors.max(model(scheme)), unrounded: plain }
}
