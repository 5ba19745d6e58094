//! The model that is trained: the decoder with its quantized weights, their masters, and how it is written.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::optimizer::{AdamW, Moments, sum_of_squares};
use super::{RecoverError, Result};
use crate::backend::autograd::{AutogradBackend, Linear};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::{FolderWriter, SHARD_BYTES, TensorSpec};
use crate::model::modules::Module;
use crate::model::{Decoder, ModelConfig};

/// A quantized weight on its way.
pub struct Parameter {
    pub linear: Linear,
    /// The decoder layer it is in.
    pub layer: usize,
    /// [N, K].
    pub master: Vec<f32>,
    moments: Option<Moments>,
}

/// The model that is trained.
pub struct Student {
    pub decoder: Decoder<AutogradBackend>,
    /// In the order of the forward pass.
    pub parameters: Vec<Parameter>,
}

impl Student {
    /// Loads a quantized model. Masters start at the weights of `unrounded`, a plain model that the student was rounded
    /// from, or else at the student's own.
    ///
    /// # Errors
    /// When nothing is quantized, the two are of different shapes, or something is wrong with either.
    pub fn load(checkpoint: &Checkpoint, unrounded: Option<&Checkpoint>, backend: AutogradBackend) -> Result<Self> {
        let decoder = Decoder::load(backend, checkpoint)?;
        let modules: BTreeMap<String, Module> =
            decoder.config.modules().into_iter().map(|m| (m.name.clone(), m)).collect();
        if let Some(other) = unrounded {
            same_shape(
                &decoder.config,
                checkpoint,
                &ModelConfig::read(&other.config).map_err(crate::model::LoadError::from)?,
                other,
            )?;
        }
        let mut linears = Vec::new();
        decoder.for_each_linear(|l| linears.push(l.clone()));
        let mut parameters = Vec::new();
        for linear in linears {
            let Some(m) = modules.get(linear.name()).filter(|m| m.is_block_linear()) else { continue };
            let Some(layer) = m.layer else { continue };
            if linear.grid().is_float() {
                continue;
            }
            let mut master = unrounded.unwrap_or(checkpoint).linear(&m.name, m.role)?.decode();
            linear.set(&mut master);
            checkpoint.tensors.release_pages();
            if let Some(other) = unrounded {
                other.tensors.release_pages();
            }
            parameters.push(Parameter { linear, layer, master, moments: None });
        }
        if parameters.is_empty() {
            return Err(RecoverError::NotQuantized(checkpoint.tensors.folder().into()));
        }
        Ok(Self { decoder, parameters })
    }

    /// Sums gradients of the weights that `which` names from now on, and forgets the optimizer's state of all.
    pub fn train(&mut self, which: impl Fn(&Parameter) -> bool) {
        for p in &mut self.parameters {
            let trained = which(p);
            p.moments = trained.then(|| Moments::new(p.master.len()));
            if trained {
                p.linear.train();
            } else {
                p.linear.freeze();
            }
        }
    }

    /// Norm of all gradients together.
    #[must_use]
    pub fn gradient_norm(&self) -> f64 {
        let square = |p: &Parameter| p.linear.gradient().as_deref().map_or(0.0, sum_of_squares);
        self.parameters.iter().map(square).sum::<f64>().sqrt()
    }

    /// Moves every trained weight by step number `step` (from 1); gradients are zero afterwards.
    pub fn step(&mut self, adam: &AdamW, step: usize, rate: f32, factor: f32) {
        for p in &mut self.parameters {
            let mut gradient = p.linear.gradient();
            if let (Some(moments), Some(gradient)) = (&mut p.moments, gradient.as_mut()) {
                adam.step(step, rate, factor, &mut p.master, gradient, moments);
                p.linear.set(&mut p.master);
            }
        }
    }

    /// Tensors of [`super::run_folder`]: masters, of one layer or all, and if asked for the moments that there are.
    pub(super) fn state_specs(&self, layer: Option<usize>, moments: bool) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        for p in self.parameters.iter().filter(|p| layer.is_none_or(|l| l == p.layer)) {
            let shape = vec![p.linear.grid().n, p.linear.grid().k];
            let kinds = if moments && p.moments.is_some() { &[MASTER, FIRST, SECOND][..] } else { &[MASTER] };
            for kind in kinds {
                let name = format!("{}.{kind}", p.linear.name());
                specs.push(TensorSpec { name, dtype: Dtype::F32, shape: shape.clone() });
            }
        }
        specs
    }

    pub(super) fn state_bytes(&self, name: &str) -> Option<Vec<u8>> {
        let (module, kind) = name.rsplit_once('.')?;
        let p = self.parameters.iter().find(|p| p.linear.name() == module)?;
        let values = match kind {
            MASTER => &p.master,
            FIRST => &p.moments.as_ref()?.first,
            _ => &p.moments.as_ref()?.second,
        };
        Some(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// Takes one tensor of a state over; whether there is such.
    pub(super) fn set_state(&mut self, name: &str, values: Vec<f32>) -> bool {
        let Some((module, kind)) = name.rsplit_once('.') else { return false };
        let found = self.parameters.iter_mut().find(|p| p.linear.name() == module);
        let Some(p) = found.filter(|p| p.master.len() == values.len()) else { return false };
        let length = values.len();
        match kind {
            MASTER => p.master = values,
            FIRST => p.moments.get_or_insert_with(|| Moments::new(length)).first = values,
            SECOND => p.moments.get_or_insert_with(|| Moments::new(length)).second = values,
            _ => return false,
        }
        true
    }

    /// Rounds all masters anew.
    pub(super) fn refresh(&mut self) {
        self.parameters.iter_mut().for_each(|p| p.linear.set(&mut p.master));
    }

    /// Sums gradients of all weights from now on; moments that a resumed run loaded stay.
    pub(super) fn train_all(&mut self, resumed: bool) {
        for p in &mut self.parameters {
            if !resumed || p.moments.is_none() {
                p.moments = Some(Moments::new(p.master.len()));
            }
            p.linear.train();
        }
    }

    /// Writes the student: the checkpoint it came from with other codes, and `files` about how it was trained.
    ///
    /// # Errors
    /// When `out` is in the way or cannot be written.
    pub fn write(&self, from: &Checkpoint, files: &[(&str, Vec<u8>)], out: &Path) -> Result<()> {
        let writer = FolderWriter::create(out)?;
        let trained: BTreeMap<&str, &Parameter> = self.parameters.iter().map(|p| (p.linear.name(), p)).collect();
        let mut specs = Vec::new();
        for name in from.tensors.names() {
            if let Some(view) = from.tensors.peek(name) {
                specs.push(TensorSpec { name: name.into(), dtype: view.dtype, shape: view.shape.to_vec() });
            }
        }
        let mut metadata = serde_json::Map::new();
        metadata.insert("format".into(), "pt".into());
        metadata.insert("recoup_version".into(), env!("CARGO_PKG_VERSION").into());
        writer.tensors(&specs, SHARD_BYTES, &metadata, |spec| -> Result<Vec<u8>> {
            from.tensors.release_pages();
            let codes = match spec.name.rsplit_once('.') {
                Some((module, "weight" | "weight_packed")) => trained.get(module),
                _ => None,
            };
            Ok(match codes {
                Some(p) => p.linear.grid().encode(&p.master),
                None => from.tensors.require(&spec.name, "it is copied")?.bytes.to_vec(),
            })
        })?;
        writer.copy_settings(from.tensors.folder())?;
        files.iter().try_for_each(|(name, contents)| writer.file(name, contents))?;
        writer.copy_text_files(from.tensors.folder())?;
        writer.commit()?;
        Ok(())
    }
}

/// Where a checkpoint keeps how it was recovered.
pub const RECORD_FILE: &str = "recoup_recovery.json";
/// And the curve of its training.
pub const CURVE_FILE: &str = "recoup_curve.jsonl";

const MASTER: &str = "master";
const FIRST: &str = "first";
const SECOND: &str = "second";

/// Relative distance up to which a student's weights count as the rounded weights of a plain model. Four bits move
/// weights by about a tenth; smoothing, by factors of two and more.
const ROUNDED: f64 = 0.2;

/// Whether the weights of `student` are those of `plain`, rounded, in every linear that is quantized.
///
/// # Errors
/// When a tensor cannot be read.
pub fn is_rounded_from(student: &Checkpoint, plain: &Checkpoint, config: &ModelConfig) -> Result<bool> {
    for m in config.modules().iter().filter(|m| m.is_block_linear()) {
        let own = student.linear(&m.name, m.role)?;
        if own.element.is_float() {
            continue;
        }
        if own.pre_quant_scale.is_some() {
            return Ok(false);
        }
        let other = plain.linear(&m.name, m.role)?.decode();
        let (mut apart, mut size) = (0.0f64, 0.0f64);
        for (a, b) in own.decode().iter().zip(&other) {
            apart += f64::from(a - b).powi(2);
            size += f64::from(*b).powi(2);
        }
        student.tensors.release_pages();
        plain.tensors.release_pages();
        if apart > ROUNDED * ROUNDED * size {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether two models have the same vocabulary and shapes.
///
/// # Errors
/// Names the first number that differs.
pub fn same_shape(a: &ModelConfig, student: &Checkpoint, b: &ModelConfig, teacher: &Checkpoint) -> Result<()> {
    for (what, found, expected) in [
        ("the vocabulary", a.vocab, b.vocab),
        ("the number of layers", a.layers, b.layers),
        ("the hidden size", a.hidden, b.hidden),
        ("the width of the MLP", a.intermediate, b.intermediate),
        ("the number of attention heads", a.heads, b.heads),
        ("the number of KV heads", a.kv_heads, b.kv_heads),
        ("the size of a head", a.head_dim, b.head_dim),
    ] {
        if found != expected {
            let folder = |c: &Checkpoint| c.tensors.folder().into();
            return Err(RecoverError::Mismatch {
                student: folder(student),
                teacher: folder(teacher),
                what,
                found,
                expected,
            });
        }
    }
    Ok(())
}
