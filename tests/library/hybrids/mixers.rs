//! Mixers, mixtures and activations of the training backend, and their gradients, against PyTorch's.

use std::collections::HashMap;

use candle_core::{Tensor, Var};
use recoup::backend::autograd::{AutogradBackend, Linear, loss};
use recoup::backend::{
    Activation, AttentionShape, Backend, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Ffn, LayerCache,
    Mamba2Shape, Mamba2Weights,
};
use recoup::formats::kv::KvFormat;
use recoup::logits::{RouterRule, RouterScores};

use super::{MAMBA, experts, pass};
use crate::recover::{host, tensor};
use crate::support::fixtures::deviation;
use crate::support::project;

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
