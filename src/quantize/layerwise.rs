//! A model walked block by block: the hidden states of all sequences wait between blocks, so that each block's linears
//! can be looked at, and replaced, while memory stays near the model's own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::QuantizeError;
use crate::backend::observe::{Observed, held};
use crate::backend::{Backend, Batch, PAGE};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;
use crate::model::Decoder;

/// Inputs by module, [tokens, K] row-major, of the modules that are asked for.
type Seen = Arc<Mutex<BTreeMap<String, Vec<f32>>>>;

/// A model on its way through its own blocks.
pub(super) struct Walk<B: Backend> {
    decoder: Decoder<Observed<B>>,
    cache: B::Cache,
    passes: Vec<B::Pass>,
    seen: Seen,
}

/// What leaves a block, and inputs of its modules.
type Looked<T> = (Stream<T>, BTreeMap<String, Vec<f32>>);

/// Hidden states of every sequence before some block.
#[derive(Clone)]
pub(super) struct Stream<T>(Vec<T>);

impl<B: Backend + Clone> Walk<B> {
    /// Loads the model and gets ready for `sequences`.
    pub fn new(checkpoint: &Checkpoint, backend: &B, sequences: &[Vec<u32>]) -> Result<Self, QuantizeError> {
        let sequences: Vec<&Vec<u32>> = sequences.iter().filter(|s| !s.is_empty()).collect();
        let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
        if longest == 0 {
            return Err(QuantizeError::Calibration("there is no text: not one token to run".into()));
        }
        let seen = Seen::default();
        let sink = seen.clone();
        let observe = move |module: &str, x: &[f32]| {
            if let Some(inputs) = held(&sink).get_mut(module) {
                inputs.extend_from_slice(x);
            }
        };
        let decoder = Decoder::load(backend.clone(), checkpoint)?.observed(Box::new(observe));
        let cache = decoder.new_cache(longest.next_multiple_of(PAGE), 1, KvFormat::F32)?;
        let pass = |tokens: &Vec<u32>| decoder.pass(&Batch::alone(tokens.clone()));
        let passes = sequences.into_iter().map(pass).collect::<Result<_, _>>()?;
        Ok(Self { decoder, cache, passes, seen })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.decoder.config.layers.len()
    }

    /// The embedded sequences: what enters the first block.
    pub fn start(&self) -> Result<Stream<B::Tensor>, QuantizeError> {
        let embedded = self.passes.iter().map(|pass| self.decoder.embed(pass));
        Ok(Stream(embedded.collect::<Result<_, _>>()?))
    }

    /// Runs block `index`: what leaves it, and the inputs of `wanted` on the way. A module that no token reached has an
    /// empty input.
    pub fn block(
        &mut self,
        index: usize,
        stream: &Stream<B::Tensor>,
        wanted: &[String],
    ) -> Result<Looked<B::Tensor>, QuantizeError> {
        *held(&self.seen) = wanted.iter().map(|m| (m.clone(), Vec::new())).collect();
        let mut out = Vec::with_capacity(stream.0.len());
        for (x, pass) in stream.0.iter().zip(&self.passes) {
            out.push(self.decoder.blocks(index..index + 1, &|| Ok(x.clone()), pass, &mut self.cache)?);
        }
        let seen = std::mem::take(&mut *held(&self.seen));
        if let Some((module, _)) = seen.iter().find(|(_, x)| x.iter().any(|v| !v.is_finite())) {
            return Err(QuantizeError::Calibration(format!("the input of `{module}` holds a NaN or an infinity")));
        }
        Ok((Stream(out), seen))
    }

    /// For each token of `stream` 1 / RMS of its hidden state: what an error added to it is worth, as the next norm divides
    /// by just that. Tokens of huge states (attention sinks) would otherwise outweigh all others.
    pub fn worth(&self, stream: &Stream<B::Tensor>) -> Result<Vec<f32>, QuantizeError> {
        let mut out = Vec::new();
        let width = self.decoder.config.hidden;
        for x in &stream.0 {
            let host = self.decoder.backend().to_host(x)?;
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
        if self.decoder.replace(&module, linear) {
            return Ok(());
        }
        Err(QuantizeError::Module { module, detail: "is no linear of a block".into() })
    }
}
