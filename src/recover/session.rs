//! A training from its state on disk to the finished model: begun or gone on with, each stage kept where that is wanted, the
//! result written with the record of how it came to be.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::block_run::BlockRun;
use super::data::Data;
use super::distill::Watched;
use super::pace::Pace;
use super::run_folder::RunFolder;
use super::stored_plan::{PLAN_FILE, StoredPlan};
use super::student::{CURVE_FILE, RECORD_FILE, Student};
use super::trainee::Trainee;
use super::trainer::{Event, Outcome, Plan, Run, Told};
use super::written::{self, Trained};
use super::{RecoverError, Result};
use crate::checkpoint::Checkpoint;

/// A training that is under way.
pub struct Session {
    folder: RunFolder,
    about: Value,
}

/// What is trained on, towards what.
pub struct Lesson<'a> {
    pub plan: &'a Plan,
    pub data: &'a Data,
    /// Texts that are looked at while training, by name.
    pub watched: Vec<(String, Data)>,
    /// Where the stages end.
    pub pace: Pace<'a>,
    /// Where what each stage but the last gives is written, beside this output; nothing: it is not.
    pub stages_beside: Option<&'a Path>,
}

impl Session {
    /// The training whose state lies in `training`: as it was left, where it is to be resumed and there is one, else new.
    /// `about` says all that its result depends on.
    ///
    /// # Errors
    /// When the state is of another training, or damaged.
    pub fn open(training: &Path, resume: bool, about: Value) -> Result<Self> {
        let resumed = if resume { RunFolder::resume(training, &about)? } else { None };
        let folder = match resumed {
            Some(folder) => folder,
            None => RunFolder::create(training, &about)?,
        };
        Ok(Self { folder, about })
    }

    /// What the result depends on.
    #[must_use]
    pub fn about(&self) -> &Value {
        &self.about
    }

    /// Trains the student, which was made of the checkpoint `of`, to the end. `show` gets every event, `rest` is called
    /// after each stage.
    ///
    /// # Errors
    /// As [`Run::train`] and [`BlockRun::train`]; when what a stage gave cannot be written.
    pub fn train(
        &mut self,
        trainee: &mut Trainee<'_>,
        of: &Checkpoint,
        lesson: Lesson<'_>,
        show: &mut dyn FnMut(&Event, Told),
        rest: fn(),
    ) -> Result<Outcome> {
        let Lesson { plan, data, watched, mut pace, stages_beside } = lesson;
        let (student, teacher) = match (trainee, plan.stages.as_slice()) {
            (Trainee::Whole { student, teacher }, _) => (student, teacher.as_deref()),
            (Trainee::Streamed(model), [stage]) => {
                let (folder, pace) = (&mut self.folder, &mut pace);
                return BlockRun { data, texts: watched, stage, folder, pace, show }.train(model);
            }
            (Trainee::Streamed(_), stages) => {
                let detail = format!("{} methods, of which one alone is trained a block at a time", stages.len());
                return Err(RecoverError::Asked(detail));
            }
        };
        let watched = watched
            .into_iter()
            .map(|(name, data)| Watched::new(name, data.rows, teacher))
            .collect::<Result<Vec<_>>>()?;
        let about = &self.about;
        let mut after = |stage: usize, student: &Student| {
            rest();
            let Some(output) = stages_beside else { return Ok(()) };
            let out = stage_folder(output, stage, &plan.stages[stage].name);
            let mut record = about.clone();
            if let Some(methods) = record["methods"].as_array_mut() {
                methods.truncate(stage + 1);
            }
            let record = pretty(&record);
            // There already, if the run was killed after this stage.
            if std::fs::read(out.join(RECORD_FILE)).is_ok_and(|found| found == record) {
                return Ok(());
            }
            student.write(of, &[(RECORD_FILE, record)], &out)
        };
        let folder = &mut self.folder;
        let pace = &mut pace;
        Run { teacher, data, watched: &watched, plan, folder, pace, show, after: &mut after }.train(student)
    }

    /// Writes what was `trained` with the `record` of how it came to be, the curve of the training, and where there is one its
    /// plan.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn write(
        &self,
        trained: &dyn Trained,
        of: &Checkpoint,
        record: &Value,
        planned: Option<&StoredPlan>,
        out: &Path,
    ) -> Result<()> {
        let mut files = vec![(RECORD_FILE, pretty(record)), (CURVE_FILE, self.folder.curve()?)];
        files.extend(planned.map(|p| (PLAN_FILE, p.text().into_bytes())));
        written::write(of, trained, &files, out)
    }

    /// The training is over: its state goes.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn close(self) -> Result<(), RecoverError> {
        self.folder.remove()
    }
}

fn pretty(record: &Value) -> Vec<u8> {
    format!("{record:#}\n").into_bytes()
}

/// Where the student goes after a stage that is not the last.
#[must_use]
pub fn stage_folder(output: &Path, stage: usize, method: &str) -> PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(format!("-{}-{method}", stage + 1));
    output.with_file_name(name)
}

impl Outcome {
    /// Where the last stage's best weights stood: its number, and steps or blocks done (0: it was worse from then on).
    fn last_kept(&self) -> Option<(usize, usize)> {
        self.events
            .iter()
            .rev()
            .find_map(|e| if let Event::Kept { stage, step } = e { Some((*stage, *step)) } else { None })
    }

    /// Steps, or blocks, of the training that the student has: 0, where it is what it was before the only stage.
    #[must_use]
    pub fn kept(&self) -> Option<usize> {
        self.last_kept().map(|(stage, step)| if stage == 0 { step } else { step.max(1) })
    }

    /// The loss on the watched texts of what was kept at the end, and the first that was measured of the same kind.
    #[must_use]
    pub fn watched_loss(&self) -> Value {
        let looks = || {
            self.events.iter().filter_map(|e| match e {
                Event::Watched { stage, step, measure, loss, .. } => Some((*stage, *step, *measure, loss)),
                _ => None,
            })
        };
        let Some(after) = looks().find(|l| Some((l.0, l.1)) == self.last_kept()) else { return Value::Null };
        let before = looks().find(|l| l.2 == after.2).map(|l| l.3);
        json!({"measure": after.2, "before": before, "after": after.3})
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::super::trainer::Measure;
    use super::*;

    #[test]
    fn the_record_has_the_first_look_and_that_of_what_was_kept() {
        let look = |stage, step, measure, loss: f64| Event::Watched {
            stage,
            step,
            measure,
            loss: Map::from_iter([("a".to_owned(), json!(loss))]),
            score: 1.0,
        };
        let events = vec![
            look(0, 0, Measure::CrossEntropy, 3.0),
            Event::Kept { stage: 0, step: 0 },
            look(1, 0, Measure::Kl, 0.5),
            look(1, 25, Measure::Kl, 0.25),
            look(1, 50, Measure::Kl, 0.75),
            Event::Kept { stage: 1, step: 25 },
        ];
        let outcome = Outcome { events, stopped: None };
        let expected = json!({"measure": "kl", "before": {"a": 0.5}, "after": {"a": 0.25}});
        assert_eq!(outcome.watched_loss(), expected);
        assert_eq!(Outcome { events: Vec::new(), stopped: None }.watched_loss(), Value::Null);
    }

    #[test]
    fn stages_lie_beside_the_output_by_their_number_and_method() {
        assert_eq!(stage_folder(Path::new("a/out"), 0, "block"), Path::new("a/out-1-block"));
    }
}
