//! What a step, a look and a saved state take on this machine: a few are made for that, and their effect is thrown away.

use std::borrow::Borrow;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::block::{self, Stream, Walk};
use super::budget::StageCost;
use super::data::Data;
use super::distill::{self, Watched};
use super::run_folder::RunFolder;
use super::stage::{Method, Stage};
use super::streamed::BlockSize;
use super::student::Student;
use super::trainee::Trainee;
use super::trainer::learned;
use super::{RecoverError, Result, written};
use crate::backend::autograd::AutogradBackend;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::spread;
use crate::model::{Blocks, Decoder};

/// Where and by what clock something is measured.
pub struct Bench<'a> {
    /// Seconds.
    pub now: &'a dyn Fn() -> f64,
    /// Measuring a stage ends after so many seconds, with what there is until then.
    pub patience: f64,
    /// A folder for what is written meanwhile, on the disk that the run writes to.
    pub scratch: &'a Path,
}

/// Steps that are made, the first of which finds no memory ready.
const STEPS: usize = 4;
/// Steps of the block that is trained.
const BLOCK_STEPS: usize = 9;
/// Sequences of it.
const BLOCK_SEQUENCES: usize = 8;
/// The share of them that a block is judged by.
const JUDGED: f64 = 1.0 / 8.0;

impl Bench<'_> {
    fn time<T>(&self, what: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        let start = (self.now)();
        let value = what()?;
        Ok((value, (self.now)() - start))
    }

    /// What one step of a stage takes, of every block where it trains blocks, and the rest of it that hangs on no step: of blocks
    /// the passes of `samples` sequences, or where their number hangs on that of the steps (`None`) of as many a step as it sees. A
    /// student in memory is another one afterwards.
    ///
    /// # Errors
    /// As those of the methods; where there is no teacher.
    pub fn stage(
        &self,
        trainee: &mut Trainee<'_>,
        data: &Data,
        stage: &Stage,
        samples: Option<usize>,
    ) -> Result<StageCost> {
        match (trainee, &stage.method) {
            (Trainee::Whole { student, teacher: Some(teacher) }, Method::Distill(options)) => {
                self.steps(student, teacher, data, options)
            }
            (Trainee::Whole { student, teacher: Some(teacher) }, Method::Block(options)) => {
                let sizes: Vec<usize> = (0..student.decoder.config.layers.len())
                    .map(|layer| {
                        student.parameters.iter().filter(|p| p.layer == Some(layer)).map(|p| p.master().len()).sum()
                    })
                    .collect();
                let block = largest(&sizes);
                let data = few(data);
                let walk = Walk::begin(&student.decoder, teacher, &data, all_of(options), self.scratch)?;
                let (targets, taught) = self.taught(&walk, teacher, block)?;
                let cost = self.block(walk, student, (targets, taught), block)?;
                Ok(cost.of_all(&sizes, block, options, samples))
            }
            (Trainee::Streamed(model), Method::Block(options)) => {
                let sizes: Vec<usize> = model.sizes.iter().map(BlockSize::weights).collect();
                let block = largest(&sizes);
                let data = few(data);
                let walk = {
                    let [student, teacher] = model.ends()?;
                    Walk::begin(&student, &teacher, &data, all_of(options), self.scratch)?
                };
                let (teacher, loaded) = self.time(|| model.teacher_block(block))?;
                let (targets, taught) = self.taught(&walk, &teacher, block)?;
                drop(teacher);
                let (mut student, read) = self.time(|| model.block(block, options))?;
                let mut cost = self.block(walk, &mut student, (targets, taught), block)?;
                let folder = RunFolder::create(&self.emptied("measured")?, &json!({}))?;
                let (_, save) = self.time(|| folder.save_trained(&student, |_| true, block))?;
                folder.remove()?;
                let (_, dropped) = self.time(|| {
                    drop(student);
                    Ok(())
                })?;
                cost.fixed += loaded + read + save + dropped;
                Ok(cost.of_all(&sizes, block, options, samples))
            }
            _ => Err(RecoverError::Asked(format!("{}: there is nothing to measure it on", stage.name))),
        }
    }

    fn steps(
        &self,
        student: &mut Student,
        teacher: &Decoder<AutogradBackend>,
        data: &Data,
        options: &distill::Options,
    ) -> Result<StageCost> {
        let all = student.everything;
        student.train(|p| learned(p, options, all));
        let options = distill::Options { steps: STEPS, ..*options };
        let teacher = Some(teacher).filter(|_| options.kl > 0.0 || options.hidden > 0.0);
        let began = (self.now)();
        let mut last = began;
        let mut took = Vec::new();
        distill::train(student, teacher, data, &options, 0, &mut |_, _| {
            let now = (self.now)();
            took.push(now - std::mem::replace(&mut last, now));
            Ok(if now - began > self.patience { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(StageCost { step: typical(&mut took), ..StageCost::default() })
    }

    /// What leaves the teacher's block, for each use of it in [`Self::block`], and what a pass through it takes.
    fn taught<'w>(
        &self,
        walk: &Walk<'w>,
        teacher: &Blocks<AutogradBackend>,
        block: usize,
    ) -> Result<([Stream<'w>; 2], f64)> {
        let (first, seconds) = self.time(|| walk.targets(teacher, block))?;
        Ok(([first, walk.targets(teacher, block)?], seconds))
    }

    /// What training one block takes, of the sequences of `walk`.
    fn block<'w, M: Borrow<Blocks<AutogradBackend>>>(
        &self,
        mut walk: Walk<'w>,
        student: &mut Student<M>,
        ([first, second], taught): ([Stream<'w>; 2], f64),
        block: usize,
    ) -> Result<BlockCost> {
        let (report, trained) = self.time(|| walk.train(student, block, BLOCK_STEPS, first))?;
        let all: f64 = walk.took.iter().sum();
        let step = typical(&mut walk.took);
        let (_, learned) = self.time(|| walk.pass(student.blocks(), block, second))?;
        // Those that are judged by before, all after, and all again where it got worse.
        let passes = 1.0 + JUDGED;
        let again = if report.after == report.before { 1.0 } else { 0.0 };
        // What is neither steps nor passes: weights set aside, moments that come and go.
        let fixed = (trained - all - (passes + again) * learned).max(0.0);
        // So few steps say little of whether others will make it worse.
        let pass = (taught + (passes + 0.25 + 0.25 * again) * learned) / BLOCK_SEQUENCES as f64;
        Ok(BlockCost { fixed, step, pass })
    }

    /// What a look at the watched texts takes, and before the first one the teacher's pass over them.
    ///
    /// # Errors
    /// As [`Watched::loss`].
    pub fn look(&self, trainee: &Trainee<'_>, watched: &[(String, Data)]) -> Result<(f64, f64)> {
        let (mut ready, mut look) = (0.0, 0.0);
        match trainee {
            Trainee::Whole { student, teacher } => {
                for (name, data) in watched {
                    let teacher = teacher.as_deref();
                    let (text, before) = self.time(|| Watched::new(name.clone(), data.rows.clone(), teacher))?;
                    let (_, after) = self.time(|| text.loss(&student.decoder, teacher))?;
                    (ready, look) = (ready + before, look + after);
                }
            }
            Trainee::Streamed(model) if !watched.is_empty() => {
                let (texts, before) = self.time(|| model.watch(watched.to_vec()))?;
                (_, look) = self.time(|| model.losses(&texts))?;
                ready = before;
            }
            Trainee::Streamed(_) => {}
        }
        Ok((ready, look))
    }

    /// What keeping the best weights takes, and writing the result.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn writing(&self, trainee: &Trainee<'_>, of: &Checkpoint) -> Result<(f64, f64)> {
        let out = self.emptied("written")?;
        let save = match trainee {
            Trainee::Whole { student, .. } => {
                let folder = RunFolder::create(&self.emptied("measured")?, &json!({}))?;
                let (_, save) = self.time(|| folder.save_best(student, 0, 0))?;
                folder.remove()?;
                save
            }
            // Blocks are kept one by one, and nothing at the end.
            Trainee::Streamed(_) => 0.0,
        };
        let (_, write) = self.time(|| written::write(of, &*trainee.trained(), &[], &out))?;
        remove(&out)?;
        Ok((save, write))
    }

    /// A folder of that name, which a run that was killed here may have left.
    fn emptied(&self, name: &str) -> Result<PathBuf> {
        let folder = self.scratch.join(name);
        remove(&folder)?;
        Ok(folder)
    }
}

/// The median of what steps took, but for the first.
fn typical(took: &mut [f64]) -> f64 {
    let later = if took.len() > 1 { &mut took[1..] } else { took };
    later.sort_by(f64::total_cmp);
    later.get(later.len() / 2).copied().unwrap_or(0.0)
}

/// What training a block takes, in seconds.
struct BlockCost {
    /// Reading it, making ready, keeping it.
    fixed: f64,
    step: f64,
    /// All passes of one sequence through it.
    pass: f64,
}

impl BlockCost {
    /// The same of all blocks, `sizes` weights each, of which `block` was measured. Without a number of their own, sequences are as
    /// many as the steps take.
    fn of_all(&self, sizes: &[usize], block: usize, options: &block::Options, samples: Option<usize>) -> StageCost {
        let share = sizes.iter().sum::<usize>() as f64 / sizes[block].max(1) as f64;
        let pass = self.pass * share;
        let (fixed, step) = match samples {
            Some(samples) => (pass * samples as f64, 0.0),
            None => (0.0, pass * (options.sequences * options.accumulate) as f64),
        };
        StageCost { fixed: fixed + self.fixed * share, step: step + self.step * share, ..StageCost::default() }
    }
}

/// The block to measure: what it takes in memory is what all take at the most.
fn largest(sizes: &[usize]) -> usize {
    (0..sizes.len()).rev().max_by_key(|i| sizes[*i]).unwrap_or(0)
}

fn few(data: &Data) -> Data {
    Data { rows: spread(&data.rows, BLOCK_SEQUENCES), description: String::new() }
}

fn all_of(options: &block::Options) -> block::Options {
    block::Options { samples: None, ..*options }
}

/// Removes a folder, where there is one.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CheckpointError::io(folder, "remove", e).into()),
        _ => Ok(()),
    }
}
