//! `recoup doctor`: what this machine has, and which kernel each format gets and why.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use super::machine::{cpu_name, features, memory_bytes};
use crate::backend::cpu::{isa::Isa, packed};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let isa = Isa::detect();
    let available: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = memory_bytes();
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
        let report = json!({"version": env!("CARGO_PKG_VERSION"), "architecture": std::env::consts::ARCH,
            "cpu": cpu_name(), "cores": cores, "memory_bytes": memory, "features": features(),
            "instruction_sets": available, "chosen": isa.to_string(), "gpus": [], "kernels": kernels});
        super::outln!("{report:#}");
        return super::done();
    }
    super::outln!("recoup {} on {}", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
    super::outln!("CPU       {} ({cores} cores)", cpu_name());
    super::outln!("memory    {}", memory.map_or("unknown".into(), super::human_bytes));
    super::outln!("features  {}", features().join(" "));
    super::outln!("kernels   {} (available: {}; all give the same bits)", isa, available.join(", "));
    super::outln!("GPU       none: this version runs on the CPU only");
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["weight", "activation", "kernel", "how"]);
    for (weight, activation, how) in kernels {
        table.add_row([weight.to_owned(), activation, isa.to_string(), how.to_owned()]);
    }
    super::outln!("{table}");
    super::done()
}
