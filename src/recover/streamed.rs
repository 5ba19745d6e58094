//! A model that is trained block by block with no more than a block of it, and of its teacher, in memory: each is read when its
//! turn comes, and what training made of it is on disk before the next. The bytes are those of training with both in memory.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::block::{self, BlockReport, Walk, cache};
use super::data::{Data, batch};
use super::distill::Watched;
use super::optimizer::Moments;
use super::parameter::Parameter;
use super::run_folder::{RunFolder, trained_name};
use super::stage::{Method, Stage};
use super::student::{BlockStudent, Student};
use super::team::alike::{Others, agreed};
use super::team::{Models, Team};
use super::written::Trained;
use super::{During as _, RecoverError, Result};
use crate::backend::autograd::AutogradBackend;
use crate::backend::{Backend as _, BackendError};
use crate::checkpoint::dialect::store::Content;
use crate::checkpoint::resolve::LinearRole;
use crate::checkpoint::tensors::{TensorStore, TensorView};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::Row;
use crate::formats::kv::KvFormat;
use crate::formats::linear::{BlockScales, Element, LinearTensors};
use crate::model::modules::Module;
use crate::model::{Blocks, Decoder, LoadError, ModelConfig, Source};

/// A quantized model, its teacher, and what training made of its blocks so far.
pub struct Streamed<'a> {
    pub student: &'a Checkpoint,
    pub teacher: &'a Checkpoint,
    /// The model whose weights masters begin at, if another than the student.
    masters: Option<&'a Checkpoint>,
    backend: AutogradBackend,
    pub config: ModelConfig,
    pub sizes: Vec<BlockSize>,
    /// The first blocks, as training left them.
    trained: Vec<TensorStore>,
    /// Who else trains them, and what they have to open.
    team: Option<(Arc<Team>, Models)>,
}

/// What is told of a block that was trained: keeps it, and says how many steps the next one has.
pub(super) type Each<'e> = dyn FnMut(&BlockReport, &BlockStudent) -> Result<(usize, TensorStore)> + 'e;

/// How large a block is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockSize {
    /// Quantized linears, and their weights.
    pub linears: usize,
    pub quantized: usize,
    /// Weights of linears that are not.
    pub floats: usize,
    /// Whether some have four bits.
    pub coarse: bool,
}

impl BlockSize {
    /// Weights of all its linears.
    #[must_use]
    pub fn weights(&self) -> usize {
        self.quantized + self.floats
    }

    /// Bytes that training it needs beside activations, where products have operands of `operand` bytes: the student's operands,
    /// block scales, masters, gradients and moments. The teacher's operands are gone by then.
    #[must_use]
    pub fn training_bytes(&self, operand: usize) -> u64 {
        let (quantized, all) = (self.quantized as u64, self.weights() as u64);
        // A scale of four bytes for sixteen weights.
        all * operand as u64 + quantized / 4 + quantized * (4 + 4 + Moments::BYTES as u64)
    }
}

/// The configuration of a quantized model, and the sizes of all its blocks. What is wrong with any part of it is found here, however it is loaded then.
///
/// # Errors
/// When a part is damaged, something is left over, or no linear is quantized.
pub fn sizes(checkpoint: &Checkpoint) -> Result<(ModelConfig, Vec<BlockSize>)> {
    let config = Source::config(checkpoint).map_err(LoadError::from)?;
    let mut sizes = vec![BlockSize::default(); config.layers.len()];
    look_through(checkpoint, &config, &mut |Module { role, layer, .. }, linear| {
        let Some(size) = layer.and_then(|l| sizes.get_mut(l)) else { return };
        if linear.element.is_float() {
            size.floats += role.n * role.k;
        } else {
            size.linears += 1;
            size.quantized += role.n * role.k;
            size.coarse |= linear.element == Element::E2m1;
        }
    })?;
    if sizes.iter().all(|s| s.linears == 0) {
        return Err(RecoverError::NotQuantized(checkpoint.tensors.folder().into()));
    }
    Ok((config, sizes))
}

/// Resolves every part of a model, as loading all of it would; `each` sees the linears.
fn look_through(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    each: &mut dyn FnMut(&Module, &LinearTensors<'_>),
) -> Result<()> {
    for m in config.modules() {
        each(&m, &checkpoint.linear(&m.name, m.role)?);
    }
    for (name, shape) in config.vectors() {
        checkpoint.floats(&name, &shape)?;
    }
    for (_, module, _) in config.attentions() {
        checkpoint.kv_scales(&module)?;
    }
    Ok(Source::finish(checkpoint)?)
}

impl<'a> Streamed<'a> {
    /// Configuration and sizes as [`sizes`] has them of the student; masters begin at the weights of `masters`, or the student's own.
    ///
    /// # Errors
    /// What is wrong with a part of the teacher or of `masters`.
    pub fn new(
        student: &'a Checkpoint,
        teacher: &'a Checkpoint,
        masters: Option<&'a Checkpoint>,
        backend: AutogradBackend,
        (config, sizes): (ModelConfig, Vec<BlockSize>),
    ) -> Result<Self> {
        for other in [Some(teacher), masters].into_iter().flatten() {
            look_through(other, &Source::config(other).map_err(LoadError::from)?, &mut |_, _| {})?;
        }
        Ok(Self { student, teacher, masters, backend, config, sizes, trained: Vec::new(), team: None })
    }

    /// Lets other processes train it too, which open `models`.
    #[must_use]
    pub fn with_team(self, team: Option<(Arc<Team>, Models)>) -> Self {
        Self { team, ..self }
    }

    /// Whether `stages` are of a kind that is trained so: blocks and nothing else, once.
    #[must_use]
    pub fn does(stages: &[Stage]) -> bool {
        matches!(stages, [Stage { method: Method::Block(_), .. }])
    }

    /// The student's block `block` with its masters, as it is before it is trained.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn block(&self, block: usize, options: &block::Options) -> Result<BlockStudent> {
        let mut student = Student::load_block(self.student, self.masters, self.backend.clone(), block)?;
        if options.scales {
            student.allow_scales(false);
        }
        Ok(student)
    }

    /// The student's block `block` as training left it, or as it is where it was not trained.
    fn trained_block(&self, block: usize) -> Result<Blocks<AutogradBackend>> {
        let source = Overlaid { checkpoint: self.student, over: self.trained.get(block) };
        Ok(Blocks::load(self.backend.clone(), &source, block..block + 1)?)
    }

    /// The teacher's block `block`.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn teacher_block(&self, block: usize) -> Result<Blocks<AutogradBackend>> {
        Ok(Blocks::load(self.backend.clone(), self.teacher, block..block + 1)?)
    }

    /// What stands before and behind the blocks of student and teacher.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn ends(&self) -> Result<[Decoder<AutogradBackend>; 2]> {
        let ends = |of: &Checkpoint| Decoder::load_ends(self.backend.clone(), of);
        Ok([ends(self.student)?, ends(self.teacher)?])
    }

    /// The hidden states that the teacher's head gets of `rows`.
    ///
    /// # Errors
    /// When a block cannot be loaded, or the states are no numbers.
    pub fn taught(&self, ends: &Decoder<AutogradBackend>, rows: &[&Row]) -> Result<Vec<Vec<f32>>> {
        through(ends, self.teacher.tensors.folder(), rows, &|block| self.teacher_block(block))
    }

    /// And those that the student's gets.
    ///
    /// # Errors
    /// As [`Self::taught`].
    pub fn learned(&self, ends: &Decoder<AutogradBackend>, rows: &[&Row]) -> Result<Vec<Vec<f32>>> {
        through(ends, self.student.tensors.folder(), rows, &|block| self.trained_block(block))
    }

    /// The loss of the student, as it is, on texts that the teacher has seen.
    ///
    /// # Errors
    /// As [`Self::taught`].
    pub fn losses(&self, watched: &[Watched]) -> Result<Vec<f64>> {
        if watched.is_empty() {
            return Ok(Vec::new());
        }
        let [student, teacher] = self.ends()?;
        let rows: Vec<&Row> = watched.iter().flat_map(Watched::rows).collect();
        let mut states = self.learned(&student, &rows)?.into_iter();
        let width = self.config.hidden;
        watched
            .iter()
            .map(|text| {
                let mut next = |_: &Row| {
                    let values = states.next().unwrap_or_default();
                    let rows = values.len() / width;
                    Tensor::from_vec(values, (rows, width), &Device::Cpu).during("evaluation")
                };
                text.loss_of(&mut next, student.head(), Some(teacher.head()))
            })
            .collect()
    }

    /// Texts to be watched, seen by the teacher.
    ///
    /// # Errors
    /// As [`Self::taught`].
    pub fn watch(&self, texts: Vec<(String, Data)>) -> Result<Vec<Watched>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let [_, teacher] = self.ends()?;
        let rows: Vec<&Row> = texts.iter().flat_map(|(_, data)| &data.rows).collect();
        let mut states = self.taught(&teacher, &rows)?.into_iter();
        Ok(texts
            .into_iter()
            .map(|(name, data)| {
                let seen = states.by_ref().take(data.rows.len()).collect();
                Watched::seen(name, data.rows, seen)
            })
            .collect())
    }

    /// Bytes that go to the disk while `tokens` tokens are trained on: four streams of hidden states, what the blocks become, and
    /// the masters of one as they were.
    #[must_use]
    pub fn disk(&self, tokens: usize) -> u64 {
        let blocks: usize = self.sizes.iter().map(|s| if s.coarse { s.quantized / 2 } else { s.quantized }).sum();
        let largest = self.sizes.iter().map(|s| 4 * s.quantized).max().unwrap_or(0);
        4 * 2 * (tokens * self.config.hidden) as u64 + (blocks + largest) as u64
    }

    /// Takes the blocks that a run in `folder` has trained; gives the lines of its curve that there were then.
    pub(super) fn resume(&mut self, folder: &RunFolder) -> Result<usize> {
        let mut lines = 0;
        while let Some((at, tensors)) = folder.trained(self.trained.len())? {
            lines = at.lines;
            self.trained.push(tensors);
        }
        Ok(lines)
    }

    /// How many blocks have been trained.
    #[must_use]
    pub fn done(&self) -> usize {
        self.trained.len()
    }

    /// Forgets what training made of it.
    pub(super) fn forget(&mut self) {
        self.trained.clear();
    }

    /// Trains the blocks that have not been trained, one after the other, the first of them for `steps`. `each` is told of every
    /// block, has it in `folder` then, and says how many steps the next one has. 0: it stays as it is, as do all that follow.
    pub(super) fn train(
        &mut self,
        data: &Data,
        options: &block::Options,
        folder: &Path,
        steps: usize,
        each: &mut Each<'_>,
    ) -> Result<()> {
        let from = self.done();
        if from >= self.config.layers.len() || steps == 0 {
            return Ok(());
        }
        let others = match &self.team {
            None => None,
            Some((team, models)) => {
                let trained: Vec<PathBuf> = (0..from).map(|block| folder.join(trained_name(block))).collect();
                Some(team.stream(models, options, data, (&trained, steps))?)
            }
        };
        self.train_part(data, options, folder, steps, others.as_ref(), each)
    }

    /// One process's part of that.
    pub(super) fn train_part(
        &mut self,
        data: &Data,
        options: &block::Options,
        folder: &Path,
        mut steps: usize,
        others: Option<&Others>,
        each: &mut Each<'_>,
    ) -> Result<()> {
        let (from, layers) = (self.done(), self.config.layers.len());
        let walk = self.ends().and_then(|[student, teacher]| Walk::begin(&student, &teacher, data, *options, folder));
        let mut walk = agreed(others, walk)?.with(others.cloned());
        for block in 0..layers {
            if block >= from && steps == 0 {
                break;
            }
            let targets = walk.targets(&agreed(others, self.teacher_block(block))?, block)?;
            if block < from {
                walk.pass(&agreed(others, self.trained_block(block))?, block, targets)?;
                continue;
            }
            let mut student = agreed(others, self.block(block, options))?;
            let report = walk.train(&mut student, block, steps, targets)?;
            let told = each(&report, &student);
            if let Some(others) = others.filter(|others| others.is_root()) {
                let _ = others.tell(told.as_ref().ok().map(|(steps, _)| *steps));
            }
            let trained;
            (steps, trained) = told?;
            self.trained.push(trained);
        }
        Ok(())
    }
}

/// What the head of a model gets of each of `rows`, of which one block after the other is loaded.
fn through(
    ends: &Decoder<AutogradBackend>,
    folder: &Path,
    rows: &[&Row],
    load: &dyn Fn(usize) -> Result<Blocks<AutogradBackend>>,
) -> Result<Vec<Vec<f32>>> {
    let backend = ends.backend();
    let width = ends.config.hidden;
    let tensor = |values: Vec<f32>| {
        let rows = values.len() / width;
        Tensor::from_vec(values, (rows, width), &Device::Cpu).during("hidden states")
    };
    let embedded = |row: &&Row| Ok(backend.to_host(&ends.embed(&ends.pass(&batch(&[row]))?)?)?);
    let mut states: Vec<Vec<f32>> = rows.iter().map(embedded).collect::<Result<_>>()?;
    for block in 0..ends.config.layers.len() {
        let loaded = load(block)?;
        for (state, row) in states.iter_mut().zip(rows) {
            let pass = loaded.pass(&batch(&[row]))?;
            let x = loaded.block(block, tensor(std::mem::take(state))?, &pass, &mut cache(&loaded)?)?;
            if !backend.squares_finite(&x, width)? {
                let place = format!("the square of what leaves `{}.{block}`", ends.config.names.layers);
                return Err(BackendError::NotFinite { model: folder.into(), place, value: f32::INFINITY }.into());
            }
            *state = backend.to_host(&x)?;
        }
    }
    states.into_iter().map(|state| Ok(backend.to_host(&ends.final_norm(&tensor(state)?)?)?)).collect()
}

/// Names of what is kept of a module, or of a tensor that is no linear's, in the file of its block.
fn kept_as(name: &str, content: Content) -> Option<String> {
    match content {
        Content::Elements => Some(format!("{name}.elements")),
        Content::Scales => Some(format!("{name}.scales")),
        _ => None,
    }
}

/// What is kept of a parameter that was trained: names and bytes.
pub(super) fn kept(p: &Parameter) -> impl Iterator<Item = (String, Vec<u8>)> {
    let of = |content, bytes: Option<Vec<u8>>| kept_as(&p.name, content).zip(bytes);
    [of(Content::Elements, Some(p.bytes())), of(Content::Scales, p.scale_bytes())].into_iter().flatten()
}

impl Trained for Streamed<'_> {
    fn has(&self, name: &str, content: Content) -> bool {
        self.find(name, content).is_some()
    }

    fn bytes(&self, name: &str, content: Content) -> Option<Vec<u8>> {
        let bytes = self.find(name, content)?.bytes.to_vec();
        self.file_of(name)?.release_pages();
        Some(bytes)
    }
}

impl Streamed<'_> {
    /// What training made of the block that a module or tensor is in.
    fn file_of(&self, name: &str) -> Option<&TensorStore> {
        let layer = name.strip_prefix(self.config.names.layers)?.strip_prefix('.')?.split('.').next()?;
        self.trained.get(layer.parse::<usize>().ok()?)
    }

    fn find(&self, name: &str, content: Content) -> Option<TensorView<'_>> {
        self.file_of(name)?.peek(&kept_as(name, content)?)
    }
}

/// A checkpoint with some tensors of a block replaced.
struct Overlaid<'a> {
    checkpoint: &'a Checkpoint,
    over: Option<&'a TensorStore>,
}

impl Overlaid<'_> {
    fn find(&self, name: &str, content: Content) -> Option<TensorView<'_>> {
        self.over?.peek(&kept_as(name, content)?)
    }
}

impl Source for Overlaid<'_> {
    fn place(&self) -> PathBuf {
        self.checkpoint.place()
    }

    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        Source::config(self.checkpoint)
    }

    fn linear(&self, name: &str, role: LinearRole) -> Result<LinearTensors<'_>, CheckpointError> {
        let mut linear = self.checkpoint.linear(name, role)?;
        if let Some(view) = self.find(name, Content::Elements) {
            linear.data = Cow::Borrowed(view.bytes);
        }
        if let (Some(view), BlockScales::E4m3 { codes, .. }) =
            (self.find(name, Content::Scales), &mut linear.block_scales)
        {
            *codes = Cow::Borrowed(view.bytes);
        }
        Ok(linear)
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        match (self.find(name, Content::Elements), self.checkpoint.tensors.peek(name)) {
            (Some(own), Some(view)) => TensorView { bytes: own.bytes, ..view }.floats(),
            _ => self.checkpoint.vector(name, shape),
        }
    }

    fn kv(&self, module: &str) -> Result<Option<KvFormat>, CheckpointError> {
        self.checkpoint.kv(module)
    }

    fn part_done(&self) {
        self.checkpoint.part_done();
        if let Some(over) = self.over {
            over.release_pages();
        }
    }

    fn finish(&self) -> Result<(), CheckpointError> {
        Source::finish(self.checkpoint)
    }
}
