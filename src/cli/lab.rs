//! `recoup lab`: ways to recover a model beside each other, each trained once, by what `recover` and `compare` do.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use comfy_table::Table;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::interrupt;
use super::options::{at_least_one, model_folder};
use super::steps::{Made, Step, finish, recoup};
use crate::recover::student::RECORD_FILE;

#[derive(clap::Args)]
pub(super) struct Args {
    /// What is tried: JSON with `teacher`, `texts`, `common` (arguments of `recoup recover` for all), `configurations` (a name, and
    /// its own arguments, or the folder of a model to measure as it is), `baseline` (a name among them) and `seeds`
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder that everything is kept in; what is finished there is not done again
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Tokens in a window of text
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one::<usize>)]
    window: usize,
    /// Windows of each text at most
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = at_least_one::<usize>)]
    windows: usize,
}

/// What is tried.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Trial {
    teacher: String,
    texts: Vec<String>,
    #[serde(default)]
    common: Vec<String>,
    /// By name, in the order of the file.
    configurations: Map<String, Value>,
    baseline: String,
    #[serde(default = "first_seed")]
    seeds: Vec<u64>,
}

fn first_seed() -> Vec<u64> {
    vec![0]
}

/// One way: arguments of `recoup recover`, or a model that is there already.
#[derive(Deserialize)]
#[serde(untagged)]
enum Configuration {
    Recover(Vec<String>),
    Model(String),
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let text = std::fs::read_to_string(&args.file).with_context(|| args.file.display().to_string())?;
    let trial: Trial = serde_json::from_str(&text).with_context(|| args.file.display().to_string())?;
    let configuration = |(name, value): (&String, &Value)| {
        let known: Configuration = serde_json::from_value(value.clone()).with_context(|| {
            format!("{}: `{name}` is neither a list of arguments nor a model's folder", args.file.display())
        })?;
        Ok((name.clone(), known))
    };
    let configurations: Vec<(String, Configuration)> =
        trial.configurations.iter().map(configuration).collect::<Result<_>>()?;
    let Some((_, baseline)) = configurations.iter().find(|c| c.0 == trial.baseline) else {
        bail!("{}: the baseline `{}` is none of its configurations", args.file.display(), trial.baseline);
    };
    if trial.texts.is_empty() || trial.seeds.is_empty() {
        bail!("{}: `texts` and `seeds` must name one at least", args.file.display());
    }
    interrupt::hint("what is done is kept: the same command goes on from there");
    let _claim = crate::output::growing(&args.output)?;
    let mut made = Vec::new();
    for (name, configuration) in &configurations {
        match configuration {
            Configuration::Model(folder) => {
                made.push(Made { label: name.clone(), folder: model_folder(Path::new(folder))?, minutes: None });
            }
            Configuration::Recover(own) => {
                for seed in &trial.seeds {
                    let label = if trial.seeds.len() > 1 { format!("{name}.{seed}") } else { name.clone() };
                    made.push(recovered(args, &trial, &label, own, *seed)?);
                }
            }
        }
    }
    let baseline = match baseline {
        Configuration::Recover(_) if trial.seeds.len() > 1 => format!("{}.{}", trial.baseline, trial.seeds[0]),
        _ => trial.baseline.clone(),
    };
    let comparison = compared(args, &trial, &made, &baseline)?;
    super::outln!("{}", table(&made, &comparison)?);
    super::done()
}

/// The arguments that a configuration stands for, without where its result goes.
fn arguments(trial: &Trial, own: &[String], seed: u64) -> Vec<String> {
    let all = [own, &trial.common].concat();
    let fixed = ["--teacher".to_owned(), trial.teacher.clone(), "--seed".into(), seed.to_string()];
    [all.as_slice(), &fixed].concat()
}

/// Trains one configuration, where that is not done already.
fn recovered(args: &Args, trial: &Trial, label: &str, own: &[String], seed: u64) -> Result<Made> {
    let arguments = arguments(trial, own, seed).into_iter().map(OsString::from);
    let arguments = [OsString::from("recover")].into_iter().chain(arguments).collect();
    Step { label: label.to_owned(), arguments, beside: vec!["--resume".into()], keeps_unrounded: false }
        .made(&args.output)
}

/// KL of all models to the teacher, what is known of it left as it is.
fn compared(args: &Args, trial: &Trial, made: &[Made], baseline: &str) -> Result<Value> {
    let out = args.output.join("compare");
    let labels: Vec<&str> = std::iter::once("teacher").chain(made.iter().map(|m| m.label.as_str())).collect();
    let mut command = recoup()?;
    command
        .args(["compare", &trial.teacher])
        .args(made.iter().map(|m| &m.folder))
        .args(["--labels", &labels.join(",")]);
    command.args(["--ptq", baseline, "--tasks", "none", "--text", &trial.texts.join(","), "--no-speed"]);
    command
        .args(["--window", &args.window.to_string(), "--windows", &args.windows.to_string(), "-o"])
        .arg(&out)
        .stdout(Stdio::null());
    finish(&mut command, "comparing")?;
    Ok(serde_json::from_slice(&std::fs::read(out.join("comparison.json"))?)?)
}

/// A row for each model.
fn table(made: &[Made], comparison: &Value) -> Result<Table> {
    let empty = Vec::new();
    let divergences = comparison["divergences"].as_array().unwrap_or(&empty);
    let mut texts: Vec<&str> = Vec::new();
    for text in divergences.iter().filter_map(|d| d["text"].as_str()) {
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let head = ["".to_owned(), "minutes".into(), "codes".into(), "block scales".into()];
    let columns = texts.iter().flat_map(|t| [format!("KL on {t}"), "to the baseline".into()]);
    table.set_header(head.into_iter().chain(columns));
    for (index, model) in made.iter().enumerate() {
        let mut row = vec![model.label.clone(), model.minutes.map_or_else(String::new, |m| format!("{m:.1}"))];
        row.extend(changed(&model.folder)?);
        for text in &texts {
            let of = |d: &&Value| d["model"] == json!(index + 1) && d["text"] == json!(text);
            let Some(found) = divergences.iter().find(of) else { continue };
            let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
            let kl = &found["kl"];
            row.push(format!("{:.4} ± {:.4}", number(&kl["value"]), number(&kl["standard_error"])));
            let gone = &found["kl_gone"];
            row.push(if gone.is_object() {
                let percent = |key: &str| -100.0 * number(&gone[key]);
                format!("{:+.1} % [{:+.1}, {:+.1}]", percent("estimate"), percent("high"), percent("low"))
            } else {
                String::new()
            });
        }
        table.add_row(row);
    }
    Ok(table)
}

/// Shares of codes and of block scales that training changed, as the record of the model says.
fn changed(folder: &Path) -> Result<[String; 2]> {
    let Ok(text) = std::fs::read(folder.join(RECORD_FILE)) else { return Ok([String::new(), String::new()]) };
    let record: Value = serde_json::from_slice(&text)?;
    let share = |what: &str| {
        let count = &record["changed"][what];
        let number = |key: &str| count[key].as_f64().unwrap_or(0.0);
        if number("all") > 0.0 { format!("{:.2} %", 100.0 * number("changed") / number("all")) } else { String::new() }
    };
    Ok([share("codes"), share("scales")])
}
