//! `recoup demo`: quantize, recover and compare the shipped model, by the commands that a user would give.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

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

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let model = match &args.model {
        Some(model) => model.clone(),
        None => shipped()?,
    };
    let out = &args.output;
    if out.exists() {
        if !out.join(MARK).exists() {
            bail!("{}: exists and is not a demo's; choose another folder with --output", out.display());
        }
        std::fs::remove_dir_all(out).with_context(|| format!("{}: cannot be removed", out.display()))?;
    }
    std::fs::create_dir_all(out).with_context(|| format!("{}: cannot be created", out.display()))?;
    std::fs::write(out.join(MARK), "").with_context(|| format!("{}: cannot be written", out.display()))?;

    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (bf16, threads, steps) = (text(&model), args.threads.to_string(), args.steps);
    let at = |name: &str| text(&out.join(name));
    let (ptq, best, unrounded, qat, qad, report) =
        (at("ptq"), at("best-ptq"), at("unrounded"), at("qat"), at("qad"), at("report"));
    let recover = |method: &str, out: &str| -> Vec<String> {
        let method = format!("{method}:steps={steps},lr=4e-4,average=0.95");
        let args = [
            "recover",
            &best,
            "--teacher",
            &bf16,
            "--unrounded",
            &unrounded,
            "--method",
            &method,
            "--data",
            "teacher",
            "--samples",
            "300",
            "--evaluate-every",
            "25",
            "-o",
            out,
        ];
        args.map(str::to_owned).to_vec()
    };
    let owned = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<String>>();
    let acts = [
        (
            "Four bits by calibrated maxima, as most tools do it",
            owned(&["quantize", &bf16, "--recipe", "nvfp4", "-o", &ptq]),
        ),
        (
            "The best four bits without training",
            owned(&["quantize", &bf16, "--recipe", "nvfp4_best", "-o", &best, "--keep-unrounded", &unrounded]),
        ),
        ("Recovery by the text alone (QAT); the text is what the BF16 model writes", recover("qat", &qat)),
        ("Recovery by distillation (QAD), from the same start, on the same text, as many steps", recover("qad", &qad)),
        (
            "What each lost and won back, on books that none has seen",
            owned(&[
                "compare",
                &bf16,
                &ptq,
                &best,
                &qat,
                &qad,
                "--labels",
                "BF16,PTQ,best PTQ,QAT,QAD",
                "--tasks",
                "books",
                "--text",
                "books",
                "--window",
                "256",
                "-o",
                &report,
            ]),
        ),
    ];
    for (title, command) in acts {
        super::say!("\n{}\n{}", style(title, "1"), style(&format!("$ recoup {}", shown(&command)), "2"));
        let line =
            ["recoup"].into_iter().map(str::to_owned).chain(command).chain(["--threads".into(), threads.clone()]);
        let cli = Cli::try_parse_from(line)?;
        super::run(cli.verb)?;
    }
    super::say!("\n{:.0} s. The report: {}", start.elapsed().as_secs_f64(), out.join("report/report.html").display());
    super::done()
}

/// A command as one would type it.
fn shown(command: &[String]) -> String {
    let quoted = |a: &String| if a.contains([' ', ':']) { format!("'{a}'") } else { a.clone() };
    command.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// The shipped model: below the current folder, or where this was built.
fn shipped() -> Result<PathBuf> {
    let name = Path::new("models/books-bf16");
    let places = [PathBuf::new(), PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
    let found = places.iter().map(|p| p.join(name)).find(|p| p.is_dir());
    found.with_context(|| format!("{}: not found; run this in Recoup's folder, or give --model", name.display()))
}
