//! `recoup scale`: how a model does on many devices, without having one.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::device::DeviceChoice;
use super::machine::cpu_name;
use super::options::{KV_FORMATS, ShapeOptions, at_least_one, model_folder, named, open_model};
use super::{human_bytes, ranks};
use crate::backend::cpu::{CpuBackend, isa::Isa};
use crate::backend::parallel::Size;
use crate::checkpoint::dialect::Dialect;
use crate::evaluate::bench::Case;
use crate::evaluate::bench::devices::{DEVICES, Device};
use crate::evaluate::scale::costs::Costs;
use crate::evaluate::scale::training::Training;
use crate::evaluate::scale::{self, Forecast, Recorded, ScaleError};
use crate::formats::kv::KvFormat;
use crate::model::parallel::PlanError;
use crate::model::{ModelConfig, Source};
use crate::output;
use crate::ranks::threads::Thread;
use crate::ranks::{Link, ROOT};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder or hub id, of which only shapes and formats matter
    #[arg(required_unless_present = "shape")]
    model: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Ranks that share a layer
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1,2,4,8", value_parser = at_least_one::<usize>)]
    tensor_parallel_size: Vec<usize>,
    /// Stages of layers
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1", value_parser = at_least_one::<usize>)]
    pipeline_parallel_size: Vec<usize>,
    /// Sequences that are continued together
    #[arg(long, value_delimiter = ',', default_value = "1,32", value_parser = at_least_one::<usize>)]
    batch: Vec<usize>,
    /// Tokens of the prompts
    #[arg(long, default_value_t = 1024, value_parser = at_least_one::<usize>)]
    prompt: usize,
    /// Tokens that are generated after each
    #[arg(short = 'n', long, default_value_t = 256, value_parser = at_least_one::<usize>)]
    generate: usize,
    /// The devices, by their maker's figures: a100, h100, b200, … (an unknown name lists all)
    #[arg(long, value_name = "NAME", default_value = "h100")]
    gpu: String,
    /// Devices of a machine
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = at_least_one::<usize>)]
    node: usize,
    /// GB/s that the network between machines has for each device
    #[arg(long, default_value_t = 50.0, value_name = "GB/S")]
    network: f64,
    /// Unit costs that --measure found, in the place of a maker's figures
    #[arg(long, value_name = "FILE", conflicts_with = "gpu")]
    costs: Option<PathBuf>,
    /// Finds unit costs of this machine: of one of so many ranks that work at the same time, threads of this process, or the processes
    /// that mpirun began
    #[arg(long, value_name = "RANKS", num_args = 0..=1, default_missing_value = "1", conflicts_with_all = ["gpu", "costs"],
        value_parser = at_least_one::<usize>)]
    measure: Option<usize>,
    /// Instead: one training of it (QAD) by so many processes
    #[arg(long, value_name = "PROCESSES", value_delimiter = ',', value_parser = at_least_one::<usize>)]
    train: Vec<usize>,
    /// Batches of a step of that, which processes share
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = at_least_one::<usize>)]
    batches: usize,
    /// Tokens of each
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = at_least_one::<usize>)]
    tokens: usize,
    /// Seconds that one process takes for a batch, where that was measured
    #[arg(long, value_name = "S")]
    batch_seconds: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write that JSON to a file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Storage of the KV cache where the model does not say it
    #[arg(long, value_parser = named(KV_FORMATS.to_vec()), default_value = "f32")]
    kv_cache_dtype: KvFormat,
    /// With --measure: threads of the CPU [default: as many as there are cores]
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// With --measure: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let (name, source) = source(args)?;
    let config = source.config()?;
    let (costs, of) = match costs(args, &*source, &config)? {
        Some(found) => found,
        None => return super::done(),
    };
    let claim = args.output.as_deref().map(output::file).transpose()?;
    let (rows, table) = match args.train.is_empty() {
        true => served(args, &*source, &costs)?,
        false => trained(args, &config, &costs),
    };
    let report = json!({"model": name, "devices": of, "costs": costs, "recoup_version": env!("CARGO_PKG_VERSION"),
        "prompt_tokens": args.prompt, "generated_tokens": args.generate, "rows": rows});
    if let Some(claim) = &claim {
        claim.write(&format!("{report:#}\n"))?;
    }
    if args.json {
        super::outln!("{report:#}");
    } else {
        super::outln!("{name} on {of}, reckoned\n{table}");
    }
    super::done()
}

/// The model, and what it is called.
fn source(args: &Args) -> Result<(String, Box<dyn Source>)> {
    if let Some(random) = args.shape.model(Dialect::ModelOpt)? {
        let recipe = args.shape.recipe_name().map_or_else(String::new, |r| format!(", {r}"));
        return Ok((format!("{}{recipe}", args.shape.name()), Box::new(random.unfilled()?)));
    }
    let Some(folder) = &args.model else { bail!("MODEL or --model-shape is needed") };
    Ok((folder.display().to_string(), Box::new(open_model(&model_folder(folder)?)?)))
}

/// Unit costs, and whose they are; `None` in a process that only helped to measure them.
fn costs(args: &Args, source: &dyn Source, config: &ModelConfig) -> Result<Option<(Costs, String)>> {
    if let Some(file) = &args.costs {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let report: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        let costs = serde_json::from_value(report["costs"].clone())
            .with_context(|| format!("{}: no unit costs as --measure writes them", file.display()))?;
        return Ok(Some((costs, report["devices"].as_str().unwrap_or("a machine that was measured").to_owned())));
    }
    if let Some(ranks) = args.measure {
        return measured(args, ranks, source, config);
    }
    let Some(device) = gpu_of(args) else {
        bail!("no device is called `{}`; there are {}", args.gpu, DEVICES.map(|d| d.name).join(", "));
    };
    if !(args.network.is_finite() && args.network > 0.0) {
        bail!("--network is a number of GB/s above 0");
    }
    let of = format!("{} by its maker's figures, {} to a machine", device.name, args.node);
    Ok(Some((Costs::of_device(device, args.node, args.network * 1e9), of)))
}

fn measured(args: &Args, ranks: usize, source: &dyn Source, config: &ModelConfig) -> Result<Option<(Costs, String)>> {
    let link = ranks::here()?;
    let modules = config.modules();
    let largest = |block: bool| {
        let of = modules.iter().filter(|m| m.is_block_linear() == block && (block || m.expert.is_none()));
        of.max_by_key(|m| m.role.n * m.role.k).context("the model has no such linear")
    };
    // Numbers that can be multiplied, where the model's own are not there.
    let filled = args.shape.model(Dialect::ModelOpt)?;
    let source = filled.as_ref().map_or(source, |random| random as &dyn Source);
    let (block, plain) = (largest(true)?, largest(false)?);
    let (block, plain) = (source.linear(&block.name, block.role)?, source.linear(&plain.name, plain.role)?);
    let one = |threads: usize, number: usize, link: Option<&dyn Link>| -> Result<(Costs, String)> {
        let cpu = CpuBackend::new(Isa::detect(), threads)?;
        let device = match args.device {
            DeviceChoice::Cuda(first) => DeviceChoice::Cuda(first + number),
            other => other,
        };
        let (linears, copies) = ((&block, &plain), config.layers.len());
        let threads = format!("{threads} thread{}", if threads == 1 { "" } else { "s" });
        Ok(match device.gpu(&cpu, 0, &mut |note| super::say!("note: {note}"))? {
            None => {
                (Costs::measure(&cpu, linears, copies, link)?, format!("{threads} of {} ({})", cpu_name(), cpu.isa()))
            }
            Some(gpu) => (Costs::measure(&gpu, linears, copies, link)?, gpu.device().to_string()),
        })
    };
    let (costs, of, ranks) = match link {
        Some(link) => {
            if ranks > 1 && ranks != link.size() {
                bail!("--measure {ranks}: {} processes were begun together", link.size());
            }
            let threads = ranks::share(&*link, args.threads)?.threads;
            let (costs, of) = one(threads, link.rank(), Some(&*link))?;
            if link.rank() != ROOT {
                return Ok(None);
            }
            (costs, of, link.size())
        }
        None => {
            let each = (super::options::threads(args.threads) / ranks).max(1);
            let found: Vec<Result<(Costs, String)>> = std::thread::scope(|scope| {
                let begin = |link: Thread| {
                    let one = &one;
                    scope.spawn(move || one(each, link.rank(), Some(&link)))
                };
                let begun: Vec<_> = Thread::all(ranks).into_iter().map(begin).collect();
                begun.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a rank came to nothing"))).collect()
            });
            let (costs, of) = found.into_iter().next().context("no rank")??;
            (costs, of, ranks)
        }
    };
    let ranks = if ranks == 1 { "one rank".to_owned() } else { format!("each of {ranks} ranks") };
    Ok(Some((costs, format!("{of}, by what {ranks} of it took"))))
}

/// The device whose figures are taken.
fn gpu_of(args: &Args) -> Option<&'static Device> {
    let plain = |name: &str| name.to_lowercase().replace([' ', '-', '_'], "");
    let named = args.costs.is_none() && args.measure.is_none();
    DEVICES.iter().find(|d| named && plain(d.name).starts_with(&plain(&args.gpu)))
}

/// Every number of ranks that the model can be shared out to, with every batch.
fn served(args: &Args, source: &dyn Source, costs: &Costs) -> Result<(Vec<Value>, comfy_table::Table)> {
    let mut rows = Vec::new();
    let mut table = table(&[
        "ranks",
        "batch",
        "weights",
        "cache",
        "first token",
        "step",
        "tokens/s",
        "own work",
        "a step's traffic",
        "exchanges",
    ]);
    let bar = super::progress(
        (args.tensor_parallel_size.len() * args.pipeline_parallel_size.len() * args.batch.len()) as u64,
        "reckoning",
    );
    for (&tensor, &pipeline) in
        args.tensor_parallel_size.iter().flat_map(|t| args.pipeline_parallel_size.iter().map(move |p| (t, p)))
    {
        for &batch in &args.batch {
            bar.inc(1);
            let case = Case { batch, prompt: args.prompt, generate: args.generate };
            let recorded = match scale::ranks(source, Size { tensor, pipeline }, case, args.kv_cache_dtype) {
                Ok(recorded) => recorded,
                Err(ScaleError::Plan(e @ (PlanError::Heads { .. } | PlanError::Stages { .. }))) => {
                    super::say!("note: {tensor} x {pipeline} ranks: {e}");
                    break;
                }
                Err(e) => return Err(e.into()),
            };
            let forecast = recorded.on(costs)?;
            let fits = gpu_of(args).map(|d| (recorded.held().0 + recorded.held().1) as f64 <= d.memory);
            rows.push(row(&recorded, &forecast, fits));
            table.add_row(cells(&recorded, &forecast, fits));
        }
    }
    bar.finish();
    Ok((rows, table))
}

fn row(recorded: &Recorded, forecast: &Forecast, fits: Option<bool>) -> Value {
    let (size, case, (weights, caches)) = (recorded.size(), recorded.case(), recorded.held());
    let [load, prompt, step] =
        recorded.traffic().map(|t| json!({"bytes": t.bytes, "most_bytes_of_a_rank": t.most, "exchanges": t.exchanges}));
    json!({"tensor": size.tensor, "pipeline": size.pipeline, "batch": case.batch, "weight_bytes_of_a_rank": weights,
        "cache_bytes_of_a_rank": caches, "fits": fits, "first_token_seconds": forecast.first_token,
        "step_seconds": forecast.step, "tokens_per_second": case.batch as f64 / forecast.step,
        "own_work_share": forecast.busy, "load_traffic": load, "prompt_traffic": prompt, "step_traffic": step})
}

fn cells(recorded: &Recorded, forecast: &Forecast, fits: Option<bool>) -> Vec<String> {
    let (size, case, (weights, caches)) = (recorded.size(), recorded.case(), recorded.held());
    let [_, _, step] = recorded.traffic();
    let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
    let fits = if fits == Some(false) { " (does not fit)" } else { "" };
    vec![
        format!("{} x {}", size.tensor, size.pipeline),
        case.batch.to_string(),
        human_bytes(weights as u64),
        format!("{}{fits}", human_bytes(caches as u64)),
        ms(forecast.first_token),
        ms(forecast.step),
        format!("{:.1}", case.batch as f64 / forecast.step),
        format!("{:.0} %", 100.0 * forecast.busy),
        human_bytes(step.most as u64),
        step.exchanges.to_string(),
    ]
}

/// One training by every number of processes.
fn trained(args: &Args, config: &ModelConfig, costs: &Costs) -> (Vec<Value>, comfy_table::Table) {
    let training = Training::of(config, args.tokens, args.batches);
    let mut table = table(&["processes", "memory of each", "a step's traffic", "exchange", "step", "of one"]);
    let one = training.step(1, costs, args.batch_seconds);
    let mut rows = Vec::new();
    for &processes in &args.train {
        let step = training.step(processes, costs, args.batch_seconds);
        rows.push(json!({"processes": processes, "memory_bytes": step.memory, "bytes_of_a_process": step.bytes,
            "exchange_seconds": step.exchange, "step_seconds": step.seconds}));
        table.add_row([
            processes.to_string(),
            human_bytes(step.memory as u64),
            human_bytes(step.bytes as u64),
            format!("{:.3} s", step.exchange),
            format!("{:.3} s", step.seconds),
            format!("{:.2}", one.seconds / step.seconds),
        ]);
    }
    (rows, table)
}

fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header);
    table
}
