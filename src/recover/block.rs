//! Block by block: each block of the student learns to give what the teacher's block gives, from the student's own input.
//!
//! Three streams of hidden states go through the model side by side: what enters the student's block, what enters the
//! teacher's, and what leaves the teacher's. They lie on disk, in BF16. One block's masters have gradients at a time; no
//! vocabulary is involved.

use std::borrow::Borrow;
use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::data::{Data, Order, batch};
use super::optimizer::{AdamW, cosine};
use super::parameter::{Learned, Parameter, Rates};
use super::schedule::Schedule;
use super::student::Student;
use super::team::alike::{Others, agreed};
use super::team::shared::Shared;
use super::{During as _, RecoverError, Result};
use crate::backend::autograd::{AutogradBackend, loss};
use crate::backend::{Backend as _, HostPass};
use crate::checkpoint::CheckpointError;
use crate::corpus::{Row, spread};
use crate::formats::kv::KvFormat;
use crate::model::{Blocks, Decoder};

/// How blocks are trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub learning_rate: f32,
    /// Optimizer steps of each block.
    pub steps: usize,
    pub warmup: usize,
    /// Sequences in a batch.
    pub sequences: usize,
    /// Batches in a step; their gradients are added up.
    #[serde(skip_serializing_if = "is_one")]
    pub accumulate: usize,
    /// Uses so many of the data's sequences, evenly spaced; each costs a pass through every block. Fewer than steps ·
    /// sequences are seen more than once, and learned by heart. `None`: all.
    pub samples: Option<usize>,
    /// Trains what is no matrix as well: norms, sinks, a mixer's own numbers.
    pub norms: bool,
    /// Trains block scales as well, where they are E4M3 codes.
    pub scales: bool,
    /// Learns which of the two codes beside it each weight goes to, instead of moving weights.
    pub rounding: bool,
    pub seed: u64,
    pub adam: AdamW,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            learning_rate: 3e-4,
            steps: 64,
            warmup: 5,
            sequences: 4,
            accumulate: 1,
            samples: Some(256),
            norms: false,
            scales: false,
            rounding: false,
            seed: 0,
            adam: AdamW::default(),
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_one(n: &usize) -> bool {
    *n == 1
}

/// What training one block did: mean error, relative to the teacher's output, over sequences that it is not trained on.
/// A block that got worse there is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BlockReport {
    pub block: usize,
    pub before: f64,
    pub after: f64,
}

/// Learning rates end at this share of their peak.
const FLOOR: f32 = 0.1;

/// One sequence in so many is held out, where there are enough.
const HELD_OUT: usize = 8;
/// At most so many are.
const MOST_HELD_OUT: usize = 32;

/// Trains the blocks from block `from` on, in order; those before it have been trained. `each` sees every block once it is.
/// Hidden states are kept in unnamed files in the folder `scratch`, at most four of 2 bytes · tokens · hidden size.
///
/// # Errors
/// When an error is no number, a file cannot be written or read, or from `each`.
pub fn train(
    student: &mut Student,
    teacher: &Decoder<AutogradBackend>,
    data: &Data,
    options: &Options,
    from: usize,
    scratch: &Path,
    each: &mut dyn FnMut(&BlockReport, &Student) -> Result<()>,
) -> Result<()> {
    let schedule = &mut Schedule::new(options.steps, Vec::new());
    let each = &mut |report: &BlockReport, student: &Student, _: &mut Schedule| each(report, student);
    train_as(student, teacher, data, options, from, scratch, schedule, each)
}

/// [`train`], each block for the steps that the schedule has for it, which `each` may cut for those that follow; by all of the
/// student's team.
///
/// # Errors
/// As [`train`].
#[allow(clippy::too_many_arguments)]
pub fn train_as(
    student: &mut Student,
    teacher: &Decoder<AutogradBackend>,
    data: &Data,
    options: &Options,
    from: usize,
    scratch: &Path,
    schedule: &mut Schedule,
    each: &mut Each<'_>,
) -> Result<()> {
    let steps = schedule.of_block(from);
    let others = student.team.clone().map(|team| team.blocks(student, options, data, (from, steps))).transpose()?;
    train_part(student, teacher, data, Part { options: *options, from, others }, scratch, schedule, each)
}

/// What is told of a block that was trained, and may change the schedule.
pub(super) type Each<'e> = dyn FnMut(&BlockReport, &Student, &mut Schedule) -> Result<()> + 'e;

/// What of a training is done here.
pub(super) struct Part {
    pub options: Options,
    pub from: usize,
    pub others: Option<Others>,
}

/// One process's part of [`train_as`].
pub(super) fn train_part(
    student: &mut Student,
    teacher: &Decoder<AutogradBackend>,
    data: &Data,
    Part { options, from, others }: Part,
    scratch: &Path,
    schedule: &mut Schedule,
    each: &mut Each<'_>,
) -> Result<()> {
    let walk = Walk::begin(&student.decoder, teacher, data, options, scratch);
    let mut walk = agreed(others.as_ref(), walk)?.with(others.clone());
    for block in 0..student.decoder.config.layers.len() {
        let steps = schedule.of_block(block);
        if block >= from && steps == 0 {
            break;
        }
        let targets = walk.targets(teacher, block)?;
        if block < from {
            walk.pass(&student.decoder, block, targets)?;
            continue;
        }
        let report = walk.train(student, block, steps, targets)?;
        let told = each(&report, student, schedule);
        if let Some(others) = others.as_ref().filter(|others| others.is_root()) {
            let _ = others.tell(told.as_ref().ok().map(|()| schedule.of_block(block + 1)));
        }
        told?;
    }
    student.train(|_| Learned::default());
    Ok(())
}

/// The hidden states of both models on their way through the blocks.
pub(super) struct Walk<'a> {
    options: Options,
    /// Sequences that are judged by, then the others.
    data: Data,
    /// So many of the first are not trained on.
    held_out: usize,
    /// The sequences that are judged by alone.
    judged: Data,
    /// What enters the student's next block, and the teacher's.
    inputs: Stream<'a>,
    reference: Stream<'a>,
    /// Seconds that each step took of the block that was trained last.
    pub(super) took: Vec<f64>,
    /// Those who go through the blocks alike.
    others: Option<Others>,
}

impl<'a> Walk<'a> {
    /// Before the first block: of both models what stands before it is needed.
    pub(super) fn begin(
        student: &Decoder<AutogradBackend>,
        teacher: &Decoder<AutogradBackend>,
        data: &Data,
        options: Options,
        scratch: &'a Path,
    ) -> Result<Self> {
        let rows = spread(&data.rows, options.samples.unwrap_or(usize::MAX));
        let held_out = (rows.len() / HELD_OUT).min(MOST_HELD_OUT);
        let (mut rows, trained): (Vec<Row>, Vec<Row>) = {
            let every = rows.len() / held_out.max(1);
            let held = |i: usize| i.is_multiple_of(every.max(1)) && i / every.max(1) < held_out;
            let (a, b): (Vec<_>, Vec<_>) = rows.into_iter().enumerate().partition(|(i, _)| held(*i));
            (a.into_iter().map(|r| r.1).collect(), b.into_iter().map(|r| r.1).collect())
        };
        rows.extend(trained);
        // Too few to hold any out: judged by all.
        let judged = if held_out > 0 { held_out } else { rows.len() };
        let judged = Data { rows: rows[..judged].to_vec(), description: String::new() };
        let data = Data { rows, description: String::new() };
        let inputs = Stream::embed(student, &data, scratch)?;
        let reference = Stream::embed(teacher, &data, scratch)?;
        Ok(Self { options, data, held_out, judged, inputs, reference, took: Vec::new(), others: None })
    }

    /// The same with others, each of whom has the same.
    pub(super) fn with(self, others: Option<Others>) -> Self {
        Self { others, ..self }
    }

    /// What leaves the teacher's block `block`, the next one.
    pub(super) fn targets(&self, teacher: &Blocks<AutogradBackend>, block: usize) -> Result<Stream<'a>> {
        self.reference.through(teacher, block, &self.data, self.others.as_ref())
    }

    /// Goes through the student's block as it is.
    pub(super) fn pass(&mut self, student: &Blocks<AutogradBackend>, block: usize, targets: Stream<'a>) -> Result<()> {
        self.inputs = self.inputs.through(student, block, &self.data, self.others.as_ref())?;
        self.reference = targets;
        Ok(())
    }

    /// Trains the student's block for `steps`, and goes through it.
    pub(super) fn train<M: Borrow<Blocks<AutogradBackend>>>(
        &mut self,
        student: &mut Student<M>,
        block: usize,
        steps: usize,
        targets: Stream<'a>,
    ) -> Result<BlockReport> {
        let Self { options, held_out, .. } = *self;
        let others = self.others.clone();
        let others = others.as_ref();
        let of = |p: &Parameter| Learned {
            weight: p.layer == Some(block) && (p.is_quantized() || (options.norms && p.is_norm())),
            scales: options.scales && p.layer == Some(block) && p.is_quantized(),
            rounding: options.rounding && p.is_quantized(),
        };
        student.train(of);
        let scratch = self.inputs.scratch;
        let start = agreed(others, student.set_aside(block, scratch).map_err(io(scratch)))?;
        let judged = self.judged.rows.len();
        let inputs = self.inputs.through(student.blocks(), block, &self.judged, others)?;
        let before = agreed(others, inputs.distance(&targets, judged))?;
        let learns = student.parameters.iter().any(|p| of(p).weight);
        let mut shared = others.filter(|_| learns).map(|others| Shared::new(others.link(), student));
        let mut order = Order::new(self.data.rows.len() - held_out, options.seed.wrapping_add(block as u64));
        self.took.clear();
        // A block of floats has nothing to learn.
        for step in 0..if learns { steps } else { 0 } {
            let began = Instant::now();
            let chosen = order.take(options.sequences * options.accumulate).into_iter();
            let chosen: Vec<usize> = chosen.map(|r| held_out + r).collect();
            self.gradients(student, block, step, (&chosen, &targets), shared.as_mut())?;
            let norm = shared.as_ref().map_or_else(|| student.gradient_norm(), |shared| shared.gradient_norm(student));
            let factor = options.adam.clipping(norm);
            let rate = Rates::of(cosine(options.learning_rate, step, steps, options.warmup, FLOOR));
            match &shared {
                Some(shared) => shared.step(student, &options.adam, (step + 1, steps), rate, factor),
                None => student.step(&options.adam, step + 1, steps, rate, factor),
            }
            self.took.push(began.elapsed().as_secs_f64());
        }
        student.settle_rounding();
        let mut outputs = self.inputs.through(student.blocks(), block, &self.data, others)?;
        let mut after = agreed(others, outputs.distance(&targets, judged))?;
        if after > before {
            agreed(others, student.put_back(start).map_err(io(scratch)))?;
            outputs = self.inputs.through(student.blocks(), block, &self.data, others)?;
            after = before;
        }
        self.inputs = outputs;
        self.reference = targets;
        Ok(BlockReport { block, before, after })
    }

    /// Sums the gradients of a step's batches, of the sequences `chosen`: this process's, or with others all of them.
    fn gradients<M: Borrow<Blocks<AutogradBackend>>>(
        &self,
        student: &Student<M>,
        block: usize,
        step: usize,
        (chosen, targets): (&[usize], &Stream<'_>),
        mut shared: Option<&mut Shared>,
    ) -> Result<()> {
        let (rank, size) = self.others.as_ref().map_or((0, 1), Others::place);
        let tokens = |chosen: &[usize]| chosen.iter().map(|c| self.data.rows[*c].len()).sum::<usize>();
        let total = tokens(chosen);
        let batches: Vec<&[usize]> = chosen.chunks(self.options.sequences).collect();
        let one = |chosen: &[usize]| -> Result<f64> {
            let pass = prepare(student.blocks(), &self.data, chosen)?;
            let x = self.inputs.rows(chosen)?;
            let x = Var::from_tensor(&x).during("block")?;
            let mut cache = cache(student.blocks())?;
            let out = student.blocks().block(block, x.as_tensor().clone(), &pass, &mut cache)?;
            let wanted = targets.gather(chosen)?;
            let mut worth = worth(&student.blocks().backend().to_host(&out)?, &wanted, self.inputs.hidden);
            let share = tokens(chosen) as f32 / total as f32;
            worth.iter_mut().for_each(|w| *w *= share);
            let (loss, value) = loss::squared_error(&out, &wanted, &worth).during("block loss")?;
            if value.is_finite() {
                student.apart(|| loss.backward().during("block gradient"))?;
            }
            Ok(value)
        };
        let rounds = batches.chunks(size);
        let count = rounds.len();
        for (i, round) in rounds.enumerate() {
            let own = round.get(rank).map(|chosen| one(chosen)).transpose();
            // All see alike whose error is no number.
            let values = match &self.others {
                None => vec![own?.unwrap_or_default()],
                Some(others) => {
                    let counts: Vec<usize> = (0..size).map(|r| usize::from(r < round.len())).collect();
                    let own = own.map(|value| value.map(|v| vec![v as f32]));
                    others.share(own, &counts)?.into_iter().map(f64::from).collect()
                }
            };
            if let Some(&value) = values.iter().find(|v| !v.is_finite()) {
                self.others.iter().for_each(Others::end);
                return Err(RecoverError::NotFinite { what: format!("error of block {block}"), step, value });
            }
            if let Some(shared) = shared.as_mut() {
                shared.sum(student, round.len(), i == 0, i + 1 == count);
            }
        }
        Ok(())
    }
}

/// Hidden states of every sequence, [tokens, hidden] each, BF16, one after the other in a file without a name.
pub(super) struct Stream<'a> {
    file: File,
    /// Where each sequence begins, in values, and where the last ends.
    starts: Vec<usize>,
    hidden: usize,
    scratch: &'a Path,
}

/// Tokens that go through a block at a time where no gradient is needed.
const CHUNK: usize = 2048;

impl<'a> Stream<'a> {
    /// A stream of what `part` gives, [tokens, hidden] of the next sequences, until there is none.
    fn write(
        scratch: &'a Path,
        data: &Data,
        hidden: usize,
        mut part: impl FnMut(usize) -> Result<Option<Vec<f32>>>,
    ) -> Result<Self> {
        let file = tempfile::tempfile_in(scratch).map_err(io(scratch))?;
        let mut writer = BufWriter::new(&file);
        let mut index = 0;
        while let Some(values) = part(index)? {
            let bytes: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            writer.write_all(&bytes).map_err(io(scratch))?;
            index += 1;
        }
        writer.flush().map_err(io(scratch))?;
        drop(writer);
        let mut starts = vec![0];
        starts.extend(data.rows.iter().scan(0, |end, row| {
            *end += row.len() * hidden;
            Some(*end)
        }));
        Ok(Self { file, starts, hidden, scratch })
    }

    fn embed(decoder: &Decoder<AutogradBackend>, data: &Data, scratch: &'a Path) -> Result<Self> {
        Self::write(scratch, data, decoder.config.hidden, |i| {
            let Some(row) = data.rows.get(i) else { return Ok(None) };
            Ok(Some(decoder.backend().to_host(&decoder.embed(&decoder.pass(&batch(&[row]))?)?)?))
        })
    }

    /// One sequence, [tokens, hidden].
    fn sequence(&self, index: usize) -> Result<Vec<f32>> {
        let (start, end) = (self.starts[index], self.starts[index + 1]);
        let mut bytes = vec![0; 2 * (end - start)];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(2 * start as u64)).map_err(io(self.scratch))?;
        file.read_exact(&mut bytes).map_err(io(self.scratch))?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect())
    }

    fn gather(&self, chosen: &[usize]) -> Result<Vec<f32>> {
        let parts: Vec<Vec<f32>> = chosen.iter().map(|s| self.sequence(*s)).collect::<Result<_>>()?;
        Ok(parts.concat())
    }

    fn rows(&self, chosen: &[usize]) -> Result<Tensor> {
        let values = self.gather(chosen)?;
        let rows = values.len() / self.hidden;
        Tensor::from_vec(values, (rows, self.hidden), &Device::Cpu).during("block input")
    }

    /// What leaves block `block` when this enters it; of as many sequences as `data` has, some of which the others compute.
    fn through(
        &self,
        decoder: &Blocks<AutogradBackend>,
        block: usize,
        data: &Data,
        others: Option<&Others>,
    ) -> Result<Self> {
        let (rank, size) = others.map_or((0, 1), Others::place);
        let chunks = chunks(data);
        let mut rounds = chunks.chunks(size);
        let one = |chosen: &Vec<usize>| -> Result<Vec<f32>> {
            let pass = prepare(decoder, data, chosen)?;
            let out = decoder.block(block, self.rows(chosen)?, &pass, &mut cache(decoder)?)?;
            Ok(decoder.backend().to_host(&out)?)
        };
        let written = Self::write(self.scratch, data, self.hidden, |_| {
            let Some(round) = rounds.next() else { return Ok(None) };
            let own = round.get(rank).map(one).transpose();
            let Some(others) = others else { return own };
            let values = |chosen: &Vec<usize>| chosen.iter().map(|c| data.rows[*c].len() * self.hidden).sum();
            let mut counts: Vec<usize> = round.iter().map(values).collect();
            counts.resize(size, 0);
            others.share(own, &counts).map(Some)
        });
        // What was told is known; what could not be written is not.
        if others.is_some_and(Others::is_over) { written } else { agreed(others, written) }
    }

    /// Mean over the tokens of the first `rows` sequences of [`worth`] · |self - other|².
    fn distance(&self, other: &Self, rows: usize) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0);
        for index in 0..rows {
            let (a, b) = (self.sequence(index)?, other.sequence(index)?);
            let weights = worth(&a, &b, self.hidden);
            for ((a, b), w) in a.chunks_exact(self.hidden).zip(b.chunks_exact(self.hidden)).zip(weights) {
                sum += f64::from(w) * a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                tokens += 1;
            }
        }
        Ok(sum / f64::from(tokens.max(1)))
    }
}

/// Sequences that go through a block at once.
fn chunks(data: &Data) -> Vec<Vec<usize>> {
    let mut chunks: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for (i, row) in data.rows.iter().enumerate() {
        match chunks.last_mut() {
            Some(chunk) if tokens + row.len() <= CHUNK => chunk.push(i),
            _ => {
                tokens = 0;
                chunks.push(vec![i]);
            }
        }
        tokens += row.len();
    }
    chunks
}

/// A failure with what is kept in `scratch` meanwhile.
fn io(scratch: &Path) -> impl Fn(std::io::Error) -> RecoverError + '_ {
    |source| CheckpointError::io(scratch, "keep hidden states and weights in", source).into()
}

/// What the squared error of each token is multiplied by: 2 / (|x|² + |target|²), seen as a constant. Errors are then
/// relative, so that a token with a huge state (an attention sink) counts as any; and at most 4, so that one whose state
/// is huge in only one of the two models does not drown all others.
pub(super) fn worth(x: &[f32], target: &[f32], hidden: usize) -> Vec<f32> {
    let square = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    let one = |(x, target): (&[f32], &[f32])| {
        let size = square(x) + square(target);
        if size > 0.0 { (2.0 / size) as f32 } else { 0.0 }
    };
    x.par_chunks_exact(hidden).zip(target.par_chunks_exact(hidden)).map(one).collect()
}

fn prepare(decoder: &Blocks<AutogradBackend>, data: &Data, chosen: &[usize]) -> Result<HostPass> {
    let rows: Vec<&Row> = chosen.iter().map(|s| &data.rows[*s]).collect();
    Ok(decoder.pass(&batch(&rows))?)
}

/// A KV cache without a page: what is trained on is computed whole, and nothing of it is read again.
pub(super) fn cache(decoder: &Blocks<AutogradBackend>) -> Result<crate::backend::autograd::KvCache> {
    Ok(decoder.new_cache(0, 0, KvFormat::F32)?)
}
