//! Calibrated rounding (GPTQ), aware of block scales and of quantized inputs.
//!
//! Per output row, GPTQ rounds so that ‖X̂·(w - ŵ)‖² is small, X̂ the inputs as the deployed kernel quantizes them. With
//! X̂ᵀX̂ = L·Lᵀ that is ‖Lᵀ·(w - ŵ)‖², and taking columns from the last to the first each rounding error is made up for by
//! the columns before it: the same as GPTQ's recursion over the inverse, without the inverse. A block's scale is chosen
//! among the E4M3 codes near its largest value by that very error, with the rounding that each code leads to.
//!
//! With `ridge` the weights first move to the ridge regression of the unquantized model's outputs on X̂, so that they also
//! make up for what quantizing the inputs, and the layers before, did. It wins 1-2 % of the KL; recipes leave it out.
//!
//! An expert that no token reaches is rounded to nearest.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rayon::prelude::*;

use super::layerwise::Walk;
use super::linalg::{Cholesky, product_transposed, transposed_product};
use super::recipe::Gptq;
use super::{QuantizeError, encode};
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Tool;
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::nvfp4::BLOCK;
use crate::formats::{all_finite, amax, e2m1, e4m3};
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// A weight that was rounded beforehand.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub linear: LinearTensors<'static>,
    /// What was rounded, [N, K]: the weights, moved to make up for the rounding of others. Empty where it is not kept.
    pub unrounded: Vec<half::bf16>,
}

/// Modules that read the same input, and how that is quantized.
struct Group<'a> {
    modules: Vec<&'a Module>,
    activation: ActivationFormat,
}

/// What is rounded how, and what is kept of it.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub tool: &'a dyn Tool,
    pub options: Gptq,
    /// Keeps [`Prepared::unrounded`]: two bytes per weight.
    pub keep_unrounded: bool,
}

/// Rounds every NVFP4 linear of the blocks on `sequences`, block by block, each on the inputs that the quantized blocks
/// before it give. `target` says of a module whether it is rounded, and then how its input is quantized.
///
/// # Errors
/// When the model cannot be run, or an activation is not finite.
pub fn gptq<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    sequences: &[Vec<u32>],
    target: &dyn Fn(&Module) -> Option<ActivationFormat>,
    Job { tool, options, keep_unrounded }: Job<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<BTreeMap<String, Prepared>, QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?;
    let modules: Vec<Module> = config.modules().into_iter().filter(Module::is_block_linear).collect();
    let mut walk = Walk::new(checkpoint, backend, sequences)?;
    let mut teacher = walk.start()?;
    let mut student = teacher.clone();
    let mut out = BTreeMap::new();
    for layer in 0..walk.blocks() {
        progress(layer, walk.blocks());
        let mut groups: Vec<Group<'_>> = Vec::new();
        for m in modules.iter().filter(|m| m.layer == Some(layer)) {
            let Some(activation) = target(m) else { continue };
            if checkpoint.is_fused(&m.name) {
                return Err(QuantizeError::Module {
                    module: m.name.clone(),
                    detail:
                        "is stored in one tensor with the layer's other experts, all under one scale, which GPTQ does \
                             not round; leave `gptq` out of the recipe"
                            .into(),
                });
            }
            let fused = |g: &&mut Group<'_>| g.modules[0].fusion_key() == m.fusion_key() && g.activation == activation;
            match groups.iter_mut().find(fused) {
                Some(group) => group.modules.push(m),
                None => groups.push(Group { modules: vec![m], activation }),
            }
        }
        let firsts: Vec<String> = groups.iter().map(|g| g.modules[0].name.clone()).collect();
        let (after, clean) = walk.block(layer, &teacher, &firsts)?;
        for group in &groups {
            let first = &group.modules[0].name;
            let (_, mut seen) = walk.block(layer, &student, std::slice::from_ref(first))?;
            let inputs = seen.remove(first).unwrap_or_default();
            // Routing may send other tokens to an expert than in the unquantized model.
            let clean = clean.get(first).filter(|c| group.modules[0].expert.is_none() && c.len() == inputs.len());
            for rounded in round_group(checkpoint, group, &inputs, clean.map(Vec::as_slice), tool, options)? {
                let (module, mut prepared) = rounded;
                walk.replace(prepared.linear.clone())?;
                if !keep_unrounded {
                    prepared.unrounded = Vec::new();
                }
                out.insert(module.name.clone(), prepared);
            }
        }
        checkpoint.tensors.release_pages();
        student = walk.block(layer, &student, &[])?.0;
        teacher = after;
    }
    progress(walk.blocks(), walk.blocks());
    Ok(out)
}

/// Rounds the weights of a group; nothing where its inputs say nothing.
fn round_group<'m>(
    checkpoint: &Checkpoint,
    group: &Group<'m>,
    inputs: &[f32],
    target: Option<&[f32]>,
    tool: &dyn Tool,
    options: Gptq,
) -> Result<Vec<(&'m Module, Prepared)>, QuantizeError> {
    let k = group.modules[0].role.k;
    if !inputs.iter().any(|x| *x != 0.0) {
        return Ok(Vec::new());
    }
    let failed = |e: candle_core::Error| QuantizeError::Module {
        module: group.modules[0].name.clone(),
        detail: format!("the products of its inputs cannot be computed: {e}"),
    };
    let mut quantized = inputs.to_vec();
    quantized.par_chunks_mut(k).for_each(|row| group.activation.fake_quantize(row));
    let gram = transposed_product(&quantized, k, &quantized, k).map_err(failed)?;
    let weights: Vec<Vec<f32>> =
        group.modules.iter().map(|m| encode::floats(checkpoint, m)).collect::<Result<_, _>>()?;
    let factor = |damping: f64| {
        factor(&gram, k, damping).ok_or_else(|| QuantizeError::Module {
            module: group.modules[0].name.clone(),
            detail: "the products of its inputs are larger than f32 holds; a weight before it is wrong, or it needs a \
                     recipe without GPTQ"
                .into(),
        })
    };
    let moved: Vec<Vec<f32>> = match options.ridge {
        None => weights,
        Some(ridge) => {
            let l = factor(ridge)?;
            let shift: Vec<f32> = target.unwrap_or(inputs).iter().zip(&quantized).map(|(x, q)| x - q).collect();
            let cross = transposed_product(&quantized, k, &shift, k).map_err(failed)?;
            let regress = |w: &Vec<f32>| {
                let pull = product_transposed(w, &cross, k)?;
                let mut moved = w.clone();
                moved.par_chunks_mut(k).zip(pull.par_chunks(k)).for_each(|(w, pull)| {
                    let mut x: Vec<f64> = pull.iter().map(|p| f64::from(*p)).collect();
                    l.solve(&mut x);
                    w.iter_mut().zip(x).for_each(|(w, x)| *w += x as f32);
                });
                Ok(moved)
            };
            weights.iter().map(regress).collect::<Result<_, _>>().map_err(failed)?
        }
    };
    let largest = moved.iter().map(|w| amax(w)).fold(0.0, f32::max);
    let global = encode::nvfp4_multiplier(tool, largest);
    let l = factor(options.damping)?;
    let prepared = |(m, w): (&&'m Module, &Vec<f32>)| {
        let rounding = round(w, k, global, &l);
        let bias = if m.role.bias { Some(checkpoint.floats(&format!("{}.bias", m.name), &[m.role.n])?) } else { None };
        let linear = LinearTensors {
            name: m.name.clone(),
            n: m.role.n,
            k,
            element: Element::E2m1,
            data: Cow::Owned(rounding.codes),
            block_scales: BlockScales::E4m3 { block: BLOCK, codes: Cow::Owned(rounding.block_scales) },
            output_scale: OutputScale::Tensor(global),
            activation: group.activation,
            pre_quant_scale: None,
            rotation: None,
            bias,
        };
        Ok((*m, Prepared { linear, unrounded: rounding.unrounded }))
    };
    group.modules.iter().zip(&moved).map(prepared).collect()
}

/// Cholesky's factor of gram + damping · mean of its diagonal; more where that is not positive definite. `None` where no
/// damping makes it so: a product is not finite.
fn factor(gram: &[f32], k: usize, damping: f64) -> Option<Cholesky> {
    if !all_finite(gram) {
        return None;
    }
    let mean = (0..k).map(|i| f64::from(gram[i * k + i])).sum::<f64>() / k as f64;
    // Inputs so small that every product is zero: any factor will do, and none is asked for more than once.
    let mean = if mean > 0.0 { mean } else { 1.0 };
    let mut share = damping.max(1e-6);
    loop {
        let mut a: Vec<f64> = gram.iter().map(|v| f64::from(*v)).collect();
        (0..k).for_each(|i| a[i * k + i] += share * mean);
        if let Some(l) = Cholesky::new(a, k) {
            return Some(l);
        }
        share *= 10.0;
    }
}

/// A rounded weight.
struct Rounding {
    /// E2M1 codes, two to a byte, row-major.
    codes: Vec<u8>,
    /// E4M3 codes, row-major.
    block_scales: Vec<u8>,
    /// As [`Prepared::unrounded`].
    unrounded: Vec<half::bf16>,
}

/// Rounds weights [N, K] under `global`.
fn round(w: &[f32], k: usize, global: f32, l: &Cholesky) -> Rounding {
    let n = w.len() / k;
    let mut codes = vec![0u8; w.len() / 2];
    let mut block_scales = vec![0u8; n * (k / BLOCK)];
    let mut wanted = vec![0.0; w.len()];
    let rows = codes.par_chunks_mut(k / 2).zip(block_scales.par_chunks_mut(k / BLOCK)).zip(w.par_chunks(k));
    let rows = rows.zip(wanted.par_chunks_mut(k));
    rows.for_each(|(((codes, scales), row), wanted)| round_row(row, global, l, codes, scales, wanted));
    let unrounded = wanted.iter().map(|v| half::bf16::from_f32(*v)).collect();
    Rounding { codes, block_scales, unrounded }
}

/// A block rounded under one scale.
struct Rounded {
    codes: [u8; BLOCK],
    /// What was rounded: the weights with the errors of the columns behind made up for.
    wanted: [f64; BLOCK],
    errors: [f64; BLOCK],
    cost: f64,
}

fn round_row(w: &[f32], global: f32, l: &Cholesky, codes: &mut [u8], scales: &mut [u8], wanted: &mut [f32]) {
    // What the errors of the columns behind ask of each column.
    let mut asked = vec![0.0f64; w.len()];
    for b in (0..scales.len()).rev() {
        let start = b * BLOCK;
        let block: [f64; BLOCK] = std::array::from_fn(|i| f64::from(w[start + i]));
        let own: [f64; BLOCK] = std::array::from_fn(|i| asked[start + i]);
        let peak = (0..BLOCK).map(|i| (block[i] + own[i] / l.row(start + i)[start + i]).abs()).fold(0.0, f64::max);
        let ideal = peak as f32 / (e2m1::MAX * global);
        let clamp = |s: f32| e4m3::encode(s.clamp(e4m3::MIN_POSITIVE, e4m3::MAX));
        let (low, high) = (clamp(ideal * LOWEST), clamp(ideal * HIGHEST));
        let mut best: Option<(u8, Rounded)> = None;
        for code in low..=high {
            let rounded = round_block(&block, &own, e4m3::decode(code) * global, l, start);
            if best.as_ref().is_none_or(|(_, b)| rounded.cost < b.cost) {
                best = Some((code, rounded));
            }
        }
        let Some((code, rounded)) = best else { continue };
        scales[b] = code;
        wanted[start..].iter_mut().zip(rounded.wanted).for_each(|(to, from)| *to = from as f32);
        for (i, pair) in rounded.codes.as_chunks::<2>().0.iter().enumerate() {
            codes[start / 2 + i] = e2m1::pack(pair[0], pair[1]);
        }
        for (i, error) in rounded.errors.iter().enumerate().filter(|(_, e)| **e != 0.0) {
            let row = &l.row(start + i)[..start];
            asked[..start].iter_mut().zip(row).for_each(|(a, l)| *a += error * l);
        }
    }
}

/// Block scales that are tried, relative to the one under which the block's largest value is the largest code.
const LOWEST: f32 = 0.6;
const HIGHEST: f32 = 1.6;

/// Rounds one block, its last column first.
fn round_block(w: &[f64; BLOCK], asked: &[f64; BLOCK], scale: f32, l: &Cholesky, start: usize) -> Rounded {
    let mut asked = *asked;
    let mut out = Rounded { codes: [0; BLOCK], wanted: [0.0; BLOCK], errors: [0.0; BLOCK], cost: 0.0 };
    for j in (0..BLOCK).rev() {
        let row = l.row(start + j);
        let diagonal = row[start + j];
        let wanted = w[j] + asked[j] / diagonal;
        let code = e2m1::encode((wanted / f64::from(scale)) as f32);
        let value = f64::from(e2m1::decode(code) * scale);
        out.codes[j] = code;
        out.wanted[j] = wanted;
        out.errors[j] = w[j] - value;
        out.cost += (diagonal * (wanted - value)).powi(2);
        let error = out.errors[j];
        for i in 0..j {
            asked[i] += error * row[start + i];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::nvfp4;

    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f32 / (1u32 << 31) as f32 - 0.5
        }
    }

    fn decode(p: &Rounding, k: usize, global: f32) -> Vec<f32> {
        let value = |at: usize| {
            let code = p.codes[at / 2] >> (4 * (at % 2)) & 15;
            e2m1::decode(code) * e4m3::decode(p.block_scales[at / k * (k / BLOCK) + at % k / BLOCK]) * global
        };
        (0..2 * p.codes.len()).map(value).collect()
    }

    /// ‖X·(w - ŵ)‖² summed over rows.
    fn output_error(x: &[f32], w: &[f32], q: &[f32], k: usize) -> f64 {
        let mut sum = 0.0;
        for x in x.chunks(k) {
            for (w, q) in w.chunks(k).zip(q.chunks(k)) {
                let e: f32 = x.iter().zip(w).zip(q).map(|((x, w), q)| x * (w - q)).sum();
                sum += f64::from(e).powi(2);
            }
        }
        sum
    }

    #[test]
    fn correlated_inputs_make_it_far_better_than_nearest_rounding_and_independent_ones_no_worse() {
        let (k, n, t) = (64, 24, 400);
        for (shared, bound) in [(2.0, 0.5), (0.0, 1.0)] {
            let mut r = random(7);
            let x: Vec<f32> = (0..t)
                .flat_map(|_| {
                    let common = shared * r();
                    (0..k).map(|_| common + r()).collect::<Vec<_>>()
                })
                .collect();
            let w: Vec<f32> = (0..n * k).map(|_| r()).collect();
            let gram = transposed_product(&x, k, &x, k).unwrap();
            let global = nvfp4::global_scale(amax(&w));
            let rounded = decode(&round(&w, k, global, &factor(&gram, k, 0.01).unwrap()), k, global);
            let mut nearest = Vec::new();
            for block in w.chunks(BLOCK) {
                let code = nvfp4::weight_block_scale(amax(block), global);
                let mut codes = [0; BLOCK];
                nvfp4::encode_weight_block(block, code, global, &mut codes);
                nearest.extend(codes.map(|c| e2m1::decode(c) * e4m3::decode(code) * global));
            }
            let (ours, plain) = (output_error(&x, &w, &rounded, k), output_error(&x, &w, &nearest, k));
            assert!(ours < bound * plain, "{ours} against {plain}");
        }
    }

    #[test]
    fn one_column_after_the_other_finds_the_best_rounding_of_small_blocks() {
        // With a diagonal factor every column is on its own: nearest rounding under the best scale.
        let k = BLOCK;
        let mut gram = vec![0.0; k * k];
        (0..k).for_each(|i| gram[i * k + i] = 1.0 + i as f32);
        let mut r = random(3);
        let w: Vec<f32> = (0..k).map(|_| r()).collect();
        let global = nvfp4::global_scale(1.0);
        let p = round(&w, k, global, &factor(&gram, k, 1e-6).unwrap());
        let weighted = |q: &[f32]| -> f64 {
            q.iter().zip(&w).enumerate().map(|(i, (q, w))| f64::from((1.0 + i as f32) * (w - q).powi(2))).sum()
        };
        let best = (1..=0x7eu8)
            .map(|s| {
                let scale = e4m3::decode(s) * global;
                let q: Vec<f32> = w.iter().map(|w| e2m1::decode(e2m1::encode(w / scale)) * scale).collect();
                weighted(&q)
            })
            .fold(f64::INFINITY, f64::min);
        assert!(
            (weighted(&decode(&p, k, global)) - best).abs() <= 1e-6 * best,
            "{} {best}",
            weighted(&decode(&p, k, global))
        );
    }
}
