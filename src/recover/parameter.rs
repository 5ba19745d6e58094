//! One weight on its way: its master, and where a stage learns them its block scales or the direction of its rounding.

use std::sync::MutexGuard;

use rayon::prelude::*;
use safetensors::Dtype;

use super::optimizer::{AdamW, Moments};
use crate::backend::autograd::{Linear, Norm};
use crate::checkpoint::write::float_bytes;

/// What a weight belongs to.
#[derive(Clone, Debug)]
pub enum Weight {
    Linear(Linear),
    /// What is no matrix: a norm's weight, sinks, a mixer's own numbers.
    Norm {
        norm: Norm,
        /// The type that its checkpoint holds it in.
        dtype: Dtype,
        /// What it is more than what its checkpoint holds: 1 for norms by 1 + w.
        offset: f32,
    },
}

/// What of a weight a stage moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learned {
    pub weight: bool,
    /// Block scales too (LSQ: Esser et al. 2020), where they are E4M3 codes.
    pub scales: bool,
    /// Not the master itself but to which of the two codes beside it it goes (AdaRound: Nagel et al. 2020).
    pub rounding: bool,
}

impl Learned {
    /// The weight alone.
    #[must_use]
    pub fn weight(learned: bool) -> Self {
        Self { weight: learned, ..Self::default() }
    }
}

/// Learning rates of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of masters of quantized weights, and of all else that no other is for.
    pub weights: f32,
    /// Of the logarithms of block scales.
    pub scales: f32,
    /// Of what is no matrix.
    pub norms: f32,
}

/// Relative steps of a block scale per step of a weight where it has no rate of its own: neighbouring E4M3 codes are a
/// sixteenth to an eighth apart.
const SCALE_RATE: f32 = 10.0;

impl Rates {
    /// One for all.
    #[must_use]
    pub fn of(rate: f32) -> Self {
        Self { weights: rate, scales: SCALE_RATE * rate, norms: rate }
    }
}

/// Steps of a rounding's logit per step of a weight: logits go from about 0 to ±2.4.
const ROUNDING_RATE: f32 = 100.0;

/// Values that move, with the optimizer's state while they do.
#[derive(Debug, Default)]
struct Track {
    values: Vec<f32>,
    /// Whether they move now.
    moves: bool,
    /// `None` where nothing moves, or another process has them.
    moments: Option<Moments>,
    /// Running mean of the values over the steps of a stage that asks for it.
    average: Option<Vec<f32>>,
}

impl Track {
    fn of(values: Vec<f32>) -> Self {
        Self { values, ..Self::default() }
    }

    /// Begins (or ends) to be moved; `keep` leaves moments and mean as they are.
    fn train(&mut self, trained: bool, keep: bool) {
        if !keep {
            (self.moments, self.average) = (None, None);
        }
        let length = self.values.len();
        self.moves = trained;
        self.moments = trained.then(|| self.moments.take().unwrap_or_else(|| Moments::new(length)));
    }

    fn average(&mut self, decay: f32) {
        if !self.moves {
            return;
        }
        match &mut self.average {
            None => self.average = Some(self.values.clone()),
            Some(average) => {
                let pairs = average.par_iter_mut().with_min_len(1 << 14).zip(&self.values);
                pairs.for_each(|(a, v)| *a = decay * *a + (1.0 - decay) * v);
            }
        }
    }

    /// What a state holds of it. What is kept as the best is the mean, where there is one.
    fn kinds(&self, moments: bool) -> &'static [&'static str] {
        match (moments && self.moves, self.average.is_some()) {
            (true, true) => &[MASTER, FIRST, SECOND, AVERAGE],
            (true, false) => &[MASTER, FIRST, SECOND],
            (false, true) => &[AVERAGE],
            (false, false) => &[MASTER],
        }
    }

    fn get(&self, kind: &str) -> Option<&Vec<f32>> {
        match kind {
            MASTER => Some(&self.values),
            FIRST => self.moments.as_ref().map(|m| &m.first),
            SECOND => self.moments.as_ref().map(|m| &m.second),
            AVERAGE => self.average.as_ref(),
            _ => None,
        }
    }

    fn set(&mut self, kind: &str, values: Vec<f32>) -> bool {
        let length = values.len();
        if length != self.values.len() {
            return false;
        }
        match kind {
            MASTER => self.values = values,
            FIRST => self.moments.get_or_insert_with(|| Moments::new(length)).first = values,
            SECOND => self.moments.get_or_insert_with(|| Moments::new(length)).second = values,
            AVERAGE => self.average = Some(values),
            _ => return false,
        }
        true
    }
}

const MASTER: &str = "master";
const FIRST: &str = "first";
const SECOND: &str = "second";
const AVERAGE: &str = "average";
/// Before the kind, in the names of what a state holds of block scales.
const SCALES: &str = "scales_";

/// A weight on its way.
pub struct Parameter {
    /// The module of a linear, the tensor of a norm.
    pub name: String,
    pub weight: Weight,
    /// The decoder layer it is in.
    pub layer: Option<usize>,
    /// [N, K], or [features].
    master: Track,
    /// Logarithms of block scales [N, ⌈K/block⌉], where some stage learns them.
    scales: Option<Track>,
    /// Which way each value goes, while a stage learns that.
    rounding: Option<Rounding>,
}

impl Parameter {
    pub(super) fn new(name: String, weight: Weight, layer: Option<usize>, master: Vec<f32>) -> Self {
        Self { name, weight, layer, master: Track::of(master), scales: None, rounding: None }
    }

    /// The master: [N, K], or [features].
    #[must_use]
    pub fn master(&self) -> &[f32] {
        &self.master.values
    }

    /// Whether it is quantized.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        matches!(&self.weight, Weight::Linear(l) if !l.grid().is_float())
    }

    /// Whether it is quantized to four bits.
    #[must_use]
    pub fn has_four_bits(&self) -> bool {
        matches!(&self.weight, Weight::Linear(l) if l.grid().has_four_bits())
    }

    /// Whether it is no matrix: the weight of a norm, sinks, a mixer's own numbers.
    #[must_use]
    pub fn is_norm(&self) -> bool {
        matches!(&self.weight, Weight::Norm { .. })
    }

    /// The summed gradient, `None` if it is not trained.
    pub fn gradient(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        gradient(&self.weight)
    }

    /// Lets block scales be learned by some stage, where they are E4M3 codes.
    pub(super) fn allow_scales(&mut self, dual: bool) {
        if let Weight::Linear(l) = &self.weight
            && let Some(scales) = l.grid().learnable_scales()
        {
            self.scales = Some(Track::of(scales.iter().map(|s| s.ln()).collect()));
            if dual {
                l.freeze_divisors();
            }
        }
    }

    /// Moves what `learned` names from now on; `keep` leaves moments and means of an earlier run of the stage.
    pub(super) fn train(&mut self, learned: Learned, keep: bool) {
        self.settle_rounding();
        self.master.train(learned.weight && !learned.rounding, keep);
        if let Some(scales) = &mut self.scales {
            scales.train(learned.scales, keep);
        }
        match &self.weight {
            Weight::Linear(l) if learned.weight || learned.scales => l.train(),
            Weight::Linear(l) => l.freeze(),
            Weight::Norm { norm, .. } if learned.weight => norm.train(),
            Weight::Norm { norm, .. } => norm.freeze(),
        }
        if let Weight::Linear(l) = &self.weight
            && learned.weight
            && learned.rounding
        {
            let (low, high) = l.grid().neighbours(&self.master.values);
            let rounding = Rounding::new(&self.master.values, low, high);
            l.set_values(rounding.values());
            self.rounding = Some(rounding);
        }
    }

    /// One step of the optimizer; the gradient is zero afterwards. `progress` of the stage goes from 0 to 1.
    pub(super) fn step(&mut self, adam: &AdamW, step: usize, rates: Rates, factor: f32, progress: f32) {
        let weight = self.weight.clone();
        let mut gradient = gradient(&weight);
        let Some(gradient) = gradient.as_mut() else { return };
        let undecayed = AdamW { weight_decay: 0.0, ..*adam };
        if let (Some(rounding), Weight::Linear(l)) = (&mut self.rounding, &weight) {
            rounding.turn(gradient, factor, progress);
            let Track { values, moments: Some(moments), .. } = &mut rounding.logits else { return };
            undecayed.step(step, rates.weights * ROUNDING_RATE, 1.0, values, gradient, moments);
            l.set_values(rounding.values());
            return;
        }
        if let (Some(Track { values, moments: Some(moments), .. }), Weight::Linear(l)) = (&mut self.scales, &weight) {
            let mut own = l.grid().scale_gradient(&self.master.values, gradient);
            undecayed.step(step, rates.scales, factor, values, &mut own, moments);
        }
        let rate = if self.is_norm() { rates.norms } else { rates.weights };
        match &mut self.master.moments {
            Some(moments) => adam.step(step, rate, factor, &mut self.master.values, gradient, moments),
            None => gradient.fill(0.0),
        }
        self.round();
    }

    /// Lets another process keep the optimizer's state: this one does not move it any more.
    pub(super) fn leave_to_another(&mut self) {
        self.master.moments = None;
        if let Some(scales) = &mut self.scales {
            scales.moments = None;
        }
    }

    /// What moves of it: its master, its block scales.
    pub(super) fn moving(&self) -> impl Iterator<Item = &Vec<f32>> {
        [Some(&self.master), self.scales.as_ref()].into_iter().flatten().filter(|t| t.moves).map(|t| &t.values)
    }

    /// As [`Self::moving`], to be taken over from who moved it; [`Self::round`] then gives it to the model.
    pub(super) fn moving_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        [Some(&mut self.master), self.scales.as_mut()].into_iter().flatten().filter(|t| t.moves).map(|t| &mut t.values)
    }

    /// Takes this step's values into their running means, of which `decay` stays; the first step begins them.
    pub(super) fn average(&mut self, decay: f32) {
        self.master.average(decay);
        if let Some(scales) = &mut self.scales {
            scales.average(decay);
        }
    }

    /// Gives the model the values, rounded.
    pub(super) fn round(&mut self) {
        let scales = self.scales.as_ref().map(|s| s.values.as_slice());
        put(&self.weight, scales, &mut self.master.values);
    }

    /// Gives the model the running means, rounded, where there are such.
    pub(super) fn round_average(&self) {
        if let Some((mut master, scales)) = self.averages() {
            put(&self.weight, scales, &mut master);
        }
    }

    /// The running means of masters and scales, each its value where it has none; nothing, where neither has any.
    fn averages(&self) -> Option<(Vec<f32>, Option<&[f32]>)> {
        let of = |t: &'_ Track| t.average.is_some();
        if !of(&self.master) && !self.scales.as_ref().is_some_and(of) {
            return None;
        }
        let master = self.master.average.as_ref().unwrap_or(&self.master.values).clone();
        Some((master, self.scales.as_ref().map(|s| s.average.as_ref().unwrap_or(&s.values).as_slice())))
    }

    /// Gives the model the values again, after [`Self::round_average`].
    pub(super) fn round_again(&self) {
        if self.averages().is_some() {
            let scales = self.scales.as_ref().map(|s| s.values.as_slice());
            put(&self.weight, scales, &mut self.master.values.clone());
        }
    }

    /// The running means, where there are such, become the values.
    pub(super) fn settle(&mut self) {
        for track in [Some(&mut self.master), self.scales.as_mut()].into_iter().flatten() {
            if let Some(average) = track.average.take() {
                track.values = average;
            }
        }
        self.round();
    }

    /// Ends the learning of its rounding: the master goes to the side that was chosen.
    pub(super) fn settle_rounding(&mut self) {
        if let Some(rounding) = self.rounding.take() {
            rounding.choose(&mut self.master.values);
            self.round();
        }
    }

    /// Names and lengths of what a state holds of it; moments only if asked for.
    pub(super) fn state(&self, moments: bool) -> Vec<(String, usize)> {
        let track = |prefix: &str, t: &Track| -> Vec<(String, usize)> {
            t.kinds(moments).iter().map(|kind| (format!("{}.{prefix}{kind}", self.name), t.values.len())).collect()
        };
        let mut out = track("", &self.master);
        out.extend(self.scales.iter().flat_map(|s| track(SCALES, s)));
        out
    }

    /// Names and lengths of what another process needs to go on from here, whatever is kept as the best.
    pub(super) fn sent(&self, moments: bool) -> Vec<(String, usize)> {
        let track = |prefix: &str, t: &Track| -> Vec<(String, usize)> {
            let has = |kind: &str| t.get(kind).is_some() && (moments || ![FIRST, SECOND].contains(&kind));
            let kinds = [MASTER, FIRST, SECOND, AVERAGE].into_iter().filter(|kind| has(kind));
            kinds.map(|kind| (format!("{}.{prefix}{kind}", self.name), t.values.len())).collect()
        };
        let mut out = track("", &self.master);
        out.extend(self.scales.iter().flat_map(|s| track(SCALES, s)));
        out
    }

    /// Values that one part of a state has.
    pub(super) fn length(&self, kind: &str) -> usize {
        match (kind.starts_with(SCALES), &self.scales) {
            (true, Some(scales)) => scales.values.len(),
            (true, None) => 0,
            (false, _) => self.master.values.len(),
        }
    }

    /// Values of one part of a state, by the part of its name behind the module's.
    pub(super) fn state_values(&self, kind: &str) -> Option<&Vec<f32>> {
        match kind.strip_prefix(SCALES) {
            Some(kind) => self.scales.as_ref()?.get(kind),
            None => self.master.get(kind),
        }
    }

    /// Takes one part of a state over; whether there is such.
    pub(super) fn set_state(&mut self, kind: &str, values: Vec<f32>) -> bool {
        match (kind.strip_prefix(SCALES), &mut self.scales) {
            (Some(kind), Some(scales)) => scales.set(kind, values),
            (Some(_), None) => false,
            (None, _) => self.master.set(kind, values),
        }
    }

    /// The weight as its checkpoint holds it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let master = &self.master.values;
        match &self.weight {
            Weight::Linear(l) => l.grid().encode(master),
            Weight::Norm { dtype, offset, .. } => {
                let stored: Vec<f32> = master.iter().map(|v| v - offset).collect();
                float_bytes(*dtype, &stored)
            }
        }
    }

    /// Whether its block scales may be others than its checkpoint's.
    pub(super) fn learns_scales(&self) -> bool {
        self.scales.is_some()
    }

    /// Its block scales as its checkpoint holds them, where they were learned.
    pub(super) fn scale_bytes(&self) -> Option<Vec<u8>> {
        match &self.weight {
            Weight::Linear(l) if self.scales.is_some() => Some(l.grid().scale_codes()),
            _ => None,
        }
    }
}

fn gradient(weight: &Weight) -> MutexGuard<'_, Option<Vec<f32>>> {
    match weight {
        Weight::Linear(l) => l.gradient(),
        Weight::Norm { norm, .. } => norm.gradient(),
    }
}

/// Puts the values nearest to `values` into the model, under block scales if such are given; without, values are moved
/// within reach of the scales that they have.
fn put(weight: &Weight, scales: Option<&[f32]>, values: &mut [f32]) {
    match (weight, scales) {
        (Weight::Linear(l), Some(scales)) => l.set_scaled(values, scales.iter().map(|s| s.exp())),
        (Weight::Linear(l), None) => l.set(values),
        (Weight::Norm { norm, dtype, offset }, _) => {
            norm.set(values.iter().map(|v| rounded(v - offset, *dtype) + offset).collect());
        }
    }
}

/// The nearest value of a float type.
fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
        Dtype::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Learned rounding: every value lies between the two codes beside its master, at a share that is learned and ends at
/// 0 or 1.
struct Rounding {
    low: Vec<f32>,
    high: Vec<f32>,
    logits: Track,
}

/// The sigmoid is stretched by this much beyond 0 and 1, so that both are reached (Louizos et al. 2018).
const STRETCH: f32 = 0.1;
/// Shares begin at least so far from 0 and 1, where they would have no gradient.
const NEAREST: f32 = 0.02;
/// What pulls the shares to 0 or 1 grows to this multiple of the tensor's mean gradient.
const PULL: f32 = 4.0;
/// Share of the stage in which nothing is pulled.
const FREE: f32 = 0.2;

impl Rounding {
    fn new(master: &[f32], low: Vec<f32>, high: Vec<f32>) -> Self {
        let logit = |((w, l), h): ((&f32, &f32), &f32)| {
            let share = if h > l { ((w - l) / (h - l)).clamp(NEAREST, 1.0 - NEAREST) } else { 0.5 };
            let inner = (share + STRETCH) / (1.0 + 2.0 * STRETCH);
            (inner / (1.0 - inner)).ln()
        };
        let logits: Vec<f32> = master.iter().zip(&low).zip(&high).map(logit).collect();
        let mut logits = Track::of(logits);
        logits.train(true, false);
        Self { low, high, logits }
    }

    fn share(logit: f32) -> (f32, f32) {
        let sigmoid = 1.0 / (1.0 + (-logit).exp());
        let share = sigmoid * (1.0 + 2.0 * STRETCH) - STRETCH;
        let inside = share > 0.0 && share < 1.0;
        let slope = if inside { sigmoid * (1.0 - sigmoid) * (1.0 + 2.0 * STRETCH) } else { 0.0 };
        (share.clamp(0.0, 1.0), slope)
    }

    /// What the model computes with meanwhile, [N, K].
    fn values(&self) -> Vec<f32> {
        let all = self.logits.values.par_iter().with_min_len(1 << 14).zip(&self.low).zip(&self.high);
        all.map(|((v, l), h)| l + (h - l) * Self::share(*v).0).collect()
    }

    /// Turns the gradient of the values into that of the logits, with the pull towards 0 and 1.
    fn turn(&self, gradient: &mut [f32], factor: f32, progress: f32) {
        let values = gradient.par_iter_mut().with_min_len(1 << 14).zip(&self.logits.values);
        values.zip(&self.low).zip(&self.high).for_each(|(((g, v), l), h)| *g *= factor * (h - l) * Self::share(*v).1);
        let sum: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
        let mean = (sum / gradient.len().max(1) as f64) as f32;
        let strength = PULL * mean * ((progress - FREE) / (1.0 - FREE)).max(0.0);
        let values = gradient.par_iter_mut().with_min_len(1 << 14).zip(&self.logits.values);
        // Away from one half, as far as there is still a way to go.
        values.for_each(|(g, v)| {
            let (share, slope) = Self::share(*v);
            *g -= strength * (2.0 * share - 1.0).signum() * slope * 4.0;
        });
    }

    /// Moves each of `master` to the side that was chosen, where it is not there already.
    fn choose(&self, master: &mut [f32]) {
        let all = master.par_iter_mut().with_min_len(1 << 14).zip(&self.logits.values).zip(&self.low).zip(&self.high);
        all.for_each(|(((w, v), l), h)| {
            let up = Self::share(*v).0 > 0.5;
            let middle = 0.5 * (l + h);
            if up != (*w > middle) {
                *w = middle + if up { BEYOND } else { -BEYOND } * (h - l);
            }
        });
    }
}

/// How far beyond the middle between two codes a master goes when its rounding was learned to be the other.
const BEYOND: f32 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rounding_begins_at_the_master_and_ends_on_the_side_that_was_learned() {
        let master = [0.6, 2.2, -0.9, 0.5];
        let (low, high) = (vec![0.5, 2.0, -1.0, 0.5], vec![1.0, 3.0, -0.5, 1.0]);
        let mut rounding = Rounding::new(&master, low.clone(), high.clone());
        for ((v, m), apart) in rounding.values().iter().zip(master).zip([0.0, 0.0, 0.0, 0.01]) {
            assert!((v - m - apart).abs() < 1e-5, "{v} {m}");
        }
        let mut kept = master;
        rounding.choose(&mut kept);
        assert_eq!(kept, master, "nothing was learned");
        rounding.logits.values = vec![5.0, 5.0, -5.0, -5.0];
        assert_eq!(rounding.values(), [1.0, 3.0, -1.0, 0.5]);
        rounding.choose(&mut kept);
        for ((k, up), (l, h)) in kept.iter().zip([true, true, false, false]).zip(low.iter().zip(&high)) {
            assert_eq!(*k > 0.5 * (l + h), up, "{k}");
        }
    }

    /// d(value)/d(logit) by differences, and a pull that grows and points outward.
    #[test]
    fn the_gradient_of_a_rounding_is_that_of_its_values() {
        let (low, high) = (vec![0.5, -1.0], vec![1.0, -0.5]);
        let mut rounding = Rounding::new(&[0.7, -0.6], low, high);
        let mut gradient = vec![1.0, -2.0];
        rounding.turn(&mut gradient, 0.5, 0.0);
        let before = rounding.values();
        rounding.logits.values.iter_mut().for_each(|v| *v += 1e-3);
        for (i, (a, b)) in rounding.values().iter().zip(before).enumerate() {
            let slope = (a - b) / 1e-3 * if i == 0 { 0.5 } else { -1.0 };
            assert!((slope - gradient[i]).abs() < 1e-3, "{slope} {}", gradient[i]);
        }
        let mut pulled = vec![1.0, -2.0];
        rounding.turn(&mut pulled, 0.5, 1.0);
        assert!(pulled[0] > gradient[0] && pulled[1] < gradient[1], "{pulled:?} {gradient:?}");
    }
}
