//! Post-training quantization: calibrate, encode, export in a dialect that other engines load.

pub mod calibrate;
mod encode;
mod export;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::write::{FolderWriter, SHARD_BYTES, TensorSpec};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::formats::nvfp4;
use crate::model::modules::Module;
use crate::model::{LoadError, ModelConfig};
use calibrate::Calibration;
use encode::Encoded;

/// What the block linears are quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// NVFP4 weights and activations (W4A4), static activation scale.
    Nvfp4,
    /// FP8 weights and activations, per tensor, static activation scale.
    Fp8,
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nvfp4 => "nvfp4",
            Self::Fp8 => "fp8",
        })
    }
}

/// Why a model could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Backend(#[from] crate::backend::BackendError),
    #[error("calibration: {0}")]
    Calibration(String),
    #[error("module `{module}`: {detail}")]
    Module { module: String, detail: String },
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
}

/// Quantizes every linear of the blocks (not embedding, head or routers) with max calibration and writes `out`.
///
/// Follows nvidia-modelopt 0.47 for the ModelOpt dialect and llm-compressor 0.14 with compressed-tensors 0.20 for the
/// other, bit for bit in weights and weight scales on BF16 models.
///
/// # Errors
/// When the model is quantized already, holds a NaN, has a K that no block divides, or `out` cannot be written.
pub fn quantize(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    recipe: Recipe,
    dialect: Dialect,
    out: &Path,
) -> Result<Report, QuantizeError> {
    if !matches!(dialect, Dialect::ModelOpt | Dialect::CompressedTensors) {
        return Err(QuantizeError::Dialect(dialect));
    }
    let config = ModelConfig::read(&checkpoint.config)?;
    let modules: Vec<Module> = config.modules().into_iter().filter(Module::is_block_linear).collect();
    let plan = Plan::new(checkpoint, &modules, calibration, recipe, dialect)?;

    let writer = FolderWriter::create(out)?;
    let mut metadata = Map::new();
    metadata.insert("format".into(), "pt".into());
    metadata.insert("recoup_version".into(), env!("CARGO_PKG_VERSION").into());
    metadata.insert("recoup_recipe".into(), recipe.to_string().into());
    metadata.insert("recoup_calibration".into(), calibration.description.clone().into());
    let (specs, jobs) = plan.tensors(checkpoint);
    let mut done: Option<(usize, Encoded)> = None;
    let mut next = 0;
    writer.tensors(&specs, SHARD_BYTES, &metadata, |spec| -> Result<Vec<u8>, QuantizeError> {
        let job = &jobs[next];
        next += 1;
        match job {
            Job::Copy => Ok(checkpoint.tensors.require(&spec.name, "it is copied")?.bytes.to_vec()),
            Job::Bytes(bytes) => Ok(bytes.clone()),
            Job::Weight(i) => {
                let encoded = plan.encode(checkpoint, &modules[*i], *i)?;
                let bytes = encoded.codes.clone();
                done = Some((*i, encoded));
                Ok(bytes)
            }
            // Block scales follow their weight in the plan.
            Job::BlockScales(i) => match &mut done {
                Some((j, encoded)) if j == i => Ok(std::mem::take(&mut encoded.block_scales)),
                _ => Ok(plan.encode(checkpoint, &modules[*i], *i)?.block_scales),
            },
        }
    })?;
    export::write_configs(&writer, checkpoint, &config, recipe, dialect)?;
    writer.copy_text_files(checkpoint.tensors.folder())?;
    writer.commit()?;

    let mut report = Report { modules: modules.len(), unreached: plan.unreached, ..Report::default() };
    for (m, spec) in specs.iter().zip(&jobs) {
        match spec {
            Job::Copy => {}
            _ => report.bytes_after += m.bytes(),
        }
    }
    report.bytes_before = modules.iter().map(|m| 2 * (m.role.n * m.role.k) as u64).sum();
    Ok(report)
}

/// Where one output tensor comes from.
enum Job {
    Copy,
    Weight(usize),
    BlockScales(usize),
    Bytes(Vec<u8>),
}

/// The scales of every module, decided before anything is written.
struct Plan<'a> {
    recipe: Recipe,
    dialect: Dialect,
    modules: &'a [Module],
    /// Global (NVFP4) or tensor (FP8) scale of each weight, in the dialect's own convention.
    weight_scales: Vec<f32>,
    input_scales: Vec<f32>,
    unreached: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(
        checkpoint: &Checkpoint,
        modules: &'a [Module],
        calibration: &Calibration,
        recipe: Recipe,
        dialect: Dialect,
    ) -> Result<Self, QuantizeError> {
        let mut inputs: BTreeMap<String, f32> = BTreeMap::new();
        let mut unreached = Vec::new();
        for m in modules {
            match calibration.amax.get(&m.name) {
                Some(&amax) => {
                    let shared = inputs.entry(m.input_key()).or_default();
                    *shared = shared.max(amax);
                }
                None => unreached.push(m.name.clone()),
            }
        }
        let mut weights: BTreeMap<String, f32> = BTreeMap::new();
        // FP8 engines keep one scale per projection; the experts' fused gate and up share theirs (ModelOpt).
        let key = |m: &Module| match recipe {
            Recipe::Nvfp4 => m.fusion_key(),
            Recipe::Fp8 if m.expert.is_some() && dialect == Dialect::ModelOpt => m.fusion_key(),
            Recipe::Fp8 => m.name.clone(),
        };
        for m in modules {
            let amax = encode::weight_amax(checkpoint, m, recipe)?;
            let shared = weights.entry(key(m)).or_default();
            *shared = shared.max(amax);
        }
        let mut plan =
            Self { recipe, dialect, modules, weight_scales: Vec::new(), input_scales: Vec::new(), unreached };
        for m in modules {
            let input = inputs.get(&m.input_key()).copied().unwrap_or(0.0);
            if input == 0.0 {
                return Err(QuantizeError::Calibration(format!(
                    "no token reached `{}` with a value other than zero, so its activation scale is unknown; use more or other text",
                    m.name
                )));
            }
            let weight = weights.get(&key(m)).copied().unwrap_or(0.0);
            // An all-zero weight has no scale of its own; any will do.
            let weight = if weight == 0.0 { 1.0 } else { weight };
            plan.weight_scales.push(encode::tensor_scale(recipe, dialect, weight));
            plan.input_scales.push(encode::tensor_scale(recipe, dialect, input));
        }
        Ok(plan)
    }

    fn encode(&self, checkpoint: &Checkpoint, m: &Module, index: usize) -> Result<Encoded, QuantizeError> {
        encode::weight(checkpoint, m, self.recipe, self.dialect, self.weight_scales[index])
    }

    /// Every tensor of the new checkpoint, and where it comes from.
    fn tensors(&self, checkpoint: &Checkpoint) -> (Vec<TensorSpec>, Vec<Job>) {
        let by_weight: BTreeMap<String, usize> =
            self.modules.iter().enumerate().map(|(i, m)| (format!("{}.weight", m.name), i)).collect();
        let (mut specs, mut jobs) = (Vec::new(), Vec::new());
        let mut push = |name: String, dtype, shape: &[usize], job| {
            specs.push(TensorSpec { name, dtype, shape: shape.to_vec() });
            jobs.push(job);
        };
        for name in checkpoint.tensors.names() {
            let Some(&i) = by_weight.get(name) else {
                if let Some(view) = checkpoint.tensors.peek(name) {
                    push(name.into(), view.dtype, view.shape, Job::Copy);
                }
                continue;
            };
            let m = &self.modules[i];
            let (n, k) = (m.role.n, m.role.k);
            let tensor = |suffix: &str| format!("{}.{suffix}", m.name);
            let scalar = |v: f32| Job::Bytes(v.to_le_bytes().to_vec());
            let half = |v: f32| Job::Bytes(half::bf16::from_f32(v).to_le_bytes().to_vec());
            match (self.recipe, self.dialect) {
                (Recipe::Nvfp4, Dialect::CompressedTensors) => {
                    push(tensor("weight_packed"), Dtype::U8, &[n, k / 2], Job::Weight(i));
                    push(tensor("weight_scale"), Dtype::F8_E4M3, &[n, k / nvfp4::BLOCK], Job::BlockScales(i));
                    push(tensor("weight_global_scale"), Dtype::F32, &[1], scalar(self.weight_scales[i]));
                    push(tensor("input_global_scale"), Dtype::F32, &[1], scalar(self.input_scales[i]));
                }
                (Recipe::Nvfp4, _) => {
                    push(tensor("weight"), Dtype::U8, &[n, k / 2], Job::Weight(i));
                    push(tensor("weight_scale"), Dtype::F8_E4M3, &[n, k / nvfp4::BLOCK], Job::BlockScales(i));
                    push(tensor("weight_scale_2"), Dtype::F32, &[], scalar(self.weight_scales[i]));
                    push(tensor("input_scale"), Dtype::F32, &[], scalar(self.input_scales[i]));
                }
                (Recipe::Fp8, Dialect::CompressedTensors) => {
                    push(tensor("weight"), Dtype::F8_E4M3, &[n, k], Job::Weight(i));
                    push(tensor("weight_scale"), Dtype::BF16, &[1], half(self.weight_scales[i]));
                    push(tensor("input_scale"), Dtype::BF16, &[1], half(self.input_scales[i]));
                }
                (Recipe::Fp8, _) => {
                    push(tensor("weight"), Dtype::F8_E4M3, &[n, k], Job::Weight(i));
                    push(tensor("weight_scale"), Dtype::F32, &[], scalar(self.weight_scales[i]));
                    push(tensor("input_scale"), Dtype::F32, &[], scalar(self.input_scales[i]));
                }
            }
        }
        (specs, jobs)
    }
}

/// `value` as the JSON of a configuration, with `quantization_config` replaced.
fn with_quantization(config: &Value, quantization: Value) -> Value {
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        map.insert("quantization_config".into(), quantization);
    }
    config
}
