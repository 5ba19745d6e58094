//! `recoup convert`: a GGUF file into a BF16 checkpoint folder.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub(super) struct Args {
    /// GGUF file
    model: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if !args.model.is_file() {
        bail!("{}: no such file; convert reads GGUF files", args.model.display());
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
