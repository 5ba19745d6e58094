//! Any bytes as a config.json: reading it ends with a model or an error, and a small model, made of random weights, computes.

use std::path::Path;
use std::sync::OnceLock;

use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch};
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::json::{self, Object};
use recoup::checkpoint::text_model;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, Wanted};
use recoup::quantize::random_model::RandomModel;

use super::mutate::{Random, mutate_json};

static BACKEND: OnceLock<CpuBackend> = OnceLock::new();

/// What is computed at most: weights, linears, and values that recurrent layers keep.
const WEIGHTS: usize = 1 << 19;
const LINEARS: usize = 200;
const STATES: usize = 1 << 20;

/// Reads it and computes its model; the error that it ends with.
pub fn run(data: &[u8]) -> Result<(), String> {
    let value = json::parse(data).map_err(|e| e.to_string())?;
    let file = Path::new("config.json");
    let config = Object::of(file, value).and_then(text_model::config).map_err(|e| e.to_string())?;
    let random = RandomModel::of_config(file, config.value().clone(), None, Dialect::ModelOpt);
    let model = random.map_err(|e| e.to_string())?;
    let modules = model.config().modules();
    let weights: usize = modules.iter().map(|m| m.role.n.saturating_mul(m.role.k)).sum();
    let vectors: usize = model.config().vectors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    if weights + vectors > WEIGHTS || modules.len() > LINEARS {
        return Err("large".into());
    }
    let backend = BACKEND.get_or_init(|| CpuBackend::new(Isa::detect(), 1).expect("a thread"));
    let decoder = Decoder::load(backend.clone(), &model).map_err(|e| e.to_string())?;
    if decoder.state_bytes() > 4 * STATES {
        return Err("large states".into());
    }
    let last = decoder.config.vocab as u32 - 1;
    let mut tokens = vec![0, 1.min(last), last];
    let run = |pieces: &[&[u32]]| {
        let mut cache = decoder.new_cache(4, 1, KvFormat::F32).expect("one page of cache");
        let mut batch = Batch::alone(Vec::new());
        let mut logits = None;
        for piece in pieces {
            batch.tokens = piece.to_vec();
            batch.spans[0].start += std::mem::replace(&mut batch.spans[0].len, piece.len());
            batch.spans[0].pages = vec![0];
            // What is computed may be no number: random weights under any constants.
            logits = Some(decoder.forward(&batch, &mut cache, Wanted::Last).ok()?);
        }
        backend.to_host(&logits?).ok()
    };
    tokens.push(0);
    let whole = run(&[&tokens[..]]);
    let pieces = run(&[&tokens[..1], &tokens[1..3], &tokens[3..]]);
    if let (Some(whole), Some(pieces)) = (whole, pieces) {
        assert_eq!(whole.len(), decoder.config.vocab);
        assert!(whole.iter().zip(&pieces).all(|(a, b)| a.to_bits() == b.to_bits()), "pieces compute something else");
    }
    Ok(())
}

/// The input with some values changed; one time in eight nothing, which leaves it to others.
pub fn mutated(data: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random::new(seed);
    if random.below(8) == 0 {
        return None;
    }
    let mut text = data.to_vec();
    for _ in 0..=random.below(3) {
        mutate_json(&mut text, &mut random);
    }
    Some(text)
}
