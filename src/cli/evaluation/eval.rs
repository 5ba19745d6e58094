//! `recoup eval`: one model, ours or behind a URL, on tasks.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use recoup_eval::openai::{ApiKey, OpenAi, Options as UrlOptions};
use recoup_eval::report::evaluation_markdown;
use recoup_eval::run::{Plan, Results, Setup, Shard, merge};
use recoup_eval::scores::ModelFacts;
use recoup_eval::tasks::{ListedKind, Selection};
use recoup_eval::{LanguageModel, journal};
use serde_json::{Map, Value, json};

use super::super::options::{EngineOptions, identity, model_folder, open_model};
use super::{TaskOptions, facts_config, model_name, parse_shard, run_plan};
use crate::checkpoint::Checkpoint;
use crate::evaluate::{EvaluatedModel, ModelText, facts, kernel_check};
use crate::model::ModelConfig;
use crate::output;

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
    /// Requests under way at once
    #[arg(long, default_value_t = UrlOptions::default().concurrency, value_name = "N")]
    concurrency: usize,
    /// Seconds that one request may take
    #[arg(long, default_value_t = UrlOptions::default().timeout.as_secs(), value_name = "SECONDS")]
    timeout: u64,
    /// Further tries of a request that failed for a reason that may pass
    #[arg(long, default_value_t = UrlOptions::default().retries, value_name = "N")]
    retries: usize,
    /// Text before everything that is scored: the model's BOS token, for servers that do not add it
    #[arg(long, default_value = "", value_name = "TEXT")]
    prefix: String,
}

/// What an evaluation is of: what reports say of the model, and what tells it from others.
struct Subject {
    facts: ModelFacts,
    identity: Value,
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
    if let Some(address) = model.to_str().filter(|m| m.starts_with("http://") || m.starts_with("https://")) {
        return url(args, address, &selection, &setup);
    }
    let folder = model_folder(model)?;
    let checkpoint = open_model(&folder)?;
    let _claim = super::claimed(args.output.as_deref())?;
    let text = args.tasks.text(&folder, &checkpoint.config)?;
    let context = context_length(&checkpoint, args.max_length)?;
    let subject = Subject {
        facts: facts::facts(&model_name(model), &checkpoint)?,
        identity: json!({"files": identity(&checkpoint)?, "computation": args.options.computation(), "context": context}),
    };
    if args.check_kernels {
        check_kernels(args, &checkpoint, &text)?;
    }
    let decoder = args.options.load(&checkpoint)?;
    drop(checkpoint);
    let mut evaluated = EvaluatedModel::new(&decoder, &text, args.options.kv_format(), Some(context));
    let code = evaluate(args, &mut evaluated, &subject, &selection, &setup)?;
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
    let arguments = args.tasks.template_arguments();
    let mut extra = Map::new();
    if !arguments.is_empty() {
        // vLLM's, SGLang's and llama.cpp's name for it.
        extra.insert("chat_template_kwargs".into(), arguments.into());
    }
    let mut options = UrlOptions {
        model: args.url.served_model.clone(),
        api_key: ApiKey::from_env(),
        concurrency: args.url.concurrency.max(1),
        timeout: Duration::from_secs(args.url.timeout),
        retries: args.url.retries,
        prefix: args.url.prefix.clone(),
        chat: setup.chat,
        ..UrlOptions::default()
    };
    options.extra.extend(extra.clone());
    let mut server = OpenAi::new(address, options)?;
    let _claim = super::claimed(args.output.as_deref())?;
    let name = format!("{} at {address}", server.model());
    let subject = Subject {
        identity: json!({"url": address, "served_model": server.model(), "prefix": args.url.prefix, "body": extra}),
        facts: ModelFacts { name, ..ModelFacts::default() },
    };
    evaluate(args, &mut server, &subject, selection, setup)
}

fn evaluate<M: LanguageModel>(
    args: &Args,
    model: &mut M,
    subject: &Subject,
    selection: &Selection,
    setup: &Setup,
) -> Result<ExitCode> {
    let plan = Plan::new(selection, setup, model)?;
    plan.notes().iter().for_each(|note| super::super::say!("warning: {note}"));
    let config = facts_config(&subject.facts, &subject.identity, args.tasks.describe(setup));
    if !args.merge.is_empty() {
        let answers = merge(&plan, &subject.identity, &args.merge)?;
        if let Some(folder) = &args.output {
            let path = folder.join(recoup_eval::run::RESPONSES);
            journal::write(&path, &plan.about(&subject.identity, Shard::ALL), &answers)?;
        }
        return finish(args, &plan.results(&answers)?, &subject.facts, &config);
    }
    // Without -o nothing is kept; the journal still needs a place.
    let scratch = if args.output.is_none() { Some(output::temporary()?) } else { None };
    let folder = args.output.as_deref().or(scratch.as_ref().map(|s| s.path())).unwrap_or(Path::new("."));
    let shard = args.shard.unwrap_or(Shard::ALL);
    let start = Instant::now();
    let results = run_plan(model, &plan, &subject.identity, folder, shard, &subject.facts.name)?;
    super::super::say!("{} requests in {:.1} s", plan.len(shard), start.elapsed().as_secs_f64());
    match results {
        Some(results) => finish(args, &results, &subject.facts, &config),
        None => {
            let (index, of) = (shard.index, shard.of);
            super::super::say!(
                "shard {index}/{of} is complete; when all are: recoup eval … --merge DIR0,DIR1,… -o OUT"
            );
            super::super::done()
        }
    }
}

fn finish(args: &Args, results: &Results, facts: &ModelFacts, config: &Value) -> Result<ExitCode> {
    let table = evaluation_markdown(&results.rows());
    if let Some(folder) = &args.output {
        results.write(folder, facts, config)?;
        journal::write_atomically(&folder.join("report.md"), table.as_bytes())?;
        super::super::say!("wrote {}", folder.display());
    }
    if args.json {
        super::super::outln!("{:#}", results.json(facts, config));
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
