//! Max calibration: the largest magnitude that each linear's input reaches on some text.

use std::collections::BTreeMap;

use super::QuantizeError;
use crate::backend::cpu::CpuBackend;
use crate::backend::observe::Observed;
use crate::backend::{Batch, PAGE, Span};
use crate::checkpoint::Checkpoint;
use crate::formats::amax;
use crate::formats::kv::KvFormat;
use crate::model::modules::Module;
use crate::model::{Decoder, Wanted};

/// What calibration found.
#[derive(Clone, Debug, Default)]
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

/// Runs `sequences` of token ids through the model as it is, unquantized, one after the other.
///
/// # Errors
/// When there is nothing to run, a token is outside the vocabulary, or an activation is not finite.
pub fn calibrate(
    checkpoint: &Checkpoint,
    backend: CpuBackend,
    sequences: &[Vec<u32>],
    description: &str,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Calibration, QuantizeError> {
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    if longest == 0 {
        return Err(QuantizeError::Calibration("there is no text: not one token to run".into()));
    }
    let observe = |map: &mut BTreeMap<String, f32>, module: &str, x: &[f32]| {
        let seen = if x.iter().all(|v| v.is_finite()) { amax(x) } else { f32::NAN };
        match map.get_mut(module) {
            Some(max) if max.is_nan() || *max >= seen => {}
            Some(max) => *max = seen,
            None => {
                map.insert(module.to_owned(), seen);
            }
        }
    };
    let found = std::sync::Arc::new(std::sync::Mutex::new(BTreeMap::new()));
    let sink = found.clone();
    let observed = Observed::new(backend, move |module: &str, x: &[f32]| {
        observe(&mut sink.lock().unwrap_or_else(std::sync::PoisonError::into_inner), module, x);
    });
    let model = Decoder::load(observed, checkpoint)?;
    let mut cache = model.new_cache(longest.next_multiple_of(PAGE), KvFormat::F32)?;
    let pages: Vec<u32> = (0..longest.div_ceil(PAGE) as u32).collect();
    for (i, tokens) in sequences.iter().enumerate() {
        progress(i, sequences.len());
        let span = Span { slot: 0, start: 0, len: tokens.len(), pages: pages.clone() };
        if !tokens.is_empty() {
            model.forward(&Batch { tokens: tokens.clone(), spans: vec![span] }, &mut cache, Wanted::Last)?;
        }
    }
    progress(sequences.len(), sequences.len());
    drop(model);
    let amax = std::mem::take(&mut *found.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    if let Some((module, _)) = amax.iter().find(|(_, v)| v.is_nan()) {
        return Err(QuantizeError::Calibration(format!("the input of `{module}` holds a NaN or an infinity")));
    }
    Ok(Calibration { amax, tokens: sequences.iter().map(Vec::len).sum(), description: description.into() })
}
