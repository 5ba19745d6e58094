//! A task as its YAML file defines it, checked.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Error,
    data::{Doc, TextUnit},
    filter::{Filter, Pipeline},
    kinds::{OutputType, Scoring},
    metric::{self, Metric},
    template::Template,
    typed::Callable,
    yaml::{Kind, Node},
};
use recoup_ground::records::Format;

/// What turns a document into a text, a target or choices.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Value")]
pub enum Expression {
    Template(Template),
    /// The value itself.
    Value(Value),
}

impl TryFrom<Value> for Expression {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        Ok(match value {
            Value::String(text) => Self::Template(text.try_into()?),
            // The choices of a mapping are its values.
            Value::Object(map) => Self::Value(map.into_iter().map(|(_, v)| v).collect()),
            value => Self::Value(value),
        })
    }
}

/// How a question and its answer are written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Form {
    #[serde(rename = "doc_to_text")]
    pub text: Expression,
    #[serde(rename = "doc_to_target")]
    pub target: Expression,
    #[serde(rename = "doc_to_choice")]
    pub choices: Option<Expression>,
    #[serde(rename = "gen_prefix")]
    pub prefix: Option<Template>,
    #[serde(default = "space")]
    pub target_delimiter: String,
    /// Between examples, and between system instruction and description.
    #[serde(rename = "fewshot_delimiter", default = "empty_line")]
    pub delimiter: String,
}

/// The keys of [`Form`].
const FORM: [&str; 6] =
    ["doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix", "target_delimiter", "fewshot_delimiter"];

fn space() -> String {
    " ".into()
}

fn empty_line() -> String {
    "\n\n".into()
}

/// Where the data is.
#[derive(Clone, Debug, PartialEq)]
pub enum DataSet {
    /// `dataset_path` names a format, `data_files` the files of each split.
    Files { format: Format, unit: TextUnit, splits: Vec<(String, Vec<String>)> },
    /// `dataset_path` names a folder or an id of the hub, with `dataset_name` in it.
    Folder {
        path: String,
        name: Option<String>,
        /// Of `dataset_kwargs`, what would choose documents of the hub's data set.
        unused: Vec<String>,
    },
}

/// How examples are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// At random.
    #[default]
    Default,
    FirstN,
}

/// Few-shot examples; `fewshot_config`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FewShot {
    pub sampler: Sampler,
    pub split: Option<String>,
    pub samples: Option<Vec<Doc>>,
}

/// A task's definition.
#[derive(Clone, Debug)]
pub struct Config {
    pub keys: Keys,
    pub form: Form,
    pub few_shot: FewShot,
    /// Of the examples: what `fewshot_config` does not say is the task's own.
    pub few_shot_form: Form,
    /// The file that defines it, for errors.
    pub file: String,
    /// Its folder, and the folder of tasks that this is in.
    pub folder: PathBuf,
    pub root: PathBuf,
    pub data: DataSet,
    /// The split that is evaluated, and the key that names it.
    pub evaluated: (&'static str, String),
    /// The split that examples are drawn from; `None`: from the samples of `few_shot`.
    pub pool: Option<(&'static str, String)>,
    /// As it stands in the file, with `until` filled in.
    pub generation: Map<String, Value>,
    pub metrics: Vec<Metric>,
    pub scoring: Scoring,
    pub filters: Vec<Pipeline>,
}

/// The keys of a task that mean what they say whatever the others are.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    #[serde(rename = "task")]
    pub name: String,
    #[serde(rename = "task_alias")]
    pub alias: Option<String>,
    dataset_path: String,
    dataset_name: Option<String>,
    training_split: Option<String>,
    validation_split: Option<String>,
    pub test_split: Option<String>,
    fewshot_split: Option<String>,
    #[serde(rename = "output_type", default)]
    pub output: OutputType,
    pub description: Option<Template>,
    pub num_fewshot: Option<usize>,
    /// How often each request is made; 0 counts as 1.
    #[serde(default)]
    pub repeats: usize,
    process_results: Option<Callable>,
    #[serde(default)]
    unsafe_code: bool,
    #[serde(default)]
    pub metadata: Map<String, Value>,
}

/// The keys of a task beside [`Keys`] and [`FORM`]; from `tag` on they change nothing here.
const OTHERS: [&str; 9] = [
    "dataset_kwargs",
    "fewshot_config",
    "generation_kwargs",
    "metric_list",
    "filter_list",
    "tag",
    "group",
    "should_decontaminate",
    "doc_to_decontamination_query",
];

impl Config {
    /// Checks a task file. `root`: the folder of tasks that it was found in.
    pub fn new(task: &Node, folder: &Path, root: &Path) -> Result<Self, Error> {
        let mut keys: Keys = task.read_beside(&[&FORM[..], &OTHERS].concat())?;
        keys.repeats = keys.repeats.max(1);
        let at = |key: &str| task.get(key).unwrap_or(task);
        if keys.unsafe_code {
            return Err(at("unsafe_code").wrong("tasks that run generated code are not supported"));
        }
        let output = keys.output;
        let form: Form = task.only(&FORM).read()?;
        if output == OutputType::MultipleChoice && form.choices.is_none() {
            return Err(task.missing("doc_to_choice"));
        }
        let named = |key, split: &Option<String>| split.clone().map(|split| (key, split));
        let test = named("test_split", &keys.test_split);
        let validation = named("validation_split", &keys.validation_split);
        let evaluated = test.clone().or(validation.clone()).ok_or_else(|| task.missing("test_split"))?;
        let (mut few_shot, mut few_shot_form) = (FewShot::default(), form.clone());
        if let Some(own) = task.get("fewshot_config") {
            few_shot = own.read_beside(&FORM)?;
            let form = own.only(&FORM).entries().iter().filter(|n| !n.is_null()).cloned().collect();
            few_shot_form = task.only(&FORM).with(form).read()?;
        }
        few_shot.split = few_shot.split.or(keys.fewshot_split.clone());
        // lm-evaluation-harness's rule: training, else validation, else test documents.
        let pool = match named("fewshot_split", &few_shot.split) {
            None if few_shot.samples.is_some() => None,
            own => own.or(named("training_split", &keys.training_split)).or(validation).or(test),
        };
        let scoring = match (keys.process_results.as_ref().map(|c| c.0.as_str()), output) {
            (None, _) => Scoring::Standard,
            (Some("!function ifeval.process_results"), OutputType::Generate) => Scoring::IfEval,
            (Some("!function wikitext.process_results"), OutputType::Rolling) => Scoring::Page,
            _ => return Err(at("process_results").wrong("must be `!function …`")),
        };
        Ok(Self {
            file: task.file.to_string(),
            folder: folder.into(),
            root: root.into(),
            data: data_set(task, &keys)?,
            evaluated,
            pool,
            generation: generation(task, output, &form.delimiter)?,
            metrics: metric::parse(task, output, scoring)?,
            scoring,
            filters: pipelines(task)?,
            keys,
            form,
            few_shot,
            few_shot_form,
        })
    }
}

fn data_set(task: &Node, keys: &Keys) -> Result<DataSet, Error> {
    let kwargs = task.get("dataset_kwargs");
    let format = match keys.dataset_path.as_str() {
        "json" => Format::Json,
        "csv" => Format::Separated(b','),
        "text" => Format::Text,
        "parquet" => Format::Parquet,
        _ => {
            // Of a copy that lies here, these change no document.
            const IDLE: &str = "trust_remote_code streaming token use_auth_token cache_dir download_mode \
                keep_in_memory num_proc verification_mode save_infos";
            let idle = |key: &str| IDLE.split(' ').any(|idle| idle == key);
            let own: Map<String, Value> = kwargs.map(Node::read).transpose()?.unwrap_or_default();
            let own = own.into_iter().filter(|(key, value)| !value.is_null() && !idle(key));
            let unused = own.map(|(key, value)| format!("{key} {value}")).collect();
            return Ok(DataSet::Folder { path: keys.dataset_path.clone(), name: keys.dataset_name.clone(), unused });
        }
    };
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Unit {
        #[serde(default)]
        sample_by: TextUnit,
    }
    let kwargs = kwargs.ok_or_else(|| task.missing("data_files"))?;
    let Unit { sample_by: unit } = kwargs.read_beside(&["data_files"])?;
    let files = kwargs.get("data_files").ok_or_else(|| kwargs.missing("data_files"))?;
    let split = |n: &Node| Ok((n.key.to_string(), n.read::<Option<_>>()?.unwrap_or_default()));
    let splits = match &files.kind {
        Kind::Map(splits) => splits.iter().map(split).collect::<Result<_, Error>>()?,
        // The `datasets` library calls the split of files without one `train`.
        _ => vec![("train".into(), files.read()?)],
    };
    Ok(DataSet::Files { format, unit, splits })
}

/// lm-evaluation-harness's defaults: until the delimiter between examples, greedy, 256 tokens.
fn generation(task: &Node, output: OutputType, delimiter: &str) -> Result<Map<String, Value>, Error> {
    let own = task.get("generation_kwargs");
    let given: Option<Map<String, Value>> = own.map(Node::read).transpose()?;
    if output != OutputType::Generate {
        // Not used, and so not looked at.
        return Ok(given.unwrap_or_default());
    }
    let mut map = match (given, own) {
        (Some(given), Some(own)) => super::generation::checked(&given)
            .map_err(|wrong| own.get(&wrong.key).unwrap_or(own).wrong(wrong.problem))?,
        _ => Map::from_iter([
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

fn pipelines(task: &Node) -> Result<Vec<Pipeline>, Error> {
    let Some(items) = task.items("filter_list") else {
        return Ok(vec![Pipeline { name: "none".into(), filters: vec![Filter::TakeFirst {}] }]);
    };
    let mut pipelines: Vec<Pipeline> = Vec::new();
    for item in items {
        let own: Pipeline = item.read()?;
        let name = &own.name;
        if pipelines.iter().any(|p| p.name == *name) {
            return Err(item.wrong(format!("two filters are called {name:?}")));
        }
        let first = own.filters.iter().position(|f| matches!(f, Filter::TakeFirst {}));
        if first.is_none_or(|at| at + 1 != own.filters.len()) {
            return Err(item.wrong(format!("the last function of filter {name:?}, and no other, must be take_first")));
        }
        pipelines.push(own);
    }
    Ok(pipelines)
}
