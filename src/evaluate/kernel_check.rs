//! Packed kernels against the plain definition, module by module, on a model's own activations: tells an engine's fault
//! from quantization loss.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::backend::observe::held;
use crate::backend::{Backend, BackendError, Batch, PAGE};
use crate::checkpoint::Checkpoint;
use crate::formats::kv::KvFormat;
use crate::formats::linear::LinearTensors;
use crate::model::decoder::LoadError;
use crate::model::{Decoder, Wanted};

/// Tokens that are run, and rows of each module's input that are checked.
const TOKENS: usize = 32;
const ROWS: usize = 8;
/// Relative deviation (Frobenius) that f32 sums in another order explain; what a wrong scale or code does is larger by
/// orders of magnitude.
pub const TOLERANCE: f64 = 1e-5;

/// One module's deviation.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    pub module: String,
    /// `nvfp4 x nvfp4`
    pub format: String,
    /// ‖kernel - reference‖ / ‖reference‖ over the rows checked.
    pub deviation: f64,
}

/// What was checked, and modules that none of the tokens reached (experts).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelCheck {
    pub modules: Vec<Checked>,
    pub unreached: Vec<String>,
}

impl KernelCheck {
    /// Modules whose kernel does not compute what it should.
    pub fn failures(&self) -> impl Iterator<Item = &Checked> {
        self.modules.iter().filter(|m| m.deviation.is_nan() || m.deviation > TOLERANCE)
    }
}

/// Runs `tokens` through the model on `backend` and recomputes every linear's output in f64 from decoded weights and
/// the input that the deployed format makes of the observed one.
///
/// # Errors
/// Anything wrong with the checkpoint or the backend.
pub fn check<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    tokens: &[u32],
) -> Result<KernelCheck, LoadError> {
    let inputs = Arc::new(Mutex::new(BTreeMap::<String, Vec<f32>>::new()));
    let sink = inputs.clone();
    let observe = move |module: &str, x: &[f32]| {
        held(&sink).entry(module.into()).or_insert_with(|| x.to_vec());
    };
    let model = Decoder::load(backend.clone(), checkpoint)?.observed(Box::new(observe));
    let tokens = &tokens[..tokens.len().min(TOKENS)];
    let mut cache = model.new_cache(tokens.len().next_multiple_of(PAGE), 1, KvFormat::F32)?;
    model.forward(&Batch::alone(tokens.to_vec()), &mut cache, Wanted::All)?;
    let config = model.config.clone();
    drop(model);
    let inputs = std::mem::take(&mut *held(&inputs));
    let mut out = KernelCheck::default();
    for module in config.modules() {
        // The embedding is read row by row, which is no product.
        if !checkpoint.has_linear(&module.name) || module.name == "model.embed_tokens" {
            continue;
        }
        let Some(input) = inputs.get(&module.name) else {
            out.unreached.push(module.name);
            continue;
        };
        let linear = checkpoint.linear(&module.name, module.role)?;
        let rows = (input.len() / linear.k).min(ROWS);
        let format = format!("{} x {}", linear.weight_format(), linear.activation);
        let part = &input[..rows * linear.k];
        let deviation = deviation(backend, linear, part)?;
        out.modules.push(Checked { module: module.name, format, deviation });
    }
    Ok(out)
}

fn deviation<B: Backend>(backend: &B, linear: LinearTensors<'_>, input: &[f32]) -> Result<f64, BackendError> {
    let packed = backend.load_linear(linear.clone())?;
    let x = backend.tensor(input.to_vec(), linear.k)?;
    let outputs = backend.linears(&x, &[&packed])?;
    let got = outputs.first().map(|y| backend.to_host(y)).transpose()?.unwrap_or_default();
    let mut quantized = input.to_vec();
    for row in quantized.chunks_exact_mut(linear.k) {
        if let Some(scale) = &linear.pre_quant_scale {
            row.iter_mut().zip(scale).for_each(|(x, s)| *x *= s);
        }
        if let Some(rotation) = &linear.rotation {
            rotation.apply(row);
        }
        linear.activation.fake_quantize(row);
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    let mut weights = vec![0.0; linear.k];
    for n in 0..linear.n {
        linear.decode_row(n, &mut weights);
        let bias = linear.bias.as_ref().map_or(0.0, |b| f64::from(b[n]));
        for (m, row) in quantized.chunks_exact(linear.k).enumerate() {
            let dot: f64 = row.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let expected = dot + bias;
            difference += (f64::from(got[m * linear.n + n]) - expected).powi(2);
            norm += expected.powi(2);
        }
    }
    Ok(if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() })
}
