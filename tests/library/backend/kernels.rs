//! The packed matrix products on random layers: every instruction set gives the scalar bits, and they are right.

use crate::support::fixtures::bits;
use proptest::prelude::*;
use recoup::backend::cpu::{CpuBackend, isa::Isa};
use recoup::backend::{Backend, BackendError};
use recoup::formats::linear::{ActivationFormat, Element, LinearTensors};
use recoup::formats::synthetic::{Blocks, WEIGHTS, activation, activations, layer, unit};
use recoup::random::SplitMix64;

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
fn check(weight: (Element, Blocks), input: ActivationFormat, m: usize, n: usize, k: usize, seed: u64) -> Option<f64> {
    let mut r = SplitMix64(seed);
    let k = k.next_multiple_of(unit(weight.1));
    let t = layer(&mut r, n, k, weight, input);
    let x: Vec<f32> = (0..m * k).map(|_| activation(&mut r)).collect();
    let mut scalar = Vec::new();
    for isa in Isa::available() {
        let backend = CpuBackend::new(isa, 1).unwrap();
        let packed = match backend.load_linear(t.clone()) {
            Ok(packed) => packed,
            Err(BackendError::Unsupported { .. }) => return None,
            Err(e) => panic!("{e}"),
        };
        let rows = backend.tensor(x.clone(), k).unwrap();
        let y = backend.to_host(&backend.linears(&rows, &[&packed]).unwrap()[0]).unwrap();
        if scalar.is_empty() {
            scalar = y;
        } else {
            assert!(bits(&scalar) == bits(&y), "{isa} differs from scalar: {weight:?} x {input}, {m} x {n} x {k}");
        }
    }
    let mut worst = 0.0f64;
    for (got, (exact, size)) in scalar.iter().zip(exact(&t, &x)) {
        let deviation = (f64::from(*got) - exact).abs() / size.max(f64::MIN_POSITIVE);
        assert!(deviation <= 1e-5, "{got} for {exact}: {weight:?} x {input}, {m} x {n} x {k}");
        worst = worst.max(deviation);
    }
    Some(worst)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Every legal pair in each case, now and then with tokens so many that elements are decoded once for all of them.
    #[test]
    fn every_instruction_set_equals_scalar_and_the_exact_product(
        m in prop_oneof![8 => 1usize..20, 1 => 32usize..44], n in 1usize..50, k in 1usize..300, seed in any::<u64>(),
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
