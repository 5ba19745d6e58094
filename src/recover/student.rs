//! The model that is trained, or a block of it: layers with their quantized weights, and these weights' masters.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::optimizer::{AdamW, sum_of_squares};
use super::parameter::{Learned, Parameter, Rates, Weight};
use super::team::Team;
use super::written::{self, Trained};
use super::{RecoverError, Result};
use crate::backend::Named;
use crate::backend::autograd::{AutogradBackend, Linear, Norm};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::store::Content;
use crate::checkpoint::write::Pending;
use crate::formats::linear::{BlockScales, Element};
use crate::model::modules::{Module, Part};
use crate::model::{Blocks, Decoder, ModelConfig, Source};

/// The model that is trained: a whole decoder, or one block of it.
pub struct Student<M = Decoder<AutogradBackend>> {
    pub decoder: M,
    /// Linears in the order of the forward pass, then norms.
    pub parameters: Vec<Parameter>,
    /// Whether all weights are trained: a model of floats from scratch.
    pub everything: bool,
    /// Who else trains it.
    pub(super) team: Option<Arc<Team>>,
    /// Whether block scales may be learned, and whether weights are then divided by those of the beginning.
    scales: Option<bool>,
}

/// Whether any weight of a checkpoint has block scales that can be learned.
///
/// # Errors
/// When something is wrong with it.
pub fn has_learnable_scales(checkpoint: &Checkpoint) -> Result<bool> {
    for m in ModelConfig::read(&checkpoint.config)?.modules().iter().filter(|m| checkpoint.has_linear(&m.name)) {
        let linear = checkpoint.linear(&m.name, m.role)?;
        if linear.element == Element::E2m1 && matches!(linear.block_scales, BlockScales::E4m3 { .. }) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Weights as they were, in a file: with the optimizer's state beside it there may be no room for them.
pub(super) struct Aside {
    file: File,
    parts: Vec<(String, usize)>,
}

/// Values that are written of them at a time.
const ASIDE: usize = 1 << 16;

/// One block of the model that is trained.
pub type BlockStudent = Student<Blocks<AutogradBackend>>;

impl BlockStudent {
    /// Loads decoder layer `layer` of `checkpoint` and nothing else, as [`Student::load`] does with all of them; a layer of
    /// floats has no masters but those of what is no matrix.
    ///
    /// # Errors
    /// When something is wrong with it.
    pub fn load_block(
        checkpoint: &Checkpoint,
        unrounded: Option<&Checkpoint>,
        backend: AutogradBackend,
        layer: usize,
    ) -> Result<Self> {
        let decoder = Blocks::load(backend, checkpoint as &dyn Source, layer..layer + 1)?;
        let linears = decoder.layer_linears().map(|l| Linear::clone(l)).collect();
        let mut parameters = quantized(&decoder.config, linears, checkpoint, unrounded)?;
        parameters.extend(norms(&decoder, decoder.layer_vectors().map(|(i, v)| (Some(i), v)), checkpoint));
        Ok(Self::of(decoder, parameters, false))
    }
}

impl Student {
    /// Loads a quantized model. Masters start at the weights of `unrounded`, a plain model that the student was rounded
    /// from, or else at the student's own.
    ///
    /// # Errors
    /// When nothing is quantized, the two are of different shapes, or something is wrong with either.
    pub fn load(checkpoint: &Checkpoint, unrounded: Option<&Checkpoint>, backend: AutogradBackend) -> Result<Self> {
        let decoder = Decoder::load(backend, checkpoint)?;
        if let Some(other) = unrounded {
            same_shape(
                &decoder.config,
                checkpoint,
                &ModelConfig::read(&other.config).map_err(crate::model::LoadError::from)?,
                other,
            )?;
        }
        let linears = decoder.linears().map(|l| Linear::clone(l)).collect();
        let mut parameters = quantized(&decoder.config, linears, checkpoint, unrounded)?;
        if parameters.is_empty() {
            return Err(RecoverError::NotQuantized(checkpoint.tensors.folder().into()));
        }
        parameters.extend(norms(&decoder, decoder.vectors(), checkpoint));
        Ok(Self::of(decoder, parameters, false))
    }

    /// Loads a model of floats, all of whose weights can be trained: the embedding, and a head of its own, too.
    ///
    /// # Errors
    /// When something is wrong with it.
    pub fn load_plain(checkpoint: &Checkpoint, backend: AutogradBackend) -> Result<Self> {
        let decoder = Decoder::load(backend, checkpoint)?;
        let linears: Vec<Linear> = decoder.linears().map(|l| Linear::clone(l)).collect();
        let mut parameters = Vec::new();
        for m in decoder.config.modules() {
            if let Some(linear) = linears.iter().find(|l| l.name() == m.name) {
                let master = checkpoint.linear(&m.name, m.role)?.decode();
                parameters.push(parameter(linear.clone(), &m, master));
            }
        }
        parameters.extend(norms(&decoder, decoder.vectors(), checkpoint));
        Ok(Self::of(decoder, parameters, true))
    }

    /// What a saved state holds ([`super::run_folder`]): masters, of one layer or all, and if asked for the moments that
    /// there are.
    #[must_use]
    pub fn state(&self, layer: Option<usize>, moments: bool) -> Vec<Pending<'_, RecoverError>> {
        let mut out = Vec::new();
        for (i, p) in self.parameters.iter().enumerate().filter(|(_, p)| layer.is_none() || layer == p.layer) {
            for (name, length) in p.state(moments) {
                let kind = name.rsplit_once('.').map_or_else(String::new, |(_, kind)| kind.to_owned());
                let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
                out.push(Pending::new(name, Dtype::F32, &[length], move || {
                    Ok(match (p.state_values(&kind), &self.team) {
                        (Some(values), _) => bytes(values),
                        (None, Some(team)) => bytes(&team.fetch(i, &kind, length)),
                        (None, None) => Vec::new(),
                    })
                }));
            }
        }
        out
    }
}

impl Student {
    /// Lets other processes train it too.
    #[must_use]
    pub fn with_team(mut self, team: Option<Arc<Team>>) -> Self {
        self.team = team;
        self
    }

    /// What [`Self::allow_scales`] was told.
    pub(super) fn scales(&self) -> Option<bool> {
        self.scales
    }

    /// Writes the student: the checkpoint it came from with other codes, and `files` about how it was trained.
    ///
    /// # Errors
    /// As [`written::write`].
    pub fn write(&self, from: &Checkpoint, files: &[(&str, Vec<u8>)], out: &Path) -> Result<()> {
        written::write(from, &self.trained(), files, out)
    }
}

impl<M: Borrow<Blocks<AutogradBackend>>> Student<M> {
    /// Lets block scales be learned, where they are E4M3 codes; `dual` says that weights are divided by those of now for
    /// good, and only what their codes are multiplied by is learned.
    pub fn allow_scales(&mut self, dual: bool) {
        self.scales = Some(dual);
        self.parameters.iter_mut().for_each(|p| p.allow_scales(dual));
    }

    /// The decoder layers that it has.
    #[must_use]
    pub fn blocks(&self) -> &Blocks<AutogradBackend> {
        self.decoder.borrow()
    }

    /// Sums gradients of what `which` names from now on, and forgets the optimizer's state of all.
    pub fn train(&mut self, which: impl Fn(&Parameter) -> Learned) {
        for p in &mut self.parameters {
            let learned = which(p);
            p.train(learned, false);
        }
    }

    /// As [`Self::train`], but moments and means that a resumed run has loaded stay.
    pub(super) fn go_on(&mut self, which: impl Fn(&Parameter) -> Learned) {
        for p in &mut self.parameters {
            let learned = which(p);
            p.train(learned, true);
        }
    }

    /// Calls `f`, which adds a batch's gradients; what is no matrix gets its own added as a whole, as matrices do, so that it makes no
    /// difference where a batch was computed.
    pub(super) fn apart<T>(&self, f: impl FnOnce() -> T) -> T {
        let vectors = || self.parameters.iter().filter(|p| p.is_norm());
        let aside = |g: &mut Vec<f32>| {
            let fresh = vec![0.0; g.len()];
            std::mem::replace(g, fresh)
        };
        let before: Vec<Option<Vec<f32>>> = vectors().map(|p| p.gradient().as_mut().map(aside)).collect();
        let result = f();
        for (p, before) in vectors().zip(before) {
            if let (Some(sum), Some(before)) = (p.gradient().as_mut(), before) {
                sum.iter_mut().zip(before).for_each(|(s, b)| *s += b);
            }
        }
        result
    }

    /// Norm of all gradients together.
    #[must_use]
    pub fn gradient_norm(&self) -> f64 {
        let square = |p: &Parameter| p.gradient().as_deref().map_or(0.0, sum_of_squares);
        self.parameters.iter().map(square).sum::<f64>().sqrt()
    }

    /// Moves everything that is trained by step number `step` (from 1) of `steps`; gradients are zero afterwards.
    pub fn step(&mut self, adam: &AdamW, step: usize, steps: usize, rates: Rates, factor: f32) {
        let progress = step as f32 / steps.max(1) as f32;
        self.parameters.iter_mut().for_each(|p| p.step(adam, step, rates, factor, progress));
    }

    /// Takes this step's masters into their running means, of which `decay` stays; the first step begins them.
    pub(super) fn average(&mut self, decay: f32) {
        self.parameters.iter_mut().for_each(|p| p.average(decay));
    }

    /// Calls `f` while the model computes with the running means, where there are such.
    pub(super) fn averaged<T>(&self, f: impl FnOnce() -> T) -> T {
        self.parameters.iter().for_each(Parameter::round_average);
        let result = f();
        self.parameters.iter().for_each(Parameter::round_again);
        result
    }

    /// Takes one tensor of a state over; whether there is such.
    pub(super) fn set_state(&mut self, name: &str, values: Vec<f32>) -> bool {
        let Some((module, kind)) = name.rsplit_once('.') else { return false };
        self.parameters.iter_mut().find(|p| p.name == module).is_some_and(|p| p.set_state(kind, values))
    }

    /// Keeps the weights of block `layer` as they are in an unnamed file in `scratch`, for [`Self::put_back`].
    pub(super) fn set_aside(&self, layer: usize, scratch: &Path) -> std::io::Result<Aside> {
        let mut out = BufWriter::new(tempfile::tempfile_in(scratch)?);
        let mut parts = Vec::new();
        for p in self.parameters.iter().filter(|p| p.layer == Some(layer)) {
            for (name, length) in p.state(false) {
                let kind = name.rsplit_once('.').map_or("", |(_, kind)| kind);
                for chunk in p.state_values(kind).into_iter().flat_map(|v| v.chunks(ASIDE)) {
                    out.write_all(&chunk.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
                }
                parts.push((name, length));
            }
        }
        Ok(Aside { file: out.into_inner()?, parts })
    }

    /// Puts weights back to what they were.
    pub(super) fn put_back(&mut self, aside: Aside) -> std::io::Result<()> {
        let Aside { mut file, parts } = aside;
        file.seek(SeekFrom::Start(0))?;
        for (name, length) in parts {
            let mut bytes = vec![0; 4 * length];
            file.read_exact(&mut bytes)?;
            self.set_state(&name, bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
        }
        self.refresh();
        Ok(())
    }

    /// Rounds all masters anew.
    pub(super) fn refresh(&mut self) {
        self.parameters.iter_mut().for_each(Parameter::round);
    }

    /// Masters become their running means, where there are such.
    pub(super) fn settle(&mut self) {
        self.parameters.iter_mut().for_each(Parameter::settle);
    }

    /// Ends the learning of roundings: masters go to the sides that were chosen.
    pub(super) fn settle_rounding(&mut self) {
        self.parameters.iter_mut().for_each(Parameter::settle_rounding);
    }
}

impl<M> Student<M> {
    fn of(decoder: M, parameters: Vec<Parameter>, everything: bool) -> Self {
        Self { decoder, parameters, everything, team: None, scales: None }
    }

    /// What it has in the place of a checkpoint's tensors.
    #[must_use]
    pub fn trained(&self) -> ByName<'_> {
        ByName(self.parameters.iter().map(|p| (p.name.as_str(), p)).collect())
    }
}

/// A student's parameters, to be found by the names of modules, or of tensors that are no linear's.
pub struct ByName<'a>(BTreeMap<&'a str, &'a Parameter>);

impl Trained for ByName<'_> {
    fn has(&self, name: &str, content: Content) -> bool {
        self.0.get(name).is_some_and(|p| match content {
            Content::Elements => true,
            Content::Scales => p.learns_scales(),
            _ => false,
        })
    }

    fn bytes(&self, name: &str, content: Content) -> Option<Vec<u8>> {
        let p = self.0.get(name)?;
        match content {
            Content::Elements => Some(p.bytes()),
            Content::Scales => p.scale_bytes(),
            _ => None,
        }
    }
}

/// Masters of those of `linears` that are quantized: the weights of `unrounded`, or the student's own.
fn quantized(
    config: &ModelConfig,
    linears: Vec<Linear>,
    checkpoint: &Checkpoint,
    unrounded: Option<&Checkpoint>,
) -> Result<Vec<Parameter>> {
    let modules: BTreeMap<String, Module> = config.modules().into_iter().map(|m| (m.name.clone(), m)).collect();
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
    Ok(parameters)
}

fn parameter(linear: Linear, module: &Module, mut master: Vec<f32>) -> Parameter {
    linear.set(&mut master);
    Parameter::new(module.name.clone(), Weight::Linear(linear), module.layer, master)
}

/// What is no matrix: `vectors`, then what mixers of `blocks` have of their own.
fn norms<'a>(
    blocks: &Blocks<AutogradBackend>,
    vectors: impl Iterator<Item = (Option<usize>, &'a Named<Norm>)>,
    checkpoint: &Checkpoint,
) -> Vec<Parameter> {
    let parameter = |layer: Option<usize>, name: &str, norm: &Norm, offset: f32| {
        let dtype = checkpoint.tensors.peek(name).map_or(Dtype::F32, |v| v.dtype);
        let master = norm.weight().to_vec();
        Parameter::new(name.to_owned(), Weight::Norm { norm: norm.clone(), dtype, offset }, layer, master)
    };
    // Sinks are nobody's who has such norms.
    let offset = if blocks.config.offset_norms { 1.0 } else { 0.0 };
    let mut out: Vec<Parameter> = vectors.map(|(layer, named)| parameter(layer, &named.name, named, offset)).collect();
    for (layer, mixer) in blocks.mambas() {
        let own = mixer.vectors().map(|(part, v)| parameter(Some(layer), &format!("{}.{part}", mixer.name), v, 0.0));
        out.extend(own);
    }
    for (layer, mixer) in blocks.delta_nets() {
        let own = mixer.vectors().map(|(part, v)| parameter(Some(layer), &format!("{}.{part}", mixer.name), v, 0.0));
        out.extend(own);
    }
    out
}

/// Where a checkpoint keeps how it was recovered.
pub const RECORD_FILE: &str = "recoup_recovery.json";
/// And the curve of its training.
pub const CURVE_FILE: &str = "recoup_curve.jsonl";

/// Which weights a student's masters begin at.
#[derive(Clone, Copy)]
pub enum Masters<'a> {
    /// Those of the plain model that it was rounded from, where smoothing made that another than the teacher.
    Unrounded(&'a Checkpoint),
    /// The teacher's, whose rounded form it is.
    Teacher(&'a Checkpoint),
    /// Its own.
    Own,
}

impl<'a> Masters<'a> {
    /// The masters of `student`: of the `unrounded` model where there is one, else the teacher's where they are it rounded.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn of(student: &Checkpoint, teacher: &'a Checkpoint, unrounded: Option<&'a Checkpoint>) -> Result<Self> {
        if let Some(unrounded) = unrounded {
            return Ok(Self::Unrounded(unrounded));
        }
        let rounded = is_rounded_from(student, teacher, &ModelConfig::read(&student.config)?)?;
        Ok(if rounded { Self::Teacher(teacher) } else { Self::Own })
    }

    /// The model whose weights they are, if another than the student.
    #[must_use]
    pub fn checkpoint(self) -> Option<&'a Checkpoint> {
        match self {
            Self::Unrounded(checkpoint) | Self::Teacher(checkpoint) => Some(checkpoint),
            Self::Own => None,
        }
    }

    /// In words; `weights` is the hash of the unrounded model's.
    #[must_use]
    pub fn describe(self, weights: &str) -> String {
        match self {
            Self::Unrounded(_) => format!("unrounded model, weights {weights}"),
            Self::Teacher(_) => "the teacher's weights".into(),
            Self::Own => "the student's own weights".into(),
        }
    }
}

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
    // Of the first layer that has it; more that differs shows in the number of parameters.
    let attention =
        |c: &ModelConfig| c.attentions().first().map_or([0; 3], |(_, _, a)| [a.heads, a.kv_heads, a.head_dim]);
    let width = |c: &ModelConfig| c.modules().iter().find(|m| m.part == Part::Up).map_or(0, |m| m.role.n);
    let parameters = |c: &ModelConfig| c.modules().iter().map(|m| m.role.n * m.role.k).sum();
    let (own, other) = (attention(a), attention(b));
    for (what, found, expected) in [
        ("the vocabulary", a.vocab, b.vocab),
        ("the number of layers", a.layers.len(), b.layers.len()),
        ("the hidden size", a.hidden, b.hidden),
        ("the width of the MLP", width(a), width(b)),
        ("the number of attention heads", own[0], other[0]),
        ("the number of KV heads", own[1], other[1]),
        ("the size of a head", own[2], other[2]),
        ("the number of parameters in linears", parameters(a), parameters(b)),
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
