//! `recoup sweep`: formats and methods beside each other on the user's own texts and tasks, by what `quantize`, `recover` and
//! `compare` do.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use recoup_ground::names;

use super::evaluation::compare;
use super::options::model_folder;
use super::steps::{Made, Step, finish, parsed, recoup, unrounded, words};
use super::{Verb, interrupt, quantize, recover};
use crate::quantize::Recipe;

#[derive(clap::Args)]
pub(super) struct Args {
    /// BF16 checkpoint folder or hub id
    model: PathBuf,
    /// What it is quantized by, one after the other: shipped recipes (`recoup quantize --list-recipes`) or JSON files, with
    /// `:bits=5` behind one that chooses formats itself
    #[arg(
        long,
        value_name = "RECIPES",
        value_delimiter = ',',
        default_value = "nvfp4,nvfp4_best,nvfp4_best_channels,mxfp4,w4a16_nvfp4,fp8"
    )]
    recipes: Vec<String>,
    /// Recover each for so many minutes too, and measure that beside it
    #[arg(long, value_name = "MINUTES", requires = "data")]
    recover: Option<String>,
    /// What to recover on, as `recoup recover --data`
    #[arg(long, value_name = "FILE[=WEIGHT]", requires = "recover")]
    data: Vec<OsString>,
    /// What to calibrate on, as `recoup quantize --calibration` [default: a short built-in text]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Tasks to measure on, as `recoup compare --tasks`; `none` for none [default: those of compare]
    #[arg(long, value_name = "TASKS")]
    tasks: Option<OsString>,
    /// Only the first N documents of each task, or a share of them below 1
    #[arg(short = 'L', long, value_name = "N|SHARE")]
    limit: Option<String>,
    /// Texts to measure KL on, as `recoup compare --text`; `none` for none [default: those of compare]
    #[arg(long, value_name = "TEXTS")]
    text: Option<OsString>,
    /// Tokens in a window of text [default: 512]
    #[arg(long, value_name = "N")]
    window: Option<String>,
    /// Windows of each text at most [default: 24]
    #[arg(long, value_name = "N")]
    windows: Option<String>,
    /// Threads; 0 is one per core
    #[arg(long, default_value = "0")]
    threads: String,
    /// What runs models, as everywhere: auto, cpu, cuda or cuda:N; training takes a GPU only where it is named
    #[arg(long, default_value = "auto")]
    device: String,
    /// Folder for models and report; what is finished there is not done again
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

/// One way to quantize.
struct Way {
    label: String,
    /// Arguments of `recoup quantize` that say it.
    arguments: Vec<OsString>,
    recipe: Recipe,
    /// The name without bits: what is measured for one is good for all others.
    name: String,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let model = model_folder(&args.model)?;
    let ways: Vec<Way> = args.recipes.iter().map(|spec| way(args, &model, spec)).collect::<Result<_>>()?;
    let mut labels: Vec<&str> = ways.iter().map(|w| w.label.as_str()).collect();
    labels.push(BASELINE);
    if let Some((one, other)) = names::clash(&labels) {
        bail!("--recipes: {one} and {other} would have one name");
    }
    let dash = OsStr::new("-");
    let once = [args.calibration.as_ref().map(|c| c.as_os_str()), args.text.as_deref()];
    if once.into_iter().flatten().chain(args.data.iter().map(|d| d.as_os_str())).any(|given| given == dash) {
        bail!("-: what is read is needed more than once, and standard input can be read once: give a file");
    }
    check(args, &model, &ways)?;
    interrupt::hint("what is done is kept: the same command goes on from there");
    let _claim = crate::output::growing(&args.output)?;
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    for (index, way) in ways.iter().enumerate() {
        // One that this model cannot have is no reason to lose the others.
        for made_or_not in both(args, &model, &ways[..index], &made, way) {
            match made_or_not {
                Ok(model) => made.push(model),
                Err(e) => failed.push(e),
            }
        }
    }
    if let Some(first) = made.first() {
        // Of several ways none is what the others win back.
        report(args, &model, &made, if ways.len() == 1 { &first.label } else { "none" })?;
        let report = args.output.join(REPORT).join("report.html");
        super::say!("which to take, by size and by what is kept: above, and {}", report.display());
    }
    for e in &failed {
        super::say!("{} {}", super::style("error:", "1;31"), super::message(e));
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

const BASELINE: &str = "BF16";
const REPORT: &str = "report";

/// `nvfp4`, `mine.json`, `nvfp4_fp8_auto:bits=5`.
fn way(args: &Args, model: &Path, spec: &str) -> Result<Way> {
    let (name, bits) = spec.rsplit_once(":bits=").map_or((spec, None), |(name, bits)| (name, Some(bits)));
    let recipe = Recipe::find(name)?;
    let label = bits.map_or_else(|| recipe.name.clone(), |bits| format!("{}_{bits}", recipe.name));
    let mut arguments = words(&[&"quantize", &model, &"--recipe", &name]);
    if let Some(bits) = bits {
        arguments.extend(words(&[&"--bits", &bits]));
    }
    if let Some(calibration) = args.calibration.as_ref().filter(|_| recipe.needs_text()) {
        arguments.extend(words(&[&"--calibration", calibration]));
    }
    Ok(Way { label, arguments, recipe, name: name.to_owned() })
}

/// Finds what is wrong with anything before anything takes time.
fn check(args: &Args, model: &Path, ways: &[Way]) -> Result<()> {
    let mut all: Vec<(String, Vec<OsString>)> = ways
        .iter()
        .map(|w| (format!("--recipes {}", w.label), [w.arguments.clone(), machine(args)].concat()))
        .collect();
    if args.recover.is_some() {
        all.push(("--recover".into(), [recover_arguments(args, model), vec![model.into()]].concat()));
    }
    all.push((
        "--tasks, --text".into(),
        [compare_arguments(args), vec![model.into(), model.into()], machine(args)].concat(),
    ));
    for (what, arguments) in all {
        let checked = parsed(&arguments).and_then(|verb| match verb {
            Verb::Quantize(a) => quantize::check(&a),
            Verb::Recover(a) => recover::check(&a),
            Verb::Compare(a) => compare::check(&a),
            _ => Ok(()),
        });
        checked.context(what)?;
    }
    Ok(())
}

fn machine(args: &Args) -> Vec<OsString> {
    words(&[&"--threads", &args.threads, &"--device", &args.device])
}

/// A model quantized one way, and recovered, where that is asked for and the first can be made.
fn both(args: &Args, model: &Path, before: &[Way], made: &[Made], way: &Way) -> Vec<Result<Made>> {
    let quantize = quantizing(args, before, made, way);
    let quantized = match renewed(args, model, way, &quantize).and_then(|()| quantize.made(&args.output)) {
        Ok(quantized) => quantized,
        Err(e) => return vec![Err(e)],
    };
    let recovered =
        recovering(args, model, way, &quantized.folder).map(|step| recovered(args, &step, &quantized.folder));
    std::iter::once(Ok(quantized)).chain(recovered).collect()
}

fn quantizing(args: &Args, before: &[Way], made: &[Made], way: &Way) -> Step {
    let mut beside = machine(args);
    // The formats' damage was measured for another budget already.
    let measured = before.iter().find(|w| w.name == way.name && way.recipe.auto.is_some());
    let measured = measured.and_then(|w| made.iter().find(|m| m.label == w.label));
    if let Some(measured) = measured {
        beside.extend(words(&[&"--sensitivity", &measured.folder.join(crate::quantize::auto::TABLE_FILE)]));
    }
    let changes = way.recipe.smooth.is_some() || way.recipe.rotate.is_some() || way.recipe.gptq.is_some();
    let keeps_unrounded = args.recover.is_some() && changes;
    Step { label: way.label.clone(), arguments: way.arguments.clone(), beside, keeps_unrounded }
}

/// The plain model that a quantized one was rounded from goes once it is recovered. To recover it otherwise, it is made again, with the
/// same bytes: what is trained without it would be worse for no reason that is seen.
fn renewed(args: &Args, model: &Path, way: &Way, quantize: &Step) -> Result<()> {
    let folder = quantize.folder(&args.output)?;
    let lacks = quantize.keeps_unrounded && quantize.is_made(&args.output)? && !unrounded(&folder).exists();
    let Some(recover) = recovering(args, model, way, &folder).filter(|_| lacks) else { return Ok(()) };
    if !recover.is_made(&args.output)? {
        std::fs::remove_dir_all(&folder).with_context(|| format!("{}: cannot be made again", folder.display()))?;
    }
    Ok(())
}

/// Arguments of `recoup recover` but for its student.
fn recover_arguments(args: &Args, model: &Path) -> Vec<OsString> {
    let minutes = args.recover.as_deref().unwrap_or_default();
    let mut arguments = words(&[&"recover", &"--teacher", &model, &"--minutes", &minutes]);
    arguments.extend(args.data.iter().flat_map(|data| words(&[&"--data", data])));
    if args.device.starts_with("cuda") {
        arguments.extend(words(&[&"--device", &args.device]));
    }
    arguments
}

/// How the quantized model in `folder` is recovered, where that is asked for.
fn recovering(args: &Args, model: &Path, way: &Way, folder: &Path) -> Option<Step> {
    let minutes = args.recover.as_ref()?;
    let label = format!("{}_recovered_{minutes}min", way.label);
    let arguments = [recover_arguments(args, model), vec![folder.into()]].concat();
    let mut beside = words(&[&"--resume", &"--threads", &args.threads]);
    let unrounded = unrounded(folder);
    if unrounded.exists() {
        beside.extend(words(&[&"--unrounded", &unrounded]));
    }
    Some(Step { label, arguments, beside, keeps_unrounded: false })
}

fn recovered(args: &Args, step: &Step, quantized: &Path) -> Result<Made> {
    let made = step.made(&args.output)?;
    let unrounded = unrounded(quantized);
    if unrounded.exists() {
        // As large as the model itself, and of no use any more.
        std::fs::remove_dir_all(&unrounded).with_context(|| format!("{}: cannot be removed", unrounded.display()))?;
    }
    Ok(made)
}

/// Arguments of `recoup compare` but for its models.
fn compare_arguments(args: &Args) -> Vec<OsString> {
    let mut arguments = words(&[&"compare"]);
    let given = [("--tasks", &args.tasks), ("--text", &args.text)];
    arguments.extend(given.into_iter().flat_map(|(name, value)| value.iter().flat_map(move |v| words(&[&name, v]))));
    let given = [("--limit", &args.limit), ("--window", &args.window), ("--windows", &args.windows)];
    let joined = given.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?).into()));
    arguments.extend(joined);
    arguments
}

/// All models beside each other; what was measured of them before is not measured again.
fn report(args: &Args, model: &Path, made: &[Made], ptq: &str) -> Result<()> {
    let labels: Vec<&str> = std::iter::once(BASELINE).chain(made.iter().map(|m| m.label.as_str())).collect();
    let mut command = recoup()?;
    command.args(compare_arguments(args)).arg(model).args(made.iter().map(|m| &m.folder));
    command.args(["--labels", &labels.join(","), "--ptq", ptq]).args(machine(args));
    command.arg("-o").arg(args.output.join(REPORT));
    finish(&mut command, "comparing")
}
