//! `recoup verify`: whether the engine behind a URL computes what a checkpoint says.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use recoup_openai::{ApiKey, OpenAi, Options as ServerOptions};

use super::options::{
    EngineOptions, TemplateOptions, at_least_one, model_folder, open_model, server_address, text_to_read,
};
use super::talk::Shown;
use crate::corpus::{Opened, text_of};
use crate::evaluate::verify::{NoWay, Options, Subject, Text, Texts, Verdict, VerifyError, verify};
use crate::output;
use crate::text::ModelText;

/// Exit code where the server does not compute what the checkpoint says.
const DIFFERS: u8 = 3;
/// Further tries of a request: a server that is to be verified is there.
const RETRIES: usize = 3;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Address of the server (http://host:port/v1): vLLM, SGLang, TensorRT-LLM, llama.cpp, recoup, or any other that gives
    /// log-probabilities by OpenAI's API
    url: String,
    /// The checkpoint that it should compute: folder or hub id
    model: OsString,
    /// Texts to ask about instead of the built-in ones: files of text or records, folders, patterns, or - for standard input
    #[arg(long, value_delimiter = ',', value_name = "FILES")]
    texts: Vec<PathBuf>,
    /// Most probable tokens that are compared at each place; fewer where the server gives fewer
    #[arg(long, default_value_t = Options::default().top, value_name = "K")]
    top: usize,
    /// Tokens of the longest text [default: 640, or beyond the sliding window where that is small]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    longest: Option<usize>,
    /// Tokens that the server generates after each text, which its kernels for single tokens compute
    #[arg(short = 'n', long, default_value_t = Options::default().generate, value_name = "N")]
    generate: usize,
    /// Times the noise that are allowed: noise is what rounding to BF16 between operations does here to the same tokens
    #[arg(long, default_value_t = Options::default().factor, value_name = "FACTOR")]
    noise_factor: f64,
    /// Nats that are allowed beside it
    #[arg(long, default_value_t = Options::default().floor, value_name = "NATS")]
    noise_floor: f64,
    /// Do not look for the layer of a fault that nothing else explains; that computes the model some hundred times over a
    /// few tokens
    #[arg(long)]
    no_search: bool,
    /// Model name on the server [default: its only one]
    #[arg(long, value_name = "NAME")]
    served_model: Option<String>,
    /// Seconds that one request may take
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = at_least_one::<u64>)]
    timeout: u64,
    /// Certificates (PEM) to trust instead of the public authorities', for https
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateOptions,
    /// Write all that was found to a file, as JSON
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print that instead of the text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    for (name, value) in [("--noise-factor", args.noise_factor), ("--noise-floor", args.noise_floor)] {
        if !(value >= 0.0 && value.is_finite()) {
            bail!("{name} {value}: expected a number from 0 on");
        }
    }
    let server = OpenAi::new(
        &server_address(&args.url)?,
        ServerOptions {
            model: args.served_model.clone(),
            api_key: ApiKey::from_env(),
            timeout: Duration::from_secs(args.timeout),
            retries: RETRIES,
            ca_file: args.ca_file.clone(),
            notice: Some(|text| super::say!("{text}")),
            ..ServerOptions::default()
        },
    )?;
    let folder = model_folder(&args.model)?;
    let checkpoint = open_model(&folder)?;
    let claim = args.output.as_deref().map(output::file).transpose()?;
    let text = text_to_read(&folder, &checkpoint.config, Some(&args.template))?;
    let texts = texts(args, &text)?;
    let model = args.options.load(&checkpoint)?;
    let subject = Subject { checkpoint: &checkpoint, model: &model, text: &text, kv: args.options.kv_cache_dtype };
    let options = Options {
        top: args.top,
        longest: args.longest,
        generate: args.generate,
        factor: args.noise_factor,
        floor: args.noise_floor,
        search: !args.no_search,
        template: args.template.arguments(),
    };
    let report = match verify(&server, &subject, &texts, &options, &mut Shown::default()) {
        Ok(report) => report,
        Err(VerifyError::NoWay(no_way @ NoWay::Refused(_))) => bail!(
            "{no_way}\nvLLM, SGLang and recoup give them without any flag; llama-cpp-python needs --logits_all true, \
             TensorRT-LLM its PyTorch backend, llama.cpp nothing (of tokens that it generates). A gateway in between may take \
             them away: ask the engine itself"
        ),
        Err(error) => return Err(error.into()),
    };
    if let Some(claim) = &claim {
        claim.write(&format!("{:#}\n", report.json()))?;
        super::say!("wrote {}", claim.target().display());
    }
    if args.json {
        super::outln!("{:#}", report.json());
    } else {
        super::outln!("{}", report.text().trim_end());
    }
    Ok(match report.verdict {
        Verdict::Same => ExitCode::SUCCESS,
        Verdict::Differs => ExitCode::from(DIFFERS),
        Verdict::Unknown => ExitCode::FAILURE,
    })
}

/// The texts that are asked about.
fn texts(args: &Args, text: &ModelText) -> Result<Texts> {
    let built_in = Texts::built_in().context("the built-in texts")?;
    if args.texts.is_empty() {
        return Ok(built_in);
    }
    let mut texts = Vec::new();
    for file in &args.texts {
        let opened = Opened::read(file).with_context(|| format!("--texts {}", file.display()))?;
        let (text, counts) = text_of(&opened, text.template())?;
        let name =
            file.file_name().map_or_else(|| Path::new("-").display().to_string(), |n| n.to_string_lossy().into());
        counts.notes(&name, 0).iter().for_each(|note| super::say!("{note}"));
        texts.push(Text { name, text });
    }
    Ok(Texts { texts, chats: built_in.chats })
}
