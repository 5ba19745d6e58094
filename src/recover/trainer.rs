//! Stages one after the other: watched, kept, resumed, and undone where they did harm.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::data::Data;
use super::distill::{self, Point, Watched};
use super::pace::Pace;
use super::parameter::{Learned, Parameter};
use super::run_folder::RunFolder;
use super::schedule::Schedule;
use super::stage::{Method, Stage};
use super::student::Student;
use super::{RecoverError, Result, block};
use crate::backend::BackendError;
use crate::backend::autograd::AutogradBackend;
use crate::model::Decoder;

/// What is done when.
#[derive(Clone, Debug)]
pub struct Plan {
    pub stages: Vec<Stage>,
    /// Steps between looks at the watched texts, in stages of steps.
    pub evaluate_every: usize,
    /// Ends a stage after so many looks without a new best.
    pub patience: Option<usize>,
    /// How often the state is kept on disk; it has no part in the result.
    pub save_every: Duration,
}

/// A line of the curve.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A block was trained: relative error of its output.
    Block { stage: usize, block: usize, before: f64, after: f64 },
    /// A step was made.
    Step {
        stage: usize,
        #[serde(flatten)]
        point: Point,
    },
    /// The loss on the watched texts after so many steps of a stage (0: before it), and their mean relative to the first
    /// time that the same was measured.
    Watched { stage: usize, step: usize, measure: Measure, loss: Map<String, Value>, score: f64 },
    /// The stage ended with the weights that it had after `step`, the best by the watched texts.
    Kept { stage: usize, step: usize },
}

/// Whether an event has just come about, or long ago, in the run that is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Now,
    Again,
}

/// What is measured on texts that are not trained on, nats per token: what the stage trains for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// To the teacher.
    Kl,
    /// With the text: of a stage that has no teacher in its loss.
    CrossEntropy,
}

impl std::fmt::Display for Measure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kl => "KL",
            Self::CrossEntropy => "cross-entropy",
        })
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Every event, from the first on, whether or not the run was resumed.
    pub events: Vec<Event>,
    /// Why it ended early; the student then is the best until then.
    pub stopped: Option<RecoverError>,
}

/// What is trained towards what.
pub struct Run<'a, 'p> {
    /// `None`: only the text is learned from.
    pub teacher: Option<&'a Decoder<AutogradBackend>>,
    pub data: &'a Data,
    pub watched: &'a [Watched],
    pub plan: &'a Plan,
    pub folder: &'a mut RunFolder,
    /// Where the stages end.
    pub pace: &'a mut Pace<'p>,
    /// Called with every event as it happens.
    pub show: &'a mut dyn FnMut(&Event, Told),
    /// Called after each stage but the last with its number and the student, which then has the stage's best weights.
    pub after: &'a mut dyn FnMut(usize, &Student) -> Result<()>,
}

/// Best score so far, and looks since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Best {
    score: f64,
    pub step: usize,
    since: usize,
}

impl Run<'_, '_> {
    /// Trains the student stage by stage; after each it has the weights that were best on the watched texts (the last
    /// ones, where nothing is watched). Goes on where the folder says that the run stood.
    ///
    /// # Errors
    /// Anything but numbers that leave their range: those end the run early with the best weights until then.
    pub fn train(&mut self, student: &mut Student) -> Result<Outcome> {
        if self.plan.stages.iter().any(Stage::learns_scales) {
            student.allow_scales(self.plan.stages.iter().any(Stage::has_dual_scales));
        }
        let at = self.folder.load_state(student)?;
        let mut events = replayed(self.folder, at.lines, self.show)?;
        for stage in at.stage..self.plan.stages.len() {
            let from = if stage == at.stage { at.done } else { 0 };
            match self.stage(student, stage, from, &mut events) {
                Ok(()) if stage + 1 < self.plan.stages.len() => (self.after)(stage, student)?,
                Ok(()) => {}
                Err(stopped @ RecoverError::NotFinite { .. }) => {
                    self.keep_best(student, stage, &mut events)?;
                    return Ok(Outcome { events, stopped: Some(stopped) });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Outcome { events, stopped: None })
    }

    fn record(&mut self, events: &mut Vec<Event>, event: Event) -> Result<()> {
        recorded(self.folder, self.show, events, event)
    }

    fn stage(&mut self, student: &mut Student, stage: usize, from: usize, events: &mut Vec<Event>) -> Result<()> {
        let Stage { method, .. } = self.plan.stages[stage].clone();
        if !events.iter().any(|e| matches!(e, Event::Watched { stage: s, .. } if *s == stage)) {
            self.look(student, stage, 0, events)?;
            self.folder.save_best(student, stage, 0)?;
            self.folder.save_state(student, stage, 0)?;
        }
        let (teacher, data, plan) = (self.teacher, self.data, self.plan);
        match method {
            Method::Block(options) => {
                let Some(teacher) = teacher else {
                    return Err(RecoverError::Data("the method block needs a teacher".into()));
                };
                let scratch = self.folder.folder().to_owned();
                let layers = student.decoder.config.layers.len();
                self.pace.begin_blocks(stage, from, layers)?;
                let schedule = &mut self.pace.schedule(stage);
                let each = &mut |report: &block::BlockReport, student: &Student, schedule: &mut Schedule| {
                    let (block, before, after) = (report.block, report.before, report.after);
                    self.record(events, Event::Block { stage, block, before, after })?;
                    self.folder.save_block(student, stage, block)?;
                    self.pace.block_done(stage, block + 1, layers)?;
                    *schedule = self.pace.schedule(stage);
                    Ok(())
                };
                block::train_as(student, teacher, data, &options, from, &scratch, schedule, each)?;
                if self.look(student, stage, layers, events)? {
                    self.folder.save_best(student, stage, layers)?;
                }
            }
            Method::Distill(options) => {
                let all = student.everything;
                let trained = |p: &Parameter| learned(p, &options, all);
                if from > 0 {
                    student.go_on(trained)
                } else {
                    student.train(trained)
                }
                let mut saved = Instant::now();
                self.pace.begin(stage, from)?;
                let schedule = &mut self.pace.schedule(stage);
                let each = &mut |point: &Point, student: &Student, schedule: &mut Schedule| {
                    self.record(events, Event::Step { stage, point: *point })?;
                    let mut flow = ControlFlow::Continue(());
                    let end = self.pace.stepped(stage, point.step)?;
                    *schedule = self.pace.schedule(stage);
                    if point.step.is_multiple_of(plan.evaluate_every.max(1)) || point.step == end {
                        if self.look(student, stage, point.step, events)? {
                            self.folder.save_best(student, stage, point.step)?;
                        }
                        self.pace.looked()?;
                        let since = best_of(events, stage).map_or(0, |b| b.since);
                        if plan.patience.is_some_and(|p| since >= p) {
                            flow = ControlFlow::Break(());
                        }
                    }
                    if saved.elapsed() >= plan.save_every && flow.is_continue() {
                        self.folder.save_state(student, stage, point.step)?;
                        saved = Instant::now();
                        self.pace.rested();
                    }
                    Ok(flow)
                };
                distill::train_as(student, teacher, data, &options, from, schedule, each)?;
            }
        }
        self.keep_best(student, stage, events)?;
        if stage + 1 == self.plan.stages.len() {
            self.folder.save_state(student, stage + 1, 0)?;
        }
        Ok(())
    }

    /// Measures the watched texts; whether they have never been better in this stage.
    fn look(&mut self, student: &Student, stage: usize, step: usize, events: &mut Vec<Event>) -> Result<bool> {
        let teacher = self.teacher.filter(|_| self.plan.stages[stage].has_teacher());
        let measure = if teacher.is_some() { Measure::Kl } else { Measure::CrossEntropy };
        let mut loss = Map::new();
        for w in self.watched {
            let alone = || student.averaged(|| w.loss(&student.decoder, teacher));
            let shared = student.team.as_deref().and_then(|team| team.loss(student, w, teacher));
            let value = match shared {
                None => alone(),
                // What is wrong with the student is said as one process says it.
                Some(Err(other)) => alone().and(Err(other)),
                Some(loss) => loss,
            };
            let value = match value {
                // A student that training broke; one that was broken from the start is an error of its own.
                Err(RecoverError::Backend(BackendError::NotFinite { place, value, .. })) if step > 0 || stage > 0 => {
                    let what = format!("loss on {} ({place})", w.name);
                    return Err(RecoverError::NotFinite { what, step, value: value.into() });
                }
                value => value?,
            };
            if !value.is_finite() {
                return Err(RecoverError::NotFinite { what: format!("loss on {}", w.name), step, value });
            }
            loss.insert(w.name.clone(), Value::from(value));
        }
        self.record(events, watched(events, stage, step, measure, loss))?;
        // Where nothing is watched, the last is the best.
        Ok(self.watched.is_empty() || best_of(events, stage).is_some_and(|b| b.step == step))
    }

    /// Gives the student the best weights of a stage, where they are not those that it has.
    fn keep_best(&mut self, student: &mut Student, stage: usize, events: &mut Vec<Event>) -> Result<()> {
        student.train(|_| Learned::default());
        if let Some(best) = self.folder.load_best(student)? {
            student.settle();
            self.record(events, Event::Kept { stage, step: best.done })?;
        }
        Ok(())
    }
}

/// What of a parameter the whole model's training moves; `all` of a model of floats.
pub(super) fn learned(p: &Parameter, options: &distill::Options, all: bool) -> Learned {
    Learned {
        weight: all || (options.weights && p.is_quantized()) || (options.norms && p.is_norm()),
        scales: options.scales && p.is_quantized(),
        rounding: false,
    }
}

/// The first `lines` events of a run that goes on; `show` sees them again.
pub(super) fn replayed(folder: &mut RunFolder, lines: usize, show: &mut dyn FnMut(&Event, Told)) -> Result<Vec<Event>> {
    let path = folder.path("curve.jsonl");
    let read = |line: &String| {
        let detail = |e| format!("is damaged ({e})");
        serde_json::from_str(line).map_err(|e| RecoverError::Run { path: path.clone(), detail: detail(e) })
    };
    let events = folder.rewind(lines)?.iter().map(read).collect::<Result<Vec<Event>>>()?;
    events.iter().for_each(|event| show(event, Told::Again));
    Ok(events)
}

/// Writes an event down, and shows it.
pub(super) fn recorded(
    folder: &mut RunFolder,
    show: &mut dyn FnMut(&Event, Told),
    events: &mut Vec<Event>,
    event: Event,
) -> Result<()> {
    folder.line(&serde_json::to_string(&event).unwrap_or_default())?;
    show(&event, Told::Now);
    events.push(event);
    Ok(())
}

/// A look at the watched texts, judged by the first of its kind among `events`.
pub(super) fn watched(
    events: &[Event],
    stage: usize,
    step: usize,
    measure: Measure,
    loss: Map<String, Value>,
) -> Event {
    let first = events.iter().find_map(|e| match e {
        Event::Watched { loss, measure: m, .. } if *m == measure => Some(loss),
        _ => None,
    });
    let first = first.unwrap_or(&loss);
    let of = |map: &Map<String, Value>, name: &str| map.get(name).and_then(Value::as_f64).unwrap_or(0.0);
    let ratio = |name: &String| {
        let start = of(first, name);
        if start > 0.0 { of(&loss, name) / start } else { 1.0 + of(&loss, name) }
    };
    let score = loss.keys().map(ratio).sum::<f64>() / loss.len().max(1) as f64;
    Event::Watched { stage, step, measure, loss, score }
}

/// The best look of a stage so far.
pub(super) fn best_of(events: &[Event], stage: usize) -> Option<Best> {
    let mut best: Option<Best> = None;
    for event in events {
        let Event::Watched { stage: s, step, score, .. } = event else { continue };
        if *s != stage {
            continue;
        }
        match &mut best {
            Some(b) if *score >= b.score => b.since += 1,
            _ => best = Some(Best { score: *score, step: *step, since: 0 }),
        }
    }
    best
}
