//! `recoup recover`: trains a quantized checkpoint against the model it was made from.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};

use super::options::model_folder;
use crate::backend::autograd::AutogradBackend;
use crate::backend::cpu::operand::Precision;
use crate::checkpoint::Checkpoint;
use crate::model::Decoder;
use crate::recover::data::Data;
use crate::recover::student::Student;
use crate::recover::{block, distill};
use crate::text::Tokenizer;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Quantized checkpoint folder or hub id
    student: String,
    /// The model it was quantized from, in BF16 or packed
    #[arg(long, value_name = "MODEL")]
    teacher: String,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// How to train: block, qad or qat, with settings if wanted, `block:steps=96,lr=3e-4`. Several are done in order
    #[arg(long = "method", value_name = "METHOD[:KEY=VALUE,...]", required = true)]
    methods: Vec<String>,
    /// Text to train on; several files share the sequences equally
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// The plain model that the student was rounded from, where smoothing made it another than the teacher's
    /// (`recoup quantize --keep-unrounded`) [default: the student's own weights]
    #[arg(long, value_name = "FOLDER")]
    unrounded: Option<String>,
    /// Sequences of text, in all
    #[arg(long, default_value_t = 128)]
    samples: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Multiply in f32 instead of BF16 with f32 sums: slower, the reference
    #[arg(long)]
    f32: bool,
}

/// Freed memory that a training step finds again in the next, bytes.
const KEPT_MEMORY: usize = 4 << 30;

/// One method with its settings.
enum Stage {
    Block(block::Options),
    Distill(distill::Options),
}

impl Stage {
    /// `METHOD[:KEY=VALUE,...]`; keys are the fields of the method's options, `lr` is short for `learning_rate`.
    fn parse(text: &str) -> Result<(Value, Self)> {
        let (method, settings) = text.split_once(':').unwrap_or((text, ""));
        let mut map = Map::new();
        if method == "qat" {
            map.insert("kl".into(), json!(0.0));
            map.insert("cross_entropy".into(), json!(1.0));
        }
        for setting in settings.split(',').filter(|s| !s.is_empty()) {
            let Some((key, value)) = setting.split_once('=') else {
                bail!("--method {text}: `{setting}` is no KEY=VALUE");
            };
            let key = if key == "lr" { "learning_rate" } else { key };
            let value = serde_json::from_str(value)
                .with_context(|| format!("--method {text}: `{value}` is neither a number nor true or false"))?;
            map.insert(key.into(), value);
        }
        let settings = Value::Object(map);
        let wrong = || format!("--method {text}: the settings do not fit");
        let stage = match method {
            "block" => Self::Block(serde_json::from_value(settings).with_context(wrong)?),
            "qad" | "qat" => Self::Distill(serde_json::from_value(settings).with_context(wrong)?),
            other => bail!("--method {other}: expected block, qad or qat"),
        };
        let all = match &stage {
            Self::Block(o) => serde_json::to_value(o)?,
            Self::Distill(o) => serde_json::to_value(o)?,
        };
        Ok((json!({"method": method, "settings": all}), stage))
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    crate::backend::cpu::recycle::keep(KEPT_MEMORY);
    let stages: Vec<(Value, Stage)> = args.methods.iter().map(|m| Stage::parse(m)).collect::<Result<_>>()?;
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?.install(|| train(args, stages))
}

fn train(args: &Args, stages: Vec<(Value, Stage)>) -> Result<ExitCode> {
    let start = Instant::now();
    let folder = model_folder(&args.student)?;
    let checkpoint = Checkpoint::open(&folder)?;
    drop(crate::checkpoint::write::FolderWriter::create(&args.output)?);
    let teacher = Checkpoint::open(&model_folder(&args.teacher)?)?;
    let unrounded = args.unrounded.as_deref().map(model_folder).transpose()?;
    let unrounded = unrounded.map(|f| Checkpoint::open(&f)).transpose()?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let mut data = Data::default();
    for file in &args.data {
        let tokens = tokenizer.encode(&super::read_text(file)?, false)?;
        let windows = super::quantize::windows(&tokens, args.samples.div_ceil(args.data.len()), args.length);
        if windows.is_empty() {
            bail!("{}: the text is empty", file.display());
        }
        data.sequences.extend(windows);
    }
    let backend = AutogradBackend::with_precision(if args.f32 { Precision::F32 } else { Precision::Bf16 });
    let mut student = Student::load(&checkpoint, unrounded.as_ref(), backend.clone())?;
    let teacher_model = Decoder::load(backend, &teacher)?;
    let mut record = Vec::new();
    for (description, stage) in stages {
        let bar = super::progress(0, "training");
        let began = Instant::now();
        let result = match stage {
            Stage::Block(options) => {
                let mut shown = |done, all| {
                    bar.set_length(all as u64);
                    bar.set_position(done as u64);
                };
                let reports = block::train(&mut student, &teacher_model, &data, &options, &mut shown)?;
                for r in &reports {
                    eprintln!("block {:>3}: relative error {:.5} to {:.5}", r.block, r.before, r.after);
                }
                serde_json::to_value(reports)?
            }
            Stage::Distill(options) => {
                bar.set_length(options.steps as u64);
                let curve = distill::train(&mut student, Some(&teacher_model), &data, &options, &mut |point, _| {
                    bar.set_position(point.step as u64);
                    eprintln!("{:.2} s {point:?}", began.elapsed().as_secs_f64());
                    Ok(())
                })?;
                serde_json::to_value(curve)?
            }
        };
        bar.finish_and_clear();
        eprintln!("{}: {:.1} s", description["method"].as_str().unwrap_or(""), began.elapsed().as_secs_f64());
        record.push(json!({"stage": description, "result": result}));
    }
    student.write(&checkpoint, &Value::Array(record), &args.output)?;
    eprintln!("wrote {} in {:.1} s", args.output.display(), start.elapsed().as_secs_f64());
    super::done()
}
