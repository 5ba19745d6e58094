//! One model on tasks: what its folder has of the answers is taken, the rest is asked, and all become results.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use recoup_eval::LanguageModel;
use recoup_eval::journal::{self, Journal, JournalError};
use recoup_eval::report::evaluation_markdown;
use recoup_eval::run::{Plan, RESPONSES, Results, RunError, Shard, merge};
use recoup_eval::scores::ModelFacts;
use recoup_eval::tasks;
use recoup_ground::atomic::write_atomically;
use recoup_openai::Tally;
use serde_json::{Value, json};

use super::Watch;
use crate::output::{self, Claim, OutputError};

/// Why a model could not be evaluated; `E` is the model's own error.
#[derive(Debug, thiserror::Error)]
pub enum EvaluationError<E: std::error::Error + 'static> {
    #[error("{}: cannot create: {source}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Run(#[from] RunError<E>),
    #[error(transparent)]
    Tasks(Box<tasks::Error>),
    #[error(transparent)]
    Tally(#[from] TallyError),
}

impl<E: std::error::Error + 'static> From<tasks::Error> for EvaluationError<E> {
    fn from(error: tasks::Error) -> Self {
        Self::Tasks(Box::new(error))
    }
}

/// Why what happened between an evaluation and its server is not known.
#[derive(Debug, thiserror::Error)]
pub enum TallyError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not what an evaluation wrote; delete the folder to begin anew: {source}", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
}

/// What an evaluation is of: what reports say of the model, and what tells it from others.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    pub facts: ModelFacts,
    /// All that its answers depend on: they are given out again for the same.
    pub identity: Value,
    /// What its files contradict each other in.
    pub notes: Vec<String>,
}

impl Subject {
    /// `config` of results.json: the model, all that its answers depend on, what its files contradict each other in, and how
    /// the `tasks` were put.
    #[must_use]
    pub fn config(&self, tasks: &Value) -> Value {
        let mut config =
            json!({"model": "recoup", "model_args": {"pretrained": self.facts.name}, "model_identity": self.identity});
        if !self.notes.is_empty() {
            config["model_notes"] = json!(self.notes);
        }
        if let (Value::Object(config), Value::Object(tasks)) = (&mut config, tasks.clone()) {
            config.extend(tasks);
        }
        config
    }
}

/// Answers of one model to a plan, and where they are kept.
pub struct Answers<'a> {
    pub plan: &'a Plan<'a>,
    /// Of the model, see [`Subject::identity`].
    pub identity: &'a Value,
    pub folder: &'a Path,
    pub shard: Shard,
    /// What the model is called where it is told how far it is.
    pub label: &'a str,
    /// Of the disk that has to have room for them; times how many models are asked the same.
    pub claim: Option<(&'a Claim, u64)>,
}

impl Answers<'_> {
    /// Asks `model` what the journal in the folder lacks, and no model where it lacks nothing; results when all shards are one
    /// and all is answered.
    ///
    /// # Errors
    /// When the disk has no room, the folder holds answers of another run, or the model cannot be had or fails; what was answered
    /// until then is kept.
    pub fn complete<'m, M, F>(
        &self,
        model: impl FnOnce() -> Result<&'m mut M, F>,
        watch: &mut dyn Watch,
    ) -> Result<Option<Results>, F>
    where
        M: LanguageModel + 'm,
        F: From<EvaluationError<M::Error>>,
    {
        let Self { plan, shard, .. } = *self;
        let mut journal = self.begin(watch)?;
        if plan.missing(journal.answers(), shard).is_some() {
            self.ask(model()?, &mut journal, watch)?;
        }
        let answers = journal.finish().map_err(EvaluationError::from)?;
        Ok(if shard == Shard::ALL { Some(plan.results(&answers).map_err(EvaluationError::from)?) } else { None })
    }

    fn begin<E: std::error::Error>(&self, watch: &mut dyn Watch) -> Result<Journal, EvaluationError<E>> {
        let Self { plan, folder, shard, label, .. } = *self;
        std::fs::create_dir_all(folder).map_err(|source| EvaluationError::Create { path: folder.into(), source })?;
        let journal = Journal::open(&folder.join(RESPONSES), &plan.about(self.identity, shard))?;
        let (all, before) = (plan.len(shard), journal.answers().len());
        if before > 0 {
            watch.say(&format!("{label}: {before} of {all} answers are there already"));
        }
        if let Some((claim, models)) = self.claim {
            let there = std::fs::metadata(folder.join(RESPONSES)).map_or(0, |m| m.len());
            claim.room("what is asked and answered", plan.bytes(shard).saturating_sub(there) * models)?;
        }
        Ok(journal)
    }

    fn ask<M: LanguageModel>(
        &self,
        model: &mut M,
        journal: &mut Journal,
        watch: &mut dyn Watch,
    ) -> Result<(), EvaluationError<M::Error>> {
        let Self { plan, folder, shard, label, .. } = *self;
        watch.begin(&format!("{label}: answers"), plan.len(shard) as u64, journal.answers().len() as u64);
        plan.answer(model, journal, shard, folder, &mut |_| watch.part())?;
        watch.end();
        Ok(())
    }
}

/// One model on tasks, in a folder of its own or without any.
pub struct Evaluation<'a> {
    pub plan: &'a Plan<'a>,
    pub subject: &'a Subject,
    /// How the tasks are put, for results.json.
    pub tasks: Value,
    /// Where answers and results are kept; nowhere: answers lie in a folder that goes with the run.
    pub folder: Option<&'a Path>,
    pub claim: Option<&'a Claim>,
}

/// Scores, and what there is to say of them.
pub struct Evaluated {
    pub results: Results,
    facts: ModelFacts,
    config: Value,
    tally: Tally,
}

/// What happened between the evaluation and a server, kept beside the answers.
const SERVER: &str = "server.json";

impl Evaluation<'_> {
    /// Asks `model` what is not answered yet; nothing where only a shard of it is. `tally` is what it counted of its server.
    ///
    /// # Errors
    /// As [`Answers::complete`].
    pub fn run<M: LanguageModel>(
        &self,
        model: &mut M,
        shard: Shard,
        tally: fn(&M) -> Tally,
        watch: &mut dyn Watch,
    ) -> Result<Option<Evaluated>, EvaluationError<M::Error>> {
        // Without a folder nothing is kept; the journal still needs a place.
        let scratch = if self.folder.is_none() { Some(output::temporary()?) } else { None };
        let folder = self.folder.or(scratch.as_ref().map(|s| s.path())).unwrap_or(Path::new("."));
        let start = Instant::now();
        let mut counted = kept_tally(folder)?;
        let Self { plan, subject, claim, .. } = *self;
        let (identity, label) = (&subject.identity, subject.facts.name.as_str());
        let answers = Answers { plan, identity, folder, shard, label, claim: claim.map(|claim| (claim, 1)) };
        let results = answers.complete(|| Ok::<_, EvaluationError<M::Error>>(model), watch);
        // Also of a run that failed: the next adds to it.
        counted.add(&tally(model));
        if counted != Tally::default() {
            write_atomically(&folder.join(SERVER), json!(counted).to_string().as_bytes())
                .map_err(JournalError::from)?;
        }
        let results = results?;
        watch.say(&format!("{} requests in {:.1} s", plan.len(shard), start.elapsed().as_secs_f64()));
        Ok(results.map(|results| self.evaluated(results, counted)))
    }

    /// The results of all shards, from their folders; nothing is asked.
    ///
    /// # Errors
    /// When one is missing, not complete or of another run.
    pub fn merged<E: std::error::Error + 'static>(&self, shards: &[PathBuf]) -> Result<Evaluated, EvaluationError<E>> {
        let (plan, identity) = (self.plan, &self.subject.identity);
        let results = merged(plan, identity, shards, self.folder)?;
        let mut counted = Tally::default();
        for folder in shards {
            counted.add(&kept_tally(folder)?);
        }
        Ok(self.evaluated(results, counted))
    }

    fn evaluated(&self, results: Results, tally: Tally) -> Evaluated {
        let mut config = self.subject.config(&self.tasks);
        if tally != Tally::default() {
            config["server"] = json!(tally);
        }
        Evaluated { results, facts: self.subject.facts.clone(), config, tally }
    }
}

/// The results of all shards of `plan`, asked of the model `identity`, from their folders; their answers are put into `folder`.
///
/// # Errors
/// When a shard is missing, not complete or of another run, or the answers cannot be written.
pub fn merged<E: std::error::Error + 'static>(
    plan: &Plan,
    identity: &Value,
    shards: &[PathBuf],
    folder: Option<&Path>,
) -> Result<Results, EvaluationError<E>> {
    let answers = merge(plan, identity, shards)?;
    if let Some(folder) = folder {
        journal::write(&folder.join(RESPONSES), &plan.about(identity, Shard::ALL), &answers)?;
    }
    Ok(plan.results(&answers)?)
}

impl Evaluated {
    /// What whoever reads the scores should know.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.results.notes().into_iter().chain(self.tally.sentences()).collect()
    }

    /// The scores as a table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        evaluation_markdown(&self.results.rows())
    }

    /// What stands in results.json.
    #[must_use]
    pub fn json(&self) -> Value {
        self.results.json(&self.facts, &self.config)
    }

    /// Writes results, samples and the report to `folder`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), JournalError> {
        self.results.write(folder, &self.facts, &self.config)?;
        let (table, notes) = (self.table(), self.notes());
        let listed: String = notes.iter().map(|note| format!("- {note}\n")).collect();
        let report = if listed.is_empty() { table } else { format!("{}\n\n{listed}", table.trim_end()) };
        Ok(write_atomically(&folder.join("report.md"), report.as_bytes())?)
    }
}

fn kept_tally(folder: &Path) -> Result<Tally, TallyError> {
    let path = folder.join(SERVER);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|source| TallyError::Damaged { path, source }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Tally::default()),
        Err(source) => Err(TallyError::Io { path, source }),
    }
}
