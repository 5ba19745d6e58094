//! Both mixers against plain restatements in f64, against captured inputs and outputs of transformers, and against
//! themselves in other batches, chunks, threads and instruction sets.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::*;
use crate::backend::cpu::buffer::BufferPool;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::threads::Threads;

mod delta_net;
mod mamba2;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.draw() % n as u64) as usize
    }

    /// Values from -scale to scale.
    fn uniform(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| scale * ((self.draw() >> 40) as f32 / (1u64 << 23) as f32 - 1.0)).collect()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A mixer, and what its input projections gave for a stream of tokens.
trait Subject: Sync {
    fn tokens(&self) -> usize;
    fn kept(&self) -> RecurrentShape;
    fn inner(&self) -> usize;
    /// What it makes of the tokens `batch` of the stream, in layer 1.
    fn run(&self, isa: Isa, batch: &[usize], spans: &[RecurrentSpan], states: &mut RecurrentStates) -> Vec<f32>;
    /// The same of a sequence of these tokens, restated in f64.
    fn exact(&self, sequence: Range<usize>) -> Vec<f64>;
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// silu(conv(u)) in f64; `u` [T, channels], `weight` [channels, kernel].
fn exact_convolution(u: &[f64], channels: usize, weight: &[f32], bias: &[f32]) -> Vec<f64> {
    let kernel = weight.len() / channels;
    let mut out = Vec::new();
    for t in 0..u.len() / channels {
        for c in 0..channels {
            let taps = (0..kernel).filter(|j| t + j + 1 >= kernel);
            let sum: f64 =
                taps.map(|j| f64::from(weight[c * kernel + j]) * u[(t + j + 1 - kernel) * channels + c]).sum();
            out.push(silu(f64::from(bias[c]) + sum));
        }
    }
    out
}

/// States of three layers, of which the middle one is the mixer's, with `slots` slots.
fn states(kept: RecurrentShape, slots: usize) -> RecurrentStates {
    let mut states = RecurrentStates::new(&[None, Some(kept), Some(RecurrentShape { tail: 1, channels: 3, state: 5 })]);
    states.grow(slots);
    states
}

/// A sequence in one pass, and what is kept of it: tail, then state.
fn whole(subject: &dyn Subject, isa: Isa, sequence: Range<usize>) -> [Vec<f32>; 2] {
    let mut states = states(subject.kept(), 1);
    let spans = [RecurrentSpan { rows: 0..sequence.len(), starts: true, slot: 0 }];
    let out = subject.run(isa, &sequence.collect::<Vec<_>>(), &spans, &mut states);
    [out, kept(&mut states, subject.kept(), 0)]
}

fn kept(states: &mut RecurrentStates, shape: RecurrentShape, slot: usize) -> Vec<f32> {
    let spans = [RecurrentSpan { rows: 0..0, starts: false, slot }];
    let slots = states.of_spans(1, shape, &spans).unwrap();
    [&slots[0].tail[..], &slots[0].state].concat()
}

/// Two sequences, each cut at random, pieces of both in one batch or not, in slots that held something else.
fn in_pieces(subject: &dyn Subject, isa: Isa, lengths: [usize; 2], random: &mut Random) -> Vec<[Vec<f32>; 2]> {
    let shape = subject.kept();
    let mut states = states(shape, 2);
    for slot in 0..2 {
        let junk = RecurrentSpan { rows: 0..1, starts: true, slot };
        subject.run(isa, &[lengths[0]], &[junk], &mut states);
    }
    states.grow(4);
    let mut slots = [1, 3];
    let mut done = [0, 0];
    let mut outs = [Vec::new(), Vec::new()];
    while done != lengths {
        let (mut batch, mut spans, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        let first = random.below(2);
        for of in [first, 1 - first] {
            let left = lengths[of] - done[of];
            let count = random.below(left + 1).min(if random.below(3) == 0 { 1 } else { left });
            if left == 0 || (count == 0 && done[of] > 0) {
                continue;
            }
            let start = batch.len();
            batch.extend((done[of]..done[of] + count).map(|t| of * lengths[0] + t));
            spans.push(RecurrentSpan { rows: start..batch.len(), starts: done[of] == 0, slot: slots[of] });
            owners.push((of, count));
            done[of] += count;
        }
        let mut out = &subject.run(isa, &batch, &spans, &mut states)[..];
        for (of, count) in owners {
            outs[of].extend_from_slice(out.split_off(..count * subject.inner()).unwrap());
        }
        // A sequence may go on in another slot.
        if random.below(4) == 0 {
            let free = (0..4).find(|s| !slots.contains(s)).unwrap();
            states.copy(slots[0], free).unwrap();
            slots[0] = free;
        }
    }
    outs.into_iter().zip(slots).map(|(out, slot)| [out, kept(&mut states, shape, slot)]).collect()
}

/// Everything that holds for any mixer.
fn check(subject: &dyn Subject, what: &str, random: &mut Random) {
    let first = 1 + random.below(subject.tokens() - 1);
    let sequences = [0..first, first..subject.tokens()];
    let all = Isa::available();
    let reference = sequences.clone().map(|sequence| whole(subject, all[0], sequence));
    for (sequence, [out, _]) in sequences.iter().zip(&reference) {
        let exact = subject.exact(sequence.clone());
        let largest = exact.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let off = out.iter().zip(&exact).fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(out.len() == exact.len() && off < 1e-5 * largest, "{what}: {off:e} of {largest}");
    }
    let lengths = [first, subject.tokens() - first];
    for isa in all {
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for _ in 0..3 {
                let got = pool.install(|| in_pieces(subject, isa, lengths, random));
                for (got, expected) in got.iter().zip(&reference) {
                    assert!(bits(&got[0]) == bits(&expected[0]), "{what}: outputs differ, {isa}, {threads} threads");
                    assert!(bits(&got[1]) == bits(&expected[1]), "{what}: states differ, {isa}, {threads} threads");
                }
            }
        }
    }
}

/// Values of a tensor of a fixture, as f32.
fn tensor(bytes: &[u8], name: &str) -> Vec<f32> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => {
            let pairs = tensor.data().as_chunks().0.iter();
            pairs.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)).collect()
        }
        other => panic!("{name} is {other}"),
    }
}

fn fixture(folder: &str, file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures-models/modelopt").join(folder).join(file);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// x [T, K] · Wᵀ, W [N, K].
fn project(x: &[f32], weight: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32;
    x.chunks_exact(k).flat_map(|x| weight.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

/// The largest difference relative to the largest value.
fn deviation(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    got.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

/// Two sequences of 24 tokens, the layout of the fixtures.
fn two_of_24() -> [RecurrentSpan; 2] {
    [0, 1].map(|slot| RecurrentSpan { rows: slot * 24..(slot + 1) * 24, starts: true, slot })
}

#[test]
fn softplus_is_exact_where_it_is_large_and_keeps_what_is_no_number() {
    for x in [-80.0f32, -20.0, -1.0, -1e-3, 0.0, 0.3, 5.0, 19.9, 25.0, 89.0, 1e10] {
        let exact = f64::from(x).max(0.0) + (-f64::from(x).abs()).exp().ln_1p();
        assert!((f64::from(softplus(x)) / exact - 1.0).abs() < 3e-7, "{x}: {} {exact}", softplus(x));
    }
    assert_eq!(softplus(300.0), 300.0);
    assert!(softplus(f32::NAN).is_nan());
    assert_eq!([softplus(f32::INFINITY), softplus(f32::NEG_INFINITY)], [f32::INFINITY, 0.0]);
}

#[test]
fn slots_keep_what_they_hold_and_are_given_out_once() {
    let shape = RecurrentShape { tail: 2, channels: 3, state: 4 };
    let mut states = states(shape, 1);
    let span = |slot| RecurrentSpan { rows: 0..0, starts: false, slot };
    states.of_spans(1, shape, &[span(0)]).unwrap()[0].state[2] = 7.0;
    states.grow(3);
    states.grow(2);
    assert_eq!(states.slots(), 3);
    states.copy(0, 2).unwrap();
    assert_eq!(states.of_spans(1, shape, &[span(2)]).unwrap()[0].state, [0.0, 0.0, 7.0, 0.0]);
    states.copy(2, 2).unwrap();
    assert!(states.copy(0, 3).is_err());
    let of = |states: &mut RecurrentStates, layer, shape, slots: &[usize]| {
        states.of_spans(layer, shape, &slots.iter().map(|s| span(*s)).collect::<Vec<_>>()).map(|s| s.len())
    };
    assert_eq!(of(&mut states, 1, shape, &[2, 0]).unwrap(), 2);
    let other = RecurrentShape { state: 5, ..shape };
    for (layer, shape, slots) in
        [(1, shape, &[0, 0][..]), (1, shape, &[3]), (0, shape, &[0]), (9, shape, &[0]), (1, other, &[0])]
    {
        assert!(of(&mut states, layer, shape, slots).is_err(), "layer {layer}, {shape:?}, slots {slots:?}");
    }
}

#[test]
fn spans_that_leave_a_row_out_are_refused() {
    let span = |rows| RecurrentSpan { rows, starts: true, slot: 0 };
    assert!(cover("test", &[span(0..2), span(2..2), span(2..5)], 5).is_ok());
    for spans in [
        vec![span(0..2), span(3..5)],
        vec![span(0..4)],
        vec![span(0..6)],
        vec![span(1..5)],
        vec![span(0..3), span(2..5)],
    ] {
        assert!(cover("test", &spans, 5).is_err(), "{spans:?}");
    }
}

/// Not a check but figures: `cargo test --release --lib recurrent -- --ignored --nocapture`.
#[test]
#[ignore = "prints how fast the mixers are"]
fn speed() {
    let mut random = Random(1);
    let pool = BufferPool::default();
    let layers = 24;
    let time = |what: &str, kept: RecurrentShape, run: &mut Run<'_>| {
        let bytes = (layers * kept.state * size_of::<f32>()) as f64;
        let mut states = RecurrentStates::new(&vec![Some(kept); layers]);
        states.grow(1);
        for (tokens, starts, repeats) in [(512, true, 3), (1, false, 20)] {
            let span = [RecurrentSpan { rows: 0..tokens, starts, slot: 0 }];
            let mut all = || (0..layers).for_each(|layer| run(tokens, &span, &mut states, layer));
            let s = best_of(repeats, &mut all);
            let (ms, rate) = (1e3 * s / layers as f64, 1e-9 * bytes / s);
            println!("{what}, {tokens} tokens: {ms:.3} ms a layer, {rate:.1} GB of state/s");
        }
        // What memory gives: each value read once and written once.
        let mut memory = vec![1.0f32; layers * kept.state];
        let mut pass = || {
            let parts = memory.par_chunks_mut(1 << 14);
            parts.for_each(|part| part.iter_mut().for_each(|x| *x *= 0.999));
        };
        println!("{what}, the state read and written alone: {:.1} GB/s", 1e-9 * bytes / best_of(20, &mut pass));
    };

    // Nemotron-Nano-9B-v2 has 128 heads of 80, Nemotron-H-8B of 64.
    let (heads, head_dim, groups, state, kernel) = (128, 64, 8, 128, 4);
    let shape =
        Mamba2Shape { heads, head_dim, groups, state, kernel, eps: 1e-5, time_step_limit: (0.0, f32::INFINITY) };
    let weights = Mamba2Weights {
        conv1d: random.uniform(shape.channels() * kernel, 0.5),
        conv1d_bias: None,
        a_log: random.uniform(heads, 1.0),
        d: random.uniform(heads, 1.0),
        dt_bias: random.uniform(heads, 1.0),
        norm: random.uniform(shape.inner(), 1.0),
    };
    let mixer = Mamba2::new(shape, weights).unwrap();
    let rows = random.uniform(512 * shape.projected(), 1.0);
    let mut out = vec![0.0; 512 * shape.inner()];
    time("mamba2", shape.kept(), &mut |tokens, span, states, layer| {
        let (rows, out) = (&rows[..tokens * shape.projected()], &mut out[..tokens * shape.inner()]);
        mixer.run(Isa::detect(), &Threads::ambient(), &pool, rows, span, states, layer, out).unwrap();
    });

    // Qwen3.5's 16 key and 48 value heads.
    let (key_heads, value_heads, key_dim, value_dim) = (16, 48, 128, 128);
    let shape = DeltaNetShape { key_heads, value_heads, key_dim, value_dim, kernel, eps: 1e-6 };
    let weights = DeltaNetWeights {
        conv1d: random.uniform(shape.channels() * kernel, 0.5),
        a_log: random.uniform(value_heads, 1.0),
        dt_bias: random.uniform(value_heads, 1.0),
        norm: random.uniform(value_dim, 1.0),
    };
    let mixer = DeltaNet::new(shape, weights).unwrap();
    let [qkv, z, a, b] = [shape.channels(), shape.inner(), value_heads, value_heads]
        .map(|width| (random.uniform(512 * width, 1.0), width));
    time("gated delta net", shape.kept(), &mut |tokens, span, states, layer| {
        let [qkv, z, a, b] = [&qkv, &z, &a, &b].map(|(rows, width)| &rows[..tokens * width]);
        let inputs = DeltaNetInputs { qkv, z, a, b };
        mixer
            .run(
                Isa::detect(),
                &Threads::ambient(),
                &pool,
                inputs,
                span,
                states,
                layer,
                &mut out[..tokens * shape.inner()],
            )
            .unwrap();
    });
}

/// Seconds of the fastest of some runs.
fn best_of(runs: usize, run: &mut dyn FnMut()) -> f64 {
    let time = |_| {
        let start = std::time::Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(time).fold(f64::INFINITY, f64::min)
}

/// Runs a layer on so many tokens.
type Run<'a> = dyn FnMut(usize, &[RecurrentSpan], &mut RecurrentStates, usize) + 'a;
