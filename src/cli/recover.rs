//! `recoup recover`: trains a quantized checkpoint against the model it was made from.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::generated::{self, Opening};
use super::options::model_folder;
use crate::backend::autograd::AutogradBackend;
use crate::backend::cpu::operand::Precision;
use crate::backend::cpu::{CpuBackend, isa::Isa, recycle};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::checkpoint::write::FolderWriter;
use crate::model::{Decoder, ModelConfig};
use crate::quantize::{self, Recipe};
use crate::recover::RecoverError;
use crate::recover::data::{self, Data, Document, Part, Row};
use crate::recover::distill::Watched;
use crate::recover::run_folder::RunFolder;
use crate::recover::sources::Reader;
use crate::recover::stage::Stage;
use crate::recover::student::{self, CURVE_FILE, RECORD_FILE, Student};
use crate::recover::trainer::{Event, Plan, Run};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Quantized checkpoint folder or hub id; with --recipe, left out
    #[arg(required_unless_present = "recipe")]
    student: Option<String>,
    /// The model it was quantized from, in BF16 or packed
    #[arg(long, value_name = "MODEL")]
    teacher: String,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Quantize the teacher by this recipe first, and train that
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "student")]
    recipe: Option<String>,
    /// How to train: block, qad or qat, with settings if wanted, `block:steps=96,lr=3e-4`. Several are done in order
    #[arg(long = "method", value_name = "METHOD[:KEY=VALUE,...]", required = true)]
    methods: Vec<String>,
    /// What to train on: text, or conversations or documents (.jsonl with `messages` or `text` in each line); `teacher`
    /// and `teacher-chat` are texts and conversations that the teacher writes itself, `built-in` is a short shipped text.
    /// Several share the sequences equally, or as their weights say
    #[arg(long, value_name = "FILE[=WEIGHT]", required = true)]
    data: Vec<String>,
    /// Text to measure the KL on while training, best of another kind than the data; the weights that do best on it are
    /// kept [default: a part of the data that is held out, and a short built-in text]
    #[arg(long, value_name = "FILE")]
    watch: Vec<PathBuf>,
    /// Of conversations, learn only what the assistant says
    #[arg(long)]
    assistant_only: bool,
    /// The plain model that the student was rounded from, where smoothing made it another than the teacher's
    /// (`recoup quantize --keep-unrounded`) [default: the teacher where the student is its rounded form, else the
    /// student's own weights]
    #[arg(long, value_name = "FOLDER", conflicts_with = "recipe")]
    unrounded: Option<String>,
    /// Sequences to train on, in all
    #[arg(long, default_value_t = 128)]
    samples: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Sequences of each watched text
    #[arg(long, default_value_t = 8)]
    watch_samples: usize,
    /// Steps between looks at the watched texts
    #[arg(long, value_name = "STEPS", default_value_t = 25)]
    evaluate_every: usize,
    /// End a stage after so many looks without a new best
    #[arg(long, value_name = "LOOKS")]
    patience: Option<usize>,
    /// Write what each method but the last gives as well, to FOLDER-1-METHOD and so on
    #[arg(long)]
    keep_stages: bool,
    /// Order of the data
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on with a run that was interrupted; the result is the same to the byte
    #[arg(long)]
    resume: bool,
    /// Seconds between saves of the training state, which lies in FOLDER.training until the end
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    save_every: u64,
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Multiply in f32 instead of BF16 with f32 sums: slower, the reference
    #[arg(long)]
    f32: bool,
}

/// The name of the shipped text as data.
const BUILT_IN: &str = "built-in";
/// Freed memory that a training step finds again in the next, bytes.
pub(super) const KEPT_MEMORY: usize = 4 << 30;
/// Held-out sequences are at most this share of the data.
const HELD_OUT: usize = 8;

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    recycle::keep(KEPT_MEMORY);
    let stages: Vec<Stage> =
        args.methods.iter().map(|m| Stage::parse(m, args.seed)).collect::<std::result::Result<_, _>>()?;
    if args.length < 2 || args.samples == 0 {
        bail!("--length must be at least 2, and --samples at least 1");
    }
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?.install(|| train(args, stages))
}

fn train(args: &Args, stages: Vec<Stage>) -> Result<ExitCode> {
    let start = Instant::now();
    drop(FolderWriter::create(&args.output)?);
    let training = training_folder(&args.output)?;
    if args.keep_stages && !args.resume {
        for (i, stage) in stages.iter().enumerate().take(stages.len() - 1) {
            drop(FolderWriter::create(&stage_folder(&args.output, i, &stage.name))?);
        }
    }
    if training.exists() && !args.resume {
        bail!(
            "{}: a run for the same output was interrupted; go on with --resume, or remove that folder",
            training.display()
        );
    }
    let teacher_folder = model_folder(&args.teacher)?;
    let teacher = Checkpoint::open(&teacher_folder)?;
    let (folder, unrounded) = match &args.recipe {
        Some(recipe) => {
            let recipe = Recipe::find(recipe)?;
            // By name, so that a run that goes on with another recipe does not take the first one's student.
            let place = |what: &str| training.join(format!("{what}-{}", recipe.name));
            let (folder, unrounded) = (place("student"), place("unrounded"));
            if !folder.exists() {
                make_student(args, &recipe, &teacher, &teacher_folder, &folder, &unrounded)?;
            }
            (folder, Some(unrounded))
        }
        None => {
            let unrounded = args.unrounded.as_deref().map(model_folder).transpose()?;
            (model_folder(args.student.as_deref().unwrap_or_default())?, unrounded)
        }
    };
    let checkpoint = Checkpoint::open(&folder)?;
    let unrounded = unrounded.map(|f| Checkpoint::open(&f)).transpose()?;
    let config = ModelConfig::read(&checkpoint.config)?;
    student::same_shape(&config, &checkpoint, &ModelConfig::read(&teacher.config)?, &teacher)?;
    if args.length > config.max_positions {
        bail!("--length {}: the model has {} positions", args.length, config.max_positions);
    }
    let (data, watched) = read_data(args, &folder, &teacher, &training)?;

    let backend = AutogradBackend::with_precision(if args.f32 { Precision::F32 } else { Precision::Bf16 });
    let rounded_from_teacher = unrounded.is_none() && student::is_rounded_from(&checkpoint, &teacher, &config)?;
    let masters = unrounded.as_ref().or(rounded_from_teacher.then_some(&teacher));
    let mut student = Student::load(&checkpoint, masters, backend.clone())?;
    let decoder = Decoder::load(backend, &teacher)?;
    let about = json!({
        "recoup_version": env!("CARGO_PKG_VERSION"),
        "student": {"sha256": weights_hash(&checkpoint)?, "recipe": args.recipe},
        "teacher": {"sha256": weights_hash(&teacher)?},
        "masters": match (&unrounded, rounded_from_teacher) {
            (Some(u), _) => format!("unrounded model, sha256 {}", weights_hash(u)?),
            (None, true) => "the teacher's weights".into(),
            (None, false) => "the student's own weights".into(),
        },
        "methods": stages.iter().map(Stage::describe).collect::<Vec<_>>(),
        "data": {"description": data.description, "sha256": data.hash(), "length": args.length},
        "watched": watched.iter().map(|(name, d)| json!({"name": name, "sha256": d.hash()})).collect::<Vec<_>>(),
        "evaluate_every": args.evaluate_every,
        "patience": args.patience,
        "products": if args.f32 { "f32" } else { "bf16 operands, f32 sums" },
    });
    let resumed = if args.resume { RunFolder::resume(&training, &about)? } else { None };
    let mut run_folder = match resumed {
        Some(folder) => folder,
        None => RunFolder::create(&training, &about)?,
    };
    eprintln!(
        "{} linears, {} weights; masters from {}",
        student.parameters.iter().filter(|p| p.is_quantized()).count(),
        student.parameters.iter().filter(|p| p.is_quantized()).map(|p| p.master().len()).sum::<usize>(),
        about["masters"].as_str().unwrap_or_default()
    );
    eprintln!("data: {}", data.description);
    let watched = watched
        .into_iter()
        .map(|(name, data)| Watched::new(name, data.rows, Some(&decoder)))
        .collect::<std::result::Result<Vec<_>, _>>()?;

    let plan = Plan {
        stages,
        evaluate_every: args.evaluate_every,
        patience: args.patience,
        save_every: Duration::from_secs(args.save_every),
    };
    let mut display = Display::new(&plan, config.layers, "KL");
    let mut after = |stage: usize, student: &Student| -> std::result::Result<(), RecoverError> {
        if !args.keep_stages {
            return Ok(());
        }
        let out = stage_folder(&args.output, stage, &plan.stages[stage].name);
        if out.exists() {
            // Of a run that was killed after this stage.
            return Ok(());
        }
        let mut record = about.clone();
        if let Some(methods) = record["methods"].as_array_mut() {
            methods.truncate(stage + 1);
        }
        student.write(&checkpoint, &[(RECORD_FILE, format!("{record:#}\n").into_bytes())], &out)
    };
    let mut run = Run {
        teacher: Some(&decoder),
        data: &data,
        watched: &watched,
        plan: &plan,
        folder: &mut run_folder,
        show: &mut |event| display.show(event),
        after: &mut after,
    };
    let outcome = run.train(&mut student)?;
    display.bar.finish_and_clear();
    let mut record = about;
    record["watched_kl"] = summary(&outcome.events);
    if let Some(error) = &outcome.stopped {
        record["stopped"] = Value::from(error.to_string());
    }
    let files = [(RECORD_FILE, format!("{record:#}\n").into_bytes()), (CURVE_FILE, run_folder.curve()?)];
    student.write(&checkpoint, &files, &args.output)?;
    drop((student, checkpoint, unrounded));
    run_folder.remove()?;
    eprintln!(
        "wrote {} in {:.1} s{}",
        args.output.display(),
        start.elapsed().as_secs_f64(),
        super::quantize::peak_memory()
            .map_or_else(String::new, |bytes| format!(", peak memory {}", super::human_bytes(bytes)))
    );
    match outcome.stopped {
        None => super::done(),
        Some(error) => Err(anyhow::Error::from(error)
            .context(format!("training ended early; {} has the best weights until then", args.output.display()))),
    }
}

/// Where a run keeps its state: beside the output.
pub(super) fn training_folder(output: &Path) -> Result<PathBuf> {
    let name = output.file_name().with_context(|| format!("{} is no name for an output", output.display()))?;
    Ok(output.with_file_name(format!("{}.training", name.to_string_lossy())))
}

/// Where the student goes after a stage that is not the last.
fn stage_folder(output: &Path, stage: usize, method: &str) -> PathBuf {
    let name = output.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    output.with_file_name(format!("{name}-{}-{method}", stage + 1))
}

fn make_student(
    args: &Args,
    recipe: &Recipe,
    teacher: &Checkpoint,
    teacher_folder: &Path,
    folder: &Path,
    unrounded: &Path,
) -> Result<()> {
    let samples = super::quantize::default_samples(recipe);
    let text = super::quantize::calibration_text(None, samples, 512, teacher, teacher_folder)?;
    let backend = CpuBackend::new(Isa::detect(), args.threads)?;
    let bar = super::progress(0, "");
    // Of a run that was killed in between.
    if unrounded.exists() {
        std::fs::remove_dir_all(unrounded).with_context(|| format!("{}: cannot be removed", unrounded.display()))?;
    }
    let places = quantize::Places { out: folder, unrounded: Some(unrounded) };
    quantize::apply(teacher, &backend, &text, recipe, Dialect::ModelOpt, places, &mut |what, done, all| {
        if done == 0 {
            bar.set_message(what);
            bar.reset_eta();
        }
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// The training data, and what is watched, by name.
fn read_data(args: &Args, folder: &Path, teacher: &Checkpoint, training: &Path) -> Result<(Data, Vec<(String, Data)>)> {
    let reader = Reader::of(folder, args.assistant_only)?;
    let mut parts = Vec::new();
    let mut held_out = Vec::new();
    let specs = args.data.iter().map(|spec| match spec.rsplit_once('=').map(|(f, w)| (f, w.parse::<f64>())) {
        Some((file, Ok(share))) => (file, share),
        _ => (spec.as_str(), 1.0),
    });
    let specs: Vec<(&str, f64)> = specs.collect();
    let total: f64 = specs.iter().map(|s| s.1).sum();
    for (source, share) in specs {
        let opening = match source {
            "teacher" => Some(Opening::Document),
            "teacher-chat" => Some(Opening::Chat),
            _ => None,
        };
        let file = Path::new(source);
        let mut rows = match opening {
            None if source == BUILT_IN => built_in(&reader, args.length)?,
            None => rows(&reader, file, args.length)?,
            Some(opening) => {
                let count = (share / total * args.samples as f64).ceil().max(1.0) as usize;
                let file = training.join(format!("{source}.json"));
                generated::rows(teacher, opening, count, args.length, args.seed, args.threads, &file)?
            }
        };
        let name = file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        if args.watch.is_empty() && opening.is_none() {
            let count = args.watch_samples.div_ceil(args.data.len()).min(rows.len() / HELD_OUT);
            held_out.extend(rows.split_off(rows.len() - count));
        }
        parts.push(Part { name, rows, share });
    }
    let data = Data::mix(&parts, args.samples)?;
    let mut watched = Vec::new();
    let mut watch = |name: &str, rows: &[Row]| {
        let rows = data::spread(rows, args.watch_samples);
        if !rows.is_empty() {
            watched.push((name.to_owned(), Data { rows, description: name.into() }));
        }
    };
    if args.watch.is_empty() {
        watch("data, held out", &held_out);
        if !args.data.iter().any(|d| d.split('=').next() == Some(BUILT_IN)) {
            watch("built-in text", &built_in(&reader, args.length)?);
        }
    }
    for file in &args.watch {
        let name = file.file_stem().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        watch(&name, &rows(&reader, file, args.length)?);
    }
    Ok((data, watched))
}

/// The shipped text as rows.
fn built_in(reader: &Reader, length: usize) -> Result<Vec<Row>> {
    let text = reader.tokenizer.encode(super::quantize::BUILT_IN_TEXT, false)?;
    Ok(data::pack(&[Document::text(text)], length, false))
}

/// A file as rows of at most `length` tokens.
pub(super) fn rows(reader: &Reader, file: &Path, length: usize) -> Result<Vec<Row>> {
    let source = reader.read(file)?;
    let tokens: usize = source.documents.iter().map(|d| d.tokens.len()).sum();
    if tokens == 0 {
        bail!("{}: the text is empty", file.display());
    }
    if tokens < length && !source.whole {
        bail!(
            "{}: {tokens} tokens are less than one sequence of {length}; give more text, or --length {tokens}",
            file.display()
        );
    }
    Ok(data::pack(&source.documents, length, source.whole))
}

/// SHA-256 of all tensors with their names and types.
fn weights_hash(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    for name in checkpoint.tensors.names() {
        let Some(view) = checkpoint.tensors.peek(name) else { continue };
        hash.update(name.as_bytes());
        hash.update(format!("{:?}{:?}", view.dtype, view.shape));
        hash.update(view.bytes);
        checkpoint.tensors.release_pages();
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// KL on the watched texts at the beginning, and of what was kept at the end.
fn summary(events: &[Event]) -> Value {
    let looks = || {
        events.iter().filter_map(|e| {
            if let Event::Watched { stage, step, loss, .. } = e { Some((*stage, *step, loss)) } else { None }
        })
    };
    let kept = events
        .iter()
        .rev()
        .find_map(|e| if let Event::Kept { stage, step } = e { Some((*stage, *step)) } else { None });
    let after = looks().find(|l| Some((l.0, l.1)) == kept).map(|l| l.2);
    json!({"before": looks().next().map(|l| l.2), "after": after})
}

/// Events on the terminal.
pub(super) struct Display {
    pub bar: ProgressBar,
    /// What is measured on the watched texts.
    what: &'static str,
    stages: Vec<(String, usize)>,
    current: Option<usize>,
    last: Option<Event>,
    began: Instant,
}

impl Display {
    pub(super) fn new(plan: &Plan, layers: usize, what: &'static str) -> Self {
        let stages = plan.stages.iter().map(|s| (s.name.clone(), s.length(layers))).collect();
        Self { bar: super::progress(0, "training"), what, stages, current: None, last: None, began: Instant::now() }
    }

    fn enter(&mut self, stage: usize) {
        if self.current == Some(stage) {
            return;
        }
        self.current = Some(stage);
        if let Some((name, length)) = self.stages.get(stage) {
            self.bar.set_message(name.clone());
            self.bar.set_length(*length as u64);
            self.bar.set_position(0);
            self.bar.reset_eta();
        }
    }

    pub(super) fn show(&mut self, event: &Event) {
        let name = |stage: usize| self.stages.get(stage).map_or(String::new(), |s| s.0.clone());
        let clock = format!("{:>6.0} s", self.began.elapsed().as_secs_f64());
        let line = match event {
            Event::Block { stage, block, before, after } => {
                let line = format!("{clock}  {} {block:>3}: relative error {before:.5} to {after:.5}", name(*stage));
                self.enter(*stage);
                self.bar.set_position(*block as u64 + 1);
                Some(line)
            }
            Event::Step { stage, point } => {
                self.enter(*stage);
                self.bar.set_position(point.step as u64);
                None
            }
            Event::Watched { stage, step, loss, score } => {
                let own = match &self.last {
                    Some(Event::Step { point: p, .. }) => {
                        format!(", loss on the data {:.4}", if p.kl > 0.0 { p.kl } else { p.cross_entropy })
                    }
                    _ => String::new(),
                };
                let values: Vec<String> =
                    loss.iter().map(|(n, v)| format!("{n} {:.4}", v.as_f64().unwrap_or(0.0))).collect();
                let watched = match values.is_empty() {
                    true => "nothing is watched".into(),
                    false => format!("{} on {} ({:.1} %)", self.what, values.join(", "), 100.0 * score),
                };
                Some(format!("{clock}  {} step {step}: {watched}{own}", name(*stage)))
            }
            Event::Kept { stage, step } => Some(format!("{clock}  {}: kept step {step}", name(*stage))),
        };
        if let Some(line) = line {
            if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
        }
        self.last = Some(event.clone());
    }
}
