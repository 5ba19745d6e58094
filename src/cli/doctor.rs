//! `recoup doctor`: what this machine has, which kernel each format gets and why, and whether a GPU computes what it should.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::device::{DeviceChoice, Own, Runs as _, on_cpu};
use super::machine::{cpu_name, features, memory_bytes};
use crate::backend::cpu::{isa::Isa, packed};
use crate::backend::cuda::{CudaBackend, Device, Narrow, TABLE_TOKENS};
use crate::evaluate::device_check::{self, Checked};
use crate::evaluate::throughput::{self, Product};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Compare every kernel of this GPU with the CPU: cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// With --device: measure products of square weights of this width too, and what the memory gives
    #[arg(long, value_name = "WIDTH", num_args = 0..=1, default_missing_value = "8192", requires = "device")]
    measure: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Exit code when a kernel does not compute what it should.
const WRONG: u8 = 3;

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    match args.device {
        Some(DeviceChoice::Cuda(ordinal)) => gpu(args, ordinal),
        Some(DeviceChoice::Auto) => bail!("--device auto: name the GPU to be checked, such as cuda:0"),
        Some(DeviceChoice::Cpu) | None => machine(args),
    }
}

/// What this machine has.
fn machine(args: &Args) -> Result<ExitCode> {
    let isa = Isa::detect();
    let available: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = memory_bytes();
    let gpus = gpus();
    let kernels: Vec<_> = packed::combinations()
        .into_iter()
        .map(|c| {
            let how = match c.family {
                packed::Family::Integer => "exact integer dot products per block, one fused multiply-add per block",
                packed::Family::Float => "weights decoded in registers, one fused multiply-add per element",
            };
            (c.weight, c.activation, how)
        })
        .collect();
    if args.json {
        let kernels: Vec<_> = kernels
            .iter()
            .map(|(w, a, how)| json!({"weight": w, "activation": a, "instruction_set": isa.to_string(), "method": how}))
            .collect();
        let gpus: Vec<Value> = match &gpus {
            Ok(found) => found
                .iter()
                .map(|g| match g {
                    Ok(g) => json!({"name": g.name, "architecture": g.architecture(), "driver": g.driver,
                        "memory_bytes": g.memory().ok().map(|m| m.1)}),
                    Err(e) => json!({"error": e}),
                })
                .collect(),
            Err(e) => vec![json!({"error": e})],
        };
        let report = json!({"version": env!("CARGO_PKG_VERSION"), "architecture": std::env::consts::ARCH,
            "cpu": cpu_name(), "cores": cores, "memory_bytes": memory, "features": features(),
            "instruction_sets": available, "chosen": isa.to_string(), "gpus": gpus, "kernels": kernels});
        super::outln!("{report:#}");
        return super::done();
    }
    super::outln!("recoup {} on {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    super::outln!("CPU       {} ({cores} cores)", cpu_name());
    super::outln!("memory    {}", memory.map_or("unknown".into(), super::human_bytes));
    super::outln!("features  {}", features().join(" "));
    super::outln!("kernels   {} (available: {}; all give the same bits)", isa, available.join(", "));
    match gpus {
        Err(e) => super::outln!("GPU       {e}"),
        Ok(found) if found.is_empty() => super::outln!("GPU       none"),
        Ok(found) => {
            for (ordinal, gpu) in found.iter().enumerate() {
                match gpu {
                    Ok(gpu) => {
                        let memory = gpu.memory().map_or(0, |m| m.1 as u64);
                        super::outln!(
                            "GPU       cuda:{ordinal} {gpu}, {}; `recoup doctor --device cuda:{ordinal}` checks its kernels",
                            super::human_bytes(memory)
                        );
                    }
                    Err(e) => super::outln!("GPU       cuda:{ordinal} cannot be used: {e}"),
                }
            }
        }
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["weight", "activation", "kernel", "how"]);
    for (weight, activation, how) in kernels {
        table.add_row([weight.to_owned(), activation, isa.to_string(), how.to_owned()]);
    }
    super::outln!("{table}");
    super::done()
}

/// The GPUs, or why each cannot be used; or why there are none.
fn gpus() -> Result<Vec<Result<Device, String>>, String> {
    if !Device::driver_present() {
        return Err("none (there is no CUDA driver)".into());
    }
    let count = Device::count().map_err(|e| format!("none that can be used: {e}"))?;
    Ok((0..count).map(|ordinal| Device::look(ordinal).map_err(|e| e.to_string())).collect())
}

/// Every kernel of a GPU against the CPU.
fn gpu(args: &Args, ordinal: usize) -> Result<ExitCode> {
    let gpu = CudaBackend::new(ordinal)?;
    let (cpu, device) = (on_cpu(super::options::threads(0))?.own(), Own::B(gpu.clone()));
    let cores = match gpu.narrow() {
        Narrow::None => "BF16",
        Narrow::Mma => "FP4, FP8 and BF16",
        Narrow::Tcgen => "FP4 and BF16",
    };
    super::say!("{}; kernels {}; products on {cores} tensor cores", gpu.device(), gpu.kernels());
    let bar = super::progress(0, "kernels checked");
    let checked =
        device_check::thorough(&cpu, &device, gpu.device().multiprocessors, &mut |done| bar.set_position(done as u64))?;
    bar.finish();
    let wrong: Vec<&Checked> = checked.iter().filter(|c| !c.holds()).collect();
    let measured = args.measure.map(|width| measure(&gpu, width)).transpose()?;
    if args.json {
        let row = |c: &Checked| json!({"what": c.what, "deviation": c.deviation.is_finite().then_some(c.deviation), "allowed": c.allowed, "holds": c.holds()});
        let report = json!({"version": env!("CARGO_PKG_VERSION"), "gpu": gpu.device().to_string(),
            "kernels": gpu.kernels(), "checks": checked.iter().map(row).collect::<Vec<_>>(),
            "measured": measured.as_ref().map(Measured::json)});
        super::outln!("{report:#}");
    } else {
        super::outln!("{}\n", kernels(&gpu)?);
        super::outln!("{}", table(&checked));
        if let Some(measured) = &measured {
            super::outln!("{}", measured.table());
        }
        for c in &wrong {
            super::outln!("WRONG  {c}");
        }
        let passed = checked.len() - wrong.len();
        super::outln!("{passed} of {} checks passed on {}", checked.len(), gpu.device());
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(WRONG) })
}

/// Which kernel computes what.
fn kernels(gpu: &CudaBackend) -> Result<comfy_table::Table> {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let tokens = TABLE_TOKENS.iter().map(|n| if *n == 1 { "1 token".into() } else { n.to_string() });
    table.set_header(["product with 4,096 outputs".to_owned()].into_iter().chain(tokens));
    for (what, names) in gpu.kernel_table()? {
        table.add_row([what].into_iter().chain(names.iter().map(|n| (*n).to_owned())));
    }
    Ok(table)
}

/// The largest deviation of each kind of check.
fn table(checked: &[Checked]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["operation", "checks", "largest deviation", "allowed", ""]);
    let kind = |c: &Checked| {
        c.what.split(", ").next().unwrap_or_default().to_owned() + if c.allowed == 0.0 { ", same bits" } else { "" }
    };
    let mut kinds: Vec<String> = Vec::new();
    for c in checked.iter().map(kind) {
        if !kinds.contains(&c) {
            kinds.push(c);
        }
    }
    for name in kinds {
        let of: Vec<&Checked> = checked.iter().filter(|c| kind(c) == name).collect();
        let worst = of.iter().map(|c| c.deviation).fold(0.0, f64::max);
        let holds = of.iter().all(|c| c.holds());
        table.add_row([
            name,
            of.len().to_string(),
            format!("{worst:.1e}"),
            format!("{:.0e}", of[0].allowed),
            if holds { "ok".into() } else { "WRONG".into() },
        ]);
    }
    table
}

/// What products and memory of a GPU give.
struct Measured {
    /// Bytes per second that a copy within the device moves, read and written together.
    copy: f64,
    /// Multiply-adds per second that its tensor cores could do by clock and count; 0 where that is not known.
    peak: f64,
    products: Vec<Product>,
}

fn measure(gpu: &CudaBackend, width: usize) -> Result<Measured> {
    if width < 128 || !width.is_multiple_of(128) {
        bail!("--measure {width}: expected a multiple of 128");
    }
    let copy = gpu.device().copy_speed()?;
    let bar = super::progress(0, "products measured");
    let products = throughput::products(&Own::B(gpu.clone()), width, &mut |done| bar.set_position(done as u64))?;
    bar.finish();
    Ok(Measured { copy, peak: gpu.device().tensor_peak()?, products })
}

impl Measured {
    fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(["product", "rows", "µs", "GB/s of weights", "of copy", "T multiply-adds/s", "of peak"]);
        for p in &self.products {
            let share = |v: f64, of: f64| if of > 0.0 { format!("{:.0} %", 100.0 * v / of) } else { "-".into() };
            table.add_row([
                format!("{} x {}", p.weight, p.activation),
                p.rows.to_string(),
                format!("{:.1}", 1e6 * p.seconds),
                format!("{:.0}", p.bytes_per_second() / 1e9),
                share(p.bytes_per_second(), self.copy),
                format!("{:.2}", p.rate() / 1e12),
                share(p.rate(), self.peak),
            ]);
        }
        format!("a copy moves {:.0} GB/s\n{table}", self.copy / 1e9)
    }

    fn json(&self) -> Value {
        let product = |p: &Product| {
            json!({"weight": p.weight, "activation": p.activation, "rows": p.rows, "n": p.n, "k": p.k,
            "seconds": p.seconds, "weight_bytes_per_second": p.bytes_per_second(), "multiply_adds_per_second": p.rate()})
        };
        json!({"copy_bytes_per_second": self.copy, "tensor_peak": self.peak,
            "products": self.products.iter().map(product).collect::<Vec<_>>()})
    }
}
