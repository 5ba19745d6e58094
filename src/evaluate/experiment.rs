//! Models against a baseline, on tasks and texts: in which order they are loaded, what each is asked, what is kept of it.
//!
//! One model beside the baseline is in memory at a time, and none that nothing is to be computed of. Everything that took time
//! is kept in the experiment's folder as it comes, with its key: answers, each text's divergence, each attribution, speeds. The
//! same experiment goes on from there. A share of an experiment is every n-th document, window and part of the model; from the
//! folders of all shares comes what one run would have kept.

mod contender;
mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use recoup_eval::TokenReader;
use recoup_eval::compare::{CORRECTION, CompareError, Options as CompareOptions, compare};
use recoup_eval::comparison::{Attribution, AttributionMode, ComparedModel, Comparison, Divergence};
use recoup_eval::divergence::{DivergenceError, Measured, PassError, Said, WindowSums, Windows, kl_gone};
use recoup_eval::journal::JournalError;
use recoup_eval::report::{ReportContext, html, markdown};
use recoup_eval::run::{Plan, RESPONSES, Results, Setup};
use recoup_eval::scores::ModelScores;
use recoup_eval::tasks::{self, Selection};
use recoup_ground::atomic::{NotWritten, write_atomically};
use recoup_ground::kept::kept;
use recoup_ground::names::file_name;
use recoup_ground::shares::{self, Shard, SharesError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub use self::contender::{Contender, Weights};
pub use self::parts::{Source, computation, describe, machines, speed};
use super::attribution::{self, Attributed};
use super::evaluation::{Answers, EvaluationError, merged};
use super::language_model::Reader;
use super::{EvaluateError, EvaluatedModel, Rows, Watch, facts};
use crate::backend::{Backend, BackendError};
use crate::formats::kv::KvFormat;
use crate::output::Claim;

/// What is found out once for a model: bytes of its packed weights in memory; tokens per second.
const MEMORY: &str = "memory.json";
const SPEED: &str = "speed.json";

/// Why models could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// What whoever loads the models says.
    #[error(transparent)]
    Load(Box<dyn std::error::Error + Send + Sync>),
    /// What would only show when all is computed.
    #[error("{0}")]
    Asked(String),
    #[error("{}: cannot create: {source}", path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Kept(#[from] NotWritten),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Tasks(Box<tasks::Error>),
    #[error(transparent)]
    Evaluation(Box<EvaluationError<EvaluateError>>),
    #[error(transparent)]
    Text(#[from] PassError<EvaluateError>),
    #[error(transparent)]
    Compare(Box<CompareError>),
    #[error(transparent)]
    Divergence(#[from] DivergenceError),
    #[error(transparent)]
    Parts(#[from] SharesError),
    #[error("comparison.json cannot be made: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<tasks::Error> for ExperimentError {
    fn from(error: tasks::Error) -> Self {
        Self::Tasks(Box::new(error))
    }
}

impl From<EvaluationError<EvaluateError>> for ExperimentError {
    fn from(error: EvaluationError<EvaluateError>) -> Self {
        Self::Evaluation(Box::new(error))
    }
}

impl From<CompareError> for ExperimentError {
    fn from(error: CompareError) -> Self {
        Self::Compare(Box::new(error))
    }
}

/// Result of a comparison.
pub type Result<T, E = ExperimentError> = std::result::Result<T, E>;

/// What is compared on what.
pub struct Experiment<'a> {
    /// What reports call the models, the baseline first; no two of them clash as names of folders.
    pub labels: &'a [String],
    /// The model whose loss the others may win back.
    pub ptq: Option<usize>,
    pub selection: &'a Selection,
    pub setup: &'a Setup,
    /// How the tasks are put, for results.json.
    pub tasks: Value,
    /// Texts for KL and perplexity, by name.
    pub texts: &'a [(String, String)],
    /// Tokens in a window of text, and windows of each text at most.
    pub window: usize,
    pub windows: usize,
    /// Where the loss sits, measured on so many windows of the first text.
    pub attribution: Option<(AttributionMode, usize)>,
    /// What decides how fast a model is, beside the model; nothing: speeds are not measured.
    pub speed: Option<Value>,
    pub kv: KvFormat,
    /// Level of intervals and tests.
    pub confidence: f64,
    /// Of bootstrap and permutations.
    pub seed: u64,
    /// Where everything is kept, a folder for each model.
    pub folder: &'a Path,
    pub claim: Option<&'a Claim>,
    pub source: Source<'a>,
}

/// The comparison, and what there is to say about how it was measured.
#[derive(Debug)]
pub struct Outcome {
    pub comparison: Comparison,
    pub notes: BTreeSet<String>,
    /// What the files of each model contradict each other in, with its label.
    pub in_files: Vec<String>,
}

/// What one model's turn gave.
struct Evaluated {
    scores: ModelScores,
    results: Option<Results>,
    divergences: Vec<(Divergence, WindowSums)>,
    attribution: Option<Attribution>,
}

impl Experiment<'_> {
    /// Whether it can come to an end.
    ///
    /// # Errors
    /// What is too little for an error or an interval, or not a level.
    pub fn check(&self) -> Result<()> {
        let fail = |detail: String| Err(ExperimentError::Asked(detail));
        if self.selection.tasks.is_empty() && self.texts.is_empty() {
            return fail("nothing to compare: name --tasks or --text".into());
        }
        if !(0.5..1.0).contains(&self.confidence) {
            return fail(format!(
                "--confidence {}: expected at least 0.5 and less than 1, such as 0.95",
                self.confidence
            ));
        }
        if self.texts.is_empty() && self.attribution.is_some() {
            return fail("--attribute ranks parts of the model by KL on the first text, and --text names none".into());
        }
        let (windows, window) = (self.windows, self.window);
        if !self.texts.is_empty() && (windows < 2 || window < 2) {
            return fail(format!(
                "--windows {windows} --window {window}: an error needs two windows of two tokens at least"
            ));
        }
        if let Some((_, windows @ 0..2)) = self.attribution {
            return fail(format!("--attribute-windows {windows}: an error needs two windows at least"));
        }
        for task in &self.selection.tasks {
            let documents = self.setup.options.limit.map_or(task.documents(), |l| l.of(task.documents()));
            if documents < 2 {
                return fail(format!(
                    "{}: {documents} document{} to compare on; intervals and tests need two at least, give --limit 2 or more",
                    task.name(),
                    if documents == 1 { "" } else { "s" }
                ));
            }
        }
        Ok(())
    }

    /// Runs it on the models that `load` gives by their place in `labels`: the baseline once, each other in its turn. Nothing
    /// where only a share of it is to be computed.
    ///
    /// # Errors
    /// Those of `load`; when a model fails, a text is too short, what the folder holds cannot be written, or parts make no
    /// whole. What was computed until then is kept.
    pub fn run<'l, B: Backend>(
        &self,
        load: &mut dyn FnMut(usize) -> Result<Contender<'l, B>>,
        watch: &mut dyn Watch,
    ) -> Result<Option<Outcome>> {
        let baseline = load(0)?;
        let mut work =
            Work { experiment: self, baseline: &baseline, said: BTreeMap::new(), notes: BTreeSet::new(), watch };
        // A text that is too short is refused before any task is answered.
        for (name, text) in self.texts {
            work.windows(&[baseline.reader()], name, text, self.windows)?;
        }
        let mut in_files = Vec::new();
        let mut of_files =
            |label: &str, notes: &[String]| in_files.extend(notes.iter().map(|n| format!("{label}: {n}")));
        of_files(&self.labels[0], &baseline.subject.notes);
        let mut evaluated = vec![work.model(0, &baseline)?];
        for (index, label) in self.labels.iter().enumerate().skip(1) {
            let model = load(index)?;
            of_files(label, &model.subject.notes);
            evaluated.push(work.model(index, &model)?);
        }
        let notes = work.notes;
        let Some(evaluated) = evaluated.into_iter().collect() else { return Ok(None) };
        Ok(Some(Outcome { comparison: self.comparison(evaluated)?, notes, in_files }))
    }

    fn comparison(&self, mut evaluated: Vec<Evaluated>) -> Result<Comparison> {
        let (ptq, labels) = (self.ptq, self.labels);
        let mut options = CompareOptions { confidence: self.confidence, seed: self.seed, ..CompareOptions::default() };
        // A task in several groups counts with the outermost one.
        let mut groups: Vec<_> = self.selection.groups.iter().collect();
        groups.sort_by_key(|g| g.tasks.len());
        for group in groups {
            options.groups.extend(group.tasks.iter().map(|t| (t.clone(), group.name.clone())));
        }
        if let Some(results) = evaluated.first().and_then(|e| e.results.as_ref()) {
            options.headline = results.tasks.iter().map(|t| (t.name.clone(), t.headline.clone())).collect();
        }
        let scores: Vec<ModelScores> = evaluated.iter().map(|e| e.scores.clone()).collect();
        let (tasks, overall) = if self.selection.tasks.is_empty() {
            (Vec::new(), vec![None; scores.len()])
        } else {
            compare(&scores, labels, ptq, &options)?
        };
        let texts = evaluated.get(1).map_or(0, |e| e.divergences.len());
        let mut divergences = Vec::new();
        for text in 0..texts {
            let ptq_sums = ptq.map(|p| evaluated[p].divergences[text].1.clone());
            for (index, e) in evaluated.iter().enumerate().skip(1) {
                let (mut divergence, sums) = e.divergences[text].clone();
                if let Some(ptq_sums) = ptq_sums.as_ref().filter(|_| ptq != Some(index)) {
                    divergence.kl_gone = kl_gone(ptq_sums, &sums, self.confidence, options.resamples, self.seed)?;
                }
                divergences.push(divergence);
            }
        }
        let model =
            |(s, label): (&ModelScores, &String)| ComparedModel { facts: s.model.clone(), label: label.clone() };
        Ok(Comparison {
            models: scores.iter().zip(labels).map(model).collect(),
            ptq,
            tasks,
            overall,
            divergences,
            attributions: evaluated.iter_mut().filter_map(|e| e.attribution.take()).collect(),
            confidence: self.confidence,
            correction: CORRECTION.into(),
        })
    }
}

/// Windows of a text, and what the baseline said in them.
type KeptSaid<B> = Rc<(Windows, Said<Rows<<B as Backend>::Tensor>>)>;

/// The experiment under way.
struct Work<'w, 'l, B: Backend> {
    experiment: &'w Experiment<'w>,
    baseline: &'w Contender<'l, B>,
    /// What the baseline said in the windows of each text: it runs through a text once, for whatever is compared with it.
    said: BTreeMap<String, KeptSaid<B>>,
    /// What the report says about how it was measured.
    notes: BTreeSet<String>,
    watch: &'w mut dyn Watch,
}

/// One model's turn.
struct Turn<'t, 'l, B: Backend> {
    index: usize,
    model: &'t Contender<'l, B>,
    /// Where its results lie, below the folder of the experiment or of a part.
    below: PathBuf,
}

impl<B: Backend> Turn<'_, '_, B> {
    fn file(&self, name: &str) -> PathBuf {
        self.below.join(name)
    }
}

impl<'l, B: Backend> Work<'_, 'l, B> {
    /// Nothing where only a share is computed.
    fn model(&mut self, index: usize, model: &Contender<'l, B>) -> Result<Option<Evaluated>> {
        let experiment = self.experiment;
        let turn = Turn { index, model, below: file_name(&experiment.labels[index]).into() };
        let folder = experiment.folder.join(&turn.below);
        std::fs::create_dir_all(&folder).map_err(|source| ExperimentError::Create { path: folder.clone(), source })?;
        let mut facts = model.subject.facts.clone();
        let key = json!({"model": model.subject.identity});
        facts.resident_bytes =
            Some(self.once(&turn, MEMORY, &key, || Ok(facts::resident_bytes(&model.weights()?.decoder)))?);
        // One process measures speeds: the first, of several.
        if let (Some(on), Source::Parts(_) | Source::Computed(Shard { index: 0, .. })) =
            (&experiment.speed, experiment.source)
        {
            let key = json!({"model": model.subject.identity, "on": on});
            let measure = || Ok(facts::speed(&model.weights()?.decoder, experiment.kv)?);
            let (prefill, decode) = self.once(&turn, SPEED, &key, measure)?;
            (facts.prefill_speed, facts.decode_speed) = (Some(prefill), Some(decode));
        }
        let mut results = None;
        if !experiment.selection.tasks.is_empty() {
            results = self.answers(&turn)?;
            if let Some(results) = &results {
                results.write(&folder, &facts, &model.subject.config(&experiment.tasks))?;
            }
        }
        let mut divergences = Vec::new();
        let mut attribution = None;
        for (at, (name, text)) in experiment.texts.iter().enumerate().filter(|_| index > 0) {
            divergences.extend(self.diverge(&turn, name, text)?);
            if let Some((mode, windows)) = experiment.attribution.filter(|_| at == 0) {
                attribution = self.attribute(&turn, name, text, (mode, windows))?;
            }
        }
        if matches!(experiment.source, Source::Computed(share) if share != Shard::ALL) {
            return Ok(None);
        }
        let scores = match &results {
            Some(results) => results.scores(facts),
            None => ModelScores { model: facts, metrics: Vec::new(), generation: Vec::new() },
        };
        Ok(Some(Evaluated { scores, results, divergences, attribution }))
    }

    /// What one process finds out for all.
    fn once<T: Serialize + DeserializeOwned>(
        &self,
        turn: &Turn<'_, 'l, B>,
        file: &str,
        key: &Value,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let file = turn.file(file);
        kept(&self.experiment.folder.join(&file), key, || match self.experiment.source {
            Source::Computed(_) => make(),
            Source::Parts(folders) => Ok(shares::any(folders, &file, key)?),
        })
    }

    /// What is made of the shares that `compute` gives, kept in the files `whole` and `share` for `key`; nothing where the
    /// experiment is only a share of one.
    fn of_shares<S: Serialize + DeserializeOwned, T: Serialize + DeserializeOwned>(
        &mut self,
        (whole, share): (&Path, &Path),
        key: &Value,
        compute: impl FnOnce(&mut Self, Shard) -> Result<S>,
        make: impl FnOnce(Vec<S>) -> Result<T>,
    ) -> Result<Option<T>> {
        let Experiment { folder, source, .. } = *self.experiment;
        match source {
            Source::Computed(Shard::ALL) => {
                kept(&folder.join(whole), key, || make(vec![compute(self, Shard::ALL)?])).map(Some)
            }
            Source::Computed(own) => {
                kept(&folder.join(share), &shares::of_share(key, own), || compute(self, own))?;
                Ok(None)
            }
            Source::Parts(folders) => {
                kept(&folder.join(whole), key, || make(shares::all(folders, share, key)?)).map(Some)
            }
        }
    }

    /// Results of the tasks; nothing where a share of them is answered.
    fn answers(&mut self, turn: &Turn<'_, 'l, B>) -> Result<Option<Results>> {
        let experiment = self.experiment;
        let (model, label, kv) = (turn.model, &experiment.labels[turn.index], experiment.kv);
        let plan = Plan::new(experiment.selection, experiment.setup, &model.text)?;
        self.notes.extend(plan.notes());
        let (identity, folder) = (&model.subject.identity, experiment.folder.join(&turn.below));
        let shard = match experiment.source {
            Source::Computed(shard) => shard,
            Source::Parts(folders) => {
                let folders: Vec<PathBuf> = folders.iter().map(|part| part.join(&turn.below)).collect();
                if let Some(lacking) = folders.iter().map(|f| f.join(RESPONSES)).find(|file| !file.exists()) {
                    return Err(SharesError::Missing(lacking).into());
                }
                return Ok(Some(merged(&plan, identity, &folders, Some(&folder))?));
            }
        };
        // All models are asked the same; those before this one have theirs already.
        let to_come = (experiment.labels.len() - turn.index) as u64;
        let claim = experiment.claim.map(|claim| (claim, to_come));
        let answers = Answers { plan: &plan, identity, folder: &folder, shard, label, claim };
        let mut evaluated = None;
        let results = answers.complete::<_, ExperimentError>(
            || {
                let decoder = &model.weights()?.decoder;
                Ok(evaluated.insert(EvaluatedModel::new(decoder, &model.text, kv, None)))
            },
            self.watch,
        )?;
        if let Some(truncated) = evaluated.map(|e| e.truncated()).filter(|n| *n > 0) {
            self.watch.say(&format!(
                "warning: {label}: {truncated} contexts were longer than the model's and lost their beginning"
            ));
        }
        Ok(results)
    }

    fn windows(&mut self, models: &[Reader<'_>], name: &str, text: &str, limit: usize) -> Result<Windows> {
        let context = models.iter().map(TokenReader::context_length).min().unwrap_or(0);
        let window = self.experiment.window;
        if context < window {
            self.notes.insert(format!(
                "Windows of {context} tokens instead of {window}: one of the models has no more positions."
            ));
        }
        let windows = Windows::cut(models, name, text, window.min(context), Some(limit))?;
        if let Some(padded) = &windows.padded {
            let sizes: Vec<String> = padded.iter().map(usize::to_string).collect();
            self.notes.insert(format!(
                "Vocabularies of {} tokens: one is padded. KL is over the {} that both have.",
                sizes.join(" and "),
                windows.vocab
            ));
        }
        Ok(windows)
    }

    /// What the baseline says in `windows`, from an earlier model's turn if it is known.
    fn said(&mut self, windows: &Windows) -> Result<KeptSaid<B>> {
        if let Some(kept) = self.said.get(&windows.name).filter(|kept| windows.begin(&kept.0)) {
            return Ok(kept.clone());
        }
        let mut baseline =
            EvaluatedModel::new(&self.baseline.weights()?.decoder, &self.baseline.text, self.experiment.kv, None);
        let what = format!("{}: {}", self.experiment.labels[0], windows.name);
        self.watch.begin(&what, windows.windows.len() as u64, 0);
        let kept = Rc::new((windows.clone(), windows.said(&mut baseline, &mut || self.watch.part())?));
        self.watch.end();
        self.said.insert(windows.name.clone(), kept.clone());
        Ok(kept)
    }

    fn key(&self, turn: &Turn<'_, 'l, B>, windows: &Windows) -> Value {
        let (baseline, model) = (&self.baseline.subject.identity, &turn.model.subject.identity);
        json!({"baseline": baseline, "model": model, "windows": windows.windows})
    }

    /// Figures of a model on a text.
    fn diverge(&mut self, turn: &Turn<'_, 'l, B>, name: &str, text: &str) -> Result<Option<(Divergence, WindowSums)>> {
        let all = self.windows(&[self.baseline.reader(), turn.model.reader()], name, text, self.experiment.windows)?;
        let [whole, share] =
            ["divergence", "measured"].map(|kind| turn.file(&format!("{kind}_{}.json", file_name(name))));
        let measure = |work: &mut Self, share| {
            let windows = all.of(share);
            let said = work.said(&windows)?;
            let kv = work.experiment.kv;
            let [baseline, own] = [work.baseline, turn.model];
            let baseline = EvaluatedModel::new(&baseline.weights()?.decoder, &baseline.text, kv, None);
            let mut own = [EvaluatedModel::new(&own.weights()?.decoder, &own.text, kv, None)];
            let what = format!("{}: KL on {name}", work.experiment.labels[turn.index]);
            work.watch.begin(&what, windows.windows.len() as u64, 0);
            let measured = windows.measured(&baseline, &said.1, &mut own, &mut || work.watch.part())?;
            work.watch.end();
            Ok(Measured::joined(measured))
        };
        let figures = |shares| Ok(all.figures(turn.index, &Measured::joined(shares))?);
        let found = self.of_shares((&whole, &share), &self.key(turn, &all), measure, figures)?;
        Ok(found
            .map(|(divergence, sums): (Divergence, WindowSums)| (Divergence { model: turn.index, ..divergence }, sums)))
    }

    /// Where the loss of a model sits, by so many windows of a text.
    fn attribute(
        &mut self,
        turn: &Turn<'_, 'l, B>,
        name: &str,
        text: &str,
        (mode, windows): (AttributionMode, usize),
    ) -> Result<Option<Attribution>> {
        let windows = self.windows(&[self.baseline.reader(), turn.model.reader()], name, text, windows)?;
        let mut key = self.key(turn, &windows);
        key["mode"] = match mode {
            AttributionMode::QuantizeOne => "Quantize".into(),
            AttributionMode::RestoreOne => "Restore".into(),
            AttributionMode::RestoreInputs => "Inputs".into(),
        };
        let attribute = |work: &mut Self, share| {
            let said = work.said(&windows)?;
            let [baseline, own] = [work.baseline.weights()?, turn.model.weights()?];
            let swap = match (mode, &own.float_inputs) {
                (AttributionMode::QuantizeOne, _) => attribution::Mode::QuantizeOne,
                (AttributionMode::RestoreOne, _) => attribution::Mode::RestoreOne,
                (AttributionMode::RestoreInputs, Some(float)) => attribution::Mode::RestoreInputs(float),
                (AttributionMode::RestoreInputs, None) => {
                    return Err(ExperimentError::Asked("the model without quantized inputs was not loaded".into()));
                }
            };
            let what = format!("{}: where the loss sits", work.experiment.labels[turn.index]);
            work.watch.begin(&what, windows.windows.len() as u64, 0);
            let found = attribution::attribute(
                &baseline.decoder,
                &own.decoder,
                &work.baseline.text,
                work.experiment.kv,
                &windows,
                &said.1,
                swap,
                share,
                &mut || work.watch.part(),
            )?;
            work.watch.end();
            Ok(found)
        };
        let rank = |shares| {
            let none = || ExperimentError::Asked("no part of the model was looked at".into());
            Ok(Attributed::joined(shares).ok_or_else(none)?.ranked(turn.index, name, mode))
        };
        let files = (&*turn.file("attribution.json"), &*turn.file("attributed.json"));
        let found = self.of_shares(files, &key, attribute, rank)?;
        Ok(found.map(|found: Attribution| Attribution { model: turn.index, ..found }))
    }
}

/// Writes what a comparison found to `folder`, as data and as reports; gives the data.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path, comparison: &Comparison, context: &ReportContext) -> Result<String> {
    let write = |name: &str, text: &str| write_atomically(&folder.join(name), text.as_bytes());
    let json = serde_json::to_string_pretty(comparison)? + "\n";
    write("comparison.json", &json)?;
    write("report.md", &markdown(comparison, context))?;
    write("report.html", &html(comparison, context))?;
    Ok(json)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::backend::cpu::{CpuBackend, isa::Isa};
    use crate::checkpoint::Checkpoint;
    use crate::evaluate::evaluation::Subject;
    use crate::model::{Decoder, ModelConfig};
    use crate::text::ModelText;

    /// What is begun, and what is said.
    #[derive(Default)]
    struct Seen(Vec<String>);

    impl Watch for Seen {
        fn begin(&mut self, what: &str, _: u64, _: u64) {
            self.0.push(what.into());
        }

        fn part(&mut self) {}

        fn end(&mut self) {}

        fn say(&mut self, line: &str) {
            self.0.push(line.into());
        }
    }

    const NAMES: [&str; 3] = ["books-bf16", "books-nvfp4", "books-nvfp4-qad"];

    /// The shipped model of that number; whose weights are loaded is noted.
    fn contender(index: usize, identity: Value, loaded: &RefCell<Vec<usize>>) -> Contender<'_, CpuBackend> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(NAMES[index]);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let text = ModelText::from_folder(&folder, &checkpoint.config).unwrap();
        let facts = facts::facts(NAMES[index], &checkpoint).unwrap();
        let subject = Subject { facts, identity, notes: vec!["odd".into()] };
        let config = ModelConfig::read(&checkpoint.config).unwrap();
        Contender::new(text, subject, &config, move || {
            loaded.borrow_mut().push(index);
            let backend = CpuBackend::new(Isa::detect(), 1).unwrap();
            Ok(Weights { decoder: Decoder::load(backend, &checkpoint).unwrap(), float_inputs: None })
        })
    }

    /// What comes of the three shipped models, the second under `identity`; whose weights were loaded; what was said.
    fn run(experiment: &Experiment<'_>, identity: &str) -> (Result<Option<Outcome>>, Vec<usize>, Vec<String>) {
        let (loaded, mut seen) = (RefCell::default(), Seen::default());
        let load =
            &mut |index: usize| Ok(contender(index, json!(if index == 1 { identity } else { NAMES[index] }), &loaded));
        let outcome = experiment.run(load, &mut seen);
        (outcome, loaded.take(), seen.0)
    }

    #[test]
    fn the_baseline_runs_once_per_text_and_what_is_kept_is_given_out_for_the_same_models_only() {
        let folder = tempfile::tempdir().unwrap();
        let labels = ["BF16", "PTQ", "QAD"].map(str::to_owned);
        let texts = [("books".to_owned(), tasks::built_in_text("books").unwrap())];
        let (selection, setup) = (Selection::default(), Setup::default());
        let experiment = Experiment {
            labels: &labels,
            ptq: Some(1),
            selection: &selection,
            setup: &setup,
            tasks: Value::Null,
            texts: &texts,
            window: 32,
            windows: 3,
            attribution: Some((AttributionMode::QuantizeOne, 2)),
            speed: None,
            kv: KvFormat::F32,
            confidence: 0.95,
            seed: 0,
            folder: folder.path(),
            claim: None,
            source: Source::Computed(Shard::ALL),
        };
        experiment.check().unwrap();
        let (first, loaded, seen) = run(&experiment, "ptq");
        let first = first.unwrap().unwrap();
        assert_eq!(loaded, [0, 1, 2]);
        let begun = ["BF16: books", "PTQ: KL on books", "PTQ: where the loss sits", "QAD: KL on books"];
        assert_eq!(seen[..4], begun);
        let found = &first.comparison;
        assert!(found.divergences[0].kl.value > found.divergences[1].kl.value, "{:?}", found.divergences);
        assert!(found.divergences[1].kl_gone.is_some() && found.divergences[0].kl_gone.is_none());
        assert_eq!(found.attributions.iter().map(|a| a.model).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(first.in_files, ["BF16: odd", "PTQ: odd", "QAD: odd"]);
        // The same again: nothing is computed, and no model loaded. Another model in PTQ's place: only what depends on it.
        let (again, loaded, seen) = run(&experiment, "ptq");
        assert_eq!((&again.unwrap().unwrap().comparison, loaded.len(), seen.len()), (found, 0, 0));
        let (_, loaded, seen) = run(&experiment, "another");
        assert_eq!(seen, ["BF16: books", "PTQ: KL on books", "PTQ: where the loss sits"]);
        assert_eq!(loaded, [1, 0]);
        // Without texts and tasks there is nothing to compare.
        let nothing = Experiment { texts: &[], attribution: None, ..experiment };
        assert!(nothing.check().unwrap_err().to_string().contains("nothing to compare"));
    }

    /// Every file below, with its bytes.
    fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
            match entry.is_dir() {
                true => all
                    .extend(files(&entry).into_iter().map(|(p, b)| (Path::new(entry.file_name().unwrap()).join(p), b))),
                false => drop(all.insert(entry.file_name().unwrap().into(), std::fs::read(&entry).unwrap())),
            }
        }
        all
    }

    #[test]
    fn shares_make_what_one_run_keeps_and_what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let labels = ["BF16", "PTQ", "QAD"].map(str::to_owned);
        let texts = [("books".to_owned(), tasks::built_in_text("books").unwrap())];
        let selection = tasks::Library::new(&[], None).unwrap().select(&["books_cloze"]).unwrap();
        let mut setup = Setup::default();
        setup.options.limit = Some(tasks::Limit::First(7));
        let at = |name: &str| folder.path().join(name);
        let experiment = |folder, source| Experiment {
            labels: &labels,
            ptq: Some(1),
            selection: &selection,
            setup: &setup,
            tasks: Value::Null,
            texts: &texts,
            window: 32,
            windows: 5,
            attribution: Some((AttributionMode::RestoreOne, 2)),
            speed: None,
            kv: KvFormat::F32,
            confidence: 0.95,
            seed: 0,
            folder,
            claim: None,
            source,
        };
        let (whole, merged) = (at("whole"), at("merged"));
        let one = run(&experiment(&whole, Source::Computed(Shard::ALL)), "ptq").0.unwrap().unwrap();
        // More shares than windows of the attribution, and not in their order.
        let parts: Vec<PathBuf> = [2, 0, 1].map(|i| at(&format!("part {i}"))).into();
        for (index, part) in [2, 0, 1].into_iter().zip(&parts) {
            let share = Source::Computed(Shard { index, of: 3 });
            let unfinished = run(&experiment(&merged, Source::Parts(&parts)), "ptq").0.unwrap_err().to_string();
            assert!(unfinished.contains("is not there"), "{unfinished}");
            assert!(run(&experiment(part, share), "ptq").0.unwrap().is_none());
            let (again, loaded, _) = run(&experiment(part, share), "ptq");
            assert!(again.unwrap().is_none() && loaded.is_empty());
        }
        let (all, loaded, seen) = run(&experiment(&merged, Source::Parts(&parts)), "ptq");
        assert_eq!((all.unwrap().unwrap().comparison, loaded.len(), seen.len()), (one.comparison, 0, 0));
        assert_eq!(files(&merged), files(&whole));
        // Other models, too few, one twice, one that lacks something.
        let elsewhere = at("refused");
        let twice = [parts[0].clone(), parts[1].clone(), parts[0].clone()];
        let refused = |parts, identity: &str| {
            run(&experiment(&elsewhere, Source::Parts(parts)), identity).0.unwrap_err().to_string()
        };
        let said = refused(&parts, "another");
        assert!(said.contains("`model` is \"ptq\" there and \"another\" here"), "{said}");
        let said = refused(&parts[..2], "ptq");
        assert!(said.contains("one of 0/2 to 1/2"), "{said}");
        let said = refused(&twice, "ptq");
        assert!(said.contains("2/3"), "{said}");
        std::fs::remove_file(parts[1].join("QAD/attributed.json")).unwrap();
        let said = refused(&parts, "ptq");
        assert!(said.contains("attributed.json: is not there"), "{said}");
    }

    #[test]
    fn what_the_loader_says_ends_the_experiment() {
        let labels = ["BF16", "PTQ"].map(str::to_owned);
        let (selection, setup) = (Selection::default(), Setup::default());
        let experiment = Experiment {
            labels: &labels,
            ptq: None,
            selection: &selection,
            setup: &setup,
            tasks: Value::Null,
            texts: &[],
            window: 32,
            windows: 2,
            attribution: None,
            speed: None,
            kv: KvFormat::F32,
            confidence: 0.95,
            seed: 0,
            folder: Path::new("nowhere"),
            claim: None,
            source: Source::Computed(Shard::ALL),
        };
        let load = &mut |_: usize| Err::<Contender<'_, CpuBackend>, _>(ExperimentError::Load("no such model".into()));
        assert_eq!(experiment.run(load, &mut ()).unwrap_err().to_string(), "no such model");
    }
}
