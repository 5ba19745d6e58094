//! `recoup eval`: one model, ours or behind a URL, on tasks.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use recoup_eval::run::{Plan, Setup, answered_by};
use recoup_eval::tasks::{ListedKind, Selection};
use recoup_eval::{LanguageModel, Prompts};
use recoup_ground::http::address::is_address;
use recoup_openai::{OpenAi, Tally};
use serde_json::{Value, json};

use super::super::device::DeviceChoice;
use super::super::options::{EngineOptions, identity, model_folder, open_noted};
use super::super::shards::{self, Shares};
use super::super::talk::Shown;
use super::server::UrlArgs;
use super::{TaskOptions, model_name};
use crate::checkpoint::Checkpoint;
use crate::corpus;
use crate::evaluate::evaluation::{Evaluated, Evaluation, Subject};
use crate::evaluate::{EvaluatedModel, facts, kernel_check};
use crate::formats::kv::KvFormat;
use crate::model::ModelConfig;
use crate::output::Claim;
use crate::text::ModelText;

#[derive(clap::Args, Clone)]
pub(in crate::cli) struct Args {
    /// Checkpoint folder, hub id, or the address of an OpenAI-compatible server (http://host:port/v1)
    #[arg(required_unless_present = "list_tasks")]
    model: Option<OsString>,
    #[command(flatten)]
    tasks: TaskOptions,
    #[command(flatten)]
    shares: Shares,
    /// Folder for results, samples and answers; the same command goes on from the answers there
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print what tasks there are
    #[arg(long)]
    list_tasks: bool,
    /// Compare each packed kernel with the plain definition on this model first, and stop if one differs
    #[arg(long, conflicts_with = "merge")]
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
    pub(in super::super) options: EngineOptions,
}

pub(in crate::cli) fn run(args: &Args) -> Result<ExitCode> {
    if args.list_tasks {
        return list(args);
    }
    args.shares
        .of_this_process(args.output.as_deref(), |shares, output| run_here(&Args { shares, output, ..args.clone() }))
}

/// The part of this process.
fn run_here(args: &Args) -> Result<ExitCode> {
    let model = args.model.as_deref().context("MODEL is missing")?;
    let setup = args.tasks.setup()?;
    if args.tasks.tasks.is_empty() {
        bail!("--tasks is missing; --list-tasks prints what there is, such as --tasks hellaswag,lambada_openai");
    }
    let selection = args.tasks.select(&[])?;
    args.tasks.check_thinking(&selection)?;
    if let Some(address) = model.to_str().filter(|m| is_address(m)) {
        if let Some(name) = of_local_models(args) {
            bail!("{name} is of a model that runs here; a server has settings of its own");
        }
        // A server that is gone by now need not say which model it had.
        let answered_by = answered_by(&args.shares.merge)?;
        let served = answered_by["served_model"].as_str();
        let (mut server, subject) = args.url.connect(address, served, setup.chat, args.tasks.template_arguments())?;
        let claim = super::claimed(args.output.as_deref())?;
        if !args.shares.merge.is_empty() {
            return merge(args, &server, &subject, claim.as_ref(), (&selection, &setup));
        }
        return evaluate(args, &mut server, &subject, claim.as_ref(), (&selection, &setup), OpenAi::tally);
    }
    if let Some(name) = args.url.given().first() {
        bail!("{name} is of a server; {} is a model that runs here", Path::new(model).display());
    }
    let folder = model_folder(model)?;
    let (checkpoint, notes) = open_noted(&folder)?;
    let claim = super::claimed(args.output.as_deref())?;
    let text = args.tasks.text(&folder, &checkpoint.config)?;
    args.tasks.note_thinking(&text, &selection);
    let positions = ModelConfig::read(&checkpoint.config)?.max_positions;
    let context = args.max_length.map_or(positions, |asked| asked.min(positions));
    let computation = match recorded_computation(args)? {
        Some(recorded) => recorded,
        None => args.options.computation(&checkpoint)?,
    };
    let subject = Subject {
        facts: facts::facts(&model_name(model), &checkpoint)?,
        identity: json!({"files": identity(&checkpoint)?, "computation": computation, "context": context}),
        notes: [&notes, text.tokenizer().notes()].concat(),
    };
    if !args.shares.merge.is_empty() {
        return merge(args, &text, &subject, claim.as_ref(), (&selection, &setup));
    }
    if args.check_kernels {
        check_kernels(args, &checkpoint, &text)?;
    }
    let decoder = args.options.load(&checkpoint)?;
    drop(checkpoint);
    let mut evaluated = EvaluatedModel::new(&decoder, &text, args.options.kv_cache_dtype, Some(context));
    let code = evaluate(args, &mut evaluated, &subject, claim.as_ref(), (&selection, &setup), |_| Tally::default())?;
    if evaluated.truncated() > 0 {
        let n = evaluated.truncated();
        super::super::say!(
            "warning: {n} contexts were longer than the model's; their beginning was cut, as lm-evaluation-harness cuts it"
        );
    }
    if evaluated.unfinished() > 0 {
        let n = evaluated.unfinished();
        super::super::say!(
            "warning: in {n} answers the thinking does not end; they are scored as they are, as lm-evaluation-harness scores \
             them. --gen-kwargs max_gen_toks=N gives them more tokens"
        );
    }
    Ok(code)
}

/// An option given that means nothing for a server.
fn of_local_models(args: &Args) -> Option<&'static str> {
    let local = [
        ("--max-length", args.max_length.is_some()),
        ("--check-kernels", args.check_kernels),
        ("--threads", args.options.threads != 0),
        ("--isa", args.options.isa.is_some()),
        ("--device", args.options.device != DeviceChoice::Auto),
        ("--kv-cache-dtype", args.options.kv_cache_dtype != KvFormat::F32),
        ("--tensor-parallel-size", args.options.tensor_parallel_size != 1),
        ("--pipeline-parallel-size", args.options.pipeline_parallel_size != 1),
    ];
    local.iter().find(|(_, given)| *given).map(|(name, _)| *name)
}

/// `tally`: what `model` counted of its server.
fn evaluate<M: LanguageModel>(
    args: &Args,
    model: &mut M,
    subject: &Subject,
    claim: Option<&Claim>,
    (selection, setup): (&Selection, &Setup),
    tally: fn(&M) -> Tally,
) -> Result<ExitCode> {
    let plan = plan(model, selection, setup)?;
    let tasks = args.tasks.describe(setup);
    let evaluation = Evaluation { plan: &plan, subject, tasks, folder: args.output.as_deref(), claim };
    let shard = args.shares.part();
    let Some(evaluated) = evaluation.run(model, shard, tally, &mut Shown::default())? else {
        super::super::say!("shard {shard} is complete; when all are: recoup eval … --merge DIRS -o OUT");
        return super::super::done();
    };
    finish(args, &evaluated)
}

/// What the shards say computed them: merging computes nothing, so this machine does not count. Nothing where none is merged.
fn recorded_computation(args: &Args) -> Result<Option<Value>> {
    if args.shares.merge.is_empty() {
        return Ok(None);
    }
    let computation = answered_by(&args.shares.merge)?["computation"].take();
    shards::same_kv(args.options.kv_cache_dtype, &computation)?;
    Ok(Some(computation))
}

/// Results of the answers in all shards; of the model its texts are enough.
fn merge<P: Prompts>(
    args: &Args,
    prompts: &P,
    subject: &Subject,
    claim: Option<&Claim>,
    (selection, setup): (&Selection, &Setup),
) -> Result<ExitCode> {
    let plan = plan(prompts, selection, setup)?;
    let tasks = args.tasks.describe(setup);
    let evaluation = Evaluation { plan: &plan, subject, tasks, folder: args.output.as_deref(), claim };
    finish(args, &evaluation.merged::<P::Error>(&args.shares.merge)?)
}

/// What is asked, with what there is to say of it.
fn plan<'t, P: Prompts>(prompts: &P, selection: &'t Selection, setup: &'t Setup) -> Result<Plan<'t>> {
    let plan = Plan::new(selection, setup, prompts)?;
    plan.notes().iter().for_each(|note| super::super::say!("warning: {note}"));
    Ok(plan)
}

fn finish(args: &Args, evaluated: &Evaluated) -> Result<ExitCode> {
    for note in evaluated.notes() {
        super::super::say!("{note}");
    }
    if let Some(folder) = &args.output {
        evaluated.write(folder)?;
        super::super::say!("wrote {}", folder.display());
    }
    if args.json {
        super::super::outln!("{:#}", evaluated.json());
    } else {
        super::super::outln!("{}", evaluated.table().trim_end());
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
    let tokens = text.tokenizer().encode(corpus::BUILT_IN, true)?;
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
