//! The side of those that help the root.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::alike::Others;
use super::shared::Shared;
use super::{Beginning, Models, Part, Task, all_told, bits, read};
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::multiplier::Multiplier;
use crate::backend::autograd::operand::Precision;
use crate::checkpoint::identity::identity;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::Row;
use crate::model::Decoder;
use crate::ranks::Link;
use crate::recover::block::{self, BlockReport};
use crate::recover::data::Data;
use crate::recover::distill::{self, LossPart, Options, Watched};
use crate::recover::parameter::{Parameter, Rates};
use crate::recover::run_folder::RunFolder;
use crate::recover::schedule::Schedule;
use crate::recover::streamed::{self, Streamed};
use crate::recover::student::{BlockStudent, Student};
use crate::recover::trainer::learned;
use crate::recover::{RecoverError, Result};

struct Helper {
    link: Arc<dyn Link>,
    multiplier: Multiplier,
    models: Option<(Student, Decoder<AutogradBackend>)>,
    /// What the student's block scales were told.
    scales: Option<bool>,
    options: Options,
    shared: Option<Shared>,
    /// Texts that were looked at, those rows of them that are this process's, by name and whether with the teacher.
    watched: Vec<(bool, Watched)>,
}

/// Does what the root says, until it says that all is done; `multiplier` multiplies.
///
/// # Errors
/// When what the root says cannot be understood or done; the other processes have to be ended then.
pub fn help(link: Arc<dyn Link>, multiplier: Multiplier) -> Result<()> {
    let mut helper = Helper {
        link,
        multiplier,
        models: None,
        scales: None,
        options: Options::default(),
        shared: None,
        watched: Vec::new(),
    };
    loop {
        let mut task = Vec::new();
        helper.link.broadcast(&mut task);
        match read(&task)? {
            Task::Load(models) => {
                let loaded = helper.load(&models);
                helper.tell(loaded);
            }
            Task::Begin(beginning) => {
                let begun = helper.begin(*beginning);
                helper.tell(begun);
                let (student, _) = helper.models.as_mut().ok_or_else(too_early)?;
                helper.shared = Some(Shared::new(helper.link.clone(), student));
            }
            Task::Round { batches, total, first, last } => {
                helper.round(&batches, f64::from_bits(total), first, last)?
            }
            Task::Move { step, steps, rates, factor } => {
                let [weights, scales, norms] = rates.map(f32::from_bits);
                let options = helper.options;
                let (shared, student) = helper.at_work()?;
                let rates = Rates { weights, scales, norms };
                shared.step(student, &options.adam, (step, steps), rates, f32::from_bits(factor));
                if options.average > 0.0 {
                    student.average(options.average);
                }
            }
            Task::Look { name, rows, teacher } => {
                let parts = helper.look(name, rows, teacher);
                // What went wrong is the root's to find.
                let _ = all_told(&*helper.link, parts.map(bits));
            }
            Task::Blocks { options, scales, state, rows, from, steps } => {
                let taken = helper.take(scales, state);
                let others = Others::new(helper.link.clone());
                let trained = others.agree(taken).and_then(|()| helper.blocks(&options, rows, (from, steps), &others));
                known(trained, &others)?;
            }
            Task::Stream { models, options, rows, from, steps } => {
                let others = Others::new(helper.link.clone());
                let scratch = scratch()?;
                let trained = helper.streamed(&models, &options, rows, (from, steps), &others, scratch.path());
                known(trained, &others)?;
            }
            Task::Fetch { parameter, kind } => {
                let (shared, student) = helper.at_work()?;
                shared.give(student, parameter, &kind);
            }
            Task::Done => return Ok(()),
        }
    }
}

fn too_early() -> RecoverError {
    RecoverError::Asked("the first process asks for training before it said of what".into())
}

/// What went wrong, if not all know of it: that is the root's to say.
fn known(outcome: Result<()>, others: &Others) -> Result<()> {
    outcome.or_else(|e| if others.is_over() { Ok(()) } else { Err(e) })
}

/// A folder for what is written meanwhile, gone afterwards.
fn scratch() -> Result<tempfile::TempDir> {
    let folder = std::env::temp_dir();
    tempfile::tempdir_in(&folder).map_err(|e| CheckpointError::io(&folder, "make a folder in", e).into())
}

/// A model that has to be the one that the first process has.
fn open(folder: &Path, expected: &Value) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(folder)?;
    let found = identity(&checkpoint.tensors, &mut |_, _| ())?;
    if found != *expected {
        let found = format!("{}: its files are others than those that the first process has", folder.display());
        return Err(RecoverError::Asked(found));
    }
    Ok(checkpoint)
}

impl Helper {
    fn at_work(&mut self) -> Result<(&mut Shared, &mut Student)> {
        match (&mut self.shared, &mut self.models) {
            (Some(shared), Some((student, _))) => Ok((shared, student)),
            _ => Err(too_early()),
        }
    }

    /// Tells the root how something went.
    fn tell(&self, outcome: Result<()>) {
        // What went wrong is the root's to say.
        let _ = all_told(&*self.link, outcome);
    }

    /// What the first process computes with.
    fn backend(&self, models: &Models) -> Result<AutogradBackend> {
        let by = |device: Option<String>| device.unwrap_or_else(|| "the CPU".into());
        if self.multiplier.device() != models.device {
            let (own, first) = (by(self.multiplier.device()), by(models.device.clone()));
            return Err(RecoverError::Asked(format!("multiplies by {own}, and the first process by {first}")));
        }
        let precision = if models.f32 { Precision::F32 } else { Precision::Bf16 };
        Ok(AutogradBackend::multiplied_by(self.multiplier.clone(), precision))
    }

    fn load(&mut self, models: &Models) -> Result<()> {
        let backend = self.backend(models)?;
        let teacher = open(&models.teacher, &models.teacher_identity)?;
        let student = open(&models.student, &models.student_identity)?;
        let student = Student::load(&student, None, backend.clone())?;
        self.models = Some((student, Decoder::load(backend, &teacher)?));
        Ok(())
    }

    fn begin(&mut self, beginning: Beginning) -> Result<()> {
        let (student, _) = self.models.as_mut().ok_or_else(too_early)?;
        let Beginning { options, scales, state } = beginning;
        self.options = options;
        let all = student.everything;
        if let (Some(dual), None) = (scales, self.scales) {
            student.allow_scales(dual);
            self.scales = scales;
        }
        student.train(|p| learned(p, &options, all));
        self.take(scales, state)
    }

    /// Takes the student over as the root has it.
    fn take(&mut self, scales: Option<bool>, state: Vec<(usize, String)>) -> Result<()> {
        let (student, _) = self.models.as_mut().ok_or_else(too_early)?;
        if let (Some(dual), None) = (scales, self.scales) {
            student.allow_scales(dual);
            self.scales = scales;
        }
        for (parameter, kind) in state {
            let p = &mut student.parameters[parameter];
            let mut values = vec![0.0; p.length(&kind)];
            self.link.broadcast_values(&mut values);
            if !p.set_state(&kind, values) {
                return Err(RecoverError::Asked(format!("{}: has no {kind} here", p.name)));
            }
        }
        student.refresh();
        Ok(())
    }

    /// Trains blocks as the root does, and with it.
    fn blocks(
        &mut self,
        options: &block::Options,
        rows: Vec<Row>,
        (from, steps): (usize, usize),
        others: &Others,
    ) -> Result<()> {
        let (student, teacher) = self.models.as_mut().ok_or_else(too_early)?;
        let scratch = scratch()?;
        let data = Data { rows, description: String::new() };
        let schedule = &mut Schedule::new(steps, Vec::new());
        let each = &mut |_: &BlockReport, _: &Student, schedule: &mut Schedule| {
            *schedule = Schedule::new(others.tell(None)?, Vec::new());
            Ok(())
        };
        let part = block::Part { options: *options, from, others: Some(others.clone()) };
        block::train_part(student, teacher, &data, part, scratch.path(), schedule, each)
    }

    /// The same of a model of which a block at a time is in memory.
    fn streamed(
        &self,
        models: &Models,
        options: &block::Options,
        rows: Vec<Row>,
        (from, steps): (usize, usize),
        others: &Others,
        scratch: &Path,
    ) -> Result<()> {
        let folder = RunFolder::create(&scratch.join("blocks"), &Value::Null)?;
        for block in 0..from {
            let mut bytes = others.agree(Ok(Vec::new()))?;
            self.link.broadcast(&mut bytes);
            let path = folder.trained_path(block);
            std::fs::write(&path, bytes).map_err(|e| CheckpointError::io(&path, "write", e))?;
        }
        let opened = || -> Result<_> {
            let masters = models.masters.as_ref().map(|(folder, identity)| open(folder, identity)).transpose()?;
            Ok((
                open(&models.student, &models.student_identity)?,
                open(&models.teacher, &models.teacher_identity)?,
                masters,
                self.backend(models)?,
            ))
        };
        let opened = opened();
        let made = opened.as_ref().map_err(ToString::to_string).map_err(RecoverError::Asked).and_then(
            |(student, teacher, masters, backend)| {
                let sizes = streamed::sizes(student)?;
                let mut model = Streamed::new(student, teacher, masters.as_ref(), backend.clone(), sizes)?;
                model.resume(&folder)?;
                Ok(model)
            },
        );
        let mut model = others.agree(made)?;
        let learned = |p: &Parameter| p.is_quantized() || (options.norms && p.is_norm());
        let each = &mut |report: &BlockReport, student: &BlockStudent| {
            let kept = folder.save_trained(student, learned, report.block)?;
            Ok((others.tell(None)?, kept))
        };
        let data = Data { rows, description: String::new() };
        model.train_part(&data, options, scratch, steps, Some(others), each)
    }

    /// What this process's rows of a watched text add to the loss.
    fn look(&mut self, name: String, rows: Vec<Row>, with_teacher: bool) -> Result<Vec<LossPart>> {
        let Some((student, teacher)) = &self.models else { return Err(too_early()) };
        let teacher = Some(teacher).filter(|_| with_teacher);
        let own: Vec<Row> = rows.into_iter().skip(self.link.rank()).step_by(self.link.size()).collect();
        let known = self.watched.iter().position(|(t, w)| *t == with_teacher && w.name == name && w.rows() == own);
        let at = match known {
            Some(at) => at,
            None => {
                self.watched.push((with_teacher, Watched::new(name, own, teacher)?));
                self.watched.len() - 1
            }
        };
        let text = &self.watched[at].1;
        student.averaged(|| text.parts((0, 1), &student.decoder, teacher))
    }

    fn round(&mut self, batches: &[Vec<Row>], total: f64, first: bool, last: bool) -> Result<()> {
        let Some((student, teacher)) = &self.models else { return Err(too_early()) };
        let own = match batches.get(self.link.rank()) {
            None => Ok(None),
            Some(rows) => {
                let rows: Vec<&Row> = rows.iter().collect();
                distill::gradients(&student.decoder, Some(teacher), &rows, total, &self.options)
                    .map(|p| Some(Part::of(p)))
            }
        };
        let _ = all_told(&*self.link, own);
        let mut go_on = Vec::new();
        self.link.broadcast(&mut go_on);
        if read(&go_on)? {
            let shared = self.shared.as_mut().ok_or_else(too_early)?;
            shared.sum(student, batches.len(), first, last);
            if last {
                shared.squares(student);
            }
        }
        Ok(())
    }
}
