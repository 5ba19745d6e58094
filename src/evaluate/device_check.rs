//! Whether a device computes what the CPU computes: every operation of the seam on random numbers, on both.

mod architectures;
mod mixtures;

use std::fmt;

use crate::backend::{
    AttentionShape, Backend, BackendError, Batch, CacheLayout, HeadNorms, HeadParameters, LayerCache, PAGE, Rotation,
    Span, Update,
};
use crate::formats::e8m0::ScaleRule;
use crate::formats::kv::KvFormat;
use crate::formats::linear::{ActivationFormat, Element, LinearTensors};
use crate::formats::synthetic::{self, Blocks, WEIGHTS};
use crate::logits::{Draw, History, Sampler, SamplingParams, Scratch};
use crate::random::SplitMix64;

/// Sums in f32 in another order, and floats of which 16 bits are kept, explain this much of a product (Frobenius, relative).
const PRODUCT: f64 = 2e-5;
/// The same of a norm, a sum or a rotation.
const ELEMENTWISE: f64 = 2e-6;
/// The same of attention, which has an exponential between two products.
const ATTENTION: f64 = 5e-5;
/// Where an input of one device is quantized that differs in its last bit from the other's, a value may become its neighbour.
const REQUANTIZED: f64 = 2e-2;

const MXFP4: ActivationFormat = ActivationFormat::Mxfp4 { rule: ScaleRule::Ceil };
const MXFP8: ActivationFormat = ActivationFormat::Mxfp8 { rule: ScaleRule::Ceil };

/// One operation on one shape in one format.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// What was computed: "nvfp4 x nvfp4, 3 rows, 50 x 304".
    pub what: String,
    /// ‖device - CPU‖ / ‖CPU‖; infinite where a choice differs or a number is none.
    pub deviation: f64,
    pub allowed: f64,
}

impl Checked {
    /// Whether the device computes what it should.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.deviation <= self.allowed
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: deviates by {:.1e}, {:.0e} is allowed", self.what, self.deviation, self.allowed)
    }
}

/// A device that failed in the midst of a check; it may not answer any more.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Failure {
    pub what: String,
    source: BackendError,
}

/// One backend's half of a check: the same calls on the same numbers give the same outputs.
struct Side<'a, B: Backend> {
    backend: &'a B,
}

/// Rows, outputs and inputs of a product.
type Shape = (usize, usize, usize);

/// Before a device is used: each way in which a weight is stored, once, and attention; a moment on a GPU.
///
/// # Errors
/// The device's own.
pub fn small<A: Backend, B: Backend>(cpu: &A, device: &B) -> Result<Vec<Checked>, Failure> {
    let mut out = Vec::new();
    let inputs = [ActivationFormat::Nvfp4 { global_scale: 7e-4 }, ActivationFormat::Fp8Token, ActivationFormat::Float];
    for (at, weight) in WEIGHTS.into_iter().enumerate() {
        for activation in [inputs[at % 3], ActivationFormat::Float] {
            product(cpu, device, at as u64, (3, 33, 288), weight, activation, &mut out)?;
        }
    }
    // Four bits by four and eight by eight have kernels of their own on some devices: NVFP4 and some of FP8 above, the others here.
    let narrow =
        [(8, MXFP4), (3, ActivationFormat::Fp8Static { scale: 5e-3 }), (4, MXFP8), (5, ActivationFormat::Fp8Group)];
    for (at, (weight, activation)) in narrow.into_iter().enumerate() {
        product(cpu, device, 31 + at as u64, (3, 33, 288), WEIGHTS[weight], activation, &mut out)?;
    }
    attention(cpu, device, 21, KvFormat::F32, (4, 2, 32), None, &mut out)?;
    Ok(out)
}

/// Everything: all formats of weight and input on ragged shapes and for prompts short and long; then what stands between
/// products, mixtures, what only some architectures need, and what is read off logits. Some shapes are enough for all of the
/// device's `multiprocessors`.
///
/// # Errors
/// The device's own.
pub fn thorough<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    multiprocessors: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Checked>, Failure> {
    let mut out = Vec::new();
    let mut seed = 0;
    let (prompt, outputs) = ((8 * multiprocessors).clamp(136, 1536), (128 * multiprocessors).clamp(256, 20480));
    for weight in WEIGHTS {
        for activation in synthetic::activations() {
            for shape in [(1, 16, 32), (3, 50, 300), (9, 33, 1024), (33, 65, 160), (70, 130, 520)] {
                seed += 1;
                product(cpu, device, seed, shape, weight, activation, &mut out)?;
                progress(out.len());
            }
        }
        let of_its_bits = match weight {
            (Element::E2m1, Blocks::E4m3(16)) => Some(ActivationFormat::Nvfp4 { global_scale: 7e-4 }),
            (Element::E2m1, Blocks::E8m0) => Some(MXFP4),
            (Element::E4m3, Blocks::E8m0) => Some(MXFP8),
            (Element::E4m3, _) => Some(ActivationFormat::Fp8Token),
            _ => None,
        };
        // Four bits by four: more steps of K than a pipeline has stages; and, once, so many outputs that nobody has to share one.
        if let (Element::E2m1, Some(activation)) = (weight.0, of_its_bits) {
            let many = (weight.1 == Blocks::E4m3(16)).then_some((2, outputs, 1024));
            for shape in [(140, 40, 2048)].into_iter().chain(many) {
                seed += 1;
                product(cpu, device, seed, shape, weight, activation, &mut out)?;
                progress(out.len());
            }
        }
        // As long as prompts are.
        for activation in [ActivationFormat::Float, ActivationFormat::Fp8Group].into_iter().chain(of_its_bits) {
            seed += 1;
            product(cpu, device, seed, (prompt, 512, 288), weight, activation, &mut out)?;
            progress(out.len());
        }
    }
    let formats = [KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8 { k_scale: 0.01, v_scale: 0.02 }];
    for kv in formats {
        for (heads, window) in
            [((4, 2, 32), None), ((6, 1, 64), Some(37)), ((3, 3, 80), Some(300)), ((8, 2, 128), None)]
        {
            seed += 1;
            attention(cpu, device, seed, kv, heads, window, &mut out)?;
            progress(out.len());
        }
    }
    for (rows, width) in [(1, 32), (5, 100), (3, 2048)] {
        seed += 1;
        elementwise(cpu, device, seed, rows, width, &mut out)?;
    }
    for weight in [WEIGHTS[2], WEIGHTS[6], WEIGHTS[5]] {
        seed += 1;
        mixtures::check(cpu, device, seed, weight, &mut out)?;
    }
    seed += 1;
    architectures::check(cpu, device, seed, &mut out)?;
    for vocab in [7, 1000, 50_000] {
        seed += 1;
        readings(cpu, device, seed, vocab, &mut out)?;
    }
    progress(out.len());
    Ok(out)
}

fn values(r: &mut SplitMix64, count: usize) -> Vec<f32> {
    (0..count).map(|_| synthetic::activation(r)).collect()
}

/// ‖got - expected‖ / ‖expected‖.
fn deviation(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() || got.iter().any(|v| !v.is_finite()) {
        return f64::INFINITY;
    }
    let pairs = got.iter().zip(expected);
    let difference: f64 = pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| f64::from(*b).powi(2)).sum();
    if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() }
}

/// What an error of the device is told with.
fn of(what: &str) -> impl Fn(BackendError) -> Failure {
    move |source| Failure { what: what.into(), source }
}

/// A product; the first row computed alone must have the bits it has beside the others.
fn product<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    (rows, n, k): Shape,
    weight: (Element, Blocks),
    activation: ActivationFormat,
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    let mut r = SplitMix64(seed);
    let k = k.next_multiple_of(synthetic::unit(weight.1));
    let layer = synthetic::layer(&mut r, n, k, weight, activation);
    let x = values(&mut r, rows * k);
    let what = format!("{} x {activation}, {rows} rows, {n} x {k}", layer.weight_format());
    let expected = match (Side { backend: cpu }).product(&layer, &x) {
        Err(BackendError::Unsupported { .. }) => return Ok(()),
        other => other.map_err(of(&what))?,
    };
    let device = Side { backend: device };
    let got = match device.product(&layer, &x) {
        Err(BackendError::Unsupported { .. }) => return Ok(()),
        other => other.map_err(of(&what))?,
    };
    out.push(Checked { deviation: deviation(&got, &expected), allowed: PRODUCT, what: what.clone() });
    if rows > 1 {
        let alone = device.product(&layer, &x[..k]).map_err(of(&what))?;
        let same = alone.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits());
        let deviation = if same { 0.0 } else { f64::INFINITY };
        out.push(Checked { what: format!("{what}: a row alone has the same bits"), deviation, allowed: 0.0 });
    }
    Ok(())
}

fn attention<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    kv: KvFormat,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape =
        AttentionShape { layer: 0, cache: 0, heads, kv_heads, head_dim, window, rope: Some(0), scale, growth: None };
    let (cache, allowed) = match kv {
        KvFormat::F32 => ("f32", ATTENTION),
        KvFormat::Bf16 => ("BF16", REQUANTIZED),
        KvFormat::Fp8 { .. } => ("FP8", REQUANTIZED),
    };
    let what = format!(
        "attention over a cache in {cache}, {heads} heads on {kv_heads}, head_dim {head_dim}, window {window:?}"
    );
    let expected = Side { backend: cpu }.attention(seed, kv, &shape).map_err(of(&what))?;
    let got = Side { backend: device }.attention(seed, kv, &shape).map_err(of(&what))?;
    out.push(Checked { what, deviation: deviation(&got, &expected), allowed });
    Ok(())
}

fn elementwise<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    rows: usize,
    width: usize,
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    let all = of("what stands between products");
    let expected = Side { backend: cpu }.elementwise(seed, rows, width).map_err(&all)?;
    let got = Side { backend: device }.elementwise(seed, rows, width).map_err(&all)?;
    for ((name, got), (_, expected)) in got.iter().zip(&expected) {
        let what = format!("{name}, {rows} x {width}");
        out.push(Checked { what, deviation: deviation(got, expected), allowed: ELEMENTWISE });
    }
    Ok(())
}

/// What is read off logits: scores, choices by several rules, divergence.
fn readings<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    vocab: usize,
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    let all = of("what is read off logits");
    let expected = Side { backend: cpu }.readings(seed, vocab).map_err(&all)?;
    let got = Side { backend: device }.readings(seed, vocab).map_err(&all)?;
    for ((name, got), (_, expected)) in got.iter().zip(&expected) {
        let allowed = if *name == "choices" { 0.0 } else { ELEMENTWISE };
        out.push(Checked { what: format!("{name} of {vocab} logits"), deviation: deviation(got, expected), allowed });
    }
    Ok(())
}

impl<B: Backend> Side<'_, B> {
    fn product(&self, layer: &LinearTensors<'_>, x: &[f32]) -> Result<Vec<f32>, BackendError> {
        let packed = self.backend.load_linear(layer.clone())?;
        let x = self.backend.tensor(x.to_vec(), layer.k)?;
        let y = self.backend.linears(&x, &[&packed])?;
        y.first().map_or(Ok(Vec::new()), |y| self.backend.to_host(y))
    }

    /// Two sequences at once, one of them in two passes; heads normed, keys turned.
    fn attention(&self, seed: u64, kv: KvFormat, shape: &AttentionShape) -> Result<Vec<f32>, BackendError> {
        let b = self.backend;
        let mut r = SplitMix64(seed);
        let half = shape.head_dim / 2;
        let frequencies = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let rope = b.load_rope(Rotation { frequencies, factor: 1.0 })?;
        let norm = |r: &mut SplitMix64| (0..shape.head_dim).map(|_| 1.0 + 0.3 * synthetic::uniform(r)).collect();
        let (q_norm, k_norm) = (b.load_vector(norm(&mut r))?, b.load_vector(norm(&mut r))?);
        let &AttentionShape { kv_heads, head_dim, .. } = shape;
        let layer = LayerCache { format: kv, kv_heads, head_dim, value_dim: head_dim };
        let (first, second) = (21, 275);
        let counts = [first, second].map(|n: usize| (n + 2).div_ceil(PAGE));
        let mut cache =
            b.new_cache(&CacheLayout { layers: vec![layer], pages: counts[0] + counts[1], ..CacheLayout::default() })?;
        // Pages in no order.
        let pages: [Vec<u32>; 2] = [
            (0..counts[0]).map(|p| (counts[1] + p) as u32).collect(),
            (0..counts[1]).rev().map(|p| p as u32).collect(),
        ];
        let span = |start: usize, len: usize, of: usize| Span { start, len, pages: pages[of].clone(), slot: of as u32 };
        let mut all = Vec::new();
        for spans in [vec![span(0, first, 0), span(0, second, 1)], vec![span(first, 1, 0), span(second, 2, 1)]] {
            let tokens: usize = spans.iter().map(|s| s.len).sum();
            let pass = b.prepare(&Batch { tokens: vec![0; tokens], spans }, &[&rope])?;
            let mut tensor = |heads: usize| {
                let width = heads * shape.head_dim;
                b.tensor((0..tokens * width).map(|_| synthetic::uniform(&mut r)).collect(), width)
            };
            let (q, k, v) = (tensor(shape.heads)?, tensor(shape.kv_heads)?, tensor(shape.kv_heads)?);
            let norms = HeadNorms { q: &q_norm, k: &k_norm, eps: 1e-6 };
            let heads = HeadParameters { norms: Some(norms), sinks: None };
            all.extend(b.to_host(&b.normed_attention(q, k, v, heads, shape, &pass, &mut cache)?)?);
        }
        Ok(all)
    }

    fn elementwise(&self, seed: u64, rows: usize, width: usize) -> Result<Vec<(&'static str, Vec<f32>)>, BackendError> {
        let b = self.backend;
        let mut r = SplitMix64(seed);
        let mut tensor = |columns: usize| b.tensor(values(&mut r, rows * columns), columns);
        let (x, y) = (tensor(width)?, tensor(width)?);
        let (gate, up) = (tensor(width)?, tensor(width)?);
        let norm = b.load_vector((0..width).map(|_| 1.0 + 0.3 * synthetic::uniform(&mut r)).collect())?;
        let (sum, normed) = b.residual_norm(x.clone(), Update::Ready(y.clone()), &norm, 1e-5, &[])?;
        let picked: Vec<usize> = (0..rows).rev().collect();
        let weights: Vec<f32> = (0..rows).map(|i| 0.5 + i as f32).collect();
        let layer = synthetic::layer(&mut r, 64, width.next_multiple_of(32), WEIGHTS[6], ActivationFormat::Float);
        let table = b.load_linear(LinearTensors { bias: None, pre_quant_scale: None, ..layer })?;
        let batch = Batch::alone((0..rows as u32).map(|i| i * 13 % 64).collect());
        let pass = b.prepare(&batch, &[])?;
        Ok(vec![
            ("sum of residual and update", b.to_host(&sum)?),
            ("its norm", b.to_host(&normed)?),
            ("norm", b.to_host(&b.rms_norm(&x, &norm, 1e-5)?)?),
            ("sum", b.to_host(&b.add(x.clone(), &y)?)?),
            ("silu(gate) · up", b.to_host(&b.silu_mul(gate, &up)?)?),
            ("chosen rows", b.to_host(&b.select_rows(&x, &picked)?)?),
            ("rows added to others", b.to_host(&b.add_rows(x, &y, &picked, &weights)?)?),
            ("embedding", b.to_host(&b.embed(&table, &pass)?)?),
        ])
    }

    fn readings(&self, seed: u64, vocab: usize) -> Result<Vec<(&'static str, Vec<f32>)>, BackendError> {
        const ROWS: usize = 6;
        let b = self.backend;
        let mut r = SplitMix64(seed);
        let mut tensor = || b.tensor((0..ROWS * vocab).map(|_| 8.0 * synthetic::uniform(&mut r)).collect(), vocab);
        let (logits, other) = (tensor()?, tensor()?);
        let tokens: Vec<u32> = (0..ROWS).map(|i| (i * 7919 % vocab) as u32).collect();
        let picks: Vec<(usize, u32)> = tokens.iter().copied().enumerate().collect();
        let scores = b.score(&logits, &picks)?.into_iter().map(|s| s.log_prob as f32).collect();
        let of = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = SamplingParams { seed: Some(seed), ..SamplingParams::default() };
            change(&mut params);
            Sampler::new(params).map_err(|e| BackendError::Failed { context: "sampling", message: e.to_string() })
        };
        let samplers = [
            of(&|p| p.temperature = 0.0)?,
            of(&|_| {})?,
            of(&|p| (p.temperature, p.top_k) = (0.7, 20))?,
            of(&|p| p.top_p = 0.9)?,
            of(&|p| p.min_p = 0.05)?,
            of(&|p| (p.repetition_penalty, p.presence_penalty) = (1.3, 0.5))?,
        ];
        let history = History { prompt: &tokens[..2], generated: &tokens[2..] };
        let draws: Vec<Draw<'_>> = samplers.iter().map(|sampler| Draw { sampler, history, allowed: None }).collect();
        let chosen = b.sample(&logits, &draws, &mut Scratch::default())?;
        let chosen = chosen.into_iter().map(|c| c.map_or(-1.0, |c| c.token as f32)).collect();
        let pairs = b.compare(&logits, &other, vocab, &tokens)?;
        let kl = pairs.into_iter().map(|p| p.map_or(f32::NAN, |p| p.kl as f32)).collect();
        let finite = f32::from(b.is_finite(&logits)?);
        Ok(vec![("scores", scores), ("choices", chosen), ("divergences", kl), ("finiteness", vec![finite])])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::autograd::AutogradBackend;

    /// The plain reference stands in for a device; it has no kernels of its own for some formats, and quantizes others later.
    #[test]
    fn another_backend_holds_and_a_broken_one_does_not() {
        let Ok(cpu) = crate::backend::cpu::CpuBackend::new(crate::backend::cpu::isa::Isa::detect(), 1) else { return };
        let checked = small(&cpu, &AutogradBackend::new()).unwrap();
        let kept: Vec<&Checked> = checked.iter().filter(|c| !c.what.contains("same bits")).collect();
        assert!(kept.len() > 10 && kept.iter().all(|c| c.holds()), "{kept:#?}");
        assert_eq!(deviation(&[1.0, f32::NAN], &[1.0, 1.0]), f64::INFINITY);
        assert!(deviation(&[1.0, 1.001], &[1.0, 1.0]) > PRODUCT);
    }
}
