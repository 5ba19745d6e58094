//! Calibrated weights into a folder: what every module becomes is decided before the first byte is written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::auto::{TABLE_FILE, Table};
use super::calibrate::{self, Calibration};
use super::encode::{self, Peaks};
use super::gptq::Prepared;
use super::recipe::{KvCache, Recipe, ScaleChoice};
use super::{QuantizeError, Scheme, describe};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::store::{parts, store};
use crate::checkpoint::dialect::{Dialect, Tool};
use crate::checkpoint::fused::Fused;
use crate::checkpoint::fused_write::{FusedLayout, together};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, metadata};
use crate::formats::linear::LinearTensors;
use crate::formats::{LEAST, e4m3, scalable};
use crate::model::ModelConfig;
use crate::model::modules::{Module, Part};

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

/// Quantizes the linears that `recipe` names and writes `out`.
///
/// `calibration` holds the largest magnitudes of inputs (and of keys and values); `prepared` weights are written as they
/// are; `table` is kept beside them. Transformations that the recipe asks for (smoothing, calibrated rounding) are not done here: see [`super::apply`].
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
    let modules: Vec<Module> = config.modules().into_iter().filter(Module::is_quantizable).collect();
    let plan = Plan::new(checkpoint, &modules, calibration, recipe, dialect, tool)?;
    let (kv, kv_notes) = kv_scales(checkpoint, &config, calibration, recipe)?;

    let writer = FolderWriter::create(out)?;
    let from = [("recoup_recipe", recipe.name.clone()), ("recoup_calibration", calibration.description.clone())];
    let (tensors, bytes_after) = plan.tensors(checkpoint, prepared, recipe.block_scales, &kv);
    writer.tensors(tensors, SHARD_BYTES, &metadata(from))?;
    let linears: Vec<(&Module, Scheme)> = modules.iter().zip(plan.schemes.iter().copied()).collect();
    let model = describe::assigned(&config, &linears, recipe.kv_cache.is_some(), Some(&checkpoint.tensors));
    model.write(tool, checkpoint.whole_config.value(), &writer)?;
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
pub(super) fn plain_cache(checkpoint: &Checkpoint) -> Result<(), QuantizeError> {
    if checkpoint.announced.fp8_kv_cache {
        return Err(QuantizeError::KvCache(checkpoint.tensors.folder().into()));
    }
    Ok(())
}

/// FP8 scales of keys and values by tensor name, and what is to be said of them.
fn kv_scales(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    calibration: &Calibration,
    recipe: &Recipe,
) -> Result<(BTreeMap<String, f32>, Vec<String>), QuantizeError> {
    let (mut out, mut notes) = (BTreeMap::new(), Vec::new());
    if recipe.kv_cache != Some(KvCache::Fp8) {
        return Ok((out, notes));
    }
    for names in calibrate::kv_names(config).into_values() {
        for name in names {
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
        Part::MambaIn => {
            let layer = parent.rsplit_once('.').map_or("", |(layer, _)| layer);
            vec![format!("{layer}.norm.weight")]
        }
        _ => Vec::new(),
    }
}

/// Refuses a scheme that `tool` cannot state, or not where the module is stored.
pub(super) fn sayable(
    checkpoint: &Checkpoint,
    m: &Module,
    scheme: Scheme,
    tool: &dyn Tool,
) -> Result<(), QuantizeError> {
    let fail = |detail: String| Err(QuantizeError::Module { module: m.name.clone(), detail });
    let (dialect, place) = (tool.name(), m.place());
    if scheme == Scheme::None {
        return Ok(());
    }
    if !tool.says(scheme) {
        return fail(format!("the {dialect} dialect has no {scheme}; choose another dialect or recipe"));
    }
    if checkpoint.stays_fused(&m.name) {
        return match tool.fused(scheme) {
            Some(_) => Ok(()),
            None => fail(format!(
                "is stored in one tensor with the layer's other experts, for which the {dialect} dialect has no {scheme}"
            )),
        };
    }
    match tool.says_at(scheme, place) {
        true => Ok(()),
        false => {
            fail(format!("the {dialect} dialect has no {scheme} for {place}; leave it plain or choose another format"))
        }
    }
}

/// What the tensor of each module is called that is stored in one with other experts and is to be quantized.
///
/// # Errors
/// When those in one tensor are of different schemes.
fn stems(
    checkpoint: &Checkpoint,
    modules: &[Module],
    schemes: &[Scheme],
) -> Result<BTreeMap<String, String>, QuantizeError> {
    let mut seen: BTreeMap<String, (&Module, Scheme)> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for (m, &scheme) in modules.iter().zip(schemes) {
        let Some(fused) = checkpoint.fused(&m.name).filter(Fused::stays) else { continue };
        let (first, other) = *seen.entry(fused.stem().to_owned()).or_insert((m, scheme));
        if other != scheme {
            let other = if other == Scheme::None { "plain".into() } else { other.to_string() };
            let detail = format!(
                "is stored in one tensor with `{}`, which the recipe makes {other}; one rule has to hold for both",
                first.name
            );
            return Err(QuantizeError::Module { module: m.name.clone(), detail });
        }
        if scheme != Scheme::None {
            out.insert(m.name.clone(), fused.stem().to_owned());
        }
    }
    Ok(out)
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
        if recipe.kv_cache.is_some() && !tool.says_fp8_cache() {
            return Err(QuantizeError::Calibration(format!("the {dialect} dialect has no FP8 KV cache")));
        }
        assigned().try_for_each(|(m, scheme)| sayable(checkpoint, m, *scheme, tool))?;
        let stems = stems(checkpoint, modules, &schemes)?;
        let inputs = calibration.shared(modules);
        let unreached = assigned().filter(|(m, s)| s.has_input_scale() && !calibration.amax.contains_key(&m.name));
        let unreached: Vec<String> = unreached.map(|(m, _)| m.name.clone()).collect();
        let mut own = Vec::new();
        let mut fused: BTreeMap<String, f32> = BTreeMap::new();
        for (m, scheme) in modules.iter().zip(&schemes) {
            let amax = if *scheme == Scheme::None { 0.0 } else { encode::weight_amax(checkpoint, m, *scheme)? };
            checkpoint.tensors.release_pages();
            own.push(amax);
            let shared = fused.entry(Self::key(m, *scheme, tool, &stems)).or_default();
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
            let fused = fused.get(&Self::key(m, *scheme, tool, &stems)).copied().unwrap_or(own);
            peaks.push(Peaks { fused, input });
        }
        Ok(Self { tool, modules, schemes, peaks, unreached, notes })
    }

    /// Modules with the same key share the scale of their weights: all that are stored in one tensor, too.
    fn key(m: &Module, scheme: Scheme, tool: &dyn Tool, stems: &BTreeMap<String, String>) -> String {
        if let Some(stem) = stems.get(&m.name) {
            return stem.clone();
        }
        let key = if encode::shares_scale(m, scheme, tool) { m.fusion_key() } else { m.name.clone() };
        format!("{scheme} {key}")
    }

    /// Every tensor of the new checkpoint, and the bytes of those that are new.
    fn tensors(
        &'a self,
        checkpoint: &'a Checkpoint,
        prepared: &'a BTreeMap<String, Prepared>,
        choice: ScaleChoice,
        kv: &BTreeMap<String, f32>,
    ) -> (Vec<Pending<'a, QuantizeError>>, u64) {
        let mut by_weight: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (i, m) in self.modules.iter().enumerate() {
            by_weight.entry(checkpoint.weight_name(&m.name)).or_default().push(i);
        }
        let tensors_in = &checkpoint.tensors;
        let (mut tensors, mut bytes) = (Vec::new(), 0);
        for name in tensors_in.names() {
            let members = by_weight.remove(name).filter(|m| m.iter().any(|i| self.schemes[*i] != Scheme::None));
            let Some(members) = members else {
                let Some(view) = tensors_in.peek(name) else { continue };
                tensors.push(Pending::new(tensors_in.stored_name(name), view.dtype, view.shape, move || {
                    tensors_in.release_pages();
                    view.expect_finite()?;
                    Ok(view.bytes.to_vec())
                }));
                continue;
            };
            let new: Vec<_> = match members.iter().any(|i| checkpoint.stays_fused(&self.modules[*i].name)) {
                true => vec![self.together(checkpoint, members, prepared, choice)],
                false => members.into_iter().map(|i| self.apart(checkpoint, i, prepared, choice)).collect(),
            };
            bytes += new.iter().map(Pending::bytes).sum::<u64>();
            tensors.extend(new);
        }
        for (name, &scale) in kv {
            let name = tensors_in.stored_name(name);
            let one = Pending::new(name, Dtype::F32, self.tool.layout().one, move || Ok(scale.to_le_bytes().to_vec()));
            bytes += one.bytes();
            tensors.push(one);
        }
        tensors.extend(Pending::aside(tensors_in));
        (tensors, bytes)
    }

    /// The tensors of module `i` by itself.
    fn apart(
        &'a self,
        checkpoint: &'a Checkpoint,
        i: usize,
        prepared: &'a BTreeMap<String, Prepared>,
        choice: ScaleChoice,
    ) -> Pending<'a, QuantizeError> {
        let (m, scheme, tool) = (&self.modules[i], self.schemes[i], self.tool);
        let stored = checkpoint.tensors.stored_name(&m.name);
        if scheme == Scheme::None {
            // Was stored in one tensor with others that are quantized.
            let dtype =
                checkpoint.tensors.peek(&checkpoint.weight_name(&m.name)).map_or(Dtype::BF16, |view| view.dtype);
            return Pending::new(format!("{stored}.weight"), dtype, &[m.role.n, m.role.k], move || {
                checkpoint.tensors.release_pages();
                Ok(checkpoint.linear(&m.name, m.role)?.data.into_owned())
            });
        }
        let specs = parts(tool, scheme, m.role.n, m.role.k).into_iter().map(|p| p.of(&stored));
        Pending::together(specs.collect(), move || {
            checkpoint.tensors.release_pages();
            let linear = self.linear(checkpoint, i, prepared, choice)?;
            Ok(store(tool, &linear, scheme).parts.into_iter().map(|(_, bytes)| bytes).collect())
        })
    }

    /// What module `i` becomes: what was prepared, or its weight to nearest.
    fn linear<'p>(
        &self,
        checkpoint: &Checkpoint,
        i: usize,
        prepared: &'p BTreeMap<String, Prepared>,
        choice: ScaleChoice,
    ) -> Result<Cow<'p, LinearTensors<'static>>, QuantizeError> {
        let (m, scheme, peaks) = (&self.modules[i], self.schemes[i], self.peaks[i]);
        Ok(match prepared.get(&m.name) {
            Some(p) if scheme.is_four_bit() => Cow::Borrowed(&p.linear),
            _ => Cow::Owned(encode::encode(checkpoint, m, scheme, self.tool, choice, peaks)?),
        })
    }

    /// A projection of all experts of a layer, which are stored in one tensor: `members` are its modules.
    fn together(
        &'a self,
        checkpoint: &'a Checkpoint,
        members: Vec<usize>,
        prepared: &'a BTreeMap<String, Prepared>,
        choice: ScaleChoice,
    ) -> Pending<'a, QuantizeError> {
        let place = |i: &usize| Some((checkpoint.fused(&self.modules[*i].name)?, self.modules[*i].role));
        let places: Vec<(Fused, LinearRole)> = members.iter().filter_map(place).collect();
        let stem = places.first().map_or_else(String::new, |(place, _)| checkpoint.tensors.stored_name(place.stem()));
        let scheme = members.first().map_or(Scheme::None, |i| self.schemes[*i]);
        let layout = self.tool.fused(scheme).unwrap_or(FusedLayout::Plain);
        together(layout, scheme, &stem, places, move |i| {
            checkpoint.tensors.release_pages();
            self.linear(checkpoint, members[i], prepared, choice)
        })
    }
}
