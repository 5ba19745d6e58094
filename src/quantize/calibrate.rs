//! Max calibration: the largest magnitude that each linear's input reaches on some text.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::QuantizeError;
use crate::backend::Backend;
use crate::backend::observe::{Observer, held};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::kv;
use crate::engine::{Engine, Limits};
use crate::formats::kv::KvFormat;
use crate::formats::largest;
use crate::model::Decoder;
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// What calibration found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Largest magnitude of each module's input, and of each layer's keys and values by the name of their scale's tensor;
    /// what saw no token is absent.
    pub amax: BTreeMap<String, f32>,
    /// Tokens seen.
    pub tokens: usize,
    /// Where the text came from, for the checkpoint's metadata.
    pub description: String,
}

impl Calibration {
    /// Of all text, from what was found on shares of it.
    #[must_use]
    pub fn joined(shares: impl IntoIterator<Item = Self>) -> Self {
        shares.into_iter().fold(Self::default(), |mut all, share| {
            for (name, seen) in share.amax {
                let max = all.amax.entry(name).or_default();
                *max = max.max(seen);
            }
            Self { amax: all.amax, tokens: all.tokens + share.tokens, description: share.description }
        })
    }

    /// Largest magnitude by [`Module::input_key`]: of the inputs that share a scale.
    #[must_use]
    pub fn shared(&self, modules: &[Module]) -> BTreeMap<String, f32> {
        let mut out: BTreeMap<String, f32> = BTreeMap::new();
        for m in modules {
            if let Some(&amax) = self.amax.get(&m.name) {
                let shared = out.entry(m.input_key()).or_default();
                *shared = shared.max(amax);
            }
        }
        out
    }
}

/// Names of the tensors that hold the scales of cached keys and values, by layer; of attention layers only.
#[must_use]
pub fn kv_names(config: &ModelConfig) -> BTreeMap<usize, [String; 2]> {
    config.attentions().into_iter().map(|(layer, module, _)| (layer, kv::written(&module))).collect()
}

/// Largest magnitudes so far by name; NaN once anything was not finite.
#[derive(Default)]
struct Peaks {
    amax: BTreeMap<String, f32>,
    kv_names: BTreeMap<usize, [String; 2]>,
}

impl Observer for Peaks {
    fn input(&mut self, name: &str, x: &[f32]) {
        let seen = largest(x);
        let seen = if seen.is_finite() { seen } else { f32::NAN };
        match self.amax.get_mut(name) {
            Some(max) if max.is_nan() || *max >= seen => {}
            Some(max) => *max = seen,
            None => {
                self.amax.insert(name.to_owned(), seen);
            }
        }
    }

    fn wants_cached(&self) -> bool {
        true
    }

    fn cached(&mut self, layer: usize, keys: &[f32], values: &[f32]) {
        let names = self.kv_names.get(&layer).cloned();
        for (name, x) in names.iter().flatten().zip([keys, values]) {
            self.input(name, x);
        }
    }
}

/// Runs `sequences` of token ids through the model as it is, unquantized, one after the other.
///
/// # Errors
/// When there is nothing to run, a token is outside the vocabulary, or an activation is not finite.
pub fn calibrate<B: Backend>(
    checkpoint: &Checkpoint,
    backend: B,
    sequences: &[Vec<u32>],
    description: &str,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Calibration, QuantizeError> {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    if longest == 0 {
        return Err(QuantizeError::Calibration("there is no text: not one token to run".into()));
    }
    let kv_names = kv_names(&ModelConfig::read(&checkpoint.config)?);
    let peaks = Arc::new(Mutex::new(Peaks { amax: BTreeMap::new(), kv_names }));
    let model = Decoder::load(backend, checkpoint)?.observed(Box::new(peaks.clone()));
    let mut engine = Engine::new(&model, Limits::new(longest, 1), KvFormat::F32)?;
    for (i, tokens) in sequences.iter().enumerate() {
        progress(i, sequences.len());
        if let Some(last) = tokens.len().checked_sub(1) {
            engine.logits(tokens.clone(), last)?;
        }
        while !engine.is_empty() {
            engine.step()?;
        }
    }
    progress(sequences.len(), sequences.len());
    let amax = std::mem::take(&mut held(&peaks).amax);
    if let Some((module, _)) = amax.iter().find(|(_, v)| v.is_nan()) {
        return Err(QuantizeError::Calibration(format!("the input of `{module}` holds a NaN or an infinity")));
    }
    Ok(Calibration { amax, tokens: sequences.iter().map(Vec::len).sum(), description: description.into() })
}
