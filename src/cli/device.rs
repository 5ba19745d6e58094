//! Which device runs a model: `--device auto|cpu|cuda[:N]`.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use recoup_ground::cache::cache_folder;
use serde_json::{Value, json};

use crate::backend::cpu::{CpuBackend, isa::Isa};
use crate::backend::cuda::{CudaBackend, Device};
use crate::backend::{self, Either};
use crate::checkpoint::identity::value_hash;
use crate::evaluate::device_check;

/// A device of this process.
pub(super) type Own = Either<CpuBackend, CudaBackend>;

/// Whatever runs the model; where it can only be the CPU too, so that all that is generic over backends is compiled for one.
#[cfg(not(feature = "parallel"))]
pub(super) type AnyBackend = Own;
#[cfg(feature = "parallel")]
pub(super) type AnyBackend = Either<Own, crate::backend::parallel::Parallel<Own>>;

/// What has a device of this process for running models.
pub(super) trait Runs {
    /// One device alone.
    fn alone(own: Own) -> Self;

    /// The device of this process.
    fn own(&self) -> Own;

    /// Ranks that share each layer, and stages of layers.
    fn size(&self) -> (usize, usize);
}

#[cfg(not(feature = "parallel"))]
impl Runs for AnyBackend {
    fn alone(own: Own) -> Self {
        own
    }

    fn own(&self) -> Own {
        self.clone()
    }

    fn size(&self) -> (usize, usize) {
        (1, 1)
    }
}

#[cfg(feature = "parallel")]
impl Runs for AnyBackend {
    fn alone(own: Own) -> Self {
        Self::A(own)
    }

    fn own(&self) -> Own {
        match self {
            Self::A(own) => own.clone(),
            Self::B(several) => several.own(Clone::clone),
        }
    }

    fn size(&self) -> (usize, usize) {
        match self {
            Self::A(_) => (1, 1),
            Self::B(several) => (several.size().tensor, several.size().pipeline),
        }
    }
}

/// The CPU with its fastest kernels, for what no GPU does.
pub(super) fn on_cpu(threads: usize) -> backend::Result<AnyBackend> {
    CpuBackend::new(Isa::detect(), threads).map(|cpu| AnyBackend::alone(Either::A(cpu)))
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
            Self::Cuda(ordinal) => {
                open(cpu, ordinal, note).map(Some).with_context(|| format!("--device cuda:{ordinal}"))
            }
            Self::Auto => {
                if !Device::driver_present() {
                    return Ok(None);
                }
                let found = Device::count().map_err(anyhow::Error::from).and_then(|count| match count {
                    0 => Ok(None),
                    _ => open(cpu, 0, note).and_then(|gpu| enough(&gpu, bytes).map(|()| Some(gpu))),
                });
                Ok(found.unwrap_or_else(|e| {
                    note(format!("the CPU computes, not the GPU: {e:#}"));
                    None
                }))
            }
        }
    }
}

/// Device `ordinal`, after it has shown that it computes. FP4 and FP8 tensor cores that do not are left alone, which `note` is told.
fn open(cpu: &CpuBackend, ordinal: usize, note: &mut dyn FnMut(String)) -> Result<CudaBackend> {
    let mut gpu = CudaBackend::new(ordinal)?;
    let mut left = None;
    if let Some(formats) = gpu.narrow().formats() {
        let shown = Shown::of(&gpu);
        let wrong = match shown.outcome() {
            Some(false) => true,
            known => match compare(cpu, &gpu, known.is_some()) {
                Ok(wrong) => !wrong.is_empty(),
                Err(e) if gpu.device().wait().is_err() => {
                    // The device is lost for this process; the next one will not try them.
                    shown.remember(false);
                    let name = &gpu.device().name;
                    let what =
                        format!("{name} failed with its {formats} tensor cores, which the next start leaves alone");
                    return Err(e.context(what));
                }
                Err(e) => return Err(e),
            },
        };
        if !wrong {
            shown.remember(true);
            return Ok(gpu);
        }
        left = Some((shown, formats));
        gpu = gpu.without_narrow();
    }
    let shown = Shown::of(&gpu);
    let wrong = compare(cpu, &gpu, shown.outcome().is_some())?;
    if !wrong.is_empty() {
        bail!(
            "{}: {} kernels do not give what the CPU gives; `recoup doctor --device cuda:{ordinal}` shows all, and \
             CUDA_FORCE_PTX_JIT=1 has the driver assemble them itself:\n  {}",
            gpu.device().name,
            wrong.len(),
            wrong.join("\n  ")
        );
    }
    shown.remember(true);
    if let Some((narrow, formats)) = left {
        narrow.remember(false);
        let name = &gpu.device().name;
        note(format!(
            "BF16 tensor cores compute all products, not the {formats} ones of {name}: those do not give what the CPU gives"
        ));
    }
    Ok(gpu)
}

/// Checks in which a device does not hold: all of them once, which takes seconds, and a few at every start.
fn compare(cpu: &CpuBackend, gpu: &CudaBackend, known: bool) -> Result<Vec<String>> {
    let (expected, computed): (Own, Own) = (Either::A(cpu.clone()), Either::B(gpu.clone()));
    let checked = if known {
        device_check::small(&expected, &computed)?
    } else {
        let bar = super::progress(0, format!("first use of {}: kernels compared with the CPU", gpu.device().name));
        let checked = device_check::thorough(&expected, &computed, gpu.device().multiprocessors, &mut |done| {
            bar.set_position(done as u64)
        })?;
        bar.finish();
        checked
    };
    Ok(checked.iter().filter(|c| !c.holds()).map(ToString::to_string).collect())
}

/// What is remembered of the comparison of this kind of device, driver and kernels.
struct Shown {
    key: Value,
    file: Option<PathBuf>,
}

impl Shown {
    fn of(gpu: &CudaBackend) -> Self {
        let key = json!({"gpu": gpu.device().to_string(), "kernels": gpu.kernels(), "version": env!("CARGO_PKG_VERSION"),
            "assembled_by_driver": std::env::var_os("CUDA_FORCE_PTX_JIT").is_some_and(|v| v != "0")});
        let file = cache_folder().map(|f| f.join(format!("gpu-{}.json", &value_hash(&key)[..16])));
        Self { key, file }
    }

    /// Whether it held; `None` before it was made.
    fn outcome(&self) -> Option<bool> {
        let text = std::fs::read_to_string(self.file.as_ref()?).ok()?;
        serde_json::from_str::<Value>(&text).ok()?["right"].as_bool()
    }

    /// Not being able to remember is no reason to stop.
    fn remember(&self, right: bool) {
        let Some(file) = self.file.as_ref().filter(|_| self.outcome() != Some(right)) else { return };
        let mut text = self.key.clone();
        text["right"] = json!(right);
        let _ = file.parent().map(std::fs::create_dir_all);
        let _ = std::fs::write(file, format!("{text:#}\n"));
    }
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
