//! A model over several ranks: which layers, heads and experts go where.

use std::collections::HashMap;

use super::config::{InputsConfig, MixerConfig, ModelConfig};
use super::modules::{Module, Part};
use crate::backend::parallel::{Cut, Plan, Rows, Size, heads};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;

/// Why a model cannot be spread as was asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error(
        "{tensor} ranks cannot share a layer of {heads} attention heads: --tensor-parallel-size {heads} at the most"
    )]
    Heads { heads: usize, tensor: usize },
    #[error("{layers} layers do not make {pipeline} stages: --pipeline-parallel-size {layers} at the most")]
    Stages { layers: usize, pipeline: usize },
}

impl ModelConfig {
    /// Who of `size` ranks computes what: layers go to stages by the numbers of their weights; heads, experts and rows to a stage's
    /// ranks.
    ///
    /// # Errors
    /// When the model has too few heads or layers.
    pub fn plan(&self, size: Size) -> Result<Plan, PlanError> {
        let (layers, pipeline) = (self.layers.len(), size.pipeline);
        if layers < pipeline {
            return Err(PlanError::Stages { layers, pipeline });
        }
        let modules = self.modules();
        let mut weights = vec![0; layers];
        for module in &modules {
            if let Some(layer) = module.layer {
                weights[layer] += module.role.n * module.role.k;
            }
        }
        let stages = stages(&weights, pipeline);
        let mut plan = Plan::default();
        let mut by_heads = HashMap::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for step in &layer.steps {
                match &step.mixer {
                    MixerConfig::Attention(a) => {
                        plan.caches.push(stages[index]);
                        let too_many = PlanError::Heads { heads: a.heads, tensor: size.tensor };
                        let [q, kv] = heads(a.heads, a.kv_heads, size.tensor).ok_or(too_many)?;
                        if a.inputs == InputsConfig::Separate && !a.gated {
                            let at = self.in_layer(index, step.at);
                            by_heads.insert(format!("{at}.q_proj"), q.times(a.head_dim));
                            by_heads.insert(format!("{at}.k_proj"), kv.times(a.head_dim));
                            by_heads.insert(format!("{at}.v_proj"), kv.times(a.value_dim()));
                        }
                    }
                    MixerConfig::Mamba(_) | MixerConfig::DeltaNet(_) => plan.recurrent.push(stages[index]),
                    MixerConfig::Mlp(_) | MixerConfig::Mixture(_) => (),
                }
            }
        }
        let experts: usize = modules.iter().filter_map(|m| m.expert).max().map_or(0, |last| last + 1);
        for module in modules {
            // The embedding is with the first layers; a head of its own with the last.
            let last = if module.part == Part::Head { pipeline - 1 } else { 0 };
            let stage = module.layer.map_or(last, |layer| stages[layer]);
            let rows = match (module.expert, by_heads.remove(&module.name)) {
                _ if size.tensor < 2 => Rows::Even,
                (Some(expert), _) => {
                    Rows::Cut(Cut::owned(module.role.n, size.tensor, expert * size.tensor / experts.max(1)))
                }
                (None, Some(cut)) => Rows::Cut(cut),
                (None, None) => Rows::Even,
            };
            plan.linears.insert(module.name, (stage, rows));
        }
        Ok(plan)
    }
}

/// Bytes that each of `size` ranks has of the weights of `checkpoint`, which `plan` shares out, and of `tokens` tokens in a cache in
/// `kv` where the files do not say it.
#[must_use]
pub fn rank_bytes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    (plan, size): (&Plan, Size),
    (tokens, kv): (usize, KvFormat),
) -> Vec<u64> {
    let modules = config.modules();
    let mut stored: HashMap<&str, u64> = modules.iter().map(|m| (m.name.as_str(), 0)).collect();
    // What is no module's by its name: norms, and experts that lie in one tensor.
    let mut other = 0;
    for name in checkpoint.tensors.names() {
        let bytes = checkpoint.tensors.peek(name).map_or(0, |view| view.bytes.len() as u64);
        let module = name.rsplit_once('.').and_then(|(module, _)| stored.get_mut(module));
        *module.unwrap_or(&mut other) += bytes;
    }
    let without = |m: &&Module| stored[m.name.as_str()] == 0 && !(config.tied_embeddings && m.part == Part::Head);
    let left: u64 = modules.iter().filter(without).map(|m| (m.role.n * m.role.k) as u64).sum();
    let mut own = vec![if left == 0 { other } else { 0 }; size.ranks()];
    for m in &modules {
        let weights = (m.role.n * m.role.k) as u64;
        let bytes = match without(&m) {
            true => (u128::from(other) * u128::from(weights) / u128::from(left.max(1))) as u64,
            false => stored[m.name.as_str()],
        };
        let (stage, cut) = plan.place(&m.name, m.role.n, size.tensor);
        for rank in 0..size.tensor {
            let rows = cut.as_ref().map_or(m.role.n, |cut| cut.0[rank].1);
            own[stage * size.tensor + rank] += bytes * rows as u64 / m.role.n.max(1) as u64;
        }
    }
    let element = if checkpoint.announced.fp8_kv_cache { 1 } else { kv.bytes() };
    let attention = config.layers.iter().flat_map(|l| &l.steps).filter_map(|step| match &step.mixer {
        MixerConfig::Attention(a) => Some(a),
        _ => None,
    });
    for (a, stage) in attention.zip(&plan.caches) {
        let kept = heads(a.heads, a.kv_heads, size.tensor);
        for rank in 0..size.tensor {
            let heads = kept.as_ref().map_or(a.kv_heads, |[_, kv]| kv.0[rank].1);
            own[stage * size.tensor + rank] += (tokens * heads * (a.head_dim + a.value_dim()) * element) as u64;
        }
    }
    own
}

/// The stage of each of the layers with these weights: as even as whole layers are, none empty.
fn stages(weights: &[usize], pipeline: usize) -> Vec<usize> {
    let total: usize = weights.iter().sum::<usize>().max(1);
    let (mut out, mut before, mut stage) = (Vec::with_capacity(weights.len()), 0, 0);
    for (layer, weight) in weights.iter().enumerate() {
        // By where the middle of the layer lies; at least one layer behind the last stage, and one left for each to come.
        let wanted = (2 * before + weight) * pipeline / (2 * total);
        let left = weights.len() - layer;
        if layer > 0 && (wanted > stage || left == pipeline - stage - 1) && stage + 1 < pipeline {
            stage += 1;
        }
        out.push(stage);
        before += weight;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_make_stages_of_about_the_same_size() {
        assert_eq!(stages(&[1, 1, 1, 1], 2), [0, 0, 1, 1]);
        assert_eq!(stages(&[1, 1, 1], 3), [0, 1, 2]);
        assert_eq!(stages(&[9, 1, 1], 3), [0, 1, 2]);
        assert_eq!(stages(&[1, 1, 9], 3), [0, 1, 2]);
        assert_eq!(stages(&[1, 1, 9], 2), [0, 0, 1]);
        assert_eq!(stages(&[1; 30], 4).iter().filter(|s| **s == 3).count(), 7);
        assert_eq!(stages(&[0, 0], 2), [0, 1]);
    }
}
