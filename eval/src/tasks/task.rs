//! A task with its documents: what it asks of a model, document by document.

use std::{path::Path, sync::Arc};

use recoup_ground::shorten::shorten;
use recoup_jinja::data as python;
use serde_json::{Map, Value};

use crate::{GenerationDefaults, GenerationOptions, Message, Request};

use super::{
    Error,
    config::{Config, DataSet, Expression, Sampler},
    data::Doc,
    generation::{self, Generation},
    kinds::OutputType,
    random::Random,
    source::{DataFile, Split, read_split},
    template::Template,
    turn::{Turn, join, messages, single_turn, turn},
};

/// Characters of a value that go into an error.
const SHOWN: usize = 120;

/// A loaded task.
#[derive(Debug)]
pub struct Task {
    pub(super) config: Config,
    pub(super) docs: Vec<Doc>,
    /// What few-shot examples are drawn from.
    pub(super) examples: Vec<Doc>,
    /// Why there are no examples to draw from, which matters only where some are asked for.
    no_examples: Option<String>,
    files: Vec<DataFile>,
    /// What whoever asked for the task should know of its data.
    pub(super) notes: Vec<String>,
    /// The choices are contexts (Winogrande); `doc_to_text` says which is right.
    pub(super) multiple_input: bool,
    /// Several targets are right.
    pub(super) multiple_target: bool,
}

/// How to ask.
#[derive(Clone, Debug)]
pub struct Options {
    /// Instead of the task's own number; not where the task sets 0, as in lm-evaluation-harness.
    pub num_fewshot: Option<usize>,
    /// Of the draw of few-shot examples; lm-evaluation-harness's default is 1234.
    pub seed: u32,
    /// Which documents; `None`: all.
    pub limit: Option<Limit>,
    /// Before the task's description.
    pub system: Option<String>,
    /// Over the task's `generation_kwargs`.
    pub generation: Map<String, Value>,
    /// What ends a model's thinking, which is no part of its answer.
    pub think_end: Option<String>,
    /// What the model's maker set for generation, for what neither says.
    pub of_model: GenerationDefaults,
}

impl Default for Options {
    fn default() -> Self {
        /// `lm_eval.defaults.DEFAULT_OTHER_SEED`.
        const FEW_SHOT_SEED: u32 = 1234;
        Self {
            num_fewshot: None,
            seed: FEW_SHOT_SEED,
            limit: None,
            system: None,
            generation: Map::new(),
            think_end: None,
            of_model: GenerationDefaults::default(),
        }
    }
}

/// `--limit`: the first documents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    First(usize),
    /// This share of them, rounded up.
    Share(f64),
}

impl Limit {
    /// How many of `documents` that are.
    #[must_use]
    pub fn of(self, documents: usize) -> usize {
        match self {
            Self::First(n) => n.min(documents),
            Self::Share(share) => ((documents as f64 * share).ceil() as usize).min(documents),
        }
    }
}

/// A chat template: messages to a prompt; with `true` the last message is left open, to be continued.
pub type Render<'a> = &'a dyn Fn(&[Message], bool) -> Result<String, String>;

/// Asking through a chat template.
pub struct Chat<'a> {
    /// See [`Prompts::chat_prompt`](crate::Prompts::chat_prompt).
    pub render: Render<'a>,
    /// Few-shot examples as turns of their own; otherwise all in one user's message.
    pub fewshot_as_multiturn: bool,
}

/// What is asked about one document.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    pub doc_id: usize,
    /// Each request as often as the task repeats it, next to each other.
    pub requests: Vec<Request>,
    /// Whether the document's own question stands, with its answer, among its few-shot examples. The prompt is
    /// lm-evaluation-harness's all the same.
    pub holds_itself: bool,
    /// The `generation_kwargs` that apply, as a log of samples shows them.
    pub(super) generation: Arc<Map<String, Value>>,
}

impl Task {
    /// Loads a task's documents. Data files are looked for in `data_dir` by their path or bare name, then beside the task's
    /// file, then in the folders above it.
    ///
    /// # Errors
    /// When a data file is missing or wrong, or its first document does not suit the task.
    pub fn load(config: Config, data_dir: Option<&Path>) -> Result<Self, Error> {
        let (key, split) = &config.evaluated;
        let Split { docs, mut files, mut notes } = read_split(&config, key, split, data_dir)?;
        if let DataSet::Folder { path, unused, .. } = &config.data
            && !unused.is_empty()
        {
            notes.push(format!(
                "{}: of `dataset_kwargs` not used, as the copy of {path} is read as it lies there: {}",
                config.keys.name,
                unused.join(", ")
            ));
        }
        let mut no_examples = None;
        let examples = match &config.pool {
            None => config.few_shot.samples.clone().unwrap_or_default(),
            Some((_, name)) if name == split => docs.clone(),
            Some((key, name)) => match read_split(&config, key, name, data_dir) {
                Ok(pool) => {
                    files.extend(pool.files);
                    notes.extend(pool.notes);
                    pool.docs
                }
                // A pool that is not there matters only where examples are asked for.
                Err(e)
                    if matches!(e, Error::NoData { .. })
                        || *key == "training_split" && matches!(e, Error::NoSplit { .. }) =>
                {
                    no_examples = Some(e.to_string());
                    Vec::new()
                }
                Err(e) => return Err(e),
            },
        };
        let (multiple_input, multiple_target) = (false, false);
        let mut task = Self { config, docs, examples, no_examples, files, notes, multiple_input, multiple_target };
        // As lm-evaluation-harness: the first document shows what kind of task it is.
        let first = &task.docs[0];
        let has_choices = !task.own_choices(first, "0")?.is_empty();
        let text = task.text(&task.config.form.text, first, "0")?;
        let target = task.target(&task.config.form.target, first, "0")?;
        task.multiple_input = has_choices && text.is_number();
        task.multiple_target = target.is_array();
        Ok(task)
    }

    /// The task's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.keys.name
    }

    /// What tables show instead of the name, if the task says so.
    #[must_use]
    pub fn alias(&self) -> &str {
        self.config.keys.alias.as_deref().unwrap_or(&self.config.keys.name)
    }

    /// `metadata.version`.
    #[must_use]
    pub fn version(&self) -> String {
        self.config.keys.metadata.get("version").map_or("Yaml".into(), python::str)
    }

    /// What it asks of a model.
    #[must_use]
    pub fn output_type(&self) -> OutputType {
        self.config.keys.output
    }

    /// How many documents there are.
    #[must_use]
    pub fn documents(&self) -> usize {
        self.docs.len()
    }

    /// The files that documents and examples were read from.
    #[must_use]
    pub fn data_files(&self) -> &[DataFile] {
        &self.files
    }

    /// How many few-shot examples these options lead to.
    #[must_use]
    pub fn num_fewshot(&self, options: &Options) -> usize {
        match (options.num_fewshot, self.config.keys.num_fewshot) {
            (Some(_), Some(0)) => 0,
            (Some(wanted), _) => wanted,
            (None, own) => own.unwrap_or(0),
        }
    }

    /// Bytes of a document as JSON.
    pub(crate) fn document_bytes(&self, doc_id: usize) -> u64 {
        serde_json::to_vec(&self.docs[doc_id]).map_or(0, |doc| doc.len() as u64)
    }

    /// Whether it has settings of generation and generates nothing.
    pub(crate) fn has_idle_generation_kwargs(&self) -> bool {
        self.config.keys.output != OutputType::Generate && !self.config.generation.is_empty()
    }

    /// The `generation_kwargs` that apply.
    fn generation_kwargs(&self, options: &Options) -> Result<Map<String, Value>, Error> {
        let mut map = self.config.generation.clone();
        if self.config.keys.output == OutputType::Generate {
            map.extend(generation::checked(&options.generation)?);
        }
        Ok(map)
    }

    /// How answers are generated, where the task has any.
    ///
    /// # Errors
    /// When a setting of the options cannot be used.
    pub fn generation(&self, options: &Options) -> Result<Option<Generation>, Error> {
        if self.config.keys.output != OutputType::Generate {
            return Ok(None);
        }
        Ok(Some(generation::generation(&self.generation_kwargs(options)?, &options.of_model)))
    }

    /// What to ask, in the order of the documents.
    ///
    /// # Errors
    /// When a document does not suit the task's templates, there are too few examples, or the chat template refuses.
    pub fn instances(&self, options: &Options, chat: Option<&Chat>) -> Result<Vec<Instance>, Error> {
        let count = options.limit.map_or(self.docs.len(), |l| l.of(self.docs.len()));
        let generation = Arc::new(self.generation_kwargs(options)?);
        let meaning = generation::generation(&generation, &options.of_model).options;
        let generation = (&meaning, &generation);
        // One generator for all documents: each continues where the one before stopped.
        let mut random = Random::new(options.seed);
        self.docs[..count]
            .iter()
            .enumerate()
            .map(|(doc_id, doc)| self.instance(doc_id, doc, options, chat, &mut random, generation))
            .collect()
    }

    fn instance(
        &self,
        doc_id: usize,
        doc: &Doc,
        options: &Options,
        chat: Option<&Chat>,
        random: &mut Random,
        (meaning, generation): (&GenerationOptions, &Arc<Map<String, Value>>),
    ) -> Result<Instance, Error> {
        let id = doc_id.to_string();
        let (contexts, holds_itself) = self.contexts(doc_id, doc, options, chat, random)?;
        let form = &self.config.form;
        let continuation = |text: &str| match chat {
            // A template ends where the answer begins.
            Some(_) => match form.prefix.as_ref().map(|p| p.source.as_str()) {
                Some(p) if !p.is_empty() && !p.ends_with(char::is_whitespace) => form.target_delimiter.clone() + text,
                _ => text.to_owned(),
            },
            None => form.target_delimiter.clone() + text,
        };
        let target = || self.target(&form.target, doc, &id);
        let continuations = match self.config.keys.output {
            OutputType::LogLikelihood => vec![self.as_text(target()?, "doc_to_target", &id)?],
            OutputType::MultipleChoice => {
                let choices = self.own_choices(doc, &id)?;
                // A wrong answer index is found before a model has worked for it.
                self.gold(doc, &target()?, &choices, &id)?;
                match self.multiple_input {
                    true => vec![continuation(&python::str(&target()?))],
                    false => choices.iter().map(|choice| continuation(choice)).collect(),
                }
            }
            OutputType::Rolling | OutputType::Generate => Vec::new(),
        };
        let requests: Vec<Request> = match self.config.keys.output {
            OutputType::Rolling => vec![Request::Rolling { text: self.as_text(target()?, "doc_to_target", &id)? }],
            OutputType::Generate => {
                let options = GenerationOptions { think_end: options.think_end.clone(), ..meaning.clone() };
                contexts.into_iter().map(|context| Request::Generate { context, options: options.clone() }).collect()
            }
            // There are several contexts, or several continuations.
            OutputType::LogLikelihood | OutputType::MultipleChoice => (contexts.iter())
                .flat_map(|context| continuations.iter().map(move |continuation| (context, continuation)))
                .map(|(context, continuation)| Request::LogLikelihood {
                    context: context.clone(),
                    continuation: continuation.clone(),
                })
                .collect(),
        };
        let repeats = self.config.keys.repeats as u64;
        let repeated = |request: Request| {
            (0..repeats).map(move |repeat| match request.clone() {
                Request::Generate { context, options } => {
                    let seed = options.seed.wrapping_add(repeat);
                    Request::Generate { context, options: GenerationOptions { seed, ..options } }
                }
                other => other,
            })
        };
        let requests = requests.into_iter().flat_map(repeated).collect();
        Ok(Instance { doc_id, requests, holds_itself, generation: generation.clone() })
    }

    /// The prompts: one, or one for each choice where the choices are contexts; and whether they hold the document itself
    /// as an example.
    fn contexts(
        &self,
        doc_id: usize,
        doc: &Doc,
        options: &Options,
        chat: Option<&Chat>,
        random: &mut Random,
    ) -> Result<(Vec<String>, bool), Error> {
        let (config, id) = (&self.config, doc_id.to_string());
        let (mut holds_itself, mut example_questions) = (false, Vec::new());
        let mut turns = Vec::new();
        let description = self.field(config.keys.description.as_ref(), doc, "description", &id)?;
        let system = options.system.as_deref().unwrap_or_default();
        let system = join(system, &description, &config.form.delimiter);
        if !system.is_empty() {
            turns.push(Turn { role: "system", content: system, delimiter: String::new() });
        }
        for index in self.draw(self.num_fewshot(options), doc, random)? {
            let (example, own, id) =
                (&self.examples[index], &config.few_shot_form, format!("few-shot example {index}"));
            let choices = own.choices.as_ref().map(|c| self.choices(c, example, &id)).transpose()?;
            let mut question = self.text(&own.text, example, &id)?;
            let answer = self.target(&own.target, example, &id)?;
            let prefix = self.field(own.prefix.as_ref(), example, "gen_prefix", &id)?;
            let answer = match (answer, &choices) {
                (answer @ Value::Number(_), Some(choices)) if !self.multiple_input => {
                    choices[self.index(&answer, choices, "doc_to_target", &id)?].as_str().into()
                }
                (Value::Array(items), _) => items.into_iter().next().unwrap_or_default(),
                (answer, _) => answer,
            };
            if let (true, Some(choices)) = (self.multiple_input, &choices) {
                question = choices[self.index(&question, choices, "doc_to_text", &id)?].as_str().into();
            }
            let question = self.as_text(question, "doc_to_text", &id)?;
            let answer = self.as_text(answer, "doc_to_target", &id)?;
            holds_itself |= *example == *doc;
            example_questions.push(question.clone());
            turns.extend(turn(question, Some(answer), &prefix, &own.target_delimiter, &own.delimiter));
        }
        let prefix = self.field(config.form.prefix.as_ref(), doc, "gen_prefix", &id)?;
        let (questions, delimiter) = if self.multiple_input {
            (self.own_choices(doc, &id)?, "")
        } else {
            let question = self.text(&config.form.text, doc, &id)?;
            (vec![self.as_text(question, "doc_to_text", &id)?], config.form.target_delimiter.as_str())
        };
        holds_itself |= questions.iter().any(|q| !q.trim().is_empty() && example_questions.contains(q));
        let render = |question: String| {
            let mut turns = turns.clone();
            turns.extend(turn(question, None, &prefix, delimiter, ""));
            match chat {
                None => Ok(turns.into_iter().map(|t| t.content + &t.delimiter).collect()),
                Some(chat) => {
                    let messages = if chat.fewshot_as_multiturn { messages(turns) } else { single_turn(turns) };
                    let refused = |m| self.document(&id, format!("no prompt from the chat template: {m}"));
                    (chat.render)(&messages, !prefix.is_empty()).map_err(refused)
                }
            }
        };
        Ok((questions.into_iter().map(render).collect::<Result<_, _>>()?, holds_itself))
    }

    /// Which examples, as lm-evaluation-harness's samplers choose them.
    fn draw(&self, count: usize, doc: &Doc, random: &mut Random) -> Result<Vec<usize>, Error> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if let (Some(why), true) = (&self.no_examples, self.examples.is_empty()) {
            return Err(Error::NoExamples { wanted: count, why: why.clone() });
        }
        let own = &self.config.few_shot;
        // The document itself is no example; it can only be one where the splits are the same.
        let excluded = |i: &usize| own.split == self.config.keys.test_split && self.examples[*i] == *doc;
        let all = 0..self.examples.len();
        let few = |available: usize| Error::FewShot {
            task: self.config.keys.name.clone(),
            wanted: count,
            split: self.config.pool.as_ref().map_or("samples", |(_, split)| split).into(),
            available,
        };
        if own.sampler == Sampler::FirstN {
            let chosen: Vec<usize> = all.filter(|i| !excluded(i)).take(count).collect();
            return if chosen.len() < count { Err(few(chosen.len())) } else { Ok(chosen) };
        }
        let drawn = count + usize::from(own.split == self.config.keys.test_split);
        if drawn > self.examples.len() {
            return Err(few((self.examples.len() + count).saturating_sub(drawn)));
        }
        let sample = random.sample(self.examples.len(), drawn);
        let mut chosen: Vec<usize> = sample.into_iter().filter(|i| !excluded(i)).take(count).collect();
        if chosen.len() < count {
            // Copies of the document took more than one place: draw again from what is no copy.
            let pool: Vec<usize> = all.filter(|i| !excluded(i)).collect();
            if pool.len() < count {
                return Err(few(pool.len()));
            }
            chosen = random.sample(pool.len(), count).into_iter().map(|i| pool[i]).collect();
        }
        Ok(chosen)
    }

    pub(super) fn own_choices(&self, doc: &Doc, id: &str) -> Result<Vec<String>, Error> {
        self.config.form.choices.as_ref().map_or(Ok(Vec::new()), |c| self.choices(c, doc, id))
    }

    /// `doc_to_text`: a text, or the index of a choice.
    pub(super) fn text(&self, expression: &Expression, doc: &Doc, id: &str) -> Result<Value, Error> {
        match self.evaluate(expression, doc, "doc_to_text", id)? {
            Evaluated::Value(value) => Ok(value),
            Evaluated::Rendered(text) => Ok(self.index_or_text(text)),
        }
    }

    /// `doc_to_target`: a text, the index of a choice, or several of them.
    pub(super) fn target(&self, expression: &Expression, doc: &Doc, id: &str) -> Result<Value, Error> {
        match self.evaluate(expression, doc, "doc_to_target", id)? {
            Evaluated::Value(value) => Ok(value),
            Evaluated::Rendered(text) if text.len() >= 2 && text.starts_with('[') && text.ends_with(']') => {
                Ok(python::literal(&text).unwrap_or(text.into()))
            }
            Evaluated::Rendered(text) => Ok(self.index_or_text(text)),
        }
    }

    /// Where there are choices, digits are the index of one.
    fn index_or_text(&self, text: String) -> Value {
        match text.parse::<u64>() {
            Ok(index) if self.config.form.choices.is_some() && !text.starts_with('+') => index.into(),
            _ => text.into(),
        }
    }

    /// `doc_to_choice`.
    pub(super) fn choices(&self, expression: &Expression, doc: &Doc, id: &str) -> Result<Vec<String>, Error> {
        let fail = |message: String| self.document(id, message);
        let value = match self.evaluate(expression, doc, "doc_to_choice", id)? {
            Evaluated::Value(value) => value,
            Evaluated::Rendered(text) => python::literal(&text)
                .map_err(|e| fail(format!("`doc_to_choice` is no list: {e} in {:?}", shorten(&text, SHOWN))))?,
        };
        let Value::Array(items) = value else {
            return Err(fail(format!(
                "`doc_to_choice` must give a list, found {}",
                shorten(&python::repr(&value), SHOWN)
            )));
        };
        if items.is_empty() {
            return Err(fail("`doc_to_choice` gives no choices".into()));
        }
        let text = |item: Value| match item {
            Value::String(s) => Ok(s),
            other => Err(fail(format!("a choice must be a text, found {}; put it in quotes", python::repr(&other)))),
        };
        items.into_iter().map(text).collect()
    }

    /// The index that a value is, checked against the choices.
    pub(super) fn index(&self, value: &Value, choices: &[String], key: &str, id: &str) -> Result<usize, Error> {
        let found = match value {
            Value::Number(n) => n.as_u64().map(|i| i as usize).filter(|i| *i < choices.len()),
            Value::Bool(b) => Some(usize::from(*b)).filter(|i| *i < choices.len()),
            Value::String(s) => choices.iter().position(|c| c == s),
            _ => None,
        };
        found.ok_or_else(|| {
            let known = choices.len();
            self.document(id, format!("`{key}` gives {}, which is none of the {known} choices", python::repr(value)))
        })
    }

    /// A template or the name of a field; empty where there is none.
    fn field(&self, template: Option<&Template>, doc: &Doc, key: &str, id: &str) -> Result<String, Error> {
        let Some(template) = template else { return Ok(String::new()) };
        match doc.get(&template.source) {
            Some(value) if !template.source.is_empty() => Ok(python::str(value)),
            _ => self.render(template, doc, key, id),
        }
    }

    fn evaluate(&self, expression: &Expression, doc: &Doc, key: &str, id: &str) -> Result<Evaluated, Error> {
        match expression {
            Expression::Value(value) => Ok(Evaluated::Value(value.clone())),
            Expression::Template(Template { source, .. }) if self.docs[0].contains_key(source) => doc
                .get(source)
                .map(|value| Evaluated::Value(value.clone()))
                .ok_or_else(|| self.document(id, format!("`{key}: {source}`, but the document has no such field"))),
            Expression::Template(template) => Ok(Evaluated::Rendered(self.render(template, doc, key, id)?)),
        }
    }

    fn render(&self, template: &Template, doc: &Doc, key: &str, id: &str) -> Result<String, Error> {
        template.render(doc).map_err(|message| self.document(id, format!("`{key}`: {message}")))
    }

    pub(super) fn as_text(&self, value: Value, key: &str, id: &str) -> Result<String, Error> {
        match value {
            Value::String(text) => Ok(text),
            other => Err(self.document(id, format!("`{key}` must give a text, found {}", python::repr(&other)))),
        }
    }

    pub(super) fn document(&self, id: &str, message: String) -> Error {
        Error::Document { task: self.config.keys.name.clone(), document: id.into(), message }
    }
}

enum Evaluated {
    Value(Value),
    Rendered(String),
}
