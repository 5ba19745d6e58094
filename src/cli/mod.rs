//! The command line: one file per verb, and the only place that prints. stdout carries data, stderr the talk.

mod bench;
mod completions;
mod convert;
mod demo;
mod device;
mod doctor;
#[cfg(test)]
mod documents;
mod evaluation;
mod guessing;
mod inspect;
mod interrupt;
mod lab;
mod logits;
mod machine;
mod options;
mod parallel;
mod place;
mod pretrain;
mod quantize;
#[cfg(feature = "parallel")]
mod rank_room;
mod ranks;
mod recover;
mod recovery_plan;
mod recovery_room;
mod replies;
mod room;
mod run;
mod sampling;
#[cfg(feature = "parallel")]
mod scale;
mod serve;
mod shards;
mod steps;
#[cfg(feature = "object-store")]
mod store;
mod sweep;
mod talk;
mod training;
mod training_data;
mod until;
mod verify;

use std::process::ExitCode;

use crate::output::space::human_bytes;
use anyhow::Result;
use clap::{CommandFactory as _, Parser, Subcommand};
use talk::{outln, progress, say, style};

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
    /// Whether the engine behind a URL computes what a checkpoint says, and what its fault is
    Verify(verify::Args),
    /// Post-training quantization of a BF16 checkpoint
    Quantize(quantize::Args),
    /// Train a quantized model to give back what the rounding cost
    Recover(recover::Args),
    /// Ways to recover a model beside each other, each trained once
    Lab(lab::Args),
    /// Formats and methods beside each other on your own texts and tasks, and which to take
    Sweep(sweep::Args),
    /// Train a small model from scratch: how the shipped ones were made
    Pretrain(pretrain::Args),
    /// A GGUF file, or a quantized checkpoint, as a BF16 checkpoint folder
    Convert(convert::Args),
    /// What a checkpoint computes: logits of given token ids
    Logits(logits::Args),
    /// Answer over OpenAI's API, and on a page: one model or several
    Serve(serve::Args),
    /// How fast a model answers on this machine, beside what the machine allows
    Bench(bench::Args),
    /// How a model would do on many devices: memory, traffic and time of each rank
    #[cfg(feature = "parallel")]
    Scale(scale::Args),
    /// How a model would do on many devices (in a build with --features parallel)
    #[cfg(not(feature = "parallel"))]
    Scale(NotHere),
    /// What this machine has, which kernel each format gets, and whether a GPU computes what it should
    Doctor(doctor::Args),
    /// Completions for a shell
    Completions(completions::Args),
}

/// Whatever is given to a verb that a build does not have.
#[cfg(not(feature = "parallel"))]
#[derive(clap::Args)]
struct NotHere {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<std::ffi::OsString>,
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
    if !matches!(
        verb,
        Verb::Run(_) | Verb::Inspect(_) | Verb::Bench(_) | Verb::Doctor(_) | Verb::Serve(_) | Verb::Completions(_)
    ) {
        interrupt::watch();
    }
    let result = run(verb);
    interrupt::let_end();
    parallel::leave();
    match result {
        Ok(code) => code,
        Err(e) => {
            say!("{} {}", style("error:", "1;31"), message(&e));
            ExitCode::FAILURE
        }
    }
}

impl Verb {
    /// What runs the model, where the verb runs one.
    fn engine(&self) -> Option<&options::EngineOptions> {
        match self {
            Self::Run(a) => Some(&a.options),
            Self::Eval(a) => Some(&a.options),
            Self::Compare(a) => Some(&a.options),
            Self::Verify(a) => Some(&a.options),
            Self::Quantize(a) => Some(&a.options),
            Self::Logits(a) => Some(&a.options),
            Self::Serve(a) => Some(&a.options),
            Self::Bench(a) => Some(&a.options),
            _ => None,
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    if let Some(code) = verb.engine().map(parallel::enter).transpose()?.flatten() {
        return Ok(code);
    }
    match verb {
        Verb::Demo(a) => demo::run(&a),
        Verb::Inspect(a) => inspect::run(&a),
        Verb::Run(a) => run::run(&a),
        Verb::Eval(a) => evaluation::eval::run(&a),
        Verb::Compare(a) => evaluation::compare::run(&a),
        Verb::Verify(a) => verify::run(&a),
        Verb::Quantize(a) => quantize::run(&a),
        Verb::Recover(a) => recover::run(&a),
        Verb::Lab(a) => lab::run(&a),
        Verb::Sweep(a) => sweep::run(&a),
        Verb::Pretrain(a) => pretrain::run(&a),
        Verb::Convert(a) => convert::run(&a),
        Verb::Logits(a) => logits::run(&a),
        Verb::Serve(a) => serve::run(&a),
        Verb::Bench(a) => bench::run(&a),
        #[cfg(feature = "parallel")]
        Verb::Scale(a) => scale::run(&a),
        #[cfg(not(feature = "parallel"))]
        Verb::Scale(_) => {
            anyhow::bail!("this build of recoup knows no ranks: build it with --features parallel, or cluster")
        }
        Verb::Doctor(a) => doctor::run(&a),
        Verb::Completions(a) => completions::run(&a, Cli::command()),
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

/// Names the small text files of a model that its copy lacks, because nothing here knows them.
fn name_left_out(model: &std::path::Path) {
    let names = crate::checkpoint::text_files::left_out(model);
    if !names.is_empty() {
        say!(
            "note: of {} not copied, because nothing here knows what they are for: {}",
            model.display(),
            names.join(", ")
        );
    }
}

/// A result with exit code 0.
fn done() -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}

/// Says what a reader of files noted about them, a line each.
fn say_notes(notes: &[String]) {
    for note in notes {
        say!("note: {note}");
    }
}
