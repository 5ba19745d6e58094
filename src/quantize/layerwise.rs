//! A model walked block by block: the hidden states of all sequences wait between blocks, so that each block's linears
//! can be looked at, and replaced, while memory stays near the model's own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::QuantizeError;
use crate::backend::cpu::{CpuBackend, CpuTensor};
use crate::backend::observe::Observed;
use crate::backend::{Backend as _, Batch, PAGE, RopeTable, Span};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;
use crate::model::Decoder;

type Observe = Box<dyn FnMut(&str, &[f32]) + Send>;
type Watched = Observed<CpuBackend, Observe>;

/// Inputs by module, [tokens, K] row-major, of the modules that are asked for.
type Seen = Arc<Mutex<BTreeMap<String, Vec<f32>>>>;

/// A model on its way through its own blocks.
pub(super) struct Walk {
    decoder: Decoder<Watched>,
    cache: <Watched as crate::backend::Backend>::Cache,
    batches: Vec<(Batch, RopeTable)>,
    seen: Seen,
}

/// Hidden states of every sequence before some block.
#[derive(Clone)]
pub(super) struct Stream(Vec<CpuTensor>);

impl Walk {
    /// Loads the model and gets ready for `sequences`.
    pub fn new(checkpoint: &Checkpoint, backend: &CpuBackend, sequences: &[Vec<u32>]) -> Result<Self, QuantizeError> {
        let sequences: Vec<&Vec<u32>> = sequences.iter().filter(|s| !s.is_empty()).collect();
        let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        if longest == 0 {
            return Err(QuantizeError::Calibration("there is no text: not one token to run".into()));
        }
        let seen = Seen::default();
        let sink = seen.clone();
        let observe: Observe = Box::new(move |module, x| {
            if let Some(inputs) = sink.lock().unwrap_or_else(PoisonError::into_inner).get_mut(module) {
                inputs.extend_from_slice(x);
            }
        });
        let decoder = Decoder::load(Observed::new(backend.clone(), observe), checkpoint)?;
        let cache = decoder.new_cache(longest.next_multiple_of(PAGE), KvFormat::F32)?;
        let batch = |tokens: &Vec<u32>| {
            let pages = (0..tokens.len().div_ceil(PAGE) as u32).collect();
            let span = Span { slot: 0, start: 0, len: tokens.len(), pages };
            let batch = Batch { tokens: tokens.clone(), spans: vec![span] };
            let rope = decoder.rope(&batch);
            (batch, rope)
        };
        let batches = sequences.into_iter().map(batch).collect();
        Ok(Self { decoder, cache, batches, seen })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.decoder.config.layers
    }

    /// The embedded sequences: what enters the first block.
    pub fn start(&self) -> Result<Stream, QuantizeError> {
        let embedded = self.batches.iter().map(|(batch, _)| self.decoder.embed(batch));
        Ok(Stream(embedded.collect::<Result<_, _>>()?))
    }

    /// Runs block `index`: what leaves it, and the inputs of `wanted` on the way. A module that no token reached has an
    /// empty input.
    pub fn block(
        &mut self,
        index: usize,
        stream: &Stream,
        wanted: &[String],
    ) -> Result<(Stream, BTreeMap<String, Vec<f32>>), QuantizeError> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) =
            wanted.iter().map(|m| (m.clone(), Vec::new())).collect();
        let mut out = Vec::with_capacity(stream.0.len());
        for (x, (batch, rope)) in stream.0.iter().zip(&self.batches) {
            out.push(self.decoder.blocks(index..index + 1, &|| Ok(x.clone()), rope, &mut self.cache, batch)?);
        }
        let seen = std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some((module, _)) = seen.iter().find(|(_, x)| x.iter().any(|v| !v.is_finite())) {
            return Err(QuantizeError::Calibration(format!("the input of `{module}` holds a NaN or an infinity")));
        }
        Ok((Stream(out), seen))
    }

    /// For each token of `stream` 1 / RMS of its hidden state: what an error added to it is worth, as the next norm divides
    /// by just that. Tokens of huge states (attention sinks) would otherwise outweigh all others.
    pub fn worth(&self, stream: &Stream) -> Result<Vec<f32>, QuantizeError> {
        let mut out = Vec::new();
        for (x, (batch, _)) in stream.0.iter().zip(&self.batches) {
            let host = self.decoder.backend().to_host(x)?;
            let width = host.len() / batch.tokens.len();
            out.extend(host.chunks(width).map(|h| {
                let mean = h.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                if mean > 0.0 { (1.0 / mean.sqrt()) as f32 } else { 0.0 }
            }));
        }
        Ok(out)
    }

    /// Puts a linear in the place of the one with its name.
    pub fn replace(&mut self, linear: LinearTensors<'_>) -> Result<(), QuantizeError> {
        let module = linear.name.clone();
        let linear = self.decoder.backend().load_linear(linear)?;
        if self.decoder.replace(linear) {
            return Ok(());
        }
        Err(QuantizeError::Module { module, detail: "is no linear of a block".into() })
    }
}
