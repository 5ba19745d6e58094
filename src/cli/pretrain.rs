//! `recoup pretrain`: trains a small model from scratch.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use recoup_ground::records;
use serde_json::{Value, json};

use super::options::{at_least_one, text_to_read};
use super::training::{self, DeviceOptions, Display, KEPT_MEMORY, name_device, room_to_multiply};
use crate::backend::autograd::AutogradBackend;
use crate::backend::autograd::operand::Precision;
use crate::backend::autograd::recycle;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::json::Object;
use crate::corpus::{Reader, spread};
use crate::model::ModelConfig;
use crate::recover::data::{Data, Part};
use crate::recover::mixture::{same_file_twice, told};
use crate::recover::pace::Pace;
use crate::recover::pretrain::initialize;
use crate::recover::session::{Lesson, Session};
use crate::recover::stage::Stage;
use crate::recover::student::Student;
use crate::recover::trainee::Trainee;
use crate::recover::trainer::{Event, Plan, Told};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder with the config.json and tokenizer of the model to be
    shape: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// What to train on: text, or records with `text`, as in `recoup recover --data`
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Text to measure the cross-entropy on while training
    #[arg(long, value_name = "FILE", required = true)]
    watch: Vec<PathBuf>,
    /// Settings of the training: `steps=2000,lr=2e-3,sequences=16,warmup=100`; those of `recoup recover --method qat`
    #[arg(long, value_name = "KEY=VALUE,...", default_value = "steps=2000,lr=2e-3,sequences=16,warmup=100")]
    settings: String,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Sequences of each watched text
    #[arg(long, default_value_t = 32, value_parser = at_least_one::<usize>)]
    watch_samples: usize,
    /// Steps between looks at the watched texts
    #[arg(long, value_name = "STEPS", default_value_t = 250, value_parser = at_least_one::<usize>)]
    evaluate_every: usize,
    /// Of the first weights and of the order of the data
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on with a run that was interrupted; the result is the same to the byte
    #[arg(long)]
    resume: bool,
    /// Seconds between saves of the training state, which lies in FOLDER.training until the end
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    save_every: u64,
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    device: DeviceOptions,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    super::ranks::alone("pretrain", "only recover is shared out")?;
    recycle::keep(KEPT_MEMORY);
    let stage = Stage::parse(&format!("qat:{}", args.settings), args.seed)?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(super::options::threads(args.threads))
        .build()?
        .install(|| train(args, stage))
}

fn train(args: &Args, stage: Stage) -> Result<ExitCode> {
    let start = Instant::now();
    let multiplier = args.device.multiplier()?;
    let (training, _claim) = training::begin(&args.output, args.resume)?;
    let config = Object::read(&args.shape.join("config.json"))?;
    let shape = ModelConfig::read(&config)?;
    if args.length < 2 || args.length > shape.max_positions {
        bail!("--length {}: expected 2 to {}, the positions of the model", args.length, shape.max_positions);
    }
    let text = text_to_read(&args.shape, &config, None)?;
    let reader = Reader { text, assistant_only: false, ends: true };
    let read = |files: &[PathBuf]| -> Result<(Vec<Part>, Vec<Value>)> {
        same_file_twice(files)?;
        let one = |(file, name): (&PathBuf, String)| {
            let (rows, counts) = told(&reader, file, &name, args.length, None, &mut |note| super::say!("{note}"))?;
            let about = json!({"name": name, "read": counts});
            Ok((Part { name, rows, share: 1.0 }, about))
        };
        let named = files.iter().zip(records::distinct_names(files, &[]));
        Ok(named.map(one).collect::<Result<Vec<_>>>()?.into_iter().unzip())
    };
    let (mut parts, sources) = read(&args.data)?;
    let all: usize = parts.iter().map(|p| p.rows.len()).sum();
    parts.iter_mut().for_each(|p| p.share = p.rows.len() as f64);
    let data = Data::mix(&parts, all)?;
    let (watched, _) = read(&args.watch)?;
    let watched: Vec<(String, Data)> = watched
        .into_iter()
        .map(|p| (p.name.clone(), Data { rows: spread(&p.rows, args.watch_samples), description: p.name }))
        .collect();

    let mut about = json!({
        "recoup_version": env!("CARGO_PKG_VERSION"),
        "config": config.value(),
        "seed": args.seed,
        "methods": [stage.describe()],
        "data": {"description": data.description, "sha256": data.hash(), "length": args.length, "sources": sources},
        "watched": watched.iter().map(|(name, d)| json!({"name": name, "sha256": d.hash()})).collect::<Vec<_>>(),
        "evaluate_every": args.evaluate_every,
    });
    name_device(&mut about, &multiplier);
    let mut session = Session::open(&training, args.resume, about)?;
    let initial = training.join("initial");
    if !initial.exists() {
        initialize(&shape, &args.shape, args.seed, &initial)?;
    }
    let checkpoint = Checkpoint::open(&initial)?;
    let backend = AutogradBackend::multiplied_by(multiplier.clone(), Precision::Bf16);
    let student = Student::load_plain(&checkpoint, backend)?;
    let tokens = stage.at_once() * args.length;
    room_to_multiply(&multiplier, &student.decoder.config, (1, Precision::Bf16), tokens)?;
    let weights: usize = student.parameters.iter().map(|p| p.master().len()).sum();
    super::say!("{weights} weights; data: {}", data.description);
    let plan = Plan {
        stages: vec![stage],
        evaluate_every: args.evaluate_every,
        patience: None,
        save_every: Duration::from_secs(args.save_every),
    };
    let mut display = Display::new(&plan, student.decoder.config.layers.len());
    let pace = Pace::new(&plan.stages, &[], plan.evaluate_every);
    let lesson = Lesson { plan: &plan, data: &data, watched, pace, stages_beside: None };
    let mut trainee = Trainee::Whole { student: Box::new(student), teacher: None };
    let show = &mut |event: &Event, told: Told| display.show(event, told);
    let outcome = session.train(&mut trainee, &checkpoint, lesson, show, || ())?;
    display.bar.finish();
    session.write(&*trainee.trained(), &checkpoint, session.about(), None, &args.output)?;
    drop((trainee, checkpoint));
    session.close()?;
    super::say!("wrote {} in {:.1} s", args.output.display(), start.elapsed().as_secs_f64());
    match outcome.stopped {
        None => super::done(),
        Some(error) => Err(error.into()),
    }
}
