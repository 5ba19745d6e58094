//! `recoup recover --until-recovery`: better and better ways to quantize, each looked at on tasks or texts, until one keeps enough.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, Result, anyhow, bail};
use recoup_eval::comparison::{Comparison, Interval};
use recoup_eval::statistics::student_quantile;
use serde_json::{Value, json};

use super::evaluation::compare;
use super::options::model_folder;
use super::recover;
use super::steps::{Step, finish, parsed, recoup, unrounded, words};
use super::{Verb, interrupt};
use crate::checkpoint::write::FolderWriter;
use crate::output;
use crate::quantize::Recipe;
use crate::recover::best_known::RECIPE;

#[derive(clap::Args)]
pub(super) struct UntilOptions {
    /// In place of a time: go from plain rounding to better rounding, to short and to long training, and stop as soon as the model
    /// keeps this share of the teacher's score by the lower end of its interval. Exit code 3 where none does; the best is written
    /// all the same
    #[arg(long, value_name = "SHARE", value_parser = share, requires = "on",
        conflicts_with_all = ["minutes", "preset", "plan", "methods", "keep_stages"])]
    pub until_recovery: Option<f64>,
    /// What that is looked at on: tasks by name, whose mean counts, or files of text, each of which counts and whose share is the
    /// teacher's perplexity over the model's
    #[arg(long, value_name = "TASKS|TEXTS", value_delimiter = ',', requires = "until_recovery")]
    on: Vec<OsString>,
    /// Of each task, only the first N documents, or a share of them below 1
    #[arg(long, value_name = "N|SHARE", requires = "until_recovery")]
    limit: Option<String>,
}

/// A share of a score.
fn share(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|s: &f64| *s > 0.0 && *s < 1.0)
        .ok_or_else(|| "expected a share below 1, such as 0.98".into())
}

/// What the plain way to quantize is.
const PLAIN: &str = "nvfp4";
/// Level of the intervals together: each look has its part of what may go wrong.
const CONFIDENCE: f64 = 0.95;
const WINDOW: usize = 512;
const WINDOWS: usize = 24;
/// Exit code where no way keeps enough.
const NOT_MET: u8 = 3;

/// A way to make a model, and what it is called.
enum Rung {
    /// The model that was given.
    Given(PathBuf),
    Quantize(OsString),
    /// Of the last that was quantized or given.
    Train(&'static str),
}

impl Rung {
    fn label(&self, last: Option<&str>) -> String {
        let last = last.unwrap_or_default();
        match self {
            Self::Given(_) => "given".into(),
            Self::Quantize(recipe) => Path::new(recipe).file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Train(preset) => format!("{last}_{preset}"),
        }
    }
}

/// What a look found.
struct Look {
    label: String,
    folder: PathBuf,
    /// The share that is kept: of the tasks' mean, or of the text where least is.
    kept: Interval,
}

pub(super) fn run(args: &recover::Args, target: f64) -> Result<ExitCode> {
    let teacher = model_folder(&args.teacher)?;
    let claim = output::folder(&args.output)?;
    let work = claim
        .target()
        .with_file_name(format!("{}.until", claim.target().file_name().unwrap_or_default().to_string_lossy()));
    let rungs = rungs(args)?;
    if args.data.is_stdin() || args.until.on.iter().any(|name| name == "-") {
        bail!("-: what is read may be needed more than once, and standard input can be read once: give a file");
    }
    recover::check(args)?;
    if let Some(recipe) = &args.recipe {
        Recipe::find(recipe)?;
    }
    let measured = measured(args, rungs.len());
    let line = [measured.clone(), vec![teacher.clone().into(), teacher.clone().into()]].concat();
    let Verb::Compare(comparing) = parsed(&line)? else { bail!("compare is compare") };
    compare::check(&comparing).context("--on")?;
    interrupt::hint("what is done is kept: the same command goes on from there");
    let _work = output::growing(&work)?;
    let mut looks: Vec<Look> = Vec::new();
    let mut base: Option<(String, PathBuf)> = None;
    for (index, rung) in rungs.iter().enumerate() {
        let label = rung.label(base.as_ref().map(|b| b.0.as_str()));
        let folder = made(args, &teacher, &work, rung, &label, base.as_ref().map(|b| b.1.as_path()))?;
        if !matches!(rung, Rung::Train(_)) {
            base = Some((label.clone(), folder.clone()));
        }
        looks.push(Look { label, folder, kept: Interval { estimate: 0.0, low: 0.0, high: 0.0 } });
        let kept = look(&measured, &teacher, &work, &looks, rungs.len())?;
        looks[index].kept = kept;
        let Look { label, kept, .. } = &looks[index];
        super::say!("{label}: keeps {} [{}, {}]", percent(kept.estimate), percent(kept.low), percent(kept.high));
        if kept.low >= target {
            break;
        }
    }
    let met = looks.last().is_some_and(|l| l.kept.low >= target);
    let best = looks.iter().max_by(|a, b| a.kept.estimate.total_cmp(&b.kept.estimate)).context("no way was tried")?;
    let chosen = if met { looks.last().unwrap_or(best) } else { best };
    write(chosen, &looks, target, met, &args.output)?;
    let interval = chosen.kept;
    if met {
        super::say!("{}: {} keeps at least {}", args.output.display(), chosen.label, percent(target));
    } else if interval.estimate >= target {
        super::say!(
            "{}: {} keeps {}, but that it is at least {} is not shown: the interval begins at {}. More documents or windows would \
             make it narrower (--on, --limit)",
            args.output.display(),
            chosen.label,
            percent(interval.estimate),
            percent(target),
            percent(interval.low)
        );
    } else {
        super::say!(
            "{}: {} keeps {} [{}, {}], and nothing that is known here keeps more at this size: {} would take more bits (--recipe \
             nvfp4_fp8_auto, fp8; `recoup sweep` shows what each keeps)",
            args.output.display(),
            chosen.label,
            percent(interval.estimate),
            percent(interval.low),
            percent(interval.high),
            percent(target)
        );
    }
    super::say!("all that was tried, and the report of the looks: {}", work.display());
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::from(NOT_MET) })
}

/// From what takes seconds to what takes longest.
fn rungs(args: &recover::Args) -> Result<Vec<Rung>> {
    let mut rungs = match (&args.student, &args.recipe) {
        (Some(student), _) => vec![Rung::Given(model_folder(student)?)],
        (None, Some(recipe)) => vec![Rung::Quantize(recipe.clone())],
        (None, None) => vec![Rung::Quantize(PLAIN.into()), Rung::Quantize(RECIPE.into())],
    };
    rungs.extend([Rung::Train("quick"), Rung::Train("best")]);
    Ok(rungs)
}

/// The model of a rung, made below `work` if it is not there yet.
fn made(
    args: &recover::Args,
    teacher: &Path,
    work: &Path,
    rung: &Rung,
    label: &str,
    base: Option<&Path>,
) -> Result<PathBuf> {
    let threads = args.threads.to_string();
    let step = match rung {
        Rung::Given(folder) => return Ok(folder.clone()),
        Rung::Quantize(recipe) => Step {
            label: label.to_owned(),
            arguments: words(&[&"quantize", &teacher, &"--recipe", recipe]),
            beside: words(&[&"--threads", &threads, &"--device", &"cpu"]),
            keeps_unrounded: true,
        },
        Rung::Train(preset) => {
            let base = base.context("nothing was quantized")?;
            let mut arguments = words(&[&"recover", &base, &"--teacher", &teacher, &"--preset", preset]);
            arguments.extend(args.data.arguments());
            arguments.extend(args.of_training());
            let mut beside =
                words(&[&"--resume", &"--threads", &threads, &"--save-every", &args.save_every.to_string()]);
            let own = unrounded(base);
            match &args.unrounded {
                Some(given) => arguments.extend(words(&[&"--unrounded", given])),
                // Made with what it is of, so that it tells nothing more.
                None if own.exists() => beside.extend(words(&[&"--unrounded", &own])),
                None => {}
            }
            Step { label: label.to_owned(), arguments, beside, keeps_unrounded: false }
        }
    };
    Ok(step.made(work)?.folder)
}

/// Arguments of the comparisons but for their models.
fn measured(args: &recover::Args, looks: usize) -> Vec<OsString> {
    let (texts, tasks): (Vec<_>, Vec<_>) = args.until.on.iter().partition(|name| is_text(name));
    let list = |names: Vec<&OsString>| if names.is_empty() { OsString::from("none") } else { joined(&names) };
    let mut arguments = words(&[&"compare", &"--tasks", &list(tasks), &"--text", &list(texts), &"--no-speed"]);
    arguments.extend(args.until.limit.as_ref().map(|limit| format!("--limit={limit}").into()));
    arguments.extend(words(&[&"--window", &WINDOW.to_string(), &"--windows", &WINDOWS.to_string()]));
    arguments.extend(words(&[&"--confidence", &confidence(looks).to_string()]));
    arguments.extend(words(&[&"--threads", &args.threads.to_string()]));
    arguments
}

/// A file of text, rather than a task by its name or its file.
fn is_text(name: &OsStr) -> bool {
    let path = Path::new(name);
    path.is_file() && !path.extension().is_some_and(|e| e == "yaml" || e == "yml")
}

fn joined(names: &[&OsString]) -> OsString {
    names.iter().map(|n| n.as_os_str()).collect::<Vec<_>>().join(OsStr::new(","))
}

/// The level of one look's interval, so that all together have [`CONFIDENCE`] (Bonferroni): whoever looks until it is enough would
/// else be told so by chance.
fn confidence(looks: usize) -> f64 {
    1.0 - (1.0 - CONFIDENCE) / looks.max(1) as f64
}

/// What the last of the models keeps; those before were measured already.
fn look(measured: &[OsString], teacher: &Path, work: &Path, looks: &[Look], all: usize) -> Result<Interval> {
    let out = work.join("report");
    let labels: Vec<&str> = std::iter::once("BF16").chain(looks.iter().map(|l| l.label.as_str())).collect();
    let mut command = recoup()?;
    command.args(measured).arg(teacher).args(looks.iter().map(|l| &l.folder));
    command.args(["--labels", &labels.join(","), "-o"]).arg(&out).stdout(Stdio::null());
    finish(&mut command, "looking")?;
    let file = out.join("comparison.json");
    let comparison: Comparison = serde_json::from_slice(&std::fs::read(&file)?).context(file.display().to_string())?;
    kept(&comparison, looks.len(), confidence(all))
}

/// The least share that model number `model` keeps: of the tasks' mean, and of each text.
fn kept(comparison: &Comparison, model: usize, confidence: f64) -> Result<Interval> {
    let mut shares = Vec::new();
    if !comparison.tasks.is_empty() {
        let overall = comparison.overall.get(model).and_then(Option::as_ref);
        let overall = overall.ok_or_else(|| {
            anyhow!("the teacher scores nothing on these tasks that there could be a share of: choose others (--on)")
        })?;
        shares.push(overall.recovery);
    }
    for d in comparison.divergences.iter().filter(|d| d.model == model) {
        let windows = d.tokens.div_ceil(WINDOW - 1);
        let width = student_quantile(f64::midpoint(1.0, confidence), windows.saturating_sub(1).max(1) as f64)
            * d.log_perplexity_ratio.standard_error;
        let lost = d.log_perplexity_ratio.value;
        shares.push(Interval { estimate: (-lost).exp(), low: (-lost - width).exp(), high: (-lost + width).exp() });
    }
    let least = shares.into_iter().reduce(|a, b| if b.low < a.low { b } else { a });
    least.filter(|i| i.low.is_finite()).context("nothing was measured that there could be a share of")
}

/// Writes the chosen model as its own folder, of the same files where the file system can, and what was looked at.
fn write(chosen: &Look, looks: &[Look], target: f64, met: bool, out: &Path) -> Result<()> {
    let writer = FolderWriter::create(out)?;
    for entry in std::fs::read_dir(&chosen.folder)? {
        let entry = entry?;
        let to = writer.path().join(entry.file_name());
        if entry.file_type()?.is_file() && std::fs::hard_link(entry.path(), &to).is_err() {
            std::fs::copy(entry.path(), &to).with_context(|| to.display().to_string())?;
        }
    }
    let look = |l: &Look| json!({"model": l.label, "kept": {"estimate": l.kept.estimate, "low": l.kept.low, "high": l.kept.high}});
    let record = json!({"asked": target, "met": met, "chosen": chosen.label, "confidence_of_all_looks": CONFIDENCE,
        "looks": looks.iter().map(look).collect::<Vec<Value>>()});
    writer.json("recoup_until.json", &record)?;
    Ok(writer.commit()?)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_share_what_may_go_wrong() {
        assert_eq!(confidence(1), 0.95);
        assert!((confidence(4) - 0.9875).abs() < 1e-12);
        assert!(share("0.98").is_ok() && ["0", "1", "98", "-1", "nan", "x"].iter().all(|s| share(s).is_err()));
    }
}
