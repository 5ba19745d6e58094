//! The command line: one file per verb, and the only place that prints. stdout carries data, stderr the talk.

/// Prints a line to stdout; unlike `println!`, a reader that has gone is an error to return, not a panic.
macro_rules! outln {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($part)*)?
    }};
}
use outln;

mod convert;
mod demo;
mod doctor;
mod evaluation;
mod generated;
mod inspect;
mod logits;
mod options;
mod pretrain;
mod quantize;
mod recover;
mod run;
mod training;
mod training_data;

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Run, quantize and check LLMs in NVFP4 and FP8, with the deployed numerics on any CPU.
#[derive(Parser)]
#[command(name = "recoup", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// The whole loop on the shipped model, in minutes: quantize, recover, compare
    Demo(demo::Args),
    /// What a checkpoint is, module by module, and what is wrong with it
    Inspect(inspect::Args),
    /// Generate text from a prompt, or chat at a terminal
    Run(run::Args),
    /// Score one model, or one behind a URL, on tasks
    Eval(evaluation::eval::Args),
    /// What quantization cost and what recovery won back: models against their BF16 original, with intervals
    Compare(evaluation::compare::Args),
    /// Post-training quantization of a BF16 checkpoint
    Quantize(quantize::Args),
    /// Train a quantized model to give back what the rounding cost
    Recover(recover::Args),
    /// Train a small model from scratch: how the shipped ones were made
    Pretrain(pretrain::Args),
    /// A GGUF file, or a quantized checkpoint, as a BF16 checkpoint folder
    Convert(convert::Args),
    /// What a checkpoint computes: logits of given token ids
    Logits(logits::Args),
    /// What this machine has, and which kernel each format gets
    Doctor(doctor::Args),
}

/// Exit codes: 0 ok, 1 error, 2 usage (clap's own), 3 gate not met.
#[must_use]
pub fn main() -> ExitCode {
    let verb = Cli::parse().verb;
    let trains = matches!(verb, Verb::Demo(_) | Verb::Recover(_) | Verb::Pretrain(_));
    if trains && std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // Candle's own threads would wait in a loop, on the cores that ours compute on.
        // SAFETY: the process has begun no other thread yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    let result = run(verb);
    match result {
        Ok(code) => code,
        // A reader that has seen enough (`recoup inspect … | head`) is no error.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{} {}", style("error:", "1;31"), message(&e));
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Demo(a) => demo::run(&a),
        Verb::Inspect(a) => inspect::run(&a),
        Verb::Run(a) => run::run(&a),
        Verb::Eval(a) => evaluation::eval::run(&a),
        Verb::Compare(a) => evaluation::compare::run(&a),
        Verb::Quantize(a) => quantize::run(&a),
        Verb::Recover(a) => recover::run(&a),
        Verb::Pretrain(a) => pretrain::run(&a),
        Verb::Convert(a) => convert::run(&a),
        Verb::Logits(a) => logits::run(&a),
        Verb::Doctor(a) => doctor::run(&a),
    }
}

/// The error and its causes, without those whose text the error has in it already.
fn message(e: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in e.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().filter_map(|c| c.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// `text` in an ANSI style, if stderr is a terminal and NO_COLOR is unset.
fn style(text: &str, code: &str) -> String {
    let plain = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || !std::io::stderr().is_terminal();
    if plain { text.to_owned() } else { format!("\x1b[{code}m{text}\x1b[0m") }
}

/// A text file with its line ends as `\n`, as Python reads it: files that differ only there give the same tokens.
fn read_text(file: &Path) -> Result<String> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("{}: cannot read as UTF-8 text", file.display()))?;
    if let Some(what) = recoup_eval::foreign::pointer(text.as_bytes()) {
        anyhow::bail!("{}: it is {what}", file.display());
    }
    Ok(if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text })
}

/// A progress bar on stderr; hidden where that is no terminal.
fn progress(length: u64, what: &'static str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(length);
    if let Ok(style) = indicatif::ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what);
    bar
}

/// Bytes for people: 1.5 MiB.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A result with exit code 0.
fn done() -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
