//! `recoup convert`: a GGUF file, or a quantized checkpoint, into a BF16 checkpoint folder.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::checkpoint::Checkpoint;
use crate::quantize::dequantize::dequantize;

#[derive(clap::Args)]
pub(super) struct Args {
    /// GGUF file, or quantized checkpoint folder
    model: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.model.is_dir() {
        return dequantized(args);
    }
    if !args.model.is_file() {
        bail!("{}: no such file or folder; convert reads GGUF files and checkpoint folders", args.model.display());
    }
    let bar = super::progress(0, "converting");
    let report = crate::checkpoint::gguf::import(&args.model, &args.output, &mut |done, all, _| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let types: Vec<String> = report.source_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    eprintln!(
        "{} ({}): {} tensors of {:.1} M parameters from {}",
        report.name.as_deref().unwrap_or("unnamed model"),
        report.architecture,
        report.tensors,
        report.parameters as f64 / 1e6,
        types.join(", ")
    );
    for note in &report.notes {
        eprintln!("note: {note}");
    }
    eprintln!("wrote {} ({} of BF16 weights)", args.output.display(), super::human_bytes(report.bytes));
    super::done()
}

fn dequantized(args: &Args) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let report = dequantize(&checkpoint, &args.output)?;
    eprintln!("{} linears dequantized from the {} dialect", report.modules, checkpoint.scheme.dialect);
    if !report.dropped.is_empty() {
        let n = report.dropped.len();
        eprintln!(
            "note: {n} scales of inputs or of the KV cache have no place in a BF16 model, such as {}",
            report.dropped[0]
        );
    }
    eprintln!("wrote {}", args.output.display());
    super::done()
}
