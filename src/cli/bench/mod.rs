//! `recoup bench`: how fast a model answers on this machine, beside what the machine allows and what others would; or how fast
//! a server does.

mod served;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use recoup_ground::http::address::is_address;
use serde_json::{Value, json};

use super::device::{AnyBackend, Runs as _};
use super::options::{EngineOptions, ShapeOptions, at_least_one, model_folder, open_model};
use crate::backend::Either;
use crate::checkpoint::dialect::Dialect;
use crate::evaluate::bench::devices::{DEVICES, Device};
use crate::evaluate::bench::{Case, Load, Timing, measure};
use crate::model::Decoder;
use crate::output;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Checkpoint folder or hub id, or the URL of a server (http://host:port/v1)
    #[arg(required_unless_present = "shape")]
    model: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeOptions,
    /// Sequences that are continued together [default: 1,8,32]
    #[arg(long, value_delimiter = ',', value_parser = at_least_one::<usize>)]
    batch: Vec<usize>,
    /// Tokens of the prompts
    #[arg(long, value_delimiter = ',', default_value = "128,1024", value_parser = at_least_one::<usize>)]
    prompt: Vec<usize>,
    /// Tokens that are generated after each
    #[arg(short = 'n', long, default_value_t = 32, value_parser = at_least_one::<usize>)]
    generate: usize,
    /// Prompts that are timed, of which the fastest counts; of a URL runs, of which the median does
    #[arg(long, default_value_t = 3, value_parser = at_least_one::<usize>)]
    repeats: usize,
    /// What computes: ours, or the plain model in candle-transformers on the CPU, in f32 (a build with `--features reference`)
    #[arg(long, value_enum, default_value_t)]
    engine: Engine,
    /// Print JSON; of a server with the names of vLLM's benchmark
    #[arg(long)]
    json: bool,
    /// Write that JSON to a file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    url: served::UrlArgs,
    #[command(flatten)]
    pub(super) options: EngineOptions,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Engine {
    #[default]
    Recoup,
    Reference,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let url = args.model.as_deref().and_then(Path::to_str).filter(|m| is_address(m));
    if let Some(url) = url {
        if !args.batch.is_empty() {
            bail!("--batch is of a model that runs here; --concurrency is that of a server");
        }
        if args.engine == Engine::Reference {
            bail!("--engine is of a model that runs here; a server has its own");
        }
        return served::run(url, &args.url, args);
    }
    if let Some(name) = args.url.given() {
        bail!("{name} is of a server: give its URL (http://host:port/v1) in place of the model");
    }
    if args.engine == Engine::Reference {
        return reference(args);
    }
    let (name, model) = if let Some(random) = args.shape.model(Dialect::ModelOpt)? {
        let bar = super::progress(0, "making random weights");
        let model =
            Decoder::load_with_progress(args.options.backend_for(random.bytes())?, &random, &mut |done, all| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            })?;
        bar.finish();
        (args.shape.name().to_owned(), model)
    } else {
        let Some(folder) = &args.model else { bail!("MODEL or --model-shape is needed") };
        (folder.display().to_string(), args.options.load(&open_model(&model_folder(folder)?)?)?)
    };
    expect_positions(args, model.config.max_positions)?;
    let claim = args.output.as_deref().map(output::file).transpose()?;
    let kv = model.cache_format(args.options.kv_cache_dtype);
    let load = Load::of(&model, kv);
    let machine = Machine::of(model.backend())?;
    let cases = cases(args);
    let bar = super::progress(cases.len() as u64, "measuring");
    let mut timings = Vec::new();
    for case in &cases {
        timings.push(measure(&model, args.options.kv_cache_dtype, *case, args.repeats)?);
        bar.inc(1);
    }
    bar.finish();
    // Others may have slowed the first look: what is called a floor has to be one.
    let machine = machine.best(Machine::of(model.backend())?);
    let rows: Vec<Value> = timings.iter().map(|t| row(t, &load, &machine)).collect();
    let report = json!({"model": name, "machine": args.options.machine()?, "recoup_version": env!("CARGO_PKG_VERSION"),
        "memory_bytes_per_second": machine.memory, "multiply_adds_per_second": machine.products,
        "integer_multiply_adds_per_second": machine.integers,
        "weight_bytes": load.resident, "weight_bytes_per_step": load.weights, "cache_bytes_per_token": load.cache,
        "cases": rows, "devices": devices(&cases, &load)});
    if let Some(claim) = &claim {
        claim.write(&format!("{report:#}\n"))?;
    }
    if args.json {
        super::outln!("{report:#}");
    } else {
        super::outln!("{name} on {}", args.options.machine()?);
        super::outln!(
            "memory gives {:.0} GB/s{}; a token takes {} of weights and {} a position of cache",
            machine.memory / 1e9,
            machine.said(),
            super::human_bytes(load.weights as u64),
            super::human_bytes(load.cache as u64)
        );
        super::outln!("{}", table(&timings, &load, &machine));
        super::outln!("\nfloors by the makers' figures (memory, BF16 tensor cores)\n{}", device_table(&cases, &load));
    }
    super::done()
}

fn cases(args: &Args) -> Vec<Case> {
    let batches = if args.batch.is_empty() { &[1, 8, 32] } else { &args.batch[..] };
    let of = |&prompt| batches.iter().map(move |&batch| Case { batch, prompt, generate: args.generate });
    args.prompt.iter().flat_map(of).collect()
}

fn expect_positions(args: &Args, positions: usize) -> Result<()> {
    let longest = args.prompt.iter().max().map_or(0, |p| p + args.generate);
    if longest > positions {
        bail!("--prompt and -n together are {longest} tokens; the model has {positions} positions");
    }
    Ok(())
}

#[cfg(not(feature = "reference"))]
fn reference(_: &Args) -> Result<ExitCode> {
    bail!("this build has no reference engine: `cargo build --release --features reference` makes one that has")
}

/// The same measurements of candle-transformers.
#[cfg(feature = "reference")]
fn reference(args: &Args) -> Result<ExitCode> {
    use crate::evaluate::bench::reference::Reference;
    let Some(folder) = &args.model else { bail!("--engine reference needs a model: --model-shape is of ours") };
    // The pool that candle multiplies in.
    super::options::threads(args.options.threads);
    let mut model = Reference::load(&open_model(&model_folder(folder)?)?)?;
    expect_positions(args, model.positions)?;
    let claim = args.output.as_deref().map(output::file).transpose()?;
    let cases = cases(args);
    let bar = super::progress(cases.len() as u64, "measuring");
    let mut timings = Vec::new();
    for case in cases {
        timings.push(model.measure(case, args.repeats)?);
        bar.inc(1);
    }
    bar.finish();
    let rows: Vec<Value> = timings
        .iter()
        .map(|t| {
            json!({"batch": t.case.batch, "prompt_tokens": t.case.prompt, "generated_tokens": t.case.generate,
                "first_token_seconds": t.first_token, "prefill_tokens_per_second": t.prefill_rate(),
                "step_seconds": t.step, "step_p90_seconds": t.step_p90, "step_p99_seconds": t.step_p99,
                "tokens_per_second": t.rate()})
        })
        .collect();
    let report = json!({"model": folder.display().to_string(), "engine": "candle-transformers, f32",
        "machine": args.options.machine()?, "recoup_version": env!("CARGO_PKG_VERSION"), "cases": rows});
    if let Some(claim) = &claim {
        claim.write(&format!("{report:#}\n"))?;
    }
    if args.json {
        super::outln!("{report:#}");
        return super::done();
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["prompt", "batch", "first token", "prompt tokens/s", "step p50", "p90", "p99", "tokens/s"]);
    let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
    for t in &timings {
        let (prompt, batch) = (t.case.prompt.to_string(), t.case.batch.to_string());
        let (prefill, rate) = (format!("{:.0}", t.prefill_rate()), format!("{:.1}", t.rate()));
        table.add_row([prompt, batch, ms(t.first_token), prefill, ms(t.step), ms(t.step_p90), ms(t.step_p99), rate]);
    }
    super::outln!("{} in candle-transformers, f32, on {}\n{table}", folder.display(), args.options.machine()?);
    super::done()
}

/// What known devices allow in every case.
fn devices(cases: &[Case], load: &Load) -> Vec<Value> {
    let of = |device: &Device| {
        let case = |case: &Case| {
            json!({"batch": case.batch, "prompt_tokens": case.prompt, "fits": device.holds(load, *case),
                "first_token_floor_seconds": device.first_token(load, *case),
                "step_floor_seconds": device.step(load, *case)})
        };
        json!({"name": device.name, "memory_bytes": device.memory, "memory_bytes_per_second": device.bandwidth,
            "bf16_multiply_adds_per_second": device.products, "cases": cases.iter().map(case).collect::<Vec<_>>()})
    };
    DEVICES.iter().map(of).collect()
}

/// The same for people: the longest prompt's first token, and a step of each batch after it.
fn device_table(cases: &[Case], load: &Load) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let longest = cases.iter().map(|c| c.prompt).max().unwrap_or(0);
    let cases: Vec<&Case> = cases.iter().filter(|c| c.prompt == longest).collect();
    let mut header = vec![String::new(), format!("first token of {longest}")];
    header.extend(cases.iter().map(|c| format!("step of {}", c.batch)));
    table.set_header(header);
    for device in DEVICES {
        let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
        let mut row = vec![device.name.to_owned()];
        row.extend(cases.first().map(|c| ms(device.first_token(load, **c))));
        row.extend(cases.iter().map(|c| match device.holds(load, **c) {
            true => ms(device.step(load, **c)),
            false => "does not fit".to_owned(),
        }));
        table.add_row(row);
    }
    table
}

/// What the machine allows.
struct Machine {
    /// Bytes per second, measured.
    memory: f64,
    /// Multiply-adds per second: of a CPU measured, of tensor cores by clock and count.
    products: Option<f64>,
    /// Those of integers, where they are faster.
    integers: Option<f64>,
}

impl Machine {
    fn of(backend: &AnyBackend) -> Result<Self> {
        let own = match backend.own() {
            Either::A(cpu) => {
                let peak = cpu.peak();
                Self { memory: cpu.memory_speed(), products: Some(peak.floats), integers: peak.integers }
            }
            Either::B(gpu) => Self {
                memory: gpu.device().copy_speed()?,
                products: Some(gpu.device().tensor_peak()?).filter(|p| *p > 0.0),
                integers: None,
            },
        };
        // Ranks that share a layer work at the same time; stages one after the other.
        let all = |own: f64| own * backend.size().0 as f64;
        Ok(Self { memory: all(own.memory), products: own.products.map(all), integers: own.integers.map(all) })
    }

    /// How fast it multiplies, for people.
    fn said(&self) -> String {
        match (self.products, self.integers) {
            (Some(p), _) if p > 1e13 => format!(", tensor cores {:.0} T multiply-adds/s", p / 1e12),
            (Some(p), Some(i)) => format!(", cores {:.0} G multiply-adds/s of f32, {:.0} G of bytes", p / 1e9, i / 1e9),
            (Some(p), None) => format!(", cores {:.0} G multiply-adds/s", p / 1e9),
            (None, _) => String::new(),
        }
    }

    /// Seconds that a step takes at least, by what it reads.
    fn step(&self, load: &Load, case: Case) -> f64 {
        load.step_bytes(case.batch, case.prompt + case.generate / 2) / self.memory
    }

    /// Seconds that a prompt takes at least.
    fn first_token(&self, load: &Load, case: Case) -> f64 {
        let read = load.step_bytes(case.prompt, 0) / self.memory;
        let (all, integers) = (load.prompt_products(case.prompt), load.prompt_integers(case.prompt));
        self.products.map_or(read, |p| read.max((all - integers) / p + integers / self.integers.unwrap_or(p)))
    }

    /// The faster of what was seen twice: other users of the machine only make it slower.
    fn best(self, other: Self) -> Self {
        let most = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a.max(b));
        Self {
            memory: self.memory.max(other.memory),
            products: most(self.products, other.products),
            integers: most(self.integers, other.integers),
        }
    }
}

fn row(t: &Timing, load: &Load, machine: &Machine) -> Value {
    json!({"batch": t.case.batch, "prompt_tokens": t.case.prompt, "generated_tokens": t.case.generate,
        "first_token_seconds": t.first_token, "first_token_floor_seconds": machine.first_token(load, t.case),
        "prefill_tokens_per_second": t.prefill_rate(), "step_seconds": t.step, "step_p90_seconds": t.step_p90, "step_p99_seconds": t.step_p99,
        "step_floor_seconds": machine.step(load, t.case), "tokens_per_second": t.rate()})
}

fn table(timings: &[Timing], load: &Load, machine: &Machine) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "prompt",
        "batch",
        "first token",
        "floor",
        "prompt tokens/s",
        "step p50",
        "p90",
        "p99",
        "floor",
        "of it",
        "tokens/s",
    ]);
    let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
    for t in timings {
        let floor = machine.step(load, t.case);
        table.add_row([
            t.case.prompt.to_string(),
            t.case.batch.to_string(),
            ms(t.first_token),
            ms(machine.first_token(load, t.case)),
            format!("{:.0}", t.prefill_rate()),
            ms(t.step),
            ms(t.step_p90),
            ms(t.step_p99),
            ms(floor),
            format!("{:.0} %", 100.0 * floor / t.step),
            format!("{:.1}", t.rate()),
        ]);
    }
    table
}
