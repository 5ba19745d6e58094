//! A whole recipe, in order: rotate, smooth, calibrate, choose formats, round, write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::auto::{self, Table};
use super::calibrate::{self, Calibration};
use super::export::{Report, plain_cache, quantize, sayable};
use super::gptq::{self, Prepared, Rounded, Target};
use super::recipe::{Recipe, Rule};
use super::text::CalibrationText;
use super::{QuantizeError, Scheme, encode, rotate, smooth, space};
use crate::backend::{Backend, BackendError, NUMERICS_VERSION};
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::fused::FusedTensor;
use crate::checkpoint::identity::{identity, value_hash};
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, float_bytes};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::model::ModelConfig;
use crate::model::modules::Module;
use crate::output::{self, Claim};

/// Raised when a recipe makes other bytes of the same model than before (2: GPTQ of experts by the tokens that reach them).
const ROUNDING_VERSION: u32 = 2;

/// Where a whole recipe writes, and what it takes from an earlier run.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// The quantized model.
    pub out: &'a Path,
    /// The plain model that it was rounded from, where it is to be kept.
    pub unrounded: Option<&'a Path>,
    /// A table of sensitivities measured before, to choose formats by instead of measuring.
    pub measured: Option<&'a Table>,
}

/// A model that a recipe made, with the plain one that it was rounded from.
#[derive(Clone, Debug)]
pub struct Made {
    pub quantized: PathBuf,
    pub unrounded: PathBuf,
}

/// [`apply`] in the folder `within`, once for all that decides the result: a run that goes on never takes a model that
/// something else gave. `identity` is the checkpoint's. The backend is made only if there is something to do.
///
/// # Errors
/// Those of [`apply`] and of `backend`.
pub fn apply_once<B: Backend + Clone>(
    (checkpoint, identity): (&Checkpoint, &Value),
    backend: impl FnOnce() -> Result<B, BackendError>,
    text: &CalibrationText,
    recipe: &Recipe,
    within: &Path,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Made, QuantizeError> {
    let key = json!({"teacher": identity, "recipe": recipe, "text": text.sequences, "numerics": NUMERICS_VERSION,
        "version": env!("CARGO_PKG_VERSION"), "rounding": ROUNDING_VERSION});
    let key = value_hash(&key);
    let place = |what: &str| within.join(format!("{what}-{}-{}", recipe.name, &key[..12]));
    let made = Made { quantized: place("student"), unrounded: place("unrounded") };
    if made.quantized.exists() {
        return Ok(made);
    }
    // Of a run that was killed in between.
    if made.unrounded.exists() {
        let failed = |e| CheckpointError::io(&made.unrounded, "remove", e);
        std::fs::remove_dir_all(&made.unrounded).map_err(failed)?;
    }
    let places = Places { out: &made.quantized, unrounded: Some(&made.unrounded), measured: None };
    apply(checkpoint, &backend()?, text, recipe, Dialect::ModelOpt, places, progress)?;
    Ok(made)
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
    Places { out, unrounded, measured }: Places<'_>,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Report, QuantizeError> {
    let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
    plain_cache(checkpoint)?;
    let modules: Vec<Module> = ModelConfig::read(&checkpoint.config)?.modules();
    let modules: Vec<Module> = modules.into_iter().filter(Module::is_quantizable).collect();
    let assigned = |recipe: &Recipe| -> Result<BTreeMap<String, Scheme>, QuantizeError> {
        Ok(modules.iter().map(|m| m.name.clone()).zip(recipe.assign(&modules)?).collect())
    };
    let mut schemes = assigned(recipe)?;
    // Formats are chosen among for the blocks' linears; embedding and head get what the rules say.
    if let Some(auto) = &recipe.auto {
        for m in modules.iter().filter(|m| m.is_block_linear()) {
            let chosen = schemes.get_mut(&m.name).filter(|s| **s != Scheme::None);
            chosen.into_iter().for_each(|s| *s = auto.smallest());
        }
    }
    let scheme = |m: &Module| schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None);
    for m in modules.iter().filter(|m| scheme(m) != Scheme::None) {
        let auto = recipe.auto.as_ref().filter(|_| m.is_block_linear());
        for s in auto.map_or_else(|| vec![scheme(m)], |auto| auto.schemes.clone()) {
            encode::check_block(m, s)?;
            sayable(checkpoint, m, s, tool)?;
        }
    }
    // Refused now and not after minutes of work; held until the end.
    let claims = std::iter::once(out).chain(unrounded).map(output::folder);
    let claims = claims.collect::<Result<Vec<Claim>, _>>().map_err(CheckpointError::from)?;
    let claim = &claims[0];
    let space = space::needed(checkpoint, &modules, recipe, measured.is_some(), &scheme);
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
        Some(auto) => Some(match measured {
            Some(stored) => stored.again(auto, &modules, &|m| scheme(m) != Scheme::None, &weights)?,
            None => {
                let eligible = |m: &Module| m.is_block_linear() && scheme(m) != Scheme::None;
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
    let decided = table.as_ref().map(|table| {
        let mut decided = table.decided(recipe);
        let beside = modules.iter().filter(|m| !m.is_block_linear() && scheme(m) != Scheme::None);
        decided.rules.extend(beside.map(|m| Rule { modules: m.name.clone(), scheme: scheme(m) }));
        decided
    });
    let recipe = decided.as_ref().unwrap_or(recipe);
    let schemes = assigned(recipe)?;
    let scheme = |m: &Module| schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None);
    let mut rounded = Rounded::default();
    if let Some(options) = recipe.gptq {
        let inputs = calibration.shared(&modules);
        let input = |m: &Module| inputs.get(&m.input_key()).copied().unwrap_or(0.0);
        let target = |m: &Module| {
            let scheme = Some(scheme(m)).filter(|s| s.is_four_bit())?;
            Some(Target { scheme, activation: encode::activation(scheme, tool, input(m)) })
        };
        let all = &mut |done, all| progress("rounding", done, all);
        let job = gptq::Job { tool, options, keep_unrounded: unrounded.is_some() };
        rounded = gptq::gptq(source, backend, &text.sequences, &target, job, all)?;
    }
    if let Some(folder) = unrounded {
        copy(source, &rounded.prepared, folder)?;
    }
    let report = quantize(source, &calibration, recipe, dialect, &rounded.prepared, table.as_ref(), out)?;
    Ok(Report { notes: report.notes.into_iter().chain(rounded.notes).collect(), ..report })
}

/// Writes the same model to another folder, with what was rounded of the weights in `prepared`.
fn copy(source: &Checkpoint, prepared: &BTreeMap<String, Prepared>, out: &Path) -> Result<(), QuantizeError> {
    let writer = FolderWriter::create(out)?;
    let moved = |module: &str| prepared.get(module).filter(|p| !p.unrounded.is_empty());
    let values = |p: &Prepared, dtype| {
        let values: Vec<f32> = p.unrounded.iter().map(|v| v.to_f32()).collect();
        float_bytes(dtype, &values)
    };
    let tensor = |name| {
        let view = source.tensors.peek(name)?;
        let stored = source.tensors.stored_name(name);
        if let Some(p) = str::strip_suffix(name, ".weight").and_then(moved) {
            return Some(Pending::new(stored, view.dtype, view.shape, move || Ok(values(p, view.dtype))));
        }
        let Some(fused) = FusedTensor::of(source, name) else { return Pending::copy(&source.tensors, name) };
        Some(Pending::new(stored, view.dtype, view.shape, move || {
            source.tensors.release_pages();
            view.expect_finite()?;
            let own = |module: &str, _| moved(module).map(|p| values(p, view.dtype));
            Ok(fused.with(view.bytes, &own))
        }))
    };
    let own = source.tensors.names().filter_map(tensor);
    let tensors: Vec<Pending<'_, QuantizeError>> = own.chain(Pending::aside(&source.tensors)).collect();
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
