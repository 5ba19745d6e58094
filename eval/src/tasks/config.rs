//! A task as its YAML file defines it, checked.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{
    Error,
    data::{Doc, Format, TextUnit},
    filter::{Filter, Pipeline},
    keys::{Entry, Keys},
    kinds::{OutputType, Scoring},
    metric::{self, Metric},
    nearest::nearest,
    template::Templates,
    yaml::Kind,
};

/// What turns a document into a text, a target or choices.
#[derive(Clone, Debug, PartialEq)]
pub enum Expression {
    /// A Jinja template, or the bare name of a field.
    Template(String),
    /// The value itself.
    Value(Value),
}

/// Where the data is.
#[derive(Clone, Debug, PartialEq)]
pub enum DataSet {
    /// `dataset_path` names a format, `data_files` the files of each split.
    Files { format: Format, splits: Vec<(String, Vec<String>)> },
    /// `dataset_path` names a folder or an id of the hub, with `dataset_name` in it.
    Folder {
        path: String,
        name: Option<String>,
        /// Of `dataset_kwargs`, what would choose documents of the hub's data set.
        unused: Vec<String>,
    },
}

/// How examples are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampler {
    /// At random.
    Default,
    FirstN,
}

/// How few-shot examples look; what is not set is the task's own.
#[derive(Clone, Debug, PartialEq)]
pub struct FewShot {
    pub sampler: Sampler,
    pub split: Option<String>,
    pub samples: Option<Vec<Doc>>,
    pub text: Expression,
    pub target: Expression,
    pub choices: Option<Expression>,
    pub prefix: Option<String>,
    pub target_delimiter: String,
    pub delimiter: String,
}

/// A task's definition.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: String,
    pub alias: Option<String>,
    /// The file that defines it, for errors.
    pub file: String,
    /// Its folder, and the folder of tasks that this is in.
    pub folder: PathBuf,
    pub root: PathBuf,
    pub version: String,
    pub data: DataSet,
    pub training: Option<String>,
    pub validation: Option<String>,
    pub test: Option<String>,
    pub output: OutputType,
    pub text: Expression,
    pub target: Expression,
    pub choices: Option<Expression>,
    pub prefix: Option<String>,
    pub description: String,
    pub target_delimiter: String,
    /// Between examples, and between system instruction and description.
    pub delimiter: String,
    pub few_shot: FewShot,
    pub num_fewshot: Option<usize>,
    /// As it stands in the file, with `until` filled in.
    pub generation: Map<String, Value>,
    pub repeats: usize,
    pub metrics: Vec<Metric>,
    pub scoring: Scoring,
    pub filters: Vec<Pipeline>,
}

const TASK_KEYS: &[&str] = &[
    "task",
    "task_alias",
    "tag",
    "group",
    "include",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "target_delimiter",
    "fewshot_delimiter",
    "fewshot_config",
    "num_fewshot",
    "metric_list",
    "output_type",
    "generation_kwargs",
    "repeats",
    "filter_list",
    "should_decontaminate",
    "doc_to_decontamination_query",
    "gen_prefix",
    "metadata",
    "process_results",
    "process_docs",
    "unsafe_code",
];

const UNSUPPORTED_KEYS: &[(&str, &str)] = &[
    ("process_docs", "it names Python code; prepare the data file beforehand"),
    ("class", "it names Python code; write the task as YAML"),
    ("custom_dataset", "it names Python code; write the data to a file"),
    ("use_prompt", "promptsource is not built in; write the prompt as `doc_to_text`"),
    ("doc_to_image", "only text is evaluated"),
    ("doc_to_audio", "only text is evaluated"),
];

const FEW_SHOT_KEYS: &[&str] = &[
    "sampler",
    "split",
    "samples",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "gen_prefix",
    "fewshot_delimiter",
    "target_delimiter",
];

const FEW_SHOT_UNSUPPORTED: &[(&str, &str)] = &[
    ("process_docs", "it names Python code; prepare the data file beforehand"),
    ("fewshot_indices", "lm-evaluation-harness ignores it too; list the examples as `samples`"),
];

/// Names of `dataset_path` that are formats.
const FORMATS: [(&str, Format); 4] = [
    ("json", Format::Json),
    ("csv", Format::Csv),
    ("text", Format::Text(TextUnit::Line)),
    ("parquet", Format::Parquet),
];

impl Config {
    /// Checks a task file's keys. `root`: the folder of tasks that it was found in.
    ///
    /// # Errors
    /// What is wrong, with file and line.
    pub fn new(keys: &Keys, folder: &Path, root: &Path) -> Result<Self, Error> {
        // A Python function is the more telling error than an unknown key.
        keys.check(TASK_KEYS, UNSUPPORTED_KEYS)?;
        if let Some(entry) = keys.get("unsafe_code").filter(|e| e.node.value() == Some(Value::Bool(true))) {
            return Err(entry.bad("tasks that run generated code are not supported"));
        }
        let templates = Templates::new();
        let expression = |keys: &Keys, key: &str| -> Result<Option<Expression>, Error> {
            let Some(entry) = keys.get(key) else { return Ok(None) };
            Ok(Some(match entry.value()? {
                Value::String(text) => {
                    templates.check(&text).map_err(|e| entry.bad(e))?;
                    Expression::Template(text)
                }
                // The choices of a mapping are its values.
                Value::Object(map) => Expression::Value(map.into_iter().map(|(_, v)| v).collect()),
                value => Expression::Value(value),
            }))
        };
        let missing = |key: &str| Error::MissingKey {
            file: keys.file.clone(),
            key: key.into(),
            reason: "every task needs one (a Jinja template or the name of a field)".into(),
        };
        let output = output_type(keys)?;
        let text = expression(keys, "doc_to_text")?.ok_or_else(|| missing("doc_to_text"))?;
        let target = expression(keys, "doc_to_target")?.ok_or_else(|| missing("doc_to_target"))?;
        let choices = expression(keys, "doc_to_choice")?;
        if output == OutputType::MultipleChoice && choices.is_none() {
            return Err(missing("doc_to_choice"));
        }
        let prefix = keys.text("gen_prefix")?;
        let target_delimiter = keys.text("target_delimiter")?.unwrap_or_else(|| " ".into());
        let delimiter = keys.text("fewshot_delimiter")?.unwrap_or_else(|| "\n\n".into());
        let mut few_shot = FewShot {
            sampler: Sampler::Default,
            split: keys.text("fewshot_split")?,
            samples: None,
            text: text.clone(),
            target: target.clone(),
            choices: choices.clone(),
            prefix: prefix.clone(),
            target_delimiter: target_delimiter.clone(),
            delimiter: delimiter.clone(),
        };
        if let Some(entry) = keys.get("fewshot_config") {
            let own = Keys::of(entry, "`fewshot_config`")?;
            own.check(FEW_SHOT_KEYS, FEW_SHOT_UNSUPPORTED)?;
            few_shot.sampler = sampler(&own)?;
            few_shot.split = own.text("split")?.or(few_shot.split);
            few_shot.samples = samples(&own)?;
            few_shot.text = expression(&own, "doc_to_text")?.unwrap_or(few_shot.text);
            few_shot.target = expression(&own, "doc_to_target")?.unwrap_or(few_shot.target);
            few_shot.choices = expression(&own, "doc_to_choice")?.or(few_shot.choices);
            few_shot.prefix = own.text("gen_prefix")?.or(few_shot.prefix);
            few_shot.delimiter = own.text("fewshot_delimiter")?.unwrap_or(few_shot.delimiter);
            few_shot.target_delimiter = own.text("target_delimiter")?.unwrap_or(few_shot.target_delimiter);
        }
        let scoring = scoring(keys, output)?;
        let config = Self {
            name: keys.required("task", "it is the task's name")?,
            alias: keys.text("task_alias")?,
            file: keys.file.clone(),
            folder: folder.into(),
            root: root.into(),
            version: version(keys)?,
            data: data_set(keys)?,
            training: keys.text("training_split")?,
            validation: keys.text("validation_split")?,
            test: keys.text("test_split")?,
            output,
            text,
            target,
            choices,
            prefix,
            description: keys.text("description")?.unwrap_or_default(),
            target_delimiter,
            generation: generation(keys, output, &delimiter)?,
            delimiter,
            few_shot,
            num_fewshot: keys.count("num_fewshot")?,
            repeats: keys.count("repeats")?.unwrap_or(1).max(1),
            metrics: metric::parse(keys, output, scoring)?,
            scoring,
            filters: pipelines(keys)?,
        };
        if config.test.is_none() && config.validation.is_none() {
            let reason = "name the split to evaluate on, as `test_split` or `validation_split`".into();
            return Err(Error::MissingKey { file: config.file, key: "test_split".into(), reason });
        }
        Ok(config)
    }
}

fn output_type(keys: &Keys) -> Result<OutputType, Error> {
    let Some(entry) = keys.get("output_type") else { return Ok(OutputType::Generate) };
    Ok(match entry.text()?.as_str() {
        "loglikelihood" => OutputType::LogLikelihood,
        "loglikelihood_rolling" => OutputType::Rolling,
        "multiple_choice" => OutputType::MultipleChoice,
        "generate_until" => OutputType::Generate,
        other => {
            return Err(entry.bad(format!(
                "{other:?} is not one of loglikelihood, loglikelihood_rolling, multiple_choice, generate_until"
            )));
        }
    })
}

fn scoring(keys: &Keys, output: OutputType) -> Result<Scoring, Error> {
    let Some(entry) = keys.get("process_results") else { return Ok(Scoring::Standard) };
    let Kind::Function(name) = &entry.node.kind else { return Err(entry.wrong("`!function …`")) };
    match (name.as_str(), output) {
        ("ifeval.process_results", OutputType::Generate) => Ok(Scoring::IfEval),
        ("wikitext.process_results", OutputType::Rolling) => Ok(Scoring::Page),
        _ => entry.value().map(|_| Scoring::Standard),
    }
}

fn sampler(keys: &Keys) -> Result<Sampler, Error> {
    let Some(entry) = keys.get("sampler") else { return Ok(Sampler::Default) };
    match entry.text()?.as_str() {
        "default" => Ok(Sampler::Default),
        "first_n" => Ok(Sampler::FirstN),
        other => Err(entry.bad(format!("{other:?} is not one of default, first_n"))),
    }
}

fn samples(keys: &Keys) -> Result<Option<Vec<Doc>>, Error> {
    let Some(items) = keys.list("samples")? else { return Ok(None) };
    items.iter().map(Entry::object).collect::<Result<_, _>>().map(Some)
}

fn version(keys: &Keys) -> Result<String, Error> {
    let Some(entry) = keys.get("metadata") else { return Ok("Yaml".into()) };
    Ok(entry.object()?.get("version").map_or("Yaml".into(), super::python::str))
}

fn data_set(keys: &Keys) -> Result<DataSet, Error> {
    let path = keys.required("dataset_path", "it names the data's format (json, csv, text, parquet) or its folder")?;
    let name = keys.text("dataset_name")?;
    let Some((_, format)) = FORMATS.iter().find(|(known, _)| *known == path) else {
        // Of a copy that lies here, these change no document.
        const IDLE: [&str; 10] = [
            "trust_remote_code",
            "streaming",
            "token",
            "use_auth_token",
            "cache_dir",
            "download_mode",
            "keep_in_memory",
            "num_proc",
            "verification_mode",
            "save_infos",
        ];
        let own = keys.get("dataset_kwargs").map(Entry::object).transpose()?.unwrap_or_default();
        let own = own.into_iter().filter(|(key, value)| !value.is_null() && !IDLE.contains(&key.as_str()));
        let unused = own.map(|(key, value)| format!("{key} {value}")).collect();
        return Ok(DataSet::Folder { path, name, unused });
    };
    let missing = || Error::MissingKey {
        file: keys.file.clone(),
        key: "dataset_kwargs.data_files".into(),
        reason: format!("`dataset_path: {path}` needs the files of each split, as `data_files: {{test: a.jsonl}}`"),
    };
    let own = Keys::of(keys.get("dataset_kwargs").ok_or_else(missing)?, "`dataset_kwargs`")?;
    own.check(&["data_files", "sample_by"], &[])?;
    let entry = own.get("data_files").ok_or_else(missing)?;
    let splits = match &entry.node.kind {
        Kind::Map(_) => {
            let files = Keys::of(entry, "`data_files`")?;
            let split = |e: &Entry| Ok((e.key.clone(), files.texts(&e.key)?.unwrap_or_default()));
            files.entries().iter().map(split).collect::<Result<_, Error>>()?
        }
        // The `datasets` library calls the split of files without one `train`.
        _ => vec![("train".into(), own.texts("data_files")?.unwrap_or_default())],
    };
    let mut format = *format;
    if let (Format::Text(unit), Some(entry)) = (&mut format, own.get("sample_by")) {
        *unit = match entry.text()?.as_str() {
            "line" => TextUnit::Line,
            "paragraph" => TextUnit::Paragraph,
            "document" => TextUnit::Document,
            other => return Err(entry.bad(format!("{other:?} is not one of line, paragraph, document"))),
        };
    }
    Ok(DataSet::Files { format, splits })
}

/// lm-evaluation-harness's defaults: until the delimiter between examples, greedy, 256 tokens.
fn generation(keys: &Keys, output: OutputType, delimiter: &str) -> Result<Map<String, Value>, Error> {
    let mut map = match keys.get("generation_kwargs") {
        // Not used, and so not looked at.
        Some(entry) if output != OutputType::Generate => return entry.object(),
        Some(entry) => {
            let own = Keys::of(entry, "`generation_kwargs`")?;
            let at = |key: &str| own.entries().iter().find(|e| e.key == key).unwrap_or(entry).clone();
            super::generation::checked(&entry.object()?).map_err(|wrong| at(&wrong.key).bad(wrong.problem))?
        }
        None if output != OutputType::Generate => return Ok(Map::new()),
        None => Map::from_iter([
            ("temperature".to_owned(), 0.0.into()),
            ("do_sample".to_owned(), false.into()),
            ("max_gen_toks".to_owned(), crate::GenerationOptions::default().max_tokens.into()),
        ]),
    };
    if let Some(number) = map.get("temperature").and_then(|v| v.as_f64().or_else(|| v.as_str()?.parse().ok())) {
        map.insert("temperature".into(), number.into());
    }
    if !map.contains_key("until") {
        map.insert("until".into(), vec![delimiter].into());
    }
    Ok(map)
}

fn pipelines(keys: &Keys) -> Result<Vec<Pipeline>, Error> {
    let Some(items) = keys.list("filter_list")? else {
        return Ok(vec![Pipeline { name: "none".into(), filters: vec![Filter::TakeFirst] }]);
    };
    let mut pipelines: Vec<Pipeline> = Vec::new();
    for item in items {
        let own = Keys::of(&item, "a filter of `filter_list`")?;
        own.check(&["name", "filter"], &[])?;
        let name = own.required("name", "it names the scores that a filter leads to")?;
        if pipelines.iter().any(|p| p.name == name) {
            return Err(item.bad(format!("two filters are called {name:?}")));
        }
        let steps = own.list("filter")?.unwrap_or_default();
        let filters = steps.iter().map(filter).collect::<Result<Vec<_>, _>>()?;
        let first = filters.iter().position(|f| matches!(f, Filter::TakeFirst));
        if first.is_none_or(|at| at + 1 != filters.len()) {
            return Err(item.bad(format!("the last function of filter {name:?}, and no other, must be take_first")));
        }
        pipelines.push(Pipeline { name, filters });
    }
    Ok(pipelines)
}

/// What filters there are.
const FILTERS: [&str; 7] =
    ["regex", "take_first", "take_first_k", "majority_vote", "remove_whitespace", "lowercase", "uppercase"];

fn filter(step: &Entry) -> Result<Filter, Error> {
    let own = Keys::of(step, "a function of a filter")?;
    let function = own.required("function", "it names what the filter does")?;
    if !FILTERS.contains(&function.as_str()) {
        let nearest = nearest(&function, FILTERS);
        return Err(step.bad(format!("there is no filter {function:?}; the nearest is {nearest:?}")));
    }
    let known: &[&str] = match function.as_str() {
        "regex" => &["function", "regex_pattern", "group_select", "fallback"],
        "take_first_k" => &["function", "k"],
        _ => &["function"],
    };
    own.check(known, &[])?;
    Ok(match function.as_str() {
        "regex" => {
            let entry = own.get("regex_pattern");
            // lm-evaluation-harness's default.
            let pattern = own.text("regex_pattern")?.unwrap_or_else(|| r"#### (\-?[0-9\.\,]+)".into());
            let regex = recoup_jinja::regex::PythonRegex::new(&pattern).map_err(|e| entry.unwrap_or(step).bad(e))?;
            let group_select = match own.get("group_select") {
                Some(entry) => entry.value()?.as_i64().ok_or_else(|| entry.wrong("a whole number"))?,
                None => 0,
            };
            Filter::Regex { regex, group_select, fallback: own.text("fallback")?.unwrap_or_else(|| "[invalid]".into()) }
        }
        "take_first" => Filter::TakeFirst,
        "take_first_k" => Filter::TakeFirstK(own.count("k")?.unwrap_or(1)),
        "majority_vote" => Filter::MajorityVote,
        "remove_whitespace" => Filter::RemoveWhitespace,
        "lowercase" => Filter::Lowercase,
        _ => Filter::Uppercase,
    })
}
