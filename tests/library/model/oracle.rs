//! Three implementations agree: candle-transformers, the decoder on candle tensors, the decoder on packed weights.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::support::fixtures::{
    FLOAT_BOUND, Fixture, Report, bits, cpu, deviation, incremental_logits, logits, own_fixtures,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3, qwen3_moe};
use recoup::backend::autograd::AutogradBackend;
use recoup::backend::observe::{Observed, Observer, held};
use recoup::backend::{AttentionShape, Backend, Batch, CacheLayout, LayerCache, PAGE, Rotation, Span};
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::LinearTensors;
use recoup::logits::{Draw, History, Sampler, SamplingParams, Scratch};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Tokens that incremental decoding starts from.
const PREFILL: usize = 10;

/// config.json in the keys that candle-transformers reads (those of transformers 4).
fn config<T: DeserializeOwned>(fixture: &Fixture) -> T {
    let text = std::fs::read_to_string(fixture.folder.join("config.json")).unwrap();
    let mut c: Value = serde_json::from_str(&text).unwrap();
    let rope = c["rope_parameters"].take();
    c["rope_theta"] = rope["rope_theta"].clone();
    if rope["rope_type"] != "default" {
        c["rope_scaling"] = rope;
    }
    if c["num_experts"].is_null() {
        c["num_experts"] = c["num_local_experts"].clone();
    }
    c["use_flash_attn"] = false.into();
    match c["model_type"].as_str().unwrap() {
        // candle-transformers 0.11 also sees the key exactly `sliding_window` back; transformers does not.
        "mistral" => c["sliding_window"] = (c["sliding_window"].as_u64().unwrap() - 1).into(),
        // Its Qwen2 has a window always; one past the context hides nothing.
        "qwen2" => c["sliding_window"] = c["max_position_embeddings"].clone(),
        "qwen3_moe" => c["max_window_layers"] = c["num_hidden_layers"].clone(),
        _ => {}
    }
    serde_json::from_value(c).unwrap()
}

fn weights(fixture: &Fixture) -> VarBuilder<'static> {
    let tensors = candle_core::safetensors::load(fixture.folder.join("model.safetensors"), &Device::Cpu).unwrap();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

/// candle-transformers gives the logits of the last token only, so every prefix is run from the start.
fn every_prefix(ids: &[Vec<u32>], mut last: impl FnMut(&Tensor) -> candle_core::Result<Tensor>) -> Vec<f32> {
    let mut out = Vec::new();
    for sequence in ids {
        for end in 1..=sequence.len() {
            let prefix = Tensor::new(&sequence[..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            out.extend(last(&prefix).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
    }
    out
}

/// Holds both backends to `oracle`, and the oracle to transformers.
fn agree(fixture: &Fixture, oracle: &[f32]) {
    let ids = fixture.input_ids();
    let autograd = logits(&fixture.load(AutogradBackend::new()), &ids);
    let packed = logits(&fixture.load(cpu(2)), &ids);
    let mut report = Report::default();
    let name = &fixture.name;
    report.check(
        &format!("{name}: candle-transformers, transformers"),
        deviation(oracle, &fixture.golden_logits()),
        FLOAT_BOUND,
    );
    report.check(&format!("{name}: autograd, candle-transformers"), deviation(&autograd, oracle), FLOAT_BOUND);
    report.check(&format!("{name}: cpu, candle-transformers"), deviation(&packed, oracle), FLOAT_BOUND);
    report.check(&format!("{name}: cpu, autograd"), deviation(&packed, &autograd), FLOAT_BOUND);
    report.finish();
}

#[test]
fn llama_agrees_with_candle_transformers() {
    let fixture = Fixture::own("transformers/llama_rope_llama3");
    let config = config::<llama::LlamaConfig>(&fixture).into_config(false);
    let model = llama::Llama::load(weights(&fixture), &config).unwrap();
    let oracle = every_prefix(&fixture.input_ids(), |ids| {
        model.forward(ids, 0, &mut llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?)
    });
    agree(&fixture, &oracle);
}

#[test]
fn mistral_with_a_sliding_window_agrees_with_candle_transformers() {
    let fixture = Fixture::own("transformers/mistral_sliding8");
    let mut model = mistral::Model::new(&config(&fixture), weights(&fixture)).unwrap();
    let oracle = every_prefix(&fixture.input_ids(), |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    });
    agree(&fixture, &oracle);
}

#[test]
fn qwen2_agrees_with_candle_transformers() {
    let fixture = Fixture::own("transformers/qwen2_tied");
    let mut model = qwen2::ModelForCausalLM::new(&config(&fixture), weights(&fixture)).unwrap();
    let oracle = every_prefix(&fixture.input_ids(), |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    });
    agree(&fixture, &oracle);
}

#[test]
fn qwen3_agrees_with_candle_transformers() {
    let fixture = Fixture::own("transformers/qwen3_head_dim");
    let mut model = qwen3::ModelForCausalLM::new(&config(&fixture), weights(&fixture)).unwrap();
    let oracle = every_prefix(&fixture.input_ids(), |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    });
    agree(&fixture, &oracle);
}

#[test]
fn qwen3_moe_agrees_with_candle_transformers() {
    // candle-transformers knows decoder_sparse_step but not mlp_only_layers; here both name layer 0.
    let fixture = Fixture::own("transformers/qwen3_moe_sparse_step");
    let mut model = qwen3_moe::ModelForCausalLM::new(&config(&fixture), weights(&fixture)).unwrap();
    let oracle = every_prefix(&fixture.input_ids(), |ids| {
        model.clear_kv_cache();
        model.forward(ids, 0)
    });
    agree(&fixture, &oracle);
}

#[test]
fn the_autograd_backend_gives_the_logits_of_every_deployed_checkpoint() {
    let mut report = Report::default();
    for fixture in own_fixtures() {
        let got = logits(&fixture.load(AutogradBackend::new()), &fixture.input_ids());
        let mut apart = deviation(&got, &fixture.golden_logits());
        // Where an activation is a tie, candle's f32 sums may fall as the reference's f32 sums do: then all of it must.
        if fixture.f64_logits().is_some() {
            apart = apart.min(deviation(&got, &fixture.reference()["logits"].values));
        }
        report.check(&fixture.name, apart, fixture.bound());
    }
    report.finish();
}

/// The input of every linear in the order of the forward pass, all tokens of one sequence.
#[derive(Default)]
struct Inputs {
    order: Vec<String>,
    values: HashMap<String, Vec<f32>>,
}

impl Observer for Inputs {
    fn input(&mut self, module: &str, x: &[f32]) {
        if !self.values.contains_key(module) {
            self.order.push(module.into());
        }
        self.values.entry(module.into()).or_default().extend(x);
    }
}

/// Sums in another order differ by less than this; measured: at most 5e-7.
const SAME: f64 = 2e-6;

/// candle's products depend on the number of tokens in their last bits, which can carry an activation over a rounding
/// boundary. So where logits differ, the first linear to see it must have had the same input, quantized differently:
/// what a wrong cache, mask or rotation does shows in the input itself.
#[test]
fn the_autograd_backend_decodes_through_its_cache_to_the_full_pass_up_to_rounding_ties() {
    let mut report = Report::default();
    let mut ties = Vec::new();
    for fixture in own_fixtures() {
        let seen = Arc::new(Mutex::new(Inputs::default()));
        let model = fixture.load(Observed::new(AutogradBackend::new(), seen.clone()));
        let take = || std::mem::take(&mut *held(&seen));
        let checkpoint = fixture.checkpoint();
        let modules = model.config.modules();
        for (i, sequence) in fixture.input_ids().iter().enumerate() {
            let sequence = std::slice::from_ref(sequence);
            let whole = logits(&model, sequence);
            let full = take();
            let apart = deviation(&incremental_logits(&model, sequence, PREFILL), &whole);
            let pieces = take();
            let name = format!("{}, sequence {i}", fixture.name);
            if apart <= 1e-5 {
                report.check(&name, apart, 1e-5);
                continue;
            }
            for module in &full.order {
                let role = modules.iter().find(|m| m.name == *module).unwrap().role;
                let linear = checkpoint.linear(module, role).unwrap();
                let (x, y) = (&full.values[module], &pieces.values[module]);
                report.check(&format!("{name}: input of {module}"), deviation(y, x), SAME);
                if deviation(&quantized(&linear, y), &quantized(&linear, x)) > SAME {
                    ties.push(format!("{name}: {module} (logits {apart:.1e})"));
                    break;
                }
            }
            assert!(ties.last().is_some_and(|t| t.starts_with(&name)), "{name}: {apart:.1e} apart, but no input is");
        }
    }
    println!("one activation rounds the other way: {ties:#?}");
    report.finish();
}

fn quantized(linear: &LinearTensors<'_>, x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    for row in x.chunks_exact_mut(linear.k) {
        if let Some(scale) = &linear.pre_quant_scale {
            row.iter_mut().zip(scale).for_each(|(x, s)| *x *= s);
        }
        linear.activation.fake_quantize(row);
    }
    x
}

#[test]
fn the_cpu_backend_decodes_through_its_cache_to_the_bits_of_the_full_pass() {
    for fixture in own_fixtures() {
        let (model, ids) = (fixture.load(cpu(2)), fixture.input_ids());
        let (whole, parts) = (logits(&model, &ids), incremental_logits(&model, &ids, PREFILL));
        assert!(bits(&whole) == bits(&parts), "{}", fixture.name);
    }
}

/// Values from -2 to 2 in no order.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 252.25 - 2.0).collect()
}

/// Two sequences through one attention layer, the second in two passes: what it gives, in the order of tokens.
fn attend<B: Backend>(backend: &B, shape: &AttentionShape, value_dim: usize) -> Vec<f32> {
    let rotation = |step: f32| Rotation { frequencies: (0..4).map(|i| step.powi(i)).collect(), factor: 1.25 };
    let ropes = [0.5, 0.1].map(|step| backend.load_rope(rotation(step)).unwrap());
    let &AttentionShape { kv_heads, head_dim, .. } = shape;
    let layer = LayerCache { format: KvFormat::F32, kv_heads, head_dim, value_dim };
    let mut cache =
        backend.new_cache(&CacheLayout { layers: vec![layer], pages: 1, ..CacheLayout::default() }).unwrap();
    backend.grow(&mut cache, 4, 0).unwrap();
    let span = |start, len, pages: &[u32]| Span { start, len, pages: pages.to_vec(), slot: 0 };
    let passes = [vec![span(0, 9, &[2]), span(0, 14, &[3])], vec![span(14, 7, &[3, 1])]];
    let mut out = Vec::new();
    for (seed, spans) in passes.into_iter().enumerate() {
        let tokens: usize = spans.iter().map(|s| s.len).sum();
        let pass = backend.prepare(&Batch { tokens: vec![0; tokens], spans }, &ropes.each_ref()).unwrap();
        let tensor = |width: usize, seed: usize| backend.tensor(values(tokens * width, seed), width).unwrap();
        let (q, k) = (tensor(shape.heads * head_dim, seed), tensor(kv_heads * head_dim, seed + 5));
        let v = tensor(kv_heads * value_dim, seed + 9);
        out.extend(backend.to_host(&backend.attention(q, k, v, None, shape, &pass, &mut cache).unwrap()).unwrap());
    }
    out
}

#[test]
fn both_backends_attend_alike_whichever_rotation_turns_them() {
    let cpu = cpu(2);
    let mut seen: Vec<Vec<u32>> = Vec::new();
    for (rope, head_dim, value_dim, scale) in [
        (None, 8, 8, 0.35),
        (Some(0), 8, 8, 0.35),
        (Some(1), 8, 8, 0.35),
        (Some(0), 12, 5, 0.35),
        (Some(0), 12, 5, 0.2),
    ] {
        for window in [None, Some(5)] {
            let shape = AttentionShape {
                layer: 0,
                cache: 0,
                heads: 4,
                kv_heads: 2,
                head_dim,
                window,
                rope,
                scale,
                growth: None,
            };
            let (packed, plain) = (attend(&cpu, &shape, value_dim), attend(&AutogradBackend::new(), &shape, value_dim));
            let off = deviation(&packed, &plain);
            assert!(off < 1e-6, "{shape:?}: {off:e}");
            assert!(!seen.contains(&bits(&packed)), "{shape:?}: as another shape");
            seen.push(bits(&packed));
        }
    }
    assert_eq!(seen[0].len(), (9 + 14 + 7) * 4 * 8);
    assert_eq!(PAGE, 16, "the second sequence goes over the end of a page");
}

/// The packed kernels' own, and what a backend has that has none.
#[test]
fn what_is_read_off_logits_is_the_same_on_both_backends() {
    let (rows, vocab) = (5, 97);
    let (a, b) = (values(rows * vocab, 1), values(rows * vocab, 2));
    let targets = [3, 0, 96, 41, 41];
    let sampler = |temperature, seed| {
        let params = SamplingParams { temperature, seed: Some(seed), logprobs: Some(2), ..SamplingParams::default() };
        Sampler::new(params).unwrap()
    };
    let samplers = [sampler(0.0, 0), sampler(1.0, 1), sampler(0.7, 2), sampler(1.5, 3), sampler(1.0, 4)];
    let draws: Vec<Draw> =
        samplers.iter().map(|s| Draw { sampler: s, history: History::default(), allowed: None }).collect();
    fn read<B: Backend>(
        backend: &B,
        (a, b): (&[f32], &[f32]),
        targets: &[u32],
        draws: &[Draw],
    ) -> (String, String, Vec<(u32, f64)>) {
        let vocab = a.len() / targets.len();
        let [a, b] = [a, b].map(|x| backend.tensor(x.to_vec(), vocab).unwrap());
        let picks: Vec<(usize, u32)> = targets.iter().copied().enumerate().collect();
        let scores = backend.score(&a, &picks).unwrap();
        (
            format!("{:?}", backend.sample(&a, draws, &mut Scratch::default()).unwrap()),
            // Of a vocabulary that is padded in both.
            format!(
                "{:?}",
                backend.compare(&a, &b, vocab - 1, &targets.iter().map(|t| t % 90).collect::<Vec<_>>()).unwrap()
            ),
            scores.iter().map(|s| (u32::from(s.is_greedy), s.log_prob)).collect(),
        )
    }
    let cpu = read(&cpu(2), (&a, &b), &targets, &draws);
    let plain = read(&AutogradBackend::new(), (&a, &b), &targets, &draws);
    assert_eq!((&cpu.0, &cpu.1), (&plain.0, &plain.1));
    assert!(cpu.0.matches("Ok(").count() == rows && cpu.1.matches("kl").count() == rows, "{cpu:?}");
    for (packed, plain) in cpu.2.iter().zip(&plain.2) {
        assert!(packed.0 == plain.0 && (packed.1 - plain.1).abs() < 1e-6, "{packed:?} {plain:?}");
    }
    let none = AutogradBackend::new().tensor(Vec::new(), vocab).unwrap();
    assert!(AutogradBackend::new().compare(&none, &none, vocab, &[]).unwrap().is_empty());
}
