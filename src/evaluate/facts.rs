//! What is known of a model beside its scores: format, size, speed on this machine.

use std::collections::BTreeSet;
use std::time::Instant;

use recoup_eval::scores::ModelFacts;

use crate::backend::{self, Backend, Batch, PAGE, Span};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::error::Result;
use crate::formats::kv::KvFormat;
use crate::formats::linear::ActivationFormat;
use crate::model::{Decoder, ModelConfig, Wanted};

/// Tokens of the prompt and of the answer whose speed is measured.
const PREFILL_TOKENS: usize = 256;
const DECODE_TOKENS: usize = 24;

/// Name, format and size, from the checkpoint.
///
/// # Errors
/// Anything wrong with the checkpoint.
pub fn facts(name: &str, checkpoint: &Checkpoint) -> Result<ModelFacts> {
    let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
    let (mut bytes, mut elements) = (0, 0);
    let mut formats = BTreeSet::new();
    for module in config.modules().iter().filter(|m| checkpoint.has_linear(&m.name)) {
        let t = checkpoint.linear(&module.name, module.role)?;
        bytes += t.stored_bytes();
        elements += t.n * t.k;
        if module.is_block_linear() {
            let weight = t.weight_format();
            formats.insert(match t.activation {
                ActivationFormat::Float if t.element.is_float() => weight.to_owned(),
                ActivationFormat::Float => format!("{weight}, weights only"),
                activation => format!("{weight} x {activation}"),
            });
        }
    }
    let format = formats.into_iter().collect::<Vec<_>>().join(" + ");
    Ok(ModelFacts {
        name: name.into(),
        format: Some(format).filter(|f| !f.is_empty()),
        stored_bytes: Some(bytes as u64),
        bits_per_weight: Some(8.0 * bytes as f64 / elements.max(1) as f64),
        ..ModelFacts::default()
    })
}

/// Bytes of packed weights in memory.
#[must_use]
pub fn resident_bytes<B: Backend>(model: &Decoder<B>) -> u64 {
    model.linears().map(|l| model.backend().resident_bytes(l) as u64).sum()
}

/// Tokens per second of a prompt, and of generating one by one after it; one sequence.
///
/// # Errors
/// The backend's own.
pub fn speed<B: Backend>(model: &Decoder<B>, kv: KvFormat) -> backend::Result<(f64, f64)> {
    let length = PREFILL_TOKENS.min(model.config.max_positions.saturating_sub(DECODE_TOKENS)).max(1);
    let token = |i: usize| ((i * 7919 + 13) % model.config.vocab) as u32;
    let mut cache = model.new_cache(length + DECODE_TOKENS, 1, kv)?;
    let mut forward = |start: usize, len: usize| {
        let pages = (0..(start + len).div_ceil(PAGE) as u32).collect();
        let tokens = (start..start + len).map(token).collect();
        model.forward(&Batch { tokens, spans: vec![Span { start, len, pages, slot: 0 }] }, &mut cache, Wanted::Last)
    };
    // The first pass pays for fresh memory.
    forward(0, length)?;
    let start = Instant::now();
    forward(0, length)?;
    let prefill = length as f64 / start.elapsed().as_secs_f64();
    let decode = DECODE_TOKENS.min(model.config.max_positions - length);
    let start = Instant::now();
    for i in 0..decode {
        forward(length + i, 1)?;
    }
    Ok((prefill, decode as f64 / start.elapsed().as_secs_f64()))
}
