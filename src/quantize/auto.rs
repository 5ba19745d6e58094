//! Automatic mixed precision: what quantizing each group of linears alone does to the model's KL is measured for every
//! candidate format, and the formats are chosen so that the sum is small under a budget of bits.

use std::collections::BTreeMap;

use rayon::prelude::*;
use recoup_ground::shares::{self, Shard};
use serde::{Deserialize, Serialize};

use super::QuantizeError;
use super::recipe::{Auto, Recipe, Rule};
use crate::backend::{Backend, Batch, PAGE};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;
use crate::formats::scheme::Scheme;
use crate::logits::softmax_total;
use crate::model::modules::Module;
use crate::model::{Decoder, ModelConfig};

/// Where a checkpoint keeps the table that its formats were chosen by.
pub const TABLE_FILE: &str = "recoup_sensitivity.json";

/// Linears that get the same format, as engines run them in one kernel: q, k and v; gate and up; all experts of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub name: String,
    pub modules: Vec<String>,
    pub weights: u64,
    /// In the order of the recipe's schemes.
    pub options: Vec<Choice>,
    /// What was chosen.
    pub scheme: Scheme,
}

/// One format for a group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub scheme: Scheme,
    pub bits_per_weight: f64,
    /// Mean KL per token, in nats, of the model with this group alone so quantized, from the unquantized one.
    pub kl: f64,
}

/// The measured table and what was chosen by it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    pub tokens: usize,
    pub budget_bits: f64,
    pub bits: f64,
    /// Sum of the chosen options' KL: an estimate of the whole model's, were the parts' losses to add up.
    pub kl_sum: f64,
    /// The hash of the weights that it was measured on, as in a checkpoint's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    pub groups: Vec<Group>,
}

/// Groups with every option's KL, all of a model or a share, and on how many tokens they were measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub groups: Vec<Group>,
    pub tokens: usize,
}

impl Measured {
    /// All groups, from what was measured of shares of them, in their order.
    #[must_use]
    pub fn joined(shares: Vec<Self>) -> Self {
        let tokens = shares.first().map_or(0, |share| share.tokens);
        Self { groups: shares::whole(shares.into_iter().map(|share| share.groups).collect()), tokens }
    }
}

/// The groups of a model's block linears that `eligible` names, options still empty.
fn groups(modules: &[Module], eligible: &dyn Fn(&Module) -> bool) -> Vec<(usize, Group)> {
    let mut out: Vec<(usize, Group)> = Vec::new();
    for m in modules.iter().filter(|m| m.is_block_linear() && eligible(m)) {
        let layer = m.layer.unwrap_or(0);
        let name = if m.expert.is_some() { format!("model.layers.{layer}.mlp.experts") } else { m.fusion_key() };
        let weights = (m.role.n * m.role.k) as u64;
        match out.iter_mut().find(|(_, g)| g.name == name) {
            Some((_, group)) => {
                group.modules.push(m.name.clone());
                group.weights += weights;
            }
            None => {
                let modules = vec![m.name.clone()];
                out.push((layer, Group { name, modules, weights, options: Vec::new(), scheme: Scheme::None }));
            }
        }
    }
    out
}

/// Measures every group of `shard`, among those of `eligible` modules, under every candidate. `donors` are the model quantized whole, by scheme.
///
/// # Errors
/// When a model cannot be run, or computes something that is no number.
pub(super) fn measure<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    donors: &[(Scheme, &Checkpoint)],
    backend: &B,
    sequences: &[Vec<u32>],
    schemes: &[Scheme],
    (eligible, shard): (&dyn Fn(&Module) -> bool, Shard),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Measured, QuantizeError> {
    let base = Decoder::load(backend.clone(), checkpoint)?;
    let donors: Vec<(Scheme, Decoder<B>)> = donors
        .iter()
        .map(|(s, c)| Ok((*s, Decoder::load(backend.clone(), *c)?)))
        .collect::<Result<_, QuantizeError>>()?;
    let mut groups = shard.share(groups(&ModelConfig::read(&checkpoint.config)?.modules(), eligible));
    for (_, group) in &mut groups {
        let bits = |scheme: &Scheme| Choice { scheme: *scheme, bits_per_weight: scheme.bits_per_weight(), kl: 0.0 };
        group.options = schemes.iter().map(bits).collect();
    }
    let sequences: Vec<&Vec<u32>> = sequences.iter().filter(|s| !s.is_empty()).collect();
    let tokens: usize = sequences.iter().map(|s| s.len()).sum();
    let (layers, mut done) = (base.config.layers.len(), 0);
    let all = sequences.len() * groups.len() * donors.len();
    for sequence in sequences {
        let pass = base.pass(&Batch::alone(sequence.clone()))?;
        let mut cache = base.new_cache(sequence.len().next_multiple_of(PAGE), 1, KvFormat::F32)?;
        let mut states = vec![base.embed(&pass)?];
        for layer in 0..layers {
            let enter = || Ok(states[layer].clone());
            let next = base.blocks(layer..layer + 1, &enter, &pass, &mut cache)?;
            states.push(next);
        }
        let wanted = log_softmax(backend.to_host(&base.logits(&states[layers])?)?, sequence.len());
        for (layer, group) in &mut groups {
            for (scheme, donor) in &donors {
                let variant = base.graft(donor, &|name| group.modules.iter().any(|m| m == name));
                let enter = || Ok(states[*layer].clone());
                let x = variant.blocks(*layer..layers, &enter, &pass, &mut cache)?;
                let found = log_softmax(backend.to_host(&variant.logits(&x)?)?, sequence.len());
                let kl = divergence(&wanted, &found, sequence.len());
                if !kl.is_finite() {
                    return Err(QuantizeError::Calibration(format!(
                        "with `{}` as {scheme} the model computes something that is no number",
                        group.name
                    )));
                }
                if let Some(option) = group.options.iter_mut().find(|o| o.scheme == *scheme) {
                    option.kl += kl / tokens as f64;
                }
                done += 1;
                progress(done, all);
            }
        }
    }
    Ok(Measured { groups: groups.into_iter().map(|(_, g)| g).collect(), tokens })
}

/// Log-probabilities of logits [rows, vocab].
fn log_softmax(mut logits: Vec<f32>, rows: usize) -> Vec<f32> {
    let vocab = logits.len() / rows.max(1);
    logits.par_chunks_mut(vocab.max(1)).for_each(|row| {
        let (max, total) = softmax_total(row);
        let shift = (f64::from(max) + total.ln()) as f32;
        row.iter_mut().for_each(|v| *v -= shift);
    });
    logits
}

/// KL(p‖q) summed over the rows.
fn divergence(p: &[f32], q: &[f32], rows: usize) -> f64 {
    let vocab = p.len() / rows.max(1);
    let rows = p.par_chunks(vocab.max(1)).zip(q.par_chunks(vocab.max(1)));
    let kl =
        rows.map(|(p, q)| p.iter().zip(q).map(|(p, q)| f64::from(*p).exp() * f64::from(p - q)).sum::<f64>().max(0.0));
    // Summed in order: the same whatever the threads.
    kl.collect::<Vec<f64>>().iter().sum()
}

/// Chooses a format for each group: from the smallest ones, step by step along each group's lower convex hull, the step
/// that wins most KL for its bits first, while the budget lasts. What a step passes by can only be smaller than the one
/// that did not fit.
pub fn choose(mut groups: Vec<Group>, budget: f64, tokens: usize) -> Table {
    let total: u64 = groups.iter().map(|g| g.weights).sum();
    let hulls: Vec<Vec<Choice>> = groups.iter().map(|g| hull(&g.options)).collect();
    let mut at = vec![0usize; groups.len()];
    let cost = |group: &Group, option: &Choice| group.weights as f64 * option.bits_per_weight;
    let mut used: f64 = groups.iter().zip(&hulls).filter_map(|(g, h)| h.first().map(|o| cost(g, o))).sum();
    let allowed = budget * total as f64 * (1.0 + 1e-12);
    loop {
        let steps = groups.iter().enumerate().filter_map(|(i, g)| {
            let (now, next) = (hulls[i].get(at[i])?, hulls[i].get(at[i] + 1)?);
            let extra = cost(g, next) - cost(g, now);
            (used + extra <= allowed).then(|| (i, extra, (now.kl - next.kl) / extra))
        });
        let Some((i, extra, _)) = steps.max_by(|a, b| a.2.total_cmp(&b.2).then(b.0.cmp(&a.0))) else { break };
        at[i] += 1;
        used += extra;
    }
    let mut kl_sum = 0.0;
    for ((group, hull), at) in groups.iter_mut().zip(&hulls).zip(at) {
        if let Some(option) = hull.get(at) {
            group.scheme = option.scheme;
            kl_sum += option.kl;
        }
    }
    Table { tokens, budget_bits: budget, bits: used / total.max(1) as f64, kl_sum, weights: None, groups }
}

/// The options worth having, from few bits to many: each wins KL over the one before, and less per bit than the last step.
fn hull(options: &[Choice]) -> Vec<Choice> {
    let mut sorted = options.to_vec();
    sorted.sort_by(|a, b| a.bits_per_weight.total_cmp(&b.bits_per_weight).then(a.kl.total_cmp(&b.kl)));
    let mut out: Vec<Choice> = Vec::new();
    for option in sorted {
        if out.last().is_some_and(|last| option.kl >= last.kl) {
            continue;
        }
        let slope = |a: &Choice, b: &Choice| (a.kl - b.kl) / (b.bits_per_weight - a.bits_per_weight);
        while let [.., before, last] = &out[..] {
            if slope(before, last) > slope(last, &option) {
                break;
            }
            out.pop();
        }
        out.push(option);
    }
    out
}

impl Table {
    /// The recipe with its choice made: one rule for each linear.
    #[must_use]
    pub fn decided(&self, recipe: &Recipe) -> Recipe {
        let rules =
            self.groups.iter().flat_map(|g| g.modules.iter().map(|m| Rule { modules: m.clone(), scheme: g.scheme }));
        Recipe { rules: rules.collect(), auto: None, ..recipe.clone() }
    }

    /// Checks that a stored table is of this model and these schemes, and chooses anew under `auto`'s budget.
    ///
    /// # Errors
    /// When it is of another model or lacks a scheme.
    pub(super) fn again(
        &self,
        auto: &Auto,
        modules: &[Module],
        eligible: &dyn Fn(&Module) -> bool,
        weights: &str,
    ) -> Result<Self, QuantizeError> {
        let own: BTreeMap<String, Vec<String>> =
            groups(modules, eligible).into_iter().map(|(_, g)| (g.name, g.modules)).collect();
        let stored: BTreeMap<String, Vec<String>> =
            self.groups.iter().map(|g| (g.name.clone(), g.modules.clone())).collect();
        let fail = |detail: &str| {
            Err(QuantizeError::Recipe { file: "the stored table of sensitivities".into(), detail: detail.into() })
        };
        if own != stored {
            return fail("is of another model, or of other modules, than this; measure anew");
        }
        if self.weights.as_ref().is_some_and(|of| of != weights) {
            return fail("was measured on other weights than this model's; measure anew");
        }
        let mut groups = self.groups.clone();
        for group in &mut groups {
            group.options.retain(|o| auto.schemes.contains(&o.scheme));
            if group.options.len() != auto.schemes.len() {
                return fail("lacks a scheme that the recipe names; measure anew");
            }
        }
        Ok(choose(groups, auto.bits, self.tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn group(weights: u64, kl: &[f64]) -> Group {
        let schemes = [Scheme::Nvfp4, Scheme::Fp8, Scheme::None];
        let options =
            schemes.iter().zip(kl).map(|(s, kl)| Choice { scheme: *s, bits_per_weight: s.bits_per_weight(), kl: *kl });
        Group { name: weights.to_string(), modules: vec![], weights, options: options.collect(), scheme: Scheme::None }
    }

    /// The least sum of KL under the budget, by trying everything.
    fn best(groups: &[Group], budget: f64) -> f64 {
        let Some((first, rest)) = groups.split_first() else {
            return if budget >= -1e-9 { 0.0 } else { f64::INFINITY };
        };
        let tries = first.options.iter().map(|o| o.kl + best(rest, budget - first.weights as f64 * o.bits_per_weight));
        tries.fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn the_choice_keeps_the_budget_and_is_near_the_best(
            kl in prop::collection::vec((0.0f64..1.0, 0.0f64..0.3, 1u64..50), 1..6), budget in 4.6f64..16.0
        ) {
            let groups: Vec<Group> = kl.iter().map(|(a, b, w)| group(*w, &[*a, *b, 0.0])).collect();
            let total: u64 = groups.iter().map(|g| g.weights).sum();
            let table = choose(groups.clone(), budget, 1);
            prop_assert!(table.bits <= budget + 1e-9);
            // A relaxed optimum lies within one group's largest step of the greedy one.
            let slack = groups.iter().map(|g| g.options[0].kl).fold(0.0, f64::max);
            prop_assert!(table.kl_sum <= best(&groups, budget * total as f64) + slack + 1e-9);
        }
    }

    #[test]
    fn bits_go_where_they_win_most_and_options_that_win_nothing_are_passed_over() {
        let groups = vec![group(10, &[0.9, 0.1, 0.0]), group(10, &[0.2, 0.19, 0.0]), group(10, &[0.05, 0.06, 0.0])];
        let chosen = |budget: f64| -> Vec<Scheme> {
            choose(groups.clone(), budget, 1).groups.iter().map(|g| g.scheme).collect()
        };
        assert_eq!(chosen(4.5), [Scheme::Nvfp4; 3]);
        assert_eq!(chosen(5.7), [Scheme::Fp8, Scheme::Nvfp4, Scheme::Nvfp4]);
        assert_eq!(chosen(9.6), [Scheme::Fp8, Scheme::None, Scheme::Nvfp4]);
        assert_eq!(chosen(16.0), [Scheme::None; 3]);
    }
}
