//! `recoup recover`: trains a quantized checkpoint against the model it was made from.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::device::on_cpu;
use super::machine::peak_memory;
use super::options::{at_least_one, calibration_text, identity, model_folder, open_model, threads};
use super::training::{self, Display, KEPT_MEMORY};
use super::training_data::DataOptions;
use crate::backend::NUMERICS_VERSION;
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::operand::Precision;
use crate::backend::autograd::recycle;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::Pending;
use crate::model::{Decoder, ModelConfig};
use crate::output;
use crate::quantize::{self, Amount, Recipe};
use crate::recover::mixture::Prepared;
use crate::recover::session::{Lesson, Session, stage_folder};
use crate::recover::stage::{Method, Stage};
use crate::recover::student::{Masters, Student, same_shape};
use crate::recover::trainer::{Event, Plan};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Quantized checkpoint folder or hub id; with --recipe, left out
    #[arg(required_unless_present = "recipe")]
    student: Option<PathBuf>,
    /// The model it was quantized from, in BF16 or packed
    #[arg(long, value_name = "MODEL")]
    teacher: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Quantize the teacher by this recipe first, and train that
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "student")]
    recipe: Option<OsString>,
    /// How to train: block, qad or qat, with settings if wanted, `block:steps=96,lr=3e-4`. Several are done in order
    #[arg(long = "method", value_name = "METHOD[:KEY=VALUE,...]", required = true)]
    methods: Vec<String>,
    #[command(flatten)]
    data: DataOptions,
    /// The plain model that the student was rounded from, where smoothing made it another than the teacher's
    /// (`recoup quantize --keep-unrounded`) [default: the teacher where the student is its rounded form, else the
    /// student's own weights]
    #[arg(long, value_name = "FOLDER", conflicts_with = "recipe")]
    unrounded: Option<PathBuf>,
    /// Steps between looks at the watched texts
    #[arg(long, value_name = "STEPS", default_value_t = 25, value_parser = at_least_one::<usize>)]
    evaluate_every: usize,
    /// End a stage after so many looks without a new best
    #[arg(long, value_name = "LOOKS", value_parser = at_least_one::<usize>)]
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

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    recycle::keep(KEPT_MEMORY);
    let stages: Vec<Stage> =
        args.methods.iter().map(|m| Stage::parse(m, args.seed)).collect::<std::result::Result<_, _>>()?;
    if args.data.length < 2 || args.data.samples == 0 {
        bail!("--length must be at least 2, and --samples at least 1");
    }
    if args.patience.is_some() && args.data.watches_nothing() {
        bail!("--patience: with --watch-samples 0 nothing is watched that could tell a new best");
    }
    if args.patience.is_some() && stages.iter().all(|s| matches!(s.method, Method::Block(_))) {
        super::say!("note: --patience is without effect: block training has a look at its end only");
    }
    if args.keep_stages && stages.len() == 1 {
        super::say!("note: --keep-stages is without effect: there is one method, and what it gives is the output");
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads(args.threads)).build()?.install(|| train(args, stages))
}

fn train(args: &Args, stages: Vec<Stage>) -> Result<ExitCode> {
    let start = Instant::now();
    let (training, claim) = training::begin(&args.output, args.resume)?;
    let mut claims = vec![claim];
    if args.keep_stages {
        for (i, stage) in stages.iter().enumerate().take(stages.len() - 1) {
            let folder = stage_folder(claims[0].target(), i, &stage.name);
            // There already, if the run was killed after this stage.
            if !(args.resume && folder.exists()) {
                claims.push(output::folder(&folder)?);
            }
        }
    }
    let teacher = open_model(&model_folder(&args.teacher)?)?;
    // By the teacher's tokenizer where the student is still to be made of it; all that can be wrong with data is found
    // before anything takes time.
    let made_from = match &args.student {
        Some(student) if args.recipe.is_none() => Some(Checkpoint::open(&model_folder(student)?)?),
        _ => None,
    };
    let made_from = made_from.as_ref().unwrap_or(&teacher);
    let positions = ModelConfig::read(&made_from.config)?.max_positions;
    if args.data.length > positions {
        bail!("--length {}: the model has {positions} positions", args.data.length);
    }
    let sources = args.data.sources(made_from, &teacher)?;
    let teacher_identity = identity(&teacher)?;
    let (folder, unrounded) = match &args.recipe {
        Some(recipe) => {
            let recipe = Recipe::find(recipe)?;
            let amount = Amount { samples: recipe.samples(), length: 512 };
            let text = calibration_text(None, amount, &teacher, None)?;
            let backend = || on_cpu(threads(args.threads));
            let bar = super::progress(0, "");
            let made = quantize::apply_once(
                (&teacher, &teacher_identity),
                backend,
                &text,
                &recipe,
                &training,
                &mut |what, done, all| bar.at(what, done, all),
            )?;
            bar.finish();
            (made.quantized, Some(made.unrounded))
        }
        None => {
            let unrounded = args.unrounded.as_deref().map(model_folder).transpose()?;
            (model_folder(args.student.as_deref().unwrap_or(Path::new("")))?, unrounded)
        }
    };
    let checkpoint = open_model(&folder)?;
    let unrounded = unrounded.map(|f| Checkpoint::open(&f)).transpose()?;
    let config = ModelConfig::read(&checkpoint.config)?;
    same_shape(&config, &checkpoint, &ModelConfig::read(&teacher.config)?, &teacher)?;
    let Prepared { data, watched, sources, watched_sources } =
        args.data.prepare(sources, (&teacher, &teacher_identity), &training, args.seed, args.threads)?;

    let backend = AutogradBackend::with_precision(if args.f32 { Precision::F32 } else { Precision::Bf16 });
    let masters = Masters::of(&checkpoint, &teacher, unrounded.as_ref())?;
    let mut student = Student::load(&checkpoint, masters.checkpoint(), backend.clone())?;
    let state: u64 = student.state(None, true).iter().map(Pending::bytes).sum();
    claims[0].room("the training's state with the result", state + checkpoint.tensors.file_bytes())?;
    let decoder = Decoder::load(backend, &teacher)?;
    let unrounded_weights = unrounded.as_ref().map_or(Ok(Value::Null), identity)?;
    let about = json!({
        "recoup_version": env!("CARGO_PKG_VERSION"),
        "numerics": NUMERICS_VERSION,
        "student": {"files": identity(&checkpoint)?, "recipe": args.recipe.as_deref().map(OsStr::to_string_lossy)},
        "teacher": {"files": teacher_identity},
        "masters": masters.describe(unrounded_weights["weights"].as_str().unwrap_or_default()),
        "methods": stages.iter().map(Stage::describe).collect::<Vec<_>>(),
        "chat_template_kwargs": args.data.template.chat_template_kwargs,
        "data": {"description": data.description, "sha256": data.hash(), "length": args.data.length,
            "assistant_only": args.data.assistant_only, "sources": sources},
        "watched": watched_sources,
        "evaluate_every": args.evaluate_every,
        "patience": args.patience,
        "products": if args.f32 { "f32" } else { "bf16 operands, f32 sums" },
    });
    let mut session = Session::open(&training, args.resume, about)?;
    let about = session.about();
    super::say!(
        "{} linears, {} weights; masters from {}",
        student.parameters.iter().filter(|p| p.is_quantized()).count(),
        student.parameters.iter().filter(|p| p.is_quantized()).map(|p| p.master().len()).sum::<usize>(),
        about["masters"].as_str().unwrap_or_default()
    );
    super::say!("data: {}", data.description);
    let plan = Plan {
        stages,
        evaluate_every: args.evaluate_every,
        patience: args.patience,
        save_every: Duration::from_secs(args.save_every),
    };
    let mut display = Display::new(&plan, config.layers.len());
    let stages_beside = args.keep_stages.then(|| claims[0].target());
    let lesson = Lesson { plan: &plan, teacher: Some(&decoder), data: &data, watched, stages_beside };
    let show = &mut |event: &Event| display.show(event);
    let outcome = session.train(&mut student, &checkpoint, lesson, show, recycle::release)?;
    display.bar.finish();
    let mut record = session.about().clone();
    record["watched_loss"] = outcome.watched_loss();
    if let Some(error) = &outcome.stopped {
        record["stopped"] = Value::from(error.to_string());
    }
    session.write(&student, &checkpoint, &record, &args.output)?;
    super::name_left_out(checkpoint.tensors.folder());
    drop((student, checkpoint, unrounded));
    session.close()?;
    super::say!(
        "wrote {} in {:.1} s{}",
        args.output.display(),
        start.elapsed().as_secs_f64(),
        peak_memory().map_or_else(String::new, |bytes| format!(", peak memory {}", super::human_bytes(bytes)))
    );
    match outcome.stopped {
        None => super::done(),
        Some(error) => Err(anyhow::Error::from(error)
            .context(format!("training ended early; {} has the best weights until then", args.output.display()))),
    }
}
