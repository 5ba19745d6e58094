//! What a model needs in memory, known from its files before any of it is loaded.

use super::ModelConfig;
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;

/// Bytes that a model needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Its weights: packed they are as large as in the files.
    pub weights: u64,
    /// Of those the experts of mixtures, which need not all be there at a time.
    pub experts: u64,
    /// One expert, if all are alike.
    pub expert: u64,
    /// What attention keeps of a token.
    pub token: u64,
    /// What recurrent layers keep of a sequence.
    pub sequence: u64,
}

impl Needs {
    /// Of the model of `checkpoint`, which `config` says; keys and values are kept as `kv` where the files do not say it.
    #[must_use]
    pub fn of(checkpoint: &Checkpoint, config: &ModelConfig, kv: KvFormat) -> Self {
        let bytes = |name: &str| checkpoint.tensors.peek(name).map_or(0, |view| view.bytes.len() as u64);
        let (mut weights, mut experts) = (0, 0);
        for name in checkpoint.tensors.names() {
            weights += bytes(name);
            experts += if name.contains(".experts.") { bytes(name) } else { 0 };
        }
        let count: usize = config.mixtures().iter().map(|(_, _, m)| m.experts).sum();
        let element = if checkpoint.announced.fp8_kv_cache { 1 } else { kv.bytes() };
        Self {
            weights,
            experts: if count == 0 { 0 } else { experts },
            expert: experts.div_ceil(count.max(1) as u64),
            token: (element * config.cache_values()) as u64,
            sequence: 4 * config.state_values() as u64,
        }
    }

    /// With `tokens` of `sequences` in the cache.
    #[must_use]
    pub fn bytes(&self, tokens: usize, sequences: usize) -> u64 {
        let kept =
            self.token.saturating_mul(tokens as u64).saturating_add(self.sequence.saturating_mul(sequences as u64));
        self.weights.saturating_add(kept)
    }
}
