//! Any bytes as a config.json: reading it ends with a model or an error, and a small model, made of random weights, computes.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, Batch};
use recoup::checkpoint::dialect::Dialect;
use recoup::checkpoint::json::{self, Object};
use recoup::checkpoint::text_model;
use recoup::formats::kv::KvFormat;
use recoup::model::{Decoder, Wanted};
use recoup::quantize::random_model::RandomModel;
use recoup_fuzz::mutate::{Random, mutate_json};

static BACKEND: OnceLock<CpuBackend> = OnceLock::new();

/// What is computed at most: weights, linears, and values that recurrent layers keep.
const WEIGHTS: usize = 1 << 19;
const LINEARS: usize = 200;
const STATES: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = json::parse(data) else { return };
    let file = Path::new("config.json");
    let Ok(config) = Object::of(file, value).and_then(text_model::config) else { return };
    let Ok(model) = RandomModel::of_config(file, config.value().clone(), None, Dialect::ModelOpt) else { return };
    let modules = model.config().modules();
    let weights: usize = modules.iter().map(|m| m.role.n.saturating_mul(m.role.k)).sum();
    let vectors: usize = model.config().vectors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    if weights + vectors > WEIGHTS || modules.len() > LINEARS {
        return;
    }
    let backend = BACKEND.get_or_init(|| CpuBackend::new(Isa::detect(), 1).expect("a thread"));
    let Ok(decoder) = Decoder::load(backend.clone(), &model) else { return };
    if decoder.state_bytes() > 4 * STATES {
        return;
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
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = Random::new(seed);
    if random.below(8) == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut text = data[..size].to_vec();
    for _ in 0..=random.below(3) {
        mutate_json(&mut text, &mut random);
    }
    if text.len() > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[..text.len()].copy_from_slice(&text);
    text.len()
});
