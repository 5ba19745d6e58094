//! `recoup serve`: models behind OpenAI's API.

use std::io::IsTerminal as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};

use super::device::{AnyBackend, Runs as _};
use super::guessing::{Guesser, Guessing};
use super::options::{EngineOptions, TemplateOptions, at_least_one, model_folder, open_model, with_arguments};
use super::replies::ParserOptions;
use super::room::Memory;
use crate::backend::{Either, PAGE};
use crate::engine::{Engine, Limits};
use crate::evaluate::facts::facts;
use crate::formats::kv::KvFormat;
use crate::model::Decoder;
use crate::model::config::MixerConfig;
use crate::serve::http;
use crate::serve::metrics::Metrics;
use crate::serve::model::ServedModel;
use crate::serve::state::{Models, State};
use crate::serve::worker::{Desk, Worker, work};
use crate::text::grammar::GrammarFactory;
use crate::text::{ChatTemplate, ModelText, SpecialTokens};

/// Options have vLLM's names where they mean the same.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folders or hub ids; the first answers requests that name no model
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Address to listen on; 0.0.0.0 is all of this machine
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port; 0 takes a free one, which is said
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Keys that may ask; may be given several times [default: $RECOUP_API_KEY; without one everybody may]
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// What requests call the model, one for each model; further ones for a single model are other names of it
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// Tokens of prompt and answer at most [default: what the model has, within the memory of the cache]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one::<usize>)]
    max_model_len: Option<usize>,
    /// Sequences that run side by side
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one::<usize>)]
    max_num_seqs: usize,
    /// Tokens of one pass: more make prompts faster and others wait longer
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = at_least_one::<usize>)]
    max_num_batched_tokens: usize,
    /// Sequences that may wait beside those that run; more are told to come again (503)
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_queue: usize,
    /// Memory of each model's KV cache in GiB [default: a quarter of what is free; on a GPU by --gpu-memory-utilization]
    #[arg(long, value_name = "GIB")]
    kv_cache_memory: Option<f64>,
    /// Share of a GPU's memory that may be used, weights included
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    gpu_memory_utilization: f64,
    /// Guess tokens and compute several at once; answers stay what they are. As vLLM's: '{"method": "ngram",
    /// "num_speculative_tokens": 4}' repeats what the text has had before, '{"model": "FOLDER", "num_speculative_tokens": 4}'
    /// asks a smaller model of the same tokenizer
    #[arg(long, value_name = "JSON")]
    speculative_config: Option<Guessing>,
    /// File with a chat template instead of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    #[command(flatten)]
    template: TemplateOptions,
    #[command(flatten)]
    parsers: ParserOptions,
    /// Connections of one client at a time, by its address (IPv6: its network); behind a proxy all are the proxy's [default: a
    /// quarter of all that there can be, 1024]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    max_connections_per_client: Option<usize>,
    /// MiB of a request's body at most
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = at_least_one::<usize>)]
    max_body_mib: usize,
    /// Seconds for answers under way to be finished after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    shutdown_timeout: u64,
    /// Pages of these origins may ask too; * for all
    #[arg(long, value_name = "ORIGIN")]
    allowed_origins: Vec<String>,
    /// Names by which it may be asked where it listens for this machine only and without a key, beside localhost and addresses
    #[arg(long, value_name = "NAME")]
    allowed_hosts: Vec<String>,
    /// Folder of evaluation reports that the page shows
    #[arg(long, value_name = "FOLDER")]
    reports: Option<PathBuf>,
    /// Show no page at /
    #[arg(long)]
    no_page: bool,
    /// Write the log as JSON, a line for each event ($RECOUP_LOG sets what is written: warn, info, debug)
    #[arg(long)]
    log_json: bool,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

/// Bytes of a model's KV cache at least, where it is not said.
const LEAST_CACHE: f64 = 64.0 * MIB;
/// Tokens that a model is given room for beside its weights, where nobody says how many.
const CONTEXT: usize = 8192;
const MIB: f64 = 1024.0 * 1024.0;

/// Files that a server has open beside its connections, at most.
#[cfg(unix)]
const OTHER_FILES: usize = 256;

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let names = names(args)?;
    if !(0.0..=1.0).contains(&args.gpu_memory_utilization) {
        bail!("--gpu-memory-utilization must be from 0 to 1, found {}", args.gpu_memory_utilization);
    }
    if args.kv_cache_memory.is_some_and(|g| !(g > 0.0 && g.is_finite())) {
        bail!("--kv-cache-memory must be above 0");
    }
    let keys = keys(args)?;
    let has_keys = !keys.is_empty();
    if let Some(folder) = &args.reports
        && !folder.is_dir()
    {
        bail!("--reports {}: no such folder", folder.display());
    }
    log(args.log_json);
    // Before minutes go into loading: an address that is taken.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()
        .context("no threads for the server")?;
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind((args.host, args.port)))
        .with_context(|| format!("{}:{} cannot be listened on", args.host, args.port))?;
    let address = listener.local_addr()?;
    let metrics = Metrics::new()?;
    let (failed, mut failure) = tokio::sync::mpsc::unbounded_channel::<String>();
    let mut served = Vec::new();
    for (model, names) in args.models.iter().zip(names) {
        let loaded = load(args, model, names, &metrics)?;
        let (worker, failed, name) = (loaded.work, failed.clone(), loaded.model.name().to_owned());
        served.push(loaded.model);
        let thread = move || {
            // A panic has written its message; the server goes down either way.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(worker));
            let why = match result {
                Ok(Ok(())) => return,
                Ok(Err(e)) => format!("{name}: {e:#}"),
                Err(_) => format!("{name}: a fault of the program, see above"),
            };
            let _ = failed.send(why);
        };
        std::thread::Builder::new().name("engine".into()).spawn(thread).context("no thread for the engine")?;
    }
    let connections = connections();
    let state = Arc::new(State {
        models: Models::new(served),
        metrics,
        keys,
        connections,
        connections_of_one: args.max_connections_per_client.unwrap_or(connections.div_ceil(4)),
        body: args.max_body_mib << 20,
        reports: args.reports.clone(),
        origins: args.allowed_origins.clone(),
        local: args.host.is_loopback() && !has_keys,
        hosts: args.allowed_hosts.clone(),
        page: !args.no_page,
        draining: false.into(),
    });
    super::say!(
        "listening on http://{address}{}",
        if args.no_page { "" } else { " (a page for browsers, /v1 for clients)" }
    );
    let mut died = None;
    let stop = async {
        tokio::select! {
            () = signals() => {}
            why = failure.recv() => died = why,
        }
    };
    let served = runtime.block_on(http::serve(listener, state, stop, Duration::from_secs(args.shutdown_timeout)));
    // Threads that are in the middle of something are not waited for.
    runtime.shutdown_background();
    if let Some(why) = died {
        bail!("the engine has stopped: {why}");
    }
    served.context("going down")?;
    super::say!("all that was begun is finished");
    super::done()
}

/// Names of each model.
fn names(args: &Args) -> Result<Vec<Vec<String>>> {
    let own = |model: &Path| {
        // A hub id is its name; a folder is called by its last part.
        let folder = model.canonicalize().ok().filter(|_| model.exists());
        match folder.as_deref().and_then(Path::file_name) {
            Some(name) => name.to_string_lossy().into_owned(),
            None => model.to_string_lossy().into_owned(),
        }
    };
    let given = &args.served_model_name;
    let names: Vec<Vec<String>> = match (given.len(), args.models.len()) {
        (0, _) => args.models.iter().map(|model| vec![own(model)]).collect(),
        (_, 1) => vec![given.clone()],
        (n, m) if n == m => given.iter().map(|name| vec![name.clone()]).collect(),
        (n, m) => bail!("--served-model-name: {n} names for {m} models; give one for each"),
    };
    let mut all: Vec<&String> = names.iter().flatten().collect();
    if all.iter().any(|name| name.trim().is_empty()) {
        bail!("--served-model-name must not be empty");
    }
    all.sort();
    if let Some(twice) = all.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("two models would be called {}; --served-model-name gives each a name of its own", twice[0]);
    }
    Ok(names)
}

/// Connections that there can be at a time: each needs a descriptor, of which a process may have more than it is given at first.
#[cfg(unix)]
fn connections() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = (http::CONNECTIONS + OTHER_FILES) as u64;
    let limit = getrlimit(Resource::Nofile);
    let enough = limit.current.is_none_or(|current| current >= wanted);
    let most = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if !enough && setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit }).is_err() {
        tracing::debug!("the limit of open files stays what it is");
    }
    let current = getrlimit(Resource::Nofile).current.unwrap_or(wanted).min(wanted) as usize;
    current.saturating_sub(OTHER_FILES).clamp(16, http::CONNECTIONS)
}

#[cfg(not(unix))]
fn connections() -> usize {
    http::CONNECTIONS
}

fn keys(args: &Args) -> Result<Vec<blake3::Hash>> {
    let mut keys = args.api_key.clone();
    if keys.is_empty() {
        keys.extend(std::env::var("RECOUP_API_KEY").ok().filter(|key| !key.is_empty()));
    }
    if keys.iter().any(|key| key.trim().is_empty()) {
        bail!("--api-key must not be empty");
    }
    Ok(keys.iter().map(|key| blake3::hash(key.trim().as_bytes())).collect())
}

fn log(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("RECOUP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match json {
        true => log.json().flatten_event(true).init(),
        false => log.with_ansi(std::io::stderr().is_terminal()).init(),
    }
}

/// Waits for the first signal that ends the server.
#[cfg(unix)]
async fn signals() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    // A second one does not wait.
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(130);
    });
}

#[cfg(not(unix))]
async fn signals() {
    let _ = tokio::signal::ctrl_c().await;
}

/// A model, and its work, which a thread is to do.
struct Loaded {
    model: ServedModel,
    work: Box<dyn FnOnce() -> Result<()> + Send>,
}

fn load(args: &Args, model: &Path, names: Vec<String>, metrics: &Metrics) -> Result<Loaded> {
    let folder = model_folder(model)?;
    let checkpoint = open_model(&folder)?;
    let text = ModelText::from_folder(&folder, &checkpoint.config)?;
    super::say_notes(text.tokenizer().notes());
    let own = |template: Option<ChatTemplate>| match &args.chat_template {
        None => Ok(template),
        Some(file) => {
            let source =
                std::fs::read_to_string(file).with_context(|| format!("--chat-template {}", file.display()))?;
            let special = SpecialTokens::from_folder(&folder)?;
            anyhow::Ok(Some(ChatTemplate::from_source(&file.display().to_string(), source, special)?))
        }
    };
    let text = text.map_template(own)?;
    let text = text.map_template(|template| with_arguments(template, args.template.arguments(), &folder))?;
    let format = args.parsers.format(text.template());
    let text = text.with_replies(format);
    let formats = facts("", &checkpoint)?.format.unwrap_or_default();
    let decoder = args.options.load_for(&checkpoint, args.max_model_len.unwrap_or(CONTEXT))?;
    drop(checkpoint);
    let draft =
        args.speculative_config.as_ref().map(|guessing| guessing.load(&args.options, text.tokenizer())).transpose()?;
    let limits = limits(args, &decoder)?;
    if let Some(guesser) = &draft {
        // What does not go together is found here, not by the thread that is to work with it.
        Engine::new(&decoder, limits, args.options.kv_cache_dtype)?.with_speculation(guesser.speculation())?;
    }
    let vocab = decoder.config.vocab;
    let grammars = GrammarFactory::new(text.tokenizer(), vocab, text.stop_tokens())?;
    let most = args.max_num_seqs.saturating_add(args.max_queue);
    let name = names.first().cloned().unwrap_or_default();
    let (worker, desk) = Worker::new(most, metrics.of(&name));
    tracing::info!(model = name, formats, context = limits.context, cache_tokens = limits.pages * PAGE, "loaded");
    let kv = args.options.kv_cache_dtype;
    let thinking_switch = text.template().is_some_and(|template| template.thinking_switch().is_some());
    let of_token = |id| text.tokenizer().token_bytes(id).map_or(0, |bytes| bytes.len());
    let longest = (0..u32::try_from(vocab).unwrap_or(u32::MAX)).map(of_token).max().unwrap_or(1);
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let model = ServedModel {
        names,
        text,
        format,
        grammars,
        thinking_switch,
        context: limits.context,
        longest,
        vocab,
        created,
        formats,
        worker,
    };
    Ok(Loaded { model, work: Box::new(move || answer(&decoder, draft.as_ref(), limits, kv, desk)) })
}

/// Does the work of one model until nobody asks any more.
fn answer(
    decoder: &Decoder<AnyBackend>,
    guesser: Option<&Guesser>,
    limits: Limits,
    kv: KvFormat,
    desk: Desk,
) -> Result<()> {
    let mut engine = Engine::new(decoder, limits, kv)?;
    if let Some(guesser) = guesser {
        engine = engine.with_speculation(guesser.speculation())?;
    }
    Ok(work(&mut engine, desk)?)
}

/// How many times what one rank keeps of the cache at the most all of them keep.
fn parts(decoder: &Decoder<AnyBackend>) -> f64 {
    let (tensor, pipeline) = decoder.backend().size();
    let part = |count: usize, ranks: usize| count as f64 / count.div_ceil(ranks.max(1)).max(1) as f64;
    let kv_heads = decoder.config.layers.iter().flat_map(|l| &l.steps).filter_map(|s| match &s.mixer {
        MixerConfig::Attention(a) => Some(a.kv_heads),
        _ => None,
    });
    part(kv_heads.min().unwrap_or(1), tensor) * part(decoder.config.layers.len(), pipeline)
}

/// How much is computed at once and kept: the cache has what memory it may have, and the context what the cache has.
fn limits(args: &Args, decoder: &Decoder<AnyBackend>) -> Result<Limits> {
    let (kv, models) = (args.options.kv_cache_dtype, args.models.len() as f64);
    let bytes = match (args.kv_cache_memory, decoder.backend().own()) {
        (Some(gib), _) => gib * 1024.0 * MIB,
        (None, Either::B(gpu)) => {
            let (free, all) = gpu.device().memory()?;
            let own = (free as f64 - all as f64 * (1.0 - args.gpu_memory_utilization)) / models;
            // What one of several GPUs has room for is a part of the cache.
            (own * parts(decoder)).max(LEAST_CACHE)
        }
        (None, Either::A(cpu)) => {
            // Experts that are still to come leave to the cache what they leave.
            let memory = Memory::here().without(cpu.open_expert_bytes());
            let share = if cpu.open_expert_bytes() > 0 { 0.75 } else { 0.25 };
            memory.free.map_or(1024.0 * MIB, |free| (free as f64 * share / models).max(LEAST_CACHE))
        }
    };
    let page = decoder.page_bytes(kv).max(1);
    let pages = (bytes / page as f64) as usize;
    let positions = decoder.config.max_positions;
    let room = pages.saturating_sub(2).max(1) * PAGE;
    let context = match args.max_model_len {
        Some(n) if n > positions => bail!("--max-model-len {n}: the model has {positions} positions"),
        Some(n) if n > room => bail!(
            "--max-model-len {n}: the KV cache of {} has room for {room} tokens; --kv-cache-memory sets another size",
            super::human_bytes(bytes as u64)
        ),
        Some(n) => n,
        None => positions.min(room),
    };
    // More than all sequences could use is never made.
    let sequences = args.max_num_seqs;
    let most = Limits::new(context, sequences);
    let pages = pages.min(most.pages.saturating_mul(2));
    Ok(Limits { pages, kept: pages, pass: args.max_num_batched_tokens, ..most })
}
