//! How fast a backend multiplies, format by format: one linear at a time, with weights that no cache holds.

use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendError};
use crate::formats::linear::{ActivationFormat, BlockScales, LinearTensors, OutputScale};
use crate::formats::synthetic::{self, WEIGHTS};
use crate::random::SplitMix64;

/// Bytes of weights that are gone through before one is read again: beyond the caches of today's devices.
const BEYOND_CACHES: usize = 512 << 20;
/// Time that a measurement takes, about.
const WANTED: Duration = Duration::from_millis(100);
/// Times that a product is measured; the median counts.
const REPEATS: usize = 5;

/// One product's speed.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    pub weight: &'static str,
    pub activation: String,
    pub rows: usize,
    pub n: usize,
    pub k: usize,
    /// Of one product, its input's quantization included.
    pub seconds: f64,
    /// Bytes of the packed weight.
    pub bytes: usize,
}

impl Product {
    /// Bytes of weights that pass per second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// Multiply-adds per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        (self.rows * self.n * self.k) as f64 / self.seconds
    }
}

/// The usual formats with square weights of `width`, for one row to many.
///
/// # Errors
/// The backend's own, and too little memory.
pub fn products<B: Backend>(
    backend: &B,
    width: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Product>, BackendError> {
    let formats = [
        (WEIGHTS[6], ActivationFormat::Nvfp4 { global_scale: 1e-3 }),
        (WEIGHTS[6], ActivationFormat::Float),
        (WEIGHTS[8], ActivationFormat::Float),
        (WEIGHTS[3], ActivationFormat::Fp8Static { scale: 1e-2 }),
        (WEIGHTS[5], ActivationFormat::Fp8Group),
        (WEIGHTS[2], ActivationFormat::Float),
    ];
    let mut out = Vec::new();
    for (weight, activation) in formats {
        let mut r = SplitMix64(1);
        let piece = synthetic::layer(&mut r, 128, width, weight, activation);
        let layer = tall(&piece, width);
        let first = backend.load_linear(layer.clone())?;
        let bytes = backend.resident_bytes(&first);
        let mut weights = vec![first];
        while weights.len() * bytes < BEYOND_CACHES && weights.len() < 64 && bytes > 1 << 20 {
            weights.push(backend.load_linear(layer.clone())?);
        }
        for rows in [1, 2, 4, 8, 16, 32, 64, 256, 1024] {
            let x = backend.tensor((0..rows * width).map(|_| synthetic::activation(&mut r)).collect(), width)?;
            let seconds = time(backend, &x, &weights)?;
            let (weight, activation) = (layer.weight_format(), activation.to_string());
            out.push(Product { weight, activation, rows, n: width, k: width, seconds, bytes });
            progress(out.len());
            // What takes a second a time (a stand-in, a slow CPU) is not waited for at every size.
            if seconds > 1.0 {
                break;
            }
        }
    }
    Ok(out)
}

/// Seconds of a product of one row and of `many` with `layer`, of which there are `copies`, as far as memory may be taken for it.
///
/// # Errors
/// The backend's own, and too little memory.
#[cfg(feature = "parallel")]
pub fn one_and_many<B: Backend>(
    backend: &B,
    layer: &LinearTensors<'_>,
    copies: usize,
    many: usize,
) -> Result<(f64, f64), BackendError> {
    let copies = copies.min(BEYOND_CACHES / layer.stored_bytes().max(1)).max(1);
    let weights = (0..copies).map(|_| backend.load_linear(layer.clone())).collect::<Result<Vec<_>, _>>()?;
    let mut r = SplitMix64(1);
    let mut of = |rows: usize| {
        let x = (0..rows * layer.k).map(|_| synthetic::activation(&mut r)).collect();
        time(backend, &backend.tensor(x, layer.k)?, &weights)
    };
    Ok((of(1)?, of(many)?))
}

/// `piece`, of 128 rows, again and again until there are `n`.
fn tall(piece: &LinearTensors<'static>, n: usize) -> LinearTensors<'static> {
    let times = n / 128;
    let block_scales = match &piece.block_scales {
        BlockScales::E4m3 { block, codes } => BlockScales::E4m3 { block: *block, codes: codes.repeat(times).into() },
        BlockScales::E8m0 { block, codes } => BlockScales::E8m0 { block: *block, codes: codes.repeat(times).into() },
        BlockScales::Grid { values } => BlockScales::Grid { values: values.repeat(times) },
        BlockScales::None => BlockScales::None,
    };
    LinearTensors {
        n: 128 * times,
        data: piece.data.repeat(times).into(),
        block_scales,
        output_scale: OutputScale::One,
        pre_quant_scale: None,
        rotation: None,
        bias: None,
        ..piece.clone()
    }
}

/// Seconds of one product: the median of several runs over all of `weights`.
fn time<B: Backend>(backend: &B, x: &B::Tensor, weights: &[B::Linear]) -> Result<f64, BackendError> {
    let run = |count: usize| {
        let start = Instant::now();
        let mut last = None;
        for i in 0..count {
            last = backend.linears(x, &[&weights[i % weights.len()]])?.pop();
        }
        // One value of the last: waits for all.
        if let Some(y) = last {
            backend.to_host(&backend.select_rows(&y, &[0])?)?;
        }
        Ok::<_, BackendError>(start.elapsed().as_secs_f64() / count as f64)
    };
    let first = run(1)?;
    if first > 1.0 {
        return Ok(first);
    }
    let count = ((WANTED.as_secs_f64() / REPEATS as f64 / first.max(1e-6)) as usize).clamp(1, 4096);
    run(count)?;
    let mut times = (0..REPEATS).map(|_| run(count)).collect::<Result<Vec<f64>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}
