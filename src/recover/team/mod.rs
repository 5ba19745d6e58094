//! Several processes that train one model: each computes the gradients of some of a step's batches, has the optimizer's state of
//! some of the weights, and moves those.
//!
//! One of them, the root, runs the training as it runs alone: it reads and writes and keeps time. The others
//! ([`helper`]) have the student and the teacher and do what it says. A gradient is the sum of those of its batches, in the order of
//! batches, whoever computed them; so any number of processes gives the same bytes, one too.

pub mod alike;
pub mod helper;
pub(super) mod shared;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::alike::Others;
use self::shared::Shared;
use super::block;
use super::data::Data;
use super::distill::{self, LossPart, Options, Watched};
use super::parameter::Rates;
use super::student::Student;
use super::{RecoverError, Result};
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::loss::LossSums;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::corpus::Row;
use crate::model::Decoder;
use crate::ranks::{Link, ROOT};

/// The root's side of it.
pub struct Team {
    link: Arc<dyn Link>,
    here: usize,
    shared: Mutex<Option<Shared>>,
}

/// What the root asks of the others.
#[derive(Debug, Serialize, Deserialize)]
enum Task {
    Load(Box<Models>),
    Begin(Box<Beginning>),
    /// Gradients of a batch for each of the first ranks, of sums divided by `total`; they are added up, and with the `last` of a
    /// step's rounds are complete.
    Round {
        batches: Vec<Vec<Row>>,
        total: u64,
        first: bool,
        last: bool,
    },
    Move {
        step: usize,
        steps: usize,
        rates: [u32; 3],
        factor: u32,
    },
    /// The loss on a watched text, each process of some of its rows; with the teacher the divergence from it.
    Look {
        name: String,
        rows: Vec<Row>,
        teacher: bool,
    },
    /// Blocks of the student are trained by all alike, from block `from` on, that one for `steps`; what it is comes first.
    Blocks {
        options: Box<block::Options>,
        scales: Option<bool>,
        state: Vec<(usize, String)>,
        rows: Vec<Row>,
        from: usize,
        steps: usize,
    },
    /// The same of a model of which a block at a time is in memory; what training made of those before `from` comes first.
    Stream {
        models: Box<Models>,
        options: Box<block::Options>,
        rows: Vec<Row>,
        from: usize,
        steps: usize,
    },
    /// A part of the state of a parameter from who has it.
    Fetch {
        parameter: usize,
        kind: String,
    },
    Done,
}

/// What every process loads: folders that all see, and what tells their files from others. Masters come from the root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Models {
    pub student: PathBuf,
    pub student_identity: Value,
    pub teacher: PathBuf,
    pub teacher_identity: Value,
    /// Of a student that is not loaded whole: the model whose weights masters begin at, if another than it.
    pub masters: Option<(PathBuf, Value)>,
    /// Products in f32.
    pub f32: bool,
    /// What multiplies, if not the CPU.
    pub device: Option<String>,
}

/// Where a stage of steps stands when it begins.
#[derive(Debug, Serialize, Deserialize)]
struct Beginning {
    options: Options,
    /// Whether block scales are learned by some stage, and whether weights are divided by those of the beginning.
    scales: Option<bool>,
    /// What follows of each parameter.
    state: Vec<(usize, String)>,
}

/// What one process has of a batch: its sums, and the error of what leaves its blocks.
#[derive(Debug, Serialize, Deserialize)]
struct Part {
    weight: u64,
    kl: u64,
    cross_entropy: u64,
    hidden: u64,
}

impl Part {
    fn of((sums, hidden): (LossSums, f64)) -> Self {
        let LossSums { weight, kl, cross_entropy } = sums;
        let [weight, kl, cross_entropy, hidden] = [weight, kl, cross_entropy, hidden].map(f64::to_bits);
        Self { weight, kl, cross_entropy, hidden }
    }

    fn values(&self) -> (LossSums, f64) {
        let [weight, kl, cross_entropy, hidden] =
            [self.weight, self.kl, self.cross_entropy, self.hidden].map(f64::from_bits);
        (LossSums { weight, kl, cross_entropy }, hidden)
    }
}

/// Losses of rows, to be told.
fn bits(parts: Vec<LossPart>) -> Vec<(u64, u64)> {
    parts.into_iter().map(|(weight, loss)| (weight.to_bits(), loss.to_bits())).collect()
}

/// How something went in one process: what it gave, or what went wrong.
type Told<T> = std::result::Result<T, String>;

fn written<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| {
        RecoverError::Asked(format!("a process of another version of recoup takes part, or was cut off ({e})"))
    })
}

/// Gives the root what all say of how something went; an error of the first that failed.
fn all_told<T: Serialize + for<'a> Deserialize<'a>>(link: &dyn Link, own: Result<T>) -> Result<Vec<T>> {
    // The root's own error is told as it is.
    let (own, failed) = match own {
        Ok(value) => (Ok(value), None),
        Err(e) => (Err(format!("{e:#}")), Some(e)),
    };
    let host = link.host();
    let told: Vec<Vec<u8>> = link.gather(&written(&(own, host)));
    if let Some(error) = failed {
        return Err(error);
    }
    let one = |(rank, bytes): (usize, &Vec<u8>)| {
        let (told, host): (Told<T>, String) = read(bytes)?;
        told.map_err(|message| RecoverError::Rank { rank, host, message })
    };
    told.iter().enumerate().map(one).collect()
}

impl Team {
    /// The root of those behind `link`, of which so many run `here`, on its machine.
    #[must_use]
    pub fn new(link: Arc<dyn Link>, here: usize) -> Self {
        Self { link, here, shared: Mutex::default() }
    }

    /// How many processes are on this machine.
    #[must_use]
    pub fn here(&self) -> usize {
        self.here
    }

    /// How many processes there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.link.size()
    }

    fn ask(&self, task: &Task) {
        self.link.broadcast(&mut written(task));
    }

    fn shared(&self) -> MutexGuard<'_, Option<Shared>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the others load the models while this process does it by `own`.
    ///
    /// # Errors
    /// That of `own`; when another process cannot, or finds other files.
    pub fn load<T>(&self, models: Models, own: impl FnOnce() -> Result<T>) -> Result<T> {
        self.ask(&Task::Load(Box::new(models)));
        let (own, loaded) = match own() {
            Ok(own) => (Some(own), Ok(())),
            Err(e) => (None, Err(e)),
        };
        all_told(&*self.link, loaded)?;
        own.ok_or_else(|| RecoverError::Asked("nothing was loaded".into()))
    }

    /// The others are not needed any more.
    pub fn dismiss(&self) {
        self.ask(&Task::Done);
    }

    /// Gives the others the student as it is, with what its optimizer has where it goes on after step `from`, and shares out who
    /// moves what.
    pub(super) fn begin(&self, student: &mut Student, options: &Options, from: usize) -> Result<()> {
        let (state, scales) = (state_of(student, from > 0), student.scales());
        self.ask(&Task::Begin(Box::new(Beginning { options: *options, scales, state: state.clone() })));
        self.send(student, state);
        all_told(&*self.link, Ok(()))?;
        *self.shared() = Some(Shared::new(self.link.clone(), student));
        Ok(())
    }

    /// Gives the others parts of the student's state.
    fn send(&self, student: &Student, state: Vec<(usize, String)>) {
        for (parameter, kind) in state {
            let mut values = student.parameters[parameter].state_values(&kind).cloned().unwrap_or_default();
            self.link.broadcast_values(&mut values);
        }
    }

    /// Gives the others the student as it is, to train its blocks from `from` on alike.
    pub(super) fn blocks(
        &self,
        student: &Student,
        options: &block::Options,
        data: &Data,
        (from, steps): (usize, usize),
    ) -> Result<Others> {
        let (state, scales, rows) = (state_of(student, false), student.scales(), data.rows.clone());
        let options = Box::new(*options);
        self.ask(&Task::Blocks { options, scales, state: state.clone(), rows, from, steps });
        self.send(student, state);
        let others = Others::new(self.link.clone());
        others.agree(Ok(()))?;
        Ok(others)
    }

    /// Has the others open a model that is trained a block at a time, from the block after `trained` on, which are files.
    pub(super) fn stream(
        &self,
        models: &Models,
        options: &block::Options,
        data: &Data,
        (trained, steps): (&[PathBuf], usize),
    ) -> Result<Others> {
        let (models, options, rows) = (Box::new(models.clone()), Box::new(*options), data.rows.clone());
        self.ask(&Task::Stream { models, options, rows, from: trained.len(), steps });
        let others = Others::new(self.link.clone());
        for path in trained {
            let read = std::fs::read(path).map_err(|e| CheckpointError::io(path, "read", e).into());
            self.link.broadcast(&mut others.agree(read)?);
        }
        others.agree(Ok(()))?;
        Ok(others)
    }

    /// [`distill::gradients`] of each batch, computed by all; their sum is then the gradient, of each weight where it is moved.
    pub(super) fn gradients(
        &self,
        student: &Student,
        teacher: Option<&Decoder<AutogradBackend>>,
        batches: &[Vec<&Row>],
        total: f64,
        options: &Options,
    ) -> Result<Vec<(LossSums, f64)>> {
        let mut parts = Vec::new();
        let rounds = batches.chunks(self.size());
        let count = rounds.len();
        for (i, round) in rounds.enumerate() {
            let batches = round.iter().map(|rows| rows.iter().map(|r| (*r).clone()).collect()).collect();
            let (first, last) = (i == 0, i + 1 == count);
            self.ask(&Task::Round { batches, total: total.to_bits(), first, last });
            let own = distill::gradients(&student.decoder, teacher, &round[ROOT], total, options);
            let told = all_told(&*self.link, own.map(|own| Some(Part::of(own))));
            self.link.broadcast(&mut written(&told.is_ok()));
            parts.extend(told?.iter().flatten().map(Part::values));
            if let Some(shared) = self.shared().as_mut() {
                shared.sum(student, round.len(), first, last);
            }
        }
        Ok(parts)
    }

    /// [`Student::gradient_norm`] of what all have.
    pub(super) fn gradient_norm(&self, student: &Student) -> f64 {
        self.shared().as_ref().map_or(0.0, |shared| shared.squares(student).iter().sum::<f64>().sqrt())
    }

    /// [`Student::step`], each process its own weights; all have all of them afterwards.
    pub(super) fn step(&self, student: &mut Student, options: &Options, step: usize, (rates, factor): (Rates, f32)) {
        let bits = [rates.weights, rates.scales, rates.norms].map(f32::to_bits);
        let steps = options.steps;
        self.ask(&Task::Move { step, steps, rates: bits, factor: factor.to_bits() });
        if let Some(shared) = self.shared().as_ref() {
            shared.step(student, &options.adam, (step, steps), rates, factor);
        }
    }

    /// The loss of the student with its running means on a watched text, computed by all; `None` where the others do not have the
    /// student as it is.
    pub(super) fn loss(
        &self,
        student: &Student,
        text: &Watched,
        teacher: Option<&Decoder<AutogradBackend>>,
    ) -> Option<Result<f64>> {
        self.shared().as_ref()?;
        let (size, rows) = (self.size(), text.rows().to_vec());
        let count = rows.len();
        self.ask(&Task::Look { name: text.name.clone(), rows, teacher: teacher.is_some() });
        let own = student.averaged(|| text.parts((ROOT, size), &student.decoder, teacher));
        let told = all_told(&*self.link, own.map(bits));
        Some(told.map(|told| {
            let part = |(weight, loss): (u64, u64)| (f64::from_bits(weight), f64::from_bits(loss));
            let parts: Vec<LossPart> = (0..count).map(|i| part(told[i % size][i / size])).collect();
            distill::mean(&parts)
        }))
    }

    /// A stage is over: what the others have of the student is not looked after any more.
    pub(super) fn rest(&self) {
        *self.shared() = None;
    }

    /// A part of a parameter's state that another process has.
    pub(super) fn fetch(&self, parameter: usize, kind: &str, length: usize) -> Vec<f32> {
        let owner = self.shared().as_ref().and_then(|s| s.owner(parameter));
        let Some(owner) = owner.filter(|o| *o != ROOT) else { return Vec::new() };
        self.ask(&Task::Fetch { parameter, kind: kind.into() });
        let mut values = vec![0.0; length];
        self.link.receive(owner, &mut values);
        values
    }
}

/// Parts of the student's state that others have to be given, by parameter; `moments` as well, where it has them.
fn state_of(student: &Student, moments: bool) -> Vec<(usize, String)> {
    let names = |(i, p): (usize, &super::parameter::Parameter)| -> Vec<(usize, String)> {
        let kind = |(name, _): (String, usize)| (i, name.rsplit_once('.').map_or_else(String::new, |(_, k)| k.into()));
        p.sent(moments).into_iter().map(kind).collect()
    };
    student.parameters.iter().enumerate().flat_map(names).collect()
}

/// What is loaded of a checkpoint by whoever takes part.
impl Models {
    /// Those of `student` and `teacher`, whose identities are known.
    #[must_use]
    pub fn of(
        (student, student_identity): (&Checkpoint, Value),
        (teacher, teacher_identity): (&Checkpoint, Value),
        (f32, device): (bool, Option<String>),
    ) -> Self {
        // Wherever a process was begun.
        let folder = |c: &Checkpoint| {
            let folder = c.tensors.folder();
            std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned())
        };
        let (student, teacher) = (folder(student), folder(teacher));
        Self { student, student_identity, teacher, teacher_identity, masters: None, f32, device }
    }

    /// The same with masters that begin at another model's weights.
    #[must_use]
    pub fn with_masters(self, masters: Option<(&Checkpoint, Value)>) -> Self {
        let folder = |c: &Checkpoint| std::fs::canonicalize(c.tensors.folder()).unwrap_or_default();
        Self { masters: masters.map(|(c, identity)| (folder(c), identity)), ..self }
    }
}
