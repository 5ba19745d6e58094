//! `recoup compare`: models against a baseline on tasks and texts, with intervals, tests and a report.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use recoup_eval::compare::require_recovery;
use recoup_eval::comparison::{AttributionMode, Comparison};
use recoup_eval::report::{ReportContext, terminal};
use recoup_eval::tasks::Selection;
use recoup_ground::shares::Shard;
use serde_json::json;

use super::super::device::AnyBackend;
use super::super::options::{EngineOptions, identity, model_folder, named, open_noted};
use super::super::shards::{self, Shares};
use super::super::talk::Shown;
use super::texts::{Texts, texts};
use super::{TaskOptions, labels, model_name};
use crate::checkpoint::Checkpoint;
use crate::evaluate::evaluation::Subject;
use crate::evaluate::experiment::{self, Contender, Experiment, ExperimentError, Outcome, Source, Weights};
use crate::evaluate::facts;
use crate::evaluate::verify::altered::{Alteration, Altered};
use crate::model::{Decoder, ModelConfig};

/// Tasks where none are named: shipped, quick, and of different kinds.
const DEFAULT_TASKS: [&str; 4] = ["hellaswag", "piqa", "arc_easy", "lambada_openai"];
/// Exit code where a gate is not met.
const GATE: u8 = 3;
/// Tokens in a window of text, and windows of each text, where neither is given.
const WINDOW: usize = 512;
const WINDOWS: usize = 24;
/// llama-perplexity's figures of a model on a text that are shown; of more they are in the report only.
const BLOCKS: usize = 6;
/// Ways to find where the loss sits.
const MODES: [(&str, AttributionMode); 3] = [
    ("quantize", AttributionMode::QuantizeOne),
    ("restore", AttributionMode::RestoreOne),
    ("inputs", AttributionMode::RestoreInputs),
];
/// Columns of the terminal's tables.
const WIDTH: usize = 110;

#[derive(clap::Args, Clone)]
pub(in crate::cli) struct Args {
    /// The original (BF16), then what was made of it: PTQ, QAT, QAD, …; checkpoint folders or hub ids
    #[arg(required = true, num_args = 2.., value_name = "MODEL")]
    models: Vec<OsString>,
    /// What tables and plots call them, in the same order [default: the folders' names]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    labels: Vec<String>,
    /// Label of the model whose loss the others may win back, or `none` [default: the second of three or more models]
    #[arg(long, value_name = "LABEL")]
    ptq: Option<String>,
    #[command(flatten)]
    tasks: TaskOptions,
    #[command(flatten)]
    shares: Shares,
    /// Texts for KL and perplexity: wikitext and books (shipped), or files of text or records, folders, patterns, or - for
    /// standard input; conversations are written by the baseline's chat template; `none` for none
    #[arg(long, value_delimiter = ',', default_value = "wikitext,books", value_name = "TEXTS")]
    text: Vec<OsString>,
    /// Tokens in a window of text [default: 512]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Windows of each text at most [default: 24]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Where the loss sits: quantize, restore, or leave the inputs unquantized of one layer and one kind of module at a time, and rank
    /// them by KL
    #[arg(long, value_name = "MODE", value_parser = named(MODES.to_vec()), num_args = 0..=1, default_missing_value = "quantize")]
    attribute: Option<AttributionMode>,
    /// Windows of the first text that --attribute runs for each part
    #[arg(long, default_value_t = 4, value_name = "N", requires = "attribute")]
    attribute_windows: usize,
    /// Exit with 3 unless every model's mean recovery is at least this with confidence (its interval's lower bound)
    #[arg(long, value_name = "SHARE")]
    require_recovery: Option<f64>,
    /// Level of intervals and tests
    #[arg(long, default_value_t = 0.95)]
    confidence: f64,
    /// Seed of bootstrap and permutations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for the report and everything behind it
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Print comparison.json instead of the tables
    #[arg(long)]
    json: bool,
    /// Do not measure speed
    #[arg(long)]
    no_speed: bool,
    #[command(flatten)]
    pub(in super::super) options: EngineOptions,
}

pub(in crate::cli) fn run(args: &Args) -> Result<ExitCode> {
    args.shares.of_this_process(Some(&args.output), |shares, output| {
        let output = output.unwrap_or_else(|| args.output.clone());
        run_here(&Args { shares, output, ..args.clone() })
    })
}

/// The part of this process.
fn run_here(args: &Args) -> Result<ExitCode> {
    let labels = labels::of(&args.models, &args.labels)?;
    let ptq = labels::ptq(args.ptq.as_deref(), &labels)?;
    let setup = args.tasks.setup()?;
    let selection = args.tasks.select(&DEFAULT_TASKS)?;
    args.tasks.check_thinking(&selection)?;
    let Texts { named: texts, notes: text_notes } =
        texts(&args.text, &model_folder(&args.models[0])?, &args.tasks.template_arguments())?;
    let (part, merge) = (args.shares.part(), &args.shares.merge);
    if merge.is_empty() {
        // The baseline and one other are in memory at a time.
        let bytes = |m: &OsString| Ok(Checkpoint::open(&model_folder(m)?)?.tensors.file_bytes());
        let mut all: Vec<u64> = args.models.iter().map(bytes).collect::<Result<_>>()?;
        all.sort_unstable_by_key(|bytes| std::cmp::Reverse(*bytes));
        args.options.backend_for(all.iter().take(2).sum())?;
    }
    let speed = match (args.no_speed, merge.is_empty()) {
        (true, _) => None,
        (false, true) => Some(args.options.speed_key()?),
        (false, false) => experiment::speed(merge, &labels[0]),
    };
    let mut experiment = Experiment {
        labels: &labels,
        ptq,
        selection: &selection,
        setup: &setup,
        tasks: args.tasks.describe(&setup),
        texts: &texts,
        window: args.window.unwrap_or(WINDOW),
        windows: args.windows.unwrap_or(WINDOWS),
        attribution: args.attribute.map(|mode| (mode, args.attribute_windows)),
        speed,
        kv: args.options.kv_cache_dtype,
        confidence: args.confidence,
        seed: args.seed,
        folder: &args.output,
        claim: None,
        source: if merge.is_empty() { Source::Computed(part) } else { Source::Parts(merge) },
    };
    check_gate(args.require_recovery, &selection)?;
    if part != Shard::ALL && (args.json || args.require_recovery.is_some()) {
        bail!("--json and --require-recovery are about what all shards find together: give them with --merge");
    }
    experiment.check()?;
    warn_of_idle(args, &experiment);
    let claim = super::claimed(Some(&args.output))?;
    experiment.claim = claim.as_ref();
    if part != Shard::ALL {
        experiment::describe(&args.output, part, &args.options.machine()?)?;
    }
    let load = &mut |index: usize| {
        load(args, &args.models[index], &labels[index]).map_err(|e| ExperimentError::Load(e.into()))
    };
    let Some(Outcome { comparison, mut notes, in_files }) = experiment.run(load, &mut Shown::default())? else {
        super::super::say!("shard {part} is complete; when all are: recoup compare … --merge DIRS -o OUT");
        return super::super::done();
    };
    notes.extend(text_notes);
    notes.iter().for_each(|n| super::super::say!("note: {n}"));
    // Said when the models were opened.
    notes.extend(in_files);
    report(args, &context(args, &experiment, notes, &comparison), &comparison)
}

/// What can be found wrong with tasks and texts before there are all the models.
pub(in crate::cli) fn check(args: &Args) -> Result<()> {
    args.tasks.setup()?;
    let selection = args.tasks.select(&DEFAULT_TASKS)?;
    args.tasks.check_thinking(&selection)?;
    texts(&args.text, &model_folder(&args.models[0])?, &args.tasks.template_arguments())?;
    check_gate(args.require_recovery, &selection)
}

/// A gate that says nothing is refused before anything is computed.
fn check_gate(threshold: Option<f64>, selection: &Selection) -> Result<()> {
    let Some(r) = threshold else { return Ok(()) };
    if !r.is_finite() || r < 0.0 {
        bail!("--require-recovery {r}: expected a share such as 0.98");
    }
    if selection.tasks.is_empty() {
        bail!("--require-recovery {r} is about the score in tasks, and --tasks names none");
    }
    Ok(())
}

/// Names options that have nothing to act on.
fn warn_of_idle(args: &Args, experiment: &Experiment<'_>) {
    if experiment.selection.tasks.is_empty() {
        let of_tasks = args.tasks.given();
        if !of_tasks.is_empty() {
            super::super::say!("warning: without effect, as there is no task: {}", of_tasks.join(", "));
        }
    }
    let given = [("--window", args.window.is_some()), ("--windows", args.windows.is_some())];
    let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    if experiment.texts.is_empty() && !given.is_empty() {
        super::super::say!("warning: without effect, as --text names none: {}", given.join(", "));
    }
}

/// A model of the comparison; its weights are loaded when they are needed.
fn load<'a>(args: &'a Args, model: &OsStr, label: &str) -> Result<Contender<'a, AnyBackend>> {
    let folder = model_folder(model)?;
    let (checkpoint, notes) = open_noted(&folder)?;
    let text = args.tasks.text(&folder, &checkpoint.config)?;
    let notes = [&notes, text.tokenizer().notes()].concat();
    let facts = facts::facts(&model_name(model), &checkpoint)?;
    let computation = if args.shares.merge.is_empty() {
        args.options.computation(&checkpoint)?
    } else {
        let recorded = experiment::computation(&args.shares.merge, label)?;
        shards::same_kv(args.options.kv_cache_dtype, &recorded)?;
        recorded
    };
    let identity = json!({"files": identity(&checkpoint)?, "computation": computation});
    let config = ModelConfig::read(&checkpoint.config)?;
    Ok(Contender::new(text, Subject { facts, identity, notes }, &config, move || {
        weights(args, &checkpoint).map_err(|e| ExperimentError::Load(e.into()))
    }))
}

fn weights(args: &Args, checkpoint: &Checkpoint) -> Result<Weights<AnyBackend>> {
    let decoder = args.options.load(checkpoint)?;
    let float_inputs = match args.attribute {
        Some(AttributionMode::RestoreInputs) => {
            let source = Altered::new(checkpoint, &decoder.config, Alteration::FloatInputs);
            Some(Decoder::load(decoder.backend().clone(), &source)?)
        }
        _ => None,
    };
    Ok(Weights { decoder, float_inputs })
}

fn report(args: &Args, context: &ReportContext, comparison: &Comparison) -> Result<ExitCode> {
    let json = experiment::write(&args.output, comparison, context)?;
    if args.json {
        super::super::outln!("{}", json.trim_end());
    } else {
        super::super::outln!("{}", terminal(comparison, context, WIDTH).trim_end());
        // Of many they would scroll the tables away.
        let blocks = &comparison.divergences[..];
        for d in if blocks.len() <= BLOCKS { blocks } else { &[] } {
            let label = &comparison.models[d.model].label;
            super::super::outln!("\n{label} on {}\n{}", d.text, d.llama_block().trim_end());
        }
    }
    super::super::say!("wrote {}", args.output.join("report.html").display());
    let Some(threshold) = args.require_recovery else { return super::super::done() };
    let mut met = true;
    for verdict in require_recovery(&comparison.overall, threshold) {
        let label = &comparison.models[verdict.model].label;
        let found = verdict.recovery.map_or_else(
            || "cannot be given (the baseline scores nothing to keep)".to_owned(),
            |r| format!("is {:.4} [{:.4}, {:.4}]", r.estimate, r.low, r.high),
        );
        let word = if verdict.met { "met" } else { "not met" };
        super::super::say!("required recovery {threshold} {word}: {label}'s {found}");
        met &= verdict.met;
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::from(GATE) })
}

fn context(
    args: &Args,
    experiment: &Experiment<'_>,
    measured: BTreeSet<String>,
    comparison: &Comparison,
) -> ReportContext {
    let labels = experiment.labels;
    let mut notes = Vec::new();
    if let Some(limit) = args.tasks.limit {
        notes.push(format!("Documents of each task: --limit {limit}."));
    }
    if !comparison.divergences.is_empty() {
        notes.push(format!(
            "Texts in disjoint windows of at most {} tokens, at most {} windows.",
            experiment.window, experiment.windows
        ));
    }
    notes.extend(measured);
    notes.push(format!(
        "Seed of bootstrap and permutations: {}; worked examples drawn with {}.",
        args.seed, args.tasks.fewshot_seed
    ));
    let folders: Vec<Option<PathBuf>> = args.models.iter().map(|m| model_folder(m).ok()).collect();
    let recovered =
        labels.iter().zip(&folders).filter_map(|(label, folder)| Some((label.as_str(), folder.as_deref()?)));
    ReportContext {
        title: labels.join(" / "),
        command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" "),
        version: format!("recoup {}", env!("CARGO_PKG_VERSION")),
        machine: match args.shares.merge.as_slice() {
            [] => args.options.machine().unwrap_or_default(),
            parts => experiment::machines(parts).join("; "),
        },
        notes,
        training_curves: super::curves::training_curves(recovered),
    }
}
