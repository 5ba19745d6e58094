//! `recoup compare`: models against a baseline on tasks and texts, with intervals, tests and a report.
//!
//! One model beside the baseline is in memory at a time. Everything that took time is kept in the output folder as it
//! comes: answers, each text's divergence, each attribution, speeds. The same command goes on from there.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use recoup_eval::TokenModel;
use recoup_eval::compare::{CORRECTION, Options as CompareOptions, compare, require_recovery};
use recoup_eval::comparison::{Attribution, AttributionMode, ComparedModel, Comparison, Divergence};
use recoup_eval::divergence::{Said, WindowSums, Windows, kl_gone};
use recoup_eval::journal::write_atomically;
use recoup_eval::names::{clash, file_name};
use recoup_eval::report::{ReportContext, html, markdown, terminal};
use recoup_eval::run::{Plan, Results, Setup, Shard};
use recoup_eval::scores::ModelScores;
use recoup_eval::tasks::Selection;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::super::options::{EngineOptions, identity, model_folder, open_noted};
use super::texts::{Texts, texts};
use super::{TaskOptions, facts_config, model_name, room, run_plan};
use crate::backend::cpu::{CpuBackend, CpuTensor};
use crate::evaluate::{EvaluatedModel, ModelText, Rows, attribution, facts};
use crate::formats::kv::KvFormat;
use crate::model::Decoder;
use crate::output::Claim;

/// Tasks where none are named: shipped, quick, and of different kinds.
const DEFAULT_TASKS: [&str; 4] = ["hellaswag", "piqa", "arc_easy", "lambada_openai"];
/// Exit code where a gate is not met.
const GATE: u8 = 3;
/// Columns of the terminal's tables.
const WIDTH: usize = 110;

#[derive(clap::Args)]
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
    /// Where the loss sits: quantize, or restore, one layer and one kind of module at a time, and rank them by KL
    #[arg(long, value_name = "MODE", num_args = 0..=1, default_missing_value = "quantize")]
    attribute: Option<Attribute>,
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
    options: EngineOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Attribute {
    Quantize,
    Restore,
}

impl Attribute {
    fn mode(self) -> AttributionMode {
        match self {
            Self::Quantize => AttributionMode::QuantizeOne,
            Self::Restore => AttributionMode::RestoreOne,
        }
    }
}

impl Args {
    /// Tokens in a window of text.
    fn window(&self) -> usize {
        self.window.unwrap_or(512)
    }

    /// Windows of each text at most.
    fn windows(&self) -> usize {
        self.windows.unwrap_or(24)
    }
}

/// A loaded model.
struct Loaded {
    decoder: Decoder<CpuBackend>,
    text: ModelText,
    identity: Value,
    facts: recoup_eval::scores::ModelFacts,
    /// What its files contradict each other in.
    notes: Vec<String>,
}

/// What one model's part of the work gave.
struct Evaluated {
    scores: ModelScores,
    results: Option<Results>,
    divergences: Vec<(Divergence, WindowSums)>,
    attribution: Option<Attribution>,
}

pub(in crate::cli) fn run(args: &Args) -> Result<ExitCode> {
    let labels = labels(args)?;
    check_labels(&labels)?;
    let ptq = ptq(args, &labels)?;
    let setup = args.tasks.setup()?;
    let selection = args.tasks.select(&DEFAULT_TASKS)?;
    args.tasks.check_thinking(&selection)?;
    let Texts { named: texts, notes: text_notes } =
        texts(&args.text, &model_folder(&args.models[0])?, &args.tasks.template_arguments())?;
    if selection.tasks.is_empty() && texts.is_empty() {
        bail!("nothing to compare: name --tasks or --text");
    }
    check_before(args, &setup, &selection, &texts)?;
    args.models.iter().try_for_each(|m| model_folder(m).map(drop))?;
    let claim = super::claimed(Some(&args.output))?;

    let baseline = load(args, &args.models[0])?;
    let mut work = Work {
        args,
        labels: &labels,
        selection: &selection,
        setup: &setup,
        baseline: &baseline,
        texts: &texts,
        said: RefCell::default(),
        notes: RefCell::new(text_notes.into_iter().collect()),
        claim: claim.as_ref(),
    };
    // A text that is too short is refused before any task is answered.
    for (name, text) in &texts {
        let alone = [EvaluatedModel::new(&baseline.decoder, &baseline.text, work.kv(), None)];
        work.windows(&alone, name, text, args.windows())?;
    }
    let of_files =
        |label: &String, model: &Loaded| model.notes.iter().map(|n| format!("{label}: {n}")).collect::<Vec<_>>();
    let mut in_files = of_files(&labels[0], &baseline);
    let mut evaluated = vec![work.model(0, &baseline)?];
    for (index, model) in args.models.iter().enumerate().skip(1) {
        let loaded = load(args, model)?;
        in_files.extend(of_files(&labels[index], &loaded));
        evaluated.push(work.model(index, &loaded)?);
    }
    let mut notes = work.notes.into_inner();
    notes.iter().for_each(|n| super::super::say!("note: {n}"));
    // Said when the models were opened.
    notes.extend(in_files);
    let comparison = summary(args, &labels, ptq, &selection, evaluated)?;
    report(args, notes, &comparison)
}

/// What would only show when all is computed.
fn check_before(args: &Args, setup: &Setup, selection: &Selection, texts: &[(String, String)]) -> Result<()> {
    if let Some(r) = args.require_recovery {
        if !r.is_finite() || r < 0.0 {
            bail!("--require-recovery {r}: expected a share such as 0.98");
        }
        if selection.tasks.is_empty() {
            bail!("--require-recovery {r} is about the score in tasks, and --tasks names none");
        }
    }
    if !(0.5..1.0).contains(&args.confidence) {
        bail!("--confidence {}: expected at least 0.5 and less than 1, such as 0.95", args.confidence);
    }
    if texts.is_empty() && args.attribute.is_some() {
        bail!("--attribute ranks parts of the model by KL on the first text, and --text names none");
    }
    if selection.tasks.is_empty() {
        let of_tasks = args.tasks.given();
        if !of_tasks.is_empty() {
            super::super::say!("warning: without effect, as there is no task: {}", of_tasks.join(", "));
        }
    }
    let (windows, window) = (args.windows(), args.window());
    if !texts.is_empty() && (windows < 2 || window < 2) {
        bail!("--windows {windows} --window {window}: an error needs two windows of two tokens at least");
    }
    if args.attribute.is_some() && args.attribute_windows < 2 {
        bail!("--attribute-windows {}: an error needs two windows at least", args.attribute_windows);
    }
    let given = [("--window", args.window.is_some()), ("--windows", args.windows.is_some())];
    let given: Vec<&str> = given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    if texts.is_empty() && !given.is_empty() {
        super::super::say!("warning: without effect, as --text names none: {}", given.join(", "));
    }
    for task in &selection.tasks {
        let documents = setup.options.limit.map_or(task.documents(), |l| l.of(task.documents()));
        if documents < 2 {
            bail!(
                "{}: {documents} document{} to compare on; intervals and tests need two at least, give --limit 2 or more",
                task.name(),
                if documents == 1 { "" } else { "s" }
            );
        }
    }
    Ok(())
}

fn labels(args: &Args) -> Result<Vec<String>> {
    if args.labels.is_empty() {
        let mut labels: Vec<String> = args.models.iter().map(|m| model_name(m)).collect();
        // Equal folder names: the path tells them apart.
        for i in 0..labels.len() {
            if labels.iter().filter(|l| **l == labels[i]).count() > 1 {
                labels[i] = args.models[i].to_string_lossy().into_owned();
            }
        }
        return Ok(labels);
    }
    if args.labels.len() != args.models.len() {
        bail!("--labels names {}, but {} models are given", args.labels.len(), args.models.len());
    }
    Ok(args.labels.iter().map(|l| l.trim().to_owned()).collect())
}

/// Labels name rows, columns and folders.
fn check_labels(labels: &[String]) -> Result<()> {
    if let Some(at) = labels.iter().position(String::is_empty) {
        bail!("--labels: the label of model {} is empty", at + 1);
    }
    if let Some((one, other)) = clash(&labels.iter().map(String::as_str).collect::<Vec<_>>()) {
        let what = if one == other {
            format!("`{one}` stands for two models")
        } else {
            format!("`{one}` and `{other}` differ by capitals only, which this system's files do not")
        };
        bail!("{what}; give each a label of its own: --labels BF16,PTQ,…");
    }
    Ok(())
}

fn ptq(args: &Args, labels: &[String]) -> Result<Option<usize>> {
    match args.ptq.as_deref() {
        Some("none") => Ok(None),
        Some(name) => {
            let index = labels.iter().position(|l| l == name);
            let known = || labels[1..].join(", ");
            Ok(Some(index.filter(|i| *i > 0).with_context(|| format!("--ptq {name}: expected one of {}", known()))?))
        }
        None => Ok((labels.len() > 2).then_some(1)),
    }
}

fn load(args: &Args, model: &OsStr) -> Result<Loaded> {
    let folder = model_folder(model)?;
    let (checkpoint, notes) = open_noted(&folder)?;
    let text = args.tasks.text(&folder, &checkpoint.config)?;
    let notes = [&notes, text.tokenizer().notes()].concat();
    let mut facts = facts::facts(&model_name(model), &checkpoint)?;
    let identity = json!({"files": identity(&checkpoint)?, "computation": args.options.computation()});
    let decoder = args.options.load(&checkpoint)?;
    facts.resident_bytes = Some(facts::resident_bytes(&decoder));
    Ok(Loaded { decoder, text, identity, facts, notes })
}

/// Windows of a text, and what the baseline said in them.
type Kept = Rc<(Windows, Said<Rows<CpuTensor>>)>;

/// What is done with each model.
struct Work<'a> {
    args: &'a Args,
    labels: &'a [String],
    selection: &'a Selection,
    setup: &'a Setup,
    baseline: &'a Loaded,
    texts: &'a [(String, String)],
    /// What the baseline said in the windows of each text: it runs through a text once, for whatever is compared with it.
    said: RefCell<BTreeMap<String, Kept>>,
    /// What the report says about how it was measured.
    notes: RefCell<BTreeSet<String>>,
    claim: Option<&'a Claim>,
}

impl Work<'_> {
    fn kv(&self) -> KvFormat {
        self.args.options.kv_format()
    }

    fn model(&mut self, index: usize, model: &Loaded) -> Result<Evaluated> {
        let label = &self.labels[index];
        let folder = self.args.output.join(file_name(label));
        std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot create", folder.display()))?;
        let mut facts = model.facts.clone();
        if !self.args.no_speed {
            let key = json!({"model": model.identity, "on": self.args.options.speed_key()?});
            let (prefill, decode) =
                kept(&folder.join("speed.json"), &key, || Ok(facts::speed(&model.decoder, self.kv())?))?;
            (facts.prefill_speed, facts.decode_speed) = (Some(prefill), Some(decode));
        }
        let mut results = None;
        if !self.selection.tasks.is_empty() {
            let mut evaluated = EvaluatedModel::new(&model.decoder, &model.text, self.kv(), None);
            let plan = Plan::new(self.selection, self.setup, &evaluated)?;
            self.notes.borrow_mut().extend(plan.notes());
            results = run_plan(&mut evaluated, &plan, &model.identity, &folder, Shard::ALL, label, &|bytes| {
                // All models are asked the same; those before this one have theirs already.
                room(self.claim, bytes * (self.labels.len() - index) as u64)
            })?;
            if evaluated.truncated() > 0 {
                super::super::say!(
                    "warning: {label}: {} contexts were longer than the model's and lost their beginning",
                    evaluated.truncated()
                );
            }
            if let Some(results) = &results {
                results.write(
                    &folder,
                    &facts,
                    &facts_config(&facts, &model.identity, &model.notes, self.args.tasks.describe(self.setup)),
                )?;
            }
        }
        let mut divergences = Vec::new();
        let mut attributed = None;
        if index > 0 {
            for (at, (name, text)) in self.texts.iter().enumerate() {
                divergences.push(self.diverge(index, model, &folder, name, text)?);
                if at == 0
                    && let Some(mode) = self.args.attribute
                {
                    attributed = Some(self.attribute(index, model, &folder, name, text, mode)?);
                }
            }
        }
        let scores = results.as_ref().map_or_else(
            || ModelScores { model: facts.clone(), metrics: Vec::new(), generation: Vec::new() },
            |r| r.scores(facts.clone()),
        );
        Ok(Evaluated { scores, results, divergences, attribution: attributed })
    }

    fn windows(
        &self,
        models: &[EvaluatedModel<'_, CpuBackend>],
        name: &str,
        text: &str,
        limit: usize,
    ) -> Result<Windows> {
        let context = models.iter().map(TokenModel::context_length).min().unwrap_or(0);
        let window = self.args.window();
        if context < window {
            self.notes.borrow_mut().insert(format!(
                "Windows of {context} tokens instead of {window}: one of the models has no more positions."
            ));
        }
        let windows = Windows::cut(models, name, text, window.min(context), Some(limit))?;
        if let Some(padded) = &windows.padded {
            let sizes: Vec<String> = padded.iter().map(usize::to_string).collect();
            self.notes.borrow_mut().insert(format!(
                "Vocabularies of {} tokens: one is padded. KL is over the {} that both have.",
                sizes.join(" and "),
                windows.vocab
            ));
        }
        Ok(windows)
    }

    /// What the baseline says in `windows`, from an earlier model's turn if it is known.
    fn said(&self, baseline: &mut EvaluatedModel<'_, CpuBackend>, windows: &Windows) -> Result<Kept> {
        if let Some(kept) = self.said.borrow().get(&windows.name).filter(|kept| windows.begin(&kept.0)) {
            return Ok(kept.clone());
        }
        let what = format!("{}: {}", self.labels[0], windows.name);
        let bar = super::super::progress(windows.windows.len() as u64, what);
        let kept = Rc::new((windows.clone(), windows.said(baseline, &mut || bar.inc(1))?));
        bar.finish();
        self.said.borrow_mut().insert(windows.name.clone(), kept.clone());
        Ok(kept)
    }

    fn diverge(
        &self,
        index: usize,
        model: &Loaded,
        folder: &Path,
        name: &str,
        text: &str,
    ) -> Result<(Divergence, WindowSums)> {
        let pair = [self.baseline, model];
        let mut models = pair.map(|m| EvaluatedModel::new(&m.decoder, &m.text, self.kv(), None));
        let windows = self.windows(&models, name, text, self.args.windows())?;
        let key = json!({"baseline": self.baseline.identity, "model": model.identity, "windows": windows.windows});
        let file = folder.join(format!("divergence_{}.json", file_name(name)));
        let (mut divergence, sums) = kept(&file, &key, || {
            let [baseline, own] = &mut models;
            let said = self.said(baseline, &windows)?;
            let what = format!("{}: KL on {name}", self.labels[index]);
            let bar = super::super::progress(windows.windows.len() as u64, what);
            let figures = windows.diverge(baseline, &said.1, std::slice::from_mut(own), &mut || bar.inc(1))?;
            bar.finish();
            figures.into_iter().next().context("no figures of a comparison of two models")
        })?;
        divergence.model = index;
        Ok((divergence, sums))
    }

    fn attribute(
        &self,
        index: usize,
        model: &Loaded,
        folder: &Path,
        name: &str,
        text: &str,
        mode: Attribute,
    ) -> Result<Attribution> {
        let pair = [self.baseline, model];
        let mut models = pair.map(|m| EvaluatedModel::new(&m.decoder, &m.text, self.kv(), None));
        let windows = self.windows(&models, name, text, self.args.attribute_windows)?;
        let key = json!({"baseline": self.baseline.identity, "model": model.identity, "windows": windows.windows,
            "mode": format!("{mode:?}")});
        let mut found: Attribution = kept(&folder.join("attribution.json"), &key, || {
            let said = self.said(&mut models[0], &windows)?;
            let what = format!("{}: where the loss sits", self.labels[index]);
            let bar = super::super::progress(windows.windows.len() as u64, what);
            let (base, other) = (&self.baseline.decoder, &model.decoder);
            let found = attribution::attribute(
                base,
                other,
                &self.baseline.text,
                self.kv(),
                &windows,
                &said.1,
                mode.mode(),
                index,
                &mut || bar.inc(1),
            )?;
            bar.finish();
            Ok(found)
        })?;
        found.model = index;
        Ok(found)
    }
}

/// What `file` holds for `key`, or else what `make` gives, which is kept there.
fn kept<T: Serialize + DeserializeOwned>(file: &Path, key: &Value, make: impl FnOnce() -> Result<T>) -> Result<T> {
    if let Ok(text) = std::fs::read_to_string(file)
        && let Ok(mut value) = serde_json::from_str::<Value>(&text)
        && value.get("of") == Some(key)
        && let Ok(found) = serde_json::from_value(value["value"].take())
    {
        return Ok(found);
    }
    let value = make()?;
    let text = json!({"of": key, "value": value}).to_string() + "\n";
    write_atomically(file, text.as_bytes())?;
    Ok(value)
}

fn summary(
    args: &Args,
    labels: &[String],
    ptq: Option<usize>,
    selection: &Selection,
    mut evaluated: Vec<Evaluated>,
) -> Result<Comparison> {
    let mut options = CompareOptions { confidence: args.confidence, seed: args.seed, ..CompareOptions::default() };
    // A task in several groups counts with the outermost one.
    let mut groups: Vec<_> = selection.groups.iter().collect();
    groups.sort_by_key(|g| g.tasks.len());
    for group in groups {
        options.groups.extend(group.tasks.iter().map(|t| (t.clone(), group.name.clone())));
    }
    if let Some(results) = evaluated.first().and_then(|e| e.results.as_ref()) {
        options.headline =
            results.tasks.iter().map(|t| (t.name.clone(), t.headline.clone())).collect::<BTreeMap<_, _>>();
    }
    let scores: Vec<ModelScores> = evaluated.iter().map(|e| e.scores.clone()).collect();
    let (tasks, overall) = if selection.tasks.is_empty() {
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
                divergence.kl_gone = kl_gone(ptq_sums, &sums, args.confidence, options.resamples, args.seed)?;
            }
            divergences.push(divergence);
        }
    }
    let model = |(s, label): (&ModelScores, &String)| ComparedModel { facts: s.model.clone(), label: label.clone() };
    Ok(Comparison {
        models: scores.iter().zip(labels).map(model).collect(),
        ptq,
        tasks,
        overall,
        divergences,
        attributions: evaluated.iter_mut().filter_map(|e| e.attribution.take()).collect(),
        confidence: args.confidence,
        correction: CORRECTION.into(),
    })
}

fn report(args: &Args, notes: BTreeSet<String>, comparison: &Comparison) -> Result<ExitCode> {
    let context = context(args, notes, comparison);
    let write = |name: &str, text: String| write_atomically(&args.output.join(name), text.as_bytes());
    let json = serde_json::to_string_pretty(comparison)? + "\n";
    write("comparison.json", json.clone())?;
    write("report.md", markdown(comparison, &context))?;
    write("report.html", html(comparison, &context))?;
    if args.json {
        super::super::outln!("{}", json.trim_end());
    } else {
        super::super::outln!("{}", terminal(comparison, &context, WIDTH).trim_end());
        for d in &comparison.divergences {
            super::super::outln!(
                "\n{} on {}\n{}",
                comparison.models[d.model].label,
                d.text,
                d.llama_block().trim_end()
            );
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

fn context(args: &Args, measured: BTreeSet<String>, comparison: &Comparison) -> ReportContext {
    let labels: Vec<&str> = comparison.models.iter().map(|m| m.label.as_str()).collect();
    let mut notes = Vec::new();
    if let Some(limit) = args.tasks.limit {
        notes.push(format!("Documents of each task: --limit {limit}."));
    }
    if !comparison.divergences.is_empty() {
        notes.push(format!(
            "Texts in disjoint windows of at most {} tokens, at most {} windows.",
            args.window(),
            args.windows()
        ));
    }
    notes.extend(measured);
    notes.push(format!(
        "Seed of bootstrap and permutations: {}; worked examples drawn with {}.",
        args.seed, args.tasks.fewshot_seed
    ));
    let folders: Vec<Option<PathBuf>> = args.models.iter().map(|m| model_folder(m).ok()).collect();
    let recovered = labels.iter().zip(&folders).filter_map(|(label, folder)| Some((*label, folder.as_deref()?)));
    ReportContext {
        title: labels.join(" / "),
        command: std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" "),
        version: format!("recoup {}", env!("CARGO_PKG_VERSION")),
        machine: args.options.machine().unwrap_or_default(),
        notes,
        training_curves: super::curves::training_curves(recovered),
    }
}
