//! Gradients of activations, mixers, mixtures and attention of the training backend against finite differences.

use recoup::backend::autograd::{AutogradBackend, Linear};
use recoup::backend::{
    Activation, AttentionShape, Backend, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights, Ffn, LayerCache,
    Mamba2Weights, QueryGrowth, Rotation, Run,
};
use recoup::formats::kv::KvFormat;
use recoup::logits::{RouterRule, RouterScores};

use super::{MAMBA, batch, experts, pass};
use crate::recover::{check_gradients, host, tensor};
use crate::support::random::Random;

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
