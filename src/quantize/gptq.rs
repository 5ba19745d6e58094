//! Calibrated rounding (GPTQ), aware of block scales and of quantized inputs.
//!
//! Per output row, GPTQ rounds so that ‖X̂·(w - ŵ)‖² is small, X̂ the inputs as the deployed kernel quantizes them. With
//! X̂ᵀX̂ = L·Lᵀ that is ‖Lᵀ·(w - ŵ)‖², and taking columns from the last to the first each rounding error is made up for by
//! the columns before it: the same as GPTQ's recursion over the inverse, without the inverse. A block's scale is chosen
//! among the codes near its largest value by that very error, with the rounding that each code leads to.
//!
//! With `ridge` the weights first move to the ridge regression of the unquantized model's outputs on X̂, so that they also
//! make up for what quantizing the inputs, and the layers before, did. It wins 1-2 % of the KL; recipes leave it out.
//!
//! Few tokens say little of what else a mixture's expert will see: the fewer reach it, the more all directions count alike
//! ([`Stage::damping`]), and one that none reaches is rounded by the least squares of its weights. Experts that lie in one
//! tensor share its scale.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use rayon::prelude::*;

use super::layerwise::Walk;
use super::linalg::{Cholesky, product_transposed, transposed_product};
use super::recipe::Gptq;
use super::{QuantizeError, encode};
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::dialect::Tool;
use crate::checkpoint::fused::Fused;
use crate::formats::e8m0::ScaleRule;
use crate::formats::linear::{ActivationFormat, BlockScales, Element, LinearTensors, OutputScale};
use crate::formats::scheme::{Scheme, WeightFormat};
use crate::formats::{all_finite, amax, e2m1, e4m3, e8m0, mx, nvfp4};
use crate::model::ModelConfig;
use crate::model::modules::Module;

/// A weight that was rounded beforehand.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub linear: LinearTensors<'static>,
    /// What was rounded, [N, K]: the weights, moved to make up for the rounding of others. Empty where it is not kept.
    pub unrounded: Vec<half::bf16>,
}

/// What a module's weight and its input become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Of [four bits](Scheme::is_four_bit).
    pub scheme: Scheme,
    pub activation: ActivationFormat,
}

/// Modules that read the same input, and what they become.
struct Group<'a> {
    modules: Vec<&'a Module>,
    target: Target,
    /// The tensor that they are stored in together with those of other experts.
    stem: Option<String>,
}

impl Group<'_> {
    fn first(&self) -> &Module {
        self.modules[0]
    }

    fn k(&self) -> usize {
        self.first().role.k
    }

    fn failed(&self, e: &candle_core::Error) -> QuantizeError {
        QuantizeError::Module {
            module: self.first().name.clone(),
            detail: format!("the products of its inputs cannot be computed: {e}"),
        }
    }
}

/// What is rounded how, and what is kept of it.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    pub tool: &'a dyn Tool,
    pub options: Gptq,
    /// Keeps [`Prepared::unrounded`]: two bytes per weight.
    pub keep_unrounded: bool,
}

/// Weights that were rounded, by module, and what is to be said of it.
#[derive(Debug, Default)]
pub struct Rounded {
    pub prepared: BTreeMap<String, Prepared>,
    pub notes: Vec<String>,
}

/// Rounds the blocks' linears on `sequences`, block by block, each on the inputs that the quantized blocks before it give.
/// `target` says of a module whether it is rounded, and to what.
///
/// # Errors
/// When the model cannot be run, or an activation is not finite.
pub fn gptq<B: Backend + Clone>(
    checkpoint: &Checkpoint,
    backend: &B,
    sequences: &[Vec<u32>],
    target: &dyn Fn(&Module) -> Option<Target>,
    job: Job<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Rounded, QuantizeError> {
    let config = ModelConfig::read(&checkpoint.config)?;
    let modules: Vec<Module> = config.modules().into_iter().filter(Module::is_block_linear).collect();
    let mut walk = Walk::new(checkpoint, backend, sequences)?;
    let mut teacher = walk.start()?;
    let mut student = teacher.clone();
    let mut out = Rounded::default();
    for layer in 0..walk.blocks() {
        progress(layer, walk.blocks());
        let stages = stages(checkpoint, modules.iter().filter(|m| m.layer == Some(layer)), target);
        // Routing may send other tokens to an expert than in the unquantized model: experts have no clean inputs.
        let alone = stages.iter().flatten().filter(|g| g.first().expert.is_none());
        let alone: Vec<String> = match job.options.ridge {
            Some(_) => alone.map(|g| g.first().name.clone()).collect(),
            None => Vec::new(),
        };
        let (after, clean) = walk.block(layer, &teacher, &alone)?;
        for stage in &stages {
            let firsts: Vec<String> = stage.iter().map(|g| g.first().name.clone()).collect();
            let (_, seen) = walk.block(layer, &student, &firsts)?;
            let job = Stage { checkpoint, job, seen, clean: &clean };
            for (module, mut prepared) in job.round(stage, &mut out.notes)? {
                walk.replace(prepared.linear.clone())?;
                if !job.job.keep_unrounded {
                    prepared.unrounded = Vec::new();
                }
                out.prepared.insert(module.name.clone(), prepared);
            }
        }
        checkpoint.tensors.release_pages();
        student = walk.block(layer, &student, &[])?.0;
        teacher = after;
    }
    progress(walk.blocks(), walk.blocks());
    Ok(out)
}

/// The groups of a layer, those together that read what is there at the same time: a mixture's experts do, whose inputs do
/// not depend on one another.
fn stages<'a>(
    checkpoint: &Checkpoint,
    modules: impl Iterator<Item = &'a Module>,
    target: &dyn Fn(&Module) -> Option<Target>,
) -> Vec<Vec<Group<'a>>> {
    let mut out: Vec<(String, Vec<Group<'a>>)> = Vec::new();
    for m in modules {
        let Some(target) = target(m) else { continue };
        let at = out.iter().position(|(key, _)| *key == m.input_key()).unwrap_or_else(|| {
            out.push((m.input_key(), Vec::new()));
            out.len() - 1
        });
        let groups = &mut out[at].1;
        let fused = |g: &&mut Group<'_>| g.first().fusion_key() == m.fusion_key() && g.target == target;
        match groups.iter_mut().find(fused) {
            Some(group) => group.modules.push(m),
            None => {
                let stem = checkpoint.fused(&m.name).filter(Fused::stays).map(|f| f.stem().to_owned());
                groups.push(Group { modules: vec![m], target, stem });
            }
        }
    }
    out.into_iter().map(|(_, groups)| groups).collect()
}

/// Groups that are rounded on inputs seen in one run.
struct Stage<'a> {
    checkpoint: &'a Checkpoint,
    job: Job<'a>,
    /// Inputs by the groups' first modules; in the unquantized model, too.
    seen: BTreeMap<String, Vec<f32>>,
    clean: &'a BTreeMap<String, Vec<f32>>,
}

impl Stage<'_> {
    /// Rounds the weights of all groups, and says in `notes` which saw few tokens.
    fn round<'m>(
        &self,
        groups: &[Group<'m>],
        notes: &mut Vec<String>,
    ) -> Result<Vec<(&'m Module, Prepared)>, QuantizeError> {
        // Of all that share a scale because they lie in one tensor.
        let mut largest: BTreeMap<&str, f32> = BTreeMap::new();
        for group in groups {
            let Some(stem) = &group.stem else { continue };
            let own = match self.job.options.ridge {
                Some(_) => self.moved(group, &Seen::new(group, self.seen(group))?)?,
                None => self.weights(group)?,
            };
            let shared = largest.entry(stem).or_default();
            *shared = own.iter().map(|w| amax(w)).fold(*shared, f32::max);
        }
        let mut out = Vec::new();
        for group in groups {
            // What is always zero is rounded to nearest as everything else is.
            let dead = !self.seen(group).iter().any(|x| *x != 0.0);
            if group.first().expert.is_some() || !dead {
                let shared = group.stem.as_deref().and_then(|stem| largest.get(stem)).copied();
                out.extend(self.calibrated(group, shared)?);
            }
        }
        let few = |g: &&Group<'_>| g.first().expert.is_some() && self.tokens(g) < g.k();
        let few: Vec<&Group<'_>> = groups.iter().filter(few).collect();
        if let Some(first) = few.first() {
            let rest = if few.len() > 1 { format!(" and {} more", few.len() - 1) } else { String::new() };
            let tokens = few.iter().map(|g| self.tokens(g)).max().unwrap_or(0);
            notes.push(format!(
                "{}{rest} of {} experts saw {tokens} tokens at the most, fewer than the {} inputs that they have, and were \
                 rounded more by their weights than by those; use more text",
                first.first().name,
                groups.len(),
                first.k()
            ));
        }
        Ok(out)
    }

    fn seen(&self, group: &Group<'_>) -> &[f32] {
        self.seen.get(&group.first().name).map_or(&[], Vec::as_slice)
    }

    fn tokens(&self, group: &Group<'_>) -> usize {
        self.seen(group).len() / group.k()
    }

    /// `asked`, and for an expert inputs per token at least: with less, few tokens are worse than none (docs/lab-notebook.md).
    fn damping(&self, group: &Group<'_>, asked: f64) -> f64 {
        match group.first().expert {
            Some(_) => asked.max(group.k() as f64 / self.tokens(group).max(1) as f64),
            None => asked,
        }
    }

    fn weights(&self, group: &Group<'_>) -> Result<Vec<Vec<f32>>, QuantizeError> {
        group.modules.iter().map(|m| encode::floats(self.checkpoint, m)).collect()
    }

    /// The weights; with `ridge`, moved to make up for what quantizing the inputs did.
    fn moved(&self, group: &Group<'_>, seen: &Seen<'_>) -> Result<Vec<Vec<f32>>, QuantizeError> {
        let weights = self.weights(group)?;
        let Some(ridge) = self.job.options.ridge.filter(|_| !seen.inputs.is_empty()) else { return Ok(weights) };
        let k = group.k();
        let failed = |e: candle_core::Error| group.failed(&e);
        let l = seen.factor(group, self.damping(group, ridge))?;
        let clean = self.clean.get(&group.first().name).filter(|c| c.len() == seen.inputs.len());
        let target = clean.map_or(seen.inputs, Vec::as_slice);
        let shift: Vec<f32> = target.iter().zip(&seen.quantized).map(|(x, q)| x - q).collect();
        let cross = transposed_product(&seen.quantized, k, &shift, k).map_err(failed)?;
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
        weights.iter().map(regress).collect::<Result<_, _>>().map_err(failed)
    }

    /// The weights of a group rounded on its inputs. `shared`: the largest value of all that share their scale.
    fn calibrated<'m>(
        &self,
        group: &Group<'m>,
        shared: Option<f32>,
    ) -> Result<Vec<(&'m Module, Prepared)>, QuantizeError> {
        let k = group.k();
        let seen = Seen::new(group, self.seen(group))?;
        let moved = self.moved(group, &seen)?;
        let largest = shared.unwrap_or_else(|| moved.iter().map(|w| amax(w)).fold(0.0, f32::max));
        let grid = Grid::of(group.target.scheme, self.job.tool, largest).ok_or_else(|| QuantizeError::Module {
            module: group.first().name.clone(),
            detail: format!("{} has no blocks of four bits to round to", group.target.scheme),
        })?;
        let l = seen.factor(group, self.damping(group, self.job.options.damping))?;
        let prepared = |(m, w): (&&'m Module, &Vec<f32>)| {
            let Rounding { codes, block_scales, unrounded } = round(w, k, grid, &l);
            let (block_scales, output_scale) = grid.stored(block_scales);
            let linear = LinearTensors {
                name: m.name.clone(),
                n: m.role.n,
                k,
                element: Element::E2m1,
                data: Cow::Owned(codes),
                block_scales,
                output_scale,
                activation: group.target.activation,
                pre_quant_scale: None,
                rotation: None,
                bias: self.bias(m)?,
            };
            Ok((*m, Prepared { linear, unrounded }))
        };
        group.modules.iter().zip(&moved).map(prepared).collect()
    }

    fn bias(&self, m: &Module) -> Result<Option<Vec<f32>>, QuantizeError> {
        Ok(if m.role.bias { self.checkpoint.linear(&m.name, m.role)?.bias } else { None })
    }
}

/// Inputs of a group, as they are and as they are quantized, and the products of the latter.
struct Seen<'a> {
    inputs: &'a [f32],
    quantized: Vec<f32>,
    gram: Vec<f32>,
}

impl<'a> Seen<'a> {
    fn new(group: &Group<'_>, inputs: &'a [f32]) -> Result<Self, QuantizeError> {
        let k = group.k();
        let mut quantized = inputs.to_vec();
        quantized.par_chunks_mut(k).for_each(|row| group.target.activation.fake_quantize(row));
        let gram = match inputs {
            [] => vec![0.0; k * k],
            _ => transposed_product(&quantized, k, &quantized, k).map_err(|e| group.failed(&e))?,
        };
        Ok(Self { inputs, quantized, gram })
    }

    fn factor(&self, group: &Group<'_>, damping: f64) -> Result<Cholesky, QuantizeError> {
        factor(&self.gram, group.k(), damping).ok_or_else(|| QuantizeError::Module {
            module: group.first().name.clone(),
            detail: "the products of its inputs are larger than f32 holds; a weight before it is wrong, or it needs a \
                     recipe without GPTQ"
                .into(),
        })
    }
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

/// What values of four bits are: codes times their block's scale.
#[derive(Clone, Copy, Debug)]
enum Grid {
    /// E4M3 scales times `global`, of `block` elements.
    Nvfp4 { block: usize, global: f32 },
    /// Powers of two.
    Mxfp4,
}

impl Grid {
    /// Of weights up to `largest`; `None` where they have no blocks of four bits.
    fn of(scheme: Scheme, tool: &dyn Tool, largest: f32) -> Option<Self> {
        match scheme.weight()? {
            WeightFormat::Nvfp4 { block } => {
                Some(Self::Nvfp4 { block, global: encode::four_bit_multiplier(scheme, tool, largest) })
            }
            WeightFormat::Mxfp4 => Some(Self::Mxfp4),
            WeightFormat::Mxfp8 | WeightFormat::Fp8 => None,
        }
    }

    fn block(self) -> usize {
        match self {
            Self::Nvfp4 { block, .. } => block,
            Self::Mxfp4 => mx::BLOCK,
        }
    }

    /// What a scale's code multiplies codes by.
    fn scale(self, code: u8) -> f32 {
        match self {
            Self::Nvfp4 { global, .. } => e4m3::decode(code) * global,
            Self::Mxfp4 => e8m0::decode(code),
        }
    }

    /// Codes of the scales that are worth trying for a block up to `peak`: near the one under which that is the largest code.
    fn candidates(self, peak: f32) -> RangeInclusive<u8> {
        let ideal = peak / e2m1::MAX;
        match self {
            Self::Nvfp4 { global, .. } => {
                let code = |share: f32| e4m3::encode((ideal * share / global).clamp(e4m3::MIN_POSITIVE, e4m3::MAX));
                code(LOWEST)..=code(HIGHEST)
            }
            Self::Mxfp4 => {
                // The smallest under which nothing saturates, and the one below.
                let whole = mx::fp4_scale(&[peak], ScaleRule::Ceil);
                whole.saturating_sub(1)..=whole
            }
        }
    }

    /// Scales as a checkpoint has them.
    fn stored(self, codes: Vec<u8>) -> (BlockScales<'static>, OutputScale) {
        let codes = Cow::Owned(codes);
        match self {
            Self::Nvfp4 { block, global } => (BlockScales::E4m3 { block, codes }, OutputScale::Tensor(global)),
            Self::Mxfp4 => (BlockScales::E8m0 { block: mx::BLOCK, codes }, OutputScale::One),
        }
    }
}

/// E4M3 block scales that are tried, relative to the one under which the block's largest value is the largest code.
const LOWEST: f32 = 0.6;
const HIGHEST: f32 = 1.6;

/// A rounded weight.
struct Rounding {
    /// E2M1 codes, two to a byte, row-major.
    codes: Vec<u8>,
    /// Codes of scales, row-major.
    block_scales: Vec<u8>,
    /// As [`Prepared::unrounded`].
    unrounded: Vec<half::bf16>,
}

/// Rounds weights [N, K].
fn round(w: &[f32], k: usize, grid: Grid, l: &Cholesky) -> Rounding {
    let (n, block) = (w.len() / k, grid.block());
    let mut codes = vec![0u8; w.len() / 2];
    let mut block_scales = vec![0u8; n * (k / block)];
    let mut wanted = vec![0.0; w.len()];
    let rows = codes.par_chunks_mut(k / 2).zip(block_scales.par_chunks_mut(k / block)).zip(w.par_chunks(k));
    let rows = rows.zip(wanted.par_chunks_mut(k));
    rows.for_each(|(((codes, scales), row), wanted)| match grid.block() {
        nvfp4::BLOCK => round_row::<{ nvfp4::BLOCK }>(row, grid, l, codes, scales, wanted),
        _ => round_row::<{ mx::BLOCK }>(row, grid, l, codes, scales, wanted),
    });
    let unrounded = wanted.iter().map(|v| half::bf16::from_f32(*v)).collect();
    Rounding { codes, block_scales, unrounded }
}

/// A block of `B` elements rounded under one scale.
struct Block<const B: usize> {
    codes: [u8; B],
    /// What was rounded: the weights with the errors of the columns behind made up for.
    wanted: [f64; B],
    errors: [f64; B],
    cost: f64,
}

fn round_row<const B: usize>(
    w: &[f32],
    grid: Grid,
    l: &Cholesky,
    codes: &mut [u8],
    scales: &mut [u8],
    wanted: &mut [f32],
) {
    // What the errors of the columns behind ask of each column.
    let mut asked = vec![0.0f64; w.len()];
    for b in (0..scales.len()).rev() {
        let start = b * B;
        let block: [f64; B] = std::array::from_fn(|i| f64::from(w[start + i]));
        let own: [f64; B] = std::array::from_fn(|i| asked[start + i]);
        let peak = (0..B).map(|i| (block[i] + own[i] / l.row(start + i)[start + i]).abs()).fold(0.0, f64::max);
        let mut best: Option<(u8, Block<B>)> = None;
        for code in grid.candidates(peak as f32) {
            let rounded = round_block(&block, &own, grid.scale(code), l, start);
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

/// Rounds one block, its last column first.
fn round_block<const B: usize>(w: &[f64; B], asked: &[f64; B], scale: f32, l: &Cholesky, start: usize) -> Block<B> {
    let mut asked = *asked;
    let mut out = Block { codes: [0; B], wanted: [0.0; B], errors: [0.0; B], cost: 0.0 };
    for j in (0..B).rev() {
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

    const GRIDS: [fn(&[f32]) -> Grid; 3] = [
        |w| Grid::Nvfp4 { block: nvfp4::BLOCK, global: nvfp4::global_scale(amax(w)) },
        |w| Grid::Nvfp4 { block: mx::BLOCK, global: amax(w) / e4m3::MAX },
        |_| Grid::Mxfp4,
    ];

    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f32 / (1u32 << 31) as f32 - 0.5
        }
    }

    fn decode(p: &Rounding, grid: Grid) -> Vec<f32> {
        let value = |at: usize| {
            let code = p.codes[at / 2] >> (4 * (at % 2)) & 15;
            e2m1::decode(code) * grid.scale(p.block_scales[at / grid.block()])
        };
        (0..2 * p.codes.len()).map(value).collect()
    }

    /// Values under one scale.
    fn under(block: &[f32], scale: f32) -> Vec<f32> {
        block.iter().map(|w| e2m1::decode(e2m1::encode(w / scale)) * scale).collect()
    }

    /// Weights rounded to nearest, the largest value of each block to the largest code.
    fn nearest(w: &[f32], grid: Grid) -> Vec<f32> {
        let block = |block: &[f32]| match grid {
            Grid::Nvfp4 { global, .. } => {
                under(block, e4m3::decode(nvfp4::weight_block_scale(amax(block), global)) * global)
            }
            Grid::Mxfp4 => under(block, e8m0::decode(mx::fp4_scale(block, ScaleRule::Ceil))),
        };
        w.chunks(grid.block()).flat_map(block).collect()
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
        for (shared, bound, grid) in GRIDS.iter().flat_map(|grid| [(2.0, 0.5, grid), (0.0, 1.0, grid)]) {
            let mut r = random(7);
            let x: Vec<f32> = (0..t)
                .flat_map(|_| {
                    let common = shared * r();
                    (0..k).map(|_| common + r()).collect::<Vec<_>>()
                })
                .collect();
            let w: Vec<f32> = (0..n * k).map(|_| r()).collect();
            let gram = transposed_product(&x, k, &x, k).unwrap();
            let grid = grid(&w);
            let rounded = decode(&round(&w, k, grid, &factor(&gram, k, 0.01).unwrap()), grid);
            let (ours, plain) = (output_error(&x, &w, &rounded, k), output_error(&x, &w, &nearest(&w, grid), k));
            assert!(ours < bound * plain, "{ours} against {plain}");
        }
    }

    #[test]
    fn few_tokens_damped_by_inputs_per_token_are_better_than_nearest_on_others() {
        let (k, n) = (64, 32);
        for (tokens, shared) in [(1, 0.0), (16, 0.0), (64, 0.0), (16, 2.0), (64, 2.0)] {
            let mut r = random(11);
            let mut inputs = |count: usize| -> Vec<f32> {
                let mut row = || {
                    let common = shared * r();
                    (0..k).map(|_| common + r()).collect::<Vec<_>>()
                };
                (0..count).flat_map(|_| row()).collect()
            };
            let (x, others) = (inputs(tokens), inputs(2000));
            let w: Vec<f32> = (0..n * k).map(|_| r()).collect();
            let gram = transposed_product(&x, k, &x, k).unwrap();
            let grid = GRIDS[0](&w);
            let rounded = |damping: f64| {
                let rounded = decode(&round(&w, k, grid, &factor(&gram, k, damping).unwrap()), grid);
                output_error(&others, &w, &rounded, k)
            };
            let nearest = output_error(&others, &w, &nearest(&w, grid), k);
            let (ours, plain) = (rounded(k as f64 / tokens as f64), rounded(0.01));
            assert!(ours < nearest, "{tokens} tokens: {ours} against {nearest}");
            assert!(ours < plain, "{tokens} tokens: {ours} against {plain}");
        }
    }

    #[test]
    fn one_column_after_the_other_finds_the_best_rounding_of_small_blocks() {
        // With a diagonal factor every column is on its own: nearest rounding under the best scale.
        for grid in GRIDS {
            let k = grid(&[1.0]).block();
            let mut gram = vec![0.0; k * k];
            (0..k).for_each(|i| gram[i * k + i] = 1.0 + i as f32);
            let mut r = random(3);
            let w: Vec<f32> = (0..k).map(|_| r()).collect();
            let grid = grid(&[1.0]);
            let p = round(&w, k, grid, &factor(&gram, k, 1e-6).unwrap());
            let weighted = |q: &[f32]| -> f64 {
                q.iter().zip(&w).enumerate().map(|(i, (q, w))| f64::from((1.0 + i as f32) * (w - q).powi(2))).sum()
            };
            let best = (1..=0x7eu8).map(|s| weighted(&under(&w, grid.scale(s)))).fold(f64::INFINITY, f64::min);
            let ours = weighted(&decode(&p, grid));
            assert!((ours - best).abs() <= 1e-6 * best, "{grid:?}: {ours} {best}");
        }
    }
}
