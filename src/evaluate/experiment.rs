//! Models against a baseline, on tasks and texts: in which order they are loaded, what each is asked, what is kept of it.
//!
//! One model beside the baseline is in memory at a time. Everything that took time is kept in the experiment's folder as it
//! comes, with its key: answers, each text's divergence, each attribution, speeds. The same experiment goes on from there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use recoup_eval::TokenModel;
use recoup_eval::compare::{CORRECTION, CompareError, Options as CompareOptions, compare};
use recoup_eval::comparison::{Attribution, AttributionMode, ComparedModel, Comparison, Divergence};
use recoup_eval::divergence::{DivergenceError, PassError, Said, WindowSums, Windows, kl_gone};
use recoup_eval::journal::JournalError;
use recoup_eval::report::{ReportContext, html, markdown};
use recoup_eval::run::{Plan, Results, Setup, Shard};
use recoup_eval::scores::ModelScores;
use recoup_eval::tasks::{self, Selection};
use recoup_ground::atomic::{NotWritten, write_atomically};
use recoup_ground::kept::kept;
use recoup_ground::names::file_name;
use serde_json::{Value, json};

use super::evaluation::{Answers, EvaluationError, Subject};
use super::{EvaluateError, EvaluatedModel, ModelText, Rows, Watch, attribution, facts};
use crate::backend::{Backend, BackendError};
use crate::formats::kv::KvFormat;
use crate::model::Decoder;
use crate::output::Claim;

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

/// A model of the comparison, loaded.
pub struct Contender<B: Backend> {
    pub decoder: Decoder<B>,
    /// The same whose products' inputs are not quantized, where [`AttributionMode::RestoreInputs`] asks for it.
    pub float_inputs: Option<Decoder<B>>,
    pub text: ModelText,
    pub subject: Subject,
}

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
}

/// The comparison, and what there is to say about how it was measured.
#[derive(Debug)]
pub struct Outcome {
    pub comparison: Comparison,
    pub notes: BTreeSet<String>,
    /// What the files of each model contradict each other in, with its label.
    pub in_files: Vec<String>,
}

/// What one model's part of the work gave.
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

    /// Runs it on the models that `load` gives by their place in `labels`: the baseline once, each other in its turn.
    ///
    /// # Errors
    /// Those of `load`; when a model fails, a text is too short, or what the folder holds cannot be written. What was computed
    /// until then is kept.
    pub fn run<B: Backend>(
        &self,
        load: &mut dyn FnMut(usize) -> Result<Contender<B>>,
        watch: &mut dyn Watch,
    ) -> Result<Outcome> {
        let baseline = load(0)?;
        let mut work =
            Work { experiment: self, baseline: &baseline, said: BTreeMap::new(), notes: BTreeSet::new(), watch };
        // A text that is too short is refused before any task is answered.
        for (name, text) in self.texts {
            let alone = [EvaluatedModel::new(&baseline.decoder, &baseline.text, self.kv, None)];
            work.windows(&alone, name, text, self.windows)?;
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
        Ok(Outcome { comparison: self.comparison(evaluated)?, notes, in_files })
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
struct Work<'w, B: Backend> {
    experiment: &'w Experiment<'w>,
    baseline: &'w Contender<B>,
    /// What the baseline said in the windows of each text: it runs through a text once, for whatever is compared with it.
    said: BTreeMap<String, KeptSaid<B>>,
    /// What the report says about how it was measured.
    notes: BTreeSet<String>,
    watch: &'w mut dyn Watch,
}

/// One text of the experiment in one model's turn.
struct Turn<'t, B: Backend> {
    index: usize,
    model: &'t Contender<B>,
    /// The model's.
    folder: &'t Path,
    name: &'t str,
    text: &'t str,
}

impl<B: Backend> Work<'_, B> {
    fn model(&mut self, index: usize, model: &Contender<B>) -> Result<Evaluated> {
        let experiment = self.experiment;
        let (label, kv) = (&experiment.labels[index], experiment.kv);
        let folder = experiment.folder.join(file_name(label));
        std::fs::create_dir_all(&folder).map_err(|source| ExperimentError::Create { path: folder.clone(), source })?;
        let mut subject = model.subject.clone();
        if let Some(on) = &experiment.speed {
            let key = json!({"model": subject.identity, "on": on});
            let (prefill, decode) =
                kept(&folder.join("speed.json"), &key, || Ok::<_, ExperimentError>(facts::speed(&model.decoder, kv)?))?;
            (subject.facts.prefill_speed, subject.facts.decode_speed) = (Some(prefill), Some(decode));
        }
        let mut results = None;
        if !experiment.selection.tasks.is_empty() {
            let mut evaluated = EvaluatedModel::new(&model.decoder, &model.text, kv, None);
            let plan = Plan::new(experiment.selection, experiment.setup, &evaluated)?;
            self.notes.extend(plan.notes());
            // All models are asked the same; those before this one have theirs already.
            let to_come = (experiment.labels.len() - index) as u64;
            let claim = experiment.claim.map(|claim| (claim, to_come));
            let (identity, folder) = (&subject.identity, folder.as_path());
            let answers = Answers { plan: &plan, identity, folder, shard: Shard::ALL, label, claim };
            results = answers.complete(&mut evaluated, self.watch)?;
            if evaluated.truncated() > 0 {
                self.watch.say(&format!(
                    "warning: {label}: {} contexts were longer than the model's and lost their beginning",
                    evaluated.truncated()
                ));
            }
            if let Some(results) = &results {
                results.write(folder, &subject.facts, &subject.config(&experiment.tasks))?;
            }
        }
        let mut divergences = Vec::new();
        let mut attributed = None;
        if index > 0 {
            for (at, (name, text)) in experiment.texts.iter().enumerate() {
                let turn = Turn { index, model, folder: &folder, name, text };
                divergences.push(self.diverge(&turn)?);
                if let Some((mode, windows)) = experiment.attribution.filter(|_| at == 0) {
                    attributed = Some(self.attribute(&turn, mode, windows)?);
                }
            }
        }
        let facts = subject.facts;
        let scores = match &results {
            Some(results) => results.scores(facts),
            None => ModelScores { model: facts, metrics: Vec::new(), generation: Vec::new() },
        };
        Ok(Evaluated { scores, results, divergences, attribution: attributed })
    }

    /// The baseline and the model of a turn.
    fn pair<'t>(&self, turn: &'t Turn<'t, B>) -> [EvaluatedModel<'t, B>; 2]
    where
        Self: 't,
    {
        let kv = self.experiment.kv;
        [self.baseline, turn.model].map(|m| EvaluatedModel::new(&m.decoder, &m.text, kv, None))
    }

    fn windows(&mut self, models: &[EvaluatedModel<'_, B>], name: &str, text: &str, limit: usize) -> Result<Windows> {
        let context = models.iter().map(TokenModel::context_length).min().unwrap_or(0);
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
    fn said(&mut self, baseline: &mut EvaluatedModel<'_, B>, windows: &Windows) -> Result<KeptSaid<B>> {
        if let Some(kept) = self.said.get(&windows.name).filter(|kept| windows.begin(&kept.0)) {
            return Ok(kept.clone());
        }
        let what = format!("{}: {}", self.experiment.labels[0], windows.name);
        self.watch.begin(&what, windows.windows.len() as u64, 0);
        let kept = Rc::new((windows.clone(), windows.said(baseline, &mut || self.watch.part())?));
        self.watch.end();
        self.said.insert(windows.name.clone(), kept.clone());
        Ok(kept)
    }

    fn key(&self, turn: &Turn<'_, B>, windows: &Windows) -> Value {
        let (baseline, model) = (&self.baseline.subject.identity, &turn.model.subject.identity);
        json!({"baseline": baseline, "model": model, "windows": windows.windows})
    }

    fn diverge(&mut self, turn: &Turn<'_, B>) -> Result<(Divergence, WindowSums)> {
        let mut models = self.pair(turn);
        let windows = self.windows(&models, turn.name, turn.text, self.experiment.windows)?;
        let file = turn.folder.join(format!("divergence_{}.json", file_name(turn.name)));
        let (mut divergence, sums) = kept(&file, &self.key(turn, &windows), || {
            let [baseline, own] = &mut models;
            let said = self.said(baseline, &windows)?;
            let what = format!("{}: KL on {}", self.experiment.labels[turn.index], turn.name);
            self.watch.begin(&what, windows.windows.len() as u64, 0);
            let own = std::slice::from_mut(own);
            let mut figures = windows.diverge(baseline, &said.1, own, &mut || self.watch.part())?;
            self.watch.end();
            let none = || ExperimentError::Asked("no figures of a comparison of two models".into());
            figures.pop().ok_or_else(none)
        })?;
        divergence.model = turn.index;
        Ok((divergence, sums))
    }

    fn attribute(&mut self, turn: &Turn<'_, B>, mode: AttributionMode, windows: usize) -> Result<Attribution> {
        let mut models = self.pair(turn);
        let windows = self.windows(&models, turn.name, turn.text, windows)?;
        let mut key = self.key(turn, &windows);
        key["mode"] = match mode {
            AttributionMode::QuantizeOne => "Quantize".into(),
            AttributionMode::RestoreOne => "Restore".into(),
            AttributionMode::RestoreInputs => "Inputs".into(),
        };
        let swap = match (mode, &turn.model.float_inputs) {
            (AttributionMode::QuantizeOne, _) => attribution::Mode::QuantizeOne,
            (AttributionMode::RestoreInputs, Some(float)) => attribution::Mode::RestoreInputs(float),
            (AttributionMode::RestoreInputs, None) => {
                return Err(ExperimentError::Asked("the model without quantized inputs was not loaded".into()));
            }
            (AttributionMode::RestoreOne, _) => attribution::Mode::RestoreOne,
        };
        let mut found: Attribution = kept(&turn.folder.join("attribution.json"), &key, || {
            let said = self.said(&mut models[0], &windows)?;
            let what = format!("{}: where the loss sits", self.experiment.labels[turn.index]);
            self.watch.begin(&what, windows.windows.len() as u64, 0);
            let found = attribution::attribute(
                &self.baseline.decoder,
                &turn.model.decoder,
                &self.baseline.text,
                self.experiment.kv,
                &windows,
                &said.1,
                swap,
                turn.index,
                &mut || self.watch.part(),
            )?;
            self.watch.end();
            Ok::<_, ExperimentError>(found)
        })?;
        found.model = turn.index;
        Ok(found)
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
    use super::*;
    use crate::backend::cpu::{CpuBackend, isa::Isa};
    use crate::checkpoint::Checkpoint;

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

    fn contender(name: &str, identity: Value) -> Contender<CpuBackend> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let backend = CpuBackend::new(Isa::detect(), 1).unwrap();
        Contender {
            text: ModelText::from_folder(&folder, &checkpoint.config).unwrap(),
            subject: Subject { facts: facts::facts(name, &checkpoint).unwrap(), identity, notes: vec!["odd".into()] },
            decoder: Decoder::load(backend, &checkpoint).unwrap(),
            float_inputs: None,
        }
    }

    /// Loads the three shipped models, the second under `identity`, and notes in which order.
    fn run(experiment: &Experiment<'_>, identity: &str) -> (Outcome, Vec<usize>, Vec<String>) {
        let (mut order, mut seen) = (Vec::new(), Seen::default());
        let names = ["books-bf16", "books-nvfp4", "books-nvfp4-qad"];
        let load = &mut |index: usize| {
            order.push(index);
            Ok(contender(names[index], json!(if index == 1 { identity } else { names[index] })))
        };
        let outcome = experiment.run(load, &mut seen).unwrap();
        (outcome, order, seen.0)
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
        };
        experiment.check().unwrap();
        let (first, order, seen) = run(&experiment, "ptq");
        assert_eq!(order, [0, 1, 2]);
        let begun = ["BF16: books", "PTQ: KL on books", "PTQ: where the loss sits", "QAD: KL on books"];
        assert_eq!(seen[..4], begun);
        let found = &first.comparison;
        assert!(found.divergences[0].kl.value > found.divergences[1].kl.value, "{:?}", found.divergences);
        assert!(found.divergences[1].kl_gone.is_some() && found.divergences[0].kl_gone.is_none());
        assert_eq!(found.attributions.iter().map(|a| a.model).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(first.in_files, ["BF16: odd", "PTQ: odd", "QAD: odd"]);
        // The same again: nothing is computed. Another model in PTQ's place: only what depends on it.
        let (again, _, seen) = run(&experiment, "ptq");
        assert_eq!((&again.comparison, seen.len()), (found, 0));
        let (_, _, seen) = run(&experiment, "another");
        assert_eq!(seen, ["BF16: books", "PTQ: KL on books", "PTQ: where the loss sits"]);
        // Without texts and tasks there is nothing to compare.
        let nothing = Experiment { texts: &[], attribution: None, ..experiment };
        assert!(nothing.check().unwrap_err().to_string().contains("nothing to compare"));
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
        };
        let load = &mut |_: usize| Err::<Contender<CpuBackend>, _>(ExperimentError::Load("no such model".into()));
        assert_eq!(experiment.run(load, &mut ()).unwrap_err().to_string(), "no such model");
    }
}
