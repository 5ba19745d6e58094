//! Which device runs a model: `--device auto|cpu|cuda[:N]`.

use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use recoup_ground::cache::cache_folder;
use serde_json::json;

use crate::backend::cpu::{CpuBackend, isa::Isa};
use crate::backend::cuda::{CudaBackend, Device};
use crate::backend::{self, Either};
use crate::checkpoint::identity::value_hash;
use crate::evaluate::device_check;

/// Whatever runs the model; where it can only be the CPU too, so that all that is generic over backends is compiled for one.
pub(super) type AnyBackend = Either<CpuBackend, CudaBackend>;

/// The CPU with its fastest kernels, for what no GPU does.
pub(super) fn on_cpu(threads: usize) -> backend::Result<AnyBackend> {
    CpuBackend::new(Isa::detect(), threads).map(Either::A)
}

/// Memory that a model takes beside its weights, at least: activations, and the beginning of a cache.
const BESIDE: u64 = 256 << 20;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum DeviceChoice {
    /// The first GPU if there is one that can, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", n)) if n.parse::<u16>().is_ok() => Ok(Self::Cuda(n.parse().unwrap_or_default())),
            _ => Err("expected auto, cpu, cuda or cuda:N, such as cuda:0".into()),
        }
    }
}

impl DeviceChoice {
    /// The GPU to use for models whose weights have `bytes` bytes in files; `None`: the CPU. The GPU has shown that it computes what the CPU
    /// computes. Where nobody insisted on it, `note` is told why it is not used.
    pub(super) fn gpu(self, cpu: &CpuBackend, bytes: u64, note: &mut dyn FnMut(String)) -> Result<Option<CudaBackend>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(ordinal) => open(cpu, ordinal).map(Some).with_context(|| format!("--device cuda:{ordinal}")),
            Self::Auto => {
                if !Device::driver_present() {
                    return Ok(None);
                }
                let found = Device::count().map_err(anyhow::Error::from).and_then(|count| match count {
                    0 => Ok(None),
                    _ => open(cpu, 0).and_then(|gpu| enough(&gpu, bytes).map(|()| Some(gpu))),
                });
                Ok(found.unwrap_or_else(|e| {
                    note(format!("the CPU computes, not the GPU: {e:#}"));
                    None
                }))
            }
        }
    }
}

/// Device `ordinal`, after it has shown that it computes: all of it once, which is remembered for this kind of device, driver
/// and kernels, and a little of it every time.
fn open(cpu: &CpuBackend, ordinal: usize) -> Result<CudaBackend> {
    let gpu = CudaBackend::new(ordinal)?;
    let key = json!({"gpu": gpu.device().to_string(), "kernels": gpu.device().kernels(), "version": env!("CARGO_PKG_VERSION"),
        "assembled_by_driver": std::env::var_os("CUDA_FORCE_PTX_JIT").is_some_and(|v| v != "0")});
    let file = cache_folder().map(|f| f.join(format!("gpu-{}.json", &value_hash(&key)[..16])));
    let known = file.as_ref().is_some_and(|f| f.exists());
    let (expected, computed): (AnyBackend, AnyBackend) = (Either::A(cpu.clone()), Either::B(gpu.clone()));
    let checked = if known {
        device_check::small(&expected, &computed)?
    } else {
        let bar = super::progress(0, format!("first use of {}: kernels compared with the CPU", gpu.device().name));
        let checked = device_check::thorough(&expected, &computed, &mut |done| bar.set_position(done as u64))?;
        bar.finish();
        checked
    };
    let wrong: Vec<String> = checked.iter().filter(|c| !c.holds()).map(ToString::to_string).collect();
    if wrong.is_empty() {
        // Not being able to remember is no reason to stop.
        if let Some(file) = file.filter(|_| !known) {
            let _ = file.parent().map(std::fs::create_dir_all);
            let _ = std::fs::write(file, format!("{key:#}\n"));
        }
    } else {
        bail!(
            "{}: {} kernels do not give what the CPU gives; `recoup doctor --device cuda:{ordinal}` shows all, and \
             CUDA_FORCE_PTX_JIT=1 has the driver assemble them itself:\n  {}",
            gpu.device().name,
            wrong.len(),
            wrong.join("\n  ")
        );
    }
    Ok(gpu)
}

/// Whether weights of `bytes` bytes in files find room.
fn enough(gpu: &CudaBackend, bytes: u64) -> Result<()> {
    let (free, _) = gpu.device().memory()?;
    let needed = bytes + bytes / 8 + BESIDE;
    if (free as u64) < needed {
        let [needed, free] = [needed, free as u64].map(super::human_bytes);
        bail!("{} has {free} of memory free, the model needs {needed} or more", gpu.device().name);
    }
    Ok(())
}
