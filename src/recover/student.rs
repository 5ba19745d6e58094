//! The model that is trained: the decoder with its quantized weights, their masters, and how it is written.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::MutexGuard;

use rayon::prelude::*;
use safetensors::Dtype;

use super::optimizer::{AdamW, Moments, sum_of_squares};
use super::{RecoverError, Result};
use crate::backend::autograd::{AutogradBackend, Linear, Norm};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::{FolderWriter, SHARD_BYTES, TensorSpec};
use crate::model::modules::Module;
use crate::model::{Decoder, ModelConfig};

/// What a weight belongs to.
#[derive(Clone, Debug)]
pub enum Weight {
    Linear(Linear),
    /// And the type that its checkpoint holds it in.
    Norm(Norm, Dtype),
}

impl Weight {
    /// Puts the values nearest to `values` into the model, and moves those within reach of them.
    fn put(&self, values: &mut [f32]) {
        match self {
            Self::Linear(l) => l.set(values),
            Self::Norm(n, dtype) => n.set(values.iter().map(|v| rounded(*v, *dtype)).collect()),
        }
    }
}

/// A weight on its way.
pub struct Parameter {
    /// The module of a linear, the tensor of a norm.
    pub name: String,
    pub weight: Weight,
    /// The decoder layer it is in.
    pub layer: Option<usize>,
    /// [N, K], or [features].
    pub master: Vec<f32>,
    moments: Option<Moments>,
    /// Running mean of the master over the steps of a stage that asks for it.
    average: Option<Vec<f32>>,
}

impl Parameter {
    /// Whether it is quantized.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        matches!(&self.weight, Weight::Linear(l) if !l.grid().is_float())
    }

    /// Whether it is the weight of a norm.
    #[must_use]
    pub fn is_norm(&self) -> bool {
        matches!(&self.weight, Weight::Norm(..))
    }

    /// The summed gradient, `None` if it is not trained.
    pub fn gradient(&self) -> MutexGuard<'_, Option<Vec<f32>>> {
        match &self.weight {
            Weight::Linear(l) => l.gradient(),
            Weight::Norm(n, _) => n.gradient(),
        }
    }

    fn train(&mut self, moments: Option<Moments>) {
        let trained = moments.is_some();
        self.moments = moments;
        self.average = None;
        match &self.weight {
            Weight::Linear(l) if trained => l.train(),
            Weight::Linear(l) => l.freeze(),
            Weight::Norm(n, _) if trained => n.train(),
            Weight::Norm(n, _) => n.freeze(),
        }
    }

    /// Gives the model the master, rounded.
    fn round(&mut self) {
        self.weight.put(&mut self.master);
    }

    /// The master as its checkpoint holds it.
    fn bytes(&self) -> Vec<u8> {
        match &self.weight {
            Weight::Linear(l) => l.grid().encode(&self.master),
            Weight::Norm(_, Dtype::BF16) => {
                self.master.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
            Weight::Norm(_, Dtype::F16) => {
                self.master.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
            }
            Weight::Norm(..) => self.master.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// The nearest value of a float type.
fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
        Dtype::F16 => half::f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// The model that is trained.
pub struct Student {
    pub decoder: Decoder<AutogradBackend>,
    /// Linears in the order of the forward pass, then norms.
    pub parameters: Vec<Parameter>,
    /// Whether all weights are trained: a model of floats from scratch.
    pub everything: bool,
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
            if linear.grid().is_float() {
                continue;
            }
            let master = unrounded.unwrap_or(checkpoint).linear(&m.name, m.role)?.decode();
            checkpoint.tensors.release_pages();
            if let Some(other) = unrounded {
                other.tensors.release_pages();
            }
            parameters.push(parameter(linear, m, master));
        }
        if parameters.is_empty() {
            return Err(RecoverError::NotQuantized(checkpoint.tensors.folder().into()));
        }
        parameters.extend(norms(&decoder, checkpoint));
        Ok(Self { decoder, parameters, everything: false })
    }

    /// Loads a model of floats, all of whose weights can be trained: the embedding, and a head of its own, too.
    ///
    /// # Errors
    /// When something is wrong with it.
    pub fn load_plain(checkpoint: &Checkpoint, backend: AutogradBackend) -> Result<Self> {
        let decoder = Decoder::load(backend, checkpoint)?;
        let mut linears = Vec::new();
        decoder.for_each_linear(|l| linears.push(l.clone()));
        let mut parameters = Vec::new();
        for m in decoder.config.modules() {
            if let Some(linear) = linears.iter().find(|l| l.name() == m.name) {
                let master = checkpoint.linear(&m.name, m.role)?.decode();
                parameters.push(parameter(linear.clone(), &m, master));
            }
        }
        parameters.extend(norms(&decoder, checkpoint));
        Ok(Self { decoder, parameters, everything: true })
    }

    /// Sums gradients of the weights that `which` names from now on, and forgets the optimizer's state of all.
    pub fn train(&mut self, which: impl Fn(&Parameter) -> bool) {
        for p in &mut self.parameters {
            let moments = which(p).then(|| Moments::new(p.master.len()));
            p.train(moments);
        }
    }

    /// Norm of all gradients together.
    #[must_use]
    pub fn gradient_norm(&self) -> f64 {
        let square = |p: &Parameter| p.gradient().as_deref().map_or(0.0, sum_of_squares);
        self.parameters.iter().map(square).sum::<f64>().sqrt()
    }

    /// Moves every trained weight by step number `step` (from 1); gradients are zero afterwards.
    pub fn step(&mut self, adam: &AdamW, step: usize, rate: f32, factor: f32) {
        for p in &mut self.parameters {
            let weight = p.weight.clone();
            let mut gradient = match &weight {
                Weight::Linear(l) => l.gradient(),
                Weight::Norm(n, _) => n.gradient(),
            };
            if let (Some(moments), Some(gradient)) = (&mut p.moments, gradient.as_mut()) {
                adam.step(step, rate, factor, &mut p.master, gradient, moments);
                p.round();
            }
        }
    }

    /// Takes this step's masters into their running means, of which `decay` stays; the first step begins them.
    pub(super) fn average(&mut self, decay: f32) {
        for p in self.parameters.iter_mut().filter(|p| p.moments.is_some()) {
            match &mut p.average {
                None => p.average = Some(p.master.clone()),
                Some(average) => {
                    let pairs = average.par_iter_mut().with_min_len(1 << 14).zip(&p.master);
                    pairs.for_each(|(a, m)| *a = decay * *a + (1.0 - decay) * m);
                }
            }
        }
    }

    /// Calls `f` while the model computes with the running means, where there are such.
    pub(super) fn averaged<T>(&self, f: impl FnOnce() -> T) -> T {
        let with = || self.parameters.iter().filter_map(|p| Some((p, p.average.as_ref()?)));
        with().for_each(|(p, average)| p.weight.put(&mut average.clone()));
        let result = f();
        with().for_each(|(p, _)| p.weight.put(&mut p.master.clone()));
        result
    }

    /// Tensors of [`super::run_folder`]: masters, of one layer or all, and if asked for the moments that there are.
    pub(super) fn state_specs(&self, layer: Option<usize>, moments: bool) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        for p in self.parameters.iter().filter(|p| layer.is_none() || layer == p.layer) {
            let shape = vec![p.master.len()];
            let kinds = match (moments && p.moments.is_some(), p.average.is_some()) {
                (true, true) => &[MASTER, FIRST, SECOND, AVERAGE][..],
                (true, false) => &[MASTER, FIRST, SECOND],
                // What is kept as the best is the mean.
                (false, true) => &[AVERAGE],
                (false, false) => &[MASTER],
            };
            for kind in kinds {
                let name = format!("{}.{kind}", p.name);
                specs.push(TensorSpec { name, dtype: Dtype::F32, shape: shape.clone() });
            }
        }
        specs
    }

    pub(super) fn state_bytes(&self, name: &str) -> Option<Vec<u8>> {
        let (module, kind) = name.rsplit_once('.')?;
        let p = self.parameters.iter().find(|p| p.name == module)?;
        let values = match kind {
            MASTER => &p.master,
            FIRST => &p.moments.as_ref()?.first,
            AVERAGE => p.average.as_ref()?,
            _ => &p.moments.as_ref()?.second,
        };
        Some(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// Takes one tensor of a state over; whether there is such.
    pub(super) fn set_state(&mut self, name: &str, values: Vec<f32>) -> bool {
        let Some((module, kind)) = name.rsplit_once('.') else { return false };
        let found = self.parameters.iter_mut().find(|p| p.name == module);
        let Some(p) = found.filter(|p| p.master.len() == values.len()) else { return false };
        let length = values.len();
        match kind {
            MASTER => p.master = values,
            FIRST => p.moments.get_or_insert_with(|| Moments::new(length)).first = values,
            SECOND => p.moments.get_or_insert_with(|| Moments::new(length)).second = values,
            AVERAGE => p.average = Some(values),
            _ => return false,
        }
        true
    }

    /// Rounds all masters anew.
    pub(super) fn refresh(&mut self) {
        self.parameters.iter_mut().for_each(Parameter::round);
    }

    /// Masters become their running means, where there are such.
    pub(super) fn settle(&mut self) {
        for p in &mut self.parameters {
            if let Some(average) = p.average.take() {
                p.master = average;
                p.round();
            }
        }
    }

    /// As [`Self::train`], but moments and means that a resumed run has loaded stay.
    pub(super) fn go_on(&mut self, which: impl Fn(&Parameter) -> bool) {
        for p in &mut self.parameters {
            let moments = p.moments.take().unwrap_or_else(|| Moments::new(p.master.len()));
            let average = p.average.take();
            let moments = which(p).then_some(moments);
            p.train(moments);
            p.average = average;
        }
    }

    /// Writes the student: the checkpoint it came from with other codes, and `files` about how it was trained.
    ///
    /// # Errors
    /// When `out` is in the way or cannot be written.
    pub fn write(&self, from: &Checkpoint, files: &[(&str, Vec<u8>)], out: &Path) -> Result<()> {
        let writer = FolderWriter::create(out)?;
        let trained: BTreeMap<&str, &Parameter> = self.parameters.iter().map(|p| (p.name.as_str(), p)).collect();
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
            let own = match spec.name.rsplit_once('.') {
                Some((module, "weight" | "weight_packed")) => trained.get(module),
                _ => None,
            };
            Ok(match own.or_else(|| trained.get(spec.name.as_str())) {
                Some(p) => p.bytes(),
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

fn parameter(linear: Linear, module: &Module, mut master: Vec<f32>) -> Parameter {
    linear.set(&mut master);
    Parameter {
        name: module.name.clone(),
        weight: Weight::Linear(linear),
        layer: module.layer,
        master,
        moments: None,
        average: None,
    }
}

fn norms(decoder: &Decoder<AutogradBackend>, checkpoint: &Checkpoint) -> Vec<Parameter> {
    let mut out = Vec::new();
    decoder.for_each_norm(|name, layer, norm| {
        let master = norm.weight().to_vec();
        let dtype = checkpoint.tensors.peek(&name).map_or(Dtype::F32, |v| v.dtype);
        out.push(Parameter {
            name,
            weight: Weight::Norm(norm.clone(), dtype),
            layer,
            master,
            moments: None,
            average: None,
        });
    });
    out
}

/// Where a checkpoint keeps how it was recovered.
pub const RECORD_FILE: &str = "recoup_recovery.json";
/// And the curve of its training.
pub const CURVE_FILE: &str = "recoup_curve.jsonl";

const MASTER: &str = "master";
const FIRST: &str = "first";
const SECOND: &str = "second";
const AVERAGE: &str = "average";

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
