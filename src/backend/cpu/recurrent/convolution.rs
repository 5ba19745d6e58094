//! Causal depthwise convolution and SiLU, and what it keeps for the next pass.

use std::ops::Range;

use super::super::elementwise::exp;
use super::super::isa::{Isa, multiversion};
use super::super::threads::Threads;
use super::states::Slot;
use super::{RecurrentSpan, expect, pieces};
use crate::backend::BackendError;

/// A convolution's weights, and how its channels are divided among what reads them.
#[derive(Clone, Debug)]
pub(super) struct Convolution {
    /// [kernel, channels].
    taps: Vec<f32>,
    /// [channels].
    bias: Vec<f32>,
    kernel: usize,
    channels: usize,
    /// Channels of each part: of one head's x, of one group's B, and so on.
    parts: Vec<Range<usize>>,
}

/// Rows that hold the convolution's inputs among other columns.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) rows: &'a [f32],
    /// Of all columns.
    pub(super) width: usize,
    /// Column of the first channel.
    pub(super) first: usize,
}

impl Convolution {
    /// A convolution of `weight` [channels, kernel], whose channels are `parts`: how many of which width, in order.
    pub(super) fn new(
        context: &'static str,
        kernel: usize,
        parts: &[(usize, usize)],
        weight: &[f32],
        bias: Option<Vec<f32>>,
    ) -> Result<Self, BackendError> {
        let mut channels = 0;
        let mut ranges = Vec::new();
        for &(count, width) in parts {
            ranges.extend((0..count).map(|i| channels + i * width..channels + (i + 1) * width));
            channels += count * width;
        }
        expect(context, "conv1d.weight", weight.len(), channels * kernel)?;
        let bias = bias.unwrap_or_else(|| vec![0.0; channels]);
        expect(context, "conv1d.bias", bias.len(), channels)?;
        let taps = (0..kernel).flat_map(|j| (0..channels).map(move |c| weight[c * kernel + j])).collect();
        Ok(Self { taps, bias, kernel, channels, parts: ranges })
    }

    /// silu(conv(inputs)) of every span, which `finish` may change part by part, into `out`: after the spans before, part
    /// after part, each [the span's tokens, the part's width]. Tails move on.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run(
        &self,
        isa: Isa,
        threads: &Threads,
        inputs: Inputs<'_>,
        spans: &[RecurrentSpan],
        slots: &mut [&mut Slot],
        out: &mut [f32],
        finish: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        for (span, slot) in spans.iter().zip(&mut *slots).filter(|(span, _)| span.starts) {
            debug_assert_eq!(slot.tail.len(), (self.kernel - 1) * self.channels, "slot {}", span.slot);
            slot.tail.fill(0.0);
        }
        let mut tasks = Vec::with_capacity(spans.len() * self.parts.len());
        let mut rest = out;
        for (span, slot) in spans.iter().zip(&*slots) {
            for (i, part) in self.parts.iter().enumerate() {
                let own = rest.split_off_mut(..part.len() * span.rows.len()).unwrap_or_default();
                let task = Part { convolution: self, inputs, rows: span.rows.clone(), tail: &slot.tail, part };
                tasks.push((i, task, own));
            }
        }
        // An exponential takes about as long as eight taps.
        let work = inputs.rows.len() / inputs.width.max(1) * self.channels * (self.kernel + 8);
        let least = pieces(tasks.len(), work);
        threads.pieces(&mut tasks, least, |_, tasks| {
            for (i, part, out) in tasks {
                convolve(isa, part, out);
                finish(*i, out);
            }
        });
        for (span, slot) in spans.iter().zip(slots) {
            self.keep(inputs, span, &mut slot.tail);
        }
    }

    /// Leaves in `tail` the last inputs of what it held and the span's rows.
    fn keep(&self, inputs: Inputs<'_>, span: &RecurrentSpan, tail: &mut [f32]) {
        let (kept, channels) = (self.kernel - 1, self.channels);
        let new = span.rows.len().min(kept);
        tail.copy_within(new * channels.., 0);
        let from = span.rows.end - new;
        for (row, to) in (from..).zip(tail.chunks_exact_mut(channels).skip(kept - new)) {
            to.copy_from_slice(&inputs.rows[row * inputs.width + inputs.first..][..channels]);
        }
    }
}

/// One part of one span.
struct Part<'a> {
    convolution: &'a Convolution,
    inputs: Inputs<'a>,
    rows: Range<usize>,
    tail: &'a [f32],
    part: &'a Range<usize>,
}

multiversion! {
    /// Taps are added to the bias from the oldest input to the newest, then silu. `out` [rows, part].
    fn convolve(t: &Part<'_>, out: &mut [f32]) {
        let Convolution { taps, bias, kernel, channels, .. } = t.convolution;
        let (width, first) = (t.part.len(), t.part.start);
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            out.copy_from_slice(&bias[t.part.clone()]);
            for (tap, weights) in taps.chunks_exact(*channels).enumerate() {
                // Counted from the oldest row of the tail, which has kernel - 1.
                let at = token + tap;
                let input = if at + 1 < *kernel {
                    &t.tail[at * channels + first..]
                } else {
                    let row = t.rows.start + at + 1 - kernel;
                    &t.inputs.rows[row * t.inputs.width + t.inputs.first + first..]
                };
                for ((o, w), x) in out.iter_mut().zip(&weights[t.part.clone()]).zip(input) {
                    *o = w.mul_add(*x, *o);
                }
            }
            for o in out {
                *o /= 1.0 + exp(-*o);
            }
        }
    }
}
