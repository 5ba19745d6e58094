//! Training of hybrids and mixtures: gradients of what they are made of against finite differences and PyTorch's, the
//! training backend against references, and a small hybrid from its first step to its recovered NVFP4 form.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{Tensor, Var};
use recoup::backend::autograd::{AutogradBackend, Linear, loss};
use recoup::backend::{
    Activation, AttentionShape, Backend, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Ffn,
    HostPass, LayerCache, Mamba2Shape, Mamba2Weights, QueryGrowth, Rotation, Run, Span,
};
use recoup::checkpoint::Checkpoint;
use recoup::checkpoint::dialect::Dialect;
use recoup::corpus::Row;
use recoup::formats::kv::KvFormat;
use recoup::formats::linear::OutputScale;
use recoup::logits::{RouterRule, RouterScores};
use recoup::model::{Decoder, ModelConfig};
use recoup::quantize::{CalibrationText, Places, Recipe, apply};
use recoup::recover::data::Data;
use recoup::recover::parameter::Learned;
use recoup::recover::student::Student;
use recoup::recover::{block, distill, pretrain};
use serde_json::json;

use crate::recover::{check_gradients, float_linear, host, tensor};
use crate::support::fixtures::{Report, architecture_fixtures, bits, cpu, deviation, incremental_logits, logits};
use crate::support::project;
use crate::support::random::Random;

/// What PyTorch gives, in f64: `tests/data/recover/make_mixers.py`.
struct Golden {
    case: &'static str,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Golden {
    fn read(case: &'static str) -> Self {
        let bytes = std::fs::read(project().join("tests/data/recover/mixers.safetensors")).unwrap();
        let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let one = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
            let values = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            Some((name.strip_prefix(&format!("{case}/"))?.to_owned(), (t.shape().to_vec(), values)))
        };
        Self { case, tensors: all.tensors().into_iter().filter_map(one).collect() }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}/{name}", self.case)).1.clone()
    }

    /// A matrix of it whose gradient is wanted.
    fn var(&self, name: &str) -> Var {
        let columns = *self.tensors[name].0.last().unwrap();
        Var::from_tensor(&tensor(&self.values(name), columns)).unwrap()
    }

    fn check(&self, what: &str, got: &[f32]) {
        let apart = deviation(got, &self.values(what));
        assert!(apart < 2e-5, "{}, {what}: {apart:.1e}", self.case);
    }

    /// Holds `out` and the gradients of `inputs` to PyTorch's.
    fn check_all(&self, out: &Tensor, inputs: &[(&str, &Var)]) {
        self.check("output", &host(out));
        let store = loss::given(out, 0.0, self.values("weights")).unwrap().backward().unwrap();
        for (name, var) in inputs {
            self.check(&format!("{name}.grad"), &host(store.get(var.as_tensor()).unwrap()));
        }
    }
}

/// Sequences that begin in this pass, without pages.
fn batch(lengths: &[usize]) -> Batch {
    let span = |len: &usize| Span { start: 0, len: *len, pages: Vec::new(), slot: 0 };
    Batch { tokens: vec![0; lengths.iter().sum()], spans: lengths.iter().map(span).collect() }
}

fn pass(backend: &AutogradBackend, lengths: &[usize]) -> HostPass {
    backend.prepare(&batch(lengths), &[]).unwrap()
}

const MAMBA: Mamba2Shape = Mamba2Shape {
    heads: 4,
    head_dim: 3,
    groups: 2,
    state: 5,
    kernel: 4,
    eps: 1e-5,
    time_step_limit: (0.0, f32::INFINITY),
};

#[test]
fn mamba2_and_its_gradients_are_those_of_pytorch() {
    let clamped =
        Mamba2Shape { heads: 2, head_dim: 4, groups: 1, state: 18, kernel: 2, eps: 1e-5, time_step_limit: (0.3, 1.2) };
    for (case, shape, lengths) in [("mamba2", MAMBA, &[67, 1, 5][..]), ("mamba2_clamped", clamped, &[9])] {
        let golden = Golden::read(case);
        let of = |name: &str| golden.values(name);
        let weights = Mamba2Weights {
            conv1d: of("conv1d"),
            conv1d_bias: Some(of("conv1d_bias")),
            a_log: of("a_log"),
            d: of("d"),
            dt_bias: of("dt_bias"),
            norm: of("norm"),
        };
        let backend = AutogradBackend::new();
        let mixer = backend.load_mamba(shape, weights).unwrap();
        mixer.vectors().for_each(|(_, v)| v.train());
        let x = golden.var("x");
        let mut cache = backend.new_cache(&CacheLayout::default()).unwrap();
        let out = backend.mamba(x.as_tensor().clone(), &mixer, 0, &pass(&backend, lengths), &mut cache).unwrap();
        golden.check_all(&out, &[("x", &x)]);
        let names = ["conv1d", "conv1d_bias", "a_log", "d", "dt_bias", "norm"];
        assert_eq!(mixer.vectors().count(), names.len());
        for ((_, v), name) in mixer.vectors().zip(names) {
            golden.check(&format!("{name}.grad"), v.gradient().as_ref().unwrap());
        }
    }
}

#[test]
fn gated_delta_nets_and_their_gradients_are_those_of_pytorch() {
    let golden = Golden::read("delta_net");
    let of = |name: &str| golden.values(name);
    let weights =
        DeltaNetWeights { conv1d: of("conv1d"), a_log: of("a_log"), dt_bias: of("dt_bias"), norm: of("norm") };
    let shape = DeltaNetShape { key_heads: 2, value_heads: 4, key_dim: 5, value_dim: 3, kernel: 4, eps: 1e-6 };
    let backend = AutogradBackend::new();
    let mixer = backend.load_delta_net(shape, weights).unwrap();
    mixer.vectors().for_each(|(_, v)| v.train());
    let vars = ["qkv", "z", "a", "b"].map(|name| golden.var(name));
    let [qkv, z, a, b] = vars.each_ref().map(|v| v.as_tensor().clone());
    let mut cache = backend.new_cache(&CacheLayout::default()).unwrap();
    let pass = pass(&backend, &[66, 1, 4]);
    let out = backend.delta_net(DeltaInputs { qkv, z, a, b }, &mixer, 0, &pass, &mut cache).unwrap();
    golden.check_all(&out, &[("qkv", &vars[0]), ("z", &vars[1]), ("a", &vars[2]), ("b", &vars[3])]);
    for ((_, v), name) in mixer.vectors().zip(["conv1d", "a_log", "dt_bias", "norm"]) {
        golden.check(&format!("{name}.grad"), v.gradient().as_ref().unwrap());
    }
}

#[test]
fn attention_with_sinks_and_its_gradients_are_those_of_pytorch() {
    let golden = Golden::read("sinks");
    let backend = AutogradBackend::new();
    let sinks = backend.load_vector(golden.values("sinks")).unwrap();
    let shape = AttentionShape {
        layer: 0,
        cache: 0,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        window: Some(5),
        rope: None,
        scale: 0.4,
        growth: None,
    };
    let layer = LayerCache { format: KvFormat::F32, kv_heads: 2, head_dim: 6, value_dim: 6 };
    let mut cache = backend.new_cache(&CacheLayout { layers: vec![layer], ..CacheLayout::default() }).unwrap();
    let vars = ["q", "k", "v"].map(|name| golden.var(name));
    let [q, k, v] = vars.each_ref().map(|v| v.as_tensor().clone());
    sinks.train();
    let out = backend.attention(q, k, v, Some(&sinks), &shape, &pass(&backend, &[13]), &mut cache).unwrap();
    golden.check_all(&out, &[("q", &vars[0]), ("k", &vars[1]), ("v", &vars[2])]);
    golden.check("sinks.grad", sinks.gradient().as_ref().unwrap());
    let short = backend.load_vector(vec![0.0; 3]).unwrap();
    let [q, k, v] = vars.each_ref().map(|v| v.as_tensor().clone());
    let error = backend.attention(q, k, v, Some(&short), &shape, &pass(&backend, &[13]), &mut cache).unwrap_err();
    assert!(error.to_string().contains("3 sinks of 4 heads"), "{error}");
}

/// Linears of `weight` [experts, n, k].
fn experts(backend: &AutogradBackend, weight: &[f32], [n, k]: [usize; 2]) -> Vec<Linear> {
    let load = |w: &[f32]| backend.load_linear(float_linear(w, n, OutputScale::One, false, None)).unwrap();
    weight.chunks_exact(n * k).map(load).collect()
}

#[test]
fn a_mixture_and_its_gradients_the_routers_among_them_are_those_of_pytorch() {
    for case in ["mixture_softmax", "mixture_softmax_of_chosen", "mixture_sigmoid"] {
        let golden = Golden::read(case);
        let backend = AutogradBackend::new();
        let (scores, renormalize, scale) = match case {
            "mixture_softmax" => (RouterScores::Softmax, Some(0.0), 1.0),
            "mixture_softmax_of_chosen" => (RouterScores::SoftmaxOfChosen, None, 1.0),
            _ => {
                let bias = Some(golden.values("bias").into());
                (RouterScores::Sigmoid { bias, groups: 1, top_groups: 1 }, Some(1e-20), 2.5)
            }
        };
        let rule = RouterRule { top_k: 3, scores, renormalize, scale };
        let router = experts(&backend, &golden.values("router"), [5, 6]).remove(0);
        let (up, down) =
            (experts(&backend, &golden.values("up"), [5, 6]), experts(&backend, &golden.values("down"), [6, 5]));
        let all = || up.iter().chain(&down).chain([&router]);
        all().for_each(Linear::train);
        let one = |(up, down)| Ffn { gate: None, up, down, activation: Activation::Relu2 };
        let ffns: Vec<Ffn<'_, Linear>> = up.iter().zip(&down).map(one).collect();
        let x = golden.var("x");
        let out = backend.mixture(x.as_tensor(), x.as_tensor(), &router, &ffns, &rule).unwrap();
        golden.check_all(&out, &[("x", &x)]);
        let gradient =
            |all: &[Linear]| -> Vec<f32> { all.iter().flat_map(|l| l.gradient().clone().unwrap()).collect() };
        golden.check("router.grad", &gradient(std::slice::from_ref(&router)));
        golden.check("up.grad", &gradient(&up));
        golden.check("down.grad", &gradient(&down));
    }
}

#[test]
fn the_clamped_swiglu_and_its_gradients_are_those_of_pytorch() {
    let golden = Golden::read("clamped_swiglu");
    let vars = ["gate", "up"].map(|name| golden.var(name));
    let activation = Activation::ClampedSwiglu { limit: 7.0 };
    let [gate, up] = vars.each_ref().map(Var::as_tensor);
    let out = AutogradBackend::new().activate(gate.clone(), Some(up), activation).unwrap();
    golden.check_all(&out, &[("gate", &vars[0]), ("up", &vars[1])]);
}

#[test]
fn gradients_of_activations_gates_and_picked_columns_are_those_of_finite_differences() {
    let mut random = Random(21);
    let backend = AutogradBackend::new();
    let mut values = |count: usize| random.values(count);
    check_gradients("relu2", &[(values(40), 8)], |x| backend.activate(x[0].clone(), None, Activation::Relu2).unwrap());
    for activation in [Activation::GeluTanh, Activation::Silu, Activation::ClampedSwiglu { limit: 0.8 }] {
        // No value is so near to the limit that a step crosses it.
        let mut off = |count: usize| values(count).iter().map(|v| (4.0 * v).round() / 4.0 + 0.1).collect::<Vec<f32>>();
        check_gradients(&format!("{activation:?}"), &[(off(40), 8), (off(40), 8)], |x| {
            backend.activate(x[0].clone(), Some(&x[1]), activation).unwrap()
        });
    }
    for columns in [8, 1] {
        check_gradients("gate", &[(values(40), 8), (values(5 * columns), columns)], |x| {
            backend.gate(x[0].clone(), &x[1]).unwrap()
        });
    }
    check_gradients("scale", &[(values(40), 8)], |x| backend.scale(x[0].clone(), 2.5).unwrap());
    check_gradients("a run", &[(values(40), 8)], |x| backend.rearrange(&[&x[0]], &[Run::of(0, 2, 5)]).unwrap());
    let runs = [Run::of(1, 3, 2), Run::of(0, 1, 4), Run::of(1, 0, 1), Run::of(1, 4, 1)];
    check_gradients("runs", &[(values(40), 8), (values(25), 5)], |x| {
        backend.rearrange(&[&x[0], &x[1]], &runs).unwrap()
    });
    let picked = backend
        .rearrange(&[&tensor(&[0.0, 1.0, 2.0], 3), &tensor(&[3.0, 4.0], 2)], &[Run::of(1, 1, 1), Run::of(0, 1, 2)]);
    assert_eq!(host(&picked.unwrap()), [4.0, 1.0, 2.0]);
}

#[test]
fn gradients_of_recurrent_layers_and_mixtures_are_those_of_finite_differences() {
    let mut random = Random(22);
    let mut values = |count: usize| random.values(count);
    let backend = AutogradBackend::new();
    let weights = Mamba2Weights {
        conv1d: values(MAMBA.channels() * MAMBA.kernel),
        conv1d_bias: None,
        a_log: values(4),
        d: values(4),
        dt_bias: values(4),
        norm: values(MAMBA.inner()),
    };
    let mixer = backend.load_mamba(MAMBA, weights).unwrap();
    let own = pass(&backend, &[6, 3]);
    let width = MAMBA.projected();
    check_gradients("mamba2", &[(values(9 * width), width)], |x| {
        let mut cache = backend.new_cache(&CacheLayout::default()).unwrap();
        backend.mamba(x[0].clone(), &mixer, 0, &own, &mut cache).unwrap()
    });
    let shape = DeltaNetShape { key_heads: 1, value_heads: 2, key_dim: 17, value_dim: 3, kernel: 3, eps: 1e-6 };
    let channels = 2 * 17 + 6;
    let weights =
        DeltaNetWeights { conv1d: values(channels * 3), a_log: values(2), dt_bias: values(2), norm: values(3) };
    let mixer = backend.load_delta_net(shape, weights).unwrap();
    let inputs = [(values(9 * channels), channels), (values(54), 6), (values(18), 2), (values(18), 2)];
    check_gradients("gated delta net", &inputs, |x| {
        let mut cache = backend.new_cache(&CacheLayout::default()).unwrap();
        let [qkv, z, b, a] = [0, 1, 2, 3].map(|i| x[i].clone());
        backend.delta_net(DeltaInputs { qkv, z, b, a }, &mixer, 0, &own, &mut cache).unwrap()
    });
    let router = experts(&backend, &values(4 * 6), [4, 6]).remove(0);
    let (up, down) = (experts(&backend, &values(4 * 5 * 6), [5, 6]), experts(&backend, &values(4 * 6 * 5), [6, 5]));
    let one = |(up, down)| Ffn { gate: None, up, down, activation: Activation::Relu2 };
    let ffns: Vec<Ffn<'_, Linear>> = up.iter().zip(&down).map(one).collect();
    let sigmoid = RouterScores::Sigmoid { bias: None, groups: 2, top_groups: 1 };
    for scores in [RouterScores::Softmax, RouterScores::SoftmaxOfChosen, sigmoid] {
        let rule = RouterRule { top_k: 2, scores, renormalize: None, scale: 1.5 };
        check_gradients(&format!("{rule:?}"), &[(values(42), 6), (values(42), 6)], |x| {
            backend.mixture(&x[0], &x[1], &router, &ffns, &rule).unwrap()
        });
    }
}

#[test]
fn gradients_of_attention_turned_in_part_that_grows_are_those_of_finite_differences() {
    let backend = AutogradBackend::new();
    let growth = Some(QueryGrowth { beta: 0.3, original: 4.0 });
    let shape = AttentionShape {
        layer: 0,
        cache: 0,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        window: None,
        rope: Some(0),
        scale: 0.4,
        growth,
    };
    let rope = backend.load_rope(Rotation { frequencies: vec![1.0, 0.2], factor: 1.2 }).unwrap();
    let pass = backend.prepare(&batch(&[11, 2]), &[&rope]).unwrap();
    let layer = LayerCache { format: KvFormat::F32, kv_heads: 2, head_dim: 6, value_dim: 4 };
    let sinks = backend.load_vector(vec![0.5, -1.0, 2.0, 0.0]).unwrap();
    let mut random = Random(23);
    let inputs = [24, 12, 8].map(|width| (random.values(13 * width), width));
    check_gradients("attention", &inputs, |x| {
        let mut cache = backend.new_cache(&CacheLayout { layers: vec![layer], ..CacheLayout::default() }).unwrap();
        let (q, k, v) = (x[0].clone(), x[1].clone(), x[2].clone());
        backend.attention(q, k, v, Some(&sinks), &shape, &pass, &mut cache).unwrap()
    });
}

#[test]
fn a_sequence_that_goes_on_is_refused_where_states_would_be_needed() {
    let backend = AutogradBackend::new();
    let none = |count: usize| vec![0.0; count];
    let weights = Mamba2Weights {
        conv1d: none(MAMBA.channels() * 4),
        conv1d_bias: None,
        a_log: none(4),
        d: none(4),
        dt_bias: none(4),
        norm: none(12),
    };
    let mixer = backend.load_mamba(MAMBA, weights).unwrap();
    let mut later = batch(&[2]);
    later.spans[0].start = 3;
    let pass = backend.prepare(&later, &[]).unwrap();
    let mut cache = backend.new_cache(&CacheLayout::default()).unwrap();
    let x = tensor(&none(2 * MAMBA.projected()), MAMBA.projected());
    let error = backend.mamba(x, &mixer, 0, &pass, &mut cache).unwrap_err().to_string();
    assert!(error.contains("goes on at token 3"), "{error}");
}

/// As whole passes, up to the order of sums.
#[test]
fn the_training_backend_decodes_hybrids_through_their_states() {
    let mut report = Report::default();
    for fixture in architecture_fixtures().into_iter().filter(|f| f.name.ends_with("bf16")) {
        let (model, ids) = (fixture.load(AutogradBackend::new()), fixture.input_ids());
        let parts = incremental_logits(&model, &ids, 5);
        report.check(&fixture.name, deviation(&parts, &logits(&model, &ids)), 1e-5);
    }
    report.finish();
}

/// What training refuses: fp_quant's rotated inputs.
fn trains(checkpoint: &Checkpoint) -> bool {
    match Decoder::load(AutogradBackend::new(), checkpoint) {
        Ok(_) => true,
        Err(e) => {
            assert!(e.to_string().contains("fp_quant"), "{e}");
            false
        }
    }
}

#[test]
fn the_training_backend_gives_the_logits_of_every_architecture() {
    let mut report = Report::default();
    for fixture in architecture_fixtures() {
        if trains(&fixture.checkpoint()) {
            let got = logits(&fixture.load(AutogradBackend::new()), &fixture.input_ids());
            report.check(&fixture.name, deviation(&got, &fixture.golden_logits()), fixture.bound());
        }
    }
    report.finish();
}

/// Through the whole of every architecture: the gradient of what its embedding looks up, and of a tied head.
#[test]
fn the_embeddings_gradient_of_every_architecture_is_that_of_finite_differences() {
    let mut report = Report::default();
    for fixture in architecture_fixtures().into_iter().filter(|f| f.name.ends_with("bf16")) {
        let student = Student::load_plain(&fixture.checkpoint(), AutogradBackend::new()).unwrap();
        let decoder = &student.decoder;
        let (vocab, width) = (decoder.config.vocab as u32, decoder.config.hidden);
        let rows = vec![Row::text((0..12).map(|t| (t * 29 + 5) % vocab).collect())];
        let embedding = decoder.embedding().clone();
        embedding.train();
        let options = distill::Options { kl: 0.0, cross_entropy: 1.0, ..distill::Options::default() };
        distill::gradients(decoder, None, &rows.iter().collect::<Vec<_>>(), 11.0, &options).unwrap();
        let gradient = embedding.gradient().clone().unwrap();
        let watched = distill::Watched::new("text".into(), rows, None).unwrap();
        let table: Vec<f32> = (0..vocab as usize).flat_map(|t| embedding.weight_row(t)).collect();
        // Along the gradient of one token, where the slope is its length.
        let mut apart = [1, 5, 9].map(|t| {
            let token = ((t * 29 + 5) % vocab as usize) * width;
            let own = &gradient[token..token + width];
            let length = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let size = table[token..token + width].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let slope = |step: f64| {
                let at = |sign: f64| {
                    let mut moved = table.clone();
                    let along = moved[token..token + width].iter_mut().zip(own);
                    along.for_each(|(v, g)| *v += (sign * step * f64::from(*g) / length) as f32);
                    embedding.set_values(moved);
                    watched.loss(decoder, None).unwrap()
                };
                (at(1.0) - at(-1.0)) / (2.0 * step)
            };
            // The largest bends most, and any may change which experts are chosen.
            let apart = [2e-3, 5e-4, 1e-4].map(|step| (slope(step * size) / length - 1.0).abs());
            println!("{}, token {t}: {apart:.6?}", fixture.name);
            apart.into_iter().fold(f64::INFINITY, f64::min)
        });
        apart.sort_by(f64::total_cmp);
        report.check(&fixture.name, apart[1], 5e-3);
    }
    report.finish();
}

/// Whatever is quantized of every architecture gets a gradient, and what was trained is what is written: fused experts,
/// norms by 1 + w and mixers' own numbers among them.
#[test]
fn what_was_trained_of_every_architecture_is_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut report = Report::default();
    for (i, fixture) in architecture_fixtures().into_iter().enumerate() {
        let checkpoint = fixture.checkpoint();
        if !trains(&checkpoint) {
            continue;
        }
        let quantized = Student::load(&checkpoint, None, AutogradBackend::new());
        let Ok(mut student) = quantized.or_else(|_| Student::load_plain(&checkpoint, AutogradBackend::new())) else {
            panic!("{}", fixture.name)
        };
        let vocab = student.decoder.config.vocab as u32;
        let tokens: Vec<u32> = (0..40).map(|t| (t * 29 + 5) % vocab).collect();
        let before = logits(&student.decoder, std::slice::from_ref(&tokens));
        let data = Data { rows: vec![Row::text(tokens.clone())], description: String::new() };
        let options = distill::Options {
            kl: 0.0,
            cross_entropy: 1.0,
            steps: 3,
            sequences: 1,
            learning_rate: 3e-3,
            warmup: 0,
            ..distill::Options::default()
        };
        student.train(|_| Learned::weight(true));
        let rows: Vec<&Row> = data.rows.iter().collect();
        distill::gradients(&student.decoder, None, &rows, 39.0, &options).unwrap();
        for p in &student.parameters {
            let some = p.gradient().as_ref().unwrap().iter().any(|g| *g != 0.0);
            // Routing may leave an expert without a token, and a tied table's rows are summed elsewhere.
            assert!(some || p.name.contains("experts"), "{}: {}", fixture.name, p.name);
        }
        student.train(|_| Learned::weight(true));
        let go_on = &mut |_: &distill::Point, _: &Student| Ok(ControlFlow::Continue(()));
        distill::train(&mut student, None, &data, &options, 0, go_on).unwrap();
        let out = folder.path().join(i.to_string());
        student.write(&checkpoint, &[], &out).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let trained = logits(&student.decoder, std::slice::from_ref(&tokens));
        assert!(deviation(&trained, &before) > 1e-3, "{}: training moved nothing", fixture.name);
        let again = Decoder::load(AutogradBackend::new(), &written).unwrap();
        let again = logits(&again, std::slice::from_ref(&tokens));
        // Masters of floats are rounded to BF16 only where they are written.
        let bound = if student.everything { 2e-2 } else { 0.0 };
        report.check(&format!("{}: written", fixture.name), deviation(&again, &trained), bound);
        let packed = logits(&Decoder::load(cpu(2), &written).unwrap(), std::slice::from_ref(&tokens));
        // A code that rounds the other way shows in random models.
        report.check(
            &format!("{}: packed", fixture.name),
            deviation(&packed, &again),
            200.0 * fixture.bound().min(1e-4),
        );
    }
    report.finish();
}

/// First weights of every architecture are a model that computes: what Mamba-2 and norms by 1 + w begin at included.
#[test]
fn first_weights_of_every_architecture_compute() {
    let folder = tempfile::tempdir().unwrap();
    for (i, fixture) in architecture_fixtures().into_iter().enumerate().filter(|(_, f)| f.name.ends_with("bf16")) {
        let config = fixture.checkpoint().config;
        let out = folder.path().join(i.to_string());
        let made = pretrain::initialize(&ModelConfig::read(&config).unwrap(), &fixture.folder, 1, &out);
        if fixture.name.contains("gpt_oss") {
            assert!(made.unwrap_err().to_string().contains("one tensor"));
            continue;
        }
        made.unwrap();
        let model = Decoder::load(AutogradBackend::new(), &Checkpoint::open(&out).unwrap()).unwrap();
        let got = logits(&model, &[(0..20).collect()]);
        assert!(got.iter().all(|v| v.is_finite()) && got.iter().any(|v| *v != got[0]), "{}", fixture.name);
    }
}

/// config.json of a small Nemotron-H: Mamba-2, mixture, attention, feed-forward.
fn write_shape(folder: &Path) {
    let shape = json!({
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "ME*-",
        "hidden_size": 64, "vocab_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "mlp_hidden_act": "relu2", "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
        "ssm_state_size": 16, "conv_kernel": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
        "routed_scaling_factor": 2.5, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 64,
        "tie_word_embeddings": false,
    });
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), shape.to_string()).unwrap();
}

/// Arithmetic progressions: what comes next can be told from the third token on.
fn progressions(count: u32, seed: u32) -> Vec<Row> {
    let row = |i: u32| {
        let (start, step) = ((i * 31 + seed * 17) % 48, 1 + (i * 7 + seed) % 11);
        Row::text((0..24).map(|t| (start + t * step) % 48).collect())
    };
    (0..count).map(row).collect()
}

#[test]
fn a_small_hybrid_is_trained_quantized_and_recovered() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_shape(&at("shape"));
    let shape = recoup::checkpoint::json::Object::read(&at("shape/config.json")).unwrap();
    pretrain::initialize(&ModelConfig::read(&shape).unwrap(), &at("shape"), 3, &at("initial")).unwrap();
    let data = Data { rows: progressions(384, 0), description: String::new() };
    let unseen = || progressions(16, 5);

    let initial = Checkpoint::open(&at("initial")).unwrap();
    let mut model = Student::load_plain(&initial, AutogradBackend::new()).unwrap();
    model.train(|_| Learned::weight(true));
    let options = distill::Options {
        kl: 0.0,
        cross_entropy: 1.0,
        steps: 160,
        sequences: 8,
        learning_rate: 1e-2,
        ..distill::Options::default()
    };
    let mut curve = Vec::new();
    let mut keep = |point: &distill::Point, _: &Student| {
        curve.push(point.cross_entropy);
        Ok(ControlFlow::Continue(()))
    };
    distill::train(&mut model, None, &data, &options, 0, &mut keep).unwrap();
    println!("cross-entropy {:.3} to {:.3}", curve[0], curve[curve.len() - 1]);
    assert!((curve[0] - 48f64.ln()).abs() < 0.3, "it begins knowing nothing: {}", curve[0]);
    assert!(curve[curve.len() - 1] < 0.5 * curve[0], "{curve:?}");
    model.write(&initial, &[], &at("bf16")).unwrap();
    drop(model);

    let plain = Checkpoint::open(&at("bf16")).unwrap();
    let text = CalibrationText {
        sequences: progressions(16, 2).iter().map(|r| r.0[0].tokens.clone()).collect(),
        description: "progressions".into(),
    };
    let quantized = at("nvfp4");
    let places = Places { out: &quantized, unrounded: None, measured: None };
    let recipe = Recipe::find("nvfp4").unwrap();
    apply(&plain, &cpu(2), &text, &recipe, Dialect::ModelOpt, places, &mut |_, _, _| ()).unwrap();

    let teacher = Decoder::load(AutogradBackend::new(), &plain).unwrap();
    let checkpoint = Checkpoint::open(&quantized).unwrap();
    let mut student = Student::load(&checkpoint, Some(&plain), AutogradBackend::new()).unwrap();
    let watched = [data.rows[..64].to_vec(), unseen()]
        .map(|rows| distill::Watched::new("progressions".into(), rows, Some(&teacher)).unwrap());
    // On what is trained on, and on others.
    let kl = |s: &Student| watched.each_ref().map(|w| w.loss(&s.decoder, Some(&teacher)).unwrap());
    let rounded = kl(&student);
    let options =
        block::Options { steps: 40, sequences: 8, learning_rate: 1e-3, norms: true, ..block::Options::default() };
    let mut reports = Vec::new();
    let mut report = |r: &block::BlockReport, _: &Student| {
        reports.push(*r);
        Ok(())
    };
    block::train(&mut student, &teacher, &data, &options, 0, folder.path(), &mut report).unwrap();
    assert_eq!(reports.len(), 4);
    let by_block = kl(&student);
    // The other method from the same beginning.
    let mut student = Student::load(&checkpoint, Some(&plain), AutogradBackend::new()).unwrap();
    student.train(|p| Learned::weight(p.is_quantized() || p.is_norm()));
    let options = distill::Options {
        steps: 60,
        sequences: 8,
        learning_rate: 3e-4,
        norms: true,
        recompute: true,
        ..distill::Options::default()
    };
    let go_on = &mut |_: &distill::Point, _: &Student| Ok(ControlFlow::Continue(()));
    distill::train(&mut student, Some(&teacher), &data, &options, 0, go_on).unwrap();
    let recovered = kl(&student);
    println!("KL to the teacher: {rounded:.4?} rounded, {by_block:.4?} by block, {recovered:.4?} by QAD; {reports:?}");
    assert!(reports.iter().all(|r| r.after <= r.before), "{reports:?}");
    for kl in [by_block, recovered] {
        assert!(kl[0] < 0.9 * rounded[0] && kl[1] < 0.9 * rounded[1], "{rounded:?} {kl:?}");
    }

    student.write(&checkpoint, &[], &at("recovered")).unwrap();
    let written = Checkpoint::open(&at("recovered")).unwrap();
    let tokens: Vec<Vec<u32>> = unseen().iter().map(|r| r.0[0].tokens.clone()).collect();
    let trained = logits(&student.decoder, &tokens);
    let again = Student::load(&written, None, AutogradBackend::new()).unwrap();
    assert!(bits(&logits(&again.decoder, &tokens)) == bits(&trained));
    let packed = deviation(&logits(&Decoder::load(cpu(2), &written).unwrap(), &tokens), &trained);
    assert!(packed < 5e-3, "{packed:e}");
}
