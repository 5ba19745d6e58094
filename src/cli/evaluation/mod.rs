//! What `eval` and `compare` share: which tasks, and how they are put.

pub(super) mod compare;
mod curves;
pub(super) mod eval;
mod labels;
mod server;
mod texts;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use recoup_eval::run::Setup;
use recoup_eval::tasks::{Library, Limit, Options, OutputType, Selection};
use serde_json::{Map, Value, json};

use super::interrupt;
use super::options::{TemplateOptions, named, with_arguments};
use crate::checkpoint::json::Object;
use crate::output::Claim;
use crate::text::reply::{Reasoning, ReplyFormat};
use crate::text::{ChatTemplate, ModelText, ThinkingSwitch};

/// Which tasks, and how they are put.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct TaskOptions {
    /// Tasks, groups, tags or patterns, by name or as YAML files, separated by commas (`recoup eval --list-tasks`)
    #[arg(long, value_delimiter = ',', value_name = "TASKS")]
    tasks: Vec<OsString>,
    /// Folder with more task files in lm-evaluation-harness's form; may be given several times
    #[arg(long, value_name = "DIR")]
    include_path: Vec<PathBuf>,
    /// Folder whose data files are taken instead of the shipped samples of the same name
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Worked examples before each question [default: the task's own]
    #[arg(short = 'f', long, value_name = "N")]
    num_fewshot: Option<usize>,
    /// Only the first N documents of each task, or a share of them below 1
    #[arg(short = 'L', long, value_name = "N|SHARE")]
    limit: Option<f64>,
    /// Put questions through the model's chat template
    #[arg(long)]
    apply_chat_template: bool,
    /// Worked examples as turns of the conversation, or all in one user's message (false) [default: as turns, which is
    /// lm-evaluation-harness's]
    #[arg(long, requires = "apply_chat_template", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    fewshot_as_multiturn: Option<bool>,
    #[command(flatten)]
    template: TemplateOptions,
    /// lm-evaluation-harness's name for the argument of that name of the chat template; true needs --think-end-token or
    /// --reasoning-parser
    #[arg(long, requires = "apply_chat_template", value_name = "BOOL")]
    enable_thinking: Option<bool>,
    /// What ends a model's thinking, such as '</think>': the answer is what follows, and only there texts end it
    #[arg(long, value_name = "TEXT")]
    think_end_token: Option<String>,
    /// The same by the name that vLLM has for a family's way to think: qwen3, nemotron_v3, openai_gptoss, …
    #[arg(long, value_name = "NAME", value_parser = named(reasoning()), conflicts_with = "think_end_token")]
    reasoning_parser: Option<Reasoning>,
    /// System message, or text before the task's description
    #[arg(long, value_name = "TEXT")]
    system_instruction: Option<String>,
    /// Over the tasks' own: temperature=0.7,top_p=0.9,max_gen_toks=512,until=["a","b"], or a JSON object
    #[arg(long, value_name = "KEY=VALUE,…")]
    gen_kwargs: Option<String>,
    /// Draw sampled answers this often, each time with another seed
    #[arg(long, default_value_t = 1, value_name = "N")]
    seeds: usize,
    /// Seed of the draw of worked examples
    #[arg(long, default_value_t = Options::default().seed)]
    fewshot_seed: u32,
}

impl TaskOptions {
    fn library(&self) -> Result<Library> {
        Ok(Library::new(&self.include_path, self.data_dir.clone())?)
    }

    /// The tasks named, or `default` where none is.
    fn select(&self, default: &[&str]) -> Result<Selection> {
        let mut library = self.library()?;
        let selection = if self.tasks.is_empty() {
            library.select(default)?
        } else {
            let asked = listed(&self.tasks).into_iter().filter(|task| *task != Path::new("none"));
            library.select(&asked.collect::<Vec<_>>())?
        };
        selection.notes.iter().for_each(|note| super::say!("note: {note}"));
        Ok(selection)
    }

    /// Arguments of the chat template.
    fn template_arguments(&self) -> Map<String, Value> {
        let mut arguments = self.template.arguments();
        arguments.extend(self.enable_thinking.map(|yes| ("enable_thinking".to_owned(), yes.into())));
        arguments
    }

    /// What texts of `folder` the tasks are put through.
    fn text(&self, folder: &Path, config: &Object) -> Result<ModelText> {
        let mut text = ModelText::from_folder(folder, config)?;
        super::say_notes(text.tokenizer().notes());
        // What no token can stand before cannot be scored.
        text.beginning()?;
        let arguments = self.template_arguments();
        if let Some(end) = self.think_end() {
            // Also of special tokens, which no answer shows otherwise.
            text = text.showing(end)?;
            if text.drops(end)? {
                bail!(
                    "--think-end-token {end}: the tokenizer of {} changes it, so that no answer shows it; its thinking \
                     cannot be told from its answer",
                    folder.display()
                );
            }
        }
        let switch = text.template().filter(|_| self.enable_thinking.is_some()).and_then(ChatTemplate::thinking_switch);
        if switch == Some(ThinkingSwitch::Message) {
            super::say!(
                "warning: the chat template of {} reads /think and /no_think in messages and not enable_thinking; \
                 --system-instruction says them",
                folder.display()
            );
        }
        if let Some(reasoning) = self.reasoning_parser {
            text = text.with_replies(ReplyFormat { reasoning: Some(reasoning), calls: None });
        }
        text.map_template(|template| with_arguments(template, arguments, folder))
    }

    /// What ends the thinking, however that is said.
    fn think_end(&self) -> Option<&str> {
        self.think_end_token.as_deref().or(self.reasoning_parser.map(|parser| parser.answer_mark()))
    }

    /// Says that answers will be scored with their thinking, where the chat template of `text` shows that there is some.
    fn note_thinking(&self, text: &ModelText, selection: &Selection) {
        let shown = text.template().and_then(|template| template.reply_format().reasoning);
        let off = self.template_arguments().get("enable_thinking") == Some(&Value::Bool(false));
        let asks = selection.tasks.iter().any(|t| t.output_type() == OutputType::Generate);
        if let Some(reasoning) =
            shown.filter(|_| self.apply_chat_template && asks && !off && self.think_end().is_none())
        {
            super::say!(
                "note: this model may think before it answers, and its thinking is scored as a part of the answer; \
                 --reasoning-parser {} leaves it out",
                reasoning.name()
            );
        }
    }

    /// Refuses to measure what a model that thinks first has no probability for, as lm-evaluation-harness does.
    fn check_thinking(&self, selection: &Selection) -> Result<()> {
        let thinks = self.template_arguments().get("enable_thinking") == Some(&Value::Bool(true));
        if !thinks {
            return Ok(());
        }
        if self.think_end().is_none() {
            bail!(
                "thinking is enabled: --think-end-token '</think>' or --reasoning-parser qwen3 says where it ends, whatever \
                 is the model's"
            );
        }
        let scored = selection.tasks.iter().find(|t| t.output_type() != OutputType::Generate);
        if let Some(task) = scored {
            bail!(
                "{}: thinking is enabled, and this task asks for probabilities of given texts, which come before any \
                 thinking; ask for answers only, or disable thinking",
                task.name()
            );
        }
        Ok(())
    }

    fn setup(&self) -> Result<Setup> {
        if !self.apply_chat_template && self.template.chat_template_kwargs.is_some() {
            bail!("--chat-template-kwargs is for the chat template: give --apply-chat-template too");
        }
        if self.think_end_token.as_deref() == Some("") {
            bail!("--think-end-token is empty");
        }
        let limit = match self.limit {
            None => None,
            Some(share) if share > 0.0 && share < 1.0 => Some(Limit::Share(share)),
            Some(n) if n >= 1.0 && n.fract() == 0.0 => Some(Limit::First(n as usize)),
            Some(n) => bail!("--limit {n}: expected a number of documents, or a share of them between 0 and 1"),
        };
        if self.seeds == 0 {
            bail!("--seeds must be at least 1");
        }
        Ok(Setup {
            options: Options {
                num_fewshot: self.num_fewshot,
                seed: self.fewshot_seed,
                limit,
                system: self.system_instruction.clone(),
                think_end: self.think_end().map(str::to_owned),
                generation: self.gen_kwargs.as_deref().map(gen_kwargs).transpose()?.unwrap_or_default(),
                ..Options::default()
            },
            chat: self.apply_chat_template,
            fewshot_as_multiturn: self.fewshot_as_multiturn.unwrap_or(self.apply_chat_template),
            seeds: self.seeds,
        })
    }

    /// Options given that say how tasks are put.
    fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--data-dir", self.data_dir.is_some()),
            ("--num-fewshot", self.num_fewshot.is_some()),
            ("--limit", self.limit.is_some()),
            ("--apply-chat-template", self.apply_chat_template),
            ("--system-instruction", self.system_instruction.is_some()),
            ("--gen-kwargs", self.gen_kwargs.is_some()),
            ("--seeds", self.seeds != 1),
            ("--fewshot-seed", self.fewshot_seed != Options::default().seed),
        ];
        all.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    }

    /// How the tasks are put, for results.json.
    fn describe(&self, setup: &Setup) -> Value {
        json!({"num_fewshot": self.num_fewshot, "limit": self.limit, "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": setup.fewshot_as_multiturn, "system_instruction": self.system_instruction,
            "chat_template_kwargs": self.template_arguments(), "think_end_token": self.think_end(),
            "gen_kwargs": setup.options.generation, "seeds": self.seeds, "fewshot_seed": self.fewshot_seed,
            "recoup_version": env!("CARGO_PKG_VERSION")})
    }
}

fn reasoning() -> Vec<(&'static str, Reasoning)> {
    Reasoning::names().filter_map(|name| Some((name, Reasoning::named(name)?))).collect()
}

/// `key=value,key=value`, where a value is JSON if it begins as a list, an object or a quoted text; or one JSON object.
fn gen_kwargs(text: &str) -> Result<Map<String, Value>> {
    let mut rest = text.trim();
    if rest.starts_with('{') {
        return serde_json::from_str(rest).with_context(|| format!("--gen-kwargs: `{rest}` is no JSON object"));
    }
    let mut out = Map::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').filter(|(key, _)| !key.contains(',')).with_context(|| {
            format!("--gen-kwargs: `{rest}` is not of the form key=value; a list is written until=[\"a\",\"b\"]")
        })?;
        let (key, after) = (key.trim(), after.trim_start());
        let (value, end) = if after.starts_with(['[', '{', '"']) {
            let mut values = serde_json::Deserializer::from_str(after).into_iter::<Value>();
            let value = values.next().context("no value")?.with_context(|| {
                format!("--gen-kwargs: `{key}` begins as JSON and is none: {after}; write a text as {key}=\"…\"")
            })?;
            (value, values.byte_offset())
        } else {
            let end = after.find(',').unwrap_or(after.len());
            (word(after[..end].trim()), end)
        };
        rest = after[end..].trim_start();
        if !rest.is_empty() {
            rest = rest
                .strip_prefix(',')
                .with_context(|| format!("--gen-kwargs: expected a comma after the value of `{key}`, found `{rest}`"))?
                .trim_start();
        }
        if out.insert(key.to_owned(), value).is_some() {
            bail!("--gen-kwargs: `{key}` is there twice");
        }
    }
    Ok(out)
}

/// A value that is not written as JSON: a number, a truth, nothing, or else a text.
fn word(text: &str) -> Value {
    match text {
        "True" => true.into(),
        "False" => false.into(),
        "None" => Value::Null,
        _ => serde_json::from_str(text).unwrap_or_else(|_| text.into()),
    }
}

/// What stands between commas, without the blanks around it; names that are no text are as they are.
fn listed(items: &[OsString]) -> Vec<&Path> {
    let items = items.iter().map(|item| item.to_str().map_or(Path::new(item), |text| Path::new(text.trim())));
    items.filter(|item| !item.as_os_str().is_empty()).collect()
}

/// The folder for answers and reports, for this run alone; nothing where none is kept.
fn claimed(output: Option<&Path>) -> Result<Option<Claim>> {
    let Some(output) = output else {
        interrupt::hint("no answer was kept, as no --output was given");
        return Ok(None);
    };
    let claim = crate::output::growing(output)?;
    let folder = output.display();
    interrupt::hint(format!("what was answered is kept in {folder}: the same command goes on from there"));
    Ok(Some(claim))
}

/// What a model is called: the last part of its path.
fn model_name(model: &OsStr) -> String {
    let path = std::fs::canonicalize(model).unwrap_or_else(|_| model.into());
    path.file_name().unwrap_or(model).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gen_kwargs_are_pairs_or_an_object_and_commas_in_values_are_theirs() {
        let read = |text: &str| Value::Object(gen_kwargs(text).unwrap());
        assert_eq!(
            read("temperature=0.7, top_k=5,do_sample=True"),
            json!({"temperature": 0.7, "top_k": 5, "do_sample": true})
        );
        assert_eq!(read(r#"until=["a","b"],max_gen_toks=3"#), json!({"until": ["a", "b"], "max_gen_toks": 3}));
        assert_eq!(read(r#"until="a,\nb" , seed=None"#), json!({"until": "a,\nb", "seed": null}));
        assert_eq!(read(r#"{"until": ["x"], "top_p": 0.5}"#), json!({"until": ["x"], "top_p": 0.5}));
        assert_eq!(read("stop=e"), json!({"stop": "e"}));
        assert_eq!(read(""), json!({}));
        for (text, message) in [
            ("temperature", "not of the form key=value"),
            ("top_p=1,b", "not of the form key=value"),
            ("until=[a]", "begins as JSON and is none"),
            (r#"until=["a"]x"#, "expected a comma"),
            ("top_k=1,top_k=2", "is there twice"),
            ("{x}", "no JSON object"),
        ] {
            let error = format!("{:#}", gen_kwargs(text).unwrap_err());
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
