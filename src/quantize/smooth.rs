//! Smoothing by powers of two: outlying input channels are made smaller and the weights' columns larger, so that blocks of
//! either lose less. The factors go into the norm, into up_proj's rows or into v_proj's rows before the linear. As powers
//! of two they change no bit of the unquantized model's results and cost nothing when it runs.
//!
//! s = amax_x^α / amax_w^(1-α) per channel (SmoothQuant), rounded to a power of two. α is chosen for each layer and place
//! by the error of the quantized linears' outputs.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Map;

use super::layerwise::Walk;
use super::linalg::product_transposed;
use super::{QuantizeError, encode};
use crate::backend::cpu::CpuBackend;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::{FolderWriter, SHARD_BYTES, TensorSpec};
use crate::formats::linear::ActivationFormat;
use crate::formats::nvfp4::{self, BLOCK};
use crate::formats::{amax, e2m1, e4m3};
use crate::model::ModelConfig;
use crate::model::modules::{Module, Part};

/// Strengths tried where the preceding factors go into a norm, and elsewhere. Doing nothing is always tried too.
const STRENGTHS: [f32; 6] = [0.25, 0.5, 0.625, 0.75, 0.875, 1.0];
/// Tokens on which strengths are judged.
const JUDGED_TOKENS: usize = 256;

/// One place that can be smoothed: `into` read what `from` can be divided by.
struct Place<'a> {
    /// Linears that read the smoothed input; their columns are multiplied.
    into: Vec<&'a Module>,
    /// Those of them that are quantized: their outputs are judged.
    judged: Vec<&'a Module>,
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
#[derive(Clone, Debug, Default)]
pub struct Smoothing {
    /// What each linear's columns are multiplied by, by module.
    columns: BTreeMap<String, Vec<f32>>,
    /// What each tensor's rows (or elements) are divided by, by tensor.
    rows: BTreeMap<String, Vec<f32>>,
    /// Strength chosen in each place (`None`: left alone), and the error of the outputs then as a share of the error
    /// before, by the first module that reads it.
    pub chosen: Vec<(String, Option<f32>, f64)>,
}

/// Chooses factors for every place in the blocks on `sequences`.
///
/// # Errors
/// When the model cannot be run or holds what is not finite.
pub fn choose(
    checkpoint: &Checkpoint,
    backend: &CpuBackend,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Smoothing, QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?;
    let modules = config.modules();
    let mut walk = Walk::new(checkpoint, backend, sequences)?;
    let mut stream = walk.start()?;
    let mut out = Smoothing::default();
    for layer in 0..walk.blocks() {
        progress(layer, walk.blocks());
        let own: Vec<&Module> = modules.iter().filter(|m| m.layer == Some(layer)).collect();
        let places = places(layer, &own);
        let wanted: Vec<String> = places.iter().flat_map(|p| &p.judged).map(|m| m.name.clone()).collect();
        let (after, inputs) = walk.block(layer, &stream, &wanted)?;
        stream = after;
        for place in &places {
            // Experts see different tokens; together they see all.
            let rows: Vec<&[f32]> =
                place.judged.iter().filter_map(|m| inputs.get(&m.name)).map(Vec::as_slice).collect();
            let rows = if place.judged.iter().all(|m| m.expert.is_some()) { &rows[..] } else { &rows[..1] };
            if rows.iter().all(|x| x.iter().all(|v| *v == 0.0)) {
                continue;
            }
            smooth_place(checkpoint, &config, place, &rows.concat(), &mut out)?;
        }
    }
    progress(walk.blocks(), walk.blocks());
    Ok(out)
}

fn places<'a>(layer: usize, own: &[&'a Module]) -> Vec<Place<'a>> {
    let prefix = format!("model.layers.{layer}");
    let of = |parts: &[Part]| -> Vec<&'a Module> { own.iter().copied().filter(|m| parts.contains(&m.part)).collect() };
    let norm = |name: &str, parts: &[Part]| Place {
        into: of(parts),
        judged: of(parts).into_iter().filter(|m| m.is_block_linear()).collect(),
        from: Source::Norm(format!("{prefix}.{name}.weight")),
    };
    let mut places = vec![
        norm("input_layernorm", &[Part::Q, Part::K, Part::V]),
        norm("post_attention_layernorm", &[Part::Gate, Part::Up, Part::Router]),
    ];
    let pair = |into: &'a Module, from| Place { into: vec![into], judged: vec![into], from };
    let (values, outputs) = (of(&[Part::V]), of(&[Part::O]));
    places.extend(values.iter().zip(&outputs).map(|(v, o)| pair(o, Source::Values(v))));
    let (ups, downs) = (of(&[Part::Up]), of(&[Part::Down]));
    places.extend(ups.iter().zip(&downs).map(|(up, down)| pair(down, Source::Rows(up))));
    places
}

/// Chooses the factors of one place, whose input is `x` [tokens, K], and adds them to `out`.
fn smooth_place(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    place: &Place<'_>,
    x: &[f32],
    out: &mut Smoothing,
) -> Result<(), QuantizeError> {
    let k = place.into[0].role.k;
    let weights: Vec<Vec<f32>> =
        place.judged.iter().map(|m| encode::floats(checkpoint, m)).collect::<Result<_, _>>()?;
    let mut input = channel_peaks(x, k);
    let mut weight = vec![0.0; k];
    for w in &weights {
        weight.iter_mut().zip(channel_peaks(w, k)).for_each(|(a, b)| *a = f32::max(*a, b));
    }
    if let Source::Values(_) = place.from {
        share_heads(config, &mut input);
        share_heads(config, &mut weight);
    }
    let rows = x.len() / k;
    let step = rows.div_ceil(JUDGED_TOKENS).max(1);
    let sample: Vec<f32> = x.chunks(k).step_by(step).flatten().copied().collect();
    let peak = amax(x);
    let error = |factors: &[f32]| output_error(&sample, peak, &input, &weights, factors, k);
    let failed = |e: candle_core::Error| QuantizeError::Module {
        module: place.into[0].name.clone(),
        detail: format!("its outputs cannot be computed: {e}"),
    };
    let plain = error(&vec![1.0; k]).map_err(failed)?;
    let mut best: (Option<f32>, Vec<f32>, f64) = (None, vec![1.0; k], plain);
    for strength in STRENGTHS {
        let factors: Vec<f32> = input.iter().zip(&weight).map(|(x, w)| factor(*x, *w, strength)).collect();
        let found = error(&factors).map_err(failed)?;
        if found < best.2 {
            best = (Some(strength), factors, found);
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
            let group = config.heads / config.kv_heads * config.head_dim;
            let own = factors.chunks(group).flat_map(|g| &g[..config.head_dim]).copied().collect();
            out.divide_rows(m, own);
        }
    }
    for m in &place.into {
        let columns = out.columns.entry(m.name.clone()).or_insert_with(|| vec![1.0; k]);
        columns.iter_mut().zip(&factors).for_each(|(c, f)| *c *= f);
    }
    Ok(())
}

/// The power of two nearest to x^α / w^(1-α); 1 where a channel says nothing.
fn factor(x: f32, w: f32, strength: f32) -> f32 {
    if x == 0.0 || w == 0.0 {
        return 1.0;
    }
    let exponent = strength * x.log2() - (1.0 - strength) * w.log2();
    exponent.round().clamp(-30.0, 30.0).exp2()
}

/// Makes all query heads of a group have their group's largest value in each channel, [heads · head_dim].
fn share_heads(config: &ModelConfig, peaks: &mut [f32]) {
    let d = config.head_dim;
    for group in peaks.chunks_mut(config.heads / config.kv_heads * d) {
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

/// Mean squared error of the NVFP4 linears' outputs on `x` when inputs are divided and weights multiplied by `factors`.
fn output_error(
    x: &[f32],
    peak: f32,
    channel_peaks: &[f32],
    weights: &[Vec<f32>],
    factors: &[f32],
    k: usize,
) -> candle_core::Result<f64> {
    let smoothed = channel_peaks.iter().zip(factors).map(|(p, f)| p / f).fold(0.0, f32::max);
    let global = nvfp4::global_scale(if smoothed == 0.0 { peak } else { smoothed });
    let activation = ActivationFormat::Nvfp4 { global_scale: global };
    let mut q = x.to_vec();
    q.par_chunks_mut(k).for_each(|row| {
        row.iter_mut().zip(factors).for_each(|(x, f)| *x /= f);
        activation.fake_quantize(row);
    });
    let mut rounded: Vec<Vec<f32>> = weights.to_vec();
    for w in &mut rounded {
        w.par_chunks_mut(k).for_each(|row| row.iter_mut().zip(factors).for_each(|(w, f)| *w *= f));
    }
    let largest = rounded.iter().map(|w| amax(w)).fold(f32::MIN_POSITIVE, f32::max);
    let global = nvfp4::global_scale(largest);
    let mut sum = 0.0;
    for (w, rounded) in weights.iter().zip(&mut rounded) {
        rounded.par_chunks_mut(BLOCK).for_each(|block| {
            let scale = e4m3::decode(nvfp4::weight_block_scale(amax(block), global)) * global;
            block.iter_mut().for_each(|w| *w = e2m1::decode(e2m1::encode(*w / scale)) * scale);
        });
        let (exact, found) = (product_transposed(x, w, k)?, product_transposed(&q, rounded, k)?);
        sum +=
            exact.par_iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).collect::<Vec<_>>().iter().sum::<f64>();
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

    /// Writes the smoothed model to `folder`, tensor by tensor. It computes bit for bit what `checkpoint` does; a tensor
    /// whose type cannot hold the new values exactly (F16 with tiny ones) becomes F32.
    ///
    /// # Errors
    /// When a tensor cannot be read or the folder cannot be written.
    pub fn write(&self, checkpoint: &Checkpoint, folder: &Path) -> Result<(), QuantizeError> {
        let floats = |name: &str| -> Result<Vec<f32>, QuantizeError> {
            Ok(checkpoint.tensors.require(name, "it is smoothed")?.floats()?)
        };
        let mut specs = Vec::new();
        for name in checkpoint.tensors.names() {
            let Some(view) = checkpoint.tensors.peek(name) else { continue };
            let exact = match self.apply(name, || floats(name))? {
                Some(values) => holds(view.dtype, &values),
                None => true,
            };
            let dtype = if exact { view.dtype } else { Dtype::F32 };
            specs.push(TensorSpec { name: name.into(), dtype, shape: view.shape.to_vec() });
        }
        let writer = FolderWriter::create(folder)?;
        writer.tensors(&specs, SHARD_BYTES, &Map::new(), |spec| -> Result<Vec<u8>, QuantizeError> {
            match self.apply(&spec.name, || floats(&spec.name))? {
                Some(values) => Ok(to_bytes(spec.dtype, &values)),
                None => Ok(checkpoint.tensors.require(&spec.name, "it is copied")?.bytes.to_vec()),
            }
        })?;
        writer.json("config.json", checkpoint.config.value())?;
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

fn to_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_powers_of_two_between_input_and_weight() {
        assert_eq!(factor(8.0, 0.5, 0.5), 4.0);
        assert_eq!(factor(8.0, 0.5, 1.0), 8.0);
        assert_eq!(factor(8.0, 0.5, 0.0), 2.0);
        assert_eq!(factor(0.0, 0.5, 0.5), 1.0);
        for x in [1e-3f32, 0.7, 3.0, 900.0] {
            assert_eq!(factor(x, 0.3, 0.75).to_bits() & 0x007f_ffff, 0);
        }
    }

    #[test]
    fn a_type_holds_what_it_can_hold() {
        assert!(holds(Dtype::BF16, &[1.0, -0.25]) && !holds(Dtype::BF16, &[1.0 + 1e-5]));
        assert!(holds(Dtype::F16, &[1.0]) && !holds(Dtype::F16, &[2.0f32.powi(-30)]));
    }
}
