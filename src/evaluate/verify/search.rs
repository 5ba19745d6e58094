//! Where in the model a fault sits: one layer's modules after the other as a wrong scale, or gate and up taken for each
//! other, would make them.

use std::collections::BTreeMap;

use super::agreement::{Rivals, Tolerance, square};
use super::altered::beside;
use super::facts::{Fact, Sequence, checked};
use super::statistics::mean;
use super::suspects::Suspect;
use super::{Kind, Subject, VerifyError};
use crate::backend::{Backend, Batch, PAGE};
use crate::evaluate::Watch;
use crate::formats::linear::OutputScale;
use crate::model::Decoder;
use crate::model::modules::{Module, Part};

/// Tokens that are tried on.
pub const TOKENS: usize = 48;
/// Factors that a scale may be wrong by, to begin with.
const FACTORS: [f32; 4] = [0.5, 0.9, 1.1, 2.0];
/// Modules whose factor is looked for more closely.
const FINALISTS: usize = 4;
/// A wrong factor is between the inverse of this and this.
const LARGEST: f32 = 64.0;
/// Steps of the closer look.
const STEPS: usize = 18;

/// A model that computes one sequence again and again, from the layer on that is altered.
struct Ladder<'a, B: Backend> {
    model: &'a Decoder<B>,
    sequence: &'a Sequence,
    pass: B::Pass,
    cache: B::Cache,
    /// What enters each layer.
    entries: Vec<B::Tensor>,
}

impl<'a, B: Backend> Ladder<'a, B> {
    fn new(subject: &Subject<'a, B>, sequence: &'a Sequence) -> Result<Self, VerifyError> {
        let model = subject.model;
        let tokens = sequence.tokens[..sequence.tokens.len() - 1].to_vec();
        let mut cache = model.new_cache(tokens.len().next_multiple_of(PAGE), 1, subject.kv)?;
        let pass = model.pass(&Batch::alone(tokens))?;
        let mut entries = Vec::new();
        let mut x = model.embed(&pass)?;
        for layer in 0..model.config.layers.len() {
            entries.push(x.clone());
            x = model.block(layer, x, &pass, &mut cache)?;
        }
        Ok(Self { model, sequence, pass, cache, entries })
    }

    /// The mean square of each place's differences to what the server says, where `linears` stand in the place of their modules of
    /// `layer`; nothing where that computes no numbers.
    fn distances(&mut self, layer: usize, linears: Vec<(&str, B::Linear)>) -> Option<Vec<Option<f64>>> {
        let mut model = self.model.graft(self.model, &|_| false);
        for (name, linear) in linears {
            model.replace(name, linear);
        }
        let entry = &self.entries[layer];
        let range = layer..self.entries.len();
        let x = model.blocks(range, &|| Ok(entry.clone()), &self.pass, &mut self.cache).ok()?;
        let rows: Vec<usize> = (self.sequence.first - 1..self.sequence.tokens.len() - 1).collect();
        let backend = model.backend();
        let logits = model.logits(&backend.select_rows(&x, &rows).ok()?).ok()?;
        let facts = checked(self.sequence, &backend.to_host(&logits).ok()?, model.config.vocab, 1.0).ok()?;
        Some(distances(self.sequence, &facts))
    }
}

/// The mean square of each place's differences to what the server says.
pub(super) fn distances(sequence: &Sequence, facts: &[Fact]) -> Vec<Option<f64>> {
    facts.iter().enumerate().map(|(i, fact)| square(&sequence.said_at(i), &fact.values)).collect()
}

fn size(distances: &Option<Vec<Option<f64>>>) -> f64 {
    let all = distances.iter().flatten().copied().flatten();
    mean(all).unwrap_or(f64::INFINITY)
}

/// Modules that are scaled together: one, or the same part of all experts.
struct Place<'m> {
    layer: usize,
    name: String,
    modules: Vec<&'m Module>,
}

fn places(modules: &[Module]) -> Vec<Place<'_>> {
    let mut places: BTreeMap<(usize, Part, bool), Place<'_>> = BTreeMap::new();
    for module in modules.iter().filter(|m| m.is_block_linear()) {
        let Some(layer) = module.layer else { continue };
        let name = match module.expert {
            None => module.name.clone(),
            Some(expert) => module.name.replace(&format!(".{expert}."), ".*."),
        };
        let place = places.entry((layer, module.part, module.expert.is_some()));
        place.or_insert(Place { layer, name, modules: Vec::new() }).modules.push(module);
    }
    places.into_values().collect()
}

/// Tries every place of the model on the beginning of `sequence`, whose facts as it is are `here`.
///
/// # Errors
/// The checkpoint's or the backend's.
pub fn search<B: Backend>(
    subject: &Subject<'_, B>,
    sequence: &Sequence,
    here: &[Fact],
    tolerance: &Tolerance,
    watch: &mut dyn Watch,
) -> Result<Vec<Suspect>, VerifyError> {
    let modules = subject.model.config.modules();
    let places = places(&modules);
    let mut ladder = Ladder::new(subject, sequence)?;
    let before = distances(sequence, here);
    let judge = |kind, what: String, after: &Option<Vec<Option<f64>>>| {
        let after = after.clone().unwrap_or_else(|| vec![None; before.len()]);
        Suspect::judged(kind, what, Rivals::of(before.iter().copied().zip(after)), tolerance)
    };
    let mut found = Vec::new();
    watch.begin("looking for the layer", places.len() as u64, 0);
    let mut tried: Vec<(f64, f32, &Place<'_>)> = Vec::new();
    for place in &places {
        let part = place.modules[0].part;
        let gates: Vec<(&Module, &Module)> =
            place.modules.iter().filter_map(|m| Some((*m, beside(&modules, m, Part::Up)?))).collect();
        if part == Part::Gate && gates.len() == place.modules.len() {
            let mut linears = Vec::new();
            for (gate, up) in gates {
                linears.push((&gate.name[..], subject.load_scaled(up, 1.0)?));
                linears.push((&up.name[..], subject.load_scaled(gate, 1.0)?));
            }
            let after = ladder.distances(place.layer, linears);
            let what = format!("takes gate and up for each other in layer {} (`{}`)", place.layer, place.name);
            found.push(judge(Kind::Weights, what, &after));
        }
        if subject.is_scaled(place.modules[0])? {
            for factor in FACTORS {
                tried.push((size(&ladder.distances(place.layer, subject.scaled(place, factor)?)), factor, place));
            }
        }
        watch.part();
    }
    watch.end();
    tried.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut finalists: Vec<(f64, f32, &Place<'_>)> = Vec::new();
    for candidate in tried {
        if finalists.len() < FINALISTS && !finalists.iter().any(|f| std::ptr::eq(f.2, candidate.2)) {
            finalists.push(candidate);
        }
    }
    watch.begin("looking at the scale", finalists.len() as u64, 0);
    for (_, start, place) in finalists {
        let (factor, after) =
            narrowed(start, &mut |factor| Ok(ladder.distances(place.layer, subject.scaled(place, factor)?)))?;
        let what = format!(
            "has a scale of `{}` (layer {}) that is {factor:.3} times the checkpoint's",
            place.name, place.layer
        );
        found.push(judge(Kind::Scale, what, &after));
        watch.part();
    }
    watch.end();
    found.sort_by(|a, b| a.after.total_cmp(&b.after));
    Ok(found)
}

/// Distances of all places, where there are any.
type Distances = Option<Vec<Option<f64>>>;

/// The factor that fits best: away from `start` as long as that helps, then by golden section.
fn narrowed(
    start: f32,
    at: &mut dyn FnMut(f32) -> Result<Distances, VerifyError>,
) -> Result<(f32, Distances), VerifyError> {
    let (mut best, mut distances) = (start.ln(), at(start)?);
    let step = if start > 1.0 { std::f32::consts::LN_2 } else { -std::f32::consts::LN_2 };
    while best.abs() < LARGEST.ln() {
        let next = at((best + step).exp())?;
        if size(&next) >= size(&distances) {
            break;
        }
        (best, distances) = (best + step, next);
    }
    const GOLDEN: f32 = 0.381_966;
    let (mut low, mut high) = (best - step.abs(), best + step.abs());
    for _ in 0..STEPS {
        let right = high - best > best - low;
        let probe = if right { best + GOLDEN * (high - best) } else { best - GOLDEN * (best - low) };
        let there = at(probe.exp())?;
        if size(&there) < size(&distances) {
            if right {
                low = best
            } else {
                high = best
            }
            (best, distances) = (probe, there);
        } else if right {
            high = probe;
        } else {
            low = probe;
        }
    }
    Ok((best.exp(), distances))
}

impl<B: Backend> Subject<'_, B> {
    /// The weight of a module, its scale multiplied.
    fn load_scaled(&self, module: &Module, factor: f32) -> Result<B::Linear, VerifyError> {
        let mut linear = self.checkpoint.linear(&module.name, module.role)?;
        if factor != 1.0 {
            linear.output_scale = match linear.output_scale {
                OutputScale::One => OutputScale::Tensor(factor),
                OutputScale::Tensor(scale) => OutputScale::Tensor(scale * factor),
                OutputScale::Row(scales) => OutputScale::Row(scales.into_iter().map(|s| s * factor).collect()),
            };
        }
        Ok(self.model.backend().load_linear(linear)?)
    }

    fn scaled<'m>(&self, place: &Place<'m>, factor: f32) -> Result<Vec<(&'m str, B::Linear)>, VerifyError> {
        place.modules.iter().map(|m| Ok((&m.name[..], self.load_scaled(m, factor)?))).collect()
    }

    /// Whether a weight has a scale that can be wrong.
    fn is_scaled(&self, module: &Module) -> Result<bool, VerifyError> {
        Ok(!self.checkpoint.linear(&module.name, module.role)?.element.is_float())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_factor_is_found_wherever_it_is() {
        for (truth, start) in [(6.0f32, 2.0), (0.03, 0.5), (1.17, 1.1), (0.8, 0.9)] {
            let mut calls = 0;
            let (found, _) = narrowed(start, &mut |factor| {
                calls += 1;
                Ok(Some(vec![Some(f64::from((factor / truth).ln().abs()).min(3.0))]))
            })
            .unwrap();
            assert!((found / truth).ln().abs() < 0.01 && calls < 40, "{truth}: {found} after {calls}");
        }
    }
}
