//! A whole recipe, in order: rotate, smooth, calibrate, choose formats, round, write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use recoup_ground::shares::Shard;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::auto::{self, Measured, Table};
use super::calibrate::{self, Calibration};
use super::export::{Report, plain_cache, quantize, sayable};
use super::gptq::{self, Prepared, Rounded, Target};
use super::recipe::{Auto, Recipe, Rule};
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

/// Raised when a recipe makes other bytes of the same model than before (2: GPTQ of experts by the tokens that reach them;
/// 3: of MXFP4 and W4A8).
const ROUNDING_VERSION: u32 = 3;

/// Where a whole recipe writes, and what it takes from earlier runs.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// The quantized model.
    pub out: &'a Path,
    /// The plain model that it was rounded from, where it is to be kept.
    pub unrounded: Option<&'a Path>,
    /// A table of sensitivities measured before, to choose formats by instead of measuring.
    pub measured: Option<&'a Table>,
    /// What was found in shares, all of it, instead of finding it.
    pub found: Option<&'a Found>,
}

/// What of a recipe's work several processes can share out: the measuring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// Of a recipe that chooses formats: sensitivities of groups.
    Sensitivities(Measured),
    /// Of another that calibrates: largest magnitudes on sequences.
    Calibration(Calibration),
}

impl Found {
    /// All, from the shares in their order; nothing where they are not of one kind.
    #[must_use]
    pub fn joined(shares: Vec<Self>) -> Option<Self> {
        let (mut measured, mut calibrations) = (Vec::new(), Vec::new());
        for share in shares {
            match share {
                Self::Sensitivities(share) => measured.push(share),
                Self::Calibration(share) => calibrations.push(share),
            }
        }
        match (measured.is_empty(), calibrations.is_empty()) {
            (false, true) => Some(Self::Sensitivities(Measured::joined(measured))),
            (true, false) => Some(Self::Calibration(Calibration::joined(calibrations))),
            _ => None,
        }
    }
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
    let places = Places { out: &made.quantized, unrounded: Some(&made.unrounded), measured: None, found: None };
    apply(checkpoint, &backend()?, text, recipe, Dialect::ModelOpt, places, progress)?;
    Ok(made)
}

/// A recipe for a model: which module becomes what, before formats are chosen.
struct Assigned<'a> {
    checkpoint: &'a Checkpoint,
    recipe: &'a Recipe,
    dialect: Dialect,
    /// Those that can be quantized.
    modules: Vec<Module>,
    schemes: BTreeMap<String, Scheme>,
}

impl<'a> Assigned<'a> {
    /// # Errors
    /// When the recipe does not suit the model, or its dialect cannot say what it makes.
    fn new(checkpoint: &'a Checkpoint, recipe: &'a Recipe, dialect: Dialect) -> Result<Self, QuantizeError> {
        let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
        plain_cache(checkpoint)?;
        let modules: Vec<Module> = ModelConfig::read(&checkpoint.config)?.modules();
        let modules: Vec<Module> = modules.into_iter().filter(Module::is_quantizable).collect();
        let mut schemes = assigned(recipe, &modules)?;
        // Formats are chosen among for the blocks' linears; embedding and head get what the rules say.
        if let Some(auto) = &recipe.auto {
            for m in modules.iter().filter(|m| m.is_block_linear()) {
                let chosen = schemes.get_mut(&m.name).filter(|s| **s != Scheme::None);
                chosen.into_iter().for_each(|s| *s = auto.smallest());
            }
        }
        let own = Self { checkpoint, recipe, dialect, modules, schemes };
        for m in own.modules.iter().filter(|m| own.scheme(m) != Scheme::None) {
            let auto = recipe.auto.as_ref().filter(|_| m.is_block_linear());
            for s in auto.map_or_else(|| vec![own.scheme(m)], |auto| auto.schemes.clone()) {
                encode::check_block(m, s)?;
                sayable(checkpoint, m, s, tool)?;
            }
        }
        Ok(own)
    }

    fn scheme(&self, m: &Module) -> Scheme {
        self.schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None)
    }

    /// Whether the module's format is chosen.
    fn is_chosen(&self, m: &Module) -> bool {
        m.is_block_linear() && self.scheme(m) != Scheme::None
    }

    /// Rotates and smooths, where the recipe says so, into the scratch of `claim`.
    fn prepared<B: Backend + Clone>(
        &self,
        backend: &B,
        text: &CalibrationText,
        claim: &Claim,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<Ground<'a>, QuantizeError> {
        let scheme = |m: &Module| self.scheme(m);
        let mut ground = Ground { checkpoint: self.checkpoint, rotated: None, smoothed: None };
        if let Some(what) = self.recipe.rotate {
            progress("rotating", 0, 1);
            ground.rotated = Some(Scratch::of(claim, "rotated", |folder| {
                rotate::rotate(self.checkpoint, what, &|m| scheme(m) != Scheme::None, folder)
            })?);
        }
        if let Some(form) = self.recipe.smooth {
            let mut shown = |done, all| progress("smoothing", done, all);
            let found = smooth::choose(ground.source(), backend, &text.sequences, form, &scheme, &mut shown)?;
            let smoothed = Scratch::of(claim, "smoothed", |folder| found.write(ground.source(), folder))?;
            ground.smoothed = Some(smoothed);
        }
        Ok(ground)
    }

    /// Largest magnitudes on a share of the text.
    fn calibration<B: Backend + Clone>(
        &self,
        source: &Checkpoint,
        backend: &B,
        text: &CalibrationText,
        shard: Shard,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<Calibration, QuantizeError> {
        let description = text.described();
        let sequences = shard.share(text.sequences.iter().cloned());
        if !self.recipe.calibrates() || sequences.is_empty() && shard != Shard::ALL {
            return Ok(Calibration { description, ..Calibration::default() });
        }
        let mut shown = |done, all| progress("calibrating", done, all);
        calibrate::calibrate(source, backend.clone(), &sequences, &description, &mut shown)
    }

    /// What each group of a share of them loses under each format of `auto`.
    #[allow(clippy::too_many_arguments)]
    fn sensitivities<B: Backend + Clone>(
        &self,
        auto: &Auto,
        (source, calibration): (&Checkpoint, &Calibration),
        backend: &B,
        text: &CalibrationText,
        claim: &Claim,
        shard: Shard,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<Measured, QuantizeError> {
        let eligible = |m: &Module| self.is_chosen(m);
        let mut donors = Vec::new();
        for candidate in auto.schemes.iter().filter(|s| **s != Scheme::None) {
            let one = |folder: &Path| {
                let rule = |m: &Module| Rule { modules: m.name.clone(), scheme: *candidate };
                let rules = self.modules.iter().filter(|m| eligible(m)).map(rule).collect();
                let uniform = Recipe { rules, ..Recipe::uniform(*candidate) };
                quantize(source, calibration, &uniform, self.dialect, &BTreeMap::new(), None, folder).map(|_| ())
            };
            donors.push((*candidate, Scratch::of(claim, candidate.name(), one)?));
        }
        let opened: Vec<(Scheme, &Checkpoint)> = donors.iter().map(|(s, d)| (*s, &d.checkpoint)).collect();
        let windows = &text.sequences[..auto.windows.min(text.sequences.len())];
        let mut shown = |done, all| progress("measuring sensitivity", done, all);
        auto::measure(source, &opened, backend, windows, &auto.schemes, (&eligible, shard), &mut shown)
    }

    /// Formats chosen by the recipe's `auto`, where it has one.
    fn table<B: Backend + Clone>(
        &self,
        ground: (&Checkpoint, &Calibration),
        backend: &B,
        text: &CalibrationText,
        claim: &Claim,
        places: Places<'_>,
        progress: &mut dyn FnMut(&'static str, usize, usize),
    ) -> Result<Option<Table>, QuantizeError> {
        let Some(auto) = &self.recipe.auto else { return Ok(None) };
        let weights =
            identity(&self.checkpoint.tensors, &mut |_, _| {})?["weights"].as_str().unwrap_or_default().to_owned();
        let mut table = match (places.measured, places.found) {
            (Some(stored), _) => stored.again(auto, &self.modules, &|m| self.scheme(m) != Scheme::None, &weights)?,
            (None, Some(Found::Sensitivities(m))) => auto::choose(m.groups.clone(), auto.bits, m.tokens),
            (None, _) => {
                let m = self.sensitivities(auto, ground, backend, text, claim, Shard::ALL, progress)?;
                auto::choose(m.groups, auto.bits, m.tokens)
            }
        };
        table.weights = Some(weights);
        Ok(Some(table))
    }
}

/// What each of `modules` becomes by the rules of `recipe`.
fn assigned(recipe: &Recipe, modules: &[Module]) -> Result<BTreeMap<String, Scheme>, QuantizeError> {
    Ok(modules.iter().map(|m| m.name.clone()).zip(recipe.assign(modules)?).collect())
}

/// A model after rotation and smoothing, where a recipe has these.
struct Ground<'a> {
    checkpoint: &'a Checkpoint,
    rotated: Option<Scratch>,
    smoothed: Option<Scratch>,
}

impl Ground<'_> {
    fn source(&self) -> &Checkpoint {
        self.smoothed.as_ref().or(self.rotated.as_ref()).map_or(self.checkpoint, |s| &s.checkpoint)
    }
}

/// Finds what a share of a recipe's measuring gives; what rotation and smoothing make lies in the scratch of `claim` meanwhile.
///
/// # Errors
/// Those of [`apply`]; when the recipe measures nothing.
pub fn find_share<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    text: &CalibrationText,
    (recipe, dialect): (&Recipe, Dialect),
    claim: &Claim,
    shard: Shard,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Found, QuantizeError> {
    let assigned = Assigned::new(checkpoint, recipe, dialect)?;
    recipe.check_measures()?;
    let space = space::needed(checkpoint, &assigned.modules, recipe, false, &|m: &Module| assigned.scheme(m));
    claim.room("what lies on the way to the measurement", space.out).map_err(CheckpointError::from)?;
    let ground = assigned.prepared(backend, text, claim, progress)?;
    let source = ground.source();
    Ok(match &recipe.auto {
        None => Found::Calibration(assigned.calibration(source, backend, text, shard, progress)?),
        Some(auto) => {
            let calibration = assigned.calibration(source, backend, text, Shard::ALL, progress)?;
            let ground = (source, &calibration);
            Found::Sensitivities(assigned.sensitivities(auto, ground, backend, text, claim, shard, progress)?)
        }
    })
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
    places: Places<'_>,
    progress: &mut dyn FnMut(&'static str, usize, usize),
) -> Result<Report, QuantizeError> {
    let Places { out, unrounded, measured, found } = places;
    let before = Assigned::new(checkpoint, recipe, dialect)?;
    let (modules, scheme) = (&before.modules, |m: &Module| before.scheme(m));
    // Refused now and not after minutes of work; held until the end.
    let claims = std::iter::once(out).chain(unrounded).map(output::folder);
    let claims = claims.collect::<Result<Vec<Claim>, _>>().map_err(CheckpointError::from)?;
    let claim = &claims[0];
    let known = measured.is_some() || matches!(found, Some(Found::Sensitivities(_)));
    let space = space::needed(checkpoint, modules, recipe, known, &scheme);
    let room = |claim: &Claim, bytes| claim.room("the model with what lies on the way to it", bytes);
    room(claim, space.out).map_err(CheckpointError::from)?;
    claims.get(1).map_or(Ok(()), |kept| room(kept, space.unrounded)).map_err(CheckpointError::from)?;
    let ground = before.prepared(backend, text, claim, progress)?;
    let source = ground.source();
    let calibration = match found {
        Some(Found::Calibration(all)) => all.clone(),
        _ => before.calibration(source, backend, text, Shard::ALL, progress)?,
    };
    let table = before.table((source, &calibration), backend, text, claim, places, progress)?;
    let decided = table.as_ref().map(|table| {
        let mut decided = table.decided(recipe);
        let beside = modules.iter().filter(|m| !m.is_block_linear() && scheme(m) != Scheme::None);
        decided.rules.extend(beside.map(|m| Rule { modules: m.name.clone(), scheme: scheme(m) }));
        decided
    });
    let recipe = decided.as_ref().unwrap_or(recipe);
    let schemes = assigned(recipe, modules)?;
    let scheme = |m: &Module| schemes.get(m.name.as_str()).copied().unwrap_or(Scheme::None);
    let mut rounded = Rounded::default();
    if let (Some(options), Some(tool)) = (recipe.gptq, dialect.tool()) {
        let inputs = calibration.shared(modules);
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
