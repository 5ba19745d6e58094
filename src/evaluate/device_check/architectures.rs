//! What only some architectures need: states, activations, gates, picked columns, and attention that is not plain.

use super::{ATTENTION, Checked, ELEMENTWISE, Failure, Side, deviation, of, values};
use crate::backend::{
    Activation, AttentionShape, Backend, BackendError, Batch, CacheLayout, DeltaInputs, DeltaNetShape, DeltaNetWeights,
    HeadNorms, HeadParameters, LayerCache, Mamba2Shape, Mamba2Weights, PAGE, QueryGrowth, Rotation, Run, Span,
};
use crate::formats::kv::KvFormat;
use crate::formats::synthetic;
use crate::random::SplitMix64;

/// A recurrent layer's sums build on each other from token to token.
const RECURRENT: f64 = 1e-5;

/// What one operation gave, and how far it may deviate.
type Given = (&'static str, Vec<f32>, f64);

/// Compares these on `device`.
///
/// # Errors
/// The device's own.
pub(super) fn check<A: Backend, B: Backend>(
    cpu: &A,
    device: &B,
    seed: u64,
    out: &mut Vec<Checked>,
) -> Result<(), Failure> {
    let all = of("what only some architectures need");
    let expected = Side { backend: cpu }.architectures(seed).map_err(&all)?;
    let got = Side { backend: device }.architectures(seed).map_err(&all)?;
    for ((name, got, allowed), (_, expected, _)) in got.iter().zip(&expected) {
        out.push(Checked { what: (*name).into(), deviation: deviation(got, expected), allowed: *allowed });
    }
    Ok(())
}

/// Two sequences, one of which begins in the second pass while the other goes on: what each pass's spans are.
fn passes(pages: &[Vec<u32>; 2], lengths: [usize; 2]) -> [Vec<Span>; 2] {
    let span = |start, len, of: usize| Span { start, len, pages: pages[of].clone(), slot: 1 - of as u32 };
    [vec![span(0, lengths[0], 0)], vec![span(0, lengths[1], 1), span(lengths[0], 3, 0)]]
}

impl<B: Backend> Side<'_, B> {
    fn architectures(&self, seed: u64) -> Result<Vec<Given>, BackendError> {
        let mut r = SplitMix64(seed);
        let mut out = self.activations(&mut r)?;
        let given = self.unusual_attention(&mut r)?;
        out.push(("attention with sinks, part turned, rows normed, narrow values", given, ATTENTION));
        out.push(("Mamba-2, two sequences in two passes", self.mamba(&mut r)?, RECURRENT));
        out.push(("gated delta net, two sequences in two passes", self.delta_net(&mut r)?, RECURRENT));
        Ok(out)
    }

    fn activations(&self, r: &mut SplitMix64) -> Result<Vec<Given>, BackendError> {
        const ROWS: usize = 3;
        const WIDTH: usize = 300;
        let b = self.backend;
        let mut tensor = |columns: usize| b.tensor(values(r, ROWS * columns), columns);
        let (x, y, narrow) = (tensor(WIDTH)?, tensor(WIDTH)?, tensor(1)?);
        let mut out = Vec::new();
        for (name, activation) in [
            ("relu²", Activation::Relu2),
            ("gelu(gate) · up", Activation::GeluTanh),
            ("clamped SwiGLU", Activation::ClampedSwiglu { limit: 1.5 }),
        ] {
            let up = Some(&y).filter(|_| activation.is_gated());
            out.push((name, b.to_host(&b.activate(x.clone(), up, activation)?)?, ELEMENTWISE));
        }
        out.push(("gate", b.to_host(&b.gate(x.clone(), &y)?)?, ELEMENTWISE));
        out.push(("gate, one a row", b.to_host(&b.gate(x.clone(), &narrow)?)?, ELEMENTWISE));
        out.push(("factor", b.to_host(&b.scale(x.clone(), 1.75)?)?, 0.0));
        let runs = [Run::of(1, 7, 100), Run::of(0, 299, 1), Run::of(0, 0, 150), Run::of(1, 0, 7)];
        out.push(("picked columns", b.to_host(&b.rearrange(&[&x, &y], &runs)?)?, 0.0));
        Ok(out)
    }

    fn unusual_attention(&self, r: &mut SplitMix64) -> Result<Vec<f32>, BackendError> {
        let b = self.backend;
        let (heads, kv_heads, head_dim, value_dim, half) = (6, 2, 48, 32, 10);
        let frequencies = (0..half).map(|i| 1000f32.powf(-(i as f32) / half as f32)).collect();
        let rope = b.load_rope(Rotation { frequencies, factor: 1.2 })?;
        let mut vector = |n: usize| b.load_vector((0..n).map(|_| 1.0 + 0.5 * synthetic::uniform(r)).collect());
        let (q_norm, k_norm, sinks) = (vector(heads * head_dim)?, vector(kv_heads * head_dim)?, vector(heads)?);
        let shape = AttentionShape {
            layer: 0,
            cache: 0,
            heads,
            kv_heads,
            head_dim,
            window: None,
            rope: Some(0),
            growth: Some(QueryGrowth { beta: 0.3, original: 16.0 }),
            scale: 0.2,
        };
        let layer = LayerCache { format: KvFormat::F32, kv_heads, head_dim, value_dim };
        let lengths = [270, 21];
        let count = (lengths[0] + 3usize).div_ceil(PAGE) as u32;
        let pages = [(0..count).rev().collect(), (count..count + 2).collect()];
        let layout = CacheLayout { layers: vec![layer], pages: count as usize + 2, ..CacheLayout::default() };
        let mut cache = b.new_cache(&layout)?;
        let mut out = Vec::new();
        for spans in passes(&pages, lengths) {
            let tokens: usize = spans.iter().map(|s| s.len).sum();
            let pass = b.prepare(&Batch { tokens: vec![0; tokens], spans }, &[&rope])?;
            let mut tensor =
                |width: usize| b.tensor((0..tokens * width).map(|_| synthetic::uniform(r)).collect(), width);
            let (q, k, v) = (tensor(heads * head_dim)?, tensor(kv_heads * head_dim)?, tensor(kv_heads * value_dim)?);
            let norms = HeadNorms { q: &q_norm, k: &k_norm, eps: 1e-6 };
            let parameters = HeadParameters { norms: Some(norms), sinks: Some(&sinks) };
            out.extend(b.to_host(&b.normed_attention(q, k, v, parameters, &shape, &pass, &mut cache)?)?);
        }
        Ok(out)
    }

    fn mamba(&self, r: &mut SplitMix64) -> Result<Vec<f32>, BackendError> {
        let b = self.backend;
        let shape = Mamba2Shape {
            heads: 6,
            head_dim: 20,
            groups: 2,
            state: 48,
            kernel: 4,
            eps: 1e-5,
            time_step_limit: (0.0, f32::INFINITY),
        };
        let mut some = |n: usize, scale: f32| (0..n).map(|_| scale * synthetic::uniform(r)).collect::<Vec<f32>>();
        let weights = Mamba2Weights {
            conv1d: some(shape.channels() * shape.kernel, 1.0),
            conv1d_bias: Some(some(shape.channels(), 0.5)),
            a_log: some(shape.heads, 1.5),
            d: some(shape.heads, 1.0),
            dt_bias: some(shape.heads, 2.0),
            norm: some(shape.inner(), 1.0),
        };
        let mixer = b.load_mamba(shape, weights)?;
        let layout = CacheLayout { recurrent: vec![shape.kept()], slots: 2, ..CacheLayout::default() };
        let mut cache = b.new_cache(&layout)?;
        let mut out = Vec::new();
        for spans in passes(&[vec![0, 1], vec![2]], [19, 2]) {
            let tokens: usize = spans.iter().map(|s| s.len).sum();
            let pass = b.prepare(&Batch { tokens: vec![0; tokens], spans }, &[])?;
            let x = b.tensor(some(tokens * shape.projected(), 3.0), shape.projected())?;
            out.extend(b.to_host(&b.mamba(x, &mixer, 0, &pass, &mut cache)?)?);
        }
        Ok(out)
    }

    fn delta_net(&self, r: &mut SplitMix64) -> Result<Vec<f32>, BackendError> {
        let b = self.backend;
        let shape = DeltaNetShape { key_heads: 2, value_heads: 6, key_dim: 40, value_dim: 20, kernel: 4, eps: 1e-5 };
        let mut some = |n: usize, scale: f32| (0..n).map(|_| scale * synthetic::uniform(r)).collect::<Vec<f32>>();
        let weights = DeltaNetWeights {
            conv1d: some(shape.channels() * shape.kernel, 1.0),
            a_log: some(shape.value_heads, 1.5),
            dt_bias: some(shape.value_heads, 2.0),
            norm: some(shape.value_dim, 1.0),
        };
        let mixer = b.load_delta_net(shape, weights)?;
        let layout = CacheLayout { recurrent: vec![shape.kept()], slots: 2, ..CacheLayout::default() };
        let mut cache = b.new_cache(&layout)?;
        let mut out = Vec::new();
        for spans in passes(&[vec![0, 1], vec![2]], [19, 2]) {
            let tokens: usize = spans.iter().map(|s| s.len).sum();
            let pass = b.prepare(&Batch { tokens: vec![0; tokens], spans }, &[])?;
            let mut tensor = |width: usize| b.tensor(some(tokens * width, 3.0), width);
            let inputs = DeltaInputs {
                qkv: tensor(shape.channels())?,
                z: tensor(shape.inner())?,
                b: tensor(shape.value_heads)?,
                a: tensor(shape.value_heads)?,
            };
            out.extend(b.to_host(&b.delta_net(inputs, &mixer, 0, &pass, &mut cache)?)?);
        }
        Ok(out)
    }
}
