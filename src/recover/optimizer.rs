//! AdamW on f32 masters, and the learning rate over the steps.

use rayon::prelude::*;

/// How weights are moved. Betas as in the distillation recipes of LLMs, no weight decay unless asked for.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    pub beta1: f32,
    pub beta2: f32,
    pub epsilon: f32,
    pub weight_decay: f32,
    /// Largest norm of all gradients together; larger ones are scaled down to it. 0: no limit.
    pub clip: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

/// Running means of one parameter's gradient and of its square.
#[derive(Clone, Debug)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Moments {
    /// Bytes of a value's.
    pub const BYTES: usize = 8;

    /// Zeros.
    #[must_use]
    pub fn new(length: usize) -> Self {
        Self { first: vec![0.0; length], second: vec![0.0; length] }
    }
}

/// Values that one task takes at a time.
const CHUNK: usize = 1 << 14;

/// Sum of squares, in f64, by chunks: the same for any number of threads.
#[must_use]
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let part = |chunk: &[f32]| {
        let mut lanes = [0.0f32; 16];
        for run in chunk.chunks(16) {
            run.iter().zip(&mut lanes).for_each(|(v, lane)| *lane += v * v);
        }
        lanes.iter().map(|l| f64::from(*l)).sum::<f64>()
    };
    values.par_chunks(CHUNK).map(part).collect::<Vec<f64>>().iter().sum()
}

impl AdamW {
    /// What gradients of the given norm are multiplied by.
    #[must_use]
    pub fn clipping(&self, norm: f64) -> f32 {
        if self.clip > 0.0 && norm > f64::from(self.clip) { (f64::from(self.clip) / norm) as f32 } else { 1.0 }
    }

    /// Moves `weights` by step number `step` (from 1), with `factor` times the gradient, which is set to zero.
    pub fn step(
        &self,
        step: usize,
        rate: f32,
        factor: f32,
        weights: &mut [f32],
        gradient: &mut [f32],
        moments: &mut Moments,
    ) {
        let power = |beta: f32| 1.0 - f64::from(beta).powi(step.min(i32::MAX as usize) as i32);
        let (first, second) = ((1.0 / power(self.beta1)) as f32, (1.0 / power(self.beta2)) as f32);
        let decay = 1.0 - rate * self.weight_decay;
        let parts = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks_mut(CHUNK));
        let moments = moments.first.par_chunks_mut(CHUNK).zip(moments.second.par_chunks_mut(CHUNK));
        parts.zip(moments).for_each(|((w, g), (m, v))| {
            for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                let gradient = *g * factor;
                *m = self.beta1 * *m + (1.0 - self.beta1) * gradient;
                *v = self.beta2 * *v + (1.0 - self.beta2) * gradient * gradient;
                *w = *w * decay - rate * (*m * first) / ((*v * second).sqrt() + self.epsilon);
                *g = 0.0;
            }
        });
    }
}

/// Learning rate at `step` (from 0) of `steps`: linear warm-up, then a half cosine down to `floor` times the peak.
#[must_use]
pub fn cosine(peak: f32, step: usize, steps: usize, warmup: usize, floor: f32) -> f32 {
    cosine_at(peak, step as f64, steps, warmup, floor)
}

/// The same at a `position` that may lie between two steps ([`super::schedule`]).
#[must_use]
pub fn cosine_at(peak: f32, position: f64, steps: usize, warmup: usize, floor: f32) -> f32 {
    if position < warmup as f64 {
        return peak * (position + 1.0).min(warmup as f64) as f32 / warmup as f32;
    }
    let done = (position - warmup as f64) / (steps.saturating_sub(warmup).max(1)) as f64;
    let wave = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
    (f64::from(peak) * (f64::from(floor) + (1.0 - f64::from(floor)) * wave)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_then_fall_to_the_floor() {
        let rate = |step| cosine(2.0, step, 105, 5, 0.1);
        assert_eq!(rate(0), 0.4);
        assert_eq!(rate(4), 2.0);
        assert_eq!(rate(5), 2.0);
        assert!((rate(55) - 1.1).abs() < 1e-6);
        assert!((rate(105) - 0.2).abs() < 1e-6);
        assert!((5..105).all(|s| rate(s + 1) <= rate(s)));
    }

    /// Three steps by hand: PyTorch 2.15, `AdamW([1, -2], lr=.1, betas=(.9, .95), weight_decay=.01)`, gradients (1, -.5),
    /// (.25, 3), (-2, 0).
    #[test]
    fn steps_are_those_of_pytorch() {
        let adam = AdamW { weight_decay: 0.01, ..AdamW::default() };
        let (mut w, mut moments) = (vec![1.0, -2.0], Moments::new(2));
        for (i, gradient) in [[1.0, -0.5], [0.25, 3.0], [-2.0, 0.0]].into_iter().enumerate() {
            let mut g = gradient.to_vec();
            adam.step(i + 1, 0.1, 1.0, &mut w, &mut g, &mut moments);
            assert_eq!(g, [0.0, 0.0]);
        }
        let mut exact = [1.0f64, -2.0];
        let (mut m, mut v) = ([0.0f64; 2], [0.0f64; 2]);
        for (i, g) in [[1.0, -0.5], [0.25, 3.0], [-2.0, 0.0]].into_iter().enumerate() {
            for j in 0..2 {
                m[j] = 0.9 * m[j] + 0.1 * g[j];
                v[j] = 0.95 * v[j] + 0.05 * g[j] * g[j];
                let t = i as i32 + 1;
                exact[j] *= 1.0 - 0.1 * 0.01;
                exact[j] -= 0.1 * (m[j] / (1.0 - 0.9f64.powi(t))) / ((v[j] / (1.0 - 0.95f64.powi(t))).sqrt() + 1e-8);
            }
        }
        assert!(w.iter().zip(exact).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6), "{w:?} {exact:?}");
    }

    #[test]
    fn gradients_are_clipped_by_their_common_norm() {
        let adam = AdamW::default();
        assert_eq!(adam.clipping(0.5), 1.0);
        assert_eq!(adam.clipping(4.0), 0.25);
        assert_eq!(AdamW { clip: 0.0, ..adam }.clipping(4.0), 1.0);
        assert!((sum_of_squares(&vec![0.5; 100_000]) - 25_000.0).abs() < 1e-6);
    }
}
