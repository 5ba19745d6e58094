//! `recoup convert`: a GGUF file into a BF16 checkpoint folder; a quantized checkpoint into BF16 or the other dialect; a known
//! shape into a folder of random weights.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use super::options::ShapeOptions;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::gguf;
use crate::quantize::convert::convert;
use crate::quantize::dequantize::dequantize;
use crate::quantize::random_model::RandomModel;

#[derive(clap::Args)]
pub(super) struct Args {
    /// GGUF file, or quantized checkpoint folder
    #[arg(required_unless_present = "shape")]
    model: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// What a quantized checkpoint becomes; the dialect of random weights with --recipe [modelopt unless another is named]
    #[arg(long, value_parser = super::options::dialect(Some("bf16")), default_value = "bf16")]
    to: Dialect,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let claim = crate::output::folder(&args.output)?;
    let dialect = if args.to == Dialect::Plain { Dialect::ModelOpt } else { args.to };
    if let Some(model) = args.shape.model(dialect)? {
        claim.room("the random weights", model.bytes())?;
        return random(args, &model);
    }
    let Some(model) = &args.model else { bail!("MODEL or --model-shape is needed") };
    if model.is_dir() {
        let checkpoint = super::options::open_model(model)?;
        return match args.to {
            Dialect::Plain => dequantized(args, &checkpoint),
            dialect => restated(args, &checkpoint, dialect),
        };
    }
    if !model.is_file() {
        bail!("{}: no such file or folder; convert reads GGUF files and checkpoint folders", model.display());
    }
    if args.to != Dialect::Plain {
        bail!("a GGUF file becomes BF16; `recoup quantize` the result");
    }
    let bar = super::progress(0, "converting");
    let report = gguf::import(model, &args.output, &mut |done, all, _| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish();
    let types: Vec<String> = report.source_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    super::say!(
        "{} ({}): {} tensors of {:.1} M parameters from {}",
        report.name.as_deref().unwrap_or("unnamed model"),
        report.architecture,
        report.tensors,
        report.parameters as f64 / 1e6,
        types.join(", ")
    );
    for note in &report.notes {
        super::say!("note: {note}");
    }
    super::say!("wrote {} ({} of BF16 weights)", args.output.display(), super::human_bytes(report.bytes));
    super::done()
}

fn random(args: &Args, model: &RandomModel) -> Result<ExitCode> {
    if args.to != Dialect::Plain && !args.shape.quantized() {
        bail!("--to {}: without --recipe the random weights are plain BF16", args.to);
    }
    let bar = super::progress(model.linears() as u64, "making random weights");
    let bytes = model.write(&args.output, &|| bar.inc(1))?;
    bar.finish();
    super::say!(
        "wrote {} ({} of random weights: for speed, not for text)",
        args.output.display(),
        super::human_bytes(bytes)
    );
    super::done()
}

fn restated(args: &Args, checkpoint: &Checkpoint, dialect: Dialect) -> Result<ExitCode> {
    let report = convert(checkpoint, dialect, &args.output)?;
    super::say!("{} linears from the {} dialect to {dialect}", report.modules, checkpoint.announced.dialect);
    if report.inexact > 0 {
        super::say!("note: {} global scales have no exact reciprocal and moved by one part in 2^24", report.inexact);
    }
    for note in &report.notes {
        super::say!("note: {note}");
    }
    super::name_left_out(checkpoint.tensors.folder());
    super::say!("wrote {}", args.output.display());
    super::done()
}

fn dequantized(args: &Args, checkpoint: &Checkpoint) -> Result<ExitCode> {
    let report = dequantize(checkpoint, &args.output)?;
    super::say!("{} linears dequantized from the {} dialect", report.modules, checkpoint.announced.dialect);
    if !report.dropped.is_empty() {
        let n = report.dropped.len();
        super::say!(
            "note: {n} scales of inputs or of the KV cache have no place in a BF16 model, such as {}",
            report.dropped[0]
        );
    }
    super::name_left_out(checkpoint.tensors.folder());
    super::say!("wrote {}", args.output.display());
    super::done()
}
