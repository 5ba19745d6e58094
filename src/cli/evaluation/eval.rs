//! `recoup eval`: one model, ours or behind a URL, on tasks.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use recoup_eval::http::address::is_address;
use recoup_eval::openai::{ApiKey, Fields, OpenAi, Options as UrlOptions, Tally};
use recoup_eval::report::evaluation_markdown;
use recoup_eval::run::{Plan, Results, Setup, Shard, merge};
use recoup_eval::scores::ModelFacts;
use recoup_eval::tasks::{ListedKind, Selection};
use recoup_eval::{LanguageModel, journal};
use serde_json::{Value, json};

use super::super::options::{EngineOptions, KvDtype, at_least_one, identity, model_folder, open_noted};
use super::{TaskOptions, facts_config, model_name, parse_shard, room, run_plan};
use crate::checkpoint::Checkpoint;
use crate::evaluate::{EvaluatedModel, ModelText, facts, kernel_check};
use crate::model::ModelConfig;
use crate::output::{self, Claim};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Checkpoint folder, hub id, or the address of an OpenAI-compatible server (http://host:port/v1)
    #[arg(required_unless_present = "list_tasks")]
    model: Option<OsString>,
    #[command(flatten)]
    tasks: TaskOptions,
    /// Folder for results, samples and answers; the same command goes on from the answers there
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Only every n-th document from the i-th on, i/n from 0/n to (n-1)/n; needs -o
    #[arg(long, value_parser = parse_shard, requires = "output", value_name = "I/N")]
    shard: Option<Shard>,
    /// Ask nothing: make results of the output folders of all shards, with the same options
    #[arg(long, value_delimiter = ',', conflicts_with = "shard", value_name = "DIRS")]
    merge: Vec<PathBuf>,
    /// Print what tasks there are
    #[arg(long)]
    list_tasks: bool,
    /// Compare each packed kernel with the plain definition on this model first, and stop if one differs
    #[arg(long)]
    check_kernels: bool,
    /// Print results.json instead of the table
    #[arg(long)]
    json: bool,
    /// Tokens of context at most [default: what the model has]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    #[command(flatten)]
    url: UrlArgs,
    #[command(flatten)]
    options: EngineOptions,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Of a URL")]
struct UrlArgs {
    /// Model name on the server [default: its only one]
    #[arg(long, value_name = "NAME")]
    served_model: Option<String>,
    /// Requests under way at once [default: 4]
    #[arg(long, value_name = "N", value_parser = at_least_one::<u64>)]
    concurrency: Option<u64>,
    /// Seconds that one request may take [default: 300]
    #[arg(long, value_name = "SECONDS", value_parser = at_least_one::<u64>)]
    timeout: Option<u64>,
    /// Further tries of a request that failed for a reason that may pass, with waits of 0.5 s, 1 s, 2 s, … 60 s or what the
    /// server asks for [default: 8]
    #[arg(long, value_name = "N")]
    retries: Option<usize>,
    /// Text before everything that is scored: the model's BOS token, for servers that do not add it
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// Further fields of every request, as JSON: '{"provider": {"order": ["x"]}}'
    #[arg(long, value_name = "JSON")]
    extra_body: Option<String>,
    /// Fields to leave out of every request, such as temperature
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    omit_field: Vec<String>,
    /// Fields to send by another name, such as max_tokens=max_completion_tokens
    #[arg(long, value_delimiter = ',', value_name = "OLD=NEW")]
    rename_field: Vec<String>,
    /// Certificates (PEM) to trust instead of the public authorities', for https
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl UrlArgs {
    /// Those given, which mean nothing for a model that runs here.
    fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--served-model", self.served_model.is_some()),
            ("--concurrency", self.concurrency.is_some()),
            ("--timeout", self.timeout.is_some()),
            ("--retries", self.retries.is_some()),
            ("--prefix", self.prefix.is_some()),
            ("--extra-body", self.extra_body.is_some()),
            ("--omit-field", !self.omit_field.is_empty()),
            ("--rename-field", !self.rename_field.is_empty()),
            ("--ca-file", self.ca_file.is_some()),
        ];
        all.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    }

    fn fields(&self) -> Result<Fields> {
        let extra = match &self.extra_body {
            None => serde_json::Map::new(),
            Some(text) => match serde_json::from_str(text) {
                Ok(Value::Object(fields)) => fields,
                Ok(other) => bail!("--extra-body: expected a JSON object, such as {{\"top_k\": 5}}, found {other}"),
                Err(e) => bail!("--extra-body: no JSON: {e}"),
            },
        };
        let rename = self.rename_field.iter().map(|pair| match pair.split_once('=') {
            Some((old, new)) if !old.trim().is_empty() && !new.trim().is_empty() => {
                Ok((old.trim().to_owned(), new.trim().to_owned()))
            }
            _ => bail!("--rename-field {pair}: expected OLD=NEW"),
        });
        let omit = self.omit_field.iter().map(|name| name.trim().to_owned()).collect();
        Ok(Fields { extra, rename: rename.collect::<Result<_>>()?, omit })
    }
}

/// What an evaluation is of: what reports say of the model, and what tells it from others.
struct Subject {
    facts: ModelFacts,
    identity: Value,
    /// What its files contradict each other in.
    notes: Vec<String>,
    /// Of the folder that keeps the answers.
    claim: Option<Claim>,
}

pub(in crate::cli) fn run(args: &Args) -> Result<ExitCode> {
    if args.list_tasks {
        return list(args);
    }
    let model = args.model.as_deref().context("MODEL is missing")?;
    let setup = args.tasks.setup()?;
    if args.tasks.tasks.is_empty() {
        bail!("--tasks is missing; --list-tasks prints what there is, such as --tasks hellaswag,lambada_openai");
    }
    let selection = args.tasks.select(&[])?;
    args.tasks.check_thinking(&selection)?;
    if let Some(address) = model.to_str().filter(|m| is_address(m)) {
        return url(args, address, &selection, &setup);
    }
    if let Some(name) = args.url.given().first() {
        bail!("{name} is of a server; {} is a model that runs here", Path::new(model).display());
    }
    let folder = model_folder(model)?;
    let (checkpoint, notes) = open_noted(&folder)?;
    let claim = super::claimed(args.output.as_deref())?;
    let text = args.tasks.text(&folder, &checkpoint.config)?;
    let context = context_length(&checkpoint, args.max_length)?;
    let subject = Subject {
        facts: facts::facts(&model_name(model), &checkpoint)?,
        identity: json!({"files": identity(&checkpoint)?, "computation": args.options.computation(), "context": context}),
        notes: [&notes, text.tokenizer().notes()].concat(),
        claim,
    };
    if args.check_kernels {
        check_kernels(args, &checkpoint, &text)?;
    }
    let decoder = args.options.load(&checkpoint)?;
    drop(checkpoint);
    let mut evaluated = EvaluatedModel::new(&decoder, &text, args.options.kv_format(), Some(context));
    let code = evaluate(args, &mut evaluated, &subject, &selection, &setup, |_| Tally::default())?;
    if evaluated.truncated() > 0 {
        let n = evaluated.truncated();
        super::super::say!(
            "warning: {n} contexts were longer than the model's; their beginning was cut, as lm-evaluation-harness cuts it"
        );
    }
    Ok(code)
}

/// Tokens of context: what is asked for, and no more than the model has positions for.
fn context_length(checkpoint: &Checkpoint, asked: Option<usize>) -> Result<usize> {
    let positions = ModelConfig::read(&checkpoint.config)?.max_positions;
    Ok(asked.map_or(positions, |asked| asked.min(positions)))
}

fn url(args: &Args, address: &str, selection: &Selection, setup: &Setup) -> Result<ExitCode> {
    let local = [
        ("--max-length", args.max_length.is_some()),
        ("--check-kernels", args.check_kernels),
        ("--threads", args.options.threads != 0),
        ("--isa", args.options.isa.is_some()),
        ("--kv-cache-dtype", args.options.kv_cache_dtype != KvDtype::F32),
    ];
    if let Some((name, _)) = local.iter().find(|(_, given)| *given) {
        bail!("{name} is of a model that runs here; a server has settings of its own");
    }
    let (given, default) = (&args.url, UrlOptions::default());
    let mut fields = given.fields()?;
    let arguments = args.tasks.template_arguments();
    if !arguments.is_empty() {
        // vLLM's, SGLang's and llama.cpp's name for it.
        if fields.extra.insert("chat_template_kwargs".into(), arguments.into()).is_some() {
            bail!("chat_template_kwargs: given by --extra-body and by options of their own");
        }
    }
    let options = UrlOptions {
        model: given.served_model.clone(),
        api_key: ApiKey::from_env(),
        concurrency: given.concurrency.map_or(default.concurrency, |n| n.try_into().unwrap_or(usize::MAX)),
        timeout: given.timeout.map_or(default.timeout, Duration::from_secs),
        retries: given.retries.unwrap_or(default.retries),
        prefix: given.prefix.clone().unwrap_or_default(),
        chat: setup.chat,
        fields: fields.clone(),
        ca_file: given.ca_file.clone(),
        notice: Some(|text| super::super::say!("{text}")),
    };
    let mut server = OpenAi::new(address, options)?;
    let claim = super::claimed(args.output.as_deref())?;
    let address = server.address();
    let name = format!("{} at {address}", server.model());
    // Null where nothing is asked for: answers of runs before there were such options go on.
    let some = |value: Value| if value.as_object().is_some_and(|o| o.is_empty()) { Value::Null } else { value };
    let omitted: Vec<&String> = fields.omit.iter().collect();
    let subject = Subject {
        identity: json!({"url": address, "served_model": server.model(), "prefix": given.prefix.as_deref().unwrap_or(""),
            "extra_body": some(json!(fields.extra)), "rename_field": some(json!(fields.rename)),
            "omit_field": if omitted.is_empty() { Value::Null } else { json!(omitted) }}),
        facts: ModelFacts { name, ..ModelFacts::default() },
        notes: Vec::new(),
        claim,
    };
    evaluate(args, &mut server, &subject, selection, setup, OpenAi::tally)
}

/// What happened between the evaluation and a server, kept beside the answers.
const SERVER: &str = "server.json";

fn kept_tally(folder: &Path) -> Result<Tally> {
    let path = folder.join(SERVER);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| {
            format!("{}: not what an evaluation wrote; delete the folder to begin anew", path.display())
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Tally::default()),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// `tally`: what `model` counted.
fn evaluate<M: LanguageModel>(
    args: &Args,
    model: &mut M,
    subject: &Subject,
    selection: &Selection,
    setup: &Setup,
    tally: fn(&M) -> Tally,
) -> Result<ExitCode> {
    let plan = Plan::new(selection, setup, model)?;
    plan.notes().iter().for_each(|note| super::super::say!("warning: {note}"));
    let config = facts_config(&subject.facts, &subject.identity, &subject.notes, args.tasks.describe(setup));
    if !args.merge.is_empty() {
        let answers = merge(&plan, &subject.identity, &args.merge)?;
        if let Some(folder) = &args.output {
            let path = folder.join(recoup_eval::run::RESPONSES);
            journal::write(&path, &plan.about(&subject.identity, Shard::ALL), &answers)?;
        }
        let mut counted = Tally::default();
        for folder in &args.merge {
            counted.add(&kept_tally(folder)?);
        }
        return finish(args, &plan.results(&answers)?, &subject.facts, config, &counted);
    }
    // Without -o nothing is kept; the journal still needs a place.
    let scratch = if args.output.is_none() { Some(output::temporary()?) } else { None };
    let folder = args.output.as_deref().or(scratch.as_ref().map(|s| s.path())).unwrap_or(Path::new("."));
    let shard = args.shard.unwrap_or(Shard::ALL);
    let start = Instant::now();
    let mut counted = kept_tally(folder)?;
    let results = run_plan(model, &plan, &subject.identity, folder, shard, &subject.facts.name, &|bytes| {
        room(subject.claim.as_ref(), bytes)
    });
    counted.add(&tally(model));
    if counted != Tally::default() {
        journal::write_atomically(&folder.join(SERVER), json!(counted).to_string().as_bytes())?;
    }
    let results = results?;
    super::super::say!("{} requests in {:.1} s", plan.len(shard), start.elapsed().as_secs_f64());
    match results {
        Some(results) => finish(args, &results, &subject.facts, config, &counted),
        None => {
            let (index, of) = (shard.index, shard.of);
            super::super::say!(
                "shard {index}/{of} is complete; when all are: recoup eval … --merge DIR0,DIR1,… -o OUT"
            );
            super::super::done()
        }
    }
}

fn finish(args: &Args, results: &Results, facts: &ModelFacts, mut config: Value, counted: &Tally) -> Result<ExitCode> {
    if *counted != Tally::default() {
        config["server"] = json!(counted);
    }
    let table = evaluation_markdown(&results.rows());
    let notes: Vec<String> = results.notes().into_iter().chain(counted.sentences()).collect();
    for note in &notes {
        super::super::say!("{note}");
    }
    if let Some(folder) = &args.output {
        results.write(folder, facts, &config)?;
        let listed: String = notes.iter().map(|note| format!("- {note}\n")).collect();
        let report = if listed.is_empty() { table.clone() } else { format!("{}\n\n{listed}", table.trim_end()) };
        journal::write_atomically(&folder.join("report.md"), report.as_bytes())?;
        super::super::say!("wrote {}", folder.display());
    }
    if args.json {
        super::super::outln!("{:#}", results.json(facts, &config));
    } else {
        super::super::outln!("{}", table.trim_end());
    }
    super::super::done()
}

fn list(args: &Args) -> Result<ExitCode> {
    for listed in args.tasks.library()?.list() {
        let kind = match listed.kind {
            ListedKind::Task => "task",
            ListedKind::Group => "group",
            ListedKind::Tag => "tag",
        };
        super::super::outln!("{:<6} {:<48} {}", kind, listed.name, listed.file);
    }
    super::super::done()
}

fn check_kernels(args: &Args, checkpoint: &Checkpoint, text: &ModelText) -> Result<()> {
    let tokens = text.tokenizer().encode(super::super::quantize::BUILT_IN_TEXT, true)?;
    let check = kernel_check::check(checkpoint, &args.options.backend()?, &tokens)?;
    let worst = check.modules.iter().max_by(|a, b| a.deviation.total_cmp(&b.deviation));
    if let Some(worst) = worst {
        super::super::say!(
            "kernels: {} modules, largest deviation from the plain definition {:.1e} ({}, {})",
            check.modules.len(),
            worst.deviation,
            worst.module,
            worst.format
        );
    }
    if !check.unreached.is_empty() {
        super::super::say!(
            "kernels: {} modules were given no token, such as {}",
            check.unreached.len(),
            check.unreached[0]
        );
    }
    let failures: Vec<String> =
        check.failures().map(|f| format!("  {} ({}): {:.1e}", f.module, f.format, f.deviation)).collect();
    if !failures.is_empty() {
        bail!(
            "{} kernels do not compute what their format says (allowed {:.0e}); scores would be the engine's fault, not \
             quantization's:\n{}",
            failures.len(),
            kernel_check::TOLERANCE,
            failures.join("\n")
        );
    }
    Ok(())
}
