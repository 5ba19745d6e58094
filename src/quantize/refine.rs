//! Smoothing, channel by channel: from the factors that one strength gives, each channel's is doubled or halved where its
//! block then loses less.
//!
//! What a block loses, as it is quantized: Σ over its channels of the error of the input there, weighed by the weights'
//! column (|w|²), and of the error of the weights, weighed by the input (E x²); products of errors of different channels
//! average out. Blocks do not touch each other, so each is settled by itself.

use rayon::prelude::*;

use crate::formats::e8m0::ScaleRule;
use crate::formats::scheme::Scheme;
use crate::formats::{amax, e2m1, e4m3, mx, nvfp4};

/// What is smoothed.
pub(super) struct Inputs<'a> {
    /// Inputs, [tokens, K].
    pub x: &'a [f32],
    /// What the squared error of each token counts.
    pub worth: &'a [f32],
    /// The largest magnitude of each channel on all of the text.
    pub peaks: &'a [f32],
    /// Weights that read them, [N, K] each.
    pub weights: &'a [&'a [f32]],
    pub k: usize,
}

/// Share of the weights' errors that counts: calibrated rounding and training make up for much of them, and for nothing of
/// what the inputs lose.
const WEIGHTS_SHARE: f64 = 0.6;
/// Times that all channels are tried.
const SWEEPS: usize = 3;

/// Whether channels can be settled one by one under this scheme: both sides have blocks of four bits.
pub(super) fn settles(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Nvfp4 | Scheme::Mxfp4)
}

/// Doubles and halves `factors` [K], inputs over them and weights times them, where it helps a scheme that
/// [has such blocks](settles).
pub(super) fn refine(inputs: &Inputs<'_>, scheme: Scheme, factors: &mut [f32]) {
    match scheme {
        Scheme::Nvfp4 => {
            if let Some(grid) = nvfp4_of(inputs, factors) {
                refine_blocks::<{ nvfp4::BLOCK }>(inputs, grid, factors);
            }
        }
        Scheme::Mxfp4 => refine_blocks::<{ mx::BLOCK }>(inputs, Grid::Mxfp4, factors),
        _ => {}
    }
}

/// How blocks are quantized.
#[derive(Clone, Copy)]
enum Grid {
    /// Under these global scales.
    Nvfp4 {
        input: f32,
        weight: f32,
    },
    Mxfp4,
}

impl Grid {
    /// Quantizes a block of inputs to doubled E2M1 values; gives the scale of these.
    fn input(self, x: &[f32], doubled: &mut [i8]) -> f32 {
        match self {
            Self::Nvfp4 { input, .. } => 0.5 * nvfp4::quantize_activation_block(x, input, doubled) * input,
            Self::Mxfp4 => 0.5 * mx::quantize_fp4_block(x, ScaleRule::Ceil, doubled),
        }
    }

    /// The same of weights.
    fn weight(self, w: &[f32], doubled: &mut [i8]) -> f32 {
        match self {
            Self::Nvfp4 { weight, .. } => {
                let scale = (amax(w) / (e2m1::MAX * weight)).clamp(e4m3::MIN_POSITIVE, e4m3::MAX);
                let s = e4m3::round(scale) * weight;
                nvfp4::quantize_with_scale(w, s, doubled);
                0.5 * s
            }
            Self::Mxfp4 => 0.5 * mx::quantize_fp4_block(w, ScaleRule::Ceil, doubled),
        }
    }
}

/// The global scales under `factors`; `None` where all is zero.
fn nvfp4_of(inputs: &Inputs<'_>, factors: &[f32]) -> Option<Grid> {
    let k = inputs.k;
    let scaled = |peaks: &[f32], invert: bool| {
        let one = |(p, f): (&f32, &f32)| if invert { p / f } else { p * f };
        peaks.iter().zip(factors.iter()).map(one).fold(0.0, f32::max)
    };
    let input = nvfp4::global_scale(scaled(inputs.peaks, true));
    let mut weight_peaks = vec![0.0f32; k];
    for row in inputs.weights.iter().flat_map(|w| w.chunks_exact(k)) {
        weight_peaks.iter_mut().zip(row).for_each(|(p, w)| *p = p.max(w.abs()));
    }
    let weight = nvfp4::global_scale(scaled(&weight_peaks, false));
    (input > 0.0 && weight > 0.0).then_some(Grid::Nvfp4 { input, weight })
}

fn refine_blocks<const B: usize>(inputs: &Inputs<'_>, grid: Grid, factors: &mut [f32]) {
    let k = inputs.k;
    factors.par_chunks_exact_mut(B).enumerate().for_each(|(b, factors)| {
        let cut = |rows: &[f32], invert: bool| -> Vec<[f32; B]> {
            let one = |row: &[f32]| {
                std::array::from_fn(|i| if invert { row[b * B + i] / factors[i] } else { row[b * B + i] * factors[i] })
            };
            rows.chunks_exact(k).map(one).collect()
        };
        let mut block = Block {
            x: cut(inputs.x, true),
            worth: inputs.worth,
            w: inputs.weights.iter().flat_map(|w| cut(w, false)).collect(),
            grid,
        };
        let mut least = block.loss();
        for _ in 0..SWEEPS {
            let before = least;
            for (channel, factor) in factors.iter_mut().enumerate() {
                for step in [2.0, 0.5] {
                    block.scale(channel, step);
                    let loss = block.loss();
                    if loss < least {
                        least = loss;
                        *factor *= step;
                    } else {
                        block.scale(channel, 1.0 / step);
                    }
                }
            }
            if least == before {
                break;
            }
        }
    });
}

/// The channels of a block.
struct Block<'a, const B: usize> {
    x: Vec<[f32; B]>,
    worth: &'a [f32],
    w: Vec<[f32; B]>,
    grid: Grid,
}

impl<const B: usize> Block<'_, B> {
    /// Divides the inputs of a channel by a power of two, and multiplies the weights by it.
    fn scale(&mut self, channel: usize, factor: f32) {
        self.x.iter_mut().for_each(|x| x[channel] /= factor);
        self.w.iter_mut().for_each(|w| w[channel] *= factor);
    }

    fn loss(&self) -> f64 {
        let mut doubled = [0i8; B];
        // Of each channel: errors of the input and its square, both weighed by tokens.
        let (mut input_errors, mut inputs) = ([0.0f32; B], [0.0f32; B]);
        for (x, worth) in self.x.iter().zip(self.worth) {
            let s = self.grid.input(x, &mut doubled);
            for i in 0..B {
                let error = x[i] - f32::from(doubled[i]) * s;
                input_errors[i] += worth * error * error;
                inputs[i] += worth * x[i] * x[i];
            }
        }
        let (mut weight_errors, mut weights) = ([0.0f32; B], [0.0f32; B]);
        for w in &self.w {
            let s = self.grid.weight(w, &mut doubled);
            for i in 0..B {
                let error = w[i] - f32::from(doubled[i]) * s;
                weight_errors[i] += error * error;
                weights[i] += w[i] * w[i];
            }
        }
        let channel = |i: usize| {
            let (of_input, of_weight) = (input_errors[i] * weights[i], weight_errors[i] * inputs[i]);
            f64::from(of_input) + WEIGHTS_SHARE * f64::from(of_weight)
        };
        (0..B).map(channel).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A channel whose inputs are 64 times as large as those beside it, under weights that are as small: one is brought
    /// back, and what the whole computes stays, bit for bit.
    #[test]
    fn an_outlier_that_a_strength_left_is_made_smaller() {
        let mut state = 3u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f32 / (1u32 << 31) as f32 - 0.5
        };
        let (k, tokens, n) = (2 * mx::BLOCK, 64, 48);
        let outlier = 20;
        let mut rows = |count: usize, factor: f32| -> Vec<f32> {
            (0..count * k).map(|i| if i % k == outlier { factor * random() } else { random() }).collect()
        };
        let (x, w) = (rows(tokens, 64.0), rows(n, 1.0 / 64.0));
        let mut peaks = vec![0.5; k];
        peaks[outlier] = 32.0;
        let worth = vec![1.0; tokens];
        let inputs = Inputs { x: &x, worth: &worth, peaks: &peaks, weights: &[&w], k };
        for scheme in [Scheme::Nvfp4, Scheme::Mxfp4] {
            let mut factors = vec![1.0; k];
            refine(&inputs, scheme, &mut factors);
            assert!((8.0..=64.0).contains(&factors[outlier]), "{scheme}: {factors:?}");
            assert!(factors.iter().all(|f| f.to_bits() & 0x007f_ffff == 0));
            // Nothing to see, nothing done.
            let mut none = vec![1.0; k];
            let nothing = Inputs { x: &vec![0.0; x.len()], peaks: &vec![0.0; k], ..inputs };
            refine(&nothing, scheme, &mut none);
            assert_eq!(none, vec![1.0; k]);
        }
    }
}
