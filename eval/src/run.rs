//! Running tasks on a model: what is missing is asked, answers are kept as they come, and all answers become results.
//!
//! A folder holds `responses.jsonl` (the [`Journal`]), and when all is answered `results.json` and one
//! `samples_<task>.jsonl` per task, in lm-evaluation-harness's schema. None of them holds a time or a speed: the same
//! answers give the same bytes, whether a run was killed and resumed or split into shards and merged.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::journal::{self, Journal, JournalError, Key};
use crate::report::ScoreRow;
use crate::scores::{GenerationLength, MetricScores, ModelFacts, ModelScores};
pub use crate::settings::Setup;
use crate::settings::{self, Generations};
use crate::tasks::{self, BOOTSTRAP_RESAMPLES, Chat, Instance, Options, Sample, Selection, Task};
use crate::{LanguageModel, Message, Prompts, Request, Response};
use recoup_ground::atomic::write_atomically;
use recoup_ground::digest::sha256;
use recoup_ground::names::file_name;
pub use recoup_ground::shares::Shard;

/// Answers and what the run is about.
pub const RESPONSES: &str = "responses.jsonl";
/// Sets a seed's repeats apart from another's; more than any task asks for.
const REPEATS: usize = 1 << 16;

/// Why a run could not be finished.
#[derive(Debug, Error)]
pub enum RunError<E: std::error::Error + 'static> {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{source}{}", kept(*.answered, .folder))]
    Model { source: E, answered: usize, folder: PathBuf },
}

fn kept(answered: usize, folder: &Path) -> String {
    match answered {
        0 => String::new(),
        n => format!("\n  {n} answers are kept in {}; the same command goes on from there", folder.display()),
    }
}

/// Tasks with all that is asked.
pub struct Plan<'t> {
    selection: &'t Selection,
    setup: &'t Setup,
    /// For each task, what is asked with each seed.
    instances: Vec<Vec<Vec<Instance>>>,
    generations: Generations,
    /// Settings without effect.
    unused: Vec<String>,
}

impl<'t> Plan<'t> {
    /// Makes the requests.
    ///
    /// # Errors
    /// When a document does not suit its task, or the model has no chat template though one is asked for.
    pub fn new<M: Prompts>(selection: &'t Selection, setup: &'t Setup, model: &M) -> Result<Self, tasks::Error> {
        let render = |messages: &[Message], open: bool| model.chat_prompt(messages, open).map_err(|e| e.to_string());
        let chat = setup.chat.then_some(Chat { render: &render, fewshot_as_multiturn: setup.fewshot_as_multiturn });
        let of_model = model.generation_defaults();
        let options = Options { of_model: of_model.clone(), ..setup.options.clone() };
        // Also where no task generates.
        tasks::generation::checked(&options.generation)?;
        let generations = settings::generations(&selection.tasks, &options)?;
        let unused = settings::without_effect(&selection.tasks, setup, &generations, &of_model);
        let mut instances = Vec::new();
        for task in &selection.tasks {
            let mut seeds = vec![task.instances(&options, chat.as_ref())?];
            let sampled = seeds[0].iter().flat_map(|i| &i.requests).find_map(|r| match r {
                Request::Generate { options, .. } if options.temperature > 0.0 => Some(options.seed),
                _ => None,
            });
            for seed in sampled.into_iter().flat_map(|first| (1..setup.seeds as u64).map(move |i| first + i)) {
                let mut options = options.clone();
                options.generation.insert("seed".into(), seed.into());
                seeds.push(task.instances(&options, chat.as_ref())?);
            }
            instances.push(seeds);
        }
        Ok(Self { selection, setup, instances, generations, unused })
    }

    /// What whoever reads the scores should know: settings that change nothing, and of the prompts, in how many the answer
    /// stands among the examples.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let of = |(task, seeds): (&Task, &Vec<Vec<Instance>>)| {
            let instances = seeds.first()?;
            let count = instances.iter().filter(|i| i.holds_itself).count();
            (count > 0).then(|| {
                format!(
                    "{}: in {count} of {} prompts the question itself, with its answer, is among the few-shot examples, \
                     which helps the score by more than the \
                     model knows; lm-evaluation-harness makes the same prompts",
                    task.name(),
                    instances.len()
                )
            })
        };
        let own = self.selection.tasks.iter().zip(&self.instances).filter_map(of);
        self.unused.iter().cloned().chain(own).collect()
    }

    /// Every request with its key.
    fn requests(&self) -> impl Iterator<Item = (Key, &Request)> {
        self.selection.tasks.iter().zip(&self.instances).flat_map(|(task, seeds)| {
            seeds.iter().enumerate().flat_map(move |(seed, instances)| {
                instances.iter().flat_map(move |i| {
                    let key = move |request| Key { task: task.name().to_owned(), doc_id: i.doc_id, seed, request };
                    i.requests.iter().enumerate().map(move |(request, r)| (key(request), r))
                })
            })
        })
    }

    /// Number of requests in a shard.
    #[must_use]
    pub fn len(&self, shard: Shard) -> usize {
        self.requests().filter(|(k, _)| shard.has(k.doc_id)).count()
    }

    /// Bytes that the answers of a shard and what is written of them take at least: the journal, and each document with what
    /// was asked and answered (`samples_*.jsonl`).
    #[must_use]
    pub fn bytes(&self, shard: Shard) -> u64 {
        /// Key, numbers and names of a line.
        const LINE: u64 = 120;
        /// Of an answer, which is seldom as long as it may be.
        const ANSWER: u64 = 64;
        let asked: u64 = (self.requests().filter(|(key, _)| shard.has(key.doc_id)))
            .map(|(key, request)| {
                let (text, answer) = match request {
                    Request::LogLikelihood { context, continuation } => (context.len() + continuation.len(), 0),
                    Request::Rolling { text } => (text.len(), 0),
                    Request::Generate { context, .. } => (context.len(), ANSWER),
                };
                2 * (LINE + answer) + (key.task.len() + text) as u64
            })
            .sum();
        let documents: u64 = (self.selection.tasks.iter().zip(&self.instances))
            .map(|(task, seeds)| seeds.iter().flatten().map(|i| task.document_bytes(i.doc_id)).sum::<u64>())
            .sum();
        asked + documents
    }

    /// What a journal of this plan is about: the same of two runs exactly if the same is asked of the same model.
    /// `model` identifies it.
    #[must_use]
    pub fn about(&self, model: &Value, shard: Shard) -> Value {
        let tasks: Map<String, Value> = (self.selection.tasks.iter().zip(&self.instances))
            .map(|(task, seeds)| {
                let requests: Vec<&Vec<Request>> = seeds.iter().flatten().map(|i| &i.requests).collect();
                let digest = sha256(serde_json::to_vec(&requests).unwrap_or_default());
                (
                    task.name().into(),
                    json!({"documents": seeds[0].len(), "seeds": seeds.len(), "requests_hash": digest}),
                )
            })
            .collect();
        json!({"model": model, "tasks": tasks, "shard": shard.to_string()})
    }

    /// Asks what `journal` lacks of `shard`. `progress` gets each answer's request after it is kept.
    ///
    /// # Errors
    /// When the model fails or an answer cannot be kept; what was answered before is kept.
    pub fn answer<M: LanguageModel>(
        &self,
        model: &mut M,
        journal: &mut Journal,
        shard: Shard,
        folder: &Path,
        progress: &mut dyn FnMut(&Request),
    ) -> Result<(), RunError<M::Error>> {
        let missing: Vec<(Key, &Request)> =
            self.requests().filter(|(key, _)| shard.has(key.doc_id) && !journal.answers().contains_key(key)).collect();
        let requests: Vec<Request> = missing.iter().map(|(_, r)| (*r).clone()).collect();
        let mut failure = None;
        let result = model.answer(&requests, &mut |i, response| match journal.add(missing[i].0.clone(), response) {
            Ok(()) => {
                progress(&requests[i]);
                ControlFlow::Continue(())
            }
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        });
        if let Some(e) = failure {
            return Err(e.into());
        }
        result.map_err(|source| RunError::Model { source, answered: journal.answers().len(), folder: folder.into() })
    }

    /// What the plan lacks in `answers`: how many, and the first.
    #[must_use]
    pub fn missing(&self, answers: &BTreeMap<Key, Response>, shard: Shard) -> Option<(usize, Key)> {
        let mut missing =
            self.requests().filter(|(k, _)| shard.has(k.doc_id) && !answers.contains_key(k)).map(|(k, _)| k);
        let first = missing.next()?;
        Some((1 + missing.count(), first))
    }

    /// Scores complete answers.
    ///
    /// # Errors
    /// When an answer is missing or is not one to its request.
    pub fn results(&self, answers: &BTreeMap<Key, Response>) -> Result<Results, tasks::Error> {
        let mut out = Results {
            tasks: Vec::new(),
            setup: self.setup.clone(),
            groups: Vec::new(),
            generation: settings::record(&self.generations),
            notes: self.notes(),
        };
        for (task, seeds) in self.selection.tasks.iter().zip(&self.instances) {
            let mut samples = Vec::new();
            let (mut tokens, mut counted, mut capped, mut empty, mut generated) = (0, 0usize, 0, 0, 0usize);
            for (seed, instance) in seeds.iter().enumerate().flat_map(|(s, i)| i.iter().map(move |i| (s, i))) {
                let key = |request| Key { task: task.name().into(), doc_id: instance.doc_id, seed, request };
                let responses: Vec<Response> =
                    (0..instance.requests.len()).filter_map(|i| answers.get(&key(i)).cloned()).collect();
                for response in &responses {
                    if let Response::Generated { text, tokens: n, capped: c } = response {
                        tokens += n.unwrap_or(0);
                        counted += usize::from(n.is_some());
                        capped += usize::from(*c);
                        empty += usize::from(text.trim().is_empty());
                        generated += 1;
                    }
                }
                for mut sample in task.score(instance, &responses)? {
                    sample.values.iter_mut().for_each(|v| v.1.repeat += seed * REPEATS);
                    samples.push(sample);
                }
            }
            samples.sort_by_key(|s| s.doc_id);
            let generation = (generated > 0).then(|| GenerationLength {
                mean_tokens: (counted > 0).then(|| tokens as f64 / counted as f64),
                capped: capped as f64 / generated as f64,
                empty: empty as f64 / generated as f64,
            });
            let scores = task.aggregate(&samples);
            let (metric, filter) = task.headline();
            out.tasks.push(TaskResults {
                name: task.name().into(),
                alias: task.alias().into(),
                version: task.version(),
                shots: task.num_fewshot(&self.setup.options),
                documents: task.documents(),
                data: task.data_files().to_vec(),
                headline: (metric.into(), filter.into()),
                samples,
                scores,
                generation,
                hold_themselves: seeds.first().map_or(0, |s| s.iter().filter(|i| i.holds_itself).count()),
            });
        }
        let scores: Vec<MetricScores> = out.tasks.iter().flat_map(|t| t.scores.clone()).collect();
        out.groups =
            self.selection.groups.iter().map(|g| (g.clone(), g.aggregate(&scores, BOOTSTRAP_RESAMPLES))).collect();
        Ok(out)
    }

    /// The tasks.
    #[must_use]
    pub fn tasks(&self) -> &[Task] {
        &self.selection.tasks
    }
}

/// What the shards in `folders` say of the model that answered, which is the same in all.
///
/// # Errors
/// When a shard cannot be read, or two were answered by different models, files, devices or kernels: by what differs.
pub fn answered_by(folders: &[PathBuf]) -> Result<Value, JournalError> {
    let mut first: Option<(PathBuf, Value)> = None;
    for folder in folders {
        let path = folder.join(RESPONSES);
        let model = journal::about(&path)?["model"].take();
        match &first {
            Some((other, expected)) => journal::alike((&path, &model), (other, expected))?,
            None => first = Some((path, model)),
        }
    }
    Ok(first.map_or(Value::Null, |(_, model)| model))
}

/// Reads the answers of several shards of one plan, asked of `model`.
///
/// # Errors
/// When a folder holds another run, a shard is not complete, or shards are missing.
pub fn merge(plan: &Plan, model: &Value, folders: &[PathBuf]) -> Result<BTreeMap<Key, Response>, JournalError> {
    let of = folders.len();
    let mut answers = BTreeMap::new();
    let mut seen: BTreeMap<usize, &PathBuf> = BTreeMap::new();
    for folder in folders {
        let path = folder.join(RESPONSES);
        let (header, own) = journal::load(&path)?;
        let shard = (0..of).map(|index| Shard { index, of }).find(|s| header["shard"] == s.to_string());
        let Some(shard) = shard else {
            return Err(JournalError::OtherRun {
                path,
                key: "shard".into(),
                expected: format!("one of 0/{of} to {}/{of}, as {of} folders are merged", of - 1),
                found: header["shard"].to_string(),
            });
        };
        journal::same(&path, &header, &plan.about(model, shard))?;
        if let Some(other) = seen.insert(shard.index, folder) {
            return Err(JournalError::OtherRun {
                path,
                key: "shard".into(),
                expected: "a shard of its own".into(),
                found: format!("{}/{of}, as in {}", shard.index, other.display()),
            });
        }
        if let Some((missing, first)) = plan.missing(&own, shard) {
            let first = format!("document {} of {}", first.doc_id, first.task);
            return Err(JournalError::Incomplete { path, shard: shard.index, shards: of, missing, first });
        }
        answers.extend(own);
    }
    Ok(answers)
}

/// One task's results.
#[derive(Clone, Debug)]
pub struct TaskResults {
    pub name: String,
    pub alias: String,
    pub version: String,
    pub shots: usize,
    /// That the task has, of which the limit may have left some out.
    pub documents: usize,
    /// What the documents and examples were read from.
    pub data: Vec<tasks::DataFile>,
    /// Metric and filter that stand for the task.
    pub headline: (String, String),
    pub samples: Vec<Sample>,
    pub scores: Vec<MetricScores>,
    pub generation: Option<GenerationLength>,
    /// Documents whose prompt has them among its own examples.
    pub hold_themselves: usize,
}

/// All results of a run.
#[derive(Clone, Debug)]
pub struct Results {
    pub tasks: Vec<TaskResults>,
    pub groups: Vec<(tasks::Group, Vec<tasks::GroupScore>)>,
    setup: Setup,
    /// By task: how answers were generated, and which settings had no effect.
    generation: Map<String, Value>,
    notes: Vec<String>,
}

impl Results {
    /// What a comparison needs.
    #[must_use]
    pub fn scores(&self, model: ModelFacts) -> ModelScores {
        ModelScores {
            model,
            metrics: self.tasks.iter().flat_map(|t| t.scores.clone()).collect(),
            generation: self.tasks.iter().filter_map(|t| Some((t.name.clone(), t.generation?))).collect(),
        }
    }

    /// What a reader of the scores has to know of the answers: one sentence for each task that has such.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let empty = self.tasks.iter().filter_map(|t| Some((t, t.generation.filter(|g| g.empty > 0.0)?)));
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        empty
            .map(|(task, g)| {
                let capped = match g.capped {
                    0.0 => String::new(),
                    share => format!("; the limit on tokens ended {}", percent(share)),
                };
                format!("warning: {}: {} of the answers are empty{capped}", task.name, percent(g.empty))
            })
            .collect()
    }

    /// Rows of the table that lm-evaluation-harness prints: groups first, each task once; then, where there are such, the
    /// shares of a task's answers that are empty and that the limit on tokens ended.
    #[must_use]
    pub fn rows(&self) -> Vec<ScoreRow> {
        let mut rows = Vec::new();
        for (group, scores) in &self.groups {
            rows.extend(scores.iter().map(|s| ScoreRow {
                task: group.alias.clone(),
                version: group.version.clone(),
                filter: s.filter.clone(),
                n_shot: None,
                metric: s.metric.clone(),
                value: s.score,
                stderr: s.standard_error,
                higher_is_better: true,
            }));
        }
        for task in &self.tasks {
            let row = |metric: &str, filter: &str, value: f64, stderr: Option<f64>, higher_is_better: bool| ScoreRow {
                task: task.alias.clone(),
                version: task.version.clone(),
                filter: filter.into(),
                n_shot: Some(task.shots),
                metric: metric.into(),
                value,
                stderr,
                higher_is_better,
            };
            rows.extend(task.scores.iter().map(|s| {
                let stderr = tasks::standard_error(s, BOOTSTRAP_RESAMPLES);
                row(&s.metric, &s.filter, s.score(), stderr, s.higher_is_better)
            }));
            let shares = task.generation.map(|g| [("empty_answers", g.empty), ("capped_answers", g.capped)]);
            let shares = shares.into_iter().flatten().filter(|(_, share)| *share > 0.0);
            rows.extend(shares.map(|(metric, share)| row(metric, "none", share, None, false)));
        }
        rows
    }

    /// `results.json` in lm-evaluation-harness's schema; `model` and `config` say what was evaluated and how.
    #[must_use]
    pub fn json(&self, model: &ModelFacts, config: &Value) -> Value {
        let number = |x: f64| if x.is_finite() { json!(x) } else { json!(x.to_string()) };
        let error = |e: Option<f64>| e.map_or_else(|| json!("N/A"), number);
        let (mut results, mut versions, mut shots) = (Map::new(), Map::new(), Map::new());
        let (mut higher, mut samples, mut group_results, mut subtasks) =
            (Map::new(), Map::new(), Map::new(), Map::new());
        for task in &self.tasks {
            let mut entry = Map::from_iter([("alias".to_owned(), json!(task.alias))]);
            let mut direction = Map::new();
            for s in &task.scores {
                entry.insert(format!("{},{}", s.metric, s.filter), number(s.score()));
                let stderr = error(tasks::standard_error(s, BOOTSTRAP_RESAMPLES));
                entry.insert(format!("{}_stderr,{}", s.metric, s.filter), stderr);
                direction.insert(s.metric.clone(), json!(s.higher_is_better));
            }
            if let Some(g) = task.generation {
                entry.insert("generated_tokens_mean".into(), json!(g.mean_tokens));
                entry.insert("generated_capped_share".into(), json!(g.capped));
                entry.insert("generated_empty_share".into(), json!(g.empty));
            }
            if task.hold_themselves > 0 {
                entry.insert("fewshot_own_document".into(), json!(task.hold_themselves));
            }
            let effective: std::collections::BTreeSet<usize> = task.samples.iter().map(|s| s.doc_id).collect();
            samples.insert(task.name.clone(), json!({"original": task.documents, "effective": effective.len()}));
            results.insert(task.name.clone(), Value::Object(entry));
            versions.insert(task.name.clone(), version(&task.version));
            shots.insert(task.name.clone(), json!(task.shots));
            higher.insert(task.name.clone(), Value::Object(direction));
            subtasks.insert(task.name.clone(), json!([]));
        }
        for (group, scores) in &self.groups {
            let mut entry = Map::from_iter([("alias".to_owned(), json!(group.alias))]);
            for s in scores {
                entry.insert(format!("{},{}", s.metric, s.filter), number(s.score));
                entry.insert(format!("{}_stderr,{}", s.metric, s.filter), error(s.standard_error));
            }
            group_results.insert(group.name.clone(), Value::Object(entry.clone()));
            results.insert(group.name.clone(), Value::Object(entry));
            subtasks.insert(group.name.clone(), json!(group.children));
            versions.insert(group.name.clone(), version(&group.version));
        }
        let mut out = json!({
            "results": results, "group_subtasks": subtasks, "versions": versions, "n-shot": shots,
            "higher_is_better": higher, "n-samples": samples, "config": config,
            "model_name": model.name, "model_facts": {"format": model.format, "stored_bytes": model.stored_bytes,
                "bits_per_weight": model.bits_per_weight},
            "fewshot_as_multiturn": self.setup.fewshot_as_multiturn,
            "system_instruction": self.setup.options.system,
        });
        out["data"] = self.tasks.iter().map(|t| (t.name.clone(), json!(t.data))).collect::<Map<_, _>>().into();
        if !self.generation.is_empty() {
            out["generation"] = self.generation.clone().into();
        }
        if !self.notes.is_empty() {
            out["notes"] = json!(self.notes);
        }
        if !group_results.is_empty() {
            out["groups"] = Value::Object(group_results);
        }
        out
    }

    /// Writes `results.json` and the samples of every task into `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path, model: &ModelFacts, config: &Value) -> Result<(), JournalError> {
        for task in &self.tasks {
            let mut text = String::new();
            for sample in &task.samples {
                text += &Value::Object(sample.record.clone()).to_string();
                text.push('\n');
            }
            write_atomically(&folder.join(format!("samples_{}.jsonl", file_name(&task.name))), text.as_bytes())?;
        }
        let text = format!("{:#}\n", self.json(model, config));
        Ok(write_atomically(&folder.join("results.json"), text.as_bytes())?)
    }
}

/// A version as lm-evaluation-harness writes it: a number where it is one.
fn version(text: &str) -> Value {
    serde_json::from_str(text).ok().filter(Value::is_number).unwrap_or_else(|| json!(text))
}
