//! Smoothing: outlying input channels are made smaller and the weights' columns larger, so that blocks of either lose
//! less. The factors go into the norm, into up_proj's rows or into v_proj's rows before the linear, and cost nothing when
//! the model runs.
//!
//! s = x^α / w^(1-α) per channel, x and w what the input and the weight are like there. α is chosen for each layer and
//! place by the error of the quantized linears' outputs. Factors that are powers of two change no bit of what the
//! unquantized model computes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Map;

use super::error::plain;
use super::layerwise::Walk;
use super::linalg::product_transposed;
use super::recipe::Smooth;
use super::refine::{Inputs, refine, settles};
use super::{QuantizeError, encode};
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::modelopt::ModelOpt;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, float_bytes};
use crate::formats::amax;
use crate::formats::nvfp4::BLOCK;
use crate::formats::scheme::Scheme;
use crate::model::ModelConfig;
use crate::model::config::AttentionConfig;
use crate::model::modules::{Module, Part};

/// Tokens on which strengths are judged.
const JUDGED_TOKENS: usize = 256;
/// And on which single channels are.
const REFINED_TOKENS: usize = 1024;

impl Smooth {
    /// Strengths tried. Doing nothing is always tried too.
    fn strengths(self) -> &'static [f32] {
        match self {
            Self::PowerOfTwo | Self::PowerOfTwoChannels | Self::Smoothquant => &[0.25, 0.5, 0.625, 0.75, 0.875, 1.0],
            Self::Awq => &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        }
    }

    /// Whether factors are powers of two, which change no bit of what the unquantized model computes.
    fn is_exact(self) -> bool {
        matches!(self, Self::PowerOfTwo | Self::PowerOfTwoChannels)
    }

    /// The factor of each channel.
    fn factors(self, input: &[f32], weight: &[f32], strength: f32) -> Vec<f32> {
        let exponents = input.iter().zip(weight).map(|(&x, &w)| {
            let says_nothing = x == 0.0 || w == 0.0;
            (!says_nothing).then(|| strength * x.log2() - (1.0 - strength) * w.log2())
        });
        let exponents: Vec<Option<f32>> = exponents.collect();
        if self.is_exact() {
            return exponents.iter().map(|e| e.map_or(1.0, |e| e.round().clamp(-30.0, 30.0).exp2())).collect();
        }
        // Centred, so that what the factors go into keeps its size.
        let known = || exponents.iter().flatten().copied();
        let middle = 0.5 * (known().fold(f32::INFINITY, f32::min) + known().fold(f32::NEG_INFINITY, f32::max));
        exponents.iter().map(|e| e.map_or(1.0, |e| (e - middle).clamp(-13.0, 13.0).exp2())).collect()
    }
}

/// One place that can be smoothed: `into` read what `from` can be divided by.
struct Place<'a> {
    /// Linears that read the smoothed input; their columns are multiplied.
    into: Vec<&'a Module>,
    /// Those of them that are quantized: their outputs are judged.
    judged: Vec<(&'a Module, Scheme)>,
    from: Source<'a>,
}

/// What is divided by the factors.
enum Source<'a> {
    /// The tensor's elements.
    Norm(String),
    /// The linear's rows, and its bias.
    Rows(&'a Module),
    /// v_proj: as `Rows`, one factor for all query heads that share a value head.
    Values(&'a Module),
}

/// The factors that were chosen.
#[derive(Clone, Debug)]
pub struct Smoothing {
    form: Smooth,
    /// What each linear's columns are multiplied by, by module.
    columns: BTreeMap<String, Vec<f32>>,
    /// What each tensor's rows (or elements) are divided by, by tensor.
    rows: BTreeMap<String, Vec<f32>>,
    /// Strength chosen in each place (`None`: left alone), and the error of the outputs then as a share of the error
    /// before, by the first module that reads it.
    pub chosen: Vec<(String, Option<f32>, f64)>,
}

/// Chooses factors for every place in the blocks on `sequences`; `scheme` says what each linear will become.
///
/// # Errors
/// When the model cannot be run or holds what is not finite.
pub fn choose<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    sequences: &[Vec<u32>],
    form: Smooth,
    scheme: &dyn Fn(&Module) -> Scheme,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Smoothing, QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?;
    let attention = plain(&config, "smoothing")?.attention;
    let modules = config.modules();
    let mut walk = Walk::new(checkpoint, backend, sequences)?;
    let mut stream = walk.start()?;
    let mut out = Smoothing { form, columns: BTreeMap::new(), rows: BTreeMap::new(), chosen: Vec::new() };
    for layer in 0..walk.blocks() {
        progress(layer, walk.blocks());
        let own: Vec<&Module> = modules.iter().filter(|m| m.layer == Some(layer)).collect();
        let places = places(layer, &own, form, scheme);
        let wanted: Vec<String> = places.iter().flat_map(|p| &p.judged).map(|(m, _)| m.name.clone()).collect();
        let (after, inputs) = walk.block(layer, &stream, &wanted)?;
        let worth = walk.worth(&after)?;
        stream = after;
        checkpoint.tensors.release_pages();
        for place in &places {
            // Experts see different tokens; together they see all.
            let rows: Vec<&[f32]> =
                place.judged.iter().filter_map(|(m, _)| inputs.get(&m.name)).map(Vec::as_slice).collect();
            let rows = if place.judged.iter().all(|(m, _)| m.expert.is_some()) { &rows[..] } else { &rows[..1] };
            if rows.iter().all(|x| x.iter().all(|v| *v == 0.0)) {
                continue;
            }
            smooth_place(checkpoint, &attention, place, form, &rows.concat(), &worth, &mut out)?;
        }
    }
    progress(walk.blocks(), walk.blocks());
    Ok(out)
}

/// The places of a layer that can be smoothed and are worth it.
fn places<'a>(layer: usize, own: &[&'a Module], form: Smooth, scheme: &dyn Fn(&Module) -> Scheme) -> Vec<Place<'a>> {
    let prefix = format!("model.layers.{layer}");
    let of = |parts: &[Part]| -> Vec<&'a Module> { own.iter().copied().filter(|m| parts.contains(&m.part)).collect() };
    let quantized = |m: &Module| m.is_block_linear() && scheme(m) != Scheme::None;
    let place = |into: Vec<&'a Module>, from: Source<'a>| {
        let judged = into.iter().filter(|m| quantized(m)).map(|m| (*m, scheme(m))).collect();
        Place { into, judged, from }
    };
    let norm = |name: &str, parts: &[Part]| place(of(parts), Source::Norm(format!("{prefix}.{name}.weight")));
    let mut places = vec![
        norm("input_layernorm", &[Part::Q, Part::K, Part::V]),
        norm("post_attention_layernorm", &[Part::Gate, Part::Up, Part::Router]),
    ];
    let (values, outputs) = (of(&[Part::V]), of(&[Part::O]));
    places.extend(values.iter().zip(&outputs).map(|(v, o)| place(vec![o], Source::Values(v))));
    let (ups, downs) = (of(&[Part::Up]), of(&[Part::Down]));
    places.extend(ups.iter().zip(&downs).map(|(up, down)| place(vec![down], Source::Rows(up))));
    places.retain(|p| {
        // What is not quantized is stored in its own type, which holds powers of two times its values but no others.
        let whole = form.is_exact()
            || p.into.iter().all(|m| m.part == Part::Router || quantized(m))
                && match p.from {
                    Source::Norm(_) => true,
                    Source::Rows(m) | Source::Values(m) => quantized(m),
                };
        !p.judged.is_empty() && whole
    });
    places
}

/// Chooses the factors of one place, whose input is `x` [tokens, K], and adds them to `out`.
fn smooth_place(
    checkpoint: &Checkpoint,
    attention: &AttentionConfig,
    place: &Place<'_>,
    form: Smooth,
    x: &[f32],
    worth: &[f32],
    out: &mut Smoothing,
) -> Result<(), QuantizeError> {
    let k = place.into[0].role.k;
    let weights: Vec<(Vec<f32>, Scheme)> = place
        .judged
        .iter()
        .map(|(m, s)| Ok((encode::floats(checkpoint, m)?, *s)))
        .collect::<Result<_, QuantizeError>>()?;
    let norm = match &place.from {
        // Powers of two stay what they are: the norm's type changes where it cannot hold the quotient.
        Source::Norm(name) if !form.is_exact() => Some(checkpoint.tensors.require(name, "it is smoothed")?),
        _ => None,
    };
    let peaks = channel_peaks(x, k);
    let mut input = if form == Smooth::Awq { channel_means(x, k) } else { peaks.clone() };
    let mut weight = vec![0.0; k];
    for (w, _) in &weights {
        let own = if form == Smooth::Awq { block_shares(w, k) } else { channel_peaks(w, k) };
        weight.iter_mut().zip(own).for_each(|(a, b)| *a = f32::max(*a, b));
    }
    if let Source::Values(_) = place.from {
        share_heads(attention, &mut input);
        share_heads(attention, &mut weight);
    }
    let rows = x.len() / k;
    let step = rows.div_ceil(JUDGED_TOKENS).max(1);
    let sample: Vec<f32> = x.chunks(k).step_by(step).flatten().copied().collect();
    let whole = if worth.len() == rows { worth } else { &vec![1.0; rows] };
    let worth: Vec<f32> = whole.iter().step_by(step).copied().collect();
    let error = |factors: &[f32]| output_error(&sample, &worth, &peaks, &weights, factors, k);
    let failed = |e: candle_core::Error| QuantizeError::Module {
        module: place.into[0].name.clone(),
        detail: format!("its outputs cannot be computed: {e}"),
    };
    let plain = error(&vec![1.0; k]).map_err(failed)?;
    let mut best: (Option<f32>, Vec<f32>, f64) = (None, vec![1.0; k], plain);
    for &strength in form.strengths() {
        let mut factors = form.factors(&input, &weight, strength);
        if let Some(norm) = &norm {
            settle(&mut factors, &norm.floats()?, norm.dtype);
        }
        let found = error(&factors).map_err(failed)?;
        if found < best.2 {
            best = (Some(strength), factors, found);
        }
    }
    if let (Smooth::PowerOfTwoChannels, Some(scheme)) = (form, refinable(place)) {
        // More tokens than strengths are judged on: there is one choice for each channel.
        let step = rows.div_ceil(REFINED_TOKENS).max(1);
        let sample: Vec<f32> = x.chunks(k).step_by(step).flatten().copied().collect();
        let worth: Vec<f32> = whole.iter().step_by(step).map(|w| w * w).collect();
        let weights: Vec<&[f32]> = weights.iter().map(|(w, _)| w.as_slice()).collect();
        let mut factors = best.1.clone();
        refine(&Inputs { x: &sample, worth: &worth, peaks: &peaks, weights: &weights, k }, scheme, &mut factors);
        let found = error(&factors).map_err(failed)?;
        if found < best.2 {
            best = (best.0.or(Some(0.0)), factors, found);
        }
    }
    let (strength, factors, found) = best;
    out.chosen.push((place.into[0].name.clone(), strength, found / plain.max(f64::MIN_POSITIVE)));
    if strength.is_none() {
        return Ok(());
    }
    match &place.from {
        Source::Norm(name) => {
            out.rows.insert(name.clone(), factors.clone());
        }
        Source::Rows(m) => out.divide_rows(m, factors.clone()),
        Source::Values(m) => {
            let group = attention.heads / attention.kv_heads * attention.head_dim;
            let own = factors.chunks(group).flat_map(|g| &g[..attention.head_dim]).copied().collect();
            out.divide_rows(m, own);
        }
    }
    for m in &place.into {
        let columns = out.columns.entry(m.name.clone()).or_insert_with(|| vec![1.0; k]);
        columns.iter_mut().zip(&factors).for_each(|(c, f)| *c *= f);
    }
    Ok(())
}

/// For which scheme factors can be refined one by one: the same for all, which has such blocks, and no factor shared between
/// heads.
fn refinable(place: &Place<'_>) -> Option<Scheme> {
    let (_, scheme) = place.judged.first()?;
    let alike = settles(*scheme) && place.judged.iter().all(|(_, s)| s == scheme);
    (alike && !matches!(place.from, Source::Values(_))).then_some(*scheme)
}

/// Makes each factor what dividing the norm by it really does, as the norm's type rounds the quotient.
fn settle(factors: &mut [f32], norm: &[f32], dtype: Dtype) {
    for (f, g) in factors.iter_mut().zip(norm) {
        let stored = round_to(dtype, g / *f);
        *f = if stored == 0.0 || *g == 0.0 || !stored.is_finite() { 1.0 } else { g / stored };
    }
}

fn round_to(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(x).to_f32(),
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Makes all query heads of a group have their group's largest value in each channel, [heads · head_dim].
fn share_heads(attention: &AttentionConfig, peaks: &mut [f32]) {
    let d = attention.head_dim;
    for group in peaks.chunks_mut(attention.heads / attention.kv_heads * d) {
        for channel in 0..d {
            let largest = group.iter().skip(channel).step_by(d).fold(0.0, |a: f32, b| a.max(*b));
            group.iter_mut().skip(channel).step_by(d).for_each(|v| *v = largest);
        }
    }
}

/// Largest magnitude of each column of `rows`.
fn channel_peaks(rows: &[f32], k: usize) -> Vec<f32> {
    let mut peaks = vec![0.0f32; k];
    for row in rows.chunks(k) {
        peaks.iter_mut().zip(row).for_each(|(p, v)| *p = p.max(v.abs()));
    }
    peaks
}

/// Mean magnitude of each column.
fn channel_means(rows: &[f32], k: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; k];
    for row in rows.chunks(k) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(v.abs()));
    }
    sums.iter().map(|s| (s * k as f64 / rows.len() as f64) as f32).collect()
}

/// Mean over the rows of |w| as a share of its block's largest magnitude, per column: AWQ's measure of a weight's channel.
fn block_shares(w: &[f32], k: usize) -> Vec<f32> {
    let mut sums = vec![0.0f64; k];
    for row in w.chunks(k) {
        for (block, sums) in row.chunks(BLOCK).zip(sums.chunks_mut(BLOCK)) {
            let peak = amax(block).max(f32::MIN_POSITIVE);
            sums.iter_mut().zip(block).for_each(|(s, v)| *s += f64::from(v.abs() / peak));
        }
    }
    sums.iter().map(|s| (s * k as f64 / w.len() as f64) as f32).collect()
}

/// Squared error of the quantized linears' outputs on `x`, weighted by `worth`, when inputs are divided and weights
/// multiplied by `factors`.
fn output_error(
    x: &[f32],
    worth: &[f32],
    channel_peaks: &[f32],
    weights: &[(Vec<f32>, Scheme)],
    factors: &[f32],
    k: usize,
) -> candle_core::Result<f64> {
    let peak = channel_peaks.iter().zip(factors).map(|(p, f)| p / f).fold(0.0, f32::max);
    let mut rounded: Vec<Vec<f32>> = weights.iter().map(|(w, _)| w.clone()).collect();
    for w in &mut rounded {
        w.par_chunks_mut(k).for_each(|row| row.iter_mut().zip(factors).for_each(|(w, f)| *w *= f));
    }
    let largest = rounded.iter().map(|w| amax(w)).fold(0.0, f32::max);
    let mut inputs: Option<(Scheme, Vec<f32>)> = None;
    let mut sum = 0.0;
    for ((w, scheme), rounded) in weights.iter().zip(&mut rounded) {
        let q = match &mut inputs {
            Some((s, q)) if s == scheme => q,
            other => {
                let activation = encode::activation(*scheme, &ModelOpt, peak);
                let mut q = x.to_vec();
                q.par_chunks_mut(k).for_each(|row| {
                    row.iter_mut().zip(factors).for_each(|(x, f)| *x /= f);
                    activation.fake_quantize(row);
                });
                &mut other.insert((*scheme, q)).1
            }
        };
        encode::fake_quantize(rounded, k, *scheme, largest);
        let (exact, found) = (product_transposed(x, w, k)?, product_transposed(q, rounded, k)?);
        let n = w.len() / k;
        let rows = exact.par_chunks(n).zip(found.par_chunks(n)).zip(worth);
        let errors =
            rows.map(|((a, b), worth)| a.iter().zip(b).map(|(a, b)| f64::from(worth * (a - b)).powi(2)).sum::<f64>());
        sum += errors.collect::<Vec<f64>>().iter().sum::<f64>();
    }
    Ok(sum)
}

impl Smoothing {
    fn divide_rows(&mut self, m: &Module, factors: Vec<f32>) {
        if m.role.bias {
            self.rows.insert(format!("{}.bias", m.name), factors.clone());
        }
        self.rows.insert(format!("{}.weight", m.name), factors);
    }

    /// A tensor's values after smoothing; `None` where it stays as it is.
    fn apply(
        &self,
        name: &str,
        values: impl FnOnce() -> Result<Vec<f32>, QuantizeError>,
    ) -> Result<Option<Vec<f32>>, QuantizeError> {
        let rows = self.rows.get(name);
        let columns = name.strip_suffix(".weight").and_then(|module| self.columns.get(module));
        if rows.is_none() && columns.is_none() {
            return Ok(None);
        }
        let mut values = values()?;
        if let Some(rows) = rows {
            let width = values.len() / rows.len().max(1);
            values.chunks_mut(width.max(1)).zip(rows).for_each(|(row, f)| row.iter_mut().for_each(|v| *v /= f));
        }
        if let Some(columns) = columns {
            values.chunks_mut(columns.len()).for_each(|row| row.iter_mut().zip(columns).for_each(|(v, f)| *v *= f));
        }
        Ok(Some(values))
    }

    /// Writes the smoothed model to `folder`, tensor by tensor. By powers of two it computes bit for bit what `checkpoint`
    /// does, and a tensor whose type cannot hold the new values exactly (F16 with tiny ones) becomes F32; otherwise the
    /// linears' weights become F32 and only biases are rounded.
    ///
    /// # Errors
    /// When a tensor cannot be read or the folder cannot be written.
    pub fn write(&self, checkpoint: &Checkpoint, folder: &Path) -> Result<(), QuantizeError> {
        let floats = |name: &str| -> Result<Vec<f32>, QuantizeError> {
            Ok(checkpoint.tensors.require(name, "it is smoothed")?.floats()?)
        };
        let modules = ModelConfig::read(&checkpoint.config)?.modules();
        let linears = modules.iter().filter(|m| m.is_block_linear()).map(|m| format!("{}.weight", m.name));
        let linears: BTreeSet<String> = linears.collect();
        let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
        for name in checkpoint.tensors.names() {
            let Some(view) = checkpoint.tensors.peek(name) else { continue };
            let Some(values) = self.apply(name, || floats(name))? else {
                tensors.extend(Pending::copy(&checkpoint.tensors, name));
                continue;
            };
            // Biases of exact forms are rounded: only what is quantized next may need more than its type.
            let may_grow = self.form.is_exact() || linears.contains(name);
            let dtype = if may_grow && !holds(view.dtype, &values) { Dtype::F32 } else { view.dtype };
            tensors.push(Pending::new(checkpoint.tensors.stored_name(name), dtype, view.shape, move || {
                checkpoint.tensors.release_pages();
                let values = self.apply(name, || floats(name))?.unwrap_or_default();
                Ok(float_bytes(dtype, &values))
            }));
        }
        tensors.extend(Pending::aside(&checkpoint.tensors));
        let writer = FolderWriter::create(folder)?;
        writer.tensors(tensors, SHARD_BYTES, &Map::new())?;
        writer.json("config.json", checkpoint.whole_config.value())?;
        writer.copy_text_files(checkpoint.tensors.folder())?;
        Ok(writer.commit()?)
    }
}

/// Whether every value is one of the type.
fn holds(dtype: Dtype, values: &[f32]) -> bool {
    values.iter().all(|&v| match dtype {
        Dtype::BF16 => half::bf16::from_f32(v).to_f32() == v,
        Dtype::F16 => half::f16::from_f32(v).to_f32() == v,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_lie_between_input_and_weight() {
        let two = |x, w, strength| Smooth::PowerOfTwo.factors(&[x], &[w], strength)[0];
        assert_eq!(two(8.0, 0.5, 0.5), 4.0);
        assert_eq!(two(8.0, 0.5, 1.0), 8.0);
        assert_eq!(two(8.0, 0.5, 0.0), 2.0);
        assert_eq!(two(0.0, 0.5, 0.5), 1.0);
        for x in [1e-3f32, 0.7, 3.0, 900.0] {
            assert_eq!(two(x, 0.3, 0.75).to_bits() & 0x007f_ffff, 0);
        }
        let exact = Smooth::Awq.factors(&[2.0, 8.0, 0.0], &[1.0, 1.0, 1.0], 1.0);
        assert_eq!(exact, [0.5, 2.0, 1.0]);
    }

    #[test]
    fn a_norms_type_settles_what_a_factor_is() {
        let mut factors = vec![1e-4];
        settle(&mut factors, &[60.0], Dtype::F16);
        assert_eq!(factors, [1.0], "an infinity divides nothing");
        let mut factors = vec![3.0, 2.0, 5.0];
        settle(&mut factors, &[1.0, 1.0, 0.0], Dtype::BF16);
        assert_eq!(factors[1..], [2.0, 1.0]);
        assert!(factors[0] != 3.0 && (factors[0] - 3.0).abs() < 0.02);
        assert_eq!(1.0 / (1.0 / factors[0]), factors[0]);
    }

    #[test]
    fn a_type_holds_what_it_can_hold() {
        assert!(holds(Dtype::BF16, &[1.0, -0.25]) && !holds(Dtype::BF16, &[1.0 + 1e-5]));
        assert!(holds(Dtype::F16, &[1.0]) && !holds(Dtype::F16, &[2.0f32.powi(-30)]));
    }
}
