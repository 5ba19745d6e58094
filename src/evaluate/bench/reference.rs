//! The same measurements of candle-transformers on the CPU: what plain tensors give, with nothing of ours.

use std::collections::HashMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Case, Timing, token};
use crate::checkpoint::{Checkpoint, CheckpointError};

/// Architectures that it runs.
const KNOWN: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// What is wrong with a model for this engine.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    #[error("the reference engine runs {known}; `model_type` is `{found}`", known = KNOWN.join(", "))]
    Architecture { found: String },
    #[error(
        "{0}: the reference engine runs plain models; this one is quantized (`recoup convert` makes a plain one of it)"
    )]
    Quantized(String),
    #[error("config.json: {0}")]
    Config(#[from] serde_json::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("candle-transformers: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A model in candle-transformers, weights and arithmetic in f32: on CPUs candle multiplies no BF16.
pub struct Reference {
    model: Model,
    vocab: usize,
    /// Positions that the model has.
    pub positions: usize,
}

enum Model {
    Llama(Box<llama::Llama>, Box<llama::Config>, llama::Cache),
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
}

impl Reference {
    /// Loads a plain checkpoint.
    ///
    /// # Errors
    /// Another architecture, a quantized checkpoint, or faulty files.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, ReferenceError> {
        let config = config(checkpoint.config.value());
        let kind = config["model_type"].as_str().unwrap_or_default().to_owned();
        if !KNOWN.contains(&kind.as_str()) {
            return Err(ReferenceError::Architecture { found: kind });
        }
        let mut tensors = HashMap::new();
        for name in checkpoint.tensors.names() {
            let Some(view) = checkpoint.tensors.peek(name) else { continue };
            if !view.is_float() || name.ends_with("_scale") {
                return Err(ReferenceError::Quantized(name.to_owned()));
            }
            tensors.insert(name.to_owned(), Tensor::from_vec(view.floats()?, view.shape, &Device::Cpu)?);
        }
        let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let whole = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
        let (vocab, positions) = (whole("vocab_size"), whole("max_position_embeddings"));
        let model = match kind.as_str() {
            "llama" => {
                let config = read::<llama::LlamaConfig>(config)?.into_config(false);
                let cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
                Model::Llama(Box::new(llama::Llama::load(weights, &config)?), Box::new(config), cache)
            }
            "mistral" => Model::Mistral(mistral::Model::new(&read(config)?, weights)?),
            "qwen2" => Model::Qwen2(qwen2::ModelForCausalLM::new(&read(config)?, weights)?),
            _ => Model::Qwen3(qwen3::ModelForCausalLM::new(&read(config)?, weights)?),
        };
        Ok(Self { model, vocab, positions })
    }

    /// Forgets all sequences.
    fn clear(&mut self) -> Result<(), ReferenceError> {
        match &mut self.model {
            Model::Llama(_, config, cache) => *cache = llama::Cache::new(true, DType::F32, config, &Device::Cpu)?,
            Model::Mistral(model) => model.clear_kv_cache(),
            Model::Qwen2(model) => model.clear_kv_cache(),
            Model::Qwen3(model) => model.clear_kv_cache(),
        }
        Ok(())
    }

    /// The likeliest token of each sequence after `rows` [batch][tokens], which follow `position` others.
    fn next(&mut self, rows: &[Vec<u32>], position: usize) -> Result<Vec<u32>, ReferenceError> {
        let ids = Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu)?;
        let logits = match &mut self.model {
            Model::Llama(model, _, cache) => model.forward(&ids, position, cache)?,
            Model::Mistral(model) => model.forward(&ids, position)?,
            Model::Qwen2(model) => model.forward(&ids, position)?,
            Model::Qwen3(model) => model.forward(&ids, position)?,
        };
        Ok(logits.reshape((rows.len(), self.vocab))?.argmax(1)?.to_vec1()?)
    }

    /// Measures one case; `repeats` prompts. The prompts of a batch are computed together, which is not timed.
    ///
    /// # Errors
    /// What candle-transformers says.
    pub fn measure(&mut self, case: Case, repeats: usize) -> Result<Timing, ReferenceError> {
        let prompt = |sequence: usize| (0..case.prompt).map(|i| token(sequence, i, self.vocab)).collect::<Vec<u32>>();
        let prompts: Vec<Vec<u32>> = (0..case.batch).map(prompt).collect();
        let mut first_token = f64::INFINITY;
        for round in 0..=repeats {
            self.clear()?;
            let start = Instant::now();
            self.next(&prompts[..1], 0)?;
            if round > 0 {
                first_token = first_token.min(start.elapsed().as_secs_f64());
            }
        }
        self.clear()?;
        let mut next = self.next(&prompts, 0)?;
        let mut steps = Vec::with_capacity(case.generate);
        for at in 0..case.generate {
            let start = Instant::now();
            let rows: Vec<Vec<u32>> = next.iter().map(|&token| vec![token]).collect();
            next = self.next(&rows, case.prompt + at)?;
            steps.push(start.elapsed().as_secs_f64());
        }
        Ok(Timing::of(case, first_token, steps))
    }
}

fn read<T: DeserializeOwned>(config: Value) -> Result<T, ReferenceError> {
    Ok(serde_json::from_value(config)?)
}

/// config.json in the keys that candle-transformers reads, those of transformers 4.
fn config(stored: &Value) -> Value {
    let mut c = stored.clone();
    let rope = c["rope_parameters"].take();
    if !rope.is_null() {
        c["rope_theta"] = rope["rope_theta"].clone();
        if rope["rope_type"] != "default" {
            c["rope_scaling"] = rope;
        }
    }
    c["use_flash_attn"] = false.into();
    match c["model_type"].as_str() {
        // It sees the key exactly `sliding_window` back too; transformers does not.
        Some("mistral") => c["sliding_window"] = c["sliding_window"].as_u64().map(|w| w - 1).into(),
        // It has a window always; one past the context hides nothing.
        Some("qwen2") => c["sliding_window"] = c["max_position_embeddings"].clone(),
        _ => {}
    }
    for (key, default) in [("attention_bias", false), ("use_sliding_window", false), ("tie_word_embeddings", false)] {
        if c[key].is_null() {
            c[key] = default.into();
        }
    }
    for (key, default) in [("max_window_layers", "num_hidden_layers"), ("num_key_value_heads", "num_attention_heads")] {
        if c[key].is_null() {
            c[key] = c[default].clone();
        }
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::backend::cpu::isa::Isa;
    use crate::backend::{Backend, Batch, Span};
    use crate::formats::kv::KvFormat;
    use crate::model::{Decoder, Wanted};

    fn shipped(name: &str) -> Checkpoint {
        Checkpoint::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)).unwrap()
    }

    /// Ours, one sequence at a time, everything from its start.
    fn ours(model: &Decoder<CpuBackend>, tokens: &[u32]) -> u32 {
        let mut cache = model.new_cache(64, 1, KvFormat::F32).unwrap();
        let spans = vec![Span { start: 0, len: tokens.len(), pages: vec![0, 1, 2, 3], slot: 0 }];
        let logits = model.forward(&Batch { tokens: tokens.to_vec(), spans }, &mut cache, Wanted::Last).unwrap();
        let logits = model.backend().to_host(&logits).unwrap();
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
    }

    #[test]
    fn what_is_timed_is_the_model() {
        let checkpoint = shipped("books-bf16");
        let model = Decoder::load(CpuBackend::new(Isa::detect(), 1).unwrap(), &checkpoint).unwrap();
        let mut reference = Reference::load(&checkpoint).unwrap();
        let mut rows: Vec<Vec<u32>> = (0..2).map(|s| (0..20).map(|i| token(s, i, reference.vocab)).collect()).collect();
        let mut given = rows.clone();
        let mut position = 0;
        for _ in 0..6 {
            let next = reference.next(&given, position).unwrap();
            assert_eq!(next, rows.iter().map(|row| ours(&model, row)).collect::<Vec<_>>());
            position = rows[0].len();
            rows.iter_mut().zip(&next).for_each(|(row, token)| row.push(*token));
            given = next.into_iter().map(|token| vec![token]).collect();
        }
        reference.clear().unwrap();
        assert_eq!(
            reference.next(&rows[1..], 0).unwrap(),
            [ours(&model, &rows[1])],
            "nothing is left of what was before"
        );
        let case = Case { batch: 2, prompt: 5, generate: 3 };
        let timing = reference.measure(case, 1).unwrap();
        assert!(timing.case == case && timing.first_token > 0.0 && timing.step > 0.0 && timing.step <= timing.step_p99);
    }

    #[test]
    fn a_quantized_model_is_refused_by_the_name_of_a_tensor() {
        let error = Reference::load(&shipped("books-nvfp4")).err().unwrap().to_string();
        assert!(error.contains("model.layers.") && error.contains("recoup convert"), "{error}");
    }
}
