//! What a step, a look and a saved state take on this machine: a few are made for that, and their effect is thrown away.

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::json;

use super::best_known::setting;
use super::budget::StageCost;
use super::data::Data;
use super::distill::{self, Watched};
use super::run_folder::RunFolder;
use super::stage::{Method, Stage};
use super::student::Student;
use super::trainer::learned;
use super::{Result, block};
use crate::backend::autograd::AutogradBackend;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::spread;
use crate::model::Decoder;
use crate::output::space::human_bytes;

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
/// Sequences and steps of the blocks that are trained, once with few and once with more of the latter.
const BLOCK_SEQUENCES: usize = 8;
const BLOCK_STEPS: [usize; 2] = [2, 6];
/// Passes of a sequence through a block, in passes of both models: one of the teacher's, and up to two of the student's.
const PASSES: f64 = 1.5;

impl Bench<'_> {
    fn time<T>(&self, what: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        let start = (self.now)();
        let value = what()?;
        Ok((value, (self.now)() - start))
    }

    /// What one step of a stage takes, of every block where it trains blocks, and the rest of it that hangs on no step. The
    /// student is another one afterwards.
    ///
    /// # Errors
    /// As those of the methods.
    pub fn stage(
        &self,
        student: &mut Student,
        teacher: &Decoder<AutogradBackend>,
        data: &Data,
        stage: &Stage,
        asked: &str,
    ) -> Result<StageCost> {
        match &stage.method {
            Method::Distill(options) => self.steps(student, teacher, data, options),
            Method::Block(options) => self.blocks(student, teacher, data, options, setting(asked, "samples")),
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
        let later = if took.len() > 1 { &mut took[1..] } else { &mut took[..] };
        later.sort_by(f64::total_cmp);
        Ok(StageCost { step: later[later.len() / 2], ..StageCost::default() })
    }

    fn blocks(
        &self,
        student: &mut Student,
        teacher: &Decoder<AutogradBackend>,
        data: &Data,
        options: &block::Options,
        samples: Option<usize>,
    ) -> Result<StageCost> {
        let layers = student.decoder.config.layers.len();
        let data = Data { rows: spread(&data.rows, BLOCK_SEQUENCES), description: String::new() };
        let mut of = |steps: usize| {
            let options = block::Options { steps, samples: None, ..*options };
            let last = layers.saturating_sub(1);
            let train = || block::train(student, teacher, &data, &options, last, self.scratch, &mut |_, _| Ok(()));
            Ok::<_, super::RecoverError>(self.time(train)?.1)
        };
        let [few, more] = [of(BLOCK_STEPS[0])?, of(BLOCK_STEPS[1])?];
        // Never nothing, whatever disturbed the second.
        let step = ((more - few) / (BLOCK_STEPS[1] - BLOCK_STEPS[0]) as f64).max(0.02 * few);
        let pass = (few - BLOCK_STEPS[0] as f64 * step).max(0.0) / (data.rows.len().max(1) * layers.max(1)) as f64;
        let passes = PASSES * pass * layers as f64;
        // Without a number of their own, sequences are as many as the steps take.
        Ok(match samples {
            Some(samples) => {
                StageCost { fixed: passes * samples as f64, step: step * layers as f64, ..Default::default() }
            }
            None => StageCost { step: step * layers as f64 + passes * options.sequences as f64, ..Default::default() },
        })
    }

    /// What a look at the watched texts takes, and before the first one the teacher's pass over them.
    ///
    /// # Errors
    /// As [`Watched::loss`].
    pub fn look(
        &self,
        student: &Student,
        teacher: &Decoder<AutogradBackend>,
        watched: &[(String, Data)],
    ) -> Result<(f64, f64)> {
        let (mut ready, mut look) = (0.0, 0.0);
        for (name, data) in watched {
            let (text, before) = self.time(|| Watched::new(name.clone(), data.rows.clone(), Some(teacher)))?;
            let (_, after) = self.time(|| text.loss(&student.decoder, Some(teacher)))?;
            (ready, look) = (ready + before, look + after);
        }
        Ok((ready, look))
    }

    /// What keeping the best weights takes, and writing the result.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn writing(&self, student: &Student, of: &Checkpoint) -> Result<(f64, f64)> {
        let (state, out) = (self.scratch.join("measured"), self.scratch.join("written"));
        // Of a run that was killed here.
        remove(&state)?;
        remove(&out)?;
        let folder = RunFolder::create(&state, &json!({}))?;
        let (_, save) = self.time(|| folder.save_best(student, 0, 0))?;
        folder.remove()?;
        let (_, write) = self.time(|| student.write(of, &[], &out))?;
        remove(&out)?;
        Ok((save, write))
    }
}

/// Removes a folder, where there is one.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(CheckpointError::io(folder, "remove", e).into()),
        _ => Ok(()),
    }
}

/// Whether the optimizer's state for the whole model, gradients and two moments of each quantized weight, has room in `free`
/// bytes beside the models themselves; says what is missing where it has none.
///
/// # Errors
/// What it would need.
pub fn has_room(student: &Student, free: Option<u64>) -> std::result::Result<(), String> {
    let weights: usize = student.parameters.iter().filter(|p| p.is_quantized()).map(|p| p.master().len()).sum();
    let needed = 12 * weights as u64;
    match free {
        Some(free) if free < needed + needed / 4 => Err(format!(
            "gradients and moments of the whole model take {}, {} are free",
            human_bytes(needed),
            human_bytes(free)
        )),
        _ => Ok(()),
    }
}
