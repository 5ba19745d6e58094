//! A quantized checkpoint in another dialect: the same codes and block scales under that dialect's names, with its
//! configuration. Nothing is rounded again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;

use super::export::plain_cache;
use super::{QuantizeError, describe};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::store::{content, store};
use crate::checkpoint::dialect::{Dialect, Tool, kv};
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, metadata};
use crate::formats::linear::LinearTensors;
use crate::formats::scheme::Scheme;
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// What converting did.
#[derive(Clone, Debug, Default)]
pub struct Converted {
    /// Quantized linears.
    pub modules: usize,
    /// Global scales that no reciprocal equals: off by one part in 2^24 at most.
    pub inexact: usize,
    /// Where engines compute otherwise in the new dialect although every weight is the same.
    pub notes: BTreeSet<String>,
}

/// Writes `checkpoint` to `out` in `dialect`, one tensor in memory at a time.
///
/// # Errors
/// When nothing is quantized, a module's format has no name in `dialect`, the checkpoint is faulty, or `out` cannot be
/// written.
pub fn convert(checkpoint: &Checkpoint, dialect: Dialect, out: &Path) -> Result<Converted, QuantizeError> {
    let tool = dialect.tool().ok_or(QuantizeError::Dialect(dialect))?;
    let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
    let modules = config.modules();
    let mut report = Converted::default();
    describe::plain_beside(checkpoint)?;
    let mut assigned: Vec<(&Module, Scheme)> = Vec::new();
    let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
    let mut quantized = BTreeSet::new();
    for m in &modules {
        let linear = checkpoint.linear(&m.name, m.role)?;
        let fail = |detail: String| QuantizeError::Module { module: m.name.clone(), detail };
        if linear.rotation.is_some() {
            return Err(fail(format!(
                "has its input rotated (fp_quant), which the {dialect} dialect has no place for"
            )));
        }
        if checkpoint.is_fused(&m.name) && !linear.element.is_float() {
            return Err(fail(
                "is stored in one tensor with the layer's other experts, which `convert` does not write".into(),
            ));
        }
        let scheme = Scheme::of(&linear).ok_or_else(|| {
            fail(format!(
                "holds {:?} weights and {} inputs, a pair that `convert` does not know",
                linear.element, linear.activation
            ))
        })?;
        if m.is_quantizable() {
            assigned.push((m, scheme));
        }
        if scheme == Scheme::None {
            continue;
        }
        if !m.is_quantizable() {
            return Err(fail(
                "is quantized, which `convert` knows of the blocks' linears, the embedding and the head only".into(),
            ));
        }
        if !tool.says_at(scheme, m.place()) {
            return Err(fail(format!("is {scheme}, which the {dialect} dialect has no name for among {}", m.place())));
        }
        if linear.pre_quant_scale.is_some() {
            return Err(fail(
                "has AWQ's scale on its input (pre_quant_scale), which the other dialect has no place for; convert to \
                 bf16 and quantize again"
                    .into(),
            ));
        }
        report.modules += 1;
        report.notes.extend(difference(&linear, scheme, checkpoint.announced.dialect, tool));
        let stored = store(tool, &linear, scheme);
        report.inexact += stored.inexact;
        tensors.push(Pending::together(
            stored.parts.into_iter().map(|(part, _)| part.of(&checkpoint.tensors.stored_name(&m.name))).collect(),
            move || {
                checkpoint.tensors.release_pages();
                let stored = store(tool, &checkpoint.linear(&m.name, m.role)?, scheme);
                Ok(stored.parts.into_iter().map(|(_, bytes)| bytes).collect())
            },
        ));
        quantized.insert(m.name.as_str());
    }
    if report.modules == 0 {
        plain_cache(checkpoint)?;
        return Err(QuantizeError::Nothing(checkpoint.tensors.folder().into()));
    }
    let mut kv_cache = BTreeMap::new();
    let attentions = if checkpoint.unit_kv_scales { Vec::new() } else { config.attentions() };
    for (_, module, _) in attentions {
        if let Some(scales) = checkpoint.kv_scales(&module)? {
            kv_cache.extend(kv::written(&module).into_iter().zip([scales.k, scales.v]));
        }
    }
    for (name, &scale) in &kv_cache {
        let bytes = move || Ok(scale.to_le_bytes().to_vec());
        let name = checkpoint.tensors.stored_name(name);
        tensors.push(Pending::new(name, Dtype::F32, tool.layout().one, bytes));
    }
    let own = |name: &str| {
        name.rsplit_once('.').is_some_and(|(module, suffix)| quantized.contains(module) && content(suffix).is_some())
    };
    let others = checkpoint.tensors.names().filter(|name| !own(name) && !kv::is_scale(name));
    tensors.extend(others.filter_map(|name| Pending::copy(&checkpoint.tensors, name)));
    tensors.extend(Pending::aside(&checkpoint.tensors));
    let writer = FolderWriter::create(out)?;
    let from = [("recoup_converted_from", checkpoint.announced.dialect.to_string())];
    writer.tensors(tensors, SHARD_BYTES, &metadata(from))?;
    let model = describe::assigned(&config, &assigned, checkpoint.announced.fp8_kv_cache, Some(&checkpoint.tensors));
    model.write(tool, checkpoint.whole_config.value(), &writer)?;
    writer.copy_text_files(checkpoint.tensors.folder())?;
    writer.commit()?;
    Ok(report)
}

/// Where engines quantize inputs otherwise in the dialect `to` than in `from`.
fn difference(linear: &LinearTensors<'_>, scheme: Scheme, from: Dialect, to: &dyn Tool) -> Option<String> {
    let (here, there) = (linear.activation, to.input(scheme).with(1.0, to.mx_rule()));
    // Calibrated scales are taken along as they are.
    if scheme.has_input_scale() || here == there {
        return None;
    }
    let to = to.name();
    if here.to_string() == there.to_string() {
        return Some(format!(
            "{here} inputs: the {from} and the {to} dialect round the shared exponent differently when a model runs"
        ));
    }
    Some(format!(
        "{scheme}: when a model runs, inputs are {here} in the {from} dialect and {there} in the {to} dialect"
    ))
}
