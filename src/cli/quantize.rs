//! `recoup quantize`: post-training quantization of a BF16 checkpoint.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use super::options::{EngineOptions, model_folder};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Dialect;
use crate::model::ModelConfig;
use crate::quantize::{self, CalibrationText, Recipe};
use crate::text::Tokenizer;

/// Public-domain prose for calibration where the user gives none: the opening of a novel (Standard Ebooks, CC0).
pub(super) const BUILT_IN_TEXT: &str = include_str!("calibration.txt");

#[derive(clap::Args)]
pub(super) struct Args {
    /// BF16 checkpoint folder or hub id
    #[arg(required_unless_present = "list_recipes")]
    model: Option<String>,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "FOLDER", required_unless_present = "list_recipes")]
    output: Option<PathBuf>,
    /// What the blocks' linears become: a shipped recipe (--list-recipes) or a JSON file
    #[arg(long, value_name = "NAME|FILE", required_unless_present = "list_recipes")]
    recipe: Option<String>,
    /// Print the shipped recipes
    #[arg(long)]
    list_recipes: bool,
    /// Whose conventions the output follows
    #[arg(long, value_enum, default_value_t = DialectName::Modelopt)]
    dialect: DialectName,
    /// Text to calibrate activation scales on (.txt), or token ids (.json) [default: a short built-in text]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Windows of the text to run [default: 8, and 16 where the recipe rounds weights by them]
    #[arg(long)]
    samples: Option<usize>,
    /// Tokens in a window
    #[arg(long, default_value_t = 512)]
    length: usize,
    #[command(flatten)]
    options: EngineOptions,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DialectName {
    Modelopt,
    CompressedTensors,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if args.list_recipes {
        for recipe in Recipe::shipped()? {
            super::outln!("{:<26} {}", recipe.name, recipe.description);
        }
        return super::done();
    }
    let (Some(model), Some(output), Some(recipe)) = (&args.model, &args.output, &args.recipe) else {
        bail!("MODEL, --output and --recipe are needed");
    };
    let start = Instant::now();
    let recipe = Recipe::find(recipe)?;
    let folder = model_folder(model)?;
    let checkpoint = Checkpoint::open(&folder)?;
    let samples = args.samples.unwrap_or(if recipe.gptq.is_some() { 16 } else { 8 });
    let text = sequences(args, samples, &checkpoint, &folder)?;
    let dialect = match args.dialect {
        DialectName::Modelopt => Dialect::ModelOpt,
        DialectName::CompressedTensors => Dialect::CompressedTensors,
    };
    let bar = super::progress(0, "");
    let backend = args.options.backend()?;
    let report = quantize::apply(&checkpoint, &backend, &text, &recipe, dialect, output, &mut |what, done, all| {
        if done == 0 {
            bar.set_message(what);
            bar.reset_eta();
        }
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    eprintln!(
        "{} linears by {} ({dialect} dialect), calibrated on {} tokens: {} to {} in {:.1} s",
        report.modules,
        recipe.name,
        text.sequences.iter().map(Vec::len).sum::<usize>(),
        super::human_bytes(report.bytes_before),
        super::human_bytes(report.bytes_after),
        start.elapsed().as_secs_f64()
    );
    for module in &report.unreached {
        eprintln!("note: no calibration token reached {module}; it shares the scale of its neighbours");
    }
    eprintln!("wrote {}", output.display());
    super::done()
}

/// Calibration windows and where they came from.
fn sequences(args: &Args, samples: usize, checkpoint: &Checkpoint, folder: &Path) -> Result<CalibrationText> {
    if samples == 0 || args.length == 0 {
        bail!("--samples and --length must be at least 1");
    }
    let positions = ModelConfig::read(&checkpoint.config)?.max_positions;
    let length = args.length.min(positions);
    let json = args.calibration.as_ref().filter(|f| f.extension().is_some_and(|e| e == "json"));
    if let Some(file) = json {
        let rows = super::logits::from_json(file)?;
        if let Some(row) = rows.iter().find(|r| r.len() > positions) {
            bail!("{}: a row of {} tokens, but the model has {positions} positions", file.display(), row.len());
        }
        let description = file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        return Ok(CalibrationText { sequences: rows, description });
    }
    let (text, name) = match &args.calibration {
        None => (BUILT_IN_TEXT.to_owned(), "built-in text".to_owned()),
        Some(file) => {
            (super::read_text(file)?, file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()))
        }
    };
    let tokenizer = Tokenizer::from_folder(folder).context(
        "calibration on text needs the model's tokenizer; give token ids with --calibration FILE.json instead",
    )?;
    let tokens = tokenizer.encode(&text, false)?;
    let windows = windows(&tokens, samples, length);
    if windows.is_empty() {
        bail!("{name}: the calibration text is empty");
    }
    let description = format!("{name}, {} x {} tokens", windows.len(), windows[0].len());
    Ok(CalibrationText { sequences: windows, description })
}

/// `samples` windows of `length` tokens, evenly spaced over the text; fewer or shorter where it is short.
fn windows(tokens: &[u32], samples: usize, length: usize) -> Vec<Vec<u32>> {
    let length = length.min(tokens.len());
    if length == 0 {
        return Vec::new();
    }
    let samples = samples.min(tokens.len() / length);
    (0..samples).map(|i| tokens[i * (tokens.len() / samples)..][..length].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::windows;

    #[test]
    fn windows_spread_over_the_text_and_shrink_with_it() {
        let tokens: Vec<u32> = (0..100).collect();
        assert_eq!(windows(&tokens, 4, 10).iter().map(|w| w[0]).collect::<Vec<_>>(), [0, 25, 50, 75]);
        assert_eq!(windows(&tokens, 4, 40).len(), 2);
        assert_eq!(windows(&tokens[..1], 4, 40), [[0]]);
        assert!(windows(&[], 4, 40).is_empty());
    }
}
