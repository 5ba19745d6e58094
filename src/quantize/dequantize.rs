//! A quantized checkpoint back to BF16: what its weights are worth, for tools that read nothing else.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::{QuantizeError, describe};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::kv;
use crate::checkpoint::dialect::store::{Content, content};
use crate::checkpoint::fused::Fused;
use crate::checkpoint::fused_write::{FusedLayout, together};
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::write::{FolderWriter, Pending, SHARD_BYTES, float_bytes, metadata};
use crate::formats::scheme::Scheme;
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// Matrices that fp_quant stores beside a linear.
const ROTATIONS: [&str; 2] = ["forward_hadamard_matrix", "backward_hadamard_matrix"];

/// What writing the BF16 model did.
#[derive(Clone, Debug, Default)]
pub struct Dequantized {
    /// Linears whose weights were dequantized.
    pub modules: usize,
    /// Tensors that have no place in a BF16 model: scales of inputs and of the KV cache.
    pub dropped: Vec<String>,
}

/// Writes every weight as its codes times its scales, computed in f32 and rounded to BF16 once; a scale that AWQ left on
/// the input goes into the weight's columns, a rotation of the input (fp_quant) into its rows. How inputs were quantized is
/// lost. One tensor is in memory at a time.
///
/// # Errors
/// When nothing is quantized, the checkpoint is faulty, or `out` cannot be written.
pub fn dequantize(checkpoint: &Checkpoint, out: &Path) -> Result<Dequantized, QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?.untied_where_stored(checkpoint)?;
    let modules: BTreeMap<String, Module> = config.modules().into_iter().map(|m| (m.name.clone(), m)).collect();
    describe::plain_beside(checkpoint)?;
    let mut report = Dequantized::default();
    let mut quantized = BTreeSet::new();
    let mut fused: BTreeMap<String, Vec<&Module>> = BTreeMap::new();
    for (name, m) in &modules {
        let linear = checkpoint.linear(name, m.role)?;
        if !linear.element.is_float() {
            if let Some(place) = checkpoint.fused(name) {
                fused.entry(place.stem().to_owned()).or_default().push(m);
            }
            quantized.insert(name.clone());
        }
    }
    if quantized.is_empty() && !checkpoint.announced.fp8_kv_cache {
        return Err(QuantizeError::Nothing(checkpoint.tensors.folder().into()));
    }
    report.modules = quantized.len();
    let store = &checkpoint.tensors;
    let mut tensors: Vec<Pending<'_, QuantizeError>> = Vec::new();
    for tensor in store.names() {
        if let Some((stem, suffix)) = fused.keys().find_map(|s| Some((s, tensor.strip_prefix(s.as_str())?))) {
            // The first of them stands for all, the bias for itself.
            match suffix {
                "" | "_blocks" => tensors.push(experts(checkpoint, fused[stem].clone())),
                "_input_scale" => report.dropped.push(store.stored_name(tensor)),
                "_bias" => tensors.extend(Pending::copy(store, tensor)),
                _ => {}
            }
            continue;
        }
        let (owner, suffix) = tensor.rsplit_once('.').unwrap_or(("", tensor));
        match content(suffix).filter(|_| quantized.contains(owner)) {
            Some(Content::Elements) => tensors.push(weight(checkpoint, &modules[owner])),
            Some(Content::Input) => report.dropped.push(store.stored_name(tensor)),
            Some(Content::Scales | Content::Global | Content::Factors) => {}
            None if ROTATIONS.contains(&suffix) && quantized.contains(owner) => {}
            None if kv::is_scale(tensor) => report.dropped.push(store.stored_name(tensor)),
            None => tensors.extend(Pending::copy(store, tensor)),
        }
    }
    tensors.extend(Pending::aside(store));
    let writer = FolderWriter::create(out)?;
    let from = [("recoup_dequantized_from", checkpoint.announced.dialect.to_string())];
    writer.tensors(tensors, SHARD_BYTES, &metadata(from))?;
    let mut plain = checkpoint.whole_config.value().clone();
    if let Some(map) = plain.as_object_mut() {
        map.shift_remove("quantization_config");
        map.shift_remove("compression_config");
    }
    writer.json("config.json", &plain)?;
    writer.copy_text_files(checkpoint.tensors.folder())?;
    writer.commit()?;
    Ok(report)
}

/// A projection of all experts of a layer, which are stored in one tensor, in BF16: [E, K, N].
fn experts<'a>(checkpoint: &'a Checkpoint, modules: Vec<&'a Module>) -> Pending<'a, QuantizeError> {
    let place = |m: &&Module| Some((checkpoint.fused(&m.name)?, m.role));
    let members: Vec<(Fused, LinearRole)> = modules.iter().filter_map(place).collect();
    let stem = members.first().map_or_else(String::new, |(place, _)| checkpoint.tensors.stored_name(place.stem()));
    together(FusedLayout::Plain, Scheme::None, &stem, members, move |i| {
        checkpoint.tensors.release_pages();
        let mut linear = checkpoint.linear(&modules[i].name, modules[i].role)?;
        linear.data = float_bytes(Dtype::BF16, &linear.decode()).into();
        Ok(Cow::Owned(linear))
    })
}

/// The weight of a linear in BF16.
fn weight<'a>(checkpoint: &'a Checkpoint, m: &'a Module) -> Pending<'a, QuantizeError> {
    let name = checkpoint.tensors.stored_name(&format!("{}.weight", m.name));
    Pending::new(name, Dtype::BF16, &[m.role.n, m.role.k], || {
        let linear = checkpoint.linear(&m.name, m.role)?;
        let mut w = linear.decode();
        if let Some(scale) = &linear.pre_quant_scale {
            w.chunks_mut(m.role.k).for_each(|row| row.iter_mut().zip(scale).for_each(|(w, s)| *w *= s));
        }
        if let Some(rotation) = &linear.rotation {
            w.par_chunks_mut(m.role.k).for_each(|row| rotation.fold(row));
        }
        checkpoint.tensors.release_pages();
        Ok(w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect())
    })
}
