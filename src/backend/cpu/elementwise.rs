//! Everything but matrix products: norm, activation function, rotation, exponential. One source, compiled for every
//! instruction set, with the order of every sum fixed: 16 partial sums by index modulo 16, then a fixed tree.

use super::isa::multiversion;
use crate::backend::TokenScore;

/// Partial sums kept side by side.
pub(super) const LANES: usize = 16;

/// Sum of 16 lanes in a fixed order: halves onto halves.
#[inline(always)]
pub(super) fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest of `x` and `least`; what is no number is passed over.
#[inline(always)]
pub(super) fn largest(x: &[f32], least: f32) -> f32 {
    let (runs, rest) = x.as_chunks::<LANES>();
    let mut lanes = [least; LANES];
    for run in runs {
        for i in 0..LANES {
            lanes[i] = if run[i] > lanes[i] { run[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(least, |m, &v| if v > m { v } else { m })
}

/// Sum of squares.
#[inline(always)]
pub(super) fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (runs, rest) = x.as_chunks::<LANES>();
    for run in runs {
        for l in 0..LANES {
            lanes[l] = run[l].mul_add(run[l], lanes[l]);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = v.mul_add(*v, *lane);
    }
    tree_sum(lanes)
}

/// eˣ within 2 units in the last place over its whole range; 0 below -87.3, and no infinity above 88.3.
///
/// Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes' expf), all in fused multiply-adds.
#[inline(always)]
#[must_use]
pub(in crate::backend) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512, exact in f32
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5·2²³ leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.3 { 88.3 } else { clamped };
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { 0.0 } else { p * power }
}

multiversion! {
    /// RMS norm of each run of `weight.len()` values of `x` into `out`.
    pub(in crate::backend) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let n = weight.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let inverse = 1.0 / (sum_of_squares(x) / n as f32 + eps).sqrt();
            for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
                *o = v * inverse * w;
            }
        }
    }
}

multiversion! {
    /// `gate = silu(gate) · up`.
    pub(in crate::backend) fn silu_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

multiversion! {
    /// `x += y`.
    pub(super) fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

multiversion! {
    /// `x += weight · y`.
    pub(super) fn add_scaled(x: &mut [f32], y: &[f32], weight: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += weight * y;
        }
    }
}

multiversion! {
    /// `x *= y`.
    pub(super) fn multiply(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x *= y;
        }
    }
}

multiversion! {
    /// Rotates the first `2 · cos.len()` dimensions of each of a token's heads of `head_dim` and leaves the rest:
    /// (a, b) → (a·cos - b·sin, b·cos + a·sin), a from the first half of what turns.
    pub(super) fn rotate(token: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        for head in token.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

multiversion! {
    /// `x = max(x, 0)²`; NaN stays NaN.
    pub(in crate::backend) fn relu2(x: &mut [f32]) {
        for x in x {
            let positive = if *x < 0.0 { 0.0 } else { *x };
            *x = positive * positive;
        }
    }
}

multiversion! {
    /// `gate = gelu(gate) · up`, by the approximation with tanh.
    ///
    /// x/2 · (1 + tanh y) = x · sigmoid(2y), which keeps its relative precision for negative x.
    pub(in crate::backend) fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
        /// 2·√(2/π).
        const TWICE: f32 = 1.595_769;
        for (g, u) in gate.iter_mut().zip(up) {
            let y = TWICE * (0.044_715 * *g * *g).mul_add(*g, *g);
            *g = *g / (1.0 + exp(-y)) * u;
        }
    }
}

multiversion! {
    /// gpt_oss's activation: with g = min(gate, limit) and u = up within ±limit, `gate = (u + 1) · g · sigmoid(1.702 g)`;
    /// NaN stays NaN.
    pub(in crate::backend) fn clamped_swiglu(gate: &mut [f32], up: &[f32], limit: f32) {
        /// Makes the sigmoid resemble GELU's.
        const ALPHA: f32 = 1.702;
        for (gate, up) in gate.iter_mut().zip(up) {
            let g = if *gate > limit { limit } else { *gate };
            let u = if *up > limit { limit } else { *up };
            let u = if u < -limit { -limit } else { u };
            *gate = (u + 1.0) * (g / (1.0 + exp(-ALPHA * g)));
        }
    }
}

multiversion! {
    /// `x *= sigmoid(gate)`, value by value.
    pub(in crate::backend) fn sigmoid_mul(x: &mut [f32], gate: &[f32]) {
        for (x, g) in x.iter_mut().zip(gate) {
            *x /= 1.0 + exp(-*g);
        }
    }
}

multiversion! {
    /// `x *= sigmoid(gate)`, x [rows, columns], one value of `gate` a row.
    pub(in crate::backend) fn sigmoid_mul_rows(x: &mut [f32], gate: &[f32], columns: usize) {
        for (x, g) in x.chunks_exact_mut(columns).zip(gate) {
            let divisor = 1.0 + exp(-*g);
            x.iter_mut().for_each(|x| *x /= divisor);
        }
    }
}

/// Values whose exponentials are added up in f32 before they join the f64 sum.
const SOFTMAX_RUN: usize = 1024;

multiversion! {
    /// Maximum of `x`, and the sum of exp(x - maximum).
    pub(super) fn softmax_total(x: &[f32], out: &mut (f32, f64)) {
        let max = largest(x, f32::NEG_INFINITY);
        let mut total = 0.0f64;
        for part in x.chunks(SOFTMAX_RUN) {
            let (runs, rest) = part.as_chunks::<LANES>();
            let mut lanes = [0.0f32; LANES];
            for run in runs {
                for i in 0..LANES {
                    lanes[i] += exp(run[i] - max);
                }
            }
            for (lane, v) in lanes.iter_mut().zip(rest) {
                *lane += exp(*v - max);
            }
            total += f64::from(tree_sum(lanes));
        }
        *out = (max, total);
    }
}

/// `token` in a row whose maximum and softmax sum are known.
pub(super) fn token_score(row: &[f32], token: u32, (max, total): (f32, f64)) -> TokenScore {
    let logit = row[token as usize];
    let is_greedy = logit == max && row[..token as usize].iter().all(|&v| v < max);
    TokenScore { log_prob: f64::from(logit) - f64::from(max) - libm::log(total), is_greedy }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
        }
        assert!(worst < 2.0, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e9), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(1e9).is_finite());
    }

    type Exact = fn(f64, f64) -> f64;
    type Activation = (&'static str, fn(Isa, &mut [f32], &[f32]), Exact);

    /// Each activation of two inputs (or one), and what it is in f64.
    fn activations() -> Vec<Activation> {
        fn sigmoid(x: f64) -> f64 {
            1.0 / (1.0 + (-x).exp())
        }
        vec![
            ("relu2", |isa, x, _| relu2(isa, x), |x, _| x.max(0.0) * x.max(0.0)),
            ("gelu_tanh_mul", gelu_tanh_mul, |x, y| {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()) * y
            }),
            (
                "clamped_swiglu",
                |isa, x, y| clamped_swiglu(isa, x, y, 7.0),
                |x, y| {
                    let (gate, up) = (x.min(7.0), y.clamp(-7.0, 7.0));
                    (up + 1.0) * gate * sigmoid(1.702 * gate)
                },
            ),
            ("sigmoid_mul", sigmoid_mul, |x, y| x * sigmoid(y)),
            ("sigmoid_mul_rows", |isa, x, y| sigmoid_mul_rows(isa, x, y, 1), |x, y| x * sigmoid(y)),
        ]
    }

    #[test]
    fn activations_are_what_they_are_in_f64() {
        let x: Vec<f32> = (-1800..1800).map(|i| i as f32 * 0.01).collect();
        let y: Vec<f32> = (0..3600).map(|i| ((i * 2477) % 3600) as f32 * 0.01 - 18.0).collect();
        for (name, apply, exact) in activations() {
            let mut got = x.clone();
            apply(Isa::detect(), &mut got, &y);
            for (i, got) in got.iter().enumerate() {
                let (x, y) = (f64::from(x[i]), f64::from(y[i]));
                let exact = exact(x, y);
                // gelu's argument is rounded before the exponential.
                let allowed = 4e-6 * exact.abs() + 1e-9;
                assert!((f64::from(*got) - exact).abs() < allowed, "{name}({x}, {y}) = {got}, not {exact}");
            }
        }
    }

    #[test]
    fn activations_keep_what_is_no_number_and_end_at_the_limits() {
        for (name, apply, _) in activations() {
            let mut x = [f32::NAN];
            apply(Isa::detect(), &mut x, &[1.0]);
            assert!(x[0].is_nan(), "{name}");
        }
        let mut gate = [1.0, 100.0, -50.0, 2.0];
        clamped_swiglu(Isa::detect(), &mut gate, &[f32::NAN, 1e9, -1e9, -1.0], 7.0);
        assert!(gate[0].is_nan());
        assert!((gate[1] - 8.0 * 7.0).abs() < 1e-3 && gate[2].abs() < 1e-30, "{gate:?}");
        assert_eq!(gate[3], 0.0, "up = -1 closes it");
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        sigmoid_mul_rows(Isa::detect(), &mut x, &[0.0, -200.0], 3);
        assert_eq!(x[..3], [0.5, 1.0, 1.5]);
        assert!(x[3..].iter().all(|x| *x >= 0.0 && *x < 1e-37));
    }

    #[test]
    fn what_does_not_turn_stays() {
        let token: Vec<f32> = (0..20).map(|i| i as f32 - 7.5).collect();
        for isa in Isa::available() {
            let mut part = token.clone();
            rotate(isa, &mut part, 10, &[0.6, 0.8, 0.0], &[0.8, -0.6, 1.0]);
            for (head, before) in part.chunks(10).zip(token.chunks(10)) {
                let mut turned = before[..6].to_vec();
                rotate(isa, &mut turned, 6, &[0.6, 0.8, 0.0], &[0.8, -0.6, 1.0]);
                assert_eq!(head, [&turned, &before[6..]].concat());
                assert_ne!(head[..6], before[..6]);
            }
        }
    }

    #[test]
    fn token_scores_are_those_of_the_definition() {
        let row: Vec<f32> = (0..5003).map(|i| ((i * 37 % 1013) as f32 - 500.0) * 0.02).collect();
        for token in [0, 17, 5002, row.iter().position(|v| *v == 10.24).unwrap() as u32] {
            let mut reference = None;
            for isa in Isa::available() {
                let mut total = (0.0, 0.0);
                softmax_total(isa, &row, &mut total);
                let ours = token_score(&row, token, total);
                let exact = crate::logits::score_row(&row, token);
                assert!((ours.log_prob - exact.log_prob).abs() < 1e-6, "{ours:?} {exact:?}");
                assert_eq!(ours.is_greedy, exact.is_greedy);
                assert_eq!(*reference.get_or_insert(ours), ours, "{isa} differs");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..1031).map(|i| ((i * 37 % 1013) as f32 - 500.0) * 0.013).collect();
        let w: Vec<f32> = (0..1031).map(|i| (i % 7) as f32 * 0.3 - 0.8).collect();
        let run = |isa: Isa| {
            let mut norm = vec![0.0; 1031];
            rms_norm(isa, &x, &w, 1e-5, &mut norm);
            let mut gate = x.clone();
            silu_mul(isa, &mut gate, &w);
            let mut sum = x.clone();
            add_scaled(isa, &mut sum, &w, 0.37);
            let mut all = [norm, gate, sum].concat();
            for (_, apply, _) in activations() {
                let mut x: Vec<f32> = x.iter().map(|x| x * 3.0).collect();
                apply(isa, &mut x, &w);
                all.extend(x);
            }
            all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let all = Isa::available();
        for isa in &all[1..] {
            assert!(run(*isa) == run(all[0]), "{isa} differs from scalar");
        }
    }
}
