//! Post-training quantization: calibrate, encode, export in a dialect that other engines load.

pub mod auto;
pub mod calibrate;
pub mod convert;
pub mod dequantize;
mod encode;
pub mod gptq;
mod layerwise;
mod linalg;
pub mod recipe;
mod refine;
pub mod rotate;
pub mod smooth;
mod space;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Map;
use sha2::{Digest as _, Sha256};

use crate::backend::Backend;
use crate::checkpoint::dialect::store::{parts, store};
use crate::checkpoint::dialect::{Assigned, Dialect, Tool};
use crate::checkpoint::identity::identity;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, TensorSpec, metadata};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::linear::LinearTensors;
pub use crate::formats::scheme::Scheme;
use crate::formats::{LEAST, e4m3, scalable};
use crate::model::modules::{Module, Part};
use crate::model::{LoadError, ModelConfig};
use crate::output::{self, Claim};
use auto::Table;
use calibrate::Calibration;
use encode::Peaks;
pub use recipe::Recipe;
use recipe::Rule;

/// Why a model could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    #[error("calibration: {0}")]
    Calibration(String),
    #[error("recipe `{file}`: {detail}")]
    Recipe { file: String, detail: String },
    #[error("module `{module}`: {detail}")]
    Module { module: String, detail: String },
    #[error("{0}: nothing in it is quantized, it is a plain model already")]
    Nothing(PathBuf),
    #[error("{0}: its KV cache is quantized; `recoup convert` it to BF16 first")]
    KvCache(PathBuf),
    #[error("quantization writes the modelopt or the compressed-tensors dialect, not {0}")]
    Dialect(Dialect),
}

/// What quantizing did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub modules: usize,
    /// Bytes of the quantized linears before and after, scales included.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Modules that no calibration token reached and that took their scale from the modules they share it with.
    pub unreached: Vec<String>,
    /// Places whose input or weight is always zero, or too small for a scale, and why.
    pub notes: Vec<String>,
    /// What was measured and chosen, where the recipe chooses formats itself.
    pub table: Option<Table>,
}

/// A weight that was rounded beforehand.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub linear: LinearTensors<'static>,
    /// What was rounded, [N, K]: the weights, moved to make up for the rounding of others. Empty where it is not kept.
    pub unrounded: Vec<half::bf16>,
}

/// Quantizes the linears of the blocks that `recipe` names and writes `out`.
///
/// `calibration` holds the largest magnitudes of inputs (and of keys and values); `prepared` weights are written as they
/// are; `table` is kept beside them. Transformations that the recipe asks for (smoothing, calibrated rounding) are not done here: see [`apply`].
///
/// Follows nvidia-modelopt 0.47 for the ModelOpt dialect and llm-compressor 0.14 with compressed-tensors 0.20 for the
/// other, bit for bit in weights and weight scales on BF16 models.
///
/// # Errors
/// When the model is quantized already, holds a NaN, has a K that no block divides, the dialect has no such format, or
/// `out` cannot be written.
pub fn quantize(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    recipe: &Recipe,
    dialect: Dialect,
    prepared: &BTreeMap<String, Prepared>,
    table: Option<&Table>,
    out: &Path,
) -> Result<Report, QuantizeError> {
    let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
    plain_cache(checkpoint)?;
    let config = ModelConfig::read(&checkpoint.config)?;
    let (modules, others): (Vec<Module>, Vec<Module>) = config.modules().into_iter().partition(Module::is_block_linear);
    let plan = Plan::new(checkpoint, &modules, calibration, recipe, dialect, tool)?;
    let (kv, kv_notes) = kv_scales(checkpoint, &config, calibration, recipe)?;

    let writer = FolderWriter::create(out)?;
    let from = [("recoup_recipe", recipe.name.clone()), ("recoup_calibration", calibration.description.clone())];
    let (tensors, bytes_after) = plan.tensors(checkpoint, prepared, recipe.block_scales, &kv);
    writer.tensors(tensors, SHARD_BYTES, &metadata(from))?;
    let model = Assigned {
        linears: modules.iter().map(|m| m.name.as_str()).zip(plan.schemes.iter().copied()).collect(),
        others: others.iter().map(|m| m.name.as_str()).collect(),
        fp8_kv_cache: recipe.kv_cache.is_some(),
    };
    model.write(tool, checkpoint.config.value(), &writer)?;
    writer.json("recoup_recipe.json", &serde_json::to_value(recipe).unwrap_or_default())?;
    if let Some(table) = table {
        writer.json(TABLE_FILE, &serde_json::to_value(table).unwrap_or_default())?;
    }
    writer.copy_text_files(checkpoint.tensors.folder())?;
    writer.commit()?;

    let quantized = || modules.iter().zip(&plan.schemes).filter(|(_, s)| **s != Scheme::None);
    Ok(Report {
        modules: quantized().count(),
        bytes_before: quantized().map(|(m, _)| 2 * (m.role.n * m.role.k) as u64).sum(),
        bytes_after,
        unreached: plan.unreached,
        notes: plan.notes.into_iter().chain(kv_notes).collect(),
        table: table.cloned(),
    })
}

/// Scales of a KV cache are calibrated for the weights that they lie beside, and no recipe takes them over.
fn plain_cache(checkpoint: &Checkpoint) -> Result<(), QuantizeError> {
    if checkpoint.announced.fp8_kv_cache {
        return Err(QuantizeError::KvCache(checkpoint.tensors.folder().into()));
    }
    Ok(())
}

/// Where a checkpoint keeps the table that its formats were chosen by.
pub const TABLE_FILE: &str = "recoup_sensitivity.json";

/// FP8 scales of keys and values by tensor name, and what is to be said of them.
fn kv_scales(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    calibration: &Calibration,
    recipe: &Recipe,
) -> Result<(BTreeMap<String, f32>, Vec<String>), QuantizeError> {
    let (mut out, mut notes) = (BTreeMap::new(), Vec::new());
    if recipe.kv_cache.is_none() {
        return Ok((out, notes));
    }
    for layer in 0..config.layers {
        for name in calibrate::kv_names(layer) {
            let Some(&amax) = calibration.amax.get(&name) else {
                let detail = format!("`{name}` is unknown: no key or value was seen; use more or other text");
                return Err(QuantizeError::Calibration(detail));
            };
            if amax < LEAST {
                let projection = name.rsplit_once('.').map_or("", |(module, _)| module);
                let why = why_zero(checkpoint, &[format!("{projection}.weight")], amax);
                notes.push(format!(
                    "what {projection} gives {why}; `{name}` is that of a largest value of {}",
                    scalable(amax)
                ));
            }
            out.insert(name, scalable(amax) / e4m3::MAX);
        }
    }
    Ok((out, notes))
}

/// Why a place is always zero, as the end of a sentence: one of `producers` (the tensors that it comes of) is all zero, or
/// nothing known. `amax` is the largest magnitude that was seen there.
fn why_zero(checkpoint: &Checkpoint, producers: &[String], amax: f32) -> String {
    let zero = |name: &&String| {
        let view = checkpoint.tensors.peek(name).filter(|v| v.is_float());
        view.and_then(|v| v.floats().ok()).is_some_and(|values| values.iter().all(|v| *v == 0.0))
    };
    match producers.iter().find(zero) {
        Some(name) => format!("is always zero: every value of `{name}` is zero"),
        None if amax == 0.0 => "was zero on the whole calibration text".into(),
        None => format!("was at most {amax:e} on the calibration text, too small for a scale, and becomes zero"),
    }
}

/// The tensors whose being all zero makes the input of a module all zero.
fn producers(m: &Module) -> Vec<String> {
    let Some((parent, _)) = m.name.rsplit_once('.') else { return Vec::new() };
    let layer = m.layer.map_or_else(String::new, |l| format!("model.layers.{l}"));
    match m.part {
        Part::Q | Part::K | Part::V => vec![format!("{layer}.input_layernorm.weight")],
        Part::O => vec![format!("{parent}.v_proj.weight")],
        Part::Gate | Part::Up => vec![format!("{layer}.post_attention_layernorm.weight")],
        Part::Down => vec![
            format!("{parent}.up_proj.weight"),
            format!("{parent}.gate_proj.weight"),
            format!("{layer}.post_attention_layernorm.weight"),
        ],
        Part::Embedding | Part::Router | Part::Head => Vec::new(),
    }
}

/// What every module becomes and what its scales come from, decided before anything is written.
struct Plan<'a> {
    tool: &'a dyn Tool,
    modules: &'a [Module],
    schemes: Vec<Scheme>,
    peaks: Vec<Peaks>,
    unreached: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(
        checkpoint: &Checkpoint,
        modules: &'a [Module],
        calibration: &Calibration,
        recipe: &Recipe,
        dialect: Dialect,
        tool: &'a dyn Tool,
    ) -> Result<Self, QuantizeError> {
        let schemes = recipe.assign(modules)?;
        let assigned = || modules.iter().zip(&schemes).filter(|(_, s)| **s != Scheme::None);
        if let Some((m, scheme)) = assigned().find(|(_, s)| !tool.says(**s)) {
            let detail = format!("the {dialect} dialect has no {scheme}; choose another dialect or recipe");
            return Err(QuantizeError::Module { module: m.name.clone(), detail });
        }
        let inputs = calibration.shared(modules);
        let unreached = assigned().filter(|(m, s)| s.has_input_scale() && !calibration.amax.contains_key(&m.name));
        let unreached: Vec<String> = unreached.map(|(m, _)| m.name.clone()).collect();
        let mut own = Vec::new();
        let mut fused: BTreeMap<String, f32> = BTreeMap::new();
        for (m, scheme) in modules.iter().zip(&schemes) {
            let amax = if *scheme == Scheme::None { 0.0 } else { encode::weight_amax(checkpoint, m, *scheme)? };
            checkpoint.tensors.release_pages();
            own.push(amax);
            let shared = fused.entry(Self::key(m, *scheme, tool)).or_default();
            *shared = shared.max(amax);
        }
        let (mut peaks, mut notes) = (Vec::new(), Vec::new());
        for ((m, scheme), own) in modules.iter().zip(&schemes).zip(own) {
            let input = match inputs.get(&m.input_key()) {
                _ if !scheme.has_input_scale() => 0.0,
                None => {
                    let detail = format!(
                        "no token reached `{}`, so the scale of its input is unknown; use more or other text",
                        m.name
                    );
                    return Err(QuantizeError::Calibration(detail));
                }
                Some(&seen) => {
                    if seen < LEAST {
                        let why = why_zero(checkpoint, &producers(m), seen);
                        notes.push(format!(
                            "the input of {} {why}; its scale is that of a largest value of {}",
                            m.name,
                            scalable(seen)
                        ));
                    }
                    // Zero is zero under any scale, and 1 is one that every loader takes.
                    scalable(seen)
                }
            };
            if *scheme != Scheme::None && own > 0.0 && own < LEAST {
                notes.push(format!(
                    "the weights of {} are at most {own:e}, too small for a scale of their own, and become zeros",
                    m.name
                ));
            }
            let fused = fused.get(&Self::key(m, *scheme, tool)).copied().unwrap_or(own);
            peaks.push(Peaks { fused, input });
        }
        Ok(Self { tool, modules, schemes, peaks, unreached, notes })
    }

    /// Modules with the same key share the scale of their weights.
    fn key(m: &Module, scheme: Scheme, tool: &dyn Tool) -> String {
        let key = if encode::shares_scale(m, scheme, tool) { m.fusion_key() } else { m.name.clone() };
        format!("{scheme} {key}")
    }

    /// Every tensor of the new checkpoint, and the bytes of those that are new.
    fn tensors(
        &'a self,
        checkpoint: &'a Checkpoint,
        prepared: &'a BTreeMap<String, Prepared>,
        choice: recipe::ScaleChoice,
        kv: &BTreeMap<String, f32>,
    ) -> (Vec<Pending<'a, QuantizeError>>, u64) {
        let by_weight: BTreeMap<String, usize> =
            self.modules.iter().enumerate().map(|(i, m)| (format!("{}.weight", m.name), i)).collect();
        let tensors_in = &checkpoint.tensors;
        let (mut tensors, mut bytes) = (Vec::new(), 0);
        for name in tensors_in.names() {
            let Some(&i) = by_weight.get(name).filter(|i| self.schemes[**i] != Scheme::None) else {
                let Some(view) = tensors_in.peek(name) else { continue };
                tensors.push(Pending::new(name, view.dtype, view.shape, move || {
                    tensors_in.release_pages();
                    view.expect_finite()?;
                    Ok(view.bytes.to_vec())
                }));
                continue;
            };
            let (m, scheme, peaks, tool) = (&self.modules[i], self.schemes[i], self.peaks[i], self.tool);
            let specs = parts(tool, scheme, m.role.n, m.role.k).into_iter().map(|p| TensorSpec::of(&m.name, p));
            let one = Pending::together(specs.collect(), move || {
                checkpoint.tensors.release_pages();
                let linear = match prepared.get(&m.name) {
                    Some(p) if scheme.is_nvfp4_weight() => Cow::Borrowed(&p.linear),
                    _ => Cow::Owned(encode::encode(checkpoint, m, scheme, tool, choice, peaks)?),
                };
                Ok(store(tool, &linear, scheme).parts.into_iter().map(|(_, bytes)| bytes).collect())
            });
            bytes += one.bytes();
            tensors.push(one);
        }
        for (name, &scale) in kv {
            let one = Pending::new(name, Dtype::F32, self.tool.layout().one, move || Ok(scale.to_le_bytes().to_vec()));
            bytes += one.bytes();
            tensors.push(one);
        }
        (tensors, bytes)
    }
}

/// What a model is calibrated on.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationText {
    /// Token ids.
    pub sequences: Vec<Vec<u32>>,
    /// Where they came from, for the checkpoint's metadata.
    pub description: String,
}

impl CalibrationText {
    /// The description with a hash of the tokens.
    fn described(&self) -> String {
        let mut hash = Sha256::new();
        for sequence in &self.sequences {
            hash.update((sequence.len() as u64).to_le_bytes());
            sequence.iter().for_each(|t| hash.update(t.to_le_bytes()));
        }
        let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("{}; sha256 of the tokens {hex}", self.description)
    }
}

/// Where a whole recipe writes.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// The quantized model.
    pub out: &'a Path,
    /// The plain model that it was rounded from, where it is to be kept.
    pub unrounded: Option<&'a Path>,
}

/// Quantizes by a whole recipe: rotates, smooths, calibrates, rounds and writes, as it says.
///
/// A rotated or smoothed model lies in a folder beside `out` meanwhile.
///
/// # Errors
/// As [`quantize`], [`calibrate::calibrate`], [`smooth::choose`] and [`gptq::gptq`].
pub fn apply<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    text: &CalibrationText,
    recipe: &Recipe,
    dialect: Dialect,
    Places { out, unrounded }: Places<'_>,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Report, QuantizeError> {
    let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
    plain_cache(checkpoint)?;
    let modules: Vec<Module> = ModelConfig::read(&checkpoint.config)?.modules();
    let modules: Vec<Module> = modules.into_iter().filter(Module::is_block_linear).collect();
    let assigned = |recipe: &Recipe| -> Result<BTreeMap<String, Scheme>, QuantizeError> {
        Ok(modules.iter().map(|m| m.name.clone()).zip(recipe.assign(&modules)?).collect())
    };
    let mut schemes = assigned(recipe)?;
    if let Some(auto) = &recipe.auto {
        schemes.values_mut().filter(|s| **s != Scheme::None).for_each(|s| *s = auto.smallest());
    }
    let scheme = |m: &Module| schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None);
    for m in modules.iter().filter(|m| scheme(m) != Scheme::None) {
        let candidates = recipe.auto.as_ref().map_or_else(|| vec![scheme(m)], |auto| auto.schemes.clone());
        candidates.into_iter().try_for_each(|s| encode::check_block(m, s))?;
    }
    // Refused now and not after minutes of work; held until the end.
    let claims = std::iter::once(out).chain(unrounded).map(output::folder);
    let claims = claims.collect::<Result<Vec<Claim>, _>>().map_err(CheckpointError::from)?;
    let claim = &claims[0];
    let space = space::needed(checkpoint, &modules, recipe, &scheme);
    let room = |claim: &Claim, bytes| claim.room("the model with what lies on the way to it", bytes);
    room(claim, space.out).map_err(CheckpointError::from)?;
    claims.get(1).map_or(Ok(()), |kept| room(kept, space.unrounded)).map_err(CheckpointError::from)?;
    let mut rotated = None;
    if let Some(what) = recipe.rotate {
        progress("rotating", 0, 1);
        rotated = Some(Scratch::of(claim, "rotated", |folder| {
            rotate::rotate(checkpoint, what, &|m| scheme(m) != Scheme::None, folder)
        })?);
    }
    let source = rotated.as_ref().map_or(checkpoint, |s: &Scratch| &s.checkpoint);
    let mut smoothed = None;
    if let Some(form) = recipe.smooth {
        let mut shown = |done, all| progress("smoothing", done, all);
        let found = smooth::choose(source, backend, &text.sequences, form, &scheme, &mut shown)?;
        smoothed = Some(Scratch::of(claim, "smoothed", |folder| found.write(source, folder))?);
    }
    let source = smoothed.as_ref().map_or(source, |s: &Scratch| &s.checkpoint);
    let description = text.described();
    let mut calibration = Calibration { description: description.clone(), ..Calibration::default() };
    if recipe.calibrates() {
        let mut shown = |done, all| progress("calibrating", done, all);
        calibration = calibrate::calibrate(source, backend.clone(), &text.sequences, &description, &mut shown)?;
    }
    let weights = match recipe.auto {
        None => String::new(),
        Some(_) => identity(&checkpoint.tensors, &mut |_, _| {})?["weights"].as_str().unwrap_or_default().to_owned(),
    };
    let mut table = match &recipe.auto {
        None => None,
        Some(auto) => Some(match &auto.measured {
            Some(stored) => stored.again(auto, &modules, &|m| scheme(m) != Scheme::None, &weights)?,
            None => {
                let eligible = |m: &Module| scheme(m) != Scheme::None;
                let mut donors = Vec::new();
                for candidate in auto.schemes.iter().filter(|s| **s != Scheme::None) {
                    let one = |folder: &Path| {
                        let rule = |m: &Module| Rule { modules: m.name.clone(), scheme: *candidate };
                        let rules = modules.iter().filter(|m| eligible(m)).map(rule).collect();
                        let uniform = Recipe { rules, ..Recipe::uniform(*candidate) };
                        quantize(source, &calibration, &uniform, dialect, &BTreeMap::new(), None, folder).map(|_| ())
                    };
                    donors.push((*candidate, Scratch::of(claim, candidate.name(), one)?));
                }
                let opened: Vec<(Scheme, &Checkpoint)> = donors.iter().map(|(s, d)| (*s, &d.checkpoint)).collect();
                let windows = &text.sequences[..auto.windows.min(text.sequences.len())];
                let mut shown = |done, all| progress("measuring sensitivity", done, all);
                let (groups, tokens) =
                    auto::measure(source, &opened, backend, windows, &auto.schemes, &eligible, &mut shown)?;
                auto::choose(groups, auto.bits, tokens)
            }
        }),
    };
    if let Some(table) = &mut table {
        table.weights = Some(weights);
    }
    let decided = table.as_ref().map(|t| t.decided(recipe));
    let recipe = decided.as_ref().unwrap_or(recipe);
    let schemes = assigned(recipe)?;
    let scheme = |m: &Module| schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None);
    let mut prepared = BTreeMap::new();
    if let Some(options) = recipe.gptq {
        let inputs = calibration.shared(&modules);
        let input = |m: &Module| inputs.get(&m.input_key()).copied().unwrap_or(0.0);
        let target = |m: &Module| {
            let scheme = Some(scheme(m)).filter(|s| s.is_nvfp4_weight())?;
            Some(encode::activation(scheme, tool, input(m)))
        };
        let all = &mut |done, all| progress("rounding", done, all);
        let job = gptq::Job { tool, options, keep_unrounded: unrounded.is_some() };
        prepared = gptq::gptq(source, backend, &text.sequences, &target, job, all)?;
    }
    if let Some(folder) = unrounded {
        copy(source, &prepared, folder)?;
    }
    quantize(source, &calibration, recipe, dialect, &prepared, table.as_ref(), out)
}

/// Writes the same model to another folder, with what was rounded of the weights in `prepared`.
fn copy(source: &Checkpoint, prepared: &BTreeMap<String, Prepared>, out: &Path) -> Result<(), QuantizeError> {
    let writer = FolderWriter::create(out)?;
    let tensor = |name| {
        let moved = str::strip_suffix(name, ".weight").and_then(|module| prepared.get(module));
        let Some(moved) = moved.filter(|p| !p.unrounded.is_empty()) else {
            return Pending::copy(&source.tensors, name);
        };
        let view = source.tensors.peek(name)?;
        Some(Pending::new(name, view.dtype, view.shape, move || {
            let values: Vec<f32> = moved.unrounded.iter().map(|v| v.to_f32()).collect();
            Ok(to_bytes(view.dtype, &values))
        }))
    };
    let tensors: Vec<Pending<'_, QuantizeError>> = source.tensors.names().filter_map(tensor).collect();
    let mut metadata = Map::new();
    metadata.insert("format".into(), "pt".into());
    writer.tensors(tensors, SHARD_BYTES, &metadata)?;
    writer.copy_settings(source.tensors.folder())?;
    writer.copy_text_files(source.tensors.folder())?;
    Ok(writer.commit()?)
}

/// A checkpoint on the way, among the output's scratch; it goes with this value.
struct Scratch {
    checkpoint: Checkpoint,
    folder: PathBuf,
}

impl Scratch {
    fn of(
        claim: &Claim,
        what: &str,
        write: impl FnOnce(&Path) -> Result<(), QuantizeError>,
    ) -> Result<Self, QuantizeError> {
        let folder = claim.scratch(what);
        let opened = write(&folder).and_then(|()| Ok(Checkpoint::open(&folder)?));
        match opened {
            Ok(checkpoint) => Ok(Self { checkpoint, folder }),
            Err(e) => {
                let _ = std::fs::remove_dir_all(&folder);
                Err(e)
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Floats as the bytes of a type, rounded to it.
fn to_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
