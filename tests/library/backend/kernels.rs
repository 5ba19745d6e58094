//! The packed matrix products on random layers: every instruction set gives the scalar bits, and they are right.

use crate::support::fixtures::bits;
use crate::support::random::Random;
use proptest::prelude::*;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, BackendError};
use recoup::formats::e8m0::ScaleRule;
use recoup::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};

/// Weight layouts: element, what scales it has below a row, and what K must be a multiple of.
#[derive(Clone, Copy, Debug)]
enum Blocks {
    None,
    E4m3(usize),
    E8m0,
    Grid,
}

const WEIGHTS: [(Element, Blocks); 9] = [
    (Element::F32, Blocks::None),
    (Element::F16, Blocks::None),
    (Element::Bf16, Blocks::None),
    (Element::E4m3, Blocks::None),
    (Element::E4m3, Blocks::E8m0),
    (Element::E4m3, Blocks::Grid),
    (Element::E2m1, Blocks::E4m3(16)),
    (Element::E2m1, Blocks::E4m3(32)),
    (Element::E2m1, Blocks::E8m0),
];

fn activations() -> Vec<ActivationFormat> {
    use ActivationFormat as A;
    let mut all =
        vec![A::Float, A::Nvfp4 { global_scale: 7e-4 }, A::Fp8Static { scale: 5e-3 }, A::Fp8Token, A::Fp8Group];
    for rule in [ScaleRule::Ceil, ScaleRule::Floor, ScaleRule::Even] {
        all.extend([A::Mxfp4 { rule }, A::Mxfp8 { rule }]);
    }
    all
}

/// As activations are: mostly small, a few large, some zero.
fn activation_value(r: &mut Random) -> f32 {
    match r.below(16) {
        0 => 0.0,
        1 => 30.0 * r.uniform(),
        _ => r.uniform(),
    }
}

fn positive(r: &mut Random) -> f32 {
    0.01 + r.uniform().abs()
}

fn layer(
    r: &mut Random,
    n: usize,
    k: usize,
    (element, blocks): (Element, Blocks),
    activation: ActivationFormat,
) -> LinearTensors<'static> {
    let count = n * k;
    let mut data = Vec::new();
    match element {
        Element::F32 => (0..count).for_each(|_| data.extend(r.uniform().to_le_bytes())),
        Element::F16 => (0..count).for_each(|_| data.extend(half::f16::from_f32(r.uniform()).to_le_bytes())),
        Element::Bf16 => (0..count).for_each(|_| data.extend(half::bf16::from_f32(r.uniform()).to_le_bytes())),
        // Every code but NaN (0x7f, 0xff).
        Element::E4m3 => data.extend((0..count).map(|_| r.below(127) as u8 | (r.below(2) << 7) as u8)),
        Element::E2m1 => data.extend((0..count / 2).map(|_| r.below(256) as u8)),
    }
    let block_scales = match blocks {
        Blocks::None => BlockScales::None,
        Blocks::E4m3(block) => {
            BlockScales::E4m3 { block, codes: (0..count / block).map(|_| r.below(127) as u8).collect() }
        }
        Blocks::E8m0 => {
            BlockScales::E8m0 { block: 32, codes: (0..count / 32).map(|_| 110 + r.below(30) as u8).collect() }
        }
        Blocks::Grid => {
            BlockScales::Grid { values: (0..n.div_ceil(128) * k.div_ceil(128)).map(|_| positive(r)).collect() }
        }
    };
    let output_scale = match r.below(3) {
        0 => OutputScale::One,
        1 => OutputScale::Tensor(positive(r)),
        _ => OutputScale::Row((0..n).map(|_| positive(r)).collect()),
    };
    LinearTensors {
        name: "w".into(),
        n,
        k,
        element,
        data: data.into(),
        block_scales,
        output_scale,
        activation,
        pre_quant_scale: (r.below(4) == 0).then(|| (0..k).map(|_| positive(r)).collect()),
        bias: (r.below(2) == 0).then(|| (0..n).map(|_| r.uniform()).collect()),
    }
}

/// The product in f64 from the definitions, and the sum of the magnitudes of its terms.
fn exact(t: &LinearTensors<'_>, x: &[f32]) -> Vec<(f64, f64)> {
    let weights = t.decode();
    let mut out = Vec::new();
    for row in x.chunks_exact(t.k) {
        let mut row = row.to_vec();
        if let Some(scale) = &t.pre_quant_scale {
            row.iter_mut().zip(scale).for_each(|(x, s)| *x *= s);
        }
        t.activation.fake_quantize(&mut row);
        for n in 0..t.n {
            let terms = row.iter().zip(&weights[n * t.k..]).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let bias = t.bias.as_ref().map_or(0.0, |b| f64::from(b[n]));
            out.push(terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs())));
        }
    }
    out
}

/// Runs one random layer on every instruction set; `None` if there is no kernel for the pair.
fn check(
    weight: (Element, Blocks),
    activation: ActivationFormat,
    m: usize,
    n: usize,
    k: usize,
    seed: u64,
) -> Option<f64> {
    let mut r = Random(seed);
    let unit = match (weight.1, activation) {
        (Blocks::E8m0, _) | (Blocks::E4m3(32), _) => 32,
        (Blocks::E4m3(_), _) => 16,
        _ => 1,
    };
    let k = k.next_multiple_of(unit);
    let t = layer(&mut r, n, k, weight, activation);
    let x: Vec<f32> = (0..m * k).map(|_| activation_value(&mut r)).collect();
    let mut scalar = Vec::new();
    for isa in Isa::available() {
        let backend = CpuBackend::new(isa, 1).unwrap();
        let packed = match backend.load_linear(t.clone()) {
            Ok(packed) => packed,
            Err(BackendError::Unsupported { .. }) => return None,
            Err(e) => panic!("{e}"),
        };
        let input = backend.tensor(x.clone(), k).unwrap();
        let y = backend.to_host(&backend.linears(&input, &[&packed]).unwrap()[0]).unwrap();
        if scalar.is_empty() {
            scalar = y;
        } else {
            assert!(bits(&scalar) == bits(&y), "{isa} differs from scalar: {weight:?} x {activation}, {m} x {n} x {k}");
        }
    }
    let mut worst = 0.0f64;
    for (got, (exact, size)) in scalar.iter().zip(exact(&t, &x)) {
        let deviation = (f64::from(*got) - exact).abs() / size.max(f64::MIN_POSITIVE);
        assert!(deviation <= 1e-5, "{got} for {exact}: {weight:?} x {activation}, {m} x {n} x {k}");
        worst = worst.max(deviation);
    }
    Some(worst)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Every legal pair in each case.
    #[test]
    fn every_instruction_set_equals_scalar_and_the_exact_product(
        m in 1usize..20, n in 1usize..50, k in 1usize..300, seed in any::<u64>(),
    ) {
        for weight in WEIGHTS {
            for activation in activations() {
                check(weight, activation, m, n, k, seed);
            }
        }
    }
}

#[test]
fn layers_larger_than_a_task_and_a_grid_block_are_right_too() {
    let mut worst = 0.0f64;
    for weight in WEIGHTS {
        for activation in activations() {
            for (m, n, k) in [(131, 19, 160), (3, 261, 391)] {
                worst = worst.max(check(weight, activation, m, n, k, 1).unwrap_or(0.0));
            }
        }
    }
    println!("largest deviation from the exact product: {worst:.1e} of the sum of magnitudes");
}

#[test]
fn each_weight_has_kernels_for_the_activations_it_should() {
    let legal = |weight| activations().into_iter().filter(|a| check(weight, *a, 1, 16, 32, 0).is_some()).count();
    // Float, static FP8, per token, per 128 and three MXFP8 rules; E2M1 takes NVFP4 or three MXFP4 rules of
    // its own block besides.
    let counts = WEIGHTS.map(legal);
    assert_eq!(counts, [7, 7, 7, 7, 7, 7, 8, 10, 10]);
}
