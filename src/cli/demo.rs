//! `recoup demo`: quantize, recover and compare the shipped model, by the commands that a user would give.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use super::steps::words;
use super::{Cli, style};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder for the models and the report; an earlier demo's is replaced
    #[arg(short, long, value_name = "FOLDER", default_value = "recoup-demo")]
    output: PathBuf,
    /// The BF16 model [default: the shipped one]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Steps of each recovery
    #[arg(long, default_value_t = 150)]
    steps: usize,
    /// Threads; 0 is one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// A file that says that a folder is a demo's.
const MARK: &str = "made-by-recoup-demo";
/// What a demo makes there.
const MADE: [&str; 6] = ["ptq", "best-ptq", "unrounded", "qat", "qad", "report"];

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let model = match &args.model {
        Some(model) => model.clone(),
        None => shipped()?,
    };
    let out = &args.output;
    if out.exists() && !out.join(MARK).exists() {
        bail!("{}: exists and is not a demo's; choose another folder with --output", out.display());
    }
    let claim = crate::output::growing(out)?;
    // What an earlier demo made goes, and nothing else that may lie there by now.
    let source = std::fs::canonicalize(&model).unwrap_or_else(|_| model.clone());
    for made in MADE.iter().flat_map(|m| [(*m).to_owned(), format!("{m}.training")]).map(|m| claim.target().join(m)) {
        if source.starts_with(&made) {
            bail!("{}: is the model, and would be replaced; choose another folder with --output", made.display());
        }
        if made.exists() {
            std::fs::remove_dir_all(&made).with_context(|| format!("{}: cannot be removed", made.display()))?;
        }
    }
    std::fs::write(out.join(MARK), "").with_context(|| format!("{}: cannot be written", out.display()))?;

    let (bf16, threads, steps) = (model.into_os_string(), args.threads.to_string(), args.steps);
    let [ptq, best, unrounded, qat, qad, report] = MADE.map(|name| out.join(name).into_os_string());
    let recover = |method: &str, out: &OsStr| -> Vec<OsString> {
        let method = format!("{method}:steps={steps},lr=4e-4,average=0.95");
        let models = [OsStr::new("recover"), &best, "--teacher".as_ref(), &bf16, "--unrounded".as_ref(), &unrounded];
        let rest = ["--method", &method, "--data", "teacher", "--samples", "300", "--evaluate-every", "25", "-o"];
        let words = models.into_iter().chain(rest.iter().map(OsStr::new)).chain([out]);
        words.map(OsStr::to_owned).collect()
    };
    let acts = [
        (
            "Four bits by calibrated maxima, as most tools do it",
            words(&[&"quantize", &bf16, &"--recipe", &"nvfp4", &"-o", &ptq]),
        ),
        (
            "The best four bits without training",
            words(&[&"quantize", &bf16, &"--recipe", &"nvfp4_best", &"-o", &best, &"--keep-unrounded", &unrounded]),
        ),
        ("Recovery by the text alone (QAT); the text is what the BF16 model writes", recover("qat", &qat)),
        ("Recovery by distillation (QAD), from the same start, on the same text, as many steps", recover("qad", &qad)),
        (
            "What each lost and won back, on books that none has seen",
            words(&[
                &"compare",
                &bf16,
                &ptq,
                &best,
                &qat,
                &qad,
                &"--labels",
                &"BF16,PTQ,best PTQ,QAT,QAD",
                &"--tasks",
                &"books",
                &"--text",
                &"books",
                &"--window",
                &"256",
                &"-o",
                &report,
            ]),
        ),
    ];
    for (title, command) in acts {
        super::say!("\n{}\n{}", style(title, "1"), style(&format!("$ recoup {}", shown(&command)), "2"));
        let line = [OsString::from("recoup")].into_iter().chain(command);
        let line = line.chain(["--threads".into(), OsString::from(&threads)]);
        let cli = Cli::try_parse_from(line)?;
        super::run(cli.verb)?;
    }
    super::say!("\n{:.0} s. The report: {}", start.elapsed().as_secs_f64(), out.join("report/report.html").display());
    super::done()
}

/// A command as one would type it.
fn shown(command: &[OsString]) -> String {
    let quoted = |a: String| if a.contains([' ', ':']) { format!("'{a}'") } else { a };
    command.iter().map(|a| quoted(a.to_string_lossy().into_owned())).collect::<Vec<_>>().join(" ")
}

/// The shipped model: below the current folder, or where this was built.
fn shipped() -> Result<PathBuf> {
    let name = Path::new("models/books-bf16");
    let places = [PathBuf::new(), PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
    let found = places.iter().map(|p| p.join(name)).find(|p| p.is_dir());
    found.with_context(|| format!("{}: not found; run this in Recoup's folder, or give --model", name.display()))
}
